"""`cap eval`: what one model scores on one task, how large and how fast it is, and whether its gates hold."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capcli import decode, files, hub, metrics, models, sparse, tasks, tokens
from capcli.config import EvalConfig, Gates, TaskConfig, build, parse_limits
from capcli.errors import ConfigError, FileError
from capcli.run import Event

SCHEMA_VERSION = 1
LATENCY_RUNS = 30


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Metrics of one split, with 95 % intervals and the outputs that they come from; see `capcli.metrics`."""

    metrics: dict[str, float]
    confidence_95: dict[str, list[float]]
    n_examples: int
    outputs: Any


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
    truth, outputs = _answers(kind, labels, examples, logits.cpu().double().numpy())
    return Measured(
        metrics=metrics.measure(kind, names, truth, outputs),
        confidence_95=metrics.intervals(kind, names, truth, outputs, seed) if with_intervals else {},
        n_examples=len(truth),
        outputs=outputs,
    )


def _answers(kind: str, labels: Sequence[str], examples: tokens.Examples, logits: np.ndarray) -> tuple[Any, Any]:
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
    same_data = config.source.data == models.stored_source(config.model).get("data")
    known = models.known(config.model, config.label_names)
    holdout = known.holdout if same_data else 0.0
    data = tasks.load(
        config.source,
        train=False,
        holdout=holdout,
        seed=known.seed,
        known=known.labels if known.ours else (),
        perhaps=known.labels,
        no_answer=known.no_answer,
    )
    model = models.place(_load(config, config.model, data), on)
    splits = {}
    for index, (name, split) in enumerate(data.evals.items()):
        examples = encoded(model, split, config.source)

        def event(done: float, total: float, index: int = index, name: str = name) -> Event:
            share = (index + done / total) / len(data.evals)
            return Event(phase=f"evaluate {name}", done=done, total=total, overall=share)

        splits[name] = yield from measure(model, examples, data.metrics, on, event, config.seed)
    primary = next(iter(splits))
    found = splits[primary]
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": config.model,
        "task": data.name,
        "split": primary,
        "primary": data.primary,
        "labels": list(model.labels),
        "metrics": found.metrics,
        "confidence_95": found.confidence_95,
        "n_examples": found.n_examples,
        "splits": {
            name: {"metrics": one.metrics, "confidence_95": one.confidence_95, "n_examples": one.n_examples}
            for name, one in splits.items()
        },
        "sparsity": None,
        "size": {},
        "notes": [*data.notes, *model.notes],
    }
    result |= _size_and_sparsity(model, config.model)
    yield Event(phase="latency", note="measuring latency")
    result["latency"] = latency(model, on, config.latency_batch, config.latency_length)
    result["baseline"] = yield from _baseline(config, data, on, found.n_examples)
    result["retention"] = retention(found.metrics, (result["baseline"] or {}).get("metrics", {}))
    result["gates"] = check_gates(config.gates, result)
    result["passed"] = all(gate["passed"] for gate in result["gates"])
    return result


def _load(config: EvalConfig, source: str, data: tasks.TaskData) -> models.Model:
    return models.load_model(source, data.classes, data.kind, config.seed, need_head=True, label_map=config.label_names)


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


