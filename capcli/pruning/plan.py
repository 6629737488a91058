"""What a run would take, without writing anything."""

from __future__ import annotations

import time
from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from capcli import machine, stages
from capcli.config.paths import shortened
from capcli.config.prune import PruneConfig
from capcli.data import batches
from capcli.errors import out_of_memory
from capcli.events import Event, StopFlag
from capcli.models import devices, predict, storage
from capcli.models.model import Model
from capcli.pruning.costs import measure_of
from capcli.pruning.criteria import CRITERIA
from capcli.pruning.patterns import pattern_of, position_bits
from capcli.pruning.pruner import planned
from capcli.pruning.setup import Setup, load_student, make_setup, read_data, tell_notes
from capcli.pruning.teacher import given_teacher
from capcli.pruning.topk import kept_count
from capcli.records.pruned import Planned, PrunePlan
from capcli.reporting.text import byte_size, duration, percent
from capcli.stages import Bound, RunFolder


def plan(config: PruneConfig) -> Generator[Event, None, PrunePlan]:
    """What the run would take, without writing anything: weights kept, disk, memory, and minutes from timed steps."""
    yield Event(phase="plan", note=f"loading {config.model} and timing a few steps")
    on, data = devices.compute(config.hardware, training=True), read_data(config)
    student, nothing = load_student(config, data), Bound(fingerprints={}, versions={})
    given = given_teacher(config, data, student)
    teacher, folder = "" if given is None else given.source, RunFolder(out=config.out_folder, flag=StopFlag())
    setup = make_setup(config, folder, nothing, on, data, student, teacher)
    yield from tell_notes(setup, student)
    found, kept = expected(setup, student), _kept(setup, student)
    n, total = _weights(student)
    width = 2 * len(setup.train) * student.net.config.hidden_size
    logits = 4 * setup.train.n_outputs * student.net.config.num_labels
    snapshots = (config.epochs + 1) * width
    return PrunePlan(
        model=shortened(config.model),
        task=config.source.task,
        method=config.method,
        prunable_weights=n,
        kept_weights=kept,
        sparsity=1 - kept / n,
        artifact_bytes=found.weights_bytes or 0,
        work_bytes=stages.KEEP_CHECKPOINTS * _state_bytes(config, student) + 4 * total + snapshots + logits,
        memory_bytes=found.memory_bytes or 0,
        minutes=(found.seconds or 0.0) / 60,
    )


def expected(setup: Setup, student: Model) -> Planned:
    """What a run is expected to take: its weight file, memory, and time by a few steps, of which nothing is kept."""
    config, (n, total) = setup.config, _weights(student)
    kept = _kept(setup, student)
    copied = config.calibrated or config.refit or bool(config.calibrated_start)  # by a refit, to compare with
    networks = 1 + config.needs_teacher + copied
    width = storage.DTYPES[config.store].itemsize
    return Planned(
        weights_bytes=round(width * (total - n + kept) + position_bits(pattern_of(config.structure), n, kept) / 8),
        memory_bytes=_state_bytes(config, student) + 4 * (total * networks + n) + (machine.peak_bytes() or 0),
        seconds=setup.meter.total * _seconds_per_example(setup, student),
    )


def _kept(setup: Setup, student: Model) -> int:
    """How many weights stay; of a run that aims at a time, about as many as if all of it were spent on them."""
    config = setup.config
    if config.counts_time:
        return kept_count(config.sparsity, _weights(student)[0])
    return planned(student, config, measure_of(config, setup.train)).weights(config.sparsity)


def _weights(student: Model) -> tuple[int, int]:
    """How many weights are prunable, and how many there are in all."""
    prunable = sum(linear.weight.numel() for linear in student.prunable().values())
    return prunable, sum(p.numel() for p in student.net.parameters())


def _state_bytes(config: PruneConfig, student: Model) -> int:
    """Bytes of weights, moments and what the criterion remembers: what a checkpoint holds."""
    (n, total), criterion = _weights(student), CRITERIA[config.criterion]
    moved = total if "weights" in criterion.trains else 0  # those with moments
    return int(4 * (total + 2 * moved + n * (3 * ("scores" in criterion.trains) + criterion.state_per_weight)))


def plan_rows(found: PrunePlan) -> list[tuple[str, str]]:
    """The plan for a terminal."""
    return [
        ("model", found.model),
        ("task", found.task),
        (
            "weights kept",
            f"{found.kept_weights:,} of {found.prunable_weights:,} ({percent(found.sparsity)} removed)",
        ),
        ("weight file", f"about {byte_size(found.artifact_bytes)}"),
        ("disk while running", f"about {byte_size(found.work_bytes)}"),
        ("memory", f"about {byte_size(found.memory_bytes)}"),
        ("time", f"about {duration(60 * found.minutes)} on this machine"),
    ]


def _seconds_per_example(setup: Setup, student: Model) -> float:
    """Seconds of a plain training step per example, from a few steps after a warm-up, in parts that fit into memory."""
    steps = batches.training_order(setup.train, setup.config.batch_size, 0, 0)[:4]
    at_once = min(setup.config.micro_batch or len(steps[0]), len(steps[0]))
    while True:
        try:
            return 1.3 * min(_seconds(setup, student, rows[:at_once]) for rows in steps)
        except (RuntimeError, MemoryError) as error:
            if at_once == 1 or not out_of_memory(error):
                raise
        finally:
            student.net.zero_grad(set_to_none=True)
        at_once //= 2


def _seconds(setup: Setup, student: Model, rows: NDArray[np.int64]) -> float:
    began = time.perf_counter()
    batch = batches.collate(setup.train, rows, setup.on.device)
    with setup.on.autocast():
        logits, _ = predict.forward(student, batch.inputs)
    logits.float().square().mean().backward()  # type: ignore[no-untyped-call]
    float(next(student.net.parameters()).detach().sum())  # waits for the device
    return (time.perf_counter() - began) / len(rows)
