"""Showing how far a run is: bars on a terminal or in a notebook, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, TypeVar

from capcli.errors import Stopped
from capcli.reporting.text import duration, plain

if TYPE_CHECKING:
    from rich.progress import TaskID

    from capcli.events import Event, StopFlag

T = TypeVar("T")


def watch(events: Generator[Event, None, T], show: Callable[[Event], None], flag: StopFlag | None = None) -> T:
    """Show events as they come; returns the result. Raises `Stopped` between two events once the flag is set.

    show: `Bars`, `Lines` or `nowhere`.
    """
    with (
        contextlib.closing(events),
        show if isinstance(show, contextlib.AbstractContextManager) else contextlib.nullcontext(),
    ):
        while True:
            try:
                event = next(events)
                show(event)
                if flag and event.overall < 1 and (why := flag.requested()):
                    events.throw(Stopped(f"stopped by {why}; nothing was written", "run the same command again"))
            except StopIteration as stop:
                result: T = stop.value
                return result


def nowhere(event: Event) -> None:
    """Show nothing."""


def on_terminal() -> bool:
    """Whether stderr is one, so that bars can be drawn."""
    return sys.stderr.isatty()


def in_notebook() -> bool:
    """Whether this runs in a notebook, which draws bars itself."""
    from rich.console import Console

    return Console().is_jupyter


class Lines:
    """Plain lines for `say`: every note that is news, and where the run stands at most every ten seconds."""

    every_seconds = 10.0

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.began, self.said_at = time.monotonic(), time.monotonic()

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if event.note:
            self.say(f"{event.phase}: {event.note}")
        elif not event.numbers and now - self.said_at >= self.every_seconds and (event.total or event.status):
            left = remaining(now - self.began, event.overall)
            state = event.status or f"{event.done:,.0f} of {event.total:,.0f}"
            share = f"; {event.overall:.0%} of the {event.whole}{left}" if event.total else ""
            self.say(f"{event.phase}: {state}{share}")
        else:
            return
        self.said_at = now


def remaining(elapsed: float, share: float) -> str:
    """`, 3 min left`, once enough of the run has passed to tell."""
    return f", {duration(elapsed * (1 - share) / share)} left" if share > 0.02 else ""


class Bars(contextlib.AbstractContextManager["Bars"]):
    """Two bars on a terminal or in a notebook: the phase and the whole run, each with the time that passed and the time
    left. clean: makes a text such that nothing in it acts."""

    def __init__(self, clean: Callable[[str], str] = plain) -> None:
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
        self.clean = clean
        self.progress = Progress(*columns, console=Console(stderr=True, markup=False, highlight=False), transient=True)
        self.run, self.name = self.progress.add_task("whole run", total=1.0), ""
        self.phase: TaskID | None = None

    def __enter__(self) -> Bars:
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
            self.progress.console.print(self.clean(f"{event.phase}: {event.note}"))
        text = self.clean(f"{event.phase} ({event.status})" if event.status else event.phase)
        self.progress.update(self.phase, description=text, completed=event.done, total=event.total or None)
        self.progress.update(self.run, description=f"whole {event.whole}", completed=event.overall)
