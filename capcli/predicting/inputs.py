"""From what a user asks to tokenised examples, read exactly as in an evaluation.

An item is what an example consists of: a text or two, the words of a sentence, or a question and its context.

Letters: N examples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.data import literals, tables, tokens
from capcli.data.batches import Examples
from capcli.data.kinds import KINDS, Kind
from capcli.data.labels import Answers, is_unicode
from capcli.data.splits import Split
from capcli.errors import DataError

Item = tuple[Any, ...]
Place = Callable[[int], str]
"""How messages call the item with this index."""

# What annotated sentences have as words of their own, written before or behind another word.
_BEFORE, _BEHIND = "([{\"'“‘«¿¡", ")]}\"'”’»,;:.!?…。，、；：！？"
_CLITICS = ("'s", "’s")
_ABBREVIATION = re.compile(r"(?:\w\.){2,}")


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """The words of a text, and where each begins and ends in it, in characters."""

    text: str
    words: list[str]
    spans: list[tuple[int, int]]


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


# Words ---------------------------------------------------------------------------------------------------------------


def sentence(cell: str | list[str]) -> Sentence:
    """The words of a text, punctuation apart; or words that are given, in a text with a space between them."""
    found = literals.listed(cell) if isinstance(cell, str) else cell
    if found and all(isinstance(word, str) for word in found):
        ends = np.cumsum([len(word) + 1 for word in found]) - 1
        spans = [(int(end) - len(word), int(end)) for word, end in zip(found, ends, strict=True)]
        return Sentence(text=" ".join(found), words=list(found), spans=spans)
    assert isinstance(cell, str), "a list has words"
    spans = [span for piece in re.finditer(r"\S+", cell) for span in _apart(piece[0], piece.start())]
    return Sentence(text=cell, words=[cell[begin:end] for begin, end in spans], spans=spans)


def _apart(piece: str, at: int) -> Iterator[tuple[int, int]]:
    """The words of a text without spaces that begins at `at`: `"U.S."` in quotes is three, `Ada's` two, `:-)` one."""
    begin, end = 0, len(piece)
    if piece.lower() not in _CLITICS and any(map(str.isalnum, piece)):
        while piece[begin] in _BEFORE:
            begin += 1
        while piece[end - 1] in _BEHIND and not _ABBREVIATION.fullmatch(piece, begin, end):
            end -= 1
    stem = end - 2 if piece[max(end - 2, begin + 1) : end].lower() in _CLITICS else end
    middle = [piece[begin:stem], piece[stem:end]]
    parts = ["".join(run) for _, run in groupby(piece[:begin])] + middle
    for part in [*parts, *("".join(run) for _, run in groupby(piece[end:]))]:
        if part:
            yield at, at + len(part)
        at += len(part)


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
        labels=_no_labels(row, sentences, len(items)),
        kind=kind,
    )
    examples = tokens.encode(split, tokenizer, length, stride=stride, cache=False)
    return Asked(items=items, examples=examples, sentences=sentences)


def _no_labels(row: Kind, sentences: Sequence[Sentence], n: int) -> NDArray[Any]:
    """Labels [N] that say nothing, of the type that a split of this kind has."""
    if not (row.words or row.windows):
        return np.zeros(n)
    labels = np.empty(n, dtype=object)
    for i in range(n):
        labels[i] = np.zeros(len(sentences[i].words), dtype=np.int64) if row.words else Answers(texts=(), starts=())
    return labels
