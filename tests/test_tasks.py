"""Reading of data sets, labels, subsets, tokens and batches. All files are made here."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capcli import tasks, tokens
from capcli.config import TaskConfig
from capcli.errors import DataError

CPU = torch.device("cpu")
TEXTS = ["a good film", "dull, and long", "bright", "an awful plot", "the actor was great", "bad"]
NAMES = ["positive", "negative", "positive", "negative", "positive", "negative"]


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """A table in the format that the suffix says, by libraries other than ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pandas.DataFrame(columns)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return path


def folder(root: Path, suffix: str = ".csv", labels: list[Any] | None = None, texts: list[Any] | None = None) -> str:
    columns = {"text": texts or TEXTS, "label": labels or NAMES}
    for split in ("train", "validation"):
        write(root / f"{split}{suffix}", columns)
    return str(root)


def config(data: str, task: str = "text-classification", **options: Any) -> TaskConfig:
    return TaskConfig(task=task, data=data, **options)


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", tasks.SUFFIXES)
def test_every_format_reads_alike(tmp_path: Path, suffix: str) -> None:
    data = tasks.load(config(folder(tmp_path, suffix)))
    assert data.train is not None
    assert data.train.texts == TEXTS
    assert data.labels == ("negative", "positive")
    assert data.train.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert list(data.evals) == ["validation"]
    assert (data.primary, data.kind, data.holdout) == ("accuracy", "classification", None)


@pytest.mark.parametrize("suffix", tasks.SUFFIXES)
def test_number_labels_read_alike(tmp_path: Path, suffix: str) -> None:
    data = tasks.load(config(folder(tmp_path, suffix, labels=[10, 2, 10, 2, 9, 2])))
    assert data.labels == ("2", "9", "10")  # as numbers, not as text
    assert data.train is not None
    assert data.train.labels.tolist() == [2, 0, 2, 0, 1, 0]


@pytest.mark.parametrize("suffix", tasks.SUFFIXES)
def test_regression_reads_numbers(tmp_path: Path, suffix: str) -> None:
    data = tasks.load(config(folder(tmp_path, suffix, labels=[0.5, 1, 2, 3, 4.25, 5]), task="regression"))
    assert data.train is not None
    assert data.train.labels.tolist() == [0.5, 1, 2, 3, 4.25, 5]
    assert (data.labels, data.metrics) == ((), ("pearson", "spearman"))


def test_quotes_mean_nothing_in_a_tsv_and_group_in_a_csv(tmp_path: Path) -> None:
    rows = 'sentence\tlabel\n"half open\t0\nhe said "no" "\t1\n"whole"\t1\n'
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(rows)
    data = tasks.load(config(str(tmp_path), task="sst2"))
    assert data.train is not None
    assert data.train.texts == ['"half open', 'he said "no" "', '"whole"']
    assert list(data.evals) == ["dev"]
    other = tmp_path / "csv"
    other.mkdir()
    for split in ("train", "test"):
        (other / f"{split}.csv").write_text('text,label\n"one, two ""three""",x\nfour,y\n')
    data = tasks.load(config(str(other)))
    assert data.train is not None
    assert data.train.texts == ['one, two "three"', "four"]
    assert list(data.evals) == ["test"]


def test_words_that_pandas_takes_for_missing_stay_text(tmp_path: Path) -> None:
    texts = ["NA", "null", "None", "nan", "123", "1e5"]
    for suffix in (".csv", ".tsv", ".jsonl"):
        data = tasks.load(config(folder(tmp_path / suffix[1:], suffix, texts=texts)))
        assert data.train is not None
        assert data.train.texts == texts


def test_both_mnli_evaluation_splits_are_used_and_test_is_not(tmp_path: Path) -> None:
    columns = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"], "label": [0, 1, 2]}
    for split in ("train", "validation_matched", "validation_mismatched", "test"):
        write(tmp_path / f"{split}.parquet", columns)
    data = tasks.load(config(str(tmp_path), task="mnli"))
    assert list(data.evals) == ["validation_matched", "validation_mismatched"]
    assert data.labels == ("entailment", "neutral", "contradiction")
    assert data.train is not None
    assert data.train.pairs == ["d", "e", "f"]


