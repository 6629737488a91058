"""A model on sparse weights answers as the dense one does: every family and kind, every way to store it, any thread."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import registry
import torch
from tiny import ROOT, TOKENIZERS, environment, forked, wait
from torch import Tensor

from capcli.artifact.entry import Factors
from capcli.errors import ConfigError, FileError, ModelError
from capcli.models import artifact, families, loading, predict, stock
from capcli.models.model import WEIGHTS_FILE, Model, copy, sliced
from capcli.runtime import families as rows
from capcli.runtime import sparse
from capcli.runtime.packing import Unsupported

KINDS = ("classification", "tokens", "spans")
SHORT = [12, 1, 5, 9, 12]  # texts that share tiles
MOST = 1e-4  # largest difference


def make(folder: Path, family: str, kind: str = "classification", sparsity: float = 0.7, **changes: Any) -> Model:
    """A random model of which this share of the weights is zero, biases and norms random too."""
    if not (folder / "config.json").is_file():
        registry.write(family, folder, TOKENIZERS, **changes)
    model = loading.load_dense(str(folder), ("x", "y", "z") if kind != "regression" else (), kind, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for linear in model.prunable().values():
            linear.weight[torch.rand(linear.weight.shape, generator=generator) < sparsity] = 0
    return model


def inputs_of(model: Model, lengths: list[int], *, left: bool = False) -> dict[str, Tensor]:
    """Random texts of these lengths, padded at one side."""
    generator = torch.Generator().manual_seed(2)
    padding = model.tokenizer.pad_token_id
    ids = torch.randint(5, model.net.config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    found = {"input_ids": ids.where(mask.bool(), padding), "attention_mask": mask}
    if "token_type_ids" in model.input_names:
        found["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
    return found


def check_same(model: Model, found: sparse.SparseModel, inputs: dict[str, Tensor]) -> None:
    """Logits, vectors and states, those of padding left out."""
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        for pooling in ("head", "cls", "mean"):
            expected, vector = predict.forward(model, inputs, pooling)
            logits, own = found.run(pooling)(inputs)
            assert own is not None
            per_token = expected.dim() == 3
            assert (logits - expected)[real if per_token else ...].abs().max() < MOST
            assert (own - vector).abs().max() < MOST
        taken = {name: inputs[name] for name in inputs if name in (*model.input_names, "attention_mask")}
        whole = model.net(**taken, output_hidden_states=True)
    out = found(**taken, output_hidden_states=True)
    assert len(out.hidden_states) == len(whole.hidden_states)
    for ours, theirs in zip(out.hidden_states, whole.hidden_states, strict=True):
        assert (ours - theirs)[real].abs().max() < MOST
    assert out["last_hidden_state"] is out.hidden_states[-1]
    alone = found(**taken)
    assert "hidden_states" not in alone
    assert (alone["last_hidden_state"] - out["last_hidden_state"])[real].abs().max() < MOST
    names = ("start_logits", "end_logits") if model.kind == "spans" else ("logits",)
    assert all((out[name] - whole[name])[real if whole[name].dim() > 1 and per_token else ...].abs().max() < MOST
               for name in names)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", rows.ROWS)
def test_every_family_and_kind(tmp_path: Path, family: str, kind: str) -> None:
    model = make(tmp_path, family, kind)
    found = sparse.from_model(model, threads=1)
    for left in (False, True):
        check_same(model, found, inputs_of(model, SHORT, left=left))
    assert found.nnz == model.nonzero()


def test_every_family_that_is_not_served_is_refused(tmp_path: Path) -> None:
    for family in sorted(families.FAMILIES.keys() - rows.ROWS.keys()):
        model = make(tmp_path / family, family)
        with pytest.raises(Unsupported, match=f"does not know {family} models"):
            sparse.from_model(model)


def test_a_family_outside_the_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="is a convbert model, whose heads and neurons capcli does not know"):
        sparse.from_model(make(tmp_path, "convbert"))


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "silu", "swish"])
def test_every_activation(tmp_path: Path, name: str) -> None:
    model = make(tmp_path, "bert", hidden_act=name)
    check_same(model, sparse.from_model(model, threads=1), inputs_of(model, SHORT))


def test_configurations_that_are_not_served_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"^the runtime for sparse weights does not know the activation 'tanh'$"):
        sparse.from_model(make(tmp_path / "a", "bert", hidden_act="tanh"))
    model = make(tmp_path / "b", "bert")
    model.net.config.is_decoder = True
    with pytest.raises(Unsupported, match="decoders"):
        sparse.from_model(model)


def test_local_attention_and_groups_of_layers(tmp_path: Path) -> None:
    local = make(tmp_path / "local", "modernbert", local_attention=6, num_hidden_layers=4)
    found = sparse.from_model(local, threads=1)
    for left in (False, True):
        check_same(local, found, inputs_of(local, [40, 3, 17, 21], left=left))
    shared = make(tmp_path / "shared", "albert", num_hidden_layers=5, num_hidden_groups=2, inner_group_num=2)
    check_same(shared, sparse.from_model(shared, threads=1), inputs_of(shared, SHORT))


def test_more_tokens_than_rotary_positions_are_refused(tmp_path: Path) -> None:
    model = make(tmp_path, "modernbert")
    found = sparse.from_model(model, threads=1)
    check_same(model, found, inputs_of(model, [66]))
    with pytest.raises(ValueError, match=r"^a text has 67 tokens; this model has positions for 66$"):
        found(**inputs_of(model, [67]))


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet", "modernbert"])
def test_sliced_layers(tmp_path: Path, family: str) -> None:
    size = {"dim": 48, "n_heads": 3, "hidden_dim": 40} if family == "distilbert" else {
        "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 40}  # fmt: skip
    model = make(tmp_path / "model", family, **size)
    with torch.no_grad():
        for layer in model.layers():
            layer.neurons.slots[0].linear.weight[:17] = 0
            layer.neurons.slots[-1].linear.weight[:, :17] = 0
            if family != "mpnet":
                layer.heads.reader.weight[:, :16] = 0
    small = sliced(model)
    check_same(small, sparse.from_model(small, threads=1), inputs_of(model, SHORT))
    artifact.save_artifact(small, tmp_path / "out", list(small.prunable()), {})
    found = sparse.load(tmp_path / "out", threads=1)
    assert found.model.is_sliced
    check_same(small, found, inputs_of(model, SHORT))


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["bits", "fp16", "int8", "factors", "nothing kept", "dense"])
def test_an_artefact_answers_as_when_it_is_loaded_dense(tmp_path: Path, stored: str) -> None:
    model = make(tmp_path / "model", "bert", sparsity={"nothing kept": 1.0, "dense": 0.0}.get(stored, 0.8))
    names, tensors = list(model.prunable()), dict(model.net.state_dict())
    if stored == "fp16":
        tensors |= {name: tensors[name].half() for name in names}
    if stored == "factors":
        tensors[names[0]] = Factors(torch.randn(16, 3), torch.randn(3, 16))  # type: ignore[assignment]
    pruned = [name for name in names if not isinstance(tensors[name], Factors)]
    quantised = pruned if stored == "int8" else []
    artifact.save_artifact(model, tmp_path / "out", pruned, {}, tensors, quantised)
    dense, found = artifact.load_artifact(tmp_path / "out"), sparse.load(tmp_path / "out", threads=1)
    check_same(dense, found, inputs_of(model, SHORT))
    assert found.nnz == dense.nonzero()
    assert found.model.labels == ("x", "y", "z")
    matrices = found.model.prunable().values()
    assert all(linear.weight.is_meta for linear in matrices)


def test_an_artefact_with_a_weight_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "bert")
    name, linear = list(model.prunable().items())[3]
    with torch.no_grad():
        linear.weight[0, 0] = torch.inf
    artifact.save_artifact(model, tmp_path / "out", list(model.prunable()), {})
    with pytest.raises(ModelError, match=f"values that are not finite, in 1 tensors, first {name}"):
        sparse.load(tmp_path / "out")


def test_a_damaged_artefact_is_refused(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "bert")
    artifact.save_artifact(model, tmp_path / "out", list(model.prunable()), {})
    path = tmp_path / "out" / WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileError, match="sha256"):
        sparse.load(tmp_path / "out")


@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel", "tokens", "spans"])
def test_a_stock_folder_says_itself_what_it_is_for(tmp_path: Path, kind: str) -> None:
    model = make(tmp_path / "model", "bert", kind)
    stock.save_dense(model, tmp_path / "out")
    found = sparse.load(tmp_path / "out", threads=1)
    assert found.model.kind == kind
    assert found.nnz == model.nonzero()
    check_same(model, found, inputs_of(model, SHORT))


def test_a_stock_folder_without_a_task_is_refused(tmp_path: Path) -> None:
    registry.write("bert", tmp_path, TOKENIZERS)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json of .* names no network for a task: 'BertForMaskedLM'$"):
        sparse.load(tmp_path)


# Models --------------------------------------------------------------------------------------------------------------


def test_the_model_that_it_is_made_from_is_left_as_it_is(tmp_path: Path) -> None:
    model = make(tmp_path, "bert")
    before = {name: tensor.clone() for name, tensor in model.net.state_dict().items()}
    found = sparse.from_model(model, threads=1)
    after = model.net.state_dict()
    assert all((after[name] == before[name]).all() for name in before)
    embeddings = model.net.base_model.embeddings.word_embeddings.weight
    assert found.model.net.base_model.embeddings.word_embeddings.weight is embeddings
    other = copy(found.model)  # as everything that copies models does
    inputs = inputs_of(model, SHORT)
    assert (predict.forward(other, inputs)[0] - predict.forward(model, inputs)[0]).abs().max() < MOST


def test_networks_of_other_types_get_theirs_back(tmp_path: Path) -> None:
    model = make(tmp_path, "bert")
    double = dataclasses.replace(model, net=copy(model).net.double())
    out = sparse.from_model(double, threads=1)(**inputs_of(model, SHORT))
    assert out.logits.dtype == torch.float64


def test_inputs_that_it_does_not_take_are_named(tmp_path: Path) -> None:
    found = sparse.from_model(make(tmp_path, "bert"), threads=1)
    with pytest.raises(TypeError, match="does not take encoder_hidden_states"):
        found.model.net.base_model(torch.ones(1, 3).long(), encoder_hidden_states=torch.ones(1, 3, 16))


def test_without_a_mask_everything_is_real(tmp_path: Path) -> None:
    model = make(tmp_path, "bert")
    inputs = inputs_of(model, [7, 7])
    found = sparse.from_model(model, threads=1)
    assert (found(input_ids=inputs["input_ids"]).logits - found(
        input_ids=inputs["input_ids"], attention_mask=torch.ones(2, 7)).logits).abs().max() == 0  # fmt: skip


def test_a_text_without_a_token_attends_to_nothing(tmp_path: Path) -> None:
    model = make(tmp_path, "bert")
    inputs = inputs_of(model, [7, 7])
    inputs["attention_mask"][1] = 0
    with torch.inference_mode():
        expected = model.net(**inputs).logits
    assert (sparse.from_model(model, threads=1)(**inputs).logits - expected).abs().max() < MOST


# Threads and processes -----------------------------------------------------------------------------------------------


def test_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 5, 7}, raising=False)
    assert sparse.usable_threads(0) == (3, ())
    assert sparse.usable_threads(2) == (2, ())
    assert sparse.usable_threads(1000) == (3, ("1,000 threads were asked for, this process may use 3",))
    with pytest.raises(ConfigError, match="threads must be 0 or more, got -1"):
        sparse.usable_threads(-1)


def test_threads_are_described_and_noted(tmp_path: Path) -> None:
    model = make(tmp_path, "bert")
    found = sparse.from_model(model, threads=1000)
    there = len(os.sched_getaffinity(0))
    assert found.threads == there
    assert found.model.notes[-1] == f"1,000 threads were asked for, this process may use {there}"
    assert sparse.from_model(model, threads=1).described.endswith(", 1 thread")


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Model, sparse.SparseModel]:
    """A dense model and the same on two threads, wherever the tests run."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    model = make(tmp_path, "bert")
    return model, sparse.from_model(model, threads=2)


