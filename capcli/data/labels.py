"""The labels of a split as they were written: what may be in their column, and how lists are read from text.

Letters: N examples.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from capcli.data import literals, names
from capcli.data.kinds import KINDS
from capcli.data.tables import Table
from capcli.errors import DataError

NO_LABEL = {"-1": "no agreed label", "-100": "no label", "-": "no agreed label"}
SEPARATORS = ",|\n"  # between the labels of a text, where `;` is not
SEVERAL = 'put ; between the labels, or write a JSON list such as ["a", "b"]'
FLAGS = "a list names the labels; for a 0 or 1 per label, name the columns in --label-column"
_FLAG_ROW = re.compile(r"\s*[01](?:\.0*)?(?:[\s,;|]+[01](?:\.0*)?)+\s*")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The accepted answers to a question and where each begins in the context, in characters; -1 where not known.

    None at all: the context does not answer the question.
    """

    texts: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of a split: their names, tuples of names, numbers of a regression, or `Answers`.

    columns: where they stand; several for multilabel with a 0 or 1 for each label. own_names: what the table itself
    calls them, or nothing; codes of such a table have become names. lists: whether there were lists written as text.
    Of texts that have no score, every value is None.
    Of multilabel, a string is a text that `separated` has not divided yet.
    """

    split: str
    kind: str
    columns: tuple[str, ...]
    own_names: tuple[str, ...]
    values: list[Any]
    lists: bool = False

    @property
    def place(self) -> str:
        """How messages call it."""
        return f"column {', '.join(self.columns)!r} of the {self.split} split"


def read(split: str, table: Table, columns: tuple[str, ...], kind: str) -> Labels:
    """The labels of all rows, equal ones stored once. Raises `DataError` for missing labels and wrong types."""
    own = columns if len(columns) > 1 else table.class_names.get(columns[0], ())
    found = Labels(split=split, kind=kind, columns=columns, own_names=own, values=[])
    parse = partial(_flags, columns) if len(columns) > 1 else PARSERS[kind]
    named = _namer(own) if KINDS[kind].classes and len(columns) == 1 else lambda value: value
    known: dict[Any, Any] = {}
    lists = False
    for batch in table.batches(columns):
        for cells in zip(*(batch[column] for column in columns), strict=True):
            try:
                value = _checked(named(parse(*cells)), kind)
            except DataError as error:
                raise DataError(f"row {len(found.values)} of {found.place} {error.message}", error.hint) from error
            lists = lists or _was_list(cells[0], value)
            found.values.append(value if isinstance(value, Answers) else known.setdefault((type(value), value), value))
    missing = [row for row, value in enumerate(found.values) if value is None]
    if len(missing) == len(found.values):
        raise DataError(f"{found.place} holds no labels")
    if missing:
        what = (
            "1 label of the {} split is missing, in"
            if len(missing) == 1
            else "{1} labels of the {0} split are missing, the first in"
        )
        raise DataError(f"{what.format(split, len(missing))} row {missing[0]}", "leave those rows out")
    return dataclasses.replace(found, lists=lists)


def _was_list(cell: Any, value: Any) -> bool:
    """Whether a label was read from a list or a table that was written as text."""
    if isinstance(value, Answers):
        return isinstance(cell, str) and value.texts not in ((), (cell,))
    return isinstance(cell, str) and type(value) is tuple and literals.listed(cell) is not None


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON can hold halves of surrogate pairs, which no encoding has."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return not (value.strip() if value.isascii() else names.folded(value))  # what is invisible names nothing
    return value is None or (isinstance(value, float) and math.isnan(value))


def _label(cell: Any) -> Any:
    """One label or number; None when it is missing."""
    text = isinstance(cell, str) and (literals.broken(cell) or literals.listed(cell) is not None)
    if text or isinstance(cell, list | dict):
        raise DataError(
            f"is a {'list written as text' if text else type(cell).__name__}, not a single label",
            "for several labels use --task multi-label-classification",
        )
    return None if _is_missing(cell) else cell


def _label_set(cell: Any) -> Any:
    """The labels of an example; empty: it has none. A text that is no list is left as it is."""
    if not isinstance(cell, str):
        return _label_list(cell)
    found = _written(cell, SEVERAL)
    if found is None and _FLAG_ROW.fullmatch(cell):
        raise DataError(f"holds {cell[:60]!r}, a row of 0 and 1", FLAGS)
    return cell if found is None else found


def _tags(cell: Any) -> tuple[Any, ...] | None:
    """The labels of the words of an example; in a text they stand between spaces."""
    if not isinstance(cell, str):
        return _label_list(cell)
    hint = 'put a space between the labels, or write a JSON list such as ["O", "B-person"]'
    found = _written(cell, hint)
    if found is not None:
        return found
    tags = cell.split()
    for tag in tags:
        if tag.strip(",;") not in ("", tag):
            raise DataError(f"holds {tag!r}, a label that contains the separator of lists", hint)
    return tuple(tags)


def _written(cell: str, hint: str) -> tuple[Any, ...] | None:
    """The labels of a list that was written as text; None for any other text."""
    found = literals.listed(cell)
    if found is None and (literals.broken(cell) or literals.enclosed(cell)):
        raise DataError(f"holds {cell[:60]!r}, which begins as a list and cannot be read as one", hint)
    return _label_list(found)


def _label_list(cell: Any) -> tuple[Any, ...] | None:
    if cell is None:
        return None
    if not isinstance(cell, list):
        raise DataError(f"is of type {type(cell).__name__}, not a list of labels")
    if any(_is_missing(value) or isinstance(value, list | dict) for value in cell):
        raise DataError("holds a missing label, or a list inside the list")
    return tuple(cell)


def _flags(columns: Sequence[str], *cells: Any) -> tuple[str, ...] | None:
    """The names of the columns that hold 1."""
    texts = [str(cell).strip() for cell in cells]
    values = [names.FLAGS.get(text.casefold(), names.number(text)) for text in texts]
    if all(_is_missing(cell) for cell in cells):
        return None
    for column, cell, value in zip(columns, cells, values, strict=True):
        if value not in ("0", "1"):
            raise DataError(f"holds {cell!r} in {column!r}, where 0 or 1 is expected")
    return tuple(column for column, value in zip(columns, values, strict=True) if value == "1")


def _answers(cell: Any) -> Answers | None:
    """Answers as in SQuAD (texts with their starts), a list of texts, or one text; empty: no answer."""
    if isinstance(cell, str):
        cell = _answers_in(cell)
    if cell is None:
        return None
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
        raise DataError("needs one whole number in answer_start for each text")
    return Answers(texts=tuple(texts), starts=tuple(starts))


def _answers_in(text: str) -> Any:
    """What a text holds: a table or a list of answers that was written as text, or one answer, which is the text.

    Numbers in brackets are an answer: they may stand so in the context.
    """
    if text.lstrip().startswith("{"):
        try:
            return _json_or_literal(text)
        except ValueError as error:
            raise DataError(f"is not JSON, and no dictionary of Python or numpy: {error}") from error
    found = literals.listed(text)
    if found is not None and all(isinstance(one, str | dict) for one in found):
        return found
    if found is None and literals.broken(text):
        raise DataError(
            f"holds {text[:60]!r}, which looks like a list but cannot be read as one", 'write a JSON list: ["answer"]'
        )
    return [text] if text.strip() else []


def _json_or_literal(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        try:
            return literals.parsed(text)
        except ValueError:
            raise error from None


PARSERS: dict[str, Callable[..., Any]] = {
    "classification": _label,
    "regression": _label,
    "ranking": _label,
    "multilabel": _label_set,
    "tokens": _tags,
    "spans": _answers,
    "embedding": _label,
}


# Several labels in a text ---------------------------------------------------------------------------------------------


def separated(found: Mapping[str, Labels], known: Sequence[str]) -> tuple[dict[str, Labels], list[str]]:
    """The splits with every text divided into its labels, and what there is to say about it.

    Between labels stands `;`. Where there is none, one of `SEPARATORS` divides the texts if what it leaves is known
    from elsewhere: from other texts, lists, or the names in `known`. Raises `DataError` where that is not so.
    """
    several = [value for one in found.values() if KINDS[one.kind].several for value in one.values]
    texts = [value for value in several if type(value) is str]
    if not texts:
        return dict(found), []
    listed = {name for one in found.values() for value in one.values if type(value) is tuple for name in value}
    try:
        separator = _separator(dict.fromkeys(texts), {*map(names.key, known), *map(names.key, listed)})
    except DataError as error:
        place = next(one.place for one in found.values() if any(type(value) is str for value in one.values))
        raise DataError(f"{place} {error.message}", error.hint) from error
    said = [] if separator == ";" else [f"the labels of a text are separated by {separator!r}; no text has a ;"]
    return {name: _divided(one, separator) for name, one in found.items()}, said


def _separator(texts: Collection[str], known: Collection[str]) -> str:
    """What stands between the labels of these texts."""
    parts = {part for text in texts for part in parts_of(text, ";")}
    doubtful = {part for part in parts if names.key(part) not in known}
    used = [one for one in SEPARATORS if any(one in part for part in doubtful)]
    semicolon = any(";" in text for text in texts)
    proven = [one for one in used if _proven(parts, one, known)]
    if not used or (semicolon and not proven):
        return ";"
    if used == proven and len(used) == 1 and not semicolon and not any(used[0] in part for part in parts - doubtful):
        return used[0]
    example = min(part for part in doubtful if any(one in part for one in used))
    raise DataError(f"holds {example[:60]!r}, which may be one or several labels", SEVERAL)


def _proven(texts: Collection[str], separator: str, known: Collection[str]) -> bool:
    """Whether most texts with this separator are made of labels that stand elsewhere too."""
    sets = {frozenset(parts_of(text, separator)) for text in texts}
    seen = Counter(part for one in sets for part in one)
    several = [one for one in sets if len(one) > 1]
    sure = [one for one in several if all(seen[part] > 1 or names.key(part) in known for part in one)]
    return 2 * len(sure) > len(several)


def _checked(value: Any, kind: str) -> Any:
    """A set of labels names each of them once."""
    if KINDS[kind].several and type(value) is tuple and len(set(value)) < len(value):
        raise DataError("holds a label twice", FLAGS)
    return value


def parts_of(text: str, separator: str) -> list[str]:
    """The labels in a text, between separators; empty ones are left out."""
    return [part.strip() for part in text.split(separator) if part.strip()]


def _divided(found: Labels, separator: str) -> Labels:
    named, values = _namer(()), list(found.values)
    for row, value in enumerate(values):
        if type(value) is str:
            try:
                values[row] = _checked(named(tuple(parts_of(value, separator))), found.kind)
            except DataError as error:
                raise DataError(f"row {row} of {found.place} {error.message}", error.hint) from error
    return dataclasses.replace(found, values=values)


# Names and codes ------------------------------------------------------------------------------------------------------


def _namer(own: Sequence[str]) -> Callable[[Any], Any]:
    """Names for a label or for the labels of a set; the codes of a table with `own` names become these."""
    known: dict[Any, str] = {}

    def one(value: Any) -> str:
        key = type(value), value  # or true would be 1
        if key not in known:
            known[key] = _name(value, own)
        return known[key]

    def named(value: Any) -> Any:
        if type(value) is tuple:
            return tuple([one(each) for each in value])
        return None if value is None else one(value)

    return named


def _name(value: Any, own: Sequence[str]) -> str:
    """What a label is called: as the table says, or as it is written; a whole number without decimals."""
    if isinstance(value, int | float) and own:
        if value in range(len(own)):
            return own[int(value)]
        if names.key(str(value)) in NO_LABEL and str(value) not in own:
            return names.key(str(value))
        raise DataError(f"holds the code {value}, and the table names {len(own)} classes")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"holds {value}, which is not finite", "leave those rows out")
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    if not (text.isascii() or is_unicode(text)):
        raise DataError("holds half of a surrogate pair, which is not text")
    return text.partition(".")[0] if re.fullmatch(r"[+-]?[0-9]+\.0*", text) else text
