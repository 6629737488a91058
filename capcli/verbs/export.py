"""`cap export`: a pruned model in the form that its next home needs, proven equal to what was pruned.

Every format goes the same way: load; rewrite the vocabulary, if asked; cut what computes nothing, if the format can;
write into a staging folder; open what was written and compare; publish in one rename with `export.json`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from capcli import compare, files, hub, legacy, models, onnx_model, report, sparse, storage, tasks, vocabulary
from capcli.config import ARTEFACT_FORMATS, ExportConfig, Hardware, TaskConfig, build
from capcli.errors import CapError, CheckFailed, ConfigError, FileError, ModelError
from capcli.run import REPORT, Event
from capcli.verbs import evaluate

SCHEMA_VERSION = 1
RECORD = "export.json"
FALLBACK = {"tokens": "wnut17"}  # built-in texts for a model whose own data are not here; `mr` for all other kinds
LATENCY_BATCHES, LATENCY_LENGTH, LATENCY_SECONDS = (1, 32), 128, 8.0
KEPT_SETTINGS = ("source", "holdout", "seed", "method", "sparsity", "no_answer")

Steps = Generator[Event, None, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is exported: the model as it was loaded, and as it is to be written (other vocabulary, smaller layers).

    ours: whether the data are those of the model's own task, so that its accuracy can be measured.
    """

    config: ExportConfig
    on: models.Compute
    original: models.Model
    model: models.Model
    data: tasks.TaskData
    source: TaskConfig
    ours: bool
    texts: list[compare.Text]
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Longest input in tokens."""
        return models.longest_input(self.original, self.source.longest)

    @property
    def pruned(self) -> list[str]:
        """The matrices that may be stored sparse."""
        return list(self.model.prunable())


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What was written, opened again: how it computes, its tokenizer, non-zero weights of its matrices, and the bytes
    that its weights take on disk and in memory. `exact` when only rounding may tell it from the original."""

    run: compare.Run
    tokenizer: Any
    nonzero: int
    file_bytes: int
    memory_bytes: int
    exact: bool
    logits: Callable[[Any], Steps] | None = None
    model: models.Model | None = None


def export(config: ExportConfig) -> Generator[Event, None, dict[str, Any]]:
    """Write `config.model` as `config.to` into `config.out_folder`; yields events and returns `export.json`.

    Raises:
        ModelError, ConfigError, FileError: nothing that can be exported, or a folder that is not empty.
        CheckFailed: what was written is not what it should be. Nothing is left of an export that fails.
    """
    out = config.out_folder
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} exists and is not empty", "choose another folder with -o")
    job = yield from _job(config, config.to)
    files.check_writable(out.parent)
    record = _record(job)
    with files.publish(out, manifest=RECORD, record=record) as staging:
        opened = yield from FORMATS[config.to](job, staging)
        record |= yield from _checked(job, opened)
        _describe(job, record, staging)
    yield Event(phase="export", done=1, total=1, overall=1.0, note=f"complete: {out}")
    return record


# What is exported ----------------------------------------------------------------------------------------------------


def _job(config: ExportConfig, to: str) -> Generator[Event, None, Job]:
    yield Event(phase="export", note=f"loading {config.model}")
    hardware = Hardware(device=config.device, precision="fp32", threads=config.threads)
    on = models.compute(hardware)
    original = _load(config, to)
    stored = models.stored_source(config.model) if models.is_artifact(config.model) else {}
    source, data, missing = _data(config, original, stored)
    model = original
    extra: dict[str, Any] = {}
    if config.vocab:
        model, extra["vocabulary"] = _with_vocabulary(config, original, data)
        yield Event(phase="export", overall=0.2, note=_vocabulary_note(extra["vocabulary"]))
    model = _shaped(model, to)
    split = data.train if config.vocab == "task" and data.train else next(iter(data.evals.values()))
    texts = compare.texts(tasks.cut(split, config.samples, seed=0))
    job = Job(
        config=config,
        on=on,
        original=original,
        model=model,
        data=data,
        source=source,
        ours=not missing,
        texts=texts,
        notes=[missing] if missing else [],
        extra=extra,
    )
    for note in job.notes:
        yield Event(phase="export", note=note)
    return job


