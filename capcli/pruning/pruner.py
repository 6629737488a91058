"""A pruner: masks on a model, kept at the scheduled sparsity.

Sparsity by the schedule, scores by the criterion, units by the structure, the mask of their weights: the same four
lines for every method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from capcli.config.prune import PruneConfig
from capcli.models.model import Model
from capcli.pruning.calibration import Calibration
from capcli.pruning.criteria import CRITERIA
from capcli.pruning.criteria.movement import initial_scores
from capcli.pruning.criteria.seat import ERRORS, Criterion, State, Step, Subject, window_of
from capcli.pruning.masked import Matrices, attach
from capcli.pruning.schedules import Schedule, one_by_one, stairs
from capcli.pruning.structures import Structure, structure_of


@dataclass(kw_only=True)
class Pruner:
    """Masks, what they are chosen by, and when.

    alive: the units that stay, [U]. state: what the criterion remembers.
    """

    criterion: Criterion
    subject: Subject
    schedule: Schedule
    state: State
    alive: Tensor
    sparsity: float = 0.0

    @property
    def matrices(self) -> Matrices:
        """The masked matrices."""
        return self.subject.matrices

    @property
    def structure(self) -> Structure:
        """What is removed together."""
        return self.subject.structure

    @property
    def final(self) -> float:
        """The sparsity at the end."""
        return self.schedule.final

    def scheduled(self, step: int) -> float:
        """The sparsity that holds during `step`: that of the schedule, held while masks are not due."""
        sparsity = self.schedule(step)
        if self.criterion.due != "window" or sparsity == self.final:
            return sparsity
        window = window_of(self.subject.total_steps)
        return self.schedule(step // window * window)

    def rises(self, step: int) -> bool:
        """Whether the sparsity rises at `step`."""
        return self.scheduled(step) > self.sparsity

    def rises_at(self) -> list[int]:
        """The steps at which the sparsity rises, after the first."""
        steps = range(1, self.subject.total_steps)
        return [step for step in steps if self.scheduled(step) > self.scheduled(step - 1)]

    def due(self, step: int) -> bool:
        """Whether masks are chosen anew at `step`, if anything is removed by then."""
        window = window_of(self.subject.total_steps)
        return {"rise": False, "step": True, "window": step % window == 0}[self.criterion.due] or self.rises(step)

    def measures(self, step: int) -> bool:
        """Whether `update` runs the network at `step`, which takes a while."""
        asks = self.criterion.prepare is not None or self.criterion.calibrated
        return asks and self.subject.calibration is not None and self.rises(step)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Choose the masks for `step`."""
        self.matrices.forget_gates()  # of the step before
        due, self.sparsity = self.due(step), max(self.sparsity, self.scheduled(step))
        if self.sparsity == 0 or not due:
            return
        if self.criterion.prepare is not None and self.subject.calibration is not None:
            self.criterion.prepare(self.state, self.subject, step)
        self.alive = self._chosen(step)
        self.matrices.mask.copy_(self.structure.expand(self.alive))
        if self.criterion.revise is not None:
            self.criterion.revise(self.state, self.subject, step)

    def _chosen(self, step: int) -> Tensor:
        """The units that stay at `step`: those that the criterion chooses itself, or the best by its scores."""
        if self.criterion.choose is not None:
            return self.criterion.choose(self.state, self.subject, step, self.sparsity)
        assert self.criterion.scores is not None, "a criterion has scores, or chooses itself"
        return self.structure.select(self.criterion.scores(self.state, self.subject), self.sparsity, self.alive)

    @property
    def errors(self) -> dict[str, float]:
        """What the last calibration lost of the outputs of each matrix, by its name, where that was measured."""
        found = self.state.get(ERRORS)
        pairs = zip(self.matrices.names, [] if found is None else found.tolist(), strict=found is not None)
        return {name: error for name, error in pairs if not math.isnan(error)}

    @property
    def few_rises(self) -> bool:
        """Whether the sparsity rises in a few large steps, before each of which snapshots are taken."""
        return self.structure.few_rises or self.criterion.calibrated

    @property
    def observes(self) -> bool:
        """Whether the gradients of this step count: not once the last mask has been chosen, nor where all that counts
        is measured on examples."""
        if self.criterion.observe is None or self.subject.calibration is not None:
            return False
        return self.criterion.due != "rise" or self.sparsity < self.final

    @torch.no_grad()
    def observe(self, step: Step) -> None:
        """Show the criterion the gradients of this step; call after backward."""
        if self.observes and self.criterion.observe is not None:
            self.criterion.observe(self.state, self.subject, step)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the network. Trained scores are in the network."""
        return {"alive": self.alive, **self.state}

    def restore(self, tensors: Mapping[str, Tensor], sparsity: float) -> None:
        """Put back what `tensors` gave."""
        self.sparsity = sparsity
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.matrices.mask.copy_(self.structure.expand(self.alive))


def planned(model: Model, config: PruneConfig) -> Structure:
    """What the run will remove. Raises `ConfigError` when the sparsity cannot be reached with this structure."""
    criterion = CRITERIA[config.criterion]
    return structure_of(model, config, structured=criterion.structured, scope=criterion.scope)


def make_pruner(model: Model, config: PruneConfig, total_steps: int, calibration: Calibration | None = None) -> Pruner:
    """Put masks on the model; of a run of 0 steps, `update` then takes one stair at a time.

    Raises `ConfigError` when the sparsity cannot be reached with this structure.
    """
    criterion, structure = CRITERIA[config.criterion], planned(model, config)
    matrices = attach(
        model.prunable(),
        learned="scores" in criterion.trains,
        dense=criterion.gradient == "dense",
        gated=structure.readers,
        unread=structure.unread,
    )
    if matrices.scores is not None and config.score_init == "magnitude":
        matrices.scores.copy_(initial_scores(matrices))
    staged = stairs if total_steps else one_by_one
    total_steps = total_steps or len(config.stair_list)
    subject = Subject(matrices=matrices, structure=structure, total_steps=total_steps, calibration=calibration)
    schedule = Schedule(
        total=total_steps,
        final=config.sparsity,
        dense_share=config.dense_share,
        final_share=config.final_share if staged is stairs else 0.0,
        shape=staged if criterion.calibrated else structure.shape,
        stairs=config.stair_list,
        initial=config.initial_sparsity,
        every=max(1, round(config.update_every * total_steps)),
        earliest=window_of(total_steps) if criterion.due == "window" else int(structure.few_rises and not calibration),
    )
    return Pruner(
        criterion=criterion,
        subject=subject,
        schedule=schedule,
        state=criterion.init(subject),
        alive=torch.ones(structure.count(), dtype=torch.bool, device=matrices.mask.device),
    )
