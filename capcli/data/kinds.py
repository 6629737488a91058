"""The kinds of tasks: one row says what depends on the kind of a task.

What takes a function per kind is a table by the same names where that function is at home: `labels.PARSERS`,
`classes.CODERS`, `task_losses.TASK_LOSSES` and `DISTILLATIONS`, `metrics.METRICS`, `answers.ANSWERS`,
`chance.CONSTANTS`, `classifiers.LINEAR`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NO_LABEL = -100  # of a token, which the loss leaves out


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One row of the table of kinds.

    tag: how the hub calls the kind. head: the class of transformers that makes its networks. problem: how a
    configuration of transformers names the kind, where several kinds share the head. per_token: whether the network
    answers for each token, not for the whole input.

    What an example is. words: the words of a sentence, each with a label of its own. windows: a question and a context
    that is divided into windows, the answer is a piece of it. order: whether the words may change places and leave the
    labels where they are.

    What its label is. classes: the labels are names of classes, and the network has an output for each. single: an
    example has exactly one class; only then there are supervised contrastive terms and a calibration error. several: an
    example has any number of classes. numbers: it is a number, on a scale of the data. groups: what counts is the order
    of the numbers of examples that belong together, the documents of a query; to transformers it is a regression.

    What the network puts out where it is no class. outputs: their names. own_head: they mean the same in every task,
    so that a model has no labels and keeps the head that it has.

    Where there is no head. vectors: the network is an encoder that gives a vector for each text; the second text of an
    example is one by itself, and the score of both is a number that an example may do without. What it learns is the
    vectors of the model before pruning.

    metrics: what is measured unless the task says otherwise, the first decides; plain_metrics: the same where words
    have labels that mark no entities. agreements, plain_agreements: what is measured where the answers of another model
    take the place of labels, and of vectors besides what labels say; `agreement`, where it is one of them, is the share
    of equal answers. texts: a built-in
    task that stands in for a model's own texts.
    """

    tag: str
    head: str = "AutoModelForSequenceClassification"
    problem: str = ""
    per_token: bool = False
    words: bool = False
    windows: bool = False
    order: bool = True
    classes: bool = False
    single: bool = False
    several: bool = False
    numbers: bool = False
    groups: bool = False
    outputs: tuple[str, ...] = ()
    own_head: bool = False
    vectors: bool = False
    metrics: tuple[str, ...]
    plain_metrics: tuple[str, ...] = ()
    agreements: tuple[str, ...] = ()
    plain_agreements: tuple[str, ...] = ()
    texts: str = "mr"

    def n_outputs(self, n_labels: int) -> int:
        """How many outputs a network has for a task with `n_labels` classes; none without a head."""
        return n_labels if self.classes else len(self.outputs)


KINDS = {
    "classification": Kind(
        tag="text-classification",
        classes=True,
        single=True,
        metrics=("accuracy", "macro_f1"),
        agreements=("agreement",),
    ),
    "regression": Kind(
        tag="text-classification",
        problem="regression",
        numbers=True,
        outputs=("score",),
        metrics=("pearson", "spearman"),
        agreements=("agreement_pearson", "agreement_spearman"),
    ),
    "ranking": Kind(
        tag="text-classification",
        problem="regression",
        numbers=True,
        groups=True,
        outputs=("score",),
        metrics=("ndcg", "mrr", "pearson", "spearman"),
    ),
    "multilabel": Kind(
        tag="text-classification",
        problem="multi_label_classification",
        classes=True,
        several=True,
        metrics=("micro_f1", "macro_f1", "subset_accuracy"),
        agreements=("agreement", "agreement_f1"),
    ),
    "tokens": Kind(
        tag="token-classification",
        head="AutoModelForTokenClassification",
        per_token=True,
        words=True,
        order=False,
        classes=True,
        metrics=("f1", "precision", "recall", "accuracy"),
        plain_metrics=("accuracy", "macro_f1"),
        agreements=("agreement_f1", "agreement"),
        plain_agreements=("agreement",),
        texts="wnut17",
    ),
    "spans": Kind(
        tag="question-answering",
        head="AutoModelForQuestionAnswering",
        per_token=True,
        windows=True,
        outputs=("start", "end"),
        own_head=True,
        metrics=("f1", "exact_match"),
        agreements=("agreement_f1", "agreement"),
    ),
    "embedding": Kind(
        tag="sentence-similarity",
        head="AutoModel",
        own_head=True,
        vectors=True,
        metrics=("spearman", "pearson"),
        agreements=("cosine", "recall_at_10"),
    ),
}


def meant(possible: Sequence[str], problem: str | None, n_labels: int) -> str:
    """Which of the kinds that share a head a configuration is for: as it says, or by its number of labels."""
    named = [kind for kind in possible if KINDS[kind].problem and KINDS[kind].problem == problem]
    sized = [kind for kind in possible if len(KINDS[kind].outputs) == n_labels]
    return [*named, *sized, *possible][0]
