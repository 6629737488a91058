"""What a model weighs: bytes on disk, zeros in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from capcli.artifact import reader
from capcli.artifact.entry import Entry
from capcli.models import artifact
from capcli.models.model import WEIGHTS_FILE, Model
from capcli.models.predictor import Predictor
from capcli.models.tokenizers import is_artifact
from capcli.records.parts import ModelSize, ModelSparsity, SizePart
from capcli.runtime.graph import graph_files
from capcli.sources import hub


def sparsity(model: Model) -> ModelSparsity:
    """What is not there or zero in the network as loaded, of what was before it was sliced."""
    n, total = model.before_slicing.prunable, model.before_slicing.total
    removed = n - model.nonzero()
    return ModelSparsity(achieved=removed / n, whole_model=removed / total)


def size(predictor: Predictor, source: str) -> ModelSize:
    """Bytes of the files of the model `source`, as they are, and of the network dense in 32 bits.

    Of an ONNX graph only the files: which of its weights belong to the matrices is not known.
    """
    if predictor.model is None:
        return ModelSize(weights_bytes=_bytes(graph_files(hub.place(source, graph=True))))
    dense = 4 * predictor.model.before_slicing.total
    if not is_artifact(source):
        folder = Path(hub.folder(source))
        return ModelSize(dense_bytes=dense, weights_bytes=_bytes([folder / name for name in hub.weight_files(folder)]))
    folder = hub.place(source)
    weights = folder / WEIGHTS_FILE
    return ModelSize(
        dense_bytes=dense,
        weights_bytes=_bytes([weights]),
        artifact_bytes=_bytes(artifact.artifact_files(folder)),
        codings=codings(weights),
    )


def _bytes(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def parts(model: Model, weights: Path) -> tuple[SizePart, ...]:
    """The embeddings, the pruned matrices and the rest of a weight file of `model`; headers are in none of them."""
    tables = {f"{name}.weight" for name, module in model.net.named_modules() if isinstance(module, torch.nn.Embedding)}
    found: dict[str, list[Entry]] = {"embeddings": [], "pruned matrices": [], "other weights": []}
    for entry in reader.inspect(weights):
        part = (
            "pruned matrices" if entry.kept is not None else "embeddings" if entry.name in tables else "other weights"
        )
        found[part].append(entry)
    return tuple(
        SizePart(
            part=part,
            weights=sum(entry.elements for entry in entries),
            dense_bytes=4 * sum(entry.elements for entry in entries),
            stored_bytes=sum(entry.bytes for entry in entries),
        )
        for part, entries in found.items()
    )


def codings(weights: Path) -> dict[str, int]:
    """How many matrices of a weight file are stored in each coding."""
    counts: dict[str, int] = {}
    for entry in reader.inspect(weights):
        if entry.kept is not None:
            counts[entry.coding] = counts.get(entry.coding, 0) + 1
    return counts
