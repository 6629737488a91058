"""The boundary to transformers, on tiny random checkpoints of every family."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import registry
import safetensors.torch
import torch
from tiny import write_byte_tokenizer
from torch import nn

from capcli import families, files, models, sparse, tables, tasks, tokens
from capcli.config import Hardware
from capcli.errors import CapError, ConfigError, FileError, ModelError

Make = Callable[..., Path]
FAMILIES = tuple(families.FAMILIES)
ABC = ("alpha", "beta", "gamma")
CPU = models.Compute(device=torch.device("cpu"), dtype=torch.float32)


def load(folder: Path, labels: tuple[str, ...] | None = None, **options: Any) -> models.Model:
    return models.load_dense(
        str(folder), labels, options.pop("kind", "classification"), options.pop("seed", 1), **options
    )


def inputs(tokenizer: Any, net: Any = None) -> dict[str, torch.Tensor]:
    coded = tokenizer(["a good film", "dull"], ["really", "and much too long"], padding=True, return_tensors="pt")
    return {name: value for name, value in coded.items() if net is None or name in models._accepted(net)}


def edited(folder: Path, target: Path, **values: Any) -> Path:
    """A copy of a checkpoint with other values in its config.json."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return target


# Families ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_forward_gives_the_logits_of_transformers(checkpoint: Make, tokenizer: Any, family: str) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = checkpoint(family, ABC)
    model, plain = load(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = inputs(tokenizer, plain)
    logits, vector = models.forward(model, inputs(tokenizer))
    expected = plain(**batch, output_hidden_states=True)
    assert torch.equal(logits, expected.logits)
    assert not torch.allclose(logits[0], logits[1])
    assert torch.equal(models._output(model.net)[1](vector), logits)  # the vector is what enters the classifier
    states = expected.hidden_states[-1]
    last = batch["attention_mask"].sum(1) - 1
    summary = states[torch.arange(2), last] if model.family.causal else states[:, 0]
    assert torch.equal(models.forward(model, batch, "cls")[1], summary)
    mean = models.forward(model, batch, "mean")[1]
    for i in range(2):
        assert torch.allclose(mean[i], states[i][batch["attention_mask"][i].bool()].mean(0), atol=1e-6)
    assert all(torch.equal(models.forward(model, batch, pooling)[0], logits) for pooling in ("cls", "mean"))


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "electra"])
def test_prunable_are_the_six_matrices_of_each_layer(checkpoint: Make, family: str) -> None:
    model = load(checkpoint(family))
    prunable = model.prunable()
    parameters = dict(model.net.named_parameters())
    assert len(prunable) == 12
    assert sum(linear.weight.numel() for linear in prunable.values()) == 2 * (4 * 16 * 16 + 2 * 16 * 24)
    for name, linear in prunable.items():
        assert parameters[name] is linear.weight
    stack = [p for n, p in parameters.items() if ".layer." in n]
    assert model.encoder_parameters() == sum(p.numel() for p in stack)
    matrices = {n for n, p in parameters.items() if ".layer." in n and p.dim() == 2}
    assert matrices == set(prunable)  # no matrix of the encoder is forgotten
    heads, neurons = model.layers()[0].heads, model.layers()[0].neurons
    assert (heads.count, heads.weights, neurons.count, neurons.weights, len(model.layers())) == (4, 256, 24, 32, 2)
    slots = [*heads.slots, *neurons.slots]
    assert [tuple(slot.linear.weight.shape) for slot in slots] == [(16, 16)] * 4 + [(24, 16), (16, 24)]
    assert [id(slot.linear) for slot in slots] == [id(linear) for linear in list(prunable.values())[:6]]


def test_longest_input_respects_positions_and_tokenizer(checkpoint: Make) -> None:
    assert models.longest_input(load(checkpoint("bert")), 512) == 66
    assert models.longest_input(load(checkpoint("roberta")), 512) == 65  # positions begin after the pad id
    assert models.longest_input(load(checkpoint("bert")), 20) == 20


# Heads and labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_known_head_is_put_in_the_order_of_the_task(checkpoint: Make, tokenizer: Any, family: str) -> None:
    folder, batch = checkpoint(family, ABC), inputs(tokenizer)
    own = models.forward(load(folder), batch)[0]
    model = load(folder, ("GAMMA", "alpha", "beta"), need_head=True)
    assert model.labels == ("GAMMA", "alpha", "beta")
    assert torch.equal(models.forward(model, batch)[0], own[:, [2, 0, 1]])
    assert model.net.config.id2label == {0: "GAMMA", 1: "alpha", 2: "beta"}
    assert not model.net.training


