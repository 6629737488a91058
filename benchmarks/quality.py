"""The quality study: rows of methods and options, at every sparsity and seed, from the same teachers.

    python benchmarks/quality.py MODEL --task sst2 --data PATH -o FOLDER [options of `cap prune`]
    python benchmarks/quality.py MODEL --task sst2 --data PATH -o FOLDER --rows benchmarks/contrastive.toml
    python benchmarks/quality.py --table FOLDER/quality.json [--write docs/benchmarks.md]

Each run is a `cap prune` of its own, so that one crash does not end the study. The same command goes on where it was
stopped: finished runs are kept in FOLDER/runs, and FOLDER/quality.json is written anew after each. The first run of a
seed fine-tunes the teacher that all runs of this seed learn from. Runs go seed by seed, so that what is there of a
stopped study can be compared. Options that are not listed by --help go to `cap prune` as they are. On another machine
`--known FILE` takes the finished runs of a quality.json; teachers are made again and must answer as those did.

A file of rows names the methods to compare (`options` and `draw` take any option of `cap prune`):

    [[row]]
    label = "paper weights"
    method = "cap-m"
    options = {unsupervised-weight = 0.1, supervised-weight = 0.005}
    baseline = "no terms"                                 # label of the row that it is compared with
    part = "H3"                                           # parts run one after another; p-values are corrected in each
    seeds = 3                                             # only the first of --seeds
    sparsities = [0.8, 0.9]                               # in place of --sparsities
    draw = {lr = [5e-5, 1e-4], reg-weight = {low = 1, high = 200}}      # for --trials: one of, or log-uniform

With `--trials N` each row first gets N random draws, on a seed of its own; the draw with the best hold-out metric is
run. The evaluation split chooses nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paired
import table

from capcli import files
from capcli.config.hardware import Hardware
from capcli.config.layers import build, prune_config
from capcli.config.names import METHODS
from capcli.config.options import leaves
from capcli.config.prune import PruneConfig
from capcli.config.task import TaskConfig
from capcli.data import dataset, tokens
from capcli.errors import CapError
from capcli.events import finished as returned
from capcli.models import devices, loading, predict
from capcli.models.artifact import stored_source
from capcli.models.model import longest_input, place

STOPPED = (75, 130, -2, -15)
ROOT = Path(__file__).resolve().parent.parent
TUNING_SEED = 0  # no table uses it
OPTIONS = {item.name.replace("_", "-") for item, _ in leaves(PruneConfig)}
# Options that the study sets itself, and those that would change the teacher that a run makes.
OWN = {"model", "out", "task", "data", "method", "sparsity", "seed", "holdout", "teacher", "keep-work"}
OF_TEACHER = {"preset", "batch-size", "weight-decay", "lr-warmup", "max-length", "max-train-samples", "precision"}
OF_TEACHER |= {"teacher-lr", "teacher-epochs", "device", "threads"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is compared: a method with options. `seeds` 0 is all, and no `sparsities` are those of the study; `draw`
    says what --trials may change."""

    label: str
    method: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    baseline: str = ""
    part: str = ""
    seeds: int = 0
    sparsities: list[float] = dataclasses.field(default_factory=list)
    draw: dict[str, Any] = dataclasses.field(default_factory=dict)
    trial: int | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a row."""

    row: Row
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{slug(self.row.label)}-{self.sparsity:g}-seed{self.seed}"

    @property
    def words(self) -> list[str]:
        """Its part of the command line."""
        options = [word(name, value) for name, value in self.row.options.items()]
        return ["--method", self.row.method, f"--sparsity={self.sparsity}", f"--seed={self.seed}", *options]


def slug(label: str) -> str:
    """A label as part of a file name."""
    return re.sub(r"[^\w.+]+", "-", label).strip("-")


def word(name: str, value: Any) -> str:
    """An option as one word of the command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


# What is run ---------------------------------------------------------------------------------------------------------


def grid(methods: list[str]) -> list[Row]:
    """A row for each method; one with contrastive losses is compared with its criterion alone."""
    criteria = {method: METHODS[method].criterion for method in methods}
    return [Row(label=m, method=m, baseline="" if c == m else c) for m, c in criteria.items()]


