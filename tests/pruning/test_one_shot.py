"""Wanda, MULTIFLOW, SparseGPT and SDS against slow loops; exact counts; what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from test_fisher import calibrated, config, examples, moments_of, tiny

from capcli.config.names import METHODS
from capcli.config.prune import PruneConfig, TaskConfig
from capcli.data.batches import taken
from capcli.errors import ConfigError
from capcli.models import families, loading
from capcli.models.model import Model
from capcli.pruning import least_squares, pruner, refit
from capcli.pruning.criteria import layerwise, sparsegpt
from capcli.pruning.criteria.layerwise import Quota
from capcli.pruning.topk import apportion, kept_count

Make = Callable[..., Path]
ONE_SHOT = [name for name, method in METHODS.items() if method.one_shot]


def drawn(tokens: int = 40, n: int = 7, out: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs with means and scales of their own and some correlation, a weight, and outputs."""
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(tokens, n, generator=rng) @ torch.randn(n, n, generator=rng) + torch.arange(n) / 3
    weight = torch.randn(out, n, generator=rng)
    return x, weight, x @ weight.T + 1 + torch.randn(tokens, out, generator=rng)


def one_shot(method: str, **options: Any) -> PruneConfig:
    return config(**{"method": method, "epochs": 0, "sparsity": 0.6, **options})


def cut(model: Model, method: str, cal: Any, *, refit: bool = True, **options: Any) -> pruner.Pruner:
    found = pruner.make_pruner(model, one_shot(method, refit=refit, **options), 0, cal)
    found.update(0)
    return found


# Formulas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["wanda", "multiflow"])
def test_scores_are_those_of_the_slow_loop(name: str, bias: bool) -> None:
    """Also where moments are counted from the means of the first tokens."""
    x, weight, y = drawn()
    found = getattr(layerwise, name)(moments_of(x, y, bias=bias), weight.double())
    expected = getattr(reference, name)(weight.tolist(), x.tolist())
    assert found.tolist() == [pytest.approx(row, rel=1e-5) for row in expected]


@pytest.mark.parametrize("width", [1, 3, 7, 128])
@pytest.mark.parametrize("keep", [0, 13, 35])
def test_sparsegpt_is_the_brain_surgeon(width: int, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "COLUMNS", width)
    x, weight, y = drawn()
    kept, found = sparsegpt.running(moments_of(x, y), weight.double(), Quota(count=keep, scope="matrix"))
    counts = apportion(keep, [min(width, 7 - begin) for begin in range(0, 7, width)])
    mask, corrected = reference.sparsegpt(weight.tolist(), x.tolist(), counts, width, least_squares.DAMPING)
    assert int(kept.sum()) == keep
    assert kept.double().tolist() == mask
    # a weight that goes is not corrected any more
    assert (found * kept).tolist() == [
        pytest.approx([w * m for w, m in zip(row, ms, strict=True)], rel=1e-4, abs=1e-6)
        for row, ms in zip(corrected, mask, strict=True)
    ]


