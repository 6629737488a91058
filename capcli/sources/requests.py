"""Asking the hub: bounded waits, retries, the cache, offline mode, and every refusal in one clear line."""

from __future__ import annotations

import collections
import contextlib
import difflib
import errno
import hashlib
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from capcli.config.names import ALIASES, BUILTIN_MODEL, BUILTIN_TASKS, nearest
from capcli.errors import CapError, DataError, ModelError, RunFailed, first_line
from capcli.reporting.text import first_few
from capcli.sources.checkpoint import CONFIG

CARD = "README.md"
WAITS_SECONDS = (0.5, 2.0)  # before asking again a hub that answers 5xx
MAX_REQUESTS = 20  # for one file
MARKS = ("cap_config.json", CONFIG, "work")  # what is in the folder of a model or of a run
# (names of all files, what fetches one of them) -> names of those that are needed
Choice = Callable[[Collection[str], Callable[[str], Path]], list[str]]


@dataclass(frozen=True, kw_only=True)
class Repo:
    """A repository of the hub. kind: `model` or `dataset`. source: what the user calls it."""

    kind: str
    name: str
    revision: str | None
    source: str

    def refused(self, message: str, hint: str) -> CapError:
        """The error for this kind of repository; of a model that is rather a folder that is not there, says so."""
        if self.kind == "model" and (near := near_folders(self.source)) is not None:
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


def near_folders(source: str) -> str | None:
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
    return f"in {path.parent} there are {first_few(sorted(names), 8)}" if names else ""


# Fetching ------------------------------------------------------------------------------------------------------------


def fetch(repo: Repo, choose: Choice, whole: Callable[[Path], bool]) -> Path:
    """The folder of the cache with the files that `choose` picks from the hub's listing.

    `choose` may fetch some files to find out which others are needed. The last file brings the note in the cache which
    commit the revision is, so that what was broken off is not taken for whole. When the hub does not serve the
    repository now, a folder of the cache that is `whole` is taken.
    """
    cached = _cached(repo, whole)
    if _offline(repo):
        if cached is None:
            raise _not_cached(repo)
        return cached
    try:
        with quiet(), patience():
            listing = _ask(repo)
            commit = listing.sha
            names = choose([file.rfilename for file in listing.siblings], lambda name: _download(repo, name, commit))
            paths = [_download(repo, name, commit) for name in names]
            _download(repo, names[-1], repo.revision)
    except CapError:
        raise
    except Exception as error:
        if cached is None or status_of(error) == 404:
            raise _refusal(error, repo) from error
        return cached
    return paths[-1].parents[names[-1].count("/")]


def _cached(repo: Repo, whole: Callable[[Path], bool]) -> Path | None:
    """The folder of the cache for the revision, by the note that the last file left there; None if it is not whole."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    place = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo.name, repo_type=repo.kind)
    revision = repo.revision or constants.DEFAULT_REVISION
    note = place / "refs" / revision
    folder = place / "snapshots" / (note.read_text("utf-8").strip() if note.is_file() else revision)
    return folder if folder.is_dir() and whole(folder) else None


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
            if status_of(error) < 500:
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
def patience() -> Iterator[None]:
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
    status, causes = status_of(error), " ".join(type(cause).__name__ for cause in chain(error))
    login = "set HF_TOKEN to a token that may read it, or run: hf auth login"
    if "RevisionNotFound" in causes:
        return repo.refused(
            f"the {repo.words}: there is no revision {repo.revision!r} of {repo.name} on the hub",
            "give a branch, a tag, a commit, or refs/pr/N after @",
        )
    if status == 403 or "Gated" in causes:
        return repo.refused(
            f"the hub refuses the {repo.words}: it is private or gated",
            f"{login}; for a gated one, first ask for access on its page",
        )
    if status == 401:
        return repo.refused(
            f"the hub refuses the {repo.words} (401): it is private or gated, or does not exist",
            login + repo.perhaps,
        )
    if status == 404:
        return repo.refused(f"there is no {repo.words} on the hub", f"check the name; {repo.instead}{repo.perhaps}")
    if status == 429:
        return repo.refused(
            f"the hub answered 429, too many requests, for the {repo.words}",
            "wait a few minutes and run the same command again; with HF_TOKEN the limits are higher",
        )
    if status:
        return repo.refused(f"the hub answered {status} for the {repo.words}", f"try again later, or {repo.instead}")
    if "Consistency check failed" in str(error) or "RemoteProtocolError" in causes:
        return repo.refused(
            f"the download of the {repo.words} broke off or was damaged; the file was not kept",
            "run the same command again",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RunFailed(f"no space in the cache for the {repo.words}: {error}", "HF_HOME sets the cache folder")
    if isinstance(error, OSError) and error.errno:
        return repo.refused(f"cannot use the cache: {error}", "HF_HOME sets the cache folder")
    if "FileMetadataError" in causes or "JSONDecodeError" in causes:
        return repo.refused(
            f"the server at {host()} is not a model hub", "check HF_ENDPOINT and the proxy of your network"
        )
    return repo.refused(
        f"cannot reach the hub at {host()} for the {repo.words}, and it is not in the local cache",
        f"check the network, {repo.instead}{repo.perhaps}",
    )


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int:
    """The HTTP status behind an error; 0 when there was no answer."""
    answers = (getattr(cause, "response", None) for cause in chain(error))
    return next((int(answer.status_code) for answer in answers if answer is not None), 0)


def host() -> str:
    """Where the hub is looked for; without the password that an address may hold."""
    from huggingface_hub import constants

    return str(urlsplit(constants.ENDPOINT).netloc).rpartition("@")[2]


def explained(error: Exception, path: str, source: str) -> ModelError:
    """What a failed load of the model `source` from the folder `path` means, in one line with a hint."""
    text = first_line(error)
    if any("SafetensorError" in type(cause).__name__ for cause in chain(error)):
        return ModelError(f"the weights of {source} are corrupt: {text}", "download or copy the model again")
    if "trust_remote_code" in str(error):
        return ModelError(f"{source} needs its own code; capcli never runs code from a model folder")
    if "above report" in str(error):  # which transformers logs, and nobody sees
        return ModelError(
            f"the weights of {source} do not have the shapes that its {CONFIG} describes",
            f"the files are in {path}; copy or download {CONFIG} and the weights of one model together",
        )
    return ModelError(f"cannot load {source}: {text}", f"the files are in {path}")


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
