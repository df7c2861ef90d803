"""The encoder on a GPU: half precision, attention on packed rows, graphs for small batches, copies beside the computing."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from model.attention import attend_sdpa
from model.batch import Batch, by_length, pack
from model.compiled_cuda import (
    HALF,
    TileAttention,
    compile_kernels,
    is_ampere_or_newer,
    replace_kernels,
    tiles_of,
)
from model.config import Task
from model.encoder import Encoder
from model.errors import DeviceLost, UnsupportedModel
from model.graphs import BUCKETS, SMALL_BUCKETS, Bucket, Forward, GraphPool, Transfer, Width, capture_graphs, find_bucket, pad_to
from model.linear import fuse_gelu
from model.tokens import Tokens
from model.vectors import FloatArray

_LONG = 32  # tokens of a text on average, at least, in a batch with texts that are too long for tiles
_BUSY_WAIT = 1024  # tokens of a batch that is worth one: to be woken takes as long as a tenth of it

Answer = TypeVar("Answer")


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, batch: Batch, heads: int) -> Tensor:
    """torch's varlen flash attention: packed rows as they are, any mix of lengths in one kernel."""
    from torch.nn.attention.varlen import varlen_attn

    per_token = len(q) == len(k)
    cu_queries, longest = (batch.cu_seqlens, batch.max_seqlen) if per_token else (batch.cu_texts, 1)
    q, k, v = (part.view(len(part), heads, -1) for part in (q, k, v))
    joined = varlen_attn(q, k, v, cu_queries, batch.cu_seqlens, longest, batch.max_seqlen)
    assert isinstance(joined, Tensor)
    return joined.flatten(1)


