"""The lanes of an engine process, on a runner that only tells who runs what."""

import os
import socket
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from app import frames
from app.worker import _BRIEF, _Lanes
from model.cuda import Pipeline
from model.errors import DeviceLost
from model.tokens import Tokens


class Runner:
    """Gives each batch the number of its lane; batches of the task "meet" wait for each other."""

    def __init__(self) -> None:
        self.lanes: _Lanes | None = None
        self.meeting = threading.Barrier(2, timeout=30)

    def __call__(self, rows: list[Tokens], task: str) -> np.ndarray:
        if task == "meet":
            self.meeting.wait()
        if task == "lose":
            raise DeviceLost("cuda:0 has failed")
        self.lanes.on_layer(last=True)
        return np.full((len(rows), 1), threading.get_ident(), dtype=np.float64)


@pytest.fixture
def engine():
    """Our end of the socket of two lanes."""
    ours, theirs = socket.socketpair()
    runner = Runner()
    lanes = runner.lanes = _Lanes(theirs, runner, 2, 2)
    threads = [threading.Thread(target=lanes.run) for _ in range(2)]
    for thread in threads:
        thread.start()
    with ours:
        ours.settimeout(30)
        yield ours
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    theirs.close()


def send(engine: socket.socket, number: int, tokens: int, alone: bool, task: str = "mean", token: int = 0) -> None:
    lengths, ids = np.array([tokens], dtype=np.int32), np.full(tokens, token, dtype=np.int32)
    frames.send(engine, {"number": number, "task": task, "alone": alone}, [lengths, ids, ids])


def test_batches_that_are_not_brief_run_beside_each_other(engine):
    for number in range(2):
        send(engine, number, tokens=8, alone=False, task="meet")
    words = [frames.receive(engine) for _ in range(4)]
    assert sorted(word.head["number"] for word in words if "ending" in word.head) == [0, 1]
    assert len({word.arrays[0].item() for word in words if word.arrays}) == 2


def test_a_brief_batch_has_the_engine_to_itself_and_says_nothing_before_its_answer(engine):
    lanes = set()
    for number in range(10):
        send(engine, number, tokens=_BRIEF, alone=True)
        answer = frames.receive(engine)
        assert (answer.head["number"], "ending" in answer.head) == (number, False)
        lanes.add(answer.arrays[0].item())
    assert len(lanes) == 1


def test_a_long_batch_that_is_alone_tells_when_it_ends(engine):
    send(engine, 7, tokens=_BRIEF + 1, alone=True)
    assert frames.receive(engine).head["ending"]
    assert frames.receive(engine).head["number"] == 7


def test_a_lost_device_ends_the_process_for_its_keeper_to_start_another(capfd, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code) or sys.exit())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, 0, tokens=8, alone=False, task="lose")
        with pytest.raises(SystemExit):
            _Lanes(theirs, Runner(), 1, 1).run()
    assert ended == [1]
    assert capfd.readouterr().err == "bertd.engine: cuda:0 has failed\n"


class Device:
    """A runner on a device that takes a batch ahead, and computes each when it is told to."""

    def __init__(self) -> None:
        self.pipeline = Pipeline()
        self.launched, self.ends = ([threading.Event() for _ in range(2)] for _ in range(2))

    def __call__(self, rows: list[Tokens], task: str) -> np.ndarray:
        number = int(rows[0].ids[0])

        def launch():
            self.launched[number].set()
            return np.zeros((1, 1)), SimpleNamespace(synchronize=lambda: self.ends[number].wait(30))

        return self.pipeline.run(launch)


def test_the_next_batch_is_launched_while_the_device_computes_and_told_of_when_it_is_its_turn():
    ours, theirs = socket.socketpair()
    device = Device()
    lanes = _Lanes(theirs, device, 1, 1)
    device.pipeline.on_device = lambda: lanes.on_layer(last=True)
    threads = [threading.Thread(target=lanes.run) for _ in range(2)]
    with theirs:
        with ours:
            ours.settimeout(30)
            for thread in threads:
                thread.start()
            send(ours, 0, tokens=8, alone=False)
            assert frames.receive(ours).head == {"number": 0, "ending": True}
            send(ours, 1, tokens=8, alone=False, token=1)
            assert device.launched[1].wait(30)  # while the first one is computed
            device.ends[0].set()
            words = [frames.receive(ours) for _ in range(2)]
            assert sorted((word.head["number"], "ending" in word.head) for word in words) == [(0, False), (1, True)]
            device.ends[1].set()
            assert frames.receive(ours).head["number"] == 1
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