def ablations(method: str) -> list[Row]:
    """The method, without each of its parts, with one kind of contrastive term, and with the paper's preset.

    Without all contrastive terms it is the method named after its criterion.
    """

    def without(part: str) -> dict[str, Any]:
        return {"losses": ",".join(name for name in METHODS["cap-soft"].losses if name != part)}

    changes = {f"without {part}": without(part) for part in ("prc", "snc", "fic", "kd")}
    changes["only supervised"] = {"unsupervised-weight": 0}
    changes["only unsupervised"] = {"supervised-weight": 0}
    changes["preset paper"] = {"preset": "paper"}
    return grid(list(dict.fromkeys((method, METHODS[method].criterion)))) + [
        Row(label=f"{method} {name}", method=method, options=options, baseline=method, part="ablations")
        for name, options in changes.items()
    ]


def ablated(args: argparse.Namespace, done: Iterable[dict[str, Any]]) -> tuple[str, float] | None:
    """What --ablate names; `best` is the method with contrastive losses that is best on the hold-out."""
    if args.ablate == "none":
        return None
    if args.ablate != "best":
        method, _, sparsity = args.ablate.partition("@")
        return method, float(sparsity)
    highest = max(args.sparsities)
    rows = [row for row in summary(done) if row["sparsity"] == highest and row["label"].startswith("cap-")]
    rows = [row for row in rows if row["holdout"] is not None]
    return (max(rows, key=lambda row: row["holdout"])["label"], highest) if rows else None


def read_rows(path: Path) -> list[Row]:
    """The rows of a file. Raises `SystemExit` for what is not understood, before anything runs."""
    try:
        rows = [Row(**entry) for entry in tomllib.loads(path.read_text()).get("row", [])]
    except (tomllib.TOMLDecodeError, TypeError) as error:
        raise SystemExit(f"{path}: {error}") from None
    labels = [row.label for row in rows]
    if any(row.trial is not None for row in rows):
        raise SystemExit(f"{path}: trials are drawn by --trials, a row cannot name one")
    if not rows or len({slug(label) for label in labels}) < len(labels):
        raise SystemExit(f"{path} needs [[row]] tables, each with a label of its own")
    for row in rows:
        if row.baseline and row.baseline not in labels:
            raise SystemExit(f"{path}: {row.label} is compared with {row.baseline}, which is no row")
        for name in (*row.options, *row.draw):
            if name not in OPTIONS or name in OWN:
                raise SystemExit(f"{path}: {row.label}: {name} is no option of `cap prune` that a row can set")
        try:
            check(row)
        except (CapError, TypeError, ValueError) as error:
            raise SystemExit(f"{path}: {row.label}: {error}") from None
    return rows


def check(row: Row) -> None:
    """Raise an error when options or ranges are none of `cap prune` with this method."""
    changes: list[dict[str, Any]] = [{}]
    for name, kind in row.draw.items():
        if isinstance(kind, dict) and not (kind.keys() == {"low", "high"} and 0 < kind["low"] <= kind["high"]):
            raise ValueError(f"{name} needs a list, or low and high above 0")
        changes += [{name: one} for one in (kind.values() if isinstance(kind, dict) else kind)]
    for change in changes:
        chosen = {name.replace("-", "_"): value for name, value in {**row.options, **change}.items()}
        prune_config({"task": "sst2", "method": row.method, **chosen})


def cells_of(rows: list[Row], sparsities: list[float], seeds: list[int]) -> list[Cell]:
    """Part after part, seed by seed: what is done at any time can be compared."""
    return [
        Cell(row=row, sparsity=sparsity, seed=seed)
        for part in dict.fromkeys(row.part for row in rows)
        for seed in seeds
        for sparsity in dict.fromkeys([*sparsities, *(one for row in rows for one in row.sparsities)])
        for row in rows
        if row.part == part and seed in seeds[: row.seeds or None] and sparsity in (row.sparsities or sparsities)
    ]


# Tuning --------------------------------------------------------------------------------------------------------------


def drawn(row: Row, trial: int) -> dict[str, Any]:
    """Values for one trial. Rows that draw the same option from the same range get the same values."""

    def one(name: str, kind: Any) -> Any:
        rng = random.Random(f"{name} {trial}")
        if isinstance(kind, dict):
            return float(f"{math.exp(rng.uniform(math.log(kind['low']), math.log(kind['high']))):.3g}")
        return rng.choice(kind)

    return {name: one(name, kind) for name, kind in row.draw.items()}


