"""Coroutine tests run on uvloop, as the server does; engines without torch; a real server for all that ask over HTTP."""

import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from servers import RunningServer, running_server

from app.engine import Engine, EngineOptions

PROMPTS = {"query": "ask ", "passage": "read "}


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    """A running engine around tests/app/fake_worker.py."""
    engine = Engine(EngineOptions("nowhere"), 30.0, [sys.executable, str(Path(__file__).with_name("fake_worker.py"))])
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """The default model behind HTTP, shared by every test that leaves it as it was."""
    limits = {"max_body_bytes": 200_000, "max_client_batch_size": 3000, "max_queue_tokens": 500_000}
    with running_server(device="cpu", **limits) as server:
        yield server


@pytest.fixture(scope="session")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A small random checkpoint with prompts behind HTTP, under a name of its own."""
    folder = save_checkpoint(tmp_path_factory.mktemp("prompted"), hidden_size=40)
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS}))
    with running_server(model=folder, served_model_name="tiny/bert") as server:
        yield server
