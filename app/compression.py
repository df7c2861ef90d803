"""Content-Encoding, as a pure ASGI class: gzip or zstd, only where a request asks for it."""

import asyncio
import zlib
from collections.abc import Callable
from typing import Protocol

import zstandard
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.negotiation import Coding, content_coding, header_of

_LEAST = 1024  # bytes that are worth it
_SMALL = 2**14  # bytes that are compressed in the event loop: 0.3 ms
_GZIP_LEVEL, _GZIP = 1, 31  # digits of floats hardly shrink further at higher levels; wbits that mean gzip


class Compressor(Protocol):
    """What zlib and zstandard have in common; both release the interpreter lock."""

    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


_COMPRESSORS: dict[Coding, Callable[[], Compressor]] = {
    "gzip": lambda: zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP),
    "zstd": lambda: zstandard.ZstdCompressor(level=1).compressobj(),
}


class Compress:
    """Compresses answers in the coding that their request asks for; block by block, large ones in threads."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        coding = content_coding(header_of(scope, b"accept-encoding") or "")
        await self._app(scope, receive, _compressing(send, coding) if coding else send)


def _compressing(send: Send, coding: Coding) -> Send:
    start: Message = {}
    compressor: Compressor | None = None

    async def compressed_send(message: Message) -> None:
        nonlocal start, compressor
        if message["type"] == "http.response.start":
            start = message
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if start:
            if more or len(body) >= _LEAST:
                compressor = _COMPRESSORS[coding]()
                _declare(start, coding)
            await send(start)
            start = {}
        if compressor:
            message = {**message, "body": await _compress(compressor, body, last=not more)}
        await send(message)

    return compressed_send


def _declare(start: Message, coding: Coding) -> None:
    headers = MutableHeaders(scope=start)
    headers["content-encoding"] = coding
    headers.add_vary_header("accept-encoding")
    del headers["content-length"]


async def _compress(compressor: Compressor, body: bytes, last: bool) -> bytes:
    if len(body) > _SMALL:
        packed = await asyncio.to_thread(compressor.compress, body)
    else:
        packed = compressor.compress(body)
    return packed + compressor.flush() if last else packed
