"""Texts without labels, of one file: a line each, or a column."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path

from capcli.config.options import exists
from capcli.config.task import TaskConfig
from capcli.data import dataset, tables
from capcli.data.tasks import TASKS
from capcli.errors import DataError
from capcli.stored import read_bytes, text_of

MOST_TEXTS, MOST_BYTES = 100_000, 256_000_000  # more than any calibration reads


def read(file: str, source: TaskConfig) -> list[str]:
    """The texts of a .txt file, one per line, or of the text column of another; at most the first `MOST_TEXTS`.

    Empty ones are left out. Raises `DataError` or `FileError`, also when none is left.
    """
    path = Path(file)
    if path.suffix == ".txt":
        lines = text_of(read_bytes(path, MOST_BYTES, "a file of texts"), path).splitlines()
    else:
        lines = _column(path, source)
    found = list(islice((line for line in lines if line.strip()), MOST_TEXTS))
    if not found:
        raise DataError(f"{file} has no text", "give a .txt with one text per line, or a table with a text column")
    return found


def check(file: str) -> None:
    """Raise `DataError` for what is no file; nothing is opened."""
    if not exists(file) or not Path(file).is_file():
        what = "is not a file" if exists(file) else "does not exist"
        raise DataError(f"{file} {what}", "give a .txt with one text per line, or a table with a text column")


def _column(path: Path, source: TaskConfig) -> list[str]:
    table = tables.open_file(path)
    column = dataset.column(table, (*TASKS[source.task].text, "text"), source.text_column, "text", str(path))
    cells = list(islice(chain.from_iterable(batch[column] for batch in table.batches((column,))), MOST_TEXTS))
    if wrong := [i for i, cell in enumerate(cells) if not isinstance(cell, str)]:
        raise DataError(f"row {wrong[0]} of column {column!r} of {path} is not text")
    return cells
