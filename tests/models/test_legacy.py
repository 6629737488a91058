"""Sparse checkpoints of other tools: written here from the layouts that `models.legacy` documents, by slow loops."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_server
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import Tiny, environment, invoke, write_byte_tokenizer

from capcli.errors import ConfigError, FileError, ModelError
from capcli.models import artifact, checkpoint_parts, legacy, loading, predict, stock
from capcli.models.model import WEIGHTS_FILE, Model, copy
from capcli.sources import hub

Tensors = dict[str, torch.Tensor]
LABELS = ("negative", "positive")
QUERY = "bert.encoder.layer.0.attention.self.query"
BITMASK_CONFIG = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "version": "0.9.2",
        "sparsity_config": {"format": "sparse-bitmask", "global_sparsity": 80.1, "sparsity_structure": "unstructured"},
    }
}
MASKED_CONFIG = {"model_type": "masked_bert", "mask_init": "constant", "mask_scale": 0.0}


# Writers -------------------------------------------------------------------------------------------------------------


def coded(stem: str, dense: torch.Tensor) -> Tensors:
    """A tensor as its four parts; bit c % 8 of byte c // 8 of a row says whether the value in column c is kept."""
    table = dense[None] if dense.dim() == 1 else dense
    masks, values, offsets = [], [], []
    for row in table:
        offsets.append(len(values))
        packed = [0] * math.ceil(len(row) / 8)
        for c, value in enumerate(row):
            if value != 0:
                packed[c // 8] += 1 << c % 8
                values.append(value)
        masks.append(packed)
    one = dense.dim() == 1
    return {
        f"{stem}.shape": torch.tensor(dense.shape),
        f"{stem}.compressed": torch.stack(values) if values else dense.new_zeros(0),
        f"{stem}.bitmask": torch.tensor(masks[0] if one else masks, dtype=torch.uint8),
        f"{stem}.row_offsets": torch.tensor(offsets[0] if one else offsets),
    }


def dense_folder(net: Any, tokenizer: Any, folder: Path, **config: Any) -> Tensors:
    """A stock folder; returns its tensors, which may be changed and written with `rewrite`."""
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    edit(folder, **config)
    return load_file(folder / "model.safetensors")


def edit(folder: Path, **values: Any) -> None:
    """Other values in config.json; None takes a key out."""
    path = folder / "config.json"
    table = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in table.items() if value is not None}))


def rewrite(folder: Path, tensors: Tensors) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def sparse_model(tiny: Tiny, kind: str = "classification", labels: tuple[str, ...] = LABELS) -> Model:
    """The tiny BERT with a head, and four fifths of its prunable weights zero; one row of each matrix wholly."""
    return thinned(loading.load_dense(tiny.model, labels, kind, 3))


@torch.no_grad()
def thinned(model: Model) -> Model:
    generator = torch.Generator().manual_seed(5)
    for linear in model.prunable().values():
        linear.weight.masked_fill_(torch.rand(linear.weight.shape, generator=generator) < 0.8, 0.0)
        linear.weight[1] = 0.0
    return model


def bitmask_folder(model: Model, folder: Path, *, whole_names: bool = False) -> Tensors:
    """As compressed-tensors 0.9 and later wrote it; with `whole_names` as before 0.9, every tensor compressed."""
    dense = dense_folder(model.net, model.tokenizer, folder, **BITMASK_CONFIG)
    tensors: Tensors = {}
    for name, tensor in dense.items():
        if whole_names:
            tensors |= coded(name, tensor)
        elif name in model.prunable():
            tensors |= coded(name.removesuffix(".weight"), tensor)
        else:
            tensors[name] = tensor
    rewrite(folder, tensors)
    return tensors