def attend_cudnn(q: Tensor, k: Tensor, v: Tensor, batch: Batch, heads: int) -> Tensor:
    """cuDNN's kernel for texts of one length. In each thread it makes a plan for each number and length of them, in 40 ms."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attend_sdpa(q, k, v, batch, heads)


class FastestAttention:
    """The kernel that is the fastest for batches like this one; see docs/performance.md."""

    def __init__(self, tiles: TileAttention | None) -> None:
        self.tiles = tiles
        self.full: tuple[int, int] | None = None  # texts, and tokens of each, of the batch that cuDNN has a plan for

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, heads: int) -> Tensor:
        shape = len(batch.lengths), batch.max_seqlen
        if shape == self.full and len(q) == len(k) == shape[0] * shape[1]:
            return attend_cudnn(q, k, v, batch, heads)
        if self.tiles is not None and batch.max_seqlen <= self.tiles.longest:
            return self.tiles(q, k, v, batch, heads)
        return attend_varlen(q, k, v, batch, heads)


class Done(Protocol):
    """The end of what was queued on a device, as a CUDA event tells it."""

    def synchronize(self) -> None: ...


class Pipeline:
    """Batches of several threads on one device, launched whole and in turn: while one is computed, the next waits behind it."""

    def __init__(self) -> None:
        self.on_device: Callable[[], None] = lambda: None  # called by a thread when the device has come to its batch
        self.turn = Lock()  # held by whoever queues anything: graphs, their inputs and some of torch's switches are shared
        self._latest: Done | None = None  # the end of the batch that was launched last

    def run(self, launch: Callable[[], tuple[Answer, Done]]) -> Answer:
        """What a launch gives, which must not wait for the device, once it is there."""
        with self.turn:
            answer, done = launch()
            before, self._latest = self._latest, done
        if before is not None:
            before.synchronize()
        self.on_device()
        done.synchronize()
        return answer


def _texts_of(tokens: int, length: int) -> list[Tokens]:
    """So many tokens as texts of that length, and one with the rest."""
    texts = [Tokens.of([0] * length)] * (tokens // length)
    return [*texts, Tokens.of([0] * (tokens % length))] if tokens % length else texts


class CudaRunner:
    """Runs an encoder on one GPU: what is computed in order on one stream, what goes back to the host on another.

    Two threads may call it: while the batch of one is computed, that of the other is launched and waits on the device.
    """

    BATCH_TOKENS = 32_768
    lanes = 1
    ahead = 1

    def __init__(self, encoder: Encoder, device: torch.device, dtype: torch.dtype) -> None:
        self.encoder = encoder.to(device)
        encoder.bert.to(dtype)  # what stands on it is small and stays in float32
        self.device = device
        config = encoder.config.bert
        rough = dtype == torch.bfloat16  # what is added or put through GELU in a product is as exact as its rounding, or nearly
        kernels = compile_kernels(config, device, dtype)
        if kernels:
            replace_kernels(encoder.bert, kernels, with_residuals=rough)
        packed = dtype in HALF and is_ampere_or_newer(device)
        tiles = TileAttention(kernels, config.head_size) if kernels else None
        self._attention = FastestAttention(tiles) if packed else None
        most = config.max_position_embeddings
        self._widths = [Width(min(tiles.longest, most) if tiles else most)]
        if tiles and tiles.longest < most:
            self._widths.append(Width(most, _LONG))
        for layer in encoder.bert.layers:
            layer.attention.attend = self._attention or attend_sdpa
        self._graphs = GraphPool(capture_graphs(device)) if packed and encoder.masked_lm is None else None
        self._sizes: Sequence[int] = SMALL_BUCKETS  # of the batches that have a graph, for the encoder's own task
        fused = rough and fuse_gelu(encoder.bert)
        attention = f"{'tile and ' if kernels else ''}varlen flash attention" if packed else "SDPA attention"
        graphs = "graphs" if self._graphs else "no graphs"
        self.kernel = f"{attention}, cuBLAS linear{' with GELU' if fused else ''}, {graphs}"
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pipeline = Pipeline()

    def __call__(self, rows: Sequence[Tokens], task: Task) -> FloatArray:
        order = by_length(rows)
        vectors = self._run([rows[place] for place in order], task, partial(self.encoder, task=task), len(rows))
        answer: FloatArray = np.empty(vectors.shape, dtype=np.float32)
        answer[order] = vectors
        return answer

    def hidden(self, rows: Sequence[Tokens]) -> list[FloatArray]:
        lengths = [len(row) for row in rows]
        matrix = self._run(rows, "hidden", self.encoder.hidden, sum(lengths))
        return np.split(matrix, np.cumsum(lengths)[:-1])

    def on_layer(self, callback: Callable[[bool], None]) -> None:
        self._pipeline.on_device = lambda: callback(True)

    def prepare(self, tokens: int) -> int:
        """Make all that batches of up to `tokens` need, once; the largest that fits: `tokens`, or the half, a quarter, … of it.

        Raises UnsupportedModel where not even one text fits.
        """
        try:
            tokens = self._largest_batch(tokens)
            self._plan_full_batch(tokens)
        except torch.cuda.OutOfMemoryError:
            memory = torch.cuda.get_device_properties(self.device).total_memory >> 20
            raise UnsupportedModel(
                f"{self.device} has {memory} MiB of memory, and too little of it is free for this model; "
                "end what else is on it, take float16 or a smaller model, or set BERTD_DEVICE to cpu"
            ) from None
        return tokens

    def warm_up(self, tokens: int) -> float:
        rows = _texts_of(tokens, min(128, self.encoder.config.max_tokens))
        self(rows, self.encoder.config.task)
        start = time.perf_counter()
        self(rows, self.encoder.config.task)
        return tokens / (time.perf_counter() - start)

    def _largest_batch(self, tokens: int) -> int:
        """By graphs, which keep their memory, and then as matrices of all tokens besides."""
        length = self.encoder.config.max_tokens
        while True:
            try:
                self._capture_graphs(tokens)
                self.hidden(_texts_of(tokens, length))
            except torch.cuda.OutOfMemoryError:
                if tokens <= length:
                    raise
                tokens //= 2
                if self._graphs is not None:
                    self._graphs.clear()
                torch.cuda.empty_cache()
            else:
                return tokens

    def _capture_graphs(self, tokens: int) -> None:
        """Largest first: the others find room in the memory of that."""
        self._sizes = [size for size in BUCKETS if size <= tokens]
        for size in reversed(self._sizes if self._graphs is not None else ()):
            for length in {min(size, width.longest, self.encoder.config.max_tokens) for width in self._widths}:
                self(_texts_of(size, length), self.encoder.config.task)

    def _plan_full_batch(self, tokens: int) -> None:
        """Let cuDNN make its plan for a full batch of the longest texts, as long documents that are cut or split make them."""
        length = self.encoder.config.max_tokens
        if self._attention is None or tokens < max(length, SMALL_BUCKETS[-1] + 1):  # its plan gains nothing with smaller ones
            return
        self._attention.full = tokens // length, length
        try:
            self(_texts_of(tokens - tokens % length, length), self.encoder.config.task)
        except RuntimeError:  # no such kernel for this device, or no room for what it needs besides
            self._attention.full = None

    def _run(self, rows: Sequence[Tokens], task: str, forward: Forward, wanted: int) -> FloatArray:
        """What a forward makes of the rows: the `wanted` last rows of it, since what fills up a graph comes first."""

        def launch() -> tuple[tuple[Tensor, Tensor], Done]:
            answer = self._launch(rows, task, forward, wanted)
            host = torch.empty(answer.shape, dtype=torch.float32, pin_memory=True)
            self._copies.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._copies):
                host.copy_(answer, non_blocking=True)
                done = torch.cuda.Event(blocking=sum(map(len, rows)) > _BUSY_WAIT)  # type: ignore[no-untyped-call]
                done.record()
            return (host, answer), done  # the answer on the device too: it is kept until it is copied

        with torch.inference_mode(), torch.cuda.stream(torch.cuda.default_stream(self.device)), self._watched():
            host, _ = self._pipeline.run(launch)
        return host.numpy()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Raises DeviceLost in place of an error after which the device computes nothing more for this process."""
        try:
            yield
        except RuntimeError as error:
            try:
                with self._pipeline.turn:
                    torch.cuda.synchronize()
            except RuntimeError:
                raise DeviceLost(f"{self.device} has failed ({error}); a new process is needed") from error
            raise

    def _launch(self, rows: Sequence[Tokens], task: str, forward: Forward, wanted: int) -> Tensor:
        """Queue all of a batch on the device."""
        if self._graphs is not None and (bucket := self._find_bucket(rows, task)) is not None:
            answer = self._graphs(bucket, task, forward, Transfer(pad_to(bucket, rows)))
            return answer[-wanted:].clone()
        batch = pack(rows)
        if self._attention is not None and self._attention.tiles is not None:
            batch = replace(batch, tiles=tiles_of(batch.lengths))
        transfer = Transfer(batch)
        return forward(transfer.batch_in(transfer.data.to(self.device, non_blocking=True)))

    def _find_bucket(self, rows: Sequence[Tokens], task: str) -> Bucket | None:
        """The shape of the graph for a batch. Large ones are for one task only, that of which most batches are."""
        if task != self.encoder.config.task:
            return find_bucket(rows, self._widths, SMALL_BUCKETS)
        assert self._attention is not None
        if self._attention.full == (len(rows), len(rows[0])) and len({len(row) for row in rows}) == 1:
            texts, length = self._attention.full
            return Bucket(texts * length, length, texts)
        return find_bucket(rows, self._widths, self._sizes)
