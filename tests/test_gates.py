"""Gates: what passes, what fails, what fails only without regard to noise, and what the messages say."""

import math
from typing import Any

import pytest

from capcli import gates
from capcli.config import Gates
from capcli.noise import Estimate


def noisy(value: float, half: float = 0.02) -> Estimate:
    """Its half width at 95 %, twice that above."""
    return Estimate(value, lambda level: [value - half * (1 + (level > 0.95)), value + half * (1 + (level > 0.95))])


def evidence(**chosen: Any) -> gates.Evidence:
    base: dict[str, Any] = {
        "primary": "accuracy",
        "metrics": {"accuracy": noisy(0.8), "f1": Estimate(0.7), "ece": Estimate(0.1), "accuracy@typos": noisy(0.6)},
        "baseline": {"accuracy": 0.84, "f1": 0.7},
        "differences": {"accuracy": noisy(-0.04), "f1": Estimate(0.0)},
        "ratios": {"accuracy": noisy(0.8 / 0.84), "f1": Estimate(1.0)},
        "weights_bytes": 1000,
        "latency_ms": noisy(5.0, 0.5),
    }
    return gates.Evidence(**{**base, **chosen})


def checked(found: gates.Evidence | None = None, **limits: Any) -> dict[str, Any]:
    (row,) = gates.check(Gates(**limits), found or evidence())
    return row


def test_no_gates_no_rows() -> None:
    assert gates.check(Gates(), evidence()) == []
    assert gates.check(Gates(confidence=0.95), evidence()) == []


@pytest.mark.parametrize(
    ("limits", "passed"),
    [
        ({"min": "accuracy=0.8"}, True),
        ({"min": "accuracy=0.8000001"}, False),
        ({"min": "accuracy@typos=0.6"}, True),
        ({"min": "accuracy@typos=0.61"}, False),
        ({"max": "ece=0.1"}, True),
        ({"max": "ece=0.0999"}, False),
        ({"max_drop": "accuracy=0.04"}, True),
        ({"max_drop": "accuracy=0.0399"}, False),
        ({"max_drop": "f1=0"}, True),
        ({"max_drop": "f1=-0.01"}, False),  # it must rise
        ({"max_drop": "accuracy=5%"}, True),  # 4.76 % of 0.84
        ({"max_drop": "accuracy=4.7%"}, False),
        ({"max_drop": "f1=0%"}, True),
        ({"min_retention": 0.952}, True),
        ({"min_retention": 0.953}, False),
        ({"max_bytes": 1000}, True),
        ({"max_bytes": 999}, False),
        ({"max_latency_ms": 5.0}, True),
        ({"max_latency_ms": 4.99}, False),
    ],
)
def test_limits_belong_to_what_passes(limits: dict[str, Any], passed: bool) -> None:
    row = checked(**limits)
    assert row["passed"] is passed
    assert row["interval"] is None and row["confidence"] is None
    assert "%" not in row["message"], "without a confidence level nothing is said of noise"


def test_each_gate_has_its_row_in_order() -> None:
    limits = Gates(
        min="accuracy=0,f1=0",
        max="ece=1",
        max_drop="accuracy=1,f1=3%",
        min_retention=0.1,
        max_bytes=1,
        max_latency_ms=9,
    )
    rows = gates.check(limits, evidence())
    assert [(row["name"], row["metric"], row["op"], row["limit"]) for row in rows] == [
        ("min accuracy", "accuracy", ">=", 0),
        ("min f1", "f1", ">=", 0),
        ("max ece", "ece", "<=", 1),
        ("max drop accuracy", "drop of accuracy", "<=", 1),
        ("max relative drop f1", "relative drop of f1", "<=", 0.03),
        ("min retention", "retention of accuracy", ">=", 0.1),
        ("max bytes", "weights_bytes", "<=", 1),
        ("max latency", "median_ms", "<=", 9),
    ]
    assert [row["value"] for row in rows] == pytest.approx([0.8, 0.7, 0.1, 0.04, 0, 0.8 / 0.84, 1000, 5])


