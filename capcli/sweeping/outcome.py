"""What the runs of a sweep come to: a row for each configuration, and the smallest that keeps to the gates."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from capcli.config.measure import Gates
from capcli.config.paths import command_line, portable
from capcli.config.sweep import Cell, SweepConfig
from capcli.measuring import reports
from capcli.records.pruned import Report
from capcli.records.swept import Configuration, Spread, Spreads, Sweep, SweptRun
from capcli.reporting.text import counted, first_few
from capcli.stored import finite
from capcli.sweeping.jobs import Failure


def outcome(config: SweepConfig, found: Mapping[str, Report], failed: Mapping[str, Failure]) -> Sweep:
    """The result as far as there are reports, by the name of the run; `best` is chosen once none is waiting."""
    rows = [_configuration(cells, config.gates, found, failed) for cells in config.configurations.values()]
    ended = all(run.status != "waiting" for row in rows for run in row.runs)
    chosen = _best(rows) if ended and reports.any_set(config.gates) else None
    marked = tuple(_marked(row, chosen) for row in rows)
    complete = all(run.status == "complete" for row in rows for run in row.runs)
    first = next(iter(found.values()), Report())
    result = Sweep(
        status="complete" if complete else "incomplete",
        model=config.run.model,
        task=config.run.source.task,
        split=first.metrics.split,
        reference=first.metrics.reference,
        primary=first.metrics.primary,
        n_examples=first.metrics.n_examples,
        seeds=tuple(dict.fromkeys(cell.run.seed for cell in config.cells)),
        command=command_line(sys.argv[1:]),
        config=config.shared(),
        versions=first.versions,
        device=first.device,
        limits=reports.limits(config.gates),
        configurations=marked,
        best=chosen,
        notes=tuple(_common(found.values())),
        passed=bool(chosen) or not reports.any_set(config.gates),
    )
    return portable(result, config.run)


def _configuration(
    cells: Sequence[Cell], gates: Gates, found: Mapping[str, Report], failed: Mapping[str, Failure]
) -> Configuration:
    """The row of the runs that differ in the seed alone."""
    runs = tuple(_run(cell, gates, found.get(cell.name), failed.get(cell.name)) for cell in cells)
    done = [found[cell.name] for cell in cells if cell.name in found]
    row = Configuration(method=cells[0].run.method, sparsity=cells[0].run.sparsity, runs=runs)
    if not done:
        return replace(row, passed=False if reports.any_set(gates) else None)
    complete = [run for run in runs if run.status == "complete"]
    held = reports.check(gates, done)
    passed = len(done) == len(cells) and all(gate.passed for gate in held) and any(run.passed for run in runs)
    return replace(
        row,
        metrics=_spreads([report.metrics.pruned for report in done]),
        dense=_spreads([report.metrics.dense for report in done]),
        weights_bytes=spread([run.weights_bytes for run in complete]),
        artifact_bytes=spread([run.artifact_bytes for run in complete]),
        latency_ms=spread([run.latency_ms for run in complete]),
        minutes=spread([run.minutes for run in complete]),
        gates=held,
        passed=passed if reports.any_set(gates) else None,
    )


def _run(cell: Cell, gates: Gates, report: Report | None, failure: Failure | None) -> SweptRun:
    """One run: what its report says, or why there is none."""
    row = SweptRun(folder=cell.name, seed=cell.run.seed)
    if report is None:
        if failure is None:
            return row
        return replace(row, status="failed", error=failure.message, hint=failure.hint, exit_code=failure.code)
    total = finite(report.timing.total_seconds)
    return replace(
        row,
        status="complete",
        metrics=report.metrics.pruned,
        dense=report.metrics.dense,
        held_out=_held_out(report),
        weights_bytes=report.size.weights_bytes,
        artifact_bytes=report.size.artifact_bytes,
        latency_ms=report.latency.pruned.median_ms if report.latency else None,
        minutes=None if total is None else total / 60,
        passed=reports.judged(report, gates).passed,
    )


def _held_out(report: Report) -> float | None:
    """The primary metric of the epoch that was kept, on the examples that were held out to choose it."""
    if not report.curve.held_out:
        return None
    rows = [row for row in report.history if row.phase == "prune" and row.sparsity == report.sparsity.requested]
    values = [finite(row.metrics.get(report.metrics.primary or "")) for row in rows]
    return max((value for value in values if value is not None), default=None)


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and deviation of what all runs have; neither where one has none."""
    known = [value for value in map(finite, values) if value is not None]
    if not known or len(known) < len(values):
        return Spread()
    return Spread(mean=statistics.fmean(known), deviation=statistics.stdev(known) if len(known) > 1 else None)


def _spreads(rows: Sequence[Mapping[str, float]]) -> Spreads:
    """The same of each metric that all have."""
    return {name: spread([row[name] for row in rows]) for name in rows[0] if all(name in row for row in rows)}


# The best ------------------------------------------------------------------------------------------------------------


def _best(rows: Sequence[Configuration]) -> str | None:
    """The run to be linked: one that passes by itself, of the smallest configuration that passes.

    Of several the one with the best metric on what was held out; without a hold-out the first, for the evaluation split
    is not to choose among them.
    """
    passing = [row for row in rows if row.passed]
    if not passing:
        return None
    smallest = min(passing, key=lambda row: _or(row.weights_bytes.mean, math.inf))
    runs = [run for run in smallest.runs if run.passed]
    return max(runs, key=lambda run: _or(run.held_out, -math.inf)).folder


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _marked(row: Configuration, best: str | None) -> Configuration:
    """The row with a mark where it, and one of its runs, is the best."""
    runs = tuple(replace(run, best=run.folder == best) for run in row.runs)
    return replace(row, runs=runs, best=any(run.best for run in runs))


# Notes ---------------------------------------------------------------------------------------------------------------


def _common(found: Iterable[Report]) -> list[str]:
    """The notes of the runs, each with how many have it, where not all do."""
    counts: dict[str, int] = {}
    n_runs = 0
    for report in found:
        n_runs += 1
        for note in dict.fromkeys(report.notes):
            counts[note] = counts.get(note, 0) + 1
    return [note if n == n_runs else f"{note} ({counted(n, 'run')})" for note, n in counts.items()]


def failures(found: Sweep) -> tuple[str, str]:
    """Which runs failed, and why the first did, as a message and a hint; nothing where none did."""
    failed = [run for row in found.configurations for run in row.runs if run.status == "failed"]
    if not failed:
        return "", ""
    n_runs = sum(len(row.runs) for row in found.configurations)
    names = first_few([run.folder for run in failed], 3)
    hint = f"{failed[0].hint}; then run the same command again" if failed[0].hint else "run the same command again"
    return f"{len(failed)} of {n_runs} runs failed: {names}: {failed[0].error}", hint
