"""Every write of the package: atomic, synced, and reachable by the fault tests.

A file appears under its final name only when all its bytes are on disk. A folder of several files (a checkpoint, a
bank, a teacher) is filled under a staging name, gets a `manifest.json` with the sha256 of each file as its last file,
and is renamed once: a folder whose manifest verifies is complete, and anything else is ignored or replaced.

A staging name is `.NAME.TOKEN.part` with 16 random hexadecimal digits. It is made new, never found: whatever lies at a
name that others could foresee, such as a link, is not written to. Its writer holds a lock on it, so that the next
writer of NAME can tell what a killed one left, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capcli.errors import CapError, FileError, RunFailed
from capcli.stored import read_json

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
MAX_STAGED_CHARS = 50  # of a name, inside its staging name: file systems take 255 bytes
# On Windows a folder cannot be opened, and a file that is open can be neither renamed nor removed.
POSIX = hasattr(os, "O_DIRECTORY")
NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
_UMASK = os.umask(0o022)  # the system says what it was when it is set
os.umask(_UMASK)

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
    """Make renames inside `folder` durable, where a folder can be opened."""
    if POSIX:
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _commit(staging: Path, path: Path) -> None:
    """fsync `staging`, rename it over `path` and sync the folder that holds both."""
    _step("sync", path)
    _sync(staging, os.O_RDONLY | NOFOLLOW if POSIX else os.O_RDWR)  # Windows syncs what may be written
    _step("rename", path)
    staging.replace(path)
    sync_folder(path.parent)


# Staging -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _staged(path: Path, suffix: str = "part", *, folder: bool = False) -> Iterator[Path]:
    """A new empty file, or a folder that is ours alone, beside `path`; gone at the end if it was not renamed.

    Raises `OSError`.
    """
    sweep(path.parent, path.name)
    staging, handle = _created(path, suffix, folder)
    try:
        yield staging
    except BaseException:
        _discard(staging)
        raise
    finally:
        if handle is not None:
            os.close(handle)


def _created(path: Path, suffix: str, folder: bool) -> tuple[Path, int | None]:
    """A staging file or folder, and the handle that holds its lock, where there are such locks."""
    while True:
        staging = path.with_name(f".{path.name[:MAX_STAGED_CHARS]}.{secrets.token_hex(8)}.{suffix}")
        if folder:
            staging.mkdir(mode=0o700)
        if not POSIX:
            staging.touch(exist_ok=folder)
            return staging, None
        flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_WRONLY | os.O_CREAT | os.O_EXCL
        handle = os.open(staging, flags | NOFOLLOW, 0o666)
        if _lock(handle) is not False and staging.exists():  # else `sweep` of another process came between
            return staging, handle
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Lock an open file or folder until its last handle is closed; False if another has it, None if none can."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def sweep(folder: Path, name: str = "") -> None:
    """Remove the staging files and folders that killed writers of `name`, or of any name, left in a folder."""
    known = re.escape(name[:MAX_STAGED_CHARS]) if name else ".*"
    ours = re.compile(rf"\.{known}\.[0-9a-f]{{16}}\.[\w.-]*part[\w.-]*", re.DOTALL)
    with contextlib.suppress(OSError):
        for path in [entry for entry in folder.iterdir() if ours.fullmatch(entry.name)]:
            with contextlib.suppress(CapError, OSError):
                _remove_unheld(path)


def _remove_unheld(path: Path) -> None:
    """Remove a staging file or folder unless its writer lives. Links, and what is neither, stay."""
    if not POSIX or not (stat.S_ISREG(mode := path.lstat().st_mode) or stat.S_ISDIR(mode)):
        return
    handle = os.open(path, os.O_RDONLY | NOFOLLOW | os.O_NONBLOCK)
    try:
        if _lock(handle):
            remove(path)
    finally:
        os.close(handle)


def _discard(path: Path) -> None:
    """Remove a staging file or folder, as far as that is possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


