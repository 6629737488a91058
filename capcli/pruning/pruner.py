"""A pruner: masks on a model, kept at the scheduled sparsity.

Sparsity by the schedule, scores by the criterion, units by the structure, the mask of their weights: the same four
lines for every method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from capcli import parallel
from capcli.config.names import STRUCTURES
from capcli.config.prune import PruneConfig
from capcli.errors import RunFailed
from capcli.models.heads import head_names, norm_names
from capcli.models.model import Model
from capcli.pruning import schedules
from capcli.pruning.calibration import Calibration
from capcli.pruning.costs import WEIGHTS, Measure
from capcli.pruning.criteria import CRITERIA
from capcli.pruning.criteria.fisher import FISHER
from capcli.pruning.criteria.movement import initial_scores
from capcli.pruning.criteria.seat import ERRORS, Criterion, State, Step, Subject, window_of
from capcli.pruning.criteria.votes import voted
from capcli.pruning.inputs import mask_folders
from capcli.pruning.masked import Matrices, attach, freeze
from capcli.pruning.refit import refit
from capcli.pruning.schedules import Schedule, one_by_one, stairs
from capcli.pruning.search import searched
from capcli.pruning.structures import Structure, structure_of


@dataclass(kw_only=True)
class Pruner:
    """Masks, what they are chosen by, and when.

    alive: the units that stay, [U]. state: what the criterion remembers. fitting: what the weights that stay are fitted
    with after each rise, if they are. selections: how many there are at a rise of the sparsity.
    """

    criterion: Criterion
    subject: Subject
    schedule: Schedule
    state: State
    alive: Tensor
    fitting: Calibration | None = None
    selections: int = 1
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
        due = {"rise": False, "step": True, "window": step > 0 and step % window == 0}
        return due[self.criterion.due] or self.rises(step)

    def measures(self, step: int) -> bool:
        """Whether `update` runs the network at `step`, which takes a while."""
        asks = self.criterion.prepare is not None or self.criterion.calibrated
        measured = asks and self.subject.calibration is not None
        return (measured or self.fitting is not None) and self.rises(step)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Choose the masks for `step`."""
        self.matrices.forget_gates()  # of the step before
        due, before = self.due(step), self.sparsity
        self.sparsity = max(before, self.scheduled(step))
        if self.sparsity == 0 or not due:
            return
        for sparsity in schedules.between(before, self.sparsity, self.selections):
            self._select(step, sparsity)

    def _select(self, step: int, sparsity: float) -> None:
        """Choose the masks for a sparsity, and fit what stays."""
        if self.criterion.prepare is not None and self.subject.calibration is not None:
            self.criterion.prepare(self.state, self.subject, step)
        before = self.matrices.mask.clone() if self.fitting is not None else None
        self.alive = self._chosen(step, sparsity)
        self.matrices.mask.copy_(self.structure.expand(self.alive))
        if self.fitting is not None and before is not None:
            errors = refit(self.matrices, before, self.fitting, step, self.structure.readers)
            self.state[ERRORS].copy_(errors)
        if (measured := self.fitting or self.subject.calibration) is not None:
            self._agree(measured.model)
        if self.criterion.revise is not None:
            self.criterion.revise(self.state, self.subject, step)

    def _agree(self, model: Model) -> None:
        """Take what rank 0 found where something was solved: other processors may round otherwise."""
        for tensor in (*model.net.parameters(), self.matrices.mask, self.alive):
            parallel.same(tensor)

    def _chosen(self, step: int, sparsity: float) -> Tensor:
        """The units that stay at `step`: those that the criterion chooses itself, or the best by its scores."""
        if self.criterion.choose is not None:
            return self.criterion.choose(self.state, self.subject, step, sparsity)
        assert self.criterion.scores is not None, "a criterion has scores, or chooses itself"
        scores = self.criterion.scores(self.state, self.subject)
        # Trained scores are looked at with the other weights, before each checkpoint; -inf is of what was removed. On a
        # device a step waits for nothing, but a search is on the host.
        watched = self.criterion.due != "step" and (scores.device.type == "cpu" or self.criterion.searched)
        if watched and not bool((scores < torch.inf).all()):
            bad = [name for name, value in self.state.items() if not bool(value.isfinite().all()) and name != ERRORS]
            raise RunFailed(
                f"scores are not finite at step {step}, first bad tensor: {(bad or ['a matrix'])[0]}",
                "lower --lr, or use --precision fp32",
            )
        chosen = self.structure.select(scores, sparsity, self.alive)
        swap = self.criterion.swap
        return chosen if swap is None else swap(self.state, self.subject, chosen, self.alive)

    @property
    def errors(self) -> dict[str, float]:
        """What the last calibration lost of the outputs of each matrix, by its name, where that was measured."""
        found = self.state.get(ERRORS)
        pairs = zip(self.matrices.names, [] if found is None else found.tolist(), strict=found is not None)
        return {name: error for name, error in pairs if not math.isnan(error)}

    @property
    def few_rises(self) -> bool:
        """Whether the sparsity rises in a few large steps, before each of which snapshots are taken."""
        return self.structure.few_rises or bool(self.schedule.stairs)

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

    def start(self, other: Pruner) -> None:
        """Begin where another pruner of the same weights ends; trained scores rank what it has left."""
        self.alive, self.sparsity = other.alive.clone(), other.sparsity
        if self.matrices.scores is not None:
            with torch.no_grad():
                self.matrices.scores.copy_(initial_scores(self.matrices))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold beside the network. Trained scores are in the network."""
        return {"alive": self.alive, **self.state}

    def restore(self, tensors: Mapping[str, Tensor], sparsity: float) -> None:
        """Put back what `tensors` gave."""
        self.sparsity = sparsity
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        self.matrices.mask.copy_(self.structure.expand(self.alive))


def planned(model: Model, config: PruneConfig, measure: Measure) -> Structure:
    """What the run will remove, as it is measured. Raises `ConfigError` when the sparsity cannot be reached with this
    structure."""
    criterion = CRITERIA[config.criterion]
    if criterion.searched and config.structure == STRUCTURES[0]:
        return searched(model, config, measure)
    return structure_of(model, config, structured=criterion.structured, scope=criterion.scope, length=measure.length)


def make_pruner(
    model: Model,
    config: PruneConfig,
    total_steps: int,
    calibration: Calibration | None = None,
    measure: Measure = WEIGHTS,
) -> Pruner:
    """Put masks on the model; of a run of 0 steps, `update` then takes one stair at a time.

    calibration: what is measured and fitted on, where the configuration asks for it. measure: what is counted.
    Raises `ConfigError` when the sparsity cannot be reached with this structure.
    """
    criterion, structure = CRITERIA[config.criterion], planned(model, config, measure)
    if config.mask_from:
        criterion = voted(list(mask_folders(config).values()))
    matrices = attach(
        model.prunable(),
        learned="scores" in criterion.trains,
        dense=criterion.gradient == "dense" or config.regrow,
        gated=structure.readers,
        unread=structure.unread,
    )
    if matrices.scores is not None and config.score_init == "magnitude":
        matrices.scores.copy_(initial_scores(matrices))
    if "weights" not in criterion.trains:
        freeze(model.net, head_names(model.net) | norm_names(model.net) if config.train_head else ())
    staged = stairs if total_steps else one_by_one
    total_steps = total_steps or len(config.stair_list)
    measuring = calibration if criterion.calibrated else None
    if calibration is not None and config.importance_examples:
        measuring = replace(calibration, count=config.importance_examples)
    fitting = calibration if config.refit and not criterion.choose else None
    subject = Subject(
        matrices=matrices,
        structure=structure,
        total_steps=total_steps,
        calibration=measuring,
        refit=config.refit,
    )
    schedule = Schedule(
        total=total_steps,
        final=config.sparsity,
        dense_share=config.dense_share,
        final_share=config.final_share if staged is stairs else 0.0,
        shape=staged if config.stair_list else structure.shape,
        stairs=config.stair_list,
        start=config.start_sparsity,
        initial=config.start_sparsity or config.initial_sparsity,
        every=max(1, round(config.update_every * total_steps)),
        earliest=window_of(total_steps) if criterion.due == "window" else int(structure.few_rises and not measuring),
    )
    return Pruner(
        criterion=criterion,
        subject=subject,
        schedule=schedule,
        state=criterion.init(subject) | ({ERRORS: _unmeasured(matrices)} if criterion.calibrated or fitting else {}),
        fitting=fitting,
        selections=config.selections,
        alive=torch.ones(structure.count(), dtype=torch.bool, device=matrices.mask.device),
    )


def started(pruner: Pruner, stairs: Sequence[float], calibration: Calibration) -> Pruner:
    """A pruner on the same weights, and with the same scope, that takes `stairs` by Fisher information, with a refit at
    each, see `Pruner.start`."""
    schedule = Schedule(
        total=len(stairs), final=stairs[-1], dense_share=0.0, final_share=0.0, shape=one_by_one, stairs=stairs
    )
    return Pruner(
        criterion=FISHER,
        subject=replace(pruner.subject, total_steps=len(stairs), calibration=calibration),
        schedule=schedule,
        state={ERRORS: _unmeasured(pruner.matrices)},
        fitting=calibration,
        alive=torch.ones_like(pruner.alive),
    )


def _unmeasured(matrices: Matrices) -> Tensor:
    """What is lost of the outputs of each matrix; NaN until it is measured."""
    return torch.full((len(matrices.names),), torch.nan, device=matrices.mask.device)
