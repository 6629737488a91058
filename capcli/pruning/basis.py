"""Another basis inside heads: before anything is removed, dimensions become principal axes, the largest first.

After SP3 ("SP3: Enhancing Structured Pruning via PCA Projection", arXiv 2308.16475), the part about heads. A head uses
queries and keys only as their product, and its values only through the output matrix, so both can be turned without a
change of what the network computes.

Letters: B batch, S tokens, T real tokens of the calibration, A heads, D dimensions of a head, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from capcli import parallel
from capcli.errors import ConfigError
from capcli.models import predict
from capcli.models.families import Layer, Units
from capcli.models.model import Model
from capcli.pruning.calibration import REFIT_BATCH, Calibration
from capcli.pruning.least_squares import work_type
from capcli.pruning.refit import hooked

LEAST = 1e-3  # of the largest singular value; below it a direction was hardly seen, and dividing by it loses digits


def check(model: Model) -> None:
    """Raise `ConfigError` for a model whose heads cannot be turned."""
    if any(layer.query_key is None for layer in model.layers()):
        raise ConfigError(
            f"--basis pca cannot turn the heads of {model.net.config.model_type}, in which positions are rotated into "
            "pairs of dimensions",
            "leave it out: whole heads are removed there",
        )


@torch.no_grad()
def rotate(model: Model, calibration: Calibration) -> None:
    """Turn the heads of a network that has no masks yet, by what they put out for the calibration examples of step 0.

    The network computes what it did, but for rounding. Common to all ranks, which take the weights of rank 0.
    """
    layers = model.layers()
    seen = _second_moments(model, layers, calibration)
    for layer in layers:
        query, key, *_ = _linears(layer.query_key)
        value, output = _linears(layer.value_output)
        of_queries, of_keys = query_key(seen[query], seen[key])
        for linear in _linears(layer.query_key):
            _turn_outputs(linear, of_keys if linear in layer.keys else of_queries)
        of_values = principal(seen[value])
        _turn_outputs(value, of_values)
        _turn_inputs(output, of_values)


def principal(values: Tensor) -> Tensor:
    """Uᵀ [A, D, D], the largest first, of the values of each head, V = U·Σ·Wᵀ [D, T], from V·Vᵀ [A, D, D]."""
    axes: Tensor = torch.linalg.eigh(values).eigenvectors
    return axes.flip(-1).mT


def query_key(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """A and B [A, D, D] for queries and keys, from Q·Qᵀ and K·Kᵀ [A, D, D]: (A·q)·(B·k) = q·k.

    With Q = U_q·Σ_q·…, K = U_k·Σ_k·… and the SVD Σ_q·U_qᵀ·U_k·Σ_k = P·Λ·Rᵀ,
    A = Λ^½·Pᵀ·Σ_q⁻¹·U_qᵀ and B = Λ^½·Rᵀ·Σ_k⁻¹·U_kᵀ. Then A·Q and B·K have the same second moment, Λ, which is diagonal:
    the first dimensions carry the scores.
    """
    (of_queries, q_axes), (of_keys, k_axes) = _singular(queries), _singular(keys)
    p, sizes, r = torch.linalg.svd(of_queries[..., None] * (q_axes.mT @ k_axes) * of_keys[..., None, :])
    root = sizes.sqrt()[..., None]
    return root * (p.mT / of_queries[..., None, :]) @ q_axes.mT, root * (r / of_keys[..., None, :]) @ k_axes.mT


def _singular(second: Tensor) -> tuple[Tensor, Tensor]:
    """Σ [A, D], of which none is below `LEAST` of the largest, and U [A, D, D] of Y = U·Σ·Vᵀ, from Y·Yᵀ [A, D, D]."""
    squares, axes = torch.linalg.eigh(second)
    sizes = squares.clamp(min=0).sqrt()
    largest = sizes.amax(dim=-1, keepdim=True)
    return sizes.maximum(torch.where(largest > 0, LEAST * largest, 1.0)), axes


# The network ---------------------------------------------------------------------------------------------------------


def _linears(units: Units | None) -> list[nn.Linear]:
    assert units is not None, "see `check`"
    return [slot.linear for slot in units.slots]


def _second_moments(model: Model, layers: list[Layer], calibration: Calibration) -> Mapping[nn.Linear, Tensor]:
    """Y·Yᵀ [A, D, D] in 64 bits, on the CPU, of the outputs Y [D, T] of each head: of queries, keys and values."""
    found = {}
    for layer in layers:
        for linear in (*_linears(layer.query_key)[:2], _linears(layer.value_output)[0]):
            n, size = layer.heads.count, linear.out_features // layer.heads.count
            found[linear] = torch.zeros(n, size, size, dtype=work_type(calibration.device), device=calibration.device)
    with predict.without_dropout(model):
        for batch in list(calibration.drawn(0, REFIT_BATCH))[parallel.rank() :: parallel.size()]:
            adding = _adding(batch.inputs["attention_mask"].bool())
            with hooked(linear.register_forward_hook(adding(total)) for linear, total in found.items()):
                predict.forward(model, batch.inputs)
    parallel.total(list(found.values()))
    return {linear: total.cpu().double() for linear, total in found.items()}


def _adding(mask: Tensor) -> Callable[[Tensor], Callable[..., None]]:
    """Hooks that add up, of what a layer puts out, that for real tokens; what is not made of tokens is left out."""

    def adding(total: Tensor) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if output.shape[:-1] == mask.shape:
                heads = output[mask].view(-1, *total.shape[:2]).to(total.dtype).transpose(0, 1)
                total.add_(heads.mT @ heads)

        return look

    return adding


def _turn_outputs(linear: nn.Linear, turn: Tensor) -> None:
    """The rows of each head, W_h [D, I] with biases b_h [D], become T·W_h and T·b_h, `turn` T [A, D, D]."""
    for parameter in filter(lambda p: p is not None, (linear.weight, linear.bias)):
        rows = parameter.cpu().double().view(len(turn), turn.shape[1], -1)
        parallel.same(parameter.copy_((turn @ rows).view(parameter.shape)))


def _turn_inputs(linear: nn.Linear, turn: Tensor) -> None:
    """The columns of each head, W_h [O, D], become W_h·Tᵀ, `turn` T [A, D, D], which is orthogonal."""
    columns = linear.weight.cpu().double().view(-1, len(turn), turn.shape[1])
    turned = torch.einsum("oad,aed->oae", columns, turn)
    parallel.same(linear.weight.copy_(turned.reshape(linear.weight.shape)))
