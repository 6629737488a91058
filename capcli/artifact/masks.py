"""Which weights of a matrix stay, as a stream of bytes with its record: bits, or Rice codes where these are shorter.

`docs/format.md` is the specification. Nothing here holds a value of a weight.

Letters: n elements of a matrix, k kept ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from capcli.artifact import codings
from capcli.artifact.codings import Array, check
from capcli.artifact.entry import Entry, is_count

KEYS = ("bits", "codes", "coding", "kept", "shape")
CODINGS = ("bitmask", "rice")  # of equally short ones, the first


def packed(kept: Array) -> tuple[dict[str, Any], Array]:
    """The record of a mask (boolean, [out, in]) and its bytes in the shorter coding."""
    positions = np.flatnonzero(kept)
    gaps = np.diff(positions, prepend=-1) - 1
    bits, codes = codings.rice_bits(gaps)
    possible = {"bitmask": (0, 0), "rice": (bits, codes)}
    records = [_record(kept.shape, coding, positions.size, *possible[coding]) for coding in CODINGS]
    best = min(records, key=n_bytes)
    if best["coding"] == "rice":
        return best, codings.pack_rice(gaps, bits, codes)
    return best, codings.pack_bitmask(positions, kept.size)


def n_bytes(record: dict[str, Any]) -> int:
    """Bytes of the stream that a record describes."""
    return _entry(record).position_bytes


def unpacked(where: str, record: object, stream: Array | None, shape: tuple[int, ...]) -> Array:
    """The mask (boolean, [out, in]) of a matrix of this `shape`. Raises `FileError` that starts with `where`."""
    check(
        isinstance(record, dict) and sorted(record) == list(KEYS), where, "record of the mask", ", ".join(KEYS), record
    )
    assert isinstance(record, dict)
    coding, kept, bits, codes = (record[key] for key in ("coding", "kept", "bits", "codes"))
    n = int(np.prod(shape, dtype=np.int64))
    check(record["shape"] == list(shape), where, "shape", list(shape), record["shape"])
    check(coding in CODINGS, where, "coding", ", ".join(CODINGS), coding)
    check(is_count(kept) and kept <= n, where, "kept", f"0 to {n:,}", kept)
    lowest, highest = (1, codings.MAX_BITS) if coding == "rice" else (0, 0)
    check(is_count(bits) and lowest <= bits <= highest, where, "bits", f"{lowest} to {highest}", bits)
    least, most = (kept, kept + (n >> bits)) if coding == "rice" else (0, 0)
    check(is_count(codes) and least <= codes <= most, where, "codes", f"{least:,} to {most:,}", codes)
    right = stream is not None and stream.dtype == np.uint8 and stream.shape == (n_bytes(record),)
    check(right, where, "stream of the mask", f"{n_bytes(record):,} bytes", None if stream is None else stream.shape)
    assert stream is not None
    if coding == "bitmask":
        return codings.unpack_bitmask(where, stream, n, kept).reshape(shape)
    mask = np.zeros(n, bool)
    mask[codings.unpack_rice(where, stream, n, kept, bits, codes)] = True
    return mask.reshape(shape)


def _record(shape: tuple[int, ...], coding: str, kept: int, bits: int, codes: int) -> dict[str, Any]:
    return {"bits": bits, "codes": codes, "coding": coding, "kept": kept, "shape": list(shape)}


def _entry(record: dict[str, Any]) -> Entry:
    """A record as the format has it for a pruned matrix, of which the mask is the positions."""
    return Entry(name="", dtype="F32", **{**record, "shape": tuple(record["shape"])})
