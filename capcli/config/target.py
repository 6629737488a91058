"""What is to stay of a structured run in other terms than its sparsity: multiply-adds, weights, or time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from capcli.config.names import METHODS, STRUCTURES, TARGETS
from capcli.config.options import check_name, meant, share
from capcli.errors import ConfigError

PruneConfig = Any  # the one of `config.prune`, which imports this module

EXAMPLES = "for example --target macs=0.3, --target params=30% or --target latency=2x"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A budget: `kind`, a name of `TARGETS`, and the share of what that counts which may stay, in (0, 1]."""

    kind: str
    keeps: float

    @property
    def removed(self) -> float:
        """The share that is to go; stands in the place of the sparsity."""
        return round(1 - self.keeps, 12)


def parse(text: str) -> Target:
    """`macs=0.3`, `params=30%` or `latency=2x`, twice as fast. Raises `ConfigError` for anything else."""
    name, sign, value = (part.strip() for part in text.partition("="))
    if not (name and sign and value):
        raise ConfigError(f"--target needs NAME=VALUE, got {text!r}", EXAMPLES)
    check_name("target", name, TARGETS)
    keeps = _of_speed(value) if name == "latency" else _of_share(name, value)
    return Target(kind=name, keeps=keeps)


def _of_share(name: str, text: str) -> float:
    try:
        found = share(text)
    except ValueError:
        found = math.nan
    if not 0 < found <= 1:
        raise ConfigError(
            f"--target {name} is the share that stays, above 0 and at most 1, got {text}", meant(found) or EXAMPLES
        )
    return found


def _of_speed(text: str) -> float:
    try:
        times = float(text[:-1]) if text[-1] in "x×" else math.nan
    except ValueError:
        times = math.nan
    if not 1 <= times < math.inf:
        raise ConfigError(f"--target latency is how many times as fast, from 1x on, got {text}", EXAMPLES)
    return 1 / times


def in_place_of_sparsity(layers: dict[str, Any]) -> dict[str, Any]:
    """Options in which a target, if there is one, has set the sparsity. Raises `ConfigError` where both are given."""
    if not layers.get("target"):
        return layers
    if layers.get("sparsity") is not None:
        raise ConfigError("--target takes the place of --sparsity", "leave one of them out")
    return {**layers, "sparsity": parse(str(layers["target"])).removed}


def check(config: PruneConfig) -> None:
    """Raise `ConfigError` for a target that this method or structure cannot aim at."""
    if not config.target:
        return
    found, method, whole = parse(config.target), METHODS[config.method], config.structure == STRUCTURES[0]
    if not method.structured:
        raise ConfigError(
            f"--target is for methods that remove heads, neurons or dimensions, {config.method} removes single weights",
            "use --method structured, or --sparsity",
        )
    if whole and config.criterion != "kwon":
        raise ConfigError(
            f"--target needs a budget to be split between heads and neurons, and {config.method} removes both alike",
            "use --method structured, or --structure dimensions",
        )
    if found.kind == "latency" and not whole:
        raise ConfigError(
            "--target latency is measured with fewer heads and neurons, not with smaller heads",
            "use --structure heads with --method structured, or --target macs",
        )
    if config.sparsity != found.removed:
        raise ConfigError("--target takes the place of --sparsity", "leave one of them out")
