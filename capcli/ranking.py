"""One ranking over all units of a model: dimensions inside heads, neurons, whole heads where there are no dimensions.

After GRAIN ("Gradient-based Intra-attention Pruning on Pre-trained Language Models", arXiv 2212.07634).
Letters: U units of the model, C units of one kind in one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capcli import masks as m
from capcli.criteria import group_importance, row_importance
from capcli.families import Layer, Units

WINDOW_SHARE, LONGEST_WINDOW = 0.05, 500  # of the run's steps; GRAIN's decay of 0.998 is a window of 500 steps


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The units of a model, part by part, with their importance [U], exponentially averaged, and which are alive [U].

    decay: what is left of the average after a step.
    """

    parts: list[Units]
    table: m.UnitTable
    decay: float
    importance: Tensor
    alive: Tensor

    def observe(self, scale: float = 1.0) -> None:
        """Average abs(dL/dgate) of this batch into the importance; gradients are divided by `scale`. After backward."""
        found = torch.cat([unit_importance(units, scale) for units in self.parts])
        self.importance.lerp_(found.to(self.importance), 1 - self.decay)

    def update(self, sparsity: float) -> None:
        """Choose the units for `sparsity` among those alive, and set the masks of all their rows and columns."""
        keep = m.kept_count(sparsity, int(self.table.weights.sum()))
        self.alive.copy_(m.select_units(self.importance, self.alive, self.table, keep))
        for units, alive in zip(self.parts, self.alive.split([units.count for units in self.parts]), strict=True):  # type: ignore[no-untyped-call]
            set_masks(units, alive)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {"importance": self.importance, "alive": self.alive}


def make_ranking(layers: list[Layer], total_steps: int, device: torch.device) -> Ranking:
    """A ranking of all units of the layers, all alive, in a run of `total_steps`."""
    table = unit_table(layers, device)
    return Ranking(
        parts=[units for layer in layers for units in kinds(layer)],
        table=table,
        decay=decay_of(total_steps),
        importance=torch.zeros(len(table.weights), device=device),
        alive=torch.ones(len(table.weights), dtype=torch.bool, device=device),
    )


def decay_of(total_steps: int) -> float:
    """What is left of an average after a step, so that it looks back over a fixed share of the run."""
    return 1 - 1 / min(LONGEST_WINDOW, max(1, round(WINDOW_SHARE * total_steps)))


def kinds(layer: Layer) -> list[Units]:
    """The kinds of units of a layer: its dimensions, or its whole heads where it has none, and its neurons."""
    if layer.query_key is None or layer.value_output is None:
        return [layer.heads, layer.neurons]
    return [layer.query_key, layer.value_output, layer.neurons]


def unit_table(layers: list[Layer], device: torch.device | None = None) -> m.UnitTable:
    """Weights and heads of all units."""
    weights, head, value = [], [], []
    for index, layer in enumerate(layers):
        for units in kinds(layer):
            inside, count = units is layer.query_key or units is layer.value_output, layer.heads.count
            own = torch.arange(units.count) // (units.count // count) + index * count
            head.append(own if inside else torch.full_like(own, -1))
            weights.append(torch.full_like(own, units.weights))
            value.append(torch.full((units.count,), units is layer.value_output))
    return m.UnitTable(
        weights=torch.cat(weights).to(device), head=torch.cat(head).to(device), value=torch.cat(value).to(device)
    )


def planned_weights(layers: list[Layer], sparsity: float) -> int:
    """How many weights stay at `sparsity`: exact where all units weigh the same, else to within half a unit."""
    weights = unit_table(layers).weights
    keep = m.kept_count(sparsity, int(weights.sum()))
    unit = int(weights.min())
    return min(len(weights), (2 * keep + unit) // (2 * unit)) * unit if bool((weights == unit).all()) else keep


def unit_importance(units: Units, scale: float = 1.0) -> Tensor:
    """abs(dL/dgate) of each unit, [C]: from the columns that read the output, or from the rows of the query."""
    if units.has_reader:
        weight, gradient = _learned(units.reader)
        found = group_importance(weight, gradient, units.reader.in_features // units.count)
    else:
        query = units.slots[0].linear
        weight, gradient = _learned(query)
        assert query.bias.grad is not None, "observe comes after backward"
        found = row_importance(weight, gradient, query.bias, query.bias.grad)
    found = torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)  # of a 16-bit step that overflowed and is skipped
    return found / scale


def _learned(linear: torch.nn.Linear) -> tuple[Tensor, Tensor]:
    """The weight that is trained below the mask, and its gradient."""
    original: Tensor = linear.parametrizations.weight.original  # type: ignore[union-attr, assignment]
    assert original.grad is not None, "observe comes after backward"
    return original, original.grad


def set_masks(units: Units, alive: Tensor) -> None:
    """Set the masks of all rows and columns of the units to `alive` [C]."""
    for slot in units.slots:
        mask: Tensor = slot.linear.parametrizations.weight[0].mask  # type: ignore[union-attr, index]
        part = mask.narrow(slot.axis, slot.start, slot.size * units.count)
        gates = alive.repeat_interleave(slot.size)
        part.copy_(gates[:, None] if slot.axis == 0 else gates)
