"""The promises of docs/security.md, asked of real servers."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from servers import RunningServer, client_of, running_server, serving_nothing

from app.auth import PUBLIC
from app.main import create_api, refusal

pytestmark = pytest.mark.system

MARKER = "kumquat"  # in every text that is sent here, and in no word of ours
KEY = {"authorization": "Bearer first"}
ADMIN = {"authorization": "Bearer sesame"}
ORIGIN = "https://page.example"
BODIES = {
    "/embed": {"inputs": MARKER},
    "/embed_all": {"inputs": [MARKER, MARKER], "return_tokens": True},
    "/embed_chunks": {"inputs": MARKER * 3, "chunk_tokens": 7},
    "/similarity": {"inputs": {"source_sentence": MARKER, "sentences": [MARKER]}},
    "/embed_sparse": {"inputs": MARKER},
    "/predict": {"inputs": [[MARKER, MARKER]]},
    "/classify": {"input": MARKER, "labels": [MARKER, f"no {MARKER}"]},
    "/rerank": {"query": MARKER, "texts": [MARKER]},
    "/v1/rerank": {"query": MARKER, "documents": [MARKER]},
    "/v2/rerank": {"query": MARKER, "documents": [{"text": MARKER}]},
    "/score": {"text_1": MARKER, "text_2": MARKER},
    "/v1/score": {"text_1": MARKER, "text_2": MARKER},
    "/": {"inputs": MARKER},
    "/invocations": {"inputs": MARKER},
    "/v1/embeddings": {"input": MARKER},
    "/tokenize": {"inputs": MARKER},
    "/decode": {"ids": [[1, 2]]},
}


@dataclass(frozen=True)
class Guarded:
    """A server with everything that guards one, its file of keys and its log."""

    server: RunningServer
    keys: Path
    log: Path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text("filed\n")
    settings = {
        "model": save_checkpoint(folder),
        "api_key": "first, second",
        "api_key_file": folder / "keys",
        "admin_key": "sesame",
        "metrics_public": "false",
        "cors_origins": f"https://other.example, {ORIGIN}",
        "max_body_bytes": 100_000,
        "log_level": "debug",
    }
    with (folder / "log").open("wb") as log, running_server(stderr=log.fileno(), **settings) as server:
        yield Guarded(server, folder / "keys", folder / "log")


def every_route():
    return [(method, path) for path, methods in create_api(refusal).openapi()["paths"].items() for method in methods]


def test_every_route_but_a_few_wants_a_key(guarded):
    public = {path for path in PUBLIC if guarded.server.client.get(path).status_code == 200}
    assert public == {"/health", "/ping", "/ready", "/docs", "/openapi.json"}
    for method, path in [*every_route(), ("get", "/nowhere"), ("delete", "/embed"), ("get", "/docs/x"), ("get", "/healthy")]:
        if path not in public:
            answer = guarded.server.client.request(method, path.replace("{name}", "name"))
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
    assert guarded.server.client.get("/metrics", headers=KEY).status_code == 200


@pytest.mark.parametrize("key", ["first", "second", "filed"])
def test_each_key_opens_and_no_other_does(guarded, key):
    def status(authorization):
        return guarded.server.client.get("/info", headers={"authorization": authorization}).status_code

    assert status(f"Bearer {key}") == 200
    assert {status(f"Bearer {bad}") for bad in (key[:-1], key + "x", key.upper(), "first, second", "sesame")} == {401}
    assert {status(bad) for bad in (key, f"Basic {key}", f"Bearer{key}", "Bearer")} == {401}


def test_keys_change_without_a_restart(guarded):
    guarded.keys.with_name("new").write_text("filed\nrotated\n")
    os.replace(guarded.keys.with_name("new"), guarded.keys)
    deadline = time.monotonic() + 20
    while guarded.server.client.get("/info", headers={"authorization": "Bearer rotated"}).status_code == 401:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert guarded.server.client.get("/info", headers={"authorization": "Bearer filed"}).status_code == 200


ADMIN_PATHS = ["/admin", "/admin/", "/admin/nothing", "//admin//nothing/", "/admin%2Fnothing", "/%61dmin/nothing"]


@pytest.mark.parametrize("path", ADMIN_PATHS)
def test_only_the_admin_key_opens_admin(guarded, path):
    url = guarded.server.url + path
    assert [guarded.server.client.post(url, headers=headers).status_code for headers in ({}, KEY, ADMIN)] == [401, 401, 404]


def test_without_an_admin_key_there_is_no_admin(server, make_checkpoint):
    for method in ("GET", "POST"):
        answers = [server.client.request(method, path) for path in ("/nowhere", "/admin/reload", "/admin")]
        assert {(answer.status_code, answer.content) for answer in answers} == {(404, answers[0].content)}


def test_the_page_of_routes_can_be_asked_for_again(guarded):
    first, again = (guarded.server.client.get("/openapi.json") for _ in range(2))
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json() == again.json()
    reload = again.json()["paths"]["/admin/reload"]["post"]
    assert reload["security"] == [{"AdminKey": []}]
    assert "404" not in reload["responses"]


def preflight(guarded, origin, headers="authorization,content-type,x-request-timeout,traceparent"):
    return guarded.server.client.options(
        "/embed",
        headers={"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": headers},
    )


def test_a_page_of_a_known_origin_may_ask_with_its_key(guarded):
    answer = preflight(guarded, ORIGIN)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-credentials" not in answer.headers
    answer = guarded.server.client.post("/embed", json={"inputs": "a"}, headers={**KEY, "origin": ORIGIN})
    exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
    ours = {name for name in answer.headers if name.startswith("x-")} - {"x-content-type-options"}
    assert ours | {"retry-after", "x-shape", "x-dtype"} <= exposed


def test_a_page_may_send_whatever_header_its_client_sends(guarded):
    """That of OpenAI for JavaScript tells of itself in half a dozen."""
    asked = "authorization,content-type,x-stainless-arch,x-stainless-runtime-version"
    answer = preflight(guarded, ORIGIN, asked)
    assert (answer.status_code, answer.headers["access-control-allow-headers"]) == (200, asked)
    assert preflight(guarded, "https://page.example.evil", asked).status_code == 400


def test_a_page_of_another_origin_may_not(guarded):
    assert preflight(guarded, "https://page.example.evil").status_code == 400
    answer = guarded.server.client.get("/info", headers={**KEY, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (401, {"url": "/embed"}),
        (404, {"url": "/nowhere", "headers": KEY}),
        (413, {"url": "/embed", "headers": KEY, "content": " " * 100_001}),
        (422, {"url": "/embed", "headers": KEY, "content": "{"}),
    ],
)
def test_a_page_can_read_a_refusal(guarded, status, request_):
    answer = guarded.server.client.post(**request_ | {"headers": {**request_.get("headers", {}), "origin": ORIGIN}})
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == ORIGIN


def test_no_page_may_ask_unless_it_is_set(server):
    answer = server.client.post("/embed", json={"inputs": "a"}, headers={"origin": ORIGIN})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert server.client.options("/embed", headers={"origin": ORIGIN, "access-control-request-method": "POST"}).status_code == 405


def test_an_answer_is_what_it_says(guarded):
    for path in ("/health", "/nowhere", "/docs", "/info"):
        assert guarded.server.client.get(path, headers=KEY).headers["x-content-type-options"] == "nosniff"


def test_the_docs_page_loads_nothing_from_another_host(guarded):
    page = guarded.server.client.get("/docs").text
    loaded = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(loaded) >= 3
    for path in loaded:
        assert path.startswith("/static-offline-docs/")
        assert guarded.server.client.get(path).status_code == 200
    assert "//" not in re.sub(r"<!--.*?-->", "", page, flags=re.S).replace('"//"', "")
    assert '"validatorUrl": null' in page


def test_a_trace_context_is_passed_on(guarded):
    sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = guarded.server.client.get("/info", headers={**KEY, "traceparent": sent})
    assert answer.headers["traceparent"] == sent
    assert "traceparent" not in guarded.server.client.get("/info", headers={**KEY, "traceparent": sent + "-x"}).headers
    line = next(line for line in log_lines(guarded) if line.get("request_id") == answer.headers["x-request-id"])
    assert line["trace_id"] == "0af7651916cd43dd8448eb211c80319c"


def log_lines(guarded):
    """The log so far, with the line of a last request in it."""
    last = guarded.server.client.get("/info", headers=KEY).headers["x-request-id"]
    deadline = time.monotonic() + 20
    while last not in guarded.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [json.loads(line) for line in guarded.log.read_text().splitlines()]


def bad_bodies(body):
    """The same body, spoilt in ways that each tempt a parser to repeat what it read."""
    yield json.dumps(body)[:-1]
    yield json.dumps(body).replace(MARKER, MARKER + "\\ud800")
    yield json.dumps(body).replace(f'"{MARKER}"', f'{{"{MARKER}": "{MARKER}"}}')
    yield json.dumps({**body, "prompt_name": [MARKER], "dimensions": MARKER, "output_dtype": MARKER, "on_overflow": MARKER})
    yield json.dumps({MARKER: MARKER})
    yield json.dumps(MARKER)
    yield MARKER


def test_no_text_gets_into_the_log_a_metric_or_an_error(guarded):
    client = guarded.server.client
    posts = [path for method, path in every_route() if method == "post" and not path.startswith("/admin/")]
    assert set(posts) == set(BODIES)
    for path in posts:
        for content in (json.dumps(BODIES[path]), *bad_bodies(BODIES[path])):
            for query in ("", "?partial=true&details=true"):
                answer = client.post(path + query, content=content, headers=KEY)
                assert answer.is_success or MARKER not in answer.text, answer.text
    examples = {"examples": [{"text": MARKER, "label": MARKER}, {"text": "other", "label": "other"}]}
    assert client.put("/classifiers/fruit", json=examples, headers=KEY).status_code == 200
    for path in (f"/{MARKER}", f"/classifiers/{MARKER}", f"/v1/models/{MARKER}", f"/embed?{MARKER}={MARKER}"):
        client.get(path, headers={**KEY, "user-agent": MARKER, "x-other": MARKER})
        client.get(path, headers={"authorization": f"Bearer {MARKER}"})
    _crash_with(guarded.server, {"inputs": MARKER})
    lines = log_lines(guarded)
    assert any("engine process died" in line["message"] for line in lines)
    assert {"/embed", "/rerank", "/classifiers/{name}"} <= {line.get("route") for line in lines}
    assert MARKER not in guarded.log.read_text()
    assert MARKER not in client.get("/metrics", headers=KEY).text


def _crash_with(server, body):
    """Kill the engine while a request of that body is in it or on the way there."""
    content = json.dumps(body).encode()
    (engine,) = server.children()
    os.kill(engine, signal.SIGSTOP)
    with socket.create_connection(server.address, timeout=60) as connection:
        head = f"POST /embed HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer first\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        for _ in range(3):  # the event loop has had its turns since
            server.client.get("/health")
        os.kill(engine, signal.SIGKILL)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_no_key_gets_into_the_log_an_answer_or_a_metric(guarded):
    client = guarded.server.client
    for headers in (KEY, ADMIN, {"authorization": "Bearer filed"}):
        told = [client.get(path, headers=headers).text for path in ("/info", "/admin/x", "/nowhere", "/openapi.json")]
        told += [client.get("/metrics", headers=KEY).text, guarded.log.read_text(), guarded.server.banner]
        for key in ("sesame", "filed", "first, second"):
            assert not [text for text in told if re.search(rf"\b{key}\b", text.replace(str(guarded.keys), ""))]


HOOK = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *what, const char *where) {
    int file = open(getenv("CONNECTIONS"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    char line[600];
    int length = snprintf(line, sizeof line, "%s %s\n", what, where);
    if (write(file, line, length) < 0) abort();
    close(file);
}

int connect(int fd, const struct sockaddr *to, socklen_t size) {
    char text[INET6_ADDRSTRLEN] = "";
    if (to->sa_family == AF_INET) inet_ntop(AF_INET, &((const struct sockaddr_in *)to)->sin_addr, text, sizeof text);
    if (to->sa_family == AF_INET6) inet_ntop(AF_INET6, &((const struct sockaddr_in6 *)to)->sin6_addr, text, sizeof text);
    if (text[0] && strncmp(text, "127.", 4) && strcmp(text, "::1")) {
        note("connect", text);
        errno = ENETUNREACH;
        return -1;
    }
    int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    return real(fd, to, size);
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    if (node && strncmp(node, "127.", 4) && strcmp(node, "localhost")) {
        note("lookup", node);
        return EAI_FAIL;
    }
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) = dlsym(RTLD_NEXT, "getaddrinfo");
    return real(node, service, hints, found);
}
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs Linux and a C compiler")
def test_neither_process_looks_for_another_host(tmp_path, monkeypatch):
    """Every connect and look-up of a name by the C library, of server and engine, from start to stop; none gets through."""
    (tmp_path / "hook.c").write_text(HOOK)
    compile_ = ["cc", "-shared", "-fPIC", "-include", "stdio.h", "-o", tmp_path / "hook.so", tmp_path / "hook.c", "-ldl"]
    subprocess.run(compile_, check=True, timeout=60)
    seen = tmp_path / "connections"
    monkeypatch.setenv("LD_PRELOAD", str(tmp_path / "hook.so"))
    monkeypatch.setenv("CONNECTIONS", str(seen))
    probe = "import socket; s = socket.socket(); s.settimeout(0.01); [s.connect_ex((to, 9)) for to in ('192.0.2.1', 'a.invalid')]"
    subprocess.run([sys.executable, "-c", probe], timeout=60, stderr=subprocess.DEVNULL)
    assert seen.read_text().splitlines()[:2] == ["connect 192.0.2.1", "lookup a.invalid"]
    seen.unlink()

    for variable in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.delenv(variable, raising=False)  # as in the environment of somebody who runs it
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://192.0.2.1:4318")
    with running_server(model="sentence-transformers/all-MiniLM-L6-v2") as server:
        assert server.post("/embed", inputs="hello").status_code == 200
        assert server.client.get("/docs").status_code == 200
        (engine,) = server.children()
        environment = Path(f"/proc/{engine}/environ").read_text().split("\0")
    assert not seen.exists(), seen.read_text()
    assert {"HF_HUB_DISABLE_TELEMETRY=1", "DO_NOT_TRACK=1"} <= set(environment)


@pytest.mark.anyio
async def test_every_origin_may_ask_where_all_are_allowed_and_read_of_our_defects_too():
    async with client_of(serving_nothing(), cors_origins="*", api_key="first") as client:
        for status, headers in ((401, {}), (500, KEY)):
            answer = await client.post("/embed", headers={**headers, "origin": ORIGIN}, json={"inputs": "a"})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "*")
            assert answer.headers["x-request-id"]


@pytest.mark.anyio
@pytest.mark.parametrize("admin", [{}, {"admin_key": "sesame"}])
@pytest.mark.parametrize(
    "keys", [{}, {"api_key": "first"}, {"api_key_file": "keys"}, {"api_key": "first", "metrics_public": False}]
)
async def test_the_page_says_which_key_each_route_wants(keys, admin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text("first")
    offered = {"ApiKey": KEY, "AdminKey": ADMIN}
    async with client_of(serving_nothing(), **keys, **admin) as client:

        async def opens(method, path, headers):
            return (await client.request(method, path.replace("{name}", "name"), headers=headers)).status_code != 401

        page = (await client.get("/openapi.json")).json()
        wanted = set()
        for path, operations in page["paths"].items():
            for method, operation in operations.items():
                good = [name for name, headers in offered.items() if await opens(method, path, headers)]
                security = [] if await opens(method, path, {}) else [{name: []} for name in good]
                assert operation.get("security", []) == security, path
                assert ("401" in operation["responses"]) == bool(security), path
                wanted.update(*security)
        answer = await client.post("/admin/reload", headers=ADMIN if admin else KEY)
        assert ("/admin/reload" in page["paths"]) == bool(admin) == (answer.status_code != 404)
    assert wanted == {name for name, there in (("ApiKey", keys), ("AdminKey", admin)) if there}
    assert "404" not in page["paths"].get("/admin/reload", {}).get("post", {}).get("responses", {})
    schemes = page["components"].get("securitySchemes", {})
    assert schemes.keys() == wanted
    assert all((scheme["type"], scheme["scheme"]) == ("http", "bearer") for scheme in schemes.values())
