"""The OpenAI dialect over HTTP, and where its routes stand: names, prefixes, slashes."""

import json
import shutil

import numpy as np
import pytest
from servers import running_server

from app.main import JSON_ROUTES, create_api, refusal

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
LONG = "word " * 1000
FOREIGN = [15339, 1917]  # "hello world" of tiktoken's cl100k_base; both ids are in a BERT vocabulary too

REFUSED = [
    ("{", "not JSON"),
    ({}, "input: Field required"),
    ({"input": None}, "input"),
    ({"input": 3}, "input"),
    ({"input": [1.5]}, "input"),
    ({"input": ""}, "empty"),
    ({"input": []}, "empty"),
    ({"input": [[]]}, "empty"),
    ({"input": ["a", ""]}, "empty"),
    ({"input": ["a"] * 3001}, "at most 3000"),
    ({"input": FOREIGN}, "check_embedding_ctx_length=False"),
    ({"input": ["a", FOREIGN]}, "input[1] holds token ids that are not this model's"),
    ({"input": [101, 30522, 102]}, "check_embedding_ctx_length=False"),
    ({"input": [101, -1, 102]}, "check_embedding_ctx_length=False"),
    ({"input": "a", "dimensions": 385}, "wanted 1 to 384"),
    ({"input": "a", "dimensions": -1}, "wanted 1 to 384"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ({"input": "a", "output_dtype": "int4"}, "output_dtype"),
    ({"input": "a", "prompt_name": "query"}, "Available prompts: []"),
]


def vectors_of(response):
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["data"]])


def assert_refused(response, status, message):
    assert response.status_code == status
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_bad_input_is_refused_in_the_envelope(server, body, message):
    content = body if isinstance(body, str) else json.dumps(body)
    assert_refused(server.client.post("/v1/embeddings", content=content), 400, message)


@pytest.mark.parametrize("path", ["/v1/nothing", "/v1/models/other", "/models/other"])
def test_what_is_not_there_is_refused_in_the_envelope(server, path):
    assert_refused(server.client.get(path), 404, "")


def test_a_wrong_method_and_a_large_body_are_refused_in_the_envelope(server):
    assert_refused(server.client.get("/v1/embeddings"), 405, "see /docs")
    assert_refused(server.client.post("/embeddings", content=b" " * 200_001), 413, "larger than 200000 bytes")


@pytest.mark.parametrize(("path", "inputs"), [("/embed", "inputs"), ("/v1/embeddings", "input")])
def test_both_dialects_give_the_same_vectors_and_headers(server, path, inputs):
    response = server.post(path, **{inputs: ["hello", LONG]})
    rows = response.json() if path == "/embed" else vectors_of(response)
    np.testing.assert_allclose(rows[0], server.post("/embed", inputs="hello").json()[0], rtol=0, atol=2e-6)
    assert response.headers["x-truncated"] == "1"
    assert response.headers["x-compute-tokens"] == "259"


def test_details_and_errors_have_no_place_in_arrays(server):
    for query in ("details=true", "partial=true"):
        headers = {"accept": "application/octet-stream"}
        assert_refused(server.client.post(f"/v1/embeddings?{query}", json={"input": "a"}, headers=headers), 400, "no place in")


def test_partial_does_not_excuse_ids_of_another_vocabulary(server):
    assert_refused(server.client.post("/v1/embeddings?partial=true", json={"input": ["a", FOREIGN]}), 400, "check_embedding")


def test_the_answer_is_what_the_api_has(server):
    answer = server.post("/embeddings", input=["hello", "world of words"], model="anything", user="me", modality="text").json()
    assert answer["object"] == "list"
    assert answer["model"] == MINILM
    assert answer["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    assert [(item["object"], item["index"]) for item in answer["data"]] == [("embedding", 0), ("embedding", 1)]


def test_ids_of_our_own_tokenizer_are_the_text_that_they_stand_for(server):
    ids = [token["id"] for token in server.post("/tokenize", inputs="hello world").json()[0]]
    text, alone, listed = (vectors_of(server.post("/v1/embeddings", input=i)) for i in ("hello world", ids, [ids]))
    np.testing.assert_array_equal(text, alone)
    np.testing.assert_array_equal(text, listed)


@pytest.mark.parametrize("null", ["model", "dimensions", "encoding_format", "output_dtype", "prompt_name", "input_type", "user"])
def test_null_is_the_same_as_absent(server, null):
    assert server.post("/v1/embeddings", input="a", **{null: None}).json() == server.post("/v1/embeddings", input="a").json()


def test_zero_dimensions_are_all_and_fewer_are_cut_and_normalised(server):
    full = vectors_of(server.post("/v1/embeddings", input="a"))
    np.testing.assert_array_equal(vectors_of(server.post("/v1/embeddings", input="a", dimensions=0)), full)
    cut = full[:, :10] / np.linalg.norm(full[:, :10])
    np.testing.assert_allclose(vectors_of(server.post("/v1/embeddings", input="a", dimensions=10)), cut, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, None),
        ({"prompt_name": "query"}, "query"),
        ({"input_type": "query"}, "query"),
        ({"input_type": "search_query"}, "query"),
        ({"input_type": "document"}, "passage"),
        ({"input_type": "passage"}, "passage"),
        ({"input_type": "Document"}, "passage"),
        ({"prompt_name": ""}, ""),
        ({"input_type": "classification"}, None),
        ({"input_type": "document", "prompt_name": "query"}, "query"),
    ],
)
def test_a_prompt_is_chosen_by_name_or_by_kind(prompted, fields, prompt):
    wanted = prompted.post("/embed", inputs="abc", prompt_name=prompt).json()
    np.testing.assert_array_equal(vectors_of(prompted.post("/v1/embeddings", input="abc", **fields)), wanted)


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, "query"),
        ({"input_type": "clustering"}, "query"),
        ({"input_type": "query"}, "query"),
        ({"input_type": "document"}, ""),
        ({"input_type": "passage"}, ""),
        ({"input_type": "search_document"}, "search_document"),
    ],
)
def test_a_document_gets_no_prompt_of_a_query(make_checkpoint, tmp_path, fields, prompt):
    folder = shutil.copytree(make_checkpoint(), tmp_path / "checkpoint")
    prompts = {"query": "query: ", **({"search_document": "of all: ", "passage": "p: "} if prompt == "search_document" else {})}
    config = {"prompts": prompts, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config), encoding="utf-8")
    with running_server(model=folder) as server:
        wanted = server.post("/embed", inputs="abc", prompt_name=prompt).json()
        assert wanted == server.post("/embed", inputs=prompts.get(prompt, "") + "abc", prompt_name="").json()
        np.testing.assert_array_equal(vectors_of(server.post("/v1/embeddings", input="abc", **fields)), wanted)


