"""Runs of whole units and of targets: exact, the same after a stop, sliced as reported, and refused in time."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FFN, HEADS, HIDDEN, LAYERS, PRUNABLE, SOURCES, Tiny, invoke, outcome

import capcli
from capcli.errors import ConfigError
from capcli.pruning import speed
from capcli.pruning.costs import Speeds
from capcli.pruning.topk import kept_count
from capcli.stored import read_tensors

HEAD, NEURON = 4 * HIDDEN * HIDDEN // HEADS, 2 * HIDDEN
LENGTH = 5  # tokens of a text in the middle
TABLES = [
    Speeds(heads=[(1, 0.8), (HEADS, 1.0)], neurons=[(8, share), (FFN, 1.0)], least=share - 0.2) for share in (0.4, 0.7)
]


def run(tiny: Tiny, out: Path, **chosen: Any) -> Any:
    """A run of whole units; a target in place of the sparsity."""
    sparsity = {"sparsity": None} if "target" in chosen else {}
    return tiny.prune(out, **{"method": "structured", **sparsity, **chosen})


KWON: dict[str, Any] = {"method": "structured", "sparsity": None}


def config(tiny: Tiny, out: Path, **chosen: Any) -> Any:
    return tiny.prune_config(out, **{**KWON, **chosen})


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> list[Speeds]:
    """What is measured: another table each time, none after the last."""
    left = list(TABLES)

    def measured(model: Any, length: int) -> Generator[tuple[int, int], None, Speeds]:
        assert length == LENGTH
        yield 1, 1
        return left.pop(0)

    monkeypatch.setattr(speed, "speeds", measured)
    return left


def test_nothing_is_trained_with_0_epochs_and_slices_are_as_small_as_is_said(tiny: Tiny, tmp_path: Path) -> None:
    """Only matrices of whole units change; twice the same bytes; what stays is what a sliced file holds."""
    report = run(tiny, tmp_path / "a", epochs=0, sparsity=0.5, keep_work=True, store="fp32", stairs="once")
    assert report["losses"] == []
    assert {row["phase"] for row in report["history"]} == {"teacher"}
    assert report["notes"] == ["nothing was trained: masks and weights come from 80 calibration examples"]
    kept, wanted = report["sparsity"]["kept_weights"], kept_count(0.5, PRUNABLE)
    assert wanted - NEURON < kept <= wanted
    assert report["reached"]["params"] == kept / PRUNABLE
    student = capcli.load(tmp_path / "a").state_dict()
    teacher = read_tensors(tmp_path / "a" / "work" / "teacher" / "model.safetensors")
    untouched = [name for name in student if "encoder.layer" not in name or "LayerNorm" in name]
    assert untouched
    assert all(student[name].equal(teacher[name]) for name in untouched)
    errors = {row["name"]: row.get("output_error") for row in report["sparsity"]["per_matrix"]}
    assert {name for name, error in errors.items() if error is not None} == {
        name for name in errors if name.endswith("output.dense.weight")
    }
    run(tiny, tmp_path / "b", epochs=0, sparsity=0.5, store="fp32", stairs="once")
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")

    done = invoke("export", str(tmp_path / "a"), "--to", "sliced", "-o", str(tmp_path / "small"), "--json", "-q")
    assert done.exit_code == 0, done.stderr
    whole, small = capcli.load(tmp_path / "a"), capcli.load(tmp_path / "small")
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(whole(input_ids=ids).logits, small(input_ids=ids).logits, atol=1e-5)
    inside = sum(p.numel() for name, p in small.named_parameters() if "encoder.layer" in name and p.dim() == 2)
    assert kept <= inside < kept + LAYERS * 8 * NEURON  # neurons are filled up to multiples of 8


@pytest.mark.parametrize("kind", ["regression", "embedding"])
def test_other_kinds_of_tasks(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    task, data = SOURCES[kind]
    chosen = {"task": task, "data": getattr(tiny, data), "epochs": 0, "teacher_epochs": 1, "max_length": 32}
    report = run(tiny, tmp_path / "out", sparsity=0.4, **chosen)
    wanted = kept_count(0.4, PRUNABLE)
    assert wanted - NEURON < report["sparsity"]["kept_weights"] <= wanted


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [({"target": "macs=0.4"}, "macs"), ({"target": "params=40%"}, "params")],
    ids=str,
)
def test_a_target_is_met_to_within_a_neuron(tiny: Tiny, tmp_path: Path, chosen: dict[str, str], kept: str) -> None:
    report = run(tiny, tmp_path / "out", epochs=0, stairs="once", **chosen)
    reached, macs = report["reached"], PRUNABLE + LENGTH * LAYERS * 2 * HIDDEN
    assert (reached["target"], reached["length"]) == (chosen["target"], LENGTH)
    neuron = NEURON / (macs if kept == "macs" else PRUNABLE)
    assert 0.4 - neuron < reached[kept] <= 0.4
    assert "speedup" not in reached
    masks = [row["kept"] for row in report["sparsity"]["per_matrix"] if row["name"].endswith("self.query.weight")]
    heads = sum(masks) * 4 // HEAD
    attention = heads * LENGTH * 2 * HIDDEN // HEADS
    assert reached["macs"] == pytest.approx((report["sparsity"]["kept_weights"] + attention) / macs)


@pytest.mark.parametrize(
    "chosen",
    [
        {"sparsity": 0.7, "stairs": "0.4,0.7"},
        {"sparsity": None, "target": "latency=1.5x"},
    ],
    ids=str,
)
def test_stopped_between_stairs(tiny: Tiny, tmp_path: Path, tables: list[Speeds], chosen: dict[str, Any]) -> None:
    """Byte for byte the same after a stop, though another measurement would give another table; the checkpoint holds
    nothing but network, moments, what is alive, and the errors."""
    timed = "target" in chosen
    chosen = {"checkpoint_seconds": 0, **chosen}
    tiny.stop(tmp_path / "out", "8/20, ", **{**KWON, **chosen})
    state = max((tmp_path / "out" / "work" / "prune-steps").iterdir()) / "state.safetensors"
    names = {name for name in read_tensors(state) if name.startswith("pruner.")}
    assert names == {"pruner.alive", "pruner.errors"}
    assert len(tables) == len(TABLES) - timed
    first = run(tiny, tmp_path / "out", **chosen)
    assert len(tables) == len(TABLES) - timed
    tables[:] = TABLES
    run(tiny, tmp_path / "whole", **chosen)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    assert not timed or first["reached"]["speedup"] >= 1.5


def test_a_target_out_of_reach_is_refused_before_anything_is_trained(
    tiny: Tiny, tmp_path: Path, tables: list[Speeds]
) -> None:
    for target, nearest in (("macs=0.05", "macs=0.1373"), ("latency=9x", "latency=5x")):
        with pytest.raises(ConfigError, match=f"--target {target} cannot be met") as refused:
            run(tiny, tmp_path / "out", target=target)
        assert refused.value.hint.startswith(f"the nearest is --target {nearest}")
        assert not (tmp_path / "out").exists(), "the command with the target of the hint is another run"


def test_a_plan_and_what_is_printed(tiny: Tiny, tmp_path: Path) -> None:
    """The plan needs no measurement; the summary says what was asked for and what is left."""
    chosen = {"method": "structured", "target": "latency=2x", "epochs": 0}
    words = tiny.arguments(tmp_path / "out", **chosen)
    at = words.index("--sparsity")
    words = words[:at] + words[at + 2 :]
    plan = invoke(*words, "--plan", "--json", "-q")
    assert plan.exit_code == 0, plan.stderr
    assert json.loads(plan.stdout)["kept_weights"] == kept_count(0.5, PRUNABLE)
    assert not (tmp_path / "out").exists()
    words[words.index("latency=2x")] = "macs=0.5"
    done = invoke(*words, "-q")
    assert done.exit_code == 0, done.stderr
    assert "requested macs=0.5" in done.stdout
    assert "multiply-adds" in done.stdout
    page, card = ((tmp_path / "out" / name).read_text("utf-8") for name in ("report.html", "README.md"))
    assert "`cap export FOLDER --to sliced` cuts out what was removed" in card
    assert "| speed | not measured |" in card, "nothing was trained"
    assert "0.00 examples per second" not in page
    assert "macs=0.5" in page
