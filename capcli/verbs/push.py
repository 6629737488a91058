"""`cap push`: a run or an export becomes a repository of the hub, or its next commit.

What is sent is listed before anything is; it is sent in one commit, and looked at again there. Nothing is deleted.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

from capcli.config.paths import shortened
from capcli.config.push import PushConfig
from capcli.errors import ConfigError
from capcli.events import Event
from capcli.exporting import parcel
from capcli.records.pushed import Pushed, PushedFile
from capcli.reporting.text import byte_size, counted
from capcli.sources import hub, upload
from capcli.sources.upload import Piece, Remote

MESSAGE = "Upload with cap push"
THERE = "all files are there already: nothing was sent"


def push(config: PushConfig) -> Generator[Event, None, Pushed]:
    """Send the folder to the repository; yields events and returns what was sent, or with `dry_run` would be.

    Raises:
        CapError: for a folder or repository that does not fit, secrets, and what the hub refuses, see `parcel.pieces`
            and `upload`. A dry run has a note in place of what the hub refuses.
    """
    upload.check_name(config.repo)
    pieces = parcel.pieces(config.folder, config.repo)
    yield Event(phase="push", note=f"{counted(len(pieces), 'file')} of {config.folder}")
    plain = _listed(config, pieces)
    try:
        remote = upload.look(config.repo)
    except ConfigError as error:
        if config.dry_run:
            return replace(plain, notes=(f"what the files would change is not known: {error.message}",))
        raise
    found = _compared(config, plain, pieces, remote)
    if config.dry_run:
        return found
    new = [piece for piece, file in zip(pieces, found.files, strict=True) if file.change != "same"]
    if remote and not new:
        return replace(found, commit=remote.commit, notes=(THERE,))
    for piece in new:
        yield Event(phase="push", note=f"{piece.name}: {byte_size(piece.bytes)}")
    yield Event(phase="push", note=f"sending {byte_size(sum(piece.bytes for piece in new))} to {found.url}")
    commit = upload.send(config.repo, new, remote, private=config.private, message=config.message or MESSAGE)
    hub.ask_again()
    yield Event(phase="push", done=1, total=1, overall=1.0, note=f"complete: {found.url}")
    return replace(found, commit=commit)


def _listed(config: PushConfig, pieces: Sequence[Piece]) -> Pushed:
    """What is known before the hub is asked."""
    return Pushed(
        folder=str(shortened(config.folder)),
        repo=config.repo,
        url=upload.page_of(config.repo),
        dry_run=config.dry_run,
        created=None,
        private=None,
        commit=None,
        files=tuple(PushedFile(name=piece.name, bytes=piece.bytes) for piece in pieces),
    )


def _compared(config: PushConfig, plain: Pushed, pieces: Sequence[Piece], remote: Remote | None) -> Pushed:
    """The same beside what is in the repository. Raises `CapError` for one that these files do not fit into."""
    others = upload.others(remote, pieces)
    parcel.check_same_model(config.repo, others)
    if remote and config.private and not remote.private:
        raise ConfigError(f"{config.repo} is there already, and public", "leave --private out, or choose another name")
    changes = [remote.change(piece) if remote else "new" for piece in pieces]
    return replace(
        plain,
        created=remote is None,
        private=remote.private if remote else config.private,
        files=tuple(replace(file, change=change) for file, change in zip(plain.files, changes, strict=True)),
        others=others,
    )
