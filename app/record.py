"""What is told of a request when it ends: its line in the log and its trace. No text of a client, unless it was asked for."""

import time
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

NO_ROUTE = "none"  # of a request that fits no route, or was refused before one was found
PROBES = frozenset(("/health", "/ping", "/ready", "/metrics"))  # what machines ask every few seconds


class Stage(NamedTuple):
    """A part of a request's time: when it began, by `time.perf_counter`, and its seconds."""

    name: str
    start: float
    seconds: float


@dataclass(slots=True)
class RequestRecord:
    """A request, filled in by whoever learns something of it.

    traceparent  W3C's header: as it was sent, or with the id of our own span in it
    error        the word of a refusal
    body         the start of what was sent, where texts may be logged
    """

    request_id: str = ""
    method: str = ""
    traceparent: str | None = None
    route: str = NO_ROUTE  # its pattern: what stands in a path is a client's
    status: int = 0
    bytes_out: int = 0
    error: str | None = None
    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    stages: list[Stage] = field(default_factory=list)
    body: bytes = b""
    start: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0

    @property
    def is_probe(self) -> bool:
        """Whether a machine asks this every few seconds."""
        return self.route in PROBES

    @property
    def trace_id(self) -> str | None:
        return self.traceparent and self.traceparent[3:35]

    def encoded(self, texts: int, tokens: int, truncated: int, stages: Iterable[tuple[str, float]]) -> None:
        """Texts came back from the engine just now, after these stages, one after the other, of so many seconds each."""
        self.texts += texts
        self.tokens += tokens
        self.truncated += truncated
        named = list(stages)
        start = time.perf_counter() - sum(seconds for _, seconds in named)
        for name, seconds in named:
            self.stages.append(Stage(name, start, seconds))
            start += seconds

    def rendered(self, seconds: float) -> None:
        """The last byte of the answer was made just now, after so many seconds of work."""
        self.stages.append(Stage("render", time.perf_counter() - seconds, seconds))


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def begin_record(record: RequestRecord) -> None:
    """From here on it is the record of this task, and of those that it starts."""
    _current.set(record)


def current_record() -> RequestRecord:
    """The record of the request that is being answered; one that nobody reads where there is none, as on the command line."""
    return _current.get() or RequestRecord()
