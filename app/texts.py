"""The files of `bertd embed`: texts are read line by line, and vectors written."""

import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class TextsError(Exception):
    """A file that can't be used; says where, what was found and what was wanted."""


def read_texts(file: Path) -> list[str]:
    """The texts of a UTF-8 file: one per line, or in .jsonl a string or an object with "text" per line. Raises TextsError."""
    try:
        with file.open(encoding="utf-8") as opened:  # str.splitlines would also break at U+2028, which texts hold
            lines = [line.rstrip("\n") for line in opened]
    except (OSError, UnicodeDecodeError) as error:
        raise TextsError(f"{file} can't be read ({error}); wanted a UTF-8 file with one text per line") from None
    texts = [_text_of(line, number, file) for number, line in enumerate(lines, 1)] if file.suffix == ".jsonl" else lines
    for number, text in enumerate(texts, 1):
        if not text:
            raise TextsError(f"{file}, line {number} is empty; wanted a text in each line")
    if not texts:
        raise TextsError(f"{file} is empty; wanted a text in each line")
    return texts


def check_target(target: Path, file: Path) -> None:
    """Find out, before the work, whether the vectors of a file can be written there. Raises TextsError."""
    try:
        if target.exists():
            if target.samefile(file):
                raise TextsError(f"{target} is the file with the texts; wanted another one for the vectors, name it with -o")
            if not target.is_file():
                raise TextsError(f"{target} is there and is no file; wanted a name for a file of vectors, give it with -o")
        tempfile.TemporaryFile(dir=target.resolve().parent).close()
    except OSError as error:
        raise _unwritable(target, error) from None


def write_vectors(target: Path, texts: list[str], vectors: Any) -> None:
    """Write texts and their vectors [N, out] in one step: whatever fails, what was there before stays. Raises TextsError."""
    from safetensors import SafetensorError

    place = target.resolve()  # behind a link, which stays one
    temporary = place.with_name(f".{os.urandom(8).hex()}{target.suffix}")
    try:
        temporary.touch(exist_ok=False)
        mode = (place if place.exists() else temporary).stat().st_mode  # safetensors would have a file that only we can read
        WRITERS[target.suffix](temporary, texts, vectors)
        temporary.chmod(stat.S_IMODE(mode))
        os.replace(temporary, place)
    except (OSError, SafetensorError) as error:
        raise _unwritable(target, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(target: Path, error: Exception) -> TextsError:
    what = getattr(error, "strerror", None) or error
    return TextsError(f"{target} can't be written ({what}); wanted a folder that is there, may be written to and has room")


def _text_of(line: str, number: int, file: Path) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise TextsError(f'{file}, line {number} holds no text; wanted a JSON string or an object with "text"')
    return text


def _write_npy(path: Path, texts: list[str], vectors: Any) -> None:
    import numpy as np

    np.save(path, vectors)


def _write_jsonl(path: Path, texts: list[str], vectors: Any) -> None:
    from app.render import json_bytes

    with path.open("wb") as file:
        for text, vector in zip(texts, vectors, strict=True):
            file.write(json_bytes({"text": text, "embedding": vector}) + b"\n")


def _write_safetensors(path: Path, texts: list[str], vectors: Any) -> None:
    from safetensors.numpy import save_file

    save_file({"embeddings": vectors}, path)


WRITERS: Mapping[str, Callable[[Path, list[str], Any], None]] = {
    ".npy": _write_npy,
    ".jsonl": _write_jsonl,
    ".safetensors": _write_safetensors,
}
"""How to write texts and their vectors [N, out] into a file with each suffix."""
