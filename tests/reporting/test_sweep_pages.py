"""How a sweep is shown: the table, the page with its charts, CSV; whatever the names are."""

from __future__ import annotations

import csv
import io
import json
import statistics
from typing import Any

import pytest
from rich.console import Console
from swept import FAILED, four, report, swept
from test_report import NASTY, Page, check_inert

from capcli import files
from capcli.records.codec import from_json, to_json
from capcli.records.swept import Sweep
from capcli.reporting import documents, sweeps, terminal
from capcli.reporting.scatter import Point, scatter
from capcli.sweeping.jobs import Failure


def shown(found: Sweep) -> str:
    console = Console(file=io.StringIO(), width=120, markup=False)
    with console.capture() as captured:
        console.print(terminal.sweep_summary(found, "runs/x"))
    return captured.get()


def test_the_table() -> None:
    runs = four(f1=report(0.8, ms=4), f2=report(0.86, ms=6), c1=report(0.5), c2=report(0.5))
    found = swept(runs, min="accuracy=0.8", max_bytes=2000)
    assert sweeps.columns(found) == (
        "method", "sparsity", "accuracy", "retention", "weights", "latency", "time", "outcome",
    )  # fmt: skip
    assert sweeps.rows(found) == [
        ("fisher", "90 %", "0.8300 ± 0.0425", "92.22 %", "1.00 kB", "5.00 ± 1.41 ms", "1 min 30 s", "best"),
        ("cap-f", "90 %", "0.5000 ± 0.0000", "55.56 %", "1.00 kB", "5.00 ± 0.00 ms", "1 min 30 s", "does not pass"),
    ]
    text = shown(found)
    assert "best        fisher-0.9-seed1: accuracy 0.8000, 1.00 kB, 4.00 ms" in text
    assert "gates       min accuracy=0.8; max bytes 2.00 kB" in text
    assert "cap-f 90 %  accuracy is 0.5000 (must be at least 0.8)" in text


def test_the_csv() -> None:
    found = swept(four(f1=report(0.8), f2=report(0.86), c2=FAILED), min="accuracy=0.8")
    rows = list(csv.DictReader(io.StringIO(sweeps.csv_text(found))))
    assert [(row["kind"], row["folder"]) for row in rows[:3]] == [
        ("mean", ""),
        ("run", "fisher-0.9-seed1"),
        ("run", "fisher-0.9-seed2"),
    ]
    assert float(rows[0]["accuracy"]) == pytest.approx(0.83)
    assert float(rows[0]["accuracy_deviation"]) == pytest.approx(statistics.stdev([0.8, 0.86]))
    assert (rows[0]["accuracy_dense"], rows[0]["status"], rows[0]["best"]) == ("0.9", "2 of 2 complete", "true")
    assert (rows[1]["seed"], rows[1]["weights_bytes"], rows[1]["minutes"]) == ("1", "1000", "1.5")
    assert (rows[5]["status"], rows[5]["error"], rows[5]["accuracy"]) == ("failed", "out of memory", "")


def test_the_page_shows_the_same_figures_on_pointing() -> None:
    runs = four(f1=report(0.8, size=900, ms=4), f2=report(0.86, size=900, ms=6), c1=report(0.5), c2=report(0.5))
    found = swept(runs, min="accuracy=0.8")
    page = Page(documents.render_sweep_html(found))
    tips = [value for name, value in page.attributes if name == "aria-label"]
    assert tips.count("fisher 90 %: best, 0.8300 ± 0.0425, 900 B, 5.00 ± 1.41 ms") == 2, "once in each chart"
    links = [value for name, value in page.attributes if name == "href"]
    assert links == [f"{run.folder}/report.html" for run in sweeps.runs_of(found)]
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    words = page.words()
    assert "fisher-0.9-seed1" in words and "accuracy is 0.5000 (must be at least 0.8)" in words


def test_it_is_read_as_it_was_written() -> None:
    found = swept(four(c1=FAILED), min="accuracy=0.8")
    assert from_json(Sweep, json.loads(files.json_text(to_json(found))), "sweep.json") == found


@pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
def test_hostile_names_do_not_act(nasty: str) -> None:
    changes = {"notes": [nasty], "model": nasty, "device": nasty}
    bad = report(0.8, **changes)
    metrics = {**to_json(bad.metrics), "primary": nasty, "pruned": {nasty: 0.8}, "dense": {nasty: 0.9}}
    bad = report(0.8, **changes, metrics=metrics)
    failed = Failure(message=nasty, hint=nasty, code=3)
    found = swept({**four(f1=bad, f2=bad, c1=bad), "cap-f-0.9-seed2": failed}, model=nasty, max_bytes=10)
    html = documents.render_sweep_html(found).replace("<a href", "<b title").replace("</a>", "</b>")
    check_inert(html)
    assert "<script>alert" not in html
    for cell in csv.reader(io.StringIO(sweeps.csv_text(found))):
        assert not [text for text in cell if text.startswith(("=", "+", "@"))]
    shown(found)


def test_points_lie_where_their_figures_are() -> None:
    """The plot area is 320 wide and 200 high; larger is right and up."""
    one: dict[str, Any] = {"deviation": 0.5, "filled": True, "ringed": False, "tip": ("a",)}
    points = [Point(series=s, x=x, y=y, **one) for s, x, y in (("a", 1, 10), ("a", 2, 20), ("b", 3, 15))]
    found = scatter("t", "x", "y", [*points, Point(series="b", x=None, y=3, **one)], level=22, limit=2.5)
    assert found is not None
    (a, b, c) = found.points
    assert a.x < b.x < c.x and a.y > c.y > b.y
    assert b.x - a.x == pytest.approx(c.x - b.x, abs=0.2)
    assert a.low > a.y > a.high, "the lower end of the bar is further down"
    assert found.limit == pytest.approx((b.x + c.x) / 2, abs=0.2)
    assert found.level is not None and found.level < b.y
    assert [style for style, _ in found.lines] == [0], "a series of one point has no line"
    assert (found.series, found.n_hidden) == ([(0, "a"), (1, "b")], 1)
    assert all(52 <= point.x <= 372 and 12 <= point.y <= 212 for point in found.points)
    assert scatter("t", "x", "y", [Point(series="b", x=None, y=3, **one)]) is None
    far = scatter("t", "x", "y", points, limit=1e6)
    assert far is not None and far.limit is None
