"""Results for continuous integration: JUnit XML, CSV, Markdown for reviewers, annotations of GitHub.

The layouts stand in docs/reference/report.md. Whatever a result holds, each
text parses in its language, and no name in it acts: not in a spreadsheet, not in Markdown, not as a workflow command.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

from capcli.records.measured import EvalResult, ProbeResult, Result
from capcli.records.parts import Gate
from capcli.reporting import quantities, results, tables
from capcli.reporting.quantities import Value
from capcli.reporting.text import markdown, named, plain
from capcli.stored import finite

MAX_ANNOTATIONS = 8  # GitHub shows ten errors per step; two are left for the step itself
COLUMNS = (
    "kind", "model", "task", "split", "layer", "name", "value", "low", "high", "deviation", "examples", "baseline",
    "baseline_value", "baseline_low", "baseline_high", "difference", "difference_low", "difference_high", "moved",
    "limit", "passed", "chance",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- JUnit


def junit_xml(name: str, gates: Sequence[Gate], seconds: float = 0.0) -> str:
    """Gates as JUnit XML, as Jenkins and GitLab read it: one test case each, a missing value is a failure.

    Without gates there is one test case, "finished": a file without any is an error for Jenkins. Names are unique,
    because GitLab counts cases of one name once.
    """
    found = [results.gate(row) for row in gates]
    root, suite = _suite(name, max(len(found), 1), seconds, failures=sum(not gate.passed for gate in found))
    seen: Counter[str] = Counter()
    for gate in found:
        seen[gate.name] += 1
        again = f" ({seen[gate.name]})" if seen[gate.name] > 1 else ""
        case = _case(suite, name, gate.name + again)
        if not gate.passed:
            failure = ElementTree.SubElement(case, "failure", {"type": "gate", "message": gate.found})
            failure.text = f"{gate.condition}, measured {gate.measured}"
    if not found:
        _case(suite, name, "finished", seconds)
    return _xml(root)


def junit_error(name: str, message: str, hint: str = "", seconds: float = 0.0) -> str:
    """JUnit XML of a run that ended in an error: one test case, "finished", with that error."""
    root, suite = _suite(name, 1, seconds, errors=1)
    error = ElementTree.SubElement(
        _case(suite, name, "finished", seconds), "error", {"type": "error", "message": plain(message, 2000)}
    )
    error.text = plain(message, 2000) + (f"\nhint: {plain(hint, 2000)}" if hint else "")
    return _xml(root)


def _suite(
    name: str, tests: int, seconds: float, *, failures: int = 0, errors: int = 0
) -> tuple[ElementTree.Element, ElementTree.Element]:
    totals = {"tests": str(tests), "failures": str(failures), "errors": str(errors), "time": _time(seconds)}
    root = ElementTree.Element("testsuites", {"name": named(name), **totals})
    return root, ElementTree.SubElement(root, "testsuite", {"name": named(name), **totals, "skipped": "0"})


def _case(suite: ElementTree.Element, classname: str, name: str, seconds: float = 0.0) -> ElementTree.Element:
    names = {"classname": named(classname), "name": named(name), "time": _time(seconds)}
    return ElementTree.SubElement(suite, "testcase", names)


def _time(seconds: float) -> str:
    return f"{max(finite(seconds) or 0.0, 0.0):.3f}"


def _xml(root: ElementTree.Element) -> str:
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


# ------------------------------------------------------------------------------------------------------------------ CSV


def csv_text(result: Result) -> str:
    """The result as a table with one row per number, and per baseline that it is compared with; see `COLUMNS`.

    A cell that is not known is empty. Text that a spreadsheet would run as a formula gets a leading apostrophe.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_csv_row(value) for value in quantities.values(result))
    return out.getvalue()


