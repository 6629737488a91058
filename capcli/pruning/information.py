"""The empirical Fisher information of the weights: what stands for the second derivatives of the loss.

Letters: n prunable weights, B weights of a block, K blocks of a matrix, G gradients that are added up together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from capcli import parallel
from capcli.pruning.calibration import Calibration
from capcli.pruning.masked import Matrices

TOGETHER = 32  # gradients that are added up in one product
DAMPING = 0.1  # of the mean of the diagonal, added to it: there are hardly more gradients than weights in a block
NOTHING = 1e-30
BUDGET_BYTES, MORE_OF_DEVICE = 2**30, 8  # for the blocks that are measured in one pass; times more on a device
INVERTED_BYTES = 2**26  # of blocks that are inverted together


@torch.no_grad()
def information(matrices: Matrices, calibration: Calibration, step: int) -> Tensor:
    """1 / [F⁻¹]_ii of each weight, [n], with F the mean over small batches of g·gᵀ, in blocks; g is dL/dW'∘M, or
    dL/dW' with `calibration.regrow`.

    A block are `calibration.block` weights of a matrix that are stored in a row; what lies outside of it counts as 0.
    With 1, that is F_ii (section 00 of the design's METHODS), else F is damped (oBERT, arXiv 2203.07259; section 5):
    w²/2 times this is by how much the loss grows without w when the others of its block make up for it as well as they
    can.
    """
    if calibration.block == 1:
        return _diagonal(matrices, calibration, step)
    return torch.cat(
        [
            alone(found).flatten()[: matrices.sizes[i]]
            for group in groups(matrices, calibration.block)
            for i, found in blocks(matrices, calibration, step, group).items()
        ]
    )


@torch.no_grad()
def blocks(matrices: Matrices, calibration: Calibration, step: int, group: Sequence[int]) -> dict[int, Tensor]:
    """The blocks of F of the matrices of a group by number, damped, [K, B, B] each; the last one of a matrix may reach
    beyond it. See `groups`."""
    block, device = calibration.block, matrices.mask.device
    sums = [torch.zeros(-(-matrices.sizes[i] // block), block, block, device=device) for i in group]
    count = 0
    for some in _stacked(calibration.gradients(matrices, step, group)):
        for total, gradients in zip(sums, some, strict=True):
            rows = torch.nn.functional.pad(gradients, (0, total.shape[0] * block - gradients.shape[1]))
            parts = rows.view(len(rows), -1, block).transpose(0, 1)  # [K, G, B]
            total.baddbmm_(parts.transpose(1, 2), parts)
        count += len(some[0])
    count = parallel.added(sums, count)
    return {i: damped(total.div_(count)) for i, total in zip(group, sums, strict=True)}


def _diagonal(matrices: Matrices, calibration: Calibration, step: int) -> Tensor:
    everything = range(len(matrices.names))
    sums, count = [torch.zeros_like(matrices.original(i)) for i in everything], 0
    for gradients in calibration.gradients(matrices, step, everything):
        for total, gradient in zip(sums, gradients, strict=True):
            total.addcmul_(gradient, gradient)
        count += 1
    count = parallel.added(sums, count)
    return torch.cat([total.flatten() for total in sums]) / count


def groups(matrices: Matrices, block: int) -> list[list[int]]:
    """The matrices by number, as many together as fit into the memory for their blocks."""
    budget_bytes = BUDGET_BYTES * (1 if matrices.mask.device.type == "cpu" else MORE_OF_DEVICE)
    found: list[list[int]] = []
    used_bytes = budget_bytes
    for i, size in enumerate(matrices.sizes):
        wanted_bytes = 4 * size * block
        if used_bytes + wanted_bytes > budget_bytes:
            found.append([])
            used_bytes = 0
        found[-1].append(i)
        used_bytes += wanted_bytes
    return found


def _stacked(steps: Iterator[list[Tensor]]) -> Iterator[list[Tensor]]:
    """The gradients of each matrix flat, [G, n of the matrix], `TOGETHER` at a time."""
    waiting: list[list[Tensor]] = []
    for gradients in steps:
        waiting.append([gradient.flatten() for gradient in gradients])
        if len(waiting) == TOGETHER:
            yield [torch.stack(some) for some in zip(*waiting, strict=True)]
            waiting = []
    if waiting:
        yield [torch.stack(some) for some in zip(*waiting, strict=True)]


def damped(blocks: Tensor) -> Tensor:
    """The `blocks` [K, B, B] with something more on their diagonals, in place; next to nothing where all are zero."""
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    diagonal.add_((DAMPING * diagonal.mean()).clamp(min=NOTHING))
    return blocks


def alone(blocks: Tensor) -> Tensor:
    """1 / [F⁻¹]_ii of damped `blocks` [K, B, B], as [K, B]."""
    return torch.cat([1 / inverse.diagonal(dim1=1, dim2=2) for inverse in _inverted(blocks)])


def growth(blocks: Tensor, weight: Tensor, together: int) -> Tensor:
    """By how much the loss grows, to second order, without each of a flat `weight` [m], whose damped F is in `blocks`
    [K, B, B]: w² / (2·[F⁻¹]_ii), [m].

    Where `together` neighbours Q go as one, of which B is a multiple: their ½·w_Qᵀ·([F⁻¹]_QQ)⁻¹·w_Q in equal parts.
    """
    if together == 1:
        return weight.square() * alone(blocks).flatten()[: len(weight)] / 2
    size, found = blocks.shape[1], []
    padded = torch.nn.functional.pad(weight, (0, blocks.shape[0] * size - len(weight)))
    parts = padded.view(-1, size // together, together, 1).split(_at_once(blocks))  # type: ignore[no-untyped-call]
    for inverse, w in zip(_inverted(blocks), parts, strict=True):
        cut = inverse.view(-1, size // together, together, size // together, together)
        own = cut.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [F⁻¹]_QQ, [K, B / Q, Q, Q]
        solved = torch.cholesky_solve(w, torch.linalg.cholesky(own))
        found.append((w * solved).sum(dim=(2, 3)).flatten() / (2 * together))
    return torch.cat(found).repeat_interleave(together)[: len(weight)]


def _inverted(blocks: Tensor) -> Iterator[Tensor]:
    """The inverses of damped `blocks` [K, B, B], some at a time."""
    for some in blocks.split(_at_once(blocks)):  # type: ignore[no-untyped-call]
        yield torch.cholesky_inverse(torch.linalg.cholesky(some))


def _at_once(blocks: Tensor) -> int:
    return max(1, INVERTED_BYTES // (4 * blocks.shape[1] ** 2))
