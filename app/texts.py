"""The files of `bertd embed`: texts are read line by line, and vectors written."""

import json
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
