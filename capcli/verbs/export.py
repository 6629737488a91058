"""`cap export`: a pruned model in the form that its next home needs, proven equal to what was pruned.

Every format goes the same way: load; rewrite the vocabulary, if asked; cut what computes nothing, if the format can;
write into a staging folder; open what was written and compare; publish in one rename with `export.json`.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from capcli import (
    compare,
    files,
    hub,
    legacy,
    models,
    onnx_model,
    refusals,
    report,
    run,
    sparse,
    storage,
    tasks,
    vocabulary,
)
from capcli.config import ARTEFACT_FORMATS, ExportConfig, Hardware, TaskConfig, build, command_line, portable, shortened
from capcli.errors import CapError, CheckFailed, ConfigError, FileError, ModelError
from capcli.run import Event
from capcli.text import mapping, part
from capcli.verbs import evaluate

SCHEMA_VERSION = 1
RECORD = "export.json"
CUT_FORMATS = ("sliced", "onnx")  # that compute without what is zero
FALLBACK = {"tokens": "wnut17"}  # built-in texts for a model whose own data are not here; `mr` for all other kinds
ALONE = (
    "8-bit answers depend on the texts that share a batch: agreement and accuracy were measured one text at a time, "
    "and in other batches single answers may differ"
)
LATENCY_BATCHES, LATENCY_LENGTH, LATENCY_SECONDS = (1, 32), 128, 8.0
KEPT_SETTINGS = ("source", "holdout", "seed", "method", "sparsity", "no_answer")
# What an export remembers of the report of its run.
KEPT_OF_RUN = (
    *("model", "base_model", "task", "method", "losses", "seed", "command", "versions", "device", "labels"),
    *("teacher", "sparsity", "metrics", "notes"),
)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The data of an export: those of the model's own task, or built-in texts that stand in for them.

    ours: they are the model's own, so that its accuracy can be measured; else `missing` says why not.
    """

    source: TaskConfig
    data: tasks.TaskData
    missing: str = ""

    @property
    def ours(self) -> bool:
        return not self.missing

    @property
    def held_out(self) -> tasks.Split:
        """The first evaluation split."""
        return next(iter(self.data.evals.values()))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is exported: the model as it was loaded, and as it is to be written (other vocabulary, smaller layers).

    texts, texts_of: what the logits are compared on, and the split that they are from. words: the new vocabulary.
    history: the report of the run, as far as it is known.
    """

    config: ExportConfig
    on: models.Compute
    original: models.Model
    model: models.Model
    known: Texts
    texts: list[compare.Text]
    texts_of: str
    words: dict[str, Any] | None
    history: dict[str, Any]

    @property
    def length(self) -> int:
        """Longest input in tokens."""
        return models.longest_input(self.original, self.known.source.longest)

    @property
    def exact(self) -> bool:
        """Whether only rounding may tell the logits of the export from those of the model, on the same tokens."""
        return self.config.dtype == "fp32" and self.config.embeddings == "keep" and not self.config.int8

    @property
    def lossy(self) -> bool:
        """Whether the export answers otherwise than the model, so that its accuracy has to be measured again."""
        return bool(self.config.vocab) or not self.exact

    @property
    def batching(self) -> str:
        """How texts are put together wherever answers are compared or scored.

        Integer weights go with activations that are quantised by the range of all that is in a batch, so that the
        answer to a text depends on the others: each is asked alone. Of floats nothing but rounding depends on it.
        """
        return "one text at a time" if self.config.int8 else "several texts at a time"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What was written, opened again: how it computes, its tokenizer, non-zero weights of its matrices, and the bytes
    that its weights take on disk and in memory. `model` or `logits`, of tokenised examples, serve the measurement."""

    run: compare.Run
    tokenizer: Any
    nonzero: int
    file_bytes: int
    memory_bytes: int
    logits: Callable[[Any], Generator[Event, None, torch.Tensor]] | None = None
    model: models.Model | None = None


