"""Runs of a sweep as forks of this process, which has the libraries loaded.

In a process of its own, most of the time of a small run goes to loading them.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from tiny import forked, wait

from capcli.sweeping import jobs, worker

STDIN, STDOUT, STDERR, OTHERS = 0, 1, 2, range(3, 1024)


class Fork:
    """What a sweep uses of `subprocess.Popen`."""

    def __init__(
        self, command: Sequence[str], *, stdin: int, stdout: int, stderr: IO[bytes], cwd: Path, start_new_session: bool
    ) -> None:
        assert command and stdin == stdout == subprocess.PIPE and start_new_session
        (read, write), (heard, said) = os.pipe(), os.pipe()

        def run() -> None:
            os.setsid()
            for ours, theirs in ((read, STDIN), (said, STDOUT), (stderr.fileno(), STDERR)):
                os.dup2(ours, theirs)
            os.closerange(OTHERS.start, OTHERS.stop)  # among them the pipes to other runs, which would keep them open
            os.chdir(cwd)
            worker.main()

        self.pid = forked(run)
        os.close(read)
        os.close(said)
        self.stdin, self.stdout = os.fdopen(write, "wb"), os.fdopen(heard, "rb")
        self.code: int | None = None

    def wait(self) -> int:
        """How it ended."""
        if self.code is None:
            self.code = wait(self.pid)
        return self.code

    def kill(self) -> None:
        """As SIGKILL does."""
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def sweeps_fork() -> Iterator[Any]:
    """Sweeps fork their runs; what tests have changed in this process holds in them too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "subprocess", SimpleNamespace(Popen=Fork, PIPE=subprocess.PIPE))
        yield patch
