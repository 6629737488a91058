"""How good vectors of texts are: by the scores of pairs, and by the vectors of another model. numpy only.

Letters: N examples, K texts of each, H hidden size, T texts, M neighbours of a text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capcli.measuring.resampling import Array, Counts, Pairs, from_table

NEIGHBOURS = 10
MOST_TEXTS = 10_000  # among which neighbours are looked for: their number is squared
DIGITS = 6  # of a cosine: what is closer is the same, whatever the order of the operations was
ROWS = 1000  # texts whose neighbours are looked for together


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What vectors [N, K, H] are held against: the scores of pairs [N], where there are any, and the vectors [N, K, H]
    of the model to compare with."""

    vectors: Array
    scores: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.vectors)


def scored_pairs(truth: Wanted, outputs: Array) -> Pairs:
    """The scores of the pairs and the cosines of their vectors."""
    assert truth.scores is not None, "only pairs with scores are measured by them"
    first, second = np.moveaxis(_unit(outputs), 1, 0)
    return Pairs(truth=truth.scores.astype(np.float64), predicted=(first * second).sum(axis=-1))


def count_cosines(truth: Wanted, outputs: Array) -> Counts:
    """By example the sum of the cosines of its texts' vectors with those of the other model, of so many texts."""
    cosines = (_unit(truth.vectors) * _unit(outputs)).sum(axis=-1)  # [N, K]
    n_texts = cosines.shape[1]
    return from_table([(float(row.sum()), n_texts, n_texts) for row in cosines])


def count_neighbours(truth: Wanted, outputs: Array) -> Counts:
    """By example how many of the nearest neighbours of its texts, by the other model, are so by this one too.

    The neighbours of a text are the `NEIGHBOURS` others with the highest cosine, all others where there are fewer, of
    equal ones the first; among the first `MOST_TEXTS` texts. Others are those that the other model can tell from it.
    """
    n_texts = outputs.shape[1]
    theirs, ours = (_unit(part).reshape(-1, part.shape[-1])[:MOST_TEXTS] for part in (truth.vectors, outputs))
    found, known = np.zeros(len(truth) * n_texts), np.zeros(len(truth) * n_texts)
    for begin in range(0, len(ours), ROWS):
        rows = slice(begin, begin + ROWS)
        their_cosines, our_cosines = (np.round(part[rows] @ part.T, DIGITS) for part in (theirs, ours))
        others = their_cosines < 1
        wanted, given = _nearest(their_cosines, others), _nearest(our_cosines, others)
        found[rows][: len(others)] = (wanted & given).sum(axis=1)
        known[rows][: len(others)] = wanted.sum(axis=1)
    sums = [part.reshape(-1, n_texts).sum(axis=1).tolist() for part in (found, known)]
    return from_table(list(zip(*sums, sums[1], strict=True)))


def _nearest(cosines: Array, others: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which texts are the nearest neighbours: rows of cosines [R, T] among those that are `others` [R, T]."""
    order = np.arange(cosines.shape[1]) * (10.0**-DIGITS / (2 * MOST_TEXTS))  # of equal cosines the first
    ranked = np.where(others, cosines - order, -np.inf)
    count = min(NEIGHBOURS, ranked.shape[1])
    best = np.argpartition(-ranked, count - 1, axis=1)[:, :count]
    found = np.zeros(ranked.shape, dtype=bool)
    np.put_along_axis(found, best, values=True, axis=1)
    return found & others


def _unit(vectors: Array) -> Array:
    """Vectors of length 1; what has no direction stays as it is."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1))


def average(vectors: Array) -> Array:
    """The vector [H] whose mean cosine with vectors [N, K, H] is highest: the mean of their directions."""
    return np.asarray(_unit(vectors).mean(axis=(0, 1)))


def directions(vectors: Array) -> set[int]:
    """Something for each different direction among vectors [N, K, H], at most two: 0, and 1 if there are others."""
    cosines = _unit(vectors).reshape(-1, vectors.shape[-1])
    return {0} if (np.round(cosines @ cosines[0], DIGITS) == 1).all() else {0, 1}
