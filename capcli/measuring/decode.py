"""From logits to what people read: tags of words and answers to questions. numpy only.

Letters: T tokens of all examples one after the other, S tokens of one window, C classes, N sentences, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]
WORST = float(np.finfo(np.float32).min)
"""Stands for NaN and -inf, so that the sum of two logits is always a number."""


def tags(
    logits: Floats, offsets: Integers, words: Integers, names: Sequence[str], n_words: Sequence[int]
) -> list[list[str]]:
    """The predicted tag of each word, by sentence: N lists of `n_words` names.

    `logits` [T, C]; the tokens of sentence i are offsets[i] to offsets[i + 1], `offsets` [N + 1]; `words` [T] has a
    word's index in its sentence at the token that speaks for the word, and -1 elsewhere. NaN is the worst logit, of
    equal logits the lower class wins. A word without a token, as in a text that was cut, gets the tag "O", or the first
    name where there is no "O".
    """
    rest = "O" if "O" in names else names[0]
    found = []
    for begin, end, n in zip(offsets[:-1], offsets[1:], n_words, strict=True):
        row = [rest] * n
        speaking = begin + np.flatnonzero(words[begin:end] >= 0)
        for word, best in zip(words[speaking].tolist(), _numbers(logits[speaking]).argmax(axis=1), strict=True):
            row[word] = names[best]
        found.append(row)
    return found


@dataclass(frozen=True, kw_only=True)
class Span:
    """An answer: its text, where that begins and ends in the context, in characters, and its probability.

    That is the product of the probabilities of its first and its last token among those that its window allows. No
    answer is "" from 0 to 0.
    """

    text: str
    start: int = 0
    end: int = 0
    score: float = 0.0


def spans(
    logits: Floats,
    offsets: Integers,
    owner: Integers,
    chars: Integers,
    contexts: Iterable[str] | Callable[[int], str],
    n_questions: int,
    *,
    no_answer: bool,
    max_answer_tokens: int = 30,
    n_best: int = 20,
) -> Iterator[Span]:
    """The answer to each question, a part of its context without white space at the ends, or "".

    `logits` [T, 2] of start and end; the tokens of window w are offsets[w] to offsets[w + 1], `offsets` [W + 1];
    `owner` [W] is the question of each window, in rising order; `chars` [T, 2] is where each token begins and ends in
    the context, (-1, -1) outside of it. `contexts` gives the text of each question in order, or for an index.

    Of the `n_best` starts and `n_best` ends in the context of a window, each pair of at most `max_answer_tokens` tokens
    is a candidate; the highest sum of both logits over all windows wins, of equal ones the lower start, then the lower
    end. With `no_answer`, the answer is "" if the sum at the first token (lowest over the windows) is higher still. It
    is "" also when there is no candidate. NaN is the worst logit.
    """
    texts = map(contexts, range(n_questions)) if callable(contexts) else contexts
    first = np.searchsorted(owner, np.arange(n_questions + 1)).tolist()
    for begin, end, text in zip(first[:-1], first[1:], texts, strict=True):
        places = [slice(offsets[w], offsets[w + 1]) for w in range(begin, end)]
        windows = [(_numbers(logits[place]), chars[place]) for place in places]
        found = ((_best(*window, max_answer_tokens, n_best), w) for w, window in enumerate(windows))
        candidates = [(*best, w) for best, w in found if best]
        score, start, stop, best_window = max(candidates, default=(-np.inf, 0, 0, 0), key=_rank)
        none, empty = min(((float(window[0].sum()), w) for w, (window, _) in enumerate(windows)), default=(-np.inf, 0))
        if no_answer and none > score:
            yield Span(text="", score=_share(none, *windows[empty], no_answer=True))
        elif candidates:
            yield _stripped(text, start, stop, _share(score, *windows[best_window], no_answer=no_answer))
        else:
            yield Span(text="")


def _stripped(text: str, start: int, stop: int, score: float) -> Span:
    """The part of a text without white space at its ends."""
    start += len(text[start:stop]) - len(text[start:stop].lstrip())
    piece = text[start:stop].rstrip()
    return Span(text=piece, start=start, end=start + len(piece), score=score)


def _share(score: float, logits: NDArray[np.float64], chars: Integers, *, no_answer: bool) -> float:
    """The probability of a pair of tokens with this sum of logits [S, 2]: of all tokens of the context, chars [S, 2],
    and with `no_answer` the first, which stands for none."""
    allowed = chars[:, 0] >= 0
    allowed[0] |= no_answer
    return float(np.exp(score - np.logaddexp.reduce(logits[allowed], axis=0).sum()))


def _numbers(logits: Floats) -> NDArray[np.float64]:
    return np.nan_to_num(logits.astype(np.float64), nan=WORST, posinf=-WORST, neginf=WORST)


def _rank(candidate: tuple[float, int, int, int]) -> tuple[float, int, int]:
    score, start, stop, _ = candidate
    return score, -start, -stop


def _best(
    logits: NDArray[np.float64], chars: Integers, max_answer_tokens: int, n_best: int
) -> tuple[float, int, int] | None:
    """Score, first and last character of the best candidate in a window of logits and chars [S, 2]."""
    inside = np.flatnonzero(chars[:, 0] >= 0)
    starts, ends = (
        np.sort(inside[np.argsort(-logits[inside, side], kind="stable")[:n_best]]) for side in range(2)
    )  # in the order of the text, so that the first of equal candidates has the lowest start, then the lowest end
    tokens = ends - starts[:, None] + 1
    fits = (tokens >= 1) & (tokens <= max_answer_tokens) & (chars[ends, 1] > chars[starts, 0][:, None])
    rows, columns = np.nonzero(fits)
    if len(rows) == 0:
        return None
    scores = logits[starts[rows], 0] + logits[ends[columns], 1]
    best = int(scores.argmax())
    return float(scores[best]), int(chars[starts[rows[best]], 0]), int(chars[ends[columns[best]], 1])
