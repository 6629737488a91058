"""Run commands of `cap` as far as that can be told on Linux as on a system that is not POSIX, such as Windows.

    python tests/without_posix.py < commands.json

For the modules of capcli, `os` and `signal` are without what is not there on Windows, and modules of Unix cannot be
imported; libraries, which are made for this system, see it as it is. Folders cannot be opened; a handle that may not
write cannot be synced; a file that is open in this process, or mapped, can be neither renamed, replaced nor removed,
nor can a folder above it.

Prints, as JSON, exit code, stdout and stderr of each command, and what was tried in vain.
"""

from __future__ import annotations

import builtins
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from tiny import invoke

MODULES = ("fcntl", "grp", "pwd", "pty", "readline", "resource", "syslog", "termios", "tty")
OS = (
    *("O_CLOEXEC", "O_DIRECTORY", "O_DSYNC", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC", "WNOHANG"),
    *("chown", "fchmod", "fchown", "fork", "forkpty", "fstatvfs", "getegid", "geteuid", "getgid", "getloadavg"),
    *("getpgid", "getpgrp", "getpriority", "getsid", "getuid", "killpg", "lchown", "memfd_create", "mkfifo", "mknod"),
    *("nice", "posix_fadvise", "posix_fallocate", "posix_spawn", "pread", "pwrite", "sched_getaffinity", "sendfile"),
    *("sched_setaffinity", "set_blocking", "setpgid", "setsid", "statvfs", "sync", "sysconf", "uname", "wait", "wait3"),
)
SIGNALS = (
    *("SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP", "SIGUSR1"),
    *("SIGUSR2", "SIGWINCH", "alarm", "pause", "pthread_kill", "setitimer", "sigwait", "siginterrupt"),
)
vain: list[str] = []


def refuse(what: str, path: Any) -> None:
    vain.append(f"{what} {path}")
    raise PermissionError(13, "Permission denied", str(path))


def in_use(path: Any) -> bool:
    """Whether this process has a file open or mapped, or one below a folder."""
    place = Path(os.fsdecode(path)).absolute()
    links = [handle for handle in Path("/proc/self/fd").iterdir() if handle.is_symlink()]  # not that of this very list
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    names = {*(str(link.readlink()) for link in links), *(words[5] for words in maps if len(words) == 6)}
    return any(name == str(place) or Path(name).is_relative_to(place) for name in names)


def guarded(name: str, whole: Callable[..., Any]) -> Callable[..., Any]:
    """A function that moves or removes paths, for such as are not in use."""

    def call(*arguments: Any, **named: Any) -> Any:
        for path in arguments[: 2 if name in ("rename", "replace") else 1]:
            if os.path.lexists(path) and in_use(path):
                refuse(name, path)
        return whole(*arguments, **named)

    return call


def open_(path: Any, flags: int, *rest: Any, **named: Any) -> int:
    """`os.open`, but not of folders."""
    if Path(path).is_dir():
        refuse("open", path)
    return os.open(path, flags, *rest, **named)


def fsync(handle: int) -> None:
    """`os.fsync`, but of what may be written alone."""
    if fcntl.fcntl(handle, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR) == 0:
        refuse("fsync", handle)
    os.fsync(handle)


def without(module: ModuleType, names: tuple[str, ...], **changes: Any) -> ModuleType:
    """A module that lacks some names."""
    found = ModuleType(module.__name__)
    vars(found).update({name: value for name, value in vars(module).items() if name not in names} | changes)
    return found


def hide() -> None:
    """Make this process one that is not on Unix, as far as capcli can see."""
    seen = {"os": without(os, OS, open=open_, fsync=fsync), "signal": without(signal, SIGNALS)}
    whole = builtins.__import__

    def import_(name: str, space: Any = None, *rest: Any, **named: Any) -> Any:
        if space and space.get("__name__", "").startswith("capcli"):
            if name in MODULES:
                raise ModuleNotFoundError(f"No module named {name!r}")
            if name in seen:
                return seen[name]
        return whole(name, space, *rest, **named)

    builtins.__import__ = import_
    shutil._use_fd_functions = False  # of whole folders too, each path is looked at
    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        setattr(os, name, guarded(name, getattr(os, name)))


def main() -> None:
    commands = json.load(sys.stdin)
    hide()
    import capcli.files

    assert not capcli.files.POSIX
    import torch

    torch.set_num_threads(1)
    rows = []
    for arguments in commands:
        done = invoke(*arguments)
        rows.append([done.exit_code, done.stdout, done.stderr])
    print(json.dumps({"said": rows, "vain": vain}))


if __name__ == "__main__":
    main()
