"""What is done to finished rows, by hand."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.vectors import compare, finite_rows, int8_range, normalize, quantize, shorten, sigmoid, softmax

ROWS = np.array([[3, 4], [0, 0], [-5, 0], [1e-20, 0]], dtype=np.float32)


def test_normalize_by_hand() -> None:
    """A zero vector stays zero, and one too short for a direction stays short."""
    np.testing.assert_allclose(normalize(ROWS), [[0.6, 0.8], [0, 0], [-1, 0], [1e-8, 0]], rtol=1e-6)
    assert normalize(ROWS).dtype == np.float32


def test_shorten_keeps_the_first_columns() -> None:
    assert shorten(ROWS, 1).tolist() == ROWS[:, :1].tolist()
    assert shorten(ROWS, 1).flags.c_contiguous
    assert shorten(ROWS, None) is ROWS


def test_softmax_and_sigmoid_by_hand_however_large() -> None:
    rows = np.array([[0, np.log(3)], [1000, 999], [-1000, 1000]], dtype=np.float32)
    np.testing.assert_allclose(softmax(rows), [[0.25, 0.75], [0.7310586, 0.2689414], [0, 1]], rtol=1e-6)
    np.testing.assert_allclose(sigmoid(rows), [[0.5, 0.75], [1, 1], [0, 1]], rtol=1e-6)
    assert softmax(rows).dtype == sigmoid(rows).dtype == np.float32


A = np.array([[3, 4], [1, 0]], dtype=np.float32)
B = np.array([[3, 4], [0, 2], [0, 0]], dtype=np.float32)


@pytest.mark.parametrize(
    ("metric", "wanted"),
    [
        ("dot", [[25, 8, 0], [3, 0, 0]]),
        ("cosine", [[1, 0.8, 0], [0.6, 0, 0]]),
        ("euclidean", [[0, np.sqrt(13), 5], [np.sqrt(20), np.sqrt(5), 1]]),
    ],
)
def test_compare_by_hand(metric, wanted) -> None:
    matrix = compare(A, B, metric)
    np.testing.assert_allclose(matrix, wanted, rtol=1e-6, atol=1e-7)
    assert matrix.dtype == np.float32


def test_the_distance_to_itself_is_zero() -> None:
    rows = np.random.default_rng(0).standard_normal((20, 300)).astype(np.float32)
    assert compare(rows, rows, "euclidean").diagonal().tolist() == [0] * 20


@given(st.sampled_from([1e-7, 1e-6, 1e-5, 3e-4, 1e-3, 0.1, 10.0]), st.sampled_from([1e-3, 1.0, 100.0]), st.integers(0, 5))
@settings(deadline=None, database=None)
def test_distances_are_exact_however_near(step: float, size: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    a = (random.standard_normal((4, 384)) * size).astype(np.float32)
    b = (a + random.standard_normal((4, 384)) * size * step).astype(np.float32)
    by_numpy = np.linalg.norm(a.astype(np.float64)[:, None] - b.astype(np.float64)[None], axis=-1)
    np.testing.assert_allclose(compare(a, b, "euclidean"), by_numpy, rtol=2e-6)


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("alike", [False, True])
def test_two_long_lists_fit_into_memory(metric, alike: bool) -> None:
    """1024 x 1024 differences of 768 numbers would be 3 GB at once."""
    a = np.random.default_rng(0).standard_normal((1024, 768)).astype(np.float32)
    b = np.broadcast_to(a[0], a.shape) if alike else a[::-1]
    tracemalloc.start()
    compare(a, b, metric)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_no_numbers_are_found(shape: tuple[int, ...], bad: float) -> None:
    rows = np.zeros(shape, dtype=np.float32)
    rows[2].flat[1] = bad
    assert finite_rows(rows).tolist() == [True, True, False, True]


def by_sentence_transformers(rows, precision):
    """What `sentence_transformers.util.quantize_embeddings` 6.2.0 computes, with the ranges of docs/outputs.md."""
    if precision == "ubinary":
        return np.packbits(rows > 0, axis=-1)
    if precision == "binary":
        return (np.packbits(rows > 0, axis=-1) - 128).astype(np.int8)
    ranges = np.array([[-1], [1]], dtype=np.float32) * np.minimum(1, 5 / np.sqrt(rows.shape[-1])).astype(np.float32)
    steps = (ranges[1] - ranges[0]) / 255
    values = np.clip(np.floor((rows - ranges[0]) / steps), 0, 255)
    return values.astype(np.uint8) if precision == "uint8" else (values - 128).astype(np.int8)


@pytest.mark.parametrize("dimensions", [1, 7, 8, 20, 384])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "binary", "ubinary"])
def test_quantize_gives_the_numbers_of_sentence_transformers(dtype, dimensions: int) -> None:
    rows = normalize(np.random.default_rng(0).standard_normal((50, dimensions)).astype(np.float32))
    rows[0, 0] = 1
    found = quantize(rows, dtype)
    wanted = by_sentence_transformers(rows, dtype)
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found, wanted)


def test_quantize_by_hand() -> None:
    row = np.array([[0.999, -1, 0, 0.25, -0.25, 0.5, 0, 0, 0.1]], dtype=np.float32)
    assert quantize(row, "uint8").tolist() == [[254, 0, 127, 159, 95, 191, 127, 127, 140]]
    assert quantize(row, "int8").tolist() == [[126, -128, -1, 31, -33, 63, -1, -1, 12]]
    assert quantize(row, "ubinary").tolist() == [[0b10010100, 0b10000000]]
    assert quantize(row, "binary").tolist() == [[0b10010100 - 128, 0]]
    assert quantize(row, "float16").tolist() == row.astype(np.float16).tolist()
    assert quantize(row, "float32") is row


def test_int8_gives_back_what_it_was_made_of() -> None:
    rows = normalize(np.random.default_rng(0).standard_normal((50, 384)).astype(np.float32))
    step = 2 * int8_range(384) / 255
    kept = (quantize(rows, "uint8") + 0.5) * step - int8_range(384)
    within = np.abs(rows) < int8_range(384)
    assert np.abs(kept - rows)[within].max() <= step / 2 + 1e-6
    assert within.mean() > 0.9999


def test_softmax_gives_probabilities_by_hand_and_does_not_overflow():
    rows = softmax(np.array([[0, np.log(3)], [1e30, 1e30], [-1e38, 1e38]], dtype=np.float32))
    np.testing.assert_allclose(rows, [[0.25, 0.75], [0.5, 0.5], [0, 1]], rtol=1e-6)
    assert rows.dtype == np.float32
