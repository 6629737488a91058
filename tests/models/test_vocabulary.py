"""Vocabularies cut down to a task: every kind of tokenizer, made here, and every family of models."""

import copy
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import registry
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import FILLERS, WORDS, write_byte_tokenizer, write_tokenizer

from capcli.data import tables
from capcli.data.splits import Split
from capcli.errors import DataError, FileError, ModelError
from capcli.models import artifact, loading, predict, tokenizers, vocabulary
from capcli.models.model import Model
from capcli.models.stock import save_dense
from capcli.records.codec import to_json
from capcli.records.exported import BeforeAfter
from capcli.sources import checkpoint

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TEXTS = ["a good film", "dull, and long", "the actor was great", "bright and awful plots", "", "a good film"]
CORPUS = [
    *TEXTS,
    "Where does Zoë's café, near the river, open at 7.30 p.m.? 東京 is far",
    "¡día! £5 naïve 😀 the greatest actors were acting greatly in longer, brighter films",
]
NASTY = [
    "[/red]",
    "[link=http://x]y[/link]",
    "\x1b]0;title\x07",
    "\r\n::error::x",
    "<script>alert(1)</script>",
    "‮abc",
    "\x00",
    "[unused7]",
    "[UNK] <unk> <s></s> [CLS]",
    "x" * 5000,
    "　 ​﻿",
    "نص עברית ไทย 👩‍👩‍👧 e\u0301",
]
KINDS = ["words", "lookup", "bytes", "suffix", "prefix", "fallback", "pieces", "piece-bytes"]


def split_of(texts: Sequence[Any], pairs: Sequence[str] | None = None, kind: str = "classification") -> Split:
    columns = {"text": texts} if pairs is None else {"text": texts, "pair": pairs}
    labels: Any = np.zeros(len(texts), dtype=np.int64)
    if kind == "tokens":
        labels = np.empty(len(texts), dtype=object)
        labels[:] = [np.zeros(len(words), dtype=np.int64) for words in texts]
    table = tables.in_memory("made here", columns)
    return Split(name="train", table=table, columns=tuple(columns), labels=labels, kind=kind)


