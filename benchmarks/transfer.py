"""What pruned encoders still know about other tasks: the models of a quality study, probed on one set after another.

    python benchmarks/transfer.py STUDY PRETRAINED --data FOLDER [--json FILE] [--only sst2,trec]
                                  [-- OPTIONS OF PROBE]
    python benchmarks/transfer.py --table FILE [--write docs/benchmarks.md]

STUDY is the folder of benchmarks/quality.py at one sparsity, with its runs and teachers; PRETRAINED the model that they
came from; FOLDER holds a folder of splits for each set of `SETS`. Every difference is measured by `cap probe` on the
same examples and seeds; what it keeps in its cache makes the same command quick.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import table

from capcli import files
from capcli.config.names import METHODS
from capcli.measuring import noise

# Folder name: the task, and further options that its files need.
SETS: dict[str, tuple[str, list[str]]] = {
    "sst2": ("sst2", []),
    "mrpc": ("mrpc", []),
    "cola": ("cola", []),
    "stsb": ("stsb", []),
    "trec": ("text-classification", ["--label-column", "coarse_label"]),
    "subj": ("subj", []),
}
PRETRAINED, TEACHER = "pretrained", "teacher"


def models(args: argparse.Namespace) -> dict[int, dict[str, str]]:
    """By seed: the label of each model and where it is, from the least to the most changed."""
    study = json.loads((args.study / "quality.json").read_text())
    found: dict[int, dict[str, str]] = {}
    for run in study["runs"]:
        if "metrics" not in run:
            raise SystemExit(f"a run of {args.study} failed: {run['label']}")
        seed = run["seed"]
        known = found.setdefault(seed, {PRETRAINED: args.model, TEACHER: str(args.study / "teachers" / str(seed))})
        if run["label"] in known:
            raise SystemExit(f"{args.study} has several sparsities of {run['label']}, and one is needed")
        known[run["label"]] = str(args.study / "runs" / run["name"])
    return found


def pairs(labels: list[str]) -> list[tuple[str, str]]:
    """What is compared: each method with contrastive losses to its criterion alone and to magnitude; the ends."""
    chosen = [(label, METHODS[label].criterion) for label in labels if label.startswith("cap-")]
    chosen += [(label, "magnitude") for label in labels if label.startswith("cap-")]
    chosen += [("cap-soft", "cap-m"), ("movement", "magnitude"), (TEACHER, PRETRAINED)]
    chosen += [(label, TEACHER) for label in labels if label.startswith("cap-")]
    return [pair for pair in dict.fromkeys(chosen) if set(pair) <= set(labels) and pair[0] != pair[1]]


def probe(args: argparse.Namespace, name: str, subject: str, others: list[str]) -> dict[str, Any]:
    """One `cap probe` of the subject beside others."""
    task, options = SETS[name]
    words = ["probe", subject, "--tasks", task, "--data", str(args.data / name), *options, *args.extra]
    words += ["--baseline", ",".join(others)] if others else []
    done = subprocess.run([sys.executable, "-m", "capcli", *words, "--json"], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"cap {shlex.join(words)} ended with {done.returncode}")
    return dict(json.loads(done.stdout))


def one_set(args: argparse.Namespace, name: str, known: dict[str, str]) -> dict[str, Any]:
    """Scores of all models of a seed on one set, and the differences of `pairs`."""
    scores: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    wanted = pairs(list(known))
    for label in known:
        theirs = [other for one, other in wanted if one == label]
        print(f"{time.strftime('%H:%M:%S')} {name}: {label}", file=sys.stderr, flush=True)
        found = probe(args, name, known[label], [known[other] for other in theirs])
        [scores[label]] = found["tasks"].values()
        for other, row in zip(theirs, found["baselines"], strict=True):
            differences[f"{label} - {other}"] = row["differences"]["mean"]
    return {"scores": scores, "differences": differences}


def study(args: argparse.Namespace) -> dict[str, Any]:
    """All sets and seeds."""
    quality = json.loads((args.study / "quality.json").read_text())
    known = models(args)
    return {
        "schema_version": 1,
        "command": shlex.join(["python", *sys.argv]),
        "of": quality["command"],
        "environment": quality["environment"],
        "task": {
            "name": quality["task"],
            "metric": quality["primary"],
            "seeds": {seed: values[quality["primary"]] for seed, values in quality["teachers"].items()},
            "runs": [
                {"label": run["label"], "seed": run["seed"], "value": run["metrics"]["pruned"][quality["primary"]]}
                for run in quality["runs"]
            ],
            "sparsity": quality["runs"][0]["sparsity"],
            "n_examples": quality["runs"][0]["metrics"]["n_examples"],
        },
        "seeds": {seed: {name: one_set(args, name, table) for name in args.only} for seed, table in known.items()},
    }


# The table -----------------------------------------------------------------------------------------------------------


def render(found: dict[str, Any]) -> str:
    """Scores by model and set, and differences with intervals."""
    by_seed = list(found["seeds"].values())
    sets, labels = list(by_seed[0]), list(next(iter(by_seed[0].values()))["scores"])
    task = found["task"]
    own = {TEACHER: list(task["seeds"].values())}
    for run in task["runs"]:
        own.setdefault(run["label"], []).append(run["value"])
    rows = []
    for label in labels:
        cells = []
        for name in sets:
            scores = [seed[name]["scores"][label] for seed in by_seed]
            cells.append(
                (mean(scores, "mean"), mean(scores, "deviation") if scores[0]["deviation"] is not None else None)
            )
        shown = [
            f"{100 * value:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else "") for value, spread in cells
        ]
        trained = f"{100 * statistics.mean(own[label]):.1f}" if label in own else "—"
        rows.append((label, trained, *shown, f"{100 * statistics.mean(value for value, _ in cells):.1f}"))
    metrics = [f"{name} ({by_seed[0][name]['scores'][labels[0]]['metric']})" for name in sets]
    first = table.markdown(("model", f"{task['name']} ({task['metric']})", *metrics, "mean of the probes"), rows)
    lines = []
    for pair in next(iter(by_seed[0].values()))["differences"]:
        estimates = [averaged([seed[name]["differences"][pair] for seed in by_seed]) for name in sets]
        lines.append((pair.replace(" - ", " − "), *map(points, [*estimates, noise.mean(estimates)])))
    second = table.markdown(("difference", *sets, "mean"), lines)
    scores = [one["scores"][labels[0]] for one in by_seed[0].values()]
    sizes = ", ".join(
        f"{name} {row['n_train']:,} and {row['n_examples']:,}" for name, row in zip(sets, scores, strict=True)
    )
    where = found["environment"]
    note = (
        f"Encoders pruned to {task['sparsity']:.0%} for {task['name']} and frozen; linear probes in points, the mean ± "
        f"standard deviation of {len(scores[0]['values'])} probes, each trained on other examples; pruning seeds: "
        f"{', '.join(found['seeds'])}. The first column is the model's own task on {task['n_examples']:,} examples. "
        f"Examples to train on and to test: {sizes}. "
        f"{where.get('device', '')}, torch {where.get('versions', {}).get('torch')}."
    )
    legend = (
        "Differences in points on the same examples and seeds, with 95 % intervals from resampled examples and probes"
        + (", averaged over the pruning seeds" if len(by_seed) > 1 else "")
        + "; **bold** where the interval leaves zero out."
    )
    commands = f"`{found['of']}`\n\n`{found['command']}`"
    return f"{note}\n\n{first}\n\n{legend}\n\n{second}\n\n{commands}"


def mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def averaged(rows: list[dict[str, Any]]) -> noise.Estimate:
    """The mean over pruning seeds: their intervals averaged, as the test examples are the same, and their spread."""
    value, values = mean(rows, "value"), [row["value"] for row in rows]
    spread = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    halves = [statistics.mean(abs(row["confidence_95"][side] - row["value"]) for row in rows) for side in (0, 1)]
    return noise.stored(value, [value - math.hypot(halves[0], spread), value + math.hypot(halves[1], spread)])


def points(estimate: noise.Estimate) -> str:
    low, high = estimate.interval(0.95) or (float("nan"), float("nan"))
    text = f"{100 * estimate.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def main() -> None:
    if table.handled("transfer", render):
        return
    words = sys.argv[1:]
    words, extra = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SETS))
    parser.add_argument("--json", type=Path, default=Path("transfer.json"))
    args = parser.parse_args(words)
    args.extra = extra
    files.write_json(args.json, study(args))
    print(render(json.loads(args.json.read_text())))


if __name__ == "__main__":
    main()
