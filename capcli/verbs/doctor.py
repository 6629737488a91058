"""`cap doctor`: what is installed, where it computes, and where it keeps things."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from capcli import files, machine
from capcli.config.names import METHODS, TASK_NAMES
from capcli.data.cache import cache_folder
from capcli.errors import CapError
from capcli.records.told import Check, Diagnosis
from capcli.reporting.text import byte_size, counted

OPTIONAL = {
    "numba": ("the sparse runtime", "pip install capcli[fast]"),
    "onnxruntime": ("ONNX exports", "pip install capcli[onnx]"),
    "onnxscript": ("writing ONNX", "pip install capcli[onnx]"),
}
LEAST_BYTES = 2 * 10**9  # of a disk that a run of a small model fits on
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def doctor() -> Diagnosis:
    """Look at everything; nothing is changed, and no network is asked."""
    return Diagnosis(
        checks=(
            *_devices(),
            *(_package(name, *row) for name, row in OPTIONAL.items()),
            _folder("cache", cache_folder(), "set CAP_CACHE to a folder that can be written"),
            _folder("hub cache", _hub_cache(), "set HF_HOME to a folder that can be written"),
            _folder("this folder", Path.cwd(), "runs are written here unless -o names another folder"),
            _hub(),
        ),
        versions=machine.versions(),
        methods=tuple(METHODS),
        tasks=tuple(TASK_NAMES),
    )


def _devices() -> list[Check]:
    """Processor and accelerators."""
    import torch

    found = [f"{machine.processor()}, {counted(machine.processors(), 'processor')} usable"]
    found += ["bf16 instructions"] * machine.has_bf16()
    checks = [Check(name="CPU", state="ok", found=", ".join(found))]
    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory
        checks.append(
            Check(name=f"cuda:{i}", state="ok", found=f"{torch.cuda.get_device_name(i)}, {byte_size(memory)}")
        )
    if torch.backends.mps.is_available():
        checks.append(Check(name="mps", state="ok", found="Apple GPU"))
    if len(checks) == 1:
        built = torch.version.cuda
        said = "none found" if built else "none: this PyTorch is built for the CPU alone"
        checks.append(Check(name="GPU", state="missing", found=said, hint="runs go to the CPU"))
    return checks


def _package(name: str, purpose: str, hint: str) -> Check:
    if find_spec(name) is None:
        return Check(name=name, state="missing", found=f"not installed: for {purpose}", hint=hint)
    return Check(name=name, state="ok", found=f"{importlib.metadata.version(name)}, for {purpose}")


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _folder(name: str, folder: Path, hint: str) -> Check:
    """Whether a folder can be written, and what is free there."""
    above = next((one for one in (folder, *folder.absolute().parents) if one.is_dir()), Path("/"))
    try:
        files.check_writable(above)
        free = shutil.disk_usage(above).free
    except (CapError, OSError) as error:
        return Check(name=name, state="problem", found=f"{folder}: {error}", hint=hint)
    state = "problem" if free < LEAST_BYTES else "ok"
    return Check(name=name, state=state, found=f"{folder}, {byte_size(free)} free", hint=hint if state != "ok" else "")


def _hub() -> Check:
    """What the environment says about the hub; a token is only said to be there."""
    from huggingface_hub import constants, get_token

    said = [constants.ENDPOINT, "token found" if get_token() else "no token"]
    said += [f"{name} is set: nothing is downloaded" for name in OFFLINE if os.environ.get(name, "0") not in ("", "0")]
    return Check(name="hub", state="ok", found=", ".join(said))
