"""Vectors of a frozen model for the examples of a task: computed once, kept on disk, found again by their content.

Letters: N examples, R vectors (one per example; for kinds that answer per token, one per token of all examples), L
layers, H hidden size, B batch, S tokens of a batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capcli import files, parallel
from capcli.config.hardware import Hardware
from capcli.config.task import TaskConfig
from capcli.data import batches, cache, tokens
from capcli.data.batches import Examples
from capcli.data.kinds import KINDS
from capcli.data.splits import Split
from capcli.errors import ConfigError, RunFailed
from capcli.models import artifact, devices, families, predict, tokenizers
from capcli.models.devices import Compute
from capcli.models.model import CONFIG_FILE, WEIGHTS_FILE
from capcli.models.predict import Progress
from capcli.models.predictor import Predictor
from capcli.runtime import choice
from capcli.runtime.graph import graph_files
from capcli.sources import hub
from capcli.sources.checkpoint import CONFIG, GRAPH, TOKENIZER_FILES

CACHE_FORMAT = 2
MOST_BYTES = 8e9
"""Of the vectors of one split, which are made in memory."""


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """Vectors of one split: values float16 [R, L, H], each of unit length; `key` names what they depend on.

    examples: the tokens, for kinds that answer per token; None for others.
    """

    key: str
    values: NDArray[np.float16]
    split: Split
    examples: Examples | None = None


@dataclass(kw_only=True)
class Encoder:
    """A frozen model, loaded only when a vector is missing.

    layer: last, all, or the number of a layer, of which 0 are the embeddings. pooling: see `predict.forward`; only for
    kinds that answer per example. runtime: see `choice.opened`.
    """

    source: str
    layer: str
    pooling: str
    hardware: Hardware
    seed: int
    runtime: str = ""
    _loaded: list[Predictor] = field(default_factory=list, repr=False)

    @cached_property
    def meant(self) -> tuple[str, Hardware]:
        """The runtime that is asked for, and where it computes, see `choice.meant`."""
        return choice.meant(self.source, self.runtime, self.hardware)

    @cached_property
    def on(self) -> Compute:
        """Where it computes."""
        return devices.compute(self.meant[1])

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The files that the model consists of, its weights first. Raises `ModelError` or `FileError`."""
        if tokenizers.is_artifact(self.source) and self.meant[0] != "onnx":
            found = artifact.artifact_files(hub.place(self.source))
            return tuple(sorted(found, key=lambda path: path.name != WEIGHTS_FILE))
        here = Path(hub.folder(self.source))
        small = [here / name for name in sorted({CONFIG, *TOKENIZER_FILES}) if (here / name).is_file()]
        if self.meant[0] == "onnx":
            return (*graph_files(hub.place(self.source, graph=True)), *small)
        hub.weights(str(here), self.source)
        return tuple([here / name for name in hub.weight_files(here)] + small)

    @cached_property
    def sha256(self) -> str:
        """Digest of names and contents of the files."""
        return digest([[path.name, files.sha256(path)] for path in self.files])

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weight files."""
        small = {CONFIG, CONFIG_FILE, *TOKENIZER_FILES}
        return sum(path.stat().st_size for path in self.files if path.name not in small)

    @property
    def model(self) -> Predictor:
        """The model, ready to answer."""
        if not self._loaded:
            found = choice.opened(
                self.source,
                self.runtime,
                self.hardware,
                labels=None,
                kind="classification",
                seed=self.seed,
                need_head=False,
            )
            self._loaded.append(found)
        return self._loaded[0]

    @property
    def computing(self) -> str:
        """The runtime that computes the vectors; of two to choose from it is known when they have been measured."""
        return self.model.runtime if self.meant[0] == "auto" else self.meant[0]

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to know of the vector that enters the classifier, nothing of others; and the choice made."""
        chosen = [self.model.chosen] if self.meant[0] in ("auto", "sparse") else []
        return (*(self.model.notes if self.pooling == "head" else ()), *filter(None, chosen))

    def release(self) -> None:
        """Let go of the network; it is loaded again when it is needed."""
        self._loaded.clear()

    def vectors(self, split: Split, task: TaskConfig) -> Generator[Progress, None, Vectors]:
        """The vectors of a split; yields how many examples are done, of how many, from 0, unless they are on disk.

        Raises:
            ConfigError: the model has no such layer.
        """
        examples = self._tokenised(split, task) if KINDS[split.kind].per_token else None
        key = self.key(split, task)
        found = cache.find("vectors", key)
        (missing,) = parallel.highest([found is None])  # to any rank
        if missing or not found:
            yield 0, len(split)
            values = yield from self._encoded(examples or self._tokenised(split, task))
            piece = cache.Piece(arrays={"values": values}, n_cut=0)
            found = cache.mapped(key, lambda: iter([piece]), "vectors") or piece
        return Vectors(key=key, values=found.arrays["values"], split=split, examples=examples)

    def _tokenised(self, split: Split, task: TaskConfig) -> Examples:
        length = min(task.longest, self.model.longest)
        return tokens.encode(split, self.model.tokenizer, length, stride=task.stride)

    def key(self, split: Split, task: TaskConfig) -> str:
        of = "token" if KINDS[split.kind].per_token else self.pooling
        drawn = self.seed if of == "head" else 0  # of what stands before a head that the files do not have
        parts = [self.sha256, self.layer, of, drawn, self.on.device.type, self.on.precision, split.fingerprint]
        parts += [split.kind, task.longest, task.stride, version("torch"), version("transformers")]
        parts += [] if self.computing == "torch" else [self.computing, self.model.described]
        return digest([CACHE_FORMAT, *parts])

    def _encoded(self, examples: Examples) -> Generator[Progress, None, NDArray[np.float16]]:
        def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            with self.on.autocast():
                logits, found = self._of_batch(inputs, per_token=examples.per_token)
            self._check_size((examples.n_outputs, *found.shape[-2:]))
            return logits, found

        rows = batches.evaluation_batches(examples, self.model.token_budget)
        _, values = yield from predict.outputs(
            run, examples, rows, self.on.device, logits=False, of_tokens=examples.per_token, room=self.on.room
        )
        if not values.isfinite().all():
            raise RunFailed(f"{self.source} gives vectors that are not finite", "its weights are too large or damaged")
        return values.cpu().numpy()

    def _check_size(self, shape: tuple[int, ...]) -> None:
        n_bytes = 2 * math.prod(shape)
        if n_bytes > MOST_BYTES:
            raise ConfigError(
                f"the vectors of {shape[0]:,} texts or tokens would take {n_bytes / 1e9:.1f} GB, the limit is "
                f"{MOST_BYTES / 1e9:.0f}",
                "lower --max-train-samples or --max-eval-samples, or choose one --layer",
            )

    def _of_batch(self, inputs: Mapping[str, Tensor], *, per_token: bool) -> tuple[Tensor, Tensor]:
        """Logits and vectors [B, L, H] of a batch, or [B, S, L, H] of its tokens."""
        deep = per_token or self.layer != "last"
        if self.model.network is None:
            return self._of_graph(inputs, deep=deep)
        logits, last, states = predict.forward_states(self.model.network, inputs, self.pooling, keep=deep)
        chosen = self._chosen(len(states)) if deep else []
        if per_token:
            return logits, torch.stack([states[index] for index in chosen], dim=2)
        if not deep:
            return logits, last[:, None]
        pooled = [last if index == len(states) - 1 else self._pooled(states[index], inputs) for index in chosen]
        return logits, torch.stack(pooled, dim=1)

    def _of_graph(self, inputs: Mapping[str, Tensor], *, deep: bool) -> tuple[Tensor, Tensor]:
        """Logits and vectors [B, 1, H] of a batch by an ONNX graph, which has states of the last layer at most."""
        logits, vectors = (inputs["input_ids"], None) if deep else self.model.run(self.pooling)(inputs)
        if vectors is None:
            of = "of tokens or layers" if deep else f"for --pool {self.pooling}"
            raise ConfigError(
                f"{self.source} gives no vectors {of}, as {GRAPH} has no output for them",
                "probe the model that it was exported from",
            )
        return logits, vectors[:, None]

    def _chosen(self, n_states: int) -> list[int]:
        """Which hidden states are wanted."""
        if self.layer in ("all", "last"):
            return list(range(n_states)) if self.layer == "all" else [n_states - 1]
        if int(self.layer) >= n_states:
            raise ConfigError(f"{self.source} has layers 0 to {n_states - 1}, but no layer {self.layer}")
        return [int(self.layer)]

    def _pooled(self, states: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """One vector [B, H] of the states [B, S, H] of a layer."""
        assert self.model.network is not None, "it gave the states"
        mask, family = inputs["attention_mask"], self.model.network.family
        if self.pooling == "mean":
            return families.mean(states, mask)
        return families.represented(states, mask, family is not None and family.causal)


def digest(parts: Any) -> str:
    """sha256, as hex, of plain data."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
