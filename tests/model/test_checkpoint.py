"""Weights in every shape that public checkpoints come in, and one clear error for every shape that they should not have."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import edit_json, lively_bert, random_rows, theirs
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from model.batch import pack
from model.config import ModelConfig
from model.encoder import Encoder
from model.errors import CheckpointError, ModelError

State = dict[str, Tensor]
ROWS = random_rows((7, 1, 20), segments=2)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as transformers saves it: model.safetensors without prefixes, with a pooler."""
    folder = tmp_path_factory.mktemp("original")
    lively_bert().save_pretrained(folder)
    return folder


@pytest.fixture
def state(original: Path) -> State:
    return load_file(original / "model.safetensors")


@pytest.fixture
def target(original: Path, tmp_path: Path) -> Path:
    """A folder with the original's config.json and no weights yet."""
    shutil.copy(original / "config.json", tmp_path)
    return tmp_path


def hidden(folder: Path) -> np.ndarray:
    with torch.inference_mode():
        return Encoder.from_folder(folder).hidden(pack(ROWS)).numpy()


def renamed(state: State, rename: Callable[[str], str]) -> State:
    return {rename(name): tensor for name, tensor in state.items()}


def shards(state: State, suffix: str) -> dict[str, State]:
    """The state in three files."""
    names = [f"part-{number}.{suffix}" for number in range(3)]
    return {name: dict(list(state.items())[number::3]) for number, name in enumerate(names)}


def save_index(folder: Path, index: str, files: dict[str, State], save: Callable[[State, Path], None]) -> None:
    for name, part in files.items():
        save(part, folder / name)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Files ---------------------------------------------------------------------------------------------------------------


FILES: dict[str, Callable[[State, Path], None]] = {
    "safetensors": lambda state, folder: save_file(state, folder / "model.safetensors"),
    "sharded safetensors": lambda state, folder: save_index(
        folder, "model.safetensors.index.json", shards(state, "safetensors"), save_file
    ),
    "bin": lambda state, folder: torch.save(state, folder / "pytorch_model.bin"),
    "old bin": lambda state, folder: torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False),
    "sharded bin": lambda state, folder: save_index(folder, "pytorch_model.bin.index.json", shards(state, "bin"), torch.save),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file(original: Path, state: State, target: Path, kind: str) -> None:
    FILES[kind](state, target)
    np.testing.assert_array_equal(hidden(target), hidden(original))


def test_shards_as_transformers_saves_them(original: Path, tmp_path: Path) -> None:
    lively_bert().save_pretrained(tmp_path, max_shard_size="30KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    np.testing.assert_array_equal(hidden(tmp_path), hidden(original))


def test_safetensors_are_preferred_to_a_pickle(original: Path, state: State, target: Path) -> None:
    FILES["safetensors"](state, target)
    (target / "pytorch_model.bin").write_bytes(b"not to be read")
    np.testing.assert_array_equal(hidden(target), hidden(original))


# Names ---------------------------------------------------------------------------------------------------------------


def old_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


NAMES: dict[str, Callable[[State], State]] = {
    "bert.": lambda state: renamed(state, lambda name: f"bert.{name}"),
    "model.": lambda state: renamed(state, lambda name: f"model.{name}"),
    "model.bert.": lambda state: renamed(state, lambda name: f"model.bert.{name}"),
    "bert. on some": lambda state: renamed(state, lambda name: name if name.startswith("pooler") else f"bert.{name}"),
    "gamma and beta": lambda state: renamed(state, old_norms),
    "bert. with gamma and beta": lambda state: renamed(state, lambda name: f"bert.{old_norms(name)}"),
    "position_ids": lambda state: {**state, "embeddings.position_ids": torch.arange(512)[None]},
    "bert.position_ids": lambda state: {
        **renamed(state, lambda name: f"bert.{name}"),
        "bert.embeddings.position_ids": torch.arange(512)[None],
        "bert.embeddings.token_type_ids": torch.zeros(1, 512, dtype=torch.int64),
    },
    "heads": lambda state: {
        **renamed(state, lambda name: f"bert.{name}"),
        "cls.predictions.bias": torch.zeros(5),
        "cls.seq_relationship.weight": torch.zeros(2, 32),
        "classifier.weight": torch.zeros(3, 32),
        "qa_outputs.bias": torch.zeros(2),
    },
}


@pytest.mark.parametrize("kind", NAMES)
def test_every_kind_of_name(original: Path, state: State, target: Path, kind: str) -> None:
    save_file(NAMES[kind](state), target / "model.safetensors")
    np.testing.assert_array_equal(hidden(target), hidden(original))
    assert "pooler" in Encoder.from_folder(target).poolings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_is_run_in_float32(state: State, target: Path, dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in state.items()}, target / "model.safetensors")
    encoder = Encoder.from_folder(target)
    assert {weight.dtype for weight in encoder.state_dict().values()} == {torch.float32}
    model = lively_bert()
    model.load_state_dict({name: tensor.to(dtype).float() for name, tensor in state.items()})
    wanted = np.concatenate([theirs(model, row)[0] for row in ROWS])
    np.testing.assert_allclose(hidden(target), wanted, rtol=0, atol=1e-5)


