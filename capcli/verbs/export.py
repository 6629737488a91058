"""`cap export`: a pruned model in the form that its next home needs, proven equal to what was pruned.

Every format goes the same way: load; rewrite the vocabulary, if asked; cut what computes nothing, if the format can;
write into a staging folder; open what was written and compare; publish in one rename with `export.json`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from capcli import files, machine, stages
from capcli.artifact import writer
from capcli.config.export import ExportConfig
from capcli.config.layers import build
from capcli.config.names import ARTEFACT_FORMATS
from capcli.config.paths import command_line, portable, shortened
from capcli.config.prune import Hardware
from capcli.config.task import TaskConfig
from capcli.data import dataset, splits, tasks
from capcli.data.kinds import KINDS
from capcli.data.splits import TaskData
from capcli.errors import CapError, ConfigError, ModelError
from capcli.events import Event
from capcli.exporting import agreement, onnx_model
from capcli.exporting.checks import checked
from capcli.exporting.formats import FORMATS, check_format, settings, slice_model
from capcli.exporting.job import SLICED_FORMATS, Export, Texts, check_free, total_bytes
from capcli.measuring import scoring
from capcli.models import artifact, devices, legacy, storage, tokenizers, vocabulary
from capcli.models.model import Model
from capcli.records.codec import from_json, read, to_json
from capcli.records.exported import (
    ExportPlan,
    ExportRecord,
    FormatPlan,
    LayerSize,
    Measurements,
    RunFacts,
    Vocabulary,
    facts_of,
)
from capcli.records.parts import Sparsity
from capcli.records.pruned import Metrics, Report, Size
from capcli.reporting.card import eval_results, render_card
from capcli.sources import checkpoint, hub

RECORD = artifact.EXPORT_FILE
DAMAGED = "restore it, or move it away: the export then says nothing of its run"


def export(config: ExportConfig) -> Generator[Event, None, ExportRecord]:
    """Write `config.model` as `config.to` into `config.out_folder`; yields events and returns `export.json`.

    Raises:
        ModelError, ConfigError, FileError: nothing that can be exported, or a folder that is not empty.
        CheckFailed: what was written is not what it should be. Nothing is left of an export that fails.
    """
    out = check_free(config.out_folder)
    if config.to == "onnx":
        onnx_model.check_packages()
    job = yield from _job(config)
    check_format(job.model, config.to)
    if config.to in SLICED_FORMATS:
        job = replace(job, model=slice_model(job.model))
    written: dict[str, Any] = {}
    with files.publish(out, manifest=RECORD, suffix=f"part-{os.getpid()}", record=written) as staging:
        opened = yield from FORMATS[config.to](job, staging)
        record = portable(_record(job, (yield from checked(job, opened))), config)
        _describe(job, record, staging)
        written |= to_json(record)
    record = from_json(ExportRecord, written, str(out / RECORD))
    for note in record.notes:
        if note != job.known.missing:  # which was said before
            yield Event(phase="export", overall=1.0, note=note)
    yield Event(phase="export", done=1, total=1, overall=1.0, note=f"complete: {config.out_folder}")
    return record


# What is exported ----------------------------------------------------------------------------------------------------


def _job(config: ExportConfig) -> Generator[Event, None, Export]:
    yield Event(phase="export", note=f"loading {config.model}")
    device = "cpu" if config.to == "onnx" else config.device  # onnxruntime computes there
    on = devices.compute(Hardware(device=device, precision="fp32", threads=config.threads))
    original = _load(config)
    known = _texts(config, original)
    if not known.ours:
        yield Event(phase="export", note=known.missing)
    model, words, split = original, None, known.held_out
    if config.vocab:
        model, words, note = _with_vocabulary(config, original, known.data)
        yield Event(phase="export", overall=0.2, note=note)
    if config.vocab == "task" and known.data.train is not None:
        split = known.data.train
    return Export(
        config=config,
        on=on,
        original=original,
        model=model,
        known=known,
        texts=agreement.texts(splits.subset(split, config.samples, seed=0)),
        texts_of=f"{split.name} of {known.data.name}",
        words=words,
        own_dtype=artifact.dtype(config.model),
        history=_history(Path(config.model)),
    )


def _load(config: ExportConfig) -> Model:
    source = config.model
    if tokenizers.is_artifact(source):
        folder = Path(source)
        if (folder / "work").is_dir() and not any((folder / name).is_file() for name in (stages.REPORT, RECORD)):
            raise checkpoint.unfinished(source)
        if config.threshold:
            raise ConfigError(
                f"--threshold is for checkpoints of movement pruning; {source} already says which weights are zero"
            )
        return artifact.load_artifact(folder)
    folder = Path(hub.folder(source, legacy=True))
    hub.weights(str(folder), source)
    model = replace(legacy.load(folder, config.score_threshold), source=source)
    if config.to != "onnx" and legacy.layout(folder) is None and (config.to == "dense" or not legacy.zeros(model)):
        raise ModelError(f"{source} is already a dense model", "cap export takes the output of cap prune")
    return model


def _history(folder: Path) -> RunFacts | None:
    """What is known of the run that made the model: from its report, or what an earlier export kept of it."""
    if (folder / stages.REPORT).is_file():
        return facts_of(read(Report, folder / stages.REPORT, DAMAGED))
    return read(ExportRecord, folder / RECORD, DAMAGED).run if (folder / RECORD).is_file() else None


def _texts(config: ExportConfig, model: Model) -> Texts:
    """The data of the model's own task; where they are not here, built-in texts."""
    stored = artifact.stored_source(config.model)
    chosen = {"data": config.data, "label_map": config.label_map, "max_eval_samples": config.max_eval_samples}
    place = config.data or stored.get("data", "")
    try:
        if not stored:
            raise ConfigError(f"the task of {config.model} is not known")
        source: TaskConfig = build(TaskConfig, {**stored, **{name: value for name, value in chosen.items() if value}})
        known = artifact.known(config.model)
        data = dataset.load(
            source,
            train=bool(config.vocab),
            holdout=known.holdout,
            seed=known.seed,
            known=model.labels,
            perhaps=model.labels,
            no_answer=known.no_answer,
        )
        return Texts(source=source, data=data)
    except CapError as error:
        if config.data or config.vocab or (place and Path(place).exists()):
            raise
        other = TaskConfig(task=KINDS[model.kind].texts)
        reason = error.message.replace(place, shortened(place)) if place else error.message
        missing = f"the task's own data are not available ({reason}): logits are compared on texts of {other.task}"
        return Texts(source=other, data=dataset.load(other, train=False), missing=missing)


