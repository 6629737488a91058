"""The program of long tests, and the page that says what was shown."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import soak
from soak import ROWS, Bench, Done, Row
from tiny import ROOT

PAGE = soak.PAGE.read_text("utf-8")


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, Row]:
    """Two rows that take no time: one whose second trial fails, and one whose third ends the process."""

    def failing(bench: Bench, number: int) -> int:
        assert number != 1, "the second"
        return 10

    def dying(bench: Bench, number: int) -> int:
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        (bench.folder.parent / "left").write_text("x")
        return 1

    found = {"A": Row("tens", lambda _: 40, failing), "B": Row("ones", lambda _: 4, dying)}
    monkeypatch.setattr(soak, "ROWS", found)
    monkeypatch.setattr(soak, "prepared", lambda bench, names: None)
    monkeypatch.setenv("CAP_CACHE", os.environ["CAP_CACHE"])  # which the program sets
    return found


def test_it_counts_goes_on_after_failures_and_continues_where_it_stopped(rows: dict[str, Row], tmp_path: Path) -> None:
    state = tmp_path / "soak" / "state.json"
    first = soak.soak(["B"], 1.0, state)
    assert (first["B"].done, first["B"].trials, first["B"].n_failed) == (4, 5, 1)
    assert first["B"].failures == ["trial 2: the process ended with -15"]
    found = soak.soak(["A", "B"], 1.0, state)
    assert found["B"] == first["B"], "it was complete"
    assert (found["A"].done, found["A"].wanted, found["A"].trials) == (40, 40, 5)
    assert [line.split("\n")[0] for line in found["A"].failures] == ["trial 1: AssertionError: the second"]
    assert soak.read_state(state) == found
    table = "\n".join(soak.table(found))
    assert re.search(r"^\| A \| tens \| 40 \| 40 \| 1 \| \d{4}-\d\d-\d\d \d\d:\d\d \|$", table, re.MULTILINE)


def test_when_the_time_is_over_no_turn_begins(rows: dict[str, Row], tmp_path: Path) -> None:
    assert soak.soak(["A"], 0.0, tmp_path / "state.json") == {}


def test_a_process_that_hangs_is_killed_and_counted(
    rows: dict[str, Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows["A"] = Row("hanging", lambda _: 1, lambda bench, number: number or signal.pause() or 1)
    monkeypatch.setattr(soak, "HUNG_SECONDS", 0.2)
    found = soak.soak(["A"], 1.0, tmp_path / "state.json")
    assert found["A"].failures == ["trial 0: hung"]


def test_the_page_has_every_row_and_names_tests_that_are_there() -> None:
    named = re.findall(r"^\| ([RS]\d+) \|", PAGE.partition("## Long runs")[0], re.MULTILINE)
    assert len(named) == len(set(named)) and set(ROWS) <= set(named)
    assert all((ROOT / path).is_file() for path in re.findall(r"`(tests/[\w/]+\.py)`", PAGE))


def test_the_page_has_the_last_result() -> None:
    assert soak.with_section(PAGE, soak.section(soak.RESULT)) == PAGE
    found: dict[str, Any] = json.loads(soak.RESULT.read_text("utf-8"))
    assert set(found["rows"]) <= set(ROWS)
    assert all(Done(**row).n_failed == 0 for row in found["rows"].values()), "a result with failures is mended first"
