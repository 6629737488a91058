"""Whole runs of the four commands on a tiny model: every method, option group and kind of task."""

from __future__ import annotations

import csv
import functools
import html
import html.parser
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    FFN,
    HEADS,
    HIDDEN,
    LAYERS,
    PRUNABLE,
    WEIGHTS,
    Tiny,
    digest,
    environment,
    invoke,
    outcome,
    write_csv,
    write_jsonl,
    write_model,
)

import capcli
from capcli.artifact import reader
from capcli.config.export import ExportConfig
from capcli.config.measure import EvalConfig
from capcli.config.names import METHODS
from capcli.config.task import TaskConfig
from capcli.errors import ConfigError
from capcli.measuring import answers, decode
from capcli.models import artifact, predict
from capcli.stored import read_json, read_tensors

NAMES: dict[str, set[str]] = {
    "": {
        "schema_version",
        "status",
        "model",
        "task",
        "method",
        "losses",
        "seed",
        "command",
        "versions",
        "device",
        "sparsity",
        "metrics",
        "size",
        "latency",
        "timing",
        "memory",
        "history",
        "files",
    },
    "versions": {"cap", "torch", "transformers"},
    "sparsity": {
        *("requested", "achieved", "prunable_weights", "kept_weights", "encoder", "whole_model"),
        "per_matrix",
    },
    "metrics": {"dense", "pruned", "retention", "n_examples", "confidence_95"},
    "size": {"dense_bytes", "artifact_bytes", "weights_bytes", "bound_bytes"},
    "latency": {"dense", "pruned"},
    "timing": {"teacher_seconds", "banks_seconds", "prune_seconds", "total_seconds", "examples_per_second"},
    "memory": {"peak_host_bytes", "peak_device_bytes"},
}


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of each method, made when first asked for."""
    found: dict[str, Path] = {}

    def of(method: str) -> Path:
        if method not in found:
            found[method] = tmp_path_factory.mktemp(method) / "out"
            trains = {"epochs": 0} if METHODS[method].one_shot else {}
            tiny.prune(found[method], method=method, **trains)
        return found[method]

    return of


def stored(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "report.json").read_text()))


def some_inputs() -> dict[str, torch.Tensor]:
    tokens = torch.randint(5, 20, (8, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[::2, 7:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


# Every method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_is_what_was_asked_for(runs: Any, method: str) -> None:
    """Exact count without structure, nearest point with; the report says what is in the file."""
    out = runs(method)
    found = stored(out)["sparsity"]
    net = capcli.load(out)
    matrices = [
        p for name, p in net.named_parameters() if ".layer." in name and name.endswith("weight") and p.dim() > 1
    ]
    kept = sum(int(p.count_nonzero()) for p in matrices)
    assert sum(p.numel() for p in matrices) == found["prunable_weights"] == PRUNABLE
    assert kept == found["kept_weights"] == sum(row["kept"] for row in found["per_matrix"])
    assert found["achieved"] == pytest.approx(1 - kept / PRUNABLE, abs=1e-12)
    assert found["requested"] == 0.7
    assert len(found["per_matrix"]) == 6 * LAYERS
    if METHODS[method].criterion == "kwon":
        assert 0 <= 0.3 * PRUNABLE - kept < 2 * HIDDEN  # within the budget, by less than a neuron
        check_groups(net)
    elif METHODS[method].criterion == "first-order":
        assert abs(kept - 0.3 * PRUNABLE) <= HIDDEN  # half a neuron: its 2·HIDDEN weights are the smallest group
        check_groups(net)
    else:
        assert abs(kept - round(0.3 * PRUNABLE)) <= 1


def check_groups(net: Any) -> None:
    """Whole heads and neurons are gone, in all their matrices; each layer keeps one of both."""
    size = HIDDEN // HEADS
    for layer in net.bert.encoder.layer:
        attention = layer.attention
        rows = [
            w.weight.view(HEADS, size * HIDDEN).any(1)
            for w in (attention.self.query, attention.self.key, attention.self.value)
        ]
        columns = attention.output.dense.weight.T.reshape(HEADS, size * HIDDEN).any(1)
        neurons = layer.intermediate.dense.weight.any(1), layer.output.dense.weight.any(0)
        assert all(torch.equal(columns, row) for row in rows)
        assert torch.equal(*neurons)
        assert 1 <= int(columns.sum()) < HEADS
        assert 1 <= int(neurons[0].sum()) < FFN


@pytest.mark.parametrize("method", METHODS)
def test_report_has_every_name(runs: Any, method: str) -> None:
    report = stored(runs(method))
    for part, names in NAMES.items():
        assert names <= set(report[part] if part else report), part
    assert (report["schema_version"], report["status"], report["method"]) == (1, "complete", method)
    assert {"name", "shape", "kept", "sparsity"} <= set(report["sparsity"]["per_matrix"][0])
    assert all({"step", "epoch", "sparsity", "losses", "metrics"} <= set(row) for row in report["history"])
    for name in ("accuracy", "macro_f1"):
        low, high = report["metrics"]["confidence_95"][name]
        assert 0 <= low <= report["metrics"]["pruned"][name] <= high <= 1
    check_latencies(report["latency"], n_texts=report["metrics"]["n_examples"])
    trained = set() if METHODS[method].one_shot else {"banks_seconds", "examples_per_second"}
    assert all(report["timing"][name] > 0 for name in {"teacher_seconds", "prune_seconds", "total_seconds"} | trained)
    assert report["memory"]["peak_host_bytes"] > 0


def check_latencies(found: dict[str, Any], n_texts: int) -> None:
    """Two models, asked the same in one process: what was asked and where are equal; the times are possible."""
    dense, pruned = found["dense"], found["pruned"]
    chosen = ("runtime", "threads")  # the faster runtime computes the pruned model
    measured = ("median_ms", "p10_ms", "p90_ms", "confidence_95", "own_lengths", "throughput")
    where = [{name: value for name, value in one.items() if name not in measured} for one in (dense, pruned)]
    assert {**where[0], **dict.fromkeys(chosen)} == {**where[1], **dict.fromkeys(chosen)}
    assert pruned["runtime"] in ("torch", "sparse")
    assert {"batch", "length", "runtime", "threads", "processor", "device", "hardware", "precision"} == set(where[0])
    assert (dense["runtime"], dense["device"], dense["batch"]) == ("torch", "cpu", 1)
    for one in (dense, pruned):
        own, batches = one["own_lengths"], one["throughput"]
        assert 0 < one["p10_ms"] <= one["median_ms"] <= one["p90_ms"] and 0 < own["median_ms"] <= own["p95_ms"]
        assert (own["texts"], batches["batch"]) == (min(n_texts, 200), 32) and batches["texts"] % 32 == 0
        assert batches["texts_per_second"] > 0 and 2 < own["median_tokens"] <= one["length"]


@pytest.mark.parametrize("method", METHODS)
def test_files_are_those_of_the_report(runs: Any, method: str) -> None:
    out = runs(method)
    report = stored(out)
    for name, row in report["files"].items():
        assert row == {"bytes": (out / name).stat().st_size, "sha256": digest(out / name)}
    assert {WEIGHTS, "cap_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(report["files"])
    others = {path.name for path in out.iterdir()} - set(report["files"])
    assert others == {"report.json", "report.html", "README.md"}
    assert report["size"]["artifact_bytes"] == sum(row["bytes"] for row in report["files"].values())
    assert report["size"]["weights_bytes"] == (out / WEIGHTS).stat().st_size
    assert (out / "README.md").read_text().startswith("---\n")
    html.parser.HTMLParser().feed((out / "report.html").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_eval_gives_the_metrics_of_the_report(runs: Any, method: str) -> None:
    """`cap eval OUT` without a task: exactly what the report says."""
    out = runs(method)
    result = invoke("eval", str(out), "--json", "-q", "--threads", "1", "--latency-length", "8")
    assert result.exit_code == 0, result.stderr
    found, report = json.loads(result.stdout), stored(out)
    assert 0 <= found["metrics"].pop("ece") <= 1
    assert found["metrics"] == report["metrics"]["pruned"]
    assert found["confidence_95"] == report["metrics"]["confidence_95"]
    assert found["n_examples"] == report["metrics"]["n_examples"] == 48
    assert found["sparsity"]["achieved"] == pytest.approx(report["sparsity"]["achieved"])
    assert found["labels"] == ["negative", "positive"]


@pytest.mark.parametrize("method", METHODS)
def test_export_loads_without_capcli(runs: Any, method: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out = runs(method)
    capcli.export(ExportConfig(model=str(out), to="dense", out=str(tmp_path / "dense")))
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense").eval()
    ours = capcli.load(out)
    with torch.inference_mode():
        assert torch.equal(stock(**some_inputs()).logits, ours(**some_inputs()).logits)
    assert stock.config.id2label == {0: "negative", 1: "positive"}
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "dense")("a good film")["input_ids"][1:-1]
        == (capcli.load_tokenizer(out)("a good film")["input_ids"][1:-1])
    )


def test_the_task_is_learned(runs: Any) -> None:
    """Otherwise the tests around it would compare constants."""
    metrics = stored(runs("cap-soft"))["metrics"]
    assert metrics["dense"]["accuracy"] > 0.8
    assert metrics["pruned"]["accuracy"] > 0.7


QUICK = {"epochs": 2, "teacher_epochs": 1}


@pytest.fixture(scope="module")
def others(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished short run on the tags or on the questions, made when first asked for."""

    @functools.cache
    def of(task: str) -> Path:
        out = tmp_path_factory.mktemp(task) / "out"
        data = {"ner": tiny.tags, "question-answering": tiny.answers}[task]
        tiny.prune(out, task=task, data=data, max_length=32, **QUICK)
        return out

    return of


