"""The file format of pruned models: plain safetensors in which a pruned matrix is its kept values and their positions.

`docs/format.md` is the specification; this module is its writer and its strict reader, `codings` the arrays in it.
Values that are not quantised are handled as unsigned integers of the same width, so every bit pattern survives: -0.0,
denormals, NaN payloads.

Shape letters: n = elements of a matrix, k = kept elements, r = rank.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from capcli import codings, files
from capcli.codings import HINT, MAX_BITS, MIN_BITS, Array, check, show
from capcli.errors import ConfigError, FileError

if TYPE_CHECKING:
    import torch

VERSIONS = (1, 2)  # a file without int8 values and without factors is of version 1
# Of equally small codings, the first is written. Version 1 knows the first three.
CODINGS = ("dense", "bitmask", "gap", "rice")
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 10_000
MAX_BRACKETS = 12 * MAX_TENSORS  # bounds the memory that parsing a header can take
MAX_NAME_CHARS = 256
MAX_DIMS = 8
MAX_ELEMENTS = 1 << 47
EXPANSION, EXPANSION_FLOOR = 4096, 64 << 20

# safetensors dtype -> (bytes, torch name)
DTYPES = {
    "BOOL": (1, "bool"), "U8": (1, "uint8"), "I8": (1, "int8"), "U16": (2, "uint16"), "I16": (2, "int16"),
    "U32": (4, "uint32"), "I32": (4, "int32"), "U64": (8, "uint64"), "I64": (8, "int64"), "F16": (2, "float16"),
    "BF16": (2, "bfloat16"), "F32": (4, "float32"), "F64": (8, "float64"), "C64": (8, "complex64"),
    "F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"),
}  # fmt: skip
PRUNABLE_DTYPES = ("F16", "BF16", "F32", "F64")
# Of factors and of tensors that can be quantised -> largest finite number
FLOAT_DTYPES = {"F16": 65504.0, "BF16": (2 - 2.0**-7) * 2.0**127, "F32": (2 - 2.0**-23) * 2.0**127}
# The order in which safetensors stores tensors; those of one dtype by name
_STORED_ORDER = ("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2",
                 "I8", "U8", "BOOL")  # fmt: skip

_POSITIONS = {"bitmask": ".cap.bitmask", "gap": ".cap.gaps", "rice": ".cap.rice"}
_RESERVED = (".cap.values", ".cap.bitmask", ".cap.gaps", ".cap.rice", ".cap.scales", ".cap.left", ".cap.right")
_PREFIX = '{"checksum":"'
_CHECKSUM_END = len(_PREFIX) + 64


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the model as the file stores it. `kept` is None for a tensor that was never pruned.

    `dtype` is that of the tensor itself. The values are stored in `values`, or in `dtype` when that is empty; factors
    in `left` and `right`. "I8" means quantised.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    coding: str
    kept: int | None
    bits: int = 0
    codes: int = 0
    values: str = ""
    rank: int = 0
    left: str = ""
    right: str = ""
    sha256: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][0]

    @property
    def quantised(self) -> bool:
        return "I8" in (self.values, self.left, self.right)

    @property
    def value_parts(self) -> dict[str, tuple[str, list[int]]]:
        """Name -> (dtype, shape) of the stored tensors that hold values."""
        if self.coding == "factors":
            rows, columns = self.shape
            return {
                f"{self.name}.cap.left": (self.left, [rows, self.rank]),
                f"{self.name}.cap.right": (self.right, [self.rank, columns]),
            }
        if self.coding == "dense" and not self.values:
            return {self.name: (self.dtype, list(self.shape))}
        stored = self.elements if self.coding == "dense" else self.kept or 0
        return {f"{self.name}.cap.values": (self.values or self.dtype, [stored])}

    @property
    def parts(self) -> dict[str, tuple[str, list[int]]]:
        """Stored tensor name -> (dtype, shape): the values, then positions, then scales."""
        parts = self.value_parts
        groups = sum(codings.n_groups(math.prod(shape)) for dtype, shape in parts.values() if dtype == "I8")
        if self.coding in _POSITIONS:
            parts[self.name + _POSITIONS[self.coding]] = ("U8", [self.position_bytes])
        if self.quantised:
            parts[f"{self.name}.cap.scales"] = ("F32", [groups])
        return parts

    @property
    def position_bytes(self) -> int:
        if self.coding == "rice":
            return -(-self.codes // 8) - (-(self.kept or 0) * self.bits // 8)
        return -(-(self.elements if self.coding == "bitmask" else self.codes * self.bits) // 8)

    @property
    def bytes(self) -> int:
        """Bytes of the stored tensors."""
        return _bytes(self.parts)

    @property
    def bound_bytes(self) -> float:
        """Information bound: n·H(s) bits for the positions of a pruned matrix, and the values at their stored width.

        A quantised value counts as one byte; its share of the scales is not in the bound.
        """
        values = _bytes(self.value_parts)
        if self.kept is None:
            return float(values)
        return entropy_bits(self.elements, self.kept) / 8 + self.kept * (1 if self.values else self.itemsize)


def _bytes(parts: Mapping[str, tuple[str, list[int]]]) -> int:
    return sum(DTYPES[dtype][0] * math.prod(shape) for dtype, shape in parts.values())


@dataclass(frozen=True)
class Factors:
    """A float matrix [rows, cols] as the product of `left` [rows, r] and `right` [r, cols]; it is read as float32."""

    left: torch.Tensor
    right: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.left.shape[:-1], *self.right.shape[1:])


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


Tensors = Mapping[str, "torch.Tensor | Factors"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a file takes. `bound_bytes` counts pruned matrices at their information bound, other tensors as they are."""

    weights_bytes: int
    bound_bytes: int
    pruned_bytes: int
    pruned_bound_bytes: int
    dense_bytes: int  # of the same tensors without any sparse coding
    file_bytes: int


