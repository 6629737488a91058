"""Files of the sparse format, whole, taken apart, damaged and edited: what the reader is to survive.

The tests take some thousand of the trials, `soak.py` a million. A trial raises `AssertionError` when the reader accepts
what means something else, and whatever it itself raises besides `FileError`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sparse_reader
import torch

from capcli.artifact import codings, reader, writer
from capcli.artifact.entry import DTYPES, Factors, dtype_names
from capcli.errors import FileError

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
NAN_WITH_PAYLOAD = {"F32": 0x7FC12345, "F16": 0x7E21, "BF16": 0x7FD5, "F64": 0x7FF8000000012345}


def bits_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Same names, shapes, dtypes and bits."""
    return left.keys() == right.keys() and all(
        a.shape == right[name].shape and a.dtype == right[name].dtype and bits_of(a) == bits_of(right[name])
        for name, a in left.items()
    )


def matrix(shape: tuple[int, ...], sparsity: float, dtype: str = "F32", seed: int = 0) -> torch.Tensor:
    """Random bits, with -0.0, the smallest denormal and a NaN with a payload among them; a fraction is +0."""
    rng = np.random.default_rng(seed)
    n, itemsize = math.prod(shape), DTYPES[dtype][0]
    bits = rng.integers(1, 1 << (8 * itemsize - 1), n, dtype=f"u{itemsize}")
    special = [1 << (8 * itemsize - 1), 1, NAN_WITH_PAYLOAD[dtype]]
    bits[rng.random(n) < 0.1] = special[seed % 3]
    bits[rng.random(n) < sparsity] = 0
    return torch.from_numpy(bits.view(np.uint8)).view(TORCH_DTYPES[dtype]).reshape(shape)


PRUNED = {"gap": matrix((16, 16), 0.9, seed=3), "mask": matrix((3, 7), 0.5, "F16", seed=4)}
DENSE = {"bias": torch.tensor([1.0, 2.0, 3.0]), "flag": torch.tensor([True, False]), "none": torch.zeros(0, 3)}


