"""Diagonal Fisher information: by how much the loss grows, to second order, without a weight; then the refit.

Letters: n prunable weights. A weight that was removed does not come back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capcli.pruning.criteria.seat import ERRORS, Criterion, State, Subject, unmeasured
from capcli.pruning.refit import refit


def prepare(state: State, subject: Subject, step: int) -> None:
    """Measure the Fisher information [n] of the masked weights, and remember the masks [n] as they are."""
    assert subject.calibration is not None
    state["fisher"] = subject.calibration.fisher(subject.matrices, step)
    state["before"] = subject.matrices.mask.clone()


def scores(state: State, subject: Subject) -> Tensor:
    """W²·F, [n]: twice what the loss grows by without the weight, were F all of its second derivatives."""
    found = subject.matrices.flat_weights().square_() * state["fisher"]
    return found.masked_fill_(state["before"] == 0, -torch.inf)


def revise(state: State, subject: Subject, step: int) -> None:
    """Fit the weights that stay to what the layers put out before, unless the user wants none of it.

    What was measured is forgotten: at the next rise all of it is measured anew, so no checkpoint needs it.
    """
    assert subject.calibration is not None
    before = state.pop("before")
    del state["fisher"]
    if subject.calibration.refit:
        state[ERRORS].copy_(refit(subject.matrices, before, subject.calibration, step))


FISHER = Criterion(scores=scores, init=unmeasured, prepare=prepare, revise=revise, scope="global", calibrated=True)
