"""The classes of a task: their names in order, and the index of each label that occurs.

Letters: N examples, C labels.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.data import names
from capcli.data.kinds import KINDS
from capcli.data.labels import NO_LABEL, SEPARATORS, Labels, parts_of
from capcli.data.names import Finder
from capcli.errors import DataError
from capcli.reporting.text import first_few

MOST_LABELS = 1000
JOINS = " \t/&+；，、"  # which may stand between labels too, though they are read as part of one


def _distinct(found: Labels) -> set[str]:
    """The names that occur."""
    if not KINDS[found.kind].classes:
        return set()
    values = set(found.values)
    return {name for value in values for name in (value if type(value) is tuple else (value,))}


def names_of(found: Labels, perhaps: Sequence[str] = (), aliases: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Names of the classes by index: those of the table; else `perhaps`, if they cover what occurs; else that."""
    if found.own_names:
        return found.own_names
    occur = _distinct(found)
    if not occur:
        raise DataError(f"{found.place} holds no labels")
    find = names.finder(perhaps, aliases)
    if all(find(name) is not None for name in occur):
        return tuple(perhaps)
    check_labelled(found)
    classes = _merged(found, names.one_per_number(occur))
    if KINDS[found.kind].single and len(classes) > max(20, len(found.values) / 2):
        raise DataError(
            f"{found.place} holds {len(classes)} different labels in {len(found.values)} rows",
            "for numbers use --task regression; to read another column use --label-column",
        )
    return tuple(names.order(classes))


def _merged(found: Labels, occur: Sequence[str]) -> set[str]:
    """The names of the classes: where there are 0 and 1, true and false are these."""
    flags = {name for name in occur if names.folded(name) in names.FLAGS}
    numbers = {number for name in occur if (number := names.number(name))}
    if not flags or not numbers:
        return set(occur)
    if not numbers <= set(names.FLAGS.values()):
        raise DataError(
            f"{found.place} mixes true and false with numbers: {first_few(names.order({*flags, *numbers}))}",
            "write all labels in the same way",
        )
    missing = {names.FLAGS[names.folded(flag)] for flag in flags} - numbers
    return {name for name in occur if name not in flags} | missing


def check_labelled(found: Labels, find: Finder | None = None) -> None:
    """Raise `DataError` when a label stands for none, unless `find` knows it as a class."""
    occur = _distinct(found)
    absent = _absent(occur) if find is None else {name for name in occur if find(name) is None}
    absent &= {name for name in occur if names.key(name) in NO_LABEL and (name != "-" or KINDS[found.kind].single)}
    if not absent:
        return
    name = min(absent)
    if occur <= absent:
        raise DataError(f"the labels of the {found.split} split are hidden ({name})", "use a split with labels")
    rows = [row for row, value in enumerate(found.values) if not absent.isdisjoint(_each(value))]
    what = "word" if KINDS[found.kind].words else "row"
    raise DataError(
        f"{len(rows)} row{'s' * (len(rows) != 1)} of the {found.split} split ha{'ve' if len(rows) != 1 else 's'} the "
        f"label {name} ({NO_LABEL[names.key(name)]}), the first is row {rows[0]}",
        f"leave those {what}s out; if {name} is a class, give it a name",
    )


def _absent(occur: Collection[str]) -> set[str]:
    """The labels that stand for none among classes that are not known yet: -1 is one beside 0, 1 and the negative."""
    numbers = {names.number(name) or "" for name in occur} - {"-1", "-100"}
    signed = numbers <= {"0", "1"} or any(number.startswith("-") for number in numbers)
    return {name for name in occur if not (signed and numbers and names.key(name) == "-1")}


def _each(value: Any) -> tuple[str, ...]:
    return value if type(value) is tuple else (value,)


def unknown(found: Labels, find: Finder) -> list[str]:
    """The labels that occur and are none of the classes."""
    return names.order(name for name in _distinct(found) if find(name) is None)


def check_known(found: Labels, classes: Sequence[str], find: Finder, *, codes: bool) -> None:
    """Raise `DataError` for labels that are none of the classes, with both lists and the way out."""
    check_labelled(found, find)
    if missing := unknown(found, find):
        raise DataError(
            f"unknown labels in the {found.split} split: {first_few(missing, 5)}; the task has {first_few(classes)}",
            _way_out(missing, classes, codes),
        )


def _way_out(missing: Sequence[str], classes: Sequence[str], codes: bool) -> str:
    """What to do about labels that are none of the classes; `codes`: whether numbers are codes of the task."""
    pairs = shlex.quote(",".join(f"{name}=NAME" for name in missing[:3])) + ",…" * (len(missing) > 3)
    if any(re.fullmatch(r"-?[0-9]+,[0-9]+", name) for name in (*missing, *classes)):
        return "decimals have a point, not a comma"
    if any(mark in name for name in missing[:3] for mark in ",="):
        return "leave those rows out, or write those labels as the classes are written"
    if not all(map(names.number, missing)) or any(map(names.number, classes)):
        return f"leave those rows out, or say which of the labels is meant: --label-map {pairs}"
    if codes:
        own = first_few([f"{code} {name}" for code, name in enumerate(classes)])
        return f"the codes of this task are {own}; for data with others use --task text-classification"
    return f"numbers are not matched with names by their position; say which is which: --label-map {pairs}"


def coded(found: Labels, classes: Sequence[str], find: Finder, *, codes: bool = False) -> NDArray[Any]:
    """The labels of all rows as `Split` holds them; see there. Raises `DataError` for labels that are no class.

    codes: whether `find` reads numbers as the codes of a known task.
    """
    if len(classes) > MOST_LABELS:
        raise DataError(f"{found.place} holds {len(classes)} different labels", "for numbers use --task regression")
    check_known(found, classes, find, codes=codes)
    return CODERS[found.kind](found, len(classes), {name: find(name) for name in _distinct(found)})


