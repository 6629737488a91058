"""The gradient of a step: that of the whole batch, in however many parts and by however many processes it is computed.

What the other rows of a batch put out are constants for a part: the terms of a part are those of the whole batch, in
which only its own rows are alive, so that the gradients of the parts add up. Only the contrastive terms need the values
of the other rows. These come from a first pass without gradients, with the same dropout.

Letters: B batch, H hidden size, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from capcli import parallel
from capcli.data import batches
from capcli.data.batches import Batch
from capcli.data.kinds import KINDS
from capcli.errors import out_of_memory
from capcli.pruning.criteria.seat import Step
from capcli.pruning.masked import gates_of
from capcli.pruning.objective import SAMPLED, Job, outputs, step_seed, terms_of, weighted

OUT_OF_MEMORY = "out of memory"
PROJECTION = "projection:"  # before the number of a projection, where parameters are named

Rows = NDArray[np.int64]
Learn = Callable[[Mapping[str, Tensor]], None]
"""Takes the gradient of weighted terms."""
Found = TypeVar("Found")


class _TooLargeError(Exception):
    """Memory ran out, on this rank or on another."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows that go through the network together: `rows` are their places in the whole batch.

    share: of the real tokens of the whole batch. leads: whether what does not depend on rows counts here. idle: the
    part of a rank that has no rows, in which one of another stands in and counts for nothing.
    """

    batch: Batch
    rows: Tensor
    share: float
    seed: int
    leads: bool
    idle: bool


def trained_parameters(job: Job) -> dict[str, nn.Parameter]:
    """All that the optimiser trains: of the network what is not frozen, and the projections of hid, which no artefact
    holds."""
    network = {name: parameter for name, parameter in job.model.net.named_parameters() if parameter.requires_grad}
    projections = {f"{PROJECTION}{i}": parameter for i, parameter in enumerate(job.objective.projections)}
    return {**network, **projections}


def of_step(job: Job, scaler: torch.amp.GradScaler, rows: Rows, step: Step) -> dict[str, Tensor]:
    """Leave at the parameters the gradient of the weighted sum of the terms of a batch, of the examples `rows` [B], and
    show it to the criterion. Returns the terms, and their weighted sum as `total`, detached. Common to all ranks.

    While importance is observed, hid comes apart, for it is not to decide what is removed (gradient separation of
    GRAIN).
    """
    observes = job.pruner is not None and job.pruner.observes
    parameters = list(trained_parameters(job).values())
    later: list[Tensor | None] = []

    def learn(terms: Mapping[str, Tensor]) -> None:
        apart = terms.get("hid") if observes else None
        main = [term for name, term in terms.items() if apart is None or name != "hid"]
        scaler.scale(torch.stack(main).sum()).backward(retain_graph=apart is not None)  # type: ignore[no-untyped-call]
        if apart is not None:
            found = torch.autograd.grad(scaler.scale(apart), parameters, allow_unused=True)
            later[:] = [_sum(one, other) for one, other in zip(found, later or [None] * len(found), strict=True)]

    def clear() -> None:
        later.clear()
        for leaf in leaves:
            leaf.grad = None

    leaves = [*parameters, *(_gates(job) if observes else [])]
    clear()
    terms = _in_parts(job, rows, step.number, learn, clear)
    parallel.total([leaf.grad for leaf in leaves if leaf.grad is not None])
    if job.pruner is not None:
        job.pruner.observe(step)
    parallel.total([gradient for gradient in later if gradient is not None])
    for parameter, gradient in zip(parameters, later, strict=False):
        parameter.grad = _sum(gradient, parameter.grad)
    return terms | {"total": torch.stack(list(weighted(job, terms).values())).sum()}


def of_importance(job: Job, rows: Rows, step: int, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradient at `leaves` of what importance is measured by: the weighted sum of all terms of a step but hid,
    which is not to decide what is removed (gradient separation of GRAIN), in full precision. Common to all ranks.

    Of vectors the loss is that of `calibration.sampled`, because a model that learns its own begins without any other
    gradient.
    """
    names = tuple(name for name in job.objective.losses if name != "hid")
    if KINDS[job.model.kind].vectors:
        names = (SAMPLED,)
    job = replace(job, on=job.on.exact, objective=replace(job.objective, losses=names), layers=None)
    found: list[Tensor] = []

    def learn(terms: Mapping[str, Tensor]) -> None:
        loss = torch.stack(list(terms.values())).sum()
        some = torch.autograd.grad(loss, leaves, materialize_grads=True)
        found[:] = [one + other for one, other in zip(some, found, strict=True)] if found else some

    _in_parts(job, rows, step, learn, found.clear)
    parallel.total(found)
    return found


def _gates(job: Job) -> list[Tensor]:
    """What stands beside the parameters where backward leaves gradients for the criterion."""
    assert job.pruner is not None
    found = (gates_of(linear) for linear in job.pruner.matrices.linears)
    return [gates for gates in found if gates is not None]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


