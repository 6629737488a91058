"""Which options of `cap prune` fit one another."""

from __future__ import annotations

import math
from typing import Any

from capcli.config import patterns, rises, target
from capcli.config.names import BASES, LEARNED, LOSSES, METHODS
from capcli.config.options import at_least, check_name, flag_name
from capcli.errors import ConfigError

PruneConfig = Any  # the one of `config.prune`, which imports this module


def check(config: PruneConfig) -> None:
    """Raise `ConfigError` for values that cannot be, alone or together."""
    for name in config.loss_names:
        check_name("loss", name, LOSSES)
    if config.refit_target == "teacher" and not config.from_teacher:
        raise ConfigError(
            "--refit-target teacher needs a student that starts from the teacher's weights",
            "use --init teacher, or --refit-target student",
        )
    if config.epochs and not {"ce", "kd"} & set(config.loss_names):
        raise ConfigError("--losses must include ce or kd: the other terms alone do not teach the task")
    target.check(config)
    if config.basis != BASES[0] and not (METHODS[config.method].structured and config.structure == "dimensions"):
        what = f"whole {config.structure}" if METHODS[config.method].structured else "single weights"
        raise ConfigError(
            f"--basis {config.basis} is for dimensions inside heads, {config.method} removes {what}",
            "leave it out, or use --method cap-f --structure dimensions",
        )
    if not 0 <= config.sparsity < 1:
        hint = f"did you mean --sparsity {config.sparsity / 100:g}?" if 1 < config.sparsity < 100 else ""
        raise ConfigError(f"sparsity is the fraction of weights removed, in [0, 1), got {config.sparsity:g}", hint)
    at_least(
        0, max_train_samples=config.max_train_samples, teacher_epochs=config.teacher_epochs, max_time=config.max_time
    )
    at_least(0, extra_examples=config.extra_examples, seed=config.seed, checkpoint_seconds=config.checkpoint_seconds)
    at_least(1, batch_size=config.batch_size, calibration=config.calibration, fisher_block=config.fisher_block)
    at_least(1, selections=config.selections)
    at_least(0, importance_examples=config.importance_examples, micro_batch=config.micro_batch)
    at_least(0.1, timeout=config.timeout)
    if config.importance_examples and config.staged and METHODS[config.method].structured:
        raise ConfigError(
            f"--importance-examples has no effect on {config.method}, which measures on --calibration examples",
            "leave it out, or use --calibration",
        )
    if config.importance_examples and not METHODS[config.method].structured:
        raise ConfigError(
            f"--importance-examples has no effect on {config.method}, which removes single weights",
            "leave it out, or use --method cap-f",
        )
    at_least(0, epochs=config.epochs)
    if not (config.epochs or config.calibrated):
        raise ConfigError(
            f"--epochs must be at least 1: {config.method} chooses what to remove while it trains",
            "without training: --method fisher, or --method structured for whole heads and neurons",
        )
    positive = {"tau": config.tau, "kd_temperature": config.kd_temperature, "lr_scale": config.lr_scale}
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{flag_name(name)} must be a positive number, got {value}")
    at_least(0, lr=config.lr, teacher_lr=config.teacher_lr)
    at_least(0, score_lr=config.score_lr, weight_decay=config.weight_decay, reg_weight=config.reg_weight)
    at_least(0, unsupervised_weight=config.unsupervised_weight, supervised_weight=config.supervised_weight)
    at_least(0, ce_weight=config.ce_weight, kd_weight=config.kd_weight, hidden_weight=config.hidden_weight)
    shares = {"lr_warmup": config.lr_warmup, "dense_share": config.dense_share, "final_share": config.final_share}
    shares |= {"initial_sparsity": config.initial_sparsity, "update_every": config.update_every}
    for name, value in {**shares, "holdout": config.holdout, "floor": config.floor}.items():
        if not 0 <= value < 1:
            raise ConfigError(f"{flag_name(name)} is a share in [0, 1), got {value:g}")
    if config.dense_share + config.final_share > 1:
        raise ConfigError("--dense-share and --final-share together exceed 1, which leaves no steps for pruning")
    patterns.check(config)
    _check_masks_only(config)
    rises.check(config)


def _check_masks_only(config: PruneConfig) -> None:
    """Raise `ConfigError` for options that are for learned masks, or that change weights which are to stay."""
    if config.train_head and not config.masks_only:
        raise ConfigError(
            f"--train-head has no effect on {config.method}, which trains all weights",
            "leave it out, or use --method smp",
        )
    if config.masks_only and config.init == "fisher":
        raise ConfigError(
            f"--init fisher changes weights, and {config.method} learns only masks", "use --init pretrained, or teacher"
        )
    if config.scope == "type" and (config.criterion not in LEARNED or config.init == "fisher"):
        what = "--init fisher" if config.criterion in LEARNED else config.method
        raise ConfigError(
            f"--scope type goes by learned scores, and {what} has none", "use --scope matrix or global, or --method smp"
        )
