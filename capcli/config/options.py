"""One option: its default and help as a dataclass field, how its text is read and checked."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from capcli.config.names import MOST, nearest
from capcli.errors import ConfigError


def option(
    default: Any,
    help: str,
    *,
    flag: str = "",
    panel: str = "",
    resumable: bool = False,
    unit: str = "",
    names: Iterable[str] = (),
    metavar: str = "",
    expert: bool = False,
    several: str = "",
) -> Any:
    """A dataclass field with its help text.

    `resumable` marks what may differ when a run is continued, at no price. `unit`: a name of `UNITS`, for a number that
    users may write with a unit. `names`: what a text can be; `metavar`: what stands for it in the help, else its type.
    `expert`: only `--help-all` shows it. `several`: what `--help` shows where users may give a list, which makes a
    sweep.
    """
    metadata = {"help": help, "flag": flag, "panel": panel, "resumable": resumable, "unit": unit}
    more = {"names": tuple(names), "metavar": metavar, "expert": expert, "several": several}
    return field(default=default, metadata={**metadata, **more})


def same_option(cls: type, name: str) -> Any:
    """The option `name` of another configuration as a field of this one: its default and help are written once."""
    (found,) = (item for item in fields(cls) if item.name == name)
    return field(default=found.default, metadata=found.metadata)


def exists(path: str) -> bool:
    """Whether a path is there; a name that no system allows is not."""
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):  # too long, or no path at all
        return False


def split_list(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list, in the order given, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def typed_fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a configuration with their types resolved."""
    hints = typing.get_type_hints(cls)
    return [(item, hints[item.name]) for item in fields(cls)]


def flatten(config: Any) -> dict[str, Any]:
    """A configuration as one flat mapping of field names; the inverse of `layers.build`."""
    flat: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {item.name: value})
    return flat


def leaves(cls: type) -> Iterable[tuple[dataclasses.Field[Any], Any]]:
    """Every option of a configuration with its type, those of nested groups where the group stands."""
    for item, kind in typed_fields(cls):
        if dataclasses.is_dataclass(kind):
            yield from leaves(typing.cast(type, kind))
        else:
            yield item, kind


# Numbers with units --------------------------------------------------------------------------------------------------

SIZES = {"": 1, "b": 1} | {
    prefix + end: base**power
    for power, prefix in enumerate(("k", "m", "g"), 1)
    for end, base in {"": 1000, "b": 1000, "ib": 1024}.items()
}
TIMES = {"": Decimal(1), "ms": Decimal(1), "s": Decimal(1000), "us": Decimal("0.001"), "µs": Decimal("0.001")}
_NUMBER = re.compile(r"\s*([0-9_]*\.?[0-9_]+(?:e[+-]?[0-9]{1,2})?)\s*([a-zµ]*)\s*", re.IGNORECASE)


def share(text: str) -> float:
    """A number, which may be given in per cent: 0.8 of `0.8` and of `80%`. Raises `ValueError`."""
    number = float(text.strip().removesuffix("%"))
    return number / 100 if text.strip().endswith("%") else number


def size(text: str) -> int:
    """Whole bytes: 5,000,000 of `5MB`, `5M` and `5000000`, 5,242,880 of `5MiB`. Raises `ValueError`."""
    return int(_scaled(text, SIZES))


def duration(text: str) -> float:
    """Milliseconds: 10 of `10`, `10ms` and `0.01s`. Raises `ValueError`."""
    return float(_scaled(text, TIMES))


def _scaled(text: str, units: Mapping[str, int | Decimal]) -> Decimal:
    """The number at the beginning of a text, times what its unit stands for; capitals do not matter."""
    found = _NUMBER.fullmatch(text)
    scale = units.get(found[2].lower()) if found else None
    if found is None or scale is None:
        raise ValueError(text)
    try:
        return Decimal(found[1]) * scale
    except InvalidOperation as error:
        raise ValueError(text) from error


UNITS: dict[str, tuple[Callable[[str], float], str, str]] = {
    "share": (share, "FLOAT", "a number or a percentage such as 98%"),
    "bytes": (size, "SIZE", "a size such as 5MB, 800k or 1.5MiB"),
    "ms": (duration, "TIME", "a time such as 10, 10ms or 0.5s"),
}
"""By unit: what reads the text, its name in `--help`, and what it is in words."""


