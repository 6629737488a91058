"""Whether an export meets the limits: cheapest first, on what was written, by the runtime that is to compute it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial

from capcli.config.export import ExportConfig
from capcli.config.measure import Gates
from capcli.errors import ConfigError
from capcli.events import Event, told
from capcli.exporting import checks
from capcli.exporting.job import Export, Opened
from capcli.measuring import gates, latency, metrics, noise, scoring
from capcli.measuring.gates import MEDIAN, Evidence
from capcli.measuring.scoring import Measured
from capcli.records.exported import Rung
from capcli.records.parts import Gate, Latency
from capcli.runtime import choice

SLACK = 0.9  # of an estimate: folded constants can make a graph smaller than the sum of its weights


def check_limits(job: Export) -> None:
    """Raise `ConfigError` for a drop that cannot be measured here, or that no model or every model has."""
    limits, data = job.config.limits, job.known.data
    if limits.max_drop and not job.known.ours:
        raise ConfigError(
            f"--max-drop needs the data of the task: {job.known.missing}",
            "name them with --data, or texts with --texts",
        )
    known = {name: metrics.bounds(name) for name in data.metrics}
    gates.require(Gates(max_drop=limits.max_drop), known, known)


def too_large(config: ExportConfig, rung: Rung) -> Rung | None:
    """The rung, failed, where what it would take cannot fit; None where it can."""
    if rung.weights_bytes is None or not config.fit:
        return None
    least = round(SLACK * rung.weights_bytes) if rung.estimated else rung.weights_bytes
    return _held(rung, _size(config.limits, rung.weights_bytes)) if least > config.fit else None


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A rung with what was measured on it, the export on its runtime, and its scores where a drop is limited."""

    rung: Rung
    opened: Opened
    after: Measured | None = None

    @property
    def too_slow(self) -> bool:
        """Whether the latency is what is not kept to, so that the same file may pass by another runtime."""
        return any(gate.metric == MEDIAN and not gate.passed for gate in self.rung.gates)


def tried(
    job: Export, limits: Gates, rung: Rung, opened: Opened, before: Measured | None
) -> Generator[Event, None, Tried]:
    """What was opened, held against the limits until it does not keep to one.

    before: the scores of the model as it was loaded, where a drop is limited. Raises `ModelError` for a runtime that
    cannot compute it.
    """
    opened = on_runtime(job, opened, rung.runtime)
    rung = replace(rung, weights_bytes=opened.file_bytes, memory_bytes=opened.memory_bytes, estimated=False)
    rung = _held(rung, _size(limits, opened.file_bytes))
    if rung.passed and limits.max_latency_ms:
        system = {"": latency.of(opened.model)}
        speed = (yield from told(latency.fixed(system), partial(Event, phase="latency", overall=0.55)))[""]
        rung = _held(replace(rung, latency=speed), _latency(limits, speed))
    if not rung.passed or before is None:
        return Tried(rung=rung, opened=opened)
    after = yield from checks.scored(job, opened.model, "after")
    rung = _held(replace(rung, metrics=after.metrics), _drops(limits, after, before))
    return Tried(rung=rung, opened=opened, after=after)


def on_runtime(job: Export, opened: Opened, runtime: str | None) -> Opened:
    """What was opened, computed by the runtime of a rung. Raises `CapError` where the sparse runtime cannot."""
    if runtime != "sparse":
        return opened
    assert opened.model.model is not None, "a file of ours is a network"
    found = choice.on_sparse(opened.model.model, job.on)
    return replace(opened, model=found.predictor, memory_bytes=found.packed_bytes)


# The limits, as gates ------------------------------------------------------------------------------------------------


def _held(rung: Rung, found: tuple[Gate, ...]) -> Rung:
    """The rung after some more gates."""
    return replace(rung, gates=(*rung.gates, *found), passed=all(gate.passed for gate in found))


def _size(limits: Gates, weights_bytes: int) -> tuple[Gate, ...]:
    return gates.check(Gates(max_bytes=limits.max_bytes), Evidence(primary="", metrics={}, weights_bytes=weights_bytes))


def _latency(limits: Gates, speed: Latency) -> tuple[Gate, ...]:
    found = noise.stored(speed.median_ms, speed.confidence_95)
    return gates.check(Gates(max_latency_ms=limits.max_latency_ms), Evidence(primary="", metrics={}, latency_ms=found))


def _drops(limits: Gates, after: Measured, before: Measured) -> tuple[Gate, ...]:
    """How far the metrics fell below those of the model as it was loaded, on the same examples. A model that only
    guesses has limits too: what is asked here is whether the export is still that model."""
    differences, ratios = scoring.paired(after, before)
    found = Evidence(
        primary="",
        metrics=after.estimates(),
        baseline=before.metrics,
        differences=differences,
        ratios=ratios,
    )
    return gates.check(Gates(max_drop=limits.max_drop), found)
