"""The table of kinds: every table over kinds has its rows, and nothing else decides by the name of a kind."""

import ast
import itertools
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest
import transformers

import capcli
from capcli.data import classes, labels, tasks
from capcli.data.kinds import KINDS
from capcli.measuring import answers, chance, classifiers, metrics
from capcli.models import hf, task_losses

TABLES: dict[str, Collection[str]] = {
    "labels.PARSERS": labels.PARSERS,
    "classes.CODERS": classes.CODERS,
    "task_losses.TASK_LOSSES": task_losses.TASK_LOSSES,
    "task_losses.DISTILLATIONS": task_losses.DISTILLATIONS,
    "metrics.METRICS": metrics.METRICS,
    "answers.ANSWERS": answers.ANSWERS,
    "chance.CONSTANTS": chance.CONSTANTS,
    "classifiers.LINEAR": classifiers.LINEAR,
}
HOUSE = Path(capcli.__file__).parent


@pytest.mark.parametrize("name", TABLES)
def test_every_table_over_kinds_has_the_same_rows(name: str) -> None:
    assert list(TABLES[name]) == list(KINDS)


def test_the_docstring_of_kinds_names_the_tables() -> None:
    text = ast.get_docstring(ast.parse((HOUSE / "data" / "kinds.py").read_text("utf-8"))) or ""
    named = [name for name in TABLES if name in text or name.partition(".")[2] in text]
    assert named == list(TABLES)


def test_no_other_code_asks_for_the_name_of_a_kind() -> None:
    found = []
    for path in sorted(HOUSE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Compare):
                constants = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                found += [f"{path.name}:{node.lineno}"] * bool(constants & KINDS.keys())
    assert found == []


def test_every_metric_of_a_kind_or_a_task_can_be_measured() -> None:
    for name, row in KINDS.items():
        wanted = {*row.metrics, *row.plain_metrics, *row.agreements, *row.plain_agreements}
        assert wanted <= metrics.METRICS[name].keys(), name
    for task in tasks.TASKS.values():
        assert task.measured
        assert set(task.measured) <= metrics.METRICS[task.kind].keys()
    assert tasks.TASKS["regression"].measured == ("pearson", "spearman")
    assert tasks.TASKS["cola"].measured == ("matthews", "accuracy")


def test_rows_make_sense() -> None:
    for name, row in KINDS.items():
        assert hasattr(transformers, row.head), name
        assert [bool(row.outputs), row.classes, row.vectors].count(True) == 1, (
            "outputs are classes, or have names, or none"
        )
        assert tasks.TASKS[row.texts].kind in (name, "classification")
        assert row.n_outputs(7) == (7 if row.classes else len(row.outputs))
        assert not (row.single and row.several)
    told = [(row.head, row.problem) for row in KINDS.values() if not row.groups]  # which are told by the data
    assert len(set(told)) == len(told), "a configuration of transformers tells the kinds apart"


def test_a_network_that_calls_its_base_otherwise_is_read_under_every_head() -> None:
    """Llama's head for spans has its base model under another name than its other heads."""
    config = transformers.LlamaConfig()
    prefixes = {kind: hf.class_for(config, kind).base_model_prefix for kind in KINDS}
    assert len(set(prefixes.values())) == 2
    for kind, other in itertools.permutations(KINDS, 2):
        found = hf.key_mapping(config, kind) or {}
        assert found.get(rf"^{prefixes[other]}\.") == (
            None if prefixes[other] == prefixes[kind] else f"{prefixes[kind]}."
        )
    assert hf.key_mapping(transformers.BertConfig(), "spans") is None


def test_the_table_needs_nothing_heavy() -> None:
    code = "import capcli.data.kinds, sys\nprint({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
