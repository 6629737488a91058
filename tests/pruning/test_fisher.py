"""Calibrated pruning: Fisher scores and the refit against slow loops, and what they leave alone."""

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import reference
import torch

from capcli.config.prune import PruneConfig
from capcli.config.rises import halving
from capcli.config.task import TaskConfig
from capcli.data.batches import Examples
from capcli.errors import ConfigError
from capcli.models import families, loading, predict
from capcli.models.model import Model
from capcli.pruning import calibration, information, least_squares, pruner, refit
from capcli.pruning.calibration import Calibration
from capcli.pruning.least_squares import Moments
from capcli.pruning.schedules import Schedule, stairs
from capcli.pruning.topk import kept_count

Make = Callable[..., Path]
CPU = torch.device("cpu")


def tiny(checkpoint: Make, family: str = "bert") -> Model:
    return loading.load_dense(str(checkpoint(family)), None, "classification", 1)


def examples(n: int = 24, seed: int = 0, most: int = 10) -> Examples:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, most, n)
    return Examples(
        tokens=rng.integers(5, 200, lengths.sum()),
        types=None,
        offsets=np.concatenate([[0], lengths.cumsum()]),
        labels=rng.integers(0, 2, n),
        pad_id=0,
    )


def config(**options: Any) -> PruneConfig:
    return PruneConfig(
        source=TaskConfig(task="mr"), **{"method": "fisher", "dense_share": 0.0, "refit": True, **options}
    )


def calibrated(model: Model, **options: Any) -> Calibration:
    return Calibration(**{"model": model, "examples": examples(), "device": CPU, "seed": 3, "count": 24, **options})


def moments_of(x: torch.Tensor, y: torch.Tensor, *, bias: bool = True) -> Moments:
    found = Moments.of(x[:7], y[:7], bias=bias)
    for begin in range(7, len(x), 7):
        found.add(x[begin : begin + 7], y[begin : begin + 7])
    return found


