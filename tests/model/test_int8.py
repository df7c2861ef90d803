"""Linear layers in int8 against the same quantisation by hand, and the encoder on them against float32."""

import numpy as np
import pytest
import torch
from reference import random_rows
from torch import nn
from torch.nn import functional as F

from model.config import BertConfig
from model.cpu import CpuRunner
from model.encoder import Encoder
from model.errors import UnsupportedModel
from model.linear import Int8Linear, int8_runs
from model.runner import make_runner

RUNS = int8_runs(BertConfig(), torch.float32)
needs_int8 = pytest.mark.skipif(not RUNS, reason="no compiler built the kernels, or the processor lacks AVX-512 VNNI")


def random_linear(inner: int, columns: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inner, columns).requires_grad_(False)


def by_hand(linear: nn.Linear, x: torch.Tensor) -> np.ndarray:
    """Symmetric weights per output, bytes with a zero point per row that span the row and 0, exact integer sums."""
    weight, rows = linear.weight.numpy().astype(np.float64), x.numpy().astype(np.float64)
    w_scale = np.abs(weight).max(axis=1) / 127
    w = np.rint(weight / w_scale[:, None])
    low, high = np.minimum(rows.min(axis=1), 0), np.maximum(rows.max(axis=1), 0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    quantized = np.clip(np.rint(rows / scale[:, None]) + zero[:, None], 0, 255) - zero[:, None]
    return quantized @ w.T * scale[:, None] * w_scale + linear.bias.numpy()


@needs_int8
@pytest.mark.parametrize(("inner", "columns"), [(16, 16), (36, 48), (384, 1152), (1536, 384)])
@pytest.mark.parametrize("rows", [1, 2, 13, 97, 500])
def test_products_equal_the_quantisation_by_hand(rows: int, inner: int, columns: int) -> None:
    linear = random_linear(inner, columns)
    x = torch.randn(rows, inner, generator=torch.Generator().manual_seed(1)) * 3 + 1
    wanted = by_hand(linear, x)
    step = np.abs(wanted).max() / 127  # a number that lies between two bytes may go to either
    np.testing.assert_allclose(Int8Linear(linear)(x), wanted, rtol=0, atol=step / 8)
    np.testing.assert_allclose(Int8Linear(linear)(x), linear(x), rtol=0, atol=4 * step)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("number", "activation"), [(0, lambda y: y), (1, F.gelu), (2, F.relu)])
def test_activations_are_those_of_torch(number: int, activation, dtype: torch.dtype) -> None:
    linear = random_linear(64, 64)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).to(dtype) * 4
    plain, fused = Int8Linear(linear)(x), Int8Linear(linear, number)(x)
    assert fused.dtype == dtype
    near = 2e-6 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(fused.float(), activation(plain.float()), rtol=0, atol=near)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_bit_equal_in_any_batch(dtype: torch.dtype) -> None:
    layer = Int8Linear(random_linear(384, 96), 1)
    x = torch.randn(1000, 384, generator=torch.Generator().manual_seed(1)).to(dtype)
    together = layer(x)
    for rows in (slice(0, 1), slice(999, 1000), slice(7, 20), slice(500, 700)):
        assert torch.equal(layer(x[rows]), together[rows])


@needs_int8
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_no_number_stays_one_and_harms_no_other(bad: float) -> None:
    layer = Int8Linear(random_linear(64, 32))
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    before = layer(x)
    x[3, 5] = bad
    after = layer(x)
    assert after[3].isnan().all()
    others = [row for row in range(20) if row != 3]
    assert torch.equal(after[others], before[others])


@needs_int8
def test_a_row_of_zeros_gives_the_bias() -> None:
    linear = random_linear(64, 32)
    torch.testing.assert_close(Int8Linear(linear)(torch.zeros(2, 64)), linear.bias.expand(2, 32), rtol=0, atol=0)


@needs_int8
@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 0.0), (torch.bfloat16, 0.005)])
def test_the_real_model_in_low_precision_is_near_itself_and_the_same_in_any_batch(minilm, dtype, bound: float) -> None:
    """Bit-equal in int8; in bfloat16 oneDNN takes another path for a lone row, and its last bits differ."""
    runner = CpuRunner(Encoder.from_folder(minilm), dtype)
    rows = random_rows((256, 7, 33, 1, 100, 2, 33), vocab_size=30522)
    together = runner(rows, "mean")
    np.testing.assert_allclose(np.concatenate([runner([row], "mean") for row in rows]), together, rtol=0, atol=bound)
    plain = make_runner(minilm, device="cpu")[0](rows, "mean")
    cosines = (together * plain).sum(1) / np.linalg.norm(together, axis=1) / np.linalg.norm(plain, axis=1)
    assert cosines.min() > 0.99


def test_int8_is_refused_where_it_cannot_run(make_checkpoint) -> None:
    with pytest.raises(UnsupportedModel, match="int8 needs a processor"):
        make_runner(make_checkpoint(hidden_size=24, num_attention_heads=3), device="cpu", dtype="int8")