def test_one_file_needs_a_holdout_to_evaluate_on(tmp_path: Path) -> None:
    file = write(tmp_path / "all.csv", {"text": TEXTS * 5, "label": NAMES * 5})
    with pytest.raises(DataError, match="no validation or test split"):
        tasks.load(config(str(file)))
    data = tasks.load(config(str(file)), holdout=0.2)
    assert data.train is not None
    assert {name: len(split) for name, split in data.evals.items()} == {"holdout": 6}
    assert len(data.train) == 24
    assert "held-out" in data.notes[0]


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.csv", {"body": TEXTS, "title": TEXTS[::-1], "class": NAMES, "text": ["x"] * 6})
    chosen = {"text_column": "body", "pair_column": "title", "label_column": "class"}
    data = tasks.load(config(str(tmp_path), **chosen))
    assert data.train is not None
    assert (data.train.texts, data.train.pairs) == (TEXTS, TEXTS[::-1])


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"words": TEXTS, "label": NAMES}, "the train split has no text column 'text'; its columns: words, label"),
        ({"text": TEXTS, "class": NAMES}, "the train split has no label column 'label'; its columns: text, class"),
        (
            {"text": TEXTS, "label": ["a", None, "b", "a", None, "b"]},
            "2 labels of the train split are missing, the first in row 1",
        ),
        ({"text": ["a", None, "b", "c", "d", "e"], "label": NAMES}, "row 1 is missing"),
        ({"text": [1, 2, 3, 4, 5, 6], "label": NAMES}, "row 0 is of type int"),
        ({"text": TEXTS, "label": ["a"] * 6}, "all training examples have the same label"),
        ({"text": TEXTS, "label": [None] * 6}, "holds no labels"),
        ({"text": [], "label": []}, "has no rows"),
    ],
)
def test_damaged_tables_are_refused_with_the_place(tmp_path: Path, columns: dict[str, Any], expected: str) -> None:
    write(tmp_path / "train.parquet", columns)
    names = ["a"] * 6 if columns.get("label") == ["a"] * 6 else NAMES
    write(tmp_path / "test.parquet", {"text": TEXTS, "label": names})
    with pytest.raises(DataError) as caught:
        tasks.load(config(str(tmp_path)))
    assert expected in caught.value.message


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_an_empty_cell_is_a_missing_label(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match="1 labels of the train split are missing, the first in row 2"):
        tasks.load(config(folder(tmp_path, suffix, labels=["a", "b", "", "a", "b", "a"])))


@pytest.mark.parametrize(
    ("suffix", "content"), [(".parquet", b"PAR1 no"), (".jsonl", b'{"text": "a", '), (".csv", b"\xff\xfe\xfa")]
)
def test_unreadable_files_are_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"train{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=f"cannot read .*train{suffix}"):
        tasks.load(config(str(tmp_path)))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: None, "no data at"),
        (lambda p: p.mkdir(), "no data files in"),
        (lambda p: write(p / "part.csv", {"text": TEXTS}), "no split in .*: found part"),
        (lambda p: write(p / "dev.csv", {"text": TEXTS, "label": NAMES}), "no train split, only dev"),
        (lambda p: (p.mkdir(), (p / "train.csv").touch()), "train.csv is empty"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path: Path, make: Callable[[Path], Any], expected: str) -> None:
    make(tmp_path / "set")
    with pytest.raises(DataError, match=expected):
        tasks.load(config(str(tmp_path / "set")))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"is no \.parquet"):
        tasks.load(config(str(tmp_path / "train.xlsx")), holdout=0.5)


@pytest.mark.parametrize("value", ["good", float("nan"), float("inf")])
def test_regression_needs_finite_numbers(tmp_path: Path, value: Any) -> None:
    labels = [str(value), "1", "2", "3", "4", "5"]
    with pytest.raises(DataError, match=r"not hold numbers|not finite"):
        tasks.load(config(folder(tmp_path, labels=labels), task="regression"))


