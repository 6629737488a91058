"""Factors in place of matrices: ranks and factors by slow loops; networks, files that lie, the command."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import registry
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import PRUNABLE, WEIGHTS, Tiny, digest, invoke
from torch import Tensor

import capcli
from capcli.data.batches import Examples
from capcli.errors import CapError, ModelError
from capcli.events import finished
from capcli.exporting import factors
from capcli.models import artifact, families, hf, lowrank, predict, task_losses
from capcli.models.devices import Compute
from capcli.models.model import LowRank, Model, copy, count_parameters
from capcli.pruning.least_squares import Moments

KNOWN = ["bert", "distilbert", "mpnet", "deberta-v2", "albert", "modernbert", "llama"]
CPU = Compute(device=torch.device("cpu"), dtype=torch.float32)


def make(name: str, rank: int = 0) -> Model:
    """A random classifier, its matrices of this rank if one is given."""
    torch.manual_seed(0)
    net = hf.auto_class("classification").from_config(registry.config_of(name, 50, num_labels=3)).eval()
    family = families.FAMILIES.get(name)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for linear in families.prunable(net, family).values() if rank else ():
            left, values, right = torch.linalg.svd(linear.weight, full_matrices=False)
            linear.weight.copy_(left[:, :rank] * values[:rank] @ right[:rank])
    return Model(net=net, tokenizer=None, family=family, labels=("x", "y", "z"), kind="classification", source="folder")


def batch(n: int = 8) -> dict[str, Tensor]:
    lengths = torch.arange(3, 3 + n)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(4, 50, mask.shape, generator=torch.Generator().manual_seed(1)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def read(n: int = 24) -> Examples:
    """Texts of random tokens."""
    rng, lengths = torch.Generator().manual_seed(2), [3 + i % 6 for i in range(n)]
    ids = torch.randint(4, 50, (sum(lengths),), generator=rng).numpy()
    offsets = torch.tensor([0, *lengths]).cumsum(0).numpy()
    return Examples(tokens=ids, types=None, offsets=offsets, labels=torch.zeros(n).long().numpy(), pad_id=0)


# Ranks ---------------------------------------------------------------------------------------------------------------

STEP = st.tuples(st.integers(0, 6).map(float), st.integers(1, 5))


@given(st.lists(st.lists(STEP, min_size=1, max_size=5), min_size=1, max_size=5), st.integers(0, 40))
def test_ranks_are_those_of_the_slow_loop(matrices: list[list[tuple[float, int]]], more: int) -> None:
    budget = sum(found[0][1] for found in matrices) + more
    assert factors.shared(matrices, budget) == reference.slow_ranks(matrices, budget)


def test_steps_end_with_the_matrix_as_it_is() -> None:
    """Ranks that pay, then the rest at the price of the rest; of a row nothing but the row."""
    assert lowrank.most((4, 6)) == 2 and lowrank.most((3, 6)) == 1 and lowrank.most((1, 9)) == 0
    assert factors.steps((4, 6), [9.0, 4.0, 2.0, 1.0]) == [(9.0, 10), (4.0, 10), (3.0, 4)]
    assert factors.steps((3, 6), [9.0, 4.0, 2.0]) == [(9.0, 9), (6.0, 9)]  # two of rank 2 would be as many
    assert factors.steps((1, 9), [5.0]) == [(5.0, 9)]
    assert all(
        rank * (o + i) < o * i <= (rank + 1) * (o + i)
        for o, i in [(384, 1536), (7, 5)]
        for rank in [lowrank.most((o, i))]
    )


# Factors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_factors_are_nearest_in_what_they_put_out(bias: bool) -> None:
    """By the slow loop of the paper's formula; what is discarded is what the error grows by, per token."""
    torch.manual_seed(3)
    x = torch.randn(40, 6) * torch.tensor([3.0, 1, 1, 0.5, 0.2, 0]) + 2
    weight = torch.randn(9, 6).double() * (torch.rand(9, 6) < 0.5)
    moments = Moments.of(x, x @ weight.float().T, bias=bias)
    centred = x.double() - x.double().mean(dim=0) if bias else x.double()
    ridge = float(moments.damping()) / 40
    weighing = factors.by_inputs(moments)
    for rank in (1, 3):
        product, squares = reference.slow_factors(weight, centred.T @ centred / 40, ridge, rank)
        left, right = weighing.factored(weight, rank)
        assert left.shape == (9, rank) and right.shape == (rank, 6)
        torch.testing.assert_close(left @ right, product, rtol=0, atol=1e-5)
        assert weighing.squares(weight) == pytest.approx(squares, rel=1e-4, abs=1e-4)
        gap = (weight - left @ right).T
        error = (centred @ gap).square().sum() / 40 + ridge * gap.square().sum()
        assert float(error) == pytest.approx(sum(squares[rank:]), rel=1e-3)


