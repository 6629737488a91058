"""What the page of a result of `eval`, `probe` or `--compare` shows: key figures, tables, the curves of the layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from capcli.reporting import quantities, results, tables
from capcli.reporting.charts import Bands, Chart, Points, drawable, line_chart
from capcli.reporting.text import NOT_MEASURED, byte_size, count, milliseconds, named, number, percent
from capcli.stored import mapping, part

MAX_CHARTS = 24
Tile = tuple[str, str, str]
Data = Mapping[str, Any]


def result_view(command: str, result: Data) -> dict[str, Any]:
    """Everything the template shows, as text and coordinates."""
    result = mapping(result)
    tiles = {"eval": _eval_tiles, "probe": _probe_tiles, "compare": _compare_tiles}[command](result)
    gates = results.gates_of(result)
    layers = tables.layer_tables(result) if command == "probe" else []
    return {
        "command": command,
        "title": results.title(command, result),
        "verdict": results.verdict(result),
        "failed": any(not gate.passed for gate in gates),
        "tiles": [tile for tile in tiles if tile[1] != NOT_MEASURED],
        "gates": gates,
        "tables": [table for table in tables.tables(command, result) if table not in layers],
        "layers": layers,
        "charts": _layer_charts(result) if command == "probe" else [],
        "facts": results.facts(command, result),
        "notes": results.notes(result),
    }


def _beside(bounds: Any, otherwise: str = "") -> str:
    shown = tables.span(bounds)
    return otherwise if shown == quantities.NO_INTERVAL else f"95 % interval {shown}"


def _eval_tiles(result: Data) -> list[Tile]:
    metrics, size, latency = part(result, "metrics"), part(result, "size"), part(result, "latency")
    primary = str(result.get("primary"))
    first = primary if primary in metrics else next(iter(metrics), "metric")
    change = part(result, "differences", first)
    return [
        (named(first, 60), number(metrics.get(first)), _beside(part(result, "confidence_95").get(first))),
        ("difference", tables.signed(change.get("value")), _from(change, "the baseline")),
        ("same answers", percent(result.get("agreement")), "as the baseline"),
        ("sparsity", percent(part(result, "sparsity").get("achieved")), "of the prunable weights"),
        ("weights", byte_size(size.get("weights_bytes")), "on disk"),
        ("latency", milliseconds(latency.get("median_ms")), f"batch {named(latency.get('batch'), 20)}, median"),
    ]


def _from(change: Data, baseline: str) -> str:
    """The interval of a difference, and what it is from."""
    bounds = quantities.ends(change.get("confidence_95"))
    shown = tables.signed_span(bounds).replace(" ", "\N{NO-BREAK SPACE}") + " " if bounds else ""
    return f"{shown}from {baseline}"


def _probe_tiles(result: Data) -> list[Tile]:
    mean, size, latency = part(result, "mean"), part(result, "size"), part(result, "latency")
    tiles = [
        ("mean of the tasks", number(mean.get("value")), _beside(mean.get("confidence_95"))),
        *(
            ("difference", tables.signed(change.get("value")), _from(change, named(one.get("model"), 60)))
            for one in quantities.baselines_of(result)[:3]
            if (change := part(one, "differences", "mean"))
        ),
        ("tasks", count(len(part(result, "tasks")) or None), f"{named(result.get('probe'), 20)} probe"),
        ("seeds", count(result.get("seeds")), f"layer {named(result.get('layer'), 20)}"),
        ("weights", byte_size(size.get("weights_bytes")), "on disk"),
    ]
    return [
        *tiles,
        ("latency", milliseconds(latency.get("median_ms")), f"batch {named(latency.get('batch'), 20)}, median"),
    ]


def _compare_tiles(result: Data) -> list[Tile]:
    rows = quantities.rows_of(result.get("rows"))
    outcomes = [tables.moved(row) for row in rows]
    moved, unknown = sum(o.startswith("yes") for o in outcomes), outcomes.count("unknown")
    compared = "metrics" if result.get("kind") != "probe" else "tasks"
    tiles = [("moved beyond the noise", count(moved) if rows else NOT_MEASURED, f"of {len(rows)} {compared}")]
    tiles += [("noise not known", count(unknown), f"of {len(rows)} {compared}")] if unknown else []
    for row in [*rows[:2], *quantities.rows_of(result.get("sizes"))[:1]]:
        show = number if row in rows else functools.partial(tables.quantity, row)
        change = tables.signed(row.get("change")) if row in rows else tables.exact_change(row)
        tiles.append((named(row.get("name"), 60), change, f"{show(row.get('old'))} → {show(row.get('new'))}"))
    return tiles


def _layer_charts(result: Data) -> list[Chart]:
    """Without a baseline one chart with a curve per task, else a chart per task with a curve per model."""
    ours = tables.layers_of(result)
    baselines = [(named(one.get("model"), 40), tables.layers_of(one)) for one in quantities.baselines_of(result)]
    if not any(theirs for _, theirs in baselines):
        charts = [_chart("All tasks", "mean of the metric", {named(task, 40): rows for task, rows in ours.items()})]
    else:
        charts = [
            _chart(
                named(task, 60),
                named(part(result, "tasks", task).get("metric"), 40),
                {named(result.get("model"), 40): rows, **{model: theirs.get(task, {}) for model, theirs in baselines}},
            )
            for task, rows in list(ours.items())[:MAX_CHARTS]
        ]
    return [chart for chart in charts if chart]


def _chart(title: str, y_label: str, curves: Mapping[str, Mapping[int, Data]]) -> Chart | None:
    points: dict[str, Points] = {}
    bands: dict[str, Bands] = {}
    for name, rows in curves.items():
        for layer, row in rows.items():
            value, bounds = drawable(row.get("mean")), quantities.ends(row.get("confidence_95"))
            if value is not None:
                points.setdefault(name, []).append((layer, value))
            if value is not None and bounds and all(drawable(bound) is not None for bound in bounds):
                bands.setdefault(name, []).append((layer, *bounds))
    layers = [layer for found in points.values() for layer, _ in found]
    if len(set(layers)) < 2:
        return None
    return line_chart(title, (min(layers), max(layers)), y_label, points, x_label="layer", bands=bands)
