"""Runs at the same time, of which one at a time measures how fast it is while the others wait.

Each run holds `busy` together with the others as long as it works. One that measures takes `turn` for itself, then
`busy`; the others see at their next event that `turn` is taken, let go of `busy`, and wait. Where the system has no
such locks nobody waits.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from capcli import files
from capcli.events import Event, StopFlag

BUSY, TURN = ".busy", ".turn"
MEASURED = "latency"  # the last phase of a run
WAIT_SECONDS = 0.05


@contextlib.contextmanager
def entered(folder: Path, flag: StopFlag) -> Iterator[Callable[[Event], None]]:
    """Be one of the runs that work at the same time; what is yielded is called at each event, and may wait."""
    with _opened(folder / BUSY) as busy, _opened(folder / TURN) as turn:
        _wait(busy, flag, alone=False)
        state = {"measuring": False}

        def at(event: Event) -> None:
            if state["measuring"]:
                return
            if event.phase == MEASURED:
                _release(busy)  # before it waits: who has the turn waits for this
                _wait(turn, flag, alone=True)
                _wait(busy, flag, alone=True)
                state["measuring"] = True
            elif not _take(turn, alone=False):
                _release(busy)
                _wait(turn, flag, alone=False)
                _release(turn)
                _wait(busy, flag, alone=False)
            else:
                _release(turn)

        yield at


def is_empty(folder: Path) -> bool:
    """Whether no run of an earlier process still works there."""
    if not (folder / BUSY).exists():
        return True
    with _opened(folder / BUSY) as busy:
        return _take(busy, alone=True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A lock file; closing it lets go of its lock."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | files.NOFOLLOW, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _wait(handle: int, flag: StopFlag, *, alone: bool) -> None:
    """Take a lock as soon as it is free; a run that is to stop waits for nothing."""
    began = time.monotonic()
    while not _take(handle, alone=alone) and not flag.requested():
        time.sleep(WAIT_SECONDS)
    flag.paused += time.monotonic() - began


def _take(handle: int, *, alone: bool) -> bool:
    """Take a lock, alone or together with others who do; False where that cannot be now."""
    try:
        import fcntl

        fcntl.flock(handle, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _release(handle: int) -> None:
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_UN)
