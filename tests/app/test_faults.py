"""The engine dies, hangs, can't come back: nobody gets a wrong answer, and nobody waits for ever."""

import os
import re
import shutil
import signal
import threading

import numpy as np
import pytest
from raw_http import connect, read, request
from servers import Load, held, running_server, until

pytestmark = pytest.mark.system

TEXTS = [[f"text number {n}", "and its neighbour " * n] for n in range(1, 9)]


@pytest.fixture
def checkpoint(tmp_path, make_checkpoint):
    """A checkpoint that a test may take away."""
    return shutil.copytree(make_checkpoint(), tmp_path / "model")


def wanted_from(server):
    return [server.post("/embed", inputs=texts).json() for texts in TEXTS]


def check(load, wanted):
    for answers, vectors in zip(load.answers, wanted, strict=True):
        for answer in answers:
            assert answer.status_code == 200, answer.text
            np.testing.assert_allclose(answer.json(), vectors, rtol=0, atol=1e-6)


def status(server, path):
    return server.client.get(path).status_code


def test_an_engine_that_is_killed_under_load_costs_nobody_an_answer(make_checkpoint):
    with running_server(model=make_checkpoint()) as server:
        wanted = wanted_from(server)
        with Load(server, TEXTS) as load:
            for _ in range(2):
                load.go_on(3)
                (engine,) = server.children()
                os.kill(engine, signal.SIGKILL)
                until(lambda: status(server, "/ready") == 503)
                assert status(server, "/health") == 200
                load.go_on(3)  # rows aboard have been answered, so that no text is aboard both deaths
                assert status(server, "/ready") == 200
        check(load, wanted)
        assert server.metric("bertd_engine_restarts_total") == 2
        assert server.metric("bertd_queue_rows") == 0


def test_an_engine_that_hangs_under_load_is_replaced(make_checkpoint):
    with running_server(model=make_checkpoint(), engine_timeout=1) as server:
        wanted = wanted_from(server)
        (engine,) = server.children()
        with Load(server, TEXTS) as load:
            load.go_on()
            os.kill(engine, signal.SIGSTOP)
            until(lambda: engine not in server.children())
            load.go_on(2)
        check(load, wanted)


def test_while_the_engine_starts_again_a_full_queue_answers_503_and_says_when_to_come_back(make_checkpoint):
    with running_server(model=make_checkpoint(), max_queue_tokens=40) as server:
        (engine,) = server.children()
        os.kill(engine, signal.SIGKILL)
        until(lambda: status(server, "/ready") == 503)
        waiting = []
        patient = threading.Thread(target=lambda: waiting.append(server.post("/embed", inputs="a " * 36)))
        patient.start()
        until(lambda: server.metric("bertd_queue_tokens") > 30)
        refused = server.post("/embed", inputs="b " * 36)
        assert refused.status_code == 503
        assert refused.json()["error_type"] == "Unhealthy"
        assert int(refused.headers["retry-after"]) >= 1
        patient.join()
        assert waiting[0].status_code == 200


def test_an_engine_that_cannot_start_again_ends_in_a_red_health_and_not_in_a_loop(checkpoint):
    with running_server(model=checkpoint, request_timeout=60) as server:
        (engine,) = server.children()
        shutil.rmtree(checkpoint)
        os.kill(engine, signal.SIGKILL)
        assert server.post("/embed", inputs="waits").status_code == 503
        assert status(server, "/health") == 503
        assert server.post("/embed", inputs="comes later").status_code == 503
        assert server.children() == []


def test_single_texts_pass_a_long_list(make_checkpoint):
    options = {"threads": 1, "max_batch_tokens": 50, "max_queue_tokens": 100_000, "engine_timeout": 60}
    with running_server(model=make_checkpoint(), device="cpu", **options) as server:
        bulk = []
        sender = threading.Thread(target=lambda: bulk.append(server.post("/embed", inputs=["abc"] * 2000)))
        with held(server):
            sender.start()
            until(lambda: server.metric("bertd_queue_rows") > 1000)
            # On one connection each follows the answer to the one before, however late the client hears of it.
            single = request("/embed", b'{"inputs": "abc"}')
            connection = connect(server)
            connection.sendall(single * 3 + request("/metrics", method="GET", headers="Connection: close\r\n"))
        with connection:
            *singles, metrics = read(connection)
        sender.join()
    assert [answer.status for answer in singles] == [200, 200, 200]
    assert float(re.search(r"^bertd_queue_rows (\S+)$", metrics.body.decode(), re.MULTILINE)[1]) > 1000
    assert bulk[0].status_code == 200


def test_the_engine_gives_way_to_whoever_talks_to_clients(server):
    (engine,) = server.children()
    assert os.getpriority(os.PRIO_PROCESS, engine) > os.getpriority(os.PRIO_PROCESS, server.process.pid)


def test_overload_is_refused_kindly_and_what_is_accepted_is_right(make_checkpoint):
    with running_server(model=make_checkpoint(), max_queue_tokens=40, max_batch_tokens=32) as server:
        wanted = server.post("/embed", inputs=TEXTS[3]).json()
        with Load(server, [TEXTS[3]] * 40) as load:
            load.go_on(4)
            assert status(server, "/health") == status(server, "/ready") == status(server, "/info") == 200
        answers = [answer for answers in load.answers for answer in answers]
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in answers:
            if answer.status_code == 200:
                np.testing.assert_allclose(answer.json(), wanted, rtol=0, atol=1e-6)
            else:
                assert answer.json()["error_type"] == "Overloaded"
                assert int(answer.headers["retry-after"]) >= 1
        assert server.metric("bertd_queue_tokens") == 0
        assert server.post("/embed", inputs=TEXTS[3]).status_code == 200
        refused = sum(answer.status_code == 429 for answer in answers)
        assert f'bertd_refused_total{{reason="Overloaded"}} {refused:.1f}' in server.client.get("/metrics").text
