"""The run folder: lock, completeness, what a run is bound to, its stages, checkpoints, signals.

OUT/work/ holds what a stopped run needs to go on: config.json, which says what identifies the run, and its stages: the
teacher, the banks, the dense metrics, the best state, and for each training phase the last two checkpoints. A stage is
a folder that was published in one rename, see `files.publish`; its stage.json says what it was made from.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from capcli import files
from capcli.config import PruneConfig, differences, flatten, free_options
from capcli.errors import CapError, ConfigError, FileError, RunFailed, Stopped
from capcli.refusals import TOKENIZER_FILES

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")

REPORT, CONFIG, LOCK, STAGE = "report.json", "config.json", ".lock", "stage.json"
EXPORT = "export.json"  # the record of what `cap export` wrote
KEEP_CHECKPOINTS = 2
# What a run writes into OUT, in the order in which `--overwrite` removes it; OUT/work goes after it.
OURS = (REPORT, "report.html", "README.md", "model.cap.safetensors", *TOKENIZER_FILES, "cap_config.json")
ANEW = "choose another folder with -o, or start anew with --overwrite"

# The options that may change when a stopped run is continued, by the stages that depend on them. A teacher that is
# finished stays what it is when the size of the steps changes; one that is still in training starts anew.
_ENCODING, _STEPS, _TEACHER = (
    ("precision",),
    ("batch_size", "weight_decay", "lr_warmup"),
    ("teacher_lr", "teacher_epochs"),
)
_STUDENT = (
    *(*_ENCODING, *_STEPS, *_TEACHER, "losses", "epochs", "lr", "score_lr", "init", "dense_share", "final_share"),
    *("initial_sparsity", "update_every", "lr_schedule"),
    *("scope", "score_init", "tau", "extra_examples", "normalization", "unsupervised_weight", "supervised_weight"),
    *("ce_weight", "kd_weight", "kd_temperature", "hidden_weight", "reg_weight"),
)
STAGES = {
    "bank-pretrained": _ENCODING,
    "teacher-steps": (*_ENCODING, *_STEPS, *_TEACHER),
    "teacher": _TEACHER,
    "bank-finetuned": (*_ENCODING, *_TEACHER),
    "dense": (*_ENCODING, *_TEACHER),
    "bank-snapshot": _STUDENT,
    "prune-steps": _STUDENT,
    "best": _STUDENT,
}
MADE_ANEW = frozenset().union(*STAGES.values())
"""The options that may change, at the price of the stages that depend on them."""


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
    """An output folder that this process alone writes to. `earlier` lists seconds of finished work that it found;
    `held` is (device, inode) of the lock file, None where nothing is locked."""

    out: Path
    flag: StopFlag
    started: float = field(default_factory=time.monotonic)
    earlier: list[float] = field(default_factory=list)
    held: tuple[int, int] | None = None

    @property
    def work(self) -> Path:
        """Folder of the resumable state."""
        return self.out / "work"

    def check(self) -> None:
        """Raise `RunFailed` when OUT is not the folder any more that this process locked; call before each write."""
        if self.held is not None and _identity(self.work / LOCK) != self.held:
            raise RunFailed(
                f"{self.out} was removed or replaced while this run was writing to it",
                "put it back and run the same command again, or choose another folder with -o",
            )


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None when it is not there."""
    try:
        found = path.stat(follow_symlinks=False)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a run is bound to: the sha256 of each of its inputs by name, and the versions and the device it ran with."""

    fingerprints: dict[str, str]
    versions: dict[str, str]
    device: str = ""

    @property
    def record(self) -> dict[str, Any]:
        """As it stands in config.json and in the report."""
        return {"fingerprints": self.fingerprints, "versions": self.versions, "device": self.device}


# Finished runs and the beginning of others ---------------------------------------------------------------------------


def finished_report(config: PruneConfig) -> dict[str, Any] | None:
    """The report of a finished run of this configuration, or None.

    Raises `ConfigError` when OUT holds another one, `FileError` when its files are not what was written.
    """
    path = config.out_folder / REPORT
    if not path.exists():
        return None
    report = _record(path)
    if report.get("status") != "complete":
        raise FileError(f"{path} is not a report of a finished run", ANEW)
    if changed := differences(flatten(config), report["config"]):
        raise _another(config.out_folder, list(changed.values()))
    _check_artefact(config.out_folder, report)
    return report


def _record(path: Path) -> dict[str, Any]:
    """A JSON object with the configuration of a run. Raises `FileError`."""
    try:
        found = files.read_json(path)
    except FileError as error:
        raise FileError(error.message, error.hint or ANEW) from error
    if not isinstance(found, dict) or not isinstance(found.get("config"), dict):
        raise FileError(f"{path} holds no configuration of a run", ANEW)
    return found


def _check_artefact(out: Path, report: Mapping[str, Any]) -> None:
    """Raise `FileError` unless the files of a finished run have the bytes that its report names."""
    listed = report.get("files")
    for name, about in (listed if isinstance(listed, dict) else {}).items():
        path = out / Path(name).name
        try:
            same = isinstance(about, dict) and files.sha256(path) == about.get("sha256")
        except OSError:
            same = False
        if not same:
            raise FileError(f"{path} is not what the finished run wrote there: changed, damaged or missing", ANEW)


def check_stopped(run: Run, bound: Bound) -> list[str]:
    """See `check_inputs`, of the stopped run in OUT, if there is one."""
    stored = run.work / CONFIG
    return check_inputs(run.out, bound, _record(stored)) if stored.exists() else []


def check_inputs(out: Path, bound: Bound, record: Mapping[str, Any]) -> list[str]:
    """Compare what a run is about to read with what it was bound to; returns a note for other versions or devices.

    Raises `ConfigError` naming the inputs that changed.
    """
    stored = record.get("fingerprints")
    stored = stored if isinstance(stored, dict) else {}
    ours = bound.fingerprints
    if changed := [name for name in {**ours, **stored} if ours.get(name) != stored.get(name)]:
        raise ConfigError(
            f"the inputs of the run in {out} have changed: {_listed(changed)}",
            "restore them, choose another folder with -o, or start anew with --overwrite",
        )
    before = record.get("versions")
    theirs = {**before, "device": record.get("device")} if isinstance(before, dict) else {}
    now = {**bound.versions, "device": bound.device or theirs.get("device")}
    moved = [f"{name} {theirs.get(name)}, now {value}" for name, value in now.items() if theirs.get(name) != value]
    return [f"begun with {'; '.join(moved)}: the result may differ from that of one environment"] if moved else []


def _listed(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _another(out: Path, changed: list[str]) -> ConfigError:
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ConfigError(f"{out} holds a run with another configuration: {'; '.join(changed[:3])}{more}", ANEW)


@contextlib.contextmanager
def open_run(config: PruneConfig, flag: StopFlag, *, overwrite: bool = False) -> Iterator[Run]:
    """Lock OUT and check that what lies there belongs to this configuration, or may be overwritten by `begin`.

    When it fails before anything of the run is kept, it leaves no folder behind that was not there; stopped, it does.

    Raises `ConfigError` for the folder of another run or process, `FileError` for an unwritable or foreign folder.
    """
    run = Run(out=config.out_folder, flag=flag)
    _refuse_foreign(run)
    files.check_no_links(run.work)
    made = [folder for folder in (run.work, *run.work.parents) if not folder.exists()]
    lock = FileLock(run.work / LOCK)
    begun = False
    try:
        files.check_writable(run.work)
        _acquire(lock, run)
        run = replace(run, held=_identity(run.work / LOCK))
        begun = (run.work / CONFIG).exists()
        if not overwrite:
            _refuse_other(config, run)
        yield run
    except Exception as error:
        if not isinstance(error, Stopped) and not isinstance(error.__cause__, Timeout):
            refused = isinstance(error, CapError) and error.exit_code == CapError.exit_code
            _leave(run, made, forget=refused and not begun)
        raise
    finally:
        with contextlib.suppress(OSError):
            lock.release()


def _acquire(lock: FileLock, run: Run) -> None:
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


def _refuse_other(config: PruneConfig, run: Run) -> None:
    """Raise unless OUT is empty or holds a run that this configuration may continue."""
    stored = run.work / CONFIG
    if stored.exists():
        found = differences(flatten(config), _record(stored)["config"])
        if changed := [words for name, words in found.items() if name not in MADE_ANEW]:
            raise _another(run.out, changed)
    elif (run.out / REPORT).exists():
        return
    elif stages := [path for path in run.work.iterdir() if not _is_scratch(path)]:
        raise FileError(f"{min(stages)} is of a run without its {CONFIG}", ANEW)
    elif (run.out / "cap_config.json").exists():
        raise FileError(f"{run.out} holds a pruned model without the report of its run", ANEW)


def begin(run: Run, config: PruneConfig, bound: Bound, *, overwrite: bool = False) -> list[str]:
    """Note in OUT what identifies the run, the first thing that it writes, once its model and data are known to load.

    Of a stopped run the stages that depend on changed options are removed. Returns notes that say so.
    """
    run.check()
    stored, notes = run.work / CONFIG, list[str]()
    if overwrite:
        clear(run)
    elif stored.exists():
        notes = _remove_dependent(run, differences(flatten(config), _record(stored)["config"]))
    _remove_scratch(run)
    files.write_json(stored, {"config": flatten(config), **bound.record})
    return notes


def _remove_dependent(run: Run, changed: Mapping[str, str]) -> list[str]:
    """Remove the stages that depend on the options that have `changed`; returns a note about it."""
    if not changed:
        return []
    kept = kept_stages(run, changed)
    anew = [name for name in stages_of(run) if name not in kept]
    for path in run.work.iterdir():
        if _kind(path.name) in anew:
            files.remove(path)
    parts = ["; ".join(changed.values())]
    parts += [f"kept: {', '.join(kept)}"] if kept else []
    parts += [f"made anew: {', '.join(anew)}"] if anew else []
    return ["; ".join(parts)]


def stages_of(run: Run) -> list[str]:
    """The kinds of stages that are in the work folder."""
    there = {_kind(path.name) for path in run.work.iterdir()} if run.work.is_dir() else set()
    return [name for name in STAGES if name in there]


def kept_stages(run: Run, changed: Iterable[str]) -> list[str]:
    """The kinds of stages in the work folder that would stay if these options changed."""
    return [name for name in stages_of(run) if not {*changed} & {*STAGES[name]}]


def _kind(name: str) -> str:
    """The kind of a stage by the name of its folder."""
    return re.sub(r"-\d+$", "", name)


def _refuse_foreign(run: Run) -> None:
    """Never write among files that are not ours, nor through a link."""
    out = run.out
    if out.exists() and not out.is_dir():
        raise FileError(f"{out} is a file, not a folder", "choose another folder with -o")
    if run.work.is_symlink() or (run.work.exists() and not run.work.is_dir()):
        raise FileError(f"{run.work} is a link or a file, not a folder", "choose another folder with -o")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if (out / EXPORT).exists():
        raise FileError(f"{out} was written by cap export", "choose another folder with -o")
    ours = [out / "cap_config.json", run.work / CONFIG, run.work / LOCK]
    if not (any(path.exists() for path in ours) or _is_failed_start(run)):
        raise FileError(f"{out} is not empty and was not written by cap", "choose another folder with -o")


def _is_failed_start(run: Run) -> bool:
    """Whether OUT holds nothing but what is there before the lock is taken: a work folder without a file of anyone."""
    return [path.name for path in run.out.iterdir()] == [run.work.name] and all(map(_is_scratch, run.work.iterdir()))


def _is_scratch(path: Path) -> bool:
    """Whether a file in the work folder is a lock, a test for writing, or something that was not finished."""
    return path.name == LOCK or re.fullmatch(r"\.(cap_write_test.*|.+\.part.*)", path.name) is not None


def _remove_scratch(run: Run) -> None:
    """Remove what a killed process was still writing."""
    parts = [path for path in run.work.rglob(".*") if path.name != LOCK and _is_scratch(path)]
    starts = tuple(f".{name}." for name in OURS)
    parts += [path for path in run.out.glob(".*.part*") if path.name.startswith(starts)]
    for path in parts:
        files.remove(path)


def _leave(run: Run, made: list[Path], *, forget: bool) -> None:
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


def clear(run: Run) -> None:
    """Remove what an earlier run wrote, nothing else: first the report, or a half-removed run would look complete, and
    last what identifies the run, or its stages could be taken for those of another."""
    for name in OURS:
        files.remove(run.out / name)
    for path in run.work.iterdir():
        if path.name not in (LOCK, CONFIG):
            files.remove(path)
    files.remove(run.work / CONFIG)


def clear_artefact(run: Run) -> None:
    """Remove what may lie where the artefact will be written, such as tokenizer files of another model."""
    run.check()
    for name in OURS:
        files.remove(run.out / name)


def finish(run: Run, keep_work: bool) -> None:
    """Remove the work folder of a complete run."""
    run.check()
    if not keep_work:
        shutil.rmtree(run.work, ignore_errors=True)


def tidy(config: PruneConfig, report: Mapping[str, Any]) -> None:
    """Remove what was left of the work folder of a finished run, unless another process holds it."""
    run = Run(out=config.out_folder, flag=StopFlag())
    if not run.work.is_dir() or run.work.is_symlink() or report["config"].get("keep_work"):
        return
    lock = FileLock(run.work / LOCK)
    with contextlib.suppress(CapError):
        _acquire(lock, run)
        finish(run, keep_work=False)
        lock.release()


# Stages --------------------------------------------------------------------------------------------------------------


def origin(config: PruneConfig, bound: Bound, name: str, teacher: str = "") -> dict[str, Any]:
    """What the stage `name` depends on: its name, the inputs, the options that matter to it, and `teacher`, the sha256
    of the teacher's weights where it learns from them."""
    others = (MADE_ANEW - {*STAGES[_kind(name)]}) | free_options()
    options = {name: value for name, value in flatten(config).items() if name not in others}
    return {"stage": name, "inputs": bound.fingerprints, "options": options, "teacher": teacher}


