"""Reports of runs held against gates: one, or the mean of several that differ in the seed. The baseline is the dense
model of each run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from capcli.config.measure import Gates
from capcli.measuring import gates as gates_
from capcli.measuring import metrics, noise
from capcli.measuring.gates import Evidence
from capcli.measuring.noise import Estimate
from capcli.records.parts import Gate
from capcli.records.pruned import Report


def limits(gates: Gates) -> dict[str, Any]:
    """The gates that were set, by name."""
    return {one.name: value for one in fields(gates) if (value := getattr(gates, one.name)) != one.default}


def any_set(gates: Gates) -> bool:
    """Whether there is a condition; `confidence` alone is none."""
    return bool(limits(gates).keys() - {"confidence"})


def require(gates: Gates, names: Iterable[str]) -> None:
    """Raise `ConfigError` for a gate on what a run does not measure, or whose limit says nothing: `gates.require`."""
    bounds = {name: metrics.bounds(name) for name in names}
    gates_.require(gates, bounds, bounds)


def summary(report: Report) -> dict[str, float]:
    """The figures of a run that tell it from others, by name."""
    metrics = {"dense": report.metrics.dense, "pruned": report.metrics.pruned}
    found = {f"result/{who}/{name}": value for who, values in metrics.items() for name, value in values.items()}
    figures = {
        "sparsity": report.sparsity.achieved,
        "artifact_bytes": report.size.artifact_bytes,
        "seconds": report.timing.total_seconds,
    }
    return found | {f"result/{name}": float(value) for name, value in figures.items() if value is not None}


def judged(report: Report, gates: Gates) -> Report:
    """The report with the gates held against it; as it is without any."""
    if not any_set(gates):
        return report
    rows = check(gates, [report])
    return replace(report, gates=rows, passed=all(row.passed for row in rows))


def check(gates: Gates, reports: Sequence[Report]) -> tuple[Gate, ...]:
    """One row per gate, held against the mean of the reports."""
    return gates_.check(gates, _evidence(reports))


def _evidence(reports: Sequence[Report]) -> Evidence:
    """Means over the runs. Their intervals are those of the examples, which all runs share, and of the seeds nothing;
    those of the dense model are not known, and it counts as exact."""
    scores = [report.metrics for report in reports]
    ours, theirs = {}, {}
    for name in scores[0].pruned:
        if all(name in one.pruned for one in scores):
            ours[name] = mean([noise.stored(one.pruned[name], one.confidence_95.get(name)) for one in scores])
        if all(name in one.dense for one in scores):
            theirs[name] = statistics.fmean(one.dense[name] for one in scores)
    both = [name for name in ours if name in theirs]
    times = [report.latency.pruned if report.latency else None for report in reports]
    sizes = [report.size.weights_bytes for report in reports]
    return Evidence(
        primary=scores[0].primary or "",
        metrics=ours,
        baseline=theirs,
        differences={name: noise.difference(ours[name], Estimate(theirs[name])) for name in both},
        ratios={name: noise.ratio(ours[name], Estimate(theirs[name])) for name in both if theirs[name] > 0},
        weights_bytes=None if None in sizes else statistics.fmean(size or 0 for size in sizes),
        latency_ms=mean([noise.stored(one and one.median_ms, one and one.confidence_95) for one in times]),
    )


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of values that were measured on the same examples: its interval is the mean of theirs, which is too wide
    where their noise is not the same."""
    value = statistics.fmean(one.value for one in estimates)
    if not all(one.at for one in estimates):
        return Estimate(value)

    def at(level: float) -> list[float]:
        ends = [one.interval(level) or [math.nan, math.nan] for one in estimates]
        return [statistics.fmean(pair) for pair in zip(*ends, strict=True)]

    return Estimate(value, at)
