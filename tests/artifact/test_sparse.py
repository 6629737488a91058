"""The file format: round trips, golden bytes, size, and a reader that accepts nothing but what was written.

The labels S1-S4 are those of the page on reliability. How files are changed says `mutants.py`.
"""

import gzip
import hashlib
import json
import math
import os
import random
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sparse_reader
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants import (
    DENSE,
    MOST_ELEMENTS,
    PRUNED,
    PRUNED_2,
    QUANTISED_2,
    SIZES,
    SPARSITIES,
    TORCH_DTYPES,
    VERSION_2,
    Parts,
    alike,
    edit,
    flip,
    floats,
    framed,
    matrix,
    mutate,
    round_trip,
    same,
)
from tiny import ROOT

from capcli.artifact import codings, reader, writer
from capcli.artifact.entry import (
    CHECKSUM_END,
    DTYPES,
    EXPANSION,
    EXPANSION_FLOOR,
    FLOAT_DTYPES,
    MAX_BRACKETS,
    MAX_DIMS,
    MAX_ELEMENTS,
    MAX_HEADER_BYTES,
    MAX_NAME_CHARS,
    MAX_TENSORS,
    VERSIONS,
    Factors,
    entropy_bits,
)
from capcli.errors import ConfigError, FileError
from capcli.stored import show

FUZZ = 5_000  # mutations in each of four tests
PAGE = (ROOT / "docs" / "format.md").read_text("utf-8")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.cap.safetensors"


# Round trips (S3)

SHAPES = st.lists(st.sampled_from(SIZES), max_size=4).filter(lambda shape: math.prod(shape) <= MOST_ELEMENTS).map(tuple)
MATRICES = st.builds(
    matrix, SHAPES, st.sampled_from(SPARSITIES), st.sampled_from(list(TORCH_DTYPES)), st.integers(0, 999)
)


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(MATRICES, min_size=4, max_size=4), st.integers(0, 4))
def test_round_trip_is_bit_equal(tmp_path_factory, matrices, n_pruned):
    tensors = {f"layer.{i}.weight": tensor for i, tensor in enumerate(matrices)}
    round_trip(tmp_path_factory.getbasetemp() / "round_trip.safetensors", tensors, n_pruned)


@pytest.mark.parametrize("width", range(2, 17))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_codes_of_every_width_are_packed_and_unpacked(width, count):
    codes = np.random.default_rng(width).integers(0, 1 << width, count).astype(np.uint16)
    packed = codings.pack(codes, width)
    slow = "".join(f"{code:0{width}b}"[::-1] for code in codes)
    assert packed.tobytes() == bytes(int(slow[i : i + 8][::-1], 2) for i in range(0, len(slow), 8))
    assert codings.unpack(packed, width, count)[:count].tolist() == codes.tolist()


@pytest.mark.parametrize("far", [0, 1, 65_534, 65_535, 65_536, 131_069, 131_070, 131_071, 999_990])
def test_gaps_beyond_the_widest_code(path, far):
    tensor = torch.zeros(1_000_000)
    tensor[[far, far + 1, far + 9]] = -0.0
    writer.save(path, {"w": tensor}, ["w"])
    assert same(reader.load(path), {"w": tensor})


def test_every_dtype_is_kept_in_tensors_that_are_not_pruned(path):
    tensors = {name: torch.ones(3, 5).to(getattr(torch, torch_name)) for name, (_, torch_name) in DTYPES.items()}
    writer.save(path, tensors, [])
    assert same(reader.load(path), dict(sorted(tensors.items())))
    assert {name: entry[0] for name, entry in sparse_reader.read(path.read_bytes()).items()} == {n: n for n in tensors}


def test_tied_transposed_and_trainable_tensors(path):
    base = torch.nn.Parameter(torch.randn(4, 6))
    tensors = {"a": base, "b": base, "c": base.T, "d": base[1:3], "e": base[:, 2]}
    writer.save(path, tensors, ["b", "c"])
    assert same(reader.load(path), tensors)


def test_names_come_back_sorted(path):
    writer.save(path, {"z": torch.ones(1), "ä b/../c": torch.ones(2), "a": torch.ones(3)}, ["a"])
    assert list(reader.load(path)) == ["a", "z", "ä b/../c"]


def test_a_file_without_tensors(path):
    writer.save(path, {}, [])
    assert reader.load(path) == {} == sparse_reader.read(path.read_bytes())


# Golden bytes


def example() -> dict[str, torch.Tensor]:
    """The tensors of the example of docs/format.md."""
    w = torch.zeros(64, dtype=torch.float16)
    w[[0, 2, 5, 15]] = torch.tensor([1.5, -2.0, -0.0, 2.0**-24], dtype=torch.float16)
    return {"w": w.reshape(4, 16), "b": torch.tensor([1, 2], dtype=torch.uint8)}


def block(kind: str) -> str:
    found = re.search(f"```{kind}\n(.*?)\n```", PAGE, re.DOTALL)
    assert found
    return found[1]


def test_golden_bytes_are_those_of_the_page(path):
    writer.save(path, example(), ["w"])
    header = block("header").encode()
    expected = bytes.fromhex(block("length")) + header + b" " * (-len(header) % 8) + bytes.fromhex(block("data"))
    assert path.read_bytes() == expected
    assert json.loads(json.loads(header)["__metadata__"]["cap"]) == json.loads(block("json"))
    assert hashlib.sha256(expected).hexdigest() == "a00353d889d1a4302647014b2f035d9d9fcc058e3e9c59c0d075d691efe61d6f"


def test_same_input_same_bytes(path):
    tensors = {f"w{i}": matrix((9, 65), 0.9, seed=i) for i in range(20)}
    writer.save(path, tensors, list(tensors))
    first = path.read_bytes()
    writer.save(path, dict(reversed(tensors.items())), set(tensors))
    assert path.read_bytes() == first


def test_the_limits_on_the_page_are_those_of_the_code():
    limits = [MAX_HEADER_BYTES, MAX_BRACKETS, MAX_TENSORS, MAX_ELEMENTS, EXPANSION]
    for limit in [*limits, EXPANSION_FLOOR, MAX_NAME_CHARS, MAX_DIMS]:
        assert f"| {limit:,}" in PAGE or f" {limit:,} " in PAGE, limit
    assert f"{codings.MIN_BITS} ≤ b ≤ {codings.MAX_BITS}" in PAGE
    assert "format versions {}, {} and {}".format(*VERSIONS) in PAGE
    assert all(f"`{dtype}`" in PAGE for dtype in DTYPES)
    assert f"from its byte {CHECKSUM_END} on" in PAGE


# Size


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("sparsity", [0.80, 0.85, 0.90, 0.93, 0.95, 0.97, 0.98, 0.99])
def test_within_5_percent_of_the_information_bound(path, dtype, sparsity):
    sizes = writer.save(path, {"w": matrix((700, 700), sparsity, dtype)}, ["w"])
    assert sizes.pruned_bytes <= 1.05 * sizes.pruned_bound_bytes
    assert sizes.bound_bytes == sizes.pruned_bound_bytes <= sizes.weights_bytes == sizes.pruned_bytes
    assert sizes.file_bytes == path.stat().st_size < sizes.weights_bytes + 800


@pytest.mark.parametrize(
    ("positions", "n", "coding"),
    [
        (range(64), 64, "dense"),
        (range(62), 64, "dense"),  # 2 values saved, 8 bytes: as much as the mask takes
        (range(61), 64, "bitmask"),
        (range(0, 64, 2), 64, "groups"),
        (range(0, 62, 2), 62, "groups"),
        ([*range(0, 60, 2), *range(60, 64)], 64, "bitmask"),
        (range(0, 64, 16), 64, "groups"),
        ((0, 1, 40, 63), 64, "gap"),
        (range(48), 64, "blocks"),
        ([*range(16, 20), *range(40, 44)], 64, "blocks"),
        ((), 64, "gap"),
        ((), 0, "dense"),
        ((0,), 1, "dense"),
    ],
)
def test_the_smallest_coding_is_chosen(path, positions, n, coding):
    tensor = torch.zeros(n)
    tensor[list(positions)] = 1
    sizes = writer.save(path, {"w": tensor}, ["w"])
    (entry,) = reader.inspect(path)
    assert (entry.coding, entry.kept, entry.shape, entry.dtype) == (coding, len(positions), (n,), "F32")
    assert entry.bytes == sizes.pruned_bytes == sizes.weights_bytes
    assert same(reader.load(path), {"w": tensor})


