"""Files as streams of columns.

A `Table` is read in batches, from the start each time; of its rows only one batch is in memory (a `.json` file and what
`in_memory` gets are the exceptions).
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from capcli import files
from capcli.data import rows
from capcli.data.packed import PACKINGS, packing
from capcli.errors import DataError, first_line

SUFFIXES = (".parquet", ".arrow", ".csv", ".tsv", ".jsonl", ".json")
TEXTS = SUFFIXES[2:]
PACKED = tuple(f"{text}{end}" for text in TEXTS for end in PACKINGS)  # parquet and arrow have their own compression
BATCH_ROWS = 2000
READ_BYTES = 1 << 20
# What to do with data of other formats, by the ending of the file.
_WAYS_OUT = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), "save the sheet as csv, in UTF-8"),
    **dict.fromkeys(
        (*PACKINGS, ".lz4", ".lzma"), "unpack it; only csv, tsv, jsonl and json are read compressed, as .csv.gz"
    ),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "unpack it, and give the folder or file"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".joblib"), "pickles can run code and are never read; save as parquet"),
    ".gz": f"name it by what is in it, such as {PACKED[0]}; a folder packed as .tar.gz must be unpacked",
    **dict.fromkeys((".ndjson", ".jsonlines", ".jl"), "if it has one object per line, name it .jsonl"),
    **dict.fromkeys(
        (".txt", ".tab", ".dat"), "write texts and labels as the columns of a csv; if they are, name it .csv or .tsv"
    ),
}
# How files begin that have the ending of a text file and are none.
_NO_TEXT = {
    b"PK\x03\x04": ("is a spreadsheet or another zip archive", "save the sheet as csv, in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("is a spreadsheet", "save the sheet as csv, in UTF-8"),
    b"PAR1": ("is a parquet file", "rename it: .parquet"),
    **{
        one.mark: (f"is compressed with {one.name}", f"rename it: .csv{end}")
        for end, one in PACKINGS.items()
        if end != ".zip"
    },
    **dict.fromkeys((b"<!DOCTYPE", b"<!doctype", b"<html"), ("is a web page", "download the file itself")),
}
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

Columns = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows with named columns, read in batches.

    name: path or hub id. class_names: the names behind the codes of a column of class labels, or of lists of them.
    fingerprint: hex; another content has another one. notes: what a user should know of how it was read.
    read: (columns, most rows of a batch) -> batches; use `batches`.
    """

    name: str
    columns: tuple[str, ...]
    class_names: Mapping[str, tuple[str, ...]]
    fingerprint: str
    n_rows: int
    read: Callable[[Sequence[str], int], Iterator[Columns]]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.n_rows

    def batches(self, columns: Sequence[str], size: int = BATCH_ROWS) -> Iterator[Columns]:
        """The given columns of all rows in order, at most `size` rows at a time. Raises `DataError` naming the file."""
        with reading(self.name):
            yield from self.read(columns, size)


# Where tables come from ----------------------------------------------------------------------------------------------


def ending(path: Path) -> str:
    """The ending of the name of a file that is read, such as `.csv` or `.csv.gz`; else nothing."""
    return next((suffix for suffix in (*SUFFIXES, *PACKED) if path.name.lower().endswith(suffix)), "")


def _plain(path: Path) -> str:
    """The ending without that of the compression."""
    found = ending(path)
    return found if found in SUFFIXES else f".{found.split('.')[1]}" if found else ""


def refusal(path: Path) -> DataError:
    """The error for a file of a format that is not read, or for what is no file at all."""
    if path.is_dir():
        return DataError(f"{path} is a folder, not a file")
    if path.is_symlink() and not path.exists():
        return DataError(f"{path} is a link to nothing")
    if path.exists() and not path.is_file():
        return DataError(f"{path} is a pipe, a socket or a device, not a file", "write the data to a file first")
    if not path.is_file():
        return DataError(f"{path} is not a file")
    if packing(path) and ending(path.with_suffix("")):
        return DataError(f"{path} is compressed", "unpack it")
    return DataError(f"{path} is not a {', '.join(SUFFIXES)} file", way_out(path) or "convert the data to one of these")


def way_out(path: Path) -> str:
    """What to do with a file of a format that is not read; empty when nothing is known of it."""
    return _WAYS_OUT.get(path.suffix.lower(), "")


