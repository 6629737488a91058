"""Sliced networks compute what the masked ones did, are as small as they should be, and survive being stored."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import registry
import torch
from registry import ROWS
from tiny import write_tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer

import capcli
from capcli import files
from capcli.artifact import reader
from capcli.config.measure import EvalConfig
from capcli.config.task import TaskConfig
from capcli.errors import ConfigError, FileError, ModelError
from capcli.models import altered, artifact, families, hf, predict, slicing, stock
from capcli.models.model import CONFIG_FILE, WEIGHTS_FILE, Model, copy, sliced
from capcli.models.slicing import Size

STRUCTURED = [name for name, row in ROWS.items() if row.structured]
ROTARY = [name for name in STRUCTURED if families.FAMILIES[name].attention == "rotary"]
WITH_DIMENSIONS = [name for name in STRUCTURED if name not in ROTARY]
# Heads of 32 dimensions, so that there are sizes to choose from; two layers.
WIDE = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 40}
WIDE_DISTILBERT = {"dim": 96, "n_heads": 3, "hidden_dim": 40}
OWN_POSITIONS = {"share_att_key": False}
CASES = [*STRUCTURED, "deberta-v2 with own positions"]


def make(case: str, kind: str = "classification", *, wide: bool = True, **changes: Any) -> Model:
    """A random model in 64 bits, biases too, without a tokenizer."""
    name = case.split(" ")[0]
    torch.manual_seed(0)
    if wide and name not in ROTARY:
        changes |= WIDE_DISTILBERT if name == "distilbert" else WIDE
    if case != name:
        changes |= OWN_POSITIONS
    attention = changes.pop("attention", None)
    config = registry.config_of(name, 50, num_labels=2 if kind == "spans" else 3, **changes)
    net = hf.auto_class(kind).from_config(config, **({"attn_implementation": attention} if attention else {}))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    labels = () if kind == "spans" else ("x", "y", "z")
    family = families.FAMILIES.get(name)
    return Model(net=net.double().eval(), tokenizer=None, family=family, labels=labels, kind=kind, source="folder")


@pytest.fixture(autouse=True)
def exact_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many neurons as live, so that small examples show which go."""
    monkeypatch.setattr(slicing, "NEURON_STEP", 1)


@torch.no_grad()
def test_neurons_are_filled_up_to_a_multiple_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slicing, "NEURON_STEP", 8)
    for gone, left in ((7, 40), (8, 32), (15, 32), (40, 8)):
        model = make("bert")
        remove(model.layers()[0].neurons, list(range(gone)))
        assert sizes(check_same(model))[0].neurons == left


def batch() -> dict[str, Tensor]:
    """Three inputs of 9, 6 and 2 tokens, padded."""
    torch.manual_seed(1)
    mask = (torch.arange(9) < torch.tensor([[9], [6], [2]])).long()
    ids = torch.randint(4, 50, (3, 9)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(mask)}


@torch.no_grad()
def outputs(model: Model) -> Tensor:
    """Logits and sentence vectors at real tokens, flat."""
    inputs = batch()
    logits, vectors = predict.forward(model, inputs)
    if model.per_token:
        logits = logits[inputs["attention_mask"].bool()]
    return torch.cat([logits.flatten(), vectors.flatten()])


def check_same(model: Model) -> Model:
    """Slice, compare what is computed in 64 and in 32 bits, and give the sliced model back."""
    expected, before = outputs(model), {name: t.clone() for name, t in model.net.state_dict().items()}
    layers = slicing._layers(model.net, known(model)).items()
    planned = {name: slicing._kept(block, layer, known(model)).size for name, (block, layer) in layers}
    small = sliced(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.net.state_dict().items())
    assert small.slices is not None and small.slices.sizes == planned
    assert list(small.net.state_dict()) == list(before)
    # decoders and DeBERTa compute parts in 32 bits whatever the weights are in
    exact = known(model).attention in ("plain", "biased")
    scale = expected.abs().max()
    assert (outputs(small) - expected).abs().max() < (1e-9 if exact else 1e-5) * scale
    single = copy(small)
    single.net.float()
    assert (outputs(single) - expected).abs().max() < 1e-5 * scale
    for name, block in families.blocks(small.net, known(model)).items():
        check_sizes(block, known(model), planned[name])
    return small


