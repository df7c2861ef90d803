"""Traces as a collector gets them from a real server; what is passed on where nobody collects."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from typing import Any

import pytest
from checkpoints import save_checkpoint
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from servers import run_bertd, running_server

from app.traces import valid_traceparent

pytestmark = pytest.mark.system

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE[::-1]}-{PARENT}-00"
STAGES = ["tokenize", "queue", "infer", "render"]
MARKER = "kumquat"


@dataclass
class Collector:
    """What came to POST /v1/traces."""

    url: str
    bodies: list[bytes] = field(default_factory=list)

    @property
    def resources(self) -> list[Any]:
        return [spans for body in self.bodies for spans in ExportTraceServiceRequest.FromString(body).resource_spans]

    @property
    def spans(self) -> list[Span]:
        return [span for resource in self.resources for scope in resource.scope_spans for span in scope.spans]


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing: the tests say what they want to say."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass(frozen=True)
class Traced:
    """A server that has come and gone: its answers by name, its log, and what it sent, at the latest as it stopped."""

    answers: dict[str, Any]
    log: list[dict[str, Any]]
    collector: Collector

    def root(self, name: str) -> Span:
        trace, span = self.answers[name].headers["traceparent"].split("-")[1:3]
        (root,) = [it for it in self.collector.spans if (it.trace_id.hex(), it.span_id.hex()) == (trace, span)]
        return root

    def parts(self, root: Span) -> list[Span]:
        return [span for span in self.collector.spans if span.parent_span_id == root.span_id]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traced")
    settings = {"model": save_checkpoint(folder), "log_inputs": "true"}
    with collecting() as collector:
        with (
            (folder / "log").open("wb") as log,
            running_server(stderr=log.fileno(), otlp_endpoint=collector.url + "/", **settings) as server,
        ):
            post = server.client.post
            body = {"inputs": [MARKER, "abc"]}
            answers = {
                "continued": post("/embed", json=body, headers={"traceparent": SAMPLED, "tracestate": "a=b"}),
                "begun": post("/embed", json=body),
                "invalid": post("/embed", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01-x"}),
                "unsampled": post("/embed", json=body, headers={"traceparent": UNSAMPLED}),
                "refused": post("/embed", json={"inputs": {MARKER: MARKER}}),
                "unknown": post(f"/{MARKER}"),
                "wrong kind": post("/rerank", json={"query": MARKER, "texts": [MARKER]}),
                **{path: server.client.get(path) for path in ("/health", "/ready", "/metrics")},
            }
        yield Traced(answers, [json.loads(line) for line in (folder / "log").read_text().splitlines()], collector)


def attributes_of(item):
    return {pair.key: pair.value.string_value or pair.value.int_value for pair in item.attributes}


def test_a_span_continues_the_trace_of_its_client(traced):
    answer, root = traced.answers["continued"], traced.root("continued")
    assert (root.trace_id.hex(), root.parent_span_id.hex(), root.trace_state) == (TRACE, PARENT, "a=b")
    assert answer.headers["traceparent"] == f"00-{TRACE}-{root.span_id.hex()}-01"
    assert (root.name, root.kind) == ("POST /embed", Span.SPAN_KIND_SERVER)
    assert attributes_of(root) == {
        "http.request.method": "POST",
        "http.route": "/embed",
        "http.response.status_code": 200,
        "http.response.body.size": len(answer.content),
        "bertd.request_id": answer.headers["x-request-id"],
        "bertd.texts": 2,
        "bertd.tokens": int(answer.headers["x-compute-tokens"]),
        "bertd.truncated": 0,
    }


def test_the_stages_are_parts_of_it_one_after_the_other(traced):
    root = traced.root("continued")
    parts = traced.parts(root)
    assert [part.name for part in parts] == STAGES
    times = [time for part in parts for time in (part.start_time_unix_nano, part.end_time_unix_nano)]
    times = [root.start_time_unix_nano, *times, root.end_time_unix_nano]
    assert all(later - earlier > -10_000 for earlier, later in pairwise(times))  # nanoseconds; floats are rounded
    assert parts[2].end_time_unix_nano > parts[2].start_time_unix_nano


def test_a_trace_begins_where_none_was_sent(traced):
    for name in ("begun", "invalid"):
        root = traced.root(name)
        assert root.parent_span_id == b""
        assert root.trace_id.hex() != TRACE


def test_who_does_not_sample_gets_no_span(traced):
    answer = traced.answers["unsampled"].headers["traceparent"]
    assert answer.startswith(f"00-{TRACE[::-1]}-")
    assert answer.endswith("-00")
    assert TRACE[::-1] not in {span.trace_id.hex() for span in traced.collector.spans}


def test_a_refusal_names_its_error(traced):
    refused, unknown, wrong_kind = (traced.root(name) for name in ("refused", "unknown", "wrong kind"))
    assert (refused.name, attributes_of(refused)["error.type"]) == ("POST /embed", "Validation")
    assert (unknown.name, "http.route" in attributes_of(unknown)) == ("POST", False)
    assert (attributes_of(wrong_kind)["http.response.status_code"], wrong_kind.status.code) == (424, Status.STATUS_CODE_UNSET)
    assert not traced.parts(refused)


def test_probes_make_no_spans(traced):
    names = {span.name for span in traced.collector.spans}
    assert names == {"POST /embed", "POST /rerank", "POST", *STAGES}


def test_the_service_is_named(traced):
    assert {attributes_of(resource.resource)["service.name"] for resource in traced.collector.resources} == {"bertd"}


def test_no_text_of_a_client_is_sent_even_where_the_log_has_it(traced):
    assert any(MARKER in line.get("input", "") for line in traced.log)
    assert not [body for body in traced.collector.bodies if MARKER.encode() in body]


def test_the_log_says_that_it_holds_texts_and_names_the_trace(traced):
    assert traced.log[0]["level"] == "warning"
    assert "BERTD_LOG_INPUTS" in traced.log[0]["message"]
    by_id = {line.get("request_id"): line for line in traced.log}
    assert by_id[traced.answers["continued"].headers["x-request-id"]]["trace_id"] == TRACE


def test_a_collector_that_is_not_there_is_no_failure(make_checkpoint):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    with running_server(model=make_checkpoint(), otlp_endpoint=endpoint) as server:
        assert [server.post("/embed", inputs="abc").status_code for _ in range(20)] == [200] * 20


def test_missing_packages_are_one_clear_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['opentelemetry.sdk'] = None")
    settings = {"BERTD_OTLP_ENDPOINT": "http://127.0.0.1:4318", "PYTHONPATH": str(tmp_path)}
    done = run_bertd("serve", "--port", 0, "--model", "/nowhere", **settings)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "BERTD_OTLP_ENDPOINT is set" in line
    assert "pip install -e '.[otel]'" in line


def test_the_packages_are_not_imported_unless_they_are_used():
    used = "('opentelemetry.sdk', 'opentelemetry.exporter')"  # FastAPI itself imports others
    code = f"import sys, app.main, app.cli; print([name for name in sys.modules if name.startswith({used})])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("header", [SAMPLED, UNSAMPLED, f"00-{TRACE}-{PARENT}-ff", f"01-{TRACE}-{PARENT}-01-what-comes-later"])
def test_a_valid_header_is_taken(header):
    assert valid_traceparent([header]) == header


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        [SAMPLED, SAMPLED],
        [SAMPLED + "-"],
        [SAMPLED + "\n"],
        [SAMPLED + " "],
        [SAMPLED.upper()],
        [f"ff-{TRACE}-{PARENT}-01"],
        [f"00-{'0' * 32}-{PARENT}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE[1:]}-{PARENT}-01"],
        [f"00-{TRACE}-{PARENT}"],
        [f"01-{TRACE}-{PARENT}-01what"],
        [f"01-{TRACE}-{PARENT}-01-two words"],
        [f"01-{TRACE}-{PARENT}-01-\xe9"],
    ],
)
def test_an_invalid_header_is_ignored(headers):
    assert valid_traceparent(headers) is None
