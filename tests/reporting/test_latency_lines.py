"""Latency as text: figures side by side, their bars, by what they were measured, and what is not claimed."""

import csv
import io
from dataclasses import replace
from typing import Any

from rich.console import Console

from capcli.records.measured import Baseline, EvalResult
from capcli.records.parts import Latency, OwnLengths, Throughput
from capcli.records.pruned import Latencies, Report
from capcli.reporting import ci, documents, latency, tables, terminal
from capcli.reporting.card import render_card


def timed(ms: float = 8.0, **conditions: Any) -> Latency:
    """What results say of the latency of one model."""
    where = {"runtime": "torch", "threads": 2, "processor": "a CPU", "device": "cpu", "hardware": "a CPU"}
    return Latency(
        median_ms=ms, p10_ms=ms, p90_ms=ms, confidence_95=(ms, ms), batch=1, length=128,
        own_lengths=OwnLengths(median_ms=ms / 4, p95_ms=ms / 2, texts=200, median_tokens=21),
        throughput=Throughput(texts_per_second=4000 / ms, batch=32, texts=256),
        **{**where, "precision": "float32", **conditions},
    )  # fmt: skip


def run_of(dense: Latency, pruned: Latency) -> Report:
    return Report(model="m", task="t", latency=Latencies(dense=dense, pruned=pruned))


def test_lines_hold_every_figure_and_its_share_of_the_largest() -> None:
    found = latency.lines({"dense": timed(8.0), "pruned": timed(2.0)})
    assert [(line.label, line.values["dense"], line.values["pruned"]) for line in found] == [
        ("1 input of 128 tokens, median", "8.00 ms", "2.00 ms"),
        ("200 texts one by one, median", "2.00 ms", "0.500 ms"),
        ("200 texts one by one, 95th percentile", "4.00 ms", "1.00 ms"),
        ("texts per second, 32 at once", "500", "2,000"),
    ]
    assert [line.shares for line in found] == [{"dense": 100, "pruned": 25}] * 3 + [{"dense": 25, "pruned": 100}]


def test_what_was_not_measured_has_no_line() -> None:
    nothing = Latency()
    assert latency.side_by_side(Report())["lines"] == latency.side_by_side(run_of(nothing, nothing))["lines"] == []
    assert latency.on_texts(nothing) == []
    (line,) = latency.side_by_side(run_of(Latency(median_ms=1.0), nothing))["lines"]
    assert line.values == {"dense": "1.00 ms", "pruned": "not measured"} and line.shares["pruned"] is None


def test_the_conditions_are_those_of_both_or_of_each() -> None:
    same = {"dense": timed(), "pruned": timed(3.0)}
    assert latency.conditions(same) == "PyTorch, 2 threads, float32, a CPU"
    other = {"dense": timed(), "pruned": timed(runtime="sparse", threads=1)}
    assert latency.conditions(other) == (
        "dense: PyTorch, 2 threads, float32, a CPU; pruned: the sparse runtime of cap, 1 thread, float32, a CPU"
    )
    gpu = {"dense": timed(device="cuda", hardware="a GPU")}
    assert latency.conditions(gpu) == "PyTorch, 2 threads, float32, a GPU"


def test_zeros_are_not_said_to_be_fast_where_torch_computes_with_them() -> None:
    def remark(runtime: str) -> str:
        return str(latency.side_by_side(run_of(timed(), timed(runtime=runtime)))["remark"])

    assert remark("torch").startswith("PyTorch computes with zeros as with other weights")
    assert remark("sparse").startswith("To use that runtime: --runtime auto")


def test_page_card_and_terminal_show_both_models() -> None:
    report = run_of(timed(8.0), timed(2.0))
    page, card = documents.render_html(report), render_card(report)
    out = io.StringIO()
    Console(file=out, width=200).print(terminal.prune_summary(report))
    for text in (page, card, out.getvalue()):
        assert "200 texts one by one, 95th percentile" in text and "4.00 ms" in text and "0.500 ms" in text
        assert "PyTorch, 2 threads, float32, a CPU" in text and "zeros as with other weights" in text
    assert 'style="width: 25.0%"' in page or 'style="width: 25%"' in page
    exported = render_card(report, form="sparse")
    assert "one by one" not in exported, "what was measured on another file"
    report = Report(model="m", task="t")
    assert "Latency" not in documents.render_html(report) and "one by one" not in render_card(report)


def test_an_evaluation_beside_a_baseline() -> None:
    result = EvalResult(model="m", latency=timed(2.0), baseline=Baseline(model="b", latency=timed(8.0)))
    (table,) = tables.tables(result)
    assert (table.columns, table.rows[0]) == (
        ("latency", "model", "baseline"),
        ("1 input of 128 tokens, median", "2.00 ms", "8.00 ms"),
    )
    assert "PyTorch, 2 threads" in table.hint and table.hint in documents.render_result_html(result)
    alone = replace(result, baseline=Baseline(model="b"))
    assert tables.tables(alone) == [], "a stored result was not measured in turn"
    out = io.StringIO()
    Console(file=out, width=200).print(terminal.result_summary(alone))
    assert "0.500 ms, 95th percentile 1.00 ms (200 texts one by one, median 21 tokens)" in out.getvalue()
    assert "2,000 texts per second, 32 at once" in out.getvalue()
    rows = csv.DictReader(io.StringIO(ci.csv_text(result)))
    values = {row["name"]: row["value"] for row in rows if row["kind"] == "latency"}
    assert (values["own_lengths.p95_ms"], values["throughput.texts_per_second"]) == ("1.0", "2000.0")
