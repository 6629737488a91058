"""What a GPU makes of it: step times, model FLOP utilisation, memory, host synchronisations, selection, a whole run.

    python benchmarks/gpu.py MINILM_FOLDER [--data SST2_FOLDER] -o gpu.json
    python benchmarks/gpu.py MINILM_FOLDER --device cpu --small -o gpu.json        every path, in a minute, without GPU
    python benchmarks/gpu.py --table gpu.json [--write docs/benchmarks.md]

Letters: B batch, S tokens, H hidden size, L layers, P prunable weights.

Model FLOPs of a training step are 3·B·S·(2·P + 4·L·S·H): a multiply-add is two, the backward pass twice the forward;
the products with the weights and the two of attention count, embeddings, pooler and head do not. The extra work of CAP
is not counted as useful, so its utilisation is lower where its step is longer. Steps are timed in blocks between two
device synchronisations, as they run in a training loop. A selection is timed alone, and in passes over its scores: one
is the time of their sum. The file is written after every part; parts that the time budget has no room for are left out
with a note.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import synthetic
import table
import torch

from capcli import files
from capcli.config.hardware import Hardware
from capcli.errors import ConfigError
from capcli.models import compiled, devices, loading
from capcli.models.devices import Compute
from capcli.models.model import Model
from capcli.pruning import topk
from capcli.pruning.objective import Job

SPARE_SECONDS = 20.0


def main() -> None:
    if table.handled("gpu", render):
        return
    args = arguments()
    clock = Clock(args.budget)
    on = devices.compute(Hardware(device=args.device, precision="fp32" if args.device == "cpu" else "bf16"))
    found: dict[str, Any] = {
        "schema_version": 1,
        "command": shlex.join(["python", *sys.argv]),
        "environment": {
            "device": on.name,
            "precision": on.precision,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "peak_tflops": args.peak_tflops,
        "selection": [],
        "steps": [],
        "run": None,
        "notes": [],
    }
    if args.small:
        compiled.BACKEND = "aot_eager"  # needs no compiler
    batches, lengths = ((4,), (16,)) if args.small else ((32, 128), (32, 128))
    try:
        compiled.check(on.device)
        to_compile = (min(batches), max(lengths))
    except ConfigError as error:
        to_compile = None
        found["notes"].append(error.message)
    sources: dict[str, Callable[[], Model]] = {
        "MiniLM": lambda: loading.load_dense(args.model, synthetic.LABELS, "classification", 1),
        "BERT-base, random weights": lambda: synthetic.random_bert(synthetic.SMALL if args.small else synthetic.BASE),
    }
    for name, make in sources.items():
        if clock.has_room(f"{name}, selection", found["notes"]):
            found["selection"] += [{"model": name, **row} for row in selections(make(), on, args)]
            files.write_json(args.out, found)
        for batch in batches:
            for length in lengths:
                part = f"{name}, batch {batch}, length {length}"
                if clock.has_room(part, found["notes"]):
                    compiles = (batch, length) == to_compile
                    found["steps"].append({"model": name, **steps(make, batch, length, on, args, compiles=compiles)})
                    files.write_json(args.out, found)
    if args.data and clock.has_room("the whole run", found["notes"]):
        found["run"] = whole_run(args, clock.left() - SPARE_SECONDS, found["notes"])
    found["seconds"] = clock.spent()
    files.write_json(args.out, found)
    print(json.dumps(found, indent=2))


class Clock:
    """The time budget: a part starts only if one as long as the longest so far still fits."""

    def __init__(self, budget_seconds: float) -> None:
        self.began = self.last = time.monotonic()
        self.budget, self.longest = budget_seconds, 0.0

    def spent(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float:
        return self.budget - self.spent()

    def has_room(self, part: str, notes: list[str]) -> bool:
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now
        if self.left() > self.longest + SPARE_SECONDS:
            return True
        notes.append(f"left out for lack of time: {part}")
        return False


# Selection -----------------------------------------------------------------------------------------------------------


def selections(model: Model, on: Compute, args: argparse.Namespace) -> list[dict[str, Any]]:
    """How long it takes to choose the weights that stay, by random scores."""
    sizes = [linear.weight.numel() for linear in model.prunable().values()]
    scores = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0)).to(on.device)
    one_pass = statistics.median(blocks(scores.sum, on.device, args.small))
    rows = []
    for scope, floor in (("matrix", 0.0), ("global", 0.0), ("global", 0.005)):
        choose = partial(topk.select, scores, sizes, args.sparsity, scope, floor)
        ms = statistics.median(blocks(choose, on.device, args.small))
        rows.append({"weights": len(scores), "scope": scope, "floor": floor, "ms": ms, "passes": ms / one_pass})
    return rows


# Steps ---------------------------------------------------------------------------------------------------------------


def steps(
    make: Callable[[], Model], batch: int, length: int, on: Compute, args: argparse.Namespace, *, compiles: bool
) -> dict[str, Any]:
    """A plain fine-tuning step and a CAP step, one after the other, each alone in memory; at one of the shapes also a
    CAP step with compiled layers."""
    n = 64 if args.small else 65536
    chosen = synthetic.settings(batch_size=batch, max_length=length, method=args.method)
    row: dict[str, Any] = {"batch": batch, "length": length, "bank_examples": n}
    jobs = {"plain": synthetic.plain_job, "cap": synthetic.cap_job}
    jobs |= {"compiled": compiled_job} if compiles else {}
    for kind, job in jobs.items():
        model = make()
        examples = synthetic.random_examples(n, length, model.net.config.vocab_size)
        row["flops"] = flops(model, batch, length)
        if on.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(on.device)
        row[kind] = timed(synthetic.Stepper(job(model, examples, on, chosen)), args.small)
        row[kind]["utilisation"] = row["flops"] / (row[kind]["ms"] / 1000) / (args.peak_tflops * 1e12)
        del model
        gc.collect()
        if on.device.type == "cuda":
            torch.cuda.empty_cache()
    row["ratio"] = row["cap"]["ms"] / row["plain"]["ms"]
    return row


def compiled_job(*about: Any) -> Job:
    """A CAP step with compiled layers."""
    job = synthetic.cap_job(*about)
    return dataclasses.replace(job, layers=compiled.layers(job.model))


def timed(step: synthetic.Stepper, small: bool) -> dict[str, Any]:
    """Milliseconds per step, host synchronisations per step, and peak device memory (both None on the CPU)."""
    device = step.job.on.device
    began = time.perf_counter()
    step()
    synchronise(device)
    first_seconds = time.perf_counter() - began
    times = blocks(step, device, small)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "first_seconds": first_seconds,
        "ms": statistics.median(times),
        "ms_lowest": min(times),
        "ms_highest": max(times),
        "host_syncs_per_step": host_syncs(step, 4),
        "peak_device_bytes": peak,
    }


def blocks(action: Callable[[], object], device: torch.device, small: bool) -> list[float]:
    """Milliseconds of each call, the mean of each of several blocks between two synchronisations."""
    warm_up, n_blocks, per_block = (1, 2, 2) if small else (6, 5, 8)
    for _ in range(warm_up):
        action()
    times = []
    for _ in range(n_blocks):
        synchronise(device)
        began = time.perf_counter()
        for _ in range(per_block):
            action()
        synchronise(device)
        times.append(1000 * (time.perf_counter() - began) / per_block)
    return times


def host_syncs(step: Callable[[], object], n_steps: int) -> float | None:
    """How often the host waits for the device, per step; None where there is no GPU."""
    if not torch.cuda.is_available():
        for _ in range(n_steps):
            step()
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(n_steps):
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught) / n_steps


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops(model: Model, batch: int, length: int) -> int:
    """Model FLOPs of a training step; see the top of the file."""
    config = model.net.config
    weights = sum(linear.weight.numel() for linear in model.prunable().values())
    attention = 4 * config.num_hidden_layers * length * config.hidden_size
    return int(3 * batch * length * (2 * weights + attention))


# A whole run ---------------------------------------------------------------------------------------------------------


def whole_run(args: argparse.Namespace, seconds: float, notes: list[str]) -> dict[str, Any] | None:
    """`cap prune` on SST-2 in a process of its own; it stops by itself when the time is over."""
    command = [sys.executable, "-m", "capcli", "prune", args.model, "--task", "sst2", "--data", args.data]
    command += ["--method", args.method, "--sparsity", str(args.sparsity), "--device", args.device, "--json", "-q"]
    command += ["--max-time", f"{seconds / 60:.3f}", "--max-length", "64"]
    if args.small:
        command += ["--max-train-samples=64", "--max-eval-samples=64", "--epochs=1", "--teacher-epochs=1"]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        try:
            ended = subprocess.run(
                [*command, "-o", f"{folder}/out"], capture_output=True, text=True, timeout=seconds + SPARE_SECONDS / 2
            )
        except subprocess.TimeoutExpired:
            notes.append("the whole run did not end in its time")
            return None
        wall = time.monotonic() - began
    if ended.returncode:
        notes.append(f"the whole run ended with code {ended.returncode}: {ended.stderr.strip()[-500:]}")
        return None
    report = json.loads(ended.stdout)
    kept = {key: report[key] for key in ("metrics", "timing", "memory", "device", "config")}
    return {"wall_seconds": wall, "achieved": report["sparsity"]["achieved"], **kept}


# The table -----------------------------------------------------------------------------------------------------------


def render(found: dict[str, Any]) -> str:
    """The file as Markdown."""
    head = ("model", "batch", "length", "plain ms", "CAP ms", "ratio", "plain use", "CAP use", "CAP GB", "CAP syncs")
    rows = []
    for row in found["steps"]:
        plain, cap = row["plain"], row["cap"]
        memory = f"{cap['peak_device_bytes'] / 1e9:.2f}" if cap["peak_device_bytes"] is not None else "—"
        syncs = f"{cap['host_syncs_per_step']:g}" if cap["host_syncs_per_step"] is not None else "—"
        speed = (f"{plain['ms']:.2f}", f"{cap['ms']:.2f}", f"{row['ratio']:.2f}")
        used = (f"{plain['utilisation']:.1%}", f"{cap['utilisation']:.1%}")
        rows.append((row["model"], row["batch"], row["length"], *speed, *used, memory, syncs))
    where = found["environment"]
    lines = [
        f"{where['device']}, {where['precision']}, torch {where['torch']}; use = model FLOPs against "
        f"{found['peak_tflops']:g} TFLOP/s (formula in `benchmarks/gpu.py`); syncs = waits for the device per step.",
        table.markdown(head, rows),
    ]
    for row in found["steps"]:
        if (step := row.get("compiled")) is not None:
            memory = f", {step['peak_device_bytes'] / 1e9:.2f} GB" if step["peak_device_bytes"] is not None else ""
            lines.append(
                f"With compiled layers, {row['model']}, batch {row['batch']}, length {row['length']}: "
                f"{step['ms']:.2f} ms ({step['utilisation']:.1%}{memory}), after {step['first_seconds']:.0f} seconds "
                "for the first step."
            )
    if found["selection"]:
        head = ("model", "weights", "ranked", "floor", "selection ms", "passes over the scores")
        chosen = [
            (
                row["model"],
                f"{row['weights']:,}",
                row["scope"],
                row["floor"],
                f"{row['ms']:.3f}",
                f"{row['passes']:.1f}",
            )
            for row in found["selection"]
        ]
        lines.append(table.markdown(head, chosen))
    if run := found["run"]:
        primary, epochs = run["metrics"]["primary"], run["config"]["epochs"]
        dense, pruned = (100 * run["metrics"][which][primary] for which in ("dense", "pruned"))
        lines.append(
            f"A whole run on SST-2 ({run['config']['method']}, sparsity {run['achieved']:.4f}, {epochs} epochs): "
            f"{run['wall_seconds']:.0f} seconds, {primary} {pruned:.2f} % (teacher {dense:.2f} %), "
            f"{run['timing']['examples_per_second']:.0f} examples per second while pruning."
        )
    lines += [f"Note: {note}" for note in found["notes"]]
    return "\n\n".join([*lines, f"`{found['command']}`"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="MiniLM folder, or any other BERT")
    parser.add_argument("--data", default="", help="SST-2 as a folder of parquet files; without it, no whole run")
    parser.add_argument("--method", default="cap-soft")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes and runs, to try the script")
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="of the device in bf16 (790: H200, measured)")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for everything")
    parser.add_argument("-o", dest="out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
