"""A vocabulary of only the tokens that a task needs: the rewritten tokenizer, and the model with fewer embeddings.

Kept tokens are renumbered in their old order, and a text whose tokens are all kept is cut as before, because a smaller
vocabulary only takes candidates away that did not win. What a kept token needs to be reached is kept with it:

WordPiece   takes the longest piece that fits: nothing.
BPE         joins pairs: the parts that a token is joined from, and every piece of one character, where it begins.
Unigram     takes the best sum of scores: the piece of the lowest score, from which the price of the unknown is made.
WordLevel   looks words up: nothing.

Letters: V tokens of the whole vocabulary, K kept tokens, E size of an embedding.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from torch import nn

from capcli import files, models
from capcli.errors import FileError, ModelError
from capcli.tasks import Split

KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
MAX_FILE_BYTES = 64_000_000
CHUNK_TEXTS = 2000
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPARE = re.compile(r"[\[<]\|?_?(unused|reserved)\w*?\d+\|?[\]>]")  # what a vocabulary keeps free for later use
WORD_MARKS = ("▁", "Ġ")
WHEN = ("before", "after")

Backend = dict[str, Any]  # the JSON of a fast tokenizer, as in tokenizer.json


# Which tokens to keep ------------------------------------------------------------------------------------------------


def needed(tokenizer: Any, splits: Iterable[Split]) -> set[int]:
    """Ids of the tokens that the texts of these splits produce, read in a stream, and of those that spell the rest.

    Those are special and added tokens (none of the kind [unused7]), every piece of one character with and without the
    mark of a word's begin or continuation, and the tokens of single bytes.

    Raises `ModelError` for a tokenizer that cannot be reduced, `DataError` for a text that is none.
    """
    found = _spelling(tokenizer, _backend(tokenizer))
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
    backend, vocabulary = _backend(tokenizer), tokenizer.get_vocab()
    tokens = _lines(path)
    strange = [token for token in tokens if token not in vocabulary]
    if strange:
        raise FileError(
            f"{path} has {_count(strange, 'token')} that the tokenizer does not have: {_some(strange)}",
            "one token per line, written as in vocab.txt or tokenizer.json, with marks such as ## or ▁, without scores",
        )
    found = {vocabulary[token] for token in tokens}
    dropped = _dropped(tokenizer, backend, found)
    if dropped:
        raise FileError(
            f"the vocabulary in {path} drops {_some(dropped)}, which the model needs",
            f"add {_count(dropped, 'line')} for {_some(dropped)}",
        )
    return found


def _lines(path: Path) -> list[str]:
    """The lines of a text file, each once; only line feeds end them, because tokens may be other line separators."""
    try:
        text = files.read_bytes(path, MAX_FILE_BYTES, "a vocabulary").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"cannot read the vocabulary {path}: it is not UTF-8") from error
    found = list(dict.fromkeys(line.removesuffix("\r") for line in text.split("\n")))
    found = [line for line in found if line]
    if not found:
        raise FileError(f"the vocabulary {path} is empty", "one token per line, as in vocab.txt")
    return found


def _some(tokens: Sequence[str]) -> str:
    """The first three of some strings of a user, safe to show."""
    shown = [repr(token if len(token) <= 40 else token[:40] + "…") for token in tokens[:3]]
    return ", ".join(shown) + (", …" if len(tokens) > 3 else "")


def _count(things: Collection[Any], name: str) -> str:
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"


def _backend(tokenizer: Any) -> Backend:
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
            f"the vocabulary of {name} cannot be reduced: it is of kind {kind}", f"known kinds: {', '.join(KINDS)}"
        )
    return backend


def _spelling(tokenizer: Any, backend: Backend) -> set[int]:
    """Ids of special and added tokens, and of those with which any word can be spelled."""
    settings = backend["model"]
    prefix, suffix = settings.get("continuing_subword_prefix") or "", settings.get("end_of_word_suffix") or ""

    def spells(token: str) -> bool:
        bare = token.removeprefix(prefix).removesuffix(suffix)
        return len(bare) <= 1 or (len(bare) == 2 and bare[0] in WORD_MARKS) or bool(BYTE.fullmatch(token))

    added = {entry["id"] for entry in backend["added_tokens"] if not SPARE.fullmatch(entry["content"])}
    return {i for token, i in tokenizer.get_vocab().items() if spells(token)} | added | _special(tokenizer, backend)


def _special(tokenizer: Any, backend: Backend) -> set[int]:
    """Ids of the tokens that a tokenizer itself puts into a text. Raises `ModelError` for one that it does not have."""
    vocabulary = tokenizer.get_vocab()
    placed = {holder[key] for holder, key in _processor_ids(backend["post_processor"])}
    placed |= {backend["padding"]["pad_id"]} if backend["padding"] else set()
    if strange := sorted(placed - set(vocabulary.values())):
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} puts token {strange[0]} into texts, but does not have it",
            "its tokenizer.json is damaged; copy or download it again",
        )
    names = {*tokenizer.all_special_tokens, _unknown(backend)}
    return placed | {vocabulary[token] for token in names if token in vocabulary}


def _dropped(tokenizer: Any, backend: Backend, keep: Collection[int]) -> list[str]:
    """The special tokens that are not in `keep`."""
    return [tokenizer.convert_ids_to_tokens(i) for i in sorted(_special(tokenizer, backend) - set(keep))]


def _unknown(backend: Backend) -> str | None:
    """The token that stands for what is not in the vocabulary, if there is one."""
    settings = backend["model"]
    if settings["type"] == "Unigram":
        return None if settings["unk_id"] is None else settings["vocab"][settings["unk_id"]][0]
    unknown: str | None = settings["unk_token"]
    return unknown


# The reduced model ---------------------------------------------------------------------------------------------------


def reduced(model: models.Model, keep: Collection[int]) -> models.Model:
    """A new model with the tokens `keep` only, and with those that they and the model need; `model` is untouched.

    Tokenizer, word embeddings [V, E] → [K, E] and token ids in the configuration are renumbered in the old order; all
    other tensors are copied as they are. Needed are: what reaches a token (see above), the ids that the configuration
    names, and, where positions count from the padding id, all ids below it, so that it stays.

    Raises `ModelError` when special tokens are dropped, or for a model or tokenizer that cannot be reduced.
    """
    tokenizer = model.tokenizer
    backend = _backend(tokenizer)
    dropped = _dropped(tokenizer, backend, keep)
    if dropped:
        raise ModelError(f"the vocabulary drops {_some(dropped)}, which the model needs", "keep the special tokens")
    new = _numbers(model, backend, keep)
    if len(new) <= len(_special(tokenizer, backend)):
        raise ModelError("the vocabulary has no tokens but special ones", "add the tokens that texts are made of")
    written = _rewritten(backend, new)
    small = models.rewritten(tokenizer, written)
    _check_opened(small, written, {token: new[i] for token, i in tokenizer.get_vocab().items() if i in new})
    return dataclasses.replace(model, net=_shrunk(model.net, new), tokenizer=small)


def _numbers(model: models.Model, backend: Backend, keep: Collection[int]) -> dict[int, int]:
    """The new id of each kept one, in their order."""
    known = set(model.tokenizer.get_vocab().values())
    embeddings = _embeddings(model.net)
    named = {holder[key] for holder, key in _config_ids(model.net.config)} & set(range(embeddings.num_embeddings))
    pad = _fixed_padding(model.net)
    found = {*keep, *named, *range(pad + 1)}
    found |= _reach(model.tokenizer, backend, found)
    beyond = sorted({*found - known, *(i for i in found if i >= embeddings.num_embeddings)})
    if beyond:
        raise ModelError(
            f"token {beyond[0]} of {model.source} is not both in its tokenizer ({len(known):,} tokens) and "
            f"in its word embeddings ({embeddings.num_embeddings:,} rows)",
            "tokenizer and weights do not belong together, or config.json names a token that is none",
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


def _rewritten(backend: Backend, new: Mapping[int, int]) -> Backend:
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
    if result["padding"]:
        result["padding"]["pad_id"] = new[result["padding"]["pad_id"]]
    return result


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


def _check_opened(tokenizer: Any, written: Backend, vocabulary: Mapping[str, int]) -> None:
    """The rewritten files must open as what was written: some classes add tokens, or expect one at a fixed id."""
    opened = _backend(tokenizer)
    parts = ("model", "post_processor", "pre_tokenizer", "normalizer")
    wrong = [part for part in parts if opened[part] != written[part]]
    wrong += ["added_tokens"] if tokenizer.get_vocab() != vocabulary else []
    if wrong:
        raise ModelError(
            f"the vocabulary of {type(tokenizer).__name__} cannot be reduced: "
            f"its class does not take {', '.join(wrong)} from tokenizer.json as written"
        )


def _embeddings(net: Any) -> nn.Embedding:
    """The word embeddings. Raises `ModelError` for networks that have them in another form."""
    found = net.get_input_embeddings()
    if not isinstance(found, nn.Embedding):
        raise ModelError(
            f"the vocabulary of a {net.config.model_type} model cannot be reduced: "
            f"its word embeddings are {type(found).__name__}, not one matrix"
        )
    return found


def _shrunk(net: Any, new: Mapping[int, int]) -> Any:
    """A copy of the network with the rows of `new` only, wherever the word embeddings are used, and its ids."""
    whole = _embeddings(net).weight
    weight = nn.Parameter(whole.detach()[sorted(new)].clone(), requires_grad=whole.requires_grad)
    small = deepcopy(net, {id(whole): weight})
    for module in small.modules():
        if getattr(module, "weight", None) is weight and isinstance(module, nn.Embedding):
            pad = module.padding_idx
            module.num_embeddings, module.padding_idx = len(new), None if pad is None else new.get(pad)
    for section in _sections(small.config):
        if section.get("vocab_size") == len(whole):
            section["vocab_size"] = len(new)
    for holder, key in list(_config_ids(small.config)):
        holder[key] = new.get(holder[key], holder[key])  # an id that was out of range stays so
    return small


def _sections(config: Any) -> Iterator[dict[str, Any]]:
    """The settings of a configuration and of those in it."""
    settings = config if isinstance(config, dict) else vars(config)
    yield settings
    for name, value in settings.items():
        if name not in ("id2label", "label2id") and (isinstance(value, dict) or hasattr(value, "to_dict")):
            yield from _sections(value)


def _config_ids(config: Any) -> Iterator[tuple[Any, Any]]:
    """Where ids of tokens stand in a configuration: (container, key) of each, also in lists."""

    def within(holder: Any, key: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(holder[key], list):
            yield from chain.from_iterable(within(holder[key], i) for i in range(len(holder[key])))
        elif type(holder[key]) is int:
            yield holder, key

    for section in _sections(config):
        for name in section:
            if isinstance(name, str) and name.endswith(("_token_id", "_token_ids")):
                yield from within(section, name)


# What it costs -------------------------------------------------------------------------------------------------------


def coverage(before: Any, after: Any, split: Split) -> dict[str, Any]:
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
    return {
        "texts": texts,
        "same_texts": same,
        "tokens_per_text": {when: n / max(texts, 1) for when, n in zip(WHEN, tokens, strict=True)},
        "unknown_rate": {when: n / max(total, 1) for when, n, total in zip(WHEN, strange, tokens, strict=True)},
    }


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
            f"the reduced vocabulary changes the tokens of {changed:,} of {total:,} texts, first {_some([first])}"
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
            f"first {_some(list(words))}",
            "add their tokens, or the pieces of one character; --vocab task finds what is needed",
        )


def _spans(text: str, tokenizer: Any, token: int) -> list[tuple[int, int]]:
    """Begin and end, in characters, of each place in the text that became this token."""
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [span for span, i in zip(coded["offset_mapping"], coded["input_ids"], strict=True) if i == token]


def _unknown_id(tokenizer: Any) -> int:
    """Id of the unknown token; one that no token has where there is none."""
    return int(tokenizer.get_vocab().get(_unknown(_backend(tokenizer)), -2))


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
        firsts = [" ".join(words) for words in texts] if split.kind == "tokens" else texts
        yield [*firsts, *(pairs or [])]
