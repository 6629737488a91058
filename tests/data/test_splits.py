"""Which files of a folder are which split, and what is said of the others. All files are made here."""

import os
from pathlib import Path

import datasets
import pytest

from capcli.data import layout, tables
from capcli.errors import DataError

TABLE = "a,b\n1,2\n"


def make(root: Path, names: str) -> Path:
    """A folder with a small table under each name; the names are separated by commas."""
    for name in names.split(", "):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TABLE)
    return root


def found(root: Path, names: str) -> dict[str, list[str]]:
    """The splits of such a folder, as paths from it."""
    files = layout.find(make(root, names)).files
    return {name: [path.relative_to(root).as_posix() for path in paths] for name, paths in files.items()}


@pytest.mark.parametrize(
    ("names", "split"),
    [
        ("train.csv, Train.csv.gz, TRAINING.jsonl, train-v1.1.json, train.json.gz, train_v2.tsv", "train"),
        ("validation.csv, valid.csv, Val.csv, eval.tsv, evaluation.jsonl", "validation"),
        ("dev.tsv, development.csv", "dev"),
        ("val_matched.csv, validation-matched.csv", "validation_matched"),
        ("dev_mismatched.tsv", "dev_mismatched"),
        ("test.parquet, testing.csv", "test"),
    ],
)
def test_usual_names(tmp_path: Path, names: str, split: str) -> None:
    for i, name in enumerate(names.split(", ")):
        assert found(tmp_path / str(i), name) == {split: [name]}


@pytest.mark.parametrize(
    "names",
    [
        "train-00000-of-00003.csv, train-00001-of-00003.csv, train-00002-of-00003.csv",
        "train-00000-of-00002-1a2b3c4d5e6f7a8b.parquet, train-00001-of-00002-8b7a6f5e4d3c2b1a.parquet",
        "train-00000-of-00001.snappy.parquet",
        "train-1-of-2.csv, train-2-of-2.csv",
        "train.csv, train_2.csv, train_3.csv",
        "train.csv, train_1.csv",
        "train-part1.csv, train-part2.csv",
        "train.0.csv.gz, train.1.csv.gz",
        "train1.jsonl, train2.jsonl",
        "train_part_1.csv, train_part_2.csv",
        "train/part-00000-9ab.c000.csv, train/part-00001-9ab.c000.csv",
        "train/2.csv, train/10.csv",
        "train.csv/part-0.csv, train.csv/part-1.csv",
        "train/2020/a.csv, train/2021/a.csv",
        "train/x-00000-of-00002.csv, train/x-00001-of-00002.csv",
    ],
)
def test_parts_are_one_split_in_their_order(tmp_path: Path, names: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "_SUCCESS").touch()
    assert found(tmp_path, names + ", val.csv") == {"train": names.split(", "), "validation": ["val.csv"]}


