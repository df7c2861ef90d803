"""The kernels for GPUs, judged without one: their source runs on the processor, each lane of a warp a thread (warp.h)."""

import ctypes
import shutil
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import VOCABULARY
from reference import random_rows
from torch import nn
from torch.nn import functional as F

from model import compiled_cuda
from model.attention import attend_reference
from model.batch import pack
from model.bert import AddNorm, Bert, Embeddings
from model.compiled_cuda import FusedAddNorm, FusedEmbeddings, TileAttention, macros, replace_kernels, tiles_of
from model.config import BertConfig

HERE = Path(__file__).parent
LENGTHS = (70, 1, 17, 16, 2, 33, 32)


@cache
def build(folder, *defined):
    path = folder / f"{'-'.join(defined)}.so"
    source = ["-x", "c++", str(HERE / "warp.h")]
    subprocess.run(["g++", "-std=c++20", "-O1", "-w", "-fPIC", "-shared", *defined, *source, "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


class Emulated:
    """What Kernels is, on the processor."""

    def __init__(self, folder, config, dtype) -> None:
        self.library = build(folder, *(f"-D{name}={value}" for name, value in macros(config, dtype).items()))

    def launch(self, name, blocks, threads, values) -> None:
        function = getattr(self.library, f"launch_{name}")
        function.argtypes = [ctypes.c_int] * 3 + list(compiled_cuda._SIGNATURES[name])
        function(*blocks, threads, *values)


@pytest.fixture(scope="session")
def emulate(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("warp")
    return lambda dtype=torch.bfloat16, **sizes: Emulated(folder, config_of(**sizes), dtype)


def config_of(**sizes):
    return BertConfig(vocab_size=len(VOCABULARY), **sizes)


SIZES = {"hidden_size": 64, "num_attention_heads": 2}


def qkv_of(lengths, dtype, hidden):
    torch.manual_seed(0)
    joint = (torch.randn(sum(lengths), 3 * hidden) * 2).to(dtype)
    batch = pack(random_rows(lengths))
    return joint.chunk(3, dim=-1), replace(batch, tiles=tiles_of(batch.lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [32, 64])
def test_attention_by_tiles_is_that_of_the_formula(emulate, dtype, head) -> None:
    sizes = {"hidden_size": 2 * head, "num_attention_heads": 2}
    (q, k, v), batch = qkv_of(LENGTHS, dtype, 2 * head)
    found = TileAttention(emulate(dtype, **sizes), head)(q, k, v, batch, 2)
    torch.testing.assert_close(found.float(), attend_reference(q, k, v, batch, 2).float(), rtol=0.01, atol=0.01)


def test_a_tile_takes_one_query_a_text_too(emulate) -> None:
    (q, k, v), batch = qkv_of(LENGTHS, torch.bfloat16, 64)
    first = q[batch.first]
    found = TileAttention(emulate(**SIZES), 32)(first, k, v, batch, 2)
    torch.testing.assert_close(found, attend_reference(first, k, v, batch, 2), rtol=0.01, atol=0.01)


def test_a_text_alone_is_bit_equal_in_a_batch_with_empty_tiles(emulate) -> None:
    attend = TileAttention(emulate(**SIZES), 32)
    (q, k, v), batch = qkv_of(LENGTHS, torch.bfloat16, 64)
    batch = replace(batch, tiles=tiles_of(batch.lengths, 20))
    together = attend(q, k, v, batch, 2)
    for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        alone = pack(random_rows([int(end - start)]))
        alone = replace(alone, tiles=tiles_of(alone.lengths))
        assert torch.equal(attend(q[start:end], k[start:end], v[start:end], alone, 2), together[start:end])


def test_tiles_cover_each_row_once_and_no_border() -> None:
    assert tiles_of(np.array([0, 70, 32, 1]), 6).tolist() == [
        [0, 32, 0, 70],
        [32, 32, 0, 70],
        [64, 6, 0, 70],
        [70, 32, 70, 102],
        [102, 1, 102, 103],
        [0, 0, 0, 0],
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [64, 288, 384])
def test_the_sum_of_add_norm_is_not_rounded(emulate, dtype, hidden) -> None:
    torch.manual_seed(1)
    norm = AddNorm(hidden, eps=0.5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.to(dtype)
    x, residual = (torch.randn(2, 7, hidden) * 3).to(dtype)
    with torch.inference_mode():
        found = FusedAddNorm(norm, emulate(dtype, hidden_size=hidden, num_attention_heads=hidden // 32))(x, residual)
        weight, bias = norm.weight.float(), norm.bias.float()
        wanted = F.layer_norm(x.float() + residual.float(), (hidden,), weight, bias, norm.eps)
    torch.testing.assert_close(found, wanted.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("with_residuals", [False, True])
def test_an_encoder_of_these_kernels_is_the_plain_one(emulate, with_residuals) -> None:
    plain, fused = lively_encoder(), lively_encoder()
    kernels = emulate(**SIZES)
    replace_kernels(fused, kernels, with_residuals)
    for layer in fused.layers:
        layer.attention.attend = TileAttention(kernels, 32)
    batch = pack(random_rows(LENGTHS, segments=2))
    batch = replace(batch, tiles=tiles_of(batch.lengths))
    plain.float()
    with torch.inference_mode():
        for found, wanted in ((fused(batch), plain(batch)), (fused.first_rows(batch), plain.first_rows(batch))):
            error = (found - wanted).abs()  # of numbers around 1
            assert error.max() < 0.2
            assert error.mean() < 0.01


def lively_encoder():
    """An encoder in bfloat16 whose every weight and bias matters."""
    bert = Bert(config_of(**SIZES, num_hidden_layers=2, intermediate_size=128))
    torch.manual_seed(3)
    for name, weight in bert.named_parameters():
        weight.data = torch.randn(weight.shape) * (0.2 if weight.dim() == 2 else 0.5) + ("norm.weight" in name)
    return bert.bfloat16()


def test_embeddings_are_those_of_the_tables(emulate) -> None:
    embeddings = Embeddings(config_of(**SIZES))
    torch.manual_seed(2)
    for weight in embeddings.parameters():
        weight.data = torch.randn(weight.shape)
    embeddings.bfloat16()
    batch = pack(random_rows(LENGTHS, segments=2))
    with torch.inference_mode():
        found = FusedEmbeddings(embeddings, emulate(**SIZES))(batch)
        torch.testing.assert_close(found, embeddings.float()(batch).bfloat16(), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("hidden", "heads"), [(384, 12), (768, 12), (1024, 16)])
def test_the_kernels_compile_for_every_generation_of_gpus(capability, dtype, hidden, heads) -> None:
    """Where torch has come with CUDA's compiler: it needs no GPU."""
    pytest.importorskip("cuda.bindings.nvrtc")
    config = BertConfig(hidden_size=hidden, num_attention_heads=heads)
    assert compiled_cuda._compile(macros(config, dtype), capability).startswith(b"\x7fELF")
