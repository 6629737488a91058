"""From layers of options to a configuration, and back to a flat table.

Order of precedence, later wins: field default, preset, default of the criterion, preset for the criterion, rows of the
preset for such runs, file, command line.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capcli.config.measure import EvalConfig, ProbeConfig
from capcli.config.names import BUILTIN_TASKS, CONFIG_FILE, METHODS, NUMERIC_GATES, OF_CRITERION, PRESETS
from capcli.config.options import check_name, flag_name, flatten, leaves, measured, typed_fields
from capcli.config.paths import shortened
from capcli.config.presets import preset_values
from capcli.config.prune import PruneConfig
from capcli.errors import ConfigError, FileError
from capcli.stored import read_bytes, text_of

MAX_TOML_BYTES, MAX_TOML_DOTS = 64_000, 2000  # the time for a key such as a.a.a grows with its square
TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}")


_SECTIONS: dict[str, type] = {"prune": PruneConfig, "eval": EvalConfig, "probe": ProbeConfig}
_TYPE_NAMES = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}


def build(cls: type, flat: Mapping[str, Any]) -> Any:
    """Make a configuration from a flat mapping of field names; nested groups are filled from the same mapping."""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        check_no_token(name, value)
    for item, kind in typed_fields(cls):
        if dataclasses.is_dataclass(kind):
            values[item.name] = build(typing.cast(type, kind), flat)
        elif flat.get(item.name) is not None:
            values[item.name] = flat[item.name]
    return cls(**values)


def check_no_token(name: str, value: object) -> None:
    """Raise `ConfigError` for a token of the hub among the options: it would stand in messages, reports and names."""
    if isinstance(value, str) and TOKEN.search(value):
        raise ConfigError(
            f"{name} contains what looks like a hub token, which is not shown here",
            "set HF_TOKEN, or run hf auth login; revoke this token if others can see the command",
        )


def prune_config(chosen: Mapping[str, Any], file: str = "") -> PruneConfig:
    """Layer preset, `--config` file and the options the user chose into a `PruneConfig`."""
    layers = layered("prune", chosen, file)
    preset = layers.get("preset", PruneConfig.preset)
    check_name("preset", preset, PRESETS)
    method = layers.get("method", PRESETS[preset].get("*", {}).get("method", "cap-soft"))
    check_name("method", method, METHODS)
    values = preset_values(
        preset,
        task=layers.get("task", ""),
        criterion=METHODS[method].criterion,
        structure=layers.get("structure", PruneConfig.structure),
        sparsity=layers.get("sparsity", PruneConfig.sparsity),
    )
    found: PruneConfig = build(PruneConfig, {**values, **layers})
    return found


def options_file(chosen: str = "") -> str:
    """The file with options of `cap eval` and `cap probe`: the chosen one, else `cap.toml` if it is here, else none."""
    return chosen or (CONFIG_FILE if Path(CONFIG_FILE).exists() else "")


def layered(command: str, chosen: Mapping[str, Any], file: str = "") -> dict[str, Any]:
    """The options that the user chose over those of a file, if there is one. Raises `ConfigError`."""
    layers = {**(read_toml(file, command) if file else {}), **{n: v for n, v in chosen.items() if v is not None}}
    check_limits(layers)
    return layers


def check_limits(layers: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a limit of 0, which stands for none."""
    for name in NUMERIC_GATES:
        if layers.get(name) == 0:
            raise ConfigError(f"{flag_name(name)} 0 sets no limit", "leave it out, or set one above 0")


def read_toml(file: str, command: str) -> dict[str, Any]:
    """Options of a command from a TOML file; names as on the command line, with dashes or underscores.

    The table of the command goes over what stands before all tables, which for eval and probe are options of both. The
    tables of the other commands are checked as well. Raises `ConfigError`.
    """
    try:
        data = b"" if file == os.devnull else read_bytes(Path(file), MAX_TOML_BYTES, "an options file")
        if data.count(b".") > MAX_TOML_DOTS:
            raise FileError(f"more than {MAX_TOML_DOTS:,} dots, too many for an options file")
        content = tomllib.loads(text_of(data, Path(file)))
    except (FileError, ValueError, RecursionError) as error:
        if isinstance(error, FileError) and error.hint:
            raise ConfigError(error.message, error.hint) from error
        raise ConfigError(
            f"cannot read {file}: {error}", "the file must be TOML, with lines such as seed = 1"
        ) from error
    tables = {name: value for name, value in content.items() if name in _SECTIONS and isinstance(value, dict)}
    top = {name: value for name, value in content.items() if name not in tables}
    _check_tables(top, file)
    found = _read_table(top, file, ("prune",) if command == "prune" else ("eval", "probe"))
    checked = {name: _read_table(table, f"{file} [{name}]", (name,)) for name, table in tables.items()}
    return {**found, **checked.get(command, {})}


