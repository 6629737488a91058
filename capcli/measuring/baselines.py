"""Comparing with a baseline: a model on the same examples, or a stored result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from capcli import parallel
from capcli.config.measure import EvalConfig
from capcli.data.splits import TaskData
from capcli.errors import ConfigError, FileError
from capcli.measuring import chance, noise
from capcli.measuring.chance import Known, Scored
from capcli.measuring.noise import Estimate
from capcli.measuring.scoring import Measured, agreed, paired
from capcli.models import exits
from capcli.models.predictor import Predictor
from capcli.records.measured import Baseline, EvalResult, Perturbed, stored_scores
from capcli.records.parts import ExitUse, Noisy, Scores
from capcli.reporting.text import named
from capcli.runtime import choice


def same_place(a: str, b: str) -> bool:
    """Whether two names of data are the same, or lead to the same place."""
    return a == b or (bool(a and b) and Path(a).resolve() == Path(b).resolve())


def load_for(
    config: EvalConfig, source: str, data: TaskData, runtime: str = "", exit_threshold: float | None = None
) -> Predictor:
    """A model with a head for the task of the data, its labels renamed as the configuration says."""
    return choice.opened(
        source,
        runtime,
        config.hardware,
        labels=data.classes,
        kind=data.kind,
        seed=config.seed,
        label_map=config.source.label_names,
        base=config.base if source == config.model else "",
        exit_threshold=exit_threshold,
    )


def exits_used(model: Predictor) -> ExitUse | None:
    """After how many layers the texts that were measured were answered; None without exits. Common to all ranks."""
    found = model.exits
    if found is None:
        return None
    taken = found.taken.clone()
    parallel.total([taken])
    return ExitUse(
        threshold=found.threshold,
        layers=exits.mean_layers(taken),
        of=len(taken),
        macs=exits.mean_cost(taken, exits.costs(found.model)),
    )


def rows_of(estimates: Mapping[str, Estimate]) -> dict[str, Noisy]:
    """Estimates as rows of a result."""
    return {name: one.row() for name, one in estimates.items()}


TAKES = "--baseline takes a model, or a report of cap prune or cap eval"

# The baseline --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What the baseline gives: its row of the result, ours minus and ours by its metrics, how often both agree.

    scored: what is known of it on the first split. at_chance: of the metrics in which it is no better than guessing,
    what guessing scores.
    """

    baseline: Baseline | None = None
    differences: dict[str, Estimate] = field(default_factory=dict)
    ratios: dict[str, Estimate] = field(default_factory=dict)
    agreement: Estimate | None = None
    scored: Scored | None = None
    at_chance: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def with_model(
    config: EvalConfig, data: TaskData, ours: Mapping[str, Measured], theirs: Mapping[str, Measured]
) -> Compared:
    """Compare with a model on the same examples; both by change of the texts, "" for none."""
    differences: dict[str, Estimate] = {}
    ratios: dict[str, Estimate] = {}
    for change, one in ours.items():
        by_name = paired(one, theirs[change])
        differences |= {name + change: value for name, value in by_name[0].items()}
        ratios |= {name + change: value for name, value in by_name[1].items()}
    table = theirs[""].table
    row = Baseline(
        model=config.baseline,
        metrics=table.metrics,
        confidence_95=table.confidence_95,
        n_examples=table.n_examples,
        at_chance=table.at_chance,
        perturbed={change[1:]: one.table for change, one in theirs.items() if change},
    )
    return Compared(
        baseline=row,
        differences=differences,
        ratios=ratios,
        agreement=agreed(ours[""], theirs[""]),
        scored=theirs[""],
        at_chance=_at_chance(theirs),
    )


def _at_chance(theirs: Mapping[str, Scored]) -> dict[str, float]:
    """By change of the texts, the metrics in which a baseline is no better than guessing: what guessing scores."""
    return {name + change: one.chance[name] for change, one in theirs.items() for name in one.at_chance}


def with_report(config: EvalConfig, data: TaskData, ours: Mapping[str, Measured]) -> Compared:
    """Compare with a stored result of prune or eval about as many examples; changed texts with changed."""
    row = stored_baseline(config, data, ours[""].n_examples)
    row = replace(row, perturbed={name: one for name, one in row.perturbed.items() if f"@{name}" in ours})
    scored = {"": _scored(row, ours[""])}
    scored |= {f"@{name}": _scored(one, ours[f"@{name}"]) for name, one in row.perturbed.items()}
    theirs = _estimates(row)
    for change, scores in row.perturbed.items():
        theirs |= {f"{name}@{change}": one for name, one in _estimates(scores).items()}
    mine = {name + change: one for change, found in ours.items() for name, one in found.estimates().items()}
    both = [name for name in mine if name in theirs]
    exact = [name for name in both if theirs[name].at is None]
    note = f"{config.baseline} has no intervals for {', '.join(exact)}: the values are treated as exact"
    return Compared(
        baseline=replace(row, at_chance=tuple(scored[""].at_chance)),
        differences={name: noise.difference(mine[name], theirs[name]) for name in both},
        ratios={name: noise.ratio(mine[name], theirs[name]) for name in both if theirs[name].value > 0},
        scored=scored[""],
        at_chance=_at_chance(scored),
        notes=(note,) if exact else (),
    )


def _scored(theirs: Scores | Baseline, ours: Measured) -> Known:
    """What a stored result tells of the same examples, on which guessing scores the same."""
    found = chance.at_chance(theirs.metrics, theirs.confidence_95, ours.chance, ours.n_examples)
    return Known(metrics=theirs.metrics, chance=ours.chance, at_chance=found)


def stored_baseline(config: EvalConfig, data: TaskData, n_examples: int) -> Baseline:
    """The stored result as a baseline. Raises `FileError` or `ConfigError` when it is about something else."""
    path = config.baseline
    stored = stored_scores(path, TAKES)
    scores = _finite(stored)
    if not scores.metrics:
        raise FileError(f"{path} contains no metrics", TAKES)
    if stored.task not in (None, data.name):
        raise ConfigError(f"{path} is about task {stored.task}, not {data.name}")
    name, split = next(iter(data.evals.items()))
    ours = EvalResult(n_examples=n_examples, split=name, data=split.fingerprint, max_length=config.source.longest)
    known = [name for name in ("reference", "n_examples", "split", *noise.DATA) if getattr(stored, name) is not None]
    if what := noise.differing(stored, ours, known):
        raise ConfigError(
            f"{path} and {config.model} differ in {what}: {named(getattr(stored, what))} and {getattr(ours, what)}",
            "compare on the same examples, with the same --data, --max-length and --max-eval-samples",
        )
    perturbed = {change: _finite(one) for change, one in stored.perturbed.items()}
    return Baseline(
        model=path,
        metrics=scores.metrics,
        confidence_95=scores.confidence_95,
        perturbed={change: one for change, one in perturbed.items() if one.metrics},
    )


def _finite(stored: EvalResult | Perturbed) -> Scores:
    """The metrics of a stored result that are numbers, and the intervals of those that have one."""
    values = {name: value for name, value in stored.metrics.items() if math.isfinite(value)}
    ends = {name: one for name, one in stored.confidence_95.items() if all(map(math.isfinite, one))}
    return Scores(metrics=values, confidence_95={name: ends[name] for name in values if name in ends})


def _estimates(scores: Scores | Baseline) -> dict[str, Estimate]:
    return {name: noise.stored(value, scores.confidence_95.get(name)) for name, value in scores.metrics.items()}
