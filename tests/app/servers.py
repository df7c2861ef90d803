"""`bertd` in processes of its own."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

BERTD = [sys.executable, "-m", "app.cli"]


def run_bertd(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [*BERTD, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


@dataclass(frozen=True)
class RunningServer:
    """`bertd serve` in a process of its own."""

    process: subprocess.Popen
    banner: str
    client: httpx.Client

    @property
    def address(self) -> tuple[str, int]:
        return self.client.base_url.host, self.client.base_url.port

    @property
    def url(self) -> str:
        return str(self.client.base_url).rstrip("/")

    def post(self, path: str, **body: object) -> httpx.Response:
        return self.client.post(path, json=body)

    def children(self) -> list[int]:
        """The process ids of its engines."""
        return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]


@contextmanager
def running_server(exit_code: int = 0, stderr: int | None = None, **settings: object) -> Iterator[RunningServer]:
    """A server on a free port, stopped by SIGTERM at the end; it must then exit with `exit_code`. Its log goes to `stderr`."""
    environment = os.environ | {f"BERTD_{name.upper()}": str(value) for name, value in settings.items()}
    command = [*BERTD, "serve", "--port", "0"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
    lines = []
    while not lines or not lines[-1].startswith("try"):
        lines.append(process.stdout.readline())
        if not lines[-1]:
            raise AssertionError(f"the server did not start: exit code {process.wait()}")
    url = re.search(r"http://[\d.]+:\d+", "".join(lines))[0]
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield RunningServer(process, "".join(lines), client)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=30)
        process.stdout.close()
    assert code == exit_code
