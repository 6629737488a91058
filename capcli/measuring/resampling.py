"""Counts that metrics are made of, and resamples of them.

Letters: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]
Seed = int | Sequence[int]
RESAMPLES = 1000
BLOCK = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What each example adds to the counts [3, C]: rows [M, 3 C] (sparse), which of them it is, index [N], and how many
    examples add it, times [M]."""

    rows: Any
    index: Index
    times: Index

    @property
    def width(self) -> int:
        """Numbers that one resample holds."""
        return int(max(self.rows.shape))

    def total(self) -> Array:
        """Counts [3, C] of all examples."""
        sums: Array = self.of(self.times[None].astype(np.float64))[0]
        return sums

    def of(self, times: Array) -> Array:
        """Counts [B, 3, C] when row m is added times [B, M] times."""
        return np.ascontiguousarray((self.rows.T @ times.T).T).reshape(len(times), 3, -1)

    def of_examples(self, times: Array) -> Array:
        """Counts [B, 3, C] when example n occurs times [B, N] times."""
        from scipy.sparse import csr_array

        n = len(self.index)
        place = csr_array((np.ones(n), self.index, np.arange(n + 1)), shape=(n, len(self.times)))
        return self.of(times @ place)

    def resamples(self, seed: int) -> Iterator[Array]:
        """Counts [B, 3, C] of resamples of all examples, RESAMPLES in all, in blocks that bound the memory."""
        for times in draws(self.times, self.width, seed):
            yield self.of(times)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """True and predicted numbers [N], of which a metric is no function of sums; they serve as `Counts` do."""

    truth: Array
    predicted: Array

    @property
    def width(self) -> int:
        """Numbers that one resample holds."""
        return len(self.truth)

    def total(self) -> Array:
        """Pairs [2, N] of all examples."""
        return np.stack([self.truth, self.predicted])

    def of_examples(self, times: Array) -> Array:
        """Pairs [B, 2, N] when example n occurs times [B, N] times."""
        rows = np.stack([np.repeat(np.arange(self.width), row.astype(np.int64)) for row in times])
        return np.stack([self.truth[rows], self.predicted[rows]], axis=-2)

    def resamples(self, seed: int) -> Iterator[Array]:
        """Pairs [B, 2, N] of resamples of all examples; NaN when a number is not finite, for only resamples without it
        would have a value."""
        yield from _resampled(self, self.width, seed)


@dataclass(frozen=True, kw_only=True)
class GroupedPairs:
    """True and predicted numbers [R] of rows that are drawn by group: index [R] is the group of each, of N."""

    truth: Array
    predicted: Array
    index: Index

    @property
    def width(self) -> int:
        """Numbers that one resample holds."""
        return len(self.truth)

    def total(self) -> Array:
        """Truth, prediction and weight [3, R] of all rows."""
        return np.stack([self.truth, self.predicted, np.ones(self.width)])

    def of_examples(self, times: Array) -> Array:
        """The same [B, 3, R] when group n occurs times [B, N] times."""
        weights = times[:, self.index]
        return np.stack(
            [np.broadcast_to(one, weights.shape) for one in (self.truth, self.predicted)] + [weights], axis=-2
        )

    def resamples(self, seed: int) -> Iterator[Array]:
        """The same of resamples of all groups; NaN when a number is not finite."""
        yield from _resampled(self, int(self.index.max()) + 1, seed)


def _resampled(some: Pairs | GroupedPairs, n: int, seed: int) -> Iterator[Array]:
    """Resamples of `n` examples or groups; one of NaN when a prediction is not finite."""
    if not np.isfinite(some.predicted).all():
        yield np.full((1, *some.total().shape), np.nan)
        return
    for times in draws(np.ones(n, dtype=np.int64), some.width, seed):
        yield some.of_examples(times)


def draws(times: Index, width: int, seed: Seed) -> Iterator[Array]:
    """How often each of M different examples, of which there are times [M], occurs in resamples: blocks [B, M]."""
    rng = np.random.default_rng(seed)
    n = times.sum()
    for size in _blocks(width):
        yield rng.multinomial(n, times / n, size=size).astype(np.float64)


def _blocks(width: int) -> Iterator[int]:
    """Sizes of blocks of resamples with `width` numbers each."""
    size = max(1, BLOCK // width)
    yield from (min(size, RESAMPLES - begin) for begin in range(0, RESAMPLES, size))


Events = tuple[NDArray[Any], ...]


def from_events(hit: Events, true: Events, predicted: Events, n_classes: int, index: Index, times: Index) -> Counts:
    """Counts of the classes from single events: (example, class) of those that are hit, true, and predicted."""
    from scipy.sparse import coo_array

    row = np.concatenate([events[0] for events in (hit, true, predicted)])
    column = np.concatenate([part * n_classes + events[1] for part, events in enumerate((hit, true, predicted))])
    shape = (len(times), 3 * n_classes)
    return Counts(rows=coo_array((np.ones(len(row)), (row, column)), shape=shape).tocsr(), index=index, times=times)


def from_table(table: Sequence[tuple[float, float, float]]) -> Counts:
    """Counts of one class from what each example adds to hit, true and predicted, [N, 3]."""
    from scipy.sparse import csr_array

    all_rows = np.asarray(table, dtype=np.float64)
    rows, index, times = np.unique(all_rows, axis=0, return_inverse=True, return_counts=True)
    return Counts(rows=csr_array(rows), index=index.ravel(), times=times)


def bootstrap(
    values: dict[str, Callable[[Array], Array]], resamples: Iterator[Array], level: float
) -> dict[str, list[float]]:
    """The interval at `level` of each value, over blocks of resamples."""
    blocks = [{name: value(block) for name, value in values.items()} for block in resamples]
    return {name: percentiles(np.concatenate([block[name] for block in blocks]), level) for name in values}


def percentiles(values: Array, level: float = 0.95) -> list[float]:
    """The interval that holds the middle `level` of the finite values; NaN when there are none."""
    values = values[np.isfinite(values)]
    ends = [50 * (1 - level), 50 * (1 + level)]
    return [float(v) for v in np.percentile(values, ends)] if len(values) else [float("nan")] * 2
