import asyncio
import hashlib
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from app.engine import BatchFailed, EngineDied, State
from app.errors import EngineError, NotReady, Overloaded, ServiceError
from app.metrics import Metrics
from app.scheduler import Scheduler
from model.tokens import Tokens


@dataclass(eq=False)
class PuppetEngine:
    """An engine whose batches a test answers by hand."""

    state: State = State.READY
    facts: dict = field(default_factory=lambda: {"tokens_per_second": 100.0})
    restarts: int = 0
    depth: int = 1
    batches: list = field(default_factory=list)
    alone: list = field(default_factory=list)

    def on_change(self):
        raise AssertionError("the scheduler did not set it")

    @property
    def out(self):
        return sum(not answer.done() for _, _, answer in self.batches)

    @property
    def lanes(self):
        return self.depth

    @property
    def busy(self):
        return self.out > 0

    @property
    def room(self):
        return max(0, self.depth - self.out) if self.state is State.READY else 0

    def run(self, task, rows, alone):
        self.alone.append(alone)
        answer = asyncio.get_running_loop().create_future()
        self.batches.append((task, [row.ids.tolist() for row in rows], answer))
        return answer

    @property
    def last(self):
        return self.batches[-1][1]

    async def answer(self, error=None):
        """End the oldest batch that is out, and let the scheduler see it."""
        _, rows, answer = next(batch for batch in self.batches if not batch[2].done())
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(np.array([[row[0], len(row)] for row in rows], dtype=np.float32))
        await turns()


async def turns():
    for _ in range(5):
        await asyncio.sleep(0)


def make(engine=None, max_batch_tokens=10, max_queue_tokens=1000):
    engine = engine or PuppetEngine()
    return engine, Scheduler([engine], Metrics(), max_batch_tokens, max_queue_tokens)


def submit(scheduler, *rows, task="mean"):
    return asyncio.ensure_future(scheduler.submit([Tokens.of(row) for row in rows], task))


def firsts(answer):
    return [float(outcome[0]) for outcome in answer.outcomes]


async def test_requests_of_one_moment_travel_together():
    engine, scheduler = make()
    jobs = [submit(scheduler, [1, 1]), submit(scheduler, [2]), submit(scheduler, [3], [4])]
    await turns()
    assert len(engine.batches) == 1
    assert sorted(engine.last) == [[1, 1], [2], [3], [4]]
    await engine.answer()
    assert [firsts(await job) for job in jobs] == [[1], [2], [3, 4]]


async def test_waiting_rows_are_shared_out_among_lanes_unless_they_are_few():
    engine, scheduler = make(PuppetEngine(depth=2), max_batch_tokens=1000, max_queue_tokens=10_000)
    few = submit(scheduler, [1], [2])
    await turns()
    assert engine.alone == [True]
    await engine.answer()
    many = submit(scheduler, *([n] * 100 for n in range(8)))
    await turns()
    assert [len(rows) for _, rows, _ in engine.batches[1:]] == [4, 4]
    late = submit(scheduler, [9])
    await engine.answer()
    assert engine.last == [[9]]
    assert engine.alone == [True, False, False, False]
    await engine.answer()
    await engine.answer()
    assert firsts(await few) == [1, 2]
    assert firsts(await many) == [*range(8)]
    assert firsts(await late) == [9]


async def test_the_last_rows_of_a_list_are_shared_out_among_all_lanes_where_there_are_enough():
    engine, scheduler = make(PuppetEngine(depth=2), max_batch_tokens=1000, max_queue_tokens=10_000)
    jobs = [submit(scheduler, *([n] * 500 for n in range(6)))]
    await turns()
    while not jobs[0].done():
        await engine.answer()
    assert [len(rows) for _, rows, _ in engine.batches] == [2, 2, 1, 1]
    running = submit(scheduler, [7] * 600, [8] * 600)
    await turns()
    few = submit(scheduler, *([n] * 100 for n in range(5)))
    await turns()
    await engine.answer()
    assert len(engine.last) == 5
    for job in (running, few):
        job.cancel()


