"""The engine process: `python -m app.worker FD` holds a Runner and answers batches that come over a socket, in order."""

import contextlib
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np

from app import frames
from app.engine import HIDDEN, SPARSE
from app.frames import Frame
from model.errors import ModelError
from model.tokens import Tokens
from model.vectors import FloatArray, nonzero


def main() -> None:
    """Load, say so, answer batches until the other side is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the API process decides when to stop
        signal.signal(number, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    order = frames.receive(sock)
    if order is None:
        return
    try:
        runner, facts = _load(order.head)
    except (ModelError, MemoryError) as error:
        frames.send(sock, {"failed": str(error) or "out of memory while the checkpoint was loaded"})
        return
    runner.on_last_layer(lambda: frames.send(sock, {"ending": True}))
    frames.send(sock, facts)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the other side is gone: nobody waits for answers
        while (batch := frames.receive(sock)) is not None:
            _answer(sock, runner, batch)


def _load(order: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from model.runner import make_runner  # torch comes with it

    runner, choice = make_runner(Path(order.pop("folder")), **order)
    rate = runner.warm_up(choice.max_batch_tokens)
    return runner, {**choice.as_dict(), "poolings": runner.encoder.poolings, "tokens_per_second": rate}


def _answer(sock: socket.socket, runner: Any, batch: Frame) -> None:
    number, task = batch.head["number"], batch.head["task"]
    try:
        arrays = _run(runner, task, _rows(*batch.arrays))
    except Exception as error:  # whatever a batch does, the engine lives on; the API process decides about its rows
        frames.send(sock, {"number": number, "error": type(error).__name__})
    else:
        frames.send(sock, {"number": number, "task": task}, arrays)


def _run(runner: Any, task: str, rows: list[Tokens]) -> list[FloatArray]:
    if task == HIDDEN:
        matrices: list[FloatArray] = runner.hidden(rows)
        return matrices
    answer: FloatArray = runner(rows, task)
    return nonzero(answer) if task == SPARSE else [answer]


def _rows(lengths: np.ndarray, ids: np.ndarray, types: np.ndarray) -> list[Tokens]:
    ends = np.cumsum(lengths)
    return [Tokens(ids[end - length : end], types[end - length : end]) for length, end in zip(lengths, ends, strict=True)]


if __name__ == "__main__":
    main()