# Files ---------------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically. Raises `RunFailed` naming path and bytes."""
    with _writing(path, len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _staged(path) as staging:
            _step("write", path)
            staging.write_bytes(data)
            _commit(staging, path)


@contextlib.contextmanager
def scratch(path: Path, n_bytes: int | None = None) -> Iterator[Path]:
    """A folder for what a library writes before it becomes `path`: beside it, ours alone, and gone at the end.

    Raises `RunFailed` naming path and bytes.
    """
    with _writing(path, n_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _staged(path, folder=True) as folder:
            yield folder
            _discard(folder)


@contextlib.contextmanager
def append(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Write a file of a staging folder piece by piece, by calls of what is yielded; synced on leaving.

    Raises `RunFailed` naming path and bytes.
    """
    with _writing(path):
        _step("write", path)
        file = path.open("xb")

    def write(data: bytes) -> None:
        with _writing(path, len(data)):
            file.write(data)

    with file:
        yield write
        with _writing(path):
            _step("sync", path)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def streamed(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Write `path` piece by piece by calls of what is yielded; on leaving, it appears with all of them, in one rename.

    When something is raised inside, nothing is left. Raises `RunFailed` naming path and bytes.
    """
    with contextlib.ExitStack() as stack:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            staging = stack.enter_context(_staged(path))
            _step("write", path)
            file = stack.enter_context(staging.open("wb"))

        def write(data: bytes) -> None:
            with _writing(path, len(data)):
                file.write(data)

        yield write
        with _writing(path):
            file.close()
            _commit(staging, path)


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


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. One metadata key at most: several would be stored in random order."""
    from safetensors.torch import save_file

    assert metadata is None or len(metadata) <= 1, "more than one metadata key makes the bytes irreproducible"
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with scratch(path, n_bytes) as folder:
        _step("write", path)
        save_file(_apart(tensors), folder / path.name, metadata)
        (folder / path.name).chmod(0o666 & ~_UMASK)  # safetensors makes files that only their owner can read
        _commit(folder / path.name, path)


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, contiguous, each in memory of its own: a file holds tied weights once for each name."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        found[name] = whole.clone() if whole.untyped_storage().data_ptr() in seen else whole
        seen.add(found[name].untyped_storage().data_ptr())
    return found


def sha256(path: Path) -> str:
    """sha256 of a regular file, as hex. Raises `OSError`, also for a FIFO, which would wait, and a device."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def publish(
    folder: Path, manifest: str = MANIFEST, suffix: str = "part", record: dict[str, Any] | None = None
) -> Iterator[Path]:
    """Fill the yielded staging folder; on leaving, it becomes `folder`, complete and verified, in one rename.

    When filling fails, the staging folder is removed and `folder` stays as it was. `suffix` ends the name of the
    staging folder. The manifest maps names to sha256. With a `record`, it is that record and `files`: name -> bytes and
    sha256, and a folder that is not empty is never replaced.
    """
    with contextlib.ExitStack() as stack:
        with _writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            staging = stack.enter_context(_staged(folder, suffix, folder=True))
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
            staging.chmod(0o777 & ~_UMASK)
            _take(folder, staging, replace=record is None)


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
    """Remove a file or folder that may not exist; of a link the link alone. Raises `RunFailed` naming it."""
    with _writing(path, verb="remove"):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            _step("remove", path)
            path.unlink()
        elif path.exists():
            _step("remove", path)
            shutil.rmtree(path)


def check_no_links(folder: Path) -> None:
    """Raise `FileError` when a folder in which we delete is a link or holds one: it would lead to what is not ours."""
    for path in (folder, *(folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ())):
        if path.is_symlink():
            raise FileError(
                f"{path} is a link, and nothing is written or removed through one", "remove it, or choose another -o"
            )


def check_name(path: Path) -> None:
    """Raise `FileError` for a name that is not UTF-8; the library of safetensors writes to no other."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FileError(f"cannot write to {path}: its name is not UTF-8", "choose another folder with -o") from error


def check_writable(folder: Path) -> None:
    """Create `folder` and prove that a file can be written there. Raises `FileError` before any work is done."""
    check_name(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _staged(folder / "cap_write_test") as probe:
            probe.write_bytes(b"cap")
            probe.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"cannot write to {folder}: {reason}", "choose another folder with -o") from error
