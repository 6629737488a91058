"""Files as streams of columns: formats, what is refused and where. All files are made here."""

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capcli.data import rows, tables
from capcli.errors import DataError


def in_archive(data: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("inside"), data, zipfile.ZIP_DEFLATED)  # without the time
    return held.getvalue()


PACKS = {
    ".GZ": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    ".zip": in_archive,
}
CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=12)


def rows_of(table: tables.Table, size: int = 3) -> list[tuple[Any, ...]]:
    """All rows, read in small batches; each batch holds exactly the columns asked for."""
    found = []
    for batch in table.batches(table.columns, size):
        assert tuple(batch) == table.columns
        assert 0 < len(batch[table.columns[0]]) <= size
        found += list(zip(*batch.values(), strict=True))
    assert len(found) == len(table)
    return found


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        tables.open_file(path, **options)
    assert str(path) in caught.value.message
    return caught.value


# Reading -------------------------------------------------------------------------------------------------------------


@given(cells=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8))
def test_a_csv_holds_any_text(tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("x") / "a.csv"
    cells = [("x", "y"), *(row for row in cells if any(map(str.strip, row)))]  # an empty row is left out
    pandas.DataFrame(cells, columns=["a", "b"]).to_csv(path, index=False, quoting=1)
    assert rows_of(tables.open_file(path)) == cells


@given(rows=st.lists(st.dictionaries(st.sampled_from("abc"), CELL | st.none() | st.integers()), min_size=1, max_size=8))
def test_json_lines_may_lack_keys(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    text = "\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)) + "\n \n"
    path = file(tmp_path_factory.mktemp("x"), "a.jsonl", text)
    table = tables.open_file(path)
    assert set(table.columns) == {key for row in rows for key in row}
    if table.columns:
        assert rows_of(table) == [tuple(row.get(key) for key in table.columns) for row in rows]


def test_a_table_is_read_from_the_start_each_time_and_only_where_asked(tmp_path: Path) -> None:
    table = tables.open_file(file(tmp_path, "a.csv", "a,b,c\n" + "".join(f"{i},{i * i},x\n" for i in range(10))))
    assert list(table.batches(["c", "b"], 4))[2] == {"c": ["x", "x"], "b": ["64", "81"]}
    first = next(iter(table.batches(["a"], 4)))
    assert next(iter(table.batches(["a"], 4))) == first == {"a": ["0", "1", "2", "3"]}


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_marks_and_ends_of_lines_do_not_matter(tmp_path: Path, suffix: str, mark: str, ending: str) -> None:
    lines = ["text,label", "é 東京,x", "", "b,y"]
    text = mark + ending.join(lines)
    table = tables.open_file(file(tmp_path, f"a.{suffix}", text.replace(",", "\t") if suffix == "tsv" else text))
    assert table.columns == ("text", "label")
    assert rows_of(table) == [("é 東京", "x"), ("b", "y")]


def test_cells_of_a_csv_may_be_long_and_hold_lines(tmp_path: Path) -> None:
    long = "word " * 100_000
    table = tables.open_file(file(tmp_path, "a.csv", f'text,label\n"{long}",x\n"two\r\nlines",y\n'))
    assert rows_of(table) == [(long, "x"), ("two\r\nlines", "y")]


def test_compressed_text_reads_as_the_text(tmp_path: Path) -> None:
    for name, text in (
        ("a.csv", "a,b\n1,x\n2,y\n"),
        ("a.tsv", "a\tb\n1\tx\n2\ty\n"),
        ("a.jsonl", '{"a": "1", "b": "x"}\n{"a": "2", "b": "y"}\n'),
        ("a.json", '[{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]'),
    ):
        for ending, pack in PACKS.items():
            packed = tables.open_file(file(tmp_path, f"{name}{ending}", pack(text.encode())))
            assert rows_of(packed, 1) == [("1", "x"), ("2", "y")], f"{name}{ending}"


def test_an_archive_holds_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train.csv", "a,b\n1,x\n")
        archive.writestr("__MACOSX/._train.csv", "no data")
    assert rows_of(tables.open_file(path)) == [("1", "x")]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other.csv", "a,b\n")
    assert refused(path).message.endswith("a.csv.zip holds 2 files, not one")


def test_what_a_spreadsheet_leaves_at_the_ends_is_not_read(tmp_path: Path) -> None:
    table = tables.open_file(file(tmp_path, "a.csv", "text,label,,\na,x,,\n,,,\nb,y,, \n,,,\n"))
    assert table.columns == ("text", "label")
    assert rows_of(table) == [("a", "x"), ("b", "y")]
    assert table.notes == ("a.csv: empty rows, skipped: 2",)
    index = tables.open_file(file(tmp_path, "b.csv", ",text,label\n0,a,x\n1,,y\n"))
    assert rows_of(index) == [("a", "x"), ("", "y")]
    assert index.notes == ()


def test_a_tsv_with_quotes_is_read_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    cells = [('he said "hi"', "x"), ("two\nlines, a\ttab", "y")]
    pandas.DataFrame(cells, columns=["text", "label"]).to_csv(path, sep="\t", index=False, quoting=1)
    table = tables.open_file(path)
    assert table.columns == ("text", "label")
    assert rows_of(table) == cells
    assert table.notes == ("a.tsv: the quotes around cells were removed, since the header has them too",)
    other = tables.open_file(file(tmp_path, "b.tsv", 'text\tlabel\n"he said ""hi"""\tx\n"so"\ty\n'))
    assert rows_of(other) == [('"he said ""hi"""', "x"), ('"so"', "y")]
    (note,) = other.notes
    assert note.startswith("b.tsv: rows with cells in quotes, which are kept (quotes have no meaning in a tsv")
    assert note.endswith("): 1")
    other = tables.open_file(file(tmp_path, "c.tsv", 'text\tlabel\n"so"\t"x"\n"so\t"y"\n"so" it is\t"y"\n'))
    assert other.notes[0].startswith("c.tsv: rows with cells in quotes") and other.notes[0].endswith("): 1")


def test_arrow_streams_and_files(tmp_path: Path) -> None:
    table = pa.table({"a": list(range(10)), "b": ["x"] * 10})
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        path = tmp_path / f"{name}.arrow"
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
        assert rows_of(tables.open_file(path)) == [(i, "x") for i in range(10)]
        file(tmp_path, f"{name}-cut.arrow", path.read_bytes()[:-8])
        refused(tmp_path / f"{name}-cut.arrow")


def test_a_tsv_without_header(tmp_path: Path) -> None:
    names = ("source", "label", "text")
    path = file(tmp_path, "a.tsv", "s1\t1\tx\ns2\t0\ty\n")
    assert rows_of(tables.open_file(path, names)) == [("s1", "1", "x"), ("s2", "0", "y")]
    assert tables.open_file(path, names).columns == names
    path = file(tmp_path, "b.tsv", "text\tidx\tlabel\ns1\t1\tx\n")
    assert tables.open_file(path, names).columns == ("text", "idx", "label")
    assert rows_of(tables.open_file(path, names)) == [("s1", "1", "x")]


def test_class_names_of_parquet(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["no", "yes"])
    features = {
        "label": label,
        "tags": datasets.List(label),
        "old": datasets.Sequence(label),
        "n": datasets.Value("int64"),
    }
    rows = {"label": [0, 1], "tags": [[0], [1, 1]], "old": [[1], []], "n": [1, 2]}
    whole = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    whole.to_parquet(tmp_path / "a.parquet")
    expected = dict.fromkeys(("label", "tags", "old"), ("no", "yes"))
    table = tables.open_file(tmp_path / "a.parquet")
    assert table.class_names == expected
    assert rows_of(table) == [(0, [0], [1], 1), (1, [1, 1], [], 2)]


@pytest.mark.parametrize("metadata", [b"not json", b'{"info": 3}', b"[]", b'{"info": {"features": {"a": 7}}}'])
def test_strange_notes_in_a_parquet_are_no_names(tmp_path: Path, metadata: bytes) -> None:
    table = pa.table({"a": [1, 2]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "a.parquet")
    assert tables.open_file(tmp_path / "a.parquet").class_names == {}


def test_a_parquet_is_read_in_small_batches_from_large_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": list(range(1000)), "b": ["x"] * 1000}), tmp_path / "a.parquet", row_group_size=700)
    sizes = [len(batch["a"]) for batch in tables.open_file(tmp_path / "a.parquet").batches(["a"], 256)]
    assert sum(sizes) == 1000
    assert max(sizes) <= 256


@pytest.mark.parametrize("layout", ["array", "under data", "lines"])
def test_json_that_is_not_of_squad(tmp_path: Path, layout: str) -> None:
    rows = [{"a": 1, "b": "x"}, {"b": "y", "c": [2]}]
    text = {"array": json.dumps(rows), "under data": json.dumps({"version": 1, "data": rows})}
    table = tables.open_file(file(tmp_path, "a.json", text.get(layout, "\n".join(map(json.dumps, rows)))))
    assert table.columns == ("a", "b", "c")
    assert rows_of(table) == [(1, "x", None), (None, "y", [2])]


def test_a_fingerprint_follows_the_content(tmp_path: Path) -> None:
    one = tables.open_file(file(tmp_path, "a.csv", "a,b\n1,2\n"))
    same = tables.open_file(file(tmp_path, "b.csv", "a,b\n1,2\n"))
    other = tables.open_file(file(tmp_path, "c.csv", "a,b\n1,3\n"))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    both = tables.open_files([tmp_path / "a.csv", tmp_path / "c.csv"])
    turned = tables.open_files([tmp_path / "c.csv", tmp_path / "a.csv"])
    assert len({one.fingerprint, both.fingerprint, turned.fingerprint}) == 3
    made = [tables.in_memory("x", {"a": [value]}).fingerprint for value in ("1", "2", 1, "\ud800")]
    assert len(set(made)) == 4


# Several files -------------------------------------------------------------------------------------------------------


def test_shards_may_order_their_columns_as_they_like(tmp_path: Path) -> None:
    paths = [file(tmp_path, f"{i}.csv", text) for i, text in enumerate(("a,b\n1,2\n", "b,a\n4,3\n"))]
    assert rows_of(tables.open_files(paths)) == [("1", "2"), ("3", "4")]
    paths.append(file(tmp_path, "2.csv", "a,c\n1,2\n"))
    with pytest.raises(DataError, match=r"2\.csv has other columns or class names than .*0\.csv"):
        tables.open_files(paths)


def test_of_several_files_some_may_have_no_rows(tmp_path: Path) -> None:
    paths = [file(tmp_path, f"{i}.csv", text) for i, text in enumerate(("a,b\n", "a,b\n1,2\n", "a,b\n"))]
    assert rows_of(tables.open_files(paths)) == [("1", "2")]
    with pytest.raises(DataError, match=r"0\.csv has no rows, and neither have the other files"):
        tables.open_files([paths[0], paths[2]])


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "", "is empty"),
        ("a.parquet", "", "is empty"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "\n\n", "has no rows"),
        ("a.jsonl", "\n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.csv", "a,b,a\n1,2,3\n", "column 'a' occurs twice"),
        ("a.csv", "a,b\n1,2\n\n1,2,3\n", "line 4 has 3 fields, the header has 2"),
        ("a.tsv", "a\tb\n1\n", "line 2 has 1 field, the header has 2"),
        ("a.csv", 'a,b\n1,2\n"open,3\n4,5\n', "line 3: the quote that begins there is not closed"),
        ("a.csv", 'a,b\n1,"two\n""lines","open\n4,5\n', "line 3: the quote that begins there is not closed"),
        ("a.csv", 'a,b\n1,"open\n4,5\n"c, d",5\n', "line 2: the quote that begins there ends in line 4 before 'c, d\""),
        ("a.csv", 'a,b\n"x\\"y\\" z",3\n', "line 2: the quote that begins there ends before 'y"),
        ("a.csv", "a,b\r1,2\r", "line 1 holds a CR alone"),
        ("a.tsv", "a\tb\r1\t2\r", "line 1 holds a CR alone"),
        ("a.csv", "a;b\n1;2,5\n", "are not separated by commas: the first line is 'a;b'"),
        ("a.csv", "sep=;\na;b\n", "are not separated by commas"),
        ("a.tsv", "a,b\n1,2\n", "are not separated by tabs: the first line is 'a,b'"),
        ("a.csv", ",,\na,b,\n", "names no columns"),
        ("a.csv", "a,b,\n1,2,\nx, y,2\n", "line 3 has '2' in a column without a name"),
        ("a.csv", "a,b\n1,2\n\0\0,3\n", "line 3, byte 8 of the file, is a NUL"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-le"), "line 1, byte 1 of the file, is a NUL"),
        ("a.csv", gzip.compress(b"a,b\n1,2\n", mtime=0), "is compressed with gzip, not a .csv file"),
        ("a.csv", bz2.compress(b"a,b\n1,2\n"), "is compressed with bzip2, not a .csv file"),
        ("a.csv.xz", "a,b\n1,2\n", "is not compressed with xz"),
        ("a.csv.bz2", bz2.compress(b"a,b\n1,2\n" * 99)[:-9], "Compressed file ended before"),
        ("a.csv.zst", pa.compress(b"a,b\n1,2\n3\n", "zstd", asbytes=True), "line 3 has 1 field, the header has 2"),
        ("a.csv", b"PK\x03\x04", "is a spreadsheet or another zip archive"),
        ("a.csv.gz", "a,b\n1,2\n", "is not compressed with gzip"),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2\n" * 99, mtime=0)[:-9], "is cut off or damaged: Compressed file"),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0) + b"junk", "is cut off or damaged: Not a gzipped file"),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)[:-8] + bytes(8), "is cut off or damaged: CRC check"),
        ("a.csv", "<!DOCTYPE html>\n<html><body>404, not found</body></html>\n", "is a web page, not a .csv file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": \n', mtime=0), "line 2, character 8: Expecting value"),
        (
            "a.parquet",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a pointer of git-lfs, not the data",
        ),
        ("a.arrow", b"\xff\xff\xff\xff and so on", "is truncated"),
        ("a.csv", b"a,b\nok,1\nb\xe9,2\n", "line 3, byte 10 of the file, is not UTF-8"),
        ("a.jsonl", b'{"a": "\xff"}\n', "line 1, byte 7 of the file, is not UTF-8"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "line 1, byte 0 of the file, is not UTF-8"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2, character 8: Expecting value"),
        ("a.jsonl", '{"a": 1}\n{\n"a": 1}\n', "line 2, character 3: Expecting property name"),
        ("a.jsonl", '{"a": 1},\n{"a": 1}\n', "line 1, character 9: Extra data"),
        ("a.jsonl", '{"a": 1}\n\n[1]\n', "line 3 is not a JSON object"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', "line 2: key 'a' occurs twice"),
        ("a.jsonl", "[" * 100_000, "line 1: "),
        ("a.json", '{"a": {"b": 1, "b": 2}}', "key 'b' occurs twice"),
        ("a.json", '{"a": 1}', "is neither an array of rows nor in SQuAD's layout"),
        ("a.json", "[1, 2]", "is neither an array of rows nor in SQuAD's layout"),
        (
            "a.json",
            '{"data": [{"paragraphs": [{"context": "x", "qas": [{"id": "1"}]}]}]}',
            "article 0: there is no 'question'",
        ),
        (
            "a.json",
            '{"data": [{"paragraphs": [{"qas": [{"id": "1", "question": ""}]}]}]}',
            "article 0: there is no 'context'",
        ),
        ("a.json", '{"data": [{"paragraphs": 7}]}', "is not in SQuAD's layout: article 0"),
        ("a.parquet", b"PAR1 no", "cannot read"),
        ("a.xlsx", b"PK", "is not a .parquet, .arrow, .csv"),
    ],
)
def test_damaged_files_are_refused_with_the_place(
    tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    assert expected in refused(file(tmp_path, name, content)).message


def test_columns_of_a_parquet_have_one_name_each(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "a.parquet")
    assert "column 'a' occurs twice" in refused(tmp_path / "a.parquet").message


def test_a_parquet_that_is_damaged_inside_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [str(i) * 50 for i in range(5000)]}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[100 : len(data) // 2] = bytes(len(data) // 2 - 100)
    path.write_bytes(data)
    table = tables.open_file(path)
    with pytest.raises(DataError, match=r"cannot read .*a\.parquet"):
        rows_of(table)


def test_a_file_that_goes_away_is_named(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "a,b\n1,2\n")
    table = tables.open_file(path)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read .*a\.csv: No such file"):
        rows_of(table)


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.csv", 'a,b\n"x\\"y\\"",3\n', "is written twice"),
        ("a.csv", 'a,b\n"open,3\n', "is written twice"),
        ("a.csv", "a,b\n1, 2,3\n", "a cell that holds commas must be in quotes"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "it is UTF-16: save the file as UTF-8"),
        ("a.csv", "a;b\n1;2\n", "save the file as csv with commas"),
        ("a.tsv", 'a\tb\n"two\nlines"\t1\n', "quotes have no meaning in a tsv; save it as csv"),
        ("a.xlsx", b"PK", "save the sheet as csv"),
        ("a.csv.lz4", b"x", "unpack it"),
        ("a.parquet.gz", b"x", "unpack it"),
        ("a.zip", b"x", "unpack it"),
        ("a.pkl", b"x", "never read"),
        ("a.txt", b"x", "columns of a csv"),
        ("a.ndjson", b"{}", "name it .jsonl"),
        ("a.gz", b"x", "name it by what is in it, such as .csv.gz"),
        ("a.jsonl", "[1, 2]\n", "an array of rows is a .json file"),
        ("a.csv.gz", gzip.compress(gzip.compress(b"a,b\n1,2\n", mtime=0), mtime=0), "it is compressed twice"),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2\n" * 99, mtime=0)[:-9], "copy or download it again"),
        ("a.docx", b"x", "convert the data to one of these"),
    ],
)
def test_what_is_refused_has_a_way_out(tmp_path: Path, name: str, content: str | bytes, hint: str) -> None:
    assert hint in refused(file(tmp_path, name, content)).hint


def test_pipes_sockets_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "device.csv").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket.csv"))
        for name in ("pipe", "device", "socket"):
            assert refused(tmp_path / f"{name}.csv").message.endswith("is a pipe, a socket or a device, not a file")


def test_a_name_that_is_not_utf_8_is_no_obstacle(tmp_path: Path) -> None:
    path = file(tmp_path, os.fsdecode(b"a\xff.csv"), "a,b\n1,2\n")
    assert rows_of(tables.open_file(path)) == [("1", "2")]
    for ending in ("parquet", "arrow", "jsonl"):
        refused(file(tmp_path, os.fsdecode(b"a\xff.") + ending, b"no" * 8))


def test_nothing_that_unpacks_to_too_much_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ROW_BYTES", 1000), ("PACKED_JSON_BYTES", 2000), ("FREE_BYTES", 5000)):
        monkeypatch.setattr(rows, name, value)
    for name, text, expected in (
        ("line.csv", "a,b\n" + "x" * 3000, "line 2 is longer than"),
        ("quote.csv", 'a,b\n1,2\n"' + "xy\n" * 1000, "line 3: the quote that begins there is not closed"),
        ("cells.csv", "a,b\n" + '"x\n",' * 1000, "line 2"),
        ("rows.csv", "a,b\n" + "1,2\n" * 30_000, "unpacks to more than 100 times its size"),
        ("line.jsonl", json.dumps({"a": "x" * 3000}), "line 1 is longer than"),
        ("whole.json", "[" + '{"a": 1},\n' * 500 + '{"a": 2}]', "is larger than"),
    ):
        for ending, pack in PACKS.items():
            assert expected in refused(file(tmp_path, f"{name}{ending}", pack(text.encode()))).message, ending


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "train.csv").mkdir()
    assert refused(tmp_path / "train.csv").message.endswith("train.csv is a folder, not a file")
    (tmp_path / "dev.csv").symlink_to(tmp_path / "nothing")
    assert refused(tmp_path / "dev.csv").message.endswith("is a link to nothing")
    assert refused(tmp_path / "test.csv").message.endswith("is not a file")
    (tmp_path / "real").mkdir()
    file(tmp_path / "real", "x.csv", "a,b\n1,2\n")
    (tmp_path / "test.csv").symlink_to(tmp_path / "real" / "x.csv")
    assert rows_of(tables.open_file(tmp_path / "test.csv")) == [("1", "2")]


def test_broken_rows_of_a_tsv_are_counted_when_they_may_be_left_out(tmp_path: Path) -> None:
    path = file(tmp_path, "a.tsv", "a\tb\n1\t2\nbroken\n\n3\t4\t5\n6\t7\n")
    table = tables.open_file(path, lenient=True)
    assert rows_of(table) == [("1", "2"), ("6", "7")]
    assert table.notes == ("a.tsv: rows with too many or too few fields, skipped: 2",)
    other = file(tmp_path, "b.tsv", "a\tb\nx\n6\t7\n")
    assert tables.open_files([path, other], lenient=True).notes == (
        *table.notes,
        "b.tsv: rows with too many or too few fields, skipped: 1",
    )
    assert "line 2" in refused(file(tmp_path, "a.csv", "a,b\n1\n"), lenient=True).message
