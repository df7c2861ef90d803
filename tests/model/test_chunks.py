"""Chunks cover a text in order and end where a reader would pause."""

from itertools import pairwise
from pathlib import Path

import pytest
from hostile import HOSTILE
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chunks import characters, chunk_spans
from model.config import ModelConfig
from model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(minilm: Path) -> Tokenizer:
    return Tokenizer.from_folder(minilm, ModelConfig.from_folder(minilm))


def chunks_of(tokenizer: Tokenizer, text: str, tokens: int, overlap: int = 0) -> list[str]:
    offsets = tokenizer.describe(text, special_tokens=False).offsets
    places = [characters(text, offsets, *span) for span in chunk_spans(text, offsets, tokens, overlap)]
    return [text[start:end] for start, end in places]


@pytest.mark.parametrize(
    ("text", "tokens", "overlap", "wanted"),
    [
        ("One two. Three four. Five six seven.", 7, 0, ["One two. Three four.", "Five six seven."]),
        ("One two. Three four. Five", 100, 0, ["One two. Three four. Five"]),
        ("one two three four five", 2, 0, ["one two", "three four", "five"]),
        ("one two three four five", 3, 1, ["one two three", "three four five"]),
        ("one 3.14 two three", 4, 0, ["one 3.14", "two three"]),
        ('He said "Go!" Then we left.', 7, 0, ['He said "Go!"', "Then we left."]),
        ("Really?! Yes. No", 5, 0, ["Really?! Yes.", "No"]),
        ("first line\r\nsecond line", 3, 0, ["first line", "second line"]),
        ("first line\u2028second line", 3, 0, ["first line", "second line"]),
        ("我喜欢苹果。你呢？他说！好的吗", 8, 0, ["我喜欢苹果。", "你呢？他说！", "好的吗"]),
        ("「走。」他说。", 5, 0, ["「走。」", "他说。"]),
        ("我喜欢苹果", 2, 0, ["我喜", "欢苹", "果"]),
        ("a well-known thing", 2, 0, ["a", "well-", "known thing"]),
        ("cafe\u0301 nai\u0308ve", 1, 0, ["cafe\u0301", "nai\u0308ve"]),
        ("go 👩‍👩‍👧‍👦 👍🏽 now", 1, 0, ["go", "👩‍👩‍👧‍👦", "👍🏽", "now"]),
        ("unaffable", 1, 0, ["una", "ffa", "ble"]),
        ("   ", 1, 0, []),
        ("", 5, 2, []),
    ],
)
def test_by_hand(tokenizer: Tokenizer, text: str, tokens: int, overlap: int, wanted: list[str]) -> None:
    assert chunks_of(tokenizer, text, tokens, overlap) == wanted


@given(
    st.lists(
        st.sampled_from(["word", "unaffable", "3.14", "苹果", "。", ".", "!", "👍🏽", "e\u0301", "\r\n", " ", "\u200d", '"'])
    )
    | st.sampled_from(HOSTILE).map(list),
    st.integers(1, 9),
    st.integers(0, 8),
)
@settings(deadline=None, database=None, max_examples=200)
def test_chunks_cover_the_tokens_in_order(tokenizer: Tokenizer, parts: list[str], tokens: int, overlap: int) -> None:
    text, overlap = "".join(parts), min(overlap, tokens - 1)
    offsets = tokenizer.describe(text, special_tokens=False).offsets
    spans = list(chunk_spans(text, offsets, tokens, overlap))
    assert all(0 < last - first <= tokens for first, last in spans)
    assert all(
        0 <= left[1] - right[0] <= overlap and left[0] < right[0] and left[1] < right[1] for left, right in pairwise(spans)
    )
    if offsets:
        assert (spans[0][0], spans[-1][1]) == (0, len(offsets))
    for first, last in spans:
        start, end = characters(text, offsets, first, last)
        assert start <= offsets[first][0] <= offsets[last - 1][1] <= end <= len(text)
        if last < len(offsets):
            assert end <= max(offsets[last][0], offsets[last - 1][1])


def test_a_long_text_is_read_once(tokenizer: Tokenizer) -> None:
    """The text is never copied for a token: a million characters of words in a breath, and every word in its place."""
    text = "word " * 200_000
    offsets = [(5 * n, 5 * n + 4) for n in range(200_000)]
    spans = list(chunk_spans(text, offsets, 200, 20))
    assert spans[:2] == [(0, 200), (180, 380)]
    assert characters(text, offsets, *spans[-1])[1] == len(text) - 1
