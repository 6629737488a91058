"""What a training phase learns from: the terms of a step and their weights.

Letters: B batch, N examples, C labels, H hidden size.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from capcli.config.prune import PruneConfig
from capcli.data import kinds
from capcli.data.batches import Batch, Examples
from capcli.events import Event
from capcli.models import compiled, predict, task_losses
from capcli.models.devices import Compute
from capcli.models.model import Model, pooling_of
from capcli.pruning import banks, calibration, losses
from capcli.pruning.masked import unmasked
from capcli.pruning.pruner import Pruner
from capcli.stages import RunFolder


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a phase learns from: loss names, the teacher's logits by example or by token (None where it is asked at each
    step), class labels [N] or None, a bank per module, and for hid the teacher itself with a projection [H, H] per
    compared layer."""

    losses: tuple[str, ...]
    logits: Tensor | None = None
    labels: Tensor | None = None
    banks: Mapping[str, banks.Bank] = field(default_factory=dict)
    teacher: Model | None = None
    projections: nn.ParameterList = field(default_factory=nn.ParameterList)


COMPILED_LENGTHS = 16  # tokens, of which compiled layers get multiples
Steps = Generator[Event, None, Any]
PHASES = ("teacher", "prune")
SAMPLED = "sampled"  # what the importance for vectors is measured by, see `calibration.sampled`


@dataclass(kw_only=True)
class Split:
    """How many examples go through the network at once: 0 for all of a step. Changed when memory runs out."""

    examples: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training phase. `snapshot(step)` is called before each step; `epoch_end(epoch, step)` after the last step of an
    epoch, it returns metrics for the history. Both yield events. `event` makes an event of this phase; `of` is what its
    checkpoints depend on, see `stages.origin`. steps: how many there are, where they are not whole epochs. spent:
    seconds of the phase before the first step. split: the parts that steps are computed in. layers: those of the model,
    where they are compiled."""

    run: RunFolder
    phase: str
    model: Model
    examples: Examples
    config: PruneConfig
    on: Compute
    epochs: int
    lr: float
    objective: Objective
    pruner: Pruner | None
    snapshot: Callable[[int], Steps]
    epoch_end: Callable[[int, int], Steps]
    event: Callable[..., Event]
    of: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    spent: float = 0.0
    split: Split = field(default_factory=Split)
    layers: compiled.Layers | None = None

    @functools.cached_property
    def rises(self) -> list[int]:
        """The steps at which the sparsity rises: none when it has risen before the first."""
        return self.pruner.rises_at() if self.pruner is not None and not self.steps else []

    @property
    def total(self) -> int:
        """How many steps there are."""
        return self.steps or -(-len(self.examples) // self.config.batch_size) * self.epochs

    def padded(self, rows: NDArray[np.int64]) -> int:
        """Tokens that the examples `rows` are padded to at least: where layers are compiled for an accelerator, few
        lengths are wanted."""
        if self.layers is None or self.on.device.type == "cpu":
            return 0
        return -(-int(self.examples.lengths[rows].max()) // COMPILED_LENGTHS) * COMPILED_LENGTHS

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around a forward pass of the model in training: layers that share a matrix mask it once; compiled layers."""
        if self.layers is None:
            with parametrize.cached():
                yield
        else:
            with unmasked(self.pruner.matrices.linears if self.pruner else ()), self.layers.compiled():
                yield


def make_projections(teacher: Model, example: Batch) -> nn.ParameterList:
    """A projection [H, H] for each hidden state of the teacher that hid compares, identity; told from one example."""
    with torch.no_grad():
        states = predict.forward_states(teacher, example.inputs)[2]
    found = [states[i] for i in compared(len(states))]
    return nn.ParameterList(nn.Parameter(torch.eye(part.shape[-1], device=part.device)) for part in found)


def outputs(job: Job, batch: Batch, *, asked: bool = True) -> dict[str, Tensor]:
    """What the terms of a batch are made of: the student's `logits` and its L2-normalised sentence vectors `z` [B, H].

    With `asked` what the teacher says to the same texts as well, where it is needed at each step: its logits,
    `teacher`, and HID of both, `hid`, which is a mean over tokens.
    """
    hid = asked and "hid" in job.objective.losses
    pooling = pooling_of(job.model, job.config.pooling)
    with job.on.autocast(), job.running():
        logits, vector, states = predict.forward_states(job.model, batch.inputs, pooling, keep=hid)
    found = {"logits": logits, "z": F.normalize(vector.float(), dim=-1)}
    if hid:
        found["hid"] = _hidden(job, states, batch)
    if asked and "kd" in job.objective.losses and job.objective.logits is None:
        assert job.objective.teacher is not None
        with job.on.autocast(), torch.no_grad():
            found["teacher"] = predict.forward(job.objective.teacher, batch.inputs)[0]
    return found


