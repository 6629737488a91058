"""Models and data sets by hub name, from a little hub on the loopback: found, refused, broken, cached. No network.

Many commands run in one process, because each process takes seconds to load torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_server
import pytest
from tiny import FILLERS, PRUNABLE, ROOT, WORDS, Tiny, cap, environment, invoke, write_model

from capcli.config.layers import prune_config
from capcli.errors import CapError, ModelError
from capcli.pruning import topk
from capcli.sources import hub, requests

MEND = ["mend"]
TOKEN = "hf_0123456789abcdefSECRET"
# The waits between the attempts of the hub's client are cut short; what is attempted is not.
DRIVER = """
import json, os, sys, time, urllib.request
from tiny import invoke
sleep, rows = time.sleep, []
time.sleep = lambda seconds: sleep(min(seconds, 0.02))
for arguments in json.loads(sys.argv[1]):
    if arguments == ["mend"]:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mend").close()
        continue
    began = time.monotonic()
    done = invoke(*arguments)
    rows.append([done.exit_code, done.stdout, done.stderr, time.monotonic() - began])
print(json.dumps(rows))
"""


@dataclass(frozen=True)
class Said:
    """What one command printed."""

    code: int
    out: str
    errors: str
    seconds: float

    @property
    def refusal(self) -> str:
        """The error line and the hint of a refused command: one line each, and no traceback."""
        assert self.code == 2, self.errors
        assert self.out == ""
        assert "Traceback" not in self.errors
        lines = [line for line in self.errors.splitlines() if line]
        start = next(i for i, line in enumerate(lines) if line.startswith("error: "))
        assert len(lines) - start == 2, lines
        assert lines[start + 1].startswith("hint: ")
        assert start <= 2, lines
        return "\n".join(lines[start:])


@dataclass(frozen=True)
class World:
    """A hub, a cache of its own, and the command that uses both."""

    tiny: Tiny
    server: hub_server.Hub
    home: Path

    def run(self, commands: list[list[str]], **changes: str) -> list[Said]:
        """Run `cap` with each list of arguments, in one process; `MEND` makes the hub send whole files from then on."""
        env = environment(
            **{
                "HF_ENDPOINT": self.server.address,
                "HF_HOME": str(self.home),
                "HF_HUB_ETAG_TIMEOUT": "1",
                "HF_HUB_DOWNLOAD_TIMEOUT": "1",
                "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}",
                **changes,
            }
        )
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(commands)], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", f"the client of the hub writes past cap: {done.stderr[-2000:]}"
        return [Said(*row) for row in json.loads(done.stdout)]

    def plan(self, model: str) -> list[str]:
        """The arguments of a command that loads a model and local data, and writes nothing."""
        found = self.tiny.arguments(self.home / "out", model=model, max_train_samples=32)
        return [*found, "--plan", "--json"]


def edit(folder: Path, name: str = "config.json", **values: Any) -> None:
    """Change values of a JSON file."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shards(folder: Path) -> None:
    """The weights in several files with an index, as transformers writes large models."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    table = {}
    for i, name in enumerate(sorted(tensors)):
        table[name] = f"model-0000{i % 3 + 1}-of-00003.safetensors"
    for file in set(table.values()):
        save_file({name: tensors[name] for name in tensors if table[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def spoil(name: str, folder: Path) -> None:
    """Make of a whole model the one that `REFUSED` calls `name`."""
    weights, tokenizer = folder / "model.safetensors", folder / "tokenizer.json"
    match name:
        case "no-config":
            (folder / "config.json").unlink()
        case "no-tokenizer":
            tokenizer.unlink()
        case "no-weights":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:5000])
        case "pickled":
            weights.rename(folder / "pytorch_model.bin")
        case "pickled-words":
            tokenizer.rename(folder / "tokenizer.pkl")
        case "remote":
            edit(folder, auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
        case "remote-type":
            edit(folder, auto_map={"AutoConfig": "evil.Config"}, model_type="evil")
        case "remote-words":
            edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Words", None]})
        case "gguf":
            weights.rename(folder / "model.Q4.gguf")
        case "onnx":
            weights.rename(folder / "model.onnx")
        case "adapter":
            (folder / "adapter_config.json").write_text("{}")
        case "gptq":
            edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
        case "compressed":
            edit(folder, compression_config={"quant_method": "compressed-tensors", "format": "sparse-bitmask"})
        case "pointer":
            weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
        case "escape":
            weights.unlink()
            table = {"weight_map": {"a": "../tiny/model.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(table))
        case "lost-shard":
            shards(folder)
            (folder / "model-00002-of-00003.safetensors").unlink()
        case "bad-json":
            (folder / "config.json").write_text("{")
        case "list-json":
            (folder / "config.json").write_text("[]")
        case "lost-settings":
            weights.rename(folder / "model.cap.safetensors")
        case "pruned":
            (folder / "cap_config.json").write_text("{}")
        case _:
            raise AssertionError(name)
    (folder / "evil.py").write_text("import pathlib\npathlib.Path(__file__ + '.ran').touch()\n")


# By kind of model: what the error line and the hint say. NAME is what the user calls the model.
REFUSED = {
    "no-config": ["NAME has no config.json", "Hugging Face layout"],
    "no-tokenizer": ["NAME has no tokenizer", "tokenizer.json", "save_pretrained"],
    "no-weights": ["NAME has no model.safetensors", "save_pretrained"],
    "truncated": ["the weights of NAME are corrupt", "again"],
    "pickled": ["NAME has no model.safetensors, only pickled weights (pytorch_model.bin)", "save_pretrained"],
    "pickled-words": ["the tokenizer of NAME is a pickle (tokenizer.pkl)", "never read"],
    "remote": ["NAME needs its own code (auto_map in config.json)", "part of transformers"],
    "remote-type": ["NAME needs its own code (auto_map in config.json)", "part of transformers"],
    "remote-words": ["NAME needs its own code (auto_map in tokenizer_config.json)", "part of transformers"],
    "gguf": ["NAME has GGUF weights only (model.Q4.gguf)", "converted from"],
    "onnx": ["NAME has ONNX weights only (model.onnx)", "converted from"],
    "adapter": ["NAME is an adapter", "merge_and_unload"],
    "gptq": ["the weights of NAME are quantised (gptq)", "full precision"],
    "compressed": ["the weights of NAME are quantised (compressed-tensors)", "full precision"],
    "pointer": ["is a pointer of git-lfs, not the weights of NAME", "git lfs pull"],
    "escape": ["names no safetensors files of its folder: ../tiny/model.safetensors", "again"],
    "lost-shard": ["the weights of NAME are incomplete: 1 of", "model-00002-of-00003", "whole folder"],
    "bad-json": ["cannot read", "config.json", "again"],
    "list-json": ["config.json is not a JSON object", "again"],
    "lost-settings": ["NAME is a pruned model without its cap_config.json", "copy the whole folder"],
    "pruned": ["NAME is a pruned model, but a dense one is needed", "--to dense"],
}
# The same for what the hub does not give.
FAULTS: dict[str, dict[str, Any]] = {
    "private": {"token": TOKEN},
    "gated": {"gated": True},
    "broken": {"always": 500},
    "busy": {"always": 429},
    "page": {"page": True},
    "silent": {"silent": True},
    "stuck": {"silent_files": True},
    "cut": {"cut": "model.safetensors"},
    "cut-words": {"cut": "tokenizer.json"},
    "flip": {"flip": "model.safetensors"},
}
NOT_GIVEN = {
    "bert-bsae": ["there is no model 'NAME' on the hub", "did you mean bert-base?"],
    "missing": ["there is no model 'NAME' on the hub", "local folder"],
    "tagged@v9": ["there is no revision 'v9' of owner/tagged", "a tag, a commit, or refs/pr/N"],
    "private": ["the hub refuses the model 'NAME' (401)", "set HF_TOKEN", "hf auth login"],
    "gated": ["the hub refuses the model 'NAME': it is private or gated", "HF_TOKEN", "ask for access"],
    "broken": ["the hub answered 500 for the model 'NAME'", "try again later"],
    "busy": ["the hub answered 429, too many requests, for the model 'NAME'", "wait a few minutes"],
    "page": ["the server at 127.0.0.1:", "is not a model hub", "HF_ENDPOINT"],
    "silent": ["cannot reach the hub at 127.0.0.1:", "'NAME'", "check the network"],
    "stuck": ["cannot reach the hub at 127.0.0.1:", "'NAME'", "check the network"],
    "cut": ["the download of the model 'NAME' broke off or was damaged", "run the same command again"],
    "cut-words": ["the download of the model 'NAME' broke off or was damaged", "run the same command again"],
    "flip": ["the download of the model 'NAME' broke off or was damaged", "run the same command again"],
}
WHOLE = ["tiny", "tagged", "tagged@v1.0", "tagged@refs/pr/3", "once", "slow", "sharded"]


@pytest.fixture(scope="module")
def folders(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind of refused model."""
    root = tmp_path_factory.mktemp("refused")
    for name in REFUSED:
        shutil.copytree(tiny.model, root / name)
        spoil(name, root / name)
    return {name: root / name for name in REFUSED}


