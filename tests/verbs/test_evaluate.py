"""`cap eval`: changed texts, other data, calibration, and the comparison with a baseline, on the tiny model."""

import csv
import html
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SETTINGS, WEIGHTS, Tiny, invoke, write_csv, write_jsonl

import capcli
from capcli.artifact import reader, writer
from capcli.config.export import ExportConfig
from capcli.data.perturb import Change
from capcli.measuring import answers, metrics, noise, scoring
from capcli.measuring.scoring import Measured

FAST = ("--threads", "1", "--latency-length", "8", "--json", "-q")
NAMES = ("accuracy", "macro_f1")


def evaluated(model: Path | str, *more: str, code: int = 0) -> dict[str, Any]:
    result = invoke("eval", str(model), *FAST, *more)
    assert result.exit_code == code, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


# Parts ---------------------------------------------------------------------------------------------------------------


def measured(outputs: np.ndarray, truth: np.ndarray, names: Sequence[str] = NAMES, kind: str = "classification") -> Any:
    return Measured(
        metrics=metrics.measure(kind, names, truth, outputs),
        confidence_95=metrics.intervals(kind, names, truth, outputs, 1),
        n_examples=len(truth),
        kind=kind,
        truth=truth,
        outputs=outputs,
        seed=1,
    )


ABC = ("a", "b", "c")


@pytest.mark.parametrize(
    ("kind", "labels", "truth", "outputs", "answer"),
    [
        ("classification", ABC, [0, 2], [[0, 1, 0], [-1, 3, 2]], "'b'"),
        ("classification", ABC, [0, 2], [[0, 1, 0], [3, -1, 2]], ""),
        ("classification", ABC, [1, 1], [[0, 1, 0], [-1, 3, 2]], ""),  # nothing else is true
        ("multilabel", ABC, [[0, 1, 1], [0, 0, 1]], [[1, -1, 2], [3, -2, 1]], "'a', 'c'"),
        ("multilabel", ABC, [[0, 1, 1], [0, 0, 1]], [[-1, -1, -2], [-3, -2, -1]], "no label"),
        ("multilabel", ABC, [[0, 1, 1], [0, 0, 1]], [[1, -1, 2], [-3, -2, 1]], ""),
        ("regression", ("score",), [0.0, 2.0], [[1.5], [1.5000001]], "1.5"),
        ("regression", ("score",), [0.0, 2.0], [[1.5], [1.6]], ""),
        ("regression", ("score",), [2.0, 2.0], [[1.5], [1.5]], ""),
        ("tokens", ("O", "B-x"), [["O", "B-x"], ["O"]], [["O", "O"], ["O"]], "'O'"),
        ("tokens", ("O", "B-x"), [["O", "B-x"], ["O"]], [["O", "O"], ["B-x"]], ""),
        ("spans", (), [["the end"], []], ["", ""], "no answer"),
        ("spans", (), [["the end"], ["x"]], ["x", "x"], "'x'"),
        ("spans", (), [["the end"], ["x"]], ["x", "the"], ""),
    ],
)
def test_the_same_answer_to_everything(kind: str, labels: Any, truth: Any, outputs: Any, answer: str) -> None:
    if kind in ("classification", "multilabel", "regression"):
        truth, outputs = np.array(truth), np.array(outputs, dtype=float)
    assert answers.constant(kind, labels, truth, outputs) == answer