def test_sparsegpt_of_inputs_that_have_nothing_in_common_is_wanda(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a diagonal C, and next to no damping, the largest abs(w)·sqrt(C_jj) stay as they are."""
    monkeypatch.setattr(sparsegpt, "DAMPING", 1e-9)
    x = torch.diag(torch.tensor([1.0, 3.0, 0.2, 2.0, 5.0, 0.7]))
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double()
    moments, quota = moments_of(x, torch.zeros(6, 4), bias=False), Quota(count=9, scope="matrix")
    kept, found = sparsegpt.running(moments, weight.clone(), quota)
    assert kept.equal(quota.best(weight.abs() * torch.diag(x)))
    assert torch.allclose(found, weight)


@pytest.mark.parametrize("count", [6, 20, 35])
def test_sds_is_that_of_the_slow_loop(count: int) -> None:
    x, weight, y = drawn()
    quota = Quota(count=count, scope="matrix")
    kept, found = layerwise.sparse_dense_sparse(moments_of(x, y), weight.double(), quota)
    mask, dense = reference.sparse_dense_sparse(
        weight.tolist(), x.tolist(), y.tolist(), count, least_squares.DAMPING, least_squares.ROUNDING, layerwise.SHRUNK
    )
    assert kept.tolist() == mask
    assert found.tolist() == [pytest.approx(row, rel=1e-3, abs=1e-4) for row in dense]


@pytest.mark.parametrize(
    "x",
    [torch.full((30, 6), 3.0), torch.zeros(30, 6), torch.randn(3, 6), torch.randn(30, 1).expand(-1, 6)],
    ids=["constant", "zero", "fewer tokens than inputs", "one dimension"],
)
@pytest.mark.parametrize(
    "choose", [sparsegpt.running, layerwise.sparse_dense_sparse, layerwise.ranked(layerwise.wanda)]
)
def test_a_singular_gram_matrix(x: torch.Tensor, choose: layerwise.Cut) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(5)).double()
    kept, found = choose(moments_of(x, x @ weight.float().T + 1), weight, Quota(count=10, scope="matrix"))
    assert int(kept.sum()) == 10
    assert bool(found.isfinite().all())


def test_errors_count_the_bias_that_is_there() -> None:
    x, weight, y = drawn()
    bias = torch.arange(5.0)
    lost = (x @ weight.T + bias - y).square().sum() / (y - y.mean(dim=0)).square().sum()
    assert float(moments_of(x, y).error(weight.double(), bias)) == pytest.approx(float(lost), rel=1e-5)


# Of a network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("method", ONE_SHOT)
@pytest.mark.parametrize("family", ["bert", "albert", "gpt2", "unknown"])
def test_counts_are_exact(checkpoint: Make, family: str, method: str, fitted: bool) -> None:
    """In all, and but for MULTIFLOW in each matrix; for blocks, a block that is shared, a turned one, linear layers."""
    model = tiny(checkpoint, "bert" if family == "unknown" else family)
    if family == "unknown":
        model = loading.dataclasses.replace(model, family=None)
    found = cut(model, method, calibrated(model), refit=fitted)
    sizes, counts = found.matrices.sizes, [int(mask.sum()) for mask in found.matrices.matrix_masks()]
    assert sum(counts) == kept_count(0.6, sum(sizes))
    assert method == "multiflow" or counts == apportion(sum(counts), sizes)
    assert found.alive.equal(found.matrices.mask.bool())
    assert set(found.errors) == set(found.matrices.names)
    assert all(0 <= error < 10 for error in found.errors.values())


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family(checkpoint: Make, family: str) -> None:
    model = tiny(checkpoint, family)
    found = cut(model, "wanda", calibrated(model))
    assert found.matrices.kept() == kept_count(0.6, sum(found.matrices.sizes))
    assert all(bool(parameter.isfinite().all()) for parameter in model.net.parameters())


def test_wanda_goes_up_the_layers_with_what_lower_ones_give(checkpoint: Make) -> None:
    """The first matrices are cut by what they read in the dense model, the last one by what it reads in the cut one."""
    model = tiny(checkpoint)
    cal = calibrated(model)
    found = cut(model, "wanda", cal, refit=False)
    last = len(found.matrices.names) - 1
    with torch.no_grad():
        seen = dict(refit.walk(cal, model, 0))  # what everything reads after the run
    for index in (0, last):
        weight, kept = found.matrices.seen(index)
        moments = seen[found.matrices.names[index]]
        quota = Quota(count=int(kept.sum()), scope="matrix")
        assert quota.best(layerwise.wanda(moments, weight.double())).equal(kept)


def test_as_many_stay_in_each_row(checkpoint: Make) -> None:
    for method in ("wanda", "sparsegpt", "sds"):
        model = tiny(checkpoint)
        found = cut(model, method, calibrated(model), scope="row")
        for index in range(len(found.matrices.names)):
            rows = found.matrices.seen(index)[1].sum(dim=1)
            assert int(rows.max() - rows.min()) <= (method == "sparsegpt") + 1


def test_shares_of_a_global_magnitude_mask(checkpoint: Make) -> None:
    model = tiny(checkpoint)
    with torch.no_grad():
        for factor, linear in enumerate(model.prunable().values()):
            linear.weight.mul_(1 + factor / 4)
    weights = [linear.weight.detach().flatten() for linear in model.prunable().values()]
    flat = torch.cat(weights).abs()
    least = flat.sort(descending=True).values[kept_count(0.6, len(flat)) - 1]
    expected = [int((weight.abs() >= least).sum()) for weight in weights]
    found = cut(model, "multiflow", calibrated(model))
    assert [int(mask.sum()) for mask in found.matrices.matrix_masks()] == expected
    assert len(set(expected)) > 4


@pytest.mark.parametrize("method", ONE_SHOT)
def test_with_everything_kept_nothing_changes(checkpoint: Make, method: str) -> None:
    model = tiny(checkpoint)
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    found = pruner.make_pruner(model, one_shot(method, sparsity=1e-9), 0, calibrated(model))
    found.update(0)
    assert found.matrices.kept() == len(found.matrices.mask)
    for name, tensor in model.net.state_dict().items():
        old = before[name.replace("parametrizations.weight.original", "weight")]
        assert torch.allclose(tensor, old, atol=2e-4), name


@pytest.mark.parametrize("method", ONE_SHOT)
def test_the_size_of_the_batches_does_not_matter(
    checkpoint: Make, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor their order with it: padding and the mean of the first tokens differ, the real tokens do not."""
    results = []
    for size in (1, 24):
        monkeypatch.setattr(refit, "REFIT_BATCH", size)
        model = tiny(checkpoint)
        results.append(cut(model, method, calibrated(model)).matrices.flat_weights())
    same = (results[0] - results[1]).abs() < 2e-3
    assert float(same.double().mean()) > 0.99  # a score that is nearly another may fall on the other side


@pytest.mark.parametrize("method", ONE_SHOT)
def test_the_same_twice(checkpoint: Make, method: str) -> None:
    results = []
    for _ in range(2):
        model = tiny(checkpoint)
        results.append(cut(model, method, calibrated(model)).matrices.flat_weights())
    assert results[0].equal(results[1])


def test_a_matrix_that_is_not_in_use_is_cut_by_magnitude(checkpoint: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(checkpoint)
    walk = layerwise.walk
    monkeypatch.setattr(layerwise, "walk", lambda *a: (pair for i, pair in enumerate(walk(*a)) if i != 3))
    found = cut(model, "wanda", calibrated(model))
    assert found.matrices.kept() == kept_count(0.6, len(found.matrices.mask))
    assert len(found.errors) == len(found.matrices.names) - 1
    (left,) = [i for i, name in enumerate(found.matrices.names) if name not in found.errors]
    weight, kept = found.matrices.seen(left)
    assert float(weight.abs()[~kept].max()) <= float(weight.abs()[kept].min())


# Options and examples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 2}, "wanda trains nothing, got --epochs 2"),
        ({"stairs": "0.3,0.6"}, "--stairs has no effect on wanda"),
        ({"scope": "global"}, "--scope global has no meaning for wanda"),
        ({"method": "fisher", "scope": "row"}, "--scope row has no meaning for fisher"),
        ({"initial_sparsity": 0.5}, "--initial-sparsity has no effect on wanda"),
        ({"heal": -1}, "--heal must be at least 0"),
        ({"method": "fisher", "epochs": 3, "heal": 5}, "--heal is for a run that trains nothing"),
        ({"method": "movement", "epochs": 3, "heal": 5, "refit": False}, "--heal is for a run that trains nothing"),
        ({"heal": 5, "losses": "kd,fic"}, "--losses fic needs epochs"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        one_shot(**{"method": "wanda", **options})


def test_a_method_that_never_trains_needs_no_option_for_that() -> None:
    from capcli.config.layers import prune_config

    for method in ONE_SHOT:
        for preset in ("default", "minutes", "best", "quick", "paper"):
            found = prune_config({"task": "mr", "method": method, "preset": preset})
            assert (found.epochs, found.loss_names, found.stair_list) == (0, (), (found.sparsity,))
    assert prune_config({"task": "mr", "method": "wanda", "heal": 9}).loss_names == ("kd",)
    minutes = prune_config({"task": "mr", "preset": "minutes"})
    assert (minutes.method, minutes.epochs) == ("fisher", 0)
    assert prune_config({"task": "mr", "preset": "best"}).epochs == 10
    assert PruneConfig(source=TaskConfig(task="mr")).method == "fisher"


def test_taken_examples_are_the_same() -> None:
    whole = examples(20)
    part = taken(whole, [7, 3, 19])  # type: ignore[arg-type]
    for new, old in enumerate((7, 3, 19)):
        ours = part.tokens[part.offsets[new] : part.offsets[new + 1]]
        theirs = whole.tokens[whole.offsets[old] : whole.offsets[old + 1]]
        assert ours.tolist() == theirs.tolist()
        assert part.labels[new] == whole.labels[old]
