"""Peak host memory of a run on many examples, stage by stage, and examples per second of each stage.

    python benchmarks/memory.py MODEL [--data SST2_FOLDER] [--examples 60000] [-o memory.json]
    python benchmarks/memory.py --table memory.json [--write docs/benchmarks.md]

What is cut against a real run: banks of all examples are written and mapped as in a run, but hold random vectors;
encoding is timed on the first few thousand examples; training is a few steps; nothing is evaluated. Everything that
grows with the number of examples is there: texts, tokens, the encoded vectors, the banks. Memory is the peak resident
set of the process up to the end of each stage (mapped pages of the banks that were read are part of it).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import synthetic
import table
import torch

from capcli import files
from capcli.config.hardware import Hardware
from capcli.config.task import TaskConfig
from capcli.data import dataset, tables, tokens
from capcli.data.batches import Examples
from capcli.data.splits import Split
from capcli.machine import peak_bytes
from capcli.models import devices, loading, predict
from capcli.models.devices import Compute
from capcli.models.model import longest_input, place
from capcli.pruning import banks


def main() -> None:
    if table.handled("memory", render):
        return
    args = arguments()
    on = devices.compute(Hardware(device=args.device, threads=args.threads))
    stages: list[dict[str, Any]] = []
    began = time.perf_counter()
    model = place(loading.load_dense(args.model, synthetic.LABELS, "classification", 1), on)
    stages.append(stage("libraries and model", began, 0))
    began = time.perf_counter()
    split = read(args) if args.data else random_texts(args.examples, model.tokenizer)
    stages.append(stage("texts", began, len(split)))
    began = time.perf_counter()
    examples = tokens.encode(split, model.tokenizer, longest_input(model, args.max_length), cache=False)
    stages.append(stage("tokenising", began, len(examples)))
    del split
    few = Examples(
        tokens=examples.tokens,
        types=examples.types,
        offsets=examples.offsets[: args.encoded + 1],
        labels=examples.labels[: args.encoded],
        pad_id=examples.pad_id,
    )
    began = time.perf_counter()
    exhaust(predict.encoded(model, few, on))
    stages.append(stage("encoding", began, len(few)))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        bank_table = written_banks(Path(folder), len(examples), model.net.config.hidden_size, on)
        stages.append(stage("writing 5 banks", began, 5 * len(examples)))
        chosen = synthetic.settings(method=args.method, batch_size=args.batch)
        step = synthetic.Stepper(synthetic.cap_job(model, examples, on, chosen, bank_table))
        step()
        began = time.perf_counter()
        for _ in range(args.steps):
            step()
        if on.device.type == "cuda":
            torch.cuda.synchronize(on.device)
        stages.append(stage("training", began, args.steps * args.batch))
    found = {
        "schema_version": 1,
        "command": shlex.join(["python", *sys.argv]),
        "device": on.name,
        "threads": torch.get_num_threads(),
        "model": args.model,
        "examples": len(examples),
        "tokens_per_example": float(examples.lengths.mean()),
        "peak_host_bytes": stages[-1]["peak_host_bytes"],
        "stages": stages,
        "cut": f"random vectors in the banks, {len(few)} examples encoded, {args.steps} steps of {args.batch}, "
        "no evaluation",
    }
    print(json.dumps(found, indent=2))
    if args.out:
        files.write_json(args.out, found)


def stage(name: str, began: float, n_examples: int) -> dict[str, Any]:
    """A finished stage: its seconds, examples per second (None without examples), and the peak memory so far."""
    seconds = time.perf_counter() - began
    peak = peak_bytes()
    speed = n_examples / seconds if n_examples else None
    return {"name": name, "seconds": seconds, "examples_per_second": speed, "peak_host_bytes": peak}


def read(args: argparse.Namespace) -> Split:
    """The training split of SST-2."""
    data = dataset.load(TaskConfig(task="sst2", data=args.data), max_train=args.examples)
    assert data.train is not None
    return data.train


def random_texts(n: int, tokenizer: Any) -> Split:
    """N texts of 5 to 40 random words of the vocabulary."""
    rng = np.random.default_rng(0)
    words = np.asarray(sorted(word for word in tokenizer.get_vocab() if word.isalpha()))
    texts = [" ".join(rng.choice(words, rng.integers(5, 41))) for _ in range(n)]
    table = tables.in_memory("random", {"text": texts})
    return Split(name="train", table=table, columns=("text",), labels=rng.integers(0, 2, n))


def written_banks(folder: Path, n: int, width: int, on: Compute) -> dict[str, banks.Bank]:
    """The banks of a run in its fourth epoch, saved and read back as a run does."""
    found = {}
    for name, n_vectors in (("prc", 1), ("snc", 3), ("fic", 1)):
        parts = []
        for index in range(n_vectors):
            folder_of = folder / f"{name}-{index}"
            with files.publish(folder_of) as staging:
                banks.save(staging, synthetic.random_vectors(n, width, index), torch.zeros(n, 2), 0.0, {})
            parts.append(banks.load(folder_of, on.device, n, n)[0])
        found[name] = banks.Bank(vectors=parts)
    return found


def exhaust(work: Generator[Any, None, Any]) -> None:
    """Run a generator to its end."""
    for _ in work:
        pass


def render(found: dict[str, Any]) -> str:
    """The file as Markdown."""
    rows = []
    for row in found["stages"]:
        speed = f"{row['examples_per_second']:,.0f}" if row["examples_per_second"] else "—"
        rows.append((row["name"], f"{row['seconds']:.1f}", speed, f"{row['peak_host_bytes'] / 1e6:,.0f}"))
    note = (
        f"{found['model']}, {found['examples']:,} examples of {found['tokens_per_example']:.1f} tokens; "
        f"{found['device']}, {found['threads']} threads. Cut against a real run: {found['cut']}."
    )
    head = ("up to the end of", "seconds", "examples per second", "peak MB")
    return f"{note}\n\n{table.markdown(head, rows)}\n\n`{found['command']}`"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="", help="SST-2 as a folder of parquet files; random texts without it")
    parser.add_argument("--examples", type=int, default=60000)
    parser.add_argument("--encoded", type=int, default=2000, help="examples in the timing of encoding")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--method", default="cap-soft")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("-o", dest="out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
