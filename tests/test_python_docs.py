"""Python in the documentation runs as it is written: the page about Python, and the notebook."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny, invoke

DOCS = Path(__file__).parent.parent / "docs"


def page_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / "how-to" / "python.md").read_text("utf-8"), re.M | re.S)


def notebook_blocks() -> list[str]:
    notebook = json.loads((DOCS / "notebook.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells), "clear the outputs"
    return ["".join(cell["source"]) for cell in cells]


def ran(blocks: list[str]) -> list[Any]:
    """Run the blocks one after another in one namespace; returns what each ends with, as a notebook shows it."""
    space: dict[str, Any] = {}
    found = []
    for block in blocks:
        tree = ast.parse(block)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "block", "exec"), space)
        shown = last and eval(compile(ast.Expression(last.value), "block", "eval"), space)  # type: ignore[attr-defined]
        found.append(shown)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both prune the same model, which the second of them finds finished."""
    return tmp_path_factory.mktemp("python")


@pytest.mark.rare
@pytest.mark.slow
def test_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    ran(page_blocks())
    printed = capsys.readouterr().out
    assert "80.00 %" in printed and "objective" in printed and "[True, True]" in printed


@pytest.mark.rare
@pytest.mark.slow
def test_the_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    version, report, _, answers, gates, small, one = ran(notebook_blocks())
    assert version and report._repr_html_() and small._repr_html_()
    assert [answer["label"] for answer in answers] == ["subjective", "objective"]
    assert [passed for _, passed in gates] == [True, True]
    assert report.metrics.pruned["accuracy"] > 0.7
    assert small.int8 and one["label"] in ("subjective", "objective")


@pytest.mark.slow
def test_the_page_about_sentence_embeddings(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands, one after another, on small folders of the names that it uses; and that the export can be read."""
    page = (DOCS / "how-to" / "sentence-embeddings.md").read_text("utf-8")
    (commands,) = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.model, "all-MiniLM-L6-v2")
    shutil.copytree(tiny.scored, "sts")
    for command in commands.splitlines():
        done = invoke(*shlex.split(command, comments=True)[1:], "-q")
        assert done.exit_code == 0, done.stderr
    written = {str(path.relative_to("smaller-MiniLM")) for path in Path("smaller-MiniLM").rglob("*")}
    assert {"modules.json", "1_Pooling/config.json", "config.json", "model.safetensors"} <= written
    assert 'SentenceTransformer(".").encode' in Path("smaller-MiniLM", "README.md").read_text("utf-8")
