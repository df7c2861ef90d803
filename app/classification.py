"""Labels for texts: by a classifier that was fitted on examples, or by the names of the labels alone."""

import asyncio
import contextlib
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from app.bulk import embed_many
from app.classifiers import Card, Classifier, CrossValidation, Store
from app.embedding import Embedding, embed
from app.errors import Conflict, EmptyInput, InvalidInput, NotFound, NotReady, ServiceError
from app.fitting import fit_in_process
from app.inputs import Input
from app.outcomes import Stats
from app.service import Service
from model.config import PoolingMode
from model.finetune import Codes, Fitted, accuracy, macro_f1
from model.vectors import FloatArray, softmax

MAX_EXAMPLES = 100_000
MAX_LABELS = 1000
_MAX_PROBABILITIES = 20_000_000  # examples × labels: a fit holds several numbers for each, 8 bytes long
_MAX_LABEL = 200  # characters
_MAX_TEMPLATE = 1000  # characters
_KEPT_LABELS = 4096  # vectors of labels that are kept
# The temperature that all-MiniLM-L6-v2 was trained with. Log loss of docs/examples/tickets.csv with its labels "billing",
# "delivery" and "technical", or "technical problem": 0.67 or 0.46 at 10, 0.72 or 0.32 at 20, 1.09 or 0.33 at 40.
_SCALE = 20.0

LabelKey = tuple[PoolingMode, str, str]
"""Pooling, prompt, and the label in its template: what makes its vector."""

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    text: str
    label: str


@dataclass(frozen=True)
class Outcome:
    """A classifier that was fitted and saved; its confusion table (see `Fitted`), and what it took."""

    card: Card
    confusion: Codes | None
    seconds: float


@dataclass(frozen=True)
class Classified:
    """A row per text, a column per label: [N, C]; of no meaning where the stats hold an error."""

    labels: Sequence[str]
    probabilities: FloatArray
    stats: Stats


