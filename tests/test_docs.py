"""The documentation against the code: generated pages, options, names of the report, links, commands, machine paths."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from tiny import ROOT

import capcli.errors as errors
from capcli.cli import app, output
from capcli.config.export import ExportConfig
from capcli.config.grid import sweep_config
from capcli.config.layers import build, layered
from capcli.config.measure import EvalConfig, Gates, ProbeConfig
from capcli.config.names import ALIASES, BUILTIN_MODEL, BUILTIN_TASKS, LOSSES, METHODS, PRESETS, TASK_NAMES
from capcli.config.options import leaves
from capcli.config.predict import PredictConfig
from capcli.config.prune import PruneConfig
from capcli.config.push import PushConfig
from capcli.config.sweep import SweepOptions
from capcli.records.exported import ExportRecord
from capcli.records.measured import Comparison, Comparisons, EvalResult, ProbeResult
from capcli.records.predicted import Predictions
from capcli.records.pruned import Report
from capcli.records.pushed import Pushed
from capcli.records.swept import Sweep

REFERENCE = ROOT / "docs" / "reference"
DOCS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
COMMANDS: dict[str, Any] = typer.main.get_command(app.app).commands  # type: ignore[attr-defined]
CONFIGS: dict[str, tuple[type, ...]] = {
    "prune": (PruneConfig, SweepOptions),
    "eval": (EvalConfig,),
    "export": (ExportConfig,),
    "predict": (PredictConfig,),
    "probe": (ProbeConfig,),
    "push": (PushConfig,),
}


def name(path: Path) -> str:
    """A page's path inside the repository, as the id of a test."""
    return str(path.relative_to(ROOT))


# Generated pages -----------------------------------------------------------------------------------------------------


def reference_script() -> Any:
    """scripts/make_reference.py as a module."""
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "scripts" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date() -> None:
    for page, text in reference_script().pages().items():
        assert (REFERENCE / page).read_text("utf-8") == text, f"{page} is out of date: run make docs"


def test_every_short_name_has_a_family() -> None:
    assert set(reference_script().MODEL_TYPES) == set(ALIASES)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented_and_explained(command: str) -> None:
    page = (REFERENCE / "cli.md").read_text("utf-8")
    section = page.split(f"\n## cap {command}\n")[1].split("\n## ")[0]
    for item in COMMANDS[command].params:
        if item.param_type_name == "argument":
            continue
        assert item.help, item.name
        for flag in (*item.opts, *item.secondary_opts):
            assert re.search(rf"`{re.escape(flag)}[ `]", section), f"{flag} of cap {command} is not documented"


@pytest.mark.parametrize("command", CONFIGS)
def test_every_field_is_an_option(command: str) -> None:
    fields = {item.name for kind in CONFIGS[command] for item, _ in leaves(kind) if item.metadata}
    assert fields <= {item.name for item in COMMANDS[command].params}
    page = (REFERENCE / "configuration.md").read_text("utf-8")
    section = page.split(f"\n## Options of {command}\n")[1].split("\n## ")[0]
    assert fields == set(re.findall(r"^\| `(\w+)` ", section, re.MULTILINE))


def test_every_method_preset_task_and_model_is_documented() -> None:
    pages = {page: (REFERENCE / page).read_text("utf-8") for page in ("configuration.md", "tasks.md", "models.md")}
    names = {
        "configuration.md": [*METHODS, *PRESETS, *LOSSES],
        "tasks.md": TASK_NAMES,
        "models.md": [*ALIASES, BUILTIN_MODEL],
    }
    missing = [(page, name) for page, expected in names.items() for name in expected if f"`{name}`" not in pages[page]]
    assert not missing


# Hand-written reference ----------------------------------------------------------------------------------------------


def names_of(kind: Any) -> set[str]:
    """The names of a record and of all records in it."""
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return set().union(*map(names_of, get_args(kind)))
    hints = get_type_hints(kind)
    return set(hints).union(*map(names_of, hints.values()))


@pytest.mark.parametrize(
    "kind",
    [Report, Sweep, EvalResult, ProbeResult, Comparison, Comparisons, ExportRecord, Predictions, Pushed],
    ids=lambda k: k.__name__,
)
def test_every_name_of_a_result_is_documented(kind: type[Any]) -> None:
    page = (REFERENCE / "report.md").read_text("utf-8")
    names = names_of(kind)
    assert len(names) > 12
    assert not {name for name in names if f"`{name}`" not in page}
    assert "## files" in page
    assert "## history" in page


def test_no_name_of_a_real_report_is_undocumented(pruned: Path) -> None:
    page = (REFERENCE / "report.md").read_text("utf-8")
    report = json.loads((pruned / "report.json").read_text("utf-8"))
    assert not [key for key in report if f"`{key}`" not in page]
    for part in ("sparsity", "metrics", "size", "timing", "memory", "teacher"):
        section = page if part == "teacher" else page.split(f"\n## {part}\n")[1].split("\n## ")[0]
        assert not [key for key in report[part] if f"`{key}`" not in section], part
    assert not {key for row in report["history"] for key in (*row, *row["losses"]) if f"`{key}`" not in page}


def test_every_error_and_exit_code_is_documented() -> None:
    page = (REFERENCE / "exit-codes.md").read_text("utf-8")
    children = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not errors.CapError]
    for kind in children:
        assert f"| `{kind.__name__}` | {kind.exit_code} |" in page
    codes = {0, output.EXIT_GATE, output.EXIT_FAILED, output.EXIT_INTERRUPTED, *(kind.exit_code for kind in children)}
    assert codes == {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}