def test_parts_without_a_number_of_them_are_said(tmp_path: Path) -> None:
    assert layout.find(make(tmp_path / "a", "train.csv, train_2.csv")).notes == (
        "train is read from train.csv, train_2.csv",
    )
    assert layout.find(make(tmp_path / "b", "train-0-of-2.csv, train-1-of-2.csv, val.csv")).notes == ()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("train-00000-of-00003.csv, train-00002-of-00003.csv", "has 2 of 3 parts of train; part 1 is missing"),
        ("train-00000-of-00003-1a2b3c4d5e6f7a8b.csv", "has 1 of 3 parts of train; part 1 is missing"),
        ("train-0-of-99999999999999.csv", "has 1 of 99999999999999 parts of train; part 1 is missing"),
        ("train/x-00001-of-00002.csv", "has 1 of 2 parts of train; part 0 is missing"),
        ("train_1.csv, train_3.csv", "numbers up to 3; part 2 is missing"),
        ("train_2.csv", "numbers up to 2; part 0 is missing"),
        ("train.csv, train_3.csv", "numbers up to 3; part 1 is missing"),
        ("train.csv, train.parquet", "several files for the train split: train.csv, train.parquet"),
        ("train.csv, train.csv.gz", "several files for the train split: train.csv, train.csv.gz"),
        ("train-v1.1.json, train-v2.0.json", "several files for the train split: train-v1.1.json, train-v2.0.json"),
        ("train.csv, train-00000-of-00001.csv", "several files for the train split"),
        ("train_1.csv, train-1.csv", "several files for the train split"),
        ("val.csv, valid.csv", "several files for the validation split: val.csv, valid.csv"),
        ("train.csv, train/a.csv", "several files for the train split: train/a.csv, train.csv"),
        ("train/a.csv, train/a.jsonl", "several files for the train split: train/a.csv, train/a.jsonl"),
        ("train/test.csv", "test.csv has the name of another split than its folder"),
        ("part.csv, other-v1.json", "no split in .*: found other-v1.json, part.csv"),
        ("imdb_train.csv, trainer.csv", "no split in .*: found imdb_train.csv, trainer.csv"),
        ("pos/1.txt, neg/1.txt", "no data files in .*: found neg/1.txt, pos/1.txt"),
        ("train.xlsx, other.csv", "train.xlsx is not a .parquet, .arrow, .csv"),
        ("README.md, .train.csv, ~$train.xlsx", "no data files in [^:]*$"),
        ("cola/train.csv, cola/dev.csv, rte/train.csv", "contains several sets of splits: cola, rte"),
    ],
)
def test_folders_that_are_unclear(tmp_path: Path, names: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        layout.find(make(tmp_path / "set", names))


@pytest.mark.parametrize(
    ("names", "where"), [("data/train.csv, data/val.csv, README.md", "data"), ("a/b/train/1.csv, a/b/dev/1.csv", "a/b")]
)
def test_the_only_folder_with_splits_is_read_and_said(tmp_path: Path, names: str, where: str) -> None:
    one = layout.find(make(tmp_path, names))
    assert all(path.is_relative_to(tmp_path / where) for paths in one.files.values() for path in paths)
    assert one.notes == (f"the splits are read from the folder {where}",)


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    make(tmp_path, "train.csv, val.csv, extra.csv, train (1).csv, train_clean.csv, train.zip, val.txt, old/train.csv")
    make(tmp_path, "raw/a/b.csv, README.md, train.py, LICENSE, dataset_infos.json")
    make(tmp_path, "out/report.json, out/x.csv, stopped/work/config.json, stopped/work/x/history.json")
    make(tmp_path, ".hidden.csv, ._train.csv, .~lock.train.csv#, ~$a.xlsx, train.csv~")
    (note,) = layout.find(tmp_path).notes
    assert note == (
        "in the data folder, but not read: extra.csv, old/, raw/, train (1).csv, train.zip, train_clean.csv and 1 more"
    )


def test_a_split_that_cannot_be_read_is_known(tmp_path: Path) -> None:
    one = layout.find(make(tmp_path, "train.csv, val.csv.lz4, test.csv"))
    assert set(one.files) == {"train", "test"}
    assert one.unread == {"validation": tmp_path / "val.csv.lz4"}


def test_files_of_a_test_split_that_is_not_used_may_be_anything(tmp_path: Path) -> None:
    names = "train.csv, dev.csv, test_2016.csv, test_2017.jsonl"
    assert found(tmp_path / "a", names)["test"] == ["test_2016.csv", "test_2017.jsonl"]
    with pytest.raises(DataError, match="several files for the test split"):
        found(tmp_path / "b", names.replace("dev.csv, ", ""))


def test_one_file_is_the_training_split(tmp_path: Path) -> None:
    path = make(tmp_path, "anything.csv") / "anything.csv"
    assert layout.find(path).files == {"train": [path]}


def test_what_save_to_disk_writes_is_read_by_its_own_list(tmp_path: Path) -> None:
    features = datasets.Features({"a": datasets.Value("int64"), "y": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"a": list(range(8)), "y": [0, 1] * 4}
    whole = datasets.Dataset.from_dict(rows, features=features)
    shards = {"train": 2, "test": 1}
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "set", num_shards=shards)
    (tmp_path / "set" / "train" / "cache-0123456789abcdef.arrow").write_bytes(b"not of the set")
    one = layout.find(tmp_path / "set")
    assert {name: len(paths) for name, paths in one.files.items()} == shards
    assert one.notes == ()
    table = tables.open_files(one.files["train"])
    assert [batch["a"] for batch in table.batches(["a"], 3)] == [[0, 1, 2], [3], [4, 5, 6], [7]]
    assert table.class_names == {"y": ("no", "yes")}
    whole.save_to_disk(tmp_path / "alone")
    assert [path.name for path in layout.find(tmp_path / "alone").files["train"]] == ["data-00000-of-00001.arrow"]
    state = tmp_path / "alone" / "state.json"
    state.write_text(state.read_text().replace("data-0", "../data-0"))
    with pytest.raises(DataError, match="names no files of its folder"):
        layout.find(tmp_path / "alone")


def test_what_is_no_folder_of_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, expected in (
        (tmp_path / "nothing", "no data at"),
        (tmp_path / "pipe", "is a pipe, a socket or a device"),
        (Path("/dev/zero"), "is a pipe, a socket or a device"),
        (tmp_path / ("x" * 5000), "File name too long"),
    ):
        with pytest.raises(DataError, match=expected):
            layout.find(path)


def test_folders_that_hold_one_another_end(tmp_path: Path) -> None:
    (make(tmp_path, "train.csv") / "again").symlink_to(tmp_path)
    assert layout.find(tmp_path).notes == ("in the data folder, but not read: again/",)
