"""The reliability matrix in full: each row in turns, for a stated time, continued where it stopped.

    python tests/soak.py --minutes 60            go on, then print the table
    python tests/soak.py --minutes 60 --rows S2  these rows alone
    python tests/soak.py --rows R5 --trial 123   one trial, with its traceback
    python tests/soak.py --page                  put results/soak.json of benchmarks into docs/reference/reliability.md

What is done in a trial is in `survival.py`, `surroundings.py` and `mutants.py`, of which the tests take a sample. A
trial depends on its number alone. Trials run in forks of this process, some at a time: one that crashes or hangs is a
failure like another. Results are in `.soak/state.json`; remove it to begin anew.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import mutants
import surroundings
import survival
import tiny
import torch

STATE = tiny.ROOT / ".soak" / "state.json"
RESULT = tiny.ROOT / "benchmarks" / "results" / "soak.json"
PAGE = tiny.ROOT / "docs" / "reference" / "reliability.md"
MARKS = "<!-- soak:begin -->", "<!-- soak:end -->"
TURN_SECONDS = 30.0  # of a row, before it is the turn of the next
HUNG_SECONDS = 300.0  # without a finished trial
SHOWN_FAILURES = 20  # of a row
PART_CHARS = 400  # of each end of a message
FILES = 500  # of a trial of S2


@dataclass
class Bench:
    """What trials have in common, made when the first of them asks for it; `folder` is for the trial at hand."""

    root: Path
    folder: Path

    @functools.cached_property
    def tiny(self) -> tiny.Tiny:
        return tiny.make(self.root / "tiny")

    @functools.cached_property
    def whole(self) -> survival.Whole:
        return survival.uninterrupted(self.tiny, self.root / "whole")

    @functools.cached_property
    def seconds(self) -> float:
        """Of a run from its begin to its end in a fork."""
        began = time.monotonic()
        tiny.wait(tiny.forked(lambda: self.tiny.prune(self.root / "timed", **survival.SMALL)))
        return time.monotonic() - began

    @functools.cached_property
    def others(self) -> dict[str, tuple[Any, float]]:
        """Outcome and seconds of an uninterrupted run of each other method."""
        found = {}
        for name, chosen in survival.OTHERS.items():
            began, out = time.monotonic(), self.root / "others" / str(len(found))
            self.tiny.prune(out, **{**survival.SMALL, **chosen})
            found[name] = tiny.outcome(out), time.monotonic() - began
        return found

    @functools.cached_property
    def stopped(self) -> Path:
        survival.stopped_run(self.tiny, self.root / "stopped")
        return self.root / "stopped"

    @functools.cached_property
    def probed(self) -> Any:
        return surroundings.alone(self.tiny, self.root / "probed")

    @functools.cached_property
    def raw(self) -> tuple[bytes, bytes, bytes]:
        return mutants.whole_files(self.root / "whole.safetensors")

    @functools.cached_property
    def tensors(self) -> list[dict[str, torch.Tensor]]:
        """What these files hold."""
        path = self.root / "read.safetensors"
        return [mutants.outcome(path, raw) or {} for raw in self.raw]


Trial = Callable[[Bench, int], int]  # of a number from 0 on; returns how much of what is counted was done


@dataclass(frozen=True)
class Row:
    """A row of the matrix: what is counted, how many are wanted."""

    what: str
    wanted: Callable[[Bench], int]
    trial: Trial


def random_kills(bench: Bench, number: int) -> int:
    rng = random.Random(number)
    return survival.kill_at_random(bench.tiny, bench.folder, bench.whole.outcome, rng, 5, 0.8 * bench.seconds)


def kills_of_others(bench: Bench, number: int) -> int:
    rng, name = random.Random(number), list(survival.OTHERS)[number % len(survival.OTHERS)]
    expected, seconds = bench.others[name]
    return survival.kill_at_random(bench.tiny, bench.folder, expected, rng, 5, 0.8 * seconds, **survival.OTHERS[name])


def kill_at_each(bench: Bench, number: int) -> int:
    survival.kill_at_operation(bench.tiny, bench.folder, bench.whole, 1 + number % bench.whole.operations)
    return 1


def kill_in_each(bench: Bench, number: int) -> int:
    phase = list(survival.PHASES)[number % len(survival.PHASES)]
    survival.kill_in_phase(bench.tiny, bench.folder, bench.whole, phase, random.Random(number))
    return 1


def signals(bench: Bench, number: int) -> int:
    n = random.Random(number).randint(1, bench.whole.operations - 20)  # after these the run is as good as finished
    survival.stop_by_signal(bench.tiny, bench.folder, bench.whole, survival.SIGNALS[number % 4], n)
    return 1


def faults(bench: Bench, number: int) -> int:
    round_, n = divmod(number, bench.whole.operations)
    survival.fail_at_operation(bench.tiny, bench.folder, bench.whole, n + 1, survival.FAULTS[(n + round_) % 3])
    return 1


def damages(bench: Bench, number: int) -> int:
    survival.damage_at_random(bench.tiny, bench.folder, bench.stopped, bench.whole, random.Random(number))
    return 1


def locks(bench: Bench, number: int) -> int:
    n = random.Random(number).randint(20, bench.whole.operations - 20)
    seconds = survival.lock_out(bench.tiny, bench.folder, bench.whole, n)
    assert seconds < 1, f"refused after {seconds:.2f} s"
    return 1


def clocks(bench: Bench, number: int) -> int:
    n = random.Random(number).randint(1, bench.whole.operations - 1)
    surroundings.set_back(bench.tiny, bench.folder, bench.whole, n)
    return 1


def growth(bench: Bench, number: int) -> int:
    surroundings.check_growth(surroundings.growth(bench.tiny, bench.folder, 2_000), most_bytes=16 << 20)
    return 2_000


def companions(bench: Bench, number: int) -> int:
    surroundings.two_at_once(bench.tiny, bench.folder, bench.probed, random.Random(number))
    return 1


def mutations(bench: Bench, number: int) -> int:
    """Bytes in three trials of four, content with fitting checksums in the fourth."""
    rng, version = random.Random(number), number % 3
    path = bench.folder.with_name("mutant.safetensors")
    for _ in range(FILES):
        if number % 4 < 3:
            mutants.mutate(path, bench.raw[version], bench.tensors[version], rng)
        else:
            mutants.edit(path, bench.raw[number // 4 % 3], rng)
    return FILES


def round_trips(bench: Bench, number: int) -> int:
    rng = random.Random(number)
    tensors = mutants.drawn(rng)
    mutants.round_trip(bench.folder.with_name("round.safetensors"), tensors, rng.randint(0, len(tensors)))
    return len(tensors)


def _operations(bench: Bench) -> int:
    return bench.whole.operations


ROWS = {
    "R1": Row("kills at random moments", lambda _: 500, random_kills),
    "R2": Row("kills, one at each file operation", _operations, kill_at_each),
    "R3": Row("kills inside ten phases", lambda _: 100, kill_in_each),
    "R4": Row("signals of four kinds", lambda _: 100, signals),
    "R5": Row("disk errors, three at each file operation", lambda bench: 3 * _operations(bench), faults),
    "R6": Row("damaged files of a stopped run", lambda _: 500, damages),
    "R7": Row("second processes and stale locks", lambda _: 50, locks),
    "R14": Row("clocks set back", lambda _: 50, clocks),
    "R17": Row("steps that leave nothing behind", lambda _: 2_000, growth),
    "R18": Row("pairs of commands on one cold cache", lambda _: 50, companions),
    "R19": Row(
        f"kills at random moments, {len(survival.OTHERS)} other methods and structures", lambda _: 500, kills_of_others
    ),
    "S2": Row("mutated sparse files", lambda _: 1_000_000, mutations),
    "S3": Row("round trips of matrices", lambda _: 20_000, round_trips),
}


# State ---------------------------------------------------------------------------------------------------------------


@dataclass
class Done:
    """How far a row is; `trials` is the number of the next one."""

    wanted: int = 0
    done: int = 0
    trials: int = 0
    n_failed: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    last: str = ""


def read_state(path: Path) -> dict[str, Done]:
    """The rows of a state file; none when it is not there."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else {}
    return {name: Done(**found) for name, found in rows.items() if name in ROWS}


