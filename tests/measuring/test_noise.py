"""Estimates and the noise of their differences and ratios: published values, values by hand, and simulation."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capcli.measuring import metrics, noise
from capcli.measuring.noise import Estimate
from capcli.records.measured import TaskScore


def share(hits: int, n: int) -> Estimate:
    return Estimate(hits / n, partial(metrics.wilson, hits, n))


def fixed(value: float, low: float, high: float) -> Estimate:
    """An estimate with the same interval at every level."""
    return Estimate(value, lambda level: [low, high])


# One estimate --------------------------------------------------------------------------------------------------------


def test_a_sampled_estimate_has_the_percentiles_of_its_resamples() -> None:
    found = noise.sampled(0.5, np.arange(1001.0))
    assert found.interval(0.95) == pytest.approx([25, 975])
    assert found.interval(0.5) == pytest.approx([250, 750])
    assert found.value == 0.5


def test_a_stored_estimate_keeps_its_interval_and_scales_each_end() -> None:
    """z at 95, 90 and 99 %: 1.959964, 1.644854, 2.575829."""
    found = noise.stored(0.8, [0.7, 0.85])
    assert found.interval(0.95) == pytest.approx([0.7, 0.85])
    for level, z in ((0.9, 1.644854), (0.99, 2.575829)):
        scale = z / 1.959964
        assert found.interval(level) == pytest.approx([0.8 - 0.1 * scale, 0.8 + 0.05 * scale], rel=1e-6)


@pytest.mark.parametrize("ends", [None, [], [0.1], [0.1, None], [0.1, "x"], "ab", {"a": 1}, [math.nan, 1.0], [1, 2, 3]])
def test_a_stored_interval_that_is_none_is_not_known(ends: Any) -> None:
    assert noise.stored(0.5, ends) == Estimate(0.5)
    assert noise.stored(0.5, ends).interval(0.95) is None


@pytest.mark.parametrize("value", [None, "0.5", math.nan, math.inf, True, []])
def test_a_stored_value_that_is_none_has_no_interval(value: Any) -> None:
    found = noise.stored(value, [0.1, 0.2])
    assert math.isnan(found.value) and found.interval(0.95) is None


def test_an_interval_that_is_not_finite_is_not_known() -> None:
    assert fixed(0.5, math.nan, 1).interval(0.95) is None
    assert fixed(0.5, 0, math.inf).interval(0.95) is None
    assert fixed(math.nan, 0, 1).interval(0.95) is None
    assert noise.sampled(0.5, np.full(9, np.nan)).interval(0.95) is None


# Differences ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [((56, 70), (48, 80), [0.0524, 0.3339]), ((9, 10), (3, 10), [0.1705, 0.8090]), ((10, 10), (0, 20), [0.6791, 1])],
)
def test_differences_of_shares_are_those_of_newcombe(
    a: tuple[int, int], b: tuple[int, int], expected: list[float]
) -> None:
    """Newcombe (1998), "Interval estimation for the difference between independent proportions", table II, 10."""
    found = noise.difference(share(*a), share(*b))
    assert found.value == pytest.approx(a[0] / a[1] - b[0] / b[1])
    assert found.interval(0.95) == pytest.approx(expected, abs=6e-5)


def test_what_has_no_noise_counts_as_exact() -> None:
    a = fixed(0.8, 0.7, 0.85)
    assert noise.difference(a, Estimate(0.5)).interval(0.95) == pytest.approx([0.2, 0.35])
    assert noise.difference(Estimate(0.5), a).interval(0.95) == pytest.approx([-0.35, -0.2])
    assert noise.ratio(a, Estimate(0.5)).interval(0.95) == pytest.approx([1.4, 1.7])
    assert noise.ratio(Estimate(0.5), a).interval(0.95) == pytest.approx([0.5 / 0.85, 0.5 / 0.7])
    assert noise.difference(Estimate(1), Estimate(2)).interval(0.95) is None
    assert noise.ratio(Estimate(1), Estimate(2)).interval(0.95) is None
    assert noise.difference(Estimate(1), Estimate(2)).value == -1
    assert noise.ratio(Estimate(1), Estimate(2)).value == 0.5


def test_a_ratio_by_hand() -> None:
    """2 in [1, 3] by 4 in [3, 5]: (8 ∓ √(64 - ...)) / 15 with 1·5·3·3 = 45 below, and 3·3·1·5 = 45 above."""
    found = noise.ratio(fixed(2, 1, 3), fixed(4, 3, 5))
    assert found.value == 0.5
    assert found.interval(0.95) == pytest.approx([(8 - math.sqrt(19)) / 15, (8 + math.sqrt(19)) / 15])


@pytest.mark.parametrize("low", [0.0, -0.1])
def test_a_ratio_to_what_may_be_zero_has_no_interval(low: float) -> None:
    assert noise.ratio(fixed(0.5, 0.4, 0.6), fixed(0.1, low, 0.3)).interval(0.95) is None


@given(*[st.tuples(st.floats(0.1, 1), st.floats(0.001, 0.05), st.floats(0.001, 0.05)) for _ in range(2)])
def test_an_interval_holds_its_value_and_turns_with_the_sign(a: tuple[float, ...], b: tuple[float, ...]) -> None:
    x, y = (fixed(v, v - below, v + above) for v, below, above in (a, b))
    forth, back = noise.difference(x, y), noise.difference(y, x)
    low, high = forth.interval(0.95) or [1, 0]
    assert low < forth.value < high
    assert back.interval(0.95) == pytest.approx([-high, -low])
    ratio = noise.ratio(x, y)
    low, high = ratio.interval(0.95) or [1, 0]
    assert low < ratio.value < high
    inverse = noise.ratio(y, x).interval(0.95)
    assert inverse == pytest.approx([1 / high, 1 / low], rel=1e-6)


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("p", [(0.8, 0.7), (0.95, 0.95), (0.5, 0.3)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(p: tuple[float, float], level: float) -> None:
    """Of stored results: Wilson's 95 % intervals of 300 examples each, drawn apart."""
    n, rng = 300, np.random.default_rng(11)
    table = [noise.stored(hits / n, metrics.wilson(hits, n)) for hits in range(n + 1)]
    covered = np.zeros(2)
    draws = rng.binomial(n, p, size=(1500, 2))
    for hits in draws:
        a, b = table[hits[0]], table[hits[1]]
        for i, (found, truth) in enumerate(((noise.difference(a, b), p[0] - p[1]), (noise.ratio(a, b), p[0] / p[1]))):
            low, high = found.interval(level) or [1, 0]
            covered[i] += low <= truth <= high
    assert np.abs(covered / len(draws) - level).max() < 0.022


