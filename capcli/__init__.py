"""Make a pre-trained language model small for one task, and prove that it still works.

`load(OUT)` gives the pruned network as a ready transformers model, `pipeline(OUT)` answers texts with it. `prune`,
`evaluate`, `export`, `predict`, `probe` and `push` are the commands as functions: each takes the options of its command
by name, runs to the end and returns a `Result`. Nothing heavy is imported before one of them is used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capcli.api import evaluate, export, load, load_tokenizer, pipeline, predict, probe, prune, push
    from capcli.config.export import ExportConfig
    from capcli.config.grid import sweep_config
    from capcli.config.hardware import Hardware
    from capcli.config.layers import prune_config
    from capcli.config.measure import EvalConfig, Gates, ProbeConfig
    from capcli.config.predict import PredictConfig
    from capcli.config.prune import PruneConfig
    from capcli.config.push import PushConfig
    from capcli.config.sweep import SweepConfig
    from capcli.config.task import TaskConfig
    from capcli.errors import CapError
    from capcli.outcome import Result

__all__ = [
    "CapError",
    "EvalConfig",
    "ExportConfig",
    "Gates",
    "Hardware",
    "PredictConfig",
    "ProbeConfig",
    "PruneConfig",
    "PushConfig",
    "Result",
    "SweepConfig",
    "TaskConfig",
    "__version__",
    "evaluate",
    "export",
    "load",
    "load_tokenizer",
    "pipeline",
    "predict",
    "probe",
    "prune",
    "prune_config",
    "push",
    "sweep_config",
]
_HOMES = {
    "CapError": "errors",
    "EvalConfig": "config.measure",
    "ExportConfig": "config.export",
    "Gates": "config.measure",
    "Hardware": "config.hardware",
    "PredictConfig": "config.predict",
    "ProbeConfig": "config.measure",
    "PruneConfig": "config.prune",
    "PushConfig": "config.push",
    "Result": "outcome",
    "SweepConfig": "config.sweep",
    "TaskConfig": "config.task",
    "prune_config": "config.layers",
    "sweep_config": "config.grid",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("capcli")
    if name not in __all__:
        raise AttributeError(f"module 'capcli' has no attribute {name!r}")
    return getattr(importlib.import_module(f"capcli.{_HOMES.get(name, 'api')}"), name)
