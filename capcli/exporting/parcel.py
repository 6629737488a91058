"""What of a folder goes to the hub: the files that capcli wrote, without secrets and without where its data lie."""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capcli import files
from capcli.config.layers import TOKEN
from capcli.config.names import HUB_PREFIX
from capcli.config.paths import elsewhere
from capcli.errors import ConfigError, FileError, ModelError
from capcli.records.codec import read
from capcli.records.exported import ExportRecord
from capcli.records.parts import FileFacts
from capcli.records.pruned import Report
from capcli.reporting.card import for_hub
from capcli.reporting.text import first_few
from capcli.run import SWEEP
from capcli.sources import checkpoint
from capcli.sources.checkpoint import ARTEFACT, CONFIG, GRAPH, INDEX, RECORD, REPORT, SPARSE, TOKENIZER_FILES, WEIGHTS
from capcli.sources.requests import CARD
from capcli.sources.upload import Piece

PAGE, WORK = "report.html", "work"  # what a run leaves that is not sent
BINARY = (".safetensors", ".onnx", ".data", ".model")  # weights, and vocabularies that are no text
DECIDE = frozenset({ARTEFACT, SPARSE, CONFIG, WEIGHTS, INDEX, GRAPH, REPORT, RECORD, *TOKENIZER_FILES})
"""Files that decide which model a repository is."""
SECRETS = {
    "a token of the hub": TOKEN,
    "a private key": re.compile(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY"),
    "an API key": re.compile(
        r"(?<![A-Za-z0-9])(?:sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,}"
        r"|glpat-[\w-]{20,}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{35})"
    ),
    "a password in an address": re.compile(r"://[^\s/:@\"']+:[^\s/:@\"']+@"),
    "a key or password": re.compile(
        r"(?i)(?:api[_-]?key|secret|password|passwd|(?:access|auth|bearer)[_-]?token)[\\\"']*\s*[=:]\s*[\\\"']*"
        r"(?=[^\s\\\"',}]*\d)(?=[^\s\\\"',}]*[a-z])[^\s\\\"',}]{16,}"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Written:
    """A folder that capcli wrote. record: the file that says so, `facts` its files with bytes and sha256; `more` are
    those that have none, and `kept` those that stay here."""

    folder: Path
    record: str
    facts: Mapping[str, FileFacts]
    more: tuple[str, ...]
    kept: tuple[str, ...]


def pieces(folder: str, repo: str) -> tuple[Piece, ...]:
    """The files of a run or an export as they are sent to the repository: its snippets name it, its places of data
    only say what they were called.

    Raises:
        FileError: naming what capcli did not write, what was changed since, links, and the line of a secret.
        ModelError, ConfigError: for what is no finished run and no export.
    """
    found = written(folder)
    _check_names(found)
    made = [_piece(found, name, repo) for name in (*found.facts, *found.more)]
    sent = [*made, _record(found, {piece.name: piece for piece in made})]
    for piece in sent:
        _check_secrets(found, piece)
    return tuple(sorted(sent, key=lambda piece: piece.name))


def written(folder: str) -> Written:
    """What capcli wrote into a folder, by its record."""
    here = Path(folder).resolve()  # OUT/best of a sweep is a link
    if not here.is_dir():
        raise FileError(f"{folder} is not a folder", "name the output folder of cap prune or cap export")
    if (here / SWEEP).is_file():
        raise ConfigError(f"{folder} is a sweep of several runs", f"push one of them: {folder}/best, if there is one")
    if (here / RECORD).is_file():
        facts = read(ExportRecord, here / RECORD).files
        return Written(folder=here, record=RECORD, facts=facts, more=(), kept=())
    if (here / ARTEFACT).is_file() and (here / REPORT).is_file():
        facts = read(Report, here / REPORT).files
        return Written(folder=here, record=REPORT, facts=facts, more=(CARD,), kept=(PAGE, WORK))
    if (here / WORK).is_dir():
        raise checkpoint.unfinished(folder)
    raise ModelError(f"{folder} is neither a run nor an export of capcli", "push what cap prune or cap export wrote")


def _check_names(found: Written) -> None:
    """Raise `FileError` unless all that lies in the folder is known, and all that is known lies there."""
    known = {found.record, *found.facts, *found.more}
    seen: dict[str, Path] = {str(path.relative_to(found.folder)): path for path in _entries(found)}
    if links := sorted(name for name, path in seen.items() if path.is_symlink()):
        raise FileError(f"{found.folder} contains links, which are not followed: {first_few(links)}", "remove them")
    odd = [name for name, path in seen.items() if not stat.S_ISREG(path.lstat().st_mode)]
    if foreign := sorted({*odd, *(seen.keys() - known)}):
        raise FileError(
            f"{found.folder} contains what capcli did not write: {first_few(foreign)}", "move it out of the folder"
        )
    if lost := sorted(known - seen.keys()):
        raise FileError(f"{found.folder} is incomplete, without {first_few(lost)}", "copy the whole folder")


def _entries(found: Written, folder: Path | None = None) -> Iterator[Path]:
    """Files and links below the folder, and folders that hold nothing known; without what is not sent."""
    parents = {str(parent) for name in found.facts for parent in Path(name).parents}
    for path in sorted((folder or found.folder).iterdir()):
        name = str(path.relative_to(found.folder))
        if name in parents and path.is_dir() and not path.is_symlink():
            yield from _entries(found, path)
        elif name not in found.kept or path.is_symlink():
            yield path


def _piece(found: Written, name: str, repo: str) -> Piece:
    """A file as it is sent. Raises `FileError` for one that is not as it was written; cards may be edited."""
    path = found.folder / name
    digest, n_bytes = files.sha256(path), path.stat().st_size
    facts = found.facts.get(name)
    if name != CARD and facts is not None and digest != facts.sha256:
        raise FileError(f"{path} is not as it was written: {found.record} has another sha256", "make the folder again")
    if name == CARD:
        return _of_text(name, for_hub(path.read_bytes().decode("utf-8", "replace"), repo))
    if name == ARTEFACT:
        return _of_json(name, _public(checkpoint.model_json(path)))
    return Piece(name=name, content=path, bytes=n_bytes, sha256=digest)


def _record(found: Written, sent: Mapping[str, Piece]) -> Piece:
    """`report.json` or `export.json` with the bytes and sha256 of the files as they are sent."""
    table = _public(checkpoint.model_json(found.folder / found.record))
    table["files"] = {
        name: {"bytes": sent[name].bytes, "sha256": sent[name].sha256} for name in found.facts if name in sent
    }
    return _of_json(found.record, table)


def _public(value: Any) -> Any:
    """JSON in which the places of the data and of a base, as seen from its folder, only say what they were called."""
    if isinstance(value, dict):
        found = {name: _public(one) for name, one in value.items()}
        source = found.get("source")
        if isinstance(source, dict) and isinstance(place := source.get("data"), str) and place:
            found["source"] = source | {"data": place if place.startswith(HUB_PREFIX) else elsewhere(place)}
        base = found.get("base")
        if isinstance(base, dict) and str(base.get("name")).startswith("."):
            found["base"] = base | {"name": elsewhere(base["name"])}
        return found
    return [_public(one) for one in value] if isinstance(value, list) else value


def _of_json(name: str, table: Any) -> Piece:
    return _of_text(name, files.json_text(table))


def _of_text(name: str, text: str) -> Piece:
    data = text.encode()
    return Piece(name=name, content=data, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _check_secrets(found: Written, piece: Piece) -> None:
    """Raise `FileError` for the first line that looks like a secret, which is not shown."""
    if piece.name.endswith(BINARY):
        return
    data = piece.content if isinstance(piece.content, bytes) else piece.content.read_bytes()
    text = data.decode("utf-8", "replace")
    for what, pattern in SECRETS.items():
        if match := pattern.search(text):
            line = text.count("\n", 0, match.start()) + 1
            raise FileError(
                f"{found.folder / piece.name}, line {line}, contains what looks like {what}, which is not shown here",
                "remove it from the file or from the run's options; revoke it if others have seen it",
            )


def check_same_model(repo: str, others: Collection[str]) -> None:
    """Raise `FileError` for a repository with files of another model among the `others` that would stay there."""
    shards = [name for name in others if name.endswith((".safetensors", ".onnx")) and "/" not in name]
    if clash := sorted({*shards, *(DECIDE & set(others))}):
        raise FileError(
            f"{repo} contains files of another model, which would be read with this one: {first_few(clash)}",
            "push to another name, or delete them there first",
        )
