"""A second reader of the format, written from docs/format.md alone: neither capcli nor safetensors is imported."""

import hashlib
import json
import struct

import numpy as np

ITEMSIZE = {"F64": 8, "U64": 8, "I64": 8, "C64": 8, "F32": 4, "U32": 4, "I32": 4, "F16": 2, "BF16": 2, "U16": 2,
            "I16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}  # fmt: skip


def read(raw: bytes) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (dtype, bit patterns in the tensor's shape)."""
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    text = header.pop("__metadata__")["cap"]
    metadata = json.loads(text)
    assert metadata["version"] == 1
    assert metadata["checksum"] == hashlib.sha256(text.encode()[77:]).hexdigest()

    def stored(name: str) -> bytes:
        begin, end = header.pop(name)["data_offsets"]
        return raw[8 + length + begin : 8 + length + end]

    tensors = {name: decode(name, record, stored) for name, record in metadata["tensors"].items()}
    assert not header, "stored tensors that no record implies"
    return tensors


def decode(name: str, record: dict, stored) -> tuple[str, np.ndarray]:
    coding, dtype, shape = record["coding"], record["dtype"], record["shape"]
    word = np.dtype(f"<u{ITEMSIZE[dtype]}")
    n = int(np.prod(shape, dtype=np.int64))
    if coding == "dense":
        data, where = stored(name), b""
        dense = np.frombuffer(data, word)
    else:
        data, where = (
            stored(name + ".cap.values"),
            stored(name + {"bitmask": ".cap.bitmask", "gap": ".cap.gaps"}[coding]),
        )
        dense = np.zeros(n, word)
        dense[gaps(where, record) if coding == "gap" else bitmask(where, n)] = np.frombuffer(data, word)
    assert record["sha256"] == hashlib.sha256(data + where).hexdigest()
    assert "kept" not in record or np.count_nonzero(dense) == record["kept"]
    return dtype, dense.reshape(shape)


def bitmask(where: bytes, n: int) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(np.frombuffer(where, np.uint8), count=n, bitorder="little"))


def gaps(where: bytes, record: dict) -> np.ndarray:
    b, c = record["bits"], record["codes"]
    bits = np.unpackbits(np.frombuffer(where, np.uint8), count=b * c, bitorder="little").reshape(c, b)
    codes = bits.astype(np.int64) @ (1 << np.arange(b))
    ends = codes != (1 << b) - 1
    return np.cumsum(codes + ends)[ends] - 1
