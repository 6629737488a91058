"""`cap prune`: teacher, banks, the pruning loop, the artefact, the report — in this order.

Each stage publishes what it made under OUT/work before the next begins, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capcli import files, hub, inputs, models, report, run, sparse, tasks, tokens, train
from capcli.config import BUILTIN_TASKS, PruneConfig, command_line, flatten, portable, shortened
from capcli.errors import CapError, ConfigError, RunFailed, Stopped
from capcli.pruning import banks, masked
from capcli.pruning.criteria import CRITERIA
from capcli.pruning.pruner import Pruner, make_pruner, planned
from capcli.text import byte_size, counted, duration, number, percent
from capcli.verbs import evaluate

CURVE_SAMPLES = 2000
FORWARD_SHARE = 1 / 3  # of a training step: a forward pass alone


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that is fixed before the first step: examples by split name, and what there is to know of all that."""

    config: PruneConfig
    bound: run.Bound
    run: run.Run
    on: models.Compute
    data: tasks.TaskData
    train: tokens.Examples
    curve: tokens.Examples
    evals: dict[str, tokens.Examples]
    meter: Meter
    notes: tuple[str, ...]


class Meter:
    """Makes events that know their share of the whole run, measured in training steps of one example."""

    def __init__(self, units: dict[str, float], flag: run.StopFlag) -> None:
        self.flag = flag
        self.total = sum(units.values())
        self.spans: dict[str, tuple[float, float]] = {}
        begin = 0.0
        for phase, size in units.items():
            self.spans[phase] = (begin, size)
            begin += size

    def of(self, phase: str) -> Callable[..., run.Event]:
        """A maker of events of `phase`: event(done, total, note, status)."""
        begin, size = self.spans.get(phase, (0.0, 0.0))

        def event(done: float = 0, total: float = 0, note: str = "", status: str = "") -> run.Event:
            share = (begin + size * (done / total if total else 0)) / self.total
            return run.Event(phase=phase, done=done, total=total, overall=share, note=note, status=status)

        return event

    def stoppable(self, phase: str) -> Callable[..., run.Event]:
        """Like `of`, for phases that keep nothing when stopped: raises `Stopped` once the flag is set."""
        event = self.of(phase)

        def checked(done: float = 0, total: float = 0, note: str = "") -> run.Event:
            self.flag.check()
            return event(done, total, note)

        return checked


def prune(
    config: PruneConfig, *, flag: run.StopFlag | None = None, overwrite: bool = False
) -> Generator[run.Event, None, dict[str, Any]]:
    """Prune `config.model` for its task into `config.out_folder`; yields events and returns the report.

    A finished run of the same configuration is returned as it is; a stopped one goes on.

    Raises:
        CapError: any of its children; see `capcli.errors`.
    """
    flag = flag or run.StopFlag()
    if config.max_time:
        flag.deadline = time.monotonic() + 60 * config.max_time
    if not overwrite and (done := (yield from _finished(config, flag))):
        run.tidy(config, done)
        return done
    with run.open_run(config, flag, overwrite=overwrite) as folder, _memory(folder):
        if not overwrite and (done := (yield from _finished(config, flag))):  # by another process, a moment ago
            run.finish(folder, done["config"].get("keep_work", False))
            return done
        result = yield from _prune(config, folder, overwrite)
        run.finish(folder, config.keep_work)
    return result


def _finished(config: PruneConfig, flag: run.StopFlag) -> Generator[run.Event, None, dict[str, Any] | None]:
    """The report of a finished run of this configuration and these inputs, or None; see `run.finished_report`."""
    done = run.finished_report(config)
    if done is None:
        return None
    try:
        found = run.Bound(fingerprints=inputs.fingerprints(config, _data(config), flag.check), versions=run.versions())
        notes = run.check_inputs(config.out_folder, found, done)
    except CapError as error:
        if isinstance(error, ConfigError | Stopped) or _are_here(config):
            raise
        notes = [f"whether its inputs are still the same is not known: {error.message}"]
    for note in notes:
        yield run.Event(phase="done", overall=1.0, note=note)
    yield run.Event(phase="done", overall=1.0, note="this run is already complete")
    return done


def _are_here(config: PruneConfig) -> bool:
    """Whether all that the configuration names is on this machine, so that an error tells of a change."""
    named, place = [source for source in (config.model, config.teacher) if source], config.source.data
    return all(map(hub.is_local, named)) and (Path(place).exists() if place else config.source.task in BUILTIN_TASKS)


