"""`cap predict`: what a model answers to each text of a file or of a pipe, as JSON lines in the order of the texts.

Of the texts a chunk is in memory at a time. A file is read to its end before the model is asked anything, so that a row
without text is an error at the beginning and not after an hour.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from capcli import files
from capcli.config.names import GENERIC_TASKS, TEXT_FILES
from capcli.config.options import exists
from capcli.config.paths import portable
from capcli.config.predict import PredictConfig
from capcli.data import dataset, incoming
from capcli.data.incoming import Incoming, Row
from capcli.data.kinds import KINDS
from capcli.data.packed import PACKINGS
from capcli.data.tasks import LABEL_NAMES, TASKS
from capcli.errors import ConfigError, DataError, FileError, Stopped
from capcli.events import Event, StopFlag, told
from capcli.models import artifact, devices
from capcli.predicting import inputs, pipeline, replies
from capcli.predicting.inputs import Place
from capcli.predicting.pipeline import Answered, Pipeline
from capcli.records.predicted import Predictions
from capcli.reporting.text import counted

DIGITS = 6  # of a score in the output
STDIN = 0  # its file descriptor
OTHERS = (*(suffix for suffix in TEXT_FILES if suffix != ".jsonl"), *PACKINGS)  # endings that promise something else

Put = Callable[[str], None]


def predict(
    config: PredictConfig, *, flag: StopFlag | None = None, put: Put | None = None
) -> Generator[Event, None, Predictions]:
    """Answer the texts of `config.file`; yields events and returns a summary.

    The answers go to the file `config.out`, which appears when it is complete, or without one chunk by chunk to `put`.

    Raises:
        ConfigError, ModelError, DataError, FileError: what is wrong with options, model, texts, or the file to write.
        RunFailed: a logit that is not finite, or a full disk. Stopped: `flag` was set.
    """
    check = _stops(config, flag or StopFlag())
    _check_out(config, put)
    model = yield from _model(config)
    texts, columns = yield from _texts(config, model, check)
    began, done, n_cut = time.monotonic(), 0, 0
    with _written(config, put) as write:
        for chunk in texts.read(columns):
            items = [cells for _, cells in chunk]
            n_sound, wrong = inputs.sound(items, model.kind, model.paired, _place(texts, chunk))
            if chunk := chunk[:n_sound]:  # those before a wrong row of a pipe are answered
                answered = yield from _answered(config, model, texts, chunk, done, check)
                write("".join(map(_line, replies.lines(model.kind, answered.asked, answered.answers))))
                done, n_cut = done + len(chunk), n_cut + answered.asked.examples.n_cut
                yield _event(texts, done)
            if wrong is not None:
                raise wrong
    notes = [pipeline.truncated(n_cut, done, model)] * bool(n_cut)
    for note in notes:
        yield Event(phase="predict", overall=1.0, note=note)
    seconds = time.monotonic() - began
    return portable(_summary(config, model, done, seconds, [*texts.notes, *model.model.notes, *notes]), config)


def _stops(config: PredictConfig, flag: StopFlag) -> Callable[[], None]:
    """What raises `Stopped` once the flag is set."""

    def check() -> None:
        if why := flag.requested():
            kept = "nothing was written" if config.out else "the answers so far were written"
            raise Stopped(f"stopped by {why}; {kept}", "run the same command again")

    return check


def _model(config: PredictConfig) -> Generator[Event, None, Pipeline]:
    devices.compute(config.hardware)  # what is wrong with the device is said before anything is read
    yield Event(phase="load", note=f"loading {config.model}")
    model = pipeline.opened(
        config.model, config.runtime, config.hardware, max_length=config.max_length, stride=config.stride
    )
    model.check_top_k(config.top_k)
    if model.model.chosen:
        yield Event(phase="load", note=model.model.chosen)
    return model


# Texts ---------------------------------------------------------------------------------------------------------------


def _texts(
    config: PredictConfig, model: Pipeline, check: Callable[[], None]
) -> Generator[Event, None, tuple[Incoming, tuple[str, ...]]]:
    """The texts, and the columns that are read; those of a file have all been looked at."""
    if config.file == incoming.PIPE:
        if os.isatty(STDIN):
            yield Event(phase="load", note="reading texts from the terminal; Ctrl-D ends them")
        texts = incoming.from_pipe(STDIN, check)
        return texts, _columns(config, model, texts)
    texts = incoming.from_file(Path(config.file))
    columns = _columns(config, model, texts)
    for note in texts.notes:
        yield Event(phase="load", note=note)
    for chunk in texts.read(columns):
        check()
        inputs.check([cells for _, cells in chunk], model.kind, model.paired, _place(texts, chunk))
    return texts, columns


def _place(texts: Incoming, chunk: Sequence[Row]) -> Place:
    return lambda index: texts.place(chunk[index][0])


def _columns(config: PredictConfig, model: Pipeline, texts: Incoming) -> tuple[str, ...]:
    """The columns of a text, or of two: those that are named, those of the model's run, or by the usual names."""
    n_texts = inputs.n_texts(model.kind, model.paired) or 1 + bool(config.pair_column)
    if config.pair_column and n_texts == 1:
        raise ConfigError(f"{config.model} reads a single text", "leave out --pair-column")
    if not texts.columns:
        if config.text_column or config.pair_column:
            raise ConfigError(f"{texts.name} has lines of text, without columns", "leave out --text-column")
        return ("text", "pair")[:n_texts]
    if len(texts.columns) == n_texts == 1 and not config.text_column:
        return texts.columns
    stored = artifact.stored_source(config.model)
    tasks = [TASKS[name] for name in (stored.get("task"), *GENERIC_TASKS) if name in TASKS]
    tasks = [task for task in tasks if KINDS[task.kind].windows == KINDS[model.kind].windows]
    first = [name for name in (stored.get("text_column"),) if name] + [n for task in tasks for n in task.text]
    second = [name for name in (stored.get("pair_column"),) if name] + [n for task in tasks for n in task.pair]
    others = {*LABEL_NAMES, stored.get("label_column", "")}
    found = [dataset.column(texts, first, config.text_column, "text", texts.name, others)]
    if n_texts == 2:
        rest = [name for name in second if name not in found]
        found.append(dataset.column(texts, rest, config.pair_column, "pair", texts.name, {*others, *found}))
    if len({*found}) < n_texts:
        raise DataError(f"column {found[0]!r} of {texts.name} is named for two purposes", "name another column")
    return tuple(found)


