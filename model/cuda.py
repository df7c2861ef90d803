"""The encoder on a GPU: half precision, varlen attention on packed rows, graphs for small batches."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model.attention import attend_sdpa
from model.batch import Batch, by_length, pack
from model.config import Task
from model.encoder import Encoder
from model.tokens import Tokens
from model.vectors import FloatArray

BUCKETS = (16, 32, 64, 128, 256, 512, 1024)
"""Tokens of the batches that have a graph. Above them the kernels take longer than their launches, and a graph gains nothing."""

_TOKENS_PER_TEXT = 4  # in a bucket, at least: a graph has places for so many texts and no more


@dataclass(frozen=True)
class Bucket:
    """The fixed shape of a graph: tokens, and places for texts, dummies included."""

    tokens: int

    @property
    def texts(self) -> int:
        return self.tokens // _TOKENS_PER_TEXT


def find_bucket(rows: Sequence[Tokens], max_tokens: int) -> Bucket | None:
    """The smallest bucket that holds a batch and the dummies that fill it up; None when there is none."""
    tokens = sum(map(len, rows))
    for size in BUCKETS:
        if tokens <= size and len(rows) + -(-(size - tokens) // max_tokens) <= Bucket(size).texts:
            return Bucket(size)
    return None


def pad_to(bucket: Bucket, rows: Sequence[Tokens], max_tokens: int) -> Batch:
    """A batch of the bucket's shape: the rows, then dummy texts of token 0 up to its tokens, then texts of no tokens.

    No text sees another, so the rows' own values are those of the plain batch.
    """
    missing = bucket.tokens - sum(map(len, rows))
    sizes = [min(max_tokens, missing - start) for start in range(0, missing, max_tokens)]
    batch = pack([*rows, *(Tokens.of([0] * size) for size in sizes)])
    empty = bucket.texts + 1 - len(batch.cu_seqlens)
    ends = batch.cu_seqlens.new_full((empty,), bucket.tokens)
    return replace(
        batch,
        cu_seqlens=torch.cat([batch.cu_seqlens, ends]),
        cu_texts=torch.arange(bucket.texts + 1, dtype=torch.int32),
        max_seqlen=max_tokens,
    )


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, batch: Batch, heads: int) -> Tensor:
    """torch's varlen flash attention: packed rows as they are, any mix of lengths in one kernel."""
    from torch.nn.attention.varlen import varlen_attn

    per_token = len(q) == len(k)
    cu_queries, longest = (batch.cu_seqlens, batch.max_seqlen) if per_token else (batch.cu_texts, 1)
    q, k, v = (part.view(len(part), heads, -1) for part in (q, k, v))
    joined = varlen_attn(q, k, v, cu_queries, batch.cu_seqlens, longest, batch.max_seqlen)
    assert isinstance(joined, Tensor)
    return joined.flatten(1)


class GraphPool:
    """CUDA graphs of the encoder, one per bucket, captured on first use: one launch in place of a hundred.

    `capture` makes a function of a batch on the device out of a forward; a test hands in one that needs no GPU.
    """

    def __init__(self, forward: Callable[[Batch], Tensor], capture: "Capture | None" = None) -> None:
        self._forward = forward
        self._capture = capture or capture_graph
        self._graphs: dict[Bucket, Callable[[Batch], Tensor]] = {}

    def __call__(self, bucket: Bucket, batch: Batch) -> Tensor:
        """Hidden rows [bucket.tokens, H], valid until the next call."""
        if bucket not in self._graphs:
            self._graphs[bucket] = self._capture(self._forward, batch)
        return self._graphs[bucket](batch)


Capture = Callable[[Callable[[Batch], Tensor], Batch], Callable[[Batch], Tensor]]


