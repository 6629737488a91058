"""`--compare`: what moved between stored results, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from capcli.config.measure import Gates
from capcli.config.paths import shortened
from capcli.errors import ConfigError
from capcli.measuring import chance, metrics
from capcli.measuring.gates import Evidence, check, require
from capcli.measuring.noise import (
    EVALUATED_ON,
    MEASURED_ON,
    Estimate,
    difference,
    differing,
    mean_bounds,
    ratio,
    stored,
)
from capcli.records.measured import (
    Comparison,
    Comparisons,
    Counted,
    EvalResult,
    Moved,
    Perturbed,
    ProbeResult,
    result_of,
)
from capcli.records.parts import Gate, Latency, Scores, interval
from capcli.reporting.text import named
from capcli.stored import finite

LEVEL = 0.95
SETTINGS = ("probe", "layer", "pooling")  # of a probe: with others, the scores are about something else
CONDITIONS = ("batch", "length", "runtime", "threads", "device", "hardware", "precision")  # of a latency

Estimates = dict[str, Estimate]
Measured = EvalResult | ProbeResult


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Two results by what they have in common: the estimates of both, what to compare of them, what only one has.

    chance: what guessing scores, by the same names, where that is known.
    """

    theirs: Estimates
    ours: Estimates
    shared: list[str]
    alone: list[str]
    bounds: Mapping[str, tuple[float, float]]
    chance: Mapping[str, float]


def compare_all(command: str, names: Sequence[str], gates: Gates) -> Comparison | Comparisons:
    """Compare all others with the first: one as `compare` does, more in one result. Raises `ConfigError` for none."""
    if len(names) < 2:
        raise ConfigError(
            f"--compare needs two results or more, got {len(names)}", f"for example cap {command} --compare A B"
        )
    if len(names) == 2:
        return compare(command, names[0], names[1], gates)
    pairs = [compare(command, names[0], name, gates) for name in names[1:]]
    notes = dict.fromkeys(f"{pair.new}: {note}" for pair in pairs for note in pair.notes)
    held = tuple(_of(gate, pair.new or "") for pair in pairs for gate in pair.gates)
    first = pairs[0]
    return Comparisons(
        kind=command,
        baseline=first.old,
        task=first.task,
        split=first.split,
        n_examples=first.n_examples,
        comparisons=tuple(pairs),
        notes=tuple(notes),
        gates=held,
        passed=all(gate.passed for gate in held),
    )


def _of(gate: Gate, name: str) -> Gate:
    """A gate of one of several results, which says of which."""
    return replace(gate, name=f"{gate.name}, {name}", message=f"{name}: {gate.message}")


def compare(command: str, old: str, new: str, gates: Gates) -> Comparison:
    """Compare two stored results of `cap eval` or `cap probe`, whichever `command` is, or folders of runs for `eval`.

    Metrics of changed texts and of further splits are called METRIC@NAME. `moved` says whether 0 lies outside the 95 %
    interval of the change; it and the interval are None where the noise is not known.

    Raises `FileError` for a file without such a result, `ConfigError` for results that do not compare.
    """
    before, after = result_of(command, old), result_of(command, new)
    pair = _evaluated(before, after, old, new) if command == "eval" else _probed(before, after, old, new)
    require(gates, pair.bounds, pair.bounds)
    alone = ", ".join(map(named, pair.alone))
    notes = [f"not compared, because missing from one result or measured differently: {alone}"] if alone else []
    pairs = {name: (pair.theirs[name], pair.ours[name]) for name in pair.shared}
    latency, conditions = _latency(before.latency, after.latency)
    checked = check(gates, _evidence(command, after, pair, pairs))
    found = Comparison(
        kind=command,
        old=shortened(old),
        new=shortened(new),
        rows=tuple(_moved(name, *both) for name, both in pairs.items()),
        sizes=_exact(_sizes(before), _sizes(after)),
        latency=latency,
        notes=(*notes, *conditions),
        gates=checked,
        passed=all(gate.passed for gate in checked),
    )
    if isinstance(after, EvalResult):
        return replace(found, task=after.task, split=after.split, n_examples=after.n_examples)
    return found