def test_labels_that_differ_in_case_only_keep_their_rows(checkpoint: Make) -> None:
    folder = checkpoint("bert", ("US", "us"))
    own = load(folder).net.classifier.weight
    assert torch.equal(load(folder, ("US", "us"), need_head=True).net.classifier.weight, own)
    assert torch.equal(load(folder, ("us", "US"), need_head=True).net.classifier.weight, own[[1, 0]])


@torch.no_grad()
def test_label_map_renames_before_comparing(checkpoint: Make, tokenizer: Any) -> None:
    folder, batch = checkpoint("bert", ("LABEL_0", "LABEL_1")), inputs(tokenizer)
    own = models.forward(load(folder), batch)[0]
    mapping = {"LABEL_0": "positive", "LABEL_1": "negative"}
    model = load(folder, ("negative", "positive"), need_head=True, label_map=mapping)
    assert torch.equal(models.forward(model, batch)[0], own[:, [1, 0]])


def test_labels_of_a_model_that_are_numbers_are_found_by_value(checkpoint: Make) -> None:
    folder = checkpoint("bert", ("1.0", "2.0", "0"))
    own = load(folder).net.classifier.weight
    assert torch.equal(load(folder, ("0", "1", "02"), need_head=True).net.classifier.weight, own[[2, 0, 1]])
    with pytest.raises(ModelError, match=r"1\.0, 2\.0, 0.* are not those of the task \(0, 1, 3\)"):
        load(folder, ("0", "1", "3"), need_head=True)


def test_a_label_map_for_the_data_alone_leaves_the_model_as_it_is(checkpoint: Make) -> None:
    folder = checkpoint("bert", ABC)
    own = load(folder).net.classifier.weight
    for mapping in ({"0": "alpha", "1": "beta"}, {"alpha": "0"}):
        model = load(folder, ("gamma", "alpha", "beta"), need_head=True, label_map=mapping)
        assert torch.equal(model.net.classifier.weight, own[[2, 0, 1]])
    with pytest.raises(ConfigError, match="two labels of the model the name 'x'"):
        load(folder, ABC, need_head=True, label_map={"alpha": "x", "beta": "x"})


@pytest.mark.parametrize("labels", [("x", "y", "z"), ("alpha", "beta"), (*ABC, "delta")])
def test_other_labels_are_refused_where_a_head_is_needed(checkpoint: Make, labels: tuple[str, ...]) -> None:
    with pytest.raises(ModelError) as caught:
        load(checkpoint("bert", ABC), labels, need_head=True)
    assert "alpha, beta, gamma" in caught.value.message
    assert ", ".join(labels) in caught.value.message
    assert "--label-map" in caught.value.hint


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("labels", [("x", "y", "z"), ("x", "y"), ("x", "y", "z", "w"), ()])
def test_other_labels_get_a_new_head_drawn_from_the_seed(
    checkpoint: Make, family: str, labels: tuple[str, ...]
) -> None:
    """Also where the checkpoint has a head of as many, more or fewer labels."""
    folder = checkpoint(family, ABC)
    old = load(folder)
    nets = [load(folder, labels, seed=seed).net for seed in (1, 1, 2)]
    heads = [models._output(net)[1] for net in nets]
    assert heads[0].weight.shape == (len(labels) or 1, 16)
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    if len(labels) == 3:
        assert not torch.equal(heads[0].weight, models._output(old.net)[1].weight)
    for name, tensor in old.net.base_model.state_dict().items():
        assert torch.equal(tensor, nets[0].base_model.state_dict()[name]), name


def test_a_headless_checkpoint_gets_a_head_and_says_no_pooler(checkpoint: Make, tmp_path: Path) -> None:
    folder = without(checkpoint("bert"), tmp_path / "bare", lambda name: name.startswith(("classifier", "bert.pooler")))
    one, same, other = load(folder, ABC), load(folder, ABC), load(folder, ABC, seed=2)
    assert "no pooler" in one.notes[0]
    assert torch.equal(one.net.classifier.weight, same.net.classifier.weight)
    assert torch.equal(one.net.bert.pooler.dense.weight, same.net.bert.pooler.dense.weight)
    assert not torch.equal(one.net.classifier.weight, other.net.classifier.weight)
    with pytest.raises(ModelError, match=r"incomplete: 2 missing or misshapen, first bert\.pooler"):
        load(folder, ("negative", "positive"), need_head=True)


