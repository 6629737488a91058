"""`--compare`: what moved between two stored results, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capcli.config.measure import Gates
from capcli.config.paths import shortened
from capcli.errors import ConfigError, FileError
from capcli.measuring import metrics
from capcli.measuring.gates import Evidence, check, require
from capcli.measuring.noise import (
    EVALUATED_ON,
    MEASURED_ON,
    Estimate,
    difference,
    differing,
    mean_bounds,
    ratio,
    stored,
)
from capcli.reporting.text import named
from capcli.stored import finite, mapping, part, read_json

SCHEMA_VERSION = 1
LEVEL = 0.95
SETTINGS = ("probe", "layer", "pooling")  # of a probe: with others, the scores are about something else
CONDITIONS = ("batch", "length", "runtime", "threads", "device", "hardware", "precision")  # of a latency

Table = dict[str, Any]
Estimates = dict[str, Estimate]


def compare(command: str, old: str, new: str, gates: Gates) -> Table:
    """Compare two files with the JSON of `cap eval` or `cap probe`, whichever `command` is.

    Returns schema_version, kind, old and new (the files), task, split and n_examples (of eval); `rows` (metrics, or
    tasks of a probe) and `latency` of {name, old, new, old_confidence_95, new_confidence_95, change, interval, moved};
    `sizes` of {name, old, new, change}; notes, gates, passed. Metrics of changed texts and of further splits are called
    METRIC@NAME. `moved` says whether 0 lies outside the 95 % interval of the change; it and the interval are None where
    the noise is not known.

    Raises `FileError` for a file without such a result, `ConfigError` for results that do not compare.
    """
    before, after = _read(command, old), _read(command, new)
    notes: list[str] = []
    if command == "eval":
        _same(before, after, EVALUATED_ON, old, new)
        theirs, ours = _eval_estimates(before), _eval_estimates(after)
        shared = [name for name in ours if name in theirs]
        alone = sorted(set(ours) ^ set(theirs))
    else:
        _same(before, after, SETTINGS, old, new)
        theirs, ours = _probe_estimates(before), _probe_estimates(after)
        shared, alone = _common_tasks(before, after)
        if not shared:
            raise ConfigError(
                f"{old} and {new} have no task in common that was measured in the same way: {_reason(before, after)}",
                "probe the same tasks, with the same examples and options",
            )
        shared += ["mean"] * (not alone and "mean" in ours and "mean" in theirs)
    known = _bounds(command, before) | _bounds(command, after)
    require(gates, known, known)
    if alone:
        notes.append(
            "not compared, because missing from one result or measured differently: "
            + ", ".join(named(n) for n in alone)
        )
    pairs = {name: (theirs[name], ours[name]) for name in shared}
    latency = _latency(part(before, "latency"), part(after, "latency"), notes)
    result: Table = {
        "schema_version": SCHEMA_VERSION,
        "kind": command,
        "old": shortened(old),
        "new": shortened(new),
        **({name: after.get(name) for name in ("task", "split", "n_examples")} if command == "eval" else {}),
        "rows": [_moved(name, *pair) for name, pair in pairs.items()],
        "sizes": _exact(_sizes(before), _sizes(after)),
        "latency": latency,
        "notes": notes,
    }
    found = Evidence(
        primary=str(after.get("primary")) if command == "eval" else "mean",
        metrics=ours,
        baseline={name: old.value for name, (old, _) in pairs.items()},
        differences={name: difference(*_known(*pair)) for name, pair in pairs.items()},
        ratios={name: ratio(*_known(*pair)) for name, pair in pairs.items() if pair[0].value > 0},
        weights_bytes=finite(part(after, "size").get("weights_bytes")),
        latency_ms=_median(part(after, "latency")),
    )
    result["gates"] = check(gates, found)
    result["passed"] = all(gate["passed"] for gate in result["gates"])
    return result


def _read(command: str, path: str) -> Mapping[str, Any]:
    """The result in a file, if it is one of the command."""
    data = mapping(read_json(Path(path)))
    of_eval = part(data, "metrics") and isinstance(data.get("confidence_95"), dict)
    kind = "probe" if part(data, "tasks") else "eval" if of_eval else ""
    if not kind:
        raise FileError(
            f"{path} contains no result of cap {command}", f"--compare takes files written by cap {command} --json"
        )
    if kind != command:
        raise FileError(f"{path} is a result of cap {kind}, not of cap {command}", f"use cap {kind} --compare")
    if (version := data.get("schema_version")) != SCHEMA_VERSION:
        raise FileError(f"{path} has schema_version {version}, this cap reads {SCHEMA_VERSION}", "measure it again")
    return data


def _bounds(command: str, result: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """What the metrics of a result, or the scores of its tasks and their mean, can be."""
    if command == "eval":
        return {name: metrics.bounds(name.partition("@")[0]) for name in _eval_estimates(result)}
    rows = part(result, "tasks")
    found = {name: metrics.bounds(str(mapping(row).get("metric"))) for name, row in rows.items()}
    return found | {"mean": mean_bounds(found.values())}


def _same(before: Mapping[str, Any], after: Mapping[str, Any], names: tuple[str, ...], old: str, new: str) -> None:
    if name := differing(before, after, names):
        raise ConfigError(
            f"{old} and {new} differ in {name}: {named(before.get(name))} and {named(after.get(name))}",
            "compare results that were measured in the same way",
        )


def _eval_estimates(result: Mapping[str, Any]) -> Estimates:
    """The metrics of the first split, then those of its changed texts and of the other splits as METRIC@NAME."""
    found = _estimates(result)
    others = {n: table for n, table in part(result, "splits").items() if n != result.get("split")}
    for name, table in {**part(result, "perturbed"), **others}.items():
        found |= {f"{metric}@{name}": one for metric, one in _estimates(mapping(table)).items()}
    return found


def _estimates(table: Mapping[str, Any]) -> Estimates:
    ends = part(table, "confidence_95")
    return {name: stored(value, ends.get(name)) for name, value in part(table, "metrics").items()}


def _probe_estimates(result: Mapping[str, Any]) -> Estimates:
    """The mean over the seeds of each task, and `mean`, that over the tasks, if it was stored."""
    rows = {name: mapping(row) for name, row in part(result, "tasks").items()}
    found = {name: stored(row.get("mean"), row.get("confidence_95")) for name, row in rows.items()}
    mean = part(result, "mean")
    return found | ({"mean": stored(mean.get("value"), mean.get("confidence_95"))} if mean else {})


def _common_tasks(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The tasks that both have and measured alike, and the others."""
    theirs, ours = part(before, "tasks"), part(after, "tasks")

    def alike(name: str) -> bool:
        a, b = mapping(theirs.get(name)), mapping(ours.get(name))
        return bool(a and b) and not differing(a, b, MEASURED_ON)

    names = list({**theirs, **ours})
    return [name for name in names if alike(name)], [name for name in names if not alike(name)]


