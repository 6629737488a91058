"""The score of a probe: several probes of one task, their mean and its noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from capcli.measuring import noise
from capcli.records.measured import LayerScore
from capcli.records.parts import interval

SHARE = 0.8  # of the training examples that each probe is trained on
MEAN = "mean"

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score of S probes: their values [S], and resamples [B] of their mean.

    n_examples: of how many independent examples it is a share; 0 of other metrics. The interval of a share is never
    narrower than Wilson's, as resamples of examples that are all right know no other.
    """

    values: Array
    draws: Array
    n_examples: int = 0

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

    def layer(self, layer: int) -> LayerScore:
        """As a result holds it, of vectors from `layer`."""
        return LayerScore(
            layer=layer,
            mean=self.mean,
            deviation=self.deviation,
            confidence_95=interval(self.estimate.interval(0.95)),
            values=tuple(self.values.tolist()),
        )
