"""Texts without labels: lines, columns and pairs, and how many of them are read."""

from pathlib import Path
from typing import Any

import pytest
from tiny import write_csv

from capcli.config.task import TaskConfig
from capcli.data import texts
from capcli.errors import DataError

PAIRS = TaskConfig(task="text-pair-classification", data="x")
ONE = TaskConfig(task="text-classification", data="x")


def read(file: Path, source: TaskConfig, *, paired: bool) -> tuple[list[Any], list[str] | None]:
    """The texts of a file, and the second ones."""
    split = texts.read(str(file), source, paired=paired)
    (first, second), *others = split.chunks()
    assert not others
    return first, second


def test_lines_and_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo\tparts\n")
    assert read(tmp_path / "a.txt", ONE, paired=False) == (["one", "two\tparts"], None)
    write_csv(tmp_path / "a.csv", ("id", "text"), [("1", "one"), ("2", ""), ("3", "two")])
    assert read(tmp_path / "a.csv", ONE, paired=False) == (["one", "two"], None)


def test_pairs_where_they_are_there_or_must_be(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ta\ntwo\tb\n")
    assert read(tmp_path / "a.txt", PAIRS, paired=False) == (["one", "two"], ["a", "b"])
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    assert read(tmp_path / "b.txt", PAIRS, paired=False) == (["one", "two"], None)
    write_csv(tmp_path / "a.csv", ("sentence1", "sentence2"), [("one", "a")])
    assert read(tmp_path / "a.csv", PAIRS, paired=True) == (["one"], ["a"])
    write_csv(tmp_path / "b.csv", ("text", "id"), [("one", "1")])
    assert read(tmp_path / "b.csv", PAIRS, paired=False) == (["one"], None)
    with pytest.raises(DataError, match="has no pair column"):
        read(tmp_path / "b.csv", PAIRS, paired=True)


def test_how_much_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    monkeypatch.setattr(texts, "MOST_TEXTS", 2)
    assert read(tmp_path / "a.txt", ONE, paired=False)[0] == ["one", "two"]
    monkeypatch.setattr(texts, "MOST_CHARACTERS", 5)
    with pytest.raises(DataError, match="has more than 5 characters"):
        read(tmp_path / "a.txt", ONE, paired=False)
