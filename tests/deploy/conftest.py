"""One Prometheus for all that ask it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import running_server
from stack import Prometheus, require, running_prometheus


@pytest.fixture(scope="session")
def prometheus(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that scrapes a server with a small checkpoint."""
    require("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    with running_server(model=make_checkpoint()) as bertd, running_prometheus(bertd, folder) as prometheus:
        yield prometheus
