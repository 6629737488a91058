"""What is done to a run to see that it survives: kills, signals, failing disks, damaged files, a second process.

Each trial puts one run below a folder of its own through it, and raises `AssertionError` unless the run then comes to
the same as one that was left alone. The tests take a sample of the trials, `soak.py` takes them by the hundred.

"Same" is: bytes of the weights, metrics and history of losses equal to those of the uninterrupted run. Kills happen in
forks of this process, which has torch loaded; a killed fork cleans nothing up, as a killed `cap` would not.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from tiny import Tiny, forked, invoke, outcome, wait

import capcli
from capcli import files, stages
from capcli.data import tokens
from capcli.errors import CapError, RunFailed, Stopped
from capcli.events import StopFlag
from capcli.measuring import scoring
from capcli.pruning import banks, record, train
from capcli.pruning.pruner import Pruner
from capcli.verbs import prune as verb

# 3 + 9 steps with snapshots, a checkpoint after each, about half a second of work and 260 file operations.
SMALL: dict[str, Any] = {
    "epochs": 3,
    "teacher_epochs": 1,
    "max_train_samples": 48,
    "max_eval_samples": 16,
    "checkpoint_seconds": 0,
}
STEPS = 9  # of the pruning
# Other runs, with state of their own: importance, what is alive, projections and moments, calibrated weights, scores.
HIDDEN = {"losses": "ce,kd,snc,hid"}
OTHERS: dict[str, dict[str, Any]] = {
    "cap-m, hidden states": {"method": "cap-m", **HIDDEN},
    "cap-f": {"method": "cap-f", "sparsity": 0.5, "importance_examples": 40, "lr_schedule": "cycle"},
    "cap-f, dimensions, hidden states": {"method": "cap-f", "structure": "dimensions", **HIDDEN},
    "cap-fisher": {"method": "cap-fisher", "sparsity": 0.95},
    "fisher, regrowing": {"method": "fisher", "sparsity": 0.95, "regrow": True},
    "fisher, 2:4": {"method": "fisher", "structure": "2:4", "sparsity": 0.5},
    "magnitude, blocks of 4": {"method": "magnitude", "structure": "4x1"},
    "obert": {"method": "obert", "sparsity": 0.9, "selections": 2},
    "structured, half of the MACs": {"method": "structured", "target": "macs=0.5", "sparsity": None},
    "first-order, turned heads": {"method": "first-order", "structure": "dimensions", "basis": "pca"},
    "smp": {"method": "smp", "sparsity": 0.5, "scope": "type", "train_head": True},
    "pins": {"method": "pins"},
    "platon": {"method": "platon"},
    "sparsegpt, healed": {"method": "sparsegpt", "heal": 6, "epochs": 0},
}
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
FAULTS = ("ENOSPC", "EIO", "EROFS")


class Whole(NamedTuple):
    """The uninterrupted run: its outcome, how many file operations it takes, how often it is in each of `PHASES`."""

    outcome: Any
    operations: int
    calls: dict[str, int]


def uninterrupted(tiny: Tiny, out: Path) -> Whole:
    """Run to the end and count."""
    seen = [0]

    def count(operation: str, path: Path) -> None:
        seen[0] += 1

    calls = dict.fromkeys(PHASES, 0)
    restore = [watched(name, functools.partial(_add, calls, name)) for name in PHASES]
    files.fault_hook = count
    try:
        tiny.prune(out, **SMALL)
    finally:
        files.fault_hook = None
        for undo in reversed(restore):
            undo()
    return Whole(outcome(out), seen[0], calls)


def _add(calls: dict[str, int], name: str) -> None:
    calls[name] += 1


def at(n: int, action: Callable[[str, Path], None], times: int = 1) -> Callable[[str, Path], None]:
    """A fault hook that acts at the file operations n to n + times - 1, counted from 1."""
    seen = [0]

    def hook(operation: str, path: Path) -> None:
        seen[0] += 1
        if n <= seen[0] < n + times:
            action(operation, path)

    return hook


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(tiny: Tiny, out: Path, n: int, *switches: str, **chosen: Any) -> bool:
    """Run in a fork that is killed at its n-th file operation; False when it came to its end before."""

    def action() -> None:
        files.fault_hook = at(n, die)
        capcli.prune(tiny.prune_config(out, **{**SMALL, **chosen}), overwrite="--overwrite" in switches)

    code = wait(forked(action))
    assert code in (0, -signal.SIGKILL)
    return code != 0


def stopped_at(tiny: Tiny, out: Path, phase: str, done: int) -> None:
    """Run until event `done` of `phase`, and stop there with a checkpoint."""
    flag = StopFlag()
    try:
        for event in verb.prune(tiny.prune_config(out, **SMALL), flag=flag):
            if event.phase == phase and event.done >= done:
                flag.reason = "the test"
    except Stopped:
        return
    raise AssertionError("the run was not stopped")


def finish(tiny: Tiny, out: Path, **chosen: Any) -> list[str]:
    """Run to the end; returns the notes of the events."""
    return [event.note for event in verb.prune(tiny.prune_config(out, **{**SMALL, **chosen})) if event.note]


def same_after(tiny: Tiny, out: Path, expected: Any, what: str, **chosen: Any) -> list[str]:
    """The same command again: its outcome is as expected, and nothing temporary is left. Returns the notes."""
    notes = finish(tiny, out, **chosen)
    assert outcome(out) == expected, what
    left = [str(path) for path in out.rglob(".*")]
    assert left == [], f"{what}: {left}"
    return notes


# Kills ---------------------------------------------------------------------------------------------------------------


def kill_at_operation(tiny: Tiny, out: Path, whole: Whole, n: int) -> None:
    """R2: killed at the n-th file operation, counted from 1."""
    assert killed_at(tiny, out, n), f"operation {n} of {whole.operations} was not reached"
    assert not (out / "report.json").exists() or n > whole.operations - 20
    same_after(tiny, out, whole.outcome, f"killed at operation {n} of {whole.operations}")


def kill_at_random(
    tiny: Tiny, out: Path, expected: Any, rng: random.Random, kills: int, within_seconds: float, **chosen: Any
) -> int:
    """R1: kill -9 from outside, several times in one run, wherever it is; returns how many found it alive."""
    alive = 0
    for _ in range(kills):
        pid = forked(lambda: tiny.prune(out, **{**SMALL, **chosen}))
        time.sleep(rng.uniform(0.02, within_seconds))
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        assert code in (0, -signal.SIGKILL)
        alive += code != 0
    same_after(tiny, out, expected, f"killed {alive} times", **chosen)
    return alive


class Place(NamedTuple):
    """A function that a run calls, and which of its calls count."""

    owner: Any
    name: str
    counts: Callable[..., bool] = lambda *_, **__: True


def _phase(name: str) -> Callable[..., bool]:
    return lambda job, *_, **__: job.phase == name


PHASES = {
    "load": Place(verb, "load_student"),
    "tokenise": Place(tokens, "_texts"),
    "teacher": Place(train, "take_step", _phase("teacher")),
    "banks": Place(banks, "save"),
    "train": Place(train, "take_step", _phase("prune")),
    "mask update": Place(Pruner, "update"),
    "save": Place(stages, "save_checkpoint"),
    "rotate": Place(files, "remove", lambda path: path.name.startswith("step-")),
    "eval": Place(scoring, "scored"),
    "report": Place(record, "render_card"),
}


def watched(phase: str, before: Callable[[], None], after: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """See to it that functions are called around each call of a phase; returns what ends that."""
    place = PHASES[phase]
    whole = getattr(place.owner, place.name)

    @functools.wraps(whole)
    def call(*arguments: Any, **named: Any) -> Any:
        if not place.counts(*arguments, **named):
            return whole(*arguments, **named)
        before()
        found = whole(*arguments, **named)
        after()
        return found

    setattr(place.owner, place.name, call)
    return functools.partial(setattr, place.owner, place.name, whole)


def kill_in_phase(tiny: Tiny, out: Path, whole: Whole, phase: str, rng: random.Random) -> None:
    """R3: killed before or after one of the calls of a phase."""
    n, seen, late = rng.randint(1, whole.calls[phase]), [0], rng.random() < 0.5

    def counted() -> None:
        seen[0] += 1
        if seen[0] == n and not late:
            die()

    def action() -> None:
        watched(phase, counted, lambda: die() if seen[0] == n else None)
        tiny.prune(out, **SMALL)

    what = f"killed {'after' if late else 'before'} call {n} of {whole.calls[phase]} of {phase}"
    assert wait(forked(action)) == -signal.SIGKILL, what
    same_after(tiny, out, whole.outcome, what)


# Signals, disks ------------------------------------------------------------------------------------------------------


def stop_by_signal(tiny: Tiny, out: Path, whole: Whole, name: str, n: int) -> None:
    """R4: a signal at the n-th file operation: exit 75 after a step and a save, in whichever phase, then the same."""
    before = signal.getsignal(getattr(signal, name))
    files.fault_hook = at(n, lambda *_: os.kill(os.getpid(), getattr(signal, name)))
    try:
        result = invoke(*tiny.arguments(out, **SMALL))
    finally:
        files.fault_hook = None
    assert result.exit_code == 75, result.stderr
    assert f"stopped by {name}" in result.stderr
    assert result.stdout == ""
    assert signal.getsignal(getattr(signal, name)) == before
    same_after(tiny, out, whole.outcome, f"{name} at operation {n}")


def fail_at_operation(tiny: Tiny, out: Path, whole: Whole, n: int, code: str) -> None:
    """R5: the disk fails at the n-th file operation and goes on failing: exit 3 and a path; when it works again, the
    same."""
    number, what = getattr(errno, code), f"{code} from operation {n} of {whole.operations} on"

    def fail(operation: str, path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    files.fault_hook = at(n, fail, times=10**9)
    try:
        tiny.prune(out, **SMALL)
    except CapError as error:
        assert (type(error), error.exit_code) == (RunFailed, 3), f"{what}: {error}"
        assert str(out) in error.message, f"{what}: {error}"
        assert error.hint, what
    else:
        raise AssertionError(f"{what}: the run did not fail")
    finally:
        files.fault_hook = None
    check_newest_checkpoint(out)
    same_after(tiny, out, whole.outcome, what)


def check_newest_checkpoint(out: Path) -> None:
    """Whatever was published verifies, and holds only finite numbers."""
    for folder in sorted((out / "work").glob("*-steps/step-*")):
        assert files.is_complete(folder), folder
        assert all(bool(t.isfinite().all()) for t in load_file(folder / "state.safetensors").values())


# Damaged files -------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    flip_bit(path, path.stat().st_size * 2 // 3, 2)


def flip_high(path: Path) -> None:
    """The top bit, which makes a text no UTF-8 any more."""
    flip_bit(path, path.stat().st_size // 2, 7)


def flip_bit(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(bytes(data))


def swap(path: Path) -> None:
    """Put the file of the older checkpoint in place, or any other file."""
    older = [p for p in sorted(path.parent.parent.glob(f"*/{path.name}")) if p != path]
    shutil.copy(older[0] if older else path.parent / files.MANIFEST, path)


DAMAGES = (truncate, empty, flip, flip_high, swap, Path.unlink)


def stopped_run(tiny: Tiny, out: Path) -> None:
    """A run that was stopped in the last third of the pruning, with everything in its work folder."""
    stopped_at(tiny, out, "prune", 7)
    names = {path.name for path in (out / "work").iterdir()}
    assert {"bank-pretrained", "bank-finetuned", "bank-snapshot-000", "dense", "prune-steps", "teacher"} <= names
    assert len(list((out / "work" / "prune-steps").iterdir())) == 2


def damage_at_random(tiny: Tiny, out: Path, stopped: Path, whole: Whole, rng: random.Random) -> None:
    """R6: one file of a stopped run is damaged, one bit in two times of three: it is noticed, said, and not used."""
    shutil.copytree(stopped, out)
    older = min((out / "work" / "prune-steps").iterdir())
    unread = (older, out / "work")
    path = rng.choice(
        sorted(path for path in (out / "work").rglob("*") if path.is_file() and path.parent not in unread)
    )
    if rng.random() < 2 / 3:
        place, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
        what = f"bit {bit} of byte {place} of {path.relative_to(out)}"
        flip_bit(path, place, bit)
    else:
        damage = rng.choice(DAMAGES)
        what = f"{damage.__name__} of {path.relative_to(out)}"
        damage(path)
    notes = same_after(tiny, out, whole.outcome, what)
    folder = path.parent
    assert [note for note in notes if str(folder) in note and "is damaged" in note], f"{what}: {notes}"


# Two processes -------------------------------------------------------------------------------------------------------


def lock_out(tiny: Tiny, out: Path, whole: Whole, n: int) -> float:
    """R7: while a run stands still at its n-th file operation a second one is refused; killed, it leaves no lock.

    Returns the seconds of computing that a refusal took.
    """
    reading, writing = os.pipe()

    def action() -> None:
        def hold(operation: str, path: Path) -> None:
            os.write(writing, b"x")
            signal.pause()

        files.fault_hook = at(n, hold)
        tiny.prune(out, **SMALL)

    first = forked(action)
    try:
        assert os.read(reading, 1) == b"x"
        before = sorted(path for path in out.rglob("*"))
        began = time.process_time()
        for more in ((), ("--overwrite",)):
            result = invoke(*tiny.arguments(out, **SMALL), *more)
            assert result.exit_code == 2, f"operation {n}: {result.stderr}"
            assert "another process is writing to" in result.stderr
        seconds = (time.process_time() - began) / 2
        assert sorted(path for path in out.rglob("*")) == before
    finally:
        os.kill(first, signal.SIGKILL)
        wait(first)
        os.close(reading)
        os.close(writing)
    same_after(tiny, out, whole.outcome, f"killed at operation {n}, with its lock")
    return seconds
