"""Architecture families: where the matrices of a layer lie, which rows and columns make a head or a neuron, and how a
sentence becomes one vector. A family outside the table is pruned without structure.

Letters: B batch, S tokens, H hidden size, C labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The rows (axis 0, outputs) or columns (axis 1, inputs) of a linear layer that belong to units.

    Unit u has the `size` rows or columns from `start + u * size` on. A fused matrix has a slot per part.
    """

    linear: nn.Linear
    axis: int
    start: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Units:
    """The `count` units of one kind in a layer: heads, neurons, or dimensions; `slots` is what goes together.

    products: multiply-adds of one unit in the products of attention, for each token and each token that it looks at.
    """

    count: int
    slots: tuple[Slot, ...]
    products: int = 0

    @property
    def reader(self) -> nn.Linear:
        """The matrix whose columns read what the units put out."""
        return self.slots[-1].linear

    @property
    def has_reader(self) -> bool:
        """Whether the last slot reads what the units put out; not so for query-key units, whose output is a product."""
        return self.slots[-1].axis == 1

    @property
    def weights(self) -> int:
        """Weights that one unit holds."""
        return sum(slot.size * slot.linear.weight.shape[1 - slot.axis] for slot in self.slots)

    def macs(self, length: int) -> int:
        """Multiply-adds of one unit for each token of a text of `length` tokens: one for each weight, and products."""
        return self.weights + length * self.products


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The units of one encoder layer. With grouped queries a head is a key-value head with its queries.

    The dimensions inside the heads, in the order of the heads (units of GRAIN): query_key: row j of query and key, and
    of projections for positions; value_output: row j of value and column j of the output. None where positions are
    rotated into pairs of dimensions, which cannot be taken out one by one. keys: of the matrices that make queries and
    keys, those that make keys; empty where one matrix makes both.
    """

    heads: Units
    neurons: Units
    query_key: Units | None = None
    value_output: Units | None = None
    keys: tuple[nn.Linear, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture family.

    layers: path of the layers below the base model, `*` for each member of a list. In a layer: query_key_value: the
    three matrices, or one that holds them one after the other; more_keys, more_queries: further matrices that make keys
    and queries, of positions, where present; attention_output; ffn_in: what makes the neurons, several or a multiple of
    their number when gated;
    ffn_out. A sentence is represented by its first token; by its last when causal, because only that has seen them all.
    vector: (net, output of the base model, state [B, H] of that token, mask [B, S]) -> what enters the classifier,
    [B, H].
    classify: (net, vector) -> logits [B, C].
    attention: what in it depends on heads and their dimensions. `plain`: nothing but the products of query and key;
    `rotary`: pairs of dimensions turn with the position; `biased`: every head has a bias for positions, which the
    layers share; `disentangled`: positions read query and key separately. activation: the function in the neurons.
    pretrained_vector: whether all that `vector` computes with is pre-trained, not drawn at random with a new head.
    """

    layers: str
    query_key_value: tuple[str, ...]
    attention_output: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    vector: Callable[[Any, Any, Tensor, Tensor], Tensor]
    classify: Callable[[Any, Tensor], Tensor]
    more_keys: tuple[str, ...] = ()
    more_queries: tuple[str, ...] = ()
    causal: bool = False
    attention: Literal["plain", "rotary", "biased", "disentangled"] = "plain"
    activation: str = "intermediate.intermediate_act_fn"
    pretrained_vector: bool = False

    @property
    def more_heads(self) -> tuple[str, ...]:
        """Paths of further matrices whose rows belong to heads, where present."""
        return self.more_keys + self.more_queries

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of the prunable matrices of a layer, in reading order."""
        return (*self.query_key_value, *self.more_heads, self.attention_output, *self.ffn_in, self.ffn_out)


def pooling_of(family: Family | None, chosen: str) -> str:
    """The pooling that `auto` stands for, else the chosen one: `head` where that vector means something before a model
    is fine-tuned, `cls` where it would be a random projection; of an unknown family `head`, which is the mean."""
    if chosen != "auto":
        return chosen
    return "head" if family is None or family.pretrained_vector else "cls"


# Sentence vectors ----------------------------------------------------------------------------------------------------


def represented(states: Tensor, mask: Tensor, causal: bool) -> Tensor:
    """The state [B, H] of the first token, or of the last real one when causal, of states [B, S, H], mask [B, S]."""
    if not causal:
        return states[:, 0]
    return states[torch.arange(len(states), device=states.device), mask.sum(dim=1) - 1]


def mean(states: Tensor, mask: Tensor) -> Tensor:
    """The mean state [B, H] over real tokens of states [B, S, H], mask [B, S]."""
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def _roberta(net: Any, out: Any, first: Tensor, mask: Tensor) -> Tensor:
    head = net.classifier
    return torch.tanh(head.dense(head.dropout(first)))


def _electra(net: Any, out: Any, first: Tensor, mask: Tensor) -> Tensor:
    head = net.classifier
    vector: Tensor = head.activation(head.dense(head.dropout(first)))
    return vector


def _modernbert(net: Any, out: Any, first: Tensor, mask: Tensor) -> Tensor:
    pooled = first if net.config.classifier_pooling == "cls" else mean(out.last_hidden_state, mask)
    vector: Tensor = net.head(pooled)
    return vector


_BERT = Family(
    layers="encoder.layer.*",
    query_key_value=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_output="attention.output.dense",
    ffn_in=("intermediate.dense",),
    ffn_out="output.dense",
    vector=lambda net, out, first, mask: out.pooler_output,
    classify=lambda net, vector: net.classifier(net.dropout(vector)),
    pretrained_vector=True,
)
_ROBERTA = dataclasses.replace(
    _BERT,
    vector=_roberta,
    classify=lambda net, vector: net.classifier.out_proj(net.classifier.dropout(vector)),
    pretrained_vector=False,
)
_LLAMA = Family(
    layers="layers.*",
    query_key_value=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_output="self_attn.o_proj",
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
    ffn_out="mlp.down_proj",
    vector=lambda net, out, last, mask: last,
    classify=lambda net, vector: net.score(vector),
    causal=True,
    attention="rotary",
    activation="mlp.act_fn",
    pretrained_vector=True,
)
FAMILIES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": dataclasses.replace(_ROBERTA, vector=_electra),
    "distilbert": Family(
        layers="transformer.layer.*",
        query_key_value=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        attention_output="attention.out_lin",
        ffn_in=("ffn.lin1",),
        ffn_out="ffn.lin2",
        vector=lambda net, out, first, mask: torch.relu(net.pre_classifier(first)),
        classify=lambda net, vector: net.classifier(net.dropout(vector)),
        activation="ffn.activation",
    ),
    "mpnet": dataclasses.replace(
        _ROBERTA,
        query_key_value=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        attention_output="attention.attn.o",
        attention="biased",
    ),
    "deberta-v2": dataclasses.replace(
        _BERT,
        query_key_value=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        more_keys=("attention.self.pos_key_proj",),
        more_queries=("attention.self.pos_query_proj",),
        vector=lambda net, out, first, mask: net.pooler(out.last_hidden_state),
        attention="disentangled",
        pretrained_vector=False,
    ),
    "albert": dataclasses.replace(
        _BERT,
        layers="encoder.albert_layer_groups.*.albert_layers.*",
        query_key_value=("attention.query", "attention.key", "attention.value"),
        attention_output="attention.dense",
        ffn_in=("ffn",),
        ffn_out="ffn_output",
        activation="activation",
    ),
    "modernbert": Family(
        layers="layers.*",
        query_key_value=("attn.Wqkv",),
        attention_output="attn.Wo",
        ffn_in=("mlp.Wi",),
        ffn_out="mlp.Wo",
        vector=_modernbert,
        classify=lambda net, vector: net.classifier(net.drop(vector)),
        attention="rotary",
        activation="mlp.act",
        pretrained_vector=True,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


# Matrices and groups -------------------------------------------------------------------------------------------------


def blocks(net: Any, family: Family | None) -> dict[str, nn.Module]:
    """The layers of the network by name, each once; for an unknown family, the members of every list of modules."""
    base = net.base_model
    prefix = "" if base is net else net.base_model_prefix + "."
    if family is not None:
        return {prefix + name: module for name, module in _matching(base, family.layers.split("."), "")}
    lists = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(other + ".") for other, _ in lists)]
    return {f"{prefix}{name}.{i}": member for name, module in outer for i, member in enumerate(module)}


def _matching(module: nn.Module, path: list[str], name: str) -> Iterator[tuple[str, nn.Module]]:
    if not path:
        yield name, module
        return
    members = dict(module.named_children()) if path[0] == "*" else {path[0]: module.get_submodule(path[0])}
    for key, member in members.items():
        yield from _matching(member, path[1:], f"{name}.{key}" if name else key)


def prunable(net: Any, family: Family | None) -> dict[str, nn.Linear]:
    """The prunable linear layers by the name of their weight, in reading order (section 3); of a matrix in factors,
    both of these.

    For an unknown family, every linear layer inside the repeated blocks.
    """
    found: dict[str, nn.Linear] = {}
    for name, block in blocks(net, family).items():
        inside = dict(block.named_modules())
        if family is not None:
            paths = [path for path in family.linears if path in inside or path not in family.more_heads]
        else:
            paths = [path for path, module in inside.items() if is_linear(module)]
        for path in paths:
            at = f"{name}.{path}" if path else name
            found |= {f"{at}{part}.weight": linear for part, linear in _parts(block.get_submodule(path)).items()}
    return found


def _parts(module: Any) -> dict[str, Any]:
    """A linear layer, or the two in sequence that took its place (`models.lowrank`), by what their names add."""
    return {f".{i}": part for i, part in enumerate(module)} if isinstance(module, nn.Sequential) else {"": module}


def is_linear(module: nn.Module) -> bool:
    """A linear layer, or the transposed one of GPT-2; also of a class that PyTorch derived to mask its weight."""
    return isinstance(module, nn.Linear) or any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def layers(net: Any, family: Family) -> list[Layer]:
    """The units of the layers, from the input upwards; a layer that is used several times stands once."""
    heads = getattr(net.config, "num_key_value_heads", None) or net.config.num_attention_heads
    return [_layer(block, family, heads) for block in blocks(net, family).values()]


def _layer(block: nn.Module, family: Family, n_heads: int) -> Layer:
    def linear(path: str) -> Any:
        return block.get_submodule(path)

    present = {name for name, _ in block.named_modules()}
    out, down = linear(family.attention_output), linear(family.ffn_out)
    thirds = 3 // len(family.query_key_value)
    head_slots = [slot for path in family.query_key_value for slot in _rows(linear(path), thirds, n_heads)]
    head_slots += [slot for path in family.more_heads if path in present for slot in _rows(linear(path), 1, n_heads)]
    neurons = down.in_features
    wide = [slot for p in family.ffn_in for slot in _rows(linear(p), linear(p).out_features // neurons, neurons)]
    found = Layer(
        heads=_heads(n_heads, (*head_slots, _columns(out, n_heads))),
        neurons=Units(count=neurons, slots=(*wide, _columns(down, neurons))),
        keys=tuple(linear(path) for path in (*family.query_key_value[1:2], *family.more_keys) if path in present),
    )
    return found if family.attention == "rotary" else with_dimensions(found)


def _heads(count: int, slots: tuple[Slot, ...]) -> Units:
    """Heads: each dimension of a query meets that of every key, and each that is put out sums those of every value."""
    return Units(count=count, slots=slots, products=slots[0].size + slots[-1].size)


def with_dimensions(layer: Layer) -> Layer:
    """The layer with the dimensions inside its heads as units; query, key and value are matrices of their own."""
    query, key, value, *more, output = (dataclasses.replace(slot, size=1) for slot in layer.heads.slots)
    return dataclasses.replace(
        layer,
        query_key=Units(count=query.linear.out_features, slots=(query, key, *more), products=1),
        value_output=Units(count=value.linear.out_features, slots=(value, output), products=1),
    )


def _rows(linear: nn.Linear, parts: int, count: int) -> list[Slot]:
    """The rows of `count` units in each of the `parts` that follow one another in a matrix."""
    part = linear.out_features // parts
    return [Slot(linear=linear, axis=0, start=i * part, size=part // count) for i in range(parts)]


def _columns(linear: nn.Linear, count: int) -> Slot:
    return Slot(linear=linear, axis=1, start=0, size=linear.in_features // count)
