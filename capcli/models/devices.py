"""The device and the type to compute in."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from capcli import machine, parallel
from capcli.config.hardware import Hardware
from capcli.data import cache
from capcli.errors import ConfigError


@dataclass(kw_only=True)
class Room:
    """How many tokens an evaluation batch may have, padding included, since memory ran out; 0 before."""

    tokens: int = 0

    @property
    def notes(self) -> list[str]:
        """What a result says of it."""
        if not self.tokens:
            return []
        return [f"memory ran out: texts go through the network in batches of at most {self.tokens:,} tokens"]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """A device and the type to compute in; weights stay in 32 bits. room: what was learned of its memory."""

    device: torch.device
    dtype: torch.dtype
    room: Room = field(default_factory=Room, compare=False)

    def autocast(self) -> Any:
        """Context in which matrix products run in `dtype`; nothing in 32 bits."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @property
    def exact(self) -> Compute:
        """For what is measured or kept: 32 bits on a CPU, where fewer are for training steps alone; else as it is."""
        return dataclasses.replace(self, dtype=torch.float32) if self.device.type == "cpu" else self

    @property
    def precision(self) -> str:
        """Name of the type, such as `float32`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def token_budget(self) -> int:
        """Tokens of an evaluation batch, padding included."""
        return self.room.tokens or (4096 if self.device.type == "cpu" else 65536)

    @property
    def name(self) -> str:
        """What the device is called, for reports."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else machine.processor()


def compute(hardware: Hardware, *, training: bool = False) -> Compute:
    """Find the device and precision, and set the CPU threads. Raises `ConfigError` for a device that is not there.

    training: `auto` is then bf16 also on a CPU that multiplies such numbers, where `Compute.exact` is to measure in.
    """
    _keep_out_of_tmpdir()
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    name = hardware.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and parallel.place().size > 1:
        name = f"cuda:{parallel.place().local}"  # each process of a machine has one of its own
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name.split(":")[0]]:
        raise ConfigError(f"there is no {name} device on this machine", "use --device cpu, or auto")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is not a device", "use cpu, cuda, or cuda:N with a number") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"there is no {name}, this machine has {torch.cuda.device_count()} CUDA devices")
    precision = hardware.precision
    if precision == "auto":
        precision = "bf16" if _is_fast_in_bf16(device, training) else "fp32"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Compute(device=device, dtype=dtypes[precision])


def _is_fast_in_bf16(device: torch.device, training: bool) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return training and device.type == "cpu" and machine.has_bf16()


def _keep_out_of_tmpdir() -> None:
    """Give torch a folder of the user for what it compiles: its own, in TMPDIR, has a name that others can foresee."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        folder = cache.cache_folder() / "torch"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
