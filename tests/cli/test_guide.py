"""What helps to find the way: help, tasks, configuration, diagnosis."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny import cap, environment, invoke

from capcli.cli import guide
from capcli.cli.app import app
from capcli.config.export import ExportConfig
from capcli.config.layers import prune_config
from capcli.config.measure import EvalConfig, ProbeConfig
from capcli.config.names import METHODS, TASK_NAMES
from capcli.config.options import leaves
from capcli.config.predict import PredictConfig
from capcli.config.prune import PruneConfig
from capcli.config.push import PushConfig

CONFIGS: dict[str, type] = {
    "prune": PruneConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "probe": ProbeConfig,
    "predict": PredictConfig,
    "push": PushConfig,
    "config": PruneConfig,
}


def flags(command: str, *, expert: bool) -> set[str]:
    found = [item for item, _ in leaves(CONFIGS[command]) if item.metadata and item.metadata["expert"] == expert]
    return {"--" + item.name.replace("_", "-") for item in found}


def words(text: str) -> set[str]:
    return {word.strip(".:;│") for word in text.replace(",", " ").split()}


@pytest.mark.slow
@pytest.mark.parametrize("command", CONFIGS)
def test_help_and_all_of_it(command: str) -> None:
    """The short help has the options that are not for experts, the long one all of them; both have the switches."""
    env = environment(COLUMNS="200")
    short = cap(command, "--help", env=env)
    assert (short.returncode, short.stderr) == (0, "")
    shown = words(short.stdout.split("Examples:")[0])
    switches = {"--format", "--json", "--quiet", "--debug", "--help"}
    rare = {"--structure", "--precision", "--format", "--debug"} if command == "prune" else set()
    assert (flags(command, expert=False) | switches) - rare <= shown
    experts = flags(command, expert=True) | rare
    assert not (experts - {"--format"}) & shown  # which --json names
    if experts:
        whole = cap(command, "--help-all", env=env)
        assert (whole.returncode, whole.stderr) == (0, "")
        assert experts | shown - {"Learn"} <= words(whole.stdout) | {"--help-all"}
        assert f"cap {command} --help-all lists all options" in short.stdout
        assert "--help-all lists" not in whole.stdout


@pytest.mark.slow
@pytest.mark.parametrize("columns", [40, 100, 200])
def test_the_help_of_prune_fits_in_two_screens(columns: int) -> None:
    done = cap("prune", "--help", env=environment(COLUMNS=str(columns)))
    lines = done.stdout.splitlines()
    if columns >= 100:
        assert len(lines) <= 100
    body = done.stdout.split("Examples:")[0].splitlines()
    assert max(map(len, body)) <= columns
    panels = [line.split()[1] for line in body if line.startswith("╭─")]
    assert panels[:3] == ["Arguments", "Task", "Pruning"]


@pytest.mark.parametrize("command", guide.EXAMPLES)
def test_examples_are_commands_that_the_parser_takes(command: str) -> None:
    """Each of this command, with options that there are; those of prune fit one another."""
    parser: Any = typer.main.get_command(app)
    for what, line in guide.EXAMPLES[command]:
        assert what[0].islower() and not what.endswith(".")
        program, name, *arguments = line.split("| ")[-1].split()
        assert (program, name) == ("cap", command)
        given = parser.commands[name].make_context(name, arguments).params
        if CONFIGS[command] is PruneConfig:
            known = {item.name for item, _ in leaves(PruneConfig)} | {"model"}
            prune_config({key: value for key, value in given.items() if key in known and value is not None})


def test_what_is_no_option_leads_to_all_of_them() -> None:
    result = cap("prune", "mini", "--task", "mr", "--no-such-thing", "1")
    assert result.returncode == 2
    assert "cap prune --help-all lists all options" in result.stderr


def test_tasks() -> None:
    found = json.loads(invoke("tasks", "--json").stdout)
    assert [row["name"] for row in found["tasks"]] == list(TASK_NAMES)
    [mnli] = [row for row in found["tasks"] if row["name"] == "mnli"]
    assert mnli["kind"] == "classification"
    assert mnli["text_columns"] == [["premise", "sentence1"], ["hypothesis", "sentence2"]]
    assert (mnli["metrics"], mnli["source"]) == (["accuracy"], "nyu-mll/glue/mnli")
    lines = [line.split() for line in invoke("tasks").stdout.splitlines()]
    assert ["subj", "classification", "text", "accuracy", "built", "in"] in lines


def settings(*arguments: str) -> dict[str, dict[str, Any]]:
    result = invoke("config", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return {row["name"]: row for row in json.loads(result.stdout)["settings"]}


def test_where_values_come_from(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("lr = 3e-4\nseed = 7\n")
    found = settings("--config", str(file), "--seed", "9", "--method", "fisher", "--preset", "quick")
    sources = {name: (row["value"], row["source"]) for name, row in found.items()}
    assert sources["seed"] == (9, "command line")
    assert sources["lr"] == (3e-4, str(file))
    assert sources["epochs"] == (2, "--preset quick")
    assert sources["final_share"] == (0.5, "--method fisher")
    assert sources["tau"] == (0.1, "default")
    assert sources["task"] == ("", "default")
    assert found["final_share"]["default"] == 0.4
    assert set(found) == {item.name for item, _ in leaves(PruneConfig) if item.metadata}
    shown = invoke("config", "--seed", "9").stdout.splitlines()
    assert shown[1].split() == ["--seed", "9", "command", "line", "1"]


def test_a_configuration_that_cannot_be_is_refused() -> None:
    result = invoke("config", "--method", "movement", "--refit")
    assert result.exit_code == 2
    assert "--refit has no effect on movement" in result.stderr


def test_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke("doctor", "--json")
    found = json.loads(result.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert found["methods"] == list(METHODS)
    assert checks["CPU"]["state"] == "ok"
    assert checks["cache"]["found"].startswith(str(tmp_path / "cache"))
    assert "token found" in checks["hub"]["found"] and "nothing is downloaded" in checks["hub"]["found"]
    assert "hf_x" not in result.stdout + invoke("doctor").stdout
    assert result.exit_code == int(any(check["state"] == "problem" for check in checks.values()))
    assert list(tmp_path.iterdir()) == [], "nothing is written"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_doctor_names_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("CAP_CACHE", str(tmp_path / "cache"))
    result = invoke("doctor", "--json")
    [cache] = [check for check in json.loads(result.stdout)["checks"] if check["name"] == "cache"]
    assert cache["state"] == "problem" and "CAP_CACHE" in cache["hint"]
    assert result.exit_code == 1


def test_doctor_names_a_missing_package_and_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    from capcli.verbs import doctor

    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "LEAST_BYTES", 2**62)
    checks = {check.name: check for check in doctor.doctor().checks}
    assert checks["numba"].state == "missing" and checks["numba"].hint == "pip install capcli[fast]"
    assert checks["this folder"].state == "problem"
