"""Every family and kind of task from end to end: prune, re-open, evaluate, export; and that its groups are closed."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import registry
import torch
from registry import ROWS
from tiny import SOURCES, TOKENIZERS, WEIGHTS, Tiny, digest, write_csv, write_jsonl

import capcli
from capcli.config.export import ExportConfig
from capcli.config.measure import EvalConfig
from capcli.config.task import TaskConfig
from capcli.data import dataset, tokens
from capcli.errors import ConfigError, ModelError
from capcli.models import artifact, families, loading, predict
from capcli.models.model import Model, accepted_inputs, pooling_of
from capcli.pruning import structures, topk

STRUCTURED = [name for name, row in ROWS.items() if row.structured]
Folder = Callable[[str], Path]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Makes the folder of a tiny model of a family, once."""

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        registry.write(name, folder, TOKENIZERS)
        return folder

    return make


def prune(tiny: Tiny, folder: Path, out: Path, kind: str, **chosen: Any) -> dict[str, Any]:
    task, data = SOURCES[kind]
    short = {"epochs": 1, "teacher_epochs": 1, "sparsity": 0.7, "max_length": 32, "max_train_samples": 40}
    source = {"task": task, "data": getattr(tiny, data), "stride": 8, "max_eval_samples": 24}
    return tiny.prune(out, model=str(folder), **{**source, **short, **chosen})


def test_the_registry_has_every_family() -> None:
    assert {name for name, row in ROWS.items() if row.structured} == set(families.FAMILIES)
    assert set(SOURCES) == set(registry.KINDS)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_vector_is_pre_trained_where_the_table_says_so(family: Folder, tmp_path: Path, name: str) -> None:
    """Of a checkpoint as it comes from pre-training, every new head has the same vectors exactly where it is."""
    import transformers

    row = families.FAMILIES[name]
    causal, masked = transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM
    kind = causal if row.causal else masked if name == "modernbert" else transformers.AutoModelForPreTraining
    torch.manual_seed(0)
    kind.from_config(transformers.AutoConfig.from_pretrained(family(name))).save_pretrained(tmp_path)
    for file in family(name).iterdir():
        if not (tmp_path / file.name).exists():
            shutil.copy(file, tmp_path)
    vectors = []
    for seed in (1, 2):
        model = loading.load_dense(str(tmp_path), ("x", "y"), "classification", seed)
        batch = dict(model.tokenizer(["a good film", "the dull story"], padding=True, return_tensors="pt"))
        model.net.eval()
        with torch.no_grad():
            vectors.append(predict.forward(model, batch)[1])
    assert torch.equal(*vectors) is row.pretrained_vector


@pytest.mark.parametrize(("name", "pooling"), [("bert", "head"), ("roberta", "cls")])
def test_pooling_follows_the_family(tiny: Tiny, family: Folder, tmp_path: Path, name: str, pooling: str) -> None:
    """Banks and student: the run that names the pooling writes the same bytes."""
    for out, chosen in (("auto", {}), (pooling, {"pooling": pooling})):
        prune(tiny, family(name), tmp_path / out, "classification", method="cap-m", epochs=2, **chosen)
    assert digest(tmp_path / "auto" / WEIGHTS) == digest(tmp_path / pooling / WEIGHTS)
    assert families.pooling_of(None, "auto") == "head"
    encoder = loading.load_dense(str(family(name)), None, "embedding", 1)
    assert [pooling_of(encoder, chosen) for chosen in ("auto", "cls")] == ["head", "cls"]


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, row in ROWS.items() for kind in row.kinds])
def test_prune_load_eval_export(tiny: Tiny, family: Folder, tmp_path: Path, name: str, kind: str) -> None:
    report = prune(tiny, family(name), tmp_path / "out", kind)
    found = report["sparsity"]
    assert found["kept_weights"] == topk.kept_count(0.7, found["prunable_weights"])
    model = artifact.load_artifact(tmp_path / "out")
    assert sum(int(linear.weight.count_nonzero()) for linear in model.prunable().values()) == found["kept_weights"]
    assert sum(linear.weight.numel() for linear in model.prunable().values()) == found["prunable_weights"]

    source = TaskConfig(**artifact.stored_source(str(tmp_path / "out")))
    baseline = str(family(name)) if kind == "embedding" else ""  # which some of its metrics compare with
    again = capcli.evaluate(EvalConfig(source=source, model=str(tmp_path / "out"), baseline=baseline))
    assert report["metrics"]["pruned"].items() <= again["metrics"].items()
    assert all(-1 <= value <= 1 for value in again["metrics"].values())
    low_high = again["confidence_95"][again["primary"]]
    assert low_high[0] <= again["metrics"][again["primary"]] <= low_high[1]

    capcli.export(ExportConfig(model=str(tmp_path / "out"), to="dense", out=str(tmp_path / "dense")))
    texts = ["a good film", "the dull story was rather long"]
    batch = dict(model.tokenizer(texts, padding=True, return_tensors="pt"))
    with torch.no_grad():
        ours = predict.forward(model, batch)[0]
        theirs = plain_logits(tmp_path / "dense", kind, batch)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)  # one output is summed in another order
    assert not torch.allclose(ours[0], ours[1], atol=1e-7)


