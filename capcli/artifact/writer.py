"""Writing a weight file: every tensor in the smallest coding, the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capcli import files
from capcli.artifact import codings, patterned
from capcli.artifact.codings import Array, check
from capcli.artifact.entry import (
    CODINGS,
    DTYPES,
    FLOAT_DTYPES,
    MAX_BRACKETS,
    MAX_ELEMENTS,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    OF_VERSION,
    PATTERNS,
    PREFIX,
    PRUNABLE_DTYPES,
    STORED_ORDER,
    VERSIONS,
    Entry,
    Factors,
    Tensors,
    bits_of,
    canonical_json,
    check_dtype,
    check_expansion,
    check_name,
    check_shape,
    claimed_bytes,
    digest_of,
    dtype_names,
    expansion_limit,
    floats_of,
    header_bytes,
    size_in_bytes,
    tensor_of,
)
from capcli.errors import ConfigError
from capcli.stored import show

if TYPE_CHECKING:
    import torch


def factorised(matrix: torch.Tensor, rank: int) -> Factors:
    """The best factors of a matrix [rows, cols] with this rank, in float32: its truncated singular value decomposition.

    Raises `ConfigError` for a rank below 1, one that saves nothing, and for a matrix with values that are not finite.
    """
    import torch

    rows, columns = matrix.shape
    highest = (rows * columns - 1) // (rows + columns)
    if not 1 <= rank <= highest:
        raise ConfigError(
            f"rank {rank} does not make a matrix of {rows:,} x {columns:,} smaller", f"use a rank from 1 to {highest:,}"
        )
    if not bool(matrix.isfinite().all()):
        raise ConfigError("a matrix with values that are not finite has no factors")
    left, right = codings.low_rank(matrix.detach().cpu().float().numpy(), rank)
    return Factors(torch.from_numpy(left), torch.from_numpy(right))


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a file takes. `bound_bytes` counts pruned matrices at their information bound, other tensors as they are."""

    weights_bytes: int
    bound_bytes: int
    pruned_bytes: int
    pruned_bound_bytes: int
    dense_bytes: int  # of the same tensors without any sparse coding
    file_bytes: int


def save(path: Path, tensors: Tensors, pruned: Collection[str], *, quantised: Collection[str] = ()) -> Sizes:
    """Write every tensor of a model, those named in `pruned` in sparse coding. Same input, same bytes.

    Zero means "all bits zero". -0.0 is a kept value, so prune with `masked_fill`: `weight * mask` makes -0.0 of every
    removed negative weight, and nothing gets smaller. Tensors named in `quantised` are stored as int8 values: what of a
    pruned matrix rounds to 0 is removed as well. Factors are stored as they are, or quantised.

    Raises `FileError` for tensors that the format cannot hold, such as values to be quantised that are not finite,
    before anything is written, and `RunFailed` when the disk refuses.
    """
    entries, parts, text = _coded(f"cannot write {path}", tensors, pruned, quantised)
    files.write_tensors(path, parts, {"cap": text})
    return _sizes(entries, path.stat().st_size)


def sizes(tensors: Tensors, pruned: Collection[str], *, quantised: Collection[str] = ()) -> Sizes:
    """What `save` would return for the same tensors, without writing a file. Raises `FileError` like it."""
    entries, _, text = _coded("cannot store the tensors", tensors, pruned, quantised)
    return _sizes(entries, _file_bytes(entries, text))