def test_without_texts_rows_count_by_their_norms() -> None:
    """D⁻¹ of the nearest matrix to D·W; rows and columns of zeros stay so; a matrix of zeros has no values."""
    torch.manual_seed(4)
    weight = torch.randn(7, 5).double()
    weight[2], weight[:, 3] = 0.0, 0.0
    left, right = factors.by_norms(weight).factored(weight, 2)
    norms = [math.sqrt(sum(float(x) ** 2 for x in row)) for row in weight]
    scaled = torch.stack([row * norm for row, norm in zip(weight, norms, strict=True)])
    u, s, vt = torch.linalg.svd(scaled)
    near = sum(s[k] * u[:, k].outer(vt[k]) for k in range(2))
    wanted = torch.stack([row / norm if norm else row * 0 for row, norm in zip(near, norms, strict=True)])
    torch.testing.assert_close(left @ right, wanted)
    assert not left[2].any() and not right[:, 3].any()
    empty = torch.zeros(4, 4).double()
    assert factors.by_norms(empty).squares(empty) == [0.0] * 4
    assert not any(part.any() for part in factors.by_norms(empty).factored(empty, 1))


@pytest.mark.parametrize("name", KNOWN)
def test_networks_of_every_family(name: str) -> None:
    """Matrices of low rank get factors that compute the same; shared layers (ALBERT) and fused ones too."""
    model, inputs = make(name, rank=2), batch()
    with torch.inference_mode():
        wanted = predict.forward(model, inputs)[0]
    thin, before = copy(model), count_parameters(model.net, model.family)
    ranks = {name: 2 for name, linear in thin.prunable().items() if lowrank.most(tuple(linear.weight.shape)) >= 2}
    factors._replace_by_weights(thin, ranks)
    with torch.inference_mode():
        torch.testing.assert_close(predict.forward(thin, inputs)[0], wanted, rtol=1e-3, atol=1e-3)
    held = sum(linear.weight.numel() for linear in thin.prunable().values())
    saved = sum((m := model.prunable()[n].weight).numel() - 2 * sum(m.shape) for n in ranks)
    assert len(ranks) > 3 and held == before.prunable - saved
    outline = make(name)
    lowrank.shape(outline.net, families.FAMILIES[name], ranks)
    outline.net.load_state_dict(thin.net.state_dict(), strict=True)
    with torch.inference_mode():
        assert torch.equal(predict.forward(outline, inputs)[0], predict.forward(thin, inputs)[0])


def test_healing_comes_nearer_to_the_model() -> None:
    """Only factors and their biases move; the same bits again."""
    model, texts = make("bert"), read()
    ranks = dict.fromkeys(model.prunable(), 2)

    def made() -> tuple[Model, dict[str, Tensor]]:
        thin = copy(model)
        factors._replace_by_weights(thin, ranks)
        thin = dataclasses.replace(thin, lowrank=LowRank(ranks=ranks, before=model.before_slicing))
        before = {name: tensor.clone() for name, tensor in thin.net.state_dict().items()}
        finished(factors.healed(thin, model, texts, 20, CPU))
        return thin, before

    def loss(thin: Model) -> float:
        inputs = batch()
        with torch.inference_mode():
            ours, theirs = (predict.forward(one, inputs)[0] for one in (thin, model))
            return float(task_losses.distillation(ours, theirs, "classification", 2.0))

    thin, before = made()
    again, _ = made()
    plain = copy(model)
    factors._replace_by_weights(plain, ranks)
    assert loss(thin) < 0.7 * loss(plain)
    after = thin.net.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all(any(name.startswith(one.removesuffix(".weight") + ".") for one in ranks) for name in moved)
    assert all(map(torch.equal, after.values(), again.net.state_dict().values()))


# Files and commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("factors") / "out"
    result = invoke("export", str(pruned), "--to", "lowrank", "--ratio", "0.3", "-o", str(out), "--threads", "1")
    assert result.exit_code == 0, result.stderr
    assert "of the weights of the dense matrices; ranks" in result.stdout
    return out


