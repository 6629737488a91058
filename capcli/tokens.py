"""Examples as tokens, and the batches made of them.

Letters: N examples, B batch, S tokens of the longest example of a batch, T tokens of all examples, C labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capcli.cache import Arrays, Piece, mapped
from capcli.errors import DataError
from capcli.labels import Answers
from capcli.pruning.losses import NO_LABEL
from capcli.tasks import Split
from capcli.text import percent

UNKNOWN_SHARE = 0.05  # of the tokens of a split: from here on it is said; ordinary text has less than a thousandth
CACHE_EXAMPLES = 20_000  # from here on tokens are kept on disk; fewer are tokenised in seconds
CACHE_FORMAT = 1
STRIDE = 128


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Tokenised examples, stored flat; the id of an example is its index.

    tokens, types [T], offsets [N + 1]. kind: as in the task table. labels, by kind: classification and regression [N],
    multilabel float32 [N, C], tokens int64 [T] with `NO_LABEL` except at the first token of each word, spans int64
    [N, 2] (first and last token of the answer in the window, (0, 0) where it has none).

    For spans an example is a window of a long context: owner [N] is the question that it belongs to, and chars [T, 2]
    are the begin and end of each token in the context in characters, -1 outside of it. For tokens, words [T] is the
    word that begins with the token, -1 elsewhere. split: what was tokenised. n_cut: texts that were longer than a
    window of `length` tokens and lost their end (for spans: questions). unknown: share of the tokens, special ones
    aside, that stand for what the tokenizer does not know.
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
        return self.kind in ("tokens", "spans")

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


# Tokenising ----------------------------------------------------------------------------------------------------------


def encode(
    split: Split,
    tokenizer: Any,
    length: int,
    *,
    stride: int = 0,
    cache: bool = True,
    chunk: int = 2000,
    check: Callable[[], None] = lambda: None,
) -> Examples:
    """Tokenise a split, `chunk` examples at a time; texts beyond `length` tokens are cut, the longer of a pair first.

    A context (spans) is not cut but divided into windows that share `stride` tokens; 0 chooses `STRIDE`, or half of
    what the window leaves for the context where that is less. From `CACHE_EXAMPLES` on the arrays are kept on disk,
    memory-mapped, and found again by the content of what was tokenised, unless not `cache`. `check` is called after
    each chunk; what it raises ends the work.

    Raises:
        DataError: a text that is none, a training answer that does not stand in its context, a stride that is too
            long, or a tokenizer that does not tell where its tokens stand in the text, for tokens and spans.
    """
    if split.kind in ("tokens", "spans") and not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} does not tell where its tokens stand in the text",
            "labels of words and spans of answers need a model with a fast tokenizer",
        )
    if split.kind == "spans":
        stride = _stride(tokenizer, length, stride)

    def pieces() -> Iterator[Piece]:
        for piece in _pieces(split, tokenizer, length, stride, chunk):
            check()
            yield piece

    whole: Piece | None = None
    if cache and len(split) >= CACHE_EXAMPLES and tokenizer.is_fast:
        whole = mapped(_key(split, tokenizer, length, stride), pieces)
    whole = whole or _joined(pieces())
    return _examples(whole, split, tokenizer, length)


def _examples(whole: Piece, split: Split, tokenizer: Any, length: int) -> Examples:
    arrays = whole.arrays
    labels = split.labels.astype(np.float32) if split.kind == "multilabel" else split.labels
    return Examples(
        tokens=arrays["tokens"],
        types=arrays.get("types"),
        offsets=np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)]),
        labels=arrays.get("labels", labels),
        pad_id=_pad_id(tokenizer),
        kind=split.kind,
        owner=arrays.get("owner"),
        words=arrays.get("words"),
        chars=arrays.get("chars"),
        split=split,
        n_cut=whole.n_cut,
        length=length,
        unknown=_unknown(arrays["tokens"], tokenizer),
    )


def _unknown(tokens: NDArray[np.integer[Any]], tokenizer: Any) -> float:
    """Share of the tokens that are unknown, of those that are not special."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown == tokenizer.eos_token_id:  # as GPT-2 has it, whose bytes spell everything
        return 0.0
    found = int(np.count_nonzero(tokens == unknown))
    others = sum(int(np.count_nonzero(tokens == place)) for place in {*tokenizer.all_special_ids} - {unknown})
    return found / max(1, len(tokens) - others)