def test_a_text_that_is_too_long_is_treated_as_asked(server):
    long = "a " * 400
    cut, split = (vectors_of(server.post("/v1/embeddings", input=long, on_overflow=habit)) for habit in ("truncate", "split"))
    assert not np.array_equal(cut, split)
    for said in ({"on_overflow": "error"}, {"truncate": False}):
        refused = server.post("/v1/embeddings", input=["a", long], **said)
        assert refused.status_code == 400
        assert "text 1 has 402 tokens" in refused.json()["error"]["message"]


def test_the_served_name_stands_in_every_answer(prompted):
    assert prompted.client.get("/info").json()["served_model_name"] == "tiny/bert"
    assert prompted.post("/v1/embeddings", input="abc").json()["model"] == "tiny/bert"
    (listed,) = prompted.client.get("/v1/models").json()["data"]
    assert (listed["id"], listed["object"], listed["owned_by"]) == ("tiny/bert", "model", "bertd")
    assert listed["created"] > 1.7e9
    for path in ("/v1/models/tiny/bert", "/v1/models/tiny%2Fbert", "/models/tiny/bert"):
        assert prompted.client.get(path).json() == listed
    assert prompted.client.get("/models").json() == prompted.client.get("/v1/models").json()


def test_a_model_in_a_folder_is_found_by_its_path(make_checkpoint):
    folder = str(make_checkpoint())
    with running_server(model=folder) as server:
        assert server.client.get(f"/v1/models/{folder.replace('/', '%2F')}").json()["id"] == folder


@pytest.mark.parametrize("path", ["/embed", "/embed/", "//embed", "///embed//"])
def test_slashes_more_or_less_are_the_same_route(server, path):
    response = server.client.post(server.url + path, json={"inputs": "a"}, follow_redirects=False)
    assert response.json() == server.post("/embed", inputs="a").json()
    assert server.client.get(f"{server.url}//health/", follow_redirects=False).status_code == 200


@pytest.fixture(scope="module")
def prefixed(make_checkpoint):
    with running_server(model=make_checkpoint(), url_prefix="/v1", api_key="sesame") as server:
        yield server


KEY = {"authorization": "Bearer sesame"}


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/metrics", "/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css"]
)
def test_public_routes_stay_public_below_a_prefix(prefixed, path):
    assert prefixed.client.get(f"/v1{path}").status_code == 200
    assert prefixed.client.get(path, headers=KEY).status_code == 404


@pytest.mark.parametrize("path", ["/v1/embed", "/v1/embed/", "//v1//embed"])
def test_routes_stand_below_the_prefix_and_nowhere_else(prefixed, path):
    assert prefixed.client.post(prefixed.url + path, json={"inputs": "a"}, headers=KEY).status_code == 200
    assert prefixed.client.post(prefixed.url + path, json={"inputs": "a"}).json()["error_type"] == "Unauthorized"
    for outside in ("/embed", "/v1embed", "/v2/embed", "/"):
        refused = prefixed.client.post(outside, json={"inputs": "a"}, headers=KEY)
        assert (refused.status_code, refused.json()["error_type"]) == (404, "NotFound")


def test_a_dialect_refuses_in_its_own_words_below_a_prefix(prefixed):
    for path in ("/v1/v1/embeddings", "/v1/embeddings", "/v1/v1/models", "/v1/models"):
        refused = prefixed.client.post(path, json={"input": "a"}).json()["error"]
        assert (refused["type"], refused["code"]) == ("invalid_request_error", "invalid_api_key")
    assert vectors_of(prefixed.client.post("/v1/v1/embeddings", json={"input": "a"}, headers=KEY)).shape == (1, 32)
    assert prefixed.client.get("/v1/v1/models", headers=KEY).status_code == 200


def test_the_docs_page_and_the_banner_know_the_prefix(prefixed):
    assert "'/v1/openapi.json'" in prefixed.client.get("/v1/docs").text
    assert prefixed.client.get("/v1/openapi.json").json()["servers"] == [{"url": "/v1"}]
    assert "/v1/embed -H" in prefixed.banner
    assert 'route="/embed"' in prefixed.client.get("/v1/metrics").text


def test_every_json_route_is_reached_directly():
    paths = create_api(refusal).openapi()["paths"]
    with_body = {path for path, methods in paths.items() if "requestBody" in methods.get("post", {})}
    assert with_body <= {route.path for route in JSON_ROUTES}
    assert len(with_body) > 15
