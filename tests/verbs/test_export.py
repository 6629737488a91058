"""`cap export`: every format from unstructured and structured runs, what it claims, and how it fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import registry
import torch
import yaml
from tiny import HIDDEN, TOKENIZERS, WEIGHTS, Tiny, digest, forked, invoke, wait

import capcli
from capcli import files
from capcli.artifact import reader, writer
from capcli.config.names import EXPORT_FORMATS
from capcli.exporting import checks, onnx_model
from capcli.models import artifact, loading, predict
from capcli.models.devices import Compute
from capcli.models.model import Model
from capcli.records.exported import Speed, Timed
from capcli.records.pruned import Metrics, Report
from capcli.reporting.card import eval_results
from capcli.runtime.graph import Graph
from capcli.sources import hub

OWN_WEIGHTS = tuple(to for to in EXPORT_FORMATS if to != "mask")  # see test_mask_exports
SAME = [name for name in OWN_WEIGHTS if name not in ("exits", "lowrank")]  # that answer as the model does
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def structured(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("structured") / "out"
    tiny.prune(out, method="cap-f", sparsity=0.6)
    return out


@pytest.fixture(scope="module")
def in_32_bits(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("in-32-bits") / "out"
    tiny.prune(out, store="fp32")
    return out


@pytest.fixture(scope="module")
def runs(pruned: Path, structured: Path) -> dict[str, Path]:
    return {"soft": pruned, "heads": structured}


@pytest.fixture(scope="module")
def made(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes `made(run, format, *options)`: the folder of an export, to read from; the same call, the same folder."""
    found: dict[tuple[str, ...], Path] = {}

    def make(*key: str) -> Path:
        if key not in found:
            found[key] = tmp_path_factory.mktemp("made") / "out"
            exported(runs[key[0]], found[key], "--to", *key[1:])
        return found[key]

    return make


def exported(run: Path, out: Path, *options: str) -> dict[str, Any]:
    """Run `cap export` and return what it printed."""
    result = invoke("export", str(run), "-o", str(out), "--threads", "1", "--json", *options)
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout))


def refused(code: int, *arguments: str) -> str:
    """Run `cap export`, expect this exit code and one line of error; returns stderr."""
    result = invoke("export", *arguments)
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    return str(result.stderr)


def edited(run: Path, target: Path, name: str, change: Callable[[Any], Any]) -> Path:
    """A copy of a run in which a JSON file holds what `change` makes of it."""
    shutil.copytree(run, target)
    (target / name).write_text(json.dumps(change(json.loads((target / name).read_text()))))
    return target


