"""What computes a model: PyTorch, the sparse runtime, or onnxruntime. Chosen by name, or by what is faster here.

By default nothing is measured: an ONNX folder goes to onnxruntime and everything else to PyTorch, so that a result is
the same wherever it is measured again. `auto` measures.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from capcli.config.hardware import Hardware
from capcli.errors import CapError, ConfigError, ModelError
from capcli.events import finished
from capcli.models import devices, exits, loading, lowrank, predictor
from capcli.models.devices import Compute
from capcli.models.model import Exits, Model, place
from capcli.models.predictor import Predictor
from capcli.models.tokenizers import is_artifact
from capcli.reporting.text import significant
from capcli.runtime import onnx, sparse
from capcli.runtime.graph import has_graph
from capcli.sources import hub
from capcli.sources.checkpoint import GRAPH, INDEX, WEIGHTS
from capcli.timing import in_turn

BATCH, LENGTH, SECONDS, ROUNDS = 1, 128, 1.0, 30  # of the measurement that decides


def is_onnx(source: str) -> bool:
    """Whether a MODEL argument is one whose only weights are an ONNX graph."""
    others = any((hub.place(source) / name).is_file() for name in (WEIGHTS, INDEX))
    return not is_artifact(source) and not others and has_graph(source)


def opened(
    source: str,
    runtime: str,
    hardware: Hardware,
    *,
    labels: Sequence[str] | None,
    kind: str,
    seed: int = 1,
    need_head: bool = True,
    label_map: Mapping[str, str] | None = None,
    base: str = "",
    exit_threshold: float | None = None,
) -> Predictor:
    """The model `source` with a head of this kind for these labels, ready to answer; see `loading.load_model`.

    runtime: a name of `RUNTIMES`, or none for the one that the folder is made for. base: where that of masks is.
    exit_threshold: that of its exits, None for the one that is stored.

    Raises:
        ConfigError, ModelError, FileError: a runtime by name that cannot compute it, or what is wrong with the model.
    """
    name, hardware = meant(source, runtime, hardware)
    on = devices.compute(hardware)
    if name == "onnx":
        _check_exits(source, None, exit_threshold)
        loading.check_no_base(source, base)
        return onnx.predictor(onnx.load(source), kind, labels, label_map, need_head=need_head)
    model = loading.load_model(source, labels, kind, seed, need_head=need_head, label_map=label_map, base=base)
    _check_exits(source, model.exits, exit_threshold)
    found = choose(place(model, on), on, name).predictor
    if found.exits is not None and exit_threshold is not None:
        found.exits.threshold = exit_threshold
    return found


def _check_exits(source: str, found: Exits | None, threshold: float | None) -> None:
    """Raise `ModelError` for a threshold of a model without exits."""
    if found is None and threshold is not None:
        raise ModelError(f"{source} has no exits", f"write some: cap export {source} --to exits")


def meant(source: str, runtime: str, hardware: Hardware) -> tuple[str, Hardware]:
    """The runtime that a name, or none, means for a model: onnx, torch, sparse, or auto between these two; and where
    it computes. Raises `ConfigError` for what it cannot.
    """
    if runtime == "onnx" and not has_graph(source):
        raise ConfigError(f"{source} has no {GRAPH}", f"write one: cap export {source} --to onnx")
    if runtime in ("", "auto") and is_onnx(source):
        runtime = "onnx"
    return runtime or "torch", _on_cpu(hardware, runtime) if runtime in ("onnx", "sparse") else hardware


def _on_cpu(hardware: Hardware, runtime: str) -> Hardware:
    """The same on the CPU in 32 bits. Raises `ConfigError` when something else was asked for by name."""
    if hardware.device not in ("auto", "cpu"):
        raise ConfigError(f"the {runtime} runtime computes on the CPU, not on {hardware.device}", "use --device cpu")
    if hardware.precision not in ("auto", "fp32"):
        raise ConfigError(f"the {runtime} runtime computes in fp32, not in {hardware.precision}", "use --runtime torch")
    return dataclasses.replace(hardware, device="cpu", precision="fp32")


def loaded(source: str, runtime: str, threads: int, base: str = "") -> Any:
    """The model `source` as something to call, see `capcli.load`. Nothing is made dense for the sparse runtime, but of
    masks the base."""
    name, hardware = meant(source, runtime, Hardware(device="cpu", precision="fp32", threads=threads))
    if name == "onnx":
        loading.check_no_base(source, base)
        return onnx.load(source, threads)
    if name == "sparse":
        return sparse.load(source, threads, base)
    on = devices.compute(hardware)
    model = loading.load_pruned(source, base) if is_artifact(source) or base else loading.load_stock(source)
    found = choose(model, on, name, threads)
    if found.predictor.chosen:
        logging.getLogger("capcli").info(found.predictor.chosen)
    return found.sparse or found.predictor.exits or model.net


# Torch or sparse -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was taken for a model: `sparse`, or PyTorch where that is None. `predictor` is the model on it."""

    predictor: Predictor
    sparse: Any = None

    @property
    def packed_bytes(self) -> int:
        """What the weights take in memory on the sparse runtime: those that it packed, and all others as they are."""
        assert self.sparse is not None, "a model on the sparse runtime"
        others = [one for one in self.sparse.model.net.parameters() if one.device.type != "meta"]
        return int(self.sparse.bytes + sum(one.numel() * one.element_size() for one in others))


