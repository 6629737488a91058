"""Rows of a matrix by least squares, each with its own set of weights that stay: batched, in bounded memory.

Letters: T tokens, I inputs and O outputs of a linear layer, K weights of a row that stay, R rows that are solved
together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capcli import parallel

DAMPING = 0.01  # of the mean square of an input, added to every square: the ridge
ROUNDING = 1e-6  # the same, of the mean square with means: more than rounding leaves of a constant
BUDGET_BYTES, MORE_OF_DEVICE = 2**24, 64  # for the systems of rows that are solved together; times more on a device


def work_type(device: torch.device) -> torch.dtype:
    """Of sums over many tokens: 64 bits, where the device has them."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(kw_only=True)
class Moments:
    """Sums over tokens of what a linear layer reads, and of that with what it should put out.

    x and y are counted from `origins`, [I] and [O], the means of the first tokens, so that nothing is lost when means
    are subtracted; from zero where the layer has no bias. gram: of xᵀx [I, I], cross: of xᵀy [I, O];
    inputs [I], outputs [O]: of x and of y; squares: of y², over all outputs.
    """

    gram: Tensor
    cross: Tensor
    inputs: Tensor
    outputs: Tensor
    squares: Tensor
    origins: tuple[Tensor, Tensor]
    bias: bool
    n_tokens: int

    @classmethod
    def of(cls, x: Tensor, y: Tensor, *, bias: bool) -> Moments:
        """Of inputs [T, I] with outputs [T, O] of a layer that has a `bias`. Common to all ranks."""
        origins = [part.float().mean(dim=0) if bias else part.new_zeros(part.shape[1]).float() for part in (x, y)]
        origins = [parallel.same(origin) for origin in origins]
        sizes = [(x.shape[1], x.shape[1]), (x.shape[1], y.shape[1]), (x.shape[1],), (y.shape[1],), ()]
        gram, cross, inputs, outputs, squares = (
            torch.zeros(size, dtype=work_type(x.device), device=x.device) for size in sizes
        )
        found = cls(
            gram=gram,
            cross=cross,
            inputs=inputs,
            outputs=outputs,
            squares=squares,
            origins=(origins[0], origins[1]),
            bias=bias,
            n_tokens=0,
        )
        found.add(x, y)
        return found

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add inputs [T, I] with outputs [T, O]."""
        x, y = x.float() - self.origins[0], y.float() - self.origins[1]
        self.gram += x.T @ x
        self.cross += x.T @ y
        self.inputs += x.sum(dim=0, dtype=self.gram.dtype)
        self.outputs += y.sum(dim=0, dtype=self.gram.dtype)
        self.squares += y.square().sum(dtype=self.gram.dtype)
        self.n_tokens += len(x)

    def gather(self) -> None:
        """Add up the sums of all ranks. Common to all ranks."""
        sums = [self.gram, self.cross, self.inputs, self.outputs, self.squares]
        self.n_tokens = parallel.added(sums, self.n_tokens)

    def centred(self) -> tuple[Tensor, Tensor]:
        """`gram` and `cross` of what is left of x and y without their means, if there is a bias to make up for them."""
        if not self.bias:
            return self.gram, self.cross
        by_outputs, by_inputs = self.outputs / self.n_tokens, self.inputs / self.n_tokens
        return self.gram - self.inputs.outer(by_inputs), self.cross - self.inputs.outer(by_outputs)

    def means(self) -> tuple[Tensor, Tensor]:
        """Of x [I] and of y [O]."""
        return self.origins[0] + self.inputs / self.n_tokens, self.origins[1] + self.outputs / self.n_tokens

    def error(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Share of the outputs' variance (without a bias: of their square) that `weight` [O, I] does not give: with
        the `bias` [O], or with the best one where none is named."""
        gram, cross = self.centred()
        variance = self.squares - (self.outputs.square().sum() / self.n_tokens if self.bias else 0.0)
        missing = variance - 2 * (weight * cross.T).sum() + (weight @ gram * weight).sum()
        if bias is not None:
            inputs, outputs = self.means()
            missing = missing + self.n_tokens * (outputs - weight @ inputs.to(weight.dtype) - bias).square().sum()
        return missing.clamp(min=0) / variance.clamp(min=torch.finfo(self.gram.dtype).tiny)

    def damping(self) -> Tensor:
        """What is added to the diagonal of `gram` as it is `centred`, so that it can be inverted."""
        found = DAMPING * self.centred()[0].diagonal().mean() + ROUNDING * self.mean_square()
        return torch.where(found > 0, found, torch.ones_like(found))

    def second(self) -> Tensor:
        """C = XᵀX / T, [I, I], of what is read as it is, means included."""
        origin = self.origins[0].to(self.gram.dtype)
        shift = origin.outer(self.inputs)
        return (self.gram + shift + shift.T) / self.n_tokens + origin.outer(origin)

    def mean_square(self) -> Tensor:
        """Of one input, summed over tokens, means included."""
        return self.gram.diagonal().mean() + self.n_tokens * self.origins[0].to(self.gram.dtype).square().mean()


