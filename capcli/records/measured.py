"""The results of `cap eval` and `cap probe`, and of `--compare` of some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capcli.config.options import exists
from capcli.errors import FileError
from capcli.records.codec import ABSENT, EMPTY, Versioned, from_json
from capcli.records.parts import (
    LABELS,
    ByLabel,
    ExitUse,
    Gate,
    Interval,
    Intervals,
    Latency,
    ModelSize,
    ModelSparsity,
    Noisy,
    Runtime,
    Scores,
    Values,
)
from capcli.records.pruned import Report
from capcli.stored import part, read_json

# cap eval ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Perturbed:
    """A model on changed texts, compared with itself on the same texts as they are."""

    metrics: Values = field(default_factory=dict)
    confidence_95: Intervals = field(default_factory=dict)
    differences: Mapping[str, Noisy] = field(default_factory=dict)
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What an evaluation was compared with; `n_examples` of a model, not of a stored result.

    at_chance: the metrics in which it is no better than guessing, of which there is no retention.
    """

    model: str | None = None
    metrics: Values = field(default_factory=dict)
    confidence_95: Intervals = field(default_factory=dict)
    n_examples: int | None = field(default=None, metadata=ABSENT)
    at_chance: tuple[str, ...] = ()
    perturbed: Mapping[str, Scores] = field(default_factory=dict)
    latency: Latency | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class EvalResult(Versioned):
    """The result of `cap eval`."""

    model: str | None = None
    task: str | None = None
    split: str | None = None
    reference: str = LABELS
    primary: str | None = None
    labels: tuple[str, ...] = ()
    data: str | None = None
    max_length: int | None = None
    metrics: Values = field(default_factory=dict)
    confidence_95: Intervals = field(default_factory=dict)
    n_examples: int | None = None
    chance: Values = field(default_factory=dict)
    at_chance: tuple[str, ...] = ()
    splits: Mapping[str, Scores] = field(default_factory=dict)
    by_label: ByLabel | None = field(default=None, metadata=ABSENT)
    perturbed: Mapping[str, Perturbed] = field(default_factory=dict)
    seed: int | None = None
    runtime: Runtime | None = field(default=None, metadata=ABSENT)
    exits: ExitUse | None = field(default=None, metadata=ABSENT)
    sparsity: ModelSparsity | None = None
    size: ModelSize = field(default_factory=ModelSize)
    notes: tuple[str, ...] = ()
    latency: Latency | None = field(default=None, metadata=EMPTY)
    baseline: Baseline | None = None
    retention: Values = field(default_factory=dict)
    differences: Mapping[str, Noisy] = field(default_factory=dict)
    agreement: float | None = None
    gates: tuple[Gate, ...] = ()
    passed: bool = True


def stored_scores(path: str, hint: str) -> EvalResult:
    """The scores in a report of `cap prune` or a result of `cap eval`. Raises `FileError` with `hint`."""
    data = read_json(Path(path))
    if "pruned" not in part(data, "metrics"):
        return from_json(EvalResult, data, path, hint)
    report = from_json(Report, data, path, hint)
    return EvalResult(
        model=report.model,
        task=report.task,
        split=report.metrics.split,
        reference=report.metrics.reference,
        metrics=report.metrics.pruned,
        confidence_95=report.metrics.confidence_95,
        n_examples=report.metrics.n_examples,
        chance=report.metrics.chance,
        at_chance=report.metrics.at_chance.pruned,
    )


# cap probe -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LayerScore:
    """The probes on the vectors of one layer; 0 are the embeddings."""

    layer: int | None = None
    mean: float | None = None
    deviation: float | None = None
    confidence_95: Interval | None = None
    values: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The probes of one task: what they were trained and tested on, their mean over the seeds and its noise.

    chance: what the best answer scores that is the same for all examples; at_chance: whether the mean is no better than
    that, beyond the noise.
    """

    metric: str | None = None
    probe: str | None = field(default=None, metadata=ABSENT)
    vector: str | None = field(default=None, metadata=ABSENT)
    split: str | None = None
    data: str | None = field(default=None, metadata=ABSENT)
    max_length: int | None = field(default=None, metadata=ABSENT)
    n_train: int | None = None
    n_examples: int | None = None
    n_classes: int | None = None
    mean: float | None = None
    deviation: float | None = None
    confidence_95: Interval | None = None
    values: tuple[float, ...] = ()
    chance: float | None = None
    at_chance: bool | None = None
    layers: tuple[LayerScore, ...] | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class ProbeBaseline:
    """A model that was probed in the same way; differences are those of the result's model from it."""

    model: str | None = None
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    mean: Noisy | None = None
    differences: Mapping[str, Noisy] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ProbeResult(Versioned):
    """The result of `cap probe`; `chance` is the mean over the tasks of what guessing scores."""

    model: str | None = None
    sha256: str | None = None
    runtime: str | None = field(default=None, metadata=ABSENT)
    probe: str | None = None
    layer: str | None = None
    pooling: str | None = None
    seeds: int | None = None
    seed: int | None = None
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    mean: Noisy | None = None
    chance: float | None = None
    baselines: tuple[ProbeBaseline, ...] = ()
    size: ModelSize = field(default_factory=ModelSize)
    latency: Latency | None = field(default=None, metadata=EMPTY)
    notes: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    passed: bool = True


