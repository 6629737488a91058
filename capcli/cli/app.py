"""The commands of `cap`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from capcli import parallel
from capcli.cli import streams
from capcli.cli.output import (
    EXIT_FAILED,
    EXIT_GATE,
    check_reports,
    emit,
    finish,
    hello,
    put,
    say,
    shown,
    tell_gates,
    tell_junit,
    tell_lines,
    wants_json,
)
from capcli.cli.parameters import MEASURES, OTHERS, Start, app, options
from capcli.config.export import ExportConfig
from capcli.config.grid import explained, sweep_config
from capcli.config.layers import build, check_limits, layered, options_file
from capcli.config.measure import EvalConfig, Gates, ProbeConfig
from capcli.config.names import CONFIG_FILE
from capcli.config.options import leaves, split_list
from capcli.config.predict import PredictConfig
from capcli.config.prune import PruneConfig
from capcli.config.push import PushConfig
from capcli.config.sweep import SweepConfig, SweepOptions
from capcli.errors import CapError, ConfigError
from capcli.progress import Bars, Lines, nowhere, on_terminal
from capcli.progress import watch as watched
from capcli.records.measured import EvalResult, ProbeResult, Result
from capcli.records.told import Setting, Settings
from capcli.reporting import terminal, told

if TYPE_CHECKING:
    from capcli.events import Event, StopFlag

T = TypeVar("T")
RARE = (
    "min",
    "max",
    "min_retention",
    "confidence",
    "structure",
    "precision",
    "jobs",
    "output",
    "debug",
)  # of cap prune


def watch(events: Generator[Event, None, T], quiet: bool, flag: StopFlag | None = None, *, bars: bool = True) -> T:
    """`progress.watch` on stderr; `bars`, whether they may be drawn, on a terminal that nothing else is written to."""
    return watched(events, nowhere if quiet else Bars(shown) if bars and on_terminal() else Lines(say), flag)


def main() -> None:
    """Entry point of `cap` and `python -m capcli`."""
    streams.guard()
    with contextlib.suppress(CapError):  # which is said when the command begins
        if parallel.place().size > 1:  # before torch is there, which says of each connection that ends where it was
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
        if parallel.place().rank:
            streams.mute()
    code = _exit_code()
    if failure := streams.failure():
        reason = failure.strerror or str(failure)
        tell_lines(f"cannot write to stdout: {reason}", "files that were already written are kept", annotate=code == 0)
        code = code or EXIT_FAILED
    sys.exit(code)


def _exit_code() -> int:
    """Run the command of the command line; returns its exit code."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # it would write colours under GITHUB_ACTIONS
    try:
        return int(app(prog_name="cap", standalone_mode=False) or 0)
    except Exception as error:
        said = getattr(error, "format_message", None)  # of what the parser refuses; its classes are Typer's own affair
        if said is None:
            raise
        return refused(error, said())


def refused(error: Any, message: str) -> int:
    """Say what the parser could not read, as every other error is said; returns the exit code."""
    context = getattr(error, "ctx", None)
    if message.strip():  # or the help was printed
        path = context.command_path if context else "cap"
        more = "--help-all lists all options" if experts_of(context) else "--help lists all commands and options"
        tell_lines(message[:1].lower() + message[1:].rstrip("."), f"{path} {more}")
    return int(getattr(error, "exit_code", CapError.exit_code))


def experts_of(context: Any) -> frozenset[str]:
    """The options that the short help of the command leaves out."""
    return getattr(getattr(context, "command", None), "experts", frozenset())


def _version(asked: bool) -> None:
    if asked:
        import importlib.metadata

        print(f"cap {importlib.metadata.version('capcli')}")
        raise typer.Exit


