"""`cap eval`: what one model scores on one task, how large and how fast it is, and whether its gates hold.

Beside the task's own texts it can be measured on changed ones (`data.perturb`), named METRIC@CHANGE where gates and
differences speak of them, and on other data than those of its run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from capcli import parallel
from capcli.config.layers import build
from capcli.config.measure import EvalConfig
from capcli.config.names import PERTURBATIONS
from capcli.config.paths import portable, shortened
from capcli.data import dataset, perturb, texts
from capcli.data.kinds import KINDS
from capcli.data.splits import Split, TaskData
from capcli.errors import ConfigError
from capcli.events import Event, told
from capcli.measuring import breakdown, chance, gates, latency, metrics, noise
from capcli.measuring.baselines import (
    Compared,
    exits_used,
    load_for,
    rows_of,
    same_place,
    stored_baseline,
    with_model,
    with_report,
)
from capcli.measuring.metrics import AGREEMENT, CALIBRATION
from capcli.measuring.noise import Estimate
from capcli.measuring.scoring import Measured, agreed, encoded, measure, paired, retention, splits_answered
from capcli.measuring.size import size, sparsity
from capcli.models import artifact, devices, loading, tokenizers
from capcli.models.predictor import Predictor
from capcli.records.codec import from_json, to_json
from capcli.records.measured import EvalResult, Perturbed
from capcli.records.parts import Latency
from capcli.reporting.exits import early
from capcli.sources import hub

REMEDY = "prune it with a lower --sparsity, more --epochs or more training data"


def eval_config(chosen: Mapping[str, Any]) -> EvalConfig:
    """The options of `cap eval`; for a pruned model, the task and data that it was pruned on are the default."""
    stored = artifact.stored_source(str(chosen["model"]))
    if "task" not in chosen and not tokenizers.is_artifact(str(chosen["model"])):
        hub.folder(str(chosen["model"]))  # what is wrong with the model goes before what is missing for it
    if chosen.get("task", stored.get("task")) != stored.get("task"):
        stored = {}  # another task has other data and columns
    if "data" in chosen or "text" in chosen:  # what is measured on is one of the two
        others = ("data", "text", *["group_column"] * ("text" in chosen))  # without labels nothing is ranked
        stored = {name: value for name, value in stored.items() if name not in others}
    values = {**stored, **chosen}
    if "data" not in chosen and (teacher := artifact.known(str(chosen["model"])).teacher if stored else ""):
        values = {"baseline": teacher, **values}
    config: EvalConfig = build(EvalConfig, values)
    return config


def evaluate(config: EvalConfig) -> Generator[Event, None, EvalResult]:
    """Measure `config.model`; yields events and returns the result of `cap eval`. Common to all ranks."""
    with parallel.joined(config.timeout):
        return (yield from _evaluated(config))


def _evaluated(config: EvalConfig) -> Generator[Event, None, EvalResult]:
    devices.compute(config.hardware)  # what is wrong with the device is said before anything is read
    yield Event(phase="load", note=f"loading {config.model}")
    data, notes = _data(config)
    _check_gates(config, data)
    _check_baseline(config, data)
    model = load_for(config, config.model, data, config.runtime, config.exits_below)
    if model.chosen:
        yield Event(phase="load", note=model.chosen)
    other = _other_model(config, data)
    data = yield from _with_answers(config, data, other)
    primary, changed = next(iter(data.evals)), _changed(config, data)
    measured = yield from _measured(config, data, model, {**data.evals, **changed}, "evaluate")
    left = exits_used(model)
    ours = {"": measured[primary], **{name: measured[name] for name in changed}}
    found = yield from _compared(config, data, {"": data.evals[primary], **changed}, ours, other)
    speed, theirs = yield from _latencies(config, data, model, other)
    baseline = dataclasses.replace(found.baseline, latency=theirs) if found.baseline and theirs else found.baseline
    split, scores = data.evals[primary], ours[""].table
    sized, said = size(model, config.model), [model.chosen] * bool(model.chosen)
    checked = gates.check(config.gates, _evidence(data, ours, found, sized.weights_bytes, speed))
    result = EvalResult(
        model=config.model,
        task=data.name,
        split=primary,
        reference=data.reference,
        primary=data.primary,
        labels=tuple(model.labels),
        data=split.fingerprint if data.has_labels else split.answers_fingerprint,
        max_length=config.source.longest,
        metrics=scores.metrics,
        confidence_95=scores.confidence_95,
        n_examples=scores.n_examples,
        chance=scores.chance,
        at_chance=scores.at_chance,
        splits={name: measured[name].table for name in data.evals},
        by_label=breakdown.by_label(
            model.labels, ours[""], found.scored if isinstance(found.scored, Measured) else None
        )
        if data.has_labels
        else None,
        perturbed={name[1:]: _perturbed(ours[name], ours[""]) for name in changed},
        seed=config.seed,
        runtime=model.row,
        exits=left,
        sparsity=sparsity(model.model) if model.model else None,
        size=sized,
        notes=(
            *data.notes,
            *model.notes,
            *said,
            *([early(left)] if left else []),
            *notes,
            *_said(config, data, measured, found),
            *found.notes,
            *model.on.room.notes,
        ),
        latency=speed,
        baseline=baseline,
        retention=retention(ours[""].metrics, baseline.metrics, baseline.at_chance) if baseline else {},
        differences=rows_of(found.differences),
        agreement=found.agreement.value if found.agreement else None,
        gates=checked,
        passed=all(gate.passed for gate in checked),
    )
    return portable(result, config)


# What is measured ----------------------------------------------------------------------------------------------------


def _data(config: EvalConfig) -> tuple[TaskData, list[str]]:
    """The task's splits with the labels of the model, and what there is to know about their choice."""
    stored, known = artifact.stored_source(config.model), artifact.known(config.model, config.source.label_names)
    of_run, source = _of_run(config, stored), config.source
    share = known.holdout if of_run else 0.0
    if source.text:
        data = texts.open_task(
            source, known.labels, "baseline", holdout=share, seed=known.seed, no_answer=known.no_answer
        )
    else:
        data = dataset.load(
            source,
            train=False,
            holdout=share,
            seed=known.seed,
            known=known.labels if known.ours else (),
            perhaps=known.labels,
            no_answer=known.no_answer,
        )
        if config.baseline and not Path(config.baseline).is_file():
            data = dataset.comparable(data, "baseline")
    if not data.metrics:
        raise ConfigError(
            f"the texts of {data.name} have no scores, so there is nothing to measure without another model",
            "give the model before pruning to compare with: --baseline MODEL",
        )
    notes = []
    if stored and not of_run:
        here = _origin(data.name, source.data or source.text)
        there = _origin(stored["task"], stored["data"] or stored.get("text", ""))
        notes.append(f"measured on other data than those of the run: {here}; the model was pruned on {there}")
    if left_out := set(config.perturbations) - set(perturb.offered(data.kind, config.perturbations)):
        notes.append(f"not measured: {', '.join(sorted(left_out))}; each word of {data.name} has its own label")
    return data, notes


