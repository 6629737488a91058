"""What a training phase derives from its configuration."""

import pytest

from capcli.config import METHODS
from capcli.train import PHASES, lr_factor, step_seed
from capcli.verbs.evaluate import retention


def test_every_seed_phase_and_step_has_noise_of_its_own() -> None:
    """In 32 bits, because torch's CPU generator uses no more."""
    seeds = {step_seed(seed, phase, step) for seed in range(5) for phase in PHASES for step in range(200)}
    assert len(seeds) == 5 * len(PHASES) * 200
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert step_seed(2**40, "prune", 3) == step_seed(2**40, "prune", 3)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
def test_learning_rate_rises_then_falls(warmup: float) -> None:
    factors = [lr_factor(step, 50, warmup) for step in range(50)]
    top = factors.index(max(factors))
    assert max(factors) == 1
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert min(factors) > 0


def test_retention_leaves_out_what_the_baseline_lacks() -> None:
    found = retention({"accuracy": 0.8, "f1": 0.5, "pearson": 0.1}, {"accuracy": 0.9, "f1": 0.0, "pearson": None})  # type: ignore[dict-item]
    assert found == {"accuracy": pytest.approx(0.8 / 0.9)}


def test_methods_name_their_losses_once() -> None:
    assert all(len(set(method.losses)) == len(method.losses) for method in METHODS.values())
