"""What a process holds on to: memory that nothing uses, and the garbage collector's time."""

import ctypes
import multiprocessing
import os
import re
import weakref
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from servers import running_server, serving_nothing

import app.server
from app.cores import TOKENIZERS
from app.memory import give_back, keep_memory_small, pass_over_what_stays

MIB = 2**20
TEXT = "a b c " * 80

glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="malloc is not glibc's")


def in_a_process(function) -> None:
    """Run a test where what it sets is of no matter to others."""
    process = multiprocessing.get_context("spawn").Process(target=function)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def resident() -> int:
    """Bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@glibc
def test_what_lies_free_between_blocks_in_use_is_given_back():
    in_a_process(leave_holes)


def leave_holes():
    keep_memory_small(1)
    before = resident()
    blocks = [bytes(20_000 + 10_000 * (place % 9)) for place in range(2000)]
    kept = blocks[::50]
    del blocks
    held = resident() - before
    give_back()
    assert held > 80 * MIB  # else the heap has no holes, and shows nothing
    assert resident() - before < 10 * MIB
    assert all(kept)


async def test_a_server_gives_back_when_it_is_at_rest(monkeypatch):
    given = []
    monkeypatch.setattr(app.server, "give_back", lambda: given.append(now))
    server = app.server.Server(uvicorn.Config(app=None), serving_nothing(), 0, lambda: None)
    server._loop = SimpleNamespace(time=lambda: now)
    state = server.server_state
    for when, answered, running in [
        (20, 0, 0),
        (21, 0, 1),
        (22, 1, 1),
        (23, 1, 0),
        (24, 2, 0),
        (32, 3, 0),
        (34, 3, 0),
        (60, 3, 0),
    ]:
        now, state.total_requests, state.tasks = when, answered, set(range(running))
        await server.on_tick(1)
    assert given == [23, 34]


@glibc
def test_a_large_block_is_given_back_when_it_is_freed():
    in_a_process(free_large_blocks)


def free_large_blocks():
    keep_memory_small(1)
    for size in (30, 16, 4):  # glibc takes the first that is freed for the size of those that it is to keep
        before = resident()
        block = bytearray(b"a" * size * MIB)
        assert resident() - before >= size * MIB
        pin = bytes(100_000)
        del block
        assert resident() - before < MIB
        assert pin


def test_the_garbage_collector_passes_over_what_was_there_and_finds_what_came():
    in_a_process(make_garbage)


class Node:
    def __init__(self) -> None:
        self.itself = self


def make_garbage():
    import gc

    old, stays = Node(), list(range(10))
    gone = weakref.ref(Node())  # garbage already: it is not kept for ever
    pass_over_what_stays()
    assert gone() is None
    assert not {id(old), id(stays)} & set(map(id, gc.get_objects()))
    new = weakref.ref(Node())
    kept = [[] for _ in range(3 * gc.get_threshold()[0])]
    assert new() is None
    looks = gc.get_stats()[2]["collections"]
    kept += [[] for _ in range(300_000)]
    assert gc.get_stats()[2]["collections"] == looks  # at all objects: by default more than once in so many


def thread_arenas(pid: int) -> int:
    """How many heaps glibc has made for threads of a process: 64 MiB of addresses each, of which the first part is in use."""
    maps = re.findall(r"^(\w+)-(\w+) (\S+) \S+ \S+ 0 *$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE)
    ranges = [(int(start, 16), int(end, 16), mode) for start, end, mode in maps]
    return sum(
        mode == "rw-p" and rest == "---p" and start % (64 * MIB) == 0 and end == middle and last == start + 64 * MIB
        for (start, end, mode), (middle, last, rest) in pairwise(ranges)
    )


@glibc
@pytest.mark.system
def test_all_threads_of_a_server_share_a_few_arenas(make_checkpoint):
    with running_server(model=make_checkpoint()) as server:
        for _ in range(3):
            server.post("/embed_all", inputs=[TEXT] * 200)
        assert len(os.listdir(f"/proc/{server.process.pid}/task")) > 2
        assert thread_arenas(server.process.pid) <= TOKENIZERS
        assert thread_arenas(server.children()[0]) > 0  # its lanes never wait for each other


def faults(pid: int) -> int:
    """Pages that a process was given so far."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[7])


@glibc
@pytest.mark.system
def test_the_engine_keeps_the_memory_of_a_batch_for_the_next(minilm):
    with running_server(model=minilm) as server:
        (engine,) = server.children()
        for _ in range(3):
            server.post("/embed", inputs=[TEXT] * 8)
        before = faults(engine)
        for _ in range(10):
            server.post("/embed", inputs=[TEXT] * 8)
        assert faults(engine) - before < 1000  # pages of 4 KiB; by default some thousand a batch