def _with_vocabulary(config: ExportConfig, model: Model, data: TaskData) -> tuple[Model, Vocabulary, str]:
    """The model with the tokens that `--vocab` keeps, and what that does to held-out text."""
    held_out = next(iter(data.evals.values()))
    if config.vocab == "task":
        assert data.train is not None, "a vocabulary is made with the training split"
        reduced = vocabulary.reduced(model, vocabulary.needed(model.tokenizer, [data.train]))
        vocabulary.check_same(model.tokenizer, reduced.tokenizer, [data.train])
    else:
        reduced = vocabulary.reduced(model, vocabulary.from_file(model.tokenizer, Path(config.vocab)))
        texts = [split for split in (data.train, *data.evals.values()) if split is not None]
        vocabulary.check_known(model.tokenizer, reduced.tokenizer, texts, config.vocab)
    found = vocabulary.coverage(model.tokenizer, reduced.tokenizer, held_out)
    kept, of = len(reduced.tokenizer), len(model.tokenizer)
    rates = found.unknown_rate
    note = (
        f"vocabulary: {kept:,} of {of:,} tokens; unknown on {held_out.name}: "
        f"{rates.after:.3%} of the tokens, {rates.before:.3%} before"
    )
    return reduced, replace(found, kept=kept, of=of, split=held_out.name), note


# Without writing -----------------------------------------------------------------------------------------------------


def plan(config: ExportConfig) -> Generator[Event, None, ExportPlan]:
    """What every format would take and give, with these options where they apply; nothing is written."""
    job = yield from _job(config)
    smaller, rows = slice_model(job.model), []
    for name in FORMATS:
        yield Event(phase="plan", note=f"sizing {name}")
        rows.append(_planned(job, name, smaller if name in SLICED_FORMATS else job.model))
    return ExportPlan(
        model=shortened(config.model),
        dense_bytes=4 * job.original.before_slicing.total,
        formats=tuple(rows),
        notes=(job.known.missing,) if job.known.missing else (),
    )


def _planned(job: Export, name: str, model: Model) -> FormatPlan:
    """One row of the plan: bytes of the weights on disk and in memory, and the share of the matrices that is left."""
    config = job.config
    try:
        check_format(model, name)
    except CapError as error:
        return FormatPlan(format=name, refused=error.message)
    dtype = job.dtype_for(name)
    size = memory = total_bytes(model.net, storage.DTYPES[dtype].itemsize)
    if name in ARTEFACT_FORMATS:
        pruned = list(model.prunable())
        wanted = storage.stored(model, pruned, dtype, config.embeddings, config.svd_rank)
        size = writer.sizes(wanted.tensors, pruned, quantised=wanted.quantised).file_bytes
        memory = total_bytes(model.net, 4)
    elif name == "onnx" and config.int8:
        kinds = (torch.nn.Linear, torch.nn.Embedding)
        size = memory = size - 3 * sum(m.weight.numel() for m in model.net.modules() if isinstance(m, kinds))
    left = sum(linear.weight.numel() for linear in model.prunable().values()) / job.original.before_slicing.prunable
    return FormatPlan(format=name, weights_bytes=size, memory_bytes=memory, matrices_left=left)


# The record ----------------------------------------------------------------------------------------------------------


def _record(job: Export, measured: Measurements) -> ExportRecord:
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
        **vars(measured),
    )


def _describe(job: Export, record: ExportRecord, staging: Path) -> None:
    """Write the model card, and in a stock folder the results as the hub reads them."""
    found, config, source = _report(job, record), job.config, job.known.source
    card = render_card(
        found,
        base_model=found.base_model,
        pipeline_tag=KINDS[job.original.kind].tag,
        form=config.to,
        exported=record,
    )
    files.write_text(staging / "README.md", card)
    hub_set = (
        tasks.TASKS[source.task].hub if job.known.ours and not source.data and not source.max_eval_samples else None
    )
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
    dense = of_run.dense if of_run.n_examples == again.n_examples else {}
    return Metrics(
        primary=again.primary,
        split=again.split,
        n_examples=again.n_examples,
        confidence_95=again.confidence_95,
        dense=dense,
        pruned=again.after,
        retention=scoring.retention(again.after, dense),
    )


def _treatment(job: Export) -> str:
    """The options that made this folder, in words."""
    config = job.config
    parts = [f"cap export --to {config.to}", f"--dtype {job.dtype}"]
    parts += [f"--embeddings {config.embeddings}"] * (config.embeddings != "keep") + ["--int8"] * config.int8
    parts += [f"--vocab {config.vocab}"] if config.vocab else []
    return f"Exported with {' '.join(parts)}."
