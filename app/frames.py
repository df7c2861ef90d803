"""What the API process and an engine say to each other over a socket: a JSON head, then raw arrays. No pickle.

    | head bytes, uint32 | body bytes, uint64 | head | array | array | …

The head carries `arrays`, the dtype and shape of each.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from struct import Struct
from typing import Any

import numpy as np
import orjson

from model.vectors import Array

HIDDEN, SPARSE = "hidden", "sparse"  # the tasks of batches that want a matrix per row; any other gives one row per row
_PREFIX = Struct("<IQ")


@dataclass(frozen=True, slots=True)
class Frame:
    head: dict[str, Any]
    arrays: list[Array]


def dump(head: dict[str, Any], arrays: Sequence[Array] = ()) -> list[bytes | memoryview]:
    """A frame as buffers to be written in order; arrays are not copied."""
    described = orjson.dumps({**head, "arrays": [(array.dtype.str, array.shape) for array in arrays]})
    prefix = _PREFIX.pack(len(described), sum(array.nbytes for array in arrays))
    return [prefix + described, *(np.ascontiguousarray(array).data.cast("B") for array in arrays if array.size)]


def _load(head: bytes | memoryview, body: bytearray) -> Frame:
    described = orjson.loads(head)
    arrays, offset = [], 0
    for dtype, shape in described.pop("arrays"):
        array = np.frombuffer(body, dtype=dtype, count=prod(shape), offset=offset).reshape(shape)
        arrays.append(array)
        offset += array.nbytes
    return Frame(described, arrays)


def receive(sock: socket.socket) -> Frame | None:
    """The next frame, blocking; None when the other side is gone."""
    prefix = _read(sock, _PREFIX.size)
    if prefix is None:
        return None
    head_size, body_size = _PREFIX.unpack(prefix)
    head, body = _read(sock, head_size), _read(sock, body_size)
    return None if head is None or body is None else _load(bytes(head), body)


def _read(sock: socket.socket, size: int) -> bytearray | None:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        count = sock.recv_into(view)
        if not count:
            return None
        view = view[count:]
    return buffer


def send(sock: socket.socket, head: dict[str, Any], arrays: Sequence[Array] = ()) -> None:
    """Write a frame, blocking."""
    for buffer in dump(head, arrays):
        sock.sendall(buffer)


class FrameProtocol(asyncio.BufferedProtocol):
    """Reads frames in the event loop, each straight into the memory that its arrays will be views of."""

    def __init__(self, on_frame: Callable[[Frame], None], on_lost: Callable[[], None]) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._buffer = bytearray(_PREFIX.size)
        self._view = memoryview(self._buffer)
        self._head: bytes | None = None
        self._sizes: tuple[int, int] | None = None

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        self._view = self._view[nbytes:]
        while not self._view:
            self._advance()

    def _advance(self) -> None:
        """The part that was being read is whole: prefix, then head, then body."""
        if self._sizes is None:
            self._sizes = _PREFIX.unpack(self._buffer)
            self._expect(self._sizes[0])
        elif self._head is None:
            self._head = bytes(self._buffer)
            self._expect(self._sizes[1])
        else:
            frame = _load(self._head, self._buffer)
            self._head = self._sizes = None
            self._expect(_PREFIX.size)
            self._on_frame(frame)

    def _expect(self, size: int) -> None:
        self._buffer = bytearray(size)
        self._view = memoryview(self._buffer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()
