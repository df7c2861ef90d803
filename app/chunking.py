"""Chunks of long texts, each with its vector and its place in the text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.embedding import Embedding, finish
from app.errors import InvalidInput, ServiceError, WrongKind
from app.frames import HIDDEN
from app.inputs import CONTEXT, Span
from app.outcomes import Stats
from app.service import Service
from app.waiting import Outcome
from model.vectors import FloatArray
from model.windows import Pieces


@dataclass(frozen=True)
class Chunking(Embedding):
    """How a text is parted: chunks of so many of its tokens, special ones and a prompt's not counted.

    late  a chunk's vector is the mean over its rows of the whole text's matrix (arXiv 2409.04701), not that of its text alone
    """

    chunk_tokens: int = 128
    overlap_tokens: int = 0
    late: bool = False


@dataclass(frozen=True, slots=True)
class Chunk:
    """`text[start:end]`, in code points of the client's text."""

    start: int
    end: int
    embedding: FloatArray


async def embed_chunks(service: Service, texts: Sequence[str], options: Chunking) -> tuple[list[list[Chunk]], Stats]:
    """The chunks of each text, in order; of a text of any length where `on_overflow` does not say otherwise.

    With `partial`, a text that failed has no chunks and its detail says why.
    """
    service.check_kind("embedder")
    service.check_list(texts)
    service.check_dimensions(options.dimensions)
    pooling = service.pooling(options.pooling)
    _check_chunking(service, options)
    limits = options.chunk_tokens, options.overlap_tokens
    encoded, spans = await service.reader.read_chunks(texts, options, *limits, CONTEXT, options.late)
    if options.late:
        outcomes, stats = await service.infer(encoded, HIDDEN, Pieces.matrix, options.partial)
    else:
        outcomes, stats = await service.infer(encoded, pooling, lambda _, vectors: np.array(vectors), options.partial)
    return [_chunks(service, *pair, options) for pair in zip(outcomes, spans, strict=True)], stats


def _check_chunking(service: Service, options: Chunking) -> None:
    room = service.reader.room(options.prompt_name)
    if not 1 <= options.chunk_tokens <= room:
        raise InvalidInput(f"chunk_tokens is {options.chunk_tokens}; wanted 1 to {room}")
    if not 0 <= options.overlap_tokens < options.chunk_tokens:
        raise InvalidInput(
            f"overlap_tokens is {options.overlap_tokens}; wanted 0 to {options.chunk_tokens - 1}, below chunk_tokens"
        )
    if options.late and options.pooling not in (None, "mean"):
        raise InvalidInput(f"pooling is {options.pooling} and late is true; late chunks are means: send mean or none")
    if options.late and service.config.dense:
        raise WrongKind("this checkpoint projects its vectors, and late chunks are means of rows before that; send late: false")


def _chunks(service: Service, outcome: Outcome, spans: list[Span], options: Chunking) -> list[Chunk]:
    """The chunks of a text out of its token matrix if `late`, else out of one vector per chunk: [C, out]."""
    if isinstance(outcome, ServiceError) or not spans:
        return []
    rows = [outcome[span.first : span.last].mean(axis=0) for span in spans] if options.late else outcome
    return [Chunk(span.start, span.end, vector) for span, vector in zip(spans, finish(service, rows, options), strict=True)]