async def test_waiting_rows_are_shared_out_among_engines():
    engines = [PuppetEngine(), PuppetEngine()]
    scheduler = Scheduler(engines, Metrics(), max_batch_tokens=1000, max_queue_tokens=10_000)
    job = submit(scheduler, *([n] * 100 for n in range(8)))
    await turns()
    assert [[len(rows) for _, rows, _ in engine.batches] for engine in engines] == [[4], [4]]
    job.cancel()


async def test_an_engine_that_is_gone_counts_neither_for_the_rate_nor_for_the_shares():
    engines = [PuppetEngine(facts={"tokens_per_second": 1000.0}, depth=2) for _ in range(2)]
    scheduler = Scheduler(engines, Metrics(), max_batch_tokens=1000)
    assert scheduler.max_queue_tokens == 4000
    engines[1].state = State.STARTING
    assert scheduler.max_queue_tokens == 2000
    jobs = [submit(scheduler, *([n] * 100 for n in range(8))) for _ in range(2)]
    await turns()
    assert [len(rows) for _, rows, _ in engines[0].batches] == [8, 8]
    for job in jobs:
        job.cancel()
    engines[0].state = State.FAILED
    assert scheduler.max_queue_tokens == 2000
    engines[0].state = engines[1].state = State.READY
    assert scheduler.max_queue_tokens == 4000


async def test_between_the_answers_of_a_large_batch_others_are_heard():
    engine, scheduler = make(PuppetEngine(), max_batch_tokens=100)
    jobs = [submit(scheduler, [n]) for n in range(100)]
    await turns()
    engine.batches[0][2].set_result(np.array([[n, 1] for n in range(100)], dtype=np.float32))
    ended = [0]
    while ended[-1] < 100:
        await asyncio.sleep(0)
        ended.append(sum(job.done() for job in jobs))
    assert max(after - before for before, after in pairwise(ended)) <= 8
    assert [firsts(await job) for job in jobs] == [[n] for n in range(100)]


async def test_a_batch_holds_no_more_tokens_than_the_limit_but_always_one_row():
    engine, scheduler = make(max_batch_tokens=5)
    job = submit(scheduler, [1, 1, 1], [2, 2], [3], [4] * 9)
    sizes = []
    while not job.done():
        await turns()
        sizes.append([len(row) for row in engine.last])
        await engine.answer()
    assert sizes == [[3, 2], [1], [9]]
    assert firsts(await job) == [1, 2, 3, 4]


async def test_a_single_text_does_not_wait_for_a_long_list():
    engine, scheduler = make(max_batch_tokens=4)
    bulk = submit(scheduler, *[[7, 7]] * 50)
    await turns()
    single = submit(scheduler, [1, 1])
    await turns()
    await engine.answer()
    assert [1, 1] in engine.last
    await engine.answer()
    assert firsts(await single) == [1]
    assert not bulk.done()
    bulk.cancel()


async def test_rows_of_different_tasks_never_share_a_batch_and_take_turns():
    engine, scheduler = make()
    jobs = [submit(scheduler, [1]), submit(scheduler, [2], task="cls"), submit(scheduler, [3])]
    await turns()
    await engine.answer()
    await engine.answer()
    await asyncio.gather(*jobs)
    assert [(task, rows) for task, rows, _ in engine.batches] == [("mean", [[1], [3]]), ("cls", [[2]])]


async def test_rows_that_nobody_waits_for_never_reach_an_engine():
    engine, scheduler = make()
    running = submit(scheduler, [1])
    await turns()
    gone = submit(scheduler, *[[5]] * 100)
    stays = submit(scheduler, [2])
    await turns()
    gone.cancel()
    await turns()
    assert scheduler._queue.tokens == 1
    await engine.answer()
    await engine.answer()
    assert [rows for _, rows, _ in engine.batches] == [[[1]], [[2]]]
    assert firsts(await running) + firsts(await stays) == [1, 2]
    assert not scheduler._jobs
    assert scheduler._queue.is_empty
    assert (scheduler._queue.rows, scheduler._queue.tokens, scheduler._queue.ahead) == (0, 0, 0)


