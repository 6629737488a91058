"""Heads that are turned before pruning: the network computes what it did, and its dimensions are sorted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import registry
import torch
from tiny import Tiny, outcome, random_examples
from torch import Tensor

from capcli.data import batches
from capcli.data.batches import Examples
from capcli.errors import ConfigError
from capcli.models import families, hf, predict
from capcli.models.model import Model
from capcli.pruning import basis
from capcli.pruning.calibration import Calibration

WITH_DIMENSIONS = [name for name, row in registry.ROWS.items() if row.structured and row.dimensions]
CASES = [*WITH_DIMENSIONS, "deberta-v2 with own positions", "deberta-v2 with own keys"]
CHANGES: dict[str, dict[str, Any]] = {
    "with own positions": {"share_att_key": False},
    "with own keys": {"share_att_key": False, "pos_att_type": ["c2p"]},
}
SETTINGS = {"method": "first-order", "structure": "dimensions", "basis": "pca", "sparsity": 0.6, "epochs": 2}


def make(case: str) -> Model:
    """A random classifier, biases too, without a tokenizer."""
    name, _, change = case.partition(" ")
    torch.manual_seed(0)
    config = registry.config_of(name, 50, num_labels=3, **CHANGES.get(change, {}))
    net = hf.auto_class("classification").from_config(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return Model(
        net=net,
        tokenizer=None,
        family=families.FAMILIES[name],
        labels=("x", "y", "z"),
        kind="classification",
        source="f",
    )


def examples(n: int = 24, *, words: int = 40, most: int = 10) -> Examples:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, most, n)
    return Examples(
        tokens=rng.integers(5, 5 + words, lengths.sum()),
        types=None,
        offsets=np.concatenate([[0], lengths.cumsum()]),
        labels=rng.integers(0, 2, n),
        pad_id=0,
    )


def calibrated(model: Model, found: Examples) -> Calibration:
    return Calibration(model=model, examples=found, device=torch.device("cpu"), seed=3, count=len(found))


@torch.no_grad()
def logits(model: Model) -> Tensor:
    """On texts that are not those of the calibration."""
    return predict.forward(model, batches.collate(random_examples(6, 12), np.arange(6), torch.device("cpu")).inputs)[0]


@torch.no_grad()
def head_outputs(model: Model, found: Examples) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each layer: queries, keys and values [T, A, D], of one example after another, so that nothing is padded."""
    seen: dict[torch.nn.Module, list[Tensor]] = {}

    def look(module: torch.nn.Module, args: Any, output: Tensor) -> None:
        seen.setdefault(module, []).append(output)

    chosen = [
        [layer.query_key.slots[0], layer.query_key.slots[1], layer.value_output.slots[0]] for layer in model.layers()
    ]
    hooks = [slot.linear.register_forward_hook(look) for slots in chosen for slot in slots]
    parts: dict[torch.nn.Module, list[Tensor]] = {slot.linear: [] for slots in chosen for slot in slots}
    for row in range(len(found)):
        seen.clear()
        predict.forward(model, batches.collate(found, np.array([row]), torch.device("cpu")).inputs)
        for module, outputs in seen.items():
            parts[module] += [y[0] for y in outputs if y.shape[1] == found.lengths[row]]
    for hook in hooks:
        hook.remove()
    n = model.layers()[0].heads.count
    return [tuple(torch.cat(parts[slot.linear]).unflatten(-1, (n, -1)).double() for slot in slots) for slots in chosen]  # type: ignore[misc]


@pytest.mark.parametrize("case", CASES)
def test_nothing_that_is_computed_changes(case: str) -> None:
    """In every family, biases and projections of positions included."""
    model = make(case)
    before, weights = logits(model), {name: t.clone() for name, t in model.net.state_dict().items()}
    basis.rotate(model, calibrated(model, examples()))
    assert (logits(model) - before).abs().max() < 2e-5 * before.abs().max()
    changed = {name for name, t in model.net.state_dict().items() if not torch.equal(t, weights[name])}
    turned = {slot.linear for layer in model.layers() for slot in layer.heads.slots}
    readers = {layer.heads.reader for layer in model.layers()}
    linears = dict(model.net.named_modules())
    assert {linears[name.rpartition(".")[0]] for name in changed} == turned
    assert not any(linears[name.rpartition(".")[0]] in readers for name in changed if name.endswith("bias"))