@contextlib.contextmanager
def _memory(folder: run.Run) -> Iterator[None]:
    """Say of memory that runs out what helps, and what stays when that is done."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search("out of memory|can't allocate", str(error), re.IGNORECASE)):
            raise
        kept = run.kept_stages(folder, ["batch_size"])
        hint = "lower --batch-size" + (f" (kept then: {', '.join(kept)})" if kept else "")
        raise RunFailed(
            "out of memory", f"{hint}, or start anew with a shorter --max-length and --overwrite"
        ) from error


def _prune(config: PruneConfig, folder: run.Run, overwrite: bool) -> Generator[run.Event, None, dict[str, Any]]:
    yield run.Event(phase="load", note=f"loading {config.model}")
    on, data = models.compute(config.hardware), _data(config)
    student = _student(config, data)
    given = _given_teacher(config, data, student) if config.teacher else None
    bound = run.Bound(
        fingerprints=inputs.fingerprints(config, data, folder.flag.check), versions=run.versions(), device=_device(on)
    )
    notes = [] if overwrite else run.check_stopped(folder, bound)
    setup = _setup(config, folder, bound, on, data, student)
    notes += run.begin(folder, config, bound, overwrite=overwrite)
    yield from _notes(setup, student)
    for note in notes:
        yield setup.meter.of("load")(note=note)
    if given is not None:
        models.place(given, on)
    pretrained = (yield from _bank(setup, "pretrained", student))[0] if "prc" in config.loss_names else None
    teacher = given or (yield from _fine_tuned(setup, student))
    finetuned, logits, dense = yield from _teacher_bank(setup, teacher)
    if config.init == "teacher":
        student.net.load_state_dict(teacher.net.state_dict())
    kept = teacher if "hid" in config.loss_names else None
    del teacher, given
    pruner, state = yield from _train(setup, student, pretrained, finetuned, logits, kept)
    return (yield from _finish(setup, student, pruner, state, dense))


def _nothing() -> Generator[run.Event, None, None]:
    return None
    yield


# Loading -------------------------------------------------------------------------------------------------------------


def _data(config: PruneConfig) -> tasks.TaskData:
    return tasks.load(config.source, holdout=config.holdout, max_train=config.max_train_samples, seed=config.seed)


def _student(config: PruneConfig, data: tasks.TaskData) -> models.Model:
    """The model to prune. Raises `ModelError`, or `ConfigError` when a structured sparsity cannot be reached."""
    student = models.load_dense(config.model, data.labels, data.kind, config.seed)
    planned(student, config)
    return student


def _device(on: models.Compute) -> str:
    return f"{on.name}, {on.device.type}, {on.precision}, {counted(torch.get_num_threads(), 'thread')}"


def _setup(
    config: PruneConfig,
    folder: run.Run,
    bound: run.Bound,
    on: models.Compute,
    data: tasks.TaskData,
    student: models.Model,
) -> Setup:
    """Everything tokenised, and the student on its device."""
    assert data.train is not None, "a training split was asked for"
    check = folder.flag.check
    examples = evaluate.encoded(student, data.train, config.source, check)
    evals = {name: evaluate.encoded(student, split, config.source, check) for name, split in data.evals.items()}
    most = max(CURVE_SAMPLES // 10, min(CURVE_SAMPLES, len(data.train)))  # the curve must not cost more than a pass
    curve = data.holdout or tasks.cut(next(iter(data.evals.values())), most, 0)
    curve_examples = evaluate.encoded(student, curve, config.source, check)
    read = {"train": examples, **({"the held-out part": curve_examples} if data.holdout else {}), **evals}
    models.place(student, on)
    return Setup(
        config=config,
        run=folder,
        bound=bound,
        on=on,
        data=data,
        train=examples,
        curve=curve_examples,
        evals=evals,
        meter=Meter(_units(config, len(examples), sum(map(len, evals.values())), len(curve_examples)), folder.flag),
        notes=(
            *data.notes,
            *student.notes,
            *(doubt for one in read.items() for doubt in tokens.doubts(one[1], one[0])),
        ),
    )


def _units(config: PruneConfig, n_train: int, n_evals: int, n_curve: int) -> dict[str, float]:
    """Size of each phase in training steps of one example; the bar's shares, not a promise."""
    names = config.loss_names
    n_banks = ("prc" in names) + ("fic" in names or "kd" in names)
    snapshots = (config.epochs - 1) * n_train if "snc" in names else 0
    return {
        "bank pretrained": FORWARD_SHARE * n_train * ("prc" in names),
        "teacher": config.teacher_passes(n_train) * n_train,
        "bank finetuned": FORWARD_SHARE * n_train * (n_banks > 0),
        "evaluate dense": FORWARD_SHARE * n_evals,
        "prune": config.epochs * ((1.2 + ("hid" in names)) * n_train + FORWARD_SHARE * n_curve)
        + FORWARD_SHARE * snapshots,
        "evaluate pruned": FORWARD_SHARE * n_evals,
    }


