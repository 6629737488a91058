"""`cap prune`: teacher, banks, the pruning loop, the artefact, the report, in this order.

Each stage publishes what it made under OUT/work before the next begins, so that a stopped run continues where it was.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Generator, Iterator
from pathlib import Path

from capcli import machine, run, stages
from capcli.config.names import BUILTIN_TASKS
from capcli.config.prune import PruneConfig
from capcli.errors import CapError, ConfigError, RunFailed, Stopped
from capcli.events import Event, StopFlag
from capcli.models import devices, model
from capcli.pruning import inputs
from capcli.pruning.record import write_artefact
from capcli.pruning.setup import describe_device, load_student, make_setup, read_data, tell_notes
from capcli.pruning.student import train_student
from capcli.pruning.teacher import fine_tuned, given_teacher, make_bank, teacher_bank
from capcli.records.pruned import Report
from capcli.sources import hub
from capcli.stages import Bound, RunFolder


def prune(
    config: PruneConfig, *, flag: StopFlag | None = None, overwrite: bool = False
) -> Generator[Event, None, Report]:
    """Prune `config.model` for its task into `config.out_folder`; yields events and returns the report.

    A finished run of the same configuration is returned as it is; a stopped one goes on.

    Raises:
        CapError: any of its children; see `capcli.errors`.
    """
    flag = flag or StopFlag()
    if config.max_time:
        flag.deadline = time.monotonic() + 60 * config.max_time
    if not overwrite and (done := (yield from _finished(config, flag))):
        run.tidy(config, done)
        return done
    with run.open_run(config, flag, overwrite=overwrite) as folder, _memory(config, folder):
        if not overwrite and (done := (yield from _finished(config, flag))):  # by another process, a moment ago
            run.finish(folder, done.config.get("keep_work", False))
            return done
        result = yield from _prune(config, folder, overwrite)
        run.finish(folder, config.keep_work)
    return result


def _finished(config: PruneConfig, flag: StopFlag) -> Generator[Event, None, Report | None]:
    """The report of a finished run of this configuration and these inputs, or None; see `run.finished_report`."""
    done = run.finished_report(config)
    if done is None:
        return None
    try:
        found = Bound(
            fingerprints=inputs.fingerprints(config, read_data(config), flag.check), versions=machine.versions()
        )
        notes = run.check_finished(config.out_folder, found, done)
    except CapError as error:
        if isinstance(error, ConfigError | Stopped) or _are_here(config):
            raise
        notes = [f"cannot check whether its inputs are still the same: {error.message}"]
    for note in notes:
        yield Event(phase="done", overall=1.0, note=note)
    yield Event(phase="done", overall=1.0, note="this run is already complete")
    return done


def _are_here(config: PruneConfig) -> bool:
    """Whether all that the configuration names is on this machine, so that an error tells of a change."""
    named, place = [source for source in (config.model, config.teacher, config.text) if source], config.source.data
    return all(map(hub.is_local, named)) and (Path(place).exists() if place else config.source.task in BUILTIN_TASKS)


@contextlib.contextmanager
def _memory(config: PruneConfig, folder: RunFolder) -> Iterator[None]:
    """Say of memory that runs out what helps, and what stays when that is done."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or re.search("out of memory|can't allocate", str(error), re.IGNORECASE)):
            raise
        kept = stages.kept_stages(folder, ["batch_size"])
        hint = "lower --batch-size or --calibration" if config.calibrated or config.refit else "lower --batch-size"
        hint += f" (this keeps: {', '.join(kept)})" if kept else ""
        raise RunFailed(
            "out of memory", f"{hint}, or start over with a shorter --max-length and --overwrite"
        ) from error


def _prune(config: PruneConfig, folder: RunFolder, overwrite: bool) -> Generator[Event, None, Report]:
    yield Event(phase="load", note=f"loading {config.model}")
    on, data = devices.compute(config.hardware), read_data(config)
    student = load_student(config, data)
    given = given_teacher(config, data, student)
    bound = Bound(
        fingerprints=inputs.fingerprints(config, data, folder.flag.check),
        versions=machine.versions(),
        device=describe_device(on),
    )
    notes = [] if overwrite else run.check_stopped(folder, bound)
    setup = make_setup(config, folder, bound, on, data, student, "" if given is None else given.source)
    notes += run.begin(folder, config, bound, overwrite=overwrite)
    yield from tell_notes(setup, student)
    for note in notes:
        yield setup.meter.of("load")(note=note)
    if given is not None:
        model.place(given, on)
    pretrained = (yield from make_bank(setup, "pretrained", student))[0] if "prc" in config.loss_names else None
    teacher = given or (yield from fine_tuned(setup, student))
    finetuned, logits, dense = yield from teacher_bank(setup, teacher)
    if config.from_teacher:
        student.net.load_state_dict(teacher.net.state_dict())
    kept = teacher if config.needs_teacher else None
    del teacher, given
    pruner, state = yield from train_student(setup, student, pretrained, finetuned, logits, kept)
    return (yield from write_artefact(setup, student, pruner, state, dense))