@app.callback()
def _cap(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@options("prune", (PruneConfig, SweepOptions), "overwrite", "plan", "config", rare=RARE)
def prune(
    chosen: dict[str, Any], overwrite: bool, plan: bool, config: str, output: str, as_json: bool, quiet: bool
) -> None:
    """Prune MODEL while it learns TASK; write a sparse model and a report.

    To continue a stopped run, run the same command again. Several methods, sparsities or seeds
    make a sweep: a run of each, one table, and the smallest that passes all gates as OUT/best.
    """
    settings, machine = sweep_config(chosen, config), wants_json(output, as_json)
    if plan and settings.cells:
        raise ConfigError("--plan is for one run", "give one method, one sparsity and one seed")
    what = f" ({len(settings.cells)} runs)" if settings.cells else ""
    hello(quiet, f"cap prune {settings.run.model} for {settings.run.source.task} to {settings.out_folder}{what}")
    if plan:
        from capcli.pruning import plan as planning

        planned = watch(planning.plan(settings.run), quiet)
        emit(planned, machine, lambda: terminal.facts(planning.plan_rows(planned)))
    elif settings.cells:
        swept(settings, overwrite, machine, quiet)
    else:
        pruned(settings, overwrite, machine, quiet)


def pruned(settings: SweepConfig, overwrite: bool, machine: bool, quiet: bool) -> None:
    """One run; exit 1 when a gate fails."""
    from capcli.events import StopFlag, signals
    from capcli.verbs import prune as prune_verb

    flag = StopFlag()
    with signals(flag):
        events = prune_verb.prune(settings.run, flag=flag, overwrite=overwrite, gates=settings.gates)
        found = watch(events, quiet)
    emit(found, machine, lambda: terminal.prune_summary(found, settings.out_folder))
    tell_gates(found.gates or ())
    if found.passed is False:
        raise typer.Exit(EXIT_GATE)


def swept(settings: SweepConfig, overwrite: bool, machine: bool, quiet: bool) -> None:
    """All runs of a sweep; its result is shown also when some failed, or none passes."""
    from capcli.events import StopFlag, signals
    from capcli.sweeping import sweep as sweeping

    flag = StopFlag()
    with signals(flag):
        try:
            found = watch(sweeping.sweep(settings, flag=flag, overwrite=overwrite), quiet)
        except (sweeping.RunsFailed, sweeping.NothingPasses) as error:
            left = error.sweep
            emit(left, machine, lambda: terminal.sweep_summary(left, settings.out_folder))
            raise
    emit(found, machine, lambda: terminal.sweep_summary(found, settings.out_folder))


@options("eval", (EvalConfig,), *MEASURES)
def eval_(chosen: dict[str, Any], **switches: Any) -> None:
    """Measure MODEL on a task: metrics with intervals, size, latency; check gates.

    For a model made by `cap prune`, task and data of its run are the default. Options can also be set in `cap.toml`.
    """

    def start(layers: dict[str, Any]) -> Generator[Event, None, EvalResult]:
        from capcli.verbs import evaluate

        return evaluate.evaluate(evaluate.eval_config(layers))

    documented("eval", start, chosen, **switches)


@options("export", (ExportConfig,), "plan")
def export(chosen: dict[str, Any], plan: bool, output: str, as_json: bool, quiet: bool) -> None:
    """Convert a pruned MODEL to another format, and check the result; or choose the format that meets your limits.

    dense: for every tool; sparse: the smallest file; sliced and onnx: faster, without the removed
    parts; exits: easy texts use fewer layers; mask: a bit per weight, over a shared base; lowrank:
    thin factors, lossy.
    """
    check_limits(chosen)
    settings, machine = build(ExportConfig, chosen), wants_json(output, as_json)
    if not plan:
        settings.check_asked()
    hello(quiet, f"cap export {settings.model}" + (f" to {settings.to}" if settings.to else ""))
    from capcli.events import StopFlag, signals
    from capcli.verbs import export as export_verb

    if plan:
        planned = watch(export_verb.plan(settings), quiet)
        emit(planned, machine, lambda: terminal.plan_summary(planned))
        return
    flag = StopFlag()
    with signals(flag):
        try:
            found = watch(export_verb.export(settings), quiet, flag)
        except export_verb.NothingFits as error:
            tried = error.ladder
            emit(tried, machine, lambda: terminal.ladder_summary(tried))
            raise
    emit(found, machine, lambda: terminal.export_summary(found))


@options("probe", (ProbeConfig,), *MEASURES)
def probe(chosen: dict[str, Any], **switches: Any) -> None:
    """Measure what the frozen encoder of MODEL knows about other tasks; check gates.

    Options can also be set in `cap.toml`.
    """

    def start(layers: dict[str, Any]) -> Generator[Event, None, ProbeResult]:
        settings = build(ProbeConfig, layers)
        from capcli.verbs import probe as probe_verb

        return probe_verb.probe(settings)

    documented("probe", start, chosen, **switches)


@options("predict", (PredictConfig,))
def predict(chosen: dict[str, Any], output: str, as_json: bool, quiet: bool) -> None:
    """Ask the model in FOLDER about every text of FILE; write its answers as JSON lines.

    Answers go to stdout. With -o they go to that file, and stdout gets a summary, to which --json and --format apply.
    """
    settings, machine = build(PredictConfig, chosen), wants_json(output, as_json)
    hello(quiet, f"cap predict {settings.model} {settings.file}")
    from capcli.events import StopFlag, signals
    from capcli.verbs import predict as predict_verb

    flag = StopFlag()
    with signals(flag):
        events = predict_verb.predict(settings, flag=flag, put=put)
        found = watch(events, quiet, bars=bool(settings.out) or not sys.stdout.isatty())
    if settings.out:
        emit(found, machine, lambda: terminal.predict_summary(found))
    elif not quiet:
        say(terminal.predict_line(found))


@options("push", (PushConfig,), model=False)
def push(chosen: dict[str, Any], output: str, as_json: bool, quiet: bool) -> None:
    """Send the model in FOLDER to a repository of the hub, with its card and results, in one commit.

    Only files that capcli wrote are sent, and none with what looks like a secret; nothing is deleted there.
    """
    settings, machine = build(PushConfig, chosen), wants_json(output, as_json)
    hello(quiet, f"cap push {settings.folder} {settings.repo}")
    from capcli.verbs import push as push_verb

    found = watch(push_verb.push(settings), quiet)
    emit(found, machine, lambda: terminal.push_summary(found))


@options("tasks", (), model=False)
def tasks(chosen: dict[str, Any], output: str, as_json: bool, quiet: bool) -> None:
    """List the tasks: their columns, labels and metrics, and where their data come from."""
    from capcli.verbs import listing

    found = listing.task_list()
    emit(found, wants_json(output, as_json), lambda: told.task_rows(found))


@options("config", (PruneConfig,), "config", model=False)
def config_(chosen: dict[str, Any], config: str, output: str, as_json: bool, quiet: bool) -> None:
    """Show what every option of `cap prune` would be, and where its value comes from; run nothing."""
    found = Settings(
        settings=tuple(
            Setting(name=name, value=value, source=source, default=default, help=text)
            for name, value, source, default, text in explained(chosen, config)
        )
    )
    emit(found, wants_json(output, as_json), lambda: told.settings_rows(found))


@options("doctor", (), model=False)
def doctor(chosen: dict[str, Any], output: str, as_json: bool, quiet: bool) -> None:
    """Say what is installed, where it computes and where it keeps things; a good start for a bug report."""
    from capcli.verbs import doctor as doctor_verb

    found = doctor_verb.doctor()
    emit(found, wants_json(output, as_json), lambda: told.diagnosis(found))
    if any(check.state == "problem" for check in found.checks):
        raise typer.Exit(EXIT_GATE)


def documented(
    command: str,
    start: Start,
    chosen: dict[str, Any],
    file: str,
    compare: bool,
    output: str,
    as_json: bool,
    quiet: bool,
    **reports: str,
) -> None:
    """Measure or compare, show the result and write the reports, of an error that in JUnit."""
    began, file = time.monotonic(), options_file(file)
    name = f"cap {command} --compare" if compare else f"cap {command}"
    names = [*filter(None, [chosen.get("model")]), *chosen.pop(OTHERS, [])]
    read = [file, *(names if compare else ()), *read_files(chosen)]
    try:
        machine = wants_json(output, as_json)
        layers = layered(command, chosen, file)
        read += read_files(layers)
        check_reports(reports, read)
        if file:
            hello(quiet, f"options from {file}")
        if compare:
            found = compared(command, names, chosen, layers, quiet)
        else:
            found = measured(command, start, names, layers, quiet)
    except Exception as error:
        tell_junit(reports["junit"], read, name, error, time.monotonic() - began)
        raise
    finish(name, found, machine, reports, time.monotonic() - began)


def read_files(chosen: Mapping[str, Any]) -> list[str]:
    """What the options may name as files to read; of a list of baselines all of the text, and each name in it."""
    baseline = chosen.get("baseline", "")
    return [chosen.get("data", ""), baseline, *split_list(baseline)]


def measured(command: str, start: Start, names: Sequence[str], layers: dict[str, Any], quiet: bool) -> Result:
    """The result of eval or probe with all the options."""
    if len(names) > 1:
        raise ConfigError(
            f"cap {command} measures one MODEL, got {len(names)}", "to compare stored results, add --compare"
        )
    if not layers.get("model"):
        raise ConfigError("no MODEL given", f"give one after cap {command}, or set model in {CONFIG_FILE}")
    hello(quiet, f"cap {command} {layers['model']}")
    return watch(start(layers), quiet)


def compared(
    command: str, names: Sequence[str], chosen: Mapping[str, Any], layers: Mapping[str, Any], quiet: bool
) -> Result:
    """The comparison of stored results with the first."""
    gates = {item.name for item, _ in leaves(Gates)}
    if others := [name for name in chosen if name not in gates and name != "model"]:
        raise ConfigError(
            f"--compare measures nothing, so {others[0]} has no effect", "leave it out; only gates are allowed"
        )
    hello(quiet, f"cap {command} --compare {' '.join(names)}")
    from capcli.verbs import compare as compare_verb

    return compare_verb.compare_all(command, names, build(Gates, layers))