def _of_run(config: EvalConfig, stored: Mapping[str, Any]) -> bool:
    """Whether the data are those that the model was pruned on, as its folder has `stored` them."""
    places = [(vars(config.source)[name], str(stored.get(name, ""))) for name in artifact.PLACES]
    return config.source.task == stored.get("task") and all(same_place(*pair) for pair in places)


def _with_answers(config: EvalConfig, data: TaskData, other: Predictor | None) -> Generator[Event, None, TaskData]:
    """The data with the answers of the `other` model, where metrics compare with them."""
    if not data.compares:
        return data
    assert other is not None, "_check_baseline lets only models through"

    def event(done: float, total: float) -> Event:
        return Event(phase="answers of the baseline", done=done, total=total, overall=0.0)

    found = yield from told(splits_answered(other, data.evals, config.source), event)
    return dataclasses.replace(data, evals=found)


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
    config: EvalConfig,
    data: TaskData,
    splits: Mapping[str, Split],
    ours: Mapping[str, Measured],
    other: Predictor | None,
) -> Generator[Event, None, Compared]:
    """Compare with the baseline, if there is one: the `other` model on the same examples, or a stored result."""
    if other:
        theirs = yield from _measured(config, data, other, splits, "baseline")
        return with_model(config, data, ours, theirs)
    return with_report(config, data, ours) if config.baseline else Compared()


