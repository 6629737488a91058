"""What a run says of models that only guess: once for each split, with what helps."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from capcli.measuring.scoring import Measured
from capcli.pruning import record


def scores(value: float, guesses: bool) -> Measured:
    """Accuracy on 100 examples, half of which have the most frequent class."""
    return measured(value, (value - 0.05, value + 0.05), ("accuracy",) if guesses else ())


def measured(value: float, ends: tuple[float, float], at_chance: tuple[str, ...] = ()) -> Measured:
    """Of 100 examples that many are right."""
    truth = np.arange(100) % 2
    right = np.arange(100) < round(100 * value)
    return Measured(
        metrics={"accuracy": value},
        confidence_95={"accuracy": list(ends)},
        n_examples=100,
        kind="classification",
        truth=truth,
        outputs=np.eye(2)[np.where(right, truth, 1 - truth)],
        seed=1,
        chance={"accuracy": 0.5},
        at_chance=at_chance,
    )


def setup(epochs: int = 3, teacher: str = "") -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(epochs=epochs),
        teacher=teacher,
        data=SimpleNamespace(primary="accuracy", reference="labels", has_labels=True, kind="classification"),
    )


LEARNED, GUESSES = scores(0.8, False), scores(0.51, True)
PRUNED = "the pruned model is no better than guessing on test: accuracy 0.5100, chance 0.5000; "
BOTH = (
    "the dense model and the pruned model are no better than guessing on test: accuracy 0.5100 and 0.5100, "
    "chance 0.5000; "
)


@pytest.mark.parametrize(
    ("epochs", "teacher", "dense", "pruned", "said"),
    [
        (3, "", LEARNED, LEARNED, []),
        (3, "", LEARNED, GUESSES, [PRUNED + "lower --sparsity, or use more --epochs or training data"]),
        (
            0,
            "",
            LEARNED,
            GUESSES,
            [
                PRUNED + "training will be needed; raise --heal, use --method fisher with --epochs, or a lower "
                "--sparsity"
            ],
        ),
        (3, "", GUESSES, GUESSES, [BOTH + "use more --teacher-epochs or training data, or a larger model"]),
        (3, "bert", GUESSES, GUESSES, [BOTH + "use a teacher that has learned the task"]),
    ],
)
def test_one_note_says_what_helps(
    epochs: int, teacher: str, dense: Measured, pruned: Measured, said: list[str]
) -> None:
    assert record._guessing(setup(epochs, teacher), {"test": dense}, {"test": pruned}) == said


def test_each_split_has_its_own_note() -> None:
    dense = {"matched": LEARNED, "mismatched": LEARNED}
    found = record._guessing(setup(), dense, {"matched": GUESSES, "mismatched": LEARNED})
    assert [note.partition(":")[0] for note in found] == ["the pruned model is no better than guessing on matched"]


def test_a_fall_to_chance_is_said_once() -> None:
    assert record._fall(setup(), LEARNED, GUESSES) == []
    (note,) = record._fall(setup(), LEARNED, scores(0.7, False))
    assert note.startswith("accuracy fell from 0.8000 to 0.7000, by more than the noise of 100 examples")


def test_the_report_leaves_out_what_a_guess_keeps() -> None:
    found = record._metrics(setup().data, {"a": GUESSES, "b": LEARNED}, {"a": LEARNED, "b": GUESSES})
    assert found.retention == {} and found.at_chance.dense == ("accuracy",) and found.at_chance.pruned == ()
    assert found.splits["b"].retention == {"accuracy": pytest.approx(0.51 / 0.8)}
    assert found.splits["b"].at_chance.pruned == ("accuracy",) and not math.isnan(found.splits["b"].chance["accuracy"])
    assert found.chance == {"accuracy": 0.5}


def test_the_difference_has_the_noise_of_the_examples_that_both_answered() -> None:
    found = record._metrics(setup().data, {"a": LEARNED}, {"a": measured(0.75, (0.7, 0.8))}).differences["accuracy"]
    assert found.value == pytest.approx(-0.05) and found.confidence_95 is not None
    low, high = found.confidence_95  # 5 of 100 moved: much less noise than two accuracies of other examples have
    assert low == pytest.approx(-0.09, abs=0.011) and high == pytest.approx(-0.01, abs=0.011)


@pytest.mark.parametrize(
    ("teacher", "pruned", "interval", "given", "said"),
    [
        (0.52, 0.63, (0.61, 0.65), False, "raise --teacher-epochs or --teacher-lr"),
        (0.52, 0.63, (0.61, 0.65), True, "use one that was trained longer"),
        (0.62, 0.63, (0.61, 0.65), False, ""),
        (0.63, 0.52, (0.50, 0.54), False, ""),
    ],
)
def test_a_student_that_beats_its_teacher(
    teacher: float, pruned: float, interval: tuple[float, float], given: bool, said: str
) -> None:
    scores = [
        measured(value, ends) for value, ends in ((teacher, (teacher - 0.02, teacher + 0.02)), (pruned, interval))
    ]
    found = record._unfinished(setup(teacher="one" if given else ""), *scores)
    assert len(found) == bool(said)
    assert all(said in note and "better than its teacher (accuracy 0.6" in note for note in found)
