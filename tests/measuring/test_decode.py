"""Tags of words and answers to questions from logits: hand-made cases and slow loops."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capcli.measuring import decode

NAN = float("nan")


# Tags ----------------------------------------------------------------------------------------------------------------


def one_hot(classes: list[int], n_classes: int = 3) -> np.ndarray:
    return np.eye(n_classes, dtype=np.float32)[classes]


def test_a_word_has_the_tag_of_the_token_that_speaks_for_it() -> None:
    """Two sentences: [CLS] un ##der it [SEP], and [CLS] go [SEP]."""
    logits = one_hot([1, 2, 1, 0, 1, 1, 2, 1])
    words = np.array([-1, 0, -1, 1, -1, -1, 0, -1])
    found = decode.tags(logits, np.array([0, 5, 8]), words, ("O", "B-X", "I-X"), [2, 1])
    assert found == [["I-X", "O"], ["I-X"]]


@pytest.mark.parametrize(("names", "rest"), [(("B-X", "O", "I-X"), "O"), (("NOUN", "VERB", "X"), "NOUN")])
def test_words_without_a_token(names: tuple[str, ...], rest: str) -> None:
    found = decode.tags(one_hot([2, 2]), np.array([0, 2, 2]), np.array([-1, 1]), names, [4, 2])
    assert found == [[rest, names[2], rest, rest], [rest, rest]]


def test_sentences_without_words_and_no_sentences() -> None:
    assert decode.tags(one_hot([1]), np.array([0, 1]), np.array([-1]), ("a", "b", "c"), [0]) == [[]]
    assert decode.tags(one_hot([]), np.array([0]), np.array([], dtype=int), ("a", "b", "c"), []) == []


def test_equal_and_broken_logits_of_tags() -> None:
    logits = np.array([[1, 2, 2], [NAN, -9, NAN], [NAN] * 3, [-np.inf, NAN, -6e4]], dtype=np.float16)
    found = decode.tags(logits, np.array([0, 4]), np.arange(4), ("a", "b", "c"), [4])
    assert found == [["b", "b", "a", "c"]]


# Answers -------------------------------------------------------------------------------------------------------------

TEXT = "the quick brown fox jumps"
WORDS = [(-1, -1), (-1, -1), (0, 3), (4, 9), (10, 15), (16, 19), (20, 25), (-1, -1)]
"""A window: [CLS], a word of the question, five words of the context, [SEP]."""


def window(starts: dict[int, float], ends: dict[int, float]) -> np.ndarray:
    """Logits [8, 2], -9 but for the tokens named."""
    logits = np.full((len(WORDS), 2), -9.0, dtype=np.float32)
    for side, chosen in enumerate((starts, ends)):
        for place, value in chosen.items():
            logits[place, side] = value
    return logits


def answers(*windows: np.ndarray, owner: list[int] | None = None, n_questions: int = 1, **options: Any) -> list[str]:
    """Answers about TEXT by windows of eight tokens, all of question 0 unless `owner` says otherwise."""
    offsets = np.arange(len(windows) + 1) * len(WORDS)
    owners = np.array(owner or [0] * len(windows), dtype=np.int64)
    chars = np.array(WORDS * len(windows), dtype=np.int32).reshape(-1, 2)
    logits = np.concatenate(windows) if windows else np.zeros((0, 2))
    options = {"no_answer": False} | options
    return texts(decode.spans(logits, offsets, owners, chars, [TEXT] * n_questions, n_questions, **options))


def texts(found: Iterable[decode.Span]) -> list[str]:
    return [span.text for span in found]


def test_the_best_pair_of_start_and_end() -> None:
    assert answers(window({3: 5}, {4: 5})) == ["quick brown"]
    assert answers(window({6: 5}, {6: 5})) == ["jumps"], "one token"


def test_an_end_before_its_start_is_no_candidate() -> None:
    assert answers(window({5: 5, 3: 1}, {3: 5, 6: 2})) == ["fox jumps"], "5 + 2 is more than 1 + 5"


def test_the_question_and_special_tokens_are_no_answer() -> None:
    assert answers(window({0: 9, 1: 9, 4: 1}, {7: 9, 1: 9, 5: 1})) == ["brown fox"]


