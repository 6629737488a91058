"""The formats of an export: a function for each, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from capcli import files
from capcli.config.options import flatten
from capcli.config.paths import ELSEWHERE, shortened
from capcli.errors import CheckFailed, ConfigError, ModelError
from capcli.events import Event
from capcli.exporting import exits, factors, onnx_model
from capcli.exporting.job import Export, Opened, total_bytes
from capcli.models import artifact, loading, lowrank, masks, predictor, stock, storage, tokenizers
from capcli.models.exits import check as check_exits
from capcli.models.model import WEIGHTS_FILE, Model, check_stock, place, sliced
from capcli.runtime import onnx as graphs
from capcli.runtime.graph import graph_files

KEPT_SETTINGS = ("source", "holdout", "seed", "method", "sparsity", "no_answer")


def check_format(model: Model, to: str) -> None:
    """Raise `ModelError` for a format that cannot hold this model."""
    if to == "dense":
        check_stock(model)
    if to == "exits":
        check_exits(model)
    if to == "lowrank":
        lowrank.check(model)
    if to in ("sliced", "mask") and model.lowrank is not None:
        raise ModelError(f"{model.source} has low-rank factors, which --to {to} cannot hold", "use --to sparse or onnx")
    if to == "mask" and not tokenizers.is_artifact(model.source):
        raise ModelError(f"{model.source} was not made by cap prune, and --to mask needs such a run", "use --to sparse")
    if to == "sliced" and model.family is None:
        raise ModelError(model.unknown, "use --to sparse for a smaller file, or --to onnx")


def slice_model(model: Model) -> Model:
    """The model without the heads, dimensions and neurons that compute nothing, where they are known."""
    return model if model.family is None or model.altered else sliced(model)


# The formats ---------------------------------------------------------------------------------------------------------


def dense(job: Export, staging: Path) -> Generator[Event, None, Opened]:
    """A stock Hugging Face folder: zeros stored, loads everywhere without capcli; no smaller and no faster."""
    yield Event(phase="export", overall=0.3, note="writing the dense model")
    dtype = storage.DTYPES[job.dtype]
    wanted = storage.stored(job.model, (), job.dtype)
    tensors = {name: tensor for name, tensor in wanted.tensors.items() if isinstance(tensor, torch.Tensor)}
    stock.save_dense(job.model, staging, tensors, dtype)
    found = stock.reload_dense(staging, job.model.kind)
    storage.check(wanted, found)
    weights = staging / "model.safetensors"
    opened = replace(job.model, net=found.float(), tokenizer=tokenizers.read_tokenizer(staging))
    return _opened(job, opened, weights, total_bytes(found, dtype.itemsize))


def artefact(job: Export, staging: Path) -> Generator[Event, None, Opened]:
    """Our own file: kept values and positions. From smaller layers, when the model was sliced."""
    config, pruned = job.config, list(job.model.prunable())
    yield Event(phase="export", overall=0.3, note="writing the weights")
    wanted = storage.stored(job.model, pruned, job.dtype, config.embeddings, config.svd_rank)
    artifact.save_artifact(job.model, staging, pruned, settings(job), wanted.tensors, wanted.quantised)
    opened = artifact.load_artifact(staging)
    storage.check(wanted, opened.net)
    return _opened(job, opened, staging / WEIGHTS_FILE, total_bytes(opened.net, 4))


def settings(job: Export) -> dict[str, Any]:
    """What the export says of its run, its data where they are now, and how it was exported."""
    config, stored = job.config, artifact.stored_settings(job.config.model)
    kept: dict[str, Any] = {name: stored[name] for name in KEPT_SETTINGS if name in stored}
    kept["source"] = artifact.stored_source(config.model) or (flatten(job.known.source) if config.task else {})
    if "teacher" in stored:
        kept["teacher"] = artifact.known(config.model).teacher
    if job.known.ours and job.known.data.has_labels:
        now = {"data": job.known.source.data, "label_map": job.known.source.label_map, "text": ""}
        kept["source"] = {**kept["source"], **now}
    treatment = {"format": config.to, "dtype": job.dtype, "embeddings": config.embeddings}
    thin = {"ratio": config.ratio, "heal": config.heal} if config.to == "lowrank" else {}
    return {**kept, "export": {**treatment, "vocab": shortened(config.vocab), **thin}}


def _opened(job: Export, model: Model, weights: Path, memory_bytes: int) -> Opened:
    place(model, job.on)
    return Opened(
        model=predictor.of_network(model, job.on),
        nonzero=model.nonzero(),
        file_bytes=weights.stat().st_size,
        memory_bytes=memory_bytes,
    )


def mask(job: Export, staging: Path) -> Generator[Event, None, Opened]:
    """Which weights of a dense model stay, and what else differs from it; every weight is the same, bit by bit."""
    yield Event(phase="export", overall=0.3, note="comparing the weights with those of the base")
    base = loading.load_dense(_base(job), job.model.labels, job.model.kind, 0)
    masks.save(job.model, base, staging, settings(job))
    written = masks.read(str(staging))
    assert written is not None, "masks were written"
    opened = masks.applied(written, base)
    before, after = job.model.net.state_dict(), opened.net.state_dict()
    wrong = [name for name in before if not before[name].equal(after[name])]
    if wrong:
        raise CheckFailed(f"{len(wrong)} tensors differ from those of the model, first {wrong[0]}; nothing was kept")
    return _opened(job, opened, staging / WEIGHTS_FILE, total_bytes(opened.net, 4))


def _base(job: Export) -> str:
    """The model that was pruned: as the user names it, or as masks or the report do. Raises `ConfigError`."""
    found = masks.read(job.config.model)
    name = job.config.base or (masks.base_of(found) if found else job.history.model if job.history else "") or ""
    if not name or name.startswith(ELSEWHERE):
        what = f"{name}, which" if name else "the model that"
        raise ConfigError(f"cannot find {what} {job.config.model} was made from", "name it with --base")
    return name


def onnx(job: Export, staging: Path) -> Generator[Event, None, Opened]:
    """An ONNX graph with dynamic batch and length, by transformers' own exporter, for onnxruntime and others."""
    yield Event(phase="export", overall=0.3, note="converting to onnx")
    path = onnx_model.convert(job.model, staging, job.length)
    tokenizers.save_tokenizer(job.model.tokenizer, staging)
    stock.save_config(job.model, staging)
    if job.config.int8:
        yield Event(phase="export", overall=0.5, note="quantising to int8")
        onnx_model.quantise(path, path)
        files.remove(staging / onnx_model.DATA_FILE)
    opened = graphs.predictor(graphs.load(str(staging)), job.model.kind, job.model.labels)
    prunable = [linear.weight for linear in job.model.prunable().values()]
    others = [p for p in job.model.net.parameters() if not any(p is weight for weight in prunable)]
    size = sum(file.stat().st_size for file in graph_files(staging))
    return Opened(
        model=opened,
        nonzero=onnx_model.nonzero(path, prunable, others),
        file_bytes=size,
        memory_bytes=size,
    )


def with_exits(job: Export, staging: Path) -> Generator[Event, None, Opened]:
    """Our own file with a classifier after each layer: a text that is clear early needs no further layer."""
    yield Event(phase="export", overall=0.1, note="training exits on the vectors of each layer")
    model, table = yield from exits.made(job)
    opened = yield from artefact(replace(job, model=model), staging)
    assert opened.model.model is not None, "a file of ours is a network"
    left = predictor.with_exits(opened.model.model, job.on)
    return replace(opened, model=left, plain=opened.model, exits=table)


def low_rank(job: Export, staging: Path) -> Generator[Event, None, Opened]:
    """Our own file with two thin factors in place of each matrix; loads as a dense network with fewer weights."""
    yield Event(phase="export", overall=0.05, note="fitting factors to what the matrices put out")
    model, table = yield from factors.made(job)
    opened = yield from artefact(replace(job, model=model), staging)
    return replace(opened, factors=table)


FORMATS: dict[str, Callable[[Export, Path], Generator[Event, None, Opened]]] = {
    "dense": dense,
    "sparse": artefact,
    "sliced": artefact,
    "onnx": onnx,
    "exits": with_exits,
    "lowrank": low_rank,
    "mask": mask,
}
