"""Texts as they come: files by their ending, lines, and what arrives on a pipe."""

import bz2
import contextlib
import gzip
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from capcli.data import incoming, rows
from capcli.data.incoming import CHUNK, Incoming, Row
from capcli.errors import DataError, Stopped


def read(texts: Incoming, *columns: str) -> list[Row]:
    return [row for chunk in texts.read(columns) for row in chunk]


def test_rows_of_every_kind_of_file(tmp_path: Path) -> None:
    table = {"a": ["x", "y\tz"], "b": ["1", "2"]}
    (tmp_path / "t.csv").write_text("a,b\nx,1\ny\tz,2\n")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"a,b\nx,1\ny\tz,2\n"))
    (tmp_path / "t.jsonl").write_text('{"a": "x", "b": "1"}\n\n{"b": "2", "a": "y\\tz"}\n')
    (tmp_path / "t.json").write_text(json.dumps([{"a": "x", "b": "1"}, {"a": "y\tz", "b": "2"}]))
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "t.parquet")
    for name in ("t.csv", "t.csv.gz", "t.jsonl", "t.json", "t.parquet"):
        found = incoming.from_file(tmp_path / name)
        assert (found.columns, found.n_rows, found.unit) == (("a", "b"), 2, "row")
        assert read(found, "b", "a") == [(0, ("1", "x")), (1, ("2", "y\tz"))]
        assert read(found, "a") == [(0, ("x",)), (1, ("y\tz",))], "from the start again"
        assert found.place(1) == f"row 1 of {tmp_path / name}"


@pytest.mark.parametrize("name", ["t.txt", "T.TXT", "t.txt.bz2"])
def test_lines_of_text(tmp_path: Path, name: str) -> None:
    text = "\ufeffone, two\r\n\n[3]\tfour".encode()
    (tmp_path / name).write_bytes(bz2.compress(text) if name.endswith("bz2") else text)
    found = incoming.from_file(tmp_path / name)
    assert (found.columns, found.n_rows, found.place(2)) == ((), 3, f"line 2 of {tmp_path / name}")
    assert read(found, "text") == [(1, ("one, two",)), (2, ("",)), (3, ("[3]\tfour",))]
    with pytest.raises(DataError) as caught:
        read(found, "text", "pair")
    assert caught.value.message == f"line 1 of {tmp_path / name} has 0 tabs, where 2 texts need one between them"


