"""A sweep as rows of text: one for each configuration, why some do not pass, what failed; and as CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from typing import Any

from capcli.records.parts import LABELS
from capcli.records.swept import Configuration, Spread, Sweep, SweptRun
from capcli.reporting import results
from capcli.reporting.ci import csv_cell, inert_text
from capcli.reporting.headline import compared_with
from capcli.reporting.run_page import MAX_ROWS, Row
from capcli.reporting.text import (
    NOT_MEASURED,
    bound,
    byte_size,
    count,
    counted,
    duration,
    milliseconds,
    named,
    number,
    percent,
    plain,
    significant,
)
from capcli.stored import finite

N_TEXT = 2  # columns of the table that are words
FIGURES = ("weights_bytes", "artifact_bytes", "latency_ms", "minutes")
HINT = (
    "Mean ± standard deviation over the seeds. Retention: of the dense model's metric. Time: of a run by itself, with "
    "its teacher."
)


def runs_of(found: Sweep) -> list[SweptRun]:
    """All runs, in the order of the configurations."""
    return [run for row in found.configurations for run in row.runs]


def columns(found: Sweep) -> tuple[str, ...]:
    """The heads of the table."""
    return ("method", "sparsity", named(found.primary, 40), "retention", "weights", "latency", "time", "outcome")


def rows(found: Sweep) -> list[tuple[str, ...]]:
    """One row for each configuration."""
    return [_row(found, row) for row in found.configurations[:MAX_ROWS]]


def _row(found: Sweep, row: Configuration) -> tuple[str, ...]:
    name = found.primary or ""
    seconds = finite(row.minutes.mean)
    return (
        named(row.method, 40),
        share(row.sparsity),
        plus_minus(row.metrics.get(name, Spread())),
        percent(retention(row, name)),
        byte_size(row.weights_bytes.mean),
        latency(row.latency_ms),
        NOT_MEASURED if seconds is None else duration(60 * seconds),
        outcome(row),
    )


def share(sparsity: float | None) -> str:
    """A sparsity as it was asked for, with all its digits."""
    real = finite(sparsity)
    return NOT_MEASURED if real is None else f"{100 * real:.10g} %"


def plus_minus(value: Spread) -> str:
    """`0.8712 ± 0.0021`, the deviation rounded up; the mean alone of one seed."""
    deviation = finite(value.deviation)
    return number(value.mean) + ("" if deviation is None else f" ± {bound(deviation, up=True)}")


def latency(value: Spread) -> str:
    """`9.31 ± 0.12 ms`."""
    mean, deviation = finite(value.mean), finite(value.deviation)
    if mean is None or deviation is None:
        return milliseconds(mean)
    return f"{significant(mean)} ± {significant(deviation)} ms"


def retention(row: Configuration, name: str) -> float | None:
    """The mean of a metric as a share of that of the dense models, where that is above 0."""
    ours, theirs = (finite(spreads.get(name, Spread()).mean) for spreads in (row.metrics, row.dense))
    return None if ours is None or not theirs or theirs < 0 else ours / theirs


def outcome(row: Configuration) -> str:
    """What came of a configuration, in a few words."""
    counts = Counter(run.status for run in row.runs)
    if counts["failed"]:
        return f"{counts['failed']} of {counted(len(row.runs), 'run')} failed" if len(row.runs) > 1 else "failed"
    if counts["waiting"]:
        return "not finished"
    if row.passed is None:
        return ""
    return "best" if row.best else "passed" if row.passed else "does not pass"


def reasons(found: Sweep) -> list[Row]:
    """Which gates a configuration does not keep to; and what failed, by the name of the run."""
    told = []
    for row in found.configurations[:MAX_ROWS]:
        failed = [results.gate(gate).found for gate in row.gates if not gate.passed]
        if not failed and row.passed is False and all(run.status == "complete" for run in row.runs):
            failed = ["the means pass, but no run passes all gates by itself"]
        told += [(label(row), "; ".join(failed))] if failed else []
    errors = [(named(run.folder), plain(run.error, 400)) for run in runs_of(found) if run.status == "failed"]
    return told + errors[:MAX_ROWS]


def label(row: Configuration) -> str:
    """A configuration in words."""
    return f"{named(row.method, 40)} {share(row.sparsity)}"


def facts(found: Sweep) -> list[Row]:
    """What was run, in reading order."""
    runs = runs_of(found)
    counts = Counter(run.status for run in runs)
    states = ", ".join(f"{n} {'not finished' if state == 'waiting' else state}" for state, n in counts.items())
    seeds = ", ".join(map(str, found.seeds[:20])) + (", …" if len(found.seeds) > 20 else "")
    lines = [
        ("model", named(found.model)),
        ("task", f"{named(found.task)}, {named(found.split, 60)}, {counted(found.n_examples, 'example')}"),
        ("runs", f"{count(len(runs))}: {states}; {'seed' if len(found.seeds) == 1 else 'seeds'} {seeds}"),
        *_reference_rows(found),
    ]
    lines += [("gates", limits(found))] if found.limits else []
    return [*lines, ("best", best(found))] if found.limits else lines


def _reference_rows(found: Sweep) -> list[Row]:
    """The dense model's metric, or what was compared with instead of labels."""
    if said := compared_with(found.reference):
        return [("compared with", said)]
    return [("dense", f"{named(found.primary, 40)} {plus_minus(dense(found))}")]


