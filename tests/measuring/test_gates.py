"""Gates: what passes, what fails, what fails only without regard to noise, and what the messages say."""

import math
from typing import Any

import pytest

from capcli.config.measure import Gates
from capcli.errors import ConfigError
from capcli.measuring import gates
from capcli.measuring.noise import Estimate
from capcli.records.codec import to_json


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
    return dict(to_json(row))


def test_no_gates_no_rows() -> None:
    assert gates.check(Gates(), evidence()) == ()
    assert gates.check(Gates(confidence=0.95), evidence()) == ()


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
    assert "interval" not in row["message"], "without a confidence level nothing is said of noise"


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
    assert [(row.name, row.metric, row.op, row.limit) for row in rows] == [
        ("min accuracy", "accuracy", ">=", 0),
        ("min f1", "f1", ">=", 0),
        ("max ece", "ece", "<=", 1),
        ("max drop accuracy", "drop of accuracy", "<=", 1),
        ("max relative drop f1", "relative drop of f1", "<=", 0.03),
        ("min retention", "retention of accuracy", ">=", 0.1),
        ("max bytes", "weights_bytes", "<=", 1),
        ("max latency", "median_ms", "<=", 9),
    ]
    assert [row.value for row in rows] == pytest.approx([0.8, 0.7, 0.1, 0.04, 0, 0.8 / 0.84, 1000, 5])


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


def test_a_mean_that_rounding_puts_a_bit_off_is_the_limit() -> None:
    below, above = 0.79999999999999993, 0.80000000000000016
    assert below < 0.8 < above
    for value, flag in ((below, "min"), (above, "max")):
        row = checked(evidence(metrics={"a": Estimate(value)}), **{flag: "a=0.8"})
        assert row["passed"] and row["value"] == value
        assert row["message"] == f"a is 0.8000 (must be at {'least' if flag == 'min' else 'most'} 0.8)"
    ends = Estimate(0.7, lambda level: [0.6, below])
    assert checked(evidence(metrics={"a": ends}), min="a=0.8", confidence=0.95)["passed"]
    row = checked(evidence(metrics={"a": Estimate(0.8 - 1e-11)}), min="a=0.8")
    assert not row["passed"] and "0.79999999999" in row["message"]


SHARE, CORRELATION, ANY = (0.0, 1.0), (-1.0, 1.0), (-math.inf, math.inf)
BOUNDS = {"subj": SHARE, "stsb": CORRELATION, "mse": ANY, "ece": SHARE}
DROPS = {name: BOUNDS[name] for name in ("subj", "stsb", "mse")}


