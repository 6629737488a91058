"""The head of a network: its labels, their order, its last layer.

Letters: C labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from capcli.data.kinds import KINDS
from capcli.data.names import finder
from capcli.errors import ConfigError


def set_labels(config: Any, labels: Sequence[str], kind: str) -> tuple[str, ...]:
    """Write the labels into a configuration; returns them, as a model of this kind has them. Without a head none."""
    row = KINDS[kind]
    if row.vectors:
        return ()
    names = () if row.own_head else tuple(labels) or row.outputs or ("score",)
    shown = names or row.outputs
    config.num_labels = len(shown)
    config.id2label, config.label2id = dict(enumerate(shown)), {name: i for i, name in enumerate(shown)}
    config.problem_type = (row.classes and row.problem) or None  # one output says that it is a regression
    return names


def output_layer(net: Any) -> tuple[str, nn.Linear]:
    """Name and module of the last linear layer of the head, whose rows are the labels."""
    inside = f"{net.base_model_prefix}."
    linears = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Linear) and not name.startswith(inside)]
    return linears[-1]


def head_names(net: Any) -> set[str]:
    """The names of the tensors of the head: what stands beside the base model. Without a head none."""
    if net.base_model is net:
        return set()
    return {name for name in net.state_dict() if not name.startswith(f"{net.base_model_prefix}.")}


def norm_names(net: Any) -> set[str]:
    """The names of the parameters of norms, of whatever class: LayerNorm, RMSNorm and others."""
    norms = [(name, module) for name, module in net.named_modules() if type(module).__name__.endswith("Norm")]
    return {f"{name}.{inner}" for name, module in norms for inner, _ in module.named_parameters()}


def own_labels(config: Any) -> tuple[str, ...]:
    """The labels of a configuration in the order of the outputs."""
    table = config.id2label or {}
    return tuple(str(table[key]) for key in sorted(table, key=int))


def renamed(own: Sequence[str], label_map: Mapping[str, str] | None) -> tuple[str, ...]:
    """The labels of a model under the names that a map gives them. Raises `ConfigError` when two get the same."""
    names = tuple((label_map or {}).get(name, name) for name in own)
    if twice := [name for name in names if names.count(name) > 1 and own.count(name) < 2]:
        raise ConfigError(f"--label-map gives two labels of the model the name {twice[0]!r}", "give each its own name")
    return names


def label_order(
    own: Sequence[str], labels: Sequence[str] | None, label_map: Mapping[str, str] | None = None
) -> list[int] | None:
    """For each wanted label the index among `own`, renamed or as they are; None when the sets differ.

    They are found by name, numbers by value. A map may also be for the labels of the data alone.
    """
    if labels is None:
        return list(range(len(own)))
    for names in (renamed(own, label_map), own):
        order = [index for index in map(finder(names), labels) if index is not None]
        if len(labels) == len(own) and sorted(order) == list(range(len(own))):
            return order
    return None


def reorder_rows(output: nn.Linear, order: list[int] | None) -> None:
    """Put the rows of the last layer in this order; some heads have no bias."""
    if order is None or order == sorted(order):
        return
    with torch.no_grad():
        for parameter in output.parameters():
            parameter.copy_(parameter[order].clone())


def redraw_rows(output: nn.Linear, spread: float, seed: int) -> None:
    """Draw the rows of the labels anew: those of the checkpoint belong to other labels."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        output.weight.copy_(torch.empty_like(output.weight).normal_(0.0, spread, generator=generator))
        if output.bias is not None:
            output.bias.zero_()
