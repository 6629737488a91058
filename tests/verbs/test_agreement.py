"""Runs, evaluations and exports without any labels: what is measured is agreement with another model."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from tiny import SETTINGS, SOURCES, Tiny, invoke, write_csv, write_jsonl

import capcli
from capcli.config.task import TaskConfig
from capcli.data import texts
from capcli.errors import CapError
from capcli.measuring.metrics import normalised

Teachers = Callable[[str], tuple[str, str]]
COLUMNS = ("text", "pair", "question", "context")
SHOWN = "'s answers, since there were no labels: agreement, not accuracy"
METRICS = {
    "classification": ["agreement"],
    "pairs": ["agreement"],
    "regression": ["agreement_pearson", "agreement_spearman"],
    "multilabel": ["agreement", "agreement_f1"],
    "tokens": ["agreement_f1", "agreement"],
    "spans": ["agreement_f1", "agreement"],
}


def task_of(kind: str) -> tuple[str, str]:
    """The task of a kind, and the name of its folder."""
    return SOURCES.get(kind, ("text-pair-classification", "pairs"))


@pytest.fixture(scope="module")
def teachers(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    """Makes a fine-tuned model of a kind, and the file of its training texts without labels."""
    found: dict[str, tuple[str, str]] = {}

    def make(kind: str) -> tuple[str, str]:
        if kind not in found:
            home, (task, data) = tmp_path_factory.mktemp(kind), task_of(kind)
            chosen = {"task": task, "data": getattr(tiny, data), "method": "magnitude", "epochs": 1}
            tiny.prune(home / "made", keep_work=True, **chosen, **lengths(kind))
            shutil.move(home / "made" / "work" / "teacher", home / "teacher")
            shutil.rmtree(home / "made")
            found[kind] = str(home / "teacher"), str(unlabelled(Path(getattr(tiny, data)), home))
        return found[kind]

    return make


def lengths(kind: str) -> dict[str, int]:
    return {"max_length": 64 if kind == "spans" else 16}


def unlabelled(data: Path, home: Path) -> Path:
    """The training examples without their labels: lines where words have labels, else a table."""
    path = next(data.glob("train.*"))
    with path.open() as file:
        rows = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]
    if "tokens" in rows[0]:
        (home / "texts.txt").write_text("".join(" ".join(row["tokens"]) + "\n" for row in rows))
        return home / "texts.txt"
    write_jsonl(home / "texts.jsonl", [{name: row[name] for name in COLUMNS if name in row} for row in rows])
    return home / "texts.jsonl"


def run(out: Path, kind: str, model: str, text: str, **chosen: Any) -> dict[str, Any]:
    settings = {**SETTINGS, **lengths(kind), "epochs": 1, "method": "movement", "holdout": 0.25}
    found: dict[str, Any] = capcli.prune(
        model=model, task=task_of(kind)[0], text=text, out=str(out), **{**settings, **chosen}
    )
    return found


def held_out(kind: str, text: str) -> list[Any]:
    """The texts of the hold-out of `run`, as a pipeline takes them."""
    source = TaskConfig(task=task_of(kind)[0], text=text)
    data = texts.open_task(source, ("a", "b"), "teacher", holdout=0.25, seed=1)
    ((first, second),) = data.evals["holdout"].chunks()
    return list(zip(first, second, strict=True)) if second else first


def share(ours: list[Any], theirs: list[Any]) -> float:
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


@pytest.mark.parametrize("kind", METRICS)
def test_a_run_without_labels_measures_agreement_with_its_teacher(
    tmp_path: Path, teachers: Teachers, kind: str
) -> None:
    """The values are those of answers that were asked for one by one."""
    model, text = teachers(kind)
    found = run(tmp_path / "out", kind, model, text)["metrics"]
    assert found["reference"] == "teacher"
    assert list(found["pruned"]) == METRICS[kind]
    assert found["dense"] == pytest.approx(dict.fromkeys(METRICS[kind], 1.0))
    asked = held_out(kind, text)
    assert found["n_examples"] == len(asked) == 20
    ours, theirs = ([one([each])[0] for each in asked] for one in map(capcli.pipeline, (tmp_path / "out", model)))
    if kind == "regression":
        numbers = [[answer["score"] for answer in some] for some in (ours, theirs)]
        assert found["pruned"]["agreement_pearson"] == pytest.approx(stats.pearsonr(*numbers)[0], abs=1e-4)
        assert found["pruned"]["agreement_spearman"] == pytest.approx(stats.spearmanr(*numbers)[0], abs=1e-2)
        return
    if kind == "tokens":
        mine, others = ({(i, *place(one)) for i, some in enumerate(all_) for one in some} for all_ in (ours, theirs))
        expected = 2 * len(mine & others) / (len(mine) + len(others))
        assert found["pruned"]["agreement_f1"] == pytest.approx(expected)
        return
    said = {"spans": lambda one: normalised(one["answer"]), "multilabel": lambda one: sorted(x["label"] for x in one)}
    ours, theirs = ([said.get(kind, lambda one: one["label"])(one) for one in some] for some in (ours, theirs))
    assert found["pruned"]["agreement"] == pytest.approx(share(ours, theirs))


def place(entity: dict[str, Any]) -> tuple[Any, ...]:
    return entity["entity_group"], entity["start"], entity["end"]


@pytest.fixture(scope="module")
def agreed(tiny: Tiny, teachers: Teachers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without labels, to read from."""
    out = tmp_path_factory.mktemp("agreed") / "out"
    run(out, "classification", *teachers("classification"))
    return out


