"""The file format of pruned models: plain safetensors in which a pruned matrix is its kept values and their positions.

`docs/format.md` is the specification; this module is its writer and its strict reader. Values are handled as unsigned
integers of the same width, so every bit pattern survives: -0.0, denormals, NaN payloads.

Shape letters: n = elements of a matrix, k = kept elements, c = gap codes, b = bits per gap code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import reprlib
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from capcli import files
from capcli.errors import FileError

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
CODINGS = ("dense", "bitmask", "gap")  # of equally small ones, the first is written
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 10_000
MAX_BRACKETS = 12 * MAX_TENSORS  # bounds the memory that parsing a header can take
MAX_NAME_CHARS = 256
MAX_DIMS = 8
MAX_ELEMENTS = 1 << 47
MIN_BITS, MAX_BITS = 2, 16
EXPANSION, EXPANSION_FLOOR = 4096, 64 << 20

# safetensors dtype -> (bytes, torch name)
DTYPES = {
    "BOOL": (1, "bool"), "U8": (1, "uint8"), "I8": (1, "int8"), "U16": (2, "uint16"), "I16": (2, "int16"),
    "U32": (4, "uint32"), "I32": (4, "int32"), "U64": (8, "uint64"), "I64": (8, "int64"), "F16": (2, "float16"),
    "BF16": (2, "bfloat16"), "F32": (4, "float32"), "F64": (8, "float64"), "C64": (8, "complex64"),
    "F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"),
}  # fmt: skip
PRUNABLE_DTYPES = ("F16", "BF16", "F32", "F64")

_PARTS = {"dense": "", "bitmask": ".cap.bitmask", "gap": ".cap.gaps"}
_RESERVED = (".cap.values", ".cap.bitmask", ".cap.gaps")
_PREFIX = '{"checksum":"'
_CHECKSUM_END = len(_PREFIX) + 64
_HINT = "the file is damaged or was not written by this version of cap; write it again or fetch a fresh copy"

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the model as the file stores it. `kept` is None for a tensor that was never pruned."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    coding: str
    kept: int | None
    bits: int = 0
    codes: int = 0
    sha256: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][0]

    @property
    def parts(self) -> dict[str, tuple[str, list[int]]]:
        """Stored tensor name -> (dtype, shape), the values first."""
        if self.coding == "dense":
            return {self.name: (self.dtype, list(self.shape))}
        n_bits = self.elements if self.coding == "bitmask" else self.codes * self.bits
        return {
            f"{self.name}.cap.values": (self.dtype, [self.kept or 0]),
            f"{self.name}{_PARTS[self.coding]}": ("U8", [-(-n_bits // 8)]),
        }

    @property
    def bytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(DTYPES[dtype][0] * math.prod(shape) for dtype, shape in self.parts.values())

    @property
    def bound_bytes(self) -> float:
        """Information bound: n·H(s) bits for the positions of a pruned matrix, and its kept values."""
        if self.kept is None:
            return float(self.bytes)
        return entropy_bits(self.elements, self.kept) / 8 + self.kept * self.itemsize


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


def save(
    path: Path, tensors: Mapping[str, torch.Tensor], pruned: Collection[str], extra: Mapping[str, Any] | None = None
) -> Sizes:
    """Write every tensor of a model, those named in `pruned` in sparse coding. Same input, same bytes.

    Zero means "all bits zero". -0.0 is a kept value, so prune with `masked_fill`: `weight * mask` makes -0.0 of every
    removed negative weight, and nothing gets smaller. `extra` is any JSON object. Raises `FileError` for tensors that
    the format cannot hold, before anything is written, and `RunFailed` when the disk refuses.
    """
    assert set(pruned) <= set(tensors), f"pruned but not among the tensors: {sorted(set(pruned) - set(tensors))[:3]}"
    for name, tensor in tensors.items():
        _check_storable(path, name, tensor, name in pruned)
    coded = {name: _encode(name, tensors[name], name in pruned, CODINGS) for name in sorted(tensors)}
    entries = [entry for entry, _ in coded.values()]
    if _pruned_bytes(entries) > _expansion_limit(sum(entry.bytes for entry in entries)):
        # Bitmasks are at least 1/64 of the dense bytes: such a file is always within the reader's limit.
        coded |= {name: _encode(name, tensors[name], True, CODINGS[:2]) for name in sorted(pruned)}
        entries = [entry for entry, _ in coded.values()]
    text = _metadata_text(entries, dict(extra or {}))
    _check_header_fits(path, entries, text)
    files.write_tensors(path, _unshared(part for _, parts in coded.values() for part in parts.items()), {"cap": text})
    return _sizes(entries, path.stat().st_size)


def _check_storable(path: Path, name: str, tensor: torch.Tensor, pruned: bool) -> None:
    where = f"cannot write {path}: tensor {_show(name)}"
    dtype = _dtype_names().get(tensor.dtype, str(tensor.dtype))
    _check_name(where, name)
    _check_dtype(where, dtype, pruned)
    _check_shape(where, list(tensor.shape))


def _encode(
    name: str, tensor: torch.Tensor, pruned: bool, codings: tuple[str, ...]
) -> tuple[Entry, dict[str, torch.Tensor]]:
    """The entry of one tensor and the tensors stored for it, in the smallest of `codings`."""
    tensor = tensor.detach().cpu().contiguous()
    bits = _bits_of(tensor)
    dtype = _dtype_names()[tensor.dtype]
    entry = Entry(name=name, shape=tuple(tensor.shape), dtype=dtype, coding="dense", kept=None)
    stored: tuple[Array, ...] = (bits,)
    if pruned:
        positions = np.flatnonzero(bits != 0)
        entry, where = _encode_positions(entry, positions, codings)
        stored = (bits,) if entry.coding == "dense" else (bits[positions], where)
    specs = zip(entry.parts.items(), stored, strict=True)
    parts = {part: _tensor_of(array, dtype, tuple(shape)) for (part, (dtype, shape)), array in specs}
    return replace(entry, sha256=_sha256(*stored)), parts


def _encode_positions(entry: Entry, positions: Array, codings: tuple[str, ...]) -> tuple[Entry, Array]:
    """The entry with the smallest of `codings` for the kept `positions` [k], and the bytes of that coding."""
    gaps = np.diff(positions, prepend=-1) - 1
    bits, codes = _narrowest(gaps)
    entry = replace(entry, kept=positions.size)
    choices = {"dense": entry, "bitmask": replace(entry, coding="bitmask")}
    choices["gap"] = replace(entry, coding="gap", bits=bits, codes=codes)
    best = min((choices[coding] for coding in codings), key=lambda choice: choice.bytes)
    if best.coding == "gap":
        return best, _pack_gaps(gaps, bits, codes)
    mask = np.zeros(entry.elements, bool)
    mask[positions] = True
    return best, np.packbits(mask, bitorder="little")


def _narrowest(gaps: Array) -> tuple[int, int]:
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


def _pack_gaps(gaps: Array, width: int, codes: int) -> Array:
    """Gaps [k] as a stream of `codes` codes: as many escapes (all ones) as fit into the gap, then what remains."""
    escape = (1 << width) - 1
    if codes == gaps.size:
        return _pack(gaps.astype(np.uint16), width)
    escapes = gaps // escape
    stream = np.full(codes, escape, np.uint16)
    stream[np.arange(gaps.size) + np.cumsum(escapes)] = gaps - escapes * escape
    return _pack(stream, width)


def _pack(codes: Array, width: int) -> Array:
    """Codes [c] of 2 to 16 bits as bytes [ceil(c·b/8)], lowest bit first; 8 codes fill exactly b bytes."""
    groups = np.zeros((-(-codes.size // 8), 8), np.uint16)
    groups.reshape(-1)[: codes.size] = codes
    low, high = (np.zeros(len(groups), np.uint64) for _ in range(2))
    for i in range(4):
        low |= groups[:, i].astype(np.uint64) << np.uint64(i * width)
        high |= groups[:, i + 4].astype(np.uint64) << np.uint64(i * width)
    words = np.empty((len(groups), 2), "<u8")
    words[:, 0] = low | high << np.uint64(4 * width)  # for 16 bits, a shift by 64, which numpy defines as 0
    words[:, 1] = high >> np.uint64(64 - 4 * width)
    return words.view(np.uint8)[:, :width].reshape(-1)[: -(-codes.size * width // 8)]


def _metadata_text(entries: list[Entry], extra: dict[str, Any]) -> str:
    body = _canonical({"extra": extra, "tensors": {e.name: _record(e) for e in entries}, "version": FORMAT_VERSION})
    rest = f'",{body[1:]}'
    return _PREFIX + hashlib.sha256(rest.encode()).hexdigest() + rest


def _record(entry: Entry) -> dict[str, Any]:
    """What the metadata say about one tensor."""
    record: dict[str, Any] = {"coding": entry.coding, "dtype": entry.dtype, "shape": list(entry.shape)}
    record["sha256"] = entry.sha256
    if entry.kept is not None:
        record["kept"] = entry.kept
    if entry.coding == "gap":
        record |= {"bits": entry.bits, "codes": entry.codes}
    return record


def _check_header_fits(path: Path, entries: list[Entry], text: str) -> None:
    """Refuse to write what the reader would refuse to read. The offsets here are the longest possible ones."""
    parts = {
        part: [*spec, [MAX_ELEMENTS] * 2, "dtype shape data_offsets"] for e in entries for part, spec in e.parts.items()
    }
    raw = json.dumps({"cap": text, **parts}).encode()
    where = f"cannot write {path}"
    _check(len(entries) <= MAX_TENSORS, where, "number of tensors", f"at most {MAX_TENSORS:,}", len(entries))
    _check(len(raw) <= MAX_HEADER_BYTES, where, "header bytes", f"at most {MAX_HEADER_BYTES:,}", len(raw))
    brackets = raw.count(b"[") + raw.count(b"{")
    _check(brackets <= MAX_BRACKETS, where, "brackets in the header", f"at most {MAX_BRACKETS:,}", brackets)


def _unshared(parts: Iterator[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tied weights as copies: safetensors refuses tensors that share memory."""
    unshared: dict[str, torch.Tensor] = {}
    seen = set()
    for name, tensor in parts:
        pointer = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return unshared


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
        entries, _, spans = _read_header(file, path)
        return {entry.name: _decode(file, path, entry, spans) for entry in entries}


