"""Exits: who leaves where, by slow loops; what is computed and what is not; files that lie; the command."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import registry
import torch
from tiny import WEIGHTS, Tiny, digest, invoke
from torch import Tensor

import capcli
from capcli.config.hardware import Hardware
from capcli.data.batches import Examples
from capcli.errors import CapError, ConfigError, ModelError
from capcli.exporting.exits import DROP, THRESHOLDS, Answers, best
from capcli.measuring import classifiers
from capcli.models import artifact, exits, families, hf, loading, predict
from capcli.models.exits import Exiting
from capcli.models.model import Exits, Model
from capcli.runtime import choice

FAMILIES = ["bert", "distilbert", "mpnet", "deberta-v2", "albert", "modernbert"]


def make(name: str, kind: str = "classification") -> Model:
    """A random classifier of four layers with random exits."""
    torch.manual_seed(0)
    depth = {"n_layers" if name == "distilbert" else "num_hidden_layers": 4}
    net = hf.auto_class(kind).from_config(registry.config_of(name, 50, num_labels=3, **depth)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    found = Exits(weight=torch.randn(3, 3, 16) * 3, bias=torch.randn(3, 3) * 0.1, threshold=0.7)
    family = families.FAMILIES.get(name)
    labels = ("x", "y", "z")
    return Model(net=net, tokenizer=None, family=family, labels=labels, kind=kind, source="folder", exits=found)


def batch(n: int = 8) -> dict[str, Tensor]:
    lengths = torch.arange(3, 3 + n)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(4, 50, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def slow_entropy(logits: list[float]) -> float:
    total = math.fsum(map(math.exp, logits))
    shares = [math.exp(x) / total for x in logits]
    return -math.fsum(p * math.log(p) for p in shares) / math.log(len(shares))


def slow_answers(model: Model, inputs: dict[str, Tensor], threshold: float) -> list[tuple[list[float], int]]:
    """Logits and layers of each text, which is asked by itself, without padding, layer after layer."""
    found = model.exits
    assert found is not None
    answers = []
    for ids, mask in zip(*inputs.values(), strict=True):
        real = ids[mask.bool()][None]
        with torch.no_grad():
            logits, _, states = predict.forward_states(model, {"input_ids": real, "attention_mask": real * 0 + 1})
        answer = (logits[0].tolist(), len(states) - 1)
        for layer in (3, 2, 1):
            vector = states[layer][0].mean(dim=0)
            vector = vector / vector.norm()
            told = (found.weight[layer - 1] @ vector + found.bias[layer - 1]).tolist()
            if slow_entropy(told) < threshold:
                answer = (told, layer)
        answers.append(answer)
    return answers


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_leave_where_the_slow_loop_says(name: str) -> None:
    """One by one and in a batch, whatever else is in it; some leave at each layer; the layers above are not run."""
    model, inputs = make(name), batch()
    exiting, ran = Exiting(model), []
    for block in families.blocks(model.net, model.family).values():
        block.register_forward_pre_hook(lambda module, args: ran.append(1))
    first = sorted(slow_entropy(logits) for logits, _ in slow_answers(model, inputs, 1.1))
    exiting.threshold = (first[3] + first[4]) / 2  # half of the texts leave at once
    expected = slow_answers(model, inputs, exiting.threshold)
    assert sorted(layers for _, layers in expected)[3:5] != [1, 1]
    whole = exiting(**inputs)
    assert whole.layers.tolist() == [layers for _, layers in expected]
    for row, (logits, layers) in enumerate(expected):
        ran.clear()
        real = inputs["attention_mask"][row].bool()
        alone = exiting(input_ids=inputs["input_ids"][row][real][None])
        assert alone.layers.tolist() == [layers]
        assert len(ran) == layers
        assert alone.logits[0].tolist() == pytest.approx(logits, abs=1e-4)
        assert whole.logits[row].tolist() == pytest.approx(logits, abs=1e-4)
    early = [row for row, (_, layers) in enumerate(expected) if layers < 4]
    ran.clear()
    last = max(expected[row][1] for row in early)
    assert exiting(**{key: value[early] for key, value in inputs.items()}).layers.tolist() == [
        expected[r][1] for r in early
    ]
    assert len(ran) == last


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_threshold_it_is_the_plain_model(name: str) -> None:
    """Bit for bit, also after passes that ended early."""
    model, inputs = make(name), batch()
    with torch.inference_mode():
        plain = predict.forward(model, inputs)[0]
    exiting = Exiting(model)
    exiting(**inputs)
    exiting.threshold = 0.0
    found = exiting(**inputs)
    assert torch.equal(found.logits, plain)
    assert found.layers.tolist() == [4] * 8
    exiting.threshold = 1.0
    assert exiting(**inputs).layers.tolist() == [1] * 8
    with torch.inference_mode():
        assert torch.equal(predict.forward(model, inputs)[0], plain)
        assert torch.equal(model.net(**inputs).logits, plain)


def test_costs_are_those_of_the_layers_that_were_computed() -> None:
    assert exits.costs(make("bert")).tolist() == exits.costs(make("albert")).tolist() == [0.25, 0.5, 0.75, 1.0]
    taken = torch.tensor([3, 0, 1, 4])
    assert exits.mean_layers(taken) == (3 * 1 + 1 * 3 + 4 * 4) / 8
    assert exits.mean_cost(taken, torch.tensor([0.1, 0.3, 0.8, 1.0])) == pytest.approx((0.3 + 0.8 + 4.0) / 8)


# Training and choosing -----------------------------------------------------------------------------------------------


def answers(n: int = 60) -> Answers:
    """Three layers with two labels, the later the better."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, n)
    sides = np.where(labels == 1, 1.0, -1.0)[:, None] * np.array([0.5, 1.0, 3.0]) + rng.normal(0, 1, (n, 3))
    logits = torch.from_numpy(np.stack([-sides, sides], axis=-1)).float()
    tokens, offsets = np.ones(n, dtype=np.int64), np.arange(n + 1)
    return Answers(
        logits=logits, examples=Examples(tokens=tokens, types=None, offsets=offsets, labels=labels, pad_id=0)
    )


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8, 1.0])
def test_the_first_sure_layer_answers(threshold: float) -> None:
    found = answers()
    logits, taken = found.at(threshold)
    counts, right = [0, 0, 0], 0
    for row, label in enumerate(found.examples.labels):
        index = next((i for i in (0, 1) if slow_entropy(found.logits[row, i].tolist()) < threshold), 2)
        counts[index] += 1
        assert logits[row].tolist() == found.logits[row, index].tolist()
        right += int(logits[row].argmax()) == label
    assert taken.tolist() == counts
    assert found.accuracy(threshold) == pytest.approx(right / 60)


