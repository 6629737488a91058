"""The vocabulary that a task needs: found in its texts, cut out of tokenizer and embeddings, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from capcli.data.kinds import KINDS
from capcli.data.splits import Split
from capcli.errors import FileError, ModelError
from capcli.models import tokenizers
from capcli.models.backends import (
    Backend,
    backend_of,
    config_ids,
    dropped_tokens,
    embedding_rows,
    first_some,
    numbers,
    rewritten,
    sections,
    special,
    spelling,
    unknown_token,
)
from capcli.models.model import Model
from capcli.records.exported import BeforeAfter, Vocabulary
from capcli.stored import read_bytes

MAX_FILE_BYTES = 64_000_000
CHUNK_TEXTS = 2000


# Which tokens to keep ------------------------------------------------------------------------------------------------


def needed(tokenizer: Any, splits: Iterable[Split]) -> set[int]:
    """Ids of the tokens that the texts of these splits produce, read in a stream, and of those that spell the rest.

    Those are special and added tokens (none of the kind [unused7]), every piece of one character with and without the
    mark of a word's begin or continuation, and the tokens of single bytes.

    Raises `ModelError` for a tokenizer that cannot be reduced, `DataError` for a text that is none.
    """
    found = spelling(tokenizer, backend_of(tokenizer))
    for texts in chain.from_iterable(map(_texts, splits)):
        found.update(chain.from_iterable(_ids(tokenizer, texts)))
    return found


def from_file(tokenizer: Any, path: Path) -> set[int]:
    """Ids of the tokens in a vocabulary file: UTF-8, one token per line, as vocab.txt has them.

    Taken as it is, and `reduced` adds the parts that its tokens need; empty lines and repeated tokens do not count. A
    token that holds a line feed cannot stand in a file. See `check_known` for whether the file suffices.

    Raises `FileError` for a file that is none, is empty, or has tokens that the tokenizer lacks or lacks special ones;
    `ModelError` for a tokenizer that cannot be reduced.
    """
    backend, vocabulary = backend_of(tokenizer), tokenizer.get_vocab()
    tokens = _lines(path)
    strange = [token for token in tokens if token not in vocabulary]
    if strange:
        raise FileError(
            f"{path} has {_count(strange, 'token')} that the tokenizer does not have: {first_some(strange)}",
            "one token per line, written as in vocab.txt or tokenizer.json, with marks such as ## or ▁, without scores",
        )
    found = {vocabulary[token] for token in tokens}
    dropped = dropped_tokens(tokenizer, backend, found)
    if dropped:
        raise FileError(
            f"the vocabulary in {path} drops {first_some(dropped)}, which the model needs",
            f"add {_count(dropped, 'line')} for {first_some(dropped)}",
        )
    return found


def _lines(path: Path) -> list[str]:
    """The lines of a text file, each once; only line feeds end them, because tokens may be other line separators."""
    try:
        text = read_bytes(path, MAX_FILE_BYTES, "a vocabulary").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"cannot read the vocabulary {path}: it is not UTF-8") from error
    found = list(dict.fromkeys(line.removesuffix("\r") for line in text.split("\n")))
    found = [line for line in found if line]
    if not found:
        raise FileError(f"the vocabulary {path} is empty", "one token per line, as in vocab.txt")
    return found


def _count(things: Collection[Any], name: str) -> str:
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"


# The reduced model ---------------------------------------------------------------------------------------------------


def reduced(model: Model, keep: Collection[int]) -> Model:
    """A new model with the tokens `keep` only, and with those that they and the model need; `model` is untouched.

    Tokenizer, word embeddings [V, E] → [K, E] and token ids in the configuration are renumbered in the old order; all
    other tensors are copied as they are. Needed are: what reaches a token (see above), the ids that the configuration
    names, and, where positions count from the padding id, all ids below it, so that it stays.

    Raises `ModelError` when special tokens are dropped, or for a model or tokenizer that cannot be reduced.
    """
    tokenizer = model.tokenizer
    backend = backend_of(tokenizer)
    dropped = dropped_tokens(tokenizer, backend, keep)
    if dropped:
        raise ModelError(
            f"the vocabulary drops {first_some(dropped)}, which the model needs", "keep the special tokens"
        )
    new = numbers(model, backend, keep)
    if len(new) <= len(special(tokenizer, backend)):
        raise ModelError("the vocabulary contains only special tokens", "add the tokens that occur in texts")
    written = rewritten(backend, new)
    small = tokenizers.rewritten(tokenizer, written)
    check_opened(small, written, {token: new[i] for token, i in tokenizer.get_vocab().items() if i in new})
    return dataclasses.replace(model, net=_shrunk(model.net, new), tokenizer=small)


def check_opened(tokenizer: Any, written: Backend, vocabulary: Mapping[str, int]) -> None:
    """The rewritten files must open as what was written: some classes add tokens, or expect one at a fixed id."""
    opened = backend_of(tokenizer)
    parts = ("model", "post_processor", "pre_tokenizer", "normalizer")
    wrong = [part for part in parts if opened[part] != written[part]]
    wrong += ["added_tokens"] if tokenizer.get_vocab() != vocabulary else []
    if wrong:
        raise ModelError(
            f"the vocabulary of {type(tokenizer).__name__} cannot be reduced: "
            f"its class does not take {', '.join(wrong)} from tokenizer.json as written"
        )


def _shrunk(net: Any, new: Mapping[int, int]) -> Any:
    """A copy of the network with the rows of `new` only, wherever the word embeddings are used, and its ids."""
    whole = embedding_rows(net).weight
    weight = nn.Parameter(whole.detach()[sorted(new)].clone(), requires_grad=whole.requires_grad)
    small = deepcopy(net, {id(whole): weight})
    for module in small.modules():
        if getattr(module, "weight", None) is weight and isinstance(module, nn.Embedding):
            pad = module.padding_idx
            module.num_embeddings, module.padding_idx = len(new), None if pad is None else new.get(pad)
    for section in sections(small.config):
        if section.get("vocab_size") == len(whole):
            section["vocab_size"] = len(new)
    for holder, key in list(config_ids(small.config)):
        holder[key] = new.get(holder[key], holder[key])  # an id that was out of range stays so
    return small


# What it costs -------------------------------------------------------------------------------------------------------


def coverage(before: Any, after: Any, split: Split) -> Vocabulary:
    """How the texts of a split, best one that is held out, fare with the reduced tokenizer instead of the whole one.

    `texts`; `same_texts`: those with the same tokens; `tokens_per_text` and `unknown_rate`, the share of tokens that
    are the unknown token, both `before` and `after`. A pair is two texts; special tokens do not count.
    """
    unknown = _unknown_id(after)
    texts = same = 0
    tokens, strange = [0, 0], [0, 0]
    for _, *both in _both(before, after, split):
        texts, same = texts + 1, same + (both[0] == both[1])
        for i, ids in enumerate(both):
            tokens[i] += len(ids)
            strange[i] += ids.count(unknown)
    rates = [n / max(total, 1) for n, total in zip(strange, tokens, strict=True)]
    return Vocabulary(
        texts=texts,
        same_texts=same,
        tokens_per_text=BeforeAfter(before=tokens[0] / max(texts, 1), after=tokens[1] / max(texts, 1)),
        unknown_rate=BeforeAfter(before=rates[0], after=rates[1]),
    )


def check_same(before: Any, after: Any, splits: Iterable[Split]) -> None:
    """Every text must have the same tokens in both vocabularies. Raises `ModelError` with count and first text."""
    changed, total, first = 0, 0, ""
    for text, ids, other in chain.from_iterable(_both(before, after, split) for split in splits):
        if ids != other:
            first = first if changed else text
            changed += 1
        total += 1
    if changed:
        raise ModelError(
            f"the reduced vocabulary changes the tokens of {changed:,} of {total:,} texts, first {first_some([first])}"
        )


def check_known(before: Any, after: Any, splits: Iterable[Split], source: str = "the vocabulary") -> None:
    """No word that the whole vocabulary knows may become unknown. Raises `ModelError` with count and first words."""
    was_unknown, unknown = _unknown_id(before), _unknown_id(after)
    lost, total, words = 0, 0, dict[str, None]()
    for text, ids, other in chain.from_iterable(_both(before, after, split) for split in splits):
        total += 1
        if unknown in other and ids != other:
            once = {i for a, b in _spans(text, before, was_unknown) for i in range(a, b)}
            found = [text[a:b] for a, b in _spans(text, after, unknown) if not once.issuperset(range(a, b))]
            lost += bool(found)
            words |= dict.fromkeys(found)
    if lost:
        raise ModelError(
            f"{source} drops what {lost:,} of {total:,} texts need: {_count(words, 'word')} would become unknown, "
            f"first {first_some(list(words))}",
            "add their tokens, or all single characters; --vocab task finds the tokens that are needed",
        )


def _spans(text: str, tokenizer: Any, token: int) -> list[tuple[int, int]]:
    """Begin and end, in characters, of each place in the text that became this token."""
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [span for span, i in zip(coded["offset_mapping"], coded["input_ids"], strict=True) if i == token]


def _unknown_id(tokenizer: Any) -> int:
    """Id of the unknown token; one that no token has where there is none."""
    return int(tokenizer.get_vocab().get(unknown_token(backend_of(tokenizer)), -2))


def _both(before: Any, after: Any, split: Split) -> Iterator[tuple[str, list[int], list[int]]]:
    """Each text of a split with its tokens before and after, both by the new ids, -1 for a token that is gone."""
    vocabulary = after.get_vocab()
    new = {i: vocabulary.get(token, -1) for token, i in before.get_vocab().items()}
    for texts in _texts(split):
        for text, ids, other in zip(texts, _ids(before, texts), _ids(after, texts), strict=True):
            yield text, [new[i] for i in ids], other


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of the tokens of texts, of the whole of each, without special tokens around."""
    unique = list(dict.fromkeys(texts))  # questions of one context stand together
    coded = tokenizer(
        unique,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    found: dict[str, list[int]] = dict(zip(unique, coded["input_ids"], strict=True))
    return [found[text] for text in texts]


def _texts(split: Split) -> Iterator[list[str]]:
    """The texts of a split as its tokens are made from them, all columns, some thousand at a time."""
    for texts, pairs in split.chunks(CHUNK_TEXTS):
        firsts = [" ".join(words) for words in texts] if KINDS[split.kind].words else texts
        yield [*firsts, *(pairs or [])]
