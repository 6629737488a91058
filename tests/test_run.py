"""What a run survives: kills, signals, full disks, damaged files, a second process, numbers that are not finite.

What is done to it, and what "the same" is, says `survival.py`.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from survival import (
    DAMAGES,
    FAULTS,
    OTHERS,
    PHASES,
    SIGNALS,
    SMALL,
    Whole,
    at,
    check_newest_checkpoint,
    damage_at_random,
    fail_at_operation,
    finish,
    flip,
    flip_high,
    kill_at_operation,
    kill_at_random,
    kill_in_phase,
    killed_at,
    lock_out,
    stop_by_signal,
    stopped_at,
    stopped_run,
    truncate,
    uninterrupted,
)
from tiny import WEIGHTS, Tiny, digest, environment, forked, invoke, outcome, wait, write_model

from capcli import files, machine, run
from capcli.data import tokens
from capcli.errors import RunFailed, Stopped
from capcli.events import StopFlag
from capcli.pruning.pruner import Pruner
from capcli.stored import read_json


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The uninterrupted run."""
    return uninterrupted(tiny, tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture(autouse=True)
def no_hook() -> Iterator[None]:
    yield
    files.fault_hook = None


# Kills ---------------------------------------------------------------------------------------------------------------

POINTS = 24


@pytest.mark.parametrize("part", [0, 1, *(pytest.param(part, marks=pytest.mark.rare) for part in range(2, 8))])
def test_killed_at_a_file_operation(tiny: Tiny, tmp_path: Path, whole: Whole, part: int) -> None:
    """R2, thinned to POINTS of all operations; the same command again gives the same."""
    points = sorted(random.Random(2).sample(range(1, whole.operations + 1), POINTS))
    for n in points[part::8]:
        out = tmp_path / str(n)
        kill_at_operation(tiny, out, whole, n)
        shutil.rmtree(out)


@pytest.mark.rare
def test_killed_at_the_last_file_operations(tiny: Tiny, tmp_path: Path, whole: Whole) -> None:
    """R2, where the artefact and the report are written: each operation of the last file and some before."""
    for back in (0, 1, 2, 5, 9):
        kill_at_operation(tiny, tmp_path / str(back), whole, whole.operations - back)


def test_killed_again_and_again(tiny: Tiny, tmp_path: Path, whole: Whole) -> None:
    """Every attempt dies after 70 operations; each gets further than the one before."""
    attempts = 1
    while killed_at(tiny, tmp_path / "out", 70):
        attempts += 1
        assert attempts < 30, "the run does not get on"
    assert attempts > 3
    assert outcome(tmp_path / "out") == whole.outcome


@pytest.mark.parametrize(
    "name", [name if name.startswith("cap") else pytest.param(name, marks=pytest.mark.rare) for name in OTHERS]
)
def test_killed_with_other_methods(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """Importance, what is alive, scores, calibrated weights, projections and moments are all in a checkpoint."""
    tiny.prune(tmp_path / "whole", **{**SMALL, **OTHERS[name]})
    attempts = 1
    while killed_at(tiny, tmp_path / "out", 45, **OTHERS[name]):
        attempts += 1
        assert attempts < 30, "the run does not get on"
    assert attempts > 3
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("seed", range(10))
def test_killed_at_random_moments(tiny: Tiny, tmp_path: Path, whole: Whole, seed: int) -> None:
    """R1: 50 kills, wherever the runs are."""
    kill_at_random(tiny, tmp_path / "out", whole.outcome, random.Random(seed), kills=5, within_seconds=1.5)


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_each_phase(tiny: Tiny, tmp_path: Path, whole: Whole, phase: str) -> None:
    """R3, twice in each."""
    for seed in range(2):
        kill_in_phase(tiny, tmp_path / str(seed), whole, phase, random.Random(seed))


def test_killed_process_of_cap(tiny: Tiny, tmp_path: Path, whole: Whole) -> None:
    """R1 and R4 on the real program: kill -9 in the teacher, SIGTERM in the pruning, then the same command."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "capcli", *tiny.arguments(out, **SMALL)]
    for name, number, code in (("teacher-steps", signal.SIGKILL, -9), ("prune-steps", signal.SIGTERM, 75)):
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while not (out / "work" / name).is_dir() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        assert printed == ""
    assert "stopped by SIGTERM" in errors
    assert "run the same command again" in errors
    tiny.prune(out, **SMALL)
    assert outcome(out) == whole.outcome


# Signals and time ----------------------------------------------------------------------------------------------------


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    """A run under nohup outlives its terminal."""
    from capcli.events import StopFlag, signals

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        flag = StopFlag()
        with signals(flag):
            os.kill(os.getpid(), signal.SIGHUP)
        assert flag.requested() == ""
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_that_was_ignored_stays_ignored_after_another_signal() -> None:
    """As of a run in the background of a script."""
    from capcli.events import StopFlag, signals

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        flag = StopFlag()
        with signals(flag):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        assert flag.requested() == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("share", [0.03, 0.2, 0.5, 0.7, 0.9])
def test_signals(tiny: Tiny, tmp_path: Path, whole: Whole, name: str, share: float) -> None:
    """R4, in whichever phase."""
    if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        pytest.skip("the tests themselves run with this signal ignored, as under nohup")
    stop_by_signal(tiny, tmp_path / "out", whole, name, int(share * whole.operations))


def test_second_interrupt_ends_at_once(tiny: Tiny, tmp_path: Path, whole: Whole) -> None:
    files.fault_hook = at(whole.operations // 2, lambda *_: os.kill(os.getpid(), signal.SIGINT), times=2)
    result = invoke(*tiny.arguments(tmp_path / "out", **SMALL))
    files.fault_hook = None
    assert result.exit_code == 130
    assert "hint: run the same command again" in result.stderr
    tiny.prune(tmp_path / "out", **SMALL)
    assert outcome(tmp_path / "out") == whole.outcome


def test_max_time(tiny: Tiny, tmp_path: Path, whole: Whole) -> None:
    result = invoke(*tiny.arguments(tmp_path / "out", **SMALL, max_time=0.0001))
    assert result.exit_code == 75
    assert "the time limit" in result.stderr
    tiny.prune(tmp_path / "out", **SMALL)
    assert outcome(tmp_path / "out") == whole.outcome


def test_time_runs_out_in_the_middle(tiny: Tiny, tmp_path: Path, whole: Whole) -> None:
    from capcli.verbs import prune

    flag = StopFlag()
    with pytest.raises(Stopped, match="stopped by the time limit at step 4 of 9"):
        for event in prune.prune(tiny.prune_config(tmp_path / "out", **SMALL), flag=flag):
            if event.phase == "prune" and event.done == 4:
                flag.deadline = 0.0
    finish(tiny, tmp_path / "out")
    assert outcome(tmp_path / "out") == whole.outcome


@pytest.mark.parametrize("kept", [False, True])
def test_a_signal_while_the_texts_are_tokenised(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """R4: exit 75 after the chunk at hand, not after all of the set; also while the tokens are written to the cache."""
    if kept:
        monkeypatch.setattr(tokens, "CACHE_EXAMPLES", 1)
        monkeypatch.setenv("CAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "encode", functools.partial(tokens.encode, chunk=10))
    chunks: list[int] = []
    cut = tokens._texts

    def counted(texts: list[str], *rest: Any) -> Any:
        chunks.append(len(texts))
        if len(chunks) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return cut(texts, *rest)

    monkeypatch.setattr(tokens, "_texts", counted)
    result = invoke(*tiny.arguments(tmp_path / "out", **SMALL))
    assert result.exit_code == 75, result.stderr
    assert "stopped by SIGTERM" in result.stderr
    assert chunks == [10, 10, 10]
    assert not (tmp_path / "out" / "report.json").exists()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_flag_that_is_set_from_the_start(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from capcli.verbs import prune

    chunks: list[int] = []
    cut = tokens._texts
    monkeypatch.setattr(tokens, "_texts", lambda *arguments: chunks.append(1) or cut(*arguments))
    with pytest.raises(Stopped, match="stopped by the test") as caught:
        list(prune.prune(tiny.prune_config(tmp_path / "out", **SMALL), flag=StopFlag(reason="the test")))
    assert caught.value.exit_code == 75
    assert len(chunks) <= 1


# Failing disks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", FAULTS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.06, 0.14, 0.3, 0.55, 0.8, 0.97, 0.99, 1.0])
def test_disk_fails_at_a_file_operation(tiny: Tiny, tmp_path: Path, whole: Whole, code: str, share: float) -> None:
    """R5, thinned."""
    n = max(1, round(share * whole.operations)) + FAULTS.index(code) * (1 if share < 0.9 else -1)
    fail_at_operation(tiny, tmp_path / "out", whole, n, code)


@pytest.mark.parametrize("limit", [100, 3_000, 40_000, 130_000])
def test_file_size_limit(tiny: Tiny, tmp_path: Path, whole: Whole, limit: int) -> None:
    """R5: the system refuses to let a file grow; exit 3 names path and bytes."""
    out = tmp_path / "out"

    def action() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        result = invoke(*tiny.arguments(out, **SMALL))
        Path(tmp_path, "said").write_text(result.stderr[-90:] if limit < 3000 else result.stderr[-2000:])
        sys.exit(result.exit_code)

    assert wait(forked(action)) == 3
    said = (tmp_path / "said").read_text()
    assert "no space left" in said
    if limit > 1000:
        assert f"cannot write {out}" in said
        assert "bytes)" in said
    check_newest_checkpoint(out)
    tiny.prune(out, **SMALL)
    assert outcome(out) == whole.outcome


@pytest.mark.parametrize("size_kb", [60, 200, 500])
def test_full_tmpfs(tiny: Tiny, tmp_path: Path, whole: Whole, size_kb: int) -> None:
    """R5 on a real full file system; after it was made larger, the same."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this process may not mount a tmpfs")
    try:
        with pytest.raises(RunFailed, match="no space left") as caught:
            tiny.prune(disk / "out", **SMALL)
        assert str(disk) in caught.value.message
        check_newest_checkpoint(disk / "out")
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        tiny.prune(disk / "out", **SMALL)
        assert outcome(disk / "out") == whole.outcome
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)  # mapped files may still be open


