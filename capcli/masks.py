"""From scores to masks: how many weights stay at a step, and which.

Letters: n weights in scope, T steps of the run. `sparsity` is the fraction removed, in [0, 1). Every selection keeps
an exact number of entries; among equal scores the lower index wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from capcli.errors import ConfigError


def kept_count(sparsity: float, n: int) -> int:
    """How many of `n` weights stay at `sparsity` (section 3): round((1 - s)·n), halves up."""
    return min(n, math.floor((1 - sparsity) * n + 0.5))


def cubic(step: int, total: int, *, final: float, dense_share: float, final_share: float) -> float:
    """Sparsity at `step` of `total` (section 4, schedule): dense, then cubic, then held at `final`.

    The kept fraction follows v_f + (1 - v_f)·(1 - progress)³ between the two held parts.
    """
    begin, end = _ramp(total, dense_share, final_share)
    if step >= end:
        return final
    if step < begin:
        return 0.0
    progress = (step - begin) / max(1, end - begin)
    return final - final * (1 - progress) ** 3


def _ramp(total: int, dense_share: float, final_share: float) -> tuple[int, int]:
    """First step that prunes and first step at the final sparsity; the last step is always at the final sparsity."""
    end = min(total - 1, math.ceil(round((1 - final_share) * total, 6)))
    return min(end, math.floor(round(dense_share * total, 6))), end


def ledges(step: int, total: int, *, final: float, dense_share: float, final_share: float, rise: float = 0.01) -> float:
    """`cubic`, but held until it has risen by at least `rise`: importance of single steps is too noisy to act on."""
    sparsity = cubic(step, total, final=final, dense_share=dense_share, final_share=final_share)
    return sparsity if sparsity == final else math.floor(sparsity / rise + 1e-9) * rise


def stairs(step: int, total: int, *, final: float, dense_share: float, final_share: float, rise: float = 0.1) -> float:
    """Sparsity at `step` of a structured run: equal steps of at most `rise`, each followed by training."""
    begin, end = _ramp(total, dense_share, final_share)
    begin = min(end, max(1, begin))  # importance is known only after a step
    if step < begin:
        return 0.0
    n_stairs = max(1, math.ceil(final / rise - 1e-9))
    stair = 1 + (step - begin) * n_stairs // max(1, end - begin)
    return final if step >= end else final * (min(n_stairs, stair) / n_stairs)  # the last stair is exactly final


def topk(scores: Tensor, keep: int) -> Tensor:
    """Boolean mask of the `keep` largest of `scores` [n], exact; the lower index wins ties. Scores hold no NaN."""
    assert scores.dim() == 1, scores.shape
    return topk_rows(scores[None], [keep])[0]


def topk_rows(scores: Tensor, keep: Sequence[int]) -> Tensor:
    """Boolean masks [m, n]: of each row of `scores` [m, n] the `keep[i]` largest, as `topk` has it.

    On the CPU a partial partition finds the k-th value; elsewhere a bisection over the ordered bit patterns of all rows
    at once, which needs no sort and never waits for the device.
    """
    n = scores.shape[1]
    assert len(keep) == len(scores), (len(keep), scores.shape)
    assert all(0 <= k <= n for k in keep), (keep, n)
    scores = scores.float()
    if scores.device.type == "cpu":
        return torch.stack([_partitioned(row, k) for row, k in zip(scores, keep, strict=True)])
    return _bisected(scores, keep)


def _partitioned(scores: Tensor, keep: int) -> Tensor:
    """`topk` of one row on the CPU."""
    n = len(scores)
    if keep in (0, n):
        return torch.full_like(scores, bool(keep), dtype=torch.bool)
    value = float(np.partition(scores.numpy(), n - keep)[n - keep])
    above = scores > value
    missing = keep - int(torch.count_nonzero(above))
    above[torch.nonzero(scores == value)[:missing, 0]] = True
    return above


def _bisected(scores: Tensor, keep: Sequence[int]) -> Tensor:
    """`topk_rows` for a device: per row the largest v with count(key >= v) >= keep, then ties by index."""
    keys = _ordered(scores)
    wanted = torch.tensor(keep, dtype=torch.int64).to(scores.device, non_blocking=True)
    low = torch.full_like(wanted, -(2**31))
    high = torch.full_like(wanted, 2**31 - 1)
    for _ in range(32):
        middle = (low + high + 1) >> 1
        enough = (keys >= middle[:, None]).sum(dim=1) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    above, equal = keys > low[:, None], keys == low[:, None]
    rank = equal.cumsum(dim=1, dtype=torch.int32)
    return above | (equal & (rank <= (wanted - above.sum(dim=1))[:, None]))


def _ordered(scores: Tensor) -> Tensor:
    """int32 keys in the order of the floats; +0 and -0 are equal."""
    bits = (scores + 0.0).view(torch.int32)
    return torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


def apportion(keep: int, sizes: Sequence[int]) -> list[int]:
    """Split `keep` over parts in proportion to `sizes`; the sum is exact (largest remainder, lower index first)."""
    total = sum(sizes)
    shares = [keep * size / total for size in sizes]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: keep - sum(counts)]:
        counts[i] += 1
    return counts


def select(scores: Tensor, sizes: Sequence[int], sparsity: float, scope: str) -> Tensor:
    """Boolean mask [n] for flat `scores` [n] of matrices with `sizes`, ranked per `matrix` or `global`ly."""
    keep = kept_count(sparsity, scores.numel())
    if scope == "global":
        return topk(scores, keep)
    parts, counts = scores.split(list(sizes)), apportion(keep, sizes)  # type: ignore[no-untyped-call]
    masks: list[Tensor] = [scores] * len(sizes)
    for size in dict.fromkeys(sizes):  # matrices of one size together
        rows = [i for i, other in enumerate(sizes) if other == size]
        chosen = topk_rows(torch.stack([parts[i] for i in rows]), [counts[i] for i in rows])
        for i, mask in zip(rows, chosen, strict=True):
            masks[i] = mask
    return torch.cat(masks)


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """How many heads and FFN neurons of the whole model stay, and how many weights that is."""

    heads: int
    neurons: int
    kept_weights: int


def plan_groups(
    sparsity: float, *, layers: int, heads: int, head_weights: int, neurons: int, neuron_weights: int
) -> GroupPlan:
    """The nearest reachable point to `sparsity` for heads and neurons (section 4, cap-f).

    Heads and neurons are removed in the same ratio while each layer keeps a head and a neuron; the neurons then take
    up what rounding to whole heads left. Raises `ConfigError` naming the highest reachable sparsity.

    Args:
        layers, heads, neurons: counts over the whole model.
        head_weights, neuron_weights: weights that one head or one neuron holds.
    """
    total = heads * head_weights + neurons * neuron_weights
    least = layers * (head_weights + neuron_weights)
    target = kept_count(sparsity, total)
    if target < least and least - target > neuron_weights / 2:
        highest = 1 - least / total
        raise ConfigError(
            f"structured pruning cannot reach sparsity {sparsity:g}: one head and one neuron per layer must stay, "
            f"which leaves at most {math.floor(highest * 1e4) / 1e4:g}",
            "use --structure dimensions, choose a lower --sparsity, or an unstructured method such as cap-soft",
        )
    kept_heads = min(heads, max(layers, math.floor((1 - sparsity) * heads + 0.5)))
    room = (target - kept_heads * head_weights) / neuron_weights
    kept_neurons = min(neurons, max(layers, math.floor(room + 0.5)))
    return GroupPlan(
        heads=kept_heads, neurons=kept_neurons, kept_weights=kept_heads * head_weights + kept_neurons * neuron_weights
    )


def select_groups(importance: Tensor, keep: int, alive: Tensor) -> Tensor:
    """Boolean mask [L, G] of `keep` groups over L layers (section 4): ranked globally, at least one per layer.

    `importance` [L, G] is normalised to unit L2 norm in each layer first; only groups still `alive` [L, G] are chosen.
    """
    scores = importance / importance.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    scores = scores.masked_fill(~alive, -torch.inf)
    best = torch.zeros_like(alive).scatter_(1, scores.argmax(dim=1, keepdim=True), True)
    return topk(scores.masked_fill(best, torch.inf).flatten(), keep).view_as(alive)


@dataclass(frozen=True, kw_only=True)
class UnitTable:
    """All units of a model in one order, [U]: the weights each holds, and for dimensions the head.

    head: counted over the model, -1 for neurons and whole heads. value: whether it is a value-output unit.
    """

    weights: Tensor
    head: Tensor
    value: Tensor

    def values_per_head(self, chosen: Tensor) -> Tensor:
        """How many of the value-output units that `chosen` [U] names each head has, read at each unit; 0 outside."""
        count = torch.zeros(len(chosen) + 1, dtype=torch.int64, device=chosen.device)
        count.index_add_(0, self.head + 1, (chosen & self.value).long())
        return count[self.head + 1]


def emptying(importance: Tensor, alive: Tensor, units: UnitTable, bend: float = 0.3) -> Tensor:
    """`importance` [U] with that of value-output units times tanh(share / bend), so that nearly empty heads die out.

    share: of the value-output units of its head, those still `alive` [U] (the structure regularisation of GRAIN).
    """
    share = units.values_per_head(alive) / units.values_per_head(torch.ones_like(alive)).clamp(min=1)
    return torch.where(units.value, importance * torch.tanh(share / bend), importance)


def select_units(importance: Tensor, alive: Tensor, units: UnitTable, keep: int) -> Tensor:
    """Boolean mask [U] of the units that stay: one ranking over all kinds and layers by importance per weight (GRAIN).

    Takes living units from the best down to the point nearest to `keep` weights; the lower index wins ties. A head that
    is left without value-output units computes nothing, so its query-key units go too, and the next best take their
    place. Its own units come last then, values first, so the count is always that of whole units nearest to `keep`.
    """
    scores = emptying(importance, alive, units) / units.weights
    order = scores.sort(descending=True, stable=True).indices
    chosen = _nearest_prefix(order, alive, units.weights, keep)
    empty = (units.head >= 0) & (units.values_per_head(chosen) == 0)
    later = torch.where(empty, 2 - units.value.long(), 0)[order]
    return _nearest_prefix(order[later.sort(stable=True).indices], alive, units.weights, keep)


def _nearest_prefix(order: Tensor, alive: Tensor, weights: Tensor, keep: int) -> Tensor:
    """The living units [U], taken in this order, whose weights come nearest to `keep`; of two such points the more."""
    own = torch.where(alive, weights, 0)[order]
    taken = 2 * own.cumsum(0) - own <= 2 * keep
    return torch.zeros_like(alive).scatter_(0, order, taken) & alive


class _Straight(torch.autograd.Function):
    """W' = W∘M with dL/dW = dL/dW'∘M and, straight through, dL/dS = dL/dW'∘W (section 4, movement)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, scores: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        weight, mask = ctx.saved_tensors
        return gradients[0] * mask, None, gradients[0] * weight


