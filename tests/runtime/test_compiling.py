"""Compiled code is kept where it is the user's own; where it cannot be, things run without."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core import config

from capcli.runtime import compiling
from capcli.runtime.compiling import Kernel


def double(values: np.ndarray) -> None:
    for i in range(len(values)):
        values[i] *= 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where code is kept in this test; it is not there yet."""
    chosen = tmp_path / "cache"
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(chosen))
    monkeypatch.setattr(compiling, "kernel_folder", compiling.kernel_folder.__wrapped__)
    return chosen


def doubled() -> list[float]:
    kernel, values = Kernel(double), np.arange(3.0)
    kernel(values)
    return values.tolist()


def code(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.nb?"))


def test_code_is_kept_and_found_again(folder: Path) -> None:
    assert doubled() == [0, 2, 4]
    index, data = code(folder)[::-1]
    assert (index.suffix, data.suffix) == (".nbi", ".nbc")
    before = data.stat().st_mtime_ns
    assert doubled() == [0, 2, 4]
    assert data.stat().st_mtime_ns == before
    if os.name == "posix":
        assert stat.S_IMODE(compiling.kernel_folder().stat().st_mode) == 0o700


def test_the_folder_of_capcli_is_taken_unless_another_is_chosen(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("CAP_CACHE", str(tmp_path / "own"))
    assert compiling.kernel_folder().parent == tmp_path / "own" / "kernels"


def test_the_name_of_the_folder_depends_on_the_kernels(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = compiling.kernel_folder()
    (tmp_path / "compiling.py").write_text("another")
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "compiling.py"))
    assert compiling.kernel_folder() != before


@pytest.mark.skipif(os.name != "posix", reason="no owners and modes")
@pytest.mark.parametrize("name", ["", "kernels"])
def test_code_is_neither_read_nor_written_where_others_can_write(folder: Path, name: str) -> None:
    """numba reads it with pickle."""
    (folder / name).mkdir(parents=True)
    (folder / name).chmod(0o777)
    assert doubled() == [0, 2, 4]
    assert code(folder) == []


def test_a_folder_of_another_user_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    folder.mkdir()
    if folder.stat().st_uid == 0:
        pytest.skip("what belongs to root is trusted")
    assert doubled() == [0, 2, 4]
    assert code(folder) == []


def test_a_folder_that_cannot_be_made(folder: Path) -> None:
    folder.write_text("a file")
    assert doubled() == [0, 2, 4]


def test_code_that_is_damaged(folder: Path) -> None:
    doubled()
    for path in code(folder):
        path.write_bytes(b"damaged")
    assert doubled() == [0, 2, 4]


def test_what_others_compile_stays_where_it_was(folder: Path) -> None:
    numba.njit(double)(np.arange(3.0))  # numba looks at the environment when it compiles
    before = config.CACHE_DIR
    doubled()
    assert before == config.CACHE_DIR