def _evidence(command: str, after: Measured, pair: _Pair, pairs: Mapping[str, tuple[Estimate, Estimate]]) -> Evidence:
    """What the gates see: the new result, and the old one as its baseline."""
    return Evidence(
        primary=str(after.primary) if isinstance(after, EvalResult) else "mean",
        metrics=pair.ours,
        baseline={name: old.value for name, (old, _) in pairs.items()},
        differences={name: difference(*_known(*both)) for name, both in pairs.items()},
        ratios={name: ratio(*_known(*both)) for name, both in pairs.items() if both[0].value > 0},
        at_chance=_at_chance(after, pair, pairs),
        weights_bytes=after.size.weights_bytes,
        latency_ms=_median(after.latency),
    )


def _at_chance(after: Measured, pair: _Pair, pairs: Mapping[str, tuple[Estimate, Estimate]]) -> dict[str, float]:
    """What guessing scores, of the names in which the old result is no better."""
    n_examples = after.n_examples if isinstance(after, EvalResult) else None
    known = {name: (old, pair.chance[name]) for name, (old, _) in pairs.items() if name in pair.chance}
    return {
        name: by_chance
        for name, (old, by_chance) in known.items()
        if chance.is_at_chance(name.partition("@")[0], old, by_chance, n_examples)
    }


# Two evaluations -----------------------------------------------------------------------------------------------------


def _evaluated(before: EvalResult, after: EvalResult, old: str, new: str) -> _Pair:
    _same(before, after, EVALUATED_ON, old, new)
    theirs, ours = _eval_estimates(before), _eval_estimates(after)
    return _Pair(
        theirs=theirs,
        ours=ours,
        shared=[name for name in ours if name in theirs],
        alone=sorted(set(ours) ^ set(theirs)),
        bounds={name: metrics.bounds(name.partition("@")[0]) for name in {**theirs, **ours}},
        chance=_eval_chance(before) | _eval_chance(after),
    )


def _same(before: Measured, after: Measured, names: tuple[str, ...], old: str, new: str) -> None:
    if name := differing(before, after, names):
        raise ConfigError(
            f"{old} and {new} differ in {name}: {named(getattr(before, name))} and {named(getattr(after, name))}",
            "compare results that were measured in the same way",
        )


def _eval_estimates(result: EvalResult) -> Estimates:
    """The metrics of the first split, then those of its changed texts and of the other splits as METRIC@NAME."""
    found = _estimates(result)
    others = {name: scores for name, scores in result.splits.items() if name != result.split}
    further: dict[str, Scores | Perturbed] = {**result.perturbed, **others}
    for name, scores in further.items():
        found |= {f"{metric}@{name}": one for metric, one in _estimates(scores).items()}
    return found


def _eval_chance(result: EvalResult) -> dict[str, float]:
    """What guessing scores, by the names of `_eval_estimates`; on changed texts as much as without the change."""
    found = dict(result.chance)
    others = {name: scores.chance for name, scores in result.splits.items() if name != result.split}
    for name, by_chance in {**dict.fromkeys(result.perturbed, result.chance), **others}.items():
        found |= {f"{metric}@{name}": value for metric, value in by_chance.items()}
    return found


def _estimates(scores: EvalResult | Scores | Perturbed) -> Estimates:
    return {name: stored(value, scores.confidence_95.get(name)) for name, value in scores.metrics.items()}


# Two probes ----------------------------------------------------------------------------------------------------------


def _probed(before: ProbeResult, after: ProbeResult, old: str, new: str) -> _Pair:
    _same(before, after, SETTINGS, old, new)
    theirs, ours = _probe_estimates(before), _probe_estimates(after)
    shared, alone = _common_tasks(before, after)
    if not shared:
        raise ConfigError(
            f"{old} and {new} have no task in common that was measured in the same way: {_reason(before, after)}",
            "probe the same tasks, with the same examples and options",
        )
    shared += ["mean"] * (not alone and "mean" in ours and "mean" in theirs)
    return _Pair(
        theirs=theirs,
        ours=ours,
        shared=shared,
        alone=alone,
        bounds=_bounds(before) | _bounds(after),
        chance=_probe_chance(before) | _probe_chance(after),
    )


