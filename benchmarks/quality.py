"""The quality study: every method, sparsity and seed from the same teachers, then ablations of one method.

    python benchmarks/quality.py MODEL --task sst2 --data PATH -o FOLDER [options of `cap prune`]
    python benchmarks/quality.py --table FOLDER/quality.json [--write docs/benchmarks.md]

Each run is a `cap prune` of its own, so that one crash does not end the study. The same command goes on where it was
stopped: finished runs are kept in FOLDER/runs. The first run of a seed fine-tunes the teacher that all runs of this
seed learn from. Options that are not listed by --help go to `cap prune` as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import table

from capcli import files, models, tasks, tokens
from capcli.config import METHODS, Hardware, PruneConfig, TaskConfig, build
from capcli.run import finished as returned

STOPPED = (75, 130, -2, -15)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. `label` is its row in the table: a method, or what an ablation changes; `options` are of `cap prune`."""

    label: str
    method: str
    sparsity: float
    seed: int
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.label.replace(' ', '-')}-{self.sparsity:g}-seed{self.seed}"


# What is run ---------------------------------------------------------------------------------------------------------


def grid(args: argparse.Namespace) -> list[Cell]:
    """Method x sparsity x seed; the first cell of each seed makes its teacher."""
    return [
        Cell(label=method, method=method, sparsity=sparsity, seed=seed)
        for sparsity in args.sparsities
        for method in args.methods
        for seed in args.seeds
    ]


def ablations(method: str, sparsity: float, seeds: list[int]) -> list[Cell]:
    """The method, without each of its parts, with one kind of contrastive term, and once with the paper's preset.

    Without all contrastive terms it is the method named after its criterion.
    """

    def without(*parts: str) -> tuple[str, ...]:
        return ("--losses", ",".join(name for name in METHODS["cap-soft"].losses if name not in parts))

    changes = {f"{method} without {part}": without(part) for part in ("prc", "snc", "fic", "kd")}
    changes[f"{method} only supervised"] = ("--unsupervised-weight", "0")
    changes[f"{method} only unsupervised"] = ("--supervised-weight", "0")
    plain = [
        Cell(label=name, method=name, sparsity=sparsity, seed=seed)
        for name in dict.fromkeys((method, METHODS[method].criterion))
        for seed in seeds
    ]
    cells = plain + [
        Cell(label=label, method=method, sparsity=sparsity, seed=seed, options=options)
        for label, options in changes.items()
        for seed in seeds
    ]
    paper = Cell(
        label=f"{method} preset paper", method=method, sparsity=sparsity, seed=seeds[0], options=("--preset", "paper")
    )
    return [*cells, paper]


def ablated(args: argparse.Namespace, done: list[dict[str, Any]]) -> tuple[str, float] | None:
    """What --ablate names; `best` is the method with contrastive losses that is best at the highest sparsity."""
    if args.ablate == "none":
        return None
    if args.ablate != "best":
        method, _, sparsity = args.ablate.partition("@")
        return method, float(sparsity)
    highest = max(args.sparsities)
    rows = [row for row in summary(done) if row["sparsity"] == highest and row["label"].startswith("cap-")]
    return (max(rows, key=lambda row: row["mean"])["label"], highest) if rows else None


# Running -------------------------------------------------------------------------------------------------------------


def run_all(args: argparse.Namespace, cells: list[Cell], done: dict[str, dict[str, Any]]) -> None:
    """Run the cells, `--workers` at a time, those that make a teacher before all others."""
    making = {cell.seed: cell for cell in reversed(cells) if teacher_of(args, cell) is None}
    with ThreadPoolExecutor(args.workers) as pool:
        for group in (list(making.values())[::-1], [cell for cell in cells if cell not in making.values()]):
            for cell, found in zip(group, pool.map(lambda cell: run_one(args, cell), group), strict=True):
                done[cell.name] = found
                save(args, done)


def refuse_other(args: argparse.Namespace) -> None:
    """A folder is of one model, task, teacher and set of options; methods, sparsities and seeds may be added."""
    path = args.out / "study.json"
    ours = {name: getattr(args, name) for name in ("model", "task", "data", "epochs", "teacher", "extra")}
    if path.is_file() and (theirs := json.loads(path.read_text())) != ours:
        raise SystemExit(f"{args.out} holds another study: {theirs}")
    files.write_json(path, ours)


def teacher_of(args: argparse.Namespace, cell: Cell) -> Path | None:
    """The teacher that this run learns from; None where it has to be made."""
    folder = args.out / "teachers" / str(cell.seed)
    return Path(args.teacher) if args.teacher else folder if files.is_complete(folder) else None