def _notes(setup: Setup, student: models.Model) -> Generator[run.Event, None, None]:
    data, event = setup.data, setup.meter.of("load")
    splits = {"train": setup.train, **({"held out": setup.curve} if data.holdout else {}), **setup.evals}
    counts = ", ".join(f"{name} {_counted(examples)}" for name, examples in splits.items())
    yield event(note=f"{data.name}: {counts}" + (f"; labels: {data.legend}" if data.labels else ""))
    length = models.longest_input(student, setup.config.source.longest)
    if length < setup.config.source.max_length:
        yield event(note=f"{student.source} reads at most {length} tokens, less than --max-length")
    n_prunable = sum(linear.weight.numel() for linear in student.prunable().values())
    total = sum(p.numel() for p in student.net.parameters())
    yield event(note=f"{student.source}: {total:,} weights, {n_prunable:,} prunable; on {setup.on.name}")
    for note in setup.notes:
        yield event(note=note)


def _counted(examples: tokens.Examples) -> str:
    """How many examples; of questions also how many windows their contexts take."""
    if examples.owner is None:
        return f"{len(examples):,}"
    return f"{len(np.unique(examples.owner)):,} questions in {len(examples):,} windows"


def plan(config: PruneConfig) -> Generator[run.Event, None, dict[str, Any]]:
    """What the run would take, without writing anything: weights kept, disk, memory, and minutes from timed steps."""
    yield run.Event(phase="plan", note=f"loading {config.model} and timing a few steps")
    on, data = models.compute(config.hardware), _data(config)
    student, nothing = _student(config, data), run.Bound(fingerprints={}, versions={})
    setup = _setup(config, run.Run(out=config.out_folder, flag=run.StopFlag()), nothing, on, data, student)
    yield from _notes(setup, student)
    n = sum(linear.weight.numel() for linear in student.prunable().values())
    total = sum(p.numel() for p in student.net.parameters())
    kept = planned(student, config).weights(config.sparsity)
    criterion = CRITERIA[config.criterion]
    seconds = _seconds_per_example(setup, student)
    state = 4 * (3 * total + n * (3 * ("scores" in criterion.trains) + criterion.state_per_weight))
    width = 2 * len(setup.train) * student.net.config.hidden_size
    logits = 4 * setup.train.n_outputs * student.net.config.num_labels
    return {
        "schema_version": report.SCHEMA_VERSION,
        "model": shortened(config.model),
        "task": config.source.task,
        "method": config.method,
        "prunable_weights": n,
        "kept_weights": kept,
        "sparsity": 1 - kept / n,
        "artifact_bytes": round(4 * (total - n + kept) + sparse.entropy_bits(n, kept) / 8),
        "work_bytes": run.KEEP_CHECKPOINTS * state + 4 * total + (config.epochs + 1) * width + logits,
        "memory_bytes": state + 4 * (total + n + total * ("hid" in config.loss_names)) + (run.peak_bytes() or 0),
        "minutes": setup.meter.total * seconds / 60,
    }


