"""Another checkpoint in the place of the one that is served, while requests go on."""

import os
import signal
import threading
import time
from itertools import pairwise

import httpx
import pytest
from servers import running_server

TEXTS = ["one text", "and another one", "of three"]


@pytest.fixture
def link(tmp_path, make_checkpoint):
    """A link to a checkpoint, as a deployment switches it."""
    link = tmp_path / "model"
    link.symlink_to(make_checkpoint(seed=1))
    return link


def switch(link, folder):
    link.with_suffix(".new").symlink_to(folder)
    os.replace(link.with_suffix(".new"), link)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def sha_of(server):
    return server.client.get("/info").json()["model_sha"]


class Load:
    """Clients that send one request after the other until they are told to stop; what each got, in order."""

    def __init__(self, url, clients=4):
        self.answers = [[] for _ in range(clients)]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(url, answers)) for answers in self.answers]

    def _run(self, url, answers):
        with httpx.Client(base_url=url, timeout=60) as client:
            while not self._stop.is_set():
                response = client.post("/embed", json={"inputs": TEXTS})
                answers.append((response.status_code, response.json()))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_no_request_fails_or_is_answered_half_by_one_model_and_half_by_the_other(link, make_checkpoint):
    with running_server(model=link) as server:
        (engine,) = server.children()
        first, old = sha_of(server), server.post("/embed", inputs=TEXTS).json()
        with Load(server.url) as load:
            until(lambda: all(load.answers))
            switch(link, make_checkpoint(seed=2))
            server.process.send_signal(signal.SIGHUP)
            until(lambda: sha_of(server) != first)
            seen = [len(answers) for answers in load.answers]
            until(lambda: all(len(answers) > count for answers, count in zip(load.answers, seen, strict=True)))
        new = server.post("/embed", inputs=TEXTS).json()
        assert new != old
        for answers in load.answers:
            assert all(status == 200 and vectors in (old, new) for status, vectors in answers)
            assert not any(before == new and after == old for (_, before), (_, after) in pairwise(answers))
        until(lambda: engine not in server.children())
        assert len(server.children()) == 1
        models = [line for line in server.client.get("/metrics").text.splitlines() if line.startswith("bertd_model_info{")]
        assert len(models) == 1
        assert sha_of(server) in models[0]
        assert "bertd_engine_ready 1.0" in server.client.get("/metrics").text


def test_a_checkpoint_that_cannot_be_served_leaves_the_old_one_serving(link, tmp_path, capfd):
    with running_server(model=link) as server:
        before = server.post("/embed", inputs=TEXTS).json()
        engines = server.children()
        switch(link, tmp_path)
        server.process.send_signal(signal.SIGHUP)
        said = ""

        def has_said_why():
            nonlocal said
            said += capfd.readouterr().err
            return "the one before it goes on" in said

        until(has_said_why)
        assert "config.json" in said
        assert server.children() == engines
        assert server.post("/embed", inputs=TEXTS).json() == before


def test_weights_that_are_not_numbers_are_never_served(tmp_path):
    from checkpoints import save_checkpoint
    from safetensors.torch import load_file, save_file
    from servers import run_bertd

    save_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.layer.1.output.dense.bias"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = run_bertd("serve", "--port", 0, "--model", tmp_path)
    assert done.returncode == 1
    assert "not a number" in done.stderr
