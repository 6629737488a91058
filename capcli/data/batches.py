"""Tokenised examples, and batches of them: padding, order of training, order of evaluation.

Letters: N examples, B batch, S tokens, T tokens of all examples, C labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capcli.data.kinds import KINDS, NO_LABEL
from capcli.data.splits import Split


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Tokenised examples, stored flat; the id of an example is its index.

    tokens, types [T], offsets [N + 1]. kind: as in the task table. labels, by kind: classification and regression [N],
    multilabel float32 [N, C], tokens int64 [T] with `NO_LABEL` except at the first token of each word, spans int64
    [N, 2] (first and last token of the answer in the window, (0, 0) where it has none).

    For spans an example is a window of a long context: owner [N] is the question that it belongs to, and chars [T, 2]
    are the begin and end of each token in the context in characters, -1 outside of it. For tokens, words [T] is the
    word that begins with the token, -1 elsewhere. For embedding, each text of an example of the split is one by itself,
    the first before the second, and labels are the scores of their examples. split: what was tokenised. n_cut: texts
    that were longer than a window of `length` tokens and lost their end (for spans: questions). unknown: share of the
    tokens, special ones aside, that stand for what the tokenizer does not know.
    """

    tokens: NDArray[np.integer[Any]]
    types: NDArray[np.uint8] | None
    offsets: NDArray[np.int64]
    labels: NDArray[np.generic]
    pad_id: int
    kind: str = "classification"
    owner: NDArray[np.int64] | None = None
    words: NDArray[np.int32] | None = None
    chars: NDArray[np.int32] | None = None
    split: Split | None = None
    n_cut: int = 0
    length: int = 0
    unknown: float = 0.0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, [N]."""
        return np.diff(self.offsets)

    @property
    def per_token(self) -> bool:
        """Whether the model answers for each token, not for each example."""
        return KINDS[self.kind].per_token

    @property
    def n_texts(self) -> int:
        """How many texts they are: one for each example; for spans, whose contexts take several, questions."""
        return len(self) if self.owner is None else len(np.unique(self.owner))

    @property
    def n_outputs(self) -> int:
        """Rows of the model's outputs over all examples: T if `per_token`, else N."""
        return len(self.tokens) if self.per_token else len(self)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Model inputs [B, S], labels (as in `Examples`; for tokens [B, S]) and example ids [B] on the device.

    places [B, S]: for kinds with outputs per token, the index of each token in the flat arrays, 0 at padding.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    ids: Tensor
    places: Tensor | None = None

    def put(self, outputs: Tensor, into: Tensor) -> None:
        """Copy a model's outputs [B, C] to the rows of their examples; [B, S, C] to those of all real tokens."""
        if self.places is None:
            into[self.ids] = outputs
        else:
            real = self.inputs["attention_mask"].bool()
            into[self.places[real]] = outputs[real]


def taken(examples: Examples, rows: NDArray[np.int64]) -> Examples:
    """The examples `rows`, by new ids from 0; without what only an evaluation needs."""
    lengths = examples.lengths[rows]
    places = np.concatenate([np.arange(*examples.offsets[row : row + 2]) for row in rows])
    return Examples(
        tokens=examples.tokens[places],
        types=None if examples.types is None else examples.types[places],
        offsets=np.concatenate([[0], lengths.cumsum()]),
        labels=examples.labels[places if KINDS[examples.kind].words else rows],
        pad_id=examples.pad_id,
        kind=examples.kind,
    )


# Batches -------------------------------------------------------------------------------------------------------------


def collate(examples: Examples, rows: NDArray[np.int64], device: torch.device, width: int = 0) -> Batch:
    """The examples `rows` [B], padded to the longest of them, and at least to `width`; to a multiple of 8 on an
    accelerator, but not beyond the window that the examples were cut to."""

    def moved(array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        tensor = tensor.pin_memory() if device.type == "cuda" else tensor  # else large copies are waited for
        return tensor.to(device, non_blocking=True)

    starts = examples.offsets[rows]
    lengths = examples.offsets[rows + 1] - starts
    longest = int(lengths.max())
    width = max(width, longest)
    width = width if device.type == "cpu" else -(-width // 8) * 8
    width = max(longest, min(width, examples.length or width))
    inside = np.arange(width) < lengths[:, None]
    places = np.where(inside, starts[:, None] + np.arange(width), 0)
    inputs = {
        "input_ids": np.where(inside, examples.tokens[places], examples.pad_id).astype(np.int64),
        "attention_mask": inside.astype(np.int64),
    }
    if examples.types is not None:
        inputs["token_type_ids"] = np.where(inside, examples.types[places], 0).astype(np.int64)
    words = KINDS[examples.kind].words
    labels = np.where(inside, examples.labels[places], NO_LABEL) if words else examples.labels[rows]
    if labels.dtype == np.float64:
        labels = labels.astype(np.float32)  # all that a loss needs, and some devices have no more
    return Batch(
        inputs={name: moved(array) for name, array in inputs.items()},
        labels=moved(labels),
        ids=moved(rows),
        places=moved(places) if examples.per_token else None,
    )


def pieces(rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Rows in pieces of `size`, the last one of what is left."""
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


def training_order(
    examples: Examples, batch_size: int, seed: int, epoch: int, pool: int = 16
) -> list[NDArray[np.int64]]:
    """Rows of each batch of an epoch, a pure function of (seed, epoch).

    Shuffled; then sorted by length within pools of `pool` batches, so that a batch holds like lengths; then the batches
    are shuffled.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(examples))
    lengths = examples.lengths
    batches: list[NDArray[np.int64]] = []
    for begin in range(0, len(order), pool * batch_size):
        part = order[begin : begin + pool * batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += pieces(part, batch_size)
    return [batches[i] for i in rng.permutation(len(batches))]


def evaluation_batches(examples: Examples, token_budget: int = 4096) -> Iterator[NDArray[np.int64]]:
    """Rows by falling length, in batches of about `token_budget` tokens with padding."""
    lengths = examples.lengths
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        size = max(1, token_budget // int(lengths[order[begin]]))
        yield order[begin : begin + size]
        begin += size