def plan_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The plan for a terminal."""
    return [
        ("model", found["model"]),
        ("task", found["task"]),
        (
            "weights kept",
            f"{found['kept_weights']:,} of {found['prunable_weights']:,} ({percent(found['sparsity'])} removed)",
        ),
        ("weight file", f"about {byte_size(found['artifact_bytes'])}"),
        ("disk while running", f"about {byte_size(found['work_bytes'])}"),
        ("memory", f"about {byte_size(found['memory_bytes'])}"),
        ("time", f"about {duration(60 * found['minutes'])} on this machine"),
    ]


def _seconds_per_example(setup: Setup, student: models.Model) -> float:
    """Seconds of a plain training step per example, from a few steps after a warm-up."""
    rows = tokens.training_order(setup.train, setup.config.batch_size, 0, 0)[:4]
    times = []
    for some in rows:
        began = time.perf_counter()
        batch = tokens.collate(setup.train, some, setup.on.device)
        with setup.on.autocast():
            logits, _ = models.forward(student, batch.inputs)
        logits.float().square().mean().backward()  # type: ignore[no-untyped-call]
        float(next(student.net.parameters()).detach().sum())  # waits for the device
        times.append((time.perf_counter() - began) / len(some))
    return min(times) * 1.3


# Teacher and banks ---------------------------------------------------------------------------------------------------


def _origin(setup: Setup, name: str) -> dict[str, Any]:
    """What a stage depends on, see `run.origin`; the teacher by its weights, if it is made in this run."""
    manifest = setup.run.work / "teacher" / files.MANIFEST
    after = name not in ("bank-pretrained", "teacher", "teacher-steps")
    weights = files.read_json(manifest)["model.safetensors"] if after and manifest.is_file() else ""
    return run.origin(setup.config, setup.bound, name, weights)


def _found(setup: Setup, of: dict[str, Any]) -> Generator[run.Event, None, dict[str, Any] | None]:
    """stage.json of a stage that can be used; says so when one is there that cannot."""
    stage, why = run.found_stage(setup.run, of)
    if why:
        yield setup.meter.of("load")(note=f"{why}; it is made again")
    if stage is not None:
        setup.run.earlier.append(stage.get("seconds", 0.0))
    return stage


def _bank(
    setup: Setup, name: str, model: models.Model, event: Callable[..., run.Event] | None = None
) -> Generator[run.Event, None, tuple[torch.Tensor, torch.Tensor]]:
    """Vectors and, of the teacher, logits of the training set by `model`, encoded unless published before."""
    wanted, of = name == "finetuned", _origin(setup, f"bank-{name}")
    folder = setup.run.work / of["stage"]
    if (yield from _found(setup, of)) is None:
        began = time.monotonic()
        event = event or setup.meter.stoppable(f"bank {name}")
        logits, vectors = yield from models.encoded(
            model, setup.train, setup.on, event, setup.config.pooling, logits=wanted
        )
        setup.run.check()
        banks.save(folder, vectors.cpu().numpy(), logits.cpu().numpy(), time.monotonic() - began, of)
    return banks.load(folder, setup.on.device, len(setup.train), setup.train.n_outputs if wanted else 0)


def _given_teacher(config: PruneConfig, data: tasks.TaskData, student: models.Model) -> models.Model:
    """The teacher that the user named. Raises `ModelError` or `ConfigError` when it does not fit task and student."""
    names = config.source.label_names
    teacher = models.load_model(config.teacher, data.classes, data.kind, config.seed, need_head=True, label_map=names)
    _check_teacher(config, teacher, student)
    return teacher


def _fine_tuned(setup: Setup, student: models.Model) -> Generator[run.Event, None, models.Model]:
    """The student's copy, fine-tuned on the task and published as a stock folder."""
    config, of = setup.config, _origin(setup, "teacher")
    folder = setup.run.work / of["stage"]
    if (yield from _found(setup, of)) is None:
        teacher = models.copy(student)
        job = _job(setup, teacher, "teacher", train.Objective(losses=("ce",)), None)
        state = yield from train.train(job)
        steps = {name: value for name, value in flatten(config).items() if name in run.STAGES["teacher-steps"]}
        about = {"seconds": state.seconds, "history": state.history, "steps": steps, "of": of}
        setup.run.check()
        with files.publish(folder) as staging:
            models.save_dense(teacher, staging)
            files.write_json(staging / run.STAGE, about)
        files.remove(setup.run.work / "teacher-steps")
        return teacher
    for note in _other_steps(setup):
        yield setup.meter.of("teacher")(note=note)
    labels = setup.data.classes
    return models.place(models.load_dense(str(folder), labels, setup.data.kind, config.seed, need_head=True), setup.on)


def _other_steps(setup: Setup) -> list[str]:
    """A note when the teacher was trained with options that have changed since."""
    before, now = _stage(setup, "teacher").get("steps", {}), flatten(setup.config)
    options = [f"{name} {value}" for name, value in before.items() if value != now[name]]
    return [f"the teacher was trained with {', '.join(options)}"] if options else []


def _check_teacher(config: PruneConfig, teacher: models.Model, student: models.Model) -> None:
    theirs, ours = teacher.net.config.hidden_size, student.net.config.hidden_size
    if "fic" in config.loss_names and theirs != ours:
        raise ConfigError(
            f"the teacher's vectors have {theirs} numbers, the model's {ours}; fic cannot compare them",
            "leave fic out with --losses ce,kd,prc,snc, or use a teacher of the same width",
        )
    sizes = [(one.net.config.hidden_size, one.net.config.num_hidden_layers) for one in (teacher, student)]
    if "hid" in config.loss_names and sizes[0] != sizes[1]:
        raise ConfigError(
            f"the teacher has {sizes[0][1]} layers of width {sizes[0][0]}, the model {sizes[1][1]} of {sizes[1][0]}; "
            "hid cannot compare their hidden states",
            "leave hid out of --losses, or use a teacher of the same width and depth",
        )
    if teacher.tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise ConfigError(
            f"the teacher {config.teacher} has another vocabulary than {config.model}: it cannot read the same tokens",
            "use a teacher that was fine-tuned from the same model family",
        )
    shapes = [{name: tuple(t.shape) for name, t in one.net.state_dict().items()} for one in (teacher, student)]
    if config.init == "teacher" and shapes[0] != shapes[1]:
        raise ConfigError(
            "the teacher has another architecture than the model, it cannot be the start", "use --init pretrained"
        )


