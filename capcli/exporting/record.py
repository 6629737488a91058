"""What an export says of itself: `export.json`, the model card, and the results as the hub reads them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from capcli import files, machine
from capcli.config.paths import command_line, portable, shortened
from capcli.data import tasks
from capcli.exporting.formats import settings
from capcli.exporting.job import Export
from capcli.measuring import scoring
from capcli.models import artifact
from capcli.predicting.usage import datasets, usage
from capcli.records.exported import ExportRecord, Ladder, LayerSize, Measurements
from capcli.records.parts import Sparsity
from capcli.records.pruned import AtChance, Metrics, Report, Size
from capcli.reporting.card import eval_results, render_card


def record_of(job: Export, measured: Measurements, ladder: Ladder | None = None) -> ExportRecord:
    """`export.json`, but for the files. ladder: what was tried, where limits chose the export."""
    config, slices = job.config, job.model.slices
    return ExportRecord(
        model=config.model,
        format=config.to,
        out=shortened(str(config.out_folder)),
        command=command_line(sys.argv[1:]),
        versions=machine.versions(),
        dtype=job.dtype,
        embeddings=config.embeddings,
        int8=config.int8,
        vocab=config.vocab,
        threshold=config.threshold,
        vocabulary=job.words,
        settings=artifact.settings_record(job.model, settings(job), config.out_folder),
        layers={name: LayerSize(**vars(size)) for name, size in slices.sizes.items()} if slices else None,
        run=job.history,
        ladder=ladder,
        **vars(measured),
    )


def describe(job: Export, record: ExportRecord, staging: Path) -> None:
    """Write the model card, and in a stock folder the results as the hub reads them."""
    found, config, source = _report(job, record), job.config, job.known.source
    card = render_card(
        found,
        usage=usage(job.original.kind, source if job.known.ours else None),
        base_model=found.base_model,
        datasets=datasets(source) if job.known.ours else (),
        form=config.to,
        exported=record,
    )
    files.write_text(staging / "README.md", card)
    whole = job.known.ours and not (source.data or source.text or source.max_eval_samples)
    hub_set = tasks.TASKS[source.task].hub if whole else None
    if config.to == "dense" and hub_set:
        for name, text in eval_results(found, *hub_set).items():
            files.write_text(staging / ".eval_results" / name, text)


def _report(job: Export, record: ExportRecord) -> Report:
    """The report of the run with the figures of the export; metrics only where they hold for what was written."""
    found = job.history.report() if job.history else Report()
    total, kept = job.original.before_slicing, round(record.check.nonzero_weights.after or 0)
    known = replace(
        found,
        model=found.model or job.original.source,
        sparsity=Sparsity(
            requested=found.sparsity.requested,
            achieved=1 - kept / total.prunable,
            whole_model=(total.prunable - kept) / total.total,
            prunable_weights=total.prunable,
            kept_weights=kept,
        ),
        size=Size(dense_bytes=record.size.dense_bytes, weights_bytes=record.size.weights_bytes),
        metrics=_metrics(job, record, found.metrics),
        notes=(*found.notes, _treatment(job), *record.notes),
    )
    return portable(known, job.config)


def _metrics(job: Export, record: ExportRecord, of_run: Metrics) -> Metrics:
    """Those that hold for what was written: measured again, those of the run for the same answers, or none."""
    again = record.metrics
    if again is None:
        return Metrics() if job.lossy else of_run
    # Or the metrics of the dense model are about other examples, or compare with something else.
    same = (of_run.n_examples, of_run.reference) == (again.n_examples, again.reference)
    dense, guessed = (of_run.dense, of_run.at_chance.dense) if same else ({}, ())
    return Metrics(
        reference=again.reference,
        primary=again.primary,
        split=again.split,
        n_examples=again.n_examples,
        confidence_95=again.confidence_95,
        dense=dense,
        pruned=again.after,
        chance=again.chance,
        at_chance=AtChance(dense=guessed, pruned=again.at_chance),
        retention=scoring.retention(again.after, dense, guessed),
    )


def _treatment(job: Export) -> str:
    """The options that made this folder, in words."""
    config = job.config
    parts = [f"cap export --to {config.to}", f"--dtype {job.dtype}"]
    parts += [f"--embeddings {config.embeddings}"] * (config.embeddings != "keep") + ["--int8"] * config.int8
    parts += [f"--vocab {config.vocab}"] if config.vocab else []
    parts += [f"--ratio {config.ratio:g}"] * bool(config.ratio) + [f"--heal {config.heal}"] * bool(config.heal)
    return f"Exported with {' '.join(parts)}."
