"""The task table, columns and labels by name: what a task reads from its tables.

Letters: N examples, C labels.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli import hub, labels, literals, metrics, perturb, splits, tables
from capcli.config import BUILTIN_TASKS, TaskConfig
from capcli.errors import DataError
from capcli.labels import Labels
from capcli.names import finder, number, order, shown
from capcli.perturb import Change
from capcli.splits import Found
from capcli.tables import Table

BUILTIN_FOLDER = Path(__file__).parent / "data" / "tasks"
SINGLE, PAIR, REGRESSION = ("accuracy", "macro_f1"), ("accuracy", "f1"), ("pearson", "spearman")
MULTILABEL = ("micro_f1", "macro_f1", "subset_accuracy")
ENTITIES, TAGS = ("f1", "precision", "recall", "accuracy"), ("accuracy", "macro_f1")
SPANS = ("f1", "exact_match")
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

    text, pair, label: accepted column names, the official one first. kind: `classification`, `regression`,
    `multilabel`, `tokens` (one label per word; text holds the words) or `spans` (text is the question, pair the context
    with the answer). entities: whether the labels must be of the kind O, B-person, I-person. no_answer: whether there
    are questions that their context does not answer; None: as the data has it. header: the columns of a tsv without
    one.
    """

    text: tuple[str, ...]
    pair: tuple[str, ...] = ()
    label: tuple[str, ...] = ("label",)
    labels: tuple[str, ...] = ()
    kind: str = "classification"
    metrics: tuple[str, ...] = SINGLE
    hub: tuple[str, str] | None = None
    entities: bool = False
    no_answer: bool | None = None
    header: tuple[str, ...] = ()


