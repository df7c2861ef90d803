"""What is done to finished rows: numpy, float32 in, float32 out."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
Metric = Literal["cosine", "dot", "euclidean"]

_SMALLEST_NORM = np.float32(1e-12)  # as torch.nn.functional.normalize: a zero vector stays zero


def normalize(rows: FloatArray) -> FloatArray:
    """Rows [N, out] scaled to length 1 (Euclidean)."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    scaled: FloatArray = rows / np.maximum(norms, _SMALLEST_NORM)
    return scaled


def shorten(rows: FloatArray, dimensions: int | None) -> FloatArray:
    """The first `dimensions` columns (Matryoshka representations, arXiv 2205.13147); None keeps them all."""
    return rows if dimensions is None else np.ascontiguousarray(rows[:, :dimensions])


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


def softmax(logits: FloatArray) -> FloatArray:
    """Logits [N, C] as probabilities: each row adds up to 1. The largest is taken off first, so that nothing overflows."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: FloatArray = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


def finite_rows(rows: FloatArray) -> NDArray[np.bool_]:
    """Which rows [N, ...] hold neither NaN nor infinity -> [N]."""
    return np.asarray(np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
