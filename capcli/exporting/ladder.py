"""The ladder: every way to ship a pruned model, from the most faithful to the smallest. Nothing here writes a file.

Letters: H hidden size.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch

from capcli.config.export import LIMITS, ExportConfig
from capcli.config.names import ARTEFACT_FORMATS
from capcli.config.options import flag_name
from capcli.errors import CapError, ModelError
from capcli.exporting import onnx_model, preparing
from capcli.exporting.formats import check_format, slice_model
from capcli.exporting.job import SLICED_FORMATS, Export, total_bytes
from capcli.models import masks, storage
from capcli.records.exported import Rung
from capcli.runtime import choice

SVD = 4  # hidden sizes per rank: factors of H / 4 take a quarter of the embeddings, and a little more


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to ship a model: its format, what is done to the weights (options of `cap export`), what computes it."""

    name: str
    to: str
    runtime: str
    treatment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> tuple[str, Mapping[str, Any]]:
        """The same for ways that differ in the runtime alone."""
        return self.to, self.treatment


def _files(name: str, **treatment: Any) -> tuple[Way, ...]:
    """Our own files with one treatment: dense once loaded, computed by the sparse runtime, and with smaller layers."""
    way = partial(Way, name=name, treatment=treatment)
    return way(to="sparse", runtime="torch"), way(to="sparse", runtime="sparse"), way(to="sliced", runtime="torch")


_GRAPH = partial(Way, to="onnx", runtime="onnx")
_INT8 = {"dtype": "int8", "embeddings": "int8"}
LADDER = (
    *_files("as stored"),
    _GRAPH(name="as stored"),
    *_files("fp16", dtype="fp16"),
    *_files("int8", **_INT8),
    _GRAPH(name="int8", treatment={"int8": True}),
    *_files("int8, task vocabulary", **_INT8, vocab="task"),
    _GRAPH(name="int8, task vocabulary", treatment={"int8": True, "vocab": "task"}),
    *_files("int8, task vocabulary, svd", dtype="int8", embeddings="svd", vocab="task"),
)
_NO_LIMITS: dict[str, Any] = {
    item.name: item.default for item in fields(ExportConfig) if item.metadata.get("panel") == LIMITS
}
DENSE = Way(name="as stored", to="dense", runtime="torch")  # for other tools; larger than all of the ladder