def terms_of(job: Job, batch: Batch, found: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    """The unweighted terms of section 1, from the `outputs` of a batch: ce, kd, `MODULE_u`, `MODULE_s` for each bank
    that has vectors, hid, reg."""
    names, config, logits = job.objective.losses, job.config, found["logits"]
    terms = {}
    kind, mask = job.model.kind, batch.inputs["attention_mask"]
    if SAMPLED in names:
        drawn = calibration.sampled(logits, [config.seed, step, int(batch.ids[0])])
        terms[SAMPLED] = task_losses.task_loss(logits, drawn, kind)
    if "ce" in names:
        terms["ce"] = task_losses.task_loss(logits, batch.labels, kind, mask)
    if "kd" in names:
        known = job.objective.logits
        teacher = (found["teacher"] if known is None else _answered(known, batch)).view_as(logits)
        answered = batch.labels != kinds.NO_LABEL if kinds.KINDS[kind].words else mask
        terms["kd"] = task_losses.distillation(
            logits, teacher, kind, config.kd_temperature, answered, scaled=config.kd_scale == "t2"
        )
    if "hid" in names:
        terms["hid"] = found["hid"]
    terms |= _contrastive(job, found["z"], batch, step)
    if job.pruner is not None and job.pruner.criterion.regularised and config.reg_weight > 0:
        ramp = RAMPS[job.pruner.criterion.regularised](job, job.pruner, step)
        terms["reg"] = ramp * losses.score_regulariser(job.pruner.matrices.score_views())
    return terms


def _with_sparsity(job: Job, pruner: Pruner, step: int) -> float:
    return pruner.sparsity / max(pruner.final, 1e-9)


def _with_run(job: Job, pruner: Pruner, step: int) -> float:
    return 1 - (1 - step / job.total) ** 3


RAMPS = {"sparsity": _with_sparsity, "run": _with_run}
"""How REG grows: as the sparsity does, or as it would if it rose over the whole run; 0 at the start, 1 at the end."""


def weighted(job: Job, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each term times its weight."""
    weights = term_weights(job.config, job.objective.losses)
    return {name: weights[name] * term for name, term in terms.items()}


def step_seed(seed: int, phase: str, step: int, *part: int) -> int:
    """Seed of everything random in a step, or in a part of it. Mixed into 32 bits, because the CPU's generator uses no
    more of it."""
    mixed = np.random.SeedSequence([seed, PHASES.index(phase), step, *part]).generate_state(1, np.uint32)
    return int(mixed[0])


def _answered(logits: Tensor, batch: Batch) -> Tensor:
    """What the teacher answered to a batch, from its answers to the whole set."""
    places = batch.ids if batch.places is None else batch.places
    return logits.index_select(0, places.flatten())


def compared(n_states: int) -> list[int]:
    """Which hidden states hid compares: of the embeddings, of every second layer, and of the last."""
    return sorted({*range(0, n_states, 2), n_states - 1})


def _hidden(job: Job, states: tuple[Tensor, ...], batch: Batch) -> Tensor:
    """HID of a batch; the teacher computes its states anew, because those of a whole set fill no disk."""
    assert job.objective.teacher is not None
    with job.on.autocast(), torch.no_grad():
        theirs = predict.forward_states(job.objective.teacher, batch.inputs)[2]
    chosen = compared(len(states))
    ours, wanted = ([part[i] for i in chosen] for part in (states, theirs))
    return losses.hidden_distillation(ours, wanted, list(job.objective.projections), batch.inputs["attention_mask"])


def _contrastive(job: Job, z: Tensor, batch: Batch, step: int) -> dict[str, Tensor]:
    """U and P of every module; the drawn examples of one step serve all of them."""
    terms: dict[str, Tensor] = {}
    labels = job.objective.labels
    for name, bank in job.objective.banks.items():
        if not bank.n_vectors:
            continue
        seed = [job.config.seed, step]
        drawn = torch.from_numpy(banks.draw(len(job.examples), bank.n_vectors, job.config.extra_examples, seed))
        drawn = drawn.to(z.device, non_blocking=True)
        terms[f"{name}_u"], supervised = losses.contrastive_terms(
            z,
            batch.ids,
            None if labels is None else labels.index_select(0, batch.ids),
            bank.gather(batch.ids),
            bank.gather(drawn),
            drawn,
            None if labels is None else labels.index_select(0, drawn),
            tau=job.config.tau,
            normalization=job.config.normalization,
        )
        if labels is not None:
            terms[f"{name}_s"] = supervised
    return terms


def term_weights(config: PruneConfig, names: tuple[str, ...]) -> dict[str, float]:
    """The weight of each term; ce or kd alone weighs 1."""
    both = {"ce", "kd"} <= set(names)
    weights = {
        "ce": config.ce_weight if both else 1.0,
        "kd": config.kd_weight if both else 1.0,
        "hid": config.hidden_weight,
        "reg": config.reg_weight,
        SAMPLED: 1.0,
    }
    for module in ("prc", "snc", "fic"):
        weights |= {f"{module}_u": config.unsupervised_weight, f"{module}_s": config.supervised_weight}
    return weights
