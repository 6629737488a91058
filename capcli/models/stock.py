"""Stock Hugging Face folders, which plain `from_pretrained` loads."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capcli import files
from capcli.config.names import MOST
from capcli.models import sentences
from capcli.models.hf import auto_class, quietly
from capcli.models.model import Model, check_stock, longest_input
from capcli.models.tokenizers import save_tokenizer


def reload_dense(folder: Path, kind: str) -> Any:
    """The network in a stock folder, by plain `from_pretrained` in its stored type."""
    with quietly():
        return auto_class(kind).from_pretrained(folder, dtype="auto")


def save_config(model: Model, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the configuration under transformers' name, for weights of type `dtype`; of an encoder without a head also
    what sentence-transformers reads."""
    config = deepcopy(model.net.config)
    config.dtype, config.name_or_path = dtype, ""
    files.write_text(folder / "config.json", config.to_json_string(use_diff=False))
    if model.embedding is not None:
        sentences.write(model.embedding, folder, config.hidden_size, longest_input(model, MOST))


def save_dense(
    model: Model, folder: Path, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write a stock Hugging Face folder that plain `from_pretrained` loads; every file through `files`. `tensors` of
    type `dtype` are stored instead of the network's own.

    Raises:
        ModelError: the model is sliced, and transformers has no configuration for layers of different sizes.
    """
    check_stock(model)
    save_config(model, folder, dtype)
    own = model.net.state_dict() if tensors is None else tensors
    found = {name: tensor.cpu() for name, tensor in own.items()}
    files.write_tensors(folder / "model.safetensors", found, {"format": "pt"})
    save_tokenizer(model.tokenizer, folder)
