"""A real Prometheus around a server, in processes of their own."""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from servers import RunningServer

DEPLOY = Path(__file__).parents[2] / "deploy"


def require(program: str) -> str:
    """The path of a program of the system's packages; without it the test is skipped."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed: make system-packages")
    return path


@dataclass(frozen=True)
class Prometheus:
    """A Prometheus in a process of its own that scrapes one server."""

    client: httpx.Client
    bertd: RunningServer

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now."""
        answer = self.client.post("/api/v1/query", data={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer['error']}"
        return answer["data"]["result"]

    def number(self, expression: str) -> float:
        """The value of the only series of an expression."""
        (series,) = self.query(expression)
        return float(series["value"][1])

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """Ask until the answer is true."""
        deadline = time.monotonic() + 30
        while not (answer := condition()):
            assert time.monotonic() < deadline, f"not true within 30 s: {condition.__name__}"
            time.sleep(0.05)
        return answer


@contextmanager
def running_prometheus(bertd: RunningServer, folder: Path) -> Iterator[Prometheus]:
    """Our prometheus.yml, but for the place and the pace, on a free port; its data go into `folder`."""
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "200ms", "evaluation_interval": "200ms"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": ["{}:{}".format(*bertd.address)]}]
    del job["dns_sd_configs"]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = "{}:{}".format(*free.getsockname())
    command = [require("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30) as client:
            server = Prometheus(client, bertd)
            server.wait_for(lambda: _ready(process, client, folder))
            yield server
    finally:
        process.terminate()
        process.wait(timeout=30)


def _ready(process: subprocess.Popen, client: httpx.Client, folder: Path) -> bool:
    assert process.poll() is None, (folder / "log").read_text()
    try:
        return client.get("/-/ready").is_success
    except httpx.TransportError:
        return False
