"""The Hugging Face hub: names and revisions, what is fetched into the cache, what is refused, what its errors mean.

A model or data set of the hub becomes a folder of the cache and is then read like any other folder. Only files that are
data are fetched, never pickles or code. What the hub does not serve now is taken from the cache, if it is there.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import errno
import fnmatch
import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from capcli import refusals
from capcli.config import ALIASES, BUILTIN_MODEL, BUILTIN_TASKS, check_no_token, nearest
from capcli.errors import CapError, DataError, ModelError, RunFailed
from capcli.refusals import CONFIG, INDEX, SAVE_AGAIN, TOKENIZER_FILES, WEIGHTS, WORDS

BUILTIN_FOLDER = Path(__file__).parent / "data" / "mini"
CARD = "README.md"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
SMALL_FILES = (*TOKENIZER_FILES, CONFIG)
WAITS_SECONDS = (0.5, 2.0)  # before asking again a hub that answers 5xx
MAX_REQUESTS = 20  # for one file
MARKS = ("cap_config.json", CONFIG, "work")  # what is in the folder of a model or of a run
Choice = Callable[[Collection[str]], list[str]]


@dataclass(frozen=True, kw_only=True)
class Repo:
    """A repository of the hub. kind: `model` or `dataset`. source: what the user calls it."""

    kind: str
    name: str
    revision: str | None
    source: str

    def refused(self, message: str, hint: str) -> CapError:
        """The error for this kind of repository; of a model that is rather a folder that is not there, says so."""
        if self.kind == "model" and (near := _near_folders(self.source)) is not None:
            message, hint = f"there is no folder {self.source}; {message}", near or hint
        return (ModelError if self.kind == "model" else DataError)(message, hint)

    @property
    def words(self) -> str:
        """How messages call it."""
        return f"{'model' if self.kind == 'model' else 'data set'} {self.source!r}"

    @property
    def instead(self) -> str:
        """What works without the hub."""
        if self.kind == "model":
            return f"give a local folder, or try the built-in model {BUILTIN_MODEL!r}"
        return f"give local files with --data, or try a built-in task: {', '.join(BUILTIN_TASKS)}"

    @property
    def perhaps(self) -> str:
        """The short name that the user may have meant."""
        name = self.source.partition("@")[0]
        if self.kind != "model" or name in ALIASES or name in ALIASES.values():
            return ""
        meant, found, _ = nearest(self.source, (BUILTIN_MODEL, *ALIASES)).partition("? ")
        return f"; {meant}?" if found else ""


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
        hint = _near_folders(source) or _model_hint(source)
        raise ModelError(f"no model folder at {source!r}, and it is not a hub name either", hint)
    if name == BUILTIN_MODEL:
        raise ModelError(f"the built-in model {BUILTIN_MODEL!r} has no revisions")
    if at and (not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", revision, re.ASCII) or ".." in revision):
        raise ModelError(f"{revision!r} is no revision", "after @ stands a branch, tag or commit: bert-base@main")
    return name, revision or None


def _is_there(source: str) -> bool:
    try:
        return Path(source).exists()
    except (OSError, ValueError):  # too long, or no path at all
        return False


def _near_folders(source: str) -> str | None:
    """A hint with the folder of a model that may be meant; None when the name does not look like that of a folder.

    It does where the folder that would hold it is there, or one of nearly this name is.
    """
    path = Path(source)
    try:
        names = [one.name for one in path.parent.iterdir() if any((one / mark).exists() for mark in MARKS)]
    except (OSError, ValueError):
        return None
    if close := difflib.get_close_matches(path.name, names, n=1):
        return f"did you mean {path.parent / close[0]}?"
    if path.parent == Path():
        return None
    return f"in {path.parent} there are {', '.join(sorted(names)[:8])}" if names else ""


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


def folder(source: str, *, legacy: bool = False) -> str:
    """The folder with configuration and tokenizer of a MODEL argument; for the weights see `weights`.

    legacy: sparse checkpoints of other tools are welcome, see `refusals.check_config`.
    Raises `ModelError` for what is not there, cannot be had, or is refused, with the reason and the way out.
    """
    name, revision = resolve(source)
    if is_local(source):
        found = Path(name)
        refusals.check_files(found, source)
        below = {f"{path.parent.name}/{CONFIG}" for path in found.glob(f"*/{CONFIG}")}
        refusals.check_names({path.name for path in found.iterdir()} | below, source, local=True)
    else:
        repo = Repo(kind="model", name=name, revision=revision, source=source)
        found = _fetch(repo, _small_files(source), lambda path: any((path / name).is_file() for name in WORDS))
        refusals.check_files(found, source)
    refusals.check_config(found, source, legacy=legacy)
    return str(found)


def weights(found: str, source: str) -> None:
    """See to it that the weights are in the folder that `folder` gave, as whole safetensors. Raises `ModelError`."""
    here = Path(found)
    if not is_local(source) and _lost_weights(here):
        repo = Repo(kind="model", name=resolve(source)[0], revision=here.name, source=source)
        _fetch(repo, _weight_files, lambda path: not _lost_weights(path))
    refusals.check_words({path.name for path in here.iterdir()}, source)
    lost = _lost_weights(here)
    if lost == [WEIGHTS]:
        raise ModelError(f"{source} has no {WEIGHTS}", f"pickled weights are never read; {SAVE_AGAIN}")
    if lost:
        raise ModelError(
            f"the weights of {source} are incomplete: {len(lost)} of the files that {INDEX} names are missing, "
            f"first {lost[0]}",
            "copy or download the whole folder",
        )
    refusals.check_no_pointer(here / WEIGHTS, source)


def _small_files(source: str) -> Choice:
    def choose(names: Collection[str]) -> list[str]:
        refusals.check_names(names, source, local=False)
        refusals.check_words(names, source)
        return [name for name in SMALL_FILES if name in names]

    return choose


def _weight_files(names: Collection[str]) -> list[str]:
    if WEIGHTS in names:
        return [WEIGHTS, CONFIG]
    return [*sorted(filter(SHARD.fullmatch, names)), *(name for name in (INDEX, CONFIG) if name in names)]


def _lost_weights(here: Path) -> list[str]:
    """Names of the weight files that are not in the folder. Raises `ModelError` for an index that names others."""
    return [name for name in weight_files(here) if not (here / name).is_file()]


def weight_files(here: Path) -> list[str]:
    """Names of the weight files that belong to the folder. Raises `ModelError` for an index that names others."""
    if (here / WEIGHTS).is_file() or not (here / INDEX).is_file():
        return [WEIGHTS]
    table = refusals.read_json(here / INDEX).get("weight_map")
    shards = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    wrong = [name for name in shards if Path(name).name != name or not name.endswith(".safetensors")]
    if wrong or not shards:
        raise ModelError(
            f"{here / INDEX} names no safetensors files of its folder: {wrong[0] if wrong else 'none'}",
            "copy or download the model again",
        )
    return shards


# Data sets -----------------------------------------------------------------------------------------------------------


def data_set(name: str, config: str) -> dict[str, list[Path]]:
    """The parquet files of one configuration of a data set, by split, fetched into the cache.

    Raises `DataError` when they cannot be had.
    """
    repo = Repo(kind="dataset", name=name, revision=None, source=f"{name} ({config})")
    none = DataError(f"{repo.words} has no parquet files on the hub", repo.instead)

    def card(names: Collection[str]) -> list[str]:
        if CARD not in names:
            raise none
        return [CARD]

    here = _fetch(repo, card, lambda path: True)
    patterns = _patterns(here / CARD, config)

    def choose(names: Collection[str]) -> list[str]:
        found = _by_split(names, patterns)
        if not found or not all(found.values()):
            raise none
        return [file for files in found.values() for file in files]

    def whole(folder: Path) -> bool:
        found = _by_split(_parquet_files(folder), patterns)
        return bool(found) and all(map(_whole_split, found.values()))

    if not whole(here):
        _fetch(dataclasses.replace(repo, revision=here.name), choose, whole)
    found = _by_split(_parquet_files(here), patterns)
    return {split: [here / file for file in files] for split, files in found.items()}


def _patterns(card: Path, config: str) -> dict[str, list[str]]:
    """What the card of a data set says: the patterns of the files of each split; empty when it says nothing."""
    from huggingface_hub import DatasetCard

    try:
        rows = DatasetCard.load(card).data.to_dict().get("configs") or []
        parts = [part for row in rows if row["config_name"] == config for part in row["data_files"]]
        return {part["split"]: [part["path"]] if isinstance(part["path"], str) else part["path"] for part in parts}
    except Exception as error:
        raise DataError(f"cannot read {card}: {first_line(error)}") from error


def _parquet_files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.parquet") if path.is_file()]


def _by_split(names: Collection[str], patterns: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The parquet files that match the patterns of each split, in order."""
    tables = sorted(name for name in names if name.endswith(".parquet"))
    return {
        split: [name for name in tables if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)]
        for split, wanted in patterns.items()
    }


