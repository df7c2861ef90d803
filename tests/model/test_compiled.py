"""The compiled kernels against the plain ones, where this machine can run them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import random_rows
from torch import Tensor

from model import compiled
from model.attention import attend_reference
from model.batch import Batch, pack
from model.bert import AddNorm, Embeddings
from model.config import BertConfig
from model.tokens import Tokens

pytestmark = pytest.mark.usefixtures("instructions")
DTYPES = pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 5e-6), (torch.bfloat16, 0.03)])
LENGTHS = (256, 1, 2, 2, 2, 7, 512, 33, 33, 1, 7, 15, 16, 17, 127, 128, 129)


def batch_of(*lengths: int) -> Batch:
    return pack([Tokens.of([0] * length) for length in lengths])


def random_qkv(tokens: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    joint = torch.randn(tokens, 3 * hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)
    q, k, v = joint.chunk(3, dim=-1)
    return q, k, v


@DTYPES
@pytest.mark.parametrize(("heads", "size"), [(1, 16), (3, 16), (12, 32), (2, 48), (16, 64), (1, 128)])
def test_attention_equals_the_formula(dtype: torch.dtype, near: float, heads: int, size: int) -> None:
    q, k, v = random_qkv(sum(LENGTHS), heads * size, dtype)
    batch = batch_of(*LENGTHS)
    wanted = attend_reference(q.float(), k.float(), v.float(), batch, heads)
    ours = compiled.attend_compiled(q, k, v, batch, heads)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), wanted, rtol=0, atol=near)
    first = compiled.attend_compiled(q[batch.first], k, v, batch, heads)
    torch.testing.assert_close(first.float(), wanted[batch.first], rtol=0, atol=near)


@DTYPES
def test_a_text_has_the_same_bits_in_any_batch(dtype: torch.dtype, near: float) -> None:
    q, k, v = random_qkv(sum(LENGTHS), 96, dtype)
    together = compiled.attend_compiled(q, k, v, batch_of(*LENGTHS), 3)
    for start, end in pairwise(np.cumsum([0, *LENGTHS])):
        alone = compiled.attend_compiled(q[start:end], k[start:end], v[start:end], batch_of(end - start), 3)
        assert torch.equal(alone, together[start:end])


@DTYPES
@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_large_scores_are_no_nan(dtype: torch.dtype, near: float, size: float) -> None:
    q, k, v = (part * scale for part, scale in zip(random_qkv(60, 32, dtype), (size, size, 1), strict=True))
    ours = compiled.attend_compiled(q, k, v, batch_of(17, 43), 2)
    assert ours.isfinite().all()


def test_nan_stays_with_its_text_and_is_seen() -> None:
    q, k, v = random_qkv(30, 32, torch.float32)
    k[12, 3] = torch.nan
    ours = compiled.attend_compiled(q, k, v, batch_of(10, 10, 10), 2)
    assert not ours[10:20].isfinite().all(dim=1).any()
    assert ours[:10].isfinite().all()
    assert ours[20:].isfinite().all()


@DTYPES
@pytest.mark.parametrize(("rows", "hidden"), [(1, 16), (7, 384), (300, 1024), (3, 48)])
def test_layer_norm_equals_torch(dtype: torch.dtype, near: float, rows: int, hidden: int) -> None:
    random = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(rows, hidden, generator=random).mul(3).add(1).to(dtype) for _ in range(2))
    norm = AddNorm(hidden, eps=1e-12)
    with torch.inference_mode():
        norm.weight.copy_(torch.randn(hidden, generator=random))
        norm.bias.copy_(torch.randn(hidden, generator=random))
        norm.to(dtype)
        ours = compiled.CompiledAddNorm(norm)(x, residual)
        summed = x.float() + residual.float()
        wanted = torch.nn.functional.layer_norm(summed, (hidden,), norm.weight.float(), norm.bias.float(), 1e-12)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), wanted, rtol=near, atol=near)


def random_embeddings(hidden: int) -> Embeddings:
    """Of 50 tokens, 2 segments and 40 positions."""
    embeddings = Embeddings(BertConfig(vocab_size=50, hidden_size=hidden, num_attention_heads=1, max_position_embeddings=40))
    torch.manual_seed(0)
    for parameter in embeddings.parameters():
        parameter.detach().normal_()
    return embeddings.requires_grad_(False)


@DTYPES
@pytest.mark.parametrize(("lengths", "hidden"), [((1,), 16), ((7, 1, 40), 384), ((40,) * 20, 1024)])
def test_embeddings_equal_torch(dtype: torch.dtype, near: float, lengths: tuple[int, ...], hidden: int) -> None:
    batch = pack(random_rows(lengths, vocab_size=50, segments=2))
    embeddings = random_embeddings(hidden).to(dtype)
    ours = compiled.CompiledEmbeddings(embeddings)(batch)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), embeddings.float()(batch), rtol=near, atol=near)


@pytest.mark.parametrize(("field", "index"), [("input_ids", 50), ("type_ids", 2), ("positions", 40), ("input_ids", -1)])
def test_an_index_outside_its_table_is_refused(field: str, index: int) -> None:
    batch = batch_of(9)
    getattr(batch, field)[4] = index
    with pytest.raises(IndexError, match="outside its table"):
        compiled.CompiledEmbeddings(random_embeddings(32))(batch)


@pytest.mark.parametrize(("vectors", "heads"), [(1.5, 1), (6, 12), (2.5, 5)])
def test_sizes_that_do_not_fit_are_left_to_torch(instructions: str, vectors: float, heads: int) -> None:
    hidden = int(vectors * {"AVX-512": 16, "AVX2": 8}[instructions])
    assert not compiled.runs(BertConfig(hidden_size=hidden, num_attention_heads=heads), torch.float32)
    assert not compiled.runs(BertConfig(), torch.float64)
