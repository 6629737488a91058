"""The arrays of the file format: every coding against a slow one written by its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capcli.artifact import codings
from capcli.errors import FileError
from capcli.stored import show

GAPS = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 300), st.integers(0, 200_000)), max_size=60)
FLOATS = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=600)


def positions_of(gaps: list[int]) -> np.ndarray:
    return np.cumsum(np.array(gaps, np.int64) + 1) - 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(GAPS)
def test_rice_codes_by_their_definition(gaps):
    low, unary = codings.rice_bits(np.array(gaps, np.int64))
    packed = codings.pack_rice(np.array(gaps, np.int64), low, unary)
    high = "".join("0" * (gap >> low) + "1" for gap in gaps)
    rest = "".join(f"{gap % (1 << low):0{low}b}"[::-1] for gap in gaps)
    slow = [int(text[i : i + 8][::-1], 2) for text in (high, rest) for i in range(0, len(text), 8)]
    assert (len(high), packed.tolist()) == (unary, slow)
    n = sum(gaps) + len(gaps)
    assert codings.unpack_rice("x", packed, n, len(gaps), low, unary).tolist() == positions_of(gaps).tolist()
    others = [len(gaps) * (1 + b) + sum(gap >> b for gap in gaps) for b in range(1, 17)]
    assert unary + low * len(gaps) == min(others)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(GAPS)
def test_gaps_come_back(gaps):
    array = np.array(gaps, np.int64)
    width, codes = codings.narrowest(array)
    packed = codings.pack_gaps(array, width, codes)
    n = sum(gaps) + len(gaps)
    assert codings.unpack_gaps("x", packed, n, len(gaps), width, codes).tolist() == positions_of(gaps).tolist()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(FLOATS)
def test_int8_groups_by_their_definition(values):
    array = np.array(values, np.float32)
    codes, scales = codings.quantise(array)
    for i in range(0, len(values), 256):
        group, scale = array[i : i + 256], scales[i // 256]
        exact = float(np.abs(group).max()) / 127
        assert scale == codings.MIN_SCALE or exact * (1 - 2.0**-16) <= scale <= exact * (1 + 2.0**-23)
        assert codes[i : i + 256].tolist() == [round(float(np.float32(value / scale))) for value in group]
    assert codings.n_groups(len(values)) == len(scales) and scales.dtype == np.float32
    read = codings.dequantise(codes, scales)
    assert read.tolist() == [int(code) * float(scales[i // 256]) for i, code in enumerate(codes)]  # exactly
    again = codings.quantise(read)
    assert np.array_equal(again[0], codes) and np.array_equal(again[1], scales)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(FLOATS)
def test_no_kept_value_has_the_code_0(values):
    array = np.array([value for value in values if value], np.float32)
    keep, codes, scales = codings.quantise_kept(array)
    assert codes.all() and codes.size == keep.sum() and scales.size == codings.n_groups(codes.size)
    assert (np.sign(codes) == np.sign(array[keep])).all()
    read = codings.dequantise(codes, scales)
    kept, again, _ = codings.quantise_kept(read)
    assert kept.all() and np.array_equal(again, codes)


def test_a_value_that_would_become_0_in_its_new_group_gets_1():
    values = np.array([1.0] + [0.001] * 255 + [-0.003] * 256, np.float32)
    keep, codes, scales = codings.quantise_kept(values)
    assert keep.tolist() == [True] + [False] * 255 + [True] * 256
    assert codes.tolist() == [127] + [-1] * 255 + [-127]
    assert scales == pytest.approx([1 / 127, 0.003 / 127], rel=1e-4)


def test_bad_scales_and_codes_are_refused():
    codes, scales = np.array([1, -127], np.int8), np.array([0.5], np.float32)
    codings.check_quantised("x", codes, scales, 64.0)
    for wrong in (np.nan, np.inf, -0.5, 0.0, 2.0**-127, 0.51):
        with pytest.raises(FileError, match="x: scales: expected"):
            codings.check_quantised("x", codes, np.array([0.5, wrong], np.float32), 64.0)
    with pytest.raises(FileError, match="x: int8 codes: expected -127 to 127, got -128"):
        codings.check_quantised("x", np.array([-128], np.int8), scales, 64.0)


def test_messages_show_numbers_of_numpy_as_numbers():
    with pytest.raises(FileError, match=r"x: rank: expected 1 to 5, got 6$"):
        codings.check(False, "x", "rank", "1 to 5", np.int64(6))
    shown = [show(value) for value in (np.int64(12_345), np.float32(0.5), np.array([1, 2]), 7, "a")]
    assert shown == ["12,345", "0.5", "[1, 2]", "7", "'a'"]
