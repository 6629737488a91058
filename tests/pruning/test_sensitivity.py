"""PLATON and PINS against a slow loop, and what a dense gradient does to removed weights."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from capcli.pruning import masked, patterns
from capcli.pruning.criteria import CRITERIA
from capcli.pruning.criteria.seat import Step, Subject, window_of

N = 6


def subject_of(total_steps: int = 400) -> Subject:
    linear = nn.Linear(3, 2)
    matrices = masked.attach({"w": linear}, learned=False, dense=True)
    return Subject(
        matrices=matrices, structure=patterns.Unstructured(sizes=[N], scope="global"), total_steps=total_steps
    )


def platon(weight: float, gradient: float, lr: float) -> float:
    return abs(weight * gradient)


def pins(weight: float, gradient: float, lr: float) -> float:
    """The change of the loss when the weight is dropped instead of updated."""
    return abs(-weight * gradient + lr * gradient * gradient)


def slow(
    weights: list[list[float]],
    gradients: list[list[float]],
    lrs: list[float],
    sensitivity: Callable[[float, float, float], float],
    b2: float,
) -> list[float]:
    """Smoothed sensitivity times uncertainty of each weight after all steps, windows of 10, b1 = 0.85."""
    scores = []
    for i in range(N):
        smooth = uncertainty = 0.0
        for begin in range(0, len(weights) // 10 * 10, 10):
            steps = range(begin, begin + 10)
            mean = sum(sensitivity(weights[t][i], gradients[t][i], lrs[t]) for t in steps) / 10
            smooth = 0.85 * smooth + 0.15 * mean
            uncertainty = b2 * uncertainty + (1 - b2) * abs(mean - smooth)
        scores.append(smooth * uncertainty)
    return scores


@pytest.mark.parametrize(("name", "by_hand", "b2"), [("platon", platon, 0.95), ("pins", pins, 0.99)])
@pytest.mark.parametrize("n_steps", [10, 27, 40])
def test_scores_are_those_of_the_slow_loop(
    name: str, by_hand: Callable[[float, float, float], float], b2: float, n_steps: int
) -> None:
    criterion, subject = CRITERIA[name], subject_of()
    assert criterion.observe is not None
    rng = torch.Generator().manual_seed(3)
    weights = torch.randn(n_steps, N, generator=rng)
    gradients = torch.randn(n_steps, N, generator=rng)
    lrs = torch.rand(n_steps, generator=rng).tolist()
    state = criterion.init(subject)
    for step in range(n_steps):
        original = subject.matrices.original(0)
        with torch.no_grad():
            original.copy_(weights[step].view(2, 3))
        original.grad = 8 * gradients[step].view(2, 3)  # as a scaled loss in 16 bits leaves them
        criterion.observe(state, subject, Step(number=step, lr=lrs[step], scale=8.0))
    expected = torch.tensor(slow(weights.tolist(), gradients.tolist(), lrs, by_hand, b2))
    assert torch.allclose(criterion.scores(state, subject), expected, rtol=1e-4)


def test_nothing_is_known_before_the_first_window_ends() -> None:
    subject = subject_of()
    state = CRITERIA["pins"].init(subject)
    subject.matrices.original(0).grad = torch.ones(2, 3)
    CRITERIA["pins"].observe(state, subject, Step(number=0, lr=0.1))  # type: ignore[misc]
    assert state["window"].any()
    assert not CRITERIA["pins"].scores(state, subject).any()


def test_a_step_that_overflowed_counts_as_no_sensitivity() -> None:
    subject = subject_of(20)  # windows of one step
    state = CRITERIA["pins"].init(subject)
    subject.matrices.original(0).grad = torch.full((2, 3), torch.inf)
    CRITERIA["pins"].observe(state, subject, Step(number=0, lr=0.1))  # type: ignore[misc]
    assert CRITERIA["pins"].scores(state, subject).tolist() == [0.0] * N


@pytest.mark.parametrize(("total", "window"), [(5, 1), (60, 3), (200, 10), (100_000, 10)])
def test_windows_are_shorter_in_short_runs(total: int, window: int) -> None:
    assert window_of(total) == window


@pytest.mark.parametrize("dense", [False, True])
def test_a_removed_weight_is_trained_only_with_the_dense_gradient(dense: bool) -> None:
    """Both compute with the weight masked; only the dense gradient tells what a removed weight would be good for."""
    linear = nn.Linear(3, 2, bias=False)
    matrices = masked.attach({"w": linear}, learned=False, dense=dense)
    matrices.mask.copy_(torch.tensor([1.0, 0, 1, 0, 1, 0]))
    inputs = torch.tensor([[1.0, 2.0, 3.0]])
    weight = matrices.original(0).detach().clone()
    output = linear(inputs)
    assert torch.allclose(output, inputs @ (weight * matrices.mask.view(2, 3)).T)
    output.sum().backward()
    gradient = matrices.original(0).grad
    assert gradient is not None
    whole = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    assert torch.equal(gradient, whole if dense else whole * matrices.mask.view(2, 3))
