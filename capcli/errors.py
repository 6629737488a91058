"""Every error that reaches a user, with the exit code it ends in.

CapError                  message + hint, exit code 2 unless a child says otherwise
├── ConfigError       2   bad usage, option or configuration
├── ModelError        2   a model that is missing, incomplete or of an unknown kind
├── DataError         2   a data set, column or label that does not fit
├── FileError         2   a file that is missing, unreadable or malformed
├── CheckFailed       1   finished, but what was written is not what it should be
├── RunFailed         3   the run itself failed: non-finite loss, out of memory, disk full
└── Stopped          75   stopped by a signal or a time limit; the checkpoint is saved
"""


class CapError(Exception):
    """An error a user can act on: what happened, and a hint how to go on.

    Of several processes: `rank` is the one that it comes from, if not from this one; `told`, whether another says it,
    once that is known.
    """

    exit_code = 2
    rank: int | None = None
    told: bool | None = None

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(CapError):
    """Bad usage, option or configuration."""


class ModelError(CapError):
    """A model that is missing, incomplete or of an unknown kind."""


class DataError(CapError):
    """A data set, column or label that does not fit."""


class FileError(CapError):
    """A file that is missing, unreadable or malformed."""


class CheckFailed(CapError):
    """What was written is not what it should be; nothing of it is left."""

    exit_code = 1


class RunFailed(CapError):
    """The run itself failed; the last good checkpoint is kept."""

    exit_code = 3


class Stopped(CapError):
    """Stopped by a signal or a time limit; the same command continues."""

    exit_code = 75


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of a device ran out."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate" in said


def first_line(error: BaseException) -> str:
    """The first line of an error's text, and the next one where it ends in a colon; or its type."""
    if isinstance(error, KeyError):
        return f"there is no {str(error)[:300]}"
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join([first, *rest[: first.endswith(":")]])[:300]
