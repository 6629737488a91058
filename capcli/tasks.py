"""The only boundary to data sets: the task table, columns, labels by name.

Letters: N examples.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli import hub
from capcli.config import BUILTIN_TASKS, TaskConfig
from capcli.errors import DataError

BUILTIN_FOLDER = Path(__file__).parent / "data" / "tasks"
SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl")
EVAL_SPLITS = ("validation", "validation_matched", "validation_mismatched", "dev", "dev_matched", "dev_mismatched")
SINGLE, PAIR, REGRESSION = ("accuracy", "macro_f1"), ("accuracy", "f1"), ("pearson", "spearman")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of the task table. `text` and `pair` list accepted column names, the official one first."""

    text: tuple[str, ...]
    pair: tuple[str, ...] = ()
    label: tuple[str, ...] = ("label",)
    labels: tuple[str, ...] = ()
    kind: str = "classification"
    metrics: tuple[str, ...] = SINGLE
    hub: tuple[str, str] | None = None


def _glue(
    name: str, text: str, pair: str, labels: Sequence[str], metrics: Sequence[str], kind: str = "classification"
) -> Task:
    return Task(
        text=(text,),
        pair=(pair,) if pair else (),
        labels=tuple(labels),
        metrics=tuple(metrics),
        kind=kind,
        hub=("nyu-mll/glue", name),
    )


_NLI = ("entailment", "neutral", "contradiction")
_ANSWERS = ("entailment", "not_entailment")
_TEXTS, _PAIRS, _LABELS = (
    ("text", "sentence", "sentence1"),
    ("pair", "text_pair", "sentence2"),
    ("label", "labels", "score"),
)

