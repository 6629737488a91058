"""The refit: after a selection, the weights that stay are fitted to what the layers put out before it.

`walk` goes through the layers from the input upwards, also where they are cut one after another. What a layer reads is
measured after all below it were cut and fitted, what it should put out in the network before the cut, so that errors of
lower layers are corrected. Only the hidden states between two blocks are kept, and the moments of one layer at a time:
memory does not grow with the depth.

Letters: B batch, S tokens, T real tokens, I inputs and O outputs of a linear layer.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from capcli import parallel
from capcli.data.batches import Batch
from capcli.models import families, predict
from capcli.models.model import Model
from capcli.pruning.calibration import REFIT_BATCH, Calibration
from capcli.pruning.least_squares import Moments, solve
from capcli.pruning.masked import Matrices

Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named arguments


class _EnoughError(Exception):
    """Ends a forward pass from which nothing more is wanted."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of a network that is run on its own: a block, or all of it. linears: the layers in it, by name.

    once: whether each of them runs once in a pass.
    """

    run: Callable[..., Any]
    linears: Mapping[str, nn.Linear]
    once: bool


@dataclass(kw_only=True)
class Side:
    """A network in the parts that follow one another, and the calls of each part, one for each batch.

    The hidden states are in the calls of the current part only.
    """

    parts: list[Part]
    calls: list[list[Call]]

    def advance(self, index: int) -> None:
        """Run part `index`, hand what it gives to the next and forget what it got."""
        if index + 1 < len(self.parts):
            states = [_hidden_of(self.parts[index].run(*args, **named)) for args, named in self.calls[index]]
            self.calls[index + 1] = [
                _with_hidden(call, state) for call, state in zip(self.calls[index + 1], states, strict=True)
            ]
        self.calls[index] = []


@torch.no_grad()
def refit(
    matrices: Matrices, before: Tensor, calibration: Calibration, step: int, readers: Collection[nn.Linear] = ()
) -> Tensor:
    """Fit all weights that the masks keep, and the biases; `before` [n] are the masks as they were.

    readers: of whole units, the matrices that read them, which are then the only ones to be fitted.
    Returns for each matrix the share of its outputs' variance that is lost all the same; 0 where it was not used, NaN
    where it was not to be fitted.
    """
    target = calibration.target or as_it_was(calibration.model, matrices, before)
    linears = dict(zip(matrices.names, matrices.linears, strict=True))
    index = {name: i for i, name in enumerate(matrices.names) if not readers or linears[name] in readers}
    errors = torch.full((len(linears),), torch.nan, device=matrices.mask.device)
    errors[list(index.values())] = 0.0
    for name, moments in walk(calibration, target, step, index):
        weight, kept = matrices.seen(index[name])
        found, bias = solve(moments, weight, kept)
        errors[index[name]] = moments.error(found)
        matrices.put(index[name], torch.where(kept, found, weight) if calibration.regrow else found, bias)
    return errors


def walk(
    calibration: Calibration, target: Model, step: int, names: Collection[str] | None = None
) -> Iterator[tuple[str, Moments]]:
    """Each matrix (of `names`, if given) by its name, from the input upwards, with the moments of what it reads now and
    of what it puts out in `target`. What is changed in a matrix before the next one is asked for is what the later ones
    read."""
    model, batches = calibration.model, list(calibration.drawn(step, REFIT_BATCH))
    if shared := 1 < parallel.size() <= len(batches):
        batches = batches[parallel.rank() :: parallel.size()]
    masks = [batch.inputs["attention_mask"].bool() for batch in batches]
    with predict.without_dropout(model), predict.without_dropout(target):
        ours, theirs = sides(model, target, batches)
        for number, (part, wanted) in enumerate(zip(ours.parts, theirs.parts, strict=True)):
            for group in _groups(part, ours.calls[number][0]):
                calibration.check()
                if some := [name for name in group if names is None or name in names]:
                    found = _moments(part, wanted, some, ours.calls[number], theirs.calls[number], masks)
                    for moments in found.values() if shared else ():
                        moments.gather()
                    yield from found.items()
            ours.advance(number)
            theirs.advance(number)


def as_it_was(model: Model, matrices: Matrices, before: Tensor) -> Model:
    """A copy of the student with the masks `before` in place of the new ones."""
    model.net.zero_grad(set_to_none=True)  # of the step before; they are not to be copied
    new = matrices.mask.clone()
    matrices.mask.copy_(before)
    net = deepcopy(model.net)
    matrices.mask.copy_(new)
    return replace(model, net=net)


# Moments -------------------------------------------------------------------------------------------------------------


def _groups(part: Part, call: Call) -> list[list[str]]:
    """The layers of a part in the order in which they run, those that read the same tensor together."""
    seen: list[tuple[Tensor, list[str]]] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            if any(name in names for _, names in seen):
                return
            if seen and seen[-1][0] is args[0]:
                seen[-1][1].append(name)
            else:
                seen.append((args[0], [name]))

        return look

    with hooked(linear.register_forward_pre_hook(hook(name)) for name, linear in part.linears.items()):
        part.run(*call[0], **call[1])
    return [names for _, names in seen]


def _moments(
    part: Part, wanted: Part, group: Sequence[str], ours: list[Call], theirs: list[Call], masks: list[Tensor]
) -> dict[str, Moments]:
    """What the layers of a group read in the student, with what they put out in the target, over real tokens."""
    found: dict[str, Moments] = {}
    for our_call, their_call, mask in zip(ours, theirs, masks, strict=True):
        read = _watched(part, group[:1], our_call, lambda args, output: args[0])[group[0]]
        given = _watched(wanted, group, their_call, lambda args, output: output)
        inputs = [_real(x, mask) for x in read]
        for name in group:
            for x, y in zip(inputs, given[name], strict=True):
                outputs = _real(y, mask)
                if name in found:
                    found[name].add(x, outputs)
                else:
                    found[name] = Moments.of(x, outputs, bias=part.linears[name].bias is not None)
    return found


def _watched(
    part: Part, names: Sequence[str], call: Call, of: Callable[[tuple[Any, ...], Tensor], Tensor]
) -> dict[str, list[Tensor]]:
    """What `of` takes of inputs and output of the layers `names`, for each time that they run in this pass."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found[name].append(of(args, output))
            if part.once and all(found.values()):
                raise _EnoughError

        return look

    hooks = (part.linears[name].register_forward_hook(hook(name)) for name in names)
    with hooked(hooks), parametrize.cached(), contextlib.suppress(_EnoughError):
        part.run(*call[0], **call[1])
    return found


