"""Arrays on disk that can be made again: tokens, vectors, what probes answered.

They are written while they are made, memory-mapped, and found again by what they were made from.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli import files
from capcli.errors import FileError, RunFailed
from capcli.stored import read_json

ENTRIES = {"tokens": 20, "vectors": 100, "answers": 400}
"""How many entries of each kind are kept at most."""
MOST_BYTES = 4_000_000_000
"""What the entries of a kind may take together."""
FAILURES = (FileError, RunFailed, OSError, RuntimeError)  # RuntimeError: there is no home folder
_LAYOUT = "arrays.json"
_STARTED = time.time()
_DAY_SECONDS = 86_400.0

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Flat arrays of some examples by name, of which those with the same name follow one another; n_cut: texts cut."""

    arrays: Arrays
    n_cut: int


def cache_folder() -> Path:
    """Where they are kept: `$CAP_CACHE`, or `capcli` in the user's folder for caches."""
    chosen = os.environ.get("CAP_CACHE", "")
    return (Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "capcli").expanduser()


def find(kind: str, key: str) -> Piece | None:
    """The arrays of an entry, if they are there."""
    with contextlib.suppress(*FAILURES):
        return _opened(cache_folder() / kind / key)
    return None


def mapped(key: str, pieces: Callable[[], Iterator[Piece]], kind: str = "tokens") -> Piece | None:
    """The arrays of an entry, written now unless they are there.

    When the cache cannot be written they are mapped from a folder that is removed at once; None when that fails too.
    """
    with contextlib.suppress(*FAILURES):
        folder = cache_folder() / kind
        if found := _opened(folder / key):
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(*FAILURES):  # another process may have published the same
            _write(folder / key, pieces())
        if found := _opened(folder / key):
            with contextlib.suppress(*FAILURES):
                _tidy(folder, ENTRIES[kind])
            return found
    with contextlib.suppress(*FAILURES), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        _write(Path(place) / key, pieces())
        return _opened(Path(place) / key)
    return None


def _write(folder: Path, pieces: Iterator[Piece]) -> None:
    """Publish the arrays as one little-endian file each, as they come, and their shapes."""
    layout: dict[str, Any] = {}
    n_cut = 0
    with files.publish(folder, suffix=f"{os.getpid()}.part") as staging:
        with contextlib.ExitStack() as stack:
            writers: dict[str, Callable[[bytes], None]] = {}
            for piece in pieces:
                n_cut += piece.n_cut
                for name, array in piece.arrays.items():
                    if name not in writers:
                        writers[name] = stack.enter_context(files.append(staging / f"{name}.bin"))
                        layout[name] = {"dtype": array.dtype.newbyteorder("<").str, "shape": [0, *array.shape[1:]]}
                    layout[name]["shape"][0] += len(array)
                    writers[name](array.astype(layout[name]["dtype"], copy=False).tobytes())
        files.write_json(staging / _LAYOUT, {"n_cut": n_cut, "arrays": layout})


def _opened(folder: Path) -> Piece | None:
    """The arrays in `folder`, memory-mapped; None unless every byte is there as it was written."""
    if not files.is_complete(folder):
        return None
    layout = read_json(folder / _LAYOUT)
    arrays: Arrays = {}
    for name, found in layout["arrays"].items():
        dtype, shape = np.dtype(found["dtype"]), tuple(found["shape"])
        empty = 0 in shape  # which cannot be mapped
        arrays[name] = np.zeros(shape, dtype) if empty else np.memmap(folder / f"{name}.bin", dtype, "r", shape=shape)
    with contextlib.suppress(OSError):
        os.utime(folder)  # the newest entries are kept
    return Piece(arrays={name: np.asarray(array) for name, array in arrays.items()}, n_cut=int(layout["n_cut"]))


def _tidy(folder: Path, entries: int) -> None:
    """Keep the newest entries and all that this process used; remove what killed processes left."""
    ages = {entry: entry.stat().st_mtime for entry in folder.iterdir() if entry.is_dir()}
    parts = [entry for entry in ages if entry.name.startswith(".")]
    whole = sorted(ages.keys() - set(parts), key=lambda entry: -ages[entry])
    totals = itertools.accumulate(sum(file.stat().st_size for file in entry.iterdir()) for entry in whole)
    beyond = [
        entry for i, (entry, total) in enumerate(zip(whole, totals, strict=True)) if i >= entries or total > MOST_BYTES
    ]
    old = [entry for entry in beyond if ages[entry] < _STARTED]
    for entry in (*old, *(part for part in parts if ages[part] < _STARTED - _DAY_SECONDS)):
        files.remove(entry)
