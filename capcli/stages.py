"""The stages of a run, and what each was made from.

OUT/work/ holds what a stopped run needs to continue: the teacher, the banks, the dense metrics, the best state, and for
each training phase the last two checkpoints. A stage is a folder that was published in one rename, see `files.publish`;
its stage.json says what it was made from. `STAGES` is the one list of them. Those that the student has no part in can
lie in a folder that several runs share.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capcli import files, parallel
from capcli.config.layers import free_options
from capcli.config.options import flatten
from capcli.config.prune import PruneConfig
from capcli.errors import ConfigError, RunFailed
from capcli.events import StopFlag
from capcli.reporting.text import first_few
from capcli.stored import read_json, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

REPORT, CONFIG, LOCK, STAGE = "report.json", "config.json", ".lock", "stage.json"
KEEP_CHECKPOINTS = 2
ANEW = "choose another folder with -o, or start over with --overwrite"

# The options that may change when a stopped run is continued, by the stages that depend on them. A teacher that is
# finished stays what it is when the size of the steps changes; one that is still in training starts anew.
_ENCODING, _STEPS, _TEACHER = (
    ("precision",),
    ("batch_size", "weight_decay", "lr_warmup"),
    ("teacher_lr", "teacher_epochs", "lr_scale"),
)
_STUDENT = (
    *(*_ENCODING, *_STEPS, *_TEACHER, "losses", "epochs", "lr", "score_lr", "init", "dense_share", "final_share"),
    *("initial_sparsity", "update_every", "lr_schedule", "stairs", "calibration", "refit", "heal", "text"),
    *("fisher_block", "selections", "refit_target", "importance_examples", "floor", "kd_scale", "basis", "train_head"),
    *("scope", "score_init", "tau", "extra_examples", "normalization", "unsupervised_weight", "supervised_weight"),
    *("ce_weight", "kd_weight", "kd_temperature", "hidden_weight", "reg_weight", "regrow"),
)
STAGES = {
    "bank-pretrained": _ENCODING,
    "teacher-steps": (*_ENCODING, *_STEPS, *_TEACHER),
    "teacher": _TEACHER,
    "bank-finetuned": (*_ENCODING, *_TEACHER),
    "dense": (*_ENCODING, *_TEACHER),
    "speeds": (),
    "bank-snapshot": _STUDENT,
    "prune-steps": _STUDENT,
    "best": _STUDENT,
}
MADE_ANEW = frozenset().union(*STAGES.values())
SHARED = ("bank-pretrained", "teacher-steps", "teacher", "bank-finetuned", "dense")
# What these do not depend on, of the options that must stay.
_OF_STUDENT = ("sparsity", "target", "method", "structure", "store", "mask_from")


@dataclass(kw_only=True)
class RunFolder:
    """An output folder that this process alone writes to. `out` is as the user named it, from `home` on, the folder
    that was the current one. `earlier` lists seconds of finished work that it found; `held` is (device, inode) of the
    lock file, None where nothing is locked. `shared`: where the stages of `SHARED` lie that other runs use as well;
    None in a run by itself, which keeps them."""

    out: Path
    flag: StopFlag
    shared: Path | None = None
    home: Path = field(default_factory=Path.cwd)
    started: float = field(default_factory=time.monotonic)
    earlier: list[float] = field(default_factory=list)
    held: tuple[int, int] | None = None

    @property
    def root(self) -> Path:
        """OUT, whatever the current folder is by now."""
        return self.home / self.out

    @property
    def work(self) -> Path:
        """Folder of the resumable state."""
        return self.root / "work"

    def shares(self, stage: str) -> bool:
        """Whether a stage, or a checkpoint of it, lies where other runs use it as well."""
        return self.shared is not None and _kind(stage.partition("/")[0]) in SHARED

    def place(self, stage: str) -> Path:
        """The folder of a stage."""
        return (self.shared if self.shared and self.shares(stage) else self.work) / stage

    def check(self) -> None:
        """Raise `RunFailed` when OUT is not the folder any more that this process locked; call before each write."""
        if self.held is not None and identity_of(self.work / LOCK) != self.held:
            raise RunFailed(
                f"{self.out} was removed or replaced while this run was writing to it",
                "put it back and run the same command again, or choose another folder with -o",
            )


def identity_of(path: Path) -> tuple[int, int] | None:
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


def another_run(out: Path, changed: list[str]) -> ConfigError:
    """The error when OUT holds another run: what has changed, and the way out."""
    return ConfigError(f"{out} holds a run with another configuration: {first_few(changed, 3, '; ')}", ANEW)


def remove_dependent(run: RunFolder, changed: Mapping[str, str]) -> list[str]:
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
    parts += [f"redone: {', '.join(anew)}"] if anew else []
    return ["; ".join(parts)]


def stages_of(run: RunFolder) -> list[str]:
    """The kinds of stages that are in the work folder."""
    there = {_kind(path.name) for path in run.work.iterdir()} if run.work.is_dir() else set()
    return [name for name in STAGES if name in there]


def kept_stages(run: RunFolder, changed: Iterable[str]) -> list[str]:
    """The kinds of stages in the work folder that would stay if these options changed."""
    return [name for name in stages_of(run) if not {*changed} & {*STAGES[name]}]


def _kind(name: str) -> str:
    """The kind of a stage by the name of its folder."""
    return re.sub(r"-\d+$", "", name)


# Stages --------------------------------------------------------------------------------------------------------------


def origin(config: PruneConfig, bound: Bound, name: str, teacher: str = "", *, shared: bool = False) -> dict[str, Any]:
    """What the stage `name` depends on: its name, the inputs, the options that matter to it, and `teacher`, the sha256
    of the teacher's weights where it learns from them. Of a `shared` stage not what only the student depends on."""
    others = (MADE_ANEW - {*STAGES[_kind(name)]}) | free_options() | {*(_OF_STUDENT if shared else ())}
    options = {name: value for name, value in flatten(config).items() if name not in others}
    return {"stage": name, "inputs": bound.fingerprints, "options": options, "teacher": teacher}


