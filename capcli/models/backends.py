"""The vocabulary inside a tokenizer.json: which entries it needs, and the file without the others."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import chain, pairwise
from typing import Any

from torch import nn

from capcli.errors import ModelError
from capcli.models.model import Model
from capcli.reporting.text import first_few

KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPARE = re.compile(r"[\[<]\|?_?(unused|reserved)\w*?\d+\|?[\]>]")  # what a vocabulary keeps free for later use
WORD_MARKS = ("▁", "Ġ")

Backend = dict[str, Any]  # the JSON of a fast tokenizer, as in tokenizer.json


def first_some(tokens: Sequence[str]) -> str:
    """The first three of some strings of a user, safe to show."""
    return first_few([repr(token if len(token) <= 40 else token[:40] + "…") for token in tokens], 3)


def backend_of(tokenizer: Any) -> Backend:
    """The JSON of a fast tokenizer of a known kind. Raises `ModelError`."""
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise ModelError(
            f"the vocabulary of {name} cannot be reduced: it has no tokenizer.json",
            f"tokenizers of these kinds can be reduced: {', '.join(KINDS)}",
        )
    try:
        backend: Backend = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the library raises no narrower class for parts that are Python code
        raise ModelError(f"the vocabulary of {name} cannot be reduced: {error}") from error
    kind = backend["model"].get("type")
    if kind not in KINDS:
        raise ModelError(
            f"the vocabulary of {name} cannot be reduced: it is of kind {kind}", f"supported kinds: {', '.join(KINDS)}"
        )
    return backend


def spelling(tokenizer: Any, backend: Backend) -> set[int]:
    """Ids of special and added tokens, and of those with which any word can be spelled."""
    settings = backend["model"]
    prefix, suffix = settings.get("continuing_subword_prefix") or "", settings.get("end_of_word_suffix") or ""

    def spells(token: str) -> bool:
        bare = token.removeprefix(prefix).removesuffix(suffix)
        return len(bare) <= 1 or (len(bare) == 2 and bare[0] in WORD_MARKS) or bool(BYTE.fullmatch(token))

    added = {entry["id"] for entry in backend["added_tokens"] if not SPARE.fullmatch(entry["content"])}
    return {i for token, i in tokenizer.get_vocab().items() if spells(token)} | added | special(tokenizer, backend)


def special(tokenizer: Any, backend: Backend) -> set[int]:
    """Ids of the tokens that a tokenizer itself puts into a text. Raises `ModelError` for one that it does not have."""
    vocabulary = tokenizer.get_vocab()
    placed = {holder[key] for holder, key in _processor_ids(backend["post_processor"])}
    if strange := sorted(placed - set(vocabulary.values())):
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} puts token {strange[0]} into texts, but does not have it",
            "its tokenizer.json is damaged; copy or download it again",
        )
    names = {*tokenizer.all_special_tokens, unknown_token(backend)}
    return placed | {vocabulary[token] for token in names if token in vocabulary}


def dropped_tokens(tokenizer: Any, backend: Backend, keep: Collection[int]) -> list[str]:
    """The special tokens that are not in `keep`."""
    return [tokenizer.convert_ids_to_tokens(i) for i in sorted(special(tokenizer, backend) - set(keep))]


def unknown_token(backend: Backend) -> str | None:
    """The token that stands for what is not in the vocabulary, if there is one."""
    settings = backend["model"]
    if settings["type"] == "Unigram":
        return None if settings["unk_id"] is None else settings["vocab"][settings["unk_id"]][0]
    unknown: str | None = settings["unk_token"]
    return unknown


def numbers(model: Model, backend: Backend, keep: Collection[int]) -> dict[int, int]:
    """The new id of each kept one, in their order."""
    known = set(model.tokenizer.get_vocab().values())
    embeddings = embedding_rows(model.net)
    named = {holder[key] for holder, key in config_ids(model.net.config)} & set(range(embeddings.num_embeddings))
    pad = _fixed_padding(model.net)
    found = {*keep, *named, *range(pad + 1)}
    found |= _reach(model.tokenizer, backend, found)
    beyond = sorted({*found - known, *(i for i in found if i >= embeddings.num_embeddings)})
    if beyond:
        raise ModelError(
            f"token {beyond[0]} of {model.source} is not both in its tokenizer ({len(known):,} tokens) and "
            f"in its word embeddings ({embeddings.num_embeddings:,} rows)",
            "tokenizer and weights do not belong together, or config.json names a token outside the vocabulary",
        )
    return {old: rank for rank, old in enumerate(sorted(found))}


def _fixed_padding(net: Any) -> int:
    """The padding id if the network counts positions from it, as RoBERTa does; else -1."""
    found = [getattr(module, "padding_idx", None) for name, module in net.named_modules() if "position" in name]
    return max((pad for pad in found if pad is not None), default=-1)


def _reach(tokenizer: Any, backend: Backend, keep: Collection[int]) -> set[int]:
    """Ids of what is needed so that the kept tokens are reached, and at the same price as before."""
    settings, vocabulary = backend["model"], tokenizer.get_vocab()
    tokens: set[str] = set()
    if settings.get("byte_fallback"):
        tokens |= {token for token in vocabulary if BYTE.fullmatch(token)}
    if settings["type"] == "BPE":
        names = {i: token for token, i in settings["vocab"].items()}
        tokens |= _parts(settings, [names[i] for i in keep if i in names])
    if settings["type"] == "Unigram":
        tokens.add(min(settings["vocab"], key=lambda piece: piece[1])[0])
    return {vocabulary[token] for token in tokens}


def _parts(settings: Mapping[str, Any], tokens: Iterable[str]) -> set[str]:
    """All pieces of one character, and what the given tokens of a BPE are joined from, themselves included."""
    prefix, suffix = settings["continuing_subword_prefix"] or "", settings["end_of_word_suffix"] or ""
    ranks = {(first, second): rank for rank, (first, second) in enumerate(settings["merges"])}
    found = {token for token in settings["vocab"] if len(_symbols(token, prefix, suffix)) == 1}
    for token in tokens:
        symbols = _symbols(token, prefix, suffix)
        parts = set(symbols)
        while pairs := [(ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks]:
            _, i = min(pairs)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1][len(prefix) :]]
            parts.add(symbols[i])
        found |= parts if symbols == [token] else {token}  # tokens of bytes and added ones are not joined from anything
    return found


def _symbols(token: str, prefix: str, suffix: str) -> list[str]:
    """What a BPE begins with when it makes this token: its characters with the marks of their places in the word."""
    begin = prefix if token.startswith(prefix) else ""
    end = suffix if token.endswith(suffix) else ""
    chars = token[len(begin) : len(token) - len(end)]
    symbols = [(prefix if i else begin) + char for i, char in enumerate(chars)]
    return [*symbols[:-1], symbols[-1] + end] if symbols else [token]


def rewritten(backend: Backend, new: Mapping[int, int]) -> Backend:
    """The tokenizer's JSON with the tokens of `new` only, by their new ids."""
    result = deepcopy(backend)
    settings = result["model"]
    if settings["type"] == "Unigram":
        settings["vocab"] = [piece for i, piece in enumerate(settings["vocab"]) if i in new]
        settings["unk_id"] = None if settings["unk_id"] is None else new[settings["unk_id"]]
    else:
        kept = sorted((new[i], token) for token, i in settings["vocab"].items() if i in new)
        settings["vocab"] = {token: i for i, token in kept}
    if settings["type"] == "BPE":
        settings["merges"] = _merges(settings)
    result["added_tokens"] = [
        {**entry, "id": new[entry["id"]]} for entry in backend["added_tokens"] if entry["id"] in new
    ]
    for holder, key in _processor_ids(result["post_processor"]):
        holder[key] = new[holder[key]]
    return result | {"padding": None, "truncation": None}  # what the last call left there