class Masked(nn.Module):
    """Parametrization of one weight matrix [out, in]: multiplies by a 0/1 mask and trains scores straight through."""

    mask: Tensor

    def __init__(self, mask: Tensor, scores: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self.scores = None if scores is None else nn.Parameter(scores)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with, [out, in]."""
        if self.scores is None:
            return weight * self.mask
        masked: Tensor = _Straight.apply(weight, self.mask, self.scores)  # type: ignore[no-untyped-call]
        return masked


@dataclass(frozen=True, kw_only=True)
class MaskSet:
    """The masks of a model in one flat vector, so that a selection over all matrices copies nothing.

    `mask` [n] and `scores` [n] (None unless learned) are the storage of which each layer's parametrization holds a
    view; `names`, `linears` and `sizes` list the matrices in the same order.
    """

    names: list[str]
    linears: list[nn.Linear]
    sizes: list[int]
    mask: Tensor
    scores: Tensor | None

    def original(self, index: int) -> Tensor:
        """The unmasked weight parameter [out, in] of matrix `index`."""
        weight: Tensor = self.linears[index].parametrizations.weight.original  # type: ignore[union-attr, assignment]
        return weight

    def score_views(self) -> list[Tensor]:
        """The score parameters [out, in], one per matrix."""
        return [linear.parametrizations.weight[0].scores for linear in self.linears]  # type: ignore[union-attr, index]

    def flat_magnitude(self) -> Tensor:
        """abs(W) of every matrix, [n]."""
        with torch.no_grad():
            return torch.cat([self.original(i).abs().flatten() for i in range(len(self.names))])

    def matrix_masks(self) -> list[Tensor]:
        """The mask of each matrix, [out, in], as views."""
        parts = self.mask.split(self.sizes)  # type: ignore[no-untyped-call]
        return [part.view(self.original(i).shape) for i, part in enumerate(parts)]

    def kept(self) -> int:
        """How many weights the masks keep; waits for the device."""
        return int(self.mask.count_nonzero())


def attach(linears: Mapping[str, nn.Linear], *, learned: bool) -> MaskSet:
    """Put a mask on each linear layer, all ones; with trainable scores, all zero, when `learned`."""
    sizes = [linear.weight.numel() for linear in linears.values()]
    first = next(iter(linears.values())).weight
    mask = torch.ones(sum(sizes), dtype=first.dtype, device=first.device)
    scores = torch.zeros(sum(sizes), dtype=torch.float32, device=first.device) if learned else None
    offset = 0
    for linear, size in zip(linears.values(), sizes, strict=True):
        window, shape = slice(offset, offset + size), linear.weight.shape
        view = None if scores is None else scores[window].view(shape)
        parametrize.register_parametrization(linear, "weight", Masked(mask[window].view(shape), view))
        offset += size
    return MaskSet(names=list(linears), linears=list(linears.values()), sizes=sizes, mask=mask, scores=scores)


def bake(masks: MaskSet) -> None:
    """Make the masked weights plain weights again; removed positions become +0."""
    with torch.no_grad():
        for index, mask in enumerate(masks.matrix_masks()):
            masks.original(index).masked_fill_(mask == 0, 0.0)
    for linear in masks.linears:
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
