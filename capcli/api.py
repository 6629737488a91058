"""The commands as functions that run to their end, `load` and `pipeline`. A result is what `--json` prints."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from capcli.config.export import ExportConfig
from capcli.config.measure import EvalConfig, ProbeConfig
from capcli.config.names import RUNTIMES
from capcli.config.options import at_least, check_name
from capcli.config.predict import PredictConfig
from capcli.config.prune import Hardware, PruneConfig
from capcli.config.sweep import SweepConfig
from capcli.errors import ModelError
from capcli.events import finished
from capcli.models import tokenizers
from capcli.predicting.pipeline import Pipeline, opened
from capcli.records.codec import to_json
from capcli.runtime import choice
from capcli.sweeping import sweep as sweep_
from capcli.verbs import evaluate as evaluate_
from capcli.verbs import export as export_
from capcli.verbs import predict as predict_
from capcli.verbs import probe as probe_
from capcli.verbs import prune as prune_


def load(folder: str | os.PathLike[str], runtime: str = "", threads: int = 0) -> Any:
    """The model in a folder that capcli wrote, or in a Hugging Face or ONNX folder, ready to be called with what its
    tokenizer gives; it returns what the network of transformers returns, `logits` for one.

    runtime: by default an ONNX folder is computed by onnxruntime and everything else is a transformers model in eval
    mode, with exactly the weights of the folder. `torch`, `sparse` or `onnx` chooses by name, `auto` takes the faster
    of torch and sparse, and logs why as INFO of the logger `capcli`. threads: of the CPU, 0 for as many as PyTorch
    uses; PyTorch has one number for the whole process.

    Raises `CapError` when a tensor is missing, left over, damaged or of the wrong shape, or when the runtime that was
    asked for cannot compute the model.
    """
    source = os.fspath(folder)
    if runtime:
        check_name("runtime", runtime, RUNTIMES)
    at_least(0, threads=threads)
    if not Path(source).is_dir():
        raise ModelError(f"{source} is not a folder", "load takes a folder of cap prune or cap export")
    return choice.loaded(Path(source), runtime, threads)


def pipeline(
    folder: str | os.PathLike[str], runtime: str = "", threads: int = 0, *, device: str = "cpu", max_length: int = 0
) -> Pipeline:
    """The model in a folder that capcli wrote, or any fine-tuned model, as something to ask: texts go in, answers come
    out. `pipeline(FOLDER)("a text")` is `{"label": …, "score": …}`; see `Pipeline.__call__` for the other kinds.

    runtime, threads: as of `load`. device: for PyTorch, which computes in 16 bits on a GPU that has them. max_length:
    tokens of the longest input; 0 for that of the run, else 128, 384 for questions. Longer texts are truncated.

    Raises `CapError`, as `load` does, and for a model that is for no task.
    """
    if runtime:
        check_name("runtime", runtime, RUNTIMES)
    found = opened(os.fspath(folder), runtime, Hardware(device=device, threads=threads), max_length=max_length)
    if found.model.chosen:
        logging.getLogger("capcli").info(found.model.chosen)
    return found


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer of the model in a folder, as for `load`; its weights are not read."""
    return tokenizers.read_tokenizer(Path(folder))


def prune(config: PruneConfig | SweepConfig, *, overwrite: bool = False) -> dict[str, Any]:
    """Prune a model into `config.out_folder`; returns the report. See `capcli.verbs.prune.prune`.

    Of a configuration by `sweep_config` with several runs it returns the result of the sweep, and raises when some
    failed or none passes its gates; with one run, the report holds the gates. See `capcli.sweeping.sweep.sweep`.
    """
    if isinstance(config, SweepConfig) and config.cells:
        swept: dict[str, Any] = to_json(finished(sweep_.sweep(config, overwrite=overwrite)))
        return swept
    one, gates = (config.run, config.gates) if isinstance(config, SweepConfig) else (config, None)
    found: dict[str, Any] = to_json(finished(prune_.prune(one, overwrite=overwrite, gates=gates)))
    return found


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure a model on a task; returns the result of `cap eval`."""
    found: dict[str, Any] = to_json(finished(evaluate_.evaluate(config)))
    return found


def export(config: ExportConfig) -> dict[str, Any]:
    """Write a pruned model in another form; returns what `cap export` prints."""
    found: dict[str, Any] = to_json(finished(export_.export(config)))
    return found


def predict(config: PredictConfig) -> dict[str, Any]:
    """Write what a model answers to the texts of a file into `config.out`; returns a summary of it."""
    found: dict[str, Any] = to_json(finished(predict_.predict(config)))
    return found


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Measure what a frozen encoder knows; returns the result of `cap probe`."""
    found: dict[str, Any] = to_json(finished(probe_.probe(config)))
    return found