def found_stage(run: Run, of: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """stage.json of the published stage that is `of` these things; None when there is none, and why, if something is
    there that cannot be used."""
    folder = run.work / of["stage"]
    if not folder.exists():
        return None, ""
    if not files.is_complete(folder):
        return None, f"{folder} is damaged"
    stage = files.read_json(folder / STAGE) if (folder / STAGE).is_file() else {}
    if stage.get("of") != of:
        return None, f"{folder} was not made for this: {_mismatch(stage.get('of'), of)}"
    return dict(stage), ""


def _mismatch(theirs: Any, ours: Mapping[str, Any]) -> str:
    """In what a stage is another one than was looked for."""
    theirs = theirs if isinstance(theirs, dict) else {}
    if theirs.get("stage") != ours["stage"]:
        return f"it holds {theirs.get('stage') or 'something unknown'}"
    parts = [name for part in ("inputs", "options") for name in _unequal(theirs.get(part), ours[part])]
    return f"another {_listed(parts or ['teacher'])}"


def _unequal(theirs: Any, ours: Mapping[str, Any]) -> list[str]:
    theirs = theirs if isinstance(theirs, dict) else {}
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]


# Checkpoints ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a training phase after `step` steps: tensors, and scalars as JSON."""

    step: int
    tensors: dict[str, Tensor]
    scalars: dict[str, Any]