def test_a_tab_is_between_two_texts(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("a b\tc\n\td\n")
    assert read(incoming.from_file(tmp_path / "t.txt"), "text", "pair") == [(1, ("a b", "c")), (2, ("", "d"))]


def test_a_chunk_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x\n" * (2 * CHUNK + 1))
    (tmp_path / "t.csv").write_text("a\n" + "x\n" * (2 * CHUNK + 1))
    for name in ("t.txt", "t.csv"):
        chunks = list(incoming.from_file(tmp_path / name).read(["a"]))
        assert [len(chunk) for chunk in chunks] == [CHUNK, CHUNK, 1]
        assert chunks[2][0][0] == 2 * CHUNK + (name == "t.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"", " is empty"),
        ("t.csv", b"", " is empty"),
        ("t.csv", b"a\n", " has no rows"),
        ("t.txt", b"a\n\xff\n", ": line 2, byte 2 of the file, is not UTF-8"),
        ("t.txt", b"a\nb\0c\n", ": line 2, byte 3 of the file, is a NUL, which is not text"),
        ("t.jsonl", b'{"a": "x"}\n{"a": \n', ": line 2, character 8: Expecting value"),
        ("t.csv", b"a,b\nx\n", ": line 2 has 1 field, the header has 2"),
        ("t.txt.gz", b"plain", "Not a gzipped file"),
        ("t.doc", b"x", " is not a .parquet, .arrow, .csv, .tsv, .jsonl, .json, .txt file"),
        ("t.xlsx", b"x", " is not a .parquet, .arrow, .csv, .tsv, .jsonl, .json, .txt file"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(incoming.from_file(tmp_path / name), "a")
    assert str(tmp_path / name) in caught.value.message
    assert message in caught.value.message


def test_a_line_that_is_too_long_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "ROW_BYTES", 1 << 20)
    monkeypatch.setattr(rows.decoded, "__defaults__", (1 << 20,))
    (tmp_path / "t.txt").write_text("a\n" + "b" * ((1 << 20) + 1) + "\n")
    with pytest.raises(DataError, match=r": line 2 is longer than 1 MiB$"):
        incoming.from_file(tmp_path / "t.txt")
    sent = [b"a\n", *[b"b" * (1 << 16)] * 40]
    with pytest.raises(DataError, match=r"^cannot read stdin: line 2 is longer than 1 MiB$"):
        read(piped(sent), "text")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.txt")
    (tmp_path / "d.txt").mkdir()
    for name, message in (
        ("p.txt", "is a pipe"),
        ("d.txt", "is a folder"),
        ("n.txt", "is not a file"),
        ("n.csv", "is not a file"),
    ):
        with pytest.raises(DataError, match=message):
            incoming.from_file(tmp_path / name)


# A pipe --------------------------------------------------------------------------------------------------------------


def piped(sent: list[bytes]) -> Incoming:
    """What a thread writes into a pipe, in these pieces."""
    out, into = os.pipe()

    def write() -> None:
        with contextlib.suppress(BrokenPipeError):
            for piece in sent:
                os.write(into, piece)
        os.close(into)

    threading.Thread(target=write, daemon=True).start()
    return incoming.from_pipe(out, lambda: None)


def test_lines_that_arrive_in_pieces() -> None:
    found = piped([b"one", b" two\nthr", "eé".encode()[:2], "é".encode()[1:] + b"\r\nfour"])
    assert (found.columns, found.n_rows, found.place(2)) == ((), 0, "line 2 of stdin")
    assert read(found, "text") == [(1, ("one two",)), (2, ("threé",)), (3, ("four",))]


def test_json_lines_are_known_by_the_first() -> None:
    found = piped([b'{"a": "x", "b": 1}\n\n{"a": "y"}\n'])
    assert found.columns == ("a", "b")
    assert read(found, "a", "b") == [(1, ("x", 1)), (3, ("y", None))]
    assert read(piped([b"{not json}\n[1]\n"]), "text") == [(1, ("{not json}",)), (2, ("[1]",))]


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"", "stdin is empty"),
        (b'{"a": \n', "cannot read stdin: line 1, character 8: Expecting value"),
        (b'{"a": "x"}\nplain\n', "cannot read stdin: line 2, character 1: Expecting value"),
        (b'{"a": "x"}\n["y"]\n', "cannot read stdin: line 2 is not a JSON object"),
        (b"a\n\xff\n", "cannot read stdin: line 2, byte 2 of the file, is not UTF-8"),
        (b"a\nb\0\n", "cannot read stdin: line 2, byte 3 of the file, is a NUL, which is not text"),
    ],
)
def test_faults_of_a_pipe_name_the_line(sent: bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(piped([sent]), "a")
    assert caught.value.message == message


def test_a_chunk_is_what_has_arrived() -> None:
    """The second line is only sent when the first has come through."""
    out, into = os.pipe()
    os.write(into, b"one\ntwo\n")
    chunks: Iterator[Any] = incoming.from_pipe(out, lambda: None).read(["text"])
    assert next(chunks) == [(1, ("one",)), (2, ("two",))]
    os.write(into, b"three\nfo")
    assert next(chunks) == [(3, ("three",))]
    os.close(into)
    assert list(chunks) == [[(4, ("fo",))]]


def test_many_lines_come_in_chunks() -> None:
    found = list(piped([b"x\n" * (3 * CHUNK)]).read(["text"]))
    assert max(map(len, found)) <= CHUNK
    assert [number for chunk in found for number, _ in chunk] == list(range(1, 3 * CHUNK + 1))


def test_the_wait_for_a_line_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "PATIENCE", 0.01)
    asked = []

    def check() -> None:
        asked.append(None)
        if len(asked) > 3:
            raise Stopped("enough")

    out, _ = os.pipe()
    with pytest.raises(Stopped):
        incoming.from_pipe(out, check)
