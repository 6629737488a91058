"""How many weights each matrix keeps, where matrices of one kind share what stays by their mean score.

SMP-S: section 2 of the design's METHODS; arXiv 2210.06210. A kind is a place in the layer, such as the query matrix.

Letters: n prunable weights, L matrices of one kind, S their scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capcli.models import families
from capcli.models.model import Model
from capcli.pruning.topk import apportion, in_each, topk_rows, topk_where

EVEN_FROM, EVENNESS = 0.7, 4.0  # kept: shares are drawn together, so that few matrices would have to keep all


def kinds_of(model: Model) -> list[str]:
    """The kind of each prunable matrix: its name inside its layer."""
    blocks = [f"{name}." for name in families.blocks(model.net, model.family)]
    return [next(name.removeprefix(block) for block in blocks if name.startswith(block)) for name in model.prunable()]


def evenness_of(sparsity: float) -> float:
    """p, what scores are divided by before the sigmoid, for the sparsity at the end of the run."""
    return EVENNESS if 1 - sparsity >= EVEN_FROM else 1.0


def by_kind(scores: Tensor, sizes: Sequence[int], kinds: Sequence[str], keep: int, evenness: float) -> Tensor:
    """Boolean mask [n] of exactly `keep` weights for flat `scores` [n] of matrices with `sizes`, one of `kinds` each.

    Each kind has its even share of them, which its matrices have in proportion to R = mean σ(S / `evenness`), and each
    matrix keeps its best.
    """
    parts = scores.split(list(sizes))  # type: ignore[no-untyped-call]
    groups = [[i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]
    counts: dict[int, Tensor] = {}
    for group, kept in zip(groups, apportion(keep, [sum(sizes[i] for i in group) for group in groups]), strict=True):
        worth = torch.stack([torch.sigmoid(parts[i] / evenness).mean() for i in group])
        counts |= zip(group, shares(worth, [sizes[i] for i in group], kept), strict=True)
    return in_each(scores, sizes, [counts[i] for i in range(len(sizes))], _best)


def _best(scores: Tensor, counts: Sequence[Tensor]) -> Tensor:
    """Boolean masks [m, n] of the `counts` largest, m numbers on the device, of each row of `scores` [m, n]."""
    each = torch.stack(list(counts))
    return topk_rows(scores, each.tolist()) if scores.device.type == "cpu" else topk_where(scores, each)


def shares(worth: Tensor, sizes: Sequence[int], keep: int) -> Tensor:
    """Whole numbers [L] that add up to `keep`, in proportion to `worth` [L] times `sizes`, none above its size.

    What is above goes to the others, in the same proportion. The rest after rounding down goes to the largest
    remainders, of equal ones to the lower index. No device is waited for, except one without 64-bit floats.
    """
    home = worth.device
    worth = (worth.cpu() if home.type == "mps" else worth).double()
    most = torch.tensor(sizes, dtype=torch.float64).to(worth.device, non_blocking=True)
    weight = worth.clamp(min=torch.finfo(torch.float32).tiny) * most
    full = torch.zeros_like(most, dtype=torch.bool)
    share = most
    for _ in sizes:  # each round fills a matrix, or changes nothing
        left, open_weight = keep - (most * full).sum(), weight * ~full
        share = torch.where(
            full, most, left * open_weight / open_weight.sum().clamp(min=torch.finfo(torch.float64).tiny)
        )
        full = full | (share >= most)
    share = torch.where(full, most, share)
    counts = share.floor()
    order = (counts - share).argsort(stable=True)  # the largest remainder first
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(sizes), device=order.device))
    return (counts + (rank < keep - counts.sum())).long().to(home)
