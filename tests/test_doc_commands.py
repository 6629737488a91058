"""The commands on the pages for users run as they are printed, page by page, in a folder with what it presupposes.

Each ends with the exit code that stands behind it, else with 0. What makes runs small is in `documented`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import documented
import hub_server
import pytest
from documented import World, limited
from tiny import ROOT, invoke

from capcli.sources import hub as names

GUIDES = [ROOT / "README.md", ROOT / "docs" / "tutorial.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
PAGES = [str(path.relative_to(ROOT)) for path in GUIDES]
TOKEN = "hf_" + "0123456789abcdefXYZ" * 2
# What is there before the first command of a page: files, models and runs that the text takes for granted.
THERE: dict[str, tuple[str, ...]] = {
    "README.md": ("pairs.csv",),
    "docs/how-to/ci.md": ("runs/a", "runs/b", "runs/c"),
    "docs/how-to/entities.md": ("entities", "lines.txt"),
    "docs/how-to/export.md": ("runs/sst2",),
    "docs/how-to/hub.md": ("runs/sst2", "texts.csv"),
    "docs/how-to/legacy.md": ("LEGACY",),
    "docs/how-to/measure.md": ("runs/mnli", "runs/sst2", "bert-base-mnli", "reviews.csv"),
    "docs/how-to/own-data.md": (
        *("reviews", "pairs", "scores", "topics", "MNLI", "squad-files", "reviews.csv", "reviews-2027", "some-folder"),
    ),
    "docs/how-to/predict.md": ("runs/mr", "runs/mr-onnx", "reviews.csv", "reviews.parquet", "lines.txt"),
    "docs/how-to/probe.md": ("runs/mnli", "runs/magnitude", "tickets.csv", "my-data"),
    "docs/how-to/rerankers.md": ("reranker", "ranked"),
    "docs/how-to/sentence-embeddings.md": ("all-MiniLM-L6-v2", "sts"),
    "docs/how-to/small-model.md": ("reviews.csv",),
    "docs/how-to/teacher-and-ablation.md": ("my-bert-sst2",),
    "docs/how-to/upgrade.md": ("runs/mnli",),
    "docs/how-to/without-labels.md": ("fine-tuned", "texts.csv", "other.csv", "labelled"),
    "docs/how-to/without-training.md": ("my-bert-sst2", "reviews.txt"),
}
# Commands that the page says were run before, elsewhere.
BEFORE = {"docs/how-to/ci.md": ("cap eval runs/a --json > old.json", "cap eval runs/b --json > new.json")}
# How the lines begin that are not run here, and why.
NOT_RUN = {
    "git clone <": "the network",
    "python3 -m venv": "the network",
    "pip install": "the network",
    "cap prune mini --task subj --epochs 1 --compile": "a C++ compiler; tests/pruning/test_compiled.py",
    "make ": "installs; targets are checked by test_docs.py",
    "torchrun ": "several processes: tests/pruning/test_parts.py",
    "srun ": "a cluster",
    "cap export runs/sst2 --to exits": "a model of several layers: tests/exporting/test_exits.py",
    "cap eval sst2-exits": "the same",
    "cap export runs/sst2 --to lowrank --ratio 0.2 --heal": "takes long: tests/exporting/test_factors.py",
    "trackio show": "the package is not a dependency, and it starts a server",
    "export HF_HUB_OFFLINE=1": "for the commands after it; tests/sources/test_hub.py",
    "cap probe --min subj": "with its cap.toml in tests/cli/test_ci.py",
    "cap probe --compare old.json new.json --max-drop subj": "the same",
    "cap probe --tasks sub ": "the same",
}
LANGUAGES = ("sh", "bash")
SHELL = re.compile(r"[|;$]|^(ls|cat) ")


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of the blocks of a page."""
    found = re.findall(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, textwrap.dedent(text)) for _, language, text in found]


