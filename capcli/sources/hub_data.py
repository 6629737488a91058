"""Data sets of the hub: which configuration, which files are which split, fetched as data and never as code.

What the card says, or else the names of the files, is understood by the rules of the library `datasets`. They are
applied to the names that the hub lists, so that nothing else is asked for and only what is read is fetched.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from capcli.config.names import HUB_PREFIX
from capcli.errors import CapError, DataError, first_line
from capcli.reporting.text import first_few
from capcli.sources.requests import CARD, Repo, fetch

# The readers of `datasets` that need no code, by the ending of the file, compression left out; parquet is read by us.
READERS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".zip": "zip",  # what is in it shows when it is here
}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")  # as in .csv.gz
# What a card may say of how its files are read. All else is left out.
_OPTIONS = {
    "csv": (
        *("sep", "delimiter", "names", "column_names", "header", "quotechar", "quoting", "escapechar", "doublequote"),
        *("skiprows", "skipinitialspace", "encoding", "na_values", "keep_default_na"),
    ),
    "json": ("field", "encoding"),
}


@dataclass(frozen=True, kw_only=True)
class HubData:
    """A configuration of a data set in the cache.

    files: those of each split, in order. reader: of `datasets`, or `zip`. options: for the reader, as the card has
    them. features: of the columns, as the card has them (`datasets.Features`), or None.
    """

    name: str
    files: dict[str, list[Path]]
    reader: str
    options: dict[str, Any]
    features: Any


def named(place: str) -> tuple[str, str, str | None]:
    """Name, configuration and revision of `hub:OWNER/NAME[:CONFIG][@REVISION]`. Raises `DataError`."""
    match = re.fullmatch(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?::([^@:/]+))?(?:@([\w.+/-]+))?", place[len(HUB_PREFIX) :])
    if not match or ".." in place:
        raise DataError(
            f"{place!r} does not name a data set of the hub",
            f"write {HUB_PREFIX}OWNER/NAME, with :CONFIGURATION and @REVISION behind it where they are needed",
        )
    return match[1], match[2] or "", match[3]


def fetched(name: str, config: str, revision: str | None = None) -> HubData:
    """One configuration of a data set, in the cache; without a name the default or the only one.

    Raises `DataError` when it cannot be had, or needs code or a reader that we do not use.
    """
    source = name + (f" ({config})" if config else "") + (f" @{revision}" if revision else "")
    repo = Repo(kind="dataset", name=name, revision=revision, source=source)

    def choose(names: Collection[str], get: Callable[[str], Path]) -> list[str]:
        found = _chosen(repo, names, get(CARD) if CARD in names else None, config)
        files = [file for files in found.files.values() for file in files]
        return [*files, *([CARD] if CARD in names else [])]

    def whole(folder: Path) -> bool:
        try:
            return all(map(_whole_split, _in(folder, repo, config).files.values()))
        except CapError:
            return False

    here = fetch(repo, choose, whole)
    found = _in(here, repo, config)
    return HubData(
        name=source,
        files={split: [here / file for file in files] for split, files in found.files.items()},
        reader=found.reader,
        options=found.options,
        features=found.features,
    )


# Which files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """The names of the files of each split, and how they are read; see `HubData`."""

    files: dict[str, list[str]]
    reader: str
    options: dict[str, Any]
    features: Any


def _in(folder: Path, repo: Repo, config: str) -> _Chosen:
    """The same choice among the files of a folder of the cache. Raises `DataError`."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return _chosen(repo, names, folder / CARD if CARD in names else None, config)


def _chosen(repo: Repo, names: Collection[str], card: Path | None, config: str) -> _Chosen:
    """The files of a configuration among the names of a repository. Raises `DataError`."""
    configs, infos = _about(card)
    config = config or _default(repo, configs)
    if configs and config not in configs:
        raise DataError(
            f"{repo.words} has no such configuration on the hub; it has {first_few(sorted(configs), 12)}",
            f"name one of them, or {repo.instead}",
        )
    params = configs.get(config, {})
    # Of a set without a card, a configuration is a folder.
    folder = str(params.get("data_dir") or "") if configs else "" if config == "default" else config
    readable = [name for name in names if reader_of(name) and ".." not in PurePosixPath(name).parts]
    found = _by_split(repo, readable, folder, params.get("data_files"))
    if not found or not all(found.values()):
        raise _unreadable(repo, names)
    reader = _favourite(map(reader_of, (name for files in found.values() for name in files)))
    files = {split: [name for name in files if reader_of(name) == reader] for split, files in found.items()}
    if not all(files.values()):
        raise DataError(f"the splits of the {repo.words} are files of different formats", repo.instead)
    options = {name: params[name] for name in _OPTIONS.get(reader, ()) if name in params}
    return _Chosen(files=files, reader=reader, options=options, features=getattr(infos.get(config), "features", None))