def test_everything_that_a_run_writes_says_that_it_is_agreement(agreed: Path, teachers: Teachers) -> None:
    report, page, card = ((agreed / name).read_text() for name in ("report.json", "report.html", "README.md"))
    card = card.replace("\\", "")
    assert "no labels: what is measured is agreement with the teacher, not accuracy" in json.loads(report)["notes"]
    assert json.loads(report)["teacher"]["metrics"] == {}
    assert "of the dense model" not in card.split("## Results")[0]
    assert f"Compared with the teacher{SHOWN}" in card
    assert 'name: "agreement with the teacher, without labels"' in card
    assert "accuracy" not in card.replace("not accuracy", "")
    assert "Agreement with the teacher, not accuracy" in page
    assert "retention" not in page
    assert ">dense 1.0000<" not in page
    again = invoke("prune", teachers("classification")[0], "-o", str(agreed), *asked_again(teachers))
    assert again.exit_code == 1, again.stderr
    assert "already complete" in again.stderr
    assert f"the teacher{SHOWN}" in " ".join(again.stdout.split())
    assert "dense " not in again.stdout.split("metric")[1].split("latency")[0]


def asked_again(teachers: Teachers) -> list[str]:
    """The options of `agreed`, with gates of which one cannot pass."""
    chosen = {
        **SETTINGS,
        "epochs": 1,
        "method": "movement",
        "holdout": 0.25,
        "unlabelled": teachers("classification")[1],
    }
    options = [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    gates = ["--max-drop", "agreement=0.999", "--min-retention", "0.001", "--min", "agreement=0", "--max-bytes", "1"]
    return [*options, "--task", "text-classification", *gates]


def test_an_evaluation_falls_back_on_texts_and_teacher_of_the_run(agreed: Path, tmp_path: Path) -> None:
    report = json.loads((agreed / "report.json").read_text())["metrics"]
    found = capcli.evaluate(model=str(agreed), threads=1)
    assert (found["reference"], found["split"], found["n_examples"]) == ("baseline", "holdout", 20)
    assert found["metrics"] == {"agreement": report["pruned"]["agreement"]}, "no calibration error"
    assert found["agreement"] == report["pruned"]["agreement"]
    moved = tmp_path / "another" / "place"
    shutil.copytree(agreed, moved)
    with pytest.raises(CapError, match=r"texts.jsonl does not exist|no model to agree with"):
        capcli.evaluate(model=str(moved), threads=1)


def test_other_texts_are_evaluated_as_a_whole(agreed: Path, teachers: Teachers, tmp_path: Path) -> None:
    model, _ = teachers("classification")
    lines = ["a good film", "a bad film", "the plot was dull", "it is bright", "very great", "awful"]
    (tmp_path / "other.txt").write_text("\n".join(lines))
    text = str(tmp_path / "other.txt")
    chosen = {"perturb": "case", "threads": 1, "baseline": model}
    found = capcli.evaluate(model=str(agreed), task="text-classification", text=text, **chosen)
    ours, theirs = ([answer["label"] for answer in capcli.pipeline(one)(lines)] for one in (agreed, model))
    assert found["metrics"]["agreement"] == pytest.approx(share(ours, theirs))
    assert found["n_examples"] == 6
    assert found["perturbed"]["case"]["metrics"].keys() == {"agreement"}
    assert any(note.startswith("measured on other data than those of the run") for note in found["notes"])
    other = capcli.evaluate(model=str(agreed), task="text-classification", text=text, baseline=str(agreed), threads=1)
    assert other["metrics"]["agreement"] == 1.0
    assert (other["data"] == found["data"]) == (ours == theirs), "other answers are other data"


def test_exports_are_compared_with_the_model(agreed: Path, teachers: Teachers, tmp_path: Path) -> None:
    _, text = teachers("classification")
    chosen = {"dtype": "int8", "threads": 1}
    found = capcli.export(model=str(agreed), to="sparse", out=str(tmp_path / "int8"), **chosen)
    assert found["metrics"]["reference"] == "model"
    assert found["metrics"]["n_examples"] == 20
    assert f"Compared with the model{SHOWN}" in (tmp_path / "int8" / "README.md").read_text().replace("\\", "")
    again = capcli.evaluate(model=str(tmp_path / "int8"), threads=1)
    assert (again["reference"], again["n_examples"]) == ("baseline", 20), "the export knows texts and teacher too"
    options = {"fit": 10**6, "max_drop": "agreement=0.2", "threads": 1}
    fitting = capcli.export(model=str(agreed), texts=text, out=str(tmp_path / "fit"), **options)
    assert fitting["metrics"]["n_examples"] == 80, "all texts of --texts"
    assert fitting["check"]["of"] == "…/texts.jsonl"
    with pytest.raises(CapError, match="--vocab task needs the training texts"):
        capcli.export(model=str(agreed), to="sparse", vocab="task", texts=text, out=str(tmp_path / "no"))
    small = capcli.export(model=str(agreed), to="sparse", vocab="task", out=str(tmp_path / "small"), threads=1)
    assert small["metrics"]["after"]["agreement"] >= 0.9


def test_texts_for_an_export_of_a_run_with_labels(pruned: Path, tmp_path: Path) -> None:
    """Accuracy stays what is measured where there are labels; elsewhere it is agreement."""
    (tmp_path / "some.txt").write_text("a good film\na bad film\n")
    chosen = {"to": "sparse", "dtype": "int8", "texts": str(tmp_path / "some.txt"), "threads": 1}
    found = capcli.export(model=str(pruned), out=str(tmp_path / "a"), **chosen)
    assert found["check"]["texts"] == 2
    assert found["metrics"]["reference"] == "labels"
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(pruned, moved)
    found = capcli.export(model=str(moved), out=str(tmp_path / "b"), **chosen)
    assert found["metrics"]["reference"] == "model"
    assert found["metrics"]["n_examples"] == 2


def test_held_out_texts_are_not_trained_on(tmp_path: Path) -> None:
    write_csv(tmp_path / "texts.csv", ("text",), [(f"text {i % 40}",) for i in range(80)])
    source = TaskConfig(task="text-classification", text=str(tmp_path / "texts.csv"))
    data = texts.open_task(source, ("a", "b"), "teacher", holdout=0.2, seed=3)
    assert data.train is not None
    trained, held = (
        {text for some, _ in split.chunks() for text in some} for split in (data.train, *data.evals.values())
    )
    assert not trained & held
    assert len(trained | held) == 40
    assert len(data.evals["holdout"]) == 16
    assert any(note.startswith("not trained on, since they are equal to a held-out one:") for note in data.notes)
    other = texts.open_task(source, ("a", "b"), "teacher", holdout=0.2, seed=4)
    assert not np.array_equal(other.evals["holdout"].rows, data.evals["holdout"].rows)


@pytest.mark.parametrize("kind", METRICS)
def test_calibration_without_labels(tmp_path: Path, teachers: Teachers, kind: str) -> None:
    """By the default method, whose gradients are those of the teacher's answers."""
    found = run(tmp_path / "out", kind, *teachers(kind), method="fisher", epochs=0, sparsity=0.5)
    assert found["metrics"]["pruned"][METRICS[kind][-1]] > 0.5
    assert found["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-3)
    assert not any("fell from" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("content", "chosen", "said"),
    [
        ("a film\n", {}, "has 1 text, too few to hold some out"),
        ("a film\n" * 9, {}, "the texts of .* are all the same"),
        ("a film\nb\n", {"text": ""}, "needs your own data"),
        ("a film\nb\n", {"group_column": "id"}, "--group-column ranks by labels, and there are none"),
        ("a film\nb\n", {"model": "tiny"}, "has no head for these labels, and --text has no labels"),
    ],
)
def test_texts_that_do_not_serve(
    tiny: Tiny, tmp_path: Path, teachers: Teachers, content: str, chosen: dict[str, Any], said: str
) -> None:
    (tmp_path / "some.txt").write_text(content)
    model = tiny.model if chosen.get("model") else teachers("classification")[0]
    options = {"text": str(tmp_path / "some.txt"), **chosen, "model": model}
    with pytest.raises(CapError, match=said):
        run(tmp_path / "out", "classification", **options)
    assert not (tmp_path / "out" / "report.json").exists()


def test_an_evaluation_without_labels_needs_a_model_to_agree_with(agreed: Path, tiny: Tiny, teachers: Teachers) -> None:
    model, text = teachers("classification")
    base = {"model": model, "task": "text-classification", "text": text}
    with pytest.raises(CapError, match="there is no model to agree with"):
        capcli.evaluate(**base)
    with pytest.raises(CapError, match="--data has labels to be compared with"):
        capcli.evaluate(**base, data=tiny.data, baseline=model)
    with pytest.raises(CapError, match="a stored result, without the answers to agree with"):
        capcli.evaluate(**base, baseline=str(agreed / "report.json"))
    labelled = {"model": str(agreed), "data": tiny.data, "task": "text-classification", "threads": 1}
    with pytest.raises(CapError, match="differ in reference: teacher and labels"):
        capcli.evaluate(**labelled, baseline=str(agreed / "report.json"))
    assert capcli.evaluate(**labelled)["reference"] == "labels"
