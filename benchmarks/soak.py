"""Hours of mixed load in small: sizes, routes, refusals, deadlines and hang-ups, then what the service has grown by.

    python -m benchmarks.soak [--minutes 20]

Rounds of load with a rest after each, in which no client is there; memory, descriptors and threads of the whole process tree are
read in the rests. Exits with 1 when memory has grown by 2 % after the warm-up, or descriptors or threads by one.
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvloop

from benchmarks.machine import describe_machine
from benchmarks.serve import MODEL, resident_mib, started, tree
from benchmarks.workloads import make_workload
from model.hub import find_model

_CLIENTS = 16
_ROUND = 20.0  # seconds of load
_WARM_UP = 0.25  # of the rounds
_MOST_GROWTH = 1.02
_ALLOWED = {200, 400, 404, 413, 422, 429, 504}


@dataclass(frozen=True)
class Reading:
    """What the process tree holds in a rest."""

    memory: int  # MiB
    descriptors: int
    threads: int


class Soak:
    """Clients without manners."""

    def __init__(self, url: str, texts: list[str], seed: int) -> None:
        self._url = url
        self._texts = texts
        self._random = np.random.default_rng(seed)
        self.statuses: Counter[int | str] = Counter()

    async def run(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as client:
            while time.perf_counter() < end:
                if self._random.random() < 0.05:
                    await self._hang_up()
                else:
                    await self._request(client)

    async def _request(self, client: httpx.AsyncClient) -> None:
        path, body, headers = self._pick()
        response = await client.post(path, json=body, headers=headers)
        self.statuses[response.status_code] += 1

    def _pick(self) -> tuple[str, Any, dict[str, str]]:
        some = self._some(int(self._random.lognormal(1, 1)) + 1)
        choices: list[tuple[str, Any, dict[str, str]]] = [
            ("/embed", {"inputs": some[0]}, {}),
            ("/embed", {"inputs": some}, {"accept": "application/octet-stream"}),
            ("/embed", {"inputs": some}, {"x-request-timeout": "0.05"}),
            ("/embed_all", {"inputs": some[:8], "encoding_format": "base64"}, {}),
            ("/embed_all", {"inputs": " ".join(some * 8), "on_overflow": "split"}, {"accept-encoding": "gzip"}),
            ("/embed_chunks", {"inputs": " ".join(some * 4), "chunk_tokens": 64, "late": True}, {}),
            ("/similarity", {"inputs": {"source_sentence": some[0], "sentences": some}}, {}),
            ("/v1/embeddings", {"input": some, "encoding_format": "base64"}, {}),
            ("/tokenize", {"inputs": some}, {}),
            ("/classify", {"input": some, "labels": [some[0][:50], "another"]}, {}),
            ("/embed", {"inputs": [some[0], ""]}, {}),
            ("/embed", {"inputs": 3}, {}),
            ("/nowhere", {}, {}),
            ("/embed", {"inputs": self._some(256)}, {}),
        ]
        return choices[self._random.integers(len(choices))]

    def _some(self, count: int) -> list[str]:
        return [self._texts[place] for place in self._random.integers(len(self._texts), size=count)]

    async def _hang_up(self) -> None:
        """Leave in the middle of a request, or while its answer is made."""
        host, port = self._url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        body = str({"inputs": self._some(32)}).replace("'", '"').encode()
        request = b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        writer.write(request[: self._random.integers(len(request)) if self._random.random() < 0.5 else len(request)])
        await asyncio.sleep(self._random.random() / 20)
        writer.close()
        self.statuses["hung up"] += 1


def read(pid: int) -> Reading:
    pids = tree(pid)
    descriptors = sum(len(list(Path(f"/proc/{each}/fd").iterdir())) for each in pids)
    return Reading(resident_mib(pids), descriptors, sum(len(list(Path(f"/proc/{each}/task").iterdir())) for each in pids))


def verdict(readings: list[Reading]) -> list[str]:
    """What has grown from the first rests after the warm-up to the last ones; nothing, if all is well."""
    kept = readings[int(len(readings) * _WARM_UP) :]
    part = max(1, len(kept) // 4)
    first, last = kept[:part], kept[-part:]
    grown = []
    before, after = (float(np.median([reading.memory for reading in its])) for its in (first, last))
    print(f"memory {before:.0f} MiB after the warm-up, {after:.0f} MiB at the end: {after / before - 1:+.1%}")
    if after > before * _MOST_GROWTH:
        grown.append("memory")
    for name in ("descriptors", "threads"):
        least, most = (min(getattr(reading, name) for reading in its) for its in (first, last))
        print(f"{name} {least} after the warm-up, {most} at the end")
        if most > least:
            grown.append(name)
    return grown


async def soak(url: str, pid: int, texts: list[str], rounds: int) -> tuple[list[Reading], Counter[int | str]]:
    readings: list[Reading] = []
    statuses: Counter[int | str] = Counter()
    for number in range(rounds):
        clients = [Soak(url, texts, number * _CLIENTS + place) for place in range(_CLIENTS)]
        await asyncio.gather(*(client.run(_ROUND) for client in clients))
        statuses += sum((client.statuses for client in clients), Counter())
        await asyncio.sleep(1)  # for the server to see that its clients are gone
        readings.append(read(pid))
        print(f"round {number + 1} of {rounds}: {readings[-1]}", flush=True)
    return readings, statuses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    options = parser.parse_args()
    folder = find_model(MODEL)
    texts = make_workload("mixed", 512, folder).texts
    with started("bertd float32", folder) as server:
        assert server.pid is not None
        url = server.url.removesuffix("/embed")
        rounds = max(4, round(options.minutes * 60 / (_ROUND + 1)))
        readings, statuses = uvloop.run(soak(url, server.pid, texts, rounds))
    print(f"{describe_machine()}, {options.minutes:g} minutes: {dict(statuses.most_common())}")
    grown = verdict(readings)
    bad = [status for status in statuses if isinstance(status, int) and status not in _ALLOWED]
    if grown or bad:
        sys.exit(f"grown: {', '.join(grown) or 'nothing'}; unexpected statuses: {bad or 'none'}")


if __name__ == "__main__":
    main()
