"""Metrics against scikit-learn, scipy and the rules of seqeval and SQuAD, degenerate cases, and the intervals."""

import itertools
import math
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from capcli.data import entities
from capcli.data.kinds import KINDS
from capcli.measuring import metrics, resampling
from capcli.measuring.answers import answered
from capcli.measuring.embeddings import Wanted

NAMES = ("accuracy", "macro_f1", "matthews")


def logits_for(predicted: np.ndarray, n_classes: int) -> np.ndarray:
    return np.eye(n_classes)[predicted]


@st.composite
def answers(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    n_classes, n = draw(st.integers(2, 5)), draw(st.integers(1, 40))
    rows = st.lists(st.integers(0, n_classes - 1), min_size=n, max_size=n)
    return np.array(draw(rows)), np.array(draw(rows)), n_classes


@given(answers())
def test_classification_metrics_equal_scikit_learn(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    truth, predicted, n_classes = case
    found = metrics.measure("classification", NAMES, truth, logits_for(predicted, n_classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
        assert found["macro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="macro", zero_division=0))
        assert found["matthews"] == pytest.approx(sk.matthews_corrcoef(truth, predicted), abs=1e-12)
        if n_classes == 2:
            f1 = metrics.measure("classification", ("f1",), truth, logits_for(predicted, 2))["f1"]
            assert f1 == pytest.approx(sk.f1_score(truth, predicted, zero_division=0))


@given(seed=st.integers(0, 10**6), n=st.integers(3, 60), tied=st.booleans())
def test_correlations_equal_scipy(seed: int, n: int, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n) * 2
    truth = truth.round() if tied else truth
    outputs = (truth + rng.normal(size=n)).round(1 if tied else 8)
    assume(len(set(truth)) > 1 and len(set(outputs)) > 1)
    found = metrics.measure("regression", ("pearson", "spearman"), truth, outputs[:, None])
    assert found["pearson"] == pytest.approx(stats.pearsonr(truth, outputs)[0], abs=1e-10)
    assert found["spearman"] == pytest.approx(stats.spearmanr(truth, outputs)[0], abs=1e-10)


def test_worked_values() -> None:
    """Confusion [[3, 1], [2, 4]]: accuracy .7; F1 of class 1 8/11; MCC (12-2)/sqrt(5·5·4·6)."""
    truth = np.array([0] * 4 + [1] * 6)
    predicted = np.array([0, 0, 0, 1, 0, 0, 1, 1, 1, 1])
    counts = metrics.count_classes(truth, logits_for(predicted, 2))
    assert counts.total().tolist() == [[3, 4], [4, 6], [5, 5]], "hit, true, predicted"
    assert counts.times.sum() == 10
    found = metrics.measure(
        "classification", ("accuracy", "f1", "macro_f1", "matthews"), truth, logits_for(predicted, 2)
    )
    assert found == pytest.approx(
        {"accuracy": 0.7, "f1": 8 / 11, "macro_f1": (6 / 9 + 8 / 11) / 2, "matthews": 10 / math.sqrt(600)}
    )


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e6 + 0.1])
def test_correlation_with_a_constant_is_nan(name: str, value: float) -> None:
    other = np.arange(7.0)
    constant = np.full((7, 1), value)
    assert math.isnan(metrics.measure("regression", (name,), other, constant)[name])
    assert math.isnan(metrics.measure("regression", (name,), constant[:, 0], other[:, None])[name])


def test_matthews_of_constant_predictions_is_zero() -> None:
    truth = np.array([0, 1, 1, 0])
    assert metrics.measure("classification", ("matthews",), truth, logits_for(np.zeros(4, dtype=int), 2)) == {
        "matthews": 0.0
    }


def test_f1_without_any_positive_is_zero() -> None:
    nothing = np.zeros(5, dtype=int)
    assert metrics.measure("classification", ("f1", "accuracy"), nothing, logits_for(nothing, 2)) == {
        "f1": 0.0,
        "accuracy": 1.0,
    }


def test_macro_f1_leaves_out_classes_that_never_occur() -> None:
    rows = np.array([0, 1, 0])
    assert metrics.measure("classification", ("macro_f1",), rows, logits_for(rows, 9)) == {"macro_f1": 1.0}


def test_equal_logits_choose_the_lower_class() -> None:
    assert metrics.measure("classification", ("accuracy",), np.array([0, 1]), np.zeros((2, 2))) == {"accuracy": 0.5}


# Several labels ------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), n=st.integers(1, 30), n_labels=st.integers(2, 12), share=st.floats(0, 1))
def test_multilabel_metrics_equal_scikit_learn(seed: int, n: int, n_labels: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    truth = (rng.random((n, n_labels)) < share).astype(np.float32)
    outputs = np.where(rng.random(truth.shape) < 0.8, truth - 0.5, rng.normal(size=truth.shape))
    predicted = outputs > 0
    found = metrics.measure("multilabel", ("micro_f1", "macro_f1", "subset_accuracy"), truth, outputs)
    assert found["micro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="micro", zero_division=0))
    assert found["subset_accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
    occurs = np.flatnonzero((truth + predicted).any(axis=0))
    if len(occurs):
        by_label = sk.f1_score(truth, predicted, average=None, zero_division=0)
        assert found["macro_f1"] == pytest.approx(np.mean(by_label[occurs]))
    else:
        assert math.isnan(found["macro_f1"]) and found["micro_f1"] == 0 and found["subset_accuracy"] == 1


def test_a_label_is_predicted_only_above_zero() -> None:
    truth = np.array([[1, 0, 1]])
    outputs = np.array([[0.1, 0.0, np.nan]])
    assert metrics.measure("multilabel", ("micro_f1",), truth, outputs) == {"micro_f1": pytest.approx(2 / 3)}


# Tags ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("O", "B-PER", "I-PER"),
        ("I-LOC", "O", "B-LOC"),
        ("B-NP", "I-NP"),
        ("O", "B-A-b", "E-A-b", "S-A-b", "I-A-b"),
        ("O", "U-X", "B-X", "L-X"),
        ("O", "E-X", "I-X"),
        ("B", "I", "O"),
        ("O", "B-a\nb"),
    ],
)
def test_entity_schemes(names: tuple[str, ...]) -> None:
    assert entities.is_entity_scheme(names)


@pytest.mark.parametrize(
    "names",
    [(), ("O",), ("O", "O"), ("B", "I"), ("NOUN", "VERB"), ("O", "PER"), ("O", "B-PER", "PER"), ("O", "B-"),
     ("O", "B-PER", ""), ("o", "b-per"), ("O", "X-PER"), ("O", "PER-B"), ("O-PER", "B-PER"), ("O", "B_PER")],
)  # fmt: skip
def test_other_tags(names: tuple[str, ...]) -> None:
    assert not entities.is_entity_scheme(names)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O", ""),
        ("", ""),
        ("B-X I-X O", "X:0-1"),
        ("O B-X I-X", "X:1-2"),  # up to the end of the sentence
        ("O I-X I-X O", "X:1-2"),  # I after O begins
        ("B-X B-X I-X", "X:0-0 X:1-2"),
        ("B-X I-Y I-Y", "X:0-0 Y:1-2"),  # another type begins
        ("I-X I-Y", "X:0-0 Y:1-1"),
        ("B-X I-X E-X I-X", "X:0-2 X:3-3"),  # E ends
        ("E-X E-X", "X:0-0 X:1-1"),
        ("O E-X O", "X:1-1"),
        ("S-X S-X E-X", "X:0-0 X:1-1 X:2-2"),  # S begins and ends
        ("B-X S-X", "X:0-0 X:1-1"),
        ("I-X E-Y", "X:0-0 Y:1-1"),
        ("B-X L-X B-X L-X", "X:0-1 X:2-3"),  # L as E, U as S
        ("U-X U-X I-X", "X:0-0 X:1-1 X:2-2"),
        ("B-X-a I-X-a I-X-b", "X-a:0-1 X-b:2-2"),  # dashes in the type
        ("B I O B", ":0-1 :3-3"),  # no type
        ("B-X I", "X:0-0 :1-1"),
    ],
)
def test_entities_by_hand(tags: str, expected: str) -> None:
    found = sorted(entities.entities(tags.split()), key=lambda entity: entity[1])
    assert " ".join(f"{kind}:{first}-{last}" for kind, first, last in found) == expected


def seqeval_entities(tags: list[str]) -> set[tuple[str, int, int]]:
    """The rules of seqeval 1.2.2 without a scheme, and of conlleval, as tables; L and U read as E and S."""
    ends = {*(p + t for p in "BI" for t in "BSO"), *(p + t for p in "ES" for t in "BIESO")}
    starts = {*(p + t for p in "BIESO" for t in "BS"), *(p + t for p in "ESO" for t in "EI")}
    found, begin, before, before_type = set(), 0, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        letter, _, type_ = tag.partition("-")
        letter = {"L": "E", "U": "S"}.get(letter, letter)
        if before + letter in ends or (before != "O" and before_type != type_):
            found.add((before_type, begin, i - 1))
        if before + letter in starts or (letter != "O" and before_type != type_):
            begin = i
        before, before_type = letter, type_
    return found


TAGS = st.sampled_from(["O", *(f"{letter}-{type_}" for letter in "BIESLU" for type_ in ("X", "X-Y")), "B", "I"])
SENTENCES = st.lists(st.lists(st.tuples(TAGS, TAGS | st.none()), max_size=8), min_size=1, max_size=5)


@given(st.lists(TAGS, max_size=10))
@settings(max_examples=500)
def test_entities_equal_the_rules_of_seqeval(tags: list[str]) -> None:
    assert entities.entities(tags) == seqeval_entities(tags)


@given(SENTENCES)
def test_entity_scores_equal_a_count_over_all_sentences(pairs: list[list[tuple[str, str | None]]]) -> None:
    truth = [[tag for tag, _ in row] for row in pairs]
    outputs = [[tag if other is None else other for tag, other in row] for row in pairs]
    true, predicted = (
        {(i, *entity) for i, tags in enumerate(rows) for entity in seqeval_entities(tags)} for rows in (truth, outputs)
    )
    hits = len(true & predicted)
    found = metrics.measure("tokens", ("f1", "precision", "recall"), truth, outputs)
    precision, recall = hits / max(len(predicted), 1), hits / max(len(true), 1)
    f1 = 2 * precision * recall / (precision + recall) if hits else 0
    assert found == pytest.approx({"f1": f1, "precision": precision, "recall": recall})


@given(SENTENCES)
def test_word_scores_equal_scikit_learn(pairs: list[list[tuple[str, str | None]]]) -> None:
    truth = [[tag for tag, _ in row] for row in pairs]
    outputs = [[tag if other is None else other for tag, other in row] for row in pairs]
    found = metrics.measure("tokens", ("accuracy", "macro_f1"), truth, outputs)
    flat = tuple([tag for row in rows for tag in row] for rows in (truth, outputs))
    if not flat[0]:
        assert all(map(math.isnan, found.values()))
        return
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(*flat))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(*flat, average="macro", zero_division=0))


