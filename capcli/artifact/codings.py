"""The array codings of the file format: positions as bitmask, gaps or Rice codes, int8 values, low-rank factors.

Positions in a pattern are in `patterned`.

`docs/format.md` is the specification. Everything here takes and returns numpy arrays; what comes from a file is checked
and refused with a `FileError` that starts with `where`.

Shape letters: n = elements of a matrix, k = kept elements, c = gap codes, b = bits per gap code, m = int8 codes,
g = groups of int8 codes, r = rank.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.stored import expect

MIN_BITS, MAX_BITS = 2, 16
GROUP = 256  # int8 codes that share a scale
MAX_CODE = 127
MIN_SCALE = 2.0**-126  # the smallest normal number of 32 bits
SCALE_BITS = np.uint32(0xFFFFFF80)  # 17 significant bits; a code has 7, so that code x scale is exact in 32 bits
HINT = "the file is damaged or was not written by this version of cap; write it again or get a fresh copy"

Array = NDArray[Any]


check = functools.partial(expect, hint=HINT)


# Positions


def pack_bitmask(positions: Array, n: int) -> Array:
    """Kept positions [k] of n elements as bytes [ceil(n/8)], lowest bit first."""
    mask = np.zeros(n, bool)
    mask[positions] = True
    return np.packbits(mask, bitorder="little")


def unpack_bitmask(where: str, packed: Array, n: int, kept: int) -> Array:
    """Kept positions as booleans [n]."""
    mask: Array = np.unpackbits(packed, bitorder="little").view(bool)
    check(not mask[n:].any(), where, "padding bits of the bitmask", "zero", "one")
    found = np.count_nonzero(mask)
    check(found == kept, where, "bits set in the bitmask", kept, found)
    return mask[:n]


def narrowest(gaps: Array) -> tuple[int, int]:
    """Bits per code, and number of codes, that store `gaps` [k] in the fewest bytes; the narrower of equals."""
    if gaps.size == 0:
        return MIN_BITS, 0
    top = (1 << MAX_BITS) - 1
    far = gaps[gaps >= top]
    counts = np.bincount(np.minimum(gaps, top))[:top]
    values = np.arange(counts.size)

    def codes(width: int) -> int:
        escape = (1 << width) - 1
        return int(gaps.size + counts @ (values // escape) + (far // escape).sum())

    width = min(range(MIN_BITS, MAX_BITS + 1), key=lambda width: width * codes(width))
    return width, codes(width)


def pack_gaps(gaps: Array, width: int, codes: int) -> Array:
    """Gaps [k] as a stream of `codes` codes: as many escapes (all ones) as fit into the gap, then what remains."""
    escape = (1 << width) - 1
    if codes == gaps.size:
        return pack(gaps.astype(np.uint16), width)
    escapes = gaps // escape
    stream = np.full(codes, escape, np.uint16)
    stream[np.arange(gaps.size) + np.cumsum(escapes)] = gaps - escapes * escape
    return pack(stream, width)


def unpack_gaps(where: str, packed: Array, n: int, kept: int, width: int, codes: int) -> Array:
    """Kept positions [k], increasing."""
    stream = unpack(packed, width, codes)
    check(not stream[codes:].any(), where, "padding bits of the gaps", "zero", "one")
    stream = stream[:codes]
    ends_gap = stream != (1 << width) - 1
    found = np.count_nonzero(ends_gap)
    check(found == kept, where, "gaps", kept, found)
    check(stream.size == 0 or bool(ends_gap[-1]), where, "last code", "the end of a gap", "an escape")
    positions: Array = np.cumsum(stream + ends_gap, dtype=np.int64)
    positions = (positions if kept == stream.size else positions[ends_gap]) - 1
    check(kept == 0 or positions[-1] < n, where, "last position", f"below {n:,}", positions[-1:].max(initial=0))
    return positions


def rice_bits(gaps: Array, fewest: int = 1) -> tuple[int, int]:
    """Low bits per gap, from `fewest` on, and bits of the unary stream, that store `gaps` [k] in the fewest bits; the
    fewer of equals."""

    def unary(low: int) -> int:
        return int(gaps.size + (gaps >> low).sum())

    low = min(range(fewest, MAX_BITS + 1), key=lambda low: unary(low) + low * gaps.size)
    return low, unary(low)


def pack_rice(gaps: Array, low: int, unary: int) -> Array:
    """Gaps [k] as a stream of `unary` bits, gap >> low zeros and a one for each, and then the low bits of each."""
    ends = np.arange(gaps.size) + np.cumsum(gaps >> low)
    return np.concatenate([pack_bitmask(ends, unary), pack((gaps & (1 << low) - 1).astype(np.uint16), low)])


def unpack_rice(where: str, packed: Array, n: int, kept: int, low: int, unary: int) -> Array:
    """Kept positions [k], increasing."""
    high, rest = np.split(packed, [-(-unary // 8)])
    ends = np.flatnonzero(unpack_bitmask(where, high, unary, kept))
    check(unary == 0 or (kept and ends[-1] == unary - 1), where, "last bit of the unary stream", 1, 0)
    remainders = unpack(rest, low, kept)
    check(not remainders[kept:].any(), where, "padding bits of the low bits", "zero", "one")
    order = np.arange(kept)
    positions: Array = (ends - order << low) + np.cumsum(remainders[:kept], dtype=np.int64) + order
    check(kept == 0 or positions[-1] < n, where, "last position", f"below {n:,}", positions[-1:].max(initial=0))
    return positions


def pack(codes: Array, width: int) -> Array:
    """Codes [c] of 1 to 16 bits as bytes [ceil(c·b/8)], lowest bit first; 8 codes fill exactly b bytes."""
    groups = np.zeros((-(-codes.size // 8), 8), np.uint16)
    groups.reshape(-1)[: codes.size] = codes
    low, high = (np.zeros(len(groups), np.uint64) for _ in range(2))
    for i in range(4):
        low |= groups[:, i].astype(np.uint64) << np.uint64(i * width)
        high |= groups[:, i + 4].astype(np.uint64) << np.uint64(i * width)
    words = np.empty((len(groups), 2), "<u8")
    words[:, 0] = low | high << np.uint64(4 * width)  # for 16 bits, a shift by 64, which numpy defines as 0
    words[:, 1] = high >> np.uint64(64 - 4 * width)
    return np.ascontiguousarray(words.view(np.uint8)[:, :width]).reshape(-1)[: -(-codes.size * width // 8)]


def unpack(packed: Array, width: int, count: int) -> Array:
    """The inverse of `pack`: at least `count` codes, in whole groups of 8; those beyond are the padding bits."""
    groups = -(-count // 8)
    padded = np.zeros((groups + 1) * width + 4, np.uint8)  # every word lies inside, also for no group at all
    padded[: packed.size] = packed
    codes = np.empty((groups, 8), np.uint16)
    for i in range(8):
        byte, shift = divmod(i * width, 8)
        words: Array = np.ndarray((groups,), "<u4", padded.data, byte, (width,))  # one 4-byte word per group
        codes[:, i] = words >> shift & (1 << width) - 1
    return codes.reshape(-1)


# Values


def n_groups(m: int) -> int:
    """Scales for m int8 codes."""
    return -(-m // GROUP)


def quantise(values: Array) -> tuple[Array, Array]:
    """Finite 32-bit values [m] as codes [m] in -127 to 127 and scales [g]; code x scale is the value that is read.

    The largest value of a group gets the code 127 or -127, so quantising what was read gives the same codes and scales.
    """
    groups = np.zeros((n_groups(values.size), GROUP), np.float32)
    groups.reshape(-1)[: values.size] = values
    peaks = np.maximum(groups.max(axis=1), -groups.min(axis=1))
    scales: Array = ((peaks / np.float32(MAX_CODE)).view(np.uint32) & SCALE_BITS).view(np.float32)
    scales = np.maximum(scales, np.float32(MIN_SCALE))
    groups /= scales[:, None]
    return np.rint(groups, out=groups).astype(np.int8).reshape(-1)[: values.size], scales


def quantise_kept(values: Array) -> tuple[Array, Array, Array]:
    """Which of the values [k] stay kept, as booleans [k], and the codes and scales of those; no code is 0.

    What rounds to 0 is dropped, once. Dropping shifts the groups; a value whose code would then be 0 gets 1 or -1.
    """
    keep = quantise(values)[0] != 0
    values = values[keep]
    codes, scales = quantise(values)
    return keep, np.where(codes == 0, np.copysign(1, values), codes).astype(np.int8), scales


def dequantise(codes: Array, scales: Array) -> Array:
    """The 32-bit values [m] of int8 codes [m] and scales [g]."""
    values = codes.astype(np.float32)
    whole = codes.size // GROUP
    values[: whole * GROUP].reshape(whole, GROUP)[:] *= scales[:whole, None]
    values[whole * GROUP :] *= scales[whole:]
    return values


def check_quantised(where: str, codes: Array, scales: Array, largest: float) -> None:
    """Refuse int8 codes and scales that `quantise` does not make for values of at most `largest`."""
    check(codes.min(initial=0) > -128, where, "int8 codes", "-127 to 127", -128)
    lowest, highest = scales.min(initial=np.inf), scales.max(initial=0)  # NaN if any is
    ok = scales.size == 0 or (lowest >= MIN_SCALE and MAX_CODE * float(highest) <= largest)
    check(ok, where, "scales", f"{MIN_SCALE:.4g} to {largest / MAX_CODE:.4g}", f"{lowest:.4g} to {highest:.4g}")


# Matrices


def low_rank(matrix: Array, rank: int) -> tuple[Array, Array]:
    """The factors [rows, r] and [r, cols] whose product is closest to `matrix` in squared error, in 32 bits.

    The truncated singular value decomposition U·S·Vᵀ, by the eigenvectors of the smaller Gram matrix in 64 bits. The
    singular values go to the rows of the right factor, so that both a column of the left one and a row of the right one
    hold values of one scale; a common factor then makes the largest row and the largest column equally long. The
    largest entry of every row of the right factor is positive.
    """
    wide = matrix.astype(np.float64)
    tall = wide.shape[0] >= wide.shape[1]
    gram = wide.T @ wide if tall else wide @ wide.T
    vectors = np.linalg.eigh(gram)[1][:, ::-1][:, :rank]
    right = vectors.T if tall else vectors.T @ wide
    left = wide @ right.T if tall else vectors
    return _balanced(left, right)


def _balanced(left: Array, right: Array) -> tuple[Array, Array]:
    lengths = np.linalg.norm(left, axis=0), np.linalg.norm(right, axis=1)
    one = np.where(lengths[0] > 0, lengths[0], 1)
    scale = math.sqrt((lengths[0] * lengths[1]).max(initial=0)) or 1.0
    signs = np.where(right[np.arange(len(right)), np.abs(right).argmax(axis=1)] < 0, -1.0, 1.0)
    return (left / one * signs * scale).astype(np.float32), (right * (one * signs)[:, None] / scale).astype(np.float32)