def inspect(path: Path) -> list[Entry]:
    """The validated header: one entry per tensor, by sorted name. No value is read or decoded."""
    with _opened(path) as file:
        return _read_header(file, path)[0]


def read_extra(path: Path) -> dict[str, Any]:
    """The `extra` object given to `save`."""
    with _opened(path) as file:
        return _read_header(file, path)[1]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, opened; whatever else goes wrong while it is read becomes a `FileError` that names it."""
    try:
        # Looked at before it is opened, because opening a FIFO waits and opening a device can do anything.
        _check(stat.S_ISREG(Path(path).stat().st_mode), str(path), "kind of file", "a regular file", "something else")
        with Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise FileError(f"cannot read {path}: not enough memory for its tensors") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"cannot read {path}: {error}", _HINT) from error


def _read_header(file: BinaryIO, path: Path) -> tuple[list[Entry], dict[str, Any], dict[str, tuple[int, int]]]:
    """Entries by sorted name, the extra object, and stored tensor name -> (offset in the file, bytes)."""
    size = os.fstat(file.fileno()).st_size
    header, start = _parse_header(file, path, size)
    metadata = header.pop("__metadata__", None)
    where = f"{path}: __metadata__"
    _check(isinstance(metadata, dict) and list(metadata) == ["cap"], where, "keys", "only 'cap'", metadata)
    version_1 = _parse_metadata(where, metadata["cap"])
    tensors = version_1["tensors"]
    _check(len(tensors) <= MAX_TENSORS, where, "number of tensors", f"at most {MAX_TENSORS:,}", len(tensors))
    entries = [_parse_entry(f"{path}: tensor {_show(name)}", name, tensors[name]) for name in sorted(tensors)]
    claimed, limit = _pruned_bytes(entries), _expansion_limit(size)
    _check(claimed <= limit, str(path), "dense bytes of the pruned matrices", f"at most {limit:,}", claimed)
    return entries, version_1["extra"], _spans(path, header, entries, start, size)


def _parse_header(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The safetensors header and the offset at which the data start."""
    _check(size >= 10, str(path), "file size", "at least 10 bytes", size)
    length = int.from_bytes(_read(file, path, 8).tobytes(), "little")
    limit = min(MAX_HEADER_BYTES, size - 8)
    _check(2 <= length <= limit, str(path), "header length", f"2 to {limit:,} bytes", length)
    raw = _read(file, path, length).tobytes()
    brackets = raw.count(b"[") + raw.count(b"{")
    _check(brackets <= MAX_BRACKETS, str(path), "brackets in the header", f"at most {MAX_BRACKETS:,}", brackets)
    header = _parse_json(f"{path}: header", raw)
    compact = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # Nothing may hide between or behind what was parsed: no key given twice, no 1.0 for 1, no trailing bytes.
    canonical = compact + b" " * (-len(compact) % 8)
    _check(raw == canonical, str(path), "header", "compact JSON without repeated keys, padded with spaces", raw)
    return header, 8 + length


