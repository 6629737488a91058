"""The only boundary to transformers: load dense or pruned models, their sentence vectors, matrices and groups.

Letters: B batch, S tokens, H hidden size, C labels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from capcli import cache, families, files, hub, refusals, slicing, sparse
from capcli.config import Hardware, TaskConfig, leaves
from capcli.errors import CapError, ConfigError, FileError, ModelError
from capcli.names import finder
from capcli.refusals import (
    BITMASK,
    MASKED,
    NEVER_READ,
    TOKENIZER_FILES,
    check_description,
    check_tokenizer_config,
    sparse_refusal,
)
from capcli.run import Event
from capcli.tokens import Batch, Examples, collate, evaluation_batches

WEIGHTS_FILE, CONFIG_FILE = "model.cap.safetensors", "cap_config.json"
CONFIG_VERSION = 1  # of cap_config.json; the weight file has its own
# How much larger than what a weight file holds a network may grow: a new head, tied weights, buffers.
SPARE_PARTS, SPARE_WEIGHTS = 1000, 1 << 24
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# The kinds of tasks that answer for each token, and the class of transformers that does it.
HEADS = {"tokens": "AutoModelForTokenClassification", "spans": "AutoModelForQuestionAnswering"}
PIPELINE_TAGS = {  # how the hub calls the kinds
    "classification": "text-classification",
    "multilabel": "text-classification",
    "regression": "text-classification",
    "tokens": "token-classification",
    "spans": "question-answering",
}


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of a network: in prunable matrices, and in all."""

    prunable: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What slicing left of the layers, by the name of their block, and the parameters that the network had before."""

    sizes: Mapping[str, slicing.Size]
    before: Counts


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network with what is needed to use it: tokenizer, family (None when unknown), label names and the task kind.

    The layers of a sliced model are smaller than its configuration says; `cut` then tells by how much.
    """

    net: Any
    tokenizer: Any
    family: families.Family | None
    labels: tuple[str, ...]
    kind: str
    source: str
    notes: tuple[str, ...] = ()
    cut: Cut | None = None

    @property
    def is_sliced(self) -> bool:
        """Whether layers are smaller than the configuration says, so that no stock folder can hold the network."""
        return self.cut is not None

    @property
    def before_slicing(self) -> Counts:
        """Parameters of the network as its configuration says: what sparsity is counted against."""
        return self.cut.before if self.cut is not None else _counts(self.net, self.family)

    @property
    def per_token(self) -> bool:
        """Whether the network answers for each token and not for the whole input."""
        return self.kind in HEADS

    @property
    def input_names(self) -> tuple[str, ...]:
        """The inputs that the tokenizer gives and the network takes, in a fixed order."""
        given = _accepted(self.net).intersection(self.tokenizer.model_input_names)
        return tuple(name for name in INPUTS if name in given)

    def layers(self) -> list[families.Layer]:
        """The heads and neurons of the layers, from the input upwards.

        Raises:
            ConfigError: the family is unknown, or the layers were sliced and have sizes of their own.
        """
        if self.is_sliced:
            raise ConfigError(
                f"{self.source} is sliced: its layers have no heads and neurons to choose from any more",
                "use the artefact that it was made from",
            )
        if self.family is None:
            raise ConfigError(
                f"{self.source} is a {self.net.config.model_type} model, whose heads and neurons capcli does not know",
                f"use an unstructured method such as cap-soft; known families: {', '.join(families.FAMILIES)}",
            )
        return families.layers(self.net, self.family)

    def prunable(self) -> dict[str, nn.Linear]:
        """The prunable linear layers by the name of their weight, in reading order (section 3)."""
        return families.prunable(self.net, self.family)

    def nonzero(self) -> int:
        """How many weights of the prunable matrices are not zero."""
        return sum(int(linear.weight.count_nonzero()) for linear in self.prunable().values())

    def encoder_parameters(self) -> int:
        """Parameters of the layer stack: prunable matrices, biases and norms."""
        stack = families.blocks(self.net, self.family).values()
        return sum({id(p): p.numel() for block in stack for p in block.parameters()}.values())


def _counts(net: Any, family: families.Family | None) -> Counts:
    prunable = sum(linear.weight.numel() for linear in families.prunable(net, family).values())
    return Counts(prunable=prunable, total=sum(p.numel() for p in net.parameters()))


def sliced(model: Model) -> Model:
    """The same function in smaller layers, as far as the zeros of the model allow; see `slicing.cut`. A new model.

    Raises:
        ConfigError: the family is unknown, or the model is sliced already.
    """
    model.layers()
    assert model.family is not None, "layers() refuses unknown families"
    smaller = copy(model)
    sizes = slicing.cut(smaller.net, model.family)
    return dataclasses.replace(smaller, cut=Cut(sizes=sizes, before=model.before_slicing))


