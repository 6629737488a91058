"""What a weight is worth: one row per criterion (section 4 of the design's ALGORITHM).

Letters: n prunable weights, L layers, A heads per layer, F neurons per layer, H hidden size, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from capcli.masks import MaskSet


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """How weights are scored.

    learned: scores are parameters, trained straight through. structured: whole heads and neurons are removed.
    regularised: REG is added to the loss. scope: ranking within each matrix or over all, unless the user chooses.
    scores: MaskSet -> flat scores [n]; None for structured criteria, which score groups.
    """

    learned: bool = False
    structured: bool = False
    regularised: bool = False
    scope: str = "global"
    scores: Callable[[MaskSet], Tensor] | None = None


def learned_scores(masks: MaskSet) -> Tensor:
    """The trained scores S, [n]."""
    assert masks.scores is not None
    return masks.scores


CRITERIA = {
    "magnitude": Criterion(scores=MaskSet.flat_magnitude, scope="matrix"),
    "movement": Criterion(scores=learned_scores, learned=True, scope="matrix"),
    # With the threshold solved at every update, sigma(S) over the threshold is the global top-k of S.
    "soft-movement": Criterion(scores=learned_scores, learned=True, regularised=True, scope="global"),
    "first-order": Criterion(structured=True),
}


def initial_scores(masks: MaskSet) -> Tensor:
    """Scores [n] that rank weights by magnitude at the start: abs(W) over the mean abs(W) of its matrix."""
    parts = masks.flat_magnitude().split(masks.sizes)  # type: ignore[no-untyped-call]
    return torch.cat([part / part.mean().clamp(min=torch.finfo(part.dtype).tiny) for part in parts])


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
