"""Everything that is fixed before the first step of a run, and how far the run is."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from capcli import files, machine, parallel, stages
from capcli.config.names import EMBEDDING_TASKS
from capcli.config.prune import PruneConfig
from capcli.data import dataset, texts, tokens
from capcli.data.batches import Examples
from capcli.data.kinds import KINDS
from capcli.data.splits import TaskData, subset
from capcli.errors import ConfigError
from capcli.events import Event, StopFlag, told
from capcli.measuring import latency, scoring
from capcli.measuring.scoring import Measured
from capcli.models import artifact, loading, predict, predictor, tokenizers
from capcli.models.devices import Compute
from capcli.models.model import Model, longest_input, place, pooling_of
from capcli.models.predict import Progress
from capcli.pruning import basis, rates
from capcli.pruning.calibration import check_enough, few_tokens
from capcli.pruning.costs import WEIGHTS, measure_of
from capcli.pruning.pruner import planned
from capcli.pruning.schedules import RISE_OF_DIMENSIONS, RISE_OF_UNITS
from capcli.reporting.text import counted
from capcli.stages import Bound, RunFolder
from capcli.stored import read_json

CURVE_SAMPLES = 2000
FORWARD_SHARE = 1 / 3  # of a training step: a forward pass alone
REFIT_SHARE = 5  # training steps: a refit, of as many examples


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that is fixed before the first step: examples by split name, and what there is to know of all that.

    pooling: of sentence vectors, as the student's family has it, also for a teacher of another one.
    teacher: the fine-tuned model that the run was given, empty when it makes one.
    """

    config: PruneConfig
    teacher: str
    bound: Bound
    run: RunFolder
    on: Compute
    data: TaskData
    train: Examples
    curve: Examples
    evals: dict[str, Examples]
    meter: Meter
    pooling: str
    notes: tuple[str, ...]


class Meter:
    """Makes events that know their share of the whole run, measured in training steps of one example."""

    def __init__(self, units: dict[str, float], flag: StopFlag) -> None:
        self.flag = flag
        self.total = sum(units.values())
        self.spans: dict[str, tuple[float, float]] = {}
        begin = 0.0
        for phase, size in units.items():
            self.spans[phase] = (begin, size)
            begin += size

    def of(self, phase: str) -> Callable[..., Event]:
        """A maker of events of `phase`: event(done, total, note, status, numbers)."""
        begin, size = self.spans.get(phase, (0.0, 0.0))

        def event(
            done: float = 0,
            total: float = 0,
            note: str = "",
            status: str = "",
            numbers: Mapping[str, float] | None = None,
        ) -> Event:
            share = (begin + size * (done / total if total else 0)) / self.total
            return Event(
                phase=phase, done=done, total=total, overall=share, note=note, status=status, numbers=numbers or {}
            )

        return event

    def stoppable(self, phase: str) -> Callable[..., Event]:
        """Like `of`, for phases that keep nothing when stopped: raises `Stopped` once the flag is set."""
        event = self.of(phase)

        def checked(done: float = 0, total: float = 0, note: str = "") -> Event:
            self.flag.check()
            return event(done, total, note)

        return checked


def nothing() -> Generator[Event, None, None]:
    """A generator of no events."""
    return None
    yield


# Loading -------------------------------------------------------------------------------------------------------------


def read_data(config: PruneConfig) -> TaskData:
    """The splits of the task, with the part that is held out."""
    if config.source.text:
        return _of_texts(config)
    data = dataset.load(config.source, holdout=config.holdout, max_train=config.max_train_samples, seed=config.seed)
    return dataset.comparable(data, "teacher")


def holdout_of(config: PruneConfig) -> float:
    """The share of the training set that is held out: chosen, or what a run without any labels is evaluated on."""
    return config.holdout or texts.HELD_OUT * config.source.unlabelled


def _of_texts(config: PruneConfig) -> TaskData:
    """Texts in place of a training set, the classes by the fine-tuned model; with the evaluation splits of the task or,
    where nothing has labels, held-out texts. Raises `DataError` when the texts are not there."""
    source = config.source
    texts.check(source.text)
    names = loading.names_of(config.teacher or config.model, source.label_names)
    limits = {"max_train": config.max_train_samples, "seed": config.seed}
    if source.unlabelled:
        return texts.open_task(
            source, names, "teacher", holdout=holdout_of(config), no_answer=_no_answer(config), **limits
        )
    data = dataset.load(source, train=False, holdout=config.holdout, seed=config.seed, perhaps=names)
    data = dataset.comparable(data, "teacher")
    found = texts.read(source.text, source, paired=bool(config.epochs or config.heal))
    return replace(data, train=subset(found, config.max_train_samples, config.seed))


def _no_answer(config: PruneConfig) -> bool | None:
    """Whether the teacher may answer nothing to a question, as far as it says so."""
    source = config.teacher or config.model
    return artifact.known(source).no_answer if tokenizers.is_artifact(source) else None