def forward(model: Model, inputs: Mapping[str, Tensor], pooling: str = "head") -> tuple[Tensor, Tensor]:
    """Logits and the sentence vector [B, H] (section 2), not normalised.

    Logits are [B, C]; [B, S, C] for token classification; [B, S, 2], begin and end, for spans.
    pooling: `head` is the vector that enters the classifier; for heads that answer per token it is that of `cls`, for
    unknown families, which may be causal, that of `mean`. `cls` is the last state of the first token (of the last one
    in a causal model), `mean` the mean of the last states over real tokens.
    """
    logits, vector, _ = forward_states(model, inputs, pooling, keep=False)
    return logits, vector


def forward_states(
    model: Model, inputs: Mapping[str, Tensor], pooling: str = "head", *, keep: bool = True
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """As `forward`, and if `keep` the hidden states, each [B, S, H]: of the embeddings and after each layer."""
    net, family, mask = model.net, model.family, inputs["attention_mask"]
    inputs = {name: value for name, value in inputs.items() if name in _accepted(net)}
    if family is None or model.per_token:
        out = net(**inputs, output_hidden_states=True)
        states = _states(out)[-1]
        logits = out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits], dim=-1)
        head = None if family is not None else families.mean(states, mask)
    else:
        out = net.base_model(**inputs, output_hidden_states=keep)
        states = out.last_hidden_state
        head = family.vector(net, out, families.represented(states, mask, family.causal), mask)
        logits = family.classify(net, head)
    if pooling == "head" and head is not None:
        vector = head
    elif pooling == "mean":
        vector = families.mean(states, mask)
    else:
        vector = families.represented(states, mask, family is not None and family.causal)
    return logits, vector, _states(out) if keep else ()


def _accepted(net: Any) -> set[str]:
    """Names of the inputs that the network takes; token types only when it tells two of them apart."""
    names = {name for name in inspect.signature(type(net.base_model).forward).parameters if name in INPUTS}
    return names - ({"token_type_ids"} if getattr(net.config, "type_vocab_size", 2) < 2 else set())


def _states(out: Any) -> tuple[Tensor, ...]:
    names = ("hidden_states", "decoder_hidden_states", "encoder_hidden_states")
    return tuple(next(out[name] for name in names if name in out))


def hub_id(source: str) -> str | None:
    """The hub id behind a MODEL argument; None for a folder and the built-in model."""
    return None if hub.is_local(source) else hub.resolve(source)[0]


def is_artifact(source: str) -> bool:
    """Whether `source` is a folder that `cap prune` wrote."""
    return (Path(source) / CONFIG_FILE).is_file()


def stored_settings(source: str) -> dict[str, Any]:
    """What `cap_config.json` of a pruned model says; empty for any other model. Raises `FileError`."""
    if not is_artifact(source):
        return {}
    path = Path(source) / CONFIG_FILE
    table = files.read_json(path)
    if not isinstance(table, dict):
        raise FileError(f"{path} is not a JSON object")
    return table