def test_without_a_pooler(state: State, target: Path, original: Path) -> None:
    save_file({name: tensor for name, tensor in state.items() if "pooler" not in name}, target / "model.safetensors")
    encoder = Encoder.from_folder(target)
    assert encoder.poolings == ("cls", "mean", "max", "last")
    np.testing.assert_array_equal(hidden(target), hidden(original))
    with pytest.raises(ModelError, match="no pooling 'pooler'; wanted one of cls, mean, max, last"):
        encoder(pack(ROWS), "pooler")


@pytest.mark.parametrize(
    "architecture",
    [
        BertForMaskedLM,
        BertForPreTraining,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertForQuestionAnswering,
    ],
)
def test_a_model_with_a_head_has_the_hidden_rows_of_its_encoder(tmp_path: Path, architecture: type[Any]) -> None:
    model = lively_bert(architecture=architecture)
    model.save_pretrained(tmp_path)
    wanted = np.concatenate([theirs(model.bert, row)[0] for row in ROWS])
    np.testing.assert_allclose(hidden(tmp_path), wanted, rtol=0, atol=1e-5)
    assert ModelConfig.from_folder(tmp_path).architecture == architecture.__name__


# Strictness ----------------------------------------------------------------------------------------------------------


def test_one_error_names_every_tensor_that_is_wrong(state: State, target: Path) -> None:
    missing = [
        "embeddings.LayerNorm.bias",
        "encoder.layer.0.attention.self.key.weight",
        "encoder.layer.1.output.dense.bias",
        "pooler.dense.bias",
    ]
    for name in missing:
        del state[name]
    state["encoder.layer.0.attention.self.query.weight"] = torch.zeros(31, 32)
    state["embeddings.word_embeddings.weight"] = torch.zeros(3, 32)
    state["encoder.layer.2.output.dense.weight"] = torch.zeros(32, 64)
    state["encoder.layer.0.adapter.up.weight"] = torch.zeros(4)
    save_file(renamed(state, lambda name: f"bert.{name}"), target / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Encoder.from_folder(target)
    message = str(caught.value)
    assert message.startswith(str(target))
    for name in missing:
        assert f"missing {name} [" in message
    assert "unexpected encoder.layer.2.output.dense.weight [32, 64]" in message
    assert "unexpected encoder.layer.0.adapter.up.weight [4]" in message
    assert "encoder.layer.0.attention.self.query.weight is [31, 32], wanted [32, 32]" in message
    assert "embeddings.word_embeddings.weight is [3, 32], wanted [68, 32]" in message
    assert message.count(";") == 8  # eight problems, and what to do


def test_every_tensor_is_needed(state: State, target: Path) -> None:
    for name in state:
        save_file({other: tensor for other, tensor in state.items() if other != name}, target / "model.safetensors")
        assert f"config.json: missing {name} {list(state[name].shape)}; restore" in refused(target)


@pytest.mark.parametrize(
    "name", ["bert.embeddings.token.weight", "bert.layers.0.attention.qkv.weight", "nonsense", "weight", "a."]
)
def test_names_of_our_own_are_no_names_of_a_file(state: State, target: Path, name: str) -> None:
    save_file({**state, name: torch.zeros(2)}, target / "model.safetensors")
    with pytest.raises(CheckpointError, match="unexpected"):
        Encoder.from_folder(target)


def test_weights_that_are_whole_numbers(state: State, target: Path) -> None:
    name = "pooler.dense.weight"
    save_file({**state, name: state[name].to(torch.int8)}, target / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"pooler\.dense\.weight is torch\.int8, wanted floating point"):
        Encoder.from_folder(target)


def test_one_tensor_under_two_names(state: State, target: Path) -> None:
    name = "embeddings.LayerNorm.bias"
    save_file({**state, f"bert.{name}": torch.zeros(32)}, target / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} twice"):
        Encoder.from_folder(target)


def test_a_config_of_another_size(original: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(original, tmp_path / "copy")
    edit_json(folder / "config.json", num_hidden_layers=3, intermediate_size=65)
    with pytest.raises(CheckpointError) as caught:
        Encoder.from_folder(folder)
    assert "missing encoder.layer.2.attention.self.value.bias [32]" in str(caught.value)
    assert "encoder.layer.0.intermediate.dense.weight is [64, 32], wanted [65, 32]" in str(caught.value)


# Broken files --------------------------------------------------------------------------------------------------------


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Encoder.from_folder(folder)
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 3000, -1])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
def test_files_cut_short(state: State, target: Path, kind: str, kept: int) -> None:
    FILES[kind](state, target)
    file = next(path for path in target.iterdir() if path.name != "config.json")
    file.write_bytes(file.read_bytes()[:kept])
    assert f"{file} can't be read" in refused(target)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_random_bytes(target: Path, name: str) -> None:
    random = np.random.default_rng(0)
    for start in (b"", b"\x80\x02", b"\x80\x04\x95", b"PK\x03\x04", b"\x10\x00\x00\x00\x00\x00\x00\x00{", b"(lp0\n"):
        for length in (3, 50, 500):
            (target / name).write_bytes(start + random.bytes(length))
            assert "can't be read" in refused(target)


