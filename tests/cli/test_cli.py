"""The command line: what goes to which stream, exit codes, messages, gates, help."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from tiny import WEIGHTS, Tiny, cap, environment, invoke, write_csv

from capcli.config.export import ExportConfig
from capcli.config.layers import prune_config
from capcli.config.measure import EvalConfig, ProbeConfig
from capcli.config.prune import PruneConfig

CONFIGS = {"prune": PruneConfig, "eval": EvalConfig, "export": ExportConfig, "probe": ProbeConfig}
SMALL: dict[str, Any] = {"epochs": 1, "teacher_epochs": 1, "max_train_samples": 32, "losses": "ce"}
FAST = ("-q", "--threads", "1", "--latency-length", "8")
NASTY = [
    "[/red]",
    "[link=http://x]y[/link]",
    "\x1b]0;title\x07",
    "\x1b[2J",
    "\r\n::error::x",
    "::add-mask::1",
    "##[error]x",
    "<script>alert(1)</script>",
    "=HYPERLINK('http://x')",
    "\u202eevil",
    "\x9b31m",
    "`|`",
    "x" * 100_000,
    "",
]


def refused(result: Any, *said: str) -> str:
    """One line and a hint at most, exit 2, nothing on stdout, no traceback; returns the message."""
    assert result.exit_code == 2, (result.exit_code, result.stderr[-2000:])
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line]
    errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert all(line.startswith("hint: ") for line in lines[errors[0] + 1 :]), lines
    assert len(lines) - errors[0] <= 2
    for text in said:
        assert text in "\n".join(lines[errors[0] :]), lines
    return lines[errors[0]]


# Streams -------------------------------------------------------------------------------------------------------------


def test_json_is_one_object(tiny: Tiny, tmp_path: Path) -> None:
    """For every command; progress and notes are on stderr."""
    out = tmp_path / "out"
    commands = [
        [*tiny.arguments(tmp_path / "none", **SMALL), "--plan", "--json"],
        [*tiny.arguments(out, **SMALL), "--json"],
        ["eval", str(out), "--format", "json", *FAST[1:]],
        ["export", str(out), "--to", "dense", "-o", str(tmp_path / "dense"), "--json"],
        ["probe", str(out), "--tasks", "subj", "--max-train-samples", "40", "--max-eval-samples", "20", "--json"],
    ]
    for command in commands:
        result = invoke(*command)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["schema_version"] == 1
        assert result.stdout.startswith("{")
        assert result.stderr
    assert not (tmp_path / "none").exists(), "--plan writes nothing"


def test_human_output_holds_the_figures(pruned: Path) -> None:
    result = invoke("eval", str(pruned), *FAST)
    assert result.exit_code == 0
    assert "accuracy" in result.stdout
    assert result.stderr == "", "-q is quiet"


def test_unknown_format(pruned: Path) -> None:
    refused(invoke("eval", str(pruned), "--format", "yaml"), "unknown format 'yaml'", "hint: choose human or json")


def test_streams_of_the_program(tiny: Tiny, pruned: Path) -> None:
    """In a process: JSON alone on stdout, no escape sequence anywhere, under GitHub Actions too."""
    env = environment(GITHUB_ACTIONS="true")
    result = cap("eval", str(pruned), "--json", "--threads", "1", "--min", "accuracy=0.1", env=env)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["passed"] is True
    assert "\x1b" not in result.stdout + result.stderr
    assert len(result.stderr.splitlines()) < 10, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"GITHUB_ACTIONS": "true"}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}, {}])
def test_help_has_no_colour_off_a_terminal(changes: dict[str, str]) -> None:
    result = cap("prune", "--help", env=environment(**changes))
    assert result.returncode == 0
    assert "\x1b" not in result.stdout + result.stderr or "FORCE_COLOR" in changes


def test_progress_says_step_epoch_and_loss(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never counts in two ways within a phase."""
    monkeypatch.setattr("capcli.progress.Lines.every_seconds", -1.0)
    chosen: dict[str, Any] = {**SMALL, "epochs": 2, "batch_size": 8, "max_train_samples": 32}
    result = invoke(*tiny.arguments(tmp_path / "out", **chosen))
    lines = [line.partition(": ")[2] for line in result.stderr.splitlines() if line.startswith("prune: ")]
    steps = [line for line in lines if line.startswith("step ") and "measuring" not in line]
    assert len(steps) == 8, result.stderr
    form = r"step {}/8, epoch {}/2, loss \d\.\d\d, sparsity \d+\.\d\d %; \d+% of the run(, .* left)?"
    for number, line in enumerate(steps):
        assert re.fullmatch(form.format(number + 1, number // 4 + 1), line), line
    (first, second) = [line for line in lines if line.startswith("epoch ")]
    assert re.fullmatch(r"epoch 1/2: accuracy \d\.\d{4}, .* on \d+ examples, sparsity \d+\.\d\d %", first)
    assert second.startswith("epoch 2/2: ")
    assert all(line.startswith(("step ", "epoch ")) for line in lines)
    teacher = [line for line in result.stderr.splitlines() if line.startswith("teacher: step 3/4, epoch 1/1, loss ")]
    assert len(teacher) == 1


# Messages ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "bert-bas"}, ("hint:", "bert-base")),
        ({"model": "no such folder!"}, ("no model folder at",)),
        ({"task": "text-clasification"}, ("unknown task", "did you mean text-classification?")),
        ({"task": "sst-2"}, ("did you mean sst2?",)),
        ({"method": "cap-sof"}, ("unknown method", "did you mean cap-soft?", "magnitude")),
        ({"preset": "papr"}, ("unknown preset", "did you mean paper?")),
        ({"losses": "ce,prk"}, ("unknown loss 'prk'", "did you mean prc?")),
        ({"losses": "prc"}, ("--losses must include ce or kd",)),
        ({"sparsity": 90}, ("in [0, 1), got 90", "did you mean --sparsity 0.9?")),
        ({"sparsity": 1.0}, ("in [0, 1)",)),
        ({"sparsity": -0.1}, ("in [0, 1)",)),
        ({"sparsity": "nan"}, ("in [0, 1)",)),
        ({"lr": "inf"}, ("--lr must be at least 0, got inf",)),
        ({"epochs": 0}, ("--epochs must be at least 1",)),
        ({"device": "tpu"}, ("unknown device 'tpu'",)),
        ({"precision": "int8"}, ("unknown precision",)),
        ({"dense_share": 0.7, "final_share": 0.7}, ("leaves no steps",)),
        ({"data": "/no/such/data"}, ("no data at /no/such/data",)),
        ({"text_column": "words"}, ("no text column 'words'", "'text', 'label'", "--text-column")),
        ({"label_column": "y"}, ("no label column 'y'", "--label-column")),
        ({"teacher": "/no/such/teacher"}, ("/no/such/teacher",)),
        ({"sparsity": 0.999, "method": "cap-f"}, ("cannot reach sparsity 0.999", "choose a lower --sparsity")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_user_gets_wrong(tiny: Tiny, tmp_path: Path, changes: dict[str, Any], said: tuple[str, ...]) -> None:
    refused(invoke(*tiny.arguments(tmp_path / "out", **{**SMALL, **changes})), *said)


def test_data_without_a_task(tiny: Tiny) -> None:
    refused(invoke("prune", tiny.model), "no task given", "valid: ")
    refused(invoke("prune", tiny.model, "--task", "regression"), "needs your own data", "--data")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "has no rows"),
        (None, "is empty"),
        ([("a good film", ""), ("a bad film", "positive")], "1 label of the train split is missing"),
        ([("a good film", "positive"), ("a film", "positive")], "the same label"),
    ],
    ids=["no-rows", "empty", "no-label", "one-label"],
)
def test_bad_training_data(tiny: Tiny, tmp_path: Path, rows: list[tuple[str, str]] | None, said: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_csv(data / "validation.csv", ("text", "label"), [("a good film", "positive"), ("a bad film", "positive")])
    if rows is None:
        (data / "train.csv").write_text("")
    else:
        write_csv(data / "train.csv", ("text", "label"), rows)
    refused(invoke(*tiny.arguments(tmp_path / "out", **SMALL, data=str(data))), said)


def test_unknown_labels(tiny: Tiny, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny.data, data)
    write_csv(data / "validation.csv", ("text", "label"), [("a good film", "positive"), ("a film", "so-so")])
    refused(
        invoke(*tiny.arguments(tmp_path / "out", **SMALL, data=str(data))),
        "unknown labels in the validation split: so-so; the task has negative, positive",
    )


def test_no_split_to_evaluate_on(tiny: Tiny, tmp_path: Path) -> None:
    data = str(Path(tiny.data) / "train.csv")
    refused(invoke(*tiny.arguments(tmp_path / "out", **SMALL, data=data)), "--holdout 0.1")


def test_teacher_with_other_labels(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    chosen = {"task": "text-pair-classification", "data": tiny.pairs, "teacher": str(pruned)}
    refused(invoke(*tiny.arguments(tmp_path / "out", **SMALL, **chosen)), "negative, positive", "different, same")


def test_teacher_without_a_head(tiny: Tiny, tmp_path: Path) -> None:
    refused(invoke(*tiny.arguments(tmp_path / "out", **SMALL, teacher=tiny.model)), "labels")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_corrupt_weights(tiny: Tiny, tmp_path: Path, share: float) -> None:
    shutil.copytree(tiny.model, tmp_path / "bad")
    path = tmp_path / "bad" / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    result = invoke(*tiny.arguments(tmp_path / "out", **SMALL, model=str(tmp_path / "bad")))
    refused(result, str(tmp_path / "bad"), "corrupt")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "all"])