def _about(card: Path | None) -> tuple[Mapping[str, Mapping[str, Any]], Mapping[str, Any]]:
    """What the card says of the configurations: where their files are, and which columns they have."""
    if card is None:
        return {}, {}
    from datasets import DatasetInfo
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        data = DatasetCard.load(card).data
        infos: Mapping[str, DatasetInfo] = DatasetInfosDict.from_dataset_card_data(data)
        return MetadataConfigs.from_dataset_card_data(data), infos
    except Exception as error:
        raise DataError(f"cannot read {card}: {first_line(error)}") from error


def _default(repo: Repo, configs: Mapping[str, Mapping[str, Any]]) -> str:
    """The configuration that is meant when none is named."""
    marked = [name for name, params in configs.items() if params.get("default")]
    names = marked or (["default"] if "default" in configs else list(configs)) or ["default"]
    if len(names) > 1:
        raise DataError(
            f"{repo.words} has several configurations: {first_few(sorted(names), 12)}",
            f"name one of them: --data {HUB_PREFIX}{repo.name}:{sorted(names)[0]}",
        )
    return names[0]


def _by_split(repo: Repo, names: Sequence[str], folder: str, patterns: Any) -> dict[str, list[str]]:
    """The names of each split, as `datasets` finds them by patterns, or without by its own; in an empty file system."""
    import fsspec  # type: ignore[import-untyped]
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns

    root = f"/capcli-{secrets.token_hex(8)}"
    system = fsspec.filesystem("memory")
    try:
        for name in names:
            system.pipe_file(f"{root}/{name}", b"")
        base = f"memory:/{root}/{folder}".rstrip("/")
        wanted = sanitize_patterns(patterns) if patterns is not None else get_data_patterns(base)
        texts = [str(pattern) for several in wanted.values() for pattern in several]
        if any(":" in text or text.startswith("/") or ".." in text for text in (folder, *texts)):
            raise DataError(f"the card of the {repo.words} names files outside of it", repo.instead)
        found = DataFilesDict.from_patterns(wanted, base_path=base)
        files = {str(split): [str(path).partition(f"{root}/")[2] for path in paths] for split, paths in found.items()}
    except FileNotFoundError:
        return {}
    finally:
        if system.exists(root):
            system.rm(root, recursive=True)
    return files


def reader_of(name: str) -> str:
    """Which reader is for a file by its ending."""
    path = PurePosixPath(name.lower())
    inner = PurePosixPath(path.stem).suffix if path.suffix in PACKED else ""
    return READERS.get(inner) or READERS.get(path.suffix, "")


def _favourite(readers: Iterable[str]) -> str:
    """The most frequent reader; of equally frequent ones the first in `READERS`."""
    count, order = Counter(readers), list(READERS.values())
    return max(count, key=lambda reader: (count[reader], -order.index(reader)))


def _unreadable(repo: Repo, names: Collection[str]) -> DataError:
    """The error for a set without files that are read; such as one that is made by a script."""
    script = f"{repo.name.rpartition('/')[2]}.py"
    if script in names:
        return DataError(
            f"{repo.words} is made by a script of its own, and capcli runs no code of others", repo.instead
        )
    endings = ", ".join(ending[1:] for ending in READERS)
    return DataError(f"{repo.words} has no files on the hub that are read: {endings}", repo.instead)


def _whole_split(files: Sequence[str]) -> bool:
    """Whether all files of a split are there: one, or as many as their names say, as in `train-00000-of-00002`."""
    counts = [int(match[1]) for name in files if (match := re.search(r"-of-(\d+)\.", name))]
    return len(files) >= max(counts, default=1)
