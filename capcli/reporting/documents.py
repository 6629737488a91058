"""Results as HTML pages."""

from __future__ import annotations

from capcli.records.measured import Result
from capcli.records.pruned import Report
from capcli.records.swept import Sweep
from capcli.reporting.result_page import result_view
from capcli.reporting.run_page import template, view
from capcli.reporting.sweep_page import sweep_view


def render_html(report: Report) -> str:
    """`report.json` of `cap prune` as one self-contained page: no network, no script, same bytes for same data."""
    return template("report.html.j2").render(view(report))


def render_result_html(result: Result) -> str:
    """The result of eval, probe or a comparison as one self-contained page: no network, no script.

    The layouts of the results stand in docs/reference/report.md; the same bytes for the same data.
    """
    return template("result.html.j2").render(result_view(result))


def render_sweep_html(found: Sweep) -> str:
    """`sweep.json` as one self-contained page, with links to the pages of the runs beside it: no network, no script."""
    return template("sweep.html.j2").render(sweep_view(found))
