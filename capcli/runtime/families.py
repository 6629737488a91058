"""How the architectures map to the one encoder of `kernels`: a row per family says what its base model does before and
after the layers, and where its norms are. Where the matrices are, `models.families` says.

Letters: B batch, S tokens, H hidden size, D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capcli.runtime import functions
from capcli.runtime.packing import Unsupported

ACTIVATIONS = {
    "gelu": functions.GELU,
    "gelu_python": functions.GELU,
    "gelu_new": functions.GELU_TANH,
    "gelu_fast": functions.GELU_TANH,
    "gelu_pytorch_tanh": functions.GELU_TANH,
    "relu": functions.RELU,
    "silu": functions.SILU,
    "swish": functions.SILU,
}
Inputs = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the runtime knows of a family.

    embed: (base model, its inputs) -> states [B, S, H] that enter the first layer. finish: (base model, states after
    the last layer) -> what the base model puts out. pool: (base model, those) -> vector [B, H], or None. attention_norm
    and ffn_norm: paths in a layer; norm_first: before what they belong to, not behind the sum. activation: its name in
    the configuration. gated: the neurons are a product of two. order: (base model, names of the layers) -> the layers
    in the order in which they run. window: (configuration, number of a layer) -> to how many places on each side a
    token attends, None for all. turns: (base model, number of a layer) -> what positions turn pairs of dimensions by,
    for each of the places, cosine and sine [2, places, D / 2]. distances: (base model) -> bias of each head for the
    distances between two places.
    """

    embed: Callable[[Any, Inputs], Tensor]
    attention_norm: str = "attention.output.LayerNorm"
    ffn_norm: str = "output.LayerNorm"
    finish: Callable[[Any, Tensor], Tensor] = lambda base, states: states
    pool: Callable[[Any, Tensor], Tensor | None] = lambda base, states: None
    norm_first: bool = False
    activation: str = "hidden_act"
    gated: bool = False
    order: Callable[[Any, list[str]], list[str]] = lambda base, names: names


def _embedded(base: Any, inputs: Inputs) -> Tensor:
    states: Tensor = base.embeddings(**inputs)
    return states


def _electra(base: Any, inputs: Inputs) -> Tensor:
    states = _embedded(base, inputs)
    return base.embeddings_project(states) if hasattr(base, "embeddings_project") else states


def _pooled(base: Any, states: Tensor) -> Tensor | None:
    return None if base.pooler is None else base.pooler(states)


_BERT = Row(embed=_embedded, pool=_pooled)
ROWS = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": Row(embed=_electra),
    "distilbert": Row(
        embed=_embedded,
        attention_norm="sa_layer_norm",
        ffn_norm="output_layer_norm",
        activation="activation",
    ),
}


def row_of(net: Any) -> Row:
    """The row of a network's family. Raises `Unsupported` for families, activations and configurations without one."""
    config = net.config
    row = ROWS.get(config.model_type)
    if row is None:
        known = ", ".join(ROWS)
        raise Unsupported(f"the runtime for sparse weights does not know {config.model_type} models", f"known: {known}")
    if getattr(config, "is_decoder", False):
        raise Unsupported("the runtime for sparse weights does not serve decoders")
    activation_of(net, row)
    return row


def activation_of(net: Any, row: Row) -> int:
    """The number of the function in the neurons. Raises `Unsupported`."""
    name = getattr(net.config, row.activation)
    if name not in ACTIVATIONS:
        raise Unsupported(f"the runtime for sparse weights does not know the activation {str(name)[:40]!r}")
    return ACTIVATIONS[name]


def head_size(attention: Any) -> int:
    """Dimensions of a head of an attention module, which slicing may have changed."""
    return int(getattr(attention, "attention_head_size", 0) or attention.head_dim)


def scaling(attention: Any) -> float:
    """What the products of queries and keys are multiplied by; slicing keeps the one of the full size."""
    return float(getattr(attention, "scaling", head_size(attention) ** -0.5))


def norm_of(module: nn.Module) -> Tensor:
    """Scale and shift [2, H] of a norm."""
    weight: Any = module.weight
    bias: Any = module.bias
    shift = torch.zeros_like(weight) if bias is None else bias
    return torch.stack([weight, shift]).detach().float()
