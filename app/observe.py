"""Every request is counted, timed, logged and traced, as a pure ASGI class around all others."""

import logging
import random
import time
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import ServiceError
from app.logs import INPUT_CHARACTERS, log_request
from app.metrics import Metrics
from app.middleware import Refuse
from app.negotiation import header_of
from app.record import NO_ROUTE, RequestRecord, begin_record
from app.traces import Tracer, valid_traceparent

log = logging.getLogger("bertd.request")

_REQUEST_ID_SIZE = 128
_NO_METHOD = "-"  # of what was refused before its head was whole
_UTF8_SIZE = 4  # bytes of a character, at most


class Observe:
    """Outermost: gives the request an id, counts, times, logs and traces it, turns unknown exceptions into a 500 without inner
    text."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, refuse: Refuse, tracer: Tracer | None = None, log_inputs: bool = False
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._refuse = refuse
        self._tracer = tracer
        self._log_inputs = log_inputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        parents = [value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"]
        record = RequestRecord(_request_id(header_of(scope, b"x-request-id")), scope["method"], valid_traceparent(parents))
        span = self._tracer.begin(record, header_of(scope, b"tracestate") or "") if self._tracer else None
        begin_record(record)
        if self._log_inputs:
            receive = _keeping(receive, record)
        try:
            await self._answer(scope, receive, _observed(send, record), record)
        finally:
            record.route = getattr(scope.get("route"), "path", NO_ROUTE)  # the pattern: a client can't add a series
            record.status = record.status or 499
            record.seconds = time.perf_counter() - record.start
            self._metrics.answered(record.route, record.status, record.seconds)
            log_request(record)
            if self._tracer:
                self._tracer.end(record, span)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            log.error("a defect of ours", {"request_id": record.request_id}, exc_info=error)
            if record.status:
                raise ConnectionError("the answer broke off") from None  # the server closes the connection
            internal = ServiceError(f"internal error; the log has more under request id {record.request_id}")
            await self._refuse(internal, scope)(scope, receive, send)


def observed_refusal(metrics: Metrics, refuse: Callable[[ServiceError, Scope], Response]) -> Callable[[ServiceError], Response]:
    """Refusals of what never becomes a request: counted and logged as those of a request without a route."""

    def refuse_observed(error: ServiceError) -> Response:
        record = RequestRecord(_request_id(None), _NO_METHOD)
        begin_record(record)
        response = refuse(error, {"path": ""})
        response.headers["x-request-id"] = record.request_id
        record.status, record.bytes_out = response.status_code, len(response.body)
        record.seconds = time.perf_counter() - record.start
        metrics.answered(record.route, record.status, record.seconds)
        log_request(record)
        return response

    return refuse_observed


def _observed(send: Send, record: RequestRecord) -> Send:
    """A `send` that tells the record what is answered, and the client what the record is found by."""
    added = [(b"x-request-id", record.request_id.encode()), (b"x-content-type-options", b"nosniff")]
    if record.traceparent:
        added.append((b"traceparent", record.traceparent.encode()))

    async def observed_send(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *added]
        else:
            record.bytes_out += len(message.get("body", b""))
        await send(message)

    return observed_send


def _keeping(receive: Receive, record: RequestRecord) -> Receive:
    """A `receive` that keeps the start of the body in the record."""

    async def keeping_receive() -> Message:
        message = await receive()
        room = INPUT_CHARACTERS * _UTF8_SIZE - len(record.body)
        record.body += message.get("body", b"")[:room]
        return message

    return keeping_receive


def _request_id(sent: str | None) -> str:
    """What was sent, where it can stand in a log; else one of our own."""
    if sent and sent.isascii() and sent.isprintable() and len(sent) <= _REQUEST_ID_SIZE:
        return sent
    return f"{random.getrandbits(128):032x}"
