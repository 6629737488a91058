"""How many singular values the pruned matrices of runs need: what a factorisation after the pruning could gain.

    python benchmarks/thin.py LABEL=RUN [LABEL=RUN ...] [--json FILE]
    python benchmarks/thin.py --table FILE.json [--write docs/benchmarks.md]

Of each matrix W∘M [out, in]: the smallest k whose k largest singular values hold `ENERGY` of the sum of squares. Two
thin factors of that rank take k·(out + in) weights; a sparse matrix with as many has the sparsity 1 - k·(out + in) /
(out·in). Beside each run stands the same of a matrix with its values in random places, so that what the masks do can be
told from what any mask of that density does.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import table

from capcli import files
from capcli.artifact import reader
from capcli.models.model import WEIGHTS_FILE

ENERGY = 0.9


def main() -> None:
    if table.handled("thin", render):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row(*text.split("=", 1)) for text in args.runs]
    command = shlex.join(["python", *sys.argv[:1], *(f"{text.split('=', 1)[0]}=RUN" for text in args.runs)])
    found = {"schema_version": 1, "command": command, "energy": ENERGY, "rows": rows}
    print(render(found))
    if args.json:
        files.write_json(args.json, found)


def row(label: str, run: str) -> dict[str, Any]:
    """Means over the pruned matrices of a run."""
    report = json.loads((Path(run) / "report.json").read_text())
    tensors = reader.load(Path(run) / WEIGHTS_FILE)
    rng, shares, shuffled, gains = np.random.default_rng(0), [], [], []
    for matrix in report["sparsity"]["per_matrix"]:
        weight = tensors[matrix["name"]].double().numpy()
        n_out, n_in = weight.shape
        rank = needed(weight)
        shares.append(rank / min(n_out, n_in))
        shuffled.append(needed(rng.permuted(weight.ravel()).reshape(weight.shape)) / min(n_out, n_in))
        gains.append(rank * (n_out + n_in) / (n_out * n_in))
    return {
        "label": label,
        "method": report["method"],
        "sparsity": report["sparsity"]["achieved"],
        "rank": float(np.mean(shares)),
        "rank_shuffled": float(np.mean(shuffled)),
        "factors": float(np.mean(gains)),
    }


def needed(weight: np.ndarray) -> int:
    """How many singular values hold `ENERGY`."""
    squares = np.linalg.svd(weight, compute_uv=False) ** 2
    return int(np.searchsorted(np.cumsum(squares), ENERGY * squares.sum()) + 1)


def render(found: dict[str, Any]) -> str:
    """The file as Markdown."""
    head = ["run", "sparsity, %", "rank, % of full", "the same values elsewhere", "weights of two factors, % of dense"]
    rows = [
        (
            one["label"],
            f"{100 * one['sparsity']:.1f}",
            f"{100 * one['rank']:.1f}",
            f"{100 * one['rank_shuffled']:.1f}",
            f"{100 * one['factors']:.1f}",
        )
        for one in found["rows"]
    ]
    share = f"{100 * found['energy']:.0f}"
    note = f"Singular values that hold {share} % of the squares of a pruned matrix, mean over the matrices of a run."
    return f"{note}\n\n{table.markdown(head, rows)}\n\n`{found['command']}`"


if __name__ == "__main__":
    main()
