"""Connections: what a slow, greedy or broken client gets, and what it leaves behind."""

import asyncio
import contextlib
import json
import os
import random
import resource
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import uvicorn
from raw_http import Reader, connect, descriptors, exchange, promptness, read, request
from servers import held, running_server, until
from uvicorn.server import ServerState

from app.wire import ABOVE_LIMIT, Wire

pytestmark = pytest.mark.system

TEXT = json.dumps({"inputs": "abc"}).encode()
LONG = json.dumps({"inputs": ["a b c " * 80] * 60}).encode()
CONNECTIONS = 300
CHUNKED = b"POST /embed HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """What the server below has logged."""
    return tmp_path_factory.mktemp("wired") / "log"


@pytest.fixture(scope="module")
def wired(make_checkpoint, log):
    """Hurried with its clients. A task that is left over would keep it from its exit code 0."""
    limits = {"header_timeout": 0.4, "body_timeout": 0.4, "max_connections": CONNECTIONS, "max_body_bytes": 200_000}
    limits |= {"model": make_checkpoint(), "grace_period": 15}
    with log.open("wb") as stderr, promptness(), running_server(stderr=stderr.fileno(), **limits) as server:
        yield server


@pytest.fixture
def tidy(wired):
    """The same, and each connection that a test has opened must be gone in the end."""
    wired.post("/embed", inputs="abc")
    before = descriptors(wired)
    yield wired
    until(lambda: descriptors(wired) <= before)
    metrics = wired.client.get("/metrics").text
    assert "bertd_queue_rows 0.0" in metrics
    assert "bertd_queue_tokens 0.0" in metrics


def metric(server, name: str) -> float:
    """The value of a series, 0 where there is none yet."""
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def refusal(answers, status, word):
    """The message of the only answer, which must be the last on its connection."""
    (answer,) = answers
    assert (answer.status, answer.headers["connection"]) == (status, "close"), answer
    assert answer.headers["content-type"] == "application/json"
    body = json.loads(answer.body)
    assert (set(body), body["error_type"]) == ({"error", "error_type"}, word)
    return body["error"]


@pytest.mark.parametrize(
    "piece", [b"G", b"GET /health HTTP/1.1\r\nHost: x\r\n", b"\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\n\r"]
)
def test_a_head_that_does_not_end_is_answered_408(tidy, piece):
    assert "head" in refusal(exchange(tidy, piece), 408, "Timeout")


def test_a_connection_that_says_nothing_is_closed_without_a_word(tidy):
    assert exchange(tidy) == []


def test_a_second_head_that_does_not_end_is_answered_408(tidy):
    first, *second = exchange(tidy, request("/embed", TEXT) + b"POST /embed HTTP/1.1\r\n")
    assert first.status == 200
    assert "head" in refusal(second, 408, "Timeout")


@pytest.mark.parametrize(
    "piece", [b"POST /embed HTTP/1.1\r\nContent-Length: 20\r\n\r\n", request("/embed", TEXT)[:-1], CHUNKED + b"\r\n3\r\nabc\r\n"]
)
def test_a_body_that_does_not_end_is_answered_408(tidy, piece):
    with connect(tidy) as connection:
        connection.sendall(piece)
        assert "body" in refusal(read(connection, 1), 408, "Timeout")


def test_the_rest_of_a_body_that_was_answered_before_its_end_is_not_waited_for(make_checkpoint):
    with promptness(), running_server(model=make_checkpoint(), body_timeout=0.4, api_key="sesame") as server:
        assert [answer.status for answer in exchange(server, request("/embed", TEXT)[:-1])] == [401]
        with connect(server) as connection:  # one that comes in time belongs to that request, and another may follow
            connection.sendall(request("/embed", TEXT)[:-1])
            assert read(connection, 1)[0].status == 401
            connection.sendall(TEXT[-1:] + request("/health", method="GET"))
            assert read(connection, 1)[0].status == 200
        for version, headers in (("1.1", "Connection: close\r\n"), ("1.0", "")):  # it is sent, and then the answer is read
            with connect(server) as connection:
                head = f"POST /embed HTTP/{version}\r\nHost: x\r\n{headers}Content-Length: 5000000\r\n\r\n"
                connection.sendall(head.encode())
                select.select([connection], [], [])
                connection.sendall(b" " * 5_000_000)
                assert [answer.status for answer in read(connection)] == [401]


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"x" * 70_000,
        b"GET / HTTP/1.1\r\na: " + b"x" * 400_000,
        b"GET / HTTP/1.1\r\n" + b"x" * 400_000,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: %b\r\n" % (b"x" * 7000) * 10 + b"\r\n",
        b"\r\n" * 200_000,
        CHUNKED + b"\r\n1\r\n \r\n0\r\na: " + b"x" * 400_000,
        CHUNKED + b"\r\n1\r\n \r\n0\r\n" + b"a: %b\r\n" % (b"x" * 7000) * 12,
        CHUNKED + b"\r\n1;" + b"x" * 400_000,
    ],
)
def test_a_head_that_is_too_large_is_refused_before_it_is_whole(tidy, head):
    assert "65536 bytes or 100 headers" in refusal(exchange(tidy, head), 431, "Validation")


def test_a_head_of_a_hundred_headers_is_not_too_large(tidy):
    head = b"GET /health HTTP/1.1\r\n" + b"a: %b\r\n" % (b"x" * 600) * 100 + b"\r\n"
    assert exchange(tidy, head, count=1)[0].status == 200


@pytest.mark.parametrize("head", [b"hello\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n", b"GET /\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n\r\n"])
def test_what_is_not_our_http_is_answered_400(tidy, head):
    assert "HTTP/1.1" in refusal(exchange(tidy, head), 400, "Validation")


def test_a_bad_request_is_refused_after_the_answers_to_those_before_it(tidy):
    *good, bad = exchange(tidy, request("/embed", TEXT) * 3 + b"bad\r\n\r\n")
    assert [answer.status for answer in good] == [200, 200, 200]
    refusal([bad], 400, "Validation")
    good, *bad = exchange(tidy, request("/embed", TEXT) + CHUNKED + b"\r\nzz\r\n")
    assert good.status == 200
    refusal(bad, 400, "Validation")


def test_pipelined_requests_are_answered_in_order_and_a_flood_of_them_in_part(tidy):
    inputs = [json.dumps({"inputs": "abcdefghijklmnop"[: n + 1]}).encode() for n in range(16)]
    alone = [tidy.client.post("/embed", content=body).content for body in inputs]
    answers = exchange(tidy, b"".join(request("/embed", body) for body in inputs), count=16)
    assert [answer.body for answer in answers] == alone
    flood = exchange(tidy, request("/embed", TEXT) * 400)
    assert 1 < len(flood) < 40
    assert {answer.status for answer in flood} == {200}
    assert flood[-1].headers["connection"] == "close"


def test_a_client_that_hangs_up_on_pipelined_requests_ends_them_all(tidy):
    """The one that is being answered, and those that wait for that."""

    def count(status: int) -> float:
        return metric(tidy, f'bertd_requests_total{{route="/embed",status="{status}"}}')

    answered, hung_up = count(200), count(499)
    os.kill(tidy.children()[0], signal.SIGSTOP)
    with connect(tidy) as connection:
        connection.sendall(request("/embed", TEXT) * 5)
    until(lambda: count(499) == hung_up + 1)
    os.kill(tidy.children()[0], signal.SIGCONT)
    assert count(200) == answered


def test_a_client_that_pipelines_later_and_hangs_up_ends_the_request_that_is_being_answered(tidy):
    hung_up = 'bertd_requests_total{route="/embed",status="499"}'
    before = metric(tidy, hung_up)
    with held(tidy):
        with connect(tidy) as connection:
            connection.sendall(request("/embed", LONG))
            until(lambda: metric(tidy, "bertd_queue_rows") > 0)  # so that nobody reads for its body any more
            connection.sendall(request("/embed", TEXT) * 2)
        until(lambda: metric(tidy, hung_up) == before + 1)


def test_what_is_pipelined_behind_a_request_is_held_up_to_a_bound_and_answered(tidy):
    large = TEXT + b" " * 150_000
    for body in (LONG, large):
        answers = exchange(tidy, request("/embed", LONG), *[request("/embed", body)] * 3, count=4)
        assert [answer.status for answer in answers] == [200] * 4
    with held(tidy), connect(tidy) as connection:
        connection.sendall(request("/embed", LONG))
        until(lambda: metric(tidy, "bertd_queue_rows") > 0)
        connection.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 32 * 2**20:  # no system takes that much for a server that does not read
                sent += connection.send(request("/embed", TEXT + b" " * 190_000)[sent % 190_000 :])


def test_a_flood_of_pipelined_requests_costs_no_answer_that_was_promised(tidy):
    padded = request("/embed", TEXT + b" " * 100_000)
    with connect(tidy) as connection:
        with held(tidy):
            connection.sendall(request("/embed", TEXT) * 17)
            for _ in range(30):  # more than is read and thrown away at once
                connection.sendall(padded)
        answers = read(connection)
    assert [answer.status for answer in answers] == [200] * 17
    assert answers[-1].headers["connection"] == "close"


def test_a_wish_for_another_protocol_is_ignored_and_the_body_is_read(tidy):
    upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQBAAAAAAIAAAAA\r\n"
    wish = request("/embed", TEXT, headers=upgrade)
    chunked = CHUNKED + upgrade.encode() + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(TEXT), TEXT)
    vector = tidy.client.post("/embed", content=TEXT).content
    for pieces in ([wish], [wish[: -len(TEXT)], TEXT], [chunked], [chunked[:-10], chunked[-10:]]):
        answers = exchange(tidy, *pieces, wish, request("/embed", TEXT), count=3)
        assert [(answer.status, answer.body) for answer in answers] == [(200, vector)] * 3
    bodiless = request("/health", method="GET", headers=upgrade)
    assert [answer.status for answer in exchange(tidy, bodiless * 2, count=2)] == [200, 200]


def test_a_trailer_is_no_header(tidy):
    body = b"\r\n%x\r\n%b\r\n0\r\nx-request-id: of-a-trailer\r\n\r\n" % (len(TEXT), TEXT)
    answers = exchange(tidy, CHUNKED + body, request("/embed", TEXT), count=2)
    assert [answer.status for answer in answers] == [200, 200]
    assert all(answer.headers["x-request-id"] != "of-a-trailer" for answer in answers)


MATRICES = request("/embed_all", json.dumps({"inputs": ["a b c " * 200] * 60}).encode())  # an answer of 10 MB


def connect_narrow(server, size: int) -> socket.socket:
    """A connection that buffers few bytes of an answer."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    connection.settimeout(10)
    connection.connect(server.address)
    return connection


