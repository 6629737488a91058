"""Learning rates by the width of the model, where the user has not chosen them."""

from __future__ import annotations

from capcli.config.prune import PruneConfig
from capcli.models.model import Model

USUAL_WIDTH = 768  # hidden size of BERT-base
USUAL = {"teacher": 5e-5, "prune": 1e-4}  # peak rates of AdamW at this width
MOST = 4  # times the usual rate, however narrow a model is


def peak(config: PruneConfig, phase: str, model: Model) -> float:
    """The peak learning rate of the weights in a phase: as chosen, or else in inverse proportion to the hidden size,
    times `--lr-scale`.

    Adam moves each weight by about the learning rate, whatever its gradient, so that the change of a layer's output
    grows with the number of its inputs ("Tensor Programs V", arXiv 2203.03466, has rates in 1/width for this reason).
    """
    chosen = config.teacher_lr if phase == "teacher" else config.lr
    return chosen or config.lr_scale * by_width(phase, model)


def by_width(phase: str, model: Model) -> float:
    """The usual peak learning rate in a phase for a model of this width, see `peak`."""
    return USUAL[phase] * min(MOST, USUAL_WIDTH / _width(model))


def notes(config: PruneConfig, model: Model, *, makes_teacher: bool) -> list[str]:
    """What was taken in place of a rate that was not chosen."""
    found = {"--lr": "prune"} if config.trains_weights and not config.lr else {}
    found |= {"--teacher-lr": "teacher"} if makes_teacher and not config.teacher_lr else {}
    told = [f"{flag} is {peak(config, phase, model):.3g}" for flag, phase in found.items()]
    return [f"{' and '.join(told)}, chosen for a hidden size of {_width(model)}"] * bool(told)


def _width(model: Model) -> int:
    return int(getattr(model.net.config, "hidden_size", USUAL_WIDTH))
