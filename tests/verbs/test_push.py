"""`cap push` to a hub on the loopback, and what was pushed loaded by its name: runs, exports, ONNX folders."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_server
import pytest
from huggingface_hub import ModelCard, constants
from tiny import ROOT, Made, Tiny, digest, environment, invoke

import capcli
from capcli.errors import CapError
from capcli.sources import hub as names

TOKEN = "hf_" + "0123456789abcdefXYZ" * 2
ASIDE = {"report.html"}  # of a run, which stays here


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    """An empty hub with a cache of its own, in this process."""
    with hub_server.serving() as server:
        server.reached(monkeypatch, tmp_path / "cache", TOKEN)
        names.ask_again()
        yield server
        names.ask_again()


def pushed(folder: Path, *options: str, repo: str = "me/small", code: int = 0) -> Any:
    """What `cap push --json` prints, or its error lines."""
    done = invoke("push", str(folder), repo, "-q", "--json", *options)
    assert done.exit_code == code, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout) if code == 0 else done.stderr


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def there(server: hub_server.Hub, repo: str = "me/small") -> dict[str, bytes]:
    """The files of a repository."""
    here = server.repos["models", repo].revisions["main"]
    return {str(path.relative_to(here)): path.read_bytes() for path in here.rglob("*") if path.is_file()}


def own(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - ASIDE


# There and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["", "dense", "sparse", "onnx"])
def test_what_is_pushed_loads_by_its_name(hub: hub_server.Hub, asked: Made, form: str, tmp_path: Path) -> None:
    """The same answers by id as from the folder, through Python, `cap eval` and the snippets of the card."""
    folder = asked("classification", form)
    found = pushed(folder)
    assert found["created"] and found["private"] is False
    assert {file["name"]: file["change"] for file in found["files"]} == dict.fromkeys(own(folder), "new")
    assert there(hub).keys() == own(folder) | {".gitattributes"}
    at = f"me/small@{found['commit']}"
    text = ["the film was great", "dull"]
    assert capcli.pipeline("me/small", threads=1)(text) == capcli.pipeline(folder, threads=1)(text)
    tokens = capcli.load_tokenizer(at)("the film", return_tensors="pt")
    for name in ("me/small", at):
        assert capcli.load(name, threads=1)(**tokens)["logits"].equal(
            capcli.load(folder, threads=1)(**tokens)["logits"]
        )
    blocks = re.findall(r"^```python\n(.*?)^```", there(hub)["README.md"].decode(), re.MULTILINE | re.DOTALL)
    assert blocks and all('"me/small"' in block for block in blocks)
    there_too = environment(HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN, HF_HOME=str(tmp_path / "home"))
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks).replace(', runtime="auto"', "")],  # which compiles for a minute
        env=there_too | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= len(blocks)


def test_a_pushed_run_goes_wherever_a_model_may_be_named(
    hub: hub_server.Hub, tiny: Tiny, pruned: Path, tmp_path: Path
) -> None:
    """eval, baseline, probe, predict, export and the teacher of a run; the data of its task do not come with it."""
    commit = pushed(pruned)["commit"]
    at, fast = f"me/small@{commit}", ("-q", "--threads", "1")
    texts = tmp_path / "texts.txt"
    texts.write_text("a good film\n")
    data = ("--data", tiny.data)
    probing = ("--tasks", "text-classification", "--max-length", "32", "--seeds", "1")
    for arguments in (
        ("eval", at, *data, "--baseline", "me/small", *fast),
        ("eval", str(pruned), "--baseline", at, *fast),
        ("probe", at, *probing, *data, "--baseline", "me/small", *fast),
        ("predict", at, str(texts), *fast),
        ("export", at, "--to", "dense", "-o", str(tmp_path / "dense"), *fast),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 0, done.stderr
    tiny.prune(tmp_path / "again", teacher=at)
    assert json.loads((tmp_path / "again" / "report.json").read_text())["teacher"]["source"] == at
    lost = invoke("eval", at, *fast)
    assert lost.exit_code == 2
    assert (
        "error: the data of this model's run, …/words, did not come with it\nhint: give them with --data" in lost.stderr
    )


def test_a_revision_that_is_in_the_cache_needs_no_hub(
    hub: hub_server.Hub, asked: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    for form in ("", "onnx"):
        repo = f"me/cached{form}"
        pushed(asked("classification", form), repo=repo)
        before = capcli.pipeline(repo, threads=1)("good")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert capcli.pipeline(repo, threads=1)("good") == before
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_command_asks_once_what_a_name_means(hub: hub_server.Hub, pruned: Path, tiny: Tiny) -> None:
    pushed(pruned)
    before = len(hub.asked)
    capcli.evaluate(model="me/small", data=tiny.data, threads=1)
    assert sum(line.startswith("GET /api/models/") for line in hub.asked[before:]) == 1


# What is sent --------------------------------------------------------------------------------------------------------


def test_nothing_of_this_machine_is_sent(hub: hub_server.Hub, pruned: Path, tiny: Tiny) -> None:
    """Neither in a run nor in an export of one; the record is about the files as they were sent."""
    pushed(pruned)
    files = there(hub)
    for name, content in files.items():
        assert str(tiny.root).encode() not in content, name
        assert b"../" not in content, name
    assert json.loads(files["cap_config.json"])["source"]["data"] == "…/words"
    facts = json.loads(files["report.json"])["files"]
    for name, about in facts.items():
        assert about["bytes"] == len(files[name])
    assert (
        facts["cap_config.json"]["sha256"] != json.loads((pruned / "report.json").read_text())["files"][name]["sha256"]
    )


def test_the_card_is_read_by_the_hub(hub: hub_server.Hub, pruned: Path) -> None:
    pushed(pruned)
    card = ModelCard(there(hub)["README.md"].decode())
    report = json.loads((pruned / "report.json").read_text())
    assert card.data.library_name == "capcli"
    assert card.data.pipeline_tag == "text-classification"
    results = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert results == report["metrics"]["pruned"]
    assert {one.dataset_split for one in card.data.eval_results} == {"validation"}
    assert card.data.metrics == list(results)


def test_a_dry_run_sends_nothing(hub: hub_server.Hub, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pushed(pruned, "--dry-run", "--private")
    assert found["commit"] is None and found["private"] and found["dry_run"]
    assert {file["change"] for file in found["files"]} == {"new"}
    assert [line for line in hub.asked if not line.startswith("GET")] == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = pushed(pruned, "--dry-run")
    assert found["notes"] == ["what the files would change is not known: offline mode is on, and a push needs the hub"]
    assert {file["name"] for file in found["files"]} == own(pruned)


def test_the_next_push_is_one_commit_of_what_changed(hub: hub_server.Hub, pruned: Path, tmp_path: Path) -> None:
    """Files of others stay; what is there already is not sent again."""
    here = copied(pruned, tmp_path / "run")
    first = pushed(here)
    (hub.repos["models", "me/small"].revisions["main"] / "notes.txt").write_text("mine\n")
    (here / "README.md").write_text((here / "README.md").read_text() + "\nA line more.\n")
    second = pushed(here, "--message", "A better card")
    assert [commit["files"] for commit in hub.commits][1:] == [["README.md"]]
    assert hub.commits[1]["summary"] == "A better card" and hub.commits[1]["parentCommit"] == first["commit"]
    assert second["others"] == ["notes.txt"] and there(hub)["notes.txt"] == b"mine\n"
    assert there(hub)["README.md"].endswith(b"A line more.\n")
    third = pushed(here)
    assert len(hub.commits) == 2
    assert third["notes"] == ["all files are there already: nothing was sent"]
    assert third["commit"] == second["commit"]


def test_a_private_repository(hub: hub_server.Hub, pruned: Path) -> None:
    assert pushed(pruned, "--private")["private"]
    assert hub.repos["models", "me/small"].private
    assert pushed(pruned)["private"]  # it stays so
    pushed(pruned, repo="us/open")
    said = pushed(pruned, "--private", repo="us/open", code=2)
    assert "error: us/open is there already, and public" in said


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.txt", "train.csv", "checkpoint/state.safetensors", "extra", ".env"])
def test_what_capcli_did_not_write_is_named(hub: hub_server.Hub, pruned: Path, tmp_path: Path, name: str) -> None:
    here = copied(pruned, tmp_path / "run")
    (here / name).parent.mkdir(exist_ok=True)
    if name == "extra":
        (here / name).mkdir()
    else:
        (here / name).write_text("x")
    assert f"contains what capcli did not write: {name.partition('/')[0]}\n" in pushed(here, code=2)
    assert not hub.repos and not hub.asked


def test_links_are_not_followed(hub: hub_server.Hub, pruned: Path, tmp_path: Path) -> None:
    here = copied(pruned, tmp_path / "run")
    real = tmp_path / "tokenizer.json"
    (here / "tokenizer.json").rename(real)
    (here / "tokenizer.json").symlink_to(real)
    (here / "report.html").unlink()
    (here / "report.html").symlink_to(real)
    said = pushed(here, code=2)
    assert "contains links, which are not followed: report.html, tokenizer.json" in said
    assert not hub.repos


def test_work_that_was_kept_stays_here(hub: hub_server.Hub, tiny: Tiny, tmp_path: Path) -> None:
    """Checkpoints, banks and the teacher of --keep-work are not sent; nor is anything of a run that is not finished."""
    tiny.prune(tmp_path / "run", keep_work=True)
    assert (tmp_path / "run" / "work").is_dir()
    assert not any(file["name"].startswith("work") for file in pushed(tmp_path / "run")["files"])
    (tmp_path / "run" / "report.json").unlink()
    assert "is an unfinished run" in pushed(tmp_path / "run", code=2)


def test_a_file_that_was_changed_is_not_sent(hub: hub_server.Hub, pruned: Path, tmp_path: Path) -> None:
    here = copied(pruned, tmp_path / "run")
    (here / "tokenizer.json").write_text((here / "tokenizer.json").read_text().replace("good", "evil"))
    assert "tokenizer.json is not as it was written: report.json has another sha256" in pushed(here, code=2)
    (here / "tokenizer.json").unlink()
    assert "is incomplete, without tokenizer.json" in pushed(here, code=2)


SECRETS = {
    "a token of the hub": TOKEN,
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "an API key": "sk-proj-abcdefghijklmnop0123",
    "a password in an address": "https://me:hunter2hunter2@example.org/data.csv",
    "a key or password": 'api_key = "0123456789abcdef0123"',
}


@pytest.mark.parametrize("what", SECRETS)
@pytest.mark.parametrize("name", ["README.md", "report.json"])
def test_a_secret_is_named_by_its_line_and_not_shown(
    hub: hub_server.Hub, pruned: Path, tmp_path: Path, what: str, name: str
) -> None:
    here = copied(pruned, tmp_path / "run")
    secret = SECRETS[what]
    if name == "README.md":
        line = 3
        lines = (here / name).read_text().splitlines()
        (here / name).write_text("\n".join([*lines[:2], f"# {secret}", *lines[2:]]))
    else:
        report = json.loads((here / name).read_text()) | {"model": secret}
        (here / name).write_text(json.dumps(report))
        line = 4
    said = pushed(here, code=2)
    assert f"{name}, line {line}, contains what looks like {what}, which is not shown here" in said
    assert secret not in said and "hunter2" not in said
    assert not hub.repos


def test_another_model_in_the_repository_would_be_mixed_up(hub: hub_server.Hub, asked: Made) -> None:
    pushed(asked("classification"))
    said = pushed(asked("classification", "dense"), code=2)
    assert "me/small contains files of another model, which would be read with this one: cap_config.json" in said
    assert "hint: push to another name, or delete them there first" in said
    assert len(hub.commits) == 1


@pytest.mark.parametrize(
    ("repo", "part"),
    [
        ("small", "'small' has no owner\nhint: give it as OWNER/NAME: me/small"),
        ("me/a--b", "'me/a--b' is not a name on the hub"),
        ("me/small@v1", "is not a name on the hub"),
        ("them/small", "them is neither you nor an organisation of yours: this token belongs to me, us"),
    ],
)
def test_names_that_cannot_be(hub: hub_server.Hub, pruned: Path, repo: str, part: str) -> None:
    assert part in pushed(pruned, repo=repo, code=2)
    assert not hub.repos


def test_what_the_hub_refuses(hub: hub_server.Hub, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with what to do; nothing is half-written."""
    hub.account["role"] = "read"
    assert "error: this token for the hub may only read\nhint: set HF_TOKEN" in pushed(pruned, code=2)
    hub.account["role"] = "write"
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    assert "error: the hub does not accept this token (401)" in pushed(pruned, code=2)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    assert "error: there is no token for the hub\nhint: set HF_TOKEN" in pushed(pruned, code=2)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pushed(pruned, repo="me/closed")
    hub.repos["models", "me/closed"].closed = True
    (hub.repos["models", "me/closed"].revisions["main"] / "README.md").write_text("old")
    said = pushed(pruned, repo="me/closed", code=2)
    assert "this token may not write to me/closed (403: You have no write access); nothing was committed" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "error: offline mode is on, and a push needs the hub\nhint: unset HF_HUB_OFFLINE" in pushed(pruned, code=2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub_server.unused_address())
    assert "cannot be reached\nhint: check the network" in pushed(pruned, code=2)


