"""OUT of a sweep: its lock, what may lie there, the stages that its runs share, the link to the best run, its end."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from capcli import files, run, stages
from capcli.config.layers import differences
from capcli.config.prune import PruneConfig
from capcli.config.sweep import SweepConfig
from capcli.errors import ConfigError, FileError, RunFailed, Stopped
from capcli.events import StopFlag
from capcli.records.codec import read
from capcli.records.pruned import Report
from capcli.records.swept import Sweep
from capcli.run import EXPORT, SWEEP
from capcli.stages import ANEW, CONFIG, LOCK, REPORT, Bound, RunFolder
from capcli.sweeping import room

PAGE, TABLE, BEST, BEST_FILE = "sweep.html", "sweep.csv", "best", "best.json"
SHARED = "shared"  # in OUT/work: a folder for each teacher, with what is made with it


@contextlib.contextmanager
def opened(config: SweepConfig, flag: StopFlag, *, overwrite: bool = False) -> Iterator[RunFolder]:
    """Lock OUT and check that what lies there is of this sweep, or may be overwritten.

    When it fails before anything is kept, it leaves no folder behind that was not there.

    Raises `ConfigError` for the folder of another sweep or process, `FileError` for an unwritable or foreign folder.
    """
    folder = RunFolder(out=config.out_folder, flag=flag)
    _refuse_foreign(folder, config)
    made = [path for path in (folder.work, *folder.work.parents) if not path.exists()]
    lock = FileLock(folder.work / LOCK)
    try:
        files.check_writable(folder.work)
        run.acquire(lock, folder)
        folder = replace(folder, held=stages.identity_of(folder.work / LOCK))
        if not room.is_empty(folder.work):
            raise ConfigError(f"runs of an earlier sweep still write to {folder.out}", "wait until they have stopped")
        if not overwrite:
            _refuse_other(config, folder)
        yield folder
    except Exception as error:
        if not isinstance(error, Stopped) and not isinstance(error.__cause__, Timeout):
            run.leave(folder, made, forget=False)
        raise
    finally:
        with contextlib.suppress(OSError):
            lock.release()


def _refuse_foreign(folder: RunFolder, config: SweepConfig) -> None:
    """Never write among files that are not ours, nor through a link."""
    out, work = folder.out, folder.work
    if out.exists() and not out.is_dir():
        raise FileError(f"{out} is a file, not a folder", "choose another folder with -o")
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise FileError(f"{work} is a link or a file, not a folder", "choose another folder with -o")
    for place in (work, work / SHARED):
        files.check_no_links(place)
    if not out.is_dir() or not any(out.iterdir()):
        return
    others = {
        EXPORT: "cap export",
        REPORT: "a single run",
        "cap_config.json": "a single run",
        f"work/{CONFIG}": "a single run",
    }
    for name, what in others.items():
        if (out / name).exists():
            raise FileError(f"{out} was written by {what}, not by a sweep", "choose another folder with -o")
    if not (out / SWEEP).is_file() and not run.is_failed_start(folder):
        raise FileError(f"{out} is not empty and was not written by cap", "choose another folder with -o")
    if (out / BEST).exists() and not (out / BEST).is_symlink():
        raise FileError(f"{out / BEST} is not the link of a sweep", "move it, or choose another folder with -o")
    for cell in config.cells:
        if (out / cell.name).is_symlink():
            raise FileError(f"{out / cell.name} is a link, and nothing is written through one", "remove it")


def _refuse_other(config: SweepConfig, folder: RunFolder) -> None:
    """Raise `ConfigError` for the folder of a sweep of something else: methods, sparsities and seeds may differ, what
    all runs have in common may not, unless a stopped run could be continued with it."""
    path = folder.root / SWEEP
    if not path.exists():
        return
    theirs, ours = read(Sweep, path, ANEW).config, config.shared()
    both = {name: value for name, value in ours.items() if name in theirs}
    found = differences(both, {name: theirs[name] for name in both})
    if changed := [words for name, words in found.items() if name not in stages.MADE_ANEW]:
        raise _another(folder.out, changed, "threads" in found)


def _another(out: Path, changed: list[str], threads: bool) -> ConfigError:
    error = stages.another_run(out, changed)
    return ConfigError(error.message, f"use the --jobs and --threads of before, {error.hint}") if threads else error


def finished(config: SweepConfig, folder: RunFolder) -> dict[str, Report]:
    """The reports of the runs that are finished, by the names of their folders.

    Raises `ConfigError` when a folder holds a run with another configuration. What is damaged counts as not finished:
    the run itself says what is wrong with it.
    """
    found = {}
    for cell in config.cells:
        with contextlib.suppress(FileError):
            if report := run.finished_report(cell.run):
                found[cell.name] = report
            elif (folder.root / cell.name / "work").is_dir():
                run.refuse_other(cell.run, RunFolder(out=folder.out / cell.name, flag=folder.flag))
    return found


def shared_by(config: PruneConfig, folder: RunFolder, *, own_head: bool) -> Path:
    """Where the teacher of a run lies, with what is made with it: the same place for all runs that have the same.

    own_head: whether MODEL has a head for the task, so that a run which trains nothing takes MODEL for its teacher.
    """
    nothing = Bound(fingerprints={}, versions={})
    options = stages.origin(config, nothing, "teacher-steps", shared=True)["options"]
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode("ascii")).hexdigest()
    itself = "-itself" if own_head and not (config.epochs or config.teacher) else ""
    return folder.work / SHARED / f"seed{config.seed}-{digest[:8]}{itself}"


def clear(folder: RunFolder) -> None:
    """Remove what an earlier sweep wrote beside its runs; each of these is cleared when it starts over."""
    folder.check()
    for name in (PAGE, TABLE, BEST_FILE):
        files.remove(folder.root / name)
    unmark(folder)
    files.remove(folder.work / SHARED)


def unmark(folder: RunFolder) -> None:
    """Remove the mark of the best run."""
    for name in (BEST, BEST_FILE):
        files.remove(folder.root / name)


def mark(folder: RunFolder, cell: str) -> None:
    """Make the link `best`, which leads to the folder of a run beside it; where there are no links, a small file."""
    folder.check()
    try:
        with files.scratch(folder.root / BEST) as place:
            (place / BEST).symlink_to(cell)
            (place / BEST).replace(folder.root / BEST)
        files.sync_folder(folder.root)
    except RunFailed:
        files.write_json(folder.root / BEST_FILE, {"folder": cell})
