"""The artefact of a run, measured as re-opened from disk, and the report, written last."""

from __future__ import annotations

import dataclasses
import socket
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from capcli import files, machine, parallel, run, stages
from capcli.artifact import reader
from capcli.artifact.writer import Sizes
from capcli.config import patterns
from capcli.config.options import flatten
from capcli.config.paths import command_line, portable
from capcli.config.prune import PruneConfig
from capcli.data.kinds import KINDS
from capcli.data.splits import TaskData
from capcli.errors import RunFailed
from capcli.events import Event, told
from capcli.measuring import breakdown, chance, latency, scoring, size
from capcli.measuring.scoring import Measured
from capcli.models import artifact, loading, predictor, storage
from capcli.models.model import WEIGHTS_FILE, Model, place
from capcli.predicting.usage import datasets, usage
from capcli.pruning import masked
from capcli.pruning.costs import left, median_length
from capcli.pruning.objective import term_weights
from capcli.pruning.pruner import Pruner
from capcli.pruning.search import Searched
from capcli.pruning.setup import Setup, answers, holdout_of, scores, stage_record
from capcli.pruning.student import only_masks, untrained
from capcli.pruning.teacher import other_steps, teacher_again, weak_teacher
from capcli.pruning.train import Progress, in_parts
from capcli.records.codec import from_json, to_json
from capcli.records.parts import ByLabel, FileFacts, MatrixSparsity, Noisy, Reached, Sparsity, intervals
from capcli.records.pruned import (
    AtChance,
    CurveExamples,
    ExportSize,
    HistoryRow,
    Latencies,
    Memory,
    Metrics,
    Planned,
    Process,
    Report,
    Size,
    SplitMetrics,
    Teacher,
    Timing,
)
from capcli.reporting import documents
from capcli.reporting.card import render_card
from capcli.reporting.text import counted, first_few, number
from capcli.runtime import choice
from capcli.stored import read_json

# What helps a pruned model that lost too much, with training and without.
TRAINED = "lower --sparsity, or use more --epochs or training data"
UNTRAINED = "training will be needed; raise --heal, use --method fisher with --epochs, or a lower --sparsity"


def write_artefact(
    setup: Setup,
    student: Model,
    pruner: Pruner,
    state: Progress,
    dense: Mapping[str, Measured],
    planned: Planned,
) -> Generator[Event, None, Report]:
    """Write the artefact, measure it as re-opened from disk, and write the report last: by rank 0. Common to all ranks,
    which measure together."""
    config, out = setup.config, setup.run.root
    yield setup.meter.of("evaluate pruned")(note=f"writing {setup.run.out}")
    kept = pruner.matrices.kept()
    assert pruner.sparsity == pruner.final, "the schedule ends at the final sparsity"
    masked.bake(pruner.matrices)
    names = list(student.prunable())
    settings = {**_data_settings(setup), "holdout": holdout_of(config), "seed": config.seed}
    settings |= {"method": config.method, "sparsity": config.sparsity, "no_answer": setup.data.no_answer}
    wide = storage.too_large(student, config.store)
    wanted = storage.stored(student, names, config.store, wide=wide)
    if parallel.first():
        run.clear_artefact(setup.run)
        sizes = artifact.save_artifact(student, out, names, settings, wanted.tensors, home=setup.run.home)
    parallel.wait()
    reopened = place(artifact.load_artifact(out), setup.on)
    storage.check(wanted, reopened.net)
    event = setup.meter.stoppable("evaluate pruned")
    pruned = scores(setup, reopened, (yield from answers(setup, reopened, event)))
    for note in _guessing(setup, dense, pruned):
        yield setup.meter.of("evaluate pruned")(done=1, total=1, note=note)
    counted = _sparsity(reopened, out, config.sparsity, pruner.errors)
    if (counted.kept_weights or 0) > kept:
        raise RunFailed(
            f"{setup.run.out} keeps {counted.kept_weights:,} weights, the masks {kept:,}: "
            "the file is not what was trained"
        )
    processes = parallel.collect(to_json(_process(setup))) if parallel.size() > 1 else None
    if not parallel.first():
        parallel.wait()
        return from_json(Report, read_json(out / stages.REPORT), str(out / stages.REPORT))
    speed = yield from _latency(setup, student, reopened)
    found = _record(setup, state, dense, pruned)
    too_wide = [f"{first_few(wide)}: stored in 32 bits, too large for {config.store}"] * bool(wide)
    measured = replace(
        found,
        sparsity=counted,
        reached=_reached(setup, pruner),
        size=_size(student, out, sizes),
        exports=_exports(reopened, names),
        planned=planned,
        latency=speed,
        processes=None if processes is None else tuple(from_json(Process, one, "a process") for one in processes),
        notes=(*found.notes, *too_wide),
        base_model=loading.hub_id(student.source),
        files={
            path.name: FileFacts(bytes=path.stat().st_size, sha256=files.sha256(path))
            for path in artifact.artifact_files(out)
        },
    )
    record = portable(measured, config)
    card = render_card(
        record,
        usage=usage(student.kind, config.source),
        base_model=record.base_model,
        datasets=datasets(config.source),
    )
    setup.run.check()
    files.write_text(out / "README.md", card)
    files.write_text(out / "report.html", documents.render_html(record))
    files.write_json(out / stages.REPORT, to_json(record))
    parallel.wait()
    yield setup.meter.of("latency")(done=1, total=1, note=f"complete: {setup.run.out}")
    return record


