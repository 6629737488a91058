"""How a run trained: curves of its loss, of each term of it, of its metrics and of the sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from capcli.records.parts import LABELS
from capcli.records.pruned import HistoryRow, Report
from capcli.reporting.charts import Chart, Points, drawable, line_chart
from capcli.reporting.text import count, named, number, plain
from capcli.stored import finite

MAX_PHASES = 4
TOTAL, MAX_TERMS = "total", 24
TERMS = {
    "ce": "Cross-entropy",
    "kd": "Distillation of logits",
    "hid": "Distillation of hidden states",
    "reg": "Regulariser of scores",
    **{
        f"{module}_{which}": f"{name}, {form}"
        for module, name in {
            "prc": "Pre-trained vectors",
            "snc": "Snapshots' vectors",
            "fic": "Fine-tuned vectors",
        }.items()
        for which, form in {"u": "unsupervised", "s": "supervised"}.items()
    },
}


@dataclass(frozen=True)
class Phase:
    """The charts of one phase, and a small one for each term of its loss where there are several."""

    name: str
    charts: list[Chart]
    terms: list[Chart]


def phases(report: Report, names: Sequence[str]) -> list[Phase]:
    """The charts of each phase, in the order in which the phases ran; `names` of the metrics, the primary one first."""
    found: dict[str, list[HistoryRow]] = {}
    for row in report.history:
        found.setdefault(plain(row.phase or "prune", 60), []).append(row)
    drawn = [_phase(report, names, phase, rows) for phase, rows in list(found.items())[:MAX_PHASES]]
    return [phase for phase in drawn if phase.charts]


def _phase(report: Report, names: Sequence[str], name: str, rows: Sequence[HistoryRow]) -> Phase:
    primary = finite(report.metrics.dense.get(names[0])) if names and report.metrics.reference == LABELS else None
    steps = _steps(rows)
    losses, bad_losses = _series(steps, [row.losses for row in rows], [TOTAL])
    scores, bad_scores = _series(steps, [row.metrics for row in rows], names)
    shares = [(at, drawable(row.sparsity)) for at, row in zip(steps, rows, strict=True)]
    removed = [(at, 100 * share) for at, share in shares if share is not None]
    span = (min(steps), max(steps))
    pruning = any(y > 0 for _, y in removed)
    first = {term: points for term, points in losses.items() if term == TOTAL} or dict(list(losses.items())[:1])
    charts = [
        line_chart("Loss", span, "loss", first, n_bad=bad_losses),
        line_chart("Metrics", span, f"score{_curve(report)}", scores, primary if pruning else None, bad_scores),
        line_chart("Sparsity", span, "% of weights removed", {"sparsity": removed}, write="{:.2f}".format)
        if pruning
        else None,
    ]
    rest = {term: points for term, points in losses.items() if term not in first}
    terms = [
        _term_chart(report, span, term, points) for term, points in list(rest.items())[:MAX_TERMS] if len(rest) > 1
    ]
    return Phase(name, [chart for chart in charts if chart], [chart for chart in terms if chart])


def _term_chart(report: Report, span: tuple[float, float], term: str, points: Points) -> Chart | None:
    """One term of the loss, with its full name and its weight."""
    weight = finite(report.loss_weights.get(term))
    title = TERMS.get(term, "") or named(term, 40)
    known = f" × {number(weight)}" if weight is not None else ""
    return line_chart(f"{title}{known}", span, named(term, 40), {term: points})


def _curve(report: Report) -> str:
    """On what the values of the curves were measured, which are not the final ones."""
    curve = report.curve
    return f" on {count(curve.n_examples)}{' held-out' * bool(curve.held_out)} examples" if curve.n_examples else ""


def _steps(rows: Sequence[HistoryRow]) -> list[float]:
    """The step of each row; a row without one is placed by its position."""
    steps = [drawable(row.step) for row in rows]
    return [index if step is None else step for index, step in enumerate(steps)]


def _series(
    steps: Sequence[float], rows: Sequence[Mapping[str, float]], first: Sequence[str]
) -> tuple[dict[str, Points], int]:
    """The curves of values by name, those named in `first` in front, and how many values cannot be drawn."""
    series: dict[str, Points] = {}
    n_bad = 0
    for step, row in zip(steps, rows, strict=True):
        for name, raw in row.items():
            value = drawable(raw)
            n_bad += value is None
            if value is not None:
                series.setdefault(name, []).append((step, value))
    return dict(sorted(series.items(), key=lambda item: item[0] not in first)), n_bad
