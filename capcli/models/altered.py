"""What was done to the layers of a network that its configuration does not say: smaller layers, factors.

`cap_config.json` says it under `sliced` and `lowrank`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capcli.errors import FileError
from capcli.models import families, lowrank, slicing
from capcli.models.model import LowRank, Model, Slices, count_parameters


@dataclass(frozen=True, kw_only=True)
class Altered:
    """How the layers of a network are sliced and factorised, None where they are not."""

    slices: Slices | None = None
    lowrank: LowRank | None = None


def named(settings: Mapping[str, Any]) -> bool:
    """Whether settings say that layers are sliced or factorised."""
    return not settings.keys().isdisjoint(("sliced", "lowrank"))


def read(net: Any, settings: Mapping[str, Any], path: Path) -> Altered:
    """What the settings in the file `path` say, for a network on `meta`, whose layers are altered. Raises `FileError`
    for what cannot be."""
    slices = _read_slices(net, settings["sliced"], path) if "sliced" in settings else None
    before = slices.before if slices else None
    if "lowrank" not in settings:
        return Altered(slices=slices)
    family = _family(net, "factors", path)
    before = before or count_parameters(net, family)
    try:
        ranks = lowrank.read(settings["lowrank"], net, family)
    except ValueError as error:
        raise FileError(f"{path}: {error}", "export again, or copy the whole folder") from error
    lowrank.shape(net, family, ranks)
    return Altered(slices=slices, lowrank=LowRank(ranks=ranks, before=before))


def _read_slices(net: Any, table: object, path: Path) -> Slices:
    family = _family(net, "sliced layers", path)
    try:
        slices = Slices(sizes=slicing.read(table, net, family), before=count_parameters(net, family))
    except ValueError as error:
        raise FileError(f"{path}: {error}", "slice again, or copy the whole folder") from error
    slicing.shape(net, family, slices.sizes)
    return slices


def _family(net: Any, what: str, path: Path) -> families.Family:
    family = families.FAMILIES.get(net.config.model_type)
    if family is None:
        raise FileError(f"{path}: {what} of a {net.config.model_type} model, whose layers capcli does not know")
    return family


def shape(net: Any, altered: Altered) -> None:
    """Alter the layers of a network that is as its configuration says, in place, all zero."""
    if altered.slices:
        slicing.shape(net, families.FAMILIES[net.config.model_type], altered.slices.sizes)
    if altered.lowrank:
        lowrank.shape(net, families.FAMILIES[net.config.model_type], altered.lowrank.ranks)


def record(model: Model) -> dict[str, Any]:
    """What `cap_config.json` says of it."""
    slices, factors = model.slices, model.lowrank
    sizes = {name: dataclasses.asdict(size) for name, size in slices.sizes.items()} if slices else {}
    return {**({"sliced": sizes} if slices else {}), **({"lowrank": dict(factors.ranks)} if factors else {})}
