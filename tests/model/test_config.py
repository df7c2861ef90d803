"""What a checkpoint folder says about itself, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from reference import edit_json, sentence_transformers_layout, write_json

from model.config import BertConfig, ModelConfig, transformer_folder
from model.errors import CheckpointError, ModelError, UnsupportedModel

SOUND = {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 4}


def test_sizes_come_from_the_file_and_defaults_are_bert_base() -> None:
    config = BertConfig.from_json({**SOUND, "vocab_size": 77, "layer_norm_eps": 1e-5, "type_vocab_size": None, "other": "x"})
    assert (config.vocab_size, config.hidden_size, config.head_size, config.layer_norm_eps) == (77, 32, 8, 1e-5)
    base = BertConfig.from_json({"model_type": "bert"})
    assert (base.num_hidden_layers, base.hidden_size, base.num_attention_heads, base.head_size) == (12, 768, 12, 64)
    assert (base.intermediate_size, base.vocab_size, base.type_vocab_size, base.hidden_act) == (3072, 30522, 2, "gelu")


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"model_type": "roberta"}, UnsupportedModel, "model_type 'roberta' is not supported; supported is 'bert'"),
        ({"model_type": None}, UnsupportedModel, "model_type None is not supported"),
        ({"position_embedding_type": "relative_key"}, UnsupportedModel, "position_embedding_type 'relative_key'"),
        ({"position_embedding_type": "alibi"}, UnsupportedModel, "position_embedding_type 'alibi'"),
        ({"is_decoder": True}, UnsupportedModel, "is_decoder is true"),
        (
            {"hidden_act": "mish"},
            UnsupportedModel,
            "hidden_act 'mish' is not supported; supported are gelu, gelu_new, relu, silu",
        ),
        ({"hidden_act": ["gelu"]}, CheckpointError, "hidden_act is ['gelu']"),
        ({"num_attention_heads": 5}, CheckpointError, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"num_attention_heads": 0}, CheckpointError, "num_attention_heads is 0"),
        ({"num_hidden_layers": -1}, CheckpointError, "num_hidden_layers is -1"),
        ({"hidden_size": "32"}, CheckpointError, "hidden_size is '32'"),
        ({"vocab_size": 1.5}, CheckpointError, "vocab_size is 1.5"),
        ({"intermediate_size": True}, CheckpointError, "intermediate_size is True"),
        ({"layer_norm_eps": "tiny"}, CheckpointError, "layer_norm_eps is 'tiny'"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error) as caught:
        BertConfig.from_json({**SOUND, **changes})
    assert named in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"bert"', "\xff\xfe"])
@pytest.mark.parametrize("name", ["config.json", "sentence_bert_config.json", "tokenizer_config.json", "modules.json"])
def test_files_that_are_no_json_objects(tmp_path: Path, name: str, content: str) -> None:
    write_json(tmp_path / "config.json", SOUND)
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=name):
        ModelConfig.from_folder(tmp_path)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing: .* is not a checkpoint folder"):
        ModelConfig.from_folder(tmp_path)


def test_a_plain_bert_has_its_own_habits(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    assert (config.pooling, config.normalize, config.dimension, config.max_tokens) == ("cls", False, 32, 512)
    assert (config.dense, config.prompts, config.default_prompt) == ((), {}, None)


def test_minilm(minilm: Path) -> None:
    config = ModelConfig.from_folder(minilm)
    assert (config.pooling, config.normalize, config.dimension, config.max_tokens) == ("mean", True, 384, 256)


@pytest.mark.parametrize(
    ("sentence", "tokenizer", "wanted"),
    [
        ({"max_seq_length": 128}, {"model_max_length": 64}, 128),
        ({"max_seq_length": 4096}, {}, 512),
        ({"max_seq_length": None}, {"model_max_length": 64}, 64),
        ({}, {"model_max_length": 1000000000000000019884624838656}, 512),
        ({}, {"model_max_length": 1e30}, 512),
        ({}, {}, 512),
        ({}, {"max_len": 64}, 64),
        ({}, {"max_len": 64, "model_max_length": 32}, 32),
        ({"max_seq_length": 128, "tokenizer_args": {"model_max_length": 64}}, {}, 64),
        ({"processor_kwargs": {"model_max_length": 64}}, {"model_max_length": 32}, 64),
        ({"max_seq_length": 128, "processor_kwargs": {"padding_side": "left"}, "tokenizer_args": {}}, {}, 128),
    ],
)
def test_the_longest_text(folder: Path, sentence: dict[str, Any], tokenizer: dict[str, Any], wanted: int) -> None:
    write_json(folder / "sentence_bert_config.json", sentence)
    write_json(folder / "tokenizer_config.json", tokenizer)
    assert ModelConfig.from_folder(folder).max_tokens == wanted


@pytest.mark.parametrize("value", [-1, "many", [3], float("nan"), 0.5])
def test_a_longest_text_that_is_none(folder: Path, value: Any) -> None:
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": value})
    with pytest.raises(CheckpointError, match="max_seq_length"):
        ModelConfig.from_folder(folder)


@pytest.mark.parametrize("name", ["model_args", "model_kwargs"])
def test_options_that_give_no_other_numbers(folder: Path, name: str) -> None:
    """A dtype and kernels are the machine's here; the rest are what sentence-transformers writes of itself."""
    modality = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
    written = {"transformer_task": "feature-extraction", "modality_config": modality, "module_output_name": "token_embeddings"}
    options = {name: {"torch_dtype": "bfloat16", "attn_implementation": "sdpa"}, "config_args": {}, "processing_kwargs": {}}
    write_json(folder / "sentence_bert_config.json", {**written, **options, "unpad_inputs": True})
    assert ModelConfig.from_folder(folder).max_tokens == 512


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"config_kwargs": {"hidden_act": "relu"}}, "config_kwargs with hidden_act 'relu' is not supported"),
        ({"config_args": {"num_hidden_layers": 1}}, "config_args with num_hidden_layers 1 is not supported"),
        ({"model_args": {"variant": "fp16"}}, "model_args with variant 'fp16' is not supported"),
        ({"tokenizer_args": {"do_lower_case": False}}, "tokenizer_args with do_lower_case False is not supported"),
        ({"processor_kwargs": {"truncation_side": "left"}}, "processor_kwargs with truncation_side 'left' is not supported"),
        ({"processing_kwargs": {"text": {"max_length": 8}}}, "processing_kwargs.text with max_length 8 is not supported"),
        ({"processing_kwargs": {"common": {"x": 1}}}, "processing_kwargs.common with x 1 is not supported"),
        ({"model_kwargs": ["x"]}, "model_kwargs is ['x'], wanted an object; correct the file"),
    ],
)
def test_options_that_are_refused_by_name(folder: Path, options: dict[str, Any], named: str) -> None:
    write_json(folder / "sentence_bert_config.json", options)
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_folder(folder)
    assert f"sentence_bert_config.json: {named}" in str(caught.value)


