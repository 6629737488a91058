"""`cap probe`: frozen vectors, probes of every kind of task, baselines, gates, and what is kept on disk."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FILLERS, Tiny, invoke, write_csv

import capcli
from capcli.config.hardware import Hardware
from capcli.config.measure import Gates, ProbeConfig
from capcli.config.task import TaskConfig
from capcli.data import batches, cache, dataset, tokens
from capcli.data.splits import Split
from capcli.errors import ConfigError, FileError, RunFailed
from capcli.events import finished
from capcli.measuring import vectors
from capcli.models import loading

KINDS = {  # task: folder of `Tiny`, metric
    "text-classification": ("data", "accuracy"),
    "text-pair-classification": ("pairs", "accuracy"),
    "regression": ("numbers", "pearson"),
    "multi-label-classification": ("topics", "micro_f1"),
    "ner": ("tags", "f1"),
    "question-answering": ("answers", "f1"),
}


def settings(tiny: Tiny, task: str = "text-classification", **chosen: Any) -> ProbeConfig:
    base = {"model": tiny.model, "tasks": task, "data": getattr(tiny, KINDS[task][0]), "max_length": 32, "seeds": 2}
    return ProbeConfig(**{**base, "hardware": Hardware(threads=1), **chosen})


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model that knows the two classes of words."""
    out = tmp_path_factory.mktemp("trained") / "run"
    tiny.prune(out, sparsity=0.5)
    return out


# Vectors -------------------------------------------------------------------------------------------------------------


def encoder(source: str, layer: str = "last", pooling: str = "mean") -> vectors.Encoder:
    return vectors.Encoder(source=source, layer=layer, pooling=pooling, hardware=Hardware(threads=1), seed=1)


def split_of(tiny: Tiny, task: str = "text-classification") -> tuple[Split, TaskConfig]:
    source = TaskConfig(task=task, data=getattr(tiny, KINDS[task][0]), max_length=32)
    return dataset.load(source, train=False).evals["validation"], source


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_layers_are_the_hidden_states_of_the_plain_network(tiny: Tiny, pooling: str) -> None:
    split, source = split_of(tiny)
    found = finished(encoder(tiny.model, "all", pooling).vectors(split, source)).values
    model = loading.load_model(tiny.model, None, "classification", 1)
    texts = [text for chunk, _ in split.chunks() for text in chunk]
    for row, text in list(enumerate(texts))[:5]:
        with torch.no_grad():
            inputs = model.tokenizer(text, return_tensors="pt")
            states = model.net.base_model(**inputs, output_hidden_states=True).hidden_states
        assert len(states) == found.shape[1] == 3
        for layer, state in enumerate(states):
            wanted = state[0].mean(dim=0) if pooling == "mean" else state[0, 0]
            wanted = (wanted / wanted.norm()).numpy()
            assert found[row, layer] == pytest.approx(wanted, abs=2e-3)


def test_one_layer_is_that_of_all(tiny: Tiny) -> None:
    split, source = split_of(tiny)
    deep = finished(encoder(tiny.model, "all").vectors(split, source)).values
    for layer, name in enumerate(("0", "1", "2")):
        one = finished(encoder(tiny.model, name).vectors(split, source)).values
        assert (one[:, 0] == deep[:, layer]).all()
    last = finished(encoder(tiny.model).vectors(split, source)).values
    assert last[:, 0] == pytest.approx(deep[:, -1], abs=1e-3)


@pytest.mark.parametrize("task", ["ner", "question-answering"])
def test_each_token_has_its_vector(tiny: Tiny, task: str) -> None:
    split, source = split_of(tiny, task)
    found = finished(encoder(tiny.model).vectors(split, source))
    examples = found.examples
    assert examples is not None
    assert found.values.shape == (len(examples.tokens), 1, 32)
    model = loading.load_model(tiny.model, None, "classification", 1)
    batch = batches.collate(examples, np.array([3]), torch.device("cpu"))
    with torch.no_grad():
        states = model.net.base_model(**batch.inputs).last_hidden_state[0]
    wanted = torch.nn.functional.normalize(states, dim=-1).numpy()
    begin, end = examples.offsets[3:5]
    assert found.values[begin:end, 0] == pytest.approx(wanted, abs=2e-3)


