"""How logits become answers, by kind of task: as metrics want them, and as people read them.

Letters: N examples, T tokens of all examples, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.data.batches import Examples
from capcli.data.labels import Answers
from capcli.data.splits import Split
from capcli.measuring import decode
from capcli.measuring.embeddings import Wanted, directions

Logits = NDArray[np.floating]
SAME = 1e-6  # of the largest number: what rounding may tell apart


@dataclass(frozen=True, kw_only=True)
class Answering:
    """The functions of one kind; truth and outputs are those of `metrics.measure`.

    read: truth and outputs, of label names, examples and logits, which are by example or by token. answered: the
    answers that outputs stand for, as the truth has them. different: those of such answers that differ, in a form that
    can be compared. shown: one of these in words, of label names and it. labels: the answers that outputs stand for, as
    a split has its labels, of label names and outputs; None where nothing is measured without labels, and for vectors,
    which a split has besides its labels.
    """

    read: Callable[[Sequence[str], Examples, Logits], tuple[Any, Any]]
    answered: Callable[[Any], Any]
    different: Callable[[Any], set[Any]]
    shown: Callable[[Sequence[str], Any], str]
    labels: Callable[[Sequence[str], Any], NDArray[Any]] | None = None


def read(kind: str, labels: Sequence[str], examples: Examples, logits: Logits) -> tuple[Any, Any]:
    """Truth and outputs as `metrics.measure` wants them: tags by sentence, answers by question, else plain logits."""
    return ANSWERS[kind].read(labels, examples, logits)


def answered(kind: str, outputs: Any) -> Any:
    """The answers that outputs, as `metrics.measure` takes them, stand for, as it takes the truth."""
    return ANSWERS[kind].answered(outputs)


def as_labels(kind: str, names: Sequence[str], outputs: Any) -> NDArray[Any]:
    """The answers that outputs stand for as labels of a split; see `Split`."""
    labels = ANSWERS[kind].labels
    assert labels is not None, f"{kind} is measured with labels alone"
    return labels(names, outputs)


def constant(kind: str, labels: Sequence[str], truth: Any, outputs: Any) -> str:
    """What is answered to every example (word, for tokens) where the truth has more to say; empty otherwise."""
    row = ANSWERS[kind]
    found, true = row.different(row.answered(outputs)), row.different(truth)
    return row.shown(labels, *found) if len(found) == 1 and len(true) > 1 else ""


# From logits ---------------------------------------------------------------------------------------------------------


def _plain(labels: Sequence[str], examples: Examples, logits: Logits) -> tuple[Any, Any]:
    return examples.labels, logits


def _queries(labels: Sequence[str], examples: Examples, logits: Logits) -> tuple[Any, Any]:
    groups = _split(examples).groups
    assert groups is not None, "what is ranked is in groups"
    order = np.argsort(groups, kind="stable")
    ends = np.flatnonzero(np.diff(groups[order])) + 1
    return np.split(examples.labels[order].astype(np.float64), ends), np.split(logits[order, 0], ends)


def _tags(labels: Sequence[str], examples: Examples, logits: Logits) -> tuple[Any, Any]:
    assert examples.words is not None, "it is known where words begin"
    truth = [[labels[i] for i in row] for row in _split(examples).labels]
    n_words = [len(row) for row in truth]
    return truth, decode.tags(logits, examples.offsets, examples.words, labels, n_words)


def _pieces(labels: Sequence[str], examples: Examples, logits: Logits) -> tuple[Any, Any]:
    assert examples.owner is not None and examples.chars is not None, "windows have places in their contexts"
    split = _split(examples)
    golds = [answers.texts for answers in split.labels]
    contexts = (context for _, pairs in split.chunks() for context in pairs or ())
    where = examples.offsets, examples.owner, examples.chars
    found = decode.spans(logits, *where, contexts, len(golds), no_answer=split.no_answer)
    return golds, [span.text for span in found]


def _split(examples: Examples) -> Split:
    assert examples.split is not None, "what is measured was read from a split"
    return examples.split


def _vectors(labels: Sequence[str], examples: Examples, logits: Logits) -> tuple[Any, Any]:
    """Vectors [N, K, H], which are compared with themselves where no others are known."""
    split = _split(examples)
    outputs = logits.reshape(len(split), -1, logits.shape[-1]).astype(np.float64)
    others = outputs if split.vectors is None else split.vectors
    return Wanted(vectors=others, scores=split.labels if split.is_scored else None), outputs


# From outputs --------------------------------------------------------------------------------------------------------


def _highest(outputs: Any) -> Any:
    return outputs.argmax(axis=1)


def _above_zero(outputs: Any) -> Any:
    return outputs > 0


def _first_column(outputs: Any) -> Any:
    return outputs[:, 0]


def _same(outputs: Any) -> Any:
    return outputs


def _as_wanted(outputs: Any) -> Any:
    return Wanted(vectors=outputs)


def _as_golds(outputs: Any) -> Any:
    return [(text,) for text in outputs]


# As labels -----------------------------------------------------------------------------------------------------------


def _indices(names: Sequence[str], outputs: Any) -> NDArray[Any]:
    return np.asarray(_highest(outputs), dtype=np.int64)


def _own_numbers(names: Sequence[str], outputs: Any) -> NDArray[Any]:
    return np.asarray(_first_column(outputs), dtype=np.float64)


def _flags(names: Sequence[str], outputs: Any) -> NDArray[Any]:
    return np.asarray(_above_zero(outputs), dtype=np.uint8)


def _tag_indices(names: Sequence[str], outputs: Any) -> NDArray[Any]:
    place = {name: i for i, name in enumerate(names)}
    return _each([np.asarray([place[tag] for tag in tags], dtype=np.int64) for tags in outputs])


def _accepted(names: Sequence[str], outputs: Any) -> NDArray[Any]:
    """Each answer as the only accepted one, wherever it is in the context; none where there is no text."""
    return _each([Answers(texts=(text,) if text else (), starts=(-1,) if text else ()) for text in outputs])


def _each(values: Sequence[Any]) -> NDArray[Any]:
    found = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        found[i] = value
    return found


# In words ------------------------------------------------------------------------------------------------------------


def _classes(answers: Any) -> set[Any]:
    return set(np.unique(answers).tolist())


def _label_sets(answers: Any) -> set[Any]:
    return {tuple(map(bool, row)) for row in np.unique(answers, axis=0)}


def _numbers(answers: Any) -> set[Any]:
    """The lowest and the highest, unless only rounding tells them apart."""
    values = np.asarray(answers)
    close = np.ptp(values) <= SAME * np.abs(values).max()
    return {float(values[0])} if close else {float(values.min()), float(values.max())}


def _numbers_of_queries(answers: Any) -> set[Any]:
    return _numbers(np.concatenate(answers))


def _words(answers: Any) -> set[Any]:
    return {tag for row in answers for tag in row}


def _first_answers(answers: Any) -> set[Any]:
    return {next(iter(row), "") for row in answers}


def _names(labels: Sequence[str], one: Any) -> str:
    return ", ".join(repr(name) for name, is_true in zip(labels, one, strict=True) if is_true) or "no label"


ANSWERS = {
    "classification": Answering(
        read=_plain,
        answered=_highest,
        labels=_indices,
        different=_classes,
        shown=lambda labels, one: repr(labels[one]),
    ),
    "regression": Answering(
        read=_plain,
        answered=_first_column,
        labels=_own_numbers,
        different=_numbers,
        shown=lambda labels, one: f"{one:.4g}",
    ),
    "ranking": Answering(
        read=_queries, answered=_same, different=_numbers_of_queries, shown=lambda labels, one: f"{one:.4g}"
    ),
    "multilabel": Answering(read=_plain, answered=_above_zero, labels=_flags, different=_label_sets, shown=_names),
    "tokens": Answering(
        read=_tags, answered=_same, labels=_tag_indices, different=_words, shown=lambda labels, one: repr(one)
    ),
    "spans": Answering(
        read=_pieces,
        answered=_as_golds,
        labels=_accepted,
        different=_first_answers,
        shown=lambda labels, one: repr(one) if one else "no answer",
    ),
    "embedding": Answering(
        read=_vectors,
        answered=_as_wanted,
        different=lambda wanted: directions(wanted.vectors),
        shown=lambda labels, one: "the same vector",
    ),
}
