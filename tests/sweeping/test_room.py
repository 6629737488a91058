"""Runs at the same time: while one measures no other works. A run that waits in vain stops after `PATIENCE` seconds."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from capcli.events import Event, StopFlag
from capcli.sweeping import room

STEP, MEASURING = Event(phase="prune"), Event(phase="latency")
PATIENCE = 60.0


def patient() -> StopFlag:
    return StopFlag(deadline=time.monotonic() + PATIENCE)


def can_work(folder: Path) -> bool:
    """Whether one more run could work there now."""
    handle = os.open(folder / room.BUSY, os.O_RDWR)
    try:
        return room._take(handle, alone=False)
    finally:
        os.close(handle)


def test_it_is_empty_when_no_run_works(tmp_path: Path) -> None:
    assert room.is_empty(tmp_path)
    with room.entered(tmp_path, patient()) as at:
        at(STEP)
        assert not room.is_empty(tmp_path)
    assert room.is_empty(tmp_path)


def test_several_work_together(tmp_path: Path) -> None:
    with room.entered(tmp_path, patient()) as first, room.entered(tmp_path, patient()) as second:
        for _ in range(3):
            first(STEP)
            second(STEP)
        assert can_work(tmp_path)


def test_one_that_measures_is_alone(tmp_path: Path) -> None:
    with room.entered(tmp_path, patient()) as at:
        for event in (STEP, MEASURING, MEASURING):
            at(event)
        assert not can_work(tmp_path)
    assert can_work(tmp_path)


def test_while_one_measures_the_others_wait(tmp_path: Path) -> None:
    """The other is in the middle of its steps; it lets go at the next, and goes on when the measurement is over."""
    flags, over, n_steps = [patient(), patient()], threading.Event(), [0]

    def work() -> None:
        with room.entered(tmp_path, flags[1]) as at:
            while not over.is_set() and not flags[1].requested():
                at(STEP)
                n_steps[0] += 1

    worker = threading.Thread(target=work)
    with room.entered(tmp_path, flags[0]) as measuring:
        worker.start()
        while not n_steps[0]:
            measuring(STEP)
        measuring(MEASURING)
        assert not can_work(tmp_path)
        over.set()
    worker.join()
    assert not any(flag.reason for flag in flags), "nobody waited in vain"
    assert flags[1].paused > 0, "which is no time of its run"


def test_two_that_would_measure_take_turns(tmp_path: Path) -> None:
    """Each lets go of its place before it waits for the turn; else neither could begin."""
    flags, entered = [patient(), patient()], threading.Barrier(2)
    alone = []

    def work(flag: StopFlag) -> None:
        with room.entered(tmp_path, flag) as at:
            entered.wait()
            at(MEASURING)
            alone.append(not can_work(tmp_path))

    workers = [threading.Thread(target=work, args=(flag,)) for flag in flags]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert alone == [True, True]
    assert not any(flag.reason for flag in flags)


def test_a_run_that_is_to_stop_waits_for_nothing(tmp_path: Path) -> None:
    with room.entered(tmp_path, patient()) as measuring:
        measuring(MEASURING)
        with room.entered(tmp_path, StopFlag(reason="the test")) as at:
            at(STEP)
