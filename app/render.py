"""Arrays -> bytes."""

from collections.abc import Iterator, Sequence
from typing import Any

import orjson


def json_bytes(value: Any) -> bytes:
    """JSON of anything that holds float32 arrays: the shortest digits that give the same float32 back."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def json_matrices(matrices: Sequence[Any]) -> Iterator[bytes]:
    """A JSON list of matrices, or of what holds them, one at a time: a large answer is never whole in memory."""
    opening = b"["
    for matrix in matrices:
        yield opening + json_bytes(matrix)
        opening = b","
    yield b"]"