def stored_source(source: str) -> dict[str, Any]:
    """The task options that a pruned model was made with; empty for one that was converted, and for any other model.

    The place of the data, stored as seen from the folder, is returned as it is from here. Raises `FileError`.
    """
    if not is_artifact(source):
        return {}
    stored = stored_settings(source).get("source")
    kinds = {item.name: kind for item, kind in leaves(TaskConfig)}
    if not isinstance(stored, dict) or not all(type(value) is kinds.get(name) for name, value in stored.items()):
        path = Path(source) / CONFIG_FILE
        raise FileError(f"{path}: source is missing or malformed", "prune again, or copy the whole folder")
    if place := stored.get("data"):
        return {**stored, "data": os.path.normpath(Path(source).resolve() / place)}
    return stored


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a model knows of its task: class names, if `ours` the very ones of its data; whether it may answer nothing
    (None: not known); and what share its run held out of the training set, by which seed."""

    labels: tuple[str, ...] = ()
    ours: bool = False
    no_answer: bool | None = None
    holdout: float = 0.0
    seed: int = 0


def known(source: str, label_map: Mapping[str, str] | None = None) -> Known:
    """What a pruned or dense model knows of its task. Raises `ModelError` or `FileError`."""
    if not is_artifact(source):
        from transformers import AutoConfig

        own = _own_labels(_read(AutoConfig.from_pretrained, hub.folder(source), source))
        return Known(labels=renamed(own, label_map))
    table = stored_settings(source)
    labels, empty, share, seed = (table.get(name) for name in ("labels", "no_answer", "holdout", "seed"))
    mine = tuple(map(str, labels)) if isinstance(labels, list) else ()
    ours = bool(table.get("source"))
    return Known(
        labels=renamed(mine, label_map),
        ours=ours,
        no_answer=empty if isinstance(empty, bool) else None,
        holdout=share if isinstance(share, float) else 0.0,
        seed=seed if isinstance(seed, int) else 0,
    )


def load_artifact(folder: Path) -> Model:
    """Load a pruned model; every tensor must be there, none left over, shapes and dtypes as the network has them.

    Floats of another width are converted to those of the network.

    Raises:
        FileError, ModelError: naming the file and the first differing tensors.
    """
    settings = files.read_json(folder / CONFIG_FILE)
    net, cut = _build(settings, folder)
    tensors = sparse.load(folder / WEIGHTS_FILE)
    _check_tensors(net.state_dict(), tensors, folder / WEIGHTS_FILE)
    net.load_state_dict(tensors, strict=True)
    net.config.architectures = [type(net).__name__]
    _check_finite(net, str(folder))
    tokenizer = read_tokenizer(folder)
    _check_fits(net, tokenizer, str(folder))
    labels = tuple(str(label) for label in settings["labels"])
    if settings["kind"] != "spans" and len(labels) != net.config.num_labels:
        raise FileError(f"{folder / CONFIG_FILE} names {len(labels)} labels for {net.config.num_labels} outputs")
    return Model(
        net=net.eval(),
        tokenizer=tokenizer,
        family=families.FAMILIES.get(net.config.model_type),
        labels=labels,
        kind=str(settings["kind"]),
        source=str(folder),
        cut=cut,
    )


def _build(settings: Any, folder: Path) -> tuple[Any, Cut | None]:
    """The network that `cap_config.json` describes, its tensors to be loaded; checked against the weight file."""
    from transformers import AutoConfig

    path = folder / CONFIG_FILE
    if not isinstance(settings, dict) or settings.get("format_version") != CONFIG_VERSION:
        raise FileError(f"{path}: format_version is not {CONFIG_VERSION}", "update capcli, or prune again")
    table = settings.get("model_config")
    known = str(settings.get("kind")) in PIPELINE_TAGS
    if not isinstance(table, dict) or not isinstance(settings.get("labels"), list) or not known:
        raise FileError(f"{path}: model_config, labels or kind is missing or of the wrong type")
    model_type = table.get("model_type")
    dropped = (*NEVER_READ, "model_type")
    table = {name: value for name, value in table.items() if name not in dropped and not name.startswith("_")}
    found = {entry.name: entry.shape for entry in sparse.inspect(folder / WEIGHTS_FILE)}
    refusals.check_sizes(table, path, len(found))
    check_description(table, f"{path}: model_config")
    try:
        config = AutoConfig.for_model(model_type, **table)
        cut = _check_size(config, settings, folder, found)
        return _empty(config, settings["kind"], cut), cut
    except CapError:
        raise
    except Exception as error:
        raise FileError(f"{path}: model_config describes no model: {hub.first_line(error)}") from error


def _auto(kind: str) -> Any:
    """The class of transformers that makes networks for this kind of task."""
    import transformers

    return getattr(transformers, HEADS.get(kind, "AutoModelForSequenceClassification"))


def _check_size(
    config: Any, settings: Mapping[str, Any], folder: Path, found: Mapping[str, tuple[int, ...]]
) -> Cut | None:
    """Refuse a configuration whose network is not that of the weight file, before it is built; `found` are its shapes.

    Returns how its layers are cut, if they are.
    """
    net = _outline(config, settings["kind"], found, folder)
    cut = _read_cut(net, settings, folder / CONFIG_FILE) if "sliced" in settings else None
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    _check_names(expected, found, folder / WEIGHTS_FILE)
    return cut


def _outline(config: Any, kind: str, found: Mapping[str, tuple[int, ...]], source: object) -> Any:
    """The network of a configuration on `meta`, where weights take no memory.

    Raises `ModelError` as soon as it is out of all proportion to `found`, the shapes of the tensors in the files.
    """
    from torch.nn.modules import module as hooks

    weights = sum(map(math.prod, found.values()))
    parts_left, weights_left = 8 * len(found) + SPARE_PARTS, 4 * weights + SPARE_WEIGHTS

    def grown(_module: nn.Module, _name: str, part: Any) -> None:
        nonlocal parts_left, weights_left
        parts_left -= 1
        weights_left -= part.numel() if isinstance(part, Tensor) else 0
        if min(parts_left, weights_left) < 0:
            raise ModelError(
                f"the configuration of {source} describes a model of far more than the {weights:,} weights that it has",
                "copy or download it again",
            )

    watched = (
        hooks.register_module_module_registration_hook(grown),
        hooks.register_module_parameter_registration_hook(grown),
        hooks.register_module_buffer_registration_hook(grown),
    )
    try:
        with _quiet(), torch.device("meta"):
            return _auto(kind).from_config(deepcopy(config))
    finally:
        for hook in watched:
            hook.remove()


def _read_cut(net: Any, settings: Mapping[str, Any], path: Path) -> Cut:
    """What `sliced` says, for a network on `meta`, whose layers get their sizes."""
    family = families.FAMILIES.get(net.config.model_type)
    if family is None:
        raise FileError(f"{path}: sliced layers of a {net.config.model_type} model, whose layers capcli does not know")
    try:
        cut = Cut(sizes=slicing.read(settings["sliced"], net, family), before=_counts(net, family))
    except ValueError as error:
        raise FileError(f"{path}: {error}", "slice again, or copy the whole folder") from error
    slicing.shape(net, family, cut.sizes)
    return cut


def _empty(config: Any, kind: str, cut: Cut | None) -> Any:
    """A network that waits for its tensors: none is drawn at random, but all that is not stored is computed."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        net = _auto(kind).from_config(config)
    for tensor in net.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # how transformers' own loader says so; the rest are buffers
    net.initialize_weights()
    net.tie_weights()
    if cut:
        slicing.shape(net, families.FAMILIES[config.model_type], cut.sizes)
    return net


