"""The kernels of kernels.cu, compiled at start for one GPU and the sizes of a checkpoint.

NVRTC, the compiler that comes with torch, needs no toolkit on the machine. Where it is missing, or the GPU or the sizes do not
fit, torch's own kernels do the work; `attend_reference` and torch's LayerNorm judge these in the tests.
"""

import ctypes
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.batch import Batch
from model.bert import AddNorm, Bert, Embeddings
from model.config import BertConfig

log = logging.getLogger("bertd.engine")

QUERIES = 32  # of a tile, at most
_WARPS = 4  # of a block of attention
_ROWS = 4  # of a block of the other kernels
_VECTOR = 8  # numbers that they read at once
# By the size of a head, as measured on an H100: blocks of attention that a multiprocessor is to have at once, and tokens of the
# longest text up to which it is faster than torch's varlen flash attention on a batch of many lengths.
_BLOCKS = {32: 4, 64: 1}
_LONGEST = {32: 512, 64: 256}
HALF = (torch.bfloat16, torch.float16)
_SOURCES = ("instructions.cu", "kernels.cu")
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "add_layer_norm": (_POINTER, _POINTER, _INT, *[_POINTER] * 3, _INT, _FLOAT),
    "embed": (*[_POINTER, _POINTER, _INT] * 3, *[_POINTER] * 3, _INT, _FLOAT),
    "attend": (*[_POINTER] * 4, *[_INT] * 3, _POINTER, _INT, _FLOAT),
}


def is_ampere_or_newer(device: torch.device) -> bool:
    """Whether a GPU has bfloat16, and the instructions that these kernels and torch's flash attention are made of."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def macros(config: BertConfig, dtype: torch.dtype) -> dict[str, int]:
    """What kernels.cu has to be told."""
    sizes = {"HIDDEN": config.hidden_size, "HEAD": config.head_size}
    blocks = {"QUERIES": QUERIES, "WARPS": _WARPS, "BLOCKS": _BLOCKS[config.head_size], "ROWS": _ROWS}
    return sizes | blocks | ({"BFLOAT16": 1} if dtype == torch.bfloat16 else {})


class Kernels:
    """kernels.cu on one device, for one dtype and the sizes of one encoder."""

    def __init__(self, config: BertConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Raises RuntimeError where it does not compile, ImportError where there is no compiler."""
        from cuda.bindings import driver

        self.device = device
        self._driver = driver
        image = _compile(macros(config, dtype), torch.cuda.get_device_capability(device))
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # so that the device has a context to load into
            self._module = self._check(driver.cuModuleLoadData(image))
            self._functions = {name: self._check(driver.cuModuleGetFunction(self._module, name.encode())) for name in _SIGNATURES}

    def launch(self, name: str, blocks: tuple[int, int], threads: int, values: tuple[float, ...]) -> None:
        """Queue a kernel on the current stream of the device."""
        stream = torch.cuda.current_stream(self.device).cuda_stream
        arguments = (values, _SIGNATURES[name])
        self._check(self._driver.cuLaunchKernel(self._functions[name], *blocks, 1, threads, 1, 1, 0, stream, arguments, 0))

    def _check(self, answer: Sequence[Any]) -> Any:
        status, *values = answer
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"the CUDA driver answered {status.name}")
        return values[0] if values else None


def _compile(defined: dict[str, int], capability: tuple[int, int]) -> bytes:
    """Machine code for a GPU of that compute capability."""
    from cuda.bindings import nvrtc

    source = "".join((Path(__file__).parent / name).read_text(encoding="utf-8") for name in _SOURCES)
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], [])
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", *(f"-D{name}={value}" for name, value in defined.items())]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        reason = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, reason)
        raise RuntimeError(f"kernels.cu does not compile: {reason.decode(errors='replace')}")
    image = bytes(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, image)
    nvrtc.nvrtcDestroyProgram(program)
    return image


