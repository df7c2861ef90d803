"""Batches for a GPU: in fixed shapes, so that a graph can stand for a forward, and in one piece, so that one copy moves them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.batch import Batch, pack
from model.compiled_cuda import QUERIES, tiles_of
from model.tokens import Tokens

SMALL_BUCKETS = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
BUCKETS = (*SMALL_BUCKETS, *range(9216, 16385, 1024), *range(18432, 32769, 2048))
"""Tokens of the batches that have a graph.

Above the small ones the kernels take longer than their launches, on a processor that has nothing else to do: a launch lets go
of the interpreter a hundred times, and may wait for it each time.
"""

_ALIGNED = 16  # bytes: what a kernel reads at once

Forward = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Width:
    """What texts a graph has places for: none of more than `longest` tokens, and of `tokens_per_text` on average, at least.

    An empty place is not for nothing, as attention looks at it: in large buckets there are half as many.
    """

    longest: int
    tokens_per_text: int = 4

    def texts(self, tokens: int) -> int:
        """Places in a bucket of so many tokens."""
        return max(1, tokens // (self.tokens_per_text if tokens <= SMALL_BUCKETS[-1] else 2 * self.tokens_per_text))


@dataclass(frozen=True)
class Bucket:
    """The fixed shape of a graph: tokens, places for texts, dummies included, and for tiles; no text above `longest` tokens."""

    tokens: int
    longest: int
    texts: int

    @property
    def tiles(self) -> int:
        return self.tokens // QUERIES + self.texts


def find_bucket(rows: Sequence[Tokens], widths: Sequence[Width], sizes: Sequence[int] = BUCKETS) -> Bucket | None:
    """The smallest bucket of one of `sizes` that holds a batch and the dummies that fill it up; None when there is none.

    Its texts are as long as one of `widths` lets them be. Both rise, and no text is longer than the last.
    """
    tokens, length = sum(map(len, rows)), max(map(len, rows))
    width = next(width for width in widths if length <= width.longest)
    most = max(SMALL_BUCKETS[-1], 2 * tokens)  # a large one is to be filled by half
    for size in (size for size in sizes if tokens <= size <= most):
        if len(rows) + -(-(size - tokens) // width.longest) <= width.texts(size):
            return Bucket(size, width.longest, width.texts(size))
    return None


def pad_to(bucket: Bucket, rows: Sequence[Tokens]) -> Batch:
    """A batch of the bucket's shape: texts of no tokens, dummy texts of token 0 that fill it up, and then the rows.

    No text sees another, so the rows' own values are those of the plain batch. With the rows last, each text, if it has a
    token or not, begins at a row that is there.
    """
    missing = bucket.tokens - sum(map(len, rows))
    sizes = [min(bucket.longest, missing - start) for start in range(0, missing, bucket.longest)]
    batch = pack([*(Tokens.of([0] * size) for size in sizes), *rows])
    empty = np.zeros(bucket.texts - len(batch.lengths), np.int32)
    return replace(
        batch,
        cu_seqlens=torch.from_numpy(np.concatenate([empty, batch.cu_seqlens.numpy()])),
        lengths=np.concatenate([empty, batch.lengths]),
        cu_texts=torch.arange(bucket.texts + 1, dtype=torch.int32),
        max_seqlen=bucket.longest,
        tiles=tiles_of(batch.lengths, bucket.tiles),
    )


class Transfer:
    """The tensors of a batch end to end in pinned memory, so that one copy that nobody waits for brings them to a device."""

    def __init__(self, batch: Batch, pinned: bool = True) -> None:
        self._batch = batch
        self._places: list[tuple[str, int, Tensor]] = []
        end = 0
        for name in _TENSORS:
            if (part := getattr(batch, name)) is not None:
                self._places.append((name, end, part))
                end += -(-part.nbytes // _ALIGNED) * _ALIGNED
        self.data = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        array = self.data.numpy()
        for _, start, part in self._places:
            array[start : start + part.nbytes] = part.numpy().reshape(-1).view(np.uint8)

    def batch_in(self, data: Tensor) -> Batch:
        """The batch whose tensors lie in `data`, which is like ours."""
        views: dict[str, Any] = {
            name: data[start : start + part.nbytes].view(part.dtype).view(part.shape) for name, start, part in self._places
        }
        return replace(self._batch, **views)


_TENSORS = ("input_ids", "type_ids", "positions", "cu_seqlens", "cu_texts", "tiles")

Capture = Callable[[Forward, Transfer], Callable[[Transfer], Tensor]]


class GraphPool:
    """CUDA graphs, one per bucket and task, captured on first use: one launch in place of a hundred.

    `capture` makes a function of a batch out of a forward; a test hands in one that needs no GPU. For one caller at a time.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._graphs: dict[tuple[Bucket, str], Callable[[Transfer], Tensor]] = {}

    def __call__(self, bucket: Bucket, task: str, forward: Forward, batch: Transfer) -> Tensor:
        """What the forward of a task makes of a batch of the bucket's shape; the next call overwrites it."""
        if (bucket, task) not in self._graphs:
            self._graphs[bucket, task] = self._capture(forward, batch)
        return self._graphs[bucket, task](batch)

    def clear(self) -> None:
        """Forget all graphs, and give up their memory."""
        self._graphs.clear()


def capture_graphs(device: torch.device) -> Capture:
    """A function that records a forward on a static copy of a batch; what it returns copies another one in and replays.

    All graphs share the memory between their inputs and their answers, since no two of them run at once.
    """
    memory = torch.cuda.graph_pool_handle()

    def capture(forward: Forward, batch: Transfer) -> Callable[[Transfer], Tensor]:
        static = batch.data.to(device)
        forward(batch.batch_in(static))  # a capture must not be the first run: libraries set themselves up in it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            answer = forward(batch.batch_in(static))

        def replay(batch: Transfer) -> Tensor:
            static.copy_(batch.data, non_blocking=True)
            graph.replay()
            return answer

        return replay

    return capture
