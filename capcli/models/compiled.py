"""The layers of an encoder as code that `torch.compile` makes: one code for all of them, where they are alike."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from capcli.errors import ConfigError, RunFailed, first_line
from capcli.models import families
from capcli.models.model import Model

BACKEND = "inductor"
WITHOUT = "leave out --compile"


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers of a network, and the code that computes any of them: (layer, inputs) -> what the layer returns."""

    blocks: Sequence[nn.Module]
    code: Callable[..., Any]

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """Inside, the layers are computed by the code; hooks on the layers themselves are called as usual."""
        for block in self.blocks:
            block.forward = functools.partial(self._run, block)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _run(self, block: nn.Module, *inputs: Any, **named: Any) -> Any:
        try:
            return self.code(block, *inputs, **named)
        except torch._dynamo.exc.TorchDynamoException as error:
            name = type(block).__name__
            raise RunFailed(f"{name} could not be compiled: {first_line(error)}", f"{WITHOUT} to continue") from error


def layers(model: Model) -> Layers:
    """The layers of a model, to be compiled when they first run. Raises `ConfigError` when there are none."""
    blocks = list(families.blocks(model.net, model.family).values())
    if not blocks:
        raise ConfigError(f"{model.source} has no layers that could be compiled", WITHOUT)
    return Layers(blocks=blocks, code=torch.compile(_forward, backend=BACKEND))


def check(device: torch.device) -> None:
    """Raise `ConfigError` where nothing can be compiled, as for lack of a C++ compiler or of Triton."""
    try:
        torch.compile(_twice, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:
        raise ConfigError(f"torch.compile does not work here: {first_line(error)}", WITHOUT) from error


def _twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def _forward(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    """A layer of any network; that all share it is why they share its code."""
    return type(block).forward(block, *inputs, **named)
