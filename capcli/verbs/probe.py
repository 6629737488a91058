"""`cap probe`: what a frozen encoder still knows about tasks that it was not pruned for.

Letters: R vectors of a split, L layers, H hidden size, S seeds, C outputs, B resamples.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from capcli import parallel
from capcli.config.measure import ProbeConfig
from capcli.config.paths import portable
from capcli.config.task import TaskConfig
from capcli.data import cache, dataset
from capcli.data.batches import Examples, collate
from capcli.data.kinds import KINDS, NO_LABEL
from capcli.data.splits import Split, TaskData
from capcli.errors import ConfigError, FileError
from capcli.events import Event, finished, told
from capcli.measuring import answers, chance, classifiers, gates, latency, metrics, noise, vectors
from capcli.measuring.probing import MEAN, SHARE, Array, Baseline, Score, guessing, with_mean
from capcli.records.codec import from_json, to_json
from capcli.records.measured import ProbeBaseline, ProbeResult, TaskScore
from capcli.records.parts import Latency, ModelSize
from capcli.reporting.text import named
from capcli.stored import part, read_json

SPARE = 0.2  # of a task without test examples that is held out
BATCH_SIZE = 32
CACHE_FORMAT = 2
TAKES = "--baseline takes models and files written by cap probe --json"
Maker = Callable[..., Event]


@dataclass(frozen=True, kw_only=True)
class Probed:
    """One task: the scores of its layers, from the lowest to the one that counts, and what is told about them."""

    scores: tuple[Score, ...]
    about: TaskScore

    @property
    def score(self) -> Score:
        """That of the highest layer."""
        return self.scores[-1]

    def row(self, layer: str) -> TaskScore:
        """For the result."""
        layers = tuple(score.layer(index) for index, score in enumerate(self.scores))
        last = {name: value for name, value in vars(layers[-1]).items() if name != "layer"}
        last |= {"chance": self.score.chance, "at_chance": self.score.at_chance}
        return replace(self.about, **last, layers=layers if layer == "all" else None)


def probe(config: ProbeConfig) -> Generator[Event, None, ProbeResult]:
    """Train classifiers on frozen vectors of the model for each task; yields events, returns the result.

    Per task, each of `config.seeds` probes is trained on a random part of the same training examples, and all are
    tested on the same examples. The interval of their mean comes from resampled examples and probes; that of the
    difference to a baseline from the same resamples, as both had the same examples. Common to all ranks.
    """
    with parallel.joined(config.timeout):
        return (yield from _result(config))


def _result(config: ProbeConfig) -> Generator[Event, None, ProbeResult]:
    stored = {source: _stored(source, config) for source in config.baselines if Path(source).is_file()}
    data = {name: _task_data(config, name) for name in config.task_names}
    bounds = {name: metrics.bounds(one.primary) for name, one in data.items()}
    bounds[MEAN] = noise.mean_bounds(bounds.values())
    gates.require(config.gates, bounds, bounds)
    sources = [config.model, *(source for source in config.baselines if source not in stored)]
    encoders = {source: _encoder(config, source, config.runtime * (source == config.model)) for source in sources}
    found: dict[str, dict[str, Probed]] = {}
    notes = [f"{name}: {note}" for name, one in data.items() for note in (*one.notes, *_own_ways(config, one))]
    for place, (source, encoder) in enumerate(encoders.items()):
        found[source] = {}
        for index, (name, one) in enumerate(data.items()):
            share = _Share(begin=(place + index / len(data)) / len(encoders), width=1 / len(data) / len(encoders))
            found[source][name] = yield from _probed(config, encoder, one, share)
        notes += [f"{source}: {note}" for note in (*encoder.notes, *encoder.on.room.notes)]
        encoder.release()
    ours, encoder = found[config.model], encoders[config.model]
    baselines = [
        _from_file(source, ours, stored[source])
        if source in stored
        else _measured(source, ours, found[source], config.layer)
        for source in config.baselines
    ]
    rows = {name: one.row(config.layer) for name, one in ours.items()}
    notes += guessing({config.model: rows, **{str(one.row.model): one.row.tasks for one in baselines}})
    first, speed = baselines[0] if baselines else None, _latency(encoder, config)
    checked = gates.check(config.gates, _evidence(ours, first, encoder, speed))
    result = ProbeResult(
        model=config.model,
        sha256=encoder.sha256,
        runtime=encoder.computing,
        probe=config.probe,
        layer=config.layer,
        pooling=config.pooling,
        seeds=config.seeds,
        seed=config.seed,
        tasks=rows,
        mean=_scores(ours)[MEAN].estimate.row(),
        chance=_scores(ours)[MEAN].chance,
        baselines=tuple(baseline.shown() for baseline in baselines),
        size=ModelSize(weights_bytes=encoder.weights_bytes),
        latency=speed,
        notes=tuple(notes),
        gates=checked,
        passed=all(gate.passed for gate in checked),
    )
    return portable(result, config)


def _encoder(config: ProbeConfig, source: str, runtime: str) -> vectors.Encoder:
    same = {name: getattr(config, name) for name in ("layer", "pooling", "hardware", "seed")}
    return vectors.Encoder(source=source, runtime=runtime, **same)


def _task_data(config: ProbeConfig, name: str) -> TaskData:
    return dataset.load(config.source(name), max_train=config.max_train_samples, seed=config.seed, spare=SPARE)


def _latency(encoder: vectors.Encoder, config: ProbeConfig) -> Latency | None:
    """Milliseconds of one input of 128 tokens; only measured for a gate."""
    if not config.gates.max_latency_ms:
        return None
    system = latency.of(encoder.model)
    found = parallel.by_first(lambda: to_json(finished(latency.fixed({"": system}))[""]))
    return from_json(Latency, found, "a latency")


def _probe_of(config: ProbeConfig, data: TaskData) -> str:
    """The probe of a task: a head where no linear model answers tasks of its kind."""
    return config.probe if classifiers.LINEAR[data.kind] is not None else "head"


def _own_ways(config: ProbeConfig, data: TaskData) -> list[str]:
    """Which of the options do not count for a task."""
    found = []
    if KINDS[data.kind].per_token:
        found.append("each token is probed, so --pool has no effect")
    if config.probe != _probe_of(config, data):
        found.append("the answers are places in a window, so a head is trained")
    return found


# One task ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Share:
    """The part of the whole run that one task of one model is."""

    begin: float
    width: float

    def progress(self, phase: str, begin: float, width: float) -> Maker:
        """Events of the part of it from `begin`, `width` wide."""

        def event(done: float = 0, total: float = 0, note: str = "") -> Event:
            inside = begin + (width * done / total if total else 0)
            return Event(phase=phase, done=done, total=total, overall=self.begin + self.width * inside, note=note)

        return event


def _probed(
    config: ProbeConfig, encoder: vectors.Encoder, data: TaskData, share: _Share
) -> Generator[Event, None, Probed]:
    assert data.train is not None, "a training split was asked for"
    phase, test = f"probe {data.name}", next(iter(data.evals.values()))
    source = config.source(data.name)
    known = yield from _vectors(encoder, data.train, source, share.progress(phase, 0.0, 0.4))
    asked = yield from _vectors(encoder, test, source, share.progress(phase, 0.4, 0.4))
    outputs = yield from _outputs(config, known, asked, data, share.progress(phase, 0.8, 0.2))
    about = TaskScore(
        metric=data.primary,
        probe=_probe_of(config, data),
        vector="token" if KINDS[data.kind].per_token else config.pooling,
        split=test.name,
        data=test.fingerprint,
        max_length=source.longest,
        n_train=len(_part(len(data.train), 0)),
        n_examples=len(test),
        n_classes=len(data.labels),
    )
    return Probed(scores=_scored(data, asked, outputs, [config.seed, zlib.crc32(data.name.encode())]), about=about)


def _vectors(
    encoder: vectors.Encoder, split: Split, source: TaskConfig, event: Maker
) -> Generator[Event, None, vectors.Vectors]:
    def encoding(done: float, total: float) -> Event:
        return event(done, total, "" if done else f"encoding {split.name} with {encoder.source}")

    return (yield from told(encoder.vectors(split, source), encoding))


def _scored(data: TaskData, asked: vectors.Vectors, outputs: Array, seed: Sequence[int]) -> tuple[Score, ...]:
    """The scores of the layers, of outputs [S, L, R, C] for the test vectors."""
    n_seeds, n_layers = outputs.shape[:2]
    given: list[Any] = [np.asarray(one, dtype=np.float64) for one in outputs.reshape(-1, *outputs.shape[2:])]
    truth: Any = asked.split.labels
    if asked.examples is not None:
        pairs = [answers.read(data.kind, data.labels, asked.examples, one) for one in given]
        truth, given = pairs[0][0], [answer for _, answer in pairs]
    names = (data.primary,)
    values = np.array([metrics.measure(data.kind, names, truth, one)[data.primary] for one in given])
    drawn = metrics.resampled(data.kind, names, truth, given, seed)[data.primary]  # [S * L, B]
    share = metrics.METRICS[data.kind][data.primary].wilson
    by_chance = chance.of(data.kind, names, truth, given[0])[data.primary]
    picks = np.random.default_rng([*seed, 1]).integers(n_seeds, size=(n_seeds, drawn.shape[1]))
    return tuple(
        Score(
            values=values[layer::n_layers],
            draws=np.take_along_axis(drawn[layer::n_layers], picks, axis=0).mean(axis=0),
            n_examples=len(asked.split) if share else 0,
            chance=by_chance,
        )
        for layer in range(n_layers)
    )


def _part(n: int, seed: int) -> Array:
    """The examples, ascending, that the probe of a seed is trained on."""
    order = np.random.default_rng([seed, n]).permutation(n)
    return np.sort(order[: max(2, round(SHARE * n))])


def _outputs(
    config: ProbeConfig, known: vectors.Vectors, asked: vectors.Vectors, data: TaskData, event: Maker
) -> Generator[Event, None, Array]:
    """Outputs [S, L, R, C] of every probe for the test vectors; kept on disk as the vectors are."""
    labels = _labels(known)
    what = (
        known.key,
        asked.key,
        hashlib.sha256(labels.tobytes()).hexdigest(),
        data.kind,
        data.primary,
        _n_outputs(data),
    )
    how = (config.probe, config.seeds, config.seed, version("scikit-learn"), version("torch"))
    key = vectors.digest([CACHE_FORMAT, *what, *how])
    if found := cache.find("answers", key):
        return found.arrays["outputs"]
    n_layers, rows = known.values.shape[1], []
    for index in range(config.seeds):
        for layer in range(n_layers):
            yield event(note="" if index or layer else "training the probes")
            with threadpool_limits(1):  # matrices so small take longer with more
                rows.append(_answered(config, known, asked, labels, data, layer, config.seed + index))
    outputs = np.stack(rows).astype(np.float32).reshape(config.seeds, n_layers, *rows[0].shape)
    cache.mapped(key, lambda: iter([cache.Piece(arrays={"outputs": outputs}, n_cut=0)]), "answers")
    return outputs


def _n_outputs(data: TaskData) -> int:
    return KINDS[data.kind].n_outputs(len(data.labels))


def _labels(known: vectors.Vectors) -> Array:
    """The labels of the training vectors: [R], for multilabel [R, C], for spans [windows, 2]."""
    return np.asarray(known.examples.labels if known.examples is not None else known.split.labels)


def _answered(
    config: ProbeConfig,
    known: vectors.Vectors,
    asked: vectors.Vectors,
    labels: Array,
    data: TaskData,
    layer: int,
    seed: int,
) -> Array:
    """Outputs [R, C] of one probe."""
    examples, test = known.examples, asked.values[:, layer]
    rows = _part(len(examples) if examples is not None else len(labels), seed)
    if _probe_of(config, data) == "head":
        batches = functools.partial(_batches, labels, examples, rows, seed)
        return classifiers.head(data.kind, known.values[:, layer], batches, test, _n_outputs(data), seed)
    if examples is not None:
        inside = np.zeros(len(examples), dtype=bool)
        inside[rows] = True
        rows = np.flatnonzero(np.repeat(inside, examples.lengths) & (labels != NO_LABEL))
    metric = data.primary if KINDS[data.kind].single else ""
    return classifiers.linear(data.kind, known.values[rows, layer], labels[rows], test, _n_outputs(data), seed, metric)


def _batches(
    labels: Array, examples: Examples | None, rows: Array, seed: int, epoch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Shuffled batches of an epoch, see `classifiers.Batches`."""
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    for begin in range(0, len(order), BATCH_SIZE):
        some = order[begin : begin + BATCH_SIZE]
        if examples is None:
            yield torch.from_numpy(some), torch.from_numpy(labels[some]), None
            continue
        batch = collate(examples, some, torch.device("cpu"))
        assert batch.places is not None, "it answers per token"
        yield batch.places, batch.labels, batch.inputs["attention_mask"]


