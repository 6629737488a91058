"""Writes that follow nothing and leave nothing, reads that are bounded: staging names, links, FIFOs, small bombs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SETTINGS, Tiny, forked, invoke, wait, write_model

from capcli import files, stored
from capcli.cli import app
from capcli.config.hardware import Hardware
from capcli.config.layers import MAX_TOML_BYTES, prune_config, read_toml
from capcli.config.paths import command_line, portable
from capcli.errors import CapError, FileError, ModelError, RunFailed
from capcli.models import artifact, devices, loading, tokenizers
from capcli.sources.checkpoint import MAX_TOKENIZER_BYTES, check_sizes
from capcli.stored import MAX_JSON_BYTES, read_json

TOKEN = "hf_" + "aB3" * 12
SECRET = "do not touch"
WRITES: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda path: files.write_bytes(path, b"x"),
    "tensors": lambda path: files.write_tensors(path, {"a": torch.zeros(2)}),
    "folder": lambda path: publish(path),
    "pieces": lambda path: in_pieces(path),
}


def in_pieces(path: Path) -> None:
    with files.streamed(path) as write:
        write(b"x")
        write(b"y")


def publish(path: Path) -> None:
    with files.publish(path) as staging:
        files.write_bytes(staging / "a", b"x")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file and a folder that nobody may change."""
    place = tmp_path / "secret"
    place.mkdir()
    (place / "file").write_text(SECRET)
    return place


def untouched(secret: Path) -> bool:
    return [path.name for path in secret.iterdir()] == ["file"] and (secret / "file").read_text() == SECRET


@pytest.fixture(autouse=True)
def no_hook() -> Any:
    yield
    files.fault_hook = None


# Staging -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", WRITES)
@pytest.mark.parametrize("lies", ["link to a file", "link to a folder", "hard link", "folder", "dangling"])
def test_what_lies_at_a_foreseeable_name_is_neither_written_nor_removed(
    tmp_path: Path, secret: Path, form: str, lies: str
) -> None:
    place = tmp_path / "here"
    place.mkdir()
    names = [".x.part", ".cap_write_test", f".x.{'0' * 16}.part"]
    for name in names:
        if lies == "hard link":
            os.link(secret / "file", place / name)
        elif lies == "folder":
            (place / name).mkdir()
            (place / name / "mine").write_text("kept")
        else:
            target = {"link to a file": "file", "link to a folder": ".", "dangling": "new"}[lies]
            (place / name).symlink_to(secret / target)
    WRITES[form](place / "x")
    files.check_writable(place)
    assert untouched(secret)
    assert {".x.part", ".cap_write_test", "x"} <= {path.name for path in place.iterdir()} <= {*names, "x"}
    if lies == "folder":
        assert (place / ".x.part" / "mine").read_text() == "kept"


@pytest.mark.parametrize("form", WRITES)
def test_a_staging_name_is_made_new_even_if_it_was_guessed(
    tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * 16)
    guessed = tmp_path / f".x.{'0' * 16}.part"
    for target in ("file", ".", "new"):
        guessed.symlink_to(secret / target)
        with pytest.raises(RunFailed, match="cannot write"):
            WRITES[form](tmp_path / "x")
        assert guessed.is_symlink() and untouched(secret)
        guessed.unlink()


def test_a_link_itself_is_replaced_or_removed_and_never_followed(tmp_path: Path, secret: Path) -> None:
    link = tmp_path / "link"
    for target in (secret / "file", secret):
        link.symlink_to(target)
        files.remove(link)
        assert not os.path.lexists(link)
        link.symlink_to(target)
        publish(link)
        assert files.is_complete(link) and not link.is_symlink()
        files.remove(link)
    assert untouched(secret)


