"""A training step never waits for its device, and mixes none.

Tensors on `meta` have no data: what asks for a value there raises, as `float(t)`, `bool(t)`, `t.cpu()` or a boolean
index do. Where it says nothing, `OneDevice` does. It is no substitute for `tests/test_gpu.py` on a device: kernels are
not run, and the fused AdamW and the 16-bit products of CUDA are not there.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import registry
import torch
from tiny import random_examples
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification

from capcli.config.names import METHODS
from capcli.config.prune import PruneConfig
from capcli.config.task import TaskConfig
from capcli.data import batches
from capcli.events import Event, StopFlag
from capcli.models import families, hf, predict
from capcli.models.devices import Compute
from capcli.models.model import Model, place
from capcli.pruning import banks, train
from capcli.pruning.calibration import Calibration
from capcli.pruning.gradients import of_importance
from capcli.pruning.objective import Job, Objective, Steps, make_projections
from capcli.pruning.pruner import make_pruner
from capcli.stages import RunFolder

META = torch.device("meta")
N_EXAMPLES, LENGTH, BATCH, EPOCHS = 16, 6, 4, 10
TOTAL = N_EXAMPLES // BATCH * EPOCHS
SHOWN = (0, 12, 13, 14, TOTAL - 1)  # dense, on the way, at the final sparsity; masks change at some of them
COPIES = ("aten::_to_copy", "aten::copy_")
LOOKS = ("aten::nonzero", "aten::masked_select", "aten::bincount", "aten::_unique2", "aten::equal")


class WaitError(Exception):
    """What would wait for a device, or mixes two."""


class OneDevice(TorchDispatchMode):
    """Inside, tensors of the host meet those of the device only as numbers, or in a copy that is not waited for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.name().partition(".")[0], kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(tensor.device == META for tensor in tensors)
        on_host = any(tensor.device != META and tensor.dim() > 0 for tensor in tensors)
        if on_device and name in LOOKS:
            raise WaitError(f"{name} has to know how many there are")
        if name in COPIES:
            wanted = args[0].device if name == "aten::copy_" else torch.device(kwargs.get("device") or args[0].device)
            source = args[1] if name == "aten::copy_" else args[0]
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            if source.device != wanted and source.dim() > 0 and (waits or wanted != META):
                raise WaitError(f"{name} from {source.device} to {wanted} is waited for")
        elif on_device and on_host:
            raise WaitError(f"{name} mixes devices")
        return function(*args, **kwargs)


class OnMeta(Compute):
    """The device without data; no type of device for `torch.autocast`."""

    def autocast(self) -> Any:
        return contextlib.nullcontext()


ON = OnMeta(device=META, dtype=torch.float32)


def network(name: str = "bert", **changes: Any) -> Model:
    config = registry.config_of(name, 24, num_labels=2, pad_token_id=0, **changes)
    net = AutoModelForSequenceClassification.from_config(config)
    family = families.FAMILIES.get(name)
    return Model(net=net, tokenizer=None, family=family, labels=("a", "b"), kind="classification", source="")


def nothing(*_: int) -> Steps:
    return {}
    yield


def job(folder: Path, **options: Any) -> Job:
    """A pruning phase on the device without data, with all losses of its method and a bank for each."""
    config = PruneConfig(source=TaskConfig(task="mr"), sparsity=0.6, batch_size=BATCH, extra_examples=6, **options)
    model, teacher = (place(network(num_hidden_layers=1), ON) for _ in range(2))
    data = random_examples(N_EXAMPLES, LENGTH)
    model.net.train()
    vectors = torch.zeros(N_EXAMPLES, registry.SHAPE["hidden_size"], dtype=torch.float16, device=META)
    counts = {"prc": 1, "snc": 2, "fic": 1}
    names = config.loss_names
    projections = make_projections(teacher, batches.collate(data, np.arange(1), META)) if "hid" in names else None
    objective = Objective(
        losses=names,
        logits=torch.zeros(N_EXAMPLES, 2, device=META),
        labels=torch.zeros(N_EXAMPLES, dtype=torch.int64, device=META),
        banks={name: banks.Bank(vectors=[vectors] * n) for name, n in counts.items() if name in names},
        teacher=teacher,
        projections=projections or torch.nn.ParameterList(),
    )
    made: list[Job] = []
    calibration = Calibration(
        model=model,
        examples=data,
        device=META,
        seed=1,
        count=8,
        block=config.fisher_block,
        gradient=lambda rows, step, leaves: of_importance(made[0], rows, step, leaves),
        batch_size=BATCH,
    )
    made.append(
        Job(
            run=RunFolder(out=folder, flag=StopFlag()),
            phase="prune",
            model=model,
            examples=data,
            config=config,
            on=ON,
            epochs=EPOCHS,
            lr=1e-4,
            objective=objective,
            pruner=make_pruner(model, config, TOTAL, calibration),
            snapshot=nothing,
            epoch_end=nothing,
            event=lambda **about: Event(phase="prune", **about),
        )
    )
    return made[0]


