"""What is decided for the machine, and what is refused."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import random_rows

from model.cpu import CpuRunner
from model.encoder import Encoder
from model.errors import UnsupportedModel
from model.runner import make_runner, use_threads


@pytest.fixture
def threads() -> Iterator[None]:
    """make_runner sets the threads of the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_choices_are_told_and_kept(make_checkpoint: Callable[..., Path]) -> None:
    runner, choice = make_runner(make_checkpoint(), device="cpu", threads=1, max_batch_tokens=77)
    assert (choice.device, choice.dtype, choice.threads, choice.max_batch_tokens) == ("cpu", "float32", 1, 77)
    assert choice.as_dict()["kernel"] == choice.kernel != ""
    assert torch.get_num_threads() == 1
    rows = random_rows((5, 3))
    np.testing.assert_array_equal(runner(rows, "cls"), CpuRunner(Encoder.from_folder(make_checkpoint()))(rows, "cls"))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("there", [False, True])
def test_bfloat16_is_float32_where_nothing_multiplies_it(make_checkpoint, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr("model.runner.multiplies", lambda dtype: there)
    runner, choice = make_runner(make_checkpoint(), device="cpu", dtype="bfloat16")
    assert choice.dtype == ("bfloat16" if there else "float32")
    assert ("; float32, as there is no arithmetic in bfloat16" in choice.kernel) == (not there)
    rows = random_rows((5, 3))
    exact = make_runner(make_checkpoint(), device="cpu")[0](rows, "cls")
    assert np.array_equal(runner(rows, "cls"), exact) == (not there)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("options", [{"device": "tpu"}, {"device": "mps"}, {"device": ""}, {"device": "cpu", "dtype": "int4"}])
def test_what_this_library_does_not_run(make_checkpoint: Callable[..., Path], options: dict[str, str]) -> None:
    with pytest.raises(UnsupportedModel, match="is not supported"):
        make_runner(make_checkpoint(), **options)


def test_a_thread_sets_its_own_number_of_threads() -> None:
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=use_threads, initargs=(before + 1,)) as other:
        assert other.submit(torch.get_num_threads).result() == before + 1
    assert torch.get_num_threads() == before