@pytest.mark.parametrize("form", WRITES)
def test_the_next_writer_removes_what_a_killed_one_left_and_not_what_a_living_one_fills(
    tmp_path: Path, form: str
) -> None:
    path = tmp_path / "x"

    def killed() -> None:
        files.fault_hook = lambda operation, _: operation == "rename" and os.kill(os.getpid(), signal.SIGKILL)
        WRITES[form](path)

    assert wait(forked(killed)) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with files.publish(path) as staging:
        assert [one.name for one in tmp_path.iterdir()] == [staging.name]
        files.sweep(tmp_path)
        assert staging.is_dir(), "its writer lives"
        other = wait(forked(lambda: WRITES[form](tmp_path / "y")))
        assert other == 0 and staging.is_dir()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["x", "y"]


def test_names_of_any_length_and_their_rights(tmp_path: Path) -> None:
    for name in ("x" * 250, "ü" * 120, "a*[b]", "-"):
        for form, write in WRITES.items():
            files.remove(tmp_path / name)
            write(tmp_path / name)
            mode = (tmp_path / name).stat().st_mode & 0o777
            assert mode == (0o777 if form == "folder" else 0o666) & ~files._UMASK
    assert len(list(tmp_path.iterdir())) == 4


def test_tokenizers_are_saved_without_the_folder_for_temporary_files(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    tokenizers.save_tokenizer(tokenizer, tmp_path / "out")
    assert "tokenizer.json" in {path.name for path in (tmp_path / "out").iterdir()}
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_training_leaves_nothing_in_the_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    devices.compute(Hardware(device="cpu"))
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    assert not list(tmp_path.iterdir())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(Path(os.environ["CAP_CACHE"]) / "torch")


@pytest.mark.parametrize("inner", ["", "prune-steps", ".lock", "config.json"])
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_a_run_writes_and_removes_nothing_through_a_link(
    tiny: Tiny, tmp_path: Path, secret: Path, inner: str, more: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    (out / "cap_config.json").touch()
    if not inner:
        (out / "work").rmdir()
    (out / "work" / inner).symlink_to(secret if inner in ("", "prune-steps") else secret / "file")
    result = invoke(*tiny.arguments(out), *more)
    assert result.exit_code == 2
    assert f"{out / 'work' / inner} is a link" in result.stderr
    assert untouched(secret)


def test_a_link_above_the_output_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to("disk")
    files.check_no_links(tmp_path / "runs" / "out" / "work")
    files.write_json(tmp_path / "runs" / "out" / "work" / "a.json", 1)
    assert (tmp_path / "disk" / "out" / "work" / "a.json").is_file()


def test_a_report_is_not_written_through_a_link_that_leads_out_of_its_folder(
    tmp_path: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    Path("r.xml").symlink_to(secret / "file")
    Path(".s.xml.part").symlink_to(secret / "file")
    result = invoke("eval", "no/such", "--task", "mr", "--junit", "r.xml")
    assert result.exit_code == 2 and "leads out of its own folder" in result.stderr
    assert invoke("eval", "no/such", "--task", "mr", "--junit", "s.xml").exit_code == 2
    assert Path("s.xml").is_file() and untouched(secret)


# Reading -------------------------------------------------------------------------------------------------------------


def test_what_is_read_whole_is_a_regular_file_of_bounded_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "big").write_bytes(b"1" * 100)
    (tmp_path / "many").write_text("[" * 20 + "]" * 20)
    (tmp_path / "wide").write_bytes('{"a": 1}'.encode("utf-16"))
    (tmp_path / "marked").write_bytes('{"a": 1}'.encode("utf-8-sig"))
    (tmp_path / "latin").write_bytes(b'{"a": "caf\xe9"}')
    expected = {"pipe": "is not a file", ".": "is not a file", "none": "does not exist", "wide": "UTF-16"}
    expected |= {"latin": "not a text in UTF-8: byte 10 cannot be read"}
    for name, reason in expected.items():
        with pytest.raises(FileError, match=reason):
            read_json(tmp_path / name)
    with pytest.raises(FileError, match="is not a file"):
        read_json(Path("/dev/zero"))
    with pytest.raises(FileError, match="larger than 10 bytes"):
        read_json(tmp_path / "big", max_bytes=10)
    assert read_json(tmp_path / "marked") == {"a": 1}


def test_brackets_and_digits_and_depth_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("[" * 100_000, "9" * 100_000, "[" * 500 + "]" * 499):
        (tmp_path / "a").write_text(text)
        with pytest.raises(FileError, match="is not valid JSON"):
            read_json(tmp_path / "a")
    monkeypatch.setattr(stored, "MAX_BRACKETS", 10)
    (tmp_path / "a").write_text("[" + "[]," * 10 + "1]")
    with pytest.raises(FileError, match="more than 10 brackets"):
        read_json(tmp_path / "a")


def test_options_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "big.toml").write_text("seed = 1\n" + "#" * MAX_TOML_BYTES)
    (tmp_path / "dots.toml").write_text(".".join("a" * 15_000) + " = 1")
    for name, reason in (("pipe", "is not a file"), ("big.toml", "larger than"), ("dots.toml", "dots")):
        began = time.monotonic()
        with pytest.raises(CapError, match=reason):
            read_toml(str(tmp_path / name), "prune")
        assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    "command", [("eval", "--task", "mr"), ("probe",), ("export", "--to", "dense"), ("prune", "--task", "mr")]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "cap_config.json", "model.safetensors", "other"])
