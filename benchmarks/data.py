"""Examples per second of reading and tokenising a training set, cold and from the cache, and the peak of host memory.

    python benchmarks/data.py MODEL [--task mnli] [--data FOLDER] [--repeat-to 400000]

MODEL is a local folder or `mini`; only its tokenizer is used. `--repeat-to` repeats the rows of the training set up to
that number, in a parquet file of its own, to measure sets that are larger than the one at hand. Each stage runs in a
process of its own, so that its peak is its own; the memory of the libraries alone is the first line. The cache is a
temporary folder. Linux only: the peak is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import table
from transformers import AutoTokenizer

from capcli import hub, tables, tasks, tokens
from capcli.config import TaskConfig

STAGES = ("libraries", "labels", "tokens, cold", "tokens, cached")


def main() -> None:
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
            command += ["--max-length", str(args.max_length)]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout)
            speed = f"{found['examples'] / found['seconds']:,.0f}" if found["examples"] else ""
            rows.append(
                (stage, f"{found['examples']:,}", f"{found['seconds']:.1f}", speed, f"{found['peak'] / 1e6:,.0f}")
            )
    print(table.markdown(("stage", "examples", "seconds", "examples per second", "peak MB"), rows))


def measured(args: argparse.Namespace) -> dict[str, float]:
    """One stage: its examples and seconds, and the peak of the process in bytes."""
    tokenizer = AutoTokenizer.from_pretrained(hub.resolve(args.model)[0])
    began, n = time.perf_counter(), 0
    if args.stage != "libraries":
        split = tasks.load(TaskConfig(task=args.task, data=args.data, max_length=args.max_length)).train
        assert split is not None, "a training split was asked for"
        n = len(split)
        if args.stage != "labels":
            tokens.encode(split, tokenizer, args.max_length)
    seconds = time.perf_counter() - began
    return {"examples": n, "seconds": seconds, "peak": peak_bytes()}


def peak_bytes() -> int:
    """Peak resident set of this process; what `getrusage` tells begins with the peak of the parent."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def repeated(args: argparse.Namespace, folder: Path) -> str:
    """A folder with `args.repeat_to` training rows, those of `args.data` again and again, and its evaluation split."""
    found = tables.find(Path(args.data), ("train", "test", *tasks.EVAL_SPLITS))
    rows = pa.concat_tables([pq.read_table(path) for path in found.pop("train")])
    times = -(-args.repeat_to // rows.num_rows)
    place = folder / "data"
    place.mkdir()
    pq.write_table(pa.concat_tables([rows] * times).slice(0, args.repeat_to), place / "train.parquet")
    for path in next(iter(found.values())):
        (place / path.name).write_bytes(path.read_bytes())
    return str(place)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task", default="mnli")
    parser.add_argument("--data", default="", help="folder of splits; for --repeat-to of parquet files")
    parser.add_argument("--repeat-to", type=int, default=0)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
