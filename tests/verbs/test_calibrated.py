"""Whole runs of the staged methods: without training, stopped inside a stair, on every kind of task, on bad input."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import PRUNABLE, SOURCES, Tiny, invoke, outcome, write_csv

import capcli
from capcli.errors import CapError, DataError, RunFailed
from capcli.pruning import setup
from capcli.pruning.calibration import Calibration
from capcli.pruning.topk import kept_count
from capcli.stored import read_tensors
from capcli.verbs import prune

NO_TRAINING = {"epochs": 0}


def run(tiny: Tiny, out: Path, **chosen: Any) -> Any:
    return tiny.prune(out, **{"method": "fisher", **chosen})


def test_nothing_is_trained_with_0_epochs(tiny: Tiny, tmp_path: Path) -> None:
    """The classifier and the embeddings stay those of the teacher; the report says so; twice the same bytes."""
    report = run(tiny, tmp_path / "a", epochs=0, keep_work=True, calibration=64, store="fp32")
    assert report["losses"] == []
    assert re.search(r"<th[^>]*>losses</th>\s*<td[^>]*>none<", (tmp_path / "a" / "report.html").read_text())
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
    run(tiny, tmp_path / "b", epochs=0, calibration=64, store="fp32")
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_without_refit_only_masks_change(tiny: Tiny, tmp_path: Path) -> None:
    report = run(tiny, tmp_path / "out", epochs=0, refit=False, keep_work=True, store="fp32")
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


@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "cap-m", "init": "fisher"},
        {"method": "magnitude", "refit": True, "stairs": "0.5,0.9"},
        {"method": "cap-f", "refit": True, "sparsity": 0.5},
        {"method": "fisher", "fisher_block": 4},
        {"method": "obert", "selections": 2},
    ],
    ids=str,
)
def test_stopped_with_a_refit_or_a_calibrated_start(tiny: Tiny, tmp_path: Path, chosen: dict[str, Any]) -> None:
    """Of any method: byte for byte the same after a stop, and the exact count."""
    chosen = {"sparsity": 0.9, "checkpoint_seconds": 0, **chosen}
    whole = tiny.prune(tmp_path / "whole", **chosen)
    tiny.stop(tmp_path / "out", "8/20, ", **chosen)
    tiny.prune(tmp_path / "out", **chosen)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    if chosen["method"] != "cap-f":
        assert whole["sparsity"]["kept_weights"] == kept_count(0.9, PRUNABLE)
    fitted = [row.get("output_error") for row in whole["sparsity"]["per_matrix"]]
    assert any(fitted) == (chosen["method"] not in ("cap-m", "obert"))


@pytest.mark.parametrize("method", ["fisher", "cap-fisher"])
def test_stopped_inside_a_stair(tiny: Tiny, tmp_path: Path, method: str) -> None:
    """Byte for byte the same; the checkpoint holds nothing but network, moments, what is alive, and the errors."""
    chosen = {"method": method, "sparsity": 0.95, "checkpoint_seconds": 0}
    run(tiny, tmp_path / "whole", **chosen)
    tiny.stop(tmp_path / "out", "8/20, ", **chosen)
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
    pieces = Calibration.pieces

    def scarce(self: Calibration, step: int, size: int) -> Any:
        if self.count > 16:
            raise MemoryError
        return pieces(self, step, size)

    monkeypatch.setattr(Calibration, "pieces", scarce)
    with pytest.raises(RunFailed, match="out of memory") as caught:
        run(tiny, tmp_path / "out", epochs=0)
    assert caught.value.hint.startswith("lower --calibration (this keeps: teacher, dense), or start over")
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
    assert setup._units(config, 300, 0, 0, 0)["prune"] == pytest.approx(steps)


# One shot, and healing -----------------------------------------------------------------------------------------------

ONE_SHOT = ("wanda", "sparsegpt", "multiflow", "sds")


@pytest.fixture(scope="module")
def fine_tuned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model after training on the task, with its head."""
    out = tmp_path_factory.mktemp("fine-tuned")
    run(tiny, out, epochs=0, refit=False, keep_work=True)
    return str(out / "work" / "teacher")


