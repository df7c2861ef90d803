"""The beginning or the end of a long text, parted where a BERT tokenizer parts it whatever stands around: no token of the
rest could be another one."""

import re
from collections.abc import Sequence
from typing import Literal

from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer

Side = Literal["left", "right"]

_SPACE = re.compile(r"[ \n]")
_SPACE_OR_IDEOGRAPH = re.compile(r"[ \n\u4e00-\u9fff]")
_SEARCHED = 1000  # characters in which there is such a place, or the text is taken whole


def is_berts(backend: Tokenizer) -> bool:
    """Whether a tokenizer normalizes texts and parts them into words as BERT's does."""
    return isinstance(backend.normalizer, normalizers.BertNormalizer) and isinstance(backend.pre_tokenizer, BertPreTokenizer)


def parting(backend: Tokenizer) -> re.Pattern[str] | None:
    """What no token goes across the beginning of; None where that can't be told.

    BERT's pre-tokenizer parts words at white space, and its normalizer puts that around Chinese characters before it
    changes anything else; WordPiece looks at one word at a time. Only added tokens are searched for in the whole text.
    """
    added = list(backend.get_added_tokens_decoder().values())
    if (
        not is_berts(backend)
        or not isinstance(backend.model, WordPiece)
        or any(map(str.isspace, "".join(token.content for token in added)))
    ):
        return None
    return _SPACE_OR_IDEOGRAPH if _parts_ideographs(backend.normalizer, added) else _SPACE


def _parts_ideographs(normalizer: normalizers.BertNormalizer, added: Sequence[AddedToken]) -> bool:
    return bool(normalizer.handle_chinese_chars) and all(token.content.isascii() and not token.single_word for token in added)


def excerpt(text: str, size: int, side: Side, parting: re.Pattern[str]) -> str:
    """At least `size` characters of a text, without its end ("right") or its beginning ("left"), or all of it.

    `side` is the side on which the text is cut.
    """
    if len(text) <= size:
        return text
    if side == "right":
        found = parting.search(text, size, size + _SEARCHED)
        return text[: found.start()] if found else text
    last = len(text) - size + 1
    places = [found.start() for found in parting.finditer(text, max(0, last - _SEARCHED), last)]
    return text[places[-1] :] if places else text
