"""The packed batch: where each text begins and ends."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.batch import by_length, pack
from model.tokens import Tokens


def test_by_hand() -> None:
    batch = pack([Tokens.of([7, 8, 9], [0, 0, 1]), Tokens.of([5]), Tokens.of([6]), Tokens.of([1, 2])])
    assert batch.input_ids.tolist() == [7, 8, 9, 5, 6, 1, 2]
    assert batch.type_ids.tolist() == [0, 0, 1, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 5, 7]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 3
    assert [(run.start, run.count, run.length) for run in batch.runs] == [(0, 1, 3), (3, 2, 1), (5, 1, 2)]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=30))
@settings(deadline=None)
def test_boundaries_and_runs_say_the_same(lengths: list[int]) -> None:
    batch = pack([Tokens.of(range(length)) for length in lengths])
    assert batch.input_ids.tolist() == batch.positions.tolist() == [place for length in lengths for place in range(length)]
    assert np.diff(batch.cu_seqlens).tolist() == lengths
    assert [run.length for run in batch.runs for _ in range(run.count)] == lengths
    assert [run.rows.start for run in batch.runs] == [0, *(run.rows.stop for run in batch.runs[:-1])]
    assert batch.runs[-1].rows.stop == sum(lengths)
    assert all(one.length != other.length for one, other in zip(batch.runs, batch.runs[1:], strict=False))


@pytest.mark.parametrize(("lengths", "order"), [([1, 3, 2, 3], [1, 3, 2, 0]), ([4], [0]), ([2, 2, 2], [0, 1, 2])])
def test_longest_first(lengths: list[int], order: list[int]) -> None:
    assert by_length([Tokens.of([0] * length) for length in lengths]).tolist() == order


def test_each_token_has_a_segment() -> None:
    with pytest.raises(ValueError, match="3 segments for 2 tokens"):
        pack([Tokens.of([1, 2], [0, 0, 0])])


def test_each_row_has_a_token() -> None:
    with pytest.raises(ValueError, match="row 1 has no tokens; wanted one at least"):
        pack([Tokens.of([1, 2]), Tokens.of([]), Tokens.of([3])])