def test_an_entity_does_not_reach_into_the_next_sentence() -> None:
    truth = [["O", "B-X"], ["I-X", "O"]]
    assert metrics.measure("tokens", ("f1", "recall"), truth, truth) == {"f1": 1, "recall": 1}
    outputs = [["O", "B-X"], ["O", "O"]]
    found = metrics.measure("tokens", ("f1", "precision", "recall", "accuracy"), truth, outputs)
    assert found == pytest.approx({"f1": 2 / 3, "precision": 1, "recall": 0.5, "accuracy": 0.75})


# Answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat,\tsat!", "cat sat"),
        ("a an the A", ""),
        ("theatre and another", "theatre and another"),
        ("U.S.A.", "usa"),
        ("the-cat", "thecat"),  # punctuation goes before articles do
        ("the–cat", "–cat"),  # this dash is no ASCII punctuation, and ends the word
        ("x–a–y", "x– –y"),  # an article leaves a space
        ("«Été»\u00a0a", "«été»"),
        ("$1,000", "1000"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_normalised_answers(text: str, expected: str) -> None:
    assert metrics.normalised(text) == expected


@pytest.mark.parametrize(
    ("golds", "predicted", "exact", "f1"),
    [
        (("Denver Broncos",), "the denver broncos.", 1, 1),
        (("Denver Broncos",), "Denver", 0, 2 / 3),
        (("Denver Broncos",), "Carolina Panthers", 0, 0),
        (("Denver Broncos",), "", 0, 0),
        (("Denver Broncos",), "the", 0, 0),
        (("new new york",), "new york york", 0, 2 / 3),  # repeated words count as often as in both
        (("new new york",), "new new", 0, 4 / 5),
        (("new york",), "new new new new", 0, 1 / 3),
        (("1848", "in the year 1848", "year 1848"), "in year 1848", 1, 1),
        (("1848", "the big year 1848"), "in year 1848", 0, 2 / 3),  # the best gold answer
        (("“1848”",), "1848", 0, 0),  # these quotes are no ASCII punctuation
        (("'1848'",), '"1848"', 1, 1),
        ((), "", 1, 1),  # unanswerable
        ((), "the", 1, 1),  # nothing is left of the answer
        ((), "1848", 0, 0),
        (("The", "!"), "", 1, 1),  # nothing is left of any gold answer: as unanswerable
        (("The", "!"), "word", 0, 0),
        (("The", "word"), "", 0, 0),  # one gold answer is left
        (("The", "word"), "a word", 1, 1),
    ],
)
def test_answers_by_hand(golds: tuple[str, ...], predicted: str, exact: float, f1: float) -> None:
    found = metrics.measure("spans", ("f1", "exact_match"), [golds], [predicted])
    assert found == pytest.approx({"f1": f1, "exact_match": exact})


def test_answers_are_averaged_over_questions() -> None:
    truth = [("a b c",), (), ("x",), ("x",)]
    found = metrics.measure("spans", ("exact_match", "f1"), truth, ["b", "", "x", "y"])
    assert found == pytest.approx({"exact_match": 0.5, "f1": (2 / 3 + 1 + 1 + 0) / 4})


# Intervals -----------------------------------------------------------------------------------------------------------


def example_of(kind: str) -> tuple[tuple[str, ...], Any, Any]:
    """Names of all metrics of a kind, and truth and outputs of 80 examples of which many are right."""
    rng = np.random.default_rng(0)
    names = tuple(metrics.METRICS[kind])
    kept = rng.random(80) < 0.7
    if kind == "classification":
        truth = rng.integers(0, 2, 80)
        return names, truth, logits_for(np.where(kept, truth, rng.integers(0, 2, 80)), 2)
    if kind == "regression":
        return names, rng.normal(size=80), rng.normal(size=(80, 1))
    if kind == "ranking":
        numbers = rng.choice([0.0, 0.0, 0.0, 1.0, 2.0], (80, 4))
        return names, list(numbers), list(numbers + rng.normal(size=(80, 4)))
    if kind == "multilabel":
        labels = rng.integers(0, 2, (80, 9))
        return names, labels, np.where(kept[:, None], labels - 0.5, rng.normal(size=(80, 9)))
    if kind == "tokens":
        tags = [rng.choice(["O", "B-X", "I-X", "B-Y"], 6).tolist() for _ in kept]
        return names, tags, [row if keep else row[::-1] for row, keep in zip(tags, kept, strict=True)]
    if kind == "embedding":
        vectors = rng.normal(size=(80, 2, 6))
        scores = vectors.prod(axis=1).sum(axis=1) + rng.normal(size=80)
        truth = Wanted(vectors=vectors, scores=scores)
        names = tuple(name for name in names if name != "recall_at_10")  # neighbours are among all examples
        return names, truth, vectors + 0.5 * rng.normal(size=vectors.shape)
    golds = [("one two", f"three {i}") for i in range(80)]
    return names, golds, [gold[1] if keep else "three one" for gold, keep in zip(golds, kept, strict=True)]


SHARES = [kind for kind, row in KINDS.items() if "agreement" in row.agreements]  # whose metrics are shares


@pytest.mark.parametrize("kind", SHARES)
def test_intervals_of_each_kind_contain_the_value(kind: str) -> None:
    names, truth, outputs = example_of(kind)
    values, found = metrics.measure(kind, names, truth, outputs), metrics.intervals(kind, names, truth, outputs, 1)
    for name in names:
        assert 0 <= found[name][0] < values[name] < found[name][1] <= 1


@pytest.mark.parametrize("kind", metrics.METRICS)
def test_of_no_examples_everything_is_nan(kind: str) -> None:
    names, truth, outputs = example_of(kind)
    none = np.arange(0)
    truth, outputs = chosen_rows(truth, none), chosen_rows(outputs, none)
    values = metrics.measure(kind, names, truth, outputs)
    found = metrics.intervals(kind, names, truth, outputs, 1)
    assert list(values) == list(found) == list(names)
    assert all(map(math.isnan, values.values()))
    assert all(math.isnan(end) for ends in found.values() for end in ends)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("classification", "macro_f1"), ("multilabel", "macro_f1"), ("tokens", "f1"), ("tokens", "macro_f1"),
     ("spans", "f1")],
)  # fmt: skip
def test_bootstrap_equals_drawing_the_examples_themselves(kind: str, name: str) -> None:
    _, truth, outputs = example_of(kind)
    rng = np.random.default_rng(3)
    drawn = []
    for _ in range(600):
        rows = rng.integers(0, 80, 80)
        if isinstance(truth, list):
            again: tuple[Any, Any] = [truth[i] for i in rows], [outputs[i] for i in rows]
        else:
            again = truth[rows], outputs[rows]
        drawn.append(metrics.measure(kind, (name,), *again)[name])
    low, high = metrics.intervals(kind, (name,), truth, outputs, 1)[name]
    width = high - low
    assert [low, high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist(), abs=0.15 * width)


