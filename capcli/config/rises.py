"""How the sparsity rises: in what stairs, and which options fit the method in that."""

from __future__ import annotations

import itertools
import math
from typing import Any

from capcli.config.names import AUTO, METHODS, ONCE, STRUCTURES
from capcli.config.options import at_least, split_list
from capcli.config.patterns import n_of_m
from capcli.errors import ConfigError

PruneConfig = Any  # the one of `config.prune`, which imports this module

FIRST_STAIR = 0.8  # what a staged method removes at once
MOST_IN_BLOCK = 128  # weights; memory and time grow with it and its square
UNTRAINED_STAIR = 0.6  # the same without training, where the refit alone has to make up for it
FIRST_STAIR_OF_UNITS = 0.5  # the same of whole heads and neurons


def halving(sparsity: float, first: float = FIRST_STAIR) -> tuple[float, ...]:
    """Sparsities from `first` to `sparsity`: what stays shrinks by the same factor each time, at most by half."""
    if sparsity <= first:
        return (sparsity,)
    ratio = (1 - sparsity) / (1 - first)
    n_rises = math.ceil(math.log2(1 / ratio) - 1e-9)
    return (*(1 - (1 - first) * ratio ** (i / n_rises) for i in range(n_rises)), sparsity)


def start(config: PruneConfig) -> float:
    """The sparsity before the first step: that of a calibrated start, or 0."""
    return (config.initial_sparsity or min(FIRST_STAIR, config.sparsity)) if config.init == "fisher" else 0.0


def stairs(config: PruneConfig) -> tuple[float, ...]:
    """The sparsities one after another, the last of them `sparsity`; none where it rises in another way."""
    if n_of_m(config.structure):
        return (config.sparsity,)
    if not (config.calibrated or config.stairs):
        return ()
    if config.one_shot or config.mask_from or config.stairs == ONCE:
        return (config.sparsity,)
    if config.stairs in ("", AUTO):
        return halving(config.sparsity, _first(config))
    try:
        return tuple(float(part) for part in config.stairs.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"--stairs needs numbers, got {config.stairs!r}", "for example --stairs 0.8,0.9") from error


def _first(config: PruneConfig) -> float:
    """What the first stair removes."""
    if METHODS[config.method].structured:
        return FIRST_STAIR_OF_UNITS
    return FIRST_STAIR if config.epochs else UNTRAINED_STAIR


def check(config: PruneConfig) -> None:
    """Raise `ConfigError` for options that do not fit the method or one another."""
    _check_stairs(config)
    _check_often(config)
    _check_untrained(config)
    _check_initial(config)
    _check_start(config)
    _check_block(config)
    _check_masks(config)
    _check_regrow(config)


def _check_stairs(config: PruneConfig) -> None:
    """Raise `ConfigError` for stairs that do not lead up to the sparsity."""
    if not config.stairs:
        return
    method = METHODS[config.method]
    if not method.steady or (method.structured and not method.staged) or method.one_shot:
        raise ConfigError(f"--stairs has no effect on {config.method}", "leave it out, or use --method fisher")
    found = config.stair_list
    rising = all(a < b for a, b in itertools.pairwise((0.0, *found)))
    if not (found and rising and found[-1] == config.sparsity):
        goal = f"--sparsity {config.sparsity:g}"
        if config.target:
            goal = f"{config.sparsity:g}, which is what --target {config.target} removes"
        raise ConfigError(
            f"--stairs must rise from above 0 to {goal}, got {config.stairs!r}",
            f"for example --stairs {','.join(f'{s:.4g}' for s in halving(config.sparsity))}",
        )


def _check_often(config: PruneConfig) -> None:
    """Raise `ConfigError` for what is done at each rise of the sparsity, when that is all the time, or each step."""
    method = METHODS[config.method]
    if config.refit and not method.steady:
        raise ConfigError(
            f"--refit has no effect on {config.method}, which chooses its masks anew all the time",
            "leave it out, or use --method fisher",
        )
    often = config.rises_often and not config.update_every
    name = f"--structure {config.structure}" if method.structured else config.method
    for flag, wanted in (("--lr-schedule cycle", config.lr_schedule == "cycle"), ("--refit", config.refit)):
        if wanted and often:
            stairs = "" if method.structured or not method.steady else ", or --stairs"
            raise ConfigError(
                f"{flag} is for sparsity that rises in a few large steps, and with {name} it rises every few steps",
                f"set --update-every as well, such as 0.05{stairs}",
            )


