"""Slicing: a network whose layers are smaller by all that its zeros have made useless. It computes the same function,
in transformers' own layers, when it does not train; attention dropout would break the sums that constants rest on.

Letters: A key-value heads, G query heads for each of them, D head size, F neurons; A', D', F' what is left of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from capcli.models import families
from capcli.models.families import Family, Layer, Slot, Units

# Head sizes and numbers of neurons are multiples of these, as fast kernels want them: 409 neurons take longer than 416.
STEP, NEURON_STEP = 8, 8


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of one layer: key-value heads A, head size D, neurons F."""

    heads: int
    head_size: int
    neurons: int


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What stays of one layer, as indices into it: heads [A'], of each the query-key and the value-output dimensions
    [A', D'], neurons [F']. The index -1 stands for zeros that fill a place."""

    heads: Tensor
    query_key: Tensor
    value: Tensor
    neurons: Tensor

    @property
    def size(self) -> Size:
        """The size of the layer when nothing else is left of it."""
        return Size(heads=len(self.heads), head_size=self.query_key.shape[1], neurons=len(self.neurons))


def sizes(net: Any, family: Family) -> dict[str, Size]:
    """The size of every layer of a network that is as its configuration says, by the name of its block."""
    return {name: _size(layer) for name, (_, layer) in _layers(net, family).items()}


@torch.no_grad()
def slice_layers(net: Any, family: Family) -> dict[str, Size]:
    """Take out of the layers, in place, what reaches nothing or is constant; returns their sizes.

    What is constant, because the weights in front of it are zero and only a bias is left, moves into the bias behind.
    A layer keeps a head and a neuron at least, of zeros if need be.
    """
    cut_to = {}
    for name, (block, layer) in _layers(net, family).items():
        assert not any(parametrize.is_parametrized(slot.linear) for slot in (*layer.heads.slots, *layer.neurons.slots))
        kept = _kept(block, layer, family)
        _fold_neurons(block, layer.neurons, family, kept)
        _fold_heads(layer.heads, kept)
        _take(layer.heads, _head_lines(layer.heads, kept))
        _take(layer.neurons, _neuron_lines(layer.neurons, kept))
        _rescale(block, layer.heads, family, kept.size.head_size / _size(layer).head_size)
        _rewire(block, layer.heads, family, kept.size)
        cut_to[name] = kept.size
    return cut_to


@torch.no_grad()
def shape(net: Any, family: Family, sizes: Mapping[str, Size]) -> None:
    """Give a network that is as its configuration says layers of these sizes, in place, all zero; also on `meta`."""
    for name, (block, layer) in _layers(net, family).items():
        size = sizes[name]
        head = torch.full((size.heads, size.head_size), -1)
        kept = _Kept(heads=head[:, 0], query_key=head, value=head, neurons=torch.full((size.neurons,), -1))
        _take(layer.heads, _head_lines(layer.heads, kept))
        _take(layer.neurons, _neuron_lines(layer.neurons, kept))
        _rewire(block, layer.heads, family, size)


def read(table: object, net: Any, family: Family) -> dict[str, Size]:
    """The sizes that JSON gives the layers of a network that is as its configuration says; the JSON is not trusted.

    Raises:
        ValueError: saying where, what was expected and what was found.
    """
    full = sizes(net, family)
    if not isinstance(table, dict) or set(table) != set(full):
        found = sorted(map(str, table)) if isinstance(table, dict) else table
        raise ValueError(f"sliced must hold exactly {_some(list(full))}, holds {_some(found)}")
    return {name: _read_size(name, table[name], most, family) for name, most in full.items()}


def _read_size(where: str, record: object, full: Size, family: Family) -> Size:
    fixed = {"rotary": "head_size", "biased": "heads"}.get(family.attention)
    limits = dataclasses.asdict(full)
    if not isinstance(record, dict) or set(record) != set(limits):
        raise ValueError(f"{where} must hold exactly {_some(list(limits))}, holds {_some(record)}")
    for name, most in limits.items():
        least, value = most if name == fixed else 1, record[name]
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{where}: {name} must be an integer from {least} to {most}, is {_some(value)}")
    return Size(**record)


def _some(found: object) -> str:
    """The value, but not too much of it."""
    text = ", ".join(map(str, found)) if isinstance(found, list | dict) else repr(found)
    return text if len(text) <= 120 else text[:119] + "…"


def _layers(net: Any, family: Family) -> dict[str, tuple[nn.Module, Layer]]:
    named = families.blocks(net, family)
    return dict(zip(named, zip(named.values(), families.layers(net, family), strict=True), strict=True))


def _size(layer: Layer) -> Size:
    return Size(heads=layer.heads.count, head_size=layer.heads.slots[2].size, neurons=layer.neurons.count)


# What stays ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The n rows or columns of a slot, of all units: which hold nothing but zeros [n], and the biases of rows [n]."""

    zero: Tensor
    bias: Tensor

    @property
    def silent(self) -> Tensor:
        """Which rows put out zero: no weights and no bias."""
        return self.zero & (self.bias == 0)


def _parts(units: Units) -> list[_Part]:
    return [_part(slot, units.count * slot.size) for slot in units.slots]


def _part(slot: Slot, n: int) -> _Part:
    lines = slot.linear.weight.movedim(slot.axis, 0).narrow(0, slot.start, n)
    if slot.axis == 0 and slot.linear.bias is not None:
        bias = slot.linear.bias.narrow(0, slot.start, n).double().cpu()
    else:
        bias = torch.zeros(n, dtype=torch.float64)
    return _Part(zero=~lines.any(dim=1).cpu(), bias=bias)


def _kept(block: nn.Module, layer: Layer, family: Family) -> _Kept:
    full, value = _size(layer), ~_dead_value(layer.heads)
    alive = value.any(dim=1)
    query_key = ~_dead_query_key(block, layer.heads, family) & alive[:, None]
    heads = torch.arange(full.heads) if family.attention == "biased" else alive.nonzero()[:, 0]
    need = int(torch.maximum(value.sum(dim=1), query_key.sum(dim=1)).max())
    head_size = min(full.head_size, max(1, math.ceil(need / STEP)) * STEP)
    if head_size == full.head_size or family.attention == "rotary":  # whole heads, as they are
        head_size = full.head_size
        value = query_key = alive[:, None].expand_as(value)
    heads = heads if len(heads) else torch.tensor([0])
    return _Kept(
        heads=heads,
        query_key=_listed(query_key[heads], head_size),
        value=_listed(value[heads], head_size),
        neurons=_filled((~_dead_neurons(block, layer.neurons, family)).nonzero()[:, 0], full.neurons),
    )


def _filled(neurons: Tensor, most: int) -> Tensor:
    """The living neurons, then -1 up to a multiple of the step; all neurons as they are where that gains nothing."""
    wanted = max(1, math.ceil(len(neurons) / NEURON_STEP)) * NEURON_STEP
    if wanted >= most:
        return torch.arange(most)
    return torch.cat([neurons, torch.full((wanted - len(neurons),), -1)])


def _listed(alive: Tensor, size: int) -> Tensor:
    """The indices [A', size] of what is `alive` [A', D] in each row, then -1."""
    n = alive.shape[1]
    first = torch.arange(n).where(alive, n).sort(dim=1).values[:, :size]
    return first.masked_fill(first == n, -1)


def _dead_value(heads: Units) -> Tensor:
    """Value-output dimensions [A, D] that are not read, or put out their bias alone, because attention sums to 1."""
    _, _, value, *_, out = _parts(heads)
    size = heads.slots[2].size
    unread = out.zero.view(heads.count, -1, size).all(dim=1)
    constant = value.silent if heads.reader.bias is None else value.zero
    return unread | constant.view(heads.count, size)


def _dead_query_key(block: nn.Module, heads: Units, family: Family) -> Tensor:
    """Query-key dimensions [A, D] that add the same to the scores of all keys, which softmax takes away again."""
    shape = (heads.count, heads.slots[1].size)
    if family.attention == "rotary":
        return torch.zeros(shape, dtype=torch.bool)
    query, key, _, *more, _ = _parts(heads)
    dead = key.zero | query.silent
    if family.attention == "disentangled":  # the products with positions depend on the distance to the key
        own = dict(zip(_more(block, family), more, strict=True))
        positions = zip(family.more_heads, (key, query), strict=True)  # without their own, they go through these
        to_position, from_position = (own.get(path, part) for path, part in positions)
        dead &= to_position.zero | query.silent
        dead &= key.silent | from_position.silent | (key.zero & from_position.zero)
    return dead.view(shape)


def _more(block: nn.Module, family: Family) -> list[str]:
    """Paths of the further matrices of heads that this layer has."""
    present = {name for name, _ in block.named_modules()}
    return [path for path in family.more_heads if path in present]


def _dead_neurons(block: nn.Module, neurons: Units, family: Family) -> Tensor:
    """Neurons [F] that are not read, or put out a constant that is zero or for which there is a bias behind."""
    constant = _constant(block, neurons, family)
    return _parts(neurons)[-1].zero | (constant == 0 if neurons.reader.bias is None else constant.isfinite())


def _constant(block: nn.Module, neurons: Units, family: Family) -> Tensor:
    """What each neuron puts out whatever the input [F]; NaN when that depends on the input."""
    factors = torch.stack([part.bias.masked_fill(~part.zero, torch.nan) for part in _parts(neurons)[:-1]])
    factors[0] = attrgetter(family.activation)(block)(factors[0])
    return factors.prod(dim=0).masked_fill((factors == 0).any(dim=0), 0.0)


# Cutting -------------------------------------------------------------------------------------------------------------


def _fold_heads(heads: Units, kept: _Kept) -> None:
    """Add what the value dimensions that go put out, their bias, to the bias behind."""
    query, value = heads.slots[0], heads.slots[2]
    gone = torch.ones(heads.count, value.size, dtype=torch.bool)
    rows, columns = (kept.value >= 0).nonzero(as_tuple=True)
    gone[kept.heads[rows], kept.value[rows, columns]] = False
    constant = _parts(heads)[2].bias.view_as(gone) * gone
    _fold(heads.reader, constant.repeat_interleave(query.size // value.size, dim=0).flatten())


def _fold_neurons(block: nn.Module, neurons: Units, family: Family, kept: _Kept) -> None:
    constant = _constant(block, neurons, family)
    constant[kept.neurons[kept.neurons >= 0]] = 0.0
    _fold(neurons.reader, constant.where(constant.isfinite(), 0.0))  # what is not finite here is not read


def _fold(reader: nn.Linear, constant: Tensor) -> None:
    """Add what the matrix makes of a `constant` input to its bias."""
    if reader.bias is not None and constant.any():
        reader.bias.add_(reader.weight.double() @ constant.to(reader.weight.device))


def _head_lines(heads: Units, kept: _Kept) -> list[Tensor]:
    """For each slot of the heads, the rows or columns that stay, from the start of the slot."""
    dimensions = [kept.query_key for _ in heads.slots]
    dimensions[2] = dimensions[-1] = kept.value
    lines, size = [], heads.slots[2].size
    for slot, dimension in zip(heads.slots, dimensions, strict=True):
        groups = slot.size // size
        heads_of_slot = kept.heads[:, None] * groups + torch.arange(groups)
        line = heads_of_slot[:, :, None] * size + dimension[:, None]
        lines.append(line.masked_fill(dimension[:, None] < 0, -1).flatten())
    return lines


def _neuron_lines(neurons: Units, kept: _Kept) -> list[Tensor]:
    return [kept.neurons for _ in neurons.slots]


def _take(units: Units, lines: list[Tensor]) -> None:
    """Leave each matrix of the units these rows or columns of its slots, in this order."""
    together: dict[nn.Linear, list[Tensor]] = {}
    for slot, line in zip(units.slots, lines, strict=True):
        together.setdefault(slot.linear, []).append(line.where(line < 0, line + slot.start))
    axes = {slot.linear: slot.axis for slot in units.slots}
    for linear, parts in together.items():
        line = torch.cat(parts)
        weight = _taken(linear.weight, line, axes[linear])
        linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
        if axes[linear] == 0 and linear.bias is not None:
            linear.bias = nn.Parameter(_taken(linear.bias, line, 0), requires_grad=linear.bias.requires_grad)
        linear.out_features, linear.in_features = weight.shape


def _taken(tensor: Tensor, line: Tensor, axis: int) -> Tensor:
    """These rows (axis 0) or columns of the tensor; zeros where the index is -1."""
    line = line.to(tensor.device)
    taken = tensor.movedim(axis, 0).index_select(0, line.clamp(min=0))
    taken[line < 0] = 0.0
    return taken.movedim(0, axis).contiguous()


def _rescale(block: nn.Module, heads: Units, family: Family, ratio: float) -> None:
    """Undo in the queries that these families divide by the root of the head size, now `ratio` of the old one."""
    if family.attention not in ("biased", "disentangled"):
        return
    queries = [heads.slots[0]]
    queries += [slot for path, slot in zip(_more(block, family), heads.slots[3:-1], strict=True) if "query" in path]
    for slot in queries:
        for parameter in slot.linear.parameters():
            parameter.mul_(math.sqrt(ratio))


def _rewire(block: nn.Module, heads: Units, family: Family, size: Size) -> None:
    """Tell the attention module its new size, under the names that it has for it; its scaling stays."""
    attention = block.get_submodule(family.query_key_value[0].rpartition(".")[0])
    n_heads = size.heads * heads.slots[0].size // heads.slots[2].size
    known = {"num_attention_heads": n_heads, "n_heads": n_heads, "all_head_size": n_heads * size.head_size}
    known |= {"attention_head_size": size.head_size, "head_dim": size.head_size}
    for name, value in known.items():
        if hasattr(attention, name):
            setattr(attention, name, value)