@pytest.mark.parametrize("task", ["ner", "question-answering"])
def test_probe_of_a_model_that_answers_per_token(others: Callable[[str], Path], task: str) -> None:
    few = ("--max-train-samples", "40", "--max-eval-samples", "30", "--max-length", "16", "--threads", "1")
    result = invoke("probe", str(others(task)), "--tasks", "mr", *few, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["tasks"]["mr"]
    assert (found["n_examples"], found["n_classes"], found["metric"]) == (30, 2, "accuracy")
    assert 0 <= found["mean"] <= 1


@pytest.mark.parametrize("losses", ["ce,kd", "ce,kd,prc,snc,fic,hid"])
def test_dimensions_at_95_percent(tiny: Tiny, tmp_path: Path, losses: str) -> None:
    """The zeros of the re-opened artefact are those of the plan; heads are of several sizes, the task is still done."""
    chosen = {"method": "cap-f", "structure": "dimensions", "sparsity": 0.95, "losses": losses}
    planned = json.loads(invoke(*tiny.arguments(tmp_path / "out", plan=True, json=True, **chosen)).stdout)
    report = tiny.prune(tmp_path / "out", **chosen)
    net = capcli.load(tmp_path / "out")
    kept = sum(int(p.count_nonzero()) for name, p in net.named_parameters() if ".layer." in name and p.dim() > 1)
    unit = 2 * HIDDEN
    assert kept == planned["kept_weights"] == report["sparsity"]["kept_weights"] == round(0.05 * PRUNABLE / unit) * unit
    sizes = {check_dimensions(layer) for layer in net.bert.encoder.layer}
    assert len(sizes) > 1
    assert report["metrics"]["pruned"]["accuracy"] > 0.7
    assert not any("projection" in name for name in net.state_dict())
    capcli.export(ExportConfig(model=str(tmp_path / "out"), to="dense", out=str(tmp_path / "dense")))


def check_dimensions(layer: Any) -> tuple[int, ...]:
    """Rows and columns of the matrices agree; no head without values has queries. Units that stay, by kind."""
    own, out = layer.attention.self, layer.attention.output.dense.weight
    queries, values = own.query.weight.any(1), own.value.weight.any(1)
    neurons = layer.intermediate.dense.weight.any(1)
    assert torch.equal(queries, own.key.weight.any(1))
    assert torch.equal(values, out.any(0))
    assert torch.equal(neurons, layer.output.dense.weight.any(0))
    empty = ~values.view(HEADS, -1).any(1)
    assert not queries.view(HEADS, -1)[empty].any()
    return int(queries.sum()), int(values.sum()), int(neurons.sum())


def test_a_sparsity_that_heads_cannot_reach_names_the_structure_that_can(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny.prune(tmp_path / "out", method="cap-f", sparsity=0.95)
    assert "--structure dimensions" in caught.value.hint


@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"num_hidden_layers": 3}])
def test_a_teacher_of_another_shape_cannot_teach_hidden_states(
    tiny: Tiny, tmp_path: Path, change: dict[str, int]
) -> None:
    write_model(tmp_path / "other", **change)
    tiny.prune(tmp_path / "made", model=str(tmp_path / "other"), sparsity=0.0, epochs=1, losses="ce")
    chosen = {"teacher": str(tmp_path / "made"), "teacher_epochs": 0, "init": "pretrained"}
    with pytest.raises(ConfigError, match="hid cannot compare their hidden states") as caught:
        tiny.prune(tmp_path / "out", losses="ce,kd,hid", **chosen)
    assert "same width and depth" in caught.value.hint