def write_state(path: Path, rows: dict[str, Done]) -> None:
    """Write rows, with where they ran, in one rename."""
    path.parent.mkdir(exist_ok=True)
    earlier = json.loads(path.read_text())["where"]["commits"] if path.is_file() else []
    where = {**machine(), "commits": list(dict.fromkeys([*earlier, commit()]))}
    new = path.with_suffix(".new")
    new.write_text(
        json.dumps({"where": where, "rows": {name: asdict(found) for name, found in rows.items()}}, indent=1)
    )
    new.replace(path)


def machine() -> dict[str, Any]:
    from capcli.machine import processor, versions

    found = versions()
    kept = {name: found[name] for name in ("cap", "python", "torch")}
    return {"processor": processor(), "cores": os.cpu_count(), "system": platform.system(), "versions": kept}


@functools.cache
def commit() -> str:
    """The commit of this checkout as it was when the program began."""
    said = [
        subprocess.run(["git", *words], cwd=tiny.ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for words in (["rev-parse", "--short=9", "HEAD"], ["status", "--porcelain", "-uno"])
    ]
    return said[0] + (" with changes" if said[1] else "")


# Work ----------------------------------------------------------------------------------------------------------------


def turn(bench: Bench, name: str, found: Done, seconds: float) -> None:
    """Trials of a row for some time, in a fork; counts them, also those that ended the fork."""
    row, began = ROWS[name], time.monotonic()
    said = bench.root / "said"
    said.write_text("")
    found.wanted = row.wanted(bench)
    pid = tiny.forked(lambda: trials(bench, row, found, said, began + seconds))
    code = waited(pid, said)
    for line in said.read_text().splitlines():
        done, failure = json.loads(line)
        found.done += done
        failed(found, failure)
        found.trials += 1
    if code:
        why = "hung" if code == -signal.SIGKILL else f"the process ended with {code}"
        failed(found, f"trial {found.trials}: {why}")
        found.trials += 1
    found.seconds = round(found.seconds + time.monotonic() - began, 1)
    found.last = time.strftime("%Y-%m-%d %H:%M", time.gmtime())


def failed(found: Done, failure: str) -> None:
    """Count a failure and keep the first of them; an empty one is none."""
    if failure:
        found.n_failed += 1
        found.failures = [*found.failures, failure][:SHOWN_FAILURES]


def trials(bench: Bench, row: Row, found: Done, said: Path, until: float) -> None:
    """In the fork: one trial after another, until the time is over or enough is done; a line for each."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored in the background, and by a run then too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    done, number = found.done, found.trials
    while done < found.wanted:
        failure, counted = "", 0
        try:
            with tempfile.TemporaryDirectory(dir=bench.root, ignore_cleanup_errors=True) as place:
                bench.folder = Path(place) / "out"
                counted = row.trial(bench, number)
        except Exception as error:
            failure = f"trial {number}: {type(error).__name__}: {shortened(str(error))}"
        with said.open("a") as file:
            file.write(json.dumps([counted, failure]) + "\n")
        done, number = done + counted, number + 1
        if time.monotonic() > until:
            return


def shortened(text: str) -> str:
    """The begin and the end of a long text."""
    return text if len(text) <= 2 * PART_CHARS else f"{text[:PART_CHARS]} … {text[-PART_CHARS:]}"


def waited(pid: int, said: Path) -> int:
    """The exit code of a fork; it is killed when it says nothing for too long."""
    while True:
        if (over := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(over[1])
        if time.time() - said.stat().st_mtime > HUNG_SECONDS:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def prepared(bench: Bench, names: list[str]) -> None:
    """Make what the trials share before forks make it each for itself."""
    if set(names) & {"R1", "R2", "R3", "R4", "R5", "R6", "R7", "R14"}:
        assert bench.whole.operations and bench.seconds and bench.stopped
    if "R19" in names:
        assert bench.others
    if "R18" in names:
        assert bench.probed
    assert bench.tiny and all(bench.tensors)


def soak(names: list[str], minutes: float, state: Path) -> dict[str, Done]:
    """Take turns until the time is over or all is done; the state is written after each turn."""
    deadline, rows = time.monotonic() + 60 * minutes, read_state(state)
    with tempfile.TemporaryDirectory() as place:
        os.environ["CAP_CACHE"] = str(Path(place) / "cache")
        torch.set_num_threads(1)
        bench = Bench(Path(place), Path(place))
        prepared(bench, names)
        while left := [name for name in names if name not in rows or rows[name].done < rows[name].wanted]:
            for name in left:
                if (seconds := deadline - time.monotonic()) <= 0:
                    return rows
                turn(bench, name, rows.setdefault(name, Done()), min(seconds, TURN_SECONDS))
                write_state(state, rows)
    return rows


# The table -----------------------------------------------------------------------------------------------------------


def table(rows: dict[str, Done]) -> Iterator[str]:
    """A Markdown table of what was done."""
    yield "| row | what | done | wanted | failures | last |"
    yield "|---|---|---:|---:|---:|---|"
    for name, row in ROWS.items():
        found = rows.get(name, Done())
        cells = (f"{found.done:,}", f"{found.wanted:,}" if found.wanted else "", found.n_failed, found.last or "never")
        yield f"| {name} | {row.what} | {' | '.join(map(str, cells))} |"


def section(path: Path) -> str:
    """What the page says of a state file: the table, and where it is from."""
    where, rows = json.loads(path.read_text())["where"], read_state(path)
    minutes = sum(found.seconds for found in rows.values()) / 60
    return "\n".join(
        [
            *table(rows),
            "",
            f"{minutes:.0f} minutes of trials on {where['processor']}, one thread, {where['system']}, "
            f"Python {where['versions']['python']}, torch {where['versions']['torch']}, "
            f"commit {', '.join(where['commits'])}. Times are UTC.",
        ]
    )


def with_section(page: str, text: str) -> str:
    """The page with a text between its marks."""
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--trial", type=int)
    parser.add_argument("--state", type=Path, default=STATE)
    parser.add_argument("--page", action="store_true")
    chosen = parser.parse_args()
    names = chosen.rows.split(",")
    if unknown := set(names) - set(ROWS):
        parser.error(f"no such row: {', '.join(unknown)}")
    if chosen.page:
        PAGE.write_text(with_section(PAGE.read_text("utf-8"), section(RESULT)), "utf-8")
        return 0
    if chosen.trial is not None:
        with tempfile.TemporaryDirectory() as place:
            torch.set_num_threads(1)
            ROWS[names[0]].trial(Bench(Path(place), Path(place) / "out"), chosen.trial)
        return 0
    commit()
    rows = soak(names, chosen.minutes, chosen.state) if chosen.minutes else read_state(chosen.state)
    print(*table(rows), sep="\n")
    for name, found in rows.items():
        print(*(f"{name}: {failure}" for failure in found.failures), sep="\n", end="\n" if found.failures else "")
    return int(any(found.n_failed for found in rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())