async def test_a_batch_that_fails_is_halved_until_the_bad_row_is_alone():
    engine, scheduler = make(max_batch_tokens=100)
    jobs = [submit(scheduler, [n]) for n in range(1, 9)]
    await turns()
    while not all(job.done() for job in jobs):
        await engine.answer(BatchFailed("RuntimeError") if [5] in engine.last else None)
    for number, job in enumerate(jobs, 1):
        (outcome,) = (await job).outcomes
        if number == 5:
            assert isinstance(outcome, EngineError)
        else:
            assert outcome[0] == number


async def test_rows_aboard_a_death_are_tried_once_more_and_never_after_a_second():
    engine, scheduler = make()
    job = submit(scheduler, [1])
    await turns()
    await engine.answer(EngineDied(running=True))
    assert engine.last == [[1]]
    await engine.answer(EngineDied(running=True))
    (outcome,) = (await job).outcomes
    assert isinstance(outcome, EngineError)
    assert len(engine.batches) == 2


async def test_a_text_that_ends_the_engine_twice_takes_no_neighbour_with_it():
    engine, scheduler = make(PuppetEngine(depth=2), max_batch_tokens=4)
    jobs = [submit(scheduler, [number] * 2) for number in range(4)]
    await turns()
    assert [rows for _, rows, _ in engine.batches] == [[[0, 0], [1, 1]], [[2, 2], [3, 3]]]
    for _ in range(2):
        await engine.answer(EngineDied(running=True))
    jobs.append(submit(scheduler, [4]))
    for _ in range(4):
        await turns()
        assert engine.out == 1
        assert engine.alone[-1]
        ((number, _),) = engine.last
        await engine.answer(EngineDied(running=True) if number == 2 else None)
    await engine.answer()
    outcomes = [(await job).outcomes[0] for job in jobs]
    assert isinstance(outcomes.pop(2), EngineError)
    assert [outcome[0] for outcome in outcomes] == [0, 1, 3, 4]


async def test_a_batch_that_waited_in_the_pipe_of_a_dead_engine_is_not_held_guilty():
    engine, scheduler = make()
    job = submit(scheduler, [1])
    await turns()
    for _ in range(5):
        await engine.answer(EngineDied(running=False))
    await engine.answer()
    assert firsts(await job) == [1]


async def test_work_waits_for_an_engine_that_starts_again():
    engine, scheduler = make()
    engine.state = State.STARTING
    engine.on_change()
    job = submit(scheduler, [1])
    await turns()
    assert not engine.batches
    assert not scheduler.ready
    engine.state = State.READY
    engine.on_change()
    await turns()
    await engine.answer()
    assert firsts(await job) == [1]


async def test_everyone_is_answered_when_no_engine_will_come_back():
    engine, scheduler = make()
    jobs = [submit(scheduler, [1]), submit(scheduler, [2])]
    await turns()
    jobs.append(submit(scheduler, [3]))
    await turns()
    engine.state = State.FAILED
    engine.on_change()
    for job in jobs:
        assert isinstance((await job).outcomes[0], NotReady)
    with pytest.raises(NotReady):
        await scheduler.submit([Tokens.of([1])], "mean")


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back():
    _, scheduler = make(max_queue_tokens=300)
    submit(scheduler, [1])
    await turns()
    waiting = submit(scheduler, [2] * 250)
    await turns()
    with pytest.raises(Overloaded) as refused:
        await scheduler.submit([Tokens.of([3] * 51)], "mean")
    assert refused.value.retry_after == 3  # 250 tokens at 100 a second
    assert scheduler._queue.tokens == 250
    accepted = submit(scheduler, [4] * 50)
    await turns()
    waiting.cancel()
    accepted.cancel()


