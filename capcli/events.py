"""What long work says of itself, and how it is asked to stop: events, the stop flag, signals."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, TypeVar

from capcli.errors import Stopped

Result = TypeVar("Result")
Own = TypeVar("Own")
Other = TypeVar("Other")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run: `done` of `total` units of a phase, and the share of the whole run.

    `note` is news, worth a line of its own; `status` only says how things stand. `whole`: what the share is of.
    `numbers`: what was measured up to `done`, by name, for experiment trackers.
    """

    phase: str
    done: float = 0
    total: float = 0
    overall: float = 0.0
    note: str = ""
    status: str = ""
    whole: str = "run"
    numbers: Mapping[str, float] = field(default_factory=dict)


def finished(events: Generator[Any, None, Result]) -> Result:
    """What a generator of events returns at its end; the events are dropped."""
    while True:
        try:
            next(events)
        except StopIteration as stop:
            found: Result = stop.value
            return found


def changed(work: Generator[Own, None, Result], change: Callable[[Own], Other]) -> Generator[Other, None, Result]:
    """Work whose progress is said otherwise; it is closed when this is, or one raises."""
    with contextlib.closing(work):
        while True:
            try:
                own = next(work)
            except StopIteration as stop:
                found: Result = stop.value
                return found
            yield change(own)


def part_of(work: Generator[Event, None, Result], begin: float, share: float) -> Generator[Event, None, Result]:
    """The events of work that is a `share` of the whole from `begin` on."""
    return changed(work, lambda event: replace(event, overall=begin + share * event.overall))


def told(
    work: Generator[tuple[float, float], None, Result], event: Callable[..., Event]
) -> Generator[Event, None, Result]:
    """Work that yields how much is done, of how much, as events."""
    return changed(work, lambda progress: event(done=progress[0], total=progress[1]))


@dataclass
class StopFlag:
    """Set by a signal or a time limit, looked at between steps. The first signal only sets it.

    paused: seconds that the work stood still for that of others.
    """

    reason: str = ""
    deadline: float = float("inf")
    paused: float = 0.0

    def requested(self) -> str:
        """Why the run should stop, or an empty string."""
        if not self.reason and time.monotonic() > self.deadline:
            self.reason = "the time limit"
        return self.reason

    def check(self) -> None:
        """Raise `Stopped` where nothing needs saving."""
        if self.requested():
            raise Stopped(
                f"stopped by {self.reason}; all finished work is saved", "run the same command again to continue"
            )


@contextlib.contextmanager
def signals(flag: StopFlag) -> Iterator[None]:
    """While inside, SIGINT, SIGTERM, SIGHUP and SIGUSR1 set the flag; a second Ctrl-C interrupts at once."""

    def handle(number: int, _frame: FrameType | None) -> None:
        flag.reason = signal.Signals(number).name
        if "SIGINT" in names:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    names = [name for name in names if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN]  # nohup
    before = {name: signal.signal(getattr(signal, name), handle) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
