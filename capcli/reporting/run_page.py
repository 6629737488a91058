"""What the documents of a pruning run show: `report.json` as text and coordinates, and the templates that lay it out.

`view` is the whole page as data; `template` makes sure that nothing in it can act.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capcli.reporting import heat_map, latency
from capcli.reporting.charts import Chart, Points, drawable, line_chart
from capcli.reporting.text import (
    NOT_MEASURED,
    byte_size,
    count,
    duration,
    interval,
    markdown,
    named,
    number,
    percent,
    plain,
    significant,
    times_smaller,
)
from capcli.stored import finite, mapping, part, sequence

if TYPE_CHECKING:
    from jinja2 import Template

MAX_ROWS = 500  # of any table, so that a hostile report cannot make an endless page
MAX_PHASES = 4
SIZES = {
    "dense": "Dense model",
    "artifact": "Model, all files",
    "weights": "Weight file",
    "bound": "Information bound",
}

Row = tuple[str, str]


@functools.cache
def template(name: str) -> Template:
    """A template in which every value is made inert on its way out, by the rules of the language it writes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    html = name.endswith(".html.j2")
    inert = functools.partial(plain, limit=400) if html else markdown
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
    interval: str
    retention: str
    difference: str
    strip: Mapping[str, float]


def _metric_names(metrics: Mapping[str, Any]) -> list[str]:
    """Names of all metrics, the primary one first."""
    known = [*part(metrics, "pruned"), *part(metrics, "dense")]
    primary = [name for name in known if name == metrics.get("primary")]
    return list(dict.fromkeys([*primary, *known]))[:MAX_ROWS]


def metric_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """One row per metric of the primary split, then those of the other splits, which are named."""
    rows = [_metric_row(metrics, name) for name in _metric_names(metrics)]
    for split, found in other_splits(metrics):
        both = {**found, "primary": metrics.get("primary")}
        rows += [_metric_row(both, name, f" ({named(split, 60)})") for name in _metric_names(both)]
    return rows[:MAX_ROWS]


