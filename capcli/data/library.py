"""Tables that the library `datasets` reads: the sets of the hub that are not parquet files.

The library keeps an Arrow copy in its own cache (`HF_HOME`) and maps it: only one batch of rows is in memory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import zipfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from capcli import files
from capcli.data import rows, tables
from capcli.data.tables import Columns, Table
from capcli.errors import DataError, RunFailed, first_line
from capcli.sources.hub_data import HubData, reader_of


def open_split(found: HubData, split: str) -> Table:
    """The rows of one split of a set of the hub. Raises `DataError` naming its files."""
    paths = found.files[split]
    if found.reader == "parquet":  # without a copy, and without loading the library for it
        return tables.open_files(paths)
    with tables.reading(str(paths[0])):
        reader = _in_archives(paths) if found.reader == "zip" else found.reader
    whole = _prepared(found, reader, split)
    if not len(whole):
        raise DataError(f"the {split} split of {found.name} has no rows")
    told = json.dumps([reader, found.options, str(found.features)], default=str)
    return Table(
        name=str(paths[0]),
        columns=tuple(whole.column_names),
        class_names={column: names for column, feature in whole.features.items() if (names := class_names(feature))},
        fingerprint=tables.digest(told + "".join(map(files.sha256, paths))),
        n_rows=len(whole),
        read=lambda columns, size: _batches(whole, columns, size),
        notes=(f"{split}: read by the library datasets from {', '.join(path.name for path in paths[:3])}",)
        if len(paths) < 4
        else (f"{split}: read by the library datasets from {len(paths):,} files",),
    )


def _prepared(found: HubData, reader: str, split: str) -> Any:
    """The Arrow copy of a split, made if it is not there. Raises `DataError`."""
    options = dict(found.options)
    if reader == "csv":
        options.setdefault("keep_default_na", False)  # else the texts NA, None and null are none
        if found.files[split][0].name.lower().partition(".")[2].startswith("tsv"):
            options.setdefault("sep", "\t")
    with _library() as datasets:
        try:
            return datasets.load_dataset(
                reader,
                data_files={split: [str(path) for path in found.files[split]]},
                split=split,
                features=found.features,
                **options,
            )
        except Exception as error:
            cause = _cause(error)
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES):
                raise RunFailed(
                    f"cannot write the copy of {found.name} into the cache of datasets: {cause.strerror}",
                    "HF_HOME names the folder of the cache",
                ) from error
            raise DataError(
                f"cannot read {found.files[split][0]}: {first_line(cause)}",
                "download the set and give its files with --data: then the message names the line",
            ) from error


@contextlib.contextmanager
def _library() -> Iterator[Any]:
    """The library, silent, and asking nobody: what it reads is here."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    counts, level = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, datasets.logging.get_verbosity()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield datasets
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _cause(error: BaseException) -> BaseException:
    """What an error of the library hides."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _in_archives(paths: Sequence[Path]) -> str:
    """The reader for what is in zip files: of one format. Raises `DataError`, also for what unpacks to very much."""
    readers: set[str] = set()
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            members = [one for one in archive.infolist() if not one.is_dir()]
        size = sum(one.file_size for one in members)
        if size > max(rows.FREE_BYTES, rows.MOST_RATIO * path.stat().st_size):
            raise DataError(f"{path} unpacks to more than {rows.MOST_RATIO} times its size")
        readers |= {reader_of(one.filename) for one in members if not one.filename.startswith(("__MACOSX/", "."))}
    if len(readers) != 1 or not readers.isdisjoint({"", "zip"}):
        raise DataError(f"{paths[0]} does not hold files of one format that is read", "unpack it, and give the folder")
    return readers.pop()


def _batches(whole: Any, columns: Sequence[str], size: int) -> Iterator[Columns]:
    chosen = whole.select_columns(list(columns))
    for begin in range(0, len(whole), size):
        yield dict(chosen[begin : begin + size])


def class_names(feature: Any) -> tuple[str, ...]:
    """Names of a ClassLabel, or of a list of them; of other columns none."""
    inner: Collection[str] = getattr(feature, "names", ()) or ()
    return tuple(inner) if inner else class_names(feature.feature) if hasattr(feature, "feature") else ()