# Least squares -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("budget", [1, 300, 2**24])
def test_rows_are_those_of_the_slow_loop(bias: bool, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of rows that are solved together; one row keeps nothing, one everything."""
    monkeypatch.setattr(least_squares, "BUDGET_BYTES", budget)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=rng) + 2
    weight, kept = torch.randn(5, 6, generator=rng), torch.rand(5, 6, generator=rng) < 0.5
    kept[1], kept[3] = False, True
    y = torch.randn(40, 5, generator=rng)
    found, offset = least_squares.solve(moments_of(x, y, bias=bias), weight, kept)
    for row in range(5):
        expected, at = reference.refitted_row(
            x.tolist(), y[:, row].tolist(), weight[row].tolist(), kept[row].tolist(), 0.01, 1e-6, bias
        )
        assert found[row].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert float(offset[row]) == pytest.approx(at, rel=1e-4, abs=1e-5)
    assert not found[~kept].any()
    given = x.double() @ found.T + offset
    centre = y.mean(dim=0) if bias else 0.0
    lost = float((given - y).square().sum() / (y - centre).square().sum())
    assert float(moments_of(x, y, bias=bias).error(found)) == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("columns", [[True] * 6, [True, False, True, True, False, False], [False] * 6])
def test_rows_that_keep_the_same_are_solved_at_once(columns: list[bool]) -> None:
    """As one system, which gives what the loop over rows gives."""
    rng = torch.Generator().manual_seed(3)
    x, weight = torch.randn(40, 6, generator=rng) + 2, torch.randn(5, 6, generator=rng)
    y = torch.randn(40, 5, generator=rng)
    found, _ = least_squares.solve(moments_of(x, y), weight, torch.tensor(columns).expand(5, 6))
    for row in range(5):
        expected, _ = reference.refitted_row(
            x.tolist(), y[:, row].tolist(), weight[row].tolist(), columns, 0.01, 1e-6, True
        )
        assert found[row].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_without_damping_it_is_the_least_squares_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "DAMPING", 0.0)
    monkeypatch.setattr(least_squares, "ROUNDING", 1e-12)
    rng = torch.Generator().manual_seed(2)
    x, y = torch.randn(60, 8, generator=rng) + 1, torch.randn(60, 4, generator=rng)
    kept = torch.rand(4, 8, generator=rng) < 0.6
    found, offset = least_squares.solve(moments_of(x, y), torch.zeros(4, 8), kept)
    for row in range(4):
        system = np.c_[x.numpy()[:, kept[row].numpy()], np.ones(60)].astype(np.float64)
        best = np.linalg.lstsq(system, y[:, row].numpy().astype(np.float64), rcond=None)[0]
        assert found[row][kept[row]].tolist() == pytest.approx(best[:-1].tolist(), abs=1e-4)
        assert float(offset[row]) == pytest.approx(best[-1], abs=1e-4)


@pytest.mark.parametrize(
    "x",
    [torch.full((30, 6), 3.0), torch.zeros(30, 6), torch.randn(3, 6), torch.randn(30, 1).expand(-1, 6)],
    ids=["constant", "zero", "fewer tokens than inputs", "one dimension"],
)
def test_a_singular_gram_matrix(x: torch.Tensor) -> None:
    """The answer is finite, and gives what can be given: the outputs are constant, or those of the weights."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    kept = torch.ones(4, 6, dtype=torch.bool)
    found, offset = least_squares.solve(moments_of(x, x @ weight.T + 1), weight, kept)
    assert bool(found.isfinite().all())
    assert torch.allclose(x.double() @ found.T + offset, (x @ weight.T + 1).double(), atol=1e-3)


def test_a_system_that_32_bits_cannot_factorise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two inputs that are the same, and next to no damping: half of the output each."""
    monkeypatch.setattr(least_squares, "DAMPING", 2.0**-26)
    monkeypatch.setattr(least_squares, "ROUNDING", 0.0)
    x, kept = torch.ones(4, 2), torch.ones(1, 2, dtype=torch.bool)
    moments = moments_of(x, torch.ones(4, 1), bias=False)
    damping = least_squares.DAMPING * moments.gram.diagonal().mean()
    with pytest.raises(torch.linalg.LinAlgError):
        least_squares.damped_rows(moments.gram.float(), moments.cross.T, kept, damping)
    found, _ = least_squares.solve(moments, torch.zeros(1, 2), kept)
    assert found.tolist() == [pytest.approx([0.5, 0.5], abs=1e-6)]


# The refit of a network ----------------------------------------------------------------------------------------------


def masked(model: Model, cal: Calibration, sparsity: float = 0.5) -> pruner.Pruner:
    return pruner.make_pruner(model, config(sparsity=sparsity), 0, cal)


@pytest.mark.parametrize("family", [*families.FAMILIES, "unknown"])
def test_with_everything_kept_the_refit_changes_nothing(checkpoint: Make, family: str) -> None:
    model = tiny(checkpoint, "bert" if family == "unknown" else family)
    model = dataclasses.replace(model, family=None) if family == "unknown" else model
    found = masked(model, calibrated(model))
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    refit.refit(found.matrices, found.matrices.mask.clone(), calibrated(model), 0)
    for name, tensor in model.net.state_dict().items():
        assert torch.allclose(tensor, before[name], atol=2e-4), name


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_refit_brings_the_outputs_nearer(checkpoint: Make, family: str) -> None:
    """Of half of the weights, removed at random: the last states come nearer to those before the cut."""
    model = tiny(checkpoint, family)
    cal = calibrated(model, examples=examples(200, most=30), count=200)
    found = masked(model, cal)
    batch = next(iter(cal.drawn(1, 200)))
    was = predict.forward_states(model, batch.inputs)[2][-1].detach()
    all_of_it = found.matrices.mask.clone()
    found.matrices.mask.copy_(torch.rand(len(all_of_it), generator=torch.Generator().manual_seed(1)) < 0.5)
    real = batch.inputs["attention_mask"].bool()

    def error() -> float:
        model.net.eval()
        with torch.no_grad():
            states = predict.forward_states(model, batch.inputs)[2][-1]
        return float((states - was)[real].square().mean())

    cut = error()
    refit.refit(found.matrices, all_of_it, cal, 0)
    assert error() < 0.8 * cut


def test_blocks_and_the_whole_network_give_the_same(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block nothing below is run again; the result is that of whole passes."""
    results = []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(refit, "_side", lambda model, batches: None)
        model = tiny(checkpoint)
        cal = calibrated(model)
        found = masked(model, cal, 0.6)
        found.update(0)
        results.append({name: tensor.clone() for name, tensor in model.net.state_dict().items()})
    for name, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][name], atol=1e-4), name


