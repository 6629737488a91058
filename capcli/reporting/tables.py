"""The tables of a result, the same for terminal, page and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from capcli.reporting import charts, latency
from capcli.reporting.charts import Mark, Strips
from capcli.reporting.quantities import NO_INTERVAL, Data, baselines_of, ends, items_of, rows_of
from capcli.reporting.run_page import MAX_ROWS, other_splits
from capcli.reporting.text import (
    NOT_MEASURED,
    bound,
    byte_size,
    count,
    interval,
    milliseconds,
    named,
    number,
    percent,
    significant,
)
from capcli.stored import finite, mapping, part

TASKS_ACROSS = 6  # columns of a table of layers, so that it fits a terminal of 80


@dataclass(frozen=True)
class ResultTable:
    """A table of text, of whose columns the first `n_text` are words; with `strips` one small drawing per row."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    hint: str = ""
    strips: Strips | None = None
    n_text: int = 1


@dataclass
class _Drawn:
    """Rows of a table as they are collected, with the numbers to draw beside them."""

    rows: list[tuple[str, ...]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def add(self, cells: Sequence[str], value: Any, bounds: Any, other: Any = None) -> None:
        self.rows.append(tuple(cells))
        self.marks.append(Mark(finite(value), ends(bounds), finite(other)))

    def table(
        self, title: str, columns: Sequence[str], hint: str = "", *, zero: bool = False, n_text: int = 1
    ) -> ResultTable:
        drawn = charts.strips(self.marks[:MAX_ROWS], zero=zero)
        return ResultTable(title, tuple(columns), self.rows[:MAX_ROWS], hint, drawn, n_text)


def signed(value: Any, text: str = "") -> str:
    """A difference with its sign; `text` is how its value is written, if not as a number."""
    real = finite(value)
    return ("+" if real is not None and real > 0 else "") + (text or number(value))


def span(bounds: Any) -> str:
    """The interval of a value."""
    return interval(bounds) if ends(bounds) else NO_INTERVAL


def signed_span(bounds: Any) -> str:
    """The interval of a difference."""
    found = ends(bounds)
    if not found:
        return NO_INTERVAL
    return f"[{signed(found[0], bound(found[0], up=False))}, {signed(found[1], bound(found[1], up=True))}]"


def tables(command: str, result: Data) -> list[ResultTable]:
    """The tables of a result in reading order, none of them empty."""
    found: Callable[[Data], list[ResultTable]] = {
        "eval": _eval_tables,
        "probe": _probe_tables,
        "compare": _compare_tables,
    }[command]
    return [table for table in found(mapping(result)) if table.rows]


def _eval_tables(result: Data) -> list[ResultTable]:
    drawn, theirs = _Drawn(), part(result, "baseline", "metrics")
    for name, value in items_of(result.get("metrics")):
        bounds = part(result, "confidence_95").get(name)
        drawn.add((named(name, 60), number(value), span(bounds)), value, bounds, theirs.get(name))
    for split, data in other_splits(result):
        for name, value in items_of(data.get("metrics")):
            bounds = part(data, "confidence_95").get(name)
            drawn.add((f"{named(name, 60)} ({named(split, 60)})", number(value), span(bounds)), value, bounds)
    metrics = drawn.table("Metrics", ("metric", "value", "95 % interval"))
    return [metrics, _baseline_table(result), _perturbed_table(result), _latencies_table(result)]


def _latencies_table(result: Data) -> ResultTable:
    """Latency beside that of the baseline, where both were measured in turn."""
    models = {"model": part(result, "latency"), "baseline": part(result, "baseline", "latency")}
    lines = latency.lines(models) if models["baseline"] else []
    rows: list[tuple[str, ...]] = [(line.label, line.values["model"], line.values["baseline"]) for line in lines]
    hint = f"Measured in turn: {latency.conditions(models)}."
    return ResultTable("Latency", ("latency", "model", "baseline"), rows, hint)


def _baseline_table(result: Data) -> ResultTable:
    """Each metric that the baseline has too."""
    drawn, baseline = _Drawn(), part(result, "baseline")
    for name in mapping(result.get("metrics")):
        if name in part(baseline, "metrics"):
            theirs = part(baseline, "metrics")[name]
            value, bounds = _change(part(result, "differences"), name, part(result, "metrics")[name], theirs)
            kept = percent(part(result, "retention").get(name)) if name in part(result, "retention") else NO_INTERVAL
            drawn.add((named(name, 60), number(theirs), signed(value), signed_span(bounds), kept), value, bounds)
    columns = ("metric", "baseline", "difference", "95 % interval", "retention")
    return drawn.table(_against_title(baseline), columns, DIFFERENCE_HINT, zero=True)


def _change(differences: Data, name: str, ours: Any, theirs: Any) -> tuple[Any, Any]:
    """A difference and its interval; of values whose noise nobody knows, such as `ece`, the bare difference."""
    if name in differences:
        return part(differences, name).get("value"), part(differences, name).get("confidence_95")
    a, b = finite(ours), finite(theirs)
    return (None if a is None or b is None else a - b), None


DIFFERENCE_HINT = "Difference: this model minus the baseline. An interval that contains 0 is within the noise."


def _against_title(baseline: Data) -> str:
    return f"Against {named(baseline.get('model'), 80)}"


def _perturbed_table(result: Data) -> ResultTable:
    drawn = _Drawn()
    for change, data in items_of(result.get("perturbed")):
        for name, value in items_of(mapping(data).get("metrics")):
            by, bounds = _change(part(data, "differences"), name, value, part(result, "metrics").get(name))
            same = percent(mapping(data).get("agreement"))
            cells = (named(change, 40), named(name, 60), number(value), signed(by), signed_span(bounds), same)
            drawn.add(cells, by, bounds)
    columns = ("change", "metric", "value", "difference", "95 % interval", "same answers")
    hint = "Difference: changed texts minus the unchanged ones, same examples. Same answers: share that did not change."
    return drawn.table("With changed texts", columns, hint, zero=True, n_text=2)


def _probe_tables(result: Data) -> list[ResultTable]:
    drawn, baselines = _Drawn(), baselines_of(result)
    only = baselines[0] if len(baselines) == 1 else {}  # of several none is drawn beside the value
    for task, data in items_of(result.get("tasks")):
        row = mapping(data)
        deviation = finite(row.get("deviation"))
        mean = number(row.get("mean")) + ("" if deviation is None else f" ± {bound(deviation, up=True)}")
        cells = (named(task, 60), named(row.get("metric"), 40), mean, span(row.get("confidence_95")))
        other = part(only, "tasks", task).get("mean")
        drawn.add((*cells, count(row.get("n_examples"))), row.get("mean"), row.get("confidence_95"), other)
    if mean_of := part(result, "mean"):
        value, bounds = mean_of.get("value"), mean_of.get("confidence_95")
        cells = ("mean of tasks", "", number(value), span(bounds))
        drawn.add((*cells, ""), value, bounds, part(only, "mean").get("value"))
    hint = "Mean ± standard deviation over the seeds; the interval also includes the noise of the examples."
    shown = drawn.table("Tasks", ("task", "metric", "mean", "95 % interval", "examples"), hint, n_text=2)
    return [shown, *(_probe_against(result, one) for one in baselines), *layer_tables(result)]


def _probe_against(result: Data, baseline: Data) -> ResultTable:
    drawn = _Drawn()
    for task in [*mapping(result.get("tasks")), "mean"]:
        theirs, change = part(baseline, "tasks", task).get("mean"), part(baseline, "differences", task)
        label = named(task, 60)
        if task == "mean" and task not in part(result, "tasks"):
            theirs, label = part(baseline, "mean").get("value"), "mean of tasks"
        if change or finite(theirs) is not None:
            value, bounds = change.get("value"), change.get("confidence_95")
            drawn.add((label, number(theirs), signed(value), signed_span(bounds)), value, bounds)
    columns = ("task", "baseline", "difference", "95 % interval")
    return drawn.table(_against_title(baseline), columns, DIFFERENCE_HINT, zero=True)


def layers_of(one: Data) -> dict[str, dict[int, Data]]:
    """The rows of each layer by task, for the tasks that have any."""
    found = {}
    for task, data in items_of(one.get("tasks")):
        numbers = [(finite(row.get("layer")), row) for row in rows_of(mapping(data).get("layers"))]
        if rows := {int(n): row for n, row in numbers if n is not None and 0 <= n < 1e6}:
            found[task] = rows
    return found


def layer_tables(result: Data) -> list[ResultTable]:
    """The means of all layers: layers as rows, tasks as columns."""
    by_task = layers_of(result)
    layers = sorted({layer for rows in by_task.values() for layer in rows})[:MAX_ROWS]
    names = list(by_task)
    found = []
    for at in range(0, len(names), TASKS_ACROSS):
        across = names[at : at + TASKS_ACROSS]
        rows = [
            (str(layer), *(_cell(by_task[name].get(layer)) for name in across))
            for layer in layers
        ]  # fmt: skip
        found.append(ResultTable("Layers", ("layer", *(named(name, 40) for name in across)), rows))
    return found


def _cell(row: Data | None) -> str:
    return NO_INTERVAL if row is None else number(row.get("mean"))


def _compare_tables(result: Data) -> list[ResultTable]:
    exact = [
        (named(row.get("name"), 60), *(quantity(row, row.get(key)) for key in ("old", "new")), exact_change(row))
        for row in rows_of(result.get("sizes"))
    ]
    hint = "Change: new minus old. Moved: the interval of the change does not contain 0."
    measured = _moves_table("Tasks" if result.get("kind") == "probe" else "Metrics", result.get("rows"), hint)
    times = _latency_table(result.get("latency"))
    return [measured, times, ResultTable("Size and sparsity", ("name", "old", "new", "change"), exact)]


def _moves_table(title: str, rows: Any, hint: str = "") -> ResultTable:
    drawn = _Drawn()
    for row in rows_of(rows):
        change, bounds = row.get("change"), row.get("interval")
        cells = (named(row.get("name"), 60), number(row.get("old")), number(row.get("new")), signed(change))
        drawn.add((*cells, signed_span(bounds), moved(row)), change, bounds)
    return drawn.table(title, MOVES, hint, zero=True)


MOVES = ("name", "old", "new", "change", "95 % interval", "moved")


def _latency_table(rows: Any) -> ResultTable:
    """Times with their unit, which a metric has not."""
    found: list[tuple[str, ...]] = []
    for row in rows_of(rows):
        change, bounds = row.get("change"), ends(row.get("interval"))
        cells = (named(row.get("name"), 60), milliseconds(row.get("old")), milliseconds(row.get("new")))
        low_high = [signed(end, significant(end)) for end in bounds or ()]
        between = f"[{', '.join(low_high)}]" if bounds else NO_INTERVAL
        found.append((*cells, signed(change, milliseconds(change)), between, moved(row)))
    return ResultTable("Latency", MOVES, found)


def moved(row: Data) -> str:
    """Whether a value moved beyond the noise, and where to."""
    if row.get("moved") is True:
        change = finite(row.get("change"))
        return "yes" if not change else "yes, up" if change > 0 else "yes, down"
    return "no" if row.get("moved") is False else "unknown"


def quantity(row: Data, value: Any) -> str:
    """A size in bytes, or a share."""
    return byte_size(value) if str(row.get("name")).endswith("_bytes") else percent(value)


def exact_change(row: Data) -> str:
    """The change of a size or share, the latter in points of percent."""
    change = finite(row.get("change"))
    if change is None:
        return NOT_MEASURED
    if not change:
        return "none"
    return ("+" if change > 0 else "-") + quantity(row, abs(change)).replace(" %", " points")
