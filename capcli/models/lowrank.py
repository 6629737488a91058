"""Factors: two thin linear layers in sequence in place of a matrix of the layers, which compute A·(B·x) + b.

Letters: O outputs and I inputs of a matrix, k its rank; A [O, k], B [k, I].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from capcli.errors import ModelError
from capcli.models import families
from capcli.models.families import Family
from capcli.models.model import Model


def most(shape: tuple[int, ...]) -> int:
    """The largest rank at which two factors hold fewer weights than a matrix [O, I]; 0 where there is none."""
    outputs, inputs = shape
    return max(0, outputs * inputs - 1) // (outputs + inputs)


def put(net: Any, name: str, right: Tensor, left: Tensor, bias: Tensor | None) -> None:
    """Replace the matrix `name`, as `prunable` calls it, by the factors `right` [k, I] and `left` [O, k], in place; the
    bias [O] is that of the second."""
    net.set_submodule(name.removesuffix(".weight"), nn.Sequential(_linear(right, None), _linear(left, bias)))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer with this weight [O, I] and bias [O]."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made


def shape(net: Any, family: Family, ranks: Mapping[str, int]) -> None:
    """Give the matrices of a network factors of these ranks, in place, all zero; also on `meta`."""
    for name, linear in families.prunable(net, family).items():
        if name in ranks:
            outputs, inputs = linear.weight.shape
            bias = None if linear.bias is None else linear.bias.detach()
            weight = linear.weight.detach()
            put(net, name, weight.new_zeros(ranks[name], inputs), weight.new_zeros(outputs, ranks[name]), bias)


def read(table: object, net: Any, family: Family) -> dict[str, int]:
    """The ranks that JSON gives matrices of a network without factors; the JSON is not trusted.

    Raises:
        ValueError: saying where, what was expected and what was found.
    """
    matrices = families.prunable(net, family)
    if not isinstance(table, dict) or not table:
        raise ValueError("lowrank must be an object that gives matrices their ranks")
    for name, rank in table.items():
        if name not in matrices:
            raise ValueError(f"lowrank names {name[:120]!r}, which is no matrix of the layers")
        limit = most(tuple(matrices[name].weight.shape))
        if type(rank) is not int or not 1 <= rank <= limit:
            raise ValueError(f"lowrank: the rank of {name} must be an integer from 1 to {limit}, is {str(rank)[:40]}")
    return dict(table)


def only_torch(source: str) -> ModelError:
    """The error of the sparse runtime, which computes whole matrices."""
    return ModelError(
        f"{source} has low-rank factors, which the sparse runtime does not compute",
        "use --runtime torch, or leave it out; or export the run that it was made from",
    )


def check(model: Model) -> None:
    """Raise `ModelError` for a model whose matrices cannot get factors."""
    if model.family is None:
        raise ModelError(model.unknown, "use --to sparse for a smaller file, or --to onnx")
    if model.lowrank is not None:
        raise ModelError(f"{model.source} has low-rank factors already", "export the run that it was made from")
