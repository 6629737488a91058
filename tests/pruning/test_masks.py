"""Selections, schedules, group plans and the mask parametrization."""

import itertools
import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from capcli.errors import ConfigError
from capcli.pruning import masked, schedules, structures, topk

FLOAT = st.floats(width=32, allow_nan=False)
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, 1e-42, -1e-42, 1e-45, 3e38])
SCORES = st.one_of(st.lists(FLOAT, min_size=1, max_size=40), st.lists(FEW, min_size=1, max_size=40))


def device_topk(scores: Tensor, keep: int) -> Tensor:
    """What `topk` does away from the CPU, run on CPU tensors."""
    return topk.by_values(scores.float()[None], [keep])[0]


# Selection -----------------------------------------------------------------------------------------------------------


@given(scores=SCORES, share=st.floats(0, 1))
@example(scores=[0.0, -0.0, 0.0], share=0.67)
@example(scores=[1e-45, 0.0, -1e-45, -0.0], share=0.5)
@example(scores=[math.inf, -math.inf, math.inf], share=0.34)
def test_topk_keeps_exactly_the_largest_and_ties_go_to_the_lower_index(scores: list[float], share: float) -> None:
    keep = round(share * len(scores))
    expected = reference.topk(scores, keep)
    tensor = torch.tensor(scores, dtype=torch.float32)
    assert topk.topk(tensor, keep).tolist() == expected
    assert device_topk(tensor, keep).tolist() == expected


@pytest.mark.parametrize("kind", ["random", "tied", "constant", "denormal"])
def test_cpu_path_equals_device_path_on_many_values(kind: str) -> None:
    rng = torch.Generator().manual_seed(4)
    scores = torch.randn(20_000, generator=rng)
    if kind == "tied":
        scores = (scores * 3).round()
    elif kind == "constant":
        scores = torch.full_like(scores, -0.25)
    elif kind == "denormal":
        scores = scores * 1e-41
    for keep in (1, 2, 599, 600, 10_000, 19_999):
        found = topk.topk(scores, keep)
        assert int(found.sum()) == keep
        assert torch.equal(found, device_topk(scores, keep))
        assert scores[found].min() >= scores[~found].max()


@given(
    rows=st.lists(st.lists(FLOAT, min_size=7, max_size=7), min_size=1, max_size=4),
    data=st.data(),
)
def test_values_of_a_rank_are_those_of_the_sorted_rows(rows: list[list[float]], data: st.DataObject) -> None:
    """From either end: low ranks, high ones, and both in one call."""
    ranks = data.draw(st.lists(st.integers(1, 7), min_size=len(rows), max_size=len(rows)))
    scores = torch.tensor(rows, dtype=torch.float32)
    expected = [sorted(row.tolist(), reverse=True)[rank - 1] for row, rank in zip(scores, ranks, strict=True)]
    assert topk.kth_values(scores, ranks).flatten().tolist() == expected


@given(
    rows=st.lists(st.lists(FEW, min_size=5, max_size=5), min_size=1, max_size=4),
    data=st.data(),
)
def test_rows_are_ranked_each_by_itself(rows: list[list[float]], data: st.DataObject) -> None:
    keep = data.draw(st.lists(st.integers(0, 5), min_size=len(rows), max_size=len(rows)))
    scores = torch.tensor(rows, dtype=torch.float32)
    expected = [reference.topk(row, count) for row, count in zip(rows, keep, strict=True)]
    assert topk.topk_rows(scores, keep).tolist() == expected
    assert topk.by_values(scores, keep).tolist() == expected


def test_topk_accepts_other_types_and_refuses_impossible_counts() -> None:
    assert topk.topk(torch.tensor([1, 3, 2], dtype=torch.bfloat16), 2).tolist() == [False, True, True]
    for keep in (-1, 4):
        with pytest.raises(AssertionError):
            topk.topk(torch.ones(3), keep)
    with pytest.raises(AssertionError):
        topk.topk(torch.ones(2, 2), 1)


def test_topk_leaves_the_scores_alone() -> None:
    scores = torch.tensor([3.0, -0.0, 1.0])
    topk.topk(scores, 1)
    assert struct.pack("<3f", *scores.tolist()) == struct.pack("<3f", 3.0, -0.0, 1.0)


