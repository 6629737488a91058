"""Masks of other runs: the weights that these kept stay (after arXiv 2307.04365; section 7 of the design's METHODS).

Letters: n prunable weights, R runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from capcli.artifact import reader
from capcli.errors import ModelError
from capcli.models.model import WEIGHTS_FILE
from capcli.pruning.criteria.seat import Criterion, State, Subject
from capcli.pruning.masked import Matrices


def voted(folders: Sequence[Path]) -> Criterion:
    """The criterion that ranks weights by how many of the pruned models in `folders` kept them, and among equals by
    abs(W); chosen once, and then fixed."""

    def scores(state: State, subject: Subject) -> Tensor:
        matrices = subject.matrices
        votes = sum((kept(folder, matrices) for folder in folders), torch.zeros_like(matrices.mask))
        magnitude = matrices.flat_magnitude()
        return votes + magnitude / (2 * magnitude.max()).clamp(min=torch.finfo(magnitude.dtype).tiny)

    return Criterion(scores=scores, scope="global", calibrated=True)


def kept(folder: Path, matrices: Matrices) -> Tensor:
    """Which weights [n] are not zero in the pruned model in `folder`, 1 or 0.

    Raises `ModelError` when it has other matrices.
    """
    stored = reader.load(folder / WEIGHTS_FILE)
    found = []
    for index, name in enumerate(matrices.names):
        tensor, shape = stored.get(name), matrices.original(index).shape
        if tensor is None or tensor.shape != shape:
            raise ModelError(
                f"{folder} has no matrix {name} of {' x '.join(map(str, shape))}",
                "name runs that pruned the same model for --mask-from",
            )
        found.append((tensor != 0).flatten().to(matrices.mask))
    return torch.cat(found)
