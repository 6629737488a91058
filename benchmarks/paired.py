"""Does one row of a study do better than another? Only the runs' records are needed, no models.

A seed is a whole pipeline: teacher, order, dropout, drawn examples. What is compared is the difference of two rows
within a seed, on the same examples. The interval that counts is over seeds; one from examples alone says nothing about
a method.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

DRAWS = 2000

Run = dict[str, Any]


def value(run: Run, model: str = "pruned") -> float:
    """The primary metric of a finished run on the evaluation split; `model` may be `dense`, its teacher."""
    return float(run["metrics"][model][run["metrics"]["primary"]])


def of_table(runs: Iterable[Run]) -> list[Run]:
    """The runs that count: finished, and no trials of a search."""
    return [run for run in runs if "metrics" in run and run.get("trial") is None]


def comparisons(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Each row against its baseline at the same sparsity, over the seeds that both have, in the order of the rows.

    `confidence_95` is the t-interval of the mean difference over seeds and `p` its test (None with one seed), `p_holm`
    is corrected for all comparisons of the same part. Where it is known which examples were right, `two_way_95` is a
    bootstrap interval (None with one seed), and `disagreements` counts by seed what only one of both has right.
    """
    table: dict[tuple[str, float], dict[int, Run]] = {}
    for run in of_table(runs):
        table.setdefault((run["label"], run["sparsity"]), {})[run["seed"]] = run
    found = []
    for (label, sparsity), ours in table.items():
        first = next(iter(ours.values()))
        theirs = table.get((first["baseline"], sparsity), {})
        if seeds := sorted(ours.keys() & theirs.keys()):
            pairs = [(ours[seed], theirs[seed]) for seed in seeds]
            row = {"label": label, "baseline": first["baseline"], "part": first["part"], "sparsity": sparsity}
            found.append({**row, "seeds": seeds, **_compared(pairs)})
    for part in {row["part"] for row in found}:
        rows = [row for row in found if row["part"] == part and row["p"] is not None]
        for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row["p_holm"] = p
    return found


def _compared(pairs: Sequence[tuple[Run, Run]]) -> dict[str, Any]:
    differences = [value(a) - value(b) for a, b in pairs]
    low, high, p = t_interval(differences)
    found: dict[str, Any] = {"differences": differences, "difference": statistics.mean(differences)}
    found["deviation"] = statistics.stdev(differences) if len(differences) > 1 else None
    found |= {"confidence_95": None if p is None else [low, high], "p": p, "p_holm": None}
    found |= {"two_way_95": None, "disagreements": []}
    if all("right" in run for pair in pairs for run in pair):
        bits = [(unpacked(a), unpacked(b)) for a, b in pairs]
        found["disagreements"] = [_disagreement(a["seed"], *both) for (a, _), both in zip(pairs, bits, strict=True)]
        if len(bits) > 1:
            found["two_way_95"] = two_way(np.stack([ours - theirs for ours, theirs in bits]))
    return found


def t_interval(differences: Sequence[float]) -> tuple[float, float, float | None]:
    """95 % interval of the mean with S - 1 degrees of freedom, and the two-sided p; of one value NaN, NaN and None."""
    from scipy.stats import t

    n = len(differences)
    if n < 2:
        return math.nan, math.nan, None
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(n)
    if error == 0:
        return mean, mean, float(mean == 0)
    half = float(t.ppf(0.975, n - 1)) * error
    return mean - half, mean + half, float(2 * t.sf(abs(mean) / error, n - 1))


def two_way(differences: Any) -> list[float]:
    """95 % interval of the mean of [S, N] differences per seed and example, seeds and examples drawn together."""
    rng = np.random.default_rng(0)
    n_seeds, n = differences.shape
    means = [
        differences[rng.integers(n_seeds, size=n_seeds)].mean(axis=0)[rng.integers(n, size=n)].mean()
        for _ in range(DRAWS)
    ]
    return [float(bound) for bound in np.quantile(means, [0.025, 0.975])]


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's method, in the order given."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest
    return corrected


def _disagreement(seed: int, ours: Any, theirs: Any) -> dict[str, Any]:
    """How many examples only one model has right, and the exact McNemar test of that."""
    from scipy.stats import binomtest

    better, worse = int((ours > theirs).sum()), int((ours < theirs).sum())
    p = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return {"seed": seed, "better": better, "worse": worse, "p": p}


def packed(right: Any) -> str:
    """Bits [N] as hexadecimal digits."""
    return np.packbits(right).tobytes().hex()


def unpacked(run: Run) -> Any:
    """Which examples a run has right [N], as floats."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(run["right"]), dtype=np.uint8))
    return bits[: run["metrics"]["n_examples"]].astype(float)
