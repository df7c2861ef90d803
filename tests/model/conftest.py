"""What all tests of the library share: no touch of the user's cache, one thread, a checkpoint folder to change."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from model import compiled


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where converted tokenizers are kept while these tests run."""
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are small: a second thread wins nothing, and on a busy machine it waits three times as long as it works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["AVX-512", "AVX2"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Our compiled kernels with these and no others, for the dtype of the test."""
    found = [library for library in compiled.libraries() if library.instructions == request.param]
    monkeypatch.setattr(compiled, "libraries", lambda: found)
    if not compiled.library(request.node.callspec.params.get("dtype", torch.float32)):
        pytest.skip(f"no compiler built the kernels, or the processor lacks what they need of {request.param}")
    return str(request.param)


@pytest.fixture
def folder(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A small checkpoint that the test may change."""
    return Path(shutil.copytree(make_checkpoint(), tmp_path / "checkpoint"))
