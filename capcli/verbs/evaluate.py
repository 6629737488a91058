"""`cap eval`: what one model scores on one task, how large and how fast it is, and whether its gates hold.

Beside the task's own texts it can be measured on changed ones (`data.perturb`), named METRIC@CHANGE where gates and
differences speak of them, and on other data than those of its run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from capcli.config.layers import build
from capcli.config.measure import EvalConfig
from capcli.config.names import PERTURBATIONS
from capcli.config.paths import portable, shortened
from capcli.data import dataset, perturb
from capcli.data.kinds import KINDS
from capcli.data.splits import Split, TaskData
from capcli.events import Event, told
from capcli.measuring import gates, metrics, noise
from capcli.measuring.baselines import (
    Compared,
    about_data,
    load_for,
    report_row,
    rows_of,
    same_place,
    with_model,
    with_report,
)
from capcli.measuring.latency import latency
from capcli.measuring.metrics import AGREEMENT, CALIBRATION
from capcli.measuring.noise import Estimate
from capcli.measuring.scoring import Measured, agreed, encoded, measure, paired, retention, same_answer
from capcli.measuring.size import size_and_sparsity
from capcli.models import artifact, devices, loading, tokenizers
from capcli.models.predictor import Predictor
from capcli.sources import hub
from capcli.stored import mapping, read_json

SCHEMA_VERSION = 1


def eval_config(chosen: Mapping[str, Any]) -> EvalConfig:
    """The options of `cap eval`; for a pruned model, the task and data that it was pruned on are the default."""
    stored = artifact.stored_source(str(chosen["model"]))
    if "task" not in chosen and not tokenizers.is_artifact(str(chosen["model"])):
        hub.folder(str(chosen["model"]))  # what is wrong with the model goes before what is missing for it
    if chosen.get("task", stored.get("task")) != stored.get("task"):
        stored = {}  # another task has other data and columns
    config: EvalConfig = build(EvalConfig, {**stored, **chosen})
    return config


def evaluate(config: EvalConfig) -> Generator[Event, None, dict[str, Any]]:
    """Measure `config.model`; yields events and returns the result of `cap eval`."""
    devices.compute(config.hardware)  # what is wrong with the device is said before anything is read
    yield Event(phase="load", note=f"loading {config.model}")
    data, notes = _data(config)
    _check_gates(config, data)
    _check_baseline(config, data)
    model = load_for(config, config.model, data, config.runtime)
    if model.chosen:
        yield Event(phase="load", note=model.chosen)
    primary, changed = next(iter(data.evals)), _changed(config, data)
    measured = yield from _measured(config, data, model, {**data.evals, **changed}, "evaluate")
    ours = {"": measured[primary], **{name: measured[name] for name in changed}}
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": config.model,
        "task": data.name,
        "split": primary,
        "primary": data.primary,
        "labels": list(model.labels),
        **about_data(config, data),
        **ours[""].table,
        "splits": {name: measured[name].table for name in data.evals},
        "perturbed": {name[1:]: _perturbed(ours[name], ours[""]) for name in changed},
        "seed": config.seed,
        "runtime": model.row,
        "notes": [*data.notes, *model.notes, *[model.chosen] * bool(model.chosen), *notes, *_said(measured, data)],
    }
    result |= size_and_sparsity(model, config.model)
    yield Event(phase="latency", note="measuring latency")
    result["latency"] = latency(model, config.latency_batch, config.latency_length)
    found = yield from _compared(config, data, {"": data.evals[primary], **changed}, ours)
    result["baseline"] = found.baseline
    result["retention"] = retention(ours[""].metrics, (found.baseline or {}).get("metrics", {}))
    result["differences"] = rows_of(found.differences)
    result["agreement"] = found.agreement.value if found.agreement else None
    result["notes"] += found.notes
    result["gates"] = gates.check(config.gates, _evidence(data, ours, found, result))
    result["passed"] = all(gate["passed"] for gate in result["gates"])
    return dict(portable(result, config))


# What is measured ----------------------------------------------------------------------------------------------------


def _data(config: EvalConfig) -> tuple[TaskData, list[str]]:
    """The task's splits with the labels of the model, and what there is to know about their choice."""
    stored, known = artifact.stored_source(config.model), artifact.known(config.model, config.source.label_names)
    of_run = config.source.task == stored.get("task") and same_place(config.source.data, str(stored.get("data")))
    data = dataset.load(
        config.source,
        train=False,
        holdout=known.holdout if of_run else 0.0,
        seed=known.seed,
        known=known.labels if known.ours else (),
        perhaps=known.labels,
        no_answer=known.no_answer,
    )
    notes = []
    if stored and not of_run:
        here, there = _origin(data.name, config.source.data), _origin(stored["task"], stored["data"])
        notes.append(f"measured on other data than those of the run: {here}; the model was pruned on {there}")
    if left_out := set(config.perturbations) - set(perturb.offered(data.kind, config.perturbations)):
        notes.append(f"not measured: {', '.join(sorted(left_out))}; each word of {data.name} has its own label")
    return data, notes


