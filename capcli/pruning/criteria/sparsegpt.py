"""SparseGPT: columns from left to right, what each of them loses made up for by those to its right (arXiv 2301.00774).

Letters: I inputs and O outputs of a matrix W [O, I], C = XᵀX / T of its inputs X [T, I].
"""

from __future__ import annotations

import torch
from torch import Tensor

from capcli.pruning.criteria.layerwise import Quota, layerwise
from capcli.pruning.least_squares import DAMPING, Moments
from capcli.pruning.patterns import Groups

COLUMNS = 128  # among which the weights that stay are chosen at once


def running(moments: Moments, weight: Tensor, quota: Quota) -> tuple[Tensor, Tensor]:
    """The mask [O, I], and the weights with all corrections.

    With U the upper Cholesky factor of (C + δ·1)⁻¹, δ `DAMPING` times the mean of the diagonal of C, the score of a
    weight is (w / U_jj)². Of each block of `COLUMNS` columns, which get their shares of the quota, the best stay, as
    the columns before have left them; of N:M the best of each M columns, as these have. The error e = w / U_jj of a
    weight that is removed in column j is taken from the columns k after it, as e·U_jk.
    """
    factor, weight = inverse_factor(moments.second()), weight.clone()
    at_once = quota.pattern.width if isinstance(quota.pattern, Groups) else COLUMNS
    kept = torch.zeros_like(weight, dtype=torch.bool)
    begins = list(range(0, weight.shape[1], COLUMNS))
    ends = [*begins[1:], weight.shape[1]]
    quotas = quota.shared([end - begin for begin, end in zip(begins, ends, strict=True)])
    for begin, end, share in zip(begins, ends, quotas, strict=True):
        block, inside = weight[:, begin:end], factor[begin:end, begin:end]
        stays, errors = kept[:, begin:end], torch.zeros_like(block)
        for j in range(end - begin):
            if j % at_once == 0:
                some = slice(j, j + at_once)
                stays[:, some] = share.best((block[:, some] / inside.diagonal()[some]).square())
            errors[:, j] = block[:, j].masked_fill(stays[:, j], 0.0) / inside[j, j]
            block[:, j + 1 :] -= errors[:, j, None] * inside[j, j + 1 :]
        weight[:, end:] -= errors @ factor[begin:end, end:]
    return kept, weight


def inverse_factor(second: Tensor) -> Tensor:
    """U, upper triangular, with UᵀU = (C + δ·1)⁻¹."""
    damping = DAMPING * second.diagonal().mean()
    damping = torch.where(damping > 0, damping, torch.ones_like(damping))
    damped = second + damping * torch.eye(len(second), dtype=second.dtype, device=second.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


SPARSEGPT = layerwise(running)