# Answers -------------------------------------------------------------------------------------------------------------


def _answered(
    config: PredictConfig,
    model: Pipeline,
    texts: Incoming,
    chunk: Sequence[Row],
    before: int,
    check: Callable[[], None],
) -> Generator[Event, None, Answered]:
    """The answers to a chunk of rows, with `before` others before them."""
    items = [cells for _, cells in chunk]

    def event(done: float, total: float) -> Event:
        check()
        return _event(texts, before + int(len(chunk) * done / total))

    return (yield from told(model.answers(items, _place(texts, chunk), config.top_k, config.batch_size), event))


def _event(texts: Incoming, done: int) -> Event:
    share = done / texts.n_rows if texts.n_rows else 0.0
    status = f"{done:,} of {counted(texts.n_rows, 'text')}" if texts.n_rows else counted(done, "text")
    return Event(phase="predict", done=done, total=texts.n_rows, overall=share, status=status)


def _line(row: Mapping[str, Any]) -> str:
    """A row of the output: JSON in ASCII, in which nothing acts on a terminal."""
    return json.dumps(_rounded(row), ensure_ascii=True, allow_nan=False) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _summary(config: PredictConfig, model: Pipeline, n_texts: int, seconds: float, notes: Sequence[str]) -> Predictions:
    return Predictions(
        model=config.model,
        kind=model.kind,
        labels=model.model.labels,
        file=config.file,
        out=config.out,
        n_texts=n_texts,
        seconds=seconds,
        texts_per_second=n_texts / seconds,
        max_length=model.length,
        runtime=model.model.row,
        notes=tuple(notes),
    )


# Where they go -------------------------------------------------------------------------------------------------------


def _check_out(config: PredictConfig, put: Put | None) -> None:
    """Raise `CapError` for a file that cannot be written, or is that of the texts, before anything is computed."""
    path = Path(config.out)
    if not config.out:
        if put is None:
            raise ConfigError("no file to write the answers to", "name one with -o")
        return
    if path.suffix.lower() in OTHERS:
        raise ConfigError(f"-o {path}: JSON lines are written, not {path.suffix}", f"name it {path.stem}.jsonl")
    if path.is_symlink():
        raise FileError(f"-o {path} is a link, and nothing is written through one", "name the file that it points to")
    if path.exists() and not path.is_file():
        raise FileError(f"-o {path} is not a file", "choose another file")
    if path.exists() and exists(config.file) and path.samefile(config.file):
        raise FileError(f"-o {path} is the file that is read", "choose another file")
    files.check_writable(path.parent)


@contextlib.contextmanager
def _written(config: PredictConfig, put: Put | None) -> Iterator[Put]:
    """What takes lines of the output."""
    if not config.out:
        assert put is not None, "_check_out lets nothing through without a place"
        yield put
        return
    with files.streamed(Path(config.out)) as write:
        yield lambda text: write(text.encode("ascii"))
