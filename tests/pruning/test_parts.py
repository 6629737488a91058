"""Steps in parts, and by several processes: the gradients, banks, masks and metrics are those of one process.

The processes are forks of this one, with the variables that torchrun sets; they meet through gloo on the loopback.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import SOURCES, WEIGHTS, Tiny, forked, invoke, outcome, wait, write_model

import capcli
from capcli.cli import app
from capcli.errors import Stopped
from capcli.events import StopFlag
from capcli.models import predict
from capcli.pruning import train
from capcli.stored import read_json
from capcli.verbs import prune as prune_verb

SHORT: dict[str, Any] = {
    "epochs": 2,
    "teacher_epochs": 1,
    "max_train_samples": 41,
    "max_eval_samples": 33,
    "checkpoint_seconds": 0,
    "precision": "fp32",
    "store": "fp32",
    "keep_work": True,
}
HIDDEN = {"losses": "ce,kd,prc,snc,fic,hid"}


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network without dropout."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    write_model(folder, attention_probs_dropout_prob=0.0)
    return str(folder)


def kind_of(tiny: Tiny, kind: str) -> dict[str, Any]:
    task, data = SOURCES[kind]
    return {"task": task, "data": getattr(tiny, data)}


def assert_alike(one: Path, other: Path) -> None:
    """Losses, masks and metrics of two runs are the same but for rounding."""
    reports = [read_json(folder / "report.json") for folder in (one, other)]
    rows = [report["history"] for report in reports]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["losses"].keys() == theirs["losses"].keys()
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-5, rel=1e-5)
    weights = [load_file(folder / WEIGHTS) for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        if not tensor.is_floating_point():  # where the kept weights are
            assert torch.equal(tensor, weights[1][name]), name
        elif not name.endswith("bias"):  # where a shift changes nothing, a gradient is rounding, which Adam makes large
            torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=2e-4)
    assert reports[0]["metrics"]["pruned"] == pytest.approx(reports[1]["metrics"]["pruned"], abs=1e-4)


# Parts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen",
    [
        {"kind": "classification", "method": "cap-soft", **HIDDEN, "reg_weight": 10.0},
        {"kind": "classification", "method": "cap-f", "sparsity": 0.5, **HIDDEN},
        {"kind": "classification", "method": "cap-f", "sparsity": 0.5, "importance_examples": 40},
        {"kind": "regression", "method": "cap-pins"},
        {"kind": "multilabel", "method": "cap-fisher"},
        {"kind": "tokens", "method": "cap-soft", **HIDDEN},
        {"kind": "spans", "method": "movement"},
        {"kind": "embedding", "method": "movement"},
    ],
    ids=lambda chosen: f"{chosen['kind']}-{chosen['method']}",
)
def test_a_step_in_parts_is_the_whole_step(
    tiny: Tiny, plain_model: str, tmp_path: Path, chosen: dict[str, Any]
) -> None:
    """Of 16 examples 5 at a time, or all: the terms of the loss are those of the whole batch, and so are the masks."""
    options = {**SHORT, **kind_of(tiny, chosen["kind"]), "model": plain_model, **chosen}
    del options["kind"]
    tiny.prune(tmp_path / "whole", **options)
    report = tiny.prune(tmp_path / "parts", **options, micro_batch=5)
    assert report["memory"]["micro_batch"] == 5
    assert_alike(tmp_path / "whole", tmp_path / "parts")


def test_parts_as_large_as_the_batch_are_none(tiny: Tiny, tmp_path: Path) -> None:
    report = tiny.prune(tmp_path / "out", **{**SHORT, "method": "movement", "micro_batch": 16})
    assert "micro_batch" not in report["memory"]
    assert not any("parts" in note for note in report["notes"])


ON_DEVICE = torch.OutOfMemoryError("CUDA out of memory")


def scarce(examples: int = 1000, tokens: int = 1000, error: Exception = ON_DEVICE) -> Callable[..., Any]:
    """A forward pass for which memory runs out with more examples or, to learn, with longer ones."""
    whole = predict.forward_states

    def run(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        n_examples, n_tokens = inputs["attention_mask"].shape
        if n_examples > examples or (n_tokens > tokens and torch.is_grad_enabled()):
            raise error
        return whole(model, inputs, *rest, **named)

    return run


@pytest.mark.parametrize("error", [ON_DEVICE, MemoryError()], ids=["device", "host"])
def test_memory_that_runs_out_in_training_and_evaluation(
    tiny: Tiny, plain_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """R9: parts are halved until they fit, the step stays what it was, and all is recorded."""
    options = {**SHORT, "model": plain_model, "method": "cap-soft"}
    tiny.prune(tmp_path / "whole", **options)
    monkeypatch.setattr(predict, "forward_states", scarce(6, error=error))
    notes = []
    for event in prune_verb.prune(tiny.prune_config(tmp_path / "parts", **options)):
        notes.append(event.note)
    report = read_json(tmp_path / "parts" / "report.json")
    assert report["memory"]["micro_batch"] == 4
    assert 0 < report["memory"]["evaluation_tokens"] <= 6 * 16
    assert sum("out of memory: steps go through the network in parts of 4 examples" in note for note in notes) == 2
    assert any("in parts of 4 examples" in note for note in report["notes"])
    assert any("memory ran out: texts go through" in note for note in report["notes"])
    assert_alike(tmp_path / "whole", tmp_path / "parts")
    html = (tmp_path / "parts" / "report.html").read_text()
    assert "in parts of 4 examples" in html


def test_memory_that_runs_out_when_a_stopped_run_goes_on(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint knows the parts, so that the result is that of a run that was not stopped."""
    monkeypatch.setattr(predict, "forward_states", scarce(6))
    tiny.prune(tmp_path / "whole", **SHORT)
    for _ in range(3):
        flag = StopFlag()
        with pytest.raises(Stopped):
            for event in prune_verb.prune(tiny.prune_config(tmp_path / "out", **SHORT), flag=flag):
                if event.phase == "prune" and event.status.startswith("step") and "continuing" not in event.note:
                    flag.reason = "the test"
    tiny.prune(tmp_path / "out", **SHORT)
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")


