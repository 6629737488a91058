"""One run of a sweep, in a process of its own that calls `main`.

It reads what to do as one line of JSON from stdin, and writes its events as lines of JSON to stdout, the last of which
says how it ended. When stdin is closed, as when the process of the sweep is gone, it stops with a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from capcli.config.layers import build
from capcli.config.prune import PruneConfig
from capcli.errors import CapError, RunFailed
from capcli.events import Event, StopFlag, signals
from capcli.sweeping import room
from capcli.verbs.prune import prune

STDIN, STDOUT, STDERR = 0, 1, 2
END = "ended"  # the key of the last line


def main() -> None:
    """Do what stdin says."""
    channel = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)  # what libraries print is not of the protocol
    job, flag = json.loads(_line()), StopFlag()
    threading.Thread(target=_stop_at_end, args=(flag,), daemon=True).start()
    sys.argv = ["cap", *job["words"]]  # the command in its report
    with os.fdopen(channel, "w", encoding="ascii") as pipe, signals(flag):

        def send(message: Mapping[str, Any]) -> None:
            pipe.write(json.dumps(message, default=float) + "\n")
            pipe.flush()

        send({END: _ended(job, flag, send)})


def _ended(job: Mapping[str, Any], flag: StopFlag, send: Callable[[Mapping[str, Any]], None]) -> dict[str, Any]:
    """Run to the end; how it ended, as message, hint and exit code."""
    try:
        _run(job, flag, send)
    except CapError as error:
        return {"message": error.message, "hint": error.hint, "code": error.exit_code}
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        message = f"internal error: {type(error).__name__}: {first}"
        return {
            "message": message,
            "hint": "see its command alone with --debug, and report it",
            "code": RunFailed.exit_code,
        }
    return {"message": "", "hint": "", "code": 0}


def _run(job: Mapping[str, Any], flag: StopFlag, send: Callable[[Mapping[str, Any]], None]) -> None:
    config: PruneConfig = build(PruneConfig, job["config"])
    events = prune(config, flag=flag, overwrite=job["overwrite"], shared=Path(job["shared"]))
    with contextlib.closing(events), room.entered(Path(job["room"]), flag) as at:
        for event in events:
            send(dataclasses.asdict(event))
            at(event)


def _line() -> bytes:
    """The first line of stdin; read without a buffer, for the thread that waits for its end."""
    found = b""
    while not found.endswith(b"\n") and (part := os.read(STDIN, 1)):
        found += part
    return found


def _stop_at_end(flag: StopFlag) -> None:
    """Ask the run to stop when stdin is closed."""
    while os.read(STDIN, 4096):
        pass
    flag.reason = flag.reason or "the sweep"


def event_of(message: Mapping[str, Any]) -> Event:
    """The event in a line."""
    return Event(**message)
