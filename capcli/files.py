"""Every write of the package: atomic, synced, and reachable by the fault tests.

A file appears under its final name only when all its bytes are on disk. A folder of several files (a checkpoint, a
bank, a teacher) is filled under a staging name, gets a `manifest.json` with the sha256 of each file as its last file,
and is renamed once: a folder whose manifest verifies is complete, and anything else is ignored or replaced.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capcli.errors import CapError, FileError, RunFailed

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


_UMASK = _umask()

# Called as hook(operation, path) before every file operation. Only the tests set it, to kill or fail a run there.
fault_hook: Callable[[str, Path], None] | None = None


def _step(operation: str, path: Path) -> None:
    if fault_hook is not None:
        fault_hook(operation, path)


@contextlib.contextmanager
def _writing(path: Path, n_bytes: int | None = None, verb: str = "write") -> Iterator[None]:
    """Turn an operating-system failure while writing `path` into a `RunFailed` that names path and bytes."""
    try:
        yield
    except CapError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full = full or any(word in str(error) for word in ("No space left", "quota exceeded", "File too large"))
        size = f" ({n_bytes:,} bytes)" if n_bytes is not None else ""
        reason = "no space left" if full else (getattr(error, "strerror", None) or str(error))
        hint = "free some space and run the same command again" if full else "make the folder writable, then try again"
        raise RunFailed(f"cannot {verb} {path}{size}: {reason}", hint) from error


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _commit(staging: Path, path: Path) -> None:
    """fsync `staging`, rename it over `path` and sync the folder that holds both."""
    _step("sync", staging)
    handle = os.open(staging, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    _step("rename", path)
    staging.replace(path)
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically. Raises `RunFailed` naming path and bytes."""
    staging = path.with_name(f".{path.name}.part")
    with _writing(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        _step("write", staging)
        staging.write_bytes(data)
        _commit(staging, path)


@contextlib.contextmanager
def append(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Write a file of a staging folder piece by piece, by calls of what is yielded; synced on leaving.

    Raises `RunFailed` naming path and bytes.
    """
    with _writing(path):
        _step("write", path)
        file = path.open("wb")

    def write(data: bytes) -> None:
        with _writing(path, len(data)):
            file.write(data)

    with file:
        yield write
        with _writing(path):
            _step("sync", path)
            file.flush()
            os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically. Lone surrogates are replaced, never fatal."""
    write_bytes(path, text.encode("utf-8", errors="replace"))


def json_text(data: Any) -> str:
    """JSON with stable layout; NaN and infinities become null, because JSON has neither."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, atomically."""
    write_text(path, json_text(data))


def read_json(path: Path, max_bytes: int = 64_000_000) -> Any:
    """Read a JSON file. Every failure is a `FileError` that names the file."""
    try:
        if not path.is_file():
            raise FileError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
        if path.stat().st_size > max_bytes:
            raise FileError(f"{path} is larger than {max_bytes:,} bytes, too large for a JSON file of ours")
        return json.loads(text_of(path.read_bytes(), path))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON: {error}") from error


def text_of(data: bytes, path: Path) -> str:
    """The text of a file in UTF-8, with or without a mark of the byte order. Raises `FileError` for UTF-16 and 32."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)) or b"\0" in data[:4]:
        raise FileError(
            f"{path} is in UTF-16 or UTF-32, not in UTF-8",
            "save it as UTF-8; the > of Windows PowerShell writes UTF-16, | Out-File -Encoding utf8 FILE does not",
        )
    return data.decode("utf-8-sig")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. One metadata key at most: several would be stored in random order."""
    from safetensors.torch import save_file

    assert metadata is None or len(metadata) <= 1, "more than one metadata key makes the bytes irreproducible"
    staging = path.with_name(f".{path.name}.part")
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with _writing(path, n_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        _step("write", staging)
        save_file(_apart(tensors), staging, metadata)
        staging.chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner can read
        _commit(staging, path)


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, contiguous, each in memory of its own: a file holds tied weights once for each name."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        found[name] = whole.clone() if whole.untyped_storage().data_ptr() in seen else whole
        seen.add(found[name].untyped_storage().data_ptr())
    return found


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file; the tensors are memory-mapped. Raises `FileError` naming the file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
        return tensors
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot read {path}: {error}") from error


def sha256(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def publish(
    folder: Path, manifest: str = MANIFEST, suffix: str = "part", record: dict[str, Any] | None = None
) -> Iterator[Path]:
    """Fill the yielded staging folder; on leaving, it becomes `folder`, complete and verified, in one rename.

    When filling fails, the staging folder is removed and `folder` stays as it was. `suffix` ends the name of the
    staging folder; where several processes may publish the same folder, it must differ between them. The manifest maps
    names to sha256. With a `record`, it is that record and `files`: name -> bytes and sha256, and a folder that is not
    empty is never replaced.
    """
    staging = folder.with_name(f".{folder.name}.{suffix}")
    remove(staging)
    with _writing(staging):
        staging.mkdir(parents=True)
    try:
        yield staging
        digests = {name: sha256(staging / name) for name in _names(staging)}
        if record is None:
            write_json(staging / manifest, digests)
        else:
            record["files"] = {
                name: {"bytes": (staging / name).stat().st_size, "sha256": digest} for name, digest in digests.items()
            }
            write_json(staging / manifest, record)
        with _writing(folder):
            _take(folder, staging, replace=record is None)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _take(folder: Path, staging: Path, *, replace: bool) -> None:
    """Rename `staging` to `folder`; unless that is to be replaced, it must be empty, up to the last moment."""
    if replace:
        remove(folder)
    try:
        if not replace and folder.exists():
            folder.rmdir()
        _step("rename", folder)
        staging.replace(folder)
    except OSError as error:
        if replace or error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise FileError(f"{folder} is not empty any more", "choose another folder") from error
    sync_folder(folder.parent)


def _names(folder: Path) -> list[str]:
    """The files in a folder and below, as paths from it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def is_complete(folder: Path) -> bool:
    """Whether `folder` was published and every file in it still has the bytes that were published."""
    try:
        manifest = read_json(folder / MANIFEST)
        names = set(_names(folder)) - {MANIFEST}
        return names == set(manifest) and all(sha256(folder / name) == digest for name, digest in manifest.items())
    except (CapError, OSError, TypeError, AttributeError):
        return False


def remove(path: Path) -> None:
    """Remove a file or folder that may not exist. Raises `RunFailed` naming it."""
    with _writing(path, verb="remove"):
        if path.is_symlink() or path.is_file():
            _step("remove", path)
            path.unlink()
        elif path.exists():
            _step("remove", path)
            shutil.rmtree(path)


def check_writable(folder: Path) -> None:
    """Create `folder` and prove that a file can be written there. Raises `FileError` before any work is done."""
    probe = folder / ".cap_write_test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"cap")
        probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"cannot write to {folder}: {reason}", "choose another folder with -o") from error
