"""What a training phase derives from its configuration."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import Tiny, random_examples, write_model

from capcli.config.names import METHODS
from capcli.data import batches
from capcli.data.batches import Batch
from capcli.events import Event, StopFlag
from capcli.measuring.scoring import retention
from capcli.models import devices, loading, predict, task_losses
from capcli.pruning import gradients, schedules, train
from capcli.pruning.calibration import Calibration
from capcli.pruning.criteria.seat import Step
from capcli.pruning.objective import (
    PHASES,
    Job,
    Objective,
    Steps,
    compared,
    make_projections,
    outputs,
    step_seed,
    terms_of,
    weighted,
)
from capcli.pruning.pruner import make_pruner
from capcli.stages import RunFolder


def test_every_seed_phase_and_step_has_noise_of_its_own() -> None:
    """In 32 bits, because torch's CPU generator uses no more."""
    seeds = {step_seed(seed, phase, step) for seed in range(5) for phase in PHASES for step in range(200)}
    assert len(seeds) == 5 * len(PHASES) * 200
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert step_seed(2**40, "prune", 3) == step_seed(2**40, "prune", 3)


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
def test_learning_rate_rises_then_falls(warmup: float) -> None:
    factors = [schedules.lr_factor(step, 50, warmup) for step in range(50)]
    top = factors.index(max(factors))
    assert max(factors) == 1
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert min(factors) > 0


@pytest.mark.parametrize(
    ("n_states", "expected"), [(13, [0, 2, 4, 6, 8, 10, 12]), (7, [0, 2, 4, 6]), (4, [0, 2, 3]), (2, [0, 1]), (1, [0])]
)
def test_hidden_states_of_the_embeddings_every_second_layer_and_the_last_are_compared(
    n_states: int, expected: list[int]
) -> None:
    assert compared(n_states) == expected


def hidden_job(tiny: Tiny, tmp_path: Path, structure: str, losses: str, step: int) -> tuple[Job, Batch]:
    """A phase at `step` of 100 with a teacher of other weights, and a batch."""
    write_model(tmp_path / "teacher", seed=3)
    chosen = tiny.prune_config(tmp_path / "out", method="first-order", structure=structure, losses=losses)
    labels = ("negative", "positive")
    student, teacher = (
        loading.load_dense(folder, labels, "classification", 1) for folder in (tiny.model, str(tmp_path / "teacher"))
    )
    examples = random_examples(8, 12)
    batch = batches.collate(examples, np.arange(8), torch.device("cpu"))
    objective = Objective(losses=chosen.loss_names, teacher=teacher, projections=make_projections(teacher, batch))
    pruner = make_pruner(student, chosen, total_steps=100)
    pruner.sparsity = pruner.scheduled(step)

    def nothing(*_: int) -> Steps:
        return {}
        yield

    return Job(
        run=RunFolder(out=tmp_path / "out", flag=StopFlag()),
        phase="prune",
        model=student,
        examples=examples,
        config=chosen,
        on=devices.compute(chosen.hardware),
        epochs=1,
        lr=1e-4,
        objective=objective,
        pruner=pruner,
        snapshot=nothing,
        epoch_end=nothing,
        event=lambda **_: Event(phase="prune"),
    ), batch


def found_gradients(job: Job, batch: Batch, step: int, *, plainly: bool) -> dict[str, torch.Tensor]:
    parameters = gradients.trained_parameters(job)
    for parameter in parameters.values():
        parameter.grad = None
    torch.manual_seed(0)
    if plainly:
        terms = weighted(job, terms_of(job, batch, outputs(job, batch), step))
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
    else:
        no_scaler = torch.amp.GradScaler(enabled=False)
        gradients.of_step(job, no_scaler, batch.ids.numpy(), Step(number=step, lr=1e-3))
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("structure", ["heads", "dimensions"])
@pytest.mark.parametrize("step", [20, 99])
def test_hidden_states_teach_but_do_not_decide_what_is_removed(
    tiny: Tiny, tmp_path: Path, structure: str, step: int
) -> None:
    """Gradients are those of all terms; importance is that of the others, and stays when the sparsity is final."""
    seen = []
    for losses in ("ce", "ce,hid"):
        job, batch = hidden_job(tiny, tmp_path, structure, losses, step)
        found = found_gradients(job, batch, step, plainly=False)
        wanted = found_gradients(job, batch, step, plainly=True)
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)
        assert any(name.startswith(gradients.PROJECTION) for name in found) is (losses == "ce,hid")
        assert job.pruner is not None
        seen.append((job.pruner.tensors(), found))
    (alone, plain), (both, taught) = seen
    assert all(torch.equal(alone[name], both[name]) for name in alone)
    observed = alone["importance"]
    assert bool(observed.any()) is (step == 20)
    assert not all(torch.allclose(plain[name], taught[name], rtol=1e-2, atol=1e-6) for name in plain)


