"""Make a pre-trained language model small for one task, and prove that it still works.

`load(OUT)` gives the pruned network as a ready transformers model. `prune`, `evaluate`, `export` and `probe` are the
four commands as functions: each takes its configuration (`PruneConfig`, …) and runs to the end. Nothing heavy is
imported before one of them is used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capcli.api import evaluate, export, load, load_tokenizer, probe, prune
    from capcli.config import EvalConfig, ExportConfig, ProbeConfig, PruneConfig, TaskConfig, prune_config
    from capcli.errors import CapError

__all__ = [
    "CapError",
    "EvalConfig",
    "ExportConfig",
    "ProbeConfig",
    "PruneConfig",
    "TaskConfig",
    "evaluate",
    "export",
    "load",
    "load_tokenizer",
    "probe",
    "prune",
    "prune_config",
]
_HOMES = {"CapError": "errors", **{name: "config" for name in __all__ if "onfig" in name}}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'capcli' has no attribute {name!r}")
    return getattr(importlib.import_module(f"capcli.{_HOMES.get(name, 'api')}"), name)


class _Verb(ModuleType):
    """A file such as `capcli.prune`, called like the function of its name."""

    def __call__(self, *args: Any, **options: Any) -> dict[str, Any]:
        function = getattr(importlib.import_module("capcli.api"), self.__name__.rpartition(".")[2])
        found: dict[str, Any] = function(*args, **options)
        return found


class _Package(ModuleType):
    """Importing `capcli.prune` binds the file to the name of the function; so that both serve, the file is callable."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("prune", "evaluate", "export", "probe") and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