# The second names are those of the tsv files that GLUE itself distributes.
_glue = partial(Task, metrics=("accuracy",))
_NLI = ("entailment", "neutral", "contradiction")
_ANSWERS = ("entailment", "not_entailment")
_TEXTS, _PAIRS, _LABELS = (
    ("text", "sentence", "sentence1"),
    ("pair", "text_pair", "sentence2"),
    ("label", "labels", "score"),
)
_TOKENS = partial(Task, text=("tokens", "words"), label=("ner_tags", "tags", "labels"), kind="tokens", metrics=ENTITIES)
_QUESTIONS = partial(Task, text=("question",), pair=("context",), label=("answers",), kind="spans", metrics=SPANS)

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
        metrics=REGRESSION,
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
    "multi-label-classification": Task(text=_TEXTS, label=("labels", "label"), kind="multilabel", metrics=MULTILABEL),
    "regression": Task(text=_TEXTS, label=_LABELS, kind="regression", metrics=REGRESSION),
    "token-classification": _TOKENS(),
    "ner": _TOKENS(entities=True),
    "question-answering": _QUESTIONS(),
}


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split: its texts are read from `table` when they are needed, its labels are here.

    columns: of the text and, for two texts, of the second. rows: the rows of the table that belong to it, ascending;
    None for all. labels: int64 [N] for classification, float64 [N] for regression, uint8 [N, C] for multilabel, an
    object array [N] of int64 arrays (one label per word) for tokens and of `Answers` for spans. no_answer: for spans,
    whether a question may have no answer. lists: for tokens, whether the words are lists written as text. change: what
    is done to each text while it is read; for spans to the questions alone, since the answers stand in the contexts.
    """

    name: str
    table: Table
    columns: tuple[str, ...]
    labels: NDArray[Any]
    kind: str = "classification"
    rows: NDArray[np.int64] | None = None
    no_answer: bool = False
    lists: bool = False
    change: Change | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """sha256, as hex, of the texts, by the table, the columns and the rows that they are read from."""
        rows = b"all" if self.rows is None else self.rows.astype("<i8").tobytes()
        changed = () if self.change is None else (perturb.VERSION, self.change.name, self.change.seed)
        read = changed if not self.lists else ("lists", *changed)
        return hashlib.sha256(repr((self.table.fingerprint, self.columns, read)).encode() + rows).hexdigest()

    @property
    def paired(self) -> bool:
        """Whether there are two texts per example."""
        return len(self.columns) == 2

    def row(self, index: int) -> int:
        """The row of the table, from 0, that example `index` stands in."""
        return index if self.rows is None else int(self.rows[index])

    def take(self, rows: NDArray[np.int64]) -> Split:
        """The examples with the given indices, which ascend."""
        assert bool((np.diff(rows) > 0).all()), "texts are read in the order of the table"
        chosen = rows if self.rows is None else self.rows[rows]
        return dataclasses.replace(self, labels=self.labels[rows], rows=chosen)

    def chunks(self, size: int = tables.BATCH_ROWS) -> Iterator[tuple[list[Any], list[str] | None]]:
        """(texts, second texts or None) of all examples in order, at most `size` at a time.

        A text is a string; for tokens it is the list of its words.

        Raises:
            DataError: a missing text or one of another type, naming its row; a column in which all texts are empty; a
                sentence with more or fewer words than labels.
        """
        done, empty = 0, set(self.columns)
        for batch in self._selected(size):
            columns = [
                [
                    self._changed(self._text(cell, column, done + i), place, done + i)
                    for i, cell in enumerate(batch[column])
                ]
                for place, column in enumerate(self.columns)
            ]
            empty -= {c for c, texts in zip(self.columns, columns, strict=True) if any(map(_has_text, texts))}
            yield columns[0], columns[1] if self.paired else None
            done += len(columns[0])
        if done and empty:
            raise DataError(f"every text in column {min(empty)!r} of the {self.name} split is empty")

    def _selected(self, size: int) -> Iterator[tables.Columns]:
        """The text columns of the rows of this split, `size` rows at a time (fewer at the end)."""
        if self.rows is None:
            yield from self.table.batches(self.columns, size)
            return
        begin = n_read = 0
        held: tables.Columns = {column: [] for column in self.columns}
        for batch in self.table.batches(self.columns, size):
            n_read += len(batch[self.columns[0]])
            end = int(np.searchsorted(self.rows, n_read))
            places = self.rows[begin:end] - (n_read - len(batch[self.columns[0]]))
            for column, values in held.items():
                values += [batch[column][i] for i in places]
            begin = end
            while len(held[self.columns[0]]) >= size or (begin == len(self) and held[self.columns[0]]):
                yield {column: values[:size] for column, values in held.items()}
                held = {column: values[size:] for column, values in held.items()}
            if begin == len(self):
                return

    def _text(self, cell: Any, column: str, index: int) -> Any:
        """A text as the tokenizer takes it: a string, or the words of a sentence."""
        if self.kind == "tokens":
            words = self._words(cell, column, index) if isinstance(cell, str) else cell
            if not isinstance(words, list):
                raise self._wrong(column, index, _type_of(cell, "not a list of words"))
            for word in words:
                self._text_of(word, column, index)
            if len(words) != len(self.labels[index]):
                n = len(self.labels[index])
                raise self._wrong(column, index, f"has {len(words)} words but {n} labels")
            return words
        return self._text_of(cell, column, index)

    def _words(self, cell: str, column: str, index: int) -> list[Any]:
        """The words of a text: between spaces, or of a list if those of this split are lists written as text."""
        found = literals.listed(cell)
        if self.lists and found is None:
            raise self._wrong(column, index, f"holds {cell[:60]!r}, where a list written as text is expected")
        if not self.lists and found and all(isinstance(word, str) for word in found):
            raise self._wrong(column, index, "is a list written as text, where words with spaces between are expected")
        return found if self.lists and found is not None else cell.split()

    def _changed(self, text: Any, place: int, index: int) -> Any:
        if self.change is None or (self.kind == "spans" and place):
            return text
        return self.change.of(text, self.row(index), place)

    def _text_of(self, cell: Any, column: str, index: int) -> str:
        if not isinstance(cell, str):
            raise self._wrong(column, index, _type_of(cell, "not text"))
        if not (cell.isascii() or _is_unicode(cell)):
            raise self._wrong(column, index, "holds half of a surrogate pair, which is not text")
        return cell

    def _wrong(self, column: str, index: int, what: str) -> DataError:
        return DataError(f"row {self.row(index)} of column {column!r} of the {self.name} split {what}")


def _has_text(text: Any) -> bool:
    return bool(text.strip() if isinstance(text, str) else text)


def _type_of(cell: Any, expected: str) -> str:
    return "is missing" if cell is None else f"is of type {type(cell).__name__}, {expected}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """A task's splits: train (None when only evaluating), holdout (None unless asked for), evaluation splits."""

    name: str
    kind: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    train: Split | None
    holdout: Split | None
    evals: dict[str, Split]
    notes: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of what a model's outputs stand for; None where they have no names."""
        return None if self.kind in ("regression", "spans") else self.labels

    @property
    def no_answer(self) -> bool:
        """For spans, whether a question may have no answer."""
        return any(split.no_answer for split in self.evals.values())

    @property
    def primary(self) -> str:
        """The metric that decides."""
        return self.metrics[0]

    @property
    def legend(self) -> str:
        """The code of each label and its name, such as `0 negative, 1 positive`, of the first of many."""
        names = shown([f"{code} {name}" for code, name in enumerate(self.labels)], 20)
        return names + (f" ({len(self.labels)})" if len(self.labels) > 20 else "")


