"""The ladder of `cap export` as rows of text: what each way to ship a model would give, and what was tried of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from capcli.records.exported import ExportPlan, Ladder, Rung
from capcli.reporting.text import NOT_MEASURED, byte_size, milliseconds, named, number, percent, plain

Rows = list[tuple[str, ...]]
PLAN = ("", "format", "weights", "runtime", "file", "memory", "answers", "faster")
TRIED = ("format", "weights", "runtime", "file", "latency", "outcome")
N_TEXT = 4  # of the columns of a plan, those that are words; one less of what was tried
OUTCOMES = {"weights_bytes": "too large", "median_ms": "too slow"}


def possible(found: ExportPlan) -> list[Rung]:
    """The rungs of a plan that the model can be shipped as, and that are not known to be too large."""
    return [rung for rung in found.rungs if not rung.refused and rung.passed is None]


def planned(found: ExportPlan) -> Rows:
    """A row for each of them, numbered as `commands` are."""
    return [
        (
            str(place),
            *_named(rung),
            _size(rung),
            byte_size(rung.memory_bytes),
            "same" if rung.exact else "close",
            _faster(rung),
        )
        for place, rung in enumerate(possible(found), 1)
    ]


def commands(found: ExportPlan) -> list[tuple[str, str]]:
    """The command of each row; rows with one file have the same."""
    rows: dict[str, list[str]] = {}
    for place, rung in enumerate(possible(found), 1):
        rows.setdefault(plain(rung.command, 4096), []).append(str(place))
    return [(", ".join(places), command) for command, places in rows.items()]


def left_out(rungs: Sequence[Rung]) -> list[tuple[str, str]]:
    """Which rungs are too large for a plan's limit, and why others are not possible, those with one reason together."""
    large = [" ".join(_named(rung)[:2]) for rung in rungs if rung.passed is False and not rung.refused]
    reasons: dict[str, list[str]] = {}
    for rung in rungs:
        if rung.refused:
            reasons.setdefault(named(rung.refused, 200), []).append(" ".join(_named(rung)[:2]))
    rows = [("too large", "; ".join(dict.fromkeys(large)))] if large else []
    return rows + [("not possible", f"{'; '.join(dict.fromkeys(names))}: {why}") for why, names in reasons.items()]


def tried(found: Ladder) -> Rows:
    """A row for each rung that was tried, in order."""
    return [
        (
            *_named(rung),
            _size(rung),
            milliseconds(rung.latency.median_ms) if rung.latency else NOT_MEASURED,
            *_values(found, rung),
            _outcome(rung),
        )
        for rung in found.rungs
        if rung.weights_bytes is not None
    ]


def columns(found: Ladder) -> tuple[str, ...]:
    """Of what was tried; metrics whose drop is limited have one each."""
    return (*TRIED[:-1], *(named(name, 40) for name in _limited(found)), TRIED[-1])


def _limited(found: Ladder) -> list[str]:
    """The metrics whose drop is limited."""
    parts = (part.partition("=")[0].strip() for part in (found.max_drop or "").split(","))
    return list(dict.fromkeys(filter(None, parts)))


def _values(found: Ladder, rung: Rung) -> list[str]:
    return [number((rung.metrics or {}).get(name)) for name in _limited(found)]


def _outcome(rung: Rung) -> str:
    if rung.refused:
        return "failed"
    failed = [gate for gate in rung.gates if not gate.passed]
    return OUTCOMES.get(failed[0].metric or "", "drops too far") if failed else "chosen"


def counted_outcomes(found: Ladder) -> str:
    """`2 too large, 1 too slow; the smallest has 1.71 MB, the fastest took 12.1 ms`."""
    sizes = [rung.weights_bytes for rung in found.rungs if rung.weights_bytes is not None]
    times = [rung.latency.median_ms for rung in found.rungs if rung.latency and rung.latency.median_ms is not None]
    outcomes = Counter(_outcome(rung) for rung in found.rungs if rung.weights_bytes is not None)
    parts = [f"{n} {name}" for name, n in outcomes.items()] or ["none is possible"]
    ends = [f"the smallest has {byte_size(min(sizes))}"] * bool(sizes)
    ends += [f"the fastest took {milliseconds(min(times))}"] if times else []
    return "; ".join(filter(None, (", ".join(parts), ", ".join(ends))))


def _named(rung: Rung) -> tuple[str, str, str]:
    return named(rung.format, 20), named(rung.name, 60), named(rung.runtime, 20)


def _size(rung: Rung) -> str:
    return f"{'≈ ' if rung.estimated else ''}{byte_size(rung.weights_bytes)}"


def _faster(rung: Rung) -> str:
    """What can make it faster than the dense model, before anything is measured."""
    left = rung.matrices_left
    if left is not None and left < 0.999:
        return f"{percent(left)} to compute"
    return "onnxruntime" if rung.runtime == "onnx" else "no"
