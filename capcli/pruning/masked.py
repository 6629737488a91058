"""Masks on linear layers: what a layer computes with, and what of its gradient reaches weights and scores.

Letters: n prunable weights, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class _Straight(torch.autograd.Function):
    """W' = W∘M with, straight through, dL/dS = dL/dW'∘W (section 4, movement).

    dL/dW = dL/dW'∘M, or all of dL/dW' when `dense`: then removed weights are still trained, and may come back. A gate
    [I] multiplies an input of the layer: dL/dgate = sum of dL/dW'∘W over its column, whatever the mask is there.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, mask: Tensor, scores: Tensor | None, gates: Tensor | None, dense: bool
    ) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.dense = dense
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight, mask = ctx.saved_tensors
        gradient = gradients[0]
        to_weight, _, to_scores, to_gates, _ = ctx.needs_input_grad
        return (
            (gradient if ctx.dense else gradient * mask) if to_weight else None,
            None,
            gradient * weight if to_scores else None,
            (weight * gradient).sum(dim=0) if to_gates else None,
            None,
        )


class Masked(nn.Module):
    """Parametrization of one weight matrix [O, I]: multiplies by a 0/1 mask; may train scores straight through.

    gates: ones [I] that belong to no optimiser and are in no checkpoint; backward leaves dL/dgate in their `grad`.
    unread: the mask is not multiplied with, because nothing reads what the masked rows put out.
    """

    mask: Tensor

    def __init__(
        self, mask: Tensor, scores: Tensor | None, dense: bool, gates: Tensor | None = None, unread: bool = False
    ) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)
        self.scores = None if scores is None else nn.Parameter(scores)
        self.dense = dense
        self.gates = gates
        self.unread = unread

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the layer computes with, [out, in]."""
        if self.unread:
            return weight
        if self.scores is None and self.gates is None and not self.dense:
            return weight * self.mask
        masked: Tensor = _Straight.apply(weight, self.mask, self.scores, self.gates, self.dense)  # type: ignore[no-untyped-call]
        return masked


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """The prunable matrices of a model under one flat mask, so that a selection over all of them copies nothing.

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

    def seen(self, index: int) -> tuple[Tensor, Tensor]:
        """The unmasked weight and the mask (boolean) of matrix `index` as y = W·x has them, [out, in]."""
        weight, kept = self.original(index).detach(), self.matrix_masks()[index].bool()
        return (weight.T, kept.T) if self._turned(index) else (weight, kept)

    @torch.no_grad()
    def put(self, index: int, weight: Tensor, bias: Tensor | None = None, kept: Tensor | None = None) -> None:
        """Change matrix `index` to a weight [out, in]; and its bias [out], if it has one, and its mask [out, in]."""
        turned, linear = self._turned(index), self.linears[index]
        self.original(index).copy_(weight.T if turned else weight)
        if bias is not None and linear.bias is not None:
            linear.bias.copy_(bias)
        if kept is not None:
            self.matrix_masks()[index].copy_(kept.T if turned else kept)

    def _turned(self, index: int) -> bool:
        """Whether the layer holds its weight as [in, out], as that of GPT-2 does."""
        return not isinstance(self.linears[index], nn.Linear)

    def score_views(self) -> list[Tensor]:
        """The score parameters [out, in], one per matrix."""
        return [linear.parametrizations.weight[0].scores for linear in self.linears]  # type: ignore[union-attr, index]

    def forget_gates(self) -> None:
        """Forget what backward passes so far have left at the gates."""
        for linear in self.linears:
            if (gates := gates_of(linear)) is not None:
                gates.grad = None

    def flat_gradient(self) -> Tensor:
        """What the last backward left at the unmasked weights, [n]; see `attach` for what that is."""
        gradients = [self.original(i).grad for i in range(len(self.names))]
        assert all(gradient is not None for gradient in gradients), "observe comes after backward"
        return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])

    def flat_weights(self) -> Tensor:
        """W of every matrix, [n]."""
        with torch.no_grad():
            return torch.cat([self.original(i).flatten() for i in range(len(self.names))])

    def flat_magnitude(self) -> Tensor:
        """abs(W) of every matrix, [n]."""
        return self.flat_weights().abs_()

    def matrix_masks(self) -> list[Tensor]:
        """The mask of each matrix, [out, in], as views."""
        parts = self.mask.split(self.sizes)  # type: ignore[no-untyped-call]
        return [part.view(self.original(i).shape) for i, part in enumerate(parts)]

    def kept(self) -> int:
        """How many weights the masks keep; waits for the device."""
        return int(self.mask.count_nonzero())


def gates_of(linear: nn.Linear) -> Tensor | None:
    """The gates [I] of a masked layer, if it has any."""
    gates: Tensor | None = linear.parametrizations.weight[0].gates  # type: ignore[union-attr, index]
    return gates


def attach(
    linears: Mapping[str, nn.Linear],
    *,
    learned: bool,
    dense: bool = False,
    gated: Collection[nn.Linear] = (),
    unread: Collection[nn.Linear] = (),
) -> Matrices:
    """Put a mask on each linear layer, all ones; with trainable scores, all zero, when `learned`.

    The gradient of a weight is dL/dW'∘M; with `dense` it is dL/dW', also where the mask is zero. gated: layers with a
    gate on each input, see `Masked`. unread: layers whose mask counts what is removed, but need not be multiplied with.
    """
    sizes = [linear.weight.numel() for linear in linears.values()]
    first = next(iter(linears.values())).weight
    mask = torch.ones(sum(sizes), dtype=first.dtype, device=first.device)
    scores = torch.zeros(sum(sizes), dtype=torch.float32, device=first.device) if learned else None
    offset = 0
    for linear, size in zip(linears.values(), sizes, strict=True):
        window, shape = slice(offset, offset + size), linear.weight.shape
        view = None if scores is None else scores[window].view(shape)
        gates = torch.ones(shape[1], device=first.device, requires_grad=True) if linear in gated else None
        one = Masked(mask[window].view(shape), view, dense, gates, linear in unread)
        parametrize.register_parametrization(linear, "weight", one)
        offset += size
    return Matrices(names=list(linears), linears=list(linears.values()), sizes=sizes, mask=mask, scores=scores)


def freeze(net: nn.Module, trained: Collection[str]) -> None:
    """Let nothing be trained but the scores and the parameters named in `trained`."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.endswith(".scores") or name in trained)


@contextlib.contextmanager
def unmasked(linears: Sequence[nn.Linear]) -> Iterator[None]:
    """Inside, masked layers are plain ones of one class, and hold the weights that they compute with; gradients reach
    the weights below the masks all the same.

    Each matrix is masked once. The class that a parametrization gives a layer is its own, so that no compiled code
    could serve two layers.
    """
    before = [(linear, type(linear), linear.weight) for linear in linears]
    for linear, kind, weight in before:
        linear.__class__ = kind.__base__  # type: ignore[assignment]
        linear.__dict__["weight"] = weight
    try:
        yield
    finally:
        for linear, kind, _ in before:
            del linear.__dict__["weight"]
            linear.__class__ = kind


def bake(matrices: Matrices) -> None:
    """Make the masked weights plain weights again; removed positions become +0."""
    with torch.no_grad():
        for index, mask in enumerate(matrices.matrix_masks()):
            matrices.original(index).masked_fill_(mask == 0, 0.0)
    for linear in matrices.linears:
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
