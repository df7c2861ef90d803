"""An engine process without torch: the protocol of app.worker, and a few token ids on which it misbehaves."""

import os
import signal
import socket
import sys
import time

import numpy as np

from app import frames
from app.frames import HIDDEN

DEVICES = 3
CRASH, NOT_A_NUMBER, FAIL, HOLD = 900, 901, 902, 903  # HOLD never says that it comes to its end
HANG, SLOW = 904, 905  # without a word, for ever; with signs of life, for longer than a keeper waits for one
RUBBISH = 906  # an answer without an array

SIGNS = 10  # of life that a SLOW batch gives, one each 50 ms


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[-1]))
    order = frames.receive(sock)
    if "refuse" in sys.argv:
        frames.send(sock, {"failed": "the checkpoint is bad"})
        return
    if "vanish" in sys.argv:
        sys.exit(3)
    found = {"device": "cuda:0", "dtype": "float32"}
    if "no-gpu" in sys.argv:
        found = {"device": "cpu", "dtype": "bfloat16"}
    asked = {name: order.head[name] for name in found if order.head[name] != "auto"}
    facts = {**found, **asked, "devices": DEVICES, "kernel": "fake", "threads": 1, "poolings": ["mean", "cls"]}
    facts["lanes"] = 2 if "two-lanes" in sys.argv else 1
    if "changing" in sys.argv:  # as though the checkpoint were another one each time
        facts["files"] = os.getpid()
    frames.send(sock, {**facts, "max_batch_tokens": order.head["max_batch_tokens"] or 64, "tokens_per_second": 1000.0})
    if "brief" in sys.argv:
        return
    while (batch := frames.receive(sock)) is not None:
        answer(sock, batch)


def answer(sock: socket.socket, batch: frames.Frame) -> None:
    number, task = batch.head["number"], batch.head["task"]
    lengths, ids, _ = batch.arrays
    if CRASH in ids:
        os._exit(1)
    if RUBBISH in ids:
        frames.send(sock, {"number": number, "task": task})
    if FAIL in ids:
        frames.send(sock, {"number": number, "error": "RuntimeError"})
        return
    if HANG in ids:
        signal.pause()
    for _ in range(SIGNS if SLOW in ids else 0):
        time.sleep(0.05)
        frames.send(sock, {"number": number, "ending": False})
    if HOLD not in ids:
        frames.send(sock, {"number": number, "ending": True})
    rows = np.split(ids, np.cumsum(lengths)[:-1])
    if task == HIDDEN:
        arrays = [np.stack([row, row], axis=1).astype(np.float32) for row in rows]
    else:
        arrays = [np.array([vector(row) for row in rows], dtype=np.float32)]
    frames.send(sock, {"number": number, "task": task}, arrays)


def vector(row: np.ndarray) -> list[float]:
    return [float("nan") if NOT_A_NUMBER in row else float(row.sum()), float(len(row))]


if __name__ == "__main__":
    main()
