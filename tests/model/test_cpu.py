"""The runner: a text gives the same vector alone and in any batch, and no text sees another."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import lively_bert, random_rows

from model.config import POOLING_MODES, ModelConfig
from model.cpu import CpuRunner
from model.encoder import Encoder
from model.linear import compiled_is_best
from model.tokenizer import Tokenizer
from model.tokens import Tokens

SetThreads = Callable[[int], None]

LENGTHS = (9, 1, 40, 2, 9, 150, 3, 9, 17, 1, 2, 64)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> CpuRunner:
    folder = tmp_path_factory.mktemp("runner")
    lively_bert(num_hidden_layers=3, hidden_size=64, intermediate_size=160).save_pretrained(folder)
    return CpuRunner(Encoder.from_folder(folder))


@pytest.fixture
def with_threads() -> Iterator[SetThreads]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize(("pooling", "threads"), [*((pooling, 1) for pooling in POOLING_MODES), ("mean", 2)])
def test_alone_equals_batched(runner: CpuRunner, with_threads: SetThreads, pooling, threads: int) -> None:
    with_threads(threads)
    rows = random_rows(LENGTHS, segments=2)
    alone = np.concatenate([runner([row], pooling) for row in rows])
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(rows))
        batched = runner([rows[place] for place in order], pooling)
        np.testing.assert_allclose(unit(batched), unit(alone[order]), rtol=0, atol=1e-6)


@given(st.lists(st.integers(0, len(LENGTHS) - 1), min_size=1, max_size=40), st.sampled_from(POOLING_MODES))
@settings(deadline=None, max_examples=60, database=None)
def test_any_mix_at_any_place(runner: CpuRunner, picked: list[int], pooling) -> None:
    rows = random_rows(LENGTHS, segments=2)
    alone = {place: runner([rows[place]], pooling)[0] for place in set(picked)}
    batched = runner([rows[place] for place in picked], pooling)
    np.testing.assert_allclose(unit(batched), unit(np.stack([alone[place] for place in picked])), rtol=0, atol=1e-6)


def test_token_rows_come_back_to_their_texts(runner: CpuRunner) -> None:
    rows = random_rows(LENGTHS)
    for row, hidden in zip(rows, runner.hidden(rows), strict=True):
        assert hidden.shape == (len(row), 64)
        assert hidden.dtype == np.float32
        np.testing.assert_allclose(hidden, runner.hidden([row])[0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("changed", [0, 5, 11])
def test_no_text_sees_another(runner: CpuRunner, changed: int) -> None:
    """With another text of the same length in one place, all the others stay the same to the last bit."""
    rows = random_rows(LENGTHS)
    others = [place for place in range(len(rows)) if place != changed]
    mixed = [*rows]
    mixed[changed] = random_rows([LENGTHS[changed]], seed=99)[0]
    before, after = runner.hidden(rows), runner.hidden(mixed)
    assert not np.array_equal(before[changed], after[changed])
    assert all(np.array_equal(before[place], after[place]) for place in others)
    for pooling in POOLING_MODES:
        np.testing.assert_array_equal(runner(rows, pooling)[others], runner(mixed, pooling)[others])


@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_a_text_twice_gives_one_vector_twice(runner: CpuRunner, pooling) -> None:
    row = random_rows([20])[0]
    vectors = runner([row] * 7, pooling)
    np.testing.assert_allclose(vectors, vectors[:1].repeat(7, axis=0), rtol=0, atol=1e-6)


def test_vectors_are_the_pooled_rows(runner: CpuRunner) -> None:
    rows = random_rows(LENGTHS)
    hidden = runner.hidden(rows)
    np.testing.assert_allclose(runner(rows, "cls"), np.stack([h[0] for h in hidden]), rtol=0, atol=5e-6)  # a way of its own
    assert np.array_equal(runner(rows, "last"), np.stack([h[-1] for h in hidden]))
    assert np.array_equal(runner(rows, "max"), np.stack([h.max(axis=0) for h in hidden]))
    np.testing.assert_allclose(runner(rows, "mean"), np.stack([h.mean(axis=0) for h in hidden]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_the_last_bit_on_our_own_kernels(minilm: Path, dtype: torch.dtype, instructions: str) -> None:
    """Pooling apart, no sum depends on what else is in the batch."""
    encoder = Encoder.from_folder(minilm)
    if not compiled_is_best(encoder.config.bert, dtype):
        pytest.skip("oneDNN has a matrix unit")
    runner = CpuRunner(encoder, dtype)
    assert runner.kernel == f"{instructions} attention, {instructions} linear"
    rows = random_rows((256, 7, 33, 1, 100, 2, 33))
    for row, hidden in zip(rows, runner.hidden(rows), strict=True):
        assert np.array_equal(hidden, runner.hidden([row])[0])


def test_what_a_batch_gave_stays_while_others_run(runner: CpuRunner) -> None:
    rows, others = random_rows(LENGTHS), random_rows(LENGTHS[::-1], seed=5)
    given = [runner.hidden(rows), *(runner(rows, pooling) for pooling in POOLING_MODES)]
    before = [np.concatenate(each) for each in given]
    for _ in range(2):
        runner.hidden(others)
    for each, was in zip(given, before, strict=True):
        assert np.array_equal(np.concatenate(each), was)


def test_lanes_do_not_meet(runner: CpuRunner) -> None:
    """Batches of two threads at once give what they give one after the other."""
    batches = [random_rows(LENGTHS[seed:], seed=seed) for seed in range(8)] * 5
    with ThreadPoolExecutor(runner.lanes) as pool:
        together = list(pool.map(runner.hidden, batches))
    for batch, hidden in zip(batches, together, strict=True):
        assert all(map(np.array_equal, hidden, runner.hidden(batch)))


def test_minilm_alone_and_batched(minilm: Path) -> None:
    texts = ["bank", "", "The river bank was flooded.", "苹果 " * 40, "She works at a savings bank in the city. " * 30, "ok"]
    config = ModelConfig.from_folder(minilm)
    runner = CpuRunner(Encoder.from_folder(minilm))
    rows = Tokenizer.from_folder(minilm, config).encode(texts)
    assert max(map(len, rows)) == config.max_tokens == 256
    alone = np.concatenate([runner([row], config.pooling) for row in rows])
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 3, 0, 4, 1, 5, 5, 2]):
        batched = runner([rows[place] for place in order], config.pooling)
        np.testing.assert_allclose(unit(batched), unit(alone[order]), rtol=0, atol=1e-6)


def test_bfloat16_points_the_same_way(tmp_path: Path) -> None:
    """Half the bytes cost three of the digits, and not the direction."""
    lively_bert(num_hidden_layers=3, hidden_size=64, intermediate_size=160).save_pretrained(tmp_path)
    exact, coarse = CpuRunner(Encoder.from_folder(tmp_path)), CpuRunner(Encoder.from_folder(tmp_path), torch.bfloat16)
    rows = random_rows(LENGTHS)
    for pooling in POOLING_MODES:
        ours, wanted = coarse(rows, pooling), exact(rows, pooling)
        assert ours.dtype == np.float32
        assert (unit(ours) * unit(wanted)).sum(axis=1).min() > 0.999


def test_warm_up_tells_a_rate(runner: CpuRunner) -> None:
    assert runner.warm_up(256) > 0
    assert runner([Tokens.of([2, 3])], "cls").shape == (1, 64)
