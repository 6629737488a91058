"""Sending files to a repository of the hub: who asks, what is there, one commit."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capcli.errors import CapError, ConfigError, FileError, RunFailed
from capcli.reporting.text import first_few
from capcli.sources.requests import chain, host, patience, quiet, status_of

LOGIN = "set HF_TOKEN to a token that may write to it, or run: hf auth login"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A file as it is sent: its name in the repository, and its bytes or the file that holds them."""

    name: str
    content: bytes | Path
    bytes: int
    sha256: str

    @property
    def git_sha1(self) -> str:
        """How git calls the content, which is how the hub calls a small file."""
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A repository as it is: its newest commit, and its files with the digest that the hub gives, sha256 of large ones
    and git's of small ones."""

    commit: str
    private: bool
    files: dict[str, str]

    def change(self, piece: Piece) -> str:
        """What a file is to this repository: new, changed or same."""
        known = self.files.get(piece.name)
        if known is None:
            return "new"
        return "same" if known == (piece.sha256 if len(known) == 64 else piece.git_sha1) else "changed"


def check_name(repo: str) -> None:
    """Raise `ConfigError` for what is no name of a repository with its owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{repo[:120]!r} is not a name on the hub", "a name is OWNER/NAME: me/sst2-small") from error
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
        raise ConfigError(f"{repo!r} has no owner", f"give it as OWNER/NAME: me/{repo}")


def page_of(repo: str) -> str:
    """The address of its page; without the password that the hub's may hold."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT.partition('://')[0]}://{host()}/{repo}"


def look(repo: str) -> Remote | None:
    """The repository as it is; None where there is none that this token can see.

    Raises `ConfigError` without a token that may write, or where the hub cannot be asked.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ConfigError("offline mode is on, and a push needs the hub", "unset HF_HUB_OFFLINE")
    if not get_token():
        raise ConfigError("there is no token for the hub", LOGIN)
    try:
        with quiet(), patience():
            _check_owner(HfApi().whoami(), repo)
            info = HfApi().repo_info(repo, files_metadata=True)
    except CapError:
        raise
    except Exception as error:
        if status_of(error) == 404:
            return None
        raise _refusal(error, repo) from error
    return _remote(info)


def _remote(info: Any) -> Remote:
    files = {one.rfilename: one.lfs.sha256 if one.lfs else str(one.blob_id) for one in info.siblings or ()}
    return Remote(commit=str(info.sha), private=bool(info.private), files=files)


def _check_owner(account: dict[str, Any], repo: str) -> None:
    """Raise `ConfigError` for a token that only reads, or that belongs to somebody else."""
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise ConfigError("this token for the hub may only read", LOGIN)
    names = [str(account.get("name")), *(str(one.get("name")) for one in account.get("orgs", ()))]
    owner = repo.partition("/")[0]
    if owner.lower() not in map(str.lower, names):
        raise ConfigError(
            f"{owner} is neither you nor an organisation of yours: this token belongs to {first_few(names)}",
            f"push to {names[0]}/{repo.partition('/')[2]}, or use another token",
        )


def send(repo: str, pieces: Collection[Piece], before: Remote | None, *, private: bool, message: str) -> str:
    """Make the repository where it is not there, and put the files into it with one commit; returns the commit.

    Nothing is deleted there. Raises `CapError`: nothing was committed then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi()
    operations = [
        CommitOperationAdd(piece.name, piece.content if isinstance(piece.content, bytes) else str(piece.content))
        for piece in pieces
    ]
    kept = "nothing was committed"
    try:
        with quiet(), patience():
            if before is None:
                hub.create_repo(repo, private=private)
                kept = "the repository was made, and is empty"
            parent = before.commit if before else None
            commit = str(hub.create_commit(repo, operations, commit_message=message, parent_commit=parent).oid)
            kept = f"the commit {commit} was made, and could not be checked"
            there = hub.repo_info(repo, revision=commit, files_metadata=True)
    except Exception as error:
        raise _refusal(error, repo, kept) from error
    lost = [piece.name for piece in pieces if _remote(there).change(piece) != "same"]
    if lost:
        raise RunFailed(
            f"the commit {commit} of {repo} has no {first_few(lost)} as it was sent",
            "see whether a .gitignore in the repository names it",
        )
    return commit


def others(remote: Remote | None, pieces: Sequence[Piece]) -> tuple[str, ...]:
    """The files of the repository that are none of these."""
    ours = {".gitattributes", *(piece.name for piece in pieces)}  # which the hub writes itself
    return tuple(sorted(set(remote.files) - ours)) if remote else ()


def _refusal(error: Exception, repo: str, kept: str = "") -> CapError:
    """What a request that failed means. kept: how the hub was left, where it had been asked to change something."""
    status, sending, kept = status_of(error), bool(kept), f"; {kept}" if kept else ""
    said = next(filter(None, (str(getattr(one, "server_message", None) or "") for one in chain(error))), "")
    why = f"{status}: {' '.join(said.split())[:200]}" if said else str(status)
    if status == 401:
        return ConfigError(f"the hub does not accept this token ({why}){kept}", LOGIN)
    if status == 403:
        return ConfigError(f"this token may not write to {repo} ({why}){kept}", LOGIN)
    if status in (409, 412):
        return RunFailed(f"{repo} was changed by somebody else meanwhile{kept}", "run the same command again")
    if isinstance(error, ValueError) and "README.md" in str(error):
        said = " ".join(str(error).split())
        return FileError(
            f"the hub refuses the model card: {said[:300]}{kept}", "correct the lines between --- in README.md"
        )
    if "JSONDecodeError" in {type(cause).__name__ for cause in chain(error)}:
        return ConfigError(f"the server at {host()} is not a model hub", "check HF_ENDPOINT and your proxy")
    if status == 429:
        words, hint = "answered 429, too many requests", "wait a few minutes and run the same command again"
    elif status:
        words, hint = f"answered {why}", "run the same command again later"
    else:
        words, hint = "cannot be reached", "check the network, and run the same command again"
    return (RunFailed if sending else ConfigError)(f"the hub at {host()} {words}{kept}", hint)