TRAINED = [name for name, row in METHODS.items() if not row.one_shot]
CASES: list[dict[str, Any]] = [
    *({"method": method} for method in TRAINED),
    *({"method": "movement", "scope": scope} for scope in ("matrix", "global")),
    *({"method": "magnitude", "scope": "global", "floor": floor} for floor in (0.0, 0.1)),
    {"method": "magnitude", "losses": "kd,hid"},
    {"method": "soft-movement", "reg_weight": 1.0, "score_init": "zero"},
    *({"method": "cap-f", "structure": "dimensions", **more} for more in ({}, {"losses": "kd,hid"})),
    {"method": "cap-f", "losses": "ce,hid"},
    *({"method": "cap-f", "structure": one, "importance_examples": 8} for one in ("heads", "dimensions")),
    {"method": "cap-soft", "normalization": "reference", "pooling": "mean"},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", CASES, ids=lambda options: " ".join(map(str, options.values())))
def test_no_step_of_a_run_waits(tmp_path: Path, options: dict[str, Any]) -> None:
    """Dense, on the way, at the final sparsity; where a rise measures on examples, all but that."""
    one = job(tmp_path, **options)
    assert one.pruner is not None
    optimizer, scaler = train.make_optimizer(one), torch.amp.GradScaler("meta", enabled=False)
    measured = 0
    for step in SHOWN:
        if one.pruner.measures(step):  # `test_what_a_rise_measures` has these
            one.pruner.sparsity = one.pruner.scheduled(step)
            measured += 1
        rows = np.arange(BATCH) + step % (N_EXAMPLES // BATCH) * BATCH
        with OneDevice():
            terms = train.take_step(one, optimizer, scaler, step, TOTAL, rows)
        assert terms["total"].device == META
    assert one.pruner.sparsity == 0.6
    assert bool(measured) == (METHODS[options["method"]].staged or "importance_examples" in options)


MEASURED: list[tuple[dict[str, Any], str]] = [
    ({"method": "cap-f", "importance_examples": 8}, ""),
    ({"method": "cap-f", "importance_examples": 8, "structure": "dimensions"}, ""),
    ({"method": "fisher"}, ""),
    ({"method": "fisher", "refit": False, "fisher_block": 4}, ""),
    ({"method": "obert", "fisher_block": 4}, "which blocks lose weights"),
    ({"method": "fisher", "refit": True}, "which tokens are real"),
    *(({"method": name, "epochs": 0}, "which tokens are real") for name in METHODS if METHODS[name].one_shot),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "why"), MEASURED, ids=[" ".join(map(str, one.values())) for one, _ in MEASURED])
def test_what_a_rise_measures(tmp_path: Path, options: dict[str, Any], why: str) -> None:
    """What fits layers waits, for it takes the real tokens out of a batch, and so does what corrects blocks."""
    pruner = job(tmp_path, **options).pruner
    assert pruner is not None
    step = next(step for step in range(TOTAL) if pruner.measures(step))
    with OneDevice(), pytest.raises((RuntimeError, WaitError)) if why else contextlib.nullcontext():
        pruner.update(step)


def test_the_loop_looks_at_the_loss_every_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And at the end of a row of the history, of which there is one here."""
    monkeypatch.setattr(train, "HISTORY_ROWS", 1)
    one = dataclasses.replace(job(tmp_path, method="cap-soft"), steps=1000)
    one = dataclasses.replace(one, config=dataclasses.replace(one.config, batch_size=1))
    events, done = train.train(one), []
    with OneDevice(), pytest.raises(RuntimeError, match="item"):
        for event in events:
            done.append(event.done)
    assert done == list(range(1, train.LOSS_EVERY))


WAITING = {
    "mpnet": "attends in a way of its own, and transformers looks for padding",
    "convbert": "the same",
    "bart": "takes the vector of the last token, and looks where it is",
}


@pytest.mark.parametrize("name", registry.ROWS)
def test_families_that_wait_are_known(name: str) -> None:
    model = place(network(name), ON)
    model.net.train()
    waits = (RuntimeError, NotImplementedError, WaitError)
    with OneDevice(), pytest.raises(waits) if name in WAITING else contextlib.nullcontext():
        batch = batches.collate(random_examples(N_EXAMPLES, LENGTH), np.arange(BATCH), META)
        logits, vector = predict.forward(model, batch.inputs)
        (logits.sum() + vector.sum()).backward()


@pytest.mark.parametrize(
    "waits",
    [
        lambda on_device, host: float(on_device.sum()),
        lambda on_device, host: on_device if on_device.any() else host,
        lambda on_device, host: on_device.cpu(),
        lambda on_device, host: on_device.tolist(),
        lambda on_device, host: on_device[on_device > 0],
        lambda on_device, host: on_device.nonzero(),
        lambda on_device, host: on_device + host,
        lambda on_device, host: on_device @ host,
        lambda on_device, host: on_device[host.long()],
        lambda on_device, host: on_device.copy_(host),
        lambda on_device, host: host.to(on_device.device),
    ],
)
def test_what_waits_is_noticed(waits: Callable[[Tensor, Tensor], Any]) -> None:
    on_device, host = torch.zeros(2, device=META), torch.zeros(2)
    with OneDevice(), pytest.raises((RuntimeError, WaitError, NotImplementedError)):
        waits(on_device, host)


def test_padding_is_masked_as_before() -> None:
    """An accelerator gets the logits of a CPU, with and without padding, and the network can go back."""
    model, data = network(), random_examples(N_EXAMPLES, LENGTH)
    model.net.eval()
    short = np.array([0, 3, *range(9, 9 + 2 * LENGTH, LENGTH)], dtype=np.int64)
    padded = dataclasses.replace(data, tokens=data.tokens[: short[-1]], offsets=short, labels=data.labels[:3])
    seen = copy.deepcopy(model)
    hf.attend(seen.net, META)
    assert seen.net.config._attn_implementation == hf.UNSEEN
    assert model.net.config._attn_implementation == "sdpa"
    for one in (data, padded):
        batch = batches.collate(one, np.arange(3), torch.device("cpu"))
        found, wanted = (predict.forward(each, batch.inputs)[0] for each in (seen, model))
        torch.testing.assert_close(found, wanted)
    assert "unseen" not in str(seen.net.config.to_dict())
    hf.attend(seen.net, torch.device("cpu"))
    assert seen.net.config._attn_implementation == "sdpa"
