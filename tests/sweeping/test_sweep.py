"""Whole sweeps on the tiny model: each run is what it is by itself, a stopped one continues, a failed one is alone."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from tiny import WEIGHTS, Tiny, invoke, outcome

import capcli
from capcli import run
from capcli.config.grid import sweep_config
from capcli.config.sweep import SweepConfig
from capcli.errors import CapError, ConfigError, FileError, Stopped
from capcli.events import StopFlag
from capcli.models import tokenizers
from capcli.stages import RunFolder
from capcli.sweeping import folder as folders
from capcli.sweeping import jobs, sweep

pytestmark = pytest.mark.usefixtures("sweeps_fork")
QUICK: dict[str, Any] = {"epochs": 1, "teacher_epochs": 3, "max_eval_samples": 24, "calibration": 32}
GRID: dict[str, Any] = {"sparsity": "0.5,0.8", "method": "fisher,cap-f"}
NAMES = ["fisher-0.5-seed1", "fisher-0.8-seed1", "cap-f-0.5-seed1", "cap-f-0.8-seed1"]


def swept(tiny: Tiny, out: Path, *switches: str, **chosen: Any) -> Any:
    """`cap prune` of several runs; its result has exit_code, stdout and stderr."""
    return invoke(*tiny.arguments(out, **{**QUICK, **GRID, **chosen}), *switches)


def config(tiny: Tiny, out: Path, **chosen: Any) -> SweepConfig:
    """The same as a configuration."""
    from tiny import SETTINGS

    base = {"model": tiny.model, "task": "text-classification", "data": tiny.data, "out": str(out)}
    return sweep_config({**base, **SETTINGS, **QUICK, **GRID, **chosen})


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A finished sweep, to read from, and what it printed. Only the runs at 80 % are small enough."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, swept(tiny, out, "--json", "--max-bytes", "38kB")


@pytest.fixture
def copied(whole: tuple[Path, Any], tmp_path: Path) -> Path:
    """The same, to write to."""
    shutil.copytree(whole[0], tmp_path / "out", symlinks=True)
    return tmp_path / "out"


def made(out: Path, names: list[str] = NAMES) -> dict[str, tuple[int, int]]:
    """Which files the reports of the runs are; other ones, if a run was made again."""
    places = {name: (out / name / "report.json").stat() for name in names}
    return {name: (place.st_ino, place.st_mtime_ns) for name, place in places.items()}


# The whole -----------------------------------------------------------------------------------------------------------


def test_what_a_sweep_writes(whole: tuple[Path, Any]) -> None:
    out, result = whole
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found == json.loads((out / "sweep.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*NAMES, "best", "sweep.csv", "sweep.html", "sweep.json"]
    )
    assert [run["folder"] for row in found["configurations"] for run in row["runs"]] == NAMES
    assert (found["status"], found["passed"], found["seeds"]) == ("complete", True, [1])
    assert "…/" in found["config"]["model"] and str(out.parent) not in result.stdout, "no path of the machine"
    for row in found["configurations"]:
        report = json.loads((out / row["runs"][0]["folder"] / "report.json").read_text())
        assert row["metrics"]["accuracy"] == {"mean": report["metrics"]["pruned"]["accuracy"], "deviation": None}
        assert row["weights_bytes"]["mean"] == report["size"]["weights_bytes"]
        assert row["minutes"]["mean"] == pytest.approx(report["timing"]["total_seconds"] / 60)
        assert row["passed"] is (report["size"]["weights_bytes"] <= 38_000)
    assert [row["passed"] for row in found["configurations"]] == [False, True, False, True]
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [row["folder"] for row in rows if row["kind"] == "run"] == NAMES


def test_the_best_is_a_link_to_the_smallest(whole: tuple[Path, Any]) -> None:
    out, _ = whole
    sizes = {name: (out / name / WEIGHTS).stat().st_size for name in NAMES}
    assert (out / "best").readlink() == Path(min(sizes, key=lambda name: sizes[name]))
    assert tokenizers.is_artifact(str(out / "best"))


@pytest.mark.parametrize(("name", "method", "sparsity"), [(NAMES[0], "fisher", 0.5), (NAMES[3], "cap-f", 0.8)])
def test_a_run_is_what_it_is_by_itself(
    tiny: Tiny, whole: tuple[Path, Any], tmp_path: Path, name: str, method: str, sparsity: float
) -> None:
    """The first, which made the teacher, and one that found it: bytes of the weights, metrics, history of losses."""
    tiny.prune(tmp_path / "out", **QUICK, method=method, sparsity=sparsity, seed=1)
    assert outcome(whole[0] / name) == outcome(tmp_path / "out")
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "out", whole[0] / name)]
    same = ("fingerprints", "notes", "sparsity", "teacher", "losses", "labels")
    assert [reports[0][key] for key in same] == [reports[1][key] for key in same]
    command = reports[1]["command"].split()
    assert command[:3] == ["cap", "prune", "…/tiny"] or command[2].startswith("'")
    assert ["--method", method] == command[command.index("--method") :][:2]
    assert ["--sparsity", str(sparsity)] == command[command.index("--sparsity") :][:2]


def test_the_teacher_is_made_once(whole: tuple[Path, Any]) -> None:
    seconds = {json.loads((whole[0] / name / "report.json").read_text())["timing"]["teacher_seconds"] for name in NAMES}
    assert len(seconds) == 1
    assert min(seconds) > 0
    assert sum("teacher: epoch 1/3" in line for line in whole[1].stderr.splitlines()) == 1


def test_a_model_with_a_head_is_another_teacher_than_one_that_is_made(
    tiny: Tiny, asked: Callable[..., Path], tmp_path: Path
) -> None:
    """A method that trains nothing prunes MODEL as it is, if that is for the task; then it shares nothing with one that
    fine-tunes a teacher."""
    for model, own_head in ((str(asked("classification", "dense")), True), (tiny.model, False)):
        found = config(tiny, tmp_path, model=model, method="wanda,movement", sparsity=0.5, epochs=None)
        runs = [cell.run for cell in found.cells]
        assert [bool(one.epochs) for one in runs] == [False, True]
        assert sweep._check_start(runs, found.gates) is own_head
        folder = RunFolder(out=tmp_path, flag=StopFlag())
        places = {folders.shared_by(one, folder, own_head=own_head) for one in runs}
        assert len(places) == 1 + own_head
        assert all(place.name.startswith("seed1-") for place in places)


def test_runs_with_other_steps_have_another_teacher(tiny: Tiny, tmp_path: Path) -> None:
    """The preset paper has other batches for cap-f."""
    found = config(tiny, tmp_path, method="movement,cap-m,cap-f", sparsity=0.5, preset="paper", batch_size=None)
    folder = RunFolder(out=tmp_path, flag=StopFlag())
    places = [folders.shared_by(cell.run, folder, own_head=False) for cell in found.cells]
    assert places[0] == places[1] != places[2]


# Again ---------------------------------------------------------------------------------------------------------------


def test_a_finished_sweep_is_judged_again_and_not_made_again(tiny: Tiny, copied: Path) -> None:
    before = made(copied)
    result = swept(tiny, copied, "--max-bytes", "1kB")
    assert result.exit_code == 1
    assert "error: no configuration passes all gates" in result.stderr
    assert "all runs of this sweep are already complete" in result.stderr
    assert "cap-f 80 %" in result.stdout and "(limit 1 kB)" in result.stdout
    assert not (copied / "best").is_symlink()
    assert not (copied / "work").exists()
    found = capcli.prune(config(tiny, copied, max_drop="accuracy=0.99"))
    assert (found["passed"], (copied / "best").is_symlink()) == (True, True)
    assert made(copied) == before


def test_other_sparsities_can_be_added(tiny: Tiny, copied: Path) -> None:
    before = made(copied, NAMES[:2])
    result = swept(tiny, copied, "-q", "--json", sparsity="0.8,0.9", method="fisher")
    assert result.exit_code == 0, result.stderr
    assert [row["sparsity"] for row in json.loads(result.stdout)["configurations"]] == [0.8, 0.9]
    assert made(copied, NAMES[:2]) == before
    assert outcome(copied / "fisher-0.9-seed1")


def stopped_in(tiny: Tiny, out: Path, phase: str, **chosen: Any) -> list[str]:
    """Stop a sweep as soon as it says something of this phase; returns what it said before."""
    flag, said = StopFlag(), []
    with pytest.raises(Stopped, match="stopped by the test"):
        for event in sweep.sweep(config(tiny, out, **chosen), flag=flag):
            said.append(f"{event.phase}: {event.note}")
            if event.phase == phase:
                flag.reason = "the test"
    return said


def test_a_stopped_sweep_continues(
    tiny: Tiny, whole: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second run, which has the teacher of the first; the same command makes the rest, and the same.
    Here each run has a process of its own, as users have it."""
    monkeypatch.setattr(jobs, "subprocess", subprocess)
    out = tmp_path / "out"
    stopped_in(tiny, out, "fisher-0.8-seed1, prune", method="fisher", checkpoint_seconds=0)
    found = json.loads((out / "sweep.json").read_text())
    assert [row["runs"][0]["status"] for row in found["configurations"]] == ["complete", "waiting"]
    assert (found["status"], found["best"]) == ("incomplete", None)
    (shared,) = (out / "work" / folders.SHARED).iterdir()
    assert {"teacher", "dense", "bank-finetuned"} <= {path.name for path in shared.iterdir()}
    assert not (out / NAMES[0] / "work").exists()
    before = made(out, NAMES[:1])
    result = swept(tiny, out, method="fisher")
    assert result.exit_code == 0, result.stderr
    assert "2 runs; 1 of them are already complete" in result.stderr
    assert "teacher: epoch" not in result.stderr
    assert made(out, NAMES[:1]) == before
    assert [outcome(out / name) for name in NAMES[:2]] == [outcome(whole[0] / name) for name in NAMES[:2]]
    assert not (out / "work").exists()


