"""Checkpoints with heads, against transformers and sentence-transformers: classifiers, rerankers, SPLADE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import VOCABULARY
from reference import edit_json, lively_bert, random_rows, write_json
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SparseEncoder
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizerFast,
)

from model.attention import attend_sdpa
from model.batch import pack
from model.config import ModelConfig
from model.cpu import CpuRunner
from model.encoder import Encoder
from model.errors import CheckpointError, ModelError, UnsupportedModel
from model.graphs import Width, find_bucket, pad_to
from model.tokenizer import Tokenizer
from model.tokens import Tokens
from model.vectors import nonzero, sigmoid

ROWS = random_rows((7, 1, 20, 3, 300, 250), segments=2)


def logits(model: Any, row: Tokens) -> np.ndarray:
    """transformers' logits of one text, alone and therefore without padding."""
    with torch.inference_mode():
        ids, types = (torch.from_numpy(part).long()[None] for part in (row.ids, row.types))
        return model(input_ids=ids, token_type_ids=types).logits[0].numpy()


def answers(folder: Path, pooling: Any = None) -> np.ndarray:
    """What a checkpoint makes of ROWS: plain, and by the CPU's runner all together and alone."""
    encoder = Encoder.from_folder(folder, pooling)
    task = encoder.config.task
    with torch.inference_mode():
        plain = encoder(pack(ROWS), task).numpy()
    runner = CpuRunner(encoder)
    np.testing.assert_allclose(runner(ROWS, task), plain, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.concatenate([runner([row], task) for row in ROWS]), plain, rtol=0, atol=1e-5)
    return plain


