"""The one timer: calls in turn, so that whatever else the machine does meets all of them alike; without torch.

Letters: R rounds, C calls of a round.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator, Sequence

Call = Callable[[], object]
"""What is timed. It returns when its work is done: on an accelerator, it waits for it."""


def in_turn(
    rounds: Sequence[Sequence[Call]], *, seconds: float, least: int = 3, warm_up: int = 1
) -> Generator[tuple[int, int], None, list[list[float]]]:
    """Seconds [R, C] of the calls of each round, made one after the other, round after round.

    First the calls of the first round are made `warm_up` times without counting. When the calls have taken `seconds`,
    and at least `least` rounds are done, the rest is left out. Yields how many rounds are done, of how many.
    """
    for _ in range(warm_up):
        for call in rounds[0]:
            call()
    found: list[list[float]] = []
    for calls in rounds:
        found.append([_seconds(call) for call in calls])
        yield len(found), len(rounds)
        if len(found) >= least and sum(map(sum, found)) > seconds:
            break
    return found


def _seconds(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def median_interval(values: Sequence[float], level: float = 0.95) -> list[float]:
    """Interval of the median, from one value to another of those that ascend, whatever their distribution.

    The number of values below the median is binomial (David and Nagaraja 2003, section 7.1). Of too few values: NaN.
    """
    n = len(values)
    below = itertools.accumulate(math.comb(n, k) / 2**n for k in range(n + 1))
    first = next(k for k, share in enumerate(below) if share >= (1 - level) / 2)
    return [values[first - 1], values[n - first]] if first else [math.nan] * 2