def test_a_push_that_breaks_off(hub: hub_server.Hub, pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository is as it was, the code is that of a failed run, and the same command finishes it."""
    first = pushed(pruned)["commit"]
    repo = hub.repos["models", "me/small"]
    for name in ("README.md", "report.json"):
        (repo.revisions["main"] / name).write_text("old")
    repo.broken = "/commit/"
    said = pushed(pruned, code=3)
    assert "answered 500; nothing was committed" in said
    assert len(hub.commits) == 1 and repo.commit("main") == first
    repo.broken = ""
    pushed(pruned)
    assert sorted(hub.commits[1]["files"]) == ["README.md", "report.json"]


def test_what_is_no_folder_of_capcli(hub: hub_server.Hub, tiny: Tiny, tmp_path: Path) -> None:
    for folder, part in (
        (tmp_path / "none", "is not a folder"),
        (Path(tiny.model), "is neither a run nor an export of capcli"),
    ):
        assert part in pushed(folder, code=2)


def test_from_python(hub: hub_server.Hub, pruned: Path) -> None:
    found = capcli.push(folder=pruned, repo="me/small")
    assert found.url == f"{hub.address}/me/small"
    assert "cap eval me/small@" in found.table()
    assert digest(pruned / "model.cap.safetensors") in hub.large
    with pytest.raises(CapError, match="no repository given"):
        capcli.push(folder=pruned)
