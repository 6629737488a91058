"""Splits, columns, labels of each kind, subsets. All files are made here; `test_tables.py` has the formats."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capcli.config.names import GLUE_TASKS
from capcli.config.task import TaskConfig
from capcli.data import dataset, tables, tasks
from capcli.data.kinds import KINDS
from capcli.data.splits import Split, TaskData
from capcli.errors import DataError

TEXTS = ["a good film", "dull, and long", "bright", "an awful plot", "the actor was great", "bad"]
NAMES = ["positive", "negative", "positive", "negative", "positive", "negative"]


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """A table in the format that the suffix says, by libraries other than ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pandas.DataFrame(columns)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pandas(frame, preserve_index=False)
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    elif path.suffix in (".jsonl", ".json"):
        frame.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    else:
        frame.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return path


def folder(root: Path, suffix: str = ".csv", labels: list[Any] | None = None, texts: list[Any] | None = None) -> str:
    columns = {"text": texts or TEXTS, "label": labels or NAMES}
    for split in ("train", "validation"):
        write(root / f"{split}{suffix}", columns)
    return str(root)


def texts_of(split: Split | None) -> list[Any]:
    assert split is not None
    return [text for texts, _ in split.chunks(7) for text in texts]


def pairs_of(split: Split | None) -> list[str]:
    assert split is not None
    return [pair for _, pairs in split.chunks(7) for pair in pairs or ()]


def labels_of(split: Split | None) -> list[Any]:
    assert split is not None
    return split.labels.tolist()


def config(data: str, task: str = "text-classification", **options: Any) -> TaskConfig:
    return TaskConfig(task=task, data=data, **options)


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_every_format_reads_alike(tmp_path: Path, suffix: str) -> None:
    data = dataset.load(config(folder(tmp_path, suffix)))
    assert texts_of(data.train) == TEXTS
    assert data.labels == ("negative", "positive")
    assert labels_of(data.train) == [1, 0, 1, 0, 1, 0]
    assert list(data.evals) == ["validation"]
    assert (data.primary, data.kind, data.holdout) == ("accuracy", "classification", None)


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_number_labels_read_alike(tmp_path: Path, suffix: str) -> None:
    data = dataset.load(config(folder(tmp_path, suffix, labels=[10, 2, 10, 2, 9, 2])))
    assert data.labels == ("2", "9", "10")  # as numbers, not as text
    assert labels_of(data.train) == [2, 0, 2, 0, 1, 0]


@pytest.mark.parametrize("suffix", tables.SUFFIXES)
def test_regression_reads_numbers(tmp_path: Path, suffix: str) -> None:
    data = dataset.load(config(folder(tmp_path, suffix, labels=[0.5, 1, 2, 3, 4.25, 5]), task="regression"))
    assert labels_of(data.train) == [0.5, 1, 2, 3, 4.25, 5]
    assert (data.labels, data.metrics) == ((), ("pearson", "spearman"))


def test_quotes_mean_nothing_in_a_tsv_and_group_in_a_csv(tmp_path: Path) -> None:
    rows = 'sentence\tlabel\n"half open\t0\nhe said "no" "\t1\n"whole"\t1\n'
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(rows)
    data = dataset.load(config(str(tmp_path), task="sst2"))
    assert texts_of(data.train) == ['"half open', 'he said "no" "', '"whole"']
    assert list(data.evals) == ["dev"]
    other = tmp_path / "csv"
    other.mkdir()
    for split in ("train", "test"):
        (other / f"{split}.csv").write_text('text,label\n"one, two ""three""",x\nfour,y\n')
    data = dataset.load(config(str(other)))
    assert texts_of(data.train) == ['one, two "three"', "four"]
    assert list(data.evals) == ["test"]


def test_words_that_pandas_takes_for_missing_stay_text(tmp_path: Path) -> None:
    texts = ["NA", "null", "None", "nan", "123", "1e5"]
    for suffix in (".csv", ".tsv", ".jsonl"):
        data = dataset.load(config(folder(tmp_path / suffix[1:], suffix, texts=texts)))
        assert texts_of(data.train) == texts


def test_both_mnli_evaluation_splits_are_used_and_test_is_not(tmp_path: Path) -> None:
    columns = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"], "label": [0, 1, 2]}
    for split in ("train", "validation_matched", "validation_mismatched", "test"):
        write(tmp_path / f"{split}.parquet", columns)
    data = dataset.load(config(str(tmp_path), task="mnli"))
    assert list(data.evals) == ["validation_matched", "validation_mismatched"]
    assert data.labels == ("entailment", "neutral", "contradiction")
    assert pairs_of(data.train) == ["d", "e", "f"]


def test_one_file_needs_a_holdout_to_evaluate_on(tmp_path: Path) -> None:
    file = write(tmp_path / "all.csv", {"text": TEXTS * 5, "label": NAMES * 5})
    with pytest.raises(DataError, match="no validation or test split"):
        dataset.load(config(str(file)))
    data = dataset.load(config(str(file)), holdout=0.2)
    assert {name: len(split) for name, split in data.evals.items()} == {"holdout": 6}
    assert len(data.train) == 24
    assert "held-out" in data.notes[0]


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.csv", {"body": TEXTS, "title": TEXTS[::-1], "class": NAMES, "text": ["x"] * 6})
    chosen = {"text_column": "body", "pair_column": "title", "label_column": "class"}
    data = dataset.load(config(str(tmp_path), **chosen))
    assert (texts_of(data.train), pairs_of(data.train)) == (TEXTS, TEXTS[::-1])


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"words": TEXTS, "label": NAMES}, "the train split has no text column 'text'; its columns: 'words', 'label'"),
        ({"text": TEXTS, "class": NAMES}, "the train split has no label column 'label'; its columns: 'text', 'class'"),
        (
            {"text": TEXTS, "label": ["a", None, "b", "a", None, "b"]},
            "2 labels of the train split are missing, the first in row 1",
        ),
        ({"text": ["a", None, "b", "c", "d", "e"], "label": NAMES}, "row 1 of column 'text' of the train split is"),
        ({"text": [1, 2, 3, 4, 5, 6], "label": NAMES}, "row 0 of column 'text' of the train split is of type int"),
        ({"text": TEXTS, "label": ["a"] * 6}, "training examples have the same label"),
        ({"text": TEXTS, "label": [None] * 6}, "holds no labels"),
        ({"text": [], "label": []}, "has no rows"),
    ],
)
def test_damaged_tables_are_refused_with_the_place(tmp_path: Path, columns: dict[str, Any], expected: str) -> None:
    write(tmp_path / "train.parquet", columns)
    names = ["a"] * 6 if columns.get("label") == ["a"] * 6 else NAMES
    write(tmp_path / "test.parquet", {"text": TEXTS, "label": names})
    with pytest.raises(DataError) as caught:
        texts_of(dataset.load(config(str(tmp_path))).train)
    assert expected in caught.value.message


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_an_empty_cell_is_a_missing_label(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match="1 label of the train split is missing, in row 2"):
        dataset.load(config(folder(tmp_path, suffix, labels=["a", "b", "", "a", "b", "a"])))


@pytest.mark.parametrize(
    ("suffix", "content"), [(".parquet", b"PAR1 no"), (".jsonl", b'{"text": "a", '), (".csv", b"\xff\xfe\xfa")]
)
def test_unreadable_files_are_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"train{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=f"cannot read .*train{suffix}"):
        dataset.load(config(str(tmp_path)), holdout=0.5)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: None, "no data at"),
        (lambda p: p.mkdir(), "no data files in"),
        (lambda p: write(p / "part.csv", {"text": TEXTS}), "no split in .*: found part"),
        (lambda p: write(p / "dev.csv", {"text": TEXTS, "label": NAMES}), "no train split, only dev"),
        (lambda p: [p.mkdir(), *((p / f"{split}.csv").touch() for split in ("train", "dev"))], "train.csv is empty"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path: Path, make: Callable[[Path], Any], expected: str) -> None:
    make(tmp_path / "set")
    with pytest.raises(DataError, match=expected):
        dataset.load(config(str(tmp_path / "set")))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"is not a \.parquet"):
        dataset.load(config(str(tmp_path / "train.xlsx")), holdout=0.5)