@pytest.mark.parametrize("kind", ["spans", "classification", "tokens"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_language_model_gives_its_base_to_every_kind(tmp_path: Path, family: str, kind: str) -> None:
    """Also where the network with the head calls its base model by another name, as Llama's for spans does."""
    from transformers import AutoModelForCausalLM

    vocabulary = write_byte_tokenizer(tmp_path, padding=False)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(registry.config_of(family, vocabulary))
    plain.save_pretrained(tmp_path)
    expected = plain.base_model.state_dict()
    nets = [load(tmp_path, ABC, kind=kind, seed=seed).net for seed in (1, 2)]
    for net in nets:
        found = net.base_model.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    heads = [models._output(net)[1].weight for net in nets]
    assert heads[0].shape[0] == (2 if kind == "spans" else 3)
    assert not torch.equal(*heads)


@torch.no_grad()
def test_a_language_model_answers_as_transformers_own_class_does(tmp_path: Path) -> None:
    """A checkpoint that holds a head for spans, under that class's own names, is loaded as it is."""
    from transformers import AutoModelForQuestionAnswering

    vocabulary = write_byte_tokenizer(tmp_path, padding=False)
    torch.manual_seed(0)
    plain = AutoModelForQuestionAnswering.from_config(registry.config_of("llama", vocabulary)).eval()
    plain.save_pretrained(tmp_path)
    model = load(tmp_path, (), kind="spans")
    batch = dict(model.tokenizer(["a good film", "dull"], padding=True, return_tensors="pt"))
    out = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(models.forward(model, batch)[0], torch.stack([out.start_logits, out.end_logits], dim=-1))


def test_loading_is_in_32_bits(checkpoint: Make, tmp_path: Path) -> None:
    folder = edited(checkpoint("bert"), tmp_path / "half", dtype="float16")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(
        {n: t.half() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    assert {p.dtype for p in load(folder).net.parameters()} == {torch.float32}


# What is refused -----------------------------------------------------------------------------------------------------


def without(folder: Path, target: Path, gone: Callable[[str], bool]) -> Path:
    """A copy of a checkpoint without the tensors for whose name `gone` holds."""
    shutil.copytree(folder, target)
    tensors = safetensors.torch.load_file(target / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not gone(name)}
    assert len(kept) < len(tensors)
    safetensors.torch.save_file(kept, target / "model.safetensors", {"format": "pt"})
    return target


def test_an_incomplete_checkpoint_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    lost = "bert.encoder.layer.1.output.dense.weight"
    with pytest.raises(ModelError, match=f"incomplete: 1 missing or misshapen, first {lost}"):
        load(without(checkpoint("bert"), tmp_path / "x", lambda name: name == lost), ("x", "y"))


def test_a_misshapen_tensor_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    folder = edited(checkpoint("bert"), tmp_path / "x")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["bert.encoder.layer.0.intermediate.dense.weight"] = torch.zeros(5, 16)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for labels in (None, ("x", "y")):
        with pytest.raises(ModelError):
            load(folder, labels)


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, None])
def test_corrupt_weights_are_refused(checkpoint: Make, tmp_path: Path, damage: bytes | None) -> None:
    folder = edited(checkpoint("bert"), tmp_path / "x")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50] if damage is None else damage)
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "corrupt" in caught.value.message
    assert "\n" not in caught.value.message


def test_pickled_weights_are_never_read(checkpoint: Make, tmp_path: Path) -> None:
    folder = edited(checkpoint("bert"), tmp_path / "x")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        load(folder)
    assert "has no model.safetensors" in caught.value.message
    assert "never read" in caught.value.hint


