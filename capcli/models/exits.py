"""Exits: a linear classifier after each layer but the last, so that a text that is clear early needs no further layer.

After COST-EFF ("COST-EFF: Collaborative Optimization of Spatial and Temporal Efficiency with Slenderized Multi-exit
Language Models", arXiv 2210.15523). The network itself is left as it is: hooks look at what its layers put out, and end
the pass when every text of the batch has left.

Letters: B batch, S tokens, L layers, C labels, H hidden size, N examples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capcli.data.kinds import KINDS
from capcli.errors import ModelError
from capcli.models import families, hf, predict
from capcli.models.devices import Compute
from capcli.models.model import Exits, Model

PREFIX = "exits."
WEIGHT, BIAS = f"{PREFIX}weight", f"{PREFIX}bias"  # the names of the tensors in a weight file

Look = Callable[[Tensor], None]  # what is done with the states [B, S, H] that a layer puts out
_LOOK: ContextVar[Look | None] = ContextVar("look", default=None)  # of the pass of this thread


class _AllLeftError(Exception):
    """Ends a forward pass of which no further layer is wanted."""


# What an exit is -----------------------------------------------------------------------------------------------------


def check(model: Model) -> None:
    """Raise `ModelError` for a model in which exits have no meaning."""
    if not KINDS[model.kind].single:
        raise ModelError(
            f"{model.source} is for {model.kind}, and exits are for models that choose one label for a text",
            "use another format",
        )
    if model.family is None or model.family.causal:
        what = "whose layers capcli does not know" if model.family is None else "a decoder"
        raise ModelError(f"{model.source} is a {model.net.config.model_type} model, {what}: exits are for encoders")
    for what, count in {"layer": depth(model.net.config), "label": model.net.config.num_labels}.items():
        if count < 2:
            raise ModelError(f"{model.source} has a single {what}: there is nothing to gain from exits")


def depth(config: Any) -> int:
    """L, how many layers a text goes through; layers that share their weights (ALBERT) count each time."""
    return int(config.num_hidden_layers * getattr(config, "inner_group_num", 1))


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The tensors of the exits of a network that this configuration describes, by name."""
    n, c = depth(config) - 1, config.num_labels
    return {WEIGHT: (n, c, config.hidden_size), BIAS: (n, c)}


def tensors(exits: Exits | None) -> dict[str, Tensor]:
    """The exits as a weight file has them, by name; empty for none."""
    return {} if exits is None else {WEIGHT: exits.weight, BIAS: exits.bias}


def only_torch(source: str) -> ModelError:
    """The error of a runtime other than PyTorch, which computes layers together."""
    return ModelError(f"{source} has exits, which only PyTorch computes", "use --runtime torch, or leave it out")


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """What an exit reads, [B, H] of length 1: the mean over real tokens of states [B, S, H], mask [B, S]."""
    return F.normalize(families.mean(states.float(), mask), dim=-1)


def uncertainty(logits: Tensor) -> Tensor:
    """Entropy of the labels over that of a guess, from 0 to 1, [...] of logits [..., C]."""
    logs = logits.float().log_softmax(dim=-1)
    return -(logs.exp() * logs).sum(dim=-1) / math.log(logits.shape[-1])


def reordered(exits: Exits | None, order: Sequence[int]) -> Exits | None:
    """The exits with their labels in this order."""
    if exits is None:
        return None
    return dataclasses.replace(exits, weight=exits.weight[:, list(order)], bias=exits.bias[:, list(order)])


# A pass --------------------------------------------------------------------------------------------------------------