def _teacher_bank(setup: Setup, teacher: models.Model) -> Generator[run.Event, None, tuple[Any, Any, dict[str, Any]]]:
    """Vectors and logits of the teacher on the training set (None when no loss needs them), and its metrics."""
    names, vectors, logits = setup.config.loss_names, None, None
    if "fic" in names or "kd" in names:
        vectors, logits = yield from _bank(setup, "finetuned", teacher)
    of = _origin(setup, "dense")
    folder = setup.run.work / of["stage"]
    if (yield from _found(setup, of)) is None:
        measured = yield from _measured(setup, teacher, setup.meter.stoppable("evaluate dense"))
        setup.run.check()
        with files.publish(folder) as staging:
            files.write_json(staging / "metrics.json", measured)
            files.write_json(staging / run.STAGE, {"of": of})
    return vectors, logits, files.read_json(folder / "metrics.json")


def _measured(
    setup: Setup, model: models.Model, event: Callable[..., run.Event]
) -> Generator[run.Event, None, dict[str, Any]]:
    """Metrics of every evaluation split by name, and what the model answers where it answers all the same."""
    found = {}
    for name, examples in setup.evals.items():
        one = yield from evaluate.measure(model, examples, setup.data.metrics, setup.on, event)
        found[name] = {"metrics": one.metrics, "confidence_95": one.confidence_95, "n_examples": one.n_examples}
        found[name]["constant"] = one.constant
    return found


# The loop ------------------------------------------------------------------------------------------------------------


def _job(
    setup: Setup,
    model: models.Model,
    phase: str,
    objective: train.Objective,
    pruner: Pruner | None,
    snapshot: Callable[[int], train.Steps] | None = None,
) -> train.Job:
    config = setup.config
    epochs = config.teacher_passes(len(setup.train)) if phase == "teacher" else config.epochs

    def epoch_end(epoch: int, step: int) -> train.Steps:
        event, total_steps = setup.meter.of(phase), epochs * train.steps_per_epoch(setup.train, config.batch_size)

        def quiet(done: float = 0, total: float = 0) -> run.Event:
            status = f"step {step:,}/{total_steps:,}, epoch {epoch + 1}/{epochs}, measuring"
            return event(done=step, total=total_steps, status=status)

        names = setup.data.metrics
        one = yield from evaluate.measure(model, setup.curve, names, setup.on, quiet, with_intervals=False)
        if pruner is not None and setup.data.holdout is not None:
            _keep_best(setup, model, pruner, step, one.metrics[setup.data.primary])
        where = f"{one.n_examples:,}{' held-out' if setup.data.holdout is not None else ''} examples"
        note = f"epoch {epoch + 1}/{epochs}: {_figures(one.metrics)} on {where}"
        note += f", sparsity {percent(pruner.sparsity)}" if pruner else ""
        yield event(done=step, total=total_steps, note=note)
        return one.metrics

    return train.Job(
        run=setup.run,
        phase=phase,
        model=model,
        examples=setup.train,
        config=config,
        on=setup.on,
        epochs=epochs,
        lr=config.teacher_lr if phase == "teacher" else config.lr,
        objective=objective,
        pruner=pruner,
        snapshot=snapshot or (lambda step: _nothing()),
        epoch_end=epoch_end,
        event=setup.meter.of(phase),
        of=_origin(setup, f"{phase}-steps"),
    )


def _figures(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in found.items())


