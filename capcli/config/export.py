"""The configuration of `cap export`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from capcli.config.measure import Gates
from capcli.config.names import ARTEFACT_FORMATS, DEVICES, EXPORT_FORMATS, TASK_NAMES
from capcli.config.options import at_least, check_name, flag_name, option
from capcli.config.task import LABEL_MAP
from capcli.errors import ConfigError

LIMITS = "Limits"  # instead of a format
TREATMENTS = ("dtype", "embeddings", "vocab", "int8", "ratio", "heal")
"""Options that change the weights of one format."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A pruned model written for other tools: in the format `to`, or in the one that meets limits."""

    model: str = ""
    to: str = option(
        "",
        "format: "
        + ", ".join(EXPORT_FORMATS)
        + "; required, unless --fit or --max-latency-ms chooses one, or --plan lists all",
    )
    base: str = option(
        "",
        "for masks, to write or to read: the dense model whose weights they keep; by default the one that was pruned",
        panel="Weights",
        metavar="MODEL",
    )
    out: str = option("", "folder to write; by default MODEL-FORMAT, or MODEL-fit where limits choose", flag="-o")
    fit: int = option(
        0,
        "choose the most faithful export whose weight file has at most this size, such as 5MB",
        panel=LIMITS,
        unit="bytes",
    )
    max_latency_ms: float = option(
        0.0,
        "choose the most faithful export that answers a text of 128 tokens in this time, such as 10 (ms) or 0.5s",
        panel=LIMITS,
        unit="ms",
    )
    max_drop: str = option(
        "",
        "with --fit or --max-latency-ms: METRIC may be at most V below that of MODEL: METRIC=V, or METRIC=P% of it",
        panel=LIMITS,
    )
    dtype: str = option(
        "auto",
        "type of the stored weights: fp32, fp16, bf16; for sparse and sliced also int8; auto is that of the model's "
        "file for sparse and sliced, fp32 for others",
        panel="Weights",
    )
    embeddings: str = option(
        "keep",
        "word embeddings of a sparse or sliced file: keep (as set by --dtype; fp16 with int8), fp16, int8, svd:RANK",
        panel="Weights",
    )
    vocab: str = option(
        "", "keep only the tokens that the task's training texts need (task), or those of a FILE", panel="Weights"
    )
    int8: bool = option(False, "quantise the weights of an onnx export to 8 bits", panel="Weights")
    ratio: float = option(
        0.0,
        "for lowrank: the share of the dense matrices' weights that may remain, such as 0.3",
        panel="Weights",
    )
    heal: int = option(
        0,
        "for lowrank: epochs of training the factors on MODEL's answers to the training texts",
        panel="Weights",
    )
    threshold: str = option(
        "", "threshold that a movement-pruning checkpoint with scores was pruned with", panel="Weights"
    )
    data: str = option("", "data of the task, if they have moved since the run", panel="Checks")
    task: str = option("", "task of a fine-tuned model that cap prune did not make", panel="Checks", metavar="TASK")
    texts: str = option(
        "",
        "texts without labels on which the export is compared with MODEL: a .txt with one per line, or a table with a "
        "text column; where there are no labelled data, the agreement of their answers is measured on all of them",
        panel="Checks",
        metavar="FILE",
    )
    label_map: str = option("", LABEL_MAP, panel="Checks")
    samples: int = option(64, "number of texts on which the logits are compared", panel="Checks")
    max_eval_samples: int = option(
        0, "measure the accuracy of a lossy export on at most this many examples, 0 for all", panel="Checks"
    )
    device: str = option("cpu", "where PyTorch computes: auto, cpu, cuda, cuda:N or mps", panel="Hardware")
    threads: int = option(0, "CPU threads, 0 for all cores", panel="Hardware")

    def __post_init__(self) -> None:
        if self.to:
            check_name("format", self.to, EXPORT_FORMATS)
        check_name("dtype", self.dtype, ("auto", "fp32", "fp16", "bf16", "int8"))
        check_name("device", self.device.split(":")[0], DEVICES)
        at_least(1, samples=self.samples)
        at_least(0, threads=self.threads, max_eval_samples=self.max_eval_samples, heal=self.heal)
        if self.task:
            check_name("task", self.task, TASK_NAMES)
        if self.threshold and self.score_threshold is None:
            raise ConfigError(f"--threshold must be a number, got {self.threshold!r}")
        if self.embeddings not in ("keep", "fp16", "int8") and not self.svd_rank:
            raise ConfigError(
                f"--embeddings is keep, fp16, int8 or svd:RANK, got {self.embeddings!r}", "for example svd:128"
            )
        self._check_limits()
        self._check_format()

    def _check_limits(self) -> None:
        """Raise `ConfigError` for limits that nothing or everything meets, or that choose what is chosen already."""
        at_least(0, fit=self.fit)
        limits = self.limits
        if limits.max_drop and not (limits.max_bytes or limits.max_latency_ms):
            raise ConfigError(
                "--max-drop alone chooses nothing: MODEL itself drops by 0",
                "say what the export is for: add --fit SIZE or --max-latency-ms TIME",
            )
        chosen = [name for name in TREATMENTS if getattr(self, name) != getattr(ExportConfig, name)]
        if self.to and self.chooses:
            raise ConfigError(
                f"--to {self.to} and {flag_name(self.chooses[0])} both choose the format", "leave one of them out"
            )
        if chosen and not self.to:
            why = f"{flag_name(self.chooses[0])} chooses it" if self.chooses else "it is for one format"
            raise ConfigError(f"{flag_name(chosen[0])} needs --to: {why}", "name the format with --to, or leave it out")

    def _check_format(self) -> None:
        """Raise `ConfigError` for options that the format does not have."""
        if self.to not in ARTEFACT_FORMATS and (self.embeddings != "keep" or self.dtype == "int8"):
            flag = "--embeddings" if self.embeddings != "keep" else "--dtype int8"
            raise ConfigError(
                f"{flag} is for --to {', '.join(ARTEFACT_FORMATS)}, not {self.to}", "use one of these, or leave it out"
            )
        if self.to == "mask" and (self.dtype != "auto" or self.vocab):
            flag = "--vocab" if self.vocab else "--dtype"
            raise ConfigError(f"{flag} changes weights, and --to mask keeps those of its base", "leave it out")
        if self.to == "onnx" and self.dtype not in ("auto", "fp32"):
            raise ConfigError(f"--to onnx writes fp32, not {self.dtype}", "use --int8 for a smaller file")
        if self.int8 and self.to != "onnx":
            raise ConfigError("--int8 is for --to onnx", "use --dtype int8 with --to sparse or --to sliced")
        if self.to == "lowrank" and not 0 < self.ratio < 1:
            raise ConfigError(
                f"--to lowrank needs --ratio, a number between 0 and 1, got {self.ratio:g}",
                "say what share of the weights of the dense matrices may be left: for example --ratio 0.3",
            )
        if self.to and self.to != "lowrank" and (self.ratio or self.heal):
            raise ConfigError(f"{'--ratio' if self.ratio else '--heal'} is for --to lowrank, not {self.to}")

    @property
    def needs_train(self) -> bool:
        """Whether it cannot be made without the training texts of the task."""
        return bool(self.vocab) or self.to == "exits" or self.heal > 0

    @property
    def reads_train(self) -> bool:
        """Whether the training texts of the task are of use to the format by name."""
        return self.needs_train or self.to == "lowrank"

    @property
    def limits(self) -> Gates:
        """What the export that is chosen must keep to, as gates."""
        return Gates(max_bytes=self.fit, max_latency_ms=self.max_latency_ms, max_drop=self.max_drop)

    @property
    def chooses(self) -> tuple[str, ...]:
        """The names of the limits that are given; none for a format by name."""
        return tuple(name for name in ("fit", "max_latency_ms", "max_drop") if getattr(self, name))

    def check_asked(self) -> None:
        """Raise `ConfigError` when neither a format nor a limit is given."""
        if not self.to and not self.chooses:
            raise ConfigError(
                "no format given",
                f"name one with --to: {', '.join(EXPORT_FORMATS)}; or give limits, such as --fit 5MB or "
                "--max-latency-ms 10, to have one chosen; --plan lists what each would give",
            )

    @property
    def out_folder(self) -> Path:
        """The output folder, given or derived: next to a local model, in the current folder for one from the hub."""
        model = Path(self.model)
        model = model if model.name else model.resolve()  # of `.`
        return Path(self.out or f"{model if model.exists() else model.name}-{self.to or 'fit'}")

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
