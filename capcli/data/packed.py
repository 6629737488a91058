"""Compressed files as streams of bytes, by their ending: gzip, bzip2, xz, zstandard, and zip with one file in it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from capcli.errors import DataError


def _zstandard(path: Path) -> IO[bytes]:
    import pyarrow  # type: ignore[import-untyped]

    return cast("IO[bytes]", io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))


def _only_member(path: Path) -> IO[bytes]:
    """The file in a zip archive; what a Mac adds does not count. Raises `DataError` unless there is exactly one."""
    archive = zipfile.ZipFile(path)
    names = [one.filename for one in archive.infolist() if not (one.is_dir() or one.filename.startswith("__MACOSX/"))]
    if len(names) != 1:
        archive.close()
        raise DataError(f"{path} holds {len(names)} files, not one", "unpack it, and give the folder")
    return archive.open(names[0])


@dataclass(frozen=True, kw_only=True)
class Packing:
    """name: how messages call it. mark: how its files begin. open: the bytes inside."""

    name: str
    mark: bytes
    open: Callable[[Path], IO[bytes] | io.BufferedIOBase]


PACKINGS = {
    ".gz": Packing(name="gzip", mark=b"\x1f\x8b", open=gzip.GzipFile),
    ".bz2": Packing(name="bzip2", mark=b"BZh", open=bz2.BZ2File),
    ".xz": Packing(name="xz", mark=b"\xfd7zXZ", open=lzma.LZMAFile),
    ".zst": Packing(name="zstd", mark=b"\x28\xb5\x2f\xfd", open=_zstandard),
    ".zip": Packing(name="zip", mark=b"PK", open=_only_member),
}


DAMAGED = (EOFError, lzma.LZMAError, zipfile.BadZipFile, zlib.error)  # what reading raises, besides `OSError`


def packing(path: Path) -> Packing | None:
    """How a file is compressed, by its name; None for a plain one."""
    return PACKINGS.get(path.suffix.lower())


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked while they are read. Raises `OSError` and the errors of the packings."""
    found = packing(path)
    return cast("IO[bytes]", found.open(path)) if found else path.open("rb")