def test_entropy_by_hand():
    assert entropy_bits(8, 4) == pytest.approx(8)
    assert entropy_bits(4, 1) == pytest.approx(-4 * (0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)))
    assert entropy_bits(9, 0) == entropy_bits(9, 9) == entropy_bits(0, 0) == 0
    assert entropy_bits(10**12, 1) == pytest.approx(math.log2(10**12) + 1 / math.log(2), rel=1e-6)


def test_inspect_tells_pruned_from_never_pruned(path):
    writer.save(path, {"never": torch.ones(3), "full": torch.ones(3)}, ["full"])
    assert [(entry.name, entry.coding, entry.kept) for entry in reader.inspect(path)] == [
        ("full", "dense", 3),
        ("never", "dense", None),
    ]


# What the writer refuses


@pytest.mark.parametrize(
    ("name", "tensor", "pruned", "message"),
    [
        ("w.cap.values", torch.ones(1), False, "none that the format uses"),
        ("w.cap.gaps", torch.ones(1), False, "none that the format uses"),
        ("__metadata__", torch.ones(1), False, "none that the format uses"),
        ("", torch.ones(1), False, "printable"),
        ("a\x1b[2J", torch.ones(1), False, "printable"),
        ("a\ud800", torch.ones(1), False, "printable"),
        ("a" * 257, torch.ones(1), False, "at most 256 characters, got 257"),
        ("w", torch.ones(1, dtype=torch.int64), True, "dtype: expected F16, BF16, F32, F64, got 'I64'"),
        ("w", torch.ones(1, dtype=torch.complex128), False, "got 'torch.complex128'"),
        ("w", torch.ones([1] * 9), True, "at most 8 integers"),
    ],
)
def test_the_writer_refuses_what_the_reader_would(path, name, tensor, pruned, message):
    with pytest.raises(FileError, match=re.escape(message)) as caught:
        writer.save(path, {name: tensor}, [name] if pruned else [])
    assert caught.value.message.startswith(f"cannot write {path}") and caught.value.message.isprintable()
    assert not path.exists()


def test_the_writer_refuses_a_header_that_is_too_large(path):
    with pytest.raises(FileError, match="header bytes: expected at most 8,388,608"):
        writer.save(path, {f"{'é' * 200}{i}": torch.ones(0) for i in range(9_000)}, [])
    with pytest.raises(FileError, match="brackets in the header"):
        writer.save(path, {f"{'[' * 20}{i}": torch.ones(0) for i in range(9_000)}, [])
    with pytest.raises(FileError, match="number of tensors: expected at most 10,000, got 10,001"):
        writer.save(path, {str(i): torch.ones(0) for i in range(10_001)}, [])


@pytest.mark.slow
def test_ten_thousand_pruned_matrices_fit(path):
    tensors = {f"a_rather_long_name.{i}.weight": torch.zeros(64, 1) for i in range(10_000)}
    writer.save(path, tensors, tensors.keys())
    assert len(reader.inspect(path)) == 10_000


def test_matrices_too_empty_for_the_readers_limit_become_bitmasks(path):
    tensor = torch.zeros(4097, 4096)
    assert writer.save(path, {"w": tensor}, ["w"]).weights_bytes == 4097 * 512
    assert reader.inspect(path)[0].coding == "bitmask"
    assert torch.equal(reader.load(path)["w"], tensor)


# Malformed files (S1): a good file taken apart, changed, and put together again with fitting checksums


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    writer.save(path, PRUNED | DENSE, PRUNED.keys())
    assert [(e.name, e.coding) for e in reader.inspect(path)] == [
        ("bias", "dense"), ("flag", "dense"), ("gap", "gap"), ("mask", "bitmask"), ("none", "dense")]  # fmt: skip
    return path.read_bytes()


def test_taking_apart_and_putting_together_changes_nothing(good):
    assert Parts(good).pack() == good


def refused(path: Path, raw: bytes, peak_bytes: int = 2 << 20) -> str:
    """The message with which `load` refuses `raw`, having allocated little; `inspect` must fail alike or not at all."""
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(FileError) as caught:
            reader.load(path)
        assert tracemalloc.get_traced_memory()[1] < peak_bytes + 4 * len(raw)
    finally:
        tracemalloc.stop()
    try:
        reader.inspect(path)
    except FileError as error:
        assert error.message == caught.value.message
    message = caught.value.message
    assert str(path) in message and message.isprintable() and len(message) < 700
    return message


def header_length(length: int) -> Callable[[bytes], bytes]:
    return lambda raw: length.to_bytes(8, "little") + raw[8:]


def in_header(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + length].rstrip()
        assert old in header
        return framed(header.replace(old, new, 1), raw[8 + length :])

    return change