def test_a_fifo_in_a_model_folder_is_refused_and_never_opened(
    tiny: Tiny, tmp_path: Path, command: tuple[str, ...], name: str
) -> None:
    folder = shutil.copytree(tiny.model, tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    out = ("-o", str(tmp_path / "out")) if command[0] in ("export", "prune") else ()
    result = invoke(command[0], str(folder), *command[1:], *out)
    assert result.exit_code == 2
    assert "m/" + name in result.stderr and "not a regular file" in result.stderr


@pytest.mark.parametrize("name", ["tokenizer.json", "cap_config.json", "model.cap.safetensors", "config.json"])
def test_a_fifo_in_an_artefact_is_refused(pruned: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(pruned, tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for arguments in (("eval", str(folder)), ("probe", str(folder), "--tasks", "subj")):
        result = invoke(*arguments)
        assert result.exit_code == 2, result.stderr
        assert "m/" + name in result.stderr and "regular file" in result.stderr


# Bombs ---------------------------------------------------------------------------------------------------------------

BOMBS: dict[str, dict[str, Any]] = {
    "layers": {"num_hidden_layers": 10_000},
    "layers of an artefact": {"num_hidden_layers": 500},
    "labels": {"num_labels": 10_000_000, "id2label": None, "label2id": None},
    "names": {"id2label": {str(i): "x" for i in range(200_000)}},
    "vocabulary": {"vocab_size": 10**10},
    "width": {"hidden_size": 10**6, "num_attention_heads": 10},
    "wide layers": {"intermediate_size": 10**10},
    "positions": {"max_position_embeddings": 10**10},
    "nested": {"text_config": {"num_hidden_layers": 10**9}},
    "albert": {"model_type": "albert", "num_hidden_layers": 10**9},
    "groups": {"model_type": "albert", "inner_group_num": 3000},
    "experts": {"model_type": "mixtral", "num_local_experts": 10**9},
    "repeated": {"model_type": "gpt_neo", "attention_types": [[["global", "local"], 10**9]]},
    "repeated often": {"model_type": "gpt_neo", "attention_types": [[["global"] * 100, 4096]] * 400},
    "python table": {"model_type": "distilbert", "sinusoidal_pos_embds": True, "max_position_embeddings": 10**8},
    "small python table": {
        "model_type": "distilbert",
        "sinusoidal_pos_embds": True,
        "max_position_embeddings": 400_000,
    },
}


def refused_at_once(action: Callable[[], Any]) -> str:
    """The message; raised in a second and without much memory."""
    began = time.monotonic()
    with pytest.raises((FileError, ModelError)) as caught:
        action()
    assert time.monotonic() - began < 3, "a second, on a machine that does nothing else"
    assert "\n" not in caught.value.message and len(caught.value.message) < 500
    return caught.value.message


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_configuration_describes_no_large_model(tiny: Tiny, pruned: Path, tmp_path: Path, bomb: str) -> None:
    dense, artefact = shutil.copytree(tiny.model, tmp_path / "dense"), shutil.copytree(pruned, tmp_path / "artefact")
    table = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**table, **BOMBS[bomb]}))
    settings = json.loads((artefact / "cap_config.json").read_text())
    settings["model_config"] |= BOMBS[bomb]
    (artefact / "cap_config.json").write_text(json.dumps(settings))
    refused_at_once(lambda: artifact.load_artifact(artefact))
    refused_at_once(lambda: loading.load_dense(str(dense), ["a", "b"], "classification", 0))


