"""Text files as rows: lines, csv, tsv and JSON lines, plain or compressed.

All is read a piece at a time, and every piece is bounded, so that no file, however it is packed, fills the memory.
Lines count from 1.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NoReturn

from capcli.data.packed import DAMAGED, open_bytes, packing
from capcli.errors import DataError
from capcli.reporting.text import counted

ROW_BYTES = 1 << 25  # of one line, and of one row of a csv
JSON_BYTES = 1 << 30  # of a file that is read whole
PACKED_JSON_BYTES = 1 << 27
FREE_BYTES = 1 << 28  # what a compressed file may hold whatever its own size
MOST_RATIO = 100  # beyond that: text is rarely packed better than 20 to 1
COMMAS = "a cell that holds commas must be in quotes"
LINE_ENDS = "save the file with LF or CRLF line endings"
NAME_ALL = "the first line must name each column that is not empty"
NO_QUOTES = "quotes have no meaning in a tsv; save it as csv, with commas between the cells"
DOUBLED = 'a quote inside a quoted cell is written twice: "" (a backslash does not escape it)'
_GZIP = b"\x1f\x8b"
ONE_OBJECT = "each line must be one JSON object and nothing else; an array of rows is a .json file"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")

Row = tuple[int, list[str]]


def lines(path: Path, longest: int = 0) -> Iterator[tuple[int, str]]:
    """(number, line with its end) of a UTF-8 file; a byte order mark is dropped. longest: most bytes of a line.

    Raises `DataError` with the place for what is not text, and for a line or a whole that is too long.
    """
    longest = longest or ROW_BYTES
    with open_bytes(path) as file:
        raw = iter(lambda: _line(file, path, longest + 1), b"")
        yield from decoded(_unpacked(raw, path) if packing(path) else raw, path, longest)


def decoded(raw: Iterable[bytes], name: Path | str, longest: int = ROW_BYTES) -> Iterator[tuple[int, str]]:
    """The same of lines of bytes, which `name` is the place of."""
    place = 0
    for number, line in enumerate(raw, 1):
        if len(line) > longest:
            raise DataError(
                f"cannot read {name}: line {number} is longer than {longest >> 20} MiB", "write one row per line"
            )
        yield number, _text(name, line, number, place)
        place += len(line)


def _unpacked(raw: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a compressed file, as long as they are no bomb. Raises `DataError`."""
    size, most = 0, max(FREE_BYTES, MOST_RATIO * path.stat().st_size)
    for line in raw:
        yield line
        size += len(line)
        if size > most:
            raise DataError(f"{path} unpacks to more than {MOST_RATIO} times its size", "unpack it first")


def _line(file: IO[bytes], path: Path, most: int) -> bytes:
    """The next line, at most this many bytes of it. Raises `DataError` where a compressed file is damaged."""
    try:
        return file.readline(most)
    except (OSError, *DAMAGED) as error:
        if packing(path) is None:
            raise
        raise DataError(f"{path} is cut off or damaged: {error}", "copy or download it again") from error


def _text(path: Path | str, line: bytes, number: int, place: int) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"line {number}, byte {place + error.start} of the file"
        what = "it is UTF-16: " if number == 1 and line.startswith(_UTF_16) else ""
        twice = number == 1 and line.startswith(_GZIP)
        hint = "it is compressed twice: unpack it once with gunzip" if twice else f"{what}save the file as UTF-8"
        raise DataError(f"cannot read {path}: {where}, is not UTF-8", hint) from error
    if "\0" in text:
        where = f"line {number}, byte {place + line.index(0)} of the file"
        raise DataError(f"cannot read {path}: {where}, is a NUL, which is not text", "save the file as UTF-8")
    return text.removeprefix("\ufeff") if number == 1 else text


