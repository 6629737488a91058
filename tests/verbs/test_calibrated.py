"""Whole runs of the staged methods: without training, stopped inside a stair, on every kind of task, on bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import PRUNABLE, SOURCES, Tiny, invoke, outcome, write_csv

import capcli
from capcli.errors import DataError, RunFailed, Stopped
from capcli.events import StopFlag
from capcli.pruning import setup
from capcli.pruning.calibration import Calibration
from capcli.stored import read_tensors
from capcli.verbs import prune


def run(tiny: Tiny, out: Path, **chosen: Any) -> Any:
    return tiny.prune(out, **{"method": "fisher", **chosen})


def test_nothing_is_trained_with_0_epochs(tiny: Tiny, tmp_path: Path) -> None:
    """The classifier and the embeddings stay those of the teacher; the report says so; twice the same bytes."""
    report = run(tiny, tmp_path / "a", epochs=0, keep_work=True, calibration=64)
    assert report["losses"] == []
    assert {row["phase"] for row in report["history"]} == {"teacher"}
    assert report["notes"] == ["nothing was trained: masks and weights come from 64 calibration examples"]
    assert report["sparsity"]["kept_weights"] == round(0.3 * PRUNABLE)
    assert all(0 < row["output_error"] < 1 for row in report["sparsity"]["per_matrix"])
    assert report["timing"]["prune_seconds"] > 0
    assert not list((tmp_path / "a" / "work").glob("bank-*"))
    student = capcli.load(tmp_path / "a").state_dict()
    teacher = read_tensors(tmp_path / "a" / "work" / "teacher" / "model.safetensors")
    same = [name for name in student if student[name].equal(teacher[name])]
    assert set(student) - set(same) == {
        name for name in student if ".layer." in name and "LayerNorm" not in name
    }  # matrices, and the biases that the refit moves
    run(tiny, tmp_path / "b", epochs=0, calibration=64)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_without_refit_only_masks_change(tiny: Tiny, tmp_path: Path) -> None:
    report = run(tiny, tmp_path / "out", epochs=0, refit=False, keep_work=True)
    assert report["notes"] == ["nothing was trained: the masks come from 80 calibration examples"]
    assert not any("output_error" in row for row in report["sparsity"]["per_matrix"])
    student = capcli.load(tmp_path / "out").state_dict()
    teacher = read_tensors(tmp_path / "out" / "work" / "teacher" / "model.safetensors")
    assert all(bool(((tensor == teacher[name]) | (tensor == 0)).all()) for name, tensor in student.items())


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_task(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    task, data = SOURCES[kind]
    chosen = {"task": task, "data": getattr(tiny, data), "epochs": 0, "teacher_epochs": 1, "max_length": 32}
    report = run(tiny, tmp_path / "out", **chosen)
    assert report["sparsity"]["kept_weights"] == round(0.3 * PRUNABLE)


def test_the_teacher_as_the_target_of_the_refit(tiny: Tiny, tmp_path: Path) -> None:
    """At the first stair the student is the teacher: the same. Later it is not."""
    outcomes = []
    for target in ("student", "teacher"):
        for chosen in ({"epochs": 0, "sparsity": 0.5}, {"epochs": 2, "sparsity": 0.95}):
            out = tmp_path / target / str(chosen["epochs"])
            run(tiny, out, refit_target=target, **chosen)
            outcomes.append(outcome(out))
    assert outcomes[0] == outcomes[2]
    assert outcomes[1] != outcomes[3]


@pytest.mark.parametrize("method", ["fisher", "cap-fisher"])
def test_stopped_inside_a_stair(tiny: Tiny, tmp_path: Path, method: str) -> None:
    """Byte for byte the same; the checkpoint holds nothing but network, moments, what is alive, and the errors."""
    chosen = {"method": method, "sparsity": 0.95, "checkpoint_seconds": 0}
    run(tiny, tmp_path / "whole", **chosen)
    flag = StopFlag()
    with pytest.raises(Stopped):
        for event in prune.prune(tiny.prune_config(tmp_path / "out", **chosen), flag=flag):
            if event.phase == "prune" and event.status.startswith("step 8/20, "):
                flag.reason = "the test"
    state = max((tmp_path / "out" / "work" / "prune-steps").iterdir()) / "state.safetensors"
    names = {name for name in read_tensors(state) if name.startswith("pruner.")}
    assert names == {"pruner.alive", "pruner.errors"}
    run(tiny, tmp_path / "out", **chosen)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_sparsity_rises_in_stairs(tiny: Tiny, tmp_path: Path) -> None:
    report = run(tiny, tmp_path / "out", sparsity=0.95, stairs="0.5,0.8,0.95", epochs=6)
    values = [row["sparsity"] for row in report["history"] if row["phase"] == "prune"]
    assert [values.count(value) for value in (0.5, 0.8, 0.95)] == [5, 10, 15]


def test_a_snapshot_before_each_stair(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out", method="cap-fisher", sparsity=0.95, keep_work=True)
    assert len(list((tmp_path / "out" / "work").glob("bank-snapshot-*"))) == 2  # of 80, 90 and 95 %


def test_too_few_examples_are_said_before_anything_is_done(tiny: Tiny, tmp_path: Path) -> None:
    rows = [("good film", "positive"), ("bad film", "negative")] * 3
    write_csv(tmp_path / "data" / "train.csv", ("text", "label"), rows)
    write_csv(tmp_path / "data" / "validation.csv", ("text", "label"), rows)
    with pytest.raises(DataError, match="calibration needs at least 8 labelled training examples, there are 6"):
        run(tiny, tmp_path / "out", data=str(tmp_path / "data"))
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_in_a_calibration(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names what helps, and it can be followed: with fewer examples the same folder is continued."""
    drawn = Calibration.drawn

    def scarce(self: Calibration, step: int, size: int) -> Any:
        if self.count > 16:
            raise MemoryError
        return drawn(self, step, size)

    monkeypatch.setattr(Calibration, "drawn", scarce)
    with pytest.raises(RunFailed, match="out of memory") as caught:
        run(tiny, tmp_path / "out", epochs=0)
    assert caught.value.hint.startswith("lower --batch-size or --calibration (this keeps: teacher, dense)")
    assert run(tiny, tmp_path / "out", epochs=0, calibration=16)["status"] == "complete"


def test_a_plan(tiny: Tiny, tmp_path: Path) -> None:
    result = invoke(*tiny.arguments(tmp_path / "out", method="fisher", plan=True, json=True, epochs=0))
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["kept_weights"] == round(0.3 * PRUNABLE)
    assert found["minutes"] > 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [
        ({"epochs": 0, "sparsity": 0.6}, 64 * 6),  # gradients, and a refit that takes as long as five of them
        ({"epochs": 0, "refit": False}, 2 * 64),
        ({"epochs": 0, "calibration": 5000}, 2 * 300 * 6),
        ({"epochs": 0, "sparsity": 0.9}, 3 * 64 * 6),
        ({"epochs": 1, "sparsity": 0.97}, 4 * 64 * 6 + 300 * 1.2),
    ],
)
def test_progress_counts_the_calibrations(tiny: Tiny, tmp_path: Path, chosen: dict[str, Any], steps: float) -> None:
    """In training steps of one example, of 300."""
    config = tiny.prune_config(tmp_path, **{"method": "fisher", "calibration": 64, **chosen})
    assert setup._units(config, 300, 0, 0)["prune"] == pytest.approx(steps)