def _origin(task: str, data: str) -> str:
    return f"{task} in {shortened(data)}" if data else task


def _changed(config: EvalConfig, data: TaskData) -> dict[str, Split]:
    """The first split with changed texts, as @NAME of the change."""
    first = next(iter(data.evals.values()))
    return {
        f"@{name}": dataclasses.replace(first, change=perturb.Change(name=name, seed=config.seed))
        for name in perturb.offered(data.kind, config.perturbations)
    }


def _measured(
    config: EvalConfig, data: TaskData, model: Predictor, splits: Mapping[str, Split], phase: str
) -> Generator[Event, None, dict[str, Measured]]:
    """The model measured on each of the splits."""
    found = {}
    for index, (name, split) in enumerate(splits.items()):
        examples = encoded(model, split, config.source)

        def event(done: float, total: float, index: int = index, name: str = name) -> Event:
            share = (index + done / total) / len(splits)
            return Event(phase=f"{phase} {name.lstrip('@')}".rstrip(), done=done, total=total, overall=share)

        found[name] = yield from told(measure(model, examples, data.metrics, config.seed), event)
    return found


def _compared(
    config: EvalConfig, data: TaskData, splits: Mapping[str, Split], ours: Mapping[str, Measured]
) -> Generator[Event, None, Compared]:
    """Compare with the baseline, if there is one: a stored result, or a model on the same examples."""
    if not config.baseline:
        return Compared()
    if Path(config.baseline).is_file():
        return with_report(config, data, ours)
    model = load_for(config, config.baseline, data)
    theirs = yield from _measured(config, data, model, splits, "baseline")
    return with_model(config, data, ours, theirs)


def _check_gates(config: EvalConfig, data: TaskData) -> None:
    """Raise `ConfigError` for a gate on what will not be measured, or whose limit says nothing."""
    own = [*data.metrics, *[CALIBRATION] * KINDS[data.kind].single]
    changes = list(_changed(config, data))
    valid = [*own, *[AGREEMENT] * bool(config.baseline)]
    valid += [name + change for change in changes for name in (*own, AGREEMENT)]
    drops = [name + change for change in ("", *changes) for name in data.metrics]
    ways = {f"{name}@{change}": f"add --perturb {change}" for change in PERTURBATIONS for name in (*own, AGREEMENT)}
    ways[AGREEMENT] = "give a --baseline to agree with"
    gates.require(config.gates, _bounds(valid), _bounds(drops), ways)


def _check_baseline(config: EvalConfig, data: TaskData) -> None:
    """Raise `CapError` for a baseline that is not there, or does not compare, before anything is measured."""
    if not config.baseline:
        return
    if Path(config.baseline).is_file():
        stored = mapping(read_json(Path(config.baseline)))
        report_row(config, stored, data, len(next(iter(data.evals.values()))))
    else:
        loading.check_head(config.baseline, data.classes, data.kind, config.source.label_names)


def _bounds(names: Sequence[str]) -> dict[str, tuple[float, float]]:
    return {name: metrics.bounds(name.partition("@")[0]) for name in names}


def _said(measured: Mapping[str, Measured], data: TaskData) -> list[str]:
    """What the result says of texts that the model could not read, and of answers that are all the same."""
    doubts = [doubt for name in data.evals for doubt in measured[name].doubts]
    return doubts + [same_answer("the model", name, one.constant) for name, one in measured.items() if one.constant]


def _perturbed(ours: Measured, plain: Measured) -> dict[str, Any]:
    """What the result says of changed texts, compared with the same texts as they are."""
    differences, _ = paired(ours, plain)
    return {
        **{name: value for name, value in ours.table.items() if name != "n_examples"},
        "differences": rows_of(differences),
        AGREEMENT: agreed(ours, plain).value,
    }


def _evidence(
    data: TaskData, ours: Mapping[str, Measured], found: Compared, result: Mapping[str, Any]
) -> gates.Evidence:
    """What the gates look at; what is of changed texts is called METRIC@CHANGE."""
    values: dict[str, Estimate] = {}
    for change, one in ours.items():
        values |= {name + change: value for name, value in one.estimates().items()}
        values |= {name + change: Estimate(value) for name, value in one.calibration.items()}
        if change:
            values[AGREEMENT + change] = agreed(one, ours[""])
    if found.agreement:
        values[AGREEMENT] = found.agreement
    baseline = found.baseline or {}
    theirs = dict(baseline.get("metrics", {}))
    for change, table in baseline.get("perturbed", {}).items():
        theirs |= {f"{name}@{change}": value for name, value in table["metrics"].items()}
    speed = result["latency"]
    return gates.Evidence(
        primary=data.primary,
        metrics=values,
        baseline=theirs,
        differences=found.differences,
        ratios=found.ratios,
        weights_bytes=result["size"].get("weights_bytes"),
        latency_ms=noise.stored(speed["median_ms"], speed["confidence_95"]),
    )
