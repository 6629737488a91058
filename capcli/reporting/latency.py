"""Latency as text and bars: of models side by side, and by what, where and on what it was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from capcli.records.parts import Latency, OwnLengths, Throughput
from capcli.records.pruned import Latencies, Report
from capcli.reporting.text import NOT_MEASURED, count, counted, milliseconds, named, significant
from capcli.stored import finite

RUNTIMES = {"torch": "PyTorch", "onnx": "onnxruntime", "sparse": "the sparse runtime of cap"}

Models = Mapping[str, Latency]  # what results say of each model


@dataclass(frozen=True, kw_only=True)
class Line:
    """One figure of every model; of each its share of the largest, in per cent, as the length of a bar."""

    label: str
    values: dict[str, str]
    shares: dict[str, float | None]


def lines(models: Models) -> list[Line]:
    """The four figures, those that no model has left out."""
    first = next(iter(models.values()), Latency())
    own, batches = first.own_lengths or OwnLengths(), first.throughput or Throughput()
    size = f"{counted(first.batch, 'input')} of {counted(first.length, 'token')}"
    texts = f"{counted(own.texts, 'text')} one by one"
    found = [
        _line(f"{size}, median", milliseconds, {name: one.median_ms for name, one in models.items()}),
        _line(f"{texts}, median", milliseconds, {name: _own(one).median_ms for name, one in models.items()}),
        _line(f"{texts}, 95th percentile", milliseconds, {name: _own(one).p95_ms for name, one in models.items()}),
        _line(
            f"texts per second, {count(batches.batch)} at once",
            _rate,
            {name: (one.throughput or Throughput()).texts_per_second for name, one in models.items()},
        ),
    ]
    return [line for line in found if any(share is not None for share in line.shares.values())]


def _own(latency: Latency) -> OwnLengths:
    return latency.own_lengths or OwnLengths()


def _line(label: str, write: Callable[[float | None], str], values: Mapping[str, float | None]) -> Line:
    known = {name: finite(value) for name, value in values.items()}
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


def _conditions(latency: Latency) -> str:
    where = latency.hardware if latency.device != "cpu" else latency.processor
    runtime = RUNTIMES.get(latency.runtime or "", named(latency.runtime, 60))
    what = [runtime, counted(latency.threads, "thread")]
    return ", ".join([*what, named(latency.precision, 20), named(where, 80)])


def on_texts(latency: Latency) -> list[tuple[str, str]]:
    """The facts of one model on the evaluation texts, as (label, text); none where it was not timed on them."""
    rows = []
    if own := latency.own_lengths:
        texts = f"{counted(own.texts, 'text')} one by one, median {counted(own.median_tokens, 'token')}"
        spread = f"{milliseconds(own.median_ms)}, 95th percentile {milliseconds(own.p95_ms)}"
        rows.append(("own lengths", f"{spread} ({texts})"))
    if batches := latency.throughput:
        rate = _rate(finite(batches.texts_per_second))
        rows.append(("throughput", f"{rate} texts per second, {count(batches.batch)} at once"))
    return rows


def side_by_side(report: Report) -> dict[str, Any]:
    """Latency of the dense and the pruned model of a run: the lines, how they were measured, what to know of them."""
    if not report.latency:
        return {"lines": [], "conditions": "", "remark": ""}
    models = {"dense": report.latency.dense, "pruned": report.latency.pruned}
    return {"lines": lines(models), "conditions": conditions(models), "remark": _remark(report.latency)}


def _remark(found: Latencies) -> str:
    """How to get the speed of the sparse runtime, or why there is none where PyTorch computes with zeros."""
    if found.pruned.runtime == "sparse":
        return 'To use that runtime: --runtime auto (cap predict, cap eval), or capcli.pipeline(…, runtime="auto").'
    return (
        "PyTorch computes with zeros as with other weights, so they alone make nothing faster here. On a CPU the "
        "sparse runtime can (pip install 'capcli[fast]'); cap export writes formats that can be faster elsewhere."
    )
