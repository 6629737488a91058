"""The names that users read: each command's JSON has exactly those in `names.json`, in their order."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import Tiny, invoke

from capcli.config.grid import sweep_config
from capcli.records.codec import read, to_json
from capcli.records.pruned import Report
from capcli.sweeping.jobs import Failure
from capcli.sweeping.outcome import outcome

NAMES: dict[str, list[str]] = json.loads((Path(__file__).parent / "names.json").read_text("utf-8"))


def names(data: Any, at: str = "") -> list[str]:
    """Every name in reading order with the type of its value; of a list the first element stands for all."""
    if isinstance(data, dict):
        return [f"{at}: object"] * (not data) + [
            line for key, one in data.items() for line in names(one, f"{at}.{key}")
        ]
    if isinstance(data, list):
        return names(data[0], f"{at}[]") if data else [f"{at}[]"]
    kind = "number" if isinstance(data, int | float) and not isinstance(data, bool) else type(data).__name__
    return [f"{at}: {kind}"]


@pytest.fixture(scope="module")
def results(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each command prints, by the name of its key in `names.json`."""
    home = tmp_path_factory.mktemp("results")
    run, sliced = home / "run", home / "sliced"
    tiny.prune(run)
    tiny.prune(sliced, method="cap-f", sparsity=0.6)
    timed = tiny.prune(home / "timed", method="structured", sparsity=None, target="latency=1x", epochs=0)
    json_only = ("-q", "--json")
    on = ("--threads", "1", *json_only)
    limits = ("--max-latency-ms", "60s", "--max-drop", "accuracy=0.9")
    task = ("--tasks", "text-classification", "--data", tiny.data, "--max-length", "32", "--seeds", "2", *on)
    commands: dict[str, tuple[str, ...]] = {
        "eval": ("eval", str(run), "--latency-length", "8", *on),
        "eval-model": ("eval", str(run), "--perturb", "typos", "--baseline", str(run), "--min", "accuracy=0", *on),
        "eval-report": ("eval", str(run), "--baseline", str(run / "report.json"), *on),
        "probe": ("probe", str(run), "--layer", "all", "--baseline", tiny.model, "--max-latency-ms", "9999", *task),
        "probe-result": ("probe", str(run), "--layer", "all", "--baseline", str(home / "probe.json"), *task),
        "compare-eval": ("eval", "--compare", str(home / "eval.json"), str(home / "eval-model.json"), *json_only),
        "compare-several": (
            "eval",
            "--compare",
            *(str(home / f"{n}.json") for n in ("eval", "eval-model")),
            str(run),
            *json_only,
        ),
        "compare-probe": (
            "probe",
            "--compare",
            str(home / "probe.json"),
            str(home / "probe-result.json"),
            "-q",
            "--json",
        ),
        "export": ("export", str(run), "--to", "sparse", "-o", str(home / "a"), *on),
        "export-task": (
            "export",
            str(run),
            "--to",
            "dense",
            "--dtype",
            "bf16",
            "--vocab",
            "task",
            "-o",
            str(home / "b"),
            *on,
        ),
        "export-sliced": ("export", str(sliced), "--to", "sliced", "-o", str(home / "c"), *on),
        "export-again": ("export", str(home / "a"), "--to", "sparse", "-o", str(home / "d"), *on),
        "export-fit": ("export", str(run), "--fit", "1GB", *limits, "-o", str(home / "f"), *on),
        "export-exits": ("export", str(run), "--to", "exits", "-o", str(home / "g"), *on),
        "eval-exits": ("eval", str(home / "g"), "--latency-length", "8", *on),
        "export-lowrank": ("export", str(run), "--to", "lowrank", "--ratio", "0.3", "-o", str(home / "h"), *on),
        "push": ("push", str(run), "me/small", "--dry-run", *json_only),
        "export-plan": ("export", str(run), "--plan", "-o", str(home / "e"), *on),
    }
    found = {"prune": json.loads((run / "report.json").read_text("utf-8"))}
    for name, arguments in commands.items():
        result = invoke(*arguments)
        assert result.exit_code == 0, result.stderr
        (home / f"{name}.json").write_text(result.stdout)
        found[name] = json.loads(result.stdout)
    return {**found, "sweep": swept(run), "prune-units": {"reached": timed["reached"]}}


def swept(run: Path) -> Any:
    """The result of a sweep of two runs, of which one is this, and the other failed."""
    options = {"model": "m", "task": "mr", "method": "fisher,cap-f", "max_bytes": 1, "max_drop": "accuracy=0.5"}
    config = sweep_config(options)
    done, lost = (cell.name for cell in config.cells)
    failure = Failure(message="out of memory", hint="lower --batch-size", code=3)
    return to_json(outcome(config, {done: read(Report, run / "report.json")}, {lost: failure}))


@pytest.mark.parametrize("name", NAMES)
def test_the_names_that_users_read(results: dict[str, Any], name: str) -> None:
    options = ".config."  # of a report: they are those of the reference of the configuration
    assert [line for line in names(results[name]) if not line.startswith(options)] == NAMES[name]


def test_no_result_is_left_out(results: dict[str, Any]) -> None:
    assert list(results) == list(NAMES)
    assert results["export"]["run"].keys() == results["export-again"]["run"].keys()
