"""W3C's trace context, and OpenTelemetry's spans where they are switched on. Never a text of a client."""

import contextlib
import re
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, Protocol

from app.record import NO_ROUTE, RequestRecord
from app.settings import Settings, SettingsError, variable

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?")
_EXPORT_SECONDS = 3.0  # that one try may take, and that a stop waits for the last spans


def valid_traceparent(headers: Sequence[str]) -> str | None:
    """The header as it was sent, if it is one (https://www.w3.org/TR/trace-context/#traceparent-header) and came once."""
    found = _TRACEPARENT.fullmatch(headers[0]) if len(headers) == 1 else None
    return found[0] if found and not (found[1] and found[0].startswith("00")) else None


class Tracer(Protocol):
    """Makes a span of a request, and one of each of its stages."""

    def begin(self, record: RequestRecord, tracestate: str) -> Any:
        """A span below the one that the record names, in whose place the record then names the new one."""

    def end(self, record: RequestRecord, span: Any) -> None:
        """Tell the span what is known of the request, and hand it over to be sent."""


@contextlib.contextmanager
def open_tracer(settings: Settings) -> Iterator[Tracer | None]:
    """OpenTelemetry where an endpoint is set; what is left is sent at the end.

    Raises SettingsError where its packages are missing.
    """
    if settings.otlp_endpoint is None:
        yield None
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        name = variable("otlp_endpoint")
        raise SettingsError(
            f"{name} is set and {error.name} is not installed; .venv/bin/pip install -e '.[otel]', or unset it"
        ) from None
    exporter = OTLPSpanExporter(f"{settings.otlp_endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_SECONDS)
    tracer = _Spans(BatchSpanProcessor(exporter))
    try:
        yield tracer
    finally:
        impatience = threading.Timer(_EXPORT_SECONDS, exporter.shutdown)  # ends the waits between two tries
        impatience.start()
        tracer.close()
        impatience.cancel()


class _Spans:
    """Spans of OpenTelemetry's SDK, which itself reads OTEL_* variables: the service's name, sampling, limits."""

    def __init__(self, processor: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        ours = Resource.create({"service.name": "bertd", "service.version": version("bertd")})
        self._provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("bertd")
        self._propagator = TraceContextTextMapPropagator()
        self._api = trace

    def begin(self, record: RequestRecord, tracestate: str) -> Any:
        carrier = {"traceparent": record.traceparent or "", "tracestate": tracestate}
        parent = self._propagator.extract(carrier) if record.traceparent else None
        span = self._tracer.start_span(record.method, parent, self._api.SpanKind.SERVER)
        context = span.get_span_context()
        if context.is_valid:  # as it isn't with OTEL_SDK_DISABLED
            record.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        return span

    def end(self, record: RequestRecord, span: Any) -> None:
        if not span.is_recording() or record.is_probe:  # one that never ends is never sent
            return
        inside = self._api.set_span_in_context(span)

        def moment(seconds: float) -> int:
            return int(span.start_time + (seconds - record.start) * 1e9)

        for stage in record.stages:
            part = self._tracer.start_span(stage.name, inside, start_time=moment(stage.start))
            part.end(moment(stage.start + stage.seconds))
        if record.route != NO_ROUTE:
            span.update_name(f"{record.method} {record.route}")
        span.set_attributes(_attributes(record))
        if record.status >= 500:
            span.set_status(self._api.StatusCode.ERROR)
        span.end(moment(record.start + record.seconds))

    def close(self) -> None:
        self._provider.shutdown()


def _attributes(record: RequestRecord) -> dict[str, str | int]:
    """By OpenTelemetry's semantic conventions, without url.path, in which a client may put anything."""
    attributes: dict[str, str | int] = {
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "http.response.body.size": record.bytes_out,
        "bertd.request_id": record.request_id,
    }
    if record.route != NO_ROUTE:
        attributes["http.route"] = record.route
    if record.error:
        attributes["error.type"] = record.error
    if record.stages:
        attributes |= {"bertd.texts": record.texts, "bertd.tokens": record.tokens, "bertd.truncated": record.truncated}
    return attributes
