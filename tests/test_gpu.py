"""What must hold on a CUDA device. Without one the same tests run on the CPU, so that they do not rot; there they hold
no news about a device, but every call in them is still the right one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PRUNABLE, Tiny, random_examples

import capcli
from capcli import files
from capcli.config.export import ExportConfig
from capcli.config.hardware import Hardware
from capcli.config.names import METHODS
from capcli.data import batches
from capcli.events import Event, StopFlag
from capcli.models import devices, loading
from capcli.models.model import place
from capcli.pruning import banks, losses, topk, train
from capcli.pruning.objective import Job, Objective, Steps
from capcli.pruning.pruner import make_pruner
from capcli.stages import RunFolder

pytest_plugins = ["tiny"]
pytestmark = pytest.mark.gpu
CPU, DEVICE = torch.device("cpu"), torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CUDA = DEVICE.type == "cuda"


@pytest.fixture
def no_host_sync() -> Iterator[Any]:
    """A function after whose call waiting for the device is an error, until the end of the test."""
    mode: Any = torch.cuda.set_sync_debug_mode if ON_CUDA else lambda name: None
    yield lambda: mode("error")
    mode("default")


def random_vectors(n: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=-1)


def job(tiny: Tiny, out: Path, method: str, device: torch.device) -> Job:
    """A pruning phase with all losses of the method, random banks on the device."""
    data = random_examples(64, 12)
    chosen = tiny.prune_config(out, method=method, device=str(device), precision="auto")
    on = devices.compute(chosen.hardware)
    model = place(loading.load_dense(tiny.model, ("negative", "positive"), "classification", 1), on)
    model.net.train()
    width = model.net.config.hidden_size
    table = {
        name: banks.Bank(vectors=[random_vectors(len(data), width, seed).half().to(device) for seed in seeds])
        for name, seeds in (("prc", [1]), ("snc", [2, 3]), ("fic", [4]))
        if name in chosen.loss_names
    }
    objective = Objective(
        losses=chosen.loss_names,
        logits=torch.zeros(len(data), 2, device=device),
        labels=torch.from_numpy(data.labels).to(device),
        banks=table,
    )

    def nothing(*_: int) -> Steps:
        return {}
        yield

    return Job(
        run=RunFolder(out=out, flag=StopFlag()),
        phase="prune",
        model=model,
        examples=data,
        config=chosen,
        on=on,
        epochs=chosen.epochs,
        lr=1e-4,
        objective=objective,
        pruner=make_pruner(model, chosen, total_steps=100),
        snapshot=nothing,
        epoch_end=nothing,
        event=lambda **_: Event(phase="prune"),
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 31, 4096, 100_003])
def test_topk_on_the_device_equals_the_cpu(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=generator)
    tied = (scores * 2).round() / 2  # many ties, zeros of both signs
    for values in (scores, tied, -scores.abs(), torch.zeros(n)):
        for keep in sorted({0, 1, n // 33, n // 2, n - 1, n}):
            assert torch.equal(topk.topk(values.to(DEVICE), keep).cpu(), topk.topk(values, keep)), (n, keep)


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_selection_over_matrices_equals_the_cpu(scope: str) -> None:
    sizes = [256, 1024, 256, 77]
    scores = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))
    for sparsity in (0.0, 0.5, 0.97):
        chosen = topk.select(scores.to(DEVICE), sizes, sparsity, scope)
        assert torch.equal(chosen.cpu(), topk.select(scores, sizes, sparsity, scope))


@pytest.mark.parametrize("method", ["cap-soft", "cap-m", "magnitude"])
def test_run_is_exact_and_loads_on_the_cpu(tiny: Tiny, tmp_path: Path, method: str) -> None:
    report = tiny.prune(tmp_path / "out", method=method, device=DEVICE.type)
    assert DEVICE.type in str(report["device"])
    assert abs(report["sparsity"]["kept_weights"] - topk.kept_count(0.7, PRUNABLE)) <= 1
    assert (report["memory"]["peak_device_bytes"] > 0) == ON_CUDA
    net = capcli.load(tmp_path / "out")
    assert {parameter.device.type for parameter in net.parameters()} == {"cpu"}
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert bool(net(input_ids=ids).logits.isfinite().all())


@pytest.mark.parametrize("chosen", [{}, {"structure": "dimensions"}, {"structure": "dimensions", "losses": "kd,hid"}])
def test_structured_run_is_complete(tiny: Tiny, tmp_path: Path, chosen: dict[str, str]) -> None:
    report = tiny.prune(tmp_path / "out", method="cap-f", sparsity=0.5, device=DEVICE.type, **chosen)
    assert report["status"] == "complete"


def test_bf16_is_the_default() -> None:
    on = devices.compute(Hardware())
    assert on.device.type == DEVICE.type
    assert on.dtype == (torch.bfloat16 if ON_CUDA and torch.cuda.is_bf16_supported() else torch.float32)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not (row.staged or row.one_shot)])
def test_no_host_sync_in_a_step(tiny: Tiny, tmp_path: Path, method: str, no_host_sync: Any) -> None:
    """Neither while the masks change nor at the final sparsity; `tests/pruning/test_no_waiting.py` has the same without
    a device. Staged methods run the network before a rise, and change nothing else in a step.
    """
    one = job(tiny, tmp_path / "out", method, DEVICE)
    optimizer = train.make_optimizer(one)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
    order = batches.training_order(one.examples, one.config.batch_size, 1, 0)
    for step in range(28, 32):
        train.take_step(one, optimizer, scaler, step, 100, order[step % len(order)])
    no_host_sync()
    for step in (*range(32, 36), *range(90, 94)):
        train.take_step(one, optimizer, scaler, step, 100, order[step % len(order)])


def test_banks_live_on_the_device(tmp_path: Path) -> None:
    vectors, logits = random_vectors(10, 8, 0).half(), torch.zeros(10, 2)
    with files.publish(tmp_path / "bank") as staging:
        banks.save(staging, vectors, logits, 0.0, {})
    found = banks.load(tmp_path / "bank", DEVICE, 10, 10)
    assert {tensor.device.type for tensor in found} == {DEVICE.type}
    gathered = banks.Bank(vectors=[found[0], found[0]]).gather(torch.tensor([3, 7], device=DEVICE))
    assert gathered.device.type == DEVICE.type
    assert torch.equal(gathered.cpu(), vectors[[3, 7]][:, None].expand(-1, 2, -1))


@pytest.mark.parametrize("normalization", ["mean", "reference"])
def test_contrastive_terms_equal_the_cpu(normalization: str) -> None:
    batch, n_bank, drawn, width = 16, 3, 50, 24
    labels = torch.arange(batch) % 2
    arguments = (
        random_vectors(batch, width, 0),
        torch.arange(batch),
        labels,
        random_vectors(batch * n_bank, width, 1).view(batch, n_bank, width),
        random_vectors(drawn * n_bank, width, 2).view(drawn, n_bank, width),
        torch.arange(drawn) + 8,
        torch.arange(drawn) % 2,
    )
    found = []
    for device in (CPU, DEVICE):
        z, *rest = (tensor.to(device) for tensor in arguments)
        z = z.detach().requires_grad_()
        terms = losses.contrastive_terms(z, *rest, tau=0.1, normalization=normalization)
        (terms[0] + terms[1]).backward()
        assert z.grad is not None
        found.append([*(term.detach().cpu() for term in terms), z.grad.cpu()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=2e-4, atol=2e-5)


def test_a_run_is_in_bf16_on_the_gpu_by_default(tiny: Tiny, tmp_path: Path) -> None:
    report = tiny.prune(tmp_path / "out", method="magnitude", epochs=1, teacher_epochs=1)
    assert DEVICE.type in str(report["device"])
    assert devices.compute(Hardware(), training=True).precision in str(report["device"])


@pytest.mark.parametrize("to", ["dense", "sparse", "sliced"])
def test_exports_are_compared_and_timed_on_the_device(tiny: Tiny, tmp_path: Path, to: str) -> None:
    tiny.prune(tmp_path / "out", method="cap-f", sparsity=0.6, device=DEVICE.type)
    chosen = ExportConfig(model=str(tmp_path / "out"), to=to, out=str(tmp_path / to), device=DEVICE.type)
    found = capcli.export(chosen)
    assert found["check"]["exact"] and found["check"]["argmax_agreement"] == 1.0
    assert (found["speed"] is not None) == (to == "sliced")
