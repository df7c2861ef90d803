"""Any number of texts: slices that take turns with the texts of others, and wait where another request would be refused."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from app.embedding import Embedding
from app.errors import Overloaded, Recovering, ServiceError
from app.inputs import Encoded
from app.outcomes import raise_first
from app.scheduler import Answer
from app.service import Service
from model.tokens import Tokens
from model.vectors import FloatArray, normalize

_FRAME = 2  # special tokens around a text
_PATIENCE = 0.1  # seconds until work without a deadline asks a full queue again


async def embed_many(
    service: Service,
    texts: Sequence[str],
    options: Embedding,
    progress: Callable[[int], object] = lambda count: None,
    where: str = "texts[{}]",
) -> tuple[FloatArray, int]:
    """The vectors that `embed` gives, [N, out], for any number of texts, and how many of them were cut.

    They go through the queue in slices that take turns with the rows of others. Where `embed` would be refused
    because the queue is full, this waits; no deadline applies, and what a request may hold is what a text may.
    `progress` is told of each slice that is done. A text is refused by its place, as `where` puts it.
    """
    service.check_kind("embedder")
    pooling = service.pooling(options.pooling)
    vectors = np.empty((len(texts), service.config.dimension), dtype=np.float32)
    truncated = done = 0
    for part in _slices(service, texts):
        encoded = await service.reader.read(part, replace(options, partial=True))
        _check_each(service, encoded, done, where)
        answer = await _submit_patiently(service, encoded.rows, pooling)
        outcomes = await service.merge(encoded, answer, lambda pieces, vectors: pieces.vector(vectors, pooling))
        vectors[done : done + len(part)] = np.stack(raise_first(outcomes))
        truncated += service.account(encoded, answer, outcomes).truncated
        done += len(part)
        progress(len(part))
    return normalize(vectors) if options.normalize else vectors, truncated


def _slices(service: Service, texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Texts in lists of half the queue's tokens at most, if a character is a token; so that they are never all in memory."""
    room, limit = service.scheduler.max_queue_tokens // 2, service.settings.max_client_batch_size
    start = characters = 0
    for place, text in enumerate(texts):
        if place > start and (characters + len(text) + _FRAME > room or place - start == limit):
            yield texts[start:place]
            start, characters = place, 0
        characters += len(text) + _FRAME
    yield texts[start:]


async def _submit_patiently(service: Service, rows: Sequence[Tokens], task: str) -> Answer:
    """The answer for any number of rows, which go in parts of half the queue's tokens at most."""
    answers = [
        await _submit_until_admitted(service, part, task) for part in _parts(rows, service.scheduler.max_queue_tokens // 2)
    ]
    outcomes = [outcome for answer in answers for outcome in answer.outcomes]
    return Answer(outcomes, sum(a.queue_seconds for a in answers), sum(a.infer_seconds for a in answers))


async def _submit_until_admitted(service: Service, rows: Sequence[Tokens], task: str) -> Answer:
    while True:
        try:
            return await service.scheduler.submit(rows, task)
        except (Overloaded, Recovering):
            await asyncio.sleep(_PATIENCE)


def _check_each(service: Service, encoded: Encoded, start: int, where: str) -> None:
    """Raises the error of the first text that has one, or is too much for a request, by its place."""
    for place, item in enumerate(encoded.items, start):
        try:
            if isinstance(item, ServiceError):
                raise item
            service.reader.check_tokens(map(len, item.pieces.rows))
        except ServiceError as error:
            raise type(error)(f"{where.format(place)}: {error.message}") from None


def _parts(rows: Sequence[Tokens], room: int) -> Iterator[Sequence[Tokens]]:
    """Rows in lists of at most so many tokens, or of one row."""
    start = tokens = 0
    for place, row in enumerate(rows):
        if place > start and tokens + len(row) > room:
            yield rows[start:place]
            start, tokens = place, 0
        tokens += len(row)
    yield rows[start:]
