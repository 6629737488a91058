"""The command line: options to configuration, events to the terminal, errors to exit codes. The only place to print."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capcli import ci, files, report, streams
from capcli import config as c
from capcli.errors import CapError, ConfigError, FileError, Stopped
from capcli.text import duration, plain

if TYPE_CHECKING:
    from rich.progress import TaskID

    from capcli.run import Event, StopFlag

EXIT_GATE, EXIT_FAILED, EXIT_INTERRUPTED = 1, 3, 130
FROM_FILE = f"; may stand in {c.CONFIG_FILE} instead"
MODEL_HELP = {
    "prune": f"hub id, folder, the built-in {c.BUILTIN_MODEL!r}, or a short name such as bert-base",
    "eval": "what prune wrote, or any fine-tuned model" + FROM_FILE,
    "export": "what prune wrote, a sparse checkpoint of another tool, or for onnx any fine-tuned model",
    "probe": "what prune wrote, or any model" + FROM_FILE,
}
CONFIG_HELP = "TOML file with options; the command line wins."
FILE_HELP = f"{CONFIG_HELP} Instead of {c.CONFIG_FILE}."
COMPARE_HELP = "Measure nothing: say what moved between two stored results (--json) beyond the noise; gates judge NEW."
REPORTS = {
    "junit": "Write the gates as JUnit XML; of an error, a file that says so.",
    "csv": "Write what was measured as a CSV table.",
    "markdown": "Write the result as Markdown.",
    "html": "Write the result as one HTML page that needs no network.",
}
SWITCHES: dict[str, tuple[Any, Any]] = {
    "overwrite": (bool, typer.Option("--overwrite", help="Start anew, even over a finished run.")),
    "plan": (bool, typer.Option("--plan", help="Print what it would take and give, and do nothing.")),
    "config": (str, typer.Option("--config", metavar="FILE", help=CONFIG_HELP, rich_help_panel="Options")),
    "file": (str, typer.Option("--config", metavar="FILE", help=FILE_HELP, rich_help_panel="Options")),
    "compare": (
        tuple[str, str] | None,
        typer.Option("--compare", metavar="OLD NEW", help=COMPARE_HELP, rich_help_panel="Options"),
    ),
    **{name: (str, typer.Option(f"--{name}", metavar="FILE", help=text)) for name, text in REPORTS.items()},
    "output": (str, typer.Option("--format", help="What stdout gets: human or json.")),
    "as_json": (bool, typer.Option("--json", help="Short for --format json.")),
    "quiet": (bool, typer.Option("--quiet", "-q", help="No progress on stderr.")),
    "debug": (bool, typer.Option("--debug", help="Show the traceback of an error.")),
}
COMMON = ("output", "as_json", "quiet", "debug")
MEASURES = ("file", "compare", *REPORTS)  # switches of the commands that measure, whose MODEL may stand in a file

Start = Callable[[dict[str, Any]], "Generator[Event, None, dict[str, Any]]"]

app = typer.Typer(
    name="cap",
    help="Make a pre-trained language model small for one task, and prove that it still works.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of `cap` and `python -m capcli`."""
    streams.guard()
    code = _exit_code()
    if failure := streams.failure():
        reason = failure.strerror or str(failure)
        tell_lines(f"cannot write to stdout: {reason}", "what was written to files is kept", annotate=code == 0)
        code = code or EXIT_FAILED
    sys.exit(code)


