"""Requests that take longer than they may: 504, and what they have waiting never reaches the encoder."""

import pytest

pytestmark = pytest.mark.system

LIST = ["word " * 200] * 180


def test_a_client_names_its_own_deadline_and_its_rows_are_dropped(server):
    before = server.metric("bertd_batch_rows_sum")
    late = server.client.post("/embed", json={"inputs": LIST}, headers={"x-request-timeout": "0.3"})
    assert late.status_code == 504
    assert late.json() == {"error": "no answer within 0.3 s; send fewer texts or try again later", "error_type": "Timeout"}
    assert server.metric("bertd_queue_rows") == 0
    assert server.post("/embed", inputs="after it").status_code == 200
    assert server.metric("bertd_batch_rows_sum") - before < len(LIST)


def test_the_deadline_speaks_the_dialect_of_the_route(server):
    late = server.client.post("/v1/embeddings", json={"input": LIST}, headers={"x-request-timeout": "0.2"})
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
