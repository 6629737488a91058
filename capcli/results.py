"""What the results of `eval`, `probe` and `--compare` say: rows of numbers, and tables of text.

Every document of a result is made of these, so that all of them say the same. `command` is "eval", "probe" or
"compare"; the layouts of the results stand in docs/reference/report.md, and any part of a result may be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from capcli import figures
from capcli.page import MAX_ROWS, Row, other_splits
from capcli.text import (
    NOT_MEASURED,
    bound,
    byte_size,
    count,
    counted,
    finite,
    interval,
    mapping,
    milliseconds,
    named,
    number,
    part,
    percent,
    plain,
    sequence,
    significant,
)

Data = Mapping[str, Any]
NO_INTERVAL = "–"
MAX_BASELINES = 20
TASKS_ACROSS = 6  # columns of a table of layers, so that it fits a terminal of 80
Ends = tuple[float, float]


def ends(bounds: Any) -> Ends | None:
    """(low, high) of a stored interval, None unless both are finite."""
    found = [value for value in map(finite, sequence(bounds)) if value is not None]
    return (found[0], found[1]) if len(found) == 2 == len(sequence(bounds)) else None


def rows_of(data: Any) -> list[Data]:
    """A list of mappings, no longer than any table."""
    return [mapping(row) for row in sequence(data)[:MAX_ROWS]]


def items_of(data: Any) -> list[tuple[str, Any]]:
    """The items of a mapping, no more than rows of any table."""
    return list(mapping(data).items())[:MAX_ROWS]


# --------------------------------------------------------------------------------------------------------------- values


@dataclass(frozen=True, kw_only=True)
class Value:
    """One number of a result with its noise and what it is compared with; what is not known is None.

    kind: metric, mean, layer, perturbed, agreement, retention, sparsity, size, latency or gate. `difference` is the
    value minus that of the baseline; for `perturbed` the baseline is the same model on unchanged texts.
    """

    kind: str
    name: Any
    model: Any = None
    task: Any = None
    split: Any = None
    layer: Any = None
    value: Any = None
    interval: Any = None
    deviation: Any = None
    examples: Any = None
    baseline: Any = None
    baseline_value: Any = None
    baseline_interval: Any = None
    difference: Any = None
    difference_interval: Any = None
    moved: Any = None
    limit: Any = None
    passed: Any = None


def values(command: str, result: Data) -> list[Value]:
    """Every number of a result, in reading order."""
    found: Callable[[Data], list[Value]] = {
        "eval": _eval_values,
        "probe": _probe_values,
        "compare": _compare_values,
    }[command]
    result = mapping(result)
    model = result.get("new" if command == "compare" else "model")
    return [*found(result), *_gate_values(result, model)]


def _gate_values(result: Data, model: Any) -> list[Value]:
    return [
        Value(
            kind="gate", model=model, name=gate.get("name"), value=gate.get("value"), interval=gate.get("interval"),
            limit=gate.get("limit"), passed=gate.get("passed") is True,
        )
        for gate in rows_of(result.get("gates"))
    ]  # fmt: skip


def _eval_values(result: Data) -> list[Value]:
    model, task, split = (result.get(key) for key in ("model", "task", "split"))
    baseline = part(result, "baseline")
    about = {"model": model, "task": task, "split": split, "examples": result.get("n_examples")}
    found = [
        Value(
            kind="metric", name=name, value=value, interval=part(result, "confidence_95").get(name), **about,
            **_against(baseline.get("model"), baseline, part(result, "differences"), name) if baseline else {},
        )
        for name, value in items_of(result.get("metrics"))
    ]  # fmt: skip
    for other, data in other_splits(result):
        here = {**about, "split": other, "examples": data.get("n_examples")}
        bounds = part(data, "confidence_95")
        found += [
            Value(kind="metric", name=name, value=value, interval=bounds.get(name), **here)
            for name, value in items_of(data.get("metrics"))
        ]
    found += _perturbed_values(result, about)
    if baseline:
        to = {**about, "baseline": baseline.get("model")}
        found.append(Value(kind="agreement", name="agreement", value=result.get("agreement"), **to))
        found += [Value(kind="retention", name=name, value=v, **to) for name, v in items_of(result.get("retention"))]
    return [*found, *_sizes_and_times(result, model)]


def _against(model: Any, other: Data, differences: Data, name: str) -> dict[str, Any]:
    """The columns that compare the metric `name` with that of a baseline."""
    change = part(differences, name)
    return {
        "baseline": model,
        "baseline_value": part(other, "metrics").get(name),
        "baseline_interval": part(other, "confidence_95").get(name),
        "difference": change.get("value"),
        "difference_interval": change.get("confidence_95"),
    }


def _perturbed_values(result: Data, about: Data) -> list[Value]:
    plainly = {"metrics": result.get("metrics"), "confidence_95": result.get("confidence_95")}
    found = []
    for change, data in items_of(result.get("perturbed")):
        bounds, differences = part(data, "confidence_95"), part(data, "differences")
        found += [
            Value(
                kind="perturbed", name=f"{name}@{change}", value=value, interval=bounds.get(name), **about,
                **_against("unchanged texts", plainly, differences, name),
            )
            for name, value in items_of(mapping(data).get("metrics"))
        ]  # fmt: skip
        agreement = mapping(data).get("agreement")
        found.append(Value(kind="agreement", name=f"agreement@{change}", value=agreement, **about))
    return found


def _sizes_and_times(result: Data, model: Any) -> list[Value]:
    latency = part(result, "latency")
    found = [Value(kind="sparsity", name=name, value=v, model=model) for name, v in items_of(result.get("sparsity"))]
    for name, value in items_of(result.get("size")):
        if finite(value) is not None:
            found.append(Value(kind="size", name=name, value=value, model=model))
    for name in ("median_ms", "p10_ms", "p90_ms") if latency else ():
        bounds = latency.get("confidence_95") if name == "median_ms" else None
        found.append(Value(kind="latency", name=name, value=latency.get(name), interval=bounds, model=model))
    return found


def baselines_of(result: Data) -> list[Data]:
    return rows_of(result.get("baselines"))[:MAX_BASELINES]


def _probe_values(result: Data) -> list[Value]:
    baselines = baselines_of(result)
    found = []
    for task, row in items_of(result.get("tasks")):
        found += _task_values(result, task, mapping(row))
    for baseline in baselines or [{}]:
        mean, other = part(result, "mean"), part(baseline, "mean")
        change = part(baseline, "differences", "mean")
        found.append(
            Value(
                kind="mean", name="mean", model=result.get("model"), value=mean.get("value"),
                interval=mean.get("confidence_95"), baseline=baseline.get("model"), baseline_value=other.get("value"),
                baseline_interval=other.get("confidence_95"), difference=change.get("value"),
                difference_interval=change.get("confidence_95"),
            )
        )  # fmt: skip
    found += _layer_values(result) + [value for baseline in baselines for value in _layer_values(baseline)]
    return [*found, *_sizes_and_times(result, result.get("model"))]


def _task_values(result: Data, task: str, row: Data) -> list[Value]:
    """The value of one task, once for each baseline."""
    found = []
    for baseline in baselines_of(result) or [{}]:
        other, change = part(baseline, "tasks", task), part(baseline, "differences", task)
        found.append(
            Value(
                kind="metric", name=row.get("metric"), model=result.get("model"), task=task, split=row.get("split"),
                value=row.get("mean"), interval=row.get("confidence_95"), deviation=row.get("deviation"),
                examples=row.get("n_examples"), baseline=baseline.get("model"), baseline_value=other.get("mean"),
                baseline_interval=other.get("confidence_95"), difference=change.get("value"),
                difference_interval=change.get("confidence_95"),
            )
        )  # fmt: skip
    return found


def _layer_values(one: Data) -> list[Value]:
    return [
        Value(
            kind="layer", name=mapping(row).get("metric"), model=one.get("model"), task=task, layer=layer.get("layer"),
            split=mapping(row).get("split"), value=layer.get("mean"), interval=layer.get("confidence_95"),
            deviation=layer.get("deviation"), examples=mapping(row).get("n_examples"),
        )
        for task, row in items_of(one.get("tasks"))
        for layer in rows_of(mapping(row).get("layers"))
    ]  # fmt: skip


def _compare_values(result: Data) -> list[Value]:
    kinds = {"metric": result.get("rows"), "size": result.get("sizes"), "latency": result.get("latency")}
    return [
        Value(
            kind=kind, name=row.get("name"), model=result.get("new"), task=result.get("task"),
            split=result.get("split"), value=row.get("new"), interval=row.get("new_confidence_95"),
            baseline=result.get("old"), baseline_value=row.get("old"), baseline_interval=row.get("old_confidence_95"),
            difference=row.get("change"), difference_interval=row.get("interval"), moved=row.get("moved"),
        )
        for kind, rows in kinds.items()
        for row in rows_of(rows)
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- facts


def title(command: str, result: Data) -> str:
    """One line that says what the result is about."""
    if command == "compare":
        return f"{named(result.get('old'), 100)} → {named(result.get('new'), 100)}"
    model = named(result.get("model"), 120)
    return f"{model} on {named(result.get('task'), 60)}" if command == "eval" else f"{model}, probed"


def facts(command: str, result: Data) -> list[Row]:
    """What was measured and under which conditions, as (label, text)."""
    found: Callable[[Data], list[Row]] = {"eval": eval_rows, "probe": probe_rows, "compare": compare_rows}[command]
    return found(mapping(result))


def eval_rows(result: Data) -> list[Row]:
    """The facts of one evaluation."""
    latency, baseline = part(result, "latency"), part(result, "baseline")
    rows = [
        ("model", named(result.get("model"))),
        ("task", f"{named(result.get('task'))}, {named(result.get('split'))}"),
        ("examples", count(result.get("n_examples"))),
    ]
    if sparsity := part(result, "sparsity"):
        whole = percent(sparsity.get("whole_model"))
        rows.append(("sparsity", f"{percent(sparsity.get('achieved'))} (whole model {whole})"))
    rows += _size_rows(part(result, "size"))
    if latency:
        rows.append(("latency", _latency(latency)))
    if baseline:
        rows.append(("baseline", named(baseline.get("model"))))
    if finite(result.get("agreement")) is not None:
        rows.append(("agreement", f"{percent(result['agreement'])} of the examples answered as by the baseline"))
    return rows


def _size_rows(size: Data) -> list[Row]:
    labels = {"artifact_bytes": "artefact", "weights_bytes": "weights"}
    return [(label, byte_size(size[key])) for key, label in labels.items() if finite(size.get(key)) is not None]


def _latency(latency: Data) -> str:
    """Median and spread, and the circumstances without which they mean nothing."""
    bounds = ends(latency.get("confidence_95"))
    noise = f", 95 % interval {' to '.join(map(significant, bounds))}" if bounds else ""
    p10, p90 = (milliseconds(latency.get(key)) for key in ("p10_ms", "p90_ms"))
    where = [f"{key} {named(latency.get(key), 60)}" for key in ("batch", "length")]
    where.append(counted(latency.get("threads"), "thread"))
    what = [named(latency[key], 60) for key in ("device", "hardware", "precision") if latency.get(key)]
    median = milliseconds(latency.get("median_ms"))
    return f"{median} ({p10.removesuffix(' ms')} to {p90}{noise}) at {', '.join([*where, *what])}"


def probe_rows(result: Data) -> list[Row]:
    """The facts of one probing."""
    rows = [("model", named(result.get("model")))]
    rows += [(key, named(result[key], 80)) for key in ("probe", "layer", "pooling", "seeds") if result.get(key)]
    rows += _size_rows(part(result, "size"))
    if latency := part(result, "latency"):
        rows.append(("latency", _latency(latency)))
    if result.get("sha256"):
        rows.append(("sha256", named(result["sha256"], 64)))
    return [*rows, *(("baseline", named(baseline.get("model"))) for baseline in baselines_of(result))]


def compare_rows(result: Data) -> list[Row]:
    """The facts of one comparison."""
    rows = [("old", named(result.get("old"), 400)), ("new", named(result.get("new"), 400))]
    if result.get("task"):
        rows.append(("task", f"{named(result['task'])}, {named(result.get('split'))}"))
    return rows + ([("examples", count(result["n_examples"]))] if result.get("n_examples") else [])


def notes(result: Data) -> list[str]:
    return [plain(note, 400) for note in sequence(result.get("notes"))[:MAX_ROWS]]


# ---------------------------------------------------------------------------------------------------------------- gates


@dataclass(frozen=True)
class Gate:
    """A gate as text; `found` is the sentence that says what was measured, with its noise, against which limit."""

    name: str
    passed: bool
    condition: str
    measured: str
    found: str

    @property
    def outcome(self) -> str:
        return "passed" if self.passed else "failed"


def gate(data: Any) -> Gate:
    row = mapping(data)
    condition = f"{named(row.get('metric'), 80)} {named(row.get('op'), 10)} {_exact(row.get('limit'))}"
    measured = _exact(row.get("value"))
    message = plain(row.get("message") or "", 400) or f"{condition}, measured {measured}"
    return Gate(named(row.get("name"), 120), row.get("passed") is True, condition, measured, message)


def gates_of(result: Data) -> list[Gate]:
    return [gate(row) for row in sequence(mapping(result).get("gates"))[:MAX_ROWS]]


def verdict(result: Data) -> str:
    """How many gates failed, as a sentence without its end."""
    found = gates_of(result)
    failed = sum(not one.passed for one in found)
    if not found:
        return "No gate was set"
    if failed:
        return f"{failed} of {len(found)} gates failed" if len(found) > 1 else "The gate failed"
    return f"All {len(found)} gates passed" if len(found) > 1 else "The gate passed"


def _exact(value: Any) -> str:
    """A number with all the digits a gate compares."""
    real = finite(value)
    return NOT_MEASURED if real is None else f"{real:.10g}"


# --------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """A table of text, of whose columns the first `n_text` are words; with `strips` one small drawing per row."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    hint: str = ""
    strips: figures.Strips | None = None
    n_text: int = 1


