"""The configuration of `cap export`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from capcli.config.names import ARTEFACT_FORMATS, DEVICES, EXPORT_FORMATS
from capcli.config.options import at_least, check_name, option
from capcli.config.task import LABEL_MAP
from capcli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A pruned model written for other tools."""

    model: str = ""
    to: str = option("dense", "format: " + ", ".join(EXPORT_FORMATS))
    out: str = option("", "folder to write; MODEL-FORMAT by default", flag="-o")
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
    threshold: str = option(
        "", "threshold that a movement-pruning checkpoint with scores was pruned with", panel="Weights"
    )
    data: str = option("", "data of the task, if they have moved since the run", panel="Checks")
    label_map: str = option("", LABEL_MAP, panel="Checks")
    samples: int = option(64, "number of texts on which the logits are compared", panel="Checks")
    max_eval_samples: int = option(
        0, "measure the accuracy of a lossy export on at most this many examples, 0 for all", panel="Checks"
    )
    device: str = option("cpu", "where PyTorch computes: auto, cpu, cuda, cuda:N or mps", panel="Hardware")
    threads: int = option(0, "CPU threads, 0 for all cores", panel="Hardware")

    def __post_init__(self) -> None:
        check_name("format", self.to, EXPORT_FORMATS)
        check_name("dtype", self.dtype, ("auto", "fp32", "fp16", "bf16", "int8"))
        check_name("device", self.device.split(":")[0], DEVICES)
        at_least(1, samples=self.samples)
        at_least(0, threads=self.threads, max_eval_samples=self.max_eval_samples)
        if self.threshold and self.score_threshold is None:
            raise ConfigError(f"--threshold must be a number, got {self.threshold!r}")
        if self.embeddings not in ("keep", "fp16", "int8") and not self.svd_rank:
            raise ConfigError(
                f"--embeddings is keep, fp16, int8 or svd:RANK, got {self.embeddings!r}", "for example svd:128"
            )
        if self.to not in ARTEFACT_FORMATS and (self.embeddings != "keep" or self.dtype == "int8"):
            flag = "--embeddings" if self.embeddings != "keep" else "--dtype int8"
            raise ConfigError(
                f"{flag} is for --to sparse or --to sliced, not {self.to}", "use one of these, or leave it out"
            )
        if self.to == "onnx" and self.dtype not in ("auto", "fp32"):
            raise ConfigError(f"--to onnx writes fp32, not {self.dtype}", "use --int8 for a smaller file")
        if self.int8 and self.to != "onnx":
            raise ConfigError("--int8 is for --to onnx", "use --dtype int8 with --to sparse or --to sliced")

    @property
    def out_folder(self) -> Path:
        """The output folder, given or derived: next to a local model, in the current folder for one from the hub."""
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
