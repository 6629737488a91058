"""A little hub on the loopback: what fetching and pushing take of the Hugging Face protocol, and its ways to fail.

A push goes as huggingface_hub sends it without hf-xet: the repository is made, the card is checked, the hub says which
files are large, large ones are put where a batch of git-lfs says, and one commit names or brings all of them.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest


@dataclass(kw_only=True)
class Repo:
    """A repository: its folders by revision, and what goes wrong with it."""

    revisions: dict[str, Path]
    token: str = ""  # who comes without is answered 401
    private: bool = False
    closed: bool = False  # nobody may write
    broken: str = ""  # how a request that writes begins, which is answered 500
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
        self.account: dict[str, Any] = {"name": "me", "orgs": [{"name": "us"}], "role": "write", "token": ""}
        self.commits: list[dict[str, Any]] = []  # what each commit said of itself
        self.large: dict[str, bytes] = {}  # by sha256
        self.root = Path(tempfile.mkdtemp())
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

    def reached(self, patch: pytest.MonkeyPatch, cache: Path, token: str) -> None:
        """Let this process ask this hub, with a token and an empty cache, until `patch` is undone."""
        from huggingface_hub import constants

        self.account["token"] = token
        patch.setattr(constants, "ENDPOINT", self.address)
        template = self.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # which speaks to servers of its own
        patch.delenv("HF_DATASETS_OFFLINE", raising=False)
        patch.setenv("HF_TOKEN", token)

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

    def do_POST(self) -> None:
        self.write()

    def do_PUT(self) -> None:
        """A large file, at the address that the batch gave."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self.reply(200, {})

    def answer(self) -> None:
        """`/api/KIND/OWNER/NAME[/revision/REV]`, `[/datasets]/OWNER/NAME/resolve/REV/FILE`; all else is a 404."""
        self.server.asked.append(f"{self.command} {self.path}")
        if self.path == "/mend":
            self.server.mend()
            return self.reply(200, {})
        parts = [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]
        if parts == ["api", "whoami-v2"]:
            return self.whoami()
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
        if rest[:1] == ["tree"]:
            return self.tree(repo, commit, "/".join(rest[2:]))
        if parts[0] == "api":
            return self.listing(name, repo, commit, "blobs=" in self.path)
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

    def listing(self, name: str, repo: Repo, commit: str, blobs: bool) -> None:
        folder = repo.folder(commit)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        rows = [{"rfilename": n, **(digests((folder / n).read_bytes(), n) if blobs else {})} for n in names]
        self.json({"id": name, "sha": commit, "siblings": rows, "tags": [], "private": repo.private})

    def tree(self, repo: Repo, commit: str, below: str) -> None:
        """The files in a folder, which transformers asks for."""
        folder = repo.folder(commit) / below
        if not folder.is_dir():
            return self.reply(404, {"X-Error-Code": "EntryNotFound"})
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        rows = [(str(path.relative_to(repo.folder(commit))), path.stat().st_size) for path in paths]
        self.json([{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in rows])

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

    # Writing ---------------------------------------------------------------------------------------------------------

    def token(self) -> bool:
        """Whether the request has the token of the account; else it is answered 401."""
        if (
            self.server.account["token"]
            and self.headers.get("Authorization") != f"Bearer {self.server.account['token']}"
        ):
            self.reply(401, {}, b"{}")
            return False
        return True

    def whoami(self) -> None:
        account = self.server.account
        if self.token():
            token = {"displayName": "a", "role": account["role"]}
            self.json({"type": "user", **account, "auth": {"type": "access_token", "accessToken": token}})

    def write(self) -> None:
        """What a push asks for: `/api/repos/create`, `/api/validate-yaml`, `preupload`, `commit`, and git-lfs."""
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self.token():
            return None
        if self.path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        parts = self.path.removesuffix(".git/info/lfs/objects/batch").strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts)
        repo = self.server.repos.get(("models", name))
        if repo is None:
            return self.reply(404, {"X-Error-Code": "RepoNotFound"})
        if repo.closed:
            return self.json({"error": "You have no write access"}, 403)
        if repo.broken and repo.broken in self.path:
            return self.reply(500, {})
        if parts[0] != "api":
            return self.batch(json.loads(body))
        return self.preupload(repo, json.loads(body)) if parts[4] == "preupload" else self.commit(name, repo, body)

    def validate(self, content: str) -> None:
        """The checks of the hub that a card of ours could fail: a mapping, and whole results."""
        import yaml

        table = yaml.safe_load(content.split("---\n")[1])
        lost = [
            f"{name} of a result is missing"
            for index in table.get("model-index", ())
            for result in index["results"]
            for name, part in {"task.type": result["task"], "dataset.type": result["dataset"]}.items()
            if not part.get(name.partition(".")[2])
        ]
        self.json({"errors": [{"message": one} for one in lost], "warnings": []}, 400 if lost else 200)

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization'] or self.server.account['name']}/{wanted['name']}"
        if ("models", name) in self.server.repos:
            return self.json({"error": "You already created this model repo"}, 409)
        folder = self.server.root / name / "0"
        folder.mkdir(parents=True)
        (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        self.server.add(name, folder, private=wanted.get("visibility") == "private")
        return self.json({"url": f"{self.server.address}/{name}", "name": name, "id": "1"})

    def preupload(self, repo: Repo, wanted: dict[str, Any]) -> None:
        here = repo.revisions["main"]
        rows = []
        for file in wanted["files"]:
            path = here / file["path"]
            mode = "lfs" if large(file["path"]) else "regular"
            oid = next(iter(digests(path.read_bytes(), file["path"]).values())) if path.is_file() else None
            rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": rows})

    def batch(self, wanted: dict[str, Any]) -> None:
        rows = [
            {**one, "actions": {"upload": {"href": f"{self.server.address}/large/{one['oid']}"}}}
            for one in wanted["objects"]
            if one["oid"] not in self.server.large
        ]
        self.json({"transfer": "basic", "objects": rows})

    def commit(self, name: str, repo: Repo, body: bytes) -> None:
        """All files of the commit, or nothing."""
        lines = [json.loads(line) for line in body.splitlines()]
        about = lines[0]["value"]
        if about.get("parentCommit", repo.commit("main")) != repo.commit("main"):
            return self.json({"error": "The parent commit is not the newest"}, 412)
        here = self.server.root / name / str(1 + len(self.server.commits))
        shutil.copytree(repo.revisions["main"], here)
        for line in lines[1:]:
            path = here / line["value"]["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                path.write_bytes(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "lfsFile":
                path.write_bytes(self.server.large[line["value"]["oid"]])
            else:
                raise AssertionError(line)
        repo.revisions = {**repo.revisions, "main": here}
        self.server.commits.append({**about, "files": [line["value"]["path"] for line in lines[1:]]})
        return self.json(
            {"success": True, "commitOid": repo.commit("main"), "commitUrl": f"{self.server.address}/{name}"}
        )

    def json(self, table: Any, status: int = 200) -> None:
        self.reply(status, {"Content-Type": "application/json"}, json.dumps(table).encode())

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


def large(name: str) -> bool:
    """Whether the hub stores a file as a large one."""
    return name.endswith((".safetensors", ".onnx"))


def digests(data: bytes, name: str) -> dict[str, Any]:
    """What the hub says of a file beside its name."""
    oid = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(data)}\n".encode()
    stored = pointer if large(name) else data
    lfs = {"lfs": {"sha256": oid, "size": len(data), "pointerSize": len(pointer)}} if large(name) else {}
    return {"blobId": hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest(), "size": len(data), **lfs}


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
        shutil.rmtree(hub.root)


def unused_address() -> str:
    """An address that refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"
