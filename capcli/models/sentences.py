"""How an encoder makes one vector of a text: its pooling, and the folders of sentence-transformers that say so.

Such a folder has in `modules.json` what computes one after the other: a network of transformers, its pooling in a
folder of its own, and perhaps the normalisation of what comes out. Letters: B batch, S tokens, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from capcli import files
from capcli.errors import ModelError
from capcli.models import families
from capcli.reporting.text import first_few, named
from capcli.sources.checkpoint import MODULES, SETTINGS, TRANSFORMER
from capcli.stored import mapping, read_json, sequence

MAX_BYTES = 1_000_000  # of one of its files
POOLING, NORMALIZE = "1_Pooling", "2_Normalize"
STOCK = "sentence_transformers.models."
"""Where its modules were in all versions, which later ones still read."""
# The poolings in the words of later versions, and what earlier ones call each of them.
FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": families.mean,
    "cls": lambda states, mask: families.represented(states, mask, causal=False),
    "max": lambda states, mask: states.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(dim=1),
    "lasttoken": lambda states, mask: families.represented(states, mask, causal=True),
}


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """How the states of the last layer become a vector.

    pooling: a name of `POOLINGS`. normalize: whether vectors have length 1. include_prompt: as the folder has it.
    transformer, settings: what the folder says in `sentence_bert_config.json` and `config_sentence_transformers.json`,
    which is kept for those who read the folder.
    """

    pooling: str = "mean"
    normalize: bool = False
    include_prompt: bool = True
    transformer: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """Vectors [B, H] of the last states [B, S, H]; mask [B, S] is 0 for padding."""
        vectors = POOLINGS[self.pooling](states, mask)
        return functional.normalize(vectors, dim=-1) if self.normalize else vectors

    @property
    def longest(self) -> int | None:
        """Tokens of the longest input that sentence-transformers reads; None where it does not say."""
        most = self.transformer.get("max_seq_length")
        return most if type(most) is int and most > 0 else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What sentence-transformers does to texts before they are read, and capcli leaves to the caller."""
        prompt = self.settings.get("default_prompt_name")
        said = [f"sentence-transformers puts the prompt {str(prompt)[:40]!r} before each text; it is not added here"]
        lower = ["sentence-transformers puts texts into lower case before they are read; it is not done here"]
        return (*said * bool(prompt), *lower * bool(self.transformer.get("do_lower_case")))


# Reading -------------------------------------------------------------------------------------------------------------


def read(folder: Path, source: str) -> Embedding:
    """How the folder says that vectors are made; of a plain encoder by the mean, as sentence-transformers does it.

    Of an encoder in a folder below, as older versions wrote it, the folder above tells. Raises `ModelError`.
    """
    for root in (folder, folder.resolve().parent):
        if (root / MODULES).is_file():
            places = _places(root, source)
            if (root / places["Transformer"]).resolve() == folder.resolve():
                return _described(root, folder, places, source)
    return Embedding()


def paths(folder: Path) -> list[Path]:
    """The files in the folder of an encoder that say how its vectors are made, and are there."""
    if not (folder / MODULES).is_file():
        return []
    pooling = _places(folder, str(folder)).get("Pooling", POOLING)
    found = (MODULES, f"{pooling}/config.json", TRANSFORMER, SETTINGS)
    return [folder / name for name in found if (folder / name).is_file()]


def _places(root: Path, source: str) -> dict[str, str]:
    """The folders of the modules below the root, by what they are. Raises `ModelError` for others than are read."""
    table, found = sequence(read_json(root / MODULES, MAX_BYTES)), {}
    for one in table:
        name, place = str(mapping(one).get("type")).rpartition(".")[2], mapping(one).get("path")
        if not isinstance(place, str) or Path(place).name != place or place in (".", ".."):
            raise ModelError(f"{root / MODULES}: expected the name of a folder in path, got {str(place)[:40]!r}")
        found[name] = place
    expected = [["Transformer"], ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]]
    if list(found) not in expected or len(found) != len(table):
        got = first_few([named(str(mapping(one).get("type")).rpartition(".")[2]) for one in table] or ["none"])
        raise ModelError(
            f"the modules of {source} are {got}; capcli reads Transformer, Pooling and Normalize, in this order",
            f"without {MODULES} its encoder is read alone, with the mean over tokens",
        )
    return found


def _described(root: Path, folder: Path, places: Mapping[str, str], source: str) -> Embedding:
    path = root / places.get("Pooling", POOLING) / "config.json"
    table = mapping(read_json(path, MAX_BYTES)) if "Pooling" in places else {}
    found = Embedding(
        pooling=_pooling(table, source),
        normalize="Normalize" in places,
        include_prompt=table.get("include_prompt") is not False,
        transformer=_table(folder / TRANSFORMER),
        settings=_table(root / SETTINGS),
    )
    return found


def _pooling(table: Mapping[str, Any], source: str) -> str:
    """The pooling of a `config.json` of earlier or later versions. Raises `ModelError` for one that is not read."""
    stated = table.get("pooling_mode")
    several = stated if isinstance(stated, list) else [stated] if stated else []
    several = several or [name for name, flag in FLAGS.items() if table.get(flag)] or ["mean"]
    if len(several) > 1 or several[0] not in POOLINGS:
        raise ModelError(
            f"{source} pools by {first_few([named(name) for name in several])}; capcli reads {', '.join(POOLINGS)}",
            "use a model with one of these poolings",
        )
    return str(several[0])


def _table(path: Path) -> Mapping[str, Any]:
    return mapping(read_json(path, MAX_BYTES)) if path.is_file() else {}


# In our own files ----------------------------------------------------------------------------------------------------


def record(found: Embedding) -> dict[str, Any]:
    """As `cap_config.json` has it."""
    return dataclasses.asdict(found)


def recorded(table: Any, source: str) -> Embedding:
    """The same from there. Raises `ModelError` for a pooling that is not known."""
    stored = mapping(table)
    return Embedding(
        pooling=_pooling({"pooling_mode": stored.get("pooling")}, source),
        normalize=stored.get("normalize") is True,
        include_prompt=stored.get("include_prompt") is not False,
        transformer=mapping(stored.get("transformer")),
        settings=mapping(stored.get("settings")),
    )


# Writing -------------------------------------------------------------------------------------------------------------


def write(found: Embedding, folder: Path, width: int, longest: int) -> None:
    """What makes a stock folder one of sentence-transformers, of every version; each file through `files`.

    width: H. longest: tokens of the longest input, where the folder that it is from did not say.
    """
    modules = [("Transformer", ""), ("Pooling", POOLING), *[("Normalize", NORMALIZE)] * found.normalize]
    table = [{"idx": i, "name": str(i), "path": path, "type": STOCK + name} for i, (name, path) in enumerate(modules)]
    for _, path in modules:
        (folder / path).mkdir(exist_ok=True)
    flags = {flag: name == found.pooling for name, flag in FLAGS.items()}
    pooling = {"word_embedding_dimension": width, **flags, "include_prompt": found.include_prompt}
    files.write_json(folder / POOLING / "config.json", pooling)
    files.write_json(folder / TRANSFORMER, found.transformer or {"max_seq_length": longest, "do_lower_case": False})
    files.write_json(folder / SETTINGS, found.settings or {"prompts": {}, "similarity_fn_name": "cosine"})
    files.write_json(folder / MODULES, table)
