"""What a run says of models that only guess: once for each split, with what helps."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from capcli.pruning import record
from capcli.records.pruned import SplitScores


def scores(value: float, guesses: bool) -> SplitScores:
    """Accuracy on 100 examples, half of which have the most frequent class."""
    return SplitScores(
        metrics={"accuracy": value},
        confidence_95={"accuracy": (value - 0.05, value + 0.05)},
        n_examples=100,
        chance={"accuracy": 0.5},
        at_chance=("accuracy",) if guesses else (),
    )


def setup(epochs: int = 3, teacher: str = "") -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(epochs=epochs), teacher=teacher, data=SimpleNamespace(primary="accuracy")
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
    epochs: int, teacher: str, dense: SplitScores, pruned: SplitScores, said: list[str]
) -> None:
    assert record._guessing(setup(epochs, teacher), {"test": dense}, {"test": pruned}) == said


def test_each_split_has_its_own_note() -> None:
    dense = {"matched": LEARNED, "mismatched": LEARNED}
    found = record._guessing(setup(), dense, {"matched": GUESSES, "mismatched": LEARNED})
    assert [note.partition(":")[0] for note in found] == ["the pruned model is no better than guessing on matched"]


def test_a_fall_to_chance_is_said_once() -> None:
    assert record._fall("accuracy", LEARNED, GUESSES) == []
    (note,) = record._fall("accuracy", LEARNED, scores(0.7, False))
    assert note.startswith("accuracy fell from 0.8000 to 0.7000, by more than the noise of 100 examples")


def test_the_report_leaves_out_what_a_guess_keeps() -> None:
    found = record._metrics("accuracy", {"a": GUESSES, "b": LEARNED}, {"a": LEARNED, "b": GUESSES})
    assert found.retention == {} and found.at_chance.dense == ("accuracy",) and found.at_chance.pruned == ()
    assert found.splits["b"].retention == {"accuracy": pytest.approx(0.51 / 0.8)}
    assert found.splits["b"].at_chance.pruned == ("accuracy",) and not math.isnan(found.splits["b"].chance["accuracy"])
    assert found.chance == {"accuracy": 0.5}


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
        SplitScores(metrics={"accuracy": value}, confidence_95={"accuracy": ends}, n_examples=100)
        for value, ends in ((teacher, (teacher - 0.02, teacher + 0.02)), (pruned, interval))
    ]
    found = record._unfinished("accuracy", *scores, given=given)
    assert len(found) == bool(said)
    assert all(said in note and "better than its teacher (accuracy 0.6" in note for note in found)
