"""A split whose texts are read when they are needed, and the splits of a task together.

Letters: N examples, C labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.data import literals, perturb, tables
from capcli.data.kinds import KINDS
from capcli.data.labels import is_unicode
from capcli.data.perturb import Change
from capcli.data.tables import Table
from capcli.errors import DataError
from capcli.records.parts import LABELS
from capcli.reporting.text import counted, first_few


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split: its texts are read from `table` when they are needed, its labels are here.

    columns: of the text and, for two texts, of the second. rows: the rows of the table that belong to it, ascending;
    None for all. labels: int64 [N] for classification, float64 [N] for regression, and for embedding, where NaN is no
    score, uint8 [N, C] for multilabel, an object array [N] of int64 arrays (one label per word) for tokens and of
    `Answers` for spans. vectors: for embedding, float64 [N, K, H], those of the K texts of each example by the model to
    compare with; None before it was asked. no_answer: for spans, whether a question may have no answer. lists: for
    tokens, whether the words are lists written as text. groups: for ranking, int64 [N], the query of each example.
    change: what is done to each text while it is read; for spans to the questions alone, since the answers stand in the
    contexts.
    """

    name: str
    table: Table
    columns: tuple[str, ...]
    labels: NDArray[Any]
    kind: str = "classification"
    rows: NDArray[np.int64] | None = None
    no_answer: bool = False
    lists: bool = False
    groups: NDArray[np.int64] | None = None
    vectors: NDArray[np.float64] | None = None
    change: Change | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """sha256, as hex, of the texts, by the table, the columns and the rows that they are read from."""
        rows = b"all" if self.rows is None else self.rows.astype("<i8").tobytes()
        changed = () if self.change is None else (perturb.VERSION, self.change.name, self.change.seed)
        read = changed if not self.lists else ("lists", *changed)
        return hashlib.sha256(repr((self.table.fingerprint, self.columns, read)).encode() + rows).hexdigest()

    @property
    def is_scored(self) -> bool:
        """Whether there are labels; only texts that vectors are made of may have none."""
        return not (KINDS[self.kind].vectors and bool(np.isnan(self.labels).all()))

    @property
    def n_measured(self) -> int:
        """How many examples metrics are means over: of ranking, queries."""
        return len(self) if self.groups is None else len(np.unique(self.groups))

    @property
    def answers_fingerprint(self) -> str:
        """sha256, as hex, of the texts and of the answers that took the place of labels."""
        answers = self.labels if self.vectors is None else self.vectors
        labels = (one.tolist() if isinstance(one, np.ndarray) else one for one in answers)
        return tables.digest(f"{self.fingerprint} {list(map(repr, labels))}")

    @property
    def paired(self) -> bool:
        """Whether there are two texts per example."""
        return len(self.columns) == 2

    def row(self, index: int) -> int:
        """The row of the table, from 0, that example `index` stands in."""
        return index if self.rows is None else int(self.rows[index])

    def take(self, rows: NDArray[np.int64]) -> Split:
        """The examples with the given indices, which ascend."""
        assert bool((np.diff(rows) > 0).all()), "texts are read in the order of the table"
        chosen = rows if self.rows is None else self.rows[rows]
        groups = None if self.groups is None else self.groups[rows]
        vectors = None if self.vectors is None else self.vectors[rows]
        return dataclasses.replace(self, labels=self.labels[rows], rows=chosen, groups=groups, vectors=vectors)

    def chunks(self, size: int = tables.BATCH_ROWS) -> Iterator[tuple[list[Any], list[str] | None]]:
        """(texts, second texts or None) of all examples in order, at most `size` at a time.

        A text is a string; for tokens it is the list of its words.

        Raises:
            DataError: a missing text or one of another type, naming its row; a column in which all texts are empty; a
                sentence with more or fewer words than labels.
        """
        done, empty = 0, set(self.columns)
        for batch in self._selected(size):
            columns = [
                [
                    self._changed(self._text(cell, column, done + i), place, done + i)
                    for i, cell in enumerate(batch[column])
                ]
                for place, column in enumerate(self.columns)
            ]
            empty -= {c for c, texts in zip(self.columns, columns, strict=True) if any(map(_has_text, texts))}
            yield columns[0], columns[1] if self.paired else None
            done += len(columns[0])
        if done and empty:
            raise DataError(f"every text in column {min(empty)!r} of the {self.name} split is empty")

    def _selected(self, size: int) -> Iterator[tables.Columns]:
        """The text columns of the rows of this split, `size` rows at a time (fewer at the end)."""
        if self.rows is None:
            yield from self.table.batches(self.columns, size)
            return
        begin = n_read = 0
        held: tables.Columns = {column: [] for column in self.columns}
        for batch in self.table.batches(self.columns, size):
            n_read += len(batch[self.columns[0]])
            end = int(np.searchsorted(self.rows, n_read))
            places = self.rows[begin:end] - (n_read - len(batch[self.columns[0]]))
            for column, values in held.items():
                values += [batch[column][i] for i in places]
            begin = end
            while len(held[self.columns[0]]) >= size or (begin == len(self) and held[self.columns[0]]):
                yield {column: values[:size] for column, values in held.items()}
                held = {column: values[size:] for column, values in held.items()}
            if begin == len(self):
                return

    def _text(self, cell: Any, column: str, index: int) -> Any:
        """A text as the tokenizer takes it: a string, or the words of a sentence."""
        if KINDS[self.kind].words:
            words = self._words(cell, column, index) if isinstance(cell, str) else cell
            if not isinstance(words, list):
                raise self._wrong(column, index, _type_of(cell, "not a list of words"))
            for word in words:
                self._text_of(word, column, index)
            if len(words) != len(self.labels[index]):
                pair = counted(len(words), "word"), counted(len(self.labels[index]), "label")
                raise self._wrong(column, index, f"has {pair[0]} but {pair[1]}")
            return words
        return self._text_of(cell, column, index)

    def _words(self, cell: str, column: str, index: int) -> list[Any]:
        """The words of a text: between spaces, or of a list if those of this split are lists written as text."""
        found = literals.listed(cell)
        if self.lists and found is None:
            raise self._wrong(column, index, f"holds {cell[:60]!r}, where a list written as text is expected")
        if not self.lists and found and all(isinstance(word, str) for word in found):
            raise self._wrong(column, index, "is a list written as text, where words with spaces between are expected")
        return found if self.lists and found is not None else cell.split()

    def _changed(self, text: Any, place: int, index: int) -> Any:
        if self.change is None or (KINDS[self.kind].windows and place):
            return text
        return self.change.of(text, self.row(index), place)

    def _text_of(self, cell: Any, column: str, index: int) -> str:
        if not isinstance(cell, str):
            raise self._wrong(column, index, _type_of(cell, "not text"))
        if not (cell.isascii() or is_unicode(cell)):
            raise self._wrong(column, index, "holds half of a surrogate pair, which is not text")
        return cell

    def _wrong(self, column: str, index: int, what: str) -> DataError:
        return DataError(f"row {self.row(index)} of column {column!r} of the {self.name} split {what}")