class Classification:
    """Classifiers over a service. Use from one event loop only."""

    def __init__(self, service: Service) -> None:
        self.store = Store(Path(os.path.expanduser(service.settings.data_dir)) / "classifiers")
        self._service = service
        self._turn = asyncio.Lock()  # one fit at a time: each holds the vectors of all of its examples
        self._label_vectors: OrderedDict[LabelKey, FloatArray] = OrderedDict()

    async def fit(
        self,
        name: str,
        examples: Sequence[Example],
        options: Embedding,
        balanced: bool = False,
        progress: Callable[[int], object] = lambda count: None,
    ) -> Outcome:
        """Fit a classifier on examples and save it under a name, in the place of the one that has it.

        No deadline applies. Cancelled or refused, it leaves what was there; once the file is being written it is neither.
        """
        await asyncio.to_thread(self.store.prepare, name)
        labels = check_examples(examples)
        self._service.space(options.pooling, options.prompt_name)  # refuses what is not there before it waits for its turn
        return await self._until_closing(self._fit(name, examples, labels, options, balanced, progress))

    async def classify(self, name: str, inputs: Sequence[Input], options: Embedding) -> Classified:
        """The probability of each label of a fitted classifier. Raises NotFound, or Conflict where it can't be used here.

        Where the options say nothing of texts that are too long, they are read as in the fit.
        """
        classifier = self.store.find(name)
        card = classifier.card
        self._check_asked(name, card, options)
        if problem := self._mismatch(card):
            raise Conflict(f"classifier {name!r} {problem}")
        habit = options.on_overflow or card.on_overflow
        how = replace(options, pooling=card.pooling, prompt_name=card.prompt_name, on_overflow=habit)
        vectors, stats = await embed(self._service, inputs, how)
        return Classified(card.labels, classifier.head.probabilities(vectors), stats)

    async def classify_by_names(
        self, inputs: Sequence[Input], labels: Sequence[str], template: str, options: Embedding
    ) -> Classified:
        """The probability of each label, from the cosine of a text and the label's name in the template's `{}`.

        The softmax of scaled cosines (arXiv 2103.00020, section 3.1.2): a baseline that needs no examples.
        """
        _check_names(labels, template)
        phrases = [template.replace("{}", label) for label in labels]
        label_vectors = await self._embed_labels(phrases, replace(options, partial=False))
        vectors, stats = await embed(self._service, inputs, options)
        return Classified(labels, softmax(_SCALE * (vectors @ label_vectors.T)), stats)

    def known(self) -> Iterator[tuple[str, Card | None, str | None]]:
        """Every classifier by its name, with what `problem` says of it."""
        for name in self.store.names():
            with contextlib.suppress(NotFound):  # deleted by another process since
                yield name, *self.problem(name)

    def problem(self, name: str) -> tuple[Card | None, str | None]:
        """What is known of a classifier, and why it can't be used here if it can't. Raises NotFound."""
        try:
            card = self.store.find(name).card
        except Conflict as error:
            return None, error.message
        return card, self._mismatch(card)

    async def delete(self, name: str) -> None:
        await asyncio.to_thread(self.store.delete, name)

    async def _fit(
        self,
        name: str,
        examples: Sequence[Example],
        labels: list[str],
        options: Embedding,
        balanced: bool,
        progress: Callable[[int], object],
    ) -> Outcome:
        async with self._turn:
            start = time.perf_counter()
            options = replace(options, on_overflow=options.on_overflow or self._service.settings.on_overflow)
            texts = [example.text for example in examples]
            vectors, truncated = await embed_many(self._service, texts, options, progress, "examples[{}].text")
            places = {label: place for place, label in enumerate(labels)}
            codes = np.array([places[example.label] for example in examples], dtype=np.int64)
            fitted = await fit_in_process(vectors, codes, balanced)
            counts = dict(zip(labels, np.bincount(codes).tolist(), strict=True))
            card = Card(
                labels=labels,
                counts=counts,
                truncated=truncated,
                class_weight="balanced" if balanced else None,
                cross_validation=_judged(fitted, counts),
                on_overflow=options.on_overflow,
                **asdict(self._service.space(options.pooling, options.prompt_name)),
            )
            await _to_its_end(asyncio.to_thread(self.store.save, name, Classifier(card, fitted.head)))
            return Outcome(card, fitted.confusion, time.perf_counter() - start)

    async def _until_closing(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of work that takes long; NotReady when the server stops before it is done."""
        task = asyncio.ensure_future(work)
        closing = asyncio.ensure_future(self._service.closing.wait())
        try:
            await asyncio.wait((task, closing), return_when=asyncio.FIRST_COMPLETED)
            task.cancel()
            await asyncio.wait((task,))
            if task.cancelled():
                raise NotReady("the server stops or has changed its model; send the request again", retry_after=1)
            return task.result()
        finally:
            task.cancel()
            closing.cancel()
            await asyncio.wait((task, closing))  # whoever goes on leaves no process behind

    def _check_asked(self, name: str, card: Card, options: Embedding) -> None:
        for option in ("pooling", "prompt_name"):
            asked, kept = getattr(options, option), getattr(card, option)
            if asked is not None and asked != kept:
                raise Conflict(f"classifier {name!r} was fitted with {option} {kept!a}; leave {option} out")

    def _mismatch(self, card: Card) -> str | None:
        """Why a classifier does not belong to the vectors that are made here; None where it does."""
        again = "serve the one that it was fitted with, or fit it again"
        try:
            here = self._service.space(card.pooling, card.prompt_name)
        except ServiceError as error:
            made = f"was fitted with pooling {card.pooling} and prompt {card.prompt_name!a}"
            return f"{made}, and can't be used with this model: {error.message}; {again}"
        if (card.model, card.dimension) != (here.model, here.dimension):
            return f"belongs to another model: its SHA-256 is {card.model[:16]}…, served is {here.model[:16]}…; {again}"
        if (card.prompt_name, card.prompt) != (here.prompt_name, here.prompt):
            return f"was fitted with another text of the prompt {card.prompt_name!a} than this model has; {again}"
        return None

    async def _embed_labels(self, phrases: Sequence[str], options: Embedding) -> FloatArray:
        """The vector of each label, [C, out]; those that were asked for lately are kept."""
        space = self._service.space(options.pooling, options.prompt_name)
        keys = [(space.pooling, space.prompt, phrase) for phrase in phrases]
        kept = {key: self._label_vectors[key] for key in keys if key in self._label_vectors}
        missing = [key for key in dict.fromkeys(keys) if key not in kept]
        for start in range(0, len(missing), self._service.settings.max_client_batch_size):
            part = missing[start : start + self._service.settings.max_client_batch_size]
            vectors, stats = await embed(self._service, [key[2] for key in part], replace(options, on_overflow="truncate"))
            if stats.truncated:
                raise InvalidInput(f"a label in its template has more than {self._service.config.max_tokens} tokens; shorten it")
            kept |= zip(part, vectors, strict=True)
        self._keep(kept)
        return np.stack([kept[key] for key in keys])

    def _keep(self, vectors: dict[LabelKey, FloatArray]) -> None:
        for key, vector in vectors.items():
            self._label_vectors[key] = vector
            self._label_vectors.move_to_end(key)
        while len(self._label_vectors) > _KEPT_LABELS:
            self._label_vectors.popitem(last=False)


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """The result of work that can't be given up: whoever is cancelled meanwhile, waits for it and goes on."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait((task,))
    return task.result()


def check_examples(examples: Sequence[Example]) -> list[str]:
    """The labels of examples, sorted. Raises InvalidInput or EmptyInput that names the first bad one."""
    if not 2 <= len(examples) <= MAX_EXAMPLES:
        raise InvalidInput(f"there are {len(examples)} examples; wanted 2 to {MAX_EXAMPLES}")
    for place, example in enumerate(examples):
        if not example.text:
            raise EmptyInput(f"examples[{place}].text is empty; wanted text")
        check_label(example.label, f"examples[{place}].label")
    labels = sorted(Counter(example.label for example in examples))
    if not 2 <= len(labels) <= MAX_LABELS:
        raise InvalidInput(f"the examples have {len(labels)} different labels; wanted 2 to {MAX_LABELS}")
    if len(examples) * len(labels) > _MAX_PROBABILITIES:
        raise InvalidInput(
            f"{len(examples)} examples of {len(labels)} labels; wanted a product of at most {_MAX_PROBABILITIES}, send fewer"
        )
    return labels


def check_label(label: str, where: str) -> None:
    if not label:
        raise EmptyInput(f"{where} is empty; wanted a name")
    if len(label) > _MAX_LABEL:
        raise InvalidInput(f"{where} has {len(label)} characters; wanted at most {_MAX_LABEL}")


def _check_names(labels: Sequence[str], template: str) -> None:
    if not 2 <= len(labels) <= MAX_LABELS:
        raise InvalidInput(f"labels names {len(labels)}; wanted 2 to {MAX_LABELS}")
    for place, label in enumerate(labels):
        check_label(label, f"labels[{place}]")
    if len(set(labels)) < len(labels):
        twice = next(place for place, label in enumerate(labels) if label in labels[:place])
        raise InvalidInput(f"labels[{twice}] stands there twice; wanted different labels")
    if template.count("{}") != 1 or len(template) > _MAX_TEMPLATE:
        raise InvalidInput(f"template: wanted at most {_MAX_TEMPLATE} characters, with {{}} once, where the label goes")


def _judged(fitted: Fitted, counts: dict[str, int]) -> CrossValidation:
    if fitted.confusion is None:
        lone = sum(count == 1 for count in counts.values())
        reason = f"{lone} of {len(counts)} labels have one example, so that none can be held out; send two or more of each"
        return CrossValidation(folds=0, accuracy=None, macro_f1=None, reason=reason)
    scores = {"accuracy": accuracy(fitted.confusion), "macro_f1": macro_f1(fitted.confusion)}
    return CrossValidation(folds=fitted.folds, **scores, reason=None)
