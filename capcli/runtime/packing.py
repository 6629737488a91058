"""Weights as the kernels read them: rows of kept weights, by blocks of columns. Zeros are never made.

Letters: O outputs of a matrix, I its inputs, k kept weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capcli.artifact.reader import Kept
from capcli.errors import ModelError

Array = NDArray[Any]
MOST_INPUTS = 1 << 16  # columns are numbers of 16 bits
LEVEL_1_BYTES = 28 << 10  # what a block may take of a first-level cache of 32 KiB
WIDEST_TILE = 64  # lanes
FEWEST_IN_BLOCK = 12  # weights of a row, below which reading and writing its sum once more costs more than it saves


class Unsupported(ModelError):
    """A model or processor that the runtime for sparse weights does not serve; the message says why in one line."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One matrix [O, I] with its bias [O]: row r of block b is entries starts[b·O + r] to starts[b·O + r + 1]."""

    outputs: int
    blocks: int
    starts: Array  # int64 [blocks·O + 1]
    columns: Array  # uint16 [k]
    values: Array  # float32 [k]
    bias: Array  # float32 [O]


@dataclass(frozen=True, kw_only=True)
class Entries:
    """The kept weights of a matrix [O, I]: places in it [k], which ascend, and values [k]."""

    shape: tuple[int, int]
    places: Array
    values: Array


def entries(matrix: Tensor | Kept) -> Entries:
    """The kept weights of a matrix, in 32 bits; a dense one may hold zeros, NaN and infinities are kept."""
    rows, inputs = matrix.shape
    if isinstance(matrix, Kept):
        values, places = matrix.values.float().numpy(), matrix.positions
        places = np.flatnonzero(places) if places.dtype == bool else places
    else:
        flat = matrix.detach().float().cpu().contiguous().numpy().reshape(-1)
        places = np.flatnonzero(flat)
        values = flat[places]
    return Entries(shape=(int(rows), int(inputs)), places=places, values=values)


def stacked(parts: Sequence[Entries]) -> Entries:
    """Matrices of the same inputs, one below the other."""
    inputs = parts[0].shape[1]
    above = np.cumsum([0, *(part.shape[0] for part in parts)])
    return Entries(
        shape=(int(above[-1]), inputs),
        places=np.concatenate([part.places + n * inputs for part, n in zip(parts, above, strict=False)]),
        values=np.concatenate([part.values for part in parts]),
    )


def pack(found: Entries, bias: Tensor | Array | None) -> Matrix:
    """A matrix for the kernels, without a bias zeros. Raises `Unsupported` for more than 65,536 inputs."""
    outputs, inputs = found.shape
    if inputs > MOST_INPUTS:
        raise Unsupported(f"a matrix has {inputs:,} inputs; the runtime for sparse weights takes {MOST_INPUTS:,}")
    rows, columns = np.divmod(found.places, max(inputs, 1))
    columns, values = columns.astype(np.uint16), found.values
    width = block_width(inputs, len(values) / max(outputs, 1))
    blocks = max(1, -(-inputs // width))
    if blocks > 1:
        block = (columns // np.uint16(width)).astype(np.uint16)
        order = np.argsort(block, kind="stable")
        rows = rows + block.astype(np.int64) * outputs
        columns, values = columns[order], values[order]
    counts = np.bincount(rows, minlength=blocks * outputs)
    return Matrix(
        outputs=outputs,
        blocks=blocks,
        starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
        columns=columns,
        values=np.ascontiguousarray(values, np.float32),
        bias=np.zeros(outputs, np.float32) if bias is None else np.asarray(torch.as_tensor(bias).detach().float()),
    )


def block_width(inputs: int, kept_in_row: float) -> int:
    """How many columns a block has: as many as fit the first-level cache, twice that, or all."""
    fitting = LEVEL_1_BYTES // (4 * WIDEST_TILE) // 64 * 64
    for width in (fitting, 2 * fitting):
        if width < inputs and kept_in_row * width / inputs >= FEWEST_IN_BLOCK:
            return width
    return max(inputs, 1)
