"""How good an order of documents is, by query; numpy alone.

Among documents with the same score every order is equally likely, and a value is the mean over these orders (McSherry
and Najork 2008): it does not depend on the order of the rows, and a model that gives one score to all documents has
what a random order has on average.

Letters: D documents of a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import comb

import numpy as np
from numpy.typing import NDArray

CUT = 10  # ranks that count
Array = NDArray[np.float64]


def ndcg(relevance: Array, scores: Array) -> float:
    """nDCG@10 of documents with relevances [D], at least 0, and scores [D]: the sum of relevance / log2(rank + 1) over
    the first 10 ranks, as a share of that of the best order. 0 without a relevant document, as scikit-learn has it."""
    discounts = np.zeros(len(relevance))
    discounts[:CUT] = 1 / np.log2(np.arange(2, min(CUT, len(relevance)) + 2))
    best = float(np.sort(relevance)[::-1] @ discounts)
    if best == 0:
        return 0.0
    found = sum(relevance[tied].mean() * discounts[begin : begin + len(tied)].sum() for begin, tied in _ties(scores))
    return float(found) / best


def reciprocal_rank(relevance: Array, scores: Array) -> float:
    """1 / rank of the first document with a relevance above 0, if it is among the first 10 ranks; else 0."""
    for begin, tied in _ties(scores):
        size, hits = len(tied), int((relevance[tied] > 0).sum())
        if hits:  # the first of them is at place i of the tied ones, after i that are not relevant
            ways = (comb(size - 1 - i, hits - 1) for i in range(size - hits + 1))
            at = enumerate(ways, begin + 1)
            return sum(n / comb(size, hits) / rank for rank, n in at if rank <= CUT)
    return 0.0


def _ties(scores: Array) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """From the highest score down: how many documents come before, and which have this score."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order])) + 1
    begin = 0
    for tied in np.split(order, ends):
        yield begin, tied
        begin += len(tied)
