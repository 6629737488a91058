"""Results of a sweep from reports that are written by hand."""

from __future__ import annotations

from typing import Any

from capcli.config.grid import sweep_config
from capcli.records.codec import from_json
from capcli.records.pruned import Report
from capcli.records.swept import Sweep
from capcli.sweeping.jobs import Failure
from capcli.sweeping.outcome import outcome

FAILED = Failure(message="out of memory", hint="lower --batch-size", code=3)


def report(accuracy: float, *, size: int = 1000, ms: float = 5.0, dense: float = 0.9, **changes: Any) -> Report:
    """A report as far as a sweep reads it; half of the width of the interval is 0.02."""
    held = changes.pop("held", None)
    data: dict[str, Any] = {
        "model": "m",
        "task": "mr",
        "metrics": {
            "primary": "accuracy", "split": "validation", "n_examples": 100,
            "pruned": {"accuracy": accuracy}, "dense": {"accuracy": dense},
            "confidence_95": {"accuracy": [accuracy - 0.02, accuracy + 0.02]},
        },
        "size": {"weights_bytes": size, "artifact_bytes": size + 10},
        "latency": {"pruned": {"median_ms": ms, "confidence_95": [ms, ms]}, "dense": {}},
        "timing": {"total_seconds": 90.0},
        "sparsity": {"requested": 0.9},
        "curve": {"n_examples": 50, "held_out": held is not None},
        "history": [
            {"phase": "prune", "sparsity": s, "metrics": {"accuracy": value}}
            for s, value in ((0.5, 0.99), (0.9, held), (0.9, 0.1))
            if held is not None
        ],
        **changes,
    }  # fmt: skip
    return from_json(Report, data, "the test")


def swept(runs: dict[str, Report | Failure], **chosen: Any) -> Sweep:
    """The outcome of fisher and cap-f at 90 % with two seeds, of which these runs have ended."""
    options = {"model": "m", "task": "mr", "method": "fisher,cap-f", "seeds": 2, "out": "runs/x", **chosen}
    found = {name: one for name, one in runs.items() if isinstance(one, Report)}
    failed = {name: one for name, one in runs.items() if isinstance(one, Failure)}
    return outcome(sweep_config(options), found, failed)


def four(**by_name: Report | Failure) -> dict[str, Report | Failure]:
    """All runs: f1 and f2 of fisher, c1 and c2 of cap-f."""
    names = {"f": "fisher", "c": "cap-f"}
    base = {key: report(0.8) for key in ("f1", "f2", "c1", "c2")}
    return {f"{names[key[0]]}-0.9-seed{key[1]}": one for key, one in {**base, **by_name}.items()}