@pytest.mark.parametrize("table", [{"attention_window": [4, 10**9]}, {"lsh_attn_chunk_length": 10**9}], ids=str)
def test_inputs_are_not_padded_to_billions_of_tokens(table: dict[str, Any]) -> None:
    """As Longformer and Reformer pad them."""
    check_sizes({"attention_window": [512, 512], "lsh_attn_chunk_length": 64}, "config.json")
    with pytest.raises(ModelError, match="expected an integer up to 4,096, got '1000000000'"):
        check_sizes(table, "config.json")


def test_a_configuration_beside_an_artefact_is_not_read(pruned: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pruned, tmp_path / "a")
    (folder / "config.json").write_text('{"model_type": "bert", "num_labels": 1000000000, "auto_map": {"x": "y"}}')
    assert artifact.load_artifact(folder).tokenizer("a film")["input_ids"]


@pytest.mark.parametrize("family", ["albert", "deberta-v2", "modernbert", "llama", "distilbert"])
def test_real_proportions_are_not_refused(checkpoint: Callable[..., Path], family: str) -> None:
    folder = checkpoint(family)
    loading.load_dense(str(folder), ["x", "y", "z"], "classification", 0)


def test_large_files_of_a_model_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.model, tmp_path / "m")
    for name, size in (("tokenizer.json", MAX_TOKENIZER_BYTES), ("config.json", MAX_JSON_BYTES)):
        kept = (folder / name).read_bytes()
        with (folder / name).open("ab") as file:
            file.truncate(size + 1)
        said = refused_at_once(lambda: loading.load_dense(str(folder), ["a", "b"], "classification", 0))
        assert f"{name} is larger than" in said
        (folder / name).write_bytes(kept)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 90 << 20) + b" " * 100)
    assert "header" in refused_at_once(lambda: loading.load_dense(str(folder), ["a", "b"], "classification", 0))