def test_sentences_are_drawn_and_not_words() -> None:
    """Of 50 sentences, 40 are right in all words: as uncertain as 50 examples, however many words they have."""
    widths = []
    for n_words in (1, 20):
        truth, wrong = [["A"] * n_words] * 50, [["B"] * n_words] * 10
        low, high = metrics.intervals("tokens", ("accuracy",), truth, truth[:40] + wrong, 1)["accuracy"]
        assert low < 0.8 < high
        widths.append(high - low)
    assert widths[0] == widths[1] == pytest.approx(2 * 1.96 * math.sqrt(0.8 * 0.2 / 50), rel=0.15)


@pytest.mark.parametrize(
    ("kind", "name", "truth", "outputs"),
    [
        ("classification", "accuracy", np.arange(10) % 5, logits_for(np.minimum(np.arange(10) % 5, 3), 5)),
        ("multilabel", "subset_accuracy", np.eye(10), np.eye(10) * np.r_[0, 0, np.ones(8)]),
        ("spans", "exact_match", [("x",)] * 10, ["x"] * 8 + ["y", "z"]),
    ],
)
def test_shares_of_examples_have_the_interval_of_wilson(kind: str, name: str, truth: Any, outputs: Any) -> None:
    assert metrics.intervals(kind, (name,), truth, outputs, 1)[name] == metrics.wilson(8, 10)


