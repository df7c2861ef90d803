"""Arrays -> bytes."""

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from model.vectors import FloatArray


def json_bytes(value: Any) -> bytes:
    """JSON of anything that holds float32 arrays: the shortest digits that give the same float32 back."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def json_matrices(matrices: Sequence[FloatArray]) -> Iterator[bytes]:
    """A JSON list of matrices, one at a time: a large answer is never whole in memory."""
    opening = b"["
    for matrix in matrices:
        yield opening + json_bytes(matrix)
        opening = b","
    yield b"]"


def json_sparse(rows: Sequence[FloatArray]) -> Iterator[bytes]:
    """A JSON list of one list per row [n, 2]: an object of index and value for each column that is not zero."""
    opening = b"["
    for row in rows:
        values = json_bytes(row[:, 1].copy())[1:-1].split(b",") if len(row) else []
        items = (b'{"index":%d,"value":%b}' % pair for pair in zip(row[:, 0].astype(int).tolist(), values, strict=True))
        yield opening + b"[" + b",".join(items) + b"]"
        opening = b","
    yield b"]"
