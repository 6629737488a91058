"""How a model is used, for its card: inputs to try it on, and the class of transformers that reads it."""

from __future__ import annotations

from capcli.config.names import HUB_PREFIX
from capcli.config.task import TaskConfig
from capcli.data.kinds import KINDS, Kind
from capcli.data.tasks import TASKS
from capcli.reporting.card import Usage
from capcli.sources.hub_data import named

SHORT, LONG = "a short text", "a longer text, which shares a batch with the short one"
QUESTIONS = ("What is short?", "Which text shares a batch with the short one?")


def usage(kind: str, source: TaskConfig | None) -> Usage:
    """The snippets for a model of this kind; `source`: the task that it is for, where it is known."""
    row = KINDS[kind]
    paired = source is not None and bool(TASKS[source.task].pair or source.pair_column) and not row.vectors
    return Usage(
        tag=row.tag,
        head=row.head,
        piped=not (row.windows or row.vectors),  # transformers has no pipeline for questions any more
        vectors=row.vectors,
        options=_options(row),
        **_inputs(row, paired),
    )


def datasets(source: TaskConfig) -> tuple[str, ...]:
    """The sets of the hub that a task was read from, for a card; none for local and built-in data."""
    if source.data:
        return (named(source.data)[0],) if source.data.startswith(HUB_PREFIX) else ()
    hub = TASKS[source.task].hub
    return (hub[0],) if hub else ()


def _inputs(row: Kind, paired: bool) -> dict[str, str]:
    """What the snippets give a pipeline, and a tokenizer, as Python source: two inputs of different lengths."""
    first = list(QUESTIONS) if row.windows else [SHORT, LONG]
    second = [SHORT, LONG] if row.windows else [LONG, SHORT]
    if not (row.windows or paired):
        return {"inputs": _source(first), "texts": _source(first)}
    names = ("question", "context") if row.windows else ("text", "text_pair")
    pairs = [dict(zip(names, pair, strict=True)) for pair in zip(first, second, strict=True)]
    return {"inputs": _source(pairs), "texts": f"{_source(first)}, {_source(second)}"}


def _options(row: Kind) -> str:
    """What a pipeline of transformers must be told, as Python source, so that it answers as the model was trained."""
    if row.words:
        return ', aggregation_strategy="first"'
    return ', function_to_apply="none"' if row.numbers else ""


def _source(value: object) -> str:
    """A value as Python source, in double quotes."""
    return repr(value).replace("'", '"')