def watch(model: Model) -> list[Any]:
    """Hooks after each layer that do nothing but in a pass that is `looked` at; returns their handles."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        look = _LOOK.get()
        if look is not None:
            look(output[0] if isinstance(output, tuple) else output)

    return [block.register_forward_hook(hook) for block in families.blocks(model.net, model.family).values()]


@contextlib.contextmanager
def looked(look: Look) -> Iterator[None]:
    """While inside, `look` gets what each layer of a watched network puts out, from the input upwards."""
    token = _LOOK.set(look)
    try:
        yield
    finally:
        _LOOK.reset(token)


class _Pass:
    """Who has left in a pass: logits [B, C] of those texts, and the number of layers [B] after which each answered."""

    def __init__(self, exits: Exits, mask: Tensor, threshold: float) -> None:
        self.exits, self.mask, self.threshold, self.number = exits, mask, threshold, 0
        self.logits = torch.zeros(len(mask), exits.bias.shape[1], device=mask.device)
        self.left = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        self.layers = torch.full((len(mask),), len(exits.bias) + 1, device=mask.device)

    def look(self, states: Tensor) -> None:
        """See whether some are sure after this layer. Raises `_AllLeftError` when nobody is left."""
        index, self.number = self.number, self.number + 1
        if index == len(self.exits.bias):
            return
        with torch.autocast(states.device.type, enabled=False):
            logits = F.linear(pooled(states, self.mask), self.exits.weight[index], self.exits.bias[index])
        sure = (uncertainty(logits) < self.threshold) & ~self.left
        self.logits = torch.where(sure[:, None], logits, self.logits)
        self.layers = torch.where(sure, index + 1, self.layers)
        self.left = self.left | sure
        if bool(self.left.all()):
            raise _AllLeftError


class Exiting:
    """A classifier that answers after the first layer whose exit is sure, or as a whole where none is.

    Each text of a batch decides for itself, and the batch goes on until all have left: that saves most with one text.
    threshold: an exit is sure when the entropy of its answer, as a share of the largest possible, is below it; 0 for no
    exit at all. taken: how many texts `run` has answered after each of the L layers.
    """

    def __init__(self, model: Model) -> None:
        assert model.exits is not None, "a model with exits"
        device = next(model.net.parameters()).device
        found = dataclasses.replace(model.exits, weight=model.exits.weight.to(device), bias=model.exits.bias.to(device))
        self.model, self.exits, self.threshold = model, found, found.threshold
        self.taken = torch.zeros(len(found.bias) + 1, dtype=torch.int64)
        watch(model)

    def __call__(self, **inputs: Tensor) -> Any:
        """`logits` [B, C], and `layers` [B], after how many layers each text was answered, for inputs [B, S]."""
        with torch.inference_mode():
            mask = inputs.get("attention_mask")
            given = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"]) if mask is None else mask}
            logits, layers = self.answer(given)
        return hf.model_output({"logits": logits, "layers": layers})

    def answer(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and layers [B], see `__call__`."""
        found = _Pass(self.exits, inputs["attention_mask"], self.threshold)
        if self.threshold == 0:
            return predict.forward(self.model, inputs)[0], found.layers
        try:
            with looked(found.look):
                whole = predict.forward(self.model, inputs)[0]
        except _AllLeftError:
            return found.logits, found.layers
        return torch.where(found.left[:, None], found.logits.to(whole.dtype), whole), found.layers

    def run(self, on: Compute) -> predict.Run:
        """The same as something that answers, on its device; it counts in `taken`."""

        def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, None]:
            with torch.inference_mode(), on.autocast():
                logits, layers = self.answer({name: tensor.to(on.device) for name, tensor in inputs.items()})
                self.taken += torch.bincount(layers.cpu() - 1, minlength=len(self.taken))
            return logits, None

        return run


# What layers cost ----------------------------------------------------------------------------------------------------


def costs(model: Model) -> Tensor:
    """The share of the multiplications per token that is done after each layer [L], counted in the matrices of the
    layers; those of the attention itself, which grow with the length, are left out."""
    linears, blocks = families.prunable(model.net, model.family), families.blocks(model.net, model.family)
    each = [sum(m.weight.numel() for name, m in linears.items() if name.startswith(f"{block}.")) for block in blocks]
    times = depth(model.net.config) // len(each)  # of layers that share their weights
    return torch.tensor(each).repeat_interleave(times).cumsum(0).double() / (times * sum(each))


def mean_layers(taken: Tensor) -> float:
    """Layers per text, of how many texts were answered after each [L]."""
    return int((taken * torch.arange(1, len(taken) + 1)).sum()) / int(taken.sum())


def mean_cost(taken: Tensor, shares: Tensor) -> float:
    """The share of the layers' multiplications that was computed, of `taken` [L] and `costs` [L]."""
    return float((taken * shares).sum()) / int(taken.sum())
