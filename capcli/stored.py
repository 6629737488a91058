"""Reading what others, or an earlier run, wrote: bounded files, tables whose parts may be absent or of any type.

A file is a regular file of a known largest size before a byte of it is read: opening a FIFO waits, and opening a device
can do anything. Every failure is a `FileError` that names the file.
"""

from __future__ import annotations

import codecs
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capcli.errors import FileError

if TYPE_CHECKING:
    import torch


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a table, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> Sequence[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list | tuple) else ()


def part(data: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping at `keys` inside `data`, or an empty one."""
    for key in keys:
        data = mapping(data).get(key)
    return mapping(data)


def finite(value: Any) -> float | None:
    """A finite number, or None for whatever else a JSON file may hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


# What a file holds ---------------------------------------------------------------------------------------------------

AGAIN = "copy or download it again"


def expect(ok: object, where: str, what: str, expected: object, got: object, hint: str = AGAIN) -> None:
    """Raise a `FileError` of one line unless `ok`; `got` is shown escaped and shortened."""
    if not ok:
        raise FileError(f"{where}: {what}: expected {expected}, got {show(got)}", hint)


def show(value: object) -> str:
    """A short one-line text without control characters, whatever a file put there; numbers of numpy are numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return f"{value:,}" if type(value) is int and value < 1 << 64 else _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


# Files ---------------------------------------------------------------------------------------------------------------

MAX_JSON_BYTES = 32_000_000
MAX_BRACKETS = 1_000_000  # in a JSON file: two bytes of it can take two hundred of memory
MAX_HEADER_BYTES = 16 << 20  # of a safetensors file: enough for 100,000 tensors


def read_bytes(path: Path, max_bytes: int, kind: str) -> bytes:
    """A regular file of at most `max_bytes`; `kind` says what it is, such as "a vocabulary".

    Raises `FileError` that names the file.
    """
    try:
        if not path.is_file():  # looked at before it is opened: opening a FIFO waits, opening a device can do anything
            raise FileError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise FileError(f"{path} is larger than {max_bytes:,} bytes, too large for {kind}")
    return data


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file. Every failure is a `FileError` that names the file."""
    data = read_bytes(path, max_bytes, "a JSON file of cap")
    text = text_of(data, path)
    if data.count(b"[") + data.count(b"{") > MAX_BRACKETS:
        raise FileError(f"{path} has more than {MAX_BRACKETS:,} brackets, too many for a JSON file of cap")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON: {error}") from error


def text_of(data: bytes, path: Path) -> str:
    """The text of a file in UTF-8, with or without a mark of the byte order. Raises `FileError` for anything else."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)) or b"\0" in data[:4]:
        raise FileError(
            f"{path} is in UTF-16 or UTF-32, not in UTF-8",
            "save it as UTF-8; the > of Windows PowerShell writes UTF-16, | Out-File -Encoding utf8 FILE does not",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not a text in UTF-8: byte {error.start:,} cannot be read") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; the tensors are memory-mapped. Raises `FileError` naming the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot read {path}: {error}") from error


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by its header alone. Raises `FileError` naming the file."""
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():
            raise FileError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise FileError(f"{path}: the header takes {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot read {path}: {error}") from error
