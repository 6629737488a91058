"""Bytes against the information bound, and speed against plain safetensors, of the sparse file format.

    python benchmarks/sparse.py [--json] [--matrices 36]
    python benchmarks/sparse.py --table FILE [--write docs/benchmarks.md]     the table of what --json printed

Speeds are ratios to saving and loading the same dense tensors with safetensors in the same run (1.0 = as fast; both
sides sync what they write; the loaded dense tensors are touched, because safetensors maps them lazily).
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

import table
import torch
from safetensors.torch import load_file

from capcli import files, sparse

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)


def weights(n_matrices: int, sparsity: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random matrices [768, 3072], 36 of which are the 85 M weights of a base encoder."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i in range(n_matrices):
        removed = torch.rand(768, 3072, generator=generator) < sparsity
        tensors[f"layer.{i}.weight"] = torch.randn(768, 3072, generator=generator).masked_fill_(removed, 0).to(dtype)
    return tensors


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The best of `repeats` runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_size(path: Path, sparsity: float, dtype: torch.dtype) -> dict[str, Any]:
    sizes = sparse.save(path, tensors := weights(1, sparsity, dtype), list(tensors))
    (entry,) = sparse.inspect(path)
    return {
        "sparsity": sparsity,
        "dtype": entry.dtype,
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
    save = seconds(lambda: sparse.save(ours, tensors, list(tensors)))
    load = seconds(lambda: sparse.load(ours))
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
    return f"{table.markdown(head, sizes)}\n\n{below}\n\n{second}"


def main() -> None:
    if table.handled("sparse", render):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--matrices", type=int, default=36, help="matrices [768, 3072] in the speed test (36)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dtypes = (torch.bfloat16, torch.float32)
        sizes = [measure_size(folder / "size.safetensors", s, dtype) for dtype in dtypes for s in SPARSITIES]
        speeds = [measure_speed(folder, args.matrices, s) for s in (0.5, 0.8, 0.97)]
    if args.json:
        print(json.dumps({"sizes": sizes, "speeds": speeds}, indent=2))
        return
    print("dtype  sparsity  coding   bits  over bound  dense / file")
    for r in sizes:
        print(f"{r['dtype']:<6} {r['sparsity']:>8.1%}  {r['coding']:<8} {r['bits']:>3}  {r['over_bound']:>9.2%}"
              f"  {r['dense_over_file']:>11.1f}x")  # fmt: skip
    print("\nSpeed (ratios: 1 = as fast as plain safetensors)")
    print("sparsity  weights      save s  load s  of which sha256  save / plain  load / plain")
    for r in speeds:
        print(
            f"{r['sparsity']:>8.1%}  {r['weights']:>11,}  {r['save_seconds']:>6.2f}  {r['load_seconds']:>6.2f}"
            f"  {r['sha256_seconds']:>15.3f}  {r['save_speed_ratio']:>12.2f}  {r['load_speed_ratio']:>12.2f}"
        )


if __name__ == "__main__":
    main()
