"""The losses that `cap prune` trains with: which, and how much each counts."""

from __future__ import annotations

from dataclasses import dataclass

from capcli.config.options import option

NORMALIZATIONS = ("mean", "reference")
POOLINGS = ("auto", "head", "cls", "mean")
KD_SCALES = ("t2", "none")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The terms of the loss and their weights; part of `PruneConfig`."""

    losses: str = option(
        "",
        "losses to train with, from ce,kd,prc,snc,fic,hid; by default those of the method",
        panel="Losses",
        expert=True,
        metavar="LIST",
    )
    pooling: str = option(
        "auto",
        "sentence vector: head (what enters the classifier), cls, mean, or auto: head where that part of the model is "
        "pre-trained, cls where it is drawn at random",
        panel="Losses",
        names=POOLINGS,
        expert=True,
    )
    tau: float = option(0.1, "temperature of the contrastive terms", panel="Losses", expert=True)
    extra_examples: int = option(
        4096, "stored vectors drawn per step for each contrastive term", panel="Losses", expert=True
    )
    normalization: str = option(
        "mean",
        "scaling of the contrastive terms: mean, or reference for that of the reference code",
        panel="Losses",
        names=NORMALIZATIONS,
        expert=True,
    )
    unsupervised_weight: float = option(
        0.005,
        "weight of the unsupervised contrastive terms; on the scale of --normalization mean the paper's is 0.1, of snc "
        "that divided by the number of snapshots",
        panel="Losses",
        expert=True,
    )
    supervised_weight: float = option(
        0.02,
        "weight of the supervised contrastive terms; on the scale of --normalization mean the paper's 10 is about "
        "0.005, so the default is another mixture of the two; --preset paper has the paper's",
        panel="Losses",
        expert=True,
    )
    ce_weight: float = option(0.1, "weight of the task loss (1 when it is the only loss)", panel="Losses", expert=True)
    kd_weight: float = option(0.9, "weight of distillation", panel="Losses", expert=True)
    kd_temperature: float = option(2.0, "temperature of distillation", panel="Losses", expert=True)
    kd_scale: str = option(
        "t2",
        "scale of distillation: t2 (times the square of the temperature), or none, which GRAIN uses at temperature 8",
        panel="Losses",
        names=KD_SCALES,
        expert=True,
    )
    hidden_weight: float = option(
        10.0,
        "weight of the hidden-state distillation (hid); GRAIN's ratio to distillation is 64 with --kd-scale t2, and 1 "
        "with none",
        panel="Losses",
        expert=True,
    )
    reg_weight: float = option(
        0.0,
        "weight of the score regulariser (soft movement, smp); it grows with the sparsity, for smp over the whole run; "
        "with 0 soft-movement is movement with --scope global",
        panel="Losses",
        expert=True,
    )
