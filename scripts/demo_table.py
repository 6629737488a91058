"""The last table of `make demo`: the dense model, the pruned one, and its 8-bit export side by side.

    python scripts/demo_table.py RUN/report.json EVAL.json

RUN/report.json was written by `cap prune`, EVAL.json by `cap eval --json` of the export.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from capcli.records.codec import read
from capcli.records.measured import EvalResult
from capcli.records.parts import Latency
from capcli.records.pruned import Report
from capcli.reporting.latency import RUNTIMES
from capcli.reporting.text import NOT_MEASURED, byte_size, counted, milliseconds, number


def main() -> None:
    report, export = read(Report, Path(sys.argv[1])), read(EvalResult, Path(sys.argv[2]))
    first = report.metrics.primary or ""
    times = report.latency
    rows = [
        ("dense", report.metrics.dense.get(first), report.size.dense_bytes, times and times.dense),
        ("pruned", report.metrics.pruned.get(first), report.size.weights_bytes, times and times.pruned),
        ("pruned, 8 bits", export.metrics.get(first), export.size.weights_bytes, export.latency),
    ]
    table = Table("model", first, "weight file", "one text", "computed by", box=None, pad_edge=False)
    for name, value, size, latency in rows:
        table.add_row(name, number(value), byte_size(size), *speed(latency))
    threads = counted(export.latency.threads, "thread") if export.latency else NOT_MEASURED
    console = Console()
    console.print(table)
    chance = number(report.metrics.chance.get(first))
    console.print(
        f"guessing: {first} {chance}; one text: median over texts of {report.task} at their own lengths, {threads}",
        style="dim",
    )


def speed(latency: Latency | None) -> tuple[str, str]:
    """Milliseconds for one text, and what computed it."""
    if latency is None or latency.own_lengths is None:
        return NOT_MEASURED, ""
    return milliseconds(latency.own_lengths.median_ms), RUNTIMES.get(latency.runtime or "", latency.runtime or "")


if __name__ == "__main__":
    main()