@given(sparsity=st.floats(0, 1, exclude_max=True), n=st.integers(1, 10**6))
def test_kept_count_is_within_one_of_the_exact_share(sparsity: float, n: int) -> None:
    kept = topk.kept_count(sparsity, n)
    assert 0 <= kept <= n
    assert abs(kept - reference.kept_count(sparsity, n)) <= 1
    assert abs(kept - (1 - sparsity) * n) <= 0.5 + 1e-6


def test_kept_count_by_hand() -> None:
    assert [topk.kept_count(s, n) for s, n in ((0.97, 100), (0.5, 5), (0.0, 7), (0.9, 4), (0.999, 10))] == [
        3,
        3,
        7,
        0,
        0,
    ]


@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=8), share=st.floats(0, 1))
def test_apportion_is_exact_and_fair(sizes: list[int], share: float) -> None:
    keep = round(share * sum(sizes))
    counts = topk.apportion(keep, sizes)
    assert sum(counts) == keep
    for count, size in zip(counts, sizes, strict=True):
        assert 0 <= count <= size
        assert abs(count - keep * size / sum(sizes)) < 1


def test_apportion_gives_the_rest_to_the_largest_remainder_then_the_lower_index() -> None:
    assert topk.apportion(2, [1, 1, 1]) == [1, 1, 0]
    assert topk.apportion(3, [4, 2, 2]) == [1, 1, 1]  # shares 1.5, .75, .75: the remainders .75 come first


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    sparsity=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 99),
)
def test_select_keeps_the_exact_number_in_each_scope(sizes: list[int], sparsity: float, seed: int) -> None:
    scores = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    keep = topk.kept_count(sparsity, sum(sizes))
    whole = topk.select(scores, sizes, sparsity, "global")
    assert whole.tolist() == reference.topk(scores.tolist(), keep)
    parts = topk.select(scores, sizes, sparsity, "matrix").split(sizes)
    assert sum(int(part.sum()) for part in parts) == keep
    for part, own, size in zip(parts, scores.split(sizes), sizes, strict=True):
        assert part.tolist() == reference.topk(own.tolist(), int(part.sum()))
        assert abs(int(part.sum()) - keep * size / sum(sizes)) < 1


def test_scopes_differ_where_matrices_differ_in_scale() -> None:
    scores = torch.tensor([1.0, 2.0, 30.0, 40.0])
    assert topk.select(scores, [2, 2], 0.5, "global").tolist() == [False, False, True, True]
    assert topk.select(scores, [2, 2], 0.5, "matrix").tolist() == [False, True, False, True]


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    sparsity=st.floats(0, 1, exclude_max=True),
    floor=st.sampled_from([0.005, 0.1, 0.9]),
    seed=st.integers(0, 99),
)
def test_a_floor_keeps_the_best_of_each_matrix_and_the_rest_is_ranked_together(
    sizes: list[int], sparsity: float, floor: float, seed: int
) -> None:
    """Against a slow loop; the path of a device, which does not look first, gives the same."""
    scores = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    scores *= torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) ** 3  # the first matrix is worth nothing
    keep = topk.kept_count(sparsity, sum(sizes))
    sure, begin = [], 0
    for size, even in zip(sizes, topk.apportion(keep, sizes), strict=True):
        least = min(math.ceil(floor * size), even)
        sure += reference.topk(scores[begin : begin + size].tolist(), least)
        begin += size
    wanted = reference.topk([math.inf if s else x for s, x in zip(sure, scores.tolist(), strict=True)], keep)
    assert topk.select(scores, sizes, sparsity, "global", floor).tolist() == wanted
    floors = [min(math.ceil(floor * size), even) for size, even in zip(sizes, topk.apportion(keep, sizes), strict=True)]
    held = topk.in_each(scores, sizes, floors)
    assert topk.topk(scores.masked_fill(held, math.inf), keep).tolist() == wanted


def test_a_floor_that_is_reached_anyway_changes_nothing() -> None:
    scores = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    found = [topk.select(scores, [1000] * 4, 0.97, "global", floor) for floor in (0.0, 0.005)]
    assert torch.equal(*found)


