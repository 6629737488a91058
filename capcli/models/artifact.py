"""Pruned models on disk: `cap_config.json`, the weight file, and what they say about their task."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capcli import files
from capcli.artifact import reader, writer
from capcli.artifact.entry import Factors
from capcli.artifact.reader import Kept
from capcli.artifact.writer import Sizes
from capcli.config.names import HUB_PREFIX
from capcli.config.options import leaves
from capcli.config.paths import ELSEWHERE, elsewhere
from capcli.config.task import TaskConfig
from capcli.data.kinds import KINDS
from capcli.errors import CapError, FileError, ModelError, first_line
from capcli.models import altered, exits, families, lowrank, sentences
from capcli.models.altered import Altered
from capcli.models.heads import own_labels, renamed
from capcli.models.hf import auto_class, read_config
from capcli.models.model import CONFIG_FILE, WEIGHTS_FILE, Exits, Model, check_finite
from capcli.models.outline import outline
from capcli.models.tokenizers import check_fits, is_artifact, read_tokenizer, save_tokenizer
from capcli.reporting.text import first_few
from capcli.sources import checkpoint, hub
from capcli.sources.checkpoint import (
    NEVER_READ,
    TOKENIZER_FILES,
    check_description,
)
from capcli.stored import AGAIN, finite, part, read_json

EXPORT_FILE = "export.json"  # what `cap export` did, beside any format
PLACES = ("data", "text")  # options of a task that name a file or folder
CONFIG_VERSION, MASK_VERSION = 1, 2  # of cap_config.json, with weights and with masks; the weight file has its own


def stored_settings(source: str) -> dict[str, Any]:
    """What a pruned model says of its run in `cap_config.json`, or an export of one in other formats in `export.json`;
    empty for any other model. Raises `FileError`."""
    path = _settings_file(source)
    if not path.is_file():
        return {}
    table = read_json(path)
    if not isinstance(table, dict):
        raise FileError(f"{path} is not a JSON object")
    return table if is_artifact(source) else dict(part(table, "settings"))


def _settings_file(source: str) -> Path:
    return hub.place(source) / (CONFIG_FILE if is_artifact(source) else EXPORT_FILE)


def stored_source(source: str) -> dict[str, Any]:
    """The task options that a pruned model, or an export of one, was made with; empty for one that was converted, and
    for any other model.

    The places of data and texts, stored as seen from the folder, are returned as they are from here; of a model from
    the hub, by their last part, because they were on another machine. Raises `FileError`.
    """
    settings = stored_settings(source)
    if not settings and not is_artifact(source):
        return {}
    stored = settings.get("source")
    kinds = {item.name: kind for item, kind in leaves(TaskConfig)}
    if not isinstance(stored, dict) or not all(type(value) is kinds.get(name) for name, value in stored.items()):
        path = _settings_file(source)
        raise FileError(f"{path}: source is missing or malformed", "prune again, or copy the whole folder")
    return {**stored, **{name: _from_here(source, stored[name]) for name in PLACES if stored.get(name)}}


def _from_here(source: str, place: str) -> str:
    """A place that a model names as seen from its folder."""
    if place.startswith((HUB_PREFIX, ELSEWHERE)):
        return place
    return os.path.normpath(Path(source).resolve() / place) if hub.is_local(source) else elsewhere(place)


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a model knows of its task: class names, if `ours` the very ones of its data; whether it may answer nothing
    (None: not known); what share its run held out of the training set, by which seed; and, of a run without labels, the
    model whose answers took their place, if it is here."""

    labels: tuple[str, ...] = ()
    ours: bool = False
    no_answer: bool | None = None
    holdout: float = 0.0
    seed: int = 0
    teacher: str = ""


