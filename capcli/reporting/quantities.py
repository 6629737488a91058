"""The figures of a result, one after the other, each with what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from capcli.records.codec import to_json
from capcli.records.measured import (
    Baseline,
    Comparison,
    Comparisons,
    EvalResult,
    ProbeBaseline,
    ProbeResult,
    Result,
    TaskScore,
)
from capcli.records.parts import Gate, Interval, Noisy
from capcli.reporting.run_page import MAX_ROWS, other_splits
from capcli.stored import finite

T = TypeVar("T")
MAX_BASELINES = 20


def ends(bounds: Interval | None) -> Interval | None:
    """(low, high) of an interval, None unless both are finite."""
    return bounds if bounds and all(map(math.isfinite, bounds)) else None


def items_of(data: Mapping[str, T]) -> list[tuple[str, T]]:
    """The items of a mapping, no more than rows of any table."""
    return list(data.items())[:MAX_ROWS]


# --------------------------------------------------------------------------------------------------------------- values


@dataclass(frozen=True, kw_only=True)
class Value:
    """One number of a result with its noise and what it is compared with; what is not known is None.

    kind: metric, mean, layer, perturbed, agreement, retention, sparsity, size, latency or gate. `difference` is the
    value minus that of the baseline; for `perturbed` the baseline is the same model on unchanged texts.
    """

    kind: str
    name: str | None
    model: str | None = None
    task: str | None = None
    split: str | None = None
    layer: int | None = None
    value: float | None = None
    interval: Interval | None = None
    deviation: float | None = None
    chance: float | None = None
    examples: int | None = None
    baseline: str | None = None
    baseline_value: float | None = None
    baseline_interval: Interval | None = None
    difference: float | None = None
    difference_interval: Interval | None = None
    moved: bool | None = None
    limit: float | None = None
    passed: bool | None = None


def values(result: Result) -> list[Value]:
    """Every number of a result, in reading order."""
    if isinstance(result, EvalResult):
        return [*_eval_values(result), *_gate_values(result.gates, result.model)]
    if isinstance(result, ProbeResult):
        return [*_probe_values(result), *_gate_values(result.gates, result.model)]
    if isinstance(result, Comparisons):
        return [value for one in shown_of(result) for value in values(one)]
    return [*_compare_values(result), *_gate_values(result.gates, result.new)]


def shown_of(result: Comparisons) -> tuple[Comparison, ...]:
    """The comparisons of a result, at most `MAX_BASELINES`."""
    return result.comparisons[:MAX_BASELINES]


def _gate_values(gates: Sequence[Gate], model: str | None) -> list[Value]:
    return [
        Value(
            kind="gate", model=model, name=gate.name, value=gate.value, interval=gate.interval, limit=gate.limit,
            passed=gate.passed,
        )
        for gate in gates[:MAX_ROWS]
    ]  # fmt: skip


def _eval_values(result: EvalResult) -> list[Value]:
    baseline = result.baseline
    examples = result.n_examples
    about: dict[str, Any] = {"model": result.model, "task": result.task, "split": result.split, "examples": examples}
    found = [
        Value(
            kind="metric", name=name, value=value, interval=result.confidence_95.get(name),
            chance=result.chance.get(name), **about,
            **_against(baseline.model, baseline, result.differences, name) if baseline else {},
        )
        for name, value in items_of(result.metrics)
    ]  # fmt: skip
    for other, scores in other_splits(result.splits, result.split):
        here = {**about, "split": other, "examples": scores.n_examples}
        found += [
            Value(
                kind="metric", name=name, value=value, interval=scores.confidence_95.get(name),
                chance=scores.chance.get(name), **here,
            )
            for name, value in items_of(scores.metrics)
        ]  # fmt: skip
    found += _perturbed_values(result, about)
    if baseline:
        to = {**about, "baseline": baseline.model}
        found.append(Value(kind="agreement", name="agreement", value=result.agreement, **to))
        found += [Value(kind="retention", name=name, value=v, **to) for name, v in items_of(result.retention)]
    return [*found, *_sizes_and_times(result)]


def _against(
    model: str | None, other: EvalResult | Baseline, differences: Mapping[str, Noisy], name: str
) -> dict[str, Any]:
    """The columns that compare the metric `name` with that of a baseline."""
    change = differences.get(name, Noisy())
    return {
        "baseline": model,
        "baseline_value": other.metrics.get(name),
        "baseline_interval": other.confidence_95.get(name),
        "difference": change.value,
        "difference_interval": change.confidence_95,
    }


def _perturbed_values(result: EvalResult, about: Mapping[str, Any]) -> list[Value]:
    found = []
    for change, scores in items_of(result.perturbed):
        found += [
            Value(
                kind="perturbed", name=f"{name}@{change}", value=value, interval=scores.confidence_95.get(name),
                chance=result.chance.get(name), **about,
                **_against("unchanged texts", result, scores.differences, name),
            )
            for name, value in items_of(scores.metrics)
        ]  # fmt: skip
        found.append(Value(kind="agreement", name=f"agreement@{change}", value=scores.agreement, **about))
    return found


def _sizes_and_times(result: EvalResult | ProbeResult) -> list[Value]:
    model, latency, size = result.model, result.latency, result.size
    shares = to_json(result.sparsity) if isinstance(result, EvalResult) else None
    found = [Value(kind="sparsity", name=name, value=value, model=model) for name, value in (shares or {}).items()]
    counted = {name: value for name, value in to_json(size).items() if finite(value) is not None}
    found += [Value(kind="size", name=name, value=value, model=model) for name, value in counted.items()]
    for name in ("median_ms", "p10_ms", "p90_ms") if latency else ():
        bounds = latency.confidence_95 if latency and name == "median_ms" else None
        found.append(Value(kind="latency", name=name, value=getattr(latency, name), interval=bounds, model=model))
    if latency and (own := latency.own_lengths):
        found += [
            Value(kind="latency", name=f"own_lengths.{name}", value=getattr(own, name), model=model)
            for name in ("median_ms", "p95_ms")
        ]
    if latency and latency.throughput:
        rate = latency.throughput.texts_per_second
        found.append(Value(kind="latency", name="throughput.texts_per_second", value=rate, model=model))
    return found


def baselines_of(result: ProbeResult) -> tuple[ProbeBaseline, ...]:
    """The baselines of a result of probe, at most `MAX_BASELINES`."""
    return result.baselines[:MAX_BASELINES]


def _probe_values(result: ProbeResult) -> list[Value]:
    baselines = baselines_of(result)
    found = []
    for task, row in items_of(result.tasks):
        found += _task_values(result, task, row)
    for baseline in baselines or (ProbeBaseline(),):
        mean, other = result.mean or Noisy(), baseline.mean or Noisy()
        change = baseline.differences.get("mean", Noisy())
        found.append(
            Value(
                kind="mean", name="mean", model=result.model, value=mean.value, interval=mean.confidence_95,
                chance=result.chance,
                baseline=baseline.model, baseline_value=other.value, baseline_interval=other.confidence_95,
                difference=change.value, difference_interval=change.confidence_95,
            )
        )  # fmt: skip
    found += _layer_values(result) + [value for baseline in baselines for value in _layer_values(baseline)]
    return [*found, *_sizes_and_times(result)]


def _task_values(result: ProbeResult, task: str, row: TaskScore) -> list[Value]:
    """The value of one task, once for each baseline."""
    found = []
    for baseline in baselines_of(result) or (ProbeBaseline(),):
        other, change = baseline.tasks.get(task, TaskScore()), baseline.differences.get(task, Noisy())
        found.append(
            Value(
                kind="metric", name=row.metric, model=result.model, task=task, split=row.split, value=row.mean,
                interval=row.confidence_95, deviation=row.deviation, chance=row.chance, examples=row.n_examples,
                baseline=baseline.model,
                baseline_value=other.mean, baseline_interval=other.confidence_95, difference=change.value,
                difference_interval=change.confidence_95,
            )
        )  # fmt: skip
    return found


def _layer_values(one: ProbeResult | ProbeBaseline) -> list[Value]:
    return [
        Value(
            kind="layer", name=row.metric, model=one.model, task=task, layer=layer.layer, split=row.split,
            value=layer.mean, interval=layer.confidence_95, deviation=layer.deviation, chance=row.chance,
            examples=row.n_examples,
        )
        for task, row in items_of(one.tasks)
        for layer in (row.layers or ())[:MAX_ROWS]
    ]  # fmt: skip


def _compare_values(result: Comparison) -> list[Value]:
    about: dict[str, Any] = {"model": result.new, "task": result.task, "split": result.split, "baseline": result.old}
    kinds = {"metric": result.rows, "latency": result.latency}
    moves = {
        kind: [
            Value(
                kind=kind, name=row.name, value=row.new, interval=row.new_confidence_95, baseline_value=row.old,
                baseline_interval=row.old_confidence_95, difference=row.change, difference_interval=row.interval,
                moved=row.moved, **about,
            )
            for row in rows[:MAX_ROWS]
        ]
        for kind, rows in kinds.items()
    }  # fmt: skip
    sizes = [
        Value(kind="size", name=row.name, value=row.new, baseline_value=row.old, difference=row.change, **about)
        for row in result.sizes[:MAX_ROWS]
    ]
    return [*moves["metric"], *sizes, *moves["latency"]]
