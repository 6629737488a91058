"""Readers of sparse checkpoints whose own tools no longer read them; each becomes a dense network with its zeros.

bitmask: compressed-tensors up to 0.14, format `sparse-bitmask`. Of a pruned tensor [R, C] the file holds, all under one
stem, `.shape` (int64: R, C), `.compressed` [k] (the kept values in row-major order), `.bitmask` (uint8 [R, ceil(C/8)],
rows padded with zeros, lowest bit first) and `.row_offsets` (int64 [R], how many values stand before each row). From
0.9 on the stem of `a.b.weight` is `a.b`, before that `a.b.weight`; vectors have one row, and one offset without shape.

masked: movement pruning as published in the research projects of transformers. A matrix `a.b.weight` stands whole, with
`a.b.mask_scores` of the same shape; the configuration says how scores become a mask, and not with what threshold.

Letters: R rows, C columns, k kept values.
"""

from __future__ import annotations

import contextlib
import math
import reprlib
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from capcli import hub, models, refusals
from capcli.errors import ConfigError, FileError, ModelError
from capcli.refusals import BITMASK, CONFIG, MASKED

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 40_000  # a compressed tensor is four
MAX_NAME_CHARS = 256
FLOATS = ("F16", "BF16", "F32", "F64")
PARTS = ("shape", "compressed", "bitmask", "row_offsets")
PARAMETERS = ("weight", "bias", "gamma", "beta")  # a stem that ends so is the whole name
SCORES = ".mask_scores"
QUANTISED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_global_scale", "input_scale")
KINDS = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "tokens",
    "ForQuestionAnswering": "spans",
}
PROBLEMS = {"regression": "regression", "multi_label_classification": "multilabel"}
# What a masked BERT shares with a plain one; nothing else of its configuration is read.
MASKED_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
    "initializer_range", "layer_norm_eps", "pad_token_id", "num_labels", "id2label", "problem_type",
)  # fmt: skip
L0_LEFT, L0_RIGHT = -0.1, 1.1  # the stretch of the hard concrete gate
LEAST_KEPT = 0.005  # a threshold on scores keeps more than this share of each matrix


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor as the header of a weight file has it."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"{self.path}: tensor {_show(self.name)}"


def layout(folder: Path) -> str | None:
    """`bitmask` or `masked`, by configuration and headers alone; None when the folder is no legacy checkpoint.

    Raises `FileError` or `ModelError` for files that cannot be read.
    """
    found = refusals.sparse_layout(refusals.model_json(folder / CONFIG))
    if found is not None:
        return found
    names = _headers(folder)
    if any(name.endswith(SCORES) for name in names):
        return MASKED
    return BITMASK if any(name.endswith(".bitmask") for name in names) else None


def load(folder: Path, threshold: float | None) -> models.Model:
    """The network of a checkpoint with its zeros in place, in 32-bit floats, with its tokenizer, labels and kind.

    Also a dense checkpoint that stores its zeros is read, and checked as strictly. `threshold` is for masks alone, see
    `METHODS`.

    Raises:
        ConfigError: a threshold that is missing, out of range or not used. FileError: a malformed weight file.
        ModelError: a configuration that is of no known kind, or does not fit the weights.
    """
    config = refusals.model_json(folder / CONFIG)
    kind = _kind(config, folder)
    found = layout(folder)
    if found != MASKED:
        _check_unused(threshold, folder, "its file says what is zero")
        tensors = _read_bitmask(_headers(folder))
        return models.from_tensors(tensors, _described(config), folder, kind)
    _check_bert(config, folder)
    plain = {name: config[name] for name in MASKED_FIELDS if name in config} | {"model_type": "bert"}
    return models.from_tensors(_read_masked(folder, config, threshold), plain, folder, kind)


def zeros(model: models.Model) -> int:
    """How many weights of the prunable matrices are zero."""
    return model.before_slicing.prunable - model.nonzero()


def _kind(config: Mapping[str, Any], folder: Path) -> str:
    """The kind of task, by the architecture's name; what a class of that name would do is never asked."""
    stated = config.get("architectures")
    name = str(stated[0]) if isinstance(stated, list) and stated else ""
    kind = next((kind for end, kind in KINDS.items() if name.endswith(end)), None)
    if kind is None:
        raise ModelError(
            f"{folder / CONFIG}: architectures: expected one that ends in {', '.join(KINDS)}, got {_show(stated)}",
            "a model without the head of a task has nothing to evaluate",
        )
    if kind != "classification":
        return kind
    names = config.get("id2label")
    n_labels = config.get("num_labels", len(names) if isinstance(names, dict) else 2)
    return PROBLEMS.get(str(config.get("problem_type")), "regression" if n_labels == 1 else kind)


