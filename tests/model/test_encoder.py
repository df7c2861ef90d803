"""What stands on BERT in a checkpoint of sentence-transformers: pooling, projections, and no more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import lively_bert, random_rows, sentence_transformers_layout, theirs

from model.batch import pack
from model.cpu import CpuRunner
from model.encoder import Encoder
from model.errors import CheckpointError, ModelError

ROWS = random_rows((5, 1, 12))
BY_NUMPY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "cls": lambda rows: rows[0],
    "mean": lambda rows: rows.mean(axis=0),
    "max": lambda rows: rows.max(axis=0),
    "last": lambda rows: rows[-1],
}
ACTIVATE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "torch.nn.modules.activation.Tanh": np.tanh,
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.ReLU": lambda x: np.maximum(x, 0),
    "torch.nn.modules.activation.Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "torch.nn.modules.activation.SiLU": lambda x: x / (1 + np.exp(-x)),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return lively_bert()


@pytest.fixture
def lively(model: Any, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def vectors(folder: Path, pooling: Any = None) -> np.ndarray:
    encoder = Encoder.from_folder(folder)
    pooling = pooling or encoder.config.pooling
    with torch.inference_mode():
        plain = encoder(pack(ROWS), pooling).numpy()
    fast = CpuRunner(encoder)(ROWS, pooling)
    np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-5)
    return fast


@pytest.mark.parametrize("mode", BY_NUMPY)
def test_every_pooling(model: Any, lively: Path, mode: str) -> None:
    wanted = np.stack([BY_NUMPY[mode](theirs(model, row)[0]) for row in ROWS])
    np.testing.assert_allclose(vectors(lively, mode), wanted, rtol=0, atol=1e-5)
    names = {"last": "lasttoken"}
    sentence_transformers_layout(lively, {"pooling_mode": names.get(mode, mode), "embedding_dimension": 32})
    np.testing.assert_allclose(vectors(lively), wanted, rtol=0, atol=1e-5)


def dense(
    width: int, out: int, bias: bool = True, seed: int = 0, activation: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    random = torch.Generator().manual_seed(seed)
    settings = {"in_features": width, "out_features": out, "bias": bias}
    if activation:
        settings["activation_function"] = activation
    tensors = {"linear.weight": torch.randn(out, width, generator=random)}
    if bias:
        tensors["linear.bias"] = torch.randn(out, generator=random)
    return settings, tensors


@pytest.mark.parametrize("activation", [*ACTIVATE, None])
@pytest.mark.parametrize("bias", [True, False])
def test_a_projection(model: Any, lively: Path, activation: str | None, bias: bool) -> None:
    """activation(mean · Wᵀ + b), by numpy; without a word in the file it is tanh."""
    module = dense(32, 7, bias, activation=activation)
    sentence_transformers_layout(lively, {"pooling_mode_mean_tokens": True}, [module], normalize=True)
    weight, offset = module[1]["linear.weight"].numpy(), module[1]["linear.bias"].numpy() if bias else 0
    means = np.stack([theirs(model, row)[0].mean(axis=0) for row in ROWS])
    wanted = ACTIVATE[activation or "torch.nn.modules.activation.Tanh"](means @ weight.T + offset)
    np.testing.assert_allclose(vectors(lively), wanted, rtol=0, atol=1e-5)
    assert Encoder.from_folder(lively).config.dimension == 7
    assert Encoder.from_folder(lively).config.normalize  # a habit that the service applies, where the client can say no


def test_two_projections_stand_on_each_other(model: Any, lively: Path) -> None:
    modules = [dense(32, 20, seed=1), dense(20, 6, seed=2, activation="torch.nn.modules.linear.Identity")]
    sentence_transformers_layout(lively, {"pooling_mode_cls_token": True}, modules)
    first, second = ({name: tensor.numpy() for name, tensor in tensors.items()} for _, tensors in modules)
    rows = np.stack([theirs(model, row)[0][0] for row in ROWS])
    between = np.tanh(rows @ first["linear.weight"].T + first["linear.bias"])
    wanted = between @ second["linear.weight"].T + second["linear.bias"]
    np.testing.assert_allclose(vectors(lively), wanted, rtol=0, atol=1e-5)
    assert Encoder.from_folder(lively).config.dimension == 6


def test_token_rows_are_not_projected(model: Any, lively: Path) -> None:
    sentence_transformers_layout(lively, {"pooling_mode_mean_tokens": True}, [dense(32, 7)])
    encoder = Encoder.from_folder(lively)
    wanted = np.concatenate([theirs(model, row)[0] for row in ROWS])
    np.testing.assert_allclose(encoder.hidden(pack(ROWS)), wanted, rtol=0, atol=1e-5)


def test_an_activation_that_is_refused_by_name(lively: Path) -> None:
    sentence_transformers_layout(lively, {"pooling_mode": "mean"}, [dense(32, 7, activation="os.system")])
    with pytest.raises(ModelError, match=r"2_Dense/config\.json: activation_function system is not supported"):
        Encoder.from_folder(lively)


def test_a_projection_of_another_shape(lively: Path) -> None:
    settings, tensors = dense(32, 7)
    tensors["linear.weight"] = tensors["linear.weight"][:, :31].contiguous()
    tensors["extra"] = tensors.pop("linear.bias")
    sentence_transformers_layout(lively, {"pooling_mode": "mean"}, [(settings, tensors)])
    with pytest.raises(CheckpointError) as caught:
        Encoder.from_folder(lively)
    assert "dense.0.linear.weight is [7, 31], wanted [7, 32]" in str(caught.value)
    assert "missing dense.0.linear.bias [7]" in str(caught.value)
    assert "unexpected dense.0.extra [7]" in str(caught.value)


def test_an_unknown_pooling_names_the_known(lively: Path) -> None:
    with pytest.raises(ModelError, match="no pooling 'median'; wanted one of cls, pooler, mean, max, last"):
        Encoder.from_folder(lively)(pack(ROWS), "median")  # type: ignore[arg-type]


def test_weights_are_never_trained_here(lively: Path) -> None:
    encoder = Encoder.from_folder(lively)
    assert not encoder.training
    assert not any(weight.requires_grad for weight in encoder.parameters())
