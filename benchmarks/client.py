"""A small HTTP client that can send thousands of requests a second at times of its own choosing, on one core's tenth."""

import asyncio
import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np


@dataclass(frozen=True)
class Result:
    """One answer: when it was due to be asked for and when it came, in seconds of time.perf_counter; its status, 0 for none."""

    due: float
    end: float
    status: int

    @property
    def seconds(self) -> float:
        return self.end - self.due


class Connection(asyncio.Protocol):
    """One connection that carries one request at a time."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._answer: Callable[[int], None] | None = None
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.open = True

    def connection_lost(self, error: Exception | None) -> None:
        self.open = False
        self._end(0)

    def send(self, request: bytes, answer: Callable[[int], None]) -> None:
        """`answer` is called with the status, or 0 when the connection broke off."""
        self._answer = answer
        self._transport.write(request)

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end]).lower()
        start = head.find(b"content-length: ")
        if start < 0:  # a large answer comes in chunks, of which the last is empty
            whole = self._buffer.endswith(b"\r\n0\r\n\r\n")
        else:
            whole = len(self._buffer) >= end + 4 + int(head[start + 16 :].split(b"\r", 1)[0])
        if whole:
            self._buffer.clear()
            self._end(int(head[9:12]))

    def _end(self, status: int) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer(status)


class Client:
    """Sends requests to one URL over as many connections as they need at once."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname, parts.port
        self._head = f"POST {parts.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        self._idle: deque[Connection] = deque()

    async def send(self, body: bytes, due: float) -> Result:
        done = asyncio.get_running_loop().create_future()
        connection = await self._connection()
        connection.send(f"{self._head}{len(body)}\r\n\r\n".encode() + body, lambda status: done.done() or done.set_result(status))
        status = await done
        if connection.open:
            self._idle.append(connection)
        return Result(due, time.perf_counter(), status)

    async def closed_loop(self, bodies: Sequence[bytes], clients: int, seconds: float) -> list[Result]:
        """Clients that send one request after the other."""
        results: list[Result] = []
        end = time.perf_counter() + seconds

        async def run(place: int) -> None:
            while (now := time.perf_counter()) < end:
                results.append(await self.send(bodies[place % len(bodies)], now))
                place += clients

        await asyncio.gather(*map(run, range(clients)))
        return results

    async def open_loop(self, bodies: Sequence[bytes], rate: float, seconds: float) -> list[Result]:
        """Requests at times of a Poisson process, whatever the server does."""
        random = np.random.default_rng(0)
        gc.disable()  # it would stop the clients for a tenth of a second now and then, which would count as the server's
        start = time.perf_counter()
        dues = start + np.cumsum(random.exponential(1 / rate, int(rate * seconds)))
        running = []
        for place, due in enumerate(dues.tolist()):
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            running.append(asyncio.ensure_future(self.send(bodies[place % len(bodies)], due)))
        results = await asyncio.gather(*running)
        gc.enable()
        return results

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        _, connection = await asyncio.get_running_loop().create_connection(Connection, *self._address)
        return connection