# Results -------------------------------------------------------------------------------------------------------------


def _scores(found: Mapping[str, Probed]) -> dict[str, Score]:
    """Those of the tasks, and their mean."""
    return with_mean({name: one.score for name, one in found.items()})


def _measured(source: str, ours: Mapping[str, Probed], theirs: Mapping[str, Probed], layer: str) -> Baseline:
    """A baseline with the same examples and seeds."""
    pairs = {name: (one, _scores(theirs)[name]) for name, one in _scores(ours).items()}
    return Baseline(
        row=ProbeBaseline(
            model=source,
            tasks={name: one.row(layer) for name, one in theirs.items()},
            mean=_scores(theirs)[MEAN].estimate.row(),
        ),
        values={name: b.mean for name, (_, b) in pairs.items()},
        differences={name: noise.sampled(a.mean - b.mean, a.draws - b.draws) for name, (a, b) in pairs.items()},
        ratios={
            name: noise.sampled_ratio(a.mean / b.mean, a.draws, b.draws) for name, (a, b) in pairs.items() if b.mean > 0
        },
        at_chance={name: b.chance for name, (_, b) in pairs.items() if b.at_chance},
    )


def _stored(path: str, config: ProbeConfig) -> ProbeResult:
    """The result of an earlier `cap probe`. Raises `FileError` or `ConfigError`."""
    data = read_json(Path(path))
    if not part(data, "tasks") or MEAN not in data:
        raise FileError(f"{path} is not a result of cap probe", TAKES)
    found = from_json(ProbeResult, data, path, TAKES)
    if lost := [name for name in config.task_names if name not in found.tasks]:
        raise ConfigError(f"{path} has no probe of {', '.join(lost)}, only of {', '.join(found.tasks)}")
    for name in ("probe", "layer", "pooling"):
        if getattr(found, name) != getattr(config, name):
            raise ConfigError(f"{path} was made with --{name} {getattr(found, name)}, not {getattr(config, name)}")
    return found