class Parts:
    """A file in parts: records by tensor, stored tensors by name as [dtype, shape, bytes]."""

    def __init__(self, raw: bytes) -> None:
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        self.meta = json.loads(header.pop("__metadata__")["cap"])
        self.records: dict[str, Any] = self.meta["tensors"]
        self.stored = {
            name: [entry["dtype"], entry["shape"], raw[slice(*(8 + length + at for at in entry["data_offsets"]))]]
            for name, entry in header.items()
        }
        self.header: dict[str, Any] = {}  # entries of the header to replace
        self.cap: Any = None  # instead of the metadata text

    def codes(self, change: Callable[[list[int], int], list[int]]) -> None:
        """Replace the gap codes of `gap`; `change` gets the codes and the escape."""
        record = self.records["gap"]
        bits, count = record["bits"], record["codes"]
        old = codings.unpack(np.frombuffer(self.stored["gap.cap.gaps"][2], np.uint8), bits, count)
        new = np.array(change(old[:count].tolist(), (1 << bits) - 1), np.uint16)
        record["codes"] = new.size
        self.put("gap.cap.gaps", codings.pack(new, bits).tobytes())

    def put(self, name: str, data: bytes, itemsize: int = 1) -> None:
        self.stored[name][1:] = [[len(data) // itemsize], data]

    def pack(self) -> bytes:
        for name, record in self.records.items():
            if (
                isinstance(record, dict)
                and "sha256" in record
                and isinstance(record["sha256"], str)
                and "wrong" not in record["sha256"]
            ):
                kinds = ("", ".cap.left", ".cap.right", ".cap.values", ".cap.bitmask", ".cap.gaps", ".cap.rice")
                kinds += (".cap.blocks", ".cap.groups", ".cap.scales")
                data = b"".join(self.stored[name + kind][2] for kind in kinds if name + kind in self.stored)
                record["sha256"] = hashlib.sha256(data).hexdigest()
        text = self.cap
        if text is None:
            body = json.dumps(
                {k: v for k, v in self.meta.items() if k != "checksum"}, sort_keys=True, separators=(",", ":")
            )
            rest = f'",{body[1:]}'
            text = '{"checksum":"' + hashlib.sha256(rest.encode()).hexdigest() + rest
        header: dict[str, Any] = {"__metadata__": {"cap": text}}
        at = 0
        for name, (dtype, shape, data) in self.stored.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        for name, entry in self.header.items():
            header[name] = {**header.get(name, {}), **entry} if isinstance(entry, dict) else entry
        return framed(header, b"".join(data for _, _, data in self.stored.values()))


def framed(header: Any, data: bytes = b"") -> bytes:
    raw = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    )
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


def flip(raw: bytes, at: int, bit: int = 0) -> bytes:
    return raw[: at % len(raw)] + bytes([raw[at] ^ 1 << bit]) + raw[at % len(raw) + 1 :]


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """One to four random edits: bits, bytes, runs removed, repeated, moved or overwritten, digits changed."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at, length = rng.randrange(max(len(data), 1)), rng.choice([1, 1, 2, 4, 8, 64])
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            to = rng.randrange(max(len(data), 1))
            data[at : at + length], data[to : to + length] = data[to : to + length], data[at : at + length]
        elif kind == 5:
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57] or [0]
            data[rng.choice(digits) : 1 + rng.choice(digits)][:0] = b""
            data[rng.choice(digits)] = rng.choice(b"0123456789-.e")
        else:
            del data[at:]
    return bytes(data)


def outcome(path: Path, raw: bytes) -> dict[str, torch.Tensor] | None:
    """What `load` makes of `raw`; None for a `FileError`. Anything else fails the test."""
    path.write_bytes(raw)
    try:
        return reader.load(path)
    except FileError as error:
        assert error.message.isprintable()
        return None


def edited(value: Any, rng: random.Random) -> Any:
    """A JSON value with one leaf replaced."""
    if isinstance(value, dict | list) and value:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = copy.copy(value)
        value[key] = edited(value[key], rng)
        return value
    numbers = [-1, 0, 1, 2, 3, 7, 8, 9, 16, 255, 1 << 31, 1 << 40, 1 << 63, 1.0, True]
    other = [
        None,
        "",
        "gap",
        "bitmask",
        "dense",
        "rice",
        "blocks",
        "groups",
        "factors",
        "F16",
        "F32",
        "BF16",
        "U8",
        "I8",
        [],
        {},
    ]
    return value + rng.choice([-1, 1]) if type(value) is int and rng.random() < 0.5 else rng.choice(numbers + other)


def floats(shape: tuple[int, ...], sparsity: float = 0.0, dtype: str = "F32", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator)
    return tensor.masked_fill(torch.rand(shape, generator=generator) < sparsity, 0).to(TORCH_DTYPES[dtype])


QUANTISED = {
    "q": floats((40, 40), 0.9, seed=3),
    "qm": floats((6, 7), 0.5, "F16", seed=4),
    "qd": floats((3, 100), 0, "BF16"),
}
FACTORED = {
    "f": Factors(floats((5, 1), dtype="F16"), floats((1, 7), dtype="F32")),
    "fq": Factors(floats((4, 2)), floats((2, 3), dtype="BF16")),
}
PLAIN = {"p": floats((33, 40), 0.9, seed=5), "bias": torch.tensor([1.0, 2.0])}
VERSION_2 = {**QUANTISED, **FACTORED, **PLAIN}
PRUNED_2, QUANTISED_2 = ["q", "qm", "p"], [*QUANTISED, "fq"]


def alike(tensor: torch.Tensor, dtype: str, bits: np.ndarray, factored: bool) -> bool:
    """Whether both readers say the same: to the bit, the products of factors to rounding (where they are finite)."""
    if tuple(tensor.shape) != bits.shape or dtype_names()[tensor.dtype] != dtype:
        return False
    if not factored:
        return bits_of(tensor) == bits.tobytes()
    ours, theirs = tensor.numpy(), np.ascontiguousarray(bits).view("<f4")
    finite = np.isfinite(ours) & np.isfinite(theirs)
    return np.allclose(ours[finite], theirs[finite], rtol=1e-5, atol=1e-5 * np.abs(theirs[finite]).max(initial=0))


def in_pattern(shape: tuple[int, ...], keep: int, width: int, seed: int = 0, dtype: str = "F32") -> torch.Tensor:
    """Floats of which the `keep` largest of every `width` stay, or every third block of 4 where `keep` is 0."""
    tensor = floats(shape, seed=seed).reshape(-1, width)
    if not keep:
        blocks = torch.rand(len(tensor), 1, generator=torch.Generator().manual_seed(seed)) < 1 / 3
        return (tensor * blocks).masked_fill(~blocks, 0).reshape(shape).to(TORCH_DTYPES[dtype])
    order = tensor.abs().argsort(dim=1, descending=True)[:, :keep]
    kept = torch.zeros_like(tensor, dtype=torch.bool).scatter(1, order, True)
    return tensor.masked_fill(~kept, 0).reshape(shape).to(TORCH_DTYPES[dtype])


VERSION_3 = {
    "g": in_pattern((12, 16), 2, 4, 1, "F16"),
    "gq": in_pattern((40, 16), 1, 4, 2),
    "b": in_pattern((12, 16), 0, 4, 3),
    "bq": in_pattern((30, 32), 0, 4, 4, "BF16"),
    "bias": torch.tensor([1.0, 2.0]),
}
VERSION_3["g"].view(-1)[VERSION_3["g"].view(-1).nonzero()[5]] = 0.0  # a group, and a block, that are not full
VERSION_3["b"].view(-1)[VERSION_3["b"].view(-1).nonzero()[5]] = 0.0
PRUNED_3, QUANTISED_3 = ["g", "gq", "b", "bq"], ["gq", "bq"]

# Trials --------------------------------------------------------------------------------------------------------------


def whole_files(path: Path) -> tuple[bytes, bytes, bytes]:
    """A file of each version, with every coding."""
    writer.save(path, PRUNED | DENSE, PRUNED.keys())
    first = path.read_bytes()
    writer.save(path, VERSION_2, PRUNED_2, quantised=QUANTISED_2)
    second = path.read_bytes()
    writer.save(path, VERSION_3, PRUNED_3, quantised=QUANTISED_3)
    return first, second, path.read_bytes()


def mutate(path: Path, raw: bytes, tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """S2: bytes of a file are changed: it is refused, or means what it meant."""
    loaded = outcome(path, mutated(raw, rng))
    assert loaded is None or same(loaded, tensors)


def edit(path: Path, raw: bytes, rng: random.Random) -> bool:
    """S2: content of a file is changed, and its checksums fit; returns whether it was accepted.

    Whoever makes a file can make its checksums: what is then accepted must be what the page says it is.
    """
    parts = Parts(raw)
    if rng.random() < 0.5:
        parts.records.update(edited(parts.records, rng))
    else:
        stored = parts.stored[rng.choice(list(parts.stored))]
        if stored[2]:
            stored[2] = flip(stored[2], rng.randrange(len(stored[2])), rng.randrange(8))
    changed = parts.pack()
    loaded = outcome(path, changed)
    if loaded is None:
        return False
    with np.errstate(all="ignore"):
        by_hand = sparse_reader.read(changed)
    assert loaded.keys() == by_hand.keys()
    assert all(alike(loaded[name], *by_hand[name], factored=name in FACTORED) for name in loaded)
    return True


def round_trip(path: Path, tensors: dict[str, torch.Tensor], n_pruned: int) -> None:
    """S3: what was written is read again to the bit, also by the second reader."""
    sizes = writer.save(path, tensors, list(tensors)[:n_pruned])
    assert same(reader.load(path), tensors)
    assert sizes.weights_bytes <= sizes.dense_bytes == sum(len(bits_of(tensor)) for tensor in tensors.values())
    by_hand = sparse_reader.read(path.read_bytes())
    assert {name: (dtype, array.shape, array.tobytes()) for name, (dtype, array) in by_hand.items()} == {
        name: (dtype_names()[tensor.dtype], tuple(tensor.shape), bits_of(tensor)) for name, tensor in tensors.items()
    }


SIZES = (0, 1, 7, 8, 9, 63, 64, 65)
SPARSITIES = (0.0, 0.5, 0.97, 1.0)
MOST_ELEMENTS = 40_000


def drawn(rng: random.Random) -> dict[str, torch.Tensor]:
    """Four matrices of sizes at which codings begin and end a byte or a word."""
    found: dict[str, torch.Tensor] = {}
    while len(found) < 4:
        shape = tuple(rng.choices(SIZES, k=rng.randint(0, 4)))
        if math.prod(shape) <= MOST_ELEMENTS:
            tensor = matrix(shape, rng.choice(SPARSITIES), rng.choice(list(TORCH_DTYPES)), rng.randrange(2**32))
            found[f"layer.{len(found)}.weight"] = tensor
    return found
