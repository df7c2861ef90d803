"""The packed batch: the tokens of all texts end to end. The only place where lists become tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from model.tokens import Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Neighbouring texts of one length: `count` texts of `length` tokens, from text `text` and row `start` on."""

    text: int
    start: int
    count: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.count * self.length)

    @property
    def texts(self) -> slice:
        return slice(self.text, self.text + self.count)


@dataclass(frozen=True, eq=False)
class Batch:
    """N texts of T tokens in all, without padding and therefore without a mask.

    input_ids   [T] int64
    type_ids    [T] int64, the segment of each token
    positions   [T] int64, from 0 in each text
    cu_seqlens  [N + 1] int32; text n is the rows cu_seqlens[n] to cu_seqlens[n + 1]
    max_seqlen  the longest text
    cu_texts    [N + 1] int32, 0 to N: the boundaries of matrices with one row per text
    lengths     [N] int64, the same boundaries on the host: the tokens of each text
    tiles       [M, 4] int32, the same as tiles of queries, where a kernel works by them
    """

    input_ids: Tensor
    type_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    cu_texts: Tensor
    max_seqlen: int
    lengths: np.ndarray
    tiles: Tensor | None = None

    @cached_property
    def runs(self) -> list[Run]:
        """The boundaries as runs of texts of one length, for kernels that need rectangles."""
        starts = np.cumsum(self.lengths) - self.lengths
        borders = [0, *(np.flatnonzero(np.diff(self.lengths)) + 1).tolist(), len(self.lengths)]
        return [Run(a, int(starts[a]), b - a, int(self.lengths[a])) for a, b in pairwise(borders)]

    @property
    def first(self) -> Tensor:
        """The row of the first token, [CLS], of each text: [N] int64."""
        return self.cu_seqlens[:-1].long()

    @property
    def last(self) -> Tensor:
        """The row of the last token of each text: [N] int64."""
        return self.cu_seqlens[1:].long() - 1


def pack(rows: Sequence[Tokens]) -> Batch:
    """Lay rows end to end, in the order given.

    Raises ValueError for a row without tokens, which has no [CLS] and no last token but its neighbour's, and where rows
    have not as many segments as tokens.
    """
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    if not lengths.all():
        raise ValueError(f"row {int(lengths.argmin())} has no tokens; wanted one at least")
    ends = np.cumsum(lengths)
    starts = ends - lengths
    types = np.concatenate([row.types for row in rows], dtype=np.int64)
    if len(types) != ends[-1]:
        raise ValueError(f"{len(types)} segments for {ends[-1]} tokens; wanted one for each")
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([row.ids for row in rows], dtype=np.int64)),
        type_ids=torch.from_numpy(types),
        positions=torch.from_numpy(np.arange(ends[-1]) - np.repeat(starts, lengths)),
        cu_seqlens=torch.from_numpy(np.concatenate(([0], ends), dtype=np.int32)),
        cu_texts=torch.arange(len(rows) + 1, dtype=torch.int32),
        max_seqlen=int(lengths.max()),
        lengths=lengths,
    )


def by_length(rows: Sequence[Tokens]) -> np.ndarray:
    """The order [N] that puts rows of one length beside each other, longest first."""
    return np.argsort([-len(row) for row in rows], kind="stable")
