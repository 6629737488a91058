"""From options with lists to the runs of a sweep."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capcli import machine
from capcli.config.layers import build, layered, run_config, usual_sparsity
from capcli.config.names import AUTO, BUILTIN_TASKS, METHODS, OF_CRITERION, ONCE
from capcli.config.options import flatten, leaves, split_list
from capcli.config.presets import preset_values
from capcli.config.prune import PruneConfig
from capcli.config.sweep import MOST_RUNS, Cell, SweepConfig, SweepOptions, cell_name, listed, numbers, words_of
from capcli.errors import ConfigError

OF_SWEEP = frozenset(item.name for item, _ in leaves(SweepOptions))
OF_THE_WHOLE = ("out", "max_time")  # what a run of a sweep does not have for itself


def sweep_config(chosen: Mapping[str, Any], file: str = "") -> SweepConfig:
    """Layer preset, `--config` file and the options the user chose into what `cap prune` does: one run or a sweep.

    `sparsity`, `method` and `seeds` may be lists, in Python also texts with commas. Raises `ConfigError`.
    """
    layers = layered("prune", chosen, file)
    options = build(SweepOptions, {**layers, "seeds": listed(layers.get("seeds", ""))})
    given = {name: value for name, value in layers.items() if name not in OF_SWEEP}
    methods = split_list(listed(given.get("method"))) or (given.get("method"),)
    sparsities = numbers(given.get("sparsity", usual_sparsity(given)))
    seeds = _seeds(options, given)
    n_runs = len(methods) * len(sparsities) * len(seeds)
    if n_runs == 1:
        if options.jobs > 1:
            raise ConfigError("--jobs is for a sweep, this is one run", "leave it out, or give several of --seeds")
        own = {"method": methods[0], "sparsity": sparsities[0], "seed": seeds[0]}
        return SweepConfig(run=run_config({**given, **own}), gates=options.gates)
    if n_runs > MOST_RUNS:
        raise ConfigError(f"a sweep has at most {MOST_RUNS:,} runs, this has {n_runs:,}", "give shorter lists")
    if given.get("stairs", "") not in ("", AUTO, ONCE) and len(sparsities) > 1:
        raise ConfigError(
            f"--stairs leads to one sparsity, but there are {len(sparsities)}",
            f"use --stairs {AUTO} or {ONCE}, or give one --sparsity",
        )
    runs = _runs(given, [(method, s, seed) for seed, method, s in itertools.product(seeds, methods, sparsities)])
    out = runs[0].out or str(runs[0].named("sweep"))
    at_once = min(options.jobs, n_runs, machine.processors())
    threads = given.get("threads", 0) if at_once == 1 else _share(given.get("threads", 0), at_once)
    own = {**given, **({"threads": threads} if threads else {})}
    return SweepConfig(
        run=runs[0],
        gates=options.gates,
        cells=tuple(_cell(run, own, out) for run in runs),
        out=out,
        at_once=at_once,
        max_time=runs[0].max_time,
    )


def explained(chosen: Mapping[str, Any], file: str = "") -> list[tuple[str, Any, str, Any, str]]:
    """(option, value, where it comes from, default, help) of `cap prune` with these options. Raises `ConfigError`.

    Without a task the values are those of classification.
    """
    read = layered("prune", {}, file)
    task = {**read, **chosen}.get("task") or ""
    config = sweep_config({**chosen, "task": task or BUILTIN_TASKS[0]}, file).run
    of_method = OF_CRITERION.get(METHODS[config.method].criterion, {})
    of_preset = preset_values(
        config.preset,
        task=config.source.task,
        criterion=config.criterion,
        structure=config.structure,
        sparsity=config.sparsity,
    )

    def source(name: str) -> str:
        if chosen.get(name) is not None:
            return "command line"
        if name in read:
            return file
        if name not in of_preset:
            return "default"
        alone = name in of_method and of_preset[name] == of_method[name]
        return f"--method {config.method}" if alone else f"--preset {config.preset}"

    values = {**flatten(config), "task": task}
    return [
        (item.name, values[item.name], source(item.name), item.default, item.metadata["help"])
        for item, _ in leaves(PruneConfig)
        if item.metadata
    ]


def _share(threads: int, at_once: int) -> int:
    """The CPU threads of each of several runs."""
    return max(1, (threads or machine.processors()) // at_once)


def _seeds(options: SweepOptions, given: Mapping[str, Any]) -> tuple[int, ...]:
    if "," in options.seeds and "seed" in given:
        raise ConfigError("--seed and the list of --seeds both choose the seeds", "leave one of them out")
    return options.seed_list(given.get("seed", PruneConfig.seed))


def _runs(given: Mapping[str, Any], grid: Sequence[tuple[str | None, float, int]]) -> list[PruneConfig]:
    """The configuration of every run. Raises the first `ConfigError`, which names its run if others are right."""
    runs, errors = [], dict[str, ConfigError]()
    for method, sparsity, seed in grid:
        try:
            runs.append(run_config({**given, "method": method, "sparsity": sparsity, "seed": seed}))
        except ConfigError as error:
            where = f"{method} at sparsity {sparsity:g}" if method else f"sparsity {sparsity:g}"
            errors.setdefault(error.message, ConfigError(f"{where}: {error.message}", error.hint))
    if not errors:
        return runs
    message, named = next(iter(errors.items()))
    raise named if runs or len(errors) > 1 else ConfigError(message, named.hint)


def _cell(run: PruneConfig, given: Mapping[str, Any], out: str) -> Cell:
    """One run inside `out`, with the number of threads that is `given`."""
    name = cell_name(run.method, run.sparsity, run.seed)
    place = str(Path(out, name))
    aim = {} if run.target else {"sparsity": run.sparsity}
    own = {"method": run.method, **aim, "seed": run.seed, "out": place}
    absent = (*OF_THE_WHOLE, *(["sparsity"] if run.target else []))
    kept = {option: value for option, value in given.items() if option not in absent}
    hardware = dataclasses.replace(run.hardware, threads=given.get("threads", run.hardware.threads))
    alone = dataclasses.replace(run, out=place, max_time=0.0, hardware=hardware)
    return Cell(name=name, run=alone, words=words_of(kept, own))