def test_two_threads_answer_as_one(pair: tuple[Model, sparse.SparseModel]) -> None:
    for lengths in ([60], [60, 60], [60, 2, 33], [3] * 50, [1]):
        check_same(*pair, inputs_of(pair[0], lengths))


def test_several_models_and_several_threads_at_once(pair: tuple[Model, sparse.SparseModel], tmp_path: Path) -> None:
    model, found = pair
    other = make(tmp_path / "other", "distilbert")
    sides = [(model, found), (other, sparse.from_model(other, threads=2))]
    work = [(a, b, inputs_of(a, [n, 60, 1])) for n in range(2, 60, 3) for a, b in sides]
    with torch.inference_mode():
        expected = [predict.forward(dense, inputs)[0] for dense, _, inputs in work]
    start = threading.Barrier(4)

    def ask(place: int) -> list[Tensor]:
        start.wait()
        return [runs.run()(inputs)[0] for _, runs, inputs in work[place::4]]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(4)))
    for place, found_logits in enumerate(answers):
        for logits, right in zip(found_logits, expected[place::4], strict=True):
            assert (logits - right).abs().max() < MOST


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_after_a_fork(pair: tuple[Model, sparse.SparseModel]) -> None:
    model, found = pair
    inputs = inputs_of(model, [60])
    expected = found.run()(inputs)[0]  # with a helping thread, which the child does not have

    def again() -> None:
        assert torch.equal(found.run()(inputs)[0], expected)

    assert wait(forked(again)) == 0


