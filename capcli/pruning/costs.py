"""What heads and neurons cost, in weights, multiply-adds or time: what a budget counts, and what was reached.

Letters: L layers, A heads and F neurons per layer, U units of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capcli.config.prune import PruneConfig
from capcli.config.target import parse
from capcli.data.batches import Examples
from capcli.errors import ConfigError
from capcli.models.families import Layer, Units
from capcli.pruning.topk import kept_count

FINE = 10**9  # in how many parts the time of the dense model is counted, so that all budgets are whole numbers

Points = Sequence[tuple[int, float]]  # how many of each layer stay, and the share of the dense model's time


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What share of its time a network takes with fewer heads, or fewer neurons, in every layer.

    Each list ends with all of them, at 1; between its points the time is linear, below the first it is that of the
    first. least: the share with the fewest of both.
    """

    heads: Points
    neurons: Points
    least: float


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a run counts: multiply-adds in a text of `length` tokens if that is not 0, time if there are `speeds`, else
    weights."""

    length: int = 0
    speeds: Speeds | None = None


WEIGHTS = Measure()


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a layer costs, in whole numbers: the k-th head [A] and the k-th neuron [F] that it keeps; of all `layers`
    together, whatever stays, `fixed`. kind: a name of `config.names.TARGETS`, empty where a sparsity is asked for."""

    layers: int
    heads: NDArray[np.int64]
    neurons: NDArray[np.int64]
    fixed: int = 0
    kind: str = ""

    @property
    def total(self) -> int:
        """Of the dense model."""
        return self.fixed + self.layers * int(self.heads.sum() + self.neurons.sum())

    @property
    def least(self) -> int:
        """Of one head and one neuron in each layer."""
        return self.fixed + self.layers * int(self.heads[0] + self.neurons[0])

    def budget(self, sparsity: float) -> int:
        """What may stay when the share `sparsity` is removed. Raises `ConfigError` when that is too little."""
        found = kept_count(sparsity, self.total)
        if found < self.least:
            raise ConfigError(*self._out_of_reach(sparsity))
        return found

    def of(self, chosen: NDArray[np.bool_]) -> int:
        """Of the units `chosen` [U], heads of all layers before the neurons."""
        split = self.layers * len(self.heads)
        return self.fixed + sum(
            int(steps[: row.sum()].sum())
            for steps, part in ((self.heads, chosen[:split]), (self.neurons, chosen[split:]))
            for row in part.reshape(self.layers, -1)
        )

    def _out_of_reach(self, sparsity: float) -> tuple[str, str]:
        """The error when the budget is too small, and what helps: the nearest that can be met."""
        must = "one head and one neuron per layer must stay"
        if not self.kind:
            return (
                f"structured pruning cannot reach sparsity {sparsity:g}: {must}, "
                f"which allows at most {math.floor((1 - self.least / self.total) * 1e4) / 1e4:g}",
                "use --structure dimensions, choose a lower --sparsity, or an unstructured method such as fisher",
            )
        if self.kind == "latency":
            asked, nearest = f"{1 / (1 - sparsity):g}x", f"{math.floor(self.total / self.least * 100) / 100:g}x"
        else:
            asked, nearest = f"{1 - sparsity:g}", f"{math.ceil(self.least / self.total * 1e4) / 1e4:g}"
        return f"--target {self.kind}={asked} cannot be met: {must}", f"the nearest is --target {self.kind}={nearest}"


def costs_of(layers: Sequence[Layer], measure: Measure, kind: str = "") -> Costs:
    """The costs of heads and neurons by a `measure`."""
    heads, neurons = layers[0].heads, layers[0].neurons
    if measure.speeds is not None:
        return _of_speeds(measure.speeds, len(layers), heads.count, neurons.count)
    return Costs(
        layers=len(layers),
        heads=np.full(heads.count, heads.macs(measure.length), dtype=np.int64),
        neurons=np.full(neurons.count, neurons.macs(measure.length), dtype=np.int64),
        kind=kind,
    )


def _of_speeds(speeds: Speeds, layers: int, n_heads: int, n_neurons: int) -> Costs:
    """A layer saves its share of what all of them save together. What heads and neurons save add up, times a factor
    with which both together save what was measured."""
    heads, neurons = _times(speeds.heads, n_heads), _times(speeds.neurons, n_neurons)
    apart, together = (heads[-1] - heads[0]) + (neurons[-1] - neurons[0]), max(0.0, 1 - speeds.least)
    scale = FINE / layers * (together / apart if apart else 1.0)
    steps = [_steps(times * scale) for times in (heads, neurons)]
    return Costs(
        layers=layers,
        heads=steps[0],
        neurons=steps[1],
        fixed=max(0, FINE - layers * int(sum(one.sum() for one in steps))),
        kind="latency",
    )


def _steps(times: NDArray[np.float64]) -> NDArray[np.int64]:
    """What each unit adds to the time; the first, which always stays, nothing."""
    whole = np.rint(times).astype(np.int64)
    return np.concatenate([[0], whole[1:] - whole[:-1]])


def _times(points: Points, count: int) -> NDArray[np.float64]:
    """The share of the time that 1 to `count` units take; never less with more of them."""
    at, share = zip(*points, strict=True)
    return np.interp(np.arange(1, count + 1), at, np.minimum.accumulate(np.array(share)[::-1])[::-1])


def median_length(examples: Examples) -> int:
    """Tokens of a text in the middle, special ones included, as far as the network reads it."""
    return int(np.median(examples.lengths))


def measure_of(config: PruneConfig, examples: Examples, speeds: Speeds | None = None) -> Measure:
    """What the target of a run counts; weights where there is none."""
    kind = parse(config.target).kind if config.target else ""
    return Measure(
        length=median_length(examples) if kind == "macs" else 0, speeds=speeds if kind == "latency" else None
    )


@dataclass(frozen=True, kw_only=True)
class Left:
    """Shares of the prunable weights, and of the multiply-adds of the layers, that units hold which stay."""

    params: float
    macs: float


def left(units: Sequence[Units], chosen: Tensor, length: int) -> Left:
    """What the units `chosen` [U] hold; multiply-adds are those in a text of `length` tokens."""
    counts = [int(part.sum()) for part in torch.split(chosen.cpu(), [one.count for one in units])]
    kept, whole = (
        [sum(n * one.macs(tokens) for n, one in zip(some, units, strict=True)) for tokens in (0, length)]
        for some in (counts, [one.count for one in units])
    )
    return Left(params=kept[0] / whole[0], macs=kept[1] / whole[1])