def _keep_best(setup: Setup, model: models.Model, pruner: Pruner, step: int, value: float) -> None:
    """Publish the state when it is at the target sparsity and better on the held-out part than any before.

    Raises `RunFailed` when the best so far is damaged, for nobody then knows what is better.
    """
    if pruner.sparsity != pruner.final or not math.isfinite(value):
        return
    of = _origin(setup, "best")
    folder = setup.run.work / of["stage"]
    best, why = _best(setup, of)
    if why:
        raise _lost(why)
    if best is not None and best[1] >= value:
        return
    tensors = {f"net.{name}": tensor for name, tensor in model.net.state_dict().items()}
    tensors |= {f"pruner.{name}": tensor for name, tensor in pruner.tensors().items()}
    setup.run.check()
    with files.publish(folder) as staging:
        files.write_tensors(staging / "best.safetensors", tensors)
        files.write_json(staging / "best.json", {"step": step, "value": value})
        files.write_json(staging / run.STAGE, {"of": of})


def _best(setup: Setup, of: dict[str, Any]) -> tuple[tuple[int, float] | None, str]:
    """Step and value of the state that is kept, or None, and why, if something is there that cannot be used."""
    stage, why = run.found_stage(setup.run, of)
    if stage is None:
        return None, why
    found = files.read_json(setup.run.work / of["stage"] / "best.json")
    return (found["step"], found["value"]), ""


def _lost(why: str) -> RunFailed:
    return RunFailed(why, "run the same command again: it goes back to before the best epoch and makes it again")


def _best_of(setup: Setup, history: list[dict[str, Any]]) -> tuple[int, float] | None:
    """Step and value of the epoch that `_keep_best` keeps, by the history of the pruning; None when it keeps none."""
    found: tuple[int, float] | None = None
    for row in history:
        value = row["metrics"].get(setup.data.primary)
        counts = value is not None and row["sparsity"] == setup.config.sparsity and math.isfinite(value)
        if counts and (found is None or value > found[1]):
            found = row["step"], value
    return found


def _check_best(setup: Setup) -> Generator[run.Event, None, None]:
    """Before going on: where the best epoch that the newest checkpoint knows of is lost, go back to before it."""
    if setup.data.holdout is None:
        return
    of, steps = _origin(setup, "best"), _origin(setup, "prune-steps")
    best, why = _best(setup, of)
    if why:
        files.remove(setup.run.work / of["stage"])
        yield setup.meter.of("prune")(note=f"{why}; it is made again")
    while True:
        checkpoint, warnings = run.load_checkpoint(setup.run, steps)
        for warning in warnings:
            yield setup.meter.of("prune")(note=warning)
        wanted = _best_of(setup, checkpoint.scalars["history"]) if checkpoint else None
        if checkpoint is None or wanted is None or _serves(best, wanted, checkpoint.step):
            return
        if not why:
            why = f"{setup.run.work / of['stage']} does not hold the best epoch"
            yield setup.meter.of("prune")(note=f"{why}, that of step {wanted[0]}; it is made again")
        run.drop_checkpoints(setup.run, steps["stage"], after=wanted[0] - 1)


def _serves(best: tuple[int, float] | None, wanted: tuple[int, float], step: int) -> bool:
    """Whether the state that is kept is the wanted one, or that of a step after `step`, which was better."""
    return best is not None and (best == wanted or (best[0] > step and best[1] > wanted[1]))


def _train(
    setup: Setup, student: models.Model, pretrained: Any, finetuned: Any, logits: Any, teacher: models.Model | None
) -> Generator[run.Event, None, tuple[Pruner, train.State]]:
    """Prune the student; returns its pruner and the final state. `teacher` is there when its hidden states teach."""
    config = setup.config
    total = config.epochs * train.steps_per_epoch(setup.train, config.batch_size)
    pruner = make_pruner(student, config, total)
    modules = {"prc": [pretrained], "snc": [], "fic": [finetuned]}
    table = {name: banks.Bank(vectors=modules[name]) for name in modules if name in config.loss_names}
    classes = torch.from_numpy(setup.train.labels).to(setup.on.device) if setup.data.kind == "classification" else None
    objective = train.Objective(losses=config.loss_names, logits=logits, labels=classes, banks=table)
    if teacher is not None:
        teacher.net.eval().requires_grad_(False).zero_grad()  # it may have been trained in this run
        example = tokens.collate(setup.train, np.arange(1), setup.on.device)
        projections = train.make_projections(teacher, example)
        objective = dataclasses.replace(objective, teacher=teacher, projections=projections)
    due = _due(setup, pruner, total) if "snc" in table else []
    yield from _check_snapshots(setup, due)
    yield from _check_best(setup)
    snapshot = _snapshots(setup, student, table["snc"], due, total) if "snc" in table else None
    state = yield from train.train(_job(setup, student, "prune", objective, pruner, snapshot))
    if setup.data.holdout is not None and _best_of(setup, state.history):
        _take_best(setup, student, pruner)
    return pruner, state