def _exit_code() -> int:
    """Run the command of the command line; returns its exit code."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # it would write colours under GITHUB_ACTIONS
    try:
        return int(app(prog_name="cap", standalone_mode=False) or 0)
    except Exception as error:
        shown = getattr(error, "format_message", None)  # of what the parser refuses; its classes are Typer's own affair
        if shown is None:
            raise
        return refused(error, shown())


def refused(error: Any, message: str) -> int:
    """Say what the parser could not read, as every other error is said; returns the exit code."""
    context = getattr(error, "ctx", None)
    if message.strip():  # or the help was printed
        path = context.command_path if context else "cap"
        tell_lines(message[:1].lower() + message[1:].rstrip("."), f"{path} --help lists what there is")
    return int(getattr(error, "exit_code", CapError.exit_code))


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


# Commands ------------------------------------------------------------------------------------------------------------


def options(name: str, config: type, *switches: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that takes MODEL, the fields of `config` as options, and `switches`.

    The command is called with the options that the user chose, by field name, and the switches by keyword.
    """
    model = _model(name, optional="compare" in switches)
    fields = [_parameter(item, kind) for item, kind in c.leaves(config) if item.metadata]
    chosen = {"model", *(item.name for item in fields)}
    fields += [_switch(switch) for switch in (*switches, *COMMON)]

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            given = {key: value for key, value in values.items() if key in chosen and value is not None}
            with guarded(values["debug"]):
                function(given, **{s: values[s] for s in (*switches, *COMMON[:3])})

        signature = inspect.Signature([model, *fields])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {item.name: item.annotation for item in signature.parameters.values()}
        command.__doc__ = function.__doc__
        app.command(name)(command)
        return function

    return register


def _model(command: str, optional: bool) -> inspect.Parameter:
    info = typer.Argument(metavar="MODEL", help=MODEL_HELP[command], show_default=False)
    kind, default = (str | None, None) if optional else (str, inspect.Parameter.empty)
    return inspect.Parameter(
        "model", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=Annotated[kind, info]
    )


