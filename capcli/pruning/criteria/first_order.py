"""First order: what the loss would lose with a head, a neuron or a dimension, abs(dL/dgate).

Letters: L layers, A heads per layer, F neurons per layer, H hidden size, D head size, C units of one kind in a layer,
U units of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capcli.models.families import Units
from capcli.pruning.criteria.seat import Criterion, State, Step, Subject
from capcli.pruning.masked import gates_of

WINDOW_SHARE, LONGEST_WINDOW = 0.05, 500  # of the run's steps; GRAIN's decay of 0.998 is a window of 500 steps


def init(subject: Subject) -> State:
    """Importance [U], zero."""
    return {"importance": torch.zeros(subject.structure.count(), device=subject.matrices.mask.device)}


def observe(state: State, subject: Subject, step: Step) -> None:
    """Add abs(dL/dgate) of this batch to the importance, or average it in."""
    leaves = leaves_of(subject.structure.units)
    assert all(leaf.grad is not None for leaf in leaves), "observe comes after backward"
    found = importance(subject.structure.units, [leaf.grad for leaf in leaves if leaf.grad is not None])
    # a 16-bit step that overflowed is skipped
    found = torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0) / step.scale
    subject.matrices.forget_gates()
    if subject.structure.few_rises:
        state["importance"] += found
    else:
        state["importance"].lerp_(found.to(state["importance"]), 1 - decay_of(subject.total_steps))


def prepare(state: State, subject: Subject, step: int) -> None:
    """Measure the importance on examples: the sum over batches of abs(dL/dgate) at the weights as they are."""
    assert subject.calibration is not None
    units = subject.structure.units
    state["importance"].copy_(
        subject.calibration.summed(leaves_of(units), lambda gradients: importance(units, gradients), step)
    )


def scores(state: State, subject: Subject) -> Tensor:
    """The importance, [U]."""
    return state["importance"]


def revise(state: State, subject: Subject, step: int) -> None:
    """What was added up before a rise does not decide the next one."""
    if subject.structure.few_rises:
        state["importance"].zero_()


FIRST_ORDER = Criterion(scores=scores, init=init, observe=observe, prepare=prepare, revise=revise, structured=True)


def decay_of(total_steps: int) -> float:
    """What is left of an average after a step, so that it looks back over a fixed share of the run."""
    return 1 - 1 / min(LONGEST_WINDOW, max(1, round(WINDOW_SHARE * total_steps)))


def importance(parts: Sequence[Units], gradients: Sequence[Tensor]) -> Tensor:
    """abs(dL/dgate) of each unit, [U], from the gradients at `leaves_of`."""
    return at_gates(parts, gradients).abs()


def at_gates(parts: Sequence[Units], gradients: Sequence[Tensor]) -> Tensor:
    """dL/dgate of each unit, [U], from the gradients at `leaves_of`.

    Of units that something reads, the gates are at the inputs of the reader, those of its inputs together; of others,
    at the rows of the query.
    """
    found, rest = [], iter(gradients)
    for units in parts:
        if units.has_reader:
            found.append(next(rest).view(units.count, -1).sum(dim=1))
        else:
            query = units.slots[0].linear
            found.append(at_rows(_learned(query), next(rest), query.bias, next(rest)))
    return torch.cat(found)


def leaves_of(parts: Sequence[Units]) -> list[Tensor]:
    """Where gradients make the importance of units: the gates of the reader, or weight and bias of the query."""
    found: list[Tensor] = []
    for units in parts:
        query = units.slots[0].linear
        gates = gates_of(units.reader) if units.has_reader else None
        found += [_learned(query), query.bias] if gates is None else [gates]
    return found


def _learned(linear: torch.nn.Linear) -> Tensor:
    """The weight that is trained below the mask."""
    original: Tensor = linear.parametrizations.weight.original  # type: ignore[union-attr, assignment]
    return original


def at_rows(weight: Tensor, gradient: Tensor, bias: Tensor, bias_gradient: Tensor) -> Tensor:
    """dL/dgate of each output of a matrix [out, in] with bias [out], as a vector [out].

    The gate multiplies the output: dL/dgate = sum of W∘dL/dW over the row + b·dL/db. For query-key dimensions these are
    the rows of the query (GRAIN).
    """
    return (weight * gradient).sum(dim=1) + bias * bias_gradient
