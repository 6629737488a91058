"""A model as masks over a base: which weights of a dense model stay, and its other tensors where they differ.

The base is a model in Hugging Face layout, named, and known by the sha256 of its weight files. What is kept of it is
rounded as the pruned model was stored, so that every weight is the same, bit by bit. `docs/format.md` is the
specification.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capcli import files
from capcli.artifact import masks, reader, writer
from capcli.artifact.codings import check
from capcli.artifact.entry import FLOAT_DTYPES, entropy_bits
from capcli.config.names import BUILTIN_MODEL
from capcli.config.paths import ELSEWHERE
from capcli.data.kinds import KINDS
from capcli.errors import ModelError
from capcli.models import artifact
from capcli.models.model import CONFIG_FILE, WEIGHTS_FILE, Model, added_names, check_finite
from capcli.models.storage import DTYPES, rounded
from capcli.models.tokenizers import is_artifact, read_tokenizer
from capcli.reporting.text import byte_size, first_few
from capcli.sources import hub
from capcli.sources.checkpoint import MAX_LABELS
from capcli.stored import mapping, read_json, show

MASK = ".mask"  # after the name of a matrix, the stream that says which of its weights stay
ROUNDINGS = ("fp16", "bf16", "fp32")  # of the base, in the order in which they are tried
OTHER_BASE = "name the model that was pruned with --base; "
ANOTHER = "sliced models and those with a reduced vocabulary cannot be stored as masks"


@dataclass(frozen=True, kw_only=True)
class Masked:
    """What a folder of masks says. base: the record of the base. settings: all of `cap_config.json`."""

    folder: Path
    source: str
    base: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the outputs."""
        return tuple(map(str, self.settings["labels"]))

    @property
    def kind(self) -> str:
        """The kind of the task."""
        return str(self.settings["kind"])


# Reading -------------------------------------------------------------------------------------------------------------


def read(source: str) -> Masked | None:
    """What the pruned model `source` says of its base; None for one with weights of its own. Raises `FileError`."""
    folder = hub.place(source)
    path, settings = folder / CONFIG_FILE, read_json(folder / CONFIG_FILE)
    if not isinstance(settings, dict) or settings.get("format_version") != artifact.MASK_VERSION:
        return None
    base = settings.get("base")
    right = isinstance(base, dict) and sorted(base) == ["dtype", "files", "matrices", "name"]
    check(right, f"{path}: base", "keys", "dtype, files, matrices, name", base)
    assert isinstance(base, dict)
    check(isinstance(base["name"], str) and base["name"], f"{path}: base", "name", "a name", base["name"])
    check(base["dtype"] in ROUNDINGS, f"{path}: base", "dtype", ", ".join(ROUNDINGS), base["dtype"])
    for part in ("files", "matrices"):
        check(isinstance(base[part], dict) and base[part], f"{path}: base", part, "a table", base[part])
    labels, kind = settings.get("labels"), settings.get("kind")
    known = isinstance(labels, list) and len(labels) <= MAX_LABELS and isinstance(kind, str) and kind in KINDS
    check(known, str(path), "labels and kind", f"a list of at most {MAX_LABELS:,}, and a kind of task", kind)
    return Masked(folder=folder, source=source, base=base, settings=settings)


def base_of(found: Masked, chosen: str = "") -> str:
    """The MODEL argument of the base: `chosen`, or what the masks name, a folder as seen from theirs.

    Raises `ModelError` where it is not here, or has other weights than those that the masks were made for.
    """
    name = _place_of(found, chosen)
    theirs, ours = digests(name), mapping(found.base["files"])
    wrong = [file for file in sorted({*theirs, *ours}) if theirs.get(file) != ours.get(file)]
    if wrong:
        raise ModelError(
            f"{name} is not the base that {found.source} was made for: {show(wrong[0])} has another sha256",
            "name the right one: --base of cap eval and cap export, base= of capcli.load",
        )
    return name


def _place_of(found: Masked, chosen: str) -> str:
    """Where the base should be. Raises `ModelError` where it is not."""
    name = chosen or str(found.base["name"])
    lost = not chosen and (name.startswith(ELSEWHERE) or Path(name).is_absolute())
    if not chosen and name.startswith("."):
        name = os.path.normpath(Path(found.source).resolve() / name)
        lost = not hub.is_local(found.source) or not Path(name).is_dir()
    if lost:
        raise ModelError(
            f"{found.source} holds masks only, and their base {Path(str(found.base['name'])).name} is not here",
            "name its folder: --base of cap eval and cap export, base= of capcli.load",
        )
    return name


def digests(source: str) -> dict[str, str]:
    """sha256 of each weight file of a dense model, by its name."""
    folder = hub.folder(source)
    hub.weights(folder, source)
    return {name: files.sha256(Path(folder) / name) for name in hub.weight_files(Path(folder))}


def tokenizer(source: str, base: str = "") -> Any:
    """The tokenizer of a MODEL argument; of masks that of their base. No weights are read."""
    found = read(source) if is_artifact(source) else None
    return read_tokenizer(source if found is None else _place_of(found, base))