def export(config: ExportConfig) -> Generator[Event, None, dict[str, Any]]:
    """Write `config.model` as `config.to` into `config.out_folder`; yields events and returns `export.json`.

    Raises:
        ModelError, ConfigError, FileError: nothing that can be exported, or a folder that is not empty.
        CheckFailed: what was written is not what it should be. Nothing is left of an export that fails.
    """
    out = _free(config.out_folder)
    if config.to == "onnx":
        onnx_model.check_packages()
    job = yield from _job(config)
    _check_format(job.model, config.to)
    if config.to in CUT_FORMATS:
        job = replace(job, model=_cut(job.model))
    record = _record(job)
    with files.publish(out, manifest=RECORD, suffix=f"part-{os.getpid()}", record=record) as staging:
        opened = yield from FORMATS[config.to](job, staging)
        record |= portable((yield from _checked(job, opened)), config)
        _describe(job, record, staging)
    for note in record["notes"]:
        if note != job.known.missing:  # which was said before
            yield Event(phase="export", overall=1.0, note=note)
    yield Event(phase="export", done=1, total=1, overall=1.0, note=f"complete: {config.out_folder}")
    return record


def _free(folder: Path) -> Path:
    """An absolute path that is free for a new folder. Raises `FileError`."""
    out = folder.resolve()  # without the `..` of new/..
    if out == Path.cwd() or out == out.parent:
        raise FileError(f"an export cannot take the place of {out}", "choose a folder of its own with -o")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{folder} exists and is not empty", "choose another folder with -o")
    files.check_name(out)
    files.check_writable(out.parent)
    return out


# What is exported ----------------------------------------------------------------------------------------------------


def _job(config: ExportConfig) -> Generator[Event, None, Job]:
    yield Event(phase="export", note=f"loading {config.model}")
    device = "cpu" if config.to == "onnx" else config.device  # onnxruntime computes there
    on = models.compute(Hardware(device=device, precision="fp32", threads=config.threads))
    original = _load(config)
    known = _texts(config, original)
    if not known.ours:
        yield Event(phase="export", note=known.missing)
    model, words, split = original, None, known.held_out
    if config.vocab:
        model, words = _with_vocabulary(config, original, known.data)
        yield Event(phase="export", overall=0.2, note=_vocabulary_note(words))
    if config.vocab == "task" and known.data.train is not None:
        split = known.data.train
    return Job(
        config=config,
        on=on,
        original=original,
        model=model,
        known=known,
        texts=compare.texts(tasks.cut(split, config.samples, seed=0)),
        texts_of=f"{split.name} of {known.data.name}",
        words=words,
        history=_history(Path(config.model)),
    )


def _load(config: ExportConfig) -> models.Model:
    source = config.model
    if models.is_artifact(source):
        folder = Path(source)
        if (folder / "work").is_dir() and not any((folder / name).is_file() for name in (run.REPORT, RECORD)):
            raise refusals.unfinished(source)
        if config.threshold:
            raise ConfigError(f"--threshold is for checkpoints of movement pruning; {source} says what is zero")
        return models.load_artifact(folder)
    folder = Path(hub.folder(source, legacy=True))
    hub.weights(str(folder), source)
    model = replace(legacy.load(folder, config.score_threshold), source=source)
    if config.to != "onnx" and legacy.layout(folder) is None and (config.to == "dense" or not legacy.zeros(model)):
        raise ModelError(f"{source} is a dense model already", "cap export takes what cap prune wrote")
    return model


def _history(folder: Path) -> dict[str, Any]:
    """What is known of the run that made the model: from its report, or what an earlier export kept of it."""
    if (folder / run.REPORT).is_file():
        found = mapping(files.read_json(folder / run.REPORT))
    elif (folder / RECORD).is_file():
        found = part(files.read_json(folder / RECORD), "run")
    else:
        return {}
    return {name: found[name] for name in KEPT_OF_RUN if name in found}


