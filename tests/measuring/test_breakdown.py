"""Scores by label against slow loops, and which labels are taken for which."""

from typing import Any

import numpy as np
import pytest

from capcli.measuring.breakdown import by_label
from capcli.measuring.scoring import Measured
from capcli.records.parts import ByLabel


def measured(kind: str, truth: Any, outputs: Any, value: float = 0.5) -> Measured:
    return Measured(
        metrics={"m": value}, confidence_95={}, n_examples=len(truth), kind=kind, truth=truth, outputs=outputs, seed=1
    )


def slow(labels: list[str], truth: list[set[str]], answers: list[set[str]]) -> dict[str, tuple[float, float, float]]:
    """Precision, recall and F1 of each label that occurs, from sets of labels by example."""
    found = {}
    for label in labels:
        hit = sum(label in a and label in b for a, b in zip(truth, answers, strict=True))
        true, given = sum(label in a for a in truth), sum(label in b for b in answers)
        if true or given:
            precision, recall = hit / given if given else 0.0, hit / true if true else 0.0
            both = precision + recall
            found[label] = (precision, recall, 2 * precision * recall / both if both else 0.0)
    return found


def table(found: ByLabel | None) -> dict[str, Any]:
    assert found is not None
    return {row.label or "": pytest.approx((row.precision, row.recall, row.f1)) for row in found.labels}


LABELS = ["a", "b", "c", "never"]


def test_classes_by_slow_loops() -> None:
    random = np.random.default_rng(1)
    truth, logits, before = random.integers(0, 3, 200), random.normal(size=(200, 4)), random.normal(size=(200, 4))
    logits[:, 3] = before[:, 3] = -9
    found = by_label(LABELS, measured("classification", truth, logits), measured("classification", truth, before))
    names = [LABELS[i] for i in truth]
    ours, theirs = ([LABELS[i] for i in one.argmax(axis=1)] for one in (logits, before))
    assert slow(LABELS, [{n} for n in names], [{n} for n in ours]) == table(found)
    assert found is not None and [row.n_examples for row in found.labels] == [names.count(n) for n in "abc"]
    dense = slow(LABELS, [{n} for n in names], [{n} for n in theirs])
    assert [row.baseline_f1 for row in found.labels] == [pytest.approx(dense[n][2]) for n in "abc"]
    pairs = {(one.label, one.answer): (one.count, one.baseline) for one in found.confusions}
    assert len(pairs) == 6 and sum(n or 0 for n, _ in pairs.values()) == sum(map(str.__ne__, names, ours))
    for (true, answer), counts in pairs.items():
        wanted = [list(zip(names, one, strict=True)).count((true, answer)) for one in (ours, theirs)]
        assert list(counts) == wanted
    assert [one.count for one in found.confusions] == sorted((n or 0 for n, _ in pairs.values()), reverse=True)


def test_several_labels_have_scores_and_no_confusions() -> None:
    random = np.random.default_rng(2)
    truth, logits = random.integers(0, 2, (50, 3)), random.normal(size=(50, 3))
    found = by_label(LABELS[:3], measured("multilabel", truth, logits))
    sets = [[{LABELS[i] for i in np.flatnonzero(row)} for row in rows] for rows in (truth, logits > 0)]
    assert slow(LABELS, *sets) == table(found)
    assert found is not None and not found.confusions and found.labels[0].baseline_f1 is None


def test_entities_are_of_their_type_and_hit_as_a_whole() -> None:
    truth = [["B-per", "I-per", "O"], ["B-loc", "O", "B-per"]]
    outputs = [["B-per", "O", "O"], ["B-loc", "O", "B-loc"]]
    found = by_label(["O", "B-per", "I-per", "B-loc", "I-loc"], measured("tokens", truth, outputs))
    assert table(found) == {"loc": (0.5, 1.0, pytest.approx(2 / 3)), "per": (0.0, 0.0, 0.0)}
    assert found is not None
    assert {(one.label, one.answer, one.count) for one in found.confusions} == {("per", "O", 1), ("per", "loc", 1)}


def test_tags_that_mark_no_entities() -> None:
    found = by_label(["noun", "verb"], measured("tokens", [["noun", "verb"], ["noun"]], [["noun", "noun"], ["noun"]]))
    assert table(found) == {"noun": (pytest.approx(2 / 3), 1.0, pytest.approx(0.8)), "verb": (0.0, 0.0, 0.0)}
    assert found is not None and [(one.label, one.answer, one.count) for one in found.confusions] == [
        ("verb", "noun", 1)
    ]


def test_numbers_and_answers_have_none() -> None:
    numbers = measured("regression", np.ones(3), np.ones((3, 1)))
    assert by_label([], numbers) is None
    assert by_label(["a", "b"], measured("classification", np.zeros(2, int), np.eye(2), value=float("nan"))) is None
