"""`bertd` in processes of its own, and what surrounds its routes in this one."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, Self

import httpx

from app.main import create_app
from app.metrics import Metrics
from app.settings import Settings

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

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        return float(re.search(rf"^{name} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)[1])

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


@contextmanager
def held(server: RunningServer) -> Iterator[None]:
    """The engine stands still until the block ends: whatever the machine, what waits for it waits."""
    (engine,) = server.children()
    os.kill(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine, signal.SIGCONT)


def serving_nothing() -> SimpleNamespace:
    """In the place of a Serving: whatever asks for its service meets a defect."""
    current = SimpleNamespace(entered=nullcontext)
    return SimpleNamespace(metrics=Metrics(), closing=asyncio.Event(), check_room=lambda: None, current=current)


def client_of(serving: Any, **settings: Any) -> httpx.AsyncClient:
    """A client of an app in this process."""
    app = create_app(Settings(**settings), serving)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://bertd")


def until(condition) -> None:
    """Wait for something that other processes bring about."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class HasUrl(Protocol):
    """A server, or what stands before several and leads to another each time."""

    @property
    def url(self) -> str: ...


class Load:
    """A client for each of the inputs, which sends them again and again to /embed; what each got, in order."""

    def __init__(self, server: HasUrl, inputs: Sequence[object]) -> None:
        self.answers: list[list[httpx.Response]] = [[] for _ in inputs]
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(server, {"inputs": its}, answers))
            for its, answers in zip(inputs, self.answers, strict=True)
        ]

    def _run(self, server: HasUrl, body: object, answers: list[httpx.Response]) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stop.is_set():
                answers.append(client.post(f"{server.url}/embed", json=body))

    def go_on(self, count: int = 1) -> None:
        """Wait until each client has had so many answers more."""
        seen = [len(answers) for answers in self.answers]
        until(lambda: all(len(answers) >= had + count for answers, had in zip(self.answers, seen, strict=True)))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