# Schedules -----------------------------------------------------------------------------------------------------------

SHARE = st.floats(0, 0.6)


SHAPES = [schedules.cubic, schedules.equal_steps, schedules.cubic_in_steps]


def scheduled(shape: Callable[..., float], total: int, **options: Any) -> schedules.Schedule:
    """A schedule of this shape; equal steps are those of heads, whose importance is known after a step only."""
    return schedules.Schedule(total=total, shape=shape, earliest=int(shape is schedules.equal_steps), **options)


@given(
    total=st.integers(1, 200),
    final=st.floats(0, 0.999),
    dense_share=SHARE,
    final_share=SHARE,
    shape=st.sampled_from(SHAPES),
)
def test_schedules_rise_from_dense_to_exactly_final(
    total: int, final: float, dense_share: float, final_share: float, shape: object
) -> None:
    assume(dense_share + final_share <= 1)
    assert callable(shape)
    schedule = scheduled(shape, total, final=final, dense_share=dense_share, final_share=final_share)
    values = [schedule(step) for step in range(total)]
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert values[-1] == final, "the last step that is trained"
    begin, end = math.floor(dense_share * total), math.ceil((1 - final_share) * total)
    assert all(value == 0 for value in values[: min(begin, end, total - 1)])
    assert all(value == final for value in values[end:])
    assert all(0 <= value <= final for value in values)


@given(total=st.integers(1, 100), final=st.floats(0, 0.99), dense_share=SHARE, final_share=SHARE)
def test_cubic_is_the_formula(total: int, final: float, dense_share: float, final_share: float) -> None:
    assume(dense_share + final_share <= 1)
    for step in range(total + 1):
        found = scheduled(schedules.cubic, total, final=final, dense_share=dense_share, final_share=final_share)(step)
        assert found == pytest.approx(reference.scheduled(step, total, final, dense_share, final_share), abs=1e-12)


def test_cubic_by_hand() -> None:
    """100 steps, dense for 20, final for the last 40: at step 40 half of the way, 0.8·(1 - 1/8) = 0.7."""
    schedule = scheduled(schedules.cubic, 100, final=0.8, dense_share=0.2, final_share=0.4)
    at = {s: schedule(s) for s in (0, 19, 20, 40, 59, 60, 100)}
    assert (at[0], at[19], at[20], at[60], at[100]) == (0, 0, 0, 0.8, 0.8)
    assert at[40] == pytest.approx(0.7)
    assert 0.79 < at[59] < 0.8


@given(total=st.integers(40, 300), final=st.floats(0.05, 0.97))
def test_equal_steps_are_equal_and_at_most_a_tenth(total: int, final: float) -> None:
    schedule = scheduled(schedules.equal_steps, total, final=final, dense_share=0.1, final_share=0.3)
    values = [schedule(s) for s in range(total + 1)]
    levels = sorted(set(values))
    rises = [b - a for a, b in itertools.pairwise(levels)]
    assert rises
    assert max(rises) <= 0.1 + 1e-6
    assert max(rises) == pytest.approx(min(rises))


def test_equal_steps_by_hand() -> None:
    """Final 0.3 by tenths over steps 15 to 44 of 60: 0.1 from 15, 0.2 from 25, 0.3 from 35."""
    shape = {"final": 0.3, "dense_share": 0.25, "final_share": 0.25}
    schedule = scheduled(schedules.equal_steps, 60, **shape)
    found = [round(schedule(s), 6) for s in (14, 15, 24, 25, 34, 35, 45, 60)]
    assert found == [0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.3]


@given(total=st.integers(1, 300), final=st.floats(0, 0.99), dense_share=SHARE, final_share=SHARE)
def test_cubic_in_steps_is_the_cubic_rounded_down_to_a_hundredth(
    total: int, final: float, dense_share: float, final_share: float
) -> None:
    assume(dense_share + final_share <= 1)
    shape = {"final": final, "dense_share": dense_share, "final_share": final_share}
    found = [scheduled(schedules.cubic_in_steps, total, **shape)(step) for step in range(total)]
    assert len(set(found)) <= 101
    for held, smooth in zip(
        found, (scheduled(schedules.cubic, total, **shape)(step) for step in range(total)), strict=True
    ):
        assert held <= smooth + 1e-9
        assert smooth - held < 0.01 + 1e-9
        assert held == final or round(100 * held, 6) % 1 == 0


