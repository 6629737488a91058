"""`export.json`, and what `cap export --plan` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from capcli.records.codec import ABSENT, EMPTY, Versioned
from capcli.records.parts import LABELS, FileFacts, Gate, Intervals, Latency, Sparsity, Values
from capcli.records.pruned import Metrics, Report, Teacher


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What an export keeps of the report of the run; None is what was not known of it."""

    model: str | None = field(default=None, metadata=ABSENT)
    base_model: str | None = None
    task: str | None = field(default=None, metadata=ABSENT)
    method: str | None = field(default=None, metadata=ABSENT)
    losses: tuple[str, ...] | None = field(default=None, metadata=ABSENT)
    seed: int | None = field(default=None, metadata=ABSENT)
    command: str | None = field(default=None, metadata=ABSENT)
    versions: Mapping[str, str] | None = field(default=None, metadata=ABSENT)
    device: str | None = field(default=None, metadata=ABSENT)
    labels: tuple[str, ...] | None = field(default=None, metadata=ABSENT)
    teacher: Teacher | None = field(default=None, metadata=ABSENT)
    sparsity: Sparsity | None = field(default=None, metadata=ABSENT)
    metrics: Metrics | None = field(default=None, metadata=ABSENT)
    notes: tuple[str, ...] | None = field(default=None, metadata=ABSENT)

    def report(self) -> Report:
        """As much of the report as is known."""
        known = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(Report(), **{name: value for name, value in known.items() if value is not None})


def facts_of(report: Report) -> RunFacts:
    """What an export keeps of a report."""
    return RunFacts(**{one.name: getattr(report, one.name) for one in fields(RunFacts)})


@dataclass(frozen=True, kw_only=True)
class BeforeAfter:
    """A number of the model as it was loaded, and of what was written."""

    before: float | None = None
    after: float | None = None


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """How many tokens were kept, and what that does to a held-out split."""

    kept: int | None = None
    of: int | None = None
    split: str | None = None
    texts: int | None = None
    same_texts: int | None = None
    tokens_per_text: BeforeAfter = field(default_factory=BeforeAfter)
    unknown_rate: BeforeAfter = field(default_factory=BeforeAfter)


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """The size of a sliced layer."""

    heads: int | None = None
    head_size: int | None = None
    neurons: int | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """The comparison of logits with those of the model as it was loaded."""

    texts: int | None = None
    of: str | None = None
    exact: bool | None = None
    largest_difference: float | None = None
    largest_logit: float | None = None
    tolerance: float | None = None
    argmax_agreement: float | None = None
    nonzero_weights: BeforeAfter = field(default_factory=BeforeAfter)


@dataclass(frozen=True, kw_only=True)
class ExportSize:
    """Bytes of the model in 32 bits, of the export on disk and in memory."""

    dense_bytes: int | None = None
    weights_bytes: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class ExportMetrics:
    """Metrics before and after, on the same examples; `at_chance` are those in which the export only guesses.

    reference: what they compare with, labels; or model, the one that was exported, whose answers took their place.
    """

    reference: str = LABELS
    split: str | None = None
    primary: str | None = None
    before: Values = field(default_factory=dict)
    n_examples: int | None = None
    confidence_95: Intervals = field(default_factory=dict)
    after: Values = field(default_factory=dict)
    chance: Values = field(default_factory=dict)
    at_chance: tuple[str, ...] = ()
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Median milliseconds, measured in turn, and the median of their ratios."""

    before_ms: float | None = None
    ms: float | None = None
    times: float | None = None
    runs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How much faster by batch size, and under which conditions."""

    batch_1: Timed = field(default_factory=Timed)
    batch_32: Timed = field(default_factory=Timed)
    length: int | None = None
    threads: int | None = None
    hardware: str | None = None

    @property
    def batches(self) -> dict[str, Timed]:
        """By name of the field."""
        return {"batch_1": self.batch_1, "batch_32": self.batch_32}


@dataclass(frozen=True, kw_only=True)
class ExitRow:
    """What a threshold gives: the metric on the evaluation split with the layers per text there and their share of the
    multiplications, and the accuracy on the held-out part."""

    threshold: float | None = None
    value: float | None = None
    layers: float | None = None
    macs: float | None = None
    held_out: float | None = None


