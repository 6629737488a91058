"""What is trained on frozen vectors: logistic and ridge regression, and a linear head by gradient descent.

Letters: R vectors, H hidden size, C outputs, B batch, S tokens of a batch, K vectors of one example.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from capcli.data.kinds import KINDS
from capcli.measuring.metrics import measure
from capcli.models.task_losses import task_loss

Array = NDArray[np.floating]
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Of the data against the penalty, for vectors of unit variance: scikit-learn's C, and 1 / alpha of a ridge."""
FOLDS, CHOICE_SIZE = 3, 5000
LEAST = -20.0  # the log of a probability of nothing
EPOCHS, LEARNING_RATE, BATCH = 20, 5e-3, 64


def linear(
    kind: str, vectors: Array, labels: NDArray[Any], test: Array, n_classes: int, seed: int, metric: str = ""
) -> Array:
    """Outputs [M, C] for `test` [M, H] of a linear model trained on `vectors` [R, H].

    Logistic regression (for multilabel one per label), of which the outputs are log probabilities (log odds); ridge
    regression for numbers. The strength of the penalty is chosen by cross-validation on the training vectors: the best
    `metric` of classification, see `measuring.metrics`, or the lowest log loss without one; for numbers the lowest
    squared error when one is left out.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(vectors.astype(np.float32))
    vectors, test = (scaler.transform(part.astype(np.float32)) for part in (vectors, test))
    fit = LINEAR[kind]
    assert fit is not None, f"{kind} has no linear probe"
    return fit(vectors, labels, test, n_classes, seed, metric)


def _numbers(vectors: Array, labels: NDArray[Any], test: Array, n_classes: int, seed: int, metric: str = "") -> Array:
    """Numbers [M, 1] of ridge regression."""
    from sklearn.linear_model import RidgeCV

    return np.asarray(RidgeCV(1 / np.array(STRENGTHS)).fit(vectors, labels).predict(test))[:, None]


def _log_odds(vectors: Array, labels: NDArray[Any], test: Array, n_classes: int, seed: int, metric: str = "") -> Array:
    """Log odds [M, C] of a logistic regression per label."""
    columns = [_log_probabilities(vectors, column, test, 2, seed) for column in labels.T.astype(np.int64)]
    return np.stack([column[:, 1] - column[:, 0] for column in columns], axis=1)


def _log_probabilities(
    vectors: Array, labels: NDArray[Any], test: Array, n_classes: int, seed: int, metric: str = ""
) -> Array:
    """Log probabilities [M, C] of logistic regression; classes that were not trained on get the smallest number."""
    known = np.unique(labels)
    if len(known) == 1:
        return np.where(np.arange(n_classes) == known[0], 0, np.full((len(test), 1), LEAST))
    fitted = _logistic(vectors, labels, best_strength(vectors, labels, n_classes, seed, metric), 1e-4)
    return _told(fitted, test, n_classes)


LINEAR: dict[str, Callable[[Array, NDArray[Any], Array, int, int, str], Array] | None] = {
    "classification": _log_probabilities,
    "regression": _numbers,
    "ranking": _numbers,
    "multilabel": _log_odds,
    "tokens": _log_probabilities,
    "spans": None,  # places in a window are asked for, which no single vector tells: a head is trained
    "embedding": None,  # there is nothing to train: `ProbeConfig` refuses tasks without labels
}


def _logistic(vectors: Array, labels: NDArray[Any], strength: float, tolerance: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of slow convergence: what was reached is what is measured
        return LogisticRegression(C=strength, tol=tolerance, max_iter=300).fit(vectors, labels)


def _told(fitted: Any, vectors: Array, n_classes: int) -> Array:
    """Log probabilities [M, C], `LEAST` for classes that were not trained on."""
    found = np.full((len(vectors), n_classes), LEAST)
    with np.errstate(divide="ignore"):
        found[:, fitted.classes_] = np.maximum(fitted.predict_log_proba(vectors), LEAST)
    return found


def best_strength(vectors: Array, labels: NDArray[Any], n_classes: int, seed: int, metric: str) -> float:
    """The best strength in cross-validation, on at most `CHOICE_SIZE` vectors; of equals the strongest penalty."""
    from sklearn.model_selection import KFold

    chosen = np.random.default_rng(seed).permutation(len(vectors))[:CHOICE_SIZE]
    vectors, labels = vectors[chosen], labels[chosen]
    told = np.full((len(STRENGTHS), len(labels), n_classes), LEAST)
    for train, held in KFold(min(FOLDS, len(labels))).split(vectors):
        if len(np.unique(labels[train])) < 2:
            continue
        for index, strength in enumerate(STRENGTHS):
            told[index, held] = _told(
                _logistic(vectors[train], labels[train], strength, 1e-2), vectors[held], n_classes
            )
    if metric:
        scores = [measure("classification", (metric,), labels, one)[metric] for one in told]
    else:
        scores = told[:, np.arange(len(labels)), labels].mean(axis=1).tolist()
    return STRENGTHS[int(np.argmax(scores))]


Batches = Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]]
"""By epoch: rows of the vectors [B] or [B, S], labels, and for rows [B, S] which of them are real."""


def head(kind: str, vectors: Array, batches: Batches, test: Array, n_outputs: int, seed: int) -> Array:
    """Outputs [M, C] for `test` [M, H] of a new linear head, trained on `vectors` [R, H] by gradient descent.

    The loss is that of the task, numbers are brought to unit variance; AdamW, `EPOCHS` passes, the learning rate falls
    linearly from `LEARNING_RATE`.
    """
    centre, scale = _spreads(vectors)
    known, asked = (torch.from_numpy(np.array(part)) for part in (vectors, test))
    numbers = KINDS[kind].numbers
    offset, unit = _spread(batches) if numbers else (0.0, 1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = torch.nn.Linear(vectors.shape[1], n_outputs)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    for epoch in range(EPOCHS):
        steps = list(batches(epoch))
        for step, (rows, labels, mask) in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - (epoch + step / len(steps)) / EPOCHS)
            outputs = layer((known[rows].float() - centre) / scale)
            wanted = (labels - offset) / unit if numbers else labels
            loss = task_loss(outputs, wanted, kind, mask)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    with torch.inference_mode():
        found = [layer((part.float() - centre) / scale) for part in torch.split(asked, 65536)]
        return np.asarray(torch.cat(found).numpy() * unit + offset)


def _spreads(vectors: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of vectors [R, …] over the examples, 1 where all are the same."""
    mean, spread = vectors.mean(axis=0, dtype=np.float64), vectors.std(axis=0, dtype=np.float64)
    return torch.from_numpy(mean).float(), torch.from_numpy(np.where(spread > 0, spread, 1)).float()


