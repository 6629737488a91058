"""The commands as functions that run to their end, `load` and `pipeline`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from capcli.config.export import ExportConfig
from capcli.config.grid import sweep_config
from capcli.config.hardware import Hardware
from capcli.config.layers import build, check_limits, typed
from capcli.config.measure import EvalConfig, ProbeConfig
from capcli.config.names import RUNTIMES
from capcli.config.options import at_least, check_name, leaves
from capcli.config.predict import PredictConfig
from capcli.config.prune import PruneConfig
from capcli.config.push import PushConfig
from capcli.config.sweep import SweepConfig, SweepOptions
from capcli.errors import ConfigError
from capcli.events import Event
from capcli.models import masks
from capcli.outcome import Result
from capcli.predicting.pipeline import Pipeline, opened
from capcli.progress import Bars, in_notebook, nowhere, on_terminal, watch
from capcli.reporting import terminal
from capcli.runtime import choice
from capcli.sources import hub
from capcli.sweeping import sweep as sweep_
from capcli.verbs import evaluate as evaluate_
from capcli.verbs import export as export_
from capcli.verbs import predict as predict_
from capcli.verbs import probe as probe_
from capcli.verbs import prune as prune_
from capcli.verbs import push as push_


def load(folder: str | os.PathLike[str], runtime: str = "", threads: int = 0, *, base: str = "") -> Any:
    """The model of a folder that capcli wrote, of a Hugging Face or ONNX folder, or of a hub id of one (`me/name` or
    `me/name@revision`), ready to be called with what its tokenizer gives; it returns what the network of transformers
    returns, `logits` for one.

    runtime: by default an ONNX folder is computed by onnxruntime and everything else is a transformers model in eval
    mode, with exactly the weights of the folder. `torch`, `sparse` or `onnx` chooses by name, `auto` takes the faster
    of torch and sparse, and logs why as INFO of the logger `capcli`. A folder with exits gives something to call that
    returns `logits` and `layers`, after how many layers each text was answered; its `threshold` can be set. threads: of
    the CPU, 0 for as many as PyTorch uses; PyTorch has one number for the whole process. base: where the base of masks
    is (`cap export --to mask`), if not where they name it.

    Raises `CapError` when a tensor is missing, left over, damaged or of the wrong shape, or when the runtime that was
    asked for cannot compute the model.
    """
    source = os.fspath(folder)
    if runtime:
        check_name("runtime", runtime, RUNTIMES)
    at_least(0, threads=threads)
    hub.ask_again()
    return choice.loaded(source, runtime, threads, os.fspath(base))


def pipeline(
    folder: str | os.PathLike[str], runtime: str = "", threads: int = 0, *, device: str = "cpu", max_length: int = 0
) -> Pipeline:
    """The model of a folder that capcli wrote, of a hub id of one, or any fine-tuned model, as something to ask: texts
    go in, answers come out. `pipeline(FOLDER)("a text")` is `{"label": …, "score": …}`; see `Pipeline.__call__` for
    the other kinds.

    runtime, threads: as of `load`. device: for PyTorch, which computes in 16 bits on a GPU that has them. max_length:
    tokens of the longest input; 0 for that of the run, else 128, 384 for questions. Longer texts are truncated.

    Raises `CapError`, as `load` does, and for a model that is for no task.
    """
    if runtime:
        check_name("runtime", runtime, RUNTIMES)
    hub.ask_again()
    found = opened(os.fspath(folder), runtime, Hardware(device=device, threads=threads), max_length=max_length)
    if found.model.chosen:
        logging.getLogger("capcli").info(found.model.chosen)
    return found


def load_tokenizer(folder: str | os.PathLike[str], *, base: str = "") -> Any:
    """The tokenizer of a model, as for `load`; its weights are not read."""
    hub.ask_again()
    return masks.tokenizer(os.fspath(folder), os.fspath(base))


def prune(
    config: PruneConfig | SweepConfig | None = None,
    *,
    progress: bool | str = "auto",
    overwrite: bool = False,
    **options: Any,
) -> Result:
    """Prune a model and return the report, see `Result`. What stands in the output folder of the same run is continued.

    Either `options`, named like those of `cap prune` with underscores, or a `config`. Lists, such as
    sparsity="0.8,0.9", make a sweep, whose result is returned; it raises when some runs failed or none passes its
    gates. progress: whether bars are shown; `auto` for on a terminal and in a notebook.

        report = capcli.prune(model="mini", task="banking77", sparsity=0.9, preset="quick", out="runs/small")
        print(report.table())
        report.metrics.pruned["accuracy"]

    Raises `CapError`: `ConfigError` for options that cannot be, before anything is written.
    """
    settings = _sweep(config, options)
    if settings.cells:
        swept = watch(sweep_.sweep(settings, overwrite=overwrite), _shown(progress))
        return Result(swept, lambda: terminal.sweep_summary(swept, settings.out_folder))
    found = watch(prune_.prune(settings.run, overwrite=overwrite, gates=settings.gates), _shown(progress))
    return Result(found, lambda: terminal.prune_summary(found, settings.out_folder))


def evaluate(config: EvalConfig | None = None, *, progress: bool | str = "auto", **options: Any) -> Result:
    """Measure a model on a task; returns what `cap eval` prints, see `Result` and `prune`.

    `evaluate(model="runs/small", baseline="bert-base-finetuned", max_drop="accuracy=1%")`. Gates that fail are in the
    result and raise nothing.
    """
    settings = _configured(config, options, EvalConfig, evaluate_.eval_config)
    found = watch(evaluate_.evaluate(settings), _shown(progress))
    return Result(found, lambda: terminal.result_summary(found))


def export(config: ExportConfig | None = None, *, progress: bool | str = "auto", **options: Any) -> Result:
    """Write a pruned model in another form; returns what `cap export` prints, see `Result` and `prune`.

    `export(model="runs/small", to="onnx", int8=True, out="int8")`, or with limits in place of `to`.
    """
    settings: ExportConfig = _configured(config, options, ExportConfig, _limited(ExportConfig))
    settings.check_asked()
    found = watch(export_.export(settings), _shown(progress))
    return Result(found, lambda: terminal.export_summary(found))


def predict(config: PredictConfig | None = None, *, progress: bool | str = "auto", **options: Any) -> Result:
    """Write what a model answers to the texts of a file into a file; returns a summary, see `Result` and `prune`.

    `predict(model="runs/small", file="reviews.csv", out="answers.jsonl")`. For texts at hand: `pipeline`.
    """
    settings = _configured(config, options, PredictConfig, _limited(PredictConfig))
    found = watch(predict_.predict(settings), _shown(progress))
    return Result(found, lambda: terminal.predict_summary(found))


def push(config: PushConfig | None = None, *, progress: bool | str = "auto", **options: Any) -> Result:
    """Send a folder that capcli wrote to a repository of the hub; returns what `cap push` prints, see `Result`.

    `push(folder="runs/small", repo="me/sst2-small", dry_run=True)` lists the files and sends nothing.
    """
    settings = _configured(config, options, PushConfig, _limited(PushConfig))
    found = watch(push_.push(settings), _shown(progress))
    return Result(found, lambda: terminal.push_summary(found))


def probe(config: ProbeConfig | None = None, *, progress: bool | str = "auto", **options: Any) -> Result:
    """Measure what a frozen encoder knows; returns what `cap probe` prints, see `Result` and `prune`.

    `probe(model="runs/small", tasks="subj,mr", baseline="bert-base")`.
    """
    settings = _configured(config, options, ProbeConfig, _limited(ProbeConfig))
    found = watch(probe_.probe(settings), _shown(progress))
    return Result(found, lambda: terminal.result_summary(found))


# Keyword arguments ---------------------------------------------------------------------------------------------------

C = TypeVar("C")


def _sweep(config: PruneConfig | SweepConfig | None, options: dict[str, Any]) -> SweepConfig:
    """What to prune: the configuration that was given, or that of the options."""
    given = SweepConfig(run=config) if isinstance(config, PruneConfig) else config
    return _configured(given, options, SweepConfig, sweep_config, (PruneConfig, SweepOptions))


def _configured(
    config: C | None,
    options: dict[str, Any],
    kind: type[C],
    build_it: Callable[[dict[str, Any]], C],
    of: Sequence[type] = (),
) -> C:
    """The configuration that was given, or that of the options, which are the fields `of` these, or of `kind`. Raises
    `ConfigError` for both, and for unknown names."""
    hub.ask_again()
    fields = of or (kind,)
    if config is not None:
        name = fields[0].__name__
        if not isinstance(config, kind):
            raise ConfigError(f"expected a {name}, got {type(config).__name__}", "name the options instead")
        if options:
            raise ConfigError(f"{next(iter(options))} beside a {name}", "set it there, or give options only")
        return config
    known = {item.name: (item, what) for one in fields for item, what in leaves(one)}
    given = {name: str(one) if isinstance(one, Path) else one for name, one in options.items() if one is not None}
    for name, value in given.items():
        check_name("option", name, known)
        given[name] = typed(*known[name], value, "the call")
    if "model" in known and not given.get("model"):
        raise ConfigError("no model given", "name one, such as model='mini'")
    return build_it(given)


def _limited(kind: type[C]) -> Callable[[dict[str, Any]], C]:
    """What makes a configuration of this kind from options, after a look at their limits."""

    def made(options: dict[str, Any]) -> C:
        check_limits(options)
        found: C = build(kind, options)
        return found

    return made


def _shown(progress: bool | str) -> Callable[[Event], None]:
    """Bars or nothing. Raises `ConfigError` for a word other than auto."""
    if not isinstance(progress, bool):
        check_name("progress", progress, ("auto",))
    wanted = on_terminal() or in_notebook() if progress == "auto" else progress
    return Bars() if wanted else nowhere
