"""Runs, evaluations and exports without any labels: what is measured is agreement with another model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import SETTINGS, SOURCES, Tiny, invoke, write_jsonl

import capcli


@pytest.fixture(scope="module")
def teachers(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a fine-tuned model of a kind, and the file of its training texts without labels."""
    found: dict[str, tuple[str, str]] = {}

    def make(kind: str) -> tuple[str, str]:
        if kind not in found:
            home = tmp_path_factory.mktemp(kind)
            task, data = SOURCES.get(kind, ("text-pair-classification", "pairs"))
            length = 64 if kind == "spans" else 16
            tiny.prune(
                home / "made",
                task=task,
                data=getattr(tiny, data),
                method="magnitude",
                epochs=1,
                keep_work=True,
                max_length=length,
            )
            shutil.move(home / "made" / "work" / "teacher", home / "teacher")
            shutil.rmtree(home / "made")
            found[kind] = str(home / "teacher"), texts_of(Path(getattr(tiny, data)), home)
        return found[kind]

    return make


def texts_of(data: Path, home: Path) -> str:
    """The training examples without their labels: lines where words have labels, else a table."""
    import csv

    path = next(data.glob("train.*"))
    if path.suffix == ".csv":
        with path.open() as file:
            rows = list(csv.DictReader(file))
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    if "tokens" in rows[0]:
        (home / "texts.txt").write_text("".join(" ".join(row["tokens"]) + "\n" for row in rows))
        return str(home / "texts.txt")
    rows = [{name: row[name] for name in ("text", "pair", "question", "context") if name in row} for row in rows]
    write_jsonl(home / "texts.jsonl", rows)
    return str(home / "texts.jsonl")


def run(tiny: Tiny, out: Path, kind: str, model: str, text: str, **chosen: Any) -> dict[str, Any]:
    task = SOURCES.get(kind, ("text-pair-classification", ""))[0]
    settings = {**SETTINGS, "max_length": 64 if kind == "spans" else 16, "epochs": 1, "method": "movement"}
    return capcli.prune(model=model, task=task, text=text, out=str(out), holdout=0.25, **{**settings, **chosen})


@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel", "tokens", "spans", "pairs"])
def test_a_run_without_labels(tiny: Tiny, tmp_path: Path, teachers: Any, kind: str) -> None:
    model, text = teachers(kind)
    report = run(tiny, tmp_path / "out", kind, model, text)
    print(json.dumps(report["metrics"], indent=1), report["notes"])


def cap(*arguments: str) -> Any:
    done = invoke(*arguments, "--threads", "1", "-q")
    return done


def test_evaluations_and_exports_of_a_run_without_labels(tiny: Tiny, tmp_path: Path, teachers: Any) -> None:
    model, text = teachers("classification")
    out = tmp_path / "out"
    run(tiny, out, "classification", model, text)
    for arguments in (
        ("eval", str(out)),
        ("eval", str(out), "--unlabelled", text, "--baseline", model, "--perturb", "typos"),
        ("export", str(out), "--to", "sparse", "--dtype", "int8", "-o", str(tmp_path / "int8")),
        ("eval", str(tmp_path / "int8")),
        (
            "export",
            str(out),
            "--fit",
            "1MB",
            "--max-drop",
            "agreement=0.2",
            "--texts",
            text,
            "-o",
            str(tmp_path / "fit"),
        ),
    ):
        done = cap(*arguments)
        print(" ".join(arguments), done.exit_code, done.stdout, done.stderr)
