"""Examples per second of reading, tokenising (cold and cached), encoding and training; the peak of host memory.

    python benchmarks/data.py MODEL [--task mnli] [--data FOLDER] [--repeat-to 400000] [--json FILE]
    python benchmarks/data.py --table FILE [--write docs/benchmarks.md]

MODEL is a local folder or `mini`. Encoding and training use `--few` examples drawn from the set; a training step is a
full CAP step (all losses, masks that change, random banks) of 32 examples. `--repeat-to` repeats the rows of the
training set up to that number, in a parquet file of its own, to measure sets that are larger than the one at hand.
Each stage runs in a process of its own, so that its peak is its own; the memory of the libraries alone is the first
line. The cache is a temporary folder. Linux only: the peak is read from /proc.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import synthetic
import table
import torch
from transformers import AutoTokenizer

from capcli.config.hardware import Hardware
from capcli.config.task import TaskConfig
from capcli.data import dataset, layout, tokens
from capcli.machine import peak_bytes
from capcli.models import devices, loading, predict
from capcli.models.model import place
from capcli.sources import hub

STAGES = ("libraries", "labels", "tokens, cold", "tokens, cached", "encoding", "training")


def main() -> None:
    if table.handled("data", render):
        return
    args = arguments()
    if args.stage:
        sys.stdout.write(json.dumps(measured(args)) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        data = repeated(args, Path(folder)) if args.repeat_to else args.data
        environment = {**os.environ, "CAP_CACHE": f"{folder}/cache"}
        rows = []
        for stage in STAGES:
            command = [sys.executable, __file__, args.model, "--task", args.task, "--data", data, "--stage", stage]
            command += ["--max-length", str(args.max_length), "--few", str(args.few)]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            rows.append({"stage": stage, **json.loads(done.stdout)})
            print(rows[-1], file=sys.stderr, flush=True)
    found = {
        "model": Path(args.model).name,
        "task": args.task,
        "device": devices.compute(Hardware()).name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(render(found))


def render(found: dict[str, Any]) -> str:
    """What `--json` wrote, as Markdown."""
    rows = [
        (
            row["stage"],
            f"{row['examples']:,}",
            f"{row['seconds']:.1f}",
            f"{row['examples'] / row['seconds']:,.0f}" if row["examples"] else "",
            f"{row['peak'] / 1e6:,.0f}",
        )
        for row in found["rows"]
    ]
    what = (
        f"{found['model']} on {found['task']}; {found['device']}, {found['threads']} threads, torch {found['torch']}."
    )
    return f"{what}\n\n{table.markdown(('stage', 'examples', 'seconds', 'examples per second', 'peak MB'), rows)}"


def measured(args: argparse.Namespace) -> dict[str, float]:
    """One stage: its examples and seconds, and the peak of the process in bytes."""
    if args.stage in ("encoding", "training"):
        return computed(args)
    tokenizer = AutoTokenizer.from_pretrained(hub.resolve(args.model)[0])
    began, n = time.perf_counter(), 0
    if args.stage != "libraries":
        split = dataset.load(TaskConfig(task=args.task, data=args.data, max_length=args.max_length)).train
        assert split is not None, "a training split was asked for"
        n = len(split)
        if args.stage != "labels":
            tokens.encode(split, tokenizer, args.max_length)
    seconds = time.perf_counter() - began
    return {"examples": n, "seconds": seconds, "peak": peak_bytes()}


def computed(args: argparse.Namespace) -> dict[str, float]:
    """Encoding or training of `args.few` examples."""
    chosen = synthetic.settings(task=args.task, data=args.data)
    data = dataset.load(chosen.source, max_train=args.few)
    assert data.train is not None, "a training split was asked for"
    model, on = loading.load_dense(args.model, data.labels, data.kind, 1), devices.compute(Hardware())
    examples = tokens.encode(data.train, model.tokenizer, args.max_length)
    place(model, on)
    if args.stage == "encoding":
        began = time.perf_counter()
        collections.deque(predict.encoded(model, examples, on), maxlen=0)
        return {"examples": len(examples), "seconds": time.perf_counter() - began, "peak": peak_bytes()}
    step = synthetic.Stepper(synthetic.cap_job(model, examples, on, chosen))
    step()
    began, n_steps = time.perf_counter(), max(1, min(20, len(step.order) - 1))
    for _ in range(n_steps):
        float(step()["total"])
    seconds = time.perf_counter() - began
    return {"examples": n_steps * chosen.batch_size, "seconds": seconds, "peak": peak_bytes()}


def repeated(args: argparse.Namespace, folder: Path) -> str:
    """A folder with `args.repeat_to` training rows, those of `args.data` again and again, and its evaluation split."""
    found = layout.find(Path(args.data)).files
    rows = pa.concat_tables([pq.read_table(path) for path in found.pop("train")])
    times = -(-args.repeat_to // rows.num_rows)
    made = folder / "data"
    made.mkdir()
    pq.write_table(pa.concat_tables([rows] * times).slice(0, args.repeat_to), made / "train.parquet")
    for path in next(iter(found.values())):
        (made / path.name).write_bytes(path.read_bytes())
    return str(made)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task", default="mnli")
    parser.add_argument("--data", default="", help="folder of splits; for --repeat-to of parquet files")
    parser.add_argument("--repeat-to", type=int, default=0)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--few", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
