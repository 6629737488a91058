"""The only boundary to transformers: load dense or pruned models, their sentence vectors, matrices and groups.

Letters: B batch, S tokens, H hidden size, C labels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from capcli import files, hub, sparse
from capcli.config import Hardware, TaskConfig, leaves
from capcli.errors import CapError, ConfigError, FileError, ModelError
from capcli.run import Event
from capcli.tasks import label_key
from capcli.tokens import Batch, Examples, collate, evaluation_batches

WEIGHTS_FILE, CONFIG_FILE = "model.cap.safetensors", "cap_config.json"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The matrices of one encoder layer and its heads, for structured pruning."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    ffn_in: nn.Linear
    ffn_out: nn.Linear
    n_heads: int


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture family.

    layers: path of the layer list below the base model. linears: the six matrices of a layer, in the order of `Layer`.
    vector: (net, output of the base model) -> sentence vector [B, H], what enters the classifier.
    classify: (net, vector) -> logits [B, C]. output: path of the last linear of the head, whose rows are the labels.
    """

    layers: str
    linears: tuple[str, ...]
    vector: Callable[[Any, Any], Tensor]
    classify: Callable[[Any, Tensor], Tensor]
    output: str


def _roberta_vector(net: Any, out: Any) -> Tensor:
    head = net.classifier
    vector: Tensor = torch.tanh(head.dense(head.dropout(out.last_hidden_state[:, 0])))
    return vector


def _electra_vector(net: Any, out: Any) -> Tensor:
    head = net.classifier
    vector: Tensor = head.activation(head.dense(head.dropout(out.last_hidden_state[:, 0])))
    return vector


_BERT_LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_BERT = Family(
    layers="encoder.layer",
    linears=_BERT_LINEARS,
    vector=lambda net, out: out.pooler_output,
    classify=lambda net, vector: net.classifier(net.dropout(vector)),
    output="classifier",
)
_ROBERTA = dataclasses.replace(
    _BERT,
    vector=_roberta_vector,
    classify=lambda net, vector: net.classifier.out_proj(net.classifier.dropout(vector)),
    output="classifier.out_proj",
)
FAMILIES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": dataclasses.replace(_ROBERTA, vector=_electra_vector),
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network with what is needed to use it: tokenizer, family, label names and the task kind."""

    net: Any
    tokenizer: Any
    family: Family
    labels: tuple[str, ...]
    kind: str
    source: str
    notes: tuple[str, ...] = ()

    @property
    def base_prefix(self) -> str:
        """Name of the base model inside the network, such as `bert`."""
        return str(self.net.base_model_prefix)

    def layers(self) -> list[Layer]:
        """The encoder layers, from the input upwards."""
        names = [field.name for field in dataclasses.fields(Layer)][:6]
        stack = self.net.base_model.get_submodule(self.family.layers)
        heads = self.net.config.num_attention_heads
        return [
            Layer(**dict(zip(names, map(layer.get_submodule, self.family.linears), strict=True)), n_heads=heads)
            for layer in stack
        ]

    def prunable(self) -> dict[str, nn.Linear]:
        """The prunable linear layers by the name of their weight, in reading order (section 3)."""
        prefix = f"{self.base_prefix}.{self.family.layers}"
        stack = self.net.get_submodule(prefix)
        return {
            f"{prefix}.{i}.{path}.weight": layer.get_submodule(path)
            for i, layer in enumerate(stack)
            for path in self.family.linears
        }

    def encoder_parameters(self) -> int:
        """Parameters of the layer stack: prunable matrices, biases and norms."""
        return sum(p.numel() for p in self.net.get_submodule(f"{self.base_prefix}.{self.family.layers}").parameters())


def forward(model: Model, inputs: Mapping[str, Tensor], pooling: str = "head") -> tuple[Tensor, Tensor]:
    """Logits [B, C] and the sentence vector [B, H] (section 2), not normalised.

    pooling: `head` is the vector that enters the classifier, `cls` the last state of the first token, `mean` the mean
    of the last states over real tokens.
    """
    out = model.net.base_model(**inputs)
    head_vector = model.family.vector(model.net, out)
    logits = model.family.classify(model.net, head_vector)
    if pooling == "head":
        return logits, head_vector
    if pooling == "cls":
        return logits, out.last_hidden_state[:, 0]
    weight = inputs["attention_mask"].unsqueeze(-1).to(out.last_hidden_state.dtype)
    return logits, (out.last_hidden_state * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def is_artifact(source: str) -> bool:
    """Whether `source` is a folder that `cap prune` wrote."""
    return (Path(source) / CONFIG_FILE).is_file()


def _stored(source: str) -> dict[str, Any]:
    """What `cap_config.json` of a pruned model says; empty for any other model. Raises `FileError`."""
    if not is_artifact(source):
        return {}
    path = Path(source) / CONFIG_FILE
    table = files.read_json(path)
    if not isinstance(table, dict):
        raise FileError(f"{path} is not a JSON object")
    return table


def stored_source(source: str) -> dict[str, Any]:
    """The task options that a pruned model was made with; empty for any other model. Raises `FileError`."""
    if not is_artifact(source):
        return {}
    stored = _stored(source).get("source")
    kinds = {item.name: kind for item, kind in leaves(TaskConfig)}
    if not isinstance(stored, dict) or not all(type(value) is kinds.get(name) for name, value in stored.items()):
        path = Path(source) / CONFIG_FILE
        raise FileError(f"{path}: source is missing or malformed", "prune again, or copy the whole folder")
    return stored


def stored_labels(source: str) -> tuple[str, ...]:
    """The labels of a pruned model; empty for any other model."""
    labels = _stored(source).get("labels")
    return tuple(map(str, labels)) if isinstance(labels, list) else ()


def stored_holdout(source: str) -> tuple[float, int]:
    """Share and seed of what a pruned model's run held out of its training set; (0, 0) for any other model."""
    table = _stored(source)
    share, seed = table.get("holdout"), table.get("seed")
    return (share, seed) if isinstance(share, float) and isinstance(seed, int) else (0.0, 0)


def load_artifact(folder: Path) -> Model:
    """Load a pruned model; every tensor must be there, none left over, shapes and dtypes as the network has them.

    Raises:
        FileError, ModelError: naming the file and the first differing tensors.
    """
    settings = files.read_json(folder / CONFIG_FILE)
    net, tensors = _build(settings, folder), sparse.load(folder / WEIGHTS_FILE)
    _check_tensors(net.state_dict(), tensors, folder / WEIGHTS_FILE)
    net.load_state_dict(tensors, strict=True)
    _check_finite(net, str(folder))
    labels = tuple(str(label) for label in settings["labels"])
    if len(labels) != net.config.num_labels:
        raise FileError(f"{folder / CONFIG_FILE} names {len(labels)} labels for {net.config.num_labels} outputs")
    kind, family = str(settings["kind"]), family_of(net.config.model_type, str(folder))
    return Model(
        net=net.eval(),
        tokenizer=_tokenizer(str(folder), str(folder)),
        family=family,
        labels=labels,
        kind=kind,
        source=str(folder),
    )


def _build(settings: Any, folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    path = folder / CONFIG_FILE
    if not isinstance(settings, dict) or settings.get("format_version") != sparse.FORMAT_VERSION:
        raise FileError(f"{path}: format_version is not {sparse.FORMAT_VERSION}", "update capcli, or prune again")
    table = settings.get("model_config")
    if not isinstance(table, dict) or not isinstance(settings.get("labels"), list) or "kind" not in settings:
        raise FileError(f"{path}: model_config, labels or kind is missing or of the wrong type")
    table = {name: value for name, value in table.items() if name not in ("model_type", "auto_map", "architectures")}
    try:
        config = AutoConfig.for_model(settings["model_config"].get("model_type"), **table)
        _check_size(config, folder / WEIGHTS_FILE)
        return AutoModelForSequenceClassification.from_config(config)
    except CapError:
        raise
    except Exception as error:
        raise FileError(f"{path}: model_config describes no model: {hub.first_line(error)}") from error


def _check_size(config: Any, weights: Path) -> None:
    """Refuse a configuration whose network is out of all proportion to the weight file, before it is built."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        net = AutoModelForSequenceClassification.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {entry.name: tuple(entry.shape) for entry in sparse.inspect(weights)}
    _check_names(expected, found, weights)


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
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

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
    """Load a dense checkpoint in 32-bit floats with a classification head for `labels`.

    A head that already knows these labels is kept, its rows put in the order of `labels`; otherwise the head is new,
    drawn from `seed`, unless `need_head`. `labels=None` takes the labels of the model itself. `label_map` renames the
    model's labels first.

    Raises:
        ModelError: unknown, incomplete, corrupt, pickled or remote-code models, or labels that do not match.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    path = hub.folder(source)
    config = _read(AutoConfig.from_pretrained, path, source)
    family = family_of(config.model_type, source)
    own = tuple((label_map or {}).get(name, name) for name in _own_labels(config))
    order = _label_order(own, labels)
    if need_head and order is None:
        raise ModelError(
            f"the labels of {source} ({_listed(own)}) are not those of the task ({_listed(labels or ())})",
            "map them by name with --label-map, or use a model that was fine-tuned on this task",
        )
    if need_head and kind == "regression" and len(own) != 1:
        raise ModelError(f"{source} has {len(own)} outputs; a regression needs a model with one")
    keep_head = order is not None
    if not keep_head:
        config.num_labels = len(labels or ()) or 1
    names = list(own if labels is None else labels) or ["score"]
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.problem_type = None
    torch.manual_seed(seed)
    hub.weights(path, source)
    net, info = _read(
        AutoModelForSequenceClassification.from_pretrained,
        path,
        source,
        config=config,
        output_loading_info=True,
        ignore_mismatched_sizes=not keep_head,
    )
    notes = _check_loading(info, family, source, keep_head, need_head)
    _check_finite(net, source)
    if not keep_head and f"{family.output}.weight" not in info["missing_keys"]:
        _renew(net.get_submodule(family.output), config.initializer_range, seed)
    if order is not None and order != list(range(len(order))):
        _reorder(net.get_submodule(family.output), order)
    tokenizer = _tokenizer(path, source)
    return Model(
        net=net.eval(), tokenizer=tokenizer, family=family, labels=tuple(names), kind=kind, source=source, notes=notes
    )


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
    order = _label_order([(label_map or {}).get(name, name) for name in model.labels], labels)
    if order is None:
        raise ModelError(
            f"the labels of {source} ({_listed(model.labels)}) are not those of the task ({_listed(labels or ())})"
        )
    _reorder(model.net.get_submodule(model.family.output), order)
    return dataclasses.replace(model, labels=tuple(labels or model.labels))


def family_of(model_type: str, source: str) -> Family:
    """The row of `FAMILIES`. Raises `ModelError` that lists them."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"{source} is a {model_type} model, which capcli cannot prune yet", "families: " + ", ".join(FAMILIES)
        )
    return FAMILIES[model_type]


def _tokenizer(path: str, source: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = _read(AutoTokenizer.from_pretrained, path, source)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up when there is no file
        raise ModelError(f"{source} has no tokenizer: tokenizer.json or vocab.txt is missing, or without words")
    return tokenizer


def _read(reader: Callable[..., Any], path: str, source: str, **options: Any) -> Any:
    """Call a `from_pretrained` safely: no pickle, no remote code, 32-bit floats; failures as one clear line."""
    if reader.__self__.__name__.startswith("AutoModel"):  # type: ignore[attr-defined]
        options |= {"use_safetensors": True, "dtype": torch.float32}
    try:
        with _quiet():
            return reader(path, trust_remote_code=False, **options)
    except Exception as error:
        raise hub.explained(error, path, source) from error


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


def _label_order(own: Sequence[str], labels: Sequence[str] | None) -> list[int] | None:
    """For each wanted label the index among `own`, compared by `label_key`; None when the sets differ."""
    if labels is None:
        return list(range(len(own)))
    key = label_key(own, labels)
    index = {key(name): i for i, name in enumerate(own)}
    wanted = [key(name) for name in labels]
    return [index[name] for name in wanted] if set(wanted) == set(index) and len(wanted) == len(own) else None


def _reorder(output: nn.Linear, order: list[int]) -> None:
    with torch.no_grad():
        output.weight.copy_(output.weight[order].clone())
        output.bias.copy_(output.bias[order].clone())


def _renew(output: nn.Linear, spread: float, seed: int) -> None:
    """Draw the rows of the labels anew: those of the checkpoint belong to other labels."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        output.weight.copy_(torch.empty_like(output.weight).normal_(0.0, spread, generator=generator))
        output.bias.zero_()


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (", …" if len(labels) > 5 else "")


def _check_loading(
    info: Mapping[str, Any], family: Family, source: str, keep_head: bool, need_head: bool
) -> tuple[str, ...]:
    """Accept a checkpoint only when nothing but a head that is not needed, or an unused pooler, is new."""
    missing = sorted(info["missing_keys"])
    head = family.output.split(".")[0]
    lost = [name for name in missing if not name.startswith(head) and (need_head or ".pooler." not in f".{name}")]
    wrong = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in info["mismatched_keys"]]
    lost += [name for name in wrong if keep_head or not name.startswith(head)]
    if lost or (need_head and any(name.startswith(head) for name in missing)):
        first = ", ".join((lost or missing)[:3])
        raise ModelError(
            f"the weights of {source} are incomplete: {len(lost or missing)} missing or misshapen, first {first}"
        )
    pooler = any("pooler" in name for name in missing)
    return (f"{source} has no pooler; a new one was drawn from the seed",) if pooler else ()


