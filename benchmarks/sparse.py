"""Bytes against the information bound, and speed against plain safetensors, of the sparse file format.

    python benchmarks/sparse.py [--json] [--matrices 36] [--small]
    python benchmarks/sparse.py --table FILE [--write docs/benchmarks.md]     the table of what --json printed

Speeds are ratios to saving and loading the same dense tensors with safetensors in the same run (1.0 = as fast; both
sides sync what they write; the loaded dense tensors are touched, because safetensors maps them lazily). The whole
BERT-base is that of `sizes.py`; its seconds are those of the processor, on one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sizes as whole
import table
import torch
from safetensors.torch import load_file

from capcli import files
from capcli.artifact import reader, writer

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)


def weights(n_matrices: int, sparsity: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random matrices [768, 3072], 36 of which are the 85 M weights of a base encoder."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(n_matrices):
        removed = torch.rand(768, 3072, generator=generator) < sparsity
        tensors[f"layer.{i}.weight"] = torch.randn(768, 3072, generator=generator).masked_fill_(removed, 0).to(dtype)
    return tensors


def seconds(work: Callable[[], object], repeats: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """The best of `repeats` runs."""
    times = []
    for _ in range(repeats):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


def measure_size(path: Path, sparsity: float, dtype: torch.dtype, quantised: bool = False) -> dict[str, Any]:
    tensors = weights(1, sparsity, dtype)
    sizes = writer.save(path, tensors, list(tensors), quantised=list(tensors) if quantised else ())
    (entry,) = reader.inspect(path)
    return {
        "sparsity": sparsity,
        "dtype": entry.values or entry.dtype,
        "coding": entry.coding,
        "bits": entry.bits,
        "bytes": sizes.pruned_bytes,
        "bound_bytes": sizes.pruned_bound_bytes,
        "over_bound": sizes.pruned_bytes / sizes.pruned_bound_bytes - 1,
        "dense_over_file": sizes.dense_bytes / sizes.file_bytes,
    }


def measure_speed(folder: Path, n_matrices: int, sparsity: float) -> dict[str, Any]:
    tensors = weights(n_matrices, sparsity, torch.float32)
    ours, plain = folder / "ours.safetensors", folder / "plain.safetensors"
    save = seconds(lambda: writer.save(ours, tensors, list(tensors)))
    load = seconds(lambda: reader.load(ours))
    plain_save = seconds(lambda: files.write_tensors(plain, tensors))
    plain_load = seconds(lambda: {name: tensor.clone() for name, tensor in load_file(plain).items()})
    data = ours.read_bytes()
    return {
        "sparsity": sparsity,
        "weights": sum(tensor.numel() for tensor in tensors.values()),
        "save_seconds": save,
        "load_seconds": load,
        "sha256_seconds": seconds(lambda: hashlib.sha256(data).digest()),
        "save_speed_ratio": plain_save / save,
        "load_speed_ratio": plain_load / load,
        "load_dense_gb_per_second": sum(t.numel() * 4 for t in tensors.values()) / load / 1e9,
    }


def measure_bert(folder: Path, small: bool) -> list[dict[str, Any]]:
    """Saving and loading of a whole model, in seconds of the processor."""
    path, rows = folder / "bert.safetensors", []
    for what, stored in whole.variants(whole.pruned_bert(small=small), 100, (16,) if small else (192,)):
        if "words" in what:
            continue
        began = time.process_time()
        sizes = writer.save(path, stored["tensors"], stored["pruned"], quantised=stored["quantised"])
        save = time.process_time() - began
        load = seconds(lambda: reader.load(path), clock=time.process_time)
        rows.append({"stored": what, "file_bytes": sizes.file_bytes, "save_seconds": save, "load_seconds": load})
    return rows


def render(found: dict[str, Any]) -> str:
    """What `--json` printed, as Markdown."""
    head = ("dtype, coding", "sparsity", "bits", "over the bound", "dense / file")
    sizes = [
        (
            f"{r['dtype']}, {r['coding']}",
            f"{r['sparsity']:.1%}",
            r["bits"],
            f"{r['over_bound']:.2%}",
            f"{r['dense_over_file']:.1f}x",
        )
        for r in found["sizes"]
    ]
    speeds = [
        (f"{r['sparsity']:.1%}", f"{r['weights']:,}", f"{r['save_speed_ratio']:.2f}", f"{r['load_speed_ratio']:.2f}")
        for r in found["speeds"]
    ]
    below = "Speed against saving and loading the same dense tensors with safetensors (1 = as fast), one thread:"
    second = table.markdown(("sparsity", "weights", "saving", "loading"), speeds)
    bert = [
        (r["stored"], f"{r['file_bytes'] / 1e6:.1f}", f"{r['save_seconds']:.2f}", f"{r['load_seconds']:.2f}")
        for r in found["bert"]
    ]
    last = "A whole BERT-base, 97 % of its prunable weights removed, in seconds of one processor:"
    third = table.markdown(("stored", "file MB", "saving", "loading"), bert)
    return "\n\n".join((table.markdown(head, sizes), below, second, last, third))


def main() -> None:
    if table.handled("sparse", render):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--matrices", type=int, default=36, help="matrices [768, 3072] in the speed test (36)")
    parser.add_argument("--small", action="store_true", help="few and small, to see that this runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sparsities = SPARSITIES[-1:] if args.small else SPARSITIES
        values = ((torch.float32, False), (torch.float16, False), (torch.float32, True))
        found = {
            "sizes": [measure_size(folder / "size", s, dtype, int8) for dtype, int8 in values for s in sparsities],
            "speeds": [measure_speed(folder, args.matrices, s) for s in ((0.97,) if args.small else (0.5, 0.8, 0.97))],
            "bert": measure_bert(folder, args.small),
        }
    print(json.dumps(found, indent=2) if args.json else render(found))


if __name__ == "__main__":
    main()