def _data_settings(setup: Setup) -> dict[str, Any]:
    """What the artefact says of its data: the texts, and the model whose answers they were measured against, only where
    there were no labels to evaluate on."""
    source = dataclasses.asdict(setup.config.source)
    if not setup.config.source.unlabelled:
        source["text"] = ""
    return {"source": source} if setup.data.has_labels else {"source": source, "teacher": setup.teacher}


def _latency(setup: Setup, student: Model, pruned: Model) -> Generator[Event, None, Latencies]:
    """The latency of the dense model by PyTorch and of the pruned one by what is faster here, measured in turn on the
    first evaluation split."""
    yield setup.meter.of("latency")(note="measuring latency, dense and pruned in turn")
    setup.run.check()  # the teacher is read from it
    examples = next(iter(setup.evals.values()))
    dense = predictor.of_network(teacher_again(setup, student), setup.on.exact)
    models = {"dense": dense, "pruned": choice.choose(pruned, setup.on.exact, "auto").predictor}
    systems = {name: latency.of(one, examples) for name, one in models.items()}
    found = yield from told(latency.measured(systems, setup.config.seed), setup.meter.stoppable("latency"))
    return Latencies(dense=found["dense"], pruned=found["pruned"])


def _sparsity(model: Model, out: Path, requested: float, errors: Mapping[str, float]) -> Sparsity:
    """Zeros, counted in the re-opened file; with the `errors` of the outputs of the matrices, by name."""
    prunable = model.prunable()
    entries = sorted(
        (entry for entry in reader.inspect(out / WEIGHTS_FILE) if entry.name in prunable),
        key=lambda entry: list(prunable).index(entry.name),
    )
    n, kept = sum(w.weight.numel() for w in prunable.values()), sum(entry.kept or 0 for entry in entries)
    total = sum(p.numel() for p in model.net.parameters())
    return Sparsity(
        requested=requested,
        achieved=1 - kept / n,
        prunable_weights=n,
        kept_weights=kept,
        encoder=(n - kept) / model.encoder_parameters(),
        whole_model=(n - kept) / total,
        least_kept=min((entry.kept or 0) / entry.elements for entry in entries),
        per_matrix=tuple(
            MatrixSparsity(
                name=e.name,
                shape=tuple(e.shape),
                kept=e.kept,
                sparsity=1 - (e.kept or 0) / e.elements,
                output_error=errors.get(e.name),
            )
            for e in entries
        ),
    )


def _reached(setup: Setup, pruner: Pruner) -> Reached | None:
    """What is left, where whole units were removed."""
    if not pruner.structure.units:
        return None
    length = median_length(setup.train)
    found = left(pruner.structure.units, pruner.alive, length)
    speedup = pruner.structure.speedup(pruner.alive) if isinstance(pruner.structure, Searched) else None
    return Reached(
        target=setup.config.target or None, macs=found.macs, params=found.params, length=length, speedup=speedup
    )


