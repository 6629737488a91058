"""Loading a model of any kind: dense checkpoints, artefacts, tensors that were read elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capcli.data import kinds
from capcli.data.kinds import KINDS
from capcli.errors import CapError, ConfigError, FileError, ModelError, first_line
from capcli.models import exits, families, masks, sentences
from capcli.models.artifact import load_artifact, stored_settings
from capcli.models.heads import (
    label_order,
    output_layer,
    own_labels,
    redraw_rows,
    renamed,
    reorder_rows,
    set_labels,
)
from capcli.models.hf import (
    auto_class,
    class_for,
    class_name,
    key_mapping,
    quietly,
    read_config,
    read_pretrained,
    unread,
)
from capcli.models.model import Model, check_finite
from capcli.models.outline import outline
from capcli.models.predict import forward
from capcli.models.tokenizers import check_fits, is_artifact, open_tokenizer, with_padding
from capcli.reporting.text import counted, first_few
from capcli.sources import checkpoint, hub, requests
from capcli.sources.checkpoint import (
    BITMASK,
    MASKED,
    sparse_refusal,
)
from capcli.stored import tensor_shapes


def hub_id(source: str) -> str | None:
    """The hub id behind a MODEL argument; None for a folder and the built-in model."""
    return None if hub.is_local(source) else hub.resolve(source)[0]


def names_of(source: str, label_map: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The labels that a dense model or an artefact names, in the order of its outputs; no weights are read."""
    if is_artifact(source):
        return tuple(map(str, stored_settings(source).get("labels") or ()))
    return renamed(own_labels(read_config(hub.folder(source), source)), label_map)


def load_dense(
    source: str,
    labels: Sequence[str] | None,
    kind: str,
    seed: int,
    *,
    need_head: bool = False,
    label_map: Mapping[str, str] | None = None,
) -> Model:
    """Load a dense checkpoint in 32-bit floats with a head of this `kind` for `labels`.

    A head that already knows these labels is kept, its rows put in the order of `labels`; otherwise the head is new,
    drawn from `seed`, unless `need_head`. `labels=None` takes the labels of the model itself. `label_map` renames the
    model's labels first. A head for spans has no labels and is kept when it is there.

    Raises:
        ModelError: unknown, incomplete, corrupt, pickled or remote-code models, or labels that do not match.
    """
    path = hub.folder(source)
    config = read_config(path, source)
    config._attn_implementation = config._experts_implementation = None  # a file must not name kernels to load
    config.return_dict, config.chunk_size_feed_forward = True, 0  # nor how the network is called
    own = own_labels(config)
    order = dense_order(own, labels, kind, source, label_map, need_head=need_head)
    own = renamed(own, label_map)
    names = set_labels(config, own if labels is None else labels, kind)
    tokenizer, note = with_padding(open_tokenizer(path, source), config)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # it serves generation, and costs memory here
    torch.manual_seed(seed)
    hub.weights(path, source)
    _check_proportion(config, kind, path, source)
    net, info = read_pretrained(
        auto_class(kind).from_pretrained,
        path,
        source,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # what may not differ is refused below, by name
        key_mapping=key_mapping(config, kind),
    )
    notes = _check_loading(net, info, source, order is not None, need_head)
    check_finite(net.named_parameters(), source)
    if not KINDS[kind].vectors:
        name, output = output_layer(net)
        if order is None and f"{name}.weight" not in info["missing_keys"]:
            redraw_rows(output, getattr(config, "initializer_range", 0.02), seed)
        reorder_rows(output, order)
    made = _made(net, tokenizer, names, kind, source, note + notes, Path(path))
    stored = sum(Path(path, name).stat().st_size for name in hub.weight_files(Path(path)))
    return dataclasses.replace(made, stored_bytes=stored, absent=frozenset(info["missing_keys"]))


def load_stock(source: str) -> Model:
    """A stock model that says itself what it is for, with its head; see `load_dense`.

    Raises:
        ModelError: also where the configuration names no network for a kind of task that capcli knows.
    """
    return load_dense(source, None, kind_of(read_config(hub.folder(source), source), source), 0, need_head=True)


def kind_of(config: Any, source: str) -> str:
    """The kind of task that a configuration is for, by the class of network that it names. Raises `ModelError`."""
    named = (config.architectures or [""])[0]
    possible = [kind for kind in KINDS if class_name(config, kind) == named]
    if not possible:
        raise ModelError(
            f"config.json of {source} names no network for a task: {named!r}", "fine-tune or prune it on a task first"
        )
    return kinds.meant(possible, config.problem_type, config.num_labels)


def _check_proportion(config: Any, kind: str, path: str, source: str) -> None:
    """Refuse a configuration whose network is much larger than its weight files. Raises `ModelError`."""
    try:
        found = [tensor_shapes(Path(path) / name) for name in hub.weight_files(Path(path))]
        outline(config, kind, {name: shape for shapes in found for name, shape in shapes.items()}, source)
    except FileError as error:
        raise ModelError(
            f"the weights of {source} are corrupt: {error.message}", "download or copy it again"
        ) from error
    except CapError:
        raise
    except Exception as error:
        raise unread(error, path, source) from error


