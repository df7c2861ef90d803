"""How the process ends: after a signal, after a second one, and without a parent."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from raw_http import connect, exchange, read, request
from servers import BERTD, running_server, until

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
REFUSALS = {"/embed": "error_type", "/v1/embeddings": "code", "/v1/rerank": "message", "/score": "code"}
ROUTES = {path: json.dumps({"inputs": "abc", "input": "abc"}).encode() for path in REFUSALS}
TEXT = ROUTES["/embed"]
ONE_BY_ONE = {"threads": 1, "max_batch_tokens": 5}  # one text, of five tokens, is with the engine; all others wait


def queue_rows(server) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("bertd_queue_rows "))


@pytest.fixture
def sent() -> Iterator[Callable[..., socket.socket]]:
    """A function that sends bytes over a connection of their own, which is closed after the test."""
    with contextlib.ExitStack() as stack:

        def send(server, data: bytes) -> socket.socket:
            connection = stack.enter_context(connect(server))
            connection.sendall(data)
            return connection

        yield send


def hold(server, sent, count: int) -> list[socket.socket]:
    """Connections with a request each that the server has accepted and can't answer: its engine stands still."""
    os.kill(server.children()[0], signal.SIGSTOP)
    connections = [sent(server, request("/embed", TEXT)) for _ in range(count)]
    until(lambda: queue_rows(server) == count - 1)  # and one is with the engine
    return connections


def terminate(server) -> None:
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.client.get("/ready").status_code == 503)


def gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def assert_refused(answer, path="/embed"):
    assert (answer.status, answer.headers["connection"], answer.headers["retry-after"]) == (503, "close", "1")
    assert f'"{REFUSALS[path]}":' in answer.body.decode()
    assert "stopping" in answer.body.decode()


def test_what_was_accepted_is_answered_and_what_is_new_is_refused(make_checkpoint, sent):
    with running_server(model=make_checkpoint(), **ONE_BY_ONE) as server:
        vector = server.client.post("/embed", content=TEXT).content
        kept = sent(server, request("/health", method="GET"))
        assert read(kept, 1)[0].status == 200
        half = sent(server, request("/embed", TEXT)[:-1])
        (engine,) = server.children()
        accepted = [half, *hold(server, sent, 5)]

        terminate(server)
        end = time.monotonic() + 0.3  # well after the moment when the server would have closed its port
        while time.monotonic() < end:
            for path, body in ROUTES.items():
                (answer,) = exchange(server, request(path, body))
                assert_refused(answer, path)
        kept.sendall(request("/embed", TEXT))
        assert_refused(*read(kept))
        for public in ("/health", "/metrics"):
            assert server.client.get(public).status_code == 200
        assert server.process.poll() is None

        half.sendall(TEXT[-1:])
        os.kill(engine, signal.SIGCONT)
        for connection in accepted:
            (answer,) = read(connection)
            assert (answer.status, answer.body, answer.headers["connection"]) == (200, vector, "close")
        assert server.process.wait(10) == 0
    assert gone(engine)


def test_every_request_under_load_is_answered_200_or_refused_503(make_checkpoint):
    outcomes: list[list[object]] = [[] for _ in range(8)]
    answered = threading.Semaphore(0)

    def ask(client: httpx.Client, outcomes: list[object]) -> None:
        while outcomes[-1:] in ([], [200]):
            try:
                answer = client.post("/embed", content=TEXT)
            except (httpx.NetworkError, httpx.RemoteProtocolError):  # the port is closed, or was before this was accepted
                outcomes.append("closed")
            else:
                refused = (answer.headers.get("connection"), answer.headers.get("retry-after")) == ("close", "1")
                outcomes.append("refused" if answer.status_code == 503 and refused else answer.status_code)
            answered.release()

    with running_server(model=make_checkpoint()) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=server.url, timeout=20)) for _ in outcomes]
        threads = [threading.Thread(target=ask, args=arguments) for arguments in zip(clients, outcomes, strict=True)]
        for thread in threads:
            thread.start()
        for _ in range(100):
            assert answered.acquire(timeout=10)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        for thread in threads:
            thread.join(20)
    assert sum(map(len, outcomes)) >= 100
    assert {outcome for each in outcomes for outcome in each[:-1]} == {200}
    assert {each[-1] for each in outcomes} <= {"refused", "closed"}


def test_a_second_signal_cuts_off_what_is_left(make_checkpoint, capfd, sent):
    with running_server(exit_code=1, model=make_checkpoint(), **ONE_BY_ONE, grace_period=1000) as server:
        (engine,) = server.children()
        held = hold(server, sent, 3)
        terminate(server)
        server.process.send_signal(signal.SIGINT)
        assert [read(connection) for connection in held] == [[], [], []]
        server.process.wait(20)
    assert gone(engine)
    assert "stopped before 3 requests were answered" in capfd.readouterr().err