def _size(student: Model, out: Path, sizes: Sizes) -> Size:
    return Size(
        dense_bytes=sum(tensor.nbytes for tensor in student.net.state_dict().values()),
        given_bytes=student.stored_bytes,
        artifact_bytes=sum(path.stat().st_size for path in artifact.artifact_files(out)),
        weights_bytes=sizes.file_bytes,
        bound_bytes=round(sizes.bound_bytes),
        codings=size.codings(out / WEIGHTS_FILE),
        parts=size.parts(student, out / WEIGHTS_FILE),
    )


def _exports(model: Model, pruned: Sequence[str]) -> tuple[ExportSize, ...]:
    """What a dense file for other tools would take, and our own with 8-bit values."""
    wide = storage.too_large(model, "fp16")
    sizes = {
        "--to dense": 4 * sum(tensor.numel() for tensor in model.net.state_dict().values()),
        "--to sparse --dtype int8 --embeddings int8": storage.file_bytes(model, pruned, "int8", "int8", wide=wide),
    }
    return tuple(ExportSize(options=options, weights_bytes=n) for options, n in sizes.items())


def _record(setup: Setup, state: Progress, dense: Mapping[str, Measured], pruned: Mapping[str, Measured]) -> Report:
    """The report but for sparsity, size and files, which are counted on the artefact."""
    config, first = setup.config, next(iter(pruned))
    teacher = stage_record(setup, "teacher")
    history = [*teacher.get("history", []), *state.history]
    return Report(
        status="complete",
        model=config.model,
        task=config.source.task,
        method=config.method,
        structure=patterns.in_words(config),
        losses=tuple(config.loss_names),
        loss_weights=_weights(config, state.history),
        seed=config.seed,
        command=command_line(sys.argv[1:]),
        config=flatten(config),
        fingerprints=setup.bound.fingerprints,
        versions=setup.bound.versions,
        device=setup.bound.device,
        labels=tuple(setup.data.labels),
        metrics=_metrics(setup.data, dense, pruned),
        by_label=_by_label(setup, dense[first], pruned[first]),
        teacher=Teacher(source=setup.teacher or "fine-tuned in this run", metrics=_of_teacher(setup, dense[first])),
        timing=_timing(setup, teacher.get("seconds", 0.0), state.seconds),
        memory=Memory(
            peak_host_bytes=machine.peak_bytes(),
            peak_device_bytes=_device_bytes(setup),
            micro_batch=state.split or None,
            evaluation_tokens=setup.on.room.tokens or None,
        ),
        history=tuple(from_json(HistoryRow, row, "the history of the run") for row in history),
        curve=CurveExamples(n_examples=len(setup.curve.split or ()), held_out=setup.data.holdout is not None),
        notes=(
            *setup.notes,
            *(other_steps(setup) if teacher else []),
            *untrained(setup),
            *only_masks(setup),
            *_in_parts(setup, state),
            *(_fall(setup, dense[first], pruned[first]) if not config.epochs else []),
            *_unfinished(setup, dense[first], pruned[first]),
            *_guessing(setup, dense, pruned),
        ),
    )


def _process(setup: Setup) -> Process:
    """This process, for the report of those that made the run together."""
    return Process(
        host=socket.gethostname(),
        device=setup.on.name,
        peak_host_bytes=machine.peak_bytes(),
        peak_device_bytes=_device_bytes(setup),
    )


def _device_bytes(setup: Setup) -> int:
    return torch.cuda.max_memory_allocated(setup.on.device) if setup.on.device.type == "cuda" else 0


def _in_parts(setup: Setup, state: Progress) -> list[str]:
    """Notes on what did not fit into memory."""
    return [in_parts(state.split)] * bool(state.split) + setup.on.room.notes


def _by_label(setup: Setup, dense: Measured, pruned: Measured) -> ByLabel | None:
    """What became of each label; nothing where there are none."""
    return breakdown.by_label(setup.data.labels, pruned, dense) if setup.data.has_labels else None


def _of_teacher(setup: Setup, dense: Measured) -> Mapping[str, float]:
    """How good the teacher is; nobody knows where it is compared with itself."""
    return dense.metrics if setup.data.has_labels else {}


