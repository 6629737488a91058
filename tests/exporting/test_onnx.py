"""Conversion to ONNX: every family gives PyTorch's logits for any batch, length and padding, and the file is clean."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import registry
import torch
from tiny import SOURCES, TOKENIZERS, Tiny
from torch import Tensor, nn

from capcli.config.hardware import Hardware
from capcli.config.task import TaskConfig
from capcli.data import dataset
from capcli.errors import ConfigError, FileError, ModelError
from capcli.events import finished
from capcli.exporting import onnx_model
from capcli.measuring import scoring
from capcli.models import devices, loading, predict, stock, tokenizers
from capcli.models.model import Model
from capcli.models.predictor import of_network
from capcli.runtime import onnx
from capcli.runtime.graph import Graph

pytestmark = pytest.mark.slow
LONGEST = 64
SHAPES = ((1, 5), (7, 5), (1, LONGEST), (7, LONGEST), (3, 2))
# One layer is enough to convert; where the mask depends on the layer or on the distance, it does so within the length.
LAYERS: dict[str, dict[str, int]] = {
    "distilbert": {"n_layers": 1},
    "gpt2": {"n_layer": 1},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
    "modernbert": {"num_hidden_layers": 2, "global_attn_every_n_layers": 2, "local_attention": 8},
    "mistral": {"num_hidden_layers": 1, "sliding_window": 8},
}
LABELS: dict[str, tuple[str, ...]] = {"regression": (), "spans": (), "embedding": (), "tokens": ("O", "B-x", "I-x")}


def load(name: str, folder: Path, kind: str = "classification", **changes: Any) -> Model:
    registry.write(name, folder, TOKENIZERS, **LAYERS.get(name, {"num_hidden_layers": 1}), **changes)
    return loading.load_dense(str(folder), LABELS.get(kind, ("x", "y", "z")), kind, 1)


def batch(model: Model, n: int, length: int) -> dict[str, Tensor]:
    """Random inputs [n, length]; all rows but the first are padded, and end as the tokenizer ends a text."""
    rng = torch.Generator().manual_seed(length)
    ids = torch.randint(4, len(model.tokenizer), (n, length), generator=rng)
    real = torch.randint(1, length + 1, (n,), generator=rng)
    real[0] = length
    if model.tokenizer.sep_token_id is not None:
        ids[torch.arange(n), real - 1] = model.tokenizer.sep_token_id
    mask = (torch.arange(length) < real[:, None]).long()
    ids = torch.where(mask.bool(), ids, model.tokenizer.pad_token_id)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in model.input_names:
        inputs["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=rng) * mask
    return inputs


@torch.no_grad()
def difference(model: Model, runner: Graph, inputs: Mapping[str, Tensor]) -> float:
    """The largest difference of the logits at real tokens over the largest logit."""
    expected, found = predict.forward(model, inputs)[0], runner.logits(inputs)
    if model.embedding:
        found = model.embedding(runner(inputs)["last_hidden_state"], inputs["attention_mask"])
    assert expected.shape == found.shape and found.dtype == torch.float32
    real = inputs["attention_mask"].bool() if model.per_token else slice(None)
    return float((expected[real] - found[real]).abs().max() / expected[real].abs().max())


def check(model: Model, path: Path) -> Graph:
    runner = Graph(path)
    assert runner.names == model.input_names
    assert max(difference(model, runner, batch(model, n, length)) for n, length in SHAPES) < 5e-6
    return runner


# The others share their code with one of these or with BERT.
FAMILIES = ("roberta", "distilbert", "mpnet", "deberta-v2", "albert", "modernbert", "llama", "mistral", "gpt2")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_the_logits_of_pytorch(tmp_path: Path, name: str) -> None:
    model = load(name, tmp_path / "model")
    check(model, onnx_model.convert(model, tmp_path / "out", LONGEST))


@pytest.mark.parametrize("kind", ["regression", "tokens", "spans", "embedding"])
def test_every_kind_gives_the_logits_of_pytorch(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    """And they can be measured as those of PyTorch are, here on real texts."""
    model = load("bert", tmp_path / "model", kind, max_position_embeddings=LONGEST)
    runner = check(model, onnx_model.convert(model, tmp_path / "out", LONGEST))
    names = {"spans": ["start_logits", "end_logits"], "embedding": ["last_hidden_state"]}.get(kind, ["logits"])
    assert [value.name for value in runner.session.get_outputs()] == names
    on = devices.compute(Hardware(device="cpu"))
    task, data = SOURCES[kind]
    source = TaskConfig(task=task, data=getattr(tiny, data), max_length=16, stride=4)
    loaded = dataset.load(source, train=False)
    model = loading.load_dense(str(tmp_path / "model"), loaded.classes or (), kind, 1)
    if kind in ("regression", "spans", "embedding"):  # the other kinds have labels of their own in the data
        stock.save_config(model, tmp_path / "out")
        tokenizers.save_tokenizer(model.tokenizer, tmp_path / "out")
        answering = onnx.predictor(onnx.load(str(tmp_path / "out"), 1), kind, loaded.classes)
        theirs = of_network(model, on)
        assert (answering.labels, answering.longest) == (theirs.labels, theirs.longest)
        examples = scoring.encoded(answering, loaded.evals["validation"], source)
        found, expected = finished(answering.answers(examples)), finished(theirs.answers(examples))
        assert torch.allclose(expected, found, atol=1e-5 * float(expected.abs().max()))
        ours = finished(scoring.measure(answering, examples, loaded.metrics))
        assert ours.metrics == pytest.approx(
            finished(scoring.measure(theirs, examples, loaded.metrics)).metrics, abs=1e-5
        )


@pytest.fixture(scope="module")
def converted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A BERT with weights large enough that its answers differ, converted in an empty working folder."""
    root = tmp_path_factory.mktemp("onnx")
    model = loading.load_dense(tiny.model, ("negative", "positive"), "classification", 1)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.2)
    with pytest.MonkeyPatch.context() as patch:
        (root / "cwd").mkdir()
        patch.chdir(root / "cwd")
        path = onnx_model.convert(model, root / "out", LONGEST)
    return model, path


