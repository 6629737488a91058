"""`cap eval`: what one model scores on one task, how large and how fast it is, and whether its gates hold.

Beside the task's own texts it can be measured on changed ones (`capcli.perturb`), named METRIC@CHANGE where gates and
differences speak of them, and on other data than those of its run.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capcli import decode, files, gates, hub, metrics, models, noise, perturb, sparse, tasks, tokens
from capcli.config import PERTURBATIONS, EvalConfig, TaskConfig, build, portable, shortened
from capcli.errors import ConfigError, FileError
from capcli.metrics import AGREEMENT, CALIBRATION
from capcli.noise import Estimate
from capcli.run import Event
from capcli.text import finite, mapping, named, part

SCHEMA_VERSION = 1
LATENCY_RUNS = 30


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Metrics of one split, with 95 % intervals, and the truth and outputs they come from; see `capcli.metrics`.

    doubts: what the model could not read of the texts. constant: its answer, where that is the same to all of them.
    """

    metrics: dict[str, float]
    confidence_95: dict[str, list[float]]
    n_examples: int
    kind: str
    truth: Any
    outputs: Any
    seed: int
    doubts: tuple[str, ...] = ()
    constant: str = ""

    def estimates(self) -> dict[str, Estimate]:
        """The metrics with their intervals at any level."""
        return {name: Estimate(value, partial(self._interval, name)) for name, value in self.metrics.items()}

    def _interval(self, name: str, level: float) -> list[float]:
        return metrics.intervals(self.kind, (name,), self.truth, self.outputs, self.seed, level)[name]

    @property
    def calibration(self) -> dict[str, float]:
        """The expected calibration error, by its name; only classification has one."""
        known = self.kind == "classification"
        return {CALIBRATION: metrics.calibration_error(self.truth, self.outputs)} if known else {}

    @property
    def table(self) -> dict[str, Any]:
        """What the result of `cap eval` says of it."""
        return {
            "metrics": self.metrics | self.calibration,
            "confidence_95": self.confidence_95,
            "n_examples": self.n_examples,
        }


def measure(
    model: models.Model,
    examples: tokens.Examples,
    names: tuple[str, ...],
    on: models.Compute,
    event: Callable[..., Event],
    seed: int = 1,
    *,
    with_intervals: bool = True,
) -> Generator[Event, None, Measured]:
    """Metrics `names` of the model on tokenised examples; yields events."""
    logits, _ = yield from models.encoded(model, examples, on, event)
    return scored(model.kind, model.labels, examples, names, logits, seed, with_intervals=with_intervals)


def scored(
    kind: str,
    labels: Sequence[str],
    examples: tokens.Examples,
    names: tuple[str, ...],
    logits: torch.Tensor,
    seed: int = 1,
    *,
    with_intervals: bool = True,
) -> Measured:
    """Metrics `names` of logits of the examples, as `models.encoded` and `onnx_model.outputs` give them."""
    truth, outputs = answers(kind, labels, examples, logits.cpu().double().numpy())
    whole = bool(torch.isfinite(logits).all())  # or the answers would be those of the comparisons with NaN
    values = metrics.measure(kind, names, truth, outputs) if whole else dict.fromkeys(names, math.nan)
    return Measured(
        metrics=values,
        confidence_95=metrics.intervals(kind, names, truth, outputs, seed) if with_intervals and whole else {},
        n_examples=len(truth),
        kind=kind,
        truth=truth,
        outputs=outputs,
        seed=seed,
        doubts=tokens.doubts(examples, examples.split.name) if examples.split else (),
        constant=constant(kind, labels, truth, outputs) if whole else "",
    )


def constant(kind: str, labels: Sequence[str], truth: Any, outputs: Any) -> str:
    """What is answered to every example (word, for tokens) where the truth has more to say; empty otherwise."""
    if kind == "regression":
        values = np.asarray(outputs).reshape(-1)
        same = len(values) > 1 and np.ptp(values) <= 1e-6 * np.abs(values).max() and np.ptp(truth) > 0
        return f"{values[0]:.4g}" if same else ""
    found, true = (_different(kind, some) for some in (metrics.answered(kind, outputs), truth))
    if len(found) != 1 or len(true) < 2:
        return ""
    (one,) = found
    if kind == "classification":
        return repr(labels[one])
    if kind == "multilabel":
        return ", ".join(repr(name) for name, is_true in zip(labels, one, strict=True) if is_true) or "no label"
    return repr(one) if one or kind == "tokens" else "no answer"