RAW = {
    "empty": (lambda raw: b"", "file size: expected at least 10 bytes, got 0"),
    "7 bytes": (lambda raw: raw[:7], "file size: expected at least 10 bytes, got 7"),
    "9 bytes": (lambda raw: raw[:9], "file size"),
    "gzip": (lambda raw: gzip.compress(bytes(1 << 20), mtime=0), "header length"),
    "pickle": (lambda raw: b"\x80\x04\x95" + bytes(99), "header length"),
    "length 0": (header_length(0), "header length: expected 2 to"),
    "length 1": (header_length(1), "header length"),
    "length + 8": (lambda raw: header_length(int.from_bytes(raw[:8], "little") + 8)(raw), "not valid JSON"),
    "length beyond file": (lambda raw: header_length(len(raw) - 7)(raw), "header length"),
    "length 100 MB": (header_length(100_000_000), "header length"),
    "length 2^63": (header_length(1 << 63), "header length"),
    "length 2^64-1": (header_length((1 << 64) - 1), "header length"),
    "not UTF-8": (lambda raw: framed(b'{"\xff":1}'), "not valid JSON"),
    "UTF-16": (lambda raw: framed('{"a":1}'.encode("utf-16")), "not valid JSON"),
    "not JSON": (lambda raw: framed(b"{hello}"), "not valid JSON"),
    "array": (lambda raw: framed([]), "an object"),
    "number": (lambda raw: framed(b"12345678"), "an object"),
    "deep": (lambda raw: framed(b"[" * 100_000), "not valid JSON"),
    "deep object": (lambda raw: framed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "not valid JSON|header"),
    "huge number": (lambda raw: framed(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "NaN": (lambda raw: framed(b'{"a":NaN}'), "keys: expected only 'cap'"),
    "lone surrogate": (lambda raw: framed(b'{"\\ud800":1}'), "surrogates"),
    "key twice": (lambda raw: framed(b'{"a":1,"a":1}'), "without repeated keys"),
    "spaces": (lambda raw: framed(b'{ "a":1}'), "compact JSON"),
    "no metadata": (lambda raw: framed({}), "__metadata__: keys: expected only 'cap', got None"),
    "metadata not an object": (lambda raw: framed({"__metadata__": "cap"}), "keys"),
    "other metadata": (lambda raw: framed({"__metadata__": {"format": "pt"}}), "keys"),
    "more metadata": (lambda raw: framed({"__metadata__": {"cap": "{}", "format": "pt"}}), "keys"),
    "cap not a string": (lambda raw: framed({"__metadata__": {"cap": {}}}), "a string"),
    "cap not JSON": (lambda raw: framed({"__metadata__": {"cap": "{"}}), "not valid JSON"),
    "cap an array": (lambda raw: framed({"__metadata__": {"cap": "[]"}}), "an object"),
    "trailing byte": (lambda raw: raw + b"\0", "file size"),
    "trailing file": (lambda raw: raw + raw, "file size"),
    "one byte short": (lambda raw: raw[:-1], "file size"),
    "offsets float": (in_header(b'"data_offsets":[0,', b'"data_offsets":[0.0,'), "two integers"),
    "offsets bool": (in_header(b'"data_offsets":[0,', b'"data_offsets":[false,'), "two integers"),
    "offsets three": (in_header(b'"data_offsets":[0,', b'"data_offsets":[0,0,'), "two integers"),
    "offsets negative": (in_header(b'"data_offsets":[0,', b'"data_offsets":[-1,'), "two integers"),
    "offsets huge": (in_header(b'"data_offsets":[0,', b'"data_offsets":[%d,' % (1 << 70)), "bytes"),
    "offsets object": (in_header(b'"data_offsets":[0,', b'"data_offsets":{},"x":[0,'), "header entry"),
    "stored shape float": (in_header(b'"shape":[3],"data', b'"shape":[3.0],"data'), "header entry"),
    "stored shape bool": (in_header(b'"shape":[0,3],"data', b'"shape":[false,3],"data'), "header entry"),
    "stored shape other, no bytes": (in_header(b'"shape":[0,3],"data', b'"shape":[0,4],"data'), "header entry"),
    "stored dtype other": (in_header(b'"dtype":"U8","shape":[3],"data', b'"dtype":"I8","shape":[3],"data'), "header entry"),  # noqa: E501
    "data bit": (lambda raw: flip(raw, len(raw) - 1), "sha256 of the stored bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", RAW)
def test_malformed_bytes(path, good, case):
    change, message = RAW[case]
    assert re.search(message, refused(path, change(good)))


def record(name: str, **changes: Any) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        for key, value in changes.items():
            parts.records[name].pop(key, None)
            if value is not ...:
                parts.records[name][key] = value

    return change


def meta(**changes: Any) -> Callable[[Parts], None]:
    return lambda parts: parts.meta.update(changes)


def header(**changes: Any) -> Callable[[Parts], None]:
    return lambda parts: parts.header.update({name.replace("__", "."): value for name, value in changes.items()})


def cap(change: Callable[[str], str]) -> Callable[[Parts], None]:
    def apply(parts: Parts) -> None:
        parts.cap = change(
            json.loads(parts.pack()[8:].split(b"     ")[0].partition(b',"gap.cap')[0] + b"}")["__metadata__"]["cap"]
        )

    return apply


def stored(name: str, change: Callable[[bytes], bytes], itemsize: int = 1) -> Callable[[Parts], None]:
    return lambda parts: parts.put(name, change(parts.stored[name][2]), itemsize)


def rename(old: str, new: str) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.records[new] = parts.records.pop(old)
        parts.stored[new] = parts.stored.pop(old)

    return change


def drop(name: str) -> Callable[[Parts], None]:
    return lambda parts: [parts.stored.pop(name), None][1]


def extra_tensor(parts: Parts) -> None:
    parts.stored["more"] = ["U8", [1], b"\0"]


def claimed(parts: Parts) -> None:
    parts.records["gap"]["shape"] = [1 << 20, 1 << 20]


def zero_value(parts: Parts) -> None:
    parts.put("gap.cap.values", bytes(4) + parts.stored["gap.cap.values"][2][4:], 4)


def no_tensors(parts: Parts) -> None:
    parts.meta["tensors"], parts.records = [], {}


def overlap(parts: Parts) -> None:
    parts.header["gap.cap.values"] = {"data_offsets": [0, len(parts.stored["gap.cap.values"][2])]}


def resized(name: str, by: int) -> Callable[[Parts], None]:
    """Other bytes than the shape says."""
    return lambda parts: parts.stored[name].__setitem__(2, (parts.stored[name][2] + bytes(9))[: by - 9])


def codes(change: Callable[[list[int], int], list[int]]) -> Callable[[Parts], None]:
    return lambda parts: parts.codes(change)


def beyond(by: int) -> Callable[[Parts], None]:
    """Every kept element, except that the first gap is so long that the last position is n - 1 + by."""

    # The stream of the good file starts with a gap below the escape.
    def longer(codes: list[int], escape: int) -> list[int]:
        last = sum(code + (code != escape) for code in codes) - 1
        return [*divide(codes[0] + 255 + by - last, escape), *codes[1:]] if codes[0] != escape else codes

    def divide(gap: int, escape: int) -> list[int]:
        return [escape] * (gap // escape) + [gap % escape]

    return lambda parts: parts.codes(longer)


def padded_gaps(parts: Parts) -> None:
    assert parts.records["gap"]["codes"] * parts.records["gap"]["bits"] % 8
    parts.put("gap.cap.gaps", flip(parts.stored["gap.cap.gaps"][2], -1, 7))


def fewer_kept(parts: Parts) -> None:
    parts.records["gap"]["kept"] -= 1
    parts.put("gap.cap.values", parts.stored["gap.cap.values"][2][4:], 4)


def more_kept(parts: Parts) -> None:
    parts.records["gap"]["kept"] += 1
    parts.put("gap.cap.values", parts.stored["gap.cap.values"][2] + b"\1\1\1\1", 4)


CHANGED: dict[str, tuple[Callable[[Parts], Any], str]] = {
    "version 0": (meta(version=0), "format version: expected 1, 2 or 3, got 0"),
    "version 999": (meta(version=999), "format version: expected 1, 2 or 3, got 999"),
    "version true": (meta(version=True), "format version"),
    "version 1.0": (meta(version=1.0), "format version"),
    "version text": (meta(version="1"), "format version"),
    "version missing": (lambda parts: parts.meta.pop("version"), "format version: expected 1, 2 or 3, got None"),
    "unknown key": (meta(more=1), "keys: expected checksum, extra, tensors, version"),
    "extra not an object": (meta(extra=[]), "extra: expected an object"),
    "tensors not an object": (no_tensors, "tensors: expected an object"),
    "checksum wrong": (cap(lambda text: text[:13] + "0" * 64 + text[77:]), "checksum: expected"),
    "checksum upper case": (cap(lambda text: text[:13] + text[13:77].upper() + text[77:]), "checksum: expected"),
    "metadata with spaces": (cap(lambda text: text.replace(",", ", ")), "compact JSON with sorted keys"),
    "metadata key twice": (cap(lambda text: text[:-1] + ',"version":1}'), "compact JSON"),
    "metadata changed": (cap(lambda text: text.replace('"extra":{}', '"extra":{"k":2}')), "checksum: expected"),
    "record not an object": (lambda parts: parts.records.update(gap=[]), "tensor 'gap': coding"),
    "coding unknown": (record("gap", coding="lzma"), "coding: expected dense, bitmask, gap"),
    "coding a list": (record("gap", coding=["gap"]), "coding"),
    "coding missing": (record("gap", coding=...), "coding"),
    "record key unknown": (record("gap", more=1), "tensor 'gap': keys"),
    "record key missing": (record("gap", kept=...), "tensor 'gap': keys"),
    "bits for a bitmask": (record("mask", bits=3), "tensor 'mask': keys"),
    "shape negative": (record("gap", shape=[-16, 16]), "shape: expected at most 8 integers of at least 0"),
    "shape negative twice": (record("gap", shape=[-16, -16]), "shape"),
    "shape float": (record("gap", shape=[16.0, 16]), "shape"),
    "shape bool": (record("gap", shape=[True, 256]), "shape"),
    "shape text": (record("gap", shape=["16", "16"]), "shape"),
    "shape a number": (record("gap", shape=256), "shape"),
    "shape null": (record("gap", shape=None), "shape"),
    "shape empty": (record("gap", shape=[]), "kept: expected 0 to 1"),
    "shape 9 dims": (record("gap", shape=[1] * 7 + [16, 16]), "shape"),
    "shape 2^62 x 4": (record("gap", shape=[1 << 62, 4]), "elements"),
    "shape 0 x 2^62": (record("none", shape=[0, 1 << 62]), "elements"),
    "shape 2^40": (claimed, "dense bytes of the pruned matrices: expected at most 67,108,864"),
    "shape too small": (record("gap", shape=[1, 100]), "last position: expected below 100"),
    "shape of a bitmask larger": (record("mask", shape=[4, 7]), "tensor 'mask.cap.bitmask': header entry"),
    "shape of a bias": (record("bias", shape=[4]), "tensor 'bias': header entry"),
    "dtype unknown": (record("gap", dtype="F128"), "dtype: expected F16, BF16, F32, F64, got 'F128'"),
    "dtype of positions": (record("gap", dtype="I32"), "dtype: expected F16"),
    "dtype a list": (record("gap", dtype=["F32"]), "dtype"),
    "dtype unlike values": (record("gap", dtype="F16"), "header entry"),
    "dtype unlike bias": (record("bias", dtype="I32"), "header entry"),
    "dtype of the stored gaps": (header(gap__cap__gaps={"dtype": "F8_E4M3"}), "header entry"),
    "dtype of the stored values": (header(gap__cap__values={"dtype": "I32"}), "header entry"),
    "stored entry a list": (header(gap__cap__gaps=[1]), "header entry: expected an object"),
    "stored entry with a key more": (header(gap__cap__gaps={"more": 1}), "header entry"),
    "kept 0 with values": (record("gap", kept=0), "header entry"),
    "kept above n": (record("gap", kept=257), "kept: expected 0 to 256, got 257"),
    "kept negative": (record("gap", kept=-1), "kept"),
    "kept float": (record("gap", kept=20.0), "kept"),
    "kept bool": (record("gap", kept=True), "kept"),
    "kept - 1 everywhere": (fewer_kept, "gaps: expected"),
    "kept + 1 everywhere": (more_kept, "gaps: expected"),
    "bits 1": (record("gap", bits=1), "bits: expected 2 to 16, got 1"),
    "bits 0": (record("gap", bits=0), "bits"),
    "bits 17": (record("gap", bits=17), "bits"),
    "bits huge": (record("gap", bits=1 << 40), "bits"),
    "bits bool": (record("gap", bits=True), "bits"),
    "codes below kept": (record("gap", codes=1), "codes: expected"),
    "codes above n": (record("gap", codes=257), "codes"),
    "codes float": (record("gap", codes=30.0), "codes"),
    "codes 2^62": (record("gap", codes=1 << 62), "codes"),
    "values one shorter": (stored("gap.cap.values", lambda raw: raw[4:], 4), "header entry"),
    "values one longer": (stored("gap.cap.values", lambda raw: raw + raw[:4], 4), "header entry"),
    "values of length 1": (stored("gap.cap.values", lambda raw: raw[:4], 4), "header entry"),
    "values odd bytes": (resized("gap.cap.values", -1), "bytes: expected"),
    "stored zero": (zero_value, "values other than 0"),
    "gaps one byte shorter": (stored("gap.cap.gaps", lambda raw: raw[:-1]), "header entry"),
    "gaps one byte longer": (stored("gap.cap.gaps", lambda raw: raw + b"\0"), "header entry"),
    "gaps padding bits": (padded_gaps, "padding bits of the gaps: expected zero"),
    "a gap less": (codes(lambda codes, _: codes[1:]), "gaps: expected"),
    "a gap more": (codes(lambda codes, _: [0, *codes]), "gaps: expected"),
    "ends in an escape": (codes(lambda codes, escape: [*codes, escape]), "last code: expected the end of a gap"),
    "beyond the end": (codes(lambda codes, escape: [*[escape] * 9, *codes]), "last position: expected below 256"),
    "one beyond the end": (beyond(1), "last position: expected below 256, got .*256"),
    "bitmask shorter": (stored("mask.cap.bitmask", lambda raw: raw[:-1]), "header entry"),
    "bitmask longer": (stored("mask.cap.bitmask", lambda raw: raw + b"\0"), "header entry"),
    "bitmask padding": (stored("mask.cap.bitmask", lambda raw: flip(raw, 2, 7)), "padding bits of the bitmask"),
    "bitmask a bit more or less": (stored("mask.cap.bitmask", lambda raw: flip(raw, 0)), "bits set in the bitmask"),
    "gap values missing": (drop("gap.cap.values"), r"expected \['gap.cap.values'\], got 'nothing"),
    "gap positions missing": (drop("gap.cap.gaps"), "stored tensors"),
    "bitmask missing": (drop("mask.cap.bitmask"), "stored tensors"),
    "bias missing": (drop("bias"), "stored tensors"),
    "tensor more": (extra_tensor, "stored tensors: expected only those the metadata name, got \\['more'\\]"),
    "two entries for one weight": (lambda parts: parts.stored.update(gap=["F32", [1], bytes(4)]), "stored tensors"),
    "name reserved": (rename("bias", "gap.cap.values"), "name: expected none that the format uses"),
    "name ESC": (rename("bias", "\x1b]0;title\x07"), "printable"),
    "name NUL": (rename("bias", "a\0"), "printable"),
    "name line break": (rename("bias", "a\r\n::error::x"), "printable"),
    "name right to left": (rename("bias", "a\u202eb"), "printable"),
    "name empty": (rename("bias", ""), "printable"),
    "name 10 kB": (rename("bias", "a" * 10_240), "at most 256 characters, got 10,240"),
    "sha256 wrong": (record("bias", sha256="wrong".ljust(64)), "tensor 'bias': sha256"),
    "sha256 short": (record("bias", sha256="wrong"), "64 hexadecimal digits"),
    "sha256 not text": (record("bias", sha256=7), "64 hexadecimal digits"),
    "hole": (lambda parts: parts.stored.update(hole=["U8", [9], bytes(9)]), "stored tensors"),
    "hole between": (resized("gap.cap.values", 4), "bytes: expected"),
    "overlap": (overlap, "offset in the file"),
    "boolean 2": (stored("flag", lambda raw: b"\2\1"), "booleans: expected 0 and 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED)
def test_malformed_content_with_fitting_checksums(path, good, case):
    check_refused(path, good, *CHANGED[case])


def check_refused(path, data, change, message):
    parts = Parts(data)
    change(parts)
    assert re.search(message, refused(path, parts.pack()))


def test_the_corpus_is_large_enough():
    assert len(RAW) + len(CHANGED) >= 60


@pytest.mark.parametrize("tenth", range(10))
def test_truncated(path, good, tenth):
    refused(path, good[: len(good) * tenth // 10])


@pytest.mark.parametrize(
    "kind", ["missing", "folder", "FIFO", "device", "symlink loop", "NUL in the name", "name too long"]
)
def test_not_a_regular_file(path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "symlink loop":
        path.symlink_to(path)
    target = {"device": Path("/dev/zero"), "NUL in the name": Path("a\0b"), "name too long": path / ("a" * 9999)}.get(
        kind, path
    )
    for read in (reader.load, reader.inspect):
        with pytest.raises(FileError, match=r"cannot read|expected a regular file"):
            read(target)


def test_a_link_to_a_file_is_read(path, good):
    (path.parent / "real").write_bytes(good)
    path.symlink_to("real")
    assert same(reader.load(path), dict(sorted((PRUNED | DENSE).items())))


# Bombs (S4)


def bombs() -> Iterator[tuple[str, Callable[[Parts], Any]]]:
    for power in (26, 31, 32, 40, 47, 48, 62, 63, 64):
        yield f"gap of 2^{power}", record("gap", shape=[1 << power])
        yield f"bitmask of 2^{power}", record("mask", shape=[1 << power])
    yield "dense of 2^40", record("bias", shape=[1 << 40])
    yield "values 2^40", record("gap", kept=1 << 40, codes=1 << 40, shape=[1 << 40])
    yield "many of 2^20", many


def many(parts: Parts) -> None:
    parts.records.update({f"w{i}": {**parts.records["gap"], "shape": [1 << 20]} for i in range(99)})


@pytest.mark.parametrize("name", dict(bombs()))
def test_claims_are_refused_before_allocation(path, good, name):
    parts = Parts(good)
    dict(bombs())[name](parts)
    refused(path, parts.pack(), peak_bytes=4 << 20)


@pytest.mark.parametrize(
    ("fill", "message"),
    [(b'"a":{},', "header length"), (b"[],", "brackets"), (b"{},", "brackets"), (b'"aa",', "header"), (b" ", "JSON")],
)
def test_large_headers(path, fill, message):
    """A header of a million tensors is refused by its length alone; one of the largest length costs little to parse."""
    length = 100_000_000 if message == "header length" else MAX_HEADER_BYTES
    header = b"[" + (fill * (length // len(fill)))[: length - 2].rstrip(b",") + b"]"
    raw = length.to_bytes(8, "little") + header.ljust(length)
    message_got = refused(path, raw, peak_bytes=160 << 20 if fill == b'"aa",' else 1 << 20)
    assert re.search(message, message_got)


def test_a_sparse_100_gb_file_is_not_read(path):
    path.touch()
    os.truncate(path, 100 << 30)
    tracemalloc.start()
    with pytest.raises(FileError, match="header length"):
        reader.load(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


# Fuzz (S2)


@pytest.mark.slow
def test_no_single_bit_can_be_flipped(path):
    writer.save(path, example(), ["w"])
    raw = path.read_bytes()
    for at in range(len(raw)):
        for bit in (5, at % 8):
            path.write_bytes(flip(raw, at, bit))
            with pytest.raises(FileError):
                reader.load(path)


@pytest.mark.slow
def test_mutated_bytes_are_refused_or_harmless(path, good):
    rng = random.Random(0)
    for _ in range(FUZZ):
        mutate(path, good, PRUNED | DENSE, rng)


@pytest.mark.slow
def test_edited_files_with_fitting_checksums_mean_the_same_to_both_readers(path, good):
    rng = random.Random(1)
    assert sum(edit(path, good, rng) for _ in range(FUZZ)) > FUZZ // 20


# Version 2: int8 values, factors, Rice codes

FLOATS = ["F32", "F16", "BF16"]


def product_of(factors: Factors) -> torch.Tensor:
    return factors.left.float() @ factors.right.float()


@pytest.fixture(scope="module")
def good_2(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good_2") / "good.safetensors"
    writer.save(path, VERSION_2, PRUNED_2, quantised=QUANTISED_2)
    assert {e.name: (e.coding, e.quantised) for e in reader.inspect(path)} == {
        "bias": ("dense", False), "f": ("factors", False), "fq": ("factors", True), "p": ("rice", False),
        "q": ("rice", True), "qd": ("dense", True), "qm": ("bitmask", True)}  # fmt: skip
    return path.read_bytes()


def test_golden_bytes_of_version_2_are_those_of_the_page(path):
    w = torch.zeros(64)
    w[[0, 3, 6, 23, 27]] = torch.tensor([1.0, -0.5, 0.001, 0.25, -1.0])
    left, right = torch.tensor([[1.0], [2.0], [3.0]]).half(), torch.tensor([[0.5, 0.0, -1.0, 2.0]]).half()
    tensors = {"w": w.reshape(4, 16), "m": Factors(left, right)}
    writer.save(path, tensors, ["w"], quantised=["w"])
    header = block("header2").encode()
    expected = bytes.fromhex(block("length2")) + header + b" " * (-len(header) % 8) + bytes.fromhex(block("data2"))
    assert path.read_bytes() == expected
    assert json.loads(json.loads(header)["__metadata__"]["cap"]) == json.loads(block("json2"))
    assert hashlib.sha256(expected).hexdigest() == "8f763c7c6977957c0dd1db80641697b2ee5e23b5fe6c246dc54d45babab7b5c7"
    loaded = reader.load(path)
    assert torch.equal(loaded["m"], left.float() @ right.float())
    scale = 127.0 * float.fromhex("0x1.0204p-7")
    expected_w = torch.zeros(64).index_put((torch.tensor([0, 3, 23, 27]),), torch.tensor([127.0, -64, 32, -127]))
    assert torch.equal(loaded["w"].reshape(-1), expected_w * scale / 127)


def test_a_file_without_the_new_codings_is_of_version_1(path):
    tensors = {"w": floats((64, 64), 0.97)}
    writer.save(path, tensors, ["w"])
    assert b'\\"version\\":1}' in path.read_bytes() and reader.inspect(path)[0].coding == "gap"
    writer.save(path, tensors | {"b": torch.ones(4)}, ["w"], quantised=["b"])
    assert b'\\"version\\":2}' in path.read_bytes() and reader.inspect(path)[1].coding == "rice"


QUANTISABLE = st.tuples(
    SHAPES, st.sampled_from(SPARSITIES), st.sampled_from(FLOATS), st.integers(0, 999), st.booleans()
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(QUANTISABLE, min_size=1, max_size=4), st.sampled_from([1e-44, 1e-30, 1.0, 300.0, 2.0**126]))
def test_quantised_values_are_close_and_stable(tmp_path_factory, specs, size):
    path = tmp_path_factory.getbasetemp() / "quantised.safetensors"
    tensors = {}
    for i, (shape, sparsity, dtype, seed, _) in enumerate(specs):
        largest = min(size, FLOAT_DTYPES[dtype] / 8)
        tensors[str(i)] = (floats(shape, sparsity, seed=seed).clamp(-3, 3).double() * largest).to(TORCH_DTYPES[dtype])
    pruned = [str(i) for i, spec in enumerate(specs) if spec[-1]]
    sizes = writer.save(path, tensors, pruned, quantised=tensors)
    assert sizes == writer.sizes(tensors, pruned, quantised=tensors)
    loaded = reader.load(path)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        step = max(float(tensor.abs().max()) / 127, 2.0**-126) if tensor.numel() else 0.0
        assert ((loaded[name].double() - tensor.double()).abs() <= step * 1.01).all()
    assert [entry.kept for entry in reader.inspect(path) if entry.name in pruned] == [
        int(loaded[name].count_nonzero()) for name in sorted(pruned)
    ]
    by_hand = sparse_reader.read(path.read_bytes())
    assert all(alike(loaded[name], *by_hand[name], factored=False) for name in loaded)
    first = path.read_bytes()
    writer.save(path, loaded, pruned, quantised=loaded)
    again = reader.load(path)
    assert all(torch.equal(again[name] != 0, loaded[name] != 0) for name in pruned)
    if all(spec[2] == "F32" for spec in specs):
        assert path.read_bytes() == first


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_numbers_stay_finite(path, dtype):
    largest = FLOAT_DTYPES[dtype]
    assert torch.finfo(TORCH_DTYPES[dtype]).max == largest
    tensor = torch.tensor([largest, -largest, largest / 3, 0], dtype=TORCH_DTYPES[dtype])
    writer.save(path, {"w": tensor}, [], quantised=["w"])
    torch.testing.assert_close(reader.load(path)["w"], tensor, rtol=0.01, atol=0)


@pytest.mark.parametrize("quantised", [[], ["m"]])
@pytest.mark.parametrize("dtypes", [("F32", "F32"), ("F16", "BF16")])
def test_factors_come_back_as_their_product(path, dtypes, quantised):
    left, right = (floats(shape, dtype=dtype) for shape, dtype in zip(((70, 9), (9, 300)), dtypes, strict=True))
    factors = Factors(left, right)
    sizes = writer.save(path, {"m": factors}, [], quantised=quantised)
    assert sizes == writer.sizes({"m": factors}, [], quantised=quantised)
    loaded = reader.load(path)["m"]
    (dtype, bits) = sparse_reader.read(path.read_bytes())["m"]
    assert loaded.dtype == torch.float32 and alike(loaded, dtype, bits, factored=True)
    expected = product_of(factors)
    assert float((loaded - expected).norm() / expected.norm()) < (0.02 if quantised else 1e-6)
    assert sizes.dense_bytes == 70 * 300 * 4
    values = left.numel() + right.numel()
    assert sizes.bound_bytes == (values if quantised else values * left.element_size())
    assert sizes.weights_bytes == sizes.bound_bytes + (4 * (3 + 11) if quantised else 0)


@pytest.mark.parametrize("shape", [(90, 40), (40, 90), (30, 30)])
def test_factors_are_the_best_of_their_rank(shape):
    matrix = floats(shape) @ torch.diag(torch.logspace(0, -3, shape[1]))
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    for rank in (1, 7, 14):
        factors = writer.factorised(matrix, rank)
        assert (factors.left.shape, factors.right.shape) == ((shape[0], rank), (rank, shape[1]))
        best = (u[:, :rank] * s[:rank] @ v[:rank] - matrix).norm()
        assert (product_of(factors) - matrix).norm() <= best * (1 + 1e-4)
        assert float(factors.left.norm(dim=0).amax()) == pytest.approx(
            float(factors.right.norm(dim=1).amax()), rel=1e-4
        )
        assert (factors.right.gather(1, factors.right.abs().argmax(dim=1, keepdim=True)) > 0).all()
        assert all(
            torch.equal(a, b)
            for a, b in zip(vars(factors).values(), vars(writer.factorised(matrix, rank)).values(), strict=True)
        )


def test_factors_of_a_matrix_of_zeros():
    assert torch.equal(product_of(writer.factorised(torch.zeros(9, 8), 2)), torch.zeros(9, 8))


@pytest.mark.parametrize(
    ("rank", "shape", "most"), [(0, (64, 32), "21"), (-1, (64, 32), "21"), (22, (64, 32), "21"), (1, (1, 9), "0")]
)
def test_ranks_that_save_nothing_are_refused(rank, shape, most):
    with pytest.raises(ConfigError, match=f"rank {rank} does not make") as caught:
        writer.factorised(torch.ones(shape), rank)
    assert f"from 1 to {most}" in caught.value.hint


def test_a_matrix_that_is_not_finite_has_no_factors():
    with pytest.raises(ConfigError, match="not finite"):
        writer.factorised(torch.full((9, 9), torch.inf), 1)


@pytest.mark.parametrize("dtype", ["I8", "F16", "F32"])
@pytest.mark.parametrize("sparsity", [0.80, 0.85, 0.90, 0.95, 0.97, 0.98, 0.99])
def test_version_2_is_within_2_5_percent_of_the_information_bound(path, dtype, sparsity):
    tensors = {"w": floats((700, 700), sparsity, "F32" if dtype == "I8" else dtype), "b": torch.ones(1)}
    sizes = writer.sizes(tensors, ["w"], quantised=["w", "b"] if dtype == "I8" else ["b"])
    assert sizes.pruned_bytes <= 1.025 * sizes.pruned_bound_bytes


@pytest.mark.parametrize(
    ("tensors", "pruned", "quantised", "message"),
    [
        ({"w": torch.tensor([1.0, torch.nan])}, [], ["w"], "tensor 'w': values to be quantised: expected finite"),
        ({"w": torch.tensor([0, -torch.inf])}, ["w"], ["w"], "tensor 'w': values to be quantised"),
        ({"w": Factors(torch.full((2, 1), torch.nan), torch.ones(1, 2))}, [], ["w"], "values to be quantised"),
        ({"w": torch.ones(2, dtype=torch.float64)}, [], ["w"], "dtype: expected F16, BF16, F32, got 'F64'"),
        ({"w": torch.ones(2, dtype=torch.int64)}, [], ["w"], "dtype: expected F16, BF16, F32, got 'I64'"),
        ({"w": Factors(torch.ones(2, 2), torch.ones(1, 2))}, [], [], "factors: expected [rows, rank]"),
        ({"w": Factors(torch.ones(2), torch.ones(2))}, [], [], "factors: expected [rows, rank]"),
        ({"w": Factors(torch.ones(2, 0), torch.ones(0, 2))}, [], [], "rank: expected 1 to 2, got 0"),
        ({"w": Factors(torch.ones(2, 3), torch.ones(3, 2))}, [], [], "rank: expected 1 to 2, got 3"),
        ({"w": Factors(torch.ones(2, 1).int(), torch.ones(1, 2))}, [], [], "dtype: expected F16, BF16, F32"),
        ({"w": Factors(torch.ones(2, 1).double(), torch.ones(1, 2))}, [], [], "dtype: expected F16, BF16, F32"),
        ({"w.cap.scales": torch.ones(1)}, [], [], "none that the format uses"),
        ({"w.cap.left": torch.ones(1)}, [], [], "none that the format uses"),
        ({"w": Factors(torch.ones(30_000, 1), torch.ones(1, 30_000))}, [], [], "dense bytes of the pruned"),
    ],
)  # fmt: skip
def test_what_version_2_cannot_hold_is_refused_before_writing(path, tensors, pruned, quantised, message):
    with pytest.raises(FileError, match=re.escape(message)) as caught:
        writer.save(path, tensors, pruned, quantised=quantised)
    assert caught.value.message.startswith(f"cannot write {path}") and not path.exists()
    with pytest.raises(FileError, match="cannot store the tensors: "):
        writer.sizes(tensors, pruned, quantised=quantised)


def scales(name: str, value: float) -> Callable[[Parts], None]:
    """The first scale of a tensor replaced."""
    raw = np.float32(value).tobytes()
    return lambda parts: parts.put(f"{name}.cap.scales", raw + parts.stored[f"{name}.cap.scales"][2][4:], 4)


def value_codes(name: str, code: int) -> Callable[[Parts], None]:
    """The first int8 code of a tensor replaced."""

    def change(parts: Parts) -> None:
        part = parts.stored[f"{name}.cap.values" if name != "fq" else "fq.cap.left"]
        part[2] = np.int8(code).tobytes() + part[2][1:]

    return change


def factor_shape(name: str, shape: list[int]) -> Callable[[Parts], None]:
    return lambda parts: parts.stored[name].__setitem__(1, shape)


def unneeded(name: str, dtype: str = "F32") -> Callable[[Parts], None]:
    return lambda parts: parts.stored.update({name: [dtype, [1], bytes(4)]})


def rice_bytes(change: Callable[[bytes], bytes]) -> Callable[[Parts], None]:
    return stored("p.cap.rice", change)


def last_one_moved(parts: Parts) -> None:
    """The unary stream ends in a zero: its last one stands where its last zero was."""
    count, raw = parts.records["p"]["codes"], parts.stored["p.cap.rice"][2]
    bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")
    bits[np.flatnonzero(bits[:count] == 0)[-1]] = 1
    bits[count - 1] = 0
    parts.put("p.cap.rice", np.packbits(bits, bitorder="little").tobytes())


CHANGED_2: dict[str, tuple[Callable[[Parts], Any], str]] = {
    "version 1 with values": (meta(version=1), "coding: expected dense, bitmask, gap, got|name|keys"),
    "version 4": (meta(version=4), "format version: expected 1, 2 or 3, got 4"),
    "values of another dtype": (record("q", values="U8"), "values: expected I8, got 'U8'"),
    "values null": (record("q", values=None), "values: expected I8"),
    "values missing": (record("q", values=...), "stored tensors|header entry"),
    "values of a bias": (record("bias", values="I8"), "stored tensors"),
    "values of factors": (record("f", values="I8"), "tensor 'f': keys"),
    "kept of a quantised dense tensor": (record("qd", kept=300), "tensor 'qd': keys"),
    "dtype of quantised values I32": (record("q", dtype="I32"), "dtype: expected F16, BF16, F32, got 'I32'"),
    "dtype of quantised values F64": (record("q", dtype="F64"), "dtype: expected F16, BF16, F32, got 'F64'"),
    "dtype of factors F16": (record("f", dtype="F16"), "dtype: expected F32, got 'F16'"),
    "dtype of a factor I32": (record("f", left="I32"), "dtypes of the factors: expected I8 twice"),
    "dtype of a factor a list": (record("f", left=["F16"]), "dtypes of the factors"),
    "dtype of a factor null": (record("f", left=None), "dtypes of the factors"),
    "one factor quantised": (record("fq", left="F16"), "dtypes of the factors"),
    "dtype unlike the factor": (record("f", left="BF16"), "tensor 'f.cap.left': header entry"),
    "left missing in the record": (record("f", left=...), "tensor 'f': keys"),
    "rank missing": (record("f", rank=...), "tensor 'f': keys"),
    "rank 0": (record("f", rank=0), "rank: expected 1 to 5, got 0"),
    "rank -1": (record("f", rank=-1), "rank"),
    "rank 2": (record("f", rank=2), "tensor 'f.cap.left': header entry"),
    "rank above": (record("f", rank=6), "rank: expected 1 to 5, got 6"),
    "rank 2^62": (record("f", rank=1 << 62), "rank"),
    "rank float": (record("f", rank=1.0), "rank"),
    "rank true": (record("f", rank=True), "rank"),
    "rank of a dense tensor": (record("bias", rank=1), "tensor 'bias': keys"),
    "bits of factors": (record("f", bits=3), "tensor 'f': keys"),
    "kept of factors": (record("f", kept=3), "tensor 'f': keys"),
    "ranks differ": (factor_shape("f.cap.right", [7, 1]), "tensor 'f.cap.right': header entry"),
    "factored shape of 1 dim": (record("f", shape=[35]), "shape of a matrix with factors: expected 2 integers"),
    "factored shape of 3 dims": (record("f", shape=[5, 7, 1]), "shape of a matrix with factors"),
    "factored shape empty": (record("f", shape=[0, 7]), "rank: expected 1 to 0"),
    "factored shape giant": (record("f", shape=[1 << 20, 1 << 20]), "dense bytes of the pruned matrices and factors"),
    "factored shape giant in one": (record("f", shape=[1 << 40, 7]), "dense bytes of the pruned matrices and factors"),
    "factored shape 2^62 x 4": (record("f", shape=[1 << 62, 4]), "elements"),
    "quantised shape giant": (record("q", shape=[1 << 20, 1 << 20]), "dense bytes"),
    "quantised dense shape giant": (record("qd", shape=[1 << 40]), "header entry"),
    "left factor missing": (drop("f.cap.left"), "stored tensors: expected \\['f.cap.left'\\]"),
    "right factor missing": (drop("f.cap.right"), "stored tensors"),
    "scales missing": (drop("q.cap.scales"), "stored tensors: expected \\['q.cap.scales'\\]"),
    "scales of factors missing": (drop("fq.cap.scales"), "stored tensors"),
    "scales without need": (unneeded("p.cap.scales"), "stored tensors"),
    "scales of factors without need": (unneeded("f.cap.scales"), "stored tensors"),
    "a third factor": (unneeded("f.cap.middle"), "stored tensors"),
    "a dense tensor beside its factors": (unneeded("f"), "stored tensors"),
    "a scale more": (stored("q.cap.scales", lambda raw: raw * 2, 4), "tensor 'q.cap.scales': header entry"),
    "a scale less": (stored("qd.cap.scales", lambda raw: raw[:4], 4), "tensor 'qd.cap.scales': header entry"),
    "a scale of factors less": (stored("fq.cap.scales", lambda raw: raw[:4], 4), "header entry"),
    "scales of 16 bits": (lambda parts: parts.stored["q.cap.scales"].__setitem__(0, "F16"), "header entry"),
    "values of 16 bits": (lambda parts: parts.stored["q.cap.values"].__setitem__(0, "U8"), "header entry"),
    **{f"scale {v} of {n}": (scales(n, v), "scales: expected 1.175e-38 to")
       for v in (float("nan"), float("inf"), -1.0, 0.0, -0.0, 1e-39, 3e36) for n in ("q", "qd", "fq")},
    "scale too large for F16": (scales("qm", 520.0), "scales: expected 1.175e-38 to 515.8, got '520"),
    "scale too small for F16": (scales("qm", 1e-30), "values other than 0"),
    **{f"code -128 of {n}": (value_codes(n, -128), "int8 codes: expected -127 to 127") for n in ("q", "qd", "fq")},
    "code 0 of a kept value": (value_codes("q", 0), "values other than 0: expected"),
    "rice bits 0": (record("p", bits=0), "bits: expected 1 to 16, got 0"),
    "rice bits 17": (record("p", bits=17), "bits"),
    "rice codes below kept": (record("p", codes=3), "codes: expected"),
    "rice codes 2^62": (record("p", codes=1 << 62), "codes: expected"),
    "rice a byte less": (rice_bytes(lambda raw: raw[:-1]), "header entry"),
    "rice a byte more": (rice_bytes(lambda raw: raw + b"\0"), "header entry"),
    "rice a one more or less": (rice_bytes(lambda raw: flip(raw, 0)), "bits set in the bitmask"),
    "rice ends in a zero": (last_one_moved, "last bit of the unary stream"),
    "rice beyond the end": (record("p", shape=[1, 1200]), "last position: expected below 1,200"),
    "rice padding": (rice_bytes(lambda raw: flip(raw, len(raw) - 1, 7)), "padding bits of the low bits"),
    "name reserved by version 2": (rename("bias", "x.cap.right"), "name: expected none that the format uses"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED_2)
def test_malformed_content_of_version_2(path, good_2, case):
    check_refused(path, good_2, *CHANGED_2[case])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (record("bias", values="I8"), "tensor 'bias': keys"),
        (record("gap", values="I8"), "tensor 'gap': keys"),
        (record("gap", coding="rice"), "coding: expected dense, bitmask, gap, got"),
        (record("bias", coding="factors"), "coding: expected dense, bitmask, gap, got"),
    ],
)
def test_version_1_with_keys_of_version_2(path, good, change, message):
    check_refused(path, good, change, message)


def test_version_1_may_use_names_that_version_2_reserves(path, good):
    parts = Parts(good)
    rename("bias", "x.cap.left")(parts)
    path.write_bytes(parts.pack())
    assert torch.equal(reader.load(path)["x.cap.left"], DENSE["bias"])


def test_what_is_in_extra_is_ignored(path, good, good_2):
    for raw in (good, good_2):
        parts = Parts(raw)
        parts.meta["extra"] = {"made by": ["hand", None]}
        path.write_bytes(parts.pack())
        assert reader.load(path)


# What the page says of files that no writer of ours makes: both readers accept them alike, or ours refuses them


def shuffled(parts: Parts) -> None:
    """Other orders of the stored tensors and of the tensors in the data."""
    parts.stored = dict(sorted(parts.stored.items(), key=lambda item: item[0][::-1]))


def as_pruned(name: str, shape: list[int]) -> Callable[[Parts], None]:
    """The pruned matrix `mask` (F16, 21 elements) or `gap` under another shape of as many elements."""
    return record(name, shape=shape)


def scalar(kept: int) -> Callable[[Parts], None]:
    """One more tensor: a pruned scalar."""

    def change(parts: Parts) -> None:
        values, mask = b"\0\x3c" * kept, bytes([kept])
        parts.records["s"] = {"coding": "bitmask", "dtype": "F16", "kept": kept, "shape": [], "sha256": "0" * 64}
        parts.stored |= {"s.cap.values": ["F16", [kept], values], "s.cap.bitmask": ["U8", [1], mask]}

    return change


def float8(parts: Parts) -> None:
    for number, dtype in enumerate(("F8_E4M3", "F8_E5M2")):
        parts.records[f"x{number}"] = {"coding": "dense", "dtype": dtype, "shape": [3], "sha256": "0" * 64}
        parts.stored[f"x{number}"] = [dtype, [3], b"\x7f\xff\x7c"]


def spelled(change: Callable[[str], str]) -> Callable[[Parts], None]:
    """Another spelling of the metadata, with a checksum that fits."""

    def apply(parts: Parts) -> None:
        raw = parts.pack()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        rest = change(header["__metadata__"]["cap"][CHECKSUM_END:])
        parts.cap = '{"checksum":"' + hashlib.sha256(rest.encode()).hexdigest() + rest

    return apply


def extra(text: str) -> Callable[[Parts], None]:
    return spelled(lambda rest: rest.replace('"extra":{}', f'"extra":{text}'))


ACCEPTED = {
    "stored tensors in another order": shuffled,
    "pruned in three dimensions": as_pruned("gap", [4, 8, 8]),
    "pruned in one dimension": as_pruned("mask", [21]),
    "pruned in eight dimensions": as_pruned("mask", [1, 3, 1, 7, 1, 1, 1, 1]),
    "a pruned scalar": scalar(1),
    "an empty pruned scalar": scalar(0),
    "8-bit floats": float8,
    "extra with text": extra('{"made by":["hand",null,true,1,-2]}'),
    "extra with floats": extra('{"a":0.5,"b":1e+16,"c":-0.0}'),
    "extra with escapes": extra('{"\\u00e9":"\\u007f \\ud83d\\ude00 / \\b"}'),
    "extra sorted by code points": extra('{"Z":1,"a":{"Z":1,"a":2},"\\u00e4":3}'),
    "a name with a space, of another script": rename("bias", "ä b/../東京"),
    "a name of 256 characters": rename("bias", "é" * 256),
    "endings of version 2": rename("bias", "x.cap.rice"),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_the_page_allows_is_read(path, good, case):
    parts = Parts(good)
    ACCEPTED[case](parts)
    path.write_bytes(parts.pack())
    ours, by_hand = reader.load(path), sparse_reader.read(path.read_bytes())
    assert ours.keys() == by_hand.keys() == parts.records.keys()
    assert all(alike(ours[name], *by_hand[name], factored=False) for name in ours)


REFUSED = {
    "metadata not sorted": (spelled(lambda rest: '",' + rest[13:-1] + ',"extra":{}}'), "sorted keys"),
    "metadata with upper-case escapes": (extra('{"\\u00E9":1}'), "compact JSON"),
    "metadata not in ASCII": (extra('{"é":1}'), "compact JSON"),
    "metadata with a needless escape": (extra('{"\\/":1}'), "compact JSON"),
    "extra not sorted": (extra('{"b":1,"a":2}'), "sorted keys"),
    "extra not sorted inside": (extra('{"a":{"c":1,"b":2}}'), "sorted keys"),
    "extra with a key twice": (extra('{"a":1,"a":2}'), "compact JSON"),
    "extra with a longer float": (extra('{"a":0.50}'), "compact JSON"),
    "extra with an exponent": (extra('{"a":1e5}'), "compact JSON"),
    "extra with -0": (extra('{"a":-0}'), "compact JSON"),
    "extra with NaN": (extra('{"a":NaN}'), "JSON|float"),
    "extra with spaces": (extra('{"a": 1}'), "compact JSON"),
    "name with a no-break space": (rename("bias", "a\u00a0b"), "printable"),
    "name with a zero-width space": (rename("bias", "a\u200bb"), "printable"),
    "name for private use": (rename("bias", "a\ue000"), "printable"),
    "name without a character": (rename("bias", "a\u0378"), "printable"),
    "name of 257 characters": (rename("bias", "é" * 257), "at most 256 characters, got 257"),
    "ending of both versions": (rename("bias", "x.cap.gaps"), "none that the format uses"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_page_forbids_is_refused(path, good, case):
    check_refused(path, good, *REFUSED[case])


def test_digests_in_upper_case_are_refused(path, good):
    parts = Parts(good)
    raw = parts.pack()
    digest = parts.records["bias"]["sha256"]
    parts.records["bias"]["sha256"] = digest.upper()
    text = json.dumps({k: v for k, v in parts.meta.items() if k != "checksum"}, sort_keys=True, separators=(",", ":"))
    rest = f'",{text[1:]}'
    parts.cap = '{"checksum":"' + hashlib.sha256(rest.encode()).hexdigest() + rest
    parts.records = {}
    assert raw != parts.pack() and "sha256 of the stored bytes" in refused(path, parts.pack())


@pytest.mark.parametrize("spaces", [8, 16])
def test_more_padding_than_is_needed_is_refused(path, good, spaces):
    length = int.from_bytes(good[:8], "little")
    padded = (length + spaces).to_bytes(8, "little") + good[8 : 8 + length] + b" " * spaces + good[8 + length :]
    assert "padded with spaces" in refused(path, padded)


def test_header_entries_may_come_in_any_order(path, good):
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    turned = {
        name: dict(reversed(entry.items())) if name != "__metadata__" else entry for name, entry in header.items()
    }
    path.write_bytes(framed(dict(reversed(turned.items())), good[8 + length :]))
    assert same(reader.load(path), dict(sorted((PRUNED | DENSE).items())))


def test_factors_that_are_not_finite_are_read(path):
    left, right = torch.tensor([[1.0], [math.inf], [3.0e38]]), torch.tensor([[math.nan, 2.0]])
    writer.save(path, {"m": Factors(left, right)}, [])
    found = reader.load(path)["m"]
    assert found[:, 0].isnan().all() and found[:, 1].tolist() == [2.0, math.inf, math.inf]
    with np.errstate(all="ignore"):
        by_hand = sparse_reader.read(path.read_bytes())["m"]
    assert alike(found, *by_hand, factored=True)


def test_positions_beyond_32_bits():
    gaps = np.array([2**33, 0, 2**31], dtype=np.int64)
    expected = [2**33, 2**33 + 1, 2**33 + 2**31 + 2]
    low, unary = 16, 3 + 2**17 + 2**15
    packed = codings.pack_rice(gaps, low, unary)
    n, row = 2**34, {"bits": low, "codes": unary, "kept": 3}
    assert codings.unpack_rice("w", packed, n, 3, low, unary).tolist() == expected
    assert sparse_reader.rice(packed.tobytes(), n, row).tolist() == expected
    codes = int((gaps // 65_535 + 1).sum())
    stream = codings.pack_gaps(gaps, 16, codes)
    assert codings.unpack_gaps("w", stream, n, 3, 16, codes).tolist() == expected
    assert sparse_reader.gaps(stream.tobytes(), n, {"bits": 16, "codes": codes}).tolist() == expected


def test_numbers_in_errors_are_plain():
    assert show(np.int64(6)) == "6" and show(np.float32(0.5)) == "0.5"
    with pytest.raises(FileError, match=r"last position: expected below 4, got 6$"):
        codings.unpack_gaps("w", codings.pack(np.array([6], np.uint16), 4), 4, 1, 4, 1)


def test_version_2_taken_apart_and_put_together_is_unchanged(good_2):
    assert Parts(good_2).pack() == good_2


@pytest.mark.slow
def test_mutated_bytes_of_version_2_are_refused_or_harmless(path, good_2):
    path.write_bytes(good_2)
    rng, tensors = random.Random(2), reader.load(path)
    for _ in range(FUZZ):
        mutate(path, good_2, tensors, rng)


@pytest.mark.slow
def test_edited_files_of_version_2_mean_the_same_to_both_readers(path, good_2):
    rng = random.Random(3)
    assert sum(edit(path, good_2, rng) for _ in range(FUZZ)) > FUZZ // 20
