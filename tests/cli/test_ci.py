"""What a CI job relies on: the guide as written, reports whatever the outcome, --compare, JUnit, GitHub, the action."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import ROOT, Tiny, invoke, with_cap

from capcli import files

GUIDE = (ROOT / "docs" / "how-to" / "ci.md").read_text("utf-8")
ACTION = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
FAST = ("--threads", "1", "--latency-length", "8")
REPORTS = {"--junit": "r.xml", "--csv": "r.csv", "--markdown": "r.md", "--html": "r.html"}


def blocks(kind: str, section: str = "") -> list[str]:
    """The code blocks of the guide, or of one of its sections."""
    text = GUIDE.split(f"\n## {section}\n")[1].split("\n## ")[0] if section else GUIDE
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shell(script: str, folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a script as GitHub runs `shell: bash`."""
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


# JUnit XML -----------------------------------------------------------------------------------------------------------

XS = "{http://www.w3.org/2001/XMLSchema}"
TYPES = {"xs:string": r"(?s).*", "xs:nonNegativeInteger": r"\d+", "xs:decimal": r"-?\d+(\.\d+)?"}
SCHEMA = {element.get("name"): element for element in ElementTree.parse(ROOT / "tests" / "junit.xsd").getroot()}


def violations(found: ElementTree.Element) -> Iterator[str]:
    """Where an element departs from tests/junit.xsd; knows the parts of XML Schema that this schema uses."""
    kind = SCHEMA[found.tag][0]
    attributes = {row.get("name"): row for row in kind.findall(f"{XS}attribute")}
    for name in {*found.keys(), *attributes}:
        rule, value = attributes.get(name), found.get(name)
        if rule is None:
            yield f"{found.tag} has no attribute {name}"
        elif value is None:
            if rule.get("use") == "required":
                yield f"{found.tag} needs {name}"
        elif not re.fullmatch(TYPES[str(rule.get("type"))], value):
            yield f"{found.tag} {name}={value!r} is no {rule.get('type')}"
    if kind.get("mixed") != "true" and (found.text or "").strip():
        yield f"{found.tag} has text"
    order = [child.tag for child in found]
    pattern = ""
    for rule in kind.findall(f"{XS}sequence/{XS}element"):
        most = rule.get("maxOccurs")
        pattern += f"(?:{rule.get('ref')} ){{{rule.get('minOccurs')},{'' if most == 'unbounded' else most}}}"
    if not re.fullmatch(pattern, "".join(f"{tag} " for tag in order)):
        yield f"{found.tag} holds {order}"
    for child in found:
        yield from violations(child)


def junit(path: Path) -> tuple[int, int, int]:
    """Tests, failures and errors of a valid file; the totals are those of the cases."""
    root = ElementTree.parse(path).getroot()
    assert list(violations(root)) == []
    (suite,) = root
    found = (len(suite), len(suite.findall("*/failure")), len(suite.findall("*/error")))
    for element in (root, suite):
        assert tuple(int(str(element.get(name))) for name in ("tests", "failures", "errors")) == found
    assert len({case.get("name") for case in suite}) == len(suite), "GitLab counts cases of one name once"
    return found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<testsuite/>", "testsuite needs name"),
        ("<testsuites tests='many'/>", "is no xs:nonNegativeInteger"),
        ("<testsuites><testcase classname='a' name='b'/></testsuites>", "testsuites holds"),
        ("<testcase classname='a' name='b'>text</testcase>", "has text"),
        ("<testcase classname='a' name='b' colour='red'/>", "no attribute colour"),
        ("<failure message='m'/>", "failure needs type"),
    ],
)
def test_the_schema_refuses(text: str, said: str) -> None:
    assert any(said in line for line in violations(ElementTree.fromstring(text)))


# Reports -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def full(folder: Path) -> Iterator[Callable[[str], None]]:
    """Call it with a file name: writing that file fails as on a full disk."""
    refused: list[str] = []

    def hook(operation: str, path: Path) -> None:
        if operation == "write" and path.name in refused:
            raise OSError(28, "No space left on device")

    files.fault_hook = hook
    yield lambda name: refused.append(name)
    files.fault_hook = None


def flags(**changes: str) -> list[str]:
    return [text for flag, file in {**REPORTS, **changes}.items() for text in (flag, file)]


def test_every_report_is_written_and_the_gate_decides(pruned: Path, folder: Path) -> None:
    gates = ("--min", "accuracy=0", "--max", "macro_f1=0")
    result = invoke("eval", str(pruned), *FAST, *gates, "--json", "-q", *flags())
    assert result.exit_code == 1, result.stderr
    assert [gate["passed"] for gate in json.loads(result.stdout)["gates"]] == [True, False]
    assert junit(folder / "r.xml") == (2, 1, 0)
    assert "accuracy" in (folder / "r.csv").read_text()
    assert "accuracy" in (folder / "r.md").read_text()
    assert "accuracy" in (folder / "r.html").read_text()
    assert sorted(path.name for path in folder.iterdir()) == sorted(REPORTS.values())


