"""What is refused of a model, by the names of its files and by what its JSON files say: the reason and the way out."""

from __future__ import annotations

import math
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from capcli.errors import FileError, ModelError
from capcli.reporting.text import first_few
from capcli.stored import read_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GRAPH = "model.onnx"
# What sentence-transformers has beside: the modules, of which one pools in a folder below; lengths; prompts.
MODULES, TRANSFORMER, SETTINGS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
ARTEFACT, SPARSE = "cap_config.json", "model.cap.safetensors"  # of a pruned model
REPORT, RECORD = "report.json", "export.json"  # what `cap prune` and `cap export` write last
WORDS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "sentencepiece.bpe.model",
    "spm.model",
    "spiece.model",
    "tokenizer.model",
)
TOKENIZER_FILES = (
    *WORDS,
    "merges.txt",
    "bpe.codes",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# What never reaches transformers from the configuration of a file that is not trusted: names of code, kernels, formats.
NEVER_READ = (
    *("architectures", "auto_map", "quantization_config", "compression_config", "sparsity_config", "dtype"),
    *("torch_dtype", "attn_implementation", "experts_implementation", "transformers_version"),
    *("return_dict", "chunk_size_feed_forward"),  # how a network is called, which is for the caller to say
)
MAX_TOKENIZER_BYTES = 100_000_000
MAX_LABELS = 100_000
MAX_COUNT = 4096  # of layers, experts and other parts: no model has as many
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers")
FEW_LAYERS = 64  # that may share their weights, as ALBERT's do
_PARTS = re.compile(r"(?:.*_)?(?:layers?|blocks?|depths?|experts?|groups?|group_num|heads?|stages?|replace)")
_PADDED_TO = re.compile(r"attention_window|(?:.*_)?chunk_length")  # inputs are padded to a multiple of these
REPEATED = ("attention_types",)  # [[names, how often], ...], of which transformers makes one list
_LABELS = re.compile(r"(?:.*_)?(?:labels?|class(?:es)?)")
# Sizes in config.json, in the words of the families, and those that may be 0.
SIZES = (
    *("hidden_size", "d_model", "dim", "n_embd", "embedding_size", "intermediate_size", "hidden_dim", "d_ff"),
    *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers", "vocab_size"),
    *("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads", "num_key_value_heads"),
    *("decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim", "num_hidden_groups", "inner_group_num"),
    *("head_dim", "n_inner", "max_position_embeddings", "pooler_hidden_size", "num_labels"),
)
ZERO_SIZES = ("type_vocab_size",)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
OTHER_FORMATS = {".gguf": "GGUF", ".onnx": "ONNX"}
BITMASK, MASKED = "bitmask", "masked"  # layouts of sparse checkpoints that `models.legacy` reads
QUANTISATION = ("config_groups", "kv_cache_scheme", "transform_config")  # what bitmask alone does not say
SAVE_AGAIN = "load it once with transformers, in an environment you trust, and save_pretrained writes safetensors"


def unfinished(source: str) -> ModelError:
    """The error for a run that was stopped."""
    return ModelError(f"{source} is an unfinished run", "run the same cap prune command again to finish it")


def check_names(names: Collection[str], source: str, *, local: bool) -> None:
    """Refuse a folder or repository by the names of its files, before anything is read or fetched."""
    if local and "work" in names and not {CONFIG, ARTEFACT} & set(names):
        raise unfinished(source)
    if ARTEFACT in names:
        raise ModelError(
            f"{source} is a pruned model, but a dense one is needed here",
            f"use the model that it was made from, or convert it: cap export {source} --to dense",
        )
    if SPARSE in names:
        raise ModelError(f"{source} is a pruned model without its {ARTEFACT}", "copy the whole folder")
    if "adapter_config.json" in names:
        raise ModelError(
            f"{source} is an adapter, not a complete model",
            "merge it into its base model first: PEFT's merge_and_unload, then save_pretrained",
        )
    _check_formats(names, source, local)
    if CONFIG not in names:
        inside = sorted(f"{source}/{Path(name).parent}" for name in names if name.endswith(f"/{CONFIG}"))
        hint = "MODEL must be a folder or hub id in Hugging Face layout, or a folder written by cap"
        if inside:
            way = "give that folder" if local else "download it and give that folder"
            hint = f"there is one in {first_few(inside, 3)}: {way}"
        raise ModelError(f"{source} has no {CONFIG}", hint)


def check_words(names: Collection[str], source: str) -> None:
    """Refuse a model without a tokenizer that can be read; transformers would make one up."""
    if any(name in names for name in WORDS):
        return
    pickled = sorted(name for name in names if "token" in name and name.endswith(PICKLES))
    if pickled:
        raise ModelError(
            f"the tokenizer of {source} is a pickle ({pickled[0]})",
            "pickles are never read; save it with save_pretrained of transformers, which writes tokenizer.json",
        )
    raise ModelError(
        f"{source} has no tokenizer: tokenizer.json or vocab.txt is missing",
        "save it there with save_pretrained of transformers",
    )


def _check_formats(names: Collection[str], source: str, local: bool) -> None:
    """Refuse weights in other formats, where there are no safetensors."""
    if WEIGHTS in names or INDEX in names:
        return
    pickles = sorted(name for name in names if name.endswith(PICKLES) and "token" not in name)
    others = sorted(name for name in names if Path(name).suffix in OTHER_FORMATS)
    if GRAPH in names:
        return  # which `cap eval` reads; who needs weights is refused by `hub.weights`
    if pickles:
        revision = "" if local else f"; or name a revision that has them, such as {source.partition('@')[0]}@refs/pr/1"
        raise ModelError(
            f"{source} has no {WEIGHTS}, only pickled weights ({pickles[0]})",
            f"pickles can run code and are never read; {SAVE_AGAIN}{revision}",
        )
    if others:
        raise other_format(others[0], source)


def other_format(name: str, source: str) -> ModelError:
    """The error for weights in a format that is not read; `name` is that of the file."""
    return ModelError(
        f"{source} has {OTHER_FORMATS[Path(name).suffix]} weights only ({name})",
        f"capcli reads {WEIGHTS}: use the model that this one was converted from",
    )


def check_files(here: Path, source: str) -> None:
    """Refuse a folder with anything but files and folders in it, and tokenizer files that are too large to be any.

    A library that opens a FIFO waits forever, and one that opens a device can do anything.
    """
    for path in here.iterdir():
        if not path.exists():
            continue
        found = path.stat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise ModelError(f"{path} is not a regular file", "remove it, or copy the files of the model elsewhere")
        if path.name in TOKENIZER_FILES and found.st_size > MAX_TOKENIZER_BYTES:
            raise ModelError(
                f"{path} is larger than {MAX_TOKENIZER_BYTES:,} bytes, too large for a tokenizer of {source}",
                "copy or download it again",
            )


def check_sizes(config: Mapping[str, Any], where: object, n_tensors: int = MAX_COUNT) -> None:
    """Refuse a configuration with more layers, labels and such than models have, or than `n_tensors` can be of.

    transformers makes lists of them before it looks at any weight.
    """
    rest: list[tuple[Any, Any]] = [("", config)]
    while rest:
        name, value = rest.pop()
        if isinstance(value, dict):
            _check_count(name, len(value), MAX_LABELS, where)
            rest += value.items()
        elif name in REPEATED and isinstance(value, list):
            _check_count(name, sum(map(_repeated, value)), MAX_COUNT, where)
        elif isinstance(value, list):
            rest += ((name, item) for item in value)
        elif name in LAYER_COUNTS and value is not None:
            _check_count(name, value, min(MAX_COUNT, max(n_tensors, FEW_LAYERS)), where)
        elif type(value) is int and value > 0 and (_PARTS.fullmatch(name) or _PADDED_TO.fullmatch(name)):
            _check_count(name, value, MAX_COUNT, where)
        elif type(value) is int and value > 0 and _LABELS.fullmatch(name):
            _check_count(name, value, MAX_LABELS, where)


def _repeated(pair: object) -> int:
    """How many names [names, how often] stands for; none where it is something else, which transformers refuses."""
    names, times = pair if isinstance(pair, list) and len(pair) == 2 else ((), 0)
    return len(names) * max(0, times) if isinstance(names, list | str) and type(times) is int else 0


def _check_count(name: str, value: object, most: int, where: object) -> None:
    if type(value) is not int or not 0 <= value <= most:
        raise ModelError(f"{where}: {name[:40]}: expected an integer up to {most:,}, got {str(value)[:40]!r}")


def check_config(here: Path, source: str, *, legacy: bool = False) -> None:
    """Refuse a model whose JSON files ask for code of its own, or whose weights are quantised.

    Sparse checkpoints of other tools are refused too, unless `legacy`: transformers would take random weights for them.
    """
    config = model_json(here / CONFIG)
    check_sizes(config, here / CONFIG)
    tokenizer = model_json(here / "tokenizer_config.json") if (here / "tokenizer_config.json").is_file() else {}
    if config.get("auto_map") or tokenizer.get("auto_map"):
        where = CONFIG if config.get("auto_map") else "tokenizer_config.json"
        raise ModelError(
            f"{source} needs its own code (auto_map in {where}); capcli never runs code from a model",
            "use a model whose architecture is part of transformers, or convert it to one",
        )
    layout, table = sparse_layout(config), _compression(config)
    quantised = layout != BITMASK or any(table.get(key) for key in QUANTISATION)
    if table and quantised:
        method = ", ".join(map(str, filter(None, (table.get("quant_method"), _sparse_format(config)))))
        raise ModelError(
            f"the weights of {source} are quantised{f' ({method})' if method else ''}",
            "use the model in full precision that it was made from",
        )
    if layout and not legacy:
        raise sparse_refusal(source, layout)
    check_description(config, f"{CONFIG} of {source}")


def check_description(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration with sizes or names of labels that no network has. Raises `ModelError`."""
    _check_sizes(config, where)
    _check_labels(config, where)


def _check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Refuse sizes and counts that no network has; transformers would fail on some of them only as it computes."""
    for name in (*SIZES, *ZERO_SIZES):
        value, least = config.get(name), int(name not in ZERO_SIZES)
        unclear = value is None or isinstance(value, list)  # some families have one for each layer; transformers knows
        if not unclear and (type(value) is not int or value < least):
            raise _expected(where, name, f"a whole number of at least {least}", value)


def _check_labels(config: Mapping[str, Any], where: str) -> None:
    """Refuse names of labels that do not say which output each of them belongs to."""
    names, ids = (config.get(key) or {} for key in ("id2label", "label2id"))
    example = 'id2label reads {"0": "negative", "1": "positive"}, and label2id the other way round'
    if not isinstance(names, dict):
        raise _expected(where, "id2label", "an object with a name for each output", names, example)
    wrong = sorted(set(names) - set(map(str, range(len(names)))))
    if wrong and all(type(value) is int for value in names.values()):
        raise ModelError(f"{where}: id2label and label2id are swapped: id2label has the key {wrong[0][:40]!r}", example)
    if wrong:
        raise _expected(where, "keys of id2label", f"the whole numbers 0 to {len(names) - 1}", wrong[0], example)
    strange = [name for name in names.values() if isinstance(name, dict | list) or name is None]
    if strange:
        raise _expected(where, "names in id2label", "texts", strange[0], example)
    if not isinstance(ids, dict):
        raise _expected(where, "label2id", "an object with the output of each name", ids, example)
    for place, name in names.items():
        other = ids.get(str(name), int(place))
        if str(names.get(str(other))) != str(name):
            raise ModelError(
                f"{where}: id2label calls output {place} {str(name)[:40]!r}, and label2id says that it is "
                f"output {str(other)[:40]}",
                "correct the one that is wrong",
            )


def check_tokenizer_config(here: Path, source: str) -> None:
    """Refuse a `tokenizer_config.json` with a length or with inputs that no text has."""
    path = here / "tokenizer_config.json"
    table, where = model_json(path) if path.is_file() else {}, f"{path.name} of {source}"
    length, names = table.get("model_max_length"), table.get("model_input_names", ["input_ids"])
    number = isinstance(length, int | float) and not isinstance(length, bool)
    if length is not None and not (number and length >= 1 and (math.isinf(length) or length == int(length))):
        raise _expected(where, "model_max_length", "a whole number of at least 1", length)
    if not isinstance(names, list) or "input_ids" not in names or not all(isinstance(name, str) for name in names):
        raise _expected(where, "model_input_names", "a list of names with 'input_ids' among them", names)


def _expected(
    where: str, name: str, what: str, got: object, hint: str = "correct it, or download it again"
) -> ModelError:
    """The error for an entry of a JSON file that is not what it should be."""
    shown = repr(got)
    return ModelError(f"{where}: {name}: expected {what}, got {shown[:40]}{'…' if len(shown) > 40 else ''}", hint)


def sparse_refusal(source: str, layout: str) -> ModelError:
    """The error for a sparse checkpoint of another tool where a dense model is needed."""
    words = {
        BITMASK: "compressed-tensors (sparse-bitmask)",
        MASKED: "movement pruning (mask_scores beside the weights)",
    }
    return ModelError(
        f"{source} is a sparse checkpoint of {words[layout]}, but a dense or pruned model is needed here",
        f"convert it first: cap export {source} --to sparse",
    )


def sparse_layout(config: Mapping[str, Any]) -> str | None:
    """The layout of a sparse checkpoint of another tool by its config.json, `bitmask` or `masked`; None for others."""
    if str(config.get("model_type")).startswith("masked_"):
        return MASKED
    return BITMASK if _sparse_format(config).replace("_", "-") == "sparse-bitmask" else None


def _compression(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of quantised or compressed weights; empty when they are neither."""
    table = config.get("quantization_config") or config.get("compression_config") or {}
    return table if isinstance(table, dict) else {"quant_method": table}


def _sparse_format(config: Mapping[str, Any]) -> str:
    """The format that compressed-tensors gave the zeros; its forerunner wrote it at the top of config.json."""
    table = _compression(config).get("sparsity_config") or config.get("sparsity_config")
    return str(table.get("format") or "") if isinstance(table, dict) else ""


def check_no_pointer(path: Path, source: str) -> None:
    """Refuse what stands for weights that git-lfs did not fetch."""
    if path.is_file():
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        if pointer:
            raise ModelError(f"{path} is a pointer of git-lfs, not the weights of {source}", "run: git lfs pull")


def model_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model, which must be an object. Raises `ModelError`."""
    try:
        table = read_json(path)
    except FileError as error:
        raise ModelError(f"cannot read {path}: {error.message}", error.hint or "copy or download it again") from error
    if not isinstance(table, dict):
        raise ModelError(f"{path} is not a JSON object", "copy or download it again")
    return table
