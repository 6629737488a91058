"""How the weights of a model are stored in an artefact: their types, and the treatment of the word embeddings.

Letters: V tokens of the vocabulary, H hidden size, r rank.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capcli.artifact import writer
from capcli.artifact.entry import Factors
from capcli.errors import CheckFailed, ModelError
from capcli.models.model import Model

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """The tensors of a model as a file is to hold them, and the names of those whose values become 8-bit codes."""

    tensors: dict[str, Tensor | Factors]
    quantised: frozenset[str]


def stored(
    model: Model,
    pruned: Collection[str],
    dtype: str = "fp32",
    embeddings: str = "keep",
    rank: int = 0,
    *,
    wide: Collection[str] = (),
) -> StoredWeights:
    """The tensors of `model` with the chosen types.

    dtype: fp32, fp16 or bf16 for every float tensor; int8 for the values of the `pruned` matrices and for factors, with
    fp16 for all others. A weight of a `pruned` matrix that is not zero stays so: what is too small for 16 bits becomes
    the smallest number that they hold. embeddings: what the word embeddings [V, H] become instead: fp16, int8, or
    factors of `rank`. wide: names of tensors that stay in 32 bits.

    Raises:
        ModelError: a value that the type cannot hold. ConfigError: a rank that saves nothing.
    """
    words = embedding_names(model) if embeddings != "keep" else frozenset()
    quantised = set(words) if embeddings == "int8" or (rank and dtype == "int8") else set()
    quantised |= set(pruned) if dtype == "int8" else set()
    tensors: dict[str, Tensor | Factors] = {}
    for name, tensor in model.net.state_dict().items():
        wanted = torch.float16 if name in words and embeddings == "fp16" else DTYPES[dtype]
        if name in words and rank:
            exact = writer.factorised(tensor.cpu().float(), rank)
            kind = torch.float32 if name in quantised else wanted
            tensors[name] = Factors(_cast(name, exact.left, kind), _cast(name, exact.right, kind))
        elif name in quantised or name in wide or not tensor.is_floating_point():
            tensors[name] = tensor.cpu()
        elif name in pruned:
            tensors[name] = _kept(_cast(name, tensor.cpu(), wanted), tensor.cpu())
        else:
            tensors[name] = _cast(name, tensor.cpu(), wanted)
    return StoredWeights(tensors=tensors, quantised=frozenset(quantised))


def rounded(tensor: Tensor, dtype: torch.dtype, *, matrix: bool = False) -> Tensor:
    """A tensor as a file in this type gives it back, floats in 32 bits; see `stored`. matrix: it is a pruned one."""
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    cast = cast.masked_fill(cast == 0, 0.0)
    return (_kept(cast, tensor) if matrix else cast).float()


def embedding_names(model: Model) -> frozenset[str]:
    """The names of the word embeddings among the tensors of the network: several where matrices are tied to them.

    Raises `ModelError` for a network that has none.
    """
    try:
        weight = model.net.get_input_embeddings().weight
    except (NotImplementedError, AttributeError) as error:
        raise ModelError(f"{model.source} has no word embeddings", "use --embeddings keep") from error
    parameters = model.net.named_parameters(remove_duplicate=False)
    return frozenset(name for name, tensor in parameters if tensor is weight)


def file_bytes(
    model: Model, pruned: Collection[str], dtype: str, embeddings: str, rank: int = 0, *, wide: Collection[str] = ()
) -> int:
    """Exactly the bytes of the file that `stored` with these arguments would become; nothing is written."""
    wanted = stored(model, pruned, dtype, embeddings, rank, wide=wide)
    return writer.sizes(wanted.tensors, pruned, quantised=wanted.quantised).file_bytes


def too_large(model: Model, dtype: str) -> list[str]:
    """The names of tensors with values that the type cannot hold."""
    limit = torch.finfo(DTYPES[dtype]).max
    floats = {name: tensor for name, tensor in model.net.state_dict().items() if tensor.is_floating_point()}
    return [name for name, tensor in floats.items() if tensor.numel() and float(tensor.abs().max()) > limit]


def _kept(cast: Tensor, exact: Tensor) -> Tensor:
    """`cast`, with the smallest number of its type where it is zero and `exact` is not."""
    smallest = torch.finfo(cast.dtype).smallest_normal * torch.finfo(cast.dtype).eps
    lost = (cast == 0) & (exact != 0)
    return torch.where(lost, torch.copysign(torch.tensor(smallest), exact).to(cast.dtype), cast)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another type; what becomes zero is +0, because -0 is a value in our files."""
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()):
        raise ModelError(
            f"{name} has values that do not fit into {str(dtype).removeprefix('torch.')}: "
            f"the largest is {float(tensor.abs().max()):.4g}",
            "use --dtype bf16, or fp32",
        )
    return cast.masked_fill(cast == 0, 0.0)


def check(wanted: StoredWeights, found: Any) -> None:
    """Compare the network `found` on disk with what was to be stored. Raises `CheckFailed` naming the first tensor.

    Values are exact; those of 8-bit codes may differ by a step of their largest value (half a step from rounding, more
    where rounding would have made a zero), products of factors by as much as the types of the factors round.
    """
    tensors = found.state_dict()
    wrong = sorted(set(wanted.tensors) ^ set(tensors))
    for name, tensor in wanted.tensors.items():
        if name not in wrong and not _agrees(tensor, tensors[name].cpu(), name in wanted.quantised):
            wrong.append(name)
    if wrong:
        raise CheckFailed(
            f"the file differs from the model in {len(wrong)} tensors, first {wrong[0]}; nothing was kept"
        )


def _agrees(wanted: Tensor | Factors, found: Tensor, quantised: bool) -> bool:
    if isinstance(wanted, Factors):
        product = wanted.left.float() @ wanted.right.float()
        return float((product - found.float()).norm()) <= (2e-2 if quantised else 1e-5) * float(product.norm())
    if quantised:
        step = float(wanted.abs().max()) / 127 if wanted.numel() else 0.0
        near = (wanted - found).abs() <= 1.0001 * step
        return bool(near.all()) and not bool(found[wanted == 0].any())
    return torch.equal(wanted.to(found.dtype), found)