@pytest.mark.parametrize("value", ["good", float("nan"), float("inf")])
def test_regression_needs_finite_numbers(tmp_path: Path, value: Any) -> None:
    labels = [str(value), "1", "2", "3", "4", "5"]
    with pytest.raises(DataError, match=r"not a number|not finite"):
        dataset.load(config(folder(tmp_path, labels=labels), task="regression"))


# Labels --------------------------------------------------------------------------------------------------------------


def glue(root: Path, train: list[Any], dev: list[Any] | None = None) -> TaskData:
    write(root / "train.parquet", {"sentence": TEXTS, "label": train})
    write(root / "validation.parquet", {"sentence": TEXTS, "label": dev or train})
    return dataset.load(config(str(root), task="sst2"))


@pytest.mark.parametrize(
    "labels",
    [NAMES, [1, 0, 1, 0, 1, 0], ["1", "0", "1", "0", "1", "0"], [" Positive", "NEGATIVE"] * 3, [1.0, 0.0] * 3],
)
def test_labels_of_a_known_task_are_names_or_codes(tmp_path: Path, labels: list[Any]) -> None:
    data = glue(tmp_path, labels)
    assert labels_of(data.train) == [1, 0, 1, 0, 1, 0]


def with_feature(path: Path, names: list[str], codes: list[int]) -> None:
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"sentence": TEXTS, "label": codes}, features=features).to_parquet(path)


def test_class_label_features_are_read_by_name(tmp_path: Path) -> None:
    """The file's own order of names differs from the task's."""
    for split in ("train", "validation"):
        with_feature(tmp_path / f"{split}.parquet", ["positive", "negative"], [0, 1, 0, 1, 1, 1])
    data = dataset.load(config(str(tmp_path), task="sst2"))
    assert labels_of(data.train) == [1, 0, 1, 0, 0, 0]
    data = dataset.load(config(str(tmp_path)))
    assert data.labels == ("positive", "negative")  # a task without names takes the file's


@pytest.mark.parametrize("hidden", [-1, "-1"])
def test_hidden_labels_are_said_to_be_hidden(tmp_path: Path, hidden: Any) -> None:
    with pytest.raises(DataError, match=r"the labels of the validation split are hidden \(-1\)"):
        glue(tmp_path, NAMES, [hidden] * 6)


def test_hidden_labels_under_a_class_label_feature(tmp_path: Path) -> None:
    with_feature(tmp_path / "train.parquet", ["negative", "positive"], [0, 1, 0, 1, 1, 1])
    with_feature(tmp_path / "validation.parquet", ["negative", "positive"], [-1] * 6)
    with pytest.raises(DataError, match="hidden"):
        dataset.load(config(str(tmp_path), task="sst2"))


@pytest.mark.parametrize(
    ("train", "dev", "shown"),
    [
        (NAMES, [*NAMES[:5], "neutral"], "neutral; the task has negative, positive"),
        ([1, 2, 3] * 2, [1, 2, 3, 1, 2, 0], "0; the task has 1, 2, 3"),  # not the code of class "1"
        (["1", "2", "3"] * 2, ["1", "2", "3", "1", "2", "0"], "0; the task has 1, 2, 3"),
        ([0, 5] * 3, [0, 5, 0, 5, 1, 1], "1; the task has 0, 5"),
        (NAMES, ["²", *NAMES[:5]], "²; the task has"),
    ],
)
def test_unknown_labels_of_an_evaluation_split_are_refused(
    tmp_path: Path, train: list[Any], dev: list[Any], shown: str
) -> None:
    write(tmp_path / "train.parquet", {"text": TEXTS, "label": train})
    write(tmp_path / "validation.parquet", {"text": TEXTS, "label": dev})
    with pytest.raises(DataError) as caught:
        dataset.load(config(str(tmp_path)))
    assert f"unknown labels in the validation split: {shown}" in caught.value.message


def test_codes_outside_the_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown labels in the train split: 2"):
        glue(tmp_path, [0, 1, 2, 0, 1, 0])


def test_labels_that_differ_in_case_only_are_two_classes(tmp_path: Path) -> None:
    data = dataset.load(config(folder(tmp_path, labels=["US", "us", "US", "us", "it", "us"])))
    assert sorted(data.labels) == ["US", "it", "us"]
    assert [data.labels[i] for i in data.train.labels] == ["US", "us", "US", "us", "it", "us"]


@pytest.mark.parametrize("odd", ["²", "--1", "+"])
def test_label_names_that_nearly_look_like_numbers(tmp_path: Path, odd: str) -> None:
    data = dataset.load(config(folder(tmp_path, labels=[odd, "1", "2"] * 2)))
    assert set(data.labels) == {odd, "1", "2"}


def test_too_many_classes_suggest_regression(tmp_path: Path) -> None:
    n = 1001
    write(tmp_path / "train.parquet", {"text": ["a"] * n, "label": list(range(n))})
    with pytest.raises(DataError) as caught:
        dataset.load(config(str(tmp_path)), holdout=0.1)
    assert "1001 different labels" in caught.value.message
    assert "--task regression" in caught.value.hint


def labelled(root: Path, train: list[Any], validation: list[Any], **chosen: Any) -> TaskData:
    """Rows of JSON with these labels, each with its own type."""
    for split, cells in (("train", train), ("validation", validation)):
        rows = [json.dumps({"text": f"text {i}", "label": cell}) for i, cell in enumerate(cells)]
        (root / f"{split}.jsonl").write_text("\n".join(rows))
    return dataset.load(config(str(root), **chosen))


@pytest.mark.parametrize(
    ("train", "validation", "names", "codes"),
    [
        (["1.0", "2.0", "3.0"], ["1", "2", 2.0], ("1", "2", "3"), [0, 1, 1]),  # not the code 1, which is class 2
        ([1.0, 2.0, 3.0], ["1", "2.0", "03"], ("1", "2", "3"), [0, 1, 2]),
        (["01", "02"], [1, "2."], ("01", "02"), [0, 1]),
        (["+1", "-1"], [1, -1.0], ("-1", "+1"), [1, 0]),
        (["0.50", "1.5"], [0.5, "1.50"], ("0.50", "1.5"), [0, 1]),
        (["9" * 30 + "1", "9" * 30 + "2"], ["9" * 30 + "2.0"], ("9" * 30 + "1", "9" * 30 + "2"), [1]),
        (["a b", "Café"], ["A\u00a0b", "cafe\u0301", "a\u200b b"], ("a b", "Café"), [0, 1, 0]),
        ([True, False], [1, "false"], ("False", "True"), [1, 0]),
        ([0, 1], [True, "False"], ("0", "1"), [1, 0]),
    ],
)
def test_numbers_match_by_value_and_names_by_what_is_seen(
    tmp_path: Path, train: list[Any], validation: list[Any], names: tuple[str, ...], codes: list[int]
) -> None:
    data = labelled(tmp_path, train, validation)
    assert (data.labels, labels_of(data.evals["validation"])) == (names, codes)


