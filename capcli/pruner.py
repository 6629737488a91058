"""A pruner: masks on a model, kept at the scheduled sparsity by a criterion.

Letters: L layers, A heads per layer, F neurons per layer, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from capcli import masks as m
from capcli.config import PruneConfig
from capcli.criteria import CRITERIA, Criterion, group_importance, initial_scores
from capcli.models import Layer, Model

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
                size = layer.attention_output.in_features // layer.n_heads
                self.heads[0][index] += _importance(layer.attention_output, size)
                self.neurons[0][index] += _importance(layer.ffn_out, 1)

    def _update_groups(self) -> None:
        # Rounding to whole heads can leave an early plan with fewer neurons than the last one: never go below that.
        plan, last = group_plan(self.layers, self.sparsity), group_plan(self.layers, self.final)
        keeps = (max(plan.heads, last.heads), max(plan.neurons, last.neurons))
        for keep, (importance, alive) in zip(keeps, (self.heads, self.neurons), strict=True):
            alive.copy_(m.select_groups(importance, keep, alive))
            importance.zero_()
        with torch.no_grad():
            for layer, heads, neurons in zip(self.layers, self.heads[1], self.neurons[1], strict=True):
                rows = heads.repeat_interleave(layer.query.out_features // layer.n_heads)
                for linear in (layer.query, layer.key, layer.value):
                    _mask_of(linear).copy_(rows[:, None])
                _mask_of(layer.attention_output).copy_(rows)
                _mask_of(layer.ffn_in).copy_(neurons[:, None])
                _mask_of(layer.ffn_out).copy_(neurons)

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
    if criterion.structured:
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
    device = masks.mask.device
    for state, per_layer in ((pruner.heads, "heads"), (pruner.neurons, "neurons")):
        if layers:
            width = layers[0].n_heads if per_layer == "heads" else layers[0].ffn_out.in_features
            state.append(torch.zeros(len(layers), width, device=device))
            state.append(torch.ones(len(layers), width, dtype=torch.bool, device=device))
    return pruner


def group_plan(layers: list[Layer], sparsity: float) -> m.GroupPlan:
    """The reachable point nearest to `sparsity`; see `masks.plan_groups`."""
    first = layers[0]
    return m.plan_groups(
        sparsity,
        layers=len(layers),
        heads=sum(layer.n_heads for layer in layers),
        head_weights=4 * first.attention_output.in_features // first.n_heads * first.attention_output.out_features,
        neurons=sum(layer.ffn_out.in_features for layer in layers),
        neuron_weights=2 * first.ffn_out.out_features,
    )


def _importance(linear: nn.Linear, group_size: int) -> Tensor:
    parametrization = linear.parametrizations.weight  # type: ignore[union-attr]
    original: Tensor = parametrization.original  # type: ignore[union-attr, assignment]
    assert original.grad is not None, "observe comes after backward"
    found = group_importance(original, original.grad, group_size)
    return torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)  # of a 16-bit step that overflowed and is skipped


def _mask_of(linear: nn.Linear) -> Tensor:
    mask: Tensor = linear.parametrizations.weight[0].mask  # type: ignore[union-attr, index]
    return mask
