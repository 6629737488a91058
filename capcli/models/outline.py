"""The sizes of a network before it is built, with a budget: nothing large is made for a small file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from capcli.errors import ModelError
from capcli.models.hf import auto_class, quietly

# How much larger than what a weight file holds a network may grow: a new head, tied weights, buffers. Some families
# compute tables of positions number by number, a second for a million of them.
SPARE_PARTS, SPARE_WEIGHTS = 1000, 1 << 21
TIMES, TIMES_ALTERED = 4, 64  # what the file holds, also where most of every layer was cut away


def outline(
    config: Any, kind: str, found: Mapping[str, tuple[int, ...]], source: object, *, altered: bool = False
) -> Any:
    """The network of a configuration on `meta`, where weights take no memory.

    altered: its layers are to be cut to a smaller size; no memory of their full size is touched before they are.
    Raises `ModelError` as soon as it is out of all proportion to `found`, the shapes of the tensors in the files.
    """
    from torch.nn.modules import module as hooks

    weights = sum(map(math.prod, found.values()))
    parts_left = 8 * len(found) + SPARE_PARTS
    bytes_left = 4 * ((TIMES_ALTERED if altered else TIMES) * weights + SPARE_WEIGHTS)

    def grown(_module: nn.Module, _name: str, part: Any) -> None:
        nonlocal parts_left, bytes_left
        parts_left -= 1
        bytes_left -= part.numel() * part.element_size() if isinstance(part, Tensor) else 0
        if min(parts_left, bytes_left) < 0:
            raise ModelError(
                f"the configuration of {source} describes a model of far more than its {weights:,} weights",
                "copy or download it again",
            )

    watched = (
        hooks.register_module_module_registration_hook(grown),
        hooks.register_module_parameter_registration_hook(grown),
        hooks.register_module_buffer_registration_hook(grown),
    )
    try:
        with quietly(), torch.device("meta"):
            return auto_class(kind).from_config(deepcopy(config))
    finally:
        for hook in watched:
            hook.remove()
