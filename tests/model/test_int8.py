"""Linear layers in int8 against the same quantisation by hand, and the encoder on them against float32."""

import itertools

import numpy as np
import pytest
import torch
from reference import random_rows
from torch import nn
from torch.nn import functional as F

from model import compiled
from model.cpu import CpuRunner
from model.encoder import Encoder
from model.errors import UnsupportedModel
from model.linear import Int8Linear
from model.runner import make_runner


@pytest.fixture
def int8(instructions: str) -> str:
    """Those instructions, where they have int8."""
    if not compiled.library(torch.int8):
        pytest.skip(f"the processor lacks what int8 needs of {instructions}")
    return instructions


def random_linear(inner: int, columns: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inner, columns).requires_grad_(False)


def weight_scales(weight: np.ndarray, instructions: str) -> np.ndarray:
    """Per output: 127 steps to its largest weight; with AVX2 no more than 126 to the sum of the positive or of the negative ones
    among those whose products it adds up in 16 bits: two neighbours, and the two that come four later."""
    scales = np.abs(weight).max(axis=1) / 127
    if instructions == "AVX-512":
        return scales
    steps = np.pad(weight, ((0, 0), (0, -weight.shape[1] % 8))).reshape(len(weight), -1, 2, 2, 2)
    sums = [np.maximum(signed, 0).sum(axis=(2, 4)).max(axis=(1, 2)) for signed in (steps, -steps)]
    return np.max([scales, *(most / 126 for most in sums)], axis=0)


def by_hand(linear: nn.Linear, x: torch.Tensor, instructions: str) -> np.ndarray:
    """Symmetric weights per output, bytes with a zero point per row that span the row and 0, exact integer sums."""
    weight, rows = linear.weight.numpy().astype(np.float64), x.numpy().astype(np.float64)
    w_scale = weight_scales(weight, instructions)
    w = np.rint(weight / w_scale[:, None])
    low, high = np.minimum(rows.min(axis=1), 0), np.maximum(rows.max(axis=1), 0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    quantized = np.clip(np.rint(rows / scale[:, None]) + zero[:, None], 0, 255) - zero[:, None]
    return quantized @ w.T * scale[:, None] * w_scale + linear.bias.numpy()


@pytest.mark.parametrize(("inner", "columns"), [(16, 16), (36, 48), (384, 1152), (1536, 384)])
@pytest.mark.parametrize("rows", [1, 2, 13, 97, 500])
def test_products_equal_the_quantisation_by_hand(rows: int, inner: int, columns: int, int8: str) -> None:
    linear = random_linear(inner, columns)
    x = torch.randn(rows, inner, generator=torch.Generator().manual_seed(1)) * 3 + 1
    wanted = by_hand(linear, x, int8)
    step = np.abs(wanted).max() / 127  # a number that lies between two bytes may go to either
    np.testing.assert_allclose(Int8Linear(linear)(x), wanted, rtol=0, atol=step / 8)
    np.testing.assert_allclose(Int8Linear(linear)(x), linear(x), rtol=0, atol=4 * step)


@pytest.mark.parametrize("least", [0.9, 0.5])
def test_no_sum_overflows(least: float, int8: str) -> None:
    """Every way in which eight weights and eight numbers can each be at an end of their range or zero."""
    signs = np.array([row for row in itertools.product([-1, 0, 1], repeat=8) if any(row)])
    weight = np.random.default_rng(0).uniform(least, 1, signs.shape) * signs
    linear = random_linear(8, len(weight))
    linear.weight[:] = torch.from_numpy(weight)
    x = torch.tensor(list(itertools.product([0.0, 255.0], repeat=8)))[1:]
    wanted = by_hand(linear, x, int8)
    np.testing.assert_allclose(Int8Linear(linear)(x), wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("number", "activation"), [(0, lambda y: y), (1, F.gelu), (2, F.relu)])
def test_activations_are_those_of_torch(number: int, activation, dtype: torch.dtype, int8: str) -> None:
    linear = random_linear(64, 64)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).to(dtype) * 4
    plain, fused = Int8Linear(linear)(x), Int8Linear(linear, number)(x)
    assert fused.dtype == dtype
    near = 2e-6 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(fused.float(), activation(plain.float()), rtol=0, atol=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_bit_equal_in_any_batch(dtype: torch.dtype, int8: str) -> None:
    layer = Int8Linear(random_linear(384, 96), 1)
    x = torch.randn(1000, 384, generator=torch.Generator().manual_seed(1)).to(dtype)
    together = layer(x)
    for rows in (slice(0, 1), slice(999, 1000), slice(7, 20), slice(500, 700)):
        assert torch.equal(layer(x[rows]), together[rows])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_no_number_stays_one_and_harms_no_other(bad: float, int8: str) -> None:
    layer = Int8Linear(random_linear(64, 32))
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    before = layer(x)
    x[3, 5] = bad
    after = layer(x)
    assert after[3].isnan().all()
    others = [row for row in range(20) if row != 3]
    assert torch.equal(after[others], before[others])


def test_a_row_of_zeros_gives_the_bias(int8: str) -> None:
    linear = random_linear(64, 32)
    torch.testing.assert_close(Int8Linear(linear)(torch.zeros(2, 64)), linear.bias.expand(2, 32), rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 0.0), (torch.bfloat16, 0.005)])
def test_the_real_model_in_low_precision_is_near_itself_and_the_same_in_any_batch(minilm, instructions, dtype, bound) -> None:
    """Bit-equal in int8; in bfloat16 oneDNN takes another path for a lone row, and its last bits differ."""
    runner = CpuRunner(Encoder.from_folder(minilm), dtype)
    rows = random_rows((256, 7, 33, 1, 100, 2, 33), vocab_size=30522)
    together = runner(rows, "mean")
    np.testing.assert_allclose(np.concatenate([runner([row], "mean") for row in rows]), together, rtol=0, atol=bound)
    plain = make_runner(minilm, device="cpu")[0](rows, "mean")
    cosines = (together * plain).sum(1) / np.linalg.norm(together, axis=1) / np.linalg.norm(plain, axis=1)
    assert cosines.min() > 0.99


def test_int8_is_refused_where_it_cannot_run(make_checkpoint, int8: str) -> None:
    with pytest.raises(UnsupportedModel, match=r"int8 needs sizes that are multiples of (8|16), .* float32"):
        make_runner(make_checkpoint(hidden_size=60, num_attention_heads=3), device="cpu", dtype="int8")


def test_int8_is_refused_without_its_kernels(make_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "libraries", list)
    with pytest.raises(UnsupportedModel, match="int8 needs a processor with AVX2, and the compiled kernels"):
        make_runner(make_checkpoint(), device="cpu", dtype="int8")