@dataclass
class _Drawn:
    """Rows of a table as they are collected, with the numbers to draw beside them."""

    rows: list[tuple[str, ...]] = field(default_factory=list)
    marks: list[figures.Mark] = field(default_factory=list)

    def add(self, cells: Sequence[str], value: Any, bounds: Any, other: Any = None) -> None:
        self.rows.append(tuple(cells))
        self.marks.append(figures.Mark(finite(value), ends(bounds), finite(other)))

    def table(
        self, title: str, columns: Sequence[str], hint: str = "", *, zero: bool = False, n_text: int = 1
    ) -> Table:
        drawn = figures.strips(self.marks[:MAX_ROWS], zero=zero)
        return Table(title, tuple(columns), self.rows[:MAX_ROWS], hint, drawn, n_text)


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


def tables(command: str, result: Data) -> list[Table]:
    """The tables of a result in reading order, none of them empty."""
    found: Callable[[Data], list[Table]] = {
        "eval": _eval_tables,
        "probe": _probe_tables,
        "compare": _compare_tables,
    }[command]
    return [table for table in found(mapping(result)) if table.rows]


def _eval_tables(result: Data) -> list[Table]:
    drawn, theirs = _Drawn(), part(result, "baseline", "metrics")
    for name, value in items_of(result.get("metrics")):
        bounds = part(result, "confidence_95").get(name)
        drawn.add((named(name, 60), number(value), span(bounds)), value, bounds, theirs.get(name))
    for split, data in other_splits(result):
        for name, value in items_of(data.get("metrics")):
            bounds = part(data, "confidence_95").get(name)
            drawn.add((f"{named(name, 60)} ({named(split, 60)})", number(value), span(bounds)), value, bounds)
    metrics = drawn.table("Metrics", ("metric", "value", "95 % interval"))
    return [metrics, _baseline_table(result), _perturbed_table(result)]