def with_data(run: Path, target: Path, data: Path) -> Path:
    """A copy of a run that was made with the data in `data`."""
    return edited(
        run, target, "cap_config.json", lambda table: {**table, "source": {**table["source"], "data": str(data)}}
    )


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The front matter of a model card, and its text."""
    text = (folder / "README.md").read_text()
    return dict(yaml.safe_load(text.split("---\n")[1])), text


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(5, 20, (8, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[::2, 7:] = 0
    with torch.inference_mode():
        return torch.as_tensor(model(input_ids=ids, attention_mask=mask).logits)


# Every format --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", SAME)
@pytest.mark.parametrize("run", ["soft", "heads"])
def test_every_format(runs: dict[str, Path], tmp_path: Path, run: str, to: str) -> None:
    """What is printed is what is stored; every file is listed with its bytes; nothing else is left."""
    out = tmp_path / to
    found = exported(runs[run], out, "--to", to)
    assert found == json.loads((out / "export.json").read_text())
    assert (found["format"], found["schema_version"]) == (to, 1)
    on_disk = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {"export.json"}
    assert on_disk == set(found["files"])
    assert all(digest(out / name) == row["sha256"] for name, row in found["files"].items())
    assert {"README.md", "tokenizer.json"} <= on_disk
    check = found["check"]
    assert check["exact"] and check["texts"] == 48 and check["argmax_agreement"] == 1.0
    assert check["largest_difference"] <= 1e-4 * max(1.0, check["largest_logit"])
    counts = check["nonzero_weights"]
    assert 0 < counts["after"] <= counts["before"] and (run == "heads" or counts["after"] > 0.9 * counts["before"])
    assert found["metrics"] is None  # exact: nothing to measure again
    assert [path.name for path in tmp_path.iterdir()] == [to]


def test_the_card_says_how_to_use_each_format(made: Callable[..., Path]) -> None:
    words = {"dense": "from transformers import", "sparse": "capcli.load(", "sliced": "cut out", "onnx": "onnxruntime"}
    for to, word in words.items():
        card = (made("heads", to) / "README.md").read_text()
        assert word in card
        front = yaml.safe_load(card.split("---\n")[1])
        assert "pruned" in front["tags"] and front["model-index"]


SAME_ANSWERS = "its metrics are those of the pruned model, which gives the same answers"
MEASURED_AGAIN = "its metrics are those of the pruned model, measured again on these files"


def test_the_card_says_whose_metrics_it_shows(pruned: Path, tmp_path: Path, made: Callable[..., Path]) -> None:
    """Of an exact export those of the run; of another its own; without data none, though the run has some."""
    before = json.loads((pruned / "report.json").read_text())["metrics"]
    front, text = card_of(made("soft", "sparse"))
    assert SAME_ANSWERS in text and MEASURED_AGAIN not in text
    values = {row["type"]: row["value"] for row in front["model-index"][0]["results"][0]["metrics"]}
    assert values == pytest.approx(before["pruned"])
    found = exported(pruned, tmp_path / "own", "--to", "sparse", "--dtype", "int8")
    front, text = card_of(tmp_path / "own")
    assert MEASURED_AGAIN in text and SAME_ANSWERS not in text and "the rest keeps" in text
    values = {row["type"]: row["value"] for row in front["model-index"][0]["results"][0]["metrics"]}
    assert values == pytest.approx(found["metrics"]["after"])
    moved = with_data(pruned, tmp_path / "moved", tmp_path / "gone")
    assert exported(moved, tmp_path / "none", "--to", "sparse", "--dtype", "int8")["metrics"] is None
    front, text = card_of(tmp_path / "none")
    assert "model-index" not in front and "metrics" not in front
    assert "its metrics" not in text and "the rest keeps" not in text and "No metric was measured." in text
    assert "Sparsity was counted in this folder." in text and "the accuracy was not measured again" in text
    exported(moved, tmp_path / "exact", "--to", "sparse")
    assert SAME_ANSWERS in card_of(tmp_path / "exact")[1]


def test_an_export_of_a_model_that_guesses_says_so_once(pruned: Path, tmp_path: Path) -> None:
    """In its own record if the report of the run does not; there is nothing to keep."""
    shutil.copytree(pruned, tmp_path / "run")
    tensors = reader.load(pruned / WEIGHTS)
    tensors["classifier.weight"].zero_()
    kept = [entry.name for entry in reader.inspect(pruned / WEIGHTS) if entry.kept is not None]
    writer.save(tmp_path / "run" / WEIGHTS, tensors, kept)
    found = exported(tmp_path / "run", tmp_path / "a", "--to", "sparse", "--dtype", "int8")
    assert found["metrics"]["at_chance"] == list(found["metrics"]["after"])
    assert found["metrics"]["chance"] == found["run"]["metrics"]["chance"]
    said = "the model before and the export are no better than guessing on validation: accuracy"
    assert sum(said in note for note in found["notes"]) == 1
    _, text = card_of(tmp_path / "a")
    assert "It is no better than guessing" in text and "the rest keeps" not in text
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    report["metrics"]["at_chance"]["pruned"] = ["accuracy"]
    (tmp_path / "run" / "report.json").write_text(json.dumps(report))
    again = exported(tmp_path / "run", tmp_path / "b", "--to", "sparse", "--dtype", "int8")
    assert not [note for note in again["notes"] if "guessing" in note]


def test_some_examples_are_not_compared_with_all(in_32_bits: Path, tmp_path: Path) -> None:
    found = exported(in_32_bits, tmp_path / "out", "--to", "sparse", "--dtype", "fp16", "--max-eval-samples", "5")
    assert found["metrics"]["n_examples"] == 5 and set(found["metrics"]["before"]) == set(found["metrics"]["after"])
    _, text = card_of(tmp_path / "out")
    assert "Examples: 5, split:" in text and "the rest keeps" not in text
    table = text.split("## Results")[1].split("Examples:")[0]
    assert table.count("not measured") == 2 * len(found["metrics"]["after"])  # the dense value, and what is kept of it


@pytest.mark.parametrize("hub_id", [None, "someone/some-model", "a/b\nlicense: mit"])
def test_the_base_model_is_what_the_run_knew(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_id: str | None
) -> None:
    """The folder of the base model may be gone, and no stored name is ever looked up."""
    shutil.copytree(tiny.model, tmp_path / "base")
    tiny.prune(tmp_path / "run", model=str(tmp_path / "base"), epochs=1, teacher_epochs=1)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["base_model"] is None
    shutil.rmtree(tmp_path / "base")
    run = edited(tmp_path / "run", tmp_path / "known", "report.json", lambda found: {**found, "base_model": hub_id})

    def never(source: str, *rest: Any, **options: Any) -> Any:
        raise AssertionError(f"{source} was looked up")

    resolve = hub.resolve
    monkeypatch.setattr(hub, "resolve", lambda source: resolve(source) if Path(source).is_absolute() else never(source))
    monkeypatch.setattr(loading, "hub_id", never)
    for to in ("sparse", "dense"):
        exported(run, tmp_path / to, "--to", to)
        front, _ = card_of(tmp_path / to)
        assert front.get("base_model") == hub_id
        assert ("base_model_relation" in front) == bool(hub_id) and "license" not in front


@pytest.mark.parametrize("content", ["{}", '{"metrics": {}, "status": "complete", "new": [1]}'])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_report_that_says_little(in_32_bits: Path, tmp_path: Path, content: str, dtype: str) -> None:
    run = edited(in_32_bits, tmp_path / "run", "report.json", lambda _: json.loads(content))
    found = exported(run, tmp_path / "out", "--to", "sparse", "--dtype", dtype)
    assert (found["metrics"] is None) == (dtype == "fp32")
    assert "new" not in found["run"] and "base_model" not in card_of(tmp_path / "out")[0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("report.json", "[]", "contains a list, not a JSON object"),
        ("report.json", "null", "contains null, not a JSON object"),
        ("report.json", '{"metrics": null}', "metrics is null, not a JSON object"),
        ("report.json", '{"notes": "x"}', "notes is a text, not a list"),
        ("report.json", '{"base_model": 5}', "base_model is the number 5, not a text"),
        ("report.json", '{"sparsity": {"per_matrix": [{}, {"kept": 0.5}]}}', "sparsity.per_matrix[1].kept is the num"),
        ("report.json", '{"schema_version": 2}', "has schema_version 2, this cap reads 1"),
        ("export.json", "[]", "contains a list, not a JSON object"),
        ("export.json", '{"run": 3}', "run is the number 3, not a JSON object"),
        ("export.json", '{"run": {"metrics": 3}}', "run.metrics is the number 3, not a JSON object"),
    ],
)
def test_a_record_of_other_types_is_named(
    pruned: Path, made: Callable[..., Path], tmp_path: Path, name: str, content: str, said: str
) -> None:
    source = pruned if name == "report.json" else made("soft", "sparse")
    run = edited(source, tmp_path / "run", name, lambda _: json.loads(content))
    found = refused(2, str(run), "--to", "sparse", "-o", str(tmp_path / "out"))
    assert name in found and said in found and found.count("hint: ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_report_that_is_no_json(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "run")
    (tmp_path / "run" / "report.json").write_text("{")
    said = refused(2, str(tmp_path / "run"), "--to", "sparse", "-o", str(tmp_path / "out"))
    assert "report.json is not valid JSON" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_same_command_same_bytes(runs: dict[str, Path], tmp_path: Path) -> None:
    """Of everything but measured times, which the card of a faster model shows."""
    for to in ("dense", "sparse", "sliced"):
        both = [exported(runs["heads"], tmp_path / f"{to}{i}", "--to", to)["files"] for i in range(2)]
        assert to != "sliced" or (both[0].pop("README.md") and both[1].pop("README.md"))
        assert both[0] == both[1], to


# Dense ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_dense_in_16_bits(in_32_bits: Path, tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    from transformers import AutoModelForSequenceClassification

    found = exported(in_32_bits, tmp_path / "out", "--to", "dense", "--dtype", dtype)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")
    ours = dict(capcli.load(in_32_bits).named_parameters())
    for name, parameter in stock.named_parameters():
        assert parameter.dtype == kind
        assert torch.equal(parameter, ours[name].to(kind)), name
    assert found["gives"]["smaller_file"] > 1.8
    assert not found["check"]["exact"]
    assert set(found["metrics"]["before"]) == set(found["metrics"]["after"])


def test_results_for_the_hub() -> None:
    """One score of one benchmark in each file, as the hub reads them."""
    metrics = Metrics(split="validation", n_examples=872, pruned={"accuracy": 0.5, "f1": float("nan")})
    made = eval_results(Report(metrics=metrics), "nyu-mll/glue", "sst2")
    assert list(made) == ["sst2-accuracy.yaml"]
    (row,) = yaml.safe_load(made["sst2-accuracy.yaml"])
    assert row["dataset"] == {"id": "nyu-mll/glue", "task_id": "sst2"}
    assert row["value"] == 0.5


# Sparse --------------------------------------------------------------------------------------------------------------


def test_sparse_as_it_is_changes_nothing(pruned: Path, tmp_path: Path) -> None:
    exported(pruned, tmp_path / "out", "--to", "sparse")
    assert digest(tmp_path / "out" / WEIGHTS) == digest(pruned / WEIGHTS)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_types_of_sparse_values(in_32_bits: Path, tmp_path: Path, dtype: str) -> None:
    """16 bits are a cast; 8 bits are half a step away at most; no zero becomes anything else."""
    found = exported(in_32_bits, tmp_path / "out", "--to", "sparse", "--dtype", dtype)
    before, after = (dict(capcli.load(folder).state_dict()) for folder in (in_32_bits, tmp_path / "out"))
    pruned_names = [e.name for e in reader.inspect(in_32_bits / WEIGHTS) if e.kept is not None]
    for name, tensor in before.items():
        if not tensor.is_floating_point():
            continue
        assert after[name].dtype == torch.float32
        kind = torch.bfloat16 if dtype == "bf16" else torch.float16
        if dtype == "int8" and name in pruned_names:
            assert float((after[name] - tensor).abs().max()) <= 0.501 * float(tensor.abs().max()) / 127
        else:
            assert torch.equal(after[name], tensor.to(kind).float()), name
        assert not bool(after[name][tensor == 0].any()), name
    assert found["check"]["nonzero_weights"]["after"] <= found["check"]["nonzero_weights"]["before"]
    assert (tmp_path / "out" / WEIGHTS).stat().st_size < (in_32_bits / WEIGHTS).stat().st_size
    assert found["metrics"]["n_examples"] == 48


@pytest.mark.parametrize(("embeddings", "error"), [("fp16", 1e-3), ("int8", 5e-3), ("svd:8", 1.0)])
def test_treatment_of_the_embeddings(in_32_bits: Path, tmp_path: Path, embeddings: str, error: float) -> None:
    found = exported(in_32_bits, tmp_path / "out", "--to", "sparse", "--embeddings", embeddings)
    before, after = (dict(capcli.load(folder).state_dict()) for folder in (in_32_bits, tmp_path / "out"))
    for name in before:
        if name != EMBEDDINGS:
            assert torch.equal(before[name], after[name]), name
    change = (before[EMBEDDINGS] - after[EMBEDDINGS]).abs().max() / before[EMBEDDINGS].abs().max()
    assert 0 < float(change) <= error
    assert found["embeddings"] == embeddings and found["metrics"]
    if embeddings.startswith("svd"):
        assert torch.linalg.matrix_rank(after[EMBEDDINGS]) == 8


def test_eval_of_every_export(runs: dict[str, Path], tmp_path: Path) -> None:
    """Our formats are measured by `cap eval` as the run itself is, with the task and data of the run."""
    whole = json.loads(invoke("eval", str(runs["heads"]), "--threads", "1", "--json").stdout)
    for to in ("sparse", "sliced"):
        exported(runs["heads"], tmp_path / to, "--to", to)
        found = json.loads(invoke("eval", str(tmp_path / to), "--threads", "1", "--json").stdout)
        assert found["metrics"] == pytest.approx(whole["metrics"])
        assert found["sparsity"]["achieved"] == pytest.approx(whole["sparsity"]["achieved"], abs=0.02)


def test_a_model_without_word_embeddings(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertForSequenceClassification, BertModel

    def none(self: Any) -> Any:
        raise NotImplementedError("no embeddings of words")

    for kind in (BertForSequenceClassification, BertModel):
        monkeypatch.setattr(kind, "get_input_embeddings", none)
    said = refused(2, str(pruned), "--to", "sparse", "--embeddings", "int8", "-o", str(tmp_path / "no"))
    assert "has no word embeddings" in said and "use --embeddings keep" in said
    for to in ("dense", "sparse", "sliced"):
        exported(pruned, tmp_path / to, "--to", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sliced", "sparse"]


# Vocabulary ----------------------------------------------------------------------------------------------------------


def test_the_vocabulary_of_the_task(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    rare = tmp_path / "data"
    shutil.copytree(tiny.data, rare)
    lines = (rare / "train.csv").read_text().splitlines()
    (rare / "train.csv").write_text("\n".join(line for line in lines if "music" not in line) + "\n")
    found = exported(pruned, tmp_path / "out", "--to", "sparse", "--vocab", "task", "--data", str(rare))
    words = found["vocabulary"]
    tokenizer = capcli.load_tokenizer(tmp_path / "out")
    assert len(tokenizer) == words["kept"] < words["of"] == len(capcli.load_tokenizer(pruned))
    assert "music" not in tokenizer.get_vocab() and "film" in tokenizer.get_vocab()
    assert capcli.load(tmp_path / "out").get_input_embeddings().weight.shape == (words["kept"], HIDDEN)
    assert words["unknown_rate"]["after"] > words["unknown_rate"]["before"] == 0
    assert found["check"]["exact"] and found["check"]["argmax_agreement"] == 1.0
    assert found["metrics"]["n_examples"] == 48


@pytest.mark.parametrize("to", ["dense", "sparse", "sliced"])
def test_a_vocabulary_file(pruned: Path, tmp_path: Path, to: str) -> None:
    words = [word for word in capcli.load_tokenizer(pruned).get_vocab() if word not in ("##ly", "##s")]
    (tmp_path / "words.txt").write_text("\n".join(words) + "\n")
    found = exported(pruned, tmp_path / "out", "--to", to, "--vocab", str(tmp_path / "words.txt"))
    assert found["vocabulary"]["kept"] == len(words)
    assert found["check"]["largest_difference"] <= 1e-4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "empty"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nzebra\n", "zebra"),
        (b"[PAD]\n[UNK]\nfilm\n", "[CLS]"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfilm\n", "drops"),
    ],
)
def test_a_vocabulary_that_does_not_serve(pruned: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    said = refused(2, str(pruned), "--to", "sparse", "--vocab", str(path), "-o", str(tmp_path / "out"))
    assert message in said
    assert not (tmp_path / "out").exists()


def test_the_vocabulary_needs_the_data(pruned: Path, tmp_path: Path) -> None:
    """Without them nobody knows what a list of tokens does to the texts of the task."""
    run = with_data(pruned, tmp_path / "run", tmp_path / "gone")
    words = capcli.load_tokenizer(pruned).get_vocab()
    (tmp_path / "words.txt").write_text("\n".join(words) + "\n")
    for vocab in ("task", str(tmp_path / "words.txt")):
        said = refused(2, str(run), "--to", "sparse", "--vocab", vocab, "-o", str(tmp_path / "out"))
        assert "gone" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "words.txt"]


# Data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("--dtype", "fp16")])
def test_data_with_other_columns_are_no_reason_for_others(
    tiny: Tiny, pruned: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Data that are there but do not fit are an error, not data that are missing."""
    shutil.copytree(tiny.data, tmp_path / "data")
    for path in (tmp_path / "data").iterdir():
        path.write_text("\n".join(line.rsplit(",", 1)[0] for line in path.read_text().splitlines()) + "\n")
    run = with_data(pruned, tmp_path / "run", tmp_path / "data")
    said = refused(2, str(run), "--to", "sparse", *options, "-o", str(tmp_path / "out"))
    assert "label" in said and "mr" not in said.split()
    other = with_data(pruned, tmp_path / "other", tmp_path / "gone")
    refused(2, str(other), "--to", "sparse", "--data", str(tmp_path / "data"), "-o", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_data_of_an_export_are_remembered(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    run = with_data(pruned, tmp_path / "run", tmp_path / "gone")
    exported(run, tmp_path / "out", "--to", "sparse", "--data", tiny.data)
    result = invoke("eval", str(tmp_path / "out"), "--threads", "1", "--json")
    assert result.exit_code == 0, result.stderr
    measured = json.loads((pruned / "report.json").read_text())["metrics"]["pruned"]
    found = json.loads(result.stdout)["metrics"]
    assert {name: found[name] for name in measured} == pytest.approx(measured)
    exported(run, tmp_path / "without", "--to", "sparse")  # knows no data but those of the run, which are gone
    assert invoke("eval", str(tmp_path / "without"), "--threads", "1", "--json").exit_code == 2


# Sliced and onnx -----------------------------------------------------------------------------------------------------


def test_sliced_is_smaller_and_equal(structured: Path, tmp_path: Path) -> None:
    found = exported(structured, tmp_path / "out", "--to", "sliced")
    whole, small = capcli.load(structured), capcli.load(tmp_path / "out")
    assert torch.allclose(logits(whole), logits(small), atol=1e-5)
    counts = [sum(p.numel() for p in net.parameters()) for net in (whole, small)]
    assert counts[1] < 0.75 * counts[0]
    assert found["gives"]["less_memory"] == pytest.approx(counts[0] / counts[1])
    assert found["layers"] and set(found["speed"]) >= {"batch_1", "batch_32", "length", "threads"}


def test_what_a_sliced_model_becomes(made: Callable[..., Path], tmp_path: Path) -> None:
    sliced = made("heads", "sliced")
    assert "is sliced" in refused(2, str(sliced), "--to", "dense", "-o", str(tmp_path / "dense"))
    for to in ("onnx", "sparse", "sliced"):
        exported(sliced, tmp_path / to, "--to", to)


def test_an_export_of_an_export_knows_its_run(made: Callable[..., Path], tmp_path: Path) -> None:
    run = made("heads", "sliced")
    known = edited(run, tmp_path / "known", "export.json", lambda t: {**t, "run": {**t["run"], "base_model": "a/b-c"}})
    found = exported(known, tmp_path / "out", "--to", "sparse")
    first = json.loads((run / "export.json").read_text())["run"]
    assert found["run"] == {**first, "base_model": "a/b-c"}
    assert (first["method"], first["task"], first["base_model"]) == ("cap-f", "text-classification", None)
    (front, text), (_, before) = card_of(tmp_path / "out"), card_of(run)
    assert front["base_model"] == "a/b-c" and {"cap-f", "text-classification"} <= set(front["tags"])
    title = next(line for line in before.splitlines() if line.startswith("# "))
    assert title in text.splitlines() and "removed with cap-f" in text
    assert front["model-index"][0]["name"] == f"{first['model']} pruned for text-classification"


def test_onnx_with_8_bits(structured: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    small = exported(structured, tmp_path / "int8", "--to", "onnx", "--int8")
    assert small["size"]["weights_bytes"] < (made("heads", "onnx") / "model.onnx").stat().st_size
    assert small["metrics"]["n_examples"] == 48 and not small["check"]["exact"]


def test_8_bit_answers_are_compared_and_scored_one_text_at_a_time(
    structured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph sees the range of the whole batch, so in other batches the same text can have another answer."""
    unmeasured(monkeypatch)
    sizes, honest = [], Graph.__call__

    def seen(graph: Graph, inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        return honest(graph, inputs)

    monkeypatch.setattr(Graph, "__call__", seen)
    found = exported(structured, tmp_path / "int8", "--to", "onnx", "--int8")
    assert set(sizes[1:]) == {1}  # after two texts that are tried when it is opened
    assert found["batching"] == "one text at a time"
    assert found["check"]["texts"] == found["metrics"]["n_examples"] == 48
    assert found["check"]["argmax_agreement"] == found["metrics"]["agreement"]
    assert any("one text at a time" in note for note in found["notes"])
    other = exported(structured, tmp_path / "fp32", "--to", "onnx")
    assert other["batching"] == "several texts at a time" and max(sizes) > 1


def test_a_tampered_graph(
    structured: Path, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared by what it computes, and by its zeros; as it was, it is good."""
    from onnx import numpy_helper

    graph, arguments = made("heads", "onnx") / "model.onnx", (str(structured), "--to", "onnx")
    unmeasured(monkeypatch)

    def louder(proto: Any) -> None:
        tensor = next(t for t in proto.graph.initializer if t.name.endswith("classifier.weight"))
        array = numpy_helper.to_array(tensor).copy()
        array[0, 0] += 1.0
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    converted(monkeypatch, graph, louder)
    assert "the logits of the export differ by up to" in refused(1, *arguments, "-o", str(tmp_path / "out"))
    converted(monkeypatch, graph)
    with monkeypatch.context() as patch:
        patch.setattr(onnx_model, "nonzero", lambda *_: 100_000)
        assert "100,000 weights are not zero" in refused(1, *arguments, "-o", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    exported(structured, tmp_path / "out", "--to", "onnx")


def test_quantised_weights_that_protobuf_could_not_hold(
    structured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The large weights beside the graph go when it is quantised."""
    unmeasured(monkeypatch)
    monkeypatch.setattr(onnx_model, "SINGLE_FILE_BYTES", 0)
    found = exported(structured, tmp_path / "out", "--to", "onnx", "--int8")
    graph = tmp_path / "out" / "model.onnx"
    assert [name for name in found["files"] if "model" in name] == [graph.name]
    assert not list(graph.parent.glob("*.data"))
    assert found["size"]["weights_bytes"] == found["size"]["memory_bytes"] == graph.stat().st_size
    assert found["check"]["argmax_agreement"] > 0.8


def test_a_run_on_short_texts_becomes_a_graph(tiny: Tiny, tmp_path: Path) -> None:
    tiny.prune(tmp_path / "run", max_length=8, epochs=1, teacher_epochs=1)
    found = exported(tmp_path / "run", tmp_path / "out", "--to", "onnx")
    assert found["check"]["exact"] and found["check"]["texts"] == 48


@pytest.mark.parametrize(
    "kind", ["regression", "multi-label-classification", "token-classification", "question-answering"]
)
def test_every_kind_of_task(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    data = {
        "regression": tiny.numbers,
        "multi-label-classification": tiny.topics,
        "token-classification": tiny.tags,
        "question-answering": tiny.answers,
    }[kind]
    tiny.prune(tmp_path / "out", task=kind, data=data, method="cap-f", sparsity=0.5, epochs=1, teacher_epochs=1)
    for to in ("dense", "sparse", "sliced"):
        found = exported(tmp_path / "out", tmp_path / to, "--to", to)
        assert found["check"]["exact"] and (found["check"]["argmax_agreement"] is None) == (kind == "regression")


# Plan ----------------------------------------------------------------------------------------------------------------


def test_no_kernel_of_a_file_is_passed_on(pruned: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    """transformers would fetch and run what a configuration names."""
    evil = {"attn_implementation": "evil/kernel", "experts_implementation": "evil/kernel"}
    run = edited(
        pruned,
        tmp_path / "run",
        "cap_config.json",
        lambda table: {**table, "model_config": {**table["model_config"], **evil}},
    )
    for to in ("dense", "sparse", "sliced"):
        exported(run, tmp_path / to, "--to", to)
        assert all(b"evil" not in path.read_bytes() for path in (tmp_path / to).iterdir())
    dense = edited(made("soft", "dense"), tmp_path / "model", "config.json", lambda table: {**table, **evil})
    (row,) = json.loads(invoke("export", str(dense), "--to", "onnx", "--plan", "-q", "--json").stdout)["rungs"]
    assert "refused" not in row


# Failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "zip"), "unknown format 'zip'"),
        (("--dtype", "int4"), "unknown dtype 'int4'"),
        (("--to", "dense", "--dtype", "int8"), "--dtype int8 is for --to sparse, sliced, exits, lowrank, not dense"),
        (("--to", "onnx", "--dtype", "fp16"), "--to onnx writes fp32"),
        (("--to", "sparse", "--int8"), "--int8 is for --to onnx"),
        (("--to", "sparse", "--embeddings", "svd:0"), "--embeddings is keep"),
        (("--to", "sparse", "--embeddings", "svd:x"), "--embeddings is keep"),
        (("--to", "sparse", "--embeddings", "svd:4000"), "rank"),
        (
            ("--to", "dense", "--embeddings", "int8"),
            "--embeddings is for --to sparse, sliced, exits, lowrank, not dense",
        ),
        (("--samples", "0"), "--samples must be at least 1"),
        (("--to", "dense", "--data", "nowhere"), "nowhere"),
        ((), "no format given"),
        (("--plan", "--dtype", "int8"), "--dtype needs --to: it is for one format"),
    ],
)
def test_options_that_do_not_fit(pruned: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    assert message in refused(2, str(pruned), "-o", str(tmp_path / "out"), *options)
    assert not list(tmp_path.iterdir())


def test_the_place_of_the_command_is_no_place(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for place in (".", "./", "new/.."):
        said = refused(2, str(pruned), "--to", "sparse", "-o", place)
        assert "an export cannot take the place of" in said and "folder of its own" in said
    assert "is not empty" in refused(2, str(pruned), "--to", "sparse", "-o", "..")
    for place in (b"out\xff", b"new\xff/out"):
        assert "its name is not UTF-8" in refused(2, str(pruned), "--to", "dense", "-o", os.fsdecode(place))
    assert not list(Path.cwd().iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_an_empty_folder_is_a_free_place(pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    exported(pruned, tmp_path / "out", "--to", "sparse")
    assert (tmp_path / "out" / "export.json").is_file()
    said = refused(2, str(pruned), "--to", "sparse", "-o", str(tmp_path / "out"))
    assert "exists and is not empty" in said
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    exported(pruned, tmp_path / "link", "--to", "sparse")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target" / "export.json").is_file()


def test_a_threshold_is_for_scores(pruned: Path, tmp_path: Path) -> None:
    said = refused(2, str(pruned), "--to", "sparse", "--threshold", "0.1", "-o", str(tmp_path / "out"))
    assert "--threshold is for checkpoints of movement pruning" in said
    assert not list(tmp_path.iterdir())


def test_sliced_needs_a_known_family(tmp_path: Path) -> None:
    registry.write("gpt2", tmp_path / "model", TOKENIZERS)
    model = loading.load_dense(str(tmp_path / "model"), ("x", "y"), "classification", 1)
    artifact.save_artifact(model, tmp_path / "run", list(model.prunable()), {"source": {}})
    said = refused(2, str(tmp_path / "run"), "--to", "sliced", "-o", str(tmp_path / "out"))
    assert "gpt2 model, whose heads and neurons capcli does not know" in said
    assert "hint: use --to sparse for a smaller file, or --to onnx" in said
    assert not (tmp_path / "out").exists()
    exported(tmp_path / "run", tmp_path / "sparse", "--to", "sparse")


def test_a_dense_model(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    exported(pruned, tmp_path / "dense", "--to", "dense")
    assert "is already a dense model" in refused(
        2, str(tmp_path / "dense"), "--to", "dense", "-o", str(tmp_path / "again")
    )
    found = exported(tmp_path / "dense", tmp_path / "onnx", "--to", "onnx")
    assert found["check"]["exact"] and not found["notes"]  # it knows its task
    (tmp_path / "dense" / "export.json").unlink()
    found = exported(tmp_path / "dense", tmp_path / "other", "--to", "onnx")
    assert found["check"]["exact"] and "is not known" in found["notes"][0]


def test_data_that_moved(tiny: Tiny, tmp_path: Path) -> None:
    """The check goes on with built-in texts and says so; what needs the data does not."""
    shutil.copytree(tiny.data, tmp_path / "data")
    tiny.prune(tmp_path / "out", data=str(tmp_path / "data"), epochs=1, teacher_epochs=1)
    shutil.rmtree(tmp_path / "data")
    found = exported(tmp_path / "out", tmp_path / "sparse", "--to", "sparse", "--dtype", "fp16")
    assert found["metrics"] is None and "texts of mr" in found["notes"][0]
    assert "data" in refused(2, str(tmp_path / "out"), "--to", "sparse", "--vocab", "task", "-o", str(tmp_path / "no"))
    exported(tmp_path / "out", tmp_path / "given", "--to", "sparse", "--dtype", "fp16", "--data", tiny.data)


def changed(save: Callable[..., Any]) -> Callable[..., Any]:
    """A writer that changes one weight on the way."""

    def wrong(path: Path, tensors: Any, *rest: Any, **options: Any) -> Any:
        name = next(name for name in tensors if name.endswith("query.weight"))
        other = tensors[name].clone()
        other[0, 0] += 1.0
        return save(path, {**tensors, name: other}, *rest, **options)

    return wrong


@pytest.mark.parametrize(("to", "writer"), [("dense", (files, "write_tensors")), ("sparse", (writer, "save"))])
def test_a_file_that_is_not_what_was_meant(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, writer: tuple[Any, str]
) -> None:
    monkeypatch.setattr(*writer, changed(getattr(*writer)))
    said = refused(1, str(pruned), "--to", to, "-o", str(tmp_path / "out"))
    assert "differs from the model in 1 tensors" in said
    assert not list(tmp_path.iterdir())


def test_logits_that_differ(structured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last gate: whatever went wrong before, what computes otherwise is not kept."""
    honest = predict.running
    calls: list[int] = []

    def off(model: Model, on: Compute, pooling: str) -> predict.Run:
        calls.append(1)
        run, shift = honest(model, on, pooling), 0.01 * (len(calls) == 1)  # the original comes first
        return lambda inputs: (run(inputs)[0] + shift, None)

    monkeypatch.setattr(predict, "running", off)
    said = refused(1, str(structured), "--to", "sliced", "-o", str(tmp_path / "out"))
    assert "the logits of the export differ by up to 0.01" in said
    assert not list(tmp_path.iterdir())


def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports that do not take the time to measure latencies."""
    row = Timed(before_ms=1.0, ms=1.0, times=1.0, runs=1)
    speed = Speed(batch_1=row, batch_32=row, length=64, threads=1, hardware="none")

    def at_once(*_: Any) -> Generator[Any, None, Speed]:
        yield from ()
        return speed

    monkeypatch.setattr(checks, "_speed", at_once)


def converted(monkeypatch: pytest.MonkeyPatch, graph: Path, change: Callable[[Any], None] = lambda proto: None) -> None:
    """Conversion gives this graph, changed by `change`, and takes no time."""
    import onnx

    def convert(model: Model, folder: Path, length: int) -> Path:
        proto = onnx.load(graph)
        change(proto)
        files.write_bytes(folder / onnx_model.MODEL_FILE, proto.SerializeToString(deterministic=True))
        return folder / onnx_model.MODEL_FILE

    monkeypatch.setattr(onnx_model, "convert", convert)


def operations(monkeypatch: pytest.MonkeyPatch, fail_at: int) -> list[str]:
    """The operations on files from now on, as they come; the disk is full from that of number `fail_at` on."""
    seen: list[str] = []

    def hook(operation: str, path: Path) -> None:
        seen.append(f"{operation} {path.name}")
        if len(seen) > fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "fault_hook", hook)
    return seen


@pytest.mark.parametrize("to", OWN_WEIGHTS)
def test_a_full_disk_leaves_nothing(
    structured: Path, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """At each operation on files, one after the other; of what takes long at the first and the last."""
    options = ("--to", to, *(("--ratio", "0.2") if to == "lowrank" else ()))
    if to == "onnx":
        converted(monkeypatch, made("heads", "onnx") / "model.onnx")
    unmeasured(monkeypatch)
    seen = operations(monkeypatch, fail_at=1000)
    exported(structured, tmp_path / "out", *options)
    assert len(seen) > 15 and seen[-2:] == ["rename export.json", "rename out"]
    shutil.rmtree(tmp_path / "out")
    for place in (0, len(seen) - 1) if to in ("onnx", "exits", "lowrank") else range(len(seen)):
        operations(monkeypatch, fail_at=place)
        said = refused(3, str(structured), *options, "-o", str(tmp_path / "out"))
        assert "no space left" in said
        assert not list(tmp_path.iterdir()), seen[place]


@pytest.mark.parametrize("moment", ["write README.md", "rename export.json", "rename out"])
def test_a_folder_that_is_filled_meanwhile_is_not_replaced(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    out = tmp_path / "out"

    def hook(operation: str, path: Path) -> None:
        if moment == f"{operation} {path.name}":
            out.mkdir(exist_ok=True)
            (out / "mine").write_text("kept")

    monkeypatch.setattr(files, "fault_hook", hook)
    said = refused(2, str(pruned), "--to", "sparse", "-o", str(out))
    assert "out is not empty any more" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_file_that_takes_the_place_is_not_replaced(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(files, "fault_hook", lambda operation, path: path.name == "export.json" and out.touch())
    refused(2, str(pruned), "--to", "sparse", "-o", str(out))
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and out.is_file()


def test_a_signal_leaves_nothing(pruned: Path, tmp_path: Path) -> None:
    """It comes while the staging folder is being filled."""
    seen = tmp_path / "seen"

    def hook(operation: str, path: Path) -> None:
        if path.name == WEIGHTS and operation == "rename":
            seen.write_text(str(path.parent.is_dir()))
            os.kill(os.getpid(), signal.SIGTERM)

    def action() -> None:
        files.fault_hook = hook
        sys.exit(invoke("export", str(pruned), "--to", "sparse", "-o", str(tmp_path / "out")).exit_code)

    assert wait(forked(action)) == 75
    assert seen.read_text() == "True"
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]
