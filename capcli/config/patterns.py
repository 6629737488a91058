"""Patterns of single weights: blocks of neighbours that stay or go together, and N of every M.

`--structure` names them beside the units of structured methods. Section 6 of the design's METHODS.
"""

from __future__ import annotations

import re
from typing import Any

from capcli.config.names import METHODS, ONCE, STRUCTURES
from capcli.config.options import check_name
from capcli.errors import ConfigError

PruneConfig = Any  # the one of `config.prune`, which imports this module

SINGLE = "single weights"  # the pattern where no other is chosen, in words
BLOCKS, BLOCK = "4x1", 4  # weights that follow one another in a row
GROUPS = (2, 4, 8, 16)  # the M of N:M
_N_OF_M = re.compile(r"([0-9]{1,2}):([0-9]{1,2})", re.ASCII)


def n_of_m(structure: str) -> tuple[int, int] | None:
    """N and M of `2:4` and the like, or None. Raises `ConfigError` for numbers that cannot be."""
    found = _N_OF_M.fullmatch(structure)
    if found is None:
        return None
    n, m = int(found[1]), int(found[2])
    if m not in GROUPS or not 1 <= n < m:
        raise ConfigError(
            f"--structure N:M keeps N of every M weights, 1 to M - 1, with M one of "
            f"{', '.join(map(str, GROUPS))}; got {structure}",
            "for example --structure 2:4",
        )
    return n, m


def fixed_sparsity(structure: str) -> float | None:
    """The sparsity of N:M, 1 - N/M; None where the user chooses. Raises `ConfigError`."""
    found = n_of_m(structure)
    return None if found is None else 1 - found[0] / found[1]


def in_words(config: PruneConfig) -> str:
    """What the run removes together, as reports have it."""
    structured = METHODS[config.method].structured
    return SINGLE if config.structure == STRUCTURES[0] and not structured else str(config.structure)


def check(config: PruneConfig) -> None:
    """Raise `ConfigError` for a structure that is unknown, or does not fit the method or other options."""
    structure, structured = config.structure, METHODS[config.method].structured
    fixed = fixed_sparsity(structure)
    if fixed is None:
        check_name("structure", structure, (*STRUCTURES, BLOCKS, "2:4"))
    if structure in STRUCTURES[1:] and not structured:
        raise ConfigError(
            f"--structure {structure} is for structured methods, {config.method} removes single weights",
            "leave it out, or use --method cap-f",
        )
    if structured and structure not in STRUCTURES:
        raise ConfigError(
            f"--structure {structure} is for methods that remove single weights, {config.method} removes whole units",
            f"use --structure {' or '.join(STRUCTURES)}, or a method such as fisher",
        )
    if fixed is not None:
        _check_groups(config, fixed)
    if structure == BLOCKS:
        _check_blocks(config)


def _check_groups(config: PruneConfig, sparsity: float) -> None:
    """Raise `ConfigError` for options that have no meaning where N of every M weights stay, all at once."""
    if config.sparsity != sparsity:
        raise ConfigError(
            f"--structure {config.structure} means --sparsity {sparsity:g}, got {config.sparsity:g}",
            f"leave --sparsity out, or give {sparsity:g}",
        )
    given = {
        "--scope": config.scope != "auto",
        "--floor": config.floor != type(config).floor,
        "--stairs": config.stairs not in ("", ONCE),
        "--selections": config.selections > 1,
        "--regrow": config.regrow,
        "--initial-sparsity": config.initial_sparsity,
        "--update-every": config.update_every,
    }
    if names := [name for name, value in given.items() if value]:
        raise ConfigError(
            f"{names[0]} has no effect with --structure {config.structure}, which chooses in every group, and at once",
            "leave it out",
        )


def _check_blocks(config: PruneConfig) -> None:
    """Raise `ConfigError` for blocks of the Fisher information that cut a block of 4 into pieces, or mean nothing here,
    and for matrices that share what stays by single weights."""
    if config.scope == "type":
        raise ConfigError(
            f"--scope type is for single weights, not for --structure {BLOCKS}", "use --scope matrix or global"
        )
    if config.fisher_block == 1:
        return
    if config.criterion != "obert":
        raise ConfigError(
            f"--fisher-block with --structure {BLOCKS} is for obert; {config.method} adds up the scores of a block",
            "leave it out, or use --method obert",
        )
    if config.fisher_block % BLOCK:
        raise ConfigError(
            f"--fisher-block must be a multiple of {BLOCK} with --structure {BLOCKS}, got {config.fisher_block}",
            f"for example --fisher-block {max(1, config.fisher_block // BLOCK) * BLOCK}",
        )
