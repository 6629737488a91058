"""Whole runs of SMP, and what `cap export --to mask` makes of them: masks over a named base."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import PRUNABLE, WEIGHTS, Tiny, digest, invoke, outcome, write_model

import capcli
from capcli import files
from capcli.artifact import masks, reader, writer
from capcli.errors import CapError, FileError, ModelError
from capcli.exporting import parcel
from capcli.models import masks as over
from capcli.models.storage import rounded
from capcli.pruning.topk import kept_count
from capcli.stored import read_tensors

CONFIG = "cap_config.json"
QUICK = {"method": "smp", "epochs": 1, "teacher_epochs": 1}


@pytest.fixture(scope="module")
def learned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("learned") / "out"
    tiny.prune(out, method="smp", keep_work=True)
    return out


@pytest.fixture(scope="module")
def masked(tiny: Tiny, learned: Path) -> Path:
    """Its masks, which name the tiny model as a folder beside."""
    return exported(learned, learned.parent / "masks", "--base", tiny.model)


def exported(run: Path, out: Path, *options: str) -> Path:
    done = invoke("export", str(run), "--to", "mask", "-o", str(out), "--threads", "1", "-q", *options)
    assert done.exit_code == 0, done.stderr
    return out


def refused(*arguments: str) -> str:
    done = invoke(*arguments, "--threads", "1")
    assert done.exit_code == 2, (done.exit_code, done.stderr)
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    return str(done.stderr)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


# Runs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_head", [False, True])
def test_weights_stay_those_of_the_model(tiny: Tiny, tmp_path: Path, train_head: bool) -> None:
    """All bits of them, and the head is the teacher's; or head and norms have changed. The report says which, and the
    masks hold no more than that."""
    report = tiny.prune(tmp_path / "out", **QUICK, store="fp32", keep_work=True, train_head=train_head)
    student = capcli.load(tmp_path / "out").state_dict()
    base = {f"bert.{name}": t for name, t in read_tensors(Path(tiny.model) / "model.safetensors").items()}
    teacher = read_tensors(tmp_path / "out" / "work" / "teacher" / "model.safetensors")
    start = base | {name: teacher[name] for name in ("classifier.weight", "classifier.bias")}
    changed = {name for name in start if not bool(((student[name] == start[name]) | (student[name] == 0)).all())}
    free = {name for name in start if name.startswith("classifier.") or "LayerNorm" in name}
    assert changed == (free if train_head else set())
    assert {name for name in start if bool((student[name] == 0).any() & (start[name] != 0).any())} >= {
        name for name in start if ".layer." in name and name.endswith("weight") and "LayerNorm" not in name
    }
    assert report["sparsity"]["kept_weights"] == kept_count(0.7, PRUNABLE)
    said = "head and norms were trained" if train_head else "head and norms are frozen"
    assert report["notes"][0] == (
        f"only masks were learned: the weights are those of …/tiny, with the head of the teacher; {said}"
    )
    assert report["loss_weights"] == {"ce": 0.5, "kd": 0.5, "reg": 400}
    found = exported(tmp_path / "out", tmp_path / "masks", "--base", tiny.model)  # in 32 bits nothing is rounded
    assert same(capcli.load(found).state_dict(), student)
    stored = {entry.name: entry.dtype for entry in reader.inspect(found / WEIGHTS) if not entry.name.endswith(".mask")}
    assert stored.keys() == (free if train_head else {name for name in free if name.startswith("classifier.")})
    assert stored["classifier.weight"] == "F32" and json.loads((found / CONFIG).read_text())["base"]["dtype"] == "fp32"


def test_stopped_and_continued(tiny: Tiny, tmp_path: Path, learned: Path) -> None:
    """The same bytes; a checkpoint holds moments of the scores alone."""
    chosen = {"method": "smp", "checkpoint_seconds": 0}
    tiny.stop(tmp_path / "out", "8/20, ", **chosen)
    state = max((tmp_path / "out" / "work" / "prune-steps").iterdir()) / "state.safetensors"
    moments = {name for name in read_tensors(state) if name.startswith("adam.")}
    assert len(moments) == 3 * 12 and all(name.endswith(".scores") for name in moments)
    tiny.prune(tmp_path / "out", **chosen)
    assert outcome(tmp_path / "out") == outcome(learned)


def test_all_losses_of_cap_and_another_kind_of_task(tiny: Tiny, tmp_path: Path) -> None:
    losses = {"losses": "ce,kd,prc,snc,fic,hid", "epochs": 2}
    report = tiny.prune(tmp_path / "a", **{**QUICK, **losses})
    assert report["losses"] == ["ce", "kd", "prc", "snc", "fic", "hid"]
    report = tiny.prune(tmp_path / "b", **QUICK, task="ner", data=tiny.tags, max_length=32)
    assert report["sparsity"]["kept_weights"] == kept_count(0.7, PRUNABLE)
    out = exported(tmp_path / "b", tmp_path / "masks", "--base", tiny.model)
    assert same(capcli.load(out).state_dict(), capcli.load(tmp_path / "b").state_dict())


def test_a_teacher_of_another_shape(tiny: Tiny, tmp_path: Path, learned: Path) -> None:
    """Its head is taken over, so it has to fit."""
    write_model(tmp_path / "wide", hidden_size=48)
    teacher = str(learned / "work" / "teacher")
    with pytest.raises(CapError, match=r"the head of the teacher .* does not fit .*wide, and smp takes it over"):
        tiny.prune(tmp_path / "out", **QUICK, model=str(tmp_path / "wide"), teacher=teacher)


# Masks ---------------------------------------------------------------------------------------------------------------


def test_masks_give_the_run_bit_by_bit(tiny: Tiny, tmp_path: Path, learned: Path, masked: Path) -> None:
    """Without a tokenizer or a weight of the base; and the sparse file that is made of them is that of the run."""
    whole = capcli.load(learned).state_dict()
    assert same(capcli.load(masked).state_dict(), whole)
    assert {path.name for path in masked.iterdir()} == {"README.md", CONFIG, "export.json", WEIGHTS}
    entries = {entry.name: entry for entry in reader.inspect(masked / WEIGHTS)}
    plain = {name for name in entries if not name.endswith(".mask")}
    assert plain == {"classifier.weight", "classifier.bias"} and len(entries) == 12 + 2
    assert capcli.load_tokenizer(masked).get_vocab() == capcli.load_tokenizer(tiny.model).get_vocab()
    done = invoke("export", str(masked), "--to", "sparse", "-o", str(tmp_path / "sparse"), "--threads", "1", "-q")
    assert done.exit_code == 0, done.stderr
    assert digest(tmp_path / "sparse" / WEIGHTS) == digest(learned / WEIGHTS)
    again = exported(masked, tmp_path / "again")
    assert digest(again / WEIGHTS) == digest(masked / WEIGHTS)


def test_cap_eval_measures_what_the_run_did(learned: Path, masked: Path) -> None:
    """With the task of the run, and a word on what is not in the file."""
    done = invoke("eval", str(masked), "--json", "--threads", "1", "-q")
    assert done.exit_code == 0, done.stderr
    found, report = json.loads(done.stdout), json.loads((learned / "report.json").read_text())
    assert found["metrics"].items() >= report["metrics"]["pruned"].items()
    assert found["size"]["weights_bytes"] == (masked / WEIGHTS).stat().st_size
    assert re.fullmatch(r"the file has masks and a head only: it needs its base, tiny \(.* kB\)", found["notes"][0])
    assert json.loads((masked / "export.json").read_text())["notes"] == found["notes"][:1]
    assert "needs its base, tiny" in (masked / "README.md").read_text()


def test_the_sparse_runtime_reads_masks(learned: Path, masked: Path) -> None:
    pytest.importorskip("numba")
    ids = torch.randint(5, 20, (2, 7), generator=torch.Generator().manual_seed(1))
    ours, theirs = (capcli.load(one, runtime="sparse", threads=1)(input_ids=ids).logits for one in (masked, learned))
    assert ours.equal(theirs)


def moved(masked: Path, target: Path) -> Path:
    """The masks where the base is not beside them."""
    shutil.copytree(masked, target / "deep" / "masks")
    return target / "deep" / "masks"


def test_a_base_that_is_elsewhere(tiny: Tiny, tmp_path: Path, learned: Path, masked: Path) -> None:
    """Named by the user, or refused in one line."""
    away = moved(masked, tmp_path)
    said = refused("eval", str(away), "--data", tiny.data)
    assert "holds masks only, and their base tiny is not here" in said and "--base" in said
    with pytest.raises(ModelError, match="their base tiny is not here"):
        capcli.load(away)
    assert same(capcli.load(away, base=tiny.model).state_dict(), capcli.load(learned).state_dict())
    done = invoke("eval", str(away), "--base", tiny.model, "--data", tiny.data, "--threads", "1", "-q")
    assert done.exit_code == 0, done.stderr
    assert "needs no base" in refused("eval", str(learned), "--base", tiny.model)


def test_another_base_is_refused(tiny: Tiny, tmp_path: Path, masked: Path) -> None:
    """By its digest, before its weights are used: of one shape, and with one bit changed."""
    other = tmp_path / "other"
    shutil.copytree(tiny.model, other)
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    said = refused("eval", str(masked), "--base", str(other))
    assert "is not the base that" in said and "'model.safetensors' has another sha256" in said


def test_what_is_not_the_base_with_zeros_has_no_masks(tiny: Tiny, pruned: Path, learned: Path, tmp_path: Path) -> None:
    """Runs that trained weights, and a run of smp with another model as its base; nothing is left."""
    said = refused("export", str(pruned), "--to", "mask", "-o", str(tmp_path / "out"), "--base", tiny.model)
    assert "12 of the 12 matrices of" in said and "first bert.encoder.layer.0.attention.self.query.weight" in said
    write_model(tmp_path / "other", seed=3)
    said = refused(
        "export", str(learned), "--to", "mask", "-o", str(tmp_path / "out"), "--base", str(tmp_path / "other")
    )
    assert "a mask cannot hold them" in said
    assert not (tmp_path / "out").exists()
    assert "name it with --base" in refused("export", str(learned), "--to", "mask", "-o", str(tmp_path / "out"))
    assert "--dtype changes weights" in refused("export", str(learned), "--to", "mask", "--dtype", "fp16")


def test_what_goes_to_the_hub_hides_where_the_base_is(masked: Path) -> None:
    sent = {piece.name: piece.content for piece in parcel.pieces(str(masked), "me/masks")}
    told = json.loads(sent[CONFIG])["base"]["name"] if isinstance(sent[CONFIG], bytes) else ""
    assert told == "…/tiny"


def test_a_plan(tiny: Tiny, learned: Path, masked: Path) -> None:
    done = invoke("export", str(learned), "--to", "mask", "--plan", "--json", "--base", tiny.model, "--threads", "1")
    assert done.exit_code == 0, done.stderr
    (rung,) = json.loads(done.stdout)["rungs"]
    assert rung["estimated"] and 0 < rung["weights_bytes"] < (masked / WEIGHTS).stat().st_size


# Files of strangers --------------------------------------------------------------------------------------------------

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def record(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Changes the record of the first mask."""
    return lambda table: change(table["base"]["matrices"][QUERY])


