"""A model on a split: answers, metrics with intervals, calibration, agreement of two models."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from capcli.config.task import TaskConfig
from capcli.data import tokens
from capcli.data.batches import Examples
from capcli.data.kinds import KINDS
from capcli.data.splits import Split
from capcli.errors import ModelError
from capcli.measuring import answers, chance, metrics, noise
from capcli.measuring.metrics import AGREEMENT, CALIBRATION
from capcli.measuring.noise import Estimate
from capcli.models.predict import Progress
from capcli.models.predictor import Predictor
from capcli.records.parts import Scores, intervals


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Metrics of one split, with 95 % intervals, and the truth and outputs they come from; see `measuring.metrics`.

    doubts: what the model could not read of the texts. constant: its answer, where that is the same to all of them.
    chance: what guessing scores, and at_chance: in which metrics the model is no better; see `measuring.chance`. Empty
    where no interval was asked for.
    """

    metrics: dict[str, float]
    confidence_95: dict[str, list[float]]
    n_examples: int
    kind: str
    truth: Any
    outputs: Any
    seed: int
    doubts: tuple[str, ...] = ()
    constant: str = ""
    chance: Mapping[str, float] = field(default_factory=dict)
    at_chance: tuple[str, ...] = ()

    def estimates(self) -> dict[str, Estimate]:
        """The metrics with their intervals at any level."""
        return {name: Estimate(value, partial(self._interval, name)) for name, value in self.metrics.items()}

    def _interval(self, name: str, level: float) -> list[float]:
        return metrics.intervals(self.kind, (name,), self.truth, self.outputs, self.seed, level)[name]

    @property
    def calibration(self) -> dict[str, float]:
        """The expected calibration error, by its name; only classification has one."""
        known = KINDS[self.kind].single and AGREEMENT not in self.metrics  # other answers are no truth
        return {CALIBRATION: metrics.calibration_error(self.truth, self.outputs)} if known else {}

    @property
    def table(self) -> Scores:
        """What the result of `cap eval` says of it."""
        return Scores(
            metrics=self.metrics | self.calibration,
            confidence_95=intervals(self.confidence_95),
            n_examples=self.n_examples,
            chance=self.chance,
            at_chance=self.at_chance,
        )


def measure(
    model: Predictor,
    examples: Examples,
    names: tuple[str, ...],
    seed: int = 1,
    *,
    with_intervals: bool = True,
) -> Generator[Progress, None, Measured]:
    """Metrics `names` of the model on tokenised examples; yields how many are done, of how many."""
    logits = yield from model.answers(examples)
    return scored(examples.kind, model.labels, examples, names, logits, seed, with_intervals=with_intervals)


def scored(
    kind: str,
    labels: Sequence[str],
    examples: Examples,
    names: tuple[str, ...],
    logits: torch.Tensor,
    seed: int = 1,
    *,
    with_intervals: bool = True,
) -> Measured:
    """Metrics `names` of logits of the examples, as `predict.outputs` gives them."""
    truth, outputs = answers.read(kind, labels, examples, logits.cpu().double().numpy())
    whole = bool(torch.isfinite(logits).all())  # or the answers would be those of the comparisons with NaN
    values = metrics.measure(kind, names, truth, outputs) if whole else dict.fromkeys(names, math.nan)
    ends = metrics.intervals(kind, names, truth, outputs, seed) if with_intervals and whole else {}
    constant = answers.constant(kind, labels, truth, outputs) if whole else ""
    by_chance = chance.of(kind, names, truth, outputs) if with_intervals else {}
    return Measured(
        metrics=values,
        confidence_95=ends,
        n_examples=len(truth),
        kind=kind,
        truth=truth,
        outputs=outputs,
        seed=seed,
        doubts=tokens.doubts(examples, examples.split.name) if examples.split else (),
        constant=constant,
        chance=by_chance,
        at_chance=chance.at_chance(values, ends, by_chance, len(truth), is_constant=bool(constant)),
    )


def encoded(model: Predictor, split: Split, source: TaskConfig, check: Callable[[], None] = lambda: None) -> Examples:
    """The split as the model reads it; see `tokens.encode`."""
    length = min(source.longest, model.longest)
    return tokens.encode(split, model.tokenizer, length, stride=source.stride, check=check)


def answered(model: Predictor, examples: Examples) -> Generator[Progress, None, Examples]:
    """The examples, and the split that they are of, with the model's answers for labels; vectors are there besides.

    Raises `ModelError` for answers that are not finite.
    """
    assert examples.split is not None, "what is measured was read from a split"
    logits = (yield from model.answers(examples)).cpu().double().numpy()
    if not np.isfinite(logits).all():
        raise ModelError(f"answers of {model.source} are not finite, and cannot take the place of labels")
    _, outputs = answers.read(examples.kind, model.labels, examples, logits)
    if KINDS[examples.kind].vectors:
        return replace(examples, split=replace(examples.split, vectors=outputs))
    labels = answers.as_labels(examples.kind, model.labels, outputs)
    split = replace(examples.split, labels=labels)
    return replace(examples, split=split, labels=examples.labels if examples.per_token else labels)


def splits_answered(
    model: Predictor, splits: Mapping[str, Split], source: TaskConfig
) -> Generator[Progress, None, dict[str, Split]]:
    """The splits by name with the model's answers, see `answered`; yields how many of one are done, of how many."""
    found = {}
    for name, split in splits.items():
        examples = yield from answered(model, encoded(model, split, source))
        assert examples.split is not None, "it has the answers"
        found[name] = examples.split
    return found


def paired(ours: Measured, theirs: Measured) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Differences (ours minus theirs) and ratios of the metrics, with the noise of examples that both answered.

    Ratios only to values above zero.
    """
    names = list(ours.metrics)
    draws = metrics.resampled(ours.kind, names, ours.truth, [ours.outputs, theirs.outputs], ours.seed)
    differences = {
        name: noise.sampled(ours.metrics[name] - theirs.metrics[name], draws[name][0] - draws[name][1])
        for name in names
    }
    ratios = {
        name: noise.sampled_ratio(ours.metrics[name] / theirs.metrics[name], *draws[name])
        for name in names
        if theirs.metrics[name] > 0
    }
    return differences, ratios


def agreed(ours: Measured, theirs: Measured) -> Estimate:
    """How often two answer alike, see `metrics.agreement`; NaN where answers are never the same."""
    value = metrics.agreement(ours.kind, ours.outputs, theirs.outputs)
    if math.isnan(value) or any(map(math.isnan, (*ours.metrics.values(), *theirs.metrics.values()))):
        return Estimate(math.nan)
    truth = answers.answered(ours.kind, theirs.outputs)
    return Estimate(
        value,
        lambda level: metrics.intervals(ours.kind, (AGREEMENT,), truth, ours.outputs, ours.seed, level)[AGREEMENT],
    )


def retention(
    ours: Mapping[str, float], baseline: Mapping[str, float], at_chance: Collection[str] = ()
) -> dict[str, float]:
    """Share of each baseline metric that is kept; only for baselines above zero that are better than guessing.

    at_chance: the metrics in which the baseline is not.
    """
    told = {name: value for name, value in baseline.items() if name not in at_chance}
    known = {name: value for name, value in told.items() if value is not None and value > 0}
    return {name: value / known[name] for name, value in ours.items() if name in known}
