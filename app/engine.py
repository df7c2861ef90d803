"""The keeper of one engine process: start, run, watch, restart, stop."""

import asyncio
import itertools
import logging
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Any

import numpy as np

from app.child import ENGINE, Child, start_engine
from app.errors import EngineError
from app.frames import HIDDEN, SPARSE, Frame, FrameProtocol, dump
from model.cgroup import memory_limit
from model.tokens import Tokens
from model.vectors import FloatArray

log = logging.getLogger("bertd.engine")

_RESTART_DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0)  # seconds before each try; after the last the engine has failed
_START_SECONDS = 600.0  # for a large checkpoint on a slow disk; longer is a hang
_GRACE_SECONDS = 0.5

Results = FloatArray | list[FloatArray]
"""Vectors [N, out], or one matrix [L, H] per row."""


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class EngineOptions:
    """What the process is told: the words of `model.runner.make_runner`."""

    folder: str
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    max_batch_tokens: int = 0
    pooling: str | None = None


class EngineDied(Exception):
    """The process is gone. `running` tells a batch that it was working on from one that waited in the pipe.

    Of two that a GPU has, the first counts as running, though the other may have been the end of both: that shows when
    the rows of the first have gone again.
    """

    def __init__(self, running: bool) -> None:
        super().__init__("the engine process died")
        self.running = running


class BatchFailed(Exception):
    """The process refused a batch and lives on; the message is the kind of error, without a client's text."""