TASKS = {
    "banking77": Task(text=("text",)),
    "mr": Task(text=("text",), metrics=("accuracy",)),
    "subj": Task(text=("text",), metrics=("accuracy",)),
    "cola": _glue("cola", "sentence", "", ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    "mnli": _glue("mnli", "premise", "hypothesis", _NLI, ("accuracy",)),
    "mrpc": _glue("mrpc", "sentence1", "sentence2", ("not_equivalent", "equivalent"), PAIR),
    "qnli": _glue("qnli", "question", "sentence", _ANSWERS, ("accuracy",)),
    "qqp": _glue("qqp", "question1", "question2", ("not_duplicate", "duplicate"), PAIR),
    "rte": _glue("rte", "sentence1", "sentence2", _ANSWERS, ("accuracy",)),
    "sst2": _glue("sst2", "sentence", "", ("negative", "positive"), ("accuracy",)),
    "stsb": _glue("stsb", "sentence1", "sentence2", (), REGRESSION, kind="regression"),
    "wnli": _glue("wnli", "sentence1", "sentence2", ("not_entailment", "entailment"), ("accuracy",)),
    "text-classification": Task(text=_TEXTS, label=_LABELS),
    "text-pair-classification": Task(text=_TEXTS, pair=_PAIRS, label=_LABELS),
    "regression": Task(text=_TEXTS, label=_LABELS, kind="regression", metrics=REGRESSION),
}


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split as read: texts, second texts or None, labels (class indices or numbers) [N]."""

    name: str
    texts: list[str]
    pairs: list[str] | None
    labels: NDArray[np.generic]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: NDArray[np.int64]) -> Split:
        """The given rows, in their order."""
        pairs = None if self.pairs is None else [self.pairs[i] for i in rows]
        return Split(name=self.name, texts=[self.texts[i] for i in rows], pairs=pairs, labels=self.labels[rows])


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
    def primary(self) -> str:
        """The metric that decides."""
        return self.metrics[0]


# Reading -------------------------------------------------------------------------------------------------------------


def load(
    config: TaskConfig,
    *,
    train: bool = True,
    holdout: float = 0.0,
    max_train: int = 0,
    seed: int = 0,
    labels: Sequence[str] = (),
) -> TaskData:
    """Read a task's splits; labels become indices by name.

    `labels` are the classes of a model, for sets that name none. Without `train`, a set that has only a training split
    is measured on the part that `holdout` and `seed` held out of it, or on the whole.

    Raises `DataError` for a missing or empty split, a missing column, missing texts and unknown or missing labels.
    """
    task = TASKS[config.task]
    raw = _read_hub(task, config.task) if not config.data and config.task not in BUILTIN_TASKS else _read_local(config)
    wanted = _wanted(raw, train, holdout, config)
    names, kind = _label_names(task, raw, wanted, config, labels), task.kind
    notes: list[str] = []
    splits = {name: _split(name, raw[name], task, names, config) for name in wanted}
    trained = splits.pop("train", None) if train else None
    held = None
    if trained is not None:
        trained, held = _subsets(trained, holdout, max_train, seed)
        if not splits:
            splits, held = {"holdout": _need_holdout(held)}, None
            notes.append("no evaluation split: evaluated on the held-out part of the training set")
        _check_training_labels(trained, kind)
    if not train and holdout and list(splits) == ["train"]:
        splits = {"holdout": _need_holdout(_subsets(splits["train"], holdout, 0, seed)[1])}
    evals = {name: cut(split, config.max_eval_samples, 0) for name, split in splits.items()}
    metrics = _metrics(task, names)
    return TaskData(
        name=config.task,
        kind=kind,
        labels=names,
        metrics=metrics,
        train=trained,
        holdout=held,
        evals=evals,
        notes=tuple(notes),
    )


def _metrics(task: Task, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(m for m in task.metrics if m != "f1" or len(names) == 2) or ("accuracy",)


def _read_local(config: TaskConfig) -> dict[str, Any]:
    """Tables by split name from a folder of splits or one file, which becomes the training split."""
    path = Path(config.data) if config.data else BUILTIN_FOLDER / config.task
    if path.is_file():
        return {"train": _read_table(path)}
    if not path.is_dir():
        raise DataError(f"no data at {path}", "--data takes a folder of splits or one parquet, csv, tsv or jsonl file")
    found = {p.stem: p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES}
    if not found:
        raise DataError(
            f"no data files in {path}", f"expected files such as train.parquet; known endings: {', '.join(SUFFIXES)}"
        )
    known = {"train", "test", *EVAL_SPLITS}
    tables = {name: file for name, file in found.items() if name in known}
    if not tables:
        raise DataError(f"no split in {path}: found {', '.join(found)}", "name the files train, validation and test")
    return {name: _read_table(file) for name, file in tables.items()}


def _read_table(path: Path) -> Any:
    """A file as a `datasets.Dataset`, in memory. Quotes mean nothing in a tsv, as in GLUE's own files."""
    import pandas  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]
    from datasets import Dataset

    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is no {', '.join(SUFFIXES)} file", "convert the data to one of these")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    try:
        if path.suffix == ".parquet":
            table = Dataset(pyarrow.parquet.read_table(path))
        elif path.suffix == ".jsonl":
            table = Dataset.from_pandas(pandas.read_json(path, lines=True, dtype=False))
        else:
            quoting = csv.QUOTE_NONE if path.suffix == ".tsv" else csv.QUOTE_MINIMAL
            separator = "\t" if path.suffix == ".tsv" else ","
            frame = pandas.read_csv(path, sep=separator, quoting=quoting, dtype=str, keep_default_na=False)
            table = Dataset.from_pandas(frame)
    except Exception as error:
        raise DataError(f"cannot read {path}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if len(table) == 0:
        raise DataError(f"{path} has no rows")
    return table


def _read_hub(task: Task, name: str) -> dict[str, Any]:
    import datasets

    if task.hub is None:
        raise DataError(f"task {name} needs your own data", "name a file or folder with --data")
    return {
        split: datasets.concatenate_datasets([_read_table(file) for file in files])
        for split, files in hub.data_set(*task.hub).items()
    }


def _wanted(raw: Mapping[str, Any], train: bool, holdout: float, config: TaskConfig) -> list[str]:
    """Names of the splits to use: train, then the evaluation splits; `test` only when there is no other."""
    where = config.data or config.task
    evals = [name for name in EVAL_SPLITS if name in raw] or [name for name in ("test",) if name in raw]
    if train and "train" not in raw:
        raise DataError(f"{where} has no train split, only {', '.join(raw)}")
    if not evals and not train:
        return ["train"]
    if not evals and not holdout:
        raise DataError(
            f"{where} has no validation or test split to evaluate on", "add one, or hold out a part: --holdout 0.1"
        )
    return ["train", *evals] if train else evals


# Labels --------------------------------------------------------------------------------------------------------------


def _column(table: Any, names: Sequence[str], chosen: str, what: str, split: str) -> str:
    if chosen:
        names = (chosen,)
    for name in names:
        if name in table.column_names:
            return name
    raise DataError(
        f"the {split} split has no {what} column {names[0]!r}; its columns: {', '.join(table.column_names)}",
        f"name it with --{what}-column",
    )


def _label_names(
    task: Task, raw: Mapping[str, Any], wanted: Sequence[str], config: TaskConfig, labels: Sequence[str]
) -> tuple[str, ...]:
    """Names of the classes by index: of the task, of the ClassLabel feature, of the model, or those that occur."""
    if task.kind == "regression" or task.labels:
        return task.labels
    table = raw[wanted[0]]
    column = _column(table, task.label, config.label_column, "label", wanted[0])
    feature = table.features[column]
    if getattr(feature, "names", None):
        return tuple(feature.names)
    if labels:
        return tuple(labels)
    values = {_as_name(value) for value in table[column] if not _is_missing(value)}
    if not values:
        raise DataError(f"column {column!r} of the {wanted[0]} split holds no labels")
    if len(values) > 1000:
        raise DataError(f"column {column!r} holds {len(values)} different labels", "for numbers use --task regression")
    numeric = all(map(_is_number, values))
    return tuple(sorted(values, key=(lambda v: (int(v), v)) if numeric else (lambda v: (v.casefold(), v))))


def _as_name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _is_number(name: str) -> bool:
    return re.fullmatch(r"-?\d{1,18}", name) is not None


def label_key(*tables: Sequence[str]) -> Callable[[str], str]:
    """How label names are compared: without regard to case, unless names of one table differ in nothing else."""
    alike = all(len({name.casefold() for name in names}) == len(names) for names in tables)
    return str.casefold if alike else str


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _split(name: str, table: Any, task: Task, names: Sequence[str], config: TaskConfig) -> Split:
    texts = _texts(table, _column(table, task.text, config.text_column, "text", name), name)
    pairs = None
    if task.pair or config.pair_column:
        pairs = _texts(table, _column(table, task.pair, config.pair_column, "pair", name), name)
    column = _column(table, task.label, config.label_column, "label", name)
    values = list(table[column])
    missing = [i for i, value in enumerate(values) if _is_missing(value)]
    if missing:
        raise DataError(f"{len(missing)} labels of the {name} split are missing, the first in row {missing[0]}")
    if task.kind == "regression":
        labels: NDArray[np.generic] = _numbers(values, column, name)
    else:
        labels = _indices(values, getattr(table.features[column], "names", None), names, name)
    return Split(name=name, texts=texts, pairs=pairs, labels=labels)


def _texts(table: Any, column: str, split: str) -> list[str]:
    values = list(table[column])
    wrong = [i for i, value in enumerate(values) if not isinstance(value, str)]
    if wrong:
        what = "missing" if values[wrong[0]] is None else f"of type {type(values[wrong[0]]).__name__}"
        raise DataError(
            f"{len(wrong)} texts in column {column!r} of the {split} split are not text; row {wrong[0]} is {what}"
        )
    return values


def _numbers(values: Sequence[Any], column: str, split: str) -> NDArray[np.float64]:
    try:
        numbers = np.asarray([float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise DataError(f"column {column!r} of the {split} split does not hold numbers: {error}") from error
    if not np.isfinite(numbers).all():
        raise DataError(f"column {column!r} of the {split} split holds values that are not finite")
    return numbers


def _indices(values: Sequence[Any], own: Sequence[str] | None, names: Sequence[str], split: str) -> NDArray[np.int64]:
    """Labels as indices into `names`: by name when they are strings or named codes, else as codes.

    Names that are numbers are names only: among classes 1 and 2, a label 0 is unknown and not the first class.
    """
    key = label_key(names)
    index: dict[str, int] = {key(name): i for i, name in enumerate(names)}
    codes = range(0) if any(map(_is_number, names)) else range(len(names))
    table: dict[Any, int | None] = {}
    if any(isinstance(value, list | dict) for value in values):
        raise DataError(f"the labels of the {split} split are lists or objects, not single labels")
    for value in set(values):
        if own is not None and not isinstance(value, str) and 0 <= value < len(own):
            table[value] = index.get(key(own[int(value)]))
            continue
        name = _as_name(value)
        code = int(name) if _is_number(name) and int(name) in codes else None
        table[value] = index.get(key(name), code)
    unknown = sorted(str(value) for value, code in table.items() if code is None)
    if unknown == ["-1"] and len(table) == 1:
        raise DataError(f"the labels of the {split} split are hidden (-1)", "use a split with labels")
    if unknown:
        shown = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise DataError(f"unknown labels in the {split} split: {shown}; the task has {', '.join(names[:10])}")
    return np.asarray([table[value] for value in values], dtype=np.int64)


def _check_training_labels(train: Split, kind: str) -> None:
    if len(train) == 0:
        raise DataError("the training set is empty")
    if len(np.unique(train.labels)) < 2:
        raise DataError("all training examples have the same label, there is nothing to learn")


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
    return cut(rest, max_train, seed), Split(name="holdout", texts=held.texts, pairs=held.pairs, labels=held.labels)


def _need_holdout(held: Split | None) -> Split:
    assert held is not None, "_wanted lets no set without evaluation split and holdout through"
    return held
