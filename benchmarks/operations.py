"""The figures behind the promises of docs/operations.md: overload, fairness, slow clients, a killed engine, a reload.

    python -m benchmarks.operations [--only overload fairness …] [--seconds 10] [--write]

all-MiniLM-L6-v2, float32, sentences of about 14 tokens, or where it says so texts of mixed lengths, of about 100; the load comes
from this process, on the same cores.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from urllib.request import urlopen

import numpy as np
import uvloop

from benchmarks.client import Client, Result
from benchmarks.machine import describe_machine
from benchmarks.serve import MODEL, Server, resident_mib, started, tree
from benchmarks.tables import this_command, write_section
from benchmarks.workloads import make_workload
from model.hub import find_model

_LIST = 2000  # texts of a bulk client's list
_DRIBBLERS = 200


def milliseconds(results: Sequence[Result], percentile: float) -> float:
    return float(np.percentile([result.seconds for result in results], percentile)) * 1000


def rate_of(results: Sequence[Result], start: float, seconds: float) -> float:
    """Answers with status 200 a second, of those that came within that time."""
    return sum(result.status == 200 and start <= result.end <= start + seconds for result in results) / seconds


async def overload(server: Server, ones: list[bytes], lists: list[bytes], seconds: float) -> list[str]:
    client = Client(server.url)
    start = time.perf_counter()
    peak = rate_of(await client.closed_loop(ones, 64, seconds), start, seconds)
    before, used, start = resident_mib(tree(server.pid)), time.process_time(), time.perf_counter()
    results = await client.open_loop(ones, 5 * peak, seconds)
    used = (time.process_time() - used) / (time.perf_counter() - start)
    after = resident_mib(tree(server.pid))
    goodput = rate_of(results, start + seconds / 5, seconds * 0.8)  # while the queue is full
    refused = [result for result in results if result.status == 429]
    singles = [await client.send(body, time.perf_counter()) for body in ones[:50]]
    client.close()
    statuses = ", ".join(f"{count} × {status}" for status, count in sorted(Counter(r.status for r in results).items()))
    return [
        f"64 clients, closed loop: {peak:.0f} requests/s",
        f"open loop at five times that: {goodput:.0f} requests/s answered 200 ({goodput / peak:.0%}); {statuses}",
        f"429 after {milliseconds(refused, 50):.1f} ms (median), {milliseconds(refused, 99):.0f} ms (p99)",
        f"memory {before} MiB before, {after} MiB after; the clients took {used:.2f} cores",
        f"single texts right after its end: {milliseconds(singles, 50):.1f} ms (median of the first {len(singles)})",
    ]


async def fairness(server: Server, ones: list[bytes], lists: list[bytes], seconds: float) -> list[str]:
    client, bulk = Client(server.url), Client(server.url)
    idle = await client.closed_loop(ones, 1, seconds / 2)
    alone = await _bulk_rate(bulk, lists, seconds)
    together, busy = await asyncio.gather(_bulk_rate(bulk, lists, seconds), client.closed_loop(ones, 1, seconds))
    for each in (client, bulk):
        each.close()
    facts = json.load(urlopen(server.url.replace("/embed", "/info")))
    batch = 1000 * facts["max_batch_tokens"] * facts["lanes"] / facts["tokens_per_second"]
    return [
        f"single texts alone: {milliseconds(idle, 50):.1f} ms (median), {milliseconds(idle, 99):.1f} ms (p99)",
        f"beside lists of {_LIST}: {milliseconds(busy, 50):.1f} ms (median), {milliseconds(busy, 99):.1f} ms (p99); "
        f"a batch takes {batch:.0f} ms",
        f"the lists: {alone:.0f} texts/s alone, {together:.0f} beside single texts ({together / alone:.0%})",
    ]


async def _bulk_rate(client: Client, lists: list[bytes], seconds: float) -> float:
    """Texts/s of one client that sends lists; whole lists only, so that none is counted in part."""
    start = time.perf_counter()
    results = await client.closed_loop(lists, 1, seconds)
    assert all(result.status == 200 for result in results), Counter(result.status for result in results)
    return _LIST * len(results) / (results[-1].end - start)


async def slow_clients(server: Server, ones: list[bytes], lists: list[bytes], seconds: float) -> list[str]:
    client = Client(server.url)
    without = await client.closed_loop(ones, 8, seconds)
    dribbling = asyncio.ensure_future(_dribble(server))
    beside = await client.closed_loop(ones, 8, seconds)
    dribbling.cancel()
    client.close()
    return [
        f"p99 of 8 clients: {milliseconds(without, 99):.1f} ms, beside {_DRIBBLERS} sockets that send a byte a second "
        f"{milliseconds(beside, 99):.1f} ms"
    ]


async def _dribble(server: Server) -> None:
    host, port = server.url.split("/")[2].split(":")
    sockets = [socket.create_connection((host, int(port))) for _ in range(_DRIBBLERS)]
    head = f"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: {10**6}\r\n\r\n".encode()
    try:
        for place in range(10**6):
            for sock in sockets:
                with contextlib.suppress(OSError):  # the server has ended it, as it should
                    sock.send(head[place : place + 1] or b" ")
            await asyncio.sleep(1)
    finally:
        for sock in sockets:
            sock.close()


async def killed_engine(server: Server, ones: list[bytes], lists: list[bytes], seconds: float) -> list[str]:
    return await _disturbed(server, ones, "the engine is killed", lambda: os.kill(tree(server.pid)[1], signal.SIGKILL))


async def reload(server: Server, ones: list[bytes], lists: list[bytes], seconds: float) -> list[str]:
    return await _disturbed(server, ones, "reload", lambda: os.kill(server.pid or 0, signal.SIGHUP))


async def _disturbed(server: Server, ones: list[bytes], what: str, disturb: Callable[[], None]) -> list[str]:
    client = Client(server.url)
    load = asyncio.ensure_future(client.closed_loop(ones, 8, 10))
    await asyncio.sleep(2)
    disturb()
    results = await load
    client.close()
    bad = sum(result.status != 200 for result in results)
    longest = max(result.seconds for result in results)
    return [f"{what} under 8 clients: {len(results)} requests, {bad} not answered 200, the longest took {longest:.1f} s"]


SCENARIOS: Mapping[str, Callable[[Server, list[bytes], list[bytes], float], Awaitable[list[str]]]] = {
    "overload": overload,
    "overload mixed": overload,
    "fairness": fairness,
    "slow clients": slow_clients,
    "killed engine": killed_engine,
    "reload": reload,
}
WORKLOADS = {"overload mixed": "mixed"}
"""Of the scenarios that do not send `short` texts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--write", action="store_true", help="put the figures into docs/performance.md")
    options = parser.parse_args()
    folder = find_model(MODEL)
    lines = [f"{this_command('benchmarks.operations')}, {describe_machine()}.", ""]
    for name in options.only:
        texts = make_workload(WORKLOADS.get(name, "short"), _LIST, folder).texts
        with started("bertd float32", folder) as server:
            ones, lists = [server.body([text]) for text in texts], [server.body(texts)]
            lines += [f"- **{name}**: {line}" for line in uvloop.run(SCENARIOS[name](server, ones, lists, options.seconds))]
            print("\n".join(lines), flush=True)
    if options.write:
        write_section("operations", "\n".join(lines))


if __name__ == "__main__":
    main()
