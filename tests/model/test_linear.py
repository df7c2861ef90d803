"""Packed linear layers give what plain ones give, with the activation inside or behind."""

import copy

import pytest
import torch
from torch import nn

from model.bert import ACTIVATIONS, Bert
from model.config import BertConfig
from model.linear import PackedLinear, packing_works, replace_linears

pytestmark = pytest.mark.skipif(not packing_works(torch.float32), reason="this torch has no oneDNN")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "out", "rows"), [(32, 48, 1), (32, 96, 5), (17, 3, 40), (384, 1152, 2000), (1, 1, 1)])
def test_equals_the_plain_layer(width: int, out: int, rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(width, out, bias), torch.randn(rows, width)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_stays_exact(name) -> None:
    torch.manual_seed(0)
    plain = Bert(BertConfig(8, 32, 2, 4, 64, name)).layers[0].feed_forward
    bert = Bert(BertConfig(8, 32, 1, 4, 64, name))
    bert.layers[0].feed_forward = copy.deepcopy(plain)
    x = torch.randn(50, 32) * 3
    with torch.inference_mode():
        replace_linears(bert)
        assert isinstance(bert.layers[0].feed_forward.up, PackedLinear)
        torch.testing.assert_close(bert.layers[0].feed_forward(x), plain(x), rtol=0, atol=1e-5)
