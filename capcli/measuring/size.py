"""What a model weighs: bytes on disk, zeros in it."""

from __future__ import annotations

from pathlib import Path

from capcli.artifact import reader
from capcli.models import artifact
from capcli.models.model import WEIGHTS_FILE, Model
from capcli.records.parts import ModelSize, ModelSparsity


def sparsity(model: Model) -> ModelSparsity:
    """What is not there or zero in the network as loaded, of what was before it was sliced."""
    n, total = model.before_slicing.prunable, model.before_slicing.total
    removed = n - model.nonzero()
    return ModelSparsity(achieved=removed / n, whole_model=removed / total)


def size(model: Model, source: str) -> ModelSize:
    """Bytes of the model dense, and on disk if it is a pruned one."""
    weights, dense = Path(source) / WEIGHTS_FILE, 4 * model.before_slicing.total
    if not weights.is_file():
        return ModelSize(dense_bytes=dense, weights_bytes=dense)
    return ModelSize(
        dense_bytes=dense,
        weights_bytes=weights.stat().st_size,
        artifact_bytes=sum(path.stat().st_size for path in artifact.artifact_files(Path(source))),
        codings=codings(weights),
    )


def codings(weights: Path) -> dict[str, int]:
    """How many matrices of a weight file are stored in each coding."""
    counts: dict[str, int] = {}
    for entry in reader.inspect(weights):
        if entry.kept is not None:
            counts[entry.coding] = counts.get(entry.coding, 0) + 1
    return counts
