"""What changes around a command while it works: the clock, folders, other processes, what the process itself takes up.

Trials as in `survival.py`.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from survival import SMALL, STEPS, Whole, at, die, same_after
from tiny import Tiny, forked, invoke, wait

from capcli import files
from capcli.data import cache, tokens
from capcli.errors import CapError
from capcli.verbs import prune

# Clocks --------------------------------------------------------------------------------------------------------------


def set_back(tiny: Tiny, out: Path, whole: Whole, n: int) -> None:
    """R14: the clock falls all the time, and with it the times of files; killed at the n-th file operation and run
    again, it continues at the newest checkpoint and comes to the same."""
    now = [2e9]

    def falling() -> float:
        now[0] -= 1000.0
        return now[0]

    def action() -> None:
        time.time = falling
        kill = at(n, die)

        def hook(operation: str, path: Path) -> None:
            for folder in (out / "work").glob("*-steps/step-*"):
                os.utime(folder, (falling(),) * 2)
            kill(operation, path)

        files.fault_hook = hook
        tiny.prune(out, **SMALL)

    assert wait(forked(action)) < 0
    newest = max((out / "work" / "prune-steps").glob("step-*"), default=None)
    notes = same_after(tiny, out, whole.outcome, f"clock set back, killed at operation {n}")
    if newest is not None and newest.name != f"step-{STEPS:08d}":
        assert f"continuing at step {int(newest.name[5:])} of {STEPS}" in notes, notes


# Other processes -----------------------------------------------------------------------------------------------------


def probe_arguments(tiny: Tiny) -> list[str]:
    """A probe that keeps tokens, vectors and answers of two splits."""
    chosen = ["--tasks", "text-classification", "--data", tiny.data, "--max-length", "16", "--seeds", "2"]
    return ["probe", tiny.model, *chosen, "--threads", "1", "--json"]


def said_with(folder: Path, arguments: list[str], to: Path, delay_seconds: float = 0.0) -> None:
    """Write what a command says when it keeps what it can in a cache of its own; ends the process with its code."""
    os.environ["CAP_CACHE"] = str(folder)
    tokens.CACHE_EXAMPLES = 1
    time.sleep(delay_seconds)
    result = invoke(*arguments)
    to.write_text(result.stdout or result.stderr)
    sys.exit(result.exit_code)


def alone(tiny: Tiny, folder: Path) -> Any:
    """What the probe says by itself."""
    folder.mkdir(parents=True)
    assert wait(forked(lambda: said_with(folder / "cache", probe_arguments(tiny), folder / "said"))) == 0
    return json.loads((folder / "said").read_text())


def two_at_once(tiny: Tiny, folder: Path, expected: Any, rng: random.Random) -> None:
    """R18: two commands fill one cold cache at the same time: both are right, and so is every entry."""
    folder.mkdir(parents=True)
    delays = {"a": 0.0, "b": rng.uniform(0.0, 0.3)}
    started = [
        forked(functools.partial(said_with, folder / "cache", probe_arguments(tiny), folder / name, delay))
        for name, delay in delays.items()
    ]
    codes = [wait(pid) for pid in started]
    assert codes == [0, 0], [(folder / name).read_text() for name in delays]
    assert [json.loads((folder / name).read_text()) for name in delays] == [expected, expected]
    entries = [entry for kind in (folder / "cache").iterdir() if kind.name in cache.ENTRIES for entry in kind.iterdir()]
    assert {entry.parent.name for entry in entries} == set(cache.ENTRIES)
    assert all(files.is_complete(entry) for entry in entries), entries


# Folders -------------------------------------------------------------------------------------------------------------


class Moved(NamedTuple):
    """How a run went during which something changed: what it said, and how it failed, if it did."""

    notes: list[str]
    error: CapError | None


def elsewhere(config: Any, phase: str, change: Callable[[], Any]) -> Moved:
    """Run, and change something at the first event of a phase."""
    notes: list[str] = []
    pending = [change]
    try:
        for event in prune.prune(config):
            notes += [event.note] if event.note else []
            if event.phase == phase and pending:
                pending.pop()()
    except CapError as error:
        return Moved(notes, error)
    return Moved(notes, None)


# What the process takes up ------------------------------------------------------------------------------------------


class Taken(NamedTuple):
    """Of the process: open files and bytes of memory in use; of the machine: temporary files of ours."""

    handles: int
    resident_bytes: int
    temporary: int


def taken(out: Path) -> Taken:
    """What this process takes up now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    left = [*Path(tempfile.gettempdir()).iterdir(), *out.rglob(".*")]
    return Taken(len(list(Path("/proc/self/fd").iterdir())), pages * os.sysconf("SC_PAGE_SIZE"), len(left))


def growth(tiny: Tiny, out: Path, steps: int) -> list[Taken]:
    """R17: a run of this many steps with a checkpoint after each, in a process for itself; what it took up after each
    sixth of them."""
    config = tiny.prune_config(out, **{**SMALL, "epochs": steps // 3, "losses": "ce,kd"})
    found: list[Taken] = []
    (temporary := out.with_name("temporary")).mkdir(parents=True)
    tempfile.tempdir = str(temporary)
    for event in prune.prune(config):
        due = steps * (len(found) + 1) // 6
        if event.phase == "prune" and event.done >= due and len(found) < 6:
            found.append(taken(out))
    return found


def check_growth(found: list[Taken], most_bytes: int) -> None:
    """Raise `AssertionError` when a process takes up ever more."""
    first, last = found[1], found[-1]
    assert len({one.handles for one in found[1:]}) == 1, found
    assert last.temporary <= first.temporary, found
    assert last.resident_bytes - first.resident_bytes < most_bytes, found
