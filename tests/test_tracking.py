"""`--track`: what a tracker is told, and that none of its faults reaches a run.

The tracker is a package of our own under the name of a real one, in a process as the real one has it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny, invoke, outcome

from capcli import trackers, tracking
from capcli.config import names
from capcli.errors import Stopped
from capcli.events import Event, finished
from capcli.trackers import About

ABOUT = About(name="small", group="", config={"lr": 0.1}, folder="/nowhere")
GOOD = """
import json, os
class Run:
    def __init__(self, **given): self.write("init", given)
    def write(self, call, given):
        print("noise on stdout")
        with open(os.environ["TOLD"], "a") as file: file.write(json.dumps([call, given]) + "\\n")
    def log(self, numbers, step=None): self.write("log", [numbers, step])
    def finish(self): self.write("finish", None)
def init(**given): return Run(**given)
"""
# By fault: the package, and what is said of it.
FAULTY = {
    "not importable": ("raise ImportError('no such library')", "ImportError: no such library"),
    "refusing": ("def init(**_): raise ValueError('who are you?\\nsecond line')", "ValueError: who are you?"),
    "failing later": (GOOD + "def log(*_, **__): raise OSError('disk full')\nRun.log = log", "OSError: disk full"),
    "failing at the end": (GOOD + "def finish(_): raise OSError('no network')\nRun.finish = finish", "OSError: no"),
    "dying": ("import os\nos._exit(3)", "ended"),
    "without its calls": ("", "AttributeError: "),
}
Make = Callable[[str], Path]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Puts a package `trackio` with this text where Python finds it; returns the file that it may write to."""
    told = tmp_path / "told.jsonl"

    def make(text: str) -> Path:
        (tmp_path / "trackio.py").write_text(text)
        return told

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("TOLD", str(told))
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    return make


def work(steps: int = 3, error: Exception | None = None) -> Generator[Event, None, str]:
    """A run of some steps."""
    for step in range(1, steps + 1):
        yield Event(phase="prune", done=step, total=steps, numbers={"loss/total": 1 / step, "bad": float("nan")})
    if error:
        raise error
    return "done"


def followed(events: Generator[Event, None, str]) -> tuple[str, list[str], int]:
    """The result of a run, what was said of the tracker, and how many other events there were."""
    notes, others = [], 0
    while True:
        try:
            event = next(events)
        except StopIteration as stop:
            return stop.value, notes, others
        if event.phase == "track":
            notes.append(event.note)
        else:
            others += 1


def tracked(run: Generator[Event, None, str], name: str = "trackio") -> tuple[str, list[str], int]:
    return followed(tracking.tracked(run, name, ABOUT, lambda found: {"result/letters": len(found)}))


def calls(told: Path) -> list[Any]:
    """What was told so far, by whole lines."""
    lines = told.read_text().splitlines(keepends=True) if told.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_a_tracker_is_told_how_a_run_begins_goes_and_ends(package: Make) -> None:
    """Numbers that are not finite are left out; what the package prints is not seen."""
    told = package(GOOD)
    assert tracked(work()) == ("done", ['trackio: trackio show --project "capcli"'], 3)
    first, *rest = calls(told)
    assert first == [
        "init",
        {"project": "capcli", "name": "small", "group": None, "config": {"lr": 0.1}, "embed": False},
    ]
    assert rest == [
        *[["log", [{"prune/loss/total": 1 / step}, step]] for step in (1, 2, 3)],
        ["log", [{"result/letters": 4}, None]],
        ["finish", None],
    ]


@pytest.mark.parametrize("fault", FAULTY)
def test_a_tracker_that_fails_is_one_note(package: Make, fault: str) -> None:
    text, said = FAULTY[fault]
    package(text)
    result, notes, others = tracked(work())
    assert (result, others) == ("done", 3)
    failed = [note for note in notes if "failed" in note]
    assert len(failed) == 1
    assert failed[0].startswith("trackio failed, so the run is not tracked any more: ") and said in failed[0]


