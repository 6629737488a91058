"""The summary of `cap predict`; the answers themselves are lines of their own."""

from __future__ import annotations

from dataclasses import dataclass

from capcli.records.codec import Versioned
from capcli.records.parts import Runtime


@dataclass(frozen=True, kw_only=True)
class Predictions(Versioned):
    """What `cap predict` did: how many texts of `file` it answered, in `out` if that is a file, and how fast."""

    model: str
    kind: str
    labels: tuple[str, ...]
    file: str
    out: str
    n_texts: int
    seconds: float
    texts_per_second: float
    max_length: int
    runtime: Runtime
    notes: tuple[str, ...] = ()
