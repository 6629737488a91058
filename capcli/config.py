"""What a user can choose: valid names, defaults, presets, validation. Imports neither torch nor transformers.

Each option is one dataclass field: its default and its help text stand here once. The command line, the TOML file,
the docs and the stored configuration of a run are all derived from these fields.

Order of precedence, later wins: field default, preset, preset for the method, file, command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import math
import os
import re
import shlex
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from capcli import files
from capcli.errors import ConfigError, FileError

ALIASES = {
    "bert-base": "google-bert/bert-base-uncased",
    "bert-base-cased": "google-bert/bert-base-cased",
    "bert-large": "google-bert/bert-large-uncased",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "xlm-roberta-base": "FacebookAI/xlm-roberta-base",
    "distilbert-base": "distilbert/distilbert-base-uncased",
    "electra-small": "google/electra-small-discriminator",
    "electra-base": "google/electra-base-discriminator",
    "deberta-v3-base": "microsoft/deberta-v3-base",
    "deberta-v3-small": "microsoft/deberta-v3-small",
    "albert-base": "albert/albert-base-v2",
    "mpnet-base": "microsoft/mpnet-base",
    "modernbert-base": "answerdotai/ModernBERT-base",
    "minilm": "nreimers/MiniLM-L6-H384-uncased",
}
BUILTIN_MODEL = "mini"
CONFIG_FILE = "cap.toml"  # read by eval and probe where they are run
MAX_TOML_BYTES, MAX_TOML_DOTS = 64_000, 2000  # the time for a key such as a.a.a grows with its square
TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,}")
BUILTIN_TASKS = ("banking77", "mr", "subj", "wnut17")
PROBE_TASKS = ("banking77", "mr", "subj")  # the built-in ones about whole sentences
GLUE_TASKS = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
SQUAD_TASKS = ("squad", "squad_v2")
GENERIC_TASKS = (
    "text-classification",
    "text-pair-classification",
    "multi-label-classification",
    "regression",
    "token-classification",
    "ner",
    "question-answering",
)
QUESTION_TASKS = (*SQUAD_TASKS, "question-answering")
TASK_NAMES = (*BUILTIN_TASKS, *GLUE_TASKS, *SQUAD_TASKS, *GENERIC_TASKS)
LOSSES = ("ce", "kd", "prc", "snc", "fic", "hid")
STRUCTURES = ("heads", "dimensions")
PERTURBATIONS = ("typos", "case", "order")
PROBES = ("linear", "head")
EXPORT_FORMATS = ("dense", "sparse", "sliced", "onnx")
ARTEFACT_FORMATS = ("sparse", "sliced")  # in our own file format, which can store weights in other ways
DEVICES = ("auto", "cpu", "cuda", "mps")
MOST = 2**63 - 1  # the largest whole number of every library and of TOML
MOST_RETENTION = 2.0  # twice the metric of a baseline; who asks for more means per cent
NUMERIC_GATES = ("min_retention", "max_bytes", "max_latency_ms")  # of which 0 is the default, and no gate


@dataclass(frozen=True, kw_only=True)
class Method:
    """A pruning method: a criterion that says what a weight is worth, and the losses it is trained with.

    structured: whole units are removed (`STRUCTURES`), not single weights.
    """

    criterion: str
    losses: tuple[str, ...]
    structured: bool = False


_CAP, _PLAIN = ("ce", "kd", "prc", "snc", "fic"), ("ce", "kd")
METHODS = {
    "cap-soft": Method(criterion="soft-movement", losses=_CAP),
    "cap-m": Method(criterion="movement", losses=_CAP),
    "cap-f": Method(criterion="first-order", losses=_CAP, structured=True),
    "soft-movement": Method(criterion="soft-movement", losses=_PLAIN),
    "movement": Method(criterion="movement", losses=_PLAIN),
    "first-order": Method(criterion="first-order", losses=_PLAIN, structured=True),
    "magnitude": Method(criterion="magnitude", losses=_PLAIN),
    "cap-pins": Method(criterion="pins", losses=_CAP),
    "pins": Method(criterion="pins", losses=_PLAIN),
    "platon": Method(criterion="platon", losses=_PLAIN),
}

# Section 5 of the design's ALGORITHM: the reference's values on GLUE. Warm-up lengths are shares of the run, so that
# they scale: 11,000 of 122,720 steps, dense twice and final three times as long.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "quick": {"*": {"epochs": 2, "teacher_epochs": 2, "lr": 2e-4, "teacher_lr": 3e-4}},
    "paper": {
        "*": {
            "epochs": 10,
            "teacher_epochs": 3,
            "teacher_lr": 2e-5,
            "batch_size": 32,
            "lr": 3e-5,
            "score_lr": 1e-2,
            "weight_decay": 0.0,
            "lr_warmup": 0.1,
            "dense_share": 0.18,
            "final_share": 0.27,
            "tau": 0.1,
            "extra_examples": 4096,
            "unsupervised_weight": 0.1,
            "supervised_weight": 10.0,
            "ce_weight": 0.1,
            "kd_weight": 0.9,
            "kd_temperature": 2.0,
            "normalization": "reference",
            "init": "pretrained",
            "score_init": "zero",
        },
        "first-order": {
            "epochs": 20,
            "batch_size": 16,
            "lr": 2e-5,
            "weight_decay": 0.01,
            "dense_share": 0.1,
            "final_share": 0.1,
            "unsupervised_weight": 0.3,
            "supervised_weight": 3.0,
            "kd_temperature": 1.0,
        },
        "movement": {"scope": "matrix"},
        "soft-movement": {"reg_weight": 290.0},
    },
}


def option(
    default: Any, help: str, *, flag: str = "", panel: str = "", resumable: bool = False, share: bool = False
) -> Any:
    """A dataclass field with its help text.

    `resumable` marks what may differ when a run is continued, at no price, `share` what can also be given in per cent.
    """
    metadata = {"help": help, "flag": flag, "panel": panel, "resumable": resumable, "share": share}
    return field(default=default, metadata=metadata)


LABEL_MAP = "other names for labels of the data, or of a model: LABEL_0=negative,2=neutral"


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Which examples, and how they are read."""

    task: str = option("", "task name; see the task table in the docs", panel="Task")
    data: str = option(
        "", "folder of splits, or one file: parquet, arrow, csv, tsv, jsonl, json; text also as .gz", panel="Task"
    )
    text_column: str = option("", "column of the (first) text, of the words, or of the question", panel="Task")
    pair_column: str = option("", "column of the second text, or of the context", panel="Task")
    label_column: str = option("", "column of the label; a,b,c for several 0/1 columns of labels", panel="Task")
    label_map: str = option("", LABEL_MAP, panel="Task")
    max_length: int = option(
        0, "longest input in tokens, longer texts are cut; 0 for 128, for 384 in question answering", panel="Task"
    )
    stride: int = option(
        0, "tokens that two windows of a long context share; 0 for 128, or less in short windows", panel="Task"
    )
    max_eval_samples: int = option(0, "evaluate on at most so many examples, 0 for all", panel="Task")

    def __post_init__(self) -> None:
        _check_name("task", self.task, TASK_NAMES)
        parse_label_map(self.label_map)
        _at_least(8, max_length=self.longest)
        _at_least(0, max_eval_samples=self.max_eval_samples, stride=self.stride)
        if self.task in GENERIC_TASKS and not self.data:
            raise ConfigError(f"task {self.task} needs your own data", "name a file or folder with --data")

    @property
    def label_names(self) -> dict[str, str]:
        """The label map: a name of the model or of the data -> the name to use."""
        return parse_label_map(self.label_map)

    @property
    def longest(self) -> int:
        """The longest input in tokens, chosen or by the kind of task."""
        return self.max_length or (384 if self.task in QUESTION_TASKS else 128)

    @property
    def name(self) -> str:
        """The task, and of own data the name too with some digits of its path: another folder has another name."""
        if not self.data:
            return self.task
        path = os.path.normpath(self.data)
        name, digits = (
            Path(path).stem[:40] or "data",
            hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:6],
        )
        return f"{self.task}-{name}-{digits}"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where and in which precision to compute."""

    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", panel="Hardware")
    precision: str = option("auto", "auto, fp32, bf16 or fp16; auto is bf16 on a GPU, fp32 elsewhere", panel="Hardware")
    threads: int = option(0, "CPU threads, 0 for all cores; results repeat only with the same count", panel="Hardware")

    def __post_init__(self) -> None:
        _check_name("device", self.device.split(":")[0], DEVICES)
        _check_name("precision", self.precision, ("auto", "fp32", "bf16", "fp16"))
        _at_least(0, threads=self.threads)


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Everything that determines a pruning run."""

    source: TaskConfig
    model: str = ""
    out: str = option(
        "",
        "output folder; runs/MODEL-TASK-METHOD-SPARSITY by default, with --data its name after TASK",
        flag="-o",
        resumable=True,
    )
    sparsity: float = option(0.9, "fraction of the prunable weights to remove, in [0, 1)")
    method: str = option("cap-soft", "pruning method: " + ", ".join(METHODS))
    losses: str = option("", "losses to train with, of ce,kd,prc,snc,fic,hid; the method's own by default")
    teacher: str = option("", "fine-tuned model to learn from; fine-tuned in the run by default")
    preset: str = option("default", "values to start from: " + ", ".join(PRESETS), resumable=True)
    max_train_samples: int = option(0, "train on at most so many examples, 0 for all", panel="Task")
    holdout: float = option(
        0.0,
        "share of the training set held out to choose the best epoch (to evaluate on, if no split is)",
        panel="Task",
    )
    seed: int = option(1, "seed of everything random", panel="Training")
    epochs: int = option(4, "passes over the training set while pruning", panel="Training")
    teacher_epochs: int = option(
        0,
        "passes over the training set for the teacher; 0 for 2, or more on a small set: 150 steps, at most 8 passes",
        panel="Training",
    )
    batch_size: int = option(32, "examples per step", panel="Training")
    lr: float = option(1e-4, "peak learning rate of the weights", panel="Training")
    teacher_lr: float = option(5e-5, "peak learning rate of the teacher", panel="Training")
    score_lr: float = option(3e-2, "peak learning rate of the scores (movement methods)", panel="Training")
    weight_decay: float = option(0.01, "weight decay of AdamW", panel="Training")
    lr_warmup: float = option(0.1, "share of the steps in which the learning rates rise", panel="Training")
    init: str = option("teacher", "weights the student starts from: teacher or pretrained", panel="Training")
    dense_share: float = option(0.05, "share of the steps before pruning begins", panel="Pruning")
    final_share: float = option(0.4, "share of the steps at the final sparsity", panel="Pruning")
    initial_sparsity: float = option(
        0.0, "fraction removed at once when pruning begins; the rest follows step by step", panel="Pruning"
    )
    update_every: float = option(
        0.0, "share of the steps between two rises of the sparsity, 0 for as often as the method can", panel="Pruning"
    )
    lr_schedule: str = option(
        "run",
        "learning rates rise and fall once in the run, or anew after each rise of the sparsity: run, cycle",
        panel="Training",
    )
    structure: str = option(
        "heads",
        "what cap-f and first-order remove beside neurons: heads, or dimensions inside them, all in one ranking",
        panel="Pruning",
    )
    scope: str = option("auto", "rank weights within each matrix or over all: auto, matrix, global", panel="Pruning")
    score_init: str = option("magnitude", "scores start at zero or at the weights' magnitude", panel="Pruning")
    pooling: str = option("head", "sentence vector: head (what enters the classifier), cls, mean", panel="Losses")
    tau: float = option(0.1, "temperature of the contrastive terms", panel="Losses")
    extra_examples: int = option(4096, "bank vectors drawn per step and module", panel="Losses")
    normalization: str = option("mean", "mean, or reference: the reference code's own scaling", panel="Losses")
    unsupervised_weight: float = option(0.005, "weight of the unsupervised contrastive terms", panel="Losses")
    supervised_weight: float = option(0.02, "weight of the supervised contrastive terms", panel="Losses")
    ce_weight: float = option(0.1, "weight of the task loss (1 when it is the only loss)", panel="Losses")
    kd_weight: float = option(0.9, "weight of distillation", panel="Losses")
    kd_temperature: float = option(2.0, "temperature of distillation", panel="Losses")
    hidden_weight: float = option(1.0, "weight of the hidden-state distillation (hid)", panel="Losses")
    reg_weight: float = option(0.0, "weight of the score regulariser (soft movement)", panel="Losses")
    checkpoint_seconds: float = option(120.0, "seconds between checkpoints", panel="Run", resumable=True)
    max_time: float = option(
        0.0, "stop with a checkpoint after so many minutes, 0 for never", panel="Run", resumable=True
    )
    keep_work: bool = option(False, "keep the work folder of a finished run", panel="Run", resumable=True)
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        _check_name("method", self.method, METHODS)
        _check_name("preset", self.preset, PRESETS)
        _check_name("normalization", self.normalization, ("mean", "reference"))
        _check_name("pooling", self.pooling, ("head", "cls", "mean"))
        _check_name("scope", self.scope, ("auto", "matrix", "global"))
        _check_name("structure", self.structure, STRUCTURES)
        _check_name("score-init", self.score_init, ("zero", "magnitude"))
        _check_name("init", self.init, ("teacher", "pretrained"))
        _check_name("lr-schedule", self.lr_schedule, ("run", "cycle"))
        for name in self.loss_names:
            _check_name("loss", name, LOSSES)
        if not {"ce", "kd"} & set(self.loss_names):
            raise ConfigError("losses need ce or kd: the other terms alone do not teach the task")
        if self.structure != STRUCTURES[0] and not METHODS[self.method].structured:
            raise ConfigError(
                f"--structure {self.structure} is for structured methods, {self.method} removes single weights",
                "leave it out, or use --method cap-f",
            )
        if not 0 <= self.sparsity < 1:
            hint = f"did you mean --sparsity {self.sparsity / 100:g}?" if 1 < self.sparsity < 100 else ""
            raise ConfigError(f"sparsity is the fraction of weights removed, in [0, 1), got {self.sparsity:g}", hint)
        _at_least(
            0, max_train_samples=self.max_train_samples, teacher_epochs=self.teacher_epochs, max_time=self.max_time
        )
        _at_least(0, extra_examples=self.extra_examples, seed=self.seed, checkpoint_seconds=self.checkpoint_seconds)
        _at_least(1, epochs=self.epochs, batch_size=self.batch_size)
        positive = {
            "lr": self.lr,
            "teacher_lr": self.teacher_lr,
            "tau": self.tau,
            "kd_temperature": self.kd_temperature,
        }
        for name, value in positive.items():
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{_flag(name)} must be a positive number, got {value}")
        _at_least(0, score_lr=self.score_lr, weight_decay=self.weight_decay, reg_weight=self.reg_weight)
        _at_least(0, unsupervised_weight=self.unsupervised_weight, supervised_weight=self.supervised_weight)
        _at_least(0, ce_weight=self.ce_weight, kd_weight=self.kd_weight, hidden_weight=self.hidden_weight)
        shares = {"lr_warmup": self.lr_warmup, "dense_share": self.dense_share, "final_share": self.final_share}
        shares |= {"initial_sparsity": self.initial_sparsity, "update_every": self.update_every}
        for name, value in {**shares, "holdout": self.holdout}.items():
            if not 0 <= value < 1:
                raise ConfigError(f"{_flag(name)} is a share in [0, 1), got {value:g}")
        if self.initial_sparsity > self.sparsity:
            raise ConfigError(
                f"--initial-sparsity {self.initial_sparsity:g} is more than --sparsity {self.sparsity:g}",
                "it is what is removed at once when pruning begins; choose less",
            )
        if self.initial_sparsity and METHODS[self.method].structured and self.structure == STRUCTURES[0]:
            raise ConfigError(
                f"--initial-sparsity has no effect on {self.method}, which removes heads in equal steps",
                "leave it out, or use --structure dimensions",
            )
        if self.lr_schedule == "cycle" and not METHODS[self.method].structured and not self.update_every:
            raise ConfigError(
                f"--lr-schedule cycle begins anew at each rise, and with {self.method} that is at every step",
                "set --update-every as well, such as 0.05",
            )
        if self.dense_share + self.final_share > 1:
            raise ConfigError("--dense-share and --final-share together exceed 1, no step is left to prune in")

    def teacher_passes(self, n_examples: int) -> int:
        """Passes over `n_examples` for the teacher: chosen, or enough for a small set to be learned; 0 if given."""
        if self.teacher or self.teacher_epochs:
            return 0 if self.teacher else self.teacher_epochs
        return min(8, max(2, math.ceil(150 * self.batch_size / max(1, n_examples))))

    @property
    def criterion(self) -> str:
        """Name of the method's criterion, a key of `criteria.CRITERIA`."""
        return METHODS[self.method].criterion

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses in the order of `LOSSES`, each once."""
        chosen = [name.strip() for name in self.losses.split(",") if name.strip()] or METHODS[self.method].losses
        return tuple(
            sorted(set(chosen), key=lambda name: (name not in LOSSES, LOSSES.index(name) if name in LOSSES else 0))
        )

    @property
    def out_folder(self) -> Path:
        """The output folder, given or derived."""
        if self.out:
            return Path(self.out)
        name, _, revision = self.model.partition("@")
        model = "-".join([name.rstrip("/").rsplit("/", 1)[-1], *filter(None, revision.split("/"))])
        return Path("runs") / f"{model}-{self.source.name}-{self.method}-{self.sparsity:g}"


@dataclass(frozen=True, kw_only=True)
class Gates:
    """What must hold for exit code 0."""

    min: str = option(
        "", "fail below METRIC=V, such as accuracy=0.8 or 80%; several separated by commas", panel="Gates"
    )
    max: str = option("", "fail above METRIC=V; several separated by commas", panel="Gates")
    max_drop: str = option(
        "", "fail when METRIC falls by more than V below --baseline; METRIC=V, or METRIC=P% of it", panel="Gates"
    )
    min_retention: float = option(
        0.0,
        "fail when the primary metric keeps less than this share of --baseline, such as 0.98 or 98%",
        panel="Gates",
        share=True,
    )
    max_bytes: int = option(0, "fail when the weight file is larger", panel="Gates")
    max_latency_ms: float = option(0.0, "fail when the median latency is higher", panel="Gates")
    confidence: float = option(
        0.0,
        "such as 0.95: fail only when the whole interval at this confidence is beyond the limit; 0 to judge by the "
        "value alone",
        panel="Gates",
        share=True,
    )

    def __post_init__(self) -> None:
        parse_limits("--min", self.min)
        parse_limits("--max", self.max)
        parse_drops(self.max_drop)
        _at_least(0, min_retention=self.min_retention, max_bytes=self.max_bytes, max_latency_ms=self.max_latency_ms)
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
    baseline: str = option("", "model, artefact or report.json to compare with")
    latency_batch: int = option(1, "batch size of the latency measurement")
    latency_length: int = option(128, "tokens per input of the latency measurement")
    perturb: str = option("", f"measure on changed texts too: all, or some of {','.join(PERTURBATIONS)}; see the docs")
    seed: int = option(1, "seed of the bootstrap intervals and of the changed texts")
    gates: Gates = field(default_factory=Gates)
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        _at_least(1, latency_batch=self.latency_batch, latency_length=self.latency_length)
        _at_least(0, seed=self.seed)
        self.gates.check_baseline(self.baseline)
        _check_baselines([self.baseline])
        for name in self.perturbations:
            _check_name("perturbation", name, PERTURBATIONS)

    @property
    def perturbations(self) -> tuple[str, ...]:
        """The perturbations in the order given, each once."""
        return PERTURBATIONS if self.perturb == "all" else split_list(self.perturb)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A pruned model written for other tools."""

    model: str = ""
    to: str = option("dense", "format: " + ", ".join(EXPORT_FORMATS))
    out: str = option("", "folder to write; MODEL-FORMAT by default", flag="-o")
    dtype: str = option(
        "fp32", "type of the stored weights: fp32, fp16, bf16; for sparse and sliced also int8", panel="Weights"
    )
    embeddings: str = option(
        "keep",
        "word embeddings of a sparse or sliced file: keep (as --dtype says; fp16 with int8), fp16, int8, svd:RANK",
        panel="Weights",
    )
    vocab: str = option(
        "", "keep only the tokens that the task's training texts need (task), or those of a FILE", panel="Weights"
    )
    int8: bool = option(False, "quantise the weights of an onnx export to 8 bits", panel="Weights")
    threshold: str = option(
        "", "of a movement-pruning checkpoint with scores: the number that it was pruned with", panel="Weights"
    )
    data: str = option("", "data of the task, when they are not where the run found them", panel="Checks")
    label_map: str = option("", LABEL_MAP, panel="Checks")
    samples: int = option(64, "texts on which the logits of the export are compared", panel="Checks")
    max_eval_samples: int = option(
        0, "measure the accuracy of a lossy export on at most so many examples, 0 for all", panel="Checks"
    )
    device: str = option("cpu", "where PyTorch computes: auto, cpu, cuda, cuda:N or mps", panel="Hardware")
    threads: int = option(0, "CPU threads, 0 for all cores", panel="Hardware")

    def __post_init__(self) -> None:
        _check_name("format", self.to, EXPORT_FORMATS)
        _check_name("dtype", self.dtype, ("fp32", "fp16", "bf16", "int8"))
        _check_name("device", self.device.split(":")[0], DEVICES)
        _at_least(1, samples=self.samples)
        _at_least(0, threads=self.threads, max_eval_samples=self.max_eval_samples)
        if self.threshold and self.score_threshold is None:
            raise ConfigError(f"--threshold must be a number, got {self.threshold!r}")
        if self.embeddings not in ("keep", "fp16", "int8") and not self.svd_rank:
            raise ConfigError(
                f"--embeddings is keep, fp16, int8 or svd:RANK, got {self.embeddings!r}", "for example svd:128"
            )
        if self.to not in ARTEFACT_FORMATS and (self.embeddings != "keep" or self.dtype == "int8"):
            flag = "--embeddings" if self.embeddings != "keep" else "--dtype int8"
            raise ConfigError(f"{flag} needs a format of ours, not {self.to}", "use --to sparse or --to sliced")
        if self.to == "onnx" and self.dtype != "fp32":
            raise ConfigError(f"--to onnx writes fp32, not {self.dtype}", "use --int8 for a smaller file")
        if self.int8 and self.to != "onnx":
            raise ConfigError("--int8 is for --to onnx", "use --dtype int8 with --to sparse or --to sliced")

    @property
    def out_folder(self) -> Path:
        """The output folder, given or derived: beside a local model, here for one of the hub."""
        model = Path(self.model)
        model = model if model.name else model.resolve()  # of `.`
        return Path(self.out or f"{model if model.exists() else model.name}-{self.to}")

    @property
    def score_threshold(self) -> float | None:
        """The threshold of a masked checkpoint, if there is one."""
        try:
            value = float(self.threshold)
        except ValueError:
            return None
        return value if math.isfinite(value) else None

    @property
    def svd_rank(self) -> int:
        """The rank of `--embeddings svd:RANK`; 0 for everything else."""
        name, _, rank = self.embeddings.partition(":")
        return int(rank) if name == "svd" and rank.isascii() and rank.isdigit() else 0


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What a frozen encoder knows about tasks it was not pruned for."""

    model: str = ""
    tasks: str = option(",".join(PROBE_TASKS), "tasks to probe, separated by commas")
    data: str = option(
        "", "folder with a folder of splits for each task that is not built in; or, of a single task, its data"
    )
    text_column: str = option("", "column of the (first) text, of the words, or of the question", panel="Task")
    pair_column: str = option("", "column of the second text, or of the context", panel="Task")
    label_column: str = option("", "column of the label; a,b,c for several 0/1 columns of labels", panel="Task")
    label_map: str = option("", LABEL_MAP, panel="Task")
    baseline: str = option("", "models, artefacts or results of cap probe to compare with; gates look at the first")
    probe: str = option("linear", "linear (logistic or ridge regression), or head (a new head by gradient descent)")
    layer: str = option("last", "layer to take vectors from: last, N (0 for the embeddings), or all")
    pooling: str = option("mean", "sentence vector: head (what enters the classifier), cls, mean", flag="--pool")
    max_length: int = option(0, "longest input in tokens; 0 for 128, for 384 in question answering")
    max_train_samples: int = option(2000, "use at most so many training examples, 0 for all")
    max_eval_samples: int = option(1000, "test each probe on at most so many examples, 0 for all")
    seeds: int = option(3, "probes per task, each trained on four fifths of the training examples, drawn anew")
    seed: int = option(1, "seed of everything random")
    gates: Gates = field(default_factory=Gates)
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        for name in self.task_names:
            _check_name("task", name, TASK_NAMES)
        if not self.task_names:
            raise ConfigError("no task given", nearest("", TASK_NAMES))
        _check_name("probe", self.probe, PROBES)
        _check_name("pooling", self.pooling, ("head", "cls", "mean"))
        if self.layer not in ("last", "all") and not (self.layer.isascii() and self.layer.isdigit()):
            raise ConfigError(f"--layer is last, all or a number, got {self.layer!r}")
        if self.pooling == "head" and self.layer != "last":
            raise ConfigError("--pool head is the vector that enters the classifier, there is none in other layers")
        _at_least(0, max_train_samples=self.max_train_samples, max_eval_samples=self.max_eval_samples, seed=self.seed)
        _at_least(1, seeds=self.seeds)
        self.gates.check_baseline(self.baseline)
        _check_baselines(self.baselines)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks in the order given, each once."""
        return split_list(self.tasks)

    @property
    def baselines(self) -> tuple[str, ...]:
        """The models to compare with, in the order given, each once; a path that is there may hold a comma."""
        return (self.baseline,) if _exists(self.baseline) else split_list(self.baseline)

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
            text_column=self.text_column,
            pair_column=self.pair_column,
            label_column=self.label_column,
            label_map=self.label_map,
            max_length=self.max_length,
            max_eval_samples=self.max_eval_samples,
        )

    def _check_data(self) -> None:
        """Raise `ConfigError` for data that none of several tasks would read."""
        if not self.data or len(self.task_names) == 1:
            return
        wanted = ", ".join(str(Path(self.data, name)) for name in self.task_names)
        if not Path(self.data).is_dir():
            raise ConfigError(f"--data {self.data} is no folder, but there are several tasks", f"looked for {wanted}")
        if not any(Path(self.data, name).is_dir() for name in self.task_names):
            raise ConfigError(f"--data {self.data} has no folder of any of the tasks", f"looked for {wanted}")