def _parameter(item: Any, kind: Any) -> inspect.Parameter:
    """One field as a Typer option; the default is shown but not filled in, so that a preset can stand below it."""
    meta, default = item.metadata, item.default
    unset = default in ("", MISSING) or default is False or meta["panel"] == "Gates"  # there 0 is no gate
    flag = "--" + item.name.replace("_", "-")
    info = typer.Option(
        *filter(None, (f"{flag}/--no-{flag[2:]}" if kind is bool else flag, meta["flag"])),
        help=meta["help"][:1].upper() + meta["help"][1:] + ("." if unset else f" (default {default})."),
        show_default=False,
        rich_help_panel=meta["panel"] or "Options",
        metavar=None if kind is bool else {str: "TEXT", int: "N", float: "X"}[kind],
        parser=_share if meta["share"] else None,
    )
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _share(text: str) -> float:
    """What a share on the command line is. Raises `typer.BadParameter`."""
    try:
        return c.share(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number, nor one in per cent such as 98%.") from error


def _switch(name: str) -> inspect.Parameter:
    kind, info = SWITCHES[name]
    default = {bool: False, str: ""}.get(kind)
    info.show_default, info.rich_help_panel = False, info.rich_help_panel or "Output"
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


@options("prune", c.PruneConfig, "overwrite", "plan", "config")
def prune(
    chosen: dict[str, Any], overwrite: bool, plan: bool, config: str, output: str, as_json: bool, quiet: bool
) -> None:
    """Prune MODEL while it learns TASK; write a sparse model and a report.

    The same command again continues a stopped run.
    """
    settings, machine = c.prune_config(chosen, config), wants_json(output, as_json)
    hello(quiet, f"cap prune {settings.model} for {settings.source.task} to {settings.out_folder}")
    from capcli import run
    from capcli.verbs import prune as prune_verb

    if plan:
        found = watch(prune_verb.plan(settings), quiet)
        emit(found, machine, lambda: report.facts(prune_verb.plan_rows(found)))
        return
    flag = run.StopFlag()
    with run.signals(flag):
        found = watch(prune_verb.prune(settings, flag=flag, overwrite=overwrite), quiet)
    emit(found, machine, lambda: report.prune_summary(found, settings.out_folder))


@options("eval", c.EvalConfig, *MEASURES)
def eval_(chosen: dict[str, Any], **switches: Any) -> None:
    """Measure MODEL on a task: metrics with intervals, size, latency; check gates.

    For a model of `cap prune` the task and data of the run are the default. Options may stand in `cap.toml`.
    """

    def start(layers: dict[str, Any]) -> Generator[Event, None, dict[str, Any]]:
        from capcli.verbs import evaluate

        return evaluate.evaluate(evaluate.eval_config(layers))

    documented("eval", start, chosen, **switches)


@options("export", c.ExportConfig, "plan")
def export(chosen: dict[str, Any], plan: bool, output: str, as_json: bool, quiet: bool) -> None:
    """Write a pruned MODEL in the form that its next home needs, and check it.

    dense loads everywhere; sparse is a smaller file; sliced and onnx compute without what was removed.
    """
    settings, machine = c.build(c.ExportConfig, chosen), wants_json(output, as_json)
    hello(quiet, f"cap export {settings.model} to {settings.to}")
    from capcli import run
    from capcli.verbs import export as export_verb

    if plan:
        found = watch(export_verb.plan(settings), quiet)
        emit(found, machine, lambda: report.plan_summary(found))
        return
    flag = run.StopFlag()
    with run.signals(flag):
        found = watch(export_verb.export(settings), quiet, flag)
    emit(found, machine, lambda: report.export_summary(found))


@options("probe", c.ProbeConfig, *MEASURES)
def probe(chosen: dict[str, Any], **switches: Any) -> None:
    """Measure what the frozen encoder of MODEL knows about other tasks; check gates.

    Options may stand in `cap.toml`.
    """

    def start(layers: dict[str, Any]) -> Generator[Event, None, dict[str, Any]]:
        settings = c.build(c.ProbeConfig, layers)
        from capcli.verbs import probe as probe_verb

        return probe_verb.probe(settings)

    documented("probe", start, chosen, **switches)


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
    began, file = time.monotonic(), c.options_file(file)
    kind, name = ("compare", f"cap {command} --compare") if compare else (command, f"cap {command}")
    read = [file, *(compare or ()), *read_files(chosen)]
    try:
        machine = wants_json(output, as_json)
        layers = c.layered(command, chosen, file)
        read += read_files(layers)
        check_reports(reports, read)
        if file:
            hello(quiet, f"options from {file}")
        found = measured(command, start, chosen, layers, compare, quiet)
    except Exception as error:
        tell_junit(reports["junit"], read, name, error, time.monotonic() - began)
        raise
    finish(kind, name, found, machine, reports, time.monotonic() - began)


def read_files(chosen: Mapping[str, Any]) -> list[str]:
    """What the options may name as files to read; of a list of baselines all of the text, and each name in it."""
    baseline = chosen.get("baseline", "")
    return [chosen.get("data", ""), baseline, *c.split_list(baseline)]


def measured(
    command: str,
    start: Start,
    chosen: Mapping[str, Any],
    layers: dict[str, Any],
    compare: tuple[str, str] | None,
    quiet: bool,
) -> dict[str, Any]:
    """The result of eval or probe with all the options, or the comparison of two results."""
    if compare is None:
        if not layers.get("model"):
            raise ConfigError("no MODEL given", f"name one after cap {command}, or as model in {c.CONFIG_FILE}")
        hello(quiet, f"cap {command} {layers['model']}")
        return watch(start(layers), quiet)
    gates = {item.name for item, _ in c.leaves(c.Gates)}
    if others := [name for name in chosen if name not in gates]:
        raise ConfigError(f"--compare measures nothing, {others[0]} has no use there", "leave it out; gates may stay")
    hello(quiet, f"cap {command} --compare {' '.join(compare)}")
    from capcli.verbs import moves as compare_verb

    return compare_verb.compare(command, *compare, c.build(c.Gates, layers))


# Output --------------------------------------------------------------------------------------------------------------


def wants_json(output: str, as_json: bool) -> bool:
    """Whether stdout gets JSON. Raises `ConfigError` for an unknown format."""
    if output not in ("", "human", "json"):
        raise ConfigError(f"unknown format {output!r}", "valid: human, json")
    return as_json or output == "json"


def hello(quiet: bool, text: str) -> None:
    """The first line, before anything heavy is imported."""
    if not quiet:
        say(text)


def say(text: str) -> None:
    """One line on stderr; control characters are shown, not obeyed."""
    print(shown(text), file=sys.stderr, flush=True)


def shown(text: str) -> str:
    """One line for people in which nothing acts, neither on a terminal nor in a log."""
    return logged(plain(text, 2000))


def logged(text: str) -> str:
    """Text as it may be printed where GitHub reads along."""
    return ci.inert(text) if on_github() else text


def emit(found: Mapping[str, Any], machine: bool, summary: Callable[[], Any]) -> None:
    """The result on stdout: one JSON object, or what `summary` renders."""
    if machine:
        sys.stdout.write(files.json_text(found).replace("##[", "\\u0023#["))  # a command to GitHub; the same value
        sys.stdout.flush()
        return
    from rich.console import Console

    terminal = sys.stdout.isatty()
    console = Console(
        file=sys.stdout, markup=False, highlight=False, width=None if terminal else 100, soft_wrap=not terminal
    )
    with console.capture() as captured:
        console.print(summary())
    sys.stdout.write(logged(captured.get()))
    sys.stdout.flush()


def check_reports(reports: Mapping[str, str], read: Iterable[str]) -> None:
    """Raise `FileError` for a report that could not be written, or would overwrite another one or what is `read`."""
    taken = {Path(file).resolve(): f"{file} is read" for file in read if file and "\0" not in file}
    for name, file in reports.items():
        if file:
            path = report_path(name, file)
            if path in taken:
                raise FileError(f"--{name} {file}: {taken[path]} as well", "choose another file")
            taken[path] = f"--{name} is written there"
            try:
                files.check_writable(path.parent)
            except FileError as error:
                raise FileError(f"--{name} {file}: {error.message}", "choose another file") from error


def report_path(name: str, file: str) -> Path:
    """Where a report goes; a link stays and its target is written, if that lies in the same folder or below.

    Raises `FileError` for a folder, a device, and a link that leads elsewhere, which may be that of a checkout.
    """
    path, named = Path(file).resolve(), Path(file)
    if named.is_symlink() and not path.is_relative_to(named.parent.resolve()):
        raise FileError(f"--{name} {file}: a link that leads out of its folder", "name the file that it points to")
    if path.exists() and not path.is_file():
        raise FileError(f"--{name} {file}: not a file", "choose another file")
    return path


def tell_junit(junit: str, read: Iterable[str], name: str, error: Exception, seconds: float) -> None:
    """Write an error also as JUnit XML, so that a job shows it where it shows gates; never over what is `read`."""
    if junit:
        message, hint, _ = explained(error)
        with contextlib.suppress(CapError, OSError):  # the error itself matters more
            check_reports({"junit": junit}, read)
            files.write_text(report_path("junit", junit), ci.junit_error(name, message, hint, seconds))


def finish(
    kind: str, name: str, found: Mapping[str, Any], machine: bool, reports: Mapping[str, str], seconds: float
) -> None:
    """Show the result, write the reports, tell GitHub; exit 1 when a gate failed, also when a report did too."""
    summaries = {"eval": report.eval_summary, "probe": report.probe_summary, "compare": report.moves_summary}
    emit(found, machine, lambda: summaries[kind](found))
    texts = {
        "junit": lambda: ci.junit_xml(name, found["gates"], seconds),
        "csv": lambda: ci.csv_text(kind, found),
        "markdown": lambda: ci.markdown_text(kind, found),
        "html": lambda: report.render_result_html(kind, found),
    }
    failures = []
    for form, file in reports.items():
        if file:
            try:
                files.write_text(report_path(form, file), texts[form]())
            except Exception as error:  # the other reports and the gates still count
                failures.append(error)
    tell_github(kind, found)
    if found["passed"] and failures:
        raise failures[0]
    for failure in failures:
        tell(failure)
    if not found["passed"]:
        raise typer.Exit(EXIT_GATE)


def tell_github(kind: str, found: Mapping[str, Any]) -> None:
    """Annotations for failed gates, and the Markdown as summary of the step; nothing elsewhere."""
    if not on_github():
        return
    for line in ci.github_annotations(found["gates"]):
        print(ci.inert(line), file=sys.stderr)
    if target := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(target).open("a", encoding="utf-8") as file:
                file.write(ci.markdown_text(kind, found))
        except OSError as error:  # a summary never changes the outcome
            say(f"no step summary written: {error}")


def on_github() -> bool:
    """Whether this is a job of GitHub Actions, which reads commands from stdout and stderr."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


@contextlib.contextmanager
def guarded(debug: bool) -> Iterator[None]:
    """Turn every failure into one line, a hint and the right exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except BaseException as error:
        if debug:
            print(logged(traceback.format_exc()), file=sys.stderr, end="")
        raise typer.Exit(tell(error)) from None


def tell(error: BaseException) -> int:
    """The lines of an error on stderr; returns its exit code."""
    message, hint, code = explained(error)
    tell_lines(message, hint, annotate=code <= EXIT_FAILED)
    return code


def tell_lines(message: str, hint: str, *, annotate: bool = True) -> None:
    """An error as one line, a hint, and on GitHub an annotation that stands on the page of the job."""
    print(f"error: {shown(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {shown(hint)}", file=sys.stderr)
    if annotate and on_github():
        print(f"::error title=cap::{shown(message).replace('%', '%25')}", file=sys.stderr)
    sys.stderr.flush()


def explained(error: BaseException) -> tuple[str, str, int]:
    """Message, hint and exit code of any failure."""
    if isinstance(error, CapError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "run the same command again; what is finished is kept", EXIT_INTERRUPTED
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"this name is too long for a file: {plain(str(error.filename), 80)}", "shorten it", CapError.exit_code
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate" in str(error):
        return "out of memory", "free some memory, use shorter texts or a smaller model", EXIT_FAILED
    first = (str(error).strip().splitlines() or [""])[0]
    return f"internal error: {type(error).__name__}: {first}", "run again with --debug and report it", EXIT_FAILED


def watch(events: Generator[Event, None, dict[str, Any]], quiet: bool, flag: StopFlag | None = None) -> dict[str, Any]:
    """Show events as they come; returns the result. Raises `Stopped` between two events once the flag is set."""
    show = (lambda event: None) if quiet else _bars() if sys.stderr.isatty() else _lines()
    with (
        contextlib.closing(events),
        show if isinstance(show, contextlib.AbstractContextManager) else contextlib.nullcontext(),
    ):
        while True:
            try:
                event = next(events)
                show(event)
                if flag and event.overall < 1 and (why := flag.requested()):
                    raise Stopped(f"stopped by {why}; nothing was written", "run the same command again")
            except StopIteration as stop:
                return dict(stop.value)


class _lines:
    """Plain lines: every note that is news, and where the run stands at most every ten seconds."""

    every_seconds = 10.0

    def __init__(self) -> None:
        self.began, self.said_at = time.monotonic(), time.monotonic()

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if event.note:
            say(f"{event.phase}: {event.note}")
        elif now - self.said_at >= self.every_seconds and event.total:
            left = remaining(now - self.began, event.overall)
            state = event.status or f"{event.done:,.0f} of {event.total:,.0f}"
            say(f"{event.phase}: {state}; {event.overall:.0%} of the run{left}")
        else:
            return
        self.said_at = now


def remaining(elapsed: float, share: float) -> str:
    """`, 3 min left`, once enough of the run has passed to tell."""
    return f", {duration(elapsed * (1 - share) / share)} left" if share > 0.02 else ""


class _bars(contextlib.AbstractContextManager["_bars"]):
    """Two bars on a terminal: the phase and the whole run, each with the time that passed and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%", markup=False),
            TimeElapsedColumn(),
            TextColumn("passed,", markup=False),
            TimeRemainingColumn(),
            TextColumn("left", markup=False),
        )
        self.progress = Progress(*columns, console=Console(stderr=True, markup=False, highlight=False), transient=True)
        self.run, self.name = self.progress.add_task("whole run", total=1.0), ""
        self.phase: TaskID | None = None

    def __enter__(self) -> _bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, event: Event) -> None:
        if event.phase != self.name:
            if self.phase is not None:
                self.progress.remove_task(self.phase)
            self.name, self.phase = event.phase, self.progress.add_task(event.phase, total=event.total or None)
        assert self.phase is not None
        if event.note:
            self.progress.console.print(shown(f"{event.phase}: {event.note}"))
        text = logged(plain(f"{event.phase} ({event.status})" if event.status else event.phase))
        self.progress.update(self.phase, description=text, completed=event.done, total=event.total or None)
        self.progress.update(self.run, completed=event.overall)
