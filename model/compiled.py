"""The compiled kernels, and what kernels.c has of them: attention on packed rows, and LayerNorm of a sum, in one pass each.

They are built with the package where there is a C compiler, and run where the processor has AVX-512. `attend_sdpa` and
torch's LayerNorm stand in elsewhere, and judge them in the tests.
"""

import ctypes
import importlib.util
from functools import cache

import torch
from torch import Tensor, nn

from model.batch import Batch
from model.bert import AddNorm, Bert
from model.config import BertConfig

LANES = 16  # numbers in a vector; sizes must be multiples of it
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
FEATURES = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # bits of what features() returns
HAS_AMX = 8


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
        getattr(found, f"linear_{suffix}").argtypes = [pointer] * 4 + [size] * 3 + [ctypes.c_int]
        getattr(found, f"linear_int8_{suffix}").argtypes = [pointer] * 6 + [size] * 3 + [ctypes.c_int, pointer]
    found.pack_int8.argtypes = [pointer] * 4 + [size] * 2
    for name in ("int8_packed_size", "int8_workspace_size"):
        getattr(found, name).argtypes, getattr(found, name).restype = [size] * 2, size
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


def attend_compiled(q: Tensor, k: Tensor, v: Tensor, batch: Batch, heads: int) -> Tensor:
    """Attention per text and head with a plain softmax, from the views in place; bit-equal in any batch."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    attend = getattr(library(), f"attend_{SUFFIX[q.dtype]}")
    cu_queries = batch.cu_seqlens if len(q) == len(k) else batch.cu_texts
    pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
    strides = (q.stride(0), k.stride(0), out.stride(0))
    borders = (cu_queries.data_ptr(), batch.cu_seqlens.data_ptr())
    check(attend(*pointers, *strides, *borders, len(batch.cu_seqlens) - 1, heads, q.shape[1] // heads))
    return out


class CompiledAddNorm(nn.Module):
    """AddNorm in one pass over memory: LayerNorm of x + residual, both [T, H], with the sum never rounded."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        assert isinstance(norm, AddNorm)
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self._add_layer_norm = getattr(library(), f"add_layer_norm_{SUFFIX[norm.weight.dtype]}")

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out = torch.empty_like(x)
        pointers = (t.data_ptr() for t in (x, residual, self.weight, self.bias, out))
        check(self._add_layer_norm(*pointers, *x.shape, self.eps))
        return out


def replace_kernels(bert: Bert) -> None:
    """Swap attention and every AddNorm of the encoder's layers for the compiled ones."""
    for layer in bert.layers:
        layer.attention.attend = attend_compiled
        layer.attention_norm = CompiledAddNorm(layer.attention_norm)
        layer.feed_forward_norm = CompiledAddNorm(layer.feed_forward_norm)


def check(status: int) -> None:
    """Negative for sizes that `runs` should have refused, or for memory that is not there."""
    if status:
        raise MemoryError(f"a compiled kernel failed with status {status}")