@pytest.mark.parametrize(
    ("train", "validation", "expected"),
    [
        (["no", "yes"], [0, 1], "unknown labels in the validation split: 0, 1; the task has no, yes"),
        (["no", "yes"], ["no", 1.0], "unknown labels in the validation split: 1; the task has no, yes"),
        ([0, 1], ["no", "yes"], "unknown labels in the validation split: no, yes; the task has 0, 1"),
        ([1, 2], [0, 1], "unknown labels in the validation split: 0; the task has 1, 2"),
        (["A", "a", "b"], ["\u200ba"], "unknown labels in the validation split: '\\u200ba'; the task has A, a, b"),
    ],
)
def test_labels_are_never_matched_by_position(
    tmp_path: Path, train: list[Any], validation: list[Any], expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        labelled(tmp_path, train, validation)
    assert caught.value.message == expected
    assert "--label-map" in caught.value.hint


@pytest.mark.parametrize("mapping", ["0=yes,1=no", "yes=0,no=1"])
def test_a_map_says_which_is_which(tmp_path: Path, mapping: str) -> None:
    data = labelled(tmp_path, ["no", "yes"], [0, 1, "1.0"], label_map=mapping)
    assert (data.labels, labels_of(data.evals["validation"])) == (("no", "yes"), [1, 0, 0])


@pytest.mark.parametrize("mapping", ["true=0,false=1", "0=TRUE,1=FALSE"])
def test_a_map_takes_precedence_over_what_true_and_false_usually_are(tmp_path: Path, mapping: str) -> None:
    data = labelled(tmp_path, [0, 1], [True, "false"], label_map=mapping)
    assert labels_of(data.evals["validation"]) == [0, 1]
    assert not any("changes nothing" in note for note in data.notes)


@pytest.mark.parametrize(
    ("task", "mapping", "said"),
    [
        ("sst2", "0=positive", "0=positive changes nothing in the data: 0 already means negative"),
        ("sst2", "positive=0", "positive=0 changes nothing in the data: both are classes"),
        ("text-classification", "0=1", "0=1 changes nothing in the data: both are classes"),
        ("text-classification", "2=3", "2=3 changes nothing in the data: neither is a class of the data"),
        ("text-classification", "no=0", ""),
        ("sst2", "negative=bad", ""),
        ("sst2", "bad=0", ""),
    ],
)
def test_a_map_that_changes_nothing_is_said(tmp_path: Path, task: str, mapping: str, said: str) -> None:
    """A code of a known task keeps its meaning, whatever the map says."""
    data = labelled(tmp_path, [0, 1], [1, 0], task=task, label_map=mapping, text_column="text")
    assert labels_of(data.evals["validation"]) == [1, 0]
    assert [note for note in data.notes if "label-map" in note] == ([f"--label-map {said}"] if said else [])


def test_a_map_of_a_model_is_not_about_the_data(tmp_path: Path) -> None:
    labelled(tmp_path, ["a", "b"], ["b", "a"])
    chosen = config(str(tmp_path), label_map="LABEL_0=x")
    assert not any("label-map" in note for note in dataset.load(chosen, train=False, perhaps=("a", "b")).notes)


@pytest.mark.parametrize(
    ("task", "labels", "hint"),
    [
        ("text-classification", ["no", "is it"], "--label-map 'is it=NAME'"),
        ("text-classification", ["no", "a,b"], "write those labels as the classes are written"),
        ("text-classification", ["no", "a=b"], "write those labels as the classes are written"),
        ("text-classification", ["no", 1], "not matched with names by their position; say which is which"),
        ("sst2", ["negative", 2], "the codes of this task are 0 negative, 1 positive; for data with others"),
    ],
)
def test_the_way_out_of_unknown_labels_can_be_gone(tmp_path: Path, task: str, labels: list[Any], hint: str) -> None:
    """Also when the map names a code: it does not become one of the task."""
    train = ["negative", "positive"] if task == "sst2" else ["no", "yes"]
    with pytest.raises(DataError) as caught:
        labelled(tmp_path, train, labels, task=task, text_column="text", label_map=f"0={train[0]}")
    assert hint in caught.value.hint


@pytest.mark.parametrize("blank", ["  ", "\u200b", "\u00a0", "\t", ""])
def test_a_label_that_cannot_be_seen_is_missing(tmp_path: Path, blank: str) -> None:
    with pytest.raises(DataError, match=r"^1 label of the train split is missing, in row 2$"):
        labelled(tmp_path, ["a", "b", blank], ["a"])
    with pytest.raises(DataError, match=r"^2 labels of the train split are missing, the first in row 1$"):
        labelled(tmp_path, ["a", blank, blank, "b"], ["a"])
    with pytest.raises(DataError, match="row 0 of column 'label' of the train split holds a missing label"):
        labelled(tmp_path, [["a", blank], ["b"]], [["a"]], task="multi-label-classification")


def test_a_label_that_is_no_finite_number_is_no_class(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1 of column 'label' of the train split holds inf, which is not finite"):
        labelled(tmp_path, [0, float("inf"), 1], [0])


def test_half_a_surrogate_pair_is_no_label(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1 of column 'label' .* surrogate"):
        labelled(tmp_path, ["a", "\ud800"], ["a"])


@pytest.mark.parametrize("cell", ["[a b]", "[a; b]", "{a;b}", " [a] ", "[a|b]"])
def test_labels_in_brackets_that_are_no_list_are_refused(tmp_path: Path, cell: str) -> None:
    with pytest.raises(DataError, match="begins as a list and cannot be read as one"):
        labelled(tmp_path, ["a;b", "b", cell], ["a"], task="multi-label-classification")


@pytest.mark.parametrize("cell", ["set()", "frozenset()", "()", "[]", "array([], dtype=object)"])
def test_empty_lists_of_every_kind_are_no_labels(tmp_path: Path, cell: str) -> None:
    data = labelled(tmp_path, ["['a', 'b']", "['b']", cell], ["['a']"], task="multi-label-classification")
    assert data.labels == ("a", "b")
    assert [list(row) for row in labels_of(data.train)] == [[1, 1], [0, 1], [0, 0]]


@pytest.mark.parametrize(
    "cells", [[[1, 0], [0, 1]], ["[1, 0]", "[0, 1]"], ["1 0", "0 1"], ["1;0;1", "0;1;1"], [[True, False]] * 2]
)
def test_a_row_of_flags_is_no_list_of_labels(tmp_path: Path, cells: list[Any]) -> None:
    with pytest.raises(DataError) as caught:
        labelled(tmp_path, cells, cells, task="multi-label-classification")
    assert "name the columns in --label-column" in caught.value.hint


@pytest.mark.parametrize("mark", [" ", "/", "\t", "；"])
def test_labels_made_of_others_are_said_for_every_separator(tmp_path: Path, mark: str) -> None:
    labels = ["a", "b", f"a{mark}b"]
    data = labelled(tmp_path, labels, labels, task="multi-label-classification")
    assert any(
        "labels that combine others" in note and note.endswith("put ; between the labels of a text")
        for note in data.notes
    )
    assert any("labels that combine others" in note for note in labelled(tmp_path, labels, labels).notes)


@pytest.mark.parametrize(
    ("task", "columns", "expected"),
    [
        ("multi-label-classification", "x,y,x", "--label-column names 'x' twice"),
        ("text-classification", "x,y", "--label-column x,y names 2 columns, and text-classification reads one"),
    ],
)
def test_label_columns_that_do_not_fit(tmp_path: Path, task: str, columns: str, expected: str) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.csv", {"text": TEXTS, "x": [0, 1] * 3, "y": [1, 0] * 3})
    with pytest.raises(DataError) as caught:
        dataset.load(config(str(tmp_path), task=task, label_column=columns))
    assert caught.value.message == expected


@pytest.mark.parametrize("first", [[], ["[]"], ["[]", "set()"]])
def test_words_written_as_lists_may_begin_with_an_empty_one(tmp_path: Path, first: list[str]) -> None:
    words = [*first, "['a', 'b']"]
    tags = [*first, "['O', 'B-x']"]
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.csv", {"tokens": words, "tags": tags})
    train = dataset.load(config(str(tmp_path), task="ner")).train
    assert texts_of(train) == [*([] for _ in first), ["a", "b"]]


def test_words_and_labels_are_counted_in_english(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.csv", {"tokens": ["a b"], "tags": ["B-x"]})
    with pytest.raises(DataError, match="the only training example has one label"):
        dataset.load(config(str(tmp_path), task="ner"))
    write(tmp_path / "train.csv", {"tokens": ["a b", "a"], "tags": ["B-x", "O"]})
    data = dataset.load(config(str(tmp_path), task="ner"))
    with pytest.raises(DataError, match=r"has 2 words but 1 label$"):
        texts_of(data.train)


@pytest.mark.parametrize("first", range(4))
def test_types_that_are_mixed_do_not_depend_on_the_first_row(tmp_path: Path, first: int) -> None:
    ones = [True, 1, "1", 1.0]
    data = labelled(tmp_path, [*ones[first:], *ones[:first], 0, False], [1, 0])
    assert (data.labels, labels_of(data.train)) == (("0", "1"), [1, 1, 1, 1, 0, 0])
    assert "'True' as '1'" in data.notes[0]
    with pytest.raises(DataError, match="mixes true and false with numbers: 0, 2, True"):
        labelled(tmp_path, [0, 2, True], [0])


def test_labels_of_a_known_task_are_its_codes_also_with_decimals(tmp_path: Path) -> None:
    assert labels_of(glue(tmp_path, ["1.0", "0.0"] * 3).train) == [1, 0] * 3
    with pytest.raises(DataError) as caught:
        glue(tmp_path, ["1.0", "2.0"] * 3)
    assert caught.value.message == "unknown labels in the train split: 2; the task has negative, positive"
    assert "0 negative, 1 positive" in caught.value.hint


def test_codes_of_a_table_are_its_names_and_no_others(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        with_feature(tmp_path / f"{split}.parquet", ["5", "7"], [0, 1, 0, 1, 1, 1])
    data = dataset.load(config(str(tmp_path), text_column="sentence"))
    assert (data.labels, labels_of(data.train)) == (("5", "7"), [0, 1, 0, 1, 1, 1])
    write(tmp_path / "validation.parquet", {"sentence": TEXTS, "label": [7, 5, 7, 7, 7, 7]})
    data = dataset.load(config(str(tmp_path), text_column="sentence"))
    assert labels_of(data.evals["validation"]) == [1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("labels", [[0, 1, 2, -1, 0, -1], ["a", "b", "c", "-1.0", "a", -1], [0, 1, 2, -100, 0, -100]])
def test_rows_without_an_agreed_label_are_counted_and_named(tmp_path: Path, labels: list[Any]) -> None:
    with pytest.raises(DataError) as caught:
        labelled(tmp_path, labels, labels[:3])
    assert caught.value.message.startswith("2 rows of the train split have the label -1")
    assert caught.value.message.endswith("label), the first is row 3")
    assert caught.value.hint.startswith("leave those rows out")
    with pytest.raises(DataError, match="2 rows of the validation split have the label -1"):
        labelled(tmp_path, labels[:3], labels)


@pytest.mark.parametrize(("labels", "said"), [([-1, 0, 1], True), ([-1, 1, 1], False), ([-2, -1, 1], False)])
def test_minus_one_beside_its_opposite_is_a_class(tmp_path: Path, labels: list[Any], said: bool) -> None:
    data = labelled(tmp_path, labels, labels)
    assert data.labels == tuple(sorted({str(label) for label in labels}, key=int))
    assert ["-1 is read as a class" in note for note in data.notes] == [True] * said


def test_labels_that_look_alike_are_said(tmp_path: Path) -> None:
    data = labelled(tmp_path, ["Good", "good ", "bad", "bad\u200b"], ["good"])
    assert data.labels == ("bad", "bad\u200b", "Good", "good")
    assert data.notes == (
        "classes that differ only in case or invisible characters: 'bad' and 'bad\\u200b'",
        "classes that differ only in case or invisible characters: 'Good' and 'good'",
    )
    data = labelled(tmp_path, ["a", 0, "b"], ["a"])
    assert data.notes == ("some labels are numbers and others names: 0, a, b",)


def test_a_missing_text_column_never_suggests_the_labels(tmp_path: Path) -> None:
    for columns in (
        {"texts": TEXTS, "label": NAMES},
        {"target": NAMES, "body": TEXTS},
        {"test": NAMES, "label": TEXTS},
    ):
        write(tmp_path / "train.csv", columns)
        with pytest.raises(DataError) as caught:
            dataset.load(config(str(tmp_path), label_column="test" if "test" in columns else ""), holdout=0.5)
        header = "the file must begin with a header, a line such as text,label"
        known = "texts" in columns
        hint = "did you mean --text-column 'texts'?" if known else f"name it with --text-column; {header}"
        assert caught.value.hint == hint


# Subsets -------------------------------------------------------------------------------------------------------------


def sorted_by_class(root: Path, n: int = 100) -> str:
    columns = {"text": [f"word {i}" for i in range(n)], "label": ["a"] * (n // 2) + ["b"] * (n // 2)}
    for split in ("train", "test"):
        write(root / f"{split}.csv", columns)
    return str(root)


def test_samples_are_drawn_at_random_and_by_seed(tmp_path: Path) -> None:
    source = config(sorted_by_class(tmp_path), max_eval_samples=20)
    first = dataset.load(source, max_train=20, seed=1)
    assert len(first.train) == len(first.evals["test"]) == 20
    for split in (first.train, first.evals["test"]):
        assert 4 <= int(split.labels.sum()) <= 16  # both classes, though the file is sorted by class
        places = [int(text.split()[1]) for text in texts_of(split)]
        assert places == sorted(set(places))
        assert [int(label) for label in split.labels] == [int(place >= 50) for place in places]
    again, other = dataset.load(source, max_train=20, seed=1), dataset.load(source, max_train=20, seed=2)
    assert texts_of(again.train) == texts_of(first.train) != texts_of(other.train)
    assert texts_of(other.evals["test"]) == texts_of(first.evals["test"])  # the measure does not move with the seed


@pytest.mark.parametrize("share", [0.1, 0.35])
def test_holdout_and_training_part_are_apart_and_complete(tmp_path: Path, share: float) -> None:
    data = dataset.load(config(sorted_by_class(tmp_path)), holdout=share)
    assert len(data.holdout) == round(100 * share)
    assert sorted(texts_of(data.train) + texts_of(data.holdout)) == sorted(f"word {i}" for i in range(100))
    assert 0 < int(data.holdout.labels.sum()) < len(data.holdout)
    assert list(data.evals) == ["test"]


def test_holdout_is_the_same_whatever_the_limit(tmp_path: Path) -> None:
    source = config(sorted_by_class(tmp_path))
    whole, cut = dataset.load(source, holdout=0.2), dataset.load(source, holdout=0.2, max_train=10)
    assert texts_of(whole.holdout) == texts_of(cut.holdout)
    assert len(cut.train) == 10


def test_test_never_stands_in_for_an_evaluation_split_that_is_there(tmp_path: Path) -> None:
    columns = {"text": TEXTS, "label": NAMES}
    for name in ("train.csv", "val.csv", "test.csv"):
        write(tmp_path / name, columns)
    data = dataset.load(config(str(tmp_path)))
    assert (list(data.evals), data.notes) == (["validation"], ("evaluated on validation; not used: test",))
    (tmp_path / "val.csv").rename(tmp_path / "val.csv.lz4")
    for train in (True, False):
        with pytest.raises(DataError, match=r"val\.csv\.lz4 is not a \.parquet"):
            dataset.load(config(str(tmp_path)), train=train)
    (tmp_path / "val.csv.lz4").rename(tmp_path / "other.csv")
    data = dataset.load(config(str(tmp_path)))
    assert list(data.evals) == ["test"]
    assert data.notes == (
        "in the data folder, but not read: other.csv",
        "no validation split: evaluated on test",
    )
    (tmp_path / "test.csv").unlink()
    with pytest.raises(DataError, match=r"no validation or test split .*but not read: other\.csv"):
        dataset.load(config(str(tmp_path)))


def test_all_parts_of_a_split_are_read(tmp_path: Path) -> None:
    for name, i in (("train.csv", 0), ("train_2.csv", 3)):
        write(tmp_path / name, {"text": TEXTS[i : i + 3], "label": NAMES[i : i + 3]})
    write(tmp_path / "valid.csv", {"text": TEXTS, "label": NAMES})
    data = dataset.load(config(str(tmp_path)))
    assert texts_of(data.train) == TEXTS
    assert data.notes == ("train is read from train.csv, train_2.csv",)


def test_a_folder_with_training_examples_alone_is_said_when_they_are_measured(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", {"text": TEXTS, "label": NAMES})
    said = "no validation or test split: evaluated on train"
    assert said in dataset.load(config(str(tmp_path)), train=False).notes
    assert said not in dataset.load(config(str(tmp_path / "train.csv")), train=False).notes
    assert said not in dataset.load(config(str(tmp_path)), train=False, holdout=0.5).notes


def test_a_folder_of_archives_has_the_way_out_of_an_archive(tmp_path: Path) -> None:
    (tmp_path / "train.tar.gz").write_bytes(b"x")
    with pytest.raises(DataError) as caught:
        dataset.load(config(str(tmp_path)))
    assert "must be unpacked" in caught.value.hint


def test_a_file_without_a_header_is_told_of_it(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a nice long day,good\na dull one,bad\n")
    with pytest.raises(DataError, match="has no text column 'text'") as caught:
        dataset.load(config(str(tmp_path)), holdout=0.5)
    assert "the file must begin with a header" in caught.value.hint


def test_evaluation_alone_reads_no_training_split(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\nx,unheard-of\n")
    data = dataset.load(config(str(tmp_path)), train=False)
    assert data.train is None
    assert list(data.evals) == ["validation"]
    assert data.labels == ("negative", "positive")


# The table -----------------------------------------------------------------------------------------------------------


def test_builtin_tasks_load_and_their_readme_names_them() -> None:
    data = dataset.load(TaskConfig(task="subj", max_eval_samples=10), max_train=50)
    assert (len(data.train), len(data.evals["validation"]), len(data.labels)) == (50, 10, 2)
    assert json.dumps(data.labels)


def test_f1_needs_two_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.csv", {"sentence1": TEXTS, "sentence2": TEXTS, "label": ["a", "b", "c"] * 2})
    data = dataset.load(config(str(tmp_path), task="text-pair-classification"))
    assert data.metrics == ("accuracy", "macro_f1")
    assert tasks.TASKS["qqp"].metrics == ("accuracy", "f1")


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_row_of_the_table_is_whole(name: str) -> None:
    task = tasks.TASKS[name]
    assert task.kind in KINDS
    assert len(task.pair) != 0 or task.kind != "spans"
    assert not (task.labels and task.kind != "classification")


def test_builtin_entities_load_with_their_names() -> None:
    data = dataset.load(TaskConfig(task="wnut17"))
    assert (data.kind, data.metrics) == ("tokens", ("f1", "precision", "recall", "accuracy"))
    assert data.labels[:3] == ("O", "B-corporation", "I-corporation")
    words, tags = texts_of(data.train)[0], labels_of(data.train)[0]
    marked = [(word, data.labels[tag]) for word, tag in zip(words, tags, strict=True) if tag]
    assert [word for word, _ in marked] == ["Empire", "State", "Building", "ESB"]
    assert [name[:1] for _, name in marked] == ["B", "I", "I", "B"]
    assert {name[2:] for _, name in marked} == {"location"}


# GLUE as it is distributed -------------------------------------------------------------------------------------------

# Name of the evaluation split; the lines, with | for the tab; the first texts and the labels expected.
GLUE: dict[str, tuple[str, list[str], list[str], list[float]]] = {
    "cola": ("dev", ["gj04|1||We won.", "gj04|0|*|Them won't."], ["We won.", "Them won't."], [1, 0]),
    "mnli": (
        "dev_matched",
        [
            "index|pairID|sentence1_parse|sentence1|sentence2|label1|gold_label",
            '0|x|(a)|so "a|b|neutral|neutral',
            "1|y|(b)|c|d|neutral|entailment",
        ],
        ['so "a', "c"],
        [1, 0],
    ),
    "mrpc": ("dev", ["Quality|#1 ID|#2 ID|#1 String|#2 String", "1|5|6|a|b", "0|7|8|c|d"], ["a", "c"], [1, 0]),
    "qnli": ("dev", ["index|question|sentence|label", "0|a|b|entailment", "1|c|d|not_entailment"], ["a", "c"], [0, 1]),
    "qqp": (
        "dev",
        ["id|qid1|qid2|question1|question2|is_duplicate", "0|1|2|a|b|0", "broken", "1|3|4|c|d|1"],
        ["a", "c"],
        [0, 1],
    ),
    "rte": ("dev", ["index|sentence1|sentence2|label", "0|a|b|not_entailment", "1|c|d|entailment"], ["a", "c"], [1, 0]),
    "sst2": ("dev", ["sentence|label", "a |1", "c|0"], ["a ", "c"], [1, 0]),
    "stsb": (
        "dev",
        [
            "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score",
            "0|g|f|y|1|n|n|a|b|5.000",
            "1|g|f|y|1|n|n|c|d|1.2",
        ],
        ["a", "c"],
        [5.0, 1.2],
    ),
    "wnli": ("dev", ["index|sentence1|sentence2|label", "0|a|b|1", "1|c|d|0"], ["a", "c"], [1, 0]),
}


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_the_files_of_glue_itself_are_read(tmp_path: Path, name: str) -> None:
    split, lines, texts, labels = GLUE[name]
    for file in ("train", split):
        text = "".join(line.replace("|", "\t") + "\r\n" for line in lines)
        (tmp_path / f"{file}.tsv").write_text("\ufeff" * (name == "mrpc") + text)
    (tmp_path / "test.tsv").write_text("index\tnothing\n")
    data = dataset.load(config(str(tmp_path), task=name))
    assert list(data.evals) == [split]
    assert (texts_of(data.train), labels_of(data.train)) == (texts, labels)
    assert pairs_of(data.train) == ([] if name in ("cola", "sst2") else ["b", "d"])
    broken = [f"{file}.tsv: rows with too many or too few fields, skipped: 1" for file in ("train", split)]
    assert list(data.notes) == [*(broken if name == "qqp" else []), f"evaluated on {split}; not used: test"]


def test_only_glue_leaves_broken_rows_out(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("text\tlabel\na\tx\nb\n")
    with pytest.raises(DataError, match=r"train\.tsv: line 3 has 1 field, the header has 2"):
        dataset.load(config(str(tmp_path)), holdout=0.5)


@pytest.mark.parametrize("task", ["mnli", "text-classification"])
def test_the_mark_of_no_gold_label_is_refused(tmp_path: Path, task: str) -> None:
    for split in ("train", "dev"):
        columns = {"sentence1": ["a", "b", "c"], "sentence2": ["a"] * 3, "gold_label": ["neutral", "-", "entailment"]}
        write(tmp_path / f"{split}.jsonl", columns)
    with pytest.raises(DataError) as caught:
        dataset.load(config(str(tmp_path), task=task, label_column="gold_label"))
    assert caught.value.message == "1 row of the train split has the label - (no agreed label), the first is row 1"
    assert caught.value.hint.startswith("leave those rows out")


# Texts ---------------------------------------------------------------------------------------------------------------


def test_chunks_hold_the_chosen_rows_in_order_at_most_so_many_at_a_time() -> None:
    table = tables.in_memory("x", {"text": [str(i) for i in range(10_000)], "pair": [f"p{i}" for i in range(10_000)]})
    split = Split(name="train", table=table, columns=("text", "pair"), labels=np.arange(10_000))
    rows = np.asarray([0, 3, 1999, 2000, 4001, 4002, 4003, 9999])
    taken = split.take(rows)
    assert [taken.row(i) for i in range(8)] == rows.tolist() == taken.labels.tolist()
    chunks = list(taken.chunks(3))
    assert [len(texts) for texts, _ in chunks] == [3, 3, 2]
    assert [text for texts, _ in chunks for text in texts] == [str(row) for row in rows]
    assert [pair for _, pairs in chunks for pair in pairs or ()] == [f"p{row}" for row in rows]
    again = taken.take(np.asarray([1, 2, 7]))
    assert (texts_of(again), labels_of(again)) == (["3", "1999", "9999"], [3, 1999, 9999])
    assert list(taken.take(np.zeros(0, dtype=np.int64)).chunks()) == []
    assert [len(texts) for texts, _ in split.chunks(4000)] == [4000, 4000, 2000]


@given(data=st.data(), n=st.integers(1, 60), size=st.integers(1, 70))
def test_chunks_cover_any_selection(data: st.DataObject, n: int, size: int) -> None:
    rows = np.asarray(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))
    table = tables.in_memory("x", {"text": [str(i) for i in range(n)]})
    split = Split(name="x", table=table, columns=("text",), labels=np.arange(n)).take(rows)
    chunks = [texts for texts, _ in split.chunks(size)]
    assert [text for texts in chunks for text in texts] == [str(row) for row in rows]
    assert all(len(texts) == size for texts in chunks[:-1])


def test_a_missing_text_is_named_by_its_row_of_the_file() -> None:
    table = tables.in_memory("x", {"text": ["a", "b", "c", None]})
    split = Split(name="dev", table=table, columns=("text",), labels=np.zeros(4)).take(np.asarray([1, 3]))
    with pytest.raises(DataError, match="row 3 of column 'text' of the dev split is missing"):
        texts_of(split)


def test_an_empty_text_is_one_but_a_column_of_them_is_an_error(tmp_path: Path) -> None:
    data = dataset.load(config(folder(tmp_path / "a", texts=["", *TEXTS[1:]])))
    assert texts_of(data.train)[0] == ""
    columns = {"text": TEXTS, "pair": ["", " "] * 3, "label": NAMES}
    for split in ("train", "dev"):
        write(tmp_path / "b" / f"{split}.csv", columns)
    data = dataset.load(config(str(tmp_path / "b"), task="text-pair-classification"))
    with pytest.raises(DataError, match="every text in column 'pair' of the train split is empty"):
        texts_of(data.train)


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "é", "label": "a"}\n{"text": "x\\ud800", "label": "b"}\n')
    data = dataset.load(config(str(tmp_path)))
    with pytest.raises(DataError, match=r"row 1 of column 'text' .* surrogate"):
        texts_of(data.train)


# Labels of each kind -------------------------------------------------------------------------------------------------


def test_labels_can_be_read_as_a_legend(tmp_path: Path) -> None:
    assert dataset.load(config(folder(tmp_path))).legend == "0 negative, 1 positive"


Rows = dict[str, list[Any]]


def of_kind(root: Path, task: str, rows: Rows, suffix: str = ".jsonl", **options: Any) -> TaskData:
    """The same rows as training and evaluation split."""
    for split in ("train", "validation"):
        write(root / f"{split}{suffix}", rows)
    return dataset.load(config(str(root), task=task, **options))


SETS = [["red", "round"], ["round"], [], ["red"], ["blue", "red"], ["round"]]
HOT = [[0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv", ".tsv"])
def test_sets_of_labels(tmp_path: Path, suffix: str) -> None:
    cells = SETS if "j" in suffix or "p" in suffix else ["; ".join(names) for names in SETS]
    data = of_kind(tmp_path, "multi-label-classification", {"text": TEXTS, "labels": cells}, suffix)
    assert (data.kind, data.labels) == ("multilabel", ("blue", "red", "round"))
    assert data.metrics == ("micro_f1", "macro_f1", "subset_accuracy")
    assert data.train is not None and data.train.labels.dtype == np.uint8
    assert labels_of(data.train) == HOT


def test_sets_of_codes_with_names(tmp_path: Path) -> None:
    names = ["round", "red"]
    features = datasets.Features(
        {"text": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=names))}
    )
    rows = {"text": ["a", "b", "c"], "labels": [[0], [1, 0], []]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}.parquet")
    data = dataset.load(config(str(tmp_path), task="multi-label-classification"))
    assert (data.labels, labels_of(data.train)) == (("round", "red"), [[1, 0], [1, 1], [0, 0]])


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_sets_of_labels_in_columns_of_their_own(tmp_path: Path, suffix: str) -> None:
    rows = {"text": TEXTS, "round": [h[2] for h in HOT], "blue": [bool(h[0]) for h in HOT], "red": [h[1] for h in HOT]}
    chosen = {"label_column": "blue, red,round"}
    data = of_kind(tmp_path, "multi-label-classification", rows, suffix, **chosen)
    assert (data.labels, labels_of(data.train)) == (("blue", "red", "round"), HOT)
    rows["red"] = ["0", "1", "2", "0", "1", "0"]
    with pytest.raises(
        DataError, match="row 2 of column 'blue, red, round' of the train split holds '2' in 'red', where 0 or 1"
    ):
        of_kind(tmp_path, "multi-label-classification", rows, suffix, **chosen)
    with pytest.raises(DataError, match="has no label column 'green'"):
        of_kind(tmp_path, "multi-label-classification", rows, suffix, label_column="blue,green")


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([["a"], None, ["b"]], "1 label of the train split is missing, in row 1"),
        ([["a"], ["b", None], ["b"]], "row 1 of column 'labels' of the train split holds a missing label"),
        ([[0, 1, 0], [0, 1, 1], [1, 0, 0]], "row 0 of column 'labels' of the train split holds a label twice"),
        ([1, 2, 3], "row 0 of column 'labels' of the train split is of type int, not a list of labels"),
        ([["a"], ["a"], ["a"]], "training examples have the same label"),
        ([[], [], []], "holds no labels"),
    ],
)
def test_sets_of_labels_that_are_refused(tmp_path: Path, cells: list[Any], expected: str) -> None:
    with pytest.raises(DataError) as caught:
        of_kind(tmp_path, "multi-label-classification", {"text": TEXTS[:3], "labels": cells})
    assert expected in caught.value.message


Cells = list[str]


@pytest.mark.parametrize(
    ("cells", "names"),
    [
        (["['a', 'b, c']", "['a']", "[]"], ("a", "b, c")),
        (['["a", "b"]', '["a"]', "b"], ("a", "b")),
        (["['a' 'b'\n 'c']", "['a']", ""], ("a", "b", "c")),
        (["array(['a', 'b'], dtype=object)", "('a', 'b')", "{'a'}"], ("a", "b")),
        (["[0 1]", "[1.]", "[]"], ("0", "1")),
        (["a,b", "b,c", "c", "a", ","], ("a", "b", "c")),
        (["a|b", "b | c", "c", "a"], ("a", "b", "c")),
        (["food, drink;books", "books", "travel"], ("books", "food, drink", "travel")),
    ],
)
def test_sets_that_are_written_as_text(tmp_path: Path, cells: Cells, names: tuple[str, ...]) -> None:
    rows: Rows = {"text": [f"text {i}" for i in range(len(cells))], "labels": cells}
    data = of_kind(tmp_path, "multi-label-classification", rows, ".csv")
    assert data.labels == names
    said = " ".join(data.notes)
    assert ("lists written as text in column 'labels' were read as lists: train, validation" in said) == (
        "[" in cells[0]
    )
    assert ("are separated by" in said) == (cells[0] in ("a,b", "a|b"))


@pytest.mark.parametrize(
    "cells",
    [
        ["food, drink & tobacco", "books, film", "travel"],
        ["a;b", "a,b", "b", "a"],
        ["a,b", "a|b", "a", "b"],
        ["['a', 'b'", "c", "d"],
        ["[a, b]", "c", "d"],
        ["['a' ... 'b']", "c", "d"],
    ],
)
def test_sets_that_are_not_clear_are_refused(tmp_path: Path, cells: Cells) -> None:
    with pytest.raises(DataError) as caught:
        of_kind(tmp_path, "multi-label-classification", {"text": list("abcd")[: len(cells)], "labels": cells}, ".csv")
    assert "JSON list" in caught.value.hint


def test_the_training_set_says_what_separates_labels(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", {"text": TEXTS[:3], "labels": ["a", "b", "c"]})
    write(tmp_path / "validation.csv", {"text": TEXTS[:1], "labels": ["a,c"]})
    data = dataset.load(config(str(tmp_path), task="multi-label-classification"))
    assert labels_of(data.evals["validation"]) == [[1, 0, 1]]


def test_a_list_is_not_one_label(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 0 of column 'label' of the train split is a list written as text"):
        of_kind(tmp_path, "text-classification", {"text": TEXTS, "label": ["['a']", "['b']"] * 3}, ".csv")
    data = of_kind(tmp_path, "text-classification", {"text": TEXTS, "label": ["a", "b", "a,b"] * 2}, ".csv")
    assert "labels that combine others, each read as a class of its own: a,b" in data.notes[0]


def test_lists_for_one_label_suggest_the_other_task(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        of_kind(tmp_path, "text-classification", {"text": TEXTS, "label": SETS})
    assert caught.value.message == "row 0 of column 'label' of the train split is a list, not a single label"
    assert "multi-label-classification" in caught.value.hint


def test_names_for_a_regression_suggest_the_other_task(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        of_kind(tmp_path, "regression", {"text": TEXTS, "label": NAMES})
    assert "not a number" in caught.value.message
    assert "text-classification" in caught.value.hint


WORDS = [["Ada", "met", "Bob"], ["nobody", "came"], ["in", "New", "York"]]
MARKS = [["B-PER", "O", "B-PER"], ["O", "O"], ["O", "B-LOC", "I-LOC"]]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("task", ["ner", "token-classification"])
def test_labels_of_words(tmp_path: Path, suffix: str, task: str) -> None:
    lists = "j" in suffix or "p" in suffix
    rows = {"tokens": WORDS, "tags": MARKS} if lists else {
        "tokens": [" ".join(words) for words in WORDS], "tags": [" ".join(tags) for tags in MARKS]
    }  # fmt: skip
    data = of_kind(tmp_path, task, rows, suffix)
    assert (data.kind, data.labels) == ("tokens", ("B-LOC", "B-PER", "I-LOC", "O"))
    assert data.metrics == ("f1", "precision", "recall", "accuracy")
    assert texts_of(data.train) == WORDS
    assert [labels.tolist() for labels in data.evals["validation"].labels] == [[1, 3, 1], [3, 3], [3, 0, 2]]


@pytest.mark.parametrize("form", [str, json.dumps, lambda row: str(np.asarray(row))])
def test_words_and_their_labels_in_lists_written_as_text(tmp_path: Path, form: Callable[[Any], str]) -> None:
    rows: Rows = {"tokens": [form(words) for words in WORDS], "tags": [form(tags) for tags in MARKS]}
    data = of_kind(tmp_path, "ner", rows, ".csv")
    assert data.labels == ("B-LOC", "B-PER", "I-LOC", "O")
    assert texts_of(data.train) == WORDS
    assert data.train is not None and [row.tolist() for row in data.train.labels] == [[1, 3, 1], [3, 3], [3, 0, 2]]
    assert data.notes == tuple(
        f"lists written as text in column {column!r} were read as lists: train, validation"
        for column in ("tokens", "tags")
    )
    rows["tokens"] = [*rows["tokens"][:1], "in New", "York"]
    with pytest.raises(DataError, match=r"row 1 of column 'tokens' .* where a list written as text is expected"):
        texts_of(of_kind(tmp_path, "ner", rows, ".csv").train)


@pytest.mark.parametrize("cell", ["O, B-PER, O", "[O, B-PER, O]", "['O', 'B-PER', 'O'"])
def test_tags_that_are_not_clear_are_refused(tmp_path: Path, cell: str) -> None:
    with pytest.raises(DataError, match="row 0 of column 'tags' of the train split holds"):
        of_kind(tmp_path, "token-classification", {"tokens": ["a b c", "d"], "tags": [cell, "O"]}, ".csv")


def test_brackets_among_words_are_words(tmp_path: Path) -> None:
    words = ["[ laughs ]", "[1]", "( ' )"]
    data = of_kind(tmp_path, "token-classification", {"tokens": words, "tags": ["X O X", "O", "X O X"]}, ".csv")
    assert texts_of(data.train) == [cell.split() for cell in words]
    with pytest.raises(DataError, match="row 1 of column 'tokens' of the train split is a list written as text"):
        rows: Rows = {"tokens": ["a b", "['a', 'b']"], "tags": ["X O", "O O"]}
        texts_of(of_kind(tmp_path, "token-classification", rows, ".csv").train)


def test_other_labels_of_words_have_other_metrics(tmp_path: Path) -> None:
    rows = {"words": WORDS, "labels": [["NOUN", "VERB", "NOUN"], ["NOUN", "VERB"], ["ADP", "NOUN", "NOUN"]]}
    data = of_kind(tmp_path, "token-classification", rows)
    assert (data.labels, data.metrics) == (("ADP", "NOUN", "VERB"), ("accuracy", "macro_f1"))
    with pytest.raises(DataError) as caught:
        of_kind(tmp_path, "ner", rows)
    assert caught.value.message.endswith("the data has ADP, NOUN, VERB")
    assert "token-classification" in caught.value.hint


def tagged(root: Path, train: list[list[Any]], validation: list[list[Any]]) -> str:
    """Sentences with these tags."""
    for split, tags in (("train", train), ("validation", validation)):
        write(root / f"{split}.jsonl", {"tokens": [["w"] * len(row) for row in tags], "ner_tags": tags})
    return str(root)


def test_a_tag_that_occurs_in_evaluation_only_has_an_index_and_is_said(tmp_path: Path) -> None:
    """The others keep theirs: those that are learned come first."""
    data = dataset.load(
        config(tagged(tmp_path, MARKS, [["O", "B-PER"], ["I-PER", "I-ORG"], ["I-ORG", "O"]]), task="ner")
    )
    assert data.labels == ("B-LOC", "B-PER", "I-LOC", "O", "I-ORG", "I-PER")
    assert [row.tolist() for row in data.train.labels] == [[1, 3, 1], [3, 3], [3, 0, 2]]
    assert [row.tolist() for row in data.evals["validation"].labels] == [[3, 1], [5, 4], [4, 3]]
    assert data.notes == ("labels that occur only in evaluation, so they cannot be learned: I-ORG, I-PER",)
    same = dataset.load(config(tagged(tmp_path / "same", MARKS, MARKS[:1]), task="ner"))
    assert (same.labels, same.notes) == (("B-LOC", "B-PER", "I-LOC", "O"), ())


def test_tags_of_evaluation_are_known_by_case_too(tmp_path: Path) -> None:
    """As the labels of sentences are: these are no new tags."""
    data = dataset.load(config(tagged(tmp_path, MARKS, [["b-loc", "O", "i-loc", "O"]]), task="token-classification"))
    assert data.labels == ("B-LOC", "B-PER", "I-LOC", "O")
    assert data.notes == (
        "validation: labels matched although they are written differently: 'b-loc' as 'B-LOC', 'i-loc' as 'I-LOC'",
    )
    assert data.evals["validation"].labels[0].tolist() == [0, 3, 2, 3]


@pytest.mark.parametrize(("train", "validation"), [(MARKS, [[0, 1, 2, 3]]), ([[0, 1], [1, 0]], MARKS)])
def test_numbers_of_words_are_not_matched_with_names(tmp_path: Path, train: list[Any], validation: list[Any]) -> None:
    with pytest.raises(DataError, match=r"unknown labels in the validation split: .*; the task has "):
        dataset.load(config(tagged(tmp_path, train, validation), task="token-classification"))


@pytest.mark.parametrize("task", ["ner", "token-classification"])
def test_hidden_tags_are_said_to_be_hidden(tmp_path: Path, task: str) -> None:
    with pytest.raises(DataError, match=r"the labels of the validation split are hidden \(-1\)"):
        dataset.load(config(tagged(tmp_path, MARKS, [[-1, -1], [-1]]), task=task))


def test_words_and_labels_of_different_number_are_named(tmp_path: Path) -> None:
    data = of_kind(tmp_path, "ner", {"tokens": WORDS, "tags": [*MARKS[:1], ["O"], *MARKS[2:]]})
    with pytest.raises(DataError, match=r"row 1 of column 'tokens' of the train split has 2 words but 1 label$"):
        texts_of(data.train)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([1, "met", "Bob"], "row 0 of column 'tokens' of the train split is of type int, not text"),
        ([None, "met", "Bob"], "row 0 of column 'tokens' of the train split is missing"),
        (7, "row 0 of column 'tokens' of the train split is of type int, not a list of words"),
    ],
)
def test_words_that_are_none(tmp_path: Path, words: Any, expected: str) -> None:
    data = of_kind(tmp_path, "ner", {"tokens": [words, *WORDS[1:]], "tags": MARKS})
    with pytest.raises(DataError) as caught:
        texts_of(data.train)
    assert caught.value.message == expected


def test_words_have_no_second_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="reads a single text"):
        of_kind(tmp_path, "ner", {"tokens": WORDS, "tags": MARKS, "other": WORDS}, pair_column="other")


CONTEXT = "Ada met Bob in Paris. Bob left."
ANSWERS = [
    ({"text": ["Bob", "Bob left"], "answer_start": [22, 22]}, (("Bob", "Bob left"), (22, 22))),
    ({"text": [], "answer_start": []}, ((), ())),
    ([{"text": "Ada", "answer_start": 0}], (("Ada",), (0,))),
    (["Ada", "Bob"], (("Ada", "Bob"), (-1, -1))),
    ("Paris", (("Paris",), (-1,))),
    ("", ((), ())),
    ('{"text": ["Ada"], "answer_start": [0]}', (("Ada",), (0,))),
    ("{'text': ['Ada'], 'answer_start': [0]}", (("Ada",), (0,))),
    ("{'text': array(['Ada', \"B's\"], dtype=object), 'answer_start': array([0, 8])}", (("Ada", "B's"), (0, 8))),
    ("['Ada', 'Bob']", (("Ada", "Bob"), (-1, -1))),
    ("array(['Ada' 'Bob'], dtype=object)", (("Ada", "Bob"), (-1, -1))),
    ("[]", ((), ())),
    ("[12]", (("[12]",), (-1,))),
    ("(1990)", (("(1990)",), (-1,))),
]


@pytest.mark.parametrize(("cell", "expected"), ANSWERS)
def test_answers_in_the_forms_they_come_in(tmp_path: Path, cell: Any, expected: Any) -> None:
    rows = {"question": ["who?", "where?"], "context": [CONTEXT] * 2, "answers": [cell, ["Paris"]]}
    data = of_kind(tmp_path, "question-answering", rows)
    assert (data.kind, data.labels, data.metrics) == ("spans", (), ("f1", "exact_match"))
    found = data.evals["validation"].labels[0]
    assert (found.texts, found.starts) == expected
    assert (texts_of(data.train), pairs_of(data.train)) == (["who?", "where?"], [CONTEXT] * 2)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (None, "1 label of the train split is missing"),
        (7, "row 0 of column 'answers' of the train split holds no answers"),
        ({"text": ["a"], "answer_start": ["0"]}, "needs one whole number in answer_start for each text"),
        ({"text": ["a", "b"], "answer_start": [0]}, "needs one whole number in answer_start for each text"),
        ("{broken", "row 0 of column 'answers' of the train split is not JSON"),
        ("['Ada', 'Bob'", "row 0 of column 'answers' of the train split holds"),
    ],
)
def test_answers_that_are_none(tmp_path: Path, cell: Any, expected: str) -> None:
    rows = {"question": ["who?", "where?"], "context": [CONTEXT] * 2, "answers": [cell, ["Paris"]]}
    with pytest.raises(DataError) as caught:
        of_kind(tmp_path, "question-answering", rows)
    assert expected in caught.value.message


def test_questions_without_any_answer_teach_nothing_but_can_be_measured(tmp_path: Path) -> None:
    rows = {"question": ["who?", "where?"], "context": [CONTEXT] * 2, "answers": [[], []]}
    with pytest.raises(DataError, match="no question of the training set has an answer"):
        of_kind(tmp_path, "squad_v2", rows)
    assert len(dataset.load(config(str(tmp_path), task="squad_v2"), train=False).evals["validation"]) == 2


HELD = ["Bob"]


def asked(root: Path, train: list[Any], validation: list[Any]) -> str:
    """Questions with these answers."""
    for split, cells in (("train", train), ("validation", validation)):
        n = len(cells)
        rows = {"question": [f"who {i}?" for i in range(n)], "context": [CONTEXT] * n, "answers": cells}
        write(root / f"{split}.jsonl", rows)
    return str(root)


@pytest.mark.parametrize(
    ("task", "train", "validation", "expected"),
    [
        ("squad", [HELD, []], [HELD, []], False),
        ("squad_v2", [HELD, HELD], [HELD, HELD], True),
        ("question-answering", [HELD, []], [HELD, HELD], True),
        ("question-answering", [HELD, HELD], [HELD, []], False),
        ("question-answering", [HELD, HELD], [HELD, HELD], False),
    ],
)
def test_whether_a_question_may_have_no_answer(
    tmp_path: Path, task: str, train: list[Any], validation: list[Any], expected: bool
) -> None:
    """The task says it, or the training set does; not those that happen to be measured."""
    data = dataset.load(config(asked(tmp_path, train, validation), task=task))
    assert data.no_answer is expected
    assert data.train is not None
    assert [split.no_answer for split in (data.train, *data.evals.values())] == [expected] * 2
    assert data.evals["validation"].take(np.asarray([0])).no_answer is expected


def test_a_sample_without_unanswerable_questions_does_not_change_what_they_are(tmp_path: Path) -> None:
    cells = [HELD] * 40 + [[]]
    sample = dataset.load(config(asked(tmp_path, cells, cells), task="question-answering", max_eval_samples=3))
    split = sample.evals["validation"]
    assert len(split) == 3 and all(answers.texts for answers in split.labels)
    assert split.no_answer


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("cells", [[HELD, HELD], [HELD, []]])
def test_in_evaluation_the_model_says_whether_it_may_answer_nothing(
    tmp_path: Path, known: bool, cells: list[Any]
) -> None:
    source = config(asked(tmp_path, cells, cells), task="question-answering")
    assert dataset.load(source, train=False, no_answer=known).no_answer is known
    assert dataset.load(source, train=False).no_answer is ([] in cells)  # a dense model does not say
    for task, fixed in (("squad", False), ("squad_v2", True)):
        found = dataset.load(config(source.data, task=task), train=False, no_answer=known)
        assert found.no_answer is fixed


def test_a_missing_question_is_named(tmp_path: Path) -> None:
    rows = {"question": ["who?", None], "context": [CONTEXT] * 2, "answers": [["Bob"], ["Ada"]]}
    with pytest.raises(DataError, match="row 1 of column 'question' of the train split is missing"):
        texts_of(of_kind(tmp_path, "squad", rows).train)


def test_the_official_files_of_squad_are_read(tmp_path: Path) -> None:
    for name, impossible in (("train-v2.0", True), ("dev-v2.0", False)):
        asked = [
            {"id": "1", "question": "who?", "answers": [{"text": "Bob", "answer_start": 8}], "is_impossible": False},
            {"id": "2", "question": "why?", "answers": [], "plausible_answers": [], "is_impossible": impossible},
        ]
        articles = [{"title": "T", "paragraphs": [{"context": CONTEXT, "qas": asked}]}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    data = dataset.load(config(str(tmp_path), task="squad_v2"))
    assert list(data.evals) == ["dev"]
    assert (texts_of(data.train), pairs_of(data.train)) == (["who?", "why?"], [CONTEXT] * 2)
    assert [answers.texts for answers in data.evals["dev"].labels] == [("Bob",), ()]
