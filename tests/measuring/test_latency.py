"""Latency: what is asked, in which order, when it ends, and the figures that come of it; on a clock that calls move."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from capcli import timing
from capcli.data.batches import Examples
from capcli.events import finished
from capcli.measuring import latency
from capcli.measuring.latency import System
from capcli.records.codec import to_json

Asked = list[tuple[str, int, int]]  # who, batch, length


class Clock:
    """A clock that stands still but for what is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("capcli.timing.time", found)
    monkeypatch.setattr(latency, "FIXED_SECONDS", 4.0)
    return found


def texts(lengths: list[int]) -> Examples:
    """Texts of these lengths; token 1 stands for all words, and padding is 0."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.ones(offsets[-1], np.int32)
    return Examples(tokens=tokens, types=None, offsets=offsets, labels=np.zeros(len(lengths), np.int64), pad_id=0)


def system(name: str, clock: Clock, asked: Asked, examples: Examples | None, token_seconds: float, batch: int = 1):
    """Something that takes its time for each token, padding included."""

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, None]:
        rows, width = inputs["input_ids"].shape
        asked.append((name, rows, width))
        clock.now += token_seconds * rows * width
        return torch.zeros(rows, 2), None

    inputs = {"input_ids": torch.ones(batch, 128, dtype=torch.long)}
    conditions = {"runtime": name, "threads": 1}
    return System(run=run, inputs=inputs, device=torch.device("cpu"), conditions=conditions, examples=examples)


# The timer -----------------------------------------------------------------------------------------------------------


def test_calls_take_turns_and_the_first_rounds_are_not_counted(clock: Clock) -> None:
    said: list[str] = []

    def call(name: str, seconds: float) -> timing.Call:
        def work() -> None:
            said.append(name)
            clock.now += seconds

        return work

    rounds = [[call("a", 1.0), call("b", 2.0)], [call("c", 3.0), call("d", 4.0)]]
    assert finished(timing.in_turn(rounds, seconds=100, warm_up=2)) == [[1, 2], [3, 4]]
    assert "".join(said) == "ababab" + "cd"


def test_rounds_end_when_the_time_is_over_but_not_before_the_least(clock: Clock) -> None:
    def call() -> None:
        clock.now += 1.0

    def n_rounds(seconds: float, least: int) -> int:
        return len(finished(timing.in_turn([[call, call]] * 30, seconds=seconds, least=least)))

    assert [n_rounds(1e9, 3), n_rounds(10, 3), n_rounds(9.5, 3), n_rounds(0, 3), n_rounds(0, 6)] == [30, 6, 5, 3, 6]


def test_what_is_done_between_the_calls_is_not_counted(clock: Clock) -> None:
    """Who hears of the progress may take his time."""
    work = timing.in_turn([[lambda: None]] * 30, seconds=1)
    told = []
    for progress in work:
        told.append(progress)
        clock.now += 10
    assert told == [(n, 30) for n in range(1, 31)]


def test_the_interval_of_a_median_by_order() -> None:
    """Of 30: P(fewer than 10 of 30 below the median) = 0.0214 <= 0.025 < 0.0494, so the 10th and the 21st value."""
    assert timing.median_interval(list(range(1, 31))) == [10, 21]
    assert timing.median_interval(list(range(1, 31)), 0.99) == [8, 23]
    assert all(map(math.isnan, timing.median_interval([1.0, 2.0, 3.0])))
    assert timing.median_interval([1.0, 2.0, 3.0], 0.7) == [1, 3]
    assert not any(map(math.isnan, timing.median_interval(list(range(latency.LEAST_ROUNDS)))))


def test_the_interval_of_a_median_covers_it() -> None:
    rng = np.random.default_rng(3)
    draws = np.sort(rng.lognormal(size=(3000, 30)), axis=1)  # median 1
    inside = np.mean([low <= 1 <= high for low, high in map(timing.median_interval, draws)])
    exact = 1 - 2 * stats.binom.cdf(9, 30, 0.5)
    assert inside == pytest.approx(exact, abs=0.015) and exact > 0.95


# What is measured ----------------------------------------------------------------------------------------------------


def test_two_systems_are_measured_in_turn(clock: Clock) -> None:
    """64 texts of 1 to 64 tokens; the second system takes twice the time for each."""
    asked: Asked = []
    examples = texts([1 + 37 * n % 64 for n in range(64)])
    systems = {name: system(name, clock, asked, examples, cost) for name, cost in (("a", 1e-5), ("b", 2e-5))}
    found = finished(latency.measured(systems))
    n_first = 2 * (latency.WARM_UP + latency.ROUNDS)
    sizes = [asked.pop(n_first) for _ in range(14)]  # each system is asked a text of each size before
    assert [name for name, *_ in sizes] == ["a"] * 7 + ["b"] * 7
    assert [(w - 1).bit_length() for _, _, w in sizes] == [*range(7)] * 2
    assert [name for name, *_ in asked[::2]] == ["a"] * (len(asked) // 2)
    assert [(n, w) for _, n, w in asked[::2]] == [(n, w) for _, n, w in asked[1::2]]
    half = asked[::2]
    n_fixed = latency.WARM_UP + latency.ROUNDS
    assert [(n, w) for _, n, w in half[:n_fixed]] == [(1, 128)] * n_fixed
    alone, batches = half[n_fixed + 1 : n_fixed + 65], half[n_fixed + 66 :]
    assert sorted(w for _, n, w in alone if n == 1) == list(range(1, 65)), "each text once, without padding"
    assert sorted((n, w) for _, n, w in batches) == [(32, 32), (32, 64)], "like lengths together"
    for name, cost in (("a", 1e-5), ("b", 2e-5)):
        one = found[name]
        assert (one.batch, one.length, one.runtime) == (1, 128, name)
        times = [one.median_ms, one.p10_ms, one.p90_ms, *(one.confidence_95 or ())]
        assert times == pytest.approx([1000 * 128 * cost] * 5)
        expected = {"median_ms": 32.5e3 * cost, "p95_ms": 1e3 * cost * np.percentile(np.arange(1, 65), 95)}
        assert to_json(one.own_lengths) == pytest.approx({**expected, "texts": 64, "median_tokens": 32})
        rate = 64 / (cost * 32 * (32 + 64))
        assert to_json(one.throughput) == pytest.approx({"texts_per_second": rate, "batch": 32, "texts": 64})


@pytest.mark.parametrize(
    ("n", "alone", "batch", "at_once"), [(1, 1, 1, 1), (5, 5, 5, 5), (33, 33, 32, 32), (9999, 200, 32, 256)]
)
def test_how_many_texts_are_asked(clock: Clock, n: int, alone: int, batch: int, at_once: int) -> None:
    asked: Asked = []
    found = finished(latency.measured({"a": system("a", clock, asked, texts([3] * n), 1e-9)}))["a"]
    assert (to_json(found)["own_lengths"]["texts"], to_json(found)["throughput"]["batch"]) == (alone, batch)
    assert to_json(found)["throughput"]["texts"] == at_once


def test_texts_are_taken_from_everywhere_in_an_order_of_the_seed(clock: Clock) -> None:
    systems = {"a": system("a", clock, [], texts([1] * 1000), 1.0)}
    rows = latency.sampled(systems, 200, 1)["a"]
    assert np.array_equal(np.sort(rows), np.linspace(0, 999, 200).round())
    assert np.array_equal(rows, latency.sampled(systems, 200, 1)["a"])
    assert not np.array_equal(rows, latency.sampled(systems, 200, 2)["a"])


def test_a_slow_system_ends_after_a_few_rounds(clock: Clock) -> None:
    """A second for a token: the least is measured, and what was measured is what the result counts."""
    asked: Asked = []
    found = finished(latency.measured({"a": system("a", clock, asked, texts([4] * 400), 1.0)}))["a"]
    assert (to_json(found)["own_lengths"]["texts"], to_json(found)["throughput"]["texts"]) == (3, 96)
    assert to_json(found)["throughput"]["texts_per_second"] == pytest.approx(0.25)
    assert len(asked) == latency.WARM_UP + latency.LEAST_ROUNDS + 1 + 4 + 4


def test_progress_goes_on_to_the_end(clock: Clock) -> None:
    told = list(latency.measured({"a": system("a", clock, [], texts([2] * 40), 1e-9)}))
    total = latency.ROUNDS + 40 + 1
    assert told == [(n, total) for n in range(1, total + 1)]


def test_systems_with_other_windows_are_asked_equally_often(clock: Clock) -> None:
    """Another tokenizer may make more windows of the same contexts."""
    asked: Asked = []
    systems: dict[str, Any] = {
        name: system(name, clock, asked, texts([5] * n), 1e-9) for name, n in (("a", 40), ("b", 70))
    }
    found = finished(latency.measured(systems))
    assert [to_json(one)["own_lengths"]["texts"] for one in found.values()] == [40, 40]
    assert [to_json(one)["throughput"]["texts"] for one in found.values()] == [32, 32]
