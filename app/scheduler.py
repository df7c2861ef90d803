"""Waiting rows -> batches -> engines -> answers.

All state lives in the event loop: no locks, no timers, no polling. A batch forms when an engine can take one, out of
whatever waits then. Each row ends exactly once: as a result, an error, or dropped because nobody waits for it any more.
"""

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from app.engine import BatchFailed, Engine, EngineDied, Results, State
from app.errors import EngineError, NotReady, Overloaded, Recovering, ServiceError
from app.metrics import Metrics
from app.waiting import Job, Outcome, Queue, Row
from model.tokens import Tokens
from model.vectors import finite_rows

log = logging.getLogger("bertd.scheduler")

_DEATHS = 2  # a row that was aboard this many deaths is never tried again
_QUEUE_SECONDS = 2.0  # of work that may wait where no number of tokens is set
_RATE_WEIGHT = 0.1  # of the newest batch in the running means behind the rate
_ENDS_A_TURN = 8  # jobs, of which each answer is then made; about two milliseconds of work
_DOOR_SHARE = 16  # the part of the queue that must be free for a request to be read at all


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of the rows of a job, in its order, and seconds from submission to first batch to the end."""

    outcomes: list[Outcome]
    queue_seconds: float
    infer_seconds: float


class Scheduler:
    """Feeds engines. Use from one event loop only."""

    def __init__(self, engines: Sequence[Engine], metrics: Metrics, max_batch_tokens: int, max_queue_tokens: int = 0) -> None:
        self._engines = engines
        self._metrics = metrics
        self._max_batch_tokens = max_batch_tokens
        self._max_queue_tokens = max_queue_tokens
        self._queue = Queue(max_batch_tokens)
        self._jobs: set[Job] = set()
        self._suspects: set[Engine] = set()  # that run rows which were aboard a death: nothing else is aboard with those
        self._since: dict[Engine, float] = {}  # when each engine began to work, or ended its last batch
        self._restarts = 0
        rate = sum(float(engine.facts.get("tokens_per_second", 0)) for engine in engines) or 1.0
        self._mean_tokens = float(max_batch_tokens)  # of a batch, and seconds of an engine between two
        self._mean_seconds = max_batch_tokens * len(engines) / rate
        self._draining = False
        self._pumping = False
        for engine in engines:
            engine.on_change = self._on_engine_change
        self._on_engine_change()

    async def submit(self, rows: Sequence[Tokens], task: str) -> Answer:
        """Queue the rows of one request and wait for all of them.

        Raises NotReady or Overloaded at once, before anything is queued. When the caller is cancelled, rows that
        no engine has yet are dropped.
        """
        self._admit(sum(map(len, rows)))
        loop = asyncio.get_running_loop()
        job = Job(task, loop.create_future(), time.perf_counter(), [None] * len(rows), open_rows=len(rows))
        self._jobs.add(job)
        self._queue.add(job, rows)
        self._pump_soon()
        try:
            await job.done
        finally:
            self._forget(job)
        end = time.perf_counter()
        outcomes = [EngineError("the row was lost") if outcome is None else outcome for outcome in job.outcomes]
        return Answer(outcomes, job.started - job.submitted, end - job.started)

    @property
    def ready(self) -> bool:
        return not self._draining and self._engines_in(State.READY) > 0

    @property
    def failed(self) -> bool:
        """Whether no engine will come back."""
        return all(engine.state is State.FAILED for engine in self._engines)

    @property
    def max_queue_tokens(self) -> int:
        return self._max_queue_tokens or max(self._max_batch_tokens, int(self._rate * _QUEUE_SECONDS))

    @property
    def _rate(self) -> float:
        """Tokens a second of the engines that are ready; while none is, of one, as it will be again."""
        return self._mean_tokens / self._mean_seconds * max(1, self._engines_in(State.READY))

    async def drain(self) -> None:
        """Refuse new work and answer what was accepted."""
        self._draining = True
        while self._jobs:
            await asyncio.wait([job.done for job in self._jobs])
            await asyncio.sleep(0)

    def check_room(self) -> None:
        """Raises what `submit` would for almost any text, while the queue is almost full: before a request costs anything."""
        limit = self.max_queue_tokens
        if self._queue.rows and self._queue.ahead + limit // _DOOR_SHARE > limit:
            raise self._refusal(self._queue.ahead, "")

    def show(self) -> None:
        """Tie to what is here the metrics that are asked for, and not counted; those of another scheduler are no longer told."""
        metrics = self._metrics
        metrics.queue_rows.set_function(lambda: self._queue.rows)
        metrics.queue_tokens.set_function(lambda: self._queue.tokens)
        metrics.tokens_per_second.set_function(lambda: self._rate)
        metrics.max_queue_tokens.set_function(lambda: self.max_queue_tokens)
        metrics.engine_processes.pids = lambda: [engine.pid for engine in self._engines]
        for state in State:
            metrics.engine_state.labels(state).set_function(partial(self._engines_in, state))

    def _engines_in(self, state: State) -> int:
        return sum(engine.state is state for engine in self._engines)

    def _admit(self, tokens: int) -> None:
        if self._draining:
            raise NotReady("the server is stopping; send the request to another one", retry_after=1)
        if self.failed:
            raise NotReady("the engine does not start; see the server's log", retry_after=30)
        if not self._queue.has_room(tokens, self.max_queue_tokens):
            more = f" and {tokens} more would pass the limit of {self.max_queue_tokens}"
            raise self._refusal(self._queue.ahead_of(tokens), more)

    def _refusal(self, ahead: int, more: str) -> ServiceError:
        """Why there is no room behind so many tokens."""
        wait = math.ceil(ahead / self._rate)
        if self._engines_in(State.READY):
            return Overloaded(f"{ahead} tokens wait{more}; try again in {wait} s", retry_after=wait)
        return Recovering(f"the engine starts again, and {ahead} tokens wait for it{more}; try again in {wait + 1} s", wait + 1)

    def _forget(self, job: Job) -> None:
        """The job has ended, one way or another: none of its rows may be left in the queue."""
        self._jobs.discard(job)
        job.done.cancel()
        self._queue.remove(job)

    def _on_engine_change(self) -> None:
        restarts = sum(engine.restarts for engine in self._engines)
        self._metrics.engine_restarts.inc(restarts - self._restarts)
        self._restarts = restarts
        if self.failed:
            for job in list(self._jobs):
                self._settle_all(job, NotReady("the engine died and does not start again; see the server's log", 30))
        self._pump_soon()

    def _pump_soon(self) -> None:
        """Form batches once this turn of the event loop is over, so that requests that arrived in it travel together."""
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pumping = False
        if not (free := sum(engine.room for engine in self._engines)):
            return
        share = self._queue.share(free, sum(engine.lanes for engine in self._engines if engine.state is State.READY))
        for engine in self._engines:
            while self._may_take(engine) and (batch := self._queue.next_batch(share)):
                self._send(engine, batch)

    def _may_take(self, engine: Engine) -> bool:
        apart = engine in self._suspects or self._queue.is_suspect
        return engine.room > 0 and not (apart and engine.busy)

    def _send(self, engine: Engine, batch: list[Row]) -> None:
        start = time.perf_counter()
        for row in batch:
            row.job.started = row.job.started or start
        if not engine.busy:
            self._since[engine] = start
        if batch[0].deaths:
            self._suspects.add(engine)
        alone = engine in self._suspects or (self._queue.is_empty and not engine.busy)
        answer = engine.run(batch[0].job.task, [row.tokens for row in batch], alone)
        answer.add_done_callback(lambda answer: self._finish(engine, batch, answer))

    def _finish(self, engine: Engine, batch: list[Row], answer: asyncio.Future[Results]) -> None:
        """A batch came back; every row of it ends here or goes back to the head of the queue."""
        if batch[0].deaths:
            self._suspects.discard(engine)
        try:
            results = answer.result()
            self._measure(engine, batch)
            self._settle_results(batch, results)
        except EngineDied as death:
            self._after_death(batch, death.running)
        except BatchFailed as failure:
            self._after_failure(batch, failure)
        except Exception as error:  # ours to mend, but nobody may wait for ever
            log.exception("batch lost")
            self._settle_rows(batch, EngineError(f"the batch was lost ({type(error).__name__})"))
        self._pump_soon()

    def _measure(self, engine: Engine, batch: list[Row]) -> None:
        """Correct the rate by a batch: its tokens, and the time since the engine ended the one before or began to work."""
        tokens = sum(len(row.tokens) for row in batch)
        self._metrics.batch_rows.observe(len(batch))
        self._metrics.batch_tokens.observe(tokens)
        end = time.perf_counter()
        weight = _RATE_WEIGHT * min(1.0, tokens / self._max_batch_tokens)
        self._mean_tokens += weight * (tokens - self._mean_tokens)
        self._mean_seconds += weight * (end - self._since[engine] - self._mean_seconds)
        self._since[engine] = end

    def _settle_results(self, batch: list[Row], results: Results) -> None:
        if isinstance(results, list):
            finite = [bool(finite_rows(matrix[None])[0]) for matrix in results]
        else:
            finite = finite_rows(results).tolist()
        bad = EngineError("the encoder gave a value that is not a number")
        checked = zip(batch, results, finite, strict=True)
        self._settle_in_turns(iter([(row, result if good else bad) for row, result, good in checked]))

    def _settle_in_turns(self, outcomes: Iterator[tuple[Row, Outcome]]) -> None:
        """End a few jobs in each turn of the event loop: a batch may end a hundred, and others are to be heard between them."""
        ended = 0
        for row, outcome in outcomes:
            self._settle(row, outcome)
            ended += not row.job.open_rows
            if ended == _ENDS_A_TURN:
                asyncio.get_running_loop().call_soon(self._settle_in_turns, outcomes)
                return

    def _after_death(self, batch: list[Row], running: bool) -> None:
        """Each row that was aboard goes again by itself, so that a second death is that of one text and of no neighbour."""
        for row in batch:
            row.deaths += running
        lost = [row for row in batch if row.deaths >= _DEATHS]
        for row in lost:
            log.error("a text was aboard %d deaths of the engine; its tokens have SHA-256 %s", row.deaths, _digest(row.tokens))
        self._settle_rows(lost, EngineError("the engine died twice over this request; it will not be tried again"))
        left = [row for row in batch if row.deaths < _DEATHS]
        self._queue.put_first(*([[row] for row in left] if running else [left]))

    def _after_failure(self, batch: list[Row], failure: BatchFailed) -> None:
        """Halve a batch that fails for its data until the bad row is alone."""
        if len(batch) == 1:
            self._settle_rows(batch, EngineError(f"the encoder failed on this text ({failure})"))
            return
        middle = len(batch) // 2
        self._queue.put_first(batch[:middle], batch[middle:])

    def _settle_rows(self, rows: list[Row], error: ServiceError) -> None:
        for row in rows:
            self._settle(row, error)

    def _settle(self, row: Row, outcome: Outcome) -> None:
        job = row.job
        if not job.wanted:
            return
        job.outcomes[row.place] = outcome
        job.open_rows -= 1
        if not job.open_rows:
            job.done.set_result(None)

    def _settle_all(self, job: Job, error: ServiceError) -> None:
        if job.wanted:
            job.outcomes = [error if outcome is None else outcome for outcome in job.outcomes]
            job.started = job.started or job.submitted
            job.done.set_result(None)


def _digest(tokens: Tokens) -> str:
    """What a text is named by in the log, where its words have no place."""
    return hashlib.sha256(tokens.ids.tobytes()).hexdigest()