def _parse_metadata(where: str, text: object) -> dict[str, Any]:
    _check(isinstance(text, str), where, "'cap'", "a string", text)
    assert isinstance(text, str)
    data = _parse_json(where, text)
    version = data.get("version")
    _check(_is_count(version) and version == FORMAT_VERSION, where, "format version", FORMAT_VERSION, version)
    keys = ["checksum", "extra", "tensors", "version"]
    _check(sorted(data) == keys, where, "keys", ", ".join(keys), sorted(data))
    _check(text == _canonical(data), where, "'cap'", "compact JSON with sorted keys", text)
    checksum = hashlib.sha256(text[_CHECKSUM_END:].encode()).hexdigest()
    _check(data["checksum"] == checksum, where, "checksum", checksum, data["checksum"])
    for key in ("extra", "tensors"):
        _check(isinstance(data[key], dict), where, key, "an object", data[key])
    return data


def _parse_entry(where: str, name: str, record: object) -> Entry:
    """One validated entry; only its agreement with the stored tensors is left to check."""
    _check_name(where, name)
    _check(isinstance(record, dict) and record.get("coding") in CODINGS, where, "coding", ", ".join(CODINGS), record)
    assert isinstance(record, dict)
    coding, pruned = record["coding"], record["coding"] != "dense" or "kept" in record
    keys = {"coding", "dtype", "shape", "sha256"} | ({"kept"} if pruned else set())
    keys |= {"bits", "codes"} if coding == "gap" else set()
    _check(set(record) == keys, where, "keys", sorted(keys), sorted(record))
    _check_dtype(where, record["dtype"], pruned)
    _check_shape(where, record["shape"])
    digest = record["sha256"]
    _check(isinstance(digest, str) and len(digest) == 64, where, "sha256", "64 hexadecimal digits", digest)
    n = math.prod(record["shape"])
    kept, bits, codes = (record.get(key, 0) for key in ("kept", "bits", "codes"))
    _check(_is_count(kept) and kept <= n, where, "kept", f"0 to {n:,}", kept)
    if coding == "gap":
        _check(_is_count(bits) and MIN_BITS <= bits <= MAX_BITS, where, "bits", f"{MIN_BITS} to {MAX_BITS}", bits)
        _check(_is_count(codes) and kept <= codes <= n, where, "codes", f"{kept:,} to {n:,}", codes)
    record = {**record, "shape": tuple(record["shape"]), "kept": kept if pruned else None}
    return Entry(name=name, **record)