# At the same time ----------------------------------------------------------------------------------------------------


def test_runs_at_the_same_time_come_to_the_same(tiny: Tiny, whole: tuple[Path, Any], copied: Path) -> None:
    """Two at a time, with one thread each, as those of the whole sweep had; and all of it anew."""
    before = made(copied)
    result = swept(tiny, copied, "--jobs", "2", "--overwrite", method="fisher", threads=2)
    assert result.exit_code == 0, result.stderr
    assert "2 runs, 2 at a time" in result.stderr
    after = made(copied)
    assert [name for name in NAMES if after[name] != before[name]] == NAMES[:2]
    assert [outcome(copied / name) for name in NAMES[:2]] == [outcome(whole[0] / name) for name in NAMES[:2]]
    assert json.loads((copied / NAMES[0] / "report.json").read_text())["config"]["threads"] == 1
    assert not (copied / "best").is_symlink(), "no gate was set"


# What fails ----------------------------------------------------------------------------------------------------------


def test_a_failed_run_loses_no_other(tiny: Tiny, copied: Path) -> None:
    """Somebody's file lies where a run should be; when it is gone, the same command makes that run."""
    shutil.rmtree(copied / NAMES[1])
    (copied / NAMES[1]).mkdir()
    (copied / NAMES[1] / "mine.txt").write_text("mine")
    before = made(copied, [NAMES[0], *NAMES[2:]])
    result = swept(tiny, copied, "--json", "--max-bytes", "38kB")
    assert result.exit_code == 3
    assert f"error: 1 of 4 runs failed: {NAMES[1]}: " in result.stderr
    assert "is not empty and was not written by cap" in result.stderr
    found = json.loads(result.stdout)
    failed = found["configurations"][1]["runs"][0]
    assert (failed["status"], failed["exit_code"]) == ("failed", 2)
    assert (found["status"], found["best"]) == ("incomplete", NAMES[3])
    assert (copied / "best").readlink() == Path(NAMES[3])
    assert (copied / NAMES[1] / "mine.txt").read_text() == "mine"
    assert made(copied, [NAMES[0], *NAMES[2:]]) == before
    assert "failed" in (copied / "sweep.html").read_text()