def test_vectors_are_found_again_by_what_they_were_made_from(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, source = split_of(tiny)
    first = finished(encoder(tiny.model).vectors(split, source))
    copied = tmp_path / "another name"
    shutil.copytree(tiny.model, copied)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
        again = finished(encoder(str(copied)).vectors(split, source))
    assert again.key == first.key
    assert (again.values == first.values).all()
    keys = {
        first.key,
        encoder(tiny.model, "all").key(split, source),
        encoder(tiny.model, pooling="cls").key(split, source),
    }
    keys.add(encoder(tiny.model).key(split.take(np.arange(5)), source))
    keys.add(encoder(tiny.model).key(split, TaskConfig(task=source.task, data=source.data, max_length=16)))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 0.1}))
    keys.add(encoder(str(copied)).key(split, source))
    assert len(keys) == 6


def test_a_head_that_the_files_do_not_have_is_drawn_from_the_seed(tiny: Tiny) -> None:
    """So that its vectors are others with another seed, and no two splits come from different ones."""
    split, source = split_of(tiny)
    made = [
        vectors.Encoder(source=tiny.model, layer="last", pooling=pooling, hardware=Hardware(threads=1), seed=seed)
        for pooling in ("head", "mean")
        for seed in (1, 2)
    ]
    keys = [one.key(split, source) for one in made]
    assert keys[0] != keys[1] and keys[2] == keys[3]


def test_vectors_that_are_not_finite(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.model, tmp_path / "huge")
    path = tmp_path / "huge" / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "LayerNorm" in name:
            tensors[name] = torch.full_like(tensors[name], 3e38)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RunFailed, match="huge gives vectors that are not finite"):
        capcli.probe(settings(tiny, model=str(tmp_path / "huge")))


def test_vectors_that_are_too_many(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="of 80 texts or tokens would take"):
        capcli.probe(settings(tiny, pooling="cls", max_length=24))


def test_a_damaged_entry_is_made_anew(tiny: Tiny) -> None:
    split, source = split_of(tiny, "text-pair-classification")
    first = finished(encoder(tiny.model).vectors(split, source))
    entry = cache.cache_folder() / "vectors" / first.key / "values.bin"
    wanted = first.values.copy()
    del first
    entry.write_bytes(b"x" * entry.stat().st_size)
    assert (finished(encoder(tiny.model).vectors(split, source)).values == wanted).all()


# Probes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", KINDS)
def test_every_kind_of_task(tiny: Tiny, task: str) -> None:
    found = capcli.probe(settings(tiny, task))
    row = found["tasks"][task]
    assert row["metric"] == KINDS[task][1]
    assert (row["n_examples"], row["n_train"], row["split"]) == (48, 64, "validation")
    assert len(row["values"]) == 2
    assert row["mean"] == pytest.approx(sum(row["values"]) / 2)
    assert row["deviation"] == pytest.approx(np.std(row["values"], ddof=1))
    low, high = row["confidence_95"]
    assert low <= row["mean"] <= high
    assert found["mean"] == {"value": row["mean"], "confidence_95": row["confidence_95"]}


@pytest.mark.parametrize("kind", ["linear", "head"])
def test_what_the_encoder_learned_is_found(tiny: Tiny, trained: Path, kind: str) -> None:
    """The model was trained on these classes, so that its vectors tell them apart better than random ones."""
    found = capcli.probe(settings(tiny, model=str(trained), baseline=tiny.model, probe=kind))
    [baseline] = found["baselines"]
    assert found["tasks"]["text-classification"]["mean"] > 0.85
    difference = baseline["differences"]["text-classification"]
    theirs = baseline["tasks"]["text-classification"]["mean"]
    assert difference["value"] == pytest.approx(found["tasks"]["text-classification"]["mean"] - theirs)
    assert difference["confidence_95"][0] <= difference["value"] <= difference["confidence_95"][1]
    assert baseline["differences"]["mean"]["value"] == pytest.approx(difference["value"])