@pytest.mark.parametrize(
    ("limits", "message", "hint"),
    [
        ({"min": "sub=0.5"}, "--min: unknown metric 'sub'", "did you mean subj? valid: subj, stsb, mse, ece"),
        ({"max": "MSE=0.5"}, "--max: unknown metric 'MSE'", "did you mean mse?"),
        ({"max_drop": "ece=0.1"}, "--max-drop: no drop of 'ece' is measured", "valid: subj, stsb, mse"),
        ({"max_drop": "su=0.1"}, "--max-drop: unknown metric 'su'", "did you mean subj?"),
        ({"min": "later=0.1"}, "--min: unknown metric 'later'", "add --later"),
        ({"min": "subj=80"}, "--min subj=80 can never pass: subj is between 0 and 1", "did you mean 0.80 or 80%?"),
        ({"min": "subj=800"}, "--min subj=800 can never pass", "choose another limit"),
        ({"min": "subj=-0.5"}, "--min subj=-0.5 can never fail", "choose another limit"),
        ({"max": "subj=101%"}, "--max subj=1.01 can never fail", ""),
        ({"max": "subj=-0.5"}, "--max subj=-0.5 can never pass", ""),
        ({"min": "stsb=-2"}, "--min stsb=-2 can never fail: stsb is between -1 and 1", ""),
        ({"max_drop": "subj=2"}, "--max-drop subj=2 can never fail", "did you mean 0.02 or 2%?"),
        ({"max_drop": "subj=1"}, "--max-drop subj=1 can never fail", "did you mean 0.01 or 1%?"),
        ({"max_drop": "subj=1.5"}, "--max-drop subj=1.5 can never fail", "did you mean 0.015 or 1.5%?"),
        ({"max_drop": "subj=-2"}, "--max-drop subj=-2 can never pass", ""),
        ({"max_drop": "subj=200%"}, "--max-drop subj=200% can never fail", ""),
        ({"max_drop": "stsb=2"}, "--max-drop stsb=2 can never fail: stsb is between -1 and 1", "0.02 or 2%"),
    ],
)
def test_gates_whose_outcome_is_known_are_refused(limits: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        gates.require(Gates(**limits), BOUNDS, DROPS, {"later": "add --later"})
    assert message in caught.value.message and hint in caught.value.hint


def test_gates_that_may_hold_or_not_are_welcome() -> None:
    limits = {"min": "subj=0,stsb=-0.5,mse=-7", "max": "subj=1,mse=80", "max_drop": "subj=0.99,subj=99%,stsb=1,mse=2"}
    gates.require(Gates(**limits, min_retention=1.01), BOUNDS, DROPS)
    gates.require(Gates(max_drop="stsb=150%,subj=-50%"), BOUNDS, DROPS)
    gates.require(Gates(), {}, {})


@pytest.mark.parametrize(
    ("limits", "found", "said"),
    [
        ({"max_drop": "a=0.01"}, {"differences": {"a": Estimate(-0.0192)}}, "a fell 1.92 points (limit 1.00)"),
        ({"max_drop": "a=0.01"}, {"differences": {"a": Estimate(0.005)}}, "a rose 0.50 points (limit 1.00)"),
        ({"max_drop": "a=0.01"}, {"differences": {"a": Estimate(0.0)}}, "a did not change (limit 1.00)"),
        ({"max_drop": "a=0.01"}, {"differences": {"a": Estimate(-0.010004)}}, "a fell 1.0004 points (limit 1.00)"),
        ({"max_drop": "a=0.0125"}, {"differences": {"a": Estimate(-0.5)}}, "a fell 50.00 points (limit 1.25)"),
        ({"max_drop": "a=2%"}, {"ratios": {"a": Estimate(0.9765)}}, "a fell 2.35 % of the baseline (limit 2.00 %)"),
        ({"max_drop": "a=2%"}, {}, "the relative drop of a was not measured (limit 2.00 %)"),
        ({"min": "a=80%"}, {"metrics": {"a": Estimate(0.61538)}}, "a is 0.6154 (must be at least 0.8)"),
        ({"max": "a=0.1"}, {"metrics": {"a": Estimate(0.1000004)}}, "a is 0.1000004 (must be at most 0.1)"),
        (
            {"min_retention": 0.98},
            {"ratios": {"a": Estimate(0.96154)}},
            "a keeps 96.15 % of the baseline's (must be at least 98.00 %)",
        ),
        ({"max_bytes": 5_000_000}, {"weights_bytes": 1_885_000}, "the weights are 1.89 MB (limit 5 MB)"),
        ({"max_bytes": 1_234_567}, {"weights_bytes": 21_300_000}, "the weights are 21.3 MB (limit 1.234567 MB)"),
        ({"max_bytes": 999}, {"weights_bytes": 1000}, "the weights are 1.00 kB (limit 999 B)"),
        ({"max_latency_ms": 10}, {"latency_ms": Estimate(29.5512)}, "the median latency is 29.6 ms (limit 10 ms)"),
        ({"max_latency_ms": 10}, {"latency_ms": Estimate(10.004)}, "the median latency is 10.004 ms (limit 10 ms)"),
    ],
)
def test_gates_are_said_in_the_units_of_readers(limits: dict[str, Any], found: dict[str, Any], said: str) -> None:
    (row,) = gates.check(Gates(**limits), gates.Evidence(**{"primary": "a", "metrics": {}, **found}))
    assert row.message == said


def test_nothing_measured_at_all() -> None:
    limits = Gates(
        min="a=0", max="a=1", max_drop="a=1,b=1%", min_retention=0.1, max_bytes=1, max_latency_ms=1, confidence=0.9
    )
    rows = gates.check(limits, gates.Evidence(primary="a", metrics={}))
    assert len(rows) == 7
    assert not any(row.passed for row in rows)
    assert all("was not measured (" in str(row.message) for row in rows)


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
    assert [(row.passed, row.value, row.interval) for row in rows] == [(False, None, None)] * 6


@pytest.mark.parametrize("baseline", [0.0, -0.2])
def test_a_share_of_a_baseline_that_is_not_above_zero_has_no_meaning(baseline: float) -> None:
    found = evidence(baseline={"accuracy": baseline}, ratios={})
    for limits in ({"min_retention": 0.5}, {"max_drop": "accuracy=5%"}):
        row = checked(found, **limits)
        assert row["passed"] is False
        assert f"has no meaning: the baseline's value is {baseline:g}, not above zero" in row["message"]
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
    assert row["passed"] and "99 % interval 0.7600 to 0.8400" in row["message"]


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
