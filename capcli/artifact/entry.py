"""What a weight file may hold: one tensor's record, and the limits that hold before anything is allocated."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from capcli.artifact import codings, patterned
from capcli.artifact.codings import Array, check

if TYPE_CHECKING:
    import torch

# A file without int8 values and without factors is of version 1, one without patterns of version 1 or 2.
VERSIONS = (1, 2, 3)
# Of equally small codings, the first is written.
CODINGS = ("dense", "bitmask", "gap", "rice", "blocks", "groups")
OF_VERSION = {1: CODINGS[:3], 2: CODINGS[:4], 3: CODINGS}
PATTERNS = ("blocks", "groups")
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
STORED_ORDER = ("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2",
                 "I8", "U8", "BOOL")  # fmt: skip

POSITIONS = {coding: f".cap.{coding}" for coding in CODINGS[1:]} | {"gap": ".cap.gaps"}
_RESERVED = (".cap.values", ".cap.bitmask", ".cap.gaps", ".cap.rice", ".cap.scales", ".cap.left", ".cap.right",
             ".cap.blocks", ".cap.groups")  # fmt: skip
_N_RESERVED = {1: 3, 2: 7, 3: 9}  # of these, by version
PREFIX = '{"checksum":"'
CHECKSUM_END = len(PREFIX) + 64


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the model as the file stores it. `kept` is None for a tensor that was never pruned.

    `dtype` is that of the tensor itself. The values are stored in `values`, or in `dtype` when that is empty; factors
    in `left` and `right`. "I8" means quantised. `blocks`: how many are stored; `keep` of each group of `width`: the two
    patterns, in which values that are stored may be 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    coding: str
    kept: int | None
    bits: int = 0
    codes: int = 0
    blocks: int = 0
    keep: int = 0
    width: int = 0
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
        return {f"{self.name}.cap.values": (self.values or self.dtype, [self.stored])}

    @property
    def stored(self) -> int:
        """How many values are stored, without factors."""
        if self.coding in PATTERNS:
            return patterned.BLOCK * self.blocks or self.elements // self.width * self.keep
        return self.elements if self.coding == "dense" else self.kept or 0

    @property
    def parts(self) -> dict[str, tuple[str, list[int]]]:
        """Stored tensor name -> (dtype, shape): the values, then positions, then scales."""
        parts = self.value_parts
        groups = sum(codings.n_groups(math.prod(shape)) for dtype, shape in parts.values() if dtype == "I8")
        if self.coding in PATTERNS:  # a stored 0 has no part in a scale
            groups = codings.n_groups(self.kept or 0)
        if self.coding in POSITIONS:
            parts[self.name + POSITIONS[self.coding]] = ("U8", [self.position_bytes])
        if self.quantised:
            parts[f"{self.name}.cap.scales"] = ("F32", [groups])
        return parts

    @property
    def position_bytes(self) -> int:
        if self.coding in ("rice", "blocks"):
            gaps = self.blocks if self.coding == "blocks" else self.kept or 0
            return -(-self.codes // 8) - (-gaps * self.bits // 8)
        if self.coding == "groups":
            return -(-self.elements // self.width * patterned.bits_of_group(self.keep, self.width) // 8)
        return -(-(self.elements if self.coding == "bitmask" else self.codes * self.bits) // 8)

    @property
    def bytes(self) -> int:
        """Bytes of the stored tensors."""
        return size_in_bytes(self.parts)

    @property
    def bound_bytes(self) -> float:
        """Information bound: n·H(s) bits for the positions of a pruned matrix, the same of blocks or groups where they
        are in a pattern, and the values at their stored width.

        A quantised value counts as one byte; its share of the scales is not in the bound.
        """
        values = size_in_bytes(self.value_parts)
        if self.kept is None:
            return float(values)
        return self._position_bits() / 8 + self.kept * (1 if self.values else self.itemsize)

    def _position_bits(self) -> float:
        if self.coding == "blocks":
            return entropy_bits(self.elements // patterned.BLOCK, self.blocks)
        if self.coding == "groups":
            return self.elements // self.width * math.log2(math.comb(self.width, self.keep))
        return entropy_bits(self.elements, self.kept or 0)


def size_in_bytes(parts: Mapping[str, tuple[str, list[int]]]) -> int:
    """Bytes of all parts together."""
    return sum(DTYPES[dtype][0] * math.prod(shape) for dtype, shape in parts.values())


@dataclass(frozen=True)
class Factors:
    """A float matrix [rows, cols] as the product of `left` [rows, r] and `right` [r, cols]; it is read as float32."""

    left: torch.Tensor
    right: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.left.shape[:-1], *self.right.shape[1:])


Tensors = Mapping[str, "torch.Tensor | Factors"]


def entropy_bits(n: int, kept: int) -> float:
    """n·H(s): the fewest bits that tell which `kept` of `n` elements are kept, when nothing else is known."""
    if kept in (0, n):
        return 0.0
    p = kept / n
    return -n * (p * math.log2(p) + (1 - p) * math.log1p(-p) / math.log(2))


# Shared by both


def is_count(value: object) -> bool:
    """Whether a value of a file is a whole number from 0 on, and no bool."""
    return type(value) is int and value >= 0


def check_name(where: str, name: str, version: int) -> None:
    """Raise `FileError` for a tensor's name that is empty, too long, not printable, or reserved by this version."""
    check(name and name.isprintable(), where, "name", "printable characters", name)
    check(len(name) <= MAX_NAME_CHARS, where, "length of the name", f"at most {MAX_NAME_CHARS} characters", len(name))
    reserved = _RESERVED[: _N_RESERVED[version]]
    free = name != "__metadata__" and not name.endswith(reserved)
    check(free, where, "name", "none that the format uses", name)