def test_incomplete_model(tiny: Tiny, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny.model, tmp_path / "bad")
    for path in (tmp_path / "bad").iterdir():
        if name in (path.name, "all"):
            path.unlink()
    refused(invoke(*tiny.arguments(tmp_path / "out", **SMALL, model=str(tmp_path / "bad"))), str(tmp_path / "bad"))


@pytest.mark.parametrize("name", [WEIGHTS, "cap_config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "deleted", "emptied"])
def test_damaged_artefact(pruned: Path, tmp_path: Path, name: str, damage: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(pruned, out)
    path = out / name
    data = path.read_bytes()
    path.unlink()
    if damage != "deleted":
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    for command in (["eval", str(out), *FAST], ["export", str(out), "--to", "dense", "-o", str(tmp_path / "dense")]):
        refused(invoke(*command))
    assert not (tmp_path / "dense").exists()


def test_eval_of_an_unfinished_run(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert invoke(*tiny.arguments(out, **SMALL, max_time=1e-6)).exit_code == 75
    refused(invoke("eval", str(out), "--task", "mr"), str(out))
    refused(invoke("export", str(out), "--to", "dense"), "is an unfinished run")


def test_export_over_something(pruned: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    refused(invoke("export", str(pruned), "--to", "dense", "-o", str(tmp_path)), "is not empty")
    refused(invoke("export", str(pruned), "--to", "onx"), "unknown format 'onx'")


def test_usage_errors(pruned: Path) -> None:
    for command in (["prune"], ["eval", str(pruned), "--no-such"], ["pruen"], ["eval", str(pruned), "--seed", "x"]):
        result = invoke(*command)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(tiny: Tiny, tmp_path: Path) -> None:
    result = invoke(*tiny.arguments(tmp_path / "out", data="/no/such"), "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "error: no data at /no/such" in result.stderr


def test_internal_error_is_one_line(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from capcli.models import loading

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("x\ny")

    monkeypatch.setattr(loading, "load_model", broken)
    result = invoke("eval", str(pruned))
    assert result.exit_code == 3
    assert "error: internal error: ZeroDivisionError: x\n" in result.stderr
    assert "hint: run again with --debug" in result.stderr
    assert "Traceback" not in result.stderr


# Hostile strings -----------------------------------------------------------------------------------------------------


def harmless(result: Any) -> None:
    for text in (result.stdout, result.stderr):
        assert not set(text) & set("\x1b\x07\x9b\u202e\r\0")
        assert not any(line.startswith("::") for line in text.splitlines())
        assert len(text) < 30_000


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_hostile_names(tiny: Tiny, tmp_path: Path, text: str) -> None:
    """As model, data, task, column, teacher or output: an error, shown without being obeyed."""
    for changes in ({"model": text}, {"data": text + "/x"}, {"task": text}, {"text_column": text + "?"}):
        result = invoke(*tiny.arguments(tmp_path / "out", **{**SMALL, **changes}))
        assert result.exit_code == 2, (changes, result.stderr[:500])
        harmless(result)
    harmless(invoke("eval", f"{text}/x", "--task", "mr"))


def test_hostile_labels(tiny: Tiny, tmp_path: Path) -> None:
    """Through a whole run and `cap eval`, human and JSON."""
    labels = [text for text in NASTY if 0 < len(text) < 1000 and "\r" not in text]
    rows = [(f"a {word} film", label) for label, word in zip(labels, ["good", "bad"] * 9, strict=False)] * 4
    for split in ("train", "validation"):
        write_csv(tmp_path / "data" / f"{split}.csv", ("text", "label"), rows)
    data, out = str(tmp_path / "data"), tmp_path / "out"
    run = invoke(*tiny.arguments(out, **SMALL, data=data))
    assert run.exit_code == 0, run.stderr
    shown = [run, invoke("eval", str(out), *FAST[1:]), invoke("eval", str(out), *FAST, "--json")]
    for result in shown:
        assert result.exit_code == 0, result.stderr
        harmless(result)
    assert set(json.loads(shown[2].stdout)["labels"]) == {label.strip() for label in labels}
    assert "<script>" not in (out / "report.html").read_text()
    assert "\x1b" not in (out / "README.md").read_text()


# Gates ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gates", "code"),
    [
        (["--min", "accuracy=0.0"], 0),
        (["--min", "accuracy=0.0,macro_f1=0.0", "--max-bytes", "10000000"], 0),
        (["--max", "accuracy=0"], 1),
        (["--max-bytes", "10"], 1),
        (["--max-latency-ms", "0.000001"], 1),
        (["--max-drop", "accuracy=0.0", "--baseline", "SELF"], 0),
        (["--min-retention", "1.0", "--baseline", "SELF"], 0),
        (["--min-retention", "101%", "--baseline", "SELF"], 1),
        (["--min", "accuracy=1%", "--confidence", "95%"], 0),
        (["--max-drop", "accuracy=0", "--baseline", "SELF/report.json"], 0),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else str(value),
)
def test_gates(pruned: Path, gates: list[str], code: int) -> None:
    gates = [text.replace("SELF", str(pruned)) for text in gates]
    result = invoke("eval", str(pruned), *FAST, "--json", *gates)
    assert result.exit_code == code, result.stderr
    found = json.loads(result.stdout)
    assert found["passed"] == (code == 0)
    assert len(found["gates"]) == sum(text.startswith("--m") for text in gates) + sum(
        ",macro" in text for text in gates
    )


def test_bad_gates(pruned: Path, tmp_path: Path) -> None:
    refused(invoke("eval", str(pruned), "--min", "accuracy"), "--min needs METRIC=NUMBER", "for example")
    refused(invoke("eval", str(pruned), "--min", "accuracy=nan"), "METRIC=NUMBER")
    refused(invoke("eval", str(pruned), "--max-drop", "accuracy=0.1"), "none is given", "--baseline")
    (tmp_path / "other.json").write_text('{"metrics": [1]}')
    refused(
        invoke("eval", str(pruned), "--baseline", str(tmp_path / "other.json"), *FAST),
        "metrics is a list, not a JSON object",
    )


def test_junit_and_github(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    junit, summary = tmp_path / "gates.xml", tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    gates = ["--min", "accuracy=0", "--max", "macro_f1=0", "--junit", str(junit)]
    result = invoke("eval", str(pruned), *FAST, *gates)
    assert result.exit_code == 1
    suite = ElementTree.parse(junit).getroot()
    cases = list(suite.iter("testcase"))
    assert [case.find("failure") is not None for case in cases] == [False, True]
    assert "accuracy" in summary.read_text()
    assert sum(line.startswith("::error") for line in result.stderr.splitlines()) == 1
    assert "::" not in result.stdout


def test_junit_that_cannot_be_written(pruned: Path) -> None:
    result = invoke("eval", str(pruned), *FAST, "--min", "accuracy=0", "--junit", "/proc/x.xml")
    assert result.exit_code in (2, 3)
    assert "/proc/x.xml" in result.stderr
    assert "Traceback" not in result.stderr


# Help and configuration ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_help_and_version_import_nothing_heavy() -> None:
    """The program answers before torch could have been imported."""
    code = (
        "import sys\n"
        "sys.argv = ['cap', *sys.argv[1:]]\n"
        "from capcli.cli.app import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'sklearn', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    for arguments in (
        ["--help"],
        ["prune", "--help"],
        ["prune", "--help-all"],
        ["config", "--method", "fisher"],
        ["--version"],
        ["prune", "mini", "--task", "no-such"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_version_and_no_arguments() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("cap ")
    listing = invoke()
    assert all(name in listing.output for name in CONFIGS)


@pytest.mark.slow
def test_console_script_is_the_module() -> None:
    script = Path(sys.executable).with_name("cap")
    assert script.exists()
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout == cap("--version").stdout


def test_plan(tiny: Tiny, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    result = invoke(*tiny.arguments(tmp_path / "out"), "--plan")
    assert result.exit_code == 0, result.stderr
    assert "weights kept" in result.stdout
    assert "on this machine" in result.stdout
    assert sorted(tmp_path.iterdir()) == before


def test_config_file(tiny: Tiny, tmp_path: Path) -> None:
    """Dashes or underscores; the command line wins; types are checked; unknown names are refused."""
    file = tmp_path / "run.toml"
    file.write_text(
        'batch-size = 16\nmax_length = 12\nlr = 1\nmethod = "magnitude"\nsparsity = 0.5\nkeep_work = false\n'
    )
    found = prune_config({"model": "m", "task": "mr", "sparsity": 0.6}, str(file))
    assert (found.batch_size, found.source.max_length, found.lr, found.method) == (16, 12, 1.0, "magnitude")
    assert found.sparsity == 0.6
    start = ["prune", tiny.model, "--task", "mr", "--config"]
    for text, said in (
        ("batch_sise = 3", "did you mean batch_size?"),
        ("epochs = 'three'", "epochs in"),
        ("epochs = true", "epochs in"),
        ("epochs = ", "cannot read"),
        ("[a]\nb = 1", "unknown table"),
    ):
        file.write_text(text)
        refused(invoke(*start, str(file)), said)
    refused(invoke(*start, str(tmp_path / "none.toml")), "none.toml")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune",), "error: missing argument 'MODEL'"),
        (("eval", "x", "--no-such"), "error: no such option: --no-such"),
        (("pruen", "mini"), "error: no such command 'pruen'"),
        (("prune", "mini", "--seed", "x"), "error: invalid value for '--seed'"),
    ],
)
def test_what_the_parser_refuses_is_one_line_and_a_hint(arguments: tuple[str, ...], message: str) -> None:
    done = cap(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith(message)
    assert hint.startswith("hint: cap") and "--help" in hint
