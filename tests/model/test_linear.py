"""Our linear layers and oneDNN's give what plain ones give, with the activation inside or behind."""

import copy

import pytest
import torch
from torch import nn

from model.bert import ACTIVATIONS, Bert
from model.config import BertConfig
from model.linear import CompiledLinear, GeluLinear, PackedLinear, fuse_gelu, packing_works, replace_linears, replace_linears_by

needs_onednn = pytest.mark.skipif(not packing_works(torch.float32), reason="this torch has no oneDNN")
with_each_kernel = pytest.mark.usefixtures("instructions")
DTYPES = [torch.float32, torch.bfloat16]


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "out", "rows"), [(32, 48, 1), (32, 96, 5), (17, 3, 40), (384, 1152, 2000), (1, 1, 1)])
def test_equals_the_plain_layer(width: int, out: int, rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(width, out, bias), torch.randn(rows, width)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=0, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_stays_exact_in_onednn(name) -> None:
    stays_exact(name, PackedLinear, replace_linears)


@with_each_kernel
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_stays_exact_in_our_product(name) -> None:
    stays_exact(name, CompiledLinear, lambda bert: replace_linears_by(CompiledLinear, bert))


def stays_exact(name, kind, replace) -> None:
    torch.manual_seed(0)
    plain = Bert(BertConfig(8, 32, 2, 4, 64, name)).layers[0].feed_forward
    bert = Bert(BertConfig(8, 32, 1, 4, 64, name))
    bert.layers[0].feed_forward = copy.deepcopy(plain)
    x = torch.randn(50, 32) * 3
    with torch.inference_mode():
        replace(bert)
        assert isinstance(bert.layers[0].feed_forward.up, kind)
        torch.testing.assert_close(bert.layers[0].feed_forward(x), plain(x), rtol=0, atol=1e-5)


def random_linear(width: int, out: int, dtype: torch.dtype) -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(width, out, dtype=dtype).requires_grad_(False), torch.randn(500, width).to(dtype)


@with_each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "out"), [(2, 16), (34, 48), (384, 1152), (1536, 384), (3072, 768)])
@pytest.mark.parametrize("rows", [0, 1, 2, 13, 14, 99, 500])
def test_the_compiled_product_is_the_exact_one(rows: int, width: int, out: int, dtype: torch.dtype) -> None:
    linear, x = random_linear(width, out, dtype)
    wanted = x[:rows].double() @ linear.weight.double().T + linear.bias.double()
    near = 3e-6 if dtype == torch.float32 else 0.02  # a bfloat16 is rounded to 1/256 of itself
    y = CompiledLinear(linear)(x[:rows])
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wanted, rtol=near, atol=near)


@with_each_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_bit_equal_in_any_batch_on_any_threads(dtype: torch.dtype) -> None:
    linear, x = random_linear(768, 96, dtype)
    layer, threads = CompiledLinear(linear, 1), torch.get_num_threads()
    together = layer(x)
    try:
        for rows, count in ((slice(0, 1), 1), (slice(499, 500), 2), (slice(7, 20), 3), (slice(100, 400), 1)):
            torch.set_num_threads(count)
            assert torch.equal(layer(x[rows]), together[rows])
    finally:
        torch.set_num_threads(threads)


@with_each_kernel
def test_a_number_that_is_none_stays_in_its_row() -> None:
    linear, x = random_linear(64, 32, torch.float32)
    before = CompiledLinear(linear, 1)(x)
    x[3, 5] = float("nan")
    after = CompiledLinear(linear, 1)(x)
    assert after[3].isnan().all()
    assert torch.equal(after[4:], before[4:])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_only_gelu_moves_into_the_product_before_it(name) -> None:
    torch.manual_seed(0)
    bert = Bert(BertConfig(8, 32, 2, 4, 64, name))
    plain = copy.deepcopy(bert.layers)
    fused = fuse_gelu(bert)
    assert fused == name.startswith("gelu")
    x = 2 * torch.randn(40, 32)
    for ours, theirs in zip(bert.layers, plain, strict=True):
        assert isinstance(ours.feed_forward.up, GeluLinear) == fused
        with torch.inference_mode():
            torch.testing.assert_close(ours.feed_forward(x), theirs.feed_forward(x), rtol=0, atol=2e-3)  # tanh for erf


def test_an_operator_that_gives_something_else_is_not_used(monkeypatch) -> None:
    monkeypatch.setattr(torch, "_addmm_activation", lambda bias, x, weight, use_gelu: torch.addmm(bias, x, weight))
    assert not fuse_gelu(Bert(BertConfig(8, 32, 1, 4, 64)))
    monkeypatch.delattr(torch, "_addmm_activation")
    assert not fuse_gelu(Bert(BertConfig(8, 32, 1, 4, 64)))
