"""Reports as HTML pages, and the version of their records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from capcli.reporting.result_page import result_view
from capcli.reporting.run_page import template, view

SCHEMA_VERSION = 1


def render_html(report: Mapping[str, Any]) -> str:
    """`report.json` of `cap prune` as one self-contained page: no network, no script, same bytes for same data."""
    return template("report.html.j2").render(view(report))


def render_result_html(command: str, result: Mapping[str, Any]) -> str:
    """The result of "eval", "probe" or "compare" as one self-contained page: no network, no script.

    The layouts of the results stand in docs/reference/report.md; the same bytes for the same data.
    """
    return template("result.html.j2").render(result_view(command, result))