def publish(run: RunFolder, stage: str, write: Callable[[Path], object]) -> None:
    """Publish a stage, or a checkpoint of one, with what `write` puts into its folder: by rank 0. Common to all ranks,
    which find it there afterwards."""
    if parallel.first():
        run.check()
        with files.publish(run.place(stage)) as staging:
            write(staging)
    parallel.wait()


def remove(path: Path) -> None:
    """Remove what belongs to a stage, if it is there: by rank 0."""
    if parallel.first():
        files.remove(path)


def found_stage(run: RunFolder, of: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """stage.json of the published stage that is `of` these things; None when there is none, and why, if something is
    there that cannot be used. Common to all ranks."""
    stage, why = parallel.by_first(lambda: _found(run, of))
    return stage, why


def _found(run: RunFolder, of: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    folder = run.place(of["stage"])
    if not folder.exists():
        return None, ""
    if not files.is_complete(folder):
        return None, f"{folder} is damaged"
    stage = read_json(folder / STAGE) if (folder / STAGE).is_file() else {}
    if stage.get("of") != of:
        return None, f"{folder} was not made for this: {_mismatch(stage.get('of'), of)}"
    return dict(stage), ""


def _mismatch(theirs: Any, ours: Mapping[str, Any]) -> str:
    """In what a stage is another one than was looked for."""
    theirs = theirs if isinstance(theirs, dict) else {}
    if theirs.get("stage") != ours["stage"]:
        return f"it holds {theirs.get('stage') or 'something unknown'}"
    parts = [name for part in ("inputs", "options") for name in _unequal(theirs.get(part), ours[part])]
    return f"another {first_few(parts or ['teacher'], 4)}"


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


def save_checkpoint(run: RunFolder, of: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Publish a checkpoint of a phase, then drop all but the newest `KEEP_CHECKPOINTS`. Common to all ranks."""
    folder, name = run.place(of["stage"]), f"step-{checkpoint.step:08d}"

    def write(staging: Path) -> None:
        files.write_tensors(staging / "state.safetensors", checkpoint.tensors)
        files.write_json(staging / "state.json", {"step": checkpoint.step, **checkpoint.scalars})
        files.write_json(staging / STAGE, {"of": _numbered(of, name)})

    publish(run, f"{of['stage']}/{name}", write)
    for old in _checkpoints(folder)[KEEP_CHECKPOINTS:]:
        remove(old)


def load_checkpoint(run: RunFolder, of: Mapping[str, Any]) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a phase that verifies, and a warning for each newer one that does not; it is removed.
    Common to all ranks."""
    name, warnings = parallel.by_first(lambda: _newest(run, of))
    if not name:
        return None, warnings
    folder = run.place(of["stage"]) / name
    scalars = read_json(folder / "state.json")
    tensors = read_tensors(folder / "state.safetensors")
    return Checkpoint(step=int(scalars["step"]), tensors=tensors, scalars=scalars), warnings


def _newest(run: RunFolder, of: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The name of the newest checkpoint that verifies, empty if there is none, and the warnings."""
    warnings: list[str] = []
    for folder in _checkpoints(run.place(of["stage"])):
        stage, why = _found(run, _numbered(of, folder.name))
        if stage is not None:
            return folder.name, warnings
        warnings.append(f"checkpoint {why}; using the one before it")
        files.remove(folder)
    return "", warnings


def _numbered(of: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**of, "stage": f"{of['stage']}/{name}"}


def drop_checkpoints(run: RunFolder, phase: str, after: int) -> None:
    """Remove the checkpoints of steps beyond `after`, because something that they rest on is damaged."""
    for folder in _checkpoints(run.place(phase)):
        if folder.name > f"step-{after:08d}":
            remove(folder)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the newest first."""
    return sorted(folder.glob("step-*"), reverse=True)