@pytest.mark.parametrize("method", ONE_SHOT)
def test_one_shot(tiny: Tiny, tmp_path: Path, fine_tuned: str, method: str) -> None:
    """From the command line, on two kinds of tasks: exact, untrained, errors of outputs told, the same twice."""
    for name in ("a", "b"):
        result = invoke(*tiny.arguments(tmp_path / name, model=fine_tuned, method=method, **NO_TRAINING))
        assert result.exit_code == 0, result.stderr
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["sparsity"]["kept_weights"] == round(0.3 * PRUNABLE)
    assert report["losses"] == report["history"] == []
    assert report["notes"][0] == "nothing was trained: masks and weights come from 80 calibration examples"
    assert all(0 <= row["output_error"] < 1 for row in report["sparsity"]["per_matrix"])
    assert report["teacher"]["source"] == report["model"] == "…/teacher"
    pairs = run(tiny, tmp_path / "ner", method=method, task="ner", data=tiny.tags, teacher_epochs=1, epochs=0)
    assert pairs["sparsity"]["kept_weights"] == round(0.3 * PRUNABLE)


@pytest.mark.parametrize("method", [*ONE_SHOT, "fisher"])
def test_healed(tiny: Tiny, tmp_path: Path, fine_tuned: str, method: str) -> None:
    """Masks stay, weights move; stopped and continued it is the same, and nothing is calibrated again."""
    chosen = {"method": method, "model": fine_tuned, "epochs": 0, "heal": 7, "calibration": 64, "checkpoint_seconds": 0}
    cut = run(tiny, tmp_path / "cut", **{**chosen, "heal": 0})
    whole = run(tiny, tmp_path / "whole", **chosen)
    assert whole["losses"] == ["kd"]
    assert [row["step"] for row in whole["history"]] == [1, 2, 3, 4, 5, 6, 7]
    assert whole["history"][0]["losses"].keys() == {"kd", "total"}
    assert whole["notes"][0].endswith("; then 7 steps of distillation on them, with fixed masks")
    before, after = (capcli.load(tmp_path / name).state_dict() for name in ("cut", "whole"))
    layers = [name for name in before if ".layer." in name and name.endswith("weight") and "LayerNorm" not in name]
    assert all((before[name] == 0).equal(after[name] == 0) for name in layers)
    assert not any(before[name].equal(after[name]) for name in layers)
    assert cut["sparsity"]["kept_weights"] == whole["sparsity"]["kept_weights"]
    told = []
    tiny.stop(tmp_path / "out", "3/7", **chosen)
    for event in prune.prune(tiny.prune_config(tmp_path / "out", **chosen)):
        told.append(event.status)
    assert not any("calibrating" in status for status in told)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("kind", SOURCES)
