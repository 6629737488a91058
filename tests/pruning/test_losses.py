"""The loss terms against the slow loops of `reference`, worked examples and finite differences."""

import math
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from capcli.data import kinds
from capcli.models import task_losses
from capcli.pruning import losses

NORMALIZATIONS = ("mean", "reference")


def case(
    seed: int, batch: int, n_bank: int, n_extra: int, *, labelled: bool = True, n_ids: int = 6, dtype: Any = None
) -> dict[str, Any]:
    """Arguments of `contrastive_terms`; ids are drawn from few, so that duplicates occur in batch and extras."""
    torch.manual_seed(seed)
    width = 5

    def vectors(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, width, dtype=torch.float64), dim=-1).to(dtype or torch.float64)

    label_of = torch.randint(0, 3, (n_ids,))
    ids, extra_ids = torch.randint(0, n_ids, (batch,)), torch.randint(0, n_ids, (n_extra,))
    return {
        "z": vectors(batch),
        "ids": ids,
        "labels": label_of[ids] if labelled else None,
        "own": vectors(batch, n_bank),
        "extra": vectors(n_extra, n_bank),
        "extra_ids": extra_ids,
        "extra_labels": label_of[extra_ids] if labelled else None,
    }


def slow(arguments: dict[str, Any], tau: float, normalization: str) -> tuple[float, float]:
    plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    return reference.contrastive(**plain, tau=tau, normalization=normalization)


def naive(arguments: dict[str, Any], tau: float) -> tuple[float, float]:
    """U and P with every operation in the type of the vectors: what a plain implementation would lose."""
    z, own, extra = arguments["z"], arguments["own"], arguments["extra"]
    candidates = torch.cat([z, own.flatten(0, 1), extra.flatten(0, 1)])
    n_bank = own.shape[1]
    results = []
    for ours, theirs in (("ids", "extra_ids"), ("labels", "extra_labels")):
        keys = torch.cat(
            [
                arguments[ours],
                arguments[ours].repeat_interleave(n_bank),
                arguments[theirs].repeat_interleave(n_bank),
            ]
        )
        rows = []
        for i in range(len(z)):
            keep = torch.arange(len(candidates)) != i
            logp = F.log_softmax(candidates[keep] @ z[i] / tau, dim=0)
            positive = keys[keep] == arguments[ours][i]
            if positive.any():
                rows.append(logp[positive].mean())
        results.append(-float(torch.stack(rows).mean()) if rows else 0.0)
    return results[0], results[1]