def test_what_is_written(pruned: Path, made: Path, tmp_path: Path) -> None:
    """Ranks within the budget, the network that is loaded, card; the same bytes again; accuracy as of `cap eval`."""
    record, settings = (json.loads((made / name).read_text()) for name in ("export.json", "cap_config.json"))
    table, model = record["factors"], artifact.load_artifact(made)
    assert model.lowrank is not None and model.lowrank.before.prunable == PRUNABLE
    held = sum(linear.weight.numel() for linear in model.prunable().values())
    assert 0.2 * PRUNABLE < held <= 0.3 * PRUNABLE and table["left"] == held / PRUNABLE
    assert settings["lowrank"] == {row["name"]: row["rank"] for row in table["matrices"] if row["rank"]}
    assert (table["texts"], table["healed"], settings["export"]["ratio"]) == (80, 0, 0.3)
    assert all(0 <= row["lost"] <= 1 for row in table["matrices"] if row["rank"])
    assert record["speed"]["batch_1"]["times"] > 0 and not record["check"]["exact"]
    assert record["size"]["memory_bytes"] == 4 * sum(p.numel() for p in model.net.parameters())
    found = capcli.evaluate(model=str(made))
    assert found["metrics"]["accuracy"] == record["metrics"]["after"]["accuracy"]
    assert found["sparsity"]["achieved"] == 1 - model.nonzero() / PRUNABLE
    assert "Two thin factors take the place of each matrix" in (made / "README.md").read_text()
    capcli.export(model=str(pruned), to="lowrank", ratio=0.3, out=str(tmp_path / "again"), threads=1)
    assert digest(tmp_path / "again" / WEIGHTS) == digest(made / WEIGHTS)


