"""Reading sparse checkpoints of other tools: what layout a folder has, and a model from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capcli.data import kinds
from capcli.data.kinds import KINDS
from capcli.errors import ModelError
from capcli.models import loading
from capcli.models.checkpoint_parts import (
    PARAMETERS,
    PARTS,
    SCORES,
    StoredTensor,
    read_floats,
    read_headers,
    read_tensors,
    type_of,
)
from capcli.models.masked_checkpoint import MASKED_FIELDS, check_bert, check_unused, mask_of, read_masked
from capcli.models.model import Model
from capcli.sources import checkpoint
from capcli.sources.checkpoint import BITMASK, CONFIG, MASKED
from capcli.stored import expect, show

ENDS = list(dict.fromkeys(row.head.removeprefix("AutoModel") or "Model" for row in KINDS.values()))


def layout(folder: Path) -> str | None:
    """`bitmask` or `masked`, by configuration and headers alone; None when the folder is no legacy checkpoint.

    Raises `FileError` or `ModelError` for files that cannot be read.
    """
    found = checkpoint.sparse_layout(checkpoint.model_json(folder / CONFIG))
    if found is not None:
        return found
    names = read_headers(folder)
    if any(name.endswith(SCORES) for name in names):
        return MASKED
    return BITMASK if any(name.endswith(".bitmask") for name in names) else None


def load(folder: Path, threshold: float | None) -> Model:
    """The network of a checkpoint with its zeros in place, in 32-bit floats, with its tokenizer, labels and kind.

    Also a dense checkpoint that stores its zeros is read, and checked as strictly. `threshold` is for masks alone, see
    `METHODS`.

    Raises:
        ConfigError: a threshold that is missing, out of range or not used. FileError: a malformed weight file.
        ModelError: a configuration that is of no known kind, or does not fit the weights.
    """
    config = checkpoint.model_json(folder / CONFIG)
    kind = _kind(config, folder)
    found = layout(folder)
    if found != MASKED:
        check_unused(threshold, folder, "its file says what is zero")
        tensors = _read_bitmask(read_headers(folder))
        return loading.from_tensors(tensors, _described(config), folder, kind)
    check_bert(config, folder)
    plain = {name: config[name] for name in MASKED_FIELDS if name in config} | {"model_type": "bert"}
    return loading.from_tensors(read_masked(folder, config, threshold), plain, folder, kind)


def zeros(model: Model) -> int:
    """How many weights of the prunable matrices are zero."""
    return model.before_slicing.prunable - model.nonzero()


def _kind(config: Mapping[str, Any], folder: Path) -> str:
    """The kind of task, by the architecture's name; what a class of that name would do is never asked."""
    stated = config.get("architectures")
    name = str(stated[0]) if isinstance(stated, list) and stated else ""
    end = next((end for end in ENDS if name.endswith(end)), None)
    if end is None:
        raise ModelError(
            f"{folder / CONFIG}: architectures: expected one that ends in {', '.join(ENDS)}, got {show(stated)}",
            "a model without the head of a task has nothing to evaluate",
        )
    names = config.get("id2label")
    n_labels = config.get("num_labels", len(names) if isinstance(names, dict) else 2)
    possible = [kind for kind, row in KINDS.items() if row.head.endswith(end)]
    return kinds.meant(possible, str(config.get("problem_type")), n_labels)


def _described(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what names code, kernels or formats."""
    return {
        name: value for name, value in config.items() if name not in checkpoint.NEVER_READ and not name.startswith("_")
    }


# Bitmasks ------------------------------------------------------------------------------------------------------------


def _read_bitmask(headers: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Every tensor of the network, those that are not compressed as they are."""
    packed: dict[str, dict[str, StoredTensor]] = {}
    dense = {}
    for name, entry in headers.items():
        stem, _, part = name.rpartition(".")
        if part in PARTS:
            packed.setdefault(stem, {})[part] = entry
        else:
            dense[name] = entry
    tensors: dict[str, Tensor] = {}
    for stem, parts in packed.items():
        name = stem if stem.rpartition(".")[2] in PARAMETERS else f"{stem}.weight"
        some = next(iter(parts.values()))
        expect(name not in dense and name not in tensors, some.where, f"forms of {show(name)}", "one", "two")
        tensors[name] = _unpacked(parts, some)
    return tensors | {name: read_floats(entry) for name, entry in dense.items()}


def _unpacked(parts: Mapping[str, StoredTensor], some: StoredTensor) -> Tensor:
    """A dense tensor [R, C], or [C], from its parts; `some` is one of them."""
    missing = [part for part in PARTS if part not in parts]
    expect(not missing, some.where, "parts beside it", ", ".join(PARTS), f"no {', '.join(missing)}")
    shape = _shape(parts)
    rows, columns = (1, *shape)[-2:]
    mask = mask_of(parts["bitmask"], rows, columns)
    values = read_floats(parts["compressed"])
    kept = np.count_nonzero(mask)
    expect(kept == len(values), parts["bitmask"].where, "bits set", len(values), kept)
    counts = np.count_nonzero(mask, axis=1)
    offsets = read_tensors(parts["row_offsets"]).reshape(rows).numpy()
    wrong = np.flatnonzero(offsets != np.cumsum(counts) - counts)
    expect(not wrong.size, parts["row_offsets"].where, "values", "the bits set before each row", offsets[wrong[:1]])
    dense = torch.zeros(rows, columns, dtype=values.dtype)
    dense[torch.from_numpy(mask)] = values
    return dense.reshape(shape)


def _shape(parts: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    """The shape of the dense tensor, when those of all parts agree with it; nothing large is read or allocated."""
    stated = parts["shape"]
    dims = stated.shape
    expect(stated.dtype == "I64" and dims in ((1,), (2,)), stated.where, "type", "I64 [1] or [2]", type_of(stated))
    shape = tuple(read_tensors(stated).tolist())
    expect(min(shape) > 0, stated.where, "sizes", "at least 1", shape)
    rows, columns = (1, *shape)[-2:]
    masks = (*shape[:-1], -(-columns // 8))
    expected = {"bitmask": (("U8",), masks), "row_offsets": (("I64",), shape[:-1])}
    for part, (dtypes, wanted) in expected.items():
        entry = parts[part]
        ok = entry.dtype in dtypes and entry.shape == wanted
        expect(ok, entry.where, "type", f"{dtypes[0]} {list(wanted)}", type_of(entry))
    values = parts["compressed"]
    ok = len(values.shape) == 1 and values.shape[0] <= rows * columns
    expect(ok, values.where, "shape", f"one size, up to {rows * columns:,}", list(values.shape))
    return shape
