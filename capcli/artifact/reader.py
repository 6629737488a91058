"""Reading a weight file: everything is checked before it is allocated."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from capcli.artifact import codings, patterned
from capcli.artifact.codings import HINT, MAX_BITS, MIN_BITS, Array, check
from capcli.artifact.entry import (
    CHECKSUM_END,
    DTYPES,
    FLOAT_DTYPES,
    MAX_BRACKETS,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    OF_VERSION,
    PATTERNS,
    POSITIONS,
    PRUNABLE_DTYPES,
    VERSIONS,
    Entry,
    bits_of,
    canonical_json,
    check_dtype,
    check_expansion,
    check_name,
    check_shape,
    digest_of,
    header_bytes,
    is_count,
    tensor_of,
)
from capcli.errors import FileError
from capcli.stored import show

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is stored of a sparse tensor: its shape, the places of `values` [k] in its n elements, as integers [k] that
    ascend or as booleans [n]."""

    shape: tuple[int, ...]
    positions: Array
    values: torch.Tensor


def load(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the model, dense, by sorted name. Raises `FileError` unless every byte is as it was written."""
    with _opened(path) as file:
        entries, spans = _read_header(file, path)
        return {entry.name: _dense(_decode(file, path, entry, spans), entry) for entry in entries}


def load_kept(path: Path, names: Collection[str]) -> dict[str, torch.Tensor | Kept]:
    """The same, but the matrices in `names` that are stored by positions are not made dense."""
    with _opened(path) as file:
        entries, spans = _read_header(file, path)
        found: dict[str, torch.Tensor | Kept] = {}
        for entry in entries:
            tensor = _decode(file, path, entry, spans)
            found[entry.name] = tensor if entry.name in names else _dense(tensor, entry)
        return found


def inspect(path: Path) -> list[Entry]:
    """The validated header: one entry per tensor, by sorted name. No value is read or decoded."""
    with _opened(path) as file:
        return _read_header(file, path)[0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, opened; whatever else goes wrong while it is read becomes a `FileError` that names it."""
    try:
        # Looked at before it is opened, because opening a FIFO waits and opening a device can do anything.
        check(stat.S_ISREG(Path(path).stat().st_mode), str(path), "kind of file", "a regular file", "something else")
        with Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise FileError(f"cannot read {path}: not enough memory for its tensors") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"cannot read {path}: {error}", HINT) from error


def _read_header(file: BinaryIO, path: Path) -> tuple[list[Entry], dict[str, tuple[int, int]]]:
    """Entries by sorted name, and stored tensor name -> (offset in the file, bytes)."""
    size = os.fstat(file.fileno()).st_size
    header, start = _parse_header(file, path, size)
    metadata = header.pop("__metadata__", None)
    where = f"{path}: __metadata__"
    check(isinstance(metadata, dict) and list(metadata) == ["cap"], where, "keys", "only 'cap'", metadata)
    data = _parse_metadata(where, metadata["cap"])
    tensors, version = data["tensors"], data["version"]
    check(len(tensors) <= MAX_TENSORS, where, "number of tensors", f"at most {MAX_TENSORS:,}", len(tensors))
    entries = [_parse_entry(f"{path}: tensor {show(name)}", name, tensors[name], version) for name in sorted(tensors)]
    check_expansion(str(path), entries, size)
    return entries, _spans(path, header, entries, start, size)


