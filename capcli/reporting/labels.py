"""What became of each label: those that lost most, all of them, and which are taken for which."""

from __future__ import annotations

from dataclasses import dataclass

from capcli.records.parts import ByLabel, Confusion, LabelScore
from capcli.reporting.charts import ResultTable
from capcli.reporting.text import NO_VALUE, count, counted, named, number, signed
from capcli.stored import finite

IN_SIGHT = 10  # rows that are shown; more are folded away
MAX_LABELS = 1000


@dataclass(frozen=True)
class LabelTables:
    """The tables of a page; `every` is None where `worst` has all labels."""

    worst: ResultTable
    every: ResultTable | None
    confusions: ResultTable | None


def label_tables(found: ByLabel | None, baseline: str) -> LabelTables | None:
    """The tables of scores by label, beside those of a model called `baseline`, if any; None without labels."""
    rows = list(found.labels[:MAX_LABELS]) if found else []
    if found is None or not rows:
        return None
    against = any(row.baseline_f1 is not None for row in rows)
    columns = ("label", "examples", "precision", "recall", "F1", *((f"F1 {baseline}", "change") if against else ()))
    worst = sorted(rows, key=_change if against else _f1)
    few = len(rows) <= IN_SIGHT
    title = "Scores" if few else f"The {IN_SIGHT} labels that lost most" if against else "The labels with the lowest F1"
    shown = rows if few else worst[:IN_SIGHT]
    return LabelTables(
        worst=ResultTable(title, columns, [_cells(row, against) for row in shown]),
        every=None
        if few
        else ResultTable(f"All {counted(len(rows), 'label')}", columns, [_cells(row, against) for row in rows]),
        confusions=_confusions(found, baseline),
    )


def _change(row: LabelScore) -> float:
    """How much F1 a label gained; unknown values last."""
    f1, before = finite(row.f1), finite(row.baseline_f1)
    return 2.0 if f1 is None or before is None else f1 - before


def _f1(row: LabelScore) -> float:
    f1 = finite(row.f1)
    return 2.0 if f1 is None else f1


def _cells(row: LabelScore, against: bool) -> tuple[str, ...]:
    figures = (count(row.n_examples), *map(number, (row.precision, row.recall, row.f1)))
    change = _change(row)
    beside = (number(row.baseline_f1), NO_VALUE if change > 1 else signed(change)) if against else ()
    return (named(row.label, 60), *figures, *beside)


def _confusions(found: ByLabel, baseline: str) -> ResultTable | None:
    rows = found.confusions[:IN_SIGHT]
    if not rows:
        return None
    against = any(row.baseline is not None for row in rows)
    columns = ("label", "answered instead", "times", *((baseline,) if against else ()))
    return ResultTable("Most frequent confusions", columns, [_pair(row, against) for row in rows], n_text=2)


def _pair(row: Confusion, against: bool) -> tuple[str, ...]:
    cells = (named(row.label, 60), named(row.answer, 60), count(row.count))
    return (*cells, count(row.baseline)) if against else cells
