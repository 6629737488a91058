"""The tables of a result, the same for terminal, page and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from capcli.records.measured import (
    Baseline,
    Comparison,
    Comparisons,
    Counted,
    EvalResult,
    LayerScore,
    Moved,
    ProbeBaseline,
    ProbeResult,
    Result,
    TaskScore,
)
from capcli.records.parts import LABELS, Interval, Noisy
from capcli.reporting import charts, latency
from capcli.reporting.charts import Mark, ResultTable
from capcli.reporting.quantities import baselines_of, ends, items_of, shown_of
from capcli.reporting.run_page import MAX_ROWS, other_splits
from capcli.reporting.text import (
    NO_VALUE,
    NOT_MEASURED,
    bound,
    byte_size,
    count,
    interval,
    milliseconds,
    named,
    number,
    percent,
    signed,
    signed_span,
    significant,
)
from capcli.stored import finite

TASKS_ACROSS = 6  # columns of a table of layers, so that it fits a terminal of 80


@dataclass
class _Drawn:
    """Rows of a table as they are collected, with the numbers to draw beside them."""

    rows: list[tuple[str, ...]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def add(
        self, cells: Sequence[str], value: float | None, bounds: Interval | None, other: float | None = None
    ) -> None:
        self.rows.append(tuple(cells))
        self.marks.append(Mark(finite(value), ends(bounds), finite(other)))

    def table(
        self, title: str, columns: Sequence[str], hint: str = "", *, zero: bool = False, n_text: int = 1
    ) -> ResultTable:
        drawn = charts.strips(self.marks[:MAX_ROWS], zero=zero)
        return ResultTable(title, tuple(columns), self.rows[:MAX_ROWS], hint, drawn, n_text)


def span(bounds: Interval | None) -> str:
    """The interval of a value."""
    return interval(bounds) if ends(bounds) else NO_VALUE


def by_chance(value: float | None) -> str:
    """What guessing scores."""
    return NO_VALUE if value is None else number(value)


def tables(result: Result) -> list[ResultTable]:
    """The tables of a result in reading order, none of them empty."""
    if isinstance(result, EvalResult):
        found = _eval_tables(result)
    elif isinstance(result, Comparisons):
        found = _several_tables(result)
    else:
        found = _probe_tables(result) if isinstance(result, ProbeResult) else _compare_tables(result)
    return [table for table in found if table.rows]


def _eval_tables(result: EvalResult) -> list[ResultTable]:
    drawn, theirs = _Drawn(), result.baseline.metrics if result.baseline and result.reference == LABELS else {}
    for name, value in items_of(result.metrics):
        bounds = result.confidence_95.get(name)
        cells = (named(name, 60), number(value), by_chance(result.chance.get(name)), span(bounds))
        drawn.add(cells, value, bounds, theirs.get(name))
    for split, scores in other_splits(result.splits, result.split):
        for name, value in items_of(scores.metrics):
            bounds = scores.confidence_95.get(name)
            label, guessing = f"{named(name, 60)} ({named(split, 60)})", by_chance(scores.chance.get(name))
            drawn.add((label, number(value), guessing, span(bounds)), value, bounds)
    metrics = drawn.table("Metrics", ("metric", "value", "chance", "95 % interval"), CHANCE_HINT * bool(result.chance))
    labelled = result.reference == LABELS  # or the metrics themselves say how far both agree
    against = [_baseline_table(result, result.baseline)] if result.baseline and labelled else []
    return [metrics, *against, _perturbed_table(result), *_latencies_tables(result)]


def _latencies_tables(result: EvalResult) -> list[ResultTable]:
    """Latency beside that of the baseline, where both were measured in turn."""
    other = result.baseline and result.baseline.latency
    if not result.latency or not other:
        return []
    models = {"model": result.latency, "baseline": other}
    rows: list[tuple[str, ...]] = [
        (line.label, line.values["model"], line.values["baseline"]) for line in latency.lines(models)
    ]
    hint = f"Measured in turn: {latency.conditions(models)}."
    return [ResultTable("Latency", ("latency", "model", "baseline"), rows, hint)]


def _baseline_table(result: EvalResult, baseline: Baseline) -> ResultTable:
    """Each metric that the baseline has too."""
    drawn = _Drawn()
    for name, ours in result.metrics.items():
        if name in baseline.metrics:
            theirs = baseline.metrics[name]
            value, bounds = _change(result.differences, name, ours, theirs)
            kept = percent(result.retention[name]) if name in result.retention else NO_VALUE
            drawn.add((named(name, 60), number(theirs), signed(value), signed_span(bounds), kept), value, bounds)
    columns = ("metric", "baseline", "difference", "95 % interval", "retention")
    return drawn.table(_against_title(baseline), columns, DIFFERENCE_HINT, zero=True)


def _change(
    differences: Mapping[str, Noisy], name: str, ours: float | None, theirs: float | None
) -> tuple[float | None, Interval | None]:
    """A difference and its interval; of values whose noise nobody knows, such as `ece`, the bare difference."""
    if name in differences:
        return differences[name].value, differences[name].confidence_95
    a, b = finite(ours), finite(theirs)
    return (None if a is None or b is None else a - b), None


CHANCE_HINT = "Chance: what the best answer that is the same for all examples scores."
DIFFERENCE_HINT = "Difference: this model minus the baseline. An interval that contains 0 is within the noise."


def _against_title(baseline: Baseline | ProbeBaseline) -> str:
    return f"Against {named(baseline.model, 80)}"


def _perturbed_table(result: EvalResult) -> ResultTable:
    drawn = _Drawn()
    for change, scores in items_of(result.perturbed):
        for name, value in items_of(scores.metrics):
            by, bounds = _change(scores.differences, name, value, result.metrics.get(name))
            same = percent(scores.agreement)
            cells = (named(change, 40), named(name, 60), number(value), signed(by), signed_span(bounds), same)
            drawn.add(cells, by, bounds)
    columns = ("change", "metric", "value", "difference", "95 % interval", "same answers")
    hint = "Difference: changed texts minus the unchanged ones, same examples. Same answers: share that did not change."
    return drawn.table("With changed texts", columns, hint, zero=True, n_text=2)


def _probe_tables(result: ProbeResult) -> list[ResultTable]:
    drawn, baselines = _Drawn(), baselines_of(result)
    only = baselines[0] if len(baselines) == 1 else ProbeBaseline()  # of several none is drawn beside the value
    for task, row in items_of(result.tasks):
        deviation = finite(row.deviation)
        mean = number(row.mean) + ("" if deviation is None else f" ± {bound(deviation, up=True)}")
        scored = (named(task, 60), named(row.metric, 40), mean, by_chance(row.chance))
        cells = (*scored, span(row.confidence_95), count(row.n_examples))
        drawn.add(cells, row.mean, row.confidence_95, only.tasks.get(task, TaskScore()).mean)
    if found := result.mean:
        cells = ("mean of tasks", "", number(found.value), by_chance(result.chance), span(found.confidence_95), "")
        drawn.add(cells, found.value, found.confidence_95, (only.mean or Noisy()).value)
    hint = "Mean ± standard deviation over the seeds; the interval also includes the noise of the examples."
    hint += f" {CHANCE_HINT}" if result.chance is not None else ""
    shown = drawn.table("Tasks", ("task", "metric", "mean", "chance", "95 % interval", "examples"), hint, n_text=2)
    return [shown, *(_probe_against(result, one) for one in baselines), *layer_tables(result)]


def _probe_against(result: ProbeResult, baseline: ProbeBaseline) -> ResultTable:
    drawn = _Drawn()
    for task in [*result.tasks, "mean"]:
        theirs, change = baseline.tasks.get(task, TaskScore()).mean, baseline.differences.get(task)
        label = named(task, 60)
        if task == "mean" and task not in result.tasks:
            theirs, label = (baseline.mean or Noisy()).value, "mean of tasks"
        if change or finite(theirs) is not None:
            value, bounds = (change or Noisy()).value, (change or Noisy()).confidence_95
            drawn.add((label, number(theirs), signed(value), signed_span(bounds)), value, bounds)
    columns = ("task", "baseline", "difference", "95 % interval")
    return drawn.table(_against_title(baseline), columns, DIFFERENCE_HINT, zero=True)


def layers_of(one: ProbeResult | ProbeBaseline) -> dict[str, dict[int, LayerScore]]:
    """The rows of each layer by task, for the tasks that have any."""
    found = {}
    for task, scores in items_of(one.tasks):
        layers = [(row.layer, row) for row in (scores.layers or ())[:MAX_ROWS]]
        if rows := {layer: row for layer, row in layers if layer is not None and 0 <= layer < 1e6}:
            found[task] = rows
    return found


def layer_tables(result: ProbeResult) -> list[ResultTable]:
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


def _cell(row: LayerScore | None) -> str:
    return NO_VALUE if row is None else number(row.mean)


def _compare_tables(result: Comparison) -> list[ResultTable]:
    exact: list[tuple[str, ...]] = [
        (named(row.name, 60), quantity(row, row.old), quantity(row, row.new), exact_change(row))
        for row in result.sizes[:MAX_ROWS]
    ]
    hint = "Change: new minus old. Moved: the interval of the change does not contain 0."
    measured = _moves_table("Tasks" if result.kind == "probe" else "Metrics", result.rows, hint)
    times = _latency_table(result.latency)
    return [measured, times, ResultTable("Size and sparsity", ("name", "old", "new", "change"), exact)]


def _several_tables(result: Comparisons) -> list[ResultTable]:
    """The first result, and below it the others with what is different, name after name."""
    pairs = shown_of(result)
    hint = "Change: from the first of the results. Moved: the interval of the change does not contain 0."
    title = "Tasks" if result.kind == "probe" else "Metrics"
    metrics = _several(title, result, [[(row, _move_cells(row)) for row in one.rows] for one in pairs], hint)
    times = _several("Latency", result, [[(row, _time_cells(row)) for row in one.latency] for one in pairs])
    names = list(dict.fromkeys(row.name for one in pairs for row in one.sizes))[:MAX_ROWS]
    exact: list[tuple[str, ...]] = []
    for name in names:
        known = [(one.new, row) for one in pairs for row in one.sizes if row.name == name]
        exact.append((named(name, 60), named(result.baseline, 60), quantity(known[0][1], known[0][1].old), ""))
        exact += [(named(name, 60), named(new, 60), quantity(row, row.new), exact_change(row)) for new, row in known]
    columns = ("name", "result", "value", "change")
    return [metrics, times, ResultTable("Size and sparsity", columns, exact[:MAX_ROWS], n_text=2)]


def _several(
    title: str, result: Comparisons, by_pair: Sequence[Sequence[tuple[Moved, tuple[str, ...]]]], hint: str = ""
) -> ResultTable:
    """What moved in each of several results, given with its cells: name, old, new, change, interval, moved."""
    names = [one.new for one in shown_of(result)]
    known = [(new, *one) for new, rows in zip(names, by_pair, strict=True) for one in rows]
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(row.name for _, row, _ in known):
        mine = [(new, cells) for new, row, cells in known if row.name == name]
        rows.append((mine[0][1][0], named(result.baseline, 60), mine[0][1][1], "", "", ""))
        rows += [(cells[0], named(new, 60), *cells[2:]) for new, cells in mine]
    columns = ("name", "result", "value", *MOVES[3:])
    return ResultTable(title, columns, rows[:MAX_ROWS], hint, n_text=2)


def _moves_table(title: str, rows: Sequence[Moved], hint: str = "") -> ResultTable:
    drawn = _Drawn()
    for row in rows[:MAX_ROWS]:
        drawn.add(_move_cells(row), row.change, row.interval)
    return drawn.table(title, MOVES, hint, zero=True)


MOVES = ("name", "old", "new", "change", "95 % interval", "moved")


def _move_cells(row: Moved) -> tuple[str, ...]:
    cells = (named(row.name, 60), number(row.old), number(row.new), signed(row.change))
    return (*cells, signed_span(row.interval), moved(row))


def _latency_table(rows: Sequence[Moved]) -> ResultTable:
    return ResultTable("Latency", MOVES, [_time_cells(row) for row in rows[:MAX_ROWS]])


def _time_cells(row: Moved) -> tuple[str, ...]:
    """Times with their unit, which a metric has not."""
    cells = (named(row.name, 60), milliseconds(row.old), milliseconds(row.new))
    low_high = [signed(end, significant(end)) for end in ends(row.interval) or ()]
    between = f"[{', '.join(low_high)}]" if low_high else NO_VALUE
    return (*cells, signed(row.change, milliseconds(row.change)), between, moved(row))


def moved(row: Moved) -> str:
    """Whether a value moved beyond the noise, and where to."""
    if row.moved:
        change = finite(row.change)
        return "yes" if not change else "yes, up" if change > 0 else "yes, down"
    return "unknown" if row.moved is None else "no"


def quantity(row: Counted, value: float | None) -> str:
    """A size in bytes, or a share."""
    return byte_size(value) if str(row.name).endswith("_bytes") else percent(value)


def exact_change(row: Counted) -> str:
    """The change of a size or share, the latter in points of percent."""
    change = finite(row.change)
    if change is None:
        return NOT_MEASURED
    if not change:
        return "none"
    return ("+" if change > 0 else "-") + quantity(row, abs(change)).replace(" %", " points")
