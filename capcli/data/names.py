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
    a label. With `codes`, a number that is no name is an index.
    """
    exact = {name: index for index, name in enumerate(names)}
    known = _unique(names)
    if known and known.keys() <= set(FLAGS.values()):
        known |= {flag: known[value] for flag, value in FLAGS.items() if value in known}
    elif known and known.keys() <= FLAGS.keys():
        known |= {FLAGS[flag]: index for flag, index in known.items()}
    if codes:
        known = {str(index): index for index in range(len(names))} | known

    def plain(name: str) -> int | None:
        return exact.get(name, known.get(key(name)))

    other: dict[str, int | None] = {}
    for old, new in (aliases or {}).items():
        other |= {key(new): plain(old)} if plain(new) is None else {key(old): plain(new)}

    def find(name: str) -> int | None:
        index = plain(name)
        return other.get(key(name)) if index is None else index

    return find


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


def shown(names: Sequence[str], most: int = 10) -> str:
    """Names for a message, the first of many; one with characters that cannot be seen as Python writes it."""
    visible = [name if name.isprintable() else repr(name) for name in names[:most]]
    return ", ".join(visible) + (", …" if len(names) > most else "")


def quoted(name: str) -> str:
    """A name between quotes, everything in it visible."""
    return repr(name) if unicodedata.normalize("NFC", name) == name else ascii(name)
