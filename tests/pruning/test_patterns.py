"""Blocks of neighbours and N of every M: selections and scores against slow loops, with every criterion; whole runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fisher import calibrated, config, moments_of, tiny
from test_obert import blocks_of
from test_one_shot import drawn
from tiny import PRUNABLE, Tiny, outcome

from capcli.artifact import reader
from capcli.config.layers import prune_config
from capcli.config.names import METHODS
from capcli.errors import ConfigError
from capcli.pruning import information, pruner, topk
from capcli.pruning.costs import WEIGHTS
from capcli.pruning.criteria import layerwise, obert, sparsegpt
from capcli.pruning.criteria.layerwise import Quota
from capcli.pruning.patterns import Blocks, Groups, pattern_of, position_bits

Make = Callable[..., Path]
UNSTRUCTURED = [name for name, method in METHODS.items() if not method.structured]
SCORES = st.lists(st.sampled_from([-torch.inf, -2.0, 0.0, 0.5, 1.0, 3.0]), min_size=48, max_size=48)


def in_groups(mask: torch.Tensor, width: int) -> torch.Tensor:
    """How many of each group stay."""
    return mask.reshape(-1, width).sum(dim=1)


def fits(mask: torch.Tensor, structure: str) -> bool:
    """Whether a mask is in the pattern."""
    pattern = pattern_of(structure)
    if isinstance(pattern, Groups):
        return bool((in_groups(mask, pattern.width) == pattern.keep).all())
    return bool((in_groups(mask, 4) % 4 == 0).all())


# Selections ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SCORES, st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (3, 16)]))
def test_n_of_every_m_are_the_best_and_of_equal_ones_the_first(values: list[float], groups: tuple[int, int]) -> None:
    keep, width = groups
    found = Groups(keep, width).select(torch.tensor(values), [16, 32], 1 - keep / width, "global", 0.1)
    wanted = [False] * 48
    for begin in range(0, 48, width):
        best = sorted(range(begin, begin + width), key=lambda i: (-values[i], i))[:keep]
        for i in best:
            wanted[i] = True
    assert found.tolist() == wanted


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SCORES, st.sampled_from(["matrix", "global"]), st.sampled_from([0.0, 0.25]), st.sampled_from([0.3, 0.8]))
def test_blocks_are_ranked_by_their_sums(values: list[float], scope: str, floor: float, sparsity: float) -> None:
    """As `topk.select` of the sums has it, which is tested on its own; exactly so many."""
    scores = torch.tensor(values)
    sums = torch.tensor([sum(values[i : i + 4]) for i in range(0, 48, 4)])
    found = Blocks(4).select(scores, [16, 32], sparsity, scope, floor)
    wanted = topk.select(sums, [4, 8], sparsity, scope, floor)
    assert found.tolist() == [chosen for chosen in wanted.tolist() for _ in range(4)]
    assert int(found.sum()) == Blocks(4).kept(sparsity, 48) == 4 * round((1 - sparsity) * 12)


@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_blocks_of_one_matrix(scope: str) -> None:
    scores = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    found = Blocks(4).best(scores, 44, scope)
    assert int(found.sum()) == 44 and fits(found, "4x1")
    if scope == "row":
        assert sorted(found.sum(dim=1).tolist()) == [4, 8, 8, 8, 8, 8]
    kept = scores.view(-1, 4).sum(dim=1)[found.view(-1, 4)[:, 0]]
    if scope == "matrix":
        assert kept.min() > scores.view(-1, 4).sum(dim=1)[~found.view(-1, 4)[:, 0]].max()


def test_the_fewest_bits_by_hand() -> None:
    assert position_bits(Groups(2, 4), 8, 4) == pytest.approx(2 * np.log2(6))
    assert position_bits(Blocks(4), 16, 8) == pytest.approx(4)
    assert position_bits(Blocks(1), 8, 4) == pytest.approx(8)


# Scores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 5])
def test_a_block_costs_what_the_formula_says(extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """½·w_Qᵀ·([F⁻¹]_QQ)⁻¹·w_Q, which is half of dᵀFd for the whole change d with the others corrected."""
    monkeypatch.setattr(information, "INVERTED_BYTES", 4 * 8 * 8)  # one block of F at a time
    blocks, m = blocks_of(3, 8, seed=3), 24 - 4 * extra
    weight = torch.randn(m, generator=torch.Generator().manual_seed(2))
    found = information.growth(blocks, weight, 4)
    assert found.shape == (m,)
    for begin in range(0, m, 4):
        b, inside = divmod(begin, 8)
        inverse = np.linalg.inv(blocks[b].double().numpy())[inside : inside + 4, inside : inside + 4]
        w = weight[begin : begin + 4].double().numpy()
        assert float(found[begin : begin + 4].sum()) == pytest.approx(w @ np.linalg.inv(inverse) @ w / 2, rel=1e-4)
    if extra:
        return
    removed = torch.arange(m) < 4
    change = obert.correction(blocks, weight, removed, ~removed) - weight * removed
    assert float(change[:8] @ blocks[0] @ change[:8] / 2) == pytest.approx(float(found[:4].sum()), rel=1e-4)


def test_a_block_of_one_weight_is_a_weight() -> None:
    blocks, weight = blocks_of(2, 8), torch.arange(1.0, 17.0)
    assert torch.equal(information.growth(blocks, weight, 1), weight**2 * information.alone(blocks).flatten() / 2)


@pytest.mark.parametrize(("keep", "width"), [(1, 2), (2, 4), (1, 4)])
def test_sparsegpt_chooses_n_of_every_m_as_the_columns_before_have_left_them(keep: int, width: int) -> None:
    """What blocks of M columns with a count of N in each row would do, one column after the other."""
    x, weight, y = drawn(n=8)
    quota = Quota(count=5 * 8 * keep // width, scope="matrix", pattern=Groups(keep, width))
    kept, found = sparsegpt.running(moments_of(x, y), weight.double(), quota)
    assert (in_groups(kept, width) == keep).all()
    factor = sparsegpt.inverse_factor(moments_of(x, y).second()).numpy()
    slow, mask = weight.double().numpy().copy(), np.zeros((5, 8), bool)
    for j in range(8):
        if j % width == 0:
            scores = (slow[:, j : j + width] / np.diag(factor)[j : j + width]) ** 2
            for row in range(5):
                mask[row, j + np.argsort(-scores[row], kind="stable")[:keep]] = True
        for row in range(5):
            if not mask[row, j]:
                slow[row, j + 1 :] -= slow[row, j] / factor[j, j] * factor[j, j + 1 :]
    assert kept.tolist() == mask.tolist()
    assert (found * kept).numpy() == pytest.approx(slow * mask, rel=1e-4, abs=1e-6)


def test_sparsegpt_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each part of the columns the blocks with the largest sums, in proportion."""
    monkeypatch.setattr(sparsegpt, "COLUMNS", 8)
    x, weight, y = drawn(n=16)
    kept, _ = sparsegpt.running(moments_of(x, y), weight.double(), Quota(count=32, scope="matrix", pattern=Blocks(4)))
    assert fits(kept, "4x1") and [int(kept[:, part].sum()) for part in (slice(8), slice(8, 16))] == [16, 16]
    scores = (weight.double()[:, :8] / sparsegpt.inverse_factor(moments_of(x, y).second()).diagonal()[:8]) ** 2
    assert kept[:, :8].equal(Blocks(4).best(scores, 16, "matrix"))