@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 5),
    n_bank=st.sampled_from([0, 1, 3]),
    n_extra=st.integers(0, 5),
    labelled=st.booleans(),
    tau=st.sampled_from([0.05, 0.1, 0.3, 1.0, 7.0]),
    normalization=st.sampled_from(NORMALIZATIONS),
)
@example(seed=0, batch=1, n_bank=0, n_extra=0, labelled=True, tau=0.1, normalization="mean")
@example(seed=0, batch=1, n_bank=1, n_extra=0, labelled=True, tau=0.1, normalization="reference")
@example(seed=0, batch=4, n_bank=3, n_extra=5, labelled=False, tau=0.1, normalization="mean")
def test_contrastive_terms_equal_the_slow_loop(
    seed: int, batch: int, n_bank: int, n_extra: int, labelled: bool, tau: float, normalization: str
) -> None:
    arguments = case(seed, batch, n_bank, n_extra, labelled=labelled)
    found = losses.contrastive_terms(**arguments, tau=tau, normalization=normalization)
    expected = slow(arguments, tau, normalization)
    assert [float(t) for t in found] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert all(t.shape == () for t in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tau", [0.05, 0.3])
def test_contrastive_error_is_at_most_that_of_a_naive_implementation(dtype: torch.dtype, tau: float) -> None:
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}[dtype]
    for seed in range(8):
        arguments = case(seed, 6, 2, 8, dtype=dtype)
        exact = slow({k: v.double() if k in ("z", "own", "extra") else v for k, v in arguments.items()}, tau, "mean")
        found = losses.contrastive_terms(**arguments, tau=tau)
        assert all(t.dtype == torch.float32 for t in found)
        for ours, plain, truth in zip(found, naive(arguments, tau), exact, strict=True):
            assert abs(float(ours) - truth) <= abs(plain - truth) + tolerance


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize(("batch", "n_bank", "n_extra"), [(3, 1, 2), (4, 2, 0), (1, 1, 3)])
def test_gradient_is_that_of_finite_differences(normalization: str, batch: int, n_bank: int, n_extra: int) -> None:
    """Candidates are detached, so the numerical gradient moves the anchors and holds the candidates."""
    arguments = case(3, batch, n_bank, n_extra)
    frozen = arguments["z"].clone()
    z = arguments["z"].requires_grad_()
    terms = losses.contrastive_terms(**arguments, tau=0.3, normalization=normalization)
    (terms[0] + 2 * terms[1]).backward()

    def with_anchors(anchors: Tensor) -> float:
        total = 0.0
        count = [0, 0]
        n_positive = [0, 0]
        sums = [0.0, 0.0]
        plain = {k: v.tolist() for k, v in arguments.items() if k != "z"}
        for i in range(batch):
            found = reference.candidates_of(i, frozen.tolist(), **plain)
            logp = reference.log_probabilities(anchors[i].tolist(), found, 0.3)
            for kind, wanted in ((0, plain["ids"][i]), (1, plain["labels"][i])):
                positive = [v for v, c in zip(logp, found, strict=True) if c[1 + kind] == wanted]
                if positive:
                    sums[kind] -= sum(positive) / len(positive)
                    count[kind] += 1
                    n_positive[kind] += len(positive)
        for kind, weight in ((0, 1), (1, 2)):
            by = (count if normalization == "mean" else n_positive)[kind]
            total += weight * sums[kind] / max(by, 1)
        return total

    step = 1e-6
    for i in range(batch):
        for j in range(frozen.shape[1]):
            up, down = frozen.clone(), frozen.clone()
            up[i, j] += step
            down[i, j] -= step
            numeric = (with_anchors(up) - with_anchors(down)) / (2 * step)
            assert z.grad is not None
            assert float(z.grad[i, j]) == pytest.approx(numeric, rel=1e-5, abs=1e-7)


def test_gradcheck_over_the_bank_candidates() -> None:
    arguments = case(5, 1, 2, 3)  # one anchor: no detached batch vectors among the candidates
    z = arguments.pop("z").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: losses.contrastive_terms(x, **arguments, tau=0.5), (z,))


def test_gradient_reaches_z_only() -> None:
    arguments = case(1, 4, 2, 3)
    for name in ("z", "own", "extra"):
        arguments[name].requires_grad_()
    u, p = losses.contrastive_terms(**arguments, tau=0.1)
    (u + p).backward()
    assert arguments["z"].grad.abs().sum() > 0
    assert arguments["own"].grad is None
    assert arguments["extra"].grad is None


def test_worked_example() -> None:
    """Two anchors at right angles, one bank vector each equal to the anchor, tau 1: by hand.

    Candidates of anchor 0: z1 (0), own0 (1), own1 (0): logsumexp = log(e + 2). U = log(e + 2) - 1 for both anchors.
    Same label for both: all three candidates are positive, P = log(e + 2) - 1/3.
    """
    eye = torch.eye(2, dtype=torch.float64)
    empty = torch.empty(0, 1, 2, dtype=torch.float64)
    none = torch.empty(0, dtype=torch.int64)
    arguments = {
        "z": eye,
        "ids": torch.tensor([7, 9]),
        "labels": torch.tensor([1, 1]),
        "own": eye[:, None],
        "extra": empty,
        "extra_ids": none,
        "extra_labels": none,
    }
    u, p = losses.contrastive_terms(**arguments, tau=1.0)
    norm = math.log(math.e + 2)
    assert float(u) == pytest.approx(norm - 1)
    assert float(p) == pytest.approx(norm - 1 / 3)
    u, p = losses.contrastive_terms(**arguments, tau=1.0, normalization="reference")
    assert float(u) == pytest.approx(2 * (norm - 1) / 2)  # one positive per anchor: the same
    assert float(p) == pytest.approx(2 * (norm - 1 / 3) / 6)  # six positives in all


