"""Whole runs on encoders without a head: pruned, stopped and continued, measured, exported, asked; bad input."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PRUNABLE, Tiny, invoke, outcome, write_csv

import capcli
from capcli.errors import CapError, ConfigError, DataError, ModelError
from capcli.pruning.topk import kept_count
from capcli.stored import read_json

TASK = {"task": "sentence-embedding"}
AGREEMENTS = ["cosine", "recall_at_10"]


def run(tiny: Tiny, out: Path, **chosen: Any) -> Any:
    return tiny.prune(out, **{**TASK, "data": tiny.scored, **chosen})


@pytest.fixture(scope="module")
def small(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedding") / "out"
    run(tiny, out)
    return out


@pytest.fixture(scope="module")
def texts(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    """All texts of the pairs, one per line, with an empty line."""
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    _, *rows = csv.reader((Path(tiny.scored) / "train.csv").open())
    file.write_text("\n\n".join(text for *both, _ in rows for text in both) + "\n")
    return str(file)


def slow_vectors(folder: str, some: list[str]) -> list[list[float]]:
    """The mean of the last states of each text by itself, by plain transformers."""
    from transformers import AutoModel, AutoTokenizer

    net, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [net(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0).tolist() for text in some]


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / lengths


def test_the_report_says_what_slow_loops_say(tiny: Tiny, small: Path, tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    report = read_json(small / "report.json")
    assert report["losses"] == ["kd", "prc", "snc", "fic"]
    assert {*report["history"][0]["losses"]} == {"kd", "prc_u", "fic_u", "total"}
    assert report["sparsity"]["kept_weights"] == kept_count(0.7, PRUNABLE) == round(0.3 * PRUNABLE)
    assert report["teacher"]["source"].endswith("tiny")
    assert {row["phase"] for row in report["history"]} == {"prune"}
    found = report["metrics"]
    assert list(found["pruned"]) == ["spearman", "pearson", *AGREEMENTS]
    assert found["primary"] == "spearman"
    assert found["dense"]["cosine"] == pytest.approx(1)
    assert found["dense"]["recall_at_10"] == 1
    assert found["chance"]["spearman"] == 0
    capcli.export(model=str(small), to="dense", out=str(tmp_path / "dense"))
    _, *rows = csv.reader((Path(tiny.scored) / "validation.csv").open())
    flat = [text for *both, _ in rows for text in both]
    dense, pruned = slow_vectors(tiny.model, flat), slow_vectors(str(tmp_path / "dense"), flat)
    given = [cosine(*pair) for pair in zip(pruned[::2], pruned[1::2], strict=True)]
    assert found["pruned"]["spearman"] == pytest.approx(
        spearmanr([float(score) for *_, score in rows], given).statistic, abs=2e-3
    )
    agreed = [cosine(*pair) for pair in zip(dense, pruned, strict=True)]
    assert found["pruned"]["cosine"] == pytest.approx(sum(agreed) / len(agreed), abs=1e-5)
    assert max(agreed) < 1 - 1e-5


def test_training_brings_the_vectors_closer(tiny: Tiny, small: Path, tmp_path: Path) -> None:
    """Than the same sparsity without any training, by whatever chose the mask."""
    report = run(tiny, tmp_path / "out", method="wanda", epochs=0, refit=False)
    trained = read_json(small / "report.json")["metrics"]["pruned"]
    assert trained["cosine"] > report["metrics"]["pruned"]["cosine"]


def test_stopped_and_continued_it_is_the_same(tiny: Tiny, small: Path, tmp_path: Path) -> None:
    tiny.stop(tmp_path / "out", "25/", **TASK, data=tiny.scored)
    run(tiny, tmp_path / "out")
    assert outcome(tmp_path / "out") == outcome(small)


@pytest.mark.parametrize(
    "chosen",
    [
        {"method": "fisher", "epochs": 0, "calibration": 64},
        {"method": "fisher", "epochs": 0, "calibration": 64, "fisher_block": 4},
        {"method": "cap-fisher", "epochs": 1},
        {"method": "cap-f", "epochs": 1},
    ],
)
def test_without_a_gradient_at_the_start(tiny: Tiny, tmp_path: Path, chosen: dict[str, Any]) -> None:
    """A model is at no distance from itself: what is measured is not, so that it is better than to guess."""
    report = run(tiny, tmp_path / "a", **chosen)
    run(tiny, tmp_path / "b", **chosen)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    assert report["metrics"]["pruned"]["cosine"] > 0.9
    kept = report["sparsity"]["kept_weights"]
    assert abs(kept - round(0.3 * PRUNABLE)) <= (200 if chosen["method"] == "cap-f" else 0)  # whole heads and neurons
    assert report["config"]["importance_examples"] == (512 if chosen["method"] == "cap-f" else 0)


def test_texts_alone_are_enough(tiny: Tiny, texts: str, tmp_path: Path) -> None:
    """Of lines or of a column; a part is held out, which is the same later, and so is what it is compared with."""
    lines = [line for line in Path(texts).read_text().splitlines() if line]
    write_csv(tmp_path / "one.csv", ("text",), [(line,) for line in lines])
    reports = [
        tiny.prune(tmp_path / name, **TASK, epochs=1, data=None, text=text)
        for name, text in {"a": texts, "b": str(tmp_path / "one.csv")}.items()
    ]
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    metrics = reports[0]["metrics"]
    assert (metrics["split"], metrics["reference"]) == ("holdout", "teacher")
    assert (metrics["primary"], list(metrics["pruned"])) == ("cosine", AGREEMENTS)
    assert metrics["n_examples"] == round(len(lines) / 10)
    assert metrics["dense"] == pytest.approx(dict.fromkeys(AGREEMENTS, 1))
    found = capcli.evaluate(model=str(tmp_path / "a"), perturb="typos")
    assert found.reference == "baseline"
    assert found.metrics == pytest.approx(metrics["pruned"])
    assert found.perturbed["typos"].metrics["cosine"] < found.metrics["cosine"]
    low, high = found.perturbed["typos"].differences["cosine"].confidence_95
    assert low <= found.perturbed["typos"].differences["cosine"].value <= high
    again = capcli.export(model=str(tmp_path / "a"), to="sparse", dtype="int8", out=str(tmp_path / "int8"))
    assert again.metrics.reference == "model"
    assert again.metrics.before == pytest.approx(dict.fromkeys(AGREEMENTS, 1))
    assert 0.9 < again.metrics.after["cosine"] < 1


def test_pairs_without_scores(tiny: Tiny, tmp_path: Path) -> None:
    """Splits of texts that nobody scored; the results say what they were compared with."""
    for split in ("train", "validation"):
        _, *rows = csv.reader((Path(tiny.scored) / f"{split}.csv").open())
        write_csv(tmp_path / "data" / f"{split}.csv", ("text", "pair"), [(first, second) for first, second, _ in rows])
    metrics = run(tiny, tmp_path / "out", data=str(tmp_path / "data"), epochs=1)["metrics"]
    assert (metrics["split"], metrics["reference"]) == ("validation", "teacher")
    assert list(metrics["pruned"]) == AGREEMENTS
    found = capcli.evaluate(model=str(tmp_path / "out"))
    assert found.reference == "baseline"
    assert found.metrics == pytest.approx(metrics["pruned"])
    with pytest.raises(ConfigError, match="have no scores, so there is nothing to measure without another model"):
        capcli.evaluate(model=str(tmp_path / "out"), data=str(tmp_path / "data"))


def test_texts_and_scored_pairs_of_other_places(tiny: Tiny, texts: str, tmp_path: Path) -> None:
    report = run(tiny, tmp_path / "out", text=texts, epochs=1)
    assert list(report["metrics"]["pruned"]) == ["spearman", "pearson", *AGREEMENTS]
    assert report["metrics"]["split"] == "validation"


def test_eval_of_models_without_a_head(tiny: Tiny, small: Path) -> None:
    found = capcli.evaluate(model=tiny.model, **TASK, data=tiny.scored)
    stored = read_json(small / "report.json")["metrics"]
    assert found.metrics == pytest.approx({name: stored["dense"][name] for name in ("spearman", "pearson")})
    gates = {"max_drop": "cosine=0.5", "min": "spearman=-1"}
    found = capcli.evaluate(model=str(small), baseline=tiny.model, **gates)
    assert found.metrics == pytest.approx(stored["pruned"])
    assert found.passed
    assert found.differences["cosine"].value == pytest.approx(stored["pruned"]["cosine"] - 1)
    again = capcli.evaluate(model=str(small), baseline=str(small / "report.json"))
    assert again.metrics == pytest.approx({name: stored["pruned"][name] for name in ("spearman", "pearson")})


@pytest.mark.parametrize("to", ["dense", "sparse", "sliced", "onnx"])
def test_exports_give_the_same_vectors(small: Path, tmp_path: Path, to: str) -> None:
    if to == "onnx":
        pytest.importorskip("onnxscript")
    capcli.export(model=str(small), to=to, out=str(tmp_path / to))
    asked = ["good film", "the dull story was rather long"]
    expected = [one["vector"] for one in capcli.pipeline(small)(asked)]
    found = [one["vector"] for one in capcli.pipeline(tmp_path / to)(asked)]
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5)
    assert capcli.pipeline(tmp_path / to)(asked[0])["vector"] == pytest.approx(expected[0], abs=1e-5)
    done = invoke("eval", str(tmp_path / to), "-q", "--json")
    assert json.loads(done.stdout)["metrics"]["spearman"] == pytest.approx(
        read_json(small / "report.json")["metrics"]["pruned"]["spearman"], abs=1e-3
    )


def test_a_vocabulary_is_reduced(small: Path, tmp_path: Path) -> None:
    found = capcli.export(model=str(small), to="sparse", vocab="task", out=str(tmp_path / "out"))
    assert found.metrics.before["cosine"] == pytest.approx(1)
    assert found.metrics.after["recall_at_10"] == 1


def test_predict_writes_vectors(small: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("good film\nbad film\n")
    done = invoke("predict", str(small), str(tmp_path / "texts.txt"), "-q")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == ["good film", "bad film"]
    assert [len(row["vector"]) for row in rows] == [32, 32]
    with pytest.raises(DataError, match="cannot read a tuple as a text"):
        capcli.pipeline(small)(("a", "b"))
    assert "SentenceTransformer" not in (small / "README.md").read_text()


def test_its_encoder_is_probed(small: Path, tiny: Tiny, tmp_path: Path) -> None:
    found = capcli.probe(model=str(small), tasks="text-classification", data=tiny.data, seeds=1)
    assert 0 < found.tasks["text-classification"].mean <= 1


def refused(tiny: Tiny, out: Path, **chosen: Any) -> CapError:
    with pytest.raises(CapError) as found:
        run(tiny, out, **chosen)
    assert not out.exists() or not list(out.glob("*.safetensors"))
    return found.value


def test_bad_data(tiny: Tiny, tmp_path: Path) -> None:
    rows = [("a film", "a story", str(i % 5)) for i in range(20)]
    rows[3] = ("a film", "a story", "")
    write_csv(tmp_path / "hole" / "train.csv", ("text", "pair", "score"), rows)
    error = refused(tiny, tmp_path / "out", data=str(tmp_path / "hole"), holdout=0.2)
    assert error.message == "1 label of the train split is missing, in row 3"
    write_csv(tmp_path / "mixed" / "train.csv", ("text", "pair", "score"), rows[:3] * 9)
    write_csv(tmp_path / "mixed" / "validation.csv", ("text", "pair", "score"), rows[:3] * 9)
    write_csv(tmp_path / "mixed" / "dev.csv", ("text", "pair"), [row[:2] for row in rows[:3] * 9])
    error = refused(tiny, tmp_path / "out", data=str(tmp_path / "mixed"))
    assert error.message == "dev has no score for its pairs, and validation has one"
    error = refused(tiny, tmp_path / "out", data=tiny.pairs)
    assert "not a number" in error.message
    assert error.hint == "name the column of the score with --label-column, or leave the labels out"
    error = refused(tiny, tmp_path / "out", data=tiny.data, label_column="label")
    assert error.message == "the train split has a single text, and a score is of two"


def test_bad_options(tiny: Tiny, small: Path, tmp_path: Path) -> None:
    error = refused(tiny, tmp_path / "out", losses="ce,kd")
    assert error.message == "sentence-embedding has no labels, and ce needs them"
    done = invoke(*tiny.arguments(tmp_path / "out", **TASK), "--min", "spearman=0.8")
    assert done.exit_code == 2
    assert "unknown metric 'spearman'" in done.stderr
    assert "cosine, recall_at_10" in done.stderr
    with pytest.raises(ConfigError, match="sentence-embedding has no labels that a probe could learn"):
        capcli.probe(model=str(small), tasks="sentence-embedding", data=tiny.scored)
    with pytest.raises(ModelError, match="was pruned for embedding, not for regression"):
        capcli.evaluate(model=str(small), task="regression", data=tiny.numbers)
    with pytest.raises(ConfigError, match="needs your own data"):
        capcli.prune(model=tiny.model, **TASK)


def test_a_teacher_must_have_vectors_of_the_same_width(tiny: Tiny, tmp_path: Path) -> None:
    from tiny import write_model

    write_model(tmp_path / "wide", hidden_size=64)
    error = refused(tiny, tmp_path / "out", teacher=str(tmp_path / "wide"))
    assert error.message == "the teacher's vectors have 64 dimensions, the model's 32: they cannot be learned"
