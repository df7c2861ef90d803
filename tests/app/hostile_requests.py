"""The table of hostile requests, by family: bytes to send, and the statuses that may come back."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raw_http import request

from app.main import create_api, refusal

SCHEMA = create_api(refusal).openapi()
CLIENT_TEXT = "zebra7"  # stands in whatever is a client's own; no refusal may hold it
TEXT = json.dumps({"inputs": "abc"}).encode()
SIZE = len(TEXT)
MAX_BODY = 100_000
INVALID = {400, 422}  # 400 in the dialects that know no 422
REFUSED = {400, 404, 405, 406, 409, 413, 422, 424}
EITHER = {200} | REFUSED

VALID: dict[str, dict[str, Any]] = {
    "POST /embed": {"inputs": "a"},
    "POST /embed_all": {"inputs": "a"},
    "POST /embed_sparse": {"inputs": "a"},
    "POST /embed_chunks": {"inputs": "a", "chunk_tokens": 4},
    "POST /similarity": {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
    "POST /tokenize": {"inputs": "a"},
    "POST /decode": {"ids": [5]},
    "POST /v1/embeddings": {"input": "a"},
    "POST /predict": {"inputs": "a"},
    "POST /rerank": {"query": "a", "texts": ["b"]},
    "POST /v1/rerank": {"query": "a", "documents": ["b"]},
    "POST /v2/rerank": {"query": "a", "documents": ["b"]},
    "POST /score": {"text_1": "a", "text_2": "b"},
    "POST /v1/score": {"text_1": "a", "text_2": "b"},
    "POST /classify": {"input": "a", "labels": ["b", "c"]},
    "POST /": {"inputs": "a"},
    "POST /invocations": {"inputs": "a"},
    "PUT /classifiers/x": {"examples": [{"text": "a", "label": "b"}]},  # one label: never fitted
}
"""Every route that reads a body, with one that it can read."""


@dataclass(frozen=True)
class Case:
    """Pieces to send one after the other over one connection, the statuses that may come back, and how many answers to wait
    for. Without a status, nothing at all may come back."""

    statuses: frozenset[int]
    pieces: tuple[bytes, ...]
    count: int


def case(statuses: set[int], *pieces: bytes, count: int = 1) -> Case:
    return Case(frozenset(statuses), pieces, count)


def to(route: str, body: bytes) -> bytes:
    method, path = route.split()
    return request(path, body, method)


def embed(body: bytes = TEXT, **options: str) -> bytes:
    return request("/embed", body, **options)


GET = request("/health", method="GET")
NO_JSON = [
    b"",
    b" ",
    b"\0",
    b"{",
    b"}",
    b"[",
    b'{"inputs"',
    b'{"inputs": ',
    b'{"inputs": "zebra7',
    b'{"inputs": "zebra7"',
    b'{"inputs": "zebra7"}}',
    b'{"inputs": "zebra7"} {}',
    b'{"inputs": "zebra7",}',
    b'{"inputs" "zebra7"}',
    b"{'inputs': 'zebra7'}",
    b'{inputs: "zebra7"}',
    b'{"inputs": zebra7}',
    b'{"inputs": "zebra7\n"}',
    b'{"inputs": "zebra7\0"}',
    b'{"inputs": "\\zebra7"}',
    b'{"inputs": "\\u12"}',
    b'{"inputs": "\\ud800 zebra7"}',  # half of a surrogate pair: high, low, and two highs
    b'{"inputs": "\\udc00 zebra7"}',
    b'{"inputs": "\\ud800\\ud800"}',
    b'{"inputs": "\xed\xa0\x80"}',  # the same in UTF-8
    b'{"inputs": "\xff\xfe"}',
    b'{"inputs": "\xc0\xaf"}',  # overlong
    b'{"inputs": "\xe0\x80\xaf"}',
    b'{"inputs": "\xc3"}',  # cut off
    b'{"inputs": "\xf4\x90\x80\x80"}',  # beyond Unicode
    b'{"\xff": "zebra7"}',
    b'{"inputs": 01}',
    b'{"inputs": +1}',
    b'{"inputs": .5}',
    b'{"inputs": 0x10}',
    b'{"inputs": tru}',
    b'{"inputs": /* */ "zebra7"}',
    b'\xef\xbb\xbf{"inputs": "zebra7"}',
    '{"inputs": "zebra7"}'.encode("utf-16"),
    '{"inputs": "zebra7"}'.encode("utf-32-le"),
    b"inputs=zebra7&truncate=true",
    b'--zebra7\r\nContent-Disposition: form-data; name="inputs"\r\n\r\nzebra7\r\n--zebra7--\r\n',
    b"<inputs>zebra7</inputs>",
    b"\x1f\x8b\x08\x00" + b"\0" * 30,
    b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x06zebra7\x94.",  # a pickle
    b"[" * 50_000,
    b'{"inputs":' * 9_000,
    b"[" * 50_000 + b"]" * 50_000,
    b'{"a":' * 9_000 + b"1" + b"}" * 9_000,
]


def bodies_that_are_no_json() -> Iterator[Case]:
    for route in VALID:
        for content in NO_JSON:
            yield case(INVALID, to(route, content))


def json_of_another_kind() -> Iterator[Case]:
    for route in VALID:
        for content in (b"null", b"true", b"1", b'"zebra7"', b"[]", b"[{}]", b"-0", b"1e999", b"NaN", b"1" * 50_000):
            yield case(INVALID, to(route, content))
        yield case(INVALID | {424}, to(route, b"{}"))


VALUES = [
    *("null", "true", "0", "-1", "1.5", "1e400", "NaN", "1" * 400, str(2**63)),
    *('""', f'"{"zebra7" * 1000}"', '"zebra7\\u0000"', '"\\r\\nzebra7: 1"', '"../../etc/passwd"', '"{0.__class__}"'),
    *("[]", "[[]]", '["zebra7", null]', "[-1]", "[99999999]", "[[[1]]]", "{}", '{"zebra7": 1}', '{"a": ["zebra7"], "b": []}'),
]


def fields_of(schema: Any) -> set[str]:
    """The names of all properties of a schema, through references and unions."""
    if isinstance(schema, list):
        return set().union(*map(fields_of, schema))
    if "$ref" in schema:
        return fields_of(SCHEMA["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]])
    return set(schema.get("properties", ())) | fields_of([*schema.get("anyOf", []), *schema.get("oneOf", [])])


def schema_of(route: str) -> Any:
    method, path = route.lower().split()
    described = SCHEMA["paths"][path.replace("/x", "/{name}")][method]
    return described["requestBody"]["content"]["application/json"]["schema"]


def wrong_values_in_every_field() -> Iterator[Case]:
    for route, body in VALID.items():
        for name in sorted(fields_of(schema_of(route))):
            rest = json.dumps({key: value for key, value in body.items() if key != name})[1:-1]
            for value in VALUES:
                content = f'{{"{name}": {value}{", " + rest if rest else ""}}}'
                yield case(EITHER, to(route, content.encode()))


def odd_and_valid() -> Iterator[Case]:
    for content in (
        b'{"inputs": "abc", "inputs": "ab"}',
        b'{"inputs": "a\\u0000b"}',
        b'{"inputs": "\\ud83d\\ude00"}',
        b'{"inputs": "abc", "zebra7": {"a": [1, 2, {"b": null}]}}',
        b' \r\n\t{"inputs":\n"abc"}\n\n',
        '{"inputs": "\u202ea\u0301\u0301\u0301\ufdfa\u200b\ufeff"}'.encode(),
        b'{"inputs": "%b"}' % (b"a" * 90_000),
        b'{"inputs": [%b "a"]}' % (b'"a", ' * 1000),
    ):
        yield case({200}, embed(content))


def sized(length: object, body: bytes = TEXT, more: str = "") -> bytes:
    return f"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length:{length}\r\n{more}\r\n".encode() + body


def lengths() -> Iterator[Case]:
    for length in (f"{SIZE}", f"   {SIZE}   ", f"{SIZE:030}"):
        yield case({200}, sized(length))
    for length in (
        "",
        " ",
        "-1",
        f"-{SIZE}",
        f"+{SIZE}",
        f"{SIZE}.0",
        "1e1",
        "0x10",
        "zebra7",
        "१६",
        f"{SIZE} {SIZE}",
        f"{SIZE},{SIZE}",
    ):
        yield case({400}, sized(length))
    for length in ("9" * 20, "9" * 400, str(2**64), f"{SIZE}\0", f"{SIZE}\x0b"):
        yield case({400}, sized(length))
    for number in (MAX_BODY + 1, 2**31, 2**32, 2**63, 2**64 - 1):
        yield case({413}, sized(number))
    for number in range(1, 8):
        yield case({408}, sized(SIZE + number))
        yield case({422, 400}, sized(SIZE - number), count=2)  # the rest is taken for another request, and is none
    yield case({422, 400}, sized(0), count=2)
    yield case({422}, b"POST /embed HTTP/1.1\r\nHost: x\r\n\r\n")
    yield case({422, 400}, b"POST /embed HTTP/1.1\r\nHost: x\r\n\r\n" + TEXT, count=2)
    for second in (SIZE, SIZE + 1, 0, -1):
        yield case({400}, sized(SIZE, more=f"Content-Length: {second}\r\n"))
    for coding in ("chunked", "identity", "gzip, chunked", "zebra7"):
        for body in (TEXT, b"0\r\n\r\n"):
            yield case({400}, sized(SIZE, body, more=f"Transfer-Encoding: {coding}\r\n"))


def chunked(data: bytes, coding: str = "chunked") -> bytes:
    return f"POST /embed HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: {coding}\r\n\r\n".encode() + data


ONE = b"%x\r\n%b\r\n" % (SIZE, TEXT)  # chunk
LAST = b"0\r\n"


def chunks() -> Iterator[Case]:
    for data in (
        ONE + LAST,
        b"".join(b"1\r\n%c\r\n" % byte for byte in TEXT) + LAST,
        b"".join(b"00000001;a=b\r\n%c\r\n" % byte for byte in TEXT) + LAST,
        ONE + b"0;last=zebra7\r\n",
        ONE + LAST + b"Authorization: zebra7\r\nContent-Type: zebra7\r\n",
    ):
        yield case({200}, chunked(data + b"\r\n"))
    yield case({200}, chunked(ONE + LAST + b"\r\n", "Chunked"))
    yield case({422}, chunked(LAST + b"\r\n"))
    for data in (ONE, ONE[:-1], ONE[:-3], b"", b"5", b"5\r", b"5\r\n", b"1;" + b"a" * 1000):
        yield case({408}, chunked(data))
    for data in (LAST, LAST + b"\r", LAST + b"a: b\r\n"):
        yield case({408}, chunked(ONE + data))
    for size in (
        b"",
        b" ",
        b"-1",
        b"zz",
        b"0x10",
        b"1 1",
        b"+1",
        b"1.5",
        b"f" * 16,
        b"f" * 17,
        b"1" * 400,
        b"\xff",
        b"\0",
        b";a",
        b"1\0",
    ):
        yield case({400, 408, 413}, chunked(size + b"\r\n" + TEXT + b"\r\n" + LAST + b"\r\n"))
    for data in (
        b"1\r\nab\r\n",
        b"5\n12345\n",
        b"1\n\n",
        b"\r\n1\r\na\r\n",
        b"1\r\na0\r\n\r\n",
        b"%x\r\n%b" % (70_000, b" " * 70_001),
    ):
        yield case({400}, chunked(data + LAST + b"\r\n"))
    for trailer in (b" zebra7: b", b"\xff: b", b"Content-Length: 5", b"Transfer-Encoding: x"):
        yield case({400}, chunked(ONE + LAST + trailer + b"\r\n\r\n"))
    for data in (b"1;" + b"a" * 300_000, ONE + LAST + b"a: " + b"b" * 300_000, ONE + LAST + b"zebra7: b\r\n" * 20_000):
        yield case({431}, chunked(data))
    for data in (b"20000\r\n" + b" " * 0x20000 + b"\r\n", b"ffffffff\r\n" + b" " * 200_000):
        yield case({413}, chunked(data))
    for coding in ("", "gzip", "gzip, chunked", "identity", "chunked, gzip", "chunked, chunked", "chunked, identity", "chunkedx"):
        yield case({400}, chunked(ONE + LAST + b"\r\n", coding))
    for coding in ("x chunked", '"chunked"', "\x0bchunked", "chunked\r\nTransfer-Encoding: identity"):
        yield case({400}, chunked(ONE + LAST + b"\r\n", coding))
    old = chunked(ONE + LAST + b"\r\n").replace(b"HTTP/1.1", b"HTTP/1.0")
    yield case({200, 400}, old)
    yield case({400}, old.replace(b"Host: x", b"Content-Length: 3"))


BAD_LINES = rb"""
GET|GET |GET /health|GET /health |GET /health HTTP|GET /health HTTP/|GET /health HTTP/1|GET /health HTTP/11|GET /health HTTP/1.1.1
GET /health HTTP/0.9|GET /health HTTP/1.2|GET /health HTTP/2.0|GET /health HTTP/3.0|GET /health HTTP/9.9|GET /health  HTTP/1.1 x
GET /health http/1.1|GET /health HTTPS/1.1|GET /health ICE/1.0|GET /a b HTTP/1.1| GET /health HTTP/1.1|get /health HTTP/1.1
GET health HTTP/1.1|GET ../health HTTP/1.1|GET ?a HTTP/1.1|GET #a HTTP/1.1|GET http:// HTTP/1.1|GET http://zebra7 HTTP/1.1
GET * HTTP/1.1|GET zebra7:80 HTTP/1.1|GET javascript:alert(1) HTTP/1.1|PRI * HTTP/2.0|G /health HTTP/1.1|BREW /health HTTP/1.1
CONNECT zebra7:443 HTTP/1.1|CONNECT /embed HTTP/1.1|CONNECT * HTTP/1.1|CONNECT http://zebra7 HTTP/1.1|OPTIONS * HTTP/1.1
"""
GOOD_LINES = rb"""
GET /health HTTP/1.0|GET  /health HTTP/1.1|GET /health RTSP/1.0|GET http://zebra7/health HTTP/1.1|GET //health/ HTTP/1.1
GET /health?a=b&a=c&%zz=%00 HTTP/1.1
"""


def request_lines() -> Iterator[Case]:
    for line in (*_parts(BAD_LINES), b"GET\t/health\tHTTP/1.1", b"GET /\0 HTTP/1.1", b"GET /a\x01 HTTP/1.1", b"\0GET / HTTP/1.1"):
        yield case({400, 404, 408}, line + b"\r\nHost: x\r\n\r\n")
    for line in (b"GET /\xff HTTP/1.1", b"GET /\xc3\xa9 HTTP/1.1"):
        yield case({400}, line + b"\r\nHost: x\r\n\r\n")
    for line in _parts(GOOD_LINES):
        yield case({200}, line + b"\r\nHost: x\r\n\r\n")
    yield case({200}, b"\r\n\r\n" + GET)
    yield case({200}, GET.replace(b"Host: x\r\n", b""))
    for end in (b"\n", b"\r"):
        yield case({400, 408}, GET.replace(b"\r\n", end))
    yield case({404}, b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\n\r\n")
    yield case({431}, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")


def _parts(table: bytes) -> list[bytes]:
    return [part for line in table.strip(b"\n").split(b"\n") for part in line.split(b"|")]


PATHS = r"""
/../etc/passwd /..%2f..%2fetc/passwd /%2e%2e/%2e%2e/etc/passwd /embed/.. /static-offline-docs/../../app/cli.py /.git/config
/static-offline-docs/..%2f..%2fcli.py /static-offline-docs/%2e%2e/%2e%2e/x /static-offline-docs//etc/passwd /v1 /\embed
/% /%zz /%00 /embed%00 /%ff%fe /%ed%a0%80 /%c0%af /%25252e /embed;a=b /EMBED /embed.json /embed%20 /zebra7 /zebra7/zebra7
/%0d%0aset-cookie:zebra7 /$%7bjndi:ldap://zebra7%7d /v1/models/zebra7 /v1/models/..%2f..%2fx /v1/models/%00 /models/%ff
"""


def paths() -> Iterator[Case]:
    for path in (*PATHS.split(), "/v1/models/" + "a" * 5000):
        yield case({404}, request(path, method="GET"))
        yield case({404, 405}, request(path, TEXT))


NAMES = "zebra7%20b zebra7%00 .. %2e%2e ..%2fx a%2fb %00 %ff con nul.x -a .a a..b * a:b ~ %e2%80%ae"
PAIR = b'{"examples": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]}'


def names_of_classifiers() -> Iterator[Case]:
    for name in (*NAMES.split(), "a" * 65):
        for method, body in (("GET", b""), ("DELETE", b""), ("PUT", PAIR)):
            yield case({404, 405, 422}, request(f"/classifiers/{name}", body, method))
        yield case(REFUSED, request("/classify", json.dumps({"classifier": name, "input": "a"}).encode()))


QUERIES = "details=zebra7 details= details=2 partial=zebra7 details=true&details=false details=%ff &&& ="


def queries() -> Iterator[Case]:
    for query in (*QUERIES.split(), "a" * 9000):
        for path in ("/embed", "/embed_all", "/similarity", "/embed_chunks", "/"):
            yield case(EITHER, request(f"{path}?{query}", json.dumps(VALID[f"POST {path}"]).encode()))


METHODS = "GET POST PUT DELETE OPTIONS TRACE PATCH PROPFIND LOCK PURGE M-SEARCH SOURCE"


def methods() -> Iterator[Case]:
    for path, described in SCHEMA["paths"].items():
        for method in METHODS.split():
            if method.lower() not in described:
                yield case({404, 405}, request(path.replace("{name}", "x"), method=method))


BAD_HEADERS = rb"zebra7|: b| a: b|a : b|a b: c|a(: b|(a): b"
HEADERS: dict[str, tuple[str, ...]] = {
    "Host": ("", "zebra7", "a, b", "a\r\nHost: b", "[::1", "a" * 9000),
    "Content-Type": ("", "zebra7", "text/xml", "application/json; charset=utf-7", "multipart/form-data", "a/b; c=\xff"),
    "Content-Encoding": ("gzip", "zebra7"),
    "Accept": ("", "zebra7", "*/*", "application/octet-stream;q=nan", "application/safetensors;q=-1", ";;;,,,q=", "a/b;q=1e999"),
    "Accept-Encoding": (
        "",
        "zebra7",
        "gzip;q=nan",
        "zstd;q=inf",
        "gzip;q=-1",
        ";q=1",
        "*;q=0",
        "gzip;q",
        "gzip;q=\xff",
        "," * 9000,
    ),
    "Authorization": ("", "zebra7", "Bearer", "Bearer \xff\xfe", "Basic " + "a" * 9000),
    "X-Request-Id": ("", "zebra7" * 100, "\xff", "a b", "\t"),
    "Connection": ("zebra7", "close, keep-alive", "keep-alive", ",,,", "upgrade", "te, trailers", "content-length"),
    "Upgrade": ("websocket", "h2c", "zebra7"),
    "Expect": ("100-continue", "zebra7", "100-continue, 100-continue", "200-ok"),
    "Origin": ("null", "http://zebra7"),
    "Range": ("bytes=0-1", "bytes=-1,zebra7"),
    "If-None-Match": ("*", "zebra7"),
    "Forwarded": ("for=zebra7", "proto=https;host=zebra7"),
    "X-Forwarded-For": ("zebra7", "1.1.1.1, " * 900),
    "X-Forwarded-Prefix": ("/zebra7",),
    "X-HTTP-Method-Override": ("DELETE", "zebra7"),
    "Cookie": ("a=b; " * 1000, "zebra7"),
    "Trailer": ("Content-Length",),
    "TE": ("trailers, chunked;q=0.5",),
    "Max-Forwards": ("0", "-1", "zebra7"),
}
WEBSOCKET = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZQ==\r\n"


def headers() -> Iterator[Case]:
    for header in (*BAD_HEADERS.split(b"|"), b"a\0: b", b"\xff: b", b"a: b\0c", b"a: b\x01", b"a: b\x7f", b"Host: x\0"):
        yield case({200, 400}, GET.replace(b"Host: x", header))
    for header in (b"a: b\r\n c", b"a: b\r\n\tc", b"a: b\rc: d", b"a: b\nc: d"):
        yield case({200, 400}, GET.replace(b"Host: x", header))
    for name, values in HEADERS.items():
        for value in values:
            yield case({200}, embed(headers=f"{name}: {value}\r\n"))
    for path in ("/", "/embed", "/health", "/zebra7"):
        yield case({200, 404, 405}, request(path, method="GET", headers=WEBSOCKET))
    yield case({200}, embed(headers=WEBSOCKET))
    yield case({408}, embed(headers="Expect: 100-continue\r\n")[:-SIZE])
    yield case({413}, sized(MAX_BODY + 1, b"", more="Expect: 100-continue\r\n"))
    for count, size in ((101, 1), (1000, 1), (100_000, 1), (20, 9000), (1, 70_000), (1, 300_000), (2, 40_000)):
        yield case({431}, GET.replace(b"Host: x\r\n", b"zebra7: %b\r\n" % (b"a" * size) * count))
    yield case({431}, b"GET /health HTTP/1.1\r\n" + b"zebra7" * 100_000)


def pipelines() -> Iterator[Case]:
    for count in (2, 5, 16):
        yield case({200}, embed() * count, count=count)
    yield case({200}, embed() * 1000, count=17)
    yield case({200}, embed(headers="Connection: close\r\n") + GET)
    yield case({200}, *[bytes([byte]) for byte in embed()])
    yield case({200, 400}, embed() + b"zebra7\r\n\r\n", count=2)
    yield case({200, 400}, chunked(ONE + LAST + b"\r\n") + chunked(b"zebra7\r\n"), count=2)
    yield case({200, 408}, embed() + b"GET /hea", count=2)
    yield case({422, 200}, embed(b"{") + GET, count=2)
    yield case({404, 405, 200}, request("/zebra7", TEXT) + embed(method="PATCH") + GET, count=3)
    yield case({413}, sized(MAX_BODY + 1) + GET)


TLS = "16030100a5010000a10303", "160301" + "5a" * 500, "802e0100020015000000100100800200"
BINARY = "0000000804d2162f", "030000130ee0" + "00" * 13, "0d0a0d0a000d0a515549540a", "00" * 1000, "ff" * 1000
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LINES = rb"SSH-2.0-zebra7|EHLO zebra7|stats|PROXY TCP4 1.1.1.1 1.1.1.1 1 1|HTTP/1.1 200 OK|*1|$4|+OK"


def other_protocols() -> Iterator[Case]:
    dice = random.Random(7)
    for data in map(bytes.fromhex, (*TLS, *BINARY)):
        yield case({400}, data)
    for data in (PREFACE, PREFACE + bytes(9), *(line + b"\r\n" for line in LINES.split(b"|"))):
        yield case({400}, data)
    for size in (1, 10, 100, 1000, 10_000, 100_000):
        yield case({400, 408}, dice.randbytes(size))
    for data in (b"\r\n", b"G", b"POST", b"POST /embed HTTP/1.1\r\n", b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 1"):
        yield case({408}, data)
    yield case(set(), b"")


FAMILIES = {
    family.__name__: list(family())
    for family in (
        *(bodies_that_are_no_json, json_of_another_kind, wrong_values_in_every_field, odd_and_valid),
        *(lengths, chunks, request_lines, paths, names_of_classifiers, queries, methods, headers, pipelines, other_protocols),
    )
}
