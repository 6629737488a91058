"""`report.json`, and what `cap prune --plan` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from capcli.records.codec import ABSENT, Versioned
from capcli.records.parts import (
    LABELS,
    ByLabel,
    FileFacts,
    Gate,
    Intervals,
    Latency,
    Noisy,
    Reached,
    SizePart,
    Sparsity,
    Values,
)


@dataclass(frozen=True, kw_only=True)
class AtChance:
    """In which metrics each of the two models is no better than guessing, beyond the noise."""

    dense: tuple[str, ...] = ()
    pruned: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SplitMetrics:
    """Metrics of one split before and after; `chance` is what the best answer scores that is the same for all, and
    `differences` are pruned minus dense on the same examples."""

    dense: Values = field(default_factory=dict)
    pruned: Values = field(default_factory=dict)
    chance: Values = field(default_factory=dict)
    at_chance: AtChance = field(default_factory=AtChance)
    retention: Values = field(default_factory=dict)
    n_examples: int | None = None
    confidence_95: Intervals = field(default_factory=dict)
    differences: Mapping[str, Noisy] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of the first split, and of each.

    reference: what they compare with, labels; or teacher, whose answers took the place of labels: then they say how far
    the pruned model agrees with it, not how often it is right.
    """

    reference: str = LABELS
    primary: str | None = None
    split: str | None = None
    dense: Values = field(default_factory=dict)
    pruned: Values = field(default_factory=dict)
    chance: Values = field(default_factory=dict)
    at_chance: AtChance = field(default_factory=AtChance)
    retention: Values = field(default_factory=dict)
    n_examples: int | None = None
    confidence_95: Intervals = field(default_factory=dict)
    differences: Mapping[str, Noisy] = field(default_factory=dict)
    splits: Mapping[str, SplitMetrics] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes of the dense model in 32 bits and of the file that it came in, of the pruned model, and the bound."""

    dense_bytes: int | None = None
    given_bytes: int | None = None
    artifact_bytes: int | None = None
    weights_bytes: int | None = None
    bound_bytes: int | None = None
    codings: Mapping[str, int] = field(default_factory=dict)
    parts: tuple[SizePart, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExportSize:
    """What a form of the model would take: options of `cap export`, and the bytes of its weight file."""

    options: str | None = None
    weights_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Latency of the dense and of the pruned model, measured in turn."""

    dense: Latency = field(default_factory=Latency)
    pruned: Latency = field(default_factory=Latency)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What was expected before the first step, from sizes and a few timed steps."""

    weights_bytes: int | None = None
    memory_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of the phases."""

    teacher_seconds: float | None = None
    banks_seconds: float | None = None
    prune_seconds: float | None = None
    total_seconds: float | None = None
    examples_per_second: float | None = None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The most memory that the process took; and where that ran out, or was to be saved, how many examples went through
    the network at once in a step, and how many tokens, padding included, in an evaluation."""

    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    micro_batch: int | None = field(default=None, metadata=ABSENT)
    evaluation_tokens: int | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class Process:
    """One of the processes that made the run together, and the most memory that it took."""

    host: str
    device: str
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Where the teacher is from, and how good it is."""

    source: str | None = None
    metrics: Values = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HistoryRow:
    """Means over the steps since the last row."""

    phase: str | None = None
    step: int | None = None
    epoch: float | None = None
    sparsity: float | None = None
    losses: Values = field(default_factory=dict)
    metrics: Values = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CurveExamples:
    """On what the metrics of the history were measured."""

    n_examples: int | None = None
    held_out: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Report(Versioned):
    """The result of `cap prune`; docs/reference/report.md says what each field means.

    gates, passed: in what is printed, where gates were given; the file is about the run alone.
    """

    status: str | None = None
    model: str | None = None
    task: str | None = None
    method: str | None = None
    structure: str | None = None
    losses: tuple[str, ...] = ()
    loss_weights: Values = field(default_factory=dict)
    seed: int | None = None
    command: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    labels: tuple[str, ...] = ()
    metrics: Metrics = field(default_factory=Metrics)
    by_label: ByLabel | None = field(default=None, metadata=ABSENT)
    teacher: Teacher = field(default_factory=Teacher)
    timing: Timing = field(default_factory=Timing)
    memory: Memory = field(default_factory=Memory)
    processes: tuple[Process, ...] | None = field(default=None, metadata=ABSENT)
    history: tuple[HistoryRow, ...] = ()
    curve: CurveExamples = field(default_factory=CurveExamples)
    notes: tuple[str, ...] = ()
    sparsity: Sparsity = field(default_factory=Sparsity)
    reached: Reached | None = field(default=None, metadata=ABSENT)
    size: Size = field(default_factory=Size)
    exports: tuple[ExportSize, ...] = ()
    planned: Planned = field(default_factory=Planned)
    latency: Latencies | None = field(default=None, metadata=ABSENT)
    base_model: str | None = None
    gates: tuple[Gate, ...] | None = field(default=None, metadata=ABSENT)
    passed: bool | None = field(default=None, metadata=ABSENT)
    files: Mapping[str, FileFacts] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PrunePlan(Versioned):
    """What a run would take."""

    model: str
    task: str
    method: str
    prunable_weights: int
    kept_weights: int
    sparsity: float
    artifact_bytes: int
    work_bytes: int
    memory_bytes: int
    minutes: float
