"""One run by one process and by several: what comes out, examples per second, memory.

    python benchmarks/ranks.py MODEL --task sst2 --data PATH -o FOLDER [--ranks 1,2] [options of `cap prune`]
    python benchmarks/ranks.py --table FOLDER/ranks.json [--write docs/benchmarks.md]

Options that are not listed by --help go to `cap prune` as they are. Finished runs are kept, stopped ones go on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import table

from capcli import files


def main() -> None:
    if table.handled("ranks", render):
        return
    args, options = arguments()
    rows = []
    for n in map(int, args.ranks.split(",")):
        out = args.out / f"ranks-{n}"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
        command = [sys.executable, *launcher, "-m", "capcli", "prune", args.model, *options, "-o", str(out)]
        subprocess.run(command, check=True)
        rows.append(row(n, json.loads((out / "report.json").read_text())))
        about = {name: rows[0]["report"][name] for name in ("device", "versions")}
        command = shlex.join(["python", *sys.argv])
        kept = [{name: value for name, value in one.items() if name != "report"} for one in rows]
        files.write_json(args.out / "ranks.json", {"schema_version": 1, "command": command, **about, "rows": kept})
    print(render(json.loads((args.out / "ranks.json").read_text())))


def row(n: int, report: dict[str, Any]) -> dict[str, Any]:
    """What a run by `n` processes gave; memory is that of the process that took most."""
    timing, primary = report["timing"], report["metrics"]["primary"]
    processes = report.get("processes") or [report["memory"]]
    return {
        "ranks": n,
        "metric": primary,
        "dense": report["metrics"]["dense"][primary],
        "pruned": report["metrics"]["pruned"][primary],
        "last_loss": report["history"][-1]["losses"]["total"],
        "examples_per_second": timing["examples_per_second"],
        "total_seconds": timing["total_seconds"],
        "peak_host_bytes": max(one["peak_host_bytes"] for one in processes),
        "peak_device_bytes": max(one["peak_device_bytes"] for one in processes),
        "report": report,
    }


def render(found: dict[str, Any]) -> str:
    """The file as Markdown."""
    rows = [
        (
            one["ranks"],
            f"{100 * one['dense']:.2f}",
            f"{100 * one['pruned']:.2f}",
            f"{one['last_loss']:.4f}",
            f"{one['examples_per_second']:,.0f}",
            f"{one['total_seconds']:,.0f}",
            f"{one['peak_host_bytes'] / 1e6:,.0f}",
            f"{one['peak_device_bytes'] / 1e6:,.0f}",
        )
        for one in found["rows"]
    ]
    metric = found["rows"][0]["metric"]
    head = ["processes", f"dense {metric}, %", "pruned, %", "last loss", "examples per second", "seconds of the run"]
    head += ["peak MB of a process", "of a device"]
    note = f"{found['device']}, torch {found['versions']['torch']}."
    return f"{note}\n\n{table.markdown(head, rows)}\n\n`{found['command']}`"


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ranks", default="1,2", help="numbers of processes")
    parser.add_argument("-o", dest="out", type=Path, required=True)
    return parser.parse_known_args()


if __name__ == "__main__":
    main()
