"""The run folder: lock, completeness, checkpoints, signals.

OUT/work/ holds what a stopped run needs to go on: config.json, the published teacher and banks, and for each training
phase the last two checkpoints. Every one of them is a folder that was published in one rename, see `files.publish`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import shutil
import signal
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from capcli import files
from capcli.config import PruneConfig, differences, flatten
from capcli.errors import ConfigError, FileError, Stopped

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")

REPORT, CONFIG, LOCK = "report.json", "config.json", ".lock"
KEEP_CHECKPOINTS = 2
# What a run writes into OUT, in the order in which `--overwrite` removes it.
OURS = (REPORT, "report.html", "README.md", "model.cap.safetensors", "cap_config.json")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run: `done` of `total` units of a phase, and the share of the whole run.

    `note` is news, worth a line of its own; `status` only says how things stand.
    """

    phase: str
    done: float = 0
    total: float = 0
    overall: float = 0.0
    note: str = ""
    status: str = ""


def finished(events: Generator[Any, None, Result]) -> Result:
    """What a generator of events returns at its end; the events are dropped."""
    while True:
        try:
            next(events)
        except StopIteration as stop:
            found: Result = stop.value
            return found


@dataclass
class StopFlag:
    """Set by a signal or a time limit, looked at between steps. The first signal only sets it."""

    reason: str = ""
    deadline: float = float("inf")

    def requested(self) -> str:
        """Why the run should stop, or an empty string."""
        if not self.reason and time.monotonic() > self.deadline:
            self.reason = "the time limit"
        return self.reason

    def check(self) -> None:
        """Raise `Stopped` where nothing needs saving."""
        if self.requested():
            raise Stopped(
                f"stopped by {self.reason}; all finished work is saved", "run the same command again to go on"
            )


@contextlib.contextmanager
def signals(flag: StopFlag) -> Iterator[None]:
    """While inside, SIGINT, SIGTERM, SIGHUP and SIGUSR1 set the flag; a second Ctrl-C interrupts at once."""

    def handle(number: int, _frame: FrameType | None) -> None:
        flag.reason = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    names = [name for name in names if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN]  # nohup
    before = {name: signal.signal(getattr(signal, name), handle) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


@dataclass(frozen=True, kw_only=True)
class Run:
    """An output folder that this process alone writes to. `earlier` lists seconds of finished work that it found."""

    out: Path
    flag: StopFlag
    started: float = field(default_factory=time.monotonic)
    earlier: list[float] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """Folder of the resumable state."""
        return self.out / "work"


def finished_report(config: PruneConfig) -> dict[str, Any] | None:
    """The report of a finished run of this configuration, or None. Raises `ConfigError` when OUT holds another one."""
    path = config.out_folder / REPORT
    if not path.exists():
        return None
    report = files.read_json(path)
    if not isinstance(report, dict) or report.get("status") != "complete":
        raise FileError(
            f"{path} is not a report of a finished run", "choose another folder with -o, or use --overwrite"
        )
    _refuse_other(config, report.get("config"), config.out_folder)
    return report


def _refuse_other(config: PruneConfig, stored: Any, out: Path) -> None:
    if not isinstance(stored, dict):
        raise FileError(f"{out} holds no configuration of a run", "choose another folder with -o, or use --overwrite")
    changed = differences(flatten(config), stored)
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"{out} holds a run with another configuration: {'; '.join(changed[:3])}{more}",
            "choose another folder with -o, or start anew with --overwrite",
        )


@contextlib.contextmanager
def open_run(config: PruneConfig, flag: StopFlag, *, overwrite: bool = False) -> Iterator[Run]:
    """Lock OUT and check that what lies there belongs to this configuration, or may be overwritten by `begin`.

    Raises `ConfigError` for the folder of another run or process, `FileError` for an unwritable or foreign folder.
    """
    run = Run(out=config.out_folder, flag=flag)
    _refuse_foreign(run.out)
    files.check_no_links(run.work)
    files.check_writable(run.work)
    lock = FileLock(run.work / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"another process is writing to {run.out}", "wait for it, or choose another folder with -o"
        ) from error
    try:
        stored = run.work / CONFIG
        if stored.exists() and not overwrite:
            _refuse_other(config, files.read_json(stored), run.out)
        yield run
    finally:
        lock.release()


def begin(run: Run, config: PruneConfig, *, overwrite: bool = False) -> None:
    """Note the configuration in OUT, the first thing that a run writes, once its model and data are known to load."""
    if overwrite:
        clear(run)
    if not (run.work / CONFIG).exists():
        files.write_json(run.work / CONFIG, flatten(config))


def _refuse_foreign(out: Path) -> None:
    """Never write among files that are not ours."""
    if out.is_dir() and any(out.iterdir()):
        ours = [out / "cap_config.json", out / "work" / CONFIG, out / "work" / LOCK]
        if not any(path.exists() for path in ours):
            raise FileError(f"{out} is not empty and was not written by cap", "choose another folder with -o")
    elif out.exists() and not out.is_dir():
        raise FileError(f"{out} is a file, not a folder", "choose another folder with -o")


def clear(run: Run) -> None:
    """Remove what an earlier run wrote, nothing else; the report first, or a half-removed run would look complete."""
    for name in OURS:
        files.remove(run.out / name)
    for path in run.work.iterdir():
        if path.name != LOCK:
            files.remove(path)


def finish(run: Run, keep_work: bool) -> None:
    """Remove the work folder of a complete run."""
    if not keep_work:
        shutil.rmtree(run.work, ignore_errors=True)


# Checkpoints ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a training phase after `step` steps: tensors, and scalars as JSON."""

    step: int
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]


def save_checkpoint(run: Run, phase: str, checkpoint: Checkpoint) -> None:
    """Publish a checkpoint, then drop all but the newest `KEEP_CHECKPOINTS`."""
    folder = run.work / phase
    folder.mkdir(parents=True, exist_ok=True)
    with files.publish(folder / f"step-{checkpoint.step:08d}") as staging:
        files.write_tensors(staging / "state.safetensors", checkpoint.tensors)
        files.write_json(staging / "state.json", {"step": checkpoint.step, **checkpoint.scalars})
    for old in _checkpoints(folder)[KEEP_CHECKPOINTS:]:
        files.remove(old)


def load_checkpoint(run: Run, phase: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a warning for each newer one that does not."""
    warnings: list[str] = []
    for folder in _checkpoints(run.work / phase):
        if files.is_complete(folder):
            scalars = files.read_json(folder / "state.json")
            tensors = files.read_tensors(folder / "state.safetensors")
            return Checkpoint(step=int(scalars["step"]), tensors=tensors, scalars=scalars), warnings
        warnings.append(f"checkpoint {folder} is damaged, going back to the one before")
    return None, warnings


def drop_checkpoints(run: Run, phase: str, after: int) -> None:
    """Remove the checkpoints of steps beyond `after`, because something that they rest on is damaged."""
    for folder in _checkpoints(run.work / phase):
        if folder.name > f"step-{after:08d}":
            files.remove(folder)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


# Versions -------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"cap": importlib.metadata.version("capcli"), "python": platform.python_version(), **found}
