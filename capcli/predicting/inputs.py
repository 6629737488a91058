"""From what a user asks to tokenised examples, read exactly as in an evaluation.

An item is what an example consists of: a text or two, the words of a sentence, or a question and its context.

Letters: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capcli.data import tables, texts, tokens
from capcli.data.batches import Examples
from capcli.data.kinds import KINDS, Kind
from capcli.data.labels import is_unicode
from capcli.data.splits import Split
from capcli.data.words import Sentence, sentence
from capcli.errors import DataError

Item = tuple[Any, ...]
Place = Callable[[int], str]
"""How messages call the item with this index."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Items as a model reads them. sentences: of a kind whose labels are those of words, one for each item."""

    items: Sequence[Item]
    examples: Examples
    sentences: Sequence[Sentence] = ()


# What a caller gives -------------------------------------------------------------------------------------------------


def is_one(inputs: Any) -> bool:
    """Whether this is one thing to answer, not several."""
    return isinstance(inputs, str | tuple | Mapping)


def item(given: Any, kind: str) -> Item:
    """One text, or two; a question and its context; of labels of words a text, or a list of words. Raises `DataError`.

    Texts by name are called as pipelines of transformers call them.
    """
    row = KINDS[kind]
    if isinstance(given, str):
        return (given,)
    if isinstance(given, Mapping) and not row.vectors:
        return _named(given, row)
    if row.words and isinstance(given, list | tuple):
        return (list(given),)
    if isinstance(given, list | tuple) and len(given) == 2 and not row.vectors:
        return tuple(given)
    raise DataError(f"cannot read a {type(given).__name__} as {_expected(row)}")


def _named(given: Mapping[str, Any], row: Kind) -> Item:
    wanted = ("question", "context") if row.windows else ("text", "text_pair")
    optional = 2 if row.windows else 1
    if not {*wanted[:optional]} <= {*given} <= {*wanted}:
        raise DataError(f"cannot read names {', '.join(map(repr, given))} as {_expected(row)}")
    return tuple(given[name] for name in wanted if given.get(name) is not None)


def _expected(row: Kind) -> str:
    if row.windows:
        return "a question with its context"
    if row.vectors:
        return "a text"
    return "a text or a list of words" if row.words else "a text or a pair of texts"


def check(items: Sequence[Item], kind: str, paired: bool | None, place: Place) -> None:
    """Raise `DataError` for the first item that has no text, or another number of texts than the model reads.

    paired: whether it reads two; None: not known, so that as many as the first item has.
    """
    _, wrong = sound(items, kind, paired, place)
    if wrong is not None:
        raise wrong


def sound(items: Sequence[Item], kind: str, paired: bool | None, place: Place) -> tuple[int, DataError | None]:
    """How many items there are before the first that `check` refuses, and the error that it raises for that one."""
    row = KINDS[kind]
    wanted = n_texts(kind, paired) or len(items[0])
    for index, one in enumerate(items):
        if len(one) != wanted:
            has = "two texts" if len(one) == 2 else "one text"
            return index, DataError(f"{place(index)} is {has}: the model reads {'two' if wanted == 2 else 'one'}")
        for cell in one:
            if wrong := _wrong(cell, row):
                return index, DataError(f"{place(index)} {wrong}", "leave the row out, or give it a text")
    return len(items), None


def n_texts(kind: str, paired: bool | None) -> int:
    """How many texts an item has; 0 where it is not known."""
    row = KINDS[kind]
    if row.words or row.windows or row.vectors:
        return 2 if row.windows else 1
    return 0 if paired is None else 1 + paired


def _wrong(cell: Any, row: Kind) -> str:
    """What is wrong with a text, or with words; nothing of a right one."""
    if not (row.words and isinstance(cell, list)):
        return _wrong_text(cell) or ("" if cell.strip() else "has no text")
    wrong = next(filter(None, map(_wrong_text, cell)), "")
    return wrong or ("" if any(map(str.strip, cell)) else "has no words")


def _wrong_text(cell: Any) -> str:
    if cell is None:
        return "has no text"
    if not isinstance(cell, str):
        return f"is of type {type(cell).__name__}, not text"
    return "" if cell.isascii() or is_unicode(cell) else "holds half of a surrogate pair, which is not text"


# Examples ------------------------------------------------------------------------------------------------------------


def asked(items: Sequence[Item], kind: str, tokenizer: Any, length: int, stride: int = 0) -> Asked:
    """Items that are right as tokenised examples, as an evaluation has them; see `tokens.encode`."""
    row = KINDS[kind]
    sentences = [sentence(words) for (words,) in items] if row.words else []
    names = ("text", "pair")[: len(items[0])]
    columns = list(zip(*items, strict=True)) if not sentences else [[one.words for one in sentences]]
    split = Split(
        name="input",
        table=tables.in_memory("input", dict(zip(names, columns, strict=True)), fingerprint="input"),
        columns=names,
        labels=texts.no_labels(kind, [one.words for one in sentences] or items),
        kind=kind,
    )
    examples = tokens.encode(split, tokenizer, length, stride=stride, cache=False)
    return Asked(items=items, examples=examples, sentences=sentences)