def test_a_tracker_that_is_not_installed_is_one_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    said = "mlflow is not installed, so the run is not tracked: pip install mlflow"
    assert tracked(work(), "mlflow") == ("done", [said], 3)


def test_a_tracker_that_hangs_is_not_waited_for(package: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit into the pipe is dropped and counted; at the end the process is ended."""
    package("import time\ntime.sleep(1000)")
    monkeypatch.setattr(tracking, "PIPE_BYTES", 4096)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.1)
    result, notes, others = tracked(work(steps=3000))
    assert (result, others) == ("done", 3000)
    assert notes[0] == "trackio failed, so the run is not tracked any more: it did not finish in 0 s"
    assert notes[1].startswith("trackio was slower than the run: the numbers of ")
    assert len(notes) == 2


def test_a_run_that_is_stopped_ends_in_the_tracker_too(package: Make) -> None:
    told = package(GOOD)
    run = tracking.tracked(work(error=Stopped("stopped")), "trackio", ABOUT, lambda found: {"never": 1})
    with pytest.raises(Stopped):
        finished(run)
    until = time.monotonic() + 60
    while [name for name, _ in calls(told)][-1:] != ["finish"] and time.monotonic() < until:
        time.sleep(0.02)
    assert [name for name, _ in calls(told)] == ["init", "log", "log", "log", "finish"]


def test_without_a_tracker_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_Line", None)
    assert tracked(work(), "") == ("done", [], 3)


def test_a_run_is_the_same_with_and_without(package: Make, tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    """Bytes of the weights, metrics and history; no place of this machine is told."""
    told = package(GOOD)
    tiny.prune(tmp_path / "out", track="trackio")
    assert outcome(tmp_path / "out") == outcome(pruned)
    (_, begun), *rest = calls(told)
    assert begun["name"] == "out" and begun["config"]["data"] == "…/words"
    assert str(tiny.root) not in told.read_text() and str(tmp_path) not in told.read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    logged = [numbers for call, (numbers, _) in rest[:-2] if call == "log"]
    rows = [row for row in report["history"] if row["phase"] == "prune"]
    losses = [numbers["prune/loss/total"] for numbers in logged if "prune/loss/total" in numbers]
    assert losses == [row["losses"]["total"] for row in rows]
    summary = rest[-2][1][0]
    assert summary["result/pruned/accuracy"] == report["metrics"]["pruned"]["accuracy"]
    assert summary["result/sparsity"] == report["sparsity"]["achieved"]


@pytest.mark.usefixtures("sweeps_fork")
def test_the_runs_of_a_sweep_are_a_group(package: Make, tiny: Tiny, tmp_path: Path) -> None:
    told = package(GOOD)
    few = {"losses": "ce", "epochs": 1, "teacher_epochs": 1, "sparsity": "0.5,0.6"}
    done = invoke(*tiny.arguments(tmp_path / "grid", method="magnitude", track="trackio", **few), "-q")
    assert done.exit_code == 0, done.stderr
    begun = [given for call, given in calls(told) if call == "init"]
    assert [one["group"] for one in begun] == ["grid", "grid"]
    assert sorted(one["name"] for one in begun) == ["magnitude-0.5-seed1", "magnitude-0.6-seed1"]


def test_every_name_has_its_tracker() -> None:
    assert tuple(trackers.TRACKERS) == names.TRACKERS


@pytest.mark.parametrize("name", ["nobody", "os", "wandb.sdk"])
def test_only_four_names_are_trackers(name: str, tiny: Tiny, tmp_path: Path) -> None:
    """A file of options cannot have another package imported."""
    (tmp_path / "run.toml").write_text(f'track = "{name}"\n')
    done = invoke(*tiny.arguments(tmp_path / "out"), "--config", str(tmp_path / "run.toml"))
    assert done.exit_code == 2
    assert "trackio, wandb, tensorboard, mlflow" in done.stderr