def _coded(
    where: str, tensors: Tensors, pruned: Collection[str], quantised: Collection[str]
) -> tuple[list[Entry], dict[str, torch.Tensor], str]:
    """Entries by sorted name, the tensors stored for them, and the metadata."""
    unknown = sorted({*pruned, *quantised} - set(tensors))
    assert not unknown, f"pruned or quantised but not among the tensors: {unknown[:3]}"
    for name, tensor in tensors.items():
        _check_storable(f"{where}: tensor {show(name)}", name, tensor, name in pruned, name in quantised)

    def encoded(name: str, choices: tuple[str, ...]) -> tuple[Entry, dict[str, torch.Tensor]]:
        return _encode(f"{where}: tensor {show(name)}", name, tensors[name], name in pruned, name in quantised, choices)

    plain = 2 if quantised or any(isinstance(tensor, Factors) for tensor in tensors.values()) else 1
    tried = any(name in quantised or _may_be_patterned(tensors[name]) for name in pruned)
    version = 3 if tried else plain
    coded = {name: encoded(name, OF_VERSION[version]) for name in sorted(tensors)}
    if version != plain and not any(entry.coding in PATTERNS for entry, _ in coded.values()):
        version = plain
        newer = [name for name in sorted(pruned) if plain == 1 and coded[name][0].coding not in OF_VERSION[plain]]
        coded |= {name: encoded(name, OF_VERSION[plain]) for name in newer}
    entries = [entry for entry, _ in coded.values()]
    if claimed_bytes(entries) > expansion_limit(sum(entry.bytes for entry in entries)):
        # Bitmasks are at least 1/64 of the dense bytes: such a matrix is always within the reader's limit.
        version = plain
        coded |= {name: encoded(name, CODINGS[:2]) for name in sorted(pruned)}
        entries = [entry for entry, _ in coded.values()]
    text = _metadata_text(entries, version)
    _check_header_fits(where, entries, text)
    check_expansion(where, entries, _file_bytes(entries, text))
    return entries, {name: part for _, parts in coded.values() for name, part in parts.items()}, text


def _check_storable(where: str, name: str, tensor: torch.Tensor | Factors, pruned: bool, quantised: bool) -> None:
    check_name(where, name, VERSIONS[-1])
    check_shape(where, list(tensor.shape))
    if isinstance(tensor, Factors):
        assert not pruned, f"{name} has factors and is pruned"
        _check_factors(where, tensor)
        return
    dtype = dtype_names().get(tensor.dtype, str(tensor.dtype))
    check_dtype(where, dtype, tuple(FLOAT_DTYPES) if quantised else PRUNABLE_DTYPES if pruned else tuple(DTYPES))


def _check_factors(where: str, factors: Factors) -> None:
    left, right = factors.left, factors.right
    ok = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
    check(ok, where, "factors", "[rows, rank] and [rank, cols]", (*left.shape, *right.shape))
    check(1 <= left.shape[1] <= min(factors.shape), where, "rank", f"1 to {min(factors.shape):,}", left.shape[1])
    for part in (left, right):
        check_dtype(where, dtype_names().get(part.dtype, str(part.dtype)), tuple(FLOAT_DTYPES))


def _encode(
    where: str, name: str, tensor: torch.Tensor | Factors, pruned: bool, quantised: bool, choices: tuple[str, ...]
) -> tuple[Entry, dict[str, torch.Tensor]]:
    """The entry of one tensor and the tensors stored for it; positions in the smallest of `choices`."""
    if isinstance(tensor, Factors):
        entry, stored = _encode_factors(where, name, tensor, quantised)
    else:
        tensor = tensor.detach().cpu().contiguous()
        dtype = dtype_names()[tensor.dtype]
        entry = Entry(name=name, shape=tuple(tensor.shape), dtype=dtype, coding="dense", kept=None)
        if pruned:
            entry, stored = _encode_pruned(where, entry, tensor, quantised, choices)
        elif quantised:
            entry, stored = replace(entry, values="I8"), codings.quantise(floats_of(where, tensor))
        else:
            stored = (bits_of(tensor),)
    specs = zip(entry.parts.items(), stored, strict=True)
    parts = {part: tensor_of(array, dtype, tuple(shape)) for (part, (dtype, shape)), array in specs}
    return replace(entry, sha256=digest_of(*stored)), parts


