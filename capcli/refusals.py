"""What is refused of a model, by the names of its files and by what its JSON files say: the reason and the way out."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from capcli import files
from capcli.errors import FileError, ModelError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
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
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
OTHER_FORMATS = {".gguf": "GGUF", ".onnx": "ONNX"}
BITMASK, MASKED = "bitmask", "masked"  # layouts of sparse checkpoints that `capcli.legacy` reads
QUANTISATION = ("config_groups", "kv_cache_scheme", "transform_config")  # what bitmask alone does not say
SAVE_AGAIN = "load it once with transformers, in an environment you trust, and save_pretrained writes safetensors"


def unfinished(source: str) -> ModelError:
    """The error for a run that was stopped."""
    return ModelError(f"{source} is a run that is not finished", "run the same cap prune command again to go on")


def check_names(names: Collection[str], source: str, *, local: bool) -> None:
    """Refuse a folder or repository by the names of its files, before anything is read or fetched."""
    if local and "work" in names and not {CONFIG, "cap_config.json"} & set(names):
        raise unfinished(source)
    if "cap_config.json" in names:
        raise ModelError(
            f"{source} is a pruned model, and a dense one is needed here",
            "give the model that it was made from; or copy it to a folder, and take what cap export --to dense writes",
        )
    if "model.cap.safetensors" in names:
        raise ModelError(f"{source} is a pruned model without its cap_config.json", "copy the whole folder")
    if "adapter_config.json" in names:
        raise ModelError(
            f"{source} is an adapter, not a whole model",
            "merge it into its base model first: PEFT's merge_and_unload, then save_pretrained",
        )
    _check_formats(names, source, local)
    if CONFIG not in names:
        raise ModelError(
            f"{source} has no {CONFIG}", "MODEL is a folder or hub id in Hugging Face layout, or one written by cap"
        )


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
    if pickles:
        revision = "" if local else f"; or name a revision that has them, such as {source.partition('@')[0]}@refs/pr/1"
        raise ModelError(
            f"{source} has no {WEIGHTS}, only pickled weights ({pickles[0]})",
            f"pickles can run code and are never read; {SAVE_AGAIN}{revision}",
        )
    if others:
        raise ModelError(
            f"{source} has {OTHER_FORMATS[Path(others[0]).suffix]} weights only ({others[0]})",
            f"capcli reads {WEIGHTS}: use the model that this one was converted from",
        )


def check_config(here: Path, source: str, *, legacy: bool = False) -> None:
    """Refuse a model whose JSON files ask for code of its own, or whose weights are quantised.

    Sparse checkpoints of other tools are refused too, unless `legacy`: transformers would take random weights for them.
    """
    config = read_json(here / CONFIG)
    tokenizer = read_json(here / "tokenizer_config.json") if (here / "tokenizer_config.json").is_file() else {}
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


def sparse_refusal(source: str, layout: str) -> ModelError:
    """The error for a sparse checkpoint of another tool where a dense model is needed."""
    words = {
        BITMASK: "compressed-tensors (sparse-bitmask)",
        MASKED: "movement pruning (mask_scores beside the weights)",
    }
    return ModelError(
        f"{source} is a sparse checkpoint of {words[layout]}, and a dense or pruned model is needed here",
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model, which must be an object. Raises `ModelError`."""
    try:
        table = json.loads(files.text_of(path.read_bytes(), path))
    except FileError as error:
        raise ModelError(error.message, "save it as UTF-8") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {str(error).splitlines()[0]}", "copy or download it again") from error
    if not isinstance(table, dict):
        raise ModelError(f"{path} is not a JSON object", "copy or download it again")
    return table
