"""What `cap push` says."""

from __future__ import annotations

from dataclasses import dataclass

from capcli.records.codec import Versioned


@dataclass(frozen=True, kw_only=True)
class PushedFile:
    """A file of a push. change: new, changed or same, beside that of the repository; None where nobody was asked."""

    name: str
    bytes: int
    change: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pushed(Versioned):
    """A push, or with `dry_run` what it would be.

    created: whether the repository is new; private: whether only those who may can see it; None where the hub was not
    asked. commit: the one that holds the files, None where nothing was sent. others: files of the repository that stay
    as they are.
    """

    folder: str
    repo: str
    url: str
    dry_run: bool
    created: bool | None
    private: bool | None
    commit: str | None
    files: tuple[PushedFile, ...]
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