def _check_names(expected: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    missing = sorted(set(expected) - set(found))
    left_over = sorted(set(found) - set(expected))
    wrong = sorted(name for name in expected if name in found and expected[name] != found[name])
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("left over", left_over), ("of another shape or dtype", wrong))
        if names
    ]
    if problems:
        raise ModelError(f"{path} does not hold the tensors of this model; " + "; ".join(problems))


def _check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    def described(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        kinds = {name: "float" if tensor.is_floating_point() else tensor.dtype for name, tensor in tensors.items()}
        return {name: (tuple(tensor.shape), kinds[name]) for name, tensor in tensors.items()}

    _check_names(described(expected), described(found), path)


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
    from transformers import AutoConfig

    path = hub.folder(source)
    config = _read(AutoConfig.from_pretrained, path, source)
    config._attn_implementation = config._experts_implementation = None  # a file must not name kernels to load
    config.return_dict, config.chunk_size_feed_forward = True, 0  # nor how the network is called
    own = _own_labels(config)
    order = list(range(2)) if kind == "spans" else _label_order(own, labels, label_map)
    own = renamed(own, label_map)
    if need_head and order is None:
        raise ModelError(
            f"the labels of {source} ({_listed(own)}) are not those of the task ({_listed(labels or ())})",
            "map them by name with --label-map, or use a model that was fine-tuned on this task",
        )
    if need_head and kind == "regression" and len(own) != 1:
        raise ModelError(f"{source} has {len(own)} outputs; a regression needs a model with one")
    names = _set_labels(config, own if labels is None else labels, kind)
    tokenizer, note = _with_padding(_tokenizer(path, source), config)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # it serves generation, and costs memory here
    torch.manual_seed(seed)
    hub.weights(path, source)
    _check_proportion(config, kind, path, source)
    net, info = _read(
        _auto(kind).from_pretrained,
        path,
        source,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # what may not differ is refused below, by name
        key_mapping=_key_mapping(config, kind),
    )
    notes = _check_loading(net, info, source, order is not None, need_head)
    _check_finite(net, source)
    name, output = _output(net)
    if order is None and f"{name}.weight" not in info["missing_keys"]:
        _renew(output, getattr(config, "initializer_range", 0.02), seed)
    _reorder(output, order)
    return _made(net, tokenizer, names, kind, source, note + notes)


def _check_proportion(config: Any, kind: str, path: str, source: str) -> None:
    """Refuse a configuration whose network is much larger than its weight files. Raises `ModelError`."""
    try:
        found = [files.tensor_shapes(Path(path) / name) for name in hub.weight_files(Path(path))]
        _outline(config, kind, {name: shape for shapes in found for name, shape in shapes.items()}, source)
    except FileError as error:
        raise ModelError(
            f"the weights of {source} are corrupt: {error.message}", "download or copy it again"
        ) from error
    except CapError:
        raise
    except Exception as error:
        raise _unread(error, path, source) from error


def from_tensors(tensors: Mapping[str, Tensor], table: Mapping[str, Any], folder: Path, kind: str) -> Model:
    """A model of this kind from tensors that were read elsewhere, in 32-bit floats, its labels those of `table`.

    table: what `config.json` says, without anything that names code. The tokenizer is that of the folder. Every tensor
    of the network must be there, and none left over but a pooler.

    Raises:
        ModelError: naming the folder and what is missing, left over or misshapen; nothing large is built before.
    """
    source = str(folder)
    config = _described(table, folder, tensors, kind)
    names = _set_labels(config, _own_labels(config), kind)
    tokenizer, notes = _with_padding(_tokenizer(source, source, config), config)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    try:
        with _quiet():
            net, info = _class(config, kind).from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                key_mapping=_key_mapping(config, kind),
            )
    except Exception as error:
        raise hub.explained(error, source, source) from error
    _check_loading(net, info, source, keep_head=True, need_head=True)
    left_over = sorted(name for name in info["unexpected_keys"] if ".pooler." not in name)
    if left_over:
        raise ModelError(
            f"the weights of {source} are not those of its configuration: {len(left_over)} left over, "
            f"first {', '.join(map(repr, left_over[:3]))}"
        )
    return _made(net, tokenizer, names, kind, source, notes)