def test_the_advice_where_not_even_one_example_fits_can_be_followed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SHORT, "method": "movement", "losses": "ce", "data": tiny.pairs, "task": "text-pair-classification"}
    monkeypatch.setattr(predict, "forward_states", scarce(tokens=8))
    result = invoke(*tiny.arguments(tmp_path / "out", **options))
    assert result.exit_code == 3
    assert (
        "error: out of memory\nhint: start over with a shorter --max-length or a smaller model, and --overwrite\n"
        in (result.stderr)
    )
    assert invoke(*tiny.arguments(tmp_path / "out", **{**options, "max_length": 8}), "--overwrite").exit_code == 0


def test_an_export_and_an_evaluation_in_little_memory(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = capcli.evaluate(model=str(pruned))
    monkeypatch.setattr(predict, "forward_states", scarce(3))
    found = capcli.evaluate(model=str(pruned))
    assert found["metrics"] == pytest.approx(wanted["metrics"], abs=1e-5)
    assert any("memory ran out" in note for note in found["notes"])
    capcli.export(model=str(pruned), to="dense", out=str(tmp_path / "dense"))
    assert (tmp_path / "dense" / "model.safetensors").is_file()


# Processes -----------------------------------------------------------------------------------------------------------


def places(n: int) -> list[dict[str, str]]:
    """What a launcher sets for each of `n` processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    same = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **same} for rank in range(n)]


def together(*actions: Callable[[], Any]) -> list[int]:
    """Run each of the actions in a fork of its own as one rank; returns the pids."""

    def ranked(place: dict[str, str], action: Callable[[], Any]) -> Callable[[], Any]:
        def act() -> None:
            os.environ.update(place)
            action()

        return act

    return [forked(ranked(place, action)) for place, action in zip(places(len(actions)), actions, strict=True)]


def pruned_by(tiny: Tiny, out: Path, n: int, **chosen: Any) -> None:
    assert [wait(pid) for pid in together(*[lambda: tiny.prune(out, **SHORT, **chosen)] * n)] == [0] * n


@pytest.mark.parametrize(
    ("n", "chosen"),
    [
        (2, {"method": "cap-soft", **HIDDEN, "reg_weight": 10.0}),
        (2, {"method": "cap-fisher", "holdout": 0.2}),
        (2, {"method": "cap-f", "sparsity": 0.5, **HIDDEN}),
        (2, {"method": "cap-f", "sparsity": 0.5, "importance_examples": 40, "refit": True}),
        (2, {"method": "first-order", "structure": "dimensions", "basis": "pca", "sparsity": 0.5}),
        (2, {"method": "pins", "micro_batch": 3, "epochs": 1}),
        (2, {"method": "sparsegpt", "epochs": 0, "heal": 3}),
        (3, {"method": "cap-m", "batch_size": 20}),
        (2, {"method": "fisher", "max_train_samples": 9}),
    ],
    ids=str,
)
def test_processes_make_what_one_makes(
    tiny: Tiny, plain_model: str, tmp_path: Path, n: int, chosen: dict[str, Any]
) -> None:
    """R11: losses of all steps within 1e-5, masks equal, banks equal. Of 41 examples the last step has 1, so that some
    ranks have none; 9 are fewer than a batch."""
    options = {"model": plain_model, **{"epochs": 2, **chosen}}
    settings = {name: value for name, value in SHORT.items() if name not in options}
    tiny.prune(tmp_path / "one", **settings, **options)
    assert [wait(pid) for pid in together(*[lambda: tiny.prune(tmp_path / "many", **settings, **options)] * n)] == [
        0
    ] * n
    assert_alike(tmp_path / "one", tmp_path / "many")
    for bank in (tmp_path / "one" / "work").glob("bank-*/*.safetensors"):
        ours, theirs = load_file(bank), load_file(tmp_path / "many" / "work" / bank.parent.name / bank.name)
        assert all(torch.allclose(ours[name], theirs[name], atol=2e-3) for name in ours), bank.parent.name
    report = read_json(tmp_path / "many" / "report.json")
    assert [process["host"] for process in report["processes"]] == [socket.gethostname()] * n
    assert f"{n} processes" in report["device"]


def cap(log: Path, arguments: list[str], action: Callable[[], Any] = lambda: None) -> Callable[[], Any]:
    """`cap` as a rank, with what it prints in two files; `action` is done first."""

    def act() -> None:
        log.mkdir(exist_ok=True)
        rank = os.environ["RANK"]
        sys.stdout, sys.stderr = ((log / f"{name}{rank}").open("w") for name in ("out", "err"))
        sys.argv = ["cap", *arguments]
        action()
        app.main()

    return act


def dying(step: int, number: int = signal.SIGKILL) -> Callable[[], Any]:
    """Ends the process, or signals it, at a step of the pruning."""

    def action() -> None:
        take_step = train.take_step

        def at_step(job: Any, optimizer: Any, scaler: Any, now: int, *rest: Any) -> Any:
            if job.phase == "prune" and now == step:
                os.kill(os.getpid(), number)
            return take_step(job, optimizer, scaler, now, *rest)

        train.take_step = at_step

    return action


LONGER = {**SHORT, "epochs": 4}


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The outcome of a run by two processes that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert [wait(pid) for pid in together(*[lambda: tiny.prune(out, **LONGER)] * 2)] == [0, 0]
    return outcome(out)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed(tiny: Tiny, tmp_path: Path, whole: Any, victim: int) -> None:
    """R11: the other one leaves soon, with one line that names it, and the same command goes on."""
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = tiny.arguments(out, **LONGER)
    ranks = [cap(log, arguments, dying(5) if rank == victim else lambda: None) for rank in range(2)]
    pids, began = together(*ranks), time.monotonic()
    codes = [wait(pid) for pid in pids]
    assert time.monotonic() - began < 60
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 3
    said = (log / f"err{1 - victim}").read_text().splitlines()
    assert said[-2] == f"error: rank {victim} on {socket.gethostname()} ended or no longer answers"
    assert said[-1] == "hint: run the same command again to continue"
    assert sum("error:" in line for line in said) == 1
    assert (log / f"out{1 - victim}").read_text() == ""
    assert [wait(pid) for pid in together(*[lambda: tiny.prune(out, **LONGER)] * 2)] == [0, 0]
    assert outcome(out) == whole


def drifting() -> None:
    """One weight of this rank is another one after a step, as rounding of another processor would have it."""
    take_step = train.take_step

    def at_step(job: Any, optimizer: Any, scaler: Any, now: int, *rest: Any) -> Any:
        terms = take_step(job, optimizer, scaler, now, *rest)
        if job.phase == "prune" and now == 3:
            next(job.model.net.parameters()).data[0, 0] += 1e-6
        return terms

    train.take_step = at_step


def test_ranks_that_drift_apart(tiny: Tiny, tmp_path: Path) -> None:
    """No checkpoint is written that holds for one of them alone."""
    arguments, log = tiny.arguments(tmp_path / "out", **LONGER), tmp_path / "log"
    codes = [wait(pid) for pid in together(cap(log, arguments), cap(log, arguments, drifting))]
    assert codes == [3, 3]
    assert "error: the processes have different weights at step 4\n" in (log / "err0").read_text()
    assert (log / "err1").read_text() == ""
    steps = sorted(path.name for path in (tmp_path / "out" / "work" / "prune-steps").iterdir())
    assert steps[-1] == "step-00000003"


@pytest.mark.parametrize("n", [1, 2])
def test_a_signal_to_one_rank_stops_all(tiny: Tiny, tmp_path: Path, whole: Any, n: int) -> None:
    """R11: with a checkpoint; the run goes on with as many processes, or with another number, which it notes."""
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = tiny.arguments(out, **LONGER)
    codes = [wait(pid) for pid in together(cap(log, arguments), cap(log, arguments, dying(5, signal.SIGTERM)))]
    assert codes == [75, 75]
    assert "error: stopped by another process at step 6 of 12\n" in (log / "err0").read_text()
    assert (log / "err1").read_text() == ""
    events = "".join(event.note for event in prune_verb.prune(tiny.prune_config(out, **LONGER))) if n == 1 else ""
    if n == 2:
        assert [wait(pid) for pid in together(*[lambda: tiny.prune(out, **LONGER)] * 2)] == [0, 0]
        assert outcome(out) == whole
    else:
        assert "continuing at step 6 of 12" in events
        assert "2 processes, now" in events
        assert read_json(out / "report.json")["status"] == "complete"


def test_what_one_rank_refuses_is_said_once(tiny: Tiny, tmp_path: Path) -> None:
    """Other data on one machine, and a mistake that all of them see."""
    other = tmp_path / "words"
    shutil.copytree(tiny.data, other)
    text = (other / "train.csv").read_text()
    (other / "train.csv").write_text(text.replace("bright", "great"))
    ours, theirs = (tiny.arguments(tmp_path / "out", **{**SHORT, "data": data}) for data in (tiny.data, str(other)))
    log = tmp_path / "log"
    codes = [wait(pid) for pid in together(cap(log, ours), cap(log, theirs))]
    assert codes == [2, 2]
    said = (log / "err0").read_text() + (log / "err1").read_text()
    assert said.count("error:") == 1
    assert re.search(r"error: rank 1 on \S+: not the same as what rank 0 has: texts of train\n", said)
    others = tiny.arguments(tmp_path / "out", **{**SHORT, "lr": 1e-4})
    codes = [wait(pid) for pid in together(cap(tmp_path / "lr", ours), cap(tmp_path / "lr", others))]
    assert codes == [2, 2]
    assert "not the same as what rank 0 has: --lr\n" in (tmp_path / "lr" / "err0").read_text()
    assert not (tmp_path / "out").exists()
    wrong = tiny.arguments(tmp_path / "out", **{**SHORT, "sparsity": 1.5})
    codes = [wait(pid) for pid in together(*[cap(tmp_path / "wrong", wrong)] * 2)]
    assert codes == [2, 2]
    assert (tmp_path / "wrong" / "err0").read_text().startswith("error: sparsity is the fraction")
    assert (tmp_path / "wrong" / "err1").read_text().startswith("error: rank 1: sparsity is the fraction")


def test_commands_for_one_process_alone(tiny: Tiny, pruned: Path, tmp_path: Path) -> None:
    arguments = ["export", str(pruned), "--to", "dense", "-o", str(tmp_path / "dense")]
    codes = [wait(pid) for pid in together(*[cap(tmp_path / "log", arguments)] * 2)]
    assert codes == [2, 2]
    assert (tmp_path / "log" / "err0").read_text() == (
        "error: cap export is done by one process, not by 2\nhint: start it without torchrun\n"
    )
    assert (tmp_path / "log" / "err1").read_text() == ""
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("command", ["eval", "probe"])
def test_an_evaluation_by_two_processes(pruned: Path, tmp_path: Path, command: str) -> None:
    """The same result, on the stdout and in the files of rank 0 alone."""
    more = {"eval": ["--perturb", "case"], "probe": ["--tasks", "subj", "--max-train-samples", "60", "--seeds", "2"]}
    few = ["--max-eval-samples", "33", "--json", "--quiet", "--device", "cpu"]
    arguments = [command, str(pruned), *more[command], *few]
    one = invoke(*arguments)
    assert one.exit_code == 0
    log = tmp_path / "log"
    ranks = [cap(log, [*arguments, "--html", str(tmp_path / "page.html")])] * 2
    assert [wait(pid) for pid in together(*ranks)] == [0, 0]
    ours, theirs = json.loads(one.stdout), json.loads((log / "out0").read_text())
    same = {"eval": ("metrics", "splits", "perturbed"), "probe": ("tasks", "mean")}[command]
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert (log / "out1").read_text() == ""
    assert (tmp_path / "page.html").is_file()
