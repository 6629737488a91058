"""Following a run in an experiment tracker, which never changes or stops it.

The tracker is a process of its own: what it imports, prints, draws at random or waits for is not of the run. What is
said to it goes through a pipe that is never waited for; when it is full, numbers are dropped and counted. A tracker
that is not installed, fails or does not finish in time is a note.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any, TypeVar

from capcli.events import Event
from capcli.machine import own_python
from capcli.reporting.text import counted, discreet, plain
from capcli.trackers import About

T = TypeVar("T")

FINISH_SECONDS = 30.0  # for a tracker to send what it holds, when the run is over
PIPE_BYTES = 1 << 20  # of the pipe, where the system lets it grow


def tracked(
    work: Generator[Event, None, T], tracker: str, about: About, summary: Callable[[T], Mapping[str, float]]
) -> Generator[Event, None, T]:
    """The events of a run, whose numbers go to a tracker as well, and at the end a summary of its result.

    tracker: a name of `TRACKERS`; empty for none. Raises what the work raises, and nothing else.
    """
    if not tracker:
        return (yield from work)
    if find_spec(tracker) is None:
        yield Event(phase="track", note=f"{tracker} is not installed, so the run is not tracked: pip install {tracker}")
        return (yield from work)
    with contextlib.closing(work), _Line(tracker) as line:
        line.start(about)
        overall = 0.0
        while True:
            try:
                event = next(work)
            except StopIteration as stop:
                result: T = stop.value
                break
            overall = event.overall
            if event.numbers:
                line.log(event.phase, int(event.done), event.numbers)
            yield event
            for note in line.news():
                yield Event(phase="track", note=note, overall=overall)
        line.finish(summary(result))
        for note in line.news():
            yield Event(phase="track", note=note, overall=overall)
        return result


class _Line(contextlib.AbstractContextManager["_Line"]):
    """The process of a tracker, and the pipes to and from it. Nothing here raises or waits, but for `finish`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process: subprocess.Popen[bytes] | None = None
        self.to = self.back = -1  # the pipes
        self.unsent, self.unread = b"", b""  # of lines that were begun
        self.dropped = 0
        self.notes: list[str] = []

    def __exit__(self, *_: object) -> None:
        """Of a run that was stopped or failed: the tracker may end it, and is not waited for."""
        if self.process is not None:
            self._hang_up()

    def start(self, about: About) -> None:
        """Start the process and say what the run is."""
        if sys.platform == "win32" or not hasattr(os, "set_blocking"):
            return self._off("this system has no pipes that are never waited for")
        try:
            self.process = subprocess.Popen(
                own_python("capcli.trackers"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # a signal of the terminal is for the run
            )
        except OSError as error:
            return self._off(str(error))
        assert self.process.stdin is not None and self.process.stdout is not None
        self.to, self.back = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.to, False)
        os.set_blocking(self.back, False)
        with contextlib.suppress(ImportError, AttributeError, OSError):  # not on every system
            import fcntl

            fcntl.fcntl(self.to, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._send({"tracker": self.name, **asdict(about)})

    def log(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        """Say numbers of a step."""
        named = {f"{phase}/{name}": number for name, number in numbers.items() if math.isfinite(number)}
        self._send({"phase": phase, "step": step, "numbers": named})

    def news(self) -> list[str]:
        """What is to be told of the tracker since the last time."""
        self._hear()
        found, self.notes = self.notes, []
        return found

    def finish(self, summary: Mapping[str, float]) -> None:
        """Say how the run ended, and give the tracker some time to pass on what it holds."""
        deadline = time.monotonic() + FINISH_SECONDS
        if self.process is not None:
            select.select([], [self.to], [], FINISH_SECONDS)
            self._send({"summary": {name: value for name, value in summary.items() if math.isfinite(value)}})
        if self.process is not None:
            self._hang_up()
            try:
                self.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._off(f"it did not finish in {FINISH_SECONDS:.0f} s")
        self._hear()
        if self.process is not None and self.process.returncode:
            self._off(f"it ended with code {self.process.returncode}")
        if self.dropped:
            lost = counted(self.dropped, "step")
            self.notes.append(f"{self.name} was slower than the run: the numbers of {lost} were not logged")

    def _hang_up(self) -> None:
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        """Put a line into the pipe, if there is room for it behind what is left of the one before."""
        if self.process is None:
            return
        line = json.dumps(message, default=str).encode("ascii") + b"\n"
        self.unsent = self._written(self.unsent)
        left = line if self.unsent else self._written(line)
        if left == line:
            self.dropped += 1
        else:
            self.unsent = left

    def _written(self, data: bytes) -> bytes:
        """Write what there is room for; returns the rest."""
        if self.process is None or not data:
            return b""
        try:
            return data[os.write(self.to, data) :]
        except BlockingIOError:
            return data
        except OSError:
            self._hear()
            if self.process is not None:
                self._off("it ended unexpectedly")
            return b""

    def _hear(self) -> None:
        """Read the answers that are there."""
        if self.process is None:
            return
        with contextlib.suppress(OSError):
            while part := os.read(self.back, 4096):
                self.unread += part
        *lines, self.unread = self.unread.split(b"\n")
        for line in lines:
            said = json.loads(line)
            if "failed" in said:
                self._off(said["failed"])
            else:
                self.notes.append(f"{self.name}: {plain(discreet(said['place']), 300)}")

    def _off(self, why: str) -> None:
        """End the process; no more is said to it."""
        self.notes.append(f"{self.name} failed, so the run is not tracked any more: {plain(discreet(why), 300)}")
        if self.process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and what it started
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                assert stream is not None
                stream.close()
        self.process = None
