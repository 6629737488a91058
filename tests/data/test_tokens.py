"""Tokens of every kind of task, windows, the cache of tokens, and batches. The tokenizers are small and made here."""

import copy
import dataclasses
import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import write_byte_tokenizer

from capcli import files
from capcli.data import cache as disk
from capcli.data import tables, tokens
from capcli.data.batches import Examples, collate, evaluation_batches, training_order
from capcli.data.labels import Answers
from capcli.data.splits import Split
from capcli.errors import DataError, FileError, Stopped

CPU = torch.device("cpu")
TEXTS = ["a good film", "dull, and long", "bright", "an awful plot", "the actor was great", "bad"]
LONG = "a film that is long " * 30


def split_of(columns: dict[str, Sequence[Any]], labels: Any, kind: str = "classification", name: str = "train") -> Any:
    table = tables.in_memory("made here", columns)
    return Split(name=name, table=table, columns=tuple(columns), labels=labels, kind=kind)


def objects(values: Sequence[Any]) -> Any:
    found = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        found[i] = value
    return found


def coded(tokenizer: Any, texts: list[str], pairs: list[str] | None = None, length: int = 32) -> Examples:
    columns = {"text": texts} if pairs is None else {"text": texts, "pair": pairs}
    return tokens.encode(split_of(columns, np.arange(len(texts))), tokenizer, length, chunk=3)


def corpus() -> Iterator[str]:
    yield from [
        *TEXTS,
        LONG,
        "Where does Zoë's café, near the river, open at 7.30 p.m.? 東京 is far",
        "¡día! £5 naïve 😀",
    ] * 3