def test_regression_with_a_broken_output_is_nan() -> None:
    outputs = np.arange(9.0)[:, None]
    outputs[4] = np.nan
    names = ("pearson", "spearman")
    assert all(map(math.isnan, metrics.measure("regression", names, np.arange(9), outputs).values()))
    found = metrics.intervals("regression", names, np.arange(9), outputs, 1)
    assert all(math.isnan(end) for ends in found.values() for end in ends)


def test_many_classes_need_no_table_of_all_pairs() -> None:
    """A table of 1,000 × 1,000 pairs for each resample would be 8 GB."""
    truth = np.random.default_rng(0).integers(0, 1000, 1500)
    outputs = np.zeros((1500, 1000), dtype=np.float32)
    outputs[np.arange(1500), np.where(np.arange(1500) % 3, truth, 0)] = 1
    tracemalloc.start()
    try:
        low, high = metrics.intervals("classification", ("macro_f1",), truth, outputs, 1)["macro_f1"]
        assert tracemalloc.get_traced_memory()[1] < 200e6
    finally:
        tracemalloc.stop()
    assert 0 < low < high < 1


@given(answers(), st.integers(0, 3))
@settings(max_examples=25)
def test_accuracy_interval_contains_the_value_and_stays_in_range(
    case: tuple[np.ndarray, np.ndarray, int], seed: int
) -> None:
    truth, predicted, n_classes = case
    outputs = logits_for(predicted, n_classes)
    low, high = metrics.intervals("classification", ("accuracy",), truth, outputs, seed)["accuracy"]
    assert 0 <= low <= metrics.measure("classification", ("accuracy",), truth, outputs)["accuracy"] <= high <= 1
    assert low < high


