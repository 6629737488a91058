"""Texts without labels, as they come: rows of a file of any kind that cap reads, lines of text, a pipe.

A chunk at a time is in memory. On a pipe a chunk is what has arrived, so that an answer never waits for later lines.
"""

from __future__ import annotations

import os
import re
import select
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from capcli.config.names import TEXT_FILES
from capcli.data import rows, tables
from capcli.data.packed import PACKINGS
from capcli.errors import DataError

PIPE = "-"
LINES = (".txt", *(f".txt{end}" for end in PACKINGS))
OBJECT = re.compile(r'\s*\{\s*["}]')  # how a JSON object begins, and hardly ever a text
PATIENCE = 0.2  # seconds until the next look at whether to stop, while nothing arrives
READ_BYTES = 1 << 20
CHUNK = 1000  # rows: they share batches of like lengths, and their answers come together

Row = tuple[int, tuple[Any, ...]]
"""Its number, and the cells of the columns that are read."""


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """Rows of texts. columns: their names; none of lines of plain text, where a tab is between two texts.

    unit: what the numbers of the rows count, lines or rows. n_rows: 0 where it is not known before the end. notes: what
    a user should know of how it was read. read: (columns, or how many texts a line holds) -> chunks of rows, from the
    start each time, but of a pipe once.
    """

    name: str
    columns: tuple[str, ...]
    unit: str
    n_rows: int
    read: Callable[[Sequence[str]], Iterator[list[Row]]]
    notes: tuple[str, ...] = ()

    def place(self, number: int) -> str:
        """How messages call a row."""
        return f"{self.unit} {number} of {self.name}"


def from_file(path: Path) -> Incoming:
    """The rows of a file, by its ending. Raises `DataError`, for one without any too."""
    if path.name.lower().endswith(LINES):
        return _of_lines(path)
    if not tables.ending(path) and path.is_file():
        raise DataError(
            f"{path} is not a {', '.join(TEXT_FILES)} file", tables.way_out(path) or "name it by what is in it"
        )
    table = tables.open_file(path)

    def read(columns: Sequence[str]) -> Iterator[list[Row]]:
        begin = 0
        for batch in table.batches(columns, CHUNK):
            cells = list(zip(*(batch[column] for column in columns), strict=True))
            yield list(enumerate(cells, begin))
            begin += len(cells)

    return Incoming(name=str(path), columns=table.columns, unit="row", n_rows=len(table), read=read, notes=table.notes)


def _of_lines(path: Path) -> Incoming:
    if not path.is_file():
        raise tables.refusal(path)

    def read(columns: Sequence[str]) -> Iterator[list[Row]]:
        with tables.reading(str(path)):
            source = _cells(rows.lines(path), len(columns), str(path))
            while chunk := list(islice(source, CHUNK)):
                yield chunk

    with tables.reading(str(path)):
        n_rows = sum(1 for _ in rows.lines(path))
    if not n_rows:
        raise DataError(f"{path} is empty", "write or copy it again, or remove it")
    return Incoming(name=str(path), columns=(), unit="line", n_rows=n_rows, read=read)


def _cells(numbered: Iterable[tuple[int, str]], n_texts: int, name: str) -> Iterator[Row]:
    """The texts of each line. Raises `DataError` naming a line with another number of them."""
    for number, line in numbered:
        text = line.rstrip("\r\n")
        cells = tuple(text.split("\t")) if n_texts > 1 else (text,)
        if len(cells) != n_texts:
            raise DataError(
                f"line {number} of {name} has {len(cells) - 1} tabs, where {n_texts} texts need one between them",
                "replace other tabs by spaces, or write JSON lines",
            )
        yield number, cells


# A pipe --------------------------------------------------------------------------------------------------------------


class _Arriving:
    """Lines of bytes from a file descriptor, with their ends; `waiting` of them have been read and not been taken."""

    def __init__(self, descriptor: int, check: Callable[[], None]) -> None:
        self.descriptor, self.check = descriptor, check
        self.held: deque[bytes] = deque()

    @property
    def waiting(self) -> bool:
        return bool(self.held)

    def __iter__(self) -> Iterator[bytes]:
        rest = bytearray()  # of a line whose end has not arrived
        while data := self._next():
            rest += data
            if b"\n" in data:
                *whole, rest = rest.split(b"\n")
                self.held.extend(bytes(line) + b"\n" for line in whole)
            if len(rest) > rows.ROW_BYTES:  # to be refused now, not when it has filled the memory
                self.held.append(bytes(rest))
                rest.clear()
            while self.held:
                yield self.held.popleft()
        if rest:
            yield bytes(rest)

    def _next(self) -> bytes:
        """What has arrived; nothing at the end. `check` is asked while nothing comes; what it raises ends the wait."""
        self.check()
        while not select.select([self.descriptor], [], [], PATIENCE)[0]:
            self.check()
        return os.read(self.descriptor, READ_BYTES)


def from_pipe(descriptor: int, check: Callable[[], None], name: str = "stdin") -> Incoming:
    """The rows that arrive: JSON objects if the first line is one, else lines of text. Raises `DataError` for none.

    check: asked again and again while nothing arrives; what it raises ends the wait.
    """
    arriving = _Arriving(descriptor, check)
    numbered = rows.decoded(arriving, name)
    first = next(numbered, None)
    if first is None:
        raise DataError(f"{name} is empty", "give texts, one per line, or JSON lines")
    source = chain([first], numbered)
    if not OBJECT.match(first[1]):
        return Incoming(
            name=name,
            columns=(),
            unit="line",
            n_rows=0,
            read=lambda columns: _chunks(_cells(source, len(columns), name), arriving),
        )
    found = rows.objects(source, name)
    number, row = next(found)

    def read(columns: Sequence[str]) -> Iterator[list[Row]]:
        cells = ((n, tuple(one.get(column) for column in columns)) for n, one in chain([(number, row)], found))
        return _chunks(cells, arriving)

    return Incoming(name=name, columns=tuple(row), unit="line", n_rows=0, read=read)


def _chunks(source: Iterator[Row], arriving: _Arriving) -> Iterator[list[Row]]:
    """Rows together as long as more of them have arrived."""
    chunk: list[Row] = []
    for row in source:
        chunk.append(row)
        if len(chunk) == CHUNK or not arriving.waiting:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