def entropy_bits(n: int, kept: int) -> float:
    """n·H(s): the fewest bits that tell which `kept` of `n` elements are kept, when nothing else is known."""
    if kept in (0, n):
        return 0.0
    p = kept / n
    return -n * (p * math.log2(p) + (1 - p) * math.log1p(-p) / math.log(2))


# Writing


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

    version = 2 if quantised or any(isinstance(tensor, Factors) for tensor in tensors.values()) else 1
    choices = CODINGS[:3] if version == 1 else CODINGS
    coded = {name: encoded(name, choices) for name in sorted(tensors)}
    entries = [entry for entry, _ in coded.values()]
    if _claimed_bytes(entries) > _expansion_limit(sum(entry.bytes for entry in entries)):
        # Bitmasks are at least 1/64 of the dense bytes: such a matrix is always within the reader's limit.
        coded |= {name: encoded(name, CODINGS[:2]) for name in sorted(pruned)}
        entries = [entry for entry, _ in coded.values()]
    text = _metadata_text(entries, version)
    _check_header_fits(where, entries, text)
    _check_expansion(where, entries, _file_bytes(entries, text))
    return entries, {name: part for _, parts in coded.values() for name, part in parts.items()}, text


def _check_storable(where: str, name: str, tensor: torch.Tensor | Factors, pruned: bool, quantised: bool) -> None:
    _check_name(where, name, VERSIONS[-1])
    _check_shape(where, list(tensor.shape))
    if isinstance(tensor, Factors):
        assert not pruned, f"{name} has factors and is pruned"
        _check_factors(where, tensor)
        return
    dtype = _dtype_names().get(tensor.dtype, str(tensor.dtype))
    _check_dtype(where, dtype, tuple(FLOAT_DTYPES) if quantised else PRUNABLE_DTYPES if pruned else tuple(DTYPES))


