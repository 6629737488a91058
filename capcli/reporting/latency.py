"""Latency as text and bars: of models side by side, and by what, where and on what it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from capcli.reporting.text import NOT_MEASURED, count, counted, milliseconds, named, significant
from capcli.stored import finite, part

RUNTIMES = {"torch": "PyTorch", "onnx": "onnxruntime", "sparse": "the sparse runtime of cap"}

Models = Mapping[str, Mapping[str, Any]]  # what results say of the latency of each model


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure of every model; of each its share of the largest, in per cent, as the length of a bar."""

    label: str
    values: dict[str, str]
    shares: dict[str, float | None]


def lines(models: Models) -> list[Line]:
    """The four figures, those that no model has left out."""
    first = next(iter(models.values()), {})
    own, batches = part(first, "own_lengths"), part(first, "throughput")
    size = f"{counted(first.get('batch'), 'input')} of {counted(first.get('length'), 'token')}"
    texts = f"{counted(own.get('texts'), 'text')} one by one"
    found = [
        _line(f"{size}, median", models, ("median_ms",)),
        _line(f"{texts}, median", models, ("own_lengths", "median_ms")),
        _line(f"{texts}, 95th percentile", models, ("own_lengths", "p95_ms")),
        _line(f"texts per second, {count(batches.get('batch'))} at once", models, ("throughput", "texts_per_second")),
    ]
    return [line for line in found if any(share is not None for share in line.shares.values())]


def _line(label: str, models: Models, keys: tuple[str, ...]) -> Line:
    known = {name: finite(part(one, *keys[:-1]).get(keys[-1])) for name, one in models.items()}
    write = milliseconds if keys[-1].endswith("_ms") else _rate
    largest = max((value for value in known.values() if value), default=0.0)
    shares = {
        name: None if value is None or not largest else round(max(0.0, 100 * value / largest), 2)
        for name, value in known.items()
    }
    return Line(label=label, values={name: write(value) for name, value in known.items()}, shares=shares)


def _rate(value: float | None) -> str:
    return NOT_MEASURED if value is None else significant(value)


def conditions(models: Models) -> str:
    """What ran the models and where; of models that differ in that, of each by name."""
    told = {name: _conditions(one) for name, one in models.items()}
    if len(set(told.values())) == 1:
        return next(iter(told.values()))
    return "; ".join(f"{name}: {text}" for name, text in told.items())


def _conditions(latency: Mapping[str, Any]) -> str:
    runtime, device = latency.get("runtime"), latency.get("device")
    where = latency.get("hardware" if device != "cpu" else "processor")
    what = [RUNTIMES.get(str(runtime), named(runtime, 60)), counted(latency.get("threads"), "thread")]
    return ", ".join([*what, named(latency.get("precision"), 20), named(where, 80)])


def on_texts(latency: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts of one model on the evaluation texts, as (label, text); none where it was not timed on them."""
    own, batches = part(latency, "own_lengths"), part(latency, "throughput")
    rows = []
    if own:
        texts = f"{counted(own.get('texts'), 'text')} one by one, median {counted(own.get('median_tokens'), 'token')}"
        spread = f"{milliseconds(own.get('median_ms'))}, 95th percentile {milliseconds(own.get('p95_ms'))}"
        rows.append(("own lengths", f"{spread} ({texts})"))
    if batches:
        rate = _rate(finite(batches.get("texts_per_second")))
        rows.append(("throughput", f"{rate} texts per second, {count(batches.get('batch'))} at once"))
    return rows


def side_by_side(report: Mapping[str, Any]) -> dict[str, Any]:
    """Latency of the dense and the pruned model of a run: the lines, how they were measured, what to know of them."""
    models = {name: part(report, "latency", name) for name in ("dense", "pruned")}
    return {"lines": lines(models), "conditions": conditions(models), "remark": _no_faster(models)}


def _no_faster(models: Models) -> str:
    """What to know of a pruned model that was run as if it were dense; empty for other runtimes."""
    dense, pruned = (part(models, name).get("runtime") for name in ("dense", "pruned"))
    if dense != "torch" or pruned != "torch":
        return ""
    return (
        "PyTorch computes with zeros as with other weights, so they alone make nothing faster here; "
        "cap export writes formats that can be faster."
    )
