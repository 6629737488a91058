"""From texts to token ids, once for a split; large ones are cached by content and mapped.

Letters: N examples, T tokens of all examples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.data.batches import Examples
from capcli.data.cache import Piece, mapped
from capcli.data.kinds import KINDS, NO_LABEL
from capcli.data.splits import Split
from capcli.data.windows import coded_arrays, pad_id_of, stride_of, windows_of
from capcli.errors import DataError
from capcli.reporting.text import percent

UNKNOWN_SHARE = 0.05  # of the tokens of a split: from here on it is said; ordinary text has less than a thousandth
CACHE_EXAMPLES = 20_000  # from here on tokens are kept on disk; fewer are tokenised in seconds
CACHE_FORMAT = 1


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
            long, or a tokenizer that does not tell where its tokens are in the text, for tokens and spans.
    """
    kind = KINDS[split.kind]
    if (kind.words or kind.windows) and not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} does not tell where its tokens are in the text",
            "labels of words and spans of answers need a model with a fast tokenizer",
        )
    if kind.windows:
        stride = stride_of(tokenizer, length, stride)

    def pieces() -> Iterator[Piece]:
        for piece in _pieces(split, tokenizer, length, stride, chunk):
            check()
            yield piece

    whole: Piece | None = None
    if cache and len(split) >= CACHE_EXAMPLES and tokenizer.is_fast:
        whole = mapped(key_of(split, tokenizer, length, stride), pieces)
    whole = whole or _joined(pieces())
    return _examples(whole, split, tokenizer, length)


def unlabelled(texts: list[str], pairs: list[str] | None, tokenizer: Any, length: int, kind: str) -> Examples:
    """Texts without labels, each of them cut to one window of `length` tokens, for a model of this kind."""
    piece = _texts(*_apart(texts, pairs, kind), tokenizer, length, np.int32)
    arrays = piece.arrays
    return Examples(
        tokens=arrays["tokens"],
        types=arrays.get("types"),
        offsets=np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)]),
        labels=np.full(len(arrays["tokens"]), NO_LABEL),
        pad_id=pad_id_of(tokenizer),
        kind=kind,
        n_cut=piece.n_cut,
        length=length,
        unknown=_unknown(arrays["tokens"], tokenizer),
    )


def _examples(whole: Piece, split: Split, tokenizer: Any, length: int) -> Examples:
    arrays = whole.arrays
    labels = split.labels.astype(np.float32) if KINDS[split.kind].several else split.labels
    if KINDS[split.kind].vectors:
        labels = np.repeat(labels, len(split.columns))
    return Examples(
        tokens=arrays["tokens"],
        types=arrays.get("types"),
        offsets=np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)]),
        labels=arrays.get("labels", labels),
        pad_id=pad_id_of(tokenizer),
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
        found.append(truncated(examples.n_cut, examples.n_texts, examples.length, examples.kind, name))
    if examples.unknown >= UNKNOWN_SHARE:
        found.append(
            f"unknown to the tokenizer: {percent(examples.unknown)} of the tokens of {name}; "
            "the model cannot tell them apart"
        )
    return tuple(found)


def truncated(n_cut: int, n_texts: int, length: int, kind: str, name: str) -> str:
    """The note on texts of `name` that were longer than what a model of this kind reads."""
    if KINDS[kind].windows:
        return (
            f"longer than half of {length} tokens, so they were truncated: {n_cut:,} of {n_texts:,} questions of {name}"
        )
    return f"longer than {length} tokens, so their ends were truncated: {n_cut:,} of {n_texts:,} texts of {name}"


def _joined(pieces: Iterator[Piece]) -> Piece:
    found = list(pieces)
    arrays = {name: np.concatenate([piece.arrays[name] for piece in found]) for name in found[0].arrays}
    return Piece(arrays=arrays, n_cut=sum(piece.n_cut for piece in found))


def _pieces(split: Split, tokenizer: Any, length: int, stride: int, chunk: int) -> Iterator[Piece]:
    fits = max(tokenizer.get_vocab().values(), default=0) < 2**16
    dtype: type[np.integer[Any]] = np.uint16 if fits else np.int32
    begin = 0
    # Contexts are long, and a tokenizer says where their tokens stand in Python objects.
    kind = KINDS[split.kind]
    size = max(1, chunk // 8) if kind.windows else chunk
    for texts, pairs in split.chunks(size):
        if kind.words:
            yield _words(texts, split.labels[begin : begin + len(texts)], tokenizer, length, dtype)
        elif kind.windows:
            assert pairs is not None, "the context of a question is its second text"
            yield windows_of(split, begin, texts, pairs, tokenizer, length, stride, dtype)
        else:
            yield _texts(*_apart(texts, pairs, split.kind), tokenizer, length, dtype)
        begin += len(texts)


def _n_cut(coded: Any, length: int) -> int:
    """How many texts lost their end. A slow tokenizer does not say so: every text that fills the window counts."""
    full = [i for i, row in enumerate(coded["input_ids"]) if len(row) >= length]
    return sum(bool(coded.encodings[i].overflowing) for i in full) if coded.encodings else len(full)


def _apart(texts: list[str], pairs: list[str] | None, kind: str) -> tuple[list[str], list[str] | None]:
    """The texts as they are read: two as one input, or one after the other where each gets a vector of its own."""
    if pairs is None or not KINDS[kind].vectors:
        return texts, pairs
    return [text for both in zip(texts, pairs, strict=True) for text in both], None


def _texts(texts: list[str], pairs: list[str] | None, tokenizer: Any, length: int, dtype: Any) -> Piece:
    coded = tokenizer(texts, pairs, truncation=True, max_length=length, return_attention_mask=False)
    return Piece(arrays=coded_arrays(coded, dtype, pad_id_of(tokenizer)), n_cut=_n_cut(coded, length))


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
    arrays = coded_arrays(coded, dtype, pad_id_of(tokenizer))
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


# What the tokens depend on -----------------------------------------------------------------------------------------


def key_of(split: Split, tokenizer: Any, length: int, stride: int) -> str:
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
    kind = KINDS[split.kind]
    if kind.words:
        for labels in split.labels:
            digest.update(len(labels).to_bytes(8, "little") + labels.astype("<i8").tobytes())
    elif kind.windows:
        for answers in split.labels:
            digest.update(json.dumps([answers.texts, answers.starts]).encode())
    return digest.hexdigest()