def _check_factors(where: str, factors: Factors) -> None:
    left, right = factors.left, factors.right
    ok = left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0]
    check(ok, where, "factors", "[rows, rank] and [rank, cols]", (*left.shape, *right.shape))
    check(1 <= left.shape[1] <= min(factors.shape), where, "rank", f"1 to {min(factors.shape):,}", left.shape[1])
    for part in (left, right):
        _check_dtype(where, _dtype_names().get(part.dtype, str(part.dtype)), tuple(FLOAT_DTYPES))


def _encode(
    where: str, name: str, tensor: torch.Tensor | Factors, pruned: bool, quantised: bool, choices: tuple[str, ...]
) -> tuple[Entry, dict[str, torch.Tensor]]:
    """The entry of one tensor and the tensors stored for it; positions in the smallest of `choices`."""
    if isinstance(tensor, Factors):
        entry, stored = _encode_factors(where, name, tensor, quantised)
    else:
        tensor = tensor.detach().cpu().contiguous()
        dtype = _dtype_names()[tensor.dtype]
        entry = Entry(name=name, shape=tuple(tensor.shape), dtype=dtype, coding="dense", kept=None)
        if pruned:
            entry, stored = _encode_pruned(where, entry, tensor, quantised, choices)
        elif quantised:
            entry, stored = replace(entry, values="I8"), codings.quantise(_floats_of(where, tensor))
        else:
            stored = (_bits_of(tensor),)
    specs = zip(entry.parts.items(), stored, strict=True)
    parts = {part: _tensor_of(array, dtype, tuple(shape)) for (part, (dtype, shape)), array in specs}
    return replace(entry, sha256=_sha256(*stored)), parts


def _encode_factors(where: str, name: str, factors: Factors, quantised: bool) -> tuple[Entry, tuple[Array, ...]]:
    """The entry of a factored matrix, and its factors and, if quantised, scales."""
    both = [part.detach().cpu().contiguous() for part in (factors.left, factors.right)]
    left, right = ("I8" if quantised else _dtype_names()[part.dtype] for part in both)
    entry = Entry(name=name, shape=factors.shape, dtype="F32", coding="factors", kept=None, rank=both[0].shape[1],
                  left=left, right=right)  # fmt: skip
    if not quantised:
        return entry, tuple(map(_bits_of, both))
    codes, scales = zip(*(codings.quantise(_floats_of(where, part)) for part in both), strict=True)
    return entry, (*codes, np.concatenate(scales))


def _encode_pruned(
    where: str, entry: Entry, tensor: torch.Tensor, quantised: bool, choices: tuple[str, ...]
) -> tuple[Entry, tuple[Array, ...]]:
    """The entry of a pruned matrix, and its values, positions and, if quantised, scales."""
    bits = _bits_of(tensor)
    positions = np.flatnonzero(bits != 0)
    if not quantised:
        entry, packed = _encode_positions(entry, positions, choices)
        return entry, (bits,) if entry.coding == "dense" else (bits[positions], packed)
    import torch

    kept = tensor.reshape(-1)[torch.from_numpy(positions)]
    survivors, codes, scales = codings.quantise_kept(_floats_of(where, kept))
    choices = tuple(choice for choice in choices if choice != "dense")
    entry, packed = _encode_positions(replace(entry, values="I8"), positions[survivors], choices)
    return entry, (codes, packed, scales)


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
    best = min((possible[coding] for coding in choices), key=lambda choice: choice.bytes)
    if best.coding == "gap":
        return best, codings.pack_gaps(gaps, bits, codes)
    if best.coding == "rice":
        return best, codings.pack_rice(gaps, best.bits, best.codes)
    return best, codings.pack_bitmask(positions, entry.elements)


def _metadata_text(entries: list[Entry], version: int) -> str:
    body = _canonical({"extra": {}, "tensors": {e.name: _record(e) for e in entries}, "version": version})
    rest = f'",{body[1:]}'
    return _PREFIX + hashlib.sha256(rest.encode()).hexdigest() + rest