def _fall(setup: Setup, dense: Measured, pruned: Measured) -> list[str]:
    """A note when the metric fell below what the noise of the examples explains: below the dense model's interval.
    Where guessing is as good, another note says so. Agreement is never that of a model with itself."""
    name = setup.data.primary
    ends = dense.confidence_95.get(name) if setup.data.has_labels else None
    if ends is None or not pruned.metrics[name] < ends[0] or name in pruned.at_chance:
        return []
    return [
        f"{name} fell from {number(dense.metrics[name])} to {number(pruned.metrics[name])}, by more than the noise of "
        f"{counted(dense.n_examples or 0, 'example')}: {UNTRAINED}"
    ]


def _unfinished(setup: Setup, teacher: Measured, pruned: Measured) -> list[str]:
    """A note when the student is better than its teacher beyond the noise of the examples: the teacher was not trained
    to its end, so that the run learned less than it could. The teacher of vectors was not trained on what is scored."""
    name = setup.data.primary
    ends = pruned.confidence_95.get(name) if not KINDS[setup.data.kind].vectors else None
    if ends is None or not ends[0] > teacher.metrics[name]:
        return []
    more = "use one that was trained longer" if setup.teacher else "raise --teacher-epochs or --teacher-lr"
    return [
        f"the pruned model is better than its teacher ({name} {number(pruned.metrics[name])} against "
        f"{number(teacher.metrics[name])}): the teacher had not learned all that there is; {more}"
    ]


def _metrics(data: TaskData, dense: Mapping[str, Measured], pruned: Mapping[str, Measured]) -> Metrics:
    """Of every split, and of the first."""
    splits = {
        name: SplitMetrics(
            dense=dense[name].metrics,
            pruned=one.metrics,
            chance=one.chance,
            at_chance=AtChance(dense=dense[name].at_chance, pruned=one.at_chance),
            retention=scoring.retention(one.metrics, dense[name].metrics, dense[name].at_chance),
            n_examples=one.n_examples,
            confidence_95=intervals(one.confidence_95),
            differences=_differences(one, dense[name]) if data.has_labels else {},
        )
        for name, one in pruned.items()
    }
    first, scores = next(iter(splits.items()))
    return Metrics(reference=data.reference, primary=data.primary, split=first, splits=splits, **vars(scores))


def _differences(pruned: Measured, dense: Measured) -> dict[str, Noisy]:
    return {name: by.row() for name, by in scoring.paired(pruned, dense)[0].items()}


def _weights(config: PruneConfig, history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The weight of each term that was trained with."""
    terms = dict.fromkeys(name for row in history for name in row["losses"])
    return {name: weight for name, weight in term_weights(config, config.loss_names).items() if name in terms}


def _timing(setup: Setup, teacher_seconds: float, prune_seconds: float) -> Timing:
    banks = [stage_record(setup, name).get("seconds", 0.0) for name in _banks(setup)]
    return Timing(
        teacher_seconds=teacher_seconds,
        banks_seconds=sum(banks),
        prune_seconds=prune_seconds,
        total_seconds=time.monotonic() - setup.run.started - setup.run.flag.paused + sum(setup.run.earlier),
        examples_per_second=setup.config.epochs * len(setup.train) / max(prune_seconds, 1e-9),
    )


def _guessing(setup: Setup, dense: Mapping[str, Measured], pruned: Mapping[str, Measured]) -> list[str]:
    """For each split a note when the dense model, the pruned one or both only guess, and what helps."""
    primary, lost = setup.data.primary, TRAINED if setup.config.epochs else UNTRAINED
    notes = []
    for name, one in pruned.items():
        remedy = weak_teacher(setup) if primary in dense[name].at_chance else lost
        notes += chance.doubts({"the dense model": dense[name], "the pruned model": one}, name, primary, remedy)
    return notes


def _banks(setup: Setup) -> list[str]:
    """The banks of this run: those in its folder, and those of its losses that it shares with others."""
    names, encoded = setup.config.loss_names, bool(setup.config.epochs)
    needed = {"bank-pretrained": "prc" in names, "bank-finetuned": encoded and ("fic" in names or "kd" in names)}
    own = [path.name for path in setup.run.work.glob("bank-*")]
    return own + [name for name, wanted in needed.items() if wanted and setup.run.shares(name)]
