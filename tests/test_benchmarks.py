"""The benchmarks still run: each at its smallest size, so that a measurement on a rare machine does not fail there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import Tiny, environment, write_csv, write_model

import capcli
from capcli.config import ExportConfig

FOLDER = Path(__file__).parent.parent / "benchmarks"


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


def test_the_benchmark_of_exports_runs(tiny: Tiny, tmp_path: Path) -> None:
    """A structured run in two formats, one with a comma in its name, beside dense PyTorch and the dense graph."""
    write_model(tmp_path / "model", max_position_embeddings=128)  # the length that is measured
    short = {"method": "cap-f", "epochs": 1, "teacher_epochs": 1, "max_train_samples": 32}
    tiny.prune(tmp_path / "run", model=str(tmp_path / "model"), **short)
    capcli.export(ExportConfig(model=str(tmp_path / "run"), out=str(tmp_path / "dense"), threads=1))
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


def test_the_study_of_what_is_left_runs(tiny: Tiny, tmp_path: Path) -> None:
    """Two runs of a quality study, probed on one set beside their teacher and the pretrained model."""
    runs = []
    for method in ("movement", "cap-m"):
        short = {"method": method, "sparsity": 0.5, "epochs": 1, "teacher_epochs": 1, "max_train_samples": 32}
        report = tiny.prune(tmp_path / "study" / "runs" / f"{method}-0.5-seed1", **short)
        runs.append({"label": method, "seed": 1, "sparsity": 0.5, "metrics": report["metrics"]})
    capcli.export(
        ExportConfig(model=str(tmp_path / "study/runs/movement-0.5-seed1"), out=str(tmp_path / "study/teachers/1"))
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
