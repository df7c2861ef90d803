"""Every Prometheus metric, declared once, made anew for each app."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_POWERS = tuple(float(2**n) for n in range(15))
STAGES = ("tokenize", "queue", "infer", "render")


class Metrics:
    """Counters of one app. Labels take values from closed lists only: no client can add a series."""

    def __init__(self) -> None:
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
        self.batch_rows = Histogram("bertd_batch_rows", "Rows in a batch", buckets=_POWERS, registry=registry)
        self.batch_tokens = Histogram("bertd_batch_tokens", "Tokens in a batch", buckets=_POWERS, registry=registry)
        self.tokens_per_second = Gauge("bertd_tokens_per_second", "Measured rate of the engine", registry=registry)
        self.engine_ready = Gauge("bertd_engine_ready", "Engines that take batches", registry=registry)
        self.engine_restarts = Counter("bertd_engine_restarts", "Engines started anew after a death", registry=registry)
        self.model_info = Gauge(
            "bertd_model_info", "What is served; always 1", ["model", "sha256", "dtype", "device"], registry=registry
        )
        # Looked up once: a lookup of labels costs more than an observation, and every request makes half a dozen.
        self.stages = {stage: self.stage_seconds.labels(stage) for stage in STAGES}
        self._answered: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        children = self._answered.get((route, status))
        if children is None:
            children = self.requests.labels(route, str(status)), self.request_seconds.labels(route)
            self._answered[route, status] = children
        children[0].inc()
        children[1].observe(seconds)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)