def test_rates_rise_and_fall_on_each_stair_of_the_paper(tiny: Tiny, tmp_path: Path) -> None:
    """Nine removals of a tenth at 90 %, of the same length; warm-up over a tenth of each, as its code restarts it."""
    chosen = tiny.prune_config(tmp_path, method="cap-f", preset="paper", sparsity=0.6, epochs=12, importance_examples=9)
    job, _ = hidden_job(tiny, tmp_path, "heads", "ce", 0)
    model = loading.load_dense(tiny.model, ("negative", "positive"), "classification", 1)
    calibration = Calibration(model=model, examples=job.examples, device=torch.device("cpu"), seed=1, count=9)
    pruner = make_pruner(model, chosen, 240, calibration)
    job = dataclasses.replace(job, config=chosen, pruner=pruner)
    assert [round(pruner.scheduled(step), 6) for step in range(0, 240, 40)] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert job.rises == [40, 80, 120, 160, 200]
    stair = [(step + 1) / 4 if step < 4 else (40 - step) / 36 for step in range(40)]
    assert [train.lr_factor(job, step, 240) for step in range(240)] == pytest.approx(6 * stair)


def test_importance_is_measured_by_all_terms_but_hidden_states_without_dropout(tiny: Tiny, tmp_path: Path) -> None:
    """In 32 bits, whatever the steps are computed in."""
    job, batch = hidden_job(tiny, tmp_path, "heads", "ce,kd,hid", 20)
    low = dataclasses.replace(job.on, dtype=torch.bfloat16)
    teacher = torch.randn(8, 2)
    job = dataclasses.replace(job, on=low, objective=dataclasses.replace(job.objective, logits=teacher))
    job.model.net.eval()
    logits = predict.forward(job.model, batch.inputs)[0]
    ce, kd = F.cross_entropy(logits, batch.labels), task_losses.distillation(logits, teacher, "classification", 2.0)
    leaves = [job.model.net.get_parameter(name) for name in ("classifier.weight", "classifier.bias")]
    wanted = torch.autograd.grad(0.1 * ce + 0.9 * kd, leaves)
    found = gradients.of_importance(job, batch.ids.numpy(), 3, leaves)
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-8) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("scale", "ratio"), [("t2", 1.0), ("none", 1 / 64)])
def test_distillation_is_scaled_as_chosen(tiny: Tiny, tmp_path: Path, scale: str, ratio: float) -> None:
    job, batch = hidden_job(tiny, tmp_path, "heads", "kd", 0)
    teacher = torch.randn(8, 2)
    chosen = dataclasses.replace(job.config, kd_scale=scale, kd_temperature=8.0)
    job = dataclasses.replace(job, config=chosen, objective=dataclasses.replace(job.objective, logits=teacher))
    job.model.net.eval()
    logits = predict.forward(job.model, batch.inputs)[0]
    wanted = ratio * task_losses.distillation(logits, teacher, "classification", 8.0)
    assert float(terms_of(job, batch, outputs(job, batch), 0)["kd"].detach()) == pytest.approx(float(wanted), rel=1e-6)


def test_projections_start_at_identity_beside_the_teacher(tiny: Tiny, tmp_path: Path) -> None:
    job, _ = hidden_job(tiny, tmp_path, "heads", "ce,hid", 0)
    assert len(job.objective.projections) == 2  # embeddings and the second of two layers
    assert all(torch.equal(projection, torch.eye(32)) for projection in job.objective.projections)
    optimizer = train.make_optimizer(job)
    held = {group["kind"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    assert {id(projection) for projection in job.objective.projections} <= held["plain"]


def test_retention_leaves_out_what_the_baseline_lacks() -> None:
    found = retention({"accuracy": 0.8, "f1": 0.5, "pearson": 0.1}, {"accuracy": 0.9, "f1": 0.0, "pearson": None})  # type: ignore[dict-item]
    assert found == {"accuracy": pytest.approx(0.8 / 0.9)}


def test_methods_name_their_losses_once() -> None:
    assert all(len(set(method.losses)) == len(method.losses) for method in METHODS.values())
