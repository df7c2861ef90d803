"""Linear layers for the machine at hand, swapped in after loading, so that the encoder never hears of them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import compiled
from model.bert import ACTIVATIONS, Bert, FeedForward, Layer
from model.config import BertConfig
from model.scratch import Place, Scratch, fresh

_PACKED_FOR_ROWS = 1024  # the batch that oneDNN lays the weights out for; others run on the same layout

# Activations that a product applies while it is at hand: oneDNN's name and algorithm, the number in vectors.h.
_NONE = ("none", "", 0)
_FUSED = {
    ACTIVATIONS["gelu"]: ("gelu", "none", 1),
    ACTIVATIONS["gelu_new"]: ("gelu", "tanh", None),
    ACTIVATIONS["relu"]: ("relu", "", 2),
}


class PackedLinear(nn.Module):
    """x Wᵀ + b by oneDNN, with W laid out beforehand in its blocked order and an activation fused: [T, in] -> [T, out]."""

    def __init__(self, linear: nn.Module, name: str = "none", algorithm: str = "") -> None:
        super().__init__()
        assert isinstance(linear, nn.Linear)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _PACKED_FOR_ROWS)
        self.bias = linear.bias
        self.name, self.algorithm = name, algorithm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.name, [], self.algorithm)
        return y


class CompiledLinear(nn.Module):
    """x Wᵀ + b by linear.c, with W laid out beforehand in panels and an activation fused: [T, in] -> [T, out].

    A row's result is bit-equal in any batch, and on any number of threads.
    """

    def __init__(self, linear: nn.Module, activation: int = 0, place: Place = fresh) -> None:
        super().__init__()
        assert isinstance(linear, nn.Linear)
        self.place = place
        weight = linear.weight.detach().contiguous()
        self.columns, self.activation = len(weight), activation
        found = compiled.library(weight.dtype)
        assert found is not None
        self.panels = _panels(weight.view(torch.int32), found.lanes)
        self.bias = linear.bias.detach().float()  # no Parameter: it stays in float32 whatever the module moves to
        self._linear = compiled.kernel("linear", weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.place(len(x), self.columns, x.dtype)
        pointers = (x.data_ptr(), self.panels.data_ptr(), self.bias.data_ptr(), y.data_ptr())
        compiled.check(self._linear(*pointers, *x.shape, self.columns, self.activation))
        return y


def _panels(words: Tensor, lanes: int) -> Tensor:
    """[out, depth] -> [out / lanes, depth, lanes]: what linear.c reads in one sweep."""
    return words.view(-1, lanes, words.shape[1]).transpose(1, 2).contiguous()


class Int8Linear(nn.Module):
    """x Wᵀ + b by int8.c: W in int8 with a scale per output, x quantised anew with a scale and a zero point per row.

    A row's result is bit-equal in any batch: no other row has a part in its scale.
    """

    workspace: ClassVar[Scratch] = Scratch()  # nothing of it outlives a call

    def __init__(self, linear: nn.Module, activation: int = 0, place: Place = fresh) -> None:
        super().__init__()
        assert isinstance(linear, nn.Linear)
        found = compiled.library(torch.int8)
        assert found is not None
        self.place = place
        self.functions, self.activation = found.functions, activation
        self.sizes = linear.out_features, linear.in_features
        self.packed = torch.empty(self.functions.int8_packed_size(*self.sizes), dtype=torch.int8)
        self.scales = torch.empty(linear.out_features)
        self.sums = torch.empty(linear.out_features, dtype=torch.int32)
        self.bias = linear.bias.detach().float()  # no Parameter: it stays in float32 whatever the module moves to
        weight = linear.weight.float().contiguous()
        outputs = (self.packed.data_ptr(), self.scales.data_ptr(), self.sums.data_ptr())
        compiled.check(self.functions.pack_int8(weight.data_ptr(), *outputs, *self.sizes))

    def forward(self, x: Tensor) -> Tensor:
        columns, inner = self.sizes
        y = self.place(len(x), columns, x.dtype)
        workspace = self.workspace(len(x), self.functions.int8_workspace_width(inner), torch.uint8)
        linear = getattr(self.functions, f"linear_int8_{compiled.SUFFIX[x.dtype]}")
        weights = (self.packed.data_ptr(), self.scales.data_ptr(), self.sums.data_ptr(), self.bias.data_ptr())
        sizes = (len(x), inner, columns)
        compiled.check(linear(x.data_ptr(), *weights, y.data_ptr(), *sizes, self.activation, workspace.data_ptr()))
        return y


class GeluLinear(nn.Module):
    """GELU(x Wᵀ + b) in one product of cuBLAS, which has only the GELU by tanh: [T, in] -> [T, out].

    For bfloat16 it is the more exact way: the sum goes into GELU unrounded, which outweighs what tanh is off by.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        assert isinstance(linear, nn.Linear)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch._addmm_activation(self.bias, x, self.weight.t(), use_gelu=True)


