"""What several results have in common: scores, sizes, sparsity, latency, gates, files.

A number that was not finite is NaN in memory and null in a file; None is what is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from capcli.records.codec import ABSENT

LABELS = "labels"  # what metrics compare with, unless the answers of another model took their place
Interval = tuple[float, float]  # low and high
Values = Mapping[str, float]  # by name of the metric
Intervals = Mapping[str, Interval]


def interval(ends: Sequence[float] | None) -> Interval | None:
    """Low and high of an interval that may not be known."""
    return None if ends is None else (ends[0], ends[1])


def intervals(ends: Mapping[str, Sequence[float]]) -> Intervals:
    """The same of several, by name."""
    return {name: (one[0], one[1]) for name, one in ends.items()}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The metrics of a model on one split, by name.

    chance: what the best answer scores that is the same for all examples. at_chance: the metrics in which the model is
    no better than that, beyond the noise.
    """

    metrics: Values = field(default_factory=dict)
    confidence_95: Intervals = field(default_factory=dict)
    n_examples: int | None = field(default=None, metadata=ABSENT)
    chance: Values = field(default_factory=dict)
    at_chance: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Noisy:
    """A value or a difference, and its interval where that is known."""

    value: float | None = None
    confidence_95: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """What a model does with one label; `baseline_f1` of the dense model or baseline, where there is one."""

    label: str | None = None
    n_examples: int | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    baseline_f1: float | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How often `answer` was given where `label` is right, by the model and by the dense model or baseline."""

    label: str | None = None
    answer: str | None = None
    count: int | None = None
    baseline: int | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class ByLabel:
    """Scores by label in the order of the labels, and the most frequent confusions."""

    labels: tuple[LabelScore, ...] = ()
    confusions: tuple[Confusion, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SizePart:
    """What is stored of one part of a model: its weights, their bytes in 32 bits, and in the file."""

    part: str | None = None
    weights: int | None = None
    dense_bytes: int | None = None
    stored_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class MatrixSparsity:
    """One prunable matrix."""

    name: str | None = None
    shape: tuple[int, ...] = ()
    kept: int | None = None
    sparsity: float | None = None
    output_error: float | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Zeros of a pruned model, counted in its file; shares in [0, 1]. least_kept: by the matrix that keeps least."""

    requested: float | None = None
    achieved: float | None = None
    prunable_weights: int | None = None
    kept_weights: int | None = None
    encoder: float | None = None
    whole_model: float | None = None
    least_kept: float | None = field(default=None, metadata=ABSENT)
    per_matrix: tuple[MatrixSparsity, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What is left of a model from which whole units were removed, as shares: of its prunable weights, and of the
    multiply-adds of its layers in a text of `length` tokens. target: what was asked for, where it was no sparsity.
    speedup: how many times as fast by what was measured of smaller layers, where the target is a time."""

    target: str | None = None
    macs: float | None = None
    params: float | None = None
    length: int | None = None
    speedup: float | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class ModelSparsity:
    """Zeros of a model that was measured, as shares of the prunable weights and of all."""

    achieved: float | None = None
    whole_model: float | None = None


@dataclass(frozen=True, kw_only=True)
class ExitUse:
    """How far texts went in a model with exits: layers per text of how many, and their share of the layers'
    multiplications."""

    threshold: float | None = None
    layers: float | None = None
    of: int | None = None
    macs: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Bytes of a model that was measured; the last two of pruned models only."""

    dense_bytes: int | None = field(default=None, metadata=ABSENT)
    weights_bytes: int | None = field(default=None, metadata=ABSENT)
    artifact_bytes: int | None = field(default=None, metadata=ABSENT)
    codings: Mapping[str, int] | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What computed, and how texts were put together. chosen: which runtime was taken and why, if any was."""

    name: str | None = None
    described: str | None = None
    threads: int | None = None
    batching: str | None = None
    chosen: str = ""


@dataclass(frozen=True, kw_only=True)
class OwnLengths:
    """Milliseconds of evaluation texts that were asked one by one, as long as they are."""

    median_ms: float | None = None
    p95_ms: float | None = None
    texts: int | None = None
    median_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Evaluation texts per second, in batches."""

    texts_per_second: float | None = None
    batch: int | None = None
    texts: int | None = None


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds of a forward pass, and the conditions without which they mean nothing."""

    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    confidence_95: Interval | None = None
    batch: int | None = None
    length: int | None = None
    runtime: str | None = None
    threads: int | None = None
    processor: str | None = None
    device: str | None = None
    hardware: str | None = None
    precision: str | None = None
    own_lengths: OwnLengths | None = field(default=None, metadata=ABSENT)
    throughput: Throughput | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A condition and what was measured; without a value it fails."""

    name: str | None = None
    metric: str | None = None
    op: str | None = None
    limit: float | None = None
    value: float | None = None
    interval: Interval | None = None
    confidence: float | None = None
    passed: bool = False
    message: str | None = None


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """One file of a model."""

    bytes: int | None = None
    sha256: str | None = None