def test_the_same_model_differs_by_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """Both had the same examples and seeds, so that not even the interval is wide."""
    shutil.copytree(tiny.model, tmp_path / "twin")
    found = capcli.probe(settings(tiny, baseline=str(tmp_path / "twin")))
    [baseline] = found["baselines"]
    for difference in baseline["differences"].values():
        assert difference == {"value": 0, "confidence_95": [0, 0]}


def test_a_second_call_answers_the_same_without_the_model(
    tiny: Tiny, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tiny, model=str(trained), baseline=tiny.model, seeds=3)
    first = capcli.probe(config)
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert capcli.probe(config) == first


def test_without_a_cache_the_answer_is_the_same(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tiny)
    first = capcli.probe(config)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CAP_CACHE", str(tmp_path / "file"))
    assert capcli.probe(config) == first


def test_probes_of_all_layers(tiny: Tiny, trained: Path) -> None:
    found = capcli.probe(settings(tiny, model=str(trained), layer="all"))
    row = found["tasks"]["text-classification"]
    assert [one["layer"] for one in row["layers"]] == [0, 1, 2]
    assert row["layers"][-1]["mean"] == row["mean"]
    single = capcli.probe(settings(tiny, model=str(trained), layer="0"))
    assert single["tasks"]["text-classification"]["mean"] == row["layers"][0]["mean"]


def test_what_does_not_count_for_a_task_is_said(tiny: Tiny) -> None:
    found = capcli.probe(settings(tiny, "question-answering", pooling="cls"))
    row = found["tasks"]["question-answering"]
    assert (row["probe"], row["vector"]) == ("head", "token")
    assert any("--pool has no effect" in note for note in found["notes"])
    row = capcli.probe(settings(tiny))["tasks"]["text-classification"]
    assert (row["probe"], row["vector"], row["max_length"]) == ("linear", "mean", 32)


def test_a_head_learns_numbers_of_any_size(tiny: Tiny, tmp_path: Path) -> None:
    for split, n in (("train", 80), ("validation", 40)):
        words = [(i % 4) for i in range(n)]
        rows = [(" ".join(["good"] * k + ["film"] * (6 - k)), str(1000 + k)) for k in words]
        write_csv(tmp_path / "numbers" / f"{split}.csv", ("text", "label"), rows)
    found = capcli.probe(settings(tiny, "regression", data=str(tmp_path / "numbers"), probe="head"))
    assert found["tasks"]["regression"]["mean"] > 0.9


def test_no_interval_is_narrower_than_that_of_a_share(tiny: Tiny, tmp_path: Path) -> None:
    """All 40 right says no more than that of 40 all were right."""
    for split, n in (("train", 60), ("validation", 40)):
        rows = [(["bad bad bad bad", "good good good"][i % 2], str(i % 2)) for i in range(n)]
        write_csv(tmp_path / "easy" / f"{split}.csv", ("text", "label"), rows)
    row = capcli.probe(settings(tiny, data=str(tmp_path / "easy")))["tasks"]["text-classification"]
    assert row["mean"] == 1
    assert row["confidence_95"] == pytest.approx([0.912, 1], abs=0.001)


