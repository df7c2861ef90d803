"""Texts that are too long for the encoder: windows that it can take, and one matrix or one vector of what it gave for them.

Between its frame, what stands before ([CLS], a prompt) and after ([SEP]), a long text has a body. Each window is a
text of its own: a part of the body in the same frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.config import PoolingMode
from model.tokens import IntArray, Tokens
from model.vectors import FloatArray


@dataclass(frozen=True, slots=True)
class Pieces:
    """The windows of one text; of a text that fits, the text itself.

    rows    the windows, each with its frame
    spans   the part of the body that each covers: first token, and the one after the last
    before, after   tokens of the frame
    """

    rows: list[Tokens]
    spans: list[tuple[int, int]]
    before: int
    after: int

    def matrix(self, matrices: Sequence[FloatArray]) -> FloatArray:
        """The windows' matrices [l, H] as one [L, H], a row per token of the text, its frame once.

        A token is taken from the window in which the smaller of its contexts, left and right, is largest: the rule
        of google-research/bert, run_squad.py, `_check_is_max_context`. Of two equal ones the first is taken.
        """
        if len(matrices) == 1:
            return matrices[0]
        body = self.spans[-1][1]
        merged = np.empty((self.before + body + self.after, matrices[0].shape[1]), dtype=np.float32)
        merged[: self.before] = matrices[0][: self.before]
        merged[self.before + body :] = matrices[-1][len(matrices[-1]) - self.after :]
        rows, best = merged[self.before : self.before + body], np.full(body, -1)  # best: the largest context so far
        for (start, stop), matrix in zip(self.spans, matrices, strict=True):
            context = _contexts(stop - start)
            better = context > best[start:stop]
            best[start:stop][better] = context[better]
            rows[start:stop][better] = matrix[self.before : self.before + stop - start][better]
        return merged

    def vector(self, vectors: Sequence[FloatArray], pooling: PoolingMode) -> FloatArray:
        """The windows' vectors [out] as one: their mean, each weighted by its tokens; of max pooling, the largest numbers.

        Of mean pooling, and windows that do not overlap, that is the mean over all rows of all windows, through an
        affine projection too.
        """
        if len(vectors) == 1:
            return vectors[0]
        stacked = np.stack(vectors)  # [windows, out]
        if pooling == "max":
            return np.asarray(stacked.max(axis=0))
        return np.average(stacked, axis=0, weights=[len(row) for row in self.rows]).astype(np.float32)


def split(tokens: Tokens, max_tokens: int, before: int = 1, after: int = 1, overlap: int = 0) -> Pieces:
    """A text of any length as the fewest windows of at most `max_tokens`, frame included.

    Neighbours share `overlap` tokens of the body. The windows are of one length, give or take a token: none is left
    with a short end of the text and little context. Raises ValueError where frame and overlap leave no room.
    """
    room, body = max_tokens - before - after, len(tokens) - before - after
    if not 0 <= overlap < room:
        raise ValueError(f"an overlap of {overlap} in windows of {room} tokens; wanted 0 to {room - 1}")
    if body <= room:
        return Pieces([tokens], [(0, body)], before, after)
    count = -(-(body - overlap) // (room - overlap))
    total = body + (count - 1) * overlap
    spans = [(total * n // count - n * overlap, total * (n + 1) // count - n * overlap) for n in range(count)]
    return Pieces([_window(tokens, span, before, after) for span in spans], spans, before, after)


def _window(tokens: Tokens, span: tuple[int, int], before: int, after: int) -> Tokens:
    def part(array: IntArray) -> IntArray:
        start, stop = before + span[0], before + span[1]
        return np.concatenate((array[:before], array[start:stop], array[len(array) - after :]))

    return Tokens(part(tokens.ids), part(tokens.types))


def _contexts(length: int) -> IntArray:
    """For each token of a window's body, the smaller of its contexts in it: 0, 1, 2, …, 2, 1, 0."""
    place = np.arange(length, dtype=np.int32)
    return np.minimum(place, length - 1 - place)
