"""The table of tasks: kind, columns, metrics and names of the labels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from capcli.data.kinds import KINDS

BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin" / "tasks"
PAIR = ("accuracy", "f1")
LABEL_NAMES = (
    "label",
    "labels",
    "class",
    "category",
    "target",
    "score",
    "tags",
    "answers",
)  # columns that no text is in


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the task table.

    text, pair, label: accepted column names, the official one first. kind: one of `kinds.KINDS`; of `tokens` the text
    holds the words, of `spans` it is the question, and pair the context with the answer. metrics: empty for those of
    the kind. entities: whether the labels must be of the kind O, B-person, I-person. no_answer: whether there
    are questions that their context does not answer; None: as the data has it. header: the columns of a tsv without
    one.
    """

    text: tuple[str, ...]
    pair: tuple[str, ...] = ()
    label: tuple[str, ...] = ("label",)
    labels: tuple[str, ...] = ()
    kind: str = "classification"
    metrics: tuple[str, ...] = ()
    hub: tuple[str, str] | None = None
    entities: bool = False
    no_answer: bool | None = None
    header: tuple[str, ...] = ()

    @property
    def measured(self) -> tuple[str, ...]:
        """What is measured, the first decides: as the task has it, else as its kind has."""
        return self.metrics or KINDS[self.kind].metrics


# The second names are those of the tsv files that GLUE itself distributes.
_glue = partial(Task, metrics=("accuracy",))
_NLI = ("entailment", "neutral", "contradiction")
_ANSWERS = ("entailment", "not_entailment")
_TEXTS, _PAIRS, _LABELS = (
    ("text", "sentence", "sentence1"),
    ("pair", "text_pair", "sentence2"),
    ("label", "labels", "score"),
)
_TOKENS = partial(Task, text=("tokens", "words"), label=("ner_tags", "tags", "labels"), kind="tokens")
_QUESTIONS = partial(Task, text=("question",), pair=("context",), label=("answers",), kind="spans")

TASKS = {
    "banking77": Task(text=("text",)),
    "mr": Task(text=("text",), metrics=("accuracy",)),
    "subj": Task(text=("text",), metrics=("accuracy",)),
    "wnut17": _TOKENS(entities=True),
    "cola": _glue(
        text=("sentence",),
        labels=("unacceptable", "acceptable"),
        metrics=("matthews", "accuracy"),
        hub=("nyu-mll/glue", "cola"),
        header=("source", "label", "star", "sentence"),
    ),
    "mnli": _glue(
        text=("premise", "sentence1"),
        pair=("hypothesis", "sentence2"),
        label=("label", "gold_label"),
        labels=_NLI,
        hub=("nyu-mll/glue", "mnli"),
    ),
    "mrpc": _glue(
        text=("sentence1", "#1 String"),
        pair=("sentence2", "#2 String"),
        label=("label", "Quality"),
        labels=("not_equivalent", "equivalent"),
        metrics=PAIR,
        hub=("nyu-mll/glue", "mrpc"),
    ),
    "qnli": _glue(text=("question",), pair=("sentence",), labels=_ANSWERS, hub=("nyu-mll/glue", "qnli")),
    "qqp": _glue(
        text=("question1",),
        pair=("question2",),
        label=("label", "is_duplicate"),
        labels=("not_duplicate", "duplicate"),
        metrics=PAIR,
        hub=("nyu-mll/glue", "qqp"),
    ),
    "rte": _glue(text=("sentence1",), pair=("sentence2",), labels=_ANSWERS, hub=("nyu-mll/glue", "rte")),
    "sst2": _glue(text=("sentence",), labels=("negative", "positive"), hub=("nyu-mll/glue", "sst2")),
    "stsb": _glue(
        text=("sentence1",),
        pair=("sentence2",),
        label=("label", "score"),
        kind="regression",
        metrics=(),
        hub=("nyu-mll/glue", "stsb"),
    ),
    "wnli": _glue(
        text=("sentence1",),
        pair=("sentence2",),
        labels=("not_entailment", "entailment"),
        hub=("nyu-mll/glue", "wnli"),
    ),
    "squad": _QUESTIONS(hub=("rajpurkar/squad", "plain_text"), no_answer=False),
    "squad_v2": _QUESTIONS(hub=("rajpurkar/squad_v2", "squad_v2"), no_answer=True),
    "text-classification": Task(text=_TEXTS, label=_LABELS),
    "text-pair-classification": Task(text=_TEXTS, pair=_PAIRS, label=_LABELS),
    "multi-label-classification": Task(text=_TEXTS, label=("labels", "label"), kind="multilabel"),
    "regression": Task(text=_TEXTS, label=_LABELS, kind="regression"),
    "token-classification": _TOKENS(),
    "ner": _TOKENS(entities=True),
    "question-answering": _QUESTIONS(),
    "sentence-embedding": Task(
        text=_TEXTS, pair=_PAIRS, label=("score", "similarity_score", "label"), kind="embedding"
    ),
}
