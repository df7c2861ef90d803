"""One encoded text, or pair of texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The ids that the encoder sees for one text, special tokens included.

    ids      [L] int32
    types    [L] int32, the segment of each token
    cut      how many tokens of the text were left out because it was too long, as far as it was read
    offsets  [L, 2] int32, the characters of the text that each token covers; (0, 0) for special tokens;
             only where they were asked for
    """

    ids: IntArray
    types: IntArray
    cut: int = 0
    offsets: IntArray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, ids: Sequence[int], types: Sequence[int] | None = None) -> "Tokens":
        """Tokens from plain lists; without `types` all are of the first segment."""
        array = np.asarray(ids, dtype=np.int32)
        return cls(array, np.zeros_like(array) if types is None else np.asarray(types, dtype=np.int32))


def split_rows(lengths: NDArray[Any], ids: IntArray, types: IntArray) -> list[Tokens]:
    """The tokens of each text, out of those of all texts end to end; `lengths` [N] says how many each has."""
    ends = np.cumsum(lengths)
    return [Tokens(ids[end - length : end], types[end - length : end]) for length, end in zip(lengths, ends, strict=True)]
