"""Showing how far a run is: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, TypeVar

from capcli.cli.output import logged, say, shown
from capcli.errors import Stopped
from capcli.reporting.text import duration, plain

if TYPE_CHECKING:
    from rich.progress import TaskID

    from capcli.events import Event, StopFlag

T = TypeVar("T")


def watch(events: Generator[Event, None, T], quiet: bool, flag: StopFlag | None = None, *, bars: bool = True) -> T:
    """Show events as they come; returns the result. Raises `Stopped` between two events once the flag is set.

    bars: whether they may be drawn, on a terminal that nothing else is written to.
    """
    show = (lambda event: None) if quiet else _bars() if bars and sys.stderr.isatty() else _lines()
    with (
        contextlib.closing(events),
        show if isinstance(show, contextlib.AbstractContextManager) else contextlib.nullcontext(),
    ):
        while True:
            try:
                event = next(events)
                show(event)
                if flag and event.overall < 1 and (why := flag.requested()):
                    raise Stopped(f"stopped by {why}; nothing was written", "run the same command again")
            except StopIteration as stop:
                result: T = stop.value
                return result


class _lines:
    """Plain lines: every note that is news, and where the run stands at most every ten seconds."""

    every_seconds = 10.0

    def __init__(self) -> None:
        self.began, self.said_at = time.monotonic(), time.monotonic()

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if event.note:
            say(f"{event.phase}: {event.note}")
        elif now - self.said_at >= self.every_seconds and (event.total or event.status):
            left = remaining(now - self.began, event.overall)
            state = event.status or f"{event.done:,.0f} of {event.total:,.0f}"
            say(
                f"{event.phase}: {state}" + (f"; {event.overall:.0%} of the {event.whole}{left}" if event.total else "")
            )
        else:
            return
        self.said_at = now


def remaining(elapsed: float, share: float) -> str:
    """`, 3 min left`, once enough of the run has passed to tell."""
    return f", {duration(elapsed * (1 - share) / share)} left" if share > 0.02 else ""


class _bars(contextlib.AbstractContextManager["_bars"]):
    """Two bars on a terminal: the phase and the whole run, each with the time that passed and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TimeElapsedColumn(),
            TextColumn("passed,", markup=False),
            TimeRemainingColumn(),
            TextColumn("left", markup=False),
        )
        self.progress = Progress(*columns, console=Console(stderr=True, markup=False, highlight=False), transient=True)
        self.run, self.name = self.progress.add_task("whole run", total=1.0), ""
        self.phase: TaskID | None = None

    def __enter__(self) -> _bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        if event.phase != self.name:
            if self.phase is not None:
                self.progress.remove_task(self.phase)
            self.name, self.phase = event.phase, self.progress.add_task(event.phase, total=event.total or None)
        assert self.phase is not None
        if event.note:
            self.progress.console.print(shown(f"{event.phase}: {event.note}"))
        text = logged(plain(f"{event.phase} ({event.status})" if event.status else event.phase))
        self.progress.update(self.phase, description=text, completed=event.done, total=event.total or None)
        self.progress.update(self.run, description=f"whole {event.whole}", completed=event.overall)