def old(*modes: str) -> dict[str, Any]:
    """1_Pooling/config.json as sentence-transformers wrote it for years."""
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": 32, **{f"pooling_mode_{name}": name in modes for name in names}}


def new(mode: Any, **others: Any) -> dict[str, Any]:
    return {"embedding_dimension": 32, "pooling_mode": mode, "include_prompt": True, **others}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (old("cls_token"), "cls"),
        (old("mean_tokens"), "mean"),
        (old("max_tokens"), "max"),
        (old("lasttoken"), "last"),
        ({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}, "mean"),
        ({"word_embedding_dimension": 32}, "mean"),
        (old(), "mean"),
        (new("cls"), "cls"),
        (new("mean"), "mean"),
        (new("max"), "max"),
        (new("lasttoken"), "last"),
        (new(["mean"]), "mean"),
    ],
)
def test_poolings_of_sentence_transformers(folder: Path, settings: dict[str, Any], wanted: str) -> None:
    assert ModelConfig.from_folder(sentence_transformers_layout(folder, settings)).pooling == wanted


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (old("mean_tokens", "max_tokens"), "pooling mean + max"),
        (old("mean_sqrt_len_tokens"), "pooling mean_sqrt_len"),
        (old("weightedmean_tokens"), "pooling weightedmean"),
        (new("weightedmean"), "pooling weightedmean"),
        (new("mean_sqrt_len_tokens"), "pooling mean_sqrt_len_tokens"),
        (new(["cls", "mean"]), "pooling cls + mean"),
        (new([]), "pooling of no kind"),
        (new(5), "pooling 5"),
        (new([1, 2]), "pooling 1 + 2"),
        (new("mean", include_prompt=False), "include_prompt false"),
    ],
)
def test_poolings_that_are_refused_by_name(folder: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        ModelConfig.from_folder(sentence_transformers_layout(folder, settings))
    assert f"{named} is not supported" in str(caught.value)


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        (["Transformer", "Pooling", "LSTM"], "module LSTM is not supported"),
        (["Transformer", "WeightedLayerPooling"], "module WeightedLayerPooling is not supported"),
        (["CLIPModel"], "module CLIPModel is not supported"),
        (["Pooling", "Transformer"], "order Pooling -> Transformer is not supported"),
        (["Transformer", "Normalize", "Pooling"], "order Transformer -> Normalize -> Pooling"),
        (["Transformer", "Pooling", "Normalize", "Dense"], "order Transformer -> Pooling -> Normalize -> Dense"),
        (["Transformer", "Transformer", "Pooling"], "order Transformer -> Transformer -> Pooling"),
        (["Transformer", "Pooling", "Pooling"], "order Transformer -> Pooling -> Pooling"),
        ([], "order  is not supported"),
    ],
)
def test_modules_that_are_refused_by_name(folder: Path, kinds: list[str], named: str) -> None:
    write_json(folder / "modules.json", [{"type": f"sentence_transformers.models.{kind}", "path": ""} for kind in kinds])
    with pytest.raises(UnsupportedModel) as caught:
        ModelConfig.from_folder(folder)
    assert named in str(caught.value)


