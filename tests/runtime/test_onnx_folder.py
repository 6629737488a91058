"""ONNX folders: what a graph answers, what is measured of it, and the folders that are refused in one line."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Tiny, invoke, write_csv

import capcli
from capcli.errors import CapError, ConfigError, FileError, ModelError
from capcli.models import families
from capcli.runtime import graph
from capcli.runtime import onnx as runtime
from capcli.runtime.graph import Graph, graph_files

LABELS = ("negative", "positive")
TEXTS = [("good", "positive"), ("bad", "negative"), ("good good bad", "positive"), ("bad film", "negative")]
HIDDEN = 4


def write(
    folder: Path,
    tokenizer: Any,
    *,
    labels: tuple[str, ...] = LABELS,
    change: Callable[[Any, Any], None] = lambda graph, model: None,
    states: bool = False,
) -> Path:
    """An ONNX folder whose logits [B, C] are the sum of a row per token: of `good` for positive, of `bad` against."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rows = np.zeros((len(tokenizer), HIDDEN), dtype=np.float32)
    for word, row in (("good", (-1, 2, 1, 0)), ("bad", (2, -1, 0, 1))):
        rows[tokenizer.convert_tokens_to_ids(word)] = row
    head = np.zeros((HIDDEN, len(labels)), dtype=np.float32)
    head[0, 0] = head[1, 1] = 1
    nodes = [
        helper.make_node("Gather", ["rows", "input_ids"], ["last_hidden_state"]),
        helper.make_node("Cast", ["attention_mask"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["real", "last"], ["mask"]),
        helper.make_node("Mul", ["last_hidden_state", "mask"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "first"], ["summed"], keepdims=0),
        helper.make_node("MatMul", ["summed", "head"], ["logits"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(labels)])]
    outputs += [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "length", 4])] * states
    graph = helper.make_graph(
        nodes,
        "sums",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
            for name in ("input_ids", "attention_mask")
        ],
        outputs,
        [
            numpy_helper.from_array(rows, "rows"),
            numpy_helper.from_array(head, "head"),
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.array([1]), "first"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    change(model.graph, model)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    tokenizer.save_pretrained(folder)
    names = {str(index): name for index, name in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "id2label": names}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    write_csv(folder / "validation.csv", ("text", "label"), TEXTS)
    return folder


def evaluated(folder: Path, data: Path, *more: str, code: int = 0) -> dict[str, Any]:
    arguments = ("--task", "text-classification", "--data", str(data), "--latency-length", "8", "--threads", "1")
    result = invoke("eval", str(folder), *arguments, "--json", "-q", *more)
    assert result.exit_code == code, result.stderr
    return dict(json.loads(result.stdout)) if code < 2 else {"stderr": result.stderr}


def test_a_folder_is_measured_and_gated(tokenizer: Any, data: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "graph", tokenizer)
    n_bytes = (folder / "model.onnx").stat().st_size
    found = evaluated(folder, data, "--min", "accuracy=1", "--max-bytes", str(n_bytes), "--max-latency-ms", "60000")
    assert found["metrics"]["accuracy"] == 1 and found["n_examples"] == len(TEXTS)
    assert found["size"] == {"weights_bytes": n_bytes} and found["sparsity"] is None
    assert [gate["passed"] for gate in found["gates"]] == [True] * 3
    assert found["runtime"]["name"] == found["latency"]["runtime"] == "onnx"
    assert found["runtime"]["described"].startswith("onnxruntime 1.")
    assert found["runtime"]["batching"] == "several texts at a time"
    failed = evaluated(folder, data, "--max-bytes", str(n_bytes - 1), code=1)
    assert not failed["passed"]


def test_as_a_baseline_of_itself_it_agrees(tokenizer: Any, data: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "graph", tokenizer)
    found = evaluated(folder, data, "--baseline", str(folder), "--max-drop", "accuracy=0")
    assert found["agreement"] == 1 and found["differences"]["accuracy"]["value"] == 0


def test_logits_stand_in_the_order_of_the_labels_of_the_data(tokenizer: Any, data: Path, tmp_path: Path) -> None:
    """The same graph, whose first output is called positive, is wrong everywhere."""
    folder = write(tmp_path / "graph", tokenizer, labels=("positive", "negative"))
    assert evaluated(folder, data)["metrics"]["accuracy"] == 0


def test_a_folder_as_something_to_call(tokenizer: Any, tmp_path: Path) -> None:
    model = capcli.load(write(tmp_path / "graph", tokenizer, states=True))
    words = capcli.load_tokenizer(tmp_path / "graph")
    out = model(**words(["good", "bad bad"], padding=True, return_tensors="pt"))
    assert out.logits.tolist() == [[-1, 2], [4, -2]]
    assert out.last_hidden_state.shape[2] == HIDDEN and list(out) == ["logits", "last_hidden_state"]


def test_an_input_that_is_not_given_is_of_one_whole_text(tokenizer: Any, tmp_path: Path) -> None:
    model = capcli.load(write(tmp_path / "graph", tokenizer))
    whole = tokenizer(["good bad"], return_tensors="pt")
    assert model(input_ids=whole["input_ids"]).logits.tolist() == model(**whole).logits.tolist() == [[1, 1]]


@pytest.mark.parametrize(("config", "longest"), [({}, 66), ({"model_type": "roberta", "pad_token_id": 1}, 64)])
def test_the_longest_input_is_that_of_the_positions(
    tokenizer: Any, tmp_path: Path, config: dict[str, Any], longest: int
) -> None:
    folder = write(tmp_path / "graph", tokenizer)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 66, **config}))
    assert runtime.load(folder).longest == longest


