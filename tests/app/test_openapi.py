"""What OpenAPI and docs/api.md say of the server is what it does: schemathesis over real sockets, against each kind of model."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from checkpoints import MINILM, save_checkpoint
from hypothesis import HealthCheck, Phase, settings
from schemathesis import Case
from schemathesis.specs.openapi import checks
from servers import RunningServer, client_of, running_server, serving_nothing

from app import errors, middleware
from app.main import create_api, refusal
from app.service import ROUTES

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]
KINDS: dict[str, dict[str, Any]] = {
    "embedder": {},
    "classifier": {"architecture": "BertForSequenceClassification", "num_labels": 3},
    "reranker": {"architecture": "BertForSequenceClassification", "num_labels": 1},
    "sparse": {"architecture": "BertForMaskedLM"},
}
PAGE = create_api(refusal).openapi()
OPERATIONS = [(method.upper(), path) for path, methods in PAGE["paths"].items() for method in methods]
FIT = ("PUT", "/classifiers/{name}")


def described(**generation: Any) -> schemathesis.BaseSchema:
    """Our page as schemathesis reads it; the same requests at each run."""
    schema = schemathesis.openapi.from_dict(PAGE, config=schemathesis.Config(seed=1))
    schema.config.generation.update(**generation)
    return schema


def paths_of(kind: str) -> list[str]:
    """What a model of that kind answers, and not every other."""
    return ["/", "/invocations", *ROUTES[kind].split(", ")]


SCHEMA = described()
# The examples of the page are tried below; to complete them takes schemathesis half a minute.
PHASES = [Phase.generate, Phase.shrink]
few = settings(max_examples=10, deadline=None, database=None, phases=PHASES, suppress_health_check=list(HealthCheck))


def serve(kind: str, factory: pytest.TempPathFactory, **options: Any) -> Iterator[RunningServer]:
    folder = save_checkpoint(factory.mktemp(kind), **KINDS[kind])
    options |= {"pooling": "splade"} if kind == "sparse" else {}
    with running_server(model=folder, threads=1, served_model_name=MINILM, data_dir=factory.mktemp("data"), **options) as server:
        yield server


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    yield from serve("embedder", tmp_path_factory)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    yield from serve("classifier", tmp_path_factory)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    yield from serve("reranker", tmp_path_factory)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    yield from serve("sparse", tmp_path_factory)


def check(case: Case, server: RunningServer) -> None:
    response = case.call(base_url=server.url)
    case.validate_response(response, checks=CHECKS)
    if case.method == case.operation.method:  # other methods are tried too, and get 405
        assert str(response.status_code) in PAGE["paths"][case.operation.path][case.method.lower()]["responses"]


@SCHEMA.exclude(method="PUT").parametrize()
@few
def test_an_embedder_answers_as_documented(case, embedder):
    check(case, embedder)


@described(modes=["negative"]).include(method="PUT").parametrize()  # each good one is a fit, and takes a second
@few
def test_bad_fits_are_refused_as_documented(case, embedder):
    check(case, embedder)


@SCHEMA.include(path=paths_of("classifier")).parametrize()
@few
def test_a_classifier_answers_as_documented(case, classifier):
    check(case, classifier)


@SCHEMA.include(path=paths_of("reranker")).parametrize()
@few
def test_a_reranker_answers_as_documented(case, reranker):
    check(case, reranker)


@SCHEMA.include(path=paths_of("sparse")).parametrize()
@few
def test_a_sparse_embedder_answers_as_documented(case, sparse):
    check(case, sparse)


# What is documented is answered -------------------------------------------------------------------------------------------


def examples_of(path: str, method: str = "post") -> list[Any]:
    """The bodies that the page shows for a route."""
    schemas = [
        PAGE["paths"][path][method].get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    ]
    found = []
    while schemas:
        schema = schemas.pop()
        found += schema.get("examples", [])
        schemas += schema.get("oneOf", []) + schema.get("anyOf", [])
        schemas += [PAGE["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]] if "$ref" in schema else []
    return found


def with_a_bad_text(body: dict[str, Any]) -> dict[str, Any]:
    """The same with an empty text at the end of its list, if it has one."""
    lists = (name for name in ("inputs", "input", "texts", "documents", "text_2") if isinstance(body.get(name), list))
    return body | {name: [*body[name], [""] if isinstance(body[name][0], list) else ""] for name in lists}


def closed(schema: Any) -> Any:
    """The same page, and no object has a field that it does not name."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: closed(value) for name, value in schema.items()}
    return {**kept, "additionalProperties": False} if isinstance(schema.get("properties"), dict) else kept


CLOSED = schemathesis.openapi.from_dict(closed(PAGE))


