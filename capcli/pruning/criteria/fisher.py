"""Fisher information: by how much the loss grows, to second order, without a weight.

Letters: n prunable weights. A weight that was removed does not come back, unless the calibration lets it `regrow`:
then it is trained straight through, from the value that it had, and ranked with the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capcli.pruning.criteria.seat import Criterion, State, Subject
from capcli.pruning.information import information


def prepare(state: State, subject: Subject, step: int) -> None:
    """Measure the Fisher information [n] of the masked weights."""
    assert subject.calibration is not None
    state["fisher"] = information(subject.matrices, subject.calibration, step)


def scores(state: State, subject: Subject) -> Tensor:
    """W² times `information`, [n]: twice what the loss grows by without the weight, to second order."""
    assert subject.calibration is not None
    found = subject.matrices.flat_weights().square_() * state["fisher"]
    return found if subject.calibration.regrow else found.masked_fill_(subject.matrices.mask == 0, -torch.inf)


def revise(state: State, subject: Subject, step: int) -> None:
    """Forget what was measured: at the next rise it is measured anew, so no checkpoint needs it."""
    del state["fisher"]


FISHER = Criterion(scores=scores, prepare=prepare, revise=revise, scope="global", calibrated=True)
