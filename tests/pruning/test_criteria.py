"""Criteria and the pruner: what a weight or a group is worth, and what a few real steps leave."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import registry
import torch
import torch.nn.functional as F

from capcli.config.names import METHODS
from capcli.config.prune import PruneConfig
from capcli.config.task import TaskConfig
from capcli.data import batches
from capcli.data.batches import Examples
from capcli.errors import ConfigError
from capcli.models import families, loading, predict
from capcli.models.model import Model
from capcli.pruning import losses, masked, pruner, structures, topk
from capcli.pruning.calibration import Calibration
from capcli.pruning.criteria import CRITERIA, first_order, movement
from capcli.pruning.criteria.seat import Step

Make = Callable[..., Path]
PRUNABLE = 2 * (4 * 16 * 16 + 2 * 16 * 24)
HEAD, NEURON = 4 * 4 * 16, 2 * 16
BY_CRITERION = {
    "magnitude": "magnitude",
    "movement": "cap-m",
    "soft-movement": "cap-soft",
    "smp": "smp",
    "first-order": "cap-f",
    "platon": "platon",
    "pins": "cap-pins",
    "fisher": "fisher",
}
LAYERWISE = {"wanda", "multiflow", "sparsegpt", "sds"}  # cut at once, see test_one_shot


def tiny(checkpoint: Make, family: str = "bert") -> Model:
    return loading.load_dense(str(checkpoint(family)), None, "classification", 1)


def config(**options: Any) -> PruneConfig:
    return PruneConfig(source=TaskConfig(task="mr"), **{"dense_share": 0.2, "final_share": 0.3, **options})


def made(model: Model, options: PruneConfig, total_steps: int) -> pruner.Pruner:
    """The pruner, with something to calibrate on where it needs that."""
    rng = np.random.default_rng(2)
    tokens, labels, offsets = rng.integers(5, 500, 96), rng.integers(0, 2, 16), np.arange(17) * 6
    examples = Examples(tokens=tokens, types=None, offsets=offsets, labels=labels, pad_id=0)
    cal = Calibration(model=model, examples=examples, device=torch.device("cpu"), seed=1, count=16)
    return pruner.make_pruner(model, options, total_steps, cal)


def batch(seed: int, n: int = 6) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 500, (n, 9), generator=rng)
    lengths = torch.randint(3, 10, (n, 1), generator=rng)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(9) < lengths).long()}
    return inputs, torch.randint(0, 2, (n,), generator=rng)


def loss_of(model: Model, seed: int) -> torch.Tensor:
    inputs, labels = batch(seed)
    return F.cross_entropy(predict.forward(model, inputs)[0], labels)


def steps(model: Model, found: pruner.Pruner, n: int, lr: float = 1e-2) -> list[tuple[float, torch.Tensor]]:
    """Train `n` steps; the sparsity and the mask that held in each."""
    model.net.train()
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=lr)
    seen = []
    for step in range(n):
        torch.manual_seed(step)
        found.update(step)
        loss = loss_of(model, step)
        if found.criterion.regularised:
            loss = loss + losses.score_regulariser(found.matrices.score_views())
        optimizer.zero_grad()
        loss.backward()
        found.observe(Step(number=step, lr=lr))
        optimizer.step()
        seen.append((found.sparsity, found.matrices.mask.bool().clone()))
    return seen


def alive(found: pruner.Pruner) -> tuple[torch.Tensor, torch.Tensor]:
    """The living heads [2, 4] and neurons [2, 24]."""
    return found.alive[:8].view(2, 4), found.alive[8:].view(2, 24)


# Importance ----------------------------------------------------------------------------------------------------------


def real_gates(model: Model, loss: Callable[[Model], torch.Tensor], alive: torch.Tensor | None = None) -> torch.Tensor:
    """abs(dL/dgate) [U] of gates that are really put into a copy of an unpruned model, 0 where not `alive` [U]."""
    gated = copy.deepcopy(model)
    names = {id(module): name for name, module in gated.net.named_modules()}
    layers = gated.layers()
    units = [layer.heads for layer in layers] + [layer.neurons for layer in layers]
    places = [(names[id(part.reader)], part.reader.in_features // part.count) for part in units]
    values = None if alive is None else alive.split([part.count for part in units])
    return torch.cat(reference.gate_gradients(gated.net, places, lambda net: loss(gated), values))


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_importance_is_the_gradient_of_real_gates_also_of_removed_units(
    checkpoint: Make, family: str, sparsity: float
) -> None:
    """A removed head still computes, and its gate of 0 has a gradient: what the layer norm of importance needs."""
    model = tiny(checkpoint, family)
    plain = copy.deepcopy(model)
    found = pruner.make_pruner(model, config(method="first-order", sparsity=sparsity), 10)
    found.state["importance"].copy_(torch.rand(len(found.alive), generator=torch.Generator().manual_seed(1)))
    found.update(9)
    assert bool(found.alive.all()) is (sparsity == 0)
    found.sparsity = -1.0  # so that gradients count
    loss_of(model, 0).backward()
    found.observe(Step(number=0, lr=0.1))
    wanted, importance = real_gates(plain, lambda gated: loss_of(gated, 0), found.alive), found.state["importance"]
    if sparsity == 0:
        importance = importance - torch.rand(len(found.alive), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(importance, wanted, rtol=1e-3, atol=1e-6)
    assert (wanted[~found.alive] > 1e-6).any() or sparsity == 0
    gradients = [linear.parametrizations.weight.original.grad for linear in found.matrices.linears]
    assert not any(bool(g[mask == 0].any()) for g, mask in zip(gradients, found.matrices.matrix_masks(), strict=True))


def test_importance_by_hand() -> None:
    """Two groups of two columns: |1·1 + 2·(-1) + 3·2 + 0·5| = 5 and |(-1) + 0 + 2·(-3) + 1·1| = 6. The mask is no
    matter."""
    linear = torch.nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2, -1, 4], [3, 0, 2, 1]]))
    gradient = torch.tensor([[1.0, -1, 1, 0], [2, 5, -3, 1]])
    matrices = masked.attach({"w": linear}, learned=False, gated={linear})
    matrices.mask[1::2] = 0
    gates = masked.gates_of(linear)
    assert gates is not None
    slots = (families.Slot(linear=linear, axis=1, start=0, size=2),)
    for count, expected in ((2, [5, 6]), (4, [7, 2, 7, 1])):
        linear.weight.backward(gradient)
        assert gates.grad is not None
        units = families.Units(count=count, slots=slots)
        assert first_order.importance([units], [gates.grad]).tolist() == expected
        matrices.forget_gates()
        assert gates.grad is None


def test_importance_is_measured_on_examples_without_dropout(checkpoint: Make) -> None:
    """The sum over batches of abs(dL/dgate) at the weights and masks as they are when the sparsity rises."""
    model = tiny(checkpoint)
    plain = copy.deepcopy(model)
    options = config(method="first-order", sparsity=0.5, importance_examples=6, dense_share=0.0)
    rng = np.random.default_rng(2)
    examples = Examples(
        tokens=rng.integers(5, 500, 96), types=None, offsets=np.arange(17) * 6, labels=rng.integers(0, 2, 16), pad_id=0
    )

    def on_batch(of: Model, one: Any) -> torch.Tensor:
        assert not of.net.training
        return F.cross_entropy(predict.forward(of, one.inputs)[0], one.labels)

    cal = Calibration(
        model=model,
        examples=examples,
        device=torch.device("cpu"),
        seed=1,
        count=6,
        gradient=lambda rows, step, leaves: list(
            torch.autograd.grad(
                on_batch(model, batches.collate(examples, rows, torch.device("cpu"))), leaves, materialize_grads=True
            )
        ),
        batch_size=4,
    )
    found = pruner.make_pruner(model, options, 10, cal)
    assert found.scheduled(0) == pytest.approx(0.1)  # what it knows is measured before the first step
    assert found.measures(0) and not found.observes
    for step in (0, 2):
        drawn = list(cal.drawn(step, 4))
        assert [len(one.labels) for one in drawn] == [4, 2]
        wanted = torch.zeros(len(found.alive))
        for one in drawn:
            plain.net.eval()
            wanted += real_gates(plain, lambda gated, one=one: on_batch(gated, one), found.alive)  # type: ignore[misc]
        assert found.criterion.prepare is not None
        found.criterion.prepare(found.state, found.subject, step)
        assert torch.allclose(found.state["importance"], wanted, rtol=1e-3, atol=1e-6)
        model.net.train()
        found.update(step)
        assert model.net.training
    assert not found.alive.all()
    assert all(parameter.grad is None for parameter in model.net.parameters())


@pytest.mark.parametrize("family", [name for name, row in registry.ROWS.items() if row.structured and row.dimensions])
def test_query_key_importance_is_the_gradient_of_gates_on_the_query(checkpoint: Make, family: str) -> None:
    model = tiny(checkpoint, family)
    gated = copy.deepcopy(model)
    units = [layer.query_key for layer in model.layers()]
    names = {id(module): name for name, module in model.net.named_modules()}
    places = [names[id(part.slots[0].linear)] for part in units if part is not None]
    expected = reference.output_gate_gradients(gated.net, places, lambda net: loss_of(gated, 0))
    loss_of(model, 0).backward()
    for name, wanted in zip(places, expected, strict=True):
        query = model.net.get_submodule(name)
        found = first_order.at_rows(query.weight, query.weight.grad, query.bias, query.bias.grad).abs()
        assert found.shape == (16,)
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-7)
        assert wanted.max() > 1e-6


def test_gradients_at_rows_by_hand() -> None:
    """1·2 + 3·(-1) + 5·2 = 9 and 0 + 2·(-4) + 1·1 = -7."""
    weight, bias = torch.tensor([[1.0, 3], [0, 2]]), torch.tensor([5.0, 1])
    gradient, bias_gradient = torch.tensor([[2.0, -1], [7, -4]]), torch.tensor([2.0, 1])
    assert first_order.at_rows(weight, gradient, bias, bias_gradient).tolist() == [9, -7]


def test_observe_adds_up_absolute_values_of_batches(checkpoint: Make) -> None:
    """Sum over batches of abs(dL/dgate), not abs of the sum; heads and neurons of each layer in its row."""
    model = tiny(checkpoint)
    plain = copy.deepcopy(model)
    found = pruner.make_pruner(model, config(method="first-order", sparsity=0.5), 10)
    expected = torch.zeros(2 * 4 + 2 * 24)
    for seed in range(3):
        model.net.zero_grad()
        loss_of(model, seed).backward()
        found.observe(Step(number=0, lr=0.1))
        expected += real_gates(plain, lambda gated, seed=seed: loss_of(gated, seed))  # type: ignore[misc]
    importance = found.state["importance"]
    assert torch.allclose(importance, expected, rtol=1e-4, atol=1e-8)
    assert (importance > 0).all()
    found.update(9)
    assert not importance.any()  # what was learned before a rise does not decide the next one


def test_a_ranking_averages_importance_over_a_window_of_steps(checkpoint: Make) -> None:
    """40 steps: the window is two of them, so half of the average is that of the last batch."""
    model = tiny(checkpoint)
    plain = copy.deepcopy(model)
    found = pruner.make_pruner(model, config(method="first-order", sparsity=0.5, structure="dimensions"), 40)
    assert first_order.decay_of(40) == 0.5
    expected = torch.zeros(2 * (16 + 16 + 24))
    for seed in range(3):
        for one in (model, plain):
            one.net.zero_grad()
            (4 * loss_of(one, seed)).backward()
        found.observe(Step(number=seed, lr=0.1, scale=4.0))
        batch_of = []
        for layer in plain.layers():
            assert layer.query_key is not None
            query, output, down = layer.query_key.slots[0].linear, layer.heads.reader, layer.neurons.reader
            batch_of += [
                first_order.at_rows(query.weight, query.weight.grad, query.bias, query.bias.grad).abs(),
                *((one.weight * one.weight.grad).sum(dim=0).abs() for one in (output, down)),
            ]
        expected = (expected + torch.cat(batch_of) / 4) / 2
    assert torch.allclose(found.state["importance"], expected, rtol=1e-4)
    found.update(39)
    found.observe(Step(number=0, lr=0.1))  # at the final sparsity nothing is chosen any more
    assert torch.allclose(found.state["importance"], expected, rtol=1e-4)


@pytest.mark.parametrize(("total", "window"), [(5, 1), (400, 20), (10_000, 500), (1_000_000, 500)])
def test_the_window_is_a_share_of_the_run_and_at_most_that_of_the_source(total: int, window: int) -> None:
    assert first_order.decay_of(total) == pytest.approx(1 - 1 / window)


def test_units_of_a_bert(checkpoint: Make) -> None:
    """Per layer 16 query-key and 16 value-output dimensions of 32 weights, four to a head, and 24 neurons of 32."""
    table = structures.unit_table(tiny(checkpoint).layers())
    assert table.weights.tolist() == [32] * 112
    heads = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert table.head.tolist() == [*heads, *heads, *[-1] * 24, *[h + 4 for h in [*heads, *heads]], *[-1] * 24]
    assert table.value.tolist() == 2 * ([False] * 16 + [True] * 16 + [False] * 24)


def test_a_family_without_dimensions_ranks_whole_heads(checkpoint: Make) -> None:
    """Two key-value heads with their four queries, 2·(4 + 2)·4·16 / 2 weights each, and gated neurons."""
    table = structures.unit_table(tiny(checkpoint, "llama").layers())
    assert table.weights.tolist() == 2 * ([(2 * 4 * 4 + 2 * 2 * 4) * 16 // 2] * 2 + [3 * 16] * 24)
    assert set(table.head.tolist()) == {-1}
    assert not table.value.any()


def test_initial_scores_rank_by_magnitude_within_a_matrix(checkpoint: Make) -> None:
    model = tiny(checkpoint)
    found = pruner.make_pruner(model, config(method="cap-soft", score_init="magnitude"), 10)
    assert found.matrices.scores is not None
    for i, part in enumerate(found.matrices.scores.split(found.matrices.sizes)):
        weight = found.matrices.original(i).detach().abs()
        assert float(part.mean()) == pytest.approx(1, rel=1e-5)
        assert torch.allclose(part.view_as(weight), weight / weight.mean())
    zero = pruner.make_pruner(tiny(checkpoint), config(method="cap-soft", score_init="zero"), 10)
    assert zero.matrices.scores is not None
    assert not zero.matrices.scores.any()


def test_initial_scores_of_a_zero_matrix_are_finite() -> None:
    linear = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(linear.weight)
    found = movement.initial_scores(masked.attach({"w": linear}, learned=True))
    assert found.tolist() == [0] * 6


# The pruner ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", BY_CRITERION)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_every_criterion_ends_at_exactly_the_sparsity(checkpoint: Make, criterion: str, family: str) -> None:
    model = tiny(checkpoint, family)
    options = config(method=BY_CRITERION[criterion], sparsity=0.6)
    assert options.criterion == criterion
    found = made(model, options, 12)
    seen = steps(model, found, 12)
    assert [s for s, _ in seen] == sorted(s for s, _ in seen)
    assert seen[0][0] == 0
    assert bool(seen[0][1].all())
    assert seen[-1][0] == 0.6
    structured = found.criterion.structured
    for sparsity, mask in seen:
        wanted = topk.kept_count(sparsity, PRUNABLE)
        assert abs(int(mask.sum()) - wanted) <= (NEURON / 2 if structured else 0), sparsity
    kept = found.matrices.kept()
    model.net.eval()
    before = predict.forward(model, batch(99)[0])[0]
    masked.bake(found.matrices)
    nonzero = sum(int(linear.weight.count_nonzero()) for linear in model.prunable().values())
    assert nonzero == kept
    assert torch.allclose(predict.forward(model, batch(99)[0])[0], before, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "scope", "per_matrix"),
    [
        ("magnitude", "auto", True),
        ("movement", "auto", True),
        ("soft-movement", "auto", False),
        ("magnitude", "global", False),
        ("soft-movement", "matrix", True),
    ],
)
def test_scopes(checkpoint: Make, method: str, scope: str, per_matrix: bool) -> None:
    model = tiny(checkpoint)
    with torch.no_grad():  # matrices of different scale, so that the scopes differ
        for i, linear in enumerate(model.prunable().values()):
            linear.weight.mul_(1 + i)
    chosen = config(method=method, scope=scope, sparsity=0.7, score_init="zero", floor=0.0)
    found = pruner.make_pruner(model, chosen, 10)
    if found.matrices.scores is not None:
        found.matrices.scores.copy_(found.matrices.flat_magnitude())
    found.update(9)
    shares = [float(mask.mean()) for mask in found.matrices.matrix_masks()]
    assert found.matrices.kept() == topk.kept_count(0.7, PRUNABLE)
    assert (max(shares) - min(shares) < 0.01) is per_matrix
    scores = found.matrices.flat_magnitude()
    if not per_matrix:
        assert found.matrices.mask.bool().tolist() == reference.topk(scores.tolist(), found.matrices.kept())


@pytest.mark.parametrize("chosen", [{"method": "magnitude", "scope": "global"}, {"method": "fisher", "refit": False}])
def test_a_global_ranking_empties_no_matrix(checkpoint: Make, chosen: dict[str, Any]) -> None:
    """Of a matrix that nobody needs, the best half per cent of its weights stay: 2 of 256 and 2 of 384."""
    for floor, least in ((0.005, 2), (0.0, 0)):
        model = tiny(checkpoint)
        with torch.no_grad():
            for linear in list(model.prunable().values())[::2]:
                linear.weight.mul_(1e-9)
        found = made(model, config(**chosen, sparsity=0.9, floor=floor), 12)
        for step in range(12):
            found.update(step)
        assert found.matrices.kept() == topk.kept_count(0.9, PRUNABLE)
        assert min(int(mask.sum()) for mask in found.matrices.matrix_masks()) == least


def test_learned_masks_move_and_fixed_masks_stay_while_the_sparsity_holds(checkpoint: Make) -> None:
    for method, moves in (("movement", True), ("magnitude", False)):
        model = tiny(checkpoint)
        found = pruner.make_pruner(model, config(method=method, sparsity=0.5, final_share=0.7, score_init="zero"), 20)
        held = [mask for sparsity, mask in steps(model, found, 20, lr=3e-2) if sparsity == 0.5]
        assert len(held) > 5
        assert {bool(torch.equal(held[0], mask)) for mask in held[1:]} == ({False} if moves else {True})


def test_magnitude_keeps_the_largest_weights_at_the_step_it_prunes(checkpoint: Make) -> None:
    model = tiny(checkpoint)
    found = pruner.make_pruner(model, config(method="magnitude", sparsity=0.9), 10)
    found.update(9)
    for i, mask in enumerate(found.matrices.matrix_masks()):
        weight = found.matrices.original(i).detach().abs().flatten()
        assert mask.flatten().bool().tolist() == reference.topk(weight.tolist(), int(mask.sum()))


def test_structured_masks_agree_between_the_matrices_of_a_layer(checkpoint: Make) -> None:
    model = tiny(checkpoint)
    found = pruner.make_pruner(model, config(method="cap-f", sparsity=0.6), 12)
    seen = steps(model, found, 12)
    for (_, before), (_, after) in itertools.pairwise(seen):
        assert not (after & ~before).any()  # groups only die
    per_layer = [found.matrices.matrix_masks()[i : i + 6] for i in (0, 6)]
    n_heads = n_neurons = 0
    for (query, key, value, output, ffn_in, ffn_out), heads, neurons in zip(per_layer, *alive(found), strict=True):
        rows = heads.repeat_interleave(4).float()
        for mask in (query, key, value):
            assert torch.equal(mask, rows[:, None].expand(16, 16))
        assert torch.equal(output, rows.expand(16, 16))
        assert torch.equal(ffn_in, neurons.float()[:, None].expand(24, 16))
        assert torch.equal(ffn_out, neurons.float().expand(16, 24))
        assert heads.any()
        assert neurons.any()
        n_heads, n_neurons = n_heads + int(heads.sum()), n_neurons + int(neurons.sum())
    assert (n_heads, HEAD * n_heads + NEURON * n_neurons) == (3, found.matrices.kept())


def test_removed_heads_and_neurons_can_be_cut_out(checkpoint: Make) -> None:
    """What the mask leaves of a layer is a smaller layer: the values that removed groups compute reach nothing."""
    model = tiny(checkpoint)
    found = pruner.make_pruner(model, config(method="cap-f", sparsity=0.6), 12)
    steps(model, found, 12)
    masked.bake(found.matrices)
    model.net.eval()
    before = predict.forward(model, batch(5)[0])[0]
    with torch.no_grad():
        for layer, heads, neurons in zip(model.layers(), *alive(found), strict=True):
            dead = ~heads.repeat_interleave(4)
            for slot in layer.heads.slots[:3]:
                slot.linear.bias[dead] += 3
            layer.neurons.slots[0].linear.bias[~neurons] += 3
    assert torch.equal(predict.forward(model, batch(5)[0])[0], before)


DIMENSIONS = {"method": "first-order", "structure": "dimensions"}


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("sparsity", [0.5, 0.95, 0.99])
def test_dimensions_end_at_the_count_and_only_die(checkpoint: Make, family: str, sparsity: float) -> None:
    """The masks hold whole units, nearest to the count at every step; 95 and 99 % can be reached."""
    model = tiny(checkpoint, family)
    found = pruner.make_pruner(model, config(**DIMENSIONS, sparsity=sparsity), 30)
    n = found.matrices.mask.numel()
    seen = steps(model, found, 30)
    for (_, before), (_, after) in itertools.pairwise(seen):
        assert not (after & ~before).any()
    table = found.structure.table
    for held, mask in seen:
        assert abs(int(mask.sum()) - topk.kept_count(held, n)) <= int(table.weights.max()) / 2
    kept = int(table.weights[found.alive].sum())
    assert seen[-1][0] == sparsity
    assert found.matrices.kept() == kept
    if len(set(table.weights.tolist())) == 1:
        assert kept == found.structure.weights(sparsity)
    alive, values = found.alive, table.values_per_head(found.alive)
    assert not (alive & (table.head >= 0) & (values == 0)).any(), "a head without values keeps no queries"


def test_removed_dimensions_can_be_cut_out(checkpoint: Make) -> None:
    """Whatever biases the removed units have, the logits stay: uneven heads are smaller heads."""
    model = tiny(checkpoint)
    found = pruner.make_pruner(model, config(**DIMENSIONS, sparsity=0.8), 20)
    steps(model, found, 20)
    masked.bake(found.matrices)
    model.net.eval()
    before = predict.forward(model, batch(5)[0])[0]
    alive = found.alive.split([units.count for units in found.structure.units])
    dead = 0
    with torch.no_grad():
        for units, living in zip(found.structure.units, alive, strict=True):
            dead += int((~living).sum())
            for slot in units.slots:
                if slot.axis == 0:
                    slot.linear.bias[~living] += 3
    assert dead > 50
    assert torch.allclose(predict.forward(model, batch(5)[0])[0], before, atol=1e-6)


def test_plan_of_bert_base_by_dimensions() -> None:
    """84,934,656 weights in units of 1,536: 5 % are 2,764.8 units, 3 % are 1,658.88."""
    with torch.device("meta"):
        query = torch.nn.Linear(768, 768)
        wide, down = torch.nn.Linear(768, 3072), torch.nn.Linear(3072, 768)
    slots = [families.Slot(linear=query, axis=axis, start=0, size=64) for axis in (0, 0, 0, 1)]
    neurons = (families.Slot(linear=wide, axis=0, start=0, size=1), families.Slot(linear=down, axis=1, start=0, size=1))
    layer = families.Layer(
        heads=families.Units(count=12, slots=tuple(slots)), neurons=families.Units(count=3072, slots=neurons)
    )
    layers = [families.with_dimensions(layer)] * 12
    found = structures.Dimensions(layers=layers, linears={}, table=structures.unit_table(layers))
    for sparsity, n_units in ((0.95, 2765), (0.97, 1659), (0.0, 55296)):
        assert found.weights(sparsity) == n_units * 1536


def test_a_structured_sparsity_out_of_reach_is_refused_before_masks_are_put_on(checkpoint: Make) -> None:
    model = tiny(checkpoint)
    with pytest.raises(ConfigError, match=r"cannot reach sparsity 0\.95") as caught:
        pruner.make_pruner(model, config(method="cap-f", sparsity=0.95), 10)
    assert "--structure dimensions" in caught.value.hint
    assert not any(torch.nn.utils.parametrize.is_parametrized(linear) for linear in model.prunable().values())


@pytest.mark.parametrize("chosen", [*({"method": method} for method in BY_CRITERION.values()), DIMENSIONS], ids=str)
def test_restore_puts_back_what_tensors_gave(checkpoint: Make, chosen: dict[str, str]) -> None:
    options = config(**chosen, sparsity=0.6)
    model = tiny(checkpoint)
    found = made(model, options, 12)
    steps(model, found, 8)
    saved = {name: tensor.clone() for name, tensor in found.tensors().items()}
    state = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    again = tiny(checkpoint)
    other = made(again, options, 12)
    again.net.load_state_dict(state)
    other.restore(saved, found.sparsity)
    assert other.sparsity == found.sparsity > 0
    restored = other.tensors()
    assert restored.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.allclose(restored[name].float(), tensor.float(), rtol=0, atol=0, equal_nan=True), name
    for step in range(8, 12):
        for one in (found, other):
            one.update(step)
        assert torch.equal(found.matrices.mask, other.matrices.mask)


def test_zero_sparsity_changes_nothing(checkpoint: Make) -> None:
    for method in BY_CRITERION.values():
        model = tiny(checkpoint)
        found = made(model, config(method=method, sparsity=0.0), 6)
        steps(model, found, 6)
        assert found.matrices.kept() == PRUNABLE


def test_table_matches_the_methods() -> None:
    assert (
        {method.criterion for method in METHODS.values()}
        == set(CRITERIA)
        == {*BY_CRITERION, *LAYERWISE, "obert", "kwon"}
    )
    for method in METHODS.values():
        assert method.structured is CRITERIA[method.criterion].structured
        assert (method.staged or method.one_shot) is CRITERIA[method.criterion].calibrated
        assert method.one_shot is (method.criterion in LAYERWISE)
    assert {name for name, row in CRITERIA.items() if row.choose is not None} == {*LAYERWISE, "obert"}
    assert [name for name, row in CRITERIA.items() if row.regularised] == ["soft-movement", "smp"]
