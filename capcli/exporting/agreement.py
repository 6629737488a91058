"""Whether two models say the same: their logits on the same texts.

Letters: B batch, S tokens, C labels, R rows (one per answer), N what a row chooses among.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capcli.data.kinds import KINDS
from capcli.data.splits import Split
from capcli.models import predict
from capcli.models.model import Model

BATCH = 8
TOLERANCE = 1e-4  # of the largest logit: what another order of the same 32-bit operations may change

Text = tuple[Any, Any]  # a text, or the words of one, and its pair or None
Run = Callable[[Mapping[str, Tensor]], Tensor]  # inputs -> logits [B, C], [B, S, C], or for spans [B, S, 2]


def texts(split: Split) -> list[Text]:
    """The texts of a split, with their pairs."""
    found: list[Text] = []
    for first, second in split.chunks():
        pairs: Sequence[Any] = second or [None] * len(first)
        found += zip(first, pairs, strict=True)
    return found


def encoded(tokenizer: Any, batch: Sequence[Text], length: int) -> Any:
    """Inputs [B, S] of a few texts, padded to the longest."""
    first = [text if isinstance(text, str) else " ".join(text) for text, _ in batch]
    second = None if batch[0][1] is None else [pair for _, pair in batch]
    return tokenizer(first, second, padding=True, truncation=True, max_length=length, return_tensors="pt")


def pieces(tokenizer: Any, text: Text, length: int) -> list[str]:
    """The tokens of a text as strings."""
    ids: Sequence[int] = encoded(tokenizer, [text], length)["input_ids"][0].tolist()
    return list(tokenizer.convert_ids_to_tokens(ids))


def logits(
    run: Run, kind: str, tokenizer: Any, batchable: Sequence[Text], length: int, batch: int = BATCH
) -> list[Tensor]:
    """Rows [N] of logits: one per text; per real token for `tokens`; for `spans` begin and end over the real tokens.

    batch: texts that are computed together.
    """
    rows: list[Tensor] = []
    for begin in range(0, len(batchable), batch):
        inputs = encoded(tokenizer, batchable[begin : begin + batch], length)
        real = inputs["attention_mask"].bool()
        out = run(inputs).float().cpu()
        if KINDS[kind].windows:
            rows += [column for i, mask in enumerate(real) for column in out[i][mask].T]
        else:
            rows += list(out[real] if KINDS[kind].per_token else out)
    return rows


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two models are apart: the largest difference of two logits, the size of the largest logit, and the share
    of rows in which both choose the same; None for a regression."""

    largest: float
    scale: float
    agreement: float | None

    @property
    def tolerance(self) -> float:
        """The largest difference that rounding alone explains."""
        return TOLERANCE * max(1.0, self.scale)


def difference(kind: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Difference:
    """Compare rows of logits of two models; NaN anywhere is an infinite difference."""
    assert len(ours) == len(theirs) and ours, "two models answered the same texts"
    gaps = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    same = [bool(_chosen(kind, a).equal(_chosen(kind, b))) for a, b in zip(ours, theirs, strict=True)]
    finite = all(gap == gap for gap in gaps)
    return Difference(
        largest=max(gaps) if finite else float("inf"),
        scale=max(float(row.abs().max()) for row in ours),
        agreement=sum(same) / len(same) if KINDS[kind].agreement else None,
    )


def _chosen(kind: str, row: Tensor) -> Tensor:
    """What a row of logits answers: each label above zero, or the index of the largest."""
    return row > 0 if KINDS[kind].several else row.argmax()


def of(model: Model, device: torch.device) -> Run:
    """The logits of a network in 32 bits."""

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return predict.forward(model, {name: tensor.to(device) for name, tensor in inputs.items()})[0]

    return run