def doubts(examples: Examples, name: str) -> tuple[str, ...]:
    """What a model cannot read of the texts of a split, as notes: truncated ends, and tokens that are unknown."""
    found = []
    if examples.n_cut:
        texts = f"{examples.n_cut:,} of {examples.n_texts:,}"
        long = f"longer than {examples.length} tokens, so their ends were truncated: {texts} texts of {name}"
        if examples.kind == "spans":
            long = f"longer than half of {examples.length} tokens, so they were truncated: {texts} questions of {name}"
        found.append(long)
    if examples.unknown >= UNKNOWN_SHARE:
        found.append(
            f"unknown to the tokenizer: {percent(examples.unknown)} of the tokens of {name}; "
            "the model cannot tell apart what they stand for"
        )
    return tuple(found)


def _joined(pieces: Iterator[Piece]) -> Piece:
    found = list(pieces)
    arrays = {name: np.concatenate([piece.arrays[name] for piece in found]) for name in found[0].arrays}
    return Piece(arrays=arrays, n_cut=sum(piece.n_cut for piece in found))


def _pieces(split: Split, tokenizer: Any, length: int, stride: int, chunk: int) -> Iterator[Piece]:
    fits = max(tokenizer.get_vocab().values(), default=0) < 2**16
    dtype: type[np.integer[Any]] = np.uint16 if fits else np.int32
    begin = 0
    # Contexts are long, and a tokenizer says where their tokens stand in Python objects.
    size = max(1, chunk // 8) if split.kind == "spans" else chunk
    for texts, pairs in split.chunks(size):
        if split.kind == "tokens":
            yield _words(texts, split.labels[begin : begin + len(texts)], tokenizer, length, dtype)
        elif split.kind == "spans":
            assert pairs is not None, "the context of a question is its second text"
            yield _windows(split, begin, texts, pairs, tokenizer, length, stride, dtype)
        else:
            yield _texts(texts, pairs, tokenizer, length, dtype)
        begin += len(texts)


def _pad_id(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id or 0)


def _flat(rows: Sequence[Sequence[int]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.fromiter(chain.from_iterable(rows), dtype=dtype, count=sum(map(len, rows)))


def _coded(coded: Any, dtype: type[np.integer[Any]], pad_id: int) -> Arrays:
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


def _n_cut(coded: Any, length: int) -> int:
    """How many texts lost their end. A slow tokenizer does not say so: every text that fills the window counts."""
    full = [i for i, row in enumerate(coded["input_ids"]) if len(row) >= length]
    return sum(bool(coded.encodings[i].overflowing) for i in full) if coded.encodings else len(full)


def _texts(texts: list[str], pairs: list[str] | None, tokenizer: Any, length: int, dtype: Any) -> Piece:
    coded = tokenizer(texts, pairs, truncation=True, max_length=length, return_attention_mask=False)
    return Piece(arrays=_coded(coded, dtype, _pad_id(tokenizer)), n_cut=_n_cut(coded, length))


# Labels of words -----------------------------------------------------------------------------------------------------


def _words(texts: list[list[str]], labels: NDArray[Any], tokenizer: Any, length: int, dtype: Any) -> Piece:
    """Sentences as text with a space between words; each word's label stands at its first token.

    A word that is cut away, or that the tokenizer makes nothing of, has no label.
    """
    coded = tokenizer(
        [" ".join(words) for words in texts],
        truncation=True,
        max_length=length,
        return_attention_mask=False,
        return_offsets_mapping=True,
    )
    arrays = _coded(coded, dtype, _pad_id(tokenizer))
    first = [_first_tokens(words, spans) for words, spans in zip(texts, coded["offset_mapping"], strict=True)]
    arrays["words"] = np.concatenate(first)
    arrays["labels"] = np.concatenate(  # index -1 is the NO_LABEL at the end
        [np.append(own, NO_LABEL)[words] for words, own in zip(first, labels, strict=True)]
    )
    return Piece(arrays=arrays, n_cut=_n_cut(coded, length))


def _first_tokens(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> NDArray[np.int32]:
    """For each token the index of the word that begins with it, or -1.

    A token belongs to the word that holds its last character; of special tokens the span is empty.
    """
    lengths = np.asarray([len(word) for word in words], dtype=np.int64)
    starts = np.cumsum(lengths + 1) - lengths - 1
    begin, end = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
    owner = np.searchsorted(starts, end - 1, side="right") - 1
    inside = (end > begin) & (owner >= 0)
    inside[inside] = end[inside] <= (starts + lengths)[owner[inside]]  # else it is the space behind the word
    _, first = np.unique(owner[inside], return_index=True)
    places = np.flatnonzero(inside)[first]
    found = np.full(len(spans), -1, dtype=np.int32)
    found[places] = owner[places]
    return found


# Questions and contexts ----------------------------------------------------------------------------------------------


def _stride(tokenizer: Any, length: int, stride: int) -> int:
    """Tokens that two windows share, when a question takes up half of a window."""
    room = length - tokenizer.num_special_tokens_to_add(pair=True) - length // 2
    if room < 1:
        raise DataError(f"a window of {length} tokens has no room for a context", "raise --max-length")
    if stride >= room:
        raise DataError(
            f"--stride {stride} is too long: at least {room} of {length} tokens are left for the context",
            f"give less than {room}, or raise --max-length",
        )
    return stride or min(STRIDE, room // 2)


def _windows(
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
    arrays = _coded(coded, dtype, _pad_id(tokenizer))
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
            "does not stand in its context",
            "an answer is a piece of the context, character by character; leave the row out, or give it no answer",
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


# What the tokens depend on -----------------------------------------------------------------------------------------


def _key(split: Split, tokenizer: Any, length: int, stride: int) -> str:
    """sha256, as hex, over everything that the tokens depend on."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend |= {"truncation": None, "padding": None}  # what the last call left there
    parts = [
        CACHE_FORMAT,
        split.fingerprint,
        split.kind,
        split.name == "train",  # a strange answer is an error there
        _label_digest(split),
        length,
        stride,
        type(tokenizer).__name__,
        tokenizer.truncation_side,
        tokenizer.model_input_names,
        tokenizer.all_special_ids,
        backend,
        version("tokenizers"),
        version("transformers"),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _label_digest(split: Split) -> str:
    """sha256 of the labels that are stored with the tokens."""
    digest = hashlib.sha256()
    if split.kind == "tokens":
        for labels in split.labels:
            digest.update(len(labels).to_bytes(8, "little") + labels.astype("<i8").tobytes())
    elif split.kind == "spans":
        for answers in split.labels:
            digest.update(json.dumps([answers.texts, answers.starts]).encode())
    return digest.hexdigest()


# Batches -------------------------------------------------------------------------------------------------------------


def collate(examples: Examples, rows: NDArray[np.int64], device: torch.device) -> Batch:
    """The examples `rows` [B], padded to the longest of them; to a multiple of 8 on an accelerator."""

    def moved(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

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
    of_words = examples.kind == "tokens"
    labels = np.where(inside, examples.labels[places], NO_LABEL) if of_words else examples.labels[rows]
    if labels.dtype == np.float64:
        labels = labels.astype(np.float32)  # all that a loss needs, and some devices have no more
    return Batch(
        inputs={name: moved(array) for name, array in inputs.items()},
        labels=moved(labels),
        ids=moved(rows),
        places=moved(places) if examples.per_token else None,
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
