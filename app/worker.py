"""The engine process: `python -m app.worker FD` holds a Runner and answers batches that come over a socket.

It has one or more lanes, each a thread that runs one batch after the other. Lanes share nothing but the runner, so that
one that has lost its core to another process holds nobody up. A GPU has one lane, and a second thread that hands the next
batch over while the first waits for the device.
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from app import frames
from app.frames import HIDDEN, SPARSE, Frame
from app.lifeline import end_with_parent
from app.memory import pass_over_what_stays
from model.config import checkpoint_files
from model.errors import DeviceLost, ModelError
from model.hub import stamps
from model.lean import import_torch
from model.tokens import Tokens, split_rows
from model.vectors import FloatArray, nonzero

_BEAT_SECONDS = 0.25  # between two signs of life of a batch
_BRIEF = 64  # tokens of a batch that is done before another lane or process would be of use
_NICENESS = 5  # the API process is to be heard at once: it has little to do, and a batch takes as long as a hundred refusals


def main() -> None:
    """Load, say so, answer batches until the other side is gone."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    end_with_parent(sock)
    os.nice(_NICENESS)
    import_torch()  # while the other side still finds out what is to be served
    import model.runner  # noqa: F401

    order = frames.receive(sock)
    if order is None:
        return
    try:
        runner, facts = _load(order.head)
    except (ModelError, MemoryError, OSError) as error:
        frames.send(sock, {"failed": str(error) or "out of memory while the checkpoint was loaded"})
        return
    pass_over_what_stays()
    frames.send(sock, facts)
    lanes = _Lanes(sock, runner, facts["threads"], facts["lanes"])
    runner.on_layer(lanes.on_layer)
    for _ in range(1, facts["lanes"] + runner.ahead):
        threading.Thread(target=lanes.run).start()
    lanes.run()


class _Lanes:
    """Threads that take batches from one socket; `run` is what each of them does."""

    def __init__(self, sock: socket.socket, runner: Any, threads: int, lanes: int) -> None:
        from model.runner import use_threads

        self._sock = sock
        self._runner = runner
        self._use_threads = use_threads
        self._threads = threads
        self._share = max(1, threads // lanes)
        self._reading = threading.Lock()  # a frame is read whole by one lane
        self._writing = threading.Lock()  # and written whole
        self._current = threading.local()

    def run(self) -> None:
        """Answer batches until the other side is gone."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody waits for answers
            while (batch := self._next()) is not None:
                self._answer(batch)

    def on_layer(self, last: bool) -> None:
        """Tell the keeper that the lane's batch comes to its end, or now and then that it is alive."""
        now, ending = time.monotonic(), last and not self._current.brief
        if ending or now - self._current.told > _BEAT_SECONDS:
            self._current.told = now
            self._send({"number": self._current.number, "ending": ending})

    def _next(self) -> Frame | None:
        """The next batch, once the brief ones before it have run: to wake another lane meanwhile, or the other side, would only
        take their cores away."""
        with self._reading:
            while (batch := frames.receive(self._sock)) is not None and _is_brief(batch):
                self._answer(batch, brief=True)
            return batch

    def _send(self, head: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        with self._writing:
            frames.send(self._sock, head, arrays)

    def _answer(self, batch: Frame, brief: bool = False) -> None:
        number, task = batch.head["number"], batch.head["task"]
        self._current.number, self._current.told, self._current.brief = number, time.monotonic(), brief
        self._use_threads(self._threads if batch.head["alone"] else self._share)
        try:
            arrays = _run(self._runner, task, split_rows(*batch.arrays))
        except DeviceLost as error:
            print(f"bertd.engine: {error}", file=sys.stderr, flush=True)
            os._exit(1)  # the other lanes too: the keeper starts another process, and decides about the rows
        except Exception as error:  # whatever a batch does, the engine lives on; the API process decides about its rows
            self._send({"number": number, "error": type(error).__name__})
        else:
            self._send({"number": number, "task": task}, arrays)


def _load(order: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from model.runner import make_runner

    folder = Path(order.pop("folder"))
    files = stamps(checkpoint_files(folder))
    runner, choice = make_runner(folder, **order)
    rate = runner.warm_up(choice.max_batch_tokens)
    return runner, {**choice.as_dict(), "poolings": runner.encoder.poolings, "tokens_per_second": rate, "files": files}


def _run(runner: Any, task: str, rows: list[Tokens]) -> list[FloatArray]:
    if task == HIDDEN:
        matrices: list[FloatArray] = runner.hidden(rows)
        return matrices
    answer: FloatArray = runner(rows, task)
    return nonzero(answer) if task == SPARSE else [answer]


def _is_brief(batch: Frame) -> bool:
    """Whether a batch has all threads, and is done before anything else could be."""
    _, ids, _ = batch.arrays
    return batch.head["alone"] and len(ids) <= _BRIEF


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the other side went while we loaded
        main()