@pytest.fixture(scope="module")
def dumb(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head puts out one class, `positive`."""
    out = tmp_path_factory.mktemp("dumb") / "model"
    shutil.copytree(pruned, out)
    tensors = reader.load(pruned / WEIGHTS)
    tensors["classifier.weight"].zero_()
    tensors["classifier.bias"].copy_(torch.tensor([0.0, 1.0]))
    kept = [entry.name for entry in reader.inspect(pruned / WEIGHTS) if entry.kept is not None]
    writer.save(out / WEIGHTS, tensors, kept)
    return out


def test_what_was_not_read_and_models_that_guess_are_in_every_document(dumb: Path, tmp_path: Path) -> None:
    """One text is too long, most words are unknown, and the head puts out one class."""
    rows = [("GRAND FINALE", "positive"), ("MEH " * 30, "negative"), ("a bad film", "negative")]
    write_csv(tmp_path / "data" / "validation.csv", ("text", "label"), rows)
    documents = [str(tmp_path / name) for name in ("page.html", "table.md")]
    more = ("--html", documents[0], "--markdown", documents[1], "--data", str(tmp_path / "data"))
    found = evaluated(dumb, *more, "--baseline", str(dumb))
    said = [
        "longer than 16 tokens, so their ends were truncated: 1 of 3 texts of validation",
        "unknown to the tokenizer: 84.21 % of the tokens of validation",
        "the model and the baseline are no better than guessing on validation: accuracy 0.3333 (always 'positive') and "
        "0.3333 (always 'positive'), chance 0.6667",
    ]
    assert sum("guessing" in note for note in found["notes"]) == 1
    assert found["chance"] == {"accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx(0.4)}
    assert found["at_chance"] == found["baseline"]["at_chance"] == ["accuracy", "macro_f1"] and found["retention"] == {}
    notes = "\n".join(found["notes"])
    pages = [html.unescape(Path(name).read_text()).replace("\\", "") for name in documents]
    for note in said:
        assert note in notes
        assert all(note in page for page in pages)
    table = invoke("eval", str(dumb), *FAST[:-2], "--data", str(tmp_path / "data"), "-q").stdout
    table = " ".join(table.split())
    assert all(note in table for note in said[:2]), table
    alone = "accuracy 0.3333 (always 'positive'), chance 0.6667"
    assert f"note: the model is no better than guessing on validation: {alone}" in table, table
    assert "accuracy 0.3333 0.6667 [0.0614, 0.7924]" in table  # Wilson's of 1 in 3


def test_estimates_have_the_intervals_of_the_metrics_at_every_level() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 60)
    one = measured(rng.normal(size=(60, 2)) + np.eye(2)[truth], truth)
    for name, found in one.estimates().items():
        assert found.value == one.metrics[name]
        assert found.interval(0.95) == one.confidence_95[name]
        expected = metrics.intervals("classification", (name,), truth, one.outputs, 1, 0.8)[name]
        assert found.interval(0.8) == expected != one.confidence_95[name]


def test_paired_comparisons_know_that_the_examples_are_the_same() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 300)
    theirs = rng.normal(size=(300, 2)) + 2 * np.eye(2)[truth]
    ours = np.where(rng.random(300)[:, None] < 0.1, theirs[:, ::-1], theirs)  # other answers to one in ten
    a, b = measured(ours, truth), measured(theirs, truth)
    differences, ratios = scoring.paired(a, b)
    right = [one.argmax(axis=1) == truth for one in (ours, theirs)]
    each = right[0].astype(float) - right[1].astype(float)
    low, high = differences["accuracy"].interval(0.95) or [1, 0]
    assert differences["accuracy"].value == pytest.approx(each.mean())
    assert [low, high] == pytest.approx(each.mean() + 1.96 * each.std() / math.sqrt(300) * np.array([-1, 1]), abs=0.006)
    apart = noise.difference(a.estimates()["accuracy"], b.estimates()["accuracy"]).interval(0.95) or [0, 0]
    assert high - low < 0.7 * (apart[1] - apart[0])
    assert ratios["accuracy"].value == pytest.approx(right[0].mean() / right[1].mean())
    low, high = ratios["accuracy"].interval(0.95) or [1, 0]
    assert low < ratios["accuracy"].value < high <= 1.02
    same = scoring.paired(a, a)
    assert [found["accuracy"].interval(0.95) for found in same] == [[0, 0], [1, 1]]


def test_a_ratio_to_what_may_be_zero_has_no_interval() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 40)
    guesses, good = rng.normal(size=(40, 2)), rng.normal(size=(40, 2)) + 2 * np.eye(2)[truth]
    near = next(
        g
        for g in (rng.normal(size=(40, 2)) for _ in range(99))
        if 0 < measured(g, truth, ("matthews",)).metrics["matthews"] < 0.1
    )
    _, ratios = scoring.paired(measured(good, truth, ("matthews",)), measured(near, truth, ("matthews",)))
    assert ratios["matthews"].value > 5 and ratios["matthews"].interval(0.95) is None
    constant = np.tile([1.0, 0.0], (40, 1))
    assert scoring.paired(measured(guesses, truth, ("matthews",)), measured(constant, truth, ("matthews",)))[1] == {}


def test_agreement_has_the_interval_of_its_share() -> None:
    truth = np.arange(10) % 2
    ours, theirs = np.eye(2)[truth], np.eye(2)[np.r_[truth[:8], 1 - truth[8:]]]
    found = scoring.agreed(measured(ours, truth), measured(theirs, truth))
    assert found.value == 0.8 and found.interval(0.95) == metrics.wilson(8, 10)
    numbers = measured(np.arange(9.0)[:, None], np.arange(9.0), ("pearson",), "regression")
    assert math.isnan(scoring.agreed(numbers, numbers).value)


# Changed texts -------------------------------------------------------------------------------------------------------


def test_changed_texts_are_measured_as_a_file_of_them_would_be(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    found = evaluated(pruned, "--perturb", "typos,order", "--seed", "4")
    plain = evaluated(pruned, "--seed", "4")
    assert found["metrics"] == plain["metrics"] and plain["perturbed"] == {}
    assert list(found["perturbed"]) == ["typos", "order"]
    rows = rows_of(Path(tiny.data) / "validation.csv")
    for name, ours in found["perturbed"].items():
        changed = [(Change(name=name, seed=4).of(text, i, 0), label) for i, (text, label) in enumerate(rows)]
        assert sum(a[0] != b[0] for a, b in zip(changed, rows, strict=True)) > len(rows) / 2
        write_csv(tmp_path / name / "validation.csv", ("text", "label"), changed)
        theirs = evaluated(pruned, "--data", str(tmp_path / name), "--seed", "4")
        assert ours["metrics"] == theirs["metrics"]
        assert ours["confidence_95"] == theirs["confidence_95"]
        difference = ours["differences"]["accuracy"]
        assert difference["value"] == pytest.approx(ours["metrics"]["accuracy"] - plain["metrics"]["accuracy"])
        assert difference["confidence_95"][0] <= difference["value"] <= difference["confidence_95"][1]
    # The class hangs on one word, wherever it stands; a misspelt one is unknown.
    assert found["perturbed"]["typos"]["agreement"] < 0.95
    assert found["perturbed"]["typos"]["differences"]["accuracy"]["value"] < 0


def test_an_uncased_model_does_not_see_capitals(pruned: Path) -> None:
    found = evaluated(pruned, "--perturb", "case")
    ours = found["perturbed"]["case"]
    assert ours["metrics"] == found["metrics"] and ours["agreement"] == 1
    assert {json.dumps(row) for row in ours["differences"].values()} == {'{"value": 0.0, "confidence_95": [0.0, 0.0]}'}


@pytest.mark.parametrize(
    ("gate", "code"),
    [
        (("--min", "accuracy@case=0.1"), 0),
        (("--max", "accuracy@case=0"), 1),
        (("--max", "ece@case=1"), 0),
        (("--min", "agreement@case=1"), 0),
        (("--min", "agreement=1", "--baseline", "SELF"), 0),
        (("--max-drop", "accuracy@case=0", "--baseline", "SELF"), 0),
        (("--max-drop", "accuracy@case=0%", "--baseline", "SELF"), 0),
    ],
)
def test_gates_on_what_is_measured_beside_the_metrics(pruned: Path, gate: tuple[str, ...], code: int) -> None:
    chosen = [str(pruned) if text == "SELF" else text for text in gate]
    (row,) = evaluated(pruned, "--perturb", "case", *chosen, code=code)["gates"]
    assert row["passed"] is (code == 0)


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        (("--min", "accuracy=80"), ("--min accuracy=80 can never pass", "did you mean 0.80 or 80%?")),
        (("--min", "accuracy=1.01"), ("can never pass: accuracy is between 0 and 1",)),
        (("--min", "accuracy=-0.1"), ("can never fail",)),
        (("--max", "ece=5"), ("--max ece=5 can never fail", "did you mean 0.05 or 5%?")),
        (("--max", "accuracy=-1"), ("can never pass",)),
        (("--max-drop", "accuracy=2", "--baseline", "SELF"), ("can never fail", "did you mean 0.02 or 2%?")),
        (("--max-drop", "accuracy=1", "--baseline", "SELF"), ("can never fail", "did you mean 0.01 or 1%?")),
        (("--max-drop", "accuracy=100%", "--baseline", "SELF"), ("--max-drop accuracy=100% can never fail",)),
        (("--max-drop", "accuracy=-1.5", "--baseline", "SELF"), ("can never pass",)),
        (("--max-drop", "ece=0.1", "--baseline", "SELF"), ("no drop of 'ece' is measured",)),
        (("--min-retention", "90", "--baseline", "SELF"), ("--min-retention 90 can never pass", "0.90 or 90%?")),
        (("--max-bytes", "0"), ("--max-bytes 0 sets no limit",)),
        (("--min", "acc=0.5"), ("unknown metric 'acc'", "did you mean accuracy?")),
        (("--min", "acuracy=0.1"), ("unknown metric 'acuracy'", "did you mean accuracy?")),
        (("--min", "accuracy>=0.5"), ("--min needs METRIC=NUMBER",)),
        (("--min", "accuracy@typos=0.1"), ("unknown metric 'accuracy@typos'", "hint: add --perturb typos")),
        (("--min", "agreement=0.1"), ("unknown metric 'agreement'", "--baseline")),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_gate_whose_outcome_is_known_is_refused_before_anything_is_measured(
    pruned: Path, tmp_path: Path, gates: tuple[str, ...], said: tuple[str, ...]
) -> None:
    junit = tmp_path / "gates.xml"
    chosen = [str(pruned) if text == "SELF" else text for text in gates]
    result = invoke("eval", str(pruned), *FAST[:-1], *chosen, "--junit", str(junit))
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    assert all(text in result.stderr for text in said), result.stderr
    assert "latency" not in result.stderr and 'errors="1"' in junit.read_text()


@pytest.fixture(scope="module")
def tagger(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tagger") / "out"
    tiny.prune(out, task="ner", data=tiny.tags, max_length=32)
    return out


def test_words_with_labels_have_no_other_order(tiny: Tiny, tagger: Path) -> None:
    found = evaluated(tagger, "--perturb", "all", "--baseline", str(tagger))
    assert list(found["perturbed"]) == ["typos", "case"]
    assert [note for note in found["notes"] if note.startswith("not measured: order")]
    assert found["perturbed"]["case"]["agreement"] == 1 > found["perturbed"]["typos"]["agreement"] > 0
    assert found["perturbed"]["typos"]["metrics"]["f1"] < found["metrics"]["f1"]
    assert found["agreement"] == 1 and "ece" not in found["metrics"]


def test_questions_are_changed_and_regressions_have_no_agreement(tiny: Tiny, tmp_path: Path) -> None:
    tasks = {"question-answering": tiny.answers, "regression": tiny.numbers, "multi-label-classification": tiny.topics}
    for task, data in tasks.items():
        tiny.prune(tmp_path / task, task=task, data=data, max_length=32, epochs=1, teacher_epochs=3)
        found = evaluated(tmp_path / task, "--perturb", "all")
        assert list(found["perturbed"]) == ["typos", "case", "order"]
        assert found["perturbed"]["case"]["metrics"] == found["metrics"], "an uncased model"
        for row in found["perturbed"].values():
            assert (row["agreement"] is None) == (task == "regression")
            assert set(row["differences"]) == set(found["metrics"])


# Calibration ---------------------------------------------------------------------------------------------------------


def test_ece_is_that_of_the_probabilities_of_the_stock_model(tiny: Tiny, pruned: Path) -> None:
    rows = rows_of(Path(tiny.data) / "validation.csv")
    net, tokenizer = capcli.load(pruned), capcli.load_tokenizer(pruned)
    truth = np.array([["negative", "positive"].index(label) for _, label in rows])
    with torch.inference_mode():
        inputs = [tokenizer(text, return_tensors="pt") for text, _ in rows]
        shares = torch.cat([net(**one).logits for one in inputs]).double().softmax(dim=1).numpy()
    confidence, right = shares.max(axis=1), shares.argmax(axis=1) == truth
    bins = np.digitize(confidence, np.arange(1, 15) / 15)
    gaps = [abs((right[bins == i] - confidence[bins == i]).sum()) for i in range(15)]
    found = evaluated(pruned)
    assert list(found["metrics"])[-1] == "ece" and "ece" not in found["confidence_95"]
    assert found["metrics"]["ece"] == pytest.approx(sum(gaps) / len(rows), abs=1e-4)
    assert found["splits"]["validation"]["metrics"] == found["metrics"]


# Guessing ------------------------------------------------------------------------------------------------------------


def test_what_guessing_scores_is_beside_every_metric(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    labels = [label for _, label in rows_of(Path(tiny.data) / "validation.csv")]
    share = max(labels.count("positive"), labels.count("negative")) / len(labels)
    documents = {name: tmp_path / f"a.{name}" for name in ("html", "markdown", "csv")}
    found = evaluated(pruned, *(text for name, path in documents.items() for text in (f"--{name}", str(path))))
    assert found["chance"] == {"accuracy": pytest.approx(share), "macro_f1": pytest.approx(share / (1 + share))}
    assert found["at_chance"] == [] and not [note for note in found["notes"] if "guessing" in note]
    assert found["splits"]["validation"]["chance"] == found["chance"]
    rows = list(csv.DictReader(documents["csv"].open(encoding="utf-8")))
    chances = {row["name"]: row["chance"] for row in rows if row["kind"] == "metric"}
    assert chances == {**{name: repr(value) for name, value in found["chance"].items()}, "ece": ""}
    shown = f"| accuracy | {found['metrics']['accuracy']:.4f} | {share:.4f} |"
    assert shown in documents["markdown"].read_text().replace("\\", "")
    assert f"chance {share:.4f}" in documents["html"].read_text()
    assert "Chance: what the best answer that is the same for all examples scores." in documents["html"].read_text()
    assert json.loads((pruned / "report.json").read_text())["metrics"]["chance"] == found["chance"]


@pytest.mark.parametrize("stored", [False, True])
def test_a_share_of_what_guessing_scores_passes_no_gate(pruned: Path, dumb: Path, tmp_path: Path, stored: bool) -> None:
    result = evaluated(dumb)
    (tmp_path / "dumb.json").write_text(json.dumps(result))
    baseline = str(tmp_path / "dumb.json") if stored else str(dumb)
    accuracy, chance = result["metrics"]["accuracy"], result["chance"]["accuracy"]
    for gate in (("--min-retention", "0.1"), ("--max-drop", "accuracy=50%")):
        found = evaluated(pruned, "--baseline", baseline, *gate, "--junit", str(tmp_path / "gates.xml"), code=1)
        (row,) = found["gates"]
        said = f"has no meaning: the baseline's value is {accuracy:.6g}, no better than guessing ({chance:.6g})"
        assert row["value"] is None and row["message"].endswith(said)
        assert html.escape(said).replace("&#x27;", "'") in (tmp_path / "gates.xml").read_text()
        assert found["retention"] == {} and found["baseline"]["at_chance"] == ["accuracy", "macro_f1"]
        assert [note for note in found["notes"] if note.startswith("the baseline is no better than guessing")]
    assert evaluated(pruned, "--baseline", baseline, "--max-drop", "accuracy=0.01")["passed"], "a difference has one"


def test_two_stored_results_have_the_same_rule(pruned: Path, dumb: Path, tmp_path: Path) -> None:
    for name, model in (("old", dumb), ("new", pruned)):
        (tmp_path / f"{name}.json").write_text(json.dumps(evaluated(model)))
    both = ("eval", "--compare", str(tmp_path / "old.json"), str(tmp_path / "new.json"), "--json", "-q")
    result = invoke(*both, "--min-retention", "0.5")
    assert result.exit_code == 1
    assert "no better than guessing" in json.loads(result.stdout)["gates"][0]["message"]
    again = invoke(*both[:2], *both[3:1:-1], *both[4:], "--min-retention", "0.1")
    assert again.exit_code == 0, "the other way round the old result is a model that learned"


# The baseline --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worse(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned less."""
    out = tmp_path_factory.mktemp("worse") / "out"
    tiny.prune(out, **{**SETTINGS, "epochs": 1, "teacher_epochs": 1, "sparsity": 0.9})
    return out


def test_a_model_differs_from_itself_in_nothing(pruned: Path) -> None:
    found = evaluated(pruned, "--baseline", str(pruned), "--perturb", "typos")
    assert found["agreement"] == 1
    names = found["metrics"].keys() - {"ece"}
    assert found["differences"].keys() == names | {f"{name}@typos" for name in names}
    assert {json.dumps(row) for row in found["differences"].values()} == {'{"value": 0.0, "confidence_95": [0.0, 0.0]}'}
    assert found["baseline"]["metrics"] == found["metrics"]
    assert found["baseline"]["confidence_95"] == found["confidence_95"]
    assert found["baseline"]["perturbed"]["typos"]["metrics"] == found["perturbed"]["typos"]["metrics"]
    assert set(found["retention"].values()) == {1.0} and "ece" not in found["retention"]


def test_a_model_and_its_report_differ_by_as_much_but_the_report_is_less_sure(
    pruned: Path, worse: Path, tmp_path: Path
) -> None:
    report = tmp_path / "worse.json"
    theirs = evaluated(worse, "--perturb", "typos")
    report.write_text(json.dumps(theirs))
    model = evaluated(pruned, "--baseline", str(worse), "--perturb", "typos")
    assert 0 < model["agreement"] < 1
    for path in (report, worse / "report.json"):
        stored = evaluated(pruned, "--baseline", str(path), "--perturb", "typos")
        assert stored["agreement"] is None
        assert stored["baseline"]["confidence_95"] == theirs["confidence_95"]
        assert set(stored["differences"]) == (
            set(model["differences"]) if path == report else {n for n in model["differences"] if "@" not in n}
        )
        for name, row in stored["differences"].items():
            assert row["value"] == pytest.approx(model["differences"][name]["value"])
            wide, narrow = row["confidence_95"], model["differences"][name]["confidence_95"]
            assert wide[0] < row["value"] < wide[1]
            assert wide[1] - wide[0] > 0.8 * (narrow[1] - narrow[0])
        assert stored["retention"] == model["retention"]
        assert not [note for note in stored["notes"] if "exact" in note]


def test_a_report_without_intervals_counts_as_exact_and_the_result_says_so(pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "published.json"
    path.write_text('{"metrics": {"accuracy": 0.5, "other": 1, "macro_f1": null}, "flag": true}')
    found = evaluated(pruned, "--baseline", str(path))
    assert found["baseline"]["metrics"] == {"accuracy": 0.5, "other": 1.0}
    own = found["confidence_95"]["accuracy"]
    assert found["differences"]["accuracy"]["confidence_95"] == pytest.approx([own[0] - 0.5, own[1] - 0.5])
    assert any("has no intervals for accuracy" in note for note in found["notes"])


def test_noise_excuses_a_fall_that_is_none(pruned: Path, worse: Path, tmp_path: Path) -> None:
    ours, theirs = evaluated(pruned), evaluated(worse)
    assert ours["metrics"]["accuracy"] > theirs["metrics"]["accuracy"] + 0.1, "else the test says nothing"
    path = tmp_path / "slightly.json"
    row = {"accuracy": ours["metrics"]["accuracy"] + 0.01}
    path.write_text(json.dumps({"metrics": row, "confidence_95": ours["confidence_95"]}))
    gate = ("--max-drop", "accuracy=0.005", "--baseline", str(path))
    evaluated(pruned, *gate, code=1)
    evaluated(pruned, *gate, "--confidence", "0.95", code=0)
    evaluated(worse, "--max-drop", "accuracy=0.005", "--baseline", str(pruned), "--confidence", "0.9", code=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "bad.json contains a list, not a JSON object"),
        ('"x"', "bad.json contains a text, not a JSON object"),
        ("{}", "bad.json contains no metrics"),
        ('{"metrics": {"accuracy": null}}', "bad.json contains no metrics"),
        ('{"metrics": 3}', "bad.json: metrics is the number 3, not a JSON object"),
        ('{"metrics": {"accuracy": true}}', "bad.json: metrics.accuracy is true, not a number"),
        ('{"metrics": {"pruned": []}}', "bad.json: metrics.pruned is a list, not a JSON object"),
        (
            '{"metrics": {"accuracy": 0.5}, "confidence_95": {"accuracy": [0.4]}}',
            "bad.json: confidence_95.accuracy is a list, not a list of 2",
        ),
        ('{"schema_version": 2, "metrics": {"accuracy": 0.5}}', "bad.json has schema_version 2, this cap reads 1"),
        ('{"schema_version": "1", "metrics": {}}', "bad.json: schema_version is a text, not a number from 1 on"),
    ],
)
def test_a_report_that_is_none_is_one_line(pruned: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    result = invoke("eval", str(pruned), *FAST, "--baseline", str(tmp_path / "bad.json"))
    assert result.exit_code == 2 and said in result.stderr
    assert result.stderr.count("error: ") == result.stderr.count("hint: ") == 1 and "measuring" not in result.stderr


def test_a_baseline_whose_labels_do_not_fit_is_refused_before_anything_is_measured(
    tiny: Tiny, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pruned, tmp_path / "other")
    table = json.loads((pruned / "cap_config.json").read_text())
    (tmp_path / "other" / "cap_config.json").write_text(json.dumps({**table, "labels": ["left", "right"]}))
    shutil.copytree(pruned, tmp_path / "tags")
    (tmp_path / "tags" / "cap_config.json").write_text(json.dumps({**table, "kind": "tokens"}))
    baselines = {
        "other": "(left, right) are not those of the task",
        "tags": "was pruned for tokens, not for classification",
        tiny.model: "are not those of the task",
    }

    def never(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("capcli.verbs.evaluate.load_for", never)
    for baseline, expected in baselines.items():
        result = invoke("eval", str(pruned), *FAST, "--baseline", str(tmp_path / baseline))
        assert result.exit_code == 2 and expected in result.stderr


def test_answers_that_are_no_numbers_pass_no_gate(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    """Finite weights whose logits overflow: the highest of NaN would be the first class, which may be right."""
    capcli.export(ExportConfig(model=str(pruned), to="dense", out=str(tmp_path / "dense"), threads=1))
    path = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.startswith("classifier") or "pooler" in name:
            tensors[name] = torch.full_like(tensor, 3e38) * tensor.sign()
    save_file(tensors, path, metadata={"format": "pt"})
    data = ("--task", "text-classification", "--data", tiny.data)
    gates = ("--min", "accuracy=0,agreement=0", "--max-drop", "accuracy=0", "--baseline", str(tmp_path / "dense"))
    found = evaluated(tmp_path / "dense", *data, *gates, code=1)
    assert (found["metrics"]["accuracy"], found["agreement"]) == (None, None)
    assert [gate["passed"] for gate in found["gates"]] == [False] * 3


def test_latency_has_an_interval(pruned: Path) -> None:
    speed = evaluated(pruned)["latency"]
    low, high = speed["confidence_95"]
    assert speed["p10_ms"] <= low <= speed["median_ms"] <= high <= speed["p90_ms"]


def test_a_baseline_is_timed_in_turn_and_a_stored_result_is_not(pruned: Path) -> None:
    found = evaluated(pruned, "--baseline", str(pruned))
    ours, theirs = found["latency"], found["baseline"]["latency"]
    assert ours.keys() == theirs.keys() and ours != theirs, "two measurements"
    assert [one["own_lengths"]["texts"] for one in (ours, theirs)] == [found["n_examples"]] * 2
    assert [(one["length"], one["throughput"]["texts"]) for one in (ours, theirs)] == [(8, 32)] * 2
    assert "latency" not in evaluated(pruned, "--baseline", str(pruned / "report.json"))["baseline"]


# Other data ----------------------------------------------------------------------------------------------------------


def others_note(found: dict[str, Any]) -> list[str]:
    return [note for note in found["notes"] if "other data than those of the run" in note]


def test_other_data_are_named_and_those_of_the_run_are_not(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    assert others_note(evaluated(pruned)) == []
    rows = rows_of(Path(tiny.data) / "validation.csv")
    write_csv(tmp_path / "validation.csv", ("text", "label"), [tuple(row) for row in rows])
    assert others_note(evaluated(pruned, "--data", tiny.data + "/")) == []
    (note,) = others_note(evaluated(pruned, "--data", str(tmp_path)))
    assert f"…/{tmp_path.name}" in note and f"…/{Path(tiny.data).name}" in note


def test_labels_of_other_data_are_matched_by_name(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    """In another case and order, and as codes that the table names the other way round."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = rows_of(Path(tiny.data) / "validation.csv")
    plain = evaluated(pruned)
    write_csv(tmp_path / "case" / "validation.csv", ("text", "label"), [(t, label.upper()) for t, label in rows[::-1]])
    found = evaluated(pruned, "--data", str(tmp_path / "case"))
    assert found["metrics"]["accuracy"] == plain["metrics"]["accuracy"]
    names = ["positive", "negative"]
    features = {"label": {"names": names, "_type": "ClassLabel"}, "text": {"dtype": "string", "_type": "Value"}}
    table = pa.table({"text": [t for t, _ in rows], "label": [names.index(label) for _, label in rows]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (tmp_path / "codes").mkdir()
    parquet.write_table(table, tmp_path / "codes" / "validation.parquet")
    found = evaluated(pruned, "--data", str(tmp_path / "codes"))
    assert found["metrics"] == plain["metrics"] and found["labels"] == ["negative", "positive"]


def test_labels_of_other_data_that_are_called_otherwise(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    rows = rows_of(Path(tiny.data) / "validation.csv")
    plain = evaluated(pruned)
    for name, codes in {"words": ("bad one", "good one"), "numbers": ("1", "0")}.items():
        table = dict(zip(("negative", "positive"), codes, strict=True))
        write_csv(tmp_path / name / "validation.csv", ("text", "label"), [(t, table[label]) for t, label in rows])
        result = invoke("eval", str(pruned), *FAST, "--data", str(tmp_path / name))
        assert result.exit_code == 2, "what a number stands for in other data is not known"
        assert codes[1] in result.stderr and "--label-map" in result.stderr
        mapped = f"negative={codes[0]},positive={codes[1]}"
        found = evaluated(pruned, "--data", str(tmp_path / name), "--label-map", mapped)
        assert found["metrics"] == plain["metrics"] and found["labels"] == list(codes)
        mapped = f"{codes[0]}=negative,{codes[1]}=positive"
        found = evaluated(pruned, "--data", str(tmp_path / name), "--label-map", mapped)
        assert found["metrics"] == plain["metrics"] and found["labels"] == ["negative", "positive"]


def test_tags_of_other_data_may_be_fewer(tiny: Tiny, tagger: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "validation.jsonl", [{"tokens": ["good", "film"], "ner_tags": ["B-positive", "O"]}] * 5)
    assert evaluated(tagger, "--data", str(tmp_path))["n_examples"] == 5