@pytest.mark.parametrize("content", ["{}", '{"a": 1}', "[1]", "[{}]", "[[]]", "3"])
def test_modules_that_are_none(folder: Path, content: str) -> None:
    (folder / "modules.json").write_text(content)
    with pytest.raises(ModelError, match=r"modules\.json"):
        ModelConfig.from_folder(folder)


@pytest.mark.parametrize("outside", ["../elsewhere", "/etc", "1_Pooling/../../x"])
def test_modules_outside_the_folder(folder: Path, outside: str) -> None:
    kinds = {"Transformer": "", "Pooling": outside}
    write_json(folder / "modules.json", [{"type": f"x.{kind}", "path": path} for kind, path in kinds.items()])
    with pytest.raises(CheckpointError, match="names folders outside"):
        ModelConfig.from_folder(folder)


def test_names_of_later_versions_of_sentence_transformers(folder: Path) -> None:
    sentence_transformers_layout(folder, new("mean"), normalize=True)
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        module["type"] = module["type"].replace("sentence_transformers.models.", "sentence_transformers.base.modules.x.")
    write_json(folder / "modules.json", modules)
    assert ModelConfig.from_folder(folder).normalize


@pytest.mark.parametrize(
    ("chain", "named"),
    [
        ([{"in_features": 31, "out_features": 8}], "2_Dense/config.json: in_features is 31, wanted 32"),
        (
            [{"in_features": 32, "out_features": 8}, {"in_features": 9, "out_features": 8}],
            "3_Dense/config.json: in_features is 9, wanted 8",
        ),
        ([{"in_features": 32}], "2_Dense/config.json: out_features is None"),
        ([{"in_features": "32", "out_features": 8}], "2_Dense/config.json: in_features is '32'"),
        ([{"in_features": 32, "out_features": 0}], "2_Dense/config.json: out_features is 0"),
        ([{"in_features": 32, "out_features": 8, "use_residual": True}], "with a residual is not supported"),
        ([{"in_features": 32, "out_features": 8, "module_input_name": "token_embeddings"}], "on token embeddings"),
    ],
)
def test_projections_that_do_not_fit(folder: Path, chain: list[dict[str, Any]], named: str) -> None:
    sentence_transformers_layout(folder, new("mean"), dense=[(settings, {}) for settings in chain])
    with pytest.raises(ModelError) as caught:
        ModelConfig.from_folder(folder)
    assert named in str(caught.value)


def test_the_old_layout_with_the_transformer_in_a_folder(folder: Path, tmp_path: Path) -> None:
    top = tmp_path / "top"
    sentence_transformers_layout(top, old("mean_tokens"))
    folder.rename(top / "0_Transformer")
    modules = json.loads((top / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    write_json(top / "modules.json", modules)
    write_json(top / "0_Transformer" / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": True})
    config = ModelConfig.from_folder(top)
    assert transformer_folder(top) == top / "0_Transformer"
    assert (config.pooling, config.max_tokens, config.lower_case) == ("mean", 128, True)


def test_prompts(folder: Path) -> None:
    prompts = {"query": "Represent this: ", "document": ""}
    write_json(folder / "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "query"})
    config = ModelConfig.from_folder(folder)
    assert (config.prompts, config.default_prompt) == (prompts, "query")


def test_an_architecture_is_told(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["BertForMaskedLM"])
    assert ModelConfig.from_folder(folder).architecture == "BertForMaskedLM"
