"""Windows cover a text, and what the encoder gives for them is one matrix or vector of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import random_rows, sentence_transformers_layout

from model.cpu import CpuRunner
from model.encoder import Encoder
from model.tokens import Tokens
from model.windows import Pieces, split

LIMIT, BEFORE, AFTER = 16, 1, 1


@st.composite
def splits(draw: st.DrawFn) -> tuple[Tokens, Pieces, int, int]:
    """A text of distinct ids, its pieces, the limit and the overlap."""
    before, after = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    limit = before + after + draw(st.integers(1, 12))
    overlap = draw(st.integers(0, limit - before - after - 1))
    tokens = Tokens.of(range(before + after + draw(st.integers(0, 100))))
    return tokens, split(tokens, limit, before, after, overlap), limit, overlap


@given(splits())
@settings(deadline=None, database=None)
def test_windows_are_few_even_and_overlap_as_asked(case: tuple[Tokens, Pieces, int, int]) -> None:
    tokens, pieces, limit, overlap = case
    body = tokens.ids[pieces.before : len(tokens) - pieces.after].tolist()
    lengths = [len(row) for row in pieces.rows]
    assert max(lengths) <= limit
    assert max(lengths) - min(lengths) <= 1
    for row, (start, stop) in zip(pieces.rows, pieces.spans, strict=True):
        frame = tokens.ids[: pieces.before].tolist(), tokens.ids[len(tokens) - pieces.after :].tolist()
        assert row.ids.tolist() == [*frame[0], *body[start:stop], *frame[1]]
    assert (pieces.spans[0][0], pieces.spans[-1][1]) == (0, len(body))
    assert all(left[1] - right[0] == overlap for left, right in zip(pieces.spans, pieces.spans[1:], strict=False))
    room = limit - pieces.before - pieces.after
    assert len(pieces.rows) == 1 or len(body) > (len(pieces.rows) - 1) * (room - overlap) + overlap


def reference_owner(place: int, spans: list[tuple[int, int]]) -> int:
    """The window of a token by google-research/bert's words: maximum of the smaller context, the first of equals."""
    contexts = [min(place - start, stop - 1 - place) if start <= place < stop else -1 for start, stop in spans]
    return contexts.index(max(contexts))


@given(splits())
@settings(deadline=None, database=None)
def test_every_token_has_one_row_from_the_window_with_most_context(case: tuple[Tokens, Pieces, int, int]) -> None:
    tokens, pieces, _, _ = case
    matrices = [np.stack([row.ids, np.full(len(row), n)], axis=1).astype(np.float32) for n, row in enumerate(pieces.rows)]
    merged = pieces.matrix(matrices)
    assert merged[:, 0].tolist() == tokens.ids.tolist()
    body = len(tokens) - pieces.before - pieces.after
    owners = merged[pieces.before : pieces.before + body, 1].tolist()
    assert owners == [reference_owner(place, pieces.spans) for place in range(body)]
    assert set(merged[: pieces.before, 1]) <= {0}
    assert set(merged[len(tokens) - pieces.after :, 1]) <= {len(pieces.rows) - 1}


@pytest.fixture(scope="module")
def runner(make_checkpoint: Callable[..., Path]) -> CpuRunner:
    return CpuRunner(Encoder.from_folder(make_checkpoint(seed=3, initializer_range=0.5)))


@pytest.mark.parametrize("length", [17, 18, 30, 31, 100])
@pytest.mark.parametrize("overlap", [0, 1, 3, 7, 13])
def test_rows_equal_those_of_the_window_encoded_alone(runner: CpuRunner, length: int, overlap: int) -> None:
    (tokens,) = random_rows([length], seed=length)
    pieces = split(tokens, LIMIT, overlap=overlap)
    merged = pieces.matrix(runner.hidden(pieces.rows))
    alone = [runner.hidden([row])[0] for row in pieces.rows]
    assert merged.shape == (length, 32)
    np.testing.assert_allclose(merged[0], alone[0][0], atol=1e-5)
    np.testing.assert_allclose(merged[-1], alone[-1][-1], atol=1e-5)
    for place in range(length - 2):
        owner = reference_owner(place, pieces.spans)
        wanted = alone[owner][1 + place - pieces.spans[owner][0]]
        np.testing.assert_allclose(merged[1 + place], wanted, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "pooler", "mean", "max", "last"])
def test_a_text_that_fits_is_left_as_it_is(runner: CpuRunner, pooling) -> None:
    (tokens,) = random_rows([LIMIT])
    pieces = split(tokens, LIMIT)
    assert pieces.rows == [tokens]
    vectors, matrices = runner(pieces.rows, pooling), runner.hidden([tokens])
    np.testing.assert_array_equal(pieces.vector(vectors, pooling), runner([tokens], pooling)[0])
    np.testing.assert_array_equal(pieces.matrix(matrices), matrices[0])


def test_the_vector_pools_the_rows_of_all_windows(runner: CpuRunner) -> None:
    (tokens,) = random_rows([40])
    pieces = split(tokens, LIMIT)
    rows = np.concatenate(runner.hidden(pieces.rows))
    for pooling, wanted in {"mean": rows.mean(axis=0), "max": rows.max(axis=0)}.items():
        merged = pieces.vector(runner(pieces.rows, pooling), pooling)
        assert merged.dtype == np.float32
        np.testing.assert_allclose(merged, wanted, atol=1e-5)
    firsts = runner(pieces.rows, "cls")
    weights = np.array([len(row) for row in pieces.rows])
    np.testing.assert_allclose(pieces.vector(firsts, "cls"), (firsts * weights[:, None]).sum(axis=0) / weights.sum(), atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_an_affine_projection_may_come_before_the_merge(folder: Path, make_checkpoint: Callable[..., Path], pooling) -> None:
    """The mean of projected windows is the projected mean; the runner projects each window."""
    weight, bias = torch.randn(8, 32, generator=torch.manual_seed(0)), torch.arange(8.0)
    dense = {"in_features": 32, "out_features": 8, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"}
    modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
    layout = sentence_transformers_layout(
        folder, {modes[pooling]: True}, [(dense, {"linear.weight": weight, "linear.bias": bias})]
    )
    projected, plain = CpuRunner(Encoder.from_folder(layout)), CpuRunner(Encoder.from_folder(make_checkpoint()))
    (tokens,) = random_rows([40])
    pieces = split(tokens, LIMIT)
    wanted = pieces.vector(plain(pieces.rows, pooling), pooling) @ weight.numpy().T + bias.numpy()
    np.testing.assert_allclose(pieces.vector(projected(pieces.rows, pooling), pooling), wanted, atol=1e-4)


@pytest.mark.parametrize(("limit", "overlap"), [(2, 0), (1, 0), (4, 2), (4, -1)])
def test_windows_without_room_are_refused(limit: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="wanted 0 to"):
        split(Tokens.of(range(9)), limit, overlap=overlap)
