"""Texts with small changes that a reader hardly minds: what does a model still know when its input is less tidy?

typos: errors of the keyboard in about one of ten words of more than three letters, and in one at least: two letters in
the wrong order, one left out, one doubled, or that of a key beside it; the first letter stays. Such noise is that of
Belinkov and Bisk (2018), "Synthetic and natural noise both break neural machine translation".
case: half of the texts in capitals, the others in small letters, or Each Word Like This where they are small already.
The tokenizer of an uncased model gives the same tokens, which is a result and not a fault.
order: each three words that follow one another in another order; punctuation stays with its word. Pham et al. (2021),
"Out of order", and Sinha et al. (2021), "UnNatural language inference", ask so how much a model makes of word order.

Typos and case are invariance tests in the sense of CheckList (Ribeiro et al. 2020): the right answer stays the same.
Another order may change it (of the acceptability of a sentence it does), so read that fall beside the task.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, TypeVar

from capcli.data.kinds import KINDS

T = TypeVar("T")

VERSION = 1
"""Part of the key of cached tokens: raise it with every change of what is made of a text."""
SHARE = 0.1
WINDOW = 3
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_LONG = re.compile(r"[^\W\d_]{4,}")
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One of `config.names.PERTURBATIONS`, as the seed has it."""

    name: str
    seed: int

    def of(self, text: Any, row: int, place: int) -> Any:
        """The changed text, a string or a list of words; `place`: which text of the example in `row` it is.

        A pure function of its arguments and of name and seed. Of words the number stays, and no word becomes empty.
        """
        draw = random.Random(f"{self.seed} {self.name} {row} {place}").random  # the same in every version of Python
        words = [text] if isinstance(text, str) else text
        changed = _CHANGES[self.name](words, draw)
        return changed[0] if isinstance(text, str) else changed


def offered(kind: str, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the changes `names` that fit a kind of task: words with a label each keep their order."""
    return tuple(name for name in names if name != "order" or KINDS[kind].order)


Draw = Callable[[], float]


def _typos(texts: list[str], draw: Draw) -> list[str]:
    places = [(i, *word.span()) for i, text in enumerate(texts) for word in _LONG.finditer(text)]
    chosen = [place for place in places if draw() < SHARE]
    if places and not chosen:
        chosen = [_one(places, draw)]
    changed = list(texts)
    for i, begin, end in reversed(chosen):  # from the end, so that what is before keeps its place
        text = changed[i]
        changed[i] = text[:begin] + _mistyped(text[begin:end], draw) + text[end:]
    return changed


def _mistyped(word: str, draw: Draw) -> str:
    """A word of at least four letters with one error."""
    made = [candidate for candidate in _one(_ERRORS, draw)(word) if candidate != word] or _doubled(word)
    return _one(made, draw)


def _swapped(word: str) -> list[str]:
    return [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(1, len(word) - 1)]


def _dropped(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i in range(1, len(word))]


def _doubled(word: str) -> list[str]:
    return [word[:i] + word[i] + word[i:] for i in range(1, len(word))]


def _beside(word: str) -> list[str]:
    """Only letters of the English keyboard have neighbours."""
    return [
        word[:i] + (other.upper() if letter.isupper() else other) + word[i + 1 :]
        for i, letter in enumerate(word)
        for other in _NEIGHBOURS.get(letter.lower(), "")
        if i
    ]


_ERRORS = (_swapped, _dropped, _doubled, _beside)
_NEIGHBOURS = {key: row[max(0, i - 1) : i] + row[i + 1 : i + 2] for row in _KEYS for i, key in enumerate(row)}


def _case(texts: list[str], draw: Draw) -> list[str]:
    forms = (str.upper, str.lower, _titled) if draw() < 0.5 else (str.lower, _titled, str.upper)
    made = ([form(text) for text in texts] for form in forms)
    return next((changed for changed in made if changed != texts), texts)


def _titled(text: str) -> str:
    return _WORD.sub(lambda word: word[0][:1].upper() + word[0][1:], text)


def _order(texts: list[str], draw: Draw) -> list[str]:
    return [_shuffled(text, draw) for text in texts]


def _shuffled(text: str, draw: Draw) -> str:
    words = _WORD.findall(text)
    mixed: list[str] = []
    for begin in range(0, len(words), WINDOW):
        window = words[begin : begin + WINDOW]
        others = [list(one) for one in permutations(window) if list(one) != window]
        mixed += _one(others, draw) if others else window
    following = iter(mixed)
    return _WORD.sub(lambda _: next(following), text)


def _one(choices: Sequence[T], draw: Draw) -> T:
    return choices[int(draw() * len(choices))]


_CHANGES: dict[str, Callable[[list[str], Draw], list[str]]] = {"typos": _typos, "case": _case, "order": _order}
