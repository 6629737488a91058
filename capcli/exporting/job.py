"""An export: what is asked for, what it is made from, and the texts that it is checked on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capcli import files
from capcli.config.export import ExportConfig
from capcli.config.names import ARTEFACT_FORMATS
from capcli.config.task import TaskConfig
from capcli.data.splits import Split, TaskData
from capcli.errors import FileError
from capcli.events import Event
from capcli.exporting import agreement
from capcli.models.devices import Compute
from capcli.models.model import Model, longest_input
from capcli.models.predictor import Predictor
from capcli.records.exported import ExitTable, FactorTable, Gives, RunFacts, Speed, Vocabulary

SLICED_FORMATS = ("sliced", "onnx", "lowrank")  # that compute without what is zero


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The data of an export: those of the model's own task, or built-in texts that stand in for them.

    ours: they are the model's own, so that its accuracy can be measured, or at least agreement with it; else `missing`
    says why not. given: the texts that the user named to compare logits on.
    """

    source: TaskConfig
    data: TaskData
    missing: str = ""
    given: Split | None = None

    @property
    def ours(self) -> bool:
        return not self.missing

    @property
    def held_out(self) -> Split:
        """The first evaluation split."""
        return next(iter(self.data.evals.values()))

    @property
    def compared(self) -> Split:
        """What logits are compared on."""
        return self.given or self.held_out


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is exported: the model as it was loaded, and as it is to be written (other vocabulary, smaller layers).

    texts, texts_of: what the logits are compared on, and the split that they are from. words: the new vocabulary.
    own_dtype: type of the weights in the file of the model. history: the report of the run, as far as it is known.
    had_exits: the model has exits, without which it was loaded.
    """

    config: ExportConfig
    on: Compute
    original: Model
    model: Model
    known: Texts
    texts: list[agreement.Text]
    texts_of: str
    words: Vocabulary | None
    own_dtype: str
    history: RunFacts | None
    had_exits: bool = False

    @property
    def length(self) -> int:
        """Longest input in tokens."""
        return longest_input(self.original, self.known.source.longest)

    @property
    def dtype(self) -> str:
        """The type of the weights that are written."""
        return self.dtype_for(self.config.to)

    def dtype_for(self, to: str) -> str:
        """The type of the weights in a format: chosen, or that of the model's own file where the format is ours."""
        chosen = self.config.dtype
        if to in (*ARTEFACT_FORMATS, "mask"):
            return self.own_dtype if chosen == "auto" else chosen
        return chosen if to == "dense" and chosen not in ("auto", "int8") else "fp32"

    @property
    def exact(self) -> bool:
        """Whether only rounding may tell the logits of the export from those of the model, on the same tokens."""
        same = self.dtype in ("fp32", self.own_dtype)
        return same and self.config.embeddings == "keep" and not self.config.int8 and self.config.to != "lowrank"

    @property
    def lossy(self) -> bool:
        """Whether the export answers otherwise than the model, so that its accuracy has to be measured again."""
        return bool(self.config.vocab) or not self.exact or self.config.to == "exits"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What was written, opened again as whoever gets it opens it; non-zero weights of its matrices, and the bytes that
    its weights take on disk and in memory. plain: what is compared with the original, where `model` may answer
    early; exits, factors: what there is to say of these."""

    model: Predictor
    nonzero: int
    file_bytes: int
    memory_bytes: int
    plain: Predictor | None = None
    exits: ExitTable | None = None
    factors: FactorTable | None = None


def check_free(folder: Path) -> Path:
    """An absolute path that is free for a new folder. Raises `FileError`."""
    out = folder.resolve()  # without the `..` of new/..
    if out == Path.cwd() or out == out.parent:
        raise FileError(f"an export cannot take the place of {out}", "choose a folder of its own with -o")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{folder} exists and is not empty", "choose another folder with -o")
    files.check_name(out)
    files.check_writable(out.parent)
    return out


def total_bytes(net: Any, itemsize: int) -> int:
    """Bytes of the weights in memory."""
    n: int = sum(parameter.numel() for parameter in net.parameters())
    return n * itemsize


def event_of(when: str) -> Callable[..., Event]:
    """A maker of events of the measurement `before` or `after`, each an eighth of the whole."""
    begin = 0.75 if when == "after" else 0.625

    def event(done: float = 0, total: float = 0) -> Event:
        share = begin + 0.125 * (done / total if total else 0)
        return Event(phase=f"accuracy {when}", done=done, total=total, overall=share)

    return event


def what_it_gives(opened: Opened, dense_bytes: int, speed: Speed | None) -> Gives:
    """How many times smaller, lighter in memory and, where it was measured, faster; 1.0 is as dense."""
    return Gives(
        smaller_file=dense_bytes / opened.file_bytes,
        less_memory=dense_bytes / opened.memory_bytes,
        faster={name: row.times for name, row in speed.batches.items() if row.times is not None} if speed else None,
    )
