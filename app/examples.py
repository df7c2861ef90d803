"""Labelled examples out of a CSV file, read line by line; the first bad row is named."""

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path

from app.classification import MAX_EXAMPLES, Example, check_label
from app.errors import ServiceError


class ExamplesError(Exception):
    """A file that can't be used; says where, what was found and what was wanted."""


def read_examples(file: Path, text: str, label: str) -> list[Example]:
    """The examples of a UTF-8 file whose first row names the columns. Raises ExamplesError."""
    rows = _rows(file)
    _, columns = next(rows, ("", []))
    places = _place(columns, text, file), _place(columns, label, file)
    examples: list[Example] = []
    for where, row in rows:
        try:
            examples += [_example(row, len(columns), places)] if row else []  # an empty line is no row
        except ValueError as error:
            raise ExamplesError(f"{where}: {error}") from None
        if len(examples) > MAX_EXAMPLES:
            raise ExamplesError(f"{where} is one more than the {MAX_EXAMPLES} examples that a classifier takes")
    return examples


def _rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Each row with its place in the file; the row of the columns' names is number 0."""
    reader = csv.reader(_lines(file), strict=True)
    for number in itertools.count():
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ExamplesError(f"{file}, row {number} (line {reader.line_num}): {error}; is a quote left open?") from None
        if row is None:
            return
        yield f"{file}, row {number} (line {reader.line_num})", row


def _lines(file: Path) -> Iterator[str]:
    """Decoded one by one, so that an error belongs to its line."""
    try:
        with file.open("rb") as opened:
            for number, line in enumerate(opened, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise ExamplesError(
                        f"{file}, line {number} is not UTF-8 (byte {error.start + 1}: 0x{line[error.start]:02x}); "
                        "save the file as UTF-8"
                    ) from None
    except OSError as error:
        raise ExamplesError(f"{file} can't be read ({error.strerror}); wanted a CSV file") from None


def _place(columns: list[str], wanted: str, file: Path) -> int:
    if columns.count(wanted) != 1:
        found = "is there more than once" if wanted in columns else "is not there"
        raise ExamplesError(f"{file}: column {wanted!r} {found}; the columns are {', '.join(map(repr, columns)) or 'none'}")
    return columns.index(wanted)


def _example(row: list[str], width: int, places: tuple[int, int]) -> Example:
    if len(row) != width:
        raise ValueError(f"it has {len(row)} columns, wanted {width}; put quotes around a text with commas in it")
    text, label = (row[place] for place in places)
    if not text.strip():
        raise ValueError("the text is empty; wanted a text in each row")
    if not label.strip():
        raise ValueError("the label is empty; wanted a label in each row")
    try:
        check_label(label, "the label")
    except ServiceError as error:
        raise ValueError(error.message) from None
    return Example(text, label)