def solve(moments: Moments, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [O, I] that are zero outside of `kept` [O, I] and, of these, come nearest to the outputs; and biases [O].

    Of each row r the kept weights x_K minimise Σ over tokens of (x_K·x + b - y_r)² + δ·|x_K - w_K|²: with δ `DAMPING`
    times the mean of the diagonal of C = XᵀX, (C_KK + δ·1)·x_K = (Xᵀy)_K + δ·w_K. Solved for x_K - w_K, so that what
    fits already stays as it is. Where the layer has a bias, C and Xᵀy are those of centred inputs and outputs, and
    b = mean(y) - x_K·mean(x); else b is 0.
    """
    gram, cross = moments.centred()
    damping = moments.damping()
    now = weight.to(gram.dtype) * kept
    wanted = cross.T - now @ gram
    try:
        found = now + damped_rows(gram.float(), wanted, kept, damping)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # too nearly singular for 32 bits
        found = now + damped_rows(gram, wanted, kept, damping)
    inputs, outputs = moments.means()
    offset = outputs - found @ inputs.to(gram.dtype)
    return found, offset if moments.bias else torch.zeros_like(offset)


def damped_rows(gram: Tensor, wanted: Tensor, kept: Tensor, damping: Tensor) -> Tensor:
    """Rows x [O, I] with (gram_KK + damping·1)·x_K = wanted_K, zero outside of `kept` [O, I], in the type of `gram`.

    Rows of like K are solved together, the shorter ones filled up with rows and columns of the identity. Where all rows
    keep the same, there is one system for them all.
    """
    if bool((kept == kept[:1]).all()):
        return _same_for_all(gram, wanted.to(gram.dtype), kept[0].nonzero()[:, 0], damping)
    right, size_bytes = wanted.to(gram.dtype), gram.element_size()
    budget_bytes = BUDGET_BYTES if gram.device.type == "cpu" else BUDGET_BYTES * MORE_OF_DEVICE
    counts = kept.sum(dim=1)
    order = counts.argsort(descending=True, stable=True)
    lengths = counts[order].tolist()
    found, begin = torch.zeros_like(right), 0
    while begin < len(order) and lengths[begin]:
        longest = lengths[begin]
        rows = order[begin : begin + max(1, budget_bytes // (size_bytes * longest * longest))]
        places = kept[rows].int().argsort(dim=1, descending=True, stable=True)[:, :longest]
        real = torch.arange(longest, device=gram.device) < counts[rows, None]
        system = gram[places[:, :, None], places[:, None, :]]
        if lengths[begin + len(rows) - 1] < longest:
            system.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0.0)
        system.diagonal(dim1=1, dim2=2).add_(torch.where(real, damping.to(gram.dtype), 1.0))
        some = right[rows].gather(1, places).masked_fill_(~real, 0.0)
        solution = torch.cholesky_solve(some[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
        found[rows] = torch.zeros_like(right[rows]).scatter_(1, places, solution * real)
        begin += len(rows)
    return found


def _same_for_all(gram: Tensor, wanted: Tensor, places: Tensor, damping: Tensor) -> Tensor:
    """`damped_rows` where every row keeps the columns `places` [K]."""
    system = gram[places[:, None], places]
    system.diagonal().add_(damping.to(gram.dtype))
    found = torch.zeros_like(wanted)
    found[:, places] = torch.cholesky_solve(wanted[:, places].T, torch.linalg.cholesky(system)).T
    return found