# Reading -------------------------------------------------------------------------------------------------------------


def load(
    config: TaskConfig,
    *,
    train: bool = True,
    holdout: float = 0.0,
    max_train: int = 0,
    seed: int = 0,
    known: Sequence[str] = (),
    perhaps: Sequence[str] = (),
    no_answer: bool | None = None,
    spare: float = 0.0,
) -> TaskData:
    """Open a task's splits and read their labels, which become indices by name; texts are read later.

    `known` are the classes of a model of ours, for sets that name none, and `perhaps` those of another model, taken if
    they cover what occurs; `no_answer` is whether the model may answer nothing; `spare` is the share of the training
    split to hold out when no other split is there to evaluate on. Without `train`, a set that has only a training split
    is measured on the part that `holdout` and `seed` held out of it, or on the whole. A label is one of the classes by
    name or, as a number, by value (see `names.finder`); only the tasks of the table with names have codes.

    Raises `DataError` for a missing or empty split, a missing column, and unknown or missing labels.
    """
    task = TASKS[config.task]
    files, sources = _sources(task, config)
    wanted = _wanted(files, train, holdout or spare, config)
    holdout = holdout or (spare if train and wanted == ["train"] else 0.0)
    opened = {name: sources[name]() for name in wanted}
    read = {name: _read(name, table, task, config) for name, table in opened.items()}
    found, notes = labels.separated({name: one for name, (_, one) in read.items()}, known or perhaps)
    aliases = config.label_names
    names, new = _label_names(task, found, perhaps, aliases) if not known or task.labels else (tuple(known), [])
    find = finder(names, aliases, codes=bool(task.labels))
    empty = _no_answer(task, found, no_answer)
    parts = {
        name: Split(
            name=name,
            table=opened[name],
            columns=texts,
            labels=labels.coded(found[name], names, find),
            kind=task.kind,
            no_answer=empty,
            lists=task.kind == "tokens" and _begins_with_list(opened[name], texts[0]),
        )
        for name, (texts, _) in read.items()
    }
    notes += [*files.notes, *(note for table in opened.values() for note in table.notes)]
    notes += [*_list_notes(found, parts), *new, *labels.remarks(found, names, find)]
    trained = parts.pop("train", None) if train else None
    held = None
    if trained is not None:
        trained, held = _subsets(trained, holdout, max_train, seed)
        whole = len(found["train"].values) - len(held or ())
        if len(trained) < whole:
            notes.append(f"train: {len(trained):,} of {whole:,} examples")
        if not parts:
            parts, held = {"holdout": _need_holdout(held)}, None
            notes.append("no evaluation split: evaluated on the held-out part of the training set")
        _check_training_labels(trained)
    if not train and holdout and list(parts) == ["train"]:
        parts = {"holdout": _need_holdout(_subsets(parts["train"], holdout, 0, seed)[1])}
    evals = {name: cut(split, config.max_eval_samples, 0) for name, split in parts.items()}
    sizes = {name: (len(split), len(parts[name])) for name, split in evals.items()}
    notes += [f"{name}: {n:,} of {total:,} examples" for name, (n, total) in sizes.items() if n < total]
    if "test" in evals:
        notes.append("no validation split: evaluated on test")
    elif config.data and (spared := sorted(name for name in files.files if name.startswith("test"))):
        notes.append(f"evaluated on {', '.join(evals)}; not used: {', '.join(spared)}")
    return TaskData(
        name=config.task,
        kind=task.kind,
        labels=names,
        metrics=_metrics(task, names),
        train=trained,
        holdout=held,
        evals=evals,
        notes=tuple(notes),
    )


