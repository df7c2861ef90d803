"""The attention core against numbers by hand, and every faster kernel against the formula."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from model.attention import Attend, MultiHeadAttention, attend_reference, attend_sdpa
from model.batch import Batch, pack
from model.tokens import Tokens


def batch_of(*lengths: int) -> Batch:
    return pack([Tokens.of([0] * length) for length in lengths])


def random_qkv(tokens: int, hidden: int, seed: int = 0, size: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as views of one product, as the layer hands them over."""
    joint = torch.randn(tokens, 3 * hidden, generator=torch.Generator().manual_seed(seed)) * size
    return joint[:, :hidden], joint[:, hidden : 2 * hidden], joint[:, 2 * hidden :]


KERNELS = pytest.mark.parametrize("attend", [attend_reference, attend_sdpa])


@KERNELS
def test_numbers_by_hand(attend: Attend) -> None:
    """One head of four: q₁k₁/√4 = ln 3 and q₁k₂/√4 = 0, so the weights are 3/4 and 1/4; q₂ = 0 weighs evenly."""
    q = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    k = torch.tensor([[np.log(3), 0, 0, 0], [0, 5, 0, 0]], dtype=torch.float32)
    v = torch.tensor([[4.0, 0.0, 0.0, 8.0], [0.0, 4.0, 0.0, 0.0]])
    wanted = torch.tensor([[3.0, 1.0, 0.0, 6.0], [2.0, 2.0, 0.0, 4.0]])
    torch.testing.assert_close(attend(q, k, v, batch_of(2), 1), wanted, rtol=0, atol=1e-6)


@KERNELS
def test_each_head_sees_its_own_columns(attend: Attend) -> None:
    """Two heads of one: in the first k₁ outweighs k₂ by 3, in the second k₂ outweighs k₁ by 3."""
    q, k, v = torch.ones(2, 2), torch.eye(2) * float(np.log(3)), torch.tensor([[4.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(attend(q, k, v, batch_of(2), 2), torch.tensor([[3.0, 1.0]] * 2), rtol=0, atol=1e-6)


def by_numpy(q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: list[int], heads: int) -> np.ndarray:
    """softmax(QKᵀ/√D)V in float64 with a loop over everything."""
    out = np.empty(q.shape)
    size = q.shape[1] // heads
    for start, end in pairwise(np.cumsum([0, *lengths])):
        for head in range(heads):
            mine = slice(start, end), slice(head * size, (head + 1) * size)
            weights = np.exp(q[mine].astype(np.float64) @ k[mine].T / np.sqrt(size))
            out[mine] = weights / weights.sum(axis=1, keepdims=True) @ v[mine]
    return out


LENGTHS = [256, 1, 2, 2, 2, 7, 512, 33, 33, 1, 7]


@KERNELS
@pytest.mark.parametrize(("heads", "size"), [(1, 1), (1, 32), (2, 5), (3, 16), (5, 8), (12, 32), (16, 64)])
def test_kernels_equal_the_formula(attend: Attend, heads: int, size: int) -> None:
    q, k, v = random_qkv(sum(LENGTHS), heads * size)
    wanted = by_numpy(q.numpy(), k.numpy(), v.numpy(), LENGTHS, heads)
    np.testing.assert_allclose(attend(q, k, v, batch_of(*LENGTHS), heads), wanted, rtol=2e-6, atol=5e-6)


@KERNELS
def test_first_queries_alone_give_the_first_rows(attend: Attend) -> None:
    q, k, v = random_qkv(sum(LENGTHS), 48)
    batch = batch_of(*LENGTHS)
    wanted = attend(q, k, v, batch, 3)[batch.first]
    torch.testing.assert_close(attend(q[batch.first], k, v, batch, 3), wanted, rtol=0, atol=5e-6)


@KERNELS
def test_scores_too_large_for_exp_are_no_nan(attend: Attend) -> None:
    """One weight is 1 and the others 0; a softmax that does not subtract the maximum overflows here."""
    q, k, v = torch.full((3, 4), 100.0), torch.eye(3, 4) * 100, torch.eye(3, 4)
    torch.testing.assert_close(attend(q, k, v, batch_of(3), 4)[0, 0], torch.tensor(1.0))


@KERNELS
@pytest.mark.parametrize("lengths", [(5, 9, 5), (5, 5, 5), (1, 1, 40)])
def test_no_text_sees_another(attend: Attend, lengths: tuple[int, ...]) -> None:
    """When one text changes, the rows of the others stay the same to the last bit."""
    before = attend(*random_qkv(sum(lengths), 32), batch_of(*lengths), 4)
    for start, end in pairwise(np.cumsum([0, *lengths])):
        changed = [part.clone() for part in random_qkv(sum(lengths), 32)]
        for part, other in zip(changed, random_qkv(end - start, 32, seed=1, size=1000), strict=True):
            part[start:end] = other
        after = attend(*changed, batch_of(*lengths), 4)
        assert torch.equal(after[:start], before[:start])
        assert torch.equal(after[end:], before[end:])
        assert not torch.equal(after[start:end], before[start:end])


@KERNELS
def test_low_precision_comes_back_as_it_went_in(attend: Attend) -> None:
    q, k, v = (part.bfloat16() for part in random_qkv(6, 8))
    ours = attend(q, k, v, batch_of(4, 2), 2)
    assert ours.dtype == torch.bfloat16
    wanted = attend_reference(q.float(), k.float(), v.float(), batch_of(4, 2), 2)
    torch.testing.assert_close(ours.float(), wanted, rtol=0.02, atol=0.02)


def test_heads_are_joined_and_projected() -> None:
    """A text of one token attends to itself alone: the layer is its value projection and then its output projection."""
    attention = MultiHeadAttention(8, 2)
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    wanted = (x @ attention.qkv.weight[16:].T + attention.qkv.bias[16:]) @ attention.output.weight.T + attention.output.bias
    torch.testing.assert_close(attention(x, batch_of(1)), wanted, rtol=0, atol=1e-6)