def test_remote_code_is_never_run(checkpoint: Make, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    for name, extra in (("known", {}), ("unknown", {"model_type": "evil"})):
        code = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model"}
        folder = edited(checkpoint("bert"), tmp_path / name, auto_map=code, **extra)
        (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
        with pytest.raises(ModelError, match="own code"):
            load(folder)
    assert not ran.exists()


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path)


def test_a_model_out_of_reach_names_the_builtin_one() -> None:
    with pytest.raises(ModelError) as caught:
        load(Path("nobody/nothing-at-all"))
    assert "'nobody/nothing-at-all'" in caught.value.message
    assert "mini" in caught.value.hint


# The artefact --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pruned(checkpoint: Make, tmp_path: Path) -> tuple[models.Model, Path]:
    """A model with nine tenths of its prunable weights gone, and the folder it was saved in."""
    model, out = load(checkpoint("roberta", ABC)), tmp_path / "out"
    out.mkdir()
    torch.manual_seed(0)
    with torch.no_grad():
        for linear in model.prunable().values():
            linear.weight.mul_(torch.rand_like(linear.weight) < 0.1).add_(0.0)
    models.save_artifact(model, out, list(model.prunable()), {"method": "magnitude", "sparsity": 0.9})
    return model, out


@torch.no_grad()
def test_an_artefact_gives_back_the_same_model(pruned: tuple[models.Model, Path], tokenizer: Any) -> None:
    model, out = pruned
    assert models.is_artifact(str(out))
    assert not (out / "config.json").exists()  # no other loader can succeed on it with random weights
    again = models.load_artifact(out)
    ours, theirs = model.net.state_dict(), again.net.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    batch = inputs(tokenizer)
    assert torch.equal(models.forward(model, batch)[0], models.forward(again, batch)[0])
    assert (again.labels, again.kind, again.net.training) == (ABC, "classification", False)
    assert again.tokenizer("a good film")["input_ids"] == tokenizer("a good film")["input_ids"]
    other = models.load_model(str(out), ("beta", "Gamma", "alpha"), "classification", 1)
    own, swapped = models.forward(model, batch)[0], models.forward(other, batch)[0]
    assert torch.equal(swapped, own[:, [1, 2, 0]])
    with pytest.raises(ModelError, match="are not those of the task"):
        models.load_model(str(out), ("x", "y"), "classification", 1)


@torch.no_grad()
def test_an_artefact_in_16_bits_loads_in_32(pruned: tuple[models.Model, Path]) -> None:
    model, out = pruned
    ours = {n: t.half() if t.is_floating_point() else t for n, t in model.net.state_dict().items()}
    sparse.save(out / models.WEIGHTS_FILE, ours, list(model.prunable()), quantised=[LOST])
    theirs = models.load_artifact(out).net.state_dict()
    assert {t.dtype for t in theirs.values() if t.is_floating_point()} == {torch.float32}
    assert all(torch.equal(theirs[name], ours[name].to(theirs[name].dtype)) for name in ours if name != LOST)


LOST = "roberta.encoder.layer.0.output.dense.bias"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(LOST), f"1 missing: {LOST}"),
        (lambda t: t.update(extra=torch.ones(2)), "1 left over: extra"),
        (lambda t: t.update({LOST: torch.ones(15)}), f"1 of another shape or dtype: {LOST}"),
        (lambda t: t.update({LOST: torch.ones(16, dtype=torch.int32)}), f"1 of another shape or dtype: {LOST}"),
    ],
)
def test_an_artefact_with_other_tensors_is_refused(
    pruned: tuple[models.Model, Path], change: Callable[[dict[str, Any]], Any], expected: str
) -> None:
    model, out = pruned
    tensors = dict(model.net.state_dict())
    change(tensors)
    sparse.save(out / models.WEIGHTS_FILE, tensors, list(model.prunable()))
    with pytest.raises(ModelError) as caught:
        models.load_artifact(out)
    assert expected in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 99},
        {"format_version": None},
        {"model_config": "roberta"},
        {"model_config": {}},
        {"model_config": {"model_type": "evil"}},
        {"model_config": {"model_type": "roberta", "hidden_size": 10**7, "vocab_size": 10**7}},
        {"model_config": {"model_type": "roberta", "hidden_size": "many"}},
        {"labels": "alpha"},
        {"labels": None},
    ],
)
def test_a_changed_cap_config_is_refused(pruned: tuple[models.Model, Path], change: dict[str, Any]) -> None:
    _, out = pruned
    path = out / models.CONFIG_FILE
    files.write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises((FileError, ModelError)):
        models.load_artifact(out)


KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_attn_implementation_internal")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kernel", ["evil/kernel", "eager"])
def test_no_file_names_the_kernels(pruned: tuple[models.Model, Path], tmp_path: Path, name: str, kernel: str) -> None:
    """transformers would fetch and run what a configuration names; whatever it says, a model computes with its own."""
    plain, out = pruned
    usual = plain.net.config._attn_implementation
    path = out / models.CONFIG_FILE
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | {"model_config": {**table["model_config"], name: kernel}}))
    models.save_dense(plain, tmp_path / "dense")
    folder = edited(tmp_path / "dense", tmp_path / "edited", **{name: kernel})
    for net in (models.load_artifact(out).net, load(folder, kind=plain.kind).net):
        assert net.config._attn_implementation == usual
        assert kernel == "eager" or kernel not in net.config.to_json_string(use_diff=False)
        assert torch.equal(net.classifier.out_proj.weight, plain.net.classifier.out_proj.weight)


def test_fewer_labels_than_the_head_has_rows_are_refused(pruned: tuple[models.Model, Path]) -> None:
    _, out = pruned
    path = out / models.CONFIG_FILE
    files.write_json(path, json.loads(path.read_text()) | {"labels": ["alpha", "beta"]})
    with pytest.raises((FileError, ModelError), match="label"):
        models.load_artifact(out)


