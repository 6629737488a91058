"""The score of a probe: several probes of one task, their mean and its noise; what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.measuring import chance, noise
from capcli.records.measured import LayerScore, ProbeBaseline, TaskScore
from capcli.records.parts import interval
from capcli.reporting.text import number

SHARE = 0.8  # of the training examples that each probe is trained on
MEAN = "mean"

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score of S probes: their values [S], and resamples [B] of their mean.

    n_examples: of how many independent examples it is a share; 0 of other metrics. The interval of a share is never
    narrower than Wilson's, as resamples of examples that are all right know no other. chance: what guessing scores.
    """

    values: Array
    draws: Array
    n_examples: int = 0
    chance: float = math.nan

    @property
    def mean(self) -> float:
        """Mean over the probes."""
        return float(self.values.mean())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the probes; None of one."""
        return float(self.values.std(ddof=1)) if len(self.values) > 1 else None

    @property
    def estimate(self) -> noise.Estimate:
        """The mean with its interval."""
        drawn = noise.sampled(self.mean, self.draws)
        return noise.widened(drawn, self.n_examples) if self.n_examples else drawn

    @property
    def at_chance(self) -> bool:
        """Whether the mean is no better than guessing, beyond the noise."""
        return chance.is_at_chance("", self.estimate, self.chance, None)

    def layer(self, layer: int) -> LayerScore:
        """As a result holds it, of vectors from `layer`."""
        return LayerScore(
            layer=layer,
            mean=self.mean,
            deviation=self.deviation,
            confidence_95=interval(self.estimate.interval(0.95)),
            values=tuple(self.values.tolist()),
        )


def with_mean(scores: Mapping[str, Score]) -> dict[str, Score]:
    """Scores of tasks, whose examples are independent, and their mean."""
    if len(scores) == 1:
        return {**scores, MEAN: next(iter(scores.values()))}
    values, draws, by_chance = (
        np.mean([getattr(one, what) for one in scores.values()], axis=0) for what in ("values", "draws", "chance")
    )
    return {**scores, MEAN: Score(values=values, draws=draws, chance=float(by_chance))}


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What the model is compared with: scores by task and `mean`, and how far those of the model are from them.

    at_chance: what guessing scores, of those in which it is no better.
    """

    row: ProbeBaseline
    values: Mapping[str, float]
    differences: Mapping[str, noise.Estimate]
    ratios: Mapping[str, noise.Estimate]
    at_chance: Mapping[str, float]

    def shown(self) -> ProbeBaseline:
        """For the result."""
        return replace(self.row, differences={name: one.row() for name, one in self.differences.items()})


def guessing(models: Mapping[str, Mapping[str, TaskScore]]) -> list[str]:
    """A note for each of the models whose probes of some tasks are no better than guessing."""
    found = []
    for model, rows in models.items():
        tasks = [
            f"{name} ({row.metric} {number(row.mean)}, chance {number(row.chance)})"
            for name, row in rows.items()
            if row.at_chance
        ]
        found += [f"{model}: no better than guessing on {', '.join(tasks)}"] if tasks else []
    return found