def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(tidy):
    before = descriptors(tidy)
    with connect_narrow(tidy, 2**12) as connection:
        connection.sendall(MATRICES)
        until(lambda: descriptors(tidy) > before)
        until(lambda: descriptors(tidy) == before)


def test_a_client_that_takes_its_answer_slowly_gets_all_of_it(tidy):
    (wanted,) = exchange(tidy, MATRICES, count=1)
    reader = Reader()
    start = time.monotonic()
    with connect_narrow(tidy, 2**16) as connection:
        connection.sendall(MATRICES)
        while not any(answer.whole for answer in reader.answers):
            block = connection.recv(2**16)
            assert block, "it was cut off"
            reader.feed(block)
            time.sleep(0.01)
    assert time.monotonic() - start > 0.8  # longer than a client may pause
    assert reader.answers[0].body == wanted.body


async def test_a_client_that_takes_one_large_block_slowly_gets_all_of_it():
    """In this process, where the system can be told to take little of the block at once, as it does of a larger one."""
    block = bytes(400_000)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(block))]})
        await send({"type": "http.response.body", "body": block})

    config, state = uvicorn.Config(app, http=Wire(10, 0.1, 10, (), refuse=None).protocol(), ws="none"), ServerState()
    config.load()
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        async with await loop.create_server(lambda: config.http_protocol_class(config, state, {}), sock=listener):
            client.setblocking(False)
            await loop.sock_connect(client, listener.getsockname())
            await loop.sock_sendall(client, request("/", method="GET", headers="Connection: close\r\n"))
            taken = b""
            while part := await loop.sock_recv(client, 2**13):
                taken += part
                await asyncio.sleep(0.01)
    assert taken.partition(b"\r\n\r\n")[2] == block