def masked_folder(model: Model, folder: Path, method: str) -> Tensors:
    """As movement pruning wrote it: whole weights, and scores beside those of the layers."""
    tensors = dense_folder(
        model.net, model.tokenizer, folder, **MASKED_CONFIG, pruning_method=method,
        architectures=["Masked" + type(model.net).__name__],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(9)
    if method != "magnitude":
        for name in model.prunable():
            scores = torch.randn(tensors[name].shape, generator=generator) * 2
            tensors[name.removesuffix("weight") + "mask_scores"] = scores
    rewrite(folder, tensors)
    return tensors


def same(found: Model, expected: Any) -> None:
    ours, theirs = found.net.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
        assert torch.equal(ours[name].signbit(), tensor.signbit()), name


@torch.no_grad()
def logits(model: Model) -> torch.Tensor:
    batch = model.tokenizer(["the film was good", "a dull plot"], padding=True, return_tensors="pt")
    return predict.forward(Model(**{**vars(model), "net": model.net.eval()}), dict(batch))[0]


@pytest.fixture(scope="module")
def bitmask(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """A bitmask folder to read from, and the model that it holds."""
    folder = tmp_path_factory.mktemp("bitmask") / "model"
    model = sparse_model(tiny)
    bitmask_folder(model, folder)
    return folder, model


@pytest.fixture(scope="module")
def masked(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """A folder with scores to read from, and the model without its masks."""
    folder = tmp_path_factory.mktemp("masked") / "model"
    model = loading.load_dense(tiny.model, LABELS, "classification", 3)
    masked_folder(model, folder, "topK")
    return folder, model


# Bitmasks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_names", [False, True])
def test_a_bitmask_checkpoint_is_the_dense_model_that_it_was_made_from(
    tiny: Tiny, tmp_path: Path, whole_names: bool
) -> None:
    model = sparse_model(tiny)
    bitmask_folder(model, tmp_path / "x", whole_names=whole_names)
    assert legacy.layout(tmp_path / "x") == "bitmask"
    found = legacy.load(tmp_path / "x", None)
    same(found, model.net)
    assert (found.labels, found.kind, found.family) == (LABELS, "classification", model.family)
    assert torch.equal(logits(found), logits(model))
    assert not found.net.training
    assert legacy.zeros(found) == sum(int((w.weight == 0).sum()) for w in model.prunable().values()) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_of_other_floats_become_32_bits(bitmask: tuple[Path, Model], tmp_path: Path, dtype: torch.dtype) -> None:
    folder = shutil.copytree(bitmask[0], tmp_path / "x")
    tensors = load_file(folder / "model.safetensors")
    rewrite(folder, {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()})
    expected = copy(bitmask[1])
    expected.net.to(dtype).float()
    same(legacy.load(folder, None), expected.net)


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_other_families_are_read_too(checkpoint: Any, tmp_path: Path, family: str) -> None:
    if family == "llama":
        write_byte_tokenizer(tmp_path / "words", padding=False)
        source = shutil.copytree(checkpoint(family), tmp_path / "dense")
        shutil.copytree(tmp_path / "words", source, dirs_exist_ok=True)
    else:
        source = checkpoint(family)
    model = thinned(loading.load_dense(str(source), None, "classification", 1))
    bitmask_folder(model, tmp_path / "x")
    found = legacy.load(tmp_path / "x", None)
    same(found, model.net)
    assert torch.equal(logits(found), logits(model))


def test_shards_are_read(bitmask: tuple[Path, Model], tmp_path: Path) -> None:
    folder = sharded(bitmask[0], tmp_path / "x")
    assert legacy.layout(folder) == "bitmask"
    same(legacy.load(folder, None), bitmask[1].net)


def sharded(source: Path, folder: Path) -> Path:
    """A copy in two files; the parts of one matrix may stand in both."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {tensor: names[i % 2] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({tensor: tensors[tensor] for tensor in tensors if where[tensor] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": None, "compression_config": BITMASK_CONFIG["quantization_config"]},
        {"quantization_config": None, "sparsity_config": {"format": "sparse_bitmask"}},
        {"quantization_config": None},
        {"quantization_config": {**BITMASK_CONFIG["quantization_config"], "config_groups": {}}},
    ],
)
def test_the_layout_is_known_wherever_the_configuration_says_it(
    bitmask: tuple[Path, Model], tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = shutil.copytree(bitmask[0], tmp_path / "x")
    edit(folder, **config)
    assert legacy.layout(folder) == "bitmask"
    same(legacy.load(folder, None), bitmask[1].net)


@pytest.mark.parametrize(
    ("kind", "labels"),
    [("tokens", ("O", "B-good", "I-good")), ("spans", ()), ("regression", ()), ("multilabel", LABELS)],
)
def test_the_kind_comes_from_the_configuration(tiny: Tiny, tmp_path: Path, kind: str, labels: tuple[str, ...]) -> None:
    model = sparse_model(tiny, kind, labels)
    bitmask_folder(model, tmp_path / "x")
    found = legacy.load(tmp_path / "x", None)
    same(found, model.net)
    assert (found.kind, found.labels) == (kind, model.labels)


def test_a_dense_model_is_no_legacy_checkpoint_but_can_be_read(tiny: Tiny, tmp_path: Path) -> None:
    model = sparse_model(tiny)
    dense_folder(model.net, model.tokenizer, tmp_path / "x")
    assert legacy.layout(tmp_path / "x") is None
    same(legacy.load(tmp_path / "x", None), model.net)
    assert legacy.layout(Path(tiny.model)) is None


def test_a_pooler_that_the_head_does_not_use_is_left_out(tiny: Tiny, tmp_path: Path) -> None:
    model = sparse_model(tiny, "spans", ())
    tensors = bitmask_folder(model, tmp_path / "x")
    ids = {"bert.embeddings.position_ids": torch.arange(64)[None]}
    rewrite(tmp_path / "x", tensors | ids | {"bert.pooler.dense.weight": torch.ones(32, 32)})
    same(legacy.load(tmp_path / "x", None), model.net)


FROM_THE_HUB = """
from pathlib import Path
from capcli.models import legacy
from capcli.sources import hub
folder = hub.folder("owner/legacy", legacy=True)
hub.weights(folder, "owner/legacy")
print(legacy.layout(Path(folder)), legacy.zeros(legacy.load(Path(folder), None)))
"""


def test_a_hub_id_is_read_too(bitmask: tuple[Path, Model], tmp_path: Path) -> None:
    with hub_server.serving() as server:
        server.add("owner/legacy", sharded(bitmask[0], tmp_path / "x"))
        env = environment(HF_ENDPOINT=server.address, HF_HOME=str(tmp_path / "home"))
        done = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB], env=env, capture_output=True, text=True, check=False
        )
    assert done.stdout.split() == ["bitmask", str(legacy.zeros(bitmask[1]))], done.stderr


def put(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Any]:
    """Change one part of the first matrix."""
    return lambda t: t.update({f"{QUERY}.{part}": change(t[f"{QUERY}.{part}"])})


def changed(tensor: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def moved_bit(mask: torch.Tensor) -> torch.Tensor:
    """One bit of row 0 stands in row 1, whose bits were all zero: the total stays."""
    mask = mask.clone()
    byte = int((mask[0] > 0).nonzero()[0])
    bit = 1 << (int(mask[0, byte]).bit_length() - 1)
    mask[0, byte] -= bit
    mask[1, byte] += bit
    return mask


def widened(tensors: Tensors) -> None:
    """31 columns instead of 32, as the mask still has them: the last bits are padding."""
    tensors[f"{QUERY}.shape"] = torch.tensor([32, 31])


MALFORMED: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no shape": (lambda t: t.pop(f"{QUERY}.shape"), "no shape"),
    "no values": (lambda t: t.pop(f"{QUERY}.compressed"), "no compressed"),
    "no mask": (lambda t: t.pop(f"{QUERY}.bitmask"), "no bitmask"),
    "no offsets": (lambda t: t.pop(f"{QUERY}.row_offsets"), "no row_offsets"),
    "shape of floats": (put("shape", lambda s: s.double()), r"shape.*expected I64 \[1\] or \[2\], got .*F64"),
    "shape of three": (put("shape", lambda s: torch.tensor([32, 32, 1])), r"got .*I64 \[3\]"),
    "shape of none": (put("shape", lambda s: s[:0]), r"got .*I64 \[0\]"),
    "shape as a matrix": (put("shape", lambda s: s[None]), r"got .*I64 \[1, 2\]"),
    "a negative size": (put("shape", lambda s: torch.tensor([-32, 32])), "sizes: expected at least 1"),
    "a size of zero": (put("shape", lambda s: torch.tensor([32, 0])), "sizes: expected at least 1"),
    "huge sizes": (put("shape", lambda s: torch.tensor([2**31, 2**31])), "bitmask.*type: expected U8"),
    "sizes that overflow": (put("shape", lambda s: torch.tensor([2**62, 2**62])), "bitmask.*type: expected U8"),
    "many rows of one": (put("shape", lambda s: torch.tensor([2**40, 1])), "bitmask.*type: expected U8"),
    "one row more": (put("shape", lambda s: torch.tensor([33, 32])), r"expected U8 \[33, 4\], got .*U8 \[32, 4\]"),
    "a vector's shape": (put("shape", lambda s: torch.tensor([1024])), r"expected U8 \[128\]"),
    "mask of int8": (put("bitmask", lambda m: m.view(torch.int8)), r"expected U8 \[32, 4\], got .*I8"),
    "mask flat": (put("bitmask", lambda m: m.flatten()), r"expected U8 \[32, 4\], got .*U8 \[128\]"),
    "mask too narrow": (put("bitmask", lambda m: m[:, :3]), r"got .*U8 \[32, 3\]"),
    "mask too wide": (put("bitmask", lambda m: torch.cat([m, m[:, :1]], 1)), r"got .*U8 \[32, 5\]"),
    "one bit more": (put("bitmask", lambda m: changed(m, (1, 0), 1)), r"bits set: expected (\d+), got"),
    "one bit less": (put("bitmask", lambda m: changed(m, 0, 0)), r"bits set: expected (\d+), got"),
    "a bit in another row": (put("bitmask", moved_bit), "row_offsets.*the bits set before each row"),
    "padding bits": (widened, "padding bits: expected zero, got 'one'"),
    "values as a matrix": (put("compressed", lambda v: v[None]), "compressed.*shape: expected one size"),
    "one value less": (put("compressed", lambda v: v[:-1]), r"bits set: expected (\d+), got"),
    "one value more": (put("compressed", lambda v: torch.cat([v, v[:1]])), r"bits set: expected (\d+), got"),
    "a single value": (put("compressed", lambda v: v[:1]), "bits set: expected 1, got"),
    "more values than weights": (put("compressed", lambda v: torch.ones(1025)), "up to 1,024"),
    "values of int8": (put("compressed", lambda v: v.to(torch.int8)), "quantised"),
    "values of 8-bit floats": (put("compressed", lambda v: v.to(torch.float8_e4m3fn)), "quantised"),
    "not a number": (put("compressed", lambda v: changed(v, 3, math.nan)), "compressed.*finite numbers"),
    "infinity": (put("compressed", lambda v: changed(v, -1, -math.inf)), "compressed.*finite numbers"),
    "offsets of int32": (put("row_offsets", lambda o: o.int()), r"row_offsets.*expected I64 \[32\], got .*I32"),
    "offsets too short": (put("row_offsets", lambda o: o[:-1]), r"got .*I64 \[31\]"),
    "offsets too long": (put("row_offsets", lambda o: torch.cat([o, o[-1:]])), r"got .*I64 \[33\]"),
    "offsets not from 0": (put("row_offsets", lambda o: o + 1), "row_offsets.*the bits set before each row"),
    "an offset that falls": (put("row_offsets", lambda o: changed(o, 5, 0)), "row_offsets.*the bits set before"),
    "an offset of 10^6": (put("row_offsets", lambda o: changed(o, -1, 10**6)), "row_offsets.*the bits set before"),
    "a negative offset": (put("row_offsets", lambda o: changed(o, 0, -1)), "row_offsets.*the bits set before"),
    "both forms": (lambda t: t.update({f"{QUERY}.weight": torch.ones(32, 32)}), "forms of .*expected one, got 'two'"),
    "two names": (lambda t: t.update(coded(f"{QUERY}.weight", torch.ones(32, 32))), "expected one, got 'two'"),
    "another shape": (
        lambda t: t.update(coded(QUERY, torch.ones(31, 32))),
        "describes a model of .* weights|of another shape, first " + QUERY,
    ),
    "a matrix is missing": (
        lambda t: [t.pop(f"{QUERY}.{part}") for part in checkpoint_parts.PARTS],
        "describes a model of|of another shape, first " + QUERY,
    ),
    "left over": (lambda t: t.update({"extra.weight": torch.ones(9)}), "1 left over, first 'extra.weight'"),
    "left over, compressed": (lambda t: t.update(coded("extra", torch.eye(9))), "1 left over, first 'extra.weight'"),
    "packed": (lambda t: t.update({f"{QUERY}.weight_packed": torch.ones(9, dtype=torch.int32)}), "quantised"),
    "scaled": (lambda t: t.update({f"{QUERY}.weight_scale": torch.ones(32, 1)}), r"quantised \(weight_scale"),
    "a dense NaN": (lambda t: t["classifier.bias"].fill_(math.nan), "classifier.bias.*finite numbers"),
    "a name that moves the cursor": (lambda t: t.update({"\x1b[2J.weight": torch.ones(1)}), "names: expected up to"),
    "a name of 10 kB": (lambda t: t.update({"x" * 10_000: torch.ones(1)}), "names: expected up to"),
    "a path for a name": (lambda t: t.update({"../../x.weight": torch.ones(1)}), "left over"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_bitmask_checkpoint_is_refused(bitmask: tuple[Path, Model], tmp_path: Path, case: str) -> None:
    change, expected = MALFORMED[case]
    folder = shutil.copytree(bitmask[0], tmp_path / "x")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    rewrite(folder, tensors)
    refused(folder, expected)


def refused(folder: Path, expected: str, threshold: float | None = None) -> None:
    """One clear line that names the file or folder, in no time and without control characters."""
    with pytest.raises((FileError, ModelError), match=expected) as caught:
        legacy.load(folder, threshold)
    message = caught.value.message
    assert message.isprintable()
    assert str(folder) in message
    assert len(message) < len(str(folder)) + 400


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def edited_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def edit(raw: bytes) -> bytes:
        header, data = header_of(raw)
        change(header)
        return with_header(header, data)

    return edit


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "seven bytes": lambda raw: raw[:7],
    "cut in the header": lambda raw: raw[:100],
    "cut in the data": lambda raw: raw[:-1],
    "cut in the middle": lambda raw: raw[: len(raw) // 2],
    "a byte more": lambda raw: raw + b"x",
    "a header of 2^63": lambda raw: b"\xff" * 8 + raw[8:],
    "a header larger than allowed": lambda raw: struct.pack("<Q", 9 << 20) + raw[8:],
    "not JSON": lambda raw: raw[:8] + b"x" * (len(raw) - 8),
    "an array": lambda raw: with_header([], b""),
    "a shape of 2^62": edited_header(lambda h: h[f"{QUERY}.shape"].update(shape=[2**62])),
    "a negative shape": edited_header(lambda h: h[f"{QUERY}.shape"].update(shape=[-2])),
    "an unknown type": edited_header(lambda h: h[f"{QUERY}.shape"].update(dtype="OBJECT")),
    "offsets beyond the file": edited_header(lambda h: h[f"{QUERY}.shape"].update(data_offsets=[0, 2**40])),
    "a pointer of git-lfs": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "a pickle": lambda raw: b"\x80\x04cos\nsystem\n" + raw[:200],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused(bitmask: tuple[Path, Model], tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(bitmask[0], tmp_path / "x")
    path = folder / "model.safetensors"
    path.write_bytes(DAMAGED[damage](path.read_bytes()))
    refused(folder, str(path))


def test_what_is_no_regular_file_is_not_opened(bitmask: tuple[Path, Model], tmp_path: Path) -> None:
    folder = shutil.copytree(bitmask[0], tmp_path / "x")
    path = folder / "model.safetensors"
    path.unlink()
    refused(folder, "model.safetensors")  # nothing there
    os.mkfifo(path)
    refused(folder, "model.safetensors")
    path.unlink()
    path.mkdir()
    refused(folder, "model.safetensors")


def test_too_many_tensors_are_refused(bitmask: tuple[Path, Model], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoint_parts, "MAX_TENSORS", 10)
    folder = shutil.copytree(bitmask[0], tmp_path / "x")
    refused(folder, "number of tensors: expected at most 10")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda index: index["weight_map"].update(x="../../etc/passwd"), "names no safetensors files"),
        (lambda index: index["weight_map"].update(x="/dev/zero.safetensors"), "names no safetensors files"),
        (lambda index: index.update(weight_map=[1]), "names no safetensors files"),
        (lambda index: index["weight_map"].update(x="model-9.safetensors"), "model-9.safetensors"),
    ],
)
def test_a_hostile_index_is_refused(
    bitmask: tuple[Path, Model], tmp_path: Path, change: Callable[[Any], Any], expected: str
) -> None:
    folder = sharded(bitmask[0], tmp_path / "x")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    refused(folder, expected)


def test_a_tensor_in_two_files_is_refused(bitmask: tuple[Path, Model], tmp_path: Path) -> None:
    folder = sharded(bitmask[0], tmp_path / "x")
    path = folder / "model-00001-of-00002.safetensors"
    other = load_file(folder / "model-00002-of-00002.safetensors")
    save_file(load_file(path) | {name: other[name] for name in list(other)[:1]}, path)
    refused(folder, "stored: expected once")


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["BertForMaskedLM"]}, "architectures: expected one that ends in ForSequenceClassification"),
    ({"architectures": None}, "architectures"),
    ({"architectures": "BertForSequenceClassification"}, "architectures"),
    ({"architectures": [{"os": "system"}]}, "architectures"),
    ({"model_type": "evil"}, "does not describe a model"),
    ({"model_type": None}, "does not describe a model"),
    ({"model_type": ["bert"]}, "does not describe a model"),
    ({"hidden_size": "many"}, "does not describe a model"),
    ({"hidden_size": 10**7, "num_attention_heads": 10}, "describes a model of"),
    ({"vocab_size": 10**12}, "describes a model of"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected an integer up to"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers: expected an integer"),
    ({"num_labels": 10**9, "id2label": None, "label2id": None}, "num_labels: expected an integer"),
    ({"id2label": {"zero": "x"}}, "does not describe a model"),
    ({"id2label": ["x", "y"]}, "does not describe a model"),
    ({"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": None}, "describes a model of|classifier"),
    ({"intermediate_size": 63}, "of another shape|left over"),
    ({"num_hidden_layers": 1}, "left over"),
]


@pytest.mark.parametrize(("config", "expected"), CONFIGS)
def test_a_configuration_that_does_not_fit_is_refused(
    bitmask: tuple[Path, Model], tmp_path: Path, config: dict[str, Any], expected: str
) -> None:
    folder = shutil.copytree(bitmask[0], tmp_path / "x")
    edit(folder, **config)
    refused(folder, expected)


def test_what_names_code_never_reaches_transformers(bitmask: tuple[Path, Model], tmp_path: Path) -> None:
    ran, folder = tmp_path / "ran", shutil.copytree(bitmask[0], tmp_path / "x")
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    kernel = "evil/kernel"
    edit(folder, auto_map={"AutoConfig": "evil.Config"}, attn_implementation=kernel, _attn_implementation=kernel)
    edit(folder, sparsity_config={"format": "evil.Format"}, _attn_implementation_internal=kernel)
    found = legacy.load(folder, None)
    assert not ran.exists()
    assert found.net.config._attn_implementation in ("sdpa", "eager")
    assert "auto_map" not in found.net.config.to_dict()
    with pytest.raises(ModelError, match="own code"):
        hub.folder(str(folder), legacy=True)


@pytest.mark.parametrize(
    "more",
    [
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}},
        {"kv_cache_scheme": {"num_bits": 8}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
    ],
)
def test_quantised_ones_are_refused_before_anything_else(
    bitmask: tuple[Path, Model], tmp_path: Path, more: dict[str, Any]
) -> None:
    folder = shutil.copytree(bitmask[0], tmp_path / "x")
    edit(folder, quantization_config={**BITMASK_CONFIG["quantization_config"], **more})
    for wanted in (True, False):
        with pytest.raises(ModelError, match=r"quantised \(compressed-tensors, sparse-.*bitmask\)"):
            hub.folder(str(folder), legacy=wanted)


def test_pickled_weights_are_never_read(bitmask: tuple[Path, Model], tmp_path: Path) -> None:
    folder = shutil.copytree(bitmask[0], tmp_path / "x")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        hub.folder(str(folder), legacy=True)


def test_a_threshold_is_refused_where_it_says_nothing(bitmask: tuple[Path, Model]) -> None:
    with pytest.raises(ConfigError, match=r"--threshold 0.5 has no meaning for .*its file says what is zero"):
        legacy.load(bitmask[0], 0.5)


# Masks ---------------------------------------------------------------------------------------------------------------


def slow_factor(method: str, weight: Any, scores: Any, threshold: float) -> np.ndarray[Any, Any]:
    """The factor of each weight, one at a time."""
    shape, n = weight.shape, weight.numel()
    worth = [abs(float(v)) for v in weight.flatten()] if method == "magnitude" else list(map(float, scores.flatten()))
    if method in ("topK", "magnitude"):
        best = sorted(range(n), key=lambda i: -worth[i])[: int(threshold * n)]
        factor = [float(i in set(best)) for i in range(n)]
    elif method == "l0":
        factor = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-value)) - 0.1)) for value in worth]
    else:
        values = [1 / (1 + math.exp(-value)) for value in worth] if method == "sigmoied_threshold" else worth
        factor = [float(value > threshold) for value in values]
        least = int(0.005 * n) + 1
        if sum(factor) < least:
            bound = sorted(worth)[max(n - least, 1) - 1]
            factor = [float(value > bound) for value in worth]
    return np.array(factor, np.float32).reshape(shape)


@pytest.mark.parametrize(
    ("method", "threshold"),
    [
        ("topK", 0.15), ("topK", 1.0), ("topK", 0.0001), ("magnitude", 0.15), ("magnitude", 0.033),
        ("sigmoied_threshold", 0.9), ("sigmoied_threshold", 0.0), ("sigmoied_threshold", 0.999999),
        ("threshold", 1.5), ("threshold", -0.3), ("threshold", 99.0), ("l0", None),
    ],
)  # fmt: skip
def test_masks_are_those_of_a_slow_loop(tiny: Tiny, tmp_path: Path, method: str, threshold: float | None) -> None:
    model = loading.load_dense(tiny.model, LABELS, "classification", 3)
    tensors = masked_folder(model, tmp_path / "x", method)
    assert legacy.layout(tmp_path / "x") == "masked"
    found = legacy.load(tmp_path / "x", threshold)
    for name, linear in model.prunable().items():
        scores = tensors.get(name.removesuffix("weight") + "mask_scores")
        factor = slow_factor(method, tensors[name], scores, threshold or 0.0)
        weight = linear.weight.detach().numpy() * factor
        weight[factor == 0] = 0.0
        linear.weight.data = torch.from_numpy(weight)
    if method == "l0":
        for name, linear in found.prunable().items():
            assert torch.allclose(linear.weight, model.prunable()[name].weight, atol=1e-6)
            assert torch.equal(linear.weight == 0, model.prunable()[name].weight == 0)
        assert legacy.zeros(found) > 0
        assert torch.allclose(logits(found), logits(model), atol=1e-5)
    else:
        same(found, model.net)
        assert torch.equal(logits(found), logits(model))
    assert type(found.net).__name__ == "BertForSequenceClassification"
    assert not {"pruning_method", "mask_init", "mask_scale"} & found.net.config.to_dict().keys()
    assert (found.labels, found.kind) == (LABELS, "classification")


def test_of_equal_scores_the_first_are_kept(masked: tuple[Path, Model], tmp_path: Path) -> None:
    folder = shutil.copytree(masked[0], tmp_path / "x")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{QUERY}.mask_scores"].zero_()
    rewrite(folder, tensors)
    weight = legacy.load(folder, 0.25).net.get_parameter(f"{QUERY}.weight")
    assert bool((weight.flatten()[:256] != 0).all())
    assert not weight.flatten()[256:].any()


@pytest.mark.parametrize("kind", ["spans", "tokens"])
def test_masked_models_that_answer_per_token(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    model = loading.load_dense(tiny.model, ("O", "B-x"), kind, 3)
    tensors = masked_folder(model, tmp_path / "x", "topK")
    rewrite(tmp_path / "x", tensors | {"bert.pooler.dense.weight": torch.ones(32, 32)})
    found = legacy.load(tmp_path / "x", 0.1)
    assert (found.kind, found.labels) == (kind, model.labels)
    assert legacy.zeros(found) == sum(w.weight.numel() - int(0.1 * w.weight.numel()) for w in found.prunable().values())


@pytest.mark.parametrize(
    ("method", "thresholds"),
    [
        ("topK", (None, 0.0, -0.1, 1.01, math.nan, math.inf)),
        ("magnitude", (None, 0.0, 15.0, math.nan)),
        ("sigmoied_threshold", (None, -0.01, 1.0, math.nan)),
        ("threshold", (None, math.nan, math.inf)),
        ("l0", (0.0, 0.5)),
    ],
)
def test_thresholds_that_are_missing_wrong_or_of_no_use(
    tiny: Tiny, tmp_path: Path, method: str, thresholds: tuple[float | None, ...]
) -> None:
    model = loading.load_dense(tiny.model, LABELS, "classification", 3)
    masked_folder(model, tmp_path / "x", method)
    for threshold in thresholds:
        with pytest.raises(ConfigError, match="--threshold") as caught:
            legacy.load(tmp_path / "x", threshold)
        assert caught.value.hint


def test_zeros_that_are_stored_need_no_scores(tiny: Tiny, tmp_path: Path) -> None:
    """What `bertarize` left behind: the configuration of the masked model, and plain weights."""
    model = sparse_model(tiny)
    folder = tmp_path / "x"
    dense_folder(model.net, model.tokenizer, folder, **MASKED_CONFIG, pruning_method="topK")
    same(legacy.load(folder, None), model.net)
    with pytest.raises(ConfigError, match="its zeros are stored"):
        legacy.load(folder, 0.1)


SCORES = f"{QUERY}.mask_scores"
MASKS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "scores per row": (lambda t: t.update({SCORES: torch.ones(32, 1)}), r"expected \[32, 32\], one score per weight"),
    "scores per block": (lambda t: t.update({SCORES: torch.ones(4, 4)}), r"\[32, 32\], one score per weight"),
    "scores without a weight": (lambda t: t.pop(f"{QUERY}.weight"), "beside it"),
    "scores of nothing": (lambda t: t.update({"evil.mask_scores": torch.ones(2, 2)}), "beside it"),
    "scores of the head": (lambda t: t.update({"classifier.mask_scores": torch.ones(2, 32)}), "beside it"),
    "one without scores": (lambda t: t.pop(SCORES), "1 of 12 matrices have no mask_scores"),
    "a score that is NaN": (lambda t: t[SCORES][0].fill_(math.nan), "finite numbers"),
    "a weight that is NaN": (lambda t: t[f"{QUERY}.weight"][0].fill_(math.nan), "finite numbers"),
    "scores of int8": (lambda t: t.update({SCORES: t[SCORES].to(torch.int8)}), "quantised"),
    "no scores, no zeros": (
        lambda t: [t.pop(name) for name in list(t) if name.endswith(".mask_scores")],
        "neither mask_scores nor zeros",
    ),
    "left over": (lambda t: t.update({"extra.weight": torch.ones(2)}), "left over"),
}


@pytest.mark.parametrize("case", MASKS)
def test_malformed_masks_are_refused(masked: tuple[Path, Model], tmp_path: Path, case: str) -> None:
    change, expected = MASKS[case]
    folder = shutil.copytree(masked[0], tmp_path / "x")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    rewrite(folder, tensors)
    refused(folder, expected, 0.5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"pruning_method": "evil"}, "pruning_method: expected one of topK, magnitude"),
        ({"pruning_method": None}, "pruning_method"),
        ({"pruning_method": ["topK"]}, "pruning_method"),
        ({"pruning_method": "magnitude"}, "beside it"),
        ({"model_type": "masked_albert"}, "expected masked_bert"),
        ({"model_type": "roberta"}, "expected masked_bert"),
        ({"hidden_act": "evil"}, "does not describe a model"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ],
)
def test_configurations_of_masks_that_are_refused(
    masked: tuple[Path, Model], tmp_path: Path, config: dict[str, Any], expected: str
) -> None:
    folder = shutil.copytree(masked[0], tmp_path / "x")
    edit(folder, **config)
    refused(folder, expected, 0.5)


def test_a_vocabulary_alone_is_enough_for_a_masked_model(masked: tuple[Path, Model], tmp_path: Path) -> None:
    """As such checkpoints were saved then: no tokenizer.json, no class of the tokenizer."""
    folder = shutil.copytree(masked[0], tmp_path / "x")
    words = masked[1].tokenizer.get_vocab()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)) + "\n")
    found = legacy.load(folder, 0.5)
    assert found.tokenizer("the film")["input_ids"] == masked[1].tokenizer("the film")["input_ids"]


# What they are refused for, and what they become ---------------------------------------------------------------------


def hidden(folder: Path) -> Path:
    """Without a word in config.json: the tensors alone tell."""
    edit(folder, model_type="bert", quantization_config=None, architectures=["BertForSequenceClassification"])
    return folder


@pytest.mark.parametrize("layout", ["bitmask", "masked"])
@pytest.mark.parametrize("said", [True, False])
def test_they_are_no_dense_models(
    bitmask: tuple[Path, Any], masked: tuple[Path, Any], tiny: Tiny, tmp_path: Path, layout: str, said: bool
) -> None:
    """transformers would take random weights, or weights without their masks, and say nothing."""
    folder = shutil.copytree({"bitmask": bitmask, "masked": masked}[layout][0], tmp_path / "x")
    if not said:
        hidden(folder)
    assert legacy.layout(folder) == layout
    task = ("--task", "text-classification", "--data", tiny.data)
    for command in (("eval", str(folder)), ("prune", str(folder), "-o", str(tmp_path / "out"), "--epochs", "1")):
        result = invoke(*command, *task)
        assert result.exit_code == 2, result.stderr
        assert "sparse checkpoint of" in result.stderr
        assert f"cap export {folder} --to sparse" in result.stderr.replace("\n", " ")
        assert "Traceback" not in result.stderr
    if said:
        with pytest.raises(ModelError, match="sparse checkpoint"):
            hub.folder(str(folder))
    assert hub.folder(str(folder), legacy=True) == str(folder)


def converted(model: Model, out: Path) -> Path:
    out.mkdir()
    artifact.save_artifact(model, out, list(model.prunable()), {"source": {}})
    return out


@pytest.mark.parametrize("layout", ["bitmask", "masked"])
def test_the_artefact_holds_the_same_weights_and_can_be_evaluated(
    bitmask: tuple[Path, Any], masked: tuple[Path, Any], tiny: Tiny, tmp_path: Path, layout: str
) -> None:
    model = legacy.load(bitmask[0], None) if layout == "bitmask" else legacy.load(masked[0], 0.2)
    dense = tmp_path / "dense"
    dense.mkdir()
    stock.save_dense(model, dense)
    out = converted(model, tmp_path / "out")
    again = artifact.load_artifact(out)
    same(again, model.net)
    assert (again.labels, again.kind) == (model.labels, model.kind)
    assert torch.equal(logits(again), logits(model))
    assert (out / WEIGHTS_FILE).stat().st_size < (dense / "model.safetensors").stat().st_size
    assert artifact.stored_source(str(out)) == {}
    results = []
    for source in (out, dense):
        result = invoke("eval", str(source), "--task", "text-classification", "--data", tiny.data, "--json")
        assert result.exit_code == 0, result.stderr
        results.append(json.loads(result.stdout)["metrics"])
    assert results[0] == results[1]


def test_labels_of_a_converted_model_are_matched_by_name(
    bitmask: tuple[Path, Model], tiny: Tiny, tmp_path: Path
) -> None:
    folder = shutil.copytree(bitmask[0], tmp_path / "x")
    edit(folder, id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    out = converted(legacy.load(folder, None), tmp_path / "out")
    task = ("eval", str(out), "--task", "text-classification", "--data", tiny.data, "--json")
    result = invoke(*task)
    assert result.exit_code == 2
    assert "LABEL_0" in result.stderr
    accuracies = []
    for mapping in ("LABEL_0=negative,LABEL_1=positive", "LABEL_0=positive,LABEL_1=negative"):
        result = invoke(*task, "--label-map", mapping)
        assert result.exit_code == 0, result.stderr
        accuracies.append(json.loads(result.stdout)["metrics"]["accuracy"])
    assert sum(accuracies) == pytest.approx(1.0)


def test_a_converted_model_needs_a_task(bitmask: tuple[Path, Model], tmp_path: Path) -> None:
    out = converted(legacy.load(bitmask[0], None), tmp_path / "out")
    result = invoke("eval", str(out))
    assert result.exit_code == 2
    assert "task" in result.stderr
    assert "dense one is needed" not in result.stderr
