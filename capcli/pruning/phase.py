"""A training phase of a run: its job, and the best state on the held-out part."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from capcli import files, parallel, stages
from capcli.errors import RunFailed
from capcli.events import Event, told
from capcli.models import compiled
from capcli.models.model import Model
from capcli.pruning import rates, train
from capcli.pruning.objective import Job, Objective, Split, Steps
from capcli.pruning.pruner import Pruner
from capcli.pruning.setup import Setup, measured, nothing, origin_of
from capcli.reporting.text import number, percent
from capcli.stored import read_json


def make_job(
    setup: Setup,
    model: Model,
    phase: str,
    objective: Objective,
    pruner: Pruner | None,
    snapshot: Callable[[int], Steps] | None = None,
) -> Job:
    """The job of a phase: `teacher`, or `prune` with a pruner, which keeps the best epoch of the held-out part."""
    config = setup.config
    epochs = config.teacher_passes(len(setup.train), len(setup.data.labels)) if phase == "teacher" else config.epochs

    def epoch_end(epoch: int, step: int) -> Steps:
        event, total_steps = setup.meter.of(phase), epochs * train.steps_per_epoch(setup.train, config.batch_size)

        def quiet(done: float = 0, total: float = 0) -> Event:
            status = f"step {step:,}/{total_steps:,}, epoch {epoch + 1}/{epochs}, measuring"
            return event(done=step, total=total_steps, status=status)

        one = yield from told(measured(setup, model, setup.curve, with_intervals=False), quiet)
        if pruner is not None and setup.data.holdout is not None:
            _keep_best(setup, model, pruner, step, parallel.share(one.metrics[setup.data.primary]))
        where = f"{one.n_examples:,}{' held-out' if setup.data.holdout is not None else ''} examples"
        note = f"epoch {epoch + 1}/{epochs}: {_figures(one.metrics)} on {where}"
        note += f", sparsity {percent(pruner.sparsity)}" if pruner else ""
        yield event(done=step, total=total_steps, note=note)
        return one.metrics

    return Job(
        run=setup.run,
        phase=phase,
        model=model,
        examples=setup.train,
        config=config,
        on=setup.on,
        epochs=epochs,
        lr=rates.peak(config, phase, model),
        objective=objective,
        pruner=pruner,
        snapshot=snapshot or (lambda step: nothing()),
        epoch_end=epoch_end,
        event=setup.meter.of(phase),
        of=origin_of(setup, f"{phase}-steps"),
        split=Split(examples=config.micro_batch if config.micro_batch < config.batch_size else 0),
        layers=compiled.layers(model) if config.compile else None,
    )


def _figures(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in found.items())


def _keep_best(setup: Setup, model: Model, pruner: Pruner, step: int, value: float) -> None:
    """Publish the state when it is at the target sparsity and better on the held-out part than any before.

    Raises `RunFailed` when the best so far is damaged, for nobody then knows what is better.
    """
    if pruner.sparsity != pruner.final or not math.isfinite(value):
        return
    of = origin_of(setup, "best")
    best, why = best_state(setup, of)
    if why:
        raise lost_best(why)
    if best is not None and best[1] >= value:
        return
    tensors = {f"net.{name}": tensor for name, tensor in model.net.state_dict().items()}
    tensors |= {f"pruner.{name}": tensor for name, tensor in pruner.tensors().items()}

    def write(staging: Path) -> None:
        files.write_tensors(staging / "best.safetensors", tensors)
        files.write_json(staging / "best.json", {"step": step, "value": value})
        files.write_json(staging / stages.STAGE, {"of": of})

    stages.publish(setup.run, of["stage"], write)


def best_state(setup: Setup, of: dict[str, Any]) -> tuple[tuple[int, float] | None, str]:
    """Step and value of the state that is kept, or None, and why, if something is there that cannot be used."""
    stage, why = stages.found_stage(setup.run, of)
    if stage is None:
        return None, why
    found = read_json(setup.run.work / of["stage"] / "best.json")
    return (found["step"], found["value"]), ""


def lost_best(why: str) -> RunFailed:
    """The error when the best epoch so far cannot be read any more."""
    return RunFailed(why, "run the same command again: it continues from before the best epoch")


def best_of(setup: Setup, history: list[dict[str, Any]]) -> tuple[int, float] | None:
    """Step and value of the epoch that `_keep_best` keeps, by the history of the pruning; None when it keeps none."""
    found: tuple[int, float] | None = None
    for row in history:
        value = row["metrics"].get(setup.data.primary)
        counts = value is not None and row["sparsity"] == setup.config.sparsity and math.isfinite(value)
        if counts and (found is None or value > found[1]):
            found = row["step"], value
    return found


def check_best(setup: Setup) -> Generator[Event, None, None]:
    """Before going on: where the best epoch that the newest checkpoint knows of is lost, go back to before it."""
    if setup.data.holdout is None:
        return
    of, steps = origin_of(setup, "best"), origin_of(setup, "prune-steps")
    best, why = best_state(setup, of)
    if why:
        stages.remove(setup.run.work / of["stage"])
        yield setup.meter.of("prune")(note=f"{why}; it is redone")
    while True:
        checkpoint, warnings = stages.load_checkpoint(setup.run, steps)
        for warning in warnings:
            yield setup.meter.of("prune")(note=warning)
        wanted = best_of(setup, checkpoint.scalars["history"]) if checkpoint else None
        if checkpoint is None or wanted is None or _serves(best, wanted, checkpoint.step):
            return
        if not why:
            why = f"{setup.run.work / of['stage']} does not contain the best epoch"
            yield setup.meter.of("prune")(note=f"{why}, that of step {wanted[0]}; it is redone")
        stages.drop_checkpoints(setup.run, steps["stage"], after=wanted[0] - 1)


def _serves(best: tuple[int, float] | None, wanted: tuple[int, float], step: int) -> bool:
    """Whether the state that is kept is the wanted one, or that of a step after `step`, which was better."""
    return best is not None and (best == wanted or (best[0] > step and best[1] > wanted[1]))