# Parts ---------------------------------------------------------------------------------------------------------------


def _in_parts(job: Job, rows: Rows, step: int, learn: Learn, clear: Callable[[], object]) -> dict[str, Tensor]:
    """Let `learn` take the gradients of the terms of a batch, in as few parts as fit into memory, which the job
    remembers; returns the terms, detached. clear: undoes what `learn` did so far."""
    while True:
        try:
            if not job.split.examples and parallel.size() == 1:
                return _fitting(lambda: _at_once(job, rows, step, learn))
            return _split(job, rows, step, learn)
        except _TooLargeError as error:
            own = -(-len(rows) // parallel.size())
            now = min(own, job.split.examples or own)
            if now == 1:
                raise MemoryError(str(error)) from error
        clear()
        torch.cuda.empty_cache()
        job.split.examples = now // 2


def _at_once(job: Job, rows: Rows, step: int, learn: Learn) -> dict[str, Tensor]:
    batch = batches.collate(job.examples, rows, job.on.device, job.padded(rows))
    terms = terms_of(job, batch, outputs(job, batch), step)
    learn(weighted(job, terms))
    return {name: term.detach() for name, term in terms.items()}


def _split(job: Job, rows: Rows, step: int, learn: Learn) -> dict[str, Tensor]:
    whole, parts = batches.collate(job.examples, rows, job.on.device, job.padded(rows)), _parts(job, rows, step)
    before, after = _Put(len(rows)), _Put(len(rows))

    def look() -> None:
        with torch.no_grad():
            for part in parts:
                torch.manual_seed(part.seed)
                before.add(part, outputs(job, part.batch, asked=False))

    def go() -> None:
        for part in parts:
            torch.manual_seed(part.seed)
            found = outputs(job, part.batch)
            terms = weighted(job, terms_of(job, whole, before.alive(part, found), step))
            if not part.leads:
                terms.pop("reg", None)
            learn({name: 0.0 * term if part.idle else term for name, term in terms.items()})
            after.add(part, found)

    if any(bank.n_vectors for bank in job.objective.banks.values()):
        _fitting(look)
        parallel.total(list(before.found.values()))
    _fitting(go)
    parallel.total(list(after.found.values()))
    with torch.no_grad():
        return terms_of(job, whole, after.found, step)


def _fitting(work: Callable[[], Found]) -> Found:
    """What work in memory gives. Raises `_TooLargeError` on all ranks when memory runs out on any of them."""
    found, too_large = None, ""
    try:
        found = work()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        too_large = str(error) or OUT_OF_MEMORY  # the error itself holds on to all tensors of the pass
    if parallel.highest([bool(too_large)])[0]:
        raise _TooLargeError(too_large or OUT_OF_MEMORY)
    return cast(Found, found)


def _parts(job: Job, rows: Rows, step: int) -> list[_Part]:
    """The parts of a batch for this rank, which takes every R-th row, so that all have texts of like lengths."""
    rank, device = parallel.rank(), job.on.device
    own = np.arange(rank, len(rows), parallel.size())
    idle = not len(own)
    places = [np.zeros(1, dtype=np.int64)] if idle else batches.pieces(own, job.split.examples or len(own))
    n_tokens = job.examples.lengths[rows].sum()
    longest = int(job.examples.lengths[rows].max()) if job.examples.per_token else 0  # as in the whole batch
    return [
        _Part(
            batch=batches.collate(
                job.examples, rows[some], device, max(longest, job.padded(rows if longest else rows[some]))
            ),
            rows=torch.from_numpy(some).to(device, non_blocking=True),
            share=0.0 if idle else float(job.examples.lengths[rows[some]].sum() / n_tokens),
            seed=step_seed(job.config.seed, job.phase, step, *([rank, number] if rank or number else [])),
            leads=rank == 0 and number == 0,
            idle=idle,
        )
        for number, some in enumerate(places)
    ]


class _Put:
    """What the rows of a batch of `size` put out, by name, see `outputs`; 0 where that is not known."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.found: dict[str, Tensor] = {}

    def alive(self, part: _Part, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same with what the rows of a part put out, the only ones with gradients."""
        return {
            name: part.share * value if name == "hid" else self._of(name, value).index_copy(0, part.rows, value)
            for name, value in found.items()
        }

    def add(self, part: _Part, found: Mapping[str, Tensor]) -> None:
        """Take in what the rows of a part put out, without gradients."""
        for name, value in found.items():
            known, value = self._of(name, value), value.detach()
            if name == "hid":
                known.add_(part.share * value)
            elif not part.idle:
                known.index_copy_(0, part.rows, value)
            self.found[name] = known

    def _of(self, name: str, like: Tensor) -> Tensor:
        shape = () if name == "hid" else (self.size, *like.shape[1:])
        return self.found.get(name, like.new_zeros(shape))