def check_sizes(block: nn.Module, family: families.Family, size: Size) -> None:
    """Linear layers say the size that their weights have, and it is that of the plan."""
    for path in family.linears:
        linear = dict(block.named_modules()).get(path)
        if isinstance(linear, nn.Linear):
            assert linear.weight.shape == (linear.out_features, linear.in_features)
            assert linear.bias is None or linear.bias.shape == (linear.out_features,)
    assert block.get_submodule(family.ffn_out).weight.shape[1] == size.neurons
    value = block.get_submodule(family.query_key_value[-1]).weight
    assert value.shape[0] == size.heads * size.head_size * (3 if len(family.query_key_value) == 1 else 1)


def known(model: Model) -> families.Family:
    assert model.family is not None
    return model.family


@torch.no_grad()
def remove(units: families.Units, dead: list[int]) -> None:
    for slot in units.slots:
        for unit in dead:
            slot.linear.weight.narrow(slot.axis, slot.start + unit * slot.size, slot.size).zero_()


@torch.no_grad()
def remove_dimensions(heads: families.Units, head: int, query_key: list[int], value: list[int]) -> None:
    """Zero these dimensions of a head in all matrices (for families in which a head has its own key and value)."""
    for index, slot in enumerate(heads.slots):
        dead = value if index == 2 or slot is heads.slots[-1] else query_key
        slot.linear.weight.index_fill_(slot.axis, torch.tensor([slot.start + head * slot.size + d for d in dead]), 0.0)


def parameters(model: Model) -> int:
    return sum(p.numel() for p in model.net.parameters())


def sizes(model: Model) -> list[Size]:
    assert model.slices is not None
    return list(model.slices.sizes.values())


# The same function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "tokens", "spans"])
@pytest.mark.parametrize("case", CASES)
def test_whole_heads_and_neurons(case: str, kind: str) -> None:
    model = make(case, kind, wide=False)
    for layer in model.layers():
        remove(layer.heads, [1] if layer.heads.count == 2 else [0, 2])
        remove(layer.neurons, [0, *range(5, 19), layer.neurons.count - 1])
    full = slicing.sizes(model.net, known(model))
    small = check_same(model)
    biased = known(model).attention == "biased"
    for size, most in zip(sizes(small), full.values(), strict=True):
        kept = most.heads if biased else most.heads // 2
        assert size == Size(heads=kept, head_size=most.head_size, neurons=most.neurons - 16)
    assert parameters(small) < parameters(model)
    assert small.before_slicing == model.before_slicing


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in STRUCTURED if name not in ("mpnet", "deberta-v2")])
def test_both_ways_to_compute_attention(name: str, attention: str) -> None:
    model = make(name, attention=attention)
    assert model.net.config._attn_implementation == attention
    remove(model.layers()[0].heads, [0])
    if name in WITH_DIMENSIONS:
        remove_dimensions(model.layers()[0].heads, 1, list(range(5, 32)), list(range(9)))
        remove_dimensions(model.layers()[0].heads, 2, list(range(11)), list(range(20)))
    small = check_same(model)
    assert sizes(small)[0].heads == (2 if name in WITH_DIMENSIONS else model.layers()[0].heads.count - 1)
    if name in WITH_DIMENSIONS:
        assert sizes(small)[0].head_size == 24  # 23 live value dimensions in head 1


@pytest.mark.parametrize("case", [case for case in CASES if case not in ROTARY])
@pytest.mark.parametrize("seed", range(3))
def test_uneven_dimensions(case: str, seed: int) -> None:
    model, generator = make(case), torch.Generator().manual_seed(seed)

    def some(n: int, most: int) -> list[int]:
        return torch.randperm(n, generator=generator)[: int(torch.randint(1, most, (), generator=generator))].tolist()

    for layer in model.layers():
        remove(layer.heads, some(3, 3))
        for head in range(3):
            remove_dimensions(layer.heads, head, some(32, 32), some(32, 32))
        remove(layer.neurons, some(40, 40))
    small = check_same(model)
    assert parameters(small) < parameters(model)
    assert all(size.head_size % 8 == 0 for size in sizes(small))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dead", ["heads", "neurons"])
def test_a_layer_without_any(case: str, dead: str) -> None:
    """It keeps one of zeros, of the smallest size there is."""
    model = make(case)
    units = getattr(model.layers()[-1], dead)
    remove(units, list(range(units.count)))
    family, size = known(model), sizes(check_same(model))[-1]
    if dead == "neurons":
        assert size.neurons == 1
    elif family.attention == "rotary":
        assert (size.heads, size.head_size) == (1, 4)
    else:
        assert (size.heads, size.head_size) == (3 if family.attention == "biased" else 1, 8)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sparsity", [0.97, 0.985, 0.995])
