"""The compiled kernels, and what kernels.c has of them: embeddings, attention on packed rows, LayerNorm of a sum.

They are built with the package where there is a C compiler, once for AVX-512 and once, in float32 and int8, for AVX2.
`attend_sdpa` and torch's LayerNorm stand in where the processor has neither. `attend_reference` and torch's LayerNorm judge
them in the tests.
"""

import ctypes
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.bert import AddNorm, Bert, Embeddings
from model.config import BertConfig
from model.scratch import Place, Scratch, fresh

SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
FEATURES = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # bits of what features() returns
HAS_AMX = 8

_BAD_INDEX = -3  # vectors.h
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_long
_KERNELS: Mapping[str, list[Any]] = {
    "attend": [_POINTER] * 4 + [_SIZE] * 3 + [_POINTER] * 2 + [_SIZE] * 3,
    "add_layer_norm": [_POINTER] * 5 + [_SIZE] * 2 + [ctypes.c_float],
    "embed": [_POINTER, _SIZE] * 3 + [_POINTER] * 6 + [_SIZE] * 2 + [ctypes.c_float],
    "linear": [_POINTER] * 4 + [_SIZE] * 3 + [ctypes.c_int],
    "linear_int8": [_POINTER] * 6 + [_SIZE] * 3 + [ctypes.c_int, _POINTER],
}
_SIGNATURES = {
    **{f"{name}_{suffix}": types for name, types in _KERNELS.items() for suffix in SUFFIX.values()},
    "pack_int8": [_POINTER] * 4 + [_SIZE] * 2,
    "int8_packed_size": [_SIZE] * 2,
    "int8_workspace_width": [_SIZE],
}
_SIZES = ("int8_packed_size", "int8_workspace_width")  # what they return is a size, and no status


@dataclass(frozen=True, eq=False)
class Library:
    """The kernels for one kind of processor."""

    instructions: str
    lanes: int  # numbers in a vector; sizes must be multiples of it
    functions: Any
    features: int  # what of it this processor runs

    def has(self, dtype: torch.dtype) -> bool:
        """Whether the processor has the instructions of its kernels for `dtype`."""
        return bool(self.features & FEATURES.get(dtype, 0))

    def fits(self, config: BertConfig) -> bool:
        """Whether the encoder's sizes are whole vectors."""
        sizes = config.head_size, config.hidden_size, config.intermediate_size
        return all(size % self.lanes == 0 for size in sizes)


@cache
def libraries() -> list[Library]:
    """Those that run on this processor, the fastest first.

    They are shared objects beside this file; torch, imported above, must be loaded first: it brings OpenMP.
    """
    kinds = ("AVX-512", 16, "model._kernels_avx512"), ("AVX2", 8, "model._kernels_avx2")
    specs = [(name, lanes, importlib.util.find_spec(module)) for name, lanes, module in kinds]
    loaded = [(name, lanes, ctypes.CDLL(spec.origin)) for name, lanes, spec in specs if spec and spec.origin]
    built = [Library(name, lanes, functions, functions.features()) for name, lanes, functions in loaded]
    found = [library for library in built if library.features]
    for library in found:
        for name, types in _SIGNATURES.items():
            if hasattr(library.functions, name):
                function = getattr(library.functions, name)
                function.argtypes, function.restype = types, _SIZE if name in _SIZES else ctypes.c_int
    return found


def library(dtype: torch.dtype = torch.float32) -> Library | None:
    """The one whose kernels for `dtype` are used; None where none was built, or none runs on this processor."""
    return next((found for found in libraries() if found.has(dtype)), None)


def kernel(name: str, dtype: torch.dtype) -> Any:
    """A function of that library for matrices of `dtype`; only where there is one."""
    found = library(dtype)
    assert found is not None
    return getattr(found.functions, f"{name}_{SUFFIX[dtype]}")


def runs(config: BertConfig, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels are there, this processor has their instructions for `dtype`, and the sizes fit them."""
    found = library(dtype)
    return found is not None and found.fits(config)


def has_amx() -> bool:
    """Whether the processor has a matrix unit for bfloat16, which oneDNN uses and these kernels do not."""
    found = library()
    return found is not None and bool(found.features & HAS_AMX)


def attend_compiled(q: Tensor, k: Tensor, v: Tensor, batch: Batch, heads: int, place: Place = fresh) -> Tensor:
    """Attention per text and head with a plain softmax, from the views in place; bit-equal in any batch."""
    out = place(q.shape[0], q.shape[1], q.dtype)
    attend = kernel("attend", q.dtype)
    cu_queries = batch.cu_seqlens if len(q) == len(k) else batch.cu_texts
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
    strides = (q.stride(0), k.stride(0), out.stride(0))
    borders = (cu_queries.data_ptr(), batch.cu_seqlens.data_ptr())
    check(attend(*pointers, *strides, *borders, len(batch.cu_seqlens) - 1, heads, q.shape[1] // heads))
    return out


class CompiledEmbeddings(nn.Module):
    """Embeddings in one pass over memory: LayerNorm of token + segment + position, with the sum never rounded: [T, H].

    Raises IndexError where a token is in none of the tables.
    """

    def __init__(self, embeddings: nn.Module, place: Place = fresh) -> None:
        super().__init__()
        assert isinstance(embeddings, Embeddings)
        self.place = place
        self.tables = [table.weight for table in (embeddings.token, embeddings.segment, embeddings.position)]
        self.norm = embeddings.norm
        self._embed = kernel("embed", embeddings.norm.weight.dtype)

    def forward(self, batch: Batch) -> Tensor:
        weight, bias = self.norm.weight, self.norm.bias
        out = self.place(len(batch.input_ids), len(weight), weight.dtype)
        tables = [number for table in self.tables for number in (table.data_ptr(), len(table))]
        pointers = (t.data_ptr() for t in (batch.input_ids, batch.type_ids, batch.positions, weight, bias, out))
        check(self._embed(*tables, *pointers, *out.shape, self.norm.eps))
        return out


class CompiledAddNorm(nn.Module):
    """AddNorm in one pass over memory: LayerNorm of x + residual, both [T, H], with the sum never rounded."""

    def __init__(self, norm: nn.Module, place: Place = fresh) -> None:
        super().__init__()
        assert isinstance(norm, AddNorm)
        self.place = place
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self._add_layer_norm = kernel("add_layer_norm", norm.weight.dtype)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out = self.place(x.shape[0], x.shape[1], x.dtype)
        pointers = (t.data_ptr() for t in (x, residual, self.weight, self.bias, out))
        check(self._add_layer_norm(*pointers, *x.shape, self.eps))
        return out


def replace_kernels(bert: Bert) -> None:
    """Swap the embeddings, and attention and every AddNorm of the encoder's layers, for the compiled ones.

    The hidden rows stay in one place through all layers: LayerNorm may write where it has read. Those of the last layer are
    the caller's.
    """
    attend, hidden = partial(attend_compiled, place=Scratch()), Scratch()
    bert.embeddings = CompiledEmbeddings(bert.embeddings, hidden)
    for layer in bert.layers:
        layer.attention.attend = attend
        layer.attention_norm = CompiledAddNorm(layer.attention_norm, hidden)
        layer.feed_forward_norm = CompiledAddNorm(layer.feed_forward_norm, fresh if layer is bert.layers[-1] else hidden)


def check(status: int) -> None:
    """Negative for sizes that `runs` should have refused, for memory that is not there, or for an index of no table's row."""
    if status == _BAD_INDEX:
        raise IndexError("a token id, segment or position is outside its table")
    if status:
        raise MemoryError(f"a compiled kernel failed with status {status}")
