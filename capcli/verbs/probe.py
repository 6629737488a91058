"""`cap probe`: what a frozen encoder still knows about tasks that it was not pruned for."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from typing import Any

import numpy as np

from capcli import models, tasks, tokens
from capcli.config import BUILTIN_TASKS, ProbeConfig, TaskConfig
from capcli.metrics import intervals, measure
from capcli.run import Event
from capcli.verbs import evaluate

SCHEMA_VERSION = 1
STRENGTHS = np.logspace(-2, 2, 5)


def probe(config: ProbeConfig) -> Generator[Event, None, dict[str, Any]]:
    """Train a linear classifier on frozen sentence vectors for each task; yields events, returns the result.

    The strength of the regularisation is chosen by cross-validation on the training part.
    """
    on = models.compute(config.hardware)
    found = yield from _probe_model(config, config.model, on)
    result: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "model": config.model, "tasks": found, "baseline": None}
    result["differences"] = {}
    if config.baseline:
        other = yield from _probe_model(config, config.baseline, on)
        result["baseline"] = {"model": config.baseline, "tasks": other}
        result["differences"] = {name: found[name]["mean"] - other[name]["mean"] for name in found}
    result["gates"] = evaluate.check_gates(config.gates, _as_metrics(result))
    result["passed"] = all(gate["passed"] for gate in result["gates"])
    return result


def _as_metrics(result: dict[str, Any]) -> dict[str, Any]:
    """The probes in the shape that gates look at: one metric per task, and their mean as `mean`."""

    def values(found: dict[str, Any]) -> dict[str, float]:
        table = {name: row["mean"] for name, row in found.items()}
        return {**table, "mean": float(np.mean(list(table.values())))}

    ours = values(result["tasks"])
    theirs = values(result["baseline"]["tasks"]) if result["baseline"] else {}
    return {
        "metrics": ours,
        "primary": "mean",
        "baseline": {"metrics": theirs},
        "retention": evaluate.retention(ours, theirs),
        "size": {},
        "latency": {},
    }


def _probe_model(config: ProbeConfig, source: str, on: models.Compute) -> Generator[Event, None, dict[str, Any]]:
    model = models.place(models.load_model(source, None, "classification", config.seed), on)
    found: dict[str, Any] = {}
    for index, name in enumerate(config.task_names):
        share = index / len(config.task_names)
        yield Event(phase=f"probe {name}", overall=share, note=f"probing {source} on {name}")
        found[name] = yield from _probe_task(config, model, name, on, share)
    return found


def _probe_task(
    config: ProbeConfig, model: models.Model, name: str, on: models.Compute, share: float
) -> Generator[Event, None, dict[str, Any]]:
    folder = "" if name in BUILTIN_TASKS or not config.data else f"{config.data}/{name}"
    source = TaskConfig(task=name, data=folder, max_length=config.max_length, max_eval_samples=config.max_eval_samples)
    data = tasks.load(source, max_train=config.max_train_samples, seed=config.seed)
    assert data.train is not None, "a training split was asked for"
    length = models.longest_input(model, source.longest)
    parts = []
    for split in (data.train, next(iter(data.evals.values()))):
        examples = tokens.encode(split, model.tokenizer, length)

        def event(done: float = 0, total: float = 0) -> Event:
            return Event(phase=f"probe {name}", done=done, total=total, overall=share)

        _, vectors = yield from models.encoded(model, examples, on, event, config.pooling, logits=False)
        parts.append((vectors.float().cpu().numpy(), examples.labels))
    outputs = _fitted(*parts[0], parts[1][0], data)
    metric = data.primary
    value = measure(data.kind, (metric,), parts[1][1], outputs)[metric]
    return {
        "metric": metric,
        "mean": value,
        "confidence_95": intervals(data.kind, (metric,), parts[1][1], outputs, config.seed)[metric],
        "n_examples": len(parts[1][1]),
        "n_classes": len(data.labels),
    }


def _fitted(vectors: Any, labels: Any, test: Any, data: tasks.TaskData) -> Any:
    """Outputs [N, C] of a linear model for the `test` vectors [N, H]."""
    from sklearn.linear_model import LogisticRegressionCV, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if data.kind == "regression":
        return make_pipeline(StandardScaler(), RidgeCV(1 / STRENGTHS)).fit(vectors, labels).predict(test)[:, None]
    fitted = make_pipeline(
        StandardScaler(),
        LogisticRegressionCV(Cs=STRENGTHS / 100, cv=3, max_iter=300, use_legacy_attributes=False, l1_ratios=(0,)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of options that change in a later scikit-learn, and of slow convergence
        fitted.fit(vectors, labels)
    outputs = np.full((len(test), len(data.labels)), -np.inf)
    outputs[:, fitted.classes_] = fitted.predict_log_proba(test)
    return outputs
