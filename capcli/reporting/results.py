"""What a result of eval, probe or a comparison says in words: title, facts, gates, verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capcli.records import parts
from capcli.records.measured import Comparison, Comparisons, EvalResult, ProbeResult, Result
from capcli.records.parts import Latency, ModelSize, Runtime
from capcli.reporting.headline import compared_with
from capcli.reporting.latency import on_texts
from capcli.reporting.quantities import baselines_of, ends, shown_of
from capcli.reporting.run_page import MAX_ROWS, Row
from capcli.reporting.text import (
    NOT_MEASURED,
    byte_size,
    count,
    counted,
    milliseconds,
    named,
    percent,
    plain,
    significant,
)
from capcli.stored import finite

# ---------------------------------------------------------------------------------------------------------------- facts


def title(result: Result) -> str:
    """One line that says what the result is about."""
    if isinstance(result, Comparison):
        return f"{named(result.old, 100)} → {named(result.new, 100)}"
    if isinstance(result, Comparisons):
        return f"{named(result.baseline, 100)} → {counted(len(result.comparisons), 'other')}"
    model = named(result.model, 120)
    return f"{model} on {named(result.task, 60)}" if isinstance(result, EvalResult) else f"{model}, probed"


def facts(result: Result) -> list[Row]:
    """What was measured and under which conditions, as (label, text)."""
    if isinstance(result, EvalResult):
        return eval_rows(result)
    if isinstance(result, ProbeResult):
        return probe_rows(result)
    return compare_rows(result)


def eval_rows(result: EvalResult) -> list[Row]:
    """The facts of one evaluation."""
    rows = [
        ("model", named(result.model)),
        ("task", f"{named(result.task)}, {named(result.split)}"),
        ("examples", count(result.n_examples)),
    ]
    if said := compared_with(result.reference):
        rows.append(("compared with", said))
    if sparsity := result.sparsity:
        rows.append(("sparsity", f"{percent(sparsity.achieved)} (whole model {percent(sparsity.whole_model)})"))
    rows += _size_rows(result.size)
    if result.latency:
        rows.append(("latency", _latency(result.latency)))
        rows += on_texts(result.latency)
    if result.runtime:
        rows.append(("runtime", _runtime(result.runtime)))
    if result.baseline:
        rows.append(("baseline", named(result.baseline.model)))
    if finite(result.agreement) is not None:
        rows.append(
            ("agreement", f"{percent(result.agreement)} of the examples have the same answer as with the baseline")
        )
    return rows


def _size_rows(size: ModelSize) -> list[Row]:
    sizes = {"all files": size.artifact_bytes, "weight file": size.weights_bytes}
    return [(label, byte_size(value)) for label, value in sizes.items() if value is not None]


def _latency(latency: Latency) -> str:
    """Median and spread, and the circumstances without which they mean nothing."""
    bounds = ends(latency.confidence_95)
    noise = f", 95 % interval {' to '.join(map(significant, bounds))}" if bounds else ""
    p10, p90 = milliseconds(latency.p10_ms), milliseconds(latency.p90_ms)
    where = [f"batch {named(latency.batch, 60)}", f"length {named(latency.length, 60)}"]
    where.append(counted(latency.threads, "thread"))
    how = (latency.runtime, latency.device, latency.hardware, latency.precision)
    what = [named(text, 60) for text in how if text]
    median = milliseconds(latency.median_ms)
    return f"{median} ({p10.removesuffix(' ms')} to {p90}{noise}) at {', '.join([*where, *what])}"


def _runtime(runtime: Runtime) -> str:
    """What computed the answers, and of which only those asked one by one are always the same."""
    return f"{named(runtime.described, 80)}; {named(runtime.batching, 40)}"


def probe_rows(result: ProbeResult) -> list[Row]:
    """The facts of one probing."""
    options = {key: getattr(result, key) for key in ("probe", "layer", "pooling", "seeds", "runtime")}
    rows = [("model", named(result.model)), *((key, named(value, 80)) for key, value in options.items() if value)]
    rows += _size_rows(result.size)
    if result.latency:
        rows.append(("latency", _latency(result.latency)))
    if result.sha256:
        rows.append(("sha256", named(result.sha256, 64)))
    return [*rows, *(("baseline", named(baseline.model)) for baseline in baselines_of(result))]


def compare_rows(result: Comparison | Comparisons) -> list[Row]:
    """The facts of one comparison, or of several."""
    if isinstance(result, Comparison):
        rows = [("old", named(result.old, 400)), ("new", named(result.new, 400))]
    else:
        others = [("compared", named(one.new, 400)) for one in shown_of(result)]
        rows = [("baseline", named(result.baseline, 400)), *others]
    if result.task:
        rows.append(("task", f"{named(result.task)}, {named(result.split)}"))
    return rows + ([("examples", count(result.n_examples))] if result.n_examples else [])


def notes(result: Result) -> list[str]:
    """The notes of a result."""
    return [plain(note, 400) for note in result.notes[:MAX_ROWS]]


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


def gate(row: parts.Gate) -> Gate:
    """A gate of a result as text."""
    condition = f"{named(row.metric, 80)} {named(row.op, 10)} {_exact(row.limit)}"
    measured = _exact(row.value)
    message = plain(row.message or "", 400) or f"{condition}, measured {measured}"
    return Gate(named(row.name, 120), row.passed, condition, measured, message)


def gates_of(result: Result) -> list[Gate]:
    """The gates of a result."""
    return [gate(row) for row in result.gates[:MAX_ROWS]]


def verdict(result: Result) -> str:
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
