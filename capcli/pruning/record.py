"""The artefact of a run, measured as re-opened from disk, and the report, written last."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch

from capcli import files, machine, run, stages
from capcli.artifact import reader
from capcli.artifact.writer import Sizes
from capcli.config.options import flatten
from capcli.config.paths import command_line, portable
from capcli.data.kinds import KINDS
from capcli.errors import RunFailed
from capcli.events import Event
from capcli.measuring import scoring, size
from capcli.models import artifact, loading
from capcli.models.model import WEIGHTS_FILE, Model, place
from capcli.pruning import masked
from capcli.pruning.pruner import Pruner
from capcli.pruning.setup import Setup, measure_splits, stage_record
from capcli.pruning.student import untrained
from capcli.pruning.teacher import other_steps
from capcli.pruning.train import Progress
from capcli.reporting import documents
from capcli.reporting.card import render_card


def write_artefact(
    setup: Setup, student: Model, pruner: Pruner, state: Progress, dense: dict[str, Any]
) -> Generator[Event, None, dict[str, Any]]:
    """Write the artefact, measure it as re-opened from disk, and write the report last."""
    config, out = setup.config, setup.run.out
    yield setup.meter.of("evaluate pruned")(note=f"writing {out}")
    kept = pruner.matrices.kept()
    assert pruner.sparsity == pruner.final, "the schedule ends at the final sparsity"
    masked.bake(pruner.matrices)
    names = list(student.prunable())
    settings = {"source": dataclasses.asdict(config.source), "holdout": config.holdout, "seed": config.seed}
    settings |= {"method": config.method, "sparsity": config.sparsity, "no_answer": setup.data.no_answer}
    run.clear_artefact(setup.run)
    sizes = artifact.save_artifact(student, out, names, settings)
    reopened = place(artifact.load_artifact(out), setup.on)
    event = setup.meter.stoppable("evaluate pruned")
    pruned = yield from measure_splits(setup, reopened, event)
    for note in _same_answers("the pruned model", pruned):
        yield setup.meter.of("evaluate pruned")(done=1, total=1, note=note)
    counted = _sparsity(reopened, out, config.sparsity, pruner.errors if config.refit else {})
    if counted["kept_weights"] > kept:
        raise RunFailed(
            f"{out} keeps {counted['kept_weights']:,} weights, the masks {kept:,}: the file is not what was trained"
        )
    record = _record(setup, state, dense, pruned) | {"sparsity": counted, "size": _size(out, sizes)}
    record["base_model"] = loading.hub_id(student.source)
    record["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": files.sha256(path)} for path in artifact.artifact_files(out)
    }
    record = dict(portable(record, config))
    card = render_card(record, base_model=record["base_model"], pipeline_tag=KINDS[student.kind].tag)
    setup.run.check()
    files.write_text(out / "README.md", card)
    files.write_text(out / "report.html", documents.render_html(record))
    files.write_json(out / stages.REPORT, record)
    yield setup.meter.of("evaluate pruned")(done=1, total=1, note=f"complete: {out}")
    return record


def _sparsity(model: Model, out: Path, requested: float, errors: Mapping[str, float]) -> dict[str, Any]:
    """Zeros, counted in the re-opened file; with the `errors` that the last refit left, by matrix."""
    prunable = model.prunable()
    per_matrix: list[dict[str, Any]] = [
        {"name": e.name, "shape": list(e.shape), "kept": e.kept, "sparsity": 1 - (e.kept or 0) / e.elements}
        | ({"output_error": errors[e.name]} if e.name in errors else {})
        for e in sorted(
            reader.inspect(out / WEIGHTS_FILE),
            key=lambda e: list(prunable).index(e.name) if e.name in prunable else -1,
        )
        if e.name in prunable
    ]
    n, kept = sum(w.weight.numel() for w in prunable.values()), sum(row["kept"] for row in per_matrix)
    total = sum(p.numel() for p in model.net.parameters())
    return {
        "requested": requested,
        "achieved": 1 - kept / n,
        "prunable_weights": n,
        "kept_weights": kept,
        "encoder": (n - kept) / model.encoder_parameters(),
        "whole_model": (n - kept) / total,
        "per_matrix": per_matrix,
    }


def _size(out: Path, sizes: Sizes) -> dict[str, Any]:
    return {
        "dense_bytes": sizes.dense_bytes,
        "artifact_bytes": sum(path.stat().st_size for path in artifact.artifact_files(out)),
        "weights_bytes": sizes.file_bytes,
        "bound_bytes": round(sizes.bound_bytes),
        "codings": size.codings(out / WEIGHTS_FILE),
    }


def _record(setup: Setup, state: Progress, dense: dict[str, Any], pruned: dict[str, Any]) -> dict[str, Any]:
    """The report but for sparsity, size and files, which are counted on the artefact."""
    config, primary = setup.config, next(iter(pruned))
    teacher = stage_record(setup, "teacher")
    prune_seconds = state.seconds
    return {
        "schema_version": documents.SCHEMA_VERSION,
        "status": "complete",
        "model": config.model,
        "task": config.source.task,
        "method": config.method,
        "losses": list(config.loss_names),
        "seed": config.seed,
        "command": command_line(sys.argv[1:]),
        "config": flatten(config),
        **setup.bound.record,
        "labels": list(setup.data.labels),
        "metrics": {
            "primary": setup.data.primary,
            "split": primary,
            "dense": dense[primary]["metrics"],
            "pruned": pruned[primary]["metrics"],
            "retention": scoring.retention(pruned[primary]["metrics"], dense[primary]["metrics"]),
            "n_examples": pruned[primary]["n_examples"],
            "confidence_95": pruned[primary]["confidence_95"],
            "splits": {
                name: {
                    "dense": dense[name]["metrics"],
                    "pruned": one["metrics"],
                    "retention": scoring.retention(one["metrics"], dense[name]["metrics"]),
                    "n_examples": one["n_examples"],
                    "confidence_95": one["confidence_95"],
                }
                for name, one in pruned.items()
            },
        },
        "teacher": {"source": config.teacher or "fine-tuned in this run", "metrics": dense[primary]["metrics"]},
        "timing": {
            "teacher_seconds": teacher.get("seconds", 0.0),
            "banks_seconds": sum(
                stage_record(setup, path.name).get("seconds", 0.0) for path in setup.run.work.glob("bank-*")
            ),
            "prune_seconds": prune_seconds,
            "total_seconds": time.monotonic() - setup.run.started + sum(setup.run.earlier),
            "examples_per_second": config.epochs * len(setup.train) / max(prune_seconds, 1e-9),
        },
        "memory": {
            "peak_host_bytes": machine.peak_bytes(),
            "peak_device_bytes": torch.cuda.max_memory_allocated(setup.on.device)
            if setup.on.device.type == "cuda"
            else 0,
        },
        "history": [*teacher.get("history", []), *state.history],
        "curve": {"n_examples": len(setup.curve.split or ()), "held_out": setup.data.holdout is not None},
        "notes": [
            *setup.notes,
            *(other_steps(setup) if teacher else []),
            *untrained(setup),
            *_same_answers("the dense model", dense),
            *_same_answers("the pruned model", pruned),
        ],
    }


def _same_answers(model: str, found: dict[str, Any]) -> list[str]:
    """Notes on a model whose answers to a split are all the same."""
    return [scoring.same_answer(model, name, one["constant"]) for name, one in found.items() if one.get("constant")]
