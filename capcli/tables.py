"""Files as streams of columns.

A `Table` is read in batches, from the start each time; of its rows only one batch is in memory (a `.json` file and what
`in_memory` gets are the exceptions).
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from capcli import files
from capcli.errors import DataError
from capcli.hub import first_line

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json")
BATCH_ROWS = 2000
READ_BYTES = 1 << 20
FIELD_LIMIT = 2**31 - 1  # characters of one csv cell; Python's own limit of 131,072 is shorter than many documents
_SHARD = re.compile(r"(?P<split>\w+)-(?P<index>\d+)-of-(?P<total>\d+)")  # train-00000-of-00002, as the hub names them
_VERSION = re.compile(r"(?P<split>\w+)-v\d[\d.]*")  # train-v1.1, as SQuAD names them

Columns = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows with named columns, read in batches.

    name: path or hub id. class_names: the names behind the codes of a column of class labels, or of lists of them.
    fingerprint: hex; another content has another one. n_skipped: malformed rows that were left out.
    read: (columns, most rows of a batch) -> batches; use `batches`.
    """

    name: str
    columns: tuple[str, ...]
    class_names: Mapping[str, tuple[str, ...]]
    fingerprint: str
    n_rows: int
    read: Callable[[Sequence[str], int], Iterator[Columns]]
    n_skipped: int = 0

    def __len__(self) -> int:
        return self.n_rows

    def batches(self, columns: Sequence[str], size: int = BATCH_ROWS) -> Iterator[Columns]:
        """The given columns of all rows in order, at most `size` rows at a time. Raises `DataError` naming the file."""
        with _reading(self.name):
            yield from self.read(columns, size)


# Where tables come from ----------------------------------------------------------------------------------------------


def find(path: Path, known: Collection[str]) -> dict[str, list[Path]]:
    """The files of each split below a folder, shards in order; one file alone is the training split.

    `known` are the names of splits. Shards as the hub names them (`train-00000-of-00002`) and versions as SQuAD names
    them (`train-v1.1`) belong to the split that they begin with. Raises `DataError` for anything unclear.
    """
    ending = f"one {', '.join(suffix[1:] for suffix in SUFFIXES)} file"
    if path.is_file():
        return {"train": [path]}
    if not path.is_dir():
        raise DataError(f"no data at {path}", f"--data takes a folder of splits or {ending}")
    with _reading(str(path)):
        found = [p for p in sorted(path.iterdir()) if p.suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(
            f"no data files in {path}", f"expected files such as train.parquet; known endings: {', '.join(SUFFIXES)}"
        )
    splits: dict[str, list[Path]] = {}
    for file in found:
        if (name := _split_of(file)) in known:
            splits.setdefault(name, []).append(file)
    if not splits:
        names = ", ".join(file.stem for file in found)
        raise DataError(f"no split in {path}: found {names}", "name the files train, validation and test")
    for name, members in splits.items():
        _check_members(name, members)
    return splits


def _split_of(file: Path) -> str:
    match = _SHARD.fullmatch(file.stem) or _VERSION.fullmatch(file.stem)
    return match["split"] if match else file.stem


def _check_members(split: str, members: Sequence[Path]) -> None:
    """Several files of one split must be all shards of one set."""
    shards = [_SHARD.fullmatch(file.stem) for file in members]
    totals = {(int(shard["total"]), file.suffix) for shard, file in zip(shards, members, strict=True) if shard}
    if not totals and len(members) == 1:
        return
    if not all(shards) or len(totals) != 1:
        names = ", ".join(file.name for file in members)
        raise DataError(f"several files for the {split} split: {names}", "keep one of them in the folder")
    (total, _), present = totals.pop(), {int(shard["index"]) for shard in shards if shard}
    if missing := sorted(set(range(total)) - present):
        raise DataError(
            f"{members[0].parent} has {len(members)} of {total} parts of {split}; part {missing[0]} is missing"
        )


def open_files(paths: Sequence[Path], header: Sequence[str] = (), *, lenient: bool = False) -> Table:
    """The rows of several files, one after the other; see `open_file`. Raises `DataError` when columns differ."""
    tables = [open_file(path, header, lenient=lenient) for path in paths]
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns) or table.class_names != first.class_names:
            raise DataError(f"{table.name} has other columns or class names than {first.name}")
    if len(tables) == 1:
        return first
    return replace(
        first,
        fingerprint=_digest("".join(table.fingerprint for table in tables)),
        n_rows=sum(map(len, tables)),
        n_skipped=sum(table.n_skipped for table in tables),
        read=lambda columns, size: chain.from_iterable(table.batches(columns, size) for table in tables),
    )


