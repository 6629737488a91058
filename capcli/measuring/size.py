"""What a model weighs: bytes on disk, zeros in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capcli.artifact import reader
from capcli.models import artifact
from capcli.models.model import WEIGHTS_FILE
from capcli.models.predictor import Predictor
from capcli.runtime import onnx


def size_and_sparsity(predictor: Predictor, source: str) -> dict[str, Any]:
    """What is not there or zero in the network as loaded, of what was before it was sliced; and bytes on disk.

    Of an ONNX graph only the bytes: which of its weights belong to the matrices is not known.
    """
    model = predictor.model
    if model is None:
        n_bytes = sum(path.stat().st_size for path in onnx.graph_files(Path(source)))
        return {"sparsity": None, "size": {"weights_bytes": n_bytes}}
    weights = Path(source) / WEIGHTS_FILE
    n, total = model.before_slicing.prunable, model.before_slicing.total
    removed = n - model.nonzero()
    size: dict[str, Any] = {"dense_bytes": 4 * total, "weights_bytes": 4 * total}
    if weights.is_file():
        size |= {
            "artifact_bytes": sum(path.stat().st_size for path in artifact.artifact_files(Path(source))),
            "weights_bytes": weights.stat().st_size,
            "codings": codings(weights),
        }
    return {"sparsity": {"achieved": removed / n, "whole_model": removed / total}, "size": size}


def codings(weights: Path) -> dict[str, int]:
    """How many matrices of a weight file are stored in each coding."""
    counts: dict[str, int] = {}
    for entry in reader.inspect(weights):
        if entry.kept is not None:
            counts[entry.coding] = counts.get(entry.coding, 0) + 1
    return counts
