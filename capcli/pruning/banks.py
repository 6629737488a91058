"""Banks: one vector per training example and model, as 16-bit memory-mapped files (section 2 of the design).

Letters: N examples, K vectors per example, B batch, X drawn examples, H hidden size, C labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capcli import files
from capcli.errors import FileError
from capcli.stages import STAGE
from capcli.stored import read_tensors

FILE = "bank.safetensors"


@dataclass(kw_only=True)
class Bank:
    """K sets of vectors [N, H] in 16 bits, addressed by example id; on the CPU they stay in their mapped files."""

    vectors: list[Tensor]

    @property
    def n_vectors(self) -> int:
        """K, the vectors per example."""
        return len(self.vectors)

    def gather(self, ids: Tensor) -> Tensor:
        """The vectors [B, K, H] of the examples `ids` [B]."""
        return torch.stack([part.index_select(0, ids) for part in self.vectors], dim=1)


def save(folder: Path, vectors: Tensor, logits: Tensor, seconds: float, of: Mapping[str, Any]) -> None:
    """Write L2-normalised vectors [N, H] and logits, by example or by token, that took `seconds`; `of` is what they
    were made from."""
    files.write_json(folder / STAGE, {"seconds": seconds, "of": dict(of)})
    files.write_tensors(folder / FILE, {"vectors": vectors, "logits": logits})


def load(folder: Path, device: torch.device, n_examples: int, n_outputs: int) -> tuple[Tensor, Tensor]:
    """Vectors [N, H] and `n_outputs` logits of a published bank; memory-mapped on the CPU, else moved to the device."""
    tensors = read_tensors(folder / FILE)
    if {name: len(tensor) for name, tensor in tensors.items()} != {"vectors": n_examples, "logits": n_outputs}:
        raise FileError(f"{folder / FILE} is not a bank of {n_examples:,} examples", "start over with --overwrite")
    return tensors["vectors"].to(device), tensors["logits"].to(device)


def draw(n_examples: int, n_vectors: int, extra: int, seed: list[int]) -> NDArray[np.int64]:
    """Ids of floor(extra / K) distinct examples, at most N, drawn at random by `seed`."""
    wanted = min(n_examples, extra // max(1, n_vectors))
    if wanted == n_examples:
        return np.arange(n_examples)
    return np.random.default_rng(seed).choice(n_examples, wanted, replace=False, shuffle=False)