def _from_file(path: str, ours: Mapping[str, Probed], found: ProbeResult) -> Baseline:
    """A baseline of which only the intervals are known."""
    rows = {name: found.tasks[name] for name in ours}
    for name, one in ours.items():
        if what := noise.differing(rows[name], one.about, noise.MEASURED_ON):
            raise ConfigError(
                f"{path}: the {what} of {name} is {named(getattr(rows[name], what))}, here {getattr(one.about, what)}",
                "compare results measured in the same way: same data, length and numbers of examples",
            )
    theirs = {name: noise.stored(row.mean, row.confidence_95) for name, row in rows.items()}
    if found.mean and set(ours) == set(found.tasks):
        theirs[MEAN] = noise.stored(found.mean.value, found.mean.confidence_95)
    else:
        theirs[MEAN] = noise.mean(list(theirs.values()))
    mine = {name: score.estimate for name, score in _scores(ours).items()}
    by_chance = {name: score.chance for name, score in _scores(ours).items()}
    guessed = {name: one for name, one in by_chance.items() if chance.is_at_chance("", theirs[name], one, None)}
    rows = {name: replace(row, chance=by_chance[name], at_chance=name in guessed) for name, row in rows.items()}
    return Baseline(
        row=ProbeBaseline(model=path, tasks=rows, mean=theirs[MEAN].row()),
        values={name: one.value for name, one in theirs.items()},
        differences={name: noise.difference(mine[name], one) for name, one in theirs.items()},
        ratios={name: noise.ratio(mine[name], one) for name, one in theirs.items() if one.value > 0},
        at_chance=guessed,
    )


def _evidence(
    ours: Mapping[str, Probed], baseline: Baseline | None, encoder: vectors.Encoder, speed: Latency | None
) -> gates.Evidence:
    """What the gates see: the tasks and `mean`, and the first baseline."""
    return gates.Evidence(
        primary=MEAN,
        metrics={name: score.estimate for name, score in _scores(ours).items()},
        baseline=baseline.values if baseline else {},
        differences=baseline.differences if baseline else {},
        ratios=baseline.ratios if baseline else {},
        at_chance=baseline.at_chance if baseline else {},
        weights_bytes=encoder.weights_bytes,
        latency_ms=noise.stored(speed.median_ms, speed.confidence_95) if speed else None,
    )