def tuned(args: argparse.Namespace, rows: list[Row], done: dict[str, dict[str, Any]]) -> list[Row]:
    """The rows with the best of --trials draws each, by the hold-out metric at the highest sparsity."""
    if fixed := [row.label for row in rows if not row.draw]:
        raise SystemExit(f"all rows need the same number of trials, but there is nothing to draw for {fixed[0]}")
    trials = {
        row.label: [
            dataclasses.replace(
                row, label=f"{row.label} trial {i}", options={**row.options, **drawn(row, i)}, part="trials", trial=i
            )
            for i in range(args.trials)
        ]
        for row in rows
    }
    by_trial = [one for group in zip(*trials.values(), strict=True) for one in group]
    cells = cells_of([dataclasses.replace(row, seeds=0) for row in by_trial], [max(args.sparsities)], [TUNING_SEED])
    run_all(args, cells, done)
    found = {run["label"]: run["holdout"] for run in done.values() if run.get("holdout") is not None}
    chosen = []
    for row in rows:
        finished = [trial for trial in trials[row.label] if trial.label in found]
        if not finished:
            raise SystemExit(f"all trials of {row.label} failed")
        best = max(finished, key=lambda trial: found[trial.label])
        chosen.append(dataclasses.replace(row, options=best.options))
    return chosen


# Running -------------------------------------------------------------------------------------------------------------


def run_all(args: argparse.Namespace, cells: list[Cell], done: dict[str, dict[str, Any]]) -> None:
    """Run the cells, `--workers` at a time; a record of each goes into `done` and into the file."""
    mine = [cell.name for cell in cells]  # in the order of the file, whatever is made first
    with ThreadPoolExecutor(args.workers) as pool:
        for group in groups(args, cells):
            for cell, found in zip(group, pool.map(lambda cell: run_one(args, cell), group), strict=True):
                if "error" not in found:
                    refuse_other_teacher(found, done.values())
                done[cell.name] = found
                before = {name: run for name, run in done.items() if name not in mine}
                save(args, before | {name: done[name] for name in mine if name in done})


def groups(args: argparse.Namespace, cells: list[Cell]) -> Iterator[list[Cell]]:
    """The cells that may run together: of `--workers` seeds at a time, those that make a teacher before the rest."""
    for part in dict.fromkeys(cell.row.part for cell in cells):
        mine = [cell for cell in cells if cell.row.part == part]
        seeds = list(dict.fromkeys(cell.seed for cell in mine))
        for start in range(0, len(seeds), args.workers):
            some = [cell for cell in mine if cell.seed in seeds[start : start + args.workers]]
            making = makers(args, some)
            yield making
            yield [cell for cell in some if cell not in making]


def makers(args: argparse.Namespace, cells: list[Cell]) -> list[Cell]:
    """The first cell of each seed without a teacher; its options must leave the teacher as that of any other row."""
    left = [cell for cell in cells if teacher_of(args, cell) is None and not record_of(args, cell).is_file()]
    found: dict[int, Cell] = {}
    for cell in left:
        if not OF_TEACHER & cell.row.options.keys():
            found.setdefault(cell.seed, cell)
    if missing := {cell.seed for cell in left} - found.keys():
        raise SystemExit(f"no row leaves the teacher of seed {min(missing)} as it is; add one that does, or --teacher")
    return list(found.values())


def refuse_other(args: argparse.Namespace) -> None:
    """A folder is of one model, task, teacher and set of options; rows, sparsities and seeds may be added."""
    path = args.out / "study.json"
    names = ("model", "task", "data", "epochs", "holdout", "teacher", "extra")
    ours = {name: getattr(args, name) for name in names}
    if path.is_file() and (theirs := json.loads(path.read_text())) != ours:
        raise SystemExit(f"{args.out} holds another study: {theirs}")
    files.write_json(path, ours)


def teacher_of(args: argparse.Namespace, cell: Cell) -> Path | None:
    """The teacher that this run learns from; None where it has to be made."""
    folder = args.out / "teachers" / str(cell.seed)
    return Path(args.teacher) if args.teacher else folder if files.is_complete(folder) else None


def record_of(args: argparse.Namespace, cell: Cell) -> Path:
    """Where the record of a finished run is."""
    path: Path = args.out / "runs" / f"{cell.name}.json"
    return path


def take_over(args: argparse.Namespace) -> None:
    """The finished runs of `--known` as records of this folder, where it has none of that name."""
    for run in json.loads(args.known.read_text())["runs"]:
        path = args.out / "runs" / f"{run['name']}.json"
        if "error" not in run and not path.exists():
            path.parent.mkdir(exist_ok=True)
            files.write_json(path, run)


