"""Texts without labels, of one file: a line each, or the text columns of a table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from capcli.config.options import exists
from capcli.config.task import TaskConfig
from capcli.data import dataset, incoming
from capcli.data.incoming import Incoming
from capcli.data.tasks import TASKS
from capcli.errors import DataError

MOST_TEXTS, MOST_CHARACTERS = 1_000_000, 256_000_000
HINT = "give a .txt with one text per line, or a table with a text column"


def read(file: str, source: TaskConfig, *, paired: bool) -> tuple[list[str], list[str] | None]:
    """The texts of a file, and the second ones of a task about pairs, where the file has them or they must be `paired`:
    in another column, or after a tab in lines of text. At most the first `MOST_TEXTS`; rows without text are left out.

    Raises `DataError` or `FileError`, also when none is left.
    """
    found = incoming.from_file(Path(file))
    columns, wanted = _columns(found, source, paired)
    rows, n_characters = [], 0
    for row in islice(_rows(found, columns, wanted), MOST_TEXTS):
        n_characters += sum(map(len, row))
        if n_characters > MOST_CHARACTERS:
            raise DataError(f"{file} has more than {MOST_CHARACTERS:,} characters", "give a part of it")
        if any(text.strip() for text in row):
            rows.append(row)
    if not rows:
        raise DataError(f"{file} has no text", HINT)
    return [row[0] for row in rows], [row[1] for row in rows] if wanted > 1 else None


def check(file: str) -> None:
    """Raise `DataError` for what is no file; nothing is opened."""
    if not exists(file) or not Path(file).is_file():
        raise DataError(f"{file} {'is not a file' if exists(file) else 'does not exist'}", HINT)


def _columns(found: Incoming, source: TaskConfig, paired: bool) -> tuple[tuple[str, ...], int]:
    """The columns to read, and how many texts there are to a row; lines have no columns to choose from."""
    task = TASKS[source.task]
    if not found.columns:
        n_texts = 2 if task.pair and (paired or _has_tabs(found)) else 1
        return ("text", "pair")[:n_texts], n_texts
    columns = [dataset.column(found, (*task.text, "text"), source.text_column, "text", found.name)]
    if task.pair and (paired or source.pair_column or {*task.pair, "pair"} & {*found.columns}):
        columns.append(dataset.column(found, (*task.pair, "pair"), source.pair_column, "pair", found.name))
    return tuple(columns), len(columns)


def _has_tabs(found: Incoming) -> bool:
    """Whether the first line holds two texts."""
    (_, (line,)), *_ = next(iter(found.read(("text",))))
    return bool(line.count("\t") == 1)


def _rows(found: Incoming, columns: tuple[str, ...], n_texts: int) -> Iterator[tuple[str, ...]]:
    for chunk in found.read(columns):
        for number, cells in chunk:
            if wrong := [i for i, cell in enumerate(cells) if not isinstance(cell, str)]:
                what = f"column {columns[wrong[0]]!r} of " if found.columns else ""
                raise DataError(f"{found.unit} {number} of {what}{found.name} is not text")
            texts: tuple[Any, ...] = cells[:n_texts]
            yield texts
