"""What the documents of a pruning run show: `report.json` as text and coordinates, and the templates that lay it out.

`view` is the whole page as data; `template` makes sure that nothing in it can act.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from capcli.records.parts import LABELS, Noisy, Sparsity
from capcli.records.pruned import Metrics, Report, Size, SplitMetrics
from capcli.reporting import heat_map, latency, training
from capcli.reporting.budget import left_rows, requested
from capcli.reporting.headline import Headline, compared_with, headline
from capcli.reporting.labels import label_tables
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
    signed,
    signed_span,
    significant,
    times_smaller_than,
)
from capcli.stored import finite, sequence

if TYPE_CHECKING:
    from jinja2 import Template

MAX_ROWS = 500  # of any table, so that a hostile report cannot make an endless page
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
    """One metric before and after, as text; `moved`: interval of the difference, `strip`: its numbers for drawing."""

    name: str
    dense: str
    pruned: str
    chance: str
    interval: str
    retention: str
    difference: str
    moved: str
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
    strip = _strip(before, after, [finite(bound) for bound in sequence(bounds)])
    return MetricRow(
        name=named(name, 60) + suffix,
        dense=number(dense) if labelled else NO_VALUE,
        pruned=number(pruned),
        chance=number(metrics.chance[name]) if name in metrics.chance else NO_VALUE,
        interval=interval(bounds),
        retention=_retention(metrics, name) if labelled else NO_VALUE,
        difference=signed(change) if labelled else NO_VALUE,
        moved=signed_span(metrics.differences.get(name, Noisy()).confidence_95),
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
        "sparsity": _sparsity_rows(report),
        "scale": heat_map.gradient(),
        "heat": heat_map.heat_map(sparsity.per_matrix),
        "matrices": _matrix_rows(sparsity),
        "errors": has_errors(sparsity),
        "sizes": _size_rows(size),
        "size_parts": _part_rows(size),
        "codings": _pairs(size.codings),
        "exports": [(named(row.options, 120), byte_size(row.weights_bytes)) for row in report.exports[:MAX_ROWS]],
        "planned": _planned_rows(report),
        "latency": latency.side_by_side(report),
        "phases": training.phases(report, names),
        "costs": _cost_rows(report),
        "setup": _setup_rows(report),
        "versions": _pairs(report.versions),
        "config": _pairs(report.config),
        "files": _file_rows(report),
        "notes": [plain(note, 400) for note in report.notes[:MAX_ROWS]],
        "labels": [named(label, 60) for label in report.labels[:MAX_ROWS]],
        "by_label": label_tables(report.by_label, "dense"),
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
        ("sparsity", percent(sparsity.achieved), f"{kept}requested {requested(report)}"),
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


def _sparsity_rows(report: Report) -> list[Row]:
    sparsity = report.sparsity
    return [
        ("requested", requested(report)),
        ("achieved, prunable weights", percent(sparsity.achieved)),
        ("whole encoder", percent(sparsity.encoder)),
        ("whole model", percent(sparsity.whole_model)),
        ("prunable weights", count(sparsity.prunable_weights)),
        ("kept weights", count(sparsity.kept_weights)),
        ("smallest share that a matrix keeps", percent(sparsity.least_kept)),
        *left_rows(report),
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
            "share": _share(value, largest),
        }
        for key, value in known.items()
    ]


def _part_rows(size: Size) -> list[dict[str, Any]]:
    """What each part takes dense and in the file, both as shares of the largest dense part, in percent."""
    rows = size.parts[:MAX_ROWS]
    largest = max((finite(row.dense_bytes) or 0.0 for row in rows), default=0.0)
    return [
        {
            "label": named(row.part, 60),
            "weights": count(row.weights),
            "dense": byte_size(row.dense_bytes),
            "stored": byte_size(row.stored_bytes),
            "shares": [_share(value, largest) for value in (row.dense_bytes, row.stored_bytes)],
        }
        for row in rows
    ]


def _share(value: float | None, largest: float) -> float | None:
    real = finite(value)
    return None if not largest or real is None else round(max(0.0, 100 * real / largest), 2)


def _cost_rows(report: Report) -> list[Row]:
    timing, memory = report.timing, report.memory
    speed = finite(timing.examples_per_second)
    return [
        *((phase, duration(getattr(timing, f"{phase}_seconds"))) for phase in ("teacher", "banks", "prune", "total")),
        ("speed", f"{significant(speed)} examples per second" if speed else NOT_MEASURED),
        ("peak memory, host", byte_size(memory.peak_host_bytes)),
        ("peak memory, device", byte_size(memory.peak_device_bytes)),
        *_process_rows(report),
    ]


def _process_rows(report: Report) -> list[Row]:
    """Of each of several processes where it was and how much memory it took."""
    speed, processes = finite(report.timing.examples_per_second), report.processes or ()
    rows = []
    for rank, one in enumerate(processes[:64]):
        device = f", device {byte_size(one.peak_device_bytes)}" * bool(one.peak_device_bytes)
        about = f"{named(one.device, 60)} on {named(one.host, 60)}, host {byte_size(one.peak_host_bytes)}{device}"
        rows.append((f"rank {rank}", about))
    if processes and speed is not None:
        rows.append(("speed of each rank", f"{significant(speed / len(processes))} examples per second"))
    return rows


def _planned_rows(report: Report) -> list[tuple[str, str, str]]:
    """What was planned beside what it became; nothing where there was no plan."""
    plan = report.planned
    rows = [
        ("weight file", byte_size(plan.weights_bytes), byte_size(report.size.weights_bytes)),
        ("memory, host", byte_size(plan.memory_bytes), byte_size(report.memory.peak_host_bytes)),
        ("time", duration(plan.seconds), duration(report.timing.total_seconds)),
    ]
    return [row for row in rows if row[1] != NOT_MEASURED]


def _setup_rows(report: Report) -> list[Row]:
    none = "none" if report.config.get("epochs") == 0 else named(None)
    listed = ", ".join(named(loss, 40) for loss in report.losses[:20]) or none
    scores = ", ".join(f"{named(n, 60)} {number(value)}" for n, value in list(report.teacher.metrics.items())[:20])
    rows = [(key, named(getattr(report, key))) for key in ("method", "structure", "seed", "device")]
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
