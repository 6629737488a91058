"""A model that answers: what measuring, probing, checking and the pages need of one, whatever computes it.

Training needs the network itself and takes `Model`; everything that only asks takes a `Predictor`.

Letters: C labels, H hidden size, N examples, T tokens of all examples.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from capcli.config.names import MOST
from capcli.data.batches import Examples, evaluation_batches
from capcli.models import predict
from capcli.models.devices import Compute
from capcli.models.exits import Exiting
from capcli.models.model import Model, longest_input
from capcli.models.predict import Progress, Run
from capcli.records.parts import Runtime


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A model that answers: its texts go through the tokenizer into `run`.

    kind, labels, source, notes: as of `Model`; the logits are in the order of the labels. longest: tokens of the
    longest input. on: the device that inputs are made for, and the type that is computed in. runtime: what computes, a
    name of `RUNTIMES`; described: that in words; threads: of the CPU. alone: an answer depends on the other texts of a
    batch, so that each text is asked by itself wherever answers count. asking: the `Run` for a pooling, see
    `predict.forward`. network: what answers, where it has hidden states to show, see `predict.forward_states`. model:
    the network as it was loaded, with all of its weights. An ONNX graph has neither. chosen: which runtime was taken,
    and why, where there was a choice. exits: what answers, where texts may leave early.
    """

    source: str
    kind: str
    labels: tuple[str, ...]
    tokenizer: Any
    longest: int
    on: Compute
    runtime: str
    described: str
    threads: int
    asking: Callable[[str], Run]
    alone: bool = False
    network: Model | None = None
    model: Model | None = None
    notes: tuple[str, ...] = ()
    chosen: str = ""
    exits: Exiting | None = None

    def run(self, pooling: str = "head") -> Run:
        """What answers: inputs [B, S] -> logits, and the sentence vectors of this pooling where it gives any."""
        return self.asking(pooling)

    @property
    def whole(self) -> Run:
        """The same through all layers, also where texts may leave early."""
        return self.run() if self.exits is None else predict.running(self.exits.model, self.on)

    def full_inputs(self, batch: int, length: int) -> Any:
        """`batch` inputs of `length` tokens each, as latency is measured on."""
        text = "a " * length  # each word is a token at least
        return self.tokenizer([text] * batch, truncation=True, max_length=length, return_tensors="pt")

    def asked(self, inputs: Any) -> Callable[[], object]:
        """A call that returns when the answer to these inputs is there."""
        return predict.asked(self.run(), inputs)

    @property
    def token_budget(self) -> int:
        """Tokens of an evaluation batch, padding included; of 1 every text is a batch."""
        return 1 if self.alone else self.on.token_budget

    @property
    def precision(self) -> str:
        """The type that is computed in, such as `float32`."""
        return "int8" if self.alone else self.on.precision

    @property
    def batching(self) -> str:
        """How texts are put together wherever answers count, in words."""
        return "one text at a time" if self.alone else "several texts at a time"

    @property
    def row(self) -> Runtime:
        """What a result says of the runtime."""
        return Runtime(
            name=self.runtime,
            described=self.described,
            threads=self.threads,
            batching=self.batching,
            chosen=self.chosen,
        )

    def answers(self, examples: Examples) -> Generator[Progress, None, Tensor]:
        """Logits [N, C], or [T, C], of tokenised examples, see `predict.outputs`; yields how many are done."""
        rows = evaluation_batches(examples, self.token_budget)
        logits, _ = yield from predict.outputs(self.run(), examples, rows, self.on.device, room=self.on.room)
        return logits


def with_exits(model: Model, on: Compute) -> Predictor:
    """A network with exits, which a text leaves as soon as one is sure."""
    found = Exiting(model)
    plain = of_network(model, on)
    return replace(plain, described=f"{plain.described}, exits", asking=lambda pooling: found.run(on), exits=found)


def of_network(model: Model, on: Compute) -> Predictor:
    """A network that PyTorch computes on its device. The caller puts it into eval mode, see `predict.evaluating`."""
    return Predictor(
        source=model.source,
        kind=model.kind,
        labels=model.labels,
        tokenizer=model.tokenizer,
        longest=longest_input(model, MOST),
        on=on,
        runtime="torch",
        described=f"torch {torch.__version__}",
        threads=torch.get_num_threads(),
        asking=lambda pooling: predict.running(model, on, pooling),
        network=model,
        model=model,
        notes=model.notes,
    )
