"""Which examples belong together: the documents of a query.

Letters: N examples.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from capcli.data.splits import Split
from capcli.data.tables import Table
from capcli.errors import DataError


def read(table: Table, column: str, split: str) -> NDArray[np.int64]:
    """The group of each row [N], numbered as they come. Raises `DataError` for a column that is not there, and for a
    value that is missing or no name."""
    if column not in table.columns:
        raise DataError(
            f"the {split} split has no group column {column!r}; its columns: {', '.join(map(repr, table.columns))}",
            "name it with --group-column",
        )
    numbers: dict[tuple[type, object], int] = {}
    found: list[int] = []
    for batch in table.batches((column,)):
        for cell in batch[column]:
            if not isinstance(cell, str | int | float) or cell == "" or cell != cell:
                what = "is missing" if cell in (None, "") or cell != cell else f"is of type {type(cell).__name__}"
                raise DataError(f"row {len(found)} of column {column!r} of the {split} split {what}")
            found.append(numbers.setdefault((type(cell), cell), len(numbers)))
    return np.asarray(found, dtype=np.int64)


def remarks(splits: Mapping[str, Split], column: str) -> list[str]:
    """What there is to say of queries that tell nothing. Raises `DataError` for a split that has no others."""
    notes = []
    for name, split in splits.items():
        assert split.groups is not None, "they were read"
        _, places, sizes = np.unique(split.groups, return_inverse=True, return_counts=True)
        if sizes.max() == 1:
            raise DataError(
                f"each value of column {column!r} is in one row of the {name} split, so that nothing can be ranked",
                "name the column that is the same for all documents of a query with --group-column",
            )
        best = np.zeros(len(sizes))
        np.maximum.at(best, places, split.labels)
        total = f"of {len(sizes):,} queries"
        if single := int((sizes == 1).sum()):
            notes.append(f"{name}: {single:,} {total} have a single row, which any model ranks right")
        if empty := int((best == 0).sum()):
            notes.append(f"{name}: {empty:,} {total} have no relevant row, so that every model scores 0")
    return notes
