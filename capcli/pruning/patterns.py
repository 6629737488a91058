"""Single weights, and what of them stays together: blocks of neighbours, or N of every M in a row.

oBERT, arXiv 2203.07259, for blocks; arXiv 2104.08378 for N:M; section 6 of the design's METHODS.

Letters: n prunable weights, O outputs and I inputs of a matrix W [O, I]. Weights that follow one another in a row are
neighbours; matrices are stored by rows, so neighbours of flat weights are the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from capcli.artifact.entry import entropy_bits
from capcli.config.patterns import BLOCK, BLOCKS, n_of_m
from capcli.errors import ConfigError
from capcli.models.families import Units
from capcli.pruning import topk
from capcli.pruning.allocation import by_kind
from capcli.pruning.schedules import Shape, cubic


class Pattern(Protocol):
    """What stays together among the weights of a row."""

    @property
    def together(self) -> int:
        """Neighbours that stay or go as one."""

    @property
    def width(self) -> int:
        """Neighbours among which is chosen at least: every row has a multiple of so many."""

    def kept(self, sparsity: float, n: int) -> int:
        """How many of `n` weights stay at `sparsity`."""

    def select(self, scores: Tensor, sizes: Sequence[int], sparsity: float, scope: str, floor: float) -> Tensor:
        """Boolean mask [n] for flat `scores` [n] of matrices with `sizes`, as `topk.select` has it."""

    def best(self, scores: Tensor, count: int, scope: str) -> Tensor:
        """Boolean mask [O, I] of the `count` best `scores` [O, I] of one matrix, in all of it (`matrix`), or as many
        in each `row`."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of `together` neighbours, of which each stays or goes as a whole, by the sum of its scores. With 1, each
    weight by itself."""

    together: int = 1

    @property
    def width(self) -> int:
        """A block."""
        return self.together

    def kept(self, sparsity: float, n: int) -> int:
        """As many blocks as `topk.kept_count` says."""
        return self.together * topk.kept_count(sparsity, n // self.together)

    def select(self, scores: Tensor, sizes: Sequence[int], sparsity: float, scope: str, floor: float) -> Tensor:
        """The best blocks; of each matrix as many as the `floor` says, of blocks as of weights."""
        blocks = [size // self.together for size in sizes]
        return self._whole(topk.select(self._summed(scores), blocks, sparsity, scope, floor))

    def best(self, scores: Tensor, count: int, scope: str) -> Tensor:
        """The best blocks of the matrix, or of each row."""
        summed, count = self._summed(scores), count // self.together
        if scope == "row":
            return self._whole(topk.topk_rows(summed, topk.apportion(count, [1] * len(summed))))
        return self._whole(topk.topk(summed.flatten(), count).view_as(summed))

    def _summed(self, scores: Tensor) -> Tensor:
        return scores if self.together == 1 else _parted(scores, self.together).sum(dim=-1)

    def _whole(self, chosen: Tensor) -> Tensor:
        return chosen if self.together == 1 else chosen.repeat_interleave(self.together, dim=-1)


SINGLE = Blocks()


def _parted(scores: Tensor, width: int) -> Tensor:
    """Scores [..., m] in parts of neighbours, [..., m / width, width]."""
    return scores.reshape(*scores.shape[:-1], -1, width)


@dataclass(frozen=True)
class Groups:
    """N:M: of each group of `width` neighbours the `keep` best stay, wherever they are; the sparsity is 1 - N/M."""

    keep: int
    width: int
    together: int = 1

    def kept(self, sparsity: float, n: int) -> int:
        """N of every M."""
        return n // self.width * self.keep

    def select(self, scores: Tensor, sizes: Sequence[int], sparsity: float, scope: str, floor: float) -> Tensor:
        """N of every M, so that neither `scope` nor `floor` means anything."""
        return self._chosen(scores)

    def best(self, scores: Tensor, count: int, scope: str) -> Tensor:
        """N of every M, which are `count`."""
        return self._chosen(scores)

    def _chosen(self, scores: Tensor) -> Tensor:
        """By how many of its group each one is beaten; the lower index wins ties."""
        groups = _parted(scores, self.width)
        beaten = torch.zeros_like(groups, dtype=torch.int8)
        for j in range(self.width):
            rival = groups[..., j, None]
            beaten[..., :j] += rival > groups[..., :j]
            beaten[..., j + 1 :] += rival >= groups[..., j + 1 :]
        return (beaten < self.keep).flatten(-2)


@dataclass(frozen=True, kw_only=True)
class Unstructured:
    """Single weights, in a pattern: exact counts, and what was removed may come back.

    sizes: weights of each matrix. scope: ranked within each `matrix`, or all together (`global`), or shared by those of
    a `type`, see `allocation.by_kind`: `kinds` and `evenness`. floor: the share of its weights that each matrix
    keeps at least, however they rank together.
    """

    sizes: Sequence[int]
    scope: str
    floor: float = 0.0
    pattern: Pattern = SINGLE
    kinds: Sequence[str] = ()
    evenness: float = 1.0
    units: Sequence[Units] = ()
    few_rises: bool = False
    shape: Shape = cubic
    readers: Collection[nn.Linear] = ()
    unread: Collection[nn.Linear] = ()

    def count(self) -> int:
        """n."""
        return sum(self.sizes)

    def select(self, scores: Tensor, sparsity: float, alive: Tensor) -> Tensor:
        """See `Pattern.select` and `allocation.by_kind`."""
        if self.scope == "type":
            return by_kind(scores, self.sizes, self.kinds, self.weights(sparsity), self.evenness)
        return self.pattern.select(scores, self.sizes, sparsity, self.scope, self.floor)

    def expand(self, chosen: Tensor) -> Tensor:
        """A weight is its own unit."""
        return chosen

    def weights(self, sparsity: float) -> int:
        """round((1 - s)·n), or the same of blocks or groups."""
        return self.pattern.kept(sparsity, self.count())


def unstructured(linears: Mapping[str, nn.Linear], structure: str, scope: str, floor: float) -> Unstructured:
    """The single weights of these matrices, in the pattern that `--structure` names; what stays of a pattern is ranked
    within each matrix where kinds of matrices would share it. Raises `ConfigError` for rows that cannot be divided, and
    for matrices that are not stored by rows."""
    pattern = pattern_of(structure)
    scope = "matrix" if pattern.width > 1 and scope == "type" else scope
    for name, linear in linears.items() if pattern.width > 1 else ():
        if not isinstance(linear, nn.Linear):
            raise ConfigError(
                f"--structure {structure} is about the rows of a matrix, and {name} is stored by columns",
                "leave --structure out for this model",
            )
        if linear.in_features % pattern.width:
            raise ConfigError(
                f"--structure {structure} divides rows into parts of {pattern.width} weights, and those of {name} "
                f"have {linear.in_features:,}",
                "leave --structure out for this model",
            )
    return Unstructured(
        sizes=[linear.weight.numel() for linear in linears.values()], scope=scope, floor=floor, pattern=pattern
    )


def pattern_of(structure: str) -> Pattern:
    """The pattern that `--structure` names; each weight by itself where it names none."""
    groups = n_of_m(structure)
    return Groups(*groups) if groups else Blocks(BLOCK if structure == BLOCKS else 1)


def position_bits(pattern: Pattern, n: int, kept: int) -> float:
    """The fewest bits that tell which of `n` weights are `kept`, in this pattern."""
    if isinstance(pattern, Groups):
        return n // pattern.width * math.log2(math.comb(pattern.width, pattern.keep))
    return entropy_bits(n // pattern.together, kept // pattern.together)


def shares(pattern: Pattern, keep: int, sizes: Sequence[int]) -> list[int]:
    """Split `keep` over parts in proportion to their `sizes`, in whole blocks."""
    unit = pattern.together
    return [unit * count for count in topk.apportion(keep // unit, [size // unit for size in sizes])]
