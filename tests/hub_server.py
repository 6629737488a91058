"""A little hub on the loopback: the part of the Hugging Face protocol that fetching takes, and its ways to fail."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@dataclass(kw_only=True)
class Repo:
    """A repository: its folders by revision, and what goes wrong with it."""

    revisions: dict[str, Path]
    token: str = ""  # who comes without is answered 401
    gated: bool = False  # everybody is answered 403
    answers: list[int] = field(default_factory=list)  # statuses of the next requests
    always: int = 0  # the status of every request
    page: bool = False  # a page for people is answered, as by the login of a network
    silent: bool = False  # no answer at all
    silent_files: bool = False  # the listing is answered, the files are not
    cut: str = ""  # the body of files that match ends half-way
    slow: str = ""  # the body of this file takes four seconds
    flip: str = ""  # one byte of this file is another

    def commit(self, revision: str) -> str:
        """The commit behind a branch, tag or commit; empty when there is none."""
        commits = {name: hashlib.sha1(str(folder).encode()).hexdigest() for name, folder in self.revisions.items()}
        return commits.get(revision, revision if revision in commits.values() else "")

    def folder(self, commit: str) -> Path:
        """The files of a commit."""
        return next(folder for name, folder in self.revisions.items() if self.commit(name) == commit)


class Hub(ThreadingHTTPServer):
    """Serves `repos`, by (kind, name) with kind `models` or `datasets`; `asked` is every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.asked: list[str] = []
        self.closing = threading.Event()

    @property
    def address(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, folder: Path, kind: str = "models", **options: Any) -> Repo:
        """Serve `folder` as the branch main of a repository."""
        revisions = {"main": folder, **options.pop("revisions", {})}
        self.repos[kind, name] = Repo(revisions=revisions, **options)
        return self.repos[kind, name]

    def mend(self) -> None:
        """Send whole files from now on."""
        for repo in self.repos.values():
            repo.cut = repo.flip = ""

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        """`/api/KIND/OWNER/NAME[/revision/REV]`, `[/datasets]/OWNER/NAME/resolve/REV/FILE`; all else is a 404."""
        self.server.asked.append(f"{self.command} {self.path}")
        if self.path == "/mend":
            self.server.mend()
            return self.reply(200, {})
        parts = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        if parts[0] == "api":
            kind, name, rest = parts[1], "/".join(parts[2:4]), parts[4:]
        else:
            kind = "datasets" if parts[0] == "datasets" else "models"
            rest = parts[1:] if kind == "datasets" else parts
            name, rest = "/".join(rest[:2]), rest[2:]
        repo = self.server.repos.get((kind, name))
        if repo is None:
            return self.reply(404, {"X-Error-Code": "RepoNotFound"})
        if refused := self.refusal(repo, parts[0] != "api"):
            return self.reply(*refused, b"<html></html>")
        commit = repo.commit(rest[1] if len(rest) > 1 else "main")
        if not commit:
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        if parts[0] == "api":
            return self.listing(name, repo, commit)
        return self.file(repo, commit, "/".join(rest[2:]))

    def refusal(self, repo: Repo, file: bool) -> tuple[int, dict[str, str]] | None:
        if repo.silent or (file and repo.silent_files):
            self.server.closing.wait(60)
        if repo.page:
            return 200, {"Content-Type": "text/html"}
        status = repo.answers.pop(0) if repo.answers else repo.always
        if status:
            return status, {"Retry-After": "600"} if status == 429 else {}
        if repo.gated:
            return 403, {"X-Error-Code": "GatedRepo"}
        if repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            return 401, {"X-Error-Code": "RepoNotFound"}
        return None

    def listing(self, name: str, repo: Repo, commit: str) -> None:
        folder = repo.folder(commit)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        table = {"id": name, "sha": commit, "siblings": [{"rfilename": n} for n in names], "tags": []}
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(table).encode())

    def file(self, repo: Repo, commit: str, name: str) -> None:
        path = repo.folder(commit) / name
        if not path.is_file():
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if name == repo.flip:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if name == repo.slow and self.command == "GET":
            return self.trickle(headers, data)
        return self.reply(200, headers, data, len(data) // 2 if fnmatch.fnmatch(name, repo.cut) else None)

    def reply(self, status: int, headers: dict[str, str], data: bytes = b"", sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])

    def trickle(self, headers: dict[str, str], data: bytes) -> None:
        part = len(data) // 16
        self.reply(200, headers, data, part)
        for i in range(1, 17):
            self.server.closing.wait(0.25)
            self.wfile.write(data[i * part : (i + 1) * part] if i < 16 else data[16 * part :])

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub without repositories, until the end of the block."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        hub.server_close()
        thread.join()


def unused_address() -> str:
    """An address that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