def _list_notes(found: Mapping[str, Labels], parts: Mapping[str, Split]) -> list[str]:
    """Which columns hold lists that were written as text."""
    places = [(split.columns[0], name) for name, split in parts.items() if split.lists]
    places += [(one.columns[0], name) for name, one in found.items() if one.lists]
    columns = {column: [name for other, name in places if other == column] for column, _ in places}
    return [f"lists written as text in column {c!r} were read as lists: {', '.join(n)}" for c, n in columns.items()]


def _metrics(task: Task, names: Sequence[str]) -> tuple[str, ...]:
    if task.kind == "tokens":
        return ENTITIES if metrics.is_entity_scheme(names) else TAGS
    if task.kind != "classification":
        return task.metrics
    return tuple(m for m in task.metrics if m != "f1" or len(names) == 2) or ("accuracy",)


def _sources(task: Task, config: TaskConfig) -> tuple[Found, dict[str, Callable[[], Table]]]:
    """The files of the splits, and what opens the table of each."""
    if config.data or config.task in BUILTIN_TASKS:
        found = splits.find(Path(config.data) if config.data else BUILTIN_FOLDER / config.task)
    elif task.hub is not None:
        found = Found(files=hub.data_set(*task.hub), unread={}, notes=())
    else:
        raise DataError(f"task {config.task} needs your own data", "name a file or folder with --data")
    # A few rows of GLUE's own qqp/train.tsv are broken, and every reader of it leaves them out.
    glue = task.hub is not None and task.hub[0] == "nyu-mll/glue"
    opened = partial(tables.open_files, header=task.header, lenient=glue)
    return found, {name: partial(opened, files) for name, files in found.files.items()}


def _wanted(found: Found, train: bool, holdout: float, config: TaskConfig) -> list[str]:
    """Names of the splits to use: train, then the evaluation splits; `test` only when there is no other."""
    where, rest = config.data or config.task, "".join(f"; {note}" for note in found.notes)
    evals = [name for name in splits.EVALS if name in found.files]
    for name in (*(["train"] if train else []), *(() if evals else splits.EVALS)):
        if name in found.unread:  # before another takes its place
            raise tables.refusal(found.unread[name])
    evals = evals or [name for name in ("test",) if name in found.files]
    if train and "train" not in found.files:
        raise DataError(
            f"{where} has no train split, only {', '.join(found.files)}{rest}",
            "name the training file train, as train.csv",
        )
    if not evals and not train:
        return ["train"]
    if not evals and not holdout:
        raise DataError(
            f"{where} has no validation or test split to evaluate on{rest}",
            "add one, or hold out a part: --holdout 0.1",
        )
    return ["train", *evals] if train else evals


# Columns and labels --------------------------------------------------------------------------------------------------


def _read(name: str, table: Table, task: Task, config: TaskConfig) -> tuple[tuple[str, ...], Labels]:
    """The columns of the texts, and the labels."""
    labelled = {config.label_column, *task.label, *LABEL_NAMES}
    texts = [_column(table, task.text, config.text_column, "text", name, labelled)]
    if config.pair_column and task.kind == "tokens":
        raise DataError(f"{config.task} reads one text, there is no second", "leave --pair-column out")
    if task.pair or config.pair_column:
        texts.append(_column(table, task.pair, config.pair_column, "pair", name, labelled.union(texts)))
    wanted = _label_columns(table, task, config, name, texts)
    if twice := {column for column in texts if [*texts, *wanted].count(column) > 1}:
        raise DataError(f"column {min(twice)!r} of the {name} split is to be read for two purposes", "name another one")
    return tuple(texts), labels.read(name, table, wanted, task.kind)


def _begins_with_list(table: Table, column: str) -> bool:
    """Whether the first cell of a column is a list of words written as text."""
    cell = next(iter(table.batches((column,), 1)))[column][0]
    found = literals.listed(cell) if isinstance(cell, str) else None
    return bool(found) and all(isinstance(word, str) for word in found or ())


