"""The folder of classifiers: what was saved is found, whatever happens to the writers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from app.classifiers import Card, Classifier, CrossValidation, Store
from app.errors import Conflict, InvalidInput, NotFound, StorageFailed
from model.finetune import Head

DIMENSION = 8
PATH_TRICKS = [
    *("..", ".", "", ".hidden", "-a", "_a", "a..b", "../a", "a/b", "/etc/passwd", "a\\b", "..\\a", "a\0", "a\n", "a b", "ä"),
    *("con", "NUL", "com1.x", "a" * 65, "a%2e", "٣", "a:b", "~"),
]


def classifier(value=1.0, labels=("no", "yes")):
    card = Card(
        labels=list(labels),
        counts=dict.fromkeys(labels, 5),
        truncated=0,
        class_weight=None,
        cross_validation=CrossValidation(folds=5, accuracy=0.5, macro_f1=0.5, reason=None),
        model="ab" * 32,
        dimension=DIMENSION,
        pooling="mean",
        prompt_name=None,
        prompt="",
    )
    weights = np.full((len(labels), DIMENSION), value, dtype=np.float32)
    return Classifier(card, Head(weights, np.zeros(len(labels), dtype=np.float32)))


def value_of(found):
    """The one number that all weights have."""
    (value,) = set(found.head.weights.ravel().tolist())
    return value


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "classifiers")


def test_what_was_saved_is_found_by_others_and_after_a_change(tmp_path, store):
    store.save("a.b-c_D", classifier(1, ("nein", "ja 苹果")))
    other = Store(tmp_path / "classifiers")
    assert other.names() == ["a.b-c_D"]
    found = other.find("a.b-c_D")
    assert found.card == classifier(1, ("nein", "ja 苹果")).card
    assert value_of(found) == 1
    assert other.find("a.b-c_D") is found
    store.save("a.b-c_D", classifier(2))
    assert value_of(other.find("a.b-c_D")) == 2
    other.delete("a.b-c_D")
    for call in (store.find, store.delete):
        with pytest.raises(NotFound, match="not known"):
            call("a.b-c_D")


def test_a_file_that_does_not_say_how_long_texts_were_read_is_of_cut_ones(tmp_path, store):
    store.save("old", classifier())
    path = tmp_path / "classifiers/old.safetensors"
    card = json.loads(store.find("old").card.model_dump_json(exclude={"on_overflow"}))
    head = store.find("old").head
    path.write_bytes(
        safetensors.numpy.save({"weights": head.weights, "bias": head.bias}, metadata={"classifier": json.dumps(card)})
    )
    assert "on_overflow" not in card
    assert store.find("old").card.on_overflow == "truncate"


def test_the_same_classifier_gives_the_same_bytes(tmp_path, store):
    store.save("a", classifier())
    store.save("b", classifier())
    assert (tmp_path / "classifiers/a.safetensors").read_bytes() == (tmp_path / "classifiers/b.safetensors").read_bytes()


@pytest.mark.parametrize("name", PATH_TRICKS)
def test_a_name_that_could_lead_elsewhere_is_refused(tmp_path, store, name):
    for call in (store.find, store.delete, store.prepare, lambda name: store.save(name, classifier())):
        with pytest.raises(InvalidInput, match="wanted 1 to 64"):
            call(name)
    assert not list(tmp_path.iterdir())


def test_a_name_that_differs_in_case_only_is_refused(store):
    store.save("Tickets", classifier(1))
    store.save("Tickets", classifier(2))
    with pytest.raises(Conflict, match="differs in case only"):
        store.save("tickets", classifier(3))
    assert store.names() == ["Tickets"]


def header_of(content):
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_card(**changes):
    head = classifier().head
    card = json.loads(classifier().card.model_dump_json()) | changes
    return safetensors.numpy.save({"weights": head.weights, "bias": head.bias}, metadata={"classifier": json.dumps(card)})


def with_tensors(**tensors):
    metadata = {"classifier": classifier().card.model_dump_json()}
    return safetensors.numpy.save({"weights": classifier().head.weights, "bias": classifier().head.bias} | tensors, metadata)


BROKEN = {
    "empty": b"",
    "noise": b"\xff" * 1000,
    "cut": with_card()[:-4],
    "no metadata": safetensors.numpy.save({"weights": np.zeros(3, dtype=np.float32)}),
    "no json": safetensors.numpy.save({"bias": np.zeros(1)}, metadata={"classifier": "{"}),
    "one label": with_card(labels=["a"], counts={"a": 1}),
    "a label twice": with_card(labels=["a", "a"], counts={"a": 1}),
    "a text for a number": with_card(truncated="many"),
    "another dimension": with_card(dimension=9),
    "no bias": safetensors.numpy.save(
        {"weights": classifier().head.weights}, metadata={"classifier": classifier().card.model_dump_json()}
    ),
    "float64": with_tensors(weights=np.zeros((2, DIMENSION))),
    "not a number": with_tensors(bias=np.array([0, np.nan], dtype=np.float32)),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_by_name_and_can_be_replaced(tmp_path, store, caplog, content):
    store.save("good", classifier())
    path = tmp_path / "classifiers/bad.safetensors"
    path.write_bytes(content)
    store.open()
    assert "classifier 'bad' is broken" in caplog.text
    with pytest.raises(Conflict, match=r"'bad' is broken: .*fit it again"):
        store.find("bad")
    assert store.names() == ["bad", "good"]
    store.save("bad", classifier(3))
    assert value_of(store.find("bad")) == 3


@pytest.mark.parametrize("call", ["stat", "read_bytes"])
def test_a_file_that_cannot_be_read_for_a_moment_is_found_afterwards(tmp_path, store, monkeypatch, call):
    store.save("a", classifier())

    def refuse(path, **options):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, refuse)
        with pytest.raises(Conflict, match=r"can't be read \(Too many open files\)"):
            store.find("a")
    assert value_of(store.find("a")) == 1


def test_a_file_that_is_deleted_before_it_is_read_is_not_there(store, monkeypatch):
    store.save("a", classifier())

    def delete_and_read(path):
        path.unlink()
        return path.open("rb").read()

    monkeypatch.setattr(Path, "read_bytes", delete_and_read)
    with pytest.raises(NotFound, match="not known"):
        store.find("a")


def test_a_folder_that_cannot_be_written_is_refused_and_loses_nothing(tmp_path, store, monkeypatch):
    (tmp_path / "file").touch()
    for call in (Store(tmp_path / "file/x").prepare, lambda name: Store(tmp_path / "file").save(name, classifier())):
        with pytest.raises(StorageFailed, match="BERTD_DATA_DIR"):
            call("a")
    store.save("a", classifier(1))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFailed, match="No space left"):
            store.save("a", classifier(2))
    assert value_of(store.find("a")) == 1
    assert [path.name for path in (tmp_path / "classifiers").iterdir()] == ["a.safetensors"]


def test_only_what_a_dead_writer_left_is_removed(tmp_path, store):
    store.save("a", classifier())
    old, new = tmp_path / "classifiers/.a.1.tmp", tmp_path / "classifiers/.a.2.tmp"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    store.open()
    assert (old.exists(), new.exists()) == (False, True)
    assert store.names() == ["a"]


# Saves weights of 1, 2, 3, … under one name; killed at the n-th of the steps that change something on the disk.
WRITER = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_classifiers import Store, classifier
die_at, times = int(sys.argv[2]), int(sys.argv[3])
store = Store(Path(sys.argv[1]))
def deadly(step):
    def run(*arguments):
        global die_at
        die_at -= 1
        if die_at == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)
    return run
for name in ("fchmod", "fsync", "replace", "open", "close"):
    setattr(os, name, deadly(getattr(os, name)))
print("ready", flush=True)
for value in range(2, 2 + times):
    store.save("a", classifier(value))
"""