def _real(x: Tensor, mask: Tensor) -> Tensor:
    """The rows of real tokens [T, I] of what a layer reads, [B, S, I]; all rows of what is not made of tokens."""
    return x[mask] if x.shape[:-1] == mask.shape else x.flatten(0, -2)


@contextlib.contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """While inside, the hooks of these handles are placed."""
    placed = list(handles)
    try:
        yield
    finally:
        for handle in placed:
            handle.remove()


# Parts ---------------------------------------------------------------------------------------------------------------


def sides(model: Model, target: Model, batches: Sequence[Batch]) -> tuple[Side, Side]:
    """Both networks in their blocks, where these follow one another and each runs once; else as one part each."""
    ours = _side(model, batches)
    theirs = _side(target, batches) if ours is not None else None
    if ours is None or theirs is None:
        ours, theirs = _whole(model, batches), _whole(target, batches)
    return ours, theirs


def _whole(model: Model, batches: Sequence[Batch]) -> Side:
    linears = families.prunable(model.net, model.family)
    part = Part(run=lambda inputs: predict.forward(model, inputs), linears=linears, once=False)
    return Side(parts=[part], calls=[[((batch.inputs,), {}) for batch in batches]])


def _side(model: Model, batches: Sequence[Batch]) -> Side | None:
    """The network in its blocks with their calls, or None if what a block gives is not what the next one gets."""
    blocks = families.blocks(model.net, model.family)
    linears = families.prunable(model.net, model.family)
    parts = [
        Part(run=block, linears={n: x for n, x in linears.items() if n.startswith(f"{name}.")}, once=True)
        for name, block in blocks.items()
    ]
    calls: list[list[Call]] = [[] for _ in parts]
    for batch in batches:
        seen = _calls(model, list(blocks.values()), batch)
        if seen is None:
            return None
        for number, call in enumerate(seen):
            calls[number].append(call if number == 0 else _with_hidden(call, None))
    return Side(parts=parts, calls=calls)


def _calls(model: Model, blocks: list[nn.Module], batch: Batch) -> list[Call] | None:
    """How each block is called in a forward pass, in order; None if they do not follow one another."""
    seen: list[tuple[nn.Module, Call, Any]] = []

    def look(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        seen.append((module, (args, _without_memory(named)), _hidden_of(output)))

    with hooked(block.register_forward_hook(look, with_kwargs=True) for block in blocks), parametrize.cached():
        predict.forward(model, batch.inputs)
    in_order = [module for module, _, _ in seen] == blocks
    chained = in_order and all(_hidden_in(b[1]) is a[2] for a, b in itertools.pairwise(seen))
    return [call for _, call, _ in seen] if chained else None


def _without_memory(named: dict[str, Any]) -> dict[str, Any]:
    """Named arguments of a block, but for the keys and values of earlier tokens, which each pass would add to."""
    memory = {name: None for name in named if name.startswith("past_key_value")}
    return named | memory | ({"use_cache": False} if "use_cache" in named else {})


def _hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _hidden_in(call: Call) -> Any:
    args, named = call
    return args[0] if args else named.get("hidden_states")


def _with_hidden(call: Call, state: Any) -> Call:
    args, named = call
    return ((state, *args[1:]), named) if args else (args, named | {"hidden_states": state})