# csv and tsv ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A csv or tsv file whose first line is understood.

    Columns without a name are not read; those after the last name must be empty, as a spreadsheet leaves them.
    parse: the rows with their lines. places: of each name in a row. width: cells of a row. headless: whether the first
    row is one of data. lenient: whether rows of another width are left out. literal: whether quotes mean nothing.
    """

    path: Path
    parse: Callable[[], Iterator[Row]]
    names: tuple[str, ...]
    places: dict[str, int]
    width: int
    headless: bool
    lenient: bool
    literal: bool
    notes: tuple[str, ...]

    def rows(self, left: Counter[str]) -> Iterator[list[str]]:
        """The rows of data; what is to be said of some of them is counted. Raises `DataError` naming the line."""
        end = max(self.places.values(), default=-1) + 1
        for number, row in islice(self.parse(), 0 if self.headless else 1, None):
            if len(row) > 1 and not any(map(str.strip, row)):
                left["empty rows, skipped"] += 1
            elif len(row) == self.width:
                if end < self.width and (value := "".join(row[end:]).strip()):
                    raise self._refused(number, f"has {value[:40]!r} in a column without a name", NAME_ALL)
                if self.literal and (any(map(_quoted, row)) or all(map(_in_quotes, row))):
                    left[f"rows with cells in quotes, which are kept ({NO_QUOTES})"] += 1
                yield row
            elif self.lenient:
                left["rows with too many or too few fields, skipped"] += 1
            else:
                hint = (NO_QUOTES if self.literal else COMMAS) if '"' in "".join(row) or len(row) > self.width else ""
                raise self._refused(number, f"has {counted(len(row), 'field')}, the header has {self.width}", hint)

    def _refused(self, number: int, what: str, hint: str) -> DataError:
        return DataError(f"cannot read {self.path}: line {number} {what}", hint)


def sheet(path: Path, header: Sequence[str], *, tab: bool, lenient: bool) -> Sheet:
    """A csv, or with `tab` a tsv; `header` names the columns of one without names. Raises `DataError`."""
    literal = tab and not _has_quoted_header(path)
    parse = partial(tsv_rows, path) if literal else partial(quoted_rows, path, "\t" if tab else ",")
    first = next((row for _, row in parse()), [])
    others = ",;|" if tab else "\t;|"
    if len(first) == 1 and any(mark in first[0] for mark in others):
        raise DataError(
            f"cells of {path} are not separated by {'tabs' if tab else 'commas'}: the first line is {first[0][:60]!r}",
            "save the file as csv with commas, or as tsv with tabs",
        )
    if first and not any(map(str.strip, first)):
        raise DataError(f"the first line of {path} names no columns", "the first line must name the columns")
    if "\r" in "".join(first):
        raise DataError(f"cannot read {path}: line 1 holds a CR alone", LINE_ENDS)
    headless = len(first) == len(header) and not set(first) & set(header)
    named = [(name, place) for place, name in enumerate(header if headless else first) if name.strip()]
    return Sheet(
        path=path,
        parse=parse,
        names=tuple(name for name, _ in named),
        places=dict(named),
        width=len(first),
        headless=headless,
        lenient=lenient,
        literal=literal,
        notes=("the quotes around cells were removed, since the header has them too",) if tab and not literal else (),
    )


def _has_quoted_header(path: Path) -> bool:
    """Whether every cell of the first line of a tsv is in quotes, as no file of GLUE has it."""
    return all(len(cell) > 2 and cell[0] == cell[-1] == '"' for cell in next((row for _, row in tsv_rows(path)), [""]))


def _quoted(cell: str) -> bool:
    """Whether a cell is in quotes beyond doubt: with doubled ones inside."""
    return _in_quotes(cell) and '""' in cell[1:-1]


def _in_quotes(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == '"' == cell[-1]


def tsv_rows(path: Path) -> Iterator[Row]:
    """(number of its line, cells) of the rows. Quotes mean nothing, as in GLUE's own files."""
    for number, line in lines(path):
        if text := line.rstrip("\r\n"):
            yield number, text.split("\t")


def quoted_rows(path: Path, separator: str) -> Iterator[Row]:
    """(number of its first line, cells) of the rows of a csv. Raises `DataError` where a quote begins that is wrong."""
    csv.field_size_limit(ROW_BYTES)  # Python's own limit of 131,072 characters is shorter than many documents
    held: list[str] = []

    def source() -> Iterator[str]:
        size = 0
        for _, line in lines(path):
            size = len(line) if not held else size + len(line)
            held.append(line)
            if size > ROW_BYTES:
                raise csv.Error("the row is too long")
            yield line

    reader, begin = csv.reader(source(), delimiter=separator, strict=True), 1
    try:
        for row in reader:
            if row:
                yield begin, row
            begin = reader.line_num + 1
            held.clear()
    except csv.Error as error:
        _refuse_row(path, separator, begin, "".join(held), error)


def _refuse_row(path: Path, separator: str, begin: int, text: str, error: csv.Error) -> NoReturn:
    """The error for a row that begins in line `begin`; most often a quote is wrong, and it says where that begins."""
    ends = ("", separator, "\r", "\n")
    cells = re.finditer(rf'(?<![^{separator}\r\n])"[^"]*(?:""[^"]*)*(?P<end>"|\Z)', text)
    wrong = next((cell for cell in cells if not cell["end"] or text[cell.end() : cell.end() + 1] not in ends), None)
    if wrong is not None:
        first, last = (begin + text.count("\n", 0, place) for place in wrong.span())
        what = "is not closed"
        if wrong["end"]:
            after = text[wrong.end() : wrong.end() + 20].splitlines()[0]
            what = f"ends{f' in line {last}' if last > first else ''} before {after!r}, in the middle of a cell"
        raise DataError(f"cannot read {path}: line {first}: the quote that begins there {what}", DOUBLED)
    if "new-line" in str(error):
        raise DataError(f"cannot read {path}: line {begin} holds a CR alone", LINE_ENDS)
    raise DataError(f"cannot read {path}: line {begin}: {error}")


# JSON ----------------------------------------------------------------------------------------------------------------


def parsed(text: str) -> Any:
    """A JSON value. Raises `ValueError` or `RecursionError`, also for a key that occurs twice in an object."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found


def whole(path: Path) -> str:
    """The text of a file that cannot be read a piece at a time, which is bounded. Raises `DataError`."""
    most = PACKED_JSON_BYTES if packing(path) else JSON_BYTES
    held, size = [], 0
    for _, line in lines(path, most):
        held.append(line)
        size += len(line)
        if size > most:
            raise DataError(f"{path} is larger than {most >> 20} MiB", "one row per line is a .jsonl file, of any size")
    return "".join(held)


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that has one in each line. Raises `DataError` naming the line."""
    return (row for _, row in objects(lines(path), path))


def objects(numbered: Iterable[tuple[int, str]], name: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of its line, object) of lines that hold one each, or nothing. Raises `DataError` naming the line."""
    for number, line in numbered:
        if not line.strip():
            continue
        try:
            row = parsed(line)
        except json.JSONDecodeError as error:
            where = f"line {number}, character {error.pos + 1}"
            raise DataError(f"cannot read {name}: {where}: {error.msg}", ONE_OBJECT) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"cannot read {name}: line {number}: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"cannot read {name}: line {number} is not a JSON object", ONE_OBJECT)
        yield number, row