async def test_a_list_beyond_the_limit_is_served_when_nothing_else_waits():
    engine, scheduler = make(max_batch_tokens=10_000, max_queue_tokens=10)
    job = submit(scheduler, *[[n] * 5 for n in range(100)])
    await turns()
    await engine.answer()
    assert firsts(await job) == list(range(100))


async def test_a_value_that_is_not_a_number_is_an_error_of_its_row_only():
    engine, scheduler = make()
    job = submit(scheduler, [1], [2])
    await turns()
    engine.batches[0][2].set_result(np.array([[1, np.nan], [2, 2]], dtype=np.float32))
    bad, good = (await job).outcomes
    assert isinstance(bad, EngineError)
    assert good.tolist() == [2, 2]


async def test_an_answer_of_the_wrong_shape_ends_every_row_with_an_error():
    engine, scheduler = make(max_batch_tokens=100)
    jobs = [submit(scheduler, [n]) for n in range(20)]
    await turns()
    engine.batches[0][2].set_result(np.ones((19, 2), dtype=np.float32))
    for job in jobs:
        (outcome,) = (await job).outcomes
        assert isinstance(outcome, ServiceError)


async def test_drain_refuses_new_work_and_answers_old():
    engine, scheduler = make()
    jobs = [submit(scheduler, [1]), submit(scheduler, [2])]
    await turns()
    draining = asyncio.ensure_future(scheduler.drain())
    await turns()
    with pytest.raises(NotReady):
        await scheduler.submit([Tokens.of([3])], "mean")
    assert not draining.done()
    await engine.answer()
    await draining
    assert [firsts(await job) for job in jobs] == [[1], [2]]


async def test_every_row_gets_exactly_one_answer_in_any_weather():
    """A storm of jobs, hang-ups, failures and deaths: each job that stayed is answered, and nothing is left behind."""
    random = np.random.default_rng(0)
    engine, scheduler = make(PuppetEngine(depth=2), max_batch_tokens=20, max_queue_tokens=10**6)
    jobs, cancelled = [], set()
    for step in range(600):
        if step < 400:
            jobs.append(submit(scheduler, *[[len(jobs)] * int(n) for n in random.integers(1, 9, random.integers(1, 6))]))
        if random.random() < 0.2:
            victim = int(random.integers(len(jobs)))
            if not jobs[victim].done():
                jobs[victim].cancel()
                cancelled.add(victim)
        await turns()
        if any(not answer.done() for _, _, answer in engine.batches):
            kind = random.random()
            error = BatchFailed("x") if kind < 0.1 else EngineDied(running=True) if kind < 0.15 else None
            await engine.answer(error)
    while scheduler._jobs:
        await engine.answer()
    for number, job in enumerate(jobs):
        if number in cancelled:
            assert job.cancelled()
        else:
            for outcome in (await job).outcomes:
                assert isinstance(outcome, EngineError) or outcome[0] == number
    assert (scheduler._queue.rows, scheduler._queue.tokens) == (0, 0)
    assert not any(row.job.wanted for batch in scheduler._queue._again for row in batch)


async def test_a_short_text_is_not_held_up_by_the_windows_of_two_long_ones():
    engine, scheduler = make(max_batch_tokens=10)
    long = [submit(scheduler, *[[number] * 5] * 20) for number in (1, 2)]
    await turns()
    await engine.answer()
    short = submit(scheduler, [3, 3])
    await turns()
    batches = len(engine.batches)
    while not short.done():
        await engine.answer()
    assert any([3, 3] in rows for _, rows, _ in engine.batches[batches : batches + 2])  # after a row of each, no more
    assert not any(job.done() for job in long)
    assert firsts(await short) == [3]
    while not all(job.done() for job in long):
        await engine.answer()
    assert [firsts(await job) for job in long] == [[1] * 20, [2] * 20]
    shares = [{row[0] for row in rows} for _, rows, _ in engine.batches]
    assert sum(share >= {1, 2} for share in shares) >= 19  # the long ones take turns too


