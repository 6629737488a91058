"""Every export format beside dense PyTorch and dense onnxruntime: bytes, load time, memory, latency, accuracy.

    python benchmarks/export.py DENSE RUN [RUN ...] --task TASK --data FOLDER [-o export.json] [--threads N]
    python benchmarks/export.py --table export.json [--write docs/benchmarks.md]

DENSE is the fine-tuned model before pruning (RUN/work/teacher of a run with --keep-work), a RUN is what `cap prune`
wrote. Each RUN is exported to every format into a temporary folder (of structured runs fewer variants). Then each file
is opened in a process of its own, which imports nothing but what that format needs; the processes take turns,
`--rounds` times, so that a busy machine is busy for all of them. Figures are medians over the rounds; × is the latency
of dense PyTorch divided by this one. Memory is the peak of the process; beside it what the libraries take before
anything is loaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import table

from capcli.events import finished
from capcli.machine import peak_bytes
from capcli.timing import in_turn

LENGTH, BATCHES = 128, (1, 32)
# What is exported from each run: label -> options of `cap export`.
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"to": "dense"},
    "dense, fp16": {"to": "dense", "dtype": "fp16"},
    "sparse": {"to": "sparse"},
    "sparse, int8": {"to": "sparse", "dtype": "int8", "embeddings": "int8"},
    "sparse, int8, svd:128": {"to": "sparse", "dtype": "int8", "embeddings": "svd:128"},
    "sparse, int8, task's vocabulary": {"to": "sparse", "dtype": "int8", "embeddings": "int8", "vocab": "task"},
    "sliced": {"to": "sliced"},
    "onnx": {"to": "onnx"},
    "onnx, int8": {"to": "onnx", "int8": True},
}
STRUCTURED = ("dense", "sparse, int8", "sliced", "onnx", "onnx, int8")


def main() -> None:
    if table.handled("export", render):
        return
    args = arguments()
    if args.measure:
        print(json.dumps(measured(Path(args.dense), args.threads)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        rows = exported(args, Path(scratch))
        for number in range(args.rounds):
            for row in rows:
                print(f"round {number + 1}: {row['run']}, {row['label']}", file=sys.stderr, flush=True)
                row["rounds"].append(in_a_process(row["folder"], args.threads))
        found = {
            "schema_version": 1,
            "command": shlex.join(["python", *sys.argv]),
            "device": hardware(args),
            "threads": args.threads,
            "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "onnxruntime", "capcli")},
            "rows": [summary(row, rows[0]) for row in rows],
        }
    text = json.dumps(found, indent=1) + "\n"
    Path(args.out).write_text(text) if args.out else print(text)
    print(render(found))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", help="the fine-tuned dense model")
    parser.add_argument("runs", nargs="*", help="folders of cap prune")
    parser.add_argument("--task")
    parser.add_argument("--data", default="")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-eval-samples", type=int, default=0)
    parser.add_argument("--formats", default="", help="only the variants whose label begins with one of a;b;c")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--out", default="")
    return parser.parse_args()


# Exporting and accuracy ----------------------------------------------------------------------------------------------


def exported(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Write everything that is measured; a row for each, with its accuracy."""
    chosen = tuple(filter(None, map(str.strip, args.formats.split(";"))))
    onnx = exported_to(args, args.dense, scratch / "dense", {"to": "onnx"})
    rows = [row_of(args, "dense PyTorch", "dense", Path(args.dense)), row_of(args, "dense onnxruntime", "dense", onnx)]
    for place, run in enumerate(args.runs):
        report = json.loads((Path(run) / "report.json").read_text())
        name = f"{report['method']}, {report['sparsity']['achieved']:.0%}"
        wanted = STRUCTURED if report["method"] in ("cap-f", "first-order") else tuple(VARIANTS)
        rows.append(row_of(args, "as pruned", name, Path(run)))
        for number, label in enumerate(wanted):
            if not chosen or label.startswith(chosen):
                folder = exported_to(args, run, scratch / f"{place}-{number}", VARIANTS[label])
                rows.append(row_of(args, label, name, folder))
    return rows


def exported_to(args: argparse.Namespace, model: str, folder: Path, options: dict[str, Any]) -> Path:
    import capcli
    from capcli.config.export import ExportConfig

    print(f"exporting {model}: {options}", file=sys.stderr, flush=True)
    data = args.data if Path(model, "cap_config.json").is_file() else ""
    capcli.export(ExportConfig(model=str(model), out=str(folder), data=data, threads=args.threads, **options))
    return folder


def row_of(args: argparse.Namespace, label: str, run: str, folder: Path) -> dict[str, Any]:
    """Bytes and accuracy, the one that the export measured where it did."""
    weights = [
        p for p in folder.iterdir() if p.name.startswith("model.") and p.suffix in (".safetensors", ".onnx", ".data")
    ]
    record = json.loads((folder / "export.json").read_text()) if (folder / "export.json").is_file() else {}
    known = record.get("metrics")
    metric, value = (known["primary"], known["after"][known["primary"]]) if known else accuracy(args, folder)
    return {
        "label": label,
        "run": run,
        "folder": folder,
        "weights_bytes": sum(path.stat().st_size for path in weights),
        "metric": metric,
        "value": value,
        "rounds": [],
    }


