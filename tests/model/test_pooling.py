"""Each pooling by hand, on packed rows."""

import numpy as np
import pytest
import torch

from model.batch import pack
from model.config import POOLING_MODES
from model.pooling import POOL
from model.tokens import Tokens

LENGTHS = (3, 1, 2)
HIDDEN = np.array([[1, -9], [2, 4], [6, -1], [5, 5], [-3, 0], [-1, 8]], dtype=np.float32)  # [T, H]

BY_HAND = {
    "cls": [[1, -9], [5, 5], [-3, 0]],
    "pooler": [[1, -9], [5, 5], [-3, 0]],
    "mean": [[3, -2], [5, 5], [-2, 4]],
    "max": [[6, 4], [5, 5], [-1, 8]],
    "last": [[6, -1], [5, 5], [-1, 8]],
}


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_by_hand(mode) -> None:
    pooled = POOL[mode](torch.from_numpy(HIDDEN), pack([Tokens.of([0] * length) for length in LENGTHS]))
    assert pooled.tolist() == BY_HAND[mode]


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_equals_numpy_on_random_rows(mode) -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 40, 50)
    hidden = random.standard_normal((lengths.sum(), 24)).astype(np.float32)
    texts = np.split(hidden, np.cumsum(lengths)[:-1])
    by_numpy = {
        "cls": lambda rows: rows[0],
        "pooler": lambda rows: rows[0],
        "mean": lambda rows: rows.mean(axis=0, dtype=np.float64),
        "max": lambda rows: rows.max(axis=0),
        "last": lambda rows: rows[-1],
    }
    pooled = POOL[mode](torch.from_numpy(hidden), pack([Tokens.of([0] * length) for length in lengths]))
    np.testing.assert_allclose(pooled, np.stack([by_numpy[mode](rows) for rows in texts]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_nan_of_one_text_stays_with_it(mode) -> None:
    hidden = torch.from_numpy(HIDDEN).clone()
    hidden[3] = torch.nan
    pooled = POOL[mode](hidden, pack([Tokens.of([0] * length) for length in LENGTHS]))
    assert pooled.isnan().any(dim=1).tolist() == [False, True, False]
