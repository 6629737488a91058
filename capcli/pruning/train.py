"""One training phase: the loop that fine-tunes the teacher and prunes the student.

Letters: B batch, N examples, C labels, H hidden size.

Everything random is a pure function of (seed, phase, step), so that a checkpoint holds no generator state and a run
that was killed goes on as if it had not been.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from capcli import parallel, stages
from capcli.data import batches
from capcli.data.batches import Examples
from capcli.errors import CapError, RunFailed, Stopped
from capcli.events import Event
from capcli.pruning import gradients, schedules
from capcli.pruning.criteria.seat import ERRORS, Step
from capcli.pruning.gradients import PROJECTION, trained_parameters
from capcli.pruning.objective import Job, step_seed
from capcli.reporting.text import counted, percent
from capcli.stages import Checkpoint

HISTORY_ROWS = 400
LOSS_EVERY = 10  # steps between looks at the loss on a device that would have to be waited for


@dataclass(kw_only=True)
class Progress:
    """Where a phase stands. `sums` are the loss terms added up since the last history row, of `summed` steps; `loss` is
    the one that was looked at last. split: examples that go through the network at once, 0 for all of a step."""

    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    summed: int = 0
    loss: float | None = None
    split: int = 0


def train(job: Job) -> Generator[Event, None, Progress]:
    """Run the phase to its end from its newest good checkpoint; yields events.

    Raises:
        Stopped: after a checkpoint, when the run's flag is set.
        RunFailed: non-finite loss, naming the first bad tensor; the checkpoints stay.
    """
    optimizer = make_optimizer(job)
    scaler = torch.amp.GradScaler(job.on.device.type, enabled=job.on.dtype == torch.float16)
    state, warnings = _resume(job, optimizer, scaler)
    for warning in warnings:
        yield job.event(note=warning)
    per_epoch = steps_per_epoch(job.examples, job.config.batch_size)
    total, saved_at = job.total, time.monotonic()
    if state.step:
        yield job.event(done=state.step, total=total, note=f"continuing at step {state.step} of {total}")
    order: tuple[int, list[Any]] = (-1, [])
    row_every = max(1, total // HISTORY_ROWS)
    job.model.net.train()
    while state.step < total:
        began, step = time.monotonic(), state.step
        epoch, position = divmod(step, per_epoch)
        if order[0] != epoch:
            order = epoch, batches.training_order(job.examples, job.config.batch_size, job.config.seed, epoch)
        yield from job.snapshot(step)
        if job.pruner is not None and job.pruner.measures(step):
            yield job.event(done=step, total=total, status=f"step {step:,}/{total:,}, calibrating")
        split = job.split.examples
        terms = take_step(job, optimizer, scaler, step, total, order[1][position])
        if job.split.examples != split:
            yield job.event(done=step, total=total, note=f"out of memory: {in_parts(job.split.examples)}")
        state.split = job.split.examples
        _add(job, state, terms)
        state.step += 1
        state.seconds += time.monotonic() - began
        if job.on.device.type == "cpu" or state.step % LOSS_EVERY == 0:
            state.loss = float(terms["total"])
        yield job.event(done=state.step, total=total, status=_status(job, state, total))
        if position + 1 == per_epoch:
            metrics = yield from job.epoch_end(epoch, state.step)
            yield _row(job, state, metrics, total)
        elif state.step % row_every == 0:
            yield _row(job, state, {}, total)
        late = time.monotonic() - saved_at > job.config.checkpoint_seconds
        stop, late = agreed(job.run.flag.requested(), late)
        if stop or state.step == total or late:
            _save(job, optimizer, scaler, state)
            saved_at = time.monotonic()
        if stop and state.step < total:
            raise Stopped(
                f"stopped by {stop} at step {state.step} of {total}", "run the same command again to continue"
            )
    return state


def agreed(reason: str, late: bool) -> tuple[str, bool]:
    """Why all ranks stop, if one of them should, and whether a checkpoint is due, for which rank 0 has the clock."""
    stop, save = parallel.highest([bool(reason), late and parallel.first()])
    return reason or "another process" * stop, bool(save)


def in_parts(examples: int) -> str:
    """A note on steps that do not fit into memory."""
    return (
        f"steps go through the network in parts of {counted(examples, 'example')}; the result differs only "
        "by rounding and, if the model has dropout, by what is dropped"
    )


def steps_per_epoch(examples: Examples, batch_size: int) -> int:
    """Batches in one pass over the examples."""
    return -(-len(examples) // batch_size)


def make_optimizer(job: Job) -> torch.optim.AdamW:
    """AdamW over weights with decay, biases, norms and projections without, and scores with their own rate."""
    groups: dict[str, list[Tensor]] = {"decayed": [], "plain": [], "scores": []}
    for name, parameter in trained_parameters(job).items():
        matrix = parameter.dim() > 1 and not name.startswith(PROJECTION)
        kind = "scores" if name.endswith(".scores") else "decayed" if matrix else "plain"
        groups[kind].append(parameter)
    rates = {"decayed": job.lr, "plain": job.lr, "scores": job.config.score_lr}
    warms = job.pruner is None or job.pruner.criterion.warms
    decays = {"decayed": job.config.weight_decay, "plain": 0.0, "scores": 0.0}
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "kind": kind,
                "lr": rates[kind],
                "peak_lr": rates[kind],
                "warms": warms or kind != "scores",
                "weight_decay": decays[kind],
            }
            for kind, parameters in groups.items()
            if parameters
        ],
        fused=job.on.device.type in ("cpu", "cuda"),
    )


def lr_factor(job: Job, step: int, total: int, *, warms: bool = True) -> float:
    """Share of the peak rates at `step` of `total`: over the whole run, or inside the current cycle of the sparsity."""
    if job.pruner is not None and job.config.lr_schedule == "cycle":
        step, total = schedules.cycle(step, total, job.rises)
    return schedules.lr_factor(step, total, job.config.lr_warmup if warms else 0.0)


def take_step(
    job: Job, optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler, step: int, total: int, rows: Any
) -> dict[str, Tensor]:
    """One optimiser step on the examples `rows`; returns the loss terms and their weighted sum, detached."""
    torch.manual_seed(step_seed(job.config.seed, job.phase, step))
    factor = lr_factor(job, step, total)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * lr_factor(job, step, total, warms=group["warms"])
    if job.pruner is not None:
        job.pruner.update(step)
    terms = gradients.of_step(job, scaler, rows, Step(number=step, lr=job.lr * factor, scale=scaler.get_scale()))
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(_clipped(optimizer), 1.0)
    scaler.step(optimizer)
    scaler.update()
    return terms


def _clipped(optimizer: torch.optim.AdamW) -> list[Tensor]:
    """The parameters whose common gradient norm is clipped: all but the scores, which have a scale of their own."""
    return [p for group in optimizer.param_groups if group["kind"] != "scores" for p in group["params"]]


# History and checks --------------------------------------------------------------------------------------------------


def _add(job: Job, state: Progress, terms: Mapping[str, Tensor]) -> None:
    for name, value in terms.items():
        state.sums[name] = state.sums[name] + value if name in state.sums else value
    state.summed += 1
    if job.on.device.type == "cpu":
        check_finite(job, state)


def check_finite(job: Job, state: Progress) -> None:
    """Raise `RunFailed` when a loss since the last history row was not finite; names the first bad tensor."""
    bad = [name for name, value in state.sums.items() if not bool(torch.isfinite(value))]
    if not bad:
        return
    tensors = job.model.net.named_parameters()
    first = next((name for name, p in tensors if not bool(torch.isfinite(p).all())), "none of the weights")
    raise RunFailed(
        f"the loss is not finite at step {state.step + 1} of the {job.phase} phase "
        f"(term {bad[0]}; first bad tensor: {first})",
        _calmer(job),
    )


def _calmer(job: Job) -> str:
    """What helps against numbers that are not finite in this phase, and what stays meanwhile."""
    changes = {"--teacher-lr": "teacher_lr"} if job.phase == "teacher" else {"--lr": "lr"}
    if job.config.masks_only and job.phase == "prune" and not job.config.train_head:
        changes = {}
    if job.pruner is not None and "scores" in job.pruner.criterion.trains:
        changes["--score-lr"] = "score_lr"
    kept = stages.kept_stages(job.run, changes.values())
    other = ", or use --precision fp32" if job.on.dtype != torch.float32 else ""
    return f"lower {' or '.join(changes)}{other}" + (f"; this keeps: {', '.join(kept)}" if kept else "")


def _row(job: Job, state: Progress, metrics: Mapping[str, float], total: int) -> Event:
    """Close a history row: means of the loss terms since the last one. Returns it as an event."""
    check_finite(job, state)
    means = {name: float(value) / state.summed for name, value in state.sums.items()}
    per_epoch = steps_per_epoch(job.examples, job.config.batch_size)
    sparsity = job.pruner.sparsity if job.pruner else 0.0
    state.history.append(
        {
            "phase": job.phase,
            "step": state.step,
            "epoch": round(state.step / per_epoch, 4),
            "sparsity": sparsity,
            "losses": means,
            "metrics": dict(metrics),
        }
    )
    state.sums, state.summed = {}, 0
    numbers = {f"loss/{name}": value for name, value in means.items()} | dict(metrics)
    numbers |= {"sparsity": sparsity, "lr": job.lr * lr_factor(job, state.step - 1, total)}
    return job.event(done=state.step, total=total, status=_status(job, state, total), numbers=numbers)


def _status(job: Job, state: Progress, total: int) -> str:
    """Such as `step 7/40, epoch 1/8, loss 0.41, sparsity 63.20 %`."""
    epoch = [] if job.steps else [f"epoch {-(-state.step * job.epochs // total)}/{job.epochs}"]
    parts = [f"step {state.step:,}/{total:,}", *epoch]
    parts += [] if state.loss is None else [f"loss {state.loss:.2f}"]
    parts += [f"sparsity {percent(job.pruner.sparsity)}"] if job.pruner else []
    return ", ".join(parts)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def _save(job: Job, optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler, state: Progress) -> None:
    check_finite(job, state)
    net = job.model.net
    remembered = job.pruner.tensors() if job.pruner else {}  # of which errors that were not measured are NaN
    checked = {**net.state_dict(), **{name: value for name, value in remembered.items() if name != ERRORS}}
    bad = [name for name, value in checked.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise RunFailed(f"weights are not finite at step {state.step}, first bad tensor: {bad[0]}", _calmer(job))
    _check_alike(net, state.step)
    tensors = {f"net.{name}": value for name, value in net.state_dict().items()}
    tensors |= {f"hid.{name}": value for name, value in job.objective.projections.state_dict().items()}
    names = {id(parameter): name for name, parameter in trained_parameters(job).items()}
    for parameter, moments in optimizer.state.items():
        tensors |= {f"adam.{key}.{names[id(parameter)]}": value for key, value in moments.items()}
    tensors |= {f"pruner.{name}": value for name, value in remembered.items()}
    tensors |= {f"sum.{name}": value for name, value in state.sums.items()}
    scalars = {
        "seconds": state.seconds,
        "history": state.history,
        "summed": state.summed,
        "sparsity": job.pruner.sparsity if job.pruner else 0.0,
        "scaler": scaler.state_dict(),
        "split": job.split.examples,
        "evaluation_tokens": job.on.room.tokens,
    }
    stages.save_checkpoint(job.run, _of(job), Checkpoint(step=state.step, tensors=tensors, scalars=scalars))


def _check_alike(net: nn.Module, step: int) -> None:
    """Raise `RunFailed` unless all ranks have the same weights, as they should after the same steps. Common to all."""
    if parallel.size() == 1:
        return
    digest = 0
    for parameter in net.parameters():
        digest = zlib.crc32(parameter.detach().cpu().numpy().tobytes(), digest)
    highest, lowest = parallel.highest([digest, -digest])
    if highest != -lowest:
        raise RunFailed(
            f"the processes have different weights at step {step}",
            "run the same command again; if it happens again, use machines and GPUs of one kind",
        )


def _of(job: Job) -> dict[str, Any]:
    return {**job.of, "stage": f"{job.phase}-steps"}


def _resume(job: Job, optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler) -> tuple[Progress, list[str]]:
    checkpoint, warnings = stages.load_checkpoint(job.run, _of(job))
    if checkpoint is None:
        return Progress(seconds=job.spent), warnings
    job.run.earlier.append(checkpoint.scalars["seconds"])
    parts: dict[str, dict[str, Tensor]] = {"net": {}, "hid": {}, "adam": {}, "pruner": {}, "sum": {}}
    for name, tensor in checkpoint.tensors.items():
        kind, _, rest = name.partition(".")
        parts[kind][rest] = tensor
    try:
        job.model.net.load_state_dict(parts["net"], strict=True)
    except RuntimeError as error:
        raise CapError(
            f"the checkpoints in {job.run.work} do not belong to this model", "start over with --overwrite"
        ) from error
    job.objective.projections.load_state_dict(parts["hid"], strict=True)
    parameters = trained_parameters(job)
    for name, tensor in parts["adam"].items():
        key, _, parameter = name.partition(".")
        on_device = key != "step" or job.on.device.type == "cuda"  # where fused AdamW keeps its step counters
        optimizer.state[parameters[parameter]][key] = tensor.clone().to(job.on.device if on_device else "cpu")
    if job.pruner:
        job.pruner.restore(parts["pruner"], checkpoint.scalars["sparsity"])
    if checkpoint.scalars["split"] and not job.config.micro_batch:
        job.split.examples = checkpoint.scalars["split"]
    job.on.room.tokens = checkpoint.scalars.get("evaluation_tokens", 0)  # not in checkpoints of before
    if checkpoint.scalars["scaler"]:
        scaler.load_state_dict(checkpoint.scalars["scaler"])
    state = Progress(
        step=checkpoint.step,
        seconds=checkpoint.scalars["seconds"],
        history=checkpoint.scalars["history"],
        sums={name: tensor.clone().to(job.on.device) for name, tensor in parts["sum"].items()},
        summed=checkpoint.scalars["summed"],
    )
    return state, warnings