def test_long_candidates_are_left_out() -> None:
    logits = window({2: 5, 5: 1}, {6: 6})
    assert answers(logits, max_answer_tokens=5) == [TEXT]
    assert answers(logits, max_answer_tokens=4) == ["fox jumps"]
    assert answers(logits, max_answer_tokens=1) == ["jumps"]


def test_only_the_best_starts_and_ends_are_paired() -> None:
    logits = window({5: 5, 2: 4}, {3: 5, 4: 4})
    assert answers(logits, n_best=2) == ["the quick"]
    assert answers(logits, n_best=1) == [""], "the only pair ends before it starts"


@pytest.mark.parametrize(
    ("starts", "ends", "expected"),
    [
        ({3: 2, 4: 2}, {5: 2}, "quick brown fox"),
        ({4: 2}, {5: 2, 6: 2}, "brown fox"),
        ({3: 3, 4: 2}, {5: 2, 6: 3}, "quick brown fox jumps"),
        ({3: 1, 4: 2}, {3: 2, 4: 1}, "quick"),
        ({}, {}, "the"),
    ],
)
def test_of_equal_candidates_the_lower_start_then_the_lower_end(starts: Any, ends: Any, expected: str) -> None:
    assert answers(window(starts, ends)) == [expected]


def test_the_best_over_all_windows_of_a_question() -> None:
    low, high = window({3: 1}, {3: 1}), window({4: 2}, {4: 2})
    assert answers(low, high) == answers(high, low) == ["brown"]
    tie = window({6: 1}, {6: 1})
    assert answers(low, tie) == answers(tie, low) == ["quick"]


def test_no_answer_when_the_first_token_says_so() -> None:
    logits = window({0: 3, 4: 2}, {0: 2, 4: 2})
    assert answers(logits) == ["brown"]
    assert answers(logits, no_answer=True) == [""], "5 is more than 4"
    equal = window({0: 2, 4: 2}, {0: 2, 4: 2})
    assert answers(equal, no_answer=True) == ["brown"], "4 is not more than 4"


def test_one_window_that_sees_an_answer_is_enough() -> None:
    """The score of no answer is the lowest over the windows: 1 here, less than the 4 of the answer."""
    without, answer = window({0: 9}, {0: 9}), window({0: 0.5, 4: 2}, {0: 0.5, 4: 2})
    assert answers(without, answer, no_answer=True) == answers(answer, without, no_answer=True) == ["brown"]
    assert answers(without, without, no_answer=True) == [""]


def test_questions_keep_their_order_and_may_lack_windows() -> None:
    one, two = window({3: 1}, {3: 1}), window({4: 1}, {4: 1})
    assert answers(one, two, owner=[1, 3], n_questions=5) == ["", "quick", "", "brown", ""]
    assert answers(n_questions=2) == ["", ""]
    assert answers(n_questions=2, no_answer=True) == ["", ""]
    assert answers(n_questions=0) == []


def test_broken_logits_are_the_worst() -> None:
    broken = window({3: NAN, 4: 1}, {4: 1, 5: NAN})
    assert answers(broken) == ["brown"]
    assert answers(np.full((8, 2), NAN), window({4: -1}, {4: -1})) == ["brown"]
    assert answers(np.full((8, 2), NAN)) == ["the"]
    infinite = window({3: np.inf, 4: -np.inf}, {3: -np.inf, 4: np.inf})
    assert answers(infinite) == ["quick brown"]
    assert answers(window({0: NAN, 4: 1}, {0: 9, 4: 1}), no_answer=True) == ["brown"]


def test_answers_are_text_without_space_at_the_ends() -> None:
    """Tokens of some vocabularies begin with their space; a token without any character is no answer."""
    chars = np.array([(-1, -1), (0, 2), (2, 5), (5, 5), (5, 8)])

    def answer(best: int, **options: int) -> list[str]:
        logits = np.zeros((5, 2))
        logits[3], logits[best] = 9, 12
        where = np.array([0, 5]), np.array([0]), chars
        return texts(decode.spans(logits, *where, ["a  bc de"], 1, no_answer=False, max_answer_tokens=1, **options))

    assert [answer(i) for i in (1, 2, 4)] == [["a"], ["bc"], ["de"]]
    assert answer(3) == ["a"], "the best of the others"
    assert answer(3, n_best=1) == [""]