def test_a_first_jump_is_made_at_once_and_the_rest_is_cubic() -> None:
    """Final 0.9 from 0.5: at half of the way 0.9 - 0.4/8 = 0.85."""
    schedule = scheduled(schedules.cubic, 100, final=0.9, dense_share=0.2, final_share=0.4, initial=0.5)
    assert (schedule(19), schedule(20), schedule(60)) == (0, 0.5, 0.9)
    assert schedule(40) == pytest.approx(0.85)


def test_a_sparsity_is_held_for_as_many_steps_as_asked() -> None:
    schedule = scheduled(schedules.cubic, 100, final=0.9, dense_share=0.1, final_share=0.4, every=10)
    rises = [step for step in range(1, 100) if schedule(step) > schedule(step - 1)]
    assert rises == [20, 30, 40, 50, 60]  # at 10 the cubic is still at zero
    smooth = scheduled(schedules.cubic, 100, final=0.9, dense_share=0.1, final_share=0.4)
    assert [schedule(step) for step in rises] == [smooth(step) for step in rises]


def test_cycles_begin_at_the_start_and_at_each_rise() -> None:
    found = [schedules.cycle(step, 50, [20, 30]) for step in (0, 19, 20, 29, 30, 49)]
    assert found == [(0, 20), (19, 20), (0, 10), (9, 10), (0, 20), (19, 20)]


# Groups --------------------------------------------------------------------------------------------------------------


@given(
    layers=st.integers(1, 12),
    heads_each=st.integers(1, 16),
    neurons_each=st.integers(1, 300),
    head_weights=st.integers(10, 5000),
    neuron_weights=st.integers(2, 200),
    sparsity=st.floats(0, 0.99),
)
def test_plan_is_as_near_as_whole_groups_allow(
    layers: int, heads_each: int, neurons_each: int, head_weights: int, neuron_weights: int, sparsity: float
) -> None:
    heads, neurons = layers * heads_each, layers * neurons_each
    total = heads * head_weights + neurons * neuron_weights
    sizes = {"layers": layers, "heads": heads, "head_weights": head_weights}
    try:
        plan = structures.plan_groups(sparsity, **sizes, neurons=neurons, neuron_weights=neuron_weights)
    except ConfigError as error:
        least = layers * (head_weights + neuron_weights)
        assert topk.kept_count(sparsity, total) < least
        assert "one head and one neuron per layer must stay" in error.message
        named = float(error.message.rsplit(" ", 1)[1])
        assert named <= 1 - least / total < named + 1e-4 + 1e-12
        return
    assert layers <= plan.heads <= heads
    assert layers <= plan.neurons <= neurons
    assert plan.kept_weights == plan.heads * head_weights + plan.neurons * neuron_weights
    if layers < plan.neurons < neurons:  # the neurons take up what rounding heads left
        assert abs(plan.kept_weights - topk.kept_count(sparsity, total)) <= neuron_weights / 2
    assert plan.heads == pytest.approx(max(layers, (1 - sparsity) * heads), abs=0.5 + 1e-6)


def test_plan_of_bert_base_and_its_limit() -> None:
    sizes = {"layers": 12, "heads": 144, "head_weights": 4 * 64 * 768, "neurons": 36864, "neuron_weights": 1536}
    plan = structures.plan_groups(0.5, **sizes)
    assert (plan.heads, plan.neurons, plan.kept_weights) == (72, 18432, 42467328)
    with pytest.raises(ConfigError) as caught:
        structures.plan_groups(0.98, **sizes)
    assert caught.value.message == (
        "structured pruning cannot reach sparsity 0.98: one head and one neuron per layer must stay, "
        "which allows at most 0.972"
    )
    assert "cap-soft" in caught.value.hint
    reached = structures.plan_groups(0.972, **sizes)
    assert reached.heads == 12
    assert 1 - reached.kept_weights / 84934656 == pytest.approx(0.972, abs=1e-5)


