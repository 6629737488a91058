"""Version 3 of the file format: blocks of 4 and N of every M, against their definitions and against hostile files."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sparse_reader
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants import (
    PRUNED_3,
    QUANTISED_3,
    VERSION_3,
    Parts,
    alike,
    edit,
    flip,
    floats,
    in_pattern,
    mutate,
    same,
)
from tiny import ROOT

from capcli.artifact import patterned, reader, writer
from capcli.artifact.entry import entropy_bits
from capcli.errors import FileError

FUZZ = 1_000  # mutations in each of two tests
PAGE = (ROOT / "docs" / "format.md").read_text("utf-8")
WIDTHS = st.sampled_from(patterned.WIDTHS)
QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.cap.safetensors"


@pytest.fixture(scope="module")
def good_3(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good_3") / "good.safetensors"
    writer.save(path, VERSION_3, PRUNED_3, quantised=QUANTISED_3)
    assert {entry.name: (entry.coding, entry.quantised) for entry in reader.inspect(path)} == {
        "b": ("blocks", False), "bias": ("dense", False), "bq": ("blocks", True), "g": ("groups", False),
        "gq": ("groups", True)}  # fmt: skip
    return path.read_bytes()


# The codings, by their definitions


@pytest.mark.parametrize(("keep", "width"), [(1, 2), (2, 4), (3, 4), (4, 8), (1, 16), (8, 16)])
def test_every_group_is_one_number_in_the_list_of_all_choices(keep: int, width: int) -> None:
    """Also of a group that is not full: the lowest other places are stored with it."""
    choices = list(itertools.combinations(range(width), keep))
    rng = np.random.default_rng(width)
    groups = [sorted(rng.permutation(width)[: rng.integers(0, keep + 1)].tolist()) for _ in range(50)]
    positions = np.array([i * width + place for i, group in enumerate(groups) for place in group], np.int64)
    n, bits = 50 * width, math.ceil(math.log2(len(choices)))
    packed = patterned.pack_groups(positions, n, keep, width)
    numbers, filled = [], []
    for group in groups:
        free = [place for place in range(width) if place not in group]
        full = sorted(group + free[: keep - len(group)])
        numbers.append(choices.index(tuple(full)))
        filled.append(full)
    slow = "".join(f"{number:0{bits}b}"[::-1] for number in numbers)
    assert packed.tolist() == [int(slow[i : i + 8][::-1], 2) for i in range(0, len(slow), 8)]
    stored = patterned.unpack_groups("x", packed, n, keep, width).tolist()
    assert stored == [i * width + place for i, full in enumerate(filled) for place in full]
    values = patterned.in_groups(positions, positions + 1, n, keep, width).tolist()
    assert values == [place + 1 if place in set(positions.tolist()) else 0 for place in stored]


@QUICK
@given(st.lists(st.integers(0, 399), unique=True, min_size=1, max_size=40))
def test_blocks_hold_their_values_and_zeros(places: list[int]) -> None:
    positions = np.array(sorted(places))
    blocks = sorted({place // 4 for place in places})
    assert patterned.block_gaps(positions).tolist() == [b - a - 1 for a, b in itertools.pairwise([-1, *blocks])]
    wanted = [place + 1 if place in places else 0 for block in blocks for place in range(4 * block, 4 * block + 4)]
    assert patterned.in_blocks(positions, positions + 1).tolist() == wanted


# Round trips, sizes and versions


@st.composite
def tensors(draw: Any) -> tuple[torch.Tensor, bool]:
    """A matrix in a pattern, with some values that are 0 or kept beside it; and whether it is quantised."""
    width, shape = draw(WIDTHS), (draw(st.integers(1, 24)), 16 * draw(st.integers(1, 6)))
    keep = draw(st.integers(0, width - 1))
    quantised, seed = draw(st.booleans()), draw(st.integers(0, 99))
    dtype = draw(st.sampled_from(["F32", "F16", "BF16"]))
    tensor = in_pattern(shape, keep, width if keep else 4, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    tensor[torch.rand(shape, generator=generator) < draw(st.sampled_from([0, 0.02, 0.5]))] = 0.0
    tensor[torch.rand(shape, generator=generator) < draw(st.sampled_from([0, 0.005]))] = -0.5
    return tensor, quantised


@QUICK
@given(st.lists(tensors(), min_size=1, max_size=3))
def test_round_trips(tmp_path_factory: pytest.TempPathFactory, specs: list[tuple[torch.Tensor, bool]]) -> None:
    """To the bit, by both readers; quantised values close, and the same bytes when they are written again."""
    path = tmp_path_factory.getbasetemp() / "patterned.safetensors"
    named = {str(i): tensor for i, (tensor, _) in enumerate(specs)}
    quantised = [str(i) for i, (_, chosen) in enumerate(specs) if chosen]
    sizes = writer.save(path, named, list(named), quantised=quantised)
    assert sizes == writer.sizes(named, list(named), quantised=quantised)
    loaded, by_hand = reader.load(path), sparse_reader.read(path.read_bytes())
    for name, tensor in named.items():
        assert alike(loaded[name], *by_hand[name], factored=False)
        if name in quantised:
            assert ((loaded[name] - tensor).abs().double() <= 1.01 * float(tensor.abs().max()) / 127).all()
        else:
            assert same({"": loaded[name]}, {"": tensor})
    kept = reader.load_kept(path, list(named))
    for name, tensor in loaded.items():
        one = kept[name]
        if isinstance(one, reader.Kept):
            assert int(tensor.count_nonzero()) == len(one.values)
            assert torch.equal(tensor.flatten()[torch.from_numpy(one.positions)], one.values)
    first = path.read_bytes()
    writer.save(path, loaded, list(loaded), quantised=quantised)
    if all(tensor.dtype == torch.float32 for tensor in named.values()):
        assert path.read_bytes() == first


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize(("keep", "width"), [(0, 4), (2, 4), (1, 4), (4, 8)])
def test_a_pattern_is_smaller_than_its_positions_one_by_one(path: Path, keep: int, width: int, quantised: bool) -> None:
    """As many bytes as the page says, within 17 % of the bound for the positions, and below every other coding."""
    tensor = in_pattern((96, 128), keep, width, 7, "F16")
    n, kept = tensor.numel(), int(tensor.count_nonzero())
    sizes = writer.save(path, {"w": tensor}, ["w"], quantised=["w"] if quantised else [])
    (entry,) = reader.inspect(path)
    assert entry.coding == ("groups" if keep else "blocks")
    stored = kept if not keep else n // width * keep
    values = stored + 4 * -(-(entry.kept or 0) // 256) if quantised else 2 * stored
    positions = sizes.pruned_bytes - values
    choices = math.comb(width, keep) if keep else 0
    if keep:
        assert positions == math.ceil(n / width * math.ceil(math.log2(choices)) / 8)
    else:
        assert positions <= 1.05 * entropy_bits(n // 4, kept // 4) / 8 + 2
    assert positions < entropy_bits(n, kept) / 8
    assert sizes.pruned_bound_bytes <= sizes.pruned_bytes <= 1.17 * sizes.pruned_bound_bytes


def version_of(path: Path) -> int:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return int(json.loads(header["__metadata__"]["cap"])["version"])


def test_only_a_file_with_a_pattern_is_of_version_3(path: Path) -> None:
    """Random masks of any sparsity stay as they were, also where one block or group would fit by chance."""
    for sparsity in (0.5, 0.75, 0.9, 0.97, 0.995):
        named = {"w": floats((64, 64), sparsity, "F16"), "empty": torch.zeros(4, 4), "one": torch.eye(1)}
        writer.save(path, named, list(named))
        assert version_of(path) == 1
        writer.save(path, named, list(named), quantised=["w"])
        assert version_of(path) == 2
    named["w"] = in_pattern((64, 64), 2, 4)
    writer.save(path, named, list(named))
    assert version_of(path) == 3


def block(kind: str) -> str:
    found = re.search(f"```{kind}\n(.*?)\n```", PAGE, re.DOTALL)
    assert found
    return found[1]


def test_golden_bytes_of_version_3_are_those_of_the_page(path: Path) -> None:
    b, g = torch.zeros(64), torch.zeros(4, 8)
    b[4:8], b[44:48] = torch.tensor([0.5, -0.5, 1.0, 2.0]), torch.tensor([1.0, 0.0, -0.0, 3.0])
    for row, places in enumerate([(0, 1, 6, 7), (1, 3, 4, 6), (0, 2, 5, 7), (2, 3, 5, 6)]):
        g[row, list(places)] = torch.tensor([1.0, -2, 3, -4]) + torch.tensor([4.0, -4, 4, -4]) * row
    named = {"b": b.reshape(4, 16).half(), "g": g.half()}
    writer.save(path, named, ["b", "g"])
    header = block("header3").encode()
    expected = bytes.fromhex(block("length3")) + header + b" " * (-len(header) % 8) + bytes.fromhex(block("data3"))
    assert path.read_bytes() == expected
    assert json.loads(json.loads(header)["__metadata__"]["cap"]) == json.loads(block("json3"))
    assert hashlib.sha256(expected).hexdigest() == "83482a8feadb0723e45d4dd21517dde154c725481d436e7e3f2f5ea5bdd734f1"
    assert same(reader.load(path), named)


# Hostile files


def record(name: str, **changes: Any) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.records[name].update(changes)
        for key in [key for key, value in changes.items() if value is ...]:
            del parts.records[name][key]

    return change


def first_block_emptied(parts: Parts) -> None:
    values = parts.stored["b.cap.values"]
    kept = np.count_nonzero(np.frombuffer(values[2][:16], "<u4"))
    values[2] = bytes(16) + values[2][16:]
    parts.records["b"]["kept"] -= int(kept)


def number_beyond_the_list(parts: Parts) -> None:
    """7, of 6 choices."""
    raw = parts.stored["g.cap.groups"][2]
    parts.put("g.cap.groups", bytes([raw[0] | 7]) + raw[1:])


def padded(name: str) -> Callable[[Parts], None]:
    return lambda parts: parts.put(name, flip(parts.stored[name][2], -1, 7))


def shape(name: str, *sizes: int) -> Callable[[Parts], None]:
    return record(name, shape=list(sizes))


def as_version(number: int) -> Callable[[Parts], None]:
    return lambda parts: parts.meta.update(version=number)


CHANGED: dict[str, tuple[Callable[[Parts], Any], str]] = {
    "version 1": (as_version(1), "coding: expected dense, bitmask, gap, got"),
    "version 2": (as_version(2), "coding: expected dense, bitmask, gap, rice, factors, got"),
    "version 4": (as_version(4), "format version: expected 1, 2 or 3, got 4"),
    "blocks 0": (record("b", blocks=0), "blocks: expected"),
    "blocks -1": (record("b", blocks=-1), "blocks: expected"),
    "blocks true": (record("b", blocks=True), "blocks: expected"),
    "blocks 1.0": (record("b", blocks=1.0), "blocks: expected"),
    "blocks 2^62": (record("b", blocks=1 << 62), "blocks: expected"),
    "blocks more than there are": (record("b", blocks=49), "blocks: expected"),
    "blocks one more": (lambda parts: record("b", blocks=parts.records["b"]["blocks"] + 1)(parts), "header entry"),
    "blocks missing": (record("b", blocks=...), "tensor 'b': keys"),
    "blocks of groups": (record("g", blocks=1), "tensor 'g': keys"),
    "blocks kept 0": (record("b", kept=0), "blocks: expected"),
    "bits 17": (record("b", bits=17), "bits: expected 0 to 16, got 17"),
    "bits -1": (record("b", bits=-1), "bits: expected"),
    "codes 2^62": (record("b", codes=1 << 62), "codes: expected"),
    "codes below blocks": (record("b", codes=1), "codes: expected"),
    "shape of blocks no multiple of 4": (shape("b", 191), "elements: expected a multiple of 4, got 191"),
    "shape of blocks giant": (shape("b", 1 << 20, 1 << 20), "dense bytes of the pruned matrices"),
    "blocks beyond the end": (shape("b", 4, 44), "last position: expected below 44"),
    "a block without a value": (first_block_emptied, "blocks without a value other than 0: expected 0, got 1"),
    "a value more is 0": (lambda parts: record("b", kept=parts.records["b"]["kept"] - 1)(parts), "values other than 0"),
    "keep 0": (record("g", keep=0), "keep: expected 1 to 3, got 0"),
    "keep all": (record("g", keep=4), "keep: expected 1 to 3, got 4"),
    "keep true": (record("g", keep=True), "keep: expected"),
    "keep 3": (record("g", keep=3), "header entry"),
    "width 0": (record("g", width=0), "width: expected one of"),
    "width 3": (record("g", width=3), "width: expected one of"),
    "width 32": (record("g", width=32), "width: expected one of"),
    "width 2^62": (record("g", width=1 << 62), "width: expected one of"),
    "width null": (record("g", width=None), "width: expected one of"),
    "width missing": (record("g", width=...), "tensor 'g': keys"),
    "kept of groups too large": (record("g", kept=97), "kept: expected 0 to 96, got 97"),
    "kept of groups another": (record("g", kept=80), "values other than 0: expected 80"),
    "shape of groups no multiple": (shape("g", 193), "elements: expected a multiple of 4, got 193"),
    "shape of groups giant": (shape("g", 1 << 20, 1 << 20), "dense bytes of the pruned matrices"),
    "a number beyond the list": (number_beyond_the_list, "number of a combination: expected 0 to 5, got 7"),
    "groups a byte less": (lambda parts: parts.put("g.cap.groups", parts.stored["g.cap.groups"][2][:-1]), "header ent"),
    "groups missing": (lambda parts: parts.stored.pop("g.cap.groups"), "stored tensors"),
    "a scale for each stored 0": (
        lambda parts: parts.put("bq.cap.scales", parts.stored["bq.cap.scales"][2] * 2, 4), "header entry"),
    "padding of blocks": (padded("b.cap.blocks"), "padding bits|bits set"),
    "a name that version 3 reserves": (
        lambda parts: parts.records.update({"x.cap.blocks": parts.records.pop("bias")}), "none that the format uses"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED)
def test_malformed_content_is_refused(path: Path, good_3: bytes, case: str) -> None:
    change, message = CHANGED[case]
    parts = Parts(good_3)
    change(parts)
    path.write_bytes(parts.pack())
    with pytest.raises(FileError, match=message):
        reader.load(path)


def test_scales_for_another_number_of_values_are_refused(path: Path) -> None:
    """In 8 bits, as many scales as the record says that values are kept, which are fewer than are stored."""
    writer.save(path, {"w": in_pattern((128, 64), 1, 4)}, ["w"], quantised=["w"])
    parts = Parts(path.read_bytes())
    assert parts.records["w"]["kept"] > 3 * 256
    record("w", kept=300)(parts)
    parts.put("w.cap.scales", parts.stored["w.cap.scales"][2][: 2 * 4], 4)
    path.write_bytes(parts.pack())
    with pytest.raises(FileError, match="values other than 0: expected 300"):
        reader.load(path)


def test_padding_of_groups(path: Path) -> None:
    writer.save(path, {"w": in_pattern((1, 36), 2, 4)}, ["w"])
    parts = Parts(path.read_bytes())
    padded("w.cap.groups")(parts)
    path.write_bytes(parts.pack())
    with pytest.raises(FileError, match="padding bits of the groups"):
        reader.load(path)


def test_any_place_may_be_stored_with_a_group_that_is_not_full(path: Path) -> None:
    """What fills a group means nothing, so a reader takes any."""
    tensor = torch.zeros(1, 256)
    tensor[0, ::4] = 1.0
    tensor[0, 1::4] = 2.0
    tensor[0, 1] = 0.0
    writer.save(path, {"w": tensor}, ["w"])
    parts = Parts(path.read_bytes())
    assert parts.stored["w.cap.groups"][2][0] & 7 == 0  # places 0 and 1
    raw = parts.stored["w.cap.groups"][2]
    parts.put("w.cap.groups", bytes([raw[0] | 1]) + raw[1:])  # places 0 and 2
    path.write_bytes(parts.pack())
    assert torch.equal(reader.load(path)["w"], tensor)


@pytest.mark.slow
def test_mutated_bytes_of_version_3_are_refused_or_harmless(path: Path, good_3: bytes) -> None:
    assert Parts(good_3).pack() == good_3
    path.write_bytes(good_3)
    rng, whole = random.Random(4), reader.load(path)
    for _ in range(FUZZ):
        mutate(path, good_3, whole, rng)


@pytest.mark.slow
def test_edited_files_of_version_3_mean_the_same_to_both_readers(path: Path, good_3: bytes) -> None:
    rng = random.Random(5)
    assert sum(edit(path, good_3, rng) for _ in range(FUZZ)) > FUZZ // 20
