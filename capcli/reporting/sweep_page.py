"""What the page of a sweep shows: the best run, the metric against size and latency, the table, every run."""

from __future__ import annotations

import re
from typing import Any

from capcli.records.parts import LABELS
from capcli.records.swept import Configuration, Spread, Sweep, SweptRun
from capcli.reporting import sweeps
from capcli.reporting.run_page import MAX_ROWS
from capcli.reporting.scatter import Point, Scatter, scatter
from capcli.reporting.text import byte_size, count, duration, milliseconds, named, number, plain
from capcli.stored import finite

FOLDER = re.compile(r"[\w][\w.+-]{0,120}", re.ASCII)  # what is linked: a folder beside the page


def sweep_view(found: Sweep) -> dict[str, Any]:
    """Everything the template shows, as text and coordinates."""
    return {
        "title": f"{named(found.model, 120)} on {named(found.task, 60)}: sweep",
        "lead": _lead(found),
        "tiles": _tiles(found),
        "charts": [chart for chart in (_by_size(found), _by_latency(found)) if chart],
        "judged": bool(found.limits),
        "columns": sweeps.columns(found),
        "rows": list(zip(sweeps.rows(found), found.configurations, strict=False)),
        "n_text": sweeps.N_TEXT,
        "hint": sweeps.HINT,
        "reasons": sweeps.reasons(found),
        "primary": named(found.primary, 40),
        "runs": [_run_row(found, run) for run in sweeps.runs_of(found)[:MAX_ROWS]],
        "facts": sweeps.facts(found),
        "device": named(found.device),
        "command": plain(found.command or "", 8000),
        "notes": [plain(note, 400) for note in found.notes[:MAX_ROWS]],
    }


def _lead(found: Sweep) -> str:
    if not found.limits:
        return "No gate was set, so no run is marked."
    if found.best:
        return "The smallest configuration that passes all gates is marked; the link best leads to its run."
    return "No configuration passes all gates." if found.status == "complete" else "Some runs have no result."


def _tiles(found: Sweep) -> list[tuple[str, str, str]]:
    """The figures of the best run; without one, how many runs there are."""
    runs = sweeps.runs_of(found)
    n_complete = sum(run.status == "complete" for run in runs)
    all_of_them = ("runs", f"{count(n_complete)} of {count(len(runs))}", "complete")
    chosen = next((row for row in found.configurations if row.best), None)
    if chosen is None:
        return [all_of_them]
    run = next(run for run in chosen.runs if run.best)
    name = found.primary or ""
    beside = f"dense {number(run.dense.get(name))}" if found.reference == LABELS else "not accuracy"
    return [
        ("best", sweeps.label(chosen), named(run.folder, 80)),
        (named(name, 60), number(run.metrics.get(name)), beside),
        ("weights", byte_size(run.weights_bytes), "on disk"),
        ("latency", milliseconds(run.latency_ms), "median"),
        all_of_them,
    ]


def _by_size(found: Sweep) -> Scatter | None:
    sizes = [finite(row.weights_bytes.mean) for row in found.configurations[:MAX_ROWS]]
    unit, scale = ("MB", 1e6) if max((size or 0 for size in sizes), default=0) >= 1e6 else ("kB", 1e3)

    def scaled(value: float | None) -> float | None:
        return None if value is None else value / scale

    rows = zip(found.configurations, sizes, strict=False)
    points = [_point(found, row, scaled(size)) for row, size in rows]
    limit, name = scaled(finite(found.limits.get("max_bytes"))), named(found.primary, 40)
    return scatter(
        f"{name} and size", f"weight file, {unit}", name, points, level=sweeps.dense(found).mean, limit=limit
    )


def _by_latency(found: Sweep) -> Scatter | None:
    points = [_point(found, row, row.latency_ms.mean) for row in found.configurations[:MAX_ROWS]]
    limit, name = finite(found.limits.get("max_latency_ms")), named(found.primary, 40)
    label = "latency of one input, ms"
    return scatter(f"{name} and latency", label, name, points, level=sweeps.dense(found).mean, limit=limit)


def _point(found: Sweep, row: Configuration, x: float | None) -> Point:
    """A configuration in a chart, with the lines that name it."""
    value, outcome = row.metrics.get(found.primary or "", Spread()), sweeps.outcome(row)
    return Point(
        series=named(row.method, 40),
        x=x,
        y=value.mean,
        deviation=finite(value.deviation),
        filled=row.passed is not False,
        ringed=row.best,
        tip=(
            sweeps.label(row) + (f": {outcome}" if outcome else ""),
            f"{sweeps.plus_minus(value)}, {byte_size(row.weights_bytes.mean)}, {sweeps.latency(row.latency_ms)}",
        ),
    )


def _run_row(found: Sweep, run: SweptRun) -> dict[str, Any]:
    """One run, with the page that its folder has."""
    minutes = finite(run.minutes)
    complete = run.status == "complete"
    return {
        "folder": named(run.folder),
        "link": f"{run.folder}/report.html" if complete and FOLDER.fullmatch(run.folder) else "",
        "cells": (
            number(run.metrics.get(found.primary or "")),
            byte_size(run.weights_bytes),
            milliseconds(run.latency_ms),
            duration(None if minutes is None else 60 * minutes),
        ),
        "outcome": "best"
        if run.best
        else run.status
        if run.passed is None
        else "passed"
        if run.passed
        else "does not pass",
        "passed": run.passed,
    }
