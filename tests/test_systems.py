"""Other systems than Linux: what is not there on Windows or macOS is asked for before it is used.

Nothing here runs on them; what is left to be seen there says docs/reference/reliability.md.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import without_posix
from tiny import ROOT, Tiny, environment, outcome

HOUSE = ROOT / "capcli"
# Where a name that is not everywhere is used, each behind `hasattr`, `getattr`, an except clause or `files.POSIX`.
ALLOWED = {
    ("files", "O_DIRECTORY"),
    ("files", "O_NONBLOCK"),
    ("files", "fcntl"),
    ("machine", "resource"),
    ("machine", "sched_getaffinity"),
    ("runtime.compiling", "getuid"),
    ("sweeping.room", "fcntl"),
    ("tracking", "SIGKILL"),
    ("tracking", "fcntl"),
    ("tracking", "killpg"),
    ("tracking", "set_blocking"),
}


def used(tree: ast.AST) -> set[str]:
    """The modules and names of Unix that a file uses without asking by `getattr`."""
    names = {*without_posix.OS, *without_posix.SIGNALS}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("os", "signal"):
            found |= {node.attr} & names
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & set(without_posix.MODULES)
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} & set(without_posix.MODULES)
    return found


def test_what_is_not_on_every_system_is_used_where_that_is_known() -> None:
    found = set()
    for path in HOUSE.rglob("*.py"):
        module = ".".join(path.relative_to(HOUSE).with_suffix("").parts)
        found |= {(module, name) for name in used(ast.parse(path.read_text("utf-8")))}
    assert found == ALLOWED


SMALL: dict[str, Any] = {"epochs": 2, "teacher_epochs": 1, "max_train_samples": 48, "checkpoint_seconds": 0}


@pytest.fixture(scope="module")
def without(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What commands left and said in a process without what is of Unix."""
    here = tmp_path_factory.mktemp("without")
    (here / "texts.txt").write_text("a good film\n")
    out, prune = str(here / "out"), tiny.arguments(here / "out", **SMALL, holdout=0.2)
    commands = {
        "stopped": [*prune, "--max-time", "0.02"],
        "prune": prune,
        "again": prune,
        "overwrite": [*prune, "--overwrite"],
        "refused": tiny.arguments(here / "runs" / "new", **SMALL, label_column="nothing"),
        "eval": ["eval", out, "--latency-length", "8", "--junit", str(here / "r.xml")],
        "dense": ["export", out, "--to", "dense", "-o", str(here / "dense")],
        "sparse": ["export", out, "--to", "sparse", "-o", str(here / "sparse"), "--dtype", "int8"],
        "probe": ["probe", out, "--tasks", "text-classification", "--data", tiny.data, "--seeds", "1"],
        "predict": ["predict", out, str(here / "texts.txt"), "-o", str(here / "answers.jsonl")],
        "doctor": ["doctor"],
    }
    done = subprocess.run(
        [sys.executable, without_posix.__file__],
        env=environment(CAP_CACHE=str(here / "cache"), PYTHONPATH=f"{ROOT / 'tests'}:{ROOT}"),
        input=json.dumps(list(commands.values())),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return here, {"said": dict(zip(commands, found["said"], strict=True)), "vain": found["vain"]}


@pytest.mark.slow
def test_commands_work_without_what_is_of_unix(without: tuple[Path, dict[str, Any]]) -> None:
    found = without[1]
    codes = {name: code for name, (code, _, _) in found["said"].items()}
    assert codes == {**dict.fromkeys(codes, 0), "stopped": 75, "refused": 2}, found["said"]
    assert not (without[0] / "runs").exists()
    assert {path.name for path in (without[0] / "out").iterdir()} >= {"report.json", "report.html", "README.md"}
    # All but the lock, which is removed once it is released: nothing that is open was to be moved or removed.
    assert {Path(line.split()[1]).name for line in found["vain"]} <= {".lock", "work"}, found["vain"]
    assert not list(without[0].rglob(".lock"))


@pytest.mark.slow
def test_they_come_to_the_same(without: tuple[Path, dict[str, Any]], tiny: Tiny, tmp_path: Path) -> None:
    tiny.prune(tmp_path / "out", **SMALL, holdout=0.2)
    assert outcome(without[0] / "out") == outcome(tmp_path / "out")
    assert not list(without[0].rglob("*.part"))