def test_the_grace_period_cuts_off_what_is_left(make_checkpoint, sent):
    with running_server(exit_code=1, model=make_checkpoint(), **ONE_BY_ONE, grace_period=0.3) as server:
        (engine,) = server.children()
        held = hold(server, sent, 2)
        server.process.send_signal(signal.SIGTERM)
        assert [read(connection) for connection in held] == [[], []]
        server.process.wait(20)
    assert gone(engine)


def test_a_server_without_requests_ends_at_once_whatever_its_connections_do(make_checkpoint, sent):
    with running_server(model=make_checkpoint(), grace_period=1000, header_timeout=1000) as server:
        connections = [sent(server, start) for start in (b"", b"POST /embed HT", request("/health", method="GET"))]
        read(connections[-1], 1)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert [connection.recv(1) for connection in connections] == [b"", b"", b""]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("send", [os.kill, os.killpg])  # a supervisor sends it to the process, a terminal to the group
@pytest.mark.parametrize("loaded", ["python", "numpy", "libtorch_cpu", "_kernels"])  # by the engine when the signal comes
def test_a_server_that_is_stopped_while_it_starts_leaves_nothing_behind(make_checkpoint, number, send, loaded):
    command = [*BERTD, "serve", "--port", "0", "--model", str(make_checkpoint())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, process_group=0, **pipes) as server:
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        until(lambda: children.read_text() != "")
        engine = int(children.read_text())
        until(lambda: loaded in Path(f"/proc/{engine}/maps").read_text())
        send(server.pid, number)
        banner, errors = server.communicate(timeout=20)
    assert errors == ""
    assert server.returncode == (0 if banner else 128 + number)  # the signal may come when it is ready after all
    until(lambda: gone(engine))


SIGNALLED = """
import os, sys
from app import cli
from app.frames import FrameProtocol
update = FrameProtocol.buffer_updated
def update_first(protocol, count):
    FrameProtocol.buffer_updated = update
    os.kill(os.getpid(), int(sys.argv[1]))
    update(protocol, count)
FrameProtocol.buffer_updated = update_first
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["serve", "embed"])
def test_a_signal_is_heard_wherever_it_comes(make_checkpoint, tmp_path, number, command):
    """Also in a callback of the event loop, which may swallow what a handler raises."""
    texts = tmp_path / "texts.txt"
    texts.write_text("abc", encoding="utf-8")
    options = ["--port", "0"] if command == "serve" else [str(texts)]
    arguments = [str(number.value), command, "--model", str(make_checkpoint()), *options]
    done = subprocess.run([sys.executable, "-c", SIGNALLED, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


def test_an_engine_that_hangs_does_not_outlive_a_server_that_is_killed(make_checkpoint, sent):
    with running_server(exit_code=-signal.SIGKILL, model=make_checkpoint(), **ONE_BY_ONE) as server:
        (engine,) = server.children()
        hold(server, sent, 2)
        server.process.kill()
    until(lambda: gone(engine))


FIT = """
import sys
from app.fitting import _start
child = _start()
print(child.process.pid, flush=True)
sys.stdin.read()
"""


def test_a_fit_that_hangs_does_not_outlive_a_server_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", FIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as server:
        fit = int(server.stdout.readline())
        own = os.getpriority(os.PRIO_PROCESS, 0)
        until(lambda: os.getpriority(os.PRIO_PROCESS, fit) > own)  # it gives way to others, so it waits for its order
        os.kill(fit, signal.SIGSTOP)
        server.kill()
    until(lambda: gone(fit))


ORPHAN = """
import os, socket, sys, time
from app.lifeline import end_with_parent
parent = os.getppid()
print(os.getpid(), flush=True)
while os.getppid() == parent:
    time.sleep(0.01)
end_with_parent(socket.socket(fileno=int(sys.argv[1])))
open(sys.argv[2], "w").close()
"""
PARENT = """
import socket, subprocess, sys
ours, theirs = socket.socketpair()
descriptor = str(theirs.fileno())
command = [sys.executable, "-c", sys.argv[1], descriptor, sys.argv[2]]
child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE)
sys.stdout.write(child.stdout.readline().decode())
"""


def test_a_process_whose_parent_died_before_it_could_say_so_ends_too(tmp_path):
    command = [sys.executable, "-c", PARENT, ORPHAN, str(tmp_path / "lived-on")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    until(lambda: gone(int(done.stdout)))
    assert not (tmp_path / "lived-on").exists()
