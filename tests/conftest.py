"""Checkpoints for the tests: the real one from its package, and seeded random ones made with transformers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any library reads it: no test may reach for a network

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import MINILM, save_checkpoint

from model.hub import find_model

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where servers that name no folder keep their classifiers: never in the home of whoever runs the tests."""
    os.environ["BERTD_DATA_DIR"] = str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real checkpoint."""
    return find_model(MINILM)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """A function that saves a seeded random BERT with a small vocab.txt; it takes options of BertConfig."""
    made: dict[Any, Path] = {}

    def make(seed: int = 0, **options: Any) -> Path:
        key = (seed, *sorted(options.items()))
        if key not in made:
            made[key] = save_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed, **options)
        return made[key]

    return make
