"""Texts without labels, of one file: a line each, or the text columns of a table; and a task of which there is no more.

Letters: N examples, C labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.config.options import exists
from capcli.config.task import TaskConfig
from capcli.data import dataset, incoming, tables
from capcli.data.incoming import Incoming
from capcli.data.kinds import KINDS
from capcli.data.labels import Answers
from capcli.data.splits import Split, TaskData, subset, subsets
from capcli.data.tasks import TASKS
from capcli.data.words import sentence
from capcli.errors import ConfigError, DataError
from capcli.reporting.text import counted, first_few

MOST_TEXTS, MOST_CHARACTERS = 1_000_000, 256_000_000
HELD_OUT = 0.1  # of the texts of a task without labels, to evaluate on, unless another share is chosen
HINT = "give a .txt with one text per line, or a table with a text column"

# A task without labels -----------------------------------------------------------------------------------------------


def open_task(
    source: TaskConfig,
    names: Sequence[str],
    reference: str,
    *,
    holdout: float = 0.0,
    max_train: int = 0,
    seed: int = 0,
    no_answer: bool | None = None,
) -> TaskData:
    """The texts of `source` as a task whose labels are going to be the answers of a model, called `reference`.

    names: the classes of that model. holdout: the share, drawn by `seed`, that is evaluated on while the rest, without
    the texts that are equal to a held-out one, is there to train on; 0 to evaluate on all.

    Raises `DataError`, `FileError` or `ConfigError`.
    """
    task = TASKS[source.task]
    kind = KINDS[task.kind]
    _check_names(source.task, names, single=kind.single)
    classes = tuple(names) if kind.classes else ()
    split = dataclasses.replace(read(source.text, source, paired=True), no_answer=bool(no_answer))
    train: Split | None = None
    notes: list[str] = []
    if holdout:
        train, split, notes = _held_out(source, split, holdout, max_train, seed)
    held = subset(split, source.max_eval_samples, 0)
    if len(held) < len(split):
        notes.append(f"{split.name}: {len(held):,} of {len(split):,} texts")
    found = TaskData(
        name=source.task,
        kind=task.kind,
        labels=classes,
        metrics=dataset.agreements(task, classes),
        train=train,
        holdout=None,
        evals={split.name: held},
        notes=tuple(notes),
    )
    return found.without_labels(reference)


def _check_names(task: str, names: Sequence[str], *, single: bool) -> None:
    if single and len(names) < 2:
        raise ConfigError(
            f"{task} needs a model that tells classes apart; its labels are {first_few(names) or 'not named'}",
            "name a model that was fine-tuned for this task",
        )


def _held_out(
    source: TaskConfig, split: Split, share: float, max_train: int, seed: int
) -> tuple[Split, Split, list[str]]:
    """What is trained on, what is held out, and what there is to note. Raises `DataError` when nothing is left."""
    train, held = subsets(split, share, 0, seed) if len(split) > 1 else (split, None)
    if held is None or not len(train):
        raise DataError(
            f"{source.text} has {counted(len(split), 'text')}, too few to hold some out to evaluate on",
            "give more texts, hold out less, or name labelled examples with --data",
        )
    known = set(_texts(held))
    others = np.asarray([i for i, text in enumerate(_texts(train)) if text not in known], dtype=np.int64)
    notes = []
    if len(others) < len(train):
        notes.append(f"not trained on, since they are equal to a held-out one: {len(train) - len(others):,} texts")
        train = train.take(others)
    if not len(train):
        raise DataError(f"the texts of {source.text} are all the same", "give other texts")
    return subset(train, max_train, seed), held, notes


def _texts(split: Split) -> Iterator[str]:
    """Each example as one text."""
    for first, second in split.chunks():
        yield from map(repr, zip(first, second, strict=True) if second else first)


# Texts ---------------------------------------------------------------------------------------------------------------


def read(file: str, source: TaskConfig, *, paired: bool) -> Split:
    """The texts of a file as a split whose labels say nothing. The second texts of a task about pairs are there where
    the file has them or they must be `paired`: in another column, or after a tab in lines of text. Where words have
    labels, a text is divided into them as `cap predict` does. At most the first `MOST_TEXTS`; rows without text are
    left out.

    Raises `DataError` or `FileError`, also when none is left.
    """
    check(file)
    task, found = TASKS[source.task], incoming.from_file(Path(file))
    kind = KINDS[task.kind]
    words, paired = kind.words, kind.windows or (paired and not kind.vectors)
    columns, wanted = _columns(found, source, paired)
    rows: list[tuple[Any, ...]] = []
    n_characters, digest = 0, hashlib.sha256()
    for row in islice(_rows(found, columns, wanted, words), MOST_TEXTS):
        n_characters += sum(len(cell) if isinstance(cell, str) else sum(map(len, cell)) for cell in row)
        if n_characters > MOST_CHARACTERS:
            raise DataError(f"{file} has more than {MOST_CHARACTERS:,} characters", "give a part of it")
        if any(map(_has_text, row)):
            rows.append((sentence(row[0]).words,) if words else row)
            digest.update(json.dumps(rows[-1]).encode())
    if not rows:
        raise DataError(f"{file} has no text", HINT)
    names = ("text", "pair")[:wanted]
    cells = dict(zip(names, zip(*rows, strict=True), strict=True))
    return Split(
        name="texts",
        table=tables.in_memory(file, cells, fingerprint=digest.hexdigest()),
        columns=names,
        labels=no_labels(task.kind, [row[0] for row in rows]),
        kind=task.kind,
    )


def no_labels(kind: str, rows: Sequence[Sequence[Any]]) -> NDArray[Any]:
    """Labels [N] that say nothing, of the type that a split of this kind has; where words have labels, `rows` are these
    words."""
    row = KINDS[kind]
    if row.vectors:
        return np.full(len(rows), np.nan)
    if not (row.words or row.windows):
        return np.zeros(len(rows), dtype=np.float64 if row.numbers else np.int64)
    labels = np.empty(len(rows), dtype=object)
    for i, one in enumerate(rows):
        labels[i] = np.zeros(len(one), dtype=np.int64) if row.words else Answers(texts=(), starts=())
    return labels


def check(file: str) -> None:
    """Raise `DataError` for what is no file; nothing is opened."""
    if not exists(file) or not Path(file).is_file():
        raise DataError(f"{file} {'is not a file' if exists(file) else 'does not exist'}", HINT)


def _has_text(cell: Any) -> bool:
    return bool(cell.strip()) if isinstance(cell, str) else any(map(str.strip, cell))


def _columns(found: Incoming, source: TaskConfig, paired: bool) -> tuple[tuple[str, ...], int]:
    """The columns to read, and how many texts there are to a row; lines have no columns to choose from."""
    task = TASKS[source.task]
    two = bool(task.pair or source.pair_column)
    if not found.columns:
        n_texts = 2 if two and (paired or _has_tabs(found)) else 1
        return ("text", "pair")[:n_texts], n_texts
    columns = [dataset.column(found, (*task.text, "text"), source.text_column, "text", found.name)]
    if two and (paired or source.pair_column or {*task.pair, "pair"} & {*found.columns}):
        columns.append(dataset.column(found, (*task.pair, "pair"), source.pair_column, "pair", found.name))
    return tuple(columns), len(columns)


def _has_tabs(found: Incoming) -> bool:
    """Whether the first line holds two texts."""
    (_, (line,)), *_ = next(iter(found.read(("text",))))
    return bool(line.count("\t") == 1)


def _rows(found: Incoming, columns: tuple[str, ...], n_texts: int, words: bool) -> Iterator[tuple[Any, ...]]:
    """The texts of each row; lists of words are as good where `words` have labels."""
    for chunk in found.read(columns):
        for number, cells in chunk:
            if wrong := [i for i, cell in enumerate(cells) if not (isinstance(cell, str) or (words and _listed(cell)))]:
                what = f"column {columns[wrong[0]]!r} of " if found.columns else ""
                raise DataError(f"{found.unit} {number} of {what}{found.name} is not text")
            yield cells[:n_texts]


def _listed(cell: Any) -> bool:
    return isinstance(cell, list) and all(isinstance(word, str) for word in cell)