def _take_best(setup: Setup, student: models.Model, pruner: Pruner) -> None:
    """Put the best epoch back into student and pruner. Raises `RunFailed` when it is lost."""
    of = _origin(setup, "best")
    folder = setup.run.work / of["stage"]
    best, why = _best(setup, of)
    if best is None:
        raise _lost(why or f"{folder} is gone")
    parts = files.read_tensors(folder / "best.safetensors")
    student.net.load_state_dict({name[4:]: t for name, t in parts.items() if name.startswith("net.")})
    kept = {name[7:]: t for name, t in parts.items() if name.startswith("pruner.")}
    pruner.restore(kept, setup.config.sparsity)


def _due(setup: Setup, pruner: Pruner, n_steps: int) -> list[int]:
    """Before which steps the student is added to the snapshot bank: at each epoch boundary, or before each rise of the
    sparsity."""
    if pruner.structure.few_rises:
        return pruner.rises_at()
    per_epoch = train.steps_per_epoch(setup.train, setup.config.batch_size)
    return list(range(per_epoch, n_steps, per_epoch))


def _check_snapshots(setup: Setup, due: list[int]) -> Generator[run.Event, None, None]:
    """Before going on: drop the checkpoints beyond a snapshot that is lost, so that it is made again."""
    for index, step in enumerate(due):
        stage, why = run.found_stage(setup.run, _origin(setup, f"bank-snapshot-{index:03d}"))
        if stage is None:
            run.drop_checkpoints(setup.run, "prune-steps", after=step)
        if why:
            yield setup.meter.of("prune")(note=f"{why}; it is made again, from before step {step}")
            files.remove(setup.run.work / f"bank-snapshot-{index:03d}")


def _snapshots(
    setup: Setup, student: models.Model, bank: banks.Bank, due: list[int], n_steps: int
) -> Callable[[int], train.Steps]:
    """Adds the student as it is to the snapshot bank; on resume those of earlier steps are read back."""
    event = setup.meter.of("prune")

    def snapshot(step: int) -> train.Steps:
        def quiet(done: float = 0, total: float = 0) -> run.Event:
            setup.run.flag.check()
            return event(done=step, total=n_steps, status=f"step {step:,}/{n_steps:,}, snapshot")

        while bank.n_vectors < len(due) and due[bank.n_vectors] <= step:
            index = bank.n_vectors
            vectors, _ = yield from _bank(setup, f"snapshot-{index:03d}", student, quiet)
            bank.vectors.append(vectors)

    return snapshot


# The artefact --------------------------------------------------------------------------------------------------------


def _finish(
    setup: Setup, student: models.Model, pruner: Pruner, state: train.State, dense: dict[str, Any]
) -> Generator[run.Event, None, dict[str, Any]]:
    """Write the artefact, measure it as re-opened from disk, and write the report last."""
    config, out = setup.config, setup.run.out
    yield setup.meter.of("evaluate pruned")(note=f"writing {out}")
    kept = pruner.matrices.kept()
    assert pruner.sparsity == pruner.final, "the schedule ends at the final sparsity"
    masked.bake(pruner.matrices)
    names = list(student.prunable())
    settings = {"source": dataclasses.asdict(config.source), "holdout": config.holdout, "seed": config.seed}
    settings |= {"method": config.method, "sparsity": config.sparsity, "no_answer": setup.data.no_answer}
    run.clear_artefact(setup.run)
    sizes = models.save_artifact(student, out, names, settings)
    reopened = models.place(models.load_artifact(out), setup.on)
    event = setup.meter.stoppable("evaluate pruned")
    pruned = yield from _measured(setup, reopened, event)
    for note in _same_answers("the pruned model", pruned):
        yield setup.meter.of("evaluate pruned")(done=1, total=1, note=note)
    counted = _sparsity(reopened, out, config.sparsity)
    if counted["kept_weights"] > kept:
        raise RunFailed(
            f"{out} keeps {counted['kept_weights']:,} weights, the masks {kept:,}: the file is not what was trained"
        )
    record = _record(setup, state, dense, pruned) | {"sparsity": counted, "size": _size(reopened, out, sizes)}
    record["base_model"] = models.hub_id(student.source)
    record["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for path in models.artifact_files(out)
    }
    record = dict(portable(record, config))
    card = report.render_card(record, base_model=record["base_model"], pipeline_tag=models.PIPELINE_TAGS[student.kind])
    setup.run.check()
    files.write_text(out / "README.md", card)
    files.write_text(out / "report.html", report.render_html(record))
    files.write_json(out / run.REPORT, record)
    yield setup.meter.of("evaluate pruned")(done=1, total=1, note=f"complete: {out}")
    return record