def _shaped(model: models.Model, to: str) -> models.Model:
    """The model without the heads, dimensions and neurons that compute nothing, for the formats that can do that."""
    if to == "dense" and model.is_sliced:
        raise ModelError(
            f"{model.source} is sliced, and no stock folder can hold layers of different sizes",
            "export what cap prune wrote, or use --to onnx",
        )
    cut = to == "sliced" or (to == "onnx" and model.family is not None)
    return models.sliced(model) if cut and not model.is_sliced else model


def _load(config: ExportConfig, to: str) -> models.Model:
    source = config.model
    if models.is_artifact(source):
        folder = Path(source)
        if (folder / "work").is_dir() and not (folder / REPORT).is_file() and not (folder / RECORD).is_file():
            raise ModelError(f"{source} is a run that is not finished", "run the same cap prune command again to go on")
        return models.load_artifact(folder)
    folder = Path(hub.folder(source, legacy=True))
    hub.weights(str(folder), source)
    model = replace(legacy.load(folder, config.score_threshold), source=source)
    if to != "onnx" and legacy.layout(folder) is None and (to == "dense" or not legacy.zeros(model)):
        raise ModelError(f"{source} is a dense model already", "cap export takes what cap prune wrote")
    return model


def _data(config: ExportConfig, model: models.Model, stored: dict[str, Any]) -> tuple[TaskConfig, tasks.TaskData, str]:
    """The data of the model's own task; where they cannot be read, built-in texts, and a note that says so."""
    try:
        if not stored:
            raise ConfigError(f"the task of {config.model} is not known")
        chosen = {"data": config.data, "max_eval_samples": config.max_eval_samples}
        given = {name: value for name, value in chosen.items() if value}
        source: TaskConfig = build(TaskConfig, {**stored, **given})
        known = models.known(config.model)
        data = tasks.load(
            source, train=bool(config.vocab), holdout=known.holdout, seed=known.seed, known=model.labels,
            perhaps=model.labels, no_answer=known.no_answer,
        )  # fmt: skip
        return source, data, ""
    except CapError as error:
        if config.data or config.vocab == "task":
            raise
        name = FALLBACK.get(model.kind, "mr")
        other = TaskConfig(task=name)
        note = f"the task's own data are not here ({error.message}): logits are compared on texts of {name}"
        return other, tasks.load(other, train=False), note


def _with_vocabulary(
    config: ExportConfig, model: models.Model, data: tasks.TaskData
) -> tuple[models.Model, dict[str, Any]]:
    """The model with the tokens that `--vocab` keeps, and what that does to held-out text."""
    held_out = next(iter(data.evals.values()))
    if config.vocab == "task":
        assert data.train is not None, "--vocab task loads the training split"
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


# The formats ---------------------------------------------------------------------------------------------------------


def dense(job: Job, staging: Path) -> Generator[Event, None, Opened]:
    """A stock Hugging Face folder: zeros stored, loads everywhere without capcli; no smaller and no faster."""
    yield Event(phase="export", overall=0.3, note="writing a stock folder")
    dtype = storage.DTYPES[job.config.dtype]
    wanted = storage.stored(job.model, (), job.config.dtype)
    net = job.model.net
    net.config.dtype = dtype
    models.save_dense(
        job.model, staging, {name: t for name, t in wanted.tensors.items() if isinstance(t, torch.Tensor)}
    )
    found = models.reload_dense(staging, job.model.kind)
    storage.check(wanted, found)
    weights = staging / "model.safetensors"
    opened = replace(job.model, net=found.float())
    return _opened(job, opened, weights.stat().st_size, _bytes(found, dtype.itemsize), exact=job.config.dtype == "fp32")