def _described(table: Mapping[str, Any], folder: Path, tensors: Mapping[str, Tensor], kind: str) -> Any:
    """The configuration that a table describes; refused when its network is larger than the tensors together."""
    from transformers import AutoConfig

    path, shapes = folder / "config.json", {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rest = {name: value for name, value in table.items() if name != "model_type"}
    refusals.check_sizes(rest, path, len(tensors))
    try:
        with _quiet():
            config = AutoConfig.for_model(str(table.get("model_type")), **rest)
        expected = sum(p.numel() for p in _outline(config, kind, shapes, folder).parameters())
    except CapError:
        raise
    except Exception as error:
        raise ModelError(f"{path} describes no model for this kind of task: {hub.first_line(error)}") from error
    found = sum(tensor.numel() for tensor in tensors.values())
    if expected > found:
        raise ModelError(f"{path} describes a model of {expected:,} weights, and {folder} holds {found:,}")
    return config


def _class(config: Any, kind: str) -> Any:
    """The class of transformers for this kind of task and model. Raises `KeyError`."""
    return _auto(kind)._model_mapping[type(config)]


def _made(net: Any, tokenizer: Any, labels: tuple[str, ...], kind: str, source: str, notes: tuple[str, ...]) -> Model:
    """The model around a network that was read as a dense one."""
    _check_fits(net, tokenizer, source)
    model_type = net.config.model_type
    family = families.FAMILIES.get(model_type)
    if family is None:
        notes += (_unknown_family(net, model_type),)
    net.config.architectures = [type(net).__name__]  # not what the checkpoint was before
    model = Model(
        net=net.eval(), tokenizer=tokenizer, family=family, labels=labels, kind=kind, source=source, notes=notes
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
            f"{model.source} cannot compute what its configuration describes: {hub.first_line(error)}",
            "copy or download config.json and weights together",
        ) from error


def _unknown_family(net: Any, model_type: str) -> str:
    """What is said of a family outside the table: how much of its blocks stands in linear layers, and is prunable."""
    stack = {id(p): p.numel() for block in families.blocks(net, None).values() for p in block.parameters()}
    share = sum(linear.weight.numel() for linear in families.prunable(net, None).values()) / max(1, sum(stack.values()))
    return (
        f"{model_type} is not in capcli's table of families: the linear layers of its blocks are prunable, "
        f"{share:.0%} of the weights there"
    )


def _set_labels(config: Any, labels: Sequence[str], kind: str) -> tuple[str, ...]:
    """Write the labels into a configuration; returns them, as a model of this kind has them."""
    names = () if kind == "spans" else tuple(labels) or ("score",)
    shown = names or ("start", "end")
    config.num_labels = len(shown)
    config.id2label, config.label2id = dict(enumerate(shown)), {name: i for i, name in enumerate(shown)}
    config.problem_type = "multi_label_classification" if kind == "multilabel" else None
    return names


def _key_mapping(config: Any, kind: str) -> dict[str, str] | None:
    """Where the network of this kind calls its base model otherwise than the others of its family do, as Llama's."""
    other = "classification" if kind == "spans" else "spans"
    classes = [_auto(which)._model_mapping.get(type(config), None) for which in (kind, other)]
    prefixes = [getattr(one, "base_model_prefix", "") for one in classes]
    return None if "" in prefixes or prefixes[0] == prefixes[1] else {rf"^{prefixes[1]}\.": f"{prefixes[0]}."}


def _check_fits(net: Any, tokenizer: Any, source: str) -> None:
    """Raise `ModelError` for a network that takes no tokens, or has no embeddings for some of this tokenizer."""
    if "input_ids" not in _accepted(net):
        raise ModelError(f"{source} is a {net.config.model_type} model, which does not read tokens of text")
    rows, vocabulary = _embedded(net), tokenizer.get_vocab()
    last = max(vocabulary.values(), default=0)
    if rows is None or last < rows:
        return
    beyond = sorted((token for token, place in vocabulary.items() if place >= rows), key=vocabulary.__getitem__)
    raise ModelError(
        f"the tokenizer of {source} has {len(vocabulary):,} tokens with ids up to {last:,}, the embeddings have "
        f"{rows:,} rows: none for {_listed([repr(token[:40]) for token in beyond])}",
        "after adding tokens call model.resize_token_embeddings(len(tokenizer)) of transformers and save both again",
    )


def _embedded(net: Any) -> int | None:
    """How many tokens have an embedding; None for a network without a table of them."""
    with contextlib.suppress(NotImplementedError, AttributeError):
        rows: int = net.base_model.get_input_embeddings().num_embeddings
        return rows
    return None


def _with_padding(tokenizer: Any, config: Any) -> tuple[Any, tuple[str, ...]]:
    """Give a tokenizer without a padding token, as decoders have it, its end token; and a note that says so.

    Where it has no end token, any other serves: what is padding is masked.
    """
    notes: tuple[str, ...] = ()
    if tokenizer.pad_token is None:
        others = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.sep_token, tokenizer.convert_ids_to_tokens(0))
        tokenizer.pad_token = next((token for token in others if token), None)
        notes = (f"the tokenizer has no padding token; {tokenizer.pad_token!r} serves as one",)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, notes


def _output(net: Any) -> tuple[str, nn.Linear]:
    """Name and module of the last linear layer of the head, whose rows are the labels."""
    inside = f"{net.base_model_prefix}."
    linears = [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Linear) and not name.startswith(inside)]
    return linears[-1]


