"""HTTP level: requests per second, latency, CPU and memory of a server, closed loop (wrk) and open loop.

    python -m benchmarks.serve [--peers bertd infinity] [--workload short] [--write]
    python -m benchmarks.serve --url http://127.0.0.1:8080/embed --field inputs      a server that runs already

wrk comes from Debian's packages. Infinity runs from a virtual environment of its own, since it pins older libraries:
`python3 -m venv .venv-infinity && .venv-infinity/bin/pip install torch==2.13.0 'infinity-emb[server,torch]==0.0.78'`.
"""

import argparse
import asyncio
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.client import Client
from benchmarks.machine import describe_machine
from benchmarks.peers import bertd
from benchmarks.tables import this_command, write_section
from benchmarks.workloads import make_workload
from model.cgroup import available_cores
from model.hub import find_model

ROOT = Path(__file__).parents[1]
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_TEXTS = 512
_TICK = os.sysconf("SC_CLK_TCK")

_SCRIPT = """
local bodies = {%s}
local place = 0
request = function()
  place = place %% #bodies + 1
  return wrk.format("POST", nil, {["content-type"] = "application/json"}, bodies[place])
end
done = function(summary, latency)
  local bad = summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.timeout
  io.write(string.format("RESULT %%f %%d %%f %%f %%d\\n", summary.duration / 1e6, summary.requests,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, bad))
end
"""


@dataclass(frozen=True)
class Server:
    """A server that answers, and what its requests look like."""

    name: str
    url: str
    field: str
    pid: int | None = None

    def body(self, texts: list[str]) -> bytes:
        content = {self.field: texts if len(texts) > 1 else texts[0]}
        return json.dumps(content | ({"model": "model"} if self.field == "input" else {})).encode()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def command_of(peer: str, port: int, folder: Path, device: str) -> tuple[list[str], str, str]:
    """How a peer is started, the path of its route, the field of its texts."""
    if peer.startswith("bertd"):
        dtype = peer.partition(" ")[2] or "auto"
        options = ["--port", str(port), "--device", device, "--dtype", dtype]
        return [sys.executable, "-m", "app.cli", "serve", *options], "/embed", "inputs"
    infinity = os.environ.get("INFINITY", str(ROOT / ".venv-infinity/bin/infinity_emb"))
    served = ["--served-model-name", "model", "--device", device, "--engine", "torch", "--no-bettertransformer", "--no-compile"]
    place = ["--host", "127.0.0.1", "--port", str(port), "--url-prefix", "/v1", "--log-level", "warning"]
    return [infinity, "v2", "--model-id", str(folder), *served, *place, "--dtype", "float32"], "/v1/embeddings", "input"


@contextmanager
def started(peer: str, folder: Path, device: str = "cpu") -> Iterator[Server]:
    port = free_port()
    command, path, field = command_of(peer, port, folder, device)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    server = Server(peer, f"http://127.0.0.1:{port}{path}", field, process.pid)
    try:
        _until_answers(server, process)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def _until_answers(server: Server, process: subprocess.Popen) -> None:
    while process.poll() is None:
        try:
            urllib.request.urlopen(_request(server), timeout=60).read()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit(f"{server.name} did not start; see why with: {shlex.join(process.args)}")


def _request(server: Server) -> urllib.request.Request:
    return urllib.request.Request(server.url, server.body(["hello"]), {"content-type": "application/json"})


def tree(pid: int | None) -> list[int]:
    """A process and all below it."""
    if pid is None:
        return []
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid, *(p for file in children for child in file.read_text().split() for p in tree(int(child)))]


def cpu_seconds(pids: list[int]) -> float:
    fields = (Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in pids)
    return sum(int(f[11]) + int(f[12]) for f in fields) / _TICK


def resident_mib(pids: list[int]) -> int:
    """Proportional set size: memory that processes share counts once."""
    rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids)
    return sum(int(re.search(r"^Pss: +(\d+)", text, re.M)[1]) for text in rollups) // 1024


@dataclass(frozen=True)
class Load:
    """What one run of load gave: requests and milliseconds; shares of one core."""

    requests: float
    p50: float
    p99: float
    bad: int
    server_cpu: float
    client_cpu: float
    memory: int