def test_sums_of_half_precision_make_no_ties() -> None:
    logits = window({3: 2048}, {3: 0, 4: 1}).astype(np.float16)
    assert answers(logits) == ["quick brown"], "2048 + 1 is 2048 in 16 bits"


def test_contexts_come_one_at_a_time_or_by_index() -> None:
    logits, chars = np.zeros((2, 2)), np.array([(0, 1), (0, 1)])
    read: list[int] = []

    def stream() -> Any:
        for i in range(2):
            read.append(i)
            yield f"{i}x"

    common = logits, np.array([0, 1, 2]), np.array([0, 1]), chars
    assert texts(decode.spans(*common, stream(), 2, no_answer=False)) == ["0", "1"]
    assert read == [0, 1]
    assert texts(decode.spans(*common, lambda i: f"{i + 5}x", 2, no_answer=False)) == ["5", "6"]
    for wrong in (["0x"], ["0x", "1x", "2x"]):
        with pytest.raises(ValueError, match="zip"):
            list(decode.spans(*common, wrong, 2, no_answer=False))


def slow(windows: list[np.ndarray], chars: np.ndarray, n_best: int, longest: int, no_answer: bool) -> tuple[int, int]:
    """Character range of one question's answer, as loops over all pairs."""
    best, none = (-np.inf, 0, 0), np.inf
    for logits in windows:
        none = min(none, logits[0].sum())
        inside = [i for i in range(len(chars)) if chars[i, 0] >= 0]
        starts, ends = (sorted(inside, key=lambda i: (-logits[i, side], i))[:n_best] for side in (0, 1))
        for i in starts:
            for j in ends:
                candidate = (logits[i, 0] + logits[j, 1], -chars[i, 0], -chars[j, 1])
                if i <= j < i + longest:
                    best = max(best, candidate)
    return (0, 0) if no_answer and none > best[0] else (-best[1], -best[2])


@given(
    seed=st.integers(0, 10**6),
    n_windows=st.integers(1, 3),
    n_best=st.integers(1, 6),
    longest=st.integers(1, 6),
    no_answer=st.booleans(),
)
def test_answers_equal_the_slow_loops(seed: int, n_windows: int, n_best: int, longest: int, no_answer: bool) -> None:
    """Small whole numbers as logits, so that many candidates are equal."""
    rng = np.random.default_rng(seed)
    size = 12
    windows = [rng.integers(-3, 4, (size, 2)).astype(np.float64) for _ in range(n_windows)]
    places = 2 * np.arange(size)
    chars = np.where(np.isin(np.arange(size), [0, 1, size - 1])[:, None], -1, np.stack([places, places + 2], axis=1))
    text = "".join(chr(0x4E00 + i) for i in range(2 * size))
    (found,) = decode.spans(
        np.concatenate(windows),
        np.arange(n_windows + 1) * size,
        np.zeros(n_windows, dtype=int),
        np.concatenate([chars] * n_windows),
        [text],
        1,
        no_answer=no_answer,
        max_answer_tokens=longest,
        n_best=n_best,
    )
    first, last = slow(windows, chars, n_best, longest, no_answer)
    assert (found.text, found.start, found.end) == (text[first:last], first, last)


def test_the_score_of_an_answer_is_that_of_its_first_and_last_token() -> None:
    """Three tokens of a context behind two others; the probabilities are worked out by hand."""
    logits = np.log(np.array([[5.0, 5], [9, 9], [1, 2], [3, 1], [4, 5]]))
    chars = np.array([(-1, -1), (-1, -1), (0, 2), (2, 4), (4, 6)])

    def answer(no_answer: bool, first: float) -> decode.Span:
        logits[0] = np.log(first)
        where = np.array([0, 5]), np.array([0]), chars
        (found,) = decode.spans(logits, *where, ["ab c d"], 1, no_answer=no_answer)
        return found

    found = answer(False, 5)
    assert (found.text, found.start, found.end) == ("d", 5, 6), "without the space before it"
    assert found.score == pytest.approx(4 / 8 * 5 / 8)
    assert answer(True, 2).score == pytest.approx(4 / 10 * 5 / 10), "the first token stands for no answer"
    none = answer(True, 8)
    assert (none.text, none.start, none.end) == ("", 0, 0)
    assert none.score == pytest.approx(8 / 16 * 8 / 16)
