"""`cap export`: a pruned model in a form that other tools load."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from capcli import files, hub, models
from capcli.config import ExportConfig
from capcli.errors import FileError, ModelError
from capcli.run import Event

SCHEMA_VERSION = 1
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def export(config: ExportConfig) -> Generator[Event, None, dict[str, Any]]:
    """Write `config.model` as `config.to` into `config.out`, re-open it and compare; yields events.

    Raises:
        ModelError: not a finished pruned model. FileError: the folder exists and is not empty, or cannot be written.
    """
    yield Event(phase="export", note=f"exporting {config.model} to {config.to}")
    if not models.is_artifact(config.model):
        hub.folder(config.model)
        raise ModelError(f"{config.model} is a dense model already", "cap export takes what cap prune wrote")
    out = config.out_folder
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} exists and is not empty", "choose another folder with -o")
    files.check_writable(out.parent)
    model = models.load_artifact(Path(config.model))
    result = FORMATS[config.to](config, model, out)
    yield Event(phase="export", done=1, total=1, overall=1.0, note=f"complete: {out}")
    return result


def dense(config: ExportConfig, model: models.Model, out: Path) -> dict[str, Any]:
    """A stock Hugging Face folder: zeros stored, loads everywhere without capcli; no smaller and no faster."""
    dtype = DTYPES[config.dtype]
    cast = dataclasses.replace(model, net=model.net.to(dtype))
    cast.net.config.dtype = dtype
    with files.publish(out, manifest="export.json") as staging:
        models.save_dense(cast, staging)
        card = Path(config.model) / "README.md"
        if card.is_file():
            files.write_bytes(staging / "README.md", card.read_bytes())
        _compare(cast, models.reload_dense(staging, model.kind))
    return {
        "schema_version": SCHEMA_VERSION,
        "model": config.model,
        "format": "dense",
        "dtype": config.dtype,
        "out": str(out),
        "gives": "loads with from_pretrained; not smaller, not faster",
        "files": files.read_json(out / "export.json"),
    }


def _compare(expected: models.Model, found: Any) -> None:
    ours, theirs = expected.net.state_dict(), found.state_dict()
    wrong = [
        name
        for name in {**ours, **theirs}
        if name not in theirs or ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
    ]
    if wrong:
        raise ModelError(f"the exported model differs from the pruned one in {len(wrong)} tensors, first {wrong[0]}")


FORMATS: dict[str, Callable[[ExportConfig, models.Model, Path], dict[str, Any]]] = {"dense": dense}