@pytest.mark.parametrize("name", [models.WEIGHTS_FILE, models.CONFIG_FILE])
def test_an_artefact_with_a_damaged_file_is_refused(pruned: tuple[models.Model, Path], name: str) -> None:
    _, out = pruned
    (out / name).write_bytes((out / name).read_bytes()[:-20])
    with pytest.raises(CapError) as caught:
        models.load_artifact(out)
    assert str(out / name) in caught.value.message


@torch.no_grad()
def test_a_dense_folder_loads_without_capcli(pruned: tuple[models.Model, Path], tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, folder = pruned[0], tmp_path / "dense"
    folder.mkdir()
    models.save_dense(model, folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = inputs(AutoTokenizer.from_pretrained(folder), plain)
    assert torch.equal(plain(**batch).logits, models.forward(model, inputs(tokenizer))[0])
    assert plain.config.id2label == dict(enumerate(ABC))


# Computing -----------------------------------------------------------------------------------------------------------


def examples_of(tokenizer: Any, n: int) -> tokens.Examples:
    texts = ["a good film " * (1 + i * 7 % 5) + str(i) for i in range(n)]
    table = tables.in_memory("made here", {"text": texts})
    split = tasks.Split(name="train", table=table, columns=("text",), labels=np.zeros(n, dtype=np.int64))
    return tokens.encode(split, tokenizer, 32)


def batches(examples: tokens.Examples, budget: int = 60) -> Iterator[tokens.Batch]:
    for rows in tokens.evaluation_batches(examples, budget):
        yield tokens.collate(examples, rows, CPU.device)


def run(generator: Any) -> tuple[list[int], Any]:
    seen = []
    while True:
        try:
            seen.append(next(generator))
        except StopIteration as stop:
            return seen, stop.value


@pytest.mark.parametrize("training", [True, False])
def test_encode_restores_the_order_and_runs_without_dropout(checkpoint: Make, tokenizer: Any, training: bool) -> None:
    model, examples = load(checkpoint("bert", ABC)), examples_of(tokenizer, 11)
    model.net.train(training)
    seen, (logits, vectors) = run(models.encode(model, batches(examples), 11, 11, CPU))
    assert model.net.training is training
    assert all(m.training is training for m in model.net.modules() if isinstance(m, nn.Dropout))
    assert seen[-1] == 11
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert (logits.dtype, vectors.dtype) == (torch.float32, torch.float16)
    model.net.eval()
    with torch.no_grad():
        for i in range(11):
            batch = tokens.collate(examples, np.array([i]), CPU.device)
            own, vector = models.forward(model, batch.inputs)
            assert torch.allclose(logits[i], own[0], atol=1e-5)
            unit = nn.functional.normalize(vector[0], dim=-1)
            assert torch.allclose(vectors[i].float(), unit, atol=1e-3)
    assert len({tuple(row.tolist()) for row in logits}) == 11


def test_encode_does_not_depend_on_the_batches(checkpoint: Make, tokenizer: Any) -> None:
    model, examples = load(checkpoint("electra")), examples_of(tokenizer, 9)
    one = run(models.encode(model, batches(examples, 1), 9, 9, CPU, "mean"))[1]
    many = run(models.encode(model, batches(examples, 10_000), 9, 9, CPU, "mean"))[1]
    for a, b in zip(one, many, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-3)


def test_encode_keeps_no_logits_that_nobody_wants(checkpoint: Make, tokenizer: Any) -> None:
    model, examples = load(checkpoint("bert", ABC)), examples_of(tokenizer, 5)
    logits, vectors = run(models.encoded(model, examples, CPU, lambda done, total: done, logits=False))[1]
    assert logits.shape == (0, 3)
    assert torch.equal(vectors, run(models.encoded(model, examples, CPU, lambda done, total: done))[1][1])


def test_compute_finds_the_device_or_says_so() -> None:
    found = models.compute(Hardware(device="cpu", precision="bf16"))
    assert (found.device.type, found.dtype) == ("cpu", torch.bfloat16)
    assert models.compute(Hardware(device="cpu")).dtype == torch.float32
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ConfigError, match=f"no {missing} device"):
        models.compute(Hardware(device=missing))


def test_a_copy_has_weights_of_its_own(checkpoint: Make) -> None:
    model = load(checkpoint("bert"))
    other = models.copy(model)
    with torch.no_grad():
        other.net.classifier.weight.zero_()
    assert model.net.classifier.weight.abs().sum() > 0
