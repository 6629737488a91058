"""`cap export`: a pruned model in the form that its next home needs, proven equal to what was pruned.

Every format goes the same way: load; rewrite the vocabulary, if asked; cut what computes nothing, if the format can;
write into a staging folder; open what was written and compare; publish in one rename with `export.json`. Where limits
choose the format, the ladder is tried from its top, and what does not keep to them is removed again.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from capcli import files
from capcli.config.export import ExportConfig
from capcli.config.paths import portable, shortened
from capcli.errors import CheckFailed, ConfigError, ModelError
from capcli.events import Event, part_of
from capcli.exporting import ladder, onnx_model, trial
from capcli.exporting.checks import checked, scored, with_answers
from capcli.exporting.formats import FORMATS
from capcli.exporting.job import Export, Opened, check_free
from capcli.exporting.ladder import DENSE, Ground, Way
from capcli.exporting.preparing import RECORD, prepared
from capcli.exporting.record import describe, record_of
from capcli.exporting.trial import Tried
from capcli.measuring.scoring import Measured
from capcli.models import predictor
from capcli.models.model import place
from capcli.records.codec import from_json, to_json
from capcli.records.exported import ExportPlan, ExportRecord, Ladder, Measurements, Rung
from capcli.reporting import ladders

SPARSE = 'chosen for the sparse runtime: --runtime sparse, or runtime="sparse" of capcli.load; torch makes it dense'
FIRST = 0.1  # share of a search in which the model as it was loaded is measured


class NothingFits(CheckFailed):
    """No export meets the limits; `ladder` says what was tried."""

    def __init__(self, tried: Ladder) -> None:
        super().__init__(
            f"no export keeps to the limits ({ladders.counted_outcomes(tried)}); nothing was kept",
            "allow more, or prune more",
        )
        self.ladder = tried


def export(config: ExportConfig) -> Generator[Event, None, ExportRecord]:
    """Write `config.model` into `config.out_folder`: as `config.to`, or as the first of the ladder that meets its
    limits; yields events and returns `export.json`.

    Raises:
        ModelError, ConfigError, FileError: nothing that can be exported, or a folder that is not empty.
        CheckFailed: what was written is not what it should be. Nothing is left of an export that fails.
        NothingFits: no export meets the limits.
    """
    config.check_asked()
    out = check_free(config.out_folder)
    if config.to == "onnx":
        onnx_model.check_packages()
    if config.to:
        record, missing = yield from _by_name(config, out)
    else:
        record, missing = yield from _by_limits(config, out)
    for note in record.notes:
        if note != missing:  # which was said before
            yield Event(phase="export", overall=1.0, note=note)
    yield Event(phase="export", done=1, total=1, overall=1.0, note=f"complete: {config.out_folder}")
    return record


def _by_name(config: ExportConfig, out: Path) -> Generator[Event, None, tuple[ExportRecord, str]]:
    """The record of the format that is asked for, and what was missing of the data."""
    job = ladder.resized((yield from prepared(config)))
    job = (yield from with_answers(job)) if job.lossy else job
    with _publishing(out) as shelf:
        opened = yield from FORMATS[config.to](job, shelf.staging)
        shelf.fill(job, (yield from checked(job, opened)))
        del opened
    return shelf.record(out), job.known.missing


@dataclass
class _Shelf:
    """A staging folder and the record that is to be written last into it."""

    staging: Path
    written: dict[str, Any] = field(default_factory=dict)

    def fill(self, job: Export, measured: Measurements, tried: Ladder | None = None) -> None:
        """Say what was written: the card, and the record, which gets its files when all is published."""
        record = portable(record_of(job, measured, tried), job.config)
        describe(job, record, self.staging)
        self.written |= to_json(record)

    def record(self, out: Path) -> ExportRecord:
        return from_json(ExportRecord, self.written, str(out / RECORD))


@contextlib.contextmanager
def _publishing(out: Path) -> Iterator[_Shelf]:
    """A place to write an export; it becomes `out` at the end, or nothing is left of it.

    On Windows a folder with an open file cannot be renamed: what was opened there must not be held any more.
    """
    written: dict[str, Any] = {}
    with files.publish(out, manifest=RECORD, suffix=f"part-{os.getpid()}", record=written) as staging:
        yield _Shelf(staging=staging, written=written)
        gc.collect()  # networks hold themselves


# By limits -----------------------------------------------------------------------------------------------------------


class _NotKept(CheckFailed):
    """What was written does not keep to the limits, by any runtime."""


def _by_limits(config: ExportConfig, out: Path) -> Generator[Event, None, tuple[ExportRecord, str]]:
    """The record of the first rung that meets the limits, and what was missing of the data. Raises `NothingFits`."""
    plain = yield from prepared(config, train=True)
    trial.check_limits(plain)
    plain = yield from with_answers(plain)
    before = (yield from part_of(_scores_before(plain), 0, FIRST)) if config.max_drop else None
    search = _Search(ground=Ground(plain=plain), out=out, before=before)
    groups = list(ladder.by_file())
    for done, ways in enumerate(groups):
        share = (1 - FIRST) / len(groups)
        record = yield from part_of(search.attempt(ways), FIRST + share * done, share)
        if record is not None:
            return record, plain.known.missing
    raise NothingFits(search.tried(passed=False))


def _scores_before(job: Export) -> Generator[Event, None, Measured]:
    """The scores of the model as it was loaded."""
    place(job.original, job.on)
    return (yield from scored(job, predictor.of_network(job.original, job.on), "before"))


@dataclass(frozen=True, kw_only=True)
class _Search:
    """The ladder as it is tried. before: scores of the model as it was loaded, where a drop is limited."""

    ground: Ground
    out: Path
    before: Measured | None
    rungs: list[Rung] = field(default_factory=list)

    def attempt(self, ways: Sequence[Way]) -> Generator[Event, None, ExportRecord | None]:
        """Write one file of the ladder; its record if it meets the limits by one of its runtimes, else nothing."""
        yield Event(phase="export", note=f"trying {ways[0].to}: {ways[0].name}")
        job, rungs = ladder.planned(self.ground, ways)
        large = trial.too_large(self.ground.plain.config, rungs[0])
        if job is None or large is not None:
            self.rungs.append(large or rungs[0])
            return None
        try:
            with _publishing(self.out) as shelf:
                opened = yield from FORMATS[job.config.to](job, shelf.staging)
                found = yield from self._first(job, rungs, opened)
                measured = yield from checked(job, found.opened, self.before, found.after)
                self.rungs.append(found.rung)
                notes = (*measured.notes, *[SPARSE] * (found.rung.runtime == "sparse"))
                shelf.fill(job, replace(measured, notes=notes), self.tried(passed=True))
                del opened, found
        except _NotKept:
            return None
        except (CheckFailed, ModelError, ConfigError) as error:
            self.rungs.append(replace(rungs[0], refused=error.message, passed=False))
            return None
        return shelf.record(self.out)

    def _first(self, job: Export, rungs: Sequence[Rung], opened: Opened) -> Generator[Event, None, Tried]:
        """The first runtime by which a file meets the limits. Raises `_NotKept`."""
        for rung in rungs:
            try:
                found = yield from trial.tried(job, self.ground.plain.config.limits, rung, opened, self.before)
            except ModelError as error:  # of the runtime
                self.rungs.append(replace(rung, refused=error.message))
                continue
            if found.rung.passed:
                return found
            self.rungs.append(found.rung)
            if not found.too_slow:
                break
        raise _NotKept("the limits are not kept")

    def tried(self, *, passed: bool) -> Ladder:
        """What was tried so far."""
        config = self.ground.plain.config
        return Ladder(
            model=shortened(config.model),
            fit=config.fit or None,
            max_latency_ms=config.max_latency_ms or None,
            max_drop=config.max_drop or None,
            before=self.before.metrics if self.before else None,
            rungs=tuple(self.rungs),
            passed=passed,
        )


# Without writing -----------------------------------------------------------------------------------------------------


def plan(config: ExportConfig) -> Generator[Event, None, ExportPlan]:
    """What the format that is asked for, or every way to ship the model, would take and give; nothing is written."""
    plain = yield from prepared(config, train=not config.to)
    rungs, ground = [ladder.as_asked(plain)] if config.to else [], Ground(plain=plain)
    for ways in [] if config.to else [[DENSE], *ladder.by_file()]:
        yield Event(phase="plan", note=f"sizing {ways[0].to}: {ways[0].name}")
        rungs += [trial.too_large(config, rung) or rung for rung in ladder.planned_here(ground, ways)]
    return ExportPlan(
        model=shortened(config.model),
        dense_bytes=4 * plain.original.before_slicing.total,
        rungs=tuple(rungs),
        notes=(plain.known.missing,) if plain.known.missing else (),
    )