HOSTILE: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda table: table.pop("base"), "base: keys"),
    (lambda table: table["base"].update(more=1), "base: keys"),
    (lambda table: table["base"].update(name=7), "base: name"),
    (lambda table: table["base"].update(dtype="pickle"), "base: dtype"),
    (lambda table: table["base"].update(matrices=[]), "base: matrices"),
    (lambda table: table["base"].update(files={}), "base: files"),
    (lambda table: table["base"].update(files={"model.safetensors": [1]}), "another sha256"),
    (lambda table: table["base"].update(name="/no/such/folder"), "is not here"),
    (lambda table: table["base"]["matrices"].update(other={}), "matrices of the layers of the base"),
    (lambda table: table["base"]["matrices"].pop(QUERY), "those of the base, and masks"),
    (lambda table: table["base"]["matrices"].update({QUERY: 1}), "record of the mask"),
    (lambda table: table.update(labels=7), "labels and kind"),
    (lambda table: table.update(labels=["a"] * 3), "shape and type"),
    (lambda table: table.update(labels=["a"] * 200_000), "labels and kind"),
    (lambda table: table.update(kind=["classification"]), "labels and kind"),
    (record(lambda one: one.update(shape=[32, 33])), "shape"),
    (record(lambda one: one.update(shape=[10**9, 10**9])), "shape"),
    (record(lambda one: one.update(kept=True)), "kept"),
    (record(lambda one: one.update(kept=-1)), "kept"),
    (record(lambda one: one.update(kept=one["kept"] + 1)), "bitmask|stream|codes"),
    (record(lambda one: one.update(coding="factors")), "coding"),
    (record(lambda one: one.update(coding="bitmask", bits=0, codes=0)), "stream of the mask"),
    (record(lambda one: one.update(bits=64)), "bits"),
    (record(lambda one: one.update(codes=2**70)), "codes"),
]