@pytest.fixture(scope="module")
def world(tiny: Tiny, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A hub that serves whole, damaged and refused models."""
    root = tmp_path_factory.mktemp("hub")
    deeper, sharded = root / "deeper", root / "sharded"
    write_model(deeper, num_hidden_layers=3)
    shutil.copytree(tiny.model, sharded)
    shards(sharded)
    with hub_server.serving() as server:
        server.add("owner/tiny", Path(tiny.model))
        server.add("owner/tagged", Path(tiny.model), revisions={"v1.0": deeper, "refs/pr/3": deeper})
        server.add("owner/once", Path(tiny.model), answers=[500, 502])
        server.add("owner/slow", Path(tiny.model), slow="tokenizer.json")  # more is asked for after it
        server.add("owner/sharded", sharded)
        for name, options in FAULTS.items():
            server.add(f"owner/{name}", Path(tiny.model), **options)
        for name, folder in folders.items():
            server.add(f"owner/{name}", folder)
        yield World(tiny, server, tmp_path_factory.mktemp("hf-home"))


@pytest.fixture(scope="module")
def rows(world: World) -> dict[str, Said]:
    """What `cap` said about each model of the hub; afterwards those that are whole lie in the cache."""
    names, again = [*WHOLE, *REFUSED, *NOT_GIVEN], ["cut", "flip"]
    commands = [world.plan(full_name(name)) for name in names]
    said = world.run([*commands, MEND, *(world.plan(full_name(name)) for name in again)])
    return dict(zip([*names, *(f"{name} again" for name in again)], said, strict=True))


def full_name(name: str) -> str:
    """What the user writes."""
    return name if name.startswith("bert") else f"owner/{name}"


def check(said: str, name: str, parts: list[str]) -> None:
    for part in parts:
        assert part.replace("NAME", name) in said, said


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "no/such/folder",
        "../x",
        "a b",
        ".hidden",
        "-x",
        "a..b/c",
        "a--b",
        "x" * 97,
        "x.git",
        "ü/x",
        "x\n",
        "x\0",
        "a/../b",
    ],
)
def test_what_is_neither_folder_nor_hub_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # beside which there is no x
    with pytest.raises(ModelError, match="not a hub name either"):
        hub.resolve(name)


@pytest.mark.parametrize("revision", ["", "/x", "x/", "../x", "a//b", "a b", "x\n", "a@b", "x" * 300 + "/.."])
def test_what_is_no_revision(revision: str) -> None:
    with pytest.raises(ModelError, match="is not a revision"):
        hub.resolve(f"owner/model@{revision}")


def test_names_resolve_to_folders_hub_ids_and_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve("bert-base") == ("google-bert/bert-base-uncased", None)
    assert hub.resolve("bert-base@v1.0") == ("google-bert/bert-base-uncased", "v1.0")
    assert hub.resolve("someone/model@refs/pr/3") == ("someone/model", "refs/pr/3")
    assert hub.resolve(str(tmp_path)) == (str(tmp_path), None)
    with pytest.raises(ModelError, match="has no revisions"):
        hub.resolve("mini@main")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert-base@v1.0").mkdir()
    assert hub.resolve("bert-base@v1.0") == ("bert-base@v1.0", None)  # a folder goes first


def test_the_output_folder_names_the_revision() -> None:
    def out(model: str) -> str:
        return str(prune_config({"model": model, "task": "sst2"}).out_folder)

    assert out("bert-base") == "runs/bert-base-sst2-fisher-0.9"
    assert out("someone/model@refs/pr/3") == "runs/model-refs-pr-3-sst2-fisher-0.9"
    assert out("models/x/") == "runs/x-sst2-fisher-0.9"


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_on_the_hub_loads(rows: dict[str, Said], name: str) -> None:
    """Also at a revision, in several weight files, slowly, and after a hub that fails once or twice."""
    assert rows[name].code == 0, rows[name]
    layers = 3 if "@" in name else 2
    assert json.loads(rows[name].out)["prunable_weights"] == PRUNABLE // 2 * layers


@pytest.mark.parametrize("name", NOT_GIVEN)
def test_what_the_hub_does_not_give_is_one_line_and_a_hint(rows: dict[str, Said], name: str) -> None:
    """R12. A silent hub ends in an error after three times the client's own limit, here one second each."""
    check(rows[name].refusal, full_name(name), NOT_GIVEN[name])
    assert ("did you mean" in rows[name].refusal) == (name == "bert-bsae")
    assert rows[name].seconds < 15


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why_and_the_way_out(rows: dict[str, Said], world: World, name: str) -> None:
    """S5: and no file but data ever comes from the hub."""
    check(rows[name].refusal, f"owner/{name}", REFUSED[name])
    fetched = {path.name for path in (world.home / "hub").rglob("*") if path.is_file()}
    assert not {fetch for fetch in fetched if fetch.endswith((".py", ".bin", ".pkl", ".gguf", ".onnx"))}
    assert not (world.home / "out").exists()


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "truncated"])  # seen when it is read
def test_a_local_folder_is_refused_for_the_same_reasons(folders: dict[str, Path], name: str) -> None:
    source = str(folders[name])
    with pytest.raises(ModelError) as caught:
        hub.weights(hub.folder(source), source)
    check(f"{caught.value.message}\n{caught.value.hint}", source, REFUSED[name])
    assert not (folders[name] / "evil.py.ran").exists()