def check_answer(response: httpx.Response, path: str, method: str = "POST") -> None:
    """Every field is there that the page names for such an answer, and no other."""
    CLOSED[path][method].validate_response(response)
    assert str(response.status_code) in PAGE["paths"][path][method.lower()]["responses"]


BEHIND = {"embedder": "/embed", "classifier": "/predict", "reranker": "/rerank", "sparse": "/embed_sparse"}
"""What POST / stands for."""


def bodies_of(kind: str, path: str) -> list[Any]:
    """The examples of a route that a model of that kind answers."""
    if path in ("/", "/invocations"):
        return [body for body in examples_of(BEHIND[kind]) if "documents" not in body]
    return [body for body in examples_of(path) if path != "/classify" or ("labels" in body) == (kind == "embedder")]


QUERIES = ("", "details=true", "partial=true", "details=true&partial=true")


@pytest.mark.parametrize(("kind", "path"), [(kind, path) for kind in KINDS for path in paths_of(kind)])
def test_every_example_is_answered_in_every_documented_way(kind: str, path: str, request: pytest.FixtureRequest) -> None:
    client = request.getfixturevalue(kind).client
    bodies = bodies_of(kind, path)
    assert bodies
    for body in bodies:
        for query in QUERIES:
            spoilt = with_a_bad_text(body) if "partial" in query and path not in ("/", "/invocations") else body
            response = client.post(f"{path}?{query}", json=spoilt)
            assert response.status_code == 200, response.text
            check_answer(response, path)
        for accept in PAGE["paths"][path]["post"]["responses"]["200"]["content"]:
            response = client.post(path, json=body, headers={"accept": accept})
            check_answer(response, path)
            assert response.status_code == 406 or kind != "embedder" or response.headers["content-type"] == accept


def test_arrays_have_no_place_for_details(embedder: RunningServer) -> None:
    for path in ("/embed", "/embed_all", "/v1/embeddings", "/", "/invocations"):
        for query in QUERIES[1:]:
            headers = {"accept": "application/safetensors"}
            response = embedder.client.post(f"{path}?{query}", json=examples_of(path)[0], headers=headers)
            assert response.status_code == (400 if path.startswith("/v1") else 406)
            check_answer(response, path)


def test_every_route_without_examples_answers_as_documented(embedder: RunningServer) -> None:
    (examples,) = examples_of(FIT[1], "put")
    check_answer(embedder.client.put("/classifiers/mood", json=examples), *FIT[::-1])
    for method, path in OPERATIONS:
        if method in ("GET", "DELETE"):
            at = path.replace("{name}", "mood" if "classifiers" in path else MINILM)
            response = embedder.client.request(method, at)
            assert response.status_code == 200
            check_answer(response, path, method)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_each_kind_tells_of_itself_as_documented(kind: str, request: pytest.FixtureRequest) -> None:
    response = request.getfixturevalue(kind).client.get("/info")
    assert response.json()["kind"] == kind
    check_answer(response, "/info", "GET")


