"""Bad input over HTTP: a clear status in TEI's shape, and the server goes on as before."""

import json
import socket

import pytest
from pydantic import ValidationError

from app.api import openai, rerank, tei_bodies, vllm

pytestmark = pytest.mark.system

TEXT = "the same vector as before"
DEEP = "[" * 100_000

REFUSED = [
    ("/embed", "", 422, "Validation", "not JSON"),
    ("/embed", "{", 422, "Validation", "not JSON"),
    ("/embed", "hello", 422, "Validation", "not JSON"),
    ("/embed", DEEP, 422, "Validation", "not JSON"),
    ("/embed", b'{"inputs": "\xff\xfe"}', 422, "Validation", "not JSON"),
    ("/embed", b'{"inputs": "\xed\xa0\x80"}', 422, "Validation", "not JSON"),
    ("/embed", '{"inputs": "\\ud800"}', 422, "Validation", "not JSON"),
    ("/embed", "[]", 422, "Validation", "body"),
    ("/embed", "null", 422, "Validation", "body"),
    ("/embed", {}, 422, "Validation", "inputs: Field required"),
    ("/embed", {"inputs": None}, 422, "Validation", "inputs"),
    ("/embed", {"inputs": 3}, 422, "Validation", "inputs"),
    ("/embed", {"inputs": [1.5]}, 422, "Validation", "inputs"),
    ("/embed", {"inputs": [True]}, 422, "Validation", "inputs"),
    ("/embed", {"inputs": {"a": 1}}, 422, "Validation", "inputs"),
    ("/embed", {"inputs": ["a", None]}, 422, "Validation", "inputs"),
    ("/embed", '{"inputs": NaN}', 422, "Validation", ""),
    ("/embed", '{"inputs": "a", "dimensions": 1e400}', 422, "Validation", ""),
    ("/embed", {"inputs": ""}, 400, "Empty", "empty"),
    ("/embed", {"inputs": []}, 400, "Empty", "empty"),
    ("/embed", {"inputs": ["a", ""]}, 400, "Empty", "empty"),
    ("/embed", {"inputs": [["a"][:0]]}, 400, "Empty", "empty"),
    ("/embed", {"inputs": ["a"] * 3001}, 422, "Validation", "at most 3000"),
    ("/embed", {"inputs": [1, 30522]}, 422, "Validation", "30522 is outside the vocabulary"),
    ("/embed", {"inputs": [-1]}, 422, "Validation", "outside the vocabulary"),
    ("/embed", {"inputs": [10**30]}, 422, "Validation", ""),
    ("/embed", {"inputs": "a", "dimensions": 0}, 422, "Validation", "wanted 1 to 384"),
    ("/embed", {"inputs": "a", "dimensions": 385}, 422, "Validation", "wanted 1 to 384"),
    ("/embed", {"inputs": "a", "dimensions": -1}, 422, "Validation", "wanted 1 to 384"),
    ("/embed", {"inputs": "a", "dimensions": "3"}, 422, "Validation", "dimensions"),
    ("/embed", {"inputs": "a", "normalize": "yes"}, 422, "Validation", "normalize"),
    ("/embed", {"inputs": "a", "pooling": "sum"}, 422, "Validation", "pooling"),
    ("/embed", {"inputs": "a", "truncation_direction": "up"}, 422, "Validation", "truncation_direction"),
    ("/embed", {"inputs": "a", "prompt_name": "query"}, 422, "Validation", "Available prompts: []"),
    ("/embed_all", {"inputs": ""}, 400, "Empty", "empty"),
    ("/embed_all", {"inputs": [5, 99999]}, 422, "Validation", "vocabulary"),
    ("/similarity", {"inputs": "a"}, 422, "Validation", "inputs"),
    ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}, 400, "Empty", "empty"),
    ("/similarity", {"inputs": {"a": [], "b": ["x"]}}, 400, "Empty", "empty"),
    ("/similarity", {"inputs": {"a": ["x"], "b": [""]}}, 400, "Empty", "empty"),
    ("/similarity", {"inputs": {"a": ["x"], "b": ["y"]}, "parameters": {"metric": "l1"}}, 422, "Validation", "metric"),
    ("/tokenize", {"inputs": []}, 400, "Empty", "empty"),
    ("/tokenize", {"inputs": 1}, 422, "Validation", "inputs"),
    ("/decode", {"ids": [99999]}, 422, "Validation", "vocabulary"),
    ("/decode", {"ids": []}, 400, "Empty", "empty"),
    ("/decode", {"ids": "abc"}, 422, "Validation", "ids"),
    ("/nowhere", {}, 404, "NotFound", "see /docs"),
]


