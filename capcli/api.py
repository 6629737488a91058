"""The four commands as functions that run to their end, and `load`. Results are what `--json` prints, as a dict."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from capcli.config.export import ExportConfig
from capcli.config.measure import EvalConfig, ProbeConfig
from capcli.config.prune import PruneConfig
from capcli.errors import ModelError
from capcli.events import finished
from capcli.models import artifact, tokenizers
from capcli.records.codec import to_json
from capcli.verbs import evaluate as evaluate_
from capcli.verbs import export as export_
from capcli.verbs import probe as probe_
from capcli.verbs import prune as prune_


def load(out: str | os.PathLike[str]) -> Any:
    """The pruned model in folder `out` as a ready transformers model, in eval mode, with exactly the pruned weights.

    Raises `FileError` or `ModelError` when a tensor is missing, left over, damaged or of the wrong shape.
    """
    return artifact.load_artifact(_artifact(out)).net


def load_tokenizer(out: str | os.PathLike[str]) -> Any:
    """The tokenizer of the pruned model in folder `out`; its weights are not read."""
    return tokenizers.read_tokenizer(_artifact(out))


def _artifact(out: str | os.PathLike[str]) -> Path:
    if not tokenizers.is_artifact(os.fspath(out)):
        raise ModelError(f"{out} is not a folder written by cap prune", "load a dense model with transformers")
    return Path(out)


def prune(config: PruneConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Prune a model into `config.out_folder`; returns the report. See `capcli.verbs.prune.prune`."""
    found: dict[str, Any] = to_json(finished(prune_.prune(config, overwrite=overwrite)))
    return found


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure a model on a task; returns the result of `cap eval`."""
    found: dict[str, Any] = to_json(finished(evaluate_.evaluate(config)))
    return found


def export(config: ExportConfig) -> dict[str, Any]:
    """Write a pruned model in another form; returns what `cap export` prints."""
    found: dict[str, Any] = to_json(finished(export_.export(config)))
    return found


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Measure what a frozen encoder knows; returns the result of `cap probe`."""
    found: dict[str, Any] = to_json(finished(probe_.probe(config)))
    return found