def trained(kind: str) -> Any:
    """A fast tokenizer whose tokens stand in the text in another way than word pieces do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer: Any
    if kind == "byte-level":  # as RoBERTa
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    else:  # as XLM-R and DeBERTa
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>")
    backend.train_from_iterator(corpus(), trainer)
    backend.post_processor = (
        processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False)
        if kind == "byte-level"
        else processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>"}
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, sep_token="</s>", model_input_names=inputs, **names)


@pytest.fixture(scope="session")
def all_tokenizers(tokenizer: Any) -> dict[str, Any]:
    return {"word-pieces": tokenizer, "byte-level": trained("byte-level"), "metaspace": trained("metaspace")}


KINDS = ("word-pieces", "byte-level", "metaspace")


# Sentences -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paired", [False, True])
def test_tokens_are_those_of_the_tokenizer(tokenizer: Any, paired: bool) -> None:
    texts = [*TEXTS, "", LONG]
    pairs = [*TEXTS[::-1], LONG, "short"] if paired else None
    examples = coded(tokenizer, texts, pairs)
    assert len(examples) == 8
    for i in range(8):
        own = tokenizer(texts[i], pairs[i] if pairs else None, truncation=True, max_length=32)
        window = slice(examples.offsets[i], examples.offsets[i + 1])
        assert examples.tokens[window].tolist() == own["input_ids"]
        assert examples.types is not None
        assert examples.types[window].tolist() == own["token_type_ids"]
    assert examples.lengths.max() == 32
    for i, text in enumerate(TEXTS[:6]):  # and back again
        ids = examples.tokens[examples.offsets[i] : examples.offsets[i + 1]]
        spelled = tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",")
        assert spelled == (text if not paired else f"{text} {TEXTS[5 - i]}")


@pytest.mark.parametrize("paired", [False, True])
def test_what_is_cut_is_counted_and_what_just_fits_is_not(tokenizer: Any, paired: bool) -> None:
    n_special = tokenizer.num_special_tokens_to_add(pair=paired)
    words = 16 - n_special - (3 if paired else 0)
    texts = ["film " * (words + extra) for extra in (0, 1, -1, 40)]
    examples = coded(tokenizer, texts, ["the old plot"] * 4 if paired else None, length=16)
    assert examples.lengths.tolist() == [16, 16, 15, 16]
    assert examples.n_cut == 2


def test_truncated_ends_are_said_with_their_number(tokenizer: Any) -> None:
    examples = coded(tokenizer, ["film " * n for n in (14, 15, 40)], length=16)
    expected = "longer than 16 tokens, so their ends were truncated: 2 of 3 texts of train"
    assert tokens.doubts(examples, "train") == (expected,)
    assert tokens.doubts(coded(tokenizer, ["film " * 14], length=16), "train") == ()


def test_the_share_of_unknown_tokens_leaves_special_ones_out(tokenizer: Any) -> None:
    examples = coded(tokenizer, ["☃ good film ☃", "good"])  # [CLS] and [SEP] twice, five others
    assert examples.unknown == 2 / 5
    (note,) = tokens.doubts(examples, "validation")
    assert note.startswith("unknown to the tokenizer: 40.00 % of the tokens of validation; ")
    few = coded(tokenizer, ["good film " * 10, "☃"])
    assert few.unknown == 1 / 21 and tokens.doubts(few, "train") == ()  # below 5 %


def test_a_token_that_also_ends_a_text_is_not_unknown(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.unk_token = other.eos_token = other.pad_token  # as GPT-2 has it
    assert coded(other, ["☃ ☃"]).unknown == 0.0


def test_tokens_take_two_bytes_when_the_vocabulary_fits(tokenizer: Any) -> None:
    assert coded(tokenizer, TEXTS).tokens.dtype == np.uint16
    wide = dataclasses.make_dataclass("Wide", [])()
    wide.__class__ = type("Wide", (), {"__call__": lambda self, *a, **k: tokenizer(*a, **k)})
    wide.is_fast, wide.pad_token_id, wide.get_vocab = True, 0, lambda: {"x": 2**16}
    assert coded(wide, TEXTS).tokens.dtype == np.int32


def test_several_labels_are_floats_and_follow_their_rows(tokenizer: Any) -> None:
    labels = np.asarray([[0, 1], [1, 1], [0, 0]], dtype=np.uint8)
    examples = tokens.encode(split_of({"text": TEXTS[:3]}, labels, "multilabel"), tokenizer, 16)
    assert (examples.labels.dtype, examples.kind, examples.n_outputs) == (np.float32, "multilabel", 3)
    batch = collate(examples, np.asarray([2, 1]), CPU)
    assert batch.labels.tolist() == [[0, 0], [1, 1]]
    assert batch.places is None


class Slow:
    """A tokenizer without offsets: letters."""

    is_fast, pad_token_id = False, None

    def get_vocab(self) -> dict[str, int]:
        return {"z": 200}

    def __call__(self, texts: list[str], pairs: Any, *, max_length: int, **_: Any) -> Any:
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": [[ord(letter) for letter in text][:max_length] for text in texts]})


def test_a_slow_tokenizer_serves_sentences_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tokens, "CACHE_EXAMPLES", 1)
    monkeypatch.setenv("CAP_CACHE", str(tmp_path / "cache"))
    examples = coded(Slow(), ["abc", "defghij"], length=5)
    assert (examples.tokens.tolist(), examples.n_cut, examples.pad_id) == (list(b"abcdefgh"), 1, 0)
    assert examples.types is None
    assert not (tmp_path / "cache").exists()
    for kind, columns in (("tokens", {"words": [["a"]]}), ("spans", {"question": ["a"], "context": ["b"]})):
        with pytest.raises(DataError, match="the tokenizer Slow does not tell where its tokens are"):
            tokens.encode(split_of(columns, objects([np.zeros(1)]), kind), Slow(), 16)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer as decoders have it: no padding token, and no special tokens around a text."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("plain")
    write_byte_tokenizer(folder, padding=False)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["classification", "pairs", "tokens", "spans"])
def test_an_empty_text_without_special_tokens_is_one_padding_token(plain: Any, kind: str) -> None:
    plain = copy.deepcopy(plain)
    plain.pad_token = plain.convert_ids_to_tokens(7)
    columns, labels = {
        "classification": ({"text": ["", "a film", ""]}, np.arange(3)),
        "pairs": ({"text": ["", "a film", ""], "pair": ["", "plot", ""]}, np.arange(3)),
        "tokens": ({"tokens": [[], ["a", "film"], [""]]}, objects([np.arange(n) for n in (0, 2, 1)])),
        "spans": (
            {"question": ["", "a", ""], "context": ["", "film", ""]},
            objects([Answers(texts=(), starts=()), answer("film", 0), Answers(texts=(), starts=())]),
        ),
    }[kind]
    split = split_of(columns, labels, "classification" if kind == "pairs" else kind)
    examples = tokens.encode(split, plain, 32, cache=False, chunk=2)
    assert examples.lengths[[0, 2]].tolist() == [1, 1]
    assert examples.lengths[1] > 1
    assert examples.tokens[examples.offsets[[0, 2]]].tolist() == [7, 7]
    assert (examples.pad_id, examples.offsets[-1], examples.n_cut) == (7, len(examples.tokens), 0)
    if kind == "tokens":
        assert examples.words is not None
        assert examples.words[[0, -1]].tolist() == [-1, -1]
        assert examples.labels[[0, -1]].tolist() == [tokens.NO_LABEL] * 2
    if kind == "spans":
        assert examples.chars is not None and examples.owner is not None
        assert examples.chars[[0, -1]].tolist() == [[-1, -1]] * 2
        assert examples.labels[[0, 2]].tolist() == [[0, 0]] * 2
        assert examples.owner.tolist() == [0, 1, 2]

    batches = list(evaluation_batches(examples, 1))
    assert sorted(i for rows in batches for i in rows.tolist()) == [0, 1, 2]
    for rows in (*batches, np.asarray([2, 0]), np.arange(3)):
        batch = collate(examples, rows, CPU)
        assert batch.inputs["attention_mask"].sum(1).tolist() == examples.lengths[rows].tolist()
    assert collate(examples, np.asarray([2, 0]), CPU).inputs["input_ids"].tolist() == [[7], [7]]


def test_texts_that_are_all_empty_in_a_batch_have_a_batch(plain: Any) -> None:
    """Without a padding token it is id 0 that stands there."""
    examples = coded(plain, ["", "", "a film", ""])
    assert examples.tokens[[0, 1, -1]].tolist() == [0, 0, 0]
    rows = list(evaluation_batches(examples, 4096))
    assert [len(some) for some in rows] == [4]


# Stopping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True])
def test_encoding_asks_once_per_chunk_whether_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Any, kept: bool
) -> None:
    """And what is raised then ends it, also while the cache is written, of which nothing is left."""
    monkeypatch.setattr(tokens, "CACHE_EXAMPLES", 1 if kept else 10_000)
    monkeypatch.setenv("CAP_CACHE", str(tmp_path / "cache"))
    chunks: list[int] = []
    cut = tokens._texts

    def counted(texts: list[str], *rest: Any) -> Any:
        chunks.append(len(texts))
        return cut(texts, *rest)

    monkeypatch.setattr(tokens, "_texts", counted)
    asked_after: list[int] = []
    split = split_of({"text": TEXTS}, np.arange(6))

    def stop() -> None:
        asked_after.append(len(chunks))
        if len(asked_after) == 2:
            raise Stopped("stopped by the test")

    with pytest.raises(Stopped, match="stopped by the test"):
        tokens.encode(split, tokenizer, 32, chunk=2, check=stop)
    assert (chunks, asked_after) == ([2, 2], [1, 2])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    chunks.clear()
    asked_after.clear()
    examples = tokens.encode(split, tokenizer, 32, chunk=2, check=lambda: asked_after.append(len(chunks)))
    assert (len(examples), chunks, asked_after) == (6, [2, 2, 2], [1, 2, 3])


# Words ---------------------------------------------------------------------------------------------------------------

SENTENCES = [
    ["Zoë's", "café", ",", "near", "東京"],
    ["film"],
    [],
    ["", "plot", "a b", "\u200b", "¡día!"],
    ["😀", "£5", "x" * 30],
]


def of_words(tokenizer: Any, sentences: list[list[str]], length: int = 64) -> Examples:
    labels = objects([np.arange(len(words)) % 7 for words in sentences])
    return tokens.encode(split_of({"tokens": sentences}, labels, "tokens"), tokenizer, length, chunk=2)


@pytest.mark.parametrize("kind", KINDS)
def test_every_word_has_its_label_at_its_first_token(all_tokenizers: dict[str, Any], kind: str) -> None:
    """Against a slow reading: the first token whose last character is one of the word's."""
    tokenizer = all_tokenizers[kind]
    examples = of_words(tokenizer, SENTENCES)
    assert examples.words is not None
    assert (examples.per_token, examples.n_outputs) == (True, len(examples.tokens))
    for i, words in enumerate(SENTENCES):
        text = " ".join(words)
        spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        expected, begin = [-1] * len(spans), 0
        for index, word in enumerate(words):
            own = [t for t, (b, e) in enumerate(spans) if e > b and begin <= e - 1 < begin + len(word)]
            if own:
                expected[own[0]] = index
            begin += len(word) + 1
        window = slice(examples.offsets[i], examples.offsets[i + 1])
        assert examples.words[window].tolist() == expected
        assert examples.labels[window].tolist() == [tokens.NO_LABEL if w < 0 else w % 7 for w in expected]
        visible = [index for index, word in enumerate(words) if word.isalpha() and word.isascii()]
        assert set(visible) <= set(expected)


