"""`cap doctor`, `cap tasks` and `cap config` on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from capcli.records.told import Diagnosis, Settings, TaskList
from capcli.reporting.text import plain

if TYPE_CHECKING:
    from rich.table import Table

COLOURS = {"ok": "green", "missing": "yellow", "problem": "bold red"}


def task_rows(found: TaskList) -> Table:
    """One row for each task, with the official names of its columns."""
    rows = [
        (
            task.name,
            task.kind,
            ", ".join(names[0] for names in task.text_columns),
            ", ".join(task.metrics),
            task.source,
        )
        for task in found.tasks
    ]
    return _table(("task", "kind", "text columns", "metrics", "data"), rows)


def settings_rows(found: Settings) -> Table:
    """One row for each option, those that differ from the default first."""
    ordered = sorted(found.settings, key=lambda one: one.source == "default")
    return _table(
        ("option", "value", "from", "default"),
        [
            (
                "--" + one.name.replace("_", "-"),
                plain(str(one.value)),
                plain(one.source),
                "" if one.value == one.default else plain(str(one.default)),
            )
            for one in ordered
        ],
    )


def diagnosis(found: Diagnosis) -> Table:
    """Checks with their state, then versions and names."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for check in found.checks:
        said = plain(check.found) + (f" ({check.hint})" if check.hint else "")
        grid.add_row(Text(check.state, style=COLOURS[check.state]), Text(check.name), Text(said))
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    for name, said in (
        ("versions", versions),
        ("methods", ", ".join(found.methods)),
        ("tasks", ", ".join(found.tasks)),
    ):
        grid.add_row("", Text(name), Text(said))
    return grid


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, name in enumerate(head):
        grid.add_column(name, no_wrap=i == 0, overflow="fold", header_style="dim")
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid
