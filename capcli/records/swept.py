"""`sweep.json`: the runs of a sweep, and what each of its configurations is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from capcli.records.codec import ABSENT, Versioned
from capcli.records.parts import LABELS, Gate, Values


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A figure over the seeds: its mean, and the standard deviation of a sample, which one seed does not have."""

    mean: float | None = None
    deviation: float | None = None


Spreads = Mapping[str, Spread]


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """One run: its folder inside that of the sweep and its figures; of a failed one, why.

    status: complete, failed, or waiting. passed: whether it keeps to the gates by itself; None without gates. held_out:
    the metric of its best epoch on examples that were held out for it.
    """

    folder: str = ""
    seed: int | None = None
    status: str = "waiting"
    metrics: Values = field(default_factory=dict)
    dense: Values = field(default_factory=dict)
    held_out: float | None = field(default=None, metadata=ABSENT)
    weights_bytes: int | None = None
    artifact_bytes: int | None = None
    latency_ms: float | None = None
    minutes: float | None = None
    passed: bool | None = field(default=None, metadata=ABSENT)
    best: bool = False
    error: str | None = field(default=None, metadata=ABSENT)
    hint: str | None = field(default=None, metadata=ABSENT)
    exit_code: int | None = field(default=None, metadata=ABSENT)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """The runs that differ in nothing but the seed, and their figures.

    sparsity is that which was asked for. gates: held against the means. passed: all runs are complete, the means keep
    to the gates, and so does one of the runs by itself; None without gates.
    """

    method: str | None = None
    sparsity: float | None = None
    metrics: Spreads = field(default_factory=dict)
    dense: Spreads = field(default_factory=dict)
    weights_bytes: Spread = field(default_factory=Spread)
    artifact_bytes: Spread = field(default_factory=Spread)
    latency_ms: Spread = field(default_factory=Spread)
    minutes: Spread = field(default_factory=Spread)
    gates: tuple[Gate, ...] = ()
    passed: bool | None = field(default=None, metadata=ABSENT)
    best: bool = False
    runs: tuple[SweptRun, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sweep(Versioned):
    """The result of a sweep. status: complete, or incomplete as long as a run is waiting or has failed.

    config: the options in which all runs agree. best: the folder of the run that is linked, if any will do. passed:
    whether one will do, or no gate was set.
    """

    status: str = "incomplete"
    model: str | None = None
    task: str | None = None
    split: str | None = None
    reference: str = LABELS
    primary: str | None = None
    n_examples: int | None = None
    seeds: tuple[int, ...] = ()
    command: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    configurations: tuple[Configuration, ...] = ()
    best: str | None = None
    notes: tuple[str, ...] = ()
    passed: bool = True