# Damaged files -------------------------------------------------------------------------------------------------------


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def add(path: Path) -> None:
    path.with_name("left-over").write_bytes(b"?")


@pytest.fixture(scope="module")
def stopped(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in the last third of the pruning, to copy."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    stopped_run(tiny, out)
    return out


def copy_of(stopped: Path, tmp_path: Path) -> Path:
    """A copy under another name; the name of OUT is no part of the configuration of a run."""
    return Path(shutil.copytree(stopped, tmp_path / "out"))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
def test_damaged_checkpoint(
    tiny: Tiny, stopped: Path, tmp_path: Path, whole: Whole, name: str, damage: Callable[[Path], None]
) -> None:
    """R6: the older checkpoint is used, and that is said."""
    out = copy_of(stopped, tmp_path)
    newest = max((out / "work" / "prune-steps").iterdir())
    damage(newest / name)
    notes = finish(tiny, out)
    assert [note for note in notes if f"{newest} is damaged" in note], notes
    assert outcome(out) == whole.outcome


@pytest.mark.parametrize("tenth", range(10))
def test_damaged_at_random(tiny: Tiny, stopped: Path, tmp_path: Path, whole: Whole, tenth: int) -> None:
    """R6: with the tests around it a hundred."""
    for seed in range(5 * tenth, 5 * tenth + 5):
        damage_at_random(tiny, tmp_path / str(seed), stopped, whole, random.Random(seed))


def test_all_checkpoints_damaged(tiny: Tiny, stopped: Path, tmp_path: Path, whole: Whole) -> None:
    out = copy_of(stopped, tmp_path)
    for folder in (out / "work" / "prune-steps").iterdir():
        flip(folder / "state.safetensors")
    assert sum("is damaged; using the one before" in note for note in finish(tiny, out)) == 2
    assert outcome(out) == whole.outcome


@pytest.mark.parametrize("damage", [flip, Path.unlink, add], ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    "name",
    [
        "bank-pretrained/bank.safetensors",
        "bank-finetuned/bank.safetensors",
        "bank-snapshot-000/bank.safetensors",
        "bank-snapshot-001/manifest.json",
        "dense/answers.safetensors",
        "teacher/model.safetensors",
        "teacher/tokenizer.json",
    ],
)
def test_damaged_stage(
    tiny: Tiny, stopped: Path, tmp_path: Path, whole: Whole, name: str, damage: Callable[[Path], None]
) -> None:
    """R6: what a later stage rests on is made again, the same as before; nothing damaged is used."""
    out = copy_of(stopped, tmp_path)
    damage(out / "work" / name)
    notes = finish(tiny, out)
    assert [note for note in notes if f"{(out / 'work' / name).parent} is damaged" in note], notes
    assert outcome(out) == whole.outcome


@pytest.mark.parametrize(
    ("first", "second"),
    [("bank-pretrained", "bank-finetuned"), ("bank-snapshot-000", "bank-snapshot-001"), ("prune-steps", "prune-steps")],
)
def test_swapped_stages(tiny: Tiny, stopped: Path, tmp_path: Path, whole: Whole, first: str, second: str) -> None:
    """Each folder knows what it is of: whole, but another one's, it is not used, and that is said."""
    out = copy_of(stopped, tmp_path)
    one, other = out / "work" / first, out / "work" / second
    if one == other:
        one, other = sorted(one.iterdir())
    one.rename(tmp_path / "kept")
    other.rename(one)
    (tmp_path / "kept").rename(other)
    notes = finish(tiny, out)
    for path in (one, other):
        assert [note for note in notes if f"{path} was not made for this" in note], notes
    assert outcome(out) == whole.outcome


def test_checkpoints_that_were_damaged_do_not_crowd_out_the_new_ones(tiny: Tiny, stopped: Path, tmp_path: Path) -> None:
    out = copy_of(stopped, tmp_path)
    for folder in (out / "work" / "prune-steps").iterdir():
        flip(folder / "state.safetensors")
    stopped_at(tiny, out, "prune", 3)
    assert sorted(path.name for path in (out / "work" / "prune-steps").iterdir()) == ["step-00000002", "step-00000003"]


HELD: dict[str, Any] = {**SMALL, "holdout": 0.2, "final_share": 0.7, "dense_share": 0.0}


@pytest.fixture(scope="module")
def best(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Outcome of a run that chose an epoch that was not its last, and the same run stopped after its last epoch."""
    from capcli.verbs import prune

    folder = tmp_path_factory.mktemp("best")
    for seed in range(1, 9):
        chosen = {**HELD, "seed": seed}
        out = folder / str(seed)
        flag = StopFlag()
        with pytest.raises(Stopped):
            for event in prune.prune(tiny.prune_config(out, **chosen), flag=flag):
                flag.reason = "the test" if event.phase == "evaluate pruned" else ""
        if read_json(out / "work" / "best" / "best.json")["step"] < 9:
            tiny.prune(folder / "whole", **chosen)
            return (outcome(folder / "whole"), seed), out
    raise AssertionError("the last epoch is always the best")


@pytest.mark.parametrize("damage", [*DAMAGES, add], ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", ["best.safetensors", "best.json", "manifest.json", ""])
def test_damaged_best(
    tiny: Tiny, best: tuple[Any, Path], tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """R6: never replaced by a worse epoch: it is made again, and that is said."""
    from capcli.verbs import prune

    if not name and damage is not Path.unlink:
        pytest.skip("of the folder itself only that it is gone")
    (expected, seed), stopped = best
    out = copy_of(stopped, tmp_path)
    if name:
        damage(out / "work" / "best" / name)
    else:
        shutil.rmtree(out / "work" / "best")
    config = tiny.prune_config(out, **{**HELD, "seed": seed})
    notes = [event.note for event in prune.prune(config) if event.note]
    assert [note for note in notes if str(out / "work" / "best") in note and "redone" in note], notes
    assert outcome(out) == expected


def test_a_best_that_is_damaged_meanwhile_ends_the_run(tiny: Tiny, best: tuple[Any, Path], tmp_path: Path) -> None:
    """Exit 3; the same command goes back to before it."""
    from capcli.verbs import prune

    expected, seed = best[0]
    config = tiny.prune_config(tmp_path / "out", **{**HELD, "seed": seed})
    folder = tmp_path / "out" / "work" / "best"
    with pytest.raises(RunFailed, match="best is damaged"):
        for _ in prune.prune(config):
            if folder.is_dir() and files.is_complete(folder):
                flip(folder / "best.safetensors")
    tiny.prune(tmp_path / "out", **{**HELD, "seed": seed})
    assert outcome(tmp_path / "out") == expected


@pytest.mark.parametrize("damage", [truncate, flip_high], ids=lambda d: d.__name__)
def test_damaged_configuration_is_named(
    tiny: Tiny, stopped: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    out = copy_of(stopped, tmp_path)
    damage(out / "work" / "config.json")
    result = invoke(*tiny.arguments(out, **SMALL))
    assert result.exit_code == 2
    assert str(out / "work" / "config.json") in result.stderr


def test_other_configuration_of_a_stopped_run_is_refused(tiny: Tiny, stopped: Path, tmp_path: Path) -> None:
    out = copy_of(stopped, tmp_path)
    result = invoke(*tiny.arguments(out, **SMALL, seed=2))
    assert result.exit_code == 2
    assert "seed: 1, now 2" in result.stderr


def test_resume_says_where_it_continues(tiny: Tiny, stopped: Path, tmp_path: Path) -> None:
    assert "continuing at step 7 of 9" in finish(tiny, copy_of(stopped, tmp_path))


LATER = {"batch_size": 8, "lr": 1e-3, "epochs": 2, "losses": "ce,kd,fic", "final_share": 0.3, "score_lr": 0.01}
ALL = {"bank-pretrained", "teacher", "bank-finetuned", "dense", "prune-steps", "bank-snapshot"}


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        *(({n: v}, ALL - {"prune-steps", "bank-snapshot"}) for n, v in LATER.items()),
        (LATER, ALL - {"prune-steps", "bank-snapshot"}),
        ({"teacher_lr": 1e-3}, {"bank-pretrained"}),
        ({"lr_scale": 2.0}, {"bank-pretrained"}),
        ({"precision": "bf16"}, {"teacher"}),
        ({"max_time": 9.0}, ALL),
    ],
    ids=lambda value: ",".join(sorted(value)),
)
def test_what_concerns_later_stages_may_change(
    tiny: Tiny, stopped: Path, tmp_path: Path, changed: dict[str, Any], kept: set[str]
) -> None:
    """What does not depend on it is kept, all else is made anew, and both are said."""
    out = copy_of(stopped, tmp_path)
    before = {
        path.name: digest(path / "manifest.json")
        for path in (out / "work").iterdir()
        if (path / "manifest.json").exists()
    }
    result = invoke(*tiny.arguments(out, **{**SMALL, **changed}), "--keep-work")
    assert result.exit_code == 0, result.stderr
    for name, value in before.items():
        if name in kept:
            assert digest(out / "work" / name / "manifest.json") == value, name
    said = [line for line in result.stderr.splitlines() if "; kept: " in line]
    if kept == ALL:
        assert said == []
        assert "continuing at step 7 of 9" in result.stderr
        return
    assert len(said) == 1, result.stderr
    assert all(f"{name}: " in said[0] for name in changed)
    told = said[0].partition("; kept: ")[2].split("; redone: ")
    assert [set(part.split(", ")) for part in told] == [kept, ALL - kept]
    assert "continuing at" not in result.stderr
    report = json.loads((out / "report.json").read_text())
    assert all(report["config"][name] == value for name, value in changed.items())
    assert ("the teacher was trained with batch_size 16" in report["notes"]) == ("batch_size" in changed)


def test_changed_options_give_what_they_give_from_the_start(tiny: Tiny, stopped: Path, tmp_path: Path) -> None:
    """Where the kept stages would be the same: nothing of the other schedule is left."""
    tiny.prune(tmp_path / "whole", **{**SMALL, "epochs": 2, "lr": 1e-3})
    out = copy_of(stopped, tmp_path)
    tiny.prune(out, **{**SMALL, "epochs": 2, "lr": 1e-3})
    assert outcome(out) == outcome(tmp_path / "whole")


def test_the_advice_after_a_loss_that_is_not_finite_can_be_followed(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke(*tiny.arguments(out, **{**SMALL, "teacher_lr": 1e30}))
    assert result.exit_code == 3
    precise = "(, or use --precision fp32)?"  # where steps are in bf16
    assert re.search(rf"hint: lower --teacher-lr{precise}; this keeps: bank-pretrained\n", result.stderr)
    result = invoke(*tiny.arguments(out, **{**SMALL, "lr": 1e30}))
    assert result.exit_code == 3
    kept = "bank-pretrained, teacher, bank-finetuned, dense"
    assert re.search(rf"hint: lower --lr or --score-lr{precise}; this keeps: {kept}\n", result.stderr)
    assert "checkpoint" not in result.stderr
    tiny.prune(out, **SMALL)


@pytest.mark.parametrize("n", [1, 4, 7, 9, 10, 12])
def test_overwrite_that_is_interrupted_mixes_nothing(tiny: Tiny, stopped: Path, tmp_path: Path, n: int) -> None:
    """Killed while it clears a stopped run of another configuration: each of the two is then refused or right."""
    out = copy_of(stopped, tmp_path)
    assert killed_at(tiny, out, n, "--overwrite", seed=2)
    codes = []
    for seed in (1, 2):
        again = Path(shutil.copytree(out, tmp_path / f"again-{seed}"))
        result = invoke(*tiny.arguments(again, **SMALL, seed=seed))
        codes.append(result.exit_code)
        if result.exit_code:
            assert result.exit_code == 2
            assert "seed: " in result.stderr
        else:
            tiny.prune(tmp_path / f"right-{seed}", **SMALL, seed=seed)
            assert outcome(again) == outcome(tmp_path / f"right-{seed}")
    assert 0 in codes


def test_stages_without_what_identifies_the_run_are_refused(tiny: Tiny, stopped: Path, tmp_path: Path) -> None:
    out = copy_of(stopped, tmp_path)
    (out / "work" / "config.json").unlink()
    result = invoke(*tiny.arguments(out, **SMALL))
    assert result.exit_code == 2
    assert "is of a run without its config.json" in result.stderr
    assert invoke(*tiny.arguments(out, **SMALL), "--overwrite").exit_code == 0


def test_tokenizer_files_of_another_model_are_not_those_of_the_artefact(
    tiny: Tiny, stopped: Path, tmp_path: Path
) -> None:
    out = copy_of(stopped, tmp_path)
    for name in ("vocab.txt", "merges.txt", "added_tokens.json"):
        (out / name).write_text("{}")
    (out / "mine.txt").write_text("x")
    finish(tiny, out)
    assert not any((out / name).exists() for name in ("vocab.txt", "merges.txt", "added_tokens.json"))
    assert "merges.txt" not in json.loads((out / "report.json").read_text())["files"]
    assert (out / "mine.txt").exists()
    (out / "merges.txt").write_text("{}")
    tiny_again = invoke(*tiny.arguments(out, **SMALL), "--overwrite")
    assert tiny_again.exit_code == 0
    assert not (out / "merges.txt").exists()


def test_overwrite_of_a_stopped_run(tiny: Tiny, stopped: Path, tmp_path: Path, whole: Whole) -> None:
    out = copy_of(stopped, tmp_path)
    result = invoke(*tiny.arguments(out, **SMALL), "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert outcome(out) == whole.outcome


# Two processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tenth", range(10))
def test_second_process_is_refused_and_a_dead_one_leaves_no_lock(
    tiny: Tiny, tmp_path: Path, whole: Whole, tenth: int
) -> None:
    """R7."""
    lock_out(tiny, tmp_path / "out", whole, max(20, tenth * whole.operations // 10))


@pytest.mark.parametrize("name", ["ENOLCK", "EIO", "EOPNOTSUPP"])
def test_a_lock_that_the_system_refuses(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Exit 2 with the path, and nothing is left."""
    import fcntl

    def refuse(handle: int, operation: int) -> None:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(fcntl, "flock", refuse)
    result = invoke(*tiny.arguments(tmp_path / "runs" / "out", **SMALL))
    assert result.exit_code == 2, result.stderr
    assert f"cannot lock {tmp_path / 'runs' / 'out' / 'work' / '.lock'}" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("phase", ["teacher", "bank finetuned", "prune", "evaluate pruned", "latency"])
@pytest.mark.parametrize("replaced", [True, False])
def test_out_is_replaced_or_removed_while_it_is_written(
    tiny: Tiny, tmp_path: Path, phase: str, *, replaced: bool
) -> None:
    """Exit 3 with the path; the folder that took its place is not touched, and the old one can be continued."""
    from capcli.verbs import prune

    out, moved = tmp_path / "out", tmp_path / "moved"
    with pytest.raises(RunFailed, match="was removed or replaced") as caught:
        for event in prune.prune(tiny.prune_config(out, **SMALL)):
            if event.phase == phase and not moved.exists():
                out.rename(moved)
                if replaced:
                    (out / "work").mkdir(parents=True)
                    (out / "work" / "config.json").write_text("mine")
    assert str(out) in caught.value.message
    assert sorted(tmp_path.rglob("out/**/*.json")) == ([out / "work" / "config.json"] if replaced else [])
    if out.exists():
        shutil.rmtree(out)
    moved.rename(out)
    finish(tiny, out)


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(
    tiny: Tiny, tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check for a finished run is made again under the lock."""
    out, take = tmp_path / "out", run.acquire

    def late(*arguments: Any) -> None:
        monkeypatch.setattr(run, "acquire", take)
        shutil.rmtree(out)
        tiny.prune(out, **SMALL)
        (out / "work").mkdir()
        take(*arguments)

    monkeypatch.setattr(run, "acquire", late)
    notes = finish(tiny, out)
    assert notes[-1] == "this run is already complete"
    assert not any("epoch" in note for note in notes)
    assert outcome(out) == whole.outcome
    assert not (out / "work").exists()


# What early failures and kills leave ---------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [(), (".lock",), (".cap_write_test",), (".config.json.part", ".lock")], ids=str)
@pytest.mark.parametrize("switch", [(), ("--overwrite",)])
def test_a_run_that_failed_before_its_lock_is_ours(
    tiny: Tiny, tmp_path: Path, there: tuple[str, ...], switch: tuple[str, ...]
) -> None:
    (tmp_path / "out" / "work").mkdir(parents=True)
    for name in there:
        (tmp_path / "out" / "work" / name).write_text("")
    result = invoke(*tiny.arguments(tmp_path / "out", **SMALL), *switch)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("name", ["work/thesis.tex", "work/.git/HEAD", "README.md", "merges.txt", "export.json"])
@pytest.mark.parametrize("switch", [(), ("--overwrite",)])
def test_a_folder_of_somebody_else_is_refused(tiny: Tiny, tmp_path: Path, name: str, switch: tuple[str, ...]) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("x")
    if name == "export.json":
        path.with_name("cap_config.json").write_text("{}")
    result = invoke(*tiny.arguments(tmp_path / "out", **SMALL), *switch)
    assert result.exit_code == 2
    assert path.read_text() == "x"


def test_a_work_folder_that_is_a_link_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".lock").write_text("")
    (tmp_path / "other" / "thesis.tex").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "work").symlink_to(tmp_path / "other")
    for switch in ((), ("--overwrite",)):
        assert invoke(*tiny.arguments(tmp_path / "out", **SMALL), *switch).exit_code == 2
    assert (tmp_path / "other" / "thesis.tex").read_text() == "x"


def test_a_pruned_model_without_its_report_is_not_written_over(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(pruned, tmp_path / "out"))
    (out / "report.json").unlink()
    before = {path: path.read_bytes() for path in out.iterdir()}
    result = invoke(*tiny.arguments(out, **SMALL))
    assert result.exit_code == 2
    assert "without the report of its run" in result.stderr
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert invoke(*tiny.arguments(out, **SMALL), "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    "chosen",
    [
        {"label_column": "nothing"},
        {"data": "/nowhere"},
        {"model": "/nowhere"},
        {"method": "cap-f", "sparsity": 0.999},
        {"teacher": "/nowhere"},
        {"teacher": "mini"},
    ],
    ids=str,
)
def test_exit_2_leaves_nothing_behind(tiny: Tiny, tmp_path: Path, chosen: dict[str, Any]) -> None:
    result = invoke(*tiny.arguments(tmp_path / "runs" / "out", **{**SMALL, **chosen}))
    assert result.exit_code == 2, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_exit_2_leaves_a_finished_run_as_it_was(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(pruned, tmp_path / "out"))
    before = {path: path.read_bytes() for path in out.rglob("*")}
    assert invoke(*tiny.arguments(out, **SMALL, label_column="nothing"), "--overwrite").exit_code == 2
    assert {path: path.read_bytes() for path in out.rglob("*")} == before


@pytest.mark.parametrize("kept", [False, True])
def test_the_rest_of_a_work_folder_is_removed_by_the_next_command(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, kept: bool
) -> None:
    """Unless it was to be kept."""
    out, more = tmp_path / "out", {"keep_work": True} if kept else {}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        tiny.prune(out, **SMALL, **more)
    assert (out / "work" / "teacher").is_dir()
    before = (out / "report.json").read_bytes()
    assert finish(tiny, out)[-1] == "this run is already complete"
    assert (out / "work").exists() is kept
    assert (out / "report.json").read_bytes() == before


@pytest.mark.parametrize("name", [WEIGHTS, "cap_config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", [flip, Path.unlink, make_pipe], ids=lambda d: d.__name__)
def test_damage_of_a_finished_run_is_said(
    tiny: Tiny, pruned: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    """Exit 2 with the path, not "already complete"."""
    out = Path(shutil.copytree(pruned, tmp_path / "out"))
    damage(out / name)
    result = invoke(*tiny.arguments(out))
    assert result.exit_code == 2
    assert str(out / name) in result.stderr


def test_what_killed_processes_were_writing_is_removed(tiny: Tiny, stopped: Path, tmp_path: Path) -> None:
    out = copy_of(stopped, tmp_path)
    rest = [out / ".report.json.part", out / "work" / ".config.json.part", out / ".model.cap.safetensors.0a1b.part"]
    for path in rest:
        path.write_text("x")
    for name in ("work/.bank-finetuned.part", "work/prune-steps/.step-00000099.part", ".mine.part"):
        (out / name).mkdir()
        (out / name / "file").write_text("x")
    stopped_at(tiny, out, "prune", 8)
    assert not any(path.exists() for path in rest)
    assert [path for path in out.rglob(".*") if path.name != ".lock"] == [out / ".mine.part"]


# What a run takes of the machine -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pruning_needs_no_module_of_unix() -> None:
    code = "import sys; sys.modules['resource'] = None; import capcli.verbs.prune"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=120)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 avx512_bf16x\nbugs\t\t: bf16\n", False),
        ("", False),
    ],
)
def test_bf16_instructions_are_told_by_the_processor(tmp_path: Path, lines: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(lines)
    assert machine.has_bf16(tmp_path / "cpuinfo") is expected
    assert not machine.has_bf16(tmp_path / "none")


def test_a_run_says_that_bf16_is_emulated(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_bf16", lambda: False)
    report = tiny.prune(tmp_path / "out", precision="bf16", epochs=1, teacher_epochs=1)
    assert "this processor has no bf16 instructions: training in fp32 is faster" in report["notes"]


@pytest.mark.slow
def test_memory_is_that_of_the_process_itself() -> None:
    """A process that begins in a large one has not taken what that one has."""
    code = "from capcli import machine; print(machine.peak_bytes())"
    ballast = torch.ones(300_000_000, dtype=torch.uint8)
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment(), check=True, timeout=120, capture_output=True, text=True
    )
    assert 10_000_000 < int(found.stdout) < 150_000_000
    assert (machine.peak_bytes() or 0) > len(ballast)


# Numbers that are not finite -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_file_with_bad_numbers(tiny: Tiny, tmp_path: Path, value: float) -> None:
    """R8: refused, naming the tensor."""
    write_model(tmp_path / "bad")
    path, name = tmp_path / "bad" / "model.safetensors", "encoder.layer.1.output.dense.weight"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith(name))
    tensors[name][3, 5] = value
    save_file(tensors, path, {"format": "pt"})
    result = invoke(*tiny.arguments(tmp_path / "out", **SMALL, model=str(tmp_path / "bad")))
    assert result.exit_code in (2, 3)
    assert "encoder.layer.1.output.dense.weight" in result.stderr
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("chosen", [{"teacher_lr": 1e30}, {"lr": 1e30}, {"lr": 1e38, "losses": "ce"}])
def test_diverging_loss(tiny: Tiny, tmp_path: Path, chosen: dict[str, Any]) -> None:
    """R8: exit 3, and no checkpoint holds a number that is not finite."""
    out = tmp_path / "out"
    result = invoke(*tiny.arguments(out, **{**SMALL, **chosen}))
    assert result.exit_code == 3, result.stderr
    assert "not finite" in result.stderr
    assert "first bad tensor" in result.stderr
    assert not (out / "report.json").exists()
    check_newest_checkpoint(out)


def test_bad_number_in_a_gradient(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R8: the weights go bad in one step while the loss was fine."""
    from capcli.pruning import train

    clip, steps = torch.nn.utils.clip_grad_norm_, [0]

    def poisoned(parameters: Any, *rest: Any) -> Any:
        parameters = list(parameters)
        steps[0] += 1
        if steps[0] == 7:
            parameters[3].grad[0] = float("nan")
        return clip(parameters[:3], *rest)

    monkeypatch.setattr(train.torch.nn.utils, "clip_grad_norm_", poisoned)
    with pytest.raises(RunFailed, match="not finite"):
        tiny.prune(tmp_path / "out", **SMALL)
    check_newest_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("method", "named"), [("cap-soft", "scores"), ("cap-f", "importance")], ids=["trained", "observed"]
)
def test_bad_number_in_a_score(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, named: str, value: float
) -> None:
    """R8: exit 3 naming it, before the checkpoint is written."""
    update, calls = Pruner.update, [0]

    def poisoned(self: Pruner, step: int) -> None:
        calls[0] += 1
        if calls[0] == 6:
            found = self.matrices.scores if method == "cap-soft" else self.tensors()["importance"]
            with torch.no_grad():
                found.view(-1)[3] = value
        update(self, step)

    monkeypatch.setattr(Pruner, "update", poisoned)
    with pytest.raises(RunFailed, match=f"not finite at step .*, first bad tensor: .*{named}") as caught:
        tiny.prune(tmp_path / "out", **SMALL, method=method)
    assert caught.value.exit_code == 3
    check_newest_checkpoint(tmp_path / "out")


# Where nothing can be written ----------------------------------------------------------------------------------------


def foreign(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("x")
    return folder


def plain_file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("x")
    return path


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (lambda tmp: plain_file(tmp) / "below", "cannot write to"),
        (lambda tmp: Path("/proc/cap-out"), "cannot write to"),
        (plain_file, "is a file, not a folder"),
        (foreign, "was not written by cap"),
        (lambda tmp: tmp / ("x" * 300), "too long for a file"),
        (lambda tmp: tmp / "a\0b", "cannot write to"),
        (lambda tmp: tmp / os.fsdecode(b"out\xff"), "its name is not UTF-8"),
    ],
    ids=["below-a-file", "proc", "a-file", "foreign", "long-name", "nul", "not-utf-8"],
)
def test_places_that_do_not_serve(tiny: Tiny, tmp_path: Path, place: Callable[[Path], Path], said: str) -> None:
    """Exit 2 at once, with a hint, and nothing was touched."""
    out = place(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = invoke(*tiny.arguments(out, **SMALL))
    assert result.exit_code == 2, result.stderr
    assert said in result.stderr
    assert "hint:" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_files_beside_a_run_survive_overwrite(tiny: Tiny, tmp_path: Path) -> None:
    """`--overwrite` on a folder that is not ours is refused."""
    folder = foreign(tmp_path)
    result = invoke(*tiny.arguments(folder, **SMALL), "--overwrite")
    assert result.exit_code == 2
    assert (folder / "thesis.tex").read_text() == "x"


def test_report_is_written_last(tiny: Tiny, tmp_path: Path) -> None:
    """Its presence means that the run is complete."""
    written = []
    files.fault_hook = lambda operation, path: written.append((operation, path.name))
    tiny.prune(tmp_path / "out", **SMALL)
    renamed = [name for operation, name in written if operation == "rename"]
    assert renamed[-1] == "report.json"
    assert renamed.index(WEIGHTS) < renamed.index("cap_config.json") < renamed.index("README.md")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["status"] == "complete"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 2}, "report.json has schema_version 2, this cap reads 1"),
        (
            {"files": {"model.cap.safetensors": "x"}},
            "report.json: files.model.cap.safetensors is a text",
        ),
        ({"fingerprints": [1]}, "report.json: fingerprints is a list, not a JSON object"),
        ({"metrics": {"dense": {"accuracy": "x"}}}, "report.json: metrics.dense.accuracy is a text, not a number"),
        ({"status": 3}, "report.json is not a report of a finished run"),
        ({"config": None}, "report.json holds no configuration of a run"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_report_in_out_that_does_not_fit_is_one_line(
    tiny: Tiny, pruned: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    out = shutil.copytree(pruned, tmp_path / "out")
    report = out / "report.json"
    report.write_text(json.dumps(json.loads(report.read_text("utf-8")) | change))
    before = digest(report)
    result = invoke(*tiny.arguments(out), "-q")
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr and result.stderr.count("error: ") == result.stderr.count("hint: ") == 1
    assert digest(report) == before