class Engine:
    """One child process that holds a Runner. Lives in the event loop; nothing here blocks it."""

    def __init__(
        self, options: EngineOptions, timeout: float, command: Sequence[str] = ENGINE, early: Child | None = None
    ) -> None:
        """`timeout`: seconds without a word from the process, while a batch is out, after which it is taken for dead.

        `early` is the first process, where one was started beforehand.
        """
        self.state = State.STOPPED
        self.facts: dict[str, Any] = {}
        self.restarts = 0
        self.on_change: Callable[[], None] = lambda: None  # called whenever `room` or `state` may have changed
        self._options = options
        self._timeout = timeout
        self._command = command
        self._early = early
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._hello: asyncio.Future[Frame | None] | None = None
        self._waiting: dict[int, asyncio.Future[Results]] = {}
        self._ending: set[int] = set()  # those of them that have come to their last layer, or onto a GPU
        self._numbers = itertools.count()
        self._restarting: asyncio.Task[None] | None = None
        self._vain_starts = 0  # in a row: processes that did not start, or died without a batch to blame
        self._heard: dict[int, float] = {}  # when each batch that is running last gave a sign of life
        self._watch: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        """The process; None where there is none."""
        return self._process.pid if self._process and self._process.returncode is None else None

    @property
    def lanes(self) -> int:
        """Batches that the process runs at once."""
        return int(self.facts.get("lanes", 1))

    @property
    def busy(self) -> bool:
        """Whether a batch is out."""
        return bool(self._waiting)

    @property
    def room(self) -> int:
        """Batches that can be taken now: one for each lane where none is out, or one that is ending: has come to its last layer,
        or onto a GPU.

        So the next one waits in the pipe when it is needed, and is formed as late, and as large, as it can be.
        """
        return max(0, self.lanes - len(self._waiting) + len(self._ending)) if self.state is State.READY else 0

    async def start(self) -> None:
        """Start the process and wait until it is ready. Raises EngineError that says why it can't be."""
        self.state = State.STARTING
        try:
            await self._launch()
        except EngineError:
            self.state = State.FAILED
            raise

    async def check(self, task: str) -> None:
        """Raises EngineError where the encoder gives what is no number, as with weights that were damaged."""
        try:
            results = await self.run(task, [Tokens.of([0])], alone=True)
        except (EngineDied, BatchFailed) as error:
            raise EngineError(f"the encoder failed on a first text ({error})") from None
        if not all(np.isfinite(row).all() for row in results):
            raise EngineError("the encoder gives values that are not numbers: the weights are damaged, take another checkpoint")

    def run(self, task: str, rows: Sequence[Tokens], alone: bool = False) -> "asyncio.Future[Results]":
        """Hand over a batch; only while there is `room`. The task is one of `model.config.Task`, or "hidden" for matrices.

        A batch that is to be `alone` gets the threads of all lanes.
        The future raises EngineDied when the process goes away first, BatchFailed when it could not do this batch.
        """
        assert self._transport is not None
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._watch_running()
        lengths = np.array([len(row) for row in rows], dtype=np.int32)
        ids = np.concatenate([row.ids for row in rows])
        types = np.concatenate([row.types for row in rows])
        self._transport.writelines(dump({"number": number, "task": task, "alone": alone}, [lengths, ids, types]))
        return answer

    async def stop(self) -> None:
        """End the process. Batches that are out raise EngineDied."""
        self.state = State.STOPPED
        self.on_change()
        if self._restarting is not None:
            self._restarting.cancel()
        if self._watch is not None:
            self._watch.cancel()
        if self._transport is not None:
            self._transport.close()
        await self._reap()

    async def _launch(self) -> None:
        """One try. Raises EngineError, also where the system has no descriptor, process, thread or memory left for it."""
        try:
            await self._reap()
            await self._open()
        except (OSError, RuntimeError, MemoryError) as error:
            raise EngineError(f"the engine process can't be started ({error})") from None

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        self._hello = loop.create_future()
        child, self._early = self._early or start_engine(self._command), None
        self._process = child.process
        transport, _ = await loop.create_unix_connection(
            lambda: FrameProtocol(self._on_frame, lambda: self._on_lost(transport)), sock=child.socket
        )
        self._transport = transport
        if not transport.is_closing():  # it may be gone already
            transport.writelines(dump(asdict(self._options)))
        hello = await self._first_word(transport)
        reason = hello.head.get("failed") if hello else None
        if hello is None or reason or self._transport is not transport:  # the last: it died as it said hello
            code = await self._reap()
            raise EngineError(reason or _ending(code))
        if self.facts and self.facts.get("files") != hello.head.get("files"):
            transport.close()
            raise EngineError("the files of the checkpoint are not those that this server started with; reload or restart it")
        self.facts = hello.head
        # What was found is what later processes are to take: others would give other vectors.
        self._options = replace(self._options, device=self.facts["device"], dtype=self.facts["dtype"])
        self.state = State.READY
        self.on_change()

    async def _first_word(self, transport: asyncio.Transport) -> Frame | None:
        """What the process says when it is ready, or can't be; None when it is gone, or has taken too long and has to go."""
        assert self._hello is not None
        try:
            return await asyncio.wait_for(self._hello, _START_SECONDS)
        except TimeoutError:
            transport.close()
            return None

    def _watch_running(self) -> None:
        """Note which batches are running by now: the lanes take them in order."""
        loop = asyncio.get_running_loop()
        for number in islice(self._waiting, self.lanes):
            self._heard.setdefault(number, loop.time())
        if self._watch is None and self._heard:
            self._watch = loop.call_later(self._timeout, self._on_watch)

    def _on_watch(self) -> None:
        """End the process when a running batch has been silent for too long; else look again when that may be so."""
        self._watch = None
        if self._process is None or not self._heard:
            return
        loop = asyncio.get_running_loop()
        due = min(self._heard.values()) + self._timeout
        if loop.time() < due:
            self._watch = loop.call_at(due, self._on_watch)
            return
        log.error("a batch has given no sign of life for %g s; killing engine process %d", self._timeout, self._process.pid)
        self._process.kill()

    def _on_frame(self, frame: Frame) -> None:
        if self._hello is not None and not self._hello.done():
            self._hello.set_result(frame)
            return
        number = frame.head["number"]
        if "ending" in frame.head:
            self._heard[number] = asyncio.get_running_loop().time()
            if frame.head["ending"]:
                self._ending.add(number)
                self.on_change()
            return
        result = _result(frame)  # first: a frame that holds none ends the connection, and who waits is found there
        self._ending.discard(number)
        self._heard.pop(number, None)
        self._vain_starts = 0
        answer = self._waiting.pop(number, None)
        self._watch_running()
        if answer is not None and not answer.done():
            if isinstance(result, BatchFailed):
                answer.set_exception(result)
            else:
                answer.set_result(result)

    def _on_lost(self, transport: asyncio.BaseTransport) -> None:
        """The socket is closed: answer everyone who waits for this process, and start another unless we are stopping."""
        if transport is not self._transport and self._transport is not None:
            return
        self._transport = None
        if self._hello is not None and not self._hello.done():
            self._hello.set_result(None)
        self._ending.clear()
        self._heard.clear()
        waiting, self._waiting = self._waiting, {}
        for place, answer in enumerate(waiting.values()):  # the lanes take them in order
            if not answer.done():
                answer.set_exception(EngineDied(running=place < self.lanes))
        if self.state is State.READY:
            log.error("engine process died; starting another")
            self.state = State.STARTING
            self._vain_starts += not waiting
            self._restarting = asyncio.get_running_loop().create_task(self._restart())
            self.on_change()

    async def _restart(self) -> None:
        while self._vain_starts < len(_RESTART_DELAYS):
            await asyncio.sleep(_RESTART_DELAYS[self._vain_starts])
            try:
                await self._launch()
            except EngineError as error:
                log.error("engine process did not start: %s", error)
                self._vain_starts += 1
            else:
                self.restarts += 1
                self.on_change()
                return
        self.state = State.FAILED
        self.on_change()

    async def _reap(self) -> int | None:
        """Make sure that the process is gone; its exit code."""
        return await asyncio.to_thread(_end, self._process) if self._process else None


def _result(frame: Frame) -> Results | BatchFailed:
    if "error" in frame.head:
        return BatchFailed(frame.head["error"])
    return frame.arrays if frame.head["task"] in (HIDDEN, SPARSE) else frame.arrays[0]


def _ending(code: int | None) -> str:
    """Why a process has ended that did not say so itself."""
    if code != -signal.SIGKILL:
        return f"the engine process ended with exit code {code} while it started"
    limit = memory_limit()
    room = "the machine has" if limit is None else f"the {limit >> 20} MiB that the container may use"
    return (
        f"the engine process was killed while it started, most likely because it needs more memory than {room}; "
        "allow it more, or serve a smaller model"
    )


def _end(process: subprocess.Popen[bytes]) -> int:
    """Its socket is closed, so the process ends by itself unless a batch holds it; nothing that it holds is worth waiting for."""
    try:
        return process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