@given(layers=st.integers(1, 5), width=st.integers(1, 8), seed=st.integers(0, 999), data=st.data())
def test_groups_stay_in_every_layer_in_exact_number_and_only_die(
    layers: int, width: int, seed: int, data: st.DataObject
) -> None:
    rng = torch.Generator().manual_seed(seed)
    alive = torch.ones(layers, width, dtype=torch.bool)
    keep = layers * width
    for _ in range(3):
        keep = data.draw(st.integers(layers, keep))
        importance = torch.rand(layers, width, generator=rng).round(decimals=1)
        found = structures.select_groups(importance, keep, alive)
        assert int(found.sum()) == keep
        assert found.any(dim=1).all()
        assert not (found & ~alive).any()
        alive = found


def test_groups_are_ranked_over_layers_after_normalisation() -> None:
    """Layer 1 is a thousand times larger, but of the same direction: both keep their best two."""
    importance = torch.tensor([[3.0, 4.0, 0.0, 1.0], [1000.0, 4000.0, 3000.0, 0.0]])
    found = structures.select_groups(importance, 4, torch.ones(2, 4, dtype=torch.bool))
    assert found.tolist() == [[True, True, False, False], [False, True, True, False]]


def test_a_layer_without_any_importance_keeps_its_first_living_group() -> None:
    alive = torch.tensor([[False, True, True], [True, True, True]])
    found = structures.select_groups(torch.tensor([[9.0, 0.0, 0.0], [1.0, 2.0, 3.0]]), 2, alive)
    assert found.tolist() == [[False, True, False], [False, False, True]]


# Units of one ranking -------------------------------------------------------------------------------------------------


def units_of(weights: list[int], head: list[int], value: list[int]) -> structures.UnitTable:
    return structures.UnitTable(
        weights=torch.tensor(weights), head=torch.tensor(head), value=torch.tensor(value).bool()
    )


# Two heads with two query-key and two value-output units each, and three neurons; all of weight 2.
SMALL = units_of([2] * 11, [0, 0, 1, 1, 0, 0, 1, 1, -1, -1, -1], [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0])


def chosen(importance: list[float], alive: list[int], keep: int, units: structures.UnitTable = SMALL) -> list[int]:
    """The numbers of the units that stay."""
    found = structures.select_units(torch.tensor(importance), torch.tensor(alive).bool(), units, keep)
    return torch.nonzero(found)[:, 0].tolist()


def test_units_of_all_kinds_stand_in_one_ranking() -> None:
    importance = [9.0, 1, 8, 2, 7, 3, 6, 4, 5, 0, 10]
    assert chosen(importance, [1] * 11, 10) == [0, 2, 4, 6, 10]
    assert chosen(importance, [1] * 11, 22) == list(range(11))
    assert chosen(importance, [1] * 11, 0) == []


def test_the_count_is_that_of_whole_units_nearest_to_the_wanted() -> None:
    """11 weights of units of 2: 5 or 6 units are as near, the more are taken; of equal units the lower stays."""
    assert [len(chosen([1.0] * 11, [1] * 11, keep)) for keep in (9, 10, 11, 12)] == [5, 5, 6, 6]
    neurons = units_of([2] * 4, [-1] * 4, [0] * 4)
    assert chosen([1.0, 1, 1, 1], [1] * 4, 4, neurons) == [0, 1]
    assert chosen([1.0, 1, 1, 1], [0, 1, 1, 1], 4, neurons) == [1, 2]


def test_importance_counts_per_weight() -> None:
    """A whole head of 8 weights and importance 12 is worth less per weight than a neuron of 2 and 4."""
    units = units_of([8, 8, 2, 2], [-1] * 4, [0] * 4)
    assert chosen([12.0, 20.0, 4.0, 1.0], [1] * 4, 10, units) == [1, 2]


def test_nearly_empty_heads_lose_importance() -> None:
    """Half the value-output units of head 0 live: tanh(0.5 / 0.3) = 0.931; head 1 is whole: tanh(1 / 0.3) = 0.9975."""
    alive = torch.tensor([1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1]).bool()
    found = structures.head_regularised(torch.ones(11), alive, SMALL)
    half, whole = math.tanh(0.5 / 0.3), math.tanh(1 / 0.3)
    assert found.tolist() == pytest.approx([1] * 4 + [half, half, whole, whole] + [1] * 3)
    assert (round(half, 3), round(whole, 4)) == (0.931, 0.9975)


