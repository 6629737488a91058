"""How long calls take, measured by turns, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

MOST_ROUNDS = 30
Call = Callable[[], tuple[Tensor, Tensor | None]]
"""A `Run` with its inputs."""
Times = list[list[float]]
"""Seconds: a row per round, in it one of each call."""


def full_inputs(tokenizer: Any, batch: int, length: int) -> Any:
    """`batch` inputs of `length` tokens each, as latency is measured on."""
    text = "a " * length  # each word is a token at least
    return tokenizer([text] * batch, truncation=True, max_length=length, return_tensors="pt")


def by_turns(calls: Sequence[Call], seconds: float, least: int = 3) -> Times:
    """Seconds of each call in every round, after one that is not counted: `least` to 30 rounds, as the time allows."""
    for call in calls:
        call()
    rounds: Times = []
    began = time.perf_counter()
    while len(rounds) < least or (len(rounds) < MOST_ROUNDS and time.perf_counter() - began < seconds):
        rounds.append([_seconds(call) for call in calls])
    return rounds


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()[0].cpu()  # waits for the device
    return time.perf_counter() - start
