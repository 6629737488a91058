"""`cap prune` and `cap eval` on one real data set after the other, as a user would run them, in processes of their own.

usage: python benchmarks/tasks.py MODEL --data FOLDER [-o WORK] [--json FILE] [--only mnli,squad] [-- OPTIONS OF PRUNE]
       python benchmarks/tasks.py --table FILE [--write docs/benchmarks.md]

FOLDER holds a folder of splits for each set of `SETS`. The options of `cap prune` after `--` replace the short ones
(512 training examples, one epoch of pruning). Besides the metrics of the dense and the pruned model the table shows
what the most frequent answer would score, and whether `cap eval` repeats the report.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import table

from capcli.config.task import TaskConfig
from capcli.data import dataset
from capcli.data.splits import TaskData

SHORT = ["--max-train-samples", "512", "--epochs", "1"]
# Folder name: the task, and further options that its files need.
SETS: dict[str, tuple[str, dict[str, str]]] = {
    "mnli": ("mnli", {}),
    "qqp": ("qqp", {}),
    "sst2": ("sst2", {}),
    "cola": ("cola", {}),
    "mrpc": ("mrpc", {}),
    "stsb": ("stsb", {}),
    "squad": ("squad", {}),
    "banking77": ("banking77", {}),
    "trec": ("text-classification", {"label_column": "coarse_label"}),
    "subj": ("subj", {"holdout": "0.1"}),
    "wnut17": ("wnut17", {}),
}


def cap(*words: str) -> dict[str, Any]:
    """Run `cap ... --json`; its result and the seconds it took."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "capcli", *words, "--json"], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"cap {' '.join(words)} ended with {done.returncode}")
    return {**json.loads(done.stdout), "seconds": time.monotonic() - began}


def most_frequent(data: TaskData, labels: Any) -> float | None:
    """Accuracy of always giving the most frequent label; None where that means nothing."""
    if data.primary != "accuracy":
        return None
    return collections.Counter(labels.tolist()).most_common(1)[0][1] / len(labels)


def one(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one data set."""
    task, more = SETS[name]
    folder, out = args.data / name, args.out / name
    source = ["--task", task, "--data", str(folder)]
    for option, value in more.items():
        source += ["--" + option.replace("_", "-"), value]
    report = cap("prune", args.model, *source, *(args.prune or SHORT), "-o", str(out), "--overwrite")
    again = cap("eval", str(out))
    chosen = TaskConfig(task=task, data=str(folder), label_column=more.get("label_column", ""))
    holdout = float(more.get("holdout", 0))
    data = dataset.load(chosen, train=False, holdout=holdout, seed=report["seed"])
    metrics = report["metrics"]
    return {
        "set": name,
        "primary": metrics["primary"],
        "most_frequent": most_frequent(data, data.evals[metrics["split"]].labels),
        "splits": {
            split: {"dense": row["dense"], "pruned": row["pruned"], "n": row["n_examples"]}
            for split, row in metrics["splits"].items()
        },
        "sparsity": report["sparsity"]["achieved"],
        "bytes": report["size"]["artifact_bytes"],
        "dense_bytes": report["size"]["dense_bytes"],
        "eval_repeats": metrics["pruned"].items() <= again["metrics"].items(),
        "sane": all(math.isfinite(v) and -1 <= v <= 1 for v in again["metrics"].values()),
        "prune_seconds": report["seconds"],
        "eval_seconds": again["seconds"],
        "versions": report["versions"],
        "device": report["device"],
    }


def render(found: dict[str, Any]) -> str:
    """What `--json` wrote, as Markdown."""
    rows = []
    for row in found["rows"]:
        for split, scores in row["splits"].items():
            name = row["set"] if len(row["splits"]) == 1 else f"{row['set']}, {split}"
            chance = "" if row["most_frequent"] is None else f"{100 * row['most_frequent']:.1f}"
            before, after = (100 * scores[key][row["primary"]] for key in ("dense", "pruned"))
            repeats = "yes" if row["eval_repeats"] else "no"
            cost = f"{row['prune_seconds']:.0f} + {row['eval_seconds']:.0f}"
            rows.append((name, row["primary"], scores["n"], chance, f"{before:.1f}", f"{after:.1f}", repeats, cost))
    head = ("set", "metric", "examples", "most frequent", "dense", "pruned", "eval repeats it", "seconds, prune + eval")
    note = f"{found['device']}; sparsity {found['rows'][0]['sparsity']:.2%}; metrics in %. `{found['command']}`"
    return f"{table.markdown(head, rows)}\n\n{note}"


def main() -> None:
    if table.handled("tasks", render):
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default=",".join(SETS))
    words, _, prune = " ".join(sys.argv[1:]).partition(" -- ")
    args = parser.parse_args(words.split(), argparse.Namespace(prune=prune.split()))
    command = ["python benchmarks/tasks.py MODEL --data DATA", *(["--", *args.prune] if args.prune else [])]
    found: dict[str, Any] = {"command": " ".join(command), "rows": []}
    for name in args.only.split(","):
        row = one(name, args)
        found["device"] = row["device"]
        found["rows"].append(row)
        shown = {s: (r["dense"][row["primary"]], r["pruned"][row["primary"]]) for s, r in row["splits"].items()}
        print(name, shown, flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(render(found))


if __name__ == "__main__":
    main()