def test_tasks_of_one_size_are_resampled_on_their_own(tiny: Tiny, tmp_path: Path) -> None:
    """Two tasks that happen to hold the same: were they resampled alike, their mean would vary as each of them does."""
    for task in ("mr", "subj"):
        for split, n in (("train", 60), ("validation", 60)):
            rows = [(f"a {FILLERS[i % 16]} film {i}", str(i * i // 7 % 2)) for i in range(n)]
            write_csv(tmp_path / task / f"{split}.csv", ("text", "label"), rows)
    found = capcli.probe(settings(tiny, data=str(tmp_path), tasks="mr,subj"))
    one, other = found["tasks"]["mr"], found["tasks"]["subj"]
    assert one["values"] == other["values"]
    widths = [row["confidence_95"][1] - row["confidence_95"][0] for row in (one, other, found["mean"])]
    assert widths[2] < 0.85 * min(widths[:2])


def test_seeds_draw_other_training_examples(tiny: Tiny) -> None:
    found = capcli.probe(settings(tiny, "regression", seeds=4))
    assert len(set(found["tasks"]["regression"]["values"])) > 1
    assert capcli.probe(settings(tiny, "regression", seeds=1))["tasks"]["regression"]["deviation"] is None


def test_a_set_without_test_examples_is_divided(tiny: Tiny, tmp_path: Path) -> None:
    rows = [(f"a {word} film number {i}", str(i % 2)) for i, word in enumerate(["bad", "good"] * 50)]
    write_csv(tmp_path / "data" / "train.csv", ("text", "label"), rows)
    row = capcli.probe(settings(tiny, data=str(tmp_path / "data")))["tasks"]["text-classification"]
    assert (row["split"], row["n_examples"], row["n_train"]) == ("holdout", 20, 64)


def test_probe_chooses_a_length_as_the_other_commands_do(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("--max-train-samples", "20", "--max-eval-samples", "20", "--threads", "1", "--json")
    lengths: list[int] = []
    real = tokens.encode

    def spied(split: Any, tokenizer: Any, length: int, **options: Any) -> Any:
        lengths.append(length)
        return real(split, tokenizer, length, **options)

    monkeypatch.setattr(tokens, "encode", spied)
    result = invoke("probe", str(trained), "--tasks", "mr", *few, "--max-length", "0")
    assert result.exit_code == 0, result.stderr
    assert lengths == [64, 64]  # all that the model takes, of 128


# Baselines and gates -------------------------------------------------------------------------------------------------


def test_an_earlier_result_is_a_baseline(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    earlier = capcli.probe(settings(tiny))
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(earlier))
    gates = Gates(min_retention=0.5, max_drop="mean=0.9")
    found = capcli.probe(settings(tiny, model=str(trained), baseline=str(path), gates=gates))
    [baseline] = found["baselines"]
    row, theirs = found["tasks"]["text-classification"], earlier["tasks"]["text-classification"]
    assert baseline["model"] == f"…/{path.name}"
    difference = baseline["differences"]["text-classification"]
    assert difference["value"] == pytest.approx(row["mean"] - theirs["mean"])
    widths = [one["confidence_95"][1] - one["confidence_95"][0] for one in (row, theirs, difference)]
    assert widths[2] == pytest.approx(np.hypot(widths[0], widths[1]), rel=0.2)  # as if they were independent
    assert found["passed"] and len(found["gates"]) == 2


def test_a_probe_is_compared_with_guessing(tiny: Tiny, trained: Path, tmp_path: Path) -> None:
    found = capcli.probe(settings(tiny, model=str(trained), layer="all"))
    labels = [line.rsplit(",", 1)[1] for line in (Path(tiny.data) / "validation.csv").read_text().splitlines()[1:]]
    share = max(labels.count("positive"), labels.count("negative")) / len(labels)
    row = found["tasks"]["text-classification"]
    assert row["chance"] == found["chance"] == pytest.approx(share) and row["at_chance"] is False
    assert not [note for note in found["notes"] if "guessing" in note]
    row |= {"mean": 0.5, "confidence_95": [0.4, 0.6], "layers": None}
    path = tmp_path / "guessing.json"
    path.write_text(json.dumps({**found, "layer": "last", "mean": {"value": 0.5, "confidence_95": [0.4, 0.6]}}))
    again = capcli.probe(settings(tiny, model=str(trained), baseline=str(path), gates=Gates(min_retention=0.1)))
    [gate], [baseline] = again["gates"], again["baselines"]
    why = f"the baseline's value is 0.5, no better than guessing ({share:.6g})"
    assert not gate["passed"] and gate["message"] == f"retention of mean has no meaning: {why}"
    assert baseline["tasks"]["text-classification"]["at_chance"] is True
    said = f"text-classification (accuracy 0.5000, chance {share:.4f})"
    assert f"…/guessing.json: no better than guessing on {said}" in again["notes"]


def test_a_model_that_knows_nothing_is_named(tiny: Tiny, tmp_path: Path) -> None:
    """Labels that do not depend on the texts."""
    texts = [f"{a} {b}" for a in FILLERS for b in FILLERS][:64]
    for split, offset in (("train", 0), ("validation", 1)):
        rows = [(text, ("a", "b")[(index * index + offset) // 3 % 2]) for index, text in enumerate(texts)]
        write_csv(tmp_path / f"{split}.csv", ("text", "label"), rows)
    found = capcli.probe(settings(tiny, data=str(tmp_path)))
    row = found["tasks"]["text-classification"]
    assert row["at_chance"] is True and row["confidence_95"][0] <= row["chance"]
    assert [note for note in found["notes"] if "no better than guessing on text-classification (accuracy" in note]


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "no result": (lambda _: {"a": 1}, FileError, "not a result of cap probe"),
    "a list": (lambda _: [1], FileError, "not a result of cap probe"),
    "another task": (lambda found: {**found, "tasks": {"mr": {}}}, ConfigError, "has no probe of text-classification"),
    "another layer": (lambda found: {**found, "layer": "0"}, ConfigError, "made with --layer 0, not last"),
    "another probe": (lambda found: {**found, "probe": "head"}, ConfigError, "made with --probe head, not linear"),
    "other examples": (
        lambda found: {**found, "tasks": {name: {**row, "n_examples": 7} for name, row in found["tasks"].items()}},
        ConfigError,
        "n_examples of text-classification is 7, here 48",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_file_that_is_no_baseline(tiny: Tiny, tmp_path: Path, fault: str) -> None:
    change, error, message = REFUSED[fault]
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(change(capcli.probe(settings(tiny)))))
    with pytest.raises(error, match=message):
        capcli.probe(settings(tiny, baseline=str(path)))


@pytest.mark.parametrize(
    ("gates", "passed"),
    [
        ({"min": "mean=0"}, True),
        ({"min": "text-classification=0.05,mean=0.05"}, True),
        ({"max": "mean=0.01"}, False),
        ({"max_bytes": 10}, False),
        ({"max_bytes": 10**9}, True),
        ({"max_latency_ms": 1e6}, True),
        ({"max_latency_ms": 1e-6}, False),
        ({"max": "mean=0.01", "confidence": 0.95}, False),
    ],
)
def test_gates(tiny: Tiny, gates: dict[str, Any], passed: bool) -> None:
    found = capcli.probe(settings(tiny, gates=Gates(**gates)))
    assert found["passed"] is passed, found["gates"]


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"min": "mean=80"}, "--min mean=80 can never pass"),
        ({"min": "accuracy=0.5"}, "unknown metric 'accuracy'"),  # not a task
    ],
)
def test_a_gate_whose_outcome_is_known_is_refused(
    tiny: Tiny, gates: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "Encoder", None)
    with pytest.raises(ConfigError, match=message):
        capcli.probe(settings(tiny, gates=Gates(**gates)))


def test_a_gate_that_knows_the_noise(tiny: Tiny) -> None:
    value, (low, high) = (lambda row: (row["value"], row["confidence_95"]))(capcli.probe(settings(tiny))["mean"])
    limit = value + (high - value) / 2
    strict = capcli.probe(settings(tiny, gates=Gates(min=f"mean={limit}")))
    lenient = capcli.probe(settings(tiny, gates=Gates(min=f"mean={limit}", confidence=0.95)))
    assert low < value < limit < high
    assert (strict["passed"], lenient["passed"]) == (False, True)
    assert "not beyond the noise" in lenient["gates"][0]["message"]


# Refusals ------------------------------------------------------------------------------------------------------------


def test_a_layer_that_is_not_there(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="has layers 0 to 2, but no layer 3"):
        capcli.probe(settings(tiny, layer="3"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "-1"}, "--layer is last, all or a number"),
        ({"layer": "first"}, "--layer is last, all or a number"),
        ({"pooling": "head", "layer": "0"}, "--pool head"),
        ({"probe": "mlp"}, "unknown probe 'mlp'"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"tasks": " , "}, "no task given"),
        ({"gates": Gates(max_drop="mean=0.1")}, "--max-drop compares"),
    ],
)
def test_what_cannot_be_asked(tiny: Tiny, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tiny, **options)
