"""From logits to the answers of a pipeline, by kind of task: with the names that pipelines of transformers use.

Letters: N examples, T tokens of all examples, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.data import entities
from capcli.data.words import Sentence
from capcli.errors import RunFailed
from capcli.measuring import decode
from capcli.predicting.inputs import Asked, Place

Logits = NDArray[np.floating]
Answer = Any
"""A table of names and values, or a list of them."""
RANKING = "top_k"
LIKELY = 0.5  # a label among several that is more probable than this is an answer


@dataclass(frozen=True, kw_only=True)
class Question:
    """How answers are to be given. labels: in the order of the outputs. top_k: that many labels, the most probable
    first; 0 for the answer alone. no_answer: of questions, whether they may have none."""

    labels: tuple[str, ...]
    top_k: int = 0
    no_answer: bool = False


@dataclass(frozen=True, kw_only=True)
class Replying:
    """The functions of one kind. answers: of all items, from logits by example or by token. shown: what a line of the
    output says of the item besides its answer. name: how it calls an answer that is a list. ranked: whether `top_k`
    means anything."""

    answers: Callable[[Asked, Logits, Question], list[Answer]]
    asks: tuple[str, ...] = ("text", "pair")
    name: str = ""
    ranked: bool = False


def check_finite(logits: Logits, asked: Asked, place: Place) -> None:
    """Raise `RunFailed` naming the first item whose logits are not finite."""
    wrong = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(wrong):
        examples = asked.examples
        first = int(np.searchsorted(examples.offsets, wrong[0], side="right")) - 1 if examples.per_token else wrong[0]
        index = int(first if examples.owner is None else examples.owner[first])
        raise RunFailed(
            f"the logits of {place(index)} are not finite", "compute with --precision fp32, or check the weights"
        )


def lines(kind: str, asked: Asked, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    """Each item with its answer as one table; of a ranking the first label too, as where there is none."""
    row, items = REPLIES[kind], [(one.text,) for one in asked.sentences] or asked.items
    for item, answer in zip(items, answers, strict=True):
        yield dict(zip(row.asks, item, strict=False)) | _told(row, answer)


def _told(row: Replying, answer: Answer) -> dict[str, Any]:
    if not isinstance(answer, list):
        return dict(answer)
    return {**(answer[0] if row.name == RANKING else {}), row.name: answer}


# By kind -------------------------------------------------------------------------------------------------------------


def _class(asked: Asked, logits: Logits, question: Question) -> list[Answer]:
    ranked = [_ranked(row, question.labels) for row in _softmax(logits)]
    return [row[: question.top_k] if question.top_k else row[0] for row in ranked]


def _labels(asked: Asked, logits: Logits, question: Question) -> list[Answer]:
    ranked = [_ranked(row, question.labels) for row in np.exp(-np.logaddexp(0, -logits))]
    if question.top_k:
        return [row[: question.top_k] for row in ranked]
    return [[one for one in row if one["score"] > LIKELY] for row in ranked]


def _number(asked: Asked, logits: Logits, question: Question) -> list[Answer]:
    return [{"score": float(value)} for value in logits[:, 0]]


def _vector(asked: Asked, logits: Logits, question: Question) -> list[Answer]:
    return [{"vector": row.tolist()} for row in logits]


def _words(asked: Asked, logits: Logits, question: Question) -> list[Answer]:
    examples, labels, sentences = asked.examples, question.labels, asked.sentences
    assert examples.words is not None, "it is known where words begin"
    n_words = [len(one.words) for one in sentences]
    tags = decode.tags(logits, examples.offsets, examples.words, labels, n_words)
    best = _softmax(logits).max(axis=1)
    scores = []
    for begin, end, n in zip(examples.offsets[:-1], examples.offsets[1:], n_words, strict=True):
        speaking = begin + np.flatnonzero(examples.words[begin:end] >= 0)
        row = np.full(n, np.nan)  # of a word that was truncated
        row[examples.words[speaking]] = best[speaking]
        scores.append(row)
    shown = _entities if entities.is_entity_scheme(labels) else _tags
    return [shown(*one) for one in zip(sentences, tags, scores, strict=True)]


def _entities(sentence: Sentence, tags: Sequence[str], scores: NDArray[np.float64]) -> list[dict[str, Any]]:
    """The entities of a sentence in its order, each with the mean of the scores of its words."""
    found = sorted((first, last, group) for group, first, last in entities.entities(tags))
    return [
        {"entity_group": group, "score": float(scores[first : last + 1].mean()), **_place(sentence, first, last)}
        for first, last, group in found
    ]


def _tags(sentence: Sentence, tags: Sequence[str], scores: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Each word of a sentence with its label, as far as the model has read it."""
    return [
        {"entity": tag, "score": float(score), **_place(sentence, word, word)}
        for word, (tag, score) in enumerate(zip(tags, scores, strict=True))
        if not np.isnan(score)
    ]


def _place(sentence: Sentence, first: int, last: int) -> dict[str, Any]:
    start, end = sentence.spans[first][0], sentence.spans[last][1]
    return {"word": sentence.text[start:end], "start": start, "end": end}


def _spans(asked: Asked, logits: Logits, question: Question) -> list[Answer]:
    examples = asked.examples
    assert examples.owner is not None and examples.chars is not None, "windows have places in their contexts"
    where = examples.offsets, examples.owner, examples.chars
    contexts = [context for _, context in asked.items]
    found = decode.spans(logits, *where, contexts, len(contexts), no_answer=question.no_answer)
    return [{"answer": one.text, "score": one.score, "start": one.start, "end": one.end} for one in found]


def _softmax(logits: Logits) -> NDArray[np.float64]:
    """Probabilities [N, C]."""
    return np.asarray(np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)))


def _ranked(scores: NDArray[np.float64], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Labels by falling score [C], of equal ones the lower first."""
    return [{"label": labels[i], "score": float(scores[i])} for i in np.argsort(-scores, kind="stable")]


REPLIES = {
    "classification": Replying(answers=_class, name=RANKING, ranked=True),
    "regression": Replying(answers=_number),
    "ranking": Replying(answers=_number),
    "multilabel": Replying(answers=_labels, name="labels", ranked=True),
    "tokens": Replying(answers=_words, name="entities"),
    "spans": Replying(answers=_spans, asks=("question",)),
    "embedding": Replying(answers=_vector),
}