def _bounds(result: ProbeResult) -> dict[str, tuple[float, float]]:
    """What the scores of the tasks of a probe and their mean can be."""
    found = {name: metrics.bounds(str(row.metric)) for name, row in result.tasks.items()}
    return found | {"mean": mean_bounds(found.values())}


def _probe_estimates(result: ProbeResult) -> Estimates:
    """The mean over the seeds of each task, and `mean`, that over the tasks, if it was stored."""
    found = {name: stored(row.mean, row.confidence_95) for name, row in result.tasks.items()}
    mean = result.mean
    return found | ({"mean": stored(mean.value, mean.confidence_95)} if mean else {})


def _probe_chance(result: ProbeResult) -> dict[str, float]:
    """What guessing scores, by task and for `mean`, where that is known."""
    found = {**{name: row.chance for name, row in result.tasks.items()}, "mean": result.chance}
    return {name: value for name, value in found.items() if value is not None}


def _common_tasks(before: ProbeResult, after: ProbeResult) -> tuple[list[str], list[str]]:
    """The tasks that both have and measured alike, and the others."""

    def alike(name: str) -> bool:
        both = name in before.tasks and name in after.tasks
        return both and not differing(before.tasks[name], after.tasks[name], MEASURED_ON)

    names = list({**before.tasks, **after.tasks})
    return [name for name in names if alike(name)], [name for name in names if not alike(name)]


def _reason(before: ProbeResult, after: ProbeResult) -> str:
    """Why no task of two probes compares: how the first that both have differs, or which tasks there are."""
    for task, row in after.tasks.items():
        other = before.tasks.get(task)
        if other and (name := differing(other, row, MEASURED_ON)):
            return f"the {name} of {named(task, 60)} is {named(getattr(other, name))}, now {named(getattr(row, name))}"
    both = before.tasks, after.tasks
    return " and ".join(", ".join(named(task, 60) for task in list(tasks)[:20]) for tasks in both)


# Differences ---------------------------------------------------------------------------------------------------------


def _known(old: Estimate, new: Estimate) -> tuple[Estimate, Estimate]:
    """New and old, both with their noise or both without: that of one alone would claim that the other is exact."""
    return (new, old) if old.at and new.at else (Estimate(new.value), Estimate(old.value))


def _moved(name: str, old: Estimate, new: Estimate) -> Moved:
    change = difference(*_known(old, new))
    ends = interval(change.interval(LEVEL))
    moved = None
    if ends:
        moved = not ends[0] <= 0 <= ends[1]
    elif change.value == 0:
        moved = False
    return Moved(
        name=name,
        old=finite(old.value),
        new=finite(new.value),
        old_confidence_95=interval(old.interval(LEVEL)),
        new_confidence_95=interval(new.interval(LEVEL)),
        change=finite(change.value),
        interval=ends,
        moved=moved,
    )


def _sizes(result: Measured) -> dict[str, float | None]:
    """What is counted, not estimated."""
    size = result.size
    found = {one.name: getattr(size, one.name) for one in fields(size) if one.name != "codings"}
    if isinstance(result, EvalResult) and result.sparsity:
        found |= {"sparsity": result.sparsity.achieved, "whole_model_sparsity": result.sparsity.whole_model}
    return found


def _exact(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> tuple[Counted, ...]:
    """The numbers that both have."""
    return tuple(
        Counted(name=name, old=old, new=new, change=new - old)
        for name, new in after.items()
        if (old := before.get(name)) is not None and new is not None and math.isfinite(old) and math.isfinite(new)
    )


def _median(latency: Latency | None) -> Estimate | None:
    return stored(latency.median_ms, latency.confidence_95) if latency else None


def _latency(before: Latency | None, after: Latency | None) -> tuple[tuple[Moved, ...], list[str]]:
    """The medians, if both were measured; under other conditions, whether they moved is not known. And notes on it."""
    old, new = _median(before), _median(after)
    if old is None or new is None or not (math.isfinite(old.value) and math.isfinite(new.value)):
        return (), []
    row = _moved("median_ms", old, new)
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in CONDITIONS}
    if other := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
        told = "; ".join(f"{name} {named(a, 60)}, now {named(b, 60)}" for name, (a, b) in other.items())
        return (replace(row, interval=None, moved=None),), [f"latency was measured under other conditions: {told}"]
    return (row,), []
