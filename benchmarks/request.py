"""What a request costs the API process, by parts: python -m benchmarks.request [--write]

One short text a request, 64 connections, no sockets, and an engine that answers at once, so that nothing else is in it; and the
same where the queue is full, so that each is refused. Time of the processor, the median over rounds.
"""

import argparse
import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, redirect_stderr
from functools import wraps
from inspect import iscoroutinefunction
from statistics import median
from typing import Any

import numpy as np
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app import embedding, logs, observe
from app.api import tei
from app.classification import Classification
from app.cores import TOKENIZERS
from app.engine import Engine, EngineOptions, Results, State
from app.errors import Overloaded
from app.main import counted_refusal, create_app
from app.memory import keep_memory_small, pass_over_what_stays
from app.metrics import Metrics
from app.scheduler import Scheduler
from app.service import Service
from app.serving import Current, Serving
from app.settings import Settings
from app.wire import Connection, Wire
from benchmarks.machine import describe_machine
from benchmarks.tables import this_command, write_section
from benchmarks.workloads import make_workload
from model.config import ModelConfig
from model.hub import find_model
from model.tokenizer import Tokenizer
from model.tokens import Tokens

_CONNECTIONS = 64
_TURNS = 10  # requests of each connection in a round
_TEXTS = 256

# What is called once or more for a request and calls none of the others; `data_received` parses, and starts a task.
PARTS: Sequence[tuple[object, str, str]] = (
    (Connection, "data_received", "octets to a request"),
    (Tokenizer, "encode", "tokenization"),
    (Service, "account", "figures of the request, its stages in the metrics"),
    (embedding, "finish", "vectors put together and normalized"),
    (tei, "answer", "vectors to JSON"),
    (RequestResponseCycle, "send", "an answer to octets"),
    (Metrics, "answered", "figures of the request, its stages in the metrics"),
    (observe, "log_request", "the line in the log"),
)
REST = "layers around the route, the queue, tasks, timers, the log's thread, the garbage collector"


class Instant(Engine):
    """Has every answer before it is asked."""

    def __init__(self, dimension: int) -> None:
        super().__init__(EngineOptions(""), timeout=1.0)
        self.state = State.READY
        self.facts = {"lanes": 2, "tokens_per_second": 1e7, "poolings": ["mean"], "device": "cpu"}
        self.facts |= {"dtype": "float32", "model": "", "sha256": ""}  # what the metrics tell of it
        self._rows = np.random.default_rng(0).normal(size=(_TEXTS, dimension)).astype(np.float32)

    def run(self, task: str, rows: Sequence[Tokens], alone: bool = False) -> "asyncio.Future[Results]":
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Results] = loop.create_future()
        loop.call_soon(answer.set_result, self._rows[: len(rows)])
        return answer


class Nowhere(asyncio.Transport):
    """Takes what is written."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"sockname": ("127.0.0.1", 1), "peername": ("127.0.0.1", 2)}.get(name, default)

    def is_closing(self) -> bool:
        return False

    def write(self, data: object) -> None:
        self.written = data

    def get_write_buffer_size(self) -> int:
        return 0

    def resume_reading(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass


@contextmanager
def watched(spent: dict[str, float]) -> Iterator[None]:
    """Add the time of each part to its account."""
    former = [(owner, name, getattr(owner, name)) for owner, name, _ in PARTS]
    for owner, name, part in PARTS:
        setattr(owner, name, _timed(getattr(owner, name), part, spent))
    try:
        yield
    finally:
        for owner, name, function in former:
            setattr(owner, name, function)


def _timed(function: Callable, part: str, spent: dict[str, float]) -> Callable:
    @wraps(function)
    def timed(*arguments, **options):
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[part] += time.perf_counter() - start

    @wraps(function)
    async def timed_coroutine(*arguments, **options):  # which never waits here
        start = time.perf_counter()
        try:
            return await function(*arguments, **options)
        finally:
            spent[part] += time.perf_counter() - start

    return timed_coroutine if iscoroutinefunction(function) else timed


def serving_of(settings: Settings, full: bool) -> Serving:
    """A server's inside around an engine that answers at once; while it is full, nobody is let in."""
    folder = find_model(settings.model, None)
    config = ModelConfig.from_folder(folder, None)
    metrics, engine = Metrics(), Instant(config.dimension)
    scheduler = Scheduler([engine], metrics, max_batch_tokens=1024)
    service = Service(settings, config, Tokenizer.from_folder(folder, config), scheduler, metrics, engine.facts)
    serving = Serving(settings, metrics, Current(service, Classification(service), AsyncExitStack()))

    def refuse() -> None:
        raise Overloaded("20000 tokens wait; try again in 2 s", retry_after=2)

    if full:
        serving.check_room = refuse  # type: ignore[method-assign]
    return serving


