"""Where `bertd embed` writes: what can't be written is found out before the work, and what was there stays until the end."""

import os
import stat

import numpy as np
import pytest
from safetensors import SafetensorError

from app import cli, texts
from app.texts import WRITERS, TextsError, check_target, write_vectors

VECTORS = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('"one"\n"two"\n')
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Nothing is loaded: a command that gets there has not looked first."""

    def loaded(*arguments):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(cli, "_with_service", loaded)
    monkeypatch.setattr(cli.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(cli.logs, "set_up", lambda *arguments: None)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("texts.jsonl", "is the file with the texts"),
        ("link.jsonl", "is the file with the texts"),
        ("folder.npy", "is no file"),
        ("nowhere/out.npy", "No such file or directory"),
        ("texts.jsonl/out.npy", "Not a directory"),
    ],
)
def test_a_target_that_will_not_do_is_one_line_before_the_model_is_loaded(tmp_path, file, capsys, target, problem):
    (tmp_path / "link.jsonl").symlink_to(file)
    (tmp_path / "folder.npy").mkdir()
    before = file.read_bytes()
    assert cli.main(["embed", str(file), "-o", str(tmp_path / target)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bertd: {tmp_path / target} ")
    assert problem in line
    assert "wanted" in line
    assert file.read_bytes() == before
    assert names(tmp_path) == ["folder.npy", "link.jsonl", "texts.jsonl"]


def test_a_look_leaves_nothing_behind(tmp_path, file):
    check_target(tmp_path / "out.npy", file)
    assert names(tmp_path) == ["texts.jsonl"]


@pytest.mark.parametrize("suffix", WRITERS)
def test_vectors_take_the_place_of_what_was_there(tmp_path, suffix):
    target = tmp_path / f"out{suffix}"
    write_vectors(target, ["one", "two"], VECTORS)
    fresh = target.read_bytes()
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask()
    target.write_text("old")
    target.chmod(0o600)
    (tmp_path / f"link{suffix}").symlink_to(target)
    write_vectors(tmp_path / f"link{suffix}", ["one", "two"], VECTORS)
    assert (target.read_bytes(), stat.S_IMODE(target.stat().st_mode)) == (fresh, 0o600)
    assert names(tmp_path) == [f"link{suffix}", f"out{suffix}"]
    assert (tmp_path / f"link{suffix}").is_symlink()


def mask():
    found = os.umask(0)
    os.umask(found)
    return found


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("2 written"), SafetensorError("no space")])
def test_a_write_that_fails_says_so_and_spoils_nothing(tmp_path, monkeypatch, error):
    target = tmp_path / "out.npy"
    target.write_text("old")

    def half(path, *_):
        path.write_text("half")
        raise error

    monkeypatch.setattr(texts, "WRITERS", {".npy": half})
    with pytest.raises(TextsError, match=r"out\.npy can't be written \(.*(space|written).*\); wanted"):
        write_vectors(target, ["one", "two"], VECTORS)
    assert (target.read_text(), names(tmp_path)) == ("old", ["out.npy"])