def known(source: str, label_map: Mapping[str, str] | None = None) -> Known:
    """What a pruned or dense model knows of its task. Raises `ModelError` or `FileError`."""
    table = stored_settings(source)
    if not table and not is_artifact(source):
        own = own_labels(read_config(hub.folder(source), source))
        return Known(labels=renamed(own, label_map))
    labels, empty, share, seed = (table.get(name) for name in ("labels", "no_answer", "holdout", "seed"))
    mine = tuple(map(str, labels)) if isinstance(labels, list) else ()
    ours = bool(table.get("source"))
    return Known(
        labels=renamed(mine, label_map),
        ours=ours,
        no_answer=empty if isinstance(empty, bool) else None,
        holdout=share if isinstance(share, float) else 0.0,
        seed=seed if isinstance(seed, int) else 0,
        teacher=_teacher(source, table.get("teacher")),
    )


def _teacher(source: str, stored: Any) -> str:
    """The model that a run learned from: a folder that is still there, or a name."""
    if not isinstance(stored, str) or not stored:
        return ""
    folder = _from_here(source, stored)
    return folder if Path(folder).is_dir() else "" if stored.startswith(".") else stored


def dtype(source: str) -> str:
    """The type of the weights in the file of a pruned model, where all have the same and it is no code; else fp32. Its
    exits, which are always in 32 bits, do not count. Of masks the type to which the weights of the base are rounded."""
    if not is_artifact(source):
        return "fp32"
    if base := part(stored_settings(source), "base"):
        return str(base.get("dtype"))
    names = {"F16": "fp16", "BF16": "bf16"}
    own = [
        entry for entry in reader.inspect(hub.place(source) / WEIGHTS_FILE) if not entry.name.startswith(exits.PREFIX)
    ]
    entries = [entry for entry in own if entry.dtype in (*names, "F32")]
    found = {"F32" if entry.quantised or entry.coding == "factors" else entry.dtype for entry in entries}
    return names.get(found.pop(), "fp32") if len(found) == 1 else "fp32"


def load_artifact(folder: Path) -> Model:
    """Load a pruned model; every tensor must be there, none left over, shapes and dtypes as the network has them.

    Floats of another width are converted to those of the network.

    Raises:
        FileError, ModelError: naming the file and the first differing tensors.
    """
    settings = read_json(folder / CONFIG_FILE)
    net, changes = _build(settings, folder)
    tensors = reader.load(folder / WEIGHTS_FILE)
    _check_tensors({**net.state_dict(), **_outlines(net.config, settings)}, tensors, folder / WEIGHTS_FILE)
    found = _read_exits(settings, tensors, folder)
    net.load_state_dict(tensors, strict=True)
    model = dataclasses.replace(_finished(net, changes, settings, folder), exits=found)
    if found is not None:
        exits.check(model)
    return model


def load_packed(folder: Path) -> tuple[Model, dict[str, Tensor | Kept]]:
    """The same model with the prunable matrices on `meta`, and these by the names of their weights, as they are stored.

    Nothing as large as the dense layers is made. Raises what `load_artifact` raises.
    """
    settings = read_json(folder / CONFIG_FILE)
    net, changes = _build(settings, folder)
    for name, refusal in (("exits", exits.only_torch), ("lowrank", lowrank.only_torch)):
        if name in settings:
            raise refusal(str(folder))
    linears = families.prunable(net, families.FAMILIES.get(net.config.model_type))
    tensors = reader.load_kept(folder / WEIGHTS_FILE, linears.keys())
    _check_tensors(net.state_dict(), tensors, folder / WEIGHTS_FILE)
    for linear in linears.values():
        linear.weight = nn.Parameter(torch.empty_like(linear.weight, device="meta"), requires_grad=False)
    matrices = {name: tensors.pop(name) for name in linears}
    net.load_state_dict(tensors, strict=False)
    check_finite(((name, m.values if isinstance(m, Kept) else m) for name, m in matrices.items()), str(folder))
    return _finished(net, changes, settings, folder), matrices


