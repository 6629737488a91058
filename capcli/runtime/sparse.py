"""The interface of the runtime: a model whose layers run on sparse weights, and answers as the dense one does.

Letters: B batch, S tokens, H hidden size.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from contextvars import ContextVar
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from capcli import machine
from capcli.errors import ConfigError, first_line
from capcli.models import artifact, families, hf, loading, masks, predict, tokenizers
from capcli.models.model import Model
from capcli.runtime.packing import Unsupported
from capcli.sources import hub

if TYPE_CHECKING:
    from capcli.runtime import build
    from capcli.runtime.encoder import Encoder
    from capcli.runtime.families import Row

PACKAGE = "numba"
_LAST: ContextVar[list[Tensor]] = ContextVar("last")  # what the base model of a call puts out, for the caller


def load(source: str | Path, threads: int = 0, base: str = "") -> SparseModel:
    """The model of a folder that capcli wrote, or of a hub id of one, on `threads` threads (0: as many as this process
    may use).

    Of an artefact the matrices of the layers are never made dense, but of masks the `base` is. Raises `Unsupported`, or
    what loading raises.
    """
    threads, notes = usable_threads(threads)
    check_installed()
    if base or (tokenizers.is_artifact(str(source)) and masks.read(str(source)) is not None):
        return from_model(loading.load_pruned(str(source), base), threads)
    if not tokenizers.is_artifact(str(source)):
        return from_model(loading.load_stock(str(source)), threads)
    model, matrices = artifact.load_packed(hub.place(str(source)))
    return _made(model, matrices, threads, notes)


def from_model(model: Model, threads: int = 0) -> SparseModel:
    """The same from a loaded model whose weights hold zeros; it is left as it is, and shares what is not packed."""
    threads, notes = usable_threads(threads)
    check_installed()
    family = family_of(model)
    if others := {parameter.device.type for parameter in model.net.parameters()} - {"cpu"}:
        raise Unsupported(f"the runtime for sparse weights is for a CPU, and {model.source} is on {others.pop()}")
    matrices: build.Matrices = {name: linear.weight for name, linear in families.prunable(model.net, family).items()}
    packed = set(map(id, matrices.values()))
    tensors = [*model.net.parameters(), *model.net.buffers()]
    memo = {id(tensor): _outline(tensor) if id(tensor) in packed else tensor for tensor in tensors}
    return _made(dataclasses.replace(model, net=deepcopy(model.net, memo).eval()), matrices, threads, notes)


class SparseModel:
    """A model on sparse weights.

    model: tokenizer, labels and family; embeddings and head are torch's, the matrices of the layers on `meta`, without
    values. Everything that calls the network, as `predict.forward` does, runs on the sparse weights.
    """

    def __init__(self, model: Model, encoder: Encoder) -> None:
        self.model, self.encoder = model, encoder

    @property
    def threads(self) -> int:
        return self.encoder.threads

    @property
    def nnz(self) -> int:
        """Weights that are kept in the layers."""
        return self.encoder.nnz

    @property
    def bytes(self) -> int:
        """What the packed layers take."""
        return self.encoder.bytes

    @property
    def described(self) -> str:
        """What runs, in a few words."""
        from capcli.reporting.text import counted
        from capcli.runtime.vectors import instructions

        return f"sparse, {PACKAGE}, {instructions()}, {counted(self.threads, 'thread')}"

    def run(self, pooling: str = "head") -> predict.Run:
        """Something that answers, with the values of `predict.forward`."""
        from capcli.models.devices import Compute

        return predict.running(self.model, Compute(device=torch.device("cpu"), dtype=torch.float32), pooling)

    def __call__(self, **inputs: Tensor) -> Any:
        """What the network of transformers puts out for its inputs [B, S], and `last_hidden_state` [B, S, H].

        With `output_hidden_states=True` also the states of all layers, which are then run one by one.
        """
        states: list[Tensor] = []
        token = _LAST.set(states)
        try:
            with torch.inference_mode():
                out = self.model.net(**inputs, return_dict=True)
        finally:
            _LAST.reset(token)
        out["last_hidden_state"] = states[0]
        return out


class _Forward:
    """What a base model does instead of its own forward pass: embeddings in torch, the layers on sparse weights."""

    def __init__(self, base: Any, encoder: Encoder, row: Row) -> None:
        self.base, self.encoder, self.row = base, encoder, row

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """See the base models of transformers; what changes how they compute is refused by name."""
        known = ("token_type_ids", "position_ids", "inputs_embeds")
        given = {name: value for name, value in inputs.items() if value is not None and name != "return_dict"}
        if unknown := sorted(given.keys() - {*known}):
            raise TypeError(f"the runtime for sparse weights does not take {unknown[0]}")
        with torch.no_grad():
            states = self.row.embed(self.base, {"input_ids": input_ids, **given})
            mask = torch.ones(states.shape[:2]) if attention_mask is None else attention_mask
            real = mask.bool().numpy()
            hidden = [states]
            n = len(self.encoder.weights.layers)
            for part in [slice(i, i + 1) for i in range(n)] if output_hidden_states else [slice(0, n)]:
                found = self.encoder(hidden[-1].detach().float().numpy(), real, part)
                hidden.append(torch.from_numpy(found).to(states.dtype))
            states = hidden[-1] = self.row.finish(self.base, hidden[-1])
            _LAST.get([]).append(states)
            told = tuple(hidden) if output_hidden_states else None
            return hf.base_output(states, self.row.pool(self.base, states), told)


def _made(model: Model, matrices: build.Matrices, threads: int, notes: tuple[str, ...]) -> SparseModel:
    from capcli.runtime import build
    from capcli.runtime.families import row_of

    family = family_of(model)
    encoder = build.encoder(model.net, family, matrices, threads)
    base = model.net.base_model
    base.forward = _Forward(base, encoder, row_of(model.net))
    return SparseModel(dataclasses.replace(model, notes=(*model.notes, *notes)), encoder)


def _outline(tensor: Tensor) -> nn.Parameter:
    """A parameter of the same shape without values."""
    return nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)


def family_of(model: Model) -> families.Family:
    """The family of the model. Raises `Unsupported` for one outside the table."""
    if model.family is None:
        raise Unsupported(model.unknown)
    return model.family


def check_installed() -> None:
    """Raise `Unsupported` without numba, where it cannot be loaded, as for lack of memory, or is not to compile."""
    if find_spec(PACKAGE) is None:
        raise Unsupported("the runtime for sparse weights needs numba", "pip install capcli[fast]")
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        raise Unsupported("NUMBA_DISABLE_JIT keeps numba from compiling the runtime for sparse weights", "unset it")
    try:
        importlib.import_module("numba")
    except (ImportError, OSError) as error:
        raise Unsupported(f"numba cannot be loaded: {first_line(error)}", "use --runtime torch") from error


def usable_threads(threads: int) -> tuple[int, tuple[str, ...]]:
    """How many threads are used, and a note if fewer than asked for. Raises `ConfigError` for a negative number."""
    if threads < 0:
        raise ConfigError(f"threads must be 0 or more, got {threads}", "0 takes as many as there are processors")
    return machine.usable_threads(threads or machine.processors())
