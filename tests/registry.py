"""The model families and kinds of tasks that the tests run from end to end. The table in docs/reference/models.md is
written from this file, so it says no more than what is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("classification", "regression", "multilabel", "tokens", "spans", "embedding")
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 66,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 4}
_BART = {
    **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4))},
    **{"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 66},
    **{"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A family: its tiny configuration, the style of its tokenizer (words, bytes or decoder), and what it can do."""

    tokenizer: str
    config: Mapping[str, Any] = field(default_factory=dict)
    only: bool = False  # the configuration is complete and does not begin with SHAPE
    structured: bool = True
    dimensions: bool = True  # inside heads, for --structure dimensions, if structured
    kinds: tuple[str, ...] = KINDS
    remark: str = ""


ROWS = {
    "bert": Row(tokenizer="words"),
    "roberta": Row(tokenizer="bytes", config={"type_vocab_size": 1}),
    "xlm-roberta": Row(tokenizer="bytes", config={"type_vocab_size": 1}),
    "camembert": Row(tokenizer="bytes", config={"type_vocab_size": 1}),
    "electra": Row(tokenizer="words", config={"embedding_size": 8}),
    "distilbert": Row(
        tokenizer="words",
        config={"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 66},
        only=True,
    ),
    "mpnet": Row(tokenizer="bytes"),
    "deberta-v2": Row(
        tokenizer="words",
        config={
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
        remark="and DeBERTa-v3; also with projections for positions of their own",
    ),
    "albert": Row(
        tokenizer="words",
        config={"embedding_size": 8},
        remark="layers share their matrices, so they share the mask; every matrix is counted once",
    ),
    "modernbert": Row(
        tokenizer="words", dimensions=False, remark="one fused matrix for query, key and value; gated neurons"
    ),
    "llama": Row(
        tokenizer="decoder", config=_GROUPED, dimensions=False, remark="a head is a key-value head with its queries"
    ),
    "mistral": Row(tokenizer="decoder", config=_GROUPED, dimensions=False, remark="as llama"),
    "qwen2": Row(tokenizer="decoder", config=_GROUPED, dimensions=False, remark="as llama"),
    "qwen3": Row(tokenizer="decoder", config=_GROUPED, dimensions=False, remark="as llama"),
    "gpt2": Row(
        tokenizer="decoder",
        config={"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 66, "n_inner": 24},
        only=True,
        structured=False,
        remark="an example of a family that is not in the table",
    ),
    "convbert": Row(
        tokenizer="words", config={"embedding_size": 16}, structured=False, remark="not in the table of families"
    ),
    "bart": Row(
        tokenizer="bytes",
        config=_BART,
        only=True,
        structured=False,
        kinds=("classification", "regression", "multilabel", "spans", "embedding"),
        remark="not in the table of families; transformers has no token classification for it",
    ),
}
_WORDS = {"pad_token_id": 0, "cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
_IDS = {"words": _WORDS, "bytes": {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}, "decoder": {}}


def config_of(name: str, vocabulary: int, **changes: Any) -> Any:
    """The tiny configuration of a family."""
    from transformers import AutoConfig

    row = ROWS[name]
    ids = {**_IDS[row.tokenizer], **({"bos_token_id": 0, "eos_token_id": 0} if row.tokenizer == "decoder" else {})}
    shape = {} if row.only else SHAPE
    return AutoConfig.for_model(name, **{**shape, **ids, "vocab_size": vocabulary, **row.config, **changes})


def write(
    name: str, folder: Path, write_tokenizer: Mapping[str, Callable[[Path], int]], seed: int = 0, **changes: Any
) -> None:
    """A random model of the family without a head, its configuration changed by `changes`, and its tokenizer."""
    import torch
    from transformers import AutoModel

    vocabulary = write_tokenizer[ROWS[name].tokenizer](folder)
    torch.manual_seed(seed)
    net = AutoModel.from_config(config_of(name, vocabulary, **changes))
    with torch.no_grad():
        for parameter in net.parameters():  # biases too, so that every tensor matters
            parameter.add_(torch.randn_like(parameter) * 0.1)
    net.save_pretrained(folder)
