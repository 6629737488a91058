"""Is the export the same model? Logits, metrics and speed, as opened again from disk."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from typing import Any

from capcli.errors import CheckFailed
from capcli.events import Event, told
from capcli.exporting import agreement
from capcli.exporting.job import SLICED_FORMATS, Export, Opened, event_of, what_it_gives
from capcli.measuring import chance, latency, scoring
from capcli.measuring.scoring import Measured
from capcli.models import predictor
from capcli.models.model import place
from capcli.models.predictor import Predictor
from capcli.records.exported import BeforeAfter, Check, ExportMetrics, ExportSize, Measurements, Speed, Timed
from capcli.records.parts import intervals
from capcli.timing import in_turn

ALONE = (
    "8-bit answers depend on the other texts in a batch: agreement and accuracy were measured one text at a time, "
    "and some answers may differ in other batches"
)
TOGETHER = "exits are for one text at a time: a batch is computed up to the last layer that one of its texts needs"
SEEN = (
    "the threshold was chosen on examples that the model itself may have been trained on; --holdout of cap prune sets "
    "some aside"
)
UNREAD = (
    "the factors were fitted to the weights alone, because no training texts are here, and lose more than necessary; "
    "name the data with --data"
)
LEFT_OUT = "the exits of the model are left out: the export computes all layers, and was compared with all layers"
LATENCY_BATCHES, LATENCY_SECONDS = (1, 32), 8.0


def checked(
    job: Export, opened: Opened, before: Measured | None = None, after: Measured | None = None
) -> Generator[Event, None, Measurements]:
    """Compare what was opened with the original; returns what `export.json` says of it. Raises `CheckFailed`.

    before, after: their scores on the held-out split, where these were measured already.
    """
    yield Event(phase="export", overall=0.6, note="comparing the export with the original")
    place(job.original, job.on)
    check, dense_bytes = _compared(job, opened), 4 * job.original.before_slicing.total
    notes = [*[job.known.missing] * bool(job.known.missing), *[ALONE] * opened.model.alone]
    notes += [TOGETHER, *[SEEN] * bool(opened.exits.seen)] if opened.exits else []
    notes += [LEFT_OUT] * (job.had_exits and not opened.exits)
    notes += [UNREAD] * (opened.factors is not None and not opened.factors.texts)
    notes += [note for note in opened.model.notes if note not in job.original.notes]
    metrics, speed = None, None
    if (job.lossy or after) and job.known.ours:
        before = before or (yield from scored(job, predictor.of_network(job.original, job.on), "before"))
        after = after or (yield from scored(job, opened.model, "after"))
        metrics = _metrics(job, before, after)
        notes += [*after.doubts, *_guessing(job, before, after)]
    elif job.lossy:
        notes.append("the weights were changed, and the accuracy was not measured again")
    if job.config.to in SLICED_FORMATS or opened.model.runtime == "sparse":
        yield Event(phase="export", overall=0.875, note="measuring latency, in turn with the original model")
        speed = yield from _speed(job, opened)
    return Measurements(
        check=check,
        size=ExportSize(dense_bytes=dense_bytes, weights_bytes=opened.file_bytes, memory_bytes=opened.memory_bytes),
        metrics=metrics,
        speed=speed,
        runtime=opened.model.runtime,
        batching=opened.model.batching,
        notes=tuple(notes),
        gives=what_it_gives(opened, dense_bytes, speed),
        exits=opened.exits,
        factors=opened.factors,
    )


def _compared(job: Export, opened: Opened) -> Check:
    """Logits on the same texts, and zeros. A text that the new vocabulary reads otherwise has no equal to compare."""
    texts, kind, before = job.texts, job.original.kind, job.original.nonzero()
    if job.config.vocab:
        texts = [text for text in texts if _reads_alike(job, opened.model.tokenizer, text)]
        if not texts:
            raise CheckFailed("the new vocabulary changes the tokens of every text", "keep more tokens")
    if opened.nonzero > before and opened.factors is None:  # factors have other weights
        raise CheckFailed(f"{opened.nonzero:,} weights are not zero in the export, {before:,} before")
    batch = 1 if opened.model.alone else agreement.BATCH
    ours = agreement.logits(predictor.of_network(job.original, job.on), texts, job.length, batch)
    theirs = agreement.logits(opened.plain or opened.model, texts, job.length, batch)
    found = agreement.difference(kind, ours, theirs)
    allowed = found.tolerance if job.exact else sys.float_info.max
    if not found.largest <= allowed:
        raise CheckFailed(
            f"the logits of the export differ by up to {found.largest:.3g} on {len(texts)} texts, "
            f"{allowed:.3g} is allowed; nothing was kept"
        )
    return Check(
        texts=len(texts),
        of=job.texts_of,
        exact=job.exact,
        largest_difference=found.largest,
        largest_logit=found.scale,
        tolerance=allowed if job.exact else None,
        argmax_agreement=found.agreement,
        nonzero_weights=BeforeAfter(before=before, after=opened.nonzero),
    )


def _reads_alike(job: Export, tokenizer: Any, text: agreement.Text) -> bool:
    first, second = (
        agreement.pieces(one, job.original.kind, text, job.length) for one in (job.original.tokenizer, tokenizer)
    )
    return first == second


def with_answers(job: Export) -> Generator[Event, None, Export]:
    """The job with the answers of the model as it was loaded to the held-out texts, where metrics compare with them."""
    data = job.known.data
    if not data.compares:
        return job
    place(job.original, job.on)
    model = predictor.of_network(job.original, job.on)
    asked = scoring.splits_answered(model, data.evals, job.known.source)
    found = yield from told(asked, event_of("before"))
    return replace(job, known=replace(job.known, data=replace(data, evals=found)))


def scored(job: Export, model: Predictor, when: str) -> Generator[Event, None, Measured]:
    """The scores of the original (`before`) or of what was written (`after`) on the held-out split."""
    examples = scoring.encoded(model, job.known.held_out, job.known.source)
    return (yield from told(scoring.measure(model, examples, job.known.data.metrics), event_of(when)))


def _metrics(job: Export, before: Measured, after: Measured) -> ExportMetrics:
    """Metrics before and after, and how often both answer alike, on the same examples."""
    return ExportMetrics(
        reference=job.known.data.reference,
        split=job.known.held_out.name,
        primary=job.known.data.primary,
        before=before.metrics,
        n_examples=after.n_examples,
        confidence_95=intervals(after.confidence_95),
        after=after.metrics,
        chance=after.chance,
        at_chance=after.at_chance,
        agreement=scoring.agreed(after, before).value,
    )


def _guessing(job: Export, before: Measured, after: Measured) -> list[str]:
    """A note when the model that was exported, the export or both are no better than guessing, unless its run said so
    of the model."""
    run, primary = job.history, job.known.data.primary
    if run and run.metrics and primary in run.metrics.at_chance.pruned:
        return []
    return chance.doubts({"the model before": before, "the export": after}, job.known.held_out.name, primary)


def _speed(job: Export, opened: Opened) -> Generator[Event, None, Speed]:
    """How many times faster the export is than the model as it was loaded, measured in turn; by batch size."""
    models = (predictor.of_network(job.original, job.on), opened.model)
    length, rows = min(latency.LENGTH, models[0].longest), {}
    for batch in LATENCY_BATCHES:
        calls = [one.asked(one.full_inputs(batch, length)) for one in models]
        rounds = in_turn([calls] * latency.ROUNDS, seconds=LATENCY_SECONDS)
        pairs = yield from told(rounds, partial(Event, phase="latency", overall=0.9))
        rows[f"batch_{batch}"] = Timed(
            before_ms=1000 * statistics.median(a for a, _ in pairs),
            ms=1000 * statistics.median(b for _, b in pairs),
            times=statistics.median(a / b for a, b in pairs),
            runs=len(pairs),
        )
    return Speed(**rows, length=length, threads=opened.model.threads, hardware=job.on.name)
