"""What became of each text of a request, and what the request cost."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from app.errors import ServiceError
from app.inputs import Encoded, Item
from app.scheduler import Answer
from app.waiting import Outcome
from model.vectors import FloatArray
from model.windows import Pieces

Merge = Callable[[Pieces, list[FloatArray]], FloatArray]
"""What the engine gave for the pieces of a text, as one array."""


@dataclass(frozen=True, slots=True)
class Detail:
    """What was done to one text: tokens that were encoded for it, whether it was cut, in how many pieces; or why it failed."""

    tokens: int
    truncated: bool
    pieces: int
    error: ServiceError | None = None


@dataclass(frozen=True)
class Stats:
    """What a request cost: real tokens (special ones included), characters, texts that were cut, seconds by stage."""

    texts: int
    tokens: int
    characters: int
    truncated: int
    tokenize: float
    queue: float
    infer: float
    device: str
    details: list[Detail]

    @property
    def errors(self) -> list[ServiceError | None]:
        """Why each text failed; None for those that did not."""
        return [detail.error for detail in self.details]


def merged(encoded: Encoded, answer: Answer, merge: Merge) -> list[Outcome]:
    """One outcome per text: its refusal, the error of its first piece that failed, or what `merge` makes of its pieces."""
    coming = iter(answer.outcomes)
    outcomes: list[Outcome] = []
    for item in encoded.items:
        if isinstance(item, ServiceError):
            outcomes.append(item)
            continue
        parts = list(islice(coming, len(item.pieces.rows)))
        error = next((part for part in parts if isinstance(part, ServiceError)), None)
        outcomes.append(error or merge(item.pieces, [part for part in parts if not isinstance(part, ServiceError)]))
    return outcomes


def filled(outcomes: Iterable[Outcome], missing: FloatArray) -> list[FloatArray]:
    """The outcomes, with something else in the place of errors."""
    return [missing if isinstance(outcome, ServiceError) else outcome for outcome in outcomes]


def raise_first(outcomes: Sequence[Outcome]) -> list[FloatArray]:
    """The outcomes, which must be arrays; raises the first that is an error."""
    for outcome in outcomes:
        if isinstance(outcome, ServiceError):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, ServiceError)]


def detail_of(item: Item | ServiceError, outcome: Outcome) -> Detail:
    error = outcome if isinstance(outcome, ServiceError) else None
    if isinstance(item, ServiceError):
        return Detail(0, False, 0, error)
    rows = item.pieces.rows
    return Detail(sum(map(len, rows)), item.truncated, len(rows), error)