def compiled_is_best(config: BertConfig, dtype: torch.dtype) -> bool:
    """Whether linear.c runs here, and oneDNN has no matrix unit that it lacks."""
    return compiled.runs(config, dtype) and not (dtype == torch.bfloat16 and compiled.has_amx())


def int8_runs(config: BertConfig, dtype: torch.dtype) -> bool:
    """Whether int8.c was built, this processor has its instructions for activations of `dtype`, and the sizes fit."""
    found = compiled.library(torch.int8)
    return found is not None and found.has(dtype) and found.fits(config) and compiled.runs(config, dtype)


def multiplies(dtype: torch.dtype) -> bool:
    """Whether our kernels or oneDNN's have arithmetic in `dtype` on this processor: torch's own products do without, and in
    bfloat16 take eight times as long as in float32."""
    return compiled.library(dtype) is not None or packing_works(dtype)


def packing_works(dtype: torch.dtype) -> bool:
    """Whether oneDNN's private operators are there and right: they are no part of torch's public interface."""
    linear = nn.Linear(32, 48, dtype=dtype)
    x = torch.randn(5, 32, dtype=dtype)
    try:
        with torch.inference_mode():
            packed = PackedLinear(linear, "gelu", "none")(x)
            return torch.allclose(packed, F.gelu(linear(x)), atol=1e-5 if dtype == torch.float32 else 0.05)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def gelu_fuses(linear: nn.Module) -> bool:
    """Whether torch's private operator behind GeluLinear is there and right: it is no part of its public interface."""
    assert isinstance(linear, nn.Linear)
    x = torch.randn(16, linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
    try:
        with torch.inference_mode():
            return torch.allclose(GeluLinear(linear)(x), F.gelu(linear(x)), rtol=0.02, atol=0.02)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False


def fuse_gelu(bert: Bert) -> bool:
    """Move GELU into the first product of every feed-forward, where that works; whether it was done."""
    gelus = {function: fused for function, fused in _FUSED.items() if fused[0] == "gelu"}
    first = bert.layers[0].feed_forward
    if first.activation not in gelus or not gelu_fuses(first.up):
        return False
    for layer in bert.layers:
        _take_activation(layer.feed_forward, gelus)
        layer.feed_forward.up = GeluLinear(layer.feed_forward.up)
    return True


def replace_linears(bert: Bert) -> None:
    """Swap every linear layer of the encoder's layers for one of oneDNN; an activation moves into the first of two."""
    for layer in bert.layers:
        name, algorithm, _ = _take_activation(layer.feed_forward, _FUSED)
        _swap(layer, PackedLinear, PackedLinear, PackedLinear(layer.feed_forward.up, name, algorithm))


def replace_linears_by(kind: type[CompiledLinear] | type[Int8Linear], bert: Bert) -> None:
    """Swap every linear layer of the encoder's layers for one of ours; an activation that it knows moves into it.

    A layer reads what it has computed once, so that the next may overwrite it: attention has read the product of queries,
    keys and values before the feed-forward is computed, and LayerNorm the output of one sublayer before that of the other.
    """
    inner, outer = Scratch(), Scratch()
    known = {function: fused for function, fused in _FUSED.items() if fused[2] is not None}
    for layer in bert.layers:
        _, _, number = _take_activation(layer.feed_forward, known)
        up = kind(layer.feed_forward.up, number or 0, inner)
        _swap(layer, partial(kind, place=inner), partial(kind, place=outer), up)


Fused = tuple[str, str, int | None]


def _take_activation(feed_forward: FeedForward, known: Mapping[Callable[[Tensor], Tensor], Fused]) -> Fused:
    """What to fuse into the first linear layer; the activation itself then does nothing."""
    fused = known.get(feed_forward.activation)
    if fused:
        feed_forward.activation = _identity
    return fused or _NONE


def _swap(layer: Layer, inner: Callable[[nn.Module], nn.Module], outer: Callable[[nn.Module], nn.Module], up: nn.Module) -> None:
    layer.attention.qkv = inner(layer.attention.qkv)
    layer.attention.output = outer(layer.attention.output)
    layer.feed_forward.up = up
    layer.feed_forward.down = outer(layer.feed_forward.down)


def _identity(x: Tensor) -> Tensor:
    return x
