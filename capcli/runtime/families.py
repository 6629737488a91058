"""How the architectures map to the one encoder of `kernels`: a row per family says what its base model does before and
after the layers, and where its norms are. Where the matrices are, `models.families` says.

Letters: B batch, S tokens, H hidden size, D head size, P places that a text may have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capcli.runtime import functions, kernels
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
    in the order in which they run. distances: (base model) -> a bias of each head for the distance from one place to
    another, from -P + 1 to P - 1 [heads, 2P - 1]. turns: (base model) -> for each kind of layer, what places turn pairs
    of dimensions by, cosine and sine [2, P, D / 2]. kind: (layer) -> its kind, and to how many places on each side its
    tokens attend, `kernels.FAR` for all.
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
    distances: Callable[[Any], Tensor] = lambda base: torch.zeros(0, 0)
    turns: Callable[[Any], dict[str, Tensor]] = lambda base: {}
    kind: Callable[[Any], tuple[str, int]] = lambda layer: ("", kernels.FAR)


def _embedded(base: Any, inputs: Inputs) -> Tensor:
    states: Tensor = base.embeddings(**inputs)
    return states


def _electra(base: Any, inputs: Inputs) -> Tensor:
    states = _embedded(base, inputs)
    return base.embeddings_project(states) if hasattr(base, "embeddings_project") else states


def _pooled(base: Any, states: Tensor) -> Tensor | None:
    return None if base.pooler is None else base.pooler(states)


def _albert(base: Any, inputs: Inputs) -> Tensor:
    states: Tensor = base.encoder.embedding_hidden_mapping_in(_embedded(base, inputs))
    return states


def _albert_pooled(base: Any, states: Tensor) -> Tensor | None:
    return None if base.pooler is None else base.pooler_activation(base.pooler(states[:, 0]))


def _albert_order(base: Any, names: list[str]) -> list[str]:
    """Groups of layers follow one another, each as often as the configuration says."""
    config, inside = base.config, base.config.inner_group_num
    groups = [int(i / (config.num_hidden_layers / config.num_hidden_groups)) for i in range(config.num_hidden_layers)]
    return [name for group in groups for name in names[group * inside : group * inside + inside]]


def _mpnet_distances(base: Any) -> Tensor:
    most = base.config.max_position_embeddings
    bias = base.encoder.compute_position_bias(torch.zeros(1, most, 1))[0].detach().float()  # [heads, from, to]
    return torch.cat([bias[:, -1], bias[:, 0, 1:]], dim=1)


def _modernbert_turns(base: Any) -> dict[str, Tensor]:
    places = torch.arange(base.config.max_position_embeddings).unsqueeze(0)
    found = {}
    for kind in sorted(set(base.config.layer_types)):
        both = base.rotary_emb(torch.zeros(()), places, kind)  # each half twice
        found[kind] = torch.stack([half[0, :, : half.shape[-1] // 2] for half in both])
    return found


def _modernbert_kind(layer: Any) -> tuple[str, int]:
    local = layer.attention_type == "sliding_attention"
    return layer.attention_type, layer.config.sliding_window if local else kernels.FAR


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
    "albert": Row(
        embed=_albert,
        pool=_albert_pooled,
        attention_norm="attention.LayerNorm",
        ffn_norm="full_layer_layer_norm",
        order=_albert_order,
    ),
    "mpnet": Row(
        embed=_embedded,
        pool=_pooled,
        attention_norm="attention.LayerNorm",
        distances=_mpnet_distances,
    ),
    "modernbert": Row(
        embed=_embedded,
        finish=lambda base, states: base.final_norm(states),
        attention_norm="attn_norm",
        ffn_norm="mlp_norm",
        norm_first=True,
        activation="hidden_activation",
        gated=True,
        turns=_modernbert_turns,
        kind=_modernbert_kind,
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