def from_tensors(tensors: Mapping[str, Tensor], table: Mapping[str, Any], folder: Path, kind: str) -> Model:
    """A model of this kind from tensors that were read elsewhere, in 32-bit floats, its labels those of `table`.

    table: what `config.json` says, without anything that names code. The tokenizer is that of the folder. Every tensor
    of the network must be there, and none left over but a pooler.

    Raises:
        ModelError: naming the folder and what is missing, left over or misshapen; nothing large is built before.
    """
    source = str(folder)
    config = _described(table, folder, tensors, kind)
    names = set_labels(config, own_labels(config), kind)
    tokenizer, notes = with_padding(open_tokenizer(source, source, config), config)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    try:
        with quietly():
            net, info = class_for(config, kind).from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                key_mapping=key_mapping(config, kind),
            )
    except Exception as error:
        raise requests.explained(error, source, source) from error
    _check_loading(net, info, source, keep_head=True, need_head=True)
    left_over = sorted(name for name in info["unexpected_keys"] if "pooler." not in name)
    if left_over:
        raise ModelError(
            f"the weights of {source} do not match its configuration: {len(left_over)} left over, "
            f"first {', '.join(map(repr, left_over[:3]))}"
        )
    return _made(net, tokenizer, names, kind, source, notes, folder)


