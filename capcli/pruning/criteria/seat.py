"""The seat of a criterion: what it may remember, see and change, and when it is asked.

Letters: n prunable weights, U units that a structure chooses among; for single weights U is n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from capcli.pruning.calibration import Calibration
from capcli.pruning.masked import Matrices
from capcli.pruning.structures import Structure

State = dict[str, Tensor]  # all that a criterion remembers; goes into checkpoints as it is


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a criterion judges: the masked matrices, what is removed together, and the length of the run in steps.

    calibration: what it may measure on examples, for criteria that are `calibrated`, and for others where the user asks
    for it. refit: whether what stays is to be fitted, by the pruner, or by a criterion that chooses its weights itself.
    """

    matrices: Matrices
    structure: Structure
    total_steps: int
    calibration: Calibration | None = None
    refit: bool = False


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that is observed: its number, the learning rate of the weights, and what the loss was multiplied by."""

    number: int
    lr: float
    scale: float = 1.0


ERRORS = "errors"  # in the state, where anything is calibrated: what is lost of the outputs of each matrix
WINDOW = 10  # steps


def window_of(total_steps: int) -> int:
    """Steps of a window; fewer than `WINDOW` in a short run, so that twenty of them fit."""
    return min(WINDOW, max(1, total_steps // 20))


def stateless(subject: Subject) -> State:
    """The state of a criterion that remembers nothing."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """What weights or units are worth.

    scores: -> [U], higher stays.
    choose: in place of `scores`: called at a selection with the step and the sparsity, chooses the weights that stay
    itself, [n], as it goes up the layers, and may change them.
    init: the state at the start of a run.
    observe: called after each backward, before clipping, unless there is a calibration; reads gradients, changes the
    state.
    prepare: called before a selection with the step if there is a calibration; may run the network, changes the state.
    swap: called with the units that were chosen [U] and those that were alive [U]; may let units change places.
    revise: called after a selection with the step; changes the state, and may change the weights that stay.
    state_per_weight: floats of the state for each weight.
    trains: what the optimiser gets, of `weights` (all but the scores) and `scores`. With `scores`, each weight has one,
    trained straight through.
    gradient: what `observe` finds at a weight that is masked: nothing (`masked`), or dL/dW' (`dense`), with which it is
    trained as well.
    due: masks are chosen anew at every `step`, when the sparsity `rise`s, or after every `window` of steps, see
    `window_of`.
    scope: single weights are ranked within each `matrix`, all together (`global`), or those of a `type` of matrix share
    what stays, see `allocation`, unless the user chooses.
    structured: chooses whole units, not single weights. searched: whole heads and neurons share a budget, see
    `search.Searched`; else both are removed in the same ratio. calibrated: needs `Subject.calibration`, and the
    sparsity rises in the few stairs of `schedules.stairs`, or at once.
    regularised: what REG grows with, which is then added to the loss, a name of `objective.RAMPS`.
    warms: the learning rate of trained scores rises to its peak first, as that of weights does.
    """

    scores: Callable[[State, Subject], Tensor] | None = None
    choose: Callable[[State, Subject, int, float], Tensor] | None = None
    init: Callable[[Subject], State] = stateless
    observe: Callable[[State, Subject, Step], None] | None = None
    prepare: Callable[[State, Subject, int], None] | None = None
    swap: Callable[[State, Subject, Tensor, Tensor], Tensor] | None = None
    revise: Callable[[State, Subject, int], None] | None = None
    trains: frozenset[str] = frozenset({"weights"})
    gradient: Literal["masked", "dense"] = "masked"
    due: Literal["step", "rise", "window"] = "rise"
    scope: Literal["matrix", "global", "type"] = "matrix"
    structured: bool = False
    searched: bool = False
    state_per_weight: int = 0
    regularised: Literal["", "sparsity", "run"] = ""
    warms: bool = True
    calibrated: bool = False
