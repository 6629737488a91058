"""Magnitude: large weights stay."""

from __future__ import annotations

from torch import Tensor

from capcli.pruning.criteria.seat import Criterion, State, Subject


def scores(state: State, subject: Subject) -> Tensor:
    """abs(W), [n]."""
    return subject.matrices.flat_magnitude()


MAGNITUDE = Criterion(scores=scores)