def _whole_split(files: Sequence[str]) -> bool:
    """Whether all files of a split are there: one, or as many as their names say, as in `train-00000-of-00002`."""
    counts = [int(match[1]) for name in files if (match := re.search(r"-of-(\d+)\.", name))]
    return len(files) >= max(counts, default=1)


# Fetching ------------------------------------------------------------------------------------------------------------


def _fetch(repo: Repo, choose: Choice, whole: Callable[[Path], bool]) -> Path:
    """The folder of the cache with the files that `choose` picks from the hub's listing.

    The last file brings the note in the cache which commit the revision is, so that what was broken off is not taken
    for whole. When the hub does not serve the repository now, a folder of the cache that is `whole` is taken.
    """
    cached = _cached(repo, whole)
    if _offline(repo):
        if cached is None:
            raise _not_cached(repo)
        return cached
    try:
        with quiet(), _patience():
            listing = _ask(repo)
            names = choose([file.rfilename for file in listing.siblings])
            paths = [_download(repo, name, listing.sha) for name in names]
            _download(repo, names[-1], repo.revision)
    except CapError:
        raise
    except Exception as error:
        if cached is None or _status(error) == 404:
            raise _refusal(error, repo) from error
        return cached
    return paths[-1].parent


def _cached(repo: Repo, whole: Callable[[Path], bool]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    last = CONFIG if repo.kind == "model" else CARD
    path = try_to_load_from_cache(repo.name, last, revision=repo.revision, repo_type=repo.kind)
    return Path(path).parent if isinstance(path, str) and whole(Path(path).parent) else None


def _offline(repo: Repo) -> bool:
    """Whether the user wants nobody asked; for data sets there is a switch of the library `datasets` too."""
    from huggingface_hub import constants

    wish = os.environ.get("HF_DATASETS_OFFLINE", "") if repo.kind == "dataset" else ""
    return bool(constants.HF_HUB_OFFLINE) or wish.upper() in constants.ENV_VARS_TRUE_VALUES


def _ask(repo: Repo) -> Any:
    """Commit and files of a repository; asked again, soon, when the hub answers 5xx."""
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi().repo_info(repo.name, revision=repo.revision, repo_type=repo.kind)

    for wait in WAITS_SECONDS:
        try:
            return ask()
        except Exception as error:
            if _status(error) < 500:
                raise
            time.sleep(wait)
    return ask()


def _download(repo: Repo, file: str, revision: str | None) -> Path:
    """One file in the cache; where it is new, its sha256 is that which the hub said. Raises `OSError`."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    known = try_to_load_from_cache(repo.name, file, revision=revision, repo_type=repo.kind)
    path = Path(hf_hub_download(repo.name, file, revision=revision, repo_type=repo.kind))
    blob = path.resolve()
    if isinstance(known, str) or not re.fullmatch("[0-9a-f]{64}", blob.name):
        return path
    with blob.open("rb") as stream:
        whole = hashlib.file_digest(stream, "sha256").hexdigest() == blob.name
    if not whole:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise OSError(f"Consistency check failed: {file}")
    return path


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Bound every wait: the hub's client sets some requests no limit, and asks a silent hub again for minutes."""
    from huggingface_hub import constants, get_session

    limit = max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    asked: collections.Counter[str] = collections.Counter()
    silent_since: float | None = None

    def before(request: Any) -> None:
        nonlocal silent_since
        silent_since = silent_since or time.monotonic()
        asked[str(request.url)] += 1
        if time.monotonic() - silent_since > 3 * limit or asked[str(request.url)] > MAX_REQUESTS:
            raise TimeoutError("no answer")
        waits = request.extensions["timeout"]
        request.extensions["timeout"] = {name: min(value or limit, limit) for name, value in waits.items()}

    def after(response: Any) -> None:
        nonlocal silent_since
        silent_since = None
        if response.status_code == 429:  # the client would sleep as long as the hub says
            response.raise_for_status()

    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {"request": [*hooks["request"], before], "response": [*hooks["response"], after]}
    try:
        yield
    finally:
        session.event_hooks = hooks


# Errors --------------------------------------------------------------------------------------------------------------


def _not_cached(repo: Repo) -> CapError:
    return repo.refused(
        f"offline mode is on, and the {repo.words} is not in the local cache",
        f"run once without HF_HUB_OFFLINE and HF_DATASETS_OFFLINE, or {repo.instead}{repo.perhaps}",
    )


def _refusal(error: Exception, repo: Repo) -> CapError:
    """What a failed request for a repository means, in one line with a hint."""
    status, causes = _status(error), " ".join(type(cause).__name__ for cause in _chain(error))
    login = "set HF_TOKEN to a token that may read it, or run: hf auth login"
    if "RevisionNotFound" in causes:
        return repo.refused(
            f"the {repo.words}: there is no revision {repo.revision!r} of {repo.name} on the hub",
            "after @ stands a branch, a tag, a commit, or refs/pr/N",
        )
    if status == 403 or "Gated" in causes:
        return repo.refused(
            f"the hub refuses the {repo.words}: it is private or gated",
            f"{login}; for a gated one, ask for access on its page first",
        )
    if status == 401:
        return repo.refused(
            f"the hub refuses the {repo.words} (401): it is private or gated, or there is none of this name",
            login + repo.perhaps,
        )
    if status == 404:
        return repo.refused(f"there is no {repo.words} on the hub", f"check the name; {repo.instead}{repo.perhaps}")
    if status == 429:
        return repo.refused(
            f"the hub answered 429, too many requests, for the {repo.words}",
            "wait some minutes and run the same command again; with HF_TOKEN the limits are higher",
        )
    if status:
        return repo.refused(f"the hub answered {status} for the {repo.words}", f"try again later, or {repo.instead}")
    if "Consistency check failed" in str(error) or "RemoteProtocolError" in causes:
        return repo.refused(
            f"the download of the {repo.words} broke off or was damaged; nothing of the file was kept",
            "run the same command again",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RunFailed(f"no room in the cache for the {repo.words}: {error}", "HF_HOME names the folder of the cache")
    if isinstance(error, OSError) and error.errno:
        return repo.refused(f"cannot use the cache: {error}", "HF_HOME names the folder of the cache")
    if "FileMetadataError" in causes or "JSONDecodeError" in causes:
        return repo.refused(
            f"what answers at {_host()} is not a model hub", "check HF_ENDPOINT, and the proxy of your network"
        )
    return repo.refused(
        f"cannot reach the hub at {_host()} for the {repo.words}, and it is not in the local cache",
        f"check the network, {repo.instead}{repo.perhaps}",
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int:
    """The HTTP status behind an error; 0 when there was no answer."""
    answers = (getattr(cause, "response", None) for cause in _chain(error))
    return next((int(answer.status_code) for answer in answers if answer is not None), 0)


def _host() -> str:
    """Where the hub is looked for; without the password that an address may hold."""
    from huggingface_hub import constants

    return str(urlsplit(constants.ENDPOINT).netloc).rpartition("@")[2]


def explained(error: Exception, path: str, source: str) -> ModelError:
    """What a failed load of the model `source` from the folder `path` means, in one line with a hint."""
    text = first_line(error)
    if any("SafetensorError" in type(cause).__name__ for cause in _chain(error)):
        return ModelError(f"the weights of {source} are corrupt: {text}", "download or copy the model again")
    if "trust_remote_code" in str(error):
        return ModelError(f"{source} needs its own code; capcli never runs code from a model folder")
    if "above report" in str(error):  # which transformers logs, and nobody sees
        return ModelError(
            f"the weights of {source} do not have the shapes that its {CONFIG} describes",
            f"the files are in {path}; copy or download {CONFIG} and the weights of one model together",
        )
    return ModelError(f"cannot load {source}: {text}", f"the files are in {path}")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, and the next one where it ends in a colon; or its type."""
    if isinstance(error, KeyError):
        return f"there is no {str(error)[:300]}"
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join([first, *rest[: first.endswith(":")]])[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the hub client's own warnings and bars away; what they would say is said by us."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    level = logging.get_verbosity()
    bars = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()