def load_model(
    source: str,
    labels: Sequence[str] | None,
    kind: str,
    seed: int,
    *,
    need_head: bool = False,
    label_map: Mapping[str, str] | None = None,
) -> Model:
    """Load a pruned artefact or a dense checkpoint, whichever `source` is; see `load_dense`."""
    if not is_artifact(source):
        return load_dense(source, labels, kind, seed, need_head=need_head, label_map=label_map)
    model = load_artifact(Path(source))
    if need_head and model.kind != kind:
        raise ModelError(f"{source} was pruned for {model.kind}, not for {kind}")
    order = _label_order(model.labels, labels, label_map)
    if order is None:
        raise ModelError(
            f"the labels of {source} ({_listed(model.labels)}) are not those of the task ({_listed(labels or ())})",
            "map them by name with --label-map",
        )
    _reorder(_output(model.net)[1], order)
    return dataclasses.replace(model, labels=tuple(labels or model.labels))


def _tokenizer(path: str, source: str, config: Any = None) -> Any:
    """The tokenizer of a folder; `config` in place of its config.json, which transformers may not know."""
    from transformers import AutoTokenizer, PreTrainedConfig

    refusals.check_files(Path(path), source)
    if config is None and is_artifact(path):
        config = PreTrainedConfig()  # an artefact has no config.json, and one that was put there is not read
    check_tokenizer_config(Path(path), source)
    tokenizer = _read(AutoTokenizer.from_pretrained, path, source, config=config)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up when there is no file
        raise ModelError(f"{source} has no tokenizer: tokenizer.json or vocab.txt is missing, or without words")
    if "attention_mask" not in tokenizer.model_input_names:
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
    _check_reads(tokenizer, source)
    return tokenizer


def _check_reads(tokenizer: Any, source: str) -> None:
    """Raise `ModelError` for a tokenizer that fails on what it does not know, or has no room for a text."""
    try:
        (tokenizer.backend_tokenizer.encode if tokenizer.is_fast else tokenizer.tokenize)("a ☃")
        n_special = tokenizer.num_special_tokens_to_add(pair=False)
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {source} cannot read a text: {hub.first_line(error)}",
            "copy or download the whole folder; an unk_token has to be in the vocabulary",
        ) from error
    if tokenizer.model_max_length <= n_special:
        raise ModelError(
            f"the tokenizer of {source} has no room for a text: its model_max_length is "
            f"{tokenizer.model_max_length}, and special tokens take {n_special}",
            "raise model_max_length in its tokenizer_config.json",
        )


def _read(reader: Callable[..., Any], path: str, source: str, **options: Any) -> Any:
    """Call a `from_pretrained` safely: no pickle, no remote code, 32-bit floats; failures as one clear line."""
    if reader.__self__.__name__.startswith("AutoModel"):  # type: ignore[attr-defined]
        options |= {"use_safetensors": True, "dtype": torch.float32}
    try:
        with _quiet():
            return reader(path, trust_remote_code=False, **options)
    except Exception as error:
        raise _unread(error, path, source) from error


def _unread(error: Exception, path: str, source: str) -> ModelError:
    """What it means that transformers does not read the model `source` in the folder `path`."""
    if "Unrecognized configuration class" in str(error):
        return ModelError(f"transformers has no head of this kind for {source}: {hub.first_line(error)}")
    return hub.explained(error, path, source)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports away; what they would say is checked or said by us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with hub.quiet():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _own_labels(config: Any) -> tuple[str, ...]:
    table = config.id2label or {}
    return tuple(str(table[key]) for key in sorted(table, key=int))


def renamed(own: Sequence[str], label_map: Mapping[str, str] | None) -> tuple[str, ...]:
    """The labels of a model under the names that a map gives them. Raises `ConfigError` when two get the same."""
    names = tuple((label_map or {}).get(name, name) for name in own)
    if twice := [name for name in names if names.count(name) > 1 and own.count(name) < 2]:
        raise ConfigError(f"--label-map gives two labels of the model the name {twice[0]!r}", "give each its own")
    return names


def _label_order(
    own: Sequence[str], labels: Sequence[str] | None, label_map: Mapping[str, str] | None = None
) -> list[int] | None:
    """For each wanted label the index among `own`, renamed or as they are; None when the sets differ.

    They are found by name, numbers by value. A map may also be for the labels of the data alone.
    """
    if labels is None:
        return list(range(len(own)))
    for names in (renamed(own, label_map), own):
        order = [index for index in map(finder(names), labels) if index is not None]
        if len(labels) == len(own) and sorted(order) == list(range(len(own))):
            return order
    return None


def _reorder(output: nn.Linear, order: list[int] | None) -> None:
    """Put the rows of the last layer in this order; some heads have no bias."""
    if order is None or order == sorted(order):
        return
    with torch.no_grad():
        for parameter in output.parameters():
            parameter.copy_(parameter[order].clone())


