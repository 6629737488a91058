"""Which runtime is taken, what is said of it, and what happens where one cannot compute the model."""

import dataclasses
import importlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import Tiny, invoke

import capcli
from capcli.config.hardware import Hardware
from capcli.config.names import RUNTIMES
from capcli.errors import CapError, ConfigError, ModelError
from capcli.models import artifact, devices, predict
from capcli.models.model import Model
from capcli.models.predictor import Predictor
from capcli.runtime import choice

HERE = Hardware(device="cpu", threads=1)


class Other:
    """A runtime that stands in for the sparse one: it computes in PyTorch and says so."""

    described = "stand-in 1.0"

    def __init__(self, model: Model, threads: int) -> None:
        self.model, self.threads = dataclasses.replace(model), threads

    def run(self, pooling: str = "head") -> predict.Run:
        return predict.running(self.model, devices.compute(HERE), pooling)


def stand_in(
    monkeypatch: pytest.MonkeyPatch, ms: Sequence[float] = (2.1, 9.8), refusal: CapError | None = None
) -> None:
    """The sparse runtime is `Other`, or refuses; it and PyTorch take these milliseconds."""

    def from_model(model: Model, threads: int) -> Other:
        if refusal is not None:
            raise refusal
        return Other(model, threads)

    module = SimpleNamespace(from_model=from_model, load=lambda folder, threads, base: ("loaded", folder, threads))
    monkeypatch.setattr(choice, "sparse", module)
    monkeypatch.setattr(choice, "measured", lambda models: [value / 1000 for value in ms])


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("choice") / "out"
    tiny.prune(out)
    return out


def opened(folder: Path, runtime: str, **hardware: Any) -> Predictor:
    changed = dataclasses.replace(HERE, **hardware)
    return choice.opened(str(folder), runtime, changed, labels=("negative", "positive"), kind="classification")


@pytest.mark.parametrize(
    ("runtime", "ms", "taken", "said"),
    [
        ("", (1, 2), "torch", ""),
        ("torch", (1, 2), "torch", ""),
        ("auto", (2.1, 9.8), "sparse", "runtime: sparse (2.10 ms against 9.80 ms of torch, batch 1 x 64)"),
        ("auto", (9.8, 2.1), "torch", "runtime: torch (2.10 ms against 9.80 ms of sparse, batch 1 x 64)"),
        ("sparse", (2.1, 9.8), "sparse", "runtime: sparse (2.10 ms against 9.80 ms of torch, batch 1 x 64)"),
        (
            "sparse",
            (9.8, 2.1),
            "sparse",
            "runtime: sparse, as asked for, but torch is faster (2.10 ms against 9.80 ms of sparse, batch 1 x 64)",
        ),
    ],
)
def test_the_faster_is_taken_or_the_one_asked_for(
    pruned: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, ms: Any, taken: str, said: str
) -> None:
    stand_in(monkeypatch, ms)
    found = opened(pruned, runtime)
    assert (found.runtime, found.chosen) == (taken, said)
    assert found.described == ("stand-in 1.0" if taken == "sparse" else f"torch {torch.__version__}")
    assert found.threads == 1
    assert found.model is not None and found.model.nonzero() > 0  # the weights as they were loaded
    assert (found.network is found.model) == (taken == "torch")


REFUSALS = [
    (ModelError("the runtime for sparse weights needs numba", "pip install capcli[fast]"), {}),
    (ModelError("the sparse runtime computes on the CPU in fp32, not on cpu in bfloat16"), {"precision": "bf16"}),
]


@pytest.mark.parametrize(("refusal", "hardware"), REFUSALS)
def test_what_the_sparse_runtime_cannot_compute_goes_to_torch(
    pruned: Path, monkeypatch: pytest.MonkeyPatch, refusal: CapError, hardware: dict[str, str]
) -> None:
    stand_in(monkeypatch, refusal=refusal)
    found = opened(pruned, "auto", **hardware)
    assert (found.runtime, found.chosen) == ("torch", f"runtime: torch ({refusal.message})")


