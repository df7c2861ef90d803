"""A fit in a process of its own: `python -m app.fitting FD` takes vectors and labels over a socket and answers a head.

The process gives way to the server's others, computes on one thread, so that a sum has one order, and ends when the
other side of its socket is gone.
"""

import asyncio
import contextlib
import os
import socket
import sys
import threading

from app import frames
from app.child import Child
from app.errors import EngineError
from app.frames import Frame, FrameProtocol
from app.lifeline import end_with_parent
from model.finetune import Codes, Fitted, Head, fit
from model.vectors import FloatArray

_COMMAND = (sys.executable, "-m", "app.fitting")
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_NICENESS = 15  # after the engine, too


async def fit_in_process(vectors: FloatArray, codes: Codes, balanced: bool) -> Fitted:
    """`model.finetune.fit`, elsewhere. When the caller is cancelled, the process is killed.

    Raises EngineError when it ends without an answer.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Frame | None] = loop.create_future()

    def settle(frame: Frame | None) -> None:
        if not answer.done():
            answer.set_result(frame)

    child = _start()
    try:
        transport, _ = await loop.create_unix_connection(lambda: FrameProtocol(settle, lambda: settle(None)), sock=child.socket)
        transport.writelines(frames.dump({"balanced": balanced}, [vectors, codes]))
        try:
            frame = await answer
        finally:
            transport.abort()
    finally:
        child.process.kill()
        code = await asyncio.to_thread(child.process.wait)
    if frame is None:
        raise EngineError(f"the fit ended with exit code {code}; see the server's log, or send fewer examples or labels")
    return _fitted(frame)


def _start() -> Child:
    return Child(_COMMAND, {**os.environ, **_ENVIRONMENT})


def _fitted(frame: Frame) -> Fitted:
    weights, bias, *confusion = frame.arrays
    return Fitted(Head(weights, bias), frame.head["folds"], confusion[0] if confusion else None)


def main() -> None:
    """Read one order, answer it, end; or end as soon as nobody waits for the answer."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    end_with_parent(sock)
    os.nice(_NICENESS)
    order = frames.receive(sock)
    if order is None:
        return
    threading.Thread(target=_end_with, args=(sock,), daemon=True).start()
    vectors, codes = order.arrays
    fitted = fit(vectors, codes, order.head["balanced"])
    confusion = [] if fitted.confusion is None else [fitted.confusion]
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the other side is gone: nobody waits
        frames.send(sock, {"folds": fitted.folds}, [fitted.head.weights, fitted.head.bias, *confusion])


def _end_with(sock: socket.socket) -> None:
    """Wait for the other side to go, and go too, whatever is being computed."""
    with contextlib.suppress(ConnectionResetError):
        sock.recv(1)
    os._exit(1)


if __name__ == "__main__":
    main()