def open_files(paths: Sequence[Path], header: Sequence[str] = (), *, lenient: bool = False) -> Table:
    """The rows of several files, one after the other; see `open_file`. Raises `DataError` when columns differ.

    Of several files, some may have no rows.
    """
    if len(paths) == 1:
        return open_file(paths[0], header, lenient=lenient)
    opened = [_opened(path, header, lenient=lenient) for path in paths]
    tables = [table for table in opened if len(table)]
    if not tables:
        raise DataError(f"{paths[0]} has no rows, and neither have the other files of its split")
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns) or table.class_names != first.class_names:
            raise DataError(
                f"{table.name} has other columns or class names than {first.name}",
                "the files of one split must have the same columns; keep others in another folder",
            )
    return replace(
        first,
        fingerprint=digest("".join(table.fingerprint for table in opened)),
        n_rows=sum(map(len, tables)),
        notes=tuple(note for table in opened for note in table.notes),
        read=lambda columns, size: chain.from_iterable(table.batches(columns, size) for table in tables),
    )


def open_file(path: Path, header: Sequence[str] = (), *, lenient: bool = False) -> Table:
    """The table in a parquet, arrow, csv, tsv, jsonl or json file, by its ending.

    header: column names of a tsv that has none (its first line holds none of these names). lenient: rows of a tsv with
    too many or too few fields are left out and counted, instead of being an error.

    Raises:
        DataError: naming the file, and the line where there are lines.
    """
    table = _opened(path, header, lenient=lenient)
    if len(table) == 0:
        raise DataError(f"{path} has no rows")
    return table


def _opened(path: Path, header: Sequence[str], *, lenient: bool) -> Table:
    """As `open_file`, and a table may have no rows."""
    with reading(str(path)):
        kind = _plain(path)
        if not kind or not path.is_file():
            raise refusal(path)
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty", "write or copy it again, or remove it")
        _check_beginning(path)
        fingerprint = files.sha256(path)
        if kind in (".csv", ".tsv"):
            table = _separated(path, header, lenient=lenient and kind == ".tsv")
        else:
            table = {".parquet": _parquet, ".arrow": _arrow, ".jsonl": _json_lines, ".json": _json}[kind](path)
    return replace(table, fingerprint=fingerprint)


def _check_beginning(path: Path) -> None:
    """Refuse what stands for a file that git-lfs did not fetch, and what is not text though its name says so."""
    with path.open("rb") as file:
        begin = file.read(40)
    if begin.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a pointer of git-lfs, not the data", "run: git lfs pull")
    packed = packing(path)
    if packed and not begin.startswith(packed.mark):
        raise DataError(f"{path} is not compressed with {packed.name}", f"if it is text, name it {_plain(path)}")
    if ending(path) in TEXTS:
        for mark, (what, hint) in _NO_TEXT.items():
            if begin.startswith(mark):
                raise DataError(f"{path} {what}, not a {ending(path)} file", hint)


def in_memory(name: str, columns: Mapping[str, Sequence[Any]], fingerprint: str = "") -> Table:
    """A table of values that are in memory already, all columns equally long; the fingerprint is that of the values."""
    n_rows = len(next(iter(columns.values()), ()))
    assert all(len(values) == n_rows for values in columns.values())

    def read(chosen: Sequence[str], size: int) -> Iterator[Columns]:
        for begin in range(0, n_rows, size):
            yield {column: list(columns[column][begin : begin + size]) for column in chosen}

    if not fingerprint:
        fingerprint = digest(json.dumps({column: list(values) for column, values in columns.items()}, default=str))
    return Table(name=name, columns=tuple(columns), class_names={}, fingerprint=fingerprint, n_rows=n_rows, read=read)