def _baseline_table(result: Data) -> Table:
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


DIFFERENCE_HINT = "Difference: this model minus the baseline. An interval that holds 0 is within the noise."


def _against_title(baseline: Data) -> str:
    return f"Against {named(baseline.get('model'), 80)}"


def _perturbed_table(result: Data) -> Table:
    drawn = _Drawn()
    for change, data in items_of(result.get("perturbed")):
        for name, value in items_of(mapping(data).get("metrics")):
            by, bounds = _change(part(data, "differences"), name, value, part(result, "metrics").get(name))
            same = percent(mapping(data).get("agreement"))
            cells = (named(change, 40), named(name, 60), number(value), signed(by), signed_span(bounds), same)
            drawn.add(cells, by, bounds)
    columns = ("change", "metric", "value", "difference", "95 % interval", "same answers")
    hint = "Difference: changed texts minus the unchanged ones, same examples. Same answers: as without the change."
    return drawn.table("With changed texts", columns, hint, zero=True, n_text=2)


def _probe_tables(result: Data) -> list[Table]:
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
    hint = "Mean ± standard deviation over the seeds; the interval also holds the noise of the examples."
    shown = drawn.table("Tasks", ("task", "metric", "mean", "95 % interval", "examples"), hint, n_text=2)
    return [shown, *(_probe_against(result, one) for one in baselines), *layer_tables(result)]