def capture_graph(forward: Callable[[Batch], Tensor], batch: Batch) -> Callable[[Batch], Tensor]:
    """Record a forward on static copies of a batch; the function returned copies another of that shape in and replays."""
    static = replace(batch, **{name: getattr(batch, name).clone() for name in _TENSORS})
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a capture must not be the first run: libraries set themselves up in it
        forward(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hidden = forward(static)

    def replay(batch: Batch) -> Tensor:
        for name in _TENSORS:
            getattr(static, name).copy_(getattr(batch, name), non_blocking=True)
        graph.replay()
        return hidden

    return replay


_TENSORS = ("input_ids", "type_ids", "positions", "cu_seqlens", "cu_texts")


class CudaRunner:
    """Runs an encoder on one GPU, everything in order on one stream."""

    BATCH_TOKENS = 32_768
    lanes = 1

    def __init__(self, encoder: Encoder, device: torch.device, dtype: torch.dtype) -> None:
        self.encoder = encoder.to(device)
        encoder.bert.to(dtype)  # what stands on it is small and stays in float32
        self.device = device
        varlen = dtype in (torch.bfloat16, torch.float16)
        for layer in encoder.bert.layers:
            layer.attention.attend = attend_varlen if varlen else attend_sdpa
        self.kernel = f"{'varlen flash' if varlen else 'SDPA'} attention, cuBLAS linear, {'graphs' if varlen else 'no graphs'}"
        self._graphs = GraphPool(encoder.bert) if varlen else None
        self._on_last_layer: Callable[[], None] = lambda: None

    def __call__(self, rows: Sequence[Tokens], task: Task) -> FloatArray:
        order = by_length(rows)
        ordered = [rows[place] for place in order]
        with torch.inference_mode():
            bucket = find_bucket(ordered, self.encoder.config.max_tokens) if self._graphs else None
            if bucket is None or self._graphs is None:
                vectors = self.encoder(self._to_device(pack(ordered)), task)
            else:
                batch = self._to_device(pad_to(bucket, ordered, self.encoder.config.max_tokens))
                hidden = self._graphs(bucket, batch)
                batch = replace(batch, cu_seqlens=batch.cu_seqlens[: len(rows) + 1])
                vectors = self.encoder.pool(hidden[: sum(map(len, rows))], batch, task)
            answer: FloatArray = np.empty(vectors.shape, dtype=np.float32)
            self._on_last_layer()  # all is launched: the next batch may be formed while the device works
            answer[order] = vectors.cpu().numpy()
        return answer

    def hidden(self, rows: Sequence[Tokens]) -> list[FloatArray]:
        with torch.inference_mode():
            hidden = self.encoder.hidden(self._to_device(pack(rows)))
            self._on_last_layer()
            matrix = hidden.cpu().numpy()
        return np.split(matrix, np.cumsum([len(row) for row in rows])[:-1])

    def on_layer(self, callback: Callable[[bool], None]) -> None:
        self._on_last_layer = lambda: callback(True)

    def warm_up(self, tokens: int) -> float:
        length = min(128, self.encoder.config.max_tokens)
        rows = [Tokens.of([0] * length)] * max(1, tokens // length)
        task = self.encoder.config.task
        for size in BUCKETS if self._graphs else ():
            self([Tokens.of([0] * min(size, length))] * max(1, size // length), task)
        self(rows, task)
        start = time.perf_counter()
        self(rows, task)
        return len(rows) * length / (time.perf_counter() - start)

    def largest_batch(self, tokens: int) -> int:
        """`tokens`, or the largest half, quarter, … of it that fits the device's memory as matrices of all tokens."""
        length = self.encoder.config.max_tokens
        while True:
            try:
                self.hidden([Tokens.of([0] * length)] * max(1, tokens // length))
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                if tokens <= length:
                    raise
                tokens //= 2
            else:
                return tokens

    def _to_device(self, batch: Batch) -> Batch:
        pinned = {name: getattr(batch, name).pin_memory() for name in _TENSORS}
        return replace(batch, **pinned).to(self.device)