def test_healing_on_every_kind_of_task(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    task, data = SOURCES[kind]
    chosen = {"task": task, "data": getattr(tiny, data), "teacher_epochs": 1, "max_length": 32, "calibration": 40}
    losses = "kd" if kind == "embedding" else "ce,kd"
    report = run(tiny, tmp_path / "out", method="wanda", epochs=0, heal=4, losses=losses, **chosen)
    assert report["losses"] == losses.split(",")
    assert report["sparsity"]["kept_weights"] == round(0.3 * PRUNABLE)


def test_a_model_that_knows_the_task_is_pruned_as_it_is(tiny: Tiny, tmp_path: Path, fine_tuned: str) -> None:
    """As if it were named as the teacher too; what has no head gets a teacher first, and both are said."""
    chosen = {"method": "wanda", "epochs": 0, "keep_work": True}
    told = [event.note for event in prune.prune(tiny.prune_config(tmp_path / "a", model=fine_tuned, **chosen))]
    assert any(note.endswith("was fine-tuned for these labels: it is pruned as it is") for note in told)
    assert not (tmp_path / "a" / "work" / "teacher").exists()
    run(tiny, tmp_path / "b", model=fine_tuned, teacher=fine_tuned, **chosen)
    assert outcome(tmp_path / "a")[0] == outcome(tmp_path / "b")[0]
    told = [event.note for event in prune.prune(tiny.prune_config(tmp_path / "c", **chosen))]
    assert any("has no head for these labels: a teacher is fine-tuned first" in note for note in told)
    assert (tmp_path / "c" / "work" / "teacher").exists()
    trained = run(tiny, tmp_path / "d", model=fine_tuned, method="movement", keep_work=True)
    assert trained["teacher"]["source"] == "fine-tuned in this run"


def test_a_fall_beyond_the_noise_is_said(tiny: Tiny, tmp_path: Path, fine_tuned: str) -> None:
    few = run(tiny, tmp_path / "few", model=fine_tuned, method="wanda", epochs=0, sparsity=0.1)
    many = run(tiny, tmp_path / "many", model=fine_tuned, method="multiflow", epochs=0, sparsity=0.98, refit=False)
    for report, falls in ((few, False), (many, True)):
        dense, pruned = report["metrics"]["dense"]["accuracy"], report["metrics"]["pruned"]["accuracy"]
        assert any("training will be needed" in note for note in report["notes"]) == falls, (dense, pruned)


def test_a_calibration_of_few_tokens_is_said(tiny: Tiny, tmp_path: Path, fine_tuned: str) -> None:
    """Three examples: less than a batch, and fewer tokens than inputs, so that Gram matrices are singular."""
    for method in ("wanda", "sparsegpt"):
        report = run(tiny, tmp_path / method, model=fine_tuned, method=method, epochs=0, calibration=3)
        assert any("calibration reads about" in note and "64 inputs" in note for note in report["notes"])
        assert report["sparsity"]["kept_weights"] == round(0.3 * PRUNABLE)


def test_six_examples_are_enough_for_what_needs_no_labels(tiny: Tiny, tmp_path: Path, fine_tuned: str) -> None:
    rows = [("good film", "positive"), ("bad film", "negative")] * 3
    write_csv(tmp_path / "data" / "train.csv", ("text", "label"), rows)
    write_csv(tmp_path / "data" / "validation.csv", ("text", "label"), rows)
    report = run(tiny, tmp_path / "out", model=fine_tuned, data=str(tmp_path / "data"), method="wanda", epochs=0)
    assert report["notes"][-1].startswith("nothing was trained: masks and weights come from 6 calibration examples")


def test_a_plan_of_one_shot(tiny: Tiny, tmp_path: Path, fine_tuned: str) -> None:
    options = {"model": fine_tuned, "method": "sparsegpt", "plan": True, "json": True, **NO_TRAINING}
    result = invoke(*tiny.arguments(tmp_path / "out", **options))
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["kept_weights"] == round(0.3 * PRUNABLE)


# Texts without labels ------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(tiny: Tiny, tmp_path: Path) -> str:
    """The texts of the training set, one per line, and lines without any; in a folder without training data."""
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(row["text"] for row in read_csv(Path(tiny.data) / "train.csv")) + "\n \n")
    (tmp_path / "only").mkdir()
    shutil.copy(Path(tiny.data) / "validation.csv", tmp_path / "only" / "validation.csv")
    return str(path)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "fisher"])
def test_texts_without_labels(tiny: Tiny, tmp_path: Path, fine_tuned: str, lines: str, method: str) -> None:
    """Without labels, without a training set; what needs none gives what it gives with the labelled texts."""
    data = str(tmp_path / "only")
    chosen = {"model": fine_tuned, "method": method, "epochs": 0}
    report = run(tiny, tmp_path / "out", text=lines, data=data, **chosen)
    assert report["sparsity"]["kept_weights"] == round(0.3 * PRUNABLE)
    assert report["notes"][-1].startswith("nothing was trained: masks and weights come from 80 calibration examples")
    assert report["config"]["text"] == "…/texts.txt"
    assert "calibration texts" in report["fingerprints"]
    labelled = run(tiny, tmp_path / "labelled", **chosen)
    same = outcome(tmp_path / "out")[0] == outcome(tmp_path / "labelled")[0]
    assert same == (method != "fisher") or labelled["metrics"]["dense"]["accuracy"] == 1.0


def test_texts_of_a_table_and_healing_on_them(tiny: Tiny, tmp_path: Path, fine_tuned: str, lines: str) -> None:
    write_csv(tmp_path / "some.csv", ("id", "text"), [(str(i), "a good film") for i in range(20)])
    chosen = {"model": fine_tuned, "method": "wanda", "epochs": 0, "heal": 3, "data": str(tmp_path / "only")}
    report = run(tiny, tmp_path / "out", text=str(tmp_path / "some.csv"), **chosen)
    assert report["losses"] == ["kd"]
    assert len(report["history"]) == 3


@pytest.mark.parametrize("method", ["cap-m", "fisher", "cap-f"])
def test_training_on_texts_without_labels(tiny: Tiny, tmp_path: Path, fine_tuned: str, lines: str, method: str) -> None:
    """The teacher's answers are learned, supervised terms by its classes; after a stop the same bytes."""
    chosen = {"model": fine_tuned, "method": method, "text": lines, "data": str(tmp_path / "only"), "epochs": 2}
    chosen |= {"checkpoint_seconds": 0, "sparsity": 0.5}
    report = run(tiny, tmp_path / "out", **chosen)
    assert "ce" not in report["losses"] and "kd" in report["losses"]
    assert {row["phase"] for row in report["history"]} == {"prune"}
    terms = {name for row in report["history"] for name in row["losses"]}
    assert ("fic_s" in terms) == (method != "fisher")
    tiny.stop(tmp_path / "again", "4/", **chosen)
    run(tiny, tmp_path / "again", **chosen)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "again")


