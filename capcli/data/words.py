"""The words of a text, as annotated sentences have them: punctuation is apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from capcli.data import literals

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
