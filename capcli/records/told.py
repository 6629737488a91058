"""What `cap doctor`, `cap tasks` and `cap config` say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capcli.records.codec import Versioned


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """One task: its columns with all names that are read, what is measured, and where its data come from."""

    name: str
    kind: str
    text_columns: tuple[tuple[str, ...], ...]
    label_columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    source: str


@dataclass(frozen=True, kw_only=True)
class TaskList(Versioned):
    """All tasks."""

    tasks: tuple[TaskRow, ...]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The value of one option, and where it comes from: the command line, a file, a preset, the method, the default."""

    name: str
    value: Any
    source: str
    default: Any
    help: str


@dataclass(frozen=True, kw_only=True)
class Settings(Versioned):
    """All options of a run."""

    settings: tuple[Setting, ...]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at. state: ok, missing (something optional), or problem."""

    name: str
    state: str
    found: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Versioned):
    """What is installed, where it computes and where it keeps things."""

    checks: tuple[Check, ...]
    versions: dict[str, str]
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
