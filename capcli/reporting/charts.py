"""Charts as numbers for inline SVG: lines with bands, and strips of points with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capcli.reporting.text import count, counted, named, number
from capcli.stored import finite

MAX_POINTS = 240  # of a curve; longer ones keep the lowest and the highest point of each interval
MAX_CURVES = 8  # as many as the page has line styles


LEFT, RIGHT, TOP, BOTTOM = 52, 372, 12, 212  # the plot area, in a drawing of 380 x 254

LOG_FROM = 50  # the range of the first curve from which on its axis is logarithmic

Points = list[tuple[float, float]]
Bands = list[tuple[float, float, float]]  # x, low, high


def drawable(value: Any) -> float | None:
    """A finite number that a drawing can hold; None for anything else."""
    real = finite(value)
    return real if real is not None and abs(real) < 1e100 else None


@dataclass(frozen=True)
class Curve:
    """One line: its SVG path, the points to mark when they are few, its last value, and the outline of its band."""

    label: str
    path: str
    dots: Points
    last: str
    band: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawn line chart; ticks are (position, text)."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[Curve]
    reference: float | None
    notes: list[str]


def line_chart(
    title: str,
    steps: tuple[float, float],
    y_label: str,
    series: Mapping[str, Points],
    reference: float | None = None,
    n_bad: int = 0,
    *,
    x_label: str = "step",
    bands: Mapping[str, Bands] | None = None,
    write: Callable[[float], str] = number,
) -> Chart | None:
    """Curves over `steps` (first, last), None without points.

    `reference` is a level to compare with; `n_bad` counts the values that were not finite; `bands` holds intervals of
    the points by curve; `write` says how the last value of a curve is written.
    """
    drawn = {name: sorted(points) for name, points in series.items() if points}
    n_hidden = len(drawn) - MAX_CURVES
    drawn = dict(list(drawn.items())[:MAX_CURVES])
    if not drawn:
        return None
    edges = {name: sorted((bands or {}).get(name, ())) for name in drawn}
    y_all = [y for points in drawn.values() for _, y in points] + ([] if reference is None else [reference])
    y_all += [y for name in drawn for _, *ends in edges[name] for y in ends]
    first = [y for _, y in next(iter(drawn.values()))]
    log = min(y_all) > 1e-100 and max(first) / min(first) > LOG_FROM
    x_axis = Axis.over(*steps, LEFT, RIGHT)
    y_axis = Axis.over(min(y_all), max(y_all), BOTTOM, TOP, log=log, whole_ticks=True)
    curves = [_curve(name, points, edges[name], write, (x_axis, y_axis)) for name, points in drawn.items()]
    notes = _notes(drawn, n_hidden, n_bad)
    level = None if reference is None else y_axis.at(reference)
    y_label += " (logarithmic)" if log else ""
    x_ticks = x_axis.ticks()
    x_ticks = [tick for tick in x_ticks if "." not in tick[1]] or x_ticks  # no half steps
    return Chart(title, x_label, y_label, x_ticks, y_axis.ticks(), curves, level, notes)


def _notes(drawn: Mapping[str, Points], n_hidden: int, n_bad: int) -> list[str]:
    longest = max(map(len, drawn.values()))
    thinned = f"Longest curve: {count(longest)} points, drawn as the lowest and highest of each interval."
    notes = [thinned] if longest > MAX_POINTS else []
    notes += [f"Not drawn, because not finite: {counted(n_bad, 'value')}."] if n_bad else []
    return notes + ([f"Not drawn: {counted(n_hidden, 'more curve')}."] if n_hidden > 0 else [])


def _curve(name: str, points: Points, edges: Bands, write: Callable[[float], str], axes: tuple[Axis, Axis]) -> Curve:
    x_axis, y_axis = axes
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in thin(points)]
    around = [(x, low) for x, low, _ in edges] + [(x, high) for x, _, high in reversed(edges)]
    band = _path([(x_axis.at(x), y_axis.at(y)) for x, y in around]) + "Z" if len(edges) > 1 else ""
    return Curve(named(name, 40), _path(places), places if len(places) <= 25 else [], write(points[-1][1]), band)


def _path(places: Points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def thin(points: Points, most: int = MAX_POINTS) -> Points:
    """At most `most` points: the lowest and the highest of each interval, so that no spike is lost."""
    if len(points) <= most:
        return points
    n = most // 2
    chunks = [points[i * len(points) // n : (i + 1) * len(points) // n] for i in range(n)]
    ends = [sorted({min(c, key=lambda p: p[1]), max(c, key=lambda p: p[1])}) for c in chunks]
    return [point for pair in ends for point in pair]


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from data [low, high] to page coordinates [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(
        cls, low: float, high: float, start: float, end: float, log: bool = False, whole_ticks: bool = False
    ) -> Axis:
        """A scale with room for all; `whole_ticks` begins and ends it at one."""
        if log:
            return cls(math.floor(math.log10(low)), math.ceil(math.log10(high)), start, end, True)
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
            margin = abs(low) * 0.1 or 1.0
            low, high = low - margin, high + margin
        if whole_ticks:
            step = _step(high - low)
            low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        return cls(low, high, start, end, False)

    def at(self, value: float) -> float:
        """The place of a value on the page."""
        value = math.log10(value) if self.log else value
        return round(self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts of the marks on the scale."""
        if self.log:
            first, last = math.ceil(self.low), math.floor(self.high)
            every = max(1, (last - first) // 5)
            values = [10.0**power for power in range(first, last + 1, every)]
        else:
            step = _step(self.high - self.low)
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            values = [i * step for i in range(first, min(last, first + 12) + 1)]
        return [(self.at(value), f"{value + 0.0:,.10g}" if abs(value) < 1e7 else f"{value:.3g}") for value in values]


def _step(span: float) -> float:
    """A round distance between ticks: 1, 2 or 5 times a power of ten, giving about five of them."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= 6)


# --------------------------------------------------------------------------------------------------------------- strips

STRIP_WIDTH, STRIP_EDGE = 190, 8


@dataclass(frozen=True)
class Mark:
    """What one strip shows: a value, its interval, and another value to compare it with."""

    value: float | None
    interval: tuple[float, float] | None
    other: float | None = None


@dataclass(frozen=True)
class Strips:
    """Drawn strips on one common scale, one for each mark; {} where there is nothing to draw.

    Each holds the places of `value`, `low` and `high` and perhaps `other`; `zero` is the place of 0 on the scale.
    """

    rows: list[dict[str, float]]
    low: str
    high: str
    zero: float | None
    has_other: bool


def strips(marks: Sequence[Mark], *, zero: bool = False) -> Strips | None:
    """Places of all marks that have an interval; None if none has. With `zero`, 0 is on the scale."""
    whole = [_whole(mark) for mark in marks]
    known = [value for row in whole for value in row.values()]
    if not known:
        return None
    low, high = min(known + [0.0] * zero), max(known + [0.0] * zero)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-9):
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    scale = (STRIP_WIDTH - 2 * STRIP_EDGE) / (high - low)
    rows = [{key: round(STRIP_EDGE + scale * (value - low), 1) for key, value in row.items()} for row in whole]
    at_zero = round(STRIP_EDGE - scale * low, 1) if zero else None
    return Strips(rows, number(low), number(high), at_zero, any("other" in row for row in rows))


def _whole(mark: Mark) -> dict[str, float]:
    """The numbers of a mark by name, none unless the value and its interval can be drawn."""
    if mark.value is None or mark.interval is None:
        return {}
    found = {"value": mark.value, "low": mark.interval[0], "high": mark.interval[1]}
    found |= {} if mark.other is None else {"other": mark.other}
    return found if all(abs(value) < 1e100 for value in found.values()) else {}


@dataclass(frozen=True)
class ResultTable:
    """A table of text, of whose columns the first `n_text` are words; with `strips` one small drawing per row."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    hint: str = ""
    strips: Strips | None = None
    n_text: int = 1
