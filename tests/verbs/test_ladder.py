"""`cap export --plan`, and limits that choose: the ladder of exports, what is tried of it, what is left."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import WEIGHTS, Tiny, invoke

import capcli
from capcli.config.export import ExportConfig
from capcli.errors import CheckFailed
from capcli.exporting import checks, onnx_model
from capcli.exporting.ladder import DENSE, LADDER
from capcli.measuring import latency
from capcli.records.codec import from_json
from capcli.records.exported import Ladder, Speed
from capcli.records.parts import Latency
from capcli.reporting import ladders
from capcli.runtime import sparse
from capcli.verbs import export as verb

Row = dict[str, Any]
HAVE = ("--threads", "1", "-q", "--json")
FEW = ("--max-eval-samples", "8")


@pytest.fixture(scope="module")
def structured(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("structured") / "out"
    tiny.prune(out, method="cap-f", sparsity=0.6, store="fp32")
    return out


@pytest.fixture(scope="module")
def rows(pruned: Path) -> list[Row]:
    """The plan of a run."""
    return planned(pruned)


def planned(run: Path, *options: str) -> list[Row]:
    result = invoke("export", str(run), "--plan", *HAVE, *options)
    assert result.exit_code == 0, result.stderr
    return list(json.loads(result.stdout)["rungs"])


def chosen(run: Path, out: Path, *limits: str, code: int = 0) -> Row:
    """What `cap export` prints with limits."""
    result = invoke("export", str(run), "-o", str(out), *HAVE, *FEW, *limits)
    assert result.exit_code == code, result.stderr
    assert ("error: " in result.stderr) == bool(code)
    return dict(json.loads(result.stdout))


def failed(rung: Row) -> list[str]:
    """The limits that a rung did not keep to, by what they limit."""
    return [gate["metric"] for gate in rung["gates"] if not gate["passed"]]


def timed(monkeypatch: pytest.MonkeyPatch, ms: Mapping[str, float]) -> None:
    """Forward passes take these times by runtime, and nothing else is timed."""

    def at_once(systems: Mapping[str, latency.System]) -> Generator[Any, None, dict[str, Latency]]:
        yield 1, 1
        return {
            name: Latency(median_ms=ms[one.conditions["runtime"]], confidence_95=(0.1, 99.0), **one.conditions)
            for name, one in systems.items()
        }

    def nothing(*_: Any) -> Generator[Any, None, Speed]:
        yield from ()
        return Speed()

    monkeypatch.setattr(latency, "fixed", at_once)
    monkeypatch.setattr(checks, "_speed", nothing)


# The plan ------------------------------------------------------------------------------------------------------------


def test_the_plan_is_the_whole_ladder(rows: list[Row], pruned: Path, tmp_path: Path) -> None:
    """Every way in order, with its command; nothing is written."""
    ways = [DENSE, *LADDER]
    assert [(row["name"], row["format"], row["runtime"]) for row in rows] == [(w.name, w.to, w.runtime) for w in ways]
    for row in rows:
        words = shlex.split(row["command"])
        assert words[:3] == ["cap", "export", str(pruned)] and words[words.index("--to") + 1] == row["format"]
        assert ("refused" in row) != ("weights_bytes" in row)
    text = invoke("export", str(pruned), "--plan", "-o", str(tmp_path / "out")).stdout
    possible = [row for row in rows if "refused" not in row]
    assert all(row["command"].removesuffix(" --threads 1") in " ".join(text.split()) for row in possible)
    assert not list(tmp_path.iterdir())


def test_each_command_of_a_plan_writes_what_its_row_says(structured: Path, tmp_path: Path) -> None:
    """Bytes of our own files to the byte, on disk and in memory; a structured run has sliced rungs."""
    done = {}
    for row in planned(structured, *FEW):
        if row.get("refused") or row["runtime"] == "sparse" or row["estimated"]:
            continue
        _, *words = shlex.split(row["command"])
        result = invoke(*words, "-o", str(tmp_path / str(len(done))), "-q", "--json")
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        done[row["name"], row["format"]] = found
        assert found["size"]["weights_bytes"] == row["weights_bytes"], row
        assert found["size"]["memory_bytes"] == row["memory_bytes"], row
        assert row["exact"] == (found["metrics"] is None), row
    assert {("as stored", "sliced"), ("fp16", "sparse"), ("int8", "sliced")} <= set(done)


def test_a_plan_says_what_makes_it_faster(rows: list[Row], structured: Path) -> None:
    """The sparse runtime computes with the weights that are left, sliced layers with what is not empty."""
    kept = json.loads((structured / "report.json").read_text())["sparsity"]["achieved"]
    by_runtime = {(row["format"], row["runtime"]): row for row in planned(structured) if row["name"] == "as stored"}
    assert by_runtime["sparse", "torch"]["matrices_left"] == 1.0
    assert by_runtime["sparse", "sparse"]["matrices_left"] == pytest.approx(1 - kept)
    assert by_runtime["sliced", "torch"]["matrices_left"] < 0.7
    assert by_runtime["onnx", "onnx"]["matrices_left"] == by_runtime["sliced", "torch"]["matrices_left"]
    packed = by_runtime["sparse", "sparse"]["memory_bytes"]
    found = sparse.load(structured, 1)
    others = sum(4 * one.numel() for one in found.model.net.parameters() if one.device.type != "meta")
    assert packed == found.bytes + others


def test_a_plan_of_one_format(pruned: Path) -> None:
    """With a format by name its options are sized, and nothing else."""
    (row,) = planned(pruned, "--to", "sparse", "--dtype", "int8", "--embeddings", "svd:8")
    assert (row["name"], row["format"], row["runtime"], row["exact"]) == ("as asked for", "sparse", "torch", False)
    (small,), (graph,) = (planned(pruned, "--to", "onnx", *more) for more in (("--int8",), ()))
    assert small["weights_bytes"] < 0.5 * graph["weights_bytes"] and graph["exact"] and not small["exact"]


def test_a_plan_says_what_is_not_possible(
    tiny: Tiny, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_model, "find_spec", lambda name: None)
    monkeypatch.setattr(sparse, "find_spec", lambda name: None)
    moved = tmp_path / "moved"
    shutil.copytree(pruned, moved)
    settings = json.loads((moved / "cap_config.json").read_text())
    settings["source"]["data"] = str(tmp_path / "gone")
    (moved / "cap_config.json").write_text(json.dumps(settings))
    reasons = {(row["name"], row["format"], row["runtime"]): row.get("refused", "") for row in planned(moved)}
    assert "needs onnx" in reasons["as stored", "onnx", "onnx"]
    assert "needs numba" in reasons["int8", "sparse", "sparse"]
    assert reasons["fp16", "sparse", "torch"] == "the file is in fp16 as it is"
    assert reasons["as stored", "sliced", "torch"] == "no head, dimension or neuron is empty"
    assert "data are not available" in reasons["int8, task vocabulary", "sparse", "torch"]
    assert not any(reasons[way] for way in reasons if way[:2] == ("int8", "sparse") and way[2] == "torch")
    text = invoke("export", str(moved), "--plan", "-q").stdout
    assert text.count("not possible") == 5 and "the file is in fp16 as it is" in " ".join(text.split())


def test_a_plan_with_a_limit_says_what_is_too_large(rows: list[Row], pruned: Path) -> None:
    size = next(row["weights_bytes"] for row in rows if row["name"] == "int8")
    for row in planned(pruned, "--fit", str(size)):
        if not row.get("refused") and not row["estimated"]:
            assert (failed(row) == ["weights_bytes"]) == (row["weights_bytes"] > size)


# Limits --------------------------------------------------------------------------------------------------------------


def test_the_first_that_fits_is_taken(rows: list[Row], pruned: Path, tmp_path: Path) -> None:
    """What is above it on the ladder does not fit, what is below is not tried, and the folder is an export as any."""
    size = next(row["weights_bytes"] for row in rows if row["name"] == "int8")
    out = tmp_path / "out"
    found = chosen(pruned, out, "--fit", f"{size}B")
    assert found == json.loads((out / "export.json").read_text())
    ladder = found["ladder"]
    assert ladder["passed"] and ladder["fit"] == size and "max_drop" not in ladder
    *above, taken = ladder["rungs"]
    assert (taken["name"], taken["format"], taken["runtime"], taken["passed"]) == ("int8", "sparse", "torch", True)
    assert (out / WEIGHTS).stat().st_size == size == found["size"]["weights_bytes"] == taken["weights_bytes"]
    assert [rung["passed"] for rung in above if "refused" not in rung] == [False, False]
    assert all(failed(rung) == ["weights_bytes"] for rung in above if "refused" not in rung)
    assert (found["dtype"], found["embeddings"], found["vocab"], found["runtime"]) == ("int8", "int8", "", "torch")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert invoke("eval", str(out), "--max-bytes", f"{size / 1000}kB", "--threads", "1", "-q").exit_code == 0


def test_nothing_fits(rows: list[Row], pruned: Path, tmp_path: Path) -> None:
    """One byte less than the smallest: exit code 1, all that was tried on stdout, nothing on disk."""
    least = min(row["weights_bytes"] for row in rows if "refused" not in row)
    result = invoke("export", str(pruned), "-o", str(tmp_path / "out"), "--fit", str(least - 1), *HAVE)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert not found["passed"] and {row["name"] for row in found["rungs"]} == {way.name for way in LADDER}
    assert not any(row.get("passed") for row in found["rungs"])
    assert "error: no export keeps to the limits (" in result.stderr and "too large; the smallest has" in result.stderr
    text = invoke("export", str(pruned), "-o", str(tmp_path / "out"), "--fit", str(least - 1), "-q").stdout
    assert text.count("too large") == sum("refused" not in row for row in found["rungs"]) and "chosen" not in text
    assert not list(tmp_path.iterdir())
    with pytest.raises(verb.NothingFits) as caught:
        capcli.export(ExportConfig(model=str(pruned), out=str(tmp_path / "out"), fit=least - 1, threads=1))
    assert isinstance(caught.value, CheckFailed) and len(caught.value.ladder.rungs) == len(found["rungs"])


def test_latency_is_that_of_the_runtime(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file is too slow in PyTorch and fast enough on sparse weights; that is what is checked and said."""
    timed(monkeypatch, {"torch": 50.0, "sparse": 10.0, "onnx": 5.0})
    found = chosen(pruned, tmp_path / "out", "--max-latency-ms", "0.01s")
    slow, fast = found["ladder"]["rungs"]
    assert (slow["format"], slow["runtime"], slow["latency"]["median_ms"]) == ("sparse", "torch", 50.0)
    assert failed(slow) == ["median_ms"] and slow["passed"] is False
    assert (fast["format"], fast["runtime"], fast["latency"]["median_ms"]) == ("sparse", "sparse", 10.0)
    assert found["runtime"] == "sparse" and any("--runtime sparse" in note for note in found["notes"])
    assert found["check"]["exact"] and found["metrics"] is None


