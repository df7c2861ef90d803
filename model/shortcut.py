"""Texts in ASCII, read by a BERT's tokenizer in less than half the time."""

import re
import string

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Whitespace

from model.excerpts import is_berts

Text = str | tuple[str, str]

_MARKS = string.punctuation.encode()
_CONTROLS = bytes([*range(9), 11, 12, *range(14, 32), 127])
_KINDS = bytes.maketrans(_MARKS + _CONTROLS, b"!" * len(_MARKS) + b"\0" * len(_CONTROLS))
_TO_PART = re.compile(f"[{re.escape(string.punctuation)}]{{2,}}|_")


class Shortcut:
    """Another way to the same ids, for texts in ASCII without control characters.

    BertNormalizer and BertPreTokenizer look up each character in tables of Unicode, several times over. All that they do to
    such a text is to make capitals small, and to part words at white space and around each punctuation character. So does
    the pre-tokenizer that this one has, but that it parts no two of them, and takes an underscore for a letter.
    """

    def __init__(self, backend: Tokenizer, lowers: bool) -> None:
        self.backend = Tokenizer(backend.model)  # one model for both
        self.backend.pre_tokenizer = Whitespace()
        self.backend.post_processor = backend.post_processor
        self._added = [token.content for token in backend.get_added_tokens_decoder().values()]
        self._lowers = lowers

    def lay_out(self, text: Text) -> Text | None:
        """A text or a pair as `backend` reads it, with other offsets; None for one that is not for it."""
        if isinstance(text, str):
            return self._lay_out(text)
        first, second = map(self._lay_out, text)
        return None if first is None or second is None else (first, second)

    def _lay_out(self, text: str) -> str | None:
        if not text.isascii():
            return None
        for content in self._added:
            if content[:1] in text and content in text:  # to search for one character takes next to no time
                return None
        kinds = text.encode().translate(_KINDS)
        if b"\0" in kinds:
            return None
        if self._lowers:
            text = text.lower()
        return _TO_PART.sub(_part, text) if b"!!" in kinds or "_" in text else text


def _part(marks: re.Match[str]) -> str:
    return f" {' '.join(marks[0])} "


def find_shortcut(backend: Tokenizer, lowers: bool) -> Shortcut | None:
    """None where the backend is no BERT's, or searches for added tokens in what it has normalized.

    `lowers`: whether it makes capitals small before it normalizes.
    """
    added = backend.get_added_tokens_decoder().values()
    if not is_berts(backend) or any(token.normalized for token in added):
        return None
    return Shortcut(backend, lowers or backend.normalizer.lowercase)