def open_file(path: Path, header: Sequence[str] = (), *, lenient: bool = False) -> Table:
    """The table in a parquet, csv, tsv, jsonl or json file, by its ending.

    header: column names of a tsv that has none (its first line holds none of these names). lenient: rows of a tsv with
    too many or too few fields are left out and counted, instead of being an error.

    Raises:
        DataError: naming the file, and the line where there are lines.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} is no {', '.join(SUFFIXES)} file", "convert the data to one of these")
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a file")
    if not path.is_file():
        raise DataError(f"{path} is a link to nothing" if path.is_symlink() else f"{path} is not a file")
    with _reading(str(path)):
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty")
        fingerprint = files.sha256(path)
        if suffix == ".parquet":
            table = _parquet(path)
        elif suffix == ".jsonl":
            table = _json_lines(path)
        elif suffix == ".json":
            table = _json(path)
        else:
            table = _separated(path, header, lenient=lenient and suffix == ".tsv")
    if len(table) == 0:
        raise DataError(f"{path} has no rows")
    return replace(table, fingerprint=fingerprint)


def in_memory(name: str, columns: Mapping[str, Sequence[Any]], fingerprint: str = "") -> Table:
    """A table of values that are in memory already, all columns equally long; the fingerprint is that of the values."""
    n_rows = len(next(iter(columns.values()), ()))
    assert all(len(values) == n_rows for values in columns.values())

    def read(chosen: Sequence[str], size: int) -> Iterator[Columns]:
        for begin in range(0, n_rows, size):
            yield {column: list(columns[column][begin : begin + size]) for column in chosen}

    if not fingerprint:
        fingerprint = _digest(json.dumps({column: list(values) for column, values in columns.items()}, default=str))
    return Table(name=name, columns=tuple(columns), class_names={}, fingerprint=fingerprint, n_rows=n_rows, read=read)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
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


# csv and tsv ---------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of a UTF-8 file; a byte order mark is dropped."""
    place = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"line {number}, byte {place + error.start} of the file"
                raise DataError(f"cannot read {path}: {where}, is not UTF-8", "save the file as UTF-8") from error
            place += len(line)
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _tsv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Quotes mean nothing, as in GLUE's own files."""
    for number, line in _lines(path):
        if text := line.rstrip("\r\n"):
            yield number, text.split("\t")


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(FIELD_LIMIT)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"cannot read {path}: line {reader.line_num}: {error}") from error


def _separated(path: Path, header: Sequence[str], *, lenient: bool) -> Table:
    parse = _tsv_rows if path.suffix.lower() == ".tsv" else _csv_rows
    first = next((row for _, row in parse(path)), [])
    headless = len(first) == len(header) and not set(first) & set(header)
    names = _unique(header if headless else first, path)

    def rows() -> Iterator[list[str]]:
        for number, row in islice(parse(path), 0 if headless else 1, None):
            if len(row) == len(names):
                yield row
            elif not lenient:
                raise DataError(f"cannot read {path}: line {number} has {len(row)} fields, the header has {len(names)}")

    def read(columns: Sequence[str], size: int) -> Iterator[Columns]:
        places, source = [names.index(column) for column in columns], rows()
        while batch := list(islice(source, size)):
            yield {column: [row[i] for row in batch] for column, i in zip(columns, places, strict=True)}

    n_rows = sum(1 for _ in rows())
    n_lines = sum(1 for _ in parse(path)) - (not headless) if lenient else n_rows
    return Table(
        name=str(path),
        columns=names,
        class_names={},
        fingerprint="",
        n_rows=n_rows,
        n_skipped=n_lines - n_rows,
        read=read,
    )


# json ----------------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise DataError(f"cannot read {path}: line {number}: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"cannot read {path}: line {number} is not a JSON object")
        yield row


def _json_lines(path: Path) -> Table:
    """A key that a row lacks is missing there (None)."""
    names: dict[str, None] = {}
    n_rows = 0
    for row in _json_rows(path):
        names.update(dict.fromkeys(row))
        n_rows += 1

    def read(columns: Sequence[str], size: int) -> Iterator[Columns]:
        source = _json_rows(path)
        while batch := list(islice(source, size)):
            yield {column: [row.get(column) for row in batch] for column in columns}

    return Table(name=str(path), columns=tuple(names), class_names={}, fingerprint="", n_rows=n_rows, read=read)


def _json(path: Path) -> Table:
    """SQuAD's own layout, flattened; or an array of rows, also under the key `data`; or JSON lines."""
    try:
        data = json.loads("".join(line for _, line in _lines(path)), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return _json_lines(path)
        raise DataError(f"cannot read {path}: {error}") from error
    rows = data.get("data") if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{path} is neither an array of rows nor in SQuAD's layout", "one row per line is a .jsonl file"
        )
    if rows and all("paragraphs" in row for row in rows):
        rows = list(_squad_rows(rows, path))
    names = dict.fromkeys(name for row in rows for name in row)
    return in_memory(str(path), {name: [row.get(name) for row in rows] for name in names}, fingerprint="of the file")


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