def connections_to(settings: Settings, serving: Serving) -> list[Connection]:
    refuse = counted_refusal(serving.metrics)
    wire = Wire(settings.header_timeout, settings.body_timeout, 2 * _CONNECTIONS, (), lambda error: refuse(error, {"path": ""}))
    config = uvicorn.Config(
        create_app(settings, serving), http=wire.protocol(), ws="none", log_config=None, access_log=False, server_header=False
    )
    config.load()
    state = uvicorn.server.ServerState()
    connections = [wire.protocol()(config=config, server_state=state, app_state={}) for _ in range(_CONNECTIONS)]
    for connection in connections:
        connection.connection_made(Nowhere())
    return connections


async def seconds_of(
    connections: Sequence[Connection], requests: Sequence[bytes], clock: Callable[[], float] = time.process_time
) -> float:
    """For one request."""
    start = clock()
    for turn in range(_TURNS):
        for place, connection in enumerate(connections):
            connection.data_received(requests[(turn * _CONNECTIONS + place) % len(requests)])
        while any(connection.owes_answer for connection in connections):
            await asyncio.sleep(0)
    return (clock() - start) / (_TURNS * _CONNECTIONS)


def request_of(text: str) -> bytes:
    body = b'{"inputs": "%b"}' % text.encode()
    head = b"POST /embed HTTP/1.1\r\nHost: 127.0.0.1:8080\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


async def measure(rounds: int) -> list[str]:
    """The rows of the table, by their share in an answer."""
    settings = Settings()
    texts = make_workload("short", _TEXTS, find_model(settings.model, None)).texts
    requests = [request_of(text) for text in texts]
    answering, refusing = (connections_to(settings, serving_of(settings, full)) for full in (False, True))
    pass_over_what_stays()
    for connections in (answering, refusing):
        await seconds_of(connections, requests)
    whole = [(await seconds_of(answering, requests), await seconds_of(refusing, requests)) for _ in range(rounds)]
    totals = [median(times) * 1e6 for times in zip(*whole, strict=True)]
    shares = [await shares_of(connections, requests, rounds) for connections in (answering, refusing)]
    parts = sorted(shares[0], key=lambda part: (part == REST, -shares[0][part]))
    rows = [
        f"| {part} | " + " | ".join(_cell(share.get(part), total) for share, total in zip(shares, totals, strict=True)) + " |"
        for part in parts
    ]
    return [*rows, f"| **together** | **{totals[0]:.0f}** | **{totals[1]:.0f}** |"]


def _cell(share: float | None, total: float) -> str:
    return f"{share * total:.0f} ({share:.0%})" if share else ""


async def shares_of(connections: Sequence[Connection], requests: Sequence[bytes], rounds: int) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)
    total = 0.0
    with watched(spent):
        for _ in range(rounds):
            total += await seconds_of(connections, requests, time.perf_counter) * _TURNS * _CONNECTIONS
    shares = {part: seconds / total for part, seconds in spent.items()}
    return {**shares, REST: 1 - sum(shares.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    keep_memory_small(1 + TOKENIZERS)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # each request has its line there
        logs.set_up("info", "json")
        rows = uvloop.run(measure(options.rounds))
    table = "\n".join(["| part | an answer, µs | a refusal, µs |", "|---|---|---|", *rows])
    print(table)
    if options.write:
        write_section("request", f"{this_command('benchmarks.request')}, {describe_machine()}.\n\n{table}")


if __name__ == "__main__":
    main()