def _check_finite(net: Any, source: str) -> None:
    bad = [name for name, parameter in net.named_parameters() if not bool(parameter.isfinite().all())]
    if bad:
        raise ModelError(
            f"the weights of {source} hold values that are not finite, in {len(bad)} tensors, first {bad[0]}"
        )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer files in Hugging Face names, each atomically."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).iterdir()):
            files.write_bytes(folder / path.name, path.read_bytes())


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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def encode(
    model: Model, batches: Iterable[Batch], n_examples: int, on: Compute, pooling: str = "head"
) -> Generator[int, None, tuple[Tensor, Tensor]]:
    """Run every batch in eval mode without gradients; yields how many examples are done.

    Returns logits [N, C] in 32 bits and L2-normalised sentence vectors [N, H] in 16 bits, both on the device and in
    the order of the example ids.
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
                logits = torch.empty(n_examples, some_logits.shape[1], device=on.device)
                vectors = torch.empty(n_examples, some_vectors.shape[1], device=on.device, dtype=torch.float16)
            logits[batch.ids] = some_logits.float()
            vectors[batch.ids] = some_vectors.half()
            done += len(batch.ids)
            yield done
    model.net.train(was_training)
    return logits, vectors


def encoded(
    model: Model, examples: Examples, on: Compute, event: Callable[..., Event], pooling: str = "head"
) -> Generator[Event, None, tuple[Tensor, Tensor]]:
    """Logits and sentence vectors of tokenised examples as `encode` gives them; yields `event(done, total)`."""
    rows = evaluation_batches(examples, on.token_budget)
    coding = encode(model, (collate(examples, some, on.device) for some in rows), len(examples), on, pooling)
    with contextlib.closing(coding):  # or the cache of masked weights, which is global, would outlive a stopped run
        while True:
            try:
                yield event(done=next(coding), total=len(examples))
            except StopIteration as stop:
                found: tuple[Tensor, Tensor] = stop.value
                return found


def reload_dense(folder: Path) -> Any:
    """The network in a stock folder, by plain `from_pretrained` in its stored type."""
    from transformers import AutoModelForSequenceClassification

    with _quiet():
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto")


def place(model: Model, on: Compute) -> Model:
    """Move the network to the device, in place."""
    model.net.to(on.device)
    return model


def copy(model: Model) -> Model:
    """The same model with weights of its own."""
    return dataclasses.replace(model, net=deepcopy(model.net))


def longest_input(model: Model, wanted: int) -> int:
    """`wanted` tokens, or as many as tokenizer and position embeddings allow."""
    config = model.net.config
    positions = getattr(config, "max_position_embeddings", wanted)
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta") else 0
    return int(min(wanted, model.tokenizer.model_max_length, positions - offset))


def save_dense(model: Model, folder: Path) -> None:
    """Write a stock Hugging Face folder that plain `from_pretrained` loads; every file through `files`."""
    files.write_text(folder / "config.json", model.net.config.to_json_string(use_diff=False))
    tensors = {name: tensor.cpu() for name, tensor in model.net.state_dict().items()}
    files.write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    save_tokenizer(model.tokenizer, folder)


def save_artifact(model: Model, out: Path, pruned: Sequence[str], settings: Mapping[str, Any]) -> sparse.Sizes:
    """Write the pruned model into OUT: weights in sparse coding, tokenizer, and `cap_config.json` last."""
    tensors = {name: tensor.cpu() for name, tensor in model.net.state_dict().items()}
    sizes = sparse.save(out / WEIGHTS_FILE, tensors, pruned)
    save_tokenizer(model.tokenizer, out)
    described = json.loads(model.net.config.to_json_string(use_diff=False))
    files.write_json(
        out / CONFIG_FILE,
        {
            "format_version": sparse.FORMAT_VERSION,
            "kind": model.kind,
            "labels": list(model.labels),
            "model_config": described,
            **settings,
        },
    )
    return sizes


def artifact_files(out: Path) -> list[Path]:
    """The files that a pruned model consists of, without its reports."""
    names = {
        WEIGHTS_FILE,
        CONFIG_FILE,
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
    }
    return sorted(path for path in out.iterdir() if path.name in names)