def test_rows_and_columns_that_unstructured_pruning_emptied(case: str, sparsity: float) -> None:
    model = make(case)
    with torch.no_grad():
        for linear in model.prunable().values():
            linear.weight.mul_(torch.rand_like(linear.weight) > sparsity)
    small = check_same(model)
    assert parameters(small) < parameters(model)


@pytest.mark.parametrize("case", CASES)
def test_nothing_to_gain_changes_nothing(case: str) -> None:
    model = make(case)
    small = check_same(model)
    ours, theirs = model.net.state_dict(), small.net.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# What counts as useless, one by one ----------------------------------------------------------------------------------


def attention_of(model: Model) -> tuple[nn.Linear, ...]:
    block = next(iter(families.blocks(model.net, known(model)).values()))
    family = known(model)
    return tuple(block.get_submodule(path) for path in (*family.query_key_value, family.attention_output))  # type: ignore[misc]


LOW = list(range(24))  # dimensions of a head that go, so that 8 of 32 stay


@torch.no_grad()
def empty(model: Model, *, rows: str = "", columns: str = "", no_bias: str = "") -> None:
    """Zero the first 24 dimensions of each head in rows, columns or biases of the matrices q, k, v, o of layer 0."""
    dead = torch.tensor([32 * head + d for head in range(3) for d in LOW])
    q, k, v, o = attention_of(model)
    for letter, linear in {"q": q, "k": k, "v": v}.items():
        if letter in rows:
            linear.weight.index_fill_(0, dead, 0.0)
        if letter in no_bias:
            linear.bias.index_fill_(0, dead, 0.0)
    if "o" in columns:
        o.weight.index_fill_(1, dead, 0.0)


@pytest.mark.parametrize(
    ("query_key", "value", "head_size"),
    [
        ({"rows": "k"}, {"columns": "o"}, 8),
        ({"rows": "k"}, {"rows": "v"}, 8),
        ({"rows": "q", "no_bias": "q"}, {"rows": "v"}, 8),
        ({"rows": "q"}, {"rows": "v"}, 32),
        ({"rows": "k"}, {}, 32),
        ({"no_bias": "qk"}, {"rows": "v"}, 32),
    ],
)
@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "mpnet"])
def test_which_dimensions_go(name: str, query_key: dict[str, str], value: dict[str, str], head_size: int) -> None:
    model = make(name)
    empty(model, **query_key)
    empty(model, **value)
    assert sizes(check_same(model))[0].head_size == head_size


@pytest.mark.parametrize(
    ("query_key", "head_size"),
    [
        ({"rows": "k"}, 32),  # the bias of the key reads positions
        ({"rows": "k", "no_bias": "k"}, 8),
        ({"rows": "qk"}, 8),
        ({"rows": "q", "no_bias": "q"}, 8),
        ({"rows": "q"}, 32),
    ],
)
def test_which_dimensions_go_when_positions_share_the_matrices(query_key: dict[str, str], head_size: int) -> None:
    model = make("deberta-v2", share_att_key=True)
    empty(model, **query_key)
    empty(model, rows="v")
    assert sizes(check_same(model))[0].head_size == head_size


@torch.no_grad()
def test_positions_with_matrices_of_their_own_keep_a_dimension_alive() -> None:
    model = make("deberta-v2 with own positions")
    empty(model, rows="kv", no_bias="k")
    assert sizes(check_same(model))[0].head_size == 32  # the query meets the positions
    query, _, _, position_key, *_ = model.layers()[0].heads.slots
    dead = torch.tensor([32 * head + d for head in range(3) for d in LOW])
    position_key.linear.weight.index_fill_(0, dead, 0.0)
    assert sizes(check_same(model))[0].head_size == 8
    assert query.linear.weight.any()


@torch.no_grad()
def test_a_constant_value_moves_into_the_bias_behind() -> None:
    """By hand: one head of ones, whose value is its bias of 2 in each of 32 dimensions, read with weight 0.5."""
    model = make("bert")
    _, _, v, o = attention_of(model)
    v.weight[:32] = 0
    v.bias[:32] = 2.0
    o.weight[:, :32] = 0.5
    o.bias.fill_(1.0)
    small = check_same(model)
    assert sizes(small)[0].heads == 2
    assert torch.allclose(attention_of(small)[3].bias, torch.tensor(1.0 + 32 * 2.0 * 0.5).double())


