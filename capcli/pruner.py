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
from capcli.criteria import CRITERIA, Criterion, initial_scores
from capcli.families import Layer
from capcli.models import Model
from capcli.ranking import Ranking, make_ranking, planned_weights, set_masks, unit_importance

GROUP_STATE = ("head_importance", "head_alive", "neuron_importance", "neuron_alive")


@dataclass(kw_only=True)
class Pruner:
    """Masks, what they are chosen by, and when.

    If structured: `heads` and `neurons` are (importance, alive), or all units stand in one `ranking`.
    """

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
    ranking: Ranking | None = None

    def scheduled(self, step: int) -> float:
        """The sparsity that holds during `step`."""
        schedule = m.ledges if self.ranking is not None else m.stairs if self.criterion.structured else m.cubic
        return schedule(
            step, self.total_steps, final=self.final, dense_share=self.dense_share, final_share=self.final_share
        )

    @property
    def observes(self) -> bool:
        """Whether the gradients of this step still count: importance is of no use once the sparsity is final."""
        return self.criterion.structured and self.sparsity < self.final

    def rises(self, step: int) -> bool:
        """Whether the sparsity rises at `step`."""
        return self.scheduled(step) > self.sparsity

    def update(self, step: int) -> None:
        """Choose the masks for `step`. Fixed scores are ranked again only when the sparsity rises."""
        rises, self.sparsity = self.rises(step), self.scheduled(step)
        if self.sparsity == 0 or not (rises or self.criterion.learned):
            return
        if self.ranking is not None:
            self.ranking.update(self.sparsity)
            return
        if self.criterion.structured:
            self._update_groups()
            return
        assert self.criterion.scores is not None
        with torch.no_grad():
            scores = self.criterion.scores(self.masks)
            self.masks.mask.copy_(m.select(scores, self.masks.sizes, self.sparsity, self.scope))

    def observe(self, scale: float = 1.0) -> None:
        """Add this batch's abs(dL/dgate) to the importance of every unit; call after backward.

        scale: what the loss was multiplied by, as in 16 bits.
        """
        if not self.observes:
            return
        with torch.no_grad():
            if self.ranking is not None:
                self.ranking.observe(scale)
                return
            for index, layer in enumerate(self.layers):
                self.heads[0][index] += unit_importance(layer.heads, scale)
                self.neurons[0][index] += unit_importance(layer.neurons, scale)

    def _update_groups(self) -> None:
        # Rounding to whole heads can leave an early plan with fewer neurons than the last one: never go below that.
        plan, last = group_plan(self.layers, self.sparsity), group_plan(self.layers, self.final)
        keeps = (max(plan.heads, last.heads), max(plan.neurons, last.neurons))
        for keep, (importance, alive) in zip(keeps, (self.heads, self.neurons), strict=True):
            alive.copy_(m.select_groups(importance, keep, alive))
            importance.zero_()
        with torch.no_grad():
            for layer, heads, neurons in zip(self.layers, self.heads[1], self.neurons[1], strict=True):
                set_masks(layer.heads, heads)
                set_masks(layer.neurons, neurons)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the network: masks and importance. Scores are in the network."""
        return {"mask": self.masks.mask.bool(), **self._structure()}

    def restore(self, tensors: Mapping[str, Tensor], sparsity: float) -> None:
        """Put back what `tensors` gave."""
        self.sparsity = sparsity
        self.masks.mask.copy_(tensors["mask"])
        for name, tensor in self._structure().items():
            tensor.copy_(tensors[name])

    def _structure(self) -> dict[str, Tensor]:
        """Importance and what is alive, by name; empty without structure."""
        if self.ranking is not None:
            return self.ranking.tensors()
        return dict(zip(GROUP_STATE, [*self.heads, *self.neurons], strict=False))


def make_pruner(model: Model, config: PruneConfig, total_steps: int) -> Pruner:
    """Put masks on the model. Raises `ConfigError` when a structured sparsity cannot be reached."""
    criterion = CRITERIA[config.criterion]
    layers = model.layers() if criterion.structured else []
    if layers:
        plan_structure(layers, config)
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
    if layers and config.structure == "dimensions":
        pruner.ranking = make_ranking(layers, total_steps, masks.mask.device)
    elif layers:
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


def plan_structure(layers: list[Layer], config: PruneConfig) -> int:
    """How many weights a structured run keeps. Raises `ConfigError` when the sparsity cannot be reached."""
    if config.structure == "dimensions":
        return planned_weights(layers, config.sparsity)
    return group_plan(layers, config.sparsity).kept_weights
