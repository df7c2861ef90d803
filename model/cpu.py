"""The encoder on a CPU: our own kernels, else packed oneDNN weights or torch's layers; texts of a batch sorted by length."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from model import compiled
from model.attention import attend_sdpa
from model.batch import Batch, by_length, pack
from model.config import BertConfig, Task
from model.encoder import Encoder
from model.errors import UnsupportedModel
from model.linear import (
    CompiledLinear,
    Int8Linear,
    compiled_is_best,
    int8_runs,
    packing_works,
    replace_linears,
    replace_linears_by,
)
from model.tokens import Tokens
from model.vectors import FloatArray

_MOST_LANES = 4  # batches at once: their threads share an interpreter lock
_STEPS = ((64, 8), (256, 32), (float("inf"), 128))  # below so many tokens, a batch's size is a multiple of this


class CpuRunner:
    """Runs an encoder in float32, bfloat16 or int8 on the threads that torch was given.

    On our own kernels, whose results and layouts are the same for any number of threads, several batches may run at once.
    """

    ahead = 0
    BATCH_TOKENS = 1024  # activations of a batch this size stay in the cache; see docs/performance.md

    def __init__(self, encoder: Encoder, dtype: torch.dtype = torch.float32) -> None:
        """With int8 the linear layers run in int8, and all between them in bfloat16 or, without its arithmetic, float32.

        Raises UnsupportedModel for int8 where its kernels do not run.
        """
        self.encoder = encoder
        config = encoder.config.bert
        between = _between(config, dtype)
        instructions = _instructions(between)
        if dtype == torch.int8:
            replace_linears_by(Int8Linear, encoder.bert)  # from the float32 weights
        encoder.bert.to(between)  # what stands on it is small and stays in float32
        self._rounds = False
        ours = dtype == torch.int8 or compiled_is_best(config, dtype)
        self.lanes = _MOST_LANES if ours else 1
        if dtype == torch.int8:
            linear = f"{_instructions(torch.int8)} int8 linear, {str(between).removeprefix('torch.')} between"
        elif ours:
            replace_linears_by(CompiledLinear, encoder.bert)
            linear = f"{instructions} linear"
        elif packing_works(dtype):
            replace_linears(encoder.bert)
            self._rounds = True
            linear = "packed oneDNN linear"
        else:
            linear = "plain linear"
        own = compiled.runs(config, between)
        if own:
            compiled.replace_kernels(encoder.bert)
        else:
            for layer in encoder.bert.layers:
                layer.attention.attend = attend_sdpa
        self.kernel = f"{instructions if own else 'SDPA'} attention, {linear}"

    def __call__(self, rows: Sequence[Tokens], task: Task) -> FloatArray:
        order = by_length(rows)
        vectors = self._run(rows, order, lambda batch: self.encoder(batch, task)).numpy()[: len(rows)]
        answer: FloatArray = np.empty_like(vectors)
        answer[order] = vectors
        return answer

    def hidden(self, rows: Sequence[Tokens]) -> list[FloatArray]:
        order = by_length(rows)
        matrix = self._run(rows, order, self.encoder.hidden).numpy()  # [T, H]
        ends = np.cumsum([len(rows[place]) for place in order])
        answer: list[FloatArray] = [matrix] * len(rows)
        for place, end in zip(order, ends, strict=True):
            answer[place] = matrix[end - len(rows[place]) : end]
        return answer

    def on_layer(self, callback: Callable[[bool], None]) -> None:
        *others, last = self.encoder.bert.layers
        for layer in others:
            layer.attention.qkv.register_forward_pre_hook(lambda *_: callback(False))
        last.attention.qkv.register_forward_pre_hook(lambda *_: callback(True))

    def warm_up(self, tokens: int) -> float:
        length = min(128, self.encoder.config.max_tokens)
        rows = [Tokens.of([0] * length)] * max(1, tokens // length)
        task = self.encoder.config.task
        self(rows[:1], task)  # kernels are generated at first use
        start = time.perf_counter()
        self(rows, task)
        return len(rows) * length / (time.perf_counter() - start)

    def _run(self, rows: Sequence[Tokens], order: np.ndarray, forward: Callable[[Batch], Tensor]) -> Tensor:
        """A forward of the rows in that order; what it gives for a last text, of fillers, is to be left out."""
        ordered = [rows[place] for place in order]
        tokens = sum(map(len, ordered))
        missing = self._round_up(tokens) - tokens
        if missing:
            ordered.append(Tokens.of([0] * missing))
        with torch.inference_mode():
            return forward(pack(ordered))

    def _round_up(self, tokens: int) -> int:
        """The size of the batch that is run: for each size anew, oneDNN makes a primitive of megabytes in a millisecond."""
        if not self._rounds:
            return tokens
        step = next(step for below, step in _STEPS if tokens < below)
        step = min(step, self.encoder.config.bert.max_position_embeddings)
        return -(-tokens // step) * step


def _between(config: BertConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of what flows between linear layers of `dtype`."""
    if dtype != torch.int8:
        return dtype
    for between in (torch.bfloat16, torch.float32):
        if int8_runs(config, between):
            return between
    found = compiled.library(torch.int8)
    needed = f"sizes that are multiples of {found.lanes}" if found else "a processor with AVX2, and the compiled kernels"
    raise UnsupportedModel(f"dtype int8 needs {needed}, which are not here; take float32 or bfloat16")


def _instructions(dtype: torch.dtype) -> str:
    """Those of our kernels for `dtype`."""
    found = compiled.library(dtype)
    return found.instructions if found else ""
