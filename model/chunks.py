"""A long text as chunks that end where a reader would pause: at a sentence's end where there is one, else at a word's."""

import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Offsets = Sequence[tuple[int, int]]
"""Of each token, the characters of the text that it covers: start, and the one after the last."""

_INSIDE, _BESIDE, _WORD, _SENTENCE = range(4)  # how good a pause there is between two tokens
_MARKS = (".", "!", "?")  # end a sentence where a space follows: there is none in 3.14
_FULL_WIDTH_MARKS = ("。", "！", "？")  # end a sentence by themselves
_CLOSING = "\"'”’»)]}」』）】》"  # belong to the sentence before them
_SAME_SENTENCE = _CLOSING + "".join(_FULL_WIDTH_MARKS)
_LINE_ENDS = frozenset("\n\r\v\f\x85\u2028\u2029")
_LEANING = frozenset(("Mn", "Mc", "Me", "Cf"))  # accents and joiners: parts of what stands before them, as skin tones are
_SKIN_TONES = "🏻🏼🏽🏾🏿"


def chunk_spans(text: str, offsets: Offsets, chunk_tokens: int, overlap_tokens: int = 0) -> Iterator[tuple[int, int]]:
    """Chunks of at most `chunk_tokens` tokens as (first token, the one after the last), in order, every token in one.

    A chunk ends at the last sentence's end that it can hold, else at the last space, else beside a word. The next one
    starts with a word, at most `overlap_tokens` (fewer than `chunk_tokens`) before that end.
    """
    pauses = _pauses(text, offsets)
    first, last = 0, 0
    while last < len(offsets):
        last = _end(pauses, first + overlap_tokens + 1, min(first + chunk_tokens, len(offsets)))
        yield first, last
        first = _start(pauses, last - overlap_tokens, last)


def characters(text: str, offsets: Offsets, first: int, last: int) -> tuple[int, int]:
    """Where in the text the tokens [first, last) stand, with the accents and joiners that the tokenizer dropped after them."""
    start, end = offsets[first][0], offsets[last - 1][1]
    limit = offsets[last][0] if last < len(offsets) else len(text)
    while end < limit and not text[end].isspace():
        end += 1
    return start, end


def _end(pauses: NDArray[np.int8], low: int, high: int) -> int:
    """The best pause from `low` to `high`, of equal ones the last."""
    if high == len(pauses) - 1:
        return high
    return high - int(np.argmax(pauses[low : high + 1][::-1]))


def _start(pauses: NDArray[np.int8], low: int, high: int) -> int:
    """The first pause from `low` on that is not inside a word; `high` where there is none before it."""
    outside = np.flatnonzero(pauses[low:high] > _INSIDE)
    return low + int(outside[0]) if len(outside) else high


def _pauses(text: str, offsets: Offsets) -> NDArray[np.int8]:
    """The pause before each token, and that after the last: [L + 1]."""
    between = [_pause(text, end, start) for (_, end), (start, _) in pairwise(offsets)]
    return np.array([_SENTENCE, *between, _SENTENCE], dtype=np.int8)


def _pause(text: str, end: int, start: int) -> int:
    """The pause between two tokens, of which one ends where the other starts or some characters before."""
    if start < max(end, 1) or start == len(text):
        return _INSIDE  # pieces of one character: Hangul is taken apart
    gap = text[end:start]
    if not _LINE_ENDS.isdisjoint(gap):
        return _SENTENCE
    spaced = any(map(str.isspace, gap))
    sentence = text[max(0, end - 4) : end].rstrip(_CLOSING)
    if sentence.endswith(_FULL_WIDTH_MARKS) and (spaced or text[start] not in _SAME_SENTENCE):
        return _SENTENCE
    if spaced:
        return _SENTENCE if sentence.endswith(_MARKS) else _WORD
    before, after = text[start - 1], text[start]
    joined = before.isalnum() and after.isalnum() and not (_ideographic(before) or _ideographic(after))
    leaning = unicodedata.category(before) == "Cf" or unicodedata.category(after) in _LEANING or after in _SKIN_TONES
    return _INSIDE if joined or leaning else _BESIDE


def _ideographic(character: str) -> bool:
    return "\u3400" <= character <= "\u9fff" or "\uf900" <= character <= "\ufaff" or "\U00020000" <= character <= "\U0003ffff"