def applied(found: Masked, base: Model) -> Model:
    """The model: the dense `base`, loaded with the labels of the masks, under these masks, and with their other
    tensors. Changes the network of the base.

    Raises `FileError` or `ModelError` for what does not fit the base.
    """
    path, own, rounding = found.folder / WEIGHTS_FILE, base.net.state_dict(), DTYPES[str(found.base["dtype"])]
    _check_stored(path, found, base)
    stored = reader.load(path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in own.items():
        if name in found.base["matrices"]:
            stream, record = stored[name + MASK].numpy(), found.base["matrices"][name]
            kept = masks.unpacked(f"{path}: {name}", record, stream, tuple(tensor.shape))
            tensors[name] = rounded(tensor, rounding, matrix=True).masked_fill(~torch.from_numpy(kept), 0.0)
        else:
            tensors[name] = stored[name] if name in stored else rounded(tensor, rounding)
    base.net.load_state_dict(tensors, strict=True)
    check_finite(base.net.named_parameters(), found.source)
    needs = f"its base, {Path(base.source).name} ({byte_size(base.stored_bytes)})"
    told = f"the file has masks and a head only: it needs {needs}"
    return dataclasses.replace(base, source=found.source, notes=(told,), stored_bytes=None, absent=frozenset())


def _check_stored(path: Path, found: Masked, base: Model) -> None:
    """Raise `FileError` unless the file holds a stream for each matrix, all that the base does not have, and nothing
    that is not a tensor of the base."""
    own, matrices, where = base.net.state_dict(), found.base["matrices"], str(path)
    unknown = sorted(set(matrices) - set(base.prunable()))
    check(not unknown, where, "masks", "matrices of the layers of the base", unknown[:3])
    entries = {one.name: one for one in reader.inspect(path)}
    wanted = {name + MASK for name in matrices} | (added_names(base) - set(matrices))
    lost, more = sorted(wanted - set(entries)), sorted(set(entries) - wanted - (set(own) - set(matrices)))
    check(not lost, where, "tensors", first_few(lost, 3), "none of this name")
    check(not more, where, "tensors", "those of the base, and masks", more[:3])
    for name, one in entries.items():
        if name in own:
            right = one.shape == tuple(own[name].shape) and (one.dtype in FLOAT_DTYPES) == own[name].is_floating_point()
            check(right, f"{where}: {name}", "shape and type", list(own[name].shape), [*one.shape, one.dtype])
        else:
            check(one.dtype == "U8" and len(one.shape) == 1, f"{where}: {name}", "stream", "bytes", one.dtype)


# Writing -------------------------------------------------------------------------------------------------------------


def save(model: Model, base: Model, out: Path, settings: Mapping[str, Any]) -> None:
    """Write into OUT which weights of the dense `base` the `model` has, and its other tensors where they differ;
    `cap_config.json` last.

    Raises `ModelError` for a model whose matrices are not those of the base with zeros.
    """
    dtype = _rounding(model, base)
    theirs, added = base.net.state_dict(), added_names(base)
    matrices: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    pruned = model.prunable()
    for name, tensor in model.net.state_dict().items():
        if name in pruned:
            matrices[name], stream = masks.packed((tensor != 0).numpy())
            tensors[name + MASK] = torch.from_numpy(stream)
        elif name in added or not tensor.equal(rounded(theirs[name], DTYPES[dtype])):
            exact = tensor.is_floating_point() and tensor.equal(rounded(tensor, DTYPES[dtype]))
            tensors[name] = tensor.to(DTYPES[dtype]) if exact else tensor
    writer.save(out / WEIGHTS_FILE, tensors, ())
    about = {"name": _named(base.source, out), "files": digests(base.source), "dtype": dtype, "matrices": matrices}
    known = artifact.settings_record(model, settings, out)
    files.write_json(out / CONFIG_FILE, {"format_version": artifact.MASK_VERSION, "base": about, **known})


def _rounding(model: Model, base: Model) -> str:
    """The type to which the weights of the base were rounded in the model."""
    ours, theirs = ({name: linear.weight for name, linear in one.prunable().items()} for one in (model, base))
    shapes = [{name: tuple(t.shape) for name, t in one.net.state_dict().items()} for one in (model, base)]
    if shapes[0] != shapes[1] or model.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ModelError(
            f"{base.source} has other tensors or another vocabulary than {model.source}", f"{OTHER_BASE}{ANOTHER}"
        )
    changed = {
        dtype: [name for name in ours if not _is_masked(ours[name], rounded(theirs[name], DTYPES[dtype], matrix=True))]
        for dtype in ROUNDINGS
    }
    dtype = min(changed, key=lambda dtype: len(changed[dtype]))
    if names := changed[dtype]:
        raise ModelError(
            f"{len(names)} of the {len(ours)} matrices of {model.source} are not those of {base.source} with zeros, "
            f"first {names[0]}: a mask cannot hold them",
            f"{OTHER_BASE}a mask holds what --method smp prunes; for others --to sparse",
        )
    return dtype


def _is_masked(weight: Tensor, base: Tensor) -> bool:
    return bool(((weight == base) | (weight == 0)).all())


def _named(source: str, out: Path) -> str:
    """The base as masks in the folder OUT name it: of the hub by its commit, of this machine as seen from there."""
    if source == BUILTIN_MODEL:
        return source
    if not hub.is_local(source):
        return f"{hub.resolve(source)[0]}@{hub.place(source).name}"
    found = os.path.relpath(Path(source).resolve(), out.resolve())
    return found if found.startswith(".") else f"./{found}"


def estimated_bytes(model: Model) -> int:
    """About what a file of masks takes: what tells the positions, and the head in 16 bits."""
    sizes = [(linear.weight.numel(), int(linear.weight.count_nonzero())) for linear in model.prunable().values()]
    head: int = sum(model.net.state_dict()[name].numel() for name in added_names(model))
    return round(sum(entropy_bits(n, kept) for n, kept in sizes) / 8) + 2 * head
