"""What the documents of a pruning run show: `report.json` as text and coordinates, and the templates that lay it out.

`view` is the whole page as data; `template` makes sure that nothing in it can act.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from capcli.records.parts import LABELS, Sparsity
from capcli.records.pruned import HistoryRow, Metrics, Report, Size, SplitMetrics
from capcli.reporting import heat_map, latency
from capcli.reporting.charts import Chart, Points, drawable, line_chart
from capcli.reporting.headline import Headline, compared_with, headline
from capcli.reporting.text import (
    NO_VALUE,
    NOT_MEASURED,
    byte_size,
    count,
    dense_sizes,
    duration,
    interval,
    markdown,
    named,
    number,
    percent,
    plain,
    significant,
    times_smaller_than,
)
from capcli.stored import finite, sequence

if TYPE_CHECKING:
    from jinja2 import Template

MAX_ROWS = 500  # of any table, so that a hostile report cannot make an endless page
MAX_PHASES = 4
AS_GOOD = "as good"  # instead of a retention above 100 %
SIZES = {
    "dense": "Dense model",
    "artifact": "Model, all files",
    "weights": "Weight file",
    "bound": "Information bound",
}

T = TypeVar("T")
Row = tuple[str, str]


@functools.cache
def template(name: str) -> Template:
    """A template in which every value is made inert on its way out, by the rules of the language it writes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    html = name.endswith(".html.j2")
    inert = functools.partial(plain if html else markdown, limit=400)
    environment = Environment(
        loader=PackageLoader("capcli.reporting", "templates"),
        autoescape=html,
        finalize=lambda value: value if hasattr(value, "__html__") else inert(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(shortened=plain, escaped=lambda text: Markup(escape(text)))
    return environment.get_template(name)


@dataclass(frozen=True)
class MetricRow:
    """One metric before and after, as text; `strip` holds its numbers for drawing."""

    name: str
    dense: str
    pruned: str
    chance: str
    interval: str
    retention: str
    difference: str
    strip: Mapping[str, float]


def _metric_names(metrics: Metrics | SplitMetrics, primary_name: str | None) -> list[str]:
    """Names of all metrics, the primary one first."""
    known = [*metrics.pruned, *metrics.dense]
    primary = [name for name in known if name == primary_name]
    return list(dict.fromkeys([*primary, *known]))[:MAX_ROWS]


def metric_rows(metrics: Metrics) -> list[MetricRow]:
    """One row per metric of the primary split, then those of the other splits, which are named."""
    labelled = metrics.reference == LABELS
    rows = [_metric_row(metrics, name, labelled=labelled) for name in _metric_names(metrics, metrics.primary)]
    for split, found in other_splits(metrics.splits, metrics.split):
        names = _metric_names(found, metrics.primary)
        rows += [_metric_row(found, name, f" ({named(split, 60)})", labelled=labelled) for name in names]
    return rows[:MAX_ROWS]


def other_splits(splits: Mapping[str, T], first: str | None) -> list[tuple[str, T]]:
    """The evaluation splits beside the first one, by name."""
    return [(name, found) for name, found in splits.items() if name != first][:MAX_ROWS]


def _metric_row(metrics: Metrics | SplitMetrics, name: str, suffix: str = "", *, labelled: bool = True) -> MetricRow:
    """Without labels nothing is said of the dense model, which agrees with itself."""
    dense, pruned = metrics.dense.get(name), metrics.pruned.get(name)
    bounds = metrics.confidence_95.get(name)
    before, after = finite(dense), finite(pruned)
    change = None if before is None or after is None else after - before
    difference = ("+" if change and change > 0 else "") + number(change)
    strip = _strip(before, after, [finite(bound) for bound in sequence(bounds)])
    return MetricRow(
        name=named(name, 60) + suffix,
        dense=number(dense) if labelled else NO_VALUE,
        pruned=number(pruned),
        chance=number(metrics.chance[name]) if name in metrics.chance else NO_VALUE,
        interval=interval(bounds),
        retention=_retention(metrics, name) if labelled else NO_VALUE,
        difference=difference if labelled else NO_VALUE,
        strip=strip if labelled else {},
    )


def _retention(metrics: Metrics | SplitMetrics, name: str) -> str:
    """The share that is kept; none of a dense model that only guesses, and never more than all of it."""
    if name in metrics.at_chance.dense:
        return NO_VALUE
    share = finite(metrics.retention.get(name))
    return AS_GOOD if share is not None and share > 1 else percent(share)


def _strip(dense: float | None, pruned: float | None, bounds: list[float | None]) -> Mapping[str, float]:
    """Places, in percent of the width, of both values and the interval in a small drawing; empty if one is missing."""
    values = [dense, pruned, *bounds]
    known = [value for value in values if value is not None and abs(value) < 1e100]
    if len(known) != 4:
        return {}
    low, high = min(known), max(known)
    places = [6 + 88 * (value - low) / (high - low) if high > low else 50.0 for value in known]
    return dict(zip(("dense", "pruned", "low", "high"), (round(place, 1) for place in places), strict=True))


def view(report: Report) -> dict[str, Any]:
    """Everything a template shows, as text and coordinates."""
    metrics, sparsity, size = report.metrics, report.sparsity, report.size
    rows, names = metric_rows(metrics), _metric_names(metrics, metrics.primary)
    said = headline(metrics, names[0]) if names else Headline()
    return {
        **{key: named(getattr(report, key), 120) for key in ("model", "task", "method", "status", "device", "seed")},
        "title": _title(report),
        "command": plain(report.command or "", 8000),
        "primary": rows[0] if rows else None,
        "achieved": percent(sparsity.achieved),
        "headline": said,
        "compared_with": compared_with(metrics.reference),
        "tiles": _tiles(report, rows, said),
        "metrics": rows,
        "n_examples": count(metrics.n_examples),
        "split": named(metrics.split, 60),
        "sparsity": _sparsity_rows(sparsity),
        "scale": heat_map.gradient(),
        "heat": heat_map.heat_map(sparsity.per_matrix),
        "matrices": _matrix_rows(sparsity),
        "errors": has_errors(sparsity),
        "sizes": _size_rows(size),
        "codings": _pairs(size.codings),
        "latency": latency.side_by_side(report),
        "phases": _phases(report),
        "costs": _cost_rows(report),
        "setup": _setup_rows(report),
        "versions": _pairs(report.versions),
        "config": _pairs(report.config),
        "files": _file_rows(report),
        "notes": [plain(note, 400) for note in report.notes[:MAX_ROWS]],
        "labels": [named(label, 60) for label in report.labels[:MAX_ROWS]],
    }


def _title(report: Report) -> str:
    model, task = report.model, report.task
    known = model is not None and task is not None
    return f"{named(model, 120)}, pruned for {named(task, 60)}" if known else "Pruning report"


def _tiles(report: Report, rows: Sequence[MetricRow], said: Headline) -> list[tuple[str, str, str]]:
    """The key figures as (label, figure, what to compare it with)."""
    sparsity, size = report.sparsity, report.size
    first = rows[0] if rows else None
    name = first.name if first else "metric"
    kept = "" if sparsity.kept_weights is None else f"{count(sparsity.kept_weights)} kept, "
    return [
        ("sparsity", percent(sparsity.achieved), f"{kept}requested {percent(sparsity.requested)}"),
        (name, first.pruned if first else NOT_MEASURED, _beside(first, report.metrics.reference)),
        *([_kept_tile(first, name, said)] if report.metrics.reference == LABELS else []),
        (
            "pruned size",
            byte_size(size.artifact_bytes),
            ", ".join(times_smaller_than(size)) or f"dense {dense_sizes(size)}",
        ),
        ("whole model", percent(sparsity.whole_model), "of all weights removed"),
        ("time", duration(report.timing.total_seconds), named(report.device, 60)),
    ]


def _beside(first: MetricRow | None, reference: str) -> str:
    """What the metric of the pruned model is to be compared with."""
    if first is None:
        return f"dense {NOT_MEASURED}"
    if reference != LABELS:
        return f"with the {named(reference, 20)}, chance {first.chance}"
    return f"dense {first.dense}" + (f", chance {first.chance}" if first.chance != NO_VALUE else "")


def _kept_tile(first: MetricRow | None, name: str, said: Headline) -> tuple[str, str, str]:
    """The share that is kept or, where that says nothing, the difference."""
    if first and said.said and first.difference != NOT_MEASURED:
        return "difference", first.difference, f"from the dense model's {name}"
    return "retention", said.kept or NOT_MEASURED, f"of the dense model's {name}"


def _sparsity_rows(sparsity: Sparsity) -> list[Row]:
    return [
        ("requested", percent(sparsity.requested)),
        ("achieved, prunable weights", percent(sparsity.achieved)),
        ("whole encoder", percent(sparsity.encoder)),
        ("whole model", percent(sparsity.whole_model)),
        ("prunable weights", count(sparsity.prunable_weights)),
        ("kept weights", count(sparsity.kept_weights)),
        ("smallest share that a matrix keeps", percent(sparsity.least_kept)),
    ]


def _matrix_rows(sparsity: Sparsity) -> list[tuple[str, ...]]:
    rows = sparsity.per_matrix[:MAX_ROWS]
    shapes = [" x ".join(map(count, row.shape[:5])) for row in rows]
    return [
        (
            named(row.name, 160),
            shape or NOT_MEASURED,
            count(row.kept),
            percent(row.sparsity),
            *([percent(row.output_error)] if has_errors(sparsity) else []),
        )
        for row, shape in zip(rows, shapes, strict=True)
    ]


def has_errors(sparsity: Sparsity) -> bool:
    """Whether it was measured what is lost of the outputs of a matrix."""
    return any(row.output_error is not None for row in sparsity.per_matrix)


def _size_rows(size: Size) -> list[dict[str, Any]]:
    """Sizes with the share of the largest one, in percent, as the length of a bar."""
    known = {key: finite(getattr(size, f"{key}_bytes")) for key in SIZES}
    largest = max((value for value in known.values() if value), default=0.0)
    return [
        {
            "label": SIZES[key],
            "size": byte_size(value),
            "exact": count(value),
            "share": None if not largest or value is None else round(max(0.0, 100 * value / largest), 2),
        }
        for key, value in known.items()
    ]


def _cost_rows(report: Report) -> list[Row]:
    timing, memory = report.timing, report.memory
    speed = finite(timing.examples_per_second)
    return [
        *((phase, duration(getattr(timing, f"{phase}_seconds"))) for phase in ("teacher", "banks", "prune", "total")),
        ("speed", NOT_MEASURED if speed is None else f"{significant(speed)} examples per second"),
        ("peak memory, host", byte_size(memory.peak_host_bytes)),
        ("peak memory, device", byte_size(memory.peak_device_bytes)),
    ]


def _setup_rows(report: Report) -> list[Row]:
    listed = ", ".join(named(loss, 40) for loss in report.losses[:20]) or named(None)
    scores = ", ".join(f"{named(n, 60)} {number(value)}" for n, value in list(report.teacher.metrics.items())[:20])
    rows = [(key, named(getattr(report, key))) for key in ("method", "seed", "device")]
    return [
        *rows,
        ("losses", listed),
        ("teacher", named(report.teacher.source)),
        ("teacher metrics", scores or NOT_MEASURED),
    ]


def _pairs(data: Mapping[str, Any]) -> list[Row]:
    """A mapping as text; values that are not strings in the notation of JSON."""
    rows = list(data.items())[:MAX_ROWS]
    texts = [value if isinstance(value, str) else json.dumps(value, default=str) for _, value in rows]
    return [(named(key, 80), named(text)) for (key, _), text in zip(rows, texts, strict=True)]


def _file_rows(report: Report) -> list[tuple[str, str, str]]:
    rows = list(report.files.items())[:MAX_ROWS]
    return [(named(name), count(facts.bytes), named(facts.sha256, 64)) for name, facts in rows]


def _phases(report: Report) -> list[tuple[str, list[Chart]]]:
    """The charts of each phase, in the order in which the phases ran."""
    phases: dict[str, list[HistoryRow]] = {}
    for row in report.history:
        phases.setdefault(plain(row.phase or "prune", 60), []).append(row)
    drawn = [(phase, _charts(report, rows)) for phase, rows in list(phases.items())[:MAX_PHASES]]
    return [(phase, charts) for phase, charts in drawn if charts]


def _charts(report: Report, rows: Sequence[HistoryRow]) -> list[Chart]:
    names = _metric_names(report.metrics, report.metrics.primary)
    primary = finite(report.metrics.dense.get(names[0])) if names and report.metrics.reference == LABELS else None
    steps = _steps(rows)
    losses, bad_losses = _series(steps, [row.losses for row in rows], ["total"])
    scores, bad_scores = _series(steps, [row.metrics for row in rows], names)
    shares = [(at, drawable(row.sparsity)) for at, row in zip(steps, rows, strict=True)]
    removed = [(at, 100 * share) for at, share in shares if share is not None]
    span = (min(steps), max(steps))
    pruning = any(y > 0 for _, y in removed)
    charts = [
        line_chart("Losses", span, "loss", losses, n_bad=bad_losses),
        line_chart("Metrics", span, f"score{_curve(report)}", scores, primary if pruning else None, bad_scores),
        line_chart("Sparsity", span, "% of weights removed", {"sparsity": removed}, write="{:.2f}".format)
        if pruning
        else None,
    ]
    return [chart for chart in charts if chart]


def _curve(report: Report) -> str:
    """On what the values of the curves were measured, which are not the final ones."""
    curve = report.curve
    return f" on {count(curve.n_examples)}{' held-out' * bool(curve.held_out)} examples" if curve.n_examples else ""


def _steps(rows: Sequence[HistoryRow]) -> list[float]:
    """The step of each row; a row without one is placed by its position."""
    steps = [drawable(row.step) for row in rows]
    return [index if step is None else step for index, step in enumerate(steps)]


def _series(
    steps: Sequence[float], rows: Sequence[Mapping[str, float]], first: Sequence[str]
) -> tuple[dict[str, Points], int]:
    """The curves of values by name, those named in `first` in front, and how many values cannot be drawn."""
    series: dict[str, Points] = {}
    n_bad = 0
    for step, row in zip(steps, rows, strict=True):
        for name, raw in row.items():
            value = drawable(raw)
            n_bad += value is None
            if value is not None:
                series.setdefault(name, []).append((step, value))
    return dict(sorted(series.items(), key=lambda item: item[0] not in first)), n_bad
