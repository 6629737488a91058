"""The student: pruned from what teacher and banks give, with snapshots of itself on the way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from capcli import stages
from capcli.config.paths import shortened
from capcli.data import batches
from capcli.data.kinds import KINDS
from capcli.events import Event
from capcli.models.model import Model
from capcli.pruning import banks, basis, train
from capcli.pruning import calibration as calibrating
from capcli.pruning.calibration import Calibration
from capcli.pruning.costs import Measure
from capcli.pruning.gradients import of_importance
from capcli.pruning.objective import Job, Objective, Steps, make_projections
from capcli.pruning.phase import best_of, best_state, check_best, lost_best, make_job
from capcli.pruning.pruner import Pruner, make_pruner, started
from capcli.pruning.setup import Setup, origin_of
from capcli.pruning.teacher import make_bank
from capcli.pruning.train import Progress
from capcli.reporting.text import counted, percent
from capcli.stored import read_tensors


def train_student(
    setup: Setup,
    student: Model,
    pretrained: Any,
    finetuned: Any,
    logits: Any,
    teacher: Model | None,
    measure: Measure,
) -> Generator[Event, None, tuple[Pruner, Progress]]:
    """Prune the student; returns its pruner and the final state. `teacher` is there when `config.needs_teacher`;
    `measure` is what the sparsity counts."""
    config = setup.config
    total = config.epochs * train.steps_per_epoch(setup.train, config.batch_size)

    def gradient(rows: NDArray[np.int64], step: int, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return of_importance(job, rows, step, leaves)

    calibration = _calibration(setup, student, teacher, gradient)
    if config.basis == "pca":
        yield setup.meter.of("prune")(status="turning the heads")
        basis.rotate(student, calibration)
    pruner = make_pruner(student, config, total, calibration, measure)
    modules = {"prc": [pretrained], "snc": [], "fic": [finetuned]}
    table = {name: banks.Bank(vectors=modules[name]) for name in modules if name in config.loss_names}
    classes = _classes(setup, logits)
    objective = Objective(losses=config.loss_names, logits=logits, labels=classes, banks=table)
    if teacher is not None:
        teacher.net.eval().requires_grad_(False).zero_grad()  # it may have been trained in this run
        objective = dataclasses.replace(objective, teacher=teacher)
    if teacher is not None and "hid" in config.loss_names:
        example = batches.collate(setup.train, np.arange(1), setup.on.device)
        projections = make_projections(teacher, example)
        objective = dataclasses.replace(objective, projections=projections)
    due = _due(setup, pruner, total) if "snc" in table else []
    yield from _check_snapshots(setup, due)
    yield from check_best(setup)
    snapshot = _snapshots(setup, student, table["snc"], due, total) if "snc" in table else None
    job = make_job(setup, student, "prune", objective, pruner, snapshot)
    if not total:
        job = yield from _calibrated(setup, job, pruner, calibration)
    elif config.calibrated_start:
        start = started(pruner, config.calibrated_start, calibration)
        job = dataclasses.replace(job, spent=(yield from _climb(setup, job, start, config.calibrated_start)))
        pruner.start(start)
    state = yield from train.train(job)
    if setup.data.holdout is not None and best_of(setup, state.history):
        _take_best(setup, student, pruner)
    return pruner, state


def _classes(setup: Setup, logits: torch.Tensor | None) -> torch.Tensor | None:
    """The class of each example, [N], by the teacher where there are no labels; None where no two share one."""
    if not KINDS[setup.data.kind].single:
        return None
    if setup.config.source.text:
        return None if logits is None else logits.argmax(dim=-1)
    return torch.from_numpy(setup.train.labels).to(setup.on.device)


def _calibrated(setup: Setup, job: Job, pruner: Pruner, calibration: Calibration) -> Generator[Event, None, Job]:
    """Prune without training, unless a checkpoint holds the outcome; returns the job that heals it, which may be none.

    The examples of the first stair are what it heals on.
    """
    spent = yield from _climb(setup, job, pruner, setup.config.stair_list)
    examples = batches.taken(setup.train, calibration.rows(0)) if setup.config.heal else job.examples
    return dataclasses.replace(
        job,
        examples=examples,
        steps=setup.config.heal,
        spent=spent,
        epoch_end=lambda epoch, step: _unmeasured(),
    )


def _climb(setup: Setup, job: Job, pruner: Pruner, stairs: Sequence[float]) -> Generator[Event, None, float]:
    """Take one stair after another, unless there is a checkpoint, which was made after them; returns the seconds."""
    began, event = time.monotonic(), setup.meter.of("prune")
    checkpoint, warnings = stages.load_checkpoint(setup.run, job.of)
    for warning in warnings:
        yield event(note=warning)
    for step, sparsity in enumerate(stairs if checkpoint is None else ()):
        yield event(done=step, total=len(stairs), status=f"calibrating, {percent(sparsity)}")
        pruner.update(step)
    return time.monotonic() - began


def _unmeasured() -> Steps:
    """The end of an epoch at which nothing is measured."""
    return {}
    yield


def untrained(setup: Setup) -> list[str]:
    """A note when nothing is trained, or only healed."""
    config, count = setup.config, min(setup.config.calibration, len(setup.train))
    if config.epochs:
        return []
    fitted = "masks and weights come" if config.refit else "the masks come"
    heal = f"; then {counted(config.heal, 'step')} of distillation on them, with fixed masks" if config.heal else ""
    return [f"nothing was trained: {fitted} from {counted(count, 'calibration example')}{heal}"]


def only_masks(setup: Setup) -> list[str]:
    """A note on what was trained, where masks are learned and weights stay as they are."""
    config = setup.config
    if not config.masks_only:
        return []
    whose = "the teacher" if config.from_teacher else f"{shortened(config.model)}, with the head of the teacher"
    rest = "were trained" if config.train_head else "are frozen"
    return [f"only masks were learned: the weights are those of {whose}; head and norms {rest}"]


def _calibration(setup: Setup, student: Model, teacher: Model | None, gradient: calibrating.Gradient) -> Calibration:
    """What is measured on examples, where anything is. A run without training has nothing to lose and stops at once."""
    config = setup.config
    return Calibration(
        model=student,
        examples=setup.train,
        device=setup.on.device,
        seed=config.seed,
        count=config.calibration,
        block=config.fisher_block,
        regrow=config.regrow,
        target=teacher if config.refit_target == "teacher" else None,
        gradient=gradient,
        batch_size=config.batch_size,
        asked=teacher if config.source.text and config.staged and not KINDS[setup.data.kind].vectors else None,
        check=(lambda: None) if config.epochs else setup.run.flag.check,
    )


def _take_best(setup: Setup, student: Model, pruner: Pruner) -> None:
    """Put the best epoch back into student and pruner. Raises `RunFailed` when it is lost."""
    of = origin_of(setup, "best")
    folder = setup.run.work / of["stage"]
    best, why = best_state(setup, of)
    if best is None:
        raise lost_best(why or f"{folder} is gone")
    parts = read_tensors(folder / "best.safetensors")
    student.net.load_state_dict({name[4:]: t for name, t in parts.items() if name.startswith("net.")})
    kept = {name[7:]: t for name, t in parts.items() if name.startswith("pruner.")}
    pruner.restore(kept, setup.config.sparsity)


def _due(setup: Setup, pruner: Pruner, n_steps: int) -> list[int]:
    """Before which steps the student is added to the snapshot bank: at each epoch boundary, or before each rise of the
    sparsity."""
    if pruner.few_rises:
        return pruner.rises_at()
    per_epoch = train.steps_per_epoch(setup.train, setup.config.batch_size)
    return list(range(per_epoch, n_steps, per_epoch))


def _check_snapshots(setup: Setup, due: list[int]) -> Generator[Event, None, None]:
    """Before going on: drop the checkpoints beyond a snapshot that is lost, so that it is made again."""
    for index, step in enumerate(due):
        stage, why = stages.found_stage(setup.run, origin_of(setup, f"bank-snapshot-{index:03d}"))
        if stage is None:
            stages.drop_checkpoints(setup.run, "prune-steps", after=step)
        if why:
            yield setup.meter.of("prune")(note=f"{why}; it is redone, from before step {step}")
            stages.remove(setup.run.work / f"bank-snapshot-{index:03d}")


def _snapshots(setup: Setup, student: Model, bank: banks.Bank, due: list[int], n_steps: int) -> Callable[[int], Steps]:
    """Adds the student as it is to the snapshot bank; on resume those of earlier steps are read back."""
    event = setup.meter.of("prune")

    def snapshot(step: int) -> Steps:
        def quiet(done: float = 0, total: float = 0) -> Event:
            setup.run.flag.check()
            return event(done=step, total=n_steps, status=f"step {step:,}/{n_steps:,}, snapshot")

        while bank.n_vectors < len(due) and due[bank.n_vectors] <= step:
            index = bank.n_vectors
            vectors, _ = yield from make_bank(setup, f"snapshot-{index:03d}", student, quiet)
            bank.vectors.append(vectors)

    return snapshot
