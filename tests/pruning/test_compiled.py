"""Layers that are compiled compute what they did before. Most tests have the layers traced, and run what was traced as
it is: that needs no C++ compiler."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import registry
import torch
from tiny import Tiny, outcome
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForSequenceClassification

from capcli.config.prune import PruneConfig
from capcli.config.task import TaskConfig
from capcli.data import batches
from capcli.data.batches import Examples
from capcli.errors import ConfigError, RunFailed, Stopped
from capcli.events import Event, StopFlag
from capcli.models import compiled, families
from capcli.models.devices import Compute
from capcli.models.model import Model
from capcli.pruning import banks, train
from capcli.pruning.objective import Job, Objective, Split, Steps, make_projections, outputs
from capcli.pruning.pruner import make_pruner
from capcli.stages import RunFolder

CPU = torch.device("cpu")
TOTAL = 41
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
Graphs = list[torch.fx.GraphModule]


def examples() -> Examples:
    """Of lengths 5, 6, 7 and 8."""
    rng, lengths = np.random.default_rng(0), np.arange(32) // 2 % 4 + 5
    return Examples(
        tokens=rng.integers(5, 20, lengths.sum(), dtype=np.int32),
        types=np.zeros(lengths.sum(), dtype=np.uint8),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        labels=rng.integers(0, 2, 32),
        pad_id=0,
    )


def network(name: str, layers: int, seed: int = 0) -> Model:
    """A random network without dropout, of so many layers (0 for those of the family)."""
    changes: dict[str, Any] = dict.fromkeys(DROPOUTS, 0.0) | ({"num_hidden_layers": layers} if layers else {})
    config = registry.config_of(name, 24, num_labels=2, pad_token_id=0, **changes)
    torch.manual_seed(seed)
    net = AutoModelForSequenceClassification.from_config(config)
    return Model(
        net=net,
        tokenizer=None,
        family=families.FAMILIES.get(name),
        labels=("a", "b"),
        kind="classification",
        source=name,
    )


def nothing(*_: int) -> Steps:
    return {}
    yield


def job(
    folder: Path, family: str = "bert", *, layers: int = 2, precision: torch.dtype = torch.float32, **options: Any
) -> Job:
    """A pruning phase in which every loss has something to compare."""
    config = PruneConfig(source=TaskConfig(task="mr"), sparsity=0.6, batch_size=4, extra_examples=6, **options)
    data, model, teacher = examples(), network(family, layers), network(family, layers, seed=1)
    teacher.net.requires_grad_(False)
    rng = torch.Generator().manual_seed(2)
    vectors = nn.functional.normalize(torch.randn(len(data), 16, generator=rng), dim=-1).half()
    names = config.loss_names
    objective = Objective(
        losses=names,
        logits=torch.randn(len(data), 2, generator=rng),
        labels=torch.from_numpy(data.labels),
        banks={name: banks.Bank(vectors=[vectors]) for name in ("prc", "snc", "fic") if name in names},
        teacher=teacher,
        projections=make_projections(teacher, batches.collate(data, np.arange(1), CPU)),
    )
    model.net.train()
    return Job(
        run=RunFolder(out=folder, flag=StopFlag()),
        phase="prune",
        model=model,
        examples=data,
        config=config,
        on=Compute(device=CPU, dtype=precision),
        epochs=5,
        lr=1e-3,
        objective=objective,
        pruner=make_pruner(model, config, TOTAL),
        snapshot=nothing,
        epoch_end=nothing,
        event=lambda **_: Event(phase="prune"),
        split=Split(examples=config.micro_batch),
    )


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """What was traced, where all is traced anew."""
    found: Graphs = []
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, inputs: found.append(graph) or graph.forward)
    torch.compiler.reset()
    return found


def steps(one: Job, numbers: list[int]) -> list[dict[str, Tensor]]:
    optimizer, scaler = train.make_optimizer(one), torch.amp.GradScaler("cpu", enabled=False)
    rows = [np.arange(4) + step % 8 * 4 for step in numbers]
    return [train.take_step(one, optimizer, scaler, n, TOTAL, some) for n, some in zip(numbers, rows, strict=True)]


CASES: list[tuple[dict[str, Any], int]] = [
    ({"method": "cap-soft", "layers": 4}, 1),
    ({"method": "cap-soft", "precision": torch.bfloat16}, 1),
    ({"method": "magnitude", "losses": "kd,hid", "layers": 4}, 3),  # transformers takes the hidden states in between
    ({"method": "pins"}, 1),
    ({"method": "cap-f", "structure": "dimensions", "losses": "kd,hid"}, 3),
    ({"method": "cap-soft", "family": "albert"}, 1),
    ({"method": "magnitude", "family": "distilbert", "layers": 0}, 1),
    ({"method": "cap-soft", "micro_batch": 2}, 3),  # two lengths, without gradients and with them
    ({"method": "magnitude", "family": "llama"}, 2),  # keys and values for later tokens
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "traced"), CASES, ids=[" ".join(map(str, one.values())) for one, _ in CASES])
def test_steps_are_the_same(tmp_path: Path, options: dict[str, Any], traced: int, graphs: Graphs) -> None:
    """Dense, on the way, at the final sparsity; losses, weights, scores, and what is remembered; all layers share what
    was traced for the first of them."""
    plain, other = job(tmp_path, **options), job(tmp_path, **options)
    other = dataclasses.replace(other, layers=compiled.layers(other.model))
    numbers = [0, 8, 16, 24, 32, TOTAL - 1]  # batches of texts of the same lengths
    for ours, theirs in zip(steps(other, numbers), steps(plain, numbers), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(graphs) == traced, "as many for any number of layers"
    torch.testing.assert_close(other.model.net.state_dict(), plain.model.net.state_dict())
    assert plain.pruner is not None and other.pruner is not None
    torch.testing.assert_close(other.pruner.tensors(), plain.pruner.tensors())
    assert torch.equal(other.pruner.matrices.mask, plain.pruner.matrices.mask)


def test_lengths_are_traced_twice_at_most(tmp_path: Path, graphs: Graphs) -> None:
    one = job(tmp_path, method="magnitude")
    one = dataclasses.replace(one, layers=compiled.layers(one.model))
    steps(one, list(range(8)))
    assert len(graphs) == 2, "the first length, and any other"


def test_a_network_is_left_as_it_was(tmp_path: Path, graphs: Graphs) -> None:
    """After a pass, and after one that fails, the layers run as before, and masks are made from the weights."""
    one = job(tmp_path, method="cap-m")
    layers = compiled.layers(one.model)
    one = dataclasses.replace(one, layers=layers)
    batch = batches.collate(one.examples, np.arange(4), CPU)
    outputs(one, batch)
    with pytest.raises(ZeroDivisionError), one.running():
        assert all("forward" in vars(block) for block in layers.blocks)
        raise ZeroDivisionError
    assert one.pruner is not None
    assert not any("forward" in vars(block) for block in layers.blocks)
    for linear in one.pruner.matrices.linears:
        assert parametrize.is_parametrized(linear, "weight") and "weight" not in vars(linear)
    one.pruner.matrices.mask.zero_()
    assert not one.pruner.matrices.linears[0].weight.any()


def test_what_cannot_be_compiled_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no such instruction")

    torch.compiler.reset()
    monkeypatch.setattr(compiled, "BACKEND", broken)
    one = job(tmp_path, method="magnitude")
    one = dataclasses.replace(one, layers=compiled.layers(one.model))
    with pytest.raises(RunFailed) as failed:
        outputs(one, batches.collate(one.examples, np.arange(4), CPU))
    assert "BertLayer could not be compiled" in failed.value.message and "no such instruction" in failed.value.message
    assert failed.value.hint == "leave out --compile to continue"
    with pytest.raises(ConfigError, match="no such instruction") as refused:
        compiled.check(CPU)
    assert refused.value.hint == "leave out --compile"


def test_an_error_of_a_layer_is_not_taken_for_one_of_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    torch.compiler.reset()
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, inputs: full)
    one = job(tmp_path, method="magnitude")
    one = dataclasses.replace(one, layers=compiled.layers(one.model))
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        outputs(one, batches.collate(one.examples, np.arange(4), CPU))


def test_lengths_are_few_on_an_accelerator(tmp_path: Path) -> None:
    """Multiples of 16, of 8 without compiled layers, but not more than the texts were cut to; as they are on a CPU."""
    one = job(tmp_path, method="magnitude")
    layers, on = compiled.layers(one.model), Compute(device=torch.device("meta"), dtype=torch.float32)
    short = dataclasses.replace(one.examples, length=10)
    widths = []
    for other in (one, dataclasses.replace(one, layers=layers)):
        for compute, data in ((one.on, one.examples), (on, one.examples), (on, short)):
            this = dataclasses.replace(other, on=compute, examples=data)
            rows = np.arange(2)
            batch = batches.collate(this.examples, rows, compute.device, this.padded(rows))
            widths.append(batch.inputs["input_ids"].shape[1])
    assert widths == [5, 8, 8, 5, 16, 10]


def run(tiny: Tiny, out: Path, **options: Any) -> dict[str, Any]:
    return tiny.prune(out, method="cap-soft", epochs=2, teacher_epochs=1, **options)


def test_a_run_goes_on_without_it(tiny: Tiny, tmp_path: Path, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced draws its dropout as before, so that the whole run gives the same bytes."""
    take: Callable[..., Any] = train.take_step
    taken: list[int] = []

    def stopping(one: Job, optimizer: Any, scaler: Any, step: int, total: int, rows: Any) -> dict[str, Tensor]:
        taken.append(step)
        if one.phase == "prune" and step == 3:
            one.run.flag.reason = "a test"
        terms: dict[str, Tensor] = take(one, optimizer, scaler, step, total, rows)
        return terms

    monkeypatch.setattr(train, "take_step", stopping)
    with pytest.raises(Stopped):
        run(tiny, tmp_path / "out", compile=True)
    assert graphs
    graphs.clear()
    monkeypatch.setattr(train, "take_step", take)
    report = run(tiny, tmp_path / "out")
    assert not graphs and report["config"]["compile"] is False
    run(tiny, tmp_path / "plain")
    assert outcome(tmp_path / "out") == outcome(tmp_path / "plain")


@pytest.mark.rare
@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="there is no C++ compiler")
def test_compiled_code_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    compiled.check(CPU)
    plain, other = (job(tmp_path, method="cap-soft") for _ in range(2))
    other = dataclasses.replace(other, layers=compiled.layers(other.model))
    for ours, theirs in zip(steps(other, [0, 8, 16]), steps(plain, [0, 8, 16]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