def _parse_header(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The safetensors header and the offset at which the data start."""
    check(size >= 10, str(path), "file size", "at least 10 bytes", size)
    length = int.from_bytes(_read(file, path, 8).tobytes(), "little")
    limit = min(MAX_HEADER_BYTES, size - 8)
    check(2 <= length <= limit, str(path), "header length", f"2 to {limit:,} bytes", length)
    raw = _read(file, path, length).tobytes()
    brackets = raw.count(b"[") + raw.count(b"{")
    check(brackets <= MAX_BRACKETS, str(path), "brackets in the header", f"at most {MAX_BRACKETS:,}", brackets)
    header = _parse_json(f"{path}: header", raw)
    # Nothing may hide between or behind what was parsed: no key given twice, no 1.0 for 1, no trailing bytes.
    canonical = header_bytes(header)
    check(raw == canonical, str(path), "header", "compact JSON without repeated keys, padded with spaces", raw)
    return header, 8 + length


def _parse_metadata(where: str, text: object) -> dict[str, Any]:
    check(isinstance(text, str), where, "'cap'", "a string", text)
    assert isinstance(text, str)
    data = _parse_json(where, text)
    version = data.get("version")
    check(is_count(version) and version in VERSIONS, where, "format version", "1, 2 or 3", version)
    keys = ["checksum", "extra", "tensors", "version"]
    check(sorted(data) == keys, where, "keys", ", ".join(keys), sorted(data))
    check(text == canonical_json(data), where, "'cap'", "compact JSON with sorted keys", text)
    checksum = hashlib.sha256(text[CHECKSUM_END:].encode()).hexdigest()
    check(data["checksum"] == checksum, where, "checksum", checksum, data["checksum"])
    for key in ("extra", "tensors"):
        check(isinstance(data[key], dict), where, key, "an object", data[key])
    return data


def _parse_entry(where: str, name: str, record: object, version: int) -> Entry:
    """One validated entry; only its agreement with the stored tensors is left to check."""
    check_name(where, name, version)
    known = (*OF_VERSION[version], *(["factors"] if version > 1 else []))
    check(isinstance(record, dict) and record.get("coding") in known, where, "coding", ", ".join(known), record)
    assert isinstance(record, dict)
    _check_keys(where, record, version)
    coding, pruned = record["coding"], "kept" in record
    check_dtype(where, record["dtype"], _known_dtypes(coding, pruned, "values" in record))
    check_shape(where, record["shape"])
    digest = record["sha256"]
    check(isinstance(digest, str) and len(digest) == 64, where, "sha256", "64 hexadecimal digits", digest)
    n = math.prod(record["shape"])
    kept, bits, codes = (record.get(key, 0) for key in ("kept", "bits", "codes"))
    check(is_count(kept) and kept <= n, where, "kept", f"0 to {n:,}", kept)
    check(record.get("values", "I8") == "I8", where, "values", "I8", record.get("values"))
    if coding == "gap":
        check(is_count(bits) and MIN_BITS <= bits <= MAX_BITS, where, "bits", f"{MIN_BITS} to {MAX_BITS}", bits)
        check(is_count(codes) and kept <= codes <= n, where, "codes", f"{kept:,} to {n:,}", codes)
    if coding == "rice":
        check(is_count(bits) and 1 <= bits <= MAX_BITS, where, "bits", f"1 to {MAX_BITS}", bits)
        most = kept + (n >> bits)
        check(is_count(codes) and kept <= codes <= most, where, "codes", f"{kept:,} to {most:,}", codes)
    if coding in PATTERNS:
        _check_pattern(where, record, n)
    if coding == "factors":
        _check_factor_record(where, record)
    return Entry(name=name, **{**record, "shape": tuple(record["shape"]), "kept": kept if pruned else None})


def _check_keys(where: str, record: dict[str, Any], version: int) -> None:
    coding, quantised = record["coding"], version > 1 and "values" in record
    keys = {"coding", "dtype", "shape", "sha256"}
    if coding in POSITIONS or (coding == "dense" and "kept" in record and not quantised):
        keys |= {"kept"}
    if coding in ("gap", "rice", "blocks"):
        keys |= {"bits", "codes"}
    keys |= {"blocks": {"blocks"}, "groups": {"keep", "width"}}.get(coding, set())
    if coding == "factors":
        keys |= {"rank", "left", "right"}
    elif quantised:
        keys |= {"values"}
    check(set(record) == keys, where, "keys", sorted(keys), sorted(record))


def _known_dtypes(coding: str, pruned: bool, quantised: bool) -> tuple[str, ...]:
    if coding == "factors":
        return ("F32",)
    return tuple(FLOAT_DTYPES) if quantised else PRUNABLE_DTYPES if pruned else tuple(DTYPES)


def _check_pattern(where: str, record: dict[str, Any], n: int) -> None:
    """Of blocks or groups: as many as the matrix [n] can have, each with a value other than 0 or room for one."""
    kept = record["kept"]
    if record["coding"] == "groups":
        keep, width = record["keep"], record["width"]
        check(is_count(width) and width in patterned.WIDTHS, where, "width", f"one of {patterned.WIDTHS}", width)
        check(n % width == 0, where, "elements", f"a multiple of {width}", n)
        check(is_count(keep) and 1 <= keep < width, where, "keep", f"1 to {width - 1}", keep)
        most = n // width * keep
        check(kept <= most, where, "kept", f"0 to {most:,}", kept)
        return
    bits, codes, blocks = record["bits"], record["codes"], record["blocks"]
    check(n % patterned.BLOCK == 0, where, "elements", f"a multiple of {patterned.BLOCK}", n)
    fewest, most = -(-kept // patterned.BLOCK), min(kept, n // patterned.BLOCK)
    check(is_count(blocks) and max(1, fewest) <= blocks <= most, where, "blocks", f"{fewest:,} to {most:,}", blocks)
    check(is_count(bits) and bits <= MAX_BITS, where, "bits", f"0 to {MAX_BITS}", bits)
    most = blocks + (n // patterned.BLOCK >> bits)
    check(is_count(codes) and blocks <= codes <= most, where, "codes", f"{blocks:,} to {most:,}", codes)


def _check_factor_record(where: str, record: dict[str, Any]) -> None:
    shape, rank, sides = record["shape"], record["rank"], [record["left"], record["right"]]
    check(len(shape) == 2, where, "shape of a matrix with factors", "2 integers", shape)
    check(is_count(rank) and 1 <= rank <= min(shape), where, "rank", f"1 to {min(shape):,}", rank)
    ok = sides == ["I8", "I8"] or all(isinstance(side, str) and side in FLOAT_DTYPES for side in sides)
    check(ok, where, "dtypes of the factors", f"I8 twice, or each of {', '.join(FLOAT_DTYPES)}", sides)


def _spans(
    path: Path, header: dict[str, Any], entries: list[Entry], start: int, size: int
) -> dict[str, tuple[int, int]]:
    """Check that the stored tensors are exactly those the entries imply and fill the file without hole or overlap."""
    parts = {name: spec for entry in entries for name, spec in entry.parts.items()}
    missing, extra = sorted(parts.keys() - header.keys()), sorted(header.keys() - parts.keys())
    check(not missing, str(path), "stored tensors", show(missing[:1]), "nothing under this name")
    check(not extra, str(path), "stored tensors", "only those the metadata name", extra)
    spans, ends = {}, {}
    for name, (dtype, shape) in parts.items():
        where, record = f"{path}: tensor {show(name)}", header[name]
        check(isinstance(record, dict), where, "header entry", "an object", record)
        offsets = record.get("data_offsets")
        expected = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        check(
            canonical_json(record) == canonical_json(expected),
            where,
            "header entry",
            {"dtype": dtype, "shape": shape},
            record,
        )
        n_bytes = DTYPES[dtype][0] * math.prod(shape)
        check(isinstance(offsets, list) and len(offsets) == 2 and all(map(is_count, offsets)), where,
               "data offsets", "two integers", offsets)  # fmt: skip
        check(offsets[1] - offsets[0] == n_bytes, where, "bytes", n_bytes, offsets)
        spans[name], ends[name] = (start + offsets[0], n_bytes), start + offsets[1]
    end = start
    for name, (begin, n_bytes) in sorted(spans.items(), key=lambda item: item[1]):
        check(begin == end, f"{path}: tensor {show(name)}", "offset in the file", end, begin)
        end = begin + n_bytes
    check(end == size, str(path), "file size", end, size)
    return spans


def _dense(tensor: torch.Tensor | Kept, entry: Entry) -> torch.Tensor:
    """The tensor with its zeros."""
    if not isinstance(tensor, Kept):
        return tensor
    values = bits_of(tensor.values)
    dense = np.zeros(entry.elements, values.dtype)
    dense[tensor.positions] = values
    return tensor_of(dense, entry.dtype, entry.shape)


def _decode(file: BinaryIO, path: Path, entry: Entry, spans: dict[str, tuple[int, int]]) -> torch.Tensor | Kept:
    """Read, check and decode one tensor."""
    where = f"{path}: tensor {show(entry.name)}"
    parts = []
    for name in entry.parts:
        file.seek(spans[name][0])
        parts.append(_read(file, path, spans[name][1]))
    checksum = digest_of(*parts)
    check(checksum == entry.sha256, where, "sha256 of the stored bytes", checksum, entry.sha256)
    if entry.coding == "factors":
        return _product(where, entry, parts)
    filled = None
    if entry.coding in PATTERNS:
        stored = parts[0].view(f"<u{1 if entry.values else entry.itemsize}")
        filled = stored != 0
        found = int(np.count_nonzero(filled))
        check(found == entry.kept, where, "values other than 0", entry.kept, found)
        parts[0] = stored[filled].view(np.uint8)
        if entry.coding == "blocks":
            empty = int((~filled.reshape(-1, patterned.BLOCK).any(axis=1)).sum())
            check(not empty, where, "blocks without a value other than 0", 0, empty)
    if entry.values:
        values = bits_of(_dequantised(where, parts[0], parts[-1], entry.dtype))
    else:
        values = parts[0].view(f"<u{entry.itemsize}")
    if entry.kept is None:
        check(entry.dtype != "BOOL" or not (values > 1).any(), where, "booleans", "0 and 1", "another byte")
        return tensor_of(values, entry.dtype, entry.shape)
    kept = np.count_nonzero(values)
    check(kept == entry.kept, where, "values other than 0", entry.kept, kept)
    if entry.coding == "dense":
        return tensor_of(values, entry.dtype, entry.shape)
    positions = _positions(where, entry, parts[1])
    if filled is not None:
        positions = positions[filled]
    return Kept(shape=entry.shape, positions=positions, values=tensor_of(values, entry.dtype, (-1,)))


def _positions(where: str, entry: Entry, packed: Array) -> Array:
    """Kept positions, as booleans [n] or integers [k]; in a pattern those of all values that are stored."""
    kept = entry.kept or 0
    if entry.coding == "bitmask":
        return codings.unpack_bitmask(where, packed, entry.elements, kept)
    if entry.coding == "blocks":
        return patterned.unpack_blocks(where, packed, entry.elements, entry.blocks, entry.bits, entry.codes)
    if entry.coding == "groups":
        return patterned.unpack_groups(where, packed, entry.elements, entry.keep, entry.width)
    unpack = codings.unpack_gaps if entry.coding == "gap" else codings.unpack_rice
    return unpack(where, packed, entry.elements, kept, entry.bits, entry.codes)


def _dequantised(where: str, codes: Array, scales: Array, dtype: str) -> torch.Tensor:
    """The values [m] of the stored bytes of int8 codes and their scales, in `dtype`."""
    import torch

    codes, scales = codes.view(np.int8), scales.view("<f4")
    codings.check_quantised(where, codes, scales, FLOAT_DTYPES[dtype])
    return torch.from_numpy(codings.dequantise(codes, scales)).to(getattr(torch, DTYPES[dtype][1]))


def _product(where: str, entry: Entry, parts: list[Array]) -> torch.Tensor:
    """The product of the stored factors, in 32 bits."""
    if entry.quantised:
        scales = np.split(parts[2], [4 * codings.n_groups(parts[0].size)])
        sides = [_dequantised(where, raw, part, "F32") for raw, part in zip(parts[:2], scales, strict=True)]
    else:
        sides = [
            tensor_of(raw, dtype, (-1,)).float() for dtype, raw in zip((entry.left, entry.right), parts, strict=True)
        ]
    rows, columns = entry.shape
    return sides[0].reshape(rows, entry.rank) @ sides[1].reshape(entry.rank, columns)


def _parse_json(where: str, text: str | bytes) -> dict[str, Any]:
    try:
        data = json.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: not valid JSON: {error}", HINT) from error
    check(isinstance(data, dict), where, "JSON", "an object", data)
    return dict(data)


def _read(file: BinaryIO, path: Path, n_bytes: int) -> Array:
    """`n_bytes` bytes from the current position; the caller has checked that the file has them."""
    buffer = np.empty(n_bytes, np.uint8)
    got = file.readinto(buffer.data)  # type: ignore[attr-defined]
    check(got == n_bytes, str(path), "bytes left in the file", n_bytes, got)
    return buffer