def refuse_other_teacher(found: dict[str, Any], done: Iterable[dict[str, Any]]) -> None:
    """Runs of a seed are compared in pairs, so they must have learned from the same teacher."""
    for run in done:
        if run["seed"] == found["seed"] and run.get("metrics", found["metrics"])["dense"] != found["metrics"]["dense"]:
            raise SystemExit(f"{found['name']} and {run['name']} learned from different teachers: use another folder")


def run_one(args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """Run a cell unless its record is there; returns the record, or one with `error`."""
    out, record = args.out / "runs" / cell.name, record_of(args, cell)
    common = ["--task", args.task, "--data", args.data, "--epochs", str(args.epochs), f"--holdout={args.holdout}"]
    wanted = [args.model, *common, *args.extra, *cell.words]
    row = dataclasses.asdict(cell.row)
    about = {name: row[name] for name in ("label", "method", "options", "baseline", "part", "trial")}
    about |= {"name": cell.name, "sparsity": cell.sparsity, "seed": cell.seed}
    about["arguments"] = nameless(wanted)
    if record.is_file():
        known: dict[str, Any] = json.loads(record.read_text())
        if known["arguments"] != about["arguments"]:
            raise SystemExit(f"{record} is of other options; give the row another label, or remove the run")
        return {**known, "baseline": cell.row.baseline, "part": cell.row.part}
    teacher = teacher_of(args, cell)
    if teacher is None and OF_TEACHER & cell.row.options.keys():
        return {**about, "error": "the teacher of this seed could not be made", "exit_code": None}
    own = out / "work" / "teacher"
    maker = teacher is None or (not args.teacher and own.is_dir())  # a stopped maker goes on without --teacher
    where = ["--keep-work"] if maker else ["--teacher", str(teacher)]
    print(f"{time.strftime('%H:%M:%S')} {cell.name}", file=sys.stderr, flush=True)
    about |= circumstances()
    began = time.monotonic()
    ended = prune([*wanted, "-o", str(out), "--json", "-q", *where])
    if ended.returncode in STOPPED:
        raise SystemExit(75)
    about |= {"wall_seconds": time.monotonic() - began, "load_average_after": os.getloadavg()}
    if files.is_complete(own):
        keep_teacher(own, args.out / "teachers" / str(cell.seed))
    if ended.returncode:
        print(f"{cell.name} failed: {ended.stderr.strip()}", file=sys.stderr, flush=True)
        return nameless({**about, "error": ended.stderr.strip()[-2000:], "exit_code": ended.returncode})
    found = nameless({**about, **reported(args, out, json.loads(ended.stdout))})
    files.write_json(record, found)
    files.remove(out / "work")
    return found


def prune(words: list[str]) -> subprocess.CompletedProcess[str]:
    """One `cap prune`."""
    return subprocess.run([sys.executable, "-m", "capcli", "prune", *words], capture_output=True, text=True)


def reported(args: argparse.Namespace, out: Path, report: dict[str, Any]) -> dict[str, Any]:
    """What a record keeps of the run's report, and which evaluation examples the artefact has right."""
    found = {key: report[key] for key in ("metrics", "timing", "config", "device", "versions", "memory")}
    found |= {"achieved": report["sparsity"]["achieved"], "artifact_bytes": report["size"]["artifact_bytes"]}
    found["holdout"] = held_out(report) if args.holdout else None
    if not args.no_paired and "accuracy" in report["metrics"]["pruned"]:
        found["right"] = paired.packed(correct(out, report["config"]))
    return found


def held_out(report: dict[str, Any]) -> float | None:
    """The primary metric on the hold-out of the epoch that the run kept: the best one at the final sparsity."""
    epochs = [row for row in report["history"] if row["phase"] == "prune" and row["metrics"]]
    if not epochs:
        return None
    primary, final = report["metrics"]["primary"], epochs[-1]["sparsity"]
    values = [row["metrics"][primary] for row in epochs if row["sparsity"] == final]
    return max((value for value in values if value is not None), default=None)


def correct(out: Path, options: dict[str, Any]) -> Any:
    """Which examples of the first evaluation split an artefact has right, as bits [N]."""
    on = devices.compute(build(Hardware, options))
    config = build(TaskConfig, stored_source(str(out)))  # with the place of the data, which reports shorten
    data = dataset.load(config, train=False)
    model = place(loading.load_model(str(out), data.labels, data.kind, 1), on)
    length = longest_input(model, config.longest)
    examples = tokens.encode(next(iter(data.evals.values())), model.tokenizer, length)
    coding = predict.encoded(model, examples, on)
    return returned(coding)[0].argmax(dim=1).cpu().numpy() == examples.labels


def keep_teacher(made: Path, folder: Path) -> None:
    """Copy a run's teacher to where the other runs find it."""
    if not files.is_complete(folder):
        files.remove(folder)
        shutil.copytree(made, folder)


# Records -------------------------------------------------------------------------------------------------------------


def circumstances() -> dict[str, Any]:
    """Where and by which code a run is made; its device and threads are in the run's own report."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    commit = head.stdout.strip() + (" with changes" if changed else "")
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "system": platform.platform()}
    return {"commit": commit or None, "host": machine, "load_average": os.getloadavg()}


def nameless(data: Any) -> Any:
    """`data` with the paths of this machine as their last names: what is written is to be published."""
    known = {f"{ROOT}/": "", f"{sys.prefix}/": ""}
    for given in (part for text in sys.argv[1:] for part in (text, text.partition("=")[2])):
        path = Path(given)
        if path.is_absolute() or (given and path.exists()):
            known |= {f"{path}": path.name} if path.is_absolute() else {}
            known[str(path.resolve())] = path.name
    text = json.dumps(data)
    for path in sorted(known, key=len, reverse=True):
        pattern = r"(?<![\w./-])" + re.escape(json.dumps(path)[1:-1]) + ("" if path.endswith("/") else r"(?![\w-])")
        text = re.sub(pattern, lambda _, name=known[path]: json.dumps(name)[1:-1], text)
    return json.loads(text)


def save(args: argparse.Namespace, done: dict[str, dict[str, Any]]) -> None:
    """Write FOLDER/quality.json as far as the study is."""
    runs = list(done.values())
    finished = paired.of_table(runs)
    study = {
        "schema_version": 2,
        "command": nameless(shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])),
        "model": nameless(args.model),
        "task": args.task,
        "environment": environment(finished),
        "primary": finished[0]["metrics"]["primary"] if finished else "",
        "teachers": {run["seed"]: run["metrics"]["dense"] for run in sorted(finished, key=lambda run: run["seed"])},
        "summary": summary(finished),
        "paired": paired.comparisons(finished),
        "runs": runs,
    }
    files.write_json(args.out / "quality.json", study)


def environment(finished: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the numbers are from, by the records of the runs."""
    first = finished[0] if finished else {}
    commits = list(dict.fromkeys(run["commit"] for run in finished))
    return {**first.get("host", {}), **{key: first[key] for key in ("device", "versions") if first}, "commits": commits}


def summary(finished: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over the seeds of each (label, sparsity), in the order of the runs; trials are left out."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in paired.of_table(finished):
        groups.setdefault((run["label"], run["sparsity"]), []).append(run)
    rows = []
    for runs in groups.values():
        values = [paired.value(run) for run in runs]
        dense = [paired.value(run, "dense") for run in runs]
        held = [run["holdout"] for run in runs if run["holdout"] is not None]
        rows.append(
            {
                **{name: runs[0][name] for name in ("label", "method", "options", "part", "baseline", "sparsity")},
                "seeds": [run["seed"] for run in runs],
                "mean": statistics.mean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "holdout": statistics.mean(held) if held else None,
                "teacher": statistics.mean(dense),
                "retention": statistics.mean(v / d if d else math.nan for v, d in zip(values, dense, strict=True)),
                "seconds": statistics.mean(run["timing"]["prune_seconds"] for run in runs),
            }
        )
    return rows


# The table -----------------------------------------------------------------------------------------------------------


def render(study: dict[str, Any]) -> str:
    """The study as Markdown."""
    rows, primary = study["summary"], study["primary"]
    if not rows:
        return table.MISSING
    pairs = {(row["label"], row["sparsity"]): row for row in study["paired"]}
    lines = []
    for row in rows:
        spread = f" ± {100 * row['deviation']:.2f}" if row["deviation"] is not None else ""
        held = "—" if row["holdout"] is None else f"{100 * row['holdout']:.2f}"
        shown = compared(pairs.get((row["label"], row["sparsity"])))
        values = (f"{100 * row['mean']:.2f}{spread}", *shown, f"{row['retention']:.1%}", f"{row['seconds']:.0f}")
        lines.append((row["label"], f"{row['sparsity']:g}", len(row["seeds"]), held, *values))
    head = ("run", "sparsity", "seeds", "hold-out, %", f"{primary}, %", "difference, points [over seeds]")
    head += ("p", "[seeds and examples]", "retention", "seconds")
    return f"{about(study)}\n\n{table.markdown(head, lines)}\n\n`{study['command']}`"


def compared(pair: dict[str, Any] | None) -> tuple[str, str, str]:
    """Difference with its interval over seeds, the corrected p, and the interval of the two-way bootstrap."""
    if pair is None:
        return "—", "—", "—"
    bounds = points(pair["confidence_95"])
    shown = f"{100 * pair['difference']:+.2f}{bounds and ' ' + bounds} to {pair['baseline']}"
    p = pair["p_holm"]
    written = "—" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
    return shown, written, points(pair["two_way_95"]) or "—"


def points(interval: list[float] | None) -> str:
    return "[{:+.2f}, {:+.2f}]".format(*(100 * bound for bound in interval)) if interval else ""


def about(study: dict[str, Any]) -> str:
    """The words above the table."""
    teachers = ", ".join(f"{100 * one[study['primary']]:.2f} (seed {seed})" for seed, one in study["teachers"].items())
    where, trials = study["environment"], [run for run in study["runs"] if run.get("trial") is not None]
    names = dict.fromkeys(f"{name[:7]}{name[40:]}" for name in where.get("commits", []))  # some with changes
    commits = f", commit {', '.join(names)}" if names else ""
    text = (
        f"{study['model']} on {study['task']}; {study['primary']} of the teacher: {teachers}. {where['device']}, torch "
        f"{where['versions']['torch']}{commits}. Mean ± standard deviation over the seeds. Differences are paired by "
        "seed; their 95 % t-interval is over seeds, p is corrected by Holm, and the last interval is a bootstrap of "
        "seeds and examples together. Seconds of the pruning phase."
    )
    if trials:
        chosen = "; ".join(f"{row['label']}: {row['options']}" for row in study["summary"])
        text += f" {len(trials)} trials chose by the hold-out: {chosen}."
    failed = sum("error" in run for run in study["runs"])
    return text + (f" {failed} runs failed." if failed else "")


def arguments() -> argparse.Namespace:
    def listed(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    parser.add_argument("model")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", default="")
    parser.add_argument("--rows", type=Path, help="TOML file of rows, instead of --methods and --ablate")
    parser.add_argument("--parts", type=listed(str), help="only these parts of the file of rows")
    parser.add_argument("--sparsities", type=listed(float), default=[0.9, 0.97])
    methods = "magnitude,movement,soft-movement,cap-m,cap-soft"
    parser.add_argument("--methods", type=listed(str), default=methods.split(","))
    parser.add_argument("--ablate", default="none", help="METHOD@SPARSITY, best (needs --holdout), or none")
    parser.add_argument("--seeds", type=listed(int), default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=PruneConfig.epochs, help="of every run, whatever its preset")
    parser.add_argument("--holdout", type=float, default=PruneConfig.holdout, help="share that all choices are made on")
    parser.add_argument("--trials", type=int, default=0, help="random draws for each row (needs --rows, --holdout)")
    parser.add_argument("--teacher", default="", help="a fine-tuned model for all seeds")
    parser.add_argument("--known", type=Path, help="a quality.json whose finished runs need not be run again")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--no-paired", action="store_true", help="leave out the comparison on the same examples")
    parser.add_argument("-o", dest="out", type=Path, required=True)
    args, args.extra = parser.parse_known_args()
    if (args.trials or args.ablate == "best") and not args.holdout:
        parser.error("a choice needs --holdout: the evaluation split must not make it")
    if args.rows and args.ablate != "none":
        parser.error("--rows names all rows, --ablate is for a study without it")
    if args.trials and (not args.rows or TUNING_SEED in args.seeds):
        parser.error(f"--trials needs --rows, and seed {TUNING_SEED} for itself")
    return args


def study(args: argparse.Namespace, done: dict[str, dict[str, Any]]) -> None:
    """All runs, into `done`."""
    rows = read_rows(args.rows) if args.rows else grid(args.methods)
    rows = [row for row in rows if not args.parts or row.part in args.parts]
    if args.trials:
        rows = tuned(args, rows, done)
    run_all(args, cells_of(rows, args.sparsities, args.seeds), done)
    if chosen := ablated(args, done.values()):
        run_all(args, cells_of(ablations(chosen[0]), [chosen[1]], args.seeds), done)


def main() -> None:
    if table.handled("quality", render):
        return
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    refuse_other(args)
    if args.known:
        take_over(args)
    done: dict[str, dict[str, Any]] = {}
    try:
        study(args, done)
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
    print(args.out / "quality.json")
    if any("error" in run for run in done.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
