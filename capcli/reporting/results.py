"""What a result of eval, probe or a comparison says in words: title, facts, gates, verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from capcli.reporting.quantities import Data, baselines_of, ends
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
from capcli.stored import finite, mapping, part, sequence

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
    if runtime := part(result, "runtime"):
        rows.append(("runtime", _runtime(runtime)))
    if baseline:
        rows.append(("baseline", named(baseline.get("model"))))
    if finite(result.get("agreement")) is not None:
        rows.append(
            ("agreement", f"{percent(result['agreement'])} of the examples have the same answer as with the baseline")
        )
    return rows


def _size_rows(size: Data) -> list[Row]:
    labels = {"artifact_bytes": "all files", "weights_bytes": "weight file"}
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


def _runtime(runtime: Data) -> str:
    """What computed the answers, and of which only those asked one by one are always the same."""
    return f"{named(runtime.get('described'), 80)}; {named(runtime.get('batching'), 40)}"


def probe_rows(result: Data) -> list[Row]:
    """The facts of one probing."""
    rows = [("model", named(result.get("model")))]
    keys = ("probe", "layer", "pooling", "seeds", "runtime")
    rows += [(key, named(result[key], 80)) for key in keys if result.get(key)]
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
    """The notes of a result."""
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
    """A gate as it was stored, with every part of the right type."""
    row = mapping(data)
    condition = f"{named(row.get('metric'), 80)} {named(row.get('op'), 10)} {_exact(row.get('limit'))}"
    measured = _exact(row.get("value"))
    message = plain(row.get("message") or "", 400) or f"{condition}, measured {measured}"
    return Gate(named(row.get("name"), 120), row.get("passed") is True, condition, measured, message)


def gates_of(result: Data) -> list[Gate]:
    """The gates of a result."""
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
