"""Metrics of vectors against slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from capcli.measuring import answers, chance, metrics
from capcli.measuring.embeddings import Wanted

RNG = np.random.default_rng(3)
THEIRS = RNG.standard_normal((30, 2, 6))
OURS = THEIRS + 0.4 * RNG.standard_normal((30, 2, 6))
SCORES = RNG.integers(0, 6, 30).astype(np.float64)
ALL = ("spearman", "pearson", "cosine", "recall_at_10")


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(a * a) * sum(b * b)))


def neighbours(vectors: list[np.ndarray], place: int, others: list[int]) -> set[int]:
    """The ten with the highest cosine, of equal ones the first."""
    return set(sorted(others, key=lambda i: (-round(cosine(vectors[place], vectors[i]), 6), i))[:10])


def slow_recall(theirs: np.ndarray, ours: np.ndarray) -> float:
    a, b = list(theirs.reshape(-1, theirs.shape[-1])), list(ours.reshape(-1, ours.shape[-1]))
    hit = wanted = 0
    for place in range(len(a)):
        others = [i for i in range(len(a)) if round(cosine(a[place], a[i]), 6) < 1]
        found = neighbours(a, place, others)
        hit, wanted = hit + len(found & neighbours(b, place, others)), wanted + len(found)
    return hit / wanted


def measured(theirs: np.ndarray, ours: np.ndarray, names: tuple[str, ...] = ALL) -> dict[str, float]:
    return metrics.measure("embedding", names, Wanted(vectors=theirs, scores=SCORES[: len(theirs)]), ours)


def test_values_are_those_of_slow_loops() -> None:
    found = measured(THEIRS, OURS)
    cosines = [cosine(a, b) for a, b in OURS]
    assert found["spearman"] == pytest.approx(spearmanr(SCORES, cosines).statistic)
    assert found["pearson"] == pytest.approx(pearsonr(SCORES, cosines).statistic)
    every = [cosine(a, b) for a, b in zip(THEIRS.reshape(-1, 6), OURS.reshape(-1, 6), strict=True)]
    assert found["cosine"] == pytest.approx(sum(every) / len(every))
    assert found["recall_at_10"] == pytest.approx(slow_recall(THEIRS, OURS))
    assert 0.2 < found["recall_at_10"] < 0.95


def test_a_text_that_occurs_twice_is_no_neighbour_of_itself() -> None:
    theirs, ours = THEIRS.copy(), OURS.copy()
    theirs[5], ours[5] = theirs[0], ours[0] + 1e-9  # as another batch rounds
    assert measured(theirs, ours)["recall_at_10"] == pytest.approx(slow_recall(theirs, ours))


@pytest.mark.parametrize("n", [1, 3, 5])
def test_few_texts_have_fewer_neighbours(n: int) -> None:
    theirs, ours = THEIRS[:n, :1], OURS[:n, :1]
    found = measured(theirs, ours, ("recall_at_10",))["recall_at_10"]
    assert math.isnan(found) if n == 1 else found == 1


def test_the_length_of_vectors_does_not_matter() -> None:
    lengths = RNG.uniform(0.1, 9, (30, 2, 1))
    assert measured(THEIRS * lengths, OURS / lengths) == pytest.approx(measured(THEIRS, OURS))
    assert measured(THEIRS, THEIRS)["recall_at_10"] == 1
    assert measured(THEIRS, THEIRS)["cosine"] == pytest.approx(1)


def test_guessing_is_one_vector_for_everything() -> None:
    """The best is the mean direction, whose mean cosine is its length."""
    by_chance = chance.of("embedding", ALL, Wanted(vectors=THEIRS, scores=SCORES), OURS)
    units = [row / math.sqrt(sum(row * row)) for row in THEIRS.reshape(-1, 6)]
    assert by_chance["spearman"] == by_chance["pearson"] == 0
    assert by_chance["cosine"] == pytest.approx(np.linalg.norm(sum(units) / len(units)))
    same = np.broadcast_to(THEIRS[0, 0], THEIRS.shape) * RNG.uniform(1, 2, (30, 2, 1))
    truth = Wanted(vectors=THEIRS, scores=SCORES)
    assert answers.constant("embedding", (), truth, same) == "the same vector"
    assert answers.constant("embedding", (), truth, OURS) == ""


def test_intervals_hold_the_value_and_depend_on_the_seed_alone() -> None:
    truth = Wanted(vectors=THEIRS, scores=SCORES)
    found = metrics.intervals("embedding", ALL, truth, OURS, 5)
    assert found == metrics.intervals("embedding", ALL, truth, OURS, 5)
    assert found != metrics.intervals("embedding", ALL, truth, OURS, 6)
    assert all(low < measured(THEIRS, OURS)[name] < high for name, (low, high) in found.items())
