"""The boundary to transformers, on tiny random checkpoints of every family."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import registry
import safetensors.torch
import torch
from tiny import write_byte_tokenizer
from torch import nn
from torch.nn.utils import parametrize

import capcli
from capcli import files
from capcli.artifact import writer
from capcli.config.hardware import Hardware
from capcli.data import tables, tokens
from capcli.data.batches import Examples, collate, evaluation_batches
from capcli.data.splits import Split
from capcli.errors import CapError, ConfigError, FileError, ModelError, Stopped
from capcli.events import Event, finished, told
from capcli.models import artifact, devices, families, loading, predict, stock, tokenizers
from capcli.models.devices import Compute
from capcli.models.heads import output_layer
from capcli.models.model import CONFIG_FILE, WEIGHTS_FILE, Model, accepted_inputs, copy, longest_input
from capcli.stored import read_json

Make = Callable[..., Path]
FAMILIES = tuple(families.FAMILIES)
ABC = ("alpha", "beta", "gamma")
CPU = Compute(device=torch.device("cpu"), dtype=torch.float32)


def load(folder: Path, labels: tuple[str, ...] | None = None, **options: Any) -> Model:
    return loading.load_dense(
        str(folder), labels, options.pop("kind", "classification"), options.pop("seed", 1), **options
    )


def inputs(tokenizer: Any, net: Any = None) -> dict[str, torch.Tensor]:
    coded = tokenizer(["a good film", "dull"], ["really", "and much too long"], padding=True, return_tensors="pt")
    return {name: value for name, value in coded.items() if net is None or name in accepted_inputs(net)}


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
    logits, vector = predict.forward(model, inputs(tokenizer))
    expected = plain(**batch, output_hidden_states=True)
    # Masks of decoders are given in another way than transformers does, which can choose another kernel.
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-6 if model.family.causal else 0)
    same(logits, expected.logits)
    assert not torch.allclose(logits[0], logits[1])
    assert torch.equal(output_layer(model.net)[1](vector), logits)  # the vector is what enters the classifier
    states = expected.hidden_states[-1]
    last = batch["attention_mask"].sum(1) - 1
    summary = states[torch.arange(2), last] if model.family.causal else states[:, 0]
    same(predict.forward(model, batch, "cls")[1], summary)
    mean = predict.forward(model, batch, "mean")[1]
    for i in range(2):
        assert torch.allclose(mean[i], states[i][batch["attention_mask"][i].bool()].mean(0), atol=1e-6)
    assert all(torch.equal(predict.forward(model, batch, pooling)[0], logits) for pooling in ("cls", "mean"))


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
    assert longest_input(load(checkpoint("bert")), 512) == 66
    assert longest_input(load(checkpoint("roberta")), 512) == 65  # positions begin after the pad id
    assert longest_input(load(checkpoint("bert")), 20) == 20


# Heads and labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_known_head_is_put_in_the_order_of_the_task(checkpoint: Make, tokenizer: Any, family: str) -> None:
    folder, batch = checkpoint(family, ABC), inputs(tokenizer)
    own = predict.forward(load(folder), batch)[0]
    model = load(folder, ("GAMMA", "alpha", "beta"), need_head=True)
    assert model.labels == ("GAMMA", "alpha", "beta")
    assert torch.equal(predict.forward(model, batch)[0], own[:, [2, 0, 1]])
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
    own = predict.forward(load(folder), batch)[0]
    mapping = {"LABEL_0": "positive", "LABEL_1": "negative"}
    model = load(folder, ("negative", "positive"), need_head=True, label_map=mapping)
    assert torch.equal(predict.forward(model, batch)[0], own[:, [1, 0]])


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
    heads = [output_layer(net)[1] for net in nets]
    assert heads[0].weight.shape == (len(labels) or 1, 16)
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert not torch.equal(heads[0].weight, heads[2].weight)
    if len(labels) == 3:
        assert not torch.equal(heads[0].weight, output_layer(old.net)[1].weight)
    for name, tensor in old.net.base_model.state_dict().items():
        assert torch.equal(tensor, nets[0].base_model.state_dict()[name]), name


def test_a_headless_checkpoint_gets_a_head_and_says_no_pooler(checkpoint: Make, tmp_path: Path) -> None:
    folder = without(checkpoint("bert"), tmp_path / "bare", lambda name: name.startswith(("classifier", "bert.pooler")))
    one, same, other = load(folder, ABC), load(folder, ABC), load(folder, ABC, seed=2)
    assert "no pooler" in one.notes[0]
    assert torch.equal(one.net.classifier.weight, same.net.classifier.weight)
    assert torch.equal(one.net.bert.pooler.dense.weight, same.net.bert.pooler.dense.weight)
    assert not torch.equal(one.net.classifier.weight, other.net.classifier.weight)
    with pytest.raises(ModelError, match=r"incomplete: 2 missing, first bert\.pooler"):
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
    heads = [output_layer(net)[1].weight for net in nets]
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
    assert torch.equal(predict.forward(model, batch)[0], torch.stack([out.start_logits, out.end_logits], dim=-1))


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
    with pytest.raises(ModelError, match=f"incomplete: 1 missing, first {lost}"):
        load(without(checkpoint("bert"), tmp_path / "x", lambda name: name == lost), ("x", "y"))


def test_a_misshapen_tensor_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    folder = edited(checkpoint("bert"), tmp_path / "x")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["bert.encoder.layer.0.intermediate.dense.weight"] = torch.zeros(5, 16)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for labels in (None, ("x", "y")):
        with pytest.raises(ModelError, match=r"1 of another shape, first .*intermediate.dense.weight with \[5, 16\]"):
            load(folder, labels)


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        (
            {"id2label": {"bad": 0, "good": 1}, "label2id": {"0": "bad", "1": "good"}},
            "id2label and label2id are swapped: id2label has the key 'bad'",
            'id2label reads {"0": "negative", "1": "positive"}',
        ),
        ({"id2label": ["bad", "good"]}, r"id2label: expected an object with a name .*, got \['bad', 'good'\]", ""),
        (
            {"id2label": {"LABEL_0": "bad", "LABEL_1": "good"}},
            "keys of id2label: .* got 'LABEL_0'",
            "",
        ),
        ({"id2label": {"1": "bad", "2": "good"}}, "keys of id2label: expected the whole numbers 0 to 1, got '2'", ""),
        ({"id2label": {"0": None, "1": "good"}}, "names in id2label: expected texts, got None", ""),
        (
            {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 1, "good": 0}},
            "id2label calls output 0 'bad', and label2id says that it is output 1",
            "correct the one that is wrong",
        ),
        ({"num_labels": -2}, "num_labels: expected a whole number of at least 1, got -2", "correct it"),
        ({"num_attention_heads": -1}, "num_attention_heads: expected .* at least 1, got -1", ""),
        (
            {"num_attention_heads": 3},
            r"hidden size \(16\) is not a multiple of .* heads \(3\)",
            "",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected .* at least 1, got 0", ""),
        ({"intermediate_size": "24"}, "intermediate_size: expected .* at least 1, got '24'", ""),
        ({"vocab_size": 2.5}, "vocab_size: expected .* at least 1, got 2.5", ""),
        ({"type_vocab_size": -1}, "type_vocab_size: expected .* at least 0, got -1", ""),
        ({"hidden_size": None}, "field 'hidden_size': TypeError: .* expected int, got NoneType", ""),
        ({"hidden_act": "wat"}, "there is no 'wat'", ""),
    ],
)
def test_an_impossible_configuration_is_one_clear_line(
    checkpoint: Make, tmp_path: Path, changes: dict[str, Any], message: str, hint: str
) -> None:
    folder = edited(checkpoint("bert", ("bad", "good")), tmp_path / "x", **changes)
    for labels, need_head in ((("bad", "good"), False), (None, True)):
        with pytest.raises(ModelError, match=message) as caught:
            load(folder, labels, need_head=need_head)
        assert hint in caught.value.hint and "\n" not in caught.value.message
        assert str(folder) in caught.value.message


def test_a_head_with_more_outputs_than_names_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    names = {"id2label": {"0": "alpha", "1": "beta"}, "label2id": {"alpha": 0, "beta": 1}}
    folder = edited(checkpoint("bert", ABC), tmp_path / "x", **names)
    with pytest.raises(ModelError, match="has 3 outputs, its configuration 2 names") as caught:
        load(folder, ("alpha", "beta"), need_head=True)
    assert "id2label" in caught.value.hint
    assert load(folder, ("x", "y")).net.classifier.weight.shape[0] == 2  # a new head needs no names


@torch.no_grad()
def test_the_file_does_not_say_how_the_network_is_called(checkpoint: Make, tokenizer: Any, tmp_path: Path) -> None:
    batch, folder = inputs(tokenizer), checkpoint("bert")
    other = edited(folder, tmp_path / "x", return_dict=False, chunk_size_feed_forward=5)
    assert torch.equal(predict.forward(load(other), batch)[0], predict.forward(load(folder), batch)[0])


def with_tokenizer(folder: Path, target: Path, file: str = "tokenizer_config.json", **values: Any) -> Path:
    """A copy of a checkpoint with other values in a file of its tokenizer."""
    shutil.copytree(folder, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return target


def test_a_tokenizer_larger_than_the_embeddings_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    folder = checkpoint("bert")
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    url = {**added[0], "id": 5800, "content": "[URL]"}
    larger = with_tokenizer(folder, tmp_path / "x", "tokenizer.json", added_tokens=[*added, url])
    message = r"5,801 tokens with ids up to 5,800, the embeddings have 5,800 rows: none for '\[URL\]'"
    with pytest.raises(ModelError, match=message) as caught:
        load(larger, ("x", "y"))
    assert "resize_token_embeddings" in caught.value.hint


def test_a_hole_in_the_vocabulary_counts_by_its_last_id(checkpoint: Make, tmp_path: Path) -> None:
    folder = checkpoint("bert")
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    model["vocab"]["zzz"] = 9000
    with pytest.raises(ModelError, match="ids up to 9,000, the embeddings have 5,800 rows: none for 'zzz'"):
        load(with_tokenizer(folder, tmp_path / "x", "tokenizer.json", model=model), ("x", "y"))


@pytest.mark.parametrize("length", ["long", "16", -1, 0, 16.5, True, [16], float("nan")])
def test_a_length_that_is_none_is_refused(checkpoint: Make, tmp_path: Path, length: Any) -> None:
    folder = with_tokenizer(checkpoint("bert"), tmp_path / "x", model_max_length=length)
    with pytest.raises(ModelError, match=r"tokenizer_config.json of .*model_max_length: expected a whole number .*got"):
        load(folder, ("x", "y"))


@pytest.mark.parametrize(("length", "read"), [(10**30, 66), (1e30, 66), (None, 66), (16.0, 16)])
def test_a_length_may_be_huge_or_missing(checkpoint: Make, tmp_path: Path, length: Any, read: int) -> None:
    folder = with_tokenizer(checkpoint("bert"), tmp_path / "x", model_max_length=length)
    assert longest_input(load(folder, ("x", "y")), 512) == read


def test_a_length_must_leave_room_for_a_text(checkpoint: Make, tmp_path: Path) -> None:
    folder = with_tokenizer(checkpoint("bert"), tmp_path / "x", model_max_length=2)
    with pytest.raises(ModelError, match="no room for a text: its model_max_length is 2, and special tokens take 2"):
        load(folder, ("x", "y"))


@pytest.mark.parametrize("names", [["pixel_values"], [], "input_ids", 5, None, [1, "input_ids"]])
def test_foreign_inputs_are_refused(checkpoint: Make, tmp_path: Path, names: Any) -> None:
    folder = with_tokenizer(checkpoint("bert"), tmp_path / "x", model_input_names=names)
    with pytest.raises(ModelError, match="model_input_names: expected a list of names with 'input_ids' among them"):
        load(folder, ("x", "y"))


def test_the_mask_is_asked_for_and_other_inputs_are_left_out(checkpoint: Make, tmp_path: Path) -> None:
    for number, names in enumerate((["input_ids"], ["input_ids", "attention_mask", "bbox"])):
        model = load(with_tokenizer(checkpoint("bert"), tmp_path / str(number), model_input_names=names), ("x", "y"))
        assert model.input_names == ("input_ids", "attention_mask")
        assert "attention_mask" in model.tokenizer(["good", "so good"], padding=True)


def test_padding_is_found_where_the_tokenizer_has_none(checkpoint: Make, tmp_path: Path) -> None:
    none = dict.fromkeys(("pad_token", "cls_token", "sep_token", "mask_token"))
    model = load(with_tokenizer(checkpoint("bert"), tmp_path / "x", **none), ("x", "y"))
    assert model.tokenizer.pad_token == "[UNK]"
    assert model.notes == ("the tokenizer has no padding token; '[UNK]' serves as one",)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("deberta-v2", {"pooler_hidden_size": 3}, "of another shape|cannot compute"),
        ("deberta-v2", {"pooler_hidden_size": 0}, "pooler_hidden_size: expected"),
        ("albert", {"num_hidden_groups": 0}, "num_hidden_groups: expected"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(
    checkpoint: Make, tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load(edited(checkpoint(family), tmp_path / "x", **changes), ("x", "y"))


def test_a_tokenizer_that_fails_on_unknown_text_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    folder = checkpoint("bert")
    stored = json.loads((folder / "tokenizer.json").read_text())
    words = {word: place for word, place in stored["model"]["vocab"].items() if word != "[UNK]"}
    added = [token for token in stored["added_tokens"] if token["content"] != "[UNK]"]
    kept = {"model": {**stored["model"], "vocab": words}, "added_tokens": added}
    target = with_tokenizer(folder, tmp_path / "x", "tokenizer.json", **kept)
    settings = target / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"unk_token": None}))
    with pytest.raises(ModelError, match="cannot read a text"):
        load(target, ("x", "y"))


def test_a_folder_above_the_model_names_the_folder_below(checkpoint: Make, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("bert"), tmp_path / "m" / "0_Transformer")
    (tmp_path / "m" / "modules.json").write_text("[]")
    with pytest.raises(ModelError, match=r"has no config\.json") as caught:
        load(tmp_path / "m", ("x", "y"))
    assert caught.value.hint == f"there is one in {tmp_path / 'm' / '0_Transformer'}: give that folder"


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
def pruned(checkpoint: Make, tmp_path: Path) -> tuple[Model, Path]:
    """A model with nine tenths of its prunable weights gone, and the folder it was saved in."""
    model, out = load(checkpoint("roberta", ABC)), tmp_path / "out"
    out.mkdir()
    torch.manual_seed(0)
    with torch.no_grad():
        for linear in model.prunable().values():
            linear.weight.mul_(torch.rand_like(linear.weight) < 0.1).add_(0.0)
    artifact.save_artifact(model, out, list(model.prunable()), {"method": "magnitude", "sparsity": 0.9})
    return model, out


@torch.no_grad()
def test_an_artefact_gives_back_the_same_model(pruned: tuple[Model, Path], tokenizer: Any) -> None:
    model, out = pruned
    assert tokenizers.is_artifact(str(out))
    assert not (out / "config.json").exists()  # no other loader can succeed on it with random weights
    again = artifact.load_artifact(out)
    ours, theirs = model.net.state_dict(), again.net.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    batch = inputs(tokenizer)
    assert torch.equal(predict.forward(model, batch)[0], predict.forward(again, batch)[0])
    assert (again.labels, again.kind, again.net.training) == (ABC, "classification", False)
    assert again.tokenizer("a good film")["input_ids"] == tokenizer("a good film")["input_ids"]
    other = loading.load_model(str(out), ("beta", "Gamma", "alpha"), "classification", 1)
    own, swapped = predict.forward(model, batch)[0], predict.forward(other, batch)[0]
    assert torch.equal(swapped, own[:, [1, 2, 0]])
    with pytest.raises(ModelError, match="are not those of the task"):
        loading.load_model(str(out), ("x", "y"), "classification", 1)


def test_the_tokenizer_of_an_artefact_is_read_without_its_weights(pruned: tuple[Model, Path]) -> None:
    model, out = pruned
    (out / WEIGHTS_FILE).write_bytes(b"no weights")
    assert capcli.load_tokenizer(out)("a good film") == model.tokenizer("a good film")
    with pytest.raises(FileError):
        capcli.load(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "model_config: num_hidden_layers: expected"),
        ({"id2label": {"a": 0, "b": 1, "c": 2}}, "model_config: id2label and label2id are swapped"),
    ],
)
def test_an_artefact_with_an_impossible_configuration_is_refused(
    pruned: tuple[Model, Path], changes: dict[str, Any], message: str
) -> None:
    path = pruned[1] / "cap_config.json"
    settings = read_json(path)
    path.write_text(json.dumps({**settings, "model_config": settings["model_config"] | changes}))
    with pytest.raises(ModelError, match=message):
        artifact.load_artifact(pruned[1])
    path.write_text(json.dumps({**settings, "kind": "guesses"}))
    with pytest.raises(FileError, match="kind is missing or of the wrong type"):
        artifact.load_artifact(pruned[1])


@torch.no_grad()
def test_an_artefact_in_16_bits_loads_in_32(pruned: tuple[Model, Path]) -> None:
    model, out = pruned
    ours = {n: t.half() if t.is_floating_point() else t for n, t in model.net.state_dict().items()}
    writer.save(out / WEIGHTS_FILE, ours, list(model.prunable()), quantised=[LOST])
    theirs = artifact.load_artifact(out).net.state_dict()
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
    pruned: tuple[Model, Path], change: Callable[[dict[str, Any]], Any], expected: str
) -> None:
    model, out = pruned
    tensors = dict(model.net.state_dict())
    change(tensors)
    writer.save(out / WEIGHTS_FILE, tensors, list(model.prunable()))
    with pytest.raises(ModelError) as caught:
        artifact.load_artifact(out)
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
def test_a_changed_cap_config_is_refused(pruned: tuple[Model, Path], change: dict[str, Any]) -> None:
    _, out = pruned
    path = out / CONFIG_FILE
    files.write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises((FileError, ModelError)):
        artifact.load_artifact(out)


KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_attn_implementation_internal")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("kernel", ["evil/kernel", "eager"])
def test_no_file_names_the_kernels(pruned: tuple[Model, Path], tmp_path: Path, name: str, kernel: str) -> None:
    """transformers would fetch and run what a configuration names; whatever it says, a model computes with its own."""
    plain, out = pruned
    usual = plain.net.config._attn_implementation
    path = out / CONFIG_FILE
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | {"model_config": {**table["model_config"], name: kernel}}))
    stock.save_dense(plain, tmp_path / "dense")
    folder = edited(tmp_path / "dense", tmp_path / "edited", **{name: kernel})
    for net in (artifact.load_artifact(out).net, load(folder, kind=plain.kind).net):
        assert net.config._attn_implementation == usual
        assert kernel == "eager" or kernel not in net.config.to_json_string(use_diff=False)
        assert torch.equal(net.classifier.out_proj.weight, plain.net.classifier.out_proj.weight)


def test_fewer_labels_than_the_head_has_rows_are_refused(pruned: tuple[Model, Path]) -> None:
    _, out = pruned
    path = out / CONFIG_FILE
    files.write_json(path, json.loads(path.read_text()) | {"labels": ["alpha", "beta"]})
    with pytest.raises((FileError, ModelError), match="label"):
        artifact.load_artifact(out)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE])
def test_an_artefact_with_a_damaged_file_is_refused(pruned: tuple[Model, Path], name: str) -> None:
    _, out = pruned
    (out / name).write_bytes((out / name).read_bytes()[:-20])
    with pytest.raises(CapError) as caught:
        artifact.load_artifact(out)
    assert str(out / name) in caught.value.message


@torch.no_grad()
def test_a_dense_folder_loads_without_capcli(pruned: tuple[Model, Path], tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, folder = pruned[0], tmp_path / "dense"
    folder.mkdir()
    stock.save_dense(model, folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = inputs(AutoTokenizer.from_pretrained(folder), plain)
    assert torch.equal(plain(**batch).logits, predict.forward(model, inputs(tokenizer))[0])
    assert plain.config.id2label == dict(enumerate(ABC))


# Computing -----------------------------------------------------------------------------------------------------------


def examples_of(tokenizer: Any, n: int) -> Examples:
    texts = ["a good film " * (1 + i * 7 % 5) + str(i) for i in range(n)]
    table = tables.in_memory("made here", {"text": texts})
    split = Split(name="train", table=table, columns=("text",), labels=np.zeros(n, dtype=np.int64))
    return tokens.encode(split, tokenizer, 32)


def with_budget(budget: int) -> devices.Compute:
    class Small(devices.Compute):
        @property
        def token_budget(self) -> int:
            return budget

    return Small(device=CPU.device, dtype=CPU.dtype)


def run(generator: Any) -> tuple[list[tuple[int, int]], Any]:
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
    seen, (logits, vectors) = run(predict.encoded(model, examples, with_budget(60)))
    assert model.net.training is training
    assert all(m.training is training for m in model.net.modules() if isinstance(m, nn.Dropout))
    assert seen[-1] == (11, 11)
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert (logits.dtype, vectors.dtype) == (torch.float32, torch.float16)
    model.net.eval()
    with torch.no_grad():
        for i in range(11):
            batch = collate(examples, np.array([i]), CPU.device)
            own, vector = predict.forward(model, batch.inputs)
            assert torch.allclose(logits[i], own[0], atol=1e-5)
            unit = nn.functional.normalize(vector[0], dim=-1)
            assert torch.allclose(vectors[i].float(), unit, atol=1e-3)
    assert len({tuple(row.tolist()) for row in logits}) == 11


def test_encode_does_not_depend_on_the_batches(checkpoint: Make, tokenizer: Any) -> None:
    model, examples = load(checkpoint("electra")), examples_of(tokenizer, 9)
    one = run(predict.encoded(model, examples, with_budget(1), "mean"))[1]
    many = run(predict.encoded(model, examples, with_budget(10_000), "mean"))[1]
    for a, b in zip(one, many, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-3)


def test_encode_keeps_no_logits_that_nobody_wants(checkpoint: Make, tokenizer: Any) -> None:
    model, examples = load(checkpoint("bert", ABC)), examples_of(tokenizer, 5)
    logits, vectors = run(predict.encoded(model, examples, CPU, logits=False))[1]
    assert logits.shape == (0, 3)
    assert torch.equal(vectors, run(predict.encoded(model, examples, CPU))[1][1])


def test_work_that_is_stopped_leaves_no_cache_of_masked_weights(checkpoint: Make, tokenizer: Any) -> None:
    """The cache is global: whoever stops at an event must not keep weights as they were."""
    model, examples = load(checkpoint("bert", ABC)), examples_of(tokenizer, 5)
    model.net.train()

    def stopped(done: float, total: float) -> Event:
        assert parametrize._cache_enabled
        raise Stopped("stopped")

    with pytest.raises(Stopped):
        finished(told(predict.encoded(model, examples, with_budget(1)), stopped))
    assert not parametrize._cache_enabled
    assert model.net.training


@pytest.mark.parametrize("of_tokens", [False, True])
def test_anything_that_answers_is_asked_in_the_one_loop(tokenizer: Any, of_tokens: bool) -> None:
    """Its rows come back in the order of the examples, or of all tokens; vectors have unit length."""
    examples = dataclasses.replace(examples_of(tokenizer, 7), kind="tokens" if of_tokens else "classification")
    examples = dataclasses.replace(examples, labels=np.zeros(len(examples.tokens), dtype=np.int64))

    def echo(inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = inputs["input_ids"].double()
        told_of = ids if of_tokens else ids.sum(dim=1)
        return told_of[..., None], torch.stack([3 * told_of, 4 * told_of], dim=-1)[..., None, :]

    rows = evaluation_batches(examples, 60)
    seen, (logits, vectors) = run(predict.outputs(echo, examples, rows, CPU.device, of_tokens=of_tokens))
    assert seen[-1] == (7, 7)
    sums = np.add.reduceat(examples.tokens.astype(np.int64), examples.offsets[:-1])
    wanted = examples.tokens if of_tokens else sums
    assert logits[:, 0].tolist() == wanted.tolist() and logits.dtype == torch.float32
    assert vectors.shape == (len(wanted), 1, 2) and vectors.dtype == torch.float16
    assert torch.allclose(vectors.float(), torch.tensor([0.6, 0.8]), atol=1e-3)


@pytest.mark.parametrize("has", [True, False])
def test_steps_are_in_bf16_where_the_processor_multiplies_that(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr(devices.machine, "has_bf16", lambda: has)
    hardware = Hardware(device="cpu")
    assert devices.compute(hardware, training=True).dtype == (torch.bfloat16 if has else torch.float32)
    assert devices.compute(hardware).dtype == devices.compute(hardware, training=True).exact.dtype == torch.float32
    assert devices.compute(Hardware(device="cpu", precision="fp32"), training=True).dtype == torch.float32


def test_compute_finds_the_device_or_says_so() -> None:
    found = devices.compute(Hardware(device="cpu", precision="bf16"))
    assert (found.device.type, found.dtype) == ("cpu", torch.bfloat16)
    assert devices.compute(Hardware(device="cpu")).dtype == torch.float32
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(ConfigError, match=f"no {missing} device"):
        devices.compute(Hardware(device=missing))


def test_a_copy_has_weights_of_its_own(checkpoint: Make) -> None:
    model = load(checkpoint("bert"))
    other = copy(model)
    with torch.no_grad():
        other.net.classifier.weight.zero_()
    assert model.net.classifier.weight.abs().sum() > 0
