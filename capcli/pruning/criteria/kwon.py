"""Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (arXiv 2204.09656): the Fisher information of
gates, a search under a budget, and a rearrangement; the pruner's refit takes the place of its factors for each unit.

Letters: U units of the model, B batches. A unit that was removed does not come back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capcli import parallel
from capcli.pruning.calibration import FISHER_BATCH, Calibration
from capcli.pruning.criteria.first_order import at_gates, leaves_of
from capcli.pruning.criteria.seat import Criterion, State, Subject
from capcli.pruning.search import groups_of, rearranged
from capcli.pruning.structures import Structure


def prepare(state: State, subject: Subject, step: int) -> None:
    """Measure the gradients at the gates [B, U], of small batches."""
    assert subject.calibration is not None
    state["gates"] = gradients(subject.structure, subject.calibration, step)


def gradients(structure: Structure, calibration: Calibration, step: int) -> Tensor:
    """dL/dgate of each unit for one small batch after another, [B, U]; see `Calibration.of_task`."""
    batches = -(-len(calibration.rows(step)) // FISHER_BATCH)
    leaves = leaves_of(structure.units)
    found = torch.zeros(batches, structure.count(), device=leaves[0].device)
    own = range(parallel.rank(), batches, parallel.size())
    for batch, gradient in zip(own, calibration.of_task(leaves, step), strict=True):
        found[batch] = at_gates(structure.units, gradient)
    parallel.total([found])
    return found


def scores(state: State, subject: Subject) -> Tensor:
    """The sum over batches of (dL/dgate)², [U]: by how much the loss grows without the unit, to second order."""
    return state["gates"].square().sum(dim=0)


def swap(state: State, subject: Subject, chosen: Tensor, alive: Tensor) -> Tensor:
    """See `search.rearranged`."""
    return rearranged(state["gates"], chosen, alive, groups_of(subject.structure))


def revise(state: State, subject: Subject, step: int) -> None:
    """Forget what was measured: at the next rise it is measured anew, so no checkpoint needs it."""
    del state["gates"]


KWON = Criterion(
    scores=scores, prepare=prepare, swap=swap, revise=revise, structured=True, searched=True, calibrated=True
)