@pytest.mark.parametrize(("change", "said"), HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_records(
    tiny: Tiny, tmp_path: Path, masked: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    away = moved(masked, tmp_path)
    table = json.loads((away / CONFIG).read_text())
    change(table)
    (away / CONFIG).write_text(json.dumps(table))
    with pytest.raises((FileError, ModelError), match=said):
        capcli.load(away, base="" if "not here" in said else tiny.model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(QUERY + ".mask"), "none of this name"),
        (lambda tensors: tensors.pop("classifier.bias"), "none of this name"),
        (lambda tensors: tensors.update(more=torch.ones(1)), "those of the base, and masks"),
        (lambda tensors: tensors.update({QUERY: torch.ones(32, 32)}), "those of the base, and masks"),
        (lambda tensors: tensors.update({"classifier.bias": torch.ones(2, dtype=torch.uint8)}), "shape and type"),
        (lambda tensors: tensors.update({"classifier.bias": torch.ones(2, 2**20)}), "shape and type"),
        (lambda tensors: tensors.update({"classifier.bias": torch.tensor([0, torch.nan])}), "not finite"),
        (lambda tensors: tensors.update({QUERY + ".mask": torch.zeros(5)}), "stream"),
        (lambda tensors: tensors.update({QUERY + ".mask": torch.zeros(2**20, dtype=torch.uint8)}), "stream"),
    ],
    ids=range(9),
)
def test_hostile_tensors(
    tiny: Tiny, tmp_path: Path, masked: Path, change: Callable[[dict[str, torch.Tensor]], Any], said: str
) -> None:
    away = moved(masked, tmp_path)
    tensors = dict(reader.load(away / WEIGHTS))
    change(tensors)
    files.remove(away / WEIGHTS)
    writer.save(away / WEIGHTS, tensors, ())
    with pytest.raises((FileError, ModelError), match=said):
        capcli.load(away, base=tiny.model)