def by_file() -> Iterator[list[Way]]:
    """The ladder in order, ways with the same file together."""
    for _, same in groupby(LADDER, key=lambda way: way.file):
        yield list(same)


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What the ladder stands on. plain: the export of the model as it is, with the texts of its task if here."""

    plain: Export

    @cached_property
    def reduced(self) -> Export | CapError:
        """The same with the vocabulary of the task, or why that cannot be."""
        known = self.plain.known
        if not known.ours or known.data.train is None:
            return ModelError(known.missing or "the training texts of the task are not here")
        try:
            config = replace(self.plain.config, to="sparse", vocab="task", **_NO_LIMITS)
            found = preparing.with_vocabulary(replace(self.plain, config=config))
        except CapError as error:
            return error
        if found.words is not None and found.words.kept == found.words.of:
            return ModelError("the task needs every token")
        return found

    def job(self, way: Way) -> Export:
        """The export that a way is. Raises `CapError` that says why it does not apply to this model."""
        base = self.reduced if "vocab" in way.treatment else self.plain
        if isinstance(base, CapError):
            raise base
        job = replace(base, config=self.config(way))
        if way.to == "onnx":
            onnx_model.check_packages()
            if job.on.device.type != "cpu":
                raise ModelError(f"onnxruntime computes on the CPU here, not on {job.on.device.type}")
        if way.treatment.get("dtype") == "fp16" and job.own_dtype != "fp32":
            raise ModelError(f"the file is in {job.own_dtype} as it is")
        small = resized(job)
        if way.to == "sliced" and total_bytes(small.model.net, 1) == total_bytes(job.model.net, 1):
            raise ModelError("no head, dimension or neuron is empty")
        return small

    def config(self, way: Way) -> ExportConfig:
        """The options of `cap export` that a way stands for."""
        treatment, out = dict(way.treatment), str(self.plain.config.out_folder)
        if treatment.get("embeddings") == "svd":
            words = self.plain.model.net.get_input_embeddings().weight  # [V, H]
            treatment["embeddings"] = f"svd:{max(1, words.shape[1] // SVD)}"
        return replace(self.plain.config, to=way.to, out=out, **_NO_LIMITS, **treatment)


def resized(job: Export) -> Export:
    """The job with the layers that its format has. Raises `ModelError` for a format that cannot hold the model."""
    check_format(job.model, job.config.to)
    return replace(job, model=slice_model(job.model)) if job.config.to in SLICED_FORMATS else job


# What a rung would take ----------------------------------------------------------------------------------------------


def planned(ground: Ground, ways: Sequence[Way]) -> tuple[Export | None, tuple[Rung, ...]]:
    """The export that ways with the same file are, or None where they are not possible; and the rung of each."""
    rungs = tuple(_rung(ground.config(way), way.name, way.runtime) for way in ways)
    try:
        job = ground.job(ways[0])
        return job, tuple(sized(job, rung) for rung in rungs)
    except CapError as error:
        return None, tuple(replace(rung, refused=error.message) for rung in rungs)


def as_asked(job: Export) -> Rung:
    """The rung of a format by name."""
    rung = _rung(job.config, "as asked for", "onnx" if job.config.to == "onnx" else "torch")
    try:
        return sized(resized(job), rung)
    except CapError as error:
        return replace(rung, refused=error.message)


def _rung(config: ExportConfig, name: str, runtime: str) -> Rung:
    return Rung(name=name, format=config.to, runtime=runtime, command=command(config))


def command(config: ExportConfig) -> str:
    """The command that these options are, but for the folder to write, which has a default."""
    words = ["cap", "export", config.model]
    for item in fields(config):
        value = getattr(config, item.name)
        if item.metadata and item.name != "out" and value != item.default:
            words += [flag_name(item.name)] if value is True else [flag_name(item.name), str(value)]
    return shlex.join(words)


def sized(job: Export, rung: Rung) -> Rung:
    """The rung with bytes on disk and in memory, and the share of the matrices that is computed. A file of ours is
    counted exactly, for others the headers and what a graph folds together are left out."""
    config, model = job.config, job.model
    disk = memory = total_bytes(model.net, storage.DTYPES[job.dtype].itemsize)
    if config.to in ARTEFACT_FORMATS:
        pruned = list(model.prunable())
        disk = storage.file_bytes(model, pruned, job.dtype, config.embeddings, config.svd_rank)
        memory = total_bytes(model.net, 4)
    elif config.to == "mask":
        disk, memory = masks.estimated_bytes(model), total_bytes(model.net, 4)
    elif config.int8:
        kinds = (torch.nn.Linear, torch.nn.Embedding)
        disk = memory = disk - 3 * sum(m.weight.numel() for m in model.net.modules() if isinstance(m, kinds))
    left = sum(linear.weight.numel() for linear in model.prunable().values())
    if config.to == "lowrank":
        disk, memory, left = _with_factors(job, left)
    return replace(
        rung,
        exact=not job.lossy,
        estimated=config.to not in ARTEFACT_FORMATS or config.to in ("exits", "lowrank"),
        weights_bytes=disk,
        memory_bytes=memory,
        matrices_left=left / job.original.before_slicing.prunable,
    )


def _with_factors(job: Export, before: int) -> tuple[int, int, int]:
    """Bytes on disk and in memory of an export with factors that use all that its ratio allows, and how many weights
    these then have; `before` is how many the matrices have now."""
    left = min(before, int(job.config.ratio * job.original.before_slicing.prunable))
    total = total_bytes(job.model.net, 1) - before + left
    return storage.DTYPES[job.dtype].itemsize * total, 4 * total, left


def planned_here(ground: Ground, ways: Sequence[Way]) -> tuple[Rung, ...]:
    """The rungs of ways with the same file, each as its runtime computes it on this machine."""
    job, rungs = planned(ground, ways)
    return rungs if job is None else tuple(_packed(job, one) if one.runtime == "sparse" else one for one in rungs)


def _packed(job: Export, rung: Rung) -> Rung:
    """A rung of the sparse runtime with what that takes in memory, and the weights that it computes with."""
    try:
        found = choice.on_sparse(job.model, job.on)
    except CapError as error:
        return replace(rung, refused=error.message)
    left = job.model.nonzero() / job.original.before_slicing.prunable
    return replace(rung, memory_bytes=found.packed_bytes, matrices_left=left)
