"""Our own readers of data files beside those of the library `datasets`: time, memory, copies on disk, what errors say.

    python benchmarks/readers.py [--rows 200000] [--json readers.json]
    python benchmarks/readers.py --table readers.json

Each reading is a process of its own, with an empty cache: it imports what it needs, opens one file of random texts and
codes, and takes all rows in batches. Memory is the peak resident set, which counts pages of files that are mapped.
`library`: `load_dataset`, which writes an Arrow copy into its cache and maps it (`load_from_disk` for a folder that
was saved; it copies nothing). `streaming`: the same without the copy.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import table

FORMATS = ("csv", "csv.gz", "jsonl", "parquet", "saved")
READERS = ("ours", "library", "streaming")
BATCH = 2000
# Files with one row that is wrong, or with cells that a reader may take for something else.
FAULTS = {
    "one cell too many": ("csv", "text,label\n" + "a good film,1\n" * 5000 + "bad, very bad,0\n"),
    "one cell too few": ("csv", "text,label\n" + "a good film,1\n" * 5000 + "bad\n"),
    "a quote that is not closed": ("csv", "text,label\n" + "a good film,1\n" * 5000 + '"bad,0\n' + "a film,1\n" * 9),
    "a broken object": ("jsonl", '{"text": "a", "label": 1}\n' * 5000 + '{"text": "b", "label": \n'),
    "a text NA": ("csv", "text,label\nNA,0\n007,1\n"),
    "a name of a class None": ("csv", "text,label\na film,None\nb film,yes\n"),
}


def main() -> None:
    if table.handled("readers", render):
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--json", default="")
    parser.add_argument("--one", nargs=2, metavar=("READER", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(read(args.one[0], Path(args.one[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = written(Path(folder), args.rows)
        found = [{"format": kind, "reader": by, **one(by, paths[kind])} for kind in paths for by in READERS]
        said = [
            {"fault": name, "reader": by, **fault(by, Path(folder), *FAULTS[name])} for name in FAULTS for by in READERS
        ]
    result = {"rows": args.rows, "machine": about(), "readings": found, "faults": said}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(render(result))


def about() -> dict[str, str]:
    import datasets
    import pyarrow

    return {"python": platform.python_version(), "datasets": datasets.__version__, "pyarrow": pyarrow.__version__}


def written(folder: Path, n_rows: int) -> dict[str, Path]:
    """The same rows, about 100 bytes each, in every format."""
    import datasets

    words = np.random.default_rng(1).integers(0, 5000, (n_rows, 16))
    rows = {
        "text": [" ".join(f"w{word}" for word in row) for row in words],
        "label": [int(row[0] % 2) for row in words],
    }
    whole = datasets.Dataset.from_dict(rows)
    paths = {kind: folder / ("train" if kind == "saved" else f"train.{kind}") for kind in FORMATS}
    paths["csv"].write_text("text,label\n" + "".join(f"{t},{y}\n" for t, y in zip(*rows.values(), strict=True)))
    paths["csv.gz"].write_bytes(gzip.compress(paths["csv"].read_bytes()))
    pairs = zip(*rows.values(), strict=True)
    paths["jsonl"].write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in pairs))
    whole.to_parquet(paths["parquet"])
    whole.save_to_disk(paths["saved"])
    return paths


def one(reader: str, path: Path) -> dict[str, Any]:
    """What a process that reads a file with an empty cache needs; or the error that it ends with."""
    with tempfile.TemporaryDirectory() as cache:
        env = {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        command = [sys.executable, __file__, "--one", reader, str(path)]
        began = time.perf_counter()
        done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        copied = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
    if done.returncode:
        return {"error": next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")[:300]}
    return {**json.loads(done.stdout), "process_seconds": seconds, "copied_bytes": copied}


def fault(reader: str, folder: Path, kind: str, text: str) -> dict[str, Any]:
    path = folder / f"fault.{kind}"
    path.write_text(text)
    found = one(reader, path)
    return {"says": found.get("error") or "no error; first and last row: {}, {}".format(*found["ends"])}


# In the process that is measured -------------------------------------------------------------------------------------


def read(reader: str, path: Path) -> dict[str, Any]:
    began = time.perf_counter()
    if reader == "ours":
        from capcli.data import tables
    else:
        import datasets

        datasets.disable_progress_bars()
    imported = time.perf_counter() - began
    batches: Iterable[dict[str, list[Any]]]
    if reader == "ours":
        files = sorted(path.glob("*.arrow")) if path.is_dir() else [path]
        batches = tables.open_files(files).batches(("text", "label"), BATCH)
    elif path.is_dir():
        saved = datasets.load_from_disk(str(path))
        batches = (saved.to_iterable_dataset() if reader == "streaming" else saved).iter(BATCH)
    else:
        kind = {"csv": "csv", "jsonl": "json", "parquet": "parquet"}[path.name.split(".")[1]]
        whole = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=reader == "streaming")
        batches = whole.iter(BATCH)
    n_rows = 0
    ends: list[Any] = []
    for batch in batches:
        n_rows += len(batch["text"])
        found = list(zip(batch["text"], batch["label"], strict=True))
        ends = [ends[0] if ends else found[0], found[-1]]
    return {
        "rows": n_rows,
        "ends": ends,
        "import_seconds": imported,
        "read_seconds": time.perf_counter() - began - imported,
        "peak_bytes": peak(),
    }


def peak() -> int:
    from capcli.machine import peak_bytes

    return int(peak_bytes())


# The tables ----------------------------------------------------------------------------------------------------------


def render(result: dict[str, Any]) -> str:
    lines = [
        "| file | reader | import, s | read, s | peak memory, MB | copied, MB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in result["readings"]:
        if "error" in row:
            lines.append(f"| {row['format']} | {row['reader']} | {row['error']} | | | |")
            continue
        sizes = f"{row['peak_bytes'] / 1e6:.0f} | {row['copied_bytes'] / 1e6:.0f}"
        times = f"{row['import_seconds']:.2f} | {row['read_seconds']:.2f}"
        lines.append(f"| {row['format']} | {row['reader']} | {times} | {sizes} |")
    lines += ["", "| fault | reader | what comes |", "| --- | --- | --- |"]
    lines += [f"| {row['fault']} | {row['reader']} | {row['says'].replace('|', '¦')} |" for row in result["faults"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
