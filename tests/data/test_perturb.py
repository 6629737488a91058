"""Changed texts: what each change may do, that it is the same every time, and that a split reads its texts so."""

import dataclasses
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capcli.config.names import PERTURBATIONS
from capcli.data import perturb, tables, tokens
from capcli.data.labels import Answers
from capcli.data.perturb import Change
from capcli.data.splits import Split

TEXT = "The actors were wonderful, and nobody minded that the story ended badly (or not at all)."
TEXTS = st.text(st.characters(codec="utf-8"), max_size=80)
SENTENCES = st.lists(st.text(st.sampled_from("aefyzßİŉſ東é.,'1 _-АЯ"), min_size=1, max_size=9), min_size=1).map(
    " ".join
)
WORDS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda w: w.split() == [w]))
KEYBOARD = {"e": "wr", "q": "w", "p": "o", "a": "s", "l": "k", "z": "x", "m": "n", "g": "fh"}  # part of it, by hand

GOLDEN = [
    "A turly wonderful fillm, and funny.",
    "a truly wonderful film, and funny.",
    "wonderful truly A and funny. film,",
]


def changed(name: str, text: Any, row: int = 0, place: int = 0, seed: int = 1) -> Any:
    return Change(name=name, seed=seed).of(text, row, place)


def distance(a: str, b: str) -> int:
    """Edits from a to b: insertion, deletion, replacement, and neighbours that change places."""
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            near = [table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1])]
            if i > 1 and j > 1 and a[i - 2 : i] == b[j - 2 : j][::-1]:
                near.append(table[i - 2, j - 2] + 1)
            table[i, j] = min(near)
    return int(table[-1, -1])


# Any text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PERTURBATIONS)
@given(text=TEXTS | SENTENCES, row=st.integers(0, 10**9), seed=st.integers(0, 10**6))
def test_a_changed_text_is_a_text_and_always_the_same(name: str, text: str, row: int, seed: int) -> None:
    once = changed(name, text, row, 0, seed)
    assert once == changed(name, text, row, 0, seed)
    once.encode("utf-8")
    assert bool(once.strip()) == bool(text.strip())
    assert len(once.split()) == len(text.split())
    if not text:
        assert once == ""


@pytest.mark.parametrize("name", ["typos", "case"])
@given(words=WORDS, row=st.integers(0, 10**6))
def test_words_stay_as_many_and_are_words(name: str, words: list[str], row: int) -> None:
    before, once = list(words), changed(name, words, row)
    assert words == before, "the table's own cells are left alone"
    assert len(once) == len(words)
    assert all(word and word.split() == [word] for word in once)


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name in PERTURBATIONS for text in ("", " ", "!?", "\n\t", "1234", "東京")]
    + [("typos", "a far cry 1234 to_me"), ("order", "alone"), ("order", "so so so"), ("case", "12 + 13")],
)
def test_what_gives_no_change_stays(name: str, text: str) -> None:
    assert {changed(name, text, row) for row in range(20)} == {text}


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_change_depends_on_seed_row_and_place(name: str) -> None:
    base = [changed(name, TEXT, row) for row in range(30)]
    assert len(set(base)) > 1
    assert base != [changed(name, TEXT, row, 0, 2) for row in range(30)]
    assert base != [changed(name, TEXT, row, 1) for row in range(30)]


