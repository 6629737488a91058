"""The commands as Python functions: names of options, results, progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import SETTINGS, Tiny

import capcli
from capcli import api
from capcli.errors import ConfigError
from capcli.events import Event


def small(tiny: Tiny, out: Path, **changes: Any) -> dict[str, Any]:
    """The options of a tiny run."""
    return {"model": tiny.model, "task": "text-classification", "data": tiny.data, "out": out, **SETTINGS, **changes}


def test_a_run_by_keywords_is_that_of_the_command(tiny: Tiny, tmp_path: Path) -> None:
    found = capcli.prune(**small(tiny, tmp_path / "a"))
    assert isinstance(found, capcli.Result)
    assert found == json.loads((tmp_path / "a" / "report.json").read_text())
    assert found.metrics.pruned == found["metrics"]["pruned"]
    assert found.sparsity.kept_weights == found["sparsity"]["kept_weights"]
    assert "metrics" in dir(found) and "table" in dir(found)
    with pytest.raises(AttributeError):
        found.nothing  # noqa: B018
    text = found.table()
    assert "requested" in text and str(tmp_path / "a") in text.replace("\n", "")
    assert max(map(len, text.splitlines())) <= 100
    page = found._repr_html_()
    assert page.startswith("<pre") and "<script" not in page

    again = capcli.evaluate(model=tmp_path / "a", threads=1, min="accuracy=0.0")
    assert found["metrics"]["pruned"].items() <= again.metrics.items()
    assert "accuracy" in again.table()
    record = capcli.export(model=tmp_path / "a", to="dense", out=tmp_path / "dense", threads=1)
    assert record["format"] == "dense" and (tmp_path / "dense" / "model.safetensors").is_file()
    (tmp_path / "texts.csv").write_text("text\na good film\n")
    answers = capcli.predict(model=tmp_path / "a", file=tmp_path / "texts.csv", out=tmp_path / "answers.jsonl")
    assert answers.n_texts == answers["n_texts"] == 1


def test_units_and_types_are_those_of_files(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sparsity"):
        capcli.prune(**small(tiny, tmp_path, sparsity="most"))
    with pytest.raises(ConfigError, match="max_bytes"):
        capcli.evaluate(model="mini", task="mr", max_bytes="5 apples")
    with pytest.raises(ConfigError, match="--max-bytes 0 sets no limit"):
        capcli.probe(model="mini", max_bytes=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "mini", "sparsty": 0.9}, "unknown option 'sparsty'"),
        ({"task": "mr"}, "no model given"),
        ({"config": 3}, "expected a PruneConfig, got int"),
        ({"model": "mini", "task": "mr", "progress": "sometimes"}, "unknown progress 'sometimes'"),
        ({"model": "mini", "task": "mr", "method": "capsoft"}, "unknown method 'capsoft'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        capcli.prune(**options)


def test_a_configuration_and_options_are_not_mixed(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seed beside a PruneConfig"):
        capcli.prune(tiny.prune_config(tmp_path), seed=3)


def test_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bars on a terminal and in a notebook, nothing elsewhere, unless it is said."""
    for where, asked, shown in (
        ((False, False), "auto", False),
        ((True, False), "auto", True),
        ((False, True), "auto", True),
        ((True, True), False, False),
        ((False, False), True, True),
    ):
        monkeypatch.setattr(api, "on_terminal", lambda where=where: where[0])
        monkeypatch.setattr(api, "in_notebook", lambda where=where: where[1])
        assert isinstance(api._shown(asked), api.Bars) is shown
    api._shown(False)(Event(phase="load", note="x"))
    assert capsys.readouterr() == ("", "")


def test_the_version() -> None:
    import importlib.metadata

    assert capcli.__version__ == importlib.metadata.version("capcli")