def kinds(engine):
    """Which jobs each batch so far held rows of: the first token of a row is its job's number."""
    return [{row[0] for row in rows} for _, rows, _ in engine.batches]


async def test_batches_of_short_and_of_long_jobs_alternate_and_never_mix():
    engine, scheduler = make(max_batch_tokens=400, max_queue_tokens=100_000)
    bulk = submit(scheduler, *[[1] * 10] * 1000)
    await turns()
    shorts = []
    for number in range(2, 8):
        shorts.append(submit(scheduler, [number, number]))
        await turns()
        while not shorts[-1].done():
            await engine.answer()
    assert all(share == {1} or 1 not in share for share in kinds(engine))
    assert [{2}, {1}, {3}, {1}, {4}] == kinds(engine)[1:6]
    sizes = [sum(map(len, rows)) for _, rows, _ in engine.batches if rows[0][0] == 1]
    assert sizes[0] == 400  # before anybody else was there
    assert set(sizes[1:]) == {100}  # while others come in between
    assert not bulk.done()
    for _ in range(9):
        await engine.answer()
    assert sum(map(len, engine.last)) == 400  # nobody came for a while
    bulk.cancel()


async def test_a_list_goes_on_while_short_texts_alone_would_fill_every_batch():
    engine, scheduler = make(max_batch_tokens=100, max_queue_tokens=10_000)
    jobs = [submit(scheduler, *[[1] * 10] * 200)]
    await turns()
    jobs += [submit(scheduler, [2] * 50) for _ in range(40)]
    await turns()
    for _ in range(12):
        await engine.answer()
    assert kinds(engine)[1:13] == [{2}, {1}] * 6
    for job in jobs:
        job.cancel()


async def test_a_long_list_that_waits_leaves_room_for_short_texts_but_not_for_another_list():
    _, scheduler = make(max_batch_tokens=10, max_queue_tokens=100)
    bulk = submit(scheduler, *[[1] * 5] * 1000)
    await turns()
    shorts = [submit(scheduler, [2] * 10) for _ in range(9)]
    await turns()
    assert not any(job.done() for job in (bulk, *shorts))
    for rows in ([3] * 10, [3] * 5), ([3],):
        with pytest.raises(Overloaded):
            await scheduler.submit([Tokens.of(row) for row in rows], "mean")
    for job in (bulk, *shorts):
        job.cancel()
    await turns()
    assert (scheduler._queue.rows, scheduler._queue.tokens, scheduler._queue.ahead) == (0, 0, 0)


async def test_a_queue_that_is_almost_full_is_known_before_a_request_is_read():
    engine, scheduler = make(max_batch_tokens=200, max_queue_tokens=160)
    scheduler.check_room()
    running = submit(scheduler, [1] * 150)
    await turns()
    scheduler.check_room()
    waiting = submit(scheduler, [2] * 150)
    await turns()
    scheduler.check_room()
    more = submit(scheduler, [3])
    await turns()
    with pytest.raises(Overloaded) as refused:
        scheduler.check_room()
    assert refused.value.retry_after == 2  # 151 tokens at 100 a second
    engine.state = State.STARTING
    with pytest.raises(NotReady) as refused:
        scheduler.check_room()
    assert refused.value.retry_after == 3
    for job in (running, waiting, more):
        job.cancel()


async def test_a_text_that_was_aboard_two_deaths_is_named_in_the_log_by_a_hash(caplog):
    engine, scheduler = make()
    job = submit(scheduler, [1, 22])
    await turns()
    for _ in range(2):
        await engine.answer(EngineDied(running=True))
    await job
    (record,) = [record for record in caplog.records if "deaths" in record.message]
    assert record.args[1] == hashlib.sha256(np.array([1, 22], dtype=np.int32).tobytes()).hexdigest()
    assert "22]" not in record.message
