"""The rows that wait for an engine, and in which order they go.

A job is short while its rows fit into one batch, and long before that. Batches of short and of long jobs alternate, so
that a single text travels with other short ones and neither waits for, nor is answered with, a batch full of a list.
Rows of different jobs take turns.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from app.errors import ServiceError
from model.tokens import Tokens
from model.vectors import FloatArray

_LEAST_SHARE = 64  # tokens that are not shared out among lanes: all threads together are as fast with them
_FULL_SPEED = 2  # a batch that is the largest divided by this is about as fast
_WARY_BATCHES = 8  # of long jobs after one of short jobs: they are smaller, as the next short job is soon to come
_WARY_SHARE = 4  # the part of a batch that those have

Outcome = FloatArray | ServiceError


@dataclass(slots=True, eq=False)
class Row:
    """One text in the queue."""

    tokens: Tokens
    job: "Job"
    place: int
    deaths: int = 0


@dataclass(slots=True, eq=False)
class Job:
    """The rows of one request, answered together."""

    task: str
    done: asyncio.Future[None]
    submitted: float
    outcomes: list[Outcome | None]
    waiting: deque[Row] = field(default_factory=deque)
    tokens: int = 0  # of the rows that wait
    open_rows: int = 0
    started: float = 0.0

    @property
    def wanted(self) -> bool:
        return not self.done.done()


class Queue:
    """Every row that waits. Batches that go again, as they are, come before anything else and are not counted."""

    def __init__(self, max_batch_tokens: int) -> None:
        self.rows = 0
        self.tokens = 0
        self.ahead = 0  # tokens that come before those of a new short job, at most: a batch of each job, or what it has
        self._max_batch_tokens = max_batch_tokens
        self._short: deque[Job] = deque()  # jobs that have rows waiting, in the order of their turns
        self._long: deque[Job] = deque()
        self._long_is_next = False
        self._wary = 0  # batches of long jobs that are still to be small
        self._again: deque[list[Row]] = deque()

    def ahead_of(self, tokens: int) -> int:
        """Tokens that would come before those of a new job of so many, at most."""
        return self.ahead if self._is_short(tokens) else self.tokens

    def has_room(self, tokens: int, limit: int) -> bool:
        """Whether a job of so many tokens would begin within the time that `limit` tokens take. A job waits for as much of
        each other as it has itself, and whatever comes alone is taken."""
        if not self.rows:
            return True
        if self._is_short(tokens):
            return self.ahead + tokens <= limit
        alone = not self._long and self.ahead + self._max_batch_tokens <= limit
        return alone or self.tokens + tokens <= limit

    def add(self, job: Job, rows: Sequence[Tokens]) -> None:
        """Rows of a new job begin to wait."""
        job.waiting.extend(Row(row, job, place) for place, row in enumerate(rows))
        self._count(job, len(rows), sum(map(len, rows)))
        self._turns_of(job).append(job)

    def remove(self, job: Job) -> None:
        """No row of the job waits any longer."""
        if job.waiting:
            self._turns_of(job).remove(job)
            self._count(job, -len(job.waiting), -job.tokens)
            job.waiting.clear()

    def put_first(self, *batches: list[Row]) -> None:
        """These batches go again, as they are, in this order."""
        self._again.extendleft(reversed(batches))

    @property
    def is_suspect(self) -> bool:
        """Whether the next batch was aboard a death of an engine."""
        return bool(self._again) and any(row.deaths for row in self._again[0])

    def share(self, free: int, lanes: int) -> int:
        """Tokens of what waits for each of the free lanes.

        Those that are busy are thought of too as long as that leaves a batch of full speed: else the last rows of a list would
        all lie on one lane.
        """
        fast = self._max_batch_tokens // _FULL_SPEED
        share = max(-(-self.tokens // lanes), min(-(-self.tokens // free), fast), _LEAST_SHARE)
        return min(share, self._max_batch_tokens)

    def next_batch(self, share: int) -> list[Row]:
        """The rows that go now, about so many tokens; none when none waits."""
        while self._again:
            if batch := [row for row in self._again.popleft() if row.job.wanted]:
                return batch
        if not self.rows:
            return []
        if self._short and not (self._long and self._long_is_next):
            self._wary = _WARY_BATCHES
            self._long_is_next = True
            return self._take_turns(self._short, share)
        self._long_is_next = False
        if self._wary:
            self._wary -= 1
            share = min(share, max(self._max_batch_tokens // _WARY_SHARE, _LEAST_SHARE))
        return self._take_turns(self._long, share)

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits, also no batch that goes again."""
        return not (self.rows or self._again)

    def _take_turns(self, turns: deque[Job], limit: int) -> list[Row]:
        """A row from each job in turn, of one task, up to so many tokens; jobs of other tasks lead the next batch."""
        batch: list[Row] = []
        tokens = 0
        others: list[Job] = []
        while turns:
            job = turns.popleft()
            if batch and job.task != batch[0].job.task:
                others.append(job)
                continue
            row = job.waiting[0]
            if batch and tokens + len(row.tokens) > limit:
                turns.appendleft(job)
                break
            batch.append(job.waiting.popleft())
            tokens += len(row.tokens)
            self._count(job, -1, -len(row.tokens))
            if job.waiting:
                self._turns_of(job).append(job)
        turns.extendleft(reversed(others))
        return batch

    def _is_short(self, tokens: int) -> bool:
        return tokens <= self._max_batch_tokens

    def _turns_of(self, job: Job) -> deque[Job]:
        """Where a job waits for its turn."""
        return self._short if self._is_short(job.tokens) else self._long

    def _count(self, job: Job, rows: int, tokens: int) -> None:
        """So many rows and tokens of a job begin to wait, or cease to where negative."""
        before = min(job.tokens, self._max_batch_tokens)
        job.tokens += tokens
        self.ahead += min(job.tokens, self._max_batch_tokens) - before
        self.rows += rows
        self.tokens += tokens