def _renew(output: nn.Linear, spread: float, seed: int) -> None:
    """Draw the rows of the labels anew: those of the checkpoint belong to other labels."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        output.weight.copy_(torch.empty_like(output.weight).normal_(0.0, spread, generator=generator))
        if output.bias is not None:
            output.bias.zero_()


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")


def _check_loading(net: Any, info: Mapping[str, Any], source: str, keep_head: bool, need_head: bool) -> tuple[str, ...]:
    """Accept a checkpoint only when nothing but a head that is not needed, or an unused pooler, is new."""
    for layout, part in ((BITMASK, ".bitmask"), (MASKED, ".mask_scores")):
        if any(name.endswith(part) for name in info["unexpected_keys"]):
            raise sparse_refusal(source, layout)
    inside = f"{net.base_model_prefix}."
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
    pooler = any("pooler" in name for name in missing)
    return (f"{source} has no pooler; a new one was drawn from the seed",) if pooler else ()


def _check_shapes(wrong: Mapping[str, Sequence[Any]], net: Any, source: str) -> None:
    """Refuse weights (name -> shape in the file, shape in the network) that are not those of the configuration."""
    if not wrong:
        return
    first, (stored, expected) = next(iter(wrong.items()))
    if all(name.startswith(f"{_output(net)[0]}.") for name in wrong):
        raise ModelError(
            f"the head of {source} has {stored[0]} outputs, its configuration {net.config.num_labels} names",
            "give id2label in config.json one name for each output",
        )
    raise ModelError(
        f"the weights of {source} are not those of its configuration: {len(wrong)} of another shape, first {first} "
        f"with {list(stored)} instead of {list(expected)}",
        "copy or download config.json and weights together",
    )


def _check_finite(net: Any, source: str) -> None:
    ends = {name: torch.stack(parameter.aminmax()) for name, parameter in net.named_parameters()}  # keep any NaN
    bad = [name for name, least_and_most in ends.items() if not bool(least_and_most.isfinite().all())]
    if bad:
        raise ModelError(
            f"the weights of {source} hold values that are not finite, in {len(bad)} tensors, first {bad[0]}"
        )


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer whose files lie in `folder`."""
    return _tokenizer(str(folder), str(folder))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer files in Hugging Face names, each atomically."""
    with files.scratch(folder / "tokenizer") as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(scratch.iterdir()):
            files.write_bytes(folder / path.name, path.read_bytes())


def rewritten(tokenizer: Any, backend: Mapping[str, Any]) -> Any:
    """The same tokenizer with `backend` for its tokenizer.json: opened anew, from that file and its settings alone.

    Raises `ModelError` for a backend that cannot be opened.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for name in {*TOKENIZER_FILES} - {"tokenizer_config.json", "chat_template.jinja"}:
            (Path(scratch) / name).unlink(missing_ok=True)
        (Path(scratch) / "tokenizer.json").write_text(json.dumps(backend), "utf-8")
        return _tokenizer(scratch, f"the rewritten {type(tokenizer).__name__}")


# Computing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Compute:
    """A device and the type to compute in; weights stay in 32 bits."""

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> Any:
        """Context in which matrix products run in `dtype`; nothing in 32 bits."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @property
    def precision(self) -> str:
        """Name of the type, such as `float32`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def token_budget(self) -> int:
        """Tokens of an evaluation batch, padding included."""
        return 4096 if self.device.type == "cpu" else 65536

    @property
    def name(self) -> str:
        """What the device is called, for reports."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else _processor()


def compute(hardware: Hardware) -> Compute:
    """Find the device and precision, and set the CPU threads. Raises `ConfigError` for a device that is not there."""
    _keep_out_of_tmpdir()
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    name = hardware.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[name.split(":")[0]]:
        raise ConfigError(f"there is no {name} device on this machine", "use --device cpu, or auto")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is no device", "cpu, cuda, or cuda:N with a number") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"there is no {name}, this machine has {torch.cuda.device_count()} CUDA devices")
    precision = hardware.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Compute(device=device, dtype=dtypes[precision])


def _keep_out_of_tmpdir() -> None:
    """Give torch a folder of the user for what it compiles: its own, in TMPDIR, has a name that others can foresee."""
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        folder = cache.cache_folder() / "torch"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def encode(
    model: Model, batches: Iterable[Batch], n_examples: int, n_outputs: int, on: Compute, pooling: str = "head"
) -> Generator[int, None, tuple[Tensor, Tensor]]:
    """Run every batch in eval mode without gradients; yields how many examples are done.

    Returns logits [n_outputs, C] in 32 bits and L2-normalised sentence vectors [N, H] in 16 bits, both on the device;
    in the order of the example ids, the logits of a head that answers per token in the order of all tokens. With
    `n_outputs` 0, no logits are kept.
    """
    was_training = model.net.training
    model.net.eval()
    done, logits, vectors = 0, torch.empty(0), torch.empty(0)
    with parametrize.cached():
        for batch in batches:
            with torch.inference_mode(), on.autocast():
                some_logits, some_vectors = forward(model, batch.inputs, pooling)
                some_vectors = torch.nn.functional.normalize(some_vectors.float(), dim=-1)
            if not done:
                logits = torch.empty(n_outputs, some_logits.shape[-1], device=on.device)
                vectors = torch.empty(n_examples, some_vectors.shape[1], device=on.device, dtype=torch.float16)
            if n_outputs:
                batch.put(some_logits.float(), logits)
            vectors[batch.ids] = some_vectors.half()
            done += len(batch.ids)
            yield done
    model.net.train(was_training)
    return logits, vectors


def encoded(
    model: Model,
    examples: Examples,
    on: Compute,
    event: Callable[..., Event],
    pooling: str = "head",
    *,
    logits: bool = True,
) -> Generator[Event, None, tuple[Tensor, Tensor]]:
    """Logits, if wanted, and sentence vectors of tokenised examples; yields `event(done, total)`. See `encode`."""
    rows = evaluation_batches(examples, on.token_budget)
    batches = (collate(examples, some, on.device) for some in rows)
    coding = encode(model, batches, len(examples), examples.n_outputs if logits else 0, on, pooling)
    with contextlib.closing(coding):  # or the cache of masked weights, which is global, would outlive a stopped run
        while True:
            try:
                yield event(done=next(coding), total=len(examples))
            except StopIteration as stop:
                found: tuple[Tensor, Tensor] = stop.value
                return found


def reload_dense(folder: Path, kind: str) -> Any:
    """The network in a stock folder, by plain `from_pretrained` in its stored type."""
    with _quiet():
        return _auto(kind).from_pretrained(folder, dtype="auto")


def place(model: Model, on: Compute) -> Model:
    """Move the network to the device, in place."""
    model.net.to(on.device)
    return model


def copy(model: Model) -> Model:
    """The same model with weights of its own."""
    return dataclasses.replace(model, net=deepcopy(model.net))


def longest_input(model: Model, wanted: int) -> int:
    """`wanted` tokens, or as many as tokenizer and position embeddings allow."""
    positions = getattr(model.net.config, "max_position_embeddings", None) or wanted
    for name, module in model.net.base_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            positions -= module.padding_idx + 1  # RoBERTa and its kin count positions from after the padding id
    return int(min(wanted, model.tokenizer.model_max_length, positions))


def save_config(model: Model, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the configuration under transformers' name, for weights of type `dtype`."""
    config = deepcopy(model.net.config)
    config.dtype, config.name_or_path = dtype, ""
    files.write_text(folder / "config.json", config.to_json_string(use_diff=False))