def _has_text(text: Any) -> bool:
    return bool(text.strip() if isinstance(text, str) else text)


def _type_of(cell: Any, expected: str) -> str:
    return "is missing" if cell is None else f"is of type {type(cell).__name__}, {expected}"


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task's splits: train (None when only evaluating), holdout (None unless asked for), evaluation splits.

    reference: what an evaluation compares with, `LABELS`, or else the model whose answers take their place: teacher,
    baseline, or model. Until it was asked, the labels of the evaluation splits say nothing.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    train: Split | None
    holdout: Split | None
    evals: dict[str, Split]
    notes: tuple[str, ...]
    reference: str = LABELS

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of what a model's outputs stand for; None where they have no names."""
        return self.labels if KINDS[self.kind].classes else None

    @property
    def paired(self) -> bool:
        """Whether there are two texts per example."""
        return any(split.paired for split in self.evals.values())

    @property
    def no_answer(self) -> bool:
        """For spans, whether a question may have no answer."""
        return any(split.no_answer for split in self.evals.values())

    @property
    def has_labels(self) -> bool:
        """Whether an evaluation compares with labels."""
        return self.reference == LABELS

    @property
    def compares(self) -> bool:
        """Whether some of the metrics compare with the answers of another model."""
        kind = KINDS[self.kind]
        return not {*kind.agreements, *kind.plain_agreements}.isdisjoint(self.metrics)

    def without_labels(self, reference: str) -> TaskData:
        """The same where the answers of a model, called `reference`, take the place of labels."""
        said = f"no labels: what is measured is agreement with the {reference}, not accuracy"
        return dataclasses.replace(self, reference=reference, notes=(*self.notes, said))

    @property
    def primary(self) -> str:
        """The metric that decides."""
        return self.metrics[0]

    @property
    def legend(self) -> str:
        """The code of each label and its name, such as `0 negative, 1 positive`, of the first of many."""
        names = first_few([f"{code} {name}" for code, name in enumerate(self.labels)], 20)
        return names + (f" ({len(self.labels)})" if len(self.labels) > 20 else "")


# Subsets -------------------------------------------------------------------------------------------------------------


def subset(split: Split, limit: int, seed: int) -> Split:
    """At most `limit` examples, drawn at random by `seed`, in their own order; files are often sorted by class. Groups
    stay whole, the first one even beyond the limit."""
    if not limit or limit >= len(split):
        return split
    order = _drawn(split, np.random.default_rng(seed))
    return split.take(np.sort(order[: _whole(split, order, limit)]))


def _drawn(split: Split, rng: np.random.Generator) -> NDArray[np.int64]:
    """The examples in random order, those of a group together."""
    if split.groups is None:
        return rng.permutation(len(split))
    names, place = np.unique(split.groups, return_inverse=True)
    return np.argsort(rng.permutation(len(names))[place], kind="stable")


def _whole(split: Split, order: NDArray[np.int64], limit: int) -> int:
    """How many of the first `limit` examples in this order are in groups that end there; at least the first group."""
    if split.groups is None:
        return limit
    ends = np.append(np.flatnonzero(np.diff(split.groups[order])) + 1, len(order))
    return int(max(ends[0], ends[ends <= limit].max(initial=0)))


def subsets(train: Split, holdout: float, max_train: int, seed: int) -> tuple[Split, Split | None]:
    """The training split, at most `max_train` examples of it, and the part that is held out, drawn by `seed`."""
    if not holdout:
        return subset(train, max_train, seed), None
    order = _drawn(train, np.random.default_rng([seed, 1]))
    n_held = _whole(train, order, max(1, round(holdout * len(train))))
    held, rest = train.take(np.sort(order[:n_held])), train.take(np.sort(order[n_held:]))
    return subset(rest, max_train, seed), dataclasses.replace(held, name="holdout")


def need_holdout(held: Split | None) -> Split:
    """The held-out part. Raises `DataError` when there is none to evaluate on."""
    assert held is not None, "_wanted lets no set without evaluation split and holdout through"
    return held
