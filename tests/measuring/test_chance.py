"""What guessing scores, by hand and by trying every answer, and which models are no better."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from capcli.data.kinds import KINDS
from capcli.measuring import chance, metrics, probing, scoring
from capcli.measuring.chance import Known
from capcli.measuring.embeddings import Wanted
from capcli.measuring.noise import Estimate
from capcli.measuring.scoring import retention
from capcli.records.measured import TaskScore

# What guessing scores ------------------------------------------------------------------------------------------------

CASES: list[tuple[str, Any, int | tuple[int, ...], dict[str, float]]] = [
    # always 0: hit 3 of 6, F1 2·3 / (3 + 6) for one of three classes; always 1: F1 2·1 / (1 + 6)
    (
        "classification",
        np.array([0, 0, 0, 1, 2, 2]),
        3,
        {"accuracy": 1 / 2, "agreement": 1 / 2, "macro_f1": 2 / 9, "f1": 2 / 7, "matthews": 0},
    ),
    ("classification", np.array([0, 0, 0, 1]), 2, {"accuracy": 3 / 4, "f1": 2 / 5, "macro_f1": 3 / 7, "matthews": 0}),
    ("classification", np.array([0, 0]), 2, {"accuracy": 1, "f1": 0, "macro_f1": 1, "matthews": 0}),
    (
        "regression",
        np.array([0.0, 1.0, 5.0]),
        1,
        {"pearson": 0, "spearman": 0, "agreement_pearson": 0, "agreement_spearman": 0},
    ),
    # the relevant document is first or second of 2; first, second or third of 3
    (
        "ranking",
        [np.array([1.0, 0.0]), np.array([0.0, 1.0, 0.0])],
        1,
        {
            "ndcg": ((1 + 1 / math.log2(3)) / 2 + (1 + 1 / math.log2(3) + 1 / 2) / 3) / 2,
            "mrr": ((1 + 1 / 2) / 2 + (1 + 1 / 2 + 1 / 3) / 3) / 2,
            "pearson": 0,
            "spearman": 0,
        },
    ),
    # {0}: 3 hits, 4 true, 4 given; {0} is right twice; 0 and 1: F1 6 / 7 and 2 / 5, and class 2 does not occur
    (
        "multilabel",
        np.array([[1, 0, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]]),
        3,
        {
            "micro_f1": 3 / 4,
            "agreement_f1": 3 / 4,
            "subset_accuracy": 1 / 2,
            "agreement": 1 / 2,
            "macro_f1": (6 / 7 + 2 / 5) / 2,
        },
    ),
    ("multilabel", np.array([[0, 0], [0, 0], [1, 0]]), 2, {"micro_f1": 1 / 2, "subset_accuracy": 2 / 3}),
    # always O: 3 of 5 words, no entity; F1 of O is 6 / 8, for one of three tags
    (
        "tokens",
        [["O", "O", "B-x"], ["O", "I-y"]],
        0,
        {
            "f1": 0,
            "precision": 0,
            "recall": 0,
            "accuracy": 3 / 5,
            "macro_f1": 1 / 4,
            "agreement": 3 / 5,
            "agreement_f1": 0,
        },
    ),
    ("tokens", [["N", "V"], ["N"]], 0, {"accuracy": 2 / 3, "macro_f1": 2 / 5}),
    # "The" says nothing
    (
        "spans",
        [["the end"], [], ["x", "y"], ["The"]],
        0,
        {"f1": 1 / 2, "exact_match": 1 / 2, "agreement": 1 / 2, "agreement_f1": 1 / 2},
    ),
    ("spans", [["a cat"], ["x"]], 0, {"f1": 0, "exact_match": 0}),
    # the mean of both directions has a cosine of 1 / √2 with each; of fewer than ten other texts all are neighbours
    (
        "embedding",
        Wanted(vectors=np.array([[[1.0, 0.0], [0.0, 3.0]]] * 2), scores=np.array([0.0, 1.0])),
        (2, 2),
        {"spearman": 0, "pearson": 0, "cosine": 1 / math.sqrt(2), "recall_at_10": 1},
    ),
]


@pytest.mark.parametrize(("kind", "truth", "width", "expected"), CASES)
def test_what_guessing_scores(kind: str, truth: Any, width: int | tuple[int, ...], expected: dict[str, float]) -> None:
    outputs = np.zeros((len(truth), *(width if isinstance(width, tuple) else (width,))))
    assert chance.of(kind, list(expected), truth, outputs) == pytest.approx(expected)


def test_every_metric_of_every_kind_is_worked_out_by_hand() -> None:
    tried = {kind: {name for one, _, _, expected in CASES if one == kind for name in expected} for kind in KINDS}
    assert tried == {kind: set(table) for kind, table in metrics.METRICS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_of_no_examples_nothing_is_known(kind: str) -> None:
    names = list(metrics.METRICS[kind])
    found = chance.of(kind, names, [], np.zeros((0, 2)))
    assert list(found) == names and all(map(math.isnan, found.values()))


@given(st.integers(2, 5).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(0, c - 1), min_size=1))))
def test_no_other_class_for_all_is_better(case: tuple[int, list[int]]) -> None:
    n_classes, truth = case[0], np.array(case[1])
    names = list(metrics.METRICS["classification"])
    tried = [
        metrics.measure("classification", names, truth, np.tile(np.eye(n_classes)[one], (len(truth), 1)))
        for one in range(n_classes)
    ]
    found = chance.of("classification", names, truth, np.zeros((len(truth), n_classes)))
    assert found == pytest.approx({name: max(one[name] for one in tried) for name in names})


@given(st.integers(1, 4).flatmap(lambda c: st.lists(st.lists(st.integers(0, 1), min_size=c, max_size=c), min_size=1)))
def test_no_other_set_of_labels_for_all_is_better(rows: list[list[int]]) -> None:
    truth = np.array(rows)
    names = list(metrics.METRICS["multilabel"])
    tried = [
        metrics.measure("multilabel", names, truth, np.tile(np.array(one) - 0.5, (len(truth), 1)))
        for one in itertools.product((0, 1), repeat=truth.shape[1])
    ]
    best = {name: max(one[name] for one in tried if not math.isnan(one[name])) for name in names}
    assert chance.of("multilabel", names, truth, np.zeros(truth.shape)) == pytest.approx(best)


# Whether a model does better -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "ends", "by_chance", "expected"),
    [
        (0.6, [0.51, 0.69], 0.5, False),
        (0.6, [0.50, 0.70], 0.5, True),  # it reaches down to it
        (0.6, [0.49, 0.71], 0.5, True),
        (0.4, [0.31, 0.49], 0.5, True),  # worse
        (0.0, [0.0, 0.0], 0.0, True),
        (0.01, [0.005, 0.02], 0.0, False),
        (math.nan, None, 0.5, False),
        (0.6, [0.51, 0.69], math.nan, False),
    ],
)
def test_no_better_than_guessing_is_what_the_interval_does_not_exclude(
    value: float, ends: list[float] | None, by_chance: float, expected: bool
) -> None:
    assert chance.is_at_chance("f1", Estimate(value, (lambda _: ends) if ends else None), by_chance, 100) is expected


@pytest.mark.parametrize(
    ("name", "value", "n", "expected"),
    [
        ("accuracy", 0.59, 100, True),  # Wilson's interval begins at 0.492
        ("accuracy", 0.60, 100, False),  # at 0.502
        ("pearson", 0.19, 100, True),  # 1.96 / 10
        ("pearson", 0.20, 100, False),
        ("accuracy", 0.501, None, False),
        ("accuracy", 0.5, None, True),
    ],
)
def test_without_an_interval_the_number_of_examples_serves(
    name: str, value: float, n: int | None, expected: bool
) -> None:
    by_chance = 0.5 if name == "accuracy" else 0.0
    assert chance.is_at_chance(name, Estimate(value), by_chance, n) is expected


def measured(truth: Any, outputs: Any, names: tuple[str, ...], **more: Any) -> scoring.Measured:
    """The scores of logits, as `scoring.scored` gives them."""

    class Texts:
        """Examples of which only the labels count."""

        labels, split = truth, None

    return scoring.scored("classification", ("a", "b"), Texts(), names, torch.from_numpy(outputs), **more)  # type: ignore[arg-type]


def test_a_model_that_learned_is_better_than_guessing_and_one_that_did_not_is_not() -> None:
    truth = np.arange(100) % 2
    flipped = np.where(np.arange(100) < 40, 1 - truth, truth)  # 60 of 100 right
    good = measured(truth, np.eye(2)[flipped], ("accuracy", "matthews"))
    assert good.metrics["accuracy"] == 0.6 and good.chance == {"accuracy": 0.5, "matthews": 0.0}
    assert good.at_chance == ()
    assert good.table.chance == good.chance and good.table.at_chance == ()
    worse = measured(truth, np.eye(2)[np.where(np.arange(100) < 42, 1 - truth, truth)], ("accuracy",))
    assert worse.at_chance == ("accuracy",) == worse.table.at_chance
    assert measured(truth, np.eye(2)[flipped], ("accuracy",), with_intervals=False).chance == {}


def test_the_same_answer_to_everything_is_guessing_whatever_it_scores() -> None:
    truth = np.array([0] * 30 + [1] * 70)
    same = measured(truth, np.tile([1.0, 0.0], (100, 1)), ("f1", "accuracy"))  # the rarer class
    assert same.constant == "'a'" and same.at_chance == ("f1", "accuracy")
    assert same.chance == pytest.approx({"f1": 2 * 70 / 170, "accuracy": 0.7})


def test_logits_that_are_not_finite_are_no_guesses() -> None:
    found = measured(np.arange(10) % 2, np.full((10, 2), np.nan), ("accuracy",))
    assert math.isnan(found.metrics["accuracy"]) and found.at_chance == () and found.chance == {"accuracy": 0.5}


def test_there_is_no_retention_of_guessing() -> None:
    ours, theirs = {"accuracy": 0.5, "f1": 0.4}, {"accuracy": 0.51, "f1": 0.8}
    assert retention(ours, theirs, ("accuracy",)) == {"f1": 0.5}


# In words ------------------------------------------------------------------------------------------------------------


def guess(value: float, answer: str = "", by_chance: float = 0.5) -> Any:
    scored = {"metrics": {"accuracy": value}, "chance": {"accuracy": by_chance}, "at_chance": ("accuracy",)}
    return Known(**scored, constant=answer)  # type: ignore[arg-type]


GOOD = Known(metrics={"accuracy": 0.9}, chance={"accuracy": 0.5})


@pytest.mark.parametrize(
    ("models", "remedy", "said"),
    [
        ({"the model": GOOD}, "", []),
        ({}, "", []),
        (
            {"the model": guess(0.51)},
            "",
            ["the model is no better than guessing on test: accuracy 0.5100, chance 0.5000"],
        ),
        (
            {"the dense model": GOOD, "the pruned model": guess(0.51)},
            "lower --sparsity",
            ["the pruned model is no better than guessing on test: accuracy 0.5100, chance 0.5000; lower --sparsity"],
        ),
        (
            {"the dense model": guess(0.52), "the pruned model": guess(0.5, "'no'")},
            "",
            [
                "the dense model and the pruned model are no better than guessing on test: accuracy 0.5200 and 0.5000 "
                "(always 'no'), chance 0.5000"
            ],
        ),
        (
            {"the model": guess(math.nan, "2.5", 0.0)},
            "",
            ["the model is no better than guessing on test: accuracy undefined (always 2.5), chance 0.0000"],
        ),
        (
            {"the model": guess(0.9, "", 1.0)},
            "lower --sparsity",
            ["accuracy says nothing on test: whoever gives the same answer to everything scores 1.0000"],
        ),
    ],
)
def test_one_note_says_which_models_guess(models: dict[str, Any], remedy: str, said: list[str]) -> None:
    assert chance.doubts(models, "test", "accuracy", remedy) == said


def test_a_probe_is_told_from_guessing_by_its_mean() -> None:
    draws = np.linspace(0.5, 0.7, 1001)  # of which 95 % lie between 0.505 and 0.695
    good = probing.Score(values=np.array([0.6]), draws=draws, chance=0.504)
    guessing = probing.Score(values=np.array([0.6]), draws=draws, chance=0.506)
    assert (good.at_chance, guessing.at_chance) == (False, True)
    both = probing.with_mean({"a": good, "b": guessing})
    assert both["mean"].chance == pytest.approx(0.505) and both["a"] is good
    assert probing.with_mean({"a": good})["mean"] is good


def test_one_note_names_the_tasks_of_which_a_probe_knows_nothing() -> None:
    guessing = TaskScore(metric="accuracy", mean=0.51, chance=0.5, at_chance=True)
    good = TaskScore(metric="accuracy", mean=0.8, chance=0.5, at_chance=False)
    old = TaskScore(metric="accuracy", mean=0.8)
    found = probing.guessing({"m": {"mr": guessing, "subj": good, "wnut17": guessing}, "other": {"mr": old}})
    said = "accuracy 0.5100, chance 0.5000"
    assert found == [f"m: no better than guessing on mr ({said}), wnut17 ({said})"]
