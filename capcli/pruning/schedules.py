"""How sparse the model is at each step of a run, and how far the learning rate has come.

Letters: T steps of the run. `sparsity` is the fraction removed, in [0, 1).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

RISE_OF_UNITS, RISE_OF_DIMENSIONS = 0.1, 0.01  # how much a step of a step schedule removes


Shape = Callable[["Schedule", int, int], float]  # see `Schedule.shape`


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The sparsity that holds during each of `total` steps: dense, then rising as `shape` says, then at `final`.

    shape: (schedule, steps since the dense part, steps of the rise) -> sparsity.
    start: removed before the first step, and in the dense part, which is then not dense.
    initial: removed at once at the end of the dense part (GMP★, arXiv 2210.06384; 0 for none).
    every: at least so many steps lie between two rises. earliest: no rise before this step; scores are not known yet.
    stairs: the values of `stairs`, the last of which is `final`.
    """

    total: int
    final: float
    dense_share: float
    final_share: float
    shape: Shape
    start: float = 0.0
    initial: float = 0.0
    every: int = 1
    earliest: int = 0
    stairs: Sequence[float] = ()

    def __call__(self, step: int) -> float:
        """The sparsity that holds during `step`."""
        begin, end = self._ramp()
        if step >= end:
            return self.final
        if step < begin:
            return self.start
        return self.shape(self, (step - begin) // self.every * self.every, max(1, end - begin))

    def _ramp(self) -> tuple[int, int]:
        """First step that prunes and first step at the final sparsity; the last step is always at the final one."""
        end = min(self.total - 1, math.ceil(round((1 - self.final_share) * self.total, 6)))
        begin = math.floor(round(self.dense_share * self.total, 6))
        return min(end, max(begin, self.earliest)), end


def cubic(schedule: Schedule, done: int, length: int) -> float:
    """s_f - (s_f - s_0)·(1 - progress)³, a new value at each step (section 4, schedule)."""
    return schedule.final - (schedule.final - schedule.initial) * (1 - done / length) ** 3


def cubic_in_steps(schedule: Schedule, done: int, length: int) -> float:
    """`cubic`, held until it has risen by a hundredth: importance of single steps is too noisy to act on."""
    sparsity = cubic(schedule, done, length)
    if sparsity == schedule.final:
        return sparsity
    return math.floor(sparsity / RISE_OF_DIMENSIONS + 1e-9) * RISE_OF_DIMENSIONS


def equal_steps(schedule: Schedule, done: int, length: int) -> float:
    """Equal rises of at most a tenth, each followed by training (section 4, cap-f)."""
    n_rises = max(1, math.ceil(schedule.final / RISE_OF_UNITS - 1e-9))
    reached = min(n_rises, 1 + done * n_rises // length)
    return schedule.final * (reached / n_rises)  # the last rise is exactly final


def stairs(schedule: Schedule, done: int, length: int) -> float:
    """The values of `Schedule.stairs`: of k before the last, the i-th holds for i shares of the rise.

    A network that has lost more needs more steps; the last value has the final share of the run.
    """
    before = schedule.stairs[:-1]
    shares = len(before) * (len(before) + 1) // 2
    reached = sum(done * shares >= length * (i * (i + 1) // 2) for i in range(len(before)))
    return before[reached - 1] if before else schedule.final


def one_by_one(schedule: Schedule, done: int, length: int) -> float:
    """The values of `Schedule.stairs`, one at each step: of a run that trains nothing."""
    return schedule.stairs[done]


def between(before: float, after: float, n: int) -> list[float]:
    """`n` sparsities from one to a higher one, which is the last of them: what stays shrinks by the same factor each
    time."""
    ratio = (1 - after) / (1 - before)
    return [*(1 - (1 - before) * ratio ** (i / n) for i in range(1, n)), after]


def lr_factor(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate at `step`: linear rise over the `warmup` share, then linear fall to zero."""
    rising = max(1, round(warmup * total))
    return (step + 1) / rising if step < rising else (total - step) / max(1, total - rising)


def cycle(step: int, total: int, rises: Sequence[int]) -> tuple[int, int]:
    """Step inside the current cycle, and its length: a cycle begins at step 0 and at each rise of the sparsity."""
    ends = [*rises, total]
    index = bisect_right(rises, step)
    begin = rises[index - 1] if index else 0
    return step - begin, ends[index] - begin
