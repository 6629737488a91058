"""Movement: a score per weight, trained straight through (section 4 of the design's ALGORITHM; arXiv 2005.07683).

SMP trains nothing else: section 2 of the design's METHODS; arXiv 2210.06210.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capcli.pruning.criteria.seat import Criterion, State, Subject
from capcli.pruning.masked import Matrices


def scores(state: State, subject: Subject) -> Tensor:
    """The trained scores S, [n]."""
    assert subject.matrices.scores is not None
    return subject.matrices.scores


def initial_scores(matrices: Matrices) -> Tensor:
    """Scores [n] that rank weights by magnitude at the start: abs(W) over the mean abs(W) of its matrix."""
    parts = matrices.flat_magnitude().split(matrices.sizes)  # type: ignore[no-untyped-call]
    return torch.cat([part / part.mean().clamp(min=torch.finfo(part.dtype).tiny) for part in parts])


LEARNED = frozenset({"weights", "scores"})
MOVEMENT = Criterion(scores=scores, trains=LEARNED, due="step")
# With the threshold solved at every selection, sigma(S) over the threshold is the global top-k of S.
SOFT_MOVEMENT = Criterion(scores=scores, trains=LEARNED, due="step", scope="global", regularised="sparsity")
SMP = Criterion(scores=scores, trains=frozenset({"scores"}), due="step", scope="type", regularised="run", warms=False)