def test_a_killed_process_is_a_failed_run(tiny: Tiny, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copied / NAMES[1])
    started = jobs._started

    def dying(*arguments: Any) -> Any:
        found = started(*arguments)
        found.process.kill()
        return found

    monkeypatch.setattr(jobs, "_started", dying)
    with pytest.raises(sweep.RunsFailed) as caught:
        capcli.prune(config(tiny, copied))
    assert caught.value.message == f"1 of 4 runs failed: {NAMES[1]}: its process ended by SIGKILL"
    assert caught.value.exit_code == 3
    assert caught.value.sweep.configurations[0].runs[0].status == "complete"


# What is refused -----------------------------------------------------------------------------------------------------


def other_rate(out: Path) -> dict[str, Any]:
    return {"lr": 1e-3}


def other_data(out: Path) -> dict[str, Any]:
    return {"max_length": 12, "sparsity": "0.6,0.7"}


def unknown_metric(out: Path) -> dict[str, Any]:
    return {"min": "acuracy=0.5"}


def link_of_a_run(out: Path) -> dict[str, Any]:
    (out / NAMES[0]).rename(out.parent / "elsewhere")
    (out / NAMES[0]).symlink_to(out.parent / "elsewhere")
    return {}


def link_of_work(out: Path) -> dict[str, Any]:
    (out.parent / "elsewhere").mkdir()
    (out / "work").mkdir()
    (out / "work" / "shared").symlink_to(out.parent / "elsewhere")
    return {}


