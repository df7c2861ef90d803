"""Texts and pairs by the heads of a checkpoint: scores, ranks, sparse vectors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from app.embedding import Embedding, embed
from app.errors import InvalidInput, ServiceError
from app.frames import SPARSE
from app.inputs import Encoding, Input, check_not_empty
from app.outcomes import Stats, filled
from app.service import Service
from app.waiting import Outcome
from model.config import ModelConfig
from model.vectors import FloatArray, sigmoid, softmax


@dataclass(frozen=True)
class Scoring(Encoding):
    """How texts and pairs become scores."""

    raw: bool = False  # as the classifier gives them


async def embed_sparse(service: Service, inputs: Sequence[Input], options: Encoding) -> tuple[list[FloatArray], Stats]:
    """The tokens of the vocabulary that each text stands for: N matrices [n, 2] of id and weight, by id.

    With `partial`, a text that failed has none and its detail says why.
    """
    service.check_kind("sparse")
    outcomes, stats = await _whole(service, inputs, options, SPARSE)
    return filled(outcomes, np.empty((0, 2), dtype=np.float32)), stats


async def predict(service: Service, inputs: Sequence[Input], options: Scoring) -> tuple[FloatArray, Stats]:
    """The score of each label for each text or pair: [N, labels], in the order of `config.labels`.

    With `partial`, the row of one that failed has no meaning and its detail says why.
    """
    service.check_kind("classifier", "reranker")
    outcomes, stats = await _whole(service, inputs, options, "scores")
    scores = np.stack(filled(outcomes, np.zeros(len(service.config.labels), dtype=np.float32)))
    return scores if options.raw else _shares(service.config, scores), stats


async def rerank(service: Service, query: str, texts: Sequence[str], options: Scoring) -> tuple[FloatArray, Stats]:
    """How well each text answers the query: [N], in the order of the texts; `partial` as with `predict`."""
    service.check_kind("reranker")
    check_not_empty(query, "a query")
    scores, stats = await predict(service, [(query, text) for text in texts], options)
    return scores[:, 0], stats


async def score(
    service: Service, a: Sequence[str], b: Sequence[str], options: Scoring
) -> tuple[FloatArray, list[ServiceError | None], Stats]:
    """How well each text of `b` goes with its neighbour in `a`, or with the only one there: [len(b)].

    By a reranker; the cosine, by an embedder, whose details are those of `a`, then those of `b`. With `partial`, each
    pair has its error or None; where the only text of `a` is bad, its error is raised.
    """
    service.check_kind("embedder", "reranker")
    _check_pairs(a, b)
    if service.config.kind == "embedder":
        return await _cosines(service, a, b, options)
    first = [*a] * len(b) if len(a) == 1 else a
    scores, stats = await predict(service, [*zip(first, b, strict=True)], options)
    return scores[:, 0], stats.errors, stats


def _check_pairs(a: Sequence[str], b: Sequence[str]) -> None:
    for texts in (a, b):
        check_not_empty(texts, "a list of texts")
    if len(a) == 1:
        check_not_empty(a[0], "a text")
    if len(a) not in (1, len(b)):
        raise InvalidInput(f"{len(a)} texts against {len(b)}; wanted one against any number, or as many on each side")


async def _cosines(
    service: Service, a: Sequence[str], b: Sequence[str], options: Scoring
) -> tuple[FloatArray, list[ServiceError | None], Stats]:
    how = Embedding(options.on_overflow, options.side, options.prompt_name, options.partial)
    vectors, stats = await embed(service, [*a, *b], how)
    of_a, of_b = stats.errors[: len(a)], stats.errors[len(a) :]
    if len(a) == 1:
        if of_a[0]:
            raise of_a[0]
        of_a = of_a * len(b)
    cosines: FloatArray = (vectors[: len(a)] * vectors[len(a) :]).sum(axis=1)
    return cosines, [one or other for one, other in zip(of_a, of_b, strict=True)], stats


async def _whole(service: Service, inputs: Sequence[Input], options: Encoding, task: str) -> tuple[list[Outcome], Stats]:
    """What the engine gives for texts or pairs that are not split: what is no mean has no mean of windows."""
    if options.on_overflow == "split":
        raise InvalidInput(f"on_overflow is split, and {task} of windows can't be merged; send truncate or error")
    service.check_list(inputs)
    habit = options.on_overflow or service.settings.on_overflow
    whole = replace(options, on_overflow="truncate" if habit == "split" else habit, splits=False)
    encoded = await service.reader.read(inputs, whole)
    return await service.infer(encoded, task, lambda _, parts: parts[0], options.partial)


def _shares(config: ModelConfig, scores: FloatArray) -> FloatArray:
    """Scores [N, labels] as probabilities; the numbers of a regression are the answer as they are (as transformers)."""
    if config.problem_type == "regression":
        return scores
    alone = len(config.labels) == 1 or config.problem_type == "multi_label_classification"
    return sigmoid(scores) if alone else softmax(scores)