@pytest.mark.parametrize("padding", [{"strategy": {"Fixed": 10**6}}, {"pad_to_multiple_of": 10**6}], ids=str)
def test_a_tokenizer_does_not_say_how_long_inputs_are(tiny: Tiny, tmp_path: Path, padding: dict[str, Any]) -> None:
    folder = shutil.copytree(tiny.model, tmp_path / "m")
    table = json.loads((folder / "tokenizer.json").read_text())
    table["padding"] = {
        **{"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]", **padding},
    }
    table["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(table))
    tokenizer = tokenizers.read_tokenizer(folder)
    assert len(tokenizer.backend_tokenizer.encode("the film was good").ids) == 6


def test_an_index_of_any_size_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.model, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with (folder / "model.safetensors.index.json").open("wb") as file:
        file.truncate(10 << 30)
    assert "larger than" in refused_at_once(lambda: loading.load_dense(str(folder), ["a", "b"], "classification", 0))


# What reports say of this machine ------------------------------------------------------------------------------------


def test_reports_hold_no_absolute_path(tiny: Tiny, tmp_path: Path) -> None:
    write_model(tmp_path / "home" / "model")
    shutil.copytree(tiny.data, tmp_path / "home" / "words")
    out, options = tmp_path / "home" / "out", {**SETTINGS, "epochs": 1, "teacher_epochs": 1}
    chosen = {"model": str(tmp_path / "home" / "model"), "data": str(tmp_path / "home" / "words"), **options}
    arguments = tiny.arguments(out, **chosen)
    shown = [invoke(*arguments, "--json")]
    assert shown[0].exit_code == 0, shown[0].stderr
    assert invoke(*arguments).exit_code == 0, "it is the same run"
    shown += [invoke("eval", str(out), "--baseline", str(out), "--latency-length", "8", "--json")]
    shown += [invoke("export", str(out), "--to", to, "-o", str(tmp_path / to), "--json") for to in ("dense", "sparse")]
    words = tmp_path / "home" / "words.txt"
    words.write_text("\n".join(tokenizers.read_tokenizer(out).get_vocab()))
    small = ("--to", "sparse", "--vocab", str(words), "-o", str(tmp_path / "small"))
    shown += [invoke("export", str(out), *small, "--json")]
    shown += [invoke("export", str(out), "--fit", "1GB", "-o", str(tmp_path / "fit"), "--json")]
    shown += [invoke("eval", str(tmp_path / "sparse"), "--latency-length", "8", "--json")]
    assert [one.exit_code for one in shown] == [0] * len(shown), shown[-1].stderr
    texts = {str(i): one.stdout for i, one in enumerate(shown)}
    for folder in (out, *(tmp_path / name for name in ("dense", "sparse", "small", "fit"))):
        texts |= {str(path): path.read_text("utf-8", "replace") for path in folder.iterdir() if path.is_file()}
    assert [name for name, text in texts.items() if str(tmp_path) in text] == []
    report = json.loads((out / "report.json").read_text())
    assert report["model"] == "…/model" and report["config"]["data"] == "…/words"
    assert artifact.stored_source(str(out))["data"] == str(tmp_path / "home" / "words")
    stored = json.loads((tmp_path / "sparse" / "cap_config.json").read_text())
    assert stored["source"]["data"] == "../home/words"
    assert invoke(*tiny.arguments(out, **{**chosen, "sparsity": 0.5})).exit_code == 2


def test_portable_replaces_whole_paths_alone() -> None:
    chosen = prune_config({"model": "/a/out", "task": "mr", "data": "/a/out/data/"})
    text = "/a/out/data, /a/out2 b/a/out (/a/out): /a/out/data/train.csv"
    found = portable({"x": text, "n": [1, None]}, chosen)
    assert found == {"x": "…/data, /a/out2 b/a/out (…/out): …/data/train.csv", "n": [1, None]}
    line = command_line(["prune", "/a/b", "--data=/c/d", "--tasks", "x,/e f, /g/h", "b/c", "-o/i/j"])
    assert shlex.split(line) == ["cap", "prune", "…/b", "--data=…/d", "--tasks", "x,…/e f, …/h", "b/c", "-o…/j"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", TOKEN, "--task", "mr"),
        ("prune", TOKEN, "--task", "mr"),
        ("prune", "mini", "--task", "mr", "--teacher", TOKEN),
        ("probe", TOKEN),
        ("probe", "mini", "--baseline", f"mini,{TOKEN}"),
        ("export", TOKEN, "--to", "dense"),
        ("export", TOKEN),
        ("eval", f"{TOKEN}@main", "--task", "mr"),
        ("eval", "mini", "--task", TOKEN),
        ("eval", "--compare", TOKEN, "x"),
        (TOKEN,),
        ("eval", "mini", "x", TOKEN),
    ],
)
def test_a_token_typed_as_an_argument_is_shown_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    junit = ("--junit", "r.xml") if arguments[0] in ("eval", "probe") else ()
    monkeypatch.setattr(app.sys, "argv", ["cap", *arguments, *junit])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 2
    shown = "".join(capsys.readouterr())
    assert "error: " in shown and TOKEN[:12] not in shown
    assert TOKEN[:12] not in "".join(path.read_text() for path in tmp_path.iterdir() if path.is_file())
    assert not [path for path in tmp_path.rglob("*") if TOKEN[:8] in path.name]
