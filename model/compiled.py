"""The compiled kernels, and what kernels.c has of them: embeddings, attention on packed rows, LayerNorm of a sum.

They are built with the package where there is a C compiler, and run where the processor has AVX-512. `attend_sdpa` and
torch's LayerNorm stand in elsewhere, and judge them in the tests.
"""

import ctypes
import importlib.util
from functools import cache, partial

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.bert import AddNorm, Bert, Embeddings
from model.config import BertConfig
from model.scratch import Place, Scratch, fresh

LANES = 16  # numbers in a vector; sizes must be multiples of it
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
FEATURES = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # bits of what features() returns
HAS_AMX = 8

_BAD_INDEX = -3  # vectors.h


@cache
def library() -> ctypes.CDLL | None:
    """The shared object beside this file; torch, imported above, must be loaded first: it brings OpenMP."""
    spec = importlib.util.find_spec("model._kernels")
    if spec is None or spec.origin is None:
        return None
    found = ctypes.CDLL(spec.origin)
    if not found.features():
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_long
    for suffix in SUFFIX.values():
        getattr(found, f"attend_{suffix}").argtypes = [pointer] * 4 + [size] * 3 + [pointer] * 2 + [size] * 3
        getattr(found, f"add_layer_norm_{suffix}").argtypes = [pointer] * 5 + [size] * 2 + [ctypes.c_float]
        getattr(found, f"embed_{suffix}").argtypes = [pointer, size] * 3 + [pointer] * 6 + [size] * 2 + [ctypes.c_float]
        getattr(found, f"linear_{suffix}").argtypes = [pointer] * 4 + [size] * 3 + [ctypes.c_int]
        getattr(found, f"linear_int8_{suffix}").argtypes = [pointer] * 6 + [size] * 3 + [ctypes.c_int, pointer]
    found.pack_int8.argtypes = [pointer] * 4 + [size] * 2
    found.int8_packed_size.argtypes, found.int8_packed_size.restype = [size] * 2, size
    found.int8_workspace_width.argtypes, found.int8_workspace_width.restype = [size], size
    return found


def runs(config: BertConfig, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels are there, this processor has their instructions, and the sizes fit them."""
    fit = all(size % LANES == 0 for size in (config.head_size, config.hidden_size, config.intermediate_size))
    return fit and has(dtype)


def has(dtype: torch.dtype) -> bool:
    """Whether the kernels are there and the processor has their instructions for `dtype`."""
    found = library()
    return found is not None and bool(found.features() & FEATURES.get(dtype, 0))


def has_amx() -> bool:
    """Whether the processor has a matrix unit for bfloat16, which oneDNN uses and these kernels do not."""
    found = library()
    return found is not None and bool(found.features() & HAS_AMX)


def attend_compiled(q: Tensor, k: Tensor, v: Tensor, batch: Batch, heads: int, place: Place = fresh) -> Tensor:
    """Attention per text and head with a plain softmax, from the views in place; bit-equal in any batch."""
    out = place(q.shape[0], q.shape[1], q.dtype)
    attend = getattr(library(), f"attend_{SUFFIX[q.dtype]}")
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
        self._embed = getattr(library(), f"embed_{SUFFIX[embeddings.norm.weight.dtype]}")

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
        self._add_layer_norm = getattr(library(), f"add_layer_norm_{SUFFIX[norm.weight.dtype]}")

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
