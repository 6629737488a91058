"""A model: the network with what is needed to use it.

Letters: B batch, S tokens, H hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capcli.data.kinds import KINDS
from capcli.errors import ConfigError, ModelError
from capcli.models import families, hf, slicing
from capcli.models.devices import Compute
from capcli.models.heads import head_names
from capcli.models.sentences import Embedding

WEIGHTS_FILE, CONFIG_FILE = "model.cap.safetensors", "cap_config.json"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of a network: in prunable matrices, and in all."""

    prunable: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Slices:
    """What slicing left of the layers, by the name of their block, and the parameters that the network had before."""

    sizes: Mapping[str, slicing.Size]
    before: ParameterCounts


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The ranks of the factors in place of matrices, by the names that these had, see `models.lowrank`; and the
    parameters that the network had before."""

    ranks: Mapping[str, int]
    before: ParameterCounts


@dataclass(frozen=True, kw_only=True)
class Exits:
    """Classifiers after all layers but the last, see `models.exits`: weight [L-1, C, H], bias [L-1, C], and the
    threshold below which their uncertainty ends a pass."""

    weight: Tensor
    bias: Tensor
    threshold: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network with what is needed to use it: tokenizer, family (None when unknown), label names and the task kind.

    The layers of a sliced model are smaller than its configuration says; `slices` then tells by how much. lowrank: the
    matrices that two factors stand in for. stored_bytes: of the weight files that a dense model was read from, and
    `absent` the names of the tensors that these do not have, which were drawn at random. embedding: how a network
    without a head makes its vectors. exits: where a text may leave early; only what `runtime.choice` opens looks at
    them.
    """

    net: Any
    tokenizer: Any
    family: families.Family | None
    labels: tuple[str, ...]
    kind: str
    source: str
    notes: tuple[str, ...] = ()
    slices: Slices | None = None
    lowrank: LowRank | None = None
    stored_bytes: int | None = None
    absent: frozenset[str] = frozenset()
    embedding: Embedding | None = None
    exits: Exits | None = None

    @property
    def is_sliced(self) -> bool:
        """Whether layers are smaller than the configuration says, so that no stock folder can hold the network."""
        return self.slices is not None

    @property
    def altered(self) -> str:
        """What was done to its layers that its configuration does not say; empty where they are as it says."""
        return "factorised" if self.lowrank is not None else "sliced" if self.is_sliced else ""

    @property
    def before_slicing(self) -> ParameterCounts:
        """Parameters of the network as its configuration says: what sparsity is counted against."""
        changed = self.slices or self.lowrank
        return changed.before if changed is not None else count_parameters(self.net, self.family)

    @property
    def per_token(self) -> bool:
        """Whether the network answers for each token and not for the whole input."""
        return KINDS[self.kind].per_token

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs that the tokenizer gives and the network takes, in a fixed order."""
        given = accepted_inputs(self.net).intersection(self.tokenizer.model_input_names)
        return tuple(name for name in INPUTS if name in given)

    @property
    def unknown(self) -> str:
        """What is said of a model whose family is not in the table, where heads and neurons are asked for."""
        return f"{self.source} is a {self.net.config.model_type} model, whose heads and neurons capcli does not know"

    def layers(self) -> list[families.Layer]:
        """The heads and neurons of the layers, from the input upwards.

        Raises:
            ConfigError: the family is unknown, or the layers were sliced or factorised and have sizes of their own.
        """
        if self.altered:
            raise ConfigError(
                f"{self.source} is {self.altered}: its layers no longer have heads and neurons to choose from",
                "use the pruned model that it was made from",
            )
        if self.family is None:
            raise ConfigError(
                self.unknown,
                f"use an unstructured method such as cap-soft; known families: {', '.join(families.FAMILIES)}",
            )
        return families.layers(self.net, self.family)

    def prunable(self) -> dict[str, nn.Linear]:
        """The prunable linear layers by the name of their weight, in reading order (section 3)."""
        return families.prunable(self.net, self.family)

    def nonzero(self) -> int:
        """How many weights of the prunable matrices are not zero."""
        return sum(int(linear.weight.count_nonzero()) for linear in self.prunable().values())

    def encoder_parameters(self) -> int:
        """Parameters of the layer stack: prunable matrices, biases and norms."""
        stack = families.blocks(self.net, self.family).values()
        return sum({id(p): p.numel() for block in stack for p in block.parameters()}.values())


def added_names(model: Model) -> set[str]:
    """The names of the tensors of a dense model that are not pre-trained: its head, and what its files do not have."""
    return head_names(model.net) | set(model.absent)


def pooling_of(model: Model, chosen: str) -> str:
    """The pooling that `auto` stands for, else the chosen one: without a head `head`, the vector that the model gives;
    otherwise that of the family."""
    return "head" if model.embedding and chosen == "auto" else families.pooling_of(model.family, chosen)


def count_parameters(net: Any, family: families.Family | None) -> ParameterCounts:
    """Parameters of a network, in its prunable matrices and in all."""
    prunable = sum(linear.weight.numel() for linear in families.prunable(net, family).values())
    return ParameterCounts(prunable=prunable, total=sum(p.numel() for p in net.parameters()))


def sliced(model: Model) -> Model:
    """The same function in smaller layers, as far as zeros allow; see `slicing.slice_layers`. A new model.

    Raises:
        ConfigError: the family is unknown, or the model is sliced already.
    """
    model.layers()
    assert model.family is not None, "layers() refuses unknown families"
    smaller = copy(model)
    sizes = slicing.slice_layers(smaller.net, model.family)
    return dataclasses.replace(smaller, slices=Slices(sizes=sizes, before=model.before_slicing))


@functools.cache
def _inputs(forward: Callable[..., Any]) -> frozenset[str]:
    """Those of `INPUTS` that a forward function takes."""
    return frozenset(inspect.signature(forward).parameters).intersection(INPUTS)


def accepted_inputs(net: Any) -> frozenset[str]:
    """Names of the inputs that the network takes; token types only when it tells two of them apart."""
    names = _inputs(type(net.base_model).forward)
    return names - ({"token_type_ids"} if getattr(net.config, "type_vocab_size", 2) < 2 else set())


def check_finite(parameters: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Raise `ModelError` when a parameter is not finite; names the first. Those on `meta` have no values."""
    there = [(name, parameter) for name, parameter in parameters if parameter.numel() and not parameter.is_meta]
    ends = {name: torch.stack(parameter.aminmax()) for name, parameter in there}  # keep any NaN
    bad = [name for name, least_and_most in ends.items() if not bool(least_and_most.isfinite().all())]
    if bad:
        raise ModelError(
            f"the weights of {source} contain values that are not finite, in {len(bad)} tensors, first {bad[0]}"
        )


def place(model: Model, on: Compute) -> Model:
    """Move the network to the device, in place."""
    model.net.to(on.device)
    hf.attend(model.net, on.device)
    return model


def copy(model: Model) -> Model:
    """The same model with weights of its own."""
    return dataclasses.replace(model, net=deepcopy(model.net))


def longest_input(model: Model, wanted: int) -> int:
    """`wanted` tokens, or as many as tokenizer and position embeddings allow."""
    positions = getattr(model.net.config, "max_position_embeddings", None) or wanted
    for name, module in model.net.base_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            positions -= module.padding_idx + 1  # RoBERTa and its kin count positions from after the padding id
    most = model.embedding.longest if model.embedding else None
    return int(min(wanted, model.tokenizer.model_max_length, positions, most or positions))


def check_stock(model: Model) -> None:
    """Raise `ModelError` for a sliced or factorised model: transformers has no configuration for such layers."""
    if model.altered:
        raise ModelError(
            f"{model.source} is {model.altered}: no configuration of transformers describes its layers",
            "export the pruned model that it was made from, or use --to onnx",
        )