@pytest.mark.parametrize(
    "limits",
    [
        {"min": "recall=0"},
        {"max": "recall=1"},
        {"max_drop": "recall=1"},
        {"max_drop": "recall=99%"},
        {"max_drop": "ece=1"},  # known, but not of the baseline
        {"min": "accuracy@case=0"},
    ],
)
@pytest.mark.parametrize("confidence", [0.0, 0.95])
def test_what_is_missing_fails(limits: dict[str, Any], confidence: float) -> None:
    row = checked(**limits, confidence=confidence)
    assert row["passed"] is False and row["value"] is None and row["interval"] is None
    assert "not measured" in row["message"]


def test_a_misspelt_metric_is_told_the_nearest() -> None:
    assert "did you mean accuracy?" in checked(min="acuracy=0.1")["message"]
    assert "did you mean accuracy?" in checked(max_drop="acuracy=0.1")["message"]
    assert "did you mean" not in checked(max_drop="ece=1")["message"]


def test_a_mean_that_rounding_puts_a_bit_off_is_the_limit() -> None:
    below, above = 0.79999999999999993, 0.80000000000000016
    assert below < 0.8 < above
    for value, flag in ((below, "min"), (above, "max")):
        row = checked(evidence(metrics={"a": Estimate(value)}), **{flag: "a=0.8"})
        assert row["passed"] and row["value"] == value
        assert row["message"] == f"a is 0.8, must be {row['op']} 0.8"
    ends = Estimate(0.7, lambda level: [0.6, below])
    assert checked(evidence(metrics={"a": ends}), min="a=0.8", confidence=0.95)["passed"]
    row = checked(evidence(metrics={"a": Estimate(0.8 - 1e-11)}), min="a=0.8")
    assert not row["passed"] and "0.79999999999" in row["message"]


def test_gates_that_will_fail_are_known_before() -> None:
    limits = Gates(min="sub=0.5,mean=0", max="sub=1", max_drop="mr=1,mr=1%,mean=2%")
    assert gates.unknown(limits, ["subj", "mr", "mean"], ["subj", "mean"]) == [
        "no 'sub' is measured, its gate will fail: did you mean subj? valid: subj, mr, mean",
        "no drop of 'mr' is measured, its gate will fail: valid: subj, mean",
    ]
    assert gates.unknown(limits, ["sub", "mean"], []) == [
        "no drop of 'mr' is measured, its gate will fail",
        "no drop of 'mean' is measured, its gate will fail",
    ]
    assert gates.unknown(Gates(), [], []) == []


def test_nothing_measured_at_all() -> None:
    limits = Gates(
        min="a=0", max="a=1", max_drop="a=1,b=1%", min_retention=0.1, max_bytes=1, max_latency_ms=1, confidence=0.9
    )
    rows = gates.check(limits, gates.Evidence(primary="a", metrics={}))
    assert len(rows) == 7
    assert not any(row["passed"] for row in rows)
    assert all("not measured, must be" in row["message"] and "valid:" not in row["message"] for row in rows)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("confidence", [0.0, 0.95])
def test_what_is_not_finite_fails(value: float, confidence: float) -> None:
    """Even an interval around it does not excuse it."""
    broken = Estimate(value, lambda level: [-1.0, 1.0])
    found = evidence(
        metrics={"accuracy": broken}, differences={"accuracy": broken}, ratios={"accuracy": broken}, latency_ms=broken
    )
    limits = Gates(
        min="accuracy=-9",
        max="accuracy=9",
        max_drop="accuracy=9,accuracy=900%",
        min_retention=0.1,
        max_latency_ms=99,
        confidence=confidence,
    )
    rows = gates.check(limits, found)
    assert len(rows) == 6
    assert [(row["passed"], row["value"], row["interval"]) for row in rows] == [(False, None, None)] * 6


