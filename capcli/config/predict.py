"""The configuration of `cap predict`."""

from __future__ import annotations

from dataclasses import dataclass, field

from capcli.config.hardware import Hardware
from capcli.config.measure import RUNTIME, check_runtime
from capcli.config.options import at_least, option, same_option
from capcli.config.task import LENGTH, WINDOW, TaskConfig
from capcli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """A model that is asked every text of a file, or all that arrive on stdin."""

    model: str = ""
    file: str = ""
    out: str = option("", "file to write, one JSON object per line; stdout by default", flag="-o")
    text_column: str = same_option(TaskConfig, "text_column")
    pair_column: str = same_option(TaskConfig, "pair_column")
    max_length: int = option(
        0,
        "longest input in tokens, longer texts are truncated; 0 for that of the run of the model, "
        f"else {LENGTH}, or {WINDOW} in question answering",
        panel="Task",
    )
    stride: int = option(
        0, "tokens that two windows of a long context share; 0 as in the run of the model", panel="Task"
    )
    top_k: int = option(0, "give the N most probable labels, not the answer alone")
    batch_size: int = option(
        0, "at most this many texts per batch; 0 to limit batches by tokens only, as an evaluation does"
    )
    runtime: str = option("", RUNTIME, panel="Hardware")
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        at_least(0, max_length=self.max_length, stride=self.stride, top_k=self.top_k, batch_size=self.batch_size)
        if self.max_length:
            at_least(8, max_length=self.max_length)
        if not self.file:
            raise ConfigError("no FILE given", "name a file with texts, or - for stdin")
        check_runtime(self.runtime)
