"""Metrics against scikit-learn and scipy, degenerate cases, and the behaviour of the intervals."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from capcli import metrics

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
    found = metrics.measure(NAMES, truth, logits_for(predicted, n_classes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, predicted))
        assert found["macro_f1"] == pytest.approx(sk.f1_score(truth, predicted, average="macro", zero_division=0))
        assert found["matthews"] == pytest.approx(sk.matthews_corrcoef(truth, predicted), abs=1e-12)
        if n_classes == 2:
            f1 = metrics.measure(("f1",), truth, logits_for(predicted, 2))["f1"]
            assert f1 == pytest.approx(sk.f1_score(truth, predicted, zero_division=0))


@given(seed=st.integers(0, 10**6), n=st.integers(3, 60), tied=st.booleans())
def test_correlations_equal_scipy(seed: int, n: int, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n) * 2
    truth = truth.round() if tied else truth
    outputs = (truth + rng.normal(size=n)).round(1 if tied else 8)
    assume(len(set(truth)) > 1 and len(set(outputs)) > 1)
    found = metrics.measure(("pearson", "spearman"), truth, outputs[:, None])
    assert found["pearson"] == pytest.approx(stats.pearsonr(truth, outputs)[0], abs=1e-10)
    assert found["spearman"] == pytest.approx(stats.spearmanr(truth, outputs)[0], abs=1e-10)


def test_worked_values() -> None:
    """Confusion [[3, 1], [2, 4]]: accuracy .7; F1 of class 1 8/11; MCC (12-2)/sqrt(5·5·4·6)."""
    truth = np.array([0] * 4 + [1] * 6)
    predicted = np.array([0, 0, 0, 1, 0, 0, 1, 1, 1, 1])
    assert metrics.confusion_matrix(truth, predicted, 2).tolist() == [[3, 1], [2, 4]]
    found = metrics.measure(("accuracy", "f1", "macro_f1", "matthews"), truth, logits_for(predicted, 2))
    assert found == pytest.approx(
        {"accuracy": 0.7, "f1": 8 / 11, "macro_f1": (6 / 9 + 8 / 11) / 2, "matthews": 10 / math.sqrt(600)}
    )


@pytest.mark.parametrize("name", ["pearson", "spearman"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e6 + 0.1])
def test_correlation_with_a_constant_is_nan(name: str, value: float) -> None:
    other = np.arange(7.0)
    constant = np.full((7, 1), value)
    assert math.isnan(metrics.measure((name,), other, constant)[name])
    assert math.isnan(metrics.measure((name,), constant[:, 0], other[:, None])[name])


def test_matthews_of_constant_predictions_is_zero() -> None:
    truth = np.array([0, 1, 1, 0])
    assert metrics.measure(("matthews",), truth, logits_for(np.zeros(4, dtype=int), 2)) == {"matthews": 0.0}


def test_f1_without_any_positive_is_zero() -> None:
    nothing = np.zeros(5, dtype=int)
    assert metrics.measure(("f1", "accuracy"), nothing, logits_for(nothing, 2)) == {"f1": 0.0, "accuracy": 1.0}


def test_macro_f1_leaves_out_classes_that_never_occur() -> None:
    rows = np.array([0, 1, 0])
    assert metrics.measure(("macro_f1",), rows, logits_for(rows, 9)) == {"macro_f1": 1.0}


def test_equal_logits_choose_the_lower_class() -> None:
    assert metrics.measure(("accuracy",), np.array([0, 1]), np.zeros((2, 2))) == {"accuracy": 0.5}


# Intervals -----------------------------------------------------------------------------------------------------------


@given(answers(), st.integers(0, 3))
@settings(max_examples=25)
def test_accuracy_interval_contains_the_value_and_stays_in_range(
    case: tuple[np.ndarray, np.ndarray, int], seed: int
) -> None:
    truth, predicted, n_classes = case
    outputs = logits_for(predicted, n_classes)
    low, high = metrics.intervals(("accuracy",), truth, outputs, seed)["accuracy"]
    assert 0 <= low <= metrics.measure(("accuracy",), truth, outputs)["accuracy"] <= high <= 1
    assert low < high


def test_intervals_contain_the_point_value_and_narrow_with_more_examples() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (100, 1600):
        truth = rng.integers(0, 3, n)
        predicted = np.where(rng.random(n) < 0.8, truth, rng.integers(0, 3, n))
        outputs = logits_for(predicted, 3)
        values, found = metrics.measure(NAMES, truth, outputs), metrics.intervals(NAMES, truth, outputs, 1)
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
    values, found = metrics.measure(names, truth, outputs), metrics.intervals(names, truth, outputs, 1)
    for name in names:
        assert found[name][0] < values[name] < found[name][1]
        assert found[name][1] - found[name][0] < 0.25


@pytest.mark.parametrize("names", [("macro_f1", "accuracy"), ("pearson", "spearman")])
def test_intervals_are_a_pure_function_of_the_seed(names: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 80)
    outputs = rng.normal(size=(80, 2))
    first = metrics.intervals(names, truth, outputs, 5)
    assert first == metrics.intervals(names, truth, outputs, 5)
    assert first != metrics.intervals(names, truth, outputs, 6)


def test_regression_interval_of_constants_is_nan() -> None:
    found = metrics.intervals(("pearson",), np.ones(4), np.arange(4.0)[:, None], 1)
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