@torch.no_grad()
def test_a_constant_neuron_moves_into_the_bias_behind() -> None:
    model = make("bert", hidden_act="relu")
    block = model.net.bert.encoder.layer[0]
    rise, fall = block.intermediate.dense, block.output.dense
    rise.weight[:3] = 0
    rise.bias[:3] = torch.tensor([3.0, -5.0, 0.5])
    fall.weight[:, 0], fall.weight[:, 1], fall.weight[:, 2] = 2.0, 7.0, 4.0
    fall.weight[:, 5] = 0
    fall.bias.fill_(1.0)
    small = check_same(model)
    assert sizes(small)[0].neurons == 36
    assert torch.allclose(small.net.bert.encoder.layer[0].output.dense.bias, torch.tensor(1 + 3 * 2 + 0.5 * 4).double())


@torch.no_grad()
def test_a_constant_neuron_stays_without_a_bias_behind() -> None:
    model = make("bert")
    block = model.net.bert.encoder.layer[0]
    block.intermediate.dense.weight[:3] = 0
    block.intermediate.dense.bias[2] = 0
    block.output.dense.bias = None
    assert sizes(check_same(model))[0].neurons == 39


@pytest.mark.parametrize("factor", [0, 1])
@pytest.mark.parametrize("name", ["llama", "modernbert"])
@torch.no_grad()
def test_a_gated_neuron_goes_when_a_factor_is_zero(name: str, factor: int) -> None:
    model = make(name)
    slot = model.layers()[0].neurons.slots[factor]
    slot.linear.weight[slot.start + 3] = 0
    assert sizes(check_same(model))[0].neurons == 23


@torch.no_grad()
def test_a_gated_neuron_with_one_constant_factor_stays_and_with_two_goes() -> None:
    model = make("modernbert", mlp_bias=True)
    for index, expected in ((0, 24), (1, 23)):
        slot = model.layers()[0].neurons.slots[index]
        slot.linear.weight[slot.start + 3] = 0
        assert sizes(check_same(model))[0].neurons == expected


@torch.no_grad()
def test_a_constant_stays_where_no_bias_can_take_it() -> None:
    """Qwen2 has a bias for values and none behind them."""
    model = make("qwen2")
    value, out = model.layers()[0].heads.slots[2:]
    value.linear.weight[:4] = 0
    assert sizes(check_same(model))[0].heads == 2
    out.linear.weight[:, : out.size] = 0
    assert sizes(check_same(model))[0].heads == 1
    model = make("llama", attention_bias=True)
    model.layers()[0].heads.slots[2].linear.weight[:4] = 0
    assert sizes(check_same(model))[0].heads == 1


@torch.no_grad()
def test_a_group_stays_while_one_of_its_queries_is_read() -> None:
    model = make("llama")
    out = model.layers()[0].heads.slots[-1].linear
    out.weight[:, :4] = 0
    assert sizes(check_same(model))[0].heads == 2
    out.weight[:, 4:8] = 0
    small = check_same(model)
    assert sizes(small)[0].heads == 1
    assert small.net.model.layers[0].self_attn.q_proj.weight.shape == (8, 16)


def test_albert_is_sliced_once() -> None:
    model = make("albert", num_hidden_layers=4)
    remove(model.layers()[0].heads, [2])
    assert len(sizes(check_same(model))) == 1


def test_the_scaling_stays() -> None:
    model = make("bert")
    empty(model, rows="kv")
    small = sliced(model)
    ours, theirs = (m.net.bert.encoder.layer[0].attention.self for m in (model, small))
    assert (theirs.attention_head_size, theirs.num_attention_heads, theirs.all_head_size) == (8, 3, 24)
    assert ours.scaling == theirs.scaling == 32**-0.5


# Refused -------------------------------------------------------------------------------------------------------------


def test_unknown_families_and_sliced_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="gpt2 model, whose heads and neurons capcli does not know"):
        sliced(make("gpt2", wide=False))
    small = sliced(make("bert"))
    for action in (sliced, Model.layers):
        with pytest.raises(ConfigError, match="is sliced"):
            action(small)


