"""Points on two scales as numbers for inline SVG: each with what is shown when it is pointed at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from capcli.reporting.charts import BOTTOM, LEFT, MAX_CURVES, RIGHT, TOP, Axis, drawable

MARGIN = 0.06  # of the range, between the outermost points and the edges of the plot area


@dataclass(frozen=True, kw_only=True)
class Point:
    """A value with its deviation: of which series, whether it is filled and ringed, and the lines that name it."""

    series: str
    x: float | None
    y: float | None
    deviation: float | None
    filled: bool
    ringed: bool
    tip: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A point in the drawing; `low` and `high` are the ends of its deviation."""

    x: float
    y: float
    low: float
    high: float
    style: int
    filled: bool
    ringed: bool
    tip: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """A drawn chart; ticks are (position, text). lines: of each series through its points, as (style, SVG path). level
    and limit: places of the values to compare y and x with."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: list[Placed]
    lines: list[tuple[int, str]]
    series: list[tuple[int, str]]
    level: float | None
    limit: float | None
    n_hidden: int


def scatter(
    title: str,
    x_label: str,
    y_label: str,
    points: Sequence[Point],
    *,
    level: float | None = None,
    limit: float | None = None,
) -> Scatter | None:
    """The points that can be drawn; None without any. `level` is on the scale of y; `limit` on that of x, left out
    where it is far from all points."""
    known = [(one, drawable(one.x), drawable(one.y)) for one in points]
    drawn = [(one, x, y) for one, x, y in known if x is not None and y is not None]
    if not drawn:
        return None
    names = list(dict.fromkeys(one.series for one in points))
    styles = {name: place % MAX_CURVES for place, name in enumerate(names)}
    level, limit = drawable(level), _near(drawable(limit), [x for _, x, _ in drawn])
    x_axis = _axis([*(x for _, x, _ in drawn), *([] if limit is None else [limit])], LEFT, RIGHT)
    ends = {id(one): (y - (one.deviation or 0), y + (one.deviation or 0)) for one, _, y in drawn}
    y_axis = _axis([*(y for pair in ends.values() for y in pair), *([] if level is None else [level])], BOTTOM, TOP)
    placed = [
        Placed(
            x=x_axis.at(x),
            y=y_axis.at(y),
            low=y_axis.at(ends[id(one)][0]),
            high=y_axis.at(ends[id(one)][1]),
            style=styles[one.series],
            filled=one.filled,
            ringed=one.ringed,
            tip=one.tip,
        )
        for one, x, y in drawn
    ]
    return Scatter(
        title=title,
        x_label=x_label,
        y_label=y_label,
        x_ticks=_inside(x_axis.ticks(), LEFT, RIGHT),
        y_ticks=_inside(y_axis.ticks(), TOP, BOTTOM),
        points=placed,
        lines=_lines(placed, [one.series for one, _, _ in drawn], styles),
        series=[(styles[name], name) for name in names],
        level=None if level is None else y_axis.at(level),
        limit=None if limit is None else x_axis.at(limit),
        n_hidden=len(points) - len(drawn),
    )


def _near(limit: float | None, values: Sequence[float]) -> float | None:
    """A limit that does not push the points into a corner."""
    low, high = min(values), max(values)
    reach = max(high - low, 0.2 * abs(high))
    return limit if limit is not None and low - reach <= limit <= high + reach else None


def _axis(values: Sequence[float], start: float, end: float) -> Axis:
    """A scale on which all values have some room."""
    low, high = min(values), max(values)
    room = MARGIN * (high - low)
    return Axis.over(low - room, high + room, start, end)


def _inside(ticks: list[tuple[float, str]], low: float, high: float) -> list[tuple[float, str]]:
    return [(place, text) for place, text in ticks if low <= place <= high]


def _lines(placed: Sequence[Placed], series: Sequence[str], styles: Mapping[str, int]) -> list[tuple[int, str]]:
    """A line through the points of each series, from left to right."""
    found = []
    for name, style in styles.items():
        places = sorted((one.x, one.y) for one, its in zip(placed, series, strict=True) if its == name)
        if len(places) > 1:
            found.append((style, "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)))
    return found