# Labels --------------------------------------------------------------------------------------------------------------


def glue(root: Path, train: list[Any], dev: list[Any] | None = None) -> tasks.TaskData:
    write(root / "train.parquet", {"sentence": TEXTS, "label": train})
    write(root / "validation.parquet", {"sentence": TEXTS, "label": dev or train})
    return tasks.load(config(str(root), task="sst2"))


@pytest.mark.parametrize(
    "labels",
    [NAMES, [1, 0, 1, 0, 1, 0], ["1", "0", "1", "0", "1", "0"], [" Positive", "NEGATIVE"] * 3, [1.0, 0.0] * 3],
)
def test_labels_of_a_known_task_are_names_or_codes(tmp_path: Path, labels: list[Any]) -> None:
    data = glue(tmp_path, labels)
    assert data.train is not None
    assert data.train.labels.tolist() == [1, 0, 1, 0, 1, 0]


def with_feature(path: Path, names: list[str], codes: list[int]) -> None:
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"sentence": TEXTS, "label": codes}, features=features).to_parquet(path)


def test_class_label_features_are_read_by_name(tmp_path: Path) -> None:
    """The file's own order of names differs from the task's."""
    for split in ("train", "validation"):
        with_feature(tmp_path / f"{split}.parquet", ["positive", "negative"], [0, 1, 0, 1, 1, 1])
    data = tasks.load(config(str(tmp_path), task="sst2"))
    assert data.train is not None
    assert data.train.labels.tolist() == [1, 0, 1, 0, 0, 0]
    data = tasks.load(config(str(tmp_path)))
    assert data.labels == ("positive", "negative")  # a task without names takes the file's


@pytest.mark.parametrize("hidden", [-1, "-1"])
def test_hidden_labels_are_said_to_be_hidden(tmp_path: Path, hidden: Any) -> None:
    with pytest.raises(DataError, match=r"the labels of the validation split are hidden \(-1\)"):
        glue(tmp_path, NAMES, [hidden] * 6)


def test_hidden_labels_under_a_class_label_feature(tmp_path: Path) -> None:
    with_feature(tmp_path / "train.parquet", ["negative", "positive"], [0, 1, 0, 1, 1, 1])
    with_feature(tmp_path / "validation.parquet", ["negative", "positive"], [-1] * 6)
    with pytest.raises(DataError, match="hidden"):
        tasks.load(config(str(tmp_path), task="sst2"))


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
        tasks.load(config(str(tmp_path)))
    assert f"unknown labels in the validation split: {shown}" in caught.value.message


def test_codes_outside_the_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown labels in the train split: 2"):
        glue(tmp_path, [0, 1, 2, 0, 1, 0])


def test_labels_that_differ_in_case_only_are_two_classes(tmp_path: Path) -> None:
    data = tasks.load(config(folder(tmp_path, labels=["US", "us", "US", "us", "it", "us"])))
    assert sorted(data.labels) == ["US", "it", "us"]
    assert data.train is not None
    assert [data.labels[i] for i in data.train.labels] == ["US", "us", "US", "us", "it", "us"]


@pytest.mark.parametrize("odd", ["²", "--1", "-"])
def test_label_names_that_nearly_look_like_numbers(tmp_path: Path, odd: str) -> None:
    data = tasks.load(config(folder(tmp_path, labels=[odd, "1", "2"] * 2)))
    assert set(data.labels) == {odd, "1", "2"}


def test_too_many_classes_suggest_regression(tmp_path: Path) -> None:
    n = 1001
    write(tmp_path / "train.parquet", {"text": ["a"] * n, "label": list(range(n))})
    with pytest.raises(DataError) as caught:
        tasks.load(config(str(tmp_path)), holdout=0.1)
    assert "1001 different labels" in caught.value.message
    assert "--task regression" in caught.value.hint


# Subsets -------------------------------------------------------------------------------------------------------------


