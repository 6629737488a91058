"""S8: what the environment or an address keeps secret is in no output: streams, reports, checkpoints, trackers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny import Tiny, invoke

from capcli.reporting.text import discreet, plain

PASSWORD = "hunter2hunter2"
SECRETS = {
    "HF_TOKEN": "hf_" + "aB3dE6gH9j" * 4,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "Zy8Xw7Vu6T" * 4,
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MLFLOW_TRACKING_PASSWORD": "correct-horse-battery",
    "MLFLOW_TRACKING_URI": f"https://me:{PASSWORD}@tracking.example.org",
    "TRACKIO_SERVER_URL": "https://example.org/?write_token=abcdefabcdef0123",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
}
HIDDEN = [PASSWORD, "abcdefabcdef0123", *(value for name, value in SECRETS.items() if "UR" not in name)]
TRACKER = """
import json, os
class Run:
    def log(self, numbers, step=None):
        with open(os.environ["TOLD"], "a") as file: file.write(json.dumps([numbers, step]) + "\\n")
        if os.environ.get("FAILING"):
            raise OSError("cannot log in: " + " ".join(os.environ[name] for name in os.environ["FAILING"].split()))
    def finish(self): pass
def init(**given):
    with open(os.environ["TOLD"], "a") as file: file.write(json.dumps(given) + "\\n")
    return Run()
"""


@pytest.fixture
def here(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, in an environment with secrets and a tracker that writes down what it is told."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "trackio.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'packages'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TOLD", str(tmp_path / "here" / "told"))
    monkeypatch.setenv("CAP_CACHE", str(tmp_path / "here" / "cache"))
    return tmp_path / "here"


def found_in(here: Path, shown: dict[str, str]) -> list[str]:
    """Where a secret is: outputs by the command, files by their path."""
    texts = {name: text.encode() for name, text in shown.items()}
    texts |= {str(path): path.read_bytes() for path in here.rglob("*") if path.is_file()}
    assert len(texts) > len(shown)
    return [name for name, text in texts.items() if any(secret.encode() in text for secret in HIDDEN)]


def test_no_command_writes_a_secret(tiny: Tiny, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(here / "summary.md"))
    small = {"epochs": 1, "teacher_epochs": 1, "max_train_samples": 32, "checkpoint_seconds": 0, "keep_work": True}
    prune = tiny.arguments(Path("out"), **small, track="trackio")
    (here / "texts.txt").write_text("a good film\n")
    commands = {
        "stopped": [*prune, "--max-time", "0.0001"],
        "prune": prune,
        "finished": [*prune, "--json"],
        "eval": ["eval", "out", "--max-bytes", "1", "--junit", "r.xml", "--json", "--latency-length", "8"],
        "export": ["export", "out", "--to", "dense", "-o", "dense"],
        "predict": ["predict", "out", "texts.txt", "-o", "answers.jsonl"],
        "doctor": ["doctor"],
        "nothing": ["eval", f"https://me:{PASSWORD}@example.org/model", "--task", "mr", "--junit", "n.xml"],
        "no data": ["eval", "out", "--data", f"https://me:{PASSWORD}@example.org/d.csv", "--debug", "--junit", "d.xml"],
        "no texts": ["eval", "out", "--text", f"https://me:{PASSWORD}@example.org/t.txt", "--debug"],
    }
    said = {name: invoke(*arguments) for name, arguments in commands.items()}
    codes = {name: one.exit_code for name, one in said.items()}
    refused = dict.fromkeys(("nothing", "no data", "no texts"), 2)
    assert codes == {**dict.fromkeys(commands, 0), "stopped": 75, "eval": 1, **refused}, said
    assert {"told", "summary.md", "r.xml", "n.xml"} <= {path.name for path in here.iterdir()}
    assert (here / "out" / "work" / "config.json").is_file()
    assert found_in(here, {name: one.stdout + one.stderr for name, one in said.items()}) == []


@pytest.mark.parametrize("names", [" ".join(SECRETS)], ids=["all"])
def test_what_a_tracker_says_when_it_fails(tiny: Tiny, here: Path, monkeypatch: pytest.MonkeyPatch, names: str) -> None:
    """Its own words, without the secrets in them."""
    monkeypatch.setenv("FAILING", names)
    small = {"epochs": 1, "teacher_epochs": 1, "max_train_samples": 32}
    said = invoke(*tiny.arguments(Path("out"), **small, track="trackio"))
    assert said.exit_code == 0, said.stderr
    assert "trackio failed, so the run is not tracked any more: OSError: cannot log in: " in said.stderr
    shutil.rmtree(here / "cache", ignore_errors=True)
    assert found_in(here, {"prune": said.stdout + said.stderr}) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass word@a.org/x", "https://me:pass word@a.org/x"),
        ("at https://me:pa55@a.org/x, or", "at https://…@a.org/x, or"),
        ("redis://:pa55@a.org", "redis://…@a.org"),
        ("https://token@a.org", "https://…@a.org"),
        ("no data at https:/me:pa55@a.org", "no data at https:/…@a.org"),
        ("https://a.org/@me", "https://a.org/@me"),
        ("C:/x@y", "C:/x@y"),
        ("me@a.org", "me@a.org"),
        ("https://a.org/x?a=1&write_token=pa55&b=2", "https://a.org/x?a=1&write_token=…&b=2"),
        ("https://a.org/x?api_key=pa55", "https://a.org/x?api_key=…"),
        ("a//b:c@d", "a//b:c@d"),
    ],
)
def test_addresses_are_shown_without_what_opens_them(text: str, shown: str) -> None:
    assert plain(text) == shown


@pytest.mark.parametrize("word", ["x", "?key", "a://", "?", "@"])
def test_a_long_text_takes_no_longer_than_its_length(word: str) -> None:
    """Of a million characters; with its square it would be hours."""
    long = word * (1_000_000 // len(word))
    assert discreet(f"{long} https://me:pass@host/a").endswith(" https://…@host/a")
