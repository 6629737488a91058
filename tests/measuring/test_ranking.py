"""nDCG and reciprocal ranks against slow loops over all orders; resampling by query against repeated rows."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import ndcg_score

from capcli.measuring import chance, metrics, ranking
from capcli.measuring.resampling import draws

QUERY = st.integers(1, 5).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.5]), min_size=n, max_size=n),
        st.lists(st.sampled_from([-1.0, 0.25, 3.0]), min_size=n, max_size=n),
    )
)


def orders(scores: list[float]) -> list[tuple[int, ...]]:
    """All orders of documents in which no higher score comes after a lower one."""
    every = itertools.permutations(range(len(scores)))
    return [one for one in every if all(scores[a] >= scores[b] for a, b in itertools.pairwise(one))]


def slow_gain(relevance: list[float], order: tuple[int, ...]) -> float:
    return sum(relevance[i] / math.log2(rank + 1) for rank, i in enumerate(order[:10], 1))


def slow_ndcg(relevance: list[float], scores: list[float]) -> float:
    best = max(slow_gain(relevance, one) for one in itertools.permutations(range(len(scores))))
    found = [slow_gain(relevance, one) for one in orders(scores)]
    return sum(found) / len(found) / best if best else 0.0


def slow_rank(relevance: list[float], scores: list[float]) -> float:
    found = [
        next((Fraction(1, rank) for rank, i in enumerate(one[:10], 1) if relevance[i] > 0), Fraction(0))
        for one in orders(scores)
    ]
    return float(sum(found) / len(found))


@given(QUERY)
def test_ties_are_worth_the_mean_over_their_orders(query: tuple[list[float], list[float]]) -> None:
    relevance, scores = query
    arrays = np.array(relevance), np.array(scores)
    assert ranking.ndcg(*arrays) == pytest.approx(slow_ndcg(relevance, scores))
    assert ranking.reciprocal_rank(*arrays) == pytest.approx(slow_rank(relevance, scores))


@pytest.mark.parametrize("seed", range(5))
def test_ndcg_is_that_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    relevance, scores = rng.integers(0, 4, 30).astype(float), rng.integers(0, 12, 30).astype(float)
    expected = ndcg_score(relevance[None], scores[None], k=10)
    assert ranking.ndcg(relevance, scores) == pytest.approx(expected)


def test_only_ten_ranks_count() -> None:
    relevance, scores = np.zeros(12), -np.arange(12.0)
    relevance[10] = 1
    assert ranking.reciprocal_rank(relevance, scores) == ranking.ndcg(relevance, scores) == 0
    relevance[9] = 1
    assert ranking.reciprocal_rank(relevance, scores) == pytest.approx(0.1)
    assert ranking.ndcg(relevance, scores) == pytest.approx(1 / math.log2(11) / (1 + 1 / math.log2(3)))


def by_query(seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    truth = [rng.integers(0, 3, n).astype(float) for n in (4, 1, 7, 2, 5, 3)]
    return truth, [one + rng.normal(0, 1, len(one)).round(1) for one in truth]


def test_metrics_are_means_over_queries_and_correlations_of_all_rows() -> None:
    truth, scores = by_query()
    found = metrics.measure("ranking", ("ndcg", "mrr", "pearson", "spearman"), truth, scores)
    pairs = list(zip(truth, scores, strict=True))
    assert found["ndcg"] == pytest.approx(np.mean([ranking.ndcg(*one) for one in pairs]))
    assert found["mrr"] == pytest.approx(np.mean([ranking.reciprocal_rank(*one) for one in pairs]))
    rows = np.concatenate(truth), np.concatenate(scores)
    assert found["pearson"] == pytest.approx(stats.pearsonr(*rows)[0])
    assert found["spearman"] == pytest.approx(stats.spearmanr(*rows)[0])


def test_whole_queries_are_resampled() -> None:
    truth, scores = by_query()
    names = ("ndcg", "pearson", "spearman")
    found = metrics.resampled("ranking", names, truth, [scores], seed=3)
    times = next(draws(np.ones(6, dtype=np.int64), 22, 3))
    for place in range(20):
        drawn = [i for i, n in enumerate(times[place]) for _ in range(int(n))]
        rows = [np.concatenate([part[i] for i in drawn]) for part in (truth, scores)]
        assert found["ndcg"][0, place] == pytest.approx(np.mean([ranking.ndcg(truth[i], scores[i]) for i in drawn]))
        assert found["pearson"][0, place] == pytest.approx(stats.pearsonr(*rows)[0])
        assert found["spearman"][0, place] == pytest.approx(stats.spearmanr(*rows)[0])


def test_chance_is_a_random_order() -> None:
    truth, scores = by_query(1)
    found = chance.of("ranking", ("ndcg", "mrr", "pearson"), truth, scores)
    expected = np.mean([slow_rank(list(one), [0.0] * len(one)) for one in truth])
    assert found["mrr"] == pytest.approx(expected)
    assert 0 < found["ndcg"] < 1
    assert found["pearson"] == 0