def test_intervals_of_the_same_examples_are_too_wide_and_not_too_narrow() -> None:
    """Two models that share most of their errors: the truth lies within more often than in 95 of 100 cases."""
    n, rng, inside = 200, np.random.default_rng(2), 0
    for _ in range(600):
        both = rng.random(n) < 0.8
        a, b = (np.where(rng.random(n) < 0.1, rng.random(n) < 0.5, both) for _ in range(2))
        found = noise.difference(*(noise.stored(x.mean(), metrics.wilson(float(x.sum()), n)) for x in (a, b)))
        low, high = found.interval(0.95) or [1, 0]
        inside += low <= 0 <= high
    assert inside / 600 > 0.98


def test_results_differ_in_what_both_hold() -> None:
    row = TaskScore(metric="f1", split="test", n_train=1, n_examples=1, n_classes=1, data="a", max_length=1)
    assert noise.differing(row, replace(row), noise.MEASURED_ON) is None
    for name in noise.MEASURED_ON:
        other: Any = 2 if isinstance(getattr(row, name), int) else "other"
        assert noise.differing(row, replace(row, **{name: other}), noise.MEASURED_ON) == name
        older = replace(row, **{name: None})
        assert noise.differing(row, older, noise.MEASURED_ON) == (None if name in noise.DATA else name)
