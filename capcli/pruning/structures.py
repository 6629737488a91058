"""What is removed together: single weights, see `patterns`, heads and neurons, or dimensions inside heads.

Letters: L layers, A heads and F neurons per layer, U units of the model, n prunable weights. A structure chooses among
its units by their scores and knows which weights each of them holds.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from capcli.config.prune import PruneConfig
from capcli.errors import ConfigError
from capcli.models.families import Layer, Units
from capcli.models.model import Model
from capcli.pruning.allocation import evenness_of, kinds_of
from capcli.pruning.patterns import unstructured
from capcli.pruning.schedules import Shape, cubic_in_steps, equal_steps
from capcli.pruning.topk import kept_count, topk


class Structure(Protocol):
    """A seat for what is chosen together."""

    @property
    def units(self) -> Sequence[Units]:
        """What is removed as a whole, in the order of the scores; empty when single weights are."""

    @property
    def few_rises(self) -> bool:
        """Whether the sparsity rises in a few large steps.

        Importance is then added up from one to the next, and snapshots are taken before each; else importance is
        averaged over a window of steps.
        """

    @property
    def shape(self) -> Shape:
        """How the sparsity rises."""

    @property
    def readers(self) -> Collection[nn.Linear]:
        """The matrices that read what units put out."""

    @property
    def unread(self) -> Collection[nn.Linear]:
        """The matrices whose masks change nothing: what a removed unit puts out, the masks of `readers` keep out.

        Without them a removed unit still computes, and its importance can be measured.
        """

    def count(self) -> int:
        """U, how many there are to choose from."""

    def select(self, scores: Tensor, sparsity: float, alive: Tensor) -> Tensor:
        """Which of the units stay at `sparsity`, a boolean mask [U] by `scores` [U]; see the classes about `alive`."""

    def expand(self, chosen: Tensor) -> Tensor:
        """The mask of the weights, [n], when the units `chosen` [U] stay."""

    def weights(self, sparsity: float) -> int:
        """How many weights stay at `sparsity`. Raises `ConfigError` when it cannot be reached."""


@dataclass(frozen=True, kw_only=True)
class WholeUnits:
    """Whole heads and FFN neurons, of which at least one of each stays in every layer; the classes choose among them.

    Units: the heads of all layers, then the neurons of all layers. Only living units are chosen.
    """

    layers: list[Layer]
    linears: Mapping[str, nn.Linear]
    few_rises: bool = True
    shape: Shape = equal_steps

    @property
    def units(self) -> list[Units]:
        """L times A heads, L times F neurons."""
        return [layer.heads for layer in self.layers] + [layer.neurons for layer in self.layers]

    @property
    def readers(self) -> Collection[nn.Linear]:
        """The output matrix of the attention and the second matrix of the FFN."""
        return readers_of(self.units)

    @property
    def unread(self) -> Collection[nn.Linear]:
        """All others: a head and a neuron have a reader each."""
        return {slot.linear for units in self.units for slot in units.slots} - readers_of(self.units)

    def count(self) -> int:
        """L·A + L·F."""
        return sum(units.count for units in self.units)

    def expand(self, chosen: Tensor) -> Tensor:
        """All rows and columns of the chosen units."""
        return mask_of_units(self.units, self.linears, chosen)


@dataclass(frozen=True, kw_only=True)
class Heads(WholeUnits):
    """Heads and neurons in a ranking of their own each.

    final: the sparsity at the end of the run.
    """

    final: float

    def select(self, scores: Tensor, sparsity: float, alive: Tensor) -> Tensor:
        """The best heads and the best neurons, in the numbers of `plan`."""
        # Rounding to whole heads can leave an early plan with fewer neurons than the last one: never go below that.
        plan, last = self.plan(sparsity), self.plan(self.final)
        keeps = (max(plan.heads, last.heads), max(plan.neurons, last.neurons))
        n_layers = len(self.layers)
        n_heads = n_layers * self.layers[0].heads.count
        sizes = [n_heads, len(scores) - n_heads]
        parts = zip(torch.split(scores, sizes), torch.split(alive, sizes), keeps, strict=True)
        return torch.cat(
            [select_groups(s.view(n_layers, -1), keep, a.view(n_layers, -1)).flatten() for s, a, keep in parts]
        )

    def weights(self, sparsity: float) -> int:
        """The nearest reachable number to (1 - s)·n."""
        return self.plan(sparsity).kept_weights

    def plan(self, sparsity: float) -> GroupPlan:
        """The reachable point nearest to `sparsity`; see `plan_groups`."""
        layers = self.layers
        return plan_groups(
            sparsity,
            layers=len(layers),
            heads=sum(layer.heads.count for layer in layers),
            head_weights=layers[0].heads.weights,
            neurons=sum(layer.neurons.count for layer in layers),
            neuron_weights=layers[0].neurons.weights,
        )


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Dimensions inside heads and FFN neurons in one ranking; whole heads where there are no dimensions.

    After GRAIN ("Gradient-based Intra-attention Pruning on Pre-trained Language Models", arXiv 2212.07634). Only living
    units are chosen.

    length: a unit counts its multiply-adds in a text of this many tokens, with 0 its weights.
    """

    layers: list[Layer]
    linears: Mapping[str, nn.Linear]
    table: UnitTable
    length: int = 0
    few_rises: bool = False
    shape: Shape = cubic_in_steps
    unread: Collection[nn.Linear] = ()

    @property
    def units(self) -> list[Units]:
        """Layer by layer: query-key, value-output, neurons."""
        return [units for layer in self.layers for units in kinds(layer)]

    @functools.cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Units of each kind and layer, and what one of them counts; numbers of the host, which wait for nothing."""
        return [(units.count, units.macs(self.length)) for units in self.units]

    @property
    def readers(self) -> Collection[nn.Linear]:
        """As of heads; of query-key units there is none."""
        return readers_of(self.units)

    def count(self) -> int:
        """U."""
        return len(self.table.weights)

    def select(self, scores: Tensor, sparsity: float, alive: Tensor) -> Tensor:
        """See `select_units`."""
        return select_units(scores, alive, self.table, self._wanted(sparsity))

    def expand(self, chosen: Tensor) -> Tensor:
        """All rows and columns of the chosen units."""
        return mask_of_units(self.units, self.linears, chosen)

    def weights(self, sparsity: float) -> int:
        """Exact where all units weigh the same, else to within half a unit; about, where multiply-adds are counted."""
        if self.length:
            return kept_count(sparsity, weights_of(self.units))
        keep, weights = self._wanted(sparsity), {weights for _, weights in self.sizes}
        unit = min(weights)
        return min(self.count(), (2 * keep + unit) // (2 * unit)) * unit if len(weights) == 1 else keep

    def _wanted(self, sparsity: float) -> int:
        return kept_count(sparsity, sum(count * weights for count, weights in self.sizes))


def structure_of(model: Model, config: PruneConfig, *, structured: bool, scope: str, length: int = 0) -> Structure:
    """The structure that a run asks for, of whole units if its criterion is `structured`; `scope` is the criterion's,
    `length` as in `Dimensions`.

    Raises `ConfigError` when the model has no such units or groups, or the sparsity cannot be reached.
    """
    linears = model.prunable()
    if not structured:
        weights = unstructured(
            linears, config.structure, scope if config.scope == "auto" else config.scope, config.floor
        )
        if weights.scope != "type":
            return weights
        return dataclasses.replace(weights, kinds=kinds_of(model), evenness=evenness_of(config.sparsity))
    layers = model.layers()
    device = next(iter(linears.values())).weight.device
    found: Structure = (
        Dimensions(layers=layers, linears=linears, table=unit_table(layers, device, length), length=length)
        if config.structure == "dimensions"
        else Heads(layers=layers, linears=linears, final=config.sparsity)
    )
    found.weights(config.sparsity)
    return found


def readers_of(parts: Sequence[Units]) -> set[nn.Linear]:
    """The matrices that read what these units put out."""
    return {units.reader for units in parts if units.has_reader}


def weights_of(parts: Sequence[Units]) -> int:
    """How many weights these units hold."""
    return sum(units.count * units.weights for units in parts)


def mask_of_units(parts: Sequence[Units], linears: Mapping[str, nn.Linear], chosen: Tensor) -> Tensor:
    """The mask of all weights, [n], in which only the rows and columns of the units `chosen` [U] are left."""
    sizes = [linear.weight.numel() for linear in linears.values()]
    mask = torch.ones(sum(sizes), dtype=torch.bool, device=chosen.device)
    views = {
        id(linear): view.view(linear.weight.shape)
        for linear, view in zip(linears.values(), torch.split(mask, sizes), strict=True)
    }
    counts = [units.count for units in parts]
    for units, alive in zip(parts, torch.split(chosen, counts), strict=True):
        for slot in units.slots:
            part = views[id(slot.linear)].narrow(slot.axis, slot.start, slot.size * units.count)
            gates = alive.repeat_interleave(slot.size)
            part.copy_(gates[:, None] if slot.axis == 0 else gates)
    return mask


# Heads and neurons ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """How many heads and FFN neurons of the whole model stay, and how many weights that is."""

    heads: int
    neurons: int
    kept_weights: int


def plan_groups(
    sparsity: float, *, layers: int, heads: int, head_weights: int, neurons: int, neuron_weights: int
) -> GroupPlan:
    """The nearest reachable point to `sparsity` for heads and neurons (section 4, cap-f).

    Heads and neurons are removed in the same ratio while each layer keeps a head and a neuron; the neurons then take
    up what rounding to whole heads left. Raises `ConfigError` naming the highest reachable sparsity.

    Args:
        layers, heads, neurons: counts over the whole model.
        head_weights, neuron_weights: weights that one head or one neuron holds.
    """
    total = heads * head_weights + neurons * neuron_weights
    least = layers * (head_weights + neuron_weights)
    target = kept_count(sparsity, total)
    if target < least and least - target > neuron_weights / 2:
        highest = 1 - least / total
        raise ConfigError(
            f"structured pruning cannot reach sparsity {sparsity:g}: one head and one neuron per layer must stay, "
            f"which allows at most {math.floor(highest * 1e4) / 1e4:g}",
            "use --structure dimensions, choose a lower --sparsity, or an unstructured method such as cap-soft",
        )
    kept_heads = min(heads, max(layers, math.floor((1 - sparsity) * heads + 0.5)))
    room = (target - kept_heads * head_weights) / neuron_weights
    kept_neurons = min(neurons, max(layers, math.floor(room + 0.5)))
    return GroupPlan(
        heads=kept_heads, neurons=kept_neurons, kept_weights=kept_heads * head_weights + kept_neurons * neuron_weights
    )


def select_groups(importance: Tensor, keep: int, alive: Tensor) -> Tensor:
    """Boolean mask [L, G] of `keep` groups over L layers (section 4): ranked globally, at least one per layer.

    `importance` [L, G] is normalised to unit L2 norm in each layer first; only groups still `alive` [L, G] are chosen.
    """
    scores = importance / importance.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scores = scores.masked_fill(~alive, -torch.inf)
    best = torch.zeros_like(alive).scatter_(1, scores.argmax(dim=1, keepdim=True), True)
    return topk(scores.masked_fill(best, torch.inf).flatten(), keep).view_as(alive)


# Dimensions ----------------------------------------------------------------------------------------------------------


def kinds(layer: Layer) -> list[Units]:
    """The kinds of units of a layer: its dimensions, or its whole heads where it has none, and its neurons."""
    if layer.query_key is None or layer.value_output is None:
        return [layer.heads, layer.neurons]
    return [layer.query_key, layer.value_output, layer.neurons]


def unit_table(layers: list[Layer], device: torch.device | None = None, length: int = 0) -> UnitTable:
    """Weights and heads of all units; with a `length` their multiply-adds, see `Units.macs`."""
    weights, head, value = [], [], []
    for index, layer in enumerate(layers):
        for units in kinds(layer):
            inside, count = units is layer.query_key or units is layer.value_output, layer.heads.count
            own = torch.arange(units.count) // (units.count // count) + index * count
            head.append(own if inside else torch.full_like(own, -1))
            weights.append(torch.full_like(own, units.macs(length)))
            value.append(torch.full((units.count,), units is layer.value_output))
    return UnitTable(
        weights=torch.cat(weights).to(device), head=torch.cat(head).to(device), value=torch.cat(value).to(device)
    )


@dataclass(frozen=True, kw_only=True)
class UnitTable:
    """All units of a model in one order, [U]: what each counts, its weights or multiply-adds, and for dimensions the
    head.

    head: counted over the model, -1 for neurons and whole heads. value: whether it is a value-output unit.
    """

    weights: Tensor
    head: Tensor
    value: Tensor

    def values_per_head(self, chosen: Tensor) -> Tensor:
        """How many of the value-output units that `chosen` [U] names each head has, read at each unit; 0 outside."""
        count = torch.zeros(len(chosen) + 1, dtype=torch.int64, device=chosen.device)
        count.index_add_(0, self.head + 1, (chosen & self.value).long())
        return count[self.head + 1]


def head_regularised(importance: Tensor, alive: Tensor, units: UnitTable, bend: float = 0.3) -> Tensor:
    """`importance` [U] with that of value-output units times tanh(share / bend), so that nearly empty heads die out.

    share: of the value-output units of its head, those still `alive` [U] (GRAIN's structure regularisation).
    """
    share = units.values_per_head(alive) / units.values_per_head(torch.ones_like(alive)).clamp(min=1)
    return torch.where(units.value, importance * torch.tanh(share / bend), importance)


def select_units(importance: Tensor, alive: Tensor, units: UnitTable, keep: int) -> Tensor:
    """Boolean mask [U] of the units that stay: one ranking over all kinds and layers by importance per weight (GRAIN).

    Takes living units from the best down to the point nearest to `keep` weights; the lower index wins ties. A head that
    is left without value-output units computes nothing, so its query-key units go too, and the next best take their
    place. Its own units come last then, values first, so the count is always that of whole units nearest to `keep`.
    """
    scores = head_regularised(importance, alive, units) / units.weights
    order = scores.sort(descending=True, stable=True).indices
    chosen = _nearest_prefix(order, alive, units.weights, keep)
    empty = (units.head >= 0) & (units.values_per_head(chosen) == 0)
    later = torch.where(empty, 2 - units.value.long(), 0)[order]
    return _nearest_prefix(order[later.sort(stable=True).indices], alive, units.weights, keep)


def _nearest_prefix(order: Tensor, alive: Tensor, weights: Tensor, keep: int) -> Tensor:
    """The living units [U], taken in this order, whose weights come nearest to `keep`; of two such points the more."""
    own = torch.where(alive, weights, 0)[order]
    taken = 2 * own.cumsum(0) - own <= 2 * keep
    return torch.zeros_like(alive).scatter_(0, order, taken) & alive