def _different(kind: str, answers: Any) -> set[Any]:
    """The answers that differ, in a form that can be compared; of spans the first of each question."""
    if kind == "tokens":
        return {tag for row in answers for tag in row}
    if kind == "spans":
        return {next(iter(row), "") for row in answers}
    rows = np.unique(answers, axis=0)
    return set(rows.tolist()) if kind == "classification" else {tuple(map(bool, row)) for row in rows}


def same_answer(model: str, split: str, answer: str) -> str:
    """The note on a model that gives the same answer to all that it is asked."""
    return f"{model} gives the same answer to everything in {split}: {answer}"


def answers(kind: str, labels: Sequence[str], examples: tokens.Examples, logits: np.ndarray) -> tuple[Any, Any]:
    """Truth and outputs as `capcli.metrics` wants them: tags by sentence, answers by question, else plain logits."""
    split = examples.split
    assert split is not None, "what is measured was read from a split"
    if kind == "tokens":
        assert examples.words is not None
        truth = [[labels[i] for i in row] for row in split.labels]
        n_words = [len(row) for row in truth]
        return truth, decode.tags(logits, examples.offsets, examples.words, labels, n_words)
    if kind == "spans":
        assert examples.owner is not None and examples.chars is not None
        golds = [answers.texts for answers in split.labels]
        contexts = (context for _, pairs in split.chunks() for context in pairs or ())
        where = examples.offsets, examples.owner, examples.chars
        return golds, decode.spans(logits, *where, contexts, len(golds), no_answer=split.no_answer)
    return examples.labels, logits


def encoded(
    model: models.Model, split: tasks.Split, source: TaskConfig, check: Callable[[], None] = lambda: None
) -> tokens.Examples:
    """The split as the model reads it; see `tokens.encode`."""
    length = models.longest_input(model, source.longest)
    return tokens.encode(split, model.tokenizer, length, stride=source.stride, check=check)


def eval_config(chosen: Mapping[str, Any]) -> EvalConfig:
    """The options of `cap eval`; for a pruned model, the task and data that it was pruned on are the default."""
    stored = models.stored_source(str(chosen["model"]))
    if "task" not in chosen and not models.is_artifact(str(chosen["model"])):
        hub.folder(str(chosen["model"]))  # what is wrong with the model goes before what is missing for it
    if chosen.get("task", stored.get("task")) != stored.get("task"):
        stored = {}  # another task has other data and columns
    config: EvalConfig = build(EvalConfig, {**stored, **chosen})
    return config


def evaluate(config: EvalConfig) -> Generator[Event, None, dict[str, Any]]:
    """Measure `config.model`; yields events and returns the result of `cap eval`."""
    on = models.compute(config.hardware)
    yield Event(phase="load", note=f"loading {config.model}")
    data, notes = _data(config)
    _check_gates(config, data)
    _check_baseline(config, data)
    model = models.place(_load(config, config.model, data), on)
    primary, changed = next(iter(data.evals)), _changed(config, data)
    measured = yield from _all(config, data, model, on, {**data.evals, **changed}, "evaluate")
    ours = {"": measured[primary], **{name: measured[name] for name in changed}}
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": config.model,
        "task": data.name,
        "split": primary,
        "primary": data.primary,
        "labels": list(model.labels),
        **_about(config, data),
        **ours[""].table,
        "splits": {name: measured[name].table for name in data.evals},
        "perturbed": {name[1:]: _perturbed(ours[name], ours[""]) for name in changed},
        "seed": config.seed,
        "sparsity": None,
        "size": {},
        "notes": [*data.notes, *model.notes, *notes, *_said(measured, data)],
    }
    result |= _size_and_sparsity(model, config.model)
    yield Event(phase="latency", note="measuring latency")
    result["latency"] = latency(model, on, config.latency_batch, config.latency_length)
    found = yield from _compared(config, data, on, {"": data.evals[primary], **changed}, ours)
    result["baseline"] = found.baseline
    result["retention"] = retention(ours[""].metrics, (found.baseline or {}).get("metrics", {}))
    result["differences"] = _rows(found.differences)
    result["agreement"] = found.agreement.value if found.agreement else None
    result["notes"] += found.notes
    result["gates"] = gates.check(config.gates, _evidence(data, ours, found, result))
    result["passed"] = all(gate["passed"] for gate in result["gates"])
    return dict(portable(result, config))


# What is measured ----------------------------------------------------------------------------------------------------