def choose(model: Model, on: Compute, runtime: str, threads: int = 0) -> Choice:
    """PyTorch or the sparse runtime for a model on its device, by name, or with `auto` the faster.

    Raises `CapError` where the sparse runtime was asked for by name and cannot compute it.
    """
    if model.exits is not None and runtime == "sparse":
        raise exits.only_torch(model.source)
    ours = predictor.of_network(model, on) if model.exits is None else predictor.with_exits(model, on)
    if runtime == "torch" or model.exits is not None:
        return Choice(predictor=ours)
    try:
        found = on_sparse(model, on, threads)
    except CapError as error:
        if runtime == "sparse":
            raise
        return Choice(predictor=dataclasses.replace(ours, chosen=f"runtime: torch ({error.message})"))
    slower, said = _compared(found.predictor, ours)
    if not slower:
        said = f"runtime: sparse ({said})"
    elif runtime == "sparse":
        said = f"runtime: sparse, as asked for, but torch is faster ({said})"
    else:
        return Choice(predictor=dataclasses.replace(ours, chosen=f"runtime: torch ({said})"))
    return dataclasses.replace(found, predictor=dataclasses.replace(found.predictor, chosen=said))


def on_sparse(model: Model, on: Compute, threads: int = 0) -> Choice:
    """The model on the sparse runtime, by name and without a comparison. Raises `CapError` where it cannot be."""
    if on.device.type != "cpu" or on.dtype != torch.float32:
        raise ModelError(f"the sparse runtime computes on the CPU in fp32, not on {on.device.type} in {on.precision}")
    if model.lowrank is not None:
        raise lowrank.only_torch(model.source)
    packed = sparse.from_model(model, threads or torch.get_num_threads())
    answers = dataclasses.replace(
        predictor.of_network(model, on),
        runtime="sparse",
        described=packed.described,
        threads=packed.threads,
        asking=packed.run,
        network=packed.model,
        notes=packed.model.notes,
    )
    return Choice(predictor=answers, sparse=packed)


def _compared(ours: Predictor, theirs: Predictor) -> tuple[bool, str]:
    """Whether the first is slower than the second, and by how much, in words."""
    seconds = measured([ours, theirs])
    fast, slow = sorted(seconds)
    other = (theirs if seconds[0] <= seconds[1] else ours).runtime
    figures = f"{significant(1000 * fast)} ms against {significant(1000 * slow)} ms of {other}"
    return seconds[0] > seconds[1], f"{figures}, batch {BATCH} x {min(LENGTH, ours.longest)}"


def measured(models: Sequence[Predictor]) -> list[float]:
    """Median seconds of one text of full length, of models that are measured by turns."""
    length = min(LENGTH, *(model.longest for model in models))
    calls = [model.asked(model.full_inputs(BATCH, length)) for model in models]
    rounds = finished(in_turn([calls] * ROUNDS, seconds=SECONDS, least=1))
    return [statistics.median(times) for times in zip(*rounds, strict=True)]