def load_student(config: PruneConfig, data: TaskData) -> Model:
    """The model to prune. Raises `ModelError`, or `ConfigError` when a structured sparsity cannot be reached or
    the basis of its heads cannot be changed."""
    student = loading.load_dense(config.model, data.labels, data.kind, config.seed)
    check_reach(config, student)
    if config.basis == "pca":
        basis.check(student)
    return student


def check_reach(config: PruneConfig, student: Model) -> None:
    """Raise `ConfigError` when a structured sparsity cannot be reached. Of a target that is known later, when texts are
    read or times measured; here, whether there are units at all."""
    if config.target:
        student.layers()
    else:
        planned(student, config, WEIGHTS)


def describe_device(on: Compute) -> str:
    """Processor or GPU, type of device, precision, threads and, of several, processes in words, as reports have it."""
    parts = [on.name, on.device.type, on.precision, counted(torch.get_num_threads(), "thread")]
    parts += [f"{parallel.size()} processes"] * (parallel.size() > 1)
    return ", ".join(parts)


def make_setup(
    config: PruneConfig,
    folder: RunFolder,
    bound: Bound,
    on: Compute,
    data: TaskData,
    student: Model,
    teacher: str,
) -> Setup:
    """Everything tokenised, and the student on its device."""
    check = folder.flag.check
    reader = predictor.of_network(student, on.exact)
    assert data.train is not None, "a run has examples to train or calibrate on"
    examples = scoring.encoded(reader, data.train, config.source, check)
    if config.source.text and not teacher:
        raise ConfigError(
            f"{config.model} has no head for these labels, and --text has no labels to fine-tune it with",
            "name a model that was fine-tuned for this task",
        )
    if config.staged:
        check_enough(len(examples))
    if config.target and not config.counts_time:
        planned(student, config, measure_of(config, examples))
    few = few_tokens(config, examples, student) if config.calibrated or config.refit else []
    evals = {name: scoring.encoded(reader, split, config.source, check) for name, split in data.evals.items()}
    most = max(CURVE_SAMPLES // 10, min(CURVE_SAMPLES, len(examples)))  # the curve must not cost more than a pass
    curve = data.holdout or subset(next(iter(data.evals.values())), most, 0)
    curve_examples = scoring.encoded(reader, curve, config.source, check)
    read = {
        config.source.text or "train": examples,
        **({"the held-out part": curve_examples} if data.holdout else {}),
        **evals,
    }
    passes = 0 if teacher else config.teacher_passes(len(examples), len(data.labels))
    place(student, on)
    return Setup(
        config=config,
        teacher=teacher,
        run=folder,
        bound=bound,
        on=on,
        data=data,
        train=examples,
        curve=curve_examples,
        evals=evals,
        meter=Meter(
            _units(config, len(examples), sum(map(len, evals.values())), len(curve_examples), passes), folder.flag
        ),
        pooling=pooling_of(student, config.pooling),
        notes=(
            *data.notes,
            *_slow_precision(on),
            *student.notes,
            *few,
            *rates.notes(config, student, makes_teacher=passes > 0),
            *(doubt for one in read.items() for doubt in tokens.doubts(one[1], one[0])),
        ),
    )


def _slow_precision(on: Compute) -> list[str]:
    """A note when a CPU has to emulate the numbers that it is to train with."""
    emulated = on.device.type == "cpu" and on.dtype == torch.bfloat16 and not machine.has_bf16()
    return ["this processor has no bf16 instructions: training in fp32 is faster"] * emulated


def _about_teacher(config: PruneConfig, teacher: str) -> list[str]:
    """Without training: whether MODEL is pruned as it is, or has to be fine-tuned first."""
    if config.epochs or config.teacher or config.source.task in EMBEDDING_TASKS:
        return []
    if teacher:
        return [f"{teacher} was fine-tuned for these labels: it is pruned as it is"]
    return [f"{config.model} has no head for these labels: a teacher is fine-tuned first, which takes longer"]


def _units(config: PruneConfig, n_train: int, n_evals: int, n_curve: int, passes: int) -> dict[str, float]:
    """Size of each phase in training steps of one example, with so many `passes` for the teacher; the bar's shares,
    not a promise."""
    names = config.loss_names if config.epochs else ()
    n_banks = ("prc" in names) + ("fic" in names or "kd" in names)
    snapshots = max(0, config.epochs - 1) * n_train if "snc" in names else 0
    return {
        "bank pretrained": FORWARD_SHARE * n_train * ("prc" in names),
        "teacher": float(passes * n_train),
        "bank finetuned": FORWARD_SHARE * n_train * (n_banks > 0),
        "evaluate dense": FORWARD_SHARE * n_evals,
        "prune": _calibration_units(config, n_train)
        + config.epochs * ((1.2 + ("hid" in names)) * n_train + FORWARD_SHARE * n_curve)
        + FORWARD_SHARE * snapshots,
        "evaluate pruned": FORWARD_SHARE * n_evals,
        "latency": 2 * FORWARD_SHARE * min(n_evals, latency.TEXTS + latency.TEXTS_AT_ONCE * latency.BATCHES),
    }


def _calibration_units(config: PruneConfig, n_train: int) -> float:
    """What is measured at rises: gradients or none, and for a refit two networks in their parts; what heals."""
    calibrated, refits = min(config.calibration, n_train), REFIT_SHARE * (config.refit or config.one_shot)
    start = len(config.calibrated_start) * calibrated * (1 + REFIT_SHARE)
    if config.calibrated:
        healing = (1 + FORWARD_SHARE) * config.heal * config.batch_size
        return start + len(config.stair_list) * calibrated * (config.staged + refits) + healing
    importance = min(config.importance_examples, n_train)
    return start + _n_rises(config) * (importance + calibrated * refits)


def _n_rises(config: PruneConfig) -> int:
    """How often the sparsity of a run that is not calibrated rises, about, where something is measured at each rise."""
    rise = RISE_OF_UNITS if config.structure == "heads" else RISE_OF_DIMENSIONS
    by_size, ramp = math.ceil(config.sparsity / rise), 1 - config.dense_share - config.final_share
    by_time = math.ceil(ramp / config.update_every) if config.update_every else by_size
    return len(config.stair_list) or min(by_size, by_time)


def tell_notes(setup: Setup, student: Model) -> Generator[Event, None, None]:
    """Say what was read: splits, labels, sizes, and what there is to note about them."""
    data, event = setup.data, setup.meter.of("load")
    splits = {
        "texts" if setup.config.source.text else "train": setup.train,
        **({"held out": setup.curve} if data.holdout else {}),
        **setup.evals,
    }
    counts = ", ".join(f"{name} {_counted(examples)}" for name, examples in splits.items())
    yield event(note=f"{data.name}: {counts}" + (f"; labels: {data.legend}" if data.labels else ""))
    length = longest_input(student, setup.config.source.longest)
    if length < setup.config.source.max_length:
        yield event(note=f"{student.source} reads at most {length} tokens, less than --max-length")
    n_prunable = sum(linear.weight.numel() for linear in student.prunable().values())
    total = sum(p.numel() for p in student.net.parameters())
    yield event(note=f"{student.source}: {total:,} weights, {n_prunable:,} prunable; on {setup.on.name}")
    for note in (*setup.notes, *_about_teacher(setup.config, setup.teacher)):
        yield event(note=note)


def _counted(examples: Examples) -> str:
    """How many examples; of questions also how many windows their contexts take."""
    if KINDS[examples.kind].vectors:
        return counted(len(examples), "text")
    if examples.owner is None:
        return f"{len(examples):,}"
    return f"{len(np.unique(examples.owner)):,} questions in {len(examples):,} windows"


# Stages --------------------------------------------------------------------------------------------------------------


def origin_of(setup: Setup, name: str) -> dict[str, Any]:
    """What a stage depends on, see `stages.origin`; the teacher by its weights, if it is made in this run."""
    manifest = setup.run.place("teacher") / files.MANIFEST
    after = name not in ("bank-pretrained", "teacher", "teacher-steps", "speeds")
    weights = read_json(manifest)["model.safetensors"] if after and manifest.is_file() else ""
    return stages.origin(setup.config, setup.bound, name, weights, shared=setup.run.shares(name))


def found_stage(setup: Setup, of: dict[str, Any]) -> Generator[Event, None, dict[str, Any] | None]:
    """stage.json of a stage that can be used; says so when one is there that cannot."""
    stage, why = stages.found_stage(setup.run, of)
    if why:
        yield setup.meter.of("load")(note=f"{why}; it is redone")
    if stage is not None:
        setup.run.earlier.append(stage.get("seconds", 0.0))
    return stage


def measured(
    setup: Setup, model: Model, examples: Examples, *, with_intervals: bool = True
) -> Generator[Progress, None, Measured]:
    """Metrics of a network as it is, in training or opened again; yields how many examples are done, of how many."""
    logits = yield from _answered(setup, model, examples)
    return _scored(setup, model, examples, logits, with_intervals=with_intervals)


def answers(setup: Setup, model: Model, event: Callable[..., Event]) -> Generator[Event, None, dict[str, torch.Tensor]]:
    """The logits of a network for every evaluation split by name, as `predict.outputs` gives them, on the CPU."""
    found = {}
    for name, examples in setup.evals.items():
        found[name] = (yield from told(_answered(setup, model, examples), event)).cpu()
    return found


def scores(setup: Setup, model: Model, logits: Mapping[str, torch.Tensor]) -> dict[str, Measured]:
    """Metrics of every evaluation split by name, of the `answers` of a network."""
    return {name: _scored(setup, model, examples, logits[name]) for name, examples in setup.evals.items()}


def _answered(setup: Setup, model: Model, examples: Examples) -> Generator[Progress, None, torch.Tensor]:
    with predict.evaluating(model):
        return (yield from predictor.of_network(model, setup.on.exact).answers(examples))


def _scored(
    setup: Setup, model: Model, examples: Examples, logits: torch.Tensor, *, with_intervals: bool = True
) -> Measured:
    names = setup.data.metrics
    return scoring.scored(examples.kind, model.labels, examples, names, logits, with_intervals=with_intervals)


def stage_record(setup: Setup, name: str) -> dict[str, Any]:
    """What stage.json of a published stage says; empty when there is none."""
    path = setup.run.place(name) / stages.STAGE
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return found