_SECTIONS: dict[str, type] = {"prune": PruneConfig, "eval": EvalConfig, "probe": ProbeConfig}
_TYPE_NAMES = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).exists()
    except (OSError, ValueError):  # too long, or no path at all
        return False


def _check_baselines(names: Iterable[str]) -> None:
    """Raise `ConfigError` for a name that can only be a file's or folder's, and nothing is there."""
    for name in names:
        is_file = difflib.get_close_matches(Path(name).suffix.lower(), [".json"], cutoff=0.7)
        if (is_file or name.startswith(("/", "./", "../"))) and not _exists(name):
            raise ConfigError(f"--baseline {name}: no such file", "name a model, or what --json printed")


def split_list(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list, in the order given, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def build(cls: type, flat: Mapping[str, Any]) -> Any:
    """Make a configuration from a flat mapping of field names; nested groups are filled from the same mapping."""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        check_no_token(name, value)
    for item, kind in typed_fields(cls):
        if dataclasses.is_dataclass(kind):
            values[item.name] = build(typing.cast(type, kind), flat)
        elif flat.get(item.name) is not None:
            values[item.name] = flat[item.name]
    return cls(**values)


def check_no_token(name: str, value: object) -> None:
    """Raise `ConfigError` for a token of the hub among the options: it would stand in messages, reports and names."""
    if isinstance(value, str) and TOKEN.search(value):
        raise ConfigError(
            f"{name} holds what looks like a token of the hub, which is not shown here",
            "give a token as HF_TOKEN or by: hf auth login; and revoke this one if others can see the command",
        )


def typed_fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a configuration with their types resolved."""
    hints = typing.get_type_hints(cls)
    return [(item, hints[item.name]) for item in fields(cls)]


def flatten(config: Any) -> dict[str, Any]:
    """A configuration as one flat mapping of field names; the inverse of `build`."""
    flat: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        flat.update(flatten(value) if dataclasses.is_dataclass(value) else {item.name: value})
    return flat


def prune_config(chosen: Mapping[str, Any], file: str = "") -> PruneConfig:
    """Layer preset, `--config` file and the options the user chose into a `PruneConfig`."""
    layers = layered("prune", chosen, file)
    preset = layers.get("preset", "default")
    method = layers.get("method", "cap-soft")
    _check_name("preset", preset, PRESETS)
    _check_name("method", method, METHODS)
    table = PRESETS[preset]
    flat = {**table.get("*", {}), **table.get(METHODS[method].criterion, {}), **layers}
    found: PruneConfig = build(PruneConfig, flat)
    return found


def options_file(chosen: str = "") -> str:
    """The file with options of `cap eval` and `cap probe`: the chosen one, else `cap.toml` if it is here, else none."""
    return chosen or (CONFIG_FILE if Path(CONFIG_FILE).exists() else "")


def layered(command: str, chosen: Mapping[str, Any], file: str = "") -> dict[str, Any]:
    """The options that the user chose over those of a file, if there is one. Raises `ConfigError`."""
    layers = {**(read_toml(file, command) if file else {}), **{n: v for n, v in chosen.items() if v is not None}}
    for name in NUMERIC_GATES:
        if layers.get(name) == 0:
            raise ConfigError(f"{_flag(name)} 0 is no gate and would never fail", "leave it out, or set a limit")
    return layers


def read_toml(file: str, command: str) -> dict[str, Any]:
    """Options of a command from a TOML file; names as on the command line, with dashes or underscores.

    The table of the command goes over what stands before all tables, which for eval and probe are options of both. The
    tables of the other commands are checked as well. Raises `ConfigError`.
    """
    try:
        data = b"" if file == os.devnull else files.read_bytes(Path(file), MAX_TOML_BYTES, "a file of options")
        if data.count(b".") > MAX_TOML_DOTS:
            raise FileError(f"more than {MAX_TOML_DOTS:,} dots, too many for a file of options")
        content = tomllib.loads(files.text_of(data, Path(file)))
    except (FileError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read {file}: {error}", "options stand in TOML, such as seed = 1") from error
    tables = {name: value for name, value in content.items() if name in _SECTIONS and isinstance(value, dict)}
    top = {name: value for name, value in content.items() if name not in tables}
    _check_tables(top, file)
    found = _read_table(top, file, ("prune",) if command == "prune" else ("eval", "probe"))
    checked = {name: _read_table(table, f"{file} [{name}]", (name,)) for name, table in tables.items()}
    return {**found, **checked.get(command, {})}


def _check_tables(top: Mapping[str, Any], file: str) -> None:
    """Raise `ConfigError` for a table that is not of a command."""
    options = {item.name for cls in _SECTIONS.values() for item, _ in leaves(cls)}
    for name, value in top.items():
        if isinstance(value, dict) and name.replace("-", "_") not in options:
            tables = ", ".join(f"[{section}]" for section in _SECTIONS)
            raise ConfigError(
                f"unknown table in {file} [{name}]", f"tables are {tables}; gates and all others are plain keys"
            )


def _read_table(table: Mapping[str, Any], place: str, commands: tuple[str, ...]) -> dict[str, Any]:
    """The options of a table by field name; each must be one of all the `commands`."""
    kinds = {command: {item.name: (item, kind) for item, kind in leaves(_SECTIONS[command])} for command in commands}
    known = {name: both for table in kinds.values() for name, both in table.items()}
    values = {name.replace("-", "_"): value for name, value in table.items()}
    for name, value in values.items():
        _check_name(f"option in {place}", name, known)
        owners = [command for command in commands if name in kinds[command]]
        if len(owners) < len(commands):
            raise ConfigError(f"{name} in {place} is an option of {owners[0]} only", f"put it below [{owners[0]}]")
        values[name] = _typed(*known[name], value, place)
    return values


def leaves(cls: type) -> Iterable[tuple[dataclasses.Field[Any], Any]]:
    """Every option of a configuration with its type, those of nested groups where the group stands."""
    for item, kind in typed_fields(cls):
        if dataclasses.is_dataclass(kind):
            yield from leaves(typing.cast(type, kind))
        else:
            yield item, kind


def _typed(item: dataclasses.Field[Any], kind: type, value: Any, place: str) -> Any:
    name = item.name
    if item.metadata.get("share") and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return share(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        several = kind is str and isinstance(value, list | dict)
        hint = f'several stand in one text, separated by commas: {name} = "…,…"' if several else ""
        raise ConfigError(f"{name} in {place} must be {_TYPE_NAMES[kind]}, got {value!r}", hint)
    return value


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two flattened configurations, in words by option, but for `free_options`."""
    free = free_options()
    return {
        name: f"{name}: {theirs.get(name)!r}, now {ours.get(name)!r}"
        for name in {**ours, **theirs}
        if name not in free and theirs.get(name) not in (ours.get(name), shortened(ours.get(name)))  # as reports do
    }


def free_options() -> frozenset[str]:
    """The options of a run that nothing which it makes depends on."""
    return frozenset(item.name for item, _ in leaves(PruneConfig) if item.metadata.get("resumable"))


# Places --------------------------------------------------------------------------------------------------------------


def shortened(value: Any) -> Any:
    """An absolute path as reports show it, by its last part; anything else as it is."""
    return f"…/{Path(value).name}" if isinstance(value, str) and Path(value).is_absolute() else value


def portable(found: Any, config: Any) -> Any:
    """A report without the absolute paths among the options of its command; they say nothing elsewhere, but much of
    the machine and its user."""
    texts = (value for value in flatten(config).values() if isinstance(value, str))
    places = {place for text in texts for place in _pieces(text) if Path(place).is_absolute() and Path(place).name}
    known = {form: str(shortened(place)) for place in places for form in (place, str(Path(place)))}
    if not known:
        return found
    longest_first = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w./…-])(?:{longest_first})(?![\w-])")

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shown(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [shown(one) for one in value]
        return pattern.sub(lambda match: known[match[0]], value) if isinstance(value, str) else value

    return shown(found)


def command_line(arguments: Iterable[str]) -> str:
    """A command as reports have it, absolute paths by their last part."""
    shown = (re.sub("(^|[=,])(/[^,]*)", lambda match: match[1] + shortened(match[2]), text) for text in arguments)
    return shlex.join(["cap", *shown])


def parse_limits(flag: str, text: str) -> dict[str, float]:
    """`accuracy=0.9,f1=80%` as a mapping. Raises `ConfigError` for anything else, also for one metric twice."""
    limits: dict[str, float] = {}
    for part in _pieces(text):
        name, limit = _limit(flag, part)
        if name in limits:
            raise _twice(flag, name)
        limits[name] = limit
    return limits


def _pieces(text: str) -> list[str]:
    return [piece.strip() for piece in text.split(",") if piece.strip()]


def _limit(flag: str, text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        limit = share(value)
    except ValueError:
        limit = math.nan
    if not name.strip() or name.strip()[-1] in "<>!" or not math.isfinite(limit):
        raise ConfigError(f"{flag} needs METRIC=NUMBER, got {text!r}", f"for example {flag} accuracy=0.8")
    return name.strip(), limit


def share(text: str) -> float:
    """A number, which may be given in per cent: 0.8 of `0.8` and of `80%`. Raises `ValueError`."""
    number = float(text.strip().removesuffix("%"))
    return number / 100 if text.strip().endswith("%") else number


def meant(value: float) -> str:
    """A hint for who gave per cent where a share is expected; empty when the value is neither."""
    if not 1 <= value <= 100:
        return ""
    whole, _, decimals = f"{value / 100:.10g}".partition(".")
    return f"did you mean {whole}.{decimals.ljust(2, '0')} or {value:.10g}%?"


def _twice(flag: str, name: str) -> ConfigError:
    return ConfigError(f"{flag} has two limits for {name!r}", "leave one of them")


def parse_drops(text: str) -> list[tuple[str, float, bool]]:
    """`accuracy=0.01,f1=2%` as (name, largest drop, whether that is a share of the baseline's value).

    A metric may have a limit of each kind. Raises `ConfigError` for anything else.
    """
    found: dict[tuple[str, bool], float] = {}
    for part in _pieces(text):
        relative = part.endswith("%")
        name, limit = _limit("--max-drop", part)
        if (name, relative) in found:
            raise _twice("--max-drop", name)
        found[name, relative] = limit
    return [(name, limit, relative) for (name, relative), limit in found.items()]


def parse_label_map(text: str) -> dict[str, str]:
    """`LABEL_0=negative,LABEL_1=positive` as a mapping. Raises `ConfigError` for anything else."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(old.strip() and sign and new.strip() for old, sign, new in pairs):
        raise ConfigError(
            f"--label-map needs OLD=NEW pairs, got {text!r}", "for example LABEL_0=negative,LABEL_1=positive"
        )
    return {old.strip(): new.strip() for old, _, new in pairs}


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint that names the nearest valid names, or all of them."""
    choices = list(valid)
    close = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=0.55)
    close = close or [choice for choice in choices if len(name) > 1 and choice.lower().startswith(name.lower())]
    return (f"did you mean {close[0]}? " if close else "") + "valid: " + ", ".join(choices)


def _check_name(what: str, name: str, valid: Iterable[str]) -> None:
    if name not in valid:
        raise ConfigError(f"unknown {what} {name!r}" if name else f"no {what} given", nearest(name, valid))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _at_least(low: float, **values: float) -> None:
    for name, value in values.items():
        if isinstance(value, int) and abs(value) > MOST:
            raise ConfigError(f"{_flag(name)} must be below 2**63", "choose a smaller number")
        if not (math.isfinite(value) and value >= low):
            raise ConfigError(f"{_flag(name)} must be at least {low:g}, got {value:g}")
