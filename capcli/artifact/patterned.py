"""Positions in a pattern: blocks of 4 that follow one another, and N of every M; beside `codings`.

`docs/format.md` is the specification. Both store the positions of more values than are kept where a block or a group is
not full; the values that fill it are 0.

Shape letters: n = elements of a matrix, k = kept elements, s = stored values.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np

from capcli.artifact import codings
from capcli.artifact.codings import Array, check

BLOCK = 4
WIDTHS = (2, 4, 8, 16)  # of groups
SAMPLE = 4096  # groups that are looked at first


def likely(mask: Array) -> bool:
    """Whether one of the two codings could be the smallest, whatever the type of the values, for the kept elements of a
    `mask` [n]."""
    kept = int(np.count_nonzero(mask))
    if not kept:
        return False
    whole = mask.size % BLOCK == 0
    blocks = whole and BLOCK * int(np.count_nonzero(mask.view(f"u{BLOCK}"))) < kept + _spare(kept, mask.size)
    return blocks or any(groups_of(np.flatnonzero(mask), mask.size))


def _spare(kept: int, n: int) -> float:
    """The bytes that other codings can take for positions at most: n bits, or log2(n / k) + 3 for each kept one."""
    return min(n, kept * (math.log2(n / kept) + 3)) / 8


# Blocks


def block_gaps(positions: Array) -> Array:
    """The gaps between the blocks that hold the kept `positions` [k]."""
    return np.diff(_blocks(positions), prepend=-1) - 1


def in_blocks(positions: Array, values: Array) -> Array:
    """The values [k] at these positions in their blocks [s], with zeros for the others."""
    blocks = _blocks(positions)
    stored = np.zeros((blocks.size, BLOCK), values.dtype)
    stored[np.searchsorted(blocks, positions // BLOCK), positions % BLOCK] = values
    return stored.reshape(-1)


def _blocks(positions: Array) -> Array:
    """The blocks of ascending `positions` [k], each once."""
    blocks = positions // BLOCK
    first: Array = blocks[np.diff(blocks, prepend=-1) > 0]
    return first


def unpack_blocks(where: str, packed: Array, n: int, blocks: int, low: int, unary: int) -> Array:
    """Stored positions [s], increasing."""
    found = codings.unpack_rice(where, packed, n // BLOCK, blocks, low, unary)
    positions: Array = found[:, None] * BLOCK + np.arange(BLOCK)
    return positions.reshape(-1)


# Groups


def groups_of(positions: Array, n: int) -> Iterator[tuple[int, int]]:
    """(M, N) of the groups that hold the kept `positions` [k], where the zeros that fill them could be paid for."""
    for width in WIDTHS if positions.size else ():
        if n % width:
            continue
        most = (positions.size + _spare(positions.size, n)) * width / n
        some = positions[: np.searchsorted(positions, SAMPLE * width)]
        if _fullest(some, width) <= most and (keep := _fullest(positions, width)) <= most and keep < width:
            yield width, keep


def _fullest(positions: Array, width: int) -> int:
    """The most positions that any group has."""
    return int(np.bincount(positions // width).max(initial=0))


def bits_of_group(keep: int, width: int) -> int:
    """The bits of the number of a combination."""
    return (math.comb(width, keep) - 1).bit_length()


@functools.cache
def combinations(keep: int, width: int) -> Array:
    """All choices of `keep` places among `width`, in lexicographic order, [C, keep]."""
    return np.array(list(itertools.combinations(range(width), keep)), np.int64)


@functools.cache
def _numbers(keep: int, width: int) -> Array:
    """By the places that are kept of a group, as bits, the number of the combination that has them and, while there are
    fewer than `keep`, the lowest other ones, [2^M]."""
    bits = np.arange(1 << width)
    counts = (bits[:, None] >> np.arange(width) & 1).sum(axis=1)
    for _ in range(keep):
        bits, counts = np.where(counts < keep, bits | bits + 1, bits), counts + 1
    numbers = np.zeros(1 << width, np.uint16)
    numbers[(1 << combinations(keep, width)).sum(axis=1)] = np.arange(math.comb(width, keep))
    return numbers[bits]


def _numbered(positions: Array, n: int, keep: int, width: int) -> Array:
    """The number of the combination of each group, [n / M]."""
    mask = np.zeros(n, bool)
    mask[positions] = True
    bits = np.zeros(n // width, np.int32)
    for place in range(width):
        bits |= mask[place::width].astype(np.int32) << place
    numbers: Array = _numbers(keep, width)[bits]
    return numbers


def _places(numbers: Array, keep: int, width: int) -> Array:
    """The positions of the combinations with these numbers, [s]."""
    places: Array = np.arange(numbers.size)[:, None] * width + combinations(keep, width)[numbers]
    return places.reshape(-1)


def pack_groups(positions: Array, n: int, keep: int, width: int) -> Array:
    """The numbers of the combinations as codes of `bits_of_group` bits."""
    return codings.pack(_numbered(positions, n, keep, width), bits_of_group(keep, width))


def in_groups(positions: Array, values: Array, n: int, keep: int, width: int) -> Array:
    """The values [k] at these positions as `keep` of each group [s], with zeros where it has fewer."""
    dense = np.zeros(n, values.dtype)
    dense[positions] = values
    stored: Array = dense[_places(_numbered(positions, n, keep, width), keep, width)]
    return stored


def unpack_groups(where: str, packed: Array, n: int, keep: int, width: int) -> Array:
    """Stored positions [s], increasing."""
    codes = codings.unpack(packed, bits_of_group(keep, width), n // width)
    check(not codes[n // width :].any(), where, "padding bits of the groups", "zero", "one")
    codes, last = codes[: n // width], math.comb(width, keep) - 1
    check(codes.max(initial=0) <= last, where, "number of a combination", f"0 to {last:,}", codes.max(initial=0))
    return _places(codes, keep, width)