def test_a_runtime_that_cannot_compute_it_is_passed_over(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed(monkeypatch, {"torch": 50.0, "onnx": 5.0})
    monkeypatch.setattr(sparse, "find_spec", lambda name: None)
    found = chosen(pruned, tmp_path / "out", "--max-latency-ms", "10")
    assert [(rung["format"], rung["runtime"]) for rung in found["ladder"]["rungs"]] == [
        ("sparse", "torch"),
        ("sparse", "sparse"),
        ("sliced", "torch"),
        ("onnx", "onnx"),
    ]
    assert "needs numba" in found["ladder"]["rungs"][1]["refused"] and found["format"] == "onnx"


def test_a_drop_is_from_the_model_as_it_was_loaded(
    rows: list[Row], pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-bit answers are compared and scored one text at a time, by the limits as in the record, which names it."""
    timed(monkeypatch, {"torch": 50.0, "sparse": 50.0, "onnx": 5.0})
    graph = next(row["weights_bytes"] for row in rows if row["format"] == "onnx")
    limits = ("--fit", f"{graph * 0.85}", "--max-latency-ms", "10", "--max-drop", "accuracy=0.5,macro_f1=90%")
    found = chosen(pruned, tmp_path / "out", *limits, "--max-eval-samples", "0")
    taken = found["ladder"]["rungs"][-1]
    assert (taken["name"], taken["format"], found["int8"]) == ("int8", "onnx", True)
    assert [gate["name"] for gate in taken["gates"]] == [
        "max bytes",
        "max latency",
        "max drop accuracy",
        "max relative drop macro_f1",
    ]
    report = json.loads((pruned / "report.json").read_text())["metrics"]["pruned"]
    assert found["ladder"]["before"] == found["metrics"]["before"] == pytest.approx(report)
    assert taken["metrics"] == found["metrics"]["after"]
    drop = taken["gates"][2]["value"]
    assert drop == pytest.approx(report["accuracy"] - found["metrics"]["after"]["accuracy"])
    assert found["batching"] == "one text at a time" and found["check"]["texts"] == found["metrics"]["n_examples"]
    assert found["check"]["argmax_agreement"] == found["metrics"]["agreement"]


def test_a_drop_that_no_export_keeps_to(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is scored once: another runtime gives the same answers."""
    timed(monkeypatch, {"torch": 1.0, "sparse": 1.0, "onnx": 1.0})
    limits = ("--fit", "1GB", "--max-latency-ms", "10", "--max-drop", "accuracy=-0.9")
    found = chosen(pruned, tmp_path / "out", *limits, code=1)
    shown = ladders.counted_outcomes(from_json(Ladder, found, "stdout"))
    assert "drops too far; the smallest has" in shown and shown.endswith("the fastest took 1.00 ms")
    tried = [rung for rung in found["rungs"] if "refused" not in rung]
    assert all(failed(rung) == ["drop of accuracy"] for rung in tried)
    assert not any(rung["runtime"] == "sparse" for rung in tried)
    assert len({(rung["name"], rung["format"]) for rung in tried}) == len(tried) > 4
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_its_check_is_not_taken(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest: Callable[..., Any] = verb.checked

    def wrong(job: Any, *rest: Any) -> Generator[Any, None, Any]:
        if job.config.dtype == "auto":
            raise CheckFailed("the logits differ")
        return (yield from honest(job, *rest))

    monkeypatch.setattr(verb, "checked", wrong)
    monkeypatch.setattr(onnx_model, "find_spec", lambda name: None)
    found = chosen(pruned, tmp_path / "out", "--fit", "1GB")
    first, *_, taken = found["ladder"]["rungs"]
    assert first["refused"] == "the logits differ" and first["passed"] is False
    assert taken["name"] == "int8" and taken["passed"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--fit", "0"), "--fit 0 sets no limit"),
        (("--max-latency-ms", "0"), "--max-latency-ms 0 sets no limit"),
        (("--fit", "nan"), "'nan' is not a size such as 5MB, 800k or 1.5MiB"),
        (("--fit", "-1"), "'-1' is not a size"),
        (("--fit", "1e30GB"), "--fit must be below 2**63"),
        (("--max-latency-ms", "10m"), "'10m' is not a time"),
        (("--fit", "5MB", "--to", "sparse"), "--to sparse and --fit both choose the format"),
        (("--fit", "5MB", "--dtype", "int8"), "--dtype needs --to: --fit chooses it"),
        (("--max-drop", "accuracy=0.01"), "--max-drop alone chooses nothing"),
        (("--fit", "5MB", "--max-drop", "acuracy=0.01"), "did you mean accuracy?"),
        (("--fit", "5MB", "--max-drop", "accuracy=1"), "--max-drop accuracy=1 can never fail"),
        (("--fit", "5MB", "--max-drop", "accuracy=nan"), "--max-drop needs METRIC=NUMBER"),
        (("--fit", "5MB", "--data", "nowhere"), "nowhere"),
    ],
)
def test_limits_that_make_no_sense(pruned: Path, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    result = invoke("export", str(pruned), "-o", str(tmp_path / "out"), *options)
    assert result.exit_code == 2 and said in result.stderr and result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_drop_needs_the_data(pruned: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(pruned, moved)
    settings = json.loads((moved / "cap_config.json").read_text())
    settings["source"]["data"] = str(tmp_path / "gone")
    (moved / "cap_config.json").write_text(json.dumps(settings))
    result = invoke("export", str(moved), "--fit", "1GB", "--max-drop", "accuracy=0.1", "-q")
    assert result.exit_code == 2 and "--max-drop needs the data of the task" in result.stderr
    assert "name them with --data" in result.stderr
