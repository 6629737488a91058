"""A second reader of the format, written from docs/format.md alone: neither capcli nor safetensors is imported."""

import hashlib
import itertools
import json
import struct

import numpy as np

ITEMSIZE = {"F64": 8, "U64": 8, "I64": 8, "C64": 8, "F32": 4, "U32": 4, "I32": 4, "F16": 2, "BF16": 2, "U16": 2,
            "I16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}  # fmt: skip
POSITIONS = {"bitmask": ".cap.bitmask", "gap": ".cap.gaps", "rice": ".cap.rice", "blocks": ".cap.blocks",
             "groups": ".cap.groups"}  # fmt: skip


def read(raw: bytes) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (dtype, bit patterns in the tensor's shape)."""
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    text = header.pop("__metadata__")["cap"]
    metadata = json.loads(text)
    assert metadata["version"] in (1, 2, 3)
    assert metadata["checksum"] == hashlib.sha256(text.encode()[77:]).hexdigest()

    def stored(name: str) -> bytes:
        begin, end = header.pop(name)["data_offsets"]
        return raw[8 + length + begin : 8 + length + end]

    tensors = {name: decode(name, record, stored) for name, record in metadata["tensors"].items()}
    assert not header, "stored tensors that no record implies"
    return tensors


def decode(name: str, record: dict, stored) -> tuple[str, np.ndarray]:
    coding, dtype, shape = record["coding"], record["dtype"], record["shape"]
    n = int(np.prod(shape, dtype=np.int64))
    if coding == "factors":
        endings = [".cap.left", ".cap.right", *([".cap.scales"] if record["left"] == "I8" else [])]
    elif coding == "dense":
        endings = [".cap.values", ".cap.scales"] if "values" in record else [""]
    else:
        endings = [".cap.values", POSITIONS[coding], *([".cap.scales"] if "values" in record else [])]
    parts = [stored(name + ending) for ending in endings]
    assert record["sha256"] == hashlib.sha256(b"".join(parts)).hexdigest()
    if coding == "factors":
        return dtype, product(record, parts).view("<u4")
    word = f"<u{ITEMSIZE[dtype]}"
    if pattern := {"blocks": blocks, "groups": groups}.get(coding):
        filled = np.frombuffer(parts[0], np.uint8 if "values" in record else word)
        parts[0], filled = filled[filled != 0].tobytes(), filled != 0
    dense = values = int8(parts[0], parts[-1], dtype) if "values" in record else np.frombuffer(parts[0], word)
    if coding != "dense":
        found = pattern or {"bitmask": bitmask, "gap": gaps, "rice": rice}[coding]
        where = found(parts[1], n, record)
        where = where[filled] if pattern else where
        dense = np.zeros(n, values.dtype)
        dense[where] = values
    assert "kept" not in record or np.count_nonzero(dense) == record["kept"]
    return dtype, dense.reshape(shape)


def bits(raw: bytes, count: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(raw, np.uint8), count=count, bitorder="little")


def codes(raw: bytes, width: int, count: int) -> np.ndarray:
    return bits(raw, width * count).reshape(count, width).astype(np.int64) @ (1 << np.arange(width))


def bitmask(raw: bytes, n: int, record: dict) -> np.ndarray:
    return np.flatnonzero(bits(raw, n))


def gaps(raw: bytes, n: int, record: dict) -> np.ndarray:
    found = codes(raw, record["bits"], record["codes"])
    ends = found != (1 << record["bits"]) - 1
    return np.cumsum(found + ends)[ends] - 1


def rice(raw: bytes, n: int, record: dict) -> np.ndarray:
    b, c, k = record["bits"], record["codes"], record["kept"]
    ends, order = np.flatnonzero(bits(raw[: -(-c // 8)], c)), np.arange(k)
    return (ends - order << b) + np.cumsum(codes(raw[-(-c // 8) :], b, k)) + order


def blocks(raw: bytes, n: int, record: dict) -> np.ndarray:
    return (rice(raw, n // 4, {**record, "kept": record["blocks"]})[:, None] * 4 + np.arange(4)).reshape(-1)


def groups(raw: bytes, n: int, record: dict) -> np.ndarray:
    places = np.array(list(itertools.combinations(range(record["width"]), record["keep"])))
    count = n // record["width"]
    found = codes(raw, (len(places) - 1).bit_length(), count)
    return (np.arange(count)[:, None] * record["width"] + places[found]).reshape(-1)


def int8(raw: bytes, scales: bytes, dtype: str) -> np.ndarray:
    found = np.frombuffer(raw, np.int8)
    values = found * np.repeat(np.frombuffer(scales, "<f4"), 256)[: found.size]
    if dtype == "BF16":  # to the nearest, of two the even one
        wide = values.view("<u4").astype(np.uint64)
        return (wide + 0x7FFF + (wide >> 16 & 1) >> 16).astype("<u2")
    return values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).view(f"<u{ITEMSIZE[dtype]}")


def product(record: dict, parts: list[bytes]) -> np.ndarray:
    split = 4 * -(-len(parts[0]) // 256)
    sides = []
    for raw, dtype, part in zip(
        parts[:2], (record["left"], record["right"]), (slice(split), slice(split, None)), strict=True
    ):
        if dtype == "I8":
            sides.append(int8(raw, parts[2][part], "F32").view("<f4"))
        elif dtype == "BF16":
            sides.append((np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4"))
        else:
            sides.append(np.frombuffer(raw, {"F16": "<f2", "F32": "<f4"}[dtype]).astype("<f4"))
    rows, columns = record["shape"]
    return sides[0].reshape(rows, -1) @ sides[1].reshape(-1, columns)
