"""The run folder: lock, completeness, what a run is bound to, how it begins, ends and is cleared."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from capcli import files, parallel
from capcli.config.layers import differences, free_options
from capcli.config.options import flag_name, flatten
from capcli.config.prune import PruneConfig
from capcli.errors import CapError, ConfigError, FileError, Stopped
from capcli.events import Event, StopFlag
from capcli.records.codec import from_json
from capcli.records.pruned import Report
from capcli.reporting.text import first_few
from capcli.sources.checkpoint import TOKENIZER_FILES
from capcli.stages import (
    ANEW,
    CONFIG,
    LOCK,
    MADE_ANEW,
    REPORT,
    Bound,
    RunFolder,
    another_run,
    identity_of,
    remove_dependent,
    stages_of,
)
from capcli.stored import read_json

EXPORT, SWEEP = "export.json", "sweep.json"  # the records of what `cap export` and a sweep of `cap prune` wrote
WAIT_SECONDS = 0.2  # between two looks at a lock
# What a run writes into OUT, in the order in which `--overwrite` removes it; OUT/work goes after it.
OURS = (REPORT, "report.html", "README.md", "model.cap.safetensors", *TOKENIZER_FILES, "cap_config.json")


def finished_report(config: PruneConfig) -> Report | None:
    """The report of a finished run of this configuration, or None.

    Raises `ConfigError` when OUT holds another one, `FileError` when its files are not what was written.
    """
    path = config.out_folder / REPORT
    if not path.exists():
        return None
    stored = _record(path)
    if stored.get("status") != "complete":
        raise FileError(f"{path} is not a report of a finished run", ANEW)
    report = from_json(Report, stored, str(path), ANEW)
    if changed := differences(flatten(config), report.config):
        raise another_run(config.out_folder, list(changed.values()))
    _check_artefact(config.out_folder, report)
    return report


def _record(path: Path) -> dict[str, Any]:
    """A JSON object with the configuration of a run. Raises `FileError`."""
    try:
        found = read_json(path)
    except FileError as error:
        raise FileError(error.message, error.hint or ANEW) from error
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
        raise FileError(f"{path} holds no configuration of a run", ANEW)
    return found


def _check_artefact(out: Path, report: Report) -> None:
    """Raise `FileError` unless the files of a finished run have the bytes that its report names."""
    for name, about in report.files.items():
        path = out / Path(name).name
        try:
            same = files.sha256(path) == about.sha256
        except OSError:
            same = False
        if not same:
            raise FileError(f"{path} is not as the finished run wrote it: changed, damaged or missing", ANEW)


def check_stopped(run: RunFolder, bound: Bound) -> list[str]:
    """See `check_inputs`, of the stopped run in OUT, if there is one. Common to all ranks."""
    stored = run.work / CONFIG
    then: Any = parallel.by_first(lambda: _record(stored) if stored.exists() else None)
    return check_inputs(run.out, bound, from_json(Bound, then, str(stored), ANEW)) if then else []


def check_ranks(config: PruneConfig, bound: Bound) -> None:
    """Raise `ConfigError` unless all ranks have the same options, inputs and versions. Common to all ranks."""
    free = {*free_options(), "model", "teacher", "data", "text", "out", "device"}  # inputs count as they are read
    options = {flag_name(name): value for name, value in flatten(config).items() if name not in free}
    ours = {**options, **bound.fingerprints, **bound.versions}
    theirs = parallel.share(ours)
    if changed := [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]:
        raise ConfigError(
            f"not the same as what rank 0 has: {first_few(changed, 4)}",
            "give all processes the same command, model, data and versions of libraries",
        )


def check_finished(out: Path, bound: Bound, report: Report) -> list[str]:
    """See `check_inputs`, of the finished run in OUT."""
    then = Bound(fingerprints=dict(report.fingerprints), versions=dict(report.versions), device=report.device or "")
    return check_inputs(out, bound, then)


def check_inputs(out: Path, bound: Bound, then: Bound) -> list[str]:
    """Compare what a run is about to read with what it was bound to; returns a note for other versions or devices.

    Raises `ConfigError` naming the inputs that changed.
    """
    ours, stored = bound.fingerprints, then.fingerprints
    if changed := [name for name in {**ours, **stored} if ours.get(name) != stored.get(name)]:
        raise ConfigError(
            f"the inputs of the run in {out} have changed: {first_few(changed, 4)}",
            "restore them, choose another folder with -o, or start over with --overwrite",
        )
    theirs = {**then.versions, "device": then.device}
    now = {**bound.versions, "device": bound.device or then.device}
    moved = [f"{name} {theirs.get(name)}, now {value}" for name, value in now.items() if theirs.get(name) != value]
    return (
        [f"the run began with {'; '.join(moved)}: the result may differ from that of an uninterrupted run"]
        if moved
        else []
    )


def alone(
    run: RunFolder, event: Callable[..., Event]
) -> Generator[Event, None, contextlib.AbstractContextManager[Any]]:
    """Wait until no other run makes what this one shares with it; the context that is returned ends that.

    Raises `Stopped` while it waits.
    """
    if run.shared is None:
        return contextlib.nullcontext()
    run.shared.mkdir(parents=True, exist_ok=True)
    files.check_no_links(run.shared)
    lock, began = FileLock(run.shared / LOCK), time.monotonic()
    while True:
        with contextlib.suppress(Timeout):
            held = lock.acquire(timeout=0)
            run.flag.paused += time.monotonic() - began
            return held
        run.flag.check()
        yield event(status="waiting for the teacher of another run")
        time.sleep(WAIT_SECONDS)


@contextlib.contextmanager
def open_run(
    config: PruneConfig, flag: StopFlag, *, overwrite: bool = False, shared: Path | None = None
) -> Iterator[RunFolder]:
    """Lock OUT and check that what lies there belongs to this configuration, or may be overwritten by `begin`.

    When it fails before anything of the run is kept, it leaves no folder behind that was not there; stopped, it does.
    `shared`: where the stages lie that other runs use as well. Common to all ranks, of which rank 0 locks.

    Raises `ConfigError` for the folder of another run or process, `FileError` for an unwritable or foreign folder.
    """
    run = RunFolder(out=config.out_folder, flag=flag, shared=shared)
    if not parallel.first():
        parallel.wait()
        yield run
        return
    _refuse_foreign(run)
    files.check_no_links(run.work)
    made = [folder for folder in (run.work, *run.work.parents) if not folder.exists()]
    lock = FileLock(run.work / LOCK)
    begun = False
    try:
        files.check_writable(run.work)
        acquire(lock, run)
        run = replace(run, held=identity_of(run.work / LOCK))
        begun = (run.work / CONFIG).exists()
        if not overwrite:
            refuse_other(config, run)
        parallel.wait()
        yield run
    except Exception as error:
        if not isinstance(error, Stopped) and not isinstance(error.__cause__, Timeout):
            refused = isinstance(error, CapError) and error.exit_code == CapError.exit_code
            leave(run, made, forget=refused and not begun)
        raise
    finally:
        with contextlib.suppress(OSError):
            lock.release()
        _remove_lock(run, made)


def _remove_lock(run: RunFolder, made: Iterable[Path] = ()) -> None:
    """On Windows, where an open file cannot be removed: a lock that was released, and the folders that hold no more."""
    if files.POSIX:
        return
    with contextlib.suppress(OSError):
        if {path.name for path in run.work.iterdir()} <= {LOCK}:
            (run.work / LOCK).unlink(missing_ok=True)
            for folder in dict.fromkeys((run.work, *made)):
                folder.rmdir()


def acquire(lock: FileLock, run: RunFolder) -> None:
    """Take the lock of OUT. Raises `ConfigError` when another process holds it, `FileError` when there can be none."""
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"another process is writing to {run.out}", "wait for it, or choose another folder with -o"
        ) from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(
            f"cannot lock {run.work / LOCK}: {reason}", "choose a folder on another file system with -o"
        ) from error


def refuse_other(config: PruneConfig, run: RunFolder) -> None:
    """Raise unless OUT is empty or holds a run that this configuration may continue."""
    stored = run.work / CONFIG
    if stored.exists():
        found = differences(flatten(config), _record(stored)["config"])
        if changed := [words for name, words in found.items() if name not in MADE_ANEW]:
            raise another_run(run.out, changed)
    elif (run.root / REPORT).exists():
        return
    elif stages := [path for path in run.work.iterdir() if not _is_scratch(path)]:
        raise FileError(f"{min(stages)} is of a run without its {CONFIG}", ANEW)
    elif (run.root / "cap_config.json").exists():
        raise FileError(f"{run.out} holds a pruned model without the report of its run", ANEW)


def begin(run: RunFolder, config: PruneConfig, bound: Bound, *, overwrite: bool = False) -> list[str]:
    """Note in OUT what identifies the run, the first thing that it writes, once its model and data are known to load.

    Of a stopped run the stages that depend on changed options are removed. Returns notes that say so. Common to all
    ranks. Raises `FileError` where a rank does not see what rank 0 wrote.
    """
    notes: list[str] = parallel.by_first(lambda: _begin(run, config, bound, overwrite=overwrite))
    if not (run.work / CONFIG).exists():
        raise FileError(
            f"{run.out} is not the folder that rank 0 writes to", "choose one that all machines share with -o"
        )
    return notes


def _begin(run: RunFolder, config: PruneConfig, bound: Bound, *, overwrite: bool) -> list[str]:
    run.check()
    stored, notes = run.work / CONFIG, list[str]()
    if overwrite:
        clear(run)
    elif stored.exists():
        notes = remove_dependent(run, differences(flatten(config), _record(stored)["config"]))
    _remove_scratch(run)
    files.write_json(stored, {"config": flatten(config), **bound.record})
    return notes


def _refuse_foreign(run: RunFolder) -> None:
    """Never write among files that are not ours, nor through a link."""
    out = run.out
    if out.exists() and not out.is_dir():
        raise FileError(f"{out} is a file, not a folder", "choose another folder with -o")
    if run.work.is_symlink() or (run.work.exists() and not run.work.is_dir()):
        raise FileError(f"{run.work} is a link or a file, not a folder", "choose another folder with -o")
    if not out.is_dir() or not any(out.iterdir()):
        return
    for record, verb in {EXPORT: "cap export", SWEEP: "a sweep of cap prune"}.items():
        if (out / record).exists():
            raise FileError(f"{out} was written by {verb}", "choose another folder with -o")
    ours = [out / "cap_config.json", run.work / CONFIG, run.work / LOCK]
    if not (any(path.exists() for path in ours) or is_failed_start(run)):
        raise FileError(f"{out} is not empty and was not written by cap", "choose another folder with -o")


def is_failed_start(run: RunFolder) -> bool:
    """Whether OUT holds nothing but what is there before the lock is taken: a work folder without a file of anyone."""
    return [path.name for path in run.root.iterdir()] == [run.work.name] and all(map(_is_scratch, run.work.iterdir()))


def _is_scratch(path: Path) -> bool:
    """Whether a file in the work folder is a lock, a test for writing, or something that was not finished."""
    return path.name == LOCK or re.fullmatch(r"\.(cap_write_test.*|.+\.part.*)", path.name) is not None


def _remove_scratch(run: RunFolder) -> None:
    """Remove what a killed process was still writing."""
    parts = [path for path in run.work.rglob(".*") if path.name != LOCK and _is_scratch(path)]
    starts = tuple(f".{name}." for name in OURS)
    parts += [path for path in run.root.glob(".*.part*") if path.name.startswith(starts)]
    for path in parts:
        files.remove(path)


def leave(run: RunFolder, made: list[Path], *, forget: bool) -> None:
    """Remove the lock and the folders in `made`, the innermost first, when no run is kept there; `forget` a
    configuration without any stage."""
    with contextlib.suppress(CapError, OSError):
        run.check()
        if forget and not stages_of(run):
            files.remove(run.work / CONFIG)
        if run.work.is_dir() and all(map(_is_scratch, run.work.iterdir())):
            shutil.rmtree(run.work)
        for folder in made:
            if folder.exists():
                folder.rmdir()


def clear(run: RunFolder) -> None:
    """Remove what an earlier run wrote, nothing else: first the report, or a half-removed run would look complete, and
    last what identifies the run, or its stages could be taken for those of another."""
    for name in OURS:
        files.remove(run.root / name)
    for path in run.work.iterdir():
        if path.name not in (LOCK, CONFIG):
            files.remove(path)
    files.remove(run.work / CONFIG)


def clear_artefact(run: RunFolder) -> None:
    """Remove what may lie where the artefact will be written, such as tokenizer files of another model."""
    run.check()
    for name in OURS:
        files.remove(run.root / name)


def finish(run: RunFolder, keep_work: bool) -> None:
    """Remove the work folder of a complete run: by rank 0."""
    run.check()
    if not keep_work and parallel.first():
        shutil.rmtree(run.work, ignore_errors=True)


def tidy(config: PruneConfig, report: Report) -> None:
    """Remove what was left of the work folder of a finished run, unless another process holds it."""
    run = RunFolder(out=config.out_folder, flag=StopFlag())
    if not run.work.is_dir() or run.work.is_symlink() or report.config.get("keep_work") or not parallel.first():
        return
    lock = FileLock(run.work / LOCK)
    with contextlib.suppress(CapError):
        acquire(lock, run)
        finish(run, keep_work=False)
        lock.release()
        _remove_lock(run)
