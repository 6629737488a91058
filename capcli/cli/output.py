"""What is printed and written: results, reports, errors with their exit codes."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from capcli import files, parallel
from capcli.cli import streams
from capcli.errors import CapError, ConfigError, FileError, out_of_memory
from capcli.records.codec import Versioned, to_json
from capcli.records.measured import Result
from capcli.records.parts import Gate
from capcli.reporting import ci, documents
from capcli.reporting.terminal import result_summary
from capcli.reporting.text import discreet, plain

EXIT_GATE, EXIT_FAILED, EXIT_INTERRUPTED = 1, 3, 130


def wants_json(output: str, as_json: bool) -> bool:
    """Whether stdout gets JSON. Raises `ConfigError` for an unknown format."""
    if output not in ("", "human", "json"):
        raise ConfigError(f"unknown format {output!r}", "choose human or json")
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


def put(text: str) -> None:
    """A part of a long result on stdout. Raises `typer.Exit` when nobody reads it any more, or it cannot be written."""
    sys.stdout.write(_inert(text))
    sys.stdout.flush()
    if getattr(sys.stdout, "failed", None):
        raise typer.Exit  # `streams.failure` says whether that is an error


def _inert(json_text: str) -> str:
    """The same values without a command to GitHub."""
    return json_text.replace("##[", "\\u0023#[")


def emit(found: Versioned, machine: bool, summary: Callable[[], Any]) -> None:
    """The result on stdout: one JSON object, or what `summary` renders."""
    if machine:
        sys.stdout.write(_inert(files.json_text(to_json(found))))
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
            taken[path] = f"--{name} is written to the same file"
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
        raise FileError(f"--{name} {file}: a link that leads out of its own folder", "name the file that it points to")
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


def finish(name: str, found: Result, machine: bool, reports: Mapping[str, str], seconds: float) -> None:
    """Show the result, write the reports, tell GitHub; exit 1 when a gate failed, also when a report did too."""
    emit(found, machine, lambda: result_summary(found))
    reports = reports if parallel.place().rank == 0 else {}
    texts = {
        "junit": lambda: ci.junit_xml(name, found.gates, seconds),
        "csv": lambda: ci.csv_text(found),
        "markdown": lambda: ci.markdown_text(found),
        "html": lambda: documents.render_result_html(found),
    }
    failures = []
    for form, file in reports.items():
        if file:
            try:
                files.write_text(report_path(form, file), texts[form]())
            except Exception as error:  # the other reports and the gates still count
                failures.append(error)
    tell_github(found)
    if found.passed and failures:
        raise failures[0]
    for failure in failures:
        tell(failure)
    if not found.passed:
        raise typer.Exit(EXIT_GATE)


def tell_github(found: Result) -> None:
    """Annotations for failed gates, and the Markdown as summary of the step; nothing elsewhere."""
    if not on_github() or parallel.place().rank:
        return
    tell_gates(found.gates)
    if target := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(target).open("a", encoding="utf-8") as file:
                file.write(ci.markdown_text(found))
        except OSError as error:  # a summary never changes the outcome
            say(f"no step summary written: {error}")


def tell_gates(gates: Sequence[Gate]) -> None:
    """Annotations for failed gates on GitHub; nothing elsewhere."""
    for line in ci.github_annotations(gates) if on_github() else ():
        print(ci.inert(line), file=sys.stderr)


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
            print(logged(discreet(traceback.format_exc())), file=sys.stderr, end="")
        raise typer.Exit(tell(error)) from None


def tell(error: BaseException) -> int:
    """The lines of an error on stderr; returns its exit code."""
    message, hint, code = explained(error)
    told = getattr(error, "told", None)
    if told is None and streams.muted() and not message.startswith("rank "):  # before the processes met
        message = f"rank {parallel.place().rank}: {message}"
    if not told:
        streams.speak()
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
    """Message, hint and exit code of any failure; the texts without secrets."""
    message, hint, code = _explained(error)
    return discreet(message), discreet(hint), code


def _explained(error: BaseException) -> tuple[str, str, int]:
    if isinstance(error, CapError):
        return error.message, error.hint, error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "run the same command again; finished work is kept", EXIT_INTERRUPTED
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"this name is too long for a file: {plain(str(error.filename), 80)}", "shorten it", CapError.exit_code
    if out_of_memory(error):
        return "out of memory", "free some memory, use shorter texts or a smaller model", EXIT_FAILED
    first = (str(error).strip().splitlines() or [""])[0]
    return f"internal error: {type(error).__name__}: {first}", "run again with --debug and report it", EXIT_FAILED