WORD = st.text(st.sampled_from("abcdé'.,東😀 "), max_size=5)


@given(words=st.lists(st.text(st.sampled_from("abcdefgh'.,東"), min_size=1, max_size=6), max_size=8))
@settings(max_examples=60)
@example(words=["a.b", ",", "'s"])
def test_labels_of_words_are_those_of_words_given_apart(tokenizer: Any, words: list[str]) -> None:
    """The tokenizer's own way from words to tokens, which only some families have, says the same."""
    own = tokenizer(words, is_split_into_words=True).word_ids() if words else [None, None]
    expected = [-1 if word is None or word in own[:i] else word for i, word in enumerate(own)]
    examples = of_words(tokenizer, [words, ["film"]])
    assert examples.words is not None
    assert examples.words[: examples.offsets[1]].tolist() == expected


@given(words=st.lists(WORD, max_size=8), kind=st.sampled_from(KINDS))
@settings(max_examples=100)
def test_any_words_are_labelled_once_and_in_order(all_tokenizers: dict[str, Any], words: list[str], kind: str) -> None:
    examples = of_words(all_tokenizers[kind], [words, ["film"]])
    assert examples.words is not None
    placed = [word for word in examples.words[: examples.offsets[1]].tolist() if word >= 0]
    assert placed == sorted(set(placed))
    assert {i for i, word in enumerate(words) if set(word) & set("abcd")} <= set(placed)