def _reason(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Why no task of two probes compares: how the first that both have differs, or which tasks there are."""
    theirs, ours = part(before, "tasks"), part(after, "tasks")
    for task in ours:
        a, b = mapping(theirs.get(task)), mapping(ours[task])
        if a and b and (name := differing(a, b, MEASURED_ON)):
            return f"the {name} of {named(task, 60)} is {named(a.get(name))}, now {named(b.get(name))}"
    return " and ".join(", ".join(named(task, 60) for task in list(tasks)[:20]) for tasks in (theirs, ours))


def _known(old: Estimate, new: Estimate) -> tuple[Estimate, Estimate]:
    """New and old, both with their noise or both without: that of one alone would claim that the other is exact."""
    return (new, old) if old.at and new.at else (Estimate(new.value), Estimate(old.value))


def _moved(name: str, old: Estimate, new: Estimate) -> Table:
    change = difference(*_known(old, new))
    interval = change.interval(LEVEL)
    moved = None
    if interval:
        moved = not interval[0] <= 0 <= interval[1]
    elif change.value == 0:
        moved = False
    return {
        "name": name,
        "old": finite(old.value),
        "new": finite(new.value),
        "old_confidence_95": old.interval(LEVEL),
        "new_confidence_95": new.interval(LEVEL),
        "change": finite(change.value),
        "interval": interval,
        "moved": moved,
    }


def _sizes(result: Mapping[str, Any]) -> Table:
    """What is counted, not estimated."""
    sparsity = part(result, "sparsity")
    shares = {"sparsity": sparsity.get("achieved"), "whole_model_sparsity": sparsity.get("whole_model")}
    return {**part(result, "size"), **shares}


def _exact(before: Table, after: Table) -> list[Table]:
    """The numbers that both have."""
    pairs = {name: (before.get(name), value) for name, value in after.items()}
    return [
        {"name": name, "old": old, "new": new, "change": new - old}
        for name, (old, new) in pairs.items()
        if finite(old) is not None and finite(new) is not None
    ]


def _median(latency: Mapping[str, Any]) -> Estimate | None:
    return stored(latency.get("median_ms"), latency.get("confidence_95")) if latency else None


def _latency(before: Mapping[str, Any], after: Mapping[str, Any], notes: list[str]) -> list[Table]:
    """The medians, if both were measured; under other conditions, whether they moved is not known."""
    old, new = _median(before), _median(after)
    if old is None or new is None or not (math.isfinite(old.value) and math.isfinite(new.value)):
        return []
    row = _moved("median_ms", old, new)
    other = [name for name in CONDITIONS if before.get(name) != after.get(name)]
    if other:
        told = [f"{name} {named(before.get(name), 60)}, now {named(after.get(name), 60)}" for name in other]
        notes.append("latency was measured under other conditions: " + "; ".join(told))
        row |= {"interval": None, "moved": None}
    return [row]
