"""From a network and its weights to the encoder: each layer read by the paths of its family.

Letters: H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from capcli.artifact.reader import Kept
from capcli.models import families
from capcli.models.families import Family
from capcli.runtime import families as rows
from capcli.runtime.encoder import Encoder, Layer
from capcli.runtime.families import Row
from capcli.runtime.packing import Entries, Matrix, Unsupported, entries, pack, stacked

Weights = Mapping[str, "Tensor | Kept"]
"""The parameters of a network by their names."""


def encoder(net: Any, family: Family, weights: Weights, threads: int) -> Encoder:
    """The layers of `net` with these weights; those of `net` itself may be on `meta`, but for its norms.

    Raises `Unsupported`.
    """
    row = rows.row_of(net)
    blocks = families.blocks(net, family)
    norms, turns = _Norms(), row.turns(net.base_model)
    kinds = list(turns)
    built = {name: _layer(name, block, net, family, row, weights, norms, kinds) for name, block in blocks.items()}
    return Encoder(
        [built[name] for name in row.order(net.base_model, list(blocks))],
        norms=norms.stacked(net),
        epsilon=norms.epsilon,
        threads=threads,
        distances=row.distances(net.base_model).numpy(),
        turns=torch.stack(list(turns.values())).numpy() if turns else np.zeros((0, 2, 0, 0), np.float32),
    )


class _Norms:
    """The norms of the layers, in the order in which they were added."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.epsilon = 0.0

    def add(self, module: nn.Module) -> int:
        """The index of a norm; -1 where there is none. Raises `Unsupported` for another one than `LayerNorm`."""
        if isinstance(module, nn.Identity):
            return -1
        if not isinstance(module, nn.LayerNorm) or (self.found and module.eps != self.epsilon):
            raise Unsupported("the runtime for sparse weights takes layers with norms of one kind")
        self.epsilon = module.eps
        self.found.append(rows.norm_of(module))
        return len(self.found) - 1

    def stacked(self, net: Any) -> Any:
        return torch.stack(self.found).numpy() if self.found else np.zeros((0, 2, net.config.hidden_size), np.float32)


def _layer(
    name: str,
    block: nn.Module,
    net: Any,
    family: Family,
    row: Row,
    weights: Weights,
    norms: _Norms,
    kinds: list[str],
) -> Layer:
    def found(path: str) -> Entries:
        return entries(weights[f"{name}.{path}.weight"])

    def bias(path: str) -> Tensor | None:
        return weights.get(f"{name}.{path}.bias")  # type: ignore[return-value]

    def matrix(path: str) -> Matrix:
        return pack(found(path), bias(path))

    attention = block.get_submodule(family.query_key_value[0].rpartition(".")[0])
    size = rows.head_size(attention)
    qkv = stacked([found(path) for path in family.query_key_value])
    wide = qkv.shape[0] // 3
    biases = [bias(path) for path in family.query_key_value]
    shift = None if biases[0] is None else torch.cat([one for one in biases if one is not None]).float()
    (up,) = family.ffn_in
    kind, window = row.kind(block)
    return Layer(
        qkv=pack(*_scaled(qkv, shift, wide, rows.scaling(attention))),
        out=matrix(family.attention_output),
        up=matrix(up),
        down=matrix(family.ffn_out),
        attention_norm=norms.add(block.get_submodule(row.attention_norm)),
        ffn_norm=norms.add(block.get_submodule(row.ffn_norm)),
        heads=wide // size,
        head_size=size,
        neurons=block.get_submodule(family.ffn_out).in_features,  # type: ignore[arg-type]
        activation=rows.activation_of(net, row),
        gated=row.gated,
        norm_first=row.norm_first,
        window=window,
        rotary=kinds.index(kind) if kinds else -1,
    )


def _scaled(qkv: Entries, bias: Tensor | None, wide: int, scaling: float) -> tuple[Entries, Tensor | None]:
    """Queries, keys and values with the scaling of the products in the queries, the first `wide` rows."""
    end = int(np.searchsorted(qkv.places, wide * qkv.shape[1]))
    values = qkv.values.copy()
    values[:end] *= np.float32(scaling)
    if bias is not None:
        bias = bias.clone()
        bias[:wide] *= scaling
    return Entries(shape=qkv.shape, places=qkv.places, values=values), bias