@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v2"])
def test_dimensions_are_sorted_by_what_they_carry(name: str) -> None:
    """On the examples of the calibration: values are uncorrelated, queries and keys too, and both of the same size."""
    model, found = make(name), examples()
    basis.rotate(model, calibrated(model, found))
    for queries, keys, values in head_outputs(model, found):
        seconds = [torch.einsum("tad,tae->ade", y, y) for y in (queries, keys, values)]
        for second in seconds:
            energy = second.diagonal(dim1=-2, dim2=-1)
            assert (second - torch.diag_embed(energy)).abs().max() < 1e-4 * energy.max()
            assert bool((energy.diff(dim=-1) <= 1e-5 * energy.max()).all())
        assert torch.allclose(seconds[0], seconds[1], rtol=1e-3, atol=1e-4 * float(seconds[0].max()))


def test_the_parts_of_scores_and_values_are_those_of_the_slow_loop() -> None:
    """Whatever the signs of axes are: what each dimension adds to a score, and to the output."""
    model, found = make("bert"), examples()
    before = head_outputs(model, found)
    basis.rotate(model, calibrated(model, found))
    layer, (queries, keys, values) = 0, head_outputs(model, found)[0]
    for head in range(queries.shape[1]):
        q, k, v = (y[:, head].T.numpy() for y in before[layer])
        a, b, turn = reference.turned_head(q, k, v)
        wanted = np.einsum("dt,du->dtu", a @ q, b @ k)
        ours = np.einsum("td,ud->dtu", queries[:, head].numpy(), keys[:, head].numpy())
        assert np.allclose(ours, wanted, atol=1e-4 * np.abs(wanted).max())
        assert np.allclose(np.abs(values[:, head].T.numpy()), np.abs(turn @ v), atol=1e-4 * np.abs(v).max())


@pytest.mark.parametrize("words", [1, 2])
def test_a_calibration_that_sees_few_directions(words: int) -> None:
    """Fewer than a head has: the others stay usable, and texts with other words get the same answers."""
    model = make("bert")
    before = logits(model)
    basis.rotate(model, calibrated(model, examples(8, words=words, most=4)))
    assert (logits(model) - before).abs().max() < 1e-3 * before.abs().max()


def test_a_head_that_computes_nothing_stays_as_it_is() -> None:
    model = make("bert")
    layer = model.layers()[0]
    with torch.no_grad():
        for slot in (*layer.query_key.slots, layer.value_output.slots[0]):  # type: ignore[union-attr]
            for parameter in (slot.linear.weight, slot.linear.bias):
                parameter[:4] = 0.0
    before = logits(model)
    basis.rotate(model, calibrated(model, examples()))
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5)


# Runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_writes_the_same_bytes(tiny: Tiny, tmp_path: Path) -> None:
    """Those of the model's own basis are others, of as many weights."""
    chosen = {**SETTINGS, "checkpoint_seconds": 0}
    whole = tiny.prune(tmp_path / "whole", **chosen)
    tiny.stop(tmp_path / "out", "6/10, ", **chosen)
    tiny.prune(tmp_path / "out", **chosen)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
    own = tiny.prune(tmp_path / "own", **{**chosen, "basis": "own"})
    assert own["sparsity"]["kept_weights"] == whole["sparsity"]["kept_weights"]
    assert outcome(tmp_path / "own") != outcome(tmp_path / "whole")


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (
            {"method": "cap-m", "structure": "heads"},
            "--basis pca is for dimensions inside heads, cap-m removes single weights",
        ),
        ({"structure": "heads"}, "--basis pca is for dimensions inside heads, first-order removes whole heads"),
        ({"basis": "svd"}, "unknown basis 'svd'"),
    ],
    ids=str,
)
def test_where_there_are_no_dimensions(tiny: Tiny, tmp_path: Path, chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny.prune_config(tmp_path, **{**SETTINGS, **chosen})


@pytest.mark.parametrize("name", ["modernbert", "llama"])
def test_rotated_positions_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot turn the heads of {name}, in which positions are rotated"):
        basis.check(make(name))
    basis.check(make("bert"))