def test_the_threshold_is_the_highest_up_to_which_all_are_good_enough() -> None:
    found = answers(400)
    chosen, least = best(found), found.accuracy(0.0) - DROP
    index = THRESHOLDS.index(chosen)
    assert 0 < index < len(THRESHOLDS) - 1
    assert all(found.accuracy(one) >= least - 1e-9 for one in THRESHOLDS[: index + 1])
    assert found.accuracy(THRESHOLDS[index + 1]) < least


def test_heads_learn_each_from_its_own_vectors() -> None:
    """The first vectors tell the label, the second nothing; the same seed gives the same bits."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    told = np.eye(3)[labels] + rng.normal(0, 0.1, (300, 3))
    vectors = np.stack([5 + 0.01 * told, rng.normal(0, 1, (300, 3))], axis=1).astype(np.float32)
    weight, bias = classifiers.heads(vectors, np.eye(3)[labels], 1)
    outputs = torch.einsum("bkh,kch->bkc", torch.from_numpy(vectors), weight) + bias
    right = (outputs.argmax(dim=-1) == torch.from_numpy(labels)[:, None]).float().mean(dim=0)
    assert right[0] > 0.95 and right[1] < 0.6
    assert all(map(torch.equal, classifiers.heads(vectors, np.eye(3)[labels], 1), (weight, bias)))


# Files and commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exits") / "out"
    result = invoke("export", str(pruned), "--to", "exits", "-o", str(out), "--threads", "1")
    assert result.exit_code == 0, result.stderr
    assert "layers per text" in result.stdout and "chosen" in result.stdout
    assert "exits are for one text at a time" in result.stderr
    return out


def test_what_is_written(pruned: Path, made: Path, tmp_path: Path) -> None:
    """Tensors, threshold, table and card; threshold 0 is the run, bit for bit; the same bytes again."""
    record = json.loads((made / "export.json").read_text())
    table, settings = record["exits"], json.loads((made / "cap_config.json").read_text())
    assert settings["exits"] == {"threshold": table["threshold"]}
    assert (table["layers"], table["train"], table["held_out"], table["seen"]) == (2, 64, 16, True)
    assert [row["threshold"] for row in table["rows"]] == list(THRESHOLDS)
    first = table["rows"][0]
    assert (first["layers"], first["macs"]) == (2.0, 1.0)
    run = json.loads((pruned / "report.json").read_text())
    assert first["value"] == run["metrics"]["pruned"]["accuracy"]
    layers = [row["layers"] for row in table["rows"]]
    assert layers == sorted(layers, reverse=True)
    row = next(row for row in table["rows"] if row["threshold"] == table["threshold"])
    assert record["metrics"]["after"]["accuracy"] == pytest.approx(row["value"])
    assert record["check"]["exact"] and record["check"]["largest_difference"] == 0.0
    card = (made / "README.md").read_text()
    assert "layers per text" in card and "which the model itself may have been trained on" in card
    stored = artifact.load_artifact(made).exits
    assert stored is not None and stored.weight.shape == (1, 2, 32)
    plain, exiting = capcli.load(pruned), capcli.load(made)
    inputs = {"input_ids": torch.randint(5, 20, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.int64)}
    exiting.threshold = 0.0
    assert torch.equal(exiting(**inputs).logits, plain(**inputs).logits)
    capcli.export(model=str(pruned), to="exits", out=str(tmp_path / "again"), threads=1)
    assert digest(tmp_path / "again" / WEIGHTS) == digest(made / WEIGHTS)


def test_cap_eval(pruned: Path, made: Path) -> None:
    """At its own threshold and at others; the plain model at 0; latency as for others."""
    plain = capcli.evaluate(model=str(pruned))
    found = {one: capcli.evaluate(model=str(made), exit_threshold=one) for one in ("", "0", "1")}
    assert found["0"]["metrics"] == plain["metrics"]
    assert (found["0"]["exits"]["layers"], found["0"]["exits"]["macs"], found["0"]["exits"]["of"]) == (2.0, 1.0, 2)
    assert (found["1"]["exits"]["layers"], found["1"]["exits"]["macs"]) == (1.0, 0.5)
    own = json.loads((made / "export.json").read_text())
    assert found[""]["metrics"]["accuracy"] == own["metrics"]["after"]["accuracy"]
    assert found[""]["exits"]["threshold"] == own["exits"]["threshold"]
    assert found[""]["latency"]["own_lengths"]["median_ms"] > 0
    assert any(note.startswith("exits below 1.00: texts took 1.00 of 2 layers") for note in found["1"]["notes"])
    assert "exits" not in plain


def test_labels_in_another_order(made: Path) -> None:
    """Exits follow the head."""
    names = artifact.load_artifact(made).labels
    ours, theirs = (
        choice.opened(str(made), "", Hardware(device="cpu"), labels=labels, kind="classification", exit_threshold=1.0)
        for labels in (names, names[::-1])
    )
    inputs = {"input_ids": torch.randint(5, 20, (4, 9)), "attention_mask": torch.ones(4, 9, dtype=torch.int64)}
    assert torch.equal(ours.run()(inputs)[0], theirs.run()(inputs)[0].flip(-1))


def test_what_learns_from_it_or_exports_it_takes_the_whole_model(made: Path, pruned: Path, tmp_path: Path) -> None:
    report = capcli.export(model=str(made), to="sparse", out=str(tmp_path / "sparse"), threads=1)
    assert any("the exits of the model are left out" in note for note in report["notes"])
    assert artifact.load_artifact(tmp_path / "sparse").exits is None
    assert digest(tmp_path / "sparse" / WEIGHTS) != digest(made / WEIGHTS)
    ours, theirs = (loading.load_model(str(one), None, "classification", 1) for one in (made, pruned))
    assert all(map(torch.equal, ours.net.state_dict().values(), theirs.net.state_dict().values()))


def test_exits_of_smaller_layers(made: Path, tmp_path: Path) -> None:
    capcli.export(model=str(made), to="sliced", out=str(tmp_path / "sliced"), threads=1)
    capcli.export(model=str(tmp_path / "sliced"), to="exits", out=str(tmp_path / "out"), threads=1)
    plain, exiting = capcli.load(tmp_path / "sliced"), capcli.load(tmp_path / "out")
    ids = torch.randint(5, 20, (4, 9))
    exiting.threshold = 0.0
    assert torch.equal(exiting(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_fine_tuned_model(tiny: Tiny, tmp_path: Path) -> None:
    """Not pruned, with the name of its task; `cap eval` then needs neither."""
    tiny.prune(tmp_path / "run", keep_work=True, epochs=1)
    teacher = tmp_path / "run" / "work" / "teacher"
    with pytest.raises(ConfigError, match="is not known") as caught:
        capcli.export(model=str(teacher), to="exits", out=str(tmp_path / "no"))
    assert "--task" in caught.value.hint
    chosen = {"task": "text-classification", "data": tiny.data}
    capcli.export(model=str(teacher), to="exits", out=str(tmp_path / "out"), threads=1, **chosen)
    found = capcli.evaluate(model=str(tmp_path / "out"), exit_threshold="0")
    assert (
        found["metrics"]["accuracy"]
        == json.loads((tmp_path / "run/report.json").read_text())["metrics"]["dense"]["accuracy"]
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threshold": math.nan}, "the threshold of the exits is not a number from 0 to 1"),
        ({"threshold": 1.5}, "the threshold of the exits is not a number from 0 to 1"),
        ({"threshold": "0.5"}, "the threshold of the exits is not a number from 0 to 1"),
        ([], "the threshold of the exits is not a number from 0 to 1"),
        (None, "2 left over: exits.bias, exits.weight"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(made: Path, tmp_path: Path, change: Any, said: str) -> None:
    shutil.copytree(made, tmp_path / "out")
    path = tmp_path / "out" / "cap_config.json"
    table = {name: value for name, value in json.loads(path.read_text()).items() if name != "exits"}
    path.write_text(json.dumps(table if change is None else {**table, "exits": change}))
    with pytest.raises(CapError, match=said):
        capcli.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found: {"weight": found.weight[:, :, :-1]}, "of another shape or dtype: exits.weight"),
        (lambda found: {"bias": found.bias.long()}, "of another shape or dtype: exits.bias"),
        (lambda found: {"weight": found.weight * math.nan}, "not finite, in 1 tensors, first exits.weight"),
    ],
)
def test_tensors_that_cannot_be(made: Path, tmp_path: Path, change: Callable[[Exits], Any], said: str) -> None:
    model, settings = artifact.load_artifact(made), artifact.stored_settings(str(made))
    assert model.exits is not None
    wrong = dataclasses.replace(model, exits=dataclasses.replace(model.exits, **change(model.exits)))
    artifact.save_artifact(wrong, tmp_path, list(model.prunable()), {"source": settings["source"]})
    with pytest.raises(CapError, match=said):
        capcli.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("bert", "regression", "is for regression, and exits are for models that choose one label"),
        ("bert", "tokens", "is for tokens"),
        ("bert", "spans", "is for spans"),
        ("bert", "multilabel", "is for multilabel"),
        ("llama", "classification", "a decoder: exits are for encoders"),
        ("bart", "classification", "whose layers capcli does not know: exits are for encoders"),
    ],
)
def test_models_in_which_exits_have_no_meaning(name: str, kind: str, said: str) -> None:
    net = hf.auto_class(kind).from_config(registry.config_of(name, 50))
    family = families.FAMILIES.get(name)
    with pytest.raises(ModelError, match=said):
        exits.check(Model(net=net, tokenizer=None, family=family, labels=(), kind=kind, source="folder"))


@pytest.mark.parametrize(("changes", "said"), [({"num_hidden_layers": 1}, "layer"), ({"num_labels": 1}, "label")])
def test_a_single_layer_or_label(changes: dict[str, int], said: str) -> None:
    net = hf.auto_class("classification").from_config(registry.config_of("bert", 50, **changes))
    family, kind = families.FAMILIES["bert"], "classification"
    with pytest.raises(ModelError, match=f"has a single {said}"):
        exits.check(Model(net=net, tokenizer=None, family=family, labels=(), kind=kind, source="folder"))


def test_what_is_refused(tiny: Tiny, pruned: Path, made: Path, tmp_path: Path) -> None:
    """One clear line each, and nothing is left."""
    out = ("-o", str(tmp_path / "out"))
    for code, said, *arguments in (
        (2, "has no exits", "eval", str(pruned), "--exit-threshold", "0.5"),
        (2, "--exit-threshold is a number from 0 to 1, got '2'", "eval", str(made), "--exit-threshold", "2"),
        (2, "--exit-threshold is a number from 0 to 1, got 'nan'", "eval", str(made), "--exit-threshold", "nan"),
        (2, "has exits, which only PyTorch computes", "eval", str(made), "--runtime", "sparse"),
        (2, "already has a task: text-classification", "export", str(pruned), "--to", "exits", "--task", "mr", *out),
        (2, "none", "export", str(pruned), "--to", "exits", "--data", str(tmp_path / "none"), *out),
    ):
        result = invoke(*arguments)
        assert (result.exit_code, result.stderr.count("error: ")) == (code, 1), result.stderr
        assert said in result.stderr.replace("\n", " ")
        assert not list(tmp_path.iterdir())
    with pytest.raises(ModelError, match="only PyTorch"):
        capcli.load(made, runtime="sparse")