def artefact(job: Job, staging: Path) -> Generator[Event, None, Opened]:
    """Our own file: kept values and positions. From smaller layers, when the job's model was cut."""
    config = job.config
    yield Event(phase="export", overall=0.3, note="writing the weights")
    wanted = storage.stored(job.model, job.pruned, config.dtype, config.embeddings, config.svd_rank)
    models.save_artifact(job.model, staging, job.pruned, _settings(job), wanted.tensors, wanted.quantised)
    opened = models.load_artifact(staging)
    storage.check(wanted, opened.net)
    weights = staging / models.WEIGHTS_FILE
    exact = config.dtype == "fp32" and config.embeddings == "keep"
    return _opened(job, opened, weights.stat().st_size, _bytes(opened.net, 4), exact=exact)


def onnx(job: Job, staging: Path) -> Generator[Event, None, Opened]:
    """An ONNX graph with dynamic batch and length, by transformers' own exporter, for onnxruntime and others."""
    yield Event(phase="export", overall=0.3, note="converting to onnx")
    path = onnx_model.convert(job.model, staging, job.length)
    models.save_tokenizer(job.model.tokenizer, staging)
    models.save_config(job.model, staging)
    if job.config.int8:
        yield Event(phase="export", overall=0.5, note="quantising to int8")
        onnx_model.quantise(path, path)
    runner = onnx_model.Runner(path, threads=torch.get_num_threads())
    prunable = [linear.weight for linear in job.model.prunable().values()]
    others = [p for p in job.model.net.parameters() if not any(p is weight for weight in prunable)]
    size = sum(file.stat().st_size for file in staging.glob("model.onnx*"))
    return Opened(
        run=runner.logits,
        tokenizer=models.read_tokenizer(staging),
        nonzero=onnx_model.nonzero(path, prunable, others),
        file_bytes=size,
        memory_bytes=size,
        exact=not job.config.int8,
        logits=lambda examples: onnx_model.outputs(runner, examples, job.on.token_budget, _event("after")),
    )


FORMATS: dict[str, Callable[[Job, Path], Generator[Event, None, Opened]]] = {
    "dense": dense,
    "sparse": artefact,
    "sliced": artefact,
    "onnx": onnx,
}


def _opened(job: Job, model: models.Model, file_bytes: int, memory_bytes: int, *, exact: bool) -> Opened:
    models.place(model, job.on)
    return Opened(
        run=compare.of(model, job.on.device),
        tokenizer=model.tokenizer,
        nonzero=_nonzero(model),
        file_bytes=file_bytes,
        memory_bytes=memory_bytes,
        exact=exact,
        model=model,
    )


def _nonzero(model: models.Model) -> int:
    """Weights other than zero in the prunable matrices."""
    return sum(int(linear.weight.count_nonzero()) for linear in model.prunable().values())


def _bytes(net: Any, itemsize: int) -> int:
    """Bytes of the weights in memory."""
    n: int = sum(parameter.numel() for parameter in net.parameters())
    return n * itemsize


def _settings(job: Job) -> dict[str, Any]:
    """What the artefact says of its run, and how it was exported."""
    known = models.stored_settings(job.config.model)
    config = job.config
    treatment = {"format": config.to, "dtype": config.dtype, "embeddings": config.embeddings, "vocab": config.vocab}
    return {
        "source": {},
        **{name: known[name] for name in KEPT_SETTINGS if name in known},
        "export": treatment,
    }


# Checks --------------------------------------------------------------------------------------------------------------


def _checked(job: Job, opened: Opened) -> Generator[Event, None, dict[str, Any]]:
    """Compare what was opened with the original; returns what `export.json` says of it. Raises `CheckFailed`."""
    yield Event(phase="export", overall=0.6, note="comparing what was written with the original")
    models.place(job.original, job.on)
    check = _compared(job, opened)
    found: dict[str, Any] = {"check": check, "size": _size(job, opened), "metrics": None, "speed": None}
    if not opened.exact or job.config.vocab:
        found["metrics"] = yield from _metrics(job, opened)
    if job.config.to in ("sliced", "onnx"):
        yield Event(phase="export", overall=0.875, note="measuring latency beside the dense layers")
        found["speed"] = _speed(job, opened)
    found["gives"] = gives(found["size"], found["speed"])
    return found