def plain_logits(folder: Path, kind: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of transformers' own class in the folder, by its name in config.json, without capcli."""
    import transformers

    class_name = json.loads((folder / "config.json").read_text())["architectures"][0]
    net = getattr(transformers, class_name).from_pretrained(folder).eval()
    heads = {"tokens": "ForTokenClassification", "spans": "ForQuestionAnswering", "embedding": "Model"}
    assert heads.get(kind, "ForSequenceClassification") in class_name
    out = net(**{key: value for key, value in batch.items() if key in accepted_inputs(net)})
    if kind == "embedding":
        return torch.stack(
            [row[real.bool()].mean(0) for row, real in zip(out[0], batch["attention_mask"], strict=True)]
        )
    if kind == "spans":
        return torch.stack([out.start_logits, out.end_logits], dim=-1)
    return torch.as_tensor(out.logits)


@pytest.mark.parametrize("kind", ["classification", "tokens"])
def test_a_decoder_is_pruned_on_data_with_empty_texts(tiny: Tiny, family: Folder, tmp_path: Path, kind: str) -> None:
    """Its tokenizer puts nothing around a text, so that nothing is left of an empty one."""
    task, data = SOURCES[kind][0], str(tmp_path / "set")
    for split in ("train", "validation"):
        if kind == "classification":
            header, *rows = csv.reader((Path(tiny.data) / f"{split}.csv").open())
            emptied = [("" if i % 4 == 0 else text, label) for i, (text, label) in enumerate(rows)]
            write_csv(tmp_path / "set" / f"{split}.csv", (header[0], header[1]), emptied)
        else:
            lines = [json.loads(line) for line in (Path(tiny.tags) / f"{split}.jsonl").read_text().splitlines()]
            lines[::4] = [{"tokens": [], "ner_tags": []}] * len(lines[::4])
            write_jsonl(tmp_path / "set" / f"{split}.jsonl", lines)
    report = prune(tiny, family("qwen2"), tmp_path / "out", kind, data=data, max_eval_samples=0)
    assert report["status"] == "complete"
    assert report["metrics"]["n_examples"] == 48
    model = artifact.load_artifact(tmp_path / "out")
    split = dataset.load(TaskConfig(task=task, data=data)).evals["validation"]
    lengths = tokens.encode(split, model.tokenizer, 32).lengths
    assert (lengths == 1).sum() >= 12 and lengths.min() == 1
    again = capcli.evaluate(EvalConfig(source=TaskConfig(task=task, data=data, max_length=32), model=model.source))
    assert report["metrics"]["pruned"].items() <= again["metrics"].items()
    assert all(math.isfinite(value) for value in again["metrics"].values())


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_pruning(tiny: Tiny, family: Folder, tmp_path: Path, name: str) -> None:
    report = prune(tiny, family(name), tmp_path / "out", "classification", method="cap-f", sparsity=0.5, epochs=2)
    found, model = report["sparsity"], artifact.load_artifact(tmp_path / "out")
    plan = structures.Heads(layers=model.layers(), linears={}, final=0.5).plan(0.5)
    assert found["kept_weights"] == plan.kept_weights
    alive = 0
    for layer in model.layers():
        for units in (layer.heads, layer.neurons):
            kept = [unit for unit in range(units.count) if any(slice_of(slot, unit).any() for slot in units.slots)]
            assert kept
            alive += len(kept) * units.weights
    assert alive == plan.kept_weights


@pytest.mark.parametrize("name", STRUCTURED)
def test_structured_pruning_by_dimensions(tiny: Tiny, family: Folder, tmp_path: Path, name: str) -> None:
    """95 % of the weights are gone, in whole units; those that stay are as many as planned."""
    settings = {"method": "first-order", "structure": "dimensions", "sparsity": 0.95, "epochs": 2}
    report = prune(tiny, family(name), tmp_path / "out", "classification", **settings)
    model, kept = artifact.load_artifact(tmp_path / "out"), report["sparsity"]["kept_weights"]
    layers = model.layers()
    found = [
        (units, [any(slice_of(slot, unit).any() for slot in units.slots) for unit in range(units.count)])
        for layer in layers
        for units in structures.kinds(layer)
    ]
    assert sum(units.weights * sum(alive) for units, alive in found) == kept
    largest = max(units.weights for units, _ in found)
    assert abs(kept - topk.kept_count(0.95, report["sparsity"]["prunable_weights"])) <= largest / 2
    if len({units.weights for units, _ in found}) == 1:
        table = structures.unit_table(layers)
        assert kept == structures.Dimensions(layers=layers, linears={}, table=table).weights(0.95)
    assert sum(int(linear.weight.count_nonzero()) for linear in model.prunable().values()) == kept


def slice_of(slot: families.Slot, unit: int) -> torch.Tensor:
    return slot.linear.weight.detach().narrow(slot.axis, slot.start + unit * slot.size, slot.size)


@pytest.mark.parametrize("name", STRUCTURED)
@torch.no_grad()
def test_what_removed_heads_and_neurons_compute_reaches_nothing(family: Folder, name: str) -> None:
    """With its output columns zero, nothing else in a unit matters; a unit that is there does matter."""
    torch.manual_seed(1)
    model = loading.load_dense(str(family(name)), ("x", "y"), "classification", 1)
    batch = dict(model.tokenizer(["a good film", "the dull story"], padding=True, return_tensors="pt"))
    picks = ("heads", "neurons", "value_output") if ROWS[name].dimensions else ("heads", "neurons")
    for pick in picks:
        for index, layer in enumerate(model.layers()):
            units, unit = getattr(layer, pick), 1
            before = predict.forward(model, batch)[0]
            slice_of(units.slots[-1], unit).zero_()
            after = predict.forward(model, batch)[0]
            assert not torch.equal(before, after), (pick, index)
            for slot in units.slots[:-1]:
                assert slot.axis == 0
                slice_of(slot, unit).add_(torch.randn(1))
            assert torch.allclose(predict.forward(model, batch)[0], after, atol=1e-6), (pick, index)


def check_query_key(model: Model) -> None:
    """With its rows zero, a query-key unit adds the same to all places a token looks at, whatever its biases."""
    batch = dict(model.tokenizer(["a good film", "the dull story"], padding=True, return_tensors="pt"))
    for index, layer in enumerate(model.layers()):
        units, unit = layer.query_key, 1
        assert units is not None
        before = predict.forward(model, batch)[0]
        for slot in units.slots:
            assert slot.axis == 0
            slice_of(slot, unit).zero_()
        after = predict.forward(model, batch)[0]
        assert not torch.equal(before, after), index
        for slot in units.slots:
            if slot.linear.bias is not None:
                slot.linear.bias[unit] += 0.5
        assert torch.allclose(predict.forward(model, batch)[0], after, atol=1e-6), index


@pytest.mark.parametrize("name", [name for name in STRUCTURED if ROWS[name].dimensions])
@torch.no_grad()
def test_what_removed_query_key_units_compute_reaches_nothing(family: Folder, name: str) -> None:
    check_query_key(loading.load_dense(str(family(name)), ("x", "y"), "classification", 1))


@pytest.mark.parametrize("name", STRUCTURED)
def test_dimensions_are_those_of_the_heads(family: Folder, name: str) -> None:
    for layer in loading.load_dense(str(family(name)), ("x", "y"), "classification", 1).layers():
        if not ROWS[name].dimensions:
            assert layer.query_key is layer.value_output is None
            assert structures.kinds(layer) == [layer.heads, layer.neurons]
            continue
        assert layer.query_key is not None
        assert layer.value_output is not None
        assert layer.query_key.count == layer.value_output.count == 16
        own = layer.query_key.weights + layer.value_output.weights
        assert layer.heads.weights == own * 16 // layer.heads.count
        assert {slot.linear for slot in layer.heads.slots} == {
            slot.linear for units in (layer.query_key, layer.value_output) for slot in units.slots
        }


@pytest.mark.parametrize("name", STRUCTURED)
def test_units_share_out_every_prunable_weight(family: Folder, name: str) -> None:
    model = loading.load_dense(str(family(name)), ("x", "y"), "classification", 1)
    for kinds in (lambda layer: [layer.heads, layer.neurons], structures.kinds):
        counted = {id(linear): torch.zeros_like(linear.weight) for linear in model.prunable().values()}
        for layer in model.layers():
            for units in kinds(layer):
                for slot in units.slots:
                    counted[id(slot.linear)].narrow(slot.axis, slot.start, slot.size * units.count).add_(1)
        assert all(torch.equal(times, torch.ones_like(times)) for times in counted.values())
        in_units = sum(u.count * u.weights for layer in model.layers() for u in kinds(layer))
        assert in_units == sum(times.numel() for times in counted.values())


HIDDEN = [(name, "classification") for name in ROWS] + [("bert", kind) for kind in SOURCES if kind != "classification"]


@pytest.mark.parametrize(("name", "kind"), HIDDEN)
def test_hidden_states_teach_every_family_and_kind(
    tiny: Tiny, family: Folder, tmp_path: Path, name: str, kind: str
) -> None:
    losses = "kd,hid" if kind == "embedding" else "ce,kd,hid"
    report = prune(tiny, family(name), tmp_path / "out", kind, method="magnitude", losses=losses)
    found = [row["losses"]["hid"] for row in report["history"] if row["phase"] == "prune"]
    assert found
    assert all(0 <= value < 100 for value in found)
    assert found[-1] > 0


def test_deberta_with_projections_of_its_own_for_positions(tmp_path: Path) -> None:
    row = dataclasses.replace(ROWS["deberta-v2"], config={**ROWS["deberta-v2"].config, "share_att_key": False})
    from transformers import AutoModel

    vocabulary = TOKENIZERS["words"](tmp_path)
    AutoModel.from_config(registry.config_of("deberta-v2", vocabulary, **row.config)).save_pretrained(tmp_path)
    model = loading.load_dense(str(tmp_path), ("x", "y"), "classification", 1)
    assert sum("pos_key_proj" in path or "pos_query_proj" in path for path in model.prunable()) == 4
    layer = model.layers()[0]
    assert layer.heads.weights == 6 * 4 * 16
    assert layer.query_key is not None
    assert layer.value_output is not None
    assert (layer.query_key.weights, layer.value_output.weights) == (4 * 16, 2 * 16)
    with torch.no_grad():
        check_query_key(model)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.structured])
