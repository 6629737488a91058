"""A pruner: masks on a model, kept at the scheduled sparsity by a criterion.

Letters: L layers, A heads per layer, F neurons per layer, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from capcli import masks as m
from capcli.config import PruneConfig
from capcli.criteria import CRITERIA, Criterion, group_importance, initial_scores
from capcli.families import Layer, Units
from capcli.models import Model

GROUP_STATE = ("head_importance", "head_alive", "neuron_importance", "neuron_alive")


@dataclass(kw_only=True)
class Pruner:
    """Masks, what they are chosen by, and when. `heads` and `neurons` are (importance, alive), if structured."""

    criterion: Criterion
    scope: str
    masks: m.MaskSet
    layers: list[Layer]
    final: float
    total_steps: int
    dense_share: float
    final_share: float
    sparsity: float = 0.0
    heads: list[Tensor] = field(default_factory=list)
    neurons: list[Tensor] = field(default_factory=list)

    def scheduled(self, step: int) -> float:
        """The sparsity that holds during `step`."""
        schedule = m.stairs if self.criterion.structured else m.cubic
        return schedule(
            step, self.total_steps, final=self.final, dense_share=self.dense_share, final_share=self.final_share
        )

    def rises(self, step: int) -> bool:
        """Whether the sparsity rises at `step`."""
        return self.scheduled(step) > self.sparsity

    def update(self, step: int) -> None:
        """Choose the masks for `step`. Fixed scores are ranked again only when the sparsity rises."""
        rises, self.sparsity = self.rises(step), self.scheduled(step)
        if self.sparsity == 0 or not (rises or self.criterion.learned):
            return
        if self.criterion.structured:
            self._update_groups()
            return
        assert self.criterion.scores is not None
        with torch.no_grad():
            scores = self.criterion.scores(self.masks)
            self.masks.mask.copy_(m.select(scores, self.masks.sizes, self.sparsity, self.scope))

    def observe(self) -> None:
        """Add this batch's abs(dL/dgate) to the importance of every head and neuron; call after backward."""
        if not self.criterion.structured:
            return
        with torch.no_grad():
            for index, layer in enumerate(self.layers):
                self.heads[0][index] += _importance(layer.heads)
                self.neurons[0][index] += _importance(layer.neurons)

    def _update_groups(self) -> None:
        # Rounding to whole heads can leave an early plan with fewer neurons than the last one: never go below that.
        plan, last = group_plan(self.layers, self.sparsity), group_plan(self.layers, self.final)
        keeps = (max(plan.heads, last.heads), max(plan.neurons, last.neurons))
        for keep, (importance, alive) in zip(keeps, (self.heads, self.neurons), strict=True):
            alive.copy_(m.select_groups(importance, keep, alive))
            importance.zero_()
        with torch.no_grad():
            for layer, heads, neurons in zip(self.layers, self.heads[1], self.neurons[1], strict=True):
                _keep(layer.heads, heads)
                _keep(layer.neurons, neurons)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the network: masks and importance. Scores are in the network."""
        groups = dict(zip(GROUP_STATE, [*self.heads, *self.neurons], strict=False))
        return {"mask": self.masks.mask.bool(), **groups}

    def restore(self, tensors: Mapping[str, Tensor], sparsity: float) -> None:
        """Put back what `tensors` gave."""
        self.sparsity = sparsity
        self.masks.mask.copy_(tensors["mask"])
        for name, tensor in zip(GROUP_STATE, [*self.heads, *self.neurons], strict=False):
            tensor.copy_(tensors[name])


def make_pruner(model: Model, config: PruneConfig, total_steps: int) -> Pruner:
    """Put masks on the model. Raises `ConfigError` when a structured sparsity cannot be reached."""
    criterion = CRITERIA[config.criterion]
    layers = model.layers() if criterion.structured else []
    if layers:
        group_plan(layers, config.sparsity)
    masks = m.attach(model.prunable(), learned=criterion.learned)
    if masks.scores is not None and config.score_init == "magnitude":
        masks.scores.copy_(initial_scores(masks))
    pruner = Pruner(
        criterion=criterion,
        scope=criterion.scope if config.scope == "auto" else config.scope,
        masks=masks,
        layers=layers,
        final=config.sparsity,
        total_steps=total_steps,
        dense_share=config.dense_share,
        final_share=config.final_share,
    )
    if layers:
        pruner.heads += _fresh(len(layers), layers[0].heads.count, masks.mask.device)
        pruner.neurons += _fresh(len(layers), layers[0].neurons.count, masks.mask.device)
    return pruner


def _fresh(n_layers: int, count: int, device: torch.device) -> list[Tensor]:
    """Importance [L, count], zero, and alive [L, count], true."""
    shape = (n_layers, count)
    return [torch.zeros(shape, device=device), torch.ones(shape, dtype=torch.bool, device=device)]


def group_plan(layers: list[Layer], sparsity: float) -> m.GroupPlan:
    """The reachable point nearest to `sparsity`; see `masks.plan_groups`."""
    return m.plan_groups(
        sparsity,
        layers=len(layers),
        heads=sum(layer.heads.count for layer in layers),
        head_weights=layers[0].heads.weights,
        neurons=sum(layer.neurons.count for layer in layers),
        neuron_weights=layers[0].neurons.weights,
    )


def _importance(units: Units) -> Tensor:
    """abs(dL/dgate) of each unit, [count]."""
    parametrization = units.reader.parametrizations.weight  # type: ignore[union-attr]
    original: Tensor = parametrization.original  # type: ignore[union-attr, assignment]
    assert original.grad is not None, "observe comes after backward"
    found = group_importance(original, original.grad, units.reader.in_features // units.count)
    return torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)  # of a 16-bit step that overflowed and is skipped


def _keep(units: Units, alive: Tensor) -> None:
    """Set the masks of all rows and columns of the units to `alive` [count]."""
    for slot in units.slots:
        mask: Tensor = slot.linear.parametrizations.weight[0].mask  # type: ignore[union-attr, index]
        part = mask.narrow(slot.axis, slot.start, slot.size * units.count)
        gates = alive.repeat_interleave(slot.size)
        part.copy_(gates[:, None] if slot.axis == 0 else gates)
