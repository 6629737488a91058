"""Checkpoints with scores or masks beside the weights, as movement pruning left them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capcli.errors import ConfigError, ModelError
from capcli.models.checkpoint_parts import (
    SCORES,
    StoredTensor,
    read_floats,
    read_headers,
    read_tensors,
)
from capcli.sources.checkpoint import CONFIG
from capcli.stored import expect, show

# What a masked BERT shares with a plain one; nothing else of its configuration is read.
MASKED_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
    "initializer_range", "layer_norm_eps", "pad_token_id", "num_labels", "id2label", "problem_type",
)  # fmt: skip
L0_LEFT, L0_RIGHT = -0.1, 1.1  # the stretch of the hard concrete gate
LEAST_KEPT = 0.005  # a threshold on scores keeps more than this share of each matrix


def mask_of(entry: StoredTensor, rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Where values are kept, booleans [R, C]."""
    packed = read_tensors(entry).reshape(rows, -1).numpy()
    bits = np.unpackbits(packed, axis=1, bitorder="little").view(bool)
    expect(not bits[:, columns:].any(), entry.where, "padding bits", "zero", "one")
    return bits[:, :columns]


# Masks ---------------------------------------------------------------------------------------------------------------


def _top(scores: Tensor, share: float) -> Tensor:
    """True at the floor(share · n) highest of n scores; of equal ones, the first."""
    order = scores.flatten().sort(descending=True, stable=True).indices[: int(share * scores.numel())]
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.reshape(scores.shape)


def _above(values: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """True where `values` are above the threshold; at least 0.5 % of them, as the published code has it."""
    n = scores.numel()
    least = int(LEAST_KEPT * n) + 1
    mask = values > threshold
    if int(mask.sum()) >= least:
        return mask
    return scores > scores.flatten().kthvalue(max(n - least, 1)).values


def _gate(scores: Tensor) -> Tensor:
    """The hard concrete gate in evaluation: a factor from 0 to 1."""
    return (scores.sigmoid() * (L0_RIGHT - L0_LEFT) + L0_LEFT).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class MaskRule:
    """How a weight and its scores become a factor per weight, and which thresholds make sense; None for none."""

    factor: Callable[[Tensor, Tensor, float], Tensor]
    range: str | None
    allowed: Callable[[float], bool] = math.isfinite
    scored: bool = True


MASK_RULES = {
    "topK": MaskRule(
        factor=lambda weight, scores, share: _top(scores, share),
        range="the share of weights to keep, above 0 and up to 1",
        allowed=lambda share: 0 < share <= 1,
    ),
    "magnitude": MaskRule(
        factor=lambda weight, scores, share: _top(weight.abs(), share),
        range="the share of weights to keep, above 0 and up to 1",
        allowed=lambda share: 0 < share <= 1,
        scored=False,
    ),
    "sigmoied_threshold": MaskRule(  # the name as its authors spell it
        factor=lambda weight, scores, threshold: _above(scores.sigmoid(), scores, threshold),
        range="what the sigmoid of a score must exceed, from 0 to below 1",
        allowed=lambda threshold: 0 <= threshold < 1,
    ),
    "threshold": MaskRule(
        factor=lambda weight, scores, threshold: _above(scores, scores, threshold),
        range="what a score must exceed, any number",
    ),
    "l0": MaskRule(factor=lambda weight, scores, _: _gate(scores), range=None),
}


def read_masked(folder: Path, config: Mapping[str, Any], threshold: float | None) -> dict[str, Tensor]:
    """Every tensor of the network, with zeros where the mask has them; the scores are dropped."""
    headers = read_headers(folder)
    stated = config.get("pruning_method")
    method = MASK_RULES.get(str(stated))
    if method is None:
        where = f"{folder / CONFIG}: pruning_method"
        raise ModelError(f"{where}: expected one of {', '.join(MASK_RULES)}, got {show(stated)}")
    scores = {f"{name.removesuffix(SCORES)}.weight": e for name, e in headers.items() if name.endswith(SCORES)}
    tensors = {name: read_floats(entry) for name, entry in headers.items() if not name.endswith(SCORES)}
    matrices = [name for name in tensors if ".layer." in name and name.endswith(".weight") and tensors[name].dim() == 2]
    if method.scored and not scores:
        _check_zeros(tensors, matrices, folder, str(stated))
        check_unused(threshold, folder, "it has no mask_scores, and its zeros are stored")
        return tensors
    _check_scores(scores, tensors, matrices if method.scored else [], folder)
    chosen = _threshold(method, threshold, folder, str(stated))
    for name in matrices:
        weight = tensors[name].float()
        factor = method.factor(weight, read_floats(scores[name]).float() if method.scored else weight, chosen)
        tensors[name] = torch.where(factor != 0, weight * factor, torch.zeros_like(weight))  # 0.0, never -0.0
    return tensors


def check_bert(config: Mapping[str, Any], folder: Path) -> None:
    """Raise `ModelError` unless the checkpoint is a BERT, whose layers these layouts are of."""
    model_type = config.get("model_type")
    if model_type not in ("masked_bert", "bert"):
        raise ModelError(
            f"{folder / CONFIG}: model_type of a masked model: expected masked_bert, got {show(model_type)}"
        )


def _check_scores(
    scores: Mapping[str, StoredTensor], tensors: Mapping[str, Tensor], matrices: list[str], folder: Path
) -> None:
    """Every matrix has scores of its own shape, and nothing else has any."""
    for name, entry in scores.items():
        expect(
            name in matrices,
            entry.where,
            "beside it",
            f"a matrix {show(name)} of a layer that has scores",
            "none",
        )
        shape = tuple(tensors[name].shape)
        if entry.shape != shape:
            raise ModelError(
                f"{entry.where}: expected {list(shape)}, one score per weight, got {list(entry.shape)}",
                "scores per row, column or block are not read",
            )
    lost = [name for name in matrices if name not in scores]
    if lost:
        raise ModelError(
            f"{folder}: {len(lost)} of {len(matrices)} matrices have no mask_scores, first {show(lost[0])}"
        )


def _check_zeros(tensors: Mapping[str, Tensor], matrices: list[str], folder: Path, method: str) -> None:
    if not any((tensors[name] == 0).any() for name in matrices):
        raise ModelError(
            f"{folder} was pruned by {method}, and holds neither mask_scores nor zeros",
            "the scores are needed: use the checkpoint as it was trained",
        )


def _threshold(method: MaskRule, threshold: float | None, folder: Path, name: str) -> float:
    """The threshold, or 0 for a method without one. Raises `ConfigError`."""
    if method.range is None:
        check_unused(threshold, folder, f"{name} has none")
        return 0.0
    if threshold is None:
        raise ConfigError(
            f"{folder} was pruned by {name}, and its files do not contain the threshold: --threshold is needed",
            f"it is {method.range}",
        )
    if not method.allowed(threshold):
        raise ConfigError(f"--threshold {threshold:g} is out of range for {name}", f"give --threshold: {method.range}")
    return threshold


def check_unused(threshold: float | None, folder: Path, why: str) -> None:
    """Raise `ConfigError` for a threshold that this checkpoint has no use for."""
    if threshold is not None:
        raise ConfigError(f"--threshold {threshold:g} has no meaning for {folder}: {why}", "leave it out")