def test_a_family_outside_the_table_is_pruned_without_structure_only(
    tiny: Tiny, family: Folder, tmp_path: Path, name: str
) -> None:
    model = loading.load_dense(str(family(name)), ("x", "y"), "classification", 1)
    assert f"{name} is not in capcli's table of families" in model.notes[-1]
    inside = {path.removesuffix(".weight") for path in model.prunable()}
    linears = {p for p, m in model.net.base_model.named_modules() if families.is_linear(m)}
    assert {path.removeprefix(f"{model.net.base_model_prefix}.") for path in inside} == linears
    with pytest.raises(ConfigError, match="whose heads and neurons capcli does not know") as caught:
        prune(tiny, family(name), tmp_path / "out", "classification", method="cap-f", sparsity=0.5)
    assert "cap-soft" in caught.value.hint


UNKNOWN = [name for name, row in ROWS.items() if not row.structured]


@pytest.mark.parametrize("kind", ["classification", "tokens", "spans"])
@torch.no_grad()
def test_the_vector_of_a_family_outside_the_table_is_the_mean(family: Folder, kind: str) -> None:
    """It may be causal, and then the first token knows nothing of what follows."""
    model = loading.load_dense(str(family("gpt2")), ("x", "y"), kind, 1)
    batch = dict(model.tokenizer(["the dull story was rather long", "the film"], padding=True, return_tensors="pt"))
    assert batch["input_ids"][0, 0] == batch["input_ids"][1, 0]
    vectors = predict.forward(model, batch)[1]
    states = model.net.base_model(**batch).last_hidden_state
    for vector, own, mask in zip(vectors, states, batch["attention_mask"], strict=True):
        assert torch.allclose(vector, own[mask.bool()].mean(0), atol=1e-6)
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-3)
    first = predict.forward(model, batch, "cls")[1]
    assert torch.allclose(first[0], first[1], atol=1e-6)
    assert torch.equal(first, states[:, 0])


@pytest.mark.parametrize("name", UNKNOWN)
def test_the_note_on_a_family_outside_the_table_says_how_much_is_prunable(family: Folder, name: str) -> None:
    model = loading.load_dense(str(family(name)), ("x", "y"), "classification", 1)
    inside = {n: p for n, p in model.net.base_model.named_parameters() if re.search(r"(^|\.)(h|layers?)\.\d+\.", n)}
    linear = sum(weight.weight.numel() for weight in model.prunable().values())
    share = f"{100 * linear / sum(p.numel() for p in inside.values()):.0f}%"
    if name == "gpt2":  # matrices of 16x48, 16x16, 16x24 and 24x16; then their biases and two norms
        assert share == f"{100 * 1792 / (1792 + 48 + 16 + 24 + 16 + 2 * 32):.0f}%" == "91%"
    assert model.notes[-1].endswith(
        f"the linear layers of its blocks are pruned, which hold {share} of the weights of the blocks"
    )


def test_a_family_without_a_head_of_the_kind_is_refused(family: Folder) -> None:
    with pytest.raises(ModelError, match="transformers has no head of this kind for"):
        loading.load_dense(str(family("bart")), ("x", "y"), "tokens", 1)