def test_no_more_threads_than_processors(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capcli.machine.processors", lambda: 2)
    model = runtime.load(write(tmp_path / "graph", tokenizer), threads=1000)
    assert model.threads == 2
    assert model.notes == ("1,000 threads were asked for, this process may use 2",)


def test_vectors_are_made_of_the_last_states(tokenizer: Any, tmp_path: Path) -> None:
    model = runtime.load(write(tmp_path / "graph", tokenizer, states=True), threads=1)
    coded = tokenizer(["good", "bad film good"], padding=True, return_tensors="pt")
    states = model(**coded).last_hidden_state
    for pooling, expected in (("mean", families.mean(states, coded["attention_mask"])), ("cls", states[:, 0])):
        logits, vectors = model.run(pooling)(coded)
        assert vectors is not None and torch.equal(vectors, expected)
        assert torch.equal(logits, model(**coded).logits)
    assert model.run("head")(coded)[1] is None


def probed(folder: Path, *more: str) -> Any:
    sizes = ("--max-train-samples", "20", "--max-eval-samples", "20", "--seeds", "1", "--threads", "1")
    return invoke("probe", str(folder), "--tasks", "mr", *sizes, "--json", "-q", *more)


def test_a_graph_with_states_is_probed_and_one_without_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    found = json.loads(probed(write(tmp_path / "with", tokenizer, states=True)).stdout)
    assert found["runtime"] == "onnx"
    assert found["size"]["weights_bytes"] == (tmp_path / "with" / "model.onnx").stat().st_size
    for folder, options, of in (
        (write(tmp_path / "without", tokenizer), (), "for --pool mean"),
        (tmp_path / "with", ("--layer", "1"), "of tokens or layers"),
        (tmp_path / "with", ("--pool", "head"), "for --pool head"),
    ):
        result = probed(folder, *options)
        assert result.exit_code == 2
        assert f"{folder} gives no vectors {of}, as model.onnx has no output for them" in result.stderr


# Eight bits ----------------------------------------------------------------------------------------------------------


def quantised(graph: Any, model: Any) -> None:
    """The activations before the head go through 8 bits whose range is that of the whole batch."""
    from onnx import helper

    graph.node[-1].input[0] = "rough"
    graph.node.extend(
        [
            helper.make_node("DynamicQuantizeLinear", ["summed"], ["q", "scale", "zero"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["rough"]),
        ]
    )
    nodes = [*graph.node[:-3], *graph.node[-2:], graph.node[-3]]
    del graph.node[:]
    graph.node.extend(nodes)


def test_where_the_range_is_that_of_a_batch_every_text_is_asked_alone(
    tokenizer: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "graph", tokenizer, change=quantised)
    model = runtime.load(folder, threads=1)
    coded = tokenizer(["good", "bad " * 50], padding=True, return_tensors="pt")
    assert not torch.equal(model(**coded).logits[0], model(**tokenizer(["good"], return_tensors="pt")).logits[0])
    sizes, honest = [], Graph.__call__

    def seen(graph: Graph, inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        return honest(graph, inputs)

    monkeypatch.setattr(Graph, "__call__", seen)
    found = evaluated(folder, data)
    n = found["n_examples"]
    assert sizes[0] == 2  # are tried when it is opened
    assert sizes[1 : n + 1] == [1] * n and set(sizes[n + 1 :]) == {1, n}  # all at once only to count texts per second
    assert found["runtime"]["batching"] == "one text at a time" and found["latency"]["precision"] == "int8"


# Weights beside the graph --------------------------------------------------------------------------------------------


def beside(place: str) -> Callable[[Any, Any], None]:
    """The rows of the graph are stored in a file of their own."""

    def change(graph: Any, model: Any) -> None:
        rows = graph.initializer[0]
        entries: Mapping[str, str] = {"location": place, "offset": "0", "length": str(len(rows.raw_data))}
        rows.ClearField("raw_data")
        rows.data_location = 1
        for name, value in entries.items():
            entry = rows.external_data.add()
            entry.key, entry.value = name, value

    return change


@pytest.mark.parametrize("place", ["model.onnx.data", "x" * 200])
def test_weights_beside_the_graph_are_read_and_counted(tokenizer: Any, data: Path, tmp_path: Path, place: str) -> None:
    n_bytes = 4 * HIDDEN * len(tokenizer)
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / place).write_bytes(bytes(n_bytes))
    folder = write(tmp_path / "graph", tokenizer, change=beside(place))
    assert graph_files(folder) == (folder / "model.onnx", folder / place)
    found = evaluated(folder, data)
    assert found["size"]["weights_bytes"] == n_bytes + (tmp_path / "graph" / "model.onnx").stat().st_size
    assert any("(always " in note for note in found["notes"])  # as all weights are 0


@pytest.mark.parametrize("place", ["../secret", "/etc/hostname", "link", "sub/../../secret", "missing"])
def test_weights_outside_the_folder_are_never_read(tokenizer: Any, data: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(4 * HIDDEN * len(tokenizer)))
    folder = write(tmp_path / "graph", tokenizer, change=beside(place))
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(FileError, match=r"^onnxruntime cannot open .*model\.onnx: .*xternal data"):
        runtime.load(folder)
    assert graph_files(folder) == (folder / "model.onnx",)


# Refused -------------------------------------------------------------------------------------------------------------


def other_input(graph: Any, model: Any) -> None:
    extra = graph.input.add()
    extra.CopyFrom(graph.input[0])
    extra.name = "pixel_values"


def no_mask(graph: Any, model: Any) -> None:
    from onnx import helper

    graph.input.pop()
    graph.node.insert(0, helper.make_node("Identity", ["input_ids"], ["attention_mask"]))


def float_ids(graph: Any, model: Any) -> None:
    from onnx import helper

    graph.input[0].type.tensor_type.elem_type = 1
    graph.node[0].input[1] = "whole"
    graph.node.insert(0, helper.make_node("Cast", ["input_ids"], ["whole"], to=7))


def fixed_size(graph: Any, model: Any) -> None:
    for value in graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, (1, 128), strict=True):
            dim.dim_value = size


def other_name(graph: Any, model: Any) -> None:
    graph.node[-1].output[0] = graph.output[0].name = "embedding"


def other_rank(graph: Any, model: Any) -> None:
    from onnx import helper

    graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", 1, ["batch", "length", HIDDEN]))
    del graph.node[1:]
    graph.node[0].output[0] = "logits"


def own_operator(graph: Any, model: Any) -> None:
    from onnx import helper

    model.opset_import.append(helper.make_opsetid("evil", 1))
    graph.node[0].domain, graph.node[0].op_type = "evil", "Run"


def few_rows(graph: Any, model: Any) -> None:
    rows = graph.initializer[0]
    rows.raw_data = rows.raw_data[: 8 * 4 * HIDDEN]
    rows.dims[0] = 8


REFUSED = [
    (other_input, "takes an input 'pixel_values' of type tensor\\(int64\\)"),
    (float_ids, "takes an input 'input_ids' of type tensor\\(float\\)"),
    (no_mask, "takes input_ids, without input_ids and attention_mask"),
    (fixed_size, "takes inputs of a fixed size, \\[1, 128\\]"),
    (other_name, "gives embedding \\[2, 2\\] for two texts, but classification needs logits \\[2, 2\\]"),
    (other_rank, "gives logits \\[2, 6, 4\\] for two texts, but classification needs logits \\[2, 2\\]"),
    (own_operator, "onnxruntime cannot open .*model.onnx: .*evil"),
    (few_rows, "onnxruntime cannot run .*model.onnx: .*out of data bounds"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_graph_that_takes_or_gives_something_else(
    tokenizer: Any, data: Path, tmp_path: Path, change: Any, message: str
) -> None:
    folder = write(tmp_path / "graph", tokenizer, change=change)
    with pytest.raises(CapError, match=message) as caught:
        runtime.predictor(runtime.load(folder), "classification", LABELS)
    assert caught.value.exit_code == 2 and "\n" not in caught.value.message
    said = evaluated(folder, data, code=2)["stderr"]
    assert said.startswith("error: ") and "Traceback" not in said


@pytest.mark.parametrize("data", [b"", b"no graph", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_file_that_is_no_graph(tokenizer: Any, tmp_path: Path, data: bytes) -> None:
    folder = write(tmp_path / "graph", tokenizer)
    (folder / "model.onnx").write_bytes(data)
    with pytest.raises(CapError, match=r"model\.onnx") as caught:
        runtime.load(folder)
    assert caught.value.exit_code == 2 and "\n" not in caught.value.message


def test_a_graph_that_is_cut_off(tokenizer: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "graph", tokenizer)
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match=r"^onnxruntime cannot open "):
        runtime.load(folder)


def test_a_graph_of_another_number_of_labels(tokenizer: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "graph", tokenizer)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "id2label": dict(enumerate("abc"))}))
    with pytest.raises(ModelError, match=r"model\.onnx gives 2 logits, 3 are named in config\.json$"):
        runtime.predictor(runtime.load(folder), "classification")


@pytest.mark.parametrize(
    ("name", "message"),
    [("config.json", r"has no config\.json$"), ("tokenizer.json", "has no tokenizer: tokenizer.json or vocab.txt")],
)
def test_a_folder_without_what_belongs_to_the_graph(tokenizer: Any, tmp_path: Path, name: str, message: str) -> None:
    folder = write(tmp_path / "graph", tokenizer)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=message):
        runtime.load(folder)


def test_code_of_its_own_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "graph", tokenizer)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(ModelError, match="needs its own code"):
        runtime.load(folder)


def test_without_onnxruntime(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "graph", tokenizer)
    monkeypatch.setattr(graph, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs onnxruntime to run$") as caught:
        runtime.load(folder)
    assert caught.value.hint == "pip install onnxruntime"


def test_what_a_graph_is_not_for(tokenizer: Any, tiny: Tiny, tmp_path: Path) -> None:
    """Pruning and PyTorch need weights."""
    folder = write(tmp_path / "graph", tokenizer)
    for arguments in (
        ("prune", str(folder), "--task", "text-classification", "--data", tiny.data, "-o", str(tmp_path / "out")),
        ("eval", str(folder), "--task", "text-classification", "--data", tiny.data, "--runtime", "torch"),
        ("eval", str(folder), "--task", "text-classification", "--data", tiny.data, "--runtime", "sparse"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert f"{folder} has ONNX weights only (model.onnx)" in result.stderr
    result = invoke("eval", str(folder), "--task", "text-classification", "--data", tiny.data, "--device", "cuda")
    assert result.exit_code == 2
