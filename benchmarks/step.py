"""A CAP training step against a plain fine-tuning step: same model, batches and precision, in turns in one process.

usage: python benchmarks/step.py MODEL --task TASK [--data PATH] [--steps 40] [--method cap-soft] [--json FILE]
       python benchmarks/step.py --table FILE [--write docs/benchmarks.md]

Prints the median seconds of both, their ratio pair by pair, and what each part of the difference costs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import synthetic
import table
import torch
from torch.profiler import ProfilerActivity, profile

from capcli.config.layers import prune_config
from capcli.data import batches, dataset, tokens
from capcli.events import finished
from capcli.models import devices, loading, model
from capcli.pruning import train
from capcli.pruning.objective import Job
from capcli.timing import in_turn


def jobs(args: argparse.Namespace) -> tuple[Job, Job]:
    """A plain fine-tuning job (ce) and a full CAP job in the middle of its schedule, each with a model of its own."""
    common = {"model": args.model, "task": args.task, "data": args.data, "max_train_samples": args.samples}
    settings = prune_config({**common, "method": args.method, "batch_size": args.batch, "precision": args.precision})
    on = devices.compute(settings.hardware)
    data = dataset.load(settings.source, max_train=settings.max_train_samples, seed=settings.seed)
    assert data.train is not None
    student = loading.load_dense(args.model, data.labels, data.kind, settings.seed)
    length = model.longest_input(student, settings.source.longest)
    examples = tokens.encode(data.train, student.tokenizer, length)
    plain = synthetic.plain_job(model.copy(student), examples, on, settings)
    return plain, synthetic.cap_job(student, examples, on, settings)


def render(found: dict[str, Any]) -> str:
    """What `--json` wrote, as Markdown."""
    low, high = found["ratio_p10_p90"]
    head = ("method", "batch", "plain step, ms", "CAP step, ms", "ratio [p10, p90]")
    times = (
        f"{found['plain_ms']:.1f}",
        f"{found['cap_ms']:.1f}",
        f"{found['ratio_median']:.2f} [{low:.2f}, {high:.2f}]",
    )
    note = f"{found['device']}, {found['threads']} threads."
    return f"{note}\n\n{table.markdown(head, [(found['method'], found['batch'], *times)])}"


def main() -> None:
    if table.handled("step", render):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", default="")
    parser.add_argument("--method", default="cap-soft")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", default="")
    args = parser.parse_args()
    both = jobs(args)
    tools = [(train.make_optimizer(job), torch.amp.GradScaler(job.on.device.type, enabled=False)) for job in both]
    order = batches.training_order(both[0].examples, args.batch, 0, 0)
    total = both[1].pruner.subject.total_steps if both[1].pruner else 1

    def take(which: int, index: int) -> None:
        step = total * 3 // 10 + index  # inside the cubic part: masks change
        train.take_step(both[which], *tools[which], step, total, order[index % len(order)])
        if both[which].on.device.type == "cuda":
            torch.cuda.synchronize()

    rounds = [[partial(take, which, index) for which in range(len(both))] for index in range(args.steps)]
    seconds = list(zip(*finished(in_turn(rounds, seconds=math.inf, warm_up=3)), strict=True))
    ratios = [cap / plain for plain, cap in zip(*seconds, strict=True)]
    found = {
        "device": both[0].on.name,
        "threads": torch.get_num_threads(),
        "batch": args.batch,
        "method": args.method,
        "plain_ms": 1000 * statistics.median(seconds[0]),
        "cap_ms": 1000 * statistics.median(seconds[1]),
        "ratio_median": statistics.median(ratios),
        "ratio_p10_p90": [sorted(ratios)[len(ratios) // 10], sorted(ratios)[len(ratios) * 9 // 10]],
    }
    print(json.dumps(found, indent=2))
    if args.profile:
        for which, job in enumerate(both):
            with profile(activities=[ProfilerActivity.CPU]) as prof:
                for index in range(4):
                    train.take_step(job, *tools[which], total * 3 // 10 + index, total, order[index])
            print(prof.key_averages().table(sort_by="self_cpu_time_total", row_limit=22, max_name_column_width=40))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