def writer(folder, die_at=0, times=1):
    code = WRITER.format(tests=os.path.dirname(__file__))
    command = [sys.executable, "-c", code, str(folder), str(die_at), str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=os.getcwd())


def test_a_writer_that_is_killed_at_any_step_loses_nothing(tmp_path, store):
    values = []
    step = 0
    exit_code = -signal.SIGKILL
    while exit_code == -signal.SIGKILL:
        step += 1
        store.save("a", classifier(1))
        with writer(tmp_path / "classifiers", step) as process:
            exit_code = process.wait()
        values.append(value_of(Store(tmp_path / "classifiers").find("a")))
    assert exit_code == 0
    assert values[0] == 1
    assert values[-1] == 2
    assert sorted(values) == values
    assert len(values) > 5


def test_two_writers_that_are_killed_while_they_write_one_name_do_not_corrupt_it(tmp_path, store):
    store.save("a", classifier(1))
    writers = [writer(tmp_path / "classifiers", times=10**6) for _ in range(2)]
    for process in writers:
        process.stdout.readline()
    seen = set()
    while len(seen) < 20:
        seen.add(value_of(store.find("a")))
    for process in writers:
        process.kill()
        process.wait()
        process.stdout.close()
    assert value_of(Store(tmp_path / "classifiers").find("a")) >= 1
