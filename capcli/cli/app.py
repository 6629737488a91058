"""The commands of `cap`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

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
    tell_junit,
    tell_lines,
    wants_json,
)
from capcli.cli.parameters import MEASURES, Start, app, options
from capcli.config.export import ExportConfig
from capcli.config.layers import build, check_limits, explained, layered, options_file, prune_config
from capcli.config.measure import EvalConfig, Gates, ProbeConfig
from capcli.config.names import CONFIG_FILE
from capcli.config.options import leaves, split_list
from capcli.config.predict import PredictConfig
from capcli.config.prune import PruneConfig
from capcli.errors import CapError, ConfigError
from capcli.progress import Bars, Lines, nowhere, on_terminal
from capcli.progress import watch as watched
from capcli.records.measured import EvalResult, ProbeResult, Result
from capcli.records.told import Setting, Settings
from capcli.reporting import terminal, told

if TYPE_CHECKING:
    from capcli.events import Event, StopFlag

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """The configuration of a command without options of its own."""


def watch(events: Generator[Event, None, T], quiet: bool, flag: StopFlag | None = None, *, bars: bool = True) -> T:
    """`progress.watch` on stderr; `bars`, whether they may be drawn, on a terminal that nothing else is written to."""
    return watched(events, nowhere if quiet else Bars(shown) if bars and on_terminal() else Lines(say), flag)


def main() -> None:
    """Entry point of `cap` and `python -m capcli`."""
    streams.guard()
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


@options("prune", PruneConfig, "overwrite", "plan", "config")
def prune(
    chosen: dict[str, Any], overwrite: bool, plan: bool, config: str, output: str, as_json: bool, quiet: bool
) -> None:
    """Prune MODEL while it learns TASK; write a sparse model and a report.

    To continue a stopped run, run the same command again.
    """
    settings, machine = prune_config(chosen, config), wants_json(output, as_json)
    hello(quiet, f"cap prune {settings.model} for {settings.source.task} to {settings.out_folder}")
    from capcli.events import StopFlag, signals
    from capcli.pruning import plan as planning
    from capcli.verbs import prune as prune_verb

    if plan:
        planned = watch(planning.plan(settings), quiet)
        emit(planned, machine, lambda: terminal.facts(planning.plan_rows(planned)))
        return
    flag = StopFlag()
    with signals(flag):
        found = watch(prune_verb.prune(settings, flag=flag, overwrite=overwrite), quiet)
    emit(found, machine, lambda: terminal.prune_summary(found, settings.out_folder))


@options("eval", EvalConfig, *MEASURES)
def eval_(chosen: dict[str, Any], **switches: Any) -> None:
    """Measure MODEL on a task: metrics with intervals, size, latency; check gates.

    For a model made by `cap prune`, task and data of its run are the default. Options can also be set in `cap.toml`.
    """

    def start(layers: dict[str, Any]) -> Generator[Event, None, EvalResult]:
        from capcli.verbs import evaluate

        return evaluate.evaluate(evaluate.eval_config(layers))

    documented("eval", start, chosen, **switches)


@options("export", ExportConfig, "plan")
def export(chosen: dict[str, Any], plan: bool, output: str, as_json: bool, quiet: bool) -> None:
    """Convert a pruned MODEL to another format, and check the result; or choose the format that meets your limits.

    dense: for every tool; sparse: the smallest file; sliced and onnx: faster, without the removed parts.
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


@options("probe", ProbeConfig, *MEASURES)
def probe(chosen: dict[str, Any], **switches: Any) -> None:
    """Measure what the frozen encoder of MODEL knows about other tasks; check gates.

    Options can also be set in `cap.toml`.
    """

    def start(layers: dict[str, Any]) -> Generator[Event, None, ProbeResult]:
        settings = build(ProbeConfig, layers)
        from capcli.verbs import probe as probe_verb

        return probe_verb.probe(settings)

    documented("probe", start, chosen, **switches)


@options("predict", PredictConfig)
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


@options("tasks", Nothing, model=False)
def tasks(chosen: dict[str, Any], output: str, as_json: bool, quiet: bool) -> None:
    """List the tasks: their columns, labels and metrics, and where their data come from."""
    from capcli.verbs import listing

    found = listing.task_list()
    emit(found, wants_json(output, as_json), lambda: told.task_rows(found))


@options("config", PruneConfig, "config", model=False)
def config_(chosen: dict[str, Any], config: str, output: str, as_json: bool, quiet: bool) -> None:
    """Show what every option of `cap prune` would be, and where its value comes from; run nothing."""
    found = Settings(
        settings=tuple(
            Setting(name=name, value=value, source=source, default=default, help=text)
            for name, value, source, default, text in explained(chosen, config)
        )
    )
    emit(found, wants_json(output, as_json), lambda: told.settings_rows(found))


@options("doctor", Nothing, model=False)
def doctor(chosen: dict[str, Any], output: str, as_json: bool, quiet: bool) -> None:
    """Say what is installed, where it computes and where it keeps things; a good start of a bug report."""
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
    compare: tuple[str, str] | None,
    output: str,
    as_json: bool,
    quiet: bool,
    **reports: str,
) -> None:
    """Measure or compare, show the result and write the reports, of an error that in JUnit."""
    began, file = time.monotonic(), options_file(file)
    name = f"cap {command} --compare" if compare else f"cap {command}"
    read = [file, *(compare or ()), *read_files(chosen)]
    try:
        machine = wants_json(output, as_json)
        layers = layered(command, chosen, file)
        read += read_files(layers)
        check_reports(reports, read)
        if file:
            hello(quiet, f"options from {file}")
        found = measured(command, start, chosen, layers, compare, quiet)
    except Exception as error:
        tell_junit(reports["junit"], read, name, error, time.monotonic() - began)
        raise
    finish(name, found, machine, reports, time.monotonic() - began)


def read_files(chosen: Mapping[str, Any]) -> list[str]:
    """What the options may name as files to read; of a list of baselines all of the text, and each name in it."""
    baseline = chosen.get("baseline", "")
    return [chosen.get("data", ""), baseline, *split_list(baseline)]


def measured(
    command: str,
    start: Start,
    chosen: Mapping[str, Any],
    layers: dict[str, Any],
    compare: tuple[str, str] | None,
    quiet: bool,
) -> Result:
    """The result of eval or probe with all the options, or the comparison of two results."""
    if compare is None:
        if not layers.get("model"):
            raise ConfigError("no MODEL given", f"give one after cap {command}, or set model in {CONFIG_FILE}")
        hello(quiet, f"cap {command} {layers['model']}")
        return watch(start(layers), quiet)
    gates = {item.name for item, _ in leaves(Gates)}
    if others := [name for name in chosen if name not in gates]:
        raise ConfigError(
            f"--compare measures nothing, so {others[0]} has no effect", "leave it out; only gates are allowed"
        )
    hello(quiet, f"cap {command} --compare {' '.join(compare)}")
    from capcli.verbs import compare as compare_verb

    return compare_verb.compare(command, *compare, build(Gates, layers))
