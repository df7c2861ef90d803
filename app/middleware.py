"""What surrounds every request, as pure ASGI classes: plain paths, the door, the body's limit and time, deadlines."""

import asyncio
import math
import re
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLarge, DeadlineExceeded, InvalidInput, NotFound, NotReady, Overloaded, RequestTimeout, ServiceError
from app.negotiation import header_of
from app.record import PROBES

Refuse = Callable[[ServiceError, Scope], ASGIApp]
"""An error as the answer that the client of a path understands."""

_TIMEOUT_HEADER = b"x-request-timeout"
_LARGEST_BODIES = 32  # that the bodies of all requests at once may come to


class PlainPaths:
    """Takes `//embed` and `/embed/` for `/embed`, without a redirect, and what stands before each path for ASGI's root_path."""

    def __init__(self, app: ASGIApp, prefix: str, refuse: Refuse) -> None:
        self._app = app
        self._prefix = prefix
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if "//" in path:
            path = re.sub("/{2,}", "/", path)
        path = path.removesuffix("/")
        scope["path"] = path if path != self._prefix else f"{path}/"
        if scope["path"].startswith(f"{self._prefix}/") or not self._prefix:
            scope["root_path"] = self._prefix
            await self._app(scope, receive, send)
            return
        error = NotFound(f"the routes of this server stand below {self._prefix}; put that before the path")
        await self._refuse(error, scope)(scope, receive, send)


def path_of(scope: Scope) -> str:
    """The path of a request as the routes have it: without the prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class Door:
    """Refuses what would be refused anyway, before it costs anything; probes always pass.

    Once the server stops it lets nobody in, and those inside are answered. While the queue is full it turns back whatever
    would have to wait in it: `check_room` raises the refusal.
    """

    def __init__(self, app: ASGIApp, closing: asyncio.Event, check_room: Callable[[], None], refuse: Refuse) -> None:
        self._app = app
        self._closing = closing
        self._check_room = check_room
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if path_of(scope) in PROBES:
            await self._app(scope, receive, send)
            return
        if self._closing.is_set():
            error = NotReady("the server is stopping; send the request to another one", retry_after=1)
            await self._refuse(error, scope)(scope, receive, _last(send))
            return
        try:
            if scope["method"] == "POST" and not takes_long(scope):
                self._check_room()
        except (Overloaded, NotReady) as error:
            await self._refuse(error, scope)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body that is too large before it is read whole: by its declared length, else when it passes the limit.

    So it does with any body while those that are here come to as much as a few of the largest: what many clients send at
    once must fit the memory, too. Whoever waits for the body may raise RequestTimeout; that is answered here as well.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, refuse: Refuse) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._held = 0  # bytes of the bodies of all requests
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def limited_receive() -> Message:
            nonlocal read
            message = await receive()
            size = len(message.get("body", b""))
            read += size
            self._held += size
            self._check(read)
            return message

        try:
            self._check(int(header_of(scope, b"content-length") or 0))
            await self._app(scope, limited_receive, send)
        except (BodyTooLarge, Overloaded, RequestTimeout) as error:
            await self._refuse(error, scope)(scope, receive, _last(send))
        finally:
            self._held -= read

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise BodyTooLarge(
                f"the body is larger than {self._max_bytes} bytes; send fewer or shorter texts, or raise BERTD_MAX_BODY_BYTES"
            )
        if size and self._held > _LARGEST_BODIES * self._max_bytes:  # whoever brings nothing, as a probe, adds nothing
            raise Overloaded(f"the requests that are here have {self._held} bytes; try again in 1 s", retry_after=1)


def _last(send: Send) -> Send:
    """A `send` whose answer is the last on its connection: the rest of the body is not worth reading."""

    async def send_last(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["connection"] = "close"
        await send(message)

    return send_last


class WholeBody:
    """Reads the body before the app is called, which gets it as one message.

    Raises RequestTimeout when that takes longer than so many seconds. Does nothing for a client that is gone before its end.
    """

    def __init__(self, app: ASGIApp, body_timeout: float) -> None:
        self._app = app
        self._body_timeout = body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await self._read(receive)
        if body is None:
            return
        unread: list[Message] = [{"type": "http.request", "body": body}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        try:
            async with asyncio.timeout(self._body_timeout):
                return await _whole_body(receive)
        except TimeoutError:
            seconds = f"{self._body_timeout:g} s"
            raise RequestTimeout(f"the body was not complete after {seconds}; send it faster, or less at once") from None


class Deadline:
    """Answers 504 when an answer has not begun in time: after BERTD_REQUEST_TIMEOUT, or sooner where the header
    `x-request-timeout` says so. What the request has waiting is dropped."""

    def __init__(self, app: ASGIApp, seconds: float, refuse: Refuse) -> None:
        self._app = app
        self._seconds = seconds
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            seconds = self._limit(scope)
            async with asyncio.timeout(seconds) as deadline:

                async def send_in_time(message: Message) -> None:
                    if deadline.when() is not None:
                        deadline.reschedule(None)  # what has begun is not cut
                    await send(message)

                await self._app(scope, receive, send_in_time)
        except InvalidInput as error:
            await self._refuse(error, scope)(scope, receive, send)
        except TimeoutError:
            if not deadline.expired():
                raise
            late = DeadlineExceeded(f"no answer within {seconds:g} s; send fewer texts or try again later")
            await self._refuse(late, scope)(scope, receive, send)

    def _limit(self, scope: Scope) -> float | None:
        """Seconds that the request may take; a client can't ask for more than there are for everybody."""
        most = None if takes_long(scope) else self._seconds
        asked = header_of(scope, _TIMEOUT_HEADER)
        if asked is None:
            return most
        try:
            seconds = float(asked)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < math.inf:
            raise InvalidInput(f"{_TIMEOUT_HEADER.decode()} holds no number of seconds above 0; wanted one, such as 2.5")
        return seconds if most is None else min(seconds, most)


def takes_long(scope: Scope) -> bool:
    """Whether a request is for work that has no deadline of its own: a fit, a reload."""
    return scope["method"] == "PUT" or path_of(scope).startswith("/admin/")


async def _whole_body(receive: Receive) -> bytes | None:
    """The body of a request; None when the client is gone before its end."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)
