"""ONNX folders: a graph with the tokenizer and the configuration that lie beside it, as a model that answers.

Letters: B batch, S tokens, C labels, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capcli import machine
from capcli.data.kinds import KINDS
from capcli.errors import ModelError
from capcli.models import families, hf, loading, sentences
from capcli.models.devices import Compute
from capcli.models.heads import own_labels, renamed
from capcli.models.predict import Run
from capcli.models.predictor import Predictor
from capcli.models.sentences import Embedding
from capcli.models.tokenizers import open_tokenizer, with_padding
from capcli.runtime.graph import Graph, check_package, logits_of
from capcli.sources import checkpoint, hub
from capcli.sources.checkpoint import GRAPH

STATES = "last_hidden_state"
# Families that count positions from after the padding id, so that two of them are never reached.
FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")


@dataclass(frozen=True, kw_only=True)
class OnnxModel:
    """A graph with its tokenizer and its configuration; called, it gives what the graph gives, by name."""

    graph: Graph
    tokenizer: Any
    config: Any
    source: str
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def threads(self) -> int:
        """Threads of the CPU that it computes with."""
        return self.graph.threads

    @property
    def described(self) -> str:
        """What computes, in words."""
        return self.graph.described

    @property
    def longest(self) -> int:
        """Tokens of the longest input."""
        positions = getattr(self.config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        if self.config.model_type in FROM_PADDING:
            positions -= (self.config.pad_token_id or 0) + 1
        return int(min(positions, self.tokenizer.model_max_length))

    def __call__(self, **inputs: Tensor) -> Any:
        """What the graph gives for inputs [B, S], by name, as a transformers model does: `logits`, for example."""
        return hf.model_output(self.graph({name: inputs[name].cpu() for name in inputs}))

    def run(self, pooling: str = "head") -> Run:
        """See `predict.Run`: vectors are made of the last states, where the graph gives them; it has no head's."""
        family = families.FAMILIES.get(self.config.model_type)

        def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
            found, mask = self.graph(inputs), inputs["attention_mask"]
            if STATES not in found or pooling == "head":
                return logits_of(found), None
            states = found[STATES].float()
            causal = family is not None and family.causal
            vector = families.mean(states, mask) if pooling == "mean" else families.represented(states, mask, causal)
            return logits_of(found), vector

        return run


def load(source: str, threads: int = 0) -> OnnxModel:
    """The ONNX model of a MODEL argument, which has config.json and tokenizer beside it; threads: of the CPU, 0 for
    PyTorch's number; as many as this process may use at most.

    Raises:
        ConfigError: onnxruntime is not installed. FileError, ModelError: what is wrong with the folder or its graph.
    """
    check_package()
    path, folder = hub.folder(source), hub.place(source, graph=True)
    checkpoint.check_words({file.name for file in folder.iterdir()}, source)
    config = hf.read_config(path, source)
    tokenizer, notes = with_padding(open_tokenizer(path, source), config)
    usable, said = machine.usable_threads(threads or torch.get_num_threads())
    graph = Graph(folder / GRAPH, usable)
    graph.check()
    return OnnxModel(
        graph=graph, tokenizer=tokenizer, config=config, source=source, labels=own_labels(config), notes=notes + said
    )


def predictor(
    model: OnnxModel,
    kind: str,
    labels: Sequence[str] | None = None,
    label_map: Mapping[str, str] | None = None,
    *,
    need_head: bool = True,
) -> Predictor:
    """The model as one that answers tasks of this kind, its logits in the order of `labels`.

    labels: those of the task; None takes the model's own. Without `need_head` it may have others, or no logits at all.
    Raises `ModelError` for a graph that gives something else than it needs.
    """
    order = loading.dense_order(model.labels, labels, kind, model.source, label_map, need_head=need_head)
    names = renamed(model.labels, label_map) if labels is None else tuple(labels) or KINDS[kind].outputs
    embedding = sentences.read(hub.place(model.source), model.source) if KINDS[kind].vectors else None
    if need_head and embedding is None:
        _check_answers(model, kind)
    elif embedding is not None and STATES not in model.graph.outputs:
        raise ModelError(f"{model.graph.path} has no output {STATES}, of which vectors are made")
    return Predictor(
        source=model.source,
        kind=kind,
        labels=() if KINDS[kind].own_head else names,
        tokenizer=model.tokenizer,
        longest=model.longest,
        on=Compute(device=torch.device("cpu"), dtype=torch.float32),
        runtime="onnx",
        described=model.described,
        threads=model.threads,
        asking=lambda pooling: _pooled(model, embedding) if embedding else _ordered(model.run(pooling), order),
        alone=model.graph.alone,
        notes=model.notes,
    )


def _pooled(model: OnnxModel, embedding: Embedding) -> Run:
    """The vectors of a graph without a head, which are its answers."""

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        vectors = embedding(model.graph(inputs)[STATES].float(), inputs["attention_mask"])
        return vectors, vectors

    return run


def _ordered(run: Run, order: list[int] | None) -> Run:
    """The same with its logits in this order."""
    if order is None or order == sorted(order):
        return run

    def ordered(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        logits, vectors = run(inputs)
        return logits[..., order], vectors

    return ordered


def _check_answers(model: OnnxModel, kind: str) -> None:
    """Raise `ModelError` unless two texts of unlike length get logits of the shape that this kind has."""
    row, path = KINDS[kind], model.graph.path
    coded = model.tokenizer(["a ☃", "a a a a"], padding=True, return_tensors="pt")
    mask, n_outputs = coded["attention_mask"], row.n_outputs(len(model.labels))
    outputs = model.graph(coded)
    expected = (*mask.shape, n_outputs) if row.per_token else (len(mask), n_outputs)
    found = tuple(logits_of(outputs).shape)
    if found == expected:
        return
    given = ", ".join(f"{name[:40]} {list(tensor.shape)}" for name, tensor in outputs.items())
    if found[-1] != n_outputs and len(found) == len(expected) and found[-1]:
        raise ModelError(
            f"{path} gives {found[-1]} logits, {n_outputs} are named in config.json",
            "copy or download config.json and graph together",
        )
    raise ModelError(f"{path} gives {given} for two texts, but {kind} needs logits {list(expected)}")
