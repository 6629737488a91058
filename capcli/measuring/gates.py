"""Gates: conditions on what was measured, which decide the exit code of `cap eval` and `cap probe`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal

from capcli.config.measure import Gates
from capcli.config.names import nearest
from capcli.config.options import meant, parse_drops, parse_limits
from capcli.errors import ConfigError
from capcli.measuring.noise import Estimate
from capcli.records import parts
from capcli.records.parts import Gate
from capcli.reporting.text import byte_size, milliseconds

Bounds = tuple[float, float]  # the lowest and the highest value that a metric can have
MEDIAN = "median_ms"  # the metric of the gate on latency
DECIMALS = 12  # as `reporting.text` shows numbers


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the gates of one model are held against; what is missing was not measured.

    differences: metric minus that of the baseline. ratios: metric by that of the baseline, where that is above zero.
    at_chance: what guessing scores, of the metrics in which the baseline is no better; their ratios say nothing.
    """

    primary: str
    metrics: Mapping[str, Estimate]
    baseline: Mapping[str, float] = field(default_factory=dict)
    differences: Mapping[str, Estimate] = field(default_factory=dict)
    ratios: Mapping[str, Estimate] = field(default_factory=dict)
    at_chance: Mapping[str, float] = field(default_factory=dict)
    weights_bytes: float | None = None
    latency_ms: Estimate | None = None


# Before anything is measured -----------------------------------------------------------------------------------------


def require(
    gates: Gates, metrics: Mapping[str, Bounds], drops: Mapping[str, Bounds], ways: Mapping[str, str] | None = None
) -> None:
    """Raise `ConfigError` for a gate whose outcome does not depend on the model: nothing of its name is going to be
    measured, or its limit lies outside of what the metric can be.

    `metrics` are the names that will have a value, `drops` those that will have a difference to the baseline, both with
    their bounds; `ways` says of other names what would have them measured. A limit on a bound is allowed, as only a
    number holds it, but not for a drop: `--max-drop accuracy=1` means 1 per cent.
    """
    for flag, text in (("--min", gates.min), ("--max", gates.max)):
        for name, limit in parse_limits(flag, text).items():
            _known(flag, f"unknown metric {name!r}", name, metrics, ways)
            low, high = metrics[name]
            if not low <= limit <= high:
                never = "pass" if (limit > high) == (flag == "--min") else "fail"
                raise _pointless(f"{flag} {name}={limit:.10g}", never, f"{name} is {_range(low, high)}", limit)
    for name, limit, relative in parse_drops(gates.max_drop):
        what = f"no drop of {name!r} is measured" if name in metrics else f"unknown metric {name!r}"
        _known("--max-drop", what, name, drops, ways)
        low, high = drops[name]
        if relative and low >= 0 and limit >= 1:
            why = f"{name} is never below 0, so it cannot fall by more than 100%"
            raise _pointless(f"--max-drop {name}={100 * limit:.10g}%", "fail", why, math.nan)
        if not relative and not -(high - low) <= limit < high - low:
            never = "fail" if limit > 0 else "pass"
            raise _pointless(f"--max-drop {name}={limit:.10g}", never, f"{name} is {_range(low, high)}", limit)


def _known(flag: str, what: str, name: str, valid: Mapping[str, Bounds], ways: Mapping[str, str] | None) -> None:
    if name not in valid:
        raise ConfigError(f"{flag}: {what}", (ways or {}).get(name) or nearest(name, valid))


def _pointless(gate: str, never: str, why: str, limit: float) -> ConfigError:
    return ConfigError(f"{gate} can never {never}: {why}", meant(limit) or "choose another limit, or leave it out")


def _range(low: float, high: float) -> str:
    return f"between {low:g} and {high:g}"


# After ---------------------------------------------------------------------------------------------------------------


def check(gates: Gates, found: Evidence) -> tuple[Gate, ...]:
    """One row per gate. A missing or NaN value fails its gate. Values and limits are compared to 12 decimals.

    With a confidence level, a gate fails only when the whole interval of the value lies beyond the limit.
    """
    level = gates.confidence
    rows = []
    for flag, op, text in (("min", ">=", gates.min), ("max", "<=", gates.max)):
        for name, limit in parse_limits(f"--{flag}", text).items():
            rows.append(_row(f"{flag} {name}", _value(name, op), op, limit, found.metrics.get(name), level))
    for name, limit, relative in parse_drops(gates.max_drop):
        if relative:
            drop = _mirrored(_ratio(name, found), 1)
            row = _row(f"max relative drop {name}", _fall(name, relative=True), "<=", limit, drop, level)
            rows.append(_explained(row, name, found))
        else:
            drop = _mirrored(found.differences.get(name), 0)
            rows.append(_row(f"max drop {name}", _fall(name, relative=False), "<=", limit, drop, level))
    if gates.min_retention:
        kept = _ratio(found.primary, found)
        row = _row("min retention", _kept(found.primary), ">=", gates.min_retention, kept, level)
        rows.append(_explained(row, found.primary, found))
    if gates.max_bytes:
        size = None if found.weights_bytes is None else Estimate(found.weights_bytes)
        rows.append(_row("max bytes", _size(), "<=", gates.max_bytes, size, 0))
    if gates.max_latency_ms:
        rows.append(_row("max latency", _latency(), "<=", gates.max_latency_ms, found.latency_ms, level))
    return tuple(rows)


def _mirrored(estimate: Estimate | None, start: float) -> Estimate | None:
    """`start` minus the estimate."""
    if estimate is None:
        return None

    def at(level: float) -> list[float]:
        low, high = estimate.interval(level) or [math.nan, math.nan]
        return [start - high, start - low]

    return Estimate(start - estimate.value, at if estimate.at else None)