def _record(entry: Entry) -> dict[str, Any]:
    """What the metadata say about one tensor."""
    record: dict[str, Any] = {"coding": entry.coding, "dtype": entry.dtype, "shape": list(entry.shape)}
    record["sha256"] = entry.sha256
    if entry.kept is not None:
        record["kept"] = entry.kept
    if entry.coding in ("gap", "rice"):
        record |= {"bits": entry.bits, "codes": entry.codes}
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
    for name in sorted(parts, key=lambda name: (_STORED_ORDER.index(parts[name][0]), name)):
        begin, end = end, end + _bytes({name: parts[name]})
        header[name] = {"dtype": parts[name][0], "shape": parts[name][1], "data_offsets": [begin, end]}
    return 8 + len(_header_bytes(header)) + end


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


# Reading


def load(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the model, dense, by sorted name. Raises `FileError` unless every byte is as it was written."""
    with _opened(path) as file:
        entries, spans = _read_header(file, path)
        return {entry.name: _decode(file, path, entry, spans) for entry in entries}


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
    _check_expansion(str(path), entries, size)
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
    canonical = _header_bytes(header)
    check(raw == canonical, str(path), "header", "compact JSON without repeated keys, padded with spaces", raw)
    return header, 8 + length


def _parse_metadata(where: str, text: object) -> dict[str, Any]:
    check(isinstance(text, str), where, "'cap'", "a string", text)
    assert isinstance(text, str)
    data = _parse_json(where, text)
    version = data.get("version")
    check(_is_count(version) and version in VERSIONS, where, "format version", "1 or 2", version)
    keys = ["checksum", "extra", "tensors", "version"]
    check(sorted(data) == keys, where, "keys", ", ".join(keys), sorted(data))
    check(text == _canonical(data), where, "'cap'", "compact JSON with sorted keys", text)
    checksum = hashlib.sha256(text[_CHECKSUM_END:].encode()).hexdigest()
    check(data["checksum"] == checksum, where, "checksum", checksum, data["checksum"])
    for key in ("extra", "tensors"):
        check(isinstance(data[key], dict), where, key, "an object", data[key])
    return data


def _parse_entry(where: str, name: str, record: object, version: int) -> Entry:
    """One validated entry; only its agreement with the stored tensors is left to check."""
    _check_name(where, name, version)
    known = CODINGS[:3] if version == 1 else (*CODINGS, "factors")
    check(isinstance(record, dict) and record.get("coding") in known, where, "coding", ", ".join(known), record)
    assert isinstance(record, dict)
    _check_keys(where, record, version)
    coding, pruned = record["coding"], "kept" in record
    _check_dtype(where, record["dtype"], _known_dtypes(coding, pruned, "values" in record))
    _check_shape(where, record["shape"])
    digest = record["sha256"]
    check(isinstance(digest, str) and len(digest) == 64, where, "sha256", "64 hexadecimal digits", digest)
    n = math.prod(record["shape"])
    kept, bits, codes = (record.get(key, 0) for key in ("kept", "bits", "codes"))
    check(_is_count(kept) and kept <= n, where, "kept", f"0 to {n:,}", kept)
    check(record.get("values", "I8") == "I8", where, "values", "I8", record.get("values"))
    if coding == "gap":
        check(_is_count(bits) and MIN_BITS <= bits <= MAX_BITS, where, "bits", f"{MIN_BITS} to {MAX_BITS}", bits)
        check(_is_count(codes) and kept <= codes <= n, where, "codes", f"{kept:,} to {n:,}", codes)
    if coding == "rice":
        check(_is_count(bits) and 1 <= bits <= MAX_BITS, where, "bits", f"1 to {MAX_BITS}", bits)
        most = kept + (n >> bits)
        check(_is_count(codes) and kept <= codes <= most, where, "codes", f"{kept:,} to {most:,}", codes)
    if coding == "factors":
        _check_factor_record(where, record)
    return Entry(name=name, **{**record, "shape": tuple(record["shape"]), "kept": kept if pruned else None})


def _check_keys(where: str, record: dict[str, Any], version: int) -> None:
    coding, quantised = record["coding"], version > 1 and "values" in record
    keys = {"coding", "dtype", "shape", "sha256"}
    if coding in _POSITIONS or (coding == "dense" and "kept" in record and not quantised):
        keys |= {"kept"}
    if coding in ("gap", "rice"):
        keys |= {"bits", "codes"}
    if coding == "factors":
        keys |= {"rank", "left", "right"}
    elif quantised:
        keys |= {"values"}
    check(set(record) == keys, where, "keys", sorted(keys), sorted(record))


def _known_dtypes(coding: str, pruned: bool, quantised: bool) -> tuple[str, ...]:
    if coding == "factors":
        return ("F32",)
    return tuple(FLOAT_DTYPES) if quantised else PRUNABLE_DTYPES if pruned else tuple(DTYPES)


def _check_factor_record(where: str, record: dict[str, Any]) -> None:
    shape, rank, sides = record["shape"], record["rank"], [record["left"], record["right"]]
    check(len(shape) == 2, where, "shape of a matrix with factors", "2 integers", shape)
    check(_is_count(rank) and 1 <= rank <= min(shape), where, "rank", f"1 to {min(shape):,}", rank)
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
            _canonical(record) == _canonical(expected), where, "header entry", {"dtype": dtype, "shape": shape}, record
        )
        n_bytes = DTYPES[dtype][0] * math.prod(shape)
        check(isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets)), where,
               "data offsets", "two integers", offsets)  # fmt: skip
        check(offsets[1] - offsets[0] == n_bytes, where, "bytes", n_bytes, offsets)
        spans[name], ends[name] = (start + offsets[0], n_bytes), start + offsets[1]
    end = start
    for name, (begin, n_bytes) in sorted(spans.items(), key=lambda item: item[1]):
        check(begin == end, f"{path}: tensor {show(name)}", "offset in the file", end, begin)
        end = begin + n_bytes
    check(end == size, str(path), "file size", end, size)
    return spans


def _decode(file: BinaryIO, path: Path, entry: Entry, spans: dict[str, tuple[int, int]]) -> torch.Tensor:
    """Read, check and decode one tensor."""
    where = f"{path}: tensor {show(entry.name)}"
    parts = []
    for name in entry.parts:
        file.seek(spans[name][0])
        parts.append(_read(file, path, spans[name][1]))
    checksum = _sha256(*parts)
    check(checksum == entry.sha256, where, "sha256 of the stored bytes", checksum, entry.sha256)
    if entry.coding == "factors":
        return _product(where, entry, parts)
    if entry.values:
        values = _bits_of(_dequantised(where, parts[0], parts[-1], entry.dtype))
    else:
        values = parts[0].view(f"<u{entry.itemsize}")
    if entry.kept is None:
        check(entry.dtype != "BOOL" or not (values > 1).any(), where, "booleans", "0 and 1", "another byte")
        return _tensor_of(values, entry.dtype, entry.shape)
    kept = np.count_nonzero(values)
    check(kept == entry.kept, where, "values other than 0", entry.kept, kept)
    if entry.coding == "dense":
        return _tensor_of(values, entry.dtype, entry.shape)
    dense = np.zeros(entry.elements, values.dtype)
    dense[_positions(where, entry, parts[1])] = values
    return _tensor_of(dense, entry.dtype, entry.shape)


def _positions(where: str, entry: Entry, packed: Array) -> Array:
    """Kept positions, as booleans [n] or integers [k]."""
    kept = entry.kept or 0
    if entry.coding == "bitmask":
        return codings.unpack_bitmask(where, packed, entry.elements, kept)
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
            _tensor_of(raw, dtype, (-1,)).float() for dtype, raw in zip((entry.left, entry.right), parts, strict=True)
        ]
    rows, columns = entry.shape
    return sides[0].reshape(rows, entry.rank) @ sides[1].reshape(entry.rank, columns)


# Shared by both


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _check_name(where: str, name: str, version: int) -> None:
    check(name and name.isprintable(), where, "name", "printable characters", name)
    check(len(name) <= MAX_NAME_CHARS, where, "length of the name", f"at most {MAX_NAME_CHARS} characters", len(name))
    reserved = _RESERVED[:3] if version == 1 else _RESERVED
    free = name != "__metadata__" and not name.endswith(reserved)
    check(free, where, "name", "none that the format uses", name)


def _check_dtype(where: str, dtype: object, known: tuple[str, ...]) -> None:
    check(isinstance(dtype, str) and dtype in known, where, "dtype", ", ".join(known), dtype)


def _check_shape(where: str, shape: object) -> None:
    ok = isinstance(shape, list) and len(shape) <= MAX_DIMS and all(map(_is_count, shape))
    check(ok, where, "shape", f"at most {MAX_DIMS} integers of at least 0", shape)
    assert isinstance(shape, list)
    elements = math.prod(max(size, 1) for size in shape)
    check(elements <= MAX_ELEMENTS, where, "elements", f"at most {MAX_ELEMENTS:,}", shape)


def _claimed_bytes(entries: list[Entry]) -> int:
    """Dense bytes of everything that can be much larger in memory than in the file."""
    claims = (entry for entry in entries if entry.kept is not None or entry.coding == "factors")
    return sum(entry.elements * entry.itemsize for entry in claims)


def _expansion_limit(file_bytes: int) -> int:
    return max(EXPANSION_FLOOR, EXPANSION * file_bytes)


def _check_expansion(where: str, entries: list[Entry], file_bytes: int) -> None:
    claimed, limit = _claimed_bytes(entries), _expansion_limit(file_bytes)
    what = "dense bytes of the pruned matrices" + (" and factors" if any(e.rank for e in entries) else "")
    check(claimed <= limit, where, what, f"at most {limit:,}", claimed)


def _header_bytes(header: dict[str, Any]) -> bytes:
    """A safetensors header: compact JSON, padded with spaces."""
    compact = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return compact + b" " * (-len(compact) % 8)


def _canonical(data: object) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _parse_json(where: str, text: str | bytes) -> dict[str, Any]:
    try:
        data = json.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: not valid JSON: {error}", HINT) from error
    check(isinstance(data, dict), where, "JSON", "an object", data)
    return dict(data)


def _sha256(*parts: Array) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.view(np.uint8).data)
    return digest.hexdigest()


def _read(file: BinaryIO, path: Path, n_bytes: int) -> Array:
    """`n_bytes` bytes from the current position; the caller has checked that the file has them."""
    buffer = np.empty(n_bytes, np.uint8)
    got = file.readinto(buffer.data)  # type: ignore[attr-defined]
    check(got == n_bytes, str(path), "bytes left in the file", n_bytes, got)
    return buffer


@functools.cache
def _dtype_names() -> dict[torch.dtype, str]:
    import torch

    return {getattr(torch, attribute): name for name, (_, attribute) in DTYPES.items()}


def _floats_of(where: str, tensor: torch.Tensor) -> Array:
    """The elements [n] of a CPU tensor to be quantised, in 32 bits. Raises `FileError` for one that is not finite."""
    values: Array = tensor.float().reshape(-1).numpy()
    check(np.isfinite(values).all(), where, "values to be quantised", "finite numbers", "NaN or infinity")
    return values


def _bits_of(tensor: torch.Tensor) -> Array:
    """The bit patterns of a contiguous CPU tensor as unsigned integers [n]; shares its memory."""
    import torch

    if not tensor.numel():  # torch does not view an empty tensor that came from numpy
        return np.empty(0, f"<u{tensor.element_size()}")
    array: Array = tensor.reshape(-1).view(torch.uint8).numpy()
    return array.view(f"<u{tensor.element_size()}")


def _tensor_of(bits: Array, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `_bits_of`."""
    import torch

    return torch.from_numpy(bits.view(np.uint8)).view(getattr(torch, DTYPES[dtype][1])).reshape(shape)