def test_probe_writes_them_too(tiny: Tiny, folder: Path) -> None:
    small = ("--max-train-samples", "40", "--max-eval-samples", "20", "--tasks", "subj", "--threads", "1")
    result = invoke("probe", tiny.model, *small, "--min", "subj=0", *flags())
    assert result.exit_code == 0, result.stderr
    assert junit(folder / "r.xml") == (1, 0, 0)
    assert all("subj" in (folder / name).read_text() for name in ("r.csv", "r.md", "r.html"))


@pytest.mark.parametrize(("limit", "code"), [("--min", 3), ("--max", 1)])
def test_a_full_disk_costs_neither_the_gates_nor_the_other_reports(
    pruned: Path, folder: Path, full: Callable[[str], None], limit: str, code: int
) -> None:
    full("r.csv")
    result = invoke("eval", str(pruned), *FAST, limit, "accuracy=0", "--json", "-q", *flags())
    assert result.exit_code == code, result.stderr
    assert json.loads(result.stdout)["passed"] == (code == 3)
    assert "r.csv" in result.stderr and "no space left" in result.stderr
    assert junit(folder / "r.xml") == (1, int(code == 1), 0)
    assert (folder / "r.html").exists() and not (folder / "r.csv").exists()


@pytest.mark.parametrize("target", ["/dev/null", ".", "/proc/none/r.csv"])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(folder: Path, target: str) -> None:
    result = invoke("eval", "no-such-model", "--csv", target, "--junit", "r.xml")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "--csv" in result.stderr and "no-such-model" not in result.stderr
    assert junit(folder / "r.xml") == (1, 0, 1)
    assert not Path("/dev/null").is_file()


