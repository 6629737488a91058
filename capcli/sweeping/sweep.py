"""`cap prune` with several methods, sparsities or seeds: all runs, one after another or some at a time, and one result.

Every run is what `cap prune` makes of its options alone, in a folder of its own. Runs with the same teacher share it,
and what is made with it. The result is written anew after each run; a stopped sweep continues with the same command.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from capcli import files, parallel, run
from capcli.config.measure import Gates
from capcli.config.prune import PruneConfig
from capcli.config.sweep import Cell, SweepConfig
from capcli.errors import CheckFailed, RunFailed
from capcli.events import Event, StopFlag, part_of
from capcli.measuring import reports
from capcli.models import devices
from capcli.pruning.setup import check_reach, load_student, read_data
from capcli.pruning.teacher import given_teacher
from capcli.records.codec import read, to_json
from capcli.records.pruned import Report
from capcli.records.swept import Sweep
from capcli.reporting import documents, sweeps
from capcli.stages import REPORT, RunFolder
from capcli.sweeping import folder as folders
from capcli.sweeping.jobs import Failure, Job, run_all
from capcli.sweeping.outcome import failures, outcome
from capcli.verbs.prune import same_inputs


class RunsFailed(RunFailed):
    """Some runs of a sweep failed; `sweep` is its result all the same."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(*failures(sweep))
        self.sweep = sweep


class NothingPasses(CheckFailed):
    """No configuration of a sweep keeps to all gates; `sweep` is its result."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__("no configuration passes all gates", "see the table; allow more, or try other sparsities")
        self.sweep = sweep


@dataclass(kw_only=True)
class _Work:
    """A sweep in progress: the reports that are there and why others are not, by the name of the run.

    own_head: see `folder.shared_by`.
    """

    config: SweepConfig
    folder: RunFolder
    found: dict[str, Report] = field(default_factory=dict)
    failed: dict[str, Failure] = field(default_factory=dict)
    own_head: bool = False

    @property
    def waiting(self) -> list[Cell]:
        """The runs that are still to be made."""
        return [cell for cell in self.config.cells if cell.name not in self.found]

    def ended(self, cell: Cell, failure: Failure | None) -> None:
        """Note how a run ended."""
        if failure is None:
            self.found[cell.name] = read(Report, self.folder.root / cell.name / REPORT)
        else:
            self.failed[cell.name] = failure
        self.write()

    def outcome(self) -> Sweep:
        """The result as far as there is one."""
        return outcome(self.config, self.found, self.failed)

    def write(self) -> None:
        """Write it; what says that the folder is ours comes first."""
        found = self.outcome()
        self.folder.check()
        files.write_json(self.folder.root / run.SWEEP, to_json(found))
        files.write_text(self.folder.root / folders.TABLE, sweeps.csv_text(found))
        files.write_text(self.folder.root / folders.PAGE, documents.render_sweep_html(found))


def sweep(
    config: SweepConfig, *, flag: StopFlag | None = None, overwrite: bool = False
) -> Generator[Event, None, Sweep]:
    """Make the runs of a sweep in `config.out_folder`; yields events and returns the result.

    Runs that are finished are kept, stopped ones go on.

    Raises:
        RunsFailed: after all others ended.
        NothingPasses: no configuration keeps to the gates.
        CapError: any of its other children; see `capcli.errors`.
    """
    parallel.refuse("a sweep")
    flag = flag or StopFlag()
    if config.max_time:
        flag.deadline = time.monotonic() + 60 * config.max_time
    with folders.opened(config, flag, overwrite=overwrite) as folder:
        work = _Work(config=config, folder=folder)
        if not overwrite:
            work.found = folders.finished(config, folder)
        yield from _checked(work)
        yield from _made(work, overwrite)
        found = _finish(work)
    if work.failed:
        raise RunsFailed(found)
    if not found.passed:
        raise NothingPasses(found)
    return found


def _checked(work: _Work) -> Generator[Event, None, None]:
    """Find what is wrong with the options, the data or the model before anything is written.

    Of finished runs, that their inputs are what they were; of the others all that would refuse them at their start.
    """
    config, flag = work.config, work.folder.flag
    for seed in dict.fromkeys(cell.run.seed for cell in config.cells):
        cells = [cell for cell in config.cells if cell.run.seed == seed and cell.name in work.found]
        if cells:
            theirs = {cell.run.out_folder: work.found[cell.name] for cell in cells}
            for note in same_inputs(cells[0].run, theirs, flag, config.gates):
                yield Event(phase="load", note=note)
    if work.waiting:
        yield Event(phase="load", note=f"loading {config.run.model}")
        work.own_head = _check_start([cell.run for cell in work.waiting], config.gates)


def _check_start(runs: Sequence[PruneConfig], gates: Gates) -> bool:
    """Raise `CapError` for what would refuse one of these runs before its first step; whether one that trains nothing
    takes MODEL for its teacher."""
    devices.compute(runs[0].hardware)
    data = read_data(runs[0])
    reports.require(gates, data.metrics)
    student = load_student(runs[0], data)
    for config in runs:
        check_reach(config, student)
    alike = {(config.loss_names, bool(config.epochs)): config for config in runs}
    given = [given_teacher(config, data, student) is not None for config in alike.values()]
    return any(given) and not runs[0].teacher


def _made(work: _Work, overwrite: bool) -> Generator[Event, None, None]:
    """Make the runs that are waiting."""
    n_runs, waiting = len(work.config.cells), work.waiting
    if not waiting:
        yield Event(phase="done", overall=1.0, note="all runs of this sweep are already complete")
        return
    if overwrite:
        folders.clear(work.folder)
    folders.unmark(work.folder)
    work.write()
    found = n_runs - len(waiting)
    kept = f"; {found} of them are already complete" if found else ""
    at_once = f", {work.config.at_once} at a time" if work.config.at_once > 1 else ""
    yield Event(phase="sweep", overall=found / n_runs, note=f"{n_runs} runs{at_once}{kept}")
    jobs = _ordered([_job(cell, work, overwrite) for cell in waiting], work.config.at_once)
    events = run_all(jobs, work.config.at_once, work.folder.flag, work.ended)
    yield from part_of(events, found / n_runs, len(waiting) / n_runs)


def _job(cell: Cell, work: _Work, overwrite: bool) -> Job:
    shared = folders.shared_by(cell.run, work.folder, own_head=work.own_head)
    return Job(cell=cell, shared=shared, room=work.folder.work, overwrite=overwrite)


def _ordered(jobs: Sequence[Job], at_once: int) -> list[Job]:
    """Seed by seed, so that what is there of a stopped sweep compares; of several at a time, first those that make the
    teachers, each another one."""
    if at_once == 1:
        return list(jobs)
    makers = {job.shared: job for job in reversed(jobs)}
    return sorted(jobs, key=lambda job: makers[job.shared] is not job)


def _finish(work: _Work) -> Sweep:
    """Mark the best run, write the result, and remove what is not needed any more."""
    found = work.outcome()
    folders.unmark(work.folder)
    if found.best:
        folders.mark(work.folder, found.best)
    work.write()
    if found.status == "complete":
        run.finish(work.folder, work.config.run.keep_work)
    return found