def closed_loop(server: Server, bodies: list[bytes], clients: int, seconds: int) -> Load:
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(_SCRIPT % ",".join(f"[==[{body.decode()}]==]" for body in bodies))
        script.flush()
        pids = tree(server.pid)
        before, ours = cpu_seconds(pids), os.times()
        command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "60s", "-s", script.name, server.url]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        after, ours_after = cpu_seconds(pids), os.times()
    found = re.search(r"RESULT (\S+) (\d+) (\S+) (\S+) (\d+)", output)
    duration, requests, p50, p99, bad = (float(value) for value in found.groups())
    client = ours_after.children_user + ours_after.children_system - ours.children_user - ours.children_system
    return Load(requests / duration, p50, p99, int(bad), (after - before) / duration, client / duration, resident_mib(pids))


async def open_loop(server: Server, bodies: list[bytes], rate: float, seconds: float) -> Load:
    """Requests at times of a Poisson process, whatever the server does; latency counts from the time that was meant."""
    client = Client(server.url)
    pids = tree(server.pid)
    before, used, start = cpu_seconds(pids), time.process_time(), time.perf_counter()
    results = await client.open_loop(bodies, rate, seconds)
    spent = time.perf_counter() - start
    client.close()
    p50, p99 = np.percentile([result.seconds for result in results], [50, 99]) * 1000
    bad = sum(result.status != 200 for result in results)
    cpu, own = (cpu_seconds(pids) - before) / spent, (time.process_time() - used) / spent
    return Load(len(results) / spent, p50, p99, bad, cpu, own, resident_mib(pids))


def row(server: str, what: str, load: Load) -> str:
    return (
        f"| {server} | {what} | {load.requests:.0f} | {load.p50:.1f} | {load.p99:.1f} | {load.bad} | "
        f"{load.server_cpu:.2f} | {load.client_cpu:.2f} | {load.memory} |"
    )


HEADER = (
    "| server | load | requests/s | p50, ms | p99, ms | not 200 | server, cores | client, cores | memory, MiB |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def library_rate(dtype: str, texts: list[str], folder: Path, device: str) -> tuple[float, float]:
    """Our own texts/s at library level, and the median milliseconds of a lone text, in this process."""
    encode = bertd(dtype, folder, device, available_cores())
    encode(texts[:32])
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        encode(texts)
        best = min(best, time.perf_counter() - start)
    alone = []
    for text in texts[:200]:
        start = time.perf_counter()
        encode([text])
        alone.append(time.perf_counter() - start)
    return len(texts) / best, float(np.median(alone)) * 1000


def measure(server: Server, texts: list[str], options: argparse.Namespace) -> list[str]:
    rows = []
    ones = [server.body([text]) for text in texts]
    lists = [server.body(texts[start : start + 32]) for start in range(0, len(texts) - 31, 32)]
    for clients in options.clients:
        rows.append(row(server.name, f"1 text, {clients} clients", closed_loop(server, ones, clients, options.seconds)))
        print(rows[-1], flush=True)
    rows.append(row(server.name, "32 texts, 8 clients", closed_loop(server, lists, 8, options.seconds)))
    print(rows[-1], flush=True)
    if options.rate:
        load = asyncio.run(open_loop(server, ones, options.rate, options.seconds))
        rows.append(row(server.name, f"1 text, open loop at {options.rate:g}/s", load))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", help="default: bertd in the dtype that it takes there, and on a CPU infinity")
    parser.add_argument("--workload", default="short")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--seconds", type=int, default=8)
    parser.add_argument("--rate", type=float, default=100.0, help="requests per second of the open loop; 0 leaves it out")
    parser.add_argument("--url", help="measure this URL in place of servers of our own")
    parser.add_argument("--field", default="inputs", help="the field of its texts: inputs or input")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    folder = find_model(MODEL)
    texts = make_workload(options.workload, _TEXTS, folder).texts
    rows: list[str] = []
    if options.url:
        measure(Server("given", options.url, options.field), texts, options)
        return
    dtype = "float32" if options.device == "cpu" else "bfloat16"
    options.peers = options.peers or [f"bertd {dtype}", *["infinity"] * (options.device == "cpu")]
    rate, alone = library_rate(dtype, texts, folder, options.device)
    rows.append(f"Our library, {dtype}, in one process: {rate:.0f} texts/s; a lone text {alone:.2f} ms (median).")
    print(rows[0])
    rows += ["", HEADER]
    for peer in options.peers:
        with started(peer, folder, options.device) as server:
            rows += measure(server, texts, options)
    if options.write:
        name = f"serve-{options.workload}{'' if options.device == 'cpu' else '-cuda'}"
        about = f"{this_command('benchmarks.serve')}, {describe_machine(options.device)}."
        write_section(name, "\n".join([about, "", *rows]))


if __name__ == "__main__":
    main()