def sorted_by_class(root: Path, n: int = 100) -> str:
    columns = {"text": [f"word {i}" for i in range(n)], "label": ["a"] * (n // 2) + ["b"] * (n // 2)}
    for split in ("train", "test"):
        write(root / f"{split}.csv", columns)
    return str(root)


def test_samples_are_drawn_at_random_and_by_seed(tmp_path: Path) -> None:
    source = config(sorted_by_class(tmp_path), max_eval_samples=20)
    first = tasks.load(source, max_train=20, seed=1)
    assert first.train is not None
    assert len(first.train) == len(first.evals["test"]) == 20
    for split in (first.train, first.evals["test"]):
        assert 4 <= int(split.labels.sum()) <= 16  # both classes, though the file is sorted by class
        places = [int(text.split()[1]) for text in split.texts]
        assert places == sorted(set(places))
        assert [int(label) for label in split.labels] == [int(place >= 50) for place in places]
    again, other = tasks.load(source, max_train=20, seed=1), tasks.load(source, max_train=20, seed=2)
    assert again.train is not None
    assert other.train is not None
    assert again.train.texts == first.train.texts != other.train.texts
    assert other.evals["test"].texts == first.evals["test"].texts  # the measure does not move with the seed


@pytest.mark.parametrize("share", [0.1, 0.35])
def test_holdout_and_training_part_are_apart_and_complete(tmp_path: Path, share: float) -> None:
    data = tasks.load(config(sorted_by_class(tmp_path)), holdout=share)
    assert data.train is not None
    assert data.holdout is not None
    assert len(data.holdout) == round(100 * share)
    assert sorted(data.train.texts + data.holdout.texts) == sorted(f"word {i}" for i in range(100))
    assert 0 < int(data.holdout.labels.sum()) < len(data.holdout)
    assert list(data.evals) == ["test"]


def test_holdout_is_the_same_whatever_the_limit(tmp_path: Path) -> None:
    source = config(sorted_by_class(tmp_path))
    whole, cut = tasks.load(source, holdout=0.2), tasks.load(source, holdout=0.2, max_train=10)
    assert whole.holdout is not None
    assert cut.holdout is not None
    assert cut.train is not None
    assert whole.holdout.texts == cut.holdout.texts
    assert len(cut.train) == 10


def test_evaluation_alone_reads_no_training_split(tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "train.csv").write_text("text,label\nx,unheard-of\n")
    data = tasks.load(config(str(tmp_path)), train=False)
    assert data.train is None
    assert list(data.evals) == ["validation"]
    assert data.labels == ("negative", "positive")


# Tokens and batches --------------------------------------------------------------------------------------------------

LONG = "a film that is long " * 30


def coded(tokenizer: Any, texts: list[str], pairs: list[str] | None = None, max_length: int = 32) -> tokens.Examples:
    split = tasks.Split(name="train", texts=texts, pairs=pairs, labels=np.arange(len(texts)))
    return tokens.encode(split, tokenizer, max_length, chunk=3)


@pytest.mark.parametrize("paired", [False, True])
def test_tokens_are_those_of_the_tokenizer(tokenizer: Any, paired: bool) -> None:
    texts = [*TEXTS, "", LONG]
    pairs = [*TEXTS[::-1], LONG, "short"] if paired else None
    examples = coded(tokenizer, texts, pairs)
    assert len(examples) == 8
    for i in range(8):
        own = tokenizer(texts[i], pairs[i] if pairs else None, truncation=True, max_length=32)
        window = slice(examples.offsets[i], examples.offsets[i + 1])
        assert examples.tokens[window].tolist() == own["input_ids"]
        assert examples.types is not None
        assert examples.types[window].tolist() == own["token_type_ids"]
    assert examples.lengths.max() == 32
    for i, text in enumerate(TEXTS[:6]):  # and back again
        ids = examples.tokens[examples.offsets[i] : examples.offsets[i + 1]]
        spelled = tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",")
        assert spelled == (text if not paired else f"{text} {TEXTS[5 - i]}")


def test_padding_is_masked_and_rows_are_whole(tokenizer: Any) -> None:
    examples = coded(tokenizer, [*TEXTS, LONG])
    rows = np.array([6, 2, 0])
    batch = tokens.collate(examples, rows, CPU)
    width = int(examples.lengths[rows].max())
    assert batch.ids.tolist() == [6, 2, 0]
    assert batch.labels.tolist() == [6, 2, 0]
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert batch.inputs[name].shape == (3, width)
        assert batch.inputs[name].dtype == torch.int64
    expected = tokenizer([LONG, TEXTS[2], TEXTS[0]], truncation=True, max_length=32, padding=True, return_tensors="pt")
    for name, tensor in batch.inputs.items():
        assert torch.equal(tensor, expected[name]), name


def test_padding_uses_the_pad_id_of_the_tokenizer() -> None:
    examples = tokens.Examples(
        tokens=np.array([5, 6, 7], dtype=np.int32),
        types=None,
        offsets=np.array([0, 1, 3]),
        labels=np.array([0.5, 1.5]),
        pad_id=9,
    )
    batch = tokens.collate(examples, np.array([1, 0]), CPU)
    assert batch.inputs["input_ids"].tolist() == [[6, 7], [5, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert set(batch.inputs) == {"input_ids", "attention_mask"}
    assert batch.labels.tolist() == [1.5, 0.5]


def of_lengths(lengths: list[int]) -> tokens.Examples:
    return tokens.Examples(
        tokens=np.zeros(sum(lengths), dtype=np.int32),
        types=None,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=np.zeros(len(lengths)),
        pad_id=0,
    )


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=200)


@given(lengths=LENGTHS, batch_size=st.integers(1, 16), seed=st.integers(0, 9), epoch=st.integers(0, 9))
@settings(max_examples=50)
def test_an_epoch_covers_every_id_once(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    examples = of_lengths(lengths)
    batches = tokens.training_order(examples, batch_size, seed, epoch)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert len(batches) == -(-len(lengths) // batch_size)
    again = tokens.training_order(examples, batch_size, seed, epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_order_depends_on_seed_and_epoch_only() -> None:
    examples = of_lengths([5] * 64)
    orders = {
        (seed, epoch): tuple(np.concatenate(tokens.training_order(examples, 8, seed, epoch)).tolist())
        for seed, epoch in itertools.product((0, 1), (0, 1))
    }
    assert len(set(orders.values())) == 4
    np.random.seed(3)  # global state must not matter
    assert tuple(np.concatenate(tokens.training_order(examples, 8, 0, 0)).tolist()) == orders[0, 0]


def test_batches_hold_like_lengths() -> None:
    rng = np.random.default_rng(0)
    examples = of_lengths(rng.integers(1, 60, 512).tolist())
    batches = tokens.training_order(examples, 8, 0, 0)
    padded = sum(len(b) * int(examples.lengths[b].max()) for b in batches)
    assert padded < 1.15 * examples.lengths.sum()  # shuffled alone: about 1.8
    means = [examples.lengths[b].mean() for b in batches]
    assert means != sorted(means)  # and batches of a length do not follow each other


@given(lengths=LENGTHS, budget=st.integers(1, 500))
@settings(max_examples=50)
def test_evaluation_covers_every_id_within_its_budget(lengths: list[int], budget: int) -> None:
    examples = of_lengths(lengths)
    batches = list(tokens.evaluation_batches(examples, budget))
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        longest = int(examples.lengths[batch].max())
        assert len(batch) == 1 or len(batch) * longest <= budget


# The table -----------------------------------------------------------------------------------------------------------


def test_builtin_tasks_load_and_their_readme_names_them() -> None:
    data = tasks.load(TaskConfig(task="subj", max_eval_samples=10), max_train=50)
    assert data.train is not None
    assert (len(data.train), len(data.evals["validation"]), len(data.labels)) == (50, 10, 2)
    assert json.dumps(data.labels)


def test_f1_needs_two_classes(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.csv", {"sentence1": TEXTS, "sentence2": TEXTS, "label": ["a", "b", "c"] * 2})
    data = tasks.load(config(str(tmp_path), task="text-pair-classification"))
    assert data.metrics == ("accuracy", "macro_f1")
    assert tasks.TASKS["qqp"].metrics == ("accuracy", "f1")