@pytest.mark.slow
def test_another_process_changes_texts_alike() -> None:
    """Not so if it hung on the hash of strings, which differs between processes."""
    made = f"[Change(name=name, seed=3).of({TEXT!r}, 7, 1) for name in {PERTURBATIONS}]"
    code = f"from capcli.data.perturb import Change\nprint({made})"
    env = {**os.environ, "PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == str([changed(name, TEXT, 7, 1, 3) for name in PERTURBATIONS])


def test_golden_changes() -> None:
    """Whoever changes these raises `perturb.VERSION`: results of before are not comparable."""
    assert perturb.VERSION == 1
    assert [changed(name, "A truly wonderful film, and funny.", 5) for name in PERTURBATIONS] == GOLDEN


# Typos ---------------------------------------------------------------------------------------------------------------


@given(SENTENCES, st.integers(0, 10**6))
def test_a_typo_is_one_error_behind_the_first_letter(text: str, row: int) -> None:
    before, after = text.split(), changed("typos", text, row).split()
    for a, b in zip(before, after, strict=True):
        if a != b:
            runs = 1 + sum(not letter.isalpha() for letter in a)  # each run of letters may have its own
            assert 1 <= distance(a, b) <= runs
            assert a[0] == b[0]


@given(st.text(st.sampled_from("abcdefgh"), min_size=4, max_size=10), st.integers(0, 10**6))
def test_the_only_long_word_always_has_an_error(word: str, row: int) -> None:
    once = changed("typos", f"so, {word} is it!", row)
    assert once != f"so, {word} is it!"
    assert distance(once, f"so, {word} is it!") == 1


def test_one_word_in_ten_has_an_error_and_all_errors_occur() -> None:
    word, n = "lexbq", 4000
    after = changed("typos", " ".join([word] * n), 0).split()
    wrong = [one for one in after if one != word]
    assert 0.085 < len(wrong) / n < 0.115
    kinds = Counter(
        "swapped" if sorted(one) == sorted(word)
        else "dropped" if len(one) < len(word)
        else "doubled" if len(one) > len(word)
        else "key"
        for one in wrong
    )  # fmt: skip
    assert all(0.15 < kinds[kind] / len(wrong) < 0.35 for kind in ("swapped", "dropped", "doubled", "key"))
    assert sum(kinds.values()) == len(wrong)
    for one in wrong:
        if sorted(one) != sorted(word) and len(one) == len(word):
            (i,) = (i for i in range(len(word)) if one[i] != word[i])
            assert one[i] in KEYBOARD.get(word[i], "zcvgnh")


def test_capitals_get_capitals_as_neighbours_and_short_words_stay() -> None:
    for row in range(200):
        once = changed("typos", "To be IN GREAT fun", row).split()
        assert once[:3] == ["To", "be", "IN"] and once[4] == "fun"
        assert once[3].isupper() and once[3] != "GREAT"


# Case and order ------------------------------------------------------------------------------------------------------


def test_case_is_half_capitals_half_small_letters() -> None:
    found = Counter(changed("case", TEXT, row) for row in range(400))
    assert set(found) == {TEXT.upper(), TEXT.lower()}
    assert 160 < found[TEXT.upper()] < 240


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a dull film", {"A DULL FILM", "A Dull Film"}),
        ("A DULL FILM", {"a dull film"}),
        ("A Dull Film", {"A DULL FILM", "a dull film"}),
        ("東京 12", {"東京 12"}),
    ],
)
def test_case_always_changes_what_has_a_case(text: str, expected: set[str]) -> None:
    assert {changed("case", text, row) for row in range(60)} == expected


def test_the_case_of_all_words_of_a_sentence_changes_alike() -> None:
    found = {tuple(changed("case", ["Rome", "is", "NEAR"], row)) for row in range(60)}
    assert found == {("ROME", "IS", "NEAR"), ("rome", "is", "near")}


@given(SENTENCES | TEXTS, st.integers(0, 10**6))
def test_words_change_places_within_three(text: str, row: int) -> None:
    before, once = text.split(), changed("order", text, row)
    after = once.split()
    for begin in range(0, len(before), 3):
        old, new = before[begin : begin + 3], after[begin : begin + 3]
        assert sorted(old) == sorted(new)
        assert old != new or len(set(old)) == 1, "whatever can change places does"
    spaces = "".join("x" if not c.isspace() else c for c in text)
    assert [c for c in spaces if c != "x"] == [c for c in once if c.isspace()], "spaces stay where they are"


def test_every_other_order_of_three_words_is_as_frequent() -> None:
    found = Counter(changed("order", "one two, three.", row) for row in range(1000))
    assert len(found) == 5 and min(found.values()) > 150