# Of a network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["4x1", "2:4", "1:8"])
@pytest.mark.parametrize("method", UNSTRUCTURED)
def test_every_criterion_keeps_exact_counts_in_the_pattern(checkpoint: Make, method: str, structure: str) -> None:
    """Also after a refit, and of masks that move: N:M begins at once where pruning begins, blocks rise."""
    model, pattern = tiny(checkpoint, "bert"), pattern_of(structure)
    sparsity = 1 - pattern.keep / pattern.width if isinstance(pattern, Groups) else 0.6
    steps = 0 if METHODS[method].one_shot else 8
    options: dict[str, Any] = {"epochs": 0} if METHODS[method].one_shot else {}
    options |= {"fisher_block": 16} if method == "obert" else {}
    options["refit"] = METHODS[method].steady and method != "obert" and (method, structure) != ("magnitude", "4x1")
    made = config(method=method, structure=structure, sparsity=sparsity, **options)
    found = pruner.make_pruner(model, made, steps, calibrated(model, block=options.get("fisher_block", 1)))
    matrices, seen = found.matrices, set()
    for step in range(max(1, steps)):
        if matrices.scores is not None:
            with torch.no_grad():
                matrices.scores.add_(torch.randn(len(matrices.mask), generator=torch.Generator().manual_seed(step)))
        for name in found.state:
            if name in ("smooth", "uncertainty"):
                found.state[name].uniform_(generator=torch.Generator().manual_seed(step))
        found.update(step)
        seen.add(found.sparsity)
        if found.sparsity:
            assert fits(matrices.mask, structure)
            assert matrices.kept() == found.structure.weights(found.sparsity)
    assert found.sparsity == sparsity
    assert not isinstance(pattern, Groups) or seen <= {0.0, sparsity}
    if METHODS[method].one_shot and method != "multiflow" and structure == "4x1":
        kept = [int(mask.sum()) for mask in matrices.matrix_masks()]
        assert kept == [4 * n for n in topk.apportion(sum(kept) // 4, [size // 4 for size in matrices.sizes])]


def test_fisher_ranks_blocks_by_the_sums_of_its_scores(checkpoint: Make) -> None:
    model = tiny(checkpoint, "bert")
    made = config(method="fisher", structure="4x1", sparsity=0.6, stairs="once", refit=False, floor=0.0)
    found = pruner.make_pruner(model, made, 8, calibrated(model))
    assert found.criterion.prepare and found.criterion.scores
    found.criterion.prepare(found.state, found.subject, 0)
    scores = found.criterion.scores(found.state, found.subject).view(-1, 4)
    sums = [sum(row) for row in scores.double().tolist()]
    found.update(0)
    kept = round(0.4 * len(sums))
    chosen = sorted(range(len(sums)), key=lambda i: (-sums[i], i))[:kept]
    mask = found.matrices.mask.view(-1, 4)[:, 0]
    assert len({*chosen} ^ {*mask.nonzero()[:, 0].tolist()}) <= 2  # which are as good as equal


def test_multiflow_shares_blocks_out_by_their_magnitude(checkpoint: Make) -> None:
    model = tiny(checkpoint, "bert")
    made = config(method="multiflow", structure="4x1", sparsity=0.6, epochs=0)
    found = pruner.make_pruner(model, made, 0, calibrated(model))
    matrices = found.matrices
    sums = matrices.flat_magnitude().view(-1, 4).sum(dim=1)
    largest = topk.topk(sums, topk.kept_count(0.6, len(sums)))
    wanted = [4 * int(part.sum()) for part in largest.split([size // 4 for size in matrices.sizes])]
    assert layerwise.by_magnitude(matrices, found.structure, 0.6) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("structure", ["4x1", "2:4"])
def test_rows_and_matrices_that_do_not_fit_are_named(checkpoint: Make, structure: str) -> None:
    sparsity = 0.5
    turned = tiny(checkpoint, "gpt2")
    with pytest.raises(ConfigError, match=r"about the rows of a matrix, and transformer\.\S+ is stored by columns"):
        pruner.planned(turned, config(structure=structure, sparsity=sparsity), WEIGHTS)
    odd = replace(tiny(checkpoint, "bert"))
    name, linear = next(iter(odd.prunable().items()))
    linear.in_features = 30
    with pytest.raises(ConfigError, match=rf"parts of 4 weights, and those of {name} have 30"):
        pruner.planned(odd, config(structure=structure, sparsity=sparsity), WEIGHTS)


# What is asked for ---------------------------------------------------------------------------------------------------


def asked(**chosen: Any) -> Any:
    return prune_config({"model": "mini", "task": "mr", **chosen})


@pytest.mark.parametrize("structure", ["2:4", "1:4", "3:8"])
def test_n_of_m_fixes_the_sparsity(structure: str) -> None:
    n, m = map(int, structure.split(":"))
    assert asked(structure=structure).sparsity == asked(structure=structure, sparsity=1 - n / m).sparsity == 1 - n / m
    assert asked(structure="4x1").sparsity == asked().sparsity == 0.9
    assert asked(structure=structure, method="movement").stair_list == (1 - n / m,)


def test_blocks_of_obert_cut_no_block_into_pieces() -> None:
    assert asked(method="obert", structure="4x1").fisher_block == 48
    assert asked(method="obert").fisher_block == asked(method="obert", structure="2:4").fisher_block == 50


@pytest.mark.parametrize(
    ("chosen", "message", "hint"),
    [
        ({"structure": "2:4", "sparsity": 0.9}, "--structure 2:4 means --sparsity 0.5, got 0.9", "or give 0.5"),
        ({"structure": "4:4"}, "1 to M - 1, with M one of 2, 4, 8, 16; got 4:4", "--structure 2:4"),
        ({"structure": "0:4"}, "got 0:4", "--structure 2:4"),
        ({"structure": "2:5"}, "got 2:5", "--structure 2:4"),
        ({"structure": "2:99"}, "got 2:99", "--structure 2:4"),
        ({"structure": "4x2"}, "unknown structure '4x2'", "did you mean 4x1"),
        (
            {"structure": "2:4", "method": "cap-f"},
            "2:4 is for methods that remove single weights",
            "heads or dimensions",
        ),
        ({"structure": "4x1", "method": "first-order"}, "first-order removes whole units", "such as fisher"),
        ({"structure": "2:4", "scope": "global"}, "--scope has no effect with --structure 2:4", "leave it out"),
        ({"structure": "2:4", "floor": 0.01}, "--floor has no effect with --structure 2:4", "leave it out"),
        ({"structure": "2:4", "stairs": "0.3,0.5"}, "--stairs has no effect with", "leave it out"),
        ({"structure": "2:4", "selections": 2}, "--selections has no effect with", "leave it out"),
        ({"structure": "2:4", "regrow": True}, "--regrow has no effect with", "leave it out"),
        ({"structure": "2:4", "method": "magnitude", "update_every": 0.1}, "--update-every has no effect", ""),
        ({"structure": "2:4", "method": "movement", "initial_sparsity": 0.2}, "--initial-sparsity has no effect", ""),
        ({"structure": "4x1", "method": "obert", "fisher_block": 50}, "a multiple of 4 with", "--fisher-block 48"),
        ({"structure": "4x1", "fisher_block": 48}, "--structure 4x1 is for obert; fisher adds up", "obert"),
    ],
)
def test_what_is_refused(chosen: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        asked(**chosen)
    assert message in caught.value.message and hint in caught.value.hint


def test_a_sweep_with_a_fixed_sparsity() -> None:
    from capcli.config.grid import sweep_config

    found = sweep_config({"model": "mini", "task": "mr", "structure": "2:4", "method": "fisher,magnitude"})
    assert {cell.run.sparsity for cell in found.cells} == {0.5}
    with pytest.raises(ConfigError, match=r"sparsity 0.9: --structure 2:4 means"):
        sweep_config({"model": "mini", "task": "mr", "structure": "2:4", "sparsity": "0.5,0.9"})


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "chosen"),
    [
        ("2:4", {"method": "fisher", "epochs": 1, "sparsity": 0.5}),
        ("4x1", {"method": "fisher", "epochs": 0, "sparsity": 0.75}),
    ],
)
def test_a_run_its_report_and_its_exports(tiny: Tiny, tmp_path: Path, structure: str, chosen: dict[str, Any]) -> None:
    """The pattern is in the file and the report; exports keep it, with 8 bits as well."""
    first = tiny.prune(tmp_path / "a", structure=structure, **chosen)
    assert first["structure"] == structure
    assert first["sparsity"]["kept_weights"] == (1 - chosen["sparsity"]) * PRUNABLE
    coding = "blocks" if structure == "4x1" else "groups"
    assert set(first["size"]["codings"]) == {coding}
    weights = reader.load(tmp_path / "a" / "model.cap.safetensors")
    kept = {row["name"]: weights[row["name"]] for row in first["sparsity"]["per_matrix"]}
    assert all(fits(tensor != 0, structure) for tensor in kept.values())
    for number, options in enumerate(({"to": "dense"}, {"to": "sparse"}, {"to": "sparse", "dtype": "int8"})):
        run_export(tmp_path / "a", tmp_path / str(number), **options)
    quantised = reader.inspect(tmp_path / "2" / "model.cap.safetensors")
    assert {entry.coding for entry in quantised if entry.kept is not None} == {coding}


def run_export(source: Path, out: Path, **options: Any) -> None:
    import capcli

    capcli.export(model=str(source), out=str(out), **options)


def test_a_stopped_run_comes_to_the_same(tiny: Tiny, tmp_path: Path) -> None:

    options = {"structure": "2:4", "method": "movement", "epochs": 1, "sparsity": 0.5}
    tiny.prune(tmp_path / "whole", **options)
    tiny.stop(tmp_path / "stopped", "2/", **options)
    tiny.prune(tmp_path / "stopped", **options)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
