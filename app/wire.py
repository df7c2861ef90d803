"""One connection: uvicorn's HTTP protocol, with an end to every wait and a bound on everything that a client can send.

What the parser reads of a request goes to the app, as in uvicorn. What never becomes a request is refused here, in the
shape of every other refusal, and the connection ends.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import httptools
from starlette.responses import Response
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.errors import HeadTooLarge, MalformedRequest, NotReady, RequestTimeout, ServiceError

_HEAD_BYTES = 2**16  # of a request line and headers, with the trailers of its body
_HEADERS = 100
_PIPELINED = 16  # requests that may wait on a connection for the answer to the one before
_QUEUED_BYTES = 2**16  # of such requests; past them reading pauses, and with it the look-out for a client that hangs up
_LINGER_SECONDS = 5.0  # for a client to read its last answer before its connection is cut,
_LINGER_BYTES = 64 * 2**20  # and what it may send meanwhile: the rest of a refused body
_ABOVE_LIMIT_SECONDS = 2.0  # for a client above the limit of connections to ask
ABOVE_LIMIT = 64  # connections that are heard above the limit: probes are answered, others told so; more are cut without a word

_CODING = b"transfer-encoding"
_FRAMING = (b"content-length", _CODING)

Reading = Literal["nothing", "head", "body"]
"""The part of a request that the parser is in."""

Wait = Literal["start", "head", "body", "next", "leave", "linger"]
"""What a connection waits for while no answer is being made: the first byte, the end of a head, the end of a body whose request
was answered before it, another request, the client to take its last answer, the client to read that and close."""


@dataclass
class Wire:
    """What the connections of a server share. Times are in seconds; `probes` are the paths of those who look whether it lives."""

    header_timeout: float
    body_timeout: float
    max_connections: int
    probes: Collection[str]
    refuse: Callable[[ServiceError], Response]
    above_limit: int = 0  # connections that are heard all the same

    def protocol(self) -> type["Connection"]:
        """The class of these connections, for uvicorn to make each of."""

        class Ours(Connection):
            wire = self

        return Ours


@dataclass(slots=True)
class _Outlet:
    """What uvicorn has for a transport where it answers a request: the connection's, but for the way that it closes."""

    write: Callable[[bytes], None]
    is_closing: Callable[[], bool]
    close: Callable[[], None]