def test_a_sliced_model_is_no_stock_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is sliced"):
        stock.save_dense(sliced(make("bert")), tmp_path)
    assert not list(tmp_path.iterdir())


# Stored --------------------------------------------------------------------------------------------------------------


Store = Callable[..., tuple[Model, Path]]


@pytest.fixture
def store(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Makes a sliced artefact of a family, with a tokenizer of fewer tokens than the network has rows."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def stored(case: str, keep: int = 0) -> tuple[Model, Path]:
        """keep: neurons of each layer that stay; 0 for all but three of the first."""
        model = make(case)
        model.net.float()
        model.net.config.dtype = torch.float32
        for layer in model.layers() if keep else ():
            remove(layer.neurons, list(range(keep, model.net.config.intermediate_size)))
        for layer in model.layers()[:1]:
            remove(layer.heads, [1])
            remove(layer.neurons, [2, 3, 11])
            if case not in ROTARY:
                for head in range(3):
                    remove_dimensions(layer.heads, head, list(range(9)), list(range(8, 32)))
        small = dataclasses.replace(sliced(model), tokenizer=tokenizer)
        artifact.save_artifact(small, tmp_path, list(small.prunable()), {})
        return small, tmp_path

    return stored


@pytest.mark.parametrize("case", CASES)
def test_stored_and_loaded(store: Store, case: str) -> None:
    small, out = store(case)
    again = artifact.load_artifact(out)
    assert again.slices == small.slices and again.is_sliced
    assert again.before_slicing == small.before_slicing
    assert torch.equal(outputs(small), outputs(again))
    ours, theirs = small.net.state_dict(), again.net.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.encoder_parameters() == small.encoder_parameters()
    assert again.before_slicing.prunable > sum(linear.weight.numel() for linear in again.prunable().values())
    stored = {entry.name: tuple(entry.shape) for entry in reader.inspect(out / WEIGHTS_FILE)}
    assert stored == {name: tuple(tensor.shape) for name, tensor in ours.items()}


def test_a_network_of_which_little_is_left(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be many times as large by its configuration as what is stored; without slices that is refused."""
    monkeypatch.setitem(WIDE, "intermediate_size", 12_000)
    monkeypatch.setattr(slicing, "NEURON_STEP", 8)
    small, out = store("bert", keep=20)
    assert small.before_slicing.prunable > 20 * sum(matrix.weight.numel() for matrix in small.prunable().values())
    assert torch.equal(outputs(artifact.load_artifact(out)), outputs(small))
    settings = json.loads((out / CONFIG_FILE).read_text())
    del settings["sliced"]
    (out / CONFIG_FILE).write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="far more than"):
        artifact.load_artifact(out)


def test_cap_eval(pruned: Path, tmp_path: Path) -> None:
    """The tiny run of the default method, whose first layer loses a head and some neurons."""
    model = artifact.load_artifact(pruned)
    remove(model.layers()[0].heads, [0])
    remove(model.layers()[0].neurons, list(range(20)))
    given = ("model_config", "sliced", "labels", "kind", "format_version")
    settings = {k: v for k, v in json.loads((pruned / CONFIG_FILE).read_text()).items() if k not in given}
    settings["source"] = artifact.stored_source(str(pruned))
    results = {}
    for name, one in {"masked": model, "sliced": sliced(model)}.items():
        artifact.save_artifact(one, tmp_path / name, list(one.prunable()), settings)
        source = TaskConfig(**artifact.stored_source(str(tmp_path / name)))
        results[name] = capcli.evaluate(EvalConfig(source=source, model=str(tmp_path / name)))
    ours, theirs = results["masked"], results["sliced"]
    assert ours["metrics"] == pytest.approx(theirs["metrics"])
    assert 0.7 < ours["sparsity"]["achieved"] <= theirs["sparsity"]["achieved"] < 0.9
    assert ours["size"]["dense_bytes"] == theirs["size"]["dense_bytes"]


FIRST = "bert.encoder.layer.0"
SECOND = "bert.encoder.layer.1"
FULL = {"heads": 3, "head_size": 32, "neurons": 40}
CUT = {"heads": 2, "head_size": 24, "neurons": 37}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (None, f"sliced must hold exactly {FIRST}, {SECOND}, holds None"),
        ([], "sliced must hold exactly"),
        ({}, "sliced must hold exactly"),
        ({FIRST: CUT}, "sliced must hold exactly"),
        ({FIRST: CUT, SECOND: FULL, "bert.encoder.layer.2": FULL}, "sliced must hold exactly"),
        ({FIRST: CUT, SECOND: 3}, f"{SECOND} must hold exactly heads, head_size, neurons, holds 3"),
        ({FIRST: CUT, SECOND: {"heads": 3}}, f"{SECOND} must hold exactly"),
        ({FIRST: CUT, SECOND: FULL | {"more": 1}}, f"{SECOND} must hold exactly"),
        ({FIRST: CUT, SECOND: FULL | {"heads": 0}}, f"{SECOND}: heads must be an integer from 1 to 3, is 0"),
        ({FIRST: CUT, SECOND: FULL | {"heads": 4}}, f"{SECOND}: heads must be an integer from 1 to 3, is 4"),
        ({FIRST: CUT, SECOND: FULL | {"heads": True}}, f"{SECOND}: heads must be an integer from 1 to 3, is True"),
        ({FIRST: CUT, SECOND: FULL | {"head_size": 33}}, "head_size must be an integer from 1 to 32, is 33"),
        ({FIRST: CUT, SECOND: FULL | {"head_size": 8.0}}, "head_size must be an integer from 1 to 32, is 8.0"),
        ({FIRST: CUT, SECOND: FULL | {"neurons": "40"}}, "neurons must be an integer from 1 to 40, is '40'"),
        ({FIRST: CUT, SECOND: FULL | {"neurons": -(10**30)}}, "neurons must be an integer from 1 to 40"),
    ],
)
def test_malformed_sizes_are_refused(store: Store, sizes: Any, expected: str) -> None:
    _, out = store("bert")
    path = out / CONFIG_FILE
    settings = json.loads(path.read_text())
    assert settings["sliced"] == {FIRST: CUT, SECOND: FULL}
    files.write_json(path, settings | {"sliced": sizes})
    with pytest.raises(FileError) as caught:
        artifact.load_artifact(out)
    assert caught.value.message.startswith(f"{path}: ")
    assert expected in caught.value.message


def test_sizes_that_are_not_those_of_the_weights_are_refused(store: Store) -> None:
    _, out = store("bert")
    path = out / CONFIG_FILE
    settings = json.loads(path.read_text())
    for other in ({FIRST: FULL, SECOND: FULL}, {FIRST: CUT | {"neurons": 36}, SECOND: FULL}):
        files.write_json(path, settings | {"sliced": other})
        with pytest.raises(ModelError, match="of another shape"):
            artifact.load_artifact(out)
    del settings["sliced"]
    files.write_json(path, settings)
    with pytest.raises(ModelError, match="of another shape"):
        artifact.load_artifact(out)


@pytest.mark.parametrize(("name", "field"), [("llama", "head_size"), ("modernbert", "head_size"), ("mpnet", "heads")])
def test_what_a_family_cannot_cut_is_refused(store: Store, name: str, field: str) -> None:
    _, out = store(name)
    path = out / CONFIG_FILE
    settings = json.loads(path.read_text())
    next(iter(settings["sliced"].values()))[field] -= 1
    files.write_json(path, settings)
    with pytest.raises(FileError, match=f"{field} must be an integer from"):
        artifact.load_artifact(out)


def test_unknown_families_have_no_sizes(store: Store) -> None:
    _, out = store("bert")
    path = out / CONFIG_FILE
    settings = json.loads(path.read_text())
    settings["model_config"] = json.loads(registry.config_of("gpt2", 50, num_labels=3).to_json_string(use_diff=False))
    files.write_json(path, settings)
    with pytest.raises(FileError, match="gpt2"):
        artifact.load_artifact(out)


@pytest.mark.parametrize("name", ROWS)
def test_a_network_that_waits_for_its_tensors_has_all_others(name: str) -> None:
    """What is computed and not stored, such as position ids and frequencies, is as in a network that is drawn."""
    config = registry.config_of(name, 50, num_labels=3)
    drawn, waiting = (
        hf.auto_class("classification").from_config(config),
        artifact.empty_network(config, "classification", altered.Altered()),
    )
    ours, theirs = dict(drawn.named_buffers()), dict(waiting.named_buffers())
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[buffer], theirs[buffer]) for buffer in ours if buffer not in drawn.state_dict())
    assert list(drawn.state_dict()) == list(waiting.state_dict())
    assert len(list(drawn.parameters())) == len(list(waiting.parameters()))  # tied ones count once
