"""Smoothed sensitivity: PLATON (arXiv 2206.12562) and PINS (arXiv 2305.12394); section 3 of the design's METHODS.

Letters: n prunable weights. A weight that is removed is trained on with the whole gradient, and may come back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from capcli.pruning.criteria.seat import Criterion, State, Step, Subject, window_of

SMOOTHING = 0.85  # of the sensitivity: what is left of it after a window
UNCERTAINTY = {"platon": 0.95, "pins": 0.99}  # the same of the uncertainty

Sensitivity = Callable[[Tensor, Tensor, float], Tensor]


def weight_times_gradient(weight: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """abs(w·g), what the loss changes by to first order without the weight (PLATON)."""
    return (weight * gradient).abs_()


def without_update(weight: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """abs(-w·g + lr·g²): by how much dropping the weight is worse than updating it (PINS)."""
    return (lr * gradient.square() - weight * gradient).abs_()


def init(subject: Subject) -> State:
    """The mean of the window so far, the smoothed mean, and its uncertainty, each [n] and zero."""
    zero = torch.zeros_like(subject.matrices.mask)
    return {"window": zero, "smooth": zero.clone(), "uncertainty": zero.clone()}


def observer(sensitivity: Sensitivity, keeps: float) -> Callable[[State, Subject, Step], None]:
    """A running mean over each window of steps (see `seat.window_of`), smoothed from window to window.

    At the end of a window: smooth <- b1·smooth + (1 - b1)·window, then uncertainty <- b2·uncertainty + (1 - b2)·
    abs(window - smooth), with b1 `SMOOTHING` and b2 `keeps`.
    """

    def observe(state: State, subject: Subject, step: Step) -> None:
        gradient = subject.matrices.flat_gradient() / step.scale
        found = sensitivity(subject.matrices.flat_weights(), gradient, step.lr)
        found = torch.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)  # of a 16-bit step that overflowed
        window = window_of(subject.total_steps)
        place = step.number % window
        state["window"].lerp_(found, 1 / (place + 1))
        if place + 1 == window:
            state["smooth"].lerp_(state["window"], 1 - SMOOTHING)
            state["uncertainty"].lerp_((state["window"] - state["smooth"]).abs_(), 1 - keeps)

    return observe


def scores(state: State, subject: Subject) -> Tensor:
    """Smoothed sensitivity times uncertainty, [n]."""
    return state["smooth"] * state["uncertainty"]


def row(name: str, sensitivity: Sensitivity) -> Criterion:
    """The criterion `name` with its measure of sensitivity."""
    return Criterion(
        scores=scores,
        init=init,
        observe=observer(sensitivity, UNCERTAINTY[name]),
        gradient="dense",
        due="window",
        scope="global",
        state_per_weight=3,
    )


PLATON, PINS = row("platon", weight_times_gradient), row("pins", without_update)
