"""The labels of a split: what may stand in their column, and the index of each by its name.

Letters: N examples, C labels.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.errors import DataError
from capcli.tables import Table

MOST_LABELS = 1000


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The accepted answers to a question and where each begins in the context, in characters; -1 where not known.

    None at all: the context does not answer the question.
    """

    texts: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of a split as they stand in the data: strings, numbers, tuples of them, or `Answers`.

    columns: where they stand; several for multilabel with a 0 or 1 for each label. own_names: what the table itself
    calls them, or nothing.
    """

    split: str
    kind: str
    columns: tuple[str, ...]
    own_names: tuple[str, ...]
    values: list[Any]

    @property
    def place(self) -> str:
        """How messages call it."""
        return f"column {', '.join(self.columns)!r} of the {self.split} split"


def read(split: str, table: Table, columns: tuple[str, ...], kind: str) -> Labels:
    """The labels of all rows, equal ones stored once. Raises `DataError` for missing labels and wrong types."""
    names = columns if len(columns) > 1 else table.class_names.get(columns[0], ())
    found = Labels(split=split, kind=kind, columns=columns, own_names=names, values=[])
    parse = partial(_flags, columns) if len(columns) > 1 else _PARSERS[kind]
    known: dict[Any, Any] = {}
    for batch in table.batches(columns):
        for cells in zip(*(batch[column] for column in columns), strict=True):
            try:
                value = parse(*cells)
            except DataError as error:
                raise DataError(f"row {len(found.values)} of {found.place} {error.message}", error.hint) from error
            found.values.append(value if isinstance(value, Answers) else known.setdefault((type(value), value), value))
    missing = [row for row, value in enumerate(found.values) if value is None]
    if len(missing) == len(found.values):
        raise DataError(f"{found.place} holds no labels")
    if missing:
        raise DataError(f"{len(missing)} labels of the {split} split are missing, the first in row {missing[0]}")
    return found


def names_of(found: Labels, perhaps: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the classes by index: those of the table; else `perhaps`, if they cover what occurs; else that."""
    if found.own_names:
        return found.own_names
    names = set(map(_as_name, _distinct(found.values)))
    if not names:
        raise DataError(f"{found.place} holds no labels")
    key = label_key(perhaps)
    if {key(name) for name in names} <= {key(name) for name in perhaps}:
        return tuple(perhaps)
    if found.kind == "classification" and len(names) > max(20, len(found.values) / 2):
        raise DataError(
            f"{found.place} holds {len(names)} different labels in {len(found.values)} rows",
            "for numbers use --task regression; where the label stands says --label-column",
        )
    numeric = all(map(_is_number, names))
    return tuple(sorted(names, key=(lambda v: (int(v), v)) if numeric else (lambda v: (v.casefold(), v))))


def coded(found: Labels, names: Sequence[str]) -> NDArray[Any]:
    """The labels of all rows as `Split` holds them; see there. Raises `DataError` for labels without a name."""
    if len(names) > MOST_LABELS:
        raise DataError(f"{found.place} holds {len(names)} different labels", "for numbers use --task regression")
    return _CODERS[found.kind](found, names)


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _label(cell: Any) -> Any:
    """One label or number; None when it is missing."""
    if isinstance(cell, list | dict):
        raise DataError(
            f"is a {type(cell).__name__}, not a single label",
            "for several labels use --task multi-label-classification",
        )
    if cell == "-":
        raise DataError("is '-', which stands for no agreed label", "leave those rows out")
    return None if _is_missing(cell) else cell


def _label_set(cell: Any) -> tuple[Any, ...] | None:
    """The labels of an example; a text names them with `;` between. Empty: it has none."""
    if isinstance(cell, str):
        cell = [name.strip() for name in cell.split(";") if name.strip()]
    found = _label_list(cell)
    if found is not None and len(set(found)) < len(found):
        raise DataError(
            "holds a label twice", "a list names the labels; for a 0 or 1 per label, name the columns in --label-column"
        )
    return found


def _tags(cell: Any) -> tuple[Any, ...] | None:
    """The labels of the words of an example; in a text they stand between spaces."""
    return _label_list(cell.split() if isinstance(cell, str) else cell)


def _label_list(cell: Any) -> tuple[Any, ...] | None:
    if cell is None:
        return None
    if not isinstance(cell, list):
        raise DataError(f"is of type {type(cell).__name__}, not a list of labels")
    if any(_is_missing(value) or isinstance(value, list | dict) for value in cell):
        raise DataError("holds a missing label, or a list in the list")
    return tuple(cell)


def _flags(columns: Sequence[str], *cells: Any) -> tuple[str, ...] | None:
    """The names of the columns that hold 1."""
    flags = [{"0": False, "1": True, "false": False, "true": True}.get(_as_name(cell).casefold()) for cell in cells]
    if all(_is_missing(cell) for cell in cells):
        return None
    if None in flags:
        wrong = flags.index(None)
        raise DataError(f"holds {cells[wrong]!r} in {columns[wrong]!r}, where 0 or 1 is expected")
    return tuple(name for name, flag in zip(columns, flags, strict=True) if flag)