def check_dtype(where: str, dtype: object, known: tuple[str, ...]) -> None:
    """Raise `FileError` for a dtype outside `known`."""
    check(isinstance(dtype, str) and dtype in known, where, "dtype", ", ".join(known), dtype)


def check_shape(where: str, shape: object) -> None:
    """Raise `FileError` for a shape that is no short list of counts, or of too many elements."""
    ok = isinstance(shape, list) and len(shape) <= MAX_DIMS and all(map(is_count, shape))
    check(ok, where, "shape", f"at most {MAX_DIMS} integers of at least 0", shape)
    assert isinstance(shape, list)
    elements = math.prod(max(size, 1) for size in shape)
    check(elements <= MAX_ELEMENTS, where, "elements", f"at most {MAX_ELEMENTS:,}", shape)


def claimed_bytes(entries: list[Entry]) -> int:
    """Dense bytes of everything that can be much larger in memory than in the file."""
    claims = (entry for entry in entries if entry.kept is not None or entry.coding == "factors")
    return sum(entry.elements * entry.itemsize for entry in claims)


def expansion_limit(file_bytes: int) -> int:
    """Bytes that a file of `file_bytes` may become in memory at most."""
    return max(EXPANSION_FLOOR, EXPANSION * file_bytes)


def check_expansion(where: str, entries: list[Entry], file_bytes: int) -> None:
    """Raise `FileError` when the entries together would take more memory than the file allows."""
    claimed, limit = claimed_bytes(entries), expansion_limit(file_bytes)
    what = "dense bytes of the pruned matrices" + (" and factors" if any(e.rank for e in entries) else "")
    check(claimed <= limit, where, what, f"at most {limit:,}", claimed)


def header_bytes(header: dict[str, Any]) -> bytes:
    """A safetensors header: compact JSON, padded with spaces."""
    compact = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return compact + b" " * (-len(compact) % 8)


def canonical_json(data: object) -> str:
    """JSON as the format writes it: sorted keys, no spaces, ASCII."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(*parts: Array) -> str:
    """sha256 of the parts, one after the other, as lower-case hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.view(np.uint8).data)
    return digest.hexdigest()


@functools.cache
def dtype_names() -> dict[torch.dtype, str]:
    """The names of the dtypes that the format knows, as messages list them."""
    import torch

    return {getattr(torch, attribute): name for name, (_, attribute) in DTYPES.items()}


def floats_of(where: str, tensor: torch.Tensor) -> Array:
    """The elements [n] of a CPU tensor to be quantised, in 32 bits. Raises `FileError` for one that is not finite."""
    values: Array = tensor.float().reshape(-1).numpy()
    check(np.isfinite(values).all(), where, "values to be quantised", "finite numbers", "NaN or infinity")
    return values


def bits_of(tensor: torch.Tensor) -> Array:
    """The bit patterns of a contiguous CPU tensor as unsigned integers [n]; shares its memory."""
    import torch

    if not tensor.numel():  # torch does not view an empty tensor that came from numpy
        return np.empty(0, f"<u{tensor.element_size()}")
    array: Array = tensor.reshape(-1).view(torch.uint8).numpy()
    return array.view(f"<u{tensor.element_size()}")


def tensor_of(bits: Array, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `bits_of`."""
    import torch

    return torch.from_numpy(bits.view(np.uint8)).view(getattr(torch, DTYPES[dtype][1])).reshape(shape)
