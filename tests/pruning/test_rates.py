"""Learning rates that are not chosen follow the width of the model, and a run says which they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny, outcome

from capcli.config.prune import PruneConfig
from capcli.config.task import TaskConfig
from capcli.models import loading
from capcli.pruning import rates


def config(**chosen: Any) -> PruneConfig:
    return PruneConfig(source=TaskConfig(task="mr"), **chosen)


@pytest.mark.parametrize(("width", "times"), [(1024, 0.75), (768, 1), (384, 2), (192, 4), (32, 4)])
def test_a_rate_that_is_not_chosen_is_inverse_to_the_width(
    checkpoint: Callable[..., Path], width: int, times: float
) -> None:
    model = loading.load_model(str(checkpoint()), ("negative", "positive"), "classification", 1)
    model.net.config.hidden_size = width
    assert rates.peak(config(), "prune", model) == pytest.approx(1e-4 * times)
    assert rates.peak(config(), "teacher", model) == pytest.approx(5e-5 * times)
    assert rates.peak(config(lr_scale=2.0), "teacher", model) == pytest.approx(1e-4 * times)
    assert rates.peak(config(lr=3e-5, teacher_lr=2e-5, lr_scale=2.0), "prune", model) == 3e-5
    assert rates.peak(config(lr=3e-5, teacher_lr=2e-5), "teacher", model) == 2e-5


def test_a_run_trains_with_it_and_says_so(tiny: Tiny, tmp_path: Path) -> None:
    """The tiny model has a width of 32, which is below that of the largest rate."""
    for name, chosen in (("own", (0, 0)), ("chosen", (4e-4, 2e-4))):
        tiny.prune(tmp_path / name, epochs=1, teacher_epochs=1, lr=chosen[0], teacher_lr=chosen[1])
    assert outcome(tmp_path / "own") == outcome(tmp_path / "chosen")
    notes = json.loads((tmp_path / "own" / "report.json").read_text())["notes"]
    assert "--lr is 0.0004 and --teacher-lr is 0.0002, chosen for a hidden size of 32" in notes
