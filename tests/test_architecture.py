"""docs/explanation/architecture.md against the code: every folder, file, table and function that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from test_layers import HOUSE, ORDER
from tiny import ROOT

from capcli.stages import STAGES

PAGE = (ROOT / "docs" / "explanation" / "architecture.md").read_text("utf-8")
TEXT = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
FOLDERS = sorted(f"{path.parent.relative_to(HOUSE)}/" for path in HOUSE.rglob("__init__.py") if path.parent != HOUSE)
# Beside Python files and folders the page names what a run writes and what a user types; test_docs checks those.
PATH = re.compile(r"(?!step-)[\w/]+(/|/\w+\.\w+|\.py)")
NAME = re.compile(r"_?[A-Za-z]\w+(\.\w+)?")


def section(title: str) -> str:
    """The text below a heading that starts with `title`, up to the next one."""
    (found,) = re.findall(rf"^#+ {re.escape(title)}.*?\n(.*?)(?=^#|\Z)", TEXT, re.MULTILINE | re.DOTALL)
    return str(found)


def first_cells(text: str) -> list[str]:
    """The names in the first column of the tables of a section."""
    return [name for cell in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE) for name in spans(cell)]


def spans(text: str) -> list[str]:
    """The code spans of a text."""
    return re.findall(r"`([^`\n]+)`", text)


def located(name: str) -> Path:
    """A path as the page writes it, inside capcli or the repository."""
    return HOUSE / name if (HOUSE / name).exists() else ROOT / name


def defined(path: Path) -> set[str]:
    """The names of a module at its top level and in its classes, as `name` and `Class.name`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        found |= set(targets(node))
        if isinstance(node, ast.ClassDef):
            inner = {name for child in node.body for name in targets(child)}
            found |= inner | {f"{node.name}.{name}" for name in inner}
    return found


def targets(node: ast.stmt) -> list[str]:
    """The names that a statement binds."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return [name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]
    return []


def statements() -> list[str]:
    """The rows, items and paragraphs that say what is in which file."""
    text = "\n".join(section(title) for title in ("What a method", "To add", "Five things"))
    return [one for one in re.split(r"\n(?=[|\-\n]|\d\. )", text) if ".py`" in one]


def test_each_path_exists() -> None:
    paths = {name for name in spans(TEXT) if PATH.fullmatch(name) and not name.startswith(("OUT", "work"))}
    assert len(paths) > 30
    assert {name for name in paths if not located(name).exists() and not [*HOUSE.glob(f"*/{name}")]} == set()


def test_the_order_is_that_of_the_layers() -> None:
    (shown,) = [part for part in section("Order of imports").split("\n\n") if "→" in part]
    assert spans(shown) == [name for name in ORDER if name != "__main__"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_file_of_a_folder_is_on_the_page(folder: str) -> None:
    there = {path.stem if path.is_file() else f"{path.name}/" for path in (HOUSE / folder).iterdir()}
    there = {name for name in there if (HOUSE / folder / f"{name}.py").is_file() or f"{folder}{name}" in FOLDERS}
    listed = first_cells(section(f"`{folder}`"))
    assert sorted(listed) == sorted(there - {"__init__"})


def test_each_file_beside_the_folders_is_on_the_page() -> None:
    there = {path.name for path in HOUSE.glob("*.py")} | {"builtin/"}
    assert sorted(first_cells(section("Beside the folders"))) == sorted(there - {"__init__.py", "__main__.py"})


@pytest.mark.parametrize("text", statements(), ids=lambda text: text[:30])
def test_each_name_is_in_a_file_beside_it(text: str) -> None:
    names = [name for name in spans(text) if NAME.fullmatch(name) and not name.endswith(".py")]
    files = [located(name) for name in spans(text) if name.endswith(".py")]
    known = set().union(*map(defined, files))
    assert [name for name in names if name not in known] == []


def test_the_stages_are_those_of_a_run() -> None:
    assert first_cells(section("The stages of a run")) == list(STAGES)
    code = "".join(path.read_text("utf-8") for path in HOUSE.rglob("*.py"))
    written = {
        name for name in spans(section("The stages of a run")) if re.fullmatch(r"[a-z_.]+\.(json|safetensors)", name)
    }
    assert len(written) > 8
    assert {name for name in written if f'"{name}"' not in code} == set()


def test_the_four_lines_are_those_of_the_pruner() -> None:
    (shown,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    code = (HOUSE / "pruning" / "pruner.py").read_text("utf-8")
    for line in shown.splitlines():
        name = re.findall(r"= (?:\w+\.)?(\w+)\(", line)[0]
        assert re.search(rf"self\.\w*\.?{name}d?\(", code), line


def test_tests_follow_the_folders() -> None:
    there = {f"{path.parent.relative_to(ROOT / 'tests')}/" for path in (ROOT / "tests").rglob("test_*.py")}
    assert there - {"./"} <= set(FOLDERS)


def test_the_rare_tests_are_there() -> None:
    """A line of rare.txt that names no test would let it run in `make test` again, unseen."""
    lines = (ROOT / "tests" / "rare.txt").read_text().splitlines()
    names = [line.partition("\\[")[0].split("::") for line in lines if line and not line.startswith("#")]
    assert names
    missing = [name for path, name in names if f"def {name}(" not in (ROOT / path).read_text()]
    assert missing == []