def dense(found: Sweep) -> Spread:
    """The primary metric of the dense models, of the configuration that has most runs; none where it only agrees with
    itself."""
    complete = [row for row in found.configurations if found.primary in row.dense and found.reference == LABELS]
    most = max(complete, key=lambda row: sum(run.status == "complete" for run in row.runs), default=None)
    return most.dense[found.primary or ""] if most else Spread()


def limits(found: Sweep) -> str:
    """The gates as they were given."""
    shown = {"max_bytes": byte_size, "max_latency_ms": milliseconds, "min_retention": percent, "confidence": percent}
    parts = [
        f"{name.replace('_', ' ')} {shown[name](value) if name in shown else plain(value, 200)}"
        for name, value in found.limits.items()
    ]
    return "; ".join(parts)


def best(found: Sweep) -> str:
    """The run that is linked, with its figures."""
    for run in runs_of(found):
        if run.best:
            metric = f"{named(found.primary, 40)} {number(run.metrics.get(found.primary or ''))}"
            return f"{named(run.folder)}: {metric}, {byte_size(run.weights_bytes)}, {milliseconds(run.latency_ms)}"
    return (
        "not chosen before all runs have ended" if found.status == "incomplete" and not found.passed else "none passes"
    )


# CSV -----------------------------------------------------------------------------------------------------------------


def csv_text(found: Sweep) -> str:
    """Two kinds of rows: `mean` of each configuration, with deviations, and `run` of each run."""
    names = list(dict.fromkeys(name for row in found.configurations for name in row.metrics))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(csv_columns(names))
    for row in found.configurations:
        writer.writerow(_cells(_mean_cells(row, names)))
        for run in row.runs:
            writer.writerow(_cells(_run_cells(row, run, names)))
    return out.getvalue()


def csv_columns(names: list[str]) -> list[str]:
    """The heads: what the row is of, its figures, its outcome; the metrics `names` with those of the dense model."""
    metrics = [f"{inert_text(name)}{part}" for name in names for part in ("", "_deviation", "_dense")]
    figures = [f"{name}{part}" for name in FIGURES for part in ("", "_deviation")]
    return ["kind", "method", "sparsity", "seed", "folder", "status", *metrics, *figures, "passed", "best", "error"]


def _mean_cells(row: Configuration, names: list[str]) -> list[Any]:
    complete = sum(run.status == "complete" for run in row.runs)
    cells: list[Any] = ["mean", row.method, row.sparsity, None, None, f"{complete} of {len(row.runs)} complete"]
    for name in names:
        ours, theirs = row.metrics.get(name, Spread()), row.dense.get(name, Spread())
        cells += [ours.mean, ours.deviation, theirs.mean]
    for name in FIGURES:
        cells += [getattr(row, name).mean, getattr(row, name).deviation]
    return [*cells, row.passed, row.best, None]


def _run_cells(row: Configuration, run: SweptRun, names: list[str]) -> list[Any]:
    cells: list[Any] = ["run", row.method, row.sparsity, run.seed, run.folder, run.status]
    for name in names:
        cells += [run.metrics.get(name), None, run.dense.get(name)]
    for name in FIGURES:
        cells += [getattr(run, name), None]
    return [*cells, run.passed, run.best, run.error]


def _cells(values: list[Any]) -> list[str]:
    return [csv_cell(value) for value in values]