# Options -------------------------------------------------------------------------------------------------------------


LOSSES = ["ce", "kd", "ce,kd", "ce,kd,prc", "ce,kd,snc", "ce,kd,fic", "ce,prc,snc,fic", "ce,hid", "ce,kd,prc,hid"]


@pytest.mark.parametrize("losses", LOSSES)
def test_loss_ablation(tiny: Tiny, tmp_path: Path, losses: str) -> None:
    report = tiny.prune(tmp_path / "out", losses=losses, reg_weight=1.0, **QUICK)
    names = {name for row in report["history"] if row["phase"] == "prune" for name in row["losses"]}
    wanted = {"reg", "total"} | {
        term
        for name in losses.split(",")
        for term in ((name,) if name in ("ce", "kd", "hid") else (f"{name}_u", f"{name}_s"))
    }
    assert names == wanted
    assert report["losses"] == losses.split(",")


def test_normalisations_differ_only_in_the_contrastive_terms(tiny: Tiny, tmp_path: Path) -> None:
    rows = [
        next(
            row
            for row in tiny.prune(tmp_path / name, normalization=name, **QUICK)["history"]
            if row["phase"] == "prune"
        )
        for name in ("mean", "reference")
    ]
    assert rows[0]["losses"]["ce"] == rows[1]["losses"]["ce"]
    assert rows[0]["losses"]["prc_s"] != rows[1]["losses"]["prc_s"]


@pytest.mark.parametrize(
    ("preset", "method", "expected"),
    [
        ("quick", "cap-soft", {"epochs": 2, "teacher_epochs": 2, "normalization": "mean"}),
        ("paper", "cap-soft", {"normalization": "reference", "init": "pretrained", "score_init": "zero"}),
        ("paper", "cap-m", {"scope": "matrix", "kd_temperature": 2.0}),
        ("paper", "cap-f", {"kd_temperature": 1.0, "unsupervised_weight": 0.3}),
    ],
)
def test_presets(tiny: Tiny, tmp_path: Path, preset: str, method: str, expected: dict[str, Any]) -> None:
    """What is not chosen comes from the preset, and the report says so."""
    chosen = {"epochs": None, "teacher_epochs": None} if preset == "quick" else QUICK
    report = tiny.prune(tmp_path / "out", preset=preset, method=method, **chosen)
    assert expected.items() <= report["config"].items()