def test_a_numba_that_cannot_be_loaded_is_passed_over(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for lack of memory, after all training."""

    load = importlib.import_module

    def fail(name: str, *rest: Any) -> Any:
        if name == "numba":
            raise OSError("cannot map shared object\nand more")
        return load(name, *rest)

    monkeypatch.setattr(importlib, "import_module", fail)
    found = opened(pruned, "auto")
    assert found.runtime == "torch"
    assert found.chosen == "runtime: torch (numba cannot be loaded: cannot map shared object)"


def test_by_name_it_is_an_error(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, refusal=REFUSALS[0][0])
    with pytest.raises(ModelError, match=r"needs numba$"):
        opened(pruned, "sparse")
    with pytest.raises(ConfigError, match=r"^the sparse runtime computes in fp32, not in bf16$"):
        opened(pruned, "sparse", precision="bf16")
    with pytest.raises(ConfigError, match=r"^the sparse runtime computes on the CPU, not on cuda$"):
        opened(pruned, "sparse", device="cuda")
    with pytest.raises(ConfigError, match=r" has no model\.onnx$") as caught:
        opened(pruned, "onnx")
    assert caught.value.hint == f"write one: cap export {pruned} --to onnx"


def test_the_measurement_is_of_both_on_the_same_input_by_turns(pruned: Path) -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    def asking(name: str) -> Any:
        def run(inputs: Any) -> Any:
            seen.append((name, tuple(inputs["input_ids"].shape)))
            return torch.zeros(1, 2), None

        return lambda pooling: run

    torch_ = opened(pruned, "")
    models = [dataclasses.replace(torch_, asking=asking(name)) for name in "ab"]
    seconds = choice.measured(models)
    assert len(seconds) == 2 and all(value > 0 for value in seconds)
    assert {shape for _, shape in seen} == {(1, 64)}
    assert [name for name, _ in seen] == ["a", "b"] * (len(seen) // 2) and 4 <= len(seen) <= 62


def test_the_command_says_what_it_took_and_gates_see_it(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    said = "runtime: sparse (2.10 ms against 9.80 ms of torch, batch 1 x 64)"
    options = ("--latency-length", "8", "--max-latency-ms", "60000", "--threads", "1", "--json")
    result = invoke("eval", str(pruned), "--runtime", "auto", *options)
    assert result.exit_code == 0 and said in result.stderr
    found, plain = json.loads(result.stdout), json.loads(invoke("eval", str(pruned), *options, "-q").stdout)
    assert found["runtime"] == {
        "name": "sparse",
        "described": "stand-in 1.0",
        "threads": 1,
        "batching": "several texts at a time",
        "chosen": said,
    }
    assert said in found["notes"] and found["latency"]["runtime"] == "sparse"
    assert (plain["runtime"]["name"], plain["runtime"]["chosen"]) == ("torch", "")
    for name in ("metrics", "size", "sparsity"):
        assert found[name] == plain[name]


def test_a_probe_keeps_vectors_of_each_runtime_apart(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    sizes = ("--max-train-samples", "20", "--max-eval-samples", "20", "--seeds", "1", "--threads", "1")
    found = {}
    for runtime in ("sparse", "torch"):
        for layer in ("last", "all"):
            result = invoke(
                "probe", str(pruned), "--tasks", "mr", "--runtime", runtime, "--layer", layer, *sizes, "--json", "-q"
            )
            assert result.exit_code == 0, result.stderr
            found[runtime, layer] = json.loads(result.stdout)
    for layer in ("last", "all"):
        assert found["sparse", layer]["runtime"] == "sparse"
        assert found["sparse", layer]["tasks"] == found["torch", layer]["tasks"]  # the same network, here


def test_an_unknown_name(pruned: Path) -> None:
    for command in (("eval", str(pruned)), ("probe", str(pruned))):
        result = invoke(*command, "--runtime", "spars")
        assert result.exit_code == 2
        assert f"did you mean sparse? valid: {', '.join(RUNTIMES)}" in " ".join(result.stderr.split())
    with pytest.raises(ConfigError, match="unknown runtime 'fast'"):
        capcli.load(pruned, runtime="fast")


# capcli.load ---------------------------------------------------------------------------------------------------------


def test_loading_by_name_and_by_speed(
    pruned: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(monkeypatch)
    assert capcli.load(pruned, runtime="sparse", threads=2) == ("loaded", str(pruned), 2)
    assert type(capcli.load(pruned)).__name__ == "BertForSequenceClassification"
    with caplog.at_level(logging.INFO, "capcli"):
        assert isinstance(capcli.load(pruned, runtime="auto"), Other)
    assert caplog.messages == ["runtime: sparse (2.10 ms against 9.80 ms of torch, batch 1 x 64)"]
    stand_in(monkeypatch, (2, 1))
    assert type(capcli.load(pruned, runtime="auto")).__name__ == "BertForSequenceClassification"


@pytest.mark.parametrize("to", ["dense", "sparse", "onnx"])
def test_every_export_is_measured_and_loaded_without_another_word(pruned: Path, tmp_path: Path, to: str) -> None:
    """Its task and its data are known, wherever the run was."""
    folder = tmp_path / to
    assert invoke("export", str(pruned), "--to", to, "-o", str(folder), "--threads", "1", "-q").exit_code == 0
    options = ("--latency-length", "8", "--threads", "1", "--json", "-q")
    found = {}
    for name, place in (("run", pruned), ("export", folder)):
        result = invoke("eval", str(place), *options)
        assert result.exit_code == 0, result.stderr
        found[name] = json.loads(result.stdout)
    assert found["export"]["metrics"] == pytest.approx(found["run"]["metrics"], abs=1e-6)
    for name in ("n_examples", "labels", "task"):
        assert found["export"][name] == found["run"][name]
    weights = {"dense": "model.safetensors", "sparse": "model.cap.safetensors", "onnx": "model.onnx"}[to]
    assert found["export"]["size"]["weights_bytes"] == (folder / weights).stat().st_size
    words = capcli.load_tokenizer(folder)(["a good film", "bad"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected, given = (capcli.load(place)(**words).logits for place in (pruned, folder))
    assert torch.allclose(expected, given, atol=1e-5)
    assert artifact.stored_source(str(folder)) == artifact.stored_source(str(pruned))


def test_8_bits_are_scored_as_the_export_scored_them(pruned: Path, tmp_path: Path) -> None:
    folder = tmp_path / "int8"
    export = ("export", str(pruned), "--to", "onnx", "--int8", "-o", str(folder), "--threads", "1", "-q")
    assert invoke(*export).exit_code == 0
    found = json.loads(invoke("eval", str(folder), "--latency-length", "8", "--threads", "1", "--json", "-q").stdout)
    record = json.loads((folder / "export.json").read_text())
    assert {name: found["metrics"][name] for name in record["metrics"]["after"]} == record["metrics"]["after"]
    assert found["runtime"]["batching"] == record["batching"] == "one text at a time"


def test_a_folder_with_weights_and_a_graph_goes_to_torch_unless_asked_otherwise(pruned: Path, tmp_path: Path) -> None:
    for to in ("dense", "onnx"):
        options = ("--to", to, "-o", str(tmp_path / to), "--threads", "1", "-q")
        assert invoke("export", str(pruned), *options).exit_code == 0
    (tmp_path / "onnx" / "model.onnx").rename(tmp_path / "dense" / "model.onnx")
    for runtime, taken in (("", "torch"), ("torch", "torch"), ("onnx", "onnx")):
        assert opened(tmp_path / "dense", runtime).runtime == taken