@pytest.mark.parametrize("family", [*families.FAMILIES])
def test_a_network_is_taken_block_by_block(checkpoint: Make, family: str) -> None:
    """But for ALBERT, whose only block runs several times."""
    model = tiny(checkpoint, family)
    side = refit._side(model, list(calibrated(model).drawn(0, 8)))
    assert (side is None) == (family == "albert")


def test_padding_is_left_out(checkpoint: Make) -> None:
    """Batches of other widths hold the same real tokens, so the refit is the same."""
    results = []
    for size in (1, 24):
        model = tiny(checkpoint)
        cal = calibrated(model)
        found = masked(model, cal, 0.6)
        found.matrices.mask.copy_(torch.arange(len(found.matrices.mask)) % 3 == 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(refit, "REFIT_BATCH", size)
            refit.refit(found.matrices, torch.ones_like(found.matrices.mask), cal, 0)
        results.append({name: tensor.clone() for name, tensor in model.net.state_dict().items()})
    for name, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][name], atol=2e-3), name


def test_only_one_block_at_a_time_is_held(checkpoint: Make) -> None:
    model = tiny(checkpoint)
    batches = list(calibrated(model).drawn(0, 8))
    side = refit._side(model, batches)
    assert side is not None
    for number in range(len(side.parts)):
        held = [[refit._hidden_in(call) is not None for call in calls] for calls in side.calls]
        assert [any(one) for one in held] == [i == number for i in range(len(side.parts))]
        side.advance(number)
    assert side.calls == [[] for _ in side.parts]


# Scores --------------------------------------------------------------------------------------------------------------


def test_fisher_is_the_mean_square_of_gradients_of_small_batches(checkpoint: Make) -> None:
    model = tiny(checkpoint)
    plain = copy.deepcopy(model.net)
    cal = calibrated(model)
    found = masked(model, cal)
    names = {id(module): name for name, module in model.net.named_modules()}
    expected = reference.fisher(
        plain.eval(),
        [names[id(linear)] for linear in found.matrices.linears],
        [(dict(batch.inputs), batch.labels) for batch in cal.drawn(7, calibration.FISHER_BATCH)],
    )
    model.net.train()
    state = torch.get_rng_state()
    assert torch.allclose(information.information(found.matrices, cal, 7), expected, rtol=1e-4, atol=1e-12)
    assert model.net.training
    assert torch.equal(torch.get_rng_state(), state)


def test_removed_weights_may_return(checkpoint: Make) -> None:
    """With --regrow they are measured and trained like the rest, keep their values in the refit, and one that has grown
    is there again after the next selection."""
    model = tiny(checkpoint)
    cal, plain = calibrated(model, regrow=True), copy.deepcopy(model.net).eval()
    options = config(sparsity=0.9, stairs="0.6,0.9", regrow=True, final_share=0.5)
    found = pruner.make_pruner(model, options, 10, cal)
    matrices = found.matrices
    found.update(0)
    removed = matrices.mask == 0
    assert int((~removed).sum()) == kept_count(0.6, len(removed))
    names = {id(module): name for name, module in model.net.named_modules()}
    linears = [names[id(linear)] for linear in matrices.linears]
    for name, linear in zip(linears, matrices.linears, strict=True):
        plain.get_submodule(name).load_state_dict({"weight": linear.weight, "bias": linear.bias})
    drawn = [(dict(batch.inputs), batch.labels) for batch in cal.drawn(9, calibration.FISHER_BATCH)]
    fisher = reference.fisher(plain, linears, drawn)
    assert torch.allclose(information.information(matrices, cal, 9), fisher, rtol=1e-4, atol=1e-12)
    assert fisher[removed].max() > 0
    grown = int((fisher * removed).argmax())
    parts = torch.arange(len(removed)).split(matrices.sizes)
    index = next(i for i, part in enumerate(parts) if grown in part)
    with torch.no_grad():
        matrices.original(index).view(-1)[grown - int(parts[index][0])] = 50.0
    before = matrices.flat_weights()
    found.update(9)
    assert matrices.kept() == kept_count(0.9, len(removed))
    assert matrices.mask[grown] == 1
    still = removed & (matrices.mask == 0)
    assert torch.equal(matrices.flat_weights()[still], before[still])


