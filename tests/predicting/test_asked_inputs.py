"""What may be asked, what is refused in which words, and where words begin."""

from typing import Any

import pytest

from capcli.data.words import sentence
from capcli.errors import DataError
from capcli.predicting import inputs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ada lives in London.", ["Ada", "lives", "in", "London", "."]),
        ('"Ada\'s" (she said)...', ['"', "Ada", "'s", '"', "(", "she", "said", ")", "..."]),
        ("the U.S. and U.S., at 5 p.m.", ["the", "U.S.", "and", "U.S.", ",", "at", "5", "p.m."]),
        ("@ada: #hi :-) 's it’s a", ["@ada", ":", "#hi", ":-)", "'s", "it", "’s", "a"]),
        ("London .  a\tb", ["London", ".", "a", "b"]),
        ("3.5 e-mail x's", ["3.5", "e-mail", "x", "'s"]),
        ("“你好。” ¿qué?", ["“", "你好", "。", "”", "¿", "qué", "?"]),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    found = sentence(text)
    assert found.words == words
    assert [text[begin:end] for begin, end in found.spans] == words
    assert found.text == text


def test_words_that_are_given_are_taken_as_they_are() -> None:
    for given in (["U.S.A", "is", "(big)"], "['U.S.A', 'is', '(big)']"):
        found = sentence(given)
        assert found.words == ["U.S.A", "is", "(big)"]
        assert found.text == "U.S.A is (big)"
        assert [found.text[begin:end] for begin, end in found.spans] == found.words


@pytest.mark.parametrize(
    ("given", "kind", "item"),
    [
        ("a", "classification", ("a",)),
        (("a", "b"), "classification", ("a", "b")),
        (["a", "b"], "regression", ("a", "b")),
        ({"text": "a"}, "classification", ("a",)),
        ({"text": "a", "text_pair": None}, "classification", ("a",)),
        ({"text_pair": "b", "text": "a"}, "multilabel", ("a", "b")),
        ({"context": "c", "question": "q"}, "spans", ("q", "c")),
        (("q", "c"), "spans", ("q", "c")),
        (("a", "b"), "tokens", (["a", "b"],)),
        (["a", "b", "c"], "tokens", (["a", "b", "c"],)),
    ],
)
def test_what_may_be_asked(given: Any, kind: str, item: Any) -> None:
    assert inputs.item(given, kind) == item


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (7, "classification", "cannot read a int as a text or a pair of texts"),
        (("a", "b", "c"), "classification", "cannot read a tuple as a text or a pair of texts"),
        ({"txt": "a"}, "classification", "cannot read names 'txt' as a text or a pair of texts"),
        ({"question": "q"}, "spans", "cannot read names 'question' as a question with its context"),
        (None, "tokens", "cannot read a NoneType as a text or a list of words"),
    ],
)
def test_what_cannot_be_asked(given: Any, kind: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        inputs.item(given, kind)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("items", "kind", "paired", "message"),
    [
        ([("a",), (" ",)], "classification", None, "row 1 has no text"),
        ([("a", None)], "classification", True, "row 0 has no text"),
        ([("a",), (3,)], "regression", False, "row 1 is of type int, not text"),
        ([("\ud800",)], "classification", None, "row 0 holds half of a surrogate pair, which is not text"),
        ([("a",)], "classification", True, "row 0 is one text: the model reads two"),
        ([("a", "b")], "classification", False, "row 0 is two texts: the model reads one"),
        ([("a", "b"), ("a",)], "classification", None, "row 1 is one text: the model reads two"),
        ([("q",)], "spans", None, "row 0 is one text: the model reads two"),
        ([([],)], "tokens", None, "row 0 has no words"),
        ([(["a", None],)], "tokens", None, "row 0 has no text"),
    ],
)
def test_what_is_refused_names_its_row(items: Any, kind: str, paired: bool | None, message: str) -> None:
    with pytest.raises(DataError) as caught:
        inputs.check(items, kind, paired, lambda index: f"row {index}")
    assert caught.value.message == message


def test_an_empty_word_is_no_fault() -> None:
    inputs.check([(["a", ""],)], "tokens", None, str)