def _described(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what names code, kernels or formats."""
    return {
        name: value for name, value in config.items() if name not in refusals.NEVER_READ and not name.startswith("_")
    }


# Files ---------------------------------------------------------------------------------------------------------------


def _headers(folder: Path) -> dict[str, Stored]:
    """The tensors of all weight files by name; no value is read. Position ids, which are no weights, are left out."""
    found: dict[str, Stored] = {}
    for path in (folder / name for name in hub.weight_files(folder)):
        for entry in _header(path):
            _check(entry.name not in found, entry.where, "stored", "once", "also in another file")
            found[entry.name] = entry
    return {name: entry for name, entry in found.items() if "position_ids" not in name.split(".")[-2:]}


def _header(path: Path) -> list[Stored]:
    with _opened(path) as file:
        names = file.keys()
        _check(len(names) <= MAX_TENSORS, str(path), "number of tensors", f"at most {MAX_TENSORS:,}", len(names))
        for name in names:
            _check(
                name.isprintable() and len(name) <= MAX_NAME_CHARS,
                str(path),
                "names",
                f"up to {MAX_NAME_CHARS} printable characters",
                name,
            )
        slices = {name: file.get_slice(name) for name in names}
        return [
            Stored(path=path, name=name, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
            for name, part in slices.items()
        ]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file whose header has been validated; whatever goes wrong becomes a `FileError` that names it."""
    try:
        # Looked at before it is opened, because opening a FIFO waits and opening a device can do anything.
        _check(stat.S_ISREG(path.stat().st_mode), str(path), "kind of file", "a regular file", "something else")
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        _check(length <= MAX_HEADER_BYTES, str(path), "header bytes", f"at most {MAX_HEADER_BYTES:,}", length)
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, MemoryError) as error:
        raise FileError(f"cannot read {path}: {hub.first_line(error)}") from error
    except SafetensorError as error:
        raise FileError(f"{path} is damaged: {hub.first_line(error)}", "copy or download it again") from error


def _read(entry: Stored) -> Tensor:
    """The values of a tensor."""
    with _opened(entry.path) as file:
        tensor: Tensor = file.get_tensor(entry.name)
        return tensor


def _read_floats(entry: Stored) -> Tensor:
    """The values of a weight, which must be finite numbers in full precision."""
    last = entry.name.rsplit(".", 1)[-1]
    if last in QUANTISED or entry.dtype not in FLOATS:
        raise ModelError(
            f"{entry.where}: the weights are quantised ({last}, {entry.dtype})",
            "use the model in full precision that it was made from",
        )
    tensor = _read(entry)
    _check(tensor.isfinite().all(), entry.where, "values", "finite numbers", "NaN or infinity")
    return tensor


# Bitmasks ------------------------------------------------------------------------------------------------------------


