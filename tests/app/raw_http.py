"""HTTP as bytes over sockets of our own: what no client library would send, and when."""

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httptools

SECONDS = 10  # that any answer may take


@dataclass
class Answer:
    """One response."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False


class Reader:
    """Takes bytes, gives the responses in them."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self._parser = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.answers.append(Answer())

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answers[-1].headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self.answers[-1].status = self._parser.get_status_code()
        if self.answers[-1].status == 100:
            self.answers.pop()

    def on_body(self, body: bytes) -> None:
        self.answers[-1].body += body

    def on_message_complete(self) -> None:
        if self.answers:
            self.answers[-1].whole = True


@contextmanager
def promptness() -> Iterator[None]:
    """No client of a test is late by itself: a look of the garbage collector at all objects of a whole suite takes half a
    second, and there are servers here that wait for less."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def connect(server, **options) -> socket.socket:
    return socket.create_connection(server.address, timeout=SECONDS, **options)


def request(path: str, body: bytes = b"", method: str = "POST", headers: str = "") -> bytes:
    """A request with the length of its body; each line of `headers` ends with CRLF."""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read(connection: socket.socket, count: int = 0) -> list[Answer]:
    """So many responses, or with 0 all of them up to the close of the connection."""
    reader = Reader()
    while not count or sum(answer.whole for answer in reader.answers) < count:
        try:
            block = connection.recv(65536)
        except ConnectionResetError:
            break
        if not block:
            break
        reader.feed(block)
    return reader.answers


def exchange(server, *pieces: bytes, count: int = 0) -> list[Answer]:
    """Send pieces over one connection; the responses, as from `read`."""
    with connect(server) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return read(connection, count)


def descriptors(server) -> int:
    """How many the process of the server has open."""
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))
