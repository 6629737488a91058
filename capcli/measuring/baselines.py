"""Comparing with a baseline: a model on the same examples, or a stored result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capcli.config.measure import EvalConfig
from capcli.data.splits import TaskData
from capcli.errors import ConfigError, FileError
from capcli.measuring import noise
from capcli.measuring.noise import Estimate
from capcli.measuring.scoring import Measured, agreed, paired, same_answer
from capcli.models.predictor import Predictor
from capcli.reporting.text import named
from capcli.runtime import choice
from capcli.stored import finite, mapping, part, read_json


def about_data(config: EvalConfig, data: TaskData) -> dict[str, Any]:
    """What was read of the first split, and how far."""
    return {"data": next(iter(data.evals.values())).fingerprint, "max_length": config.source.longest}


def same_place(a: str, b: str) -> bool:
    """Whether two names of data are the same, or lead to the same place."""
    return a == b or (bool(a and b) and Path(a).resolve() == Path(b).resolve())


def load_for(config: EvalConfig, source: str, data: TaskData, runtime: str = "") -> Predictor:
    """A model with a head for the task of the data, its labels renamed as the configuration says."""
    names, hardware = config.source.label_names, config.hardware
    return choice.opened(
        source, runtime, hardware, labels=data.classes, kind=data.kind, seed=config.seed, label_map=names
    )


def rows_of(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
    """Estimates as rows of a result."""
    return {name: one.row() for name, one in estimates.items()}


# The baseline --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What the baseline gives: its row of the result, ours minus and ours by its metrics, how often both agree."""

    baseline: dict[str, Any] | None = None
    differences: dict[str, Estimate] = field(default_factory=dict)
    ratios: dict[str, Estimate] = field(default_factory=dict)
    agreement: Estimate | None = None
    notes: tuple[str, ...] = ()


def with_model(
    config: EvalConfig, data: TaskData, ours: Mapping[str, Measured], theirs: Mapping[str, Measured]
) -> Compared:
    """Compare with a model on the same examples; both by change of the texts, "" for none."""
    differences: dict[str, Estimate] = {}
    ratios: dict[str, Estimate] = {}
    for change, one in ours.items():
        by_name = paired(one, theirs[change])
        differences |= {name + change: value for name, value in by_name[0].items()}
        ratios |= {name + change: value for name, value in by_name[1].items()}
    row = {"model": config.baseline, **theirs[""].table}
    row["perturbed"] = {change[1:]: one.table for change, one in theirs.items() if change}
    same = theirs[""].constant
    return Compared(
        baseline=row,
        differences=differences,
        ratios=ratios,
        agreement=agreed(ours[""], theirs[""]),
        notes=(same_answer("the baseline", next(iter(data.evals)), same),) if same else (),
    )


def with_report(config: EvalConfig, data: TaskData, ours: Mapping[str, Measured]) -> Compared:
    """Compare with a stored result of prune or eval about as many examples; changed texts with changed."""
    stored = mapping(read_json(Path(config.baseline)))
    row = report_row(config, stored, data, ours[""].n_examples)
    theirs = _estimates(row)
    perturbed = {change: _report_table(part(stored, "perturbed", change[1:])) for change in ours if change}
    row["perturbed"] = {change[1:]: table for change, table in perturbed.items() if table["metrics"]}
    theirs |= {name + change: one for change, table in perturbed.items() for name, one in _estimates(table).items()}
    mine = {name + change: one for change, found in ours.items() for name, one in found.estimates().items()}
    both = [name for name in mine if name in theirs]
    exact = [name for name in both if theirs[name].at is None]
    note = f"{config.baseline} has no intervals for {', '.join(exact)}: the values are treated as exact"
    return Compared(
        baseline=row,
        differences={name: noise.difference(mine[name], theirs[name]) for name in both},
        ratios={name: noise.ratio(mine[name], theirs[name]) for name in both if theirs[name].value > 0},
        notes=(note,) if exact else (),
    )


def report_row(config: EvalConfig, stored: Mapping[str, Any], data: TaskData, n_examples: int) -> dict[str, Any]:
    """The row of a stored result. Raises `FileError` or `ConfigError` when it is about something else."""
    path, table = config.baseline, part(stored, "metrics")
    found = _report_table({"metrics": table["pruned"], **table} if "pruned" in table else stored)
    if not found["metrics"]:
        raise FileError(f"{path} contains no metrics", "--baseline takes a model, or a report of cap prune or cap eval")
    if stored.get("task") not in (None, data.name):
        raise ConfigError(f"{path} is about task {stored['task']}, not {data.name}")
    theirs = {name: table.get(name, stored.get(name)) for name in ("n_examples", "split", *noise.DATA)}
    ours = {"n_examples": n_examples, "split": next(iter(data.evals)), **about_data(config, data)}
    if what := noise.differing(theirs, ours, [name for name in ours if theirs[name] is not None]):
        raise ConfigError(
            f"{path} and {config.model} differ in {what}: {named(theirs[what])} and {ours[what]}",
            "compare on the same examples, with the same --data, --max-length and --max-eval-samples",
        )
    return {"model": path, **found}


def _report_table(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that a stored result holds, and their intervals."""
    values = {name: value for name, one in part(stored, "metrics").items() if (value := finite(one)) is not None}
    ends = part(stored, "confidence_95")
    return {
        "metrics": values,
        "confidence_95": {name: list(ends[name]) for name in values if _is_interval(ends.get(name))},
    }


def _is_interval(ends: Any) -> bool:
    return isinstance(ends, list) and len(ends) == 2 and None not in map(finite, ends)


def _estimates(table: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: noise.stored(value, table["confidence_95"].get(name)) for name, value in table["metrics"].items()}
