"""What guessing scores, and whether a model does better: the metrics of the best answer that is the same for all
examples.

Letters: N examples, C classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from capcli.measuring import embeddings, metrics
from capcli.measuring.metrics import CORRELATIONS, SHARES
from capcli.measuring.noise import Estimate, stored
from capcli.measuring.resampling import Array
from capcli.records.parts import Values
from capcli.reporting.text import number

LEVEL = 0.95
ROUNDING = 1e-12  # what binary digits may tell apart

# What guessing scores ------------------------------------------------------------------------------------------------


def of(kind: str, names: Sequence[str], truth: Any, outputs: Any) -> dict[str, float]:
    """What the metrics `names` of the truth are for answers that are the same for all examples, each for the best.

    `truth` and `outputs` are as in `metrics.measure`; of the outputs only the width counts. A correlation with what is
    constant is not defined, and 0 here: nothing is known. NaN of no examples.
    """
    if len(truth) == 0:
        return dict.fromkeys(names, math.nan)
    found = [metrics.measure(kind, names, truth, one) for one in CONSTANTS[kind](truth, outputs)]
    best = {name: max((one[name] for one in found if not math.isnan(one[name])), default=math.nan) for name in names}
    return {name: 0.0 if math.isnan(value) and name in CORRELATIONS else value for name, value in best.items()}


def _classes(truth: Any, outputs: Any) -> list[Array]:
    """Always the most frequent class, best for accuracy and mean F1; and always class 1, best for its F1."""
    n_classes = outputs.shape[1]
    most = int(np.bincount(truth.astype(np.int64)).argmax())
    return [_always(np.eye(n_classes)[one], truth) for one in {most, min(1, n_classes - 1)}]


def _label_sets(truth: Any, outputs: Any) -> list[Array]:
    """Always the most frequent set of labels, best for whole sets; all labels that occur, best for mean F1; and those
    whose share of the examples is more than half of the F1 that is reached with them, best for F1 over all labels."""
    true = truth.astype(bool)
    n, each = len(true), true.sum(axis=0)
    sets, times = np.unique(true, axis=0, return_counts=True)
    order = np.argsort(-each, kind="stable")
    reached = 2 * each[order].cumsum() / np.maximum(each.sum() + n * np.arange(1, len(each) + 1), 1)
    frequent = np.isin(np.arange(len(each)), order[: reached.argmax() + 1])
    return [_always(np.where(one, 1.0, -1.0), truth) for one in (sets[times.argmax()], each > 0, frequent)]


def _always(answer: Array, truth: Any) -> Array:
    """The same row of outputs [C] for N examples, [N, C], which takes no memory."""
    return np.broadcast_to(answer, (len(truth), len(answer)))


def _mean(truth: Any, outputs: Any) -> list[Array]:
    return [_always(np.array([truth.astype(np.float64).mean()]), truth)]


def _one_score(truth: Any, outputs: Any) -> list[list[Array]]:
    """All documents have the same score, which is worth what a random order is on average."""
    return [[np.zeros(len(one)) for one in truth]]


def _tags(truth: Any, outputs: Any) -> list[list[list[str]]]:
    """Every word has the most frequent tag: where tags mark entities, there is none."""
    counts = Counter(tag for tags in truth for tag in tags)
    most = max(counts, key=lambda tag: counts[tag], default="")
    return [[[most] * len(tags) for tags in truth]]


def _no_answers(truth: Any, outputs: Any) -> list[list[str]]:
    """No question has an answer."""
    return [[""] * len(truth)]


def _average_vector(truth: Any, outputs: Any) -> list[Array]:
    """Every text has the vector that is nearest to all vectors of the other model."""
    return [np.broadcast_to(embeddings.average(truth.vectors), outputs.shape)]


CONSTANTS: dict[str, Callable[[Any, Any], list[Any]]] = {
    "classification": _classes,
    "regression": _mean,
    "ranking": _one_score,
    "multilabel": _label_sets,
    "tokens": _tags,
    "spans": _no_answers,
    "embedding": _average_vector,
}

# Whether a model does better -----------------------------------------------------------------------------------------


def is_at_chance(name: str, found: Estimate, by_chance: float, n_examples: int | None) -> bool:
    """Whether a metric is no better than guessing beyond the noise: the 95 % interval of its value reaches down to what
    guessing scores. Without an interval that of so many independent examples serves; a value that is not finite is no
    statement."""
    if not (math.isfinite(found.value) and math.isfinite(by_chance)):
        return False
    ends = found.interval(LEVEL)
    return (ends[0] if ends else _lowest(name, found.value, n_examples)) <= by_chance + ROUNDING


def _lowest(name: str, value: float, n_examples: int | None) -> float:
    """The lower end of the interval of a value of which only the number of examples is known, if that."""
    if not n_examples:
        return value
    if name in SHARES:
        return metrics.wilson(value * n_examples, n_examples, LEVEL)[0]
    return value - metrics.normal_quantile((1 + LEVEL) / 2) / math.sqrt(n_examples)  # of a correlation near 0


def at_chance(
    values: Values,
    confidence_95: Mapping[str, Sequence[float]],
    by_chance: Values,
    n_examples: int | None,
    *,
    is_constant: bool = False,
) -> tuple[str, ...]:
    """Which of the metrics are no better than guessing; all of a model that gives the same answer to everything."""
    return tuple(
        name
        for name, value in values.items()
        if name in by_chance
        and (is_constant or is_at_chance(name, stored(value, confidence_95.get(name)), by_chance[name], n_examples))
    )


# In words ------------------------------------------------------------------------------------------------------------


class Scored(Protocol):
    """A model on a split: its metrics, what guessing scores, in which it is no better, and its answer to everything."""

    @property
    def metrics(self) -> Values: ...
    @property
    def chance(self) -> Values: ...
    @property
    def at_chance(self) -> Sequence[str]: ...
    @property
    def constant(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Known:
    """As much as a stored result tells of a model on a split."""

    metrics: Values
    chance: Values
    at_chance: Sequence[str] = ()
    constant: str = ""


def doubts(models: Mapping[str, Scored], split: str, primary: str, remedy: str = "") -> list[str]:
    """One note on those of the models that are no better than guessing in the primary metric, if any is.

    `models` are on the same examples of `split`; `remedy` is what helps.
    """
    guessing = {name: one for name, one in models.items() if primary in one.at_chance}
    if not guessing:
        return []
    by_chance = next(iter(guessing.values())).chance[primary]
    if by_chance >= 1:
        return [
            f"{primary} says nothing on {split}: whoever gives the same answer to everything scores {number(by_chance)}"
        ]
    who, what = " and ".join(guessing), " and ".join(_score(one, primary) for one in guessing.values())
    verb = "is" if len(guessing) == 1 else "are"
    end = f"; {remedy}" if remedy else ""
    return [f"{who} {verb} no better than guessing on {split}: {primary} {what}, chance {number(by_chance)}{end}"]


def _score(one: Scored, primary: str) -> str:
    value = one.metrics[primary]
    shown = "undefined" if math.isnan(value) else number(value)
    return f"{shown} (always {one.constant})" if one.constant else shown
