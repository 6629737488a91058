"""The files of a data set: which of them are which split, and which are none.

A split is a file (`train.csv`), parts (`train-00000-of-00002.parquet`, `train_1.csv`) or a folder (`train/`). Splits
lie in the folder itself or in one folder below it, as `data/` of a hub set.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from capcli.config.names import HUB_PREFIX
from capcli.config.paths import ELSEWHERE
from capcli.data import tables
from capcli.errors import CapError, DataError
from capcli.reporting.text import first_few
from capcli.stored import read_json

EVALS = ("validation", "validation_matched", "validation_mismatched", "dev", "dev_matched", "dev_mismatched")
NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "evaluation", "eval"), "validation"),
    **dict.fromkeys(("dev", "development"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}
DEPTH = 3  # folders below the one that is given
MOST_FILES = 100_000
TOGETHER = "files that belong together are read from a folder named {}"
_NAME = re.compile(
    rf"(?P<split>{'|'.join(NAMES)})(?P<half>[-_](?:mis)?matched)?"
    r"(?P<version>[-_]v\d[\d.]*)?"  # train-v1.1, as SQuAD names them
    # train-00000-of-00002-1a2b3c4d5e6f7a8b and train-00000-of-00002, as the hub does; train_1, train2, train-part1
    r"(?:[-_. ]*(?:part|shard|chunk)?[-_. ]*(?P<index>\d+)(?:[-_. ]*of[-_. ]*(?P<total>\d+))?(?:[-_.][0-9a-f]{8,})?)?"
    r"(?:\.(?:snappy|gz|zstd|lz4|brotli))?"  # as Spark names the compression inside a parquet file
)
_TOTAL = re.compile(r"(?P<set>.*?)(?P<index>\d+)[-_. ]*of[-_. ]*(?P<total>\d+)")
_HIDDEN = re.compile(r"[._~#].*|.*[~#]|Thumbs\.db|desktop\.ini", re.IGNORECASE)  # also locks of editors, _SUCCESS
_ABOUT = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_MODEL = ("config.json", "cap_config.json", "report.json", "export.json")  # in the folder of a model or a run
_NO_DATA = (
    *(".md", ".rst", ".html", ".pdf", ".tex", ".bib", ".log", ".lock", ".toml", ".yaml", ".yml", ".cfg", ".ini"),
    *(
        ".py",
        ".ipynb",
        ".sh",
        ".r",
        ".safetensors",
        ".onnx",
        ".png",
        ".jpg",
        ".jpeg",
        ".svg",
        ".gif",
        ".crc",
        ".md5",
        ".sha256",
        ".license",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """files: those of each split, in order. unread: a file of each split that has only such as cannot be read.

    notes: where the splits are, when that is not plain, and which other files of data there are.
    """

    files: dict[str, list[Path]]
    unread: dict[str, Path]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _File:
    """home: the folder whose splits it belongs to. split: its name, or nothing. folder: whether a folder named it."""

    path: Path
    home: Path
    split: str
    folder: bool

    @property
    def readable(self) -> bool:
        return bool(tables.ending(self.path))


def find(path: Path) -> Found:
    """The files of each split of a folder; one file is the training split. Raises `DataError` for what is unclear."""
    with tables.reading(str(path)):
        if path.is_file():
            return Found(files={"train": [path]}, unread={}, notes=())
        if not path.exists() and str(path).startswith(ELSEWHERE):
            raise DataError(f"the data of this model's run, {path}, did not come with it", "give them with --data")
        if not path.exists():
            endings = ", ".join(suffix[1:] for suffix in tables.SUFFIXES)
            raise DataError(
                f"no data at {path}", f"--data takes a folder of splits, one {endings} file, or {HUB_PREFIX}OWNER/NAME"
            )
        if not path.is_dir():
            raise tables.refusal(path)
        if saved := _saved(path):
            return Found(files={"train": saved}, unread={}, notes=())
        return _in_folder(path)


def _in_folder(root: Path) -> Found:
    seen = [_placed(file, root) for file in islice(_walk(root, DEPTH), MOST_FILES)]
    if len(seen) == MOST_FILES:
        raise DataError(f"{root} holds {MOST_FILES:,} files or more", "give the folder with the splits as --data")
    home = _home(root, seen)
    splits: dict[str, list[_File]] = {}
    for one in seen:
        if one.split and one.home == home:
            splits.setdefault(one.split, []).append(one)
    found = {name: kept for name, members in splits.items() if (kept := [one for one in members if one.readable])}
    spare = {name for name in found if name.startswith("test")} if set(EVALS) & set(found) else set()
    read = {name: _ordered(name, members, strict=name not in spare) for name, members in found.items()}
    used = {file for members in read.values() for file in members}
    return Found(
        files=read,
        unread={name: members[0].path for name, members in splits.items() if name not in read},
        notes=(
            *([f"the splits are read from the folder {home.relative_to(root)}"] if home != root else ()),
            *(
                f"{name} is read from {first_few([path.name for path in members], 6)}"
                for name, members in read.items()
                if name not in spare and _is_numbered(members)
            ),
            *_left_out(root, home, [one for one in seen if one.path not in used]),
        ),
    )


def _left_out(root: Path, home: Path, rest: Sequence[_File]) -> Iterator[str]:
    """The note that names what is not read; of folders that are no split, the folder."""
    names = set()
    for one in rest:
        parts = one.path.relative_to(root).parts
        names.add(f"{parts[0]}/" if len(parts) > 1 and one.home != home else "/".join(parts))
    if names:
        yield f"in the data folder, but not read: {first_few(sorted(names), 6)}"


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """The files of a folder that may be data, and of the folders below it; a folder that cannot be read is one too."""
    if saved := _saved(folder):
        yield from saved
        return
    for path in sorted(folder.iterdir(), key=_natural):
        if _HIDDEN.fullmatch(path.name) or path.name in _ABOUT or path.suffix.lower() in _NO_DATA:
            continue
        if depth and path.is_dir():
            try:
                if not any((path / name).is_file() for name in _MODEL):
                    yield from _walk(path, depth - 1)
            except PermissionError:
                yield path
        elif path.suffix or path.is_dir() or _split_of(path):
            yield path


def _natural(path: Path) -> list[tuple[int, str]]:
    """Orders names by the numbers in them: part 2 before part 10."""
    pieces = re.split(r"([0-9]+)", path.name)
    return [(int(piece), "") if place % 2 else (-1, piece) for place, piece in enumerate(pieces)]


def _saved(folder: Path) -> list[Path]:
    """The files of a folder that `save_to_disk` of `datasets` made, by its own list; of other folders none."""
    if not ((folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()):
        return []
    try:
        state = read_json(folder / "state.json")
        names = [str(part["filename"]) for part in state["_data_files"]]
    except (CapError, KeyError, TypeError):
        return []
    if state.get("_indices_data_files") or state.get("_indices_files") or (folder / "indices.arrow").exists():
        raise DataError(f"{folder} was saved by an old version of datasets, with indices", "load and save it again")
    if not names or any(Path(name).name != name for name in names):
        raise DataError(f"{folder / 'state.json'} names no files of its folder", "save the data set again")
    return [folder / name for name in names]


# Which split a file is of ---------------------------------------------------------------------------------------------


def _match(path: Path) -> re.Match[str] | None:
    """What the name of a file says of a split, its endings left out."""
    stem = path.name.lower()
    if not tables.ending(path):
        stem = stem.removesuffix(path.suffix.lower())
    return _NAME.fullmatch(stem.removesuffix(tables.ending(Path(stem)) or tables.ending(path)))


def _split_of(path: Path) -> str:
    """The split that a file or folder is named for; of other names nothing."""
    match = _match(path)
    name = NAMES[match["split"]] + (match["half"] or "").replace("-", "_") if match else ""
    return name if name in ("train", "test", "test_matched", "test_mismatched", *EVALS) else ""


def _placed(path: Path, root: Path) -> _File:
    parts = path.relative_to(root).parts
    for depth, name in enumerate(parts[:-1]):
        match = _match(Path(name))
        if match and match["index"] is None and (split := _split_of(Path(name))):
            if tables.ending(path) and _split_of(path) not in ("", split):
                raise DataError(f"{path} has the name of another split than its folder", "rename one of the two")
            return _File(path=path, home=root.joinpath(*parts[:depth]), split=split, folder=True)
    return _File(path=path, home=path.parent, split=_split_of(path), folder=False)


def _home(root: Path, seen: Sequence[_File]) -> Path:
    """The folder whose splits are read. Raises `DataError` when there is none, or more than one below `root`."""
    homes = {one.home: None for one in seen if one.split and one.readable}
    if root in homes:
        return root
    if len(homes) == 1:
        return next(iter(homes))
    if homes:
        names = [home.relative_to(root).as_posix() for home in homes]
        raise DataError(
            f"{root} contains several sets of splits: {first_few(names, 6)}", f"give one of them: {root / names[0]}"
        )
    raise _nothing(root, seen)


def _nothing(root: Path, seen: Sequence[_File]) -> DataError:
    """The error for a folder without any split that can be read."""
    for one in seen:
        if one.split:
            return tables.refusal(one.path)
    names = first_few([one.path.relative_to(root).as_posix() for one in seen], 6)
    if readable := [one.path for one in seen if one.readable]:
        alone = f"; a single file can be given directly: {readable[0]}" if len(readable) == 1 else ""
        return DataError(f"no split in {root}: found {names}", f"name the files train, validation and test{alone}")
    ways = (tables.way_out(one.path) for one in seen)
    hint = next(
        filter(None, ways), f"expected files such as train.parquet; known endings: {', '.join(tables.SUFFIXES)}"
    )
    return DataError(f"no data files in {root}" + (f": found {names}" if seen else ""), hint)


# Which files are one split -------------------------------------------------------------------------------------------


def _ordered(split: str, members: Sequence[_File], *, strict: bool) -> list[Path]:
    """The files of one split in their order. If `strict`, raises `DataError` unless they are plainly one."""
    paths = [one.path for one in members]
    if not strict:
        return paths
    if len({one.folder for one in members}) > 1 or len(set(map(tables.ending, paths))) > 1:
        raise _several(split, paths)
    if not members[0].folder:
        return _parts(split, paths)
    sets: dict[tuple[Path, str, int], list[int]] = {}
    for path in paths:
        if match := _TOTAL.match(path.name):
            sets.setdefault((path.parent, match["set"], int(match["total"])), []).append(int(match["index"]))
    for (folder, _, total), numbers in sets.items():
        _check_all(split, folder, numbers, total)
    return paths


def _parts(split: str, paths: Sequence[Path]) -> list[Path]:
    """Files that are parts by their numbers; one without a number may be the first."""
    matches = {path: match for path in paths if (match := _match(path))}
    numbers = {path: int(match["index"]) for path, match in matches.items() if match["index"] is not None}
    plain = [path for path in paths if path not in numbers]
    alike = len({(match["version"], match["total"]) for match in matches.values()}) == 1
    total = matches[paths[0]]["total"]
    if not alike or len(plain) > bool(not total) or len(set(numbers.values())) < len(numbers):
        raise _several(split, paths)
    if numbers:
        _check_all(split, paths[0].parent, list(numbers.values()), int(total) if total else None, begun=bool(plain))
    return [*plain, *sorted(numbers, key=numbers.__getitem__)]


def _check_all(split: str, folder: Path, numbers: Collection[int], total: int | None, *, begun: bool = False) -> None:
    """Raise `DataError` unless all parts are there, by their `total` or up to the last.

    They are numbered from 0 or 1; after a first one without a number (`begun`) from 1 or 2.
    """
    low, high = min(numbers), max(numbers)
    begin = low if low in ((1, 2) if begun else (0, 1)) and total in (None, high - low + 1) else int(begun)
    missing = next(number for number in count(begin) if number not in numbers)
    if total is not None and missing < begin + total:
        raise DataError(f"{folder} has {len(numbers)} of {total} parts of {split}; part {missing} is missing")
    if total is None and missing <= high:
        raise DataError(
            f"{folder} has parts of {split} with numbers up to {high}; part {missing} is missing",
            f"name a file {split} if it is the whole split; {TOGETHER.format(split)}",
        )


def _is_numbered(paths: Sequence[Path]) -> bool:
    """Whether several files were taken for one split by numbers that do not say how many there are."""
    return len(paths) > 1 and any(match and match["index"] and not match["total"] for match in map(_match, paths))


def _several(split: str, paths: Sequence[Path]) -> DataError:
    names = [path.name if _split_of(path) == split else f"{path.parent.name}/{path.name}" for path in paths]
    return DataError(
        f"several files for the {split} split: {first_few(names, 6)}", f"keep one of them; {TOGETHER.format(split)}"
    )