def test_the_regulariser_decides_between_a_full_and_a_nearly_empty_head() -> None:
    """Ten value-output units in each of two heads; of head 0 only one lives, and is the more important by a half."""
    units = units_of([2] * 20, [0] * 10 + [1] * 10, [1] * 20)
    importance = [1.5] + [0.0] * 9 + [1.0] * 10
    assert 1.5 * math.tanh(0.1 / 0.3) < math.tanh(1 / 0.3)
    assert chosen(importance, [1] + [0] * 9 + [1] * 10, 20, units) == list(range(10, 20))


def test_a_head_without_values_loses_its_queries_and_the_next_best_take_their_place() -> None:
    """By rank head 0 keeps its query-key units 0 and 1 only; they compute nothing, and 7 and 9 come in for them."""
    importance = [9.0, 8, 7, 6, 0.2, 0.1, 5, 2, 4, 1, 3]
    assert chosen(importance, [1] * 11, 14) == [2, 3, 6, 7, 8, 9, 10]


def test_units_of_an_emptied_head_come_back_only_when_all_others_stay() -> None:
    """Nine units are wanted: the seven others, and then the value-output units of the head that was found empty."""
    importance = [9.0, 8, 7, 6, 0.2, 0.1, 5, 2, 4, 1, 3]
    assert chosen(importance, [1] * 11, 18) == [2, 3, 4, 5, 6, 7, 8, 9, 10]


@st.composite
def unit_cases(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[int]]:
    """weights, head, value, importance of a few heads with dimensions, and neurons; kinds differ in weight."""
    heads, size, neurons = draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    inside = [number for number in range(heads) for _ in range(size)]
    head, value = [*inside, *inside, *[-1] * neurons], [0] * len(inside) + [1] * len(inside) + [0] * neurons
    kinds = draw(st.tuples(*[st.integers(1, 5)] * 3))
    weights = [kinds[0]] * len(inside) + [kinds[1]] * len(inside) + [kinds[2]] * neurons
    importance = draw(st.lists(st.integers(0, 9), min_size=len(head), max_size=len(head)))
    return weights, head, value, importance


@given(case=unit_cases(), shares=st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_selected_units_are_those_of_the_slow_loop_near_the_count_and_only_die(
    case: tuple[list[int], list[int], list[int], list[int]], shares: list[float]
) -> None:
    weights, head, value, importance = case
    units, alive = units_of(weights, head, value), torch.ones(len(head), dtype=torch.bool)
    for share in sorted(shares, reverse=True):
        keep = math.floor(share * sum(weights))
        worth = torch.tensor(importance, dtype=torch.float64)
        found = structures.select_units(worth, alive, units, keep)
        wanted = reference.select_units(
            worth.tolist(), alive.tolist(), weights, head, [bool(one) for one in value], keep
        )
        assert found.tolist() == wanted
        assert not (found & ~alive).any()
        left = int(units.weights[alive].sum())
        assert abs(int(units.weights[found].sum()) - min(keep, left)) <= max(weights) / 2
        for number in set(head) - {-1}:
            own = (units.head == number) & found
            others = alive & (units.head != number)
            assert (own & units.value).any() or not own.any() or bool((found >= others).all())
        alive = found
        importance = [(7 * one + 3) % 10 for one in importance]


# The parametrization -------------------------------------------------------------------------------------------------


def two_layers(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(4, 3, dtype=dtype), nn.Linear(3, 2, dtype=dtype)


def attached(*, learned: bool, dtype: torch.dtype = torch.float64) -> tuple[masked.Matrices, nn.Linear, nn.Linear]:
    a, b = two_layers(dtype)
    return masked.attach({"a.weight": a, "b.weight": b}, learned=learned), a, b


@pytest.mark.parametrize("learned", [False, True])
def test_forward_is_the_weight_times_the_mask(learned: bool) -> None:
    found, a, b = attached(learned=learned)
    x = torch.randn(5, 4, dtype=torch.float64)
    plain_a, plain_b = two_layers()
    assert torch.equal(b(a(x)), plain_b(plain_a(x)))  # all ones: nothing changes
    found.mask.copy_(torch.arange(18) % 3 != 0)
    first = (torch.arange(12) % 3 != 0).view(3, 4)
    second = (torch.arange(12, 18) % 3 != 0).view(2, 3)
    assert torch.equal(a.weight, plain_a.weight * first)
    assert torch.equal(b.weight, plain_b.weight * second)
    assert torch.equal(found.original(1), plain_b.weight)
    assert found.kept() == 12


@pytest.mark.parametrize("learned", [False, True])
def test_gradients_go_straight_through(learned: bool) -> None:
    """dL/dW = dL/dW'∘M, and dL/dS = dL/dW'∘W, with dL/dW' of a plain layer whose weight is W∘M."""
    found, a, _ = attached(learned=learned)
    mask = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 1]], dtype=torch.float64)
    found.mask[:12].copy_(mask.flatten())
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    weight = found.original(0).detach().clone()
    ((a(x) - y) ** 2).sum().backward()
    masked = (weight * mask).requires_grad_()
    ((x @ masked.T + a.bias.detach() - y) ** 2).sum().backward()
    assert masked.grad is not None
    gradient = found.original(0).grad
    assert gradient is not None
    assert torch.allclose(gradient, masked.grad * mask, rtol=1e-12)
    if learned:
        score = found.score_views()[0]
        assert score.grad is not None
        assert torch.allclose(score.grad, (masked.grad * weight).to(score.dtype), rtol=1e-5)
        assert score.grad[mask == 0].abs().min() > 0  # removed weights still learn their score


