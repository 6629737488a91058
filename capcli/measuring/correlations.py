"""Correlations of true and predicted numbers, of rows that count once or as often as a resample has them.

Letters: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from capcli.measuring.resampling import Array, GroupedPairs, Pairs


def pearson(truth: Array, predicted: Array) -> Array:
    """Correlation along the last axis of two [..., N]; NaN when either is constant."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (truth, predicted))
    scale = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    varies = (np.ptp(truth, axis=-1) > 0) & (np.ptp(predicted, axis=-1) > 0) & (scale > 0)  # rounding hides constants
    return np.asarray(np.where(varies, (a * b).sum(axis=-1) / np.where(scale > 0, scale, 1), np.nan))


def spearman(truth: Array, predicted: Array) -> Array:
    """Rank correlation along the last axis of two [..., N]."""
    from scipy.stats import rankdata

    return pearson(rankdata(truth, axis=-1), rankdata(predicted, axis=-1))


def pairs(truth: NDArray[np.generic], outputs: Array) -> Pairs:
    """Of numbers [N] and outputs [N, 1]."""
    return Pairs(truth=truth.astype(np.float64), predicted=outputs[:, 0])


def of_pairs(value: Callable[[Array, Array], Array]) -> Callable[[Array], Array]:
    """A correlation as a function of pairs [..., 2, N]."""
    return lambda both: value(both[..., 0, :], both[..., 1, :])


def weighted_pearson(truth: Array, predicted: Array, weights: Array) -> Array:
    """`pearson` of rows that count as often as their weights [..., N] say."""
    n = weights.sum(axis=-1, keepdims=True)
    a, b = (x - (weights * x).sum(axis=-1, keepdims=True) / n for x in (truth, predicted))
    scale = np.sqrt((weights * a**2).sum(axis=-1) * (weights * b**2).sum(axis=-1))
    varies = _varies(truth, weights) & _varies(predicted, weights) & (scale > 0)
    return np.asarray(np.where(varies, (weights * a * b).sum(axis=-1) / np.where(scale > 0, scale, 1), np.nan))


def _varies(values: Array, weights: Array) -> NDArray[np.bool_]:
    """Whether rows with a weight have different values."""
    counts = weights > 0
    high, low = np.where(counts, values, -np.inf).max(axis=-1), np.where(counts, values, np.inf).min(axis=-1)
    return np.asarray(high > low)


def weighted_spearman(truth: Array, predicted: Array, weights: Array) -> Array:
    """`spearman` of rows that count as often as their weights [..., N] say."""
    return weighted_pearson(_weighted_ranks(truth, weights), _weighted_ranks(predicted, weights), weights)


def _weighted_ranks(values: Array, weights: Array) -> Array:
    """Mean rank [..., N] of each value among rows that occur as often as their weights say; equal ones share it."""
    order = np.argsort(values, axis=-1, kind="stable")
    first = order.reshape(-1, order.shape[-1])[0]  # the values are the same in all resamples
    ordered = values.reshape(-1, order.shape[-1])[0][first]
    begins = np.flatnonzero(np.diff(ordered, prepend=-np.inf))
    times = np.add.reduceat(weights[..., first], begins, axis=-1)
    ranks = times.cumsum(axis=-1) - (times - 1) / 2
    place = np.empty(len(first), dtype=np.int64)
    place[first] = np.repeat(np.arange(len(begins)), np.diff(begins, append=len(first)))
    return np.asarray(ranks[..., place])


def grouped_pairs(truth: Sequence[Array], outputs: Sequence[Array]) -> GroupedPairs:
    """Of numbers by query, and outputs by query."""
    index = np.repeat(np.arange(len(truth)), [len(one) for one in truth])
    return GroupedPairs(truth=np.concatenate(truth), predicted=np.concatenate(outputs), index=index)


def of_grouped(value: Callable[[Array, Array, Array], Array]) -> Callable[[Array], Array]:
    """A correlation as a function of weighted pairs [..., 3, N]."""
    return lambda rows: value(rows[..., 0, :], rows[..., 1, :], rows[..., 2, :])
