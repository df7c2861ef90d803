"""What surrounds every request, as pure ASGI classes: observation, plain paths, the body's limit, cancellation on hang-up."""

import asyncio
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLarge, NotFound, ServiceError
from app.metrics import NO_ROUTE, Metrics

log = logging.getLogger("bertd.request")

Refuse = Callable[[ServiceError, Scope], ASGIApp]
"""An error as the answer that the client of a path understands."""

_REQUEST_ID_SIZE = 128
_LINGER_BYTES = 64 * 2**20  # of a refused body that are read and thrown away, so that the client gets to read the refusal
_LINGER_SECONDS = 5.0


class Observe:
    """Outermost: gives the request an id, counts and times it, turns unknown exceptions into a 500 without inner text."""

    def __init__(self, app: ASGIApp, metrics: Metrics, refuse: Refuse) -> None:
        self._app = app
        self._metrics = metrics
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        request_id = _request_id(Headers(scope=scope))
        status = 0

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        except Exception as error:
            log.error("request %s: %s\n%s", request_id, type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            if status:
                raise ConnectionError("the answer broke off") from None  # the server closes the connection
            internal = ServiceError(f"internal error; the log has more under request id {request_id}")
            await self._refuse(internal, scope)(scope, receive, observed_send)
        finally:
            route = getattr(scope.get("route"), "path", NO_ROUTE)  # the pattern: a client can't add a series
            self._metrics.answered(route, status or 499, time.perf_counter() - start)


def _request_id(headers: Headers) -> str:
    sent = headers.get("x-request-id", "")
    return sent if sent.isascii() and sent.isprintable() and 0 < len(sent) <= _REQUEST_ID_SIZE else uuid.uuid4().hex


class PlainPaths:
    """Takes `//embed` and `/embed/` for `/embed`, without a redirect, and what stands before each path for ASGI's root_path."""

    def __init__(self, app: ASGIApp, prefix: str, refuse: Refuse) -> None:
        self._app = app
        self._prefix = prefix
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = re.sub("/{2,}", "/", scope["path"]).removesuffix("/")
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


class BodyLimit:
    """Refuses a body that is too large before it is read whole: by its declared length, else when it passes the limit."""

    def __init__(self, app: ASGIApp, max_bytes: int, refuse: Refuse) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        read = 0

        async def limited_receive() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:
                raise self._too_large()
            return message

        try:
            if int(Headers(scope=scope).get("content-length", 0)) > self._max_bytes:
                raise self._too_large()
            await self._app(scope, limited_receive, send)
        except BodyTooLarge as error:
            await self._refuse(error, scope)(scope, receive, _lingering(send, receive))

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(
            f"the body is larger than {self._max_bytes} bytes; send fewer or shorter texts, or raise BERTD_MAX_BODY_BYTES"
        )


def _lingering(send: Send, receive: Receive) -> Send:
    """A `send` that ends the answer only when the client has stopped sending: closing on it earlier would reset the
    connection, and the client would never see the answer."""

    async def send_then_drain(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)["connection"] = "close"
        if message["type"] == "http.response.body":
            await send({**message, "more_body": True})
            await _drain(receive)
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    return send_then_drain


async def _drain(receive: Receive) -> None:
    drained = 0
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            more = True
            while more and drained < _LINGER_BYTES:
                message = await receive()
                drained += len(message.get("body", b""))
                more = message.get("more_body", False)
    except TimeoutError:
        pass  # a client that neither reads nor stops has had its answer


class CancelOnDisconnect:
    """Cancels the work of a request when its client hangs up: watches `receive` beside the app."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = await _whole_body(receive)
        if body is None:
            return
        unread: list[Message] = [{"type": "http.request", "body": body}]
        work = asyncio.current_task()
        watch = asyncio.ensure_future(_disconnected(receive))
        watch.add_done_callback(lambda watch: work is not None and not watch.cancelled() and work.cancel())

        async def replay() -> Message:
            if unread:
                return unread.pop()
            await asyncio.shield(watch)
            return {"type": "http.disconnect"}

        try:
            await self._app(scope, replay, send)
        except asyncio.CancelledError:
            if not watch.done() or work is None or work.uncancel():
                raise  # somebody else wants this task to end
        finally:
            watch.cancel()


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


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