def _spans(
    path: Path, header: dict[str, Any], entries: list[Entry], start: int, size: int
) -> dict[str, tuple[int, int]]:
    """Check that the stored tensors are exactly those the entries imply and fill the file without hole or overlap."""
    parts = {name: spec for entry in entries for name, spec in entry.parts.items()}
    missing, extra = sorted(parts.keys() - header.keys()), sorted(header.keys() - parts.keys())
    _check(not missing, str(path), "stored tensors", _show(missing[:1]), "nothing under this name")
    _check(not extra, str(path), "stored tensors", "only those the metadata name", extra)
    spans, ends = {}, {}
    for name, (dtype, shape) in parts.items():
        where, record = f"{path}: tensor {_show(name)}", header[name]
        _check(isinstance(record, dict), where, "header entry", "an object", record)
        offsets = record.get("data_offsets")
        expected = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        _check(
            _canonical(record) == _canonical(expected), where, "header entry", {"dtype": dtype, "shape": shape}, record
        )
        n_bytes = DTYPES[dtype][0] * math.prod(shape)
        _check(isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets)), where,
               "data offsets", "two integers", offsets)  # fmt: skip
        _check(offsets[1] - offsets[0] == n_bytes, where, "bytes", n_bytes, offsets)
        spans[name], ends[name] = (start + offsets[0], n_bytes), start + offsets[1]
    end = start
    for name, (begin, n_bytes) in sorted(spans.items(), key=lambda item: item[1]):
        _check(begin == end, f"{path}: tensor {_show(name)}", "offset in the file", end, begin)
        end = begin + n_bytes
    _check(end == size, str(path), "file size", end, size)
    return spans


