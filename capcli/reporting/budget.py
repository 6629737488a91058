"""What was asked of a run, a sparsity or a target, and what is left where whole units were removed."""

from __future__ import annotations

from capcli.records.pruned import Report
from capcli.reporting.text import count, named, percent, times_faster


def requested(report: Report) -> str:
    """The target, or the sparsity in per cent."""
    target = report.reached.target if report.reached else None
    return percent(report.sparsity.requested) if target is None else named(target, 40)


def left_rows(report: Report) -> list[tuple[str, str]]:
    """What stays beside weights, as (label, text); none where single weights were removed."""
    reached = report.reached
    if reached is None:
        return []
    texts = f"of the layers, in texts of {count(reached.length)} tokens"
    speedup = [] if reached.speedup is None else [("speed by the measured table", times_faster(reached.speedup))]
    return [("multiply-adds that stay", f"{percent(reached.macs)} {texts}"), *speedup]