def _described(table: Mapping[str, Any], folder: Path, tensors: Mapping[str, Tensor], kind: str) -> Any:
    """The configuration that a table describes; refused when its network is larger than the tensors together."""
    from transformers import AutoConfig

    path, shapes = folder / "config.json", {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rest = {name: value for name, value in table.items() if name != "model_type"}
    checkpoint.check_sizes(rest, path, len(tensors))
    try:
        with quietly():
            config = AutoConfig.for_model(str(table.get("model_type")), **rest)
        expected = sum(p.numel() for p in outline(config, kind, shapes, folder).parameters())
    except CapError:
        raise
    except Exception as error:
        raise ModelError(f"{path} does not describe a model for this kind of task: {first_line(error)}") from error
    found = sum(tensor.numel() for tensor in tensors.values())
    if expected > found:
        raise ModelError(f"{path} describes a model of {expected:,} weights, and {folder} holds {found:,}")
    return config


def _made(
    net: Any, tokenizer: Any, labels: tuple[str, ...], kind: str, source: str, notes: tuple[str, ...], folder: Path
) -> Model:
    """The model around a network that was read as a dense one from a folder."""
    check_fits(net, tokenizer, source)
    model_type = net.config.model_type
    family = families.FAMILIES.get(model_type)
    if family is None:
        notes += (_unknown_family(net, model_type),)
    net.config.architectures = [type(net).__name__]  # not what the checkpoint was before
    embedding = sentences.read(folder, source) if KINDS[kind].vectors else None
    model = Model(
        net=net.eval(),
        tokenizer=tokenizer,
        family=family,
        labels=labels,
        kind=kind,
        source=source,
        notes=notes + (embedding.notes if embedding else ()),
        embedding=embedding,
    )
    _check_computes(model)
    return model


def _check_computes(model: Model) -> None:
    """Raise `ModelError` for sizes that fit the weights and not each other: a text tells, before any work is done."""
    coded = model.tokenizer(["a ☃"], return_tensors="pt")
    try:
        with torch.no_grad():
            forward(
                model, {name: coded[name] for name in model.input_names} | {"attention_mask": coded["attention_mask"]}
            )
    except Exception as error:
        raise ModelError(
            f"{model.source} cannot compute what its configuration describes: {first_line(error)}",
            "copy or download config.json and weights together",
        ) from error


def _unknown_family(net: Any, model_type: str) -> str:
    """What is said of a family outside the table: how much of its blocks stands in linear layers, and is prunable."""
    stack = {id(p): p.numel() for block in families.blocks(net, None).values() for p in block.parameters()}
    share = sum(linear.weight.numel() for linear in families.prunable(net, None).values()) / max(1, sum(stack.values()))
    return (
        f"{model_type} is not in capcli's table of families: the linear layers of its blocks are pruned, "
        f"which hold {share:.0%} of the weights of the blocks"
    )


def dense_order(
    own: Sequence[str],
    labels: Sequence[str] | None,
    kind: str,
    source: str,
    label_map: Mapping[str, str] | None,
    *,
    need_head: bool,
) -> list[int] | None:
    """For each wanted label the row of the head, see `label_order`. Raises `ModelError` for a head that is needed."""
    row = KINDS[kind]
    order = list(range(len(row.outputs))) if row.own_head else label_order(own, labels, label_map)
    if need_head and order is None:
        raise ModelError(
            f"the labels of {source} ({first_few(renamed(own, label_map), 5)}) are not those of the task "
            f"({first_few(labels or (), 5)})",
            "map them by name with --label-map, or use a model that was fine-tuned on this task",
        )
    if need_head and not row.own_head and len(own) != row.n_outputs(len(own)):
        raise ModelError(f"{source} has {counted(len(own), 'output')}; {kind} needs {len(row.outputs)}")
    return order


def _pruned_order(
    own: Sequence[str], labels: Sequence[str] | None, source: str, label_map: Mapping[str, str] | None
) -> list[int]:
    """The same for a pruned model, whose head is never replaced."""
    order = label_order(own, labels, label_map)
    if order is None:
        raise ModelError(
            f"the labels of {source} ({first_few(own, 5)}) are not those of the task ({first_few(labels or (), 5)})",
            "map them by name with --label-map",
        )
    return order


def check_head(
    source: str, labels: Sequence[str] | None, kind: str, label_map: Mapping[str, str] | None = None
) -> None:
    """Raise `ModelError` for a model whose head is not one of this kind for `labels`; no weights are read."""
    if not is_artifact(source):
        config = read_config(hub.folder(source), source)
        dense_order(own_labels(config), labels, kind, source, label_map, need_head=True)
        return
    settings = stored_settings(source)
    own = settings.get("labels")
    _check_kind(source, settings.get("kind"), kind)
    _pruned_order(tuple(map(str, own)) if isinstance(own, list) else (), labels, source, label_map)


def _check_kind(source: str, own: Any, kind: str) -> None:
    numbers = own in KINDS and KINDS[own].numbers and KINDS[kind].numbers  # of which an order can be told
    if own != kind and not numbers:
        raise ModelError(f"{source} was pruned for {own}, not for {kind}")


def check_no_base(source: str, base: str) -> None:
    """Raise `ConfigError` for a base of a model with weights of its own."""
    if base:
        raise ConfigError(f"{source} has weights of its own, and needs no base", "leave --base out")


def load_pruned(source: str, base: str = "") -> Model:
    """A pruned model; of masks with the weights of their base, found where they name it, or at `base`.

    Raises as `check_no_base` does.
    """
    if (found := masks.read(source) if is_artifact(source) else None) is not None:
        return masks.applied(found, load_dense(masks.base_of(found, base), found.labels, found.kind, 0))
    check_no_base(source, base)
    return dataclasses.replace(load_artifact(hub.place(source)), source=source)


def load_model(
    source: str,
    labels: Sequence[str] | None,
    kind: str,
    seed: int,
    *,
    need_head: bool = False,
    label_map: Mapping[str, str] | None = None,
    base: str = "",
) -> Model:
    """Load a pruned artefact or a dense checkpoint, whichever `source` is; see `load_dense` and `load_pruned`."""
    if not is_artifact(source) and not base:
        return load_dense(source, labels, kind, seed, need_head=need_head, label_map=label_map)
    model = load_pruned(source, base)
    if need_head:
        _check_kind(source, model.kind, kind)
    order = _pruned_order(model.labels, labels, source, label_map)
    if model.embedding is None:
        reorder_rows(output_layer(model.net)[1], order)
    return dataclasses.replace(model, labels=tuple(labels or model.labels), exits=exits.reordered(model.exits, order))


def _check_loading(net: Any, info: Mapping[str, Any], source: str, keep_head: bool, need_head: bool) -> tuple[str, ...]:
    """Accept a checkpoint only when nothing but a head that is not needed, or an unused pooler, is new."""
    for layout, part in ((BITMASK, ".bitmask"), (MASKED, ".mask_scores")):
        if any(name.endswith(part) for name in info["unexpected_keys"]):
            raise sparse_refusal(source, layout)
    headless = net.base_model is net  # with a pooler at most, which nothing reads
    inside = "" if headless else f"{net.base_model_prefix}."
    need_head = need_head and not headless
    missing = sorted(info["missing_keys"])
    lost = [n for n in missing if n.startswith(inside) and (need_head or ".pooler." not in n)]
    wrong = {str(name): shapes for name, *shapes in sorted(info["mismatched_keys"])}
    _check_shapes({name: wrong[name] for name in wrong if keep_head or name.startswith(inside)}, net, source)
    if lost or (need_head and any(not name.startswith(inside) for name in missing)):
        first = ", ".join((lost or missing)[:3])
        raise ModelError(
            f"the weights of {source} are incomplete: {len(lost or missing)} missing, first {first}",
            "copy or download the whole folder",
        )
    pooler = any("pooler" in name for name in missing) and not headless
    return (f"{source} has no pooler; a new one was drawn from the seed",) if pooler else ()


def _check_shapes(wrong: Mapping[str, Sequence[Any]], net: Any, source: str) -> None:
    """Refuse weights (name -> shape in the file, shape in the network) that are not those of the configuration."""
    if not wrong:
        return
    first, (stored, expected) = next(iter(wrong.items()))
    if net.base_model is not net and all(name.startswith(f"{output_layer(net)[0]}.") for name in wrong):
        raise ModelError(
            f"the head of {source} has {stored[0]} outputs, its configuration {net.config.num_labels} names",
            "id2label in config.json needs one name for each output",
        )
    raise ModelError(
        f"the weights of {source} do not match its configuration: {len(wrong)} of another shape, first {first} "
        f"with {list(stored)} instead of {list(expected)}",
        "copy or download config.json and weights together",
    )
