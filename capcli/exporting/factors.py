"""Factors for the matrices of a pruned model: fitted to what these put out, with ranks that share a budget.

After LPAF ("Low-Rank Prune-And-Factorize for Language Model Compression", arXiv 2306.14152), which factorises a model
after it was pruned, because its matrices then have low rank.

Letters: O outputs and I inputs of a matrix W [O, I], k rank; A [O, k] and B [k, I] its factors.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capcli.config.prune import PruneConfig
from capcli.data import batches, splits
from capcli.data.batches import Examples
from capcli.errors import CheckFailed, ModelError
from capcli.events import Event
from capcli.exporting import agreement
from capcli.exporting.job import Export
from capcli.models import lowrank, predict, task_losses
from capcli.models.devices import Compute
from capcli.models.model import LowRank, Model, copy, place
from capcli.pruning import rates, refit, schedules
from capcli.pruning.calibration import Calibration
from capcli.pruning.least_squares import Moments, solve
from capcli.records.exported import FactorRow, FactorTable

COUNT, SEED = 1024, 1  # training texts that factors are fitted on; what draws them
BATCH = 32  # texts of a step of healing

Factors = tuple[Tensor, Tensor]  # A [O, k], B [k, I]
Step = tuple[float, int]  # what is spared of the squared error, and the weights that this takes


def made(job: Export) -> Generator[Event, None, tuple[Model, FactorTable]]:
    """The model with factors in place of its matrices, and what there is to say of them.

    Raises `ModelError` for a ratio that allows less than a rank of 1 for each matrix, or all matrices as they are.
    """
    place(job.model, job.on)
    student, read = copy(job.model), _texts(job, COUNT)
    spectra = _of_weights(student) if read is None else (yield from _of_outputs(job, read))
    ranks = _ranks(job, spectra)
    if read is None:
        lost = _replace_by_weights(student, ranks)
    else:
        lost = yield from _replace_by_outputs(job, student, ranks, read)
    student = dataclasses.replace(student, lowrank=LowRank(ranks=ranks, before=job.original.before_slicing))
    if job.config.heal:
        yield from healed(student, job.model, _needed(job), job.config.heal, job.on)
    return student, _table(job, student, lost, 0 if read is None else len(read))


def _texts(job: Export, most: int) -> Examples | None:
    """At most this many (0: all) of the training texts of the task, as the model reads them; None where they are not
    here. Those of evaluation splits are never learned from."""
    train, model = job.known.data.train, job.model
    if not job.known.ours or train is None:
        return None
    some = agreement.texts(splits.subset(train, most, SEED))
    return agreement.encoded(model.tokenizer, model.kind, some, job.length)


def _needed(job: Export) -> Examples:
    """All training texts. Raises `ModelError` where there are none."""
    found = _texts(job, 0)
    if found is None:
        raise ModelError("--heal needs the training texts of the task, which are not here", "name them with --data")
    return found


def _table(job: Export, model: Model, lost: Mapping[str, float], texts: int) -> FactorTable:
    assert model.lowrank is not None, "it has just got its factors"
    held = sum(linear.weight.numel() for linear in model.prunable().values())
    return FactorTable(
        ratio=job.config.ratio,
        left=held / model.lowrank.before.prunable,
        texts=texts,
        healed=job.config.heal,
        matrices=tuple(
            FactorRow(
                name=name, shape=tuple(linear.weight.shape), rank=model.lowrank.ranks.get(name), lost=lost.get(name)
            )
            for name, linear in job.model.prunable().items()
        ),
    )


# Ranks ---------------------------------------------------------------------------------------------------------------


def steps(shape: tuple[int, ...], squares: Sequence[float]) -> list[Step]:
    """The steps from nothing to a matrix [O, I] whose singular values have these `squares`, falling: a rank each while
    two factors are smaller than the matrix, then all that is left of it."""
    outputs, inputs = shape
    limit, each = lowrank.most(shape), outputs + inputs
    whole = (math.fsum(squares[limit:]), outputs * inputs - limit * each)
    return [*((square, each) for square in squares[:limit]), whole]


def shared(matrices: Sequence[Sequence[Step]], budget: int) -> list[int]:
    """How many of its steps each matrix takes so that all together hold at most `budget` weights: one each, then again
    and again the next step that spares most for each of its weights, of those that still fit; of equals, that of the
    first matrix. None that spares nothing."""
    taken, left = [1] * len(matrices), budget - sum(found[0][1] for found in matrices)
    assert left >= 0, "a budget for the first steps"
    heap: list[tuple[float, int]] = []

    def offer(i: int) -> None:
        if taken[i] < len(matrices[i]):
            spared, weights = matrices[i][taken[i]]
            heapq.heappush(heap, (-spared / weights, i))

    for i in range(len(matrices)):
        offer(i)
    while heap:
        gain, i = heapq.heappop(heap)
        weights = matrices[i][taken[i]][1]
        if gain < 0 and weights <= left:
            taken[i], left = taken[i] + 1, left - weights
            offer(i)
    return taken


def _ranks(job: Export, spectra: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """The ranks of the matrices that get factors, by the squares of their singular values."""
    shapes = {name: tuple(linear.weight.shape) for name, linear in job.model.prunable().items()}
    matrices = [steps(shapes[name], spectra[name]) for name in shapes]
    dense, least = job.original.before_slicing.prunable, sum(found[0][1] for found in matrices)
    budget = int(job.config.ratio * dense)
    if least > budget:
        raise ModelError(
            f"--ratio {job.config.ratio:g} allows {budget:,} weights, and factors of rank 1 have {least:,}",
            f"use --ratio {math.ceil(1e4 * least / dense) / 1e4:g} or more",
        )
    taken = dict(zip(shapes, shared(matrices, budget), strict=True))
    ranks = {name: count for (name, count), found in zip(taken.items(), matrices, strict=True) if count < len(found)}
    if not ranks:
        raise ModelError(
            f"--ratio {job.config.ratio:g} leaves room for all matrices of {job.config.model} as they are",
            "use a smaller ratio, or --to sliced",
        )
    return ranks


# Factors -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """What an error in a matrix counts: it is weighed as diag(rows)·W·root, with rows [O] and root [I, I]."""

    rows: Tensor
    root: Tensor

    def squares(self, weight: Tensor) -> list[float]:
        """The squares of the singular values of a weighed matrix [O, I], falling; 0 where rounding made them."""
        values = torch.linalg.svdvals(self.rows[:, None] * weight @ self.root)
        noise = values[0] * max(weight.shape) * torch.finfo(values.dtype).eps
        return [float(value) for value in values.where(values > noise, 0.0).square()]

    def factored(self, weight: Tensor, rank: int) -> Factors:
        """The factors of rank k whose product, weighed, is nearest to a weighed matrix W [O, I].

        With D = diag(rows), R = root and D·W·R = U·S·Vᵀ: A = D⁻¹·U_k·S_k^½, B = S_k^½·V_kᵀ·R⁻¹ = S_k^-½·U_kᵀ·D·W.
        """
        weighed = self.rows[:, None] * weight
        left, values, _ = torch.linalg.svd(weighed @ self.root, full_matrices=False)
        left, half = left[:, :rank], values[:rank].sqrt()
        right = left.T @ weighed / half.where(half > 0, 1.0)[:, None]
        return (left * half / self.rows.where(self.rows > 0, 1.0)[:, None]) * (self.rows > 0)[:, None], right


def by_norms(weight: Tensor) -> Weighing:
    """Where no texts are here: an error counts by the norm of its row."""
    return Weighing(rows=weight.norm(dim=1), root=torch.eye(weight.shape[1], dtype=weight.dtype))


def by_inputs(moments: Moments) -> Weighing:
    """By what it changes in the outputs: R·Rᵀ is the second moment of the inputs, without their mean where the layer
    has a bias to make up for it, and with a ridge."""
    gram = moments.centred()[0].cpu().double().clone()
    gram.diagonal().add_(moments.damping().cpu().double())
    rows = torch.ones(len(moments.outputs), dtype=gram.dtype)
    return Weighing(rows=rows, root=torch.linalg.cholesky(gram / moments.n_tokens))


def _exact(weight: Tensor) -> Tensor:
    return weight.detach().cpu().double()


def _of_weights(model: Model) -> dict[str, list[float]]:
    """The squares of the singular values of each matrix, by name; by the weights alone."""
    weights = {name: _exact(linear.weight) for name, linear in model.prunable().items()}
    return {name: by_norms(weight).squares(weight) for name, weight in weights.items()}


def _replace_by_weights(model: Model, ranks: Mapping[str, int]) -> dict[str, float]:
    """Put factors in place of matrices, in place; nothing is known of what is lost."""
    matrices = model.prunable()
    for name, rank in ranks.items():
        weight = _exact(matrices[name].weight)
        _put(model, name, by_norms(weight).factored(weight, rank), matrices[name].bias)
    return {}


def _of_outputs(job: Export, read: Examples) -> Generator[Event, None, dict[str, list[float]]]:
    """The squares of the singular values of each matrix, by name; by what it puts out for the texts."""
    matrices, found = job.model.prunable(), {}
    with torch.no_grad():
        for name, moments in refit.walk(_calibration(job, job.model, read), job.model, 0):
            found[name] = by_inputs(moments).squares(_exact(matrices[name].weight))
            yield _event(job, 0, len(found), len(matrices))
    return found


def _replace_by_outputs(
    job: Export, student: Model, ranks: Mapping[str, int], read: Examples
) -> Generator[Event, None, dict[str, float]]:
    """Put factors in place of the matrices of `student`, in place, from the input upwards: the matrix that fits best to
    what the model puts out, by what the layer reads with factors below it, and its nearest factors. Returns what is
    lost of the variance of the outputs."""
    matrices, found, lost = student.prunable(), {}, {}
    with torch.no_grad():
        for name, moments in refit.walk(_calibration(job, student, read), job.model, 0, ranks):
            linear = matrices[name]
            best = solve(moments, linear.weight, torch.ones_like(linear.weight, dtype=torch.bool))[0]
            found[name] = by_inputs(moments).factored(_exact(best), ranks[name])
            product = (found[name][0] @ found[name][1]).to(best)
            linear.weight.copy_(product)
            if linear.bias is not None:
                inputs, outputs = moments.means()
                linear.bias.copy_(outputs - product @ inputs.to(product))
            lost[name] = float(moments.error(product))
            yield _event(job, 1, len(found), len(ranks))
    for name, factors in found.items():
        _put(student, name, factors, matrices[name].bias)
    return lost


def _put(model: Model, name: str, factors: Factors, bias: Tensor | None) -> None:
    left, right = (factor.float().contiguous().to(model.net.device) for factor in factors)
    lowrank.put(model.net, name, right, left, None if bias is None else bias.detach())


def _calibration(job: Export, model: Model, read: Examples) -> Calibration:
    return Calibration(model=model, examples=read, device=job.on.device, seed=SEED, count=COUNT)


def _event(job: Export, passes: int, done: int, total: int) -> Event:
    """How far the first pass over the matrices is, or the second; healing takes longer than both."""
    each = 0.1 if job.config.heal else 0.25
    return Event(phase="factors", done=done, total=total, overall=0.05 + each * (passes + done / total))


# Healing -------------------------------------------------------------------------------------------------------------


def healed(student: Model, teacher: Model, read: Examples, epochs: int, on: Compute) -> Generator[Event, None, None]:
    """Train the factors of `student`, in place, by distillation from `teacher` on the texts; without dropout.

    Raises `CheckFailed` for a loss that is not finite.
    """
    assert student.lowrank is not None, "a model with factors"
    layers = [student.net.get_submodule(name.removesuffix(".weight")) for name in student.lowrank.ranks]
    student.net.requires_grad_(False)
    trained = [parameter.requires_grad_(True) for layer in layers for parameter in layer.parameters()]
    peak, optimizer = rates.by_width("prune", student), torch.optim.AdamW(trained, weight_decay=0.0)
    total = epochs * -(-len(read) // BATCH)
    orders = (rows for epoch in range(epochs) for rows in batches.training_order(read, BATCH, SEED, epoch))
    with predict.without_dropout(student), predict.without_dropout(teacher):
        for step, rows in enumerate(orders):
            inputs = batches.collate(read, rows, on.device).inputs
            with torch.no_grad():
                wanted = predict.forward(teacher, inputs)[0]
            with torch.enable_grad():
                logits, temperature = predict.forward(student, inputs)[0], PruneConfig.kd_temperature
                loss = task_losses.distillation(logits, wanted, student.kind, temperature, inputs["attention_mask"])
            if not bool(loss.isfinite()):
                raise CheckFailed(f"the loss of --heal is not finite at step {step + 1}", "leave --heal out")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = peak * schedules.lr_factor(step, total, PruneConfig.lr_warmup)
            optimizer.step()
            status = f"step {step + 1:,}/{total:,}, loss {float(loss.detach()):.3f}"
            share = 0.25 + 0.3 * (step + 1) / total
            yield Event(phase="heal", done=step + 1, total=total, overall=share, status=status)