def _check_tables(top: Mapping[str, Any], file: str) -> None:
    """Raise `ConfigError` for a table that is not of a command."""
    options = {item.name for cls in _SECTIONS.values() for item, _ in leaves(cls)}
    for name, value in top.items():
        if isinstance(value, dict) and name.replace("-", "_") not in options:
            tables = ", ".join(f"[{section}]" for section in _SECTIONS)
            raise ConfigError(
                f"unknown table in {file} [{name}]",
                f"the tables are {tables}; all options, gates included, are plain keys",
            )


def _read_table(table: Mapping[str, Any], place: str, commands: tuple[str, ...]) -> dict[str, Any]:
    """The options of a table by field name; each must be one of all the `commands`."""
    kinds = {command: {item.name: (item, kind) for item, kind in leaves(_SECTIONS[command])} for command in commands}
    known = {name: both for table in kinds.values() for name, both in table.items()}
    values = {name.replace("-", "_"): value for name, value in table.items()}
    for name, value in values.items():
        check_name(f"option in {place}", name, known)
        owners = [command for command in commands if name in kinds[command]]
        if len(owners) < len(commands):
            raise ConfigError(f"{name} in {place} is an option of {owners[0]} only", f"put it below [{owners[0]}]")
        values[name] = typed(*known[name], value, place)
    return values


def typed(item: dataclasses.Field[Any], kind: type, value: Any, place: str) -> Any:
    """A value in the type of its option. Raises `ConfigError` that names option and place."""
    name = item.name
    unit = item.metadata.get("unit")
    if unit and isinstance(value, str):
        try:
            return measured(unit, value)
        except ValueError as error:
            raise ConfigError(f"{name} in {place}: {error}") from error
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        several = kind is str and isinstance(value, list | dict)
        hint = f'write several in one text, separated by commas: {name} = "…,…"' if several else ""
        raise ConfigError(f"{name} in {place} must be {_TYPE_NAMES[kind]}, got {value!r}", hint)
    return value


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two flattened configurations, in words by option, but for `free_options`."""
    free = free_options()
    return {
        name: f"{name}: {theirs.get(name)!r}, now {ours.get(name)!r}"
        for name in {**ours, **theirs}
        if name not in free and theirs.get(name) not in (ours.get(name), shortened(ours.get(name)))  # as reports do
    }


def free_options() -> frozenset[str]:
    """The options of a run that nothing which it makes depends on."""
    return frozenset(item.name for item, _ in leaves(PruneConfig) if item.metadata.get("resumable"))


def explained(chosen: Mapping[str, Any], file: str = "") -> list[tuple[str, Any, str, Any, str]]:
    """(option, value, where it comes from, default, help) of `cap prune` with these options. Raises `ConfigError`.

    Without a task the values are those of classification.
    """
    read = layered("prune", {}, file)
    task = {**read, **chosen}.get("task") or ""
    config = prune_config({**chosen, "task": task or BUILTIN_TASKS[0]}, file)
    of_method = OF_CRITERION.get(METHODS[config.method].criterion, {})
    of_preset = preset_values(
        config.preset,
        task=config.source.task,
        criterion=config.criterion,
        structure=config.structure,
        sparsity=config.sparsity,
    )

    def source(name: str) -> str:
        if chosen.get(name) is not None:
            return "command line"
        if name in read:
            return file
        if name not in of_preset:
            return "default"
        alone = name in of_method and of_preset[name] == of_method[name]
        return f"--method {config.method}" if alone else f"--preset {config.preset}"

    values = {**flatten(config), "task": task}
    return [
        (item.name, values[item.name], source(item.name), item.default, item.metadata["help"])
        for item, _ in leaves(PruneConfig)
        if item.metadata
    ]
