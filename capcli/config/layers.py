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
from capcli.config.names import CONFIG_FILE, METHODS, NUMERIC_GATES, PRESETS
from capcli.config.options import check_name, flag_name, leaves, measured, split_list, typed_fields
from capcli.config.paths import shortened
from capcli.config.patterns import fixed_sparsity
from capcli.config.presets import preset_values
from capcli.config.prune import PruneConfig
from capcli.config.sweep import SweepOptions, listed, numbers
from capcli.config.target import in_place_of_sparsity
from capcli.errors import ConfigError, FileError
from capcli.stored import read_bytes, text_of

MAX_TOML_BYTES, MAX_TOML_DOTS = 64_000, 2000  # the time for a key such as a.a.a grows with its square
TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}")


_SECTIONS: dict[str, tuple[type, ...]] = {
    "prune": (PruneConfig, SweepOptions),
    "eval": (EvalConfig,),
    "probe": (ProbeConfig,),
}
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
    """Layer preset, `--config` file and the options the user chose into a `PruneConfig`.

    Raises `ConfigError`, also for several values and for what a single run does not depend on: see `grid.sweep_config`.
    """
    layers = layered("prune", chosen, file)
    sparsities = numbers(layers.get("sparsity", usual_sparsity(layers)))
    methods = split_list(listed(layers.get("method"))) or (layers.get("method"),)
    others = {item.name for item, _ in leaves(SweepOptions)} & layers.keys()
    others |= {name for name, values in {"method": methods, "sparsity": sparsities}.items() if len(values) > 1}
    if others:
        raise ConfigError(f"{flag_name(min(others))} is for a sweep or its gates, not for one run", "use sweep_config")
    return run_config({**layers, "method": methods[0], "sparsity": sparsities[0]})


def usual_sparsity(layers: Mapping[str, Any]) -> float:
    """The sparsity of a run that names none: that of its structure, if it fixes one. Raises `ConfigError`."""
    fixed = fixed_sparsity(layers.get("structure") or PruneConfig.structure)
    return PruneConfig.sparsity if fixed is None else fixed


def run_config(layers: Mapping[str, Any]) -> PruneConfig:
    """The configuration of one run from the options that were chosen; None is what was not. Raises `ConfigError`."""
    layers = {name: value for name, value in layers.items() if value is not None}
    preset = layers.get("preset", PruneConfig.preset)
    check_name("preset", preset, PRESETS)
    method = layers.get("method", PRESETS[preset].get("*", {}).get("method", PruneConfig.method))
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
    return in_place_of_sparsity(layers)


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
    options = {name for command in _SECTIONS for name in _options(command)}
    for name, value in top.items():
        if isinstance(value, dict) and name.replace("-", "_") not in options:
            tables = ", ".join(f"[{section}]" for section in _SECTIONS)
            raise ConfigError(
                f"unknown table in {file} [{name}]",
                f"the tables are {tables}; all options, gates included, are plain keys",
            )


def _options(command: str) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """The options of a command with their types, by field name."""
    return {item.name: (item, kind) for cls in _SECTIONS[command] for item, kind in leaves(cls)}


def _read_table(table: Mapping[str, Any], place: str, commands: tuple[str, ...]) -> dict[str, Any]:
    """The options of a table by field name; each must be one of all the `commands`."""
    kinds = {command: _options(command) for command in commands}
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
    if item.metadata.get("several") and not isinstance(value, kind) and _listed(kind, value):
        return str(value) if kind is str and not isinstance(value, list) else value
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


def _listed(kind: type, value: Any) -> bool:
    """Whether a value is a list, or a text with commas, for an option of which there may be several."""
    parts = value if isinstance(value, list) else [value]
    plain = all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in parts)
    return bool(parts) and plain and (isinstance(value, list) or isinstance(value, str) != (kind is str))


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
