"""What a model weighs: bytes on disk, zeros in it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from capcli.artifact import reader
from capcli.models import artifact
from capcli.models.model import WEIGHTS_FILE
from capcli.models.predictor import Predictor
from capcli.models.tokenizers import is_artifact
from capcli.runtime.graph import graph_files
from capcli.sources import hub


def size_and_sparsity(predictor: Predictor, source: str) -> dict[str, Any]:
    """What is not there or zero in the network as loaded, of what was before it was sliced; and bytes on disk.

    Of an ONNX graph only the bytes: which of its weights belong to the matrices is not known.
    """
    model = predictor.model
    if model is None:
        return {"sparsity": None, "size": {"weights_bytes": _bytes(graph_files(Path(source)))}}
    n, total = model.before_slicing.prunable, model.before_slicing.total
    removed = n - model.nonzero()
    sparsity = {"achieved": removed / n, "whole_model": removed / total}
    return {"sparsity": sparsity, "size": {"dense_bytes": 4 * total, **_on_disk(source)}}


def _on_disk(source: str) -> dict[str, Any]:
    """The files of a model, as they are; of a pruned one also how its matrices are stored."""
    if not is_artifact(source):
        folder = Path(hub.folder(source))
        return {"weights_bytes": _bytes([folder / name for name in hub.weight_files(folder)])}
    weights = Path(source) / WEIGHTS_FILE
    return {
        "artifact_bytes": _bytes(artifact.artifact_files(Path(source))),
        "weights_bytes": _bytes([weights]),
        "codings": codings(weights),
    }


def _bytes(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def codings(weights: Path) -> dict[str, int]:
    """How many matrices of a weight file are stored in each coding."""
    counts: dict[str, int] = {}
    for entry in reader.inspect(weights):
        if entry.kept is not None:
            counts[entry.coding] = counts.get(entry.coding, 0) + 1
    return counts
