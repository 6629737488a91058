"""oBERT against slow loops, and its selections."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import PRUNABLE, Tiny, outcome, random_examples

from capcli.errors import ConfigError
from capcli.models import loading
from capcli.pruning import information, schedules
from capcli.pruning.calibration import Calibration
from capcli.pruning.criteria import obert
from capcli.pruning.pruner import make_pruner
from capcli.pruning.topk import kept_count


def blocks_of(n: int, size: int, seed: int = 0) -> torch.Tensor:
    """Damped Fisher blocks of random gradients."""
    rng = torch.Generator().manual_seed(seed)
    gradients = torch.randn(n, 2 * size, size, generator=rng)
    return information.damped(gradients.transpose(1, 2) @ gradients / (2 * size))


@pytest.mark.parametrize("extra", [0, 3])
def test_the_correction_is_the_best_that_those_that_stay_can_do(extra: int) -> None:
    """In each block F_KK·x = F_KQ·w_Q; what was removed before, or has no neighbour that goes, stays as it is."""
    n, size = 3, 6
    blocks, m = blocks_of(n, size), n * size - extra
    rng = np.random.default_rng(1)
    weight = torch.from_numpy(rng.normal(size=m)).float()
    role = rng.integers(0, 3, m)  # removed before, removed now, kept
    role[:size] = 2  # nothing is removed in the first block
    removed, kept = torch.from_numpy(role == 1), torch.from_numpy(role == 2)
    found = obert.correction(blocks, weight, removed, kept)
    assert not found[:size].any()
    assert not found[~kept].any()
    for b in range(n):
        places = range(b * size, min(m, (b + 1) * size))
        q = [i for i in places if removed[i]]
        k = [i for i in places if kept[i]]
        if not q or not k:
            continue
        inside = blocks[b].double().numpy()
        local = {i: i - b * size for i in places}
        f_kk = np.array([[inside[local[i], local[j]] for j in k] for i in k])
        f_kq = np.array([[inside[local[i], local[j]] for j in q] for i in k])
        wanted = np.linalg.solve(f_kk, f_kq @ weight[q].double().numpy())
        assert np.allclose(found[k].numpy(), wanted, rtol=1e-4, atol=1e-6)


def test_one_weight_costs_what_its_score_says() -> None:
    """w²/(2·[F⁻¹]_ii) is half of dᵀFd for the whole change d: the weight removed and the others corrected."""
    blocks, size = blocks_of(1, 5, seed=4), 5
    weight = torch.randn(size, generator=torch.Generator().manual_seed(2))
    score = weight.square() * information.alone(blocks)[0] / 2
    for i in range(size):
        removed = torch.arange(size) == i
        change = obert.correction(blocks, weight, removed, ~removed) - weight * removed
        assert float(change @ blocks[0] @ change / 2) == pytest.approx(float(score[i]), rel=1e-4)


def slow_blocks(gradients: list[torch.Tensor], size: int) -> torch.Tensor:
    """Blocks of the mean of g·gᵀ over flat gradients, damped."""
    parts = [torch.stack([torch.outer(b, b) for b in g.view(-1, size)]) for g in gradients]
    return information.damped(torch.stack(parts).mean(dim=0))


@pytest.mark.parametrize("budget", [2**30, 4 * 32 * 32 * 8], ids=["all kept", "measured twice"])
def test_a_selection_against_a_slow_loop(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(information, "BUDGET_BYTES", budget)
    config = tiny.prune_config(tmp_path, method="obert", sparsity=0.6, fisher_block=8, stairs="0.4,0.6", floor=0.0)
    model = loading.load_dense(tiny.model, ("negative", "positive"), "classification", 1)
    examples = random_examples(24, 8)
    cal = Calibration(model=model, examples=examples, device=torch.device("cpu"), seed=1, count=24, block=8)
    pruner = make_pruner(model, config, 8, cal)
    matrices, n = pruner.matrices, len(pruner.matrices.names)
    for step, sparsity in ((0, 0.4), (4, 0.6)):
        before = matrices.mask.bool()
        weights = [matrices.original(i).detach().flatten().clone() for i in range(n)]
        rows = list(cal.gradients(matrices, step, range(n)))
        blocks = [slow_blocks([one[i].flatten() for one in rows], 8) for i in range(n)]
        scores = torch.cat([w.square() * information.alone(f).flatten() for w, f in zip(weights, blocks, strict=True)])
        scores[~before] = -torch.inf
        kept = round((1 - sparsity) * len(before))
        chosen = torch.zeros_like(before)
        chosen[scores.argsort(descending=True, stable=True)[:kept]] = True
        pruner.update(step)
        assert int((matrices.mask.bool() != chosen).sum()) <= 2  # which are as good as equal
        chosen = matrices.mask.bool()
        splits = [part.split(matrices.sizes) for part in (before & ~chosen, chosen)]  # type: ignore[no-untyped-call]
        for i, (weight, removed, stays) in enumerate(zip(weights, *splits, strict=True)):
            wanted = weight + obert.correction(blocks[i], weight, removed, stays)
            assert torch.allclose(matrices.original(i).detach().flatten(), wanted, rtol=1e-4, atol=1e-6)
        after = torch.cat([matrices.original(i).detach().flatten() for i in range(n)])
        assert (after - torch.cat(weights)).abs().max() > 1e-3


def test_sparsities_between_two() -> None:
    assert schedules.between(0.0, 0.8, 1) == [0.8]
    found = schedules.between(0.5, 0.9, 3)
    assert found[-1] == 0.9
    kept = [0.5, *(1 - s for s in found)]
    assert [later / sooner for sooner, later in itertools.pairwise(kept)] == pytest.approx([0.2 ** (1 / 3)] * 3)


def test_several_selections_at_a_stair(tiny: Tiny, tmp_path: Path) -> None:
    """Each measured anew; what is removed first is not what would be removed at once."""
    outcomes = []
    for selections in (1, 3):
        out = tmp_path / str(selections)
        report = tiny.prune(out, method="obert", sparsity=0.8, epochs=0, selections=selections, stairs="once")
        assert report["sparsity"]["kept_weights"] == kept_count(0.8, PRUNABLE)
        outcomes.append(outcome(out))
    assert outcomes[0] != outcomes[1]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"method": "obert", "refit": True}, "--refit has no effect on obert"),
        ({"method": "movement", "selections": 2}, "--selections has no effect on movement"),
        ({"method": "obert", "selections": 0}, "--selections must be at least 1"),
    ],
)
def test_what_is_refused(tiny: Tiny, tmp_path: Path, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.prune_config(tmp_path / "out", **chosen)
