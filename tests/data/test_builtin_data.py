"""The built-in model `mini` and the built-in tasks: what is shipped is complete, small, licensed and consistent."""

import json
import string
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer, BertModel, BertTokenizer

import capcli

DATA = Path(capcli.__file__).parent / "builtin"
MINI = DATA / "mini"
TASKS = {"banking77": (77, 9_992, 3_080), "mr": (2, 9_596, 1_066), "subj": (2, 9_000, 1_000)}
WNUT = {"train": (3_291, 60_676), "validation": (1_009, 15_733)}  # sentences, words
WORD = st.text(alphabet=string.ascii_letters + string.digits + string.punctuation, min_size=1, max_size=60)


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return AutoTokenizer.from_pretrained(MINI)


@pytest.fixture(scope="module")
def loaded() -> tuple[BertModel, dict[str, set[str]]]:
    """The model as plain transformers loads it, and what the loader missed or did not expect, by kind."""
    net, info = AutoModel.from_pretrained(MINI, output_loading_info=True)
    return net.eval(), info


def spelling(tokens: list[str]) -> str:
    """The text that wordpieces spell, without spaces."""
    return "".join(token[2:] if token.startswith("##") and len(token) > 2 else token for token in tokens)


def read_split(task: str, split: str) -> tuple[list[str], list[int], list[str]]:
    """Texts, labels and label names of one file."""
    table = pq.read_table(DATA / "tasks" / task / f"{split}.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["_type"] == "ClassLabel"
    return table["text"].to_pylist(), table["label"].to_pylist(), features["label"]["names"]


# ---- mini -----------------------------------------------------------------------------------------------------------


def test_mini_is_small_and_carries_its_licence() -> None:
    assert sum(f.stat().st_size for f in MINI.iterdir()) <= 16_000_000
    assert "Apache License" in (MINI / "LICENSE").read_text()
    assert "license: apache-2.0" in (MINI / "README.md").read_text()


def test_mini_loads_with_every_weight_in_32_bits(loaded: tuple[BertModel, dict[str, set[str]]]) -> None:
    net, info = loaded
    assert not any(info.values()), info
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(p.isfinite().all() for p in net.parameters())


def test_mini_card_states_what_was_made() -> None:
    config = json.loads((MINI / "config.json").read_text())
    made = json.loads((MINI / "made.json").read_text())
    assert made["vocabulary"] == config["vocab_size"]
    assert len(made["layers_of_source"]) == config["num_hidden_layers"]
    assert f"{made['vocabulary']:,} wordpieces" in (MINI / "README.md").read_text()


@torch.no_grad()
def test_mini_reads_its_longest_input(tokenizer: BertTokenizer, loaded: tuple[BertModel, dict]) -> None:
    batch = tokenizer("word " * 999, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (1, 256)
    assert loaded[0](**batch).last_hidden_state.shape == (1, 256, 384)


def test_tokenizer_marks_pairs(tokenizer: BertTokenizer) -> None:
    pair = tokenizer("a cat", "the dog")
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == ["[CLS]", "a", "cat", "[SEP]", "the", "dog", "[SEP]"]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert pair["attention_mask"] == [1] * 7


def test_tokenizer_vocabulary_fits_the_model(tokenizer: BertTokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(tokenizer) == json.loads((MINI / "config.json").read_text())["vocab_size"]
    assert tokenizer.model_max_length == 256


@given(st.lists(WORD, min_size=1, max_size=5))
def test_ascii_words_are_spelt_in_full(tokenizer: BertTokenizer, words: list[str]) -> None:
    text = " ".join(words)
    assume(not any(token in text for token in tokenizer.all_special_tokens))
    assert spelling(tokenizer.tokenize(text)) == "".join(words).lower()


def test_builtin_tasks_have_hardly_an_unknown_token(tokenizer: BertTokenizer) -> None:
    for task in TASKS:
        ids = [i for row in tokenizer(read_split(task, "validation")[0])["input_ids"] for i in row]
        assert ids.count(tokenizer.unk_token_id) <= len(ids) / 10_000


# ---- tasks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_task_has_its_rows_and_label_names(task: str) -> None:
    n_labels, *n_rows = TASKS[task]
    for split, expected in zip(("train", "validation"), n_rows, strict=True):
        texts, labels, names = read_split(task, split)
        assert len(texts) == expected
        assert all(text.strip() for text in texts)
        assert len(set(names)) == n_labels
        assert set(labels) == set(range(n_labels))


@pytest.mark.parametrize("task", TASKS)
def test_no_training_text_is_in_validation(task: str) -> None:
    train, validation = ({" ".join(t.lower().split()) for t in read_split(task, s)[0]} for s in ("train", "validation"))
    assert not train & validation
    assert len(train) == TASKS[task][1]


def test_label_names_of_the_small_tasks() -> None:
    assert read_split("mr", "train")[2] == ["neg", "pos"]
    assert read_split("subj", "train")[2] == ["objective", "subjective"]
    assert "lost_or_stolen_card" in read_split("banking77", "train")[2]


def read_wnut(split: str) -> tuple[list[list[str]], list[list[int]], list[str]]:
    """Words, tags and tag names of one file."""
    table = pq.read_table(DATA / "tasks" / "wnut17" / f"{split}.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert sorted(features) == sorted(table.column_names) == ["ner_tags", "tokens"]
    return table["tokens"].to_pylist(), table["ner_tags"].to_pylist(), features["ner_tags"]["feature"]["names"]


def test_wnut17_has_a_tag_for_every_word() -> None:
    seen: set[str] = set()
    for split in ("validation", "train"):
        words, tags, names = read_wnut(split)
        assert (len(words), sum(map(len, words))) == WNUT[split]
        assert [len(row) for row in words] == [len(row) for row in tags]
        assert {tag for row in tags for tag in row} == set(range(len(names))) == set(range(13))
        assert names[0] == "O" and {name[2:] for name in names[1::2]} == {name[2:] for name in names[2::2]}
        assert all(word and not set(word) & set(" \t\n") for row in words for word in row)
        sentences = {" ".join(row).lower() for row in words}
        assert not seen & sentences
        assert split == "validation" or len(sentences) == len(words)
        seen |= sentences


def test_tasks_carry_their_licence_and_sources() -> None:
    text = (DATA / "tasks" / "README.md").read_text()
    assert all(part in text for part in ("CC BY 4.0", "PolyAI", "Bo Pang", "Derczynski", "Changes:", "wnut17", *TASKS))