class Connection(HttpToolsProtocol):
    """One connection. At any time at most one timer runs for what its client owes."""

    wire: ClassVar[Wire]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._reading: Reading = "nothing"
        self._head_bytes = 0  # that the parser has handed over: of a head, and of the trailers after its body
        self._held_bytes = 0  # that it got since it last handed anything over
        self._queued_bytes = 0  # of the requests that wait for the answer to the one before
        self._discarded = 0
        self._deaf = False  # whatever still comes is thrown away
        self._above_limit = False
        self._running: RequestResponseCycle | None = None  # the request that is being answered, or was last
        self._work: asyncio.Task[None] | None = None  # that answers it
        self._refusal: ServiceError | None = None  # to be sent after the answer to the request that is running
        self._wait: Wait | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None  # runs while the client takes nothing of an answer

    # What the transport calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._outlet = _Outlet(transport.write, transport.is_closing, self._close)
        above_limit = len(self.connections) - self.wire.above_limit >= self.wire.max_connections
        if above_limit and self.wire.above_limit == ABOVE_LIMIT:
            self._deaf = True
            self.transport = transport
            transport.abort()
            return
        self._above_limit = above_limit
        self.wire.above_limit += above_limit
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            self._discarded += 0 if self._busy else len(data)  # what was accepted is answered, whatever else comes
            if self._discarded > _LINGER_BYTES:
                self.transport.abort()
            return
        self._held_bytes += len(data)
        self._feed(data)
        if self._held_bytes > _HEAD_BYTES and not self._deaf:
            self._refuse(_head_too_large())
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._running is not None:  # uvicorn tells the last request of a pipeline only
            self._hang_up(self._running)
        for timer in filter(None, (self._timer, self._unread)):
            timer.cancel()
        self._outlet.close = self.transport.close  # else the two would hold each other until a garbage collection
        self.wire.above_limit -= self._above_limit

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut_unless_taken(math.inf)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    # What the parser calls

    def on_message_begin(self) -> None:
        if self._reading == "nothing":
            super().on_message_begin()
            self._reading = "head"
            self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        if self._reading == "head":
            self._grow(len(url))
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._grow(len(name) + len(value))
        if self._reading != "head":
            return  # a trailer: it would change a request that is being answered
        if len(self.headers) == _HEADERS:
            raise _head_too_large()
        if len(name) == len(_CODING) and name.lower() == _CODING and value.lower() != b"chunked":
            raise MalformedRequest("the request has a transfer coding besides chunked; send it with chunked or none")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._reading != "head":
            return
        if self.parser.get_method() == b"CONNECT" or self.parser.get_http_version() not in ("1.0", "1.1"):
            raise MalformedRequest("the request is not of HTTP/1.1, or wants a proxy; send HTTP/1.1 with a path")
        if len(self.pipeline) == _PIPELINED:
            self.cycle.keep_alive = False  # its answer says that what came after it was not read
            self._deaf = True
            raise MalformedRequest("")  # ends the parsing, and is never sent
        if self._above_limit and httptools.parse_url(self.url).path.decode() not in self.wire.probes:
            limit = self.wire.max_connections
            raise NotReady(f"{limit} connections are open, which is the limit; try again later", retry_after=1)
        super().on_headers_complete()
        self._reading = "body"
        self.cycle.keep_alive &= not self._above_limit
        self.cycle.transport = cast(asyncio.Transport, self._outlet)
        if self.cycle is not self._running:
            self._queue(self._head_bytes)

    def on_body(self, body: bytes) -> None:
        self._held_bytes = 0
        super().on_body(body)
        if self.cycle is not self._running:
            self._queue(len(body))

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():  # else its body is still to come: see _stay
            self._held_bytes = 0
            self._reading = "nothing"
            super().on_message_complete()
            if self.cycle is self._running:
                self.flow.resume_reading()  # a large body may have paused it, and the end of the connection is to be seen

    def _queue(self, size: int) -> None:
        """Hold a part of a request that waits. uvicorn pauses reading for it, and would not see that the client hangs up."""
        self._queued_bytes += size
        if self._queued_bytes <= _QUEUED_BYTES:
            self.flow.resume_reading()
        else:
            self.flow.pause_reading()

    def _grow(self, size: int) -> None:
        self._held_bytes = 0
        self._head_bytes += size
        if self._head_bytes > _HEAD_BYTES:
            raise _head_too_large()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if not self._deaf:
                ours = error.__context__
                self._refuse(ours if isinstance(ours, ServiceError) else _malformed())

    def _stay(self, rest: bytes) -> None:
        """Ignore the wish for another protocol (Java's client has it of HTTP/2), and read on in this one.

        The parser leaves out the body of such a request. Another one reads it, from a head that says how long it is.
        """
        self.parser = _new_parser(self)
        framing = [b"%b: %b\r\n" % header for header in self.headers if header[0] in _FRAMING]
        self._feed(b"".join((b"POST / HTTP/1.1\r\n", *framing, b"\r\n", rest)))

    # What uvicorn calls for a request

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        self._work = None

        async def answer(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
            self._work = asyncio.current_task()
            if cycle.scope["http_version"] == "1.0":
                send = _unchunked(send, cycle)
            try:
                await app(scope, receive, send)
            except asyncio.CancelledError:
                if not cycle.disconnected:
                    raise  # somebody else wants this task to end

        super()._start_asgi_task(cycle, answer)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
                self._queued_bytes *= bool(self.pipeline)
            elif self._refusal is not None:
                self._say(self._refusal)
        self._watch()

    @property
    def owes_answer(self) -> bool:
        """Whether there is an answer that is not made yet, or that the client has not taken whole."""
        return self._busy or self.transport.get_write_buffer_size() > 0

    def answer_last(self) -> None:
        """The answer that is being made, if one is, is the last on this connection."""
        if self._running is not None:
            self._running.keep_alive = False

    def shutdown(self) -> None:
        if self._wait != "linger":  # else it ends soon, and closing it would keep its last answer from the client
            super().shutdown()

    # What ends a connection

    def _close(self) -> None:
        """The last answer is made, or broke off. A client that still sends closes: closing on what it sends would reset the
        connection, and it would never see the answer."""
        if self._busy or not (self._deaf or self._reading != "nothing"):
            self.transport.close()
            return
        self._turn_deaf()
        self.pipeline.clear()
        self._refusal = None
        self.transport.write_eof()

    def _turn_deaf(self) -> None:
        """Throw away whatever still comes. A large body may have paused reading, and the end of the connection is to be seen."""
        self._deaf = True
        self.flow.resume_reading()

    def _hang_up(self, cycle: RequestResponseCycle) -> None:
        """Cancel the work of a request whose client is gone; where it has not begun, what it receives tells it so."""
        if not cycle.response_complete:
            cycle.disconnected = True
            if cycle is self._running and self._work is not None:
                self._work.cancel()
        cycle.message_event.set()

    @property
    def _busy(self) -> bool:
        cycle = self._running
        return cycle is not None and not (cycle.response_complete or cycle.disconnected)

    def _waits_for(self) -> Wait | None:
        if self.transport.is_closing():
            return "leave"
        if self._busy:
            return None  # the client waits for us; time-outs of the body and of the work are the app's
        if self._deaf:
            return "linger"
        if self._reading == "body":
            return "body"
        if self._reading == "head" or self._held_bytes:
            return "head"
        return "next" if self._running else "start"

    def _watch(self) -> None:
        """Have a timer run for what the client owes; it starts when that changes, never with a byte."""
        wait = self._waits_for()
        if wait == self._wait:
            return
        self._wait = wait
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if wait:
            left = self.transport.get_write_buffer_size()
            self._timer = self.loop.call_later(self._patience(wait), self._on_late, left)

    def _patience(self, wait: Wait) -> float:
        if wait in ("start", "head"):
            return min(self.wire.header_timeout, _ABOVE_LIMIT_SECONDS) if self._above_limit else self.wire.header_timeout
        if wait == "next":
            return self.timeout_keep_alive
        if wait == "linger":
            return _ABOVE_LIMIT_SECONDS if self._above_limit else _LINGER_SECONDS
        return self.wire.body_timeout

    def _cut_unless_taken(self, left: float) -> None:
        """Cut off a client that has taken nothing since so many bytes were left; look again later where it has."""
        size = self.transport.get_write_buffer_size()
        if size < left:
            self._unread = self.loop.call_later(self.wire.body_timeout, self._cut_unless_taken, size)
        else:
            self.transport.abort()

    def _on_late(self, left: int) -> None:
        size = self.transport.get_write_buffer_size()
        if self._wait == "head":
            seconds = self._patience("head")
            self._refuse(RequestTimeout(f"the head of the request was not complete after {seconds:g} s; send it at once"))
            self._watch()
        elif not size:
            self.transport.close()
        elif self._wait and size < left:  # it takes its answer, slowly
            self._timer = self.loop.call_later(self._patience(self._wait), self._on_late, size)
        else:  # it would be closed only when the client has taken it all
            self.transport.abort()

    def _refuse(self, error: ServiceError) -> None:
        """End the connection with a refusal, after the answers to the requests before the one that is refused."""
        self._turn_deaf()
        broken = self.cycle if self._reading == "body" else None
        self.pipeline = deque(queued for queued in self.pipeline if queued[0] is not broken)
        if self._busy and self._running is not broken:
            self._refusal = error
        elif broken is not None and broken.response_started:
            self.transport.close()
        else:
            if broken is not None:
                self._hang_up(broken)
            self._say(error)

    def _say(self, error: ServiceError) -> None:
        """Send a refusal as the last thing. The client closes: closing on what it still sends would reset the connection,
        and it would never see the refusal."""
        response = self.wire.refuse(error)
        headers = (*self.server_state.default_headers, *response.raw_headers, (b"connection", b"close"))
        lines = (b"%b: %b\r\n" % header for header in headers)
        self.transport.write(b"".join((STATUS_LINE[response.status_code], *lines, b"\r\n", response.body)))
        self.transport.write_eof()


def _unchunked(send: ASGISendCallable, cycle: RequestResponseCycle) -> ASGISendCallable:
    """A `send` for HTTP/1.0, which knows no chunks: a body without a length ends with the connection."""

    measured = True

    async def send_unchunked(message: ASGISendEvent) -> None:
        nonlocal measured
        if message["type"] == "http.response.start":
            measured = any(name == b"content-length" for name, _ in message.get("headers", ()))
            cycle.chunked_encoding = None if measured else False
        elif message["type"] == "http.response.body" and not measured:
            cycle.expected_content_length = len(message.get("body", b""))  # uvicorn compares the two
        await send(message)

    return send_unchunked


def _new_parser(connection: Connection) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(connection)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)  # the first of several pipelined requests is answered
    return parser


def _malformed() -> MalformedRequest:
    return MalformedRequest("the request is not valid HTTP/1.1; send one that is")


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the head of the request has more than {_HEAD_BYTES} bytes or {_HEADERS} headers; send fewer")