def parts_of(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and all that it holds."""
    if "$ref" in schema:
        schema = PAGE["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    yield schema
    held = [*schema.get("properties", {}).values(), *schema.get("anyOf", ()), *schema.get("oneOf", ())]
    for part in (*held, schema.get("items"), schema.get("additionalProperties")):
        if isinstance(part, dict):
            yield from parts_of(part)


def says_something(schema: dict[str, Any]) -> bool:
    if schema.get("type") == "object":
        return "properties" in schema or isinstance(schema.get("additionalProperties"), dict)
    return not schema.keys().isdisjoint({"type", "anyOf", "oneOf", "const"})


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_is_described_to_its_last_field(method: str, path: str) -> None:
    for answer in PAGE["paths"][path][method.lower()]["responses"].values():
        for content in answer.get("content", {}).values():
            assert not [part for part in parts_of(content["schema"]) if not says_something(part)]


def test_every_field_of_info_has_a_line_on_it() -> None:
    fields = [field for part in parts_of({"$ref": "/Info"}) for field in part.get("properties", {}).values()]
    assert len(fields) > 30
    assert not [field for field in fields if "description" not in field]


# Refusals -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with a key that takes small bodies only."""
    yield from serve("embedder", tmp_path_factory, api_key="sesame", admin_key="of an operator", max_body_bytes=1000)


PUBLIC = ("/health", "/ping", "/ready", "/metrics")


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_route_refuses_a_wrong_key_and_a_large_body_as_documented(strict: RunningServer, method: str, path: str) -> None:
    at = path.replace("{name}", "a")
    response = strict.client.request(method, at, json={"inputs": "a"})
    if path not in PUBLIC:
        assert response.status_code == 401
        check_answer(response, path, method)
    key = "of an operator" if path.startswith("/admin/") else "sesame"
    response = strict.client.request(method, at, json={"inputs": "a" * 1000}, headers={"authorization": f"Bearer {key}"})
    assert response.status_code == 413
    check_answer(response, path, method)


async def never() -> AsyncIterator[bytes]:
    """A body that does not come."""
    await asyncio.Event().wait()
    yield b""


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
async def test_what_surrounds_a_route_refuses_as_documented(method: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serving, full = serving_nothing(), asyncio.Event()

    def check_room() -> None:
        if full.is_set():
            raise errors.Overloaded("the queue is full", retry_after=1)

    serving.check_room = check_room
    async with client_of(serving, admin_key="sesame", body_timeout=0.01) as client:

        async def status(**request: Any) -> int:
            headers = {"authorization": "Bearer sesame"} | request.pop("headers", {})
            response = await client.request(method, path.replace("{name}", "name"), headers=headers, **request)
            check_answer(as_received(response.status_code, response.headers, response.content), path, method)
            return response.status_code

        body = {"json": next(iter(examples_of(path, method.lower())), {})}
        assert await status(content=never()) == 408
        assert await status(headers={"x-request-timeout": "soon"}) in (400, 422)
        assert await status(**body) == 500
        full.set()
        assert await status(**body) == (429 if method == "POST" and not path.startswith("/admin/") else 500)
        monkeypatch.setattr(middleware, "_LARGEST_BODIES", 0)
        assert await status(**body) == 429
        serving.closing.set()
        assert await status() == (500 if path in PUBLIC else 503)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_a_route_that_has_no_time_refuses_as_documented(mood: RunningServer, method: str, path: str) -> None:
    if path != "/admin/reload":
        body = next(iter(examples_of(path, method.lower())), None)
        at = path.replace("{name}", MINILM if "models" in path else "mood")
        check_answer(mood.client.request(method, at, json=body, headers={"x-request-timeout": "1e-9"}), path, method)


SAME = {"/v2/rerank": "/v1/rerank", "/v1/score": "/score", "/invocations": "/"}
SECTION = re.compile(r"^## (GET|POST|PUT|DELETE) (\S+)\n(.*?)(?=^#+ )", re.M | re.S)
ROW = re.compile(r"^\| `(.*)` \| (\d+) `(.*)` \|$", re.M)
TABLES = {
    (method, path): [(body, int(status), says) for body, status, says in ROW.findall(text)]
    for method, path, text in SECTION.findall((Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8"))
}
REFUSED = [(method, path, *row) for (method, path) in TABLES for row in TABLES[method, SAME.get(path, path)]]


def test_every_route_that_reads_something_has_a_table_of_refusals() -> None:
    assert {route for route in OPERATIONS if not TABLES[route] and route[1] not in SAME} == {
        *(("GET", path) for path in ("/v1/models", "/classifiers", "/info", *PUBLIC)),
        ("POST", "/admin/reload"),
    }


@pytest.fixture(scope="module")
def mood(embedder: RunningServer) -> RunningServer:
    """A server that has a classifier of that name."""
    assert embedder.client.put("/classifiers/mood", json=examples_of(FIT[1], "put")[0]).status_code == 200
    return embedder


@pytest.mark.parametrize(("method", "path", "asked", "status", "says"), REFUSED)
def test_every_row_of_the_tables_of_refusals_is_true(
    mood: RunningServer, method: str, path: str, asked: str, status: int, says: str, request: pytest.FixtureRequest
) -> None:
    kind = next((kind for kind in KINDS if path in ROUTES[kind].split(", ")), "embedder")
    server = mood if kind == "embedder" else request.getfixturevalue(kind)
    body, name = (asked, "mood") if asked.startswith("{") else (json.dumps(examples_of(FIT[1], "put")[0]), asked)
    response = server.client.request(method, path.replace("{name}", name), content=None if method in ("GET", "DELETE") else body)
    assert (response.status_code, says in message_of(response)) == (status, True), response.text
    check_answer(response, path, method)


def message_of(response: httpx.Response) -> str:
    body = response.json()
    found = body.get("message") or body["error"]
    return found if isinstance(found, str) else found["message"]


TREE = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServiceError)]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_documented_refusal_is_what_its_dialect_answers(method: str, path: str) -> None:
    documented = {int(status) for status in PAGE["paths"][path][method.lower()]["responses"] if status.isdigit()} - {200}
    refused = set()
    for kind in TREE:
        answer = refusal(kind("what was found", retry_after=3), {"type": "http", "path": path})
        if answer.status_code in documented:
            check_answer(as_received(answer.status_code, answer.raw_headers, answer.body), path, method)
            refused.add(answer.status_code)
    assert refused == documented


def as_received(status: int, headers: Any, content: bytes | memoryview) -> httpx.Response:
    request = httpx.Request("GET", "http://localhost")
    response = httpx.Response(status, headers=headers, content=content, request=request)
    response.elapsed = timedelta()
    return response