def heads(vectors: Array, wanted: Array, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [K, C, H] and biases [K, C] of K linear classifiers, one for each of the vectors [R, K, H] of an example,
    that come near to the probabilities `wanted` [R, C] by their cross-entropy; trained as `head` is.
    """
    centre, scale = _spreads(vectors)
    known, target = torch.from_numpy(vectors), torch.from_numpy(wanted).float()
    weight = torch.zeros(known.shape[1], target.shape[1], known.shape[2], requires_grad=True)
    bias = torch.zeros(known.shape[1], target.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=LEARNING_RATE, weight_decay=0.01)
    n_steps = -(-len(known) // BATCH)
    for epoch in range(EPOCHS):
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(known)))
        for step, rows in enumerate(torch.split(order, BATCH)):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - (epoch + step / n_steps) / EPOCHS)
            x = (known[rows].float() - centre) / scale
            logs = (torch.einsum("bkh,kch->bkc", x, weight) + bias).log_softmax(dim=-1)
            loss = -(target[rows, None] * logs).sum(dim=(1, 2)).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    with torch.no_grad():
        scaled = weight / scale[:, None]
        return scaled, bias - torch.einsum("kch,kh->kc", scaled, centre)


def _spread(batches: Batches) -> tuple[float, float]:
    """Mean and standard deviation of the numbers to learn."""
    labels = torch.cat([labels for _, labels, _ in batches(0)]).double()
    return float(labels.mean()), float(labels.std(unbiased=False)) or 1.0