def _data(config: EvalConfig) -> tuple[tasks.TaskData, list[str]]:
    """The task's splits with the labels of the model, and what there is to know about their choice."""
    stored, known = models.stored_source(config.model), models.known(config.model, config.source.label_names)
    of_run = config.source.task == stored.get("task") and _same_place(config.source.data, str(stored.get("data")))
    data = tasks.load(
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


def _about(config: EvalConfig, data: tasks.TaskData) -> dict[str, Any]:
    """What was read of the first split, and how far."""
    return {"data": next(iter(data.evals.values())).fingerprint, "max_length": config.source.longest}


def _same_place(a: str, b: str) -> bool:
    return a == b or (bool(a and b) and Path(a).resolve() == Path(b).resolve())


def _origin(task: str, data: str) -> str:
    return f"{task} in {shortened(data)}" if data else task


def _changed(config: EvalConfig, data: tasks.TaskData) -> dict[str, tasks.Split]:
    """The first split with changed texts, as @NAME of the change."""
    first = next(iter(data.evals.values()))
    return {
        f"@{name}": dataclasses.replace(first, change=perturb.Change(name=name, seed=config.seed))
        for name in perturb.offered(data.kind, config.perturbations)
    }


def _check_gates(config: EvalConfig, data: tasks.TaskData) -> None:
    """Raise `ConfigError` for a gate on what will not be measured, or whose limit says nothing."""
    own = [*data.metrics, *[CALIBRATION] * (data.kind == "classification")]
    changes = list(_changed(config, data))
    valid = [*own, *[AGREEMENT] * bool(config.baseline)]
    valid += [name + change for change in changes for name in (*own, AGREEMENT)]
    drops = [name + change for change in ("", *changes) for name in data.metrics]
    ways = {f"{name}@{change}": f"add --perturb {change}" for change in PERTURBATIONS for name in (*own, AGREEMENT)}
    ways[AGREEMENT] = "name a --baseline to agree with"
    gates.require(config.gates, _bounds(valid), _bounds(drops), ways)


def _check_baseline(config: EvalConfig, data: tasks.TaskData) -> None:
    """Raise `CapError` for a baseline that is not there, or does not compare, before anything is measured."""
    if not config.baseline:
        return
    if Path(config.baseline).is_file():
        stored = mapping(files.read_json(Path(config.baseline)))
        _report_row(config, stored, data, len(next(iter(data.evals.values()))))
    elif not models.is_artifact(config.baseline):
        hub.folder(config.baseline)


def _bounds(names: Sequence[str]) -> dict[str, tuple[float, float]]:
    return {name: metrics.bounds(name.partition("@")[0]) for name in names}


def _load(config: EvalConfig, source: str, data: tasks.TaskData) -> models.Model:
    names = config.source.label_names
    return models.load_model(source, data.classes, data.kind, config.seed, need_head=True, label_map=names)


def _all(
    config: EvalConfig,
    data: tasks.TaskData,
    model: models.Model,
    on: models.Compute,
    splits: Mapping[str, tasks.Split],
    phase: str,
) -> Generator[Event, None, dict[str, Measured]]:
    """The model measured on each of the splits."""
    found = {}
    for index, (name, split) in enumerate(splits.items()):
        examples = encoded(model, split, config.source)

        def event(done: float, total: float, index: int = index, name: str = name) -> Event:
            share = (index + done / total) / len(splits)
            return Event(phase=f"{phase} {name.lstrip('@')}".rstrip(), done=done, total=total, overall=share)

        found[name] = yield from measure(model, examples, data.metrics, on, event, config.seed)
    return found


def _said(measured: Mapping[str, Measured], data: tasks.TaskData) -> list[str]:
    """What the result says of texts that the model could not read, and of answers that are all the same."""
    doubts = [doubt for name in data.evals for doubt in measured[name].doubts]
    return doubts + [same_answer("the model", name, one.constant) for name, one in measured.items() if one.constant]


def _perturbed(ours: Measured, plain: Measured) -> dict[str, Any]:
    """What the result says of changed texts, compared with the same texts as they are."""
    differences, _ = paired(ours, plain)
    return {
        **{name: value for name, value in ours.table.items() if name != "n_examples"},
        "differences": _rows(differences),
        AGREEMENT: agreed(ours, plain).value,
    }


def _rows(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
    return {name: one.row() for name, one in estimates.items()}


# Size and speed -----------------------------------------------------------------------------------------------------


def _size_and_sparsity(model: models.Model, source: str) -> dict[str, Any]:
    """What is not there or zero in the network as loaded, of what was before it was sliced; and bytes on disk."""
    weights = Path(source) / models.WEIGHTS_FILE
    n, total = model.before_slicing.prunable, model.before_slicing.total
    removed = n - model.nonzero()
    size: dict[str, Any] = {"dense_bytes": 4 * total, "weights_bytes": 4 * total}
    if weights.is_file():
        size |= {
            "artifact_bytes": sum(path.stat().st_size for path in models.artifact_files(Path(source))),
            "weights_bytes": weights.stat().st_size,
            "codings": codings(weights),
        }
    return {"sparsity": {"achieved": removed / n, "whole_model": removed / total}, "size": size}


def codings(weights: Path) -> dict[str, int]:
    """How many matrices of a weight file are stored in each coding."""
    counts: dict[str, int] = {}
    for entry in sparse.inspect(weights):
        if entry.kept is not None:
            counts[entry.coding] = counts.get(entry.coding, 0) + 1
    return counts


def latency(model: models.Model, on: models.Compute, batch: int, length: int) -> dict[str, Any]:
    """Milliseconds of a forward pass over `batch` inputs of `length` tokens: median, 10th and 90th percentile.

    confidence_95 of the median is the noise of this process; that between processes and machines comes on top.
    """
    length = models.longest_input(model, length)
    inputs = {name: tensor.to(on.device) for name, tensor in full_inputs(model.tokenizer, batch, length).items()}
    seconds = []
    with torch.inference_mode(), on.autocast():
        for _ in range(LATENCY_RUNS + 3):
            began = time.perf_counter()
            models.forward(model, inputs)
            if on.device.type == "cuda":
                torch.cuda.synchronize(on.device)
            seconds.append(time.perf_counter() - began)
    times = sorted(1000 * value for value in seconds[3:])
    return {
        "median_ms": statistics.median(times),
        "p10_ms": times[len(times) // 10],
        "p90_ms": times[len(times) * 9 // 10],
        "confidence_95": median_interval(times),
        "batch": batch,
        "length": length,
        "threads": torch.get_num_threads(),
        "device": on.device.type,
        "hardware": on.name,
        "precision": on.precision,
    }


def median_interval(values: Sequence[float], level: float = 0.95) -> list[float]:
    """Interval of the median, from one value to another of those that ascend, whatever their distribution.

    The number of values below the median is binomial (David and Nagaraja 2003, section 7.1). Of too few values: NaN.
    """
    from scipy.stats import binom

    n = len(values)
    first = int(binom.ppf((1 - level) / 2, n, 0.5))
    return [values[first - 1], values[n - first]] if first else [math.nan] * 2


def full_inputs(tokenizer: Any, batch: int, length: int) -> Any:
    """`batch` inputs of `length` tokens each, as latency is measured on."""
    text = "a " * length  # each word is a token at least
    return tokenizer([text] * batch, truncation=True, max_length=length, return_tensors="pt")


# The baseline --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What the baseline gives: its row of the result, ours minus and ours by its metrics, how often both agree."""

    baseline: dict[str, Any] | None = None
    differences: dict[str, Estimate] = field(default_factory=dict)
    ratios: dict[str, Estimate] = field(default_factory=dict)
    agreement: Estimate | None = None
    notes: tuple[str, ...] = ()


def _compared(
    config: EvalConfig,
    data: tasks.TaskData,
    on: models.Compute,
    splits: Mapping[str, tasks.Split],
    ours: Mapping[str, Measured],
) -> Generator[Event, None, Compared]:
    """Compare with a report about as many examples, or with a model on the same ones; changed texts with changed."""
    if not config.baseline:
        return Compared()
    if Path(config.baseline).is_file():
        return _with_report(config, data, ours)
    model = models.place(_load(config, config.baseline, data), on)
    theirs = yield from _all(config, data, model, on, splits, "baseline")
    differences: dict[str, Estimate] = {}
    ratios: dict[str, Estimate] = {}
    for change, one in ours.items():
        by_name = paired(one, theirs[change])
        differences |= {name + change: value for name, value in by_name[0].items()}
        ratios |= {name + change: value for name, value in by_name[1].items()}
    row = {"model": config.baseline, **theirs[""].table}
    row["perturbed"] = {change[1:]: one.table for change, one in theirs.items() if change}
    same = theirs[""].constant
    return Compared(
        baseline=row,
        differences=differences,
        ratios=ratios,
        agreement=agreed(ours[""], theirs[""]),
        notes=(same_answer("the baseline", next(iter(data.evals)), same),) if same else (),
    )


def paired(ours: Measured, theirs: Measured) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    """Differences (ours minus theirs) and ratios of the metrics, with the noise of examples that both answered.

    Ratios only to values above zero.
    """
    names = list(ours.metrics)
    draws = metrics.resampled(ours.kind, names, ours.truth, [ours.outputs, theirs.outputs], ours.seed)
    differences = {
        name: noise.sampled(ours.metrics[name] - theirs.metrics[name], draws[name][0] - draws[name][1])
        for name in names
    }
    ratios = {
        name: noise.sampled_ratio(ours.metrics[name] / theirs.metrics[name], *draws[name])
        for name in names
        if theirs.metrics[name] > 0
    }
    return differences, ratios


def agreed(ours: Measured, theirs: Measured) -> Estimate:
    """How often two answer alike, see `metrics.agreement`; NaN for regression."""
    value = metrics.agreement(ours.kind, ours.outputs, theirs.outputs)
    if math.isnan(value) or any(map(math.isnan, (*ours.metrics.values(), *theirs.metrics.values()))):
        return Estimate(math.nan)
    name, answers = metrics.AGREEING[ours.kind], metrics.answered(ours.kind, theirs.outputs)
    return Estimate(
        value, lambda level: metrics.intervals(ours.kind, (name,), answers, ours.outputs, ours.seed, level)[name]
    )


def _with_report(config: EvalConfig, data: tasks.TaskData, ours: Mapping[str, Measured]) -> Compared:
    """Compare with a stored result of prune or eval."""
    stored = mapping(files.read_json(Path(config.baseline)))
    row = _report_row(config, stored, data, ours[""].n_examples)
    theirs = _estimates(row)
    perturbed = {change: _report_table(part(stored, "perturbed", change[1:])) for change in ours if change}
    row["perturbed"] = {change[1:]: table for change, table in perturbed.items() if table["metrics"]}
    theirs |= {name + change: one for change, table in perturbed.items() for name, one in _estimates(table).items()}
    mine = {name + change: one for change, found in ours.items() for name, one in found.estimates().items()}
    both = [name for name in mine if name in theirs]
    exact = [name for name in both if theirs[name].at is None]
    note = f"{config.baseline} has no intervals of {', '.join(exact)}: the values count as exact"
    return Compared(
        baseline=row,
        differences={name: noise.difference(mine[name], theirs[name]) for name in both},
        ratios={name: noise.ratio(mine[name], theirs[name]) for name in both if theirs[name].value > 0},
        notes=(note,) if exact else (),
    )


def _report_row(config: EvalConfig, stored: Mapping[str, Any], data: tasks.TaskData, n_examples: int) -> dict[str, Any]:
    path, table = config.baseline, part(stored, "metrics")
    found = _report_table({"metrics": table["pruned"], **table} if "pruned" in table else stored)
    if not found["metrics"]:
        raise FileError(
            f"{path} holds no metrics", "--baseline takes a model, an artefact, or a report of prune or eval"
        )
    if stored.get("task") not in (None, data.name):
        raise ConfigError(f"{path} is about task {stored['task']}, not {data.name}")
    theirs = {name: table.get(name, stored.get(name)) for name in ("n_examples", "split", *noise.DATA)}
    ours = {"n_examples": n_examples, "split": next(iter(data.evals)), **_about(config, data)}
    if what := noise.differing(theirs, ours, [name for name in ours if theirs[name] is not None]):
        raise ConfigError(
            f"{path} and {config.model} differ in {what}: {named(theirs[what])} and {ours[what]}",
            "compare on the same examples: same --data, --max-length and --max-eval-samples",
        )
    return {"model": path, **found}


def _report_table(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that a stored result holds, and their intervals."""
    values = {name: value for name, one in part(stored, "metrics").items() if (value := finite(one)) is not None}
    ends = part(stored, "confidence_95")
    return {
        "metrics": values,
        "confidence_95": {name: list(ends[name]) for name in values if _is_interval(ends.get(name))},
    }


def _is_interval(ends: Any) -> bool:
    return isinstance(ends, list) and len(ends) == 2 and None not in map(finite, ends)


def _estimates(table: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: noise.stored(value, table["confidence_95"].get(name)) for name, value in table["metrics"].items()}


def retention(ours: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """Share of each baseline metric that is kept; only for baselines above zero."""
    known = {name: value for name, value in baseline.items() if value is not None and value > 0}
    return {name: value / known[name] for name, value in ours.items() if name in known}


def _evidence(
    data: tasks.TaskData, ours: Mapping[str, Measured], found: Compared, result: Mapping[str, Any]
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
