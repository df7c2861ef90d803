"""A child process of ours, which is spoken to over a socket pair.

Light to import: the engine starts before anything else is loaded.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ENDING = signal.SIGINT, signal.SIGTERM
"""What ends the API process, in order. Terminals and supervisors send it to a whole group."""

ENGINE = (sys.executable, "-m", "app.worker")
# What torch's libraries read when they are loaded; the user's own values win. See docs/performance.md.
_ENGINE_ENVIRONMENT = {
    # Threads spin at a barrier for a short time before they sleep. By default they spin far longer, and when anything
    # else runs on the machine a thread then burns its core waiting for one that has none: 25 times the latency.
    "GOMP_SPINCOUNT": "30000",
    # oneDNN makes a primitive for each number of rows, of megabytes each, and keeps the last 1,024.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
    # glibc keeps what a batch gave back for the next one. By default it gives large blocks to the system and takes them
    # anew, a page at a time: a tenth of the time of a lone text, and memory that rises and falls by 80 MiB.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**29),
}


class Child:
    """A process that is given the descriptor of its end of the pair as its last argument. As a context manager, it is killed at
    the end if it still runs.

    It never hears the signals of `ENDING`: the API process decides when it stops.

    process  the process, for who owns it to wait for
    socket   our end of the pair, non-blocking
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.setblocking(False)
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # a process inherits what is blocked
        try:
            with theirs:
                descriptor = theirs.fileno()
                self.process = subprocess.Popen(
                    [*command, str(descriptor)],
                    pass_fds=[descriptor],
                    stdin=subprocess.DEVNULL,
                    env={**environment, "PYTHONPATH": str(Path(__file__).parents[1])},
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()


def start_engine(command: Sequence[str] = ENGINE) -> Child:
    """An engine process, which loads torch and waits to be told what to serve; `app.engine` keeps it."""
    return Child(command, {**_ENGINE_ENVIRONMENT, **os.environ})