# The coding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kept", "coding", "bits"), [(0.0, "rice", 0.0), (0.03, "rice", 0.2), (0.5, "bitmask", 1.0)])
def test_the_shorter_coding(kept: float, coding: str, bits: float) -> None:
    """Of 97 % removed a weight takes 0.2 bits, and n·H(s) are 0.194."""
    mask = torch.rand(64, 1024, generator=torch.Generator().manual_seed(1)).numpy() < kept
    table, stream = masks.packed(mask)
    assert table["coding"] == ("bitmask" if kept == 0.5 else coding)
    assert stream.size == masks.n_bytes(table) and 8 * stream.size / mask.size <= bits * 1.01
    assert np.array_equal(masks.unpacked("x", table, stream, mask.shape), mask)
    assert json.loads(json.dumps(table)) == table


def test_what_is_too_small_for_16_bits_stays() -> None:
    """As in the file of a run: a kept weight is the smallest number; and zeros are +0."""
    weight = torch.tensor([1e-12, -1e-12, -0.0, 0.1])
    found = rounded(weight, torch.float16, matrix=True)
    assert found.tolist() == [2.0**-24, -(2.0**-24), 0.0, float(torch.tensor(0.1).half())]
    assert rounded(weight, torch.float16).signbit().tolist() == [False] * 4
    assert rounded(torch.tensor([3]), torch.float16).tolist() == [3]
    assert over.ROUNDINGS == ("fp16", "bf16", "fp32")
