"""How long answers take: to inputs of a fixed size, to the evaluation texts one by one, and to batches of them.

Everything here takes several systems and times them in turn, so that their figures can be compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capcli import machine
from capcli.config.measure import EvalConfig
from capcli.data.batches import Examples, collate
from capcli.errors import out_of_memory
from capcli.events import changed
from capcli.models.predict import Progress, Run, asked
from capcli.models.predictor import Predictor
from capcli.records.parts import Latency, OwnLengths, Throughput, interval
from capcli.timing import in_turn, median_interval

BATCH, LENGTH = EvalConfig.latency_batch, EvalConfig.latency_length  # where the user chooses nothing else
ROUNDS, LEAST_ROUNDS, WARM_UP = 30, 6, 3  # a median of fewer than 6 has no interval
TEXTS = 200  # that are timed one by one
TEXTS_AT_ONCE, BATCHES = 32, 8
FIXED_SECONDS, TEXT_SECONDS = 4.0, 3.0  # at most, for each system; the texts take this twice

Rows = NDArray[np.int64]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class System:
    """Something that answers: a model with what runs it, and what it is asked.

    inputs: of the fixed size, see `Predictor.full_inputs`. examples: the evaluation texts as it reads them; None where
    only the fixed size is timed. device: where its inputs are made. conditions: what its times depend on, as the
    results say: runtime, threads, processor, device, hardware, precision. whole: the same through all layers, where a
    text may leave early.
    """

    run: Run
    inputs: Mapping[str, Tensor]
    device: torch.device
    conditions: Mapping[str, Any]
    examples: Examples | None = None
    whole: Run | None = None

    @property
    def steady(self) -> Run:
        """What answers in the same time whatever the texts say."""
        return self.whole or self.run


def of(model: Predictor, examples: Examples | None = None, *, batch: int = BATCH, length: int = LENGTH) -> System:
    """A model that answers; its inputs of fixed size are shorter where it cannot read as many tokens."""
    inputs = model.full_inputs(batch, min(length, model.longest))
    return System(
        run=model.run(),
        inputs={name: tensor.to(model.on.device) for name, tensor in inputs.items()},
        device=model.on.device,
        conditions={
            "runtime": model.runtime,
            "threads": model.threads,
            "processor": machine.processor(),
            "device": model.on.device.type,
            "hardware": model.on.name,
            "precision": model.precision,
        },
        examples=examples,
        whole=model.whole,
    )


def measured(systems: Mapping[str, System], seed: int = 1) -> Generator[Progress, None, dict[str, Latency]]:
    """What the results say of the latency of each system, all measured in turn; yields rounds done, of how many.

    The figures of `fixed`, and under `own_lengths` and `throughput` those of `by_text` and `by_batch`.
    """
    n_texts, n_batches = _n_texts(systems), -(-_n_in_batches(systems) // TEXTS_AT_ONCE)
    total = ROUNDS + n_texts + n_batches
    size = yield from _from(0, total, fixed(systems))
    texts = yield from _from(ROUNDS, total, by_text(systems, seed))
    batches = yield from _from(ROUNDS + n_texts, total, by_batch(systems, seed))
    return {name: replace(size[name], own_lengths=texts[name], throughput=batches.get(name)) for name in systems}


def _from(before: int, total: int, work: Generator[Progress, None, T]) -> Generator[Progress, None, T]:
    """Work whose progress begins where other work ended."""
    return changed(work, lambda progress: (before + progress[0], total))


def fixed(systems: Mapping[str, System]) -> Generator[Progress, None, dict[str, Latency]]:
    """Median, 10th and 90th percentile of a forward pass through all layers over the inputs of fixed size, and all
    conditions.

    confidence_95 of the median is the noise of this process; that between processes and machines comes on top.
    """
    calls = [asked(one.steady, one.inputs) for one in systems.values()]
    rounds = in_turn([calls] * ROUNDS, seconds=FIXED_SECONDS * len(calls), least=LEAST_ROUNDS, warm_up=WARM_UP)
    times = yield from rounds
    return {name: _spread(systems[name], sorted(ms)) for name, ms in _by_system(systems, times).items()}


def _spread(system: System, ascending: list[float]) -> Latency:
    batch, length = system.inputs["input_ids"].shape
    return Latency(
        median_ms=statistics.median(ascending),
        p10_ms=ascending[len(ascending) // 10],
        p90_ms=ascending[len(ascending) * 9 // 10],
        confidence_95=interval(median_interval(ascending)),
        batch=batch,
        length=length,
        **system.conditions,
    )


def by_text(systems: Mapping[str, System], seed: int) -> Generator[Progress, None, dict[str, OwnLengths]]:
    """Median and 95th percentile over evaluation texts at their own lengths, one at a time and without padding.

    texts: how many; of questions, windows of their contexts. median_tokens: of a text.
    """
    chosen = sampled(systems, _n_texts(systems), seed)
    for name, rows in chosen.items():
        _ask_each_size(systems[name], rows)
    alone = {name: [rows[at : at + 1] for at in range(len(rows))] for name, rows in chosen.items()}
    times = yield from _asked(systems, alone)
    found = {}
    for name, ms in _by_system(systems, times).items():
        lengths = _examples(systems[name]).lengths[chosen[name][: len(ms)]]
        found[name] = OwnLengths(
            median_ms=statistics.median(ms),
            p95_ms=float(np.percentile(ms, 95)),
            texts=len(ms),
            median_tokens=int(np.median(lengths)),
        )
    return found


def _ask_each_size(system: System, rows: Rows) -> None:
    """Ask a text of each size, in powers of two: some runtimes compile or allocate when a size first comes."""
    examples = _examples(system)
    sizes = np.ceil(np.log2(np.maximum(examples.lengths[rows], 1)))
    for first in np.unique(sizes, return_index=True)[1]:
        asked(system.run, collate(examples, rows[first : first + 1], system.device).inputs)()


def by_batch(systems: Mapping[str, System], seed: int) -> Generator[Progress, None, dict[str, Throughput]]:
    """Texts per second in batches of like lengths, padded to the longest of each; batch: how many texts it holds.
    Nothing where these do not fit into memory."""
    chosen = sampled(systems, _n_in_batches(systems), seed)
    batches = {name: _batches(_examples(systems[name]), rows, seed) for name, rows in chosen.items()}
    try:
        times = yield from _asked(systems, batches)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            return {}
        raise
    found = {}
    for name, ms in _by_system(systems, times).items():
        texts = sum(map(len, batches[name][: len(ms)]))
        rate = 1000 * texts / sum(ms)
        found[name] = Throughput(texts_per_second=rate, batch=len(batches[name][0]), texts=texts)
    return found


def _asked(
    systems: Mapping[str, System], batches: Mapping[str, list[Rows]]
) -> Generator[Progress, None, list[list[float]]]:
    """Seconds of each system for each of its batches; a round is the batch at one place in the list of every system."""
    calls = [
        [asked(one.run, collate(_examples(one), rows, one.device).inputs) for rows in batches[name]]
        for name, one in systems.items()
    ]
    rounds = list(zip(*calls, strict=True))
    return (yield from in_turn(rounds, seconds=TEXT_SECONDS * len(systems)))


def _by_system(systems: Iterable[str], times: list[list[float]]) -> dict[str, list[float]]:
    """The milliseconds of each system, from the seconds of all rounds."""
    return {name: [1000 * row[place] for row in times] for place, name in enumerate(systems)}


def _examples(system: System) -> Examples:
    assert system.examples is not None, "the texts of a system that is timed on them"
    return system.examples


def _n_texts(systems: Mapping[str, System], most: int = TEXTS) -> int:
    """How many texts each system is asked, at most as many as all of them have."""
    return min(most, *(len(_examples(one)) for one in systems.values()))


def _n_in_batches(systems: Mapping[str, System]) -> int:
    """How many texts are asked in batches: whole ones, where the texts are enough for one."""
    n = _n_texts(systems, TEXTS_AT_ONCE * BATCHES)
    return n - n % TEXTS_AT_ONCE or n


def sampled(systems: Mapping[str, System], n: int, seed: int) -> dict[str, Rows]:
    """Rows of `n` texts at even distances, the same for systems that read equally many.

    In an order drawn by `seed`: the first of them, if the time ends there, are a sample too.
    """
    order = np.random.default_rng(seed).permutation(n)
    return {
        name: np.linspace(0, len(_examples(one)) - 1, n).round().astype(np.int64)[order]
        for name, one in systems.items()
    }


def _batches(examples: Examples, rows: Rows, seed: int) -> list[Rows]:
    """The rows in batches of like lengths, in an order drawn by `seed`."""
    rows = np.sort(rows)
    rows = rows[np.argsort(examples.lengths[rows], kind="stable")]
    found = [rows[at : at + TEXTS_AT_ONCE] for at in range(0, len(rows), TEXTS_AT_ONCE)]
    return [found[place] for place in np.random.default_rng(seed).permutation(len(found))]