@pytest.mark.parametrize("baseline", [0.0, -0.2])
def test_a_share_of_a_baseline_that_is_not_above_zero_has_no_meaning(baseline: float) -> None:
    found = evidence(baseline={"accuracy": baseline}, ratios={})
    for limits in ({"min_retention": 0.5}, {"max_drop": "accuracy=5%"}):
        row = checked(found, **limits)
        assert row["passed"] is False
        assert f"has no meaning: the baseline's is {baseline:g}, not above zero" in row["message"]
    assert checked(found, max_drop="accuracy=1")["passed"], "a difference has"


# Noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "passed", "excused"),
    [
        ({"min": "accuracy=0.79"}, True, False),
        ({"min": "accuracy=0.819"}, True, True),  # 0.78 to 0.82
        ({"min": "accuracy=0.821"}, False, False),
        ({"max": "accuracy=0.781"}, True, True),
        ({"max": "accuracy=0.779"}, False, False),
        ({"max_drop": "accuracy=0.021"}, True, True),  # 0.02 to 0.06
        ({"max_drop": "accuracy=0.019"}, False, False),
        ({"max_drop": "accuracy=3%"}, True, True),  # 2.8 to 6.8 %
        ({"max_drop": "accuracy=2%"}, False, False),
        ({"min_retention": 0.97}, True, True),
        ({"min_retention": 0.98}, False, False),
        ({"max_latency_ms": 4.6}, True, True),
        ({"max_latency_ms": 4.4}, False, False),
    ],
)
def test_with_a_confidence_only_what_is_beyond_the_noise_fails(
    limits: dict[str, Any], passed: bool, excused: bool
) -> None:
    row = checked(**limits, confidence=0.95)
    assert (row["passed"], "not beyond the noise" in row["message"]) == (passed, excused)
    assert row["confidence"] == 0.95 and "95 % interval" in row["message"]
    low, high = row["interval"]
    assert low < row["value"] < high
    assert checked(**limits)["passed"] is (passed and not excused), "what passes by its value needs no excuse"


def test_a_higher_confidence_excuses_more() -> None:
    assert not checked(min="accuracy=0.83", confidence=0.95)["passed"]
    row = checked(min="accuracy=0.83", confidence=0.99)
    assert row["passed"] and "99 % interval 0.76 to 0.84" in row["message"]


def test_the_interval_of_a_drop_is_turned_round() -> None:
    row = checked(max_drop="accuracy=0.1", confidence=0.95)
    assert row["interval"] == pytest.approx([0.02, 0.06])
    row = checked(max_drop="accuracy=50%", confidence=0.95)
    assert row["interval"] == pytest.approx([1 - 0.8 / 0.84 - 0.02, 1 - 0.8 / 0.84 + 0.02])


@pytest.mark.parametrize("limits", [{"min": "f1=0.71"}, {"max_drop": "f1=-1%"}, {"max": "ece=0.05"}])
def test_without_an_interval_the_value_decides(limits: dict[str, Any]) -> None:
    row = checked(**limits, confidence=0.95)
    assert row["passed"] is False and row["interval"] is None
    assert "interval not known" in row["message"]


def test_an_interval_that_is_not_finite_excuses_nothing() -> None:
    broken = Estimate(0.5, lambda level: [0.4, math.nan])
    for found in (
        evidence(metrics={"accuracy": broken}),
        evidence(metrics={"accuracy": Estimate(0.5, lambda level: [0, math.inf])}),
    ):
        row = checked(found, min="accuracy=0.6", confidence=0.95)
        assert row["passed"] is False and row["interval"] is None
    row = checked(evidence(differences={"accuracy": broken}), max_drop="accuracy=-0.6", confidence=0.95)
    assert row["passed"] is False and row["interval"] is None


def test_bytes_have_no_noise() -> None:
    row = checked(max_bytes=999, confidence=0.95)
    assert row["passed"] is False and row["interval"] is None and row["confidence"] is None
