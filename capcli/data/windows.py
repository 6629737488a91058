"""Questions and contexts: windows that share tokens, and where an answer is in them.

Letters: S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.data.cache import Arrays, Piece
from capcli.data.labels import Answers
from capcli.data.splits import Split
from capcli.errors import DataError

STRIDE = 128


def pad_id_of(tokenizer: Any) -> int:
    """The id that fills up a batch; 0 for a tokenizer without padding."""
    return int(tokenizer.pad_token_id or 0)


def _flat(rows: Sequence[Sequence[int]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(rows), dtype=dtype, count=sum(map(len, rows)))


def coded_arrays(coded: Any, dtype: type[np.integer[Any]], pad_id: int) -> Arrays:
    """The arrays that every kind has, from what a tokenizer returned.

    Where a tokenizer without special tokens makes nothing of an empty text, a padding token stands for it.
    """
    for name, value in (("input_ids", pad_id), ("token_type_ids", 0), ("offset_mapping", (0, 0))):
        for row in coded.get(name, ()):
            if not row:
                row.append(value)
    arrays = {
        "tokens": _flat(coded["input_ids"], dtype),
        "lengths": np.asarray([len(row) for row in coded["input_ids"]], dtype=np.int32),
    }
    if "token_type_ids" in coded:
        arrays["types"] = _flat(coded["token_type_ids"], np.uint8)
    return arrays


# Questions and contexts ----------------------------------------------------------------------------------------------


def stride_of(tokenizer: Any, length: int, stride: int) -> int:
    """Tokens that two windows share, when a question takes up half of a window."""
    room = length - tokenizer.num_special_tokens_to_add(pair=True) - length // 2
    if room < 1:
        raise DataError(f"a window of {length} tokens has no room for a context", "raise --max-length")
    if stride >= room:
        raise DataError(
            f"--stride {stride} is too long: only {room} of {length} tokens may be left for the context",
            f"give less than {room}, or raise --max-length",
        )
    return stride or min(STRIDE, room // 2)


def windows_of(
    split: Split,
    begin: int,
    questions: list[str],
    contexts: list[str],
    tokenizer: Any,
    length: int,
    stride: int,
    dtype: Any,
) -> Piece:
    """The windows of questions with their contexts; `begin` is the index of the first question in the split."""
    short = _shortened(questions, tokenizer, length // 2)
    coded = tokenizer(
        short,
        contexts,
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    owner = np.asarray(coded["overflow_to_sample_mapping"], dtype=np.int64)
    places = [_place(split, begin + i, context) for i, context in enumerate(contexts)]
    arrays = coded_arrays(coded, dtype, pad_id_of(tokenizer))
    chars, labels = [], np.zeros((len(owner), 2), dtype=np.int64)
    for window, question in enumerate(owner):
        spans = np.asarray(coded["offset_mapping"][window], dtype=np.int32).reshape(-1, 2)
        inside = [sequence == 1 for sequence in coded.sequence_ids(window)] or [False]
        spans[~np.asarray(inside)] = -1
        chars.append(spans)
        labels[window] = _tokens_of(places[question], spans)
    arrays |= {"owner": owner + begin, "chars": np.concatenate(chars), "labels": labels}
    return Piece(arrays=arrays, n_cut=sum(a != b for a, b in zip(short, questions, strict=True)))


def _shortened(questions: list[str], tokenizer: Any, limit: int) -> list[str]:
    """Questions cut to at most `limit` tokens, at a border of tokens."""
    short, rows = list(questions), list(range(len(questions)))
    while rows:
        coded = tokenizer(
            [short[i] for i in rows],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        long = [
            (i, spans[limit][0]) for i, spans in zip(rows, coded["offset_mapping"], strict=True) if len(spans) > limit
        ]
        for i, end in long:  # what is left may fall into other tokens, so it is looked at again
            short[i] = short[i][: min(end, len(short[i]) - 1)]
        rows = [i for i, _ in long]
    return short


def _place(split: Split, index: int, context: str) -> tuple[int, int] | None:
    """Begin and end of the first answer of a question in its context, in characters; None when there is none.

    Raises `DataError` for a training question whose answer does not stand in the context.
    """
    answers: Answers = split.labels[index]
    if not answers.texts:
        return None
    text = answers.texts[0].strip()
    begin = _nearest(text, context, answers.starts[0]) if text else -1
    if begin < 0 and split.name == "train":
        raise DataError(
            f"row {split.row(index)} of the {split.name} split: the answer {answers.texts[0][:60]!r} "
            "does not occur in its context",
            "an answer must be copied from the context exactly; remove the row, or give it no answer",
        )
    return (begin, begin + len(text)) if begin >= 0 else None


def _nearest(text: str, context: str, start: int) -> int:
    """Where `text` stands in the context, as near to `start` as possible; the first place for -1. -1: nowhere."""
    before = context.rfind(text, 0, start + len(text)) if start >= 0 else -1
    after = context.find(text, max(start, 0))
    if before < 0 or after < 0:
        return max(before, after)
    return before if start - before <= after - start else after


def _tokens_of(place: tuple[int, int] | None, spans: NDArray[np.int32]) -> tuple[int, int]:
    """First and last token of an answer in a window with the given `chars`; (0, 0) unless it holds all of it."""
    inside = np.flatnonzero(spans[:, 1] > spans[:, 0])
    if place is None or len(inside) == 0:
        return 0, 0
    begins, ends = spans[inside].T
    first = int(np.searchsorted(ends, place[0], side="right"))
    last = int(np.searchsorted(begins, place[1], side="left")) - 1
    if place[0] < begins[0] or place[1] > ends[-1] or last < first:
        return 0, 0
    return int(inside[first]), int(inside[last])
