"""How long a forward pass takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from capcli.models.predictor import Predictor
from capcli.runtime.timing import full_inputs

LATENCY_RUNS = 30


def latency(model: Predictor, batch: int, length: int) -> dict[str, Any]:
    """Milliseconds of a forward pass over `batch` inputs of `length` tokens: median, 10th and 90th percentile.

    confidence_95 of the median is the noise of this process; that between processes and machines comes on top.
    """
    on, run, length = model.on, model.run(), min(length, model.longest)
    inputs = {name: tensor.to(on.device) for name, tensor in full_inputs(model.tokenizer, batch, length).items()}
    seconds = []
    for _ in range(LATENCY_RUNS + 3):
        began = time.perf_counter()
        run(inputs)
        if on.device.type == "cuda":
            torch.cuda.synchronize(on.device)
        seconds.append(time.perf_counter() - began)
    times = sorted(1000 * value for value in seconds[3:])
    return {
        "median_ms": statistics.median(times),
        "p10_ms": times[len(times) // 10],
        "p90_ms": times[len(times) * 9 // 10],
        "confidence_95": median_interval(times),
        "batch": batch,
        "length": length,
        "runtime": model.runtime,
        "threads": model.threads,
        "device": on.device.type,
        "hardware": on.name,
        "precision": model.precision,
    }


def median_interval(values: Sequence[float], level: float = 0.95) -> list[float]:
    """Interval of the median, from one value to another of those that ascend, whatever their distribution.

    The number of values below the median is binomial (David and Nagaraja 2003, section 7.1). Of too few values: NaN.
    """
    from scipy.stats import binom

    n = len(values)
    first = int(binom.ppf((1 - level) / 2, n, 0.5))
    return [values[first - 1], values[n - first]] if first else [math.nan] * 2