def check_stock(model: Model) -> None:
    """Raise `ModelError` for a sliced model: transformers has no configuration for layers of different sizes."""
    if model.is_sliced:
        raise ModelError(
            f"{model.source} is sliced: no configuration of transformers describes its layers",
            "export the artefact that it was made from, or use --to onnx",
        )


def save_dense(
    model: Model, folder: Path, tensors: Mapping[str, Tensor] | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Write a stock Hugging Face folder that plain `from_pretrained` loads; every file through `files`. `tensors` of
    type `dtype` are stored instead of the network's own.

    Raises:
        ModelError: the model is sliced, and transformers has no configuration for layers of different sizes.
    """
    check_stock(model)
    save_config(model, folder, dtype)
    own = model.net.state_dict() if tensors is None else tensors
    found = {name: tensor.cpu() for name, tensor in own.items()}
    files.write_tensors(folder / "model.safetensors", found, {"format": "pt"})
    save_tokenizer(model.tokenizer, folder)


def save_artifact(
    model: Model,
    out: Path,
    pruned: Sequence[str],
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor | sparse.Factors] | None = None,
    quantised: Collection[str] = (),
) -> sparse.Sizes:
    """Write the pruned model into OUT: weights in sparse coding, tokenizer, and `cap_config.json` last. `tensors` are
    stored instead of the network's own, the values of those in `quantised` as 8-bit codes."""
    own = model.net.state_dict() if tensors is None else tensors
    found = {name: tensor.cpu() if isinstance(tensor, Tensor) else tensor for name, tensor in own.items()}
    sizes = sparse.save(out / WEIGHTS_FILE, found, pruned, quantised=quantised)
    save_tokenizer(model.tokenizer, out)
    described = json.loads(model.net.config.to_json_string(use_diff=False)) | {"_name_or_path": ""}
    files.write_json(
        out / CONFIG_FILE,
        {
            "format_version": CONFIG_VERSION,
            "kind": model.kind,
            "labels": list(model.labels),
            "model_config": described,
            **settings,
            **_source_record(settings, out),
            **_cut_record(model.cut),
        },
    )
    return sizes


def _source_record(settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The task options for `cap_config.json`: where the data are, as seen from OUT and not from the root."""
    source = settings.get("source", {})
    place = source.get("data")
    return {"source": {**source, "data": os.path.relpath(Path(place).resolve(), out.resolve())}} if place else {}


def _cut_record(cut: Cut | None) -> dict[str, Any]:
    return {"sliced": {name: dataclasses.asdict(size) for name, size in cut.sizes.items()}} if cut else {}


def artifact_files(out: Path) -> list[Path]:
    """The files that a pruned model consists of, without its reports."""
    names = {WEIGHTS_FILE, CONFIG_FILE, *TOKENIZER_FILES}
    return sorted(path for path in out.iterdir() if path.name in names and path.is_file())
