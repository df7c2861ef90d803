"""Texts as vectors, as token matrices, and compared."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from app.errors import InvalidInput
from app.frames import HIDDEN
from app.inputs import CONTEXT, Encoding, Input, Token, check_not_empty
from app.outcomes import Stats, filled
from app.service import Service
from app.waiting import Outcome
from model.config import PoolingMode
from model.vectors import Array, FloatArray, Metric, OutputDtype, compare, normalize, quantize, shorten
from model.windows import Pieces


@dataclass(frozen=True)
class Embedding(Encoding):
    """How tokens become vectors."""

    pooling: PoolingMode | None = None
    normalize: bool = True
    dimensions: int | None = None
    output_dtype: OutputDtype = "float32"


async def embed(service: Service, inputs: Sequence[Input], options: Embedding) -> tuple[Array, Stats]:
    """One vector per text: [N, out] of the output dtype. With `partial`, the row of a text that failed is zeros and its
    detail says why."""
    service.check_kind("embedder")
    _check_dtype(options.output_dtype, options.normalize)
    service.check_list(inputs)
    service.check_dimensions(options.dimensions)
    pooling = service.pooling(options.pooling)
    encoded = await service.reader.read(inputs, options)
    outcomes, stats = await service.infer(
        encoded, pooling, lambda pieces, vectors: pieces.vector(vectors, pooling), options.partial
    )
    (rows,) = await _quantized(service, [finish(service, outcomes, options)], options.output_dtype)
    return rows, stats


async def embed_tokens(
    service: Service, inputs: Sequence[Input], options: Encoding, with_tokens: bool = False, output_dtype: OutputDtype = "float32"
) -> tuple[list[Array], list[list[Token]], Stats]:
    """One matrix [L, H] per text, special tokens included; with the tokens that its rows stand for where asked.

    With `partial`, a text that failed has no rows and its detail says why.
    """
    service.check_kind("embedder")
    _check_dtype(output_dtype, normalized=False)
    service.check_list(inputs)
    encoded = await service.reader.read(inputs, options, CONTEXT, with_offsets=with_tokens)
    outcomes, stats = await service.infer(encoded, HIDDEN, Pieces.matrix, options.partial)
    matrices = filled(outcomes, np.empty((0, service.config.bert.hidden_size), dtype=np.float32))
    tokens = service.reader.name_tokens(inputs, encoded, options.prompt_name) if with_tokens else []
    return await _quantized(service, matrices, output_dtype), tokens, stats


async def similarity(
    service: Service, a: Sequence[str], b: Sequence[str], options: Embedding, metric: Metric
) -> tuple[FloatArray, Stats]:
    """Every text of `a` against every text of `b`: [len(a), len(b)]; of no meaning beside a text that failed, with `partial`.

    The details are those of `a`, then those of `b`.
    """
    for texts in (a, b):
        check_not_empty(texts, "a list of texts")
    vectors, stats = await embed(service, [*a, *b], options)
    return compare(vectors[: len(a)], vectors[len(a) :], metric), stats


def finish(service: Service, outcomes: Iterable[Outcome], options: Embedding) -> FloatArray:
    """Pooled vectors as the client wants them: [N, out]."""
    rows = filled(outcomes, np.zeros(service.config.dimension, dtype=np.float32))
    vectors = shorten(np.concatenate(rows).reshape(len(rows), -1), options.dimensions)  # numpy.stack takes three times as long
    return normalize(vectors) if options.normalize else vectors


async def _quantized(service: Service, arrays: list[FloatArray], dtype: OutputDtype) -> list[Array]:
    if dtype == "float32":
        return arrays
    return await service.reader.off_loop(lambda: [quantize(array, dtype) for array in arrays], sum(a.size for a in arrays))


def _check_dtype(dtype: OutputDtype, normalized: bool) -> None:
    if dtype in ("int8", "uint8") and not normalized:
        raise InvalidInput(
            f"output_dtype {dtype} divides the range of vectors of length 1, and these are not; "
            "wanted float32, float16, binary or ubinary here"
        )