def _compared(job: Job, opened: Opened) -> dict[str, Any]:
    """Logits on the same texts, and zeros. A text that the new vocabulary reads otherwise has no equal to compare."""
    texts, kind = job.texts, job.original.kind
    if job.config.vocab:
        texts = [text for text in texts if _reads_alike(job, opened.tokenizer, text)]
        if not texts:
            raise CheckFailed("the new vocabulary reads none of the texts as the old one did", "keep more tokens")
    ours = compare.logits(compare.of(job.original, job.on.device), kind, job.original.tokenizer, texts, job.length)
    theirs = compare.logits(opened.run, kind, opened.tokenizer, texts, job.length)
    found = compare.difference(kind, ours, theirs)
    before = _nonzero(job.original)
    if opened.nonzero > before:
        raise CheckFailed(f"{opened.nonzero:,} weights are not zero in what was written, {before:,} before")
    if not (found.within if opened.exact else found.largest < float("inf")):
        raise CheckFailed(
            f"the logits of the export differ by up to {found.largest:.3g} on {len(texts)} texts; "
            f"{compare.TOLERANCE * max(1.0, found.scale):.3g} is allowed. Nothing was kept"
        )
    return {
        "texts": len(texts),
        "of": f"{next(iter(job.data.evals))} of {job.data.name}"
        if not job.config.vocab
        else f"train of {job.data.name}",
        "exact": opened.exact,
        "largest_difference": found.largest,
        "largest_logit": found.scale,
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


def _metrics(job: Job, opened: Opened) -> Generator[Event, None, dict[str, Any] | None]:
    """Metrics before and after, on the same examples; None where the task's data are not here."""
    if not job.ours:
        job.notes.append("the accuracy was not measured: the task's data are not here")
        return None
    name, split = next(iter(job.data.evals.items()))
    found: dict[str, Any] = {"split": name, "primary": job.data.primary}
    for when, model in (("before", job.original), ("after", opened.model or job.model)):
        examples = evaluate.encoded(model, split, job.source)
        if when == "after" and opened.logits is not None:
            logits = yield from opened.logits(examples)
            one = evaluate.scored(model.kind, model.labels, examples, job.data.metrics, logits)
        else:
            one = yield from evaluate.measure(model, examples, job.data.metrics, job.on, _event(when))
        found[when] = one.metrics
        found["n_examples"] = one.n_examples
        found["confidence_95"] = one.confidence_95
    return found


def _speed(job: Job, opened: Opened) -> dict[str, Any]:
    """How many times faster the export is than the model as it was loaded, measured alternately; by batch size."""
    length = models.longest_input(job.original, LATENCY_LENGTH)
    dense = compare.of(job.original, job.on.device)
    runs = ((dense, job.original.tokenizer), (opened.run, opened.tokenizer))
    rows = {}
    for batch in LATENCY_BATCHES:
        full = [("a " * length, None)] * batch  # each word is a token at least
        pairs = _timed([partial(run, compare.encoded(tokenizer, full, length)) for run, tokenizer in runs])
        rows[f"batch_{batch}"] = {
            "dense_ms": 1000 * statistics.median(a for a, _ in pairs),
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
    job = yield from _job(config, "sparse")
    rows = []
    for name in FORMATS:
        yield Event(phase="plan", note=f"sizing {name}")
        rows.append(_planned(job, name))
    return {
        "schema_version": SCHEMA_VERSION,
        "model": config.model,
        "dense_bytes": 4 * job.original.before_slicing.total,
        "formats": rows,
        "notes": job.notes,
    }


def _planned(job: Job, name: str) -> dict[str, Any]:
    """One row of the plan: bytes of the weights on disk and in memory, and the share of the matrices that is left."""
    config = job.config
    try:
        model = _shaped(job.model, name)
    except CapError as error:
        return {"format": name, "refused": error.message}
    count = sum(parameter.numel() for parameter in model.net.parameters())
    matrices = sum(linear.weight.numel() for linear in model.prunable().values())
    of = job.original.before_slicing.prunable
    dtype = config.dtype if name in ARTEFACT_FORMATS or (name == "dense" and config.dtype != "int8") else "fp32"
    size = memory = count * storage.DTYPES[dtype].itemsize
    if name in ARTEFACT_FORMATS:
        pruned = list(model.prunable())
        wanted = storage.stored(model, pruned, dtype, config.embeddings, config.svd_rank)
        size, memory = sparse.sizes(wanted.tensors, pruned, quantised=wanted.quantised).file_bytes, 4 * count
    elif name == "onnx" and config.int8:
        size = memory = 4 * count - 3 * matrices
    return {"format": name, "weights_bytes": size, "memory_bytes": memory, "matrices_left": matrices / of}


# The record ----------------------------------------------------------------------------------------------------------


def _record(job: Job) -> dict[str, Any]:
    config = job.config
    return {
        "schema_version": SCHEMA_VERSION,
        "model": config.model,
        "format": config.to,
        "out": str(config.out_folder),
        "dtype": config.dtype,
        "embeddings": config.embeddings,
        "int8": config.int8,
        "vocabulary": job.extra.get("vocabulary"),
        "layers": {name: vars(size) for name, size in job.model.cut.sizes.items()} if job.model.cut else None,
        "notes": job.notes,
    }


def _size(job: Job, opened: Opened) -> dict[str, Any]:
    """Bytes of the weights: of the model as it was loaded, stored dense in 32 bits, and of the export."""
    return {
        "dense_bytes": 4 * job.original.before_slicing.total,
        "weights_bytes": opened.file_bytes,
        "memory_bytes": opened.memory_bytes,
    }


def gives(size: dict[str, Any], speed: dict[str, Any] | None) -> dict[str, Any]:
    """Which of smaller file, less memory, faster: how many times; 1.0 is as dense."""
    dense = size["dense_bytes"]
    return {
        "smaller_file": dense / size["weights_bytes"],
        "less_memory": dense / size["memory_bytes"],
        "faster": {name: row["times"] for name, row in speed.items() if name.startswith("batch")} if speed else None,
    }


def _describe(job: Job, record: dict[str, Any], staging: Path) -> None:
    """Write the model card, and in a stock folder the results as the hub reads them."""
    found = _report(job, record)
    base = models.hub_id(str(found["model"])) if "command" in found else None
    tag = models.PIPELINE_TAGS[job.original.kind]
    card = report.render_card(found, base_model=base, pipeline_tag=tag, form=job.config.to)
    files.write_text(staging / "README.md", card)
    hub_set = tasks.TASKS[job.source.task].hub if job.ours and not job.source.data else None
    if job.config.to == "dense" and hub_set and found.get("metrics"):
        for name, text in report.eval_results(found, *hub_set).items():
            files.write_text(staging / ".eval_results" / name, text)


def _report(job: Job, record: dict[str, Any]) -> dict[str, Any]:
    """The report of the run with the sizes of the export, and its metrics where they were measured again."""
    path = Path(job.config.model) / REPORT
    found: dict[str, Any] = files.read_json(path) if path.is_file() else {"model": job.original.source}
    size, metrics = record["size"], record["metrics"]
    found["size"] = {"dense_bytes": size["dense_bytes"], "weights_bytes": size["weights_bytes"]}
    if metrics:
        dense = found.get("metrics", {}).get("dense", {})
        found["metrics"] = {
            **{name: metrics[name] for name in ("primary", "split", "n_examples", "confidence_95")},
            "dense": dense,
            "pruned": metrics["after"],
            "retention": evaluate.retention(metrics["after"], dense),
        }
    found["notes"] = [*found.get("notes", []), _treatment(job), *record["notes"]]
    return found


def _treatment(job: Job) -> str:
    """The options that made this folder, in words."""
    config = job.config
    parts = [f"cap export --to {config.to}", f"--dtype {config.dtype}"]
    parts += [f"--embeddings {config.embeddings}"] * (config.embeddings != "keep") + ["--int8"] * config.int8
    parts += [f"--vocab {config.vocab}"] if config.vocab else []
    return f"Exported from what cap prune wrote, with {' '.join(parts)}."