def accuracy(args: argparse.Namespace, folder: Path) -> tuple[str, float]:
    """The primary metric on the first evaluation split, computed with what was exported."""
    from capcli.config.hardware import Hardware
    from capcli.config.task import TaskConfig
    from capcli.data import dataset
    from capcli.events import finished
    from capcli.measuring import scoring
    from capcli.runtime import choice

    hardware = Hardware(device="cpu", precision="fp32", threads=args.threads)
    source = TaskConfig(task=args.task, data=args.data, max_eval_samples=args.max_eval_samples)
    data = dataset.load(source, train=False)
    model = choice.opened(str(folder), "", hardware, labels=data.classes, kind=data.kind)
    examples = scoring.encoded(model, next(iter(data.evals.values())), source)
    found = finished(scoring.measure(model, examples, data.metrics))
    return data.primary, found.metrics[data.primary]


def hardware(args: argparse.Namespace) -> str:
    """What the processor is called."""
    from capcli.config.hardware import Hardware
    from capcli.models import devices

    return devices.compute(Hardware(device="cpu", threads=args.threads)).name


# One file in a process of its own ------------------------------------------------------------------------------------


def in_a_process(folder: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, str(folder), "--measure", "--threads", str(threads)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def measured(folder: Path, threads: int) -> dict[str, Any]:
    """Load the model in `folder` and run it on inputs of fixed size; seconds and bytes."""
    opener = {"model.onnx": opened_onnx, "model.cap.safetensors": opened_cap}
    open_it = next((opener[name] for name in opener if (folder / name).is_file()), opened_stock)
    load = open_it(folder, threads)
    libraries = peak_bytes()
    began = time.perf_counter()
    run = load()
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - began, "libraries_bytes": libraries}
    for batch in BATCHES:
        found[f"batch_{batch}_ms"] = 1000 * median_seconds(lambda b=batch: run(b))
    return {**found, "peak_bytes": peak_bytes()}


def median_seconds(call: Callable[[], Any]) -> float:
    """Median of 3 to 30 calls after one that is not counted; about three seconds at most."""
    return statistics.median(seconds for (seconds,) in finished(in_turn([[call]] * 30, seconds=3)))


Load = Callable[[], Callable[[int], Any]]


def opened_stock(folder: Path, threads: int) -> Load:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    return lambda: of_torch(AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval())


def opened_cap(folder: Path, threads: int) -> Load:
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401  what every format of ours needs, counted as a library

    import capcli
    from capcli.models import (
        tokenizers,  # noqa: F401
    )

    torch.set_num_threads(threads)
    return lambda: of_torch(capcli.load(folder))


def of_torch(net: Any) -> Callable[[int], Any]:
    import torch

    def run(batch: int) -> Any:
        ids = torch.full((batch, LENGTH), 5)
        with torch.inference_mode():
            return net(input_ids=ids, attention_mask=torch.ones_like(ids))

    return run


def opened_onnx(folder: Path, threads: int) -> Load:
    import numpy as np
    import onnxruntime

    def load() -> Callable[[int], Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_inputs()]

        def run(batch: int) -> Any:
            ones = np.ones((batch, LENGTH), np.int64)
            values = {"input_ids": 5 * ones, "attention_mask": ones, "token_type_ids": 0 * ones}
            return session.run(None, {name: values[name] for name in names})

        return run

    return load


# The table -----------------------------------------------------------------------------------------------------------


def summary(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """The row without its folder; medians over the rounds, and latency beside dense PyTorch, round by round."""
    rounds = row["rounds"]
    found = {key: row[key] for key in ("label", "run", "weights_bytes", "metric", "value")}
    found |= {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    for batch in BATCHES:
        key = f"batch_{batch}_ms"
        found[f"times_{batch}"] = statistics.median(
            d[key] / o[key] for d, o in zip(dense["rounds"], rounds, strict=True)
        )
    return found


def render(found: dict[str, Any]) -> str:
    head = [
        "run",
        "format",
        "weights",
        "of dense",
        "load",
        "peak memory",
        "libraries",
        "batch 1",
        "batch 32",
        "accuracy",
    ]
    rows, dense = [], found["rows"][0]
    for row in found["rows"]:
        latency = [f"{row[f'batch_{b}_ms']:.1f} ms, {row[f'times_{b}']:.2f}×" for b in BATCHES]
        rows.append(
            [
                row["run"],
                row["label"],
                f"{row['weights_bytes'] / 1e6:.2f} MB",
                f"{row['weights_bytes'] / dense['weights_bytes']:.1%}",
                f"{row['load_seconds']:.2f} s",
                f"{row['peak_bytes'] / 1e6:.0f} MB",
                f"{row['libraries_bytes'] / 1e6:.0f} MB",
                *latency,
                f"{row['value']:.4f}",
            ]
        )
    about = f"`{found['command']}`\n\n{found['device']}, {found['threads']} threads, length {LENGTH}; " + ", ".join(
        f"{name} {version}" for name, version in found["versions"].items()
    )
    return f"{about}. × is how many times faster than dense PyTorch.\n\n{table.markdown(head, rows)}"


if __name__ == "__main__":
    main()