def _texts(config: ExportConfig, model: models.Model) -> Texts:
    """The data of the model's own task; where they are not here, built-in texts."""
    stored = models.stored_source(config.model)
    chosen = {"data": config.data, "label_map": config.label_map, "max_eval_samples": config.max_eval_samples}
    place = config.data or stored.get("data", "")
    try:
        if not stored:
            raise ConfigError(f"the task of {config.model} is not known")
        source: TaskConfig = build(TaskConfig, {**stored, **{name: value for name, value in chosen.items() if value}})
        known = models.known(config.model)
        data = tasks.load(
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
        other = TaskConfig(task=FALLBACK.get(model.kind, "mr"))
        reason = error.message.replace(place, shortened(place)) if place else error.message
        missing = f"the task's own data are not here ({reason}): logits are compared on texts of {other.task}"
        return Texts(source=other, data=tasks.load(other, train=False), missing=missing)


def _with_vocabulary(
    config: ExportConfig, model: models.Model, data: tasks.TaskData
) -> tuple[models.Model, dict[str, Any]]:
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
    return reduced, {"kept": len(reduced.tokenizer), "of": len(model.tokenizer), "split": held_out.name, **found}


def _vocabulary_note(found: dict[str, Any]) -> str:
    return (
        f"vocabulary: {found['kept']:,} of {found['of']:,} tokens; unknown on {found['split']}: "
        f"{found['unknown_rate']['after']:.3%} of the tokens, {found['unknown_rate']['before']:.3%} before"
    )


def _check_format(model: models.Model, to: str) -> None:
    """Raise `ModelError` for a format that cannot hold this model."""
    if to == "dense":
        models.check_stock(model)
    if to == "sliced" and model.family is None:
        raise ModelError(
            f"{model.source} is a {model.net.config.model_type} model, whose heads and neurons capcli does not know",
            "use --to sparse for a smaller file, or --to onnx",
        )


def _cut(model: models.Model) -> models.Model:
    """The model without the heads, dimensions and neurons that compute nothing, where they are known."""
    return model if model.family is None or model.is_sliced else models.sliced(model)


# The formats ---------------------------------------------------------------------------------------------------------


def dense(job: Job, staging: Path) -> Generator[Event, None, Opened]:
    """A stock Hugging Face folder: zeros stored, loads everywhere without capcli; no smaller and no faster."""
    yield Event(phase="export", overall=0.3, note="writing a stock folder")
    dtype = storage.DTYPES[job.config.dtype]
    wanted = storage.stored(job.model, (), job.config.dtype)
    tensors = {name: tensor for name, tensor in wanted.tensors.items() if isinstance(tensor, torch.Tensor)}
    models.save_dense(job.model, staging, tensors, dtype)
    found = models.reload_dense(staging, job.model.kind)
    storage.check(wanted, found)
    weights = staging / "model.safetensors"
    opened = replace(job.model, net=found.float(), tokenizer=models.read_tokenizer(staging))
    return _opened(job, opened, weights, _bytes(found, dtype.itemsize))


def artefact(job: Job, staging: Path) -> Generator[Event, None, Opened]:
    """Our own file: kept values and positions. From smaller layers, when the job's model was cut."""
    config, pruned = job.config, list(job.model.prunable())
    yield Event(phase="export", overall=0.3, note="writing the weights")
    wanted = storage.stored(job.model, pruned, config.dtype, config.embeddings, config.svd_rank)
    models.save_artifact(job.model, staging, pruned, _settings(job), wanted.tensors, wanted.quantised)
    opened = models.load_artifact(staging)
    storage.check(wanted, opened.net)
    return _opened(job, opened, staging / models.WEIGHTS_FILE, _bytes(opened.net, 4))


def _settings(job: Job) -> dict[str, Any]:
    """What the artefact says of its run, its data where they are now, and how it was exported."""
    config, stored = job.config, models.stored_settings(job.config.model)
    kept: dict[str, Any] = {name: stored[name] for name in KEPT_SETTINGS if name in stored}
    kept["source"] = models.stored_source(config.model)
    if job.known.ours:
        now = {"data": job.known.source.data, "label_map": job.known.source.label_map}
        kept["source"] = {**kept["source"], **now}
    treatment = {"format": config.to, "dtype": config.dtype, "embeddings": config.embeddings, "vocab": config.vocab}
    return {**kept, "export": treatment}


def _opened(job: Job, model: models.Model, weights: Path, memory_bytes: int) -> Opened:
    models.place(model, job.on)
    return Opened(
        run=compare.of(model, job.on.device),
        tokenizer=model.tokenizer,
        nonzero=model.nonzero(),
        file_bytes=weights.stat().st_size,
        memory_bytes=memory_bytes,
        model=model,
    )


def onnx(job: Job, staging: Path) -> Generator[Event, None, Opened]:
    """An ONNX graph with dynamic batch and length, by transformers' own exporter, for onnxruntime and others."""
    yield Event(phase="export", overall=0.3, note="converting to onnx")
    path = onnx_model.convert(job.model, staging, job.length)
    models.save_tokenizer(job.model.tokenizer, staging)
    models.save_config(job.model, staging)
    if job.config.int8:
        yield Event(phase="export", overall=0.5, note="quantising to int8")
        onnx_model.quantise(path, path)
        files.remove(staging / onnx_model.DATA_FILE)
    runner = onnx_model.Runner(path, threads=torch.get_num_threads())
    prunable = [linear.weight for linear in job.model.prunable().values()]
    others = [p for p in job.model.net.parameters() if not any(p is weight for weight in prunable)]
    size = sum(file.stat().st_size for file in staging.glob(f"{onnx_model.MODEL_FILE}*"))
    return Opened(
        run=runner.logits,
        tokenizer=models.read_tokenizer(staging),
        nonzero=onnx_model.nonzero(path, prunable, others),
        file_bytes=size,
        memory_bytes=size,
        logits=lambda examples: onnx_model.outputs(
            runner, examples, 1 if job.config.int8 else job.on.token_budget, _event("after")
        ),
    )


FORMATS: dict[str, Callable[[Job, Path], Generator[Event, None, Opened]]] = {
    "dense": dense,
    "sparse": artefact,
    "sliced": artefact,
    "onnx": onnx,
}


def _bytes(net: Any, itemsize: int) -> int:
    """Bytes of the weights in memory."""
    n: int = sum(parameter.numel() for parameter in net.parameters())
    return n * itemsize


# Checks --------------------------------------------------------------------------------------------------------------


def _checked(job: Job, opened: Opened) -> Generator[Event, None, dict[str, Any]]:
    """Compare what was opened with the original; returns what `export.json` says of it. Raises `CheckFailed`."""
    yield Event(phase="export", overall=0.6, note="comparing what was written with the original")
    models.place(job.original, job.on)
    found: dict[str, Any] = {
        "check": _compared(job, opened),
        "size": {
            "dense_bytes": 4 * job.original.before_slicing.total,
            "weights_bytes": opened.file_bytes,
            "memory_bytes": opened.memory_bytes,
        },
        "metrics": None,
        "speed": None,
        "batching": job.batching,
        "notes": [*[job.known.missing] * bool(job.known.missing), *[ALONE] * job.config.int8],
    }
    if job.lossy and job.known.ours:
        found["metrics"], notes = yield from _metrics(job, opened)
        found["notes"] += notes
    elif job.lossy:
        found["notes"].append("the weights were changed, and the accuracy was not measured again")
    if job.config.to in ("sliced", "onnx"):
        yield Event(phase="export", overall=0.875, note="measuring latency beside the model as it was")
        found["speed"] = _speed(job, opened)
    found["gives"] = _gives(found["size"], found["speed"])
    return found


def _compared(job: Job, opened: Opened) -> dict[str, Any]:
    """Logits on the same texts, and zeros. A text that the new vocabulary reads otherwise has no equal to compare."""
    texts, kind, before = job.texts, job.original.kind, job.original.nonzero()
    if job.config.vocab:
        texts = [text for text in texts if _reads_alike(job, opened.tokenizer, text)]
        if not texts:
            raise CheckFailed("the new vocabulary reads none of the texts as the old one did", "keep more tokens")
    if opened.nonzero > before:
        raise CheckFailed(f"{opened.nonzero:,} weights are not zero in what was written, {before:,} before")
    batch = 1 if job.config.int8 else compare.BATCH
    original = compare.of(job.original, job.on.device)
    ours = compare.logits(original, kind, job.original.tokenizer, texts, job.length, batch)
    theirs = compare.logits(opened.run, kind, opened.tokenizer, texts, job.length, batch)
    found = compare.difference(kind, ours, theirs)
    allowed = found.tolerance if job.exact else sys.float_info.max
    if not found.largest <= allowed:
        raise CheckFailed(
            f"the logits of the export differ by up to {found.largest:.3g} on {len(texts)} texts, "
            f"{allowed:.3g} is allowed; nothing was kept"
        )
    return {
        "texts": len(texts),
        "of": job.texts_of,
        "exact": job.exact,
        "largest_difference": found.largest,
        "largest_logit": found.scale,
        "tolerance": allowed if job.exact else None,
        "argmax_agreement": found.agreement,
        "nonzero_weights": {"before": before, "after": opened.nonzero},
    }


def _reads_alike(job: Job, tokenizer: Any, text: compare.Text) -> bool:
    first, second = (compare.pieces(one, text, job.length) for one in (job.original.tokenizer, tokenizer))
    return first == second


def _event(when: str) -> Callable[..., Event]:
    """A maker of events of the measurement `before` or `after`, each an eighth of the whole."""
    begin = 0.75 if when == "after" else 0.625

    def event(done: float = 0, total: float = 0) -> Event:
        share = begin + 0.125 * (done / total if total else 0)
        return Event(phase=f"accuracy {when}", done=done, total=total, overall=share)

    return event


def _metrics(job: Job, opened: Opened) -> Generator[Event, None, tuple[dict[str, Any], list[str]]]:
    """Metrics before and after, and how often both answer alike, on the same examples; and notes on the answers."""
    split, data, source = job.known.held_out, job.known.data, job.known.source
    found: dict[str, Any] = {"split": split.name, "primary": data.primary}
    measured: list[evaluate.Measured] = []
    for when, model in (("before", job.original), ("after", opened.model or job.model)):
        examples = evaluate.encoded(model, split, source)
        if when == "after" and opened.logits is not None:
            logits = yield from opened.logits(examples)
            one = evaluate.scored(model.kind, model.labels, examples, data.metrics, logits)
        else:
            one = yield from evaluate.measure(model, examples, data.metrics, job.on, _event(when))
        found |= {when: one.metrics, "n_examples": one.n_examples, "confidence_95": one.confidence_95}
        measured.append(one)
    before, after = measured
    found["agreement"] = evaluate.agreed(after, before).value
    same = [evaluate.same_answer("the export", split.name, after.constant)] if after.constant else []
    return found, [*after.doubts, *same]


def _speed(job: Job, opened: Opened) -> dict[str, Any]:
    """How many times faster the export is than the model as it was loaded, measured alternately; by batch size."""
    length = models.longest_input(job.original, LATENCY_LENGTH)
    runs = ((compare.of(job.original, job.on.device), job.original.tokenizer), (opened.run, opened.tokenizer))
    rows = {}
    for batch in LATENCY_BATCHES:
        pairs = _timed([partial(run, evaluate.full_inputs(tokenizer, batch, length)) for run, tokenizer in runs])
        rows[f"batch_{batch}"] = {
            "before_ms": 1000 * statistics.median(a for a, _ in pairs),
            "ms": 1000 * statistics.median(b for _, b in pairs),
            "times": statistics.median(a / b for a, b in pairs),
            "runs": len(pairs),
        }
    return {**rows, "length": length, "threads": torch.get_num_threads(), "hardware": job.on.name}


def _timed(calls: list[Callable[[], torch.Tensor]]) -> list[list[float]]:
    """Seconds of each call, by turns, after one round that is not counted; 3 to 30 rounds, as the time allows."""
    rounds: list[list[float]] = []
    began = time.perf_counter()
    for number in range(31):
        times = []
        for call in calls:
            start = time.perf_counter()
            call().cpu()  # waits for the device
            times.append(time.perf_counter() - start)
        rounds += [times] if number else []
        if len(rounds) >= 3 and time.perf_counter() - began > LATENCY_SECONDS:
            break
    return rounds


# Without writing -----------------------------------------------------------------------------------------------------


def plan(config: ExportConfig) -> Generator[Event, None, dict[str, Any]]:
    """What every format would take and give, with these options where they apply; nothing is written."""
    job = yield from _job(config)
    smaller, rows = _cut(job.model), []
    for name in FORMATS:
        yield Event(phase="plan", note=f"sizing {name}")
        rows.append(_planned(job, name, smaller if name in CUT_FORMATS else job.model))
    return {
        "schema_version": SCHEMA_VERSION,
        "model": shortened(config.model),
        "dense_bytes": 4 * job.original.before_slicing.total,
        "formats": rows,
        "notes": [job.known.missing] if job.known.missing else [],
    }


def _planned(job: Job, name: str, model: models.Model) -> dict[str, Any]:
    """One row of the plan: bytes of the weights on disk and in memory, and the share of the matrices that is left."""
    config = job.config
    try:
        _check_format(model, name)
    except CapError as error:
        return {"format": name, "refused": error.message}
    dtype = config.dtype if name in ARTEFACT_FORMATS or (name == "dense" and config.dtype != "int8") else "fp32"
    size = memory = _bytes(model.net, storage.DTYPES[dtype].itemsize)
    if name in ARTEFACT_FORMATS:
        pruned = list(model.prunable())
        wanted = storage.stored(model, pruned, dtype, config.embeddings, config.svd_rank)
        size = sparse.sizes(wanted.tensors, pruned, quantised=wanted.quantised).file_bytes
        memory = _bytes(model.net, 4)
    elif name == "onnx" and config.int8:
        kinds = (torch.nn.Linear, torch.nn.Embedding)
        size = memory = size - 3 * sum(m.weight.numel() for m in model.net.modules() if isinstance(m, kinds))
    left = sum(linear.weight.numel() for linear in model.prunable().values()) / job.original.before_slicing.prunable
    return {"format": name, "weights_bytes": size, "memory_bytes": memory, "matrices_left": left}


# The record ----------------------------------------------------------------------------------------------------------


def _record(job: Job) -> dict[str, Any]:
    config, cut = job.config, job.model.cut
    found = {
        "schema_version": SCHEMA_VERSION,
        "model": config.model,
        "format": config.to,
        "out": shortened(str(config.out_folder)),
        "command": command_line(sys.argv[1:]),
        "versions": run.versions(),
        **{name: getattr(config, name) for name in ("dtype", "embeddings", "int8", "vocab", "threshold")},
        "vocabulary": job.words,
        "layers": {name: vars(size) for name, size in cut.sizes.items()} if cut else None,
        "run": job.history,
    }
    return dict(portable(found, config))


def _gives(size: dict[str, Any], speed: dict[str, Any] | None) -> dict[str, Any]:
    """How many times smaller, lighter in memory and, where it was measured, faster; 1.0 is as dense."""
    dense = size["dense_bytes"]
    return {
        "smaller_file": dense / size["weights_bytes"],
        "less_memory": dense / size["memory_bytes"],
        "faster": {name: row["times"] for name, row in speed.items() if name.startswith("batch")} if speed else None,
    }


def _describe(job: Job, record: dict[str, Any], staging: Path) -> None:
    """Write the model card, and in a stock folder the results as the hub reads them."""
    found, config, source = _report(job, record), job.config, job.known.source
    base = found.get("base_model")
    card = report.render_card(
        found,
        base_model=base if isinstance(base, str) else None,
        pipeline_tag=models.PIPELINE_TAGS[job.original.kind],
        form=config.to,
        exported=record,
    )
    files.write_text(staging / "README.md", card)
    hub_set = (
        tasks.TASKS[source.task].hub if job.known.ours and not source.data and not source.max_eval_samples else None
    )
    if config.to == "dense" and hub_set:
        for name, text in report.eval_results(found, *hub_set).items():
            files.write_text(staging / ".eval_results" / name, text)


def _report(job: Job, record: dict[str, Any]) -> dict[str, Any]:
    """The report of the run with the figures of the export; metrics only where they hold for what was written."""
    found: dict[str, Any] = {"model": job.original.source, **job.history}
    total, kept = job.original.before_slicing, record["check"]["nonzero_weights"]["after"]
    found["sparsity"] = {
        **{name: value for name, value in part(found, "sparsity").items() if name == "requested"},
        "achieved": 1 - kept / total.prunable,
        "whole_model": (total.prunable - kept) / total.total,
        "prunable_weights": total.prunable,
        "kept_weights": kept,
    }
    found["size"] = {name: record["size"][name] for name in ("dense_bytes", "weights_bytes")}
    metrics = record["metrics"]
    if metrics:
        dense, same = part(found, "metrics", "dense"), part(found, "metrics").get("n_examples") == metrics["n_examples"]
        found["metrics"] = {
            **{name: metrics[name] for name in ("primary", "split", "n_examples", "confidence_95")},
            "dense": dense if same else {},
            "pruned": metrics["after"],
            "retention": evaluate.retention(metrics["after"], dense) if same else {},
        }
    elif job.lossy:
        found["metrics"] = {}
    notes = found.get("notes")
    found["notes"] = [*(notes if isinstance(notes, list) else []), _treatment(job), *record["notes"]]
    return dict(portable(found, job.config))


def _treatment(job: Job) -> str:
    """The options that made this folder, in words."""
    config = job.config
    parts = [f"cap export --to {config.to}", f"--dtype {config.dtype}"]
    parts += [f"--embeddings {config.embeddings}"] * (config.embeddings != "keep") + ["--int8"] * config.int8
    parts += [f"--vocab {config.vocab}"] if config.vocab else []
    return f"Exported with {' '.join(parts)}."