def _may_be_patterned(tensor: torch.Tensor | Factors) -> bool:
    """Whether a coding for patterns could be the smallest of a pruned matrix, in any type."""
    assert not isinstance(tensor, Factors)
    return patterned.likely(bits_of(tensor.detach().cpu().contiguous()) != 0)


def _encode_factors(where: str, name: str, factors: Factors, quantised: bool) -> tuple[Entry, tuple[Array, ...]]:
    """The entry of a factored matrix, and its factors and, if quantised, scales."""
    both = [part.detach().cpu().contiguous() for part in (factors.left, factors.right)]
    left, right = ("I8" if quantised else dtype_names()[part.dtype] for part in both)
    entry = Entry(name=name, shape=factors.shape, dtype="F32", coding="factors", kept=None, rank=both[0].shape[1],
                  left=left, right=right)  # fmt: skip
    if not quantised:
        return entry, tuple(map(bits_of, both))
    codes, scales = zip(*(codings.quantise(floats_of(where, part)) for part in both), strict=True)
    return entry, (*codes, np.concatenate(scales))


def _encode_pruned(
    where: str, entry: Entry, tensor: torch.Tensor, quantised: bool, choices: tuple[str, ...]
) -> tuple[Entry, tuple[Array, ...]]:
    """The entry of a pruned matrix, and its values, positions and, if quantised, scales."""
    bits = bits_of(tensor)
    positions = np.flatnonzero(bits != 0)
    if not quantised:
        entry, packed = _encode_positions(entry, positions, choices)
        return entry, (bits,) if entry.coding == "dense" else (_stored(entry, positions, bits[positions]), packed)
    import torch

    kept = tensor.reshape(-1)[torch.from_numpy(positions)]
    survivors, codes, scales = codings.quantise_kept(floats_of(where, kept))
    choices = tuple(choice for choice in choices if choice != "dense")
    positions = positions[survivors]
    entry, packed = _encode_positions(replace(entry, values="I8"), positions, choices)
    return entry, (_stored(entry, positions, codes), packed, scales)


def _stored(entry: Entry, positions: Array, values: Array) -> Array:
    """The values that are stored for those kept [k]: in a pattern also its zeros."""
    if entry.coding == "blocks":
        return patterned.in_blocks(positions, values)
    if entry.coding == "groups":
        return patterned.in_groups(positions, values, entry.elements, entry.keep, entry.width)
    return values


def _encode_positions(entry: Entry, positions: Array, choices: tuple[str, ...]) -> tuple[Entry, Array]:
    """The entry with the smallest of `choices` for the kept `positions` [k], and the bytes of that coding."""
    gaps = np.diff(positions, prepend=-1) - 1
    bits, codes = codings.narrowest(gaps)
    entry = replace(entry, kept=positions.size)
    possible = {"dense": entry, "bitmask": replace(entry, coding="bitmask")}
    possible["gap"] = replace(entry, coding="gap", bits=bits, codes=codes)
    if "rice" in choices:
        low, unary = codings.rice_bits(gaps)
        possible["rice"] = replace(entry, coding="rice", bits=low, codes=unary)
    if PATTERNS[0] in choices:
        possible |= _in_patterns(entry, positions)
    best = min((possible[coding] for coding in choices if coding in possible), key=lambda choice: choice.bytes)
    if best.coding == "gap":
        return best, codings.pack_gaps(gaps, bits, codes)
    if best.coding == "rice":
        return best, codings.pack_rice(gaps, best.bits, best.codes)
    if best.coding == "blocks":
        return best, codings.pack_rice(patterned.block_gaps(positions), best.bits, best.codes)
    if best.coding == "groups":
        return best, patterned.pack_groups(positions, entry.elements, best.keep, best.width)
    return best, codings.pack_bitmask(positions, entry.elements)