def _decode(file: BinaryIO, path: Path, entry: Entry, spans: dict[str, tuple[int, int]]) -> torch.Tensor:
    """Read, check and decode one tensor."""
    where = f"{path}: tensor {_show(entry.name)}"
    parts = []
    for name in entry.parts:
        file.seek(spans[name][0])
        parts.append(_read(file, path, spans[name][1]))
    checksum = _sha256(*parts)
    _check(checksum == entry.sha256, where, "sha256 of the stored bytes", checksum, entry.sha256)
    values = parts[0].view(f"<u{entry.itemsize}")
    if entry.kept is None:
        _check(entry.dtype != "BOOL" or not (values > 1).any(), where, "booleans", "0 and 1", "another byte")
        return _tensor_of(values, entry.dtype, entry.shape)
    kept = np.count_nonzero(values)
    _check(kept == entry.kept, where, "values other than 0", entry.kept, kept)
    if entry.coding == "dense":
        return _tensor_of(values, entry.dtype, entry.shape)
    positions = _read_gaps(where, entry, parts[1]) if entry.coding == "gap" else _read_bitmask(where, entry, parts[1])
    dense = np.zeros(entry.elements, values.dtype)
    dense[positions] = values
    return _tensor_of(dense, entry.dtype, entry.shape)


def _read_bitmask(where: str, entry: Entry, packed: Array) -> Array:
    """Kept positions as booleans [n]."""
    mask: Array = np.unpackbits(packed, bitorder="little").view(bool)
    _check(not mask[entry.elements :].any(), where, "padding bits of the bitmask", "zero", "one")
    kept = np.count_nonzero(mask)
    _check(kept == entry.kept, where, "bits set in the bitmask", entry.kept, kept)
    return mask[: entry.elements]


def _read_gaps(where: str, entry: Entry, packed: Array) -> Array:
    """Kept positions [k], increasing."""
    codes = _unpack(packed, entry.bits, entry.codes)
    _check(not codes[entry.codes :].any(), where, "padding bits of the gaps", "zero", "one")
    codes = codes[: entry.codes]
    ends_gap = codes != (1 << entry.bits) - 1
    kept = np.count_nonzero(ends_gap)
    _check(kept == entry.kept, where, "gaps", entry.kept, kept)
    _check(codes.size == 0 or bool(ends_gap[-1]), where, "last code", "the end of a gap", "an escape")
    positions: Array = np.cumsum(codes + ends_gap, dtype=np.int64)
    positions = (positions if kept == codes.size else positions[ends_gap]) - 1
    _check(
        kept == 0 or positions[-1] < entry.elements, where, "last position", f"below {entry.elements:,}", positions[-1:]
    )
    return positions


