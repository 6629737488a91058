"""oBERT: Fisher information in blocks, and a correction of the weights that stay.

arXiv 2203.07259; section 5 of the design's METHODS.

Letters: n prunable weights, B weights of a block, K blocks of a matrix. A weight that was removed does not come back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from capcli.pruning import information
from capcli.pruning.criteria.seat import Criterion, State, Subject
from capcli.pruning.patterns import Unstructured

SOLVED_BYTES = 2**26  # of blocks that are solved together


def choose(state: State, subject: Subject, step: int, sparsity: float) -> Tensor:
    """The weights that stay, [n], by w² / (2·[F⁻¹]_ii), ranked together, or neighbours Q that go together by
    ½·w_Qᵀ·([F⁻¹]_QQ)⁻¹·w_Q; those of a block of F make up for what is removed.

    F is measured once more for the correction where it is too large to be kept; nothing is changed before all of it
    has been read.
    """
    matrices, calibration, structure = subject.matrices, subject.calibration, subject.structure
    assert calibration is not None
    assert isinstance(structure, Unstructured)
    weights = matrices.flat_weights().split(matrices.sizes)  # type: ignore[no-untyped-call]
    before, groups = matrices.mask.bool(), information.groups(matrices, calibration.block)
    kept: dict[int, Tensor] = {}
    found: list[Tensor] = []
    for group in groups:
        for i, blocks in information.blocks(matrices, calibration, step, group).items():
            found.append(information.growth(blocks, weights[i], structure.pattern.together))
            if len(groups) == 1:
                kept[i] = blocks
    chosen = structure.select(torch.cat(found).masked_fill_(~before, -torch.inf), sparsity, before)
    removed, stays = (part.split(matrices.sizes) for part in (before & ~chosen, chosen))  # type: ignore[no-untyped-call]
    changes = []
    for group in groups:
        for i, blocks in (kept or information.blocks(matrices, calibration, step, group)).items():
            changes.append(correction(blocks, matrices.original(i).detach().flatten(), removed[i], stays[i]))
    for i, change in enumerate(changes):
        matrices.original(i).add_(change.view_as(matrices.original(i)))
    return chosen


def correction(blocks: Tensor, weight: Tensor, removed: Tensor, kept: Tensor) -> Tensor:
    """What is added to a flat `weight` [m] so that those `kept` make up for those `removed` (boolean, [m] each), to
    second order: in each block F_KK·x = F_KQ·w_Q for the removed weights Q and the kept ones K. Zero elsewhere.

    blocks: the damped F, [K, B, B], of which the last may reach beyond the weights.
    """
    size, padding = blocks.shape[1], blocks.shape[0] * blocks.shape[1] - len(weight)
    w, q, k = (functional.pad(part.to(blocks.dtype), (0, padding)).view(-1, size) for part in (weight, removed, kept))
    found = torch.zeros_like(w)
    touched = (q.any(dim=1) & k.any(dim=1)).nonzero()[:, 0]
    for some in touched.split(max(1, SOLVED_BYTES // (4 * size * size))):  # type: ignore[no-untyped-call]
        block, stays = blocks[some], k[some]
        wanted = stays * (block @ (w[some] * q[some])[:, :, None])[:, :, 0]
        system = block * stays[:, :, None] * stays[:, None, :] + torch.diag_embed(1 - stays)
        found[some] = torch.cholesky_solve(wanted[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
    return found.flatten()[: len(weight)]


OBERT = Criterion(choose=choose, scope="global", calibrated=True)
