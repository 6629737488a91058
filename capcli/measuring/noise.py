"""Measured values with their noise: intervals at any level, of one value, of a difference, of a ratio.

Two values that were measured on the same examples are compared by `metrics.resampled`. Of values of which only the
intervals are known (stored results), the interval of the difference or ratio is put together from theirs by the method
of variance estimates recovery (Zou and Donner 2008; Donner and Zou 2012), as if they were independent: too wide, never
too narrow, when the examples are the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from capcli.measuring import metrics, resampling
from capcli.records.parts import Noisy, interval
from capcli.stored import finite, sequence

Record = TypeVar("Record")
Interval = list[float]
DATA = ("data", "max_length")  # the examples and how much of them was read; older results do not hold them
MEASURED_ON = ("metric", "split", "n_train", "n_examples", "n_classes", *DATA)  # one task of a probe
EVALUATED_ON = ("task", "split", "reference", "n_examples", *DATA)  # an evaluation


@dataclass(frozen=True)
class Estimate:
    """A value, and its interval [low, high] at a confidence level; without `at`, nothing is known of its noise."""

    value: float
    at: Callable[[float], Interval] | None = None

    def interval(self, level: float) -> Interval | None:
        """The interval at `level`; None when it is not known or not finite."""
        found = self.at(level) if self.at and math.isfinite(self.value) else None
        return found if found and all(map(math.isfinite, found)) else None

    def row(self) -> Noisy:
        """As results hold it."""
        return Noisy(value=self.value, confidence_95=interval(self.interval(0.95)))


def sampled(value: float, draws: Any) -> Estimate:
    """A value with resamples of it [B]."""
    return Estimate(value, lambda level: resampling.percentiles(draws, level))


def widened(estimate: Estimate, n_examples: int) -> Estimate:
    """A share of so many independent examples, whose interval is at least as wide as Wilson's."""

    def at(level: float) -> Interval:
        low, high = metrics.wilson(estimate.value * n_examples, n_examples, level)
        ends = estimate.interval(level) or [low, high]
        return [min(low, ends[0]), max(high, ends[1])]

    return Estimate(estimate.value, at)


def sampled_ratio(value: float, ours: Any, theirs: Any) -> Estimate:
    """A ratio with resamples [B] of both sides; it has no interval where that of the lower side reaches zero."""

    def at(level: float) -> Interval:
        drawn = np.divide(ours, theirs, out=np.full(len(theirs), np.nan), where=theirs > 0)
        above = resampling.percentiles(theirs, level)[0] > 0
        return resampling.percentiles(drawn, level) if above else [math.nan] * 2

    return Estimate(value, at)


def stored(value: Any, confidence_95: Any) -> Estimate:
    """A value with its stored 95 % interval; for other levels its ends move as those of a normal distribution do."""
    number, ends = finite(value), [finite(end) for end in sequence(confidence_95)]
    if number is None or len(ends) != 2 or None in ends:
        return Estimate(math.nan if number is None else number)

    def at(level: float, ends: Sequence[Any] = ends) -> Interval:
        scale = metrics.normal_quantile((1 + level) / 2) / metrics.normal_quantile(0.975)
        return [number + scale * (end - number) for end in ends]

    return Estimate(number, at)


def differing(before: Record, after: Record, names: Sequence[str]) -> str | None:
    """The first of the fields `names` in which two results differ; of `DATA`, if both hold it."""
    for name in names:
        pair = getattr(before, name), getattr(after, name)
        if pair[0] != pair[1] and not (name in DATA and None in pair):
            return name
    return None


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b of two values that are known by their intervals; one without noise counts as exact."""

    def at(level: float) -> Interval:
        (low_a, high_a), (low_b, high_b) = _ends(a, level), _ends(b, level)
        low = a.value - b.value - math.hypot(a.value - low_a, high_b - b.value)
        return [low, a.value - b.value + math.hypot(high_a - a.value, b.value - low_b)]

    return Estimate(a.value - b.value, at if a.at or b.at else None)


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent values that are known by their intervals."""
    n = len(estimates)
    value = sum(one.value for one in estimates) / n

    def at(level: float) -> Interval:
        ends = [(one.value, *_ends(one, level)) for one in estimates]
        low, high = (math.hypot(*(row[0] - row[side] for row in ends)) / n for side in (1, 2))
        return [value - low, value + high]

    return Estimate(value, at if any(one.at for one in estimates) else None)


def mean_bounds(bounds: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The lowest and the highest mean of values with such bounds."""
    low, high = (statistics.fmean(ends) for ends in zip(*bounds, strict=True))
    return low, high


def ratio(a: Estimate, b: Estimate) -> Estimate:
    """a / b, b above zero, of two values that are known by their intervals; one without noise counts as exact."""

    def at(level: float) -> Interval:
        (low_a, high_a), (low_b, high_b) = _ends(a, level), _ends(b, level)
        return [_bound(a.value, low_a, b.value, high_b, -1), _bound(a.value, high_a, b.value, low_b, 1)]

    return Estimate(a.value / b.value, at if a.at or b.at else None)


def _bound(a: float, end_a: float, b: float, end_b: float, sign: int) -> float:
    """One end of the interval of a / b (Donner and Zou 2012, equation 9); infinite where b may be zero."""
    scale = end_b * (2 * b - end_b)
    if scale <= 0:
        return sign * math.inf
    inside = (a * b) ** 2 - end_a * end_b * (2 * a - end_a) * (2 * b - end_b)
    return (a * b + sign * math.sqrt(max(inside, 0.0))) / scale


def _ends(estimate: Estimate, level: float) -> Interval:
    return estimate.interval(level) or [estimate.value, estimate.value]
