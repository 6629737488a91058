"""What a run reads, as fingerprints: the texts and labels of each split, the files of model and teacher."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capcli import files
from capcli.config.options import split_list
from capcli.config.prune import PruneConfig
from capcli.data.kinds import KINDS
from capcli.data.labels import Answers
from capcli.data.splits import Split, TaskData
from capcli.errors import FileError, ModelError
from capcli.models import artifact, sentences, tokenizers
from capcli.models.model import WEIGHTS_FILE
from capcli.sources import hub
from capcli.sources.checkpoint import CONFIG, INDEX, TOKENIZER_FILES
from capcli.stages import REPORT
from capcli.stored import part, read_json


def fingerprints(config: PruneConfig, data: TaskData, check: Callable[[], None] = lambda: None) -> dict[str, str]:
    """sha256 of each input by name, such as `texts of train`, `labels of validation`, `config.json of the model`.

    Texts and labels count as they are read, not the files that they stand in. `check` is called between the parts; what
    it raises ends the work. Raises `ModelError`, `DataError` or `FileError` for what cannot be read.
    """
    found = {f"{path.name} of the model": _sha256(path, check) for path in _dense_files(config.model)}
    if KINDS[data.kind].vectors:
        folder = Path(hub.folder(config.model))
        found |= {f"{path.relative_to(folder)} of the model": _sha256(path, check) for path in sentences.paths(folder)}
    if config.teacher:
        found |= {f"{path.name} of the teacher": _sha256(path, check) for path in _files(config.teacher)}
    for number, folder in enumerate(mask_folders(config).values(), 1):
        found[f"masks of run {number}"] = _sha256(folder / WEIGHTS_FILE, check)
    if config.source.text:
        found["calibration texts"] = _sha256(Path(config.source.text), check)
    splits = [None if config.source.text else data.train, data.holdout, *data.evals.values()]
    for split in filter(None, splits):
        found[f"texts of {split.name}"] = _texts(split, check)
        if data.has_labels:
            found[f"labels of {split.name}"] = _labels(split, data.labels)
    return found


def mask_folders(config: PruneConfig) -> dict[str, Path]:
    """The folder of each run whose masks are to be taken. Raises `ModelError` for what is not the output of a run."""
    found = {}
    for run in split_list(config.mask_from):
        if (Path(run) / "work").is_dir() and not (Path(run) / REPORT).is_file():
            raise ModelError(f"the run in {run} is not finished", "run its command again first")
        if not tokenizers.is_artifact(run):
            raise ModelError(f"{run} is not the output of cap prune", "name folders of runs for --mask-from")
        found[run] = hub.place(run)
    return found


def check_masks(config: PruneConfig, ours: Mapping[str, str]) -> None:
    """Raise `ModelError` for a run of `--mask-from` that pruned another model than the one with these fingerprints, or
    does not say which."""
    names = [name for name in ours if name.endswith(tuple(f"{end} of the model" for end in (".safetensors", ".bin")))]
    for run, folder in mask_folders(config).items():
        report = folder / REPORT
        theirs = part(read_json(report), "fingerprints") if report.is_file() else {}
        if not theirs:
            raise ModelError(
                f"{run} does not say which model it pruned",
                "name folders of runs for --mask-from, not exports: the report.json of a run says which it was",
            )
        if any(theirs.get(name) != ours[name] for name in names):
            raise ModelError(f"{run} pruned another model than {config.model}", "its masks fit that model alone")


def _files(source: str) -> list[Path]:
    """The files that make up an artefact or a dense model."""
    return artifact.artifact_files(hub.place(source)) if tokenizers.is_artifact(source) else _dense_files(source)


def _dense_files(source: str) -> list[Path]:
    """Configuration, weights and tokenizer of a dense model, fetched into the cache if they are of the hub."""
    folder = Path(hub.folder(source))
    hub.weights(str(folder), source)
    names = sorted({CONFIG, INDEX, *hub.weight_files(folder), *TOKENIZER_FILES})
    return [folder / name for name in names if (folder / name).is_file()]


def _sha256(path: Path, check: Callable[[], None]) -> str:
    check()
    try:
        return files.sha256(path)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


def _texts(split: Split, check: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    for chunk in split.chunks():
        check()
        digest.update(json.dumps(chunk).encode())
    return digest.hexdigest()


def _labels(split: Split, names: Sequence[str]) -> str:
    """Of the labels of all examples, with the names that their codes stand for."""
    digest = hashlib.sha256(json.dumps([split.kind, list(names), split.no_answer]).encode())
    digest.update(json.dumps(list(_plain(split.labels))).encode())
    if split.groups is not None:
        digest.update(json.dumps(split.groups.tolist()).encode())
    return digest.hexdigest()


def _plain(labels: Iterable[Any]) -> Iterable[Any]:
    """Each label as JSON has it."""
    for label in labels:
        yield [label.texts, label.starts] if isinstance(label, Answers) else np.asarray(label).tolist()
