"""The names of classes: which of them are the same, by name or by value and never by position.

Letters: C classes.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal

FLAGS = {"false": "0", "true": "1"}
_NUMBER = re.compile(r"([+-]?)([0-9]*)\.?([0-9]*)")
_SELECTORS = range(0xFE00, 0xFE10)  # they change how the character before them is drawn

Finder = Callable[[str], int | None]


def number(name: str) -> str | None:
    """The number that a name is, in the only way to write it: `1` for `01`, `+1`, `1.` and `1.0`; None for others."""
    match = _NUMBER.fullmatch(name)
    if match is None or not (match[2] or match[3]):
        return None
    fraction = match[3].rstrip("0")
    digits = (match[2].lstrip("0") or "0") + ("." + fraction if fraction else "")
    return "-" + digits if match[1] == "-" and digits != "0" else digits


def folded(name: str) -> str:
    """A name without what is hard to see: case, invisible characters, kinds of spaces, how an accent is composed."""
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
    seen = (c for c in text if unicodedata.category(c) != "Cf" and ord(c) not in _SELECTORS)
    return " ".join("".join(seen).split())


def key(name: str) -> str:
    """What names that may be the same have in common: their value, or else what is easy to see of them."""
    return number(name) or folded(name)


def order(names: Iterable[str]) -> list[str]:
    """Names in the order of their codes: numbers by value, else by letter without regard to case."""
    values = {name: number(name) for name in names}
    if all(values.values()):
        return sorted(values, key=lambda name: (Decimal(values[name] or 0), name))
    return sorted(values, key=lambda name: (name.casefold(), name))


def finder(names: Sequence[str], aliases: Mapping[str, str] | None = None, *, codes: bool = False) -> Finder:
    """The index of a label among `names` [C]: by name, a number by value; None for a label that is none of them.

    What `key` leaves out counts only where it does not tell two of the names apart. Beside the classes 0 and 1, true is
    1; beside the classes true and false, 1 is true. `aliases` call a label as one of the names, or one of the names as
    a label, and take precedence over these readings of true and 1. With `codes`, a number that is no name is an index,
    whatever the aliases say.
    """
    exact = {name: index for index, name in enumerate(names)}
    unique = _unique(names)
    implied = {str(index): index for index in range(len(names))} if codes else _flags(unique)

    def named(name: str) -> int | None:
        return exact.get(name, unique.get(key(name)))

    def plain(name: str) -> int | None:
        index = named(name)
        return implied.get(key(name)) if index is None else index

    said: dict[str, int] = {}
    for old, new in (aliases or {}).items():
        known, label = (old, new) if named(old) is not None and named(new) is None else (new, old)
        if plain(known) is None:  # both are other than the names, and one may be a code
            known, label = label, known
        if (index := plain(known)) is not None:
            said[key(label)] = index
    others = {**said, **implied} if codes else {**implied, **said}

    def find(name: str) -> int | None:
        index = named(name)
        return others.get(key(name)) if index is None else index

    return find


def _flags(unique: Mapping[str, int]) -> dict[str, int]:
    """What true and false are beside the classes 0 and 1, and what 1 and 0 are beside the classes true and false."""
    if unique and unique.keys() <= set(FLAGS.values()):
        return {flag: unique[value] for flag, value in FLAGS.items() if value in unique}
    if unique and unique.keys() <= FLAGS.keys():
        return {FLAGS[flag]: index for flag, index in unique.items()}
    return {}


def without_effect(find: Finder, aliases: Mapping[str, str]) -> list[tuple[str, str]]:
    """The pairs of a map whose two sides `find`, which knows the map, does not take for the same class."""
    return [pair for pair in aliases.items() if find(pair[0]) is None or find(pair[0]) != find(pair[1])]


def _unique(names: Sequence[str]) -> dict[str, int]:
    """The index of each name by its `key`, where no other name has the same one."""
    places = {name: index for index, name in enumerate(names)}
    return {same: places[group[0]] for same, group in _groups(names).items() if len(group) == 1}


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        found[key(name)].append(name)
    return found


def alike(names: Iterable[str]) -> list[list[str]]:
    """Names that are hard to tell apart, together."""
    return [sorted(group) for group in _groups(names).values() if len(group) > 1]


def one_per_number(names: Iterable[str]) -> list[str]:
    """The names, of those that are the same number only the shortest."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in set(names):
        groups[number(name) or f"name {name}"].append(name)
    return [min(group, key=lambda name: (len(name), name)) for group in groups.values()]


def quoted(name: str) -> str:
    """A name between quotes, everything in it visible."""
    return repr(name) if unicodedata.normalize("NFC", name) == name else ascii(name)
