"""Gates: conditions on what was measured, which decide the exit code of `cap eval` and `cap probe`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from capcli.config import Gates, nearest, parse_drops, parse_limits
from capcli.noise import Estimate

Row = dict[str, Any]
DECIMALS = 12  # as `capcli.text` shows numbers


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the gates of one model are held against; what is missing was not measured.

    differences: metric minus that of the baseline. ratios: metric by that of the baseline, where that is above zero.
    """

    primary: str
    metrics: Mapping[str, Estimate]
    baseline: Mapping[str, float] = field(default_factory=dict)
    differences: Mapping[str, Estimate] = field(default_factory=dict)
    ratios: Mapping[str, Estimate] = field(default_factory=dict)
    weights_bytes: float | None = None
    latency_ms: Estimate | None = None


def check(gates: Gates, found: Evidence) -> list[Row]:
    """One row per gate. A missing or NaN value fails its gate. Values and limits are compared to 12 decimals.

    With a confidence level, a gate fails only when the whole interval of the value lies beyond the limit.
    """
    level = gates.confidence
    rows = []
    for flag, op, text in (("min", ">=", gates.min), ("max", "<=", gates.max)):
        for name, limit in parse_limits(f"--{flag}", text).items():
            rows.append(_row(f"{flag} {name}", name, op, limit, found.metrics.get(name), level))
            _suggest(rows[-1], name, found.metrics)
    for name, limit, relative in parse_drops(gates.max_drop):
        if relative:
            drop = _mirrored(found.ratios.get(name), 1)
            rows.append(_row(f"max relative drop {name}", f"relative drop of {name}", "<=", limit, drop, level))
            _explain(rows[-1], name, found)
        else:
            drop = _mirrored(found.differences.get(name), 0)
            rows.append(_row(f"max drop {name}", f"drop of {name}", "<=", limit, drop, level))
        _suggest(rows[-1], name, found.metrics)
    if gates.min_retention:
        kept = found.ratios.get(found.primary)
        rows.append(_row("min retention", f"retention of {found.primary}", ">=", gates.min_retention, kept, level))
        _explain(rows[-1], found.primary, found)
    if gates.max_bytes:
        size = None if found.weights_bytes is None else Estimate(found.weights_bytes)
        rows.append(_row("max bytes", "weights_bytes", "<=", gates.max_bytes, size, 0))
    if gates.max_latency_ms:
        rows.append(_row("max latency", "median_ms", "<=", gates.max_latency_ms, found.latency_ms, level))
    return rows


def unknown(gates: Gates, metrics: Sequence[str], drops: Sequence[str]) -> list[str]:
    """Sentences about gates that will fail because nothing of their name is going to be measured.

    `metrics` are the names that will have a value, `drops` those that will have a difference to the baseline.
    """
    limits = [*parse_limits("--min", gates.min), *parse_limits("--max", gates.max)]
    asked = [(f"no {name!r}", name, metrics) for name in limits]
    asked += [(f"no drop of {name!r}", name, drops) for name, _, _ in parse_drops(gates.max_drop)]
    found = [
        f"{what} is measured, its gate will fail" + (f": {nearest(name, known)}" if known else "")
        for what, name, known in asked
        if name not in known
    ]
    return list(dict.fromkeys(found))


def _mirrored(estimate: Estimate | None, start: float) -> Estimate | None:
    """`start` minus the estimate."""
    if estimate is None:
        return None

    def at(level: float) -> list[float]:
        low, high = estimate.interval(level) or [math.nan, math.nan]
        return [start - high, start - low]

    return Estimate(start - estimate.value, at if estimate.at else None)


def _suggest(row: Row, name: str, known: Mapping[str, Estimate]) -> None:
    """Name the nearest metric when there is none of this name."""
    if name not in known and known:
        row["message"] += f"; {nearest(name, known)}"


def _explain(row: Row, name: str, found: Evidence) -> None:
    """Say why a ratio has no value though both metrics have one."""
    theirs = found.baseline.get(name)
    if row["value"] is None and theirs is not None and name in found.metrics:
        row["message"] = f"{row['metric']} has no meaning: the baseline's is {theirs:.6g}, not above zero"


def _row(name: str, metric: str, op: str, limit: float, estimate: Estimate | None, level: float) -> Row:
    value = estimate.value if estimate is not None and math.isfinite(estimate.value) else None
    interval = estimate.interval(level) if estimate is not None and value is not None and level else None
    passed = value is not None and _holds(value, op, limit)
    noise = ""
    if level and value is not None:
        noise = " (interval not known)"
    if interval:
        low, high = interval
        noise = f" ({100 * level:.6g} % interval {low:.6g} to {high:.6g})"
        excused = not passed and _holds(high if op == ">=" else low, op, limit)
        noise += ", not beyond the noise" if excused else ""
        passed = passed or excused
    shown = _digits(value, limit) if value is not None else "not measured"
    return {
        "name": name,
        "metric": metric,
        "op": op,
        "limit": limit,
        "value": value,
        "interval": interval,
        "confidence": level or None,
        "passed": bool(passed),
        "message": f"{metric} is {shown}{noise}, must be {op} {limit:.10g}",
    }


def _side(value: float, limit: float) -> int:
    """-1 below, 0 at, 1 above the limit; what differs by less than the noise of binary digits is the same."""
    a, b = round(value, DECIMALS), round(limit, DECIMALS)
    return (a > b) - (a < b)


def _holds(value: float, op: str, limit: float) -> bool:
    return _side(value, limit) >= 0 if op == ">=" else _side(value, limit) <= 0


def _digits(value: float, limit: float) -> str:
    """The value with as many digits as tell on which side of the limit it is; whole numbers with all."""
    if float(value).is_integer():
        return f"{value:.0f}"
    short = f"{value:.6g}"
    return short if _side(float(short), limit) == _side(value, limit) else f"{value:.17g}"