def test_words_with_labels_keep_their_order() -> None:
    assert perturb.offered("tokens", PERTURBATIONS) == ("typos", "case")
    for kind in ("classification", "regression", "multilabel", "spans"):
        assert perturb.offered(kind, ("order", "case")) == ("order", "case")


# Splits --------------------------------------------------------------------------------------------------------------


def split_of(columns: dict[str, Any], labels: Any, kind: str = "classification", change: str = "typos") -> Split:
    table = tables.in_memory("made here", columns)
    return Split(
        name="validation",
        table=table,
        columns=tuple(columns),
        labels=labels,
        kind=kind,
        change=Change(name=change, seed=1),
    )


def texts_of(split: Split, size: int = 100) -> list[Any]:
    """All texts, or pairs of them."""
    found = []
    for texts, pairs in split.chunks(size):
        found += list(zip(texts, pairs, strict=True)) if pairs else texts
    return found


@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel"])
def test_both_texts_are_changed_each_in_its_own_way(kind: str) -> None:
    split = split_of({"a": [TEXT] * 20, "b": [TEXT] * 20}, np.zeros(20), kind)
    assert texts_of(split) == [(changed("typos", TEXT, i, 0), changed("typos", TEXT, i, 1)) for i in range(20)]
    assert any(a != b for a, b in texts_of(split))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_an_example_is_changed_alike_whatever_else_is_read(size: int) -> None:
    split = split_of({"text": [f"{TEXT} {i}" for i in range(12)]}, np.zeros(12))
    whole, chosen = texts_of(split), np.array([1, 4, 5, 11])
    assert texts_of(split, size) == whole
    assert texts_of(split.take(chosen), size) == [whole[i] for i in chosen]


def test_of_questions_the_context_stays() -> None:
    answers = np.empty(2, dtype=object)
    answers[:] = [Answers(texts=("story",), starts=(50,))] * 2
    for name in PERTURBATIONS:
        split = split_of({"question": [TEXT] * 2, "context": [TEXT] * 2}, answers, "spans", name)
        for i, (question, context) in enumerate(texts_of(split)):
            assert context == TEXT and question == changed(name, TEXT, i) != TEXT


def test_words_of_a_sentence_keep_their_labels(tokenizer: Any) -> None:
    words = TEXT.split()
    labels = np.empty(1, dtype=object)
    labels[0] = np.arange(len(words))
    split = split_of({"tokens": [words]}, labels, "tokens")
    assert texts_of(split) == [changed("typos", words, 0)] != [words]
    examples = tokens.encode(split, tokenizer, 128)
    assert examples.words is not None
    assert [i for i in examples.words if i >= 0] == list(range(len(words)))


def test_tokens_of_changed_texts_have_an_entry_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: Any
) -> None:
    monkeypatch.setattr(tokens, "CACHE_EXAMPLES", 1)
    monkeypatch.setenv("CAP_CACHE", str(tmp_path))
    split = split_of({"text": [TEXT] * 8}, np.zeros(8))
    plain = dataclasses.replace(split, change=None)
    others = [
        dataclasses.replace(split, change=Change(name=name, seed=seed)) for name in PERTURBATIONS for seed in (1, 2)
    ]
    keys = [tokens.key_of(one, tokenizer, 40, 0) for one in (plain, *others)]
    assert len(set(keys)) == 7
    monkeypatch.setattr(perturb, "VERSION", 99)
    assert tokens.key_of(plain, tokenizer, 40, 0) == keys[0]
    assert tokens.key_of(others[0], tokenizer, 40, 0) != keys[1]
    monkeypatch.undo()
    monkeypatch.setattr(tokens, "CACHE_EXAMPLES", 1)
    monkeypatch.setenv("CAP_CACHE", str(tmp_path))
    first = tokens.encode(plain, tokenizer, 40)
    for _ in range(2):  # made, then found
        assert not np.array_equal(tokens.encode(split, tokenizer, 40).tokens, first.tokens)
