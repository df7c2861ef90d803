"""The listener and how it stops: what is new is refused, what was accepted is answered."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType
from typing import cast

import uvicorn

from app.child import ENDING
from app.memory import give_back
from app.serving import Serving
from app.wire import ABOVE_LIMIT, Connection

log = logging.getLogger("bertd.server")

_OTHER_FILES = 64 + ABOVE_LIMIT  # descriptors that are no client's: engines, files, libraries
_GIVE_BACK_SECONDS = 10.0  # at least, between two times that what requests have left free is given back
_LAST_SECONDS = 1.0  # for requests that were cut off to give back what they hold


class Server(uvicorn.Server):
    """uvicorn's, but after a signal the port stays open, and new requests are refused, until the accepted ones are answered.

    A second signal, or the end of the grace period, cuts everything off. No signal is raised again afterwards, as uvicorn
    would do: the exit code tells. SIGHUP asks for a reload.
    """

    def __init__(self, config: uvicorn.Config, serving: Serving, grace: float, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self.cut_off = 0  # requests that were accepted and not answered
        self._serving = serving
        self._reloads: set[asyncio.Task[None]] = set()
        self._forced = asyncio.Event()
        self._grace = grace
        self._on_listening = on_listening
        self._loop = asyncio.get_running_loop()
        self._given_back = (0, 0.0)  # after so many requests, and when

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not os.isatty(0):  # on a terminal it says that the terminal is gone, and ends the server
            self._loop.add_signal_handler(signal.SIGHUP, self._on_hangup)
        self._on_listening()

    async def on_tick(self, counter: int) -> bool:
        self._give_back_at_rest()
        return await super().on_tick(counter)

    def _give_back_at_rest(self) -> None:
        """Give back memory, now and then, when no request is here that would wait for it."""
        requests, when = self._given_back
        answered, now = self.server_state.total_requests, self._loop.time()
        if answered > requests and now > when + _GIVE_BACK_SECONDS and not self.server_state.tasks:
            give_back()
            self._given_back = answered, now

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in ENDING:
            self._loop.remove_signal_handler(number)  # that of the start
            signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the process about to end
            self._loop.call_soon_threadsafe(self._on_signal)

    def _on_signal(self) -> None:
        if self._serving.closing.is_set():
            self._forced.set()
        self._close()

    def _close(self) -> None:
        """Let nothing new in. uvicorn's main loop comes to `shutdown` within a tenth of a second."""
        self._serving.close()
        self.should_exit = True
        for connection in self._connections():
            connection.answer_last()

    def _on_hangup(self) -> None:
        reload = self._loop.create_task(self._serving.reload_or_log())
        self._reloads.add(reload)
        reload.add_done_callback(self._reloads.discard)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._close()
        drained = asyncio.ensure_future(self._drain(sockets))
        forced = asyncio.ensure_future(self._forced.wait())
        await asyncio.wait((drained, forced), timeout=self._grace, return_when=asyncio.FIRST_COMPLETED)
        forced.cancel()
        if not drained.done():
            drained.cancel()
            await self._cut_off()

    async def _drain(self, sockets: list[socket.socket] | None) -> None:
        """Answer what is inside, then close the port and every connection."""
        if accepted := set(self.server_state.tasks):
            await asyncio.wait(accepted)
        await super().shutdown(sockets)

    async def _cut_off(self) -> None:
        self.cut_off = sum(connection.owes_answer for connection in self._connections())
        for server in self.servers:
            server.close()
        for connection in self._connections():
            connection.transport.abort()  # each task ends as when its client hangs up
        if tasks := set(self.server_state.tasks):
            await asyncio.wait(tasks, timeout=_LAST_SECONDS)

    def _connections(self) -> list[Connection]:
        return cast(list[Connection], list(self.server_state.connections))


def connection_limit(wanted: int) -> int:
    """As many connections as are wanted, or as the process may have descriptors for. Raises its soft limit if need be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    needed = wanted + _OTHER_FILES
    if soft < needed:
        with contextlib.suppress(OSError, ValueError):  # some systems allow less than they tell
            raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    limit = min(wanted, max(1, soft - _OTHER_FILES))
    if limit < wanted:
        log.warning("%d connections at most, not %d: the process may have %d descriptors; see ulimit -n", limit, wanted, soft)
    return limit
