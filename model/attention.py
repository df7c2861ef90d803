"""The attention core: softmax(Q Kᵀ / √D) V per head, on packed rows (Vaswani et al. 2017, arXiv 1706.03762, section 3.2).

`attend_reference` is the formula and judges every faster kernel. Queries, keys and values are views of one joint product
[T, 3H], which a kernel reads in place, and no kernel looks across the border of a text.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.batch import Batch

Attend = Callable[[Tensor, Tensor, Tensor, Batch, int], Tensor]
"""(q, k [T, H], v [T, H], batch, heads) -> like q, which has a row per token [T, H] or only one per text [N, H]"""


def attend_reference(q: Tensor, k: Tensor, v: Tensor, batch: Batch, heads: int) -> Tensor:
    """The textbook formula in float32, one text at a time."""
    keys = batch.cu_seqlens.tolist()
    queries = keys if len(q) == len(k) else range(len(keys))
    texts = zip(pairwise(queries), pairwise(keys), strict=True)
    joined = [_attention(_split(q[a:b], heads), _split(k[c:d], heads), _split(v[c:d], heads)) for (a, b), (c, d) in texts]
    return torch.cat(joined, dim=1).transpose(0, 1).flatten(1).to(q.dtype)


def _split(rows: Tensor, heads: int) -> Tensor:
    return rows.float().view(len(rows), heads, -1).transpose(0, 1)  # [A, L, D]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores: Tensor = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # [A, L, L]
    return scores.softmax(dim=-1) @ v  # [A, L, D]


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, batch: Batch, heads: int) -> Tensor:
    """torch's fused kernel on runs of texts of one length: rectangles without padding, read in place."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for run in batch.runs:
        rows = run.rows if len(q) == len(k) else run.texts
        queries, keys, values = (
            part.view(run.count, -1, heads, q.shape[1] // heads).transpose(1, 2)  # [N, A, L, D]
            for part in (q[rows], k[run.rows], v[run.rows])
        )
        joined = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2).flatten(0, 1)
        if len(joined) == len(q):
            return joined
        out[rows] = joined
    return out


class MultiHeadAttention(nn.Module):
    """Heads side by side in one product each way: [T, H] -> [T, H].

    `attend` is the kernel, chosen once where the machine is known and handed in.
    """

    def __init__(self, hidden_size: int, heads: int, attend: Attend = attend_reference) -> None:
        super().__init__()
        self.heads = heads
        self.attend = attend
        self.qkv: nn.Module = nn.Linear(hidden_size, 3 * hidden_size)
        self.output: nn.Module = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # views of [T, 3H]
        joined = self.attend(q, k, v, batch, self.heads)
        output: Tensor = self.output(joined)
        return output  # [T, H]

    def first_rows(self, x: Tensor, batch: Batch) -> Tensor:
        """The same for the first token of each text only: [T, H] -> [N, H]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        joined = self.attend(q[batch.first], k, v, batch, self.heads)
        output: Tensor = self.output(joined)
        return output  # [N, H]