def test_what_was_removed_does_not_return_unless_it_may(checkpoint: Make) -> None:
    model = tiny(checkpoint)
    found = pruner.make_pruner(model, config(sparsity=0.9, stairs="0.6,0.9"), 10, calibrated(model))
    found.update(0)
    removed = found.matrices.mask == 0
    with torch.no_grad():
        for index in range(len(found.matrices.names)):
            found.matrices.original(index).add_(50.0 * (found.matrices.matrix_masks()[index] == 0))
    found.update(9)
    assert not found.matrices.mask[removed].any()


@pytest.mark.parametrize("budget", [1, 2**30])
@pytest.mark.parametrize("block", [5, 64])
def test_blocks_of_fisher_are_those_of_the_slow_loop(
    checkpoint: Make, block: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of masked weights, in blocks that do not divide the matrices, in one pass or in one for each matrix."""
    monkeypatch.setattr(information, "BUDGET_BYTES", budget)
    monkeypatch.setattr(information, "TOGETHER", 2)
    monkeypatch.setattr(information, "INVERTED_BYTES", 4 * block * block * 7)
    model = tiny(checkpoint)
    cal = calibrated(model, block=block)
    found = masked(model, cal)
    found.matrices.mask.copy_(torch.rand(len(found.matrices.mask), generator=torch.Generator().manual_seed(2)) < 0.7)
    measured = list(cal.gradients(found.matrices, 7, range(len(found.matrices.names))))
    gradients = [torch.stack(rows) for rows in zip(*measured, strict=True)]
    expected = [
        reference.alone_in_block(rows.flatten(1).double().numpy(), block, information.DAMPING) for rows in gradients
    ]
    result = information.information(found.matrices, cal, 7)
    assert result.numpy() == pytest.approx(np.concatenate(expected), rel=1e-3, abs=1e-12)


def test_a_block_without_gradients_is_worth_nothing() -> None:
    assert information.alone(information.damped(torch.zeros(3, 4, 4))).max() < 1e-20


def test_examples_are_drawn_by_seed_and_step() -> None:
    cal = Calibration(model=None, examples=examples(50), device=CPU, seed=1, count=16)  # type: ignore[arg-type]
    drawn = [[batch.ids.tolist() for batch in cal.drawn(step, 8)] for step in (0, 0, 5)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(ids) for ids in drawn[0]] == [8, 8]
    assert len({one for ids in drawn[0] for one in ids}) == 16


# Stairs --------------------------------------------------------------------------------------------------------------


def test_stairs_by_name() -> None:
    assert config(sparsity=0.97, stairs="once").stair_list == (0.97,)
    auto = config(sparsity=0.97, stairs="auto", method="magnitude")
    assert auto.stair_list == config(sparsity=0.97).stair_list == halving(0.97)
    assert len(auto.stair_list) == 4


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.9, 0.95, 0.97, 0.99])
def test_stairs_shrink_what_stays_by_the_same_factor(sparsity: float) -> None:
    found = halving(sparsity)
    kept = [1 - one for one in found]
    assert found[-1] == sparsity
    assert found[0] == min(0.8, sparsity)
    ratios = [b / a for a, b in itertools.pairwise(kept)]
    assert all(r == pytest.approx(ratios[0]) and r > 0.5 - 1e-9 for r in ratios)


def test_stairs_take_growing_parts_of_the_run() -> None:
    schedule = Schedule(
        total=120, final=0.97, dense_share=0.0, final_share=0.5, shape=stairs, stairs=(0.8, 0.9, 0.95, 0.97)
    )
    values = [schedule(step) for step in range(120)]
    assert [values.count(value) for value in (0.8, 0.9, 0.95, 0.97)] == [10, 20, 30, 60]
    assert values == sorted(values)


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_stairs_of_a_short_run_end_at_the_final_sparsity(total: int) -> None:
    schedule = Schedule(total=total, final=0.9, dense_share=0.0, final_share=0.5, shape=stairs, stairs=(0.8, 0.9))
    assert schedule(total - 1) == 0.9


def test_one_stair_is_at_the_final_sparsity_at_once() -> None:
    schedule = Schedule(total=40, final=0.6, dense_share=0.0, final_share=0.5, shape=stairs, stairs=(0.6,))
    assert {schedule(step) for step in range(40)} == {0.6}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stairs": "0.8,0.9"}, "--stairs must rise from above 0 to --sparsity 0.97"),
        ({"stairs": "0.97,0.8"}, "--stairs must rise"),
        ({"stairs": "0,0.97"}, "--stairs must rise"),
        ({"stairs": "0.8,nan,0.97"}, "--stairs must rise"),
        ({"stairs": "a,0.97"}, "--stairs needs numbers"),
        ({"stairs": "0.8,0.97", "method": "movement"}, "--stairs has no effect on movement"),
        ({"stairs": "0.8,0.97", "method": "cap-f"}, "--stairs has no effect on cap-f"),
        ({"stairs": "0.8,0.97", "method": "wanda", "epochs": 0}, "--stairs has no effect on wanda"),
        ({"initial_sparsity": 0.5}, "--initial-sparsity has no effect on fisher"),
        ({"method": "movement"}, "--refit has no effect on movement"),
        ({"method": "magnitude"}, "--refit is for sparsity that rises in a few large steps, and with magnitude"),
        ({"method": "cap-f", "structure": "dimensions"}, "--refit is for .* with --structure dimensions"),
        ({"init": "fisher"}, "--init fisher is what fisher does itself"),
        ({"init": "fisher", "method": "cap-f"}, "--init fisher removes single weights, and cap-f whole heads"),
        ({"init": "fisher", "method": "cap-m", "refit": False, "score_init": "zero"}, "--init fisher ranks"),
        ({"method": "movement", "refit": False, "fisher_block": 4}, "--fisher-block has no effect on movement"),
        ({"fisher_block": 1000}, "--fisher-block can be at most 128"),
        ({"fisher_block": 0}, "--fisher-block must be at least 1"),
        ({"regrow": True, "method": "movement", "refit": False}, "--regrow has no effect on movement"),
        ({"regrow": True, "method": "obert", "refit": False}, "--regrow has no effect on obert"),
        ({"regrow": True, "stairs": "once"}, "--regrow needs a second selection"),
        ({"epochs": 0, "method": "magnitude"}, "--epochs must be at least 1"),
        ({"calibration": 0}, "--calibration must be at least 1"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(sparsity=0.97, **options)


def test_without_training_each_stair_is_one_step(checkpoint: Make) -> None:
    model = tiny(checkpoint)
    found = pruner.make_pruner(model, config(sparsity=0.9, epochs=0), 0, calibrated(model))
    seen = []
    for step in range(3):
        found.update(step)
        seen.append((found.sparsity, found.matrices.kept()))
    assert [sparsity for sparsity, _ in seen] == [pytest.approx(0.6), pytest.approx(0.8), 0.9]
    assert [kept for _, kept in seen] == [kept_count(s, len(found.matrices.mask)) for s in (0.6, 0.8, 0.9)]


# A run ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fitted", [True, False])
def test_masks_only_shrink_and_counts_are_exact(checkpoint: Make, fitted: bool) -> None:
    model = tiny(checkpoint)
    found = pruner.make_pruner(model, config(sparsity=0.97, refit=fitted), 60, calibrated(model))
    n, seen = len(found.matrices.mask), [found.matrices.mask.bool().clone()]
    for step in range(60):
        found.update(step)
        mask = found.matrices.mask.bool()
        assert int(mask.sum()) == kept_count(found.sparsity, n)
        assert not bool((mask & ~seen[-1]).any())
        seen.append(mask.clone())
        assert found.tensors().keys() == {"alive", "errors"}
    assert found.sparsity == 0.97


def test_the_refit_is_what_changes_weights(checkpoint: Make) -> None:
    kept = []
    for fitted in (True, False):
        model = tiny(checkpoint)
        found = pruner.make_pruner(model, config(sparsity=0.5, refit=fitted), 0, calibrated(model))
        before = found.matrices.flat_weights()
        found.update(0)
        kept.append(found.matrices.mask.clone())
        changed = (found.matrices.flat_weights() != before) & found.matrices.mask.bool()
        assert bool(changed.any()) == fitted
    assert torch.equal(*kept)


def test_the_errors_are_those_of_the_outputs(checkpoint: Make) -> None:
    """Of the first layer, which reads the same before and after: measured by running both on real tokens."""
    model = tiny(checkpoint)
    cal = calibrated(model)
    batch = next(iter(cal.drawn(0, 24)))
    real = batch.inputs["attention_mask"].bool()
    layer = model.net.bert.encoder.layer[0].attention.self

    def outputs() -> torch.Tensor:
        model.net.eval()
        with torch.no_grad():
            states = predict.forward_states(model, batch.inputs)[2][0]
            return torch.cat([part(states[real]) for part in (layer.query, layer.key, layer.value)], dim=1)

    before = outputs()
    found = pruner.make_pruner(model, config(sparsity=0.7), 0, cal)
    found.update(0)
    lost = (outputs() - before).square().view(-1, 3, 16).sum(dim=(0, 2))
    variance = (before - before.mean(dim=0)).square().view(-1, 3, 16).sum(dim=(0, 2))
    assert list(found.errors.values())[:3] == pytest.approx((lost / variance).tolist(), rel=1e-3)
    assert list(found.errors) == found.matrices.names


# Other methods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "readers"),
    [
        ({"method": "magnitude", "stairs": "0.5,0.8", "sparsity": 0.8}, False),
        ({"method": "cap-f", "sparsity": 0.6}, True),
        ({"method": "first-order", "structure": "dimensions", "update_every": 0.3, "sparsity": 0.5}, True),
    ],
    ids=str,
)
def test_the_refit_of_other_methods(checkpoint: Make, chosen: dict[str, Any], readers: bool) -> None:
    """With the same masks, the last states are nearer to those before the cut than without; of whole units only the
    matrices that read them are fitted, and only their errors are told."""
    errors = {}
    for fitted in (True, False):
        model = tiny(checkpoint)
        cal = calibrated(model, examples=examples(200, most=30), count=200)
        found = pruner.make_pruner(model, config(**{"refit": fitted, "lr_schedule": "run", **chosen}), 20, cal)
        if "importance" in found.state:
            generator = torch.Generator().manual_seed(4)
            found.state["importance"].copy_(torch.rand(len(found.state["importance"]), generator=generator))
        batch = next(iter(cal.drawn(1, 200)))
        real = batch.inputs["attention_mask"].bool()
        model.net.eval()
        with torch.no_grad():
            was = predict.forward_states(model, batch.inputs)[2][-1]
            rise = next(step for step in range(20) if found.scheduled(step))
            before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
            found.update(rise)
            errors[fitted] = float((predict.forward_states(model, batch.inputs)[2][-1] - was)[real].square().mean())
        changed = {name for name, tensor in model.net.state_dict().items() if not tensor.equal(before[name])}
        told = {name for name in found.matrices.names if name in found.errors}
        reading = {name for name in found.matrices.names if "output.dense" in name}
        assert told == ((reading if readers else {*found.matrices.names}) if fitted else set())
        assert {name.split(".parametrizations")[0].removesuffix(".bias") + ".weight" for name in changed} == told
    assert errors[True] < 0.9 * errors[False]


@pytest.mark.parametrize("method", ["magnitude", "movement", "soft-movement", "pins"])
def test_a_calibrated_start(checkpoint: Make, method: str) -> None:
    """Training begins at the masks and weights of fisher without training, at 80 %; what rises goes on from there."""
    model, alone = tiny(checkpoint), tiny(checkpoint)
    options = config(method=method, init="fisher", sparsity=0.9, refit=False, dense_share=0.2)
    assert options.calibrated_start == (pytest.approx(0.6), 0.8)
    found = pruner.make_pruner(model, options, 40, calibrated(model))
    scope = found.structure.scope  # type: ignore[attr-defined]
    other = pruner.make_pruner(alone, config(sparsity=0.8, epochs=0, scope=scope), 0, calibrated(alone))
    start = pruner.started(found, options.calibrated_start, calibrated(model))
    for step in range(2):
        other.update(step)
        start.update(step)
    found.start(start)
    assert torch.equal(found.matrices.mask, other.matrices.mask)
    assert torch.equal(found.matrices.flat_weights(), other.matrices.flat_weights())
    for step in range(1 if method == "pins" else 8):  # of pins nothing is observed here
        found.update(step)
        assert found.sparsity == 0.8
        assert torch.equal(found.matrices.mask, other.matrices.mask)
    for step in range(8, 40):
        found.update(step)
    assert found.sparsity == 0.9
    assert found.matrices.kept() == kept_count(0.9, len(found.matrices.mask))
    if method != "pins":
        assert not bool((found.matrices.mask.bool() & ~other.matrices.mask.bool()).any())


@pytest.mark.parametrize(
    ("kind", "logits", "expected"),
    [
        ("classification", [[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]], [1, 0]),
        ("multilabel", [[1.0, -1.0], [-0.5, 0.5]], [[1, 0], [0, 1]]),
        (
            "tokens",
            [[[0.0, 1.0], [2.0, 1.0], [5.0, 6.0]], [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]],
            [[1, 0, -100], [0, 1, 1]],
        ),
        ("spans", [[[0.0, 1.0], [2.0, 3.0], [9.0, 9.0]], [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]], [[1, 1], [2, 0]]),
    ],
)
def test_the_answers_of_a_teacher_have_the_shapes_of_labels(
    monkeypatch: pytest.MonkeyPatch, kind: str, logits: Any, expected: Any
) -> None:
    """The third place of the first example is padding, and has no label."""
    found = _answers(monkeypatch, kind, logits, [1, 2])
    assert found.tolist() == expected


def test_numbers_of_a_teacher_are_drawn_around_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the mean of the squared gradients is the Fisher information of a normal distribution."""
    own = torch.linspace(-3, 3, 4000)[:, None]
    found = [_answers(monkeypatch, "regression", own, seed) for seed in ([1, 2], [1, 2], [1, 3])]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    noise = found[0] - own[:, 0]
    assert float(noise.mean()) == pytest.approx(0, abs=0.06) and float(noise.std()) == pytest.approx(1, abs=0.04)


def _answers(monkeypatch: pytest.MonkeyPatch, kind: str, logits: Any, seed: list[int]) -> torch.Tensor:
    net = SimpleNamespace(kind=kind)
    inputs = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    batch = SimpleNamespace(inputs=inputs, labels=torch.tensor([[0, 0, -100], [0, 0, 0]]))
    monkeypatch.setattr(predict, "without_dropout", lambda model: contextlib.nullcontext())
    monkeypatch.setattr(predict, "forward", lambda model, inputs: (torch.as_tensor(logits), None))
    return calibration.answers(net, batch, seed)  # type: ignore[arg-type]
