"""Requests that take longer than they may: 504, and what they have waiting never reaches the encoder."""

from collections.abc import Iterator

import pytest
from servers import RunningServer, held, running_server

pytestmark = pytest.mark.system

LIST = ["abc"] * 180


@pytest.fixture(scope="module")
def one_by_one(make_checkpoint) -> Iterator[RunningServer]:
    """A server whose engine has one text, of five tokens, at a time, and may stand still for a while."""
    options = {"threads": 1, "max_batch_tokens": 5, "engine_timeout": 60}
    with running_server(model=make_checkpoint(), device="cpu", **options) as server:
        yield server


def test_a_client_names_its_own_deadline_and_its_rows_are_dropped(one_by_one):
    before = one_by_one.metric("bertd_batch_rows_sum")
    with held(one_by_one):
        late = one_by_one.client.post("/embed", json={"inputs": LIST}, headers={"x-request-timeout": "0.3"})
        assert late.status_code == 504
        assert late.json() == {"error": "no answer within 0.3 s; send fewer texts or try again later", "error_type": "Timeout"}
        assert one_by_one.metric("bertd_queue_rows") == 0
    assert one_by_one.post("/embed", inputs="abc").status_code == 200
    assert one_by_one.metric("bertd_batch_rows_sum") - before == 2  # the one that the engine had, and the one after it


def test_the_deadline_speaks_the_dialect_of_the_route(one_by_one):
    with held(one_by_one):
        late = one_by_one.client.post("/v1/embeddings", json={"input": LIST}, headers={"x-request-timeout": "0.2"})
    assert late.status_code == 504
    assert late.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "", "1e999"])
def test_a_deadline_that_is_none_is_refused(server, value):
    response = server.client.post("/embed", json={"inputs": "text"}, headers={"x-request-timeout": value})
    assert response.status_code == 422
    assert "x-request-timeout" in response.json()["error"]


def test_a_deadline_that_is_kept_changes_nothing(server):
    plain = server.post("/embed", inputs="text").json()
    assert server.client.post("/embed", json={"inputs": "text"}, headers={"x-request-timeout": "25.5"}).json() == plain