def test_no_file_of_a_model_runs_code(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    """S5: classes that a model names are neither imported nor looked for in its folder, in an artefact neither."""
    from capcli.models import loading

    ran = tmp_path / "ran"
    for source, file in ((Path(tiny.model), "tokenizer_config.json"), (pruned, "tokenizer_config.json")):
        for key, value in (("tokenizer_class", "Evil"), ("tokenizer_class", "evil.Evil"), ("auto_map", "evil.Evil")):
            folder = tmp_path / f"{source.name}-{key}-{value}"
            shutil.copytree(source, folder)
            (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
            (folder / "tokenization_evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
            edit(folder, file, **{key: {"AutoTokenizer": [value, value]} if key == "auto_map" else value})
            with contextlib.suppress(ModelError):
                loading.load_model(str(folder), None, "classification", 1)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/cache/x"), 3, "no space in the cache"),
        (OSError(errno.EACCES, "Permission denied", "/cache/x"), 2, "cannot use the cache"),
        (OSError(errno.ENOTDIR, "Not a directory", "/cache/x"), 2, "cannot use the cache"),
    ],
)
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, error: OSError, code: int, part: str) -> None:
    def full(repo: Any, name: str, revision: str) -> None:
        raise error

    listing = SimpleNamespace(
        sha="0" * 40, siblings=[SimpleNamespace(rfilename=n) for n in ("config.json", "vocab.txt")]
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(requests, "_ask", lambda repo: listing)
    monkeypatch.setattr(requests, "_download", full)
    with pytest.raises(CapError) as caught:
        hub.folder("owner/never-cached")
    assert caught.value.exit_code == code
    assert part in caught.value.message
    assert "/cache/x" in caught.value.message
    assert "HF_HOME" in caught.value.hint


# Tokens, cache, offline ----------------------------------------------------------------------------------------------


def test_a_private_model_loads_with_a_token_that_is_seen_nowhere(world: World, rows: dict[str, Said]) -> None:
    """The token from the environment; --debug and the log of the hub's client do not show it."""
    out = world.home / "private"
    settings = {"epochs": 1, "teacher_epochs": 1, "extra_examples": 0, "max_train_samples": 32}
    world.server.add("owner/foreign", Path(world.tiny.model), token="another")
    commands = [world.tiny.arguments(out, model="owner/private", **settings)]
    commands += [world.tiny.arguments(world.home / name, model=f"owner/{name}") for name in ("gated", "foreign")]
    done, *refused = world.run([[*row, "--debug"] for row in commands], HF_TOKEN=TOKEN, HF_DEBUG="1")
    assert done.code == 0, done.errors
    assert json.loads((out / "report.json").read_text())["model"] == "owner/private"
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert TOKEN.encode() not in written
    assert TOKEN not in done.out + done.errors
    for said in refused:
        assert said.code == 2
        assert "Traceback" in said.errors
        assert "error: the hub refuses the model" in said.errors
        assert TOKEN not in said.out + said.errors


@pytest.mark.parametrize("name", ["cut", "flip"])
def test_nothing_broken_stays_in_the_cache(rows: dict[str, Said], world: World, name: str) -> None:
    """What broke off or was damaged is not used later: the same command works once the hub is well."""
    assert rows[f"{name} again"].code == 0, rows[f"{name} again"]
    assert not list((world.home / "hub").rglob("*.incomplete"))


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("changes", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["unreachable", "offline"])
def test_without_a_hub_the_cache_serves(world: World, changes: dict[str, str]) -> None:
    """Cached models and revisions load; any other is refused at once, with a way out."""
    names = ["owner/tiny", "owner/tagged@v1.0", "owner/tagged@refs/pr/3", "owner/sharded"]
    other = ["owner/other", "owner/tagged@v9", "bert-base"]
    address = f"http://user:{TOKEN}@{hub_server.unused_address().removeprefix('http://')}"
    rows = world.run([world.plan(name) for name in (*names, *other)], HF_ENDPOINT=address, **changes)
    said = dict(zip([*names, *other], rows, strict=True))
    assert [said[name].code for name in names] == [0] * 4
    for name in other:
        assert f"the model {name!r}" in said[name].refusal
        assert "not in the local cache" in said[name].refusal
        assert "'mini'" in said[name].refusal
        assert ("HF_HUB_OFFLINE" if changes else "cannot reach the hub at 127.0.0.1:") in said[name].refusal
        assert TOKEN not in said[name].errors  # a mirror's address may hold a password
        assert said[name].seconds < 5


# Data sets -----------------------------------------------------------------------------------------------------------

MNLI = {"train": 96, "validation_matched": 24, "validation_mismatched": 30, "test_matched": 6, "test_mismatched": 6}
LITERAL = "prune bert-base --task mnli --sparsity 0.97"


def write_glue(folder: Path) -> None:
    """A little nyu-mll/glue: its card, mnli as it is laid out there, cola and a broken rte."""
    from datasets import ClassLabel, Dataset, Features, Value

    rng = random.Random(3)
    names = ["entailment", "neutral", "contradiction"]
    types = {"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=names)}
    for split, n in MNLI.items():
        labels = [-1 if split.startswith("test") else rng.randrange(3) for _ in range(n)]
        table = {"premise": [" ".join(rng.choices(FILLERS, k=4)) for _ in labels], "label": labels}
        table["hypothesis"] = [[*WORDS["positive"], "a"][label] for label in labels]
        write_parquet(Dataset.from_dict(table, Features(types)), folder / "mnli" / f"{split}-00000-of-00001.parquet")
    for split, n in (("train", 8), ("validation", 5)):
        texts = {"sentence": ["good", "bad"] * n, "label": [1, 0] * n}
        write_parquet(Dataset.from_dict(texts), folder / "cola" / f"{split}-00000-of-00001.parquet")
    shutil.copytree(folder / "cola", folder / "rte")
    (folder / "rte" / "train-00000-of-00001.parquet").write_text("no parquet")
    splits = {"ax": ("test",), "mnli": MNLI, "cola": ("train", "validation"), "rte": ("train", "validation")}
    card = [{"config_name": name, "data_files": [file(name, split) for split in splits[name]]} for name in splits]
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': card})}\n---\n# GLUE\n")
    (folder / "glue.py").write_text("raise SystemExit('code of a data set ran')\n")


def file(name: str, split: str) -> dict[str, str]:
    return {"split": split, "path": f"{name}/{split}-*"}


def write_parquet(table: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)


@pytest.fixture
def data_world(tiny: Tiny, tmp_path: Path) -> Iterator[World]:
    """A hub with the data set and google-bert/bert-base-uncased, which is the tiny model; an empty cache."""
    write_glue(tmp_path / "glue")
    with hub_server.serving() as server:
        server.add("google-bert/bert-base-uncased", Path(tiny.model))
        server.add("nyu-mll/glue", tmp_path / "glue", kind="datasets")
        yield World(tiny, server, tmp_path / "hf-home")


def test_the_literal_command(data_world: World, tmp_path: Path) -> None:
    """In an empty folder with an empty cache, by names only; then the same and `cap eval` from the cache, offline."""
    home, here = data_world.home, tmp_path / "here"
    here.mkdir()
    env = environment(HF_ENDPOINT=data_world.server.address, HF_HOME=str(home), PYTHONPATH=str(ROOT))
    done = cap(*LITERAL.split(), env=env, cwd=here)
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr
    assert "examples/s" not in done.stderr
    out = here / "runs" / "bert-base-mnli-fisher-0.97"
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "complete"
    assert (report["model"], report["task"], report["method"]) == ("bert-base", "mnli", "fisher")
    kept = report["sparsity"]["kept_weights"]
    assert report["sparsity"]["prunable_weights"] == PRUNABLE
    assert kept == topk.kept_count(0.97, PRUNABLE) == sum(row["kept"] for row in report["sparsity"]["per_matrix"])
    assert report["sparsity"]["achieved"] == pytest.approx(1 - kept / PRUNABLE, abs=1e-12)
    splits = report["metrics"]["splits"]
    assert {name: split["n_examples"] for name, split in splits.items()} == {n: MNLI[n] for n in MNLI if "valid" in n}
    assert [path.name for path in here.iterdir()] == ["runs"]
    assert not list(home.rglob("glue.py"))
    offline = {**env, "HF_ENDPOINT": hub_server.unused_address(), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    again = cap(*LITERAL.split(), env=offline, cwd=here)
    assert again.returncode == 0, again.stderr
    assert "already complete" in again.stderr
    measured = cap("eval", "runs/bert-base-mnli-fisher-0.97", "--json", env=offline, cwd=here)
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout)["metrics"]["accuracy"] == report["metrics"]["pruned"]["accuracy"]


# The hub's answers to the first requests for the data set, and what the command says.
DATA_ANSWERS: list[tuple[list[int], list[str]]] = [
    ([500, 500, 500], ["the hub answered 500 for the data set 'nyu-mll/glue (mnli)'", "try again later", "--data"]),
    ([401], ["the hub refuses the data set 'nyu-mll/glue (mnli)' (401)", "HF_TOKEN"]),
    ([403], ["the hub refuses the data set 'nyu-mll/glue (mnli)'", "HF_TOKEN"]),
    ([404], ["there is no data set 'nyu-mll/glue (mnli)' on the hub", "--data", "banking77"]),
    ([429], ["the hub answered 429, too many requests", "wait a few minutes"]),
]


def test_a_data_set_that_the_hub_does_not_give(data_world: World, tmp_path: Path) -> None:
    """The same lines as for models; what broke off leaves nothing, and the next command with a well hub works."""
    world, glue = data_world, data_world.server.repos["datasets", "nyu-mll/glue"]
    arguments = {"model": world.tiny.model, "data": "", "max_train_samples": 32}

    def plan(task: str) -> list[str]:
        return [*world.tiny.arguments(tmp_path / "out", task=task, **arguments), "--plan", "--json"]

    glue.answers = [status for answers, _ in DATA_ANSWERS for status in answers]
    glue.cut = "*/validation*"
    tasks = ["mnli"] * len(DATA_ANSWERS) + ["mnli", "wnli", "cola"]
    said = world.run([*map(plan, tasks), MEND, plan("rte"), plan("cola")])
    for row, (_, parts) in zip(said, DATA_ANSWERS, strict=False):
        check(row.refusal, "", parts)
    cut, none, also_cut, broken, well = said[len(DATA_ANSWERS) :]
    check(cut.refusal, "", ["the download of the data set 'nyu-mll/glue (mnli)' broke off", "same command again"])
    check(
        none.refusal,
        "",
        ["'nyu-mll/glue (wnli)' has no such configuration on the hub; it has ax, cola, mnli, rte", "--data"],
    )
    check(also_cut.refusal, "", ["the download of the data set 'nyu-mll/glue (cola)' broke off", "same command again"])
    assert broken.code == 2
    assert "/rte/train-00000-of-00001.parquet: " in broken.errors
    assert well.code == 0, well.errors
    assert not list(world.home.rglob("*.incomplete"))
    fetched = [line for line in world.server.asked if line.startswith("GET") and "/cola/train-" in line]
    assert len(fetched) == 1, "what is in the cache is not fetched again"
    cached, other = world.run([plan("cola"), plan("mnli")], HF_DATASETS_OFFLINE="1")
    assert cached.code == 0, cached.errors
    check(other.refusal, "", ["offline mode is on", "'nyu-mll/glue (mnli)' is not in the local cache", "--data"])


# Folders that are not there ------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_said_and_the_near_one_named(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(pruned)
    for command in (
        ("eval", "runs/frist"),
        ("export", "runs/frist", "--to", "dense"),
        ("eval", "runs/first", "--baseline", "runs/frist"),
    ):
        result = invoke(*command, "-q")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "error: there is no folder runs/frist; " in result.stderr
        assert "hint: did you mean runs/first?" in result.stderr
        assert "latency" not in result.stderr, "before anything is measured"
    assert "there are first" in invoke("eval", "runs/zzz").stderr
    file = invoke("eval", "runs/first/report.json").stderr
    assert "runs/first/report.json is not a folder" in file and "hint: MODEL is the folder: runs/first" in file
    monkeypatch.chdir(tmp_path / "runs")
    assert "did you mean first?" in invoke("eval", "frist").stderr
    assert "no folder" not in invoke("eval", "google-bert/bert-base-uncase", "--task", "mr").stderr


def test_what_transformers_only_logs_is_said(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.model, tmp_path / "m")
    edit(tmp_path / "m", intermediate_size=3, id2label={"0": "negative", "1": "positive"}, label2id=None)
    result = invoke("eval", str(tmp_path / "m"), "--task", "text-classification", "--data", tiny.data)
    assert result.exit_code == 2 and "report" not in result.stderr
    assert "instead of" in result.stderr


def test_scripts_find_the_built_in_model() -> None:
    from capcli.hub import BUILTIN_FOLDER

    assert (BUILTIN_FOLDER / "model.safetensors").is_file()
