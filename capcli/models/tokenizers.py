"""Tokenizers: opened, checked against the network, saved, rewritten."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capcli import files
from capcli.errors import ModelError, first_line
from capcli.models.hf import read_pretrained
from capcli.models.model import CONFIG_FILE, accepted_inputs
from capcli.reporting.text import first_few
from capcli.sources import checkpoint, hub
from capcli.sources.checkpoint import (
    TOKENIZER_FILES,
    check_tokenizer_config,
)


def is_artifact(source: str) -> bool:
    """Whether a MODEL argument is what `cap prune` wrote."""
    return (hub.place(source) / CONFIG_FILE).is_file()


def check_fits(net: Any, tokenizer: Any, source: str) -> None:
    """Raise `ModelError` for a network that takes no tokens, or has no embeddings for some of this tokenizer."""
    if "input_ids" not in accepted_inputs(net):
        raise ModelError(f"{source} is a {net.config.model_type} model, which does not read text tokens")
    rows, vocabulary = _embedded(net), tokenizer.get_vocab()
    last = max(vocabulary.values(), default=0)
    if rows is None or last < rows:
        return
    beyond = sorted((token for token, place in vocabulary.items() if place >= rows), key=vocabulary.__getitem__)
    raise ModelError(
        f"the tokenizer of {source} has {len(vocabulary):,} tokens with ids up to {last:,}, the embeddings have "
        f"{rows:,} rows: none for {first_few([repr(token[:40]) for token in beyond], 5)}",
        "after adding tokens call model.resize_token_embeddings(len(tokenizer)) of transformers and save both again",
    )


def _embedded(net: Any) -> int | None:
    """How many tokens have an embedding; None for a network without a table of them."""
    with contextlib.suppress(NotImplementedError, AttributeError):
        rows: int = net.base_model.get_input_embeddings().num_embeddings
        return rows
    return None


def with_padding(tokenizer: Any, config: Any) -> tuple[Any, tuple[str, ...]]:
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


def open_tokenizer(path: str, source: str, config: Any = None) -> Any:
    """The tokenizer of a folder; `config` in place of its config.json, which transformers may not know."""
    from transformers import AutoTokenizer, PreTrainedConfig

    checkpoint.check_files(Path(path), source)
    if config is None and (Path(path) / CONFIG_FILE).is_file():
        config = PreTrainedConfig()  # an artefact has no config.json, and one that was put there is not read
    check_tokenizer_config(Path(path), source)
    tokenizer = read_pretrained(AutoTokenizer.from_pretrained, path, source, config=config)
    if tokenizer.is_fast:  # whoever calls it says how long inputs are; a file could ask for billions of tokens
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up when there is no file
        raise ModelError(f"{source} has no tokenizer: tokenizer.json or vocab.txt is missing, or contains no words")
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
            f"the tokenizer of {source} cannot read a text: {first_line(error)}",
            "copy or download the whole folder; an unk_token has to be in the vocabulary",
        ) from error
    if tokenizer.model_max_length <= n_special:
        raise ModelError(
            f"the tokenizer of {source} has no room for a text: its model_max_length is "
            f"{tokenizer.model_max_length}, and special tokens take {n_special}",
            "raise model_max_length in its tokenizer_config.json",
        )


def read_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a MODEL argument; its weights are not read."""
    return open_tokenizer(str(hub.place(str(source))), str(source))


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
        return open_tokenizer(scratch, f"the rewritten {type(tokenizer).__name__}")
