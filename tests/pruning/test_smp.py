"""SMP: how matrices of one kind share what stays, what is trained, how its regulariser and its rates rise."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden_masks import network
from torch.nn import functional as F

from capcli.config.layers import prune_config
from capcli.config.names import LEARNED
from capcli.config.prune import PruneConfig
from capcli.config.task import TaskConfig
from capcli.errors import ConfigError
from capcli.models import heads, model
from capcli.pruning import allocation, objective, schedules, topk
from capcli.pruning.criteria import CRITERIA
from capcli.pruning.pruner import Pruner, make_pruner

KINDS = [
    *("attention.self.query.weight", "attention.self.key.weight", "attention.self.value.weight"),
    *("attention.output.dense.weight", "intermediate.dense.weight", "output.dense.weight"),
]


def config(**options: Any) -> PruneConfig:
    return PruneConfig(source=TaskConfig(task="mr"), **{"method": "smp", "score_init": "zero", **options})


def pruner_of(total: int = 10, **options: Any) -> tuple[model.Model, Pruner]:
    net = network()
    return net, make_pruner(net, config(**options), total)


def loss_of(net: model.Model) -> torch.Tensor:
    net.net.eval()
    ids = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(1))
    return F.cross_entropy(net.net(input_ids=ids).logits, torch.tensor([0, 1, 1, 0]))


# Allocation ----------------------------------------------------------------------------------------------------------


def test_kinds_are_the_places_in_a_layer() -> None:
    assert allocation.kinds_of(network()) == KINDS * 2


def test_shares_by_hand() -> None:
    """15 of 3 x 10: 9 : 1 : 1 would be 12.27; the first is full, and 5 are left for the two others."""
    assert allocation.shares(torch.tensor([0.9, 0.1, 0.1]), [10, 10, 10], 15).tolist() == [10, 3, 2]
    assert allocation.shares(torch.tensor([0.5, 0.25]), [12, 12], 9).tolist() == [6, 3]
    assert allocation.shares(torch.zeros(2), [3, 3], 4).tolist() == [2, 2]
    assert allocation.shares(torch.tensor([0.9, 0.1]), [3, 3], 6).tolist() == [3, 3]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.floats(1e-6, 1), st.integers(1, 50)), min_size=1, max_size=6), st.floats(0, 1))
def test_shares_are_exact(parts: list[tuple[float, int]], share: float) -> None:
    worths, sizes = zip(*parts, strict=True)
    keep = round(share * sum(sizes))
    found = allocation.shares(torch.tensor(worths, dtype=torch.float64), sizes, keep).tolist()
    assert sum(found) == keep
    assert all(0 <= count <= size for count, size in zip(found, sizes, strict=True))
    slow = reference.kept_by_kind(worths, sizes, keep)  # two remainders may be equal but for rounding
    assert max(abs(a - b) for a, b in zip(found, slow, strict=True)) <= 1


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_the_masks_are_those_of_the_slow_loop(sparsity: float) -> None:
    _, found = pruner_of(sparsity=sparsity)
    scores = found.matrices.scores
    assert scores is not None
    scale = torch.cat([torch.full((size,), 1.0 + i) for i, size in enumerate(found.matrices.sizes)])
    scores.copy_((torch.randn(len(scores), generator=torch.Generator().manual_seed(2)) + 0.5) * scale)
    found.update(9)
    p = 4.0 if sparsity == 0.2 else 1.0
    parts = [part.tolist() for part in scores.split(found.matrices.sizes)]  # type: ignore[no-untyped-call]
    kept_of_kinds = topk.apportion(topk.kept_count(sparsity, len(scores)), [2 * len(part) for part in parts[:6]])
    for kind, kept in enumerate(kept_of_kinds):
        worths = [reference.mean_sigmoid(parts[i], p) for i in (kind, kind + 6)]
        counts = reference.kept_by_kind(worths, [len(parts[kind])] * 2, kept)
        assert counts[0] != counts[1] and sum(counts) == kept
        for i, count in zip((kind, kind + 6), counts, strict=True):
            mask = found.matrices.matrix_masks()[i].flatten().bool().tolist()
            assert mask == reference.topk(parts[i], count)
    assert found.matrices.kept() == topk.kept_count(sparsity, len(scores))


def test_counts_that_the_device_alone_knows() -> None:
    """The k largest of each row, ties to the lower index, of either sign, 0 and all of them."""
    for seed in range(30):
        rng, draw = torch.Generator().manual_seed(seed), random.Random(seed)
        scores = torch.randn(3, 17, generator=rng) * 10.0 ** draw.randint(-30, 30)
        scores = scores if seed % 2 else (torch.randn(3, 17, generator=rng) * 1.5).round() * -1.0  # with -0 and ties
        keep = [draw.randint(0, 17) for _ in range(3)]
        found = topk.topk_where(scores, torch.tensor(keep))
        assert found.tolist() == [reference.topk(row, k) for row, k in zip(scores.tolist(), keep, strict=True)]


# What is trained -----------------------------------------------------------------------------------------------------


def test_scores_get_the_gradient_of_the_mask_and_weights_none() -> None:
    """dL/dS = dL/dW'∘W, removed weights too, from a network whose weights are really W∘M."""
    net, found = pruner_of(sparsity=0.5)
    found.update(9)
    loss_of(net).backward()
    plain = network()
    for linear, mask in zip(plain.prunable().values(), found.matrices.matrix_masks(), strict=True):
        linear.weight.data.mul_(mask)
    loss_of(plain).backward()
    assert all(p.grad is None for name, p in net.net.named_parameters() if not name.endswith(".scores"))
    for i, (linear, views) in enumerate(zip(plain.prunable().values(), found.matrices.score_views(), strict=True)):
        assert views.grad is not None and linear.weight.grad is not None
        weight, gradient = found.matrices.original(i).flatten().tolist(), linear.weight.grad.flatten().tolist()
        slow = torch.tensor([w * g for w, g in zip(weight, gradient, strict=True)])
        assert torch.allclose(views.grad.flatten(), slow, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("train_head", [False, True])
def test_the_optimiser_gets_the_scores_alone_or_with_head_and_norms(train_head: bool) -> None:
    net, _ = pruner_of(train_head=train_head)
    trained = {name for name, p in net.net.named_parameters() if p.requires_grad}
    scores = {name for name in trained if name.endswith(".scores")}
    assert len(scores) == 12
    norms = {name for name, _ in net.net.named_parameters() if "LayerNorm" in name}
    assert trained - scores == ({"classifier.weight", "classifier.bias", *norms} if train_head else set())
    assert len(norms) == 2 * (1 + 2 * 2) == len(heads.norm_names(net.net))


def test_only_smp_keeps_weights() -> None:
    assert [name for name, row in CRITERIA.items() if "weights" not in row.trains] == ["smp"]
    assert tuple(name for name, row in CRITERIA.items() if "scores" in row.trains) == LEARNED


@dataclasses.dataclass
class Stub:
    total: int


def test_the_regulariser_grows_over_the_whole_run() -> None:
    """Of SMP as a cube over all steps, whatever the sparsity does; of soft movement with the sparsity."""
    _, found = pruner_of(sparsity=0.5)
    ramp, job = objective.RAMPS[found.criterion.regularised], Stub(total=8)
    assert [ramp(job, found, step) for step in (0, 2, 4, 8)] == [0, 1 - 0.75**3, 1 - 0.5**3, 1]  # type: ignore[arg-type]
    found.sparsity = 0.25
    assert objective.RAMPS["sparsity"](job, found, 0) == 0.5  # type: ignore[arg-type]
    assert [schedules.lr_factor(step, 8, 0.0) for step in (0, 1, 7)] == [1, 1, 1 / 7]


def test_defaults() -> None:
    made = prune_config({"task": "mr", "method": "smp"})
    assert (made.init, made.score_init, made.score_lr, made.reg_weight) == ("pretrained", "zero", 2e-2, 400)
    assert (made.ce_weight, made.kd_weight, made.dense_share, made.final_share) == (0.5, 0.5, 0, 0.4)
    schedule = make_pruner(network(), made, 100).schedule
    assert (schedule(0), schedule(59) < 0.9, schedule(60)) == (0, True, 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fisher", "train_head": True}, "--train-head has no effect on fisher, which trains all weights"),
        ({"init": "fisher"}, "--init fisher changes weights, and smp learns only masks"),
        ({"method": "magnitude", "scope": "type"}, "--scope type goes by learned scores, and magnitude has none"),
        ({"method": "wanda", "scope": "type", "epochs": 0}, "--scope type goes by learned scores, and wanda has none"),
        (
            {"method": "movement", "scope": "type", "init": "fisher", "score_init": "magnitude"},
            "--scope type goes by learned scores, and --init fisher has none",
        ),
        ({"refit": True}, "--refit has no effect on smp, which chooses its masks anew all the time"),
        ({"scope": "row"}, "--scope row has no meaning for smp, which ranks all weights, or those of a matrix"),
    ],
    ids=str,
)
def test_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert caught.value.message == message and caught.value.hint
