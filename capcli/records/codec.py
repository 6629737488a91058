"""Records as JSON and back. Nothing else turns a result into JSON, or JSON into a result.

A record is a frozen dataclass; its fields are the names in the JSON, in the same order. On reading, a name that no
field has is ignored, a field that the file lacks gets its default, and a value of another type is a `FileError` that
names file and field. docs/reference/report.md says the same for users.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from capcli.errors import FileError
from capcli.stored import finite, read_json

SCHEMA_VERSION = 1  # of all results; a new name does not change it, another meaning of a name does

# Metadata of a field: what the JSON has instead of None.
ABSENT = {"absent": True}  # nothing, not even the name
EMPTY = {"empty": True}  # an empty table

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Versioned:
    """A result that is a file of its own."""

    schema_version: int = SCHEMA_VERSION


# Writing -------------------------------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """A record as tables, lists, texts and numbers; NaN stays, `files.json_text` writes it as null."""
    if is_dataclass(value):
        pairs = [(one, getattr(value, one.name)) for one in fields(value)]
        return {
            one.name: {} if held is None and "empty" in one.metadata else to_json(held)
            for one, held in pairs
            if not (held is None and "absent" in one.metadata)
        }
    if isinstance(value, Mapping):
        return {name: to_json(one) for name, one in value.items()}
    return [to_json(one) for one in value] if isinstance(value, list | tuple) else value


# Reading -------------------------------------------------------------------------------------------------------------


def read(kind: type[T], path: Path, hint: str = "") -> T:
    """The record in a file. Raises `FileError`."""
    return from_json(kind, read_json(path), str(path), hint)


def from_json(kind: type[T], data: Any, source: str, hint: str = "") -> T:
    """The record in `data`, which comes from the file `source`.

    Raises `FileError` with `hint` for a value of another type, and for a result of a later `schema_version`.
    """
    reader = _Reader(source=source, hint=hint)
    if not isinstance(data, dict):
        raise FileError(f"{source} contains {_what(data)}, not a JSON object", hint)
    if issubclass(kind, Versioned):
        reader.check_version(data.get("schema_version", SCHEMA_VERSION))
    found: T = reader.record(kind, data, "")
    return found


@functools.cache
def _hints(kind: type[Any]) -> Mapping[str, tuple[Any, bool]]:
    """The type of each field of a record, and whether it is left empty for None."""
    types_of = get_type_hints(kind)
    return {one.name: (types_of[one.name], "empty" in one.metadata) for one in fields(kind)}


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Reads values of known types; `at` is the place of a value in the file, such as `metrics.dense`."""

    source: str
    hint: str

    def check_version(self, version: Any) -> None:
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            self.refuse("schema_version", version, "a number from 1 on")
        if version > SCHEMA_VERSION:
            raise FileError(
                f"{self.source} has schema_version {str(version)[:20]}, this cap reads {SCHEMA_VERSION}",
                "it was written by a later cap: update this one, or make the file again with it",
            )

    def record(self, kind: type[Any], data: Any, at: str) -> Any:
        if not isinstance(data, dict):
            self.refuse(at, data, "a JSON object")
        hints = _hints(kind)  # type: ignore[arg-type]  # a class can be hashed
        for one in fields(kind):
            if one.name not in data and one.default is MISSING and one.default_factory is MISSING:
                raise FileError(f"{self.source} has no {_inside(at, one.name)}", self.hint)
        known = {name: hints[name] for name in data if name in hints}
        return kind(
            **{
                name: None if is_empty and data[name] == {} else self.value(hint, data[name], _inside(at, name))
                for name, (hint, is_empty) in known.items()
            }
        )

    def value(self, hint: Any, data: Any, at: str) -> Any:
        origin, args = get_origin(hint), get_args(hint)
        if hint is Any:
            return data
        if origin in (Union, types.UnionType):  # with None
            return None if data is None else self.value(args[0], data, at)
        if is_dataclass(hint):
            return self.record(hint, data, at)  # type: ignore[arg-type]
        if origin in (Mapping, dict):
            if not isinstance(data, dict):
                self.refuse(at, data, "a JSON object")
            return {name: self.value(args[1], one, _inside(at, name)) for name, one in data.items()}
        if origin is tuple:
            return self.several(args, data, at)
        return self.scalar(hint, data, at)

    def several(self, args: tuple[Any, ...], data: Any, at: str) -> tuple[Any, ...]:
        """A list of any length, or the ends of an interval."""
        if not isinstance(data, list):
            self.refuse(at, data, "a list")
        if args[-1] is Ellipsis:
            return tuple(self.value(args[0], one, f"{at}[{index}]") for index, one in enumerate(data))
        if len(data) != len(args):
            self.refuse(at, data, f"a list of {len(args)}")
        return tuple(
            self.value(hint, one, f"{at}[{index}]") for index, (hint, one) in enumerate(zip(args, data, strict=True))
        )

    def scalar(self, hint: Any, data: Any, at: str) -> Any:
        """A text, a truth value or a number; null stands for a number that was not finite."""
        if hint is float and data is None:
            return math.nan
        if hint in (str, bool):
            if not isinstance(data, hint):
                self.refuse(at, data, "a text" if hint is str else "true or false")
            return data
        if isinstance(data, bool) or not isinstance(data, int | float):
            self.refuse(at, data, "a number")
        if isinstance(data, int) and finite(data) is None:
            self.refuse(at, data, "a number that can be computed with")
        if hint is int and isinstance(data, float):
            if not data.is_integer():
                self.refuse(at, data, "a whole number")
            return int(data)
        return data

    def refuse(self, at: str, data: Any, wanted: str) -> NoReturn:
        raise FileError(f"{self.source}: {at} is {_what(data)}, not {wanted}", self.hint)


def _inside(at: str, name: str) -> str:
    return f"{at}.{name[:60]}" if at else name[:60]


def _what(data: Any) -> str:
    """A value of JSON in words."""
    if data is None or isinstance(data, bool):
        return {None: "null", True: "true", False: "false"}[data]
    if isinstance(data, int | float):
        return f"the number {str(data)[:20]}"
    return "a text" if isinstance(data, str) else "a list" if isinstance(data, list) else "a JSON object"
