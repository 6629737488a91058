"""Where and in which precision to compute: options that all commands share."""

from __future__ import annotations

from dataclasses import dataclass

from capcli.config.names import DEVICES
from capcli.config.options import at_least, check_name, check_names, option

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
COMPILE = "compile the layers with torch.compile for training, which takes time at the start; meant for GPUs"
TIMEOUT_MINUTES, TIMEOUT = 30.0, "how many minutes the processes of torchrun wait for one another"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where and in which precision to compute."""

    device: str = option("auto", "where to compute: auto, cpu, cuda, cuda:N or mps", panel="Hardware", metavar="DEVICE")
    precision: str = option(
        "auto",
        "precision; auto is bf16 on a GPU and, to train, on a CPU with bf16 instructions; else fp32",
        panel="Hardware",
        names=PRECISIONS,
    )
    threads: int = option(
        0, "CPU threads, 0 for all cores; results are reproducible only with the same number", panel="Hardware"
    )

    def __post_init__(self) -> None:
        check_name("device", self.device.split(":")[0], DEVICES)
        check_names(self)
        at_least(0, threads=self.threads)
