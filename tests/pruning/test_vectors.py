"""What a model learns from vectors, and what is measured on it before it has learned anything, against slow loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from capcli.config.prune import PruneConfig
from capcli.config.task import TaskConfig
from capcli.data.batches import Examples, collate
from capcli.models import loading, predict, task_losses
from capcli.models.model import Model
from capcli.pruning import information
from capcli.pruning.calibration import FISHER_BATCH, Calibration, sampled
from capcli.pruning.pruner import make_pruner

CPU = torch.device("cpu")
DRAWS = 200  # with the standard error of a chi-square, 10 % of each weight


def examples(n: int) -> Examples:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 9, n)
    return Examples(
        tokens=rng.integers(5, 200, lengths.sum()),
        types=None,
        offsets=np.concatenate([[0], lengths.cumsum()]),
        labels=np.full(n, np.nan),
        pad_id=0,
        kind="embedding",
    )


@pytest.fixture
def model(checkpoint: Callable[..., Path]) -> Model:
    return loading.load_dense(str(checkpoint("bert")), None, "embedding", 1)


def test_distillation_is_the_cosine_distance() -> None:
    rng = torch.Generator().manual_seed(1)
    ours, theirs = torch.randn(2, 5, 7, generator=rng)
    expected = []
    for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):
        lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        expected.append(1 - sum(x * y for x, y in zip(a, b, strict=True)) / lengths)
    found = task_losses.distillation(ours, 3 * theirs, "embedding", temperature=2.0)  # which has no effect
    assert float(found) == pytest.approx(sum(expected) / 5, rel=1e-5)
    half = task_losses.task_loss(ours, torch.nn.functional.normalize(theirs, dim=-1), "embedding")
    assert float(half) == pytest.approx(sum(expected) / 5, rel=1e-5)


def test_a_model_has_no_gradient_towards_its_own_vectors(model: Model) -> None:
    batch = collate(examples(4), np.arange(4), CPU)
    vectors = predict.forward(model, batch.inputs)[0]
    weight = next(iter(model.prunable().values())).weight
    itself = task_losses.distillation(vectors, vectors.detach(), "embedding", 1.0)
    assert float(torch.autograd.grad(itself, weight, retain_graph=True)[0].abs().max()) < 1e-6
    drawn = task_losses.task_loss(vectors, sampled(vectors, [1, 2]), "embedding")
    assert float(torch.autograd.grad(drawn, weight)[0].abs().max()) > 1e-4


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    vectors = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    drawn = sampled(vectors, [3, 4, 5])
    assert torch.equal(drawn, sampled(vectors, [3, 4, 5]))
    assert not torch.equal(drawn, sampled(vectors, [3, 4, 6]))
    noise = drawn - torch.nn.functional.normalize(vectors, dim=-1)
    assert abs(float(noise.mean())) < 0.03
    assert float(noise.std()) == pytest.approx(1, abs=0.03)


def test_the_fisher_information_is_the_gauss_newton_matrix(model: Model) -> None:
    """Its diagonal is the mean over draws: 1 / B² of the sum over texts and dimensions of (d direction / d weight)²."""
    some = examples(FISHER_BATCH)
    linear = next(iter(model.prunable().values()))
    batch = collate(some, np.arange(FISHER_BATCH), CPU)
    model.net.eval()
    units = torch.nn.functional.normalize(predict.forward(model, batch.inputs)[0], dim=-1)
    expected = torch.zeros_like(linear.weight)
    for unit in units.flatten():
        expected += torch.autograd.grad(unit, linear.weight, retain_graph=True)[0] ** 2
    expected = expected.flatten().detach() / FISHER_BATCH**2
    cal = Calibration(model=model, examples=some, device=CPU, seed=3, count=FISHER_BATCH)
    config = PruneConfig(source=TaskConfig(task="mr"), method="fisher", dense_share=0.0, epochs=0)
    matrices = make_pruner(model, config, 0, cal).matrices
    draws = [information.information(matrices, cal, step)[: len(expected)] for step in range(DRAWS)]
    found = torch.stack(draws).mean(dim=0)
    assert float(found.sum()) == pytest.approx(float(expected.sum()), rel=0.1)
    assert float(torch.corrcoef(torch.stack([found, expected]))[0, 1]) > 0.95
