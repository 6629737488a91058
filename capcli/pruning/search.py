"""The search of Kwon et al. (arXiv 2204.09656): which heads and neurons stay within a budget, and which change places.

Letters: L layers, A heads and F neurons per layer, U units of the model, B batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capcli.config.prune import PruneConfig
from capcli.config.target import parse
from capcli.models.model import Model
from capcli.pruning.costs import Costs, Measure, costs_of
from capcli.pruning.structures import Dimensions, Structure, WholeUnits, weights_of
from capcli.pruning.topk import kept_count

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Searched(WholeUnits):
    """Heads and neurons under a common budget."""

    costs: Costs

    def select(self, scores: Tensor, sparsity: float, alive: Tensor) -> Tensor:
        """See `split`."""
        chosen = split(scores.cpu().double().numpy(), alive.cpu().numpy(), self.costs, self.costs.budget(sparsity))
        return torch.from_numpy(chosen).to(scores.device)

    def weights(self, sparsity: float) -> int:
        """At most (1 - s)·n, by less than a neuron, or than a head where all living neurons stay; about that, where
        something else is counted."""
        self.costs.budget(sparsity)
        return kept_count(sparsity, weights_of(self.units))

    def speedup(self, alive: Tensor) -> float | None:
        """How many times as fast the units `alive` [U] are, where a budget of time was asked for."""
        return self.costs.total / self.costs.of(alive.cpu().numpy()) if self.costs.kind == "latency" else None


def searched(model: Model, config: PruneConfig, measure: Measure) -> Searched:
    """The structure of a run. Raises `ConfigError` when the model has no heads, or the budget cannot be met."""
    layers, kind = model.layers(), parse(config.target).kind if config.target else ""
    found = Searched(layers=layers, linears=model.prunable(), costs=costs_of(layers, measure, kind))
    found.weights(config.sparsity)
    return found


def split(importance: Floats, alive: NDArray[np.bool_], costs: Costs, budget: int) -> NDArray[np.bool_]:
    """Boolean mask [U] of the units that stay: those whose `importance` [U] adds up to most within the `budget`.

    For every number of heads, the best heads and as many of the best neurons as still fit; of equal sums the one with
    fewer heads, of equal units the lower index. Where all units of a kind cost the same no other choice has a larger
    sum. Only units still `alive` [U] are chosen, of which each layer keeps its best head and its best neuron.
    """
    n_heads = costs.layers * len(costs.heads)
    heads, head_costs = _ranked(importance[:n_heads], alive[:n_heads], costs.heads, costs.layers)
    neurons, neuron_costs = _ranked(importance[n_heads:], alive[n_heads:], costs.neurons, costs.layers)
    left = budget - costs.fixed - head_costs[costs.layers - 1 :]  # by numbers of heads, from one for each layer
    fitting = np.searchsorted(neuron_costs, left, side="right")
    of_heads = np.cumsum(importance[heads])[costs.layers - 1 :]
    of_neurons = np.concatenate([[0.0], np.cumsum(importance[n_heads + neurons])])
    sums = np.where(fitting >= costs.layers, of_heads + of_neurons[fitting], -np.inf)
    best = int(sums.argmax())
    assert sums[best] > -np.inf, "a budget is checked before, and what is alive was within a larger one"
    chosen = np.zeros(len(importance), dtype=np.bool_)
    chosen[heads[: costs.layers + best]] = True
    chosen[n_heads + neurons[: fitting[best]]] = True
    return chosen


def _ranked(
    importance: Floats, alive: NDArray[np.bool_], steps: NDArray[np.int64], layers: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The living units of one kind from the best downwards, the best of each layer before all others, and what the
    first 1, 2, … of them cost together; the k-th of a layer costs `steps[k]`."""
    layer = np.arange(len(importance)) // len(steps)
    order = np.flatnonzero(alive)
    order = order[np.argsort(-importance[order], kind="stable")]
    place = _places(layer[order], layers)  # in its layer
    order = order[np.argsort(place > 0, kind="stable")]
    return order, np.cumsum(steps[_places(layer[order], layers)])


def _places(layer: NDArray[np.int64], layers: int) -> NDArray[np.int64]:
    """For each unit of these layers, how many of the same layer stand before it."""
    place = np.zeros(len(layer), dtype=np.int64)
    for index in range(layers):
        own = layer == index
        place[own] = np.arange(own.sum())
    return place


# Rearrangement -------------------------------------------------------------------------------------------------------


def rearranged(gates: Tensor, chosen: Tensor, alive: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """`chosen` [U] with units that change places inside their group, so that what is lost together becomes less.

    To second order, the loss grows by half of |Σ v_u|² over the units that are removed now, v_u [B] the gradients at
    their gates in each batch: units that make up for one another can go together. gates: [B, U]. groups: indices of
    units of which any may take the place of another.
    """
    found, living, vectors = chosen.cpu().clone(), alive.cpu(), gates.cpu().double().T
    for group in groups:
        ours = group[living[group]]
        found[ours] = swapped(vectors[ours], found[ours])
    return found.to(chosen.device)


def swapped(vectors: Tensor, kept: Tensor) -> Tensor:
    """Which of n units stay, as many as in `kept` [n], so that |Σ v_u|² of the others is less; `vectors` [n, B].

    One after the other the units that stay, the least important first, are removed and the one is put back whose return
    leaves the least. That may be the same one, so it never grows (section 4.2 of the paper).
    """
    kept = kept.clone()
    if not bool(kept.any()) or bool(kept.all()):
        return kept
    squares = vectors.square().sum(dim=1)
    total = vectors[~kept].sum(dim=0)
    for unit in kept.nonzero()[:, 0][squares[kept].sort(stable=True).indices].tolist():
        kept[unit], total = False, total + vectors[unit]
        without = (squares - 2 * (vectors @ total)).masked_fill(kept, torch.inf)  # of the sum, if it came back
        back = int(without.argmin())
        kept[back], total = True, total - vectors[back]
    return kept


def groups_of(structure: Structure) -> list[Tensor]:
    """The units of one kind in one layer, and of dimensions those of one head, by their indices."""
    counts = [units.count for units in structure.units]
    key = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    if isinstance(structure, Dimensions):
        head = structure.table.head.cpu() + 1
        key = key * (int(head.max()) + 1) + head
    return [(key == one).nonzero()[:, 0] for one in torch.unique(key).tolist()]
