"""Matrices that are cut one after another, from the input upwards, by what they read: Wanda, MULTIFLOW, SDS.

Forward passes only, no labels. What a matrix reads is measured after all below it were cut. Sections 11, 13 and 14 of
the design's METHODS.

Letters: T tokens, I inputs and O outputs of a matrix W [O, I], C = XᵀX / T of its inputs X [T, I], n prunable weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from capcli.pruning.criteria.seat import ERRORS, Criterion, State, Subject
from capcli.pruning.least_squares import Moments, solve
from capcli.pruning.masked import Matrices
from capcli.pruning.patterns import SINGLE, Pattern, Unstructured, shares
from capcli.pruning.refit import as_it_was, walk

SHRUNK = 0.1  # SDS: of the mean abs(W) of a matrix, taken off what comes back


@dataclass(frozen=True, kw_only=True)
class Quota:
    """How many weights of a matrix stay, in which pattern, ranked in all of it (`matrix`), or as many in each output
    `row`."""

    count: int
    scope: str
    pattern: Pattern = SINGLE

    def best(self, scores: Tensor) -> Tensor:
        """Boolean mask [O, I] of the `count` best `scores` [O, I]."""
        return self.pattern.best(scores, self.count, self.scope)

    def shared(self, sizes: list[int]) -> list[Quota]:
        """The quotas of parts of the matrix with these sizes."""
        return [replace(self, count=count) for count in shares(self.pattern, self.count, sizes)]


# What its inputs say of a matrix [O, I], and how many of its weights stay -> mask [O, I], and the weights with it.
Cut = Callable[[Moments, Tensor, Quota], tuple[Tensor, Tensor]]
Score = Callable[[Moments, Tensor], Tensor]
Allocation = Callable[[Matrices, Unstructured, float], list[int]]


def by_size(matrices: Matrices, structure: Unstructured, sparsity: float) -> list[int]:
    """How many weights each matrix keeps, in proportion to its size."""
    return shares(structure.pattern, structure.weights(sparsity), matrices.sizes)


def by_magnitude(matrices: Matrices, structure: Unstructured, sparsity: float) -> list[int]:
    """As many as are among the largest of all matrices."""
    largest = structure.pattern.select(matrices.flat_magnitude(), matrices.sizes, sparsity, "global", 0.0)
    parts = largest.split(matrices.sizes)  # type: ignore[no-untyped-call]
    return [int(part.sum()) for part in parts]


def layerwise(cut: Cut, allocation: Allocation = by_size) -> Criterion:
    """The criterion that goes up the layers with `cut`, and fits what stays unless the user wants none of it."""

    def choose(state: State, subject: Subject, step: int, sparsity: float) -> Tensor:
        matrices, calibration, structure = subject.matrices, subject.calibration, subject.structure
        assert calibration is not None
        assert isinstance(structure, Unstructured)
        counts = allocation(matrices, structure, sparsity)
        quotas = [Quota(count=count, scope=structure.scope, pattern=structure.pattern) for count in counts]
        target = calibration.target or as_it_was(calibration.model, matrices, matrices.mask)
        index = {name: i for i, name in enumerate(matrices.names)}
        for name, moments in walk(calibration, target, step):
            i = index.pop(name)
            weight = matrices.seen(i)[0].to(moments.gram.dtype)
            bias: Tensor | None = matrices.linears[i].bias
            kept, found = cut(moments, weight, quotas[i])
            if subject.refit:
                found, bias = solve(moments, found, kept)
            state[ERRORS][i] = moments.error(found * kept, bias)
            matrices.put(i, found, bias, kept)
        for i in index.values():  # not in use
            weight, _ = matrices.seen(i)
            matrices.put(i, weight, None, quotas[i].best(weight.abs()))
        return matrices.mask.bool()

    return Criterion(choose=choose, calibrated=True)


def ranked(score: Score) -> Cut:
    """The best by `score` stay as they are."""

    def cut(moments: Moments, weight: Tensor, quota: Quota) -> tuple[Tensor, Tensor]:
        return quota.best(score(moments, weight)), weight

    return cut


def reach(moments: Moments) -> Tensor:
    """sqrt(C_jj), [I]: the root mean square of each input."""
    return moments.second().diagonal().clamp(min=0).sqrt()


def wanda(moments: Moments, weight: Tensor) -> Tensor:
    """abs(w_ij)·sqrt(C_jj), [O, I] (arXiv 2306.11695)."""
    return weight.abs() * reach(moments)


def multiflow(moments: Moments, weight: Tensor) -> Tensor:
    """out_i·abs(w_ij)·in_j, [O, I] (MULTIFLOW, arXiv 2404.05621).

    With a_j = sqrt(C_jj), out_i is the mean over j of abs(w_ij)·a_j, and in_j the mean over i of the same.
    """
    flow = wanda(moments, weight)
    return flow.mean(dim=1)[:, None] * weight.abs() * flow.mean(dim=0)


def sparse_dense_sparse(moments: Moments, weight: Tensor, quota: Quota) -> tuple[Tensor, Tensor]:
    """SDS (arXiv 2408.10473): cut, let all weights come back, cut again; its middle step in closed form.

    W_s is W cut by `wanda` and fitted. Of all weights, W_d = argmin |X·Wᵀ + b - Y|² + β·|W - W_s|² with β `DAMPING`
    times the mean of the diagonal of XᵀX; those that come back are then drawn to zero by `SHRUNK` times the mean
    abs(W). What stays is chosen by `wanda` of W_d. (The paper minimises with Adam, block by block, and an L1 term.)
    """
    first = quota.best(wanda(moments, weight))
    sparse, _ = solve(moments, weight, first)
    dense, _ = solve(moments, sparse, torch.ones_like(first))
    drawn = torch.nn.functional.softshrink(dense, float(SHRUNK * weight.abs().mean()))
    dense = torch.where(first, dense, drawn)
    return quota.best(wanda(moments, dense)), dense


WANDA = layerwise(ranked(wanda))
MULTIFLOW = layerwise(ranked(multiflow), by_magnitude)
SDS = layerwise(sparse_dense_sparse)
