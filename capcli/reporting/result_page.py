"""What the page of a result of `eval`, `probe` or `--compare` shows: key figures, tables, the curves of the layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from capcli.records.measured import Comparison, Comparisons, Counted, EvalResult, LayerScore, Moved, ProbeResult, Result
from capcli.records.parts import LABELS, Interval, Latency, ModelSparsity, Noisy
from capcli.reporting import quantities, results, tables
from capcli.reporting.charts import Bands, Chart, Points, drawable, line_chart
from capcli.reporting.labels import label_tables
from capcli.reporting.run_page import MAX_ROWS
from capcli.reporting.text import (
    NO_VALUE,
    NOT_MEASURED,
    byte_size,
    count,
    milliseconds,
    named,
    number,
    percent,
    signed,
    signed_span,
)

MAX_CHARTS = 24
Tile = tuple[str, str, str]


def result_view(result: Result) -> dict[str, Any]:
    """Everything the template shows, as text and coordinates."""
    gates = results.gates_of(result)
    layers = tables.layer_tables(result) if isinstance(result, ProbeResult) else []
    tiles = _tiles(result)
    return {
        "subject": _subject(result),
        "title": results.title(result),
        "verdict": results.verdict(result),
        "failed": any(not gate.passed for gate in gates),
        "tiles": [tile for tile in tiles if tile[1] != NOT_MEASURED],
        "gates": gates,
        "tables": [table for table in tables.tables(result) if table not in layers],
        "by_label": label_tables(result.by_label, "baseline") if isinstance(result, EvalResult) else None,
        "layers": layers,
        "charts": _layer_charts(result) if isinstance(result, ProbeResult) else [],
        "facts": results.facts(result),
        "notes": results.notes(result),
    }


def _subject(result: Result) -> str:
    if isinstance(result, Comparison):
        return "Two stored results"
    if isinstance(result, Comparisons):
        return f"{len(result.comparisons) + 1} stored results"
    return f"Result of cap {'eval' if isinstance(result, EvalResult) else 'probe'}"


def _tiles(result: Result) -> list[Tile]:
    if isinstance(result, EvalResult):
        return _eval_tiles(result)
    if isinstance(result, Comparisons):
        return [_moved_tile(one, named(one.new, 60)) for one in quantities.shown_of(result)]
    return _probe_tiles(result) if isinstance(result, ProbeResult) else _compare_tiles(result)


def _beside(bounds: Interval | None, by_chance: float | None) -> str:
    shown = tables.span(bounds)
    found = [] if shown == NO_VALUE else [f"95 % interval {shown}"]
    return ", ".join(found + ([] if by_chance is None else [f"chance {number(by_chance)}"]))


def _eval_tiles(result: EvalResult) -> list[Tile]:
    metrics, sparsity = result.metrics, result.sparsity or ModelSparsity()
    first = result.primary if result.primary in metrics else next(iter(metrics), "metric")
    change = result.differences.get(str(first), Noisy())
    return [
        (
            named(first, 60),
            number(metrics.get(str(first))),
            _beside(result.confidence_95.get(str(first)), result.chance.get(str(first))),
        ),
        *([("difference", signed(change.value), _from(change, "the baseline"))] * (result.reference == LABELS)),
        ("same answers", percent(result.agreement), "as the baseline"),
        ("sparsity", percent(sparsity.achieved), "of the prunable weights"),
        *_cost_tiles(result),
    ]


def _cost_tiles(result: EvalResult | ProbeResult) -> list[Tile]:
    latency = result.latency or Latency()
    return [
        ("weights", byte_size(result.size.weights_bytes), "on disk"),
        ("latency", milliseconds(latency.median_ms), f"batch {named(latency.batch, 20)}, median"),
    ]


def _from(change: Noisy, baseline: str) -> str:
    """The interval of a difference, and what it is from."""
    bounds = quantities.ends(change.confidence_95)
    shown = signed_span(bounds).replace(" ", "\N{NO-BREAK SPACE}") + " " if bounds else ""
    return f"{shown}from {baseline}"


def _probe_tiles(result: ProbeResult) -> list[Tile]:
    mean = result.mean or Noisy()
    return [
        ("mean of the tasks", number(mean.value), _beside(mean.confidence_95, result.chance)),
        *(
            ("difference", signed(change.value), _from(change, named(one.model, 60)))
            for one in quantities.baselines_of(result)[:3]
            if (change := one.differences.get("mean"))
        ),
        ("tasks", count(len(result.tasks) or None), f"{named(result.probe, 20)} probe"),
        ("seeds", count(result.seeds), f"layer {named(result.layer, 20)}"),
        *_cost_tiles(result),
    ]


def _compare_tiles(result: Comparison) -> list[Tile]:
    rows = result.rows[:MAX_ROWS]
    unknown = [tables.moved(row) for row in rows].count("unknown")
    tiles = [_moved_tile(result, "moved beyond the noise")]
    tiles += [("noise not known", count(unknown), f"of {_compared(result)}")] if unknown else []
    tiles += [_change_tile(row, signed(row.change), number) for row in rows[:2]]
    for size in result.sizes[:1]:
        tiles.append(_change_tile(size, tables.exact_change(size), functools.partial(tables.quantity, size)))
    return tiles


def _moved_tile(result: Comparison, label: str) -> Tile:
    """How many values moved, of how many."""
    moved = sum(bool(row.moved) for row in result.rows[:MAX_ROWS])
    beside = "moved, " if label != "moved beyond the noise" else ""
    return label, count(moved) if result.rows else NOT_MEASURED, f"{beside}of {_compared(result)}"


def _compared(result: Comparison) -> str:
    return f"{len(result.rows[:MAX_ROWS])} {'metrics' if result.kind != 'probe' else 'tasks'}"


def _change_tile(row: Moved | Counted, change: str, show: Callable[[float | None], str]) -> Tile:
    return named(row.name, 60), change, f"{show(row.old)} → {show(row.new)}"


def _layer_charts(result: ProbeResult) -> list[Chart]:
    """Without a baseline one chart with a curve per task, else a chart per task with a curve per model."""
    ours = tables.layers_of(result)
    baselines = [(named(one.model, 40), tables.layers_of(one)) for one in quantities.baselines_of(result)]
    if not any(theirs for _, theirs in baselines):
        charts = [_chart("All tasks", "mean of the metric", {named(task, 40): rows for task, rows in ours.items()})]
    else:
        charts = [
            _chart(
                named(task, 60),
                named(result.tasks[task].metric, 40),
                {named(result.model, 40): rows, **{model: theirs.get(task, {}) for model, theirs in baselines}},
            )
            for task, rows in list(ours.items())[:MAX_CHARTS]
        ]
    return [chart for chart in charts if chart]


def _chart(title: str, y_label: str, curves: Mapping[str, Mapping[int, LayerScore]]) -> Chart | None:
    points: dict[str, Points] = {}
    bands: dict[str, Bands] = {}
    for name, rows in curves.items():
        for layer, row in rows.items():
            value, bounds = drawable(row.mean), quantities.ends(row.confidence_95)
            if value is not None:
                points.setdefault(name, []).append((layer, value))
            if value is not None and bounds and all(drawable(bound) is not None for bound in bounds):
                bands.setdefault(name, []).append((layer, *bounds))
    layers = [layer for found in points.values() for layer, _ in found]
    if len(set(layers)) < 2:
        return None
    return line_chart(title, (min(layers), max(layers)), y_label, points, x_label="layer", bands=bands)
