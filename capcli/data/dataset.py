"""Opening the data of a task: which splits, which columns, which classes, what there is to say about them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from capcli.config.names import BUILTIN_TASKS, HUB_PREFIX
from capcli.config.task import TaskConfig
from capcli.data import entities, groups, labels, layout, library, literals, tables
from capcli.data.classes import check_labelled, coded, map_remarks, names_of, remarks, unknown
from capcli.data.incoming import Incoming
from capcli.data.kinds import KINDS
from capcli.data.labels import Labels
from capcli.data.layout import Found
from capcli.data.names import FLAGS, finder, key, number, order
from capcli.data.splits import Split, TaskData, need_holdout, subset, subsets
from capcli.data.tables import Table
from capcli.data.tasks import BUILTIN_FOLDER, LABEL_NAMES, TASKS, Task
from capcli.errors import ConfigError, DataError
from capcli.reporting.text import first_few
from capcli.sources import hub_data


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
    task = _task(config)
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
            labels=coded(found[name], names, find, codes=bool(task.labels)),
            kind=task.kind,
            no_answer=empty,
            lists=KINDS[task.kind].words and _begins_with_list(opened[name], texts[0]),
            groups=groups.read(opened[name], config.group_column, name) if KINDS[task.kind].groups else None,
        )
        for name, (texts, _) in read.items()
    }
    notes += [*files.notes, *(note for table in opened.values() for note in table.notes)]
    notes += [*_list_notes(found, parts), *new, *remarks(found, names, find)]
    notes += map_remarks(aliases, names, find, of_model=bool(known or perhaps))
    trained = parts.pop("train", None) if train else None
    held = None
    if trained is not None:
        trained, held = subsets(trained, holdout, max_train, seed)
        whole = len(found["train"].values) - len(held or ())
        if len(trained) < whole:
            notes.append(f"train: {len(trained):,} of {whole:,} examples")
        if not parts:
            parts, held = {"holdout": need_holdout(held)}, None
            notes.append("no evaluation split: evaluated on the held-out part of the training set")
        _check_training_labels(trained, names)
    if not train and holdout and list(parts) == ["train"]:
        parts = {"holdout": need_holdout(subsets(parts["train"], holdout, 0, seed)[1])}
    notes += groups.remarks(parts, config.group_column) if KINDS[task.kind].groups else []
    evals = {name: subset(split, config.max_eval_samples, 0) for name, split in parts.items()}
    sizes = {name: (len(split), len(parts[name])) for name, split in evals.items()}
    notes += [f"{name}: {n:,} of {total:,} examples" for name, (n, total) in sizes.items() if n < total]
    if "train" in evals and Path(config.data).is_dir():
        notes.append("no validation or test split: evaluated on train")
    if "test" in evals:
        notes.append("no validation split: evaluated on test")
    elif config.data and (spared := sorted(name for name in files.files if name.startswith("test"))):
        notes.append(f"evaluated on {', '.join(evals)}; not used: {', '.join(spared)}")
    return TaskData(
        name=config.task,
        kind=task.kind,
        labels=names,
        metrics=_metrics(task, names, scored=_all_scored(evals)),
        train=trained,
        holdout=held,
        evals=evals,
        notes=tuple(notes),
    )


def _task(config: TaskConfig) -> Task:
    """The row of the table, as ranking where rows are in groups. Raises `ConfigError` where nothing can be ranked."""
    task = TASKS[config.task]
    if not config.group_column:
        return task
    if not KINDS[task.kind].numbers:
        raise ConfigError(
            f"--group-column ranks by a number for each row, which {config.task} does not have", "use --task regression"
        )
    return dataclasses.replace(task, kind="ranking", metrics=())


def _list_notes(found: Mapping[str, Labels], parts: Mapping[str, Split]) -> list[str]:
    """Which columns hold lists that were written as text."""
    places = [(split.columns[0], name) for name, split in parts.items() if split.lists]
    places += [(one.columns[0], name) for name, one in found.items() if one.lists]
    columns = {column: [name for other, name in places if other == column] for column, _ in places}
    return [f"lists written as text in column {c!r} were read as lists: {', '.join(n)}" for c, n in columns.items()]


def _metrics(task: Task, names: Sequence[str], *, scored: bool) -> tuple[str, ...]:
    """What is measured with labels: words whose labels mark no entities have metrics of their own, F1 of one class
    needs two, and what may have no labels has no such metric then."""
    kind = KINDS[task.kind]
    if kind.vectors and not scored:
        return ()
    if kind.words and not entities.is_entity_scheme(names):
        return kind.plain_metrics
    if not kind.single:
        return task.measured
    return tuple(m for m in task.measured if m != "f1" or len(names) == 2) or ("accuracy",)


def _all_scored(evals: Mapping[str, Split]) -> bool:
    """Whether what is evaluated on has labels. Raises `DataError` where only some of it has."""
    without = [name for name, split in evals.items() if not split.is_scored]
    if without and len(without) < len(evals):
        rest = first_few([name for name in evals if name not in without])
        raise DataError(f"{first_few(without)} has no score for its pairs, and {rest} has one")
    return not without


def comparable(data: TaskData, reference: str) -> TaskData:
    """The task with what is measured where vectors can be compared with those of another model, called `reference`."""
    kind = KINDS[data.kind]
    if not kind.vectors:
        return data
    compared = dataclasses.replace(data, metrics=(*data.metrics, *kind.agreements))
    return compared if data.metrics else compared.without_labels(reference)


def agreements(task: Task, names: Sequence[str]) -> tuple[str, ...]:
    """What is measured where the answers of another model, whose classes are `names`, take the place of labels."""
    kind = KINDS[task.kind]
    return kind.plain_agreements if kind.words and not entities.is_entity_scheme(names) else kind.agreements


def _sources(task: Task, config: TaskConfig) -> tuple[Found, dict[str, Callable[[], Table]]]:
    """The files of the splits, and what opens the table of each."""
    if config.data.startswith(HUB_PREFIX):
        return _of_hub(*hub_data.named(config.data))
    if config.data or config.task in BUILTIN_TASKS:
        found = layout.find(Path(config.data) if config.data else BUILTIN_FOLDER / config.task)
    elif task.hub is not None:
        return _of_hub(*task.hub)
    else:
        raise DataError(f"task {config.task} needs your own data", "name a file or folder with --data")
    # A few rows of GLUE's own qqp/train.tsv are broken, and every reader of it leaves them out.
    glue = task.hub is not None and task.hub[0] == "nyu-mll/glue"
    opened = partial(tables.open_files, header=task.header, lenient=glue)
    return found, {name: partial(opened, files) for name, files in found.files.items()}


def _of_hub(name: str, config: str, revision: str | None = None) -> tuple[Found, dict[str, Callable[[], Table]]]:
    """The files of a set of the hub, and what opens the table of each of its splits, under our names of splits."""
    found = hub_data.fetched(name, config, revision)
    known = {split: layout.NAMES.get(split, split) for split in found.files}
    names = {split: split if ours in found.files else ours for split, ours in known.items()}
    files = {ours: found.files[split] for split, ours in names.items()}
    return Found(files=files, unread={}, notes=()), {
        ours: partial(library.open_split, found, split) for split, ours in names.items()
    }


def _wanted(found: Found, train: bool, holdout: float, config: TaskConfig) -> list[str]:
    """Names of the splits to use: train, then the evaluation splits; `test` only when there is no other."""
    where, rest = config.data or config.task, "".join(f"; {note}" for note in found.notes)
    evals = [name for name in layout.EVALS if name in found.files]
    for name in (*(["train"] if train else []), *(() if evals else layout.EVALS)):
        if name in found.unread:  # before another takes its place
            raise tables.refusal(found.unread[name])
    evals = evals or [name for name in ("test",) if name in found.files]
    if train and "train" not in found.files:
        raise DataError(
            f"{where} has no train split, only {', '.join(found.files)}{rest}",
            "call the training file train, for example train.csv",
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
    if KINDS[task.kind].vectors:
        return _read_scored(name, table, task, config)
    labelled = {config.label_column, *task.label, *LABEL_NAMES}
    place = f"the {name} split"
    texts = [column(table, task.text, config.text_column, "text", place, labelled)]
    if config.pair_column and KINDS[task.kind].words:
        raise DataError(f"{config.task} reads a single text", "leave out --pair-column")
    if task.pair or config.pair_column:
        texts.append(column(table, task.pair, config.pair_column, "pair", place, labelled.union(texts)))
    wanted = _label_columns(table, task, config, name, texts)
    if twice := {column for column in texts if [*texts, *wanted].count(column) > 1}:
        raise DataError(f"column {min(twice)!r} of the {name} split is named for two purposes", "name another column")
    return tuple(texts), labels.read(name, table, wanted, task.kind)


def _read_scored(name: str, table: Table, task: Task, config: TaskConfig) -> tuple[tuple[str, ...], Labels]:
    """The columns of texts that need no labels, of which two may have a score; see `Labels`."""
    place, others = f"the {name} split", {config.label_column, *task.label}
    texts = [column(table, task.text, config.text_column, "text", place, others)]
    paired = bool(config.pair_column) or not {*task.pair}.isdisjoint(table.columns)
    if paired:
        texts.append(column(table, task.pair, config.pair_column, "pair", place, others.union(texts)))
    if config.label_column and not paired:
        raise DataError(f"{place} has a single text, and a score is of two", "name the second with --pair-column")
    if not paired or not (config.label_column or {*task.label} & {*table.columns}):
        return tuple(texts), Labels(split=name, kind=task.kind, columns=(), own_names=(), values=[None] * len(table))
    wanted = _label_columns(table, task, config, name, texts)
    if len({*texts, *wanted}) < 3:
        raise DataError(f"two of the columns of {place} are the same: {first_few([*texts, *wanted])}")
    return tuple(texts), labels.read(name, table, wanted, task.kind)


def _begins_with_list(table: Table, column: str) -> bool:
    """Whether the first cell of a column that is no empty list is a list of words written as text."""
    for batch in table.batches((column,)):
        for cell in batch[column]:
            found = literals.listed(cell) if isinstance(cell, str) else None
            if found != []:
                return bool(found) and all(isinstance(word, str) for word in found or ())
    return True


def column(
    table: Table | Incoming, names: Sequence[str], chosen: str, what: str, place: str, others: Collection[str] = ()
) -> str:
    """The column to read; `others` are read for another purpose, so that no hint names them. Raises `DataError`."""
    if chosen:
        names = (chosen,)
    for name in names:
        if name in table.columns:
            return name
    free = {name.casefold().strip(): name for name in table.columns if name not in others}
    close = difflib.get_close_matches(names[0].casefold(), free, n=1, cutoff=0.7)
    meant = free[close[0]] if close else None
    hint = f"did you mean --{what}-column {meant!r}?" if meant else f"name it with --{what}-column"
    if not meant and tables.ending(Path(table.name)).startswith((".csv", ".tsv")):
        hint += "; the file must begin with a header, a line such as text,label"
    raise DataError(
        f"{place} has no {what} column {names[0]!r}; its columns: {', '.join(map(repr, table.columns))}", hint
    )


def _label_columns(table: Table, task: Task, config: TaskConfig, split: str, texts: Sequence[str]) -> tuple[str, ...]:
    """The column of the labels; for multilabel also several, one per label."""
    chosen = config.label_column
    several = [name.strip() for name in chosen.split(",") if name.strip()]
    if len(several) > 1 and chosen not in table.columns:
        if not KINDS[task.kind].several:
            raise DataError(
                f"--label-column {chosen} names {len(several)} columns, and {config.task} reads one",
                "for several labels use --task multi-label-classification",
            )
        if twice := [name for name in several if several.count(name) > 1]:
            raise DataError(f"--label-column names {twice[0]!r} twice", "name each column once")
        return tuple(column(table, (), name, "label", f"the {split} split", texts) for name in several)
    return (column(table, task.label, chosen, "label", f"the {split} split", texts),)


def _label_names(
    task: Task, found: Mapping[str, Labels], perhaps: Sequence[str], aliases: Mapping[str, str]
) -> tuple[tuple[str, ...], list[str]]:
    """Names of the classes by index, and notes: those of the task, or of the first split as `classes.names_of` has it.

    A tag that occurs only in an evaluation split gets an index too, though nothing can learn it: the words that bear it
    are part of what is measured. It is no new one where it is a number and those of the first split are names.
    """
    if not KINDS[task.kind].classes or task.labels:
        return task.labels, []
    first, *others = found.values()
    classes, notes = names_of(first, perhaps, aliases), []
    if KINDS[task.kind].words and not first.own_names:
        find, numeric = finder(classes, aliases), {number(name) is not None for name in classes}
        for one in others:
            check_labelled(one, find)
        new = {name for one in others for name in unknown(one, find) if (number(name) is not None) in numeric}
        notes = (
            [f"labels that occur only in evaluation, so they cannot be learned: {first_few(order(new))}"] if new else []
        )
        classes += tuple(order(new))
    if task.entities and not entities.is_entity_scheme(classes):
        raise DataError(
            f"labels of entities must be O or like B-person and I-person; the data has {first_few(classes)}",
            "for other labels of words use --task token-classification",
        )
    return classes, notes


def _no_answer(task: Task, found: Mapping[str, Labels], known: bool | None) -> bool:
    """Whether a question may have no answer: as the task, the model or the first split has it."""
    fixed = task.no_answer if task.no_answer is not None else known
    if fixed is not None or not KINDS[task.kind].windows:
        return bool(fixed)
    return any(not answers.texts for answers in next(iter(found.values())).values)


def _check_training_labels(train: Split, names: Sequence[str]) -> None:
    """There must be something to tell apart."""
    if len(train) == 0:
        raise DataError("the training set is empty", "hold out less, or give more examples")
    kind = KINDS[train.kind]
    if kind.vectors:
        return
    if kind.windows:
        if not any(answers.texts for answers in train.labels):
            raise DataError("no question of the training set has an answer, so there is nothing to learn")
        return
    codes = np.concatenate(list(train.labels)) if kind.words else train.labels
    if len(np.unique(codes, axis=0)) < 2:
        flags = kind.several and {key(name) for name in names} <= {*FLAGS, *FLAGS.values()}
        all_of = (
            "the only training example has one label"
            if len(train) == 1
            else f"all {len(train)} training examples have the same label"
        )
        raise DataError(f"{all_of}, there is nothing to learn", labels.FLAGS if flags else "")