def other_splits(metrics: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The evaluation splits beside the primary one, by name."""
    table = part(metrics, "splits")
    return [(name, mapping(found)) for name, found in table.items() if name != metrics.get("split")][:MAX_ROWS]


def _metric_row(metrics: Mapping[str, Any], name: str, suffix: str = "") -> MetricRow:
    dense, pruned = (part(metrics, key).get(name) for key in ("dense", "pruned"))
    bounds = part(metrics, "confidence_95").get(name)
    before, after = finite(dense), finite(pruned)
    change = None if before is None or after is None else after - before
    difference = ("+" if change and change > 0 else "") + number(change)
    strip = _strip(before, after, [finite(bound) for bound in sequence(bounds)])
    retention = percent(part(metrics, "retention").get(name))
    return MetricRow(
        named(name, 60) + suffix, number(dense), number(pruned), interval(bounds), retention, difference, strip
    )


def _strip(dense: float | None, pruned: float | None, bounds: list[float | None]) -> Mapping[str, float]:
    """Places, in percent of the width, of both values and the interval in a small drawing; empty if one is missing."""
    values = [dense, pruned, *bounds]
    known = [value for value in values if value is not None and abs(value) < 1e100]
    if len(known) != 4:
        return {}
    low, high = min(known), max(known)
    places = [6 + 88 * (value - low) / (high - low) if high > low else 50.0 for value in known]
    return dict(zip(("dense", "pruned", "low", "high"), (round(place, 1) for place in places), strict=True))


def view(report: Mapping[str, Any]) -> dict[str, Any]:
    """Everything a template shows, as text and coordinates."""
    report = mapping(report)
    metrics = part(report, "metrics")
    sparsity, size = part(report, "sparsity"), part(report, "size")
    rows = metric_rows(metrics)
    return {
        **{key: named(report.get(key), 120) for key in ("model", "task", "method", "status", "device", "seed")},
        "title": _title(report),
        "command": plain(report.get("command") or "", 8000),
        "primary": rows[0] if rows else None,
        "achieved": percent(sparsity.get("achieved")),
        "tiles": _tiles(report, rows),
        "metrics": rows,
        "n_examples": count(metrics.get("n_examples")),
        "split": named(metrics.get("split"), 60),
        "sparsity": _sparsity_rows(sparsity),
        "scale": heat_map.gradient(),
        "heat": heat_map.heat_map(sparsity.get("per_matrix")),
        "matrices": _matrix_rows(sparsity),
        "sizes": _size_rows(size),
        "codings": _pairs(size.get("codings")),
        "latency": latency.side_by_side(report),
        "phases": _phases(report),
        "costs": _cost_rows(report),
        "setup": _setup_rows(report),
        "versions": _pairs(report.get("versions")),
        "config": _pairs(report.get("config")),
        "files": _file_rows(report),
        "notes": [plain(note, 400) for note in sequence(report.get("notes"))[:MAX_ROWS]],
        "labels": [named(label, 60) for label in sequence(report.get("labels"))[:MAX_ROWS]],
    }


def _title(report: Mapping[str, Any]) -> str:
    model, task = report.get("model"), report.get("task")
    known = model is not None and task is not None
    return f"{named(model, 120)}, pruned for {named(task, 60)}" if known else "Pruning report"


def _tiles(report: Mapping[str, Any], rows: Sequence[MetricRow]) -> list[tuple[str, str, str]]:
    """The key figures as (label, figure, what to compare it with)."""
    sparsity, size = part(report, "sparsity"), part(report, "size")
    first = rows[0] if rows else None
    smaller = times_smaller(size.get("dense_bytes"), size.get("artifact_bytes"))
    name = first.name if first else "metric"
    kept = sparsity.get("kept_weights")
    kept = f"{count(kept)} kept, " if finite(kept) is not None else ""
    return [
        ("sparsity", percent(sparsity.get("achieved")), f"{kept}requested {percent(sparsity.get('requested'))}"),
        (name, first.pruned if first else NOT_MEASURED, f"dense {first.dense if first else NOT_MEASURED}"),
        ("retention", first.retention if first else NOT_MEASURED, f"of the dense model's {name}"),
        (
            "pruned size",
            byte_size(size.get("artifact_bytes")),
            smaller or f"dense {byte_size(size.get('dense_bytes'))}",
        ),
        ("whole model", percent(sparsity.get("whole_model")), "of all weights removed"),
        ("time", duration(part(report, "timing").get("total_seconds")), named(report.get("device"), 60)),
    ]


def _sparsity_rows(sparsity: Mapping[str, Any]) -> list[Row]:
    return [
        ("requested", percent(sparsity.get("requested"))),
        ("achieved, prunable weights", percent(sparsity.get("achieved"))),
        ("whole encoder", percent(sparsity.get("encoder"))),
        ("whole model", percent(sparsity.get("whole_model"))),
        ("prunable weights", count(sparsity.get("prunable_weights"))),
        ("kept weights", count(sparsity.get("kept_weights"))),
    ]


def _matrix_rows(sparsity: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = [mapping(row) for row in sequence(sparsity.get("per_matrix"))[:MAX_ROWS]]
    shapes = [" x ".join(count(size) for size in sequence(row.get("shape"))[:5]) for row in rows]
    return [
        (named(row.get("name"), 160), shape or NOT_MEASURED, count(row.get("kept")), percent(row.get("sparsity")))
        for row, shape in zip(rows, shapes, strict=True)
    ]


def _size_rows(size: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Sizes with the share of the largest one, in percent, as the length of a bar."""
    known = {key: finite(size.get(f"{key}_bytes")) for key in SIZES}
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


def _cost_rows(report: Mapping[str, Any]) -> list[Row]:
    timing, memory = part(report, "timing"), part(report, "memory")
    speed = finite(timing.get("examples_per_second"))
    return [
        *((phase, duration(timing.get(f"{phase}_seconds"))) for phase in ("teacher", "banks", "prune", "total")),
        ("speed", NOT_MEASURED if speed is None else f"{significant(speed)} examples per second"),
        ("peak memory, host", byte_size(memory.get("peak_host_bytes"))),
        ("peak memory, device", byte_size(memory.get("peak_device_bytes"))),
    ]


def _setup_rows(report: Mapping[str, Any]) -> list[Row]:
    losses = report.get("losses")
    listed = ", ".join(named(loss, 40) for loss in sequence(losses)[:20]) or (plain(losses) if losses else named(None))
    teacher = part(report, "teacher")
    scores = ", ".join(f"{named(name, 60)} {number(v)}" for name, v in list(part(teacher, "metrics").items())[:20])
    rows = [(key, named(report.get(key))) for key in ("method", "seed", "device")]
    return [
        *rows,
        ("losses", listed),
        ("teacher", named(teacher.get("source"))),
        ("teacher metrics", scores or NOT_MEASURED),
    ]


def _pairs(data: Any) -> list[Row]:
    """A mapping as text; values that are not strings in the notation of JSON."""
    rows = list(mapping(data).items())[:MAX_ROWS]
    texts = [value if isinstance(value, str) else json.dumps(value, default=str) for _, value in rows]
    return [(named(key, 80), named(text)) for (key, _), text in zip(rows, texts, strict=True)]


def _file_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = list(part(report, "files").items())[:MAX_ROWS]
    return [(named(n), count(mapping(f).get("bytes")), named(mapping(f).get("sha256"), 64)) for n, f in rows]


def _phases(report: Mapping[str, Any]) -> list[tuple[str, list[Chart]]]:
    """The charts of each phase, in the order in which the phases ran."""
    phases: dict[str, list[Mapping[str, Any]]] = {}
    for row in map(mapping, sequence(report.get("history"))):
        phases.setdefault(plain(row.get("phase") or "prune", 60), []).append(row)
    drawn = [(phase, _charts(report, rows)) for phase, rows in list(phases.items())[:MAX_PHASES]]
    return [(phase, charts) for phase, charts in drawn if charts]


def _charts(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    metrics = part(report, "metrics")
    names = _metric_names(metrics)
    primary = finite(part(metrics, "dense").get(names[0])) if names else None
    losses, bad_losses = _series(rows, "losses", ["total"])
    scores, bad_scores = _series(rows, "metrics", names)
    removed = [(at, 100 * s) for at, row in _steps(rows) if (s := drawable(row.get("sparsity"))) is not None]
    steps = [step for step, _ in _steps(rows)]
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


def _curve(report: Mapping[str, Any]) -> str:
    """On what the values of the curves were measured, which are not the final ones."""
    curve = part(report, "curve")
    held_out = " held-out" if curve.get("held_out") is True else ""
    return f" on {count(curve['n_examples'])}{held_out} examples" if finite(curve.get("n_examples")) else ""


def _steps(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, Mapping[str, Any]]]:
    """Rows with the step they belong to; a row without one is placed by its position."""
    steps = [drawable(row.get("step")) for row in rows]
    return [(i if step is None else step, row) for i, (step, row) in enumerate(zip(steps, rows, strict=True))]


def _series(rows: Sequence[Mapping[str, Any]], key: str, first: Sequence[str]) -> tuple[dict[str, Points], int]:
    """The curves under `key`, those named in `first` in front, and how many values cannot be drawn."""
    series: dict[str, Points] = {}
    n_bad = 0
    for step, row in _steps(rows):
        for name, raw in part(row, key).items():
            value = drawable(raw)
            n_bad += value is None
            if value is not None:
                series.setdefault(name, []).append((step, value))
    return dict(sorted(series.items(), key=lambda item: item[0] not in first)), n_bad