def test_regression(tiny: Tiny, tmp_path: Path) -> None:
    report = tiny.prune(tmp_path / "out", task="regression", data=tiny.numbers, sparsity=0.5)
    assert report["metrics"]["primary"] == "pearson"
    assert report["metrics"]["dense"]["pearson"] > 0.5
    assert capcli.load(tmp_path / "out").config.num_labels == 1
    source = TaskConfig(task="regression", data=tiny.numbers, max_length=16)
    assert (
        capcli.evaluate(EvalConfig(model=str(tmp_path / "out"), source=source))["metrics"]
        == (report["metrics"]["pruned"])
    )


def test_a_classifier_is_no_model_for_a_regression(tiny: Tiny, pruned: Path) -> None:
    result = invoke("eval", str(pruned), "--task", "regression", "--data", tiny.numbers)
    assert result.exit_code == 2
    assert "pruned for classification" in result.stderr


def test_eval_keeps_classes_that_its_data_lack(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    """The model's labels decide, not those that happen to occur."""
    lines = (Path(tiny.data) / "validation.csv").read_text().splitlines()
    one_class = [lines[0], *(line for line in lines if line.endswith("positive"))]
    (tmp_path / "validation.csv").write_text("\n".join(one_class) + "\n")
    result = invoke("eval", str(pruned), "--data", str(tmp_path), "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["n_examples"] == len(one_class) - 1


def evaluated(model: Path, data: Path, *more: str) -> Any:
    return invoke("eval", str(model), "--data", str(data), *more, "--json", "--threads", "1", "--latency-length", "8")


@pytest.fixture(scope="module")
def dense(pruned: Path, others: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported models by the task that they were pruned for."""
    found = {"text-classification": pruned, "ner": others("ner")}
    for task, model in found.items():
        found[task] = tmp_path_factory.mktemp(f"dense-{task}") / "dense"
        capcli.export(ExportConfig(model=str(model), to="dense", out=str(found[task])))
    return found


def test_eval_of_a_dense_model_on_data_that_lack_a_class(tiny: Tiny, dense: dict[str, Path], tmp_path: Path) -> None:
    rows = list(csv.reader((Path(tiny.data) / "validation.csv").open()))
    one_class = [(text, label) for text, label in rows[1:] if label == "positive"]
    write_csv(tmp_path / "validation.csv", ("text", "label"), one_class)
    result = evaluated(dense["text-classification"], tmp_path, "--task", "text-classification")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["labels"], found["n_examples"]) == (["negative", "positive"], len(one_class))
    whole = json.loads(evaluated(dense["text-classification"], Path(tiny.data), "--task", "text-classification").stdout)
    assert whole["metrics"]["accuracy"] > 0.7
    assert found["metrics"]["accuracy"] > 0.5  # the other way round it would be below


def test_eval_of_a_dense_model_on_data_that_lack_a_tag(tiny: Tiny, dense: dict[str, Path], tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (Path(tiny.tags) / "validation.jsonl").read_text().splitlines()]
    without = [line for line in lines if "I-positive" not in line["ner_tags"]]
    assert 0 < len(without) < len(lines)
    write_jsonl(tmp_path / "validation.jsonl", without)
    result = evaluated(dense["ner"], tmp_path, "--task", "ner")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["n_examples"] == len(without) and "I-positive" in found["labels"]
    assert [note.partition(":")[0] for note in found["notes"]] == [
        "measured on other data than those of the run",
        "the model is no better than guessing on validation",
    ]
    assert found["confidence_95"]["f1"][0] == found["chance"]["f1"] == 0


@pytest.mark.parametrize("task", ["text-classification", "ner"])
@pytest.mark.parametrize("form", ["dense", "pruned"])
def test_eval_refuses_labels_that_the_model_does_not_have(
    dense: dict[str, Path], pruned: Path, others: Callable[[str], Path], tmp_path: Path, task: str, form: str
) -> None:
    model = dense[task] if form == "dense" else {"text-classification": pruned, "ner": others("ner")}[task]
    if task == "ner":
        rows = [{"tokens": ["good", "film"], "ner_tags": ["B-positive", tag]} for tag in ("O", "B-neutral")]
        write_jsonl(tmp_path / "validation.jsonl", rows)
    else:
        write_csv(tmp_path / "validation.csv", ("text", "label"), [("good", "positive"), ("film", "neutral")])
    result = evaluated(model, tmp_path, "--task", task)
    assert result.exit_code == 2
    assert "neutral" in result.stderr and (
        "are not those of the task" in result.stderr or "unknown labels" in result.stderr
    )


def test_eval_of_a_dense_model_does_not_match_codes_by_position(dense: dict[str, Path], tmp_path: Path) -> None:
    """What 0 and 1 stand for in foreign data is not known; docs/how-to/own-data.md promises names."""
    write_csv(tmp_path / "validation.csv", ("text", "label"), [("good", "0"), ("bad", "1")])
    result = evaluated(dense["text-classification"], tmp_path, "--task", "text-classification")
    assert result.exit_code == 2
    assert "--label-map" in result.stderr


def test_a_tag_that_occurs_in_evaluation_only(tiny: Tiny, tmp_path: Path) -> None:
    for split, count in (("train", 40), ("validation", 24)):
        lines = [json.loads(line) for line in (Path(tiny.tags) / f"{split}.jsonl").read_text().splitlines()][:count]
        if split == "validation":
            lines[3] = {"tokens": ["the", "quite", "actor"], "ner_tags": ["O", "B-new", "I-new"]}
        write_jsonl(tmp_path / "set" / f"{split}.jsonl", lines)
    out, data = tmp_path / "out", str(tmp_path / "set")
    result = invoke(*tiny.arguments(out, task="ner", data=data, **QUICK))
    assert result.exit_code == 0, result.stderr
    assert "labels that occur only in evaluation, so they cannot be learned: B-new, I-new" in result.stderr
    report = stored(out)
    assert report["labels"][-2:] == ["B-new", "I-new"]
    assert any("only in evaluation" in note for note in report["notes"])
    again = evaluated(out, tmp_path / "set")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["metrics"] == report["metrics"]["pruned"]


@pytest.mark.parametrize("trained_with", [True, False])
def test_eval_answers_nothing_as_the_training_data_did(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_with: bool
) -> None:
    """Neither the evaluation split of the run nor the data of a later `cap eval` decides."""
    lines = {
        split: [json.loads(line) for line in (Path(tiny.answers) / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    }
    answered = [line for line in lines["validation"] if line["answers"]["text"]]
    train = [line for line in lines["train"] if trained_with or line["answers"]["text"]]
    write_jsonl(tmp_path / "set" / "train.jsonl", train)
    write_jsonl(tmp_path / "set" / "validation.jsonl", answered if trained_with else lines["validation"])
    write_jsonl(tmp_path / "other" / "validation.jsonl", answered[:20] if trained_with else lines["validation"][:20])

    allowed: list[bool] = []
    real = decode.spans

    def spied(*arguments: Any, no_answer: bool) -> Any:
        allowed.append(no_answer)
        return real(*arguments, no_answer=no_answer)

    monkeypatch.setattr(decode, "spans", spied)
    out = tmp_path / "out"
    tiny.prune(out, task="question-answering", data=str(tmp_path / "set"), max_length=32, **QUICK)
    assert set(allowed) == {trained_with}
    assert json.loads((out / "cap_config.json").read_text())["no_answer"] is trained_with
    assert artifact.known(str(out)).no_answer is trained_with
    allowed.clear()
    result = evaluated(out, tmp_path / "other", "--baseline", str(out))
    assert result.exit_code == 0, result.stderr
    assert allowed == [trained_with] * 2
    assert json.loads(result.stdout)["n_examples"] == 20


def test_a_baseline_report_must_be_about_as_many_examples(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    """Both a report of prune and one of eval."""
    few = evaluated(pruned, Path(tiny.data), "--max-eval-samples", "20")
    assert few.exit_code == 0, few.stderr
    (tmp_path / "few.json").write_text(few.stdout)
    reports = {str(pruned / "report.json"): 48, str(tmp_path / "few.json"): 20}
    for path, n in reports.items():
        for limit in reports.values():
            result = evaluated(pruned, Path(tiny.data), "--max-eval-samples", str(limit), "--baseline", path)
            assert result.exit_code == (0 if n == limit else 2), result.stderr
            if n != limit:
                assert f"{path} and {pruned} differ in n_examples: {n} and {limit}" in " ".join(result.stderr.split())
            else:
                assert json.loads(result.stdout)["retention"]["accuracy"] == pytest.approx(1)


@pytest.mark.parametrize("settings", [[], {"source": None}, {"source": {"max_length": "128"}}])
def test_malformed_settings_are_one_line(pruned: Path, tmp_path: Path, settings: Any) -> None:
    (tmp_path / "cap_config.json").write_text(json.dumps(settings))
    result = invoke("eval", str(tmp_path))
    assert result.exit_code == 2
    assert "cap_config.json" in result.stderr


def test_the_report_says_what_was_not_read_and_equal_answers(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "constant", lambda *_: "'negative'")
    for split, n in (("train", 8), ("validation", 4)):
        rows = [(f"a {word} film " * 9, label) for label, word in (("negative", "bad"), ("positive", "good"))]
        write_csv(tmp_path / "data" / f"{split}.csv", ("text", "label"), [*rows, ("a ☃ film", "positive")] * n)
    result = invoke(
        *tiny.arguments(tmp_path / "out", epochs=1, teacher_epochs=1, data=str(tmp_path / "data")), "--json"
    )
    report = json.loads(result.stdout)
    assert report["notes"] == [
        "longer than 16 tokens, so their ends were truncated: 16 of 24 texts of train",
        "longer than 16 tokens, so their ends were truncated: 8 of 12 texts of validation",
        "the dense model and the pruned model are no better than guessing on validation: accuracy 0.3333 "
        "(always 'negative') and 0.3333 (always 'negative'), chance 0.6667; "
        "use more --teacher-epochs or training data, or a larger model",
    ]
    assert report["metrics"]["at_chance"] == {name: ["accuracy", "macro_f1"] for name in ("dense", "pruned")}
    assert report["metrics"]["retention"] == {} and report["metrics"]["chance"]["accuracy"] == pytest.approx(2 / 3)
    early = "evaluate dense: the dense model is no better than guessing on validation: accuracy 0.3333"
    assert 0 < result.stderr.index(early) < result.stderr.index("writing ") < result.stderr.index(report["notes"][2])
    assert report["notes"] == json.loads((tmp_path / "out" / "report.json").read_text())["notes"]
    for page in ("report.html", "README.md"):
        text = html.unescape((tmp_path / "out" / page).read_text())
        text = text.replace("\\", "")
        assert "so their ends were truncated" in text and report["notes"][2] in text
        assert "Neither it nor the dense model is better than guessing: accuracy 0.3333, dense 0.3333" in text
        assert "of the dense model" not in text.replace("from the dense model", "")


def test_pairs(tiny: Tiny, tmp_path: Path) -> None:
    report = tiny.prune(tmp_path / "out", task="text-pair-classification", data=tiny.pairs, **QUICK)
    assert report["labels"] == ["different", "same"]
    assert capcli.load_tokenizer(tmp_path / "out")("good", "bad")["token_type_ids"] == [0, 0, 0, 1, 1]


def test_one_csv_of_the_user_with_holdout(tiny: Tiny, tmp_path: Path) -> None:
    """Own column names, labels that are numbers, no evaluation split."""
    lines = (Path(tiny.data) / "train.csv").read_text().splitlines()[1:]
    rows = [(line.rsplit(",", 1)[0], "1" if line.endswith("positive") else "0") for line in lines]
    write_csv(tmp_path / "mine.csv", ("Review, raw", "Class"), rows)
    names = {"text_column": "Review, raw", "label_column": "Class"}
    report = tiny.prune(tmp_path / "out", data=str(tmp_path / "mine.csv"), holdout=0.25, **names, **QUICK)
    assert report["metrics"]["split"] == "holdout"
    assert report["metrics"]["n_examples"] == 20
    assert report["labels"] == ["0", "1"]
    assert "held-out" in report["notes"][0]
    again = invoke("eval", str(tmp_path / "out"), "--json")
    assert again.exit_code == 0, again.stderr
    found = json.loads(again.stdout)["metrics"]
    assert found.pop("ece") >= 0
    assert found == report["metrics"]["pruned"], "measured on the same held-out part"


def test_holdout_chooses_the_best_epoch(tiny: Tiny, tmp_path: Path) -> None:
    """With an evaluation split, the held-out part decides which epoch at the final sparsity is kept."""
    out = tmp_path / "out"
    report = tiny.prune(out, holdout=0.3, epochs=6, final_share=0.7, keep_work=True, losses="ce", method="magnitude")
    rows = [r for r in report["history"] if r["phase"] == "prune" and r["metrics"] and r["sparsity"] == 0.7]
    values = [row["metrics"]["accuracy"] for row in rows]
    best = read_json(out / "work" / "best" / "best.json")
    assert len(values) >= 3
    assert best["value"] == max(values)
    assert best["step"] == rows[values.index(max(values))]["step"]
    tensors = read_tensors(out / "work" / "best" / "best.safetensors")
    expected = tensors["net.classifier.weight"]
    assert torch.equal(capcli.load(out).classifier.weight, expected.half().float())
    assert report["metrics"]["split"] == "validation"


def test_teacher_given(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    """A stock folder and a pruned model both serve; with a pruned one as start, its zeros do not count as kept."""
    capcli.export(ExportConfig(model=str(pruned), to="dense", out=str(tmp_path / "teacher")))
    reports = [
        tiny.prune(tmp_path / name, teacher=teacher, teacher_epochs=0, epochs=2, init="pretrained")
        for name, teacher in (("a", str(tmp_path / "teacher")), ("b", str(pruned)))
    ]
    assert reports[0]["metrics"]["dense"] == reports[1]["metrics"]["dense"] == stored(pruned)["metrics"]["pruned"]
    assert digest(tmp_path / "a" / WEIGHTS) == digest(tmp_path / "b" / WEIGHTS)
    assert {row["phase"] for row in reports[0]["history"]} == {"prune"}


def test_start_from_a_pruned_teacher(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    report = tiny.prune(tmp_path / "out", teacher=str(pruned), teacher_epochs=0, epochs=2, sparsity=0.8)
    assert report["sparsity"]["kept_weights"] == round(0.2 * PRUNABLE)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling(tiny: Tiny, tmp_path: Path, pooling: str) -> None:
    assert tiny.prune(tmp_path / "out", pooling=pooling, **QUICK)["status"] == "complete"


def test_bf16_on_a_cpu(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training steps are in 16 bits; banks, metrics and latency are in 32, so that `cap eval` finds the same."""
    steps, measured = set(), set()
    forward, running = predict.forward_states, predict.running

    def in_step(*given: Any, **named: Any) -> Any:
        steps.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return forward(*given, **named)

    def asked(model: Any, on: Any, *given: Any) -> Any:
        measured.add(on.precision)
        return running(model, on, *given)

    monkeypatch.setattr(predict, "forward_states", in_step)
    monkeypatch.setattr(predict, "running", asked)
    report = tiny.prune(tmp_path / "out", precision="bf16", **QUICK)
    assert steps == {(True, True), (False, False)}
    assert measured == {"float32"}
    assert "bfloat16" in report["device"]
    assert report["latency"]["dense"]["precision"] == report["latency"]["pruned"]["precision"] == "float32"
    source = TaskConfig(**artifact.stored_source(str(tmp_path / "out")))
    again = capcli.evaluate(EvalConfig(source=source, model=str(tmp_path / "out")))
    assert report["metrics"]["pruned"].items() <= again["metrics"].items()
    assert all(p.dtype == torch.float32 for p in capcli.load(tmp_path / "out").parameters())


def test_fewer_examples_than_are_drawn(tiny: Tiny, tmp_path: Path) -> None:
    report = tiny.prune(tmp_path / "out", max_train_samples=20, max_eval_samples=10, extra_examples=4096, **QUICK)
    assert report["metrics"]["n_examples"] == 10


@pytest.mark.parametrize("sparsity", [0.0, 0.99])
def test_ends_of_the_range(tiny: Tiny, tmp_path: Path, sparsity: float) -> None:
    report = tiny.prune(tmp_path / "out", sparsity=sparsity, **QUICK)
    assert abs(report["sparsity"]["kept_weights"] - round((1 - sparsity) * PRUNABLE)) <= 1
    assert report["sparsity"]["achieved"] == pytest.approx(sparsity, abs=1e-4)


def test_scopes(tiny: Tiny, tmp_path: Path) -> None:
    """Within each matrix every matrix has the same sparsity; over all they differ."""
    for scope, same in (("matrix", True), ("global", False)):
        report = tiny.prune(tmp_path / scope, scope=scope, method="magnitude", **QUICK)
        rows = report["sparsity"]["per_matrix"]
        assert (max(row["sparsity"] for row in rows) - min(row["sparsity"] for row in rows) < 1e-3) == same


def test_no_config_json_in_the_artefact(pruned: Path) -> None:
    """Plain transformers must refuse the folder, not load it with random weights."""
    from transformers import AutoModelForSequenceClassification

    assert not (pruned / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForSequenceClassification.from_pretrained(pruned)


# The same command again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "processes"), [(5, "ab"), (6, "a"), (7, "a")])
def test_same_command_in_fresh_processes_gives_the_same_bytes(
    tiny: Tiny, tmp_path: Path, seed: int, processes: str
) -> None:
    """R10. And the bytes do not depend on whether the process is fresh."""
    env = environment()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "capcli", *tiny.arguments(tmp_path / name, seed=seed)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in processes
    ]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    tiny.prune(tmp_path / "c", seed=seed)
    names = set(stored(tmp_path / "a")["files"])
    for name_of_run in processes:
        assert outcome(tmp_path / name_of_run) == outcome(tmp_path / "c")
        assert all(digest(tmp_path / name_of_run / name) == digest(tmp_path / "a" / name) for name in names)


def test_seeds_differ(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    tiny.prune(tmp_path / "out", seed=2)
    assert digest(tmp_path / "out" / WEIGHTS) != digest(pruned / WEIGHTS)


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short finished run for the tests that change it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    tiny.prune(out, losses="ce", method="magnitude", **QUICK)
    return out


def again(tiny: Tiny, out: Path, *more: str, **changes: Any) -> Any:
    arguments = tiny.arguments(out, **{"losses": "ce", "method": "magnitude", **QUICK, **changes})
    return invoke(*arguments, *more)


def test_finished_run_is_left_alone(tiny: Tiny, finished: Path) -> None:
    before = {path.name: (path.stat().st_mtime_ns, digest(path)) for path in finished.iterdir()}
    result = again(tiny, finished)
    assert result.exit_code == 0
    assert "already complete" in result.stderr
    assert {path.name: (path.stat().st_mtime_ns, digest(path)) for path in finished.iterdir()} == before


def test_other_configuration_is_refused(tiny: Tiny, finished: Path) -> None:
    result = again(tiny, finished, sparsity=0.8, seed=9)
    assert result.exit_code == 2
    assert "sparsity: 0.7, now 0.8" in result.stderr
    assert "seed: 1, now 9" in result.stderr
    assert "--overwrite" in result.stderr


def test_options_that_may_differ(tiny: Tiny, finished: Path) -> None:
    assert again(tiny, finished, checkpoint_seconds=5, max_time=9).exit_code == 0


def test_overwrite_starts_anew(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "out"
    shutil.copytree(finished, out)
    result = again(tiny, out, "--overwrite", sparsity=0.8)
    assert result.exit_code == 0, result.stderr
    assert stored(out)["sparsity"]["requested"] == 0.8
    assert not (out / "work").exists()


def test_keep_work(tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert again(tiny, out, keep_work=True).exit_code == 0
    assert (out / "work" / "prune-steps").is_dir()
    assert outcome(out) == outcome(finished)


@pytest.mark.parametrize("task", ["text-classification", "ner"])
def test_only_the_bank_of_the_teacher_holds_logits(tiny: Tiny, tmp_path: Path, task: str) -> None:
    data = tiny.tags if task == "ner" else tiny.data
    tiny.prune(tmp_path / "out", task=task, data=data, losses="ce,kd,prc,snc,fic", keep_work=True, **QUICK)
    found = {folder.name: read_tensors(folder / "bank.safetensors") for folder in banks_of(tmp_path / "out")}
    assert {"bank-pretrained", "bank-finetuned"} < set(found)  # and a snapshot
    for name, tensors in found.items():
        n_outputs = len(tensors["logits"])
        assert len(tensors["vectors"]) == 80
        if name != "bank-finetuned":
            assert n_outputs == 0, name
        else:
            assert n_outputs > 80 if task == "ner" else n_outputs == 80


def banks_of(out: Path) -> list[Path]:
    return sorted(path.parent for path in (out / "work").glob("*/bank.safetensors"))


def test_overwrite_removes_only_what_a_run_writes(tiny: Tiny, finished: Path) -> None:
    (finished / "notes.txt").write_text("mine")
    assert again(tiny, finished, overwrite=True).exit_code == 0
    assert (finished / "notes.txt").read_text() == "mine"


def test_overwrite_with_a_model_or_data_that_does_not_load_loses_nothing(tiny: Tiny, pruned: Path) -> None:
    before = {path.name: digest(path) for path in pruned.iterdir() if path.is_file()}
    for changes in ({"model": "no/such/folder/here"}, {"data": str(pruned / "nothing")}):
        assert again(tiny, pruned, overwrite=True, **changes).exit_code == 2
    assert {path.name: digest(path) for path in pruned.iterdir() if path.is_file()} == before


# The types of the file -----------------------------------------------------------------------------------------------


def test_the_file_holds_16_bits_unless_all_are_asked_for(tiny: Tiny, runs: Any, tmp_path: Path) -> None:
    """Same training, so the 16-bit values are those of the 32-bit file, rounded; the report measures what is stored."""
    narrow, wide = runs("cap-soft"), tmp_path / "wide"
    tiny.prune(wide, method="cap-soft", store="fp32")
    of_narrow, of_wide = (reader.load(out / "model.cap.safetensors") for out in (narrow, wide))
    floats = {name for name, tensor in of_wide.items() if tensor.is_floating_point()}
    assert {of_narrow[name].dtype for name in floats} == {torch.float16}
    assert {of_wide[name].dtype for name in floats} == {torch.float32}
    for name in floats:
        torch.testing.assert_close(of_narrow[name].float(), of_wide[name], rtol=2**-11, atol=2**-24)
        assert of_narrow[name].count_nonzero() == of_wide[name].count_nonzero() or "layer" not in name
    ours, theirs = stored(narrow), stored(wide)
    assert ours["sparsity"] == theirs["sparsity"]
    dense = sum(4 * tensor.numel() if name in floats else tensor.nbytes for name, tensor in of_wide.items())
    assert ours["size"]["dense_bytes"] == theirs["size"]["dense_bytes"] == dense
    given = (Path(tiny.model) / "model.safetensors").stat().st_size
    assert ours["size"]["given_bytes"] == theirs["size"]["given_bytes"] == given
    assert ours["size"]["weights_bytes"] < 0.7 * theirs["size"]["weights_bytes"]


def test_values_too_large_for_16_bits(tiny: Tiny, tmp_path: Path) -> None:
    """A tensor with such a value stays in 32 bits, and the report says so."""
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("position_embeddings.weight"))
    tensors[name][-1] = 1e5  # of a place that no text reaches
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    report = tiny.prune(tmp_path / "out", model=str(model))
    (note,) = [note for note in report["notes"] if "32 bits" in note]
    assert note == f"bert.{name.removeprefix('bert.')}: stored in 32 bits, too large for fp16"
    entries = {entry.name: entry.dtype for entry in reader.inspect(tmp_path / "out" / "model.cap.safetensors")}
    assert [name for name, dtype in entries.items() if dtype == "F32"] == [note.partition(":")[0]]


def test_an_export_keeps_the_type_of_the_file(runs: Any, tmp_path: Path) -> None:
    """So it is exact, and no larger than the artefact."""
    narrow = runs("cap-soft")
    found = capcli.export(export_config(narrow, tmp_path / "sparse", to="sparse"))
    assert found["dtype"] == "fp16" and found["metrics"] is None and found["check"]["largest_difference"] == 0
    assert found["size"]["weights_bytes"] == stored(narrow)["size"]["weights_bytes"]
    wide = capcli.export(export_config(narrow, tmp_path / "dense", to="dense"))
    assert wide["dtype"] == "fp32" and wide["metrics"] is None and wide["check"]["largest_difference"] == 0


def export_config(model: Path, out: Path, **chosen: Any) -> ExportConfig:
    return ExportConfig(model=str(model), out=str(out), threads=1, **chosen)
