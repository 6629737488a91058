"""From a network and its weights to the encoder: each layer read by the paths of its family."""

from __future__ import annotations

from dataclasses import dataclass
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

Matrices = dict[str, "Tensor | Kept"]
"""The prunable matrices of a network by the names of their weights."""


def encoder(net: Any, family: Family, matrices: Matrices, threads: int) -> Encoder:
    """The layers of `net` with these matrices; its own may be on `meta`. Everything else is read from `net`.

    `matrices` is emptied on the way, so that no matrix is there twice. Raises `Unsupported`.
    """
    row = rows.row_of(net)
    blocks = families.blocks(net, family)
    norms, turns = _Norms(net.config.hidden_size), row.turns(net.base_model)
    kinds = list(turns)
    built = {
        name: _layer(_Block(name, block, matrices), family, row, norms, kinds, rows.activation_of(net, row))
        for name, block in blocks.items()
    }
    return Encoder(
        [built[name] for name in row.order(net.base_model, list(blocks))],
        norms=norms.stacked(),
        epsilon=norms.epsilon,
        threads=threads,
        distances=row.distances(net.base_model).numpy(),
        turns=torch.stack(list(turns.values())).numpy() if turns else np.zeros((0, 2, 0, 0), np.float32),
    )


class _Norms:
    """The norms of the layers, in the order in which they were added."""

    def __init__(self, hidden_size: int) -> None:
        self.found: list[Tensor] = [torch.zeros(0, 2, hidden_size)]
        self.epsilon = 0.0

    def add(self, module: nn.Module) -> int:
        """The index of a norm; -1 where there is none. Raises `Unsupported` for another one than `LayerNorm`."""
        if isinstance(module, nn.Identity):
            return -1
        if not isinstance(module, nn.LayerNorm) or (len(self.found) > 1 and module.eps != self.epsilon):
            raise Unsupported("the runtime for sparse weights takes layers with norms of one kind")
        self.epsilon = module.eps
        self.found.append(rows.norm_of(module)[None])
        return len(self.found) - 2

    def stacked(self) -> Any:
        """Scale and shift of all [norms, 2, H]."""
        return torch.cat(self.found).numpy()


@dataclass(frozen=True)
class _Block:
    """One layer of a network, whose matrices are taken out of `matrices`."""

    name: str
    module: nn.Module
    matrices: Matrices

    def part(self, path: str) -> Any:
        return self.module.get_submodule(path)

    def entries(self, path: str) -> Entries:
        return entries(self.matrices.pop(f"{self.name}.{path}.weight"))

    def matrix(self, path: str) -> Matrix:
        return pack(self.entries(path), self.part(path).bias)

    def projections(self, paths: tuple[str, ...], wide: int, scaling: float) -> Matrix:
        """Queries, keys and values as one matrix; the first `wide` rows, the queries, times what scales products."""
        found = stacked([self.entries(path) for path in paths])
        end = int(np.searchsorted(found.places, wide * found.shape[1]))
        values = found.values.copy()
        values[:end] *= np.float32(scaling)
        biases = [self.part(path).bias for path in paths]
        bias = None if biases[0] is None else torch.cat(biases).detach().float().clone()
        if bias is not None:
            bias[:wide] *= scaling
        return pack(Entries(shape=found.shape, places=found.places, values=values), bias)


def _layer(block: _Block, family: Family, row: Row, norms: _Norms, kinds: list[str], activation: int) -> Layer:
    attention = block.part(family.query_key_value[0].rpartition(".")[0])
    size = rows.head_size(attention)
    wide = block.part(family.attention_output).in_features
    (up,) = family.ffn_in
    kind, window = row.kind(block.module)
    return Layer(
        qkv=block.projections(family.query_key_value, wide, rows.scaling(attention)),
        out=block.matrix(family.attention_output),
        up=block.matrix(up),
        down=block.matrix(family.ffn_out),
        attention_norm=norms.add(block.part(row.attention_norm)),
        ffn_norm=norms.add(block.part(row.ffn_norm)),
        heads=wide // size,
        head_size=size,
        neurons=block.part(family.ffn_out).in_features,
        activation=activation,
        gated=row.gated,
        norm_first=row.norm_first,
        window=window,
        rotary=kinds.index(kind) if kinds else -1,
    )