def test_words_that_are_cut_away_have_no_label(tokenizer: Any) -> None:
    examples = of_words(tokenizer, [["film"] * 20, ["plot"] * 6], length=8)
    assert examples.lengths.tolist() == [8, 8]
    assert (examples.labels >= 0).sum() == 12
    assert examples.n_cut == 1


def test_labels_of_words_are_padded(tokenizer: Any) -> None:
    examples = of_words(tokenizer, [["film", "plot"], ["film"]])
    batch = collate(examples, np.asarray([1, 0]), CPU)
    none = tokens.NO_LABEL
    assert batch.labels.tolist() == [[none, 0, none, none], [none, 0, 1, none]]
    assert batch.places is not None
    assert batch.places.tolist() == [[4, 5, 6, 0], [0, 1, 2, 3]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


# Questions -----------------------------------------------------------------------------------------------------------

STORY = " ".join(
    f"Near the river, on day {i}, Zoë met {name} at the café." for i, name in enumerate(["Ada", "Bob"] * 9)
)


def asked(
    tokenizer: Any,
    answers: list[Answers],
    length: int = 48,
    name: str = "train",
    question: str = "who?",
    **options: Any,
) -> Examples:
    n = len(answers)
    columns = {"question": [question] * n, "context": [STORY] * n}
    return tokens.encode(split_of(columns, objects(answers), "spans", name), tokenizer, length, chunk=2, **options)


def answer(text: str, start: int) -> Answers:
    return Answers(texts=(text,), starts=(start,))


def windows_with_answer(examples: Examples, question: int = 0) -> list[tuple[int, int, str]]:
    """(begin, end, text) in the context that the labels of each window point at."""
    assert examples.owner is not None and examples.chars is not None
    found = []
    for window in np.flatnonzero(examples.owner == question):
        first, last = examples.labels[window]
        if first:
            place = examples.offsets[window]
            begin, end = int(examples.chars[place + first, 0]), int(examples.chars[place + last, 1])
            found.append((begin, end, STORY[begin:end].strip()))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["Ada", "Near the river", "met Bob at the café", "Zoë"])
