"""What is done to finished rows: numpy, float32 in, float32 out, and last of all the numbers that a client asked for."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Array = NDArray[Any]
"""Rows of any output dtype."""

Metric = Literal["cosine", "dot", "euclidean"]
OutputDtype = Literal["float32", "float16", "int8", "uint8", "binary", "ubinary"]

_SMALLEST_NORM = np.float32(1e-12)  # as torch.nn.functional.normalize: a zero vector stays zero


def normalize(rows: FloatArray) -> FloatArray:
    """Rows [N, out] scaled to length 1 (Euclidean)."""
    norms = np.sqrt(np.square(rows).sum(axis=-1, keepdims=True))  # as numpy.linalg.norm, which asks much before it does so
    scaled: FloatArray = rows / np.maximum(norms, _SMALLEST_NORM)
    return scaled


def shorten(rows: FloatArray, dimensions: int | None) -> FloatArray:
    """The first `dimensions` columns (Matryoshka representations, arXiv 2205.13147); None keeps them all."""
    return rows if dimensions is None else np.ascontiguousarray(rows[:, :dimensions])


def quantize(rows: FloatArray, dtype: OutputDtype) -> Array:
    """Rows [..., out] in the numbers that sentence-transformers' `quantize_embeddings` gives for that precision.

    int8 and uint8 cut the range of `int8_range` into 256 steps, so they want rows of length 1; binary and ubinary
    pack the signs of eight numbers into one, the last one filled up with zeros: [..., ceil(out / 8)].
    """
    if dtype in ("float32", "float16"):
        return rows.astype(dtype, copy=False)
    if dtype in ("binary", "ubinary"):
        bits = np.packbits(rows > 0, axis=-1)
        return bits if dtype == "ubinary" else _centred(bits)
    largest = int8_range(rows.shape[-1])
    steps = np.clip(np.floor((rows + largest) / (2 * largest / 255)), 0, 255).astype(np.uint8)
    return steps if dtype == "uint8" else _centred(steps)


def int8_range(dimensions: int) -> np.float32:
    """The largest number that int8 and uint8 tell apart: 5 times the root mean square of a row of length 1, at most 1."""
    return np.float32(min(1, 5 / np.sqrt(dimensions)))


def _centred(rows: NDArray[np.uint8]) -> NDArray[np.int8]:
    """0 to 255 as -128 to 127, by the highest bit."""
    return (rows ^ np.uint8(128)).view(np.int8)


def compare(a: FloatArray, b: FloatArray, metric: Metric) -> FloatArray:
    """Every row of a [M, out] against every row of b [N, out] -> [M, N].

    Cosine and dot grow with likeness; euclidean is a distance and shrinks.
    """
    if metric == "euclidean":
        return _distances(a, b)
    if metric == "cosine":
        a, b = normalize(a), normalize(b)
    products: FloatArray = a @ b.T
    return products


def _distances(a: FloatArray, b: FloatArray) -> FloatArray:
    """|a - b| of every two rows, by |a|² + |b|² - 2ab in float64; where that cancels, by the difference itself.

    The differences of all at once would be M · N · out numbers: gigabytes for two long lists.
    """
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    sizes = np.square(a64).sum(axis=1)[:, None] + np.square(b64).sum(axis=1)  # [M, N]
    squares = sizes - 2 * (a64 @ b64.T)
    near = squares < 1e-7 * sizes
    distances: FloatArray = np.sqrt(np.maximum(squares, 0)).astype(np.float32)
    for row in np.flatnonzero(near.any(axis=1)):
        distances[row, near[row]] = np.linalg.norm(b[near[row]] - a[row], axis=1)
    return distances


def softmax(rows: FloatArray) -> FloatArray:
    """Rows [N, out] as probabilities that sum to 1; the largest is taken off first, so that no power overflows."""
    powers = np.exp(rows - rows.max(axis=-1, keepdims=True))
    shares: FloatArray = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def sigmoid(rows: FloatArray) -> FloatArray:
    """1 / (1 + exp(-x)) by powers of what is not positive, which never overflow."""
    power = np.exp(-np.abs(rows))
    shares: FloatArray = np.where(rows >= 0, 1, power) / (1 + power)
    return shares


def nonzero(rows: FloatArray) -> list[FloatArray]:
    """Rows [N, V] as N matrices [n, 2] of column and value; whole numbers are exact in float32 up to 2**24 columns."""
    columns = [np.flatnonzero(row) for row in rows]
    return [np.stack([some, row[some]], axis=1).astype(np.float32) for some, row in zip(columns, rows, strict=True)]


def finite_rows(rows: FloatArray) -> NDArray[np.bool_]:
    """Which rows [N, ...] hold neither NaN nor infinity -> [N]."""
    return np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