def run_one(args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """Run a cell unless its record is there; returns the record, or one with `error`."""
    out, record = args.out / "runs" / cell.name, args.out / "runs" / f"{cell.name}.json"
    common = ["--task", args.task, "--data", args.data, "--epochs", str(args.epochs), *args.extra]
    wanted = [args.model, *common, "--method", cell.method, f"--sparsity={cell.sparsity}", f"--seed={cell.seed}"]
    wanted += cell.options
    if record.is_file():
        return dict(json.loads(record.read_text()))
    teacher = teacher_of(args, cell)
    own = out / "work" / "teacher"
    maker = teacher is None or (not args.teacher and own.is_dir())  # a stopped maker goes on without --teacher
    command = [sys.executable, "-m", "capcli", "prune", *wanted, "-o", str(out), "--json", "-q"]
    command += ["--keep-work"] if maker else ["--teacher", str(teacher)]
    print(f"{time.strftime('%H:%M:%S')} {cell.name}", file=sys.stderr, flush=True)
    began = time.monotonic()
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode in STOPPED:
        raise SystemExit(75)
    found = {"label": cell.label, "method": cell.method, "sparsity": cell.sparsity, "seed": cell.seed}
    found |= {"arguments": wanted, "wall_seconds": time.monotonic() - began}
    if files.is_complete(own):
        keep_teacher(own, args.out / "teachers" / str(cell.seed))
    if ended.returncode:
        print(f"{cell.name} failed: {ended.stderr.strip()}", file=sys.stderr, flush=True)
        return found | {"error": ended.stderr.strip()[-2000:], "exit_code": ended.returncode}
    report = json.loads(ended.stdout)
    found |= {key: report[key] for key in ("metrics", "timing", "config", "device", "versions", "memory")}
    found |= {"achieved": report["sparsity"]["achieved"], "artifact_bytes": report["size"]["artifact_bytes"]}
    files.remove(out / "work")
    files.remove(out.parent / f"{out.name}.right.npy")
    files.write_json(record, found)
    return found


def keep_teacher(made: Path, folder: Path) -> None:
    """Copy a run's teacher to where the other runs find it."""
    if not files.is_complete(folder):
        files.remove(folder)
        shutil.copytree(made, folder)


def save(args: argparse.Namespace, done: dict[str, dict[str, Any]], paired: list[dict[str, Any]] | None = None) -> None:
    """Write FOLDER/quality.json as far as the study is."""
    runs = list(done.values())
    finished = [run for run in runs if "metrics" in run]
    study = {
        "schema_version": 1,
        "command": shlex.join(["python", *sys.argv]),
        "model": args.model,
        "task": args.task,
        "environment": environment(finished),
        "primary": finished[0]["metrics"]["primary"] if finished else "",
        "teachers": {run["seed"]: run["metrics"]["dense"] for run in sorted(finished, key=lambda run: run["seed"])},
        "summary": summary(finished),
        "paired": paired or [],
        "runs": runs,
    }
    files.write_json(args.out / "quality.json", study)


def environment(finished: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the numbers are from: the runs' own record of device and versions, and the machine."""
    known = {"device": finished[0]["device"], "versions": finished[0]["versions"]} if finished else {}
    return {"machine": platform.machine(), "cores": os.cpu_count(), "system": platform.platform(), **known}


# Comparing -----------------------------------------------------------------------------------------------------------


def summary(finished: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over the seeds of each (label, sparsity), in the order of the runs."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in finished:
        groups.setdefault((run["label"], run["sparsity"]), []).append(run)
    rows = []
    for (label, sparsity), runs in groups.items():
        values = [run["metrics"]["pruned"][run["metrics"]["primary"]] for run in runs]
        dense = [run["metrics"]["dense"][run["metrics"]["primary"]] for run in runs]
        rows.append(
            {
                "label": label,
                "method": runs[0]["method"],
                "sparsity": sparsity,
                "seeds": [run["seed"] for run in runs],
                "mean": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "teacher": statistics.mean(dense),
                "retention": statistics.mean(v / d if d else math.nan for v, d in zip(values, dense, strict=True)),
                "seconds": statistics.mean(run["timing"]["prune_seconds"] for run in runs),
            }
        )
    return rows


def baseline_of(label: str, method: str) -> str:
    """What a row is compared with: an ablation with its method, a method with contrastive losses with its criterion."""
    return method if label != method else METHODS[method].criterion


def paired(args: argparse.Namespace, done: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Difference of each row to its baseline on the same examples and seeds, with a 95 % bootstrap interval.

    Accuracy only. Every artefact is evaluated once more to know which examples it has right.
    """
    right: dict[tuple[str, float, int], Any] = {}
    for name, run in done.items():
        if "metrics" in run and "accuracy" in run["metrics"]["pruned"]:
            right[run["label"], run["sparsity"], run["seed"]] = correct(args.out / "runs" / name, run["config"])
    rows = []
    for row in summary(run for run in done.values() if "metrics" in run):
        base, sparsity = baseline_of(row["label"], row["method"]), row["sparsity"]
        seeds = [s for s in row["seeds"] if {(row["label"], sparsity, s), (base, sparsity, s)} <= right.keys()]
        if base == row["label"] or not seeds:
            continue
        both = [[right[label, sparsity, seed] for seed in seeds] for label in (row["label"], base)]
        difference = np.mean(both[0], axis=0) - np.mean(both[1], axis=0)  # [N]
        draws = np.random.default_rng(0).integers(len(difference), size=(2000, len(difference)))
        low, high = np.quantile(difference[draws].mean(axis=1), [0.025, 0.975])
        rows.append({"label": row["label"], "baseline": base, "sparsity": sparsity, "seeds": seeds})
        rows[-1] |= {"difference": float(difference.mean()), "confidence_95": [float(low), float(high)]}
    return rows


def correct(out: Path, stored: dict[str, Any]) -> Any:
    """Which evaluation examples an artefact has right, as bits [N]; kept beside it."""
    path = out.parent / f"{out.name}.right.npy"
    if path.is_file():
        return np.load(path)
    on = models.compute(build(Hardware, stored))
    config = build(TaskConfig, stored)
    data = tasks.load(config, train=False)
    model = models.place(models.load_model(str(out), data.labels, data.kind, 1), on)
    length = models.longest_input(model, config.longest)
    examples = tokens.encode(next(iter(data.evals.values())), model.tokenizer, length)
    coding = models.encoded(model, examples, on, lambda **_: None)  # type: ignore[arg-type, return-value]
    found: np.ndarray = returned(coding)[0].argmax(dim=1).cpu().numpy() == examples.labels
    np.save(path, found)
    return found


# The table -----------------------------------------------------------------------------------------------------------


def render(study: dict[str, Any]) -> str:
    """The study as Markdown."""
    rows, primary = study["summary"], study["primary"]
    if not rows:
        return table.MISSING
    found = {(row["label"], row["sparsity"]): row for row in rows}
    pairs = {(row["label"], row["sparsity"]): row for row in study["paired"]}
    lines = []
    for key, row in found.items():
        base = found.get((baseline_of(row["label"], row["method"]), row["sparsity"]), row)
        spread = f" ± {100 * row['deviation']:.2f}" if row["deviation"] is not None else ""
        shown = "—" if base is row else f"{100 * (row['mean'] - base['mean']):+.2f} to {base['label']}"
        if key in pairs:
            low, high = (100 * bound for bound in pairs[key]["confidence_95"])
            shown = f"{100 * pairs[key]['difference']:+.2f} [{low:+.2f}, {high:+.2f}] to {base['label']}"
        values = (f"{100 * row['mean']:.2f}{spread}", shown, f"{row['retention']:.1%}", f"{row['seconds']:.0f}")
        lines.append((row["label"], f"{row['sparsity']:g}", len(row["seeds"]), *values))
    head = ("run", "sparsity", "seeds", f"{primary}, %", "difference, points [95 %]", "retention", "seconds")
    teachers = ", ".join(f"{100 * found[primary]:.2f} (seed {seed})" for seed, found in study["teachers"].items())
    where, versions = study["environment"].get("device", ""), study["environment"].get("versions", {})
    failed = sum("error" in run for run in study["runs"])
    note = (
        f"{study['model']} on {study['task']}; {primary} of the teacher: {teachers}. "
        f"{where if isinstance(where, str) else ', '.join(map(str, where.values()))}, torch {versions.get('torch')}. "
        "Mean ± standard deviation over the seeds; differences on the same examples where an interval is given (from "
        "resampled examples, not seeds); seconds of the pruning phase."
    )
    return (
        f"{note}{f' {failed} runs failed.' if failed else ''}\n\n{table.markdown(head, lines)}\n\n`{study['command']}`"
    )


def arguments() -> argparse.Namespace:
    def listed(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    parser.add_argument("model")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", default="")
    parser.add_argument("--sparsities", type=listed(float), default=[0.9, 0.97])
    methods = "magnitude,movement,soft-movement,cap-m,cap-soft"
    parser.add_argument("--methods", type=listed(str), default=methods.split(","))
    parser.add_argument("--ablate", default="best", help="METHOD@SPARSITY, best, or none")
    parser.add_argument("--seeds", type=listed(int), default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=PruneConfig.epochs, help="of every run, whatever its preset")
    parser.add_argument("--teacher", default="", help="a fine-tuned model for all seeds")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--no-paired", action="store_true", help="leave out the comparison on the same examples")
    parser.add_argument("-o", dest="out", type=Path, required=True)
    args, args.extra = parser.parse_known_args()
    return args


def main() -> None:
    if table.handled("quality", render):
        return
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    refuse_other(args)
    cells, done = grid(args), {}
    try:
        run_all(args, cells, done)
        if chosen := ablated(args, [run for run in done.values() if "metrics" in run]):
            more = ablations(*chosen, args.seeds)
            run_all(args, more, done)
            cells += more
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    done = {cell.name: done[cell.name] for cell in cells}
    save(args, done, [] if args.no_paired else paired(args, done))
    print(args.out / "quality.json")
    if any("error" in run for run in done.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
