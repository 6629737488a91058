"""How many weights stay, and which: exact selection of the largest scores.

Letters: n entries in scope, m rows. Every selection keeps an exact number of entries; among equal scores the lower
index wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def kept_count(sparsity: float, n: int) -> int:
    """How many of `n` weights stay at `sparsity` (section 3): round((1 - s)·n), halves up."""
    return min(n, math.floor((1 - sparsity) * n + 0.5))


def topk(scores: Tensor, keep: int) -> Tensor:
    """Boolean mask of the `keep` largest of `scores` [n], exact; the lower index wins ties. Scores hold no NaN."""
    assert scores.dim() == 1, scores.shape
    return topk_rows(scores[None], [keep])[0]


def topk_rows(scores: Tensor, keep: Sequence[int]) -> Tensor:
    """Boolean masks [m, n]: of each row of `scores` [m, n] the `keep[i]` largest, as `topk` has it.

    On the CPU a partial partition finds the k-th value of a row; elsewhere `kth_values`.
    """
    n = scores.shape[1]
    assert len(keep) == len(scores), (len(keep), scores.shape)
    assert all(0 <= k <= n for k in keep), (keep, n)
    scores = scores.float()
    if scores.device.type == "cpu":
        found = [_partitioned(row, k) for row, k in zip(scores, keep, strict=True)]
        return found[0][None] if len(found) == 1 else torch.stack(found)
    return by_values(scores, keep)


def _partitioned(scores: Tensor, keep: int) -> Tensor:
    """`topk` of one row on the CPU."""
    n = len(scores)
    if keep in (0, n):
        return torch.full_like(scores, bool(keep), dtype=torch.bool)
    value = float(np.partition(scores.numpy(), n - keep)[n - keep])
    chosen = scores >= value
    if surplus := int(torch.count_nonzero(chosen)) - keep:
        chosen[torch.nonzero(scores == value)[-surplus:, 0]] = False
    return chosen


def by_values(scores: Tensor, keep: Sequence[int]) -> Tensor:
    """`topk_rows` for a device, which is never waited for: all above the k-th value, and of those equal to it the
    first."""
    values = kth_values(scores, [max(1, k) for k in keep])
    above, equal = scores > values, scores == values
    missing = _moved(keep, scores.device) - above.sum(dim=1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= missing))


def kth_values(scores: Tensor, ranks: Sequence[int]) -> Tensor:
    """The `ranks[i]`-th largest of each row of `scores` [m, n], [m, 1].

    On a CUDA device `torch.topk` selects by radix: it reads the scores six times whatever their number, and sorts
    nothing. Its memory grows with the rank, so that the higher ranks are counted from the smallest value.
    """
    most, fewest = max(ranks), min(ranks)
    n = scores.shape[1]
    if 2 * fewest > n + 1:
        return -kth_values(-scores, [n + 1 - rank for rank in ranks])
    largest = scores.topk(most, dim=1, sorted=False).values
    last = largest.topk(most - fewest + 1, dim=1, largest=False).values
    return last.gather(1, _moved([most - rank for rank in ranks], scores.device))


def topk_where(scores: Tensor, keep: Tensor) -> Tensor:
    """`topk_rows` where only the device knows how many: `keep` [m] of each row of `scores` [m, n] in 32 bits.

    The k-th value is found bit by bit, from the highest: floats read as whole numbers, those below zero turned round,
    have the order of the floats.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # -0 and 0 are equal
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    value = torch.full_like(keep, -(2**31), dtype=torch.int64)[:, None]
    for bit in range(31, -1, -1):
        higher = value + 2**bit
        value = torch.where((keys >= higher).sum(dim=1, keepdim=True) >= keep[:, None].clamp(min=1), higher, value)
    above, equal = keys > value, keys == value
    missing = keep[:, None] - above.sum(dim=1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= missing))


def _moved(numbers: Sequence[int], device: torch.device) -> Tensor:
    """One number for each row, [m, 1]."""
    return torch.tensor(numbers).to(device, non_blocking=True)[:, None]


def apportion(keep: int, sizes: Sequence[int]) -> list[int]:
    """Split `keep` over parts in proportion to `sizes`; the sum is exact (largest remainder, lower index first)."""
    total = sum(sizes)
    shares = [keep * size / total for size in sizes]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: keep - sum(counts)]:
        counts[i] += 1
    return counts


def select(scores: Tensor, sizes: Sequence[int], sparsity: float, scope: str, floor: float = 0.0) -> Tensor:
    """Boolean mask [n] for flat `scores` [n] of matrices with `sizes`, ranked per `matrix` or `global`ly.

    In a global ranking each matrix keeps its best ceil(floor·size), but no more than its even share; the rest is ranked
    globally. The count is exact in any case.
    """
    keep = kept_count(sparsity, scores.numel())
    shares = apportion(keep, sizes)
    if scope == "matrix":
        return in_each(scores, sizes, shares)
    floors = [min(math.ceil(floor * size), even) for size, even in zip(sizes, shares, strict=True)]
    return _with_floors(scores, sizes, keep, floors) if any(floors) else topk(scores, keep)


def _with_floors(scores: Tensor, sizes: Sequence[int], keep: int, floors: Sequence[int]) -> Tensor:
    """The `keep` best of all `scores` [n], of each matrix its `floors` best at least."""
    if scores.device.type == "cpu":  # elsewhere, to look at the counts would be to wait for the device
        chosen = topk(scores, keep)
        parts = chosen.split(list(sizes))  # type: ignore[no-untyped-call]
        if all(int(part.count_nonzero()) >= least for part, least in zip(parts, floors, strict=True)):
            return chosen
    return topk(scores.float().masked_fill(in_each(scores, sizes, floors), torch.inf), keep)


def in_each(
    scores: Tensor, sizes: Sequence[int], counts: Sequence[Any], best: Callable[..., Tensor] = topk_rows
) -> Tensor:
    """The best of each matrix, `counts` of them, as `best` finds them in rows of scores [m, n]."""
    parts = scores.split(list(sizes))  # type: ignore[no-untyped-call]
    masks: list[Tensor] = [scores] * len(sizes)
    for size in dict.fromkeys(sizes):  # matrices of one size together
        rows = [i for i, other in enumerate(sizes) if other == size]
        chosen = best(torch.stack([parts[i] for i in rows]), [counts[i] for i in rows])
        for i, mask in zip(rows, chosen, strict=True):
            masks[i] = mask
    return torch.cat(masks)
