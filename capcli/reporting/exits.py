"""Exits: what each threshold gives, and how far the texts of an evaluation went."""

from __future__ import annotations

from capcli.records.exported import ExitTable
from capcli.records.parts import ExitUse
from capcli.reporting.text import count, named, number, percent


def columns(table: ExitTable) -> tuple[str, ...]:
    """The columns of the table, see `rows`."""
    return ("threshold", named(table.metric, 40), "layers per text", "of their multiplications", "held out")


def rows(table: ExitTable) -> list[tuple[str, ...]]:
    """One row for each threshold: metric and layers on the evaluation split, accuracy on the held-out part."""
    return [
        (
            number(row.threshold, 2) + (" chosen" if row.threshold == table.threshold else ""),
            number(row.value),
            number(row.layers, 2),
            percent(row.macs),
            number(row.held_out),
        )
        for row in table.rows
    ]


def about(table: ExitTable) -> str:
    """What the columns are measured on, and how the threshold was chosen."""
    seen = " (which the model itself may have been trained on)" if table.seen else ""
    return (
        f"{named(table.metric, 40)} and layers, of {count(table.layers)}, on {named(table.split, 40)}; trained on "
        f"{count(table.train)} examples; chosen as the highest threshold up to which accuracy on "
        f"{count(table.held_out)} held-out ones{seen} stays within {number(table.drop, 2)} of that of all layers"
    )


def early(use: ExitUse) -> str:
    """The sentence on how far texts went."""
    return (
        f"exits below {number(use.threshold, 2)}: texts took {number(use.layers, 2)} of {count(use.of)} layers on "
        f"average, {percent(use.macs)} of their multiplications; inputs of fixed length were timed through all layers"
    )
