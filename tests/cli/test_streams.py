"""The standard streams: whoever reads them, the work is done and the exit code is that of the work."""

from __future__ import annotations

import codecs
import json
import subprocess
from pathlib import Path

import pytest
from tiny import Tiny, with_cap

from capcli.cli import streams

pytestmark = pytest.mark.slow
FAST = "--threads 1 --latency-length 8"


def ran(script: str, folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """A bash script with our own `cap`."""
    env = with_cap(folder, **changes)
    command = ["bash", "-c", script]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("cap --help | true; exit ${PIPESTATUS[0]}", 0),
        ("cap tasks-that-are-none 2>&1 | true; exit ${PIPESTATUS[0]}", 2),
        ("cap --help > /dev/full", 3),
        ("cap --version >&-", 0),
        ("cap --version <&- >&- 2>&-", 0),
        ("cap eval nowhere --task mr 2>/dev/full", 2),
    ],
)
def test_short_commands(tmp_path: Path, script: str, code: int) -> None:
    done = ran(script, tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr
    assert ("error: cannot write to stdout: No space left on device" in done.stderr) == (code == 3)


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("--json | true; exit ${PIPESTATUS[0]}", 0),
        ("--max accuracy=0 | true; exit ${PIPESTATUS[0]}", 1),
        ("--max accuracy=0 --json > /dev/full", 1),
        ("> /dev/full", 3),
        ("--json 2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}", 0),
        ("<&- >&- 2>&-", 0),
    ],
)
def test_the_work_is_done_and_the_code_is_that_of_the_work(pruned: Path, tmp_path: Path, ends: str, code: int) -> None:
    done = ran(f"cap eval {pruned} {FAST} --csv r.csv {ends}", tmp_path)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "r.csv").read_text().startswith("kind,")
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr


def test_an_encoding_that_does_not_know_a_character(pruned: Path, tmp_path: Path) -> None:
    """Something that looks alike or its escape on the terminal, UTF-8 in files."""
    changes = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = ran(f"cap eval {pruned} {FAST} --markdown r.md && cap eval $'f\\xfclm-\\u82e6'", tmp_path, **changes)
    assert done.returncode == 2
    assert done.stdout.isascii() and "accuracy" in done.stdout and "95 % interval" in done.stdout
    assert done.stderr.isascii() and "UnicodeEncodeError" not in done.stderr and "\\" in done.stderr
    assert "–" in (tmp_path / "r.md").read_text("utf-8")


def test_letters_that_look_alike() -> None:
    assert "1.4× ± 3 – x → y… 苦 é".encode("ascii", "capcli-letters") == rb"1.4x +- 3 - x -> y... \u82e6 \xe9"
    assert "1.4× é 苦".encode("latin-1", "capcli-letters") == b"1.4\xd7 \xe9 \\u82e6"
    with pytest.raises(UnicodeDecodeError):
        codecs.decode(b"\xff", "utf-8", "capcli-letters")


def test_a_stream_that_fails_once_is_not_tried_again() -> None:
    calls = []

    class Broken:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            calls.append(text)
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            raise OSError("no file")

    stream = streams.Stream(Broken())  # type: ignore[arg-type]
    assert stream.write("abc") == 3 and stream.write("d") == 1
    assert calls == ["abc"] and stream.encoding == "utf-8"
    assert stream.failed is not None and stream.failed.errno == 28


def test_a_reader_that_left_does_not_break_a_run(tiny: Tiny, tmp_path: Path) -> None:
    words = " ".join(tiny.arguments(tmp_path / "out", epochs=1, teacher_epochs=1, max_train_samples=32, losses="ce"))
    done = ran(f"cap {words} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.returncode == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["status"] == "complete"
