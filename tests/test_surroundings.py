"""A run whose surroundings change: clock, current folder, place of OUT, other processes; and what it takes up."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from surroundings import alone, check_growth, elsewhere, growth, set_back, two_at_once
from survival import SMALL, Whole, finish, same_after, stopped_at, uninterrupted
from tiny import SETTINGS, Tiny, forked, outcome, wait

from capcli.config.layers import prune_config
from capcli.errors import RunFailed
from capcli.stored import read_json

PHASES = ["load", "teacher", "bank finetuned", "prune", "evaluate pruned", "latency"]


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The uninterrupted run."""
    return uninterrupted(tiny, tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.8, 0.95])
def test_the_clock_is_set_back(tiny: Tiny, tmp_path: Path, whole: Whole, share: float) -> None:
    """R14."""
    set_back(tiny, tmp_path / "out", whole, int(share * whole.operations))


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def relative(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run in the current folder whose model, data and output are named from there."""
    (tmp_path / "here").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(tiny.model, "model")
    shutil.copytree(tiny.data, "data")
    base = {"model": "model", "task": "text-classification", "data": "data", "out": "out"}
    return prune_config({**base, **SETTINGS, **SMALL})


@pytest.mark.parametrize("phase", PHASES[1:])
def test_the_current_folder_changes(tiny: Tiny, tmp_path: Path, whole: Whole, relative: Any, phase: str) -> None:
    """R15: once its inputs are read, the run goes on where it began, and nothing is written elsewhere."""
    notes, error = elsewhere(relative, phase, lambda: os.chdir(tmp_path / "other"))
    assert error is None, error
    assert outcome(tmp_path / "here" / "out") == whole.outcome
    assert list((tmp_path / "other").iterdir()) == []
    assert not (tmp_path / "here" / "out" / "work").exists()
    assert read_json(tmp_path / "here" / "out" / "cap_config.json")["source"]["data"] == "../data"
    assert str(tmp_path) not in "".join(notes)
    assert str(tmp_path) not in (tmp_path / "here" / "out" / "report.json").read_text()


def test_the_current_folder_changes_before_the_inputs_are_read(tmp_path: Path, relative: Any) -> None:
    """R15: exit 2 with the name of what is not there, and nothing is written."""
    _, error = elsewhere(relative, "load", lambda: os.chdir(tmp_path / "other"))
    assert error is not None and error.exit_code == 2
    assert error.message == "no data at data"
    assert list((tmp_path / "other").iterdir()) == []
    assert not (tmp_path / "here" / "out").exists()


def test_out_is_moved_between_stop_and_continuation(tiny: Tiny, tmp_path: Path, whole: Whole) -> None:
    """R16: it continues in the new place, which is the only one that is written to."""
    stopped_at(tiny, tmp_path / "old" / "out", "prune", 5)
    (tmp_path / "new" / "deeper").mkdir(parents=True)
    (tmp_path / "old" / "out").rename(tmp_path / "new" / "deeper" / "renamed")
    notes = same_after(tiny, tmp_path / "new" / "deeper" / "renamed", whole.outcome, "moved")
    assert "continuing at step 5 of 9" in notes
    assert list((tmp_path / "old").iterdir()) == []


@pytest.mark.parametrize("phase", PHASES)
def test_out_is_moved_while_it_is_written(tiny: Tiny, tmp_path: Path, whole: Whole, phase: str) -> None:
    """R16: exit 3, nothing is written where OUT was, and the run can be continued where it is."""
    old, new = tmp_path / "old" / "out", tmp_path / "new"
    _, error = elsewhere(tiny.prune_config(old, **SMALL), phase, lambda: old.rename(new))
    assert isinstance(error, RunFailed) and error.exit_code == 3
    assert f"{old} was removed or replaced while this run was writing to it" in error.message
    assert not old.exists()
    finish(tiny, new)
    assert outcome(new) == whole.outcome


# Other processes, and this one ---------------------------------------------------------------------------------------


def test_two_commands_fill_one_cold_cache(tiny: Tiny, tmp_path: Path) -> None:
    """R18."""
    expected = alone(tiny, tmp_path / "alone")
    for seed in range(3):
        two_at_once(tiny, tmp_path / str(seed), expected, random.Random(seed))


@pytest.mark.rare
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not say what a process takes up")
def test_a_long_run_takes_up_no_more_than_a_short_one(tiny: Tiny, tmp_path: Path) -> None:
    """R17, 240 of 2,000 steps."""

    def action() -> None:
        check_growth(growth(tiny, tmp_path / "out", 240), most_bytes=8 << 20)
        assert list((tmp_path / "temporary").iterdir()) == []

    assert wait(forked(action)) == 0
