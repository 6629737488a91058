"""The configuration of `cap eval` and `cap probe`, and of the gates that both have."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from capcli.config.hardware import TIMEOUT, TIMEOUT_MINUTES, Hardware
from capcli.config.names import (
    BUILTIN_TASKS,
    EMBEDDING_TASKS,
    MOST_RETENTION,
    PERTURBATIONS,
    PROBE_TASKS,
    PROBES,
    RUNTIMES,
    TASK_NAMES,
    nearest,
)
from capcli.config.options import (
    at_least,
    check_name,
    exists,
    meant,
    option,
    parse_drops,
    parse_limits,
    same_option,
    split_list,
)
from capcli.config.task import TaskConfig
from capcli.errors import ConfigError

OF_TASK = ("text_column", "pair_column", "label_column", "label_map", "max_length", "max_eval_samples")
"""Options of `TaskConfig` that `cap probe` has too, for all its tasks."""
RUNTIME = (
    "what computes: torch, sparse, onnx, or auto, which takes the faster of torch and sparse on this machine; "
    "without it onnx for an ONNX folder and torch for all others"
)


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What must hold for exit code 0."""

    min: str = option(
        "", "fail below METRIC=V, such as accuracy=0.8 or 80%; several separated by commas", panel="Gates"
    )
    max: str = option("", "fail above METRIC=V; several separated by commas", panel="Gates")
    max_drop: str = option(
        "",
        "fail when METRIC is more than V below the baseline (--baseline, in cap prune the dense model): METRIC=V, or "
        "METRIC=P% of the baseline's value",
        panel="Gates",
    )
    min_retention: float = option(
        0.0,
        "fail when the primary metric is below this share of that of the baseline, such as 0.98 or 98%",
        panel="Gates",
        unit="share",
    )
    max_bytes: int = option(
        0, "fail when the weight file is larger, in bytes or such as 5MB", panel="Gates", unit="bytes"
    )
    max_latency_ms: float = option(
        0.0, "fail when the median latency is higher, in milliseconds or such as 0.5s", panel="Gates", unit="ms"
    )
    confidence: float = option(
        0.0,
        "fail only when the whole interval at this confidence, such as 0.95, is beyond the limit; 0 to compare the "
        "value alone",
        panel="Gates",
        unit="share",
    )

    def __post_init__(self) -> None:
        parse_limits("--min", self.min)
        parse_limits("--max", self.max)
        parse_drops(self.max_drop)
        at_least(0, min_retention=self.min_retention, max_bytes=self.max_bytes, max_latency_ms=self.max_latency_ms)
        if self.min_retention > MOST_RETENTION:
            raise ConfigError(
                f"--min-retention {self.min_retention:g} can never pass: it is a share of the baseline's metric",
                meant(self.min_retention),
            )
        if self.confidence and not 0.5 <= self.confidence < 1:
            hint = meant(self.confidence) if 50 <= self.confidence < 100 else ""
            raise ConfigError(f"--confidence is a probability from 0.5 to below 1, got {self.confidence:g}", hint)

    def check_baseline(self, baseline: str) -> None:
        """Raise `ConfigError` when a gate compares with a baseline that is not given."""
        for flag, value in {"--max-drop": self.max_drop, "--min-retention": self.min_retention}.items():
            if value and not baseline:
                raise ConfigError(f"{flag} compares with a baseline, but none is given", "name one with --baseline")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One model measured on one task."""

    source: TaskConfig
    model: str = ""
    base: str = option(
        "",
        "for masks (--to mask): the base model, if it is not where the masks say",
        metavar="MODEL",
        expert=True,
    )
    baseline: str = option("", "model or report.json to compare with")
    latency_batch: int = option(1, "batch size of the latency measurement")
    latency_length: int = option(128, "tokens per input of the latency measurement")
    perturb: str = option("", f"also measure on changed texts: all, or some of {','.join(PERTURBATIONS)}; see the docs")
    exit_threshold: str = option(
        "",
        "for a model with exits: answer at the first layer whose uncertainty is below this, from 0 (all layers) to 1; "
        "by default the stored threshold",
        metavar="FLOAT",
    )
    seed: int = option(1, "seed of the bootstrap intervals and of the changed texts")
    runtime: str = option("", RUNTIME, panel="Hardware")
    timeout: float = option(TIMEOUT_MINUTES, TIMEOUT, panel="Hardware", expert=True)
    gates: Gates = field(default_factory=Gates)
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        at_least(1, latency_batch=self.latency_batch, latency_length=self.latency_length)
        at_least(0.1, timeout=self.timeout)
        at_least(0, seed=self.seed)
        self.gates.check_baseline(self.baseline)
        _check_baselines([self.baseline])
        check_runtime(self.runtime)
        if self.exit_threshold and self.exits_below is None:
            raise ConfigError(
                f"--exit-threshold is a number from 0 to 1, got {self.exit_threshold!r}",
                "leave it out for the threshold that is stored",
            )
        _check_texts(self.source, self.baseline)
        for name in self.perturbations:
            check_name("perturbation", name, PERTURBATIONS)

    @property
    def perturbations(self) -> tuple[str, ...]:
        """The perturbations in the order given, each once."""
        return PERTURBATIONS if self.perturb == "all" else split_list(self.perturb)

    @property
    def exits_below(self) -> float | None:
        """The threshold of exits, None where none is given."""
        try:
            found = float(self.exit_threshold)
        except ValueError:
            return None
        return found if 0 <= found <= 1 else None


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What a frozen encoder knows about tasks it was not pruned for."""

    model: str = ""
    tasks: str = option(",".join(PROBE_TASKS), "tasks to probe, separated by commas")
    data: str = option(
        "", "data of a single task, or a folder with a subfolder of splits for each task that is not built in"
    )
    text_column: str = same_option(TaskConfig, "text_column")
    pair_column: str = same_option(TaskConfig, "pair_column")
    label_column: str = same_option(TaskConfig, "label_column")
    label_map: str = same_option(TaskConfig, "label_map")
    baseline: str = option("", "models or results of cap probe to compare with; gates use the first")
    probe: str = option(
        "linear", "kind of probe: linear (logistic or ridge regression), or head (trained by gradient descent)"
    )
    layer: str = option("last", "layer to take vectors from: last, N (0 for the embeddings), or all")
    pooling: str = option("mean", "sentence vector: head (what enters the classifier), cls, mean", flag="--pool")
    max_length: int = option(0, "longest input in tokens; 0 for 128, for 384 in question answering")
    max_train_samples: int = option(2000, "use at most this many training examples, 0 for all")
    max_eval_samples: int = option(1000, "test each probe on at most this many examples, 0 for all")
    seeds: int = option(3, "probes per task, each trained on another random four fifths of the training examples")
    seed: int = option(1, "random seed")
    runtime: str = option("", RUNTIME, panel="Hardware")
    timeout: float = option(TIMEOUT_MINUTES, TIMEOUT, panel="Hardware", expert=True)
    gates: Gates = field(default_factory=Gates)
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        at_least(0.1, timeout=self.timeout)
        for name in self.task_names:
            check_name("task", name, TASK_NAMES)
            if name in EMBEDDING_TASKS:
                raise ConfigError(f"{name} has no labels that a probe could learn", "name other tasks, such as mr,subj")
        if not self.task_names:
            raise ConfigError("no task given", nearest("", TASK_NAMES))
        check_name("probe", self.probe, PROBES)
        check_name("pooling", self.pooling, ("head", "cls", "mean"))
        if self.layer not in ("last", "all") and not (self.layer.isascii() and self.layer.isdigit()):
            raise ConfigError(f"--layer is last, all or a number, got {self.layer!r}")
        if self.pooling == "head" and self.layer != "last":
            raise ConfigError(
                "--pool head is the vector that enters the classifier, which exists only after the last layer"
            )
        at_least(0, max_train_samples=self.max_train_samples, max_eval_samples=self.max_eval_samples, seed=self.seed)
        at_least(1, seeds=self.seeds)
        self.gates.check_baseline(self.baseline)
        _check_baselines(self.baselines)
        check_runtime(self.runtime)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks in the order given, each once."""
        return split_list(self.tasks)

    @property
    def baselines(self) -> tuple[str, ...]:
        """The models to compare with, in the order given, each once; a path that is there may hold a comma."""
        return (self.baseline,) if exists(self.baseline) else split_list(self.baseline)

    def source(self, task: str) -> TaskConfig:
        """Where the examples of one of the tasks are. Raises `ConfigError`."""
        folder = Path(self.data, task) if self.data else None
        self._check_data()
        if folder and not folder.exists():  # the data of the only task, or of others than this built-in one
            alone = len(self.task_names) == 1
            folder = Path(self.data) if alone else None if task in BUILTIN_TASKS else folder
        return TaskConfig(
            task=task,
            data=str(folder or ""),
            **{name: getattr(self, name) for name in OF_TASK},
        )

    def _check_data(self) -> None:
        """Raise `ConfigError` for data that none of several tasks would read."""
        if not self.data or len(self.task_names) == 1:
            return
        wanted = ", ".join(str(Path(self.data, name)) for name in self.task_names)
        if not Path(self.data).is_dir():
            raise ConfigError(
                f"--data {self.data} is not a folder, but there are several tasks", f"looked for {wanted}"
            )
        if not any(Path(self.data, name).is_dir() for name in self.task_names):
            raise ConfigError(f"--data {self.data} has no subfolder for any of the tasks", f"looked for {wanted}")


def _check_texts(source: TaskConfig, baseline: str) -> None:
    """Raise `ConfigError` for texts without labels that do not say what to compare with."""
    if source.text and source.data:
        raise ConfigError(
            "--data has labels to be compared with, and --unlabelled the answers of --baseline", "leave one of them out"
        )
    if source.text and not baseline:
        raise ConfigError(
            f"{source.text} has no labels, and there is no model to agree with",
            "name one with --baseline, or labelled examples with --data",
        )


def check_runtime(name: str) -> None:
    """Raise `ConfigError` for a name of no runtime; none is right."""
    if name:
        check_name("runtime", name, RUNTIMES)


def _check_baselines(names: Iterable[str]) -> None:
    """Raise `ConfigError` for a name that can only be a file's or folder's, and nothing is there."""
    for name in names:
        is_file = difflib.get_close_matches(Path(name).suffix.lower(), [".json"], cutoff=0.7)
        if (is_file or name.startswith(("/", "./", "../"))) and not exists(name):
            raise ConfigError(f"--baseline {name}: no such file", "name a model, or a file written from --json")
