"""Bytes of a BERT-base pruned to 97 %, in every value type and with every treatment of the word embeddings.

    python benchmarks/sizes.py [--json FILE] [--vocab-rows 12000] [--sparsity 0.97] [--small]
    python benchmarks/sizes.py --table FILE [--write docs/benchmarks.md]

The weights are random, made by transformers from a `BertConfig`, so nothing here says how good the model still is. The
mask is not uniform: kept are the weights with the largest |w| · matrix · row · column · noise over the whole encoder,
where the strengths of matrices, rows and columns and the noise are log-normal. With int8, the kept values of the pruned
matrices are int8 and all other floats 16 bits, except for the word embeddings, which are as the row says. A reduced
vocabulary takes the first rows. `over the bound` is about the pruned matrices alone: positions and values.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import table
import torch
from transformers import BertConfig, BertForSequenceClassification

from capcli.artifact import writer
from capcli.artifact.entry import Factors
from capcli.models import families

WORDS = "bert.embeddings.word_embeddings.weight"
SPREAD = {"matrix": 0.3, "row": 0.5, "column": 0.5, "noise": 0.5}  # standard deviations of the logarithms
Pruned = tuple[dict[str, torch.Tensor], list[str]]


def pruned_bert(sparsity: float = 0.97, small: bool = False) -> Pruned:
    """The tensors of a BERT-base for three labels, pruned, and the names of the pruned matrices."""
    torch.manual_seed(0)
    tiny = {"vocab_size": 500, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 256} if small else {}
    net = BertForSequenceClassification(BertConfig(num_labels=3, num_attention_heads=4 if small else 12, **tiny))
    tensors = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    names = list(families.prunable(net, families.FAMILIES["bert"]))
    generator = torch.Generator().manual_seed(0)
    scores = {name: importance(tensors[name], generator) for name in names}
    n = sum(score.numel() for score in scores.values())
    threshold = torch.cat([score.flatten() for score in scores.values()]).kthvalue(round(n * sparsity)).values
    for name, score in scores.items():
        tensors[name].masked_fill_(score <= threshold, 0)
    return tensors, names


def importance(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Scores of a matrix [rows, cols] as unequal as those that training finds."""

    def strengths(kind: str, *shape: int) -> torch.Tensor:
        return torch.empty(shape).log_normal_(0, SPREAD[kind], generator=generator)

    rows, columns = weight.shape
    score = weight.abs().mul_(strengths("noise", rows, columns))
    return score.mul_(strengths("matrix", 1, 1)).mul_(strengths("row", rows, 1)).mul_(strengths("column", 1, columns))


def variants(pruned: Pruned, vocab_rows: int, ranks: tuple[int, ...] = (192, 128)) -> Iterator[tuple[str, Any]]:
    """What the file holds in words, and the arguments of `writer.save`."""
    tensors, names = pruned
    words = tensors[WORDS]

    def stored(dtype: str, embedding: Any, *, int8_words: bool = False) -> dict[str, Any]:
        wide = set(tensors) if dtype == "fp32" else set(names) if dtype == "int8" else set()
        found = {
            n: t.half() if t.is_floating_point() and n not in wide else t for n, t in tensors.items() if n != WORDS
        }
        quantised = [*(names if dtype == "int8" else ()), *([WORDS] if int8_words else ())]
        return {"tensors": {**found, WORDS: embedding}, "pruned": names, "quantised": quantised}

    yield "fp32", stored("fp32", words)
    yield "fp32, embeddings fp16", stored("fp32", words.half())
    yield "fp16", stored("fp16", words.half())
    for rank in ranks:
        yield f"fp16, embeddings svd:{rank}", stored("fp16", halved(writer.factorised(words, rank)))
    yield f"fp16, {vocab_rows:,} words", stored("fp16", words[:vocab_rows].half())
    yield "int8, embeddings fp16", stored("int8", words.half())
    yield "int8, embeddings int8", stored("int8", words, int8_words=True)
    for rank in ranks:
        yield f"int8, embeddings svd:{rank} in int8", stored("int8", writer.factorised(words, rank), int8_words=True)
    yield f"int8, {vocab_rows:,} words fp16", stored("int8", words[:vocab_rows].half())
    yield f"int8, {vocab_rows:,} words int8", stored("int8", words[:vocab_rows], int8_words=True)


def halved(factors: Factors) -> Factors:
    return Factors(factors.left.half(), factors.right.half())


def measured(arguments: Mapping[str, Any]) -> dict[str, Any]:
    sizes = writer.sizes(arguments["tensors"], arguments["pruned"], quantised=arguments["quantised"])
    return {
        "file_bytes": sizes.file_bytes,
        "pruned_bytes": sizes.pruned_bytes,
        "pruned_bound_bytes": sizes.pruned_bound_bytes,
        "over_bound": sizes.pruned_bytes / sizes.pruned_bound_bytes - 1,
    }


def render(found: dict[str, Any]) -> str:
    """What `--json` wrote, as Markdown."""
    rows = [
        (
            row["stored"],
            f"{row['file_bytes'] / 1e6:.1f}",
            f"{found['dense_bytes'] / row['file_bytes']:.1f}x",
            f"{row['pruned_bytes'] / 1e6:.1f}",
            f"{row['over_bound']:.1%}",
        )
        for row in found["rows"]
    ]
    what = (
        f"BERT-base with random weights, {found['sparsity']:.0%} of {found['prunable_weights']:,} weights removed; "
        f"dense {found['dense_bytes'] / 1e6:.0f} MB. Kept per matrix {found['kept_share'][0]:.1%} to "
        f"{found['kept_share'][1]:.1%}."
    )
    head = ("stored", "file MB", "dense / file", "of which pruned matrices MB", "over the bound")
    return f"{what}\n\n{table.markdown(head, rows)}"


def main() -> None:
    if table.handled("sizes", render):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--vocab-rows", type=int, default=12_000, help="rows of the reduced vocabulary (12,000)")
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that this runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tensors, names = pruned = pruned_bert(args.sparsity, args.small)
    shares = [tensors[name].count_nonzero().item() / tensors[name].numel() for name in names]
    vocab_rows, ranks = (100, (16,)) if args.small else (args.vocab_rows, (192, 128))
    found = {
        "sparsity": args.sparsity,
        "prunable_weights": sum(tensors[name].numel() for name in names),
        "dense_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "kept_share": [min(shares), max(shares)],
        "rows": [{"stored": what, **measured(stored)} for what, stored in variants(pruned, vocab_rows, ranks)],
    }
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(render(found))


if __name__ == "__main__":
    main()