def _ratio(name: str, found: Evidence) -> Estimate | None:
    """A metric by that of the baseline; None where the baseline is no better than guessing."""
    return None if name in found.at_chance else found.ratios.get(name)


def _explained(row: Gate, name: str, found: Evidence) -> Gate:
    """The gate, saying why a ratio has no value though both metrics have one."""
    theirs = found.baseline.get(name)
    if row.value is not None or theirs is None or name not in found.metrics:
        return row
    guessing = f"no better than guessing ({found.at_chance[name]:.6g})" if name in found.at_chance else ""
    why = guessing or "not above zero"
    return replace(row, message=f"{row.metric} has no meaning: the baseline's value is {theirs:.6g}, {why}")


def _row(name: str, what: _Said, op: str, limit: float, estimate: Estimate | None, level: float) -> Gate:
    value = estimate.value if estimate is not None and math.isfinite(estimate.value) else None
    interval = estimate.interval(level) if estimate is not None and value is not None and level else None
    passed = value is not None and _holds(value, op, limit)
    noise = ""
    if level and value is not None:
        noise = ", interval not known"
    if interval:
        low, high = interval
        noise = f", {100 * level:.6g} % interval {what.end(low)} to {what.end(high)}"
        excused = not passed and _holds(high if op == ">=" else low, op, limit)
        noise += ", not beyond the noise" if excused else ""
        passed = passed or excused
    shown = f"{what.missing} was not measured" if value is None else what.found(value, limit)
    return Gate(
        name=name,
        metric=what.metric,
        op=op,
        limit=limit,
        value=value,
        interval=parts.interval(interval),
        confidence=level or None,
        passed=bool(passed),
        message=f"{shown} ({what.limit} {what.show(limit)}{noise})",
    )


def _side(value: float, limit: float) -> int:
    """-1 below, 0 at, 1 above the limit; what differs by less than the noise of binary digits is the same."""
    a, b = round(value, DECIMALS), round(limit, DECIMALS)
    return (a > b) - (a < b)


def _holds(value: float, op: str, limit: float) -> bool:
    return _side(value, limit) >= 0 if op == ">=" else _side(value, limit) <= 0


# Sentences -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Said:
    """How the value of a gate is said: `metric` is its name in the row, `missing` what was not measured.

    `found` makes a sentence without its end of the value and the limit, `show` writes the limit, which `limit` goes
    before, `end` an end of an interval.
    """

    metric: str
    missing: str
    found: Callable[[float, float], str]
    show: Callable[[float], str]
    end: Callable[[float], str]
    limit: str = "limit"


def _value(name: str, op: str) -> _Said:
    return _Said(
        metric=name,
        missing=name,
        found=lambda value, limit: f"{name} is {_digits(value, limit, 4)}",
        show="{:.10g}".format,
        end="{:.4f}".format,
        limit=f"must be at {'least' if op == '>=' else 'most'}",
    )


def _fall(name: str, *, relative: bool) -> _Said:
    """How far a metric fell, in points or in per cent of the baseline's."""
    what, unit = ("relative drop", " %") if relative else ("drop", " points")

    def found(value: float, limit: float) -> str:
        if _side(value, 0) == 0:
            return f"{name} did not change"
        fall = _digits(100 * value, 100 * limit, 2).removeprefix("-")
        return f"{name} {'rose' if value < 0 else 'fell'} {fall}{unit}{' of the baseline' * relative}"

    return _Said(
        metric=f"{what} of {name}",
        missing=f"the {what} of {name}",
        found=found,
        show=lambda value: _at_least_two(100 * value) + unit * relative,
        end=lambda value: f"{100 * value:.2f}{unit * relative}",
    )


def _kept(name: str) -> _Said:
    return _Said(
        metric=f"retention of {name}",
        missing=f"the retention of {name}",
        found=lambda value, limit: f"{name} keeps {_digits(100 * value, 100 * limit, 2)} % of the baseline's",
        show=lambda value: f"{_at_least_two(100 * value)} %",
        end=lambda value: f"{100 * value:.2f} %",
        limit="must be at least",
    )


def _size() -> _Said:
    return _Said(
        metric="weights_bytes",
        missing="the size of the weights",
        found=lambda value, limit: f"the weights are {byte_size(value)}",
        show=_exact_size,
        end=byte_size,
    )


def _latency() -> _Said:
    def found(value: float, limit: float) -> str:
        short = milliseconds(value)
        tells = _side(float(short.split()[0].replace(",", "")), limit) == _side(value, limit)
        return f"the median latency is {short if tells else _digits(value, limit, 2) + ' ms'}"

    return _Said(
        metric=MEDIAN,
        missing="the median latency",
        found=found,
        show=lambda value: f"{value:,.6g} ms",
        end=milliseconds,
    )


def _digits(value: float, limit: float, digits: int) -> str:
    """The value with `digits` decimals, or as many as tell on which side of the limit it is."""
    for more in range(digits, DECIMALS):
        if _side(round(value, more), limit) == _side(value, limit):
            return f"{value:,.{more}f}"
    return f"{value:.17g}"


def _at_least_two(value: float) -> str:
    """A number with 2 decimals, or with more where it has more."""
    short = f"{value:.6g}"
    return f"{value:,.2f}" if float(short) == round(value, 2) else short


def _exact_size(n_bytes: float) -> str:
    """A limit in bytes as it was given, in the unit that fits."""
    unit = min(max(0, int(math.log10(n_bytes)) // 3), 3)
    return f"{Decimal(n_bytes).scaleb(-3 * unit).normalize():f} {('B', 'kB', 'MB', 'GB')[unit]}"
