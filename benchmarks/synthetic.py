"""Training jobs on token batches of exact shapes and on random banks: what the step and memory benchmarks time.

Letters: N examples, S tokens per example, H hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from capcli.config.layers import prune_config
from capcli.config.prune import PruneConfig
from capcli.data import batches
from capcli.data.batches import Examples
from capcli.events import Event, StopFlag
from capcli.models import families
from capcli.models.devices import Compute
from capcli.models.model import Model, place
from capcli.pruning import banks, train
from capcli.pruning.objective import Job, Objective, Steps
from capcli.pruning.pruner import make_pruner
from capcli.stages import RunFolder

LABELS = ("negative", "positive")
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def random_bert(shape: dict[str, int]) -> Model:
    """A BERT with random weights; no download, no tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    net = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", num_labels=2, **shape))
    family = families.FAMILIES["bert"]
    return Model(net=net, tokenizer=None, family=family, labels=LABELS, kind="classification", source="random")


def random_examples(n: int, length: int, vocabulary: int) -> Examples:
    """N examples of exactly `length` random tokens and two classes."""
    rng = np.random.default_rng(0)
    return Examples(
        tokens=rng.integers(5, vocabulary, n * length, dtype=np.int32),
        types=np.zeros(n * length, dtype=np.uint8),
        offsets=np.arange(n + 1, dtype=np.int64) * length,
        labels=rng.integers(0, 2, n),
        pad_id=0,
    )


def random_vectors(n: int, width: int, seed: int) -> torch.Tensor:
    """Normalised vectors [N, H] in 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, width, generator=generator), dim=-1).half()


def random_bank_table(n: int, width: int, device: torch.device) -> dict[str, banks.Bank]:
    """One vector per example for prc and fic, three for snc: a run in its fourth epoch."""
    return {
        name: banks.Bank(vectors=[random_vectors(n, width, seed).to(device) for seed in seeds])
        for name, seeds in (("prc", [1]), ("snc", [2, 3, 4]), ("fic", [5]))
    }


def settings(**chosen: Any) -> PruneConfig:
    """A configuration of `cap prune`; model and task are names only."""
    return prune_config({"model": "synthetic", "task": "sst2", "method": "cap-soft", **chosen})


def plain_job(model: Model, examples: Examples, on: Compute, chosen: PruneConfig) -> Job:
    """Plain fine-tuning: the task loss alone."""
    return _job(model, examples, on, chosen, "teacher", Objective(losses=("ce",)))


def cap_job(
    model: Model,
    examples: Examples,
    on: Compute,
    chosen: PruneConfig,
    table: dict[str, banks.Bank] | None = None,
) -> Job:
    """All losses of the method, with masks on the model and random banks unless given."""
    if table is None:
        table = random_bank_table(len(examples), model.net.config.hidden_size, on.device)
    objective = Objective(
        losses=chosen.loss_names,
        logits=torch.randn(len(examples), len(model.labels), device=on.device),
        labels=torch.from_numpy(examples.labels).to(on.device),
        banks={name: bank for name, bank in table.items() if name in chosen.loss_names},
    )
    return _job(model, examples, on, chosen, "prune", objective)


def _job(
    model: Model,
    examples: Examples,
    on: Compute,
    chosen: PruneConfig,
    phase: str,
    objective: Objective,
) -> Job:
    total = chosen.epochs * train.steps_per_epoch(examples, chosen.batch_size)
    place(model, on)
    model.net.train()

    def nothing(*_: int) -> Steps:
        return {}
        yield

    return Job(
        run=RunFolder(out=Path("unused"), flag=StopFlag()),
        phase=phase,
        model=model,
        examples=examples,
        config=chosen,
        on=on,
        epochs=chosen.epochs,
        lr=chosen.lr,
        objective=objective,
        pruner=make_pruner(model, chosen, total) if phase == "prune" else None,
        snapshot=nothing,
        epoch_end=nothing,
        event=lambda **_: Event(phase=phase),
    )


class Stepper:
    """Does one training step after the other, in the middle of the schedule, where the masks change."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.optimizer = train.make_optimizer(job)
        self.scaler = torch.amp.GradScaler(job.on.device.type, enabled=job.on.dtype == torch.float16)
        self.order = batches.training_order(job.examples, job.config.batch_size, 0, 0)
        self.total = job.config.epochs * len(self.order)
        self.index = 0

    def __call__(self) -> dict[str, torch.Tensor]:
        rows = self.order[self.index % len(self.order)]
        step = min(self.total * 3 // 10 + self.index, self.total - 1)
        self.index += 1
        return train.take_step(self.job, self.optimizer, self.scaler, step, self.total, rows)