def compile_kernels(config: BertConfig, device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The kernels for an encoder; None where they can't be had, or its sizes do not fit them."""
    if dtype not in HALF or config.head_size not in _BLOCKS or not is_ampere_or_newer(device):
        return None
    try:
        return Kernels(config, device, dtype)
    except (ImportError, RuntimeError) as error:
        log.warning("the kernels for GPUs are not used, torch's are: %s", error)
        return None


def tiles_of(lengths: np.ndarray, count: int | None = None) -> Tensor:
    """Neighbouring queries of one text, at most `QUERIES` a tile: [M, 4] int32.

    Each is the first row, the rows, and the rows of the text, the last exclusive; empty ones fill up to `count`.
    """
    ends = np.cumsum(lengths)
    tiles = -(-lengths // QUERIES)  # of each text
    text = np.repeat(np.arange(len(lengths)), tiles)
    start, end = (ends - lengths)[text], ends[text]
    first = start + QUERIES * (np.arange(len(text)) - np.repeat(np.cumsum(tiles) - tiles, tiles))
    table = np.zeros((len(text) if count is None else count, 4), np.int32)
    for column, values in enumerate((first, np.minimum(end - first, QUERIES), start, end)):
        table[: len(text), column] = values
    return torch.from_numpy(table)


class TileAttention:
    """Attention tile by tile, from the views in place; what it gives for a text is bit-equal in any batch."""

    def __init__(self, kernels: Kernels, head_size: int) -> None:
        self.longest = _LONGEST[head_size]
        self._kernels = kernels

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, heads: int) -> Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        tiles = batch.tiles if len(q) == len(k) else _one_query_each(batch)
        assert tiles is not None
        scale = math.log2(math.e) / math.sqrt(q.shape[1] // heads)
        pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr())
        strides = (q.stride(0), k.stride(0), out.stride(0))
        blocks = (-(-len(tiles) // _WARPS), heads)
        self._kernels.launch("attend", blocks, 32 * _WARPS, (*pointers, *strides, tiles.data_ptr(), len(tiles), scale))
        return out


def _one_query_each(batch: Batch) -> Tensor:
    starts, ends = batch.cu_seqlens[:-1], batch.cu_seqlens[1:]
    return torch.stack([batch.cu_texts[:-1], torch.ones_like(starts), starts, ends], dim=1)


class FusedEmbeddings(nn.Module):
    """Embeddings in one pass over memory: LayerNorm of token + segment + position, with the sum never rounded: [T, H]."""

    def __init__(self, embeddings: nn.Module, kernels: Kernels) -> None:
        super().__init__()
        assert isinstance(embeddings, Embeddings)
        self._kernels = kernels
        self.tables = [table.weight for table in (embeddings.token, embeddings.segment, embeddings.position)]
        self.norm = embeddings.norm

    def forward(self, batch: Batch) -> Tensor:
        weight, bias = self.norm.weight, self.norm.bias
        out = torch.empty(len(batch.input_ids), len(weight), dtype=weight.dtype, device=weight.device)
        places = zip((batch.input_ids, batch.type_ids, batch.positions), self.tables, strict=True)
        tables = [value for index, table in places for value in (index.data_ptr(), table.data_ptr(), len(table))]
        values = (*tables, weight.data_ptr(), bias.data_ptr(), out.data_ptr(), len(out), self.norm.eps)
        self._kernels.launch("embed", (-(-len(out) // _ROWS), 1), 32 * _ROWS, values)
        return out


class FusedAddNorm(nn.Module):
    """AddNorm in one pass over memory: LayerNorm of x + residual, [T, H] and [T, H] or [H], with the sum never rounded."""

    def __init__(self, norm: nn.Module, kernels: Kernels) -> None:
        super().__init__()
        assert isinstance(norm, AddNorm)
        self._kernels = kernels
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        out = torch.empty_like(x)
        step = x.shape[1] // _VECTOR if residual.dim() == 2 else 0
        pointers = (t.data_ptr() for t in (self.weight, self.bias, out))
        values = (x.data_ptr(), residual.data_ptr(), step, *pointers, len(x), self.eps)
        self._kernels.launch("add_layer_norm", (-(-len(x) // _ROWS), 1), 32 * _ROWS, values)
        return out


class LinearAddNorm(nn.Module):
    """A sublayer's last product, and LayerNorm of it and the residual: [T, in], [T, H] -> [T, H].

    cuBLAS adds the residual to the product as it writes that, in the residual's place and rounded, so that LayerNorm reads
    one matrix in place of two. The product's bias comes in there.
    """

    def __init__(self, linear: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        assert isinstance(linear, nn.Linear)
        self.weight, self.bias = linear.weight, linear.bias
        self.norm = norm

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Overwrites the residual: no one reads it after this."""
        normed: Tensor = self.norm(residual.addmm_(x, self.weight.t()), self.bias)
        return normed


def replace_kernels(bert: Bert, kernels: Kernels, with_residuals: bool = False) -> None:
    """Swap the embeddings and every AddNorm of the encoder for the fused ones, each with the product before it if so asked."""
    bert.embeddings = FusedEmbeddings(bert.embeddings, kernels)
    for layer in bert.layers:
        layer.attention_norm = FusedAddNorm(layer.attention_norm, kernels)
        layer.feed_forward_norm = FusedAddNorm(layer.feed_forward_norm, kernels)
        if with_residuals:
            layer.attention_norm = LinearAddNorm(layer.attention.output, layer.attention_norm)
            layer.feed_forward_norm = LinearAddNorm(layer.feed_forward.down, layer.feed_forward_norm)
            layer.attention.output = layer.feed_forward.down = nn.Identity()