def _finished(net: Any, changes: Altered, settings: Mapping[str, Any], folder: Path) -> Model:
    """The model around a network that was read from an artefact."""
    net.config.architectures = [type(net).__name__]
    check_finite(net.named_parameters(), str(folder))
    tokenizer = read_tokenizer(folder)
    check_fits(net, tokenizer, str(folder))
    labels = tuple(str(label) for label in settings["labels"])
    kind = str(settings["kind"])
    if not KINDS[kind].own_head and len(labels) != net.config.num_labels:
        raise FileError(f"{folder / CONFIG_FILE} names {len(labels)} labels for {net.config.num_labels} outputs")
    return Model(
        net=net.eval(),
        tokenizer=tokenizer,
        family=families.FAMILIES.get(net.config.model_type),
        labels=labels,
        kind=kind,
        source=str(folder),
        slices=changes.slices,
        lowrank=changes.lowrank,
        embedding=sentences.recorded(settings.get("embedding"), str(folder)) if KINDS[kind].vectors else None,
    )


def _build(settings: Any, folder: Path) -> tuple[Any, Altered]:
    """The network that `cap_config.json` describes, its tensors to be loaded; checked against the weight file."""
    from transformers import AutoConfig

    path = folder / CONFIG_FILE
    if not isinstance(settings, dict) or settings.get("format_version") != CONFIG_VERSION:
        raise FileError(f"{path}: format_version is not {CONFIG_VERSION}", "update capcli, or prune again")
    table = settings.get("model_config")
    known = str(settings.get("kind")) in KINDS
    if not isinstance(table, dict) or not isinstance(settings.get("labels"), list) or not known:
        raise FileError(f"{path}: model_config, labels or kind is missing or of the wrong type")
    model_type = table.get("model_type")
    dropped = (*NEVER_READ, "model_type")
    table = {name: value for name, value in table.items() if name not in dropped and not name.startswith("_")}
    found = {entry.name: entry.shape for entry in reader.inspect(folder / WEIGHTS_FILE)}
    checkpoint.check_sizes(table, path, len(found))
    check_description(table, f"{path}: model_config")
    try:
        config = AutoConfig.for_model(model_type, **table)
        changes = _check_size(config, settings, folder, found)
        return empty_network(config, settings["kind"], changes), changes
    except CapError:
        raise
    except Exception as error:
        raise FileError(f"{path}: model_config does not describe a model: {first_line(error)}") from error


def _check_size(
    config: Any, settings: Mapping[str, Any], folder: Path, found: Mapping[str, tuple[int, ...]]
) -> Altered:
    """Refuse a configuration whose network is not that of the weight file, before it is built; `found` are its shapes.

    Returns how its layers are sliced and factorised, if they are.
    """
    net = outline(config, settings["kind"], found, folder, altered=altered.named(settings))
    changes = altered.read(net, settings, folder / CONFIG_FILE)
    tensors = {**net.state_dict(), **_outlines(config, settings)}
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    _check_names(expected, found, folder / WEIGHTS_FILE)
    return changes


def empty_network(config: Any, kind: str, changes: Altered) -> Any:
    """A network that waits for its tensors: none is drawn at random, but all that is not stored is computed."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        net = auto_class(kind).from_config(config)
    for tensor in net.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # how transformers' own loader says so; the rest are buffers
    net.initialize_weights()
    net.tie_weights()
    altered.shape(net, changes)
    return net


def _outlines(config: Any, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the exits that `cap_config.json` names, without values."""
    wanted = exits.shapes(config) if "exits" in settings else {}
    return {name: torch.empty(shape, device="meta") for name, shape in wanted.items()}


def _read_exits(settings: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path) -> Exits | None:
    """The exits of a model, which are taken out of its `tensors`. Raises `FileError` for what they cannot be."""
    if "exits" not in settings:
        return None
    threshold = finite(part(settings, "exits").get("threshold"))
    if threshold is None or not 0 <= threshold <= 1:
        raise FileError(f"{folder / CONFIG_FILE}: the threshold of the exits is not a number from 0 to 1", AGAIN)
    weight, bias = (tensors.pop(name).float() for name in (exits.WEIGHT, exits.BIAS))
    check_finite({exits.WEIGHT: weight, exits.BIAS: bias}.items(), str(folder))
    return Exits(weight=weight, bias=bias, threshold=threshold)


