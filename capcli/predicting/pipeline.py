"""A model as something to ask: texts go in, answers come out, whatever computes them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capcli.config.hardware import Hardware
from capcli.config.options import at_least
from capcli.config.task import LENGTH, WINDOW
from capcli.data import tokens
from capcli.data.batches import evaluation_batches
from capcli.data.incoming import CHUNK
from capcli.data.kinds import KINDS
from capcli.data.tasks import TASKS
from capcli.errors import ConfigError, ModelError
from capcli.events import finished
from capcli.models import artifact, loading, predict
from capcli.models.hf import read_config
from capcli.models.predict import Progress
from capcli.models.predictor import Predictor
from capcli.predicting import inputs, replies
from capcli.predicting.inputs import Asked, Item, Place
from capcli.predicting.replies import REPLIES, Answer, Question
from capcli.runtime import choice
from capcli.sources import hub


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A model that is asked texts and gives answers, as pipelines of transformers do.

    model: what computes. length: tokens of the longest input, longer texts are truncated; longer contexts are divided
    into windows that share `stride` tokens. no_answer: whether a question may have none. paired: whether the model
    reads two texts; None: not known.
    """

    model: Predictor
    length: int
    stride: int = 0
    no_answer: bool = False
    paired: bool | None = None

    @property
    def kind(self) -> str:
        """The kind of task, a name of `KINDS`."""
        return self.model.kind

    def __call__(self, inputs_: Any, *, top_k: int = 0, batch_size: int = 0) -> Any:
        """The answer to a text, or a list of answers to a list of texts.

        inputs_: a text; a pair of texts as a tuple, or by the names text and text_pair; a question with its context as
        a tuple, or by the names question and context; of models that label words, a tuple or list of words for a
        sentence that is divided already; or a list of any of these. top_k: so many labels, the most probable first.
        batch_size: most texts of a batch; 0 to go by their tokens alone, as an evaluation does.

        An answer is, with numbers as Python has them:

        - classification: {label, score}; with `top_k` a list of them;
        - several labels: a list of {label, score} with a probability above one half, or the `top_k` most probable;
        - regression: {score};
        - words: a list of {entity_group, score, word, start, end}, where labels mark no entities of {entity, …} for
          each word; start and end are characters of the text, or of the words with spaces between them;
        - questions: {answer, score, start, end}, in characters of the context;
        - sentence vectors: {vector}, of length 1 where the model's folder says so.

        Raises `DataError` for what is not a text and for an empty one, `ConfigError` for `top_k` without labels.
        """
        one = inputs.is_one(inputs_)
        given = [inputs.item(row, self.kind) for row in ([inputs_] if one else inputs_)]
        found: list[Answer] = []
        for begin in range(0, len(given), CHUNK):
            part, place = given[begin : begin + CHUNK], partial(_input, begin)
            inputs.check(part, self.kind, self.paired, place)
            found += finished(self.answers(part, place, top_k, batch_size)).answers
        return found[0] if one else found

    def answers(
        self, items: Sequence[Item], place: Place, top_k: int = 0, batch_size: int = 0
    ) -> Generator[Progress, None, Answered]:
        """Answers to a chunk of items, in their order, see `__call__`; yields how many examples are done.

        items: as `inputs.check` lets them pass. place: how messages call an item.
        """
        self.check_top_k(top_k)
        at_least(0, batch_size=batch_size)
        asked = inputs.asked(items, self.kind, self.model.tokenizer, self.length, self.stride)
        rows = _at_most(evaluation_batches(asked.examples, self.model.token_budget), batch_size)
        found, _ = yield from predict.outputs(
            self.model.run(), asked.examples, rows, self.model.on.device, room=self.model.on.room
        )
        logits = found.cpu().double().numpy()
        replies.check_finite(logits, asked, place)
        question = Question(labels=self.model.labels, top_k=top_k, no_answer=self.no_answer)
        return Answered(answers=REPLIES[self.kind].answers(asked, logits, question), asked=asked)

    def check_top_k(self, top_k: int) -> None:
        """Raise `ConfigError` for a number that means nothing."""
        at_least(0, top_k=top_k)
        if top_k and not REPLIES[self.kind].ranked:
            raise ConfigError(f"top-k is for models that choose among labels; {self.model.source} gives {self.kind}")


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The answers to a chunk of items, and what was asked."""

    answers: list[Answer]
    asked: Asked


def _input(begin: int, index: int) -> str:
    return f"input {begin + index}"


def _at_most(batches: Iterator[NDArray[np.int64]], size: int) -> Iterator[NDArray[np.int64]]:
    """Batches divided into such of at most `size` rows; 0 leaves them."""
    for rows in batches:
        yield from (rows[i : i + size] for i in range(0, len(rows), size)) if size else (rows,)


def opened(source: str, runtime: str, hardware: Hardware, *, max_length: int = 0, stride: int = 0) -> Pipeline:
    """The model `source`, ready to be asked; it is what its folder says, or else what its network is for.

    max_length, stride: 0 for those of its run, or for the defaults of an evaluation.

    Raises:
        ConfigError, ModelError, FileError: see `choice.opened`; also a kind of task that is not known.
    """
    kind, stored = _kind(source), artifact.stored_source(source)
    row, task = KINDS[kind], TASKS.get(str(stored.get("task")))
    model = choice.opened(source, runtime, hardware, labels=None, kind=kind)
    length = max_length or stored.get("max_length") or (WINDOW if row.windows else LENGTH)
    at_least(8, max_length=length)
    at_least(0, stride=stride)
    return Pipeline(
        model=model,
        length=min(length, model.longest),
        stride=stride or stored.get("stride") or 0,
        no_answer=bool(artifact.known(source).no_answer),
        paired=None if task is None else bool(task.pair or stored.get("pair_column")),
    )


def _kind(source: str) -> str:
    """The kind of task that a model is for. Raises `ModelError`."""
    settings = artifact.stored_settings(source)
    if "kind" not in settings:
        return loading.kind_of(read_config(hub.folder(source), source), source)
    kind = str(settings["kind"])
    if kind not in KINDS:
        raise ModelError(f"{source} is for {kind[:40]!r}, a kind of task that this version of capcli does not know")
    return kind


def truncated(n_cut: int, n_texts: int, pipeline: Pipeline) -> str:
    """The note on texts that were too long."""
    return tokens.truncated(n_cut, n_texts, pipeline.length, pipeline.kind, "the input")