# --compare -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A value in two results; `moved`: whether 0 is outside the interval of the change, None if nobody knows."""

    name: str | None = None
    old: float | None = None
    new: float | None = None
    old_confidence_95: Interval | None = None
    new_confidence_95: Interval | None = None
    change: float | None = None
    interval: Interval | None = None
    moved: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What is counted, not estimated, in two results."""

    name: str | None = None
    old: float | None = None
    new: float | None = None
    change: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison(Versioned):
    """The result of `--compare`; `kind` is that of the two results, task, split and examples those of `eval`."""

    kind: str | None = None
    old: str | None = None
    new: str | None = None
    task: str | None = field(default=None, metadata=ABSENT)
    split: str | None = field(default=None, metadata=ABSENT)
    n_examples: int | None = field(default=None, metadata=ABSENT)
    rows: tuple[Moved, ...] = ()
    sizes: tuple[Counted, ...] = ()
    latency: tuple[Moved, ...] = ()
    notes: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    passed: bool = True


@dataclass(frozen=True, kw_only=True)
class Comparisons(Versioned):
    """The result of `--compare` of more than two: each of the others with the first, the `baseline`."""

    kind: str | None = None
    baseline: str | None = None
    task: str | None = field(default=None, metadata=ABSENT)
    split: str | None = field(default=None, metadata=ABSENT)
    n_examples: int | None = field(default=None, metadata=ABSENT)
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    passed: bool = True


Result = EvalResult | ProbeResult | Comparison | Comparisons


def of_run(report: Report) -> EvalResult:
    """What a run says of its pruned model, in the words of an evaluation."""
    sparsity, size = report.sparsity, report.size
    return EvalResult(
        model=report.model,
        task=report.task,
        split=report.metrics.split,
        primary=report.metrics.primary,
        labels=report.labels,
        metrics=report.metrics.pruned,
        confidence_95=report.metrics.confidence_95,
        n_examples=report.metrics.n_examples,
        splits={
            name: Scores(metrics=one.pruned, confidence_95=one.confidence_95, n_examples=one.n_examples)
            for name, one in report.metrics.splits.items()
        },
        sparsity=ModelSparsity(achieved=sparsity.achieved, whole_model=sparsity.whole_model),
        size=ModelSize(
            dense_bytes=size.dense_bytes, weights_bytes=size.weights_bytes, artifact_bytes=size.artifact_bytes
        ),
        latency=report.latency.pruned if report.latency else None,
    )


def result_of(command: str, path: str) -> Any:
    """The `EvalResult` or `ProbeResult` in a file, whichever `command` writes; of a run of `cap prune`, that is of a
    folder or its report, what it measured itself. Raises `FileError`."""
    place = Path(path)
    if not exists(path):
        raise FileError(
            f"{path} does not exist", "--compare measures nothing: it takes stored results, and folders of runs"
        )
    data = read_json(place / "report.json" if place.is_dir() else place)
    if command == "eval" and isinstance(part(data, "metrics").get("pruned"), dict) and part(data, "config"):
        return of_run(from_json(Report, data, path, "run it again"))
    of_eval = part(data, "metrics") and isinstance(data.get("confidence_95"), dict)
    kind = "probe" if part(data, "tasks") else "eval" if of_eval else ""
    if not kind:
        raise FileError(
            f"{path} contains no result of cap {command}", f"--compare takes files written by cap {command} --json"
        )
    if kind != command:
        raise FileError(f"{path} is a result of cap {kind}, not of cap {command}", f"use cap {kind} --compare")
    return from_json(EvalResult if kind == "eval" else ProbeResult, data, path, "measure it again")
