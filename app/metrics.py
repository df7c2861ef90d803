"""Every Prometheus metric, declared once, made anew for each app."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from app.errors import ServiceError
from app.record import NO_ROUTE

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_POWERS = tuple(float(2**n) for n in range(17))
STAGES = ("tokenize", "queue", "infer", "render")
_FAILED = (429, 500, 503, 504)  # what a burst of may be over within two scrapes, and somebody is to be woken for


class Metrics:
    """Counters of one app. Labels take values from closed lists only: no client can add a series.

    What an alert asks for is there from the first scrape, as 0: a rate over a series that is new begins with its second sample.
    """

    def __init__(self) -> None:
        # The time at which each series was made would be as many series again, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("bertd_requests", "Requests answered", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "bertd_request_seconds", "Time to answer a request", ["route"], buckets=_SECONDS, registry=registry
        )
        self.stage_seconds = Histogram(
            "bertd_stage_seconds", "Time of a request by stage", ["stage"], buckets=_SECONDS, registry=registry
        )
        self.refused = Counter("bertd_refused", "Requests refused, by the error's word", ["reason"], registry=registry)
        self.texts = Counter("bertd_texts", "Texts encoded", registry=registry)
        self.tokens = Counter("bertd_tokens", "Tokens encoded", registry=registry)
        self.truncated = Counter("bertd_truncated_texts", "Texts that were cut", registry=registry)
        self.queue_rows = Gauge("bertd_queue_rows", "Rows that wait", registry=registry)
        self.queue_tokens = Gauge("bertd_queue_tokens", "Tokens that wait", registry=registry)
        self.max_queue_tokens = Gauge("bertd_max_queue_tokens", "Tokens that may wait", registry=registry)
        self.batch_rows = Histogram("bertd_batch_rows", "Rows in a batch", buckets=_POWERS, registry=registry)
        self.batch_tokens = Histogram("bertd_batch_tokens", "Tokens in a batch", buckets=_POWERS, registry=registry)
        self.tokens_per_second = Gauge("bertd_tokens_per_second", "Measured rate of the engine", registry=registry)
        self.engine_state = Gauge("bertd_engine_state", "Engines in each state", ["state"], registry=registry)
        self.engine_restarts = Counter("bertd_engine_restarts", "Engines started anew after a death", registry=registry)
        self.engine_processes = EngineProcesses()
        registry.register(self.engine_processes)
        self.model_info = Gauge(
            "bertd_model_info", "What is served; always 1", ["model", "sha256", "dtype", "device"], registry=registry
        )
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        # Looked up once: a lookup of labels costs more than an observation, and every request makes half a dozen.
        self.stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}
        self._answered: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        for reason in sorted(_words(ServiceError)):
            self.refused.labels(reason)
        self.expect(NO_ROUTE, works=True)  # the door refuses before a route is known

    def expect(self, route: str, works: bool) -> None:
        """Show the series of a route before its first request; one that works may be too much, too slow or fail."""
        for status in (200, *(_FAILED if works else ())):
            self._children(route, status)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        requests, request_seconds = self._children(route, status)
        requests.inc()
        request_seconds.observe(seconds)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """All metrics, and their content type: OpenMetrics where the client's Accept has it, else Prometheus's text format."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _children(self, route: str, status: int) -> tuple[Counter, Histogram]:
        children = self._answered.get((route, status))
        if children is None:
            children = self.requests.labels(route, str(status)), self.request_seconds.labels(route)
            self._answered[route, status] = children
        return children


class EngineProcesses(Collector):
    """What /proc says of the engines' processes, each time it is asked; `pids` gives them, None for one that is not there."""

    def __init__(self) -> None:
        self.pids: Callable[[], Sequence[int | None]] = lambda: ()

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        memory = GaugeMetricFamily("bertd_engine_resident_memory_bytes", "Memory of an engine's process", labels=["engine"])
        cpu = CounterMetricFamily("bertd_engine_cpu_seconds", "CPU time of an engine's process", labels=["engine"])
        for number, pid in enumerate(self.pids()):
            found = {family.name: family.samples[0].value for family in _process(pid)}
            if "process_cpu_seconds" in found:
                memory.add_metric([str(number)], found["process_resident_memory_bytes"])
                cpu.add_metric([str(number)], found["process_cpu_seconds"])
        yield memory
        yield cpu


def _process(pid: int | None) -> Iterable[Metric]:
    """What prometheus_client reads of a process; nothing where it is gone."""
    return ProcessCollector(pid=lambda: str(pid), registry=None).collect()


def _words(kind: type[ServiceError]) -> set[str]:
    """The words of a branch of the tree of errors."""
    return {kind.word}.union(*map(_words, kind.__subclasses__()))
