"""`cap prune`: teacher, banks, the pruning loop, the artefact, the report, in this order.

Each stage publishes what it made under OUT/work before the next begins, so that a stopped run continues where it was.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

from capcli import machine, parallel, run, stages, tracking
from capcli.config.measure import Gates
from capcli.config.names import BUILTIN_TASKS
from capcli.config.options import flatten, split_list
from capcli.config.paths import shortened
from capcli.config.prune import PruneConfig
from capcli.errors import CapError, ConfigError, RunFailed, Stopped, out_of_memory
from capcli.events import Event, StopFlag
from capcli.measuring import reports
from capcli.models import compiled, devices, model
from capcli.pruning import inputs
from capcli.pruning.plan import expected
from capcli.pruning.record import write_artefact
from capcli.pruning.setup import describe_device, load_student, make_setup, read_data, tell_notes
from capcli.pruning.speed import measured_for
from capcli.pruning.student import train_student
from capcli.pruning.teacher import fine_tuned, given_teacher, hand_on, make_bank, teacher_bank, with_answers
from capcli.records.pruned import Report
from capcli.sources import hub
from capcli.stages import Bound, RunFolder
from capcli.trackers import About


def prune(
    config: PruneConfig,
    *,
    flag: StopFlag | None = None,
    overwrite: bool = False,
    gates: Gates | None = None,
    shared: Path | None = None,
) -> Generator[Event, None, Report]:
    """Prune `config.model` for its task into `config.out_folder`; yields events and returns the report.

    A finished run of the same configuration is returned as it is; a stopped one goes on. `gates` are held against the
    report that is returned; that in the folder has none. `shared`: a folder for the teacher and what is made with it,
    where other runs may find them.

    Raises:
        CapError: any of its children; see `capcli.errors`.
    """
    with parallel.joined(config.timeout):
        return (yield from _made(config, flag or StopFlag(), gates or Gates(), overwrite=overwrite, shared=shared))


def _made(
    config: PruneConfig, flag: StopFlag, gates: Gates, *, overwrite: bool, shared: Path | None
) -> Generator[Event, None, Report]:
    if config.max_time:
        flag.deadline = time.monotonic() + 60 * config.max_time
    if not overwrite and (done := (yield from _finished(config, flag, gates))):
        run.tidy(config, done)
        return reports.judged(done, gates)
    with run.open_run(config, flag, overwrite=overwrite, shared=shared) as folder, _memory(config, folder):
        if not overwrite and (done := (yield from _finished(config, flag, gates))):  # by another process, a moment ago
            run.finish(folder, done.config.get("keep_work", False))
            return reports.judged(done, gates)
        work, tracker = _prune(config, folder, overwrite, gates), config.track if parallel.first() else ""
        result = yield from tracking.tracked(work, tracker, _about(config, shared), reports.summary)
        run.finish(folder, config.keep_work)
    return reports.judged(result, gates)


def _about(config: PruneConfig, shared: Path | None) -> About:
    """What a tracker is told of a run; the runs of a sweep, which share a folder, are a group."""
    out = config.out_folder.resolve()
    home = out.parent if shared is None else out.parent.parent
    group = "" if shared is None else out.parent.name
    options = {name: shortened(value) for name, value in flatten(config).items() if name not in ("out", "track")}
    return About(name=out.name, group=group, config=options, folder=str(home / "tensorboard" / group / out.name))


def _finished(config: PruneConfig, flag: StopFlag, gates: Gates) -> Generator[Event, None, Report | None]:
    """The report of a finished run of this configuration and these inputs, or None; see `run.finished_report`."""
    done = run.finished_report(config)
    if done is None:
        return None
    for note in same_inputs(config, {config.out_folder: done}, flag, gates):
        yield Event(phase="done", overall=1.0, note=note)
    yield Event(phase="done", overall=1.0, note="this run is already complete")
    return done


def same_inputs(config: PruneConfig, found: Mapping[Path, Report], flag: StopFlag, gates: Gates) -> list[str]:
    """Check that finished runs, by folder, which read what this configuration does, were bound to what is there now.

    Returns notes on other versions and devices, and on inputs that are not here to be checked.

    Raises `ConfigError` naming the inputs that changed, and for a gate on what is not measured.
    """
    notes: dict[str, None] = {}
    try:
        data = read_data(config)
        reports.require(gates, data.metrics)
        now = Bound(fingerprints=inputs.fingerprints(config, data, flag.check), versions=machine.versions())
        for out, report in found.items():
            notes |= dict.fromkeys(run.check_finished(out, now, report))
    except CapError as error:
        if isinstance(error, ConfigError | Stopped) or _are_here(config):
            raise
        notes = {f"cannot check whether its inputs are still the same: {error.message}": None}
    return list(notes)


def _are_here(config: PruneConfig) -> bool:
    """Whether all that the configuration names is on this machine, so that an error tells of a change."""
    source = config.source
    named, place = (
        filter(None, (config.model, config.teacher, source.text, *split_list(config.mask_from))),
        source.data or source.text * source.unlabelled,
    )
    return all(map(hub.is_local, named)) and (Path(place).exists() if place else source.task in BUILTIN_TASKS)


@contextlib.contextmanager
def _memory(config: PruneConfig, folder: RunFolder) -> Iterator[None]:
    """Say of memory that runs out what helps, and what stays when that is done."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        kept = stages.kept_stages(folder, ["calibration"])
        hint = "lower --calibration" * (config.calibrated or config.refit)
        hint += f" (this keeps: {', '.join(kept)})" if kept and hint else ""
        hint += ", or " * bool(hint)
        raise RunFailed(
            "out of memory", f"{hint}start over with a shorter --max-length or a smaller model, and --overwrite"
        ) from error


def _prune(config: PruneConfig, folder: RunFolder, overwrite: bool, gates: Gates) -> Generator[Event, None, Report]:
    yield Event(phase="load", note=f"loading {config.model}")
    on = devices.compute(config.hardware, training=True)
    if config.compile:
        compiled.check(on.device)
    data = read_data(config)
    reports.require(gates, data.metrics)
    student = load_student(config, data)
    given = given_teacher(config, data, student)
    bound = Bound(
        fingerprints=inputs.fingerprints(config, data, folder.flag.check),
        versions=machine.versions(),
        device=describe_device(on),
    )
    inputs.check_masks(config, bound.fingerprints)
    run.check_ranks(config, bound)
    notes = [] if overwrite else run.check_stopped(folder, bound)
    setup = make_setup(config, folder, bound, on, data, student, "" if given is None else given.source)
    notes += run.begin(folder, config, bound, overwrite=overwrite)
    yield from tell_notes(setup, student)
    for note in notes:
        yield setup.meter.of("load")(note=note)
    planned = expected(setup, student)
    measure = yield from measured_for(setup, student)
    if given is not None:
        model.place(given, on)
        setup = yield from with_answers(setup, given)
    with (yield from run.alone(folder, setup.meter.of("load"))):
        pretrained = (yield from make_bank(setup, "pretrained", student))[0] if "prc" in config.loss_names else None
        teacher = given or (yield from fine_tuned(setup, student))
        finetuned, logits, dense = yield from teacher_bank(setup, teacher)
    hand_on(config, student, teacher)
    kept = teacher if config.needs_teacher else None
    del teacher, given
    pruner, state = yield from train_student(setup, student, pretrained, finetuned, logits, kept, measure)
    return (yield from write_artefact(setup, student, pruner, state, dense, planned))