def test_intervals_contain_the_point_value_and_narrow_with_more_examples() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (100, 1600):
        truth = rng.integers(0, 3, n)
        predicted = np.where(rng.random(n) < 0.8, truth, rng.integers(0, 3, n))
        outputs = logits_for(predicted, 3)
        values, found = (
            metrics.measure("classification", NAMES, truth, outputs),
            metrics.intervals("classification", NAMES, truth, outputs, 1),
        )
        assert list(found) == list(NAMES)
        for name in NAMES:
            assert found[name][0] < values[name] < found[name][1]
        widths.append([found[name][1] - found[name][0] for name in NAMES])
    for wide, narrow in zip(*widths, strict=True):
        assert narrow == pytest.approx(wide / 4, rel=0.35)


def test_regression_intervals_contain_the_point_value() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=200)
    outputs = (truth + rng.normal(size=200))[:, None]
    names = ("pearson", "spearman")
    values, found = (
        metrics.measure("regression", names, truth, outputs),
        metrics.intervals("regression", names, truth, outputs, 1),
    )
    for name in names:
        assert found[name][0] < values[name] < found[name][1]
        assert found[name][1] - found[name][0] < 0.25


@pytest.mark.parametrize("kind", metrics.METRICS)
def test_intervals_are_a_pure_function_of_the_seed_and_not_of_the_blocks(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, truth, outputs = example_of(kind)
    first = metrics.intervals(kind, names, truth, outputs, 5)
    assert list(first) == list(names)
    assert first == metrics.intervals(kind, names, truth, outputs, 5)
    assert first != metrics.intervals(kind, names, truth, outputs, 6)
    monkeypatch.setattr(resampling, "BLOCK", 777)
    assert metrics.intervals(kind, names, truth, outputs, 5) == first


def test_regression_interval_of_constants_is_nan() -> None:
    found = metrics.intervals("regression", ("pearson",), np.ones(4), np.arange(4.0)[:, None], 1)
    assert all(math.isnan(v) for v in found["pearson"])


def test_wilson_by_hand() -> None:
    """8 of 10: (0.8 + 0.19207) / 1.38415 ± 1.95996·sqrt(0.016 + 0.0096036) / 1.38415 (Wilson 1927)."""
    assert metrics.wilson(8, 10) == pytest.approx([0.490162, 0.943318], abs=1e-5)
    assert metrics.wilson(0, 10)[0] == 0
    assert metrics.wilson(10, 10)[1] == 1
    assert metrics.wilson(0, 10)[1] == pytest.approx(0.277540, abs=1e-5)


def test_wilson_covers_about_95_percent() -> None:
    rng = np.random.default_rng(7)
    for share in (0.1, 0.5, 0.93):
        hits = rng.binomial(200, share, size=2000)
        bounds = np.array([metrics.wilson(float(h), 200) for h in range(201)])[hits]
        covered = ((bounds[:, 0] <= share) & (share <= bounds[:, 1])).mean()
        assert 0.93 <= covered <= 0.97


def test_wilson_at_other_levels() -> None:
    """8 of 10 with z = 1.644854 and 2.575829."""
    for level, z in ((0.9, 1.6448536269514722), (0.99, 2.5758293035489004)):
        centre, spread = 0.8 + z**2 / 20, z * math.sqrt(0.16 / 10 + z**2 / 400)
        expected = [(centre - spread) / (1 + z**2 / 10), (centre + spread) / (1 + z**2 / 10)]
        assert metrics.wilson(8, 10, level) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", metrics.METRICS)
def test_intervals_widen_with_the_level(kind: str) -> None:
    names, truth, outputs = example_of(kind)
    found = [metrics.intervals(kind, names, truth, outputs, 1, level) for level in (0.5, 0.8, 0.95, 0.99)]
    assert found[2] == metrics.intervals(kind, names, truth, outputs, 1)
    for narrow, wide in itertools.pairwise(found):
        for name in names:
            assert wide[name][0] < narrow[name][0] < narrow[name][1] < wide[name][1]


# Two outputs on the same resamples -----------------------------------------------------------------------------------


def chosen_rows(values: Any, rows: Any) -> Any:
    if isinstance(values, Wanted):
        return Wanted(vectors=values.vectors[rows], scores=values.scores[rows])
    return [values[i] for i in rows] if isinstance(values, list) else values[rows]


def other_outputs(kind: str, outputs: Any) -> Any:
    """Outputs that give other answers to about a fifth of the examples."""
    rng = np.random.default_rng(5)
    swap = np.where(rng.random(80) < 0.2, np.arange(80)[::-1], np.arange(80))
    return chosen_rows(outputs, swap) if kind not in ("tokens", "ranking") else [outputs[j] for j in swap]


@pytest.mark.parametrize("kind", metrics.METRICS)
def test_each_resample_is_a_choice_of_examples_that_both_outputs_share(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resample by resample, what is measured on the rows themselves, gathered as often as they were drawn."""
    names, truth, ours = example_of(kind)
    theirs = other_outputs(kind, ours)
    found = metrics.resampled(kind, names, truth, [ours, theirs], 4)
    times = np.concatenate(list(resampling.draws(np.ones(80, dtype=np.int64), 80, 4)))
    assert times.shape == (resampling.RESAMPLES, 80) and (times.sum(axis=1) == 80).all()
    for b in (0, 1, 17, 999):
        rows = np.repeat(np.arange(80), times[b].astype(int))
        for s, outputs in enumerate((ours, theirs)):
            naive = metrics.measure(kind, names, chosen_rows(truth, rows), chosen_rows(outputs, rows))
            for name in names:
                assert found[name][s, b] == pytest.approx(naive[name], abs=1e-12), (name, s, b)
    monkeypatch.setattr(resampling, "BLOCK", 777)
    again = metrics.resampled(kind, names, truth, [ours, theirs], 4)
    assert all(np.array_equal(found[name], again[name]) for name in names)


@pytest.mark.parametrize("kind", metrics.METRICS)
def test_differences_have_the_spread_of_a_naive_paired_bootstrap(kind: str) -> None:
    names, truth, ours = example_of(kind)
    theirs = other_outputs(kind, ours)
    name, rng = names[0], np.random.default_rng(8)
    naive = []
    for _ in range(400):
        rows = rng.integers(0, 80, 80)
        a, b = (
            metrics.measure(kind, (name,), chosen_rows(truth, rows), chosen_rows(one, rows))[name]
            for one in (ours, theirs)
        )
        naive.append(a - b)
    drawn = metrics.resampled(kind, (name,), truth, [ours, theirs], 1)[name]
    difference = drawn[0] - drawn[1]
    assert difference.std() == pytest.approx(np.std(naive), rel=0.15)
    assert difference.mean() == pytest.approx(np.mean(naive), abs=0.2 * np.std(naive))
    alone = np.random.default_rng(0).permuted(drawn[1])
    assert difference.std() < 0.95 * (drawn[0] - alone).std(), "drawn together, they differ less than drawn apart"


@pytest.mark.parametrize("kind", metrics.METRICS)
def test_the_same_outputs_never_differ(kind: str) -> None:
    names, truth, outputs = example_of(kind)
    drawn = metrics.resampled(kind, names, truth, [outputs, outputs], 1)
    for name in names:
        assert drawn[name].shape == (2, resampling.RESAMPLES)
        assert (drawn[name][0] == drawn[name][1]).all()
        assert drawn[name][0].std() > 0


# Probabilities -------------------------------------------------------------------------------------------------------


def log_odds(*shares: float) -> np.ndarray:
    """Logits of two classes of which class 1 has these probabilities."""
    return np.array([[0.0, math.log(p / (1 - p))] for p in shares])


def test_calibration_error_by_hand() -> None:
    """Bins of a fifth. (.6, .8]: .7 right, .75 wrong: |1/2 - .725|; (.8, 1]: .9 right, .95 right: |1 - .925|.

    Weighted by 2 of 4 each: (.225 + .075) / 2 = .15.
    """
    logits = log_odds(0.7, 0.25, 0.9, 0.05)
    assert metrics.calibration_error(np.array([1, 1, 1, 0]), logits, 5) == pytest.approx(0.15)
    shifted = logits + np.array([[3.0], [-7.0], [100.0], [0.0]])
    assert metrics.calibration_error(np.array([1, 1, 1, 0]), shifted, 5) == pytest.approx(0.15)


def test_calibration_error_of_extremes() -> None:
    sure = np.eye(3)[[0, 1, 2, 0]] * 1000
    assert metrics.calibration_error(np.array([0, 1, 2, 0]), sure) == pytest.approx(0)
    assert metrics.calibration_error(np.array([1, 2, 0, 1]), sure) == pytest.approx(1)
    assert metrics.calibration_error(np.array([0, 1, 2, 0]), np.zeros((4, 3))) == pytest.approx(0.5 - 1 / 3)
    assert math.isnan(metrics.calibration_error(np.array([], dtype=int), np.zeros((0, 3))))
    assert math.isnan(metrics.calibration_error(np.array([0]), np.array([[np.nan, 0.0]])))


@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), n_classes=st.integers(2, 5), n_bins=st.integers(1, 20))
def test_calibration_error_is_that_of_a_loop_over_bins(seed: int, n: int, n_classes: int, n_bins: int) -> None:
    rng = np.random.default_rng(seed)
    truth, logits = rng.integers(0, n_classes, n), rng.normal(size=(n, n_classes)) * 2
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    total = 0.0
    for i in range(n_bins):
        inside = [k for k in range(n) if i / n_bins <= shares[k].max() < (i + 1) / n_bins]
        if inside:
            right = np.mean([shares[k].argmax() == truth[k] for k in inside])
            total += len(inside) / n * abs(right - np.mean([shares[k].max() for k in inside]))
    assert metrics.calibration_error(truth, logits, n_bins) == pytest.approx(total, abs=1e-9)


# Agreement -----------------------------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    ours, theirs = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 5.0]]), np.array([[0.0, 9.0], [1.0, 2.0], [0.0, 1.0]])
    assert metrics.agreement("classification", ours, theirs) == pytest.approx(2 / 3)
    ours, theirs = np.array([[1.0, -1.0], [3.0, 1.0]]), np.array([[9.0, -0.1], [1.0, -2.0]])
    assert metrics.agreement("multilabel", ours, theirs) == 0.5
    assert metrics.agreement("tokens", [["O", "B-X"], ["O"]], [["O", "O"], ["O"]]) == pytest.approx(2 / 3)
    assert metrics.agreement("spans", ["The cat!", "dog", ""], ["cat", "dogs", "the"]) == pytest.approx(2 / 3)
    assert math.isnan(metrics.agreement("regression", np.zeros((2, 1)), np.zeros((2, 1))))
    assert math.isnan(metrics.agreement("tokens", [[]], [[]]))


@pytest.mark.parametrize("kind", SHARES)
def test_agreement_is_the_metric_with_the_answers_of_one_as_truth(kind: str) -> None:
    _, _, ours = example_of(kind)
    theirs = other_outputs(kind, ours)
    name = {
        "classification": "accuracy",
        "multilabel": "subset_accuracy",
        "tokens": "accuracy",
        "spans": "exact_match",
    }[kind]
    assert 0 < metrics.agreement(kind, ours, theirs) < 1
    for a, b in ((ours, theirs), (theirs, ours), (ours, ours)):
        found = metrics.measure(kind, (name,), answered(kind, a), b)[name]
        assert found == pytest.approx(metrics.agreement(kind, a, b))
