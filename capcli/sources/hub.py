"""Models by name: where they are, which of their files are needed, how near names are found."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection
from pathlib import Path

from capcli.config.layers import check_no_token
from capcli.config.names import ALIASES, BUILTIN_MODEL, nearest
from capcli.errors import ModelError
from capcli.sources import checkpoint
from capcli.sources.checkpoint import (
    ARTEFACT,
    CONFIG,
    GRAPH,
    INDEX,
    MODULES,
    RECORD,
    REPORT,
    SAVE_AGAIN,
    SETTINGS,
    SPARSE,
    TOKENIZER_FILES,
    TRANSFORMER,
    WEIGHTS,
    WORDS,
)
from capcli.sources.requests import Choice, Repo, fetch, near_folders

BUILTIN_FOLDER = Path(__file__).parents[1] / "builtin" / "mini"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
SMALL_FILES = (RECORD, *TOKENIZER_FILES, CONFIG, MODULES, TRANSFORMER, SETTINGS)


# Names ---------------------------------------------------------------------------------------------------------------


def is_local(source: str) -> bool:
    """Whether a MODEL argument is a folder of this machine; a folder goes before a name of the hub."""
    return source == BUILTIN_MODEL or Path(source).is_dir()


def resolve(source: str) -> tuple[str, str | None]:
    """The local folder or hub id behind a MODEL argument, and the revision after `@`, if any."""
    if source == BUILTIN_MODEL:
        return str(BUILTIN_FOLDER), None
    if is_local(source):
        return source, None
    check_no_token("model", source)
    name, at, revision = source.partition("@")
    name = ALIASES.get(name, name)
    if _is_there(source):
        raise ModelError(f"{source} is not a folder", f"MODEL is the folder: {Path(source).parent}")
    if not _is_hub_name(name):
        hint = near_folders(source) or _model_hint(source)
        raise ModelError(f"no model folder at {source!r}, and it is not a hub name either", hint)
    if name == BUILTIN_MODEL:
        raise ModelError(f"the built-in model {BUILTIN_MODEL!r} has no revisions")
    if at and (not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", revision, re.ASCII) or ".." in revision):
        raise ModelError(
            f"{revision!r} is not a revision", "give a branch, tag or commit after @, as in bert-base@main"
        )
    return name, revision or None


def _is_there(source: str) -> bool:
    try:
        return Path(source).exists()
    except (OSError, ValueError):  # too long, or no path at all
        return False


def _is_hub_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return re.fullmatch(r"[\w./-]+", name, re.ASCII) is not None


def _model_hint(source: str) -> str:
    return "a folder, a hub id, or a short name; " + nearest(source, (BUILTIN_MODEL, *ALIASES))


# Models --------------------------------------------------------------------------------------------------------------


def place(source: str, *, graph: bool = False) -> Path:
    """The folder of this machine behind a MODEL argument: the one that it names, or that of the cache.

    Of a hub id it has the small files; of a pruned model its weights too, and with `graph` those of an ONNX model. The
    hub is asked once for each command, so that all of it sees the same commit; see `ask_again`.

    Raises `ModelError` for what is not there, cannot be had, or is refused, with the reason and the way out.
    """
    name, revision = resolve(source)
    if is_local(source):
        return Path(name)
    repo = Repo(kind="model", name=name, revision=revision, source=source)
    found = _fetched(repo, graph=False)
    return _fetched(dataclasses.replace(repo, revision=found.name), graph=True) if graph else found  # of its commit


@functools.lru_cache(maxsize=64)
def _fetched(repo: Repo, graph: bool) -> Path:
    """The folder of the cache with the files of a model that are needed whatever is done with it."""

    def choose(names: Collection[str], get: Callable[[str], Path]) -> list[str]:
        if ARTEFACT not in names:
            checkpoint.check_names(names, repo.source, local=False)
            checkpoint.check_words(names, repo.source)  # masks have the tokenizer of their base
        if ARTEFACT in names:
            return [name for name in (ARTEFACT, SPARSE, REPORT, RECORD, *TOKENIZER_FILES) if name in names]
        graphs = sorted(name for name in names if name.startswith(GRAPH)) if graph and not _dense(names) else []
        pooling = [name for name in names if re.fullmatch(r"[\w.-]*Pooling/config\.json", name)]
        return [*graphs, *(name for name in SMALL_FILES if name in names), *pooling]

    return fetch(repo, choose, lambda path: _usable({one.name for one in path.iterdir()}))


def _dense(names: Collection[str]) -> bool:
    return WEIGHTS in names or INDEX in names


def _usable(names: Collection[str]) -> bool:
    """Whether a folder of the cache has what `place` promises: of a dense model its weights may be missing still."""
    return SPARSE in names if ARTEFACT in names else CONFIG in names and any(name in names for name in WORDS)


def ask_again() -> None:
    """Forget what the hub said: the next command sees what is there now."""
    _fetched.cache_clear()


def folder(source: str, *, legacy: bool = False) -> str:
    """The folder with configuration and tokenizer of a MODEL argument; for the weights see `weights`.

    legacy: sparse checkpoints of other tools are welcome, see `checkpoint.check_config`.
    Raises `ModelError` for what is not there, cannot be had, or is refused, with the reason and the way out.
    """
    found = place(source)
    checkpoint.check_files(found, source)
    below = {f"{path.parent.name}/{CONFIG}" for path in found.glob(f"*/{CONFIG}")}
    checkpoint.check_names({path.name for path in found.iterdir()} | below, source, local=is_local(source))
    checkpoint.check_config(found, source, legacy=legacy)
    return str(found)


def weights(found: str, source: str) -> None:
    """See to it that the weights are in the folder that `folder` gave, as whole safetensors. Raises `ModelError`."""
    here = Path(found)
    if not is_local(source) and _lost_weights(here):
        repo = Repo(kind="model", name=resolve(source)[0], revision=here.name, source=source)
        fetch(repo, _weight_files(source), lambda path: not _lost_weights(path))
    checkpoint.check_words({path.name for path in here.iterdir()}, source)
    lost = _lost_weights(here)
    if lost == [WEIGHTS] and (here / GRAPH).is_file():
        raise checkpoint.other_format(GRAPH, source)
    if lost == [WEIGHTS]:
        raise ModelError(f"{source} has no {WEIGHTS}", f"pickled weights are never read; {SAVE_AGAIN}")
    if lost:
        raise ModelError(
            f"the weights of {source} are incomplete: {len(lost)} of the files that {INDEX} names are missing, "
            f"first {lost[0]}",
            "copy or download the whole folder",
        )
    checkpoint.check_no_pointer(here / WEIGHTS, source)


def _weight_files(source: str) -> Choice:
    def choose(names: Collection[str], get: Callable[[str], Path]) -> list[str]:
        if WEIGHTS in names:
            return [WEIGHTS, CONFIG]
        if GRAPH in names and INDEX not in names:
            raise checkpoint.other_format(GRAPH, source)
        return [*sorted(filter(SHARD.fullmatch, names)), *(name for name in (INDEX, CONFIG) if name in names)]

    return choose


def _lost_weights(here: Path) -> list[str]:
    """Names of the weight files that are not in the folder. Raises `ModelError` for an index that names others."""
    return [name for name in weight_files(here) if not (here / name).is_file()]


def weight_files(here: Path) -> list[str]:
    """Names of the weight files that belong to the folder. Raises `ModelError` for an index that names others."""
    if (here / WEIGHTS).is_file() or not (here / INDEX).is_file():
        return [WEIGHTS]
    table = checkpoint.model_json(here / INDEX).get("weight_map")
    shards = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    wrong = [name for name in shards if Path(name).name != name or not name.endswith(".safetensors")]
    if wrong or not shards:
        raise ModelError(
            f"{here / INDEX} names no safetensors files of its folder: {wrong[0] if wrong else 'none'}",
            "copy or download the model again",
        )
    return shards