def test_an_answer_is_marked_in_every_window_that_holds_it(
    all_tokenizers: dict[str, Any], kind: str, text: str
) -> None:
    places = [i for i in range(len(STORY)) if STORY.startswith(text, i)]
    for start in (places[0], places[len(places) // 2], places[-1]):
        examples = asked(all_tokenizers[kind], [answer(text, start)], length=72, stride=30)
        found = windows_with_answer(examples)
        assert found
        for begin, end, shown in found:
            assert begin in (start - 1, start) and end == start + len(text) and shown == text
        assert examples.chars is not None
        for window in range(len(examples)):
            chars = examples.chars[examples.offsets[window] : examples.offsets[window + 1]]
            inside = chars[chars[:, 1] > chars[:, 0]]
            if inside[0, 0] <= start and inside[-1, 1] >= start + len(text):
                assert examples.labels[window].tolist() != [0, 0]
            else:
                assert examples.labels[window].tolist() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_windows_cover_the_context_and_share_the_stride(all_tokenizers: dict[str, Any], kind: str) -> None:
    tokenizer = all_tokenizers[kind]
    examples = asked(tokenizer, [answer("Ada", -1)] * 3, stride=7)
    assert examples.owner is not None and examples.chars is not None
    whole = tokenizer(STORY, add_special_tokens=False, return_offsets_mapping=True)
    for question in range(3):
        windows = np.flatnonzero(examples.owner == question)
        assert len(windows) > 2
        read: list[int] = []
        for window in windows:
            row = slice(examples.offsets[window], examples.offsets[window + 1])
            ids = examples.tokens[row][examples.chars[row][:, 0] >= 0].tolist()
            assert read == [] or read[-7:] == ids[:7]
            read += ids if read == [] else ids[7:]
            assert examples.lengths[window] == 48 or window == windows[-1]
        assert read == whole["input_ids"]
    assert examples.owner.tolist() == sorted(examples.owner.tolist())
    assert examples.n_cut == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_takes_at_most_half_of_a_window(all_tokenizers: dict[str, Any], kind: str) -> None:
    for question in ("why 東京 😀 " * 30, "😀" * 40, "x" * 300):
        examples = asked(all_tokenizers[kind], [answer("Ada", -1)] * 2, length=24, question=question)
        assert examples.n_cut == 2 or " " not in question  # which may be one unknown token
        assert examples.lengths.max() <= 24
        assert [text for *_, text in windows_with_answer(examples)] != []


def test_a_stride_must_leave_room(tokenizer: Any) -> None:
    assert len(asked(tokenizer, [answer("Ada", -1)], length=24, stride=8)) > 10
    with pytest.raises(DataError) as caught:
        asked(tokenizer, [answer("Ada", -1)], length=24, stride=9)
    assert caught.value.message == "--stride 9 is too long: only 9 of 24 tokens may be left for the context"
    with pytest.raises(DataError, match="a window of 6 tokens has no room for a context"):
        asked(tokenizer, [answer("Ada", -1)], length=6)


@pytest.mark.parametrize(("start", "expected"), [(-1, 0), (0, 0), (10_000, 8), (120, 1), (200, 2)])
def test_a_wrong_start_means_the_nearest_place(tokenizer: Any, start: int, expected: int) -> None:
    places = [i for i in range(len(STORY)) if STORY.startswith("Ada", i)]
    assert min(range(9), key=lambda k: abs(places[k] - start)) == expected
    assert {begin for begin, *_ in windows_with_answer(asked(tokenizer, [answer("Ada", start)]))} == {places[expected]}


def test_an_answer_from_elsewhere_is_an_error_in_training_only(tokenizer: Any) -> None:
    answers = [answer("Ada", -1), answer("nowhere", 3)]
    with pytest.raises(DataError) as caught:
        asked(tokenizer, answers)
    assert caught.value.message == "row 1 of the train split: the answer 'nowhere' does not occur in its context"
    examples = asked(tokenizer, answers, name="validation")
    assert windows_with_answer(examples, 1) == []
    assert windows_with_answer(examples, 0) != []


def test_a_question_without_answer_points_at_the_first_token(tokenizer: Any) -> None:
    examples = asked(tokenizer, [Answers(texts=(), starts=()), answer("Ada", -1)])
    assert windows_with_answer(examples, 0) == []
    batch = collate(examples, np.asarray([len(examples) - 1, 0]), CPU)
    assert batch.labels.shape == (2, 2)
    assert batch.places is not None
    assert batch.places[1, :3].tolist() == [0, 1, 2]


# The cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the cache, which every set of these tests is large enough for."""
    monkeypatch.setattr(tokens, "CACHE_EXAMPLES", 1)
    monkeypatch.setenv("CAP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def of_every_kind() -> dict[str, Any]:
    tags = objects([np.arange(len(words)) for words in SENTENCES])
    answers = objects([answer("Ada", 3), Answers(texts=(), starts=()), answer("Bob", -1)])
    return {
        "classification": split_of({"text": TEXTS}, np.arange(6)),
        "pairs": split_of({"text": TEXTS, "pair": TEXTS[::-1]}, np.arange(6)),
        "multilabel": split_of({"text": TEXTS}, np.eye(6, dtype=np.uint8), "multilabel"),
        "tokens": split_of({"tokens": SENTENCES}, tags, "tokens"),
        "spans": split_of({"question": ["who?"] * 3, "context": [STORY] * 3}, answers, "spans"),
    }


ARRAYS = ("tokens", "types", "offsets", "labels", "owner", "words", "chars", "n_cut", "kind")


def assert_same(ours: Examples, theirs: Examples) -> None:
    for name in ARRAYS:
        one, other = getattr(ours, name), getattr(theirs, name)
        np.testing.assert_array_equal(one, other)
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None), name


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokens, "_pieces", never)


@pytest.mark.parametrize("kind", of_every_kind())
def test_a_set_is_tokenised_once(monkeypatch: pytest.MonkeyPatch, cache: Path, tokenizer: Any, kind: str) -> None:
    split = of_every_kind()[kind]
    plain = tokens.encode(split, tokenizer, 40, cache=False)
    assert not cache.exists()
    assert_same(tokens.encode(split, tokenizer, 40, chunk=2), plain)
    assert len(list(cache.iterdir())) == 1
    forbid(monkeypatch)
    again = tokens.encode(split, tokenizer, 40)
    assert_same(again, plain)
    assert isinstance(again.tokens.base, np.memmap) and not again.tokens.flags.writeable
    rows = np.arange(len(again))[::-1].copy()
    ours, theirs = collate(again, rows, CPU), collate(plain, rows, CPU)
    assert torch.equal(ours.inputs["input_ids"], theirs.inputs["input_ids"])
    assert torch.equal(ours.labels, theirs.labels)


def test_few_examples_are_not_kept(monkeypatch: pytest.MonkeyPatch, cache: Path, tokenizer: Any) -> None:
    monkeypatch.setattr(tokens, "CACHE_EXAMPLES", 7)
    coded(tokenizer, TEXTS)
    assert not cache.exists()


def test_whatever_the_tokens_depend_on_changes_the_key(tokenizer: Any) -> None:
    split, key = of_every_kind()["pairs"], tokens.key_of
    base = key(split, tokenizer, 40, 0)
    tokenizer("a word", truncation=True, max_length=3, padding="max_length")  # leaves its traces in the backend
    assert key(split, tokenizer, 40, 0) == base
    assert key(dataclasses.replace(split, labels=split.labels + 1), tokenizer, 40, 0) == base  # are not stored
    other = split_of({"text": TEXTS, "pair": [*TEXTS[1:], "x"]}, np.arange(6))
    swapped = dataclasses.replace(split, columns=split.columns[::-1])
    wider = copy.deepcopy(tokenizer)
    wider.add_tokens(["entirely-new"])
    found = {
        base,
        key(split, tokenizer, 41, 0),
        key(split, tokenizer, 40, 1),
        key(other, tokenizer, 40, 0),
        key(swapped, tokenizer, 40, 0),
        key(split.take(np.asarray([0, 2])), tokenizer, 40, 0),
        key(split.take(np.asarray([0, 3])), tokenizer, 40, 0),
        key(split, wider, 40, 0),
    }
    assert len(found) == 8
    for kind in ("tokens", "spans"):
        split = of_every_kind()[kind]
        labels = split.labels.copy()
        labels[0] = np.asarray([4, 3, 2, 1, 0]) if kind == "tokens" else answer("Ada", 4)
        assert key(dataclasses.replace(split, labels=labels), tokenizer, 40, 0) != key(split, tokenizer, 40, 0)


@pytest.mark.parametrize("package", ["tokenizers", "transformers"])
def test_another_version_of_the_tokenizer_is_another_key(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, package: str
) -> None:
    split = of_every_kind()["pairs"]
    real, base = tokens.version, tokens.key_of(split, tokenizer, 40, 0)
    monkeypatch.setattr(tokens, "version", lambda name: "0.0.0.other" if name == package else real(name))
    assert tokens.key_of(split, tokenizer, 40, 0) != base
    monkeypatch.setattr(tokens, "version", real)
    assert tokens.key_of(split, tokenizer, 40, 0) == base


def counted_pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one whenever a set is tokenised."""
    calls: list[int] = []
    real = tokens._pieces

    def counted(*arguments: Any) -> Iterator[disk.Piece]:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(tokens, "_pieces", counted)
    return calls


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), FileError("cannot remove it")])
def test_an_entry_is_used_though_the_old_ones_cannot_be_removed(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tokenizer: Any, error: Exception
) -> None:
    def failing(folder: Path, entries: int) -> None:
        assert (folder, entries) == (cache, disk.ENTRIES["tokens"])
        raise error

    monkeypatch.setattr(disk, "_tidy", failing)
    calls = counted_pieces(monkeypatch)
    examples = coded(tokenizer, TEXTS)
    assert len(calls) == 1
    (entry,) = cache.iterdir()
    assert files.is_complete(entry)
    assert isinstance(examples.tokens.base, np.memmap)
    assert Path(examples.tokens.base.filename) == entry / "tokens.bin"
    assert_same(examples, coded(tokenizer, TEXTS))
    assert len(calls) == 1


def test_the_entry_that_another_process_published_meanwhile_is_used(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path, tokenizer: Any
) -> None:
    """It comes between the removal of the old folder and the renaming of ours, which then fails."""
    plain = coded(tokenizer, TEXTS)
    (entry,) = cache.iterdir()
    theirs = tmp_path / "theirs"
    entry.rename(theirs)
    calls = counted_pieces(monkeypatch)
    places: list[int] = []

    def publish(operation: str, path: Path) -> None:
        if operation == "rename" and path == entry:
            shutil.copytree(theirs, entry)
            places.append(entry.stat().st_ino)

    monkeypatch.setattr(files, "fault_hook", publish)
    examples = coded(tokenizer, TEXTS)
    assert len(calls) == len(places) == 1
    assert entry.stat().st_ino == places[0]
    assert isinstance(examples.tokens.base, np.memmap)
    assert Path(examples.tokens.base.filename) == entry / "tokens.bin"
    assert_same(examples, plain)


@pytest.mark.parametrize("damage", ["flip", "shorten", "remove", "no layout"])
def test_a_damaged_entry_is_made_again(cache: Path, tokenizer: Any, damage: str) -> None:
    plain = coded(tokenizer, TEXTS)
    (entry,) = cache.iterdir()
    file = entry / ("arrays.json" if damage == "no layout" else "tokens.bin")
    data = file.read_bytes()
    del plain
    file.unlink()
    if damage in ("flip", "shorten"):
        file.write_bytes(bytes([data[0] ^ 1, *data[1:]]) if damage == "flip" else data[:-2])
    again = coded(tokenizer, TEXTS)
    assert (entry / file.name).read_bytes() == data
    assert again.tokens.tobytes() == (entry / "tokens.bin").read_bytes()


@pytest.mark.parametrize("place", ["a file", "full disk", "full everywhere", "no home"])
def test_a_cache_that_cannot_be_written_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Any, place: str
) -> None:
    monkeypatch.setattr(tokens, "CACHE_EXAMPLES", 1)
    monkeypatch.setattr(disk.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CAP_CACHE", str(tmp_path / "cache"))
    if place == "a file":
        (tmp_path / "cache").touch()
    if place == "no home":
        monkeypatch.delenv("CAP_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))

    def full(operation: str, path: Path) -> None:
        if operation == "sync" and ("cache" in path.parts or place == "full everywhere"):
            raise OSError(errno.ENOSPC, "No space left on device")

    if "full" in place:
        monkeypatch.setattr(files, "fault_hook", full)
    examples = coded(tokenizer, TEXTS)
    monkeypatch.undo()
    assert_same(examples, coded(tokenizer, TEXTS))
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "cache"]
    assert left == []


def test_errors_of_the_data_are_not_taken_for_those_of_the_cache(cache: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row 1 of column 'text'"):
        coded(tokenizer, ["a", None])  # type: ignore[list-item]
    assert list(cache.iterdir()) == []


def test_the_oldest_entries_are_removed_but_none_of_this_process(cache: Path, tokenizer: Any) -> None:
    old = [cache / f"{i:064d}" for i in range(24)]
    stale, busy = cache / ".x.1.part", cache / ".y.2.part"
    for age, folder in enumerate([*old, stale, busy]):
        folder.mkdir(parents=True)
        (folder / "x").touch()
        seconds = disk._STARTED - (90_000 if folder == stale else 100 + age)
        os.utime(folder, (seconds, seconds))
    for length in range(8, 33):
        coded(tokenizer, TEXTS, length=length)
    kept = {path.name for path in cache.iterdir()}
    assert busy.name in kept and stale.name not in kept
    assert len(kept) == 25 + 1
    assert not kept & {path.name for path in old}


def test_entries_are_removed_when_they_take_too_much(
    cache: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age in range(5):
        folder = cache / f"{age:064d}"
        folder.mkdir(parents=True)
        (folder / "x").write_bytes(b"x" * 100_000)
        os.utime(folder, (disk._STARTED - 100 - age,) * 2)
    monkeypatch.setattr(disk, "MOST_BYTES", 250_000)
    coded(tokenizer, TEXTS)
    assert sorted(path.name[-1] for path in cache.iterdir() if path.name.startswith("0" * 63)) == ["0", "1"]


def test_a_used_entry_is_a_new_one(cache: Path, tokenizer: Any) -> None:
    coded(tokenizer, TEXTS)
    (entry,) = cache.iterdir()
    os.utime(entry, (1, 1))
    coded(tokenizer, TEXTS)
    assert entry.stat().st_mtime > 1


def test_the_folder_of_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CAP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert disk.cache_folder() == tmp_path / ".cache" / "capcli"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert disk.cache_folder() == tmp_path / "xdg" / "capcli"
    monkeypatch.setenv("CAP_CACHE", str(tmp_path / "own"))
    assert disk.cache_folder() == tmp_path / "own"


def test_the_layout_of_an_entry_can_be_read_by_eye(cache: Path, tokenizer: Any) -> None:
    examples = coded(tokenizer, TEXTS)
    (entry,) = cache.iterdir()
    n = len(examples.tokens)
    assert json.loads((entry / "arrays.json").read_text()) == {
        "n_cut": 0,
        "arrays": {
            "tokens": {"dtype": "<u2", "shape": [n]},
            "lengths": {"dtype": "<i4", "shape": [6]},
            "types": {"dtype": "|u1", "shape": [n]},
        },
    }
    assert (entry / "tokens.bin").stat().st_size == 2 * n


# Batches -------------------------------------------------------------------------------------------------------------


def test_padding_is_masked_and_rows_are_whole(tokenizer: Any) -> None:
    examples = coded(tokenizer, [*TEXTS, LONG])
    rows = np.array([6, 2, 0])
    batch = collate(examples, rows, CPU)
    width = int(examples.lengths[rows].max())
    assert batch.ids.tolist() == [6, 2, 0]
    assert batch.labels.tolist() == [6, 2, 0]
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert batch.inputs[name].shape == (3, width)
        assert batch.inputs[name].dtype == torch.int64
    expected = tokenizer([LONG, TEXTS[2], TEXTS[0]], truncation=True, max_length=32, padding=True, return_tensors="pt")
    for name, tensor in batch.inputs.items():
        assert torch.equal(tensor, expected[name]), name


def test_padding_uses_the_pad_id_of_the_tokenizer() -> None:
    examples = Examples(
        tokens=np.array([5, 6, 7], dtype=np.int32),
        types=None,
        offsets=np.array([0, 1, 3]),
        labels=np.array([0.5, 1.5]),
        pad_id=9,
    )
    batch = collate(examples, np.array([1, 0]), CPU)
    assert batch.inputs["input_ids"].tolist() == [[6, 7], [5, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.labels.tolist() == [1.5, 0.5]


def test_numbers_to_learn_are_in_32_bits(tokenizer: Any) -> None:
    values = np.asarray([0.1, 2.5, -1.0])
    examples = tokens.encode(split_of({"text": TEXTS[:3]}, values, "regression"), tokenizer, 16)
    batch = collate(examples, np.asarray([2, 0]), CPU)
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [-1.0, np.float32(0.1)]
    assert collate(coded(tokenizer, TEXTS), np.asarray([1]), CPU).labels.dtype == torch.int64


def of_lengths(lengths: list[int]) -> Examples:
    return Examples(
        tokens=np.zeros(sum(lengths), dtype=np.int32),
        types=None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=np.zeros(len(lengths)),
        pad_id=0,
    )


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=200)


@given(lengths=LENGTHS, batch_size=st.integers(1, 16), seed=st.integers(0, 9), epoch=st.integers(0, 9))
@settings(max_examples=50)
def test_an_epoch_covers_every_id_once(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    examples = of_lengths(lengths)
    batches = training_order(examples, batch_size, seed, epoch)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert len(batches) == -(-len(lengths) // batch_size)
    again = training_order(examples, batch_size, seed, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_order_depends_on_seed_and_epoch_only() -> None:
    examples = of_lengths([5] * 64)
    orders = {
        (seed, epoch): tuple(np.concatenate(training_order(examples, 8, seed, epoch)).tolist())
        for seed, epoch in itertools.product((0, 1), (0, 1))
    }
    assert len(set(orders.values())) == 4
    np.random.seed(3)  # global state must not matter
    assert tuple(np.concatenate(training_order(examples, 8, 0, 0)).tolist()) == orders[0, 0]


def test_batches_hold_like_lengths() -> None:
    rng = np.random.default_rng(0)
    examples = of_lengths(rng.integers(1, 60, 512).tolist())
    batches = training_order(examples, 8, 0, 0)
    padded = sum(len(b) * int(examples.lengths[b].max()) for b in batches)
    assert padded < 1.15 * examples.lengths.sum()  # shuffled alone: about 1.8
    means = [examples.lengths[b].mean() for b in batches]
    assert means != sorted(means)  # and batches of a length do not follow each other


@given(lengths=LENGTHS, budget=st.integers(1, 500))
@settings(max_examples=50)
def test_evaluation_covers_every_id_within_its_budget(lengths: list[int], budget: int) -> None:
    examples = of_lengths(lengths)
    batches = list(evaluation_batches(examples, budget))
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        longest = int(examples.lengths[batch].max())
        assert len(batch) == 1 or len(batch) * longest <= budget