class Touch:
    """A pickle that would create a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["new", "old", "plain pickle", "shard", "dense"])
def test_a_pickle_with_code_is_refused_and_not_run(state: State, target: Path, kind: str) -> None:
    marker = target / "was run"
    content = {**state, "embeddings.word_embeddings.weight": Touch(marker)}
    if kind == "plain pickle":
        (target / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(marker), protocol=2))
    elif kind == "shard":
        (target / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "part.bin"}}')
        torch.save(content, target / "part.bin")
    elif kind == "dense":
        save_file(state, target / "model.safetensors")
        modules = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "p"}, {"type": "x.Dense", "path": "d"}]
        (target / "modules.json").write_text(json.dumps(modules))
        for name, settings in (("p", {"pooling_mode": "cls"}), ("d", {"in_features": 32, "out_features": 2})):
            (target / name).mkdir()
            (target / name / "config.json").write_text(json.dumps(settings))
        torch.save({"linear.weight": Touch(marker)}, target / "d" / "pytorch_model.bin")
    else:
        torch.save(content, target / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "new")
    assert "can't be read" in refused(target)
    assert not marker.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {"a": torch.zeros(1)}}, torch.zeros(3)])
def test_a_pickle_of_something_else(target: Path, content: Any) -> None:
    torch.save(content, target / "pytorch_model.bin")
    assert "holds no table of tensors" in refused(target)


def test_a_folder_without_weights(target: Path) -> None:
    (target / "tf_model.h5").touch()
    assert f"{target} holds no weights; wanted one of model.safetensors" in refused(target)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(
    "name", ["part-9.safetensors", "../outside.safetensors", "sub/part.safetensors", "..", "/dev/zero", "{absolute}"]
)
def test_an_index_that_names_what_is_not_beside_it(state: State, target: Path, index: str, name: str) -> None:
    outside = target.parent / "outside.safetensors"
    (target / "sub").mkdir()
    for path in (outside, target / "sub" / "part.safetensors", target / "part-0.safetensors"):
        save_file(state, path)
    name = name.format(absolute=outside)
    (target / index).write_text(json.dumps({"weight_map": {"a": "part-0.safetensors", "b": name}}))
    assert f"names files that are not there: {name}" in refused(target)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}'])
def test_an_index_that_is_none(target: Path, content: str) -> None:
    (target / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refused(target)