def _check_names(expected: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    missing = sorted(set(expected) - set(found))
    left_over = sorted(set(found) - set(expected))
    wrong = sorted(name for name in expected if name in found and expected[name] != found[name])
    problems = [
        f"{len(names)} {what}: {first_few(names, 3)}"
        for what, names in (("missing", missing), ("left over", left_over), ("of another shape or dtype", wrong))
        if names
    ]
    if problems:
        raise ModelError(f"{path} does not contain the tensors of this model; " + "; ".join(problems))


def _check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor | Kept], path: Path) -> None:
    def described(tensors: Mapping[str, Tensor | Kept]) -> dict[str, Any]:
        held = {name: tensor.values if isinstance(tensor, Kept) else tensor for name, tensor in tensors.items()}
        kinds = {name: "float" if tensor.is_floating_point() else tensor.dtype for name, tensor in held.items()}
        return {name: (tuple(tensor.shape), kinds[name]) for name, tensor in tensors.items()}

    _check_names(described(expected), described(found), path)


def save_artifact(
    model: Model,
    out: Path,
    pruned: Sequence[str],
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor | Factors] | None = None,
    quantised: Collection[str] = (),
    home: Path = Path(),
) -> Sizes:
    """Write the pruned model into OUT: weights in sparse coding, tokenizer, and `cap_config.json` last. `tensors` are
    stored instead of the network's own, the values of those in `quantised` as 8-bit codes. Relative places among the
    settings are as seen from `home`."""
    own = {**(model.net.state_dict() if tensors is None else tensors), **exits.tensors(model.exits)}
    found = {name: tensor.cpu() if isinstance(tensor, Tensor) else tensor for name, tensor in own.items()}
    sizes = writer.save(out / WEIGHTS_FILE, found, pruned, quantised=quantised)
    save_tokenizer(model.tokenizer, out)
    described = json.loads(model.net.config.to_json_string(use_diff=False)) | {"_name_or_path": ""}
    files.write_json(
        out / CONFIG_FILE,
        {
            "format_version": CONFIG_VERSION,
            "model_config": described,
            **settings_record(model, settings, out, home),
            **altered.record(model),
            **({"exits": {"threshold": model.exits.threshold}} if model.exits else {}),
        },
    )
    return sizes


def settings_record(model: Model, settings: Mapping[str, Any], out: Path, home: Path = Path()) -> dict[str, Any]:
    """What a model in the folder OUT says of its task and its run."""
    embedding = {"embedding": sentences.record(model.embedding)} if model.embedding else {}
    teacher = settings.get("teacher", "")
    near = {"teacher": _as_seen(home / teacher, out)} if teacher and (home / teacher).is_dir() else {}
    about = {"kind": model.kind, "labels": list(model.labels), **embedding}
    return {**about, **settings, **_source_record(settings, out, home), **near}


def _as_seen(place: Path, out: Path) -> str:
    """Where something is, as seen from OUT and not from the root; it begins with a dot, unless it is inside."""
    return os.path.relpath(place.resolve(), out.resolve())


def _source_record(settings: Mapping[str, Any], out: Path, home: Path) -> dict[str, Any]:
    """The task options for `cap_config.json`, places as seen from OUT."""
    source = settings.get("source", {})
    places = {name: source[name] for name in PLACES if source.get(name)}
    near = {name: _as_seen(home / place, out) for name, place in places.items() if not place.startswith(HUB_PREFIX)}
    return {"source": {**source, **near}} if places else {}


def artifact_files(out: Path) -> list[Path]:
    """The files that a pruned model consists of, without its reports."""
    names = {WEIGHTS_FILE, CONFIG_FILE, *TOKENIZER_FILES}
    return sorted(path for path in out.iterdir() if path.name in names and path.is_file())