def joined_everywhere(backend: dict[str, Any]) -> dict[str, Any]:
    """A BPE with byte tokens and with a merge for every way to divide a token, as Llama's tokenizer.json has it."""
    settings = backend["model"]
    vocab = {token: i + 256 if i >= len(SPECIAL) else i for token, i in settings["vocab"].items()}
    vocab |= {f"<0x{byte:02X}>": len(SPECIAL) + byte for byte in range(256)}
    settings["merges"] = [
        [token[:i], token[i:]]
        for token in sorted(settings["vocab"], key=lambda token: settings["vocab"][token])
        if token not in SPECIAL
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    settings |= {"vocab": vocab, "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    return backend


def with_byte_pieces(backend: dict[str, Any]) -> dict[str, Any]:
    settings = backend["model"]
    settings["vocab"] += [[f"<0x{byte:02X}>", 0.0] for byte in range(256)]
    settings["byte_fallback"] = True
    return backend


def trained(kind: str) -> Any:
    """The backend of a tokenizer of this kind, trained on the corpus."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, trainers
    from tokenizers import models as kinds

    trainer: Any
    options: Any = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "words":
        backend = Tokenizer(kinds.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=220, **options)
    elif kind == "lookup":
        backend = Tokenizer(kinds.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(**options)
    elif kind == "bytes":
        backend = Tokenizer(kinds.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **options)
    elif kind == "suffix":
        backend = Tokenizer(kinds.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.BpeTrainer(vocab_size=220, end_of_word_suffix="</w>", **options)
    elif kind == "prefix":
        backend = Tokenizer(kinds.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.BpeTrainer(vocab_size=220, continuing_subword_prefix="##", **options)
    elif kind == "fallback":
        backend = Tokenizer(kinds.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        trainer = trainers.BpeTrainer(vocab_size=220, max_token_length=9, **options)
    else:
        backend = Tokenizer(kinds.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=160, unk_token="<unk>", **options)
    backend.train_from_iterator(CORPUS * 3, trainer)
    changed = {"fallback": joined_everywhere, "piece-bytes": with_byte_pieces}.get(kind)
    return Tokenizer.from_str(json.dumps(changed(json.loads(backend.to_str())))) if changed else backend


@functools.cache
def tokenizer_of(kind: str) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = trained(kind)
    around = [("<s>", 0), ("</s>", 2)]
    backend.post_processor = (
        processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        if kind == "bytes"
        else processors.Sequence(
            [processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=around)]
        )
    )
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=10_000,
        model_input_names=["input_ids", "attention_mask"],
        **dict(zip(names, SPECIAL, strict=True)),
    )


def model_of(tokenizer: Any, family: str = "bert", **changes: Any) -> Model:
    """A tiny random model for a tokenizer."""
    from transformers import AutoModelForSequenceClassification

    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0, "eos_token_id": 2}
    config = registry.config_of(family, len(tokenizer), num_labels=2, **{**ids, **changes})
    torch.manual_seed(0)
    net = AutoModelForSequenceClassification.from_config(config).eval()
    return Model(net=net, tokenizer=tokenizer, family=None, labels=("no", "yes"), kind="classification", source="tiny")


@functools.cache
def small_of(kind: str) -> tuple[Model, Model]:
    """A model of this kind and the same reduced to the texts."""
    model = model_of(tokenizer_of(kind))
    return model, vocabulary.reduced(model, vocabulary.needed(model.tokenizer, [split_of(TEXTS)]))


def pieces(tokenizer: Any, text: str) -> list[str]:
    found: list[str] = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    return found


def specials(tokenizer: Any) -> set[int]:
    return set(tokenizer.all_special_ids)


def logits(model: Model, texts: Sequence[str], pairs: Sequence[str] | None = None) -> torch.Tensor:
    inputs = model.tokenizer(list(texts), pairs and list(pairs), padding=True, return_tensors="pt")
    with torch.inference_mode():
        found: torch.Tensor = predict.forward(model, inputs)[0]
    return found


# The same texts, the same tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_kept_texts_have_the_same_tokens_and_the_same_logits(kind: str) -> None:
    model, small = small_of(kind)
    assert len(small.tokenizer) < len(model.tokenizer)
    for text in TEXTS:
        assert pieces(small.tokenizer, text) == pieces(model.tokenizer, text)
    assert torch.equal(logits(small, TEXTS), logits(model, TEXTS))
    assert torch.equal(logits(small, TEXTS, TEXTS[::-1]), logits(model, TEXTS, TEXTS[::-1]))
    vocabulary.check_same(model.tokenizer, small.tokenizer, [split_of(TEXTS, TEXTS[::-1])])
    vocabulary.check_known(model.tokenizer, small.tokenizer, [split_of(CORPUS)] if kind != "lookup" else [])


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_keep_their_order_and_their_embeddings(kind: str) -> None:
    model, small = small_of(kind)
    old, new = model.tokenizer.get_vocab(), small.tokenizer.get_vocab()
    tokens = sorted(new, key=lambda token: new[token])
    assert [new[token] for token in tokens] == list(range(len(small.tokenizer)))
    rows = [old[token] for token in tokens]
    assert rows == sorted(rows)
    whole, part = (m.net.get_input_embeddings() for m in (model, small))
    assert torch.equal(part.weight, whole.weight[rows])
    assert (part.num_embeddings, part.padding_idx) == (len(rows), new["<pad>"])
    assert small.net.config.vocab_size == len(rows)
    assert [new[token] for token in SPECIAL] == [old[token] for token in SPECIAL]  # they stand in front


@pytest.mark.parametrize("kind", KINDS)
def test_other_tensors_and_the_given_model_are_untouched(kind: str) -> None:
    model = model_of(copy.deepcopy(tokenizer_of(kind)))
    before = ({n: t.clone() for n, t in model.net.state_dict().items()}, model.net.config.to_dict())
    backend = model.tokenizer.backend_tokenizer.to_str()
    small = vocabulary.reduced(model, {*specials(model.tokenizer), 7})
    with torch.no_grad():
        for parameter in small.net.parameters():
            parameter.zero_()
    found = model.net.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in before[0].items())
    assert model.net.config.to_dict() == before[1]
    assert model.tokenizer.backend_tokenizer.to_str() == backend
    changed = [n for n, tensor in small.net.state_dict().items() if tensor.shape != before[0][n].shape]
    assert changed == ["bert.embeddings.word_embeddings.weight"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(
    st.lists(st.sampled_from([*CORPUS, *NASTY]).flatmap(lambda t: st.sampled_from(t.split(" "))), max_size=6),
    st.randoms(),
)
def test_a_text_whose_tokens_are_all_kept_is_cut_as_before(kind: str, words: list[str], rng: Any) -> None:
    model, text = model_of(tokenizer_of(kind)), " ".join(words)
    every = sorted(model.tokenizer.get_vocab().values())
    keep = {*specials(model.tokenizer), *model.tokenizer(text)["input_ids"], *rng.sample(every, 20)}
    small = vocabulary.reduced(model, keep)
    assert pieces(small.tokenizer, text) == pieces(model.tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(st.text(max_size=60))
@example("".join(NASTY))
def test_any_text_gives_known_ids(kind: str, text: str) -> None:
    _, small = small_of(kind)
    ids = small.tokenizer(text)["input_ids"]
    assert all(0 <= i < small.net.get_input_embeddings().num_embeddings for i in ids)
    assert ids[0] == small.tokenizer.bos_token_id and ids[-1] == small.tokenizer.eos_token_id


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lookup"])
@settings(max_examples=40)
@given(st.text(st.sampled_from(sorted(set("".join(CORPUS)))), max_size=40))
def test_what_the_whole_vocabulary_knows_can_be_spelled(kind: str, text: str) -> None:
    model, small = small_of(kind)
    vocabulary.check_known(model.tokenizer, small.tokenizer, [split_of([text or " ", "a"])])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts(kind: str, text: str) -> None:
    model = model_of(tokenizer_of(kind))
    split = split_of([text, "a"])
    small = vocabulary.reduced(model, vocabulary.needed(model.tokenizer, [split]))
    vocabulary.check_same(model.tokenizer, small.tokenizer, [split])


@pytest.mark.parametrize("kind", KINDS)
def test_reducing_again_changes_nothing(kind: str) -> None:
    _, once = small_of(kind)
    twice = vocabulary.reduced(once, vocabulary.needed(once.tokenizer, [split_of(TEXTS)]))
    assert twice.tokenizer.get_vocab() == once.tokenizer.get_vocab()
    assert twice.tokenizer.backend_tokenizer.to_str() == once.tokenizer.backend_tokenizer.to_str()
    found = twice.net.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in once.net.state_dict().items())
    assert twice.net.config.to_dict() == once.net.config.to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_changes_nothing(kind: str) -> None:
    model = model_of(tokenizer_of(kind))
    same = vocabulary.reduced(model, set(model.tokenizer.get_vocab().values()))
    assert same.tokenizer.backend_tokenizer.to_str() == model.tokenizer.backend_tokenizer.to_str()


def test_the_price_of_the_unknown_stays() -> None:
    """Unigram asks 10 less than its lowest score for an unknown character, whether or not that piece is ever used."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    scores = [("<unk>", 0.0), ("<pad>", 0.0), ("xc", -40.0), ("de", -40.0), ("cde", -1.0), ("zz", -100.0), ("q", -2.0)]
    backend = Tokenizer(kinds.Unigram(scores, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    assert pieces(tokenizer, "xcde") == ["xc", "de"]
    small = vocabulary.reduced(model_of(tokenizer, bos_token_id=None, eos_token_id=None), {0, 1, 2, 3, 4})
    assert "zz" in small.tokenizer.get_vocab() and "q" not in small.tokenizer.get_vocab()
    assert pieces(small.tokenizer, "xcde") == ["xc", "de"]


def test_only_the_parts_that_a_token_is_joined_from_are_kept() -> None:
    """Of several ways to join a token, as Llama's merges have them, the one that is taken counts."""
    from tokenizers import Tokenizer
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<pad>", "a", "b", "c", "ab", "bc", "abc", "abcabc"]
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("abc", "abc")]
    backend = Tokenizer(kinds.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    small = vocabulary.reduced(model_of(tokenizer, bos_token_id=None, eos_token_id=None), {0, 1, 8})
    assert sorted(small.tokenizer.get_vocab()) == sorted(set(tokens) - {"bc"})
    assert pieces(small.tokenizer, "abcabcab") == pieces(tokenizer, "abcabcab") == ["abcabc", "ab"]


# Which tokens are needed ---------------------------------------------------------------------------------------------


def test_texts_of_every_column_and_kind_are_read() -> None:
    tokenizer = tokenizer_of("lookup")

    def found(*arguments: Any) -> set[str]:
        none = vocabulary.needed(tokenizer, [])
        return set(tokenizer.convert_ids_to_tokens(vocabulary.needed(tokenizer, [split_of(*arguments)]) - none))

    assert found(["good film"]) == {"good", "film"}
    assert found(["good"], ["plots film"]) == {"good", "plots", "film"}
    assert found([["good", "the film"]], None, "tokens") == {"good", "the", "film"}
    splits = [split_of(["good"]), split_of(["film"])]
    assert vocabulary.needed(tokenizer, splits) == vocabulary.needed(tokenizer, [split_of(["good film"])])
    with pytest.raises(DataError, match="row 1 of column 'text'"):
        vocabulary.needed(tokenizer, [split_of(["good", None])])


def test_long_texts_are_read_to_their_end() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("lookup"))
    tokenizer.model_max_length = 4
    tokenizer("one call that cuts", truncation=True)
    keep = vocabulary.needed(tokenizer, [split_of(["the actor was great and bright"])])
    assert tokenizer.get_vocab()["bright"] in keep


def test_words_are_spelled_with_single_pieces_bytes_and_special_tokens() -> None:
    keeps = {
        kind: tokenizer_of(kind).convert_ids_to_tokens(sorted(vocabulary.needed(tokenizer_of(kind), [])))
        for kind in KINDS
    }
    assert all(set(SPECIAL) <= set(tokens) for tokens in keeps.values())
    assert {"a", "##a", "東"} <= set(keeps["words"]) and "good" not in keeps["words"]
    assert {"a", "##a"} <= set(keeps["prefix"]) and {"a", "a</w>"} <= set(keeps["suffix"])
    assert {"a", "Ġ", "Ã"} <= set(keeps["bytes"]) and len(keeps["bytes"]) >= 256
    assert {"<0x00>", "<0xFF>"} <= set(keeps["fallback"]) & set(keeps["piece-bytes"])
    assert {"▁", "a"} <= set(keeps["pieces"])


def test_tokens_kept_free_for_later_are_dropped() -> None:
    from transformers import PreTrainedTokenizerFast

    backend = copy.deepcopy(tokenizer_of("words").backend_tokenizer)
    spare = ["[unused0]", "<unused12>", "<|reserved_special_token_3|>", "<|unused_1|>"]
    backend.add_tokens([*spare, "<image>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{"pad_token": "<pad>", "unk_token": "<unk>"})
    kept = set(tokenizer.convert_ids_to_tokens(list(vocabulary.needed(tokenizer, []))))
    assert "<image>" in kept and not kept & set(spare)
    used = vocabulary.needed(tokenizer, [split_of(["a [unused0] film"])])
    assert tokenizer.get_vocab()["[unused0]"] in used
    model = model_of(tokenizer)
    small = vocabulary.reduced(model, vocabulary.needed(tokenizer, [split_of(TEXTS)]))
    assert pieces(small.tokenizer, "a <image> film") == pieces(tokenizer, "a <image> film")
    assert small.tokenizer.get_vocab()["<image>"] == len(small.tokenizer) - 1
    assert not set(spare) & set(small.tokenizer.get_vocab())


# Ids in the configuration --------------------------------------------------------------------------------------------


def test_ids_in_the_configuration_follow_their_tokens() -> None:
    tokenizer = tokenizer_of("words")
    old = tokenizer.get_vocab()
    model = model_of(tokenizer)
    config = model.net.config
    config.eos_token_id = [old["film"], 2]
    config.forced_token_ids = [[1, old["great"]]]
    config.decoder_start_token_id = 10_000  # names no token, and did not before
    config.task_specific_params = {"reading": {"bos_token_id": old["actor"], "vocab_size": len(old)}}
    config.label2id = {"a_token_id": 1, "b": 0}
    config.sep_token_id = None
    small = vocabulary.reduced(model, specials(tokenizer))
    new = small.tokenizer.get_vocab()
    found = small.net.config
    assert found.eos_token_id == [new["film"], 2]
    assert found.forced_token_ids == [[1, new["great"]]]
    assert found.decoder_start_token_id == 10_000 and found.sep_token_id is None
    assert found.task_specific_params == {"reading": {"bos_token_id": new["actor"], "vocab_size": len(new)}}
    assert found.label2id == {"a_token_id": 1, "b": 0}
    assert config.eos_token_id == [old["film"], 2]


def test_a_padding_id_that_positions_count_from_stays() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("bytes"))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(40)
    model = model_of(tokenizer, "roberta", pad_token_id=40, max_position_embeddings=120)
    small = vocabulary.reduced(model, vocabulary.needed(tokenizer, [split_of(TEXTS)]))
    assert small.tokenizer.pad_token_id == small.net.config.pad_token_id == 40
    assert torch.equal(logits(small, TEXTS), logits(model, TEXTS))


def test_rows_without_a_token_are_dropped() -> None:
    model = model_of(tokenizer_of("words"), vocab_size=512)
    keep = set(model.tokenizer.get_vocab().values())
    small = vocabulary.reduced(model, keep)
    assert small.net.get_input_embeddings().num_embeddings == len(keep)


def test_what_the_last_call_left_in_the_tokenizer_is_not_taken_over() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("words"))
    place = tokenizer.get_vocab()["film"]
    tokenizer.pad_token = "film"
    tokenizer.backend_tokenizer.enable_padding(pad_id=place, pad_token="film", length=8)
    small = vocabulary.reduced(model_of(tokenizer, pad_token_id=place), {*specials(tokenizer), 7}).tokenizer
    assert small.pad_token_id == small.get_vocab()["film"] != place
    assert small.backend_tokenizer.padding is None


# Families and files --------------------------------------------------------------------------------------------------

STYLES: dict[str, Callable[[Path], int]] = {
    "words": write_tokenizer,
    "bytes": functools.partial(write_byte_tokenizer, padding=True),
    "decoder": functools.partial(write_byte_tokenizer, padding=False),
}
FEW = [" ".join(FILLERS[:5]), f"{WORDS['negative'][0]} film", "the actors", "the"]


@pytest.mark.parametrize("family", registry.ROWS)
def test_every_family_through_an_artefact_and_a_stock_folder(family: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    registry.write(family, tmp_path / "dense", STYLES)
    model = loading.load_dense(str(tmp_path / "dense"), ("no", "yes"), "classification", 0)
    small = vocabulary.reduced(model, vocabulary.needed(model.tokenizer, [split_of(FEW)]))
    assert len(small.tokenizer) < len(model.tokenizer)
    assert torch.equal(logits(small, FEW), logits(model, FEW))
    artifact.save_artifact(small, tmp_path / "out", sorted(model.prunable())[:1], {})
    save_dense(small, tmp_path / "stock")
    again = artifact.load_artifact(tmp_path / "out")
    stock = loading.load_dense(str(tmp_path / "stock"), None, "classification", 0, need_head=True)
    for one in (again, stock):
        assert torch.equal(logits(one, FEW), logits(model, FEW))
        assert one.net.config.vocab_size == len(one.tokenizer) == len(small.tokenizer)
    for folder in ("out", "stock"):
        plain = AutoTokenizer.from_pretrained(tmp_path / folder)
        assert [pieces(plain, text) for text in FEW] == [pieces(model.tokenizer, text) for text in FEW]


def test_no_file_of_the_old_vocabulary_is_carried_over(tmp_path: Path) -> None:
    registry.write("bert", tmp_path / "dense", STYLES)
    words = json.loads((tmp_path / "dense" / "tokenizer.json").read_text())["model"]["vocab"]
    for name in set(checkpoint.TOKENIZER_FILES) - {"tokenizer.json", "tokenizer_config.json"}:
        text = {"vocab.txt": "\n".join(words), "chat_template.jinja": "{{ messages }}"}
        (tmp_path / "dense" / name).write_text(text.get(name, "{}"))
    model = loading.load_dense(str(tmp_path / "dense"), ("no", "yes"), "classification", 0)
    small = vocabulary.reduced(model, vocabulary.needed(model.tokenizer, [split_of(FEW)]))
    tokenizers.save_tokenizer(small.tokenizer, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert str(tmp_path) not in (tmp_path / "out" / "tokenizer_config.json").read_text()


CLASSES = {
    "BertTokenizer": "words",
    "RobertaTokenizer": "bytes",
    "XLMRobertaTokenizer": "pieces",
    "DebertaV2Tokenizer": "pieces",
    "CamembertTokenizer": "pieces",
    "T5Tokenizer": "pieces",
    "LlamaTokenizer": "fallback",
    "GPT2Tokenizer": "bytes",
    "AlbertTokenizer": "pieces",
}


@pytest.mark.parametrize("name", CLASSES)
def test_tokenizers_of_own_classes(name: str, tmp_path: Path) -> None:
    """Such a class builds the backend from the vocabulary by rules of its own, and may put tokens at fixed ids."""
    import transformers

    kind = CLASSES[name]
    vocab = json.loads(tokenizer_of(kind).backend_tokenizer.to_str())["model"]
    settings = {"vocab": [tuple(p) for p in vocab["vocab"]] if kind == "pieces" else vocab["vocab"]}
    settings |= {"merges": [tuple(pair) for pair in vocab["merges"]]} if "merges" in vocab else {}
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}
    special |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"} if name != "T5Tokenizer" else {}
    extra = {"extra_ids": 0} if name == "T5Tokenizer" else {}
    tokenizer = getattr(transformers, name)(**settings, **special, **extra)
    model = model_of(tokenizer)
    small = vocabulary.reduced(model, vocabulary.needed(tokenizer, [split_of(TEXTS)]))
    tokenizers.save_tokenizer(small.tokenizer, tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer)
    for text in TEXTS:
        assert pieces(again, text) == pieces(small.tokenizer, text) == pieces(tokenizer, text)


# A vocabulary file ---------------------------------------------------------------------------------------------------


def written(path: Path, tokens: Sequence[str], end: str = "\n") -> Path:
    path.write_bytes(end.join(tokens).encode())
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_taken_as_it_is(kind: str, tmp_path: Path) -> None:
    model, small = small_of(kind)
    tokens = sorted(small.tokenizer.get_vocab())
    found = vocabulary.from_file(model.tokenizer, written(tmp_path / "vocab.txt", tokens))
    assert set(model.tokenizer.convert_ids_to_tokens(found)) == set(tokens)
    again = vocabulary.reduced(model, found)
    assert again.tokenizer.get_vocab() == small.tokenizer.get_vocab()


@pytest.mark.parametrize(("begin", "end"), [("", "\r\n"), ("\ufeff", "\n"), ("\n\n", "\n\n"), ("<pad>\n<pad>\n", "\n")])
def test_line_ends_marks_and_repetitions(begin: str, end: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("words")
    path = tmp_path / "vocab.txt"
    path.write_bytes((begin + end.join([*SPECIAL, "film"]) + end).encode())
    assert tokenizer.convert_ids_to_tokens(sorted(vocabulary.from_file(tokenizer, path))) == [*SPECIAL, "film"]


def test_other_line_separators_are_part_of_tokens(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokens = ["<unk>", "<pad>", "\u2028", "\x85", "\x0b", "a"]
    backend = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    assert vocabulary.from_file(tokenizer, written(tmp_path / "v", tokens)) == set(range(6))


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises((FileError, ModelError)) as caught:
        action()
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message and "\x1b" not in caught.value.message
    return f"{caught.value.message} | {caught.value.hint}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n\n", "is empty"),
        (b"<s>\n\xff\xfe\n", "it is not UTF-8"),
        ("<s>\n".encode("utf-16"), "it is not UTF-8"),
        (
            b"film\nxyz1\n[/red]\n\x1b[2J\n\x00\nxyz1\n",
            "has 4 tokens that the tokenizer does not have: 'xyz1', '[/red]'",
        ),
        (b"x" * 100_000, "has 1 token that the tokenizer does not have: 'xxxx"),
        (b"film\t-3.2\n", "without scores"),
        (b"<s>\n</s>\n<unk>\n<mask>\nfilm", "drops '<pad>', which the model needs | add 1 line for '<pad>'"),
        (b"film", "drops '<s>', '<pad>', '</s>' and 2 more, which the model needs | add 5 lines"),
    ],
)
def test_files_that_are_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    message = refused(lambda: vocabulary.from_file(tokenizer_of("words"), path))
    assert expected in message and str(path) in message
    assert len(message) < 400 + len(str(path))


def test_paths_that_are_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> str:
        return refused(lambda: vocabulary.from_file(tokenizer_of("words"), path))

    assert "does not exist" in read(tmp_path / "nothing")
    assert "is not a file" in read(tmp_path)
    assert "is not a file" in read(Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    assert "is not a file" in read(tmp_path / "pipe")
    monkeypatch.setattr(vocabulary, "MAX_FILE_BYTES", 10)
    assert "larger than 10 bytes" in read(written(tmp_path / "big", ["film"] * 10))


def test_what_a_file_of_a_bpe_leaves_out_is_added(tmp_path: Path) -> None:
    model = model_of(tokenizer_of("bytes"))
    keep = vocabulary.from_file(model.tokenizer, written(tmp_path / "v", [*SPECIAL, "Ġfilm"]))
    assert len(keep) == 6
    small = vocabulary.reduced(model, keep)
    assert pieces(small.tokenizer, "a film") == ["<s>", "a", "Ġfilm", "</s>"]
    assert len(small.tokenizer) < len(SPECIAL) + 256 + 6


# What it costs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["words", "lookup", "pieces"])  # a BPE keeps every piece of one character
def test_a_vocabulary_that_drops_needed_tokens_is_refused(kind: str) -> None:
    model = model_of(tokenizer_of(kind))
    tokenizer = model.tokenizer
    keep = {*specials(tokenizer), *tokenizer("a film")["input_ids"]}
    small = vocabulary.reduced(model, keep)
    vocabulary.check_known(tokenizer, small.tokenizer, [split_of(["a film", "film a"])])
    split = split_of(["a film", "a great film", "bright, great", "☃ film"])
    message = refused(lambda: vocabulary.check_known(tokenizer, small.tokenizer, [split], "the vocabulary in v.txt"))
    assert message.startswith("the vocabulary in v.txt drops what 2 of 4 texts need: ")
    assert "great" in message and "☃" not in message
    message = refused(lambda: vocabulary.check_same(tokenizer, small.tokenizer, [split]))
    n = 3 if kind == "pieces" else 2  # ☃ is unknown together with the mark before it, which is not kept
    assert f"changes the tokens of {n} of 4 texts, first 'a great film'" in message


def test_coverage_of_held_out_texts() -> None:
    model = model_of(tokenizer_of("lookup"))
    small = vocabulary.reduced(model, {*specials(model.tokenizer), *model.tokenizer("a good film")["input_ids"]})
    split = split_of(["a good film", "a great film ☃", "long"], ["a", "☃", "film"])
    assert to_json(vocabulary.coverage(model.tokenizer, small.tokenizer, split)) == {
        "kept": None,
        "of": None,
        "split": None,
        "texts": 6,
        "same_texts": 4,
        "tokens_per_text": {"before": 11 / 6, "after": 11 / 6},
        "unknown_rate": {"before": 2 / 11, "after": 4 / 11},
    }
    pieced, spelled = small_of("words")
    found = vocabulary.coverage(pieced.tokenizer, spelled.tokenizer, split_of(["acting greatly"]))
    assert (found.tokens_per_text.after or 0) > (found.tokens_per_text.before or 0)
    assert found.unknown_rate == BeforeAfter(before=0.0, after=0.0)
    nothing = vocabulary.coverage(model.tokenizer, small.tokenizer, split_of([]))
    assert nothing.texts == 0 and nothing.unknown_rate == BeforeAfter(before=0.0, after=0.0)


# What cannot be reduced ----------------------------------------------------------------------------------------------


def test_special_tokens_must_be_kept() -> None:
    model = model_of(tokenizer_of("pieces"))
    message = refused(lambda: vocabulary.reduced(model, specials(model.tokenizer) - {3}))
    assert message.startswith("the vocabulary drops '<unk>', which the model needs")
    words = model_of(tokenizer_of("words"))
    message = refused(lambda: vocabulary.reduced(words, specials(words.tokenizer)))
    assert message.startswith("the vocabulary contains only special tokens")


def changed(tokenizer: Any, **parts: Any) -> Any:
    """The tokenizer with another JSON of the backend."""

    class Backend:
        def to_str(self) -> str:
            backend = json.loads(tokenizer.backend_tokenizer.to_str())
            return json.dumps(backend | parts)

    class Changed:
        is_fast, all_special_tokens = True, tokenizer.all_special_tokens
        backend_tokenizer = Backend()
        get_vocab, save_pretrained = tokenizer.get_vocab, tokenizer.save_pretrained

    return Changed()


def test_tokenizers_that_cannot_be_reduced() -> None:
    tokenizer = tokenizer_of("words")
    slow = dataclasses.make_dataclass("SlowTokenizer", ["is_fast"])(False)
    assert "the vocabulary of SlowTokenizer cannot be reduced: it has no" in refused(
        lambda: vocabulary.needed(slow, [])
    )
    other = changed(tokenizer, model={"type": "Morphemes"})
    assert "it is of kind Morphemes" in refused(lambda: vocabulary.needed(other, []))

    class Custom:
        is_fast = True

        @property
        def backend_tokenizer(self) -> Any:
            raise ValueError("Custom PreTokenizer cannot be serialized")

    assert "Custom PreTokenizer cannot" in refused(lambda: vocabulary.needed(Custom(), []))
    wrong = changed(tokenizer, post_processor={"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 9999]})
    assert "puts token 9999 into texts" in refused(lambda: vocabulary.needed(wrong, []))
    renumbered = {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "@@"}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    written = {**backend, "model": renumbered}
    message = refused(lambda: vocabulary.check_opened(tokenizer, written, {"a": 0}))
    assert "its class does not take model, added_tokens from tokenizer.json as written" in message


def test_models_that_do_not_fit_their_tokenizer() -> None:
    tokenizer = tokenizer_of("words")
    model = model_of(tokenizer, vocab_size=20)
    message = refused(lambda: vocabulary.reduced(model, vocabulary.needed(tokenizer, [])))
    assert "token 20 of tiny is not both in its tokenizer" in message and "(20 rows)" in message
    model = model_of(tokenizer, vocab_size=512)
    model.net.config.eos_token_id = 500
    assert "token 500 of tiny" in refused(lambda: vocabulary.reduced(model, specials(tokenizer)))


def test_word_embeddings_in_another_form() -> None:
    model = model_of(tokenizer_of("words"))
    model.net.set_input_embeddings(torch.nn.Linear(3, 3))
    message = refused(lambda: vocabulary.reduced(model, specials(model.tokenizer)))
    assert "word embeddings of" not in message and "its word embeddings are Linear, not one matrix" in message
