"""How fast a network is with fewer heads or neurons, on this machine's CPU: measured once, and kept as a stage.

Letters: A heads and F neurons per layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from copy import deepcopy
from pathlib import Path

import torch

from capcli import files, parallel, stages
from capcli.errors import ConfigError
from capcli.events import Event, changed, told
from capcli.models import model as models
from capcli.models import predictor, slicing
from capcli.models.devices import Compute
from capcli.models.model import Model
from capcli.models.predict import Progress
from capcli.models.slicing import NEURON_STEP, Size
from capcli.pruning.costs import Measure, Speeds, measure_of, median_length
from capcli.pruning.search import searched
from capcli.pruning.setup import Setup, found_stage, origin_of
from capcli.stored import read_json
from capcli.timing import in_turn

CPU = Compute(device=torch.device("cpu"), dtype=torch.float32)
STAGE, FILE = "speeds", "speeds.json"
SHARES = (0.125, 0.25, 0.5, 0.75)  # of the heads and of the neurons, at which time is taken
ROUNDS, LEAST_ROUNDS, WARM_UP, SECONDS = 60, 8, 2, 2.0  # of each size, in turn with the dense network


def measured_for(setup: Setup, student: Model) -> Generator[Event, None, Measure]:
    """What the target of the run counts; for one of time, speeds are measured, unless they were before.

    Raises `ConfigError` when the budget cannot be met. Common to all ranks.
    """
    config = setup.config
    if not config.counts_time:
        return measure_of(config, setup.train)
    if student.family is not None and student.family.attention == "biased":
        raise ConfigError(
            f"--target latency needs layers with fewer heads, and {student.source} shares a position bias among them",
            "use --target macs, or --structure dimensions",
        )
    of = origin_of(setup, STAGE)
    if (yield from found_stage(setup, of)) is None:
        length = median_length(setup.train)
        event = setup.meter.stoppable("load")
        yield event(note=f"measuring the speed of smaller layers, with {length} tokens")
        found = (yield from told(speeds(student, length), event)) if parallel.first() else None

        def write(staging: Path) -> None:
            assert found is not None, "rank 0 has measured"
            files.write_json(staging / FILE, dataclasses.asdict(found))
            files.write_json(staging / stages.STAGE, {"of": of})

        stages.publish(setup.run, of["stage"], write)
    stored = read_json(setup.run.place(STAGE) / FILE)
    measure = measure_of(config, setup.train, Speeds(**stored))
    try:
        searched(student, config, measure)
    except ConfigError:  # nothing was done yet, and another target may follow in this folder
        parallel.wait()
        stages.remove(setup.run.place(STAGE))
        raise
    return measure


def speeds(model: Model, length: int) -> Generator[Progress, None, Speeds]:
    """The time that the network, as its configuration says, takes with smaller layers, as shares of its own, for one
    text of `length` tokens; yields how many rounds are done, of how many. Raises `ConfigError` for unknown families."""
    model.layers()
    base = models.place(models.copy(model), CPU)
    base.net.eval()
    full = next(iter(_sizes(base).values()))
    of_heads = [dataclasses.replace(full, heads=n) for n in _numbers(full.heads, 1)]
    of_neurons = [dataclasses.replace(full, neurons=n) for n in _numbers(full.neurons, NEURON_STEP)]
    times: list[tuple[float, float]] = []
    least = dataclasses.replace(full, heads=1, neurons=min(NEURON_STEP, full.neurons))
    wanted = (*of_heads, *of_neurons, least)
    for size in wanted:
        times.append((yield from _times(base, size, length, len(times), len(wanted))))
    dense = min(whole for whole, _ in times)
    shares = [cut / dense for _, cut in times]
    return Speeds(
        heads=[*zip((size.heads for size in of_heads), shares, strict=False), (full.heads, 1.0)],
        neurons=[
            *zip((size.neurons for size in of_neurons), shares[len(of_heads) :], strict=False),
            (full.neurons, 1.0),
        ],
        least=shares[-1],
    )


def _sizes(model: Model) -> dict[str, Size]:
    assert model.family is not None, "layers() refuses unknown families"
    return slicing.sizes(model.net, model.family)


def _numbers(full: int, step: int) -> list[int]:
    """The fewest that a layer can have, and some more, below all of them; multiples of `step`."""
    wanted = (step, *(step * round(share * full / step) for share in SHARES))
    return sorted({number for number in wanted if 0 < number < full})


def _times(
    base: Model, size: Size, length: int, done: int, total: int
) -> Generator[Progress, None, tuple[float, float]]:
    """Seconds of `base`, and of a network whose layers have this size: the shortest of many rounds of both in turn,
    because whatever else the machine does makes them longer. Of `total` sizes, `done` are done before."""
    assert base.family is not None, "layers() refuses unknown families"
    shared = {id(parameter): parameter for parameter in base.net.parameters()}  # all but what is cut
    small = dataclasses.replace(base, net=deepcopy(base.net, shared))
    slicing.shape(small.net, base.family, dict.fromkeys(_sizes(base), size))
    readers = [predictor.of_network(one, CPU) for one in (base, small)]
    calls = [reader.asked(reader.full_inputs(1, length)) for reader in readers]
    rounds = in_turn([calls] * ROUNDS, seconds=SECONDS, least=LEAST_ROUNDS, warm_up=WARM_UP)
    found = yield from changed(rounds, lambda progress: (done * ROUNDS + progress[0], total * ROUNDS))
    return min(whole for whole, _ in found), min(cut for _, cut in found)