@pytest.mark.parametrize("form", ["table", "lines"])
def test_pairs_without_labels(tiny: Tiny, tmp_path: Path, form: str) -> None:
    task = {"task": "text-pair-classification", "data": tiny.pairs}
    run(tiny, tmp_path / "made", method="magnitude", keep_work=True, **task)
    model = str(tmp_path / "made" / "work" / "teacher")
    pairs = [("a good film", "it is good"), ("a bad film", "it is good")] * 20
    if form == "table":
        write_csv(tmp_path / "pairs.csv", ("text", "pair"), pairs)
    else:
        (tmp_path / "pairs.txt").write_text("".join(f"{a}\t{b}\n" for a, b in pairs))
    text = str(tmp_path / ("pairs.csv" if form == "table" else "pairs.txt"))
    report = run(tiny, tmp_path / "out", model=model, method="movement", text=text, epochs=1, **task)
    assert report["sparsity"]["kept_weights"] == round(0.3 * PRUNABLE)
    assert report["losses"] == ["kd"]


def test_questions_without_answers(tiny: Tiny, tmp_path: Path) -> None:
    task = {"task": "question-answering", "data": tiny.answers, "max_length": 64}
    run(tiny, tmp_path / "made", method="magnitude", keep_work=True, **task)
    model = str(tmp_path / "made" / "work" / "teacher")
    write_csv(tmp_path / "some.csv", ("question", "context"), [("who is it ?", "it is a good film")] * 24)
    chosen = {"model": model, "method": "movement", "text": str(tmp_path / "some.csv"), "epochs": 1}
    report = run(tiny, tmp_path / "out", **chosen, **task)
    assert report["losses"] == ["kd"]


def test_texts_in_another_language_are_said(tiny: Tiny, tmp_path: Path, fine_tuned: str, lines: str) -> None:
    Path(lines).write_text("ein unbekanntes Wort\n" * 30)
    report = run(tiny, tmp_path / "out", model=fine_tuned, method="wanda", epochs=0, text=lines)
    assert any(note.startswith("unknown to the tokenizer: ") and "…/texts.txt" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("content", "chosen", "said"),
    [
        ("\n \n", {}, "has no text"),
        (None, {}, "does not exist"),
        ("a film\n", {"model": ""}, "has no head for these labels, and --text has no labels"),
        ("a film\n", {"heal": 2, "losses": "ce,kd"}, "--text has no labels"),
        ("a film\n", {"method": "movement", "epochs": 2, "losses": "ce,kd"}, "--text has no labels, and ce needs them"),
        ("a film\n", {"epochs": 2, "method": "cap-m", "task": "text-pair-classification"}, "line 1 of .* has 0 tabs"),
    ],
)
def test_texts_that_do_not_serve(
    tiny: Tiny, tmp_path: Path, fine_tuned: str, content: str | None, chosen: dict[str, Any], said: str
) -> None:
    if content is not None:
        (tmp_path / "texts.txt").write_text(content)
    data = {"regression": tiny.numbers, "ner": tiny.tags, "text-pair-classification": tiny.pairs}.get(
        chosen.get("task", ""), tiny.data
    )
    chosen = {"model": fine_tuned, "method": "wanda", "epochs": 0, "data": data, **chosen}
    chosen["model"] = chosen["model"] or tiny.model
    with pytest.raises(CapError, match=said):
        run(tiny, tmp_path / "out", text=str(tmp_path / "texts.txt"), **chosen)
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_text_column_that_is_not_there_is_not_another_one(tiny: Tiny, tmp_path: Path, fine_tuned: str) -> None:
    write_csv(tmp_path / "some.csv", ("id", "text"), [(str(i), "a good film") for i in range(20)])
    (tmp_path / "data").mkdir()
    rows = (Path(tiny.data) / "validation.csv").read_text()
    (tmp_path / "data" / "validation.csv").write_text(rows.replace("text,label", "words,label", 1))
    chosen = {"model": fine_tuned, "method": "wanda", "epochs": 0, "text": str(tmp_path / "some.csv")}
    with pytest.raises(CapError, match=r"some.csv has no text column 'words'; its columns: 'id', 'text'"):
        run(tiny, tmp_path / "out", text_column="words", data=str(tmp_path / "data"), **chosen)