def test_healed_without_texts_and_in_8_bits(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    """Training texts that are not here are said; healing cannot do without them."""
    options: dict[str, Any] = {"model": str(pruned), "to": "lowrank", "ratio": 0.2, "threads": 1}
    healed = capcli.export(**options, heal=2, dtype="int8", out=str(tmp_path / "healed"))
    assert (healed["factors"]["healed"], healed["dtype"]) == (2, "int8")
    lost = tmp_path / "lost"
    shutil.copytree(pruned, lost)
    table = json.loads((lost / "cap_config.json").read_text())
    table["source"]["data"] = "../nowhere"
    (lost / "cap_config.json").write_text(json.dumps(table))
    blind = capcli.export(**{**options, "model": str(lost)}, out=str(tmp_path / "blind"))
    assert blind["factors"]["texts"] == 0 and {row["lost"] for row in blind["factors"]["matrices"]} == {None}
    assert any("fitted to the weights alone" in note for note in blind["notes"])
    with pytest.raises(CapError):
        capcli.export(**{**options, "model": str(lost)}, heal=1, out=str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


def test_other_formats_and_runtimes(made: Path, tmp_path: Path) -> None:
    """Stored again it is the same; what knows whole matrices only says so."""
    capcli.export(model=str(made), to="sparse", out=str(tmp_path / "sparse"), threads=1)
    ours, theirs = (artifact.load_artifact(one) for one in (made, tmp_path / "sparse"))
    assert all(map(torch.equal, ours.net.state_dict().values(), theirs.net.state_dict().values()))
    for to, said in (("dense", "is factorised"), ("sliced", "has low-rank factors, which"), ("lowrank", "already")):
        with pytest.raises(ModelError, match=said):
            capcli.export(model=str(made), to=to, ratio=0.2 * (to == "lowrank"), out=str(tmp_path / to))
    with pytest.raises(ModelError, match="which the sparse runtime does not compute"):
        capcli.load(made, runtime="sparse")
    with pytest.raises(CapError, match="is factorised: its layers no longer have heads"):
        ours.layers()
    inputs = {"input_ids": torch.arange(5, 15)[None], "attention_mask": torch.ones(1, 10, dtype=torch.int64)}
    plain, auto = capcli.load(made), capcli.load(made, runtime="auto")
    assert torch.equal(auto(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ranks: ranks | {next(iter(ranks)): 0}, "must be an integer from 1 to"),
        (lambda ranks: ranks | {next(iter(ranks)): 10**9}, "must be an integer from 1 to"),
        (lambda ranks: ranks | {next(iter(ranks)): True}, "must be an integer from 1 to"),
        (lambda ranks: ranks | {next(iter(ranks)): [1]}, "must be an integer from 1 to"),
        (lambda ranks: ranks | {next(iter(ranks)): 1 + ranks[next(iter(ranks))] % 2}, "of another shape"),
        (lambda ranks: ranks | {"bert.pooler.dense.weight": 2}, "which is no matrix of the layers"),
        (lambda ranks: dict(list(ranks.items())[1:]), "missing: "),
        (lambda ranks: {}, "must be an object that gives matrices their ranks"),
        (lambda ranks: [1], "must be an object that gives matrices their ranks"),
        (lambda ranks: None, "left over: "),
    ],
)
def test_settings_that_cannot_be(made: Path, tmp_path: Path, change: Any, said: str) -> None:
    shutil.copytree(made, tmp_path / "out")
    path = tmp_path / "out" / "cap_config.json"
    table = json.loads(path.read_text())
    new = change(table.pop("lowrank"))
    path.write_text(json.dumps(table if new is None else {**table, "lowrank": new}))
    with pytest.raises(CapError, match=said):
        capcli.load(tmp_path / "out")


def test_factors_that_are_not_finite(made: Path, tmp_path: Path) -> None:
    model, settings = artifact.load_artifact(made), artifact.stored_settings(str(made))
    name, linear = next(iter(model.prunable().items()))
    with torch.no_grad():
        linear.weight[0, 0] = math.nan
    artifact.save_artifact(model, tmp_path, [], {"source": settings["source"]})
    with pytest.raises(ModelError, match=f"not finite, in 1 tensors, first {name}"):
        capcli.load(tmp_path)


def test_what_is_refused(pruned: Path, tmp_path: Path) -> None:
    """One clear line each, and nothing is left."""
    to = ("export", str(pruned), "-o", str(tmp_path / "out"), "--to")
    for said, *arguments in (
        ("--to lowrank needs --ratio, a number between 0 and 1, got 0", *to, "lowrank"),
        ("between 0 and 1, got 1", *to, "lowrank", "--ratio", "1"),
        ("between 0 and 1, got nan", *to, "lowrank", "--ratio", "nan"),
        ("--ratio is for --to lowrank, not sparse", *to, "sparse", "--ratio", "0.5"),
        ("--heal is for --to lowrank, not onnx", *to, "onnx", "--heal", "1"),
        ("--ratio needs --to", *to[:-1], "--ratio", "0.5", "--fit", "1MB"),
        ("--ratio 0.01 allows 163 weights, and factors of rank 1 have", *to, "lowrank", "--ratio", "0.01"),
    ):
        result = invoke(*arguments)
        assert (result.exit_code, result.stderr.count("error: ")) == (2, 1), result.stderr
        assert said in " ".join(result.stderr.split()), result.stderr
        assert not list(tmp_path.iterdir())


def test_all_matrices_fit() -> None:
    """As after slicing a structured run, which loses nothing."""
    model = make("bert")
    before = SimpleNamespace(prunable=2 * count_parameters(model.net, model.family).prunable)
    config, original = SimpleNamespace(ratio=0.5, model="run"), SimpleNamespace(before_slicing=before)
    job: Any = SimpleNamespace(config=config, model=model, original=original)
    with pytest.raises(ModelError, match="leaves room for all matrices of run as they are"):
        factors._ranks(job, factors._of_weights(model))


def test_an_unknown_family() -> None:
    net = hf.auto_class("classification").from_config(registry.config_of("bart", 50))
    with pytest.raises(ModelError, match="whose heads and neurons capcli does not know"):
        lowrank.check(Model(net=net, tokenizer=None, family=None, labels=(), kind="classification", source="folder"))


def test_the_plan(pruned: Path, made: Path) -> None:
    """About what is written, before it is."""
    result = invoke("export", str(pruned), "--plan", "--to", "lowrank", "--ratio", "0.3", "--json")
    (rung,) = json.loads(result.stdout)["rungs"]
    size = json.loads((made / "export.json").read_text())["size"]
    assert rung["estimated"] and not rung["exact"]
    assert rung["memory_bytes"] == pytest.approx(size["memory_bytes"], rel=0.1)
    assert rung["weights_bytes"] == rung["memory_bytes"] / 2  # in 16 bits, without the header
