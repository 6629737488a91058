"""What a model does with each label: precision, recall and F1, and which labels it takes for which others.

Letters: N examples, C labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from capcli.data.entities import entities, is_entity_scheme
from capcli.data.kinds import KINDS
from capcli.measuring import metrics
from capcli.measuring.resampling import Array
from capcli.measuring.scoring import Measured
from capcli.records.parts import ByLabel, Confusion, LabelScore

MOST_LABELS, MOST_CONFUSIONS = 1000, 100
OUTSIDE = "O"  # the tag of a word that belongs to no entity

Counted = dict[str, list[float]]  # hit, true and predicted, by label
Taken = Counter[tuple[str, str]]  # how often an example of the first label was taken for the second


def by_label(labels: Sequence[str], ours: Measured, theirs: Measured | None = None) -> ByLabel | None:
    """Scores by label of a model, beside F1 and confusions of a baseline on the same examples; None for a kind of task
    whose answers are no labels, and for answers that are not numbers.

    Labels that neither occur nor are answered are left out, as `macro_f1` leaves them out. Of entities the label is
    their type; they are hit when type and both ends are right, and confusions are counted by word.
    """
    if not KINDS[ours.kind].classes or any(map(math.isnan, ours.metrics.values())):
        return None
    counted, taken = _counted(labels, ours)
    before, before_taken = _counted(labels, theirs) if theirs else ({}, Counter())
    rows = {name: row for name, row in counted.items() if row[1] or row[2]}
    return ByLabel(
        labels=tuple(
            _scores(name, row, before.get(name, [0.0] * 3) if theirs else None)
            for name, row in list(rows.items())[:MOST_LABELS]
        ),
        confusions=tuple(
            Confusion(label=true, answer=answer, count=n, baseline=before_taken[true, answer] if theirs else None)
            for (true, answer), n in sorted(taken.items(), key=lambda one: (-one[1], one[0]))[:MOST_CONFUSIONS]
        ),
    )


def _scores(name: str, row: list[float], before: list[float] | None) -> LabelScore:
    counts = _alone(row)
    return LabelScore(
        label=name,
        n_examples=int(row[1]),
        precision=float(metrics.precision(counts)),
        recall=float(metrics.recall(counts)),
        f1=float(metrics.micro_f1(counts)),
        baseline_f1=None if before is None else float(metrics.micro_f1(_alone(before))),
    )


def _alone(row: list[float]) -> Array:
    """The counts of one label as those of all, [3, 1]."""
    return np.asarray(row, dtype=np.float64)[:, None]


def _counted(labels: Sequence[str], one: Measured) -> tuple[Counted, Taken]:
    row = KINDS[one.kind]
    if row.words:
        return _of_entities(one) if is_entity_scheme(labels) else _of_words(labels, one)
    count: Callable[[Any, Any], Any] = metrics.count_classes if row.single else metrics.count_labels
    found = _by_name(labels, count(one.truth, one.outputs).total().T)
    return found, _mistaken(labels, one) if row.single else Counter()


def _by_name(labels: Sequence[str], rows: Any) -> Counted:
    """Counts [C, 3] by the name of the label."""
    return {name: [float(value) for value in row] for name, row in zip(labels, rows, strict=True)}


def _mistaken(labels: Sequence[str], one: Measured) -> Taken:
    pairs = zip(one.truth.tolist(), one.outputs.argmax(axis=1).tolist(), strict=True)
    return Counter((labels[true], labels[answer]) for true, answer in pairs if true != answer)


def _of_words(labels: Sequence[str], one: Measured) -> tuple[Counted, Taken]:
    pairs = Counter(_words(one))
    found = {name: [0.0] * 3 for name in labels}
    for (true, answer), n in pairs.items():
        found[true][0] += n * (true == answer)
        found[true][1] += n
        found[answer][2] += n
    return found, Counter({pair: n for pair, n in pairs.items() if pair[0] != pair[1]})


def _of_entities(one: Measured) -> tuple[Counted, Taken]:
    found: Counted = {}
    for true, answer in zip(one.truth, one.outputs, strict=True):
        gold, given = entities(true), entities(answer)
        for place, some in enumerate((gold & given, gold, given)):
            for kind, *_ in some:
                found.setdefault(kind, [0.0] * 3)[place] += 1
    pairs = Counter((_type(true), _type(answer)) for true, answer in _words(one))
    return dict(sorted(found.items())), Counter({pair: n for pair, n in pairs.items() if pair[0] != pair[1]})


def _words(one: Measured) -> list[tuple[str, str]]:
    """Tag and answer of each word."""
    return [pair for rows in zip(one.truth, one.outputs, strict=True) for pair in zip(*rows, strict=True)]


def _type(tag: str) -> str:
    """The type of entity that a tag is of."""
    return tag if tag == OUTSIDE else tag[2:] or tag