def _sparsity(model: models.Model, out: Path, requested: float) -> dict[str, Any]:
    """Zeros, counted in the re-opened file."""
    prunable = model.prunable()
    per_matrix: list[dict[str, Any]] = [
        {"name": e.name, "shape": list(e.shape), "kept": e.kept, "sparsity": 1 - (e.kept or 0) / e.elements}
        for e in sorted(
            sparse.inspect(out / models.WEIGHTS_FILE),
            key=lambda e: list(prunable).index(e.name) if e.name in prunable else -1,
        )
        if e.name in prunable
    ]
    n, kept = sum(w.weight.numel() for w in prunable.values()), sum(row["kept"] for row in per_matrix)
    total = sum(p.numel() for p in model.net.parameters())
    return {
        "requested": requested,
        "achieved": 1 - kept / n,
        "prunable_weights": n,
        "kept_weights": kept,
        "encoder": (n - kept) / model.encoder_parameters(),
        "whole_model": (n - kept) / total,
        "per_matrix": per_matrix,
    }


def _size(model: models.Model, out: Path, sizes: sparse.Sizes) -> dict[str, Any]:
    return {
        "dense_bytes": sizes.dense_bytes,
        "artifact_bytes": sum(path.stat().st_size for path in models.artifact_files(out)),
        "weights_bytes": sizes.file_bytes,
        "bound_bytes": round(sizes.bound_bytes),
        "codings": evaluate.codings(out / models.WEIGHTS_FILE),
    }


def _record(setup: Setup, state: train.State, dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, Any]:
    """The report but for sparsity, size and files, which are counted on the artefact."""
    config, primary = setup.config, next(iter(pruned))
    teacher = _stage(setup, "teacher")
    prune_seconds = state.seconds
    return {
        "schema_version": report.SCHEMA_VERSION,
        "status": "complete",
        "model": config.model,
        "task": config.source.task,
        "method": config.method,
        "losses": list(config.loss_names),
        "seed": config.seed,
        "command": command_line(sys.argv[1:]),
        "config": flatten(config),
        **setup.bound.record,
        "labels": list(setup.data.labels),
        "metrics": {
            "primary": setup.data.primary,
            "split": primary,
            "dense": dense[primary]["metrics"],
            "pruned": pruned[primary]["metrics"],
            "retention": evaluate.retention(pruned[primary]["metrics"], dense[primary]["metrics"]),
            "n_examples": pruned[primary]["n_examples"],
            "confidence_95": pruned[primary]["confidence_95"],
            "splits": {
                name: {
                    "dense": dense[name]["metrics"],
                    "pruned": one["metrics"],
                    "retention": evaluate.retention(one["metrics"], dense[name]["metrics"]),
                    "n_examples": one["n_examples"],
                    "confidence_95": one["confidence_95"],
                }
                for name, one in pruned.items()
            },
        },
        "teacher": {"source": config.teacher or "fine-tuned in this run", "metrics": dense[primary]["metrics"]},
        "timing": {
            "teacher_seconds": teacher.get("seconds", 0.0),
            "banks_seconds": sum(
                _stage(setup, path.name).get("seconds", 0.0) for path in setup.run.work.glob("bank-*")
            ),
            "prune_seconds": prune_seconds,
            "total_seconds": time.monotonic() - setup.run.started + sum(setup.run.earlier),
            "examples_per_second": config.epochs * len(setup.train) / max(prune_seconds, 1e-9),
        },
        "memory": {
            "peak_host_bytes": run.peak_bytes(),
            "peak_device_bytes": torch.cuda.max_memory_allocated(setup.on.device)
            if setup.on.device.type == "cuda"
            else 0,
        },
        "history": [*teacher.get("history", []), *state.history],
        "curve": {"n_examples": len(setup.curve.split or ()), "held_out": setup.data.holdout is not None},
        "notes": [
            *setup.notes,
            *(_other_steps(setup) if teacher else []),
            *_same_answers("the dense model", dense),
            *_same_answers("the pruned model", pruned),
        ],
    }


def _same_answers(model: str, found: dict[str, Any]) -> list[str]:
    """Notes on a model whose answers to a split are all the same."""
    return [evaluate.same_answer(model, name, one["constant"]) for name, one in found.items() if one.get("constant")]


def _stage(setup: Setup, name: str) -> dict[str, Any]:
    path = setup.run.work / name / run.STAGE
    found: dict[str, Any] = files.read_json(path) if path.is_file() else {}
    return found
