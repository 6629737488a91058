"""Exits for a model: trained on vectors of its layers, with a threshold that held-out examples choose.

Letters: N examples, L layers, C labels, H hidden size, B batch, S tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from capcli.data import batches, splits
from capcli.data.batches import Examples
from capcli.data.splits import Split
from capcli.errors import ModelError
from capcli.events import Event, part_of, told
from capcli.exporting.job import Export
from capcli.measuring import classifiers, scoring
from capcli.models import exits, predict, predictor
from capcli.models.model import Exits, Model, place
from capcli.records.exported import ExitRow, ExitTable

THRESHOLDS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DROP = 0.01  # by how much the accuracy on the held-out part may fall below that of all layers
HELD_OUT, MOST, SEED = 0.2, 20_000, 1  # share of the training set that chooses; examples that are read at most

Read = tuple[Tensor, Tensor, Examples]  # vectors [N, L-1, H], logits of the model [N, C], the examples


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What every layer answers to some examples: logits [N, L, C], those of the model itself last; labels [N]."""

    logits: Tensor
    examples: Examples

    def at(self, threshold: float) -> tuple[Tensor, Tensor]:
        """Logits [N, C] of the first layer that is sure of an example, and how many [L] leave after each layer."""
        sure = exits.uncertainty(self.logits) < threshold
        sure[:, -1] = True
        index = sure.int().argmax(dim=1)
        taken = torch.bincount(index, minlength=self.logits.shape[1])
        return self.logits[torch.arange(len(index)), index], taken

    def accuracy(self, threshold: float) -> float:
        """The share of examples that get the right label."""
        right = self.at(threshold)[0].argmax(dim=1) == torch.from_numpy(self.examples.labels)
        return float(right.double().mean())


def made(job: Export) -> Generator[Event, None, tuple[Model, ExitTable]]:
    """The model with exits, and what there is to say of them. Raises `ModelError` for data that do not serve."""
    train, held = _parts(job)
    place(job.model, job.on)
    sizes = len(train), len(held), len(job.known.held_out)
    ends = [0.1 + 0.5 * sum(sizes[:i]) / sum(sizes) for i in range(4)]  # as shares of the export
    vectors, own, examples = yield from part_of(_read(job, train, "exits, training set"), ends[0], ends[1] - ends[0])
    wanted = (np.eye(own.shape[1])[examples.labels] + own.double().softmax(dim=-1).numpy()) / 2
    weight, bias = classifiers.heads(vectors.numpy(), wanted, SEED)
    found = Exits(weight=weight, bias=bias, threshold=0.0)
    read = yield from part_of(_read(job, held, "exits, held-out part"), ends[1], ends[2] - ends[1])
    chosen = _answers(found, read)
    read = yield from part_of(_read(job, job.known.held_out, "exits, evaluation"), ends[2], ends[3] - ends[2])
    measured = _answers(found, read)
    found = dataclasses.replace(found, threshold=best(chosen))
    return dataclasses.replace(job.model, exits=found), ExitTable(
        layers=len(bias) + 1,
        train=len(examples),
        held_out=len(held),
        seen=job.known.data.holdout is None,
        drop=DROP,
        threshold=found.threshold,
        split=job.known.held_out.name,
        metric=job.known.data.primary,
        rows=_rows(job, chosen, measured),
    )


def best(answers: Answers) -> float:
    """The largest threshold up to which the accuracy stays within `DROP` of that of all layers."""
    least, found = answers.accuracy(0.0) - DROP, 0.0
    for threshold in THRESHOLDS:
        if answers.accuracy(threshold) < least - 1e-9:
            break
        found = threshold
    return found


def _parts(job: Export) -> tuple[Split, Split]:
    """The examples that exits are trained on, and those that choose the threshold: what the run held out, if it did."""
    data = job.known.data
    if data.train is None or not data.has_labels:
        raise ModelError(
            f"exits are trained on the labelled training set of a task, and {job.config.model} has none here",
            "name the data with --data",
        )
    if data.labels != job.original.labels:
        raise ModelError(
            f"the labels of the data are not those of {job.config.model}", "map them by name with --label-map"
        )
    if data.holdout is not None:
        return splits.subset(data.train, MOST, SEED), data.holdout
    train, held = splits.subsets(splits.subset(data.train, MOST, SEED), HELD_OUT, 0, SEED)
    return train, splits.need_holdout(held)


def _read(job: Export, split: Split, phase: str) -> Generator[Event, None, Read]:
    """What each exit reads of the texts of a split, and what the model answers; one pass of the network as it is."""
    model, on = job.model, job.on
    examples = scoring.encoded(predictor.of_network(model, on), split, job.known.source)
    hooks = exits.watch(model)

    def run(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        given = {name: tensor.to(on.device) for name, tensor in inputs.items()}
        vectors: list[Tensor] = []
        with exits.looked(lambda states: vectors.append(exits.pooled(states, given["attention_mask"]))):
            logits, _ = predict.forward(model, given)
        return logits, torch.stack(vectors[:-1], dim=1)

    rows = batches.evaluation_batches(examples, on.token_budget)
    try:
        asking = predict.outputs(run, examples, rows, on.device, room=on.room)
        logits, vectors = yield from told(asking, partial(_event, phase))
    finally:
        for hook in hooks:
            hook.remove()
    return vectors.cpu(), logits.cpu(), examples


def _event(phase: str, done: float, total: float) -> Event:
    return Event(phase=phase, done=done, total=total, overall=done / total)


def _answers(found: Exits, read: Read) -> Answers:
    vectors, own, examples = read
    each = torch.einsum("nlh,lch->nlc", vectors.float(), found.weight) + found.bias
    return Answers(logits=torch.cat([each, own[:, None]], dim=1), examples=examples)


def _rows(job: Export, chosen: Answers, measured: Answers) -> tuple[ExitRow, ...]:
    """By threshold: the metric and the layers that were needed on the evaluation split, and accuracy held out."""
    data, shares, rows = job.known.data, exits.costs(job.model), []
    for threshold in THRESHOLDS:
        logits, taken = measured.at(threshold)
        names = (data.primary,)
        scores = scoring.scored(
            data.kind, job.model.labels, measured.examples, names, logits, with_intervals=False
        ).metrics
        rows.append(
            ExitRow(
                threshold=threshold,
                value=scores[data.primary],
                held_out=chosen.accuracy(threshold),
                layers=exits.mean_layers(taken),
                macs=exits.mean_cost(taken, shares),
            )
        )
    return tuple(rows)