def test_an_answer_to_http_1_0_has_no_chunks_and_ends_with_the_connection(tidy):
    for asked, headers in ((MATRICES, ""), (request("/embed", LONG), "Accept-Encoding: gzip\r\n")):
        asked = asked.replace(b"Host: x\r\n", headers.encode())
        (wanted,) = exchange(tidy, asked, count=1)
        assert wanted.headers["transfer-encoding"] == "chunked"
        (answer,) = exchange(tidy, asked.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert "transfer-encoding" not in answer.headers
        assert (answer.headers["connection"], answer.body) == ("close", wanted.body)


def test_a_refusal_is_whole_before_the_body_that_it_refuses(tidy):
    head = b"POST /embed HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\nContent-Length: 1000000\r\n\r\n"
    with connect(tidy) as connection:
        connection.sendall(head)
        answers = read(connection)
    assert "larger" in refusal(answers, 413, "Validation")
    assert "content-encoding" not in answers[0].headers


INFO = request("/info", method="GET")


@contextlib.contextmanager
def full(server):
    """As many connections as there may be are open; all end with the block."""
    with contextlib.ExitStack() as held:
        statuses = []
        while 503 not in statuses:
            connection = held.enter_context(connect(server))
            connection.sendall(INFO)
            statuses += [answer.status for answer in read(connection, 1)]
        assert CONNECTIONS - 3 <= statuses.count(200) <= CONNECTIONS  # the client of the tests has one, or a few
        yield held


def test_above_the_limit_of_connections_probes_are_answered_and_all_others_told_so(tidy):
    with full(tidy):
        for _ in range(80):
            for refused in (INFO, request("/embed", TEXT)):
                (told,) = exchange(tidy, refused)
                assert (told.status, told.headers["connection"], told.headers["retry-after"]) == (503, "close", "1")
            (probed,) = exchange(tidy, request("/health", method="GET"))
            assert (probed.status, probed.headers["connection"]) == (200, "close")
        for path in ("/ready", "/metrics"):
            assert [answer.status for answer in exchange(tidy, request(path, method="GET"))] == [200]
    until(lambda: [answer.status for answer in exchange(tidy, INFO, count=1)] == [200])


def test_who_asks_nothing_above_the_limit_of_connections_is_soon_gone(tidy):
    with full(tidy) as held:
        silent = [held.enter_context(connect(tidy)) for _ in range(100)]
        first, _, _ = select.select(silent, [], [], 30)  # those that are cut at once
        assert min(map(silent.index, first)) >= ABOVE_LIMIT - 1  # who was refused last may still count as heard
        assert [read(connection) for connection in silent] == [[]] * 100
        assert [answer.status for answer in exchange(tidy, request("/health", method="GET"))] == [200]


def test_running_out_of_descriptors_closes_new_connections_and_nothing_else(tidy):
    before = resource.prlimit(tidy.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(tidy.process.pid, resource.RLIMIT_NOFILE, (descriptors(tidy) + 10, before[1]))
    try:
        held = [connect(tidy) for _ in range(100)]
        assert tidy.post("/embed", inputs="abc").status_code == 200
        for connection in held:
            connection.close()
        until(lambda: [answer.status for answer in exchange(tidy, request("/embed", TEXT), count=1)] == [200])
    finally:
        resource.prlimit(tidy.process.pid, resource.RLIMIT_NOFILE, before)


def test_the_limit_of_connections_keeps_to_that_of_descriptors():
    code = (
        "import resource; from app.server import connection_limit as limit; limits = []\n"
        "for soft, hard in ((4000, 4000), (500, 3000), (500, 600), (50, 50)):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)); limits.append(limit(1000))\n"
        "print(limits)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1000, 1000, 472, 1]"
    assert "472 connections at most, not 1000" in done.stderr


class Dribbler:
    """Sends a byte at a time, and reads what comes back."""

    def __init__(self, server, start: bytes, rest: bytes) -> None:
        self.socket = connect(server)
        self.socket.sendall(start)
        self.rest = iter(rest)
        self.reader = Reader()
        self.ended = False

    def step(self, readable: bool) -> None:
        try:
            if readable and not self._read():
                self.ended = True
            else:
                self.socket.send(bytes([next(self.rest)]))
        except (BrokenPipeError, ConnectionResetError):
            self.ended = True
        if self.ended or any(answer.whole for answer in self.reader.answers):
            self.ended = True
            self.socket.close()

    def _read(self) -> bytes:
        block = self.socket.recv(65536)
        self.reader.feed(block)
        return block


def dribble(dribblers: list[Dribbler], started: threading.Event) -> None:
    with selectors.DefaultSelector() as selector:
        for dribbler in dribblers:
            selector.register(dribbler.socket, selectors.EVENT_READ, dribbler)
        while selector.get_map():
            ready = {key.data for key, _ in selector.select(0.02)}
            for key in list(selector.get_map().values()):
                key.data.step(key.data in ready)
                if key.data.ended:
                    selector.unregister(key.fileobj)
            started.set()


def test_200_clients_that_dribble_are_ended_and_keep_nobody_from_an_answer(tidy):
    wanted = tidy.client.post("/embed", content=TEXT).content
    starts = [(b"", b"GET /health HTTP/1.1\r\n" + b"x" * 10_000), (request("/embed", b" " * 10_000)[:-10_000], b" " * 10_000)]
    dribblers = [Dribbler(tidy, *starts[n % 2]) for n in range(200)]
    started = threading.Event()
    thread = threading.Thread(target=dribble, args=(dribblers, started))
    thread.start()
    started.wait(10)
    answered = 0
    while thread.is_alive():
        assert tidy.client.post("/embed", content=TEXT).content == wanted
        answered += 1
    assert answered
    assert {answer.status for dribbler in dribblers for answer in dribbler.reader.answers} == {408}
    assert sum(len(dribbler.reader.answers) for dribbler in dribblers) > 150  # the others were cut while they sent


def test_500_clients_that_hang_up_leave_nothing_behind(tidy):
    wanted = tidy.client.post("/embed", content=TEXT).content
    dice = random.Random(5)
    whole = request("/embed", LONG)
    head = whole.index(b"\r\n\r\n") + 4
    ends = {"head": lambda: dice.randrange(head), "body": lambda: dice.randrange(head, len(whole)), "answer": lambda: len(whole)}
    for n in range(500):
        point = list(ends)[n % 3]
        with connect(tidy) as connection:
            connection.sendall(whole[: ends[point]()])
            if n % 2:  # a reset in place of an orderly end
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            if n % 50 == 2:  # while it waits
                tidy.client.get("/health")
    assert tidy.client.post("/embed", content=TEXT).content == wanted


def test_what_the_wire_refuses_is_counted_and_logged(tidy, log):
    series = ['bertd_refused_total{reason="Validation"', 'bertd_requests_total{route="none",status="400"']
    before = [metric(tidy, name) for name in series]
    (answer,) = exchange(tidy, b"hello\r\n\r\n")
    assert [metric(tidy, name) for name in series] == [count + 1 for count in before]
    until(lambda: answer.headers["x-request-id"] in log.read_text())
    (line,) = (json.loads(line) for line in log.read_text().splitlines() if answer.headers["x-request-id"] in line)
    assert (line["message"], line["error"]) == ("- none 400", "Validation")


def test_bodies_that_come_to_too_much_together_are_refused_until_some_are_done(make_checkpoint):
    with running_server(model=make_checkpoint(), max_body_bytes=1000) as server, contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connect(server)) for _ in range(32)]
        text = "a " * 20  # with it there is more than 32,000 bytes
        for connection in waiting:
            connection.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b" " * 999)

        def is_full():
            return server.post("/embed", inputs=text).status_code == 429

        until(is_full)
        refused = server.post("/embed", inputs=text)
        assert refused.json()["error_type"] == "Overloaded"
        assert refused.headers["retry-after"] == "1"
        assert [server.client.get(path).status_code for path in ("/health", "/ready", "/info")] == [200, 200, 200]
        for connection in waiting:
            connection.close()
        until(lambda: not is_full())
        assert server.post("/embed", inputs=text).status_code == 200