def test_layers_hold_views_of_the_flat_vectors() -> None:
    found, _, b = attached(learned=True)
    assert found.scores is not None
    found.scores.copy_(torch.arange(18.0))
    assert found.score_views()[1].tolist() == [[12, 13, 14], [15, 16, 17]]
    with torch.no_grad():
        found.score_views()[0][2, 3] = -5
    assert float(found.scores[11]) == -5
    found.matrix_masks()[1][0, 1] = 0
    assert float(found.mask[13]) == 0
    assert float(b.parametrizations.weight[0].mask[0, 1]) == 0  # type: ignore[union-attr,index]
    optimizer = torch.optim.SGD(found.score_views(), lr=1.0)
    found.score_views()[0].grad = torch.ones(3, 4)
    optimizer.step()
    assert found.scores[:3].tolist() == [-1, 0, 1]  # trained in place: the flat vector sees it


def test_flat_magnitude_reads_the_unmasked_weights() -> None:
    found, _, _ = attached(learned=False)
    found.mask.zero_()
    plain_a, plain_b = two_layers()
    assert torch.equal(found.flat_magnitude(), torch.cat([plain_a.weight.flatten(), plain_b.weight.flatten()]).abs())


def test_masks_are_not_in_the_state_dict_and_scores_are() -> None:
    found, a, _ = attached(learned=True)
    assert set(a.state_dict()) == {"bias", "parametrizations.weight.original", "parametrizations.weight.0.scores"}
    assert found.names == ["a.weight", "b.weight"]
    assert found.sizes == [12, 6]


@pytest.mark.parametrize("learned", [False, True])
def test_bake_leaves_plain_layers_with_plus_zero(learned: bool) -> None:
    found, a, b = attached(learned=learned)
    found.mask.copy_(torch.arange(18) % 2 == 0)
    expected = [found.original(i).detach().clone() * m for i, m in enumerate(found.matrix_masks())]
    with torch.no_grad():
        found.original(0)[0, 1] = -3.0  # removed: -3 * 0 would be -0
        found.original(1)[0, 1] = math.inf  # removed: inf * 0 would be NaN
    masked.bake(found)
    for linear, wanted in zip((a, b), expected, strict=True):
        assert not parametrize.is_parametrized(linear)
        assert type(linear.weight) is nn.Parameter
        assert set(linear.state_dict()) == {"weight", "bias"}
        assert torch.equal(linear.weight.detach(), wanted)
        assert not torch.signbit(linear.weight.detach()[wanted == 0]).any()
