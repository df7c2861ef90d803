import asyncio
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from ahead_worker import PATIENT
from fake_worker import CRASH, FAIL, HANG, HOLD, RUBBISH, SIGNS, SLOW

import app.engine
from app.child import start_engine
from app.engine import BatchFailed, Engine, EngineDied, EngineOptions, State
from app.errors import EngineError
from app.frames import HIDDEN
from app.metrics import Metrics
from app.scheduler import Scheduler
from app.service import _start_all
from model.tokens import Tokens

FAKE = [sys.executable, str(Path(__file__).with_name("fake_worker.py"))]


def fake_engine(*flags: str, timeout: float = 30.0) -> Engine:
    return Engine(EngineOptions("nowhere"), timeout, [*FAKE, *flags])


def rows(*ids: list[int]) -> list[Tokens]:
    return [Tokens.of(row) for row in ids]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def until(condition) -> None:
    """Wait for something that other processes bring about."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def test_vectors_and_matrices_come_back_in_order(engine):
    np.testing.assert_array_equal(await engine.run("mean", rows([1, 2], [10])), [[3, 2], [10, 1]])
    matrices = await engine.run(HIDDEN, rows([1, 2], [10]))
    assert [matrix.tolist() for matrix in matrices] == [[[1, 1], [2, 2]], [[10, 10]]]
    assert len(await engine.run(HIDDEN, rows([5]))) == 1


async def test_the_next_batch_is_taken_when_the_one_before_comes_to_its_end(engine):
    rooms = []
    engine.on_change = lambda: rooms.append(engine.room)
    assert engine.room
    first = engine.run("mean", rows([1]))
    assert not engine.room
    await until(lambda: rooms)
    assert rooms == [1]
    assert (await first)[0][0] == 1


async def test_a_process_that_was_started_beforehand_is_the_first_one_and_is_gone_in_the_end():
    with start_engine(FAKE) as early:
        engine = Engine(EngineOptions("nowhere"), 30.0, FAKE, early)
        await engine.start()
        assert engine.pid == early.process.pid
        with pytest.raises(EngineDied):
            await engine.run("mean", rows([CRASH]))
        await until(lambda: engine.state is State.READY)
        assert engine.pid not in (None, early.process.pid)
        assert (await engine.run("mean", rows([2])))[0][0] == 2
        await engine.stop()
    with start_engine(FAKE) as unused:
        pass
    assert unused.process.returncode is not None


async def test_each_lane_has_room_for_a_batch():
    engine = fake_engine("two-lanes")
    await engine.start()
    assert engine.room == 2
    answers = [engine.run("mean", rows([HOLD])), engine.run("mean", rows([HOLD, 1]))]
    assert engine.room == 0
    assert [(await answer)[0][0] for answer in answers] == [HOLD, HOLD + 1]
    assert engine.room == 2
    running = [engine.run("mean", rows([CRASH])), engine.run("mean", rows([2]))]
    for answer in running:
        with pytest.raises(EngineDied) as death:
            await answer
        assert death.value.running
    await engine.stop()


async def test_a_batch_that_does_not_say_that_it_ends_still_frees_the_engine(engine):
    first = engine.run("mean", rows([HOLD]))
    assert not engine.room
    assert (await first)[0][0] == HOLD
    assert engine.room
    assert (await engine.run("mean", rows([2])))[0][0] == 2


async def test_no_more_than_two_batches_are_out(engine):
    sent = []

    def send() -> None:
        if engine.room and len(sent) < 2:
            sent.append(engine.run("mean", rows([len(sent) + 1])))
            assert not engine.room

    engine.on_change = send
    send()
    await until(lambda: len(sent) == 2)
    assert [(await answer)[0][0] for answer in sent] == [1, 2]


async def test_a_batch_that_fails_leaves_the_process_alive(engine):
    pid = engine._process.pid
    with pytest.raises(BatchFailed, match="RuntimeError"):
        await engine.run("mean", rows([FAIL]))
    assert (await engine.run("mean", rows([4])))[0][0] == 4
    assert engine._process.pid == pid


async def test_a_death_tells_the_running_batch_from_the_one_in_the_pipe_and_another_process_starts(engine):
    running, piped = engine.run("mean", rows([CRASH])), engine.run("mean", rows([1]))
    deaths = await asyncio.gather(running, piped, return_exceptions=True)
    assert [type(death) for death in deaths] == [EngineDied, EngineDied]
    assert [death.running for death in deaths] == [True, False]
    await until(lambda: engine.room)
    assert engine.restarts == 1
    assert (await engine.run("mean", rows([6])))[0][0] == 6


async def test_a_text_that_ends_the_process_twice_takes_no_neighbour_with_it(engine):
    scheduler = Scheduler([engine], Metrics(), max_batch_tokens=64)
    ids = [1, 2, CRASH, 3, 4]
    answers = await asyncio.gather(*(scheduler.submit(rows([number, number]), "mean") for number in ids))
    outcomes = [answer.outcomes[0] for answer in answers]
    assert isinstance(outcomes.pop(2), EngineError)
    assert [outcome[0] for outcome in outcomes] == [2, 4, 6, 8]
    assert engine.restarts == 2


async def test_changes_are_announced(engine):
    seen = []
    engine.on_change = lambda: seen.append(engine.state)
    with pytest.raises(EngineDied):
        await engine.run("mean", rows([CRASH]))
    await until(lambda: engine.room)
    await until(lambda: len(seen) >= 3)
    assert seen[0] is State.STARTING
    assert seen[-1] is State.READY


@pytest.mark.parametrize(("flag", "message"), [("refuse", "the checkpoint is bad"), ("vanish", "exit code 3 while it started")])
async def test_a_process_that_cannot_start_says_why(flag, message):
    engine = fake_engine(flag)
    with pytest.raises(EngineError, match=message):
        await engine.start()
    assert engine.state is State.FAILED
    await engine.stop()


async def test_a_process_that_dies_as_it_says_hello_is_not_taken_for_ready():
    engine = fake_engine()
    on_frame = engine._on_frame

    def hello_and_gone(frame) -> None:
        on_frame(frame)
        engine._on_lost(engine._transport)

    engine._on_frame = hello_and_gone
    with pytest.raises(EngineError, match="while it started"):
        await engine.start()
    assert not engine.room
    await engine.stop()


async def test_stop_leaves_no_process_and_no_waiter(engine):
    pid = engine._process.pid
    answer = engine.run("mean", rows([1] * 1000))
    await engine.stop()
    assert not is_alive(pid)
    assert engine.state is State.STOPPED
    await asyncio.wait([answer])
    assert answer.exception() is None or isinstance(answer.exception(), EngineDied)


async def test_an_engine_that_never_comes_back_has_failed(engine, monkeypatch):
    monkeypatch.setattr("app.engine._RESTART_DELAYS", (0.0, 0.0))
    engine._command = [*FAKE, "vanish"]
    with pytest.raises(EngineDied):
        await engine.run("mean", rows([CRASH]))
    await until(lambda: engine.state is State.FAILED)
    assert not engine.room


async def test_a_process_that_hangs_is_taken_for_dead_and_one_that_gives_signs_of_life_is_not():
    engine = fake_engine("two-lanes", timeout=SIGNS * 0.05 / 2)
    await engine.start()
    assert (await engine.run("mean", rows([SLOW])))[0][0] == SLOW
    await asyncio.sleep(0)
    pid = engine._process.pid
    hanging, piped = (engine.run("mean", rows([number])) for number in (HANG, 1))
    for answer in (hanging, piped):
        with pytest.raises(EngineDied):
            await answer
    await until(lambda: engine.room)
    assert not is_alive(pid)
    assert engine.restarts == 1
    assert (await engine.run("mean", rows([6])))[0][0] == 6
    await engine.stop()


async def test_a_batch_that_waited_long_in_the_pipe_is_not_taken_for_one_that_hangs():
    engine = fake_engine(timeout=SIGNS * 0.05 / 2)
    await engine.start()
    first, second = engine.run("mean", rows([SLOW])), engine.run("mean", rows([SLOW, 1]))
    assert (await first)[0][0] == SLOW
    assert (await second)[0][0] == SLOW + 1
    assert engine.restarts == 0
    await engine.stop()


async def test_a_process_that_says_nothing_at_its_start_is_given_up(monkeypatch):
    monkeypatch.setattr("app.engine._START_SECONDS", 0.05)
    engine = Engine(EngineOptions("nowhere"), 30.0, [sys.executable, "-c", "import signal; signal.pause()"])
    with pytest.raises(EngineError, match="while it started"):
        await engine.start()
    assert engine._process.poll() is not None
    await engine.stop()


async def test_a_process_that_dies_again_and_again_without_a_batch_ends_in_failure_and_not_in_a_loop(engine, monkeypatch):
    monkeypatch.setattr("app.engine._RESTART_DELAYS", (0.0, 0.0, 0.0))
    engine._command = [*FAKE, "brief"]
    engine._process.kill()
    await until(lambda: engine.state is State.FAILED)
    assert engine.restarts <= 2


async def test_a_death_that_a_batch_is_to_blame_for_is_no_vain_start(engine, monkeypatch):
    monkeypatch.setattr("app.engine._RESTART_DELAYS", (0.0, 0.0))
    for restarts in range(1, 4):
        with pytest.raises(EngineDied):
            await engine.run("mean", rows([CRASH]))
        await until(lambda: engine.room)
        assert engine.restarts == restarts


async def test_an_engine_never_comes_back_with_another_checkpoint(monkeypatch, caplog):
    monkeypatch.setattr("app.engine._RESTART_DELAYS", (0.0, 0.0))
    engine = fake_engine("changing")
    await engine.start()
    with pytest.raises(EngineDied):
        await engine.run("mean", rows([CRASH]))
    await until(lambda: engine.state is State.FAILED)
    assert "not those that this server started with" in caplog.text
    await engine.stop()


class Scarce:
    """What the system refuses for the next so many times."""

    def __init__(self, times: int, error: Exception, real) -> None:
        self.times, self._error, self._real = times, error, real

    def __call__(self, *arguments):
        if self.times:
            self.times -= 1
            raise self._error
        return self._real(*arguments)


SCARCE = {
    "start_engine": BlockingIOError(11, "Resource temporarily unavailable"),
    "_end": RuntimeError("can't start new thread"),
}


@pytest.mark.parametrize(("name", "error"), SCARCE.items())
async def test_a_start_that_the_system_refuses_is_tried_again(engine, monkeypatch, caplog, name, error):
    monkeypatch.setattr("app.engine._RESTART_DELAYS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(f"app.engine.{name}", Scarce(2, error, getattr(app.engine, name)))
    with pytest.raises(EngineDied):
        await engine.run("mean", rows([CRASH]))
    await until(lambda: engine.room)
    assert engine.restarts == 1
    assert caplog.text.count(f"did not start: the engine process can't be started ({error})") == 2
    assert (await engine.run("mean", rows([6])))[0][0] == 6


async def test_starts_that_the_system_goes_on_refusing_end_in_failure(engine, monkeypatch):
    monkeypatch.setattr("app.engine._RESTART_DELAYS", (0.0, 0.0))
    monkeypatch.setattr("app.engine.start_engine", Scarce(9, SCARCE["start_engine"], start_engine))
    engine._process.kill()
    await until(lambda: engine.state is State.FAILED)


async def test_a_first_start_that_the_system_refuses_says_why(monkeypatch):
    monkeypatch.setattr("app.engine.start_engine", Scarce(1, SCARCE["start_engine"], start_engine))
    engine = fake_engine()
    with pytest.raises(EngineError, match=r"can't be started .*temporarily unavailable"):
        await engine.start()
    assert engine.state is State.FAILED
    await engine.stop()


async def test_an_answer_that_holds_no_result_is_a_death_that_everybody_who_waits_is_told_of(engine):
    loop, told = asyncio.get_running_loop(), []
    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda loop, context: told.append(context["exception"]))
    answers = [engine.run("mean", rows([RUBBISH])), engine.run("mean", rows([1]))]
    async with asyncio.timeout(30):
        deaths = await asyncio.gather(*answers, return_exceptions=True)
    loop.set_exception_handler(handler)
    assert [type(death) for death in deaths] == [EngineDied, EngineDied]
    assert [type(error) for error in told] == [IndexError]
    await until(lambda: engine.room)


async def test_an_engine_comes_back_on_the_device_and_in_the_dtype_that_it_had(engine):
    assert (engine.facts["device"], engine.facts["dtype"]) == ("cuda:0", "float32")
    engine._command = [*FAKE, "no-gpu"]
    with pytest.raises(EngineDied):
        await engine.run("mean", rows([CRASH]))
    await until(lambda: engine.room)
    assert (engine.facts["device"], engine.facts["dtype"]) == ("cuda:0", "float32")


async def test_every_device_gets_an_engine_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(Engine.__init__, "__defaults__", (FAKE, None))
    for device, wanted in {"auto": ["cuda:0", "cuda:1", "cuda:2"], "cuda:1": ["cuda:1"]}.items():
        options = EngineOptions("nowhere", device)
        engines = [Engine(options, 30.0)]
        try:
            await _start_all(engines, options, 30.0)
            assert [engine._options.device for engine in engines] == wanted
            assert all(engine.state is State.READY for engine in engines)
        finally:
            await asyncio.gather(*(engine.stop() for engine in engines))


async def test_batches_on_several_lanes_at_once_give_what_each_gives_alone(minilm):
    engine = Engine(EngineOptions(str(minilm), device="cpu", threads=3), 30.0)
    await engine.start()
    batches = [rows(*([1000 + length] * length for length in range(start, start + 20))) for start in (1, 30, 60)]
    alone = [await engine.run("mean", batch, alone=True) for batch in batches]
    for _ in range(5):
        together = await asyncio.gather(*(engine.run("mean", batch) for batch in batches[: engine.room]))
        for vectors, wanted in zip(together, alone, strict=False):
            np.testing.assert_allclose(vectors, wanted, rtol=0, atol=1e-6)
    await engine.stop()


async def test_a_batch_is_taken_ahead_of_the_one_that_a_device_computes(minilm):
    command = [sys.executable, str(Path(__file__).with_name("ahead_worker.py"))]
    engine = Engine(EngineOptions(str(minilm), device="cpu", threads=1), 30.0, command)
    await engine.start()
    assert engine.lanes == engine.room == 1
    batches = [rows([PATIENT, *[1000 + length] * length]) for length in (70, 80, 90)]
    batches.append(rows([1000] * 100))
    answers = []
    for batch in batches:  # each of the first is answered only because the next is in the process by then
        await until(lambda: engine.room)
        answers.append(engine.run("mean", batch))
    together = await asyncio.gather(*answers)
    for vectors, batch in zip(together, batches, strict=True):
        follower = engine.run("mean", batch)
        await until(lambda: engine.room)
        await engine.run("mean", rows([1000] * 65))
        np.testing.assert_array_equal(vectors, await follower)
    await engine.stop()