CLASSIFIERS = {
    "two labels": ({}, "classifier"),
    "three labels": ({"num_labels": 3, "problem_type": "single_label_classification"}, "classifier"),
    "labels by name": ({"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}, "classifier"),
    "any of four": ({"num_labels": 4, "problem_type": "multi_label_classification"}, "classifier"),
    "three numbers": ({"num_labels": 3, "problem_type": "regression"}, "classifier"),
    "one number": ({"num_labels": 1, "problem_type": "regression"}, "reranker"),
    "one label": ({"num_labels": 1}, "reranker"),
    "a dropout of its own": ({"num_labels": 3, "classifier_dropout": 0.9}, "classifier"),
    "another activation": ({"hidden_act": "relu"}, "classifier"),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_scores_are_transformers_logits(tmp_path: Path, case: str) -> None:
    options, kind = CLASSIFIERS[case]
    model = lively_bert(architecture=BertForSequenceClassification, **options)
    model.save_pretrained(tmp_path)
    np.testing.assert_allclose(answers(tmp_path), np.stack([logits(model, row) for row in ROWS]), rtol=0, atol=1e-5)
    config = ModelConfig.from_folder(tmp_path)
    assert (config.kind, config.problem_type) == (kind, options.get("problem_type"))
    assert config.labels == tuple(model.config.id2label[place] for place in range(model.config.num_labels))
    assert config.dimension == model.config.num_labels
    assert Encoder.from_folder(tmp_path).poolings == ()


def splade(model: Any) -> np.ndarray:
    """log(1 + ReLU(logits)), the largest over the tokens of each text."""
    return np.stack([np.log1p(np.maximum(logits(model, row), 0)).max(axis=0) for row in ROWS])


def swap_decoder(folder: Path) -> None:
    """Old files hold the shared decoder too, under both names of its bias, beside heads of other tasks."""
    path = folder / "model.safetensors"
    state = load_file(path)
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"].clone()
    state |= {"cls.seq_relationship.weight": torch.zeros(2, 32), "bert.pooler.dense.weight": torch.zeros(32, 32)}
    save_file(state, path)


MASKED: dict[str, tuple[dict[str, Any], Callable[[Path], None]]] = {
    "a tied decoder": ({}, lambda folder: None),
    "a decoder of its own": ({"tie_word_embeddings": False}, lambda folder: None),
    "a decoder in the file": ({}, swap_decoder),
    "another activation": ({"hidden_act": "gelu_new"}, lambda folder: None),
    "a large vocabulary": ({"vocab_size": 5000}, lambda folder: None),
}


@pytest.mark.parametrize("case", MASKED)
def test_sparse_weights_are_the_formula_on_transformers_logits(tmp_path: Path, case: str) -> None:
    options, change = MASKED[case]
    model = lively_bert(architecture=BertForMaskedLM, **options)
    model.save_pretrained(tmp_path)
    change(tmp_path)
    wanted = splade(model)
    assert 0.1 < (wanted > 0).mean() < 1
    np.testing.assert_allclose(answers(tmp_path, "splade"), wanted, rtol=0, atol=1e-5)
    config = ModelConfig.from_folder(tmp_path, "splade")
    assert (config.kind, config.dimension) == ("sparse", model.config.vocab_size)


def test_a_masked_language_model_is_an_embedder_unless_splade_is_asked_for(tmp_path: Path) -> None:
    model = lively_bert(architecture=BertForMaskedLM)
    model.save_pretrained(tmp_path)
    config = ModelConfig.from_folder(tmp_path)
    assert (config.kind, config.pooling, config.dimension) == ("embedder", "cls", 32)
    assert ModelConfig.from_folder(tmp_path, "mean").pooling == "mean"


def splade_layout(folder: Path, first: str = "Transformer", **settings: Any) -> Path:
    """SpladePooling on a checkpoint folder, as sentence-transformers saves it."""
    kinds = {first: "", "SpladePooling": "1_SpladePooling"}
    write_json(
        folder / "modules.json", [{"type": f"sentence_transformers.x.{kind}", "path": path} for kind, path in kinds.items()]
    )
    write_json(folder / "1_SpladePooling" / "config.json", {"pooling_strategy": "max", "activation_function": "relu", **settings})
    return folder


@pytest.mark.parametrize("first", ["Transformer", "MLMTransformer"])
def test_a_folder_says_that_it_is_sparse(tmp_path: Path, first: str) -> None:
    model = lively_bert(architecture=BertForMaskedLM)
    model.save_pretrained(tmp_path)
    np.testing.assert_allclose(answers(splade_layout(tmp_path, first)), splade(model), rtol=0, atol=1e-5)
    assert ModelConfig.from_folder(tmp_path, "splade").kind == "sparse"


@pytest.mark.parametrize("setting", [{"pooling_strategy": "sum"}, {"activation_function": "log1p_relu"}])
def test_variants_of_splade_are_refused_by_name(tmp_path: Path, setting: dict[str, str]) -> None:
    lively_bert(architecture=BertForMaskedLM).save_pretrained(tmp_path)
    (found,) = setting.values()
    with pytest.raises(UnsupportedModel, match=f"'{found}' is not supported"):
        ModelConfig.from_folder(splade_layout(tmp_path, **setting))


def test_a_pooling_in_modules_makes_an_embedder_of_any_architecture(tmp_path: Path) -> None:
    lively_bert(architecture=BertForSequenceClassification).save_pretrained(tmp_path)
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    write_json(tmp_path / "modules.json", [{"type": kind, "path": path} for kind, path in kinds.items()])
    write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode": "max"})
    config = ModelConfig.from_folder(tmp_path)
    assert (config.kind, config.pooling) == ("embedder", "max")


@pytest.mark.parametrize(
    ("architecture", "pooling", "named"),
    [
        (BertModel, "splade", r"pooling splade was asked for and the checkpoint is an embedder \(BertModel\)"),
        (BertForTokenClassification, "splade", "the checkpoint is an embedder"),
        (BertForSequenceClassification, "splade", "the checkpoint is a classifier"),
        (BertForSequenceClassification, "mean", "the checkpoint is a classifier"),
    ],
)
def test_a_pooling_that_the_kind_does_not_have(tmp_path: Path, architecture: type[Any], pooling: Any, named: str) -> None:
    lively_bert(architecture=architecture).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=named):
        Encoder.from_folder(tmp_path, pooling)


@pytest.mark.parametrize(
    ("architecture", "changes", "named"),
    [
        (BertForSequenceClassification, {"id2label": {"0": "a", "2": "b"}}, "id2label"),
        (BertForSequenceClassification, {"id2label": {}}, "id2label"),
        (BertForSequenceClassification, {"id2label": ["a", "b"]}, "id2label"),
        (BertForSequenceClassification, {"id2label": 5}, "id2label"),
        (BertForSequenceClassification, {"id2label": None, "num_labels": "2"}, "num_labels"),
        (BertForSequenceClassification, {"problem_type": "ranking"}, "problem_type is 'ranking'"),
        (BertForSequenceClassification, {"id2label": {"0": "a"}}, r"classifier.weight is \[2, 32\], wanted \[1, 32\]"),
        (BertForMaskedLM, {"tie_word_embeddings": False}, "missing cls.predictions.decoder.weight"),
        (BertModel, {"architectures": ["BertForSequenceClassification"]}, "missing classifier.weight"),
    ],
)
def test_a_head_that_does_not_match_its_description(tmp_path: Path, architecture: type[Any], changes: Any, named: str) -> None:
    lively_bert(architecture=architecture).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=named):
        Encoder.from_folder(tmp_path, "splade" if architecture is BertForMaskedLM else None)


@pytest.mark.parametrize("architecture", [BertForSequenceClassification, BertModel])
def test_all_tasks_on_a_batch_that_is_padded_for_a_graph(tmp_path: Path, architecture: type[Any]) -> None:
    """What the GPU's runner does, without one."""
    lively_bert(architecture=architecture).save_pretrained(tmp_path)
    encoder, rows = Encoder.from_folder(tmp_path), ROWS[:4]
    bucket = find_bucket(rows, [Width(512)])
    assert bucket is not None
    batch = pad_to(bucket, rows)
    for layer in encoder.bert.layers:
        layer.attention.attend = attend_sdpa
    with torch.inference_mode():
        for task in encoder.poolings or (encoder.config.task,):
            found = encoder(batch, task)[-len(rows) :]
            torch.testing.assert_close(found, encoder(pack(rows), task), rtol=0, atol=1e-5)


def test_another_kind_has_no_pooling(tmp_path: Path) -> None:
    lively_bert(architecture=BertForSequenceClassification).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no pooling 'cls'; wanted one of scores"):
        Encoder.from_folder(tmp_path)(pack(ROWS), "cls")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_heads_stand_on_a_rounded_encoder_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = lively_bert(architecture=BertForMaskedLM, num_attention_heads=2)
    model.save_pretrained(tmp_path)
    try:
        runner = CpuRunner(Encoder.from_folder(tmp_path, "splade"), dtype)
    except UnsupportedModel:
        pytest.skip("this processor has no int8")
    wanted = splade(model)
    assert np.abs(runner(ROWS, "sparse") - wanted).mean() < 0.05 * wanted.mean()


def test_a_sparse_row_holds_what_is_not_zero() -> None:
    rows = np.array([[0, 1.5, 0, 0.25], [0, 0, 0, 0], [np.nan, 0, 0, 2]], dtype=np.float32)
    first, second, third = nonzero(rows)
    assert first.tolist() == [[1, 1.5], [3, 0.25]]
    assert second.shape == (0, 2)
    assert third[:, 0].tolist() == [0, 3]
    assert np.isnan(third[0, 1])  # to be found by whoever looks for it


TEXTS = ["abc", "a b c d e f", "我在吃苹果"]


def with_tokenizer(model: Any, folder: Path) -> str:
    """A model with a small vocabulary, as transformers saves both."""
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def test_a_sparse_encoder_of_sentence_transformers(tmp_path: Path) -> None:
    theirs = SparseEncoder(with_tokenizer(lively_bert(architecture=BertForMaskedLM), tmp_path / "plain"), device="cpu")
    theirs.save_pretrained(str(tmp_path / "saved"))
    encoder = Encoder.from_folder(tmp_path / "saved")
    rows = Tokenizer.from_folder(tmp_path / "saved", encoder.config).encode(TEXTS)
    wanted = theirs.encode(TEXTS, convert_to_sparse_tensor=False).numpy()
    np.testing.assert_allclose(CpuRunner(encoder)(rows, "sparse"), wanted, rtol=0, atol=1e-5)


def test_a_cross_encoder_of_sentence_transformers(tmp_path: Path) -> None:
    model = lively_bert(architecture=BertForSequenceClassification, num_labels=1)
    theirs = CrossEncoder(with_tokenizer(model, tmp_path / "plain"), device="cpu")
    theirs.save_pretrained(str(tmp_path / "saved"))
    encoder = Encoder.from_folder(tmp_path / "saved")
    assert encoder.config.kind == "reranker"
    pairs = [("abc", text) for text in TEXTS]
    rows = Tokenizer.from_folder(tmp_path / "saved", encoder.config).encode(pairs)
    np.testing.assert_allclose(sigmoid(CpuRunner(encoder)(rows, "scores"))[:, 0], theirs.predict(pairs), rtol=0, atol=1e-5)
