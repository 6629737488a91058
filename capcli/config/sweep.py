"""What `cap prune` is asked for: one run, or one for each method, sparsity and seed; and what they must keep to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capcli.config.measure import Gates
from capcli.config.options import at_least, flag_name, flatten, option, pieces, split_list
from capcli.config.prune import PruneConfig
from capcli.errors import ConfigError

PANEL = "Sweep"
MOST_RUNS = 1000
AXES = ("method", "sparsity", "seed")  # in which the runs of a sweep differ


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The options of `cap prune` that no run of a sweep depends on, and the gates."""

    seeds: str = option(
        "",
        "how many seeds, from --seed on; or the seeds themselves, as 1,2,5; several make a sweep",
        panel=PANEL,
        several="N",
    )
    jobs: int = option(1, "runs of a sweep at the same time; --threads, or all cores, are divided by it", panel=PANEL)
    gates: Gates = field(default_factory=Gates)

    def __post_init__(self) -> None:
        at_least(1, jobs=self.jobs)
        self.seed_list(PruneConfig.seed)

    def seed_list(self, first: int) -> tuple[int, ...]:
        """The seeds: `first` and those after it, or those that are named, each once. Raises `ConfigError`."""
        wrong = ConfigError(f"--seeds needs a number, or several, got {self.seeds!r}", "for example --seeds 3")
        parts = pieces(self.seeds) or ["1"]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise wrong
        numbers = tuple(dict.fromkeys(map(int, parts)))
        if "," in self.seeds:
            return numbers
        if not 1 <= numbers[0] <= MOST_RUNS:
            raise ConfigError(f"--seeds is a number of seeds from 1 to {MOST_RUNS:,}, got {self.seeds}", "")
        return tuple(range(first, first + numbers[0]))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep: its folder inside OUT, its configuration, and `words`, how it would be run by itself."""

    name: str
    run: PruneConfig
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Everything that `cap prune` is asked for: `run` alone, or the `cells` of a sweep, and the gates.

    run: the first run, as if it were the only one. cells: none where it is. at_once: how many of them run at the same
    time. max_time: minutes for all of them together, 0 for no limit.
    """

    run: PruneConfig
    gates: Gates = field(default_factory=Gates)
    cells: tuple[Cell, ...] = ()
    out: str = ""
    at_once: int = 1
    max_time: float = 0.0

    @property
    def out_folder(self) -> Path:
        """The output folder, given or derived."""
        return Path(self.out) if self.cells else self.run.out_folder

    @property
    def configurations(self) -> dict[tuple[str, float], list[Cell]]:
        """The cells that differ in nothing but the seed, by method and sparsity."""
        found: dict[tuple[str, float], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault((cell.run.method, cell.run.sparsity), []).append(cell)
        return found

    def shared(self) -> dict[str, Any]:
        """The options in which all runs agree, by name; not those that make the grid, nor those of the work alone."""
        flat = [flatten(cell.run) for cell in self.cells]
        own = {item.name for item in dataclasses.fields(PruneConfig) if item.metadata.get("resumable")}
        return {
            name: value
            for name, value in flat[0].items()
            if name not in (*AXES, *own) and all(one[name] == value for one in flat)
        }


def listed(value: Any) -> str:
    """Several values as a text with commas; of a list with one, too, as that is no number of values."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) + "," * (len(value) == 1)
    return "" if value is None else str(value)


def numbers(value: Any) -> tuple[float, ...]:
    """The sparsities of a number, a list, or a text with commas, each once. Raises `ConfigError`."""
    wrong = ConfigError(f"--sparsity needs numbers, got {value!r}", "for example --sparsity 0.8,0.9")
    try:
        found = tuple(dict.fromkeys(float(part) for part in split_list(listed(value))))
    except ValueError:
        raise wrong from None
    if not found:
        raise wrong
    return found


def cell_name(method: str, sparsity: float, seed: int) -> str:
    """The folder of a run inside that of its sweep."""
    return f"{method}-{sparsity!r}-seed{seed}"


def words_of(given: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, ...]:
    """The arguments of `cap` for one run of a sweep: the options that were `given`, and its `own` in their place."""
    options = {**{name: value for name, value in given.items() if name != "model"}, **own}
    words = ["prune", str(given.get("model", ""))]
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(flag_name(name) if value else flag_name(f"no-{name}"))
        else:
            words += [f"{flag_name(name)}={value}"] if str(value).startswith("-") else [flag_name(name), str(value)]
    return tuple(words)