def save_checkpoint(run: Run, of: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Publish a checkpoint of a phase, then drop all but the newest `KEEP_CHECKPOINTS`."""
    run.check()
    folder, name = run.work / of["stage"], f"step-{checkpoint.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    with files.publish(folder / name) as staging:
        files.write_tensors(staging / "state.safetensors", checkpoint.tensors)
        files.write_json(staging / "state.json", {"step": checkpoint.step, **checkpoint.scalars})
        files.write_json(staging / STAGE, {"of": _numbered(of, name)})
    for old in _checkpoints(folder)[KEEP_CHECKPOINTS:]:
        files.remove(old)


def load_checkpoint(run: Run, of: Mapping[str, Any]) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a phase that verifies, and a warning for each newer one that does not; it is removed."""
    warnings: list[str] = []
    for folder in _checkpoints(run.work / of["stage"]):
        stage, why = found_stage(run, _numbered(of, folder.name))
        if stage is not None:
            scalars = files.read_json(folder / "state.json")
            tensors = files.read_tensors(folder / "state.safetensors")
            return Checkpoint(step=int(scalars["step"]), tensors=tensors, scalars=scalars), warnings
        warnings.append(f"checkpoint {why}, going back to the one before")
        files.remove(folder)
    return None, warnings


def _numbered(of: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**of, "stage": f"{of['stage']}/{name}"}


def drop_checkpoints(run: Run, phase: str, after: int) -> None:
    """Remove the checkpoints of steps beyond `after`, because something that they rest on is damaged."""
    for folder in _checkpoints(run.work / phase):
        if folder.name > f"step-{after:08d}":
            files.remove(folder)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


# The process ---------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"cap": importlib.metadata.version("capcli"), "python": platform.python_version(), **found}


def peak_bytes() -> int | None:
    """Peak resident memory of this process; None where the system does not tell.

    Not by `getrusage`, whose number begins with the peak of the parent.
    """
    try:
        status = Path("/proc/self/status").read_text("ascii", errors="replace")
    except OSError:
        return _peak_of_usage()
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), None)


def _peak_of_usage() -> int | None:
    """The same where there is no /proc: by `getrusage`, which is in bytes on macOS."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