def _check_untrained(config: PruneConfig) -> None:
    """Raise `ConfigError` for options that a method which trains nothing, or only such a one, can use."""
    one_shot = METHODS[config.method].one_shot
    at_least(0, heal=config.heal)
    if one_shot and config.epochs:
        raise ConfigError(
            f"{config.method} trains nothing, got --epochs {config.epochs}",
            "leave it out; --heal STEPS trains what stays, --method fisher prunes while it trains",
        )
    if config.heal and (config.epochs or not config.calibrated):
        raise ConfigError(
            "--heal is for a run that trains nothing before", "use --preset minutes, or a method such as wanda"
        )
    if "ce" in config.loss_names and not config.uses_labels:
        what = "--text" if config.source.text else config.source.task
        raise ConfigError(
            f"{what} has no labels, and ce needs them", "leave ce out: kd learns what the teacher answers"
        )
    if one_shot != (config.scope == "row") and config.scope in ("row", "global"):
        raise ConfigError(
            f"--scope {config.scope} has no meaning for {config.method}, which ranks "
            + ("the weights of one matrix after another" if one_shot else "all weights, or those of a matrix"),
            f"use --scope {'matrix or row' if one_shot else 'matrix or global'}",
        )
    if not config.epochs and (lost := [name for name in split_list(config.losses) if name not in ("ce", "kd")]):
        raise ConfigError(f"--losses {lost[0]} needs epochs: without them there is only --heal, with ce and kd")


def _check_initial(config: PruneConfig) -> None:
    """Raise `ConfigError` for a sparsity at the start that cannot be."""
    if config.initial_sparsity > config.sparsity:
        raise ConfigError(
            f"--initial-sparsity {config.initial_sparsity:g} is more than --sparsity {config.sparsity:g}",
            "it is the part that is removed at once when pruning begins; choose less",
        )
    if config.initial_sparsity and config.stair_list:
        stairs = f", or use --method fisher --stairs {config.initial_sparsity:g},…,{config.sparsity:g}"
        raise ConfigError(
            f"--initial-sparsity has no effect on {config.method}, whose sparsity rises in stairs, or at once",
            f"leave it out{stairs}",
        )
    if config.initial_sparsity and METHODS[config.method].structured and config.structure == STRUCTURES[0]:
        raise ConfigError(
            f"--initial-sparsity has no effect on {config.method}, which removes heads in equal steps",
            "leave it out, or use --structure dimensions",
        )


def _check_start(config: PruneConfig) -> None:
    """Raise `ConfigError` for a calibrated start of a method that cannot go on from it."""
    if config.init != "fisher":
        return
    if config.calibrated:
        raise ConfigError(f"--init fisher is what {config.method} does itself", "leave it out")
    if METHODS[config.method].structured:
        raise ConfigError(
            f"--init fisher removes single weights, and {config.method} whole heads, neurons or dimensions",
            "leave it out, or use a method such as cap-m",
        )
    if config.score_init != "magnitude":
        raise ConfigError("--init fisher ranks the weights at the start", "leave --score-init zero out")


def _check_masks(config: PruneConfig) -> None:
    """Raise `ConfigError` for options that have no meaning beside masks of other runs."""
    if not config.mask_from:
        return
    if not all(name.strip() for name in config.mask_from.split(",")):
        raise ConfigError(f"--mask-from names no run beside a comma: {config.mask_from!r}", "for example runs/a,runs/b")
    if config.criterion != "fisher":
        raise ConfigError(
            f"--mask-from fixes the masks, and {config.method} chooses its own",
            "use --method fisher, or cap-fisher for the contrastive terms",
        )
    given = {
        "--stairs": config.stairs,
        "--selections": config.selections > 1,
        "--fisher-block": config.fisher_block > 1,
        "--regrow": config.regrow,
    }
    if names := [name for name, value in given.items() if value]:
        raise ConfigError(f"{names[0]} has no effect with --mask-from, which chooses once", "leave it out")


def _check_regrow(config: PruneConfig) -> None:
    """Raise `ConfigError` for weights that are to return where none can."""
    if not config.regrow:
        return
    if config.criterion != "fisher":
        raise ConfigError(
            f"--regrow has no effect on {config.method}", "leave it out, or use --method fisher or cap-fisher"
        )
    if len(config.stair_list) * config.selections == 1:
        raise ConfigError(
            "--regrow needs a second selection, and the weights are chosen only once here",
            "use several --stairs, or --selections 2",
        )


def _check_block(config: PruneConfig) -> None:
    """Raise `ConfigError` for blocks of a method without any, or blocks of more than can be inverted."""
    in_blocks = config.staged and not METHODS[config.method].structured
    if config.fisher_block > 1 and not (in_blocks or config.init == "fisher"):
        raise ConfigError(f"--fisher-block has no effect on {config.method}", "leave it out, or use --method fisher")
    if config.refit and config.method == "obert":
        raise ConfigError(
            "--refit has no effect on obert, which corrects the weights that stay itself",
            "leave it out, or use --method fisher --fisher-block 50",
        )
    if config.selections > 1 and not config.staged:
        raise ConfigError(f"--selections has no effect on {config.method}", "leave it out, or use --method fisher")
    if config.fisher_block > MOST_IN_BLOCK:
        raise ConfigError(f"--fisher-block can be at most {MOST_IN_BLOCK}, got {config.fisher_block}")
