"""Whether two models say the same: their logits on the same texts.

Letters: B batch, S tokens, C labels, R rows (one per answer), N what a row chooses among.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from capcli.data import tokens
from capcli.data.batches import Examples
from capcli.data.kinds import KINDS
from capcli.data.splits import Split
from capcli.events import finished
from capcli.measuring.metrics import AGREEMENT
from capcli.models import predict
from capcli.models.predictor import Predictor

BATCH = 8
TOLERANCE = 1e-4  # of the largest logit: what another order of the same 32-bit operations may change

Text = tuple[Any, Any]  # a text, or the words of one, and its pair or None


def texts(split: Split) -> list[Text]:
    """The texts of a split, with their pairs."""
    found: list[Text] = []
    for first, second in split.chunks():
        pairs: Sequence[Any] = second or [None] * len(first)
        found += zip(first, pairs, strict=True)
    return found


def encoded(tokenizer: Any, kind: str, some: Sequence[Text], length: int) -> Examples:
    """Texts as a model of this kind reads them, one window of each."""
    first = [text if isinstance(text, str) else " ".join(text) for text, _ in some]
    second = None if some[0][1] is None else [pair for _, pair in some]
    return tokens.unlabelled(first, second, tokenizer, length, kind)


def pieces(tokenizer: Any, kind: str, text: Text, length: int) -> list[str]:
    """The tokens of a text as strings."""
    return list(tokenizer.convert_ids_to_tokens(encoded(tokenizer, kind, [text], length).tokens.tolist()))


def logits(model: Predictor, some: Sequence[Text], length: int, batch: int = BATCH) -> list[Tensor]:
    """Rows [N] of logits: one per text; per real token for `tokens`; for `spans` begin and end over the real tokens.

    batch: texts that are computed together.
    """
    kind, examples = model.kind, encoded(model.tokenizer, model.kind, some, length)
    rows = (np.arange(begin, min(begin + batch, len(examples))) for begin in range(0, len(examples), batch))
    answers = finished(predict.outputs(model.run(), examples, rows, model.on.device, room=model.on.room))[0].cpu()
    if not KINDS[kind].windows:
        return list(answers)
    windows = itertools.pairwise(examples.offsets.tolist())
    return [column for begin, end in windows for column in answers[begin:end].T]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two models are apart: the largest difference of two logits, the size of the largest logit, and the share
    of rows in which both choose the same; None for a regression and for vectors."""

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
        agreement=sum(same) / len(same) if AGREEMENT in KINDS[kind].agreements else None,
    )


def _chosen(kind: str, row: Tensor) -> Tensor:
    """What a row of logits answers: each label above zero, or the index of the largest."""
    return row > 0 if KINDS[kind].several else row.argmax()
