"""The benchmarks still run: each at its smallest size, so that a measurement on a rare machine does not fail there."""

import importlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import ROOT, Tiny, environment, write_csv, write_model

import capcli
import capcli.files
from capcli.config.export import ExportConfig

pytestmark = pytest.mark.slow
FOLDER = ROOT / "benchmarks"


@pytest.mark.rare
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("step.py", ["--task", "sst2", "--steps", "1", "--samples", "32", "--batch", "8"]),
        ("memory.py", ["--examples", "64", "--encoded", "16", "--steps", "1", "--batch", "8"]),
        ("gpu.py", ["--device", "cpu", "--small", "--sparsity", "0.5"]),
        ("data.py", ["--task", "sst2", "--few", "32", "--max-length", "16"]),
    ],
)
def test_a_benchmark_runs(tiny: Tiny, tmp_path: Path, script: str, options: list[str]) -> None:
    for split in ("train", "validation"):
        rows = [(f"a {word} film", str(i % 2)) for i, word in enumerate(["bad", "good"] * 40)]
        write_csv(tmp_path / "sst2" / f"{split}.csv", ("sentence", "label"), rows)
    result = tmp_path / "result.json"
    where = ["-o" if script in ("memory.py", "gpu.py") else "--json", str(result), "--data", str(tmp_path / "sst2")]
    command = [sys.executable, str(FOLDER / script), tiny.model, *options, *where]
    env = environment(CAP_CACHE=str(tmp_path / "cache"))
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(result.read_text())
    assert found and (script != "gpu.py" or (found["run"] and not found["notes"])), found.get("notes")
    table = [sys.executable, str(FOLDER / script), "--table", str(result)]
    shown = subprocess.run(table, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert "| ---" in shown.stdout, shown.stderr[-2000:]


@pytest.mark.rare
def test_the_benchmark_of_sparse_weights_runs(tiny: Tiny, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    options = ["--without-base", "--threads", "1", "--batches", "2", "--lengths", "16", "--rounds", "3"]
    command = [sys.executable, str(FOLDER / "runtime.py"), tiny.model, *options, "--json", str(result)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(result.read_text())
    assert {row["system"] for row in found["rows"]} >= {"torch fp32", "onnxruntime int8", "sparse 97 %"}
    assert max(row.get("difference", 0) for row in found["rows"]) < 1e-4
    assert len(found["loads"]) >= 8


def test_the_benchmark_of_ranks_runs(pruned: Path, tmp_path: Path) -> None:
    """A run beside the same values in random places, which need more singular values or as many."""
    result = tmp_path / "thin.json"
    command = [sys.executable, str(FOLDER / "thin.py"), f"tiny={pruned}", "--json", str(result)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(result.read_text())["rows"]
    assert 0 < row["rank"] < 1 and row["factors"] > 0
    assert "| tiny | 70.0 |" in done.stdout


@pytest.mark.rare
def test_the_benchmark_of_several_processes_runs(tiny: Tiny, tmp_path: Path) -> None:
    """By the launcher that users have: both runs are complete, and learn the same."""
    command = [sys.executable, str(FOLDER / "ranks.py"), tiny.model, "-o", str(tmp_path)]
    options = "--epochs 1 --teacher-epochs 1 --max-train-samples 32 --max-length 16 --threads 1 --precision fp32"
    data = ["--task", "text-classification", "--data", tiny.data]
    done = subprocess.run(
        [*command, *options.split(), *data], env=environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| ---" in done.stdout
    rows = json.loads((tmp_path / "ranks.json").read_text())["rows"]
    assert [row["ranks"] for row in rows] == [1, 2]
    assert rows[0]["last_loss"] == pytest.approx(rows[1]["last_loss"], rel=0.2)  # attention has dropout


@pytest.mark.rare
def test_the_benchmark_of_exports_runs(tiny: Tiny, tmp_path: Path) -> None:
    """A structured run in two formats, one with a comma in its name, beside dense PyTorch and the dense graph."""
    write_model(tmp_path / "model", max_position_embeddings=128)  # the length that is measured
    short = {"method": "cap-f", "epochs": 1, "teacher_epochs": 1, "max_train_samples": 32}
    tiny.prune(tmp_path / "run", model=str(tmp_path / "model"), **short)
    capcli.export(ExportConfig(model=str(tmp_path / "run"), to="dense", out=str(tmp_path / "dense"), threads=1))
    result, formats = tmp_path / "result.json", "sparse, int8; sliced"
    options = ["--task", "text-classification", "--data", tiny.data, "--threads", "1", "--rounds", "1"]
    command = [sys.executable, str(FOLDER / "export.py"), str(tmp_path / "dense"), str(tmp_path / "run")]
    command += [*options, "--formats", formats, "-o", str(result)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    labels = [row["label"] for row in json.loads(result.read_text())["rows"]]
    assert labels == ["dense PyTorch", "dense onnxruntime", "as pruned", "sparse, int8", "sliced"]
    table = [sys.executable, str(FOLDER / "export.py"), "--table", str(result)]
    shown = subprocess.run(table, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert "| sparse, int8 |" in shown.stdout, shown.stderr[-2000:]


@pytest.mark.rare
@pytest.mark.parametrize(
    ("script", "options"), [("sparse.py", ["--json", "--matrices", "1"]), ("sizes.py", ["--json"])]
)
def test_a_benchmark_of_the_file_format_runs(tmp_path: Path, script: str, options: list[str]) -> None:
    result = tmp_path / "result.json"
    where = [] if script == "sparse.py" else [str(result)]
    command = [sys.executable, str(FOLDER / script), "--small", *options, *where]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    if not where:
        result.write_text(done.stdout)
    table = [sys.executable, str(FOLDER / script), "--table", str(result)]
    shown = subprocess.run(table, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert "| int8, embeddings svd:16 in int8 |" in shown.stdout, shown.stderr[-2000:]


@pytest.mark.rare
def test_the_study_of_what_is_left_runs(tiny: Tiny, tmp_path: Path) -> None:
    """Two runs of a quality study, probed on one set beside their teacher and the pretrained model."""
    runs = []
    for method in ("movement", "cap-m"):
        short = {"method": method, "sparsity": 0.5, "epochs": 1, "teacher_epochs": 1, "max_train_samples": 32}
        report = tiny.prune(tmp_path / "study" / "runs" / f"{method}-0.5-seed1", **short)
        name = f"{method}-0.5-seed1"
        runs.append({"label": method, "name": name, "seed": 1, "sparsity": 0.5, "metrics": report["metrics"]})
    capcli.export(
        ExportConfig(
            model=str(tmp_path / "study/runs/movement-0.5-seed1"), to="dense", out=str(tmp_path / "study/teachers/1")
        )
    )
    quality = {"command": "quality", "environment": {}, "task": "words", "primary": "accuracy", "runs": runs}
    quality["teachers"] = {"1": report["metrics"]["dense"]}
    (tmp_path / "study" / "quality.json").write_text(json.dumps(quality))
    for split in ("train", "validation"):
        rows = [(f"a {word} film", str(i % 2)) for i, word in enumerate(["bad", "good"] * 20)]
        write_csv(tmp_path / "data" / "sst2" / f"{split}.csv", ("sentence", "label"), rows)
    where = ["--data", str(tmp_path / "data"), "--json", str(tmp_path / "found.json")]
    command = [sys.executable, str(FOLDER / "transfer.py"), str(tmp_path / "study"), tiny.model, *where]
    command += ["--only", "sst2", "--", "--threads", "1", "--seeds", "2"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())["seeds"]["1"]["sst2"]
    assert list(found["scores"]) == ["pretrained", "teacher", "movement", "cap-m"]
    assert list(found["differences"]) == ["teacher - pretrained", "cap-m - movement", "cap-m - teacher"]
    gap = found["scores"]["cap-m"]["mean"] - found["scores"]["movement"]["mean"]
    assert abs(found["differences"]["cap-m - movement"]["value"] - gap) < 1e-9
    assert "| cap-m − movement |" in done.stdout
    table = [sys.executable, str(FOLDER / "transfer.py"), "--table", str(tmp_path / "found.json")]
    shown = subprocess.run(table, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert shown.stdout == done.stdout


# The quality study ---------------------------------------------------------------------------------------------------

ROWS = """
[[row]]
part = "noise"
label = "no terms"
method = "cap-m"
options = { unsupervised-weight = 0.0, supervised-weight = 0.0 }

[[row]]
part = "noise"
label = "with terms"
method = "cap-m"
baseline = "no terms"

[[row]]
part = "start"
seeds = 1
label = "small steps, no terms"
method = "cap-m"
options = { lr = 3e-5 }
baseline = "no terms"
"""
DRAWS = """
[[row]]
label = "plain"
method = "movement"
draw = { lr = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4] }

[[row]]
label = "terms"
method = "cap-m"
baseline = "plain"
draw = { lr = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4], supervised-weight = { low = 0.01, high = 1.0 } }
"""


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/quality.py as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("quality")
    for name in ("quality", "paired", "table"):
        sys.modules.pop(name, None)


class Runs:
    """Stands for `cap prune`: the learning rate decides the accuracies, so that it is known what comes out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, quality: Any, out: Path) -> None:
        self.started: list[str] = []
        self.teachers: list[str] = []
        self.stop_at = self.fail_at = ""
        self.rows, self.out = out.parent / "rows.toml", out
        self.quality, self.monkeypatch = quality, monkeypatch
        monkeypatch.setattr(quality, "prune", self.prune)
        monkeypatch.setattr(quality, "correct", lambda folder, config: np.arange(100) < config["n_right"])

    def study(self, *words: str) -> dict[str, Any]:
        """Run the study; returns its file."""
        data = str(self.out.parent / "data")
        line = ["quality.py", "/models/tiny", "--task", "sst2", "--data", data, "--sparsities", "0.97", *words]
        self.monkeypatch.setattr(sys, "argv", [*line, "-o", str(self.out)])
        self.started.clear()
        self.quality.main()
        found: dict[str, Any] = json.loads((self.out / "quality.json").read_text())
        return found

    def prune(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        """A report as `cap prune` prints it, and a teacher where one is to be made."""
        folder = Path(words[words.index("-o") + 1])
        options = dict(word[2:].split("=") for word in words if word.startswith("--") and "=" in word)
        self.started.append(folder.name)
        if folder.name == self.stop_at:
            return subprocess.CompletedProcess(words, 75, "", "stopped")
        if folder.name == self.fail_at:
            return subprocess.CompletedProcess(words, 1, "", f"error: cannot read {folder}/x")
        if "--keep-work" in words:
            self.teachers.append(folder.name)
            with capcli.files.publish(folder / "work" / "teacher") as staging:
                capcli.files.write_json(staging / "stage.json", {})
        rate, seed = float(options.get("lr", 1e-4)), int(options["seed"])
        n_right = 70 + seed + (2 if options.get("supervised-weight") != "0.0" else 0)
        held = 0.9 if rate == 3e-4 else 0.1  # what is best on the hold-out is not what is best on the evaluation split
        metrics = {"primary": "accuracy", "dense": {"accuracy": 0.9}, "n_examples": 100}
        metrics["pruned"] = {"accuracy": n_right / 100}
        epochs = [(0.5, 0.99), (0.97, held), (0.97, held - 0.05)]
        history = [{"phase": "prune", "sparsity": s, "metrics": {"accuracy": v}} for s, v in epochs]
        report = {
            "metrics": metrics,
            "timing": {"prune_seconds": 60.0},
            "config": {"out": str(folder), "n_right": n_right},
            "device": "a processor, 1 threads",
            "versions": {"torch": "2"},
            "memory": {},
            "sparsity": {"achieved": 0.97},
            "size": {"artifact_bytes": 1},
            "history": history,
        }
        return subprocess.CompletedProcess(words, 0, json.dumps(report), "")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, quality: Any, tmp_path: Path) -> Runs:
    (tmp_path / "rows.toml").write_text(ROWS)
    return Runs(monkeypatch, quality, tmp_path / "study")


def test_a_study_goes_part_by_part_and_seed_by_seed(runs: Runs) -> None:
    found = runs.study("--rows", str(runs.rows), "--seeds", "3,1", "--holdout", "0.1", "--threads", "1")
    pairs = [f"{label}-0.97-seed{seed}" for seed in (3, 1) for label in ("no-terms", "with-terms")]
    assert runs.started == [*pairs, "small-steps-no-terms-0.97-seed3"]
    assert runs.teachers == ["no-terms-0.97-seed3", "no-terms-0.97-seed1"]
    assert [(row["label"], row["seeds"]) for row in found["summary"]] == [
        ("no terms", [3, 1]),
        ("with terms", [3, 1]),
        ("small steps, no terms", [3]),
    ]
    assert [row["holdout"] for row in found["summary"]] == [0.1, 0.1, 0.1], "the kept epoch, at the final sparsity"


def test_a_record_says_where_it_is_from_without_paths(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    found = runs.study("--rows", str(runs.rows), "--seeds", "1", "--threads", "1")
    run = found["runs"][0]
    assert len(run["commit"].split()[0]) == 40 and len(run["load_average"]) == 3 and run["host"]["cores"]
    assert run["arguments"][0] == found["model"] == "tiny"
    assert run["arguments"][3:5] == ["--data", "data"] and run["arguments"][8:10] == ["--threads", "1"]
    assert run["config"]["out"] == "study/runs/no-terms-0.97-seed1"
    assert found["command"].startswith("python benchmarks/quality.py tiny --task sst2 --data data --sparsities 0.97")
    for path in (tmp_path / "study" / "runs").glob("*.json"):
        assert str(tmp_path) not in path.read_text()
    assert str(tmp_path) not in (tmp_path / "study" / "quality.json").read_text()


def test_a_stopped_study_keeps_its_pairs_and_goes_on(runs: Runs) -> None:
    words = ("--rows", str(runs.rows), "--seeds", "1,2")
    runs.stop_at = "no-terms-0.97-seed2"
    with pytest.raises(SystemExit):
        runs.study(*words)
    kept = json.loads((runs.out / "quality.json").read_text())
    assert [(row["label"], row["seeds"]) for row in kept["paired"]] == [("with terms", [1])]
    runs.stop_at = ""
    found = runs.study(*words)
    assert runs.started == ["no-terms-0.97-seed2", "with-terms-0.97-seed2", "small-steps-no-terms-0.97-seed1"]
    assert found["paired"][0]["seeds"] == [1, 2]
    assert runs.study(*words) == found and not runs.started
    runs.rows.write_text(ROWS.replace("lr = 3e-5", "lr = 2e-5"))
    with pytest.raises(SystemExit, match="other options"):
        runs.study(*words)


def test_a_failed_run_does_not_end_the_study_and_is_tried_again(runs: Runs) -> None:
    words = ("--rows", str(runs.rows), "--seeds", "1")
    runs.fail_at = "with-terms-0.97-seed1"
    with pytest.raises(SystemExit):
        runs.study(*words)
    kept = json.loads((runs.out / "quality.json").read_text())
    assert [run.get("error") for run in kept["runs"]] == [
        None,
        "error: cannot read study/runs/with-terms-0.97-seed1/x",
        None,
    ]
    runs.fail_at = ""
    runs.study(*words)
    assert runs.started == ["with-terms-0.97-seed1"]


def test_trials_are_as_many_for_each_row_and_chosen_by_the_holdout(runs: Runs, quality: Any) -> None:
    runs.rows.write_text(DRAWS)
    found = runs.study("--rows", str(runs.rows), "--seeds", "1,2", "--trials", "8", "--holdout", "0.1")
    trials = [run for run in found["runs"] if run["trial"] is not None]
    assert len(trials) == 16 and {run["seed"] for run in trials} == {0}
    rates = [[run["options"]["lr"] for run in trials if run["method"] == method] for method in ("movement", "cap-m")]
    assert rates[0] == rates[1] and 3e-4 in rates[0]
    assert all(0.01 <= run["options"]["supervised-weight"] <= 1 for run in trials if run["method"] == "cap-m")
    assert [(row["label"], row["seeds"], row["options"]["lr"]) for row in found["summary"]] == [
        ("plain", [1, 2], 3e-4),
        ("terms", [1, 2], 3e-4),
    ]
    assert "16 trials" in quality.render(found)


def test_the_best_method_is_that_of_the_holdout(runs: Runs, monkeypatch: pytest.MonkeyPatch, quality: Any) -> None:
    held = {"movement": 0.5, "cap-m": 0.8, "cap-soft": 0.7}
    monkeypatch.setattr(
        quality, "held_out", lambda report: held[next(name for name in held if name in report["config"]["out"])]
    )
    words = ("--methods", "movement,cap-m,cap-soft", "--ablate", "best", "--seeds", "1,2", "--holdout", "0.1")
    found = runs.study(*words)
    labels = [row["label"] for row in found["summary"]]
    assert "cap-m without prc" in labels and "cap-soft without prc" not in labels
    assert next(row for row in found["summary"] if row["label"] == "cap-m preset paper")["seeds"] == [1, 2]


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        (ROWS, ["--trials", "3"], "needs --holdout"),
        (ROWS, ["--trials", "3", "--holdout", "0.1"], "nothing to draw for no terms"),
        (DRAWS.replace("low = 0.01", "low = 0"), [], "low and high above 0"),
        (DRAWS.replace("high = 1.0", "high = 1.0, step = 1"), [], "low and high above 0"),
        (ROWS.replace("lr =", "learning ="), [], "learning is no option"),
        (ROWS.replace("lr =", "seed ="), [], "seed is no option"),
        (ROWS.replace("lr = 3e-5", "lr = -1"), [], "--lr must be at least 0, got -1"),
        (ROWS.replace('baseline = "no terms"', 'baseline = "none"'), [], "compared with none"),
        (ROWS.replace('"with terms"', '"no, terms"'), [], "a label of its own"),
        (ROWS.replace("method", "criterion"), [], "criterion"),
        (ROWS.replace("seeds = 1", "trial = 1"), [], "a row cannot name one"),
        ('[[row]]\nlabel = "one"\nmethod = "cap-m"\noptions = {batch-size = 8}', [], "leaves the teacher"),
    ],
)
def test_a_study_that_cannot_be_run_ends_at_once(
    runs: Runs, capsys: pytest.CaptureFixture[str], rows: str, words: list[str], message: str
) -> None:
    runs.rows.write_text(rows)
    with pytest.raises(SystemExit) as ended:
        runs.study("--rows", str(runs.rows), *words)
    assert message in f"{ended.value}{capsys.readouterr().err}"
    assert not runs.started


def test_a_file_of_results_goes_to_the_section_of_its_name(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, quality: Any, tmp_path: Path
) -> None:
    runs.study("--rows", str(runs.rows), "--seeds", "1,2")
    page, named = tmp_path / "page.md", tmp_path / "contrastive.json"
    for path, section in ((runs.out / "quality.json", "quality"), (named, "contrastive")):
        named.write_bytes((runs.out / "quality.json").read_bytes())
        page.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["quality.py", "--table", str(path), "--write", str(page)])
        quality.main()
        text = page.read_text().split(f"<!-- {section}:begin -->")[1].split("<!--")[0]
        assert "| with terms | 0.97 | 2 | — | 73.50 ± 0.71 | +2.00 [+2.00, +2.00] to no terms | < 0.001 |" in text


def test_a_row_with_sparsities_of_its_own_and_parts(runs: Runs, tmp_path: Path) -> None:
    rows = tmp_path / "rows.toml"
    rows.write_text(
        '[[row]]\nlabel = "a"\nmethod = "movement"\npart = "x"\n'
        '[[row]]\nlabel = "b"\nmethod = "wanda"\noptions = {epochs = 0}\nsparsities = [0.7, 0.9]\npart = "y"\n'
        '[[row]]\nlabel = "c"\nmethod = "magnitude"\npart = "z"\n'
    )
    found = runs.study("--rows", str(rows), "--parts", "x,y", "--seeds", "1")
    assert [run["name"] for run in found["runs"]] == ["a-0.97-seed1", "b-0.7-seed1", "b-0.9-seed1"]


def test_known_runs_are_not_run_again(runs: Runs, tmp_path: Path) -> None:
    """On another machine: of what is new the teacher is made once; it must answer as the teacher of the known runs."""
    before = runs.study("--methods", "movement", "--seeds", "1")
    shutil.copy(runs.out / "quality.json", tmp_path / "known.json")
    shutil.rmtree(runs.out)
    after = runs.study("--methods", "movement,magnitude", "--seeds", "1", "--known", str(tmp_path / "known.json"))
    assert [run["label"] for run in after["runs"]] == ["movement", "magnitude"]
    assert runs.started == runs.teachers[1:] == ["magnitude-0.97-seed1"]
    assert after["runs"][0] == before["runs"][0]
    found = json.loads((tmp_path / "known.json").read_text())
    found["runs"][0]["metrics"]["dense"]["accuracy"] = 0.123
    (tmp_path / "known.json").write_text(json.dumps(found))
    shutil.rmtree(runs.out)
    with pytest.raises(SystemExit, match="learned from different teachers"):
        runs.study("--methods", "movement,magnitude", "--seeds", "1", "--known", str(tmp_path / "known.json"))


def test_the_rows_of_the_contrastive_study_are_good(quality: Any) -> None:
    rows = quality.read_rows(FOLDER / "contrastive.toml")
    assert [row.label for row in rows[:2]] == ["no terms", "paper weights"]
    cells = quality.cells_of(rows, [0.97], list(range(1, 11)))
    assert [cell.row.part for cell in cells] == ["H3"] * 20 + ["H1"] * 9 + ["H2"] * 18


def record(label: str, seed: int, right: list[int], **about: Any) -> dict[str, Any]:
    """A finished run that has these of its examples right."""
    metrics = {"primary": "accuracy", "n_examples": len(right), "pruned": {"accuracy": sum(right) / len(right)}}
    base = {"baseline": "", "part": "", "sparsity": 0.9, "right": np.packbits(right).tobytes().hex()}
    return {"label": label, "seed": seed, "metrics": metrics, **base, **about}


def test_the_interval_is_that_of_student_over_seeds(quality: Any) -> None:
    """Differences of 1, 2 and 3 of ten: 0.2 ± 4.3027 · 0.1 / √3; seeds that only one row has are left out."""
    found = [record("a", seed, [1] * 5 + [0] * 5) for seed in (1, 2, 3, 5)]
    found += [record("b", seed, [1] * (5 + seed) + [0] * (5 - seed), baseline="a") for seed in (1, 2, 3)]
    [row] = quality.paired.comparisons(found)
    assert row["seeds"] == [1, 2, 3] and row["differences"] == pytest.approx([0.1, 0.2, 0.3])
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert row["confidence_95"] == pytest.approx([0.2 - half, 0.2 + half], abs=1e-6)
    assert row["p"] == row["p_holm"] == pytest.approx(0.0741799, abs=1e-6)  # t = 3.4641 with 2 degrees of freedom
    assert row["disagreements"][2] == {"seed": 3, "better": 3, "worse": 0, "p": pytest.approx(0.25)}
    low, high = row["two_way_95"]
    assert 0 <= low < 0.2 < high < 0.6


def test_the_bootstrap_draws_seeds_and_examples(quality: Any) -> None:
    """Seeds that agree within but not with each other have an interval, and so have examples that differ."""
    assert quality.paired.two_way(np.array([[1.0] * 50, [0.0] * 50])) == [0.0, 1.0]
    low, high = quality.paired.two_way(np.array([[1.0] * 50 + [0.0] * 50] * 4))
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.02)
    assert quality.paired.two_way(np.ones((3, 10))) == [1.0, 1.0]


def test_one_seed_has_no_interval(quality: Any) -> None:
    found = [record("a", 1, [1, 0]), record("b", 1, [1, 1], baseline="a")]
    [row] = quality.paired.comparisons(found)
    assert row["difference"] == 0.5
    assert row["confidence_95"] is row["p"] is row["p_holm"] is row["two_way_95"] is None


def test_equal_differences_have_no_width(quality: Any) -> None:
    assert quality.paired.t_interval([0.1, 0.1]) == (0.1, 0.1, 0.0)
    assert quality.paired.t_interval([0.0, 0.0]) == (0.0, 0.0, 1.0)


def test_holm_multiplies_the_smallest_by_all(quality: Any) -> None:
    assert quality.paired.holm([0.03, 0.01, 0.02, 0.9]) == pytest.approx([0.06, 0.04, 0.06, 0.9])
    assert quality.paired.holm([0.6, 0.5]) == [1.0, 1.0]


@pytest.mark.rare
def test_a_small_study_runs(tiny: Tiny, tmp_path: Path) -> None:
    """Two real runs: which examples are right is what the report counts, and the table shows the difference."""
    (tmp_path / "rows.toml").write_text("\n[[row]]".join(ROWS.split("\n[[row]]")[:3]))
    short = {"teacher_epochs": 1, "batch_size": 16, "max_length": 16, "extra_examples": 40, "threads": 1}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in short.items()]
    command = [
        sys.executable,
        str(FOLDER / "quality.py"),
        tiny.model,
        "--task",
        "text-classification",
        "--data",
        tiny.data,
    ]
    command += ["--rows", str(tmp_path / "rows.toml"), "--seeds", "1", "--sparsities", "0.5", "--epochs", "1", *options]
    command += ["--holdout", "0.2", "-o", str(tmp_path / "study")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "study" / "quality.json").read_text())
    for run in found["runs"]:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(run["right"]), dtype=np.uint8))[:48]
        assert bits.mean() == pytest.approx(run["metrics"]["pruned"]["accuracy"])
        assert 0 <= run["holdout"] <= 1 and run["config"]["holdout"] == 0.2
    table = [sys.executable, str(FOLDER / "quality.py"), "--table", str(tmp_path / "study" / "quality.json")]
    shown = subprocess.run(table, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert " to no terms |" in shown.stdout, shown.stderr[-2000:]
    assert str(tmp_path) not in (tmp_path / "study" / "quality.json").read_text()
