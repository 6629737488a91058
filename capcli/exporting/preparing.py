"""What an export is made from: the model, the data of its task, the texts that it is compared on."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from capcli import stages
from capcli.config.export import ExportConfig
from capcli.config.hardware import Hardware
from capcli.config.layers import build
from capcli.config.names import GENERIC_TASKS
from capcli.config.paths import shortened
from capcli.config.task import TaskConfig
from capcli.data import dataset, splits, texts
from capcli.data.kinds import KINDS
from capcli.data.splits import TaskData
from capcli.data.tasks import TASKS
from capcli.errors import CapError, ConfigError, ModelError
from capcli.events import Event
from capcli.exporting import agreement
from capcli.exporting.job import Export, Texts
from capcli.models import artifact, devices, legacy, loading, masks, tokenizers, vocabulary
from capcli.models.model import Model
from capcli.records.codec import read
from capcli.records.exported import ExportRecord, RunFacts, Vocabulary, facts_of
from capcli.records.pruned import Report
from capcli.sources import checkpoint, hub

RECORD = artifact.EXPORT_FILE
DAMAGED = "restore it, or move it away: the export then says nothing of its run"


def prepared(config: ExportConfig, *, train: bool = False) -> Generator[Event, None, Export]:
    """What `config` exports. train: with the training texts of the task, where they are here; `--vocab` needs them."""
    yield Event(phase="export", note=f"loading {config.model}")
    device = "cpu" if config.to == "onnx" else config.device  # onnxruntime computes there
    on = devices.compute(Hardware(device=device, precision="fp32", threads=config.threads))
    loaded = _load(config)
    original = replace(loaded, exits=None)
    known = _known(config, original, train)
    if not known.ours:
        yield Event(phase="export", note=known.missing)
    found = Export(
        config=config,
        on=on,
        original=original,
        model=original,
        known=known,
        texts=agreement.texts(splits.subset(known.compared, config.samples, seed=0)),
        texts_of=config.texts or f"{known.compared.name} of {known.data.name}",
        words=None,
        own_dtype=artifact.dtype(config.model),
        history=_history(hub.place(config.model)),
        had_exits=loaded.exits is not None,
    )
    if not config.vocab:
        return found
    found = with_vocabulary(found)
    yield Event(phase="export", overall=0.2, note=_said(found.words))
    return found


def with_vocabulary(job: Export) -> Export:
    """The same with the tokens that its `--vocab` keeps; compared on texts that these tokens were chosen for."""
    model, words = _reduced(job.config, job.original, job.known.data)
    found = replace(job, model=model, words=words)
    train = job.known.data.train
    if job.config.vocab != "task" or train is None or job.known.given:
        return found
    some = agreement.texts(splits.subset(train, job.config.samples, seed=0))
    return replace(found, texts=some, texts_of=f"{train.name} of {job.known.data.name}")


def _load(config: ExportConfig) -> Model:
    source = config.model
    if tokenizers.is_artifact(source):
        folder = hub.place(source)
        if (folder / "work").is_dir() and not any((folder / name).is_file() for name in (stages.REPORT, RECORD)):
            raise checkpoint.unfinished(source)
        if config.threshold:
            raise ConfigError(
                f"--threshold is for checkpoints of movement pruning; {source} already says which weights are zero"
            )
        base = config.base if masks.read(source) or config.to != "mask" else ""
        return loading.load_pruned(source, base)
    if config.to != "mask":
        loading.check_no_base(source, config.base)
    folder = Path(hub.folder(source, legacy=True))
    hub.weights(str(folder), source)
    model = replace(legacy.load(folder, config.score_threshold), source=source)
    if (
        config.to not in ("onnx", "exits")
        and legacy.layout(folder) is None
        and (config.to == "dense" or not legacy.zeros(model))
    ):
        raise ModelError(f"{source} is already a dense model", "cap export takes the output of cap prune")
    return model


def _history(folder: Path) -> RunFacts | None:
    """What is known of the run that made the model: from its report, or what an earlier export kept of it."""
    if (folder / stages.REPORT).is_file():
        return facts_of(read(Report, folder / stages.REPORT, DAMAGED))
    return read(ExportRecord, folder / RECORD, DAMAGED).run if (folder / RECORD).is_file() else None


def _known(config: ExportConfig, model: Model, train: bool) -> Texts:
    """The data of an export. Training texts that are wanted and not needed may be missing."""
    if config.needs_train or not (train or config.reads_train):
        return _texts(config, model, train=config.needs_train)
    try:
        return _texts(config, model, train=True)
    except CapError:
        return _texts(config, model, train=False)


def _texts(config: ExportConfig, model: Model, *, train: bool) -> Texts:
    """The data of the model's own task, or texts that the user named; where neither are here, built-in texts."""
    stored = _source(config)
    chosen = {"data": config.data, "label_map": config.label_map, "max_eval_samples": config.max_eval_samples}
    place = config.data or stored.get("data") or stored.get("text", "")
    try:
        if not stored:
            hint = "name it with --task, and the data with --data" if config.to == "exits" else ""
            raise ConfigError(f"the task of {config.model} is not known", hint)
        options = {**stored, **{name: value for name, value in chosen.items() if value}}
        source: TaskConfig = build(TaskConfig, {**options, "text": "" if config.data else stored.get("text", "")})
        if source.text and config.texts:
            return _of_texts(config, model, source)
        data = _own(config, model, source, train=train)
        given = texts.read(config.texts, source, paired=data.paired) if config.texts else None
        return Texts(source=source, data=data, given=given)
    except CapError as error:
        if config.data or config.needs_train or (place and Path(place).exists()):
            raise
        if config.texts:
            return _of_texts(config, model, _generic(config, model, stored))
        other = TaskConfig(task=KINDS[model.kind].texts)
        reason = error.message.replace(place, shortened(place)) if place else error.message
        missing = f"the task's own data are not available ({reason}): logits are compared on texts of {other.task}"
        return Texts(source=other, data=dataset.load(other, train=False), missing=missing)