# Links ---------------------------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """A page without its code blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    lines = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text("utf-8"))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{target} does not exist"
        assert found.is_relative_to(ROOT), f"{target} leaves the repository"
        assert not anchor or anchor in anchors(found), f"{target}: no such heading"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_no_row_stands_outside_its_table(page: Path) -> None:
    lines = re.sub(r"(?ms)^```.*?^```", "", page.read_text("utf-8")).split("\n")
    starts = [i for i, line in enumerate(lines) if line.startswith("|") and not lines[i - 1].startswith("|")]
    assert not [lines[i] for i in starts if not re.match(r"\|[ :]*-", lines[i + 1])]


def test_every_page_can_be_reached() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md" or not page.is_file():
            continue
        seen.add(page)
        for target in re.findall(r"\]\(([^)\s#]+)", prose(page.read_text("utf-8"))):
            waiting.append((page.parent / target).resolve())
    assert not set((ROOT / "docs").rglob("*.md")) - seen


# Commands ------------------------------------------------------------------------------------------------------------


def shown_commands() -> list[tuple[str, str]]:
    """(page, command line) of every `cap COMMAND …` in a code block or code span of the documentation."""
    found = []
    for page in DOCS:
        text = page.read_text("utf-8")
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        for line in lines:
            match = re.search(r"(?:^|[\s/])(cap (?:prune|eval|export|predict|probe|push) [^;#]*)", line)
            wrong = "[OPTIONS]" in line or "COMMAND" in line or "exit code 2" in line
            if match and not wrong:
                found.append((name(page), re.split(r"\s(?:\d?>|\|)", match[1])[0].strip()))
    return found


def test_there_are_commands_to_check() -> None:
    pages = {page for page, _ in shown_commands()}
    assert {"README.md", "docs/tutorial.md", "docs/how-to/own-data.md", "docs/how-to/ci.md"} <= pages


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_shown_commands_parse(page: str, line: str) -> None:
    _, command, *arguments = shlex.split(line)
    if {"--help", "--help-all"} & {*arguments}:
        return
    if command in ("prune", "export") and (not arguments or arguments[0].startswith("-")):
        arguments = ["MODEL", *arguments]  # a span such as `cap export --to dense` names the option only
    arguments = [re.sub(r"^\$\w+$", "1", argument) for argument in arguments]
    with COMMANDS[command].make_context(command, arguments) as context:
        chosen = {key: value for key, value in context.params.items() if value is not None}
    if command not in CONFIGS:
        return
    if command == "prune" and "task" in chosen and not chosen["config"]:
        sweep_config({key: value for key, value in chosen.items() if key in FIELDS["prune"]})
    elif command != "prune":
        given = {"task": "mr"} if command == "eval" else {}
        build(Gates if chosen.get("compare") else CONFIGS[command][0], {**given, **chosen})


def shown_files() -> list[tuple[str, str]]:
    """(page, text) of every TOML block of the documentation."""
    return [
        (name(p), text) for p in DOCS for text in re.findall(r"^```toml\n(.*?)^```", p.read_text("utf-8"), re.M | re.S)
    ]


@pytest.mark.parametrize(("page", "text"), shown_files())
def test_shown_files_are_read(tmp_path: Path, page: str, text: str) -> None:
    file = tmp_path / "options.toml"
    file.write_text(text)
    if "cap prune" in text:
        sweep_config({}, str(file))
        return
    build(ProbeConfig, layered("probe", {}, str(file)))
    build(EvalConfig, {"task": "mr", **layered("eval", {}, str(file))})


FIELDS = {
    command: {"model", *(item.name for kind in kinds for item, _ in leaves(kind))} for command, kinds in CONFIGS.items()
}


def test_make_demo_and_test_are_what_the_readme_says() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    demo = re.search(r"\$\(BIN\)/(cap prune [^\n]*)", makefile)
    assert demo is not None
    _, command, *arguments = shlex.split(demo[1])
    with COMMANDS[command].make_context(command, arguments) as context:
        assert context.params["model"] == BUILTIN_MODEL
        assert context.params["task"] in BUILTIN_TASKS
    for target in re.findall(r"`?make (\w+)", (ROOT / "README.md").read_text("utf-8")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"


# The tree ------------------------------------------------------------------------------------------------------------


def tracked() -> list[Path]:
    """Files under version control, as they are in the checkout; skips without git."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / part for part in done.stdout.split("\0") if part and (ROOT / part).is_file()]


def test_no_path_of_a_machine_is_in_the_tree() -> None:
    folders = "|".join(("work", "home", "root", "Users", "private", "mnt"))
    machine = re.compile(rf"(?:^|[\s\"'`(=:,\[])/(?:{folders})/\w", re.MULTILINE)
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data and (match := machine.search(data.decode("utf-8", errors="replace"))):
            found.append((name(path), match[0]))
    assert not found


def test_constraints_name_public_versions_of_all_dependencies() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {}
    for line in lines:
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9a-z.]*)", line)
            assert match, f"{line!r} is not NAME==VERSION without a local label"
            pinned[match[1].lower().replace("_", "-")] = match[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["onnx"], *(line for line in extras["dev"] if "capcli" not in line)]
    names = {re.split(r"[<>=!~\[ ]", line)[0].lower().replace("_", "-") for line in wanted}
    assert names <= set(pinned)
