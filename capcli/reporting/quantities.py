"""The figures of a result, one after the other, each with what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from capcli.reporting.run_page import MAX_ROWS, other_splits
from capcli.stored import finite, mapping, part, sequence

Data = Mapping[str, Any]
NO_INTERVAL = "–"
MAX_BASELINES = 20
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
    parts = {"own_lengths": ("median_ms", "p95_ms"), "throughput": ("texts_per_second",)}
    for section, names in parts.items():
        one = part(latency, section)
        for name in names if one else ():
            found.append(Value(kind="latency", name=f"{section}.{name}", value=one.get(name), model=model))
    return found


def baselines_of(result: Data) -> list[Data]:
    """The baselines of a result of probe, at most `MAX_BASELINES`."""
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
