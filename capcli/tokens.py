"""Examples as tokens, and the batches made of them.

Letters: N examples, B batch, S tokens of the longest example of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capcli.tasks import Split


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Tokenised examples, stored flat: tokens and token types [sum of lengths], offsets [N + 1], labels [N].

    The id of an example is its index.
    """

    tokens: NDArray[np.int32]
    types: NDArray[np.uint8] | None
    offsets: NDArray[np.int64]
    labels: NDArray[np.generic]
    pad_id: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, [N]."""
        return np.diff(self.offsets)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Model inputs [B, S], labels [B] and example ids [B] on the device."""

    inputs: dict[str, Tensor]
    labels: Tensor
    ids: Tensor
    places: Tensor | None = None


def encode(split: Split, tokenizer: Any, max_length: int, chunk: int = 2000) -> Examples:
    """Tokenise a split; texts beyond `max_length` tokens are cut, the longer of a pair first."""
    tokens, types, lengths = [], [], []
    for begin in range(0, len(split), chunk):
        window = slice(begin, begin + chunk)
        pairs = None if split.pairs is None else split.pairs[window]
        coded = tokenizer(
            split.texts[window], pairs, truncation=True, max_length=max_length, return_attention_mask=False
        )
        lengths += [len(row) for row in coded["input_ids"]]
        tokens.append(np.concatenate([np.asarray(row, dtype=np.int32) for row in coded["input_ids"]]))
        if "token_type_ids" in coded:
            types.append(np.concatenate([np.asarray(row, dtype=np.uint8) for row in coded["token_type_ids"]]))
    return Examples(
        tokens=np.concatenate(tokens),
        types=np.concatenate(types) if types else None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=split.labels,
        pad_id=tokenizer.pad_token_id or 0,
    )


def collate(examples: Examples, rows: NDArray[np.int64], device: torch.device) -> Batch:
    """The examples `rows` [B], padded to the longest of them; to a multiple of 8 on an accelerator."""
    starts = examples.offsets[rows]
    lengths = examples.offsets[rows + 1] - starts
    width = int(lengths.max())
    width = width if device.type == "cpu" else -(-width // 8) * 8
    inside = np.arange(width) < lengths[:, None]
    places = np.where(inside, starts[:, None] + np.arange(width), 0)
    inputs = {
        "input_ids": np.where(inside, examples.tokens[places], examples.pad_id).astype(np.int64),
        "attention_mask": inside.astype(np.int64),
    }
    if examples.types is not None:
        inputs["token_type_ids"] = np.where(inside, examples.types[places], 0).astype(np.int64)
    return Batch(
        inputs={name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in inputs.items()},
        labels=torch.from_numpy(examples.labels[rows]).to(device, non_blocking=True),
        ids=torch.from_numpy(rows).to(device, non_blocking=True),
    )


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
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
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