def _merges(settings: Mapping[str, Any]) -> list[list[str]]:
    """The merges of a BPE whose parts and result are in its vocabulary."""
    vocabulary, n_mark = settings["vocab"], len(settings["continuing_subword_prefix"] or "")
    return [
        [first, second]
        for first, second in settings["merges"]
        if first in vocabulary and second in vocabulary and first + second[n_mark:] in vocabulary
    ]


def _processor_ids(processor: Any) -> Iterator[tuple[Any, Any]]:
    """Where ids of tokens stand in a post-processor: (container, key) of each."""
    kind = processor["type"] if processor else None
    if kind == "Sequence":
        yield from chain.from_iterable(map(_processor_ids, processor["processors"]))
    elif kind == "TemplateProcessing":
        for entry in processor["special_tokens"].values():
            yield from ((entry["ids"], i) for i in range(len(entry["ids"])))
    elif kind in ("BertProcessing", "RobertaProcessing"):
        yield from ((processor[name], 1) for name in ("sep", "cls"))


def embedding_rows(net: Any) -> nn.Embedding:
    """The word embeddings. Raises `ModelError` for networks that have them in another form."""
    found = net.get_input_embeddings()
    if not isinstance(found, nn.Embedding):
        raise ModelError(
            f"the vocabulary of a {net.config.model_type} model cannot be reduced: "
            f"its word embeddings are {type(found).__name__}, not one matrix"
        )
    return found


def sections(config: Any) -> Iterator[dict[str, Any]]:
    """The settings of a configuration and of those in it."""
    settings = config if isinstance(config, dict) else vars(config)
    yield settings
    for name, value in settings.items():
        if name not in ("id2label", "label2id") and (isinstance(value, dict) or hasattr(value, "to_dict")):
            yield from sections(value)


def config_ids(config: Any) -> Iterator[tuple[Any, Any]]:
    """Where ids of tokens stand in a configuration: (container, key) of each, also in lists."""

    def within(holder: Any, key: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(holder[key], list):
            yield from chain.from_iterable(within(holder[key], i) for i in range(len(holder[key])))
        elif type(holder[key]) is int:
            yield holder, key

    for section in sections(config):
        for name in section:
            if isinstance(name, str) and name.endswith(("_token_id", "_token_ids")):
                yield from within(section, name)
