"""The snippets of model cards, executed as they are written, in the folder of the card."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import Made, environment

import capcli

KINDS = ("classification", "pairs", "regression", "multilabel", "tokens", "spans")
FORMS = ("", "dense", "sparse", "sliced", "onnx")


def snippets(folder: Path) -> list[str]:
    """The Python blocks of a card."""
    return re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_snippets_run(
    asked: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, form: str
) -> None:
    """Each prints what the model says to two inputs; `short` is in both, so that they are of different lengths."""
    folder = asked(kind, form)
    monkeypatch.chdir(folder)
    blocks = snippets(folder)
    assert len(blocks) == {"": 2, "sparse": 2, "sliced": 2, "dense": 1, "onnx": 2}[form]
    for block in blocks:
        exec(block, {})
        assert capsys.readouterr().out.strip(), block


@pytest.mark.parametrize("form", ["", "dense", "onnx"])
def test_snippets_run_in_a_process_of_their_own(asked: Made, form: str) -> None:
    folder = asked("classification", form)
    for block in snippets(folder):
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=folder, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_the_snippet_of_the_fast_runtime_runs_on_sparse_weights(
    asked: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(asked("classification"))
    (block,) = (one for one in snippets(Path()) if '"auto"' in one)
    names: dict[str, Any] = {}
    exec(block.replace('"auto"', '"sparse"'), names)
    assert names["ask"].model.runtime == "sparse"
    assert capsys.readouterr().out.count("label") == 2


@pytest.mark.parametrize("kind", ["classification", "pairs", "regression", "multilabel", "tokens"])
def test_the_pipeline_of_transformers_answers_like_ours(
    asked: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """The same labels, scores and places, so that whoever knows one can use the other."""
    monkeypatch.chdir(asked(kind, "dense"))
    names: dict[str, Any] = {}
    exec(snippets(Path())[0], names)
    capsys.readouterr()
    inputs = [{"text": "a good film", "text_pair": "bad"}] if kind == "pairs" else ["the film was great", "dull, bad"]
    theirs, ours = names["ask"](inputs), capcli.pipeline(".", threads=1)(inputs)
    if kind == "multilabel":
        theirs, ours = names["ask"](inputs, top_k=2), capcli.pipeline(".", threads=1)(inputs, top_k=2)
    for one, two in zip(theirs, ours, strict=True):
        for a, b in zip(*(part if isinstance(part, list) else [part] for part in (one, two)), strict=True):
            assert a["score"] == pytest.approx(b["score"], abs=1e-4)
            assert all(str(a[name]) == str(b[name]) for name in b.keys() - {"score"})