def test_no_report_takes_the_place_of_another_or_of_what_is_read(folder: Path) -> None:
    Path("same.csv").symlink_to("x")
    result = invoke("eval", "no-such-model", "--csv", "x", "--html", "./same.csv", "--junit", "r.xml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--html ./same.csv: --csv is written to the same file as well" in result.stderr
    assert junit(folder / "r.xml") == (1, 0, 1)
    for flag in REPORTS:
        result = compared("eval", evaluated(), evaluated(), flag, "./old.json")
        assert f"{flag} ./old.json: old.json is read as well" in result.stderr and result.exit_code == 2
        for command, baseline in (("eval", "old.json"), ("probe", "mini,old.json")):
            assert invoke(command, "mini", "--baseline", baseline, flag, "old.json").exit_code == 2
        assert invoke("eval", "no-such", "--task", "mr", "--data", "old.json", flag, "old.json").exit_code == 2
        Path("a.toml").write_text('baseline = "new.json"\ndata = "\\u0000"\n')
        assert invoke("eval", "mini", "--config", "a.toml", flag, "a.toml").exit_code == 2
        assert invoke("eval", "mini", "--config", "no", "--baseline", "old.json", flag, "old.json").exit_code == 2
        result = invoke("eval", "mini", "--config", "a.toml", flag, "new.json")
        assert f"{flag} new.json: new.json is read as well" in result.stderr
        assert json.loads(Path("old.json").read_text()) == json.loads(Path("new.json").read_text()) == evaluated()
        assert Path("a.toml").read_text().startswith("baseline")


def test_junit_holds_the_seconds_of_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from capcli.verbs import compare

    plainly, slow = compare.compare, lambda *_: time.sleep(0.05) or plainly(*_)
    monkeypatch.setattr(compare, "compare", slow)
    assert compared("eval", evaluated(), evaluated(), "--junit", "a.xml", "--min", "ece=0").exit_code == 0
    assert compared("eval", evaluated(), evaluated(task="subj"), "--junit", "b.xml").exit_code == 2
    for name in ("a.xml", "b.xml"):
        assert 0.05 <= float(str(ElementTree.parse(name).getroot().get("time"))) < 60


def test_junit_never_takes_the_place_of_a_device(folder: Path) -> None:
    result = invoke("eval", "no-such-model", "--junit", "/dev/null")
    assert result.exit_code == 2
    assert "--junit /dev/null: not a file" in result.stderr
    assert not Path("/dev/null").is_file()


def test_a_link_stays_a_link(pruned: Path, folder: Path) -> None:
    (folder / "link.md").symlink_to("real.md")
    assert invoke("eval", str(pruned), *FAST, "-q", "--markdown", "link.md").exit_code == 0
    assert (folder / "link.md").is_symlink() and (folder / "real.md").read_text()


def test_an_error_is_told_in_junit(folder: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from capcli.models import loading

    assert invoke("eval", "no/such <model>", "--task", "mr", "--junit", "a.xml").exit_code == 2
    assert invoke("probe", "--junit", "b.xml").exit_code == 2
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: 1 / 0)
    assert invoke("eval", str(pruned), "--junit", "c.xml").exit_code == 3
    assert [junit(folder / name) for name in ("a.xml", "b.xml", "c.xml")] == [(1, 0, 1)] * 3
    assert "no/such <model>" in str(ElementTree.parse(folder / "a.xml").findall(".//error")[0].get("message"))
    assert "ZeroDivisionError" in (folder / "c.xml").read_text()


# GitHub --------------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("::")]


def test_an_error_is_one_annotation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (("eval", "a%0A::b", "--task", "mr"), ("probe",), ("prune", "mini")):
        assert commands(invoke(*arguments).stderr) == []
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    result = invoke("eval", "a%0A\n::warning::b", "--task", "mr")
    assert result.exit_code == 2
    (line,) = commands(result.stderr)
    assert line.startswith("::error title=cap::") and "a%250A" in line
    assert len(commands(invoke("prune", "mini").stderr)) == 1
    assert commands(invoke("probe").stderr) == ["::error title=cap::no MODEL given"]


OLDER = "##[error]x"  # a command wherever it stands in a line


def test_no_name_is_an_older_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in errors, tables, annotations and summary nor in JSON, which stays what it is."""
    data = evaluated(task=OLDER, split=f"a {OLDER}")
    data["metrics"][OLDER] = 0.5
    gates = ("--min", f"{OLDER}=1,accuracy=1")
    asked = [
        ("eval", OLDER, "--task", "mr"),
        ("eval", OLDER, "--task", OLDER, "--debug"),
        ("prune", OLDER, "--task", "mr", "--plan"),
        ("eval", "--compare", f"{OLDER}.json", "new.json", *gates),
    ]
    Path(f"{OLDER}.json").write_text(json.dumps(data))
    assert any(OLDER in invoke(*arguments).stderr for arguments in asked), "as it is, elsewhere"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
    compared("eval", data, data)
    for arguments in asked:
        result = invoke(*arguments)
        assert result.exit_code in (1, 2) and "##[" not in result.stdout + result.stderr, arguments
    assert "##\\[error]x" in result.stdout and "##[" not in (folder / "summary.md").read_text()
    result = compared("eval", data, data, *gates)
    assert "##[" not in result.stdout + result.stderr and json.loads(result.stdout)["task"] == OLDER


@pytest.mark.slow
def test_what_the_parser_refuses_is_annotated_too(folder: Path) -> None:
    env = with_cap(folder, GITHUB_ACTIONS="true")
    done = shell("cap eval '--no##[x]'", folder, env)
    assert done.returncode == 2
    assert commands(done.stderr) == [r"::error title=cap::no such option: --no##\[x]"]
    assert "##[" not in done.stderr


def test_a_failed_gate_is_annotated_once_and_the_summary_is_the_markdown(
    pruned: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
    result = invoke("eval", str(pruned), *FAST, "--max", "accuracy=0", "--markdown", "r.md")
    assert result.exit_code == 1
    assert len(commands(result.stderr)) == 1 and not commands(result.stdout)
    assert (folder / "summary.md").read_text() == (folder / "r.md").read_text()


# cap.toml and MODEL --------------------------------------------------------------------------------------------------


def test_options_come_from_cap_toml(pruned: Path, folder: Path) -> None:
    text = f'model = {json.dumps(str(pruned))}\nthreads = 1\n[eval]\nlatency-length = 8\nmax = "accuracy=0"\n'
    (folder / "cap.toml").write_text(text)
    result = invoke("eval", "--json")
    assert result.exit_code == 1, result.stderr
    assert "options from cap.toml\n" in result.stderr
    assert json.loads(result.stdout)["latency"]["length"] == 8
    assert invoke("eval", "--json", "--max", "accuracy=1").exit_code == 0
    missing = invoke("eval", "no-such-model", "--task", "mr")
    assert missing.exit_code == 2 and "no-such-model" in missing.stderr
    other = invoke("eval", "--config", "/dev/null")
    assert other.exit_code == 2 and "error: no MODEL given\nhint: " in other.stderr


@pytest.mark.parametrize("arguments", [("eval",), ("probe",), ("eval", ""), ("probe", "", "--tasks", "mr")])
def test_without_a_model(folder: Path, arguments: tuple[str, ...]) -> None:
    """Also where a variable of the job was empty, though a file names a model."""
    if len(arguments) > 1:
        (folder / "cap.toml").write_text('model = "mini"')
    result = invoke(*arguments, "-q")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: no MODEL given\nhint: give one after cap {arguments[0]}, or set model in cap.toml\n"
    )


def test_a_folder_called_cap_toml(folder: Path) -> None:
    (folder / "cap.toml").mkdir()
    result = invoke("eval", "mini")
    assert result.exit_code == 2 and "cannot read cap.toml" in result.stderr


# --compare -----------------------------------------------------------------------------------------------------------


def evaluated(**changes: Any) -> dict[str, Any]:
    """A stored result of `cap eval`."""
    accuracy = changes.pop("accuracy", 0.8)
    base = {
        "schema_version": 1, "model": "m", "task": "mr", "split": "validation", "primary": "accuracy",
        "metrics": {"accuracy": accuracy, "ece": 0.1},
        "confidence_95": {"accuracy": [accuracy - 0.02, accuracy + 0.02]},
        "n_examples": 1000, "splits": {}, "sparsity": {"achieved": 0.9, "whole_model": 0.5},
        "size": {"weights_bytes": 1000, "codings": {"bitmask": 3}},
        "latency": {"median_ms": 5.0, "confidence_95": [4.9, 5.1], "batch": 1, "device": "cpu"},
        "gates": [], "passed": True,
    }  # fmt: skip
    return {**base, **changes}


def probed(**tasks: float) -> dict[str, Any]:
    """A stored result of `cap probe`."""
    rows = {
        name: {"metric": "accuracy", "mean": value, "confidence_95": [value - 0.01, value + 0.01], "n_examples": 100}
        for name, value in tasks.items()
    }
    value = sum(tasks.values()) / len(tasks)
    mean = {"value": value, "confidence_95": [value - 0.01, value + 0.01]}
    return {"schema_version": 1, "model": "m", "probe": "linear", "layer": "last", "tasks": rows, "mean": mean}


def compared(command: str, old: Any, new: Any, *arguments: str) -> Any:
    """`cap COMMAND --compare` of two results; what it printed."""
    for name, data in (("old.json", old), ("new.json", new)):
        Path(name).write_text(data if isinstance(data, str) else json.dumps(data))
    return invoke(command, "--compare", "old.json", "new.json", "--json", *arguments)


def rows(result: Any, key: str = "rows") -> dict[str, dict[str, Any]]:
    assert result.exit_code in (0, 1), result.stderr
    return {row["name"]: row for row in json.loads(result.stdout)[key]}


@pytest.mark.parametrize(("new", "moved"), [(0.8, False), (0.82, False), (0.75, True), (0.9, True)])
def test_moved_means_beyond_the_noise(folder: Path, new: float, moved: bool) -> None:
    """Independent intervals of ±0.02 each: that of the change is ±0.028."""
    found = rows(compared("eval", evaluated(), evaluated(accuracy=new)))["accuracy"]
    assert found["moved"] is moved
    assert (found["old"], found["new"], found["change"]) == (0.8, new, pytest.approx(new - 0.8))
    assert found["interval"] == pytest.approx([new - 0.8 - 0.02 * 2**0.5, new - 0.8 + 0.02 * 2**0.5])
    assert found["old_confidence_95"] == pytest.approx([0.78, 0.82])


def test_without_intervals_nobody_knows(folder: Path) -> None:
    """One interval is not enough: it would make the other value exact."""
    new = evaluated(accuracy=0.5)
    new["metrics"]["ece"], new["confidence_95"] = 0.2, {}
    found = rows(compared("eval", evaluated(), new))
    assert [(row["moved"], row["interval"]) for row in found.values()] == [(None, None)] * 2
    assert rows(compared("eval", evaluated(), evaluated()))["ece"]["moved"] is False, "equal is equal"


def test_sizes_are_exact_and_latency_needs_the_same_conditions(folder: Path) -> None:
    slow = {"median_ms": 6.0, "confidence_95": [5.9, 6.1], "batch": 1, "device": "cpu"}
    result = compared("eval", evaluated(), evaluated(size={"weights_bytes": 900}, latency=slow))
    assert rows(result, "sizes")["weights_bytes"] == {"name": "weights_bytes", "old": 1000, "new": 900, "change": -100}
    assert rows(result, "sizes")["sparsity"]["change"] == 0
    assert rows(result, "latency")["median_ms"]["moved"] is True
    result = compared("eval", evaluated(), evaluated(latency={**slow, "device": "cuda"}))
    assert rows(result, "latency")["median_ms"]["moved"] is None
    assert "device cpu, now cuda" in json.loads(result.stdout)["notes"][0]


def test_changed_texts_and_further_splits_have_names(folder: Path) -> None:
    more = {"metrics": {"accuracy": 0.7}, "confidence_95": {"accuracy": [0.6, 0.8]}}
    data = evaluated(splits={"validation": more, "test": more}, perturbed={"typos": more})
    names = list(rows(compared("eval", data, data, "--min", "accuracy@typos=0.6")))
    assert names == ["accuracy", "ece", "accuracy@typos", "accuracy@test"]
    assert list(rows(compared("eval", evaluated(), data))) == ["accuracy", "ece"]


@pytest.mark.parametrize(
    ("new", "gates", "code"),
    [
        (0.79, ("--max-drop", "accuracy=0.02"), 0),
        (0.79, ("--max-drop", "accuracy=0.005"), 1),
        (0.79, ("--max-drop", "accuracy=0.005", "--confidence", "0.95"), 0),
        (0.70, ("--max-drop", "accuracy=0.005", "--confidence", "0.95"), 1),
        (0.79, ("--max-drop", "accuracy=1%"), 1),
        (0.79, ("--min-retention", "0.98"), 0),
        (0.79, ("--min", "accuracy=0.795", "--max", "ece=0.2"), 1),
        (0.79, ("--max-bytes", "999"), 1),
        (0.79, ("--max-latency-ms", "5"), 0),
    ],
)
def test_gates_hold_new_against_old(folder: Path, new: float, gates: tuple[str, ...], code: int) -> None:
    result = compared("eval", evaluated(), evaluated(accuracy=new), *gates, *flags())
    assert result.exit_code == code, result.stderr
    assert json.loads(result.stdout)["passed"] is (code == 0)
    assert junit(folder / "r.xml")[1] == code
    assert all((folder / name).read_text() for name in REPORTS.values())


@pytest.mark.parametrize(
    ("gates", "said"),
    [
        (("--min", "accuracy=80"), "did you mean 0.80 or 80%?"),
        (("--max-drop", "accuracy=2"), "did you mean 0.02 or 2%?"),
        (("--max-drop", "nothing=0.5"), "unknown metric 'nothing'"),
        (("--min", "acc=0.5"), "did you mean accuracy?"),
    ],
)
def test_gates_that_say_nothing_are_refused_here_too(folder: Path, gates: tuple[str, ...], said: str) -> None:
    result = compared("eval", evaluated(), evaluated(), *gates)
    assert (result.exit_code, result.stdout) == (2, "") and said in result.stderr
    (folder / "cap.toml").write_text(f'{gates[0][2:]} = "{gates[1]}"')
    result = compared("eval", evaluated(), evaluated())
    assert (result.exit_code, result.stdout) == (2, "") and said in result.stderr


def test_the_bounds_are_those_of_the_metric(folder: Path) -> None:
    """Of a correlation from -1 to 1, of one that nobody knows any; of the mean the mean of them."""
    data = evaluated(metrics={"pearson": -0.4, "mse": 7.0}, primary="pearson")
    assert compared("eval", data, data, "--min", "pearson=-0.5", "--max", "mse=80").exit_code == 0
    assert compared("eval", data, data, "--max-drop", "pearson=1.5,mse=2").exit_code == 0
    assert "between -1 and 1" in compared("eval", data, data, "--max-drop", "pearson=2").stderr
    probes = probed(mr=0.7, stsb=0.8)
    probes["tasks"]["stsb"]["metric"] = "pearson"
    assert compared("probe", probes, probes, "--min", "stsb=-0.2,mean=-0.4").exit_code == 0
    assert "mean is between -0.5 and 1" in compared("probe", probes, probes, "--min", "mean=-0.6").stderr


def test_a_metric_that_only_one_has_fails_its_gate(folder: Path) -> None:
    old = evaluated(metrics={"accuracy": 0.8, "f1": 0.7})
    result = compared("eval", old, evaluated(), "--max-drop", "f1=0.1")
    assert result.exit_code == 1 and "not measured" in json.loads(result.stdout)["gates"][0]["message"]


def test_probes_compare_on_the_tasks_that_both_have(folder: Path) -> None:
    result = compared("probe", probed(mr=0.7, subj=0.8), probed(mr=0.6, subj=0.8), "--max-drop", "mean=0.1")
    assert result.exit_code == 0, result.stderr
    assert {name: row["moved"] for name, row in rows(result).items()} == {"mr": True, "subj": False, "mean": True}
    new = probed(mr=0.6, banking77=0.5)
    found = compared("probe", probed(mr=0.7, subj=0.8), new)
    assert list(rows(found)) == ["mr"]
    assert "subj, banking77" in json.loads(found.stdout)["notes"][0]
    new["tasks"]["mr"]["n_examples"] = 7
    said = compared("probe", probed(mr=0.7), new).stderr
    assert "no task in common that was measured in the same way: the n_examples of mr is 100, now 7\nhint: " in said
    said = compared("probe", probed(mr=0.7), probed(subj=0.7, sst2=0.8)).stderr
    assert "no task in common that was measured in the same way: mr and subj, sst2\nhint: " in said


@pytest.mark.parametrize("name", ["data", "max_length"])
def test_other_examples_do_not_compare_unless_nobody_knows(folder: Path, name: str) -> None:
    values: list[Any] = ["a", "b"] if name == "data" else [1, 2]
    old, new = (evaluated(**{name: value}) for value in values)
    assert f"differ in {name}: {values[0]} and {values[1]}" in compared("eval", old, new).stderr
    assert list(rows(compared("eval", old, evaluated()))) == ["accuracy", "ece"]
    probes = [probed(mr=0.5), probed(mr=0.5)]
    for value, one in zip(values, probes, strict=True):
        one["tasks"]["mr"][name] = value
    assert f"the {name} of mr is {values[0]}, now {values[1]}" in compared("probe", *probes).stderr
    assert list(rows(compared("probe", probes[0], probed(mr=0.5)))) == ["mr", "mean"]


@pytest.mark.parametrize(
    ("command", "old", "new", "said"),
    [
        ("eval", evaluated(), evaluated(task="subj"), "differ in task: mr and subj"),
        ("eval", evaluated(), evaluated(split="test"), "differ in split"),
        ("eval", evaluated(), evaluated(n_examples=5), "differ in n_examples: 1000 and 5"),
        ("probe", probed(mr=0.5), {**probed(mr=0.5), "layer": "3"}, "differ in layer: last and 3"),
        ("eval", evaluated(), probed(mr=0.5), "new.json is a result of cap probe"),
        ("probe", evaluated(), probed(mr=0.5), "old.json is a result of cap eval"),
        ("eval", evaluated(), {"metrics": {"n_examples": 3, "pruned": {}}}, "new.json contains no result of cap eval"),
        ("eval", evaluated(), evaluated(schema_version=2), "new.json has schema_version 2, this cap reads 1"),
        ("eval", evaluated(schema_version=True), evaluated(), "old.json: schema_version is true, not a number"),
        ("eval", evaluated(), evaluated(latency={"median_ms": "fast"}), "new.json: latency.median_ms is a text, not a"),
        ("eval", evaluated(n_examples=0.5), evaluated(), "old.json: n_examples is the number 0.5, not a whole number"),
        ("probe", probed(mr=0.5), {**probed(mr=0.5), "mean": []}, "new.json: mean is a list, not a JSON object"),
        ("eval", evaluated(), "[1]", "contains no result"),
        ("eval", evaluated(), "{", "new.json is not valid JSON"),
    ],
)
def test_what_does_not_compare_is_refused(folder: Path, command: str, old: Any, new: Any, said: str) -> None:
    result = compared(command, old, new)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_what_powershell_writes_is_named(folder: Path, encoding: str, pruned: Path) -> None:
    (folder / "old.json").write_bytes(json.dumps(evaluated()).encode(encoding))
    (folder / "new.json").write_bytes(json.dumps(evaluated()).encode("utf-8-sig"))
    assert invoke("eval", "--compare", "new.json", "new.json").exit_code == 0, "a mark of the byte order is read over"
    (folder / "options.toml").write_bytes("seed = 1".encode(encoding))
    for arguments, name in (
        (("eval", "--compare", "old.json", "new.json"), "old.json"),
        (("eval", "--compare", "new.json", "old.json"), "old.json"),
        (("eval", str(pruned), "--baseline", "old.json"), "old.json"),
        (("eval", str(pruned), "--config", "options.toml"), "options.toml"),
    ):
        result = invoke(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"error: {name} is in UTF-16 or UTF-32, not in UTF-8\nhint: save it as UTF-8; " in result.stderr
        assert "measuring" not in result.stderr


def test_compare_takes_gates_and_nothing_else(folder: Path) -> None:
    for extra in (["m"], ["--baseline", "b"], ["--seed", "3"]):
        result = compared("eval", evaluated(), evaluated(), *extra)  # m is a third result, which is not there
        assert result.exit_code == 2
        assert "--compare measures nothing" in result.stderr
    (folder / "cap.toml").write_text('model = "m"\nmin = "accuracy=0.9"\n')
    assert compared("eval", evaluated(), evaluated()).exit_code == 1, "gates of the file count, the model does not"
    missing = invoke("eval", "--compare", "none.json", "new.json")
    assert missing.exit_code == 2 and "none.json does not exist" in missing.stderr


def test_any_number_of_results_is_compared_with_the_first(folder: Path) -> None:
    """Each of the others as in a comparison of two; gates are of each, and say so."""
    for name, accuracy in (("a", 0.8), ("b", 0.82), ("c", 0.7)):
        (folder / f"{name}.json").write_text(json.dumps(evaluated(accuracy=accuracy)))
    names = [f"{name}.json" for name in "abc"]
    result = invoke("eval", "--compare", *names, "--json", "--max-drop", "accuracy=0.05", *flags())
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["kind"], found["baseline"], found["task"], found["n_examples"]) == ("eval", "a.json", "mr", 1000)
    for name, one in zip(names[1:], found["comparisons"], strict=True):
        alone = invoke("eval", "--compare", "a.json", name, "--json", "--max-drop", "accuracy=0.05")
        assert one == json.loads(alone.stdout)
    assert [(gate["name"], gate["passed"]) for gate in found["gates"]] == [
        ("max drop accuracy, b.json", True),
        ("max drop accuracy, c.json", False),
    ]
    assert found["gates"][1]["message"] == "c.json: accuracy fell 10.00 points (limit 5.00)"
    assert junit(folder / "r.xml") == (2, 1, 0)
    shown = invoke("eval", "--compare", *names, "-q").stdout
    lines = [line.split() for line in shown.splitlines()]
    assert ["accuracy", "a.json", "0.8000"] in lines
    assert ["accuracy", "c.json", "0.7000", "-0.1000", "[-0.1283,", "-0.0717]", "yes,", "down"] in lines
    assert ["weights_bytes", "b.json", "1.00", "kB", "none"] in lines
    table = [line.split(",") for line in (folder / "r.csv").read_text().splitlines()]
    assert [row[6] for row in table if row[0] == "metric" and row[5] == "accuracy"] == ["0.82", "0.7"]
    assert "3 stored results" in (folder / "r.html").read_text() and "c.json" in (folder / "r.md").read_text()


def test_probes_are_compared_with_the_first_too(folder: Path) -> None:
    for name, value in (("a", 0.8), ("b", 0.8), ("c", 0.7)):
        (folder / name).write_text(json.dumps(probed(mr=value)))
    found = json.loads(invoke("probe", "--compare", "a", "b", "c", "--json").stdout)
    assert [[row["moved"] for row in one["rows"]] for one in found["comparisons"]] == [[False, False], [True, True]]
    assert found["kind"] == "probe" and "task" not in found


def test_one_result_is_not_compared_and_several_are_not_measured(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(evaluated()))
    for names in ([], ["a.json"]):
        result = invoke("eval", "--compare", *names)
        assert result.exit_code == 2
        assert f"--compare needs two results or more, got {len(names)}" in result.stderr
    result = invoke("eval", "a", "b")
    assert result.exit_code == 2
    assert "cap eval measures one MODEL, got 2" in result.stderr and "--compare" in result.stderr


@pytest.mark.slow
def test_folders_of_runs_are_compared_by_their_reports(folder: Path, pruned: Path, tmp_path: Path) -> None:
    """By folder or report, with one another or with a stored result of the same examples; not as results of a probe."""
    report = json.loads((pruned / "report.json").read_text())
    (folder / "a.json").write_text(
        json.dumps(evaluated(task=report["task"], n_examples=report["metrics"]["n_examples"]))
    )
    result = invoke("eval", "--compare", str(pruned), str(pruned / "report.json"), "a.json", "--json")
    assert result.exit_code == 0, result.stderr
    same, other = json.loads(result.stdout)["comparisons"]
    assert same["old"] == "…/out"
    values = {row["name"]: row for row in same["rows"]}
    assert values["accuracy"]["new"] == report["metrics"]["pruned"]["accuracy"]
    assert values["accuracy"]["new_confidence_95"] == report["metrics"]["confidence_95"]["accuracy"]
    assert {row["name"]: row["new"] for row in same["sizes"]} == {
        "dense_bytes": report["size"]["dense_bytes"],
        "weights_bytes": report["size"]["weights_bytes"],
        "artifact_bytes": report["size"]["artifact_bytes"],
        "sparsity": report["sparsity"]["achieved"],
        "whole_model_sparsity": report["sparsity"]["whole_model"],
    }
    assert same["latency"][0]["new"] == report["latency"]["pruned"]["median_ms"]
    assert [row["new"] for row in other["rows"]] == [0.8]
    (folder / "empty").mkdir()
    for command, names, said in (
        ("eval", ("empty", "a.json"), "report.json does not exist"),
        ("probe", (str(pruned), str(pruned)), "contains no result of cap probe"),
    ):
        refused = invoke(command, "--compare", *names)
        assert refused.exit_code == 2 and said in refused.stderr


@pytest.mark.parametrize("value", [None, "x", [], {}, float("nan"), float("inf"), True, 10**400], ids=range(8))
def test_hostile_results_give_a_result_or_an_error(folder: Path, value: Any) -> None:
    for key in evaluated():
        for first, second in ((evaluated(**{key: value}), evaluated()), (evaluated(), evaluated(**{key: value}))):
            result = compared("eval", first, second, "--min-retention", "0.5", "--max-latency-ms", "9")
            assert result.exit_code in (0, 1, 2), (key, result.stderr)
    for key in ("metric", "mean", "confidence_95", "n_examples"):
        data = probed(mr=0.5)
        data["tasks"]["mr"][key] = value
        assert compared("probe", probed(mr=0.5), data).exit_code in (0, 1, 2), key


# The guide -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_guide_as_written(tmp_path: Path) -> None:
    """The commands of "Try it" in one folder, one after another, each with the exit code that stands behind it."""
    (settings,), (script,) = blocks("toml", "Try it"), blocks("sh", "Try it")
    env = with_cap(tmp_path)
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "cap.toml").write_text(settings)
    lines = script.splitlines()
    assert [int(line.split("# exit code ")[1][0]) for line in lines] == [0, 1, 0, 2]
    for line in lines:
        done = shell(line, folder, env)
        assert done.returncode == int(line.split("# exit code ")[1][0]), (line, done.stderr)
        assert "Traceback" not in done.stderr
        assert "options from cap.toml" in done.stderr or done.returncode == 2
        if "--junit" in line:
            assert junit(folder / "gates.xml") == (1, int(done.returncode == 1), int(done.returncode == 2))
    assert json.loads((folder / "new.json").read_text())["passed"] is False
    full = shell(f"ulimit -f 1; {lines[2].split(' --max')[0]} --html page.html | cat", folder, env)  # files of 1 kB
    assert full.returncode == 3, full.stderr
    assert "error: cannot write" in full.stderr and "subj" in full.stdout


def test_workflows_are_yaml() -> None:
    found = [yaml.safe_load(text) for text in blocks("yaml")]
    assert len(found) >= 5 and all(found)
    inputs = [step["with"] for one in found for job in one.get("jobs", {}).values() for step in job["steps"]
              if step.get("uses", "").startswith("OWNER/REPO")]  # fmt: skip
    assert inputs and all(set(given) <= set(ACTION["inputs"]) for given in inputs)
    assert all("${{" not in step.get("run", "") for one in found for job in one.get("jobs", {}).values()
               for step in job["steps"])  # fmt: skip


def test_the_table_of_exit_codes_is_that_of_the_reference() -> None:
    told = set(re.findall(r"^\| (\d+) \|", GUIDE, re.MULTILINE))
    reference = (ROOT / "docs" / "reference" / "exit-codes.md").read_text("utf-8")
    assert told == set(re.findall(r"^\| (\d+) \|", reference, re.MULTILINE)) - {"75"}, "only prune and export stop"


# The action ----------------------------------------------------------------------------------------------------------

STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}


def test_the_action_is_well_formed_and_reads_no_input_as_code() -> None:
    assert ACTION["runs"]["using"] == "composite"
    assert all({"description"} <= set(row) for table in ("inputs", "outputs") for row in ACTION[table].values())
    for step in STEPS.values():
        assert "${{" not in step.get("run", "")
        assert "uses" in step or step["shell"] == "bash"
        for text in (step.get("env") or {}).values():
            used = re.findall(r"\$\{\{ inputs\.([\w-]+) \}\}", text)
            assert set(used) <= set(ACTION["inputs"])
            assert used or text == "${{ github.action_path }}"


def run_action(
    folder: Path, command: str, args: str, stub: str = "", where: Path | None = None, **changes: str
) -> tuple[Any, dict[str, str]]:
    """The step that runs `cap`, or a stub of it, in `folder` or `where`: how it ended, and its outputs."""
    output = folder / "output"
    output.write_text("")
    env = with_cap(folder, CAP_COMMAND=command, CAP_ARGS=args, RUNNER_TEMP=str(folder), GITHUB_OUTPUT=str(output))
    python = folder / "bin" / "python"
    python.unlink(missing_ok=True)
    python.symlink_to(sys.executable)
    if stub:
        (folder / "bin" / "cap").write_text(stub)
    done = shell(STEPS["cap"]["run"], where or folder, {**env, **changes})
    return done, dict(line.split("=", 1) for line in output.read_text().splitlines())


@pytest.mark.slow
def test_the_action_runs_cap(folder: Path) -> None:
    for name, value in (("old", 0.8), ("new", 0.7)):
        Path(f"{name}.json").write_text(json.dumps(evaluated(accuracy=value)))
    done, outputs = run_action(folder, "eval", "--compare old.json new.json")
    assert (done.returncode, outputs["passed"]) == (0, "true"), done.stderr
    assert json.loads(Path(outputs["report"]).read_text())["kind"] == "eval"
    assert "accuracy" in done.stdout, "the log shows the Markdown"
    done, outputs = run_action(folder, "eval", "--compare old.json new.json --max-drop 'accuracy=0.01'")
    assert (done.returncode, outputs["passed"]) == (1, "false")
    done, outputs = run_action(folder, "eval", "--compare old.json none.json", GITHUB_ACTIONS="true")
    assert (done.returncode, outputs) == (2, {})
    assert commands(done.stderr) == ["::error title=cap::none.json does not exist"]
    done, outputs = run_action(folder, "eval", "--help")
    assert (done.returncode, outputs) == (0, {}), "nothing was measured"


def test_the_action_expands_and_runs_nothing_in_its_inputs(folder: Path) -> None:
    nasty = "'a b' $(touch pwned) `touch pwned` ;touch pwned; * \"$HOME\" ''"
    stub = f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {folder / 'seen'}; echo '{{}}'\n"
    done, outputs = run_action(folder, "eval", nasty, stub)
    assert done.returncode == 0, done.stderr
    assert (folder / "seen").read_text().split("\n")[3:-2] == shlex.split(nasty)
    assert not (folder / "pwned").exists()
    for command, args in (("prune", ""), ("eval; touch pwned", ""), ("eval", "an 'open quote"), ("eval", "a\\")):
        done, outputs = run_action(folder, command, args)
        assert (done.returncode, outputs) == (2, {})
        assert len((done.stdout + done.stderr).splitlines()) == len(commands(done.stdout + done.stderr)) == 1
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize(
    ("install", "index", "expected"),
    [
        ("action", "https://x/cpu", [["-c", "A/constraints.txt", "--no-deps", "--index-url", "https://x/cpu", "torch"],
                                     ["-c", "A/constraints.txt", "--", "A"]]),
        ("capcli==1 $(touch pwned)", "", [["--", "capcli==1 $(touch pwned)"]]),
    ],
)  # fmt: skip
def test_what_the_action_installs(folder: Path, install: str, index: str, expected: list[list[str]]) -> None:
    env = with_cap(folder, CAP_INSTALL=install, CAP_TORCH_INDEX=index, CAP_ACTION="A", SEEN=str(folder / "seen"))
    fake = folder / "bin" / "python"
    fake.write_text('#!/bin/sh\nshift 6\nfor a in "$@"; do printf "%s\\n" "$a"; done >> "$SEEN"; echo >> "$SEEN"\n')
    fake.chmod(0o755)
    done = shell(STEPS["Install capcli"]["run"], folder, env)
    assert done.returncode == 0, done.stderr
    calls = [call.splitlines() for call in (folder / "seen").read_text().split("\n\n") if call]
    assert calls == expected
    assert not (folder / "pwned").exists()


@pytest.mark.slow
def test_the_action_imports_nothing_of_the_checkout(folder: Path) -> None:
    checkout = folder / "checkout"
    for name in ("shlex", "os", "json", "sitecustomize", "usercustomize", "typer", "pip", "pip/__main__", "capcli/cli"):
        path = checkout / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("open('pwned', 'w')\nraise SystemExit('pwned')")
    (checkout / "pip" / "__init__.py").touch()
    (checkout / "capcli" / "__init__.py").touch()
    for name in ("old", "new"):
        (checkout / f"{name}.json").write_text(json.dumps(evaluated(accuracy=0.8)))
    script = f"#!{sys.executable}\nimport sys\nfrom capcli.__main__ import main\nsys.exit(main())\n"  # as pip writes it
    paths = os.pathsep.join(["", ".", str(checkout), str(checkout / "pip"), str(ROOT)])
    env = {"PYTHONPATH": paths, "GITHUB_WORKSPACE": str(checkout)}
    done, outputs = run_action(folder, "eval", "--compare old.json new.json", script, where=checkout, **env)
    assert (done.returncode, outputs.get("passed")) == (0, "true"), done.stderr
    pytest.importorskip("pip")
    env |= {"CAP_INSTALL": "none/at/all", "CAP_TORCH_INDEX": "", "CAP_ACTION": "A"}
    done = shell(STEPS["Install capcli"]["run"], checkout, with_cap(folder, **env))
    assert done.returncode == 1 and "none/at/all" in done.stderr, "the real pip says that there is no such folder"
    assert "pwned" not in done.stderr
    assert not list(folder.rglob("pwned"))