def _unpack(packed: Array, width: int, count: int) -> Array:
    """The inverse of `_pack`: at least `count` codes, in whole groups of 8; those beyond are the padding bits."""
    groups = -(-count // 8)
    padded = np.zeros((groups + 1) * width + 4, np.uint8)  # every word lies inside, also for no group at all
    padded[: packed.size] = packed
    codes = np.empty((groups, 8), np.uint16)
    for i in range(8):
        byte, shift = divmod(i * width, 8)
        words: Array = np.ndarray((groups,), "<u4", padded.data, byte, (width,))  # one 4-byte word per group
        codes[:, i] = words >> shift & (1 << width) - 1
    return codes.reshape(-1)


# Shared by both


def _check(ok: object, where: str, what: str, expected: object, got: object) -> None:
    if not ok:
        raise FileError(f"{where}: {what}: expected {expected}, got {_show(got)}", _HINT)


def _show(value: object) -> str:
    """A short one-line text without control characters, whatever a file put there."""
    return f"{value:,}" if type(value) is int and value < 1 << 64 else _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _check_name(where: str, name: str) -> None:
    _check(name and name.isprintable(), where, "name", "printable characters", name)
    _check(len(name) <= MAX_NAME_CHARS, where, "length of the name", f"at most {MAX_NAME_CHARS} characters", len(name))
    _check(name != "__metadata__" and not name.endswith(_RESERVED), where, "name", "none that the format uses", name)


def _check_dtype(where: str, dtype: object, pruned: bool) -> None:
    known = PRUNABLE_DTYPES if pruned else tuple(DTYPES)
    _check(isinstance(dtype, str) and dtype in known, where, "dtype", ", ".join(known), dtype)


def _check_shape(where: str, shape: object) -> None:
    ok = isinstance(shape, list) and len(shape) <= MAX_DIMS and all(map(_is_count, shape))
    _check(ok, where, "shape", f"at most {MAX_DIMS} integers of at least 0", shape)
    assert isinstance(shape, list)
    elements = math.prod(max(size, 1) for size in shape)
    _check(elements <= MAX_ELEMENTS, where, "elements", f"at most {MAX_ELEMENTS:,}", shape)


def _pruned_bytes(entries: list[Entry]) -> int:
    return sum(entry.elements * entry.itemsize for entry in entries if entry.kept is not None)


def _expansion_limit(file_bytes: int) -> int:
    return max(EXPANSION_FLOOR, EXPANSION * file_bytes)


def _canonical(data: object) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _parse_json(where: str, text: str | bytes) -> dict[str, Any]:
    try:
        data = json.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where}: not valid JSON: {error}", _HINT) from error
    _check(isinstance(data, dict), where, "JSON", "an object", data)
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
    _check(got == n_bytes, str(path), "bytes left in the file", n_bytes, got)
    return buffer


@functools.cache
def _dtype_names() -> dict[torch.dtype, str]:
    import torch

    return {getattr(torch, attribute): name for name, (_, attribute) in DTYPES.items()}


def _bits_of(tensor: torch.Tensor) -> Array:
    """The bit patterns of a contiguous CPU tensor as unsigned integers [n]; shares its memory."""
    import torch

    array: Array = tensor.reshape(-1).view(torch.uint8).numpy()
    return array.view(f"<u{tensor.element_size()}")


def _tensor_of(bits: Array, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `_bits_of`."""
    import torch

    return torch.from_numpy(bits.view(np.uint8)).view(getattr(torch, DTYPES[dtype][1])).reshape(shape)
