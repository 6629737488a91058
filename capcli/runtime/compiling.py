"""Compiling kernels, and keeping the code on disk where nobody else can put any.

numba stores compiled code with pickle, so it is read from a folder only that is the user's own: below the cache folder
of capcli, or `NUMBA_CACHE_DIR`. Where that is not possible, kernels are compiled anew in each process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core import config

from capcli.data.cache import cache_folder

# Python's check for a division by zero would stop vectorisation. Of the liberties of fast mathematics those are taken
# that keep NaN and infinity: fused multiply-adds, and no difference between 0.0 and -0.0.
OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nsz"}}
_OTHERS_WRITE = stat.S_IWOTH

inner = numba.njit(**OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Decorator of a function that kernels call; it becomes part of their code."""


class Kernel:
    """A compiled function that Python calls, kept on disk if possible. Failing to read or write that is no failure."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.compiled: Any = None

    def prepare(self) -> None:
        """Find out where the code is kept, before several threads ask for it at once; nothing is compiled yet."""
        if self.compiled is None:
            self.compiled = _kept(self.function) or numba.njit(**OPTIONS)(self.function)

    def __call__(self, *arguments: Any) -> None:
        self.prepare()
        try:
            self.compiled(*arguments)
        except Exception:  # of reading or writing the code: the kernels themselves raise nothing
            self.compiled = numba.njit(**OPTIONS)(self.function)
            self.compiled(*arguments)


def _kept(function: Callable[..., Any]) -> Any:
    """The function compiled with a cache on disk; None where there can be none."""
    with contextlib.suppress(OSError, RuntimeError), _in_folder(kernel_folder()):
        return numba.njit(**OPTIONS, cache=True)(function)
    return None


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    """numba looks for the place of a function's code when it is decorated; what others decorate is left alone."""
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder)
    try:
        yield
    finally:
        config.CACHE_DIR = before


@functools.cache
def kernel_folder() -> Path:
    """The folder for the code of these very kernels. Raises `OSError` where it is not the user's own, or not writable.

    numba looks at the file of a function alone, not at those that it calls: the name depends on all of them.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    top = Path(chosen) if chosen else cache_folder()
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    folder = top / "kernels" / digest.hexdigest()[:16]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in (folder, folder.parent, top):
        _check_own(place)
    with tempfile.TemporaryFile(dir=folder):
        return folder


def _check_own(folder: Path) -> None:
    found = folder.stat()
    if hasattr(os, "getuid") and (found.st_uid not in (os.getuid(), 0) or found.st_mode & _OTHERS_WRITE):
        raise PermissionError(f"others can write to {folder}")