def _read_bitmask(headers: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Every tensor of the network, those that are not compressed as they are."""
    packed: dict[str, dict[str, Stored]] = {}
    dense = {}
    for name, entry in headers.items():
        stem, _, part = name.rpartition(".")
        if part in PARTS:
            packed.setdefault(stem, {})[part] = entry
        else:
            dense[name] = entry
    tensors: dict[str, Tensor] = {}
    for stem, parts in packed.items():
        name = stem if stem.rpartition(".")[2] in PARAMETERS else f"{stem}.weight"
        some = next(iter(parts.values()))
        _check(name not in dense and name not in tensors, some.where, f"forms of {_show(name)}", "one", "two")
        tensors[name] = _unpacked(parts, some)
    return tensors | {name: _read_floats(entry) for name, entry in dense.items()}


def _unpacked(parts: Mapping[str, Stored], some: Stored) -> Tensor:
    """A dense tensor [R, C], or [C], from its parts; `some` is one of them."""
    missing = [part for part in PARTS if part not in parts]
    _check(not missing, some.where, "parts beside it", ", ".join(PARTS), f"no {', '.join(missing)}")
    shape = _shape(parts)
    rows, columns = (1, *shape)[-2:]
    mask = _mask(parts["bitmask"], rows, columns)
    values = _read_floats(parts["compressed"])
    kept = np.count_nonzero(mask)
    _check(kept == len(values), parts["bitmask"].where, "bits set", len(values), kept)
    counts = np.count_nonzero(mask, axis=1)
    offsets = _read(parts["row_offsets"]).reshape(rows).numpy()
    wrong = np.flatnonzero(offsets != np.cumsum(counts) - counts)
    _check(not wrong.size, parts["row_offsets"].where, "values", "the bits set before each row", offsets[wrong[:1]])
    dense = torch.zeros(rows, columns, dtype=values.dtype)
    dense[torch.from_numpy(mask)] = values
    return dense.reshape(shape)


def _shape(parts: Mapping[str, Stored]) -> tuple[int, ...]:
    """The shape of the dense tensor, when those of all parts agree with it; nothing large is read or allocated."""
    stated = parts["shape"]
    dims = stated.shape
    _check(stated.dtype == "I64" and dims in ((1,), (2,)), stated.where, "type", "I64 [1] or [2]", _type(stated))
    shape = tuple(_read(stated).tolist())
    _check(min(shape) > 0, stated.where, "sizes", "at least 1", shape)
    rows, columns = (1, *shape)[-2:]
    masks = (*shape[:-1], -(-columns // 8))
    expected = {"bitmask": (("U8",), masks), "row_offsets": (("I64",), shape[:-1])}
    for part, (dtypes, wanted) in expected.items():
        entry = parts[part]
        ok = entry.dtype in dtypes and entry.shape == wanted
        _check(ok, entry.where, "type", f"{dtypes[0]} {list(wanted)}", _type(entry))
    values = parts["compressed"]
    ok = len(values.shape) == 1 and values.shape[0] <= rows * columns
    _check(ok, values.where, "shape", f"one size, up to {rows * columns:,}", list(values.shape))
    return shape


def _mask(entry: Stored, rows: int, columns: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Where values are kept, booleans [R, C]."""
    packed = _read(entry).reshape(rows, -1).numpy()
    bits = np.unpackbits(packed, axis=1, bitorder="little").view(bool)
    _check(not bits[:, columns:].any(), entry.where, "padding bits", "zero", "one")
    return bits[:, :columns]


# Masks ---------------------------------------------------------------------------------------------------------------


def _top(scores: Tensor, share: float) -> Tensor:
    """True at the floor(share · n) highest of n scores; of equal ones, the first."""
    order = scores.flatten().sort(descending=True, stable=True).indices[: int(share * scores.numel())]
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.reshape(scores.shape)


def _above(values: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """True where `values` are above the threshold; at least 0.5 % of them, as the published code has it."""
    n = scores.numel()
    least = int(LEAST_KEPT * n) + 1
    mask = values > threshold
    if int(mask.sum()) >= least:
        return mask
    return scores > scores.flatten().kthvalue(max(n - least, 1)).values


def _gate(scores: Tensor) -> Tensor:
    """The hard concrete gate in evaluation: a factor from 0 to 1."""
    return (scores.sigmoid() * (L0_RIGHT - L0_LEFT) + L0_LEFT).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a weight and its scores become a factor per weight, and which thresholds make sense; None for none."""

    factor: Callable[[Tensor, Tensor, float], Tensor]
    range: str | None
    allowed: Callable[[float], bool] = math.isfinite
    scored: bool = True


METHODS = {
    "topK": Method(
        factor=lambda weight, scores, share: _top(scores, share),
        range="the share of weights to keep, above 0 and up to 1",
        allowed=lambda share: 0 < share <= 1,
    ),
    "magnitude": Method(
        factor=lambda weight, scores, share: _top(weight.abs(), share),
        range="the share of weights to keep, above 0 and up to 1",
        allowed=lambda share: 0 < share <= 1,
        scored=False,
    ),
    "sigmoied_threshold": Method(  # the name as its authors spell it
        factor=lambda weight, scores, threshold: _above(scores.sigmoid(), scores, threshold),
        range="what the sigmoid of a score must exceed, from 0 to below 1",
        allowed=lambda threshold: 0 <= threshold < 1,
    ),
    "threshold": Method(
        factor=lambda weight, scores, threshold: _above(scores, scores, threshold),
        range="what a score must exceed, any number",
    ),
    "l0": Method(factor=lambda weight, scores, _: _gate(scores), range=None),
}


def _read_masked(folder: Path, config: Mapping[str, Any], threshold: float | None) -> dict[str, Tensor]:
    """Every tensor of the network, with zeros where the mask has them; the scores are dropped."""
    headers = _headers(folder)
    stated = config.get("pruning_method")
    method = METHODS.get(str(stated))
    if method is None:
        where = f"{folder / CONFIG}: pruning_method"
        raise ModelError(f"{where}: expected one of {', '.join(METHODS)}, got {_show(stated)}")
    scores = {f"{name.removesuffix(SCORES)}.weight": e for name, e in headers.items() if name.endswith(SCORES)}
    tensors = {name: _read_floats(entry) for name, entry in headers.items() if not name.endswith(SCORES)}
    matrices = [name for name in tensors if ".layer." in name and name.endswith(".weight") and tensors[name].dim() == 2]
    if method.scored and not scores:
        _check_zeros(tensors, matrices, folder, str(stated))
        _check_unused(threshold, folder, "it holds no mask_scores, and its zeros are stored")
        return tensors
    _check_scores(scores, tensors, matrices if method.scored else [], folder)
    chosen = _threshold(method, threshold, folder, str(stated))
    for name in matrices:
        weight = tensors[name].float()
        factor = method.factor(weight, _read_floats(scores[name]).float() if method.scored else weight, chosen)
        tensors[name] = torch.where(factor != 0, weight * factor, torch.zeros_like(weight))  # 0.0, never -0.0
    return tensors


def _check_bert(config: Mapping[str, Any], folder: Path) -> None:
    model_type = config.get("model_type")
    if model_type not in ("masked_bert", "bert"):
        raise ModelError(
            f"{folder / CONFIG}: model_type of a masked model: expected masked_bert, got {_show(model_type)}"
        )


def _check_scores(
    scores: Mapping[str, Stored], tensors: Mapping[str, Tensor], matrices: list[str], folder: Path
) -> None:
    """Every matrix has scores of its own shape, and nothing else has any."""
    for name, entry in scores.items():
        _check(name in matrices, entry.where, "beside it", f"a matrix {_show(name)} of a layer that has scores", "none")
        shape = tuple(tensors[name].shape)
        if entry.shape != shape:
            raise ModelError(
                f"{entry.where}: expected {list(shape)}, one score per weight, got {list(entry.shape)}",
                "scores per row, column or block are not read",
            )
    lost = [name for name in matrices if name not in scores]
    if lost:
        raise ModelError(
            f"{folder}: {len(lost)} of {len(matrices)} matrices have no mask_scores, first {_show(lost[0])}"
        )


def _check_zeros(tensors: Mapping[str, Tensor], matrices: list[str], folder: Path, method: str) -> None:
    if not any((tensors[name] == 0).any() for name in matrices):
        raise ModelError(
            f"{folder} was pruned by {method}, and holds neither mask_scores nor zeros",
            "the scores are needed: use the checkpoint as it was trained",
        )


def _threshold(method: Method, threshold: float | None, folder: Path, name: str) -> float:
    """The threshold, or 0 for a method without one. Raises `ConfigError`."""
    if method.range is None:
        _check_unused(threshold, folder, f"{name} has none")
        return 0.0
    if threshold is None:
        raise ConfigError(
            f"{folder} was pruned by {name}, whose --threshold is not in its files", f"it is {method.range}"
        )
    if not method.allowed(threshold):
        raise ConfigError(f"--threshold {threshold:g} is out of range for {name}", f"it is {method.range}")
    return threshold


def _check_unused(threshold: float | None, folder: Path, why: str) -> None:
    if threshold is not None:
        raise ConfigError(f"--threshold {threshold:g} is of no use for {folder}: {why}", "leave it out")


# Messages ------------------------------------------------------------------------------------------------------------


def _check(ok: object, where: str, what: str, expected: object, got: object) -> None:
    if not ok:
        raise FileError(f"{where}: {what}: expected {expected}, got {_show(got)}", "copy or download it again")


def _type(entry: Stored) -> str:
    return f"{entry.dtype} {list(entry.shape)}"


def _show(value: object) -> str:
    """A short one-line text without control characters, whatever a file put there."""
    return _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100
