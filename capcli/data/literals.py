"""Lists and tables that were written into a text, as JSON, Python and numpy print them. Nothing is evaluated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

MOST_CHARACTERS = 1_000_000
DEEPEST = 6
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    | (?P<number>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
    | (?P<word>[A-Za-z_][A-Za-z0-9_.]*)
    | (?P<mark>[\[\](){},:=]))""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None, "nan": None}
_WRAPPERS = re.compile(r"(np|numpy|torch)?\.?(array|tensor|str_|bool_|u?int\d+|float\d+|list|tuple|set|frozenset|dict)")
_CALL = r"\s*(np|numpy|torch)?\.?(array|tensor|list|tuple|set|frozenset|dict)\("
_OPENS = re.compile(rf"\s*[\[({{]|{_CALL}")
_QUOTES = re.compile(rf"""({_CALL})?\s*[\[{{]\s*['"]""")
_BARE = re.compile(r"\s*\[[^\s\[\]]+(,\s+[^\s\[\]]+)+\]\s*")
_CLOSING = {"[": "]", "(": ")", "{": "}"}

_Token = tuple[str, str, bool]  # kind, text, whether a space stands before it


def listed(text: str) -> list[Any] | None:
    """The list that a text is, from its first character to its last; None for any other text."""
    try:
        found = parsed(text) if _OPENS.match(text) else None
    except ValueError:
        return None
    return found if isinstance(found, list) else None


def broken(text: str) -> bool:
    """Whether a text that is no list was meant as one: a bracket before a quote, or commas between bare words."""
    return bool(_QUOTES.match(text) or _BARE.fullmatch(text))


def enclosed(text: str) -> bool:
    """Whether brackets or braces enclose all of a text, as those of a list do."""
    inside = text.strip()
    return len(inside) > 1 and inside[0] in "[{" and inside[-1] == _CLOSING[inside[0]]


def parsed(text: str) -> Any:
    """The value that a text is: lists (also for tuples and sets), tables, texts, numbers, true, false, None.

    Between the items of a list stand commas, or, as numpy prints it, spaces. Raises `ValueError` for anything else.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it is longer than {MOST_CHARACTERS:,} characters")
    tokens = [*_tokens(text), ("end", "", True)]
    tokens.reverse()
    found = _value(tokens, 0)
    _expect(tokens, "")
    return found


def _tokens(text: str) -> Iterator[_Token]:
    place, end = 0, len(text.rstrip())
    while place < end:
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(f"unexpected {text[place : place + 10].strip()!r} at character {place}")
        yield str(match.lastgroup), match[match.lastgroup or 0], match.start(match.lastgroup or 0) > place
        place = match.end()


def _expect(tokens: list[_Token], mark: str) -> None:
    _, text, _ = tokens.pop()
    if text != mark:
        raise ValueError(f"expected {mark or 'the end'!r}, got {text or 'the end'!r}")


def _value(tokens: list[_Token], depth: int) -> Any:
    """The value that the tokens, the first one last, begin with."""
    kind, text, _ = tokens.pop()
    if depth > DEEPEST:
        raise ValueError(f"lists are nested more than {DEEPEST} deep")
    if kind == "string":
        inside = _ESCAPE.sub(_unescaped, text[1:-1])  # JSON writes some characters as two halves
        return inside.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if kind == "number":
        return float(text) if re.search(r"[.eE]", text) else int(text)
    if text in _CLOSING:
        return _items(tokens, text, depth)
    if kind == "word" and text in _WORDS:
        return _WORDS[text]
    if kind == "word" and _WRAPPERS.fullmatch(text):
        return _wrapped(tokens, depth)
    raise ValueError(f"unexpected {text or 'end'!r}")


def _unescaped(match: re.Match[str]) -> str:
    what = match[1]
    if len(what) > 1:
        return chr(min(int(what[1:], 16), 0x10FFFF))
    return _ESCAPED.get(what, what if what in "\\'\"/" else match[0])


def _items(tokens: list[_Token], opening: str, depth: int) -> Any:
    """What stands between two brackets: a list, or a table when the first item is a key."""
    found: list[Any] = []
    keys: list[Any] = []
    commas: set[bool] = set()
    while tokens[-1][1] != _CLOSING[opening]:
        found.append(_value(tokens, depth + 1))
        if opening == "{" and tokens[-1][1] == ":" and len(keys) == len(found) - 1:
            _expect(tokens, ":")
            keys.append(found.pop())
            found.append(_value(tokens, depth + 1))
        last = tokens[-1][1] == _CLOSING[opening]
        if tokens[-1][1] == ",":
            tokens.pop()
            commas.add(True)
        elif not last:
            commas.add(False)
        if len(commas) > 1 or (not last and commas == {False} and not (opening == "[" and tokens[-1][2])):
            raise ValueError("items without one kind of separator")
    tokens.pop()
    if opening == "{" and (keys or not found):
        return _table(keys, found)
    if opening == "(" and found and not commas:
        raise ValueError("a value in brackets is no list")
    return found


def _table(keys: list[Any], values: list[Any]) -> dict[str, Any]:
    if len(keys) != len(values) or not all(isinstance(key, str) for key in keys) or len(set(keys)) < len(keys):
        raise ValueError("keys must be texts, and each key may occur only once")
    return dict(zip(keys, values, strict=True))


def _wrapped(tokens: list[_Token], depth: int) -> Any:
    """The value in `array(..., dtype=object)` and its like; `set()` is an empty list."""
    _expect(tokens, "(")
    if tokens[-1][1] == ")":
        tokens.pop()
        return []
    found = _value(tokens, depth + 1)
    while tokens[-1][1] == ",":
        tokens.pop()
        tokens.pop()
        _expect(tokens, "=")
        tokens.pop()
    _expect(tokens, ")")
    return found
