"""The standard streams of the process: output never ends the work, whoever reads it and however little it can hold.

`guard` replaces stdout and stderr by streams that note a failed write and go on without the reader, and that write what
their encoding does not know in other letters. `failure` says afterwards whether stdout could not be written, which is
not the case when its reader has only gone away or was never there.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import sys
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EBADF, errno.ESHUTDOWN)  # nobody reads any more
LETTERS = {"×": "x", "–": "-", "—": "-", "…": "...", "±": "+-", "→": "->", "−": "-", "\N{NO-BREAK SPACE}": " "}


class Stream:
    """A text stream to which every write succeeds; the first error of the one below is `failed`."""

    def __init__(self, below: TextIO) -> None:
        self.below = below
        self.failed: OSError | None = None
        self.muted = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)

    def write(self, text: str) -> int:
        """Write, unless a write failed before, or nothing is to be written."""
        if self.muted:
            return len(text)
        self._try(lambda: self.below.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, unless a write failed before."""
        self._try(self.below.flush)

    def _try(self, action: Any) -> None:
        if self.failed is not None:
            return
        try:
            action()
        except OSError as error:
            self.failed = error
            with contextlib.suppress(OSError, ValueError):  # what is still buffered must not fail again at the end
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.below.fileno())
                os.close(null)


def guard() -> None:
    """Make stdin, stdout and stderr usable, also where the caller closed them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # or the next file that is opened would be taken for it
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as the process
    sys.stdout = _guarded(sys.stdout, 1)
    sys.stderr = _guarded(sys.stderr, 2)


def _guarded(stream: TextIO | None, number: int) -> Any:
    below = stream or open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for as long as the process
    if hasattr(below, "reconfigure"):
        below.reconfigure(errors="capcli-letters")
    return Stream(below)


def mute() -> None:
    """Write nothing any more: another process speaks for this one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, Stream):
            stream.muted = True


def muted() -> bool:
    """Whether another process speaks for this one."""
    return getattr(sys.stderr, "muted", False)


def speak() -> None:
    """Write to stderr again: nobody else says this."""
    if isinstance(sys.stderr, Stream):
        sys.stderr.muted = False


def failure() -> OSError | None:
    """Why stdout could not be written, after a last flush; None also when nobody wanted to read it."""
    sys.stdout.flush()
    sys.stderr.flush()
    found = getattr(sys.stdout, "failed", None)
    return found if found is not None and found.errno not in GONE else None


def _other_letters(error: UnicodeError) -> tuple[str, int]:
    """What a stream writes for characters that its encoding does not know: ASCII that looks alike, or the escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(LETTERS.get(char) or char.encode("ascii", "backslashreplace").decode() for char in wrong), error.end


codecs.register_error("capcli-letters", _other_letters)
