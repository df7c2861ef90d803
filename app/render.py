"""Arrays -> bytes: JSON, base64, raw rows, safetensors; piece by piece, so that a large answer is never whole in memory."""

import base64
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson

from model.vectors import Array, FloatArray

_BLOCK = 2**18  # bytes
_NUMBERS = 2**14  # of an array that are rendered at once: some 200 KB of JSON, and a millisecond or two
_SAFETENSORS = {"float32": "F32", "float16": "F16", "int8": "I8", "uint8": "U8"}


def json_bytes(value: Any) -> bytes:
    """JSON of anything that holds arrays: the shortest digits that give the same float32 back."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def json_list(items: Iterable[Any]) -> Iterator[bytes]:
    """A JSON list, one item at a time, and of a large array a few rows."""
    yield b"["
    comma = b""
    for item in items:
        for piece in _json_pieces(item):
            yield comma + piece
            comma = b""
        comma = b","
    yield b"]"


def _json_pieces(value: Any) -> Iterator[bytes]:
    """JSON of one value, in pieces where it is a large array or an object that holds one."""
    if _is_large(value):
        for place, rows in enumerate(_groups(value)):
            yield (b"," if place else b"[") + json_bytes(rows)[1:-1]
        yield b"]"
    elif isinstance(value, dict) and any(map(_is_large, value.values())):
        for place, (name, inner) in enumerate(value.items()):
            yield (b"," if place else b"{") + json_bytes(name) + b":"
            yield from _json_pieces(inner)
        yield b"}"
    else:
        yield json_bytes(value)


def _is_large(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.size > _NUMBERS


def _groups(array: Array) -> Iterator[Array]:
    """The rows of an array, as many at a time as are rendered at once."""
    step = max(1, _NUMBERS * len(array) // max(1, array.size))
    return (array[start : start + step] for start in range(0, len(array), step))


def json_sparse(row: FloatArray) -> orjson.Fragment:
    """A JSON list out of [n, 2]: an object of index and value for each row."""
    values = json_bytes(row[:, 1].copy())[1:-1].split(b",") if len(row) else []
    pairs = zip(row[:, 0].astype(int).tolist(), values, strict=True)
    return orjson.Fragment(b"[" + b",".join(b'{"index":%d,"value":%b}' % pair for pair in pairs) + b"]")


def base64_text(array: Array) -> str:
    """The little-endian numbers of an array, row after row, in the standard alphabet."""
    return base64.b64encode(_little_endian(array)).decode()


def raw_rows(arrays: Iterable[Array]) -> Iterator[bytes]:
    """The little-endian numbers of arrays, one after the other."""
    return map(_little_endian, chain.from_iterable(map(_groups, arrays)))


def safetensors(arrays: Sequence[Array]) -> Iterator[bytes]:
    """A safetensors file of one tensor per array, named by its place (format: github.com/huggingface/safetensors)."""
    head, end = {}, 0
    for place, array in enumerate(arrays):
        offsets = [end, end + array.nbytes]
        head[str(place)] = {"dtype": _SAFETENSORS[array.dtype.name], "shape": array.shape, "data_offsets": offsets}
        end += array.nbytes
    content = json_bytes(head)
    content += b" " * (-len(content) % 8)
    yield len(content).to_bytes(8, "little") + content
    yield from raw_rows(arrays)


def in_blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in fewer and larger pieces: each costs a way to a thread and back."""
    block: list[bytes] = []
    size = 0
    for chunk in chunks:
        block.append(chunk)
        size += len(chunk)
        if size >= _BLOCK:
            yield b"".join(block)
            block, size = [], 0
    if block:
        yield b"".join(block)


def _little_endian(array: Array) -> bytes:
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