def measured(unit: str, text: str) -> float:
    """The number that a text with a unit stands for. Raises `ValueError` that says what was expected."""
    read, _, wanted = UNITS[unit]
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not {wanted}") from error


# Gates ---------------------------------------------------------------------------------------------------------------


def parse_limits(flag: str, text: str) -> dict[str, float]:
    """`accuracy=0.9,f1=80%` as a mapping. Raises `ConfigError` for anything else, also for one metric twice."""
    limits: dict[str, float] = {}
    for part in _gates(flag, text):
        name, limit = _limit(flag, part)
        if name in limits:
            raise _twice(flag, name)
        limits[name] = limit
    return limits


def pieces(text: str) -> list[str]:
    """The parts of a list with commas, without spaces and empty ones."""
    return [piece.strip() for piece in text.split(",") if piece.strip()]


def _gates(flag: str, text: str) -> list[str]:
    """The parts of a list of gates. Raises `ConfigError` for a text that names none, as `,`."""
    found = pieces(text)
    if text and not found:
        raise ConfigError(f"{flag} needs METRIC=NUMBER, got {text!r}", f"for example {flag} accuracy=0.8")
    return found


def _limit(flag: str, text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        limit = share(value)
    except ValueError:
        limit = math.nan
    if not name.strip() or name.strip()[-1] in "<>!" or not math.isfinite(limit):
        raise ConfigError(f"{flag} needs METRIC=NUMBER, got {text!r}", f"for example {flag} accuracy=0.8")
    return name.strip(), limit


def meant(value: float) -> str:
    """A hint for who gave per cent where a share is expected; empty when the value is neither."""
    if not 1 <= value <= 100:
        return ""
    whole, _, decimals = f"{value / 100:.10g}".partition(".")
    return f"did you mean {whole}.{decimals.ljust(2, '0')} or {value:.10g}%?"


def _twice(flag: str, name: str) -> ConfigError:
    return ConfigError(f"{flag} has two limits for {name!r}", "remove one of them")


def parse_drops(text: str) -> list[tuple[str, float, bool]]:
    """`accuracy=0.01,f1=2%` as (name, largest drop, whether that is a share of the baseline's value).

    A metric may have a limit of each kind. Raises `ConfigError` for anything else.
    """
    found: dict[tuple[str, bool], float] = {}
    for part in _gates("--max-drop", text):
        relative = part.endswith("%")
        name, limit = _limit("--max-drop", part)
        if (name, relative) in found:
            raise _twice("--max-drop", name)
        found[name, relative] = limit
    return [(name, limit, relative) for (name, relative), limit in found.items()]


# Names ---------------------------------------------------------------------------------------------------------------


def parse_label_map(text: str) -> dict[str, str]:
    """`LABEL_0=negative,LABEL_1=positive` as a mapping. Raises `ConfigError` for anything else."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(old.strip() and sign and new.strip() for old, sign, new in pairs):
        raise ConfigError(
            f"--label-map needs OLD=NEW pairs, got {text!r}", "for example LABEL_0=negative,LABEL_1=positive"
        )
    olds = [old.strip() for old, _, _ in pairs]
    if twice := [old for old in olds if olds.count(old) > 1]:
        raise ConfigError(f"--label-map has two names for {twice[0]!r}", "leave one of them")
    return {old.strip(): new.strip() for old, _, new in pairs}


def check_name(what: str, name: str, valid: Iterable[str]) -> None:
    """Raise `ConfigError` for a name that is not valid, with the nearest that is."""
    if name not in valid:
        raise ConfigError(f"unknown {what} {name!r}" if name else f"no {what} given", nearest(name, valid))


def check_names(config: Any) -> None:
    """Raise `ConfigError` for a value that is none of the names that its option has."""
    for item in fields(config):
        if names := item.metadata.get("names"):
            check_name(item.name.replace("_", "-"), getattr(config, item.name), names)


def flag_name(name: str) -> str:
    """An option as it is typed on the command line."""
    return "--" + name.replace("_", "-")


def at_least(low: float, **values: float) -> None:
    """Raise `ConfigError` for the first value below `low`, or not finite."""
    for name, value in values.items():
        if isinstance(value, int) and abs(value) > MOST:
            raise ConfigError(f"{flag_name(name)} must be below 2**63", "choose a smaller number")
        if not (math.isfinite(value) and value >= low):
            raise ConfigError(f"{flag_name(name)} must be at least {low:g}, got {value:g}")