def folder_of_best(out: Path) -> dict[str, Any]:
    (out / "best").unlink()
    (out / "best").mkdir()
    return {}


def damaged_record(out: Path) -> dict[str, Any]:
    (out / "sweep.json").write_text("{")
    return {}


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (other_rate, ConfigError, "holds a run with another configuration: lr: 0.005, now 0.001"),
        (other_data, ConfigError, "holds a run with another configuration: max_length: 16, now 12"),
        (unknown_metric, ConfigError, "--min: unknown metric 'acuracy'"),
        (link_of_a_run, FileError, "is a link, and nothing is written through one"),
        (link_of_work, FileError, "shared is a link, and nothing is written or removed through one"),
        (folder_of_best, FileError, "best is not the link of a sweep"),
        (damaged_record, FileError, "sweep.json is not valid JSON"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_is_refused(
    tiny: Tiny, copied: Path, change: Callable[[Path], dict[str, Any]], error: type[CapError], said: str
) -> None:
    chosen = change(copied)
    files = sorted(path.relative_to(copied) for path in copied.rglob("*") if path.name != ".lock")
    with pytest.raises(error) as caught:
        capcli.prune(config(tiny, copied, **chosen))
    assert said in caught.value.message
    assert caught.value.exit_code == 2
    assert sorted(path.relative_to(copied) for path in copied.rglob("*") if path.name != ".lock") == files


def test_a_sweep_and_a_run_do_not_share_a_folder(tiny: Tiny, pruned: Path, copied: Path) -> None:
    with pytest.raises(FileError, match="was written by a single run, not by a sweep"):
        capcli.prune(config(tiny, pruned))
    for overwrite in (False, True):
        with pytest.raises(FileError, match="was written by a sweep of cap prune"):
            capcli.prune(tiny.prune_config(copied), overwrite=overwrite)


def test_one_sweep_at_a_time(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    with FileLock(out / "work" / ".lock"), pytest.raises(ConfigError, match="another process is writing to"):
        capcli.prune(config(tiny, out))


def test_what_never_began_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """What would refuse a run before its first step is found before any is started."""
    for chosen, said in (
        ({"min": "acuracy=1"}, "unknown metric"),
        ({"sparsity": "0.5,0.999"}, "cannot reach sparsity 0.999"),
        ({"teacher": tiny.model}, "are not those of the task"),
    ):
        with pytest.raises(CapError, match=said) as caught:
            capcli.prune(config(tiny, tmp_path / "out", **chosen))
        assert caught.value.exit_code == 2
        assert not (tmp_path / "out").exists()


def test_plan_is_for_one_run(tiny: Tiny, tmp_path: Path) -> None:
    result = swept(tiny, tmp_path / "out", "--plan")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--plan is for one run" in result.stderr


# One run -------------------------------------------------------------------------------------------------------------


def test_one_run_takes_gates(tiny: Tiny, tmp_path: Path) -> None:
    """They are in what is printed, and decide the exit code; the report of the run is the same with and without."""
    arguments = tiny.arguments(tmp_path / "out", **{**QUICK, "method": "fisher"})
    result = invoke(*arguments, "-q", "--max-bytes", "1MB", "--max-drop", "accuracy=0.9")
    assert result.exit_code == 0, result.stderr
    assert "passed  the weights are" in result.stdout
    before = (tmp_path / "out" / "report.json").read_bytes()
    result = invoke(*arguments, "-q", "--json", "--max-bytes", "1kB", "--min", "accuracy=0.01")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [gate["name"] for gate in found["gates"]] == ["min accuracy", "max bytes"]
    assert (found["passed"], found["gates"][0]["passed"]) == (False, True)
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    assert "passed" not in json.loads(before)
    again = invoke(*arguments, "-q", "--json")
    assert "gates" not in json.loads(again.stdout)
    assert invoke(*arguments, "-q", "--min", "acuracy=0.5").exit_code == 2


def test_an_unknown_metric_is_refused_before_a_run_begins(tiny: Tiny, tmp_path: Path) -> None:
    result = invoke(*tiny.arguments(tmp_path / "out", **QUICK), "--max-drop", "acuracy=0.1")
    assert result.exit_code == 2
    assert "unknown metric 'acuracy'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_record_of_a_sweep_has_one_name() -> None:
    assert run.SWEEP == "sweep.json"
