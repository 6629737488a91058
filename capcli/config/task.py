"""Which examples a command reads, and how: options that all commands with a task share."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from capcli.config.names import GENERIC_TASKS, HUB_PREFIX, QUESTION_TASKS, TASK_NAMES
from capcli.config.options import at_least, check_name, option, parse_label_map
from capcli.errors import ConfigError

LENGTH, WINDOW = 128, 384  # tokens of the longest input; of a window of a question's context
LABEL_MAP = "rename labels of the data or of a model: LABEL_0=negative,2=neutral"


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Which examples, and how they are read."""

    task: str = option("", "task name; cap tasks lists them", panel="Task", metavar="TASK")
    data: str = option(
        "",
        "folder of splits, one file (parquet, arrow, csv, tsv, jsonl, json; text also compressed), or hub:OWNER/NAME",
        panel="Task",
        metavar="PATH",
    )
    text_column: str = option(
        "", "column of the (first) text, of the words, or of the question", panel="Task", metavar="NAME"
    )
    pair_column: str = option(
        "", "column of the second text, or of the context", panel="Task", expert=True, metavar="NAME"
    )
    label_column: str = option(
        "", "column of the label; a,b,c for several columns of 0 and 1, one per label", panel="Task", metavar="NAME"
    )
    group_column: str = option(
        "",
        "column of what rows have in common, such as the query of documents: their order is measured, by nDCG@10 and "
        "MRR@10 (regression)",
        panel="Task",
        expert=True,
        metavar="NAME",
    )
    label_map: str = option("", LABEL_MAP, panel="Task", expert=True, metavar="OLD=NEW,…")
    text: str = option(
        "",
        "texts without labels: a .txt with one per line, or a table with a text column (pairs: two, or a tab). "
        "cap prune learns what MODEL or --teacher answers; without --data, agreement with that, or with "
        "--baseline, is measured",
        flag="--unlabelled",
        panel="Task",
        metavar="FILE",
    )
    max_length: int = option(
        0,
        f"longest input in tokens, longer texts are truncated; 0 for {LENGTH}, or {WINDOW} in question answering",
        panel="Task",
    )
    stride: int = option(
        0,
        "tokens that two windows of a long context share; 0 for 128, or less in short windows",
        panel="Task",
        expert=True,
    )
    max_eval_samples: int = option(0, "evaluate on at most this many examples, 0 for all", panel="Task", expert=True)

    def __post_init__(self) -> None:
        check_name("task", self.task, TASK_NAMES)
        parse_label_map(self.label_map)
        at_least(8, max_length=self.longest)
        at_least(0, max_eval_samples=self.max_eval_samples, stride=self.stride)
        if self.task in GENERIC_TASKS and not (self.data or self.text):
            raise ConfigError(
                f"task {self.task} needs your own data",
                "name a file or folder with --data, or texts without labels with --unlabelled",
            )

        if self.unlabelled and self.group_column:
            raise ConfigError("--group-column ranks by labels, and there are none", "leave it out, or name --data")

    @property
    def unlabelled(self) -> bool:
        """Whether there are texts, and no labelled examples to evaluate on."""
        return bool(self.text) and not self.data and self.task in GENERIC_TASKS

    @property
    def label_names(self) -> dict[str, str]:
        """The label map: a name of the model or of the data -> the name to use."""
        return parse_label_map(self.label_map)

    @property
    def longest(self) -> int:
        """The longest input in tokens, chosen or by the kind of task."""
        return self.max_length or (WINDOW if self.task in QUESTION_TASKS else LENGTH)

    @property
    def name(self) -> str:
        """The task, and of own data the name too with some digits of its path: another folder has another name."""
        if not (self.data or self.unlabelled):
            return self.task
        path = os.path.normpath(self.data or self.text)
        stem = re.sub("[:@]", "-", Path(path).stem) if path.startswith(HUB_PREFIX) else Path(path).stem
        name, digits = (
            stem[:40] or "data",
            hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:6],
        )
        return f"{self.task}-{name}-{digits}"
