"""`cap tasks`: what there is to choose from."""

from __future__ import annotations

from capcli.config.names import BUILTIN_TASKS, TASK_NAMES
from capcli.data.tasks import TASKS
from capcli.records.told import TaskList, TaskRow


def task_list() -> TaskList:
    """Every task, in the order of the docs."""
    return TaskList(tasks=tuple(_row(name) for name in TASK_NAMES))


def _row(name: str) -> TaskRow:
    task = TASKS[name]
    source = "built in" if name in BUILTIN_TASKS else "/".join(task.hub) if task.hub else "--data"
    return TaskRow(
        name=name,
        kind=task.kind,
        text_columns=tuple(columns for columns in (task.text, task.pair) if columns),
        label_columns=task.label,
        labels=task.labels,
        metrics=task.measured,
        source=source,
    )
