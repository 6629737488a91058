"""What the runs of a sweep come to, by hand: means and deviations, gates on means, the best run, what failed."""

from __future__ import annotations

import math
import statistics

import pytest
from swept import FAILED, four, report, swept

from capcli.config.measure import Gates
from capcli.measuring import reports
from capcli.records.swept import Spread
from capcli.reporting import documents, sweeps
from capcli.sweeping.outcome import failures, spread

# Means ---------------------------------------------------------------------------------------------------------------


def test_mean_and_deviation() -> None:
    found = swept(four(f1=report(0.8, size=1000, ms=4), f2=report(0.86, size=1100, ms=6)))
    fisher = found.configurations[0]
    assert fisher.metrics["accuracy"].mean == pytest.approx(0.83)
    assert fisher.metrics["accuracy"].deviation == pytest.approx(statistics.stdev([0.8, 0.86]))
    assert (fisher.weights_bytes.mean, fisher.latency_ms.mean, fisher.minutes.mean) == (1050, 5, 1.5)
    assert fisher.dense["accuracy"] == Spread(mean=pytest.approx(0.9), deviation=pytest.approx(0, abs=1e-12))
    assert [row.method for row in found.configurations] == ["fisher", "cap-f"]
    assert (found.status, found.passed, found.best) == ("complete", True, None)


def test_one_value_has_no_deviation_and_a_missing_one_no_mean() -> None:
    assert spread([0.5]) == Spread(mean=0.5)
    assert spread([0.5, None]) == Spread()
    assert spread([0.5, math.nan]) == Spread()
    assert spread([]) == Spread()


# Gates ---------------------------------------------------------------------------------------------------------------


def test_gates_are_held_against_the_mean() -> None:
    """A mean of 0.83 is 0.07 below the dense 0.9; the run of 0.80 alone is 0.1 below."""
    runs = four(f1=report(0.80), f2=report(0.86), c1=report(0.7), c2=report(0.7))
    found = swept(runs, max_drop="accuracy=0.07")
    fisher, cap = found.configurations
    assert (fisher.passed, cap.passed) == (True, False)
    assert fisher.gates[0].value == pytest.approx(0.07)
    assert [run.passed for run in fisher.runs] == [False, True]
    assert found.best == "fisher-0.9-seed2", "the run that is linked passes by itself"
    assert cap.gates[0].message == "accuracy fell 20.00 points (limit 7.00)"


def test_with_confidence_the_noise_of_the_examples_excuses() -> None:
    runs = four(f1=report(0.80), f2=report(0.86))
    assert swept(runs, min="accuracy=0.85", max="accuracy=0.9").best is None
    found = swept(runs, min="accuracy=0.85", confidence=0.95)
    assert found.configurations[0].gates[0].interval == pytest.approx((0.81, 0.85))
    assert found.configurations[0].passed


def test_means_that_pass_without_a_run_that_does() -> None:
    """One run is too large, the other not good enough; together they would do."""
    runs = four(f1=report(0.8, size=1200), f2=report(0.6, size=600), c1=report(0.1), c2=report(0.1))
    found = swept(runs, max_bytes=1000, min="accuracy=0.7")
    assert all(gate.passed for gate in found.configurations[0].gates)
    assert (found.configurations[0].passed, found.best, found.passed) == (False, None, False)
    assert sweeps.reasons(found)[0] == ("fisher 90 %", "the means pass, but no run passes all gates by itself")


def test_the_smallest_that_passes_is_the_best() -> None:
    runs = four(
        f1=report(0.85, size=900), f2=report(0.85, size=900), c1=report(0.81, size=500), c2=report(0.81, size=700)
    )
    assert swept(runs, min="accuracy=0.8").best == "cap-f-0.9-seed1"
    assert swept(runs, min="accuracy=0.82").best == "fisher-0.9-seed1"
    found = swept(runs, min="accuracy=0.9")
    assert (found.best, found.passed, found.status) == (None, False, "complete")
    assert [run.folder for row in swept(runs, min="accuracy=0.8").configurations for run in row.runs if run.best] == [
        "cap-f-0.9-seed1"
    ]


def test_of_the_seeds_the_hold_out_chooses() -> None:
    """By the epochs at the final sparsity alone; what the evaluation split says does not count."""
    runs = four(f1=report(0.89, held=0.7), f2=report(0.85, held=0.8), c1=report(0.5), c2=report(0.5))
    found = swept(runs, min="accuracy=0.8", holdout=0.1)
    assert [run.held_out for run in found.configurations[0].runs] == [0.7, 0.8]
    assert found.best == "fisher-0.9-seed2"


def test_latency_and_missing_figures() -> None:
    slow = report(0.8, ms=11)
    found = swept(four(c1=slow, c2=report(0.8, ms=9)), max_latency_ms=10)
    assert [row.passed for row in found.configurations] == [True, True]
    unknown = report(0.8, latency=None)
    found = swept(four(f1=unknown), max_latency_ms=10)
    assert found.configurations[0].passed is False
    assert found.configurations[0].latency_ms == Spread()
    assert found.best == "cap-f-0.9-seed1"
    nan = swept(four(f1=report(math.nan)), min="accuracy=0.1")
    assert nan.configurations[0].passed is False


def test_a_run_alone_is_held_against_the_same_gates() -> None:
    gates = Gates(max_drop="accuracy=0.05", min_retention=0.9, max_bytes=999)
    found = reports.judged(report(0.86), gates)
    assert [gate.passed for gate in found.gates or ()] == [True, True, False]
    assert found.passed is False
    assert (found.gates or ())[1].value == pytest.approx(0.86 / 0.9)
    assert reports.judged(report(0.86), Gates(confidence=0.95)) == report(0.86), "no gate was set"


# What failed, what waits ---------------------------------------------------------------------------------------------


def test_a_failed_run_loses_no_other() -> None:
    found = swept(four(c1=FAILED, f1=report(0.8, size=900), f2=report(0.8, size=900)), max_bytes=1000)
    cap = found.configurations[1]
    assert (found.status, found.best, found.passed) == ("incomplete", "fisher-0.9-seed1", True)
    assert cap.passed is False, "its mean is not that of all seeds"
    assert cap.metrics["accuracy"].mean == 0.8
    assert (cap.runs[0].status, cap.runs[0].error, cap.runs[0].exit_code) == ("failed", "out of memory", 3)
    assert sweeps.rows(found)[1][-1] == "1 of 2 runs failed"
    assert sweeps.reasons(found) == [("cap-f-0.9-seed1", "out of memory")]
    message, hint = failures(found)
    assert message == "1 of 4 runs failed: cap-f-0.9-seed1: out of memory"
    assert hint == "lower --batch-size; then run the same command again"
    assert failures(swept(four())) == ("", "")


def test_nothing_is_chosen_before_all_have_ended() -> None:
    runs = four()
    del runs["cap-f-0.9-seed2"]
    found = swept(runs, max_bytes=2000)
    assert (found.best, found.passed, found.status) == (None, False, "incomplete")
    assert sweeps.rows(found)[1][-1] == "not finished"
    assert sweeps.best(found) == "not chosen before all runs have ended"
    none = swept({})
    assert [row.metrics for row in none.configurations] == [{}, {}]
    assert documents.render_sweep_html(none)


def test_notes_say_of_how_many_runs() -> None:
    runs = four(**{key: report(0.8, notes=["a", "b"]) for key in ("f1", "f2", "c1")}, c2=report(0.8, notes=["b"]))
    assert swept(runs).notes == ("a (3 runs)", "b")