def _answers(cell: Any) -> Answers | None:
    """Answers as in SQuAD (texts with their starts), a list of texts, or one text; empty: no answer."""
    if isinstance(cell, str) and cell.startswith("{"):
        try:
            cell = json.loads(cell)
        except ValueError as error:
            raise DataError(f"is not JSON: {error}") from error
    if cell is None:
        return None
    if isinstance(cell, str):
        cell = [cell] if cell.strip() else []
    if isinstance(cell, list):
        rows = [{"text": one} if isinstance(one, str) else one for one in cell]
        if all(isinstance(one, dict) for one in rows):
            cell = {name: [one.get(name, -1) for one in rows] for name in ("text", "answer_start")}
    texts = cell.get("text") if isinstance(cell, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError("holds no answers", "expected {text: [...], answer_start: [...]}, a list of texts, or a text")
    starts = cell.get("answer_start")
    starts = [-1] * len(texts) if starts is None else starts
    if not isinstance(starts, list) or len(starts) != len(texts) or not all(type(start) is int for start in starts):
        raise DataError("has not one whole number in answer_start for each text")
    return Answers(texts=tuple(texts), starts=tuple(starts))


_PARSERS: dict[str, Callable[..., Any]] = {
    "classification": _label,
    "regression": _label,
    "multilabel": _label_set,
    "tokens": _tags,
    "spans": _answers,
}


# Names and codes ------------------------------------------------------------------------------------------------------


def _distinct(values: Iterable[Any]) -> set[Any]:
    found = set(values)
    return set(chain.from_iterable(found)) if any(isinstance(value, tuple) for value in found) else found


def shown(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _as_name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _is_number(name: str) -> bool:
    return re.fullmatch(r"-?\d{1,18}", name) is not None


def label_key(*tables: Sequence[str]) -> Callable[[str], str]:
    """How label names are compared: without regard to case, unless names of one table differ in nothing else."""
    alike = all(len({name.casefold() for name in names}) == len(names) for names in tables)
    return str.casefold if alike else str


def _numbers(found: Labels, names: Sequence[str]) -> NDArray[np.float64]:
    numbers = np.empty(len(found.values))
    for row, value in enumerate(found.values):
        try:
            numbers[row] = float(value)
        except (TypeError, ValueError) as error:
            comma = isinstance(value, str) and re.fullmatch(r"-?\d+,\d+", value.strip())
            hint = "decimals have a point" if comma else "for names of classes use --task text-classification"
            raise DataError(f"row {row} of {found.place} holds {value!r}, not a number", hint) from error
        if not math.isfinite(numbers[row]):
            raise DataError(f"row {row} of {found.place} holds {value!r}, which is not finite")
    return numbers


def _indices(found: Labels, names: Sequence[str]) -> NDArray[np.int64]:
    codes = _codes(found, names)
    return np.asarray([codes[value] for value in found.values], dtype=np.int64)


def _many_hot(found: Labels, names: Sequence[str]) -> NDArray[np.uint8]:
    codes = _codes(found, names)
    labels = np.zeros((len(found.values), len(names)), dtype=np.uint8)
    for row, value in enumerate(found.values):
        labels[row, [codes[one] for one in value]] = 1
    return labels


def _sequences(found: Labels, names: Sequence[str]) -> NDArray[np.object_]:
    codes = _codes(found, names)
    return _objects([np.asarray([codes[one] for one in value], dtype=np.int64) for value in found.values])


def _objects(values: Sequence[Any]) -> NDArray[np.object_]:
    found = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):  # numpy would make a matrix of arrays that are equally long
        found[row] = value
    return found


_CODERS: dict[str, Callable[[Labels, Sequence[str]], NDArray[Any]]] = {
    "classification": _indices,
    "regression": _numbers,
    "multilabel": _many_hot,
    "tokens": _sequences,
    "spans": lambda found, names: _objects(found.values),
}


def unknown(found: Labels, names: Sequence[str]) -> list[str]:
    """The labels that occur and are not among `names`."""
    return sorted({_own_name(found, value) for value, code in _table(found, names).items() if code is None})


def nameless(found: Labels, names: Sequence[str]) -> list[str]:
    """The labels that occur and stand for one of `names` by their number alone, without a table that says so."""
    key = label_key(names)
    known = {key(name) for name in names}
    occurring = (
        () if found.own_names or found.kind in ("regression", "spans") else map(_as_name, _distinct(found.values))
    )
    return sorted(
        name for name in occurring if key(name) not in known and _is_number(name) and 0 <= int(name) < len(names)
    )


def _own_name(found: Labels, value: Any) -> str:
    """What the table calls a label, where it says so."""
    named = not isinstance(value, str) and 0 <= value < len(found.own_names)
    return found.own_names[int(value)] if named else _as_name(value)


def _codes(found: Labels, names: Sequence[str]) -> dict[Any, int]:
    """The index of each label that occurs into `names`. Raises `DataError` for labels that are not among them."""
    table = _table(found, names)
    missing = unknown(found, names)
    if missing == ["-1"] and len(table) == 1:
        raise DataError(f"the labels of the {found.split} split are hidden (-1)", "use a split with labels")
    if missing:
        raise DataError(f"unknown labels in the {found.split} split: {shown(missing, 5)}; the task has {shown(names)}")
    return {value: code for value, code in table.items() if code is not None}


def _table(found: Labels, names: Sequence[str]) -> dict[Any, int | None]:
    """The index of each label that occurs: by name when it is a string or a named code, else as a code; or None.

    Names that are numbers are names only: among classes 1 and 2, a label 0 is unknown and not the first class.
    """
    key, own = label_key(names), found.own_names
    index: dict[str, int] = {key(name): i for i, name in enumerate(names)}
    codes = range(0) if any(map(_is_number, names)) else range(len(names))
    table: dict[Any, int | None] = {}
    for value in _distinct(found.values):
        if own and not isinstance(value, str) and 0 <= value < len(own):
            table[value] = index.get(key(own[int(value)]))
            continue
        name = _as_name(value)
        code = int(name) if _is_number(name) and int(name) in codes else None
        table[value] = index.get(key(name), code)
    return table