def test_anchors_without_a_positive_do_not_count() -> None:
    """Two anchors of one class and one alone, no bank: P is the mean over the two."""
    z = F.normalize(torch.tensor([[1.0, 0.2], [0.3, 1.0], [-1.0, 0.4]], dtype=torch.float64), dim=-1)
    nothing = torch.empty(3, 0, 2, dtype=torch.float64)
    extra, none = torch.empty(0, 0, 2, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    u, p = losses.contrastive_terms(z, torch.arange(3), torch.tensor([0, 0, 1]), nothing, extra, none, none, tau=0.5)
    s = z @ z.T / 0.5
    first = s[0, 1] - torch.logsumexp(s[0, [1, 2]], 0)
    second = s[1, 0] - torch.logsumexp(s[1, [0, 2]], 0)
    assert float(u) == 0
    assert float(p) == pytest.approx(-float(first + second) / 2)


@pytest.mark.parametrize("tau", [1e-4, 1e-3, 1e3, 1e6])
def test_extreme_temperatures_stay_finite(tau: float) -> None:
    arguments = case(2, 5, 3, 4, dtype=torch.float32)
    z = arguments["z"].requires_grad_()
    u, p = losses.contrastive_terms(**arguments, tau=tau)
    (u + p).backward()
    assert u.isfinite()
    assert p.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert float(u.detach()) >= 0
    assert float(p.detach()) >= 0


@pytest.mark.parametrize("shape", [(1, 0, 0), (1, 0, 3), (2, 0, 0)])
def test_no_candidate_or_positive_gives_zero_and_a_zero_gradient(shape: tuple[int, int, int]) -> None:
    arguments = case(0, *shape)
    arguments["ids"], arguments["labels"] = torch.arange(shape[0]), torch.arange(shape[0])
    z = arguments["z"].requires_grad_()
    u, p = losses.contrastive_terms(**arguments, tau=0.1)
    assert (float(u.detach()), float(p.detach())) == (0, 0)
    (u + p).backward()
    assert z.grad is not None
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_an_unknown_normalization_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        losses.contrastive_terms(**case(0, 2, 1, 1), tau=0.1, normalization="sum")


# Other terms ---------------------------------------------------------------------------------------------------------

ROWS = st.lists(
    st.tuples(*[st.floats(-8, 8, allow_nan=False, width=32)] * 3),
    min_size=1,
    max_size=4,
)


@given(rows=st.integers(1, 4), seed=st.integers(0, 999), temperature=st.sampled_from([0.5, 1.0, 2.0, 5.0]))
@settings(max_examples=40)
def test_distillation_equals_the_slow_loop(rows: int, seed: int, temperature: float) -> None:
    torch.manual_seed(seed)
    student, teacher = 3 * torch.randn(2, rows, 3)
    found = float(task_losses.distillation(student, teacher, "classification", temperature))
    expected = reference.distillation(student.tolist(), teacher.tolist(), temperature)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert float(task_losses.distillation(teacher, teacher, "classification", temperature)) == pytest.approx(
        0, abs=1e-6
    )


def test_distillation_gradient_scale_does_not_depend_on_the_temperature() -> None:
    """With logits small against T, the gradient is (student - teacher) / C, for any T (the reason for T²)."""
    teacher = torch.zeros(1, 4)
    for temperature in (1.0, 4.0):
        student = torch.tensor([[1e-3, -1e-3, 0.0, 0.0]], requires_grad=True)
        task_losses.distillation(student, teacher, "classification", temperature).backward()
        assert student.grad is not None
        assert student.grad.tolist()[0] == pytest.approx([2.5e-4, -2.5e-4, 0, 0], abs=2e-6)


@given(rows=ROWS, seed=st.integers(0, 99))
def test_task_loss_is_cross_entropy(rows: list[tuple[float, ...]], seed: int) -> None:
    labels = torch.randint(0, 3, (len(rows),), generator=torch.Generator().manual_seed(seed))
    found = float(task_losses.task_loss(torch.tensor(rows), labels, "classification"))
    assert found == pytest.approx(reference.cross_entropy(rows, labels.tolist()), rel=1e-4, abs=1e-5)


def test_regression_forms_are_squared_errors() -> None:
    logits = torch.tensor([[1.0], [3.0]], dtype=torch.bfloat16)
    assert float(task_losses.task_loss(logits, torch.tensor([0.0, 5.0], dtype=torch.float64), "regression")) == 2.5
    assert float(task_losses.distillation(logits, torch.tensor([[2.0], [3.0]]), "regression", 9.0)) == 0.5
    assert task_losses.task_loss(logits[:1], torch.tensor([4.0]), "regression").shape == ()


@pytest.mark.parametrize("kind", ["classification", "multilabel", "tokens", "spans"])
def test_distillation_without_scale_is_that_of_the_paper_over_the_squared_temperature(kind: str) -> None:
    torch.manual_seed(1)
    shape = {"classification": (4, 3), "multilabel": (4, 3), "tokens": (4, 5, 3), "spans": (4, 5, 2)}[kind]
    student, teacher, mask = torch.randn(shape), torch.randn(shape), torch.ones(4, 5)
    both = [
        float(task_losses.distillation(student, teacher, kind, 8.0, mask, scaled=scaled)) for scaled in (True, False)
    ]
    assert both[0] == pytest.approx(64 * both[1], rel=1e-6)


def test_squared_errors_have_no_temperature_to_scale_with() -> None:
    logits, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [2.0]])
    assert float(task_losses.distillation(logits, teacher, "regression", 8.0, scaled=False)) == 0.5


