"""Lists written as text: what is read, what is refused, and that no text breaks the reader."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capcli.data import literals

TEXTS = st.text(max_size=8)


@given(st.lists(TEXTS | st.integers(-9, 9) | st.booleans() | st.none(), max_size=4))
def test_lists_are_read_as_python_and_json_print_them(values: list[Any]) -> None:
    assert literals.parsed(repr(values)) == values
    assert literals.parsed(json.dumps(values)) == values


@given(st.lists(st.text(alphabet="ab' \"-é", max_size=8), min_size=1, max_size=60))
def test_lists_are_read_as_numpy_prints_them(values: list[str]) -> None:
    with np.printoptions(threshold=1000):
        assert literals.parsed(str(np.asarray(values, dtype=object))) == values
        assert literals.parsed(repr(np.asarray(values, dtype=object))) == values


@given(st.text(alphabet="[](){}'\",: .-01aN\\\n", max_size=30))
def test_any_other_text_is_refused_and_nothing_else(text: str) -> None:
    try:
        literals.parsed(text)
    except ValueError:
        assert literals.listed(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[" * 10_000,
        "['a'" + " " * 100_000,
        "['a' 'b', 'c']",
        "['a''b']",
        "[1-2]",
        "[,]",
        "('a')",
        "{'a': 1, 'a': 2}",
        "{'a': 1, 'b'}",
        "[__import__('os')]",
        "[open('x')]",
        "['a' ... 'b']",
        "['a'] ['b']",
        "[" + "1," * 600_000 + "]",
    ],
)
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(ValueError):
        literals.parsed(text)
    assert literals.listed(text) is None


@pytest.mark.parametrize(
    ("text", "meant"), [("['a", True), ("[a, b]", True), ("array(['a'", True), ("[URL]", False), ('("a")', False)]
)
def test_texts_that_were_meant_as_lists(text: str, meant: bool) -> None:
    assert literals.broken(text) is meant