def digest(text: str) -> str:
    """The sha256 of a text, hex."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Whatever a reader raises, as a `DataError` that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise DataError(f"cannot read {name}: {reason}") from error


def _unique(names: Iterable[str], path: Path) -> tuple[str, ...]:
    """Column names, each once."""
    seen: dict[str, None] = {}
    for name in names:
        if name in seen:
            raise DataError(f"cannot read {path}: column {name!r} occurs twice", "rename one of the two")
        seen[name] = None
    return tuple(seen)


# parquet -------------------------------------------------------------------------------------------------------------


def _parquet(path: Path) -> Table:
    import pyarrow.parquet  # type: ignore[import-untyped]

    with pyarrow.parquet.ParquetFile(path) as file:
        schema, n_rows = file.schema_arrow, file.metadata.num_rows

    def read(columns: Sequence[str], size: int) -> Iterator[Columns]:
        # As it is, a reader takes a whole row group into memory, which may be the whole file.
        with pyarrow.parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=size, columns=list(columns)):
                yield {column: batch.column(column).to_pylist() for column in columns}

    return Table(
        name=str(path),
        columns=_unique(schema.names, path),
        class_names=_class_names(schema.metadata or {}),
        fingerprint="",
        n_rows=n_rows,
        read=read,
    )


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Names of the ClassLabel columns, and of those that hold lists of them, from what `datasets` notes in a file."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        found = {column: _feature_names(feature) for column, feature in features.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {column: names for column, names in found.items() if names}


def _feature_names(feature: Any) -> tuple[str, ...]:
    if isinstance(feature, list):
        return _feature_names(feature[0]) if feature else ()
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
        return tuple(map(str, feature.get("names") or ()))
    return _feature_names(feature["feature"]) if isinstance(feature, dict) and "feature" in feature else ()


# arrow ---------------------------------------------------------------------------------------------------------------


def _arrow(path: Path) -> Table:
    """A stream, as `save_to_disk` of `datasets` writes it, or a file with an index."""
    import pyarrow
    import pyarrow.ipc  # type: ignore[import-untyped]

    with path.open("rb") as file:
        indexed = file.read(6) == b"ARROW1"
        file.seek(-len(_END_OF_STREAM), 2)
        if not indexed and file.read() != _END_OF_STREAM:
            raise DataError(f"{path} is truncated, or was written by an old library", "save or copy it again")

    def batches() -> Iterator[Any]:
        with path.open("rb") as file, (pyarrow.ipc.open_file if indexed else pyarrow.ipc.open_stream)(file) as reader:
            yield from (map(reader.get_batch, range(reader.num_record_batches)) if indexed else reader)

    def read(columns: Sequence[str], size: int) -> Iterator[Columns]:
        for batch in batches():
            for begin in range(0, batch.num_rows, size):
                part = batch.slice(begin, size)
                yield {column: part.column(column).to_pylist() for column in columns}

    with path.open("rb") as file, (pyarrow.ipc.open_file if indexed else pyarrow.ipc.open_stream)(file) as reader:
        schema = reader.schema
    return Table(
        name=str(path),
        columns=_unique(schema.names, path),
        class_names=_class_names(schema.metadata or {}),
        fingerprint="",
        n_rows=sum(batch.num_rows for batch in batches()),
        read=read,
    )


# csv and tsv ---------------------------------------------------------------------------------------------------------


def _separated(path: Path, header: Sequence[str], *, lenient: bool) -> Table:
    sheet = rows.sheet(path, header, tab=ending(path).startswith(".tsv"), lenient=lenient)
    _unique(sheet.names, path)
    left: collections.Counter[str] = collections.Counter()
    n_rows = sum(1 for _ in sheet.rows(left))

    def read(columns: Sequence[str], size: int) -> Iterator[Columns]:
        source = sheet.rows(collections.Counter())
        while batch := list(islice(source, size)):
            yield {column: [row[sheet.places[column]] for row in batch] for column in columns}

    return Table(
        name=str(path),
        columns=sheet.names,
        class_names={},
        fingerprint="",
        n_rows=n_rows,
        notes=tuple(f"{path.name}: {what}" for what in (*sheet.notes, *(f"{what}: {n:,}" for what, n in left.items()))),
        read=read,
    )


# json ----------------------------------------------------------------------------------------------------------------


def _json_lines(path: Path) -> Table:
    """A key that a row lacks is missing there (None)."""
    names: dict[str, None] = {}
    n_rows = 0
    for row in rows.json_rows(path):
        names.update(dict.fromkeys(row))
        n_rows += 1

    def read(columns: Sequence[str], size: int) -> Iterator[Columns]:
        source = rows.json_rows(path)
        while batch := list(islice(source, size)):
            yield {column: [row.get(column) for row in batch] for column in columns}

    return Table(name=str(path), columns=tuple(names), class_names={}, fingerprint="", n_rows=n_rows, read=read)


def _json(path: Path) -> Table:
    """SQuAD's own layout, flattened; or an array of rows, also under the key `data`; or JSON lines."""
    try:
        data = rows.parsed(rows.whole(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return _json_lines(path)
        raise DataError(f"cannot read {path}: {error}") from error
    found = data.get("data") if isinstance(data, dict) else data
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(
            f"{path} is neither an array of rows nor in SQuAD's layout", "for one row per line, name it .jsonl"
        )
    if found and all("paragraphs" in row for row in found):
        found = list(_squad_rows(found, path))
    names = dict.fromkeys(name for row in found for name in row)
    return in_memory(str(path), {name: [row.get(name) for row in found] for name in names}, fingerprint="of the file")


def _squad_rows(articles: Sequence[Mapping[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """One row per question, with the columns of the hub set."""
    for number, article in enumerate(articles):
        try:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield {
                        "id": question["id"],
                        "title": article.get("title", ""),
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": question.get("answers"),
                    }
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not in SQuAD's layout: article {number}: {first_line(error)}") from error