@dataclass(frozen=True, kw_only=True)
class ExitTable:
    """Exits: of how many layers, trained and chosen on how many examples, by what limit; and what thresholds give.

    seen: whether the held-out part is of the examples that the encoder itself may have been trained on.
    """

    threshold: float | None = None
    drop: float | None = None
    layers: int | None = None
    train: int | None = None
    held_out: int | None = None
    seen: bool | None = None
    split: str | None = None
    metric: str | None = None
    rows: tuple[ExitRow, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FactorRow:
    """A matrix [O, I], the rank of the factors in its place (None: it stayed whole), and the share of the variance of
    its outputs that is lost (None: no texts were read)."""

    name: str | None = None
    shape: tuple[int, ...] = ()
    rank: int | None = None
    lost: float | None = None


@dataclass(frozen=True, kw_only=True)
class FactorTable:
    """Factors in place of matrices: the `ratio` that was asked for, and the share of the weights of the dense matrices
    that is `left`; training texts that they were fitted on, and epochs in which they were healed."""

    ratio: float | None = None
    left: float | None = None
    texts: int | None = None
    healed: int | None = None
    matrices: tuple[FactorRow, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Gives:
    """By what factors the export is smaller, lighter, faster; `faster` by batch, None where nothing can be."""

    smaller_file: float | None = None
    less_memory: float | None = None
    faster: Values | None = None


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What was measured on an export that was opened again."""

    check: Check = field(default_factory=Check)
    size: ExportSize = field(default_factory=ExportSize)
    metrics: ExportMetrics | None = None
    speed: Speed | None = None
    runtime: str | None = None
    batching: str | None = None
    notes: tuple[str, ...] = ()
    gives: Gives = field(default_factory=Gives)
    exits: ExitTable | None = field(default=None, metadata=ABSENT)
    factors: FactorTable | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A way to ship a model: format, treatment of the weights, the runtime that computes it, and the command for it.

    refused: why it is not possible, or what went wrong. estimated: the bytes are not exact, as nothing was written.
    gates: the limits that were held against it, cheapest first, up to the first that it did not keep to. passed:
    whether it is what was chosen; None in a plan.
    """

    name: str | None = None
    format: str | None = None
    runtime: str | None = None
    command: str | None = None
    refused: str | None = field(default=None, metadata=ABSENT)
    exact: bool | None = field(default=None, metadata=ABSENT)
    estimated: bool | None = field(default=None, metadata=ABSENT)
    weights_bytes: int | None = field(default=None, metadata=ABSENT)
    memory_bytes: int | None = field(default=None, metadata=ABSENT)
    matrices_left: float | None = field(default=None, metadata=ABSENT)
    latency: Latency | None = field(default=None, metadata=ABSENT)
    metrics: Values | None = field(default=None, metadata=ABSENT)
    gates: tuple[Gate, ...] = ()
    passed: bool | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class Ladder(Versioned):
    """What was tried to keep to limits, in order; before: metrics of the model as loaded, if a drop is limited."""

    model: str | None = None
    fit: int | None = field(default=None, metadata=ABSENT)
    max_latency_ms: float | None = field(default=None, metadata=ABSENT)
    max_drop: str | None = field(default=None, metadata=ABSENT)
    before: Values | None = field(default=None, metadata=ABSENT)
    rungs: tuple[Rung, ...] = ()
    passed: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportRecord(Versioned):
    """`export.json`: what was exported and how, what was measured on it, its files."""

    model: str | None = None
    format: str | None = None
    out: str | None = None
    command: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    dtype: str | None = None
    embeddings: str | None = None
    int8: bool | None = None
    vocab: str | None = None
    threshold: str | None = None
    vocabulary: Vocabulary | None = None
    settings: Mapping[str, Any] | None = field(default=None, metadata=ABSENT)
    layers: Mapping[str, LayerSize] | None = None
    run: RunFacts | None = field(default=None, metadata=EMPTY)
    check: Check = field(default_factory=Check)
    size: ExportSize = field(default_factory=ExportSize)
    metrics: ExportMetrics | None = None
    speed: Speed | None = None
    runtime: str | None = None
    batching: str | None = None
    notes: tuple[str, ...] = ()
    gives: Gives = field(default_factory=Gives)
    exits: ExitTable | None = field(default=None, metadata=ABSENT)
    factors: FactorTable | None = field(default=None, metadata=ABSENT)
    ladder: Ladder | None = field(default=None, metadata=ABSENT)
    files: Mapping[str, FileFacts] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExportPlan(Versioned):
    """What every way to ship the model would take."""

    model: str
    dense_bytes: int
    rungs: tuple[Rung, ...]
    notes: tuple[str, ...]