def test_any_batch_and_length(converted: tuple[Model, Path]) -> None:
    model, path = converted
    runner = check(model, path)
    assert [(v.name, v.type, v.shape) for v in runner.session.get_inputs()] == [
        (name, "tensor(int64)", ["batch", "length"]) for name in model.input_names
    ]
    assert [(v.name, v.shape) for v in runner.session.get_outputs()] == [("logits", ["batch", 2])]


def test_padding_changes_nothing(converted: tuple[Model, Path]) -> None:
    model, path = converted
    runner, inputs = Graph(path), batch(model, 1, 9)
    padded = {name: nn.functional.pad(value, (0, 20)) for name, value in inputs.items()}
    padded["input_ids"][:, 9:] = 7  # not even when there are words
    assert torch.allclose(runner.logits(inputs), runner.logits(padded), atol=1e-5)
    padded["attention_mask"][:] = 1
    assert not torch.allclose(runner.logits(inputs), runner.logits(padded), atol=1e-3)


def test_nothing_else_is_written_printed_or_changed(
    converted: tuple[Model, Path], tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the second conversion gives the same bytes, which name no file of this machine."""
    model, path = converted
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    assert not list((path.parent.parent / "cwd").iterdir())
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    config = model.net.config.to_json_string()
    model.net.train()
    again = onnx_model.convert(model, tmp_path, LONGEST)
    assert model.net.training
    model.net.eval()
    onnx_model.quantise(again, tmp_path / "int8.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "int8.onnx"}
    assert capfd.readouterr() == ("", "")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.net.state_dict().items())
    assert model.net.config.to_json_string() == config
    written = path.read_bytes()
    assert again.read_bytes() == written
    here = (Path(onnx_model.__file__).parent, Path(torch.__file__).parent.parent, Path(tiny.model), Path.home())
    for data in (written, (tmp_path / "int8.onnx").read_bytes()):
        assert not any(str(folder).encode() in data for folder in here)
        assert b"site-packages" not in data and b"stack_trace" not in data


def test_only_standard_operators(converted: tuple[Model, Path]) -> None:
    import onnx

    graph = onnx.load(converted[1])
    onnx.checker.check_model(graph, full_check=True)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", onnx_model.OPSET)]
    assert not graph.metadata_props and not graph.functions
    assert not any(node.doc_string or node.metadata_props for node in graph.graph.node)


def test_eight_bits_are_smaller_and_answer_alike(converted: tuple[Model, Path], tmp_path: Path) -> None:
    import onnx

    model, path = converted
    onnx_model.quantise(path, tmp_path / "int8.onnx")
    full, small = Graph(path), Graph(tmp_path / "int8.onnx")
    inputs = batch(model, 200, 12)
    expected, found = full.logits(inputs), small.logits(inputs)
    assert (expected.argmax(dim=1) == found.argmax(dim=1)).double().mean() >= 0.9
    assert 0 < (expected - found).abs().max() < 0.2 * expected.abs().max()
    stored = onnx.load(tmp_path / "int8.onnx").graph.initializer
    wide = [np.prod(tensor.dims) for tensor in stored if tensor.data_type == onnx.TensorProto.FLOAT]
    assert max(wide) <= 64  # biases, norms and scales
    assert (tmp_path / "int8.onnx").stat().st_size < path.stat().st_size


def smaller(model: Model) -> None:
    """Cut heads and neurons out of a BERT, another number of them in each layer; widths as in pruned models."""
    for index, layer in enumerate(model.net.bert.encoder.layer):
        heads, neurons = [0, 2, 3][: 2 + index], torch.arange(0, 64, 3 + index)
        attention = layer.attention.self
        rows = torch.cat([torch.arange(8) + 8 * head for head in heads])
        for linear in (attention.query, attention.key, attention.value, layer.intermediate.dense):
            kept = neurons if linear is layer.intermediate.dense else rows
            linear.weight, linear.bias = nn.Parameter(linear.weight[kept]), nn.Parameter(linear.bias[kept])
            linear.out_features = len(kept)
        for linear, kept in ((layer.attention.output.dense, rows), (layer.output.dense, neurons)):
            linear.weight, linear.in_features = nn.Parameter(linear.weight[:, kept]), len(kept)
        attention.num_attention_heads, attention.all_head_size = len(heads), len(rows)


def test_a_model_with_layers_of_unlike_width(tiny: Tiny, tmp_path: Path) -> None:
    model = loading.load_dense(tiny.model, ("negative", "positive"), "classification", 1)
    smaller(model)
    narrow = model.net.bert.encoder.layer[0].attention.self
    for linear in (narrow.query, narrow.key):  # four of the eight numbers of each of two heads
        kept = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11])
        linear.weight, linear.bias = nn.Parameter(linear.weight[kept]), nn.Parameter(linear.bias[kept])
    value = narrow.value
    value.weight, value.bias = nn.Parameter(value.weight[:8]), nn.Parameter(value.bias[:8])
    output = model.net.bert.encoder.layer[0].attention.output.dense
    output.weight = nn.Parameter(output.weight[:, :8])
    narrow.attention_head_size, narrow.all_head_size = 4, 8
    check(model, onnx_model.convert(model, tmp_path / "out", LONGEST))


def test_weights_beside_the_graph_when_protobuf_cannot_hold_them(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_model, "SINGLE_FILE_BYTES", 1000)
    model = load("distilbert", tmp_path / "model")
    path = onnx_model.convert(model, tmp_path / "out", LONGEST)
    assert {p.name for p in path.parent.iterdir()} == {onnx_model.MODEL_FILE, onnx_model.DATA_FILE}
    check(model, path)


@pytest.mark.parametrize("call", [onnx_model.convert, onnx_model.quantise])
def test_missing_packages(
    converted: tuple[Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(onnx_model, "find_spec", lambda name: None if "onnx" in name else real(name))
    model, path = converted
    arguments: dict[Any, tuple[Any, ...]] = {onnx_model.convert: (model, tmp_path, LONGEST)}
    with pytest.raises(ConfigError, match=r"^cap export --to onnx needs onnx, onnxscript and onnxruntime$") as caught:
        call(*arguments.get(call, (path, tmp_path / "int8.onnx")))
    assert caught.value.hint == "pip install onnx onnxscript onnxruntime"
    assert caught.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_what_the_exporter_cannot_convert(tiny: Tiny, tmp_path: Path) -> None:
    model = loading.load_dense(tiny.model, ("x", "y"), "classification", 1)
    whole = model.net.forward

    def forward(input_ids: Tensor, **inputs: Any) -> Any:
        assert int(input_ids.sum()) > 0
        return whole(input_ids, **inputs)

    model.net.forward = functools.wraps(whole)(forward)
    with pytest.raises(ModelError, match=f"^transformers' exporter cannot convert {tiny.model}: .+") as caught:
        onnx_model.convert(model, tmp_path / "out", LONGEST)
    assert "\n" not in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"no graph", json.dumps({}).encode()])
def test_what_is_no_graph_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(FileError, match=r"onnxruntime cannot open .*model\.onnx: "):
        Graph(tmp_path / "model.onnx")
    with pytest.raises(FileError, match=r"model\.onnx cannot be quantised: "):
        onnx_model.quantise(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
