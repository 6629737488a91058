"""The one sentence on how good a pruned model is: what it keeps of the dense one, where that says something.

A share says nothing of a dense model that only guesses or hardly learned, and a share above all of it sounds like more
than noise: there the values themselves are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from capcli.records.parts import LABELS
from capcli.records.pruned import Metrics
from capcli.reporting.text import named, number, percent
from capcli.stored import finite

TELLING = 0.1  # of the way from chance to 1, a perfect metric, that a dense model went whose share is a headline


@dataclass(frozen=True, kw_only=True)
class Headline:
    """`kept`: the share of the dense model's metric as text; where that says nothing, `said` is a sentence without its
    end. Both are empty where the metric was not measured."""

    kept: str = ""
    said: str = ""


def compared_with(reference: str) -> str:
    """What metrics compare with, where that is not labels; empty where it is."""
    if reference == LABELS:
        return ""
    return f"the {named(reference, 20)}'s answers, since there were no labels: agreement, not accuracy"


def headline(metrics: Metrics, name: str) -> Headline:
    """How good the pruned model is in the metric `name`."""
    pruned = finite(metrics.pruned.get(name))
    dense = finite(metrics.dense.get(name)) if metrics.reference == LABELS else None  # 1 by definition
    guessing = [model for model in ("pruned", "dense") if name in getattr(metrics.at_chance, model)]
    if pruned is None and not guessing:
        return Headline()
    shown = f"{named(name, 60)} {number(pruned)}" + ("" if dense is None else f", dense {number(dense)}")
    if guessing:
        return Headline(said=f"{_who(guessing)}: {shown}, chance {number(metrics.chance.get(name))}")
    if metrics.reference != LABELS:
        who = named(metrics.reference, 20)
        return Headline(
            said=f"Agreement with the {who}, not accuracy, since there were no labels: {shown}{_chance(metrics, name)}"
        )
    share = finite(metrics.retention.get(name))
    if share is not None and share > 1:
        return Headline(said=f"It is as good as the dense model: {shown}")
    if dense is not None and _hardly_learned(dense, finite(metrics.chance.get(name))):
        return Headline(said=f"The dense model learned little: {shown}{_chance(metrics, name)}")
    return Headline(kept="" if share is None or share < 0 else percent(share))


def _who(guessing: Sequence[str]) -> str:
    if len(guessing) > 1:
        return "Neither it nor the dense model is better than guessing"
    return f"{'It' if guessing == ['pruned'] else 'The dense model'} is no better than guessing"


def _hardly_learned(dense: float, by_chance: float | None) -> bool:
    floor = by_chance or 0.0  # which older reports do not hold
    return dense - floor < TELLING * (1 - floor)


def _chance(metrics: Metrics, name: str) -> str:
    return f", chance {number(metrics.chance[name])}" if name in metrics.chance else ""
