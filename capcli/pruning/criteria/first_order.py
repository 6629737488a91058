"""First order: what the loss would lose with a head, a neuron or a dimension, abs(dL/dgate).

Letters: L layers, A heads per layer, F neurons per layer, H hidden size, D head size, C units of one kind in a layer,
U units of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capcli.models.families import Units
from capcli.pruning.criteria.seat import Criterion, State, Step, Subject

WINDOW_SHARE, LONGEST_WINDOW = 0.05, 500  # of the run's steps; GRAIN's decay of 0.998 is a window of 500 steps


def init(subject: Subject) -> State:
    """Importance [U], zero."""
    return {"importance": torch.zeros(subject.structure.count(), device=subject.matrices.mask.device)}


def observe(state: State, subject: Subject, step: Step) -> None:
    """Add abs(dL/dgate) of this batch to the importance, or average it in."""
    found = torch.cat([unit_importance(units, step.scale) for units in subject.structure.units])
    if subject.structure.few_rises:
        state["importance"] += found
    else:
        state["importance"].lerp_(found.to(state["importance"]), 1 - decay_of(subject.total_steps))


def scores(state: State, subject: Subject) -> Tensor:
    """The importance, [U]."""
    return state["importance"]


def revise(state: State, subject: Subject, step: int) -> None:
    """What was added up before a rise does not decide the next one."""
    if subject.structure.few_rises:
        state["importance"].zero_()


FIRST_ORDER = Criterion(scores=scores, init=init, observe=observe, revise=revise, structured=True)


def decay_of(total_steps: int) -> float:
    """What is left of an average after a step, so that it looks back over a fixed share of the run."""
    return 1 - 1 / min(LONGEST_WINDOW, max(1, round(WINDOW_SHARE * total_steps)))


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


def group_importance(weight: Tensor, gradient: Tensor, group_size: int) -> Tensor:
    """abs(dL/dgate) of each group of input columns of a matrix [out, in], as a vector [in / group_size].

    The gate multiplies the group's output, which is what these columns read: dL/dgate = sum of W∘dL/dW over them.
    Heads are groups of D columns of the attention output matrix, value-output dimensions its single columns, neurons
    single columns of the second FFN matrix.
    """
    return (weight * gradient).sum(dim=0).view(-1, group_size).sum(dim=1).abs()


def row_importance(weight: Tensor, gradient: Tensor, bias: Tensor, bias_gradient: Tensor) -> Tensor:
    """abs(dL/dgate) of each output of a matrix [out, in] with bias [out], as a vector [out].

    The gate multiplies the output: dL/dgate = sum of W∘dL/dW over the row + b·dL/db. For query-key dimensions these are
    the rows of the query (GRAIN).
    """
    return ((weight * gradient).sum(dim=1) + bias * bias_gradient).abs()