def _source(config: ExportConfig) -> dict[str, Any]:
    """The task options that the model was made with, or the task that the user names where it does not say so."""
    stored = artifact.stored_source(config.model)
    if stored and config.task:
        raise ConfigError(f"{config.model} already has a task: {stored.get('task')}", "leave --task out")
    return stored or ({"task": config.task} if config.task else {})


def _own(config: ExportConfig, model: Model, source: TaskConfig, *, train: bool) -> TaskData:
    """The data that the model was pruned on."""
    known = artifact.known(config.model)
    if source.text:
        return texts.open_task(
            source, model.labels, "model", holdout=known.holdout, seed=known.seed, no_answer=known.no_answer
        )
    data = dataset.load(
        source,
        train=train,
        holdout=known.holdout,
        seed=known.seed,
        known=() if config.task else model.labels,
        perhaps=model.labels,
        no_answer=known.no_answer,
    )
    return dataset.comparable(data, "model")


def _of_texts(config: ExportConfig, model: Model, source: TaskConfig) -> Texts:
    """The texts that the user named in place of all other data. Raises `ConfigError` where these are to train on."""
    if config.vocab == "task":
        raise ConfigError(
            "--vocab task needs the training texts of the task, and --texts takes their place", "leave one of them out"
        )
    source = replace(source, text=config.texts, data="")
    data = texts.open_task(source, model.labels, "model", no_answer=artifact.known(config.model).no_answer)
    return Texts(source=source, data=data)


def _generic(config: ExportConfig, model: Model, stored: Mapping[str, Any]) -> TaskConfig:
    """How texts are read for a model whose data are not here, by what is known of its task."""
    fitting = (name for name in GENERIC_TASKS if TASKS[name].kind == model.kind)
    task = next(fitting, "regression")  # of which ranking is made by the columns
    source: TaskConfig = build(TaskConfig, {"task": task, **stored, "data": "", "text": config.texts})
    return source


def _reduced(config: ExportConfig, model: Model, data: TaskData) -> tuple[Model, Vocabulary]:
    """The model with the tokens that `--vocab` keeps, and what that does to held-out text."""
    held_out = next(iter(data.evals.values()))
    if config.vocab == "task":
        assert data.train is not None, "a vocabulary is made with the training split"
        reduced = vocabulary.reduced(model, vocabulary.needed(model.tokenizer, [data.train]))
        vocabulary.check_same(model.tokenizer, reduced.tokenizer, [data.train])
    else:
        reduced = vocabulary.reduced(model, vocabulary.from_file(model.tokenizer, Path(config.vocab)))
        known = [split for split in (data.train, *data.evals.values()) if split is not None]
        vocabulary.check_known(model.tokenizer, reduced.tokenizer, known, config.vocab)
    found = vocabulary.coverage(model.tokenizer, reduced.tokenizer, held_out)
    return reduced, replace(found, kept=len(reduced.tokenizer), of=len(model.tokenizer), split=held_out.name)


def _said(words: Vocabulary | None) -> str:
    assert words is not None, "a vocabulary that was reduced"
    rates = words.unknown_rate
    return (
        f"vocabulary: {words.kept:,} of {words.of:,} tokens; unknown on {words.split}: "
        f"{rates.after:.3%} of the tokens, {rates.before:.3%} before"
    )
