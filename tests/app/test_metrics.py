"""What the metrics show before the first request, and what requests do to them."""

import os
import re
import signal
import time

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain
from servers import running_server

from app import errors
from app.engine import State
from app.metrics import STAGES
from app.record import NO_ROUTE

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def fresh(make_checkpoint):
    """A server that nobody has asked anything yet, and its first metrics."""
    with running_server(model=make_checkpoint()) as server:
        yield server, samples(server)


def samples(server):
    """Every sample: (name, labels) -> value."""
    text = server.client.get("/metrics").text
    return {(s.name, *sorted(s.labels.items())): s.value for family in plain(text) for s in family.samples}


def labels(found, name, label):
    return {dict(labels)[label] for series, *labels in found if series == name}


def test_all_is_there_from_the_first_scrape(fresh):
    server, first = fresh
    words = {kind.word for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServiceError)}
    paths = server.client.get("/openapi.json").json()["paths"]
    assert labels(first, "bertd_refused_total", "reason") == words
    assert labels(first, "bertd_stage_seconds_count", "stage") == set(STAGES)
    assert labels(first, "bertd_engine_state", "state") == {*State}
    routes = {path.replace(":path", "") for path in labels(first, "bertd_requests_total", "route")}
    assert {*paths, NO_ROUTE} <= routes
    assert labels(first, "bertd_request_seconds_count", "route") == labels(first, "bertd_requests_total", "route")
    assert {state: first["bertd_engine_state", ("state", state)] for state in State} == {
        **dict.fromkeys(State, 0),
        State.READY: 1,
    }
    assert first[("bertd_max_queue_tokens",)] > 0
    assert first["bertd_engine_resident_memory_bytes", ("engine", "0")] > 2**20
    assert first[("process_resident_memory_bytes",)] > 2**20
    counts = {name: value for (name, *_), value in first.items() if re.search(r"^bertd_(?!engine_cpu).*_(total|count)$", name)}
    assert set(counts.values()) == {0}


def test_a_first_burst_of_failures_has_a_rate(fresh):
    """Of each route that works, and of what is refused before its route is known; the series stay few."""
    server, first = fresh
    paths = server.client.get("/openapi.json").json()["paths"]
    working = {path for path, methods in paths.items() if {"post", "put"} & methods.keys()} | {NO_ROUTE}
    for status in ("429", "500", "503", "504"):
        found = {dict(labels)["route"] for name, *labels in first if labels[1:] == [("status", status)]}
        assert working <= found
        assert found.isdisjoint({"/info", "/health", "/v1/models", "/classifiers"})
    assert sum(name == "bertd_requests_total" for name, *_ in first) < 150
    assert len(first) < 1200


def test_a_request_that_has_no_route_is_counted_as_refused(fresh):
    server, _ = fresh

    def refused():
        return samples(server)["bertd_refused_total", ("reason", "NotFound")]

    before = refused()
    assert server.client.get("/nowhere").status_code == 404
    assert server.client.get("/embed").status_code == 405
    assert refused() == before + 2


def test_requests_add_no_series_but_those_of_a_status(fresh):
    server, first = fresh
    server.post("/embed", inputs=["abc", "de"])
    server.client.get("/nowhere/whatever?at=all", headers={"x-request-id": "mine"})
    server.client.request("BREW", "/embed")
    for name in ("one", "another"):
        server.client.put(f"/classifiers/{name}", content=b"{}")
    after = samples(server)
    new = {(name, *labels) for name, *labels in after.keys() - first.keys()}
    assert {name for name, *_ in new} == {"bertd_requests_total"}
    assert {dict(labels)["status"] for _, *labels in new} <= {"400", "404", "405", "422"}  # 400: a method that HTTP does not know
    embed = ("route", "/embed")
    assert after["bertd_requests_total", embed, ("status", "200")] == 1
    assert after["bertd_request_seconds_count", embed] >= 1
    assert after[("bertd_texts_total",)] == 2
    assert all(after["bertd_stage_seconds_count", ("stage", stage)] >= 1 for stage in STAGES)


def test_openmetrics_for_those_who_ask(fresh):
    server, _ = fresh
    answer = server.client.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert "bertd_texts" in {family.name for family in openmetrics(answer.text)}
    assert server.client.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")


def test_an_engine_that_starts_again_is_seen(fresh):
    """The last of this file: the engine's process is another one afterwards."""
    server, _ = fresh
    (engine,) = server.children()
    os.kill(engine, signal.SIGKILL)
    seen = set()
    while "1 restart" not in seen:
        now = samples(server)
        seen |= {state for state in State if now["bertd_engine_state", ("state", state)]}
        seen.add(f"{now[('bertd_engine_restarts_total',)]:.0f} restart")
        time.sleep(0.01)
    assert seen >= {State.STARTING, "0 restart"}
    assert samples(server)["bertd_engine_state", ("state", "ready")] == 1
    assert samples(server)["bertd_engine_resident_memory_bytes", ("engine", "0")] > 2**20