def lines(page: str) -> list[str]:
    """The commands of a page, one after another, with their comments."""
    scripts = [text.replace("\\\n", " ") for language, text in blocks(page) if language in LANGUAGES]
    return [line for text in scripts for line in text.splitlines() if line.strip() and not line.startswith("#")]


def is_run(line: str) -> bool:
    return not line.startswith(tuple(NOT_RUN))


def expected(line: str) -> set[int]:
    """The exit codes that the comment behind a command allows; a limit of time may fail on a busy machine."""
    comment = line.partition(" # ")[2]
    if found := re.search(r"exit code (\d)(?! when)", comment):
        return {int(found[1])}
    return {0, 1} if "exit code 1 when a gate fails" in comment or "--max-latency-ms" in line else {0}


# The folder of a page ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, sweeps_fork: Any) -> Iterator[World]:
    """Everything of the pages, with a hub and a cache of its own; `mini` is a smaller network."""
    home = tmp_path_factory.mktemp("documented")
    documented.write_network(home / "network", tokenizer)
    with pytest.MonkeyPatch.context() as patch, hub_server.serving() as server:
        server.reached(patch, home / "cache", TOKEN)
        patch.setattr(names, "BUILTIN_FOLDER", home / "network")
        documented.fill(server, home, home / "network")
        names.ask_again()
        yield World(home, server, ran)
        names.ask_again()


def ran(arguments: Sequence[str], allowed: Sequence[int] = (0,)) -> Any:
    """Run `cap` in this process."""
    done = invoke(*arguments)
    assert done.exit_code in allowed, (arguments, done.stdout[-800:], done.stderr[-1200:])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.fixture
def folder(world: World, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the page presupposes."""
    page = request.node.callspec.params["page"]
    monkeypatch.chdir(world.home)
    for name in THERE.get(page, ()):
        world.lend(name, tmp_path)
    if page == "docs/how-to/hub.md":
        documented.publish(world.server, tmp_path / "runs" / "sst2", world.made("my-bert-sst2"))
    monkeypatch.chdir(tmp_path)
    for line in BEFORE.get(page, ()):
        follow(line, tmp_path, world)
    return tmp_path


def follow(line: str, here: Path, world: World) -> None:
    """Do what a user does who types the line, and look whether what it was to write is there."""
    if SHELL.search(line.partition(" # ")[0]):
        env = documented.own_cap(world.home, str(world.home / "network"), CAP_CACHE=os.environ["CAP_CACHE"])
        command = ["bash", "-o", "pipefail", "-c", line]
        done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False)
        assert done.returncode in expected(line), (line, done.stderr[-1200:])
        assert done.stdout
        return
    words = shlex.split(line, comments=True)
    to = words[words.index(">") + 1] if ">" in words else ""
    words = words[: words.index(">")] if to else words
    assert words[0] == "cap", f"{line}: neither run nor listed in NOT_RUN"
    done = ran(limited(words[1:]), tuple(expected(line)))
    if to:
        (here / to).write_text(done.stdout)
    if done.exit_code or {"--plan", "--dry-run"} & {*words}:
        return
    for flag in {"-o", "--html", "--junit"} & {*words}:
        path = here / words[words.index(flag) + 1]
        assert path.is_file() or any(path.iterdir()), line


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_run, lines(page)))])
def test_the_commands_of_a_page(page: str, folder: Path, world: World) -> None:
    for line in filter(is_run, lines(page)):
        follow(line, folder, world)


def test_every_line_that_is_left_out_is_there() -> None:
    """No reason outlives its line."""
    every = [line for page in PAGES for line in lines(page)]
    assert not [start for start in NOT_RUN if not any(line.startswith(start) for line in every)]
    assert {*THERE, *BEFORE} <= {*PAGES}


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_in_blocks_that_are_run(page: str) -> None:
    """A block of another language, or of none, has no command of `cap`, but for the files of CI systems."""
    other = [text for language, text in blocks(page) if language not in (*LANGUAGES, "yaml")]
    assert not [text for text in other if re.search(r"^\W*cap \w", text, re.MULTILINE)]