def map_remarks(aliases: Mapping[str, str], classes: Sequence[str], find: Finder, *, of_model: bool) -> list[str]:
    """The pairs of a label map that change nothing in the data; `of_model` says that some may be for those of a model.

    A name that is a class, and a code of a known task, keep their meaning.
    """
    said = []
    for old, new in names.without_effect(find, aliases):
        mine, other = find(old), find(new)
        if mine is not None and other is not None:
            own = first_few([classes[mine]])
            why = "both are classes" if own == old else f"{first_few([old])} already means {own}"
        elif of_model:
            continue
        else:
            why = "neither is a class of the data"
        said.append(f"--label-map {first_few([old])}={first_few([new])} changes nothing in the data: {why}")
    return said


def remarks(found: Mapping[str, Labels], classes: Sequence[str], find: Finder) -> list[str]:
    """What there is to say about the labels: how they were read, and where that may not be what was meant."""
    said = []
    for group in names.alike(classes):
        many = " and ".join(map(names.quoted, group))
        said.append(f"classes that differ only in case or invisible characters: {many}")
    for name, one in found.items():
        if pairs := _respelled(_distinct(one), classes, find):
            said.append(f"{name}: labels matched although they are written differently: {first_few(pairs)}")
    numbers = [name for name in classes if names.number(name)]
    if numbers and len(numbers) < len(classes):
        said.append(f"some labels are numbers and others names: {first_few(classes)}")
    if {"-1", "0"} <= set(numbers) <= {"-1", "0", "1"}:
        said.append("-1 is read as a class; if it means that there is no label, remove those rows")
    joined = [
        name
        for name in classes
        if any(len(parts := parts_of(name, one)) > 1 and set(parts) <= set(classes) for one in ";" + SEPARATORS + JOINS)
    ]
    kinds = [KINDS[one.kind] for one in found.values()]
    if joined and any(kind.single or kind.several for kind in kinds):
        many = "several labels of a text need --task multi-label-classification"
        if any(kind.several for kind in kinds):
            many = "put ; between the labels of a text"
        said.append(f"labels that combine others, each read as a class of its own: {first_few(joined)}; {many}")
    return said


def _respelled(occur: Collection[str], classes: Sequence[str], find: Finder) -> list[str]:
    """The labels that are written otherwise than their class, with it; a number only if it is written in two ways."""
    pairs = [(name, classes[index]) for name in sorted(occur) if (index := find(name)) is not None]
    return [
        f"{names.quoted(name)} as {names.quoted(other)}"
        for name, other in pairs
        if name != other
        and (names.key(name) == names.key(other) or (names.folded(name) in names.FLAGS and names.number(other)))
        and (names.number(name) is None or other in occur)
    ]


def _scores(found: Labels, count: int, codes: Mapping[str, Any]) -> NDArray[np.float64]:
    """Numbers, or NaN for texts without a score."""
    return _numbers(found, count, codes) if found.columns else np.full(len(found.values), np.nan)


def _numbers(found: Labels, count: int, codes: Mapping[str, Any]) -> NDArray[np.float64]:
    numbers = np.empty(len(found.values))
    for row, value in enumerate(found.values):
        try:
            numbers[row] = float(value)
        except (TypeError, ValueError) as error:
            comma = isinstance(value, str) and re.fullmatch(r"-?\d+,\d+", value.strip())
            hint = "for names of classes use --task text-classification"
            if KINDS[found.kind].vectors:
                hint = "name the column of the score with --label-column, or leave the labels out"
            if comma:
                hint = "decimals have a point, and thousands no separator"
            raise DataError(f"row {row} of {found.place} holds {value!r}, not a number", hint) from error
        if not math.isfinite(numbers[row]):
            raise DataError(f"row {row} of {found.place} holds {value!r}, which is not finite", "leave those rows out")
    return numbers


def _relevances(found: Labels, count: int, codes: Mapping[str, Any]) -> NDArray[np.float64]:
    numbers = _numbers(found, count, codes)
    if (numbers < 0).any():
        row = int((numbers < 0).argmax())
        raise DataError(
            f"row {row} of {found.place} holds the relevance {numbers[row]:g}, below 0",
            "a document that is not relevant has 0; for other numbers leave out --group-column",
        )
    return numbers


def _indices(found: Labels, count: int, codes: Mapping[str, Any]) -> NDArray[np.int64]:
    return np.asarray([codes[value] for value in found.values], dtype=np.int64)


def _many_hot(found: Labels, count: int, codes: Mapping[str, Any]) -> NDArray[np.uint8]:
    labels = np.zeros((len(found.values), count), dtype=np.uint8)
    for row, value in enumerate(found.values):
        labels[row, [codes[one] for one in value]] = 1
    return labels


def _sequences(found: Labels, count: int, codes: Mapping[str, Any]) -> NDArray[np.object_]:
    return _objects([np.asarray([codes[one] for one in value], dtype=np.int64) for value in found.values])


def _objects(values: Sequence[Any]) -> NDArray[np.object_]:
    found = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):  # numpy would make a matrix of arrays that are equally long
        found[row] = value
    return found


CODERS: dict[str, Callable[[Labels, int, Mapping[str, Any]], NDArray[Any]]] = {
    "classification": _indices,
    "regression": _numbers,
    "ranking": _relevances,
    "multilabel": _many_hot,
    "tokens": _sequences,
    "spans": lambda found, count, codes: _objects(found.values),
    "embedding": _scores,
}