def _csv_row(value: Value) -> list[str]:
    low_high = (
        quantities.ends(bounds) or (None, None)
        for bounds in (value.interval, value.baseline_interval, value.difference_interval)
    )
    (low, high), (baseline_low, baseline_high), (difference_low, difference_high) = low_high
    names = (value.kind, value.model, value.task, value.split)
    numbers = (
        value.value, low, high, value.deviation, value.examples, value.baseline, value.baseline_value, baseline_low,
        baseline_high, value.difference, difference_low, difference_high, value.moved, value.limit, value.passed,
        value.chance,
    )  # fmt: skip
    return [
        *(inert_text(name) for name in names),
        csv_cell(value.layer),
        inert_text(value.name),
        *(csv_cell(cell) for cell in numbers),
    ]


def csv_cell(value: Any) -> str:
    """A number with all its digits, true or false, or text; empty for what is not known or not finite."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        real = finite(value)
        return "" if real is None else str(value) if isinstance(value, int) and abs(value) < 1e15 else repr(real)
    return inert_text(value)


def inert_text(value: Any) -> str:
    """Text that no spreadsheet runs, also not one that splits the cell at another separator."""
    shown = "" if value is None else plain(value, 1000)
    return re.sub('(^|[;,\t|])(?=["\\s]*[=+\\-@＝＋－＠])', r"\1'", shown)


# ------------------------------------------------------------------------------------------------------------- Markdown


def markdown_text(result: Result) -> str:
    """The result as Markdown of GitHub and GitLab: gates, facts, tables and notes."""
    gates = results.gates_of(result)
    mark = "✅ " if gates and all(gate.passed for gate in gates) else "❌ " if gates else ""
    verb = {EvalResult: "cap eval", ProbeResult: "cap probe"}.get(type(result), "compared")
    lines = [f"## {verb}: {markdown(results.title(result), 300)}", ""]
    lines += [f"{mark}{results.verdict(result)}.", ""]
    if gates:
        rows = [(gate.outcome, gate.name, gate.found) for gate in gates]
        lines += _markdown_table(("outcome", "gate", "found"), rows, len(rows[0]))
    for table in tables.tables(result):
        lines += [f"### {markdown(table.title)}", "", *_markdown_table(table.columns, table.rows, table.n_text)]
        lines += [table.hint, ""] if table.hint else []
    lines += _markdown_table(("", ""), results.facts(result), n_text=2)
    lines += [_item(note) for note in results.notes(result)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], n_text: int) -> list[str]:
    """Lines of a table and an empty one; all columns but the first `n_text` are numbers, flush right."""
    rule = "|".join(["---"] * n_text + ["---:"] * (len(columns) - n_text))
    lines = [_line(columns), f"|{rule}|"]
    return [*lines, *(_line(row) for row in rows), ""]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(markdown(cell, 400) if cell else "" for cell in cells) + " |"


def _item(text: str) -> str:
    """A list item that does not begin another list."""
    shown = markdown(text.strip(), 400)
    return "- " + re.sub(r"^([-+]|\d+(?=\.))", lambda match: _unlisted(match[1]), shown)


def _unlisted(start: str) -> str:
    return f"\\{start}" if start in "-+" else f"{start}\\"


# --------------------------------------------------------------------------------------------------------------- GitHub


def github_annotations(gates: Sequence[Gate]) -> list[str]:
    """Workflow commands for the failed gates; when there are too many, the last one says how many more."""
    lines = []
    for gate in map(results.gate, gates):
        if not gate.passed:
            title = _command(plain(gate.name, 100)).replace(":", "%3A").replace(",", "%2C")
            lines.append(f"::error title={title}::{_command(gate.found)}")
    more = len(lines) - MAX_ANNOTATIONS + 1
    tail = f"::error title=gates::{more} more gates failed, see the step summary"
    return lines if more <= 1 else [*lines[: MAX_ANNOTATIONS - 1], tail]


def inert(text: str) -> str:
    r"""Text for a log of GitHub, whose older commands act wherever a line holds `##[`: they are shown as `##\[`."""
    return text.replace("##[", "##\\[")


def _command(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