def test_losses_of_low_precision_logits_are_computed_in_32_bits() -> None:
    logits = torch.tensor([[2.0, 1.0]], dtype=torch.float16)
    assert task_losses.task_loss(logits, torch.tensor([0]), "classification").dtype == torch.float32
    assert task_losses.distillation(logits, logits, "classification", 2.0).dtype == torch.float32


def test_score_regulariser_weighs_matrices_alike() -> None:
    """A matrix of two and one of six: sigma(0) = 1/2 and sigma(log 3) = 3/4, mean 5/8 whatever their sizes."""
    scores = [torch.zeros(2, 1), torch.full((2, 3), math.log(3))]
    assert float(losses.score_regulariser(scores)) == pytest.approx(0.625)


# Hidden states -------------------------------------------------------------------------------------------------------


def hidden_case(seed: int, n_layers: int, batch: int, length: int) -> tuple[Any, Any, Any, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    width = 3
    states, teacher = (torch.randn(n_layers, batch, length, width, generator=rng) for _ in range(2))
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=rng)
    return states, teacher, torch.randn(n_layers, width, width, generator=rng), mask.long()


@given(seed=st.integers(0, 999), n_layers=st.integers(1, 3), batch=st.integers(1, 3), length=st.integers(1, 4))
@settings(max_examples=30)
def test_hidden_distillation_equals_the_slow_loop(seed: int, n_layers: int, batch: int, length: int) -> None:
    states, teacher, projections, mask = hidden_case(seed, n_layers, batch, length)
    expected = reference.hidden_distillation(*(part.tolist() for part in (states, teacher, projections, mask)))
    found = losses.hidden_distillation(list(states), list(teacher), list(projections), mask)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    padded = teacher.masked_fill(mask[None, :, :, None] == 0, 1e6)
    assert torch.equal(losses.hidden_distillation(list(states), list(padded), list(projections), mask), found)


def test_hidden_distillation_by_hand() -> None:
    """One token (1, 2) against (1, 0), and padding: (0 + 4) / 2; layers add up, one that agrees adds nothing."""
    ours, theirs = torch.tensor([[[1.0, 2], [9, 9]]]), torch.tensor([[[1.0, 0], [0, 0]]])
    mask, eye = torch.tensor([[1, 0]]), torch.eye(2)
    assert float(losses.hidden_distillation([ours], [theirs], [eye], mask)) == 2
    assert float(losses.hidden_distillation([ours, ours], [theirs, ours], [eye, eye], mask)) == 2
    assert float(losses.hidden_distillation([ours, ours], [theirs, theirs], [eye, eye], mask)) == 4
    swap = torch.tensor([[0.0, 1], [1, 0]])  # (1, 2) becomes (2, 1): (1 + 1) / 2
    assert float(losses.hidden_distillation([ours], [theirs], [swap], mask)) == 1


def test_hidden_distillation_of_low_precision_states_is_computed_in_32_bits() -> None:
    states, teacher, projections, mask = hidden_case(0, 2, 2, 3)
    low = [part.bfloat16() for part in states], [part.bfloat16() for part in teacher]
    found = losses.hidden_distillation(*low, list(projections), mask)
    assert found.dtype == torch.float32
    same = [[part.float() for part in parts] for parts in low]
    assert torch.equal(found, losses.hidden_distillation(*same, list(projections), mask))