def _column(
    table: Table, names: Sequence[str], chosen: str, what: str, split: str, others: Collection[str] = ()
) -> str:
    """The column to read; `others` are read for another purpose, so that no hint names them."""
    if chosen:
        names = (chosen,)
    for name in names:
        if name in table.columns:
            return name
    free = {column.casefold().strip(): column for column in table.columns if column not in others}
    close = difflib.get_close_matches(names[0].casefold(), free, n=1, cutoff=0.7)
    meant = free[close[0]] if close else None
    hint = f"did you mean --{what}-column {meant!r}?" if meant else f"name it with --{what}-column"
    if not meant and tables.ending(Path(table.name)).startswith((".csv", ".tsv")):
        hint += "; the file must begin with a header, a line such as text,label"
    raise DataError(
        f"the {split} split has no {what} column {names[0]!r}; its columns: {', '.join(map(repr, table.columns))}", hint
    )


def _label_columns(table: Table, task: Task, config: TaskConfig, split: str, texts: Sequence[str]) -> tuple[str, ...]:
    """The column of the labels; for multilabel also several, one per label."""
    chosen = config.label_column
    several = [name.strip() for name in chosen.split(",") if name.strip()]
    if task.kind == "multilabel" and len(several) > 1 and chosen not in table.columns:
        return tuple(_column(table, (), name, "label", split, texts) for name in dict.fromkeys(several))
    return (_column(table, task.label, chosen, "label", split, texts),)


def _label_names(
    task: Task, found: Mapping[str, Labels], perhaps: Sequence[str], aliases: Mapping[str, str]
) -> tuple[tuple[str, ...], list[str]]:
    """Names of the classes by index, and notes: those of the task, or of the first split as `labels.names_of` has it.

    A tag that occurs only in an evaluation split gets an index too, though nothing can learn it: the words that bear it
    are part of what is measured. It is no new one where it is a number and those of the first split are names.
    """
    if task.kind in ("regression", "spans") or task.labels:
        return task.labels, []
    first, *others = found.values()
    classes, notes = labels.names_of(first, perhaps, aliases), []
    if task.kind == "tokens" and not first.own_names:
        find, numeric = finder(classes, aliases), {number(name) is not None for name in classes}
        for one in others:
            labels.check_labelled(one, find)
        new = {name for one in others for name in labels.unknown(one, find) if (number(name) is not None) in numeric}
        notes = [f"only in evaluation, so never learned: {shown(order(new))}"] if new else []
        classes += tuple(order(new))
    if task.entities and not metrics.is_entity_scheme(classes):
        raise DataError(
            f"labels of entities are O or like B-person and I-person; the data has {shown(classes)}",
            "for other labels of words use --task token-classification",
        )
    return classes, notes


def _no_answer(task: Task, found: Mapping[str, Labels], known: bool | None) -> bool:
    """Whether a question may have no answer: as the task, the model or the first split has it."""
    fixed = task.no_answer if task.no_answer is not None else known
    if fixed is not None or task.kind != "spans":
        return bool(fixed)
    return any(not answers.texts for answers in next(iter(found.values())).values)


def _check_training_labels(train: Split) -> None:
    """There must be something to tell apart."""
    if len(train) == 0:
        raise DataError("the training set is empty")
    if train.kind == "spans":
        if not any(answers.texts for answers in train.labels):
            raise DataError("no question of the training set has an answer, there is nothing to learn")
        return
    codes = np.concatenate(list(train.labels)) if train.kind == "tokens" else train.labels
    if len(np.unique(codes, axis=0)) < 2:
        raise DataError(f"all {len(train)} training examples have the same label, there is nothing to learn")


# Subsets -------------------------------------------------------------------------------------------------------------


def cut(split: Split, limit: int, seed: int) -> Split:
    """At most `limit` examples, drawn at random by `seed`, in their own order; files are often sorted by class."""
    if not limit or limit >= len(split):
        return split
    return split.take(np.sort(np.random.default_rng(seed).permutation(len(split))[:limit]))


def _subsets(train: Split, holdout: float, max_train: int, seed: int) -> tuple[Split, Split | None]:
    if not holdout:
        return cut(train, max_train, seed), None
    order = np.random.default_rng([seed, 1]).permutation(len(train))
    n_held = max(1, round(holdout * len(train)))
    held, rest = train.take(np.sort(order[:n_held])), train.take(np.sort(order[n_held:]))
    return cut(rest, max_train, seed), dataclasses.replace(held, name="holdout")


def _need_holdout(held: Split | None) -> Split:
    assert held is not None, "_wanted lets no set without evaluation split and holdout through"
    return held