# Processors and installations ----------------------------------------------------------------------------------------


PROGRAM = """
import sys, torch
from pathlib import Path
from capcli.models import artifact, predict
from capcli.runtime import sparse
dense, found = artifact.load_artifact(Path(sys.argv[1])), sparse.load(Path(sys.argv[1]), threads=1)
ids = torch.arange(5, 15).repeat(3, 1)
mask = torch.ones_like(ids)
mask[1, 3:] = 0
inputs = {"input_ids": ids, "attention_mask": mask}
with torch.inference_mode():
    difference = (predict.forward(dense, inputs)[0] - found.run()(inputs)[0]).abs().max().item()
print(found.described, difference < 1e-4, sep="|")
"""


X86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}  # by its name alone it has those of this one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("described", "changes"),
    [
        pytest.param("AVX2", AVX2, marks=pytest.mark.skipif(not X86, reason="needs x86")),
        ("generic", {"NUMBA_CPU_NAME": "generic"}),
    ],
)
def test_other_processors(tmp_path: Path, described: str, changes: dict[str, str]) -> None:
    """AVX2, and a processor of which nothing is known: fewer sums at once, and other instructions."""
    model = make(tmp_path / "model", "bert")
    artifact.save_artifact(model, tmp_path / "out", list(model.prunable()), {})
    assert in_a_process(tmp_path / "out", **changes) == f"sparse, numba, {described}, 1 thread|True"


def in_a_process(folder: Path, **changes: str) -> str:
    env = environment(PYTHONPATH=str(ROOT), **changes)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_numba_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "find_spec", lambda name: None)
    calls: list[Callable[[], Any]] = [lambda: sparse.load(tmp_path), lambda: sparse.from_model(None)]  # type: ignore
    for call in calls:
        with pytest.raises(Unsupported, match=r"^the runtime for sparse weights needs numba$") as error:
            call()
        assert error.value.hint == "pip install capcli[fast]"


def test_where_numba_is_not_to_compile_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    with pytest.raises(Unsupported, match="NUMBA_DISABLE_JIT keeps numba from compiling"):
        sparse.load(tmp_path)
