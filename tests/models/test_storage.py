"""What is stored of a model, and the comparison of a file with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import registry
import torch
from tiny import TOKENIZERS
from torch import nn

from capcli.artifact import reader, writer
from capcli.artifact.entry import Factors
from capcli.errors import CheckFailed, ModelError
from capcli.models import artifact, loading, stock, storage
from capcli.models.model import Model


def with_outliers(shape: tuple[int, int], kept: float, outliers: float) -> torch.Tensor:
    """A pruned matrix as training leaves it: most kept values are small, a few are 30 times as large."""
    rng = torch.Generator().manual_seed(1)
    values = 0.02 * torch.randn(shape, generator=rng)
    values[torch.rand(shape, generator=rng) < outliers] *= 30
    return values * (torch.rand(shape, generator=rng) < kept)


def network(*matrices: torch.Tensor) -> Any:
    net = nn.ModuleList(nn.Linear(m.shape[1], m.shape[0]) for m in matrices)
    with torch.no_grad():
        for linear, matrix in zip(net, matrices, strict=True):
            linear.weight.copy_(matrix)
    return net


def model_of(net: Any) -> Model:
    return Model(net=net, tokenizer=None, family=None, labels=("x",), kind="classification", source="test")


@pytest.mark.parametrize(("shape", "kept", "outliers"), [((384, 1536), 0.1, 0.0), ((384, 384), 0.03, 0.002)])
def test_ordinary_matrices_in_8_bits(tmp_path: Path, shape: tuple[int, int], kept: float, outliers: float) -> None:
    """Some kept values are more than half a step away, because they would have become zeros; none more than a step."""
    net, pruned = network(with_outliers(shape, kept, outliers)), ["0.weight"]
    wanted = storage.stored(model_of(net), pruned, "int8")
    assert wanted.quantised == set(pruned) and wanted.tensors["0.bias"].dtype == torch.float16
    writer.save(tmp_path / "file", wanted.tensors, pruned, quantised=wanted.quantised)
    found = network(torch.zeros(shape))
    found.load_state_dict(reader.load(tmp_path / "file"))
    storage.check(wanted, found)
    before, after = net[0].weight.detach(), found[0].weight.detach()
    step, error = float(before.abs().max()) / 127, float((before - after).abs().max())
    assert 0.51 * step < error <= 1.0001 * step
    assert not bool(after[before == 0].any())
    assert int(after.count_nonzero()) <= int(before.count_nonzero())


@pytest.mark.parametrize("change", ["far", "zero", "missing", "16 bits"])
def test_what_differs_is_found(change: str) -> None:
    net = network(with_outliers((40, 30), 0.2, 0.0))
    wanted = storage.stored(model_of(net), ["0.weight"], "int8")
    found = network(net[0].weight)
    with torch.no_grad():
        found[0].bias.copy_(net[0].bias.half())
    storage.check(wanted, found)
    with torch.no_grad():
        weight, step = found[0].weight, float(net[0].weight.abs().max()) / 127
        if change == "far":
            weight[weight != 0] += 1.5 * step
        elif change == "zero":
            weight[weight == 0] = 1e-9
        elif change == "16 bits":
            found[0].bias[0] += 1e-3
    if change == "missing":
        del found[0].bias
        found[0].bias = None
    with pytest.raises(CheckFailed, match=r"in 1 tensors, first 0\."):
        storage.check(wanted, found)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("embeddings", "rank"), [("fp16", 0), ("int8", 0), ("svd:4", 4)])
def test_tied_embeddings(tmp_path: Path, embeddings: str, rank: int, dtype: str) -> None:
    """BART holds its word embeddings under three names: all are treated alike, or the last that is loaded wins."""
    registry.write("bart", tmp_path / "model", TOKENIZERS)
    model = loading.load_dense(str(tmp_path / "model"), ("x", "y"), "classification", 1)
    names = storage.embedding_names(model)
    assert len(names) == 3 and names < set(model.net.state_dict())
    pruned = list(model.prunable())
    wanted = storage.stored(model, pruned, dtype, embeddings, rank)
    kinds = {type(wanted.tensors[name]) for name in names}
    assert kinds == ({Factors} if rank else {torch.Tensor})
    assert names <= wanted.quantised or not (embeddings == "int8" or (rank and dtype == "int8"))
    artifact.save_artifact(model, tmp_path / "out", pruned, {"source": {}}, wanted.tensors, wanted.quantised)
    found = artifact.load_artifact(tmp_path / "out")
    storage.check(wanted, found.net)
    assert len({id(found.net.get_parameter(name)) for name in names}) == 1


def test_a_network_without_word_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.write("bert", tmp_path / "model", TOKENIZERS)
    model = loading.load_dense(str(tmp_path / "model"), ("x", "y"), "classification", 1)

    def none(self: Any) -> Any:
        raise NotImplementedError("no embeddings of words")

    monkeypatch.setattr(type(model.net), "get_input_embeddings", none)
    pruned = list(model.prunable())
    for embeddings, rank in (("fp16", 0), ("int8", 0), ("svd:4", 4)):
        with pytest.raises(ModelError, match="has no word embeddings") as caught:
            storage.stored(model, pruned, "fp32", embeddings, rank)
        assert caught.value.hint == "use --embeddings keep"
    plain = storage.stored(model, pruned)
    assert set(plain.tensors) == set(model.net.state_dict()) and not plain.quantised
    assert storage.stored(model, pruned, "int8").quantised == set(pruned)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_tied_embeddings_in_a_stock_folder(tmp_path: Path, dtype: str) -> None:
    registry.write("bart", tmp_path / "model", TOKENIZERS)
    model = loading.load_dense(str(tmp_path / "model"), ("x", "y"), "classification", 1)
    wanted = storage.stored(model, (), dtype)
    tensors = {name: tensor for name, tensor in wanted.tensors.items() if isinstance(tensor, torch.Tensor)}
    stock.save_dense(model, tmp_path / "out", tensors, storage.DTYPES[dtype])
    found = stock.reload_dense(tmp_path / "out", model.kind)
    storage.check(wanted, found)
    assert {parameter.dtype for parameter in found.parameters()} == {storage.DTYPES[dtype]}


@pytest.mark.parametrize(("dtype", "smallest"), [("fp16", 2.0**-24), ("bf16", 2.0**-133)])
def test_a_kept_weight_stays_in_16_bits_however_small(tmp_path: Path, dtype: str, smallest: float) -> None:
    """1e-42 rounds to zero in both types, and a zero is a weight that was removed."""
    matrix = torch.tensor([[1e-42, -1e-42, 0.0], [0.5, 0.0, -1e-42]])
    net = network(matrix)
    wanted = storage.stored(model_of(net), ["0.weight"], dtype)
    sizes = writer.save(tmp_path / "file", wanted.tensors, ["0.weight"])
    found = network(torch.zeros(2, 3))
    found.load_state_dict(reader.load(tmp_path / "file"))
    storage.check(wanted, found)
    assert found[0].weight.tolist() == [[smallest, -smallest, 0.0], [0.5, 0.0, -smallest]]
    assert sizes.pruned_bytes < 4 * 4


def test_what_16_bits_cannot_hold_stays_in_32(tmp_path: Path) -> None:
    net = network(torch.tensor([[7e4, 0.0], [0.0, 1.0]]), torch.ones(2, 2))
    model = model_of(net)
    with pytest.raises(ModelError, match=r"0\.weight has values that do not fit into float16: the largest is 7e\+04"):
        storage.stored(model, ["0.weight"], "fp16")
    wide = storage.too_large(model, "fp16")
    assert wide == ["0.weight"] and storage.too_large(model, "bf16") == storage.too_large(model, "fp32") == []
    wanted = storage.stored(model, ["0.weight"], "fp16", wide=wide)
    writer.save(tmp_path / "file", wanted.tensors, ["0.weight"])
    assert {entry.name: entry.dtype for entry in reader.inspect(tmp_path / "file")} == {
        "0.weight": "F32", "0.bias": "F16", "1.weight": "F16", "1.bias": "F16",
    }  # fmt: skip
    assert reader.load(tmp_path / "file")["0.weight"].tolist() == net[0].weight.tolist()
