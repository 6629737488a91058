"""Runs of a sweep in processes of their own, several at a time."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from capcli.config.options import flatten
from capcli.config.sweep import Cell
from capcli.errors import RunFailed, Stopped
from capcli.events import Event, StopFlag
from capcli.machine import own_python
from capcli.sweeping.worker import END, event_of

LOOK_SECONDS = 0.2  # between two looks at the flag
TAIL_BYTES = 4000  # of what a process wrote before it died


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to be made: `shared` is the folder of the stages that it has in common with others, `room` that in which
    all of them work, see there."""

    cell: Cell
    shared: Path
    room: Path
    overwrite: bool

    @property
    def line(self) -> bytes:
        """As `worker` reads it."""
        about = {
            "config": flatten(self.cell.run),
            "words": self.cell.words,
            "shared": str(self.shared),
            "room": str(self.room),
            "overwrite": self.overwrite,
        }
        return json.dumps(about).encode("ascii") + b"\n"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a run has no result."""

    message: str
    hint: str
    code: int


@dataclass(kw_only=True)
class _Running:
    """A process, what it wrote to stderr, how far it is, and how it ended."""

    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    reader: threading.Thread | None = None
    overall: float = 0.0
    ended: Failure | None = None

    def ask_to_stop(self) -> None:
        """It stops after its current step, with a checkpoint."""
        if self.process.stdin and not self.process.stdin.closed:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def outcome(self) -> Failure:
        """How it ended, of a process that is gone or about to; code 0 for well."""
        code, last = self.process.wait(), ""
        self.ask_to_stop()
        if self.reader and self.process.stdout:
            self.reader.join()
            self.process.stdout.close()
        with self.log:
            last = _last_line(self.log)
        if self.ended is not None:
            return self.ended
        signals = {one.value: one.name for one in signal.Signals}
        name = signals.get(-code, f"signal {-code}") if code < 0 else f"exit code {code}"
        hint = "free memory, or use fewer --jobs" if name == "SIGKILL" else last
        return Failure(message=f"its process ended by {name}", hint=hint, code=RunFailed.exit_code)


def _last_line(log: IO[bytes]) -> str:
    """The last line that a process wrote."""
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - TAIL_BYTES))
    lines = log.read().decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "run it alone to see why"


Message = tuple[_Running, Mapping[str, Any] | None]  # a line of a process; None at its end
Ended = Callable[[Cell, Failure | None], None]  # called with a run that ended, and why if it failed


@dataclass(kw_only=True)
class _Crew:
    """The runs of a sweep that are not made yet, those in progress, and how many of all have ended or were stopped."""

    n_jobs: int
    waiting: deque[Job]
    flag: StopFlag
    ended: Ended
    running: list[_Running] = field(default_factory=list)
    messages: queue.Queue[Message] = field(default_factory=queue.Queue)
    said: set[str] = field(default_factory=set)
    home: Path = field(default_factory=Path.cwd)
    n_ended: int = 0
    n_stopped: int = 0

    def more(self, at_once: int) -> None:
        """Start as many as there is room for; once the flag is set, none, and ask the others to stop."""
        while self.waiting and len(self.running) < at_once and not self.flag.requested():
            self.running.append(_started(self.waiting.popleft(), self.messages, self.home))
        for one in self.running if self.flag.requested() else ():
            one.ask_to_stop()

    def hear(self) -> Generator[Event, None, None]:
        """Wait a little for what a run says, and act on it."""
        try:
            one, message = self.messages.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            return
        if message is None:
            self._remove(one)
        elif END in message:
            ending = message[END]
            one.ended = Failure(message=ending["message"], hint=ending["hint"], code=ending["code"])
        else:
            event = event_of(message)
            one.overall = event.overall
            yield from self._shown(one, event)

    def _remove(self, one: _Running) -> None:
        """Tell how a run ended, unless it was stopped."""
        self.running.remove(one)
        found = one.outcome()
        if self.flag.requested() and found.code == Stopped.exit_code:
            self.n_stopped += 1
            return
        self.n_ended += 1
        self.ended(one.job.cell, found if found.code else None)

    def _shown(self, one: _Running, event: Event) -> Generator[Event, None, None]:
        """An event of a run as one of the sweep: news of every run, but once what all read alike; progress of the first
        alone."""
        news = event.note if event.phase != "load" or event.note not in self.said else ""
        self.said.add(event.note)
        if news or (one is self.running[0] and not event.note):
            share = (self.n_ended + sum(other.overall for other in self.running)) / self.n_jobs
            phase = f"{one.job.cell.name}, {event.phase}"
            yield replace(event, phase=phase, note=news, overall=share, whole="sweep")


def run_all(jobs: Sequence[Job], at_once: int, flag: StopFlag, ended: Ended) -> Generator[Event, None, None]:
    """Make all runs, `at_once` at a time.

    The share of an event is that of these runs together. Raises `Stopped` once the flag is set and those that run have
    saved where they are.
    """
    crew = _Crew(n_jobs=len(jobs), waiting=deque(jobs), flag=flag, ended=ended)
    try:
        while crew.running or (crew.waiting and not flag.requested()):
            crew.more(at_once)
            yield from crew.hear()
    finally:
        for one in crew.running:
            one.process.kill()
            one.outcome()
    if crew.waiting or crew.n_stopped:
        raise Stopped(
            f"stopped by {flag.requested()}; all finished work is saved", "run the same command again to continue"
        )


def _started(job: Job, messages: queue.Queue[Message], home: Path) -> _Running:
    """The process of a run, which finds its paths from `home` on, with a thread that passes on what it says."""
    log = tempfile.TemporaryFile()  # noqa: SIM115 - for as long as the process
    process = subprocess.Popen(
        own_python("capcli.sweeping.worker"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        cwd=home,
        start_new_session=True,  # a signal of the terminal is for the sweep, which passes it on
    )
    found = _Running(job=job, process=process, log=log)
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # then it ended at once, and says so
        process.stdin.write(job.line)
        process.stdin.flush()
    found.reader = threading.Thread(target=_pass_on, args=(found, messages), daemon=True)
    found.reader.start()
    return found


def _pass_on(one: _Running, messages: queue.Queue[Message]) -> None:
    """What a process says, line by line, and that it has no more to say."""
    assert one.process.stdout is not None
    for line in one.process.stdout:
        with contextlib.suppress(ValueError):  # the last line of a process that was killed
            messages.put((one, json.loads(line)))
    messages.put((one, None))