def _probe_against(result: Data, baseline: Data) -> Table:
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


def layer_tables(result: Data) -> list[Table]:
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
        found.append(Table("Layers", ("layer", *(named(name, 40) for name in across)), rows))
    return found


def _cell(row: Data | None) -> str:
    return NO_INTERVAL if row is None else number(row.get("mean"))


def _compare_tables(result: Data) -> list[Table]:
    exact = [
        (named(row.get("name"), 60), *(quantity(row, row.get(key)) for key in ("old", "new")), exact_change(row))
        for row in rows_of(result.get("sizes"))
    ]
    hint = "Change: new minus old. Moved: 0 is outside of the interval of the change."
    measured = _moves_table("Tasks" if result.get("kind") == "probe" else "Metrics", result.get("rows"), hint)
    latency = _latency_table(result.get("latency"))
    return [measured, latency, Table("Size and sparsity", ("name", "old", "new", "change"), exact)]


def _moves_table(title: str, rows: Any, hint: str = "") -> Table:
    drawn = _Drawn()
    for row in rows_of(rows):
        change, bounds = row.get("change"), row.get("interval")
        cells = (named(row.get("name"), 60), number(row.get("old")), number(row.get("new")), signed(change))
        drawn.add((*cells, signed_span(bounds), moved(row)), change, bounds)
    return drawn.table(title, MOVES, hint, zero=True)


MOVES = ("name", "old", "new", "change", "95 % interval", "moved")


def _latency_table(rows: Any) -> Table:
    """Times with their unit, which a metric has not."""
    found: list[tuple[str, ...]] = []
    for row in rows_of(rows):
        change, bounds = row.get("change"), ends(row.get("interval"))
        cells = (named(row.get("name"), 60), milliseconds(row.get("old")), milliseconds(row.get("new")))
        low_high = [signed(end, significant(end)) for end in bounds or ()]
        between = f"[{', '.join(low_high)}]" if bounds else NO_INTERVAL
        found.append((*cells, signed(change, milliseconds(change)), between, moved(row)))
    return Table("Latency", MOVES, found)


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
