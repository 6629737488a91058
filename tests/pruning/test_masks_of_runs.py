"""Masks of other runs: what more of them kept stays, and nothing else changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PRUNABLE, WEIGHTS, Tiny, outcome, write_model

import capcli
from capcli.artifact import reader
from capcli.errors import ConfigError, ModelError
from capcli.events import StopFlag
from capcli.models import loading
from capcli.pruning.criteria import votes
from capcli.pruning.masked import attach
from capcli.verbs import prune

FEW: dict[str, Any] = {"teacher_epochs": 1, "max_train_samples": 48, "max_eval_samples": 16}


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the same model, on other tasks and by other methods."""
    home = tmp_path_factory.mktemp("runs")
    tiny.prune(home / "a", method="magnitude", sparsity=0.6, epochs=1, **FEW)
    numbers = {"task": "regression", "data": tiny.numbers}
    tiny.prune(home / "b", method="fisher", sparsity=0.5, epochs=0, **numbers, **FEW)
    return [home / "a", home / "b"]


def test_ranked_by_votes_then_by_magnitude(tiny: Tiny, runs: list[Path]) -> None:
    """Against a loop over all weights."""
    model = loading.load_dense(tiny.model, ("negative", "positive"), "classification", 1)
    matrices = attach(model.prunable(), learned=False)
    subject: Any = type("Subject", (), {"matrices": matrices})
    scores = votes.voted(runs).scores
    assert scores is not None
    order = scores({}, subject).argsort(descending=True, stable=True).tolist()
    stored = [reader.load(folder / WEIGHTS) for folder in runs]
    slow = []
    for index, name in enumerate(matrices.names):
        for i, weight in enumerate(matrices.original(index).flatten().tolist()):
            slow.append((sum(bool(one[name].flatten()[i] != 0) for one in stored), abs(weight)))
    assert len({count for count, _ in slow}) == 3
    found, wanted = [slow[i] for i in order], sorted(slow, reverse=True)
    assert [count for count, _ in found] == [count for count, _ in wanted]
    assert [size for _, size in found] == pytest.approx([size for _, size in wanted], abs=1e-6)


@pytest.mark.parametrize("chosen", [{"epochs": 0}, {"epochs": 2, "method": "cap-fisher"}], ids=str)
def test_a_run_with_masks_of_others(tiny: Tiny, runs: list[Path], tmp_path: Path, chosen: dict[str, Any]) -> None:
    """The exact count; the same bytes twice and after a stop; masks stay as they are chosen."""
    options = {**FEW, "method": "fisher", "sparsity": 0.7, "mask_from": f"{runs[0]},{runs[1]}", **chosen}
    options["checkpoint_seconds"] = 0
    report = tiny.prune(tmp_path / "whole", **options)
    assert report["sparsity"]["kept_weights"] == round(0.3 * PRUNABLE)
    assert {f"masks of run {number}" for number in (1, 2)} <= report["fingerprints"].keys()
    assert str(tmp_path.parent) not in (tmp_path / "whole" / "report.json").read_text()
    if chosen["epochs"]:
        tiny.stop(tmp_path / "out", "3/", **options)
    tiny.prune(tmp_path / "out", **options)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    ours, theirs = reader.load(tmp_path / "out" / WEIGHTS), [reader.load(run / WEIGHTS) for run in runs]
    names = [row["name"] for row in report["sparsity"]["per_matrix"]]
    kept = torch.cat([(ours[name] != 0).flatten() for name in names])
    counts = sum(torch.cat([(one[name] != 0).flatten() for name in names]).int() for one in theirs)
    assert int((kept & (counts == 0)).sum()) <= PRUNABLE * 0.005  # the floor of a matrix
    assert counts[kept].float().mean() > counts[~kept].float().mean() + 0.5


def test_a_finished_run_outlives_those_that_it_took_masks_from(tiny: Tiny, runs: list[Path], tmp_path: Path) -> None:
    """As one whose teacher is gone: it is left alone, with a note."""
    other = shutil.copytree(runs[0], tmp_path / "other")
    options = {**FEW, "method": "fisher", "sparsity": 0.7, "epochs": 0, "mask_from": str(other)}
    tiny.prune(tmp_path / "out", **options)
    shutil.rmtree(other)
    notes = [event.note for event in prune.prune(tiny.prune_config(tmp_path / "out", **options))]
    assert any("cannot check whether its inputs are still the same" in note for note in notes)
    assert "this run is already complete" in notes


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"method": "movement"}, "--mask-from fixes the masks, and movement chooses its own"),
        ({"stairs": "0.5,0.7"}, "--stairs has no effect with --mask-from"),
        ({"selections": 2}, "--selections has no effect with --mask-from"),
        ({"mask_from": ","}, "--mask-from names no run beside a comma"),
        ({"mask_from": "runs/a,"}, "--mask-from names no run beside a comma"),
    ],
)
def test_options_that_do_not_fit(tiny: Tiny, tmp_path: Path, chosen: dict[str, Any], message: str) -> None:
    options = {"method": "fisher", "sparsity": 0.7, "mask_from": "runs/a", **chosen}
    with pytest.raises(ConfigError, match=message):
        tiny.prune_config(tmp_path / "out", **options)


def test_masks_that_do_not_fit(tiny: Tiny, runs: list[Path], tmp_path: Path) -> None:
    """Those of another base, of one that is not known, of a run that is not finished, and of no run at all."""
    options = {**FEW, "method": "fisher", "sparsity": 0.7, "epochs": 0}
    write_model(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match="pruned another model than"):
        tiny.prune(tmp_path / "out", model=str(tmp_path / "other"), mask_from=str(runs[0]), **options)
    with pytest.raises(ModelError, match="is not the output of cap prune"):
        tiny.prune(tmp_path / "out", mask_from=tiny.model, **options)
    flag = StopFlag()
    with pytest.raises(capcli.errors.Stopped):
        for event in prune.prune(tiny.prune_config(tmp_path / "stopped", **FEW), flag=flag):
            if event.phase == "prune":
                flag.reason = "the test"
    with pytest.raises(ModelError, match="stopped is not finished"):
        tiny.prune(tmp_path / "out", mask_from=str(tmp_path / "stopped"), **options)
    alone = shutil.copytree(runs[0], tmp_path / "alone")
    (alone / "report.json").unlink()
    with pytest.raises(ModelError, match="alone does not say which model it pruned"):
        tiny.prune(tmp_path / "out", mask_from=str(alone), **options)
