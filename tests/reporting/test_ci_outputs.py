"""Results of eval, probe and --compare in every form: each parses in its language, nothing acts, figures are there."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from test_report import GATES, NASTY, Page, check_inert, gates

from capcli.errors import FileError
from capcli.records.codec import from_json
from capcli.records.measured import Comparison, EvalResult, ProbeResult
from capcli.records.parts import Gate
from capcli.reporting import ci, documents, tables, terminal
from capcli.reporting.charts import STRIP_EDGE, STRIP_WIDTH, Mark, strips
from capcli.reporting.text import plain

COMMANDS = ("eval", "probe", "compare")
KINDS: dict[str, type[Any]] = {"eval": EvalResult, "probe": ProbeResult, "compare": Comparison}
JUNK = [None, [], {}, "text", -1.5, True, float("nan"), float("inf"), 10**400, 1e308]


def read(command: str, data: Any) -> Any:
    """The record of a result, as it is read from a file."""
    return from_json(KINDS[command], data, "result.json")


def difference(value: float) -> dict[str, Any]:
    return {"value": value, "confidence_95": [value - 0.02, value + 0.01]}


def gates_of(name: str) -> list[dict[str, Any]]:
    return [{**gate, "name": name, "metric": name, "message": gate["message"] and name} for gate in GATES]


def eval_result(name: str = "m") -> dict[str, Any]:
    return {
        "schema_version": 1, "model": name, "task": name, "split": name, "primary": name, "labels": [name, "b"],
        "metrics": {name: 0.81678, "ece": 0.0412}, "confidence_95": {name: [0.8, 0.83]}, "n_examples": 872,
        "chance": {name: 0.50917}, "at_chance": [name],
        "splits": {name: {"metrics": {name: 0.81678}}, "other": {"metrics": {name: 0.7}, "n_examples": 10}},
        "baseline": {"model": name, "metrics": {name: 0.9, "ece": 0.05}, "confidence_95": {name: [0.88, 0.92]}},
        "differences": {name: difference(-0.08329), "ece": {"value": -0.0088, "confidence_95": None}},
        "retention": {name: 0.9075}, "agreement": 0.97251, "sparsity": {"achieved": 0.97, "whole_model": 0.6},
        "perturbed": {
            "typos": {
                "metrics": {name: 0.75551}, "confidence_95": {name: [0.73, 0.77]}, "agreement": 0.9,
                "differences": {name: difference(-0.06127)},
            }
        },
        "size": {"artifact_bytes": 1234567, "weights_bytes": 1200000, "codings": {name: 3}}, "notes": [name],
        "latency": {
            "median_ms": 3.21, "p10_ms": 3.0, "p90_ms": 4.0, "confidence_95": [3.1, 3.3], "batch": 1, "length": 128,
            "threads": 2, "device": name, "runtime": name, "processor": name,
            "own_lengths": {"median_ms": 2.1, "p95_ms": 3.4, "texts": 200, "median_tokens": 21},
        },
        "gates": gates_of(name), "passed": False,
    }  # fmt: skip


def probed(name: str, value: float) -> dict[str, Any]:
    layers = [
        {"layer": i, "mean": value + i / 100, "deviation": 0.01, "confidence_95": [value, value + 0.1]}
        for i in range(3)
    ]
    return {
        name: {
            "metric": name, "mean": value, "deviation": 0.00411, "confidence_95": [value - 0.02, value + 0.02],
            "values": [value] * 3, "chance": 0.51234, "at_chance": True,
            "split": name, "n_train": 50, "n_examples": 100, "n_classes": 2, "layers": layers,
        }
    }  # fmt: skip


def probe_result(name: str = "m") -> dict[str, Any]:
    return {
        "schema_version": 1, "model": name, "sha256": "ab" * 32, "probe": "linear", "layer": "all", "pooling": "mean",
        "seeds": 3, "seed": 1, "tasks": probed(name, 0.71239), "mean": {"value": 0.7, "confidence_95": [0.69, 0.72]},
        "chance": 0.51234,
        "baselines": [
            {
                "model": name, "tasks": probed(name, 0.75), "mean": {"value": 0.74, "confidence_95": [0.7, 0.8]},
                "differences": {name: difference(-0.03761), "mean": difference(-0.04)},
            }
        ],
        "size": {"weights_bytes": 1200000}, "latency": {}, "notes": [name], "gates": gates_of(name), "passed": False,
    }  # fmt: skip


def compare_result(name: str = "m") -> dict[str, Any]:
    row = {"name": name, "old": 0.9, "new": 0.81678, "change": -0.08322, "interval": [-0.11, -0.05], "moved": True}
    size = {"name": "weights_bytes", "old": 2_000_000, "new": 1_200_000, "change": -800_000, "moved": True}
    return {
        "schema_version": 1, "kind": "eval", "old": name, "new": name, "task": name, "split": name, "n_examples": 872,
        "rows": [row, {**row, "interval": None, "moved": None}, {**row, "interval": [-0.2, 0.1], "moved": False}],
        "latency": [{**row, "name": "median_ms"}], "notes": [name], "gates": gates_of(name), "passed": False,
        "sizes": [size, {"name": "sparsity", "old": 0.95, "new": 0.97, "change": 0.02, "moved": True}],
    }  # fmt: skip


MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])  # what GitHub adds
RESULTS = {"eval": eval_result, "probe": probe_result, "compare": compare_result}


def printed(renderable: Any, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def parsed_csv(command: str, result: Any) -> list[dict[str, str]]:
    text = ci.csv_text(read(command, result))
    text.encode("utf-8")
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == list(ci.COLUMNS) and {len(row) for row in rows} == {len(ci.COLUMNS)}
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def parsed_markdown(command: str, result: Any) -> str:
    """The text, after a look at every line: tables are even, and nothing begins a block that is not ours."""
    text = ci.markdown_text(read(command, result))
    text.encode("utf-8")
    tokens = [token for block in MARKDOWN.parse(text) for token in (block, *(block.children or ()))]
    kinds = {token.tag for token in tokens} - {""}
    assert kinds <= {"h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}, kinds
    assert not [token.type for token in tokens if "html" in token.type or "link" in token.type]
    assert sum(token.type == "bullet_list_open" for token in tokens) <= 1
    width = 0
    for line in text.split("\n"):
        inert = re.sub(r"\\.", "", line)
        bars = inert.count("|")
        assert not width or bars in (0, width), line
        width = bars
        assert re.match(r"(#{2,3} |\||- (?![-+*]|\d+[.)])|✅|❌|No gate|Difference|Chance|Change|Mean |$)", line), line
        outside = re.sub(r"^(#+ |\|[-:|]+\|$)", "", inert)
        assert not re.search(r"[`<>\[\]*_$~@]|://|www\.\w", outside), line
    return text


def check_all(command: str, result: Any) -> Page:
    """Every form of a result, each read back."""
    printed(terminal.result_summary(read(command, result)))
    parsed_csv(command, result)
    parsed_markdown(command, result)
    html = documents.render_result_html(read(command, result))
    assert html == documents.render_result_html(read(command, copy.deepcopy(result))) and html.endswith("</html>\n")
    return check_inert(html)


# ----------------------------------------------------------------------------------------------------------- every form


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("nasty", NASTY, ids=lambda text: ascii(text[:12]))
def test_hostile_names(command: str, nasty: str) -> None:
    page = check_all(command, RESULTS[command](nasty))
    shown = plain(nasty, 40) or "(empty)"
    assert " ".join(shown.rstrip("…").split())[:39] in page.words()
    text = printed(terminal.result_summary(read(command, RESULTS[command](nasty))))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


def replaced(data: Any, junk: Any) -> Iterator[Any]:
    """Copies of a result with one part of it replaced by `junk`, or left out."""
    for key in data if isinstance(data, dict) else range(len(data)):
        other = copy.copy(data)
        other[key] = junk
        yield other
        if isinstance(data, dict):
            yield {name: value for name, value in data.items() if name != key}
        if isinstance(data[key], dict | list):
            for inner in replaced(data[key], junk):
                yield {**data, key: inner} if isinstance(data, dict) else [inner, *data[1:]]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: ascii(junk)[:12])
def test_any_part_may_be_junk(command: str, junk: Any) -> None:
    """What is of another type is refused by its place. Of the rest tables and CSV of every damage; of each twelfth,
    another one for each junk, the documents too."""
    for number, broken in enumerate(replaced(RESULTS[command](), junk)):
        try:
            result = read(command, broken)
        except FileError as error:
            assert error.message.startswith("result.json"), error.message
            continue
        ci.csv_text(result)
        tables.tables(result)
        if number % 12 == JUNK.index(junk):
            printed(terminal.result_summary(result))
            ci.markdown_text(result)
            documents.render_result_html(result)


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_measured_claims_nothing(command: str) -> None:
    words = check_all(command, {}).words()
    assert "No gate was set" in words and "No metric was measured" in words
    assert not re.search(r"\d", words.replace("95 %", ""))
    check_all(command, {"gates": [{}], "rows": [{}]} | ({"tasks": {"a": {}}} if command == "probe" else {}))
    check_all(command, {"metrics": {"a": None}} if command == "eval" else {})


@pytest.mark.parametrize("command", COMMANDS)
def test_huge_results_stay_small(command: str) -> None:
    result = RESULTS[command]()
    many = {f"name {i}": 0.5 for i in range(5000)}
    result |= {"metrics": many, "notes": ["x"] * 5000, "gates": GATES * 2000, "rows": result.get("rows", []) * 2000}
    result |= {"tasks": {name: {"mean": 0.5, "layers": [{"layer": 1, "mean": 1}]} for name in many}}
    assert len(documents.render_result_html(read(command, result))) < 2_000_000
    assert len(ci.markdown_text(read(command, result))) < 1_000_000  # GitHub takes 1 MiB of a step summary


# -------------------------------------------------------------------------------------------------------------- figures


def test_an_evaluation_shows_its_figures() -> None:
    wanted = (
        "0.8168",
        "0.5092",
        "[0.8000, 0.8300]",
        "-0.0833",
        "0.0412",
        "97.25 %",
        "-0.0613",
        "90.75 %",
        "3.21 ms",
        "typos",
    )
    for text in (
        printed(terminal.result_summary(read("eval", eval_result()))),
        check_all("eval", eval_result()).words(),
    ):
        assert not [word for word in wanted if word not in text]
    text = parsed_markdown("eval", eval_result())
    assert "| m | 0.9000 | -0.0833 | \\[-0.1033, -0.0732\\] | 90.75 % |" in text and "❌ 2 of 3 gates failed." in text


def test_a_probe_shows_its_figures() -> None:
    wanted = ("0.7124 ± 0.0042", "0.5123", "[0.6923, 0.7324]", "-0.0376", "mean of tasks", "0.7224", "Against m")
    for text in (
        printed(terminal.result_summary(read("probe", probe_result()))),
        check_all("probe", probe_result()).words(),
    ):
        assert not [word for word in wanted if word not in text]
    one_seed = probe_result()
    one_seed["tasks"]["m"]["deviation"] = None
    assert "±" not in printed(terminal.result_summary(read("probe", one_seed)))


def test_a_comparison_says_what_moved() -> None:
    text = printed(terminal.result_summary(read("compare", compare_result())))
    assert re.findall("yes, down|unknown| no$", text, re.MULTILINE)[:3] == ["yes, down", "unknown", " no"]
    assert "-800.0 kB" in text and "+2.00 points" in text
    words = check_all("compare", compare_result()).words()
    assert "moved beyond the noise 1 of 3 metrics" in words and "2.00 MB → 1.20 MB" in words


@pytest.mark.parametrize("command", COMMANDS)
def test_summaries_fit_a_terminal_of_80(command: str) -> None:
    result = json.loads(json.dumps(RESULTS[command]()).replace('"m"', '"matthews"'))
    for line in printed(terminal.result_summary(read(command, result)), 80).split("\n"):
        assert len(line) <= 80
    assert "[0.8000, 0.8300]" in printed(terminal.result_summary(read("eval", eval_result())), 80)


def test_layers_are_rows_and_tasks_columns() -> None:
    result = probe_result()
    result["tasks"] = {f"task{i}": copy.deepcopy(result["tasks"]["m"]) for i in range(8)}
    del result["tasks"]["task7"]["layers"][1]
    first, second = tables.layer_tables(read("probe", result))
    assert first.columns == ("layer", *(f"task{i}" for i in range(6))) and [row[0] for row in first.rows] == list("012")
    assert second.columns == ("layer", "task6", "task7") and second.rows[1][2] == "–"


@pytest.mark.parametrize("baselines", [0, 1])
def test_layer_curves(baselines: int) -> None:
    result = probe_result()
    result["tasks"]["n"] = copy.deepcopy(result["tasks"]["m"])
    result["baselines"] = result["baselines"][:baselines]
    if baselines:
        result["baselines"][0] = {**result["baselines"][0], "model": "theirs"}
    page = check_inert(documents.render_result_html(read("probe", result)))
    charts = [value for name, value in page.attributes if name == "aria-labelledby"]
    assert len(charts) == (2 if baselines else 1)
    bands = [value for name, value in page.attributes if name == "class" and value.startswith("band ")]
    assert len(bands) == (3 if baselines else 2)


def test_strips_share_a_scale_and_stay_inside() -> None:
    marks = [Mark(0.5, (0.4, 0.6), 0.9), Mark(0.1, (-0.2, 0.2)), Mark(None, None)]
    drawn = strips(marks, zero=True)
    assert drawn is not None and drawn.rows[2] == {} and drawn.has_other
    assert (drawn.low, drawn.high) == ("-0.2000", "0.9000")
    places = [place for row in drawn.rows for place in row.values()]
    assert min(places) == STRIP_EDGE and max(places) == STRIP_WIDTH - STRIP_EDGE
    assert strips([Mark(1.0, None)]) is None
    for value in (0.0, 1e99, 5e-324, -1e99):
        alone = strips([Mark(value, (value, value))])
        assert alone is not None and 0 <= alone.rows[0]["value"] <= STRIP_WIDTH


# ------------------------------------------------------------------------------------------------------------------ CSV


def test_csv_holds_every_number() -> None:
    rows = parsed_csv("eval", eval_result())
    first = rows[0]
    assert (first["kind"], first["name"], first["value"], first["low"], first["high"]) == (
        "metric", "m", "0.81678", "0.8", "0.83",
    )  # fmt: skip
    assert first["baseline_value"] == "0.9" and float(first["difference"]) == -0.08329 and first["examples"] == "872"
    by_name = {(row["kind"], row["name"]): row for row in rows}
    assert by_name["perturbed", "m@typos"]["difference_high"] == str(-0.06127 + 0.01)
    assert by_name["agreement", "agreement"]["value"] == "0.97251" and by_name["metric", "ece"]["low"] == ""
    assert by_name["latency", "median_ms"]["high"] == "3.3" and by_name["size", "weights_bytes"]["value"] == "1200000"
    assert [row["passed"] for row in rows if row["kind"] == "gate"] == ["false", "false", "true"]
    probe = parsed_csv("probe", probe_result())
    assert [row["layer"] for row in probe if row["kind"] == "layer"] == ["0", "1", "2"] * 2
    assert next(row["deviation"] for row in probe if row["kind"] == "metric") == "0.00411"
    moves = parsed_csv("compare", compare_result())
    assert [row["moved"] for row in moves[:3]] == ["true", "", "false"] and moves[0]["difference"] == "-0.08322"


def test_a_second_baseline_is_a_second_row() -> None:
    result = probe_result()
    result["baselines"].append({**result["baselines"][0], "model": "b2"})
    rows = [row for row in parsed_csv("probe", result) if row["kind"] == "metric"]
    assert [row["baseline"] for row in rows] == ["m", "b2"] and len({row["value"] for row in rows}) == 1


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", ' "=1', "a;=1", "＝1", "a|b;\t-2"])
def test_no_cell_is_a_formula(text: str) -> None:
    for row in parsed_csv("eval", eval_result(text)):
        for column in ("model", "task", "split", "name", "baseline"):
            assert not re.search(r"(^|[;|])[\"\s]*[=+\-@\t\r＝]", row[column]), row[column]
    negative = parsed_csv("eval", {"metrics": {"m": -0.25}})[0]
    assert negative["value"] == "-0.25"


def test_ordinary_names_are_kept_in_csv() -> None:
    for text in ("google-bert/bert-base", "a, b", 'say "hi"', "naïve 中文", "x_1@typos", "a=b"):
        assert parsed_csv("eval", eval_result(text))[0]["model"] == text


def test_numbers_that_are_not_finite_are_empty_cells() -> None:
    result = {"metrics": {"m": float("nan")}, "confidence_95": {"m": [0.1, float("inf")]}, "n_examples": None}
    row = parsed_csv("eval", result)[0]
    assert row["value"] == row["low"] == row["high"] == row["examples"] == ""


# ---------------------------------------------------------------------------------------------------------------- JUnit


def test_junit_counts_and_names_failures() -> None:
    root = ElementTree.fromstring(ci.junit_xml("cap eval", gates(), 12.3456))
    suite = root.find("testsuite")
    assert suite is not None
    for element in (root, suite):
        assert {name: element.attrib[name] for name in ("name", "tests", "failures", "errors", "time")} == {
            "name": "cap eval", "tests": "3", "failures": "2", "errors": "0", "time": "12.346",
        }  # fmt: skip
    cases = list(suite.iter("testcase"))
    assert [set(case.attrib) for case in cases] == [{"classname", "name", "time"}] * 3
    failures = [case.find("failure") for case in cases]
    assert [f is None for f in failures] == [False, False, True]
    assert failures[0] is not None and failures[0].attrib["message"] == "low"
    assert failures[0].text == "accuracy >= 0.8, measured 0.79996"
    assert failures[1] is not None and failures[1].attrib["message"] == "bytes <= 100, measured not measured"


def test_junit_without_gates_and_with_equal_names() -> None:
    suite = ElementTree.fromstring(ci.junit_xml("cap eval", [])).find("testsuite")
    assert suite is not None and suite.attrib["tests"] == "1"
    assert [case.attrib["name"] for case in suite] == ["finished"]
    suite = ElementTree.fromstring(ci.junit_xml("cap eval", [gates()[0], gates()[0], Gate()])).find("testsuite")
    assert suite is not None
    assert [case.attrib["name"] for case in suite] == ["quality", "quality (2)", "not recorded"]


@pytest.mark.parametrize("nasty", NASTY, ids=lambda text: ascii(text[:12]))
def test_junit_of_an_error(nasty: str) -> None:
    root = ElementTree.fromstring(ci.junit_error(nasty, nasty, nasty, float("nan")))
    case = root.find("testsuite/testcase")
    assert case is not None and root.attrib["errors"] == "1" and root.attrib["time"] == "0.000"
    error = case.find("error")
    assert error is not None and error.attrib["message"] == plain(nasty, 2000)
    lines = [line for line in (error.text or "").split("\n") if line]
    assert lines == ([plain(nasty, 2000), f"hint: {plain(nasty, 2000)}"] if nasty else [])


# --------------------------------------------------------------------------------------------------------------- GitHub


@pytest.mark.parametrize("nasty", NASTY, ids=lambda text: ascii(text[:12]))
def test_gates_with_hostile_strings(nasty: str) -> None:
    row = dict.fromkeys(("name", "metric", "op", "message"), nasty)
    hostile = [from_json(Gate, row, "result.json") for _ in range(3)]
    case = ElementTree.fromstring(ci.junit_xml(nasty, hostile)).find("testsuite/testcase")
    assert case is not None and case.attrib["name"] == (plain(nasty, 120) or "(empty)")
    for line in ci.github_annotations(hostile):
        assert len(line.splitlines()) == 1 and re.fullmatch(r"::error title=[^:,]*::.*", line)
        title = line.removeprefix("::error title=").partition("::")[0]
        decoded = re.sub("%(25|0A|0D|3A|2C)", lambda code: chr(int(code[1], 16)), title)
        assert decoded == (plain(nasty, 100) or "(empty)")
    lines = parsed_markdown("eval", {"gates": [row] * 3}).split("\n")
    assert not any(line.startswith("::") for line in lines)


def test_annotations_are_few() -> None:
    lines = ci.github_annotations([gates()[0]] * 20)
    assert len(lines) == ci.MAX_ANNOTATIONS and "13 more gates failed" in lines[-1]
    assert ci.github_annotations([gates()[2]] * 20) == []
    assert len(ci.github_annotations([gates()[0]] * 8)) == 8
    assert lines[0] == "::error title=quality::low"


@pytest.mark.parametrize("note", ["- x", "+ x", "1. x", "12) x", "    code", "# x", "> x", "--- ", "| a | b |", ""])
def test_notes_are_items_and_nothing_else(note: str) -> None:
    parsed_markdown("eval", {"notes": [note]})