# Heads that answer for several labels or for each token --------------------------------------------------------------


@given(rows=st.integers(1, 4), seed=st.integers(0, 999), temperature=st.sampled_from([1.0, 3.0]))
@settings(max_examples=30)
def test_multilabel_terms_treat_each_label_as_a_yes_or_no(rows: int, seed: int, temperature: float) -> None:
    torch.manual_seed(seed)
    student, teacher, labels = 3 * torch.randn(rows, 3), 3 * torch.randn(rows, 3), torch.randint(0, 2, (rows, 3))
    pairs = [[[float(x), 0.0] for x in row] for row in student.tolist()]
    wanted = [reference.cross_entropy(p, (1 - row).tolist()) for p, row in zip(pairs, labels, strict=True)]
    found = float(task_losses.task_loss(student, labels.float(), "multilabel"))
    assert found == pytest.approx(sum(wanted) / rows, rel=1e-4, abs=1e-6)
    theirs = [[[float(x), 0.0] for x in row] for row in teacher.tolist()]
    flat = [pair for row in pairs for pair in row], [pair for row in theirs for pair in row]
    kd = float(task_losses.distillation(student, teacher, "multilabel", temperature))
    assert kd == pytest.approx(reference.distillation(*flat, temperature), rel=1e-4, abs=1e-6)


@given(seed=st.integers(0, 999), temperature=st.sampled_from([1.0, 3.0]))
@settings(max_examples=30)
def test_token_terms_are_those_of_the_tokens_that_have_a_label(seed: int, temperature: float) -> None:
    torch.manual_seed(seed)
    student, teacher = 3 * torch.randn(2, 2, 5, 3)
    labels = torch.randint(0, 3, (2, 5))
    labels[torch.rand(2, 5) < 0.4] = kinds.NO_LABEL
    labels[0, 0] = 1
    have = labels != kinds.NO_LABEL
    found = float(task_losses.task_loss(student, labels, "tokens"))
    assert found == pytest.approx(reference.cross_entropy(student[have].tolist(), labels[have].tolist()), rel=1e-4)
    kd = float(task_losses.distillation(student, teacher, "tokens", temperature, have))
    wanted = reference.distillation(student[have].tolist(), teacher[have].tolist(), temperature)
    assert kd == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_batch_without_any_labelled_token_teaches_nothing() -> None:
    logits = torch.randn(2, 3, 4, requires_grad=True)
    labels = torch.full((2, 3), kinds.NO_LABEL)
    total = task_losses.task_loss(logits, labels, "tokens")
    total = total + task_losses.distillation(logits, torch.randn(2, 3, 4), "tokens", 2.0, labels != kinds.NO_LABEL)
    total.backward()
    assert float(total.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@given(seed=st.integers(0, 999), temperature=st.sampled_from([1.0, 3.0]))
@settings(max_examples=30)
def test_span_terms_choose_among_the_real_tokens(seed: int, temperature: float) -> None:
    """Begin and end are two choices among the tokens of the window; what stands in the padding changes nothing."""
    torch.manual_seed(seed)
    student, teacher = 3 * torch.randn(2, 2, 5, 2)
    mask, labels = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), torch.tensor([[0, 2], [4, 4]])
    rows = [(student[i, : int(mask[i].sum()), j].tolist(), int(labels[i, j])) for i in (0, 1) for j in (0, 1)]
    wanted = sum(reference.cross_entropy([row], [label]) for row, label in rows) / 4
    assert float(task_losses.task_loss(student, labels, "spans", mask)) == pytest.approx(wanted, rel=1e-4)
    both = [(student[i, : int(mask[i].sum()), j], teacher[i, : int(mask[i].sum()), j]) for i in (0, 1) for j in (0, 1)]
    kd = sum(reference.distillation([a.tolist()], [b.tolist()], temperature) for a, b in both) / 4
    found = float(task_losses.distillation(student, teacher, "spans", temperature, mask))
    assert found == pytest.approx(kd, rel=1e-4, abs=1e-6)
    student[0, 3:], teacher[0, 3:] = 50, -50
    assert float(task_losses.distillation(student, teacher, "spans", temperature, mask)) == pytest.approx(
        found, rel=1e-5
    )
