"""Fitted classifiers, one file each: `NAME.safetensors`, with what is known of it as JSON in the file's metadata.

The folder is the only truth, so that several processes may share it. A file is replaced in one step: a reader finds
the old one or the new one, whatever happens to the writer.
"""

import contextlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import safetensors.numpy
from pydantic import BaseModel, ConfigDict, model_validator
from safetensors import SafetensorError

from app.errors import Conflict, InvalidInput, NotFound, StorageFailed
from app.settings import OnOverflow
from model.config import PoolingMode
from model.finetune import Head
from model.vectors import finite_rows

log = logging.getLogger("bertd.classifiers")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # never a file's name on some systems
_SUFFIX = ".safetensors"
_KEY = "classifier"  # of the JSON in the file's metadata
_MODE = 0o644  # a server reads what `bertd fit` wrote under another user
_ABANDONED = 3600.0  # seconds after which a file that is being written has lost its writer

Stamp = tuple[int, int, int]


class CrossValidation(BaseModel):
    """How heads fitted on all folds but one did on that one; null, with the reason, where none could be held out."""

    folds: int
    accuracy: float | None
    macro_f1: float | None
    reason: str | None


class Card(BaseModel):
    """What is known of a classifier beside its weights. `model` is the SHA-256 of the checkpoint's weights."""

    model_config = ConfigDict(frozen=True)

    labels: list[str]
    counts: dict[str, int]
    truncated: int
    class_weight: Literal["balanced"] | None
    cross_validation: CrossValidation
    model: str
    dimension: int
    pooling: PoolingMode
    prompt_name: str | None
    prompt: str
    on_overflow: OnOverflow = "truncate"  # how its examples were read; files that do not say it are of cut ones

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if len(self.labels) < 2 or self.labels != list(self.counts):
            raise ValueError("labels and counts do not agree")
        return self


@dataclass(frozen=True, eq=False)
class Classifier:
    card: Card
    head: Head


class Store:
    """The classifiers of a folder, which is made when the first one is saved."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[Stamp, Classifier | str]] = {}

    def names(self) -> list[str]:
        return sorted(path.stem for path in self._folder.glob(f"*{_SUFFIX}") if _is_name(path.stem))

    def find(self, name: str) -> Classifier:
        """The classifier of that name, as its file is now.

        Raises NotFound, or Conflict for a file that is broken or can't be read.
        """
        path = self._path(name)
        try:
            status = path.stat()
            stamp = status.st_mtime_ns, status.st_ino, status.st_size
            if name not in self._known or self._known[name][0] != stamp:
                self._known[name] = stamp, _read(path)
        except (FileNotFoundError, NotADirectoryError):
            self._known.pop(name, None)
            raise NotFound(f"classifier {name!r} is not known; GET /classifiers lists those that are") from None
        except OSError as error:  # of the moment, or until somebody gives leave: not kept
            raise Conflict(f"classifier {name!r} can't be read ({error.strerror}); see to its file, or try again") from None
        found = self._known[name][1]
        if isinstance(found, str):
            raise Conflict(f"classifier {name!r} is broken: {found}; fit it again, restore its file or delete it")
        return found

    def prepare(self, name: str) -> None:
        """Find out, before a fit costs anything, whether a classifier of that name can be saved.

        Raises Conflict where a name differs from it in case only: some file systems take both for one.
        """
        self._path(name)
        other = next((known for known in self.names() if known != name and known.lower() == name.lower()), None)
        if other is not None:
            raise Conflict(f"classifier {other!r} is there, and {name!r} differs in case only; choose another name")
        with _storage():
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()

    def save(self, name: str, classifier: Classifier) -> None:
        """Write a classifier, in the place of the one of that name if there is one."""
        self.prepare(name)
        with _storage():
            _replace(self._path(name), _dump(classifier))

    def delete(self, name: str) -> None:
        """Raises NotFound."""
        with _storage():
            try:
                self._path(name).unlink()
            except FileNotFoundError:
                raise NotFound(f"classifier {name!r} is not known; GET /classifiers lists those that are") from None
            _sync_folder(self._folder)

    def open(self) -> None:
        """Read every classifier, log those that are broken, and remove what a killed writer left."""
        for path in self._folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):  # another server is removing it too
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()
        for name in self.names():
            try:
                self.find(name)
            except Conflict as error:
                log.warning("%s", error)

    def _path(self, name: str) -> Path:
        if not _is_name(name):
            raise InvalidInput(
                f"the classifier's name has {len(name)} characters or others than it may have; wanted 1 to 64 of "
                "A-Z a-z 0-9 . _ -, a letter or digit first, no '..', and no name that a system reserves"
            )
        return self._folder / f"{name}{_SUFFIX}"


def _is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and ".." not in name and not _DEVICE.fullmatch(name)


def _dump(classifier: Classifier) -> bytes:
    tensors = {"weights": classifier.head.weights, "bias": classifier.head.bias}
    return safetensors.numpy.save(tensors, metadata={_KEY: classifier.card.model_dump_json()})


def _read(path: Path) -> Classifier | str:
    """The classifier in a file, or what is wrong with the file. Raises OSError."""
    content = path.read_bytes()
    try:
        return _load(content)
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        return str(error).split("\n", 1)[0][:200]


def _load(content: bytes) -> Classifier:
    tensors = safetensors.numpy.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    card = Card.model_validate_json(header["__metadata__"][_KEY], strict=True)
    weights, bias = tensors["weights"], tensors["bias"]
    shapes = (len(card.labels), card.dimension), (len(card.labels),)
    if (weights.shape, bias.shape) != shapes or {weights.dtype.str, bias.dtype.str} != {"<f4"}:
        raise ValueError(f"its arrays are {weights.dtype} {weights.shape} and {bias.shape}, wanted float32 {shapes[0]}")
    if not (finite_rows(weights).all() and finite_rows(bias).all()):
        raise ValueError("its weights hold a value that is not a number")
    return Classifier(card, Head(weights, bias))


def _replace(path: Path, content: bytes) -> None:
    """Put a file in the place of another in one step; both are on the disk before anybody is told."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(descriptor, _MODE)
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log.error("%s", error)
        raise StorageFailed(
            f"the folder of classifiers can't be written ({error.strerror}); set BERTD_DATA_DIR to one that can"
        ) from None
