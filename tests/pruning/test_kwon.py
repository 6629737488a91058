"""Heads and neurons under a budget: gate gradients, the search, the swaps and the costs, against slow loops."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from capcli.config.prune import PruneConfig
from capcli.config.task import TaskConfig
from capcli.data import batches
from capcli.data.batches import Examples
from capcli.errors import ConfigError
from capcli.models import loading, predict, slicing, task_losses
from capcli.models.model import Model
from capcli.pruning import costs, pruner, search, speed, structures
from capcli.pruning.calibration import FISHER_BATCH, Calibration
from capcli.pruning.costs import FINE, Costs, Measure, Speeds
from capcli.pruning.criteria import kwon
from capcli.pruning.topk import kept_count

Make = Callable[..., Path]
CPU = torch.device("cpu")
LAYERS, HEADS, NEURONS = 2, 4, 24
HEAD, NEURON = 4 * 4 * 16, 2 * 16  # weights
SPEEDS = Speeds(heads=[(1, 0.7), (4, 1.0)], neurons=[(8, 0.5), (24, 1.0)], least=0.2)


def tiny(checkpoint: Make, family: str = "bert") -> Model:
    return loading.load_dense(str(checkpoint(family)), None, "classification", 1)


def calibrated(model: Model, n: int = 20) -> Calibration:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 10, n)
    examples = Examples(
        tokens=rng.integers(5, 200, lengths.sum()),
        types=None,
        offsets=np.concatenate([[0], lengths.cumsum()]),
        labels=rng.integers(0, 2, n),
        pad_id=0,
    )
    return Calibration(model=model, examples=examples, device=CPU, seed=3, count=n)


def made(model: Model, measure: Measure = costs.WEIGHTS, **options: Any) -> pruner.Pruner:
    """The pruner of a run without training."""
    chosen = {"method": "structured", "epochs": 0, "dense_share": 0.0, "sparsity": 0.5, **options}
    config = PruneConfig(source=TaskConfig(task="mr"), **chosen)
    return pruner.make_pruner(model, config, 0, calibrated(model), measure)


# Fisher information of gates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "distilbert"])
def test_importance_adds_up_the_squares_of_real_gates(checkpoint: Make, family: str) -> None:
    """Of each small batch, the last of which is not full; gates of 1 before the readers of a copy."""
    model = tiny(checkpoint, family)
    plain, found = copy.deepcopy(model), made(model)
    found.criterion.prepare(found.state, found.subject, 0)  # type: ignore[misc]
    names = {id(module): name for name, module in plain.net.named_modules()}
    layers = plain.layers()
    units = [layer.heads for layer in layers] + [layer.neurons for layer in layers]
    places = [(names[id(part.reader)], part.reader.in_features // part.count) for part in units]
    wanted, calibration = torch.zeros(found.structure.count()), calibrated(plain)
    for number, batch in enumerate(calibration.drawn(0, FISHER_BATCH)):
        gated = copy.deepcopy(plain)

        def loss(net: Any, gated: Model = gated, batch: Any = batch) -> torch.Tensor:
            logits, _ = predict.forward(gated, batch.inputs)
            return task_losses.task_loss(logits, batch.labels, gated.kind, batch.inputs["attention_mask"])

        gates = torch.cat(reference.gate_gradients(gated.net.eval(), places, loss))
        assert torch.allclose(found.state["gates"][number].abs(), gates, rtol=1e-3, atol=1e-7)
        wanted += gates.square()
    assert number == 2
    scores = kwon.scores(found.state, found.subject)
    assert torch.allclose(scores, wanted, rtol=2e-3, atol=1e-12)
    assert (scores > 0).all()


def test_dimensions_have_gates_on_queries_and_readers(checkpoint: Make) -> None:
    model = tiny(checkpoint)
    plain, found = copy.deepcopy(model), made(model, structure="dimensions")
    found.criterion.prepare(found.state, found.subject, 0)  # type: ignore[misc]
    names = {id(module): name for name, module in plain.net.named_modules()}
    layers = plain.layers()
    queries = [names[id(layer.query_key.slots[0].linear)] for layer in layers if layer.query_key is not None]
    (batch, *_) = calibrated(plain).drawn(0, FISHER_BATCH)

    def loss(net: Any) -> torch.Tensor:
        logits, _ = predict.forward(plain, batch.inputs)
        return task_losses.task_loss(logits, batch.labels, plain.kind, batch.inputs["attention_mask"])

    plain.net.eval()
    wanted = reference.output_gate_gradients(plain.net, queries, loss)
    rows = found.state["gates"][0].abs().view(LAYERS, -1)
    for row, gates in zip(rows, wanted, strict=True):
        assert torch.allclose(row[: len(gates)], gates, rtol=1e-3, atol=1e-7)


# Search --------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_split_is_the_best_of_all_subsets(data: st.DataObject) -> None:
    """2 layers with 2 heads and 3 neurons: 1,024 subsets, of which none within the budget has a larger sum."""
    head, neuron = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    found = Costs(layers=2, heads=np.full(2, head), neurons=np.full(3, neuron))
    worth = data.draw(st.lists(st.integers(0, 8), min_size=10, max_size=10))
    alive = np.array(data.draw(st.lists(st.booleans(), min_size=10, max_size=10)))
    groups = [[0, 1], [2, 3], [4, 5, 6], [7, 8, 9]]
    alive[[group[0] for group in groups]] |= ~np.array([alive[group].any() for group in groups])
    budget = data.draw(st.integers(found.least, found.total))
    chosen = search.split(np.array(worth, dtype=float), alive, found, budget)
    assert not (chosen & ~alive).any()
    assert found.of(chosen) <= budget
    assert found.of(chosen) == head * chosen[:4].sum() + neuron * chosen[4:].sum()
    assert all(chosen[group].any() for group in groups)
    wanted = reference.best_split(worth, alive.tolist(), [head] * 4 + [neuron] * 6, groups, budget)
    assert chosen @ np.array(worth, dtype=float) == wanted


def test_heads_and_neurons_are_not_removed_in_the_same_ratio() -> None:
    """Heads of 4 and neurons of 1: with 11 of 16 left, all heads stay where they matter, and one of each where not."""
    found = Costs(layers=1, heads=np.full(2, 4), neurons=np.full(8, 1))
    everything, neurons = np.ones(10, dtype=bool), np.arange(8.0)
    important = search.split(np.array([50.0, 40.0, *neurons]), everything, found, 11)
    assert important.tolist() == [True, True] + [False] * 5 + [True] * 3
    useless = search.split(np.array([1.0, 2.0, *neurons]), everything, found, 11)
    assert useless.tolist() == [False, True] + [False] + [True] * 7


def test_units_that_cost_less_the_more_there_are_stay_within_the_budget() -> None:
    """The k-th head of a layer costs its own step; what is counted is what the table says of the result."""
    rng = np.random.default_rng(1)
    found = Costs(layers=3, heads=np.array([5, 1, 3, 2]), neurons=np.array([4, 0, 1, 2, 1]), fixed=7)
    for budget in range(found.least, found.total + 1):
        chosen = search.split(rng.random(27), np.ones(27, dtype=bool), found, budget)
        by_hand = 7 + sum(sum([5, 1, 3, 2][: row.sum()]) for row in chosen[:12].reshape(3, 4))
        by_hand += sum(sum([4, 0, 1, 2, 1][: row.sum()]) for row in chosen[12:].reshape(3, 5))
        assert found.of(chosen) == by_hand <= budget
    assert chosen.all()


def test_of_equal_units_the_lower_index_stays() -> None:
    found = Costs(layers=2, heads=np.full(3, 1), neurons=np.full(3, 1))
    chosen = search.split(np.ones(12), np.ones(12, dtype=bool), found, 7)
    assert chosen.astype(int).tolist() == [1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0]


# Rearrangement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0, 1, 4, 7, 9])
def test_swaps_are_those_of_the_slow_loop_and_never_lose_more(seed: int, keep: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    vectors = torch.randn(9, 5, generator=rng, dtype=torch.float64)
    kept = torch.zeros(9, dtype=torch.bool)
    kept[vectors.square().sum(dim=1).sort(descending=True).indices[:keep]] = True
    found = search.swapped(vectors, kept)
    assert int(found.sum()) == keep
    assert set((~found).nonzero()[:, 0].tolist()) == reference.rearranged(vectors.tolist(), keep)
    lost = [reference.lost_together(vectors[~mask].tolist()) for mask in (found, kept)]
    assert lost[0] <= lost[1] + 1e-12


def test_units_that_make_up_for_one_another_go_together() -> None:
    """The two smallest, 1 and 1.1, add up; 1.1 and -1.2 all but cancel, though -1.2 alone matters more than 1."""
    vectors = torch.tensor([[1.0], [1.1], [-1.2], [5.0]]).double()
    assert search.swapped(vectors, torch.tensor([False, False, True, True])).tolist() == [True, False, False, True]


@pytest.mark.parametrize("structure", ["heads", "dimensions"])
def test_units_change_places_in_their_layer_and_head_alone(checkpoint: Make, structure: str) -> None:
    """As many stay of each kind, layer and head; what was removed before does not come back."""
    found = made(tiny(checkpoint), structure=structure)
    rng = torch.Generator().manual_seed(2)
    alive = torch.rand(found.structure.count(), generator=rng) < 0.8
    chosen = alive & (torch.rand(len(alive), generator=rng) < 0.6)
    gates = torch.randn(6, len(alive), generator=rng)
    groups = search.groups_of(found.structure)
    after = search.rearranged(gates, chosen, alive, groups)
    assert not torch.equal(after, chosen)
    assert not (after & ~alive).any()
    parts = [[part] * LAYERS for part in ((HEADS,), (NEURONS,))]
    if structure == "dimensions":
        parts = [[(4,) * HEADS, (4,) * HEADS, (NEURONS,)] * LAYERS]
    sizes = [size for kind in parts for layer in kind for size in layer]
    assert sorted(map(len, groups)) == sorted(sizes)
    for before, now in zip(chosen.split(sizes), after.split(sizes), strict=True):
        assert before.sum() == now.sum()
    lost = [gates[:, alive & ~mask].sum(dim=1).square().sum() for mask in (after, chosen)]
    assert lost[0].isfinite()


# Costs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
@pytest.mark.parametrize("length", [3, 12])
def test_multiply_adds_are_those_of_a_sliced_network(checkpoint: Make, family: str, length: int) -> None:
    """Counted by PyTorch, of matrices and attention, for texts of two lengths."""
    model = tiny(checkpoint, family)
    layers = model.layers()
    assert model.family is not None
    full = slicing.sizes(model.net, model.family)
    left = {name: dataclasses.replace(size, heads=1 + i, neurons=5 + i) for i, (name, size) in enumerate(full.items())}
    small = copy.deepcopy(model)
    slicing.shape(small.net, model.family, left)
    before, after = (_counted(one, length) for one in (model, small))
    gone = sum(
        (whole.heads - one.heads) * layer.heads.macs(length)
        + (whole.neurons - one.neurons) * layer.neurons.macs(length)
        for whole, one, layer in zip(full.values(), left.values(), layers, strict=True)
    )
    assert before - after == length * gone
    found = costs.costs_of(layers, Measure(length=length))
    assert found.total == sum(
        units.count * units.macs(length) for layer in layers for units in (layer.heads, layer.neurons)
    )


def _counted(model: Model, length: int) -> int:
    """Multiply-adds of one text of `length` tokens, by hooks on the products of PyTorch."""
    inputs = {"input_ids": torch.full((1, length), 7), "attention_mask": torch.ones(1, length, dtype=torch.long)}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        predict.forward(model, inputs)
    return int(counter.get_total_flops()) // 2


def test_a_dimension_costs_its_share_of_the_head(checkpoint: Make) -> None:
    for layer in tiny(checkpoint).layers():
        assert layer.query_key is not None
        assert layer.value_output is not None
        parts = [layer.query_key, layer.value_output]
        assert sum(part.count * part.macs(50) for part in parts) == layer.heads.count * layer.heads.macs(50)
        assert [part.macs(50) - part.weights for part in parts] == [50, 50]


def test_times_are_linear_between_what_was_measured() -> None:
    """Two layers: all heads are 30 % of the time beyond the first, 10 % each; neurons 50 % from the eighth on."""
    layers = [structure_layer()] * 2
    found = costs.costs_of(layers, Measure(speeds=SPEEDS))
    assert found.kind == "latency"
    assert found.heads.tolist() == [0, *[FINE // 20] * 3]
    assert found.neurons[:8].tolist() == [0] * 8
    assert found.neurons[8:].sum() == FINE // 4
    assert abs(found.neurons[8:] - FINE / 64).max() <= 1
    assert found.fixed == FINE // 5
    assert found.total == FINE
    faster = costs.costs_of(layers, Measure(speeds=dataclasses.replace(SPEEDS, least=0.1)))
    assert faster.heads.tolist() == [0, *[round(9 / 8 * FINE / 20)] * 3]
    assert faster.fixed == FINE // 10
    noisy = dataclasses.replace(SPEEDS, heads=[(1, 0.9), (2, 0.7), (4, 1.0)], least=0.2)
    assert costs.costs_of(layers, Measure(speeds=noisy)).heads.tolist() == [0, 0, *[3 * FINE // 40] * 2]


def structure_layer() -> Any:
    """A layer of 4 heads and 24 neurons of which nothing else is asked."""
    from capcli.models.families import Layer, Units

    return Layer(heads=Units(count=HEADS, slots=()), neurons=Units(count=NEURONS, slots=()))


@pytest.mark.parametrize(
    ("options", "measure", "message", "hint"),
    [
        (
            {"sparsity": 0.98},
            costs.WEIGHTS,
            "structured pruning cannot reach sparsity 0.98: one head and one neuron per layer must stay, which allows "
            "at most 0.8392",
            "use --structure dimensions",
        ),
        (
            {"target": "macs=0.1", "sparsity": 0.9},
            Measure(length=10),
            "--target macs=0.1 cannot be met: one head and one neuron per layer must stay",
            "the nearest is --target macs=0.1743",
        ),
        (
            {"target": "latency=8x", "sparsity": 0.875},
            Measure(speeds=SPEEDS),
            "--target latency=8x cannot be met: one head and one neuron per layer must stay",
            "the nearest is --target latency=5x",
        ),
    ],
    ids=["sparsity", "macs", "latency"],
)
def test_a_budget_that_cannot_be_met_names_the_nearest(
    checkpoint: Make, options: dict[str, Any], measure: Measure, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        made(tiny(checkpoint), measure, **options)
    assert refused.value.message == message
    assert refused.value.hint.startswith(hint)


def test_the_nearest_can_be_met(checkpoint: Make) -> None:
    found = made(tiny(checkpoint), Measure(length=10), target="macs=0.1743", sparsity=0.8257, stairs="once")
    found.update(0)
    assert found.alive.view(-1)[: LAYERS * HEADS].sum() == LAYERS
    assert costs.left(found.structure.units, found.alive, 10).macs <= 0.1743


# The pruner ----------------------------------------------------------------------------------------------------------


def test_a_run_keeps_within_the_count_at_each_stair(checkpoint: Make) -> None:
    """Within a neuron of the weights that may stay, or a head where no neuron is left to fill up with; units stay
    removed, and the mask is that of whole units."""
    found = made(tiny(checkpoint), sparsity=0.8, stairs="0.3,0.5,0.8", refit=True)
    before, total = found.alive.clone(), LAYERS * (HEADS * HEAD + NEURONS * NEURON)
    for step, sparsity in enumerate((0.3, 0.5, 0.8)):
        found.update(step)
        kept, wanted = found.matrices.kept(), kept_count(sparsity, total)
        assert wanted - (HEAD if step else NEURON) < kept <= wanted
        assert kept == HEAD * found.alive[: LAYERS * HEADS].sum() + NEURON * found.alive[LAYERS * HEADS :].sum()
        assert not (found.alive & ~before).any()
        before = found.alive.clone()
        assert set(found.state) == {"errors"}
    fitted = [name for name, error in found.errors.items() if error > 0]
    assert len(fitted) == 2 * LAYERS  # the matrices that read heads and neurons


def test_dimensions_count_multiply_adds(checkpoint: Make) -> None:
    """The ranking is by importance per multiply-add, to within half a unit of the budget."""
    model = tiny(checkpoint)
    found = made(model, Measure(length=50), structure="dimensions", target="macs=0.4", sparsity=0.6, stairs="once")
    assert isinstance(found.structure, structures.Dimensions)
    units = found.structure.units
    assert found.structure.table.weights.tolist() == [one.macs(50) for one in units for _ in range(one.count)]
    found.update(0)
    whole = sum(one.count * one.macs(50) for one in units)
    reached = costs.left(units, found.alive, 50).macs
    assert abs(reached - 0.4) * whole <= max(one.macs(50) for one in units) / 2
    other = made(tiny(checkpoint), structure="dimensions", target="params=0.4", sparsity=0.6, stairs="once")
    other.update(0)
    assert not torch.equal(other.alive, found.alive)


def test_speeds_are_measured_of_smaller_layers(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes from the least to all; the model is left as it was."""
    monkeypatch.setattr(speed, "ROUNDS", 2)
    model = loading.load_dense(str(checkpoint("bert")), None, "classification", 1)
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    work, done = speed.speeds(model, 6), []
    while True:
        try:
            done.append(next(work))
        except StopIteration as stop:
            found = stop.value
            break
    assert [n for n, _ in found.heads] == [1, 2, 3, 4]
    assert [n for n, _ in found.neurons] == [8, 16, 24]
    assert found.heads[-1][1] == found.neurons[-1][1] == 1.0
    assert all(share > 0 for _, share in (*found.heads, *found.neurons))
    assert done[-1] == (12, 12)
    assert found.least > 0
    assert all(tensor.equal(before[name]) for name, tensor in model.net.state_dict().items())


def test_texts_in_the_middle_decide_the_length() -> None:
    examples = calibrated(None).examples  # type: ignore[arg-type]
    assert costs.median_length(examples) == int(np.median(examples.lengths))
    assert batches.taken(examples, np.arange(1)).lengths[0] == examples.lengths[0]