def _baseline(
    config: EvalConfig, data: tasks.TaskData, on: models.Compute, n_examples: int
) -> Generator[Event, None, dict[str, Any] | None]:
    """Metrics of the baseline: read from a report about as many examples, or measured on the same ones."""
    if not config.baseline:
        return None
    path = Path(config.baseline)
    if path.is_file():
        stored = files.read_json(path)
        table = stored.get("metrics", {}) if isinstance(stored, dict) else {}
        found = table.get("pruned", table) if isinstance(table, dict) else {}
        numbers = {name: float(v) for name, v in found.items() if isinstance(v, int | float)}
        if not numbers:
            raise FileError(
                f"{path} holds no metrics", "--baseline takes a model, an artefact, or a report of prune or eval"
            )
        if stored.get("task") not in (None, data.name):
            raise ConfigError(f"{path} is about task {stored['task']}, not {data.name}")
        if (theirs := table.get("n_examples", stored.get("n_examples"))) not in (None, n_examples):
            raise ConfigError(
                f"{path} was measured on {theirs} examples, {config.model} on {n_examples}",
                "compare on the same examples: same --data and --max-eval-samples",
            )
        return {"model": config.baseline, "metrics": numbers}
    model = models.place(_load(config, config.baseline, data), on)
    name, split = next(iter(data.evals.items()))
    examples = encoded(model, split, config.source)

    def event(done: float, total: float) -> Event:
        return Event(phase=f"baseline {name}", done=done, total=total, overall=done / total)

    measured = yield from measure(model, examples, data.metrics, on, event, config.seed)
    return {"model": config.baseline, "metrics": measured.metrics}


def retention(ours: Mapping[str, float], baseline: Mapping[str, float]) -> dict[str, float]:
    """Share of each baseline metric that is kept; only for baselines above zero."""
    known = {name: value for name, value in baseline.items() if value is not None and value > 0}
    return {name: value / known[name] for name, value in ours.items() if name in known}


def latency(model: models.Model, on: models.Compute, batch: int, length: int) -> dict[str, Any]:
    """Milliseconds of a forward pass over `batch` inputs of `length` tokens: median, 10th and 90th percentile."""
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
        "batch": batch,
        "length": length,
        "threads": torch.get_num_threads(),
        "device": on.device.type,
        "hardware": on.name,
        "precision": on.precision,
    }


def full_inputs(tokenizer: Any, batch: int, length: int) -> Any:
    """`batch` inputs of `length` tokens each, as latency is measured on."""
    text = "a " * length  # each word is a token at least
    return tokenizer([text] * batch, truncation=True, max_length=length, return_tensors="pt")


def check_gates(gates: Gates, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per gate. A missing or NaN value fails its gate."""
    ours, baseline = result["metrics"], (result.get("baseline") or {}).get("metrics", {})
    rows = [_gate(f"min {n}", n, ">=", limit, ours.get(n)) for n, limit in parse_limits("--min", gates.min).items()]
    for name, limit in parse_limits("--max-drop", gates.max_drop).items():
        both = name in ours and name in baseline
        rows.append(_gate(f"max drop {name}", name, "<=", limit, baseline[name] - ours[name] if both else None))
    if gates.min_retention:
        name = result["primary"]
        rows.append(_retention_gate(name, gates.min_retention, result))
    if gates.max_bytes:
        rows.append(_gate("max bytes", "weights_bytes", "<=", gates.max_bytes, result["size"].get("weights_bytes")))
    if gates.max_latency_ms:
        rows.append(_gate("max latency", "median_ms", "<=", gates.max_latency_ms, result["latency"].get("median_ms")))
    return rows


def _retention_gate(name: str, limit: float, result: Mapping[str, Any]) -> dict[str, Any]:
    row = _gate("min retention", f"retention of {name}", ">=", limit, result["retention"].get(name))
    theirs = (result.get("baseline") or {}).get("metrics", {}).get(name)
    if row["value"] is None and theirs is not None and name in result["metrics"]:
        row["message"] = f"retention of {name} has no meaning: the baseline's is {theirs:.6g}, not above zero"
    return row


def _gate(name: str, metric: str, op: str, limit: float, value: float | None) -> dict[str, Any]:
    known = value is not None and math.isfinite(value)
    passed = known and value is not None and (value >= limit if op == ">=" else value <= limit)
    shown = f"{value:.6g}" if known else "not measured"
    message = f"{metric} is {shown}, must be {op} {limit:g}"
    return {
        "name": name,
        "metric": metric,
        "op": op,
        "limit": limit,
        "value": value if known else None,
        "passed": bool(passed),
        "message": message,
    }
