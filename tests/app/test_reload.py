"""Another checkpoint in the place of the one that is served, while requests go on."""

import asyncio
import os
import shutil
import signal
import threading
import weakref
from itertools import pairwise

import httpx
import pytest
from servers import Load, running_server, until

from app.errors import BadCheckpoint
from app.metrics import Metrics
from app.serving import running_serving
from app.settings import Settings
from model.hub import digest

pytestmark = pytest.mark.system

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


def reload(server):
    return httpx.post(f"{server.url}/admin/reload", headers={"authorization": "Bearer of an operator"}, timeout=60)


def sha_of(server):
    return server.client.get("/info").json()["model_sha"]


def test_no_request_fails_or_is_answered_half_by_one_model_and_half_by_the_other(link, make_checkpoint):
    with running_server(model=link) as server:
        (engine,) = server.children()
        first, old = sha_of(server), server.post("/embed", inputs=TEXTS).json()
        with Load(server, [TEXTS] * 4) as load:
            load.go_on()
            switch(link, make_checkpoint(seed=2))
            server.process.send_signal(signal.SIGHUP)
            until(lambda: sha_of(server) != first)
            load.go_on()
        new = server.post("/embed", inputs=TEXTS).json()
        assert new != old
        for answers in load.answers:
            vectors = [answer.json() for answer in answers if answer.status_code == 200]
            assert len(vectors) == len(answers)
            assert all(its in (old, new) for its in vectors)
            assert not any(before == new and after == old for before, after in pairwise(vectors))
        until(lambda: engine not in server.children())
        assert len(server.children()) == 1
        models = [line for line in server.client.get("/metrics").text.splitlines() if line.startswith("bertd_model_info{")]
        assert len(models) == 1
        assert sha_of(server) in models[0]
        assert 'bertd_engine_state{state="ready"} 1.0' in server.client.get("/metrics").text


async def test_nothing_of_what_was_served_before_is_kept(link):
    async with running_serving(Settings(model=str(link)), Metrics()) as serving:
        former = weakref.ref(serving.current.service)
        await serving.reload()
        async with asyncio.timeout(60):
            while former() is not None:
                await asyncio.sleep(0.01)


async def test_a_checkpoint_that_changes_while_it_is_read_is_refused(tmp_path, make_checkpoint, monkeypatch):
    folder = shutil.copytree(make_checkpoint(seed=1), tmp_path / "model")

    def replace_and_digest(files):
        shutil.copy(make_checkpoint(seed=2) / "model.safetensors", tmp_path / "new")
        os.replace(tmp_path / "new", folder / "model.safetensors")
        return digest(files)

    async with running_serving(Settings(model=str(folder)), Metrics()) as serving:
        current = serving.current
        with monkeypatch.context() as patch:
            patch.setattr("app.service.digest", replace_and_digest)
            with pytest.raises(BadCheckpoint, match="changed while they were read"):
                await serving.reload()
        assert serving.current is current
        await serving.reload()
        assert serving.current.service.facts["sha256"] == digest([folder / "model.safetensors"])


async def test_a_reload_that_ends_after_the_first_word_of_a_stop_leaves_the_server_stopping(link):
    async with running_serving(Settings(model=str(link)), Metrics()) as serving:
        current = serving.current
        reload = asyncio.ensure_future(serving.reload())
        await asyncio.sleep(0)
        serving.close()
        await reload
        assert serving.current is not current
        assert serving.current.service.closing.is_set()


def test_a_checkpoint_that_cannot_be_served_leaves_the_old_one_serving(link, tmp_path):
    with running_server(model=link, admin_key="of an operator") as server:
        before = server.post("/embed", inputs=TEXTS).json()
        engines = server.children()
        switch(link, tmp_path)
        refused = reload(server)
        assert refused.status_code == 424
        assert refused.json()["error_type"] == "Backend"
        assert "config.json" in refused.json()["error"]
        assert "the one before it goes on" in refused.json()["error"]
        assert server.children() == engines
        assert server.post("/embed", inputs=TEXTS).json() == before


def test_an_operator_reloads_over_http_once_at_a_time(link, make_checkpoint):
    with running_server(model=link, admin_key="of an operator") as server:
        assert server.client.post("/admin/reload").status_code == 401
        first = sha_of(server)
        switch(link, make_checkpoint(seed=2))
        answers = []
        operator = threading.Thread(target=lambda: answers.append(reload(server)))
        operator.start()
        until(lambda: len(server.children()) == 2)
        refused = reload(server)
        assert (refused.status_code, refused.json()["error_type"]) == (409, "Conflict")
        operator.join()
        (answer,) = answers
        assert answer.status_code == 200, answer.text
        assert answer.json().items() >= {"former_sha": first, "model_sha": sha_of(server), "kind": "embedder"}.items()
        assert sha_of(server) != first


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
    assert "the weights are damaged" in done.stderr
