"""Models by hub name, from a little hub on the loopback: found, missing, broken, cached, unreachable. No network."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny, environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Several commands in one process, because each process takes seconds to load torch. Prints one JSON list.
DRIVER = """
import json, sys, time
from tiny import invoke
rows = []
for arguments in json.loads(sys.argv[1]):
    began = time.monotonic()
    done = invoke(*arguments)
    rows.append([done.exit_code, done.stdout, done.stderr, time.monotonic() - began])
print(json.dumps(rows))
"""


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's protocol that loading a model takes: /OWNER/NAME/resolve/REVISION/FILE and the listing."""

    root = Path()
    asked: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        self.asked.append(self.path)
        if path[:2] == ["api", "models"]:
            self.listing("/".join(path[2:4]), path[4:])
        elif len(path) >= 5 and path[2] == "resolve":
            self.file("/".join(path[:2]), "/".join(path[4:]), body)
        else:
            self.reply(404, {}, b"")

    def listing(self, name: str, rest: list[str]) -> None:
        folder = self.root / name
        if name == "owner/broken":
            return self.reply(500, {}, b"{}")
        if not folder.is_dir():
            return self.reply(404, {"X-Error-Code": "RepoNotFound"}, b"{}")
        names = sorted(path.name for path in folder.iterdir())
        if rest[:1] == ["tree"]:
            rows: Any = [{"type": "file", "path": n, "size": (folder / n).stat().st_size, "oid": COMMIT} for n in names]
        else:
            rows = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names], "tags": []}
        return self.reply(200, {"Content-Type": "application/json"}, json.dumps(rows).encode())

    def file(self, name: str, file: str, body: bool) -> None:
        folder = self.root / name
        if name == "owner/broken":
            return self.reply(500, {}, b"")
        if not folder.is_dir():
            return self.reply(404, {"X-Error-Code": "RepoNotFound"}, b"")
        path = folder / file
        if not path.is_file():
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
        data = path.read_bytes()
        tag = hashlib.sha256(data).hexdigest()
        return self.reply(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'}, data, body)

    def reply(self, code: int, headers: dict[str, str], data: bytes, body: bool = True) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a hub with owner/tiny and three damaged models."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("tiny", "no-tokenizer", "no-config", "truncated", "pickled"):
        shutil.copytree(tiny.model, root / "owner" / name)
    for path in (root / "owner" / "no-tokenizer").glob("tokenizer*"):
        path.unlink()
    (root / "owner" / "no-config" / "config.json").unlink()
    weights = root / "owner" / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    pickled = root / "owner" / "pickled" / "model.safetensors"
    pickled.rename(pickled.with_name("pytorch_model.bin"))
    handler = type("Handler", (Hub,), {"root": root, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh cache, shared by the tests of this module."""
    return tmp_path_factory.mktemp("hf-home")


def unused_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def run(tiny: Tiny, models: list[str], home: Path, address: str, **changes: str) -> list[Any]:
    """`cap prune MODEL --plan --json` for each model, in a process with this hub and cache."""
    commands = [
        [*tiny.arguments(home / "out", model=model, max_train_samples=32), "--plan", "--json"] for model in models
    ]
    env = environment(HF_ENDPOINT=address, HF_HOME=str(home), PYTHONPATH=str(Path(__file__).parent), **changes)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", f"the client of the hub writes past cap: {done.stderr[-2000:]}"
    return list(json.loads(done.stdout))


def error_of(row: Any) -> str:
    """The error line and hint of a refused command."""
    code, printed, errors, _ = row
    assert code == 2, errors
    assert printed == ""
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line]
    start = next(i for i, line in enumerate(lines) if line.startswith("error: "))
    assert len(lines) - start <= 2, lines
    assert start <= 2, lines
    return "\n".join(lines[start:])


@pytest.fixture(scope="module")
def rows(tiny: Tiny, hub: str, home: Path) -> dict[str, Any]:
    """What `cap` said about each model of the hub; afterwards those that are whole lie in the cache."""
    names = ["tiny", "missing", "broken", "no-config", "no-tokenizer", "truncated", "pickled"]
    return dict(zip(names, run(tiny, [f"owner/{name}" for name in names], home, hub), strict=True))


def test_hub(rows: dict[str, Any], home: Path) -> None:
    """R12: what is there loads; what is not, or is damaged, is one line that names it."""
    names = list(rows)
    assert rows["tiny"][0] == 0, rows["tiny"]
    assert json.loads(rows["tiny"][1])["prunable_weights"] == 16384
    said = {name: error_of(rows[name]) for name in names[1:]}
    assert "there is no model 'owner/missing' on the hub" in said["missing"]
    assert "hint:" in said["missing"]
    assert "owner/broken" in said["broken"]
    assert "500" in said["broken"]
    assert "config.json" in said["no-config"]
    assert "owner/no-tokenizer" in said["no-tokenizer"]
    assert "the weights of owner/truncated are corrupt" in said["truncated"]
    assert "owner/pickled" in said["pickled"]
    assert "safetensors" in said["pickled"]
    assert not (home / "out").exists()
    assert all(rows[name][3] < 20 for name in said), "a broken hub must not be waited for"


def test_unreachable_hub(tiny: Tiny, rows: dict[str, Any], home: Path) -> None:
    """A cached model loads; any other is refused soon, with the built-in model in the hint."""
    cached, other, alias = run(tiny, ["owner/tiny", "owner/other", "bert-base"], home, unused_address())
    assert cached[0] == 0, cached
    for row, name in ((other, "owner/other"), (alias, "bert-base")):
        said = error_of(row)
        assert f"cannot reach the model hub for '{name}'" in said
        assert "'mini'" in said
        assert row[3] < 10


def test_offline(tiny: Tiny, rows: dict[str, Any], home: Path) -> None:
    """HF_HUB_OFFLINE=1: only what is cached, nobody is asked."""
    cached, other = run(tiny, ["owner/tiny", "owner/other"], home, unused_address(), HF_HUB_OFFLINE="1")
    assert cached[0] == 0, cached
    assert "not in the local cache" in error_of(other)