def _in_patterns(entry: Entry, positions: Array) -> dict[str, Entry]:
    """The entry in the codings for patterns that can hold the kept `positions` [k]."""
    found = {}
    if positions.size and not entry.elements % patterned.BLOCK:
        gaps = patterned.block_gaps(positions)
        low, unary = codings.rice_bits(gaps, fewest=0)
        found["blocks"] = replace(entry, coding="blocks", blocks=gaps.size, bits=low, codes=unary)
    groups = [
        replace(entry, coding="groups", keep=keep, width=width)
        for width, keep in patterned.groups_of(positions, entry.elements)
    ]
    return found | ({"groups": min(groups, key=lambda choice: choice.bytes)} if groups else {})


def _metadata_text(entries: list[Entry], version: int) -> str:
    body = canonical_json({"extra": {}, "tensors": {e.name: _record(e) for e in entries}, "version": version})
    rest = f'",{body[1:]}'
    return PREFIX + hashlib.sha256(rest.encode()).hexdigest() + rest


def _record(entry: Entry) -> dict[str, Any]:
    """What the metadata say about one tensor."""
    record: dict[str, Any] = {"coding": entry.coding, "dtype": entry.dtype, "shape": list(entry.shape)}
    record["sha256"] = entry.sha256
    if entry.kept is not None:
        record["kept"] = entry.kept
    if entry.coding in ("gap", "rice"):
        record |= {"bits": entry.bits, "codes": entry.codes}
    if entry.coding == "blocks":
        record |= {"bits": entry.bits, "codes": entry.codes, "blocks": entry.blocks}
    if entry.coding == "groups":
        record |= {"keep": entry.keep, "width": entry.width}
    if entry.coding == "factors":
        record |= {"rank": entry.rank, "left": entry.left, "right": entry.right}
    return record | ({"values": entry.values} if entry.values else {})


def _check_header_fits(where: str, entries: list[Entry], text: str) -> None:
    """Refuse to write what the reader would refuse to read. The offsets here are the longest possible ones."""
    parts = {
        part: [*spec, [MAX_ELEMENTS] * 2, "dtype shape data_offsets"] for e in entries for part, spec in e.parts.items()
    }
    raw = json.dumps({"cap": text, **parts}).encode()
    check(len(entries) <= MAX_TENSORS, where, "number of tensors", f"at most {MAX_TENSORS:,}", len(entries))
    check(len(raw) <= MAX_HEADER_BYTES, where, "header bytes", f"at most {MAX_HEADER_BYTES:,}", len(raw))
    brackets = raw.count(b"[") + raw.count(b"{")
    check(brackets <= MAX_BRACKETS, where, "brackets in the header", f"at most {MAX_BRACKETS:,}", brackets)


def _file_bytes(entries: list[Entry], text: str) -> int:
    """Bytes of the file: the length of the header, the header as safetensors writes it, and the data."""
    parts = {name: spec for entry in entries for name, spec in entry.parts.items()}
    header: dict[str, Any] = {"__metadata__": {"cap": text}}
    end = 0
    for name in sorted(parts, key=lambda name: (STORED_ORDER.index(parts[name][0]), name)):
        begin, end = end, end + size_in_bytes({name: parts[name]})
        header[name] = {"dtype": parts[name][0], "shape": parts[name][1], "data_offsets": [begin, end]}
    return 8 + len(header_bytes(header)) + end


def _sizes(entries: list[Entry], file_bytes: int) -> Sizes:
    pruned = [entry for entry in entries if entry.kept is not None]
    return Sizes(
        weights_bytes=sum(entry.bytes for entry in entries),
        bound_bytes=math.ceil(sum(entry.bound_bytes for entry in entries)),
        pruned_bytes=sum(entry.bytes for entry in pruned),
        pruned_bound_bytes=math.ceil(sum(entry.bound_bytes for entry in pruned)),
        dense_bytes=sum(entry.elements * entry.itemsize for entry in entries),
        file_bytes=file_bytes,
    )