def content_of(body):
    return body if isinstance(body, str | bytes) else json.dumps(body)


@pytest.mark.parametrize(("path", "body", "status", "word", "message"), REFUSED)
def test_bad_input_is_refused_by_name(server, path, body, status, word, message):
    response = server.client.post(path, content=content_of(body), headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error", "error_type"}
    assert response.json()["error_type"] == word
    assert message in response.json()["error"]
    assert len(response.content) < 1000


@pytest.mark.parametrize("field", ["inputs", "input", "texts", "documents", "text_2"])
def test_of_a_list_of_bad_items_only_the_first_is_looked_at(field):
    """A million of them would take the event loop seconds and the process gigabytes."""
    models = {
        "inputs": tei_bodies.EmbedRequest,
        "input": openai.EmbeddingRequest,
        "texts": tei_bodies.RerankRequest,
        "documents": rerank.DocumentsRequest,
        "text_2": vllm.ScoreRequest,
    }
    with pytest.raises(ValidationError) as refused:
        models[field].model_validate({field: [None] * 1000, "query": "a", "text_1": "a"})
    assert refused.value.error_count() < 5


def test_the_server_answers_as_before_after_all_of_them(server):
    before = server.post("/embed", inputs=TEXT).json()
    for path, body, *_ in REFUSED:
        server.client.post(path, content=content_of(body))
    assert server.post("/embed", inputs=TEXT).json() == before


def test_a_wrong_method_is_refused_in_the_same_shape(server):
    response = server.client.get("/embed")
    assert response.status_code == 405
    assert set(response.json()) == {"error", "error_type"}


@pytest.mark.parametrize("null", ["truncate", "truncation_direction", "prompt_name", "normalize", "dimensions", "pooling"])
def test_null_is_the_same_as_absent(server, null):
    assert server.post("/embed", inputs=TEXT, **{null: None}).json() == server.post("/embed", inputs=TEXT).json()


def test_unknown_fields_and_missing_content_types_are_no_reason_to_refuse(server):
    assert server.post("/embed", inputs=TEXT, encoding="x", user="me").status_code == 200
    assert server.client.post("/embed", content=json.dumps({"inputs": TEXT})).status_code == 200


def raw(server, *pieces):
    """Send bytes over a socket of our own; the whole answer, up to the close of the connection."""
    with socket.create_connection(server.address, timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        while block := connection.recv(65536):
            answer += block
    return answer


def test_a_body_that_is_declared_too_large_is_refused_before_it_is_sent(server):
    head = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 200001\r\n\r\n"
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(head)
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"larger than 200000 bytes" in answer


def test_a_body_that_grows_too_large_is_refused_and_the_client_can_read_why(server):
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = raw(server, b"POST /embed HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", *[chunk] * 20, b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"larger than 200000 bytes" in answer


def test_a_client_that_sends_all_of_a_large_body_reads_the_refusal(server):
    response = server.client.post("/embed", content=b" " * 5_000_000)
    assert response.status_code == 413
    assert response.json()["error_type"] == "Validation"


def test_clients_that_hang_up_leave_nothing_behind(server):
    body = json.dumps({"inputs": ["word " * 200] * 150}).encode()  # its last part is so large that reading pauses
    head = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(body)
    for _ in range(30):
        with socket.create_connection(server.address, timeout=10) as connection:
            connection.sendall(head)
            assert connection.recv(100).startswith(b"HTTP/1.1 100")  # it waits for the body
            connection.sendall(body)
    with socket.create_connection(server.address, timeout=10) as connection:
        connection.sendall(head + body[:100])
    assert server.post("/embed", inputs=TEXT).status_code == 200
    text = server.client.get("/metrics").text
    assert "bertd_queue_rows 0.0" in text
    assert "bertd_queue_tokens 0.0" in text
    assert 'bertd_requests_total{route="/embed",status="499"}' in text
