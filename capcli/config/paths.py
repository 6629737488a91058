"""How reports show the places of this machine: absolute paths by their last part."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from capcli.config.options import flatten, pieces

T = TypeVar("T")


ELSEWHERE = "…/"  # how the place of a file begins that is, or was, outside of what is shown


def elsewhere(place: str) -> str:
    """A path of another machine, or one that another machine need not know, by its last part."""
    return f"{ELSEWHERE}{Path(place).name}"


def shortened(value: Any) -> Any:
    """An absolute path as reports show it, by its last part; anything else as it is."""
    return elsewhere(value) if isinstance(value, str) and Path(value).is_absolute() else value


def portable(found: T, config: Any) -> T:
    """A result without the absolute paths among the options of its command; they say nothing elsewhere, but much of
    the machine and its user."""
    texts = (value for value in flatten(config).values() if isinstance(value, str))
    places = {place for text in texts for place in pieces(text) if Path(place).is_absolute() and Path(place).name}
    known = {form: str(shortened(place)) for place in places for form in (place, str(Path(place)))}
    if not known:
        return found
    longest_first = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w./…-])(?:{longest_first})(?![\w-])")

    def shown(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(value, **{one.name: shown(vars(value)[one.name]) for one in fields(value)})
        if isinstance(value, dict):
            return {name: shown(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(shown, value))
        return pattern.sub(lambda match: known[match[0]], value) if isinstance(value, str) else value

    clean: T = shown(found)
    return clean


def command_line(arguments: Iterable[str]) -> str:
    """A command as reports have it, absolute paths by their last part."""
    shown = (
        re.sub(r"(^-\w+|^|[=,] *)(/[^,]*)", lambda match: match[1] + shortened(match[2]), text) for text in arguments
    )
    return shlex.join(["cap", *shown])
