"""The tensors of another tool's checkpoint: read one by one, with bounded sizes."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from capcli.errors import FileError, ModelError, first_line
from capcli.sources import hub
from capcli.stored import AGAIN, expect, show

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 40_000  # a compressed tensor is four
MAX_NAME_CHARS = 256
FLOATS = ("F16", "BF16", "F32", "F64")
PARTS = ("shape", "compressed", "bitmask", "row_offsets")
PARAMETERS = ("weight", "bias", "gamma", "beta")  # a stem that ends so is the whole name
SCORES = ".mask_scores"
QUANTISED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_global_scale", "input_scale")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor as the header of a weight file has it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"{self.path}: tensor {show(self.name)}"


# Files ---------------------------------------------------------------------------------------------------------------


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of all weight files by name; no value is read. Position ids, which are no weights, are left out."""
    found: dict[str, StoredTensor] = {}
    for path in (folder / name for name in hub.weight_files(folder)):
        for entry in _header(path):
            expect(entry.name not in found, entry.where, "stored", "once", "also in another file")
            found[entry.name] = entry
    return {name: entry for name, entry in found.items() if "position_ids" not in name.split(".")[-2:]}


def _header(path: Path) -> list[StoredTensor]:
    with _opened(path) as file:
        names = file.keys()
        expect(len(names) <= MAX_TENSORS, str(path), "number of tensors", f"at most {MAX_TENSORS:,}", len(names))
        for name in names:
            expect(
                name.isprintable() and len(name) <= MAX_NAME_CHARS,
                str(path),
                "names",
                f"up to {MAX_NAME_CHARS} printable characters",
                name,
            )
        slices = {name: file.get_slice(name) for name in names}
        return [
            StoredTensor(path=path, name=name, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
            for name, part in slices.items()
        ]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file whose header has been validated; whatever goes wrong becomes a `FileError` that names it."""
    try:
        # Looked at before it is opened, because opening a FIFO waits and opening a device can do anything.
        expect(stat.S_ISREG(path.stat().st_mode), str(path), "kind of file", "a regular file", "something else")
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        expect(length <= MAX_HEADER_BYTES, str(path), "header bytes", f"at most {MAX_HEADER_BYTES:,}", length)
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, MemoryError) as error:
        raise FileError(f"cannot read {path}: {first_line(error)}") from error
    except SafetensorError as error:
        raise FileError(f"{path} is damaged: {first_line(error)}", AGAIN) from error


def read_tensors(entry: StoredTensor) -> Tensor:
    """The values of a tensor."""
    with _opened(entry.path) as file:
        tensor: Tensor = file.get_tensor(entry.name)
        return tensor


def read_floats(entry: StoredTensor) -> Tensor:
    """The values of a weight, which must be finite numbers in full precision."""
    last = entry.name.rsplit(".", 1)[-1]
    if last in QUANTISED or entry.dtype not in FLOATS:
        raise ModelError(
            f"{entry.where}: the weights are quantised ({last}, {entry.dtype})",
            "use the model in full precision that it was made from",
        )
    tensor = read_tensors(entry)
    expect(tensor.isfinite().all(), entry.where, "values", "finite numbers", "NaN or infinity")
    return tensor


def type_of(entry: StoredTensor) -> str:
    """Dtype and shape of an entry, for messages."""
    return f"{entry.dtype} {list(entry.shape)}"