def _other_model(config: EvalConfig, data: TaskData) -> Predictor | None:
    """The baseline, if it is a model."""
    if not config.baseline or Path(config.baseline).is_file():
        return None
    return load_for(config, config.baseline, data)


def _latencies(
    config: EvalConfig, data: TaskData, model: Predictor, other: Predictor | None
) -> Generator[Event, None, tuple[Latency, Latency | None]]:
    """What the result says of the latency of the model and of the baseline, if that is one, measured in turn."""
    yield Event(phase="latency", note="measuring latency" + ", in turn with the baseline" * bool(other))
    split, batch, length = next(iter(data.evals.values())), config.latency_batch, config.latency_length
    systems = {
        name: latency.of(one, encoded(one, split, config.source), batch=batch, length=length)
        for name, one in {"model": model, "baseline": other}.items()
        if one
    }

    def event(done: float, total: float) -> Event:
        return Event(phase="latency", done=done, total=total, overall=done / total)

    found = (yield from told(latency.measured(systems, config.seed), event)) if parallel.first() else {}
    rows = parallel.share({name: to_json(one) for name, one in found.items()})
    found = {name: from_json(Latency, row, "a latency") for name, row in rows.items()}
    return found["model"], found.get("baseline")


def _check_gates(config: EvalConfig, data: TaskData) -> None:
    """Raise `ConfigError` for a gate on what will not be measured, or whose limit says nothing."""
    own = [*data.metrics, *[CALIBRATION] * (KINDS[data.kind].single and data.has_labels)]
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
        if not data.has_labels:
            raise ConfigError(
                f"{config.baseline} is a stored result, without the answers to agree with", "name the model itself"
            )
        stored_baseline(config, data, next(iter(data.evals.values())).n_measured)
    else:
        loading.check_head(config.baseline, data.classes, data.kind, config.source.label_names)


def _bounds(names: Sequence[str]) -> dict[str, tuple[float, float]]:
    return {name: metrics.bounds(name.partition("@")[0]) for name in names}


def _said(config: EvalConfig, data: TaskData, measured: Mapping[str, Measured], found: Compared) -> list[str]:
    """What the result says of texts that the model could not read, and of models that are no better than guessing.

    Of changed texts only where the model is better on the unchanged ones.
    """
    said, first = [doubt for name in data.evals for doubt in measured[name].doubts], next(iter(data.evals))
    remedy = REMEDY if _of_run(config, artifact.stored_source(config.model)) else ""
    for name, one in measured.items():
        models: dict[str, chance.Scored] = {"the model": one}
        if name == first and found.scored:
            models["the baseline"] = found.scored
        if name in data.evals:
            said += chance.doubts(models, name, data.primary, remedy * (data.primary in one.at_chance))
        elif data.primary not in measured[first].at_chance:
            said += chance.doubts(models, f"{first} with {name[1:]}", data.primary)
    return said


def _perturbed(ours: Measured, plain: Measured) -> Perturbed:
    """What the result says of changed texts, compared with the same texts as they are."""
    differences, _ = paired(ours, plain)
    return Perturbed(
        metrics=ours.table.metrics,
        confidence_95=ours.table.confidence_95,
        differences=rows_of(differences),
        agreement=agreed(ours, plain).value,
    )


def _evidence(
    data: TaskData, ours: Mapping[str, Measured], found: Compared, weights_bytes: int | None, speed: Latency
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
    theirs = dict(found.baseline.metrics) if found.baseline else {}
    for change, scores in found.baseline.perturbed.items() if found.baseline else ():
        theirs |= {f"{name}@{change}": value for name, value in scores.metrics.items()}
    return gates.Evidence(
        primary=data.primary,
        metrics=values,
        baseline=theirs,
        differences=found.differences,
        ratios=found.ratios,
        at_chance=found.at_chance,
        weights_bytes=weights_bytes,
        latency_ms=noise.stored(speed.median_ms, speed.confidence_95),
    )
