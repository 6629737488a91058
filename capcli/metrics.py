"""How good predictions are: point values and 95 % intervals. numpy and scipy only.

Letters: N examples, C classes, R bootstrap resamples. Classification metrics are functions of the confusion matrix
[C, C] (rows true, columns predicted), so a resample of N examples is one multinomial draw of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 1000


def accuracy(confusion: Array) -> Array:
    """Share of examples on the diagonal of [..., C, C]."""
    share: Array = np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum(axis=(-2, -1))
    return share


def f1(confusion: Array) -> Array:
    """F1 of class 1, the positive class of the GLUE pair tasks; 0 without any positive, as scikit-learn has it."""
    return _f1_by_class(confusion)[..., 1]


def macro_f1(confusion: Array) -> Array:
    """Mean F1 over the classes that occur in truth or prediction."""
    occurs = (confusion.sum(axis=-1) + confusion.sum(axis=-2)) > 0
    mean: Array = (_f1_by_class(confusion) * occurs).sum(axis=-1) / occurs.sum(axis=-1)
    return mean


def _f1_by_class(confusion: Array) -> Array:
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    total = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    return np.asarray(2 * hit / np.maximum(total, 1))


def matthews(confusion: Array) -> Array:
    """Matthews correlation, multi-class form; 0 when truth or prediction is constant."""
    true, predicted, n = confusion.sum(axis=-1), confusion.sum(axis=-2), confusion.sum(axis=(-2, -1))
    covariance = np.trace(confusion, axis1=-2, axis2=-1) * n - (true * predicted).sum(axis=-1)
    spread = (n**2 - (true**2).sum(axis=-1)) * (n**2 - (predicted**2).sum(axis=-1))
    return np.asarray(np.where(spread > 0, covariance / np.sqrt(np.maximum(spread, 1)), 0.0))


def pearson(truth: Array, predicted: Array) -> Array:
    """Correlation along the last axis of two [..., N]; NaN when either is constant."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (truth, predicted))
    scale = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    varies = (np.ptp(truth, axis=-1) > 0) & (np.ptp(predicted, axis=-1) > 0) & (scale > 0)  # rounding hides constants
    return np.asarray(np.where(varies, (a * b).sum(axis=-1) / np.where(scale > 0, scale, 1), np.nan))


def spearman(truth: Array, predicted: Array) -> Array:
    """Rank correlation along the last axis of two [..., N]."""
    from scipy.stats import rankdata

    return pearson(rankdata(truth, axis=-1), rankdata(predicted, axis=-1))


CLASSIFICATION: dict[str, Callable[[Array], Array]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
}
REGRESSION: dict[str, Callable[[Array, Array], Array]] = {"pearson": pearson, "spearman": spearman}


def confusion_matrix(truth: NDArray[np.int64], predicted: NDArray[np.int64], n_classes: int) -> Array:
    """Counts [C, C] of (true, predicted)."""
    cells = np.bincount(truth * n_classes + predicted, minlength=n_classes**2)
    return cells.reshape(n_classes, n_classes).astype(np.float64)


def measure(names: Sequence[str], truth: NDArray[np.generic], outputs: Array) -> dict[str, float]:
    """Point values of the metrics `names` for `outputs` [N, C] (logits, or C = 1 for regression)."""
    if names[0] in REGRESSION:
        return {name: float(REGRESSION[name](truth.astype(np.float64), outputs[:, 0])) for name in names}
    confusion = confusion_matrix(truth.astype(np.int64), outputs.argmax(axis=1), outputs.shape[1])
    return {name: float(CLASSIFICATION[name](confusion)) for name in names}


def intervals(names: Sequence[str], truth: NDArray[np.generic], outputs: Array, seed: int) -> dict[str, list[float]]:
    """95 % intervals: Wilson's for accuracy, percentiles of a seeded bootstrap for the others."""
    rng = np.random.default_rng(seed)
    n = len(truth)
    if names[0] in REGRESSION:
        rows = rng.integers(0, n, size=(RESAMPLES, n))
        pairs = truth.astype(np.float64)[rows], outputs[:, 0][rows]
        return {name: _percentiles(REGRESSION[name](*pairs)) for name in names}
    confusion = confusion_matrix(truth.astype(np.int64), outputs.argmax(axis=1), outputs.shape[1])
    draws = rng.multinomial(n, confusion.ravel() / n, size=RESAMPLES).reshape(RESAMPLES, *confusion.shape)
    found = {name: _percentiles(CLASSIFICATION[name](draws.astype(np.float64))) for name in names if name != "accuracy"}
    return {name: wilson(float(np.trace(confusion)), n) if name == "accuracy" else found[name] for name in names}


def wilson(hits: float, n: int, z: float = 1.959964) -> list[float]:
    """Wilson's 95 % interval of a share."""
    share, spread = hits / n, z**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * np.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return [float(max(0.0, min(share, centre - half))), float(min(1.0, max(share, centre + half)))]


def _percentiles(values: Array) -> list[float]:
    values = values[np.isfinite(values)]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])] if len(values) else [float("nan")] * 2
