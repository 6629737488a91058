"""What is trained on frozen vectors, on data whose answer is known."""

import numpy as np
import pytest
import torch

from capcli.data.kinds import NO_LABEL
from capcli.measuring import classifiers


def clouds(seed: int, n: int = 300, n_classes: int = 3, spread: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around one centre per class, and their classes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(n_classes, 8))
    labels = rng.integers(n_classes, size=n)
    return (centres[labels] + spread * rng.normal(size=(n, 8))).astype(np.float16), labels


def test_logistic_regression_tells_classes_apart() -> None:
    (known, labels), (asked, truth) = clouds(1), clouds(2)
    found = classifiers.linear("classification", known, labels, asked, 3, 1)
    assert (found.argmax(axis=1) == truth).mean() > 0.97
    assert np.exp(found).sum(axis=1) == pytest.approx(np.ones(len(asked)), abs=1e-5)


def test_a_class_that_was_not_trained_on_is_never_the_answer() -> None:
    known, labels = clouds(1)
    found = classifiers.linear("classification", known[labels != 1], labels[labels != 1], known, 3, 1)
    assert set(found.argmax(axis=1)) == {0, 2}
    assert np.isfinite(found).all()


@pytest.mark.parametrize("only", [0, 2])
def test_one_class_alone_is_always_the_answer(only: int) -> None:
    known, _ = clouds(1, n=20)
    found = classifiers.linear("classification", known, np.full(20, only), known, 3, 1)
    assert set(found.argmax(axis=1)) == {only}


def test_the_penalty_is_chosen_on_held_out_vectors() -> None:
    """Among 200 directions of noise one tells the classes: the less data, the stronger the penalty has to be."""
    rng = np.random.default_rng(3)
    labels = rng.integers(2, size=3000)
    vectors = rng.normal(size=(3000, 200)).astype(np.float32)
    vectors[:, 0] += 3 * (2 * labels - 1)
    strengths = [classifiers.best_strength(vectors[:n], labels[:n], 2, 1, "") for n in (150, 3000)]
    assert strengths[0] <= strengths[1]
    useless = classifiers.best_strength(vectors[:, 1:], labels, 2, 1, "")
    assert useless == classifiers.STRENGTHS[0]


def test_the_penalty_is_chosen_by_the_metric_of_the_task() -> None:
    """With one class of four in five and a weak sign of it, the lowest log loss says "the other" always."""
    rng = np.random.default_rng(7)
    labels = (rng.random(600) < 0.2).astype(np.int64)
    vectors = rng.normal(size=(600, 60))
    vectors[:, 0] += 0.8 * labels
    by_loss = classifiers.linear("classification", vectors[:300], labels[:300], vectors[300:], 2, 1)
    by_metric = classifiers.linear("classification", vectors[:300], labels[:300], vectors[300:], 2, 1, "matthews")
    assert (by_metric.argmax(axis=1) == 1).sum() > (by_loss.argmax(axis=1) == 1).sum()


def test_ridge_regression_finds_the_line() -> None:
    rng = np.random.default_rng(4)
    known, asked, slope = rng.normal(size=(200, 8)), rng.normal(size=(50, 8)), rng.normal(size=8)
    found = classifiers.linear("regression", known, known @ slope + 7, asked, 1, 1)
    assert found.shape == (50, 1)
    assert found[:, 0] == pytest.approx(asked @ slope + 7, abs=0.05)


def test_labels_that_may_hold_together_are_told_one_by_one() -> None:
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(400, 8))
    labels = np.stack([vectors[:, 0] > 0, vectors[:, 1] > 1, np.zeros(400, dtype=bool)], axis=1).astype(np.uint8)
    found = classifiers.linear("multilabel", vectors[:300], labels[:300], vectors[300:], 3, 1)
    assert ((found > 0) == labels[300:]).mean(axis=0).min() > 0.9
    assert not (found[:, 2] > 0).any()  # a label that never holds


def batches(labels: torch.Tensor) -> classifiers.Batches:
    def of(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor, None]]:
        order = torch.from_numpy(np.random.default_rng(epoch).permutation(len(labels)))
        return [(rows, labels[rows], None) for rows in order.split(32)]

    return of


def test_a_head_learns_by_descent_and_repeats() -> None:
    (known, labels), (asked, truth) = clouds(1), clouds(2)
    runs = [
        classifiers.head("classification", known, batches(torch.from_numpy(labels)), asked, 3, seed)
        for seed in (1, 1, 2)
    ]
    assert (runs[0].argmax(axis=1) == truth).mean() > 0.95
    assert (runs[0] == runs[1]).all()
    assert (runs[0] != runs[2]).any()


def test_a_head_leaves_the_generator_alone() -> None:
    known, labels = clouds(1, n=40)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    classifiers.head("classification", known, batches(torch.from_numpy(labels)), known, 3, 1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["tokens", "spans"])
def test_a_head_for_each_token(kind: str) -> None:
    """Windows of 6 tokens, the last padded; one direction marks the place that is asked for."""
    rng = np.random.default_rng(6)
    n, width = 120, 6
    vectors = rng.normal(size=(n * width, 4)).astype(np.float32)
    where = rng.integers(width - 1, size=n)
    vectors[np.arange(n) * width + where, 0] += 6
    places = torch.arange(n * width).view(n, width)
    mask = torch.ones(n, width, dtype=torch.int64)
    mask[:, -1] = 0
    if kind == "spans":
        labels = torch.from_numpy(np.stack([where, where], axis=1))
    else:
        labels = torch.zeros(n, width, dtype=torch.int64)
        labels[torch.arange(n), torch.from_numpy(where)] = 1
        labels[:, -1] = NO_LABEL

    def of(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        return [(places[i : i + 8], labels[i : i + 8], mask[i : i + 8]) for i in range(0, n, 8)]

    found = classifiers.head(kind, vectors, of, vectors, 2, 1).reshape(n, width, 2)[:, :-1]
    best = found[:, :, 0].argmax(axis=1) if kind == "spans" else (found[:, :, 1] - found[:, :, 0]).argmax(axis=1)
    assert (best == where).mean() > 0.95
